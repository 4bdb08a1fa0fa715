"""Without a notebook there are figures; without the extras [lab], one sentence that says so."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import cryochains
from cryochains.inference import Result
from cryochains.model import Model
from cryochains.molecule import compute_modes
from cryochains.view import notebook

ROOT = Path(__file__).resolve().parents[2]
LAB = ("ipywidgets", "nglview", "jscatter")
CALLS = {
    "explore": "cryochains.explore(Result(model, torch.randn(20, 12)))",
    "view_structure": "cryochains.view_structure(structure)",
    "view_modes": "cryochains.view_modes(structure, cryochains.compute_modes(structure, 2))",
}


def test_a_kernel_is_a_notebook_and_a_shell_is_none(monkeypatch):
    for shell, expected in (
        (SimpleNamespace(kernel=None), True),
        (SimpleNamespace(), False),
        (None, False),
    ):
        ipython = SimpleNamespace(get_ipython=lambda shell=shell: shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        assert notebook.in_notebook() == expected
    monkeypatch.delitem(sys.modules, "IPython")
    assert not notebook.in_notebook()


def test_outside_a_notebook_there_is_the_figure(closed):
    for name in LAB:
        pytest.importorskip(name, reason="the extras [lab] are not installed")
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    latents = torch.randn(30, model.n_latents, generator=torch.Generator().manual_seed(0))
    for show in (
        lambda: cryochains.explore(Result(model, latents)),
        lambda: cryochains.view_structure(closed),
        lambda: cryochains.view_modes(closed, compute_modes(closed, 2), "B", 1),
    ):
        sentence = "expected a notebook, .* found none: this is the static figure"
        with pytest.warns(UserWarning, match=sentence) as warned:
            assert isinstance(show(), Figure)
        assert warned[0].filename == __file__, "it names the caller's line"


@pytest.mark.parametrize("missing", LAB)
@pytest.mark.parametrize("name", CALLS)
def test_without_the_lab_extras_it_says_what_to_install(name, missing):
    if missing == "jscatter" and name != "explore":
        pytest.skip("molecules need no jscatter")
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from cryochains import *\n"
        "import cryochains, torch\n"
        "assert {'explore', 'view_modes', 'view_structure'} <= set(dir(cryochains))\n"
        "assert callable(explore) and callable(view_modes) and callable(view_structure)\n"
        "structure = load_structure('glua3-closed')\n"
        "model = Model(structure, modes=None, box_size=32, pixel_size=5.0)\n"
        f"try: {CALLS[name]}\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("try pip install 'cryochains[lab]'"), done.stderr
    assert missing in done.stdout and done.stdout.count("\n") == 1


def test_widgets_are_imported_when_they_are_shown():
    names = ("IPython", "ipywidgets", "nglview", "jscatter", "jupyter_core")
    code = f"import cryochains.view, sys; print([n for n in {names} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'slyde'"):
        cryochains.slyde  # noqa: B018
