"""Molecules in a notebook: every body has its colour, only coordinates are sent, modes are arrows and a swing.

Needs no browser: what arrives there is looked at in test_browser.
"""

import json
from io import StringIO
from types import SimpleNamespace

import numpy as np
import prody
import pytest
from matplotlib.figure import Figure

import cryochains
from cryochains.modes import compute_modes
from cryochains.structure import load_structure

LAB = ("ipywidgets", "nglview")


@pytest.fixture(scope="module", autouse=True)
def widgets():
    for name in LAB:
        pytest.importorskip(name, reason="the extras [lab] are not installed")
    from cryochains import widgets

    return widgets


@pytest.fixture(autouse=True)
def notebook(widgets, monkeypatch):
    """As if this Python were a notebook's kernel."""
    monkeypatch.setattr(widgets, "get_ipython", lambda: SimpleNamespace(kernel=None))


@pytest.fixture
def molecule(closed):
    return cryochains.view_structure(closed)


@pytest.fixture(scope="module")
def modes(closed):
    return compute_modes(closed, (3, 2))


def shown(molecule) -> np.ndarray:
    """Coordinates that were last sent to the browser."""
    return molecule._coordinates_dict[0]


def drawings(molecule) -> list[dict]:
    return [m for m in molecule._ngl_msg_archive if m["methodName"] == "addRepresentation"]


def test_every_body_is_a_chain_of_its_colour(widgets, closed, molecule):
    text, letters = widgets.pdb_text(closed, closed.atoms.getCoords())
    atoms = prody.parsePDBStream(StringIO(text))
    assert letters == ["A", "B"] and atoms.numAtoms() == closed.atoms.numAtoms()
    assert (atoms.getChids() == np.array(letters)[closed.atom_chain]).all()
    bodies = {"upper lobe": "chain A and resnum 1 to 115", "rest": "chain B"}
    _, letters = widgets.pdb_text(parts := load_structure("glua3-closed", bodies=bodies), parts.atoms.getCoords())
    assert letters == ["a", "b"]
    colors = {m["kwargs"]["sele"]: m["kwargs"].get("color") for m in drawings(molecule)}
    assert colors == {":A": "#0072B2", ":B": "#D55E00", "not polymer": None}
    assert repr(molecule) == f"Molecule({closed.atoms.numAtoms():,} atoms, chains A, B)"


def test_a_new_view_is_told_where_the_atoms_are(molecule, closed):
    moved = closed.atoms.getCoords() + 1.0
    molecule.move(moved)
    molecule.set_coordinates({0: closed.atoms.getCoords()})
    molecule._handle_custom_msg({"type": "request_repr_dict", "data": {}}, [])
    assert shown(molecule) is moved


def test_values_on_atoms_are_sent_and_not_kept(molecule, closed, monkeypatch):
    calls = []
    call = type(molecule)._remote_call

    def remember(name, **settings):
        calls.append((name, settings))
        return call(molecule, name, **settings)

    monkeypatch.setattr(molecule, "_remote_call", remember)
    molecule.color_values(5.0)
    domains = [m["kwargs"]["colorDomain"] for m in drawings(molecule) if m["kwargs"].get("color") == "bfactor"]
    assert domains == [[0, 5.0]] * 2
    archive = list(molecule._ngl_msg_archive)
    values = np.linspace(0, 5, closed.atoms.numAtoms())
    molecule.move(closed.atoms.getCoords(), values)
    name, settings = calls[-1]
    assert name == "executeCode" and molecule._ngl_msg_archive == archive
    code = settings["args"][0]
    assert len(code) < 6 * len(values) + 400 and "colorDomain: [0, 5.00]" in code
    np.testing.assert_allclose(json.loads(code[code.index("set([") + 4 : code.index("])") + 1]), values, atol=0.006)
    molecule.color_chains()
    calls.clear()
    molecule.move(closed.atoms.getCoords())
    assert not calls


def test_reference_is_a_second_pale_molecule(molecule, closed):
    molecule.show_ghost(False)
    assert len(molecule._ngl_component_ids) == 1
    molecule.show_ghost(True)
    ghost = drawings(molecule)[-1]
    assert ghost["component_index"] == 1 and ghost["kwargs"]["opacity"] < 0.5
    for shown_now in (False, True):
        molecule.show_ghost(shown_now)
        last = molecule._ngl_msg_archive[-1]
        assert last["methodName"] == "setVisibility" and last["args"] == [shown_now]
    assert len(molecule._ngl_component_ids) == 2


def test_modes_swing_there_and_back_and_have_arrows(closed, modes):
    viewer = cryochains.view_modes(closed, modes, "B", mode=1, amplitude=3.0)
    rows = closed.atom_chain == 1
    frames = viewer.frames - viewer.frames[0]
    assert (frames[:, ~rows] == 0).all()
    nodes = np.isin(np.flatnonzero(rows), closed.node_rows)
    rms = np.sqrt((frames[:, rows][:, nodes] ** 2).sum(-1).mean(-1))
    assert rms.max() == pytest.approx(3.0, rel=1e-3) and rms[12] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(frames[6], -frames[18], atol=1e-3)
    viewer.play.value = 6
    np.testing.assert_allclose(shown(viewer.molecule), viewer.frames[6])
    shapes = [m["args"][1] for m in viewer.molecule._ngl_msg_archive if m["methodName"] == "addShape"][-1]
    starts, ends = (np.array([shape[i] for shape in shapes]) for i in (1, 2))
    np.testing.assert_allclose(starts, closed.node_coords[closed.node_chain == 1], atol=1e-3)
    cosine = ((ends - starts) * modes.vectors[1][1]).sum() / np.linalg.norm(ends - starts)
    assert cosine == pytest.approx(1)
    viewer.mode.value = 0
    assert len(viewer.molecule._ngl_component_ids) == 2, "the old arrows are gone"
    assert viewer.status.value == "1.0 × the frequency of mode 1" and len(repr(viewer)) < 80


def test_modes_that_do_not_exist(closed, opened, modes):
    for arguments, sentence in (
        ((closed, modes, "C"), "expected a chain of A, B, got 'C'"),
        ((closed, modes, "B", 2), "expected a mode from 0 to 1, got 2"),
        ((opened, modes), "expected modes of .*, got others; try compute_modes"),
    ):
        with pytest.raises(ValueError, match=sentence):
            cryochains.view_modes(*arguments)


def test_outside_a_notebook_there_is_the_figure(widgets, closed, modes, monkeypatch):
    monkeypatch.setattr(widgets, "get_ipython", lambda: None)
    for show in (lambda: cryochains.view_structure(closed), lambda: cryochains.view_modes(closed, modes, "B", 1)):
        with pytest.warns(UserWarning, match="expected a notebook, .* found none: this is the static figure"):
            assert isinstance(show(), Figure)


def test_errors_are_seen(closed, modes, monkeypatch):
    viewer = cryochains.view_modes(closed, modes)

    def refuse(*arguments, **settings):
        raise RuntimeError("the kernel is busy")

    monkeypatch.setattr(viewer.molecule, "_add_shape", refuse)
    viewer.mode.value = 1
    assert "RuntimeError: the kernel is busy" in viewer.status.value
    viewer.frames = None
    viewer.play.value = 3
    assert "TypeError" in viewer.status.value


@pytest.mark.parametrize("version", ["3.1.5", "4.0"])
def test_front_end_of_another_version(widgets, closed, tmp_path, monkeypatch, version):
    # What 4.0.1 does: its Python asks for front end 4.0 and its wheel ships 3.1.5.
    package = tmp_path / "nglview-js-widgets" / "package.json"
    package.parent.mkdir()
    package.write_text(json.dumps({"version": version}))
    monkeypatch.setattr(widgets, "jupyter_path", lambda name: [str(tmp_path / "none"), str(tmp_path)])
    monkeypatch.setattr(widgets, "REQUIRED_FRONT_END", "4.0")
    if version == "4.0":
        return widgets.check_front_end()
    with pytest.raises(ImportError, match=r"front end 4.0, .* got 3.1.5 .* try pip install nglview==4.0"):
        cryochains.view_structure(closed)


def test_front_end_that_is_elsewhere(widgets, monkeypatch):
    monkeypatch.setattr(widgets, "jupyter_path", lambda name: [])
    widgets.check_front_end()


def test_installed_front_end_is_the_one_asked_for(widgets):
    widgets.check_front_end()


def test_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'slyde'"):
        cryochains.slyde  # noqa: B018
