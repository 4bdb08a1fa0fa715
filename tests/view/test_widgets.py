"""Molecules in a notebook: bodies have their colours, only coordinates are sent, modes move.

Needs no browser: what arrives there is looked at in test_browser.
"""

import json
from io import StringIO
from string import ascii_letters, digits

import numpy as np
import prody
import pytest

from cryochains.molecule import compute_modes, load_structure
from cryochains.view import notebook as notebook_module
from cryochains.view import view_modes, view_structure

LAB = ("ipywidgets", "nglview")


@pytest.fixture(scope="module", autouse=True)
def widgets():
    for name in LAB:
        pytest.importorskip(name, reason="the extras [lab] are not installed")
    from cryochains.view import widgets

    return widgets


@pytest.fixture(autouse=True)
def notebook(monkeypatch):
    """As if this Python were a notebook's kernel."""
    monkeypatch.setattr(notebook_module, "in_notebook", lambda: True)


@pytest.fixture
def molecule(closed):
    return view_structure(closed)


@pytest.fixture(scope="module")
def modes(closed):
    return compute_modes(closed, (3, 2))


def shown(molecule) -> np.ndarray:
    """Coordinates that were last sent to the browser."""
    return molecule._coordinates_dict[0]


def drawings(molecule) -> list[dict]:
    return [m for m in molecule._ngl_msg_archive if m["methodName"] == "addRepresentation"]


def test_every_body_is_a_chain_of_its_colour(widgets, closed, molecule):
    text, extension, names = widgets.molecule_text(closed, closed.atoms.getCoords())
    atoms = prody.parsePDBStream(StringIO(text))
    assert extension == "pdb" and names == ["A", "B"]
    assert atoms.numAtoms() == closed.atoms.numAtoms()
    assert (atoms.getChids() == np.array(names)[closed.atom_chain]).all()
    bodies = {"upper lobe": "chain A and resnum 1 to 115", "rest": "chain B"}
    parts = load_structure("glua3-closed", bodies=bodies)
    _, _, names = widgets.molecule_text(parts, parts.atoms.getCoords())
    assert names == ["a", "b"]
    colors = {m["kwargs"]["sele"]: m["kwargs"].get("color") for m in drawings(molecule)}
    assert colors == {":A": "#0072B2", ":B": "#D55E00", "not polymer": None}
    assert repr(molecule) == f"Molecule({closed.atoms.numAtoms():,} atoms, chains A, B)"


@pytest.fixture(scope="module")
def many(closed):
    """The dimer cut into 73 bodies of about ten residues."""
    bodies = {}
    for chid in "AB":
        resnums = np.unique(closed.atoms.select(f"chain {chid}").getResnums())
        for part in np.array_split(resnums, 37 if chid == "A" else 36):
            bodies[f"{chid} {part[0]}"] = f"chain {chid} and resnum {part[0]} to {part[-1]}"
    return load_structure(closed.atoms, bodies=bodies)


def test_more_bodies_than_pdb_text_has_letters_for(widgets, many):
    molecule = view_structure(many)
    assert len(set(molecule.chain_names)) == many.n_chains == 73
    assert max(map(len, molecule.chain_names)) <= 4, "of longer names NGL knows the start alone"
    coords = many.atoms.getCoords() + 1.0
    text, extension, names = widgets.molecule_text(many, coords)
    assert extension == "cif" and names == molecule.chain_names
    atoms = prody.parseMMCIFStream(StringIO(text))
    # NGL's selections such as :ab look at the author's ids, ProDy's segments.
    assert (atoms.getSegnames() == np.array(names)[many.atom_chain]).all()
    np.testing.assert_allclose(atoms.getCoords(), coords, atol=6e-4)
    assert atoms.getNames().tolist() == many.atoms.getNames().tolist()
    # What the browser is given: text of this format, and each body in its colour.
    (loaded,) = [m for m in molecule._ngl_msg_archive if m["methodName"] == "loadFile"]
    assert loaded["kwargs"]["ext"] == "cif"
    colors = {m["kwargs"]["sele"]: m["kwargs"].get("color") for m in drawings(molecule)}
    for body, name in enumerate(names):
        assert colors[f":{name}"] == widgets.chain_color(body)
    molecule.show_reference(True)
    loaded = [m for m in molecule._ngl_msg_archive if m["methodName"] == "loadFile"]
    assert [m["kwargs"]["ext"] for m in loaded] == ["cif", "cif"]


@pytest.mark.parametrize("n, length", [(1, 1), (62, 1), (63, 2), (62**2, 2), (62**2 + 1, 3)])
def test_short_names_of_bodies(widgets, n, length):
    names = widgets._short_names(n)
    assert len(set(names)) == n and {len(name) for name in names} == {length}
    assert set("".join(names)) <= set(ascii_letters + digits)


def test_62_bodies_are_still_pdb_text(widgets, many):
    kept = many.atoms.select(f"index 0 to {np.flatnonzero(many.atom_chain == 61)[-1]}")
    bodies = {}
    for body, name in enumerate(many.chain_ids[:62]):
        rows = np.flatnonzero(many.atom_chain == body)
        bodies[name] = f"index {rows[0]} to {rows[-1]}"
    fewer = load_structure(kept.toAtomGroup(), bodies=bodies)
    _, extension, names = widgets.molecule_text(fewer, fewer.atoms.getCoords())
    assert extension == "pdb" and names == list(ascii_letters + digits)


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
    domains = [
        m["kwargs"]["colorDomain"]
        for m in drawings(molecule)
        if m["kwargs"].get("color") == "bfactor"
    ]
    assert domains == [[0, 5.0]] * 2
    archive = list(molecule._ngl_msg_archive)
    values = np.linspace(0, 5, closed.atoms.numAtoms())
    molecule.move(closed.atoms.getCoords(), values)
    name, settings = calls[-1]
    assert name == "executeCode" and molecule._ngl_msg_archive == archive
    code = settings["args"][0]
    assert len(code) < 6 * len(values) + 400 and "colorDomain: [0, 5.00]" in code
    np.testing.assert_allclose(
        json.loads(code[code.index("set([") + 4 : code.index("])") + 1]), values, atol=0.006
    )
    molecule.color_chains()
    calls.clear()
    molecule.move(closed.atoms.getCoords())
    assert not calls


def test_reference_is_a_second_pale_molecule(molecule, closed):
    molecule.show_reference(False)
    assert len(molecule._ngl_component_ids) == 1
    molecule.show_reference(True)
    overlay = drawings(molecule)[-1]
    assert overlay["component_index"] == 1 and overlay["kwargs"]["opacity"] < 0.5
    for shown_now in (False, True):
        molecule.show_reference(shown_now)
        last = molecule._ngl_msg_archive[-1]
        assert last["methodName"] == "setVisibility" and last["args"] == [shown_now]
    assert len(molecule._ngl_component_ids) == 2


def test_modes_swing_there_and_back_and_have_arrows(closed, modes):
    viewer = view_modes(closed, modes, "B", mode=1, amplitude=3.0)
    rows = closed.atom_chain == 1
    frames = viewer.frames - viewer.frames[0]
    assert (frames[:, ~rows] == 0).all()
    nodes = np.isin(np.flatnonzero(rows), closed.node_rows)
    rms = np.sqrt((frames[:, rows][:, nodes] ** 2).sum(-1).mean(-1))
    assert rms.max() == pytest.approx(3.0, rel=1e-3) and rms[12] == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(frames[6], -frames[18], atol=1e-3)
    viewer.play.value = 6
    np.testing.assert_allclose(shown(viewer.molecule), viewer.frames[6])
    shapes = [
        m["args"][1] for m in viewer.molecule._ngl_msg_archive if m["methodName"] == "addShape"
    ][-1]
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
            view_modes(*arguments)


def test_errors_are_seen(closed, modes, monkeypatch):
    viewer = view_modes(closed, modes)

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
    monkeypatch.setattr(
        widgets, "jupyter_path", lambda name: [str(tmp_path / "none"), str(tmp_path)]
    )
    monkeypatch.setattr(widgets, "REQUIRED_FRONT_END", "4.0")
    if version == "4.0":
        return widgets.check_front_end()
    with pytest.raises(
        ImportError, match=r"front end 4.0, .* got 3.1.5 .* try pip install nglview==4.0"
    ):
        view_structure(closed)


def test_front_end_that_is_elsewhere(widgets, monkeypatch):
    monkeypatch.setattr(widgets, "jupyter_path", lambda name: [])
    widgets.check_front_end()


def test_installed_front_end_is_the_one_asked_for(widgets):
    widgets.check_front_end()
