"""The project's files agree with each other, and the library keeps the house rules a program can check."""

import ast
import importlib.metadata
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import cryochains

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = sorted((ROOT / "cryochains").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
WIDGETS = ("widgets", "panels", "explorer")
CONDA_NAMES = {"pytorch": "torch"}


def bounds(lines) -> dict[str, SpecifierSet]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): r.specifier for r in requirements}


def requirements() -> dict[str, SpecifierSet]:
    return bounds(PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["test"])


def constraints() -> dict[str, SpecifierSet]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return bounds(line for line in lines if not line.startswith("#"))


def syntax() -> list[tuple[Path, ast.AST]]:
    return [(path, node) for path in LIBRARY for node in ast.walk(ast.parse(path.read_text()))]


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def test_conda_environment_agrees_with_pyproject():
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    from_pip = next(item["pip"] for item in dependencies if isinstance(item, dict))
    from_conda = [item for item in dependencies if isinstance(item, str) and item != "pip"]
    assert from_pip[-1] == "-e ."
    environment = bounds(from_conda)
    assert environment.pop("python") == SpecifierSet(PROJECT["requires-python"])
    environment = {CONDA_NAMES.get(name, name): specifier for name, specifier in environment.items()}
    assert not environment.keys() & bounds(from_pip[:-1]).keys()
    assert environment | bounds(from_pip[:-1]) == requirements()


def test_constraints_pin_every_requirement_within_its_bounds():
    pins = constraints()
    for name, specifier in requirements().items():
        assert name in pins, f"constraints.txt pins no {name}"
        (pin,) = pins[name]
        assert pin.operator == "==" and "*" not in pin.version, f"{name}: {pin}"
        assert specifier.contains(pin.version), f"{name}: {pin} is outside {specifier}"


@pytest.mark.skipif(sys.platform != "linux", reason="constraints.txt lists what Linux installs")
def test_constraints_pin_what_the_requirements_require():
    waiting, seen = list(requirements()), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in importlib.metadata.distribution(name).requires or []:
            required = Requirement(text)
            # torch pins its own CUDA packages exactly, and the CPU build has none.
            if name == "torch" and any(bound.operator == "==" for bound in required.specifier):
                continue
            if required.marker is None or required.marker.evaluate({"extra": ""}):
                waiting.append(canonicalize_name(required.name))
    assert seen <= constraints().keys()


def test_constraints_have_no_build_of_one_machine():
    text = (ROOT / "constraints.txt").read_text()
    assert "torch==2.13.0\n" in text
    assert "+cpu" not in text and " @ " not in text


def test_nglview_is_the_version_that_shows():
    assert bounds(EXTRAS["lab"])["nglview"] == SpecifierSet("==4.0")
    # Its own bound; a numpy pinned past it could not be installed beside it.
    assert SpecifierSet("<2.3").contains(next(iter(constraints()["numpy"])).version)


def test_version_is_the_same_everywhere():
    assert cryochains.__version__ == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert len(citation["preferred-citation"]["authors"]) == 6
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_embedded_data_is_declared():
    data = [path for path in (ROOT / "cryochains" / "data").iterdir() if path.name != "__init__.py"]
    assert data and all(path.is_file() for path in data if path.name != "__pycache__")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert declared == {"cryochains": ["data/*"]}


def test_import_without_the_lab_extras():
    code = (
        "import sys\n"
        "for name in ('nglview', 'ipywidgets', 'jupyterlab', 'IPython'): sys.modules[name] = None\n"
        "import cryochains\n"
        "print(cryochains.load_structure('glua3-open').n_chains)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "2"


def test_library_has_no_assert():
    found = [where(path, node) for path, node in syntax() if isinstance(node, ast.Assert)]
    assert not found, "a ValueError speaks to the user; found assert at " + ", ".join(found)


def test_library_loads_no_pickles():
    found = []
    for path, node in syntax():
        if not isinstance(node, ast.Call):
            continue
        pickled = any(k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords)
        function = ast.unparse(node.func)
        if pickled or function in {"torch.load", "torch.save"} or function.startswith("pickle."):
            found.append(where(path, node))
    assert not found, "a pickle runs code when it is opened; found at " + ", ".join(found)


def test_library_inherits_from_modules_of_torch_only():
    allowed = {"nn.Module", "torch.nn.Module", "torch.autograd.Function", "Function"}
    for path, node in syntax():
        if isinstance(node, ast.ClassDef) and path.stem not in WIDGETS:
            assert {ast.unparse(base) for base in node.bases} <= allowed, where(path, node)


def lines_of_code(path: Path) -> int:
    """Lines that are not blank, comment or docstring."""
    source = path.read_text()
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.end_lineno + 1))
    return len(lines)


def test_modules_stay_readable():
    assert not (ROOT / "cryochains" / "utils.py").exists()
    too_long = {path.name: n for path in LIBRARY if (n := len(path.read_text().splitlines())) >= 350}
    assert not too_long
    code = {path.name: lines_of_code(path) for path in LIBRARY}
    # The explorer and what only it stands on came later and have a bound of their own.
    explorer = sum(code.pop(f"{name}.py") for name in ("explorer", "panels", "landscape", "exports", "screws"))
    assert sum(code.values()) < 3150 and explorer < 750, (explorer, code)
    assert sum(n for name, n in code.items() if name not in ("plots.py", "widgets.py")) < 2800, code
    for path in LIBRARY:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} opens with no docstring"


def test_committed_files_name_no_machine():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if listed.returncode:
        pytest.skip("not a git checkout, so what is committed is not known")
    # Written so that this file does not match itself.
    machine = re.compile(r"(?<![\w.~}])/(?:work|root|tmp|home/\w+|Users/\w+)/[\w.]|C:\\Users")
    text_files = {"", ".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".cff", ".ipynb", ".json"}
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.is_file() and path.suffix in text_files:
            text = path.read_text(errors="replace")
            found += [f"{name}: {match.group()}" for match in machine.finditer(text)]
    assert not found
