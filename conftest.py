"""Without the extras [lab] the examples of modules that show widgets are left out."""

from importlib.util import find_spec

WIDGET_MODULES = ("explore", "explorer", "molecules", "panels", "widgets")

if all(find_spec(name) for name in ("ipywidgets", "nglview", "jscatter")):
    collect_ignore = []
else:
    collect_ignore = [f"cryochains/view/{name}.py" for name in WIDGET_MODULES]
