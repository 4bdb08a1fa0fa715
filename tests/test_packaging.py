"""The project's files agree with each other, and the library keeps its rules."""

import ast
import importlib.metadata
import re
import subprocess
import sys
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
    environment = {
        CONDA_NAMES.get(name, name): specifier for name, specifier in environment.items()
    }
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
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "package-data"
    ]
    assert declared == {"cryochains": ["data/*", "py.typed"]}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT_EXTRAS = (
    "import sys\n"
    "for name in ('nglview', 'ipywidgets', 'jupyterlab', 'IPython', 'jscatter'):\n"
    "    sys.modules[name] = None\n"
)


def test_import_without_the_lab_extras():
    code = (
        "import cryochains\n"
        "from cryochains import *\n"
        "assert callable(explore) and callable(view_structure)\n"
        "print(cryochains.load_structure('glua3-open').n_chains)\n"
    )
    assert run(WITHOUT_EXTRAS + code).split()[-1] == "2"


def test_explore_without_the_lab_extras_says_what_to_install():
    code = (
        "import torch, cryochains as cc\n"
        "model = cc.Model(cc.load_structure('glua3-open'), modes=None, box_size=32, pixel_size=6)\n"
        "result = cc.Result(model, torch.randn(9, 12))\n"
        "for show in (lambda: cc.explore(result), lambda: cc.view_structure(model.structure)):\n"
        "    try:\n"
        "        show()\n"
        "    except ImportError as error:\n"
        "        print(error)\n"
    )
    lines = run(WITHOUT_EXTRAS + code).strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("expected ") and "pip install 'cryochains[lab]'" in line


def test_import_is_light():
    """Libraries that take seconds load when a name is first used, and some not even then."""
    code = (
        "import sys, cryochains as cc\n"
        "heavy = ('torch', 'prody', 'matplotlib', 'sklearn', 'scipy', 'pandas')\n"
        "print([name for name in heavy if name in sys.modules])\n"
        "cc.Model, cc.refine, cc.load_particles, cc.compute_pca\n"
        "late = ('torch._dynamo', 'roma', 'matplotlib.pyplot', 'nglview')\n"
        "print([name for name in late if name in sys.modules])\n"
    )
    assert run(code).splitlines() == ["[]", "[]"]


def test_help_lists_the_public_names():
    text = run("import cryochains\nhelp(cryochains)\n")
    for name in cryochains.__all__:
        assert re.search(rf"\b{name}\b", text), name


def test_library_has_no_assert():
    found = [where(path, node) for path, node in syntax() if isinstance(node, ast.Assert)]
    assert not found, "a ValueError speaks to the user; found assert at " + ", ".join(found)


def test_library_loads_no_pickles():
    found = []
    for path, node in syntax():
        if not isinstance(node, ast.Call):
            continue
        pickled = any(
            k.arg == "allow_pickle" and getattr(k.value, "value", True) for k in node.keywords
        )
        function = ast.unparse(node.func)
        if pickled or function in {"torch.load", "torch.save"} or function.startswith("pickle."):
            found.append(where(path, node))
    assert not found, "a pickle runs code when it is opened; found at " + ", ".join(found)


def test_library_inherits_from_torch_widgets_and_protocols_only():
    allowed = {"nn.Module", "torch.autograd.Function", "Protocol"}
    of_widgets = {"ipywidgets.VBox", "nglview.NGLWidget"}
    for path, node in syntax():
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            assert bases <= allowed | (of_widgets if path.parent.name == "view" else set()), where(
                path, node
            )


def test_modules_say_what_they_are_and_stay_readable():
    assert not list((ROOT / "cryochains").rglob("utils.py"))
    for path in LIBRARY:
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path.name} opens with no docstring"
        # An exception from the bound of complexity has its reason beside it.
        for line in text.splitlines():
            assert "C901" not in line or re.search(r"noqa: C901 - \w+", line), (
                f"{path.name}: {line}"
            )


def test_lint_keeps_one_statement_a_line_and_bounds_complexity():
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["line-length"] <= 100
    assert {"E", "F", "C90"} <= set(ruff["lint"]["select"])
    assert not {"ignore", "extend-ignore", "per-file-ignores"} & set(ruff["lint"])
    assert ruff["lint"]["mccabe"]["max-complexity"] <= 10
    lint = re.search(r"^lint:.*\n((\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert "ruff check" in lint.group(1) and "mypy" in lint.group(1)


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "cryochains" / "py.typed").is_file()


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
