"""Without the extras [lab] the examples in the widgets' docstrings are left out."""

from importlib.util import find_spec

lab = all(map(find_spec, ("ipywidgets", "nglview", "jscatter")))
collect_ignore = [] if lab else [f"cryochains/{name}.py" for name in ("widgets", "panels", "explorer")]
