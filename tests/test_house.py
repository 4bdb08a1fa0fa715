"""The house: one direction of imports, packages with one door each, names that mean one thing."""

import ast
import inspect
import re
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

import cryochains

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "cryochains"
# From left to right; molecule and images do not know each other.
DIRECTION = "molecule, images  <  model  <  inference  <  analysis  <  view"
RANKS = {
    package: rank
    for rank, group in enumerate(DIRECTION.split("<"))
    for package in group.replace(",", " ").split()
}
FILES = sorted(LIBRARY.rglob("*.py"))
MODULES = [path for path in FILES if path.parent != LIBRARY and path.name != "__init__.py"]

# Libraries that one package, or some modules of it, use for all.
ONLY_IN = {
    "nglview": {"view"},
    "ipywidgets": {"view"},
    "jscatter": {"view"},
    "IPython": {"view"},
    "matplotlib": {"view"},
    "prody": {"molecule", "analysis", "view"},
    "Bio": {"molecule"},
    "torch_ctf": {"images"},
    "mrcfile": {"images"},
    "starfile": {"images"},
    "roma": {"inference"},
}


def label(path: Path) -> str:
    return str(path.relative_to(LIBRARY).with_suffix(""))


def relative_imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """(level, module, names) of every relative import in the file, inside functions too."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            names = [alias.name for alias in node.names]
            # `from . import relion` and `from .relion import write_table` are the same arrow.
            modules = [node.module] if node.module else names
            imports += [(node.level, module, names) for module in modules]
    return imports


def absolute_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def package_all(package: str) -> list[str]:
    return import_module(f"cryochains.{package}").__all__


def test_the_direction_stands_in_the_docs():
    assert DIRECTION in (ROOT / "CONTRIBUTING.md").read_text()
    assert DIRECTION in cryochains.__doc__
    folders = {path.parent.name for path in MODULES}
    assert folders == set(RANKS)


@pytest.mark.parametrize("path", MODULES, ids=label)
def test_imports_follow_the_direction_and_enter_by_the_door(path):
    own = path.parent.name
    assert "cryochains" not in absolute_imports(path), "a module imports relatively"
    for level, module, names in relative_imports(path):
        if level == 1:
            assert (path.parent / f"{module}.py").is_file(), f"{module} is no neighbour"
            continue
        assert level == 2
        if module in ("_arguments", "_compiled", "_files", "_devices", "_processes"):
            continue
        assert RANKS[module] < RANKS[own], f"{own} is not to the right of {module}"
        assert set(names) <= set(package_all(module)), f"not in the __all__ of {module}"


@pytest.mark.parametrize("package", RANKS)
def test_neighbours_import_without_a_circle(package):
    folder = LIBRARY / package
    waiting = {
        path.stem: {module for level, module, _ in relative_imports(path) if level == 1}
        for path in folder.glob("*.py")
        if path.name != "__init__.py"
    }
    while waiting:
        free = {name for name, needed in waiting.items() if not needed & set(waiting)}
        assert free, f"a circle among {sorted(waiting)}"
        waiting = {name: needed for name, needed in waiting.items() if name not in free}


@pytest.mark.parametrize("package", RANKS)
def test_a_package_opens_with_its_table_of_contents(package):
    module = import_module(f"cryochains.{package}")
    assert module.__doc__ and len(module.__doc__) > 40
    assert module.__all__ == sorted(
        module.__all__, key=lambda name: (not name.isupper(), name)
    ) or (module.__all__ == sorted(module.__all__))
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__module__.startswith(f"cryochains.{package}"), f"{name} is not its own"
            assert value.__doc__, f"{package}.{name} has no docstring"


def test_the_library_has_few_public_names():
    assert len(cryochains.__all__) <= 30
    assert set(cryochains.__all__) == set(cryochains._PACKAGE_OF)
    for name, package in cryochains._PACKAGE_OF.items():
        assert name in package_all(package), name
        assert getattr(cryochains, name) is getattr(import_module(f"cryochains.{package}"), name)
    for name, package in cryochains._MOVED.items():
        with pytest.warns(FutureWarning, match=f"cryochains.{package}.{name}"):
            value = getattr(cryochains, name)
        assert value is getattr(import_module(f"cryochains.{package}"), name)
    # Tab completion shows these and the packages, and nothing that is only imported.
    shown = {name for name in dir(cryochains) if not name.startswith("_")}
    assert shown == {*cryochains.__all__, *RANKS}
    # What type checkers see is the same table.
    tree = ast.parse((LIBRARY / "__init__.py").read_text())
    seen = {
        (alias.name, node.module)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    assert seen == set(cryochains._PACKAGE_OF.items())


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="'cryochains' has no attribute 'refined'"):
        cryochains.refined  # noqa: B018


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_are_used_by_one_package(library):
    users = {path.parent.name for path in MODULES if library in absolute_imports(path)}
    assert users <= ONLY_IN[library]


def test_images_know_nothing_of_chains():
    text = "".join(path.read_text() for path in (LIBRARY / "images").glob("*.py"))
    assert "Structure" not in text and "Dynamics" not in text


def test_two_things_never_share_a_name():
    """Constants, functions and classes at the top of modules, private ones too."""
    owners = Counter()
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                owners[node.name] += 1
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                owners.update(
                    name.id
                    for target in targets
                    for name in ast.walk(target)
                    if isinstance(name, ast.Name)
                )
    for name in ("__all__", "__version__", "__getattr__", "__dir__"):
        owners.pop(name, None)
    assert not {name: count for name, count in owners.items() if count > 1}


def public_functions() -> list:
    functions = {}
    for package in RANKS:
        module = import_module(f"cryochains.{package}")
        for name in module.__all__:
            if inspect.isfunction(getattr(module, name)):
                functions[f"{package}.{name}"] = getattr(module, name)
    return list(functions.items())


@pytest.mark.parametrize(
    ("name", "function"), public_functions(), ids=[name for name, _ in public_functions()]
)
def test_public_functions_say_what_they_take(name, function):
    signature = inspect.signature(function)
    loose = {"rows"}  # an int, a slice, indices or a mask: what numpy takes
    for parameter in signature.parameters.values():
        annotated = parameter.annotation is not inspect.Parameter.empty
        assert annotated or parameter.name in loose, f"{name}({parameter.name}) has no type"
    assert signature.return_annotation is not inspect.Signature.empty, name


@pytest.mark.parametrize("name", [n for n in cryochains.__all__ if n != "plots"])
def test_public_names_are_documented_with_an_example(name):
    text = inspect.getdoc(getattr(cryochains, name))
    assert re.search(r"^Examples\n-+$", text, re.MULTILINE), f"{name} has no example"
    if inspect.isfunction(getattr(cryochains, name)):
        for parameter in inspect.signature(getattr(cryochains, name)).parameters:
            assert re.search(rf"\b{parameter}\b", text), f"{name} does not explain {parameter}"


# Words that meant several things, or were figures of speech, and what is said instead.
REPLACED_WORDS = {
    r"(^|_)places?(_|$)": "coords, positions, latents or conformation; folder or path of a file",
    r"(^|_)found(_|$)": "result",
    r"(^|_)said(_|$)": "status or message",
    r"(^|_)reach(_|$)": "mode_limit, cutoff or extent",
    r"^every$": "all_atoms",
    r"(^|_)ghost(_|$)": "reference_overlay",
    r"(^|_)paints?(_|$)": "color_by",
    r"(^|_)paces?(_|$)": "play_speed",
    r"(^|_)fog(_|$)": "max_atom_sigma",
}


@pytest.mark.parametrize("path", FILES, ids=label)
def test_names_are_those_of_the_field(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
    for word, better in REPLACED_WORDS.items():
        bad = {name for name in names if re.search(word, name.lower())}
        assert not bad, f"say {better}"


ERRORS = ("ValueError", "FileNotFoundError", "ImportError", "IndexError")


def error_sentences(path: Path) -> list[tuple[int, str]]:
    """Line and text of every error whose sentence is written where it is made."""
    sentences = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        if node.func.id in ERRORS and isinstance(node.args[0], (ast.Constant, ast.JoinedStr)):
            # The words that are fixed; what stands in braces is seen as "…".
            values = getattr(node.args[0], "values", [node.args[0]])
            parts = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in values]
            sentences.append((node.lineno, "".join(parts)))
    return sentences


@pytest.mark.parametrize("path", FILES, ids=label)
def test_errors_say_what_was_expected_what_was_got_and_what_to_try(path):
    for line, sentence in error_sentences(path):
        where = f"{path.name}:{line}: {sentence}"
        assert sentence.startswith("expected "), where
        assert re.search(r"\b(got|found)\b.*; .*\btry\b", sentence, re.DOTALL), where


def dotted_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(path: Path, tree: ast.Module) -> list[tuple[str, str, str]]:
    """(module, name, name here) of every `from module import name`, modules in full."""
    package = dotted_name(path).split(".")
    if path.name != "__init__.py":
        package.pop()
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join(above + ([node.module] if node.module else []))
            names += [(module, alias.name, alias.asname or alias.name) for alias in node.names]
    return names


def names_used_elsewhere() -> set[tuple[str, str]]:
    """(module, name) of all that a file imports or, of a module that it imports, takes."""
    used = set()
    folders = (LIBRARY, ROOT / "tests", ROOT / "benchmarks")
    for path in [path for folder in folders for path in sorted(folder.rglob("*.py"))]:
        tree = ast.parse(path.read_text())
        imports = imported_names(path, tree)
        used |= {(module, name) for module, name, _ in imports}
        modules = {here: f"{module}.{name}" for module, name, here in imports}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    here = alias.asname or alias.name.split(".")[0]
                    modules[here] = alias.name if alias.asname else here
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                first, *rest = ast.unparse(node).split(".")
                module = ".".join([modules.get(first, first), *rest[:-1]])
                used.add((module, rest[-1]))
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setattr"):
                # A test that replaces a name: monkeypatch.setattr(module, "NAME", value).
                first, *rest = ast.unparse(node.args[0]).split(".")
                name = getattr(node.args[1], "value", None)
                used.add((".".join([modules.get(first, first), *rest]), str(name)))
    return used


def names_at_the_top(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [part for target in targets for part in ast.walk(target)]
            names |= {part.id for part in parts if isinstance(part, ast.Name)}
    return names


def test_names_of_one_module_alone_begin_with_an_underscore():
    used = names_used_elsewhere()
    unmarked = []
    for path in MODULES + [
        LIBRARY / f"_{name}.py" for name in ("arguments", "files", "devices", "processes")
    ]:
        module = dotted_name(path)
        doors = (import_module(module), import_module(module.rpartition(".")[0]))
        public = {name for door in doors for name in getattr(door, "__all__", ())}
        for name in sorted(names_at_the_top(path) - public):
            if not name.startswith("_") and (module, name) not in used:
                unmarked.append(f"{module}.{name}")
    assert not unmarked, "\n".join(unmarked)
