"""Data flows one way: a module imports only from the modules that its row in CONTRIBUTING.md names."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "cryochains"

ONLY_IN = {
    "nglview": {"widgets"},
    "ipywidgets": {"widgets", "panels", "explorer"},
    "jscatter": {"panels"},
    "IPython": {"widgets"},
    "matplotlib": {"plots", "exports", "widgets", "explorer"},
    "torch_ctf": {"imaging"},
    "mrcfile": {"stacks", "relion"},
    "starfile": {"relion"},
    "accelerate": {"training"},
}


def read_layers() -> dict[str, set[str]]:
    """What each module may import, in the order of the table; "all" is every row above."""
    table = (ROOT / "CONTRIBUTING.md").read_text()
    layers = {}
    for module, may_import in re.findall(r"^\| `(\w+)` \|[^|]*\|([^|]*)\|$", table, re.MULTILINE):
        layers[module] = set(layers) if may_import.strip() == "all" else set(re.findall(r"\w+", may_import))
    return layers


LAYERS = read_layers()
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


def imported(module: str) -> set[str]:
    """Dotted names that a module imports anywhere in its file, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["cryochains" if node.level else None, node.module]))
            # `from . import imaging` and `from .imaging import CTF` are the same arrow.
            names |= {f"{base}.{alias.name}" for alias in node.names} if base == "cryochains" else {base}
    return names


def siblings(module: str) -> set[str]:
    return {name.split(".")[1] for name in imported(module) if name.startswith("cryochains.")}


def test_every_module_has_a_row_and_rows_only_name_rows_above():
    assert set(MODULES) <= set(LAYERS)
    order = list(LAYERS)
    for module, may_import in LAYERS.items():
        assert may_import <= set(order[: order.index(module)]), module


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_what_its_row_names(module):
    assert "cryochains" not in imported(module), "a module imports its siblings, not the whole package"
    assert siblings(module) <= LAYERS[module]


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_with_one_room(library):
    users = {module for module in MODULES if library in {name.split(".")[0] for name in imported(module)}}
    assert users <= ONLY_IN[library]


def test_table_keeps_the_walls_of_the_house():
    assert LAYERS["imaging"] <= {"files"}, "imaging knows nothing of chains"
    for module in LAYERS.keys() - {"exports", "widgets", "panels", "explorer"}:
        assert not {"plots", "widgets"} & LAYERS[module], f"{module} draws nothing"
