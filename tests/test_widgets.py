"""The slider sends exactly the decoded conformations, and says what is wrong instead of showing nothing.

Needs no browser: what arrives there is looked at in test_browser.
"""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import prody
import pytest
import torch

import cryochains
from cryochains.dynamics import Dynamics
from cryochains.latent import compute_pca, decode_ensemble
from cryochains.modes import compute_modes
from cryochains.plots import plot_conformations
from cryochains.structure import load_structure

ROOT = Path(__file__).resolve().parent.parent
LAB = ("ipywidgets", "nglview")


@pytest.fixture(scope="module")
def motions(closed):
    """Principal motions of 40 particles that bend, turn and shift."""
    dynamics = Dynamics(closed, compute_modes(closed, 3))
    latents = torch.randn(40, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    return compute_pca(dynamics, latents)


@pytest.fixture(scope="module")
def widgets():
    for name in LAB:
        pytest.importorskip(name, reason="the extras [lab] are not installed")
    from cryochains import widgets

    return widgets


@pytest.fixture
def moved(widgets, motions):
    return cryochains.slide(motions, component=1, n=7)


def shown(slider) -> np.ndarray:
    """Coordinates that were last sent to the browser."""
    return slider.view._coordinates_dict[0]


def test_slider_sends_what_decode_gives(moved, motions, closed):
    path = motions.traverse(1, n=7)
    every_atom = decode_ensemble(motions.dynamics, path).getCoordsets()
    for number in (6, 0, 3):
        moved.slider.value = number
        assert shown(moved).dtype == np.float32 and shown(moved).shape == (closed.atoms.numAtoms(), 3)
        np.testing.assert_allclose(shown(moved), every_atom[number], atol=2e-3)
        imaging = motions.dynamics.decode(path[number]).numpy()
        np.testing.assert_allclose(shown(moved)[closed.rows], imaging, atol=2e-3)


def test_only_coordinates_are_sent(moved, monkeypatch):
    sent = []
    monkeypatch.setattr(moved.view, "send", lambda content, buffers=(): sent.append((content, buffers)))
    archive = list(moved.view._ngl_msg_archive)
    moved.slider.value = 5
    ((content, (buffer,)),) = sent
    assert content["type"] == "binary_single" and len(buffer) == moved.coords[0].size * 4
    assert moved.view._ngl_msg_archive == archive


def test_slider_says_where_it_is(moved, motions, closed):
    scores = motions.scores[:, 1]
    low, high = np.percentile(scores, [5, 95])
    places = [label for label, _ in moved.slider.options]
    assert places[0] == f"{low:+.1f} Å ({low / scores.std():+.1f} SD)"
    assert places[-1] == f"{high:+.1f} Å ({high / scores.std():+.1f} SD)"
    moved.slider.value = 6
    distance = np.sqrt(((shown(moved)[closed.rows] - closed.coords) ** 2).sum(1).mean())
    assert moved.status.value.endswith(f"{places[-1]}: RMSD to glua3-closed {distance:.2f} Å")
    assert moved.slider.continuous_update
    assert len(repr(moved)) < 120 and "PC2" in repr(moved)


def test_starts_near_the_mean_and_a_new_view_is_told(moved):
    assert abs(moved.scores[moved.slider.value]) == np.abs(moved.scores).min()
    moved.slider.value = 0
    moved.view.set_coordinates({0: moved.coords[4]})
    moved.view._handle_custom_msg({"type": "request_repr_dict", "data": {}}, [])
    assert shown(moved) is not moved.coords[4] and np.array_equal(shown(moved), moved.coords[0])


def test_errors_are_seen(moved, monkeypatch):
    def refuse(coordinates):
        raise RuntimeError("the kernel is busy")

    monkeypatch.setattr(moved.view, "set_coordinates", refuse)
    moved.slider.value = 1
    assert "RuntimeError: the kernel is busy" in moved.status.value


@pytest.mark.parametrize("component", [-1, 99])
def test_component_that_does_not_exist(widgets, motions, component):
    with pytest.raises(ValueError, match=f"expected a component from 0 to 4, got {component}"):
        cryochains.slide(motions, component=component)


def test_slider_of_one_place(widgets, motions):
    with pytest.raises(ValueError, match="got n=1; try n=21"):
        cryochains.slide(motions, n=1)


def test_every_body_is_a_chain_of_its_colour(widgets, motions, closed):
    text, letters = widgets.pdb_text(closed, closed.atoms.getCoords())
    atoms = prody.parsePDBStream(StringIO(text))
    assert letters == ["A", "B"] and atoms.numAtoms() == closed.atoms.numAtoms()
    assert (atoms.getChids() == np.array(letters)[closed.atom_chain]).all()
    bodies = {"upper lobe": "chain A and resnum 1 to 115", "rest": "chain B"}
    _, letters = widgets.pdb_text(parts := load_structure("glua3-closed", bodies=bodies), parts.atoms.getCoords())
    assert letters == ["a", "b"]
    colors = {m["kwargs"]["sele"]: m["kwargs"].get("color") for m in drawings(cryochains.slide(motions, n=2))}
    assert colors == {":A": "#0072B2", ":B": "#D55E00", "not polymer": None}


def drawings(slider) -> list[dict]:
    return [m for m in slider.view._ngl_msg_archive if m["methodName"] == "addRepresentation"]


def test_main_motion_lies_along_the_screen(widgets):
    rng = np.random.default_rng(0)
    moved = rng.normal(size=(50, 3)) * [0.1, 5.0, 1.0]
    x, y, z, w = widgets.facing(moved)
    turn = widgets.Rotation.from_quat([x, y, z, w]).as_matrix()
    np.testing.assert_allclose(np.abs(turn @ [0, 1, 0]), [1, 0, 0], atol=0.05)
    assert np.isfinite(widgets.facing(np.zeros((5, 3)))).all()


@pytest.mark.parametrize("version", ["3.1.5", "4.0"])
def test_front_end_of_another_version(widgets, motions, tmp_path, monkeypatch, version):
    # What 4.0.1 does: its Python asks for front end 4.0 and its wheel ships 3.1.5.
    package = tmp_path / "nglview-js-widgets" / "package.json"
    package.parent.mkdir()
    package.write_text(json.dumps({"version": version}))
    monkeypatch.setattr(widgets, "jupyter_path", lambda name: [str(tmp_path / "none"), str(tmp_path)])
    monkeypatch.setattr(widgets, "REQUIRED_FRONT_END", "4.0")
    if version == "4.0":
        return widgets.check_front_end()
    with pytest.raises(ImportError, match=r"front end 4.0, .* got 3.1.5 .* try pip install nglview==4.0"):
        cryochains.slide(motions)


def test_front_end_that_is_elsewhere(widgets, monkeypatch):
    monkeypatch.setattr(widgets, "jupyter_path", lambda name: [])
    widgets.check_front_end()


def test_installed_front_end_is_the_one_asked_for(widgets):
    widgets.check_front_end()


@pytest.mark.parametrize("missing", LAB)
def test_without_the_lab_extras_slide_says_what_to_install(missing):
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "import cryochains\n"
        "assert 'slide' in dir(cryochains)\n"
        "try: cryochains.slide\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.rstrip().endswith("try pip install 'cryochains[lab]'"), done.stderr


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'slyde'"):
        cryochains.slyde  # noqa: B018


def test_static_counterpart_draws_every_chain(motions, closed):
    figure = plot_conformations(motions, component=1, n=3)
    for axis in figure.axes:
        # Three conformations, each with every chain whole; missing residues are gaps, and everything else is inside.
        apart = np.linalg.norm(np.diff(closed.node_coords, axis=0), axis=1)
        bonds = ((apart < 8) & (np.diff(closed.node_chain) == 0)).sum()
        assert 0.95 * closed.n_nodes < bonds < closed.n_nodes - closed.n_chains
        drawn = np.array([lines.get_segments() for lines in axis.collections])
        assert drawn.shape == (3, bonds, 2, 2) and np.isfinite(drawn).all()
        low, high = axis.get_xlim()
        assert (drawn > low).all() and (drawn < high).all()
    assert figure._repr_png_().startswith(b"\x89PNG")
