"""Conformations in files: every atom, whole files, and ChimeraX scripts that find theirs."""

import re

import numpy as np
import prody
import pytest
import torch

from cryochains.analysis import (
    CHAIN_COLORS,
    compute_pca,
    decode_ensemble,
    save_conformations,
)
from cryochains.inference import Result
from cryochains.model import Model
from cryochains.molecule import fits_pdb_text, load_structure

BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}


def rigid_model(structure, **settings) -> Model:
    return Model(structure, modes=None, box_size=64, pixel_size=5.0, **settings)


@pytest.fixture(scope="module")
def small():
    structure = load_structure("glua3-closed", bodies=BODIES)
    return Model(structure, modes=2, box_size=32, pixel_size=5.0)


@pytest.fixture(scope="module")
def motions(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    generator = torch.Generator().manual_seed(0)
    return compute_pca(Result(model, torch.randn(30, model.n_latents, generator=generator)))


@pytest.fixture(scope="module")
def many(closed):
    """70 chains of two residues, whose ids are of one letter, of two, and of more."""
    atoms = closed.atoms.select("resnum 20 to 36 or resnum 40 to 60").toAtomGroup()
    residues = np.unique(atoms.getResindices(), return_inverse=True)[1]
    names = np.array([f"c{k}" if k else "A" for k in range(100)], dtype=object)
    atoms.setChids(names[residues // 2].astype(str))
    atoms = atoms.select(f"chain {' '.join(names[:36])}").toAtomGroup()
    other = atoms.copy()
    other.setChids([f"{chid}x" for chid in other.getChids()])
    other.setCoords(other.getCoords() + [80.0, 0.0, 0.0])
    both = atoms + other
    both.setTitle("many")
    return load_structure(both)


def draw(model, n, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, model.n_latents, generator=generator) + 1.0


@pytest.fixture(autouse=True, scope="module")
def quiet():
    before = prody.confProDy("verbosity")
    prody.confProDy(verbosity="none")
    yield
    prody.confProDy(verbosity=before)


# All atoms


def test_ensemble_has_every_atom(small):
    structure = small.structure
    latents = torch.cat([torch.zeros(1, small.n_latents), draw(small, 2)])
    ensemble = decode_ensemble(small, latents)
    assert ensemble.numConfs() == 3
    assert ensemble.numAtoms() == structure.atoms.numAtoms() > structure.n_atoms
    coords = ensemble.getCoordsets()
    np.testing.assert_allclose(coords[0], structure.atoms.getCoords(), atol=1e-3)
    # Each atom is where the model has it, but for the bonds that a linear mode stretches.
    nodes = coords[:, structure.node_rows]
    assert np.abs(nodes - small.decode(latents).numpy()).max() < 1.5
    bonds = np.flatnonzero(structure.bonded_to_next)
    lengths = np.linalg.norm(nodes[:, bonds + 1] - nodes[:, bonds], axis=-1)
    np.testing.assert_allclose(lengths, np.broadcast_to(lengths[0], lengths.shape), atol=1e-3)
    assert ensemble.getAtoms().getNames().tolist() == structure.atoms.getNames().tolist()


def test_ligands_ride_along(prody_files, tmp_path):
    """The sugars of 3O21 are in the file, and move with their chain."""
    structure = load_structure(prody_files / "pdb3o21.pdb", chains="AB")
    latents = torch.zeros(2, 6)
    latents[1, 0] = 5.0
    model = rigid_model(structure, rotation=False)
    written = save_conformations(tmp_path / "a.pdb", model, latents)
    sugars = prody.parsePDB(str(written)).select("resname NAG")
    moved = sugars.getCoordsets(1) - sugars.getCoordsets(0)
    expected = np.where(sugars.getChids() == "A", 5.0, 0.0)
    assert 0 < expected.mean() < 5, "both chains carry some"
    expected = np.stack([expected, 0 * expected, 0 * expected], 1)
    np.testing.assert_allclose(moved, expected, atol=2e-3)


@pytest.mark.parametrize("suffix", [".pdb", ".cif", ".dcd"])
def test_files_are_read_back(small, tmp_path, suffix):
    latents = draw(small, 4)
    written = save_conformations(tmp_path / "new" / f"path{suffix}", small, latents)
    assert written == tmp_path / "new" / f"path{suffix}"
    expected = decode_ensemble(small, latents).getCoordsets()
    if suffix == ".dcd":
        found = prody.parseDCD(str(written))
        tolerance = 1e-4
    else:
        found = (prody.parsePDB if suffix == ".pdb" else prody.parseMMCIF)(str(written))
        atoms = small.structure.atoms
        for field in ("Names", "Resnames", "Resnums", "Chids", "Elements"):
            read, given = getattr(found, f"get{field}")(), getattr(atoms, f"get{field}")()
            assert read.tolist() == given.tolist()
        tolerance = 6e-4  # three decimals
    assert found.getCoordsets().shape == expected.shape
    np.testing.assert_allclose(found.getCoordsets(), expected, atol=tolerance)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_chains_of_long_names_stay_apart_in_a_pdb(tmp_path, small):
    atoms = small.structure.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "AB", "AA"))
    model = rigid_model(load_structure(atoms))
    written = save_conformations(tmp_path / "a.pdb", model, torch.zeros(2, 12))
    found = prody.parsePDB(str(written))
    assert found.numCoordsets() == 2 and len(set(found.getChids())) == 2


def test_one_conformation(small, tmp_path):
    written = save_conformations(tmp_path / "one.pdb", small, torch.zeros(1, small.n_latents))
    assert prody.parsePDB(str(written)).numCoordsets() == 1


def test_latents_that_are_none(small, tmp_path):
    wrong = (torch.zeros(small.n_latents), torch.zeros(2, 5), torch.zeros(0, small.n_latents))
    for latents in wrong:
        with pytest.raises(ValueError, match=r"expected latents \(m, 16\) of Model.*, got"):
            save_conformations(tmp_path / "a.pdb", small, latents)
    for name in ("a.dcd", "a.pdb"):
        with pytest.raises(ValueError, match="expected finite latents, got NaN or Inf"):
            save_conformations(tmp_path / name, small, torch.full((2, small.n_latents), torch.nan))
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_written(small, tmp_path):
    latents = torch.zeros(1, small.n_latents)
    suffixes = "expected a path that ends in .pdb, .cif, .dcd or .cxc, got"
    for name in ("a.xyz", "a", "a.pdbx", "a.py", "a.pdb.gz"):
        with pytest.raises(ValueError, match=f"{suffixes} {name}; try a.pdb"):
            save_conformations(tmp_path / name, small, latents)
    (tmp_path / "file").touch()
    for name in ("a.pdb", "a.cif", "a.dcd", "a.cxc"):
        with pytest.raises(ValueError, match="expected a folder that can be written"):
            save_conformations(tmp_path / "file" / name, small, latents)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupted_write_leaves_no_half_file(small, tmp_path, monkeypatch):
    for name, writer in (("a.dcd", "writeDCD"), ("a.pdb", "writePDB")):
        (tmp_path / name).write_text("old")

        def stop(path, *args, **kwargs):
            with open(path, "w") as stream:
                stream.write("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(prody, writer, stop)
        with pytest.raises(KeyboardInterrupt):
            save_conformations(tmp_path / name, small, torch.zeros(1, small.n_latents))
        assert (tmp_path / name).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


# ChimeraX


def commands(path) -> list[str]:
    return path.read_text().splitlines()


def opened_file(line: str) -> str:
    """The file name that ChimeraX reads from an open command.

    As its parser does: a quoted name ends at the first such quote before a space, and nothing
    within it is escaped.
    """
    quoted = re.fullmatch(r'open (?P<quote>["\'])(?P<name>.*?)(?P=quote)(\s.*|$)', line)
    return quoted["name"]


def color_commands(path) -> list[list[str]]:
    return [line.split()[1:] for line in commands(path) if line.startswith("color")]


def test_chimerax_script_finds_its_file(motions, tmp_path):
    script = tmp_path / "one" / "my pc1.cxc"
    assert save_conformations(script, motions.model, motions.traverse(0, 3)) == script
    moved = (tmp_path / "one").rename(tmp_path / "two") / script.name
    lines = commands(moved)
    name = lines[0].removeprefix('open "').removesuffix('" coordset true')
    assert name == "my pc1-models.pdb", "beside the script, wherever that is"
    assert prody.parsePDB(str(moved.parent / name)).numCoordsets() == 3
    assert "color #1/A #0072B2" in lines and "color #1/B #D55E00" in lines and "cartoon" in lines
    assert lines[-1] == "coordset slider #1"
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
def test_chimerax_script_leaves_other_files_alone(motions, tmp_path, suffix):
    other = tmp_path / f"x{suffix}"
    other.write_text("mine")
    save_conformations(tmp_path / "x.cxc", motions.model, motions.traverse(0, 2))
    assert other.read_text() == "mine"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {other.name, "x.cxc", "x-models.pdb"}


@pytest.mark.parametrize("name", ["x.PDB", "x.Cif", "x.DCD", "x.CXC"])
def test_suffixes_in_capitals(small, tmp_path, name):
    written = save_conformations(tmp_path / name, small, torch.zeros(2, small.n_latents))
    assert written == tmp_path / name and written.stat().st_size
    beside = {"x-models.pdb"} if name == "x.CXC" else set()
    assert {path.name for path in tmp_path.iterdir()} == {name} | beside


@pytest.mark.parametrize(
    "name", ["it's.cxc", "it' s.cxc", 'my "best" pc1.cxc', 'a".cxc', "' \" .cxc", "two\nlines.cxc"]
)
def test_chimerax_script_quotes_file_names(motions, tmp_path, name):
    script = save_conformations(tmp_path / name, motions.model, motions.traverse(0, 2))
    beside = opened_file(commands(script)[0])
    assert {path.name for path in tmp_path.iterdir()} == {name, beside}
    assert beside.endswith(".pdb") and '"' not in beside, "ChimeraX cannot open all such names"


def test_chimerax_script_names_chains_as_the_file_does(closed, tmp_path):
    atoms = closed.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "light", "heavy"))
    model = rigid_model(load_structure(atoms))
    script = save_conformations(tmp_path / "a.cxc", model, torch.zeros(2, 12))
    letters = list(dict.fromkeys(prody.parsePDB(str(tmp_path / "a-models.pdb")).getChids()))
    expected = [
        [f"#1/{letter}", color] for letter, color in zip(letters, CHAIN_COLORS, strict=False)
    ]
    assert color_commands(script) == expected


def test_chimerax_script_colours_bodies_within_a_chain(closed, tmp_path):
    bodies = {
        "tip": "chain A and resnum 20 to 22",
        "base": "chain A and resnum 30 to 33",
        "rest": "chain B",
    }
    model = rigid_model(load_structure(closed.atoms, bodies=bodies))
    script = save_conformations(tmp_path / "a.cxc", model, torch.zeros(2, 18))
    specs = ["#1/A:20,21,22", "#1/A:30,31,32,33", "#1/B"]
    expected = [[spec, color] for spec, color in zip(specs, CHAIN_COLORS, strict=False)]
    assert color_commands(script) == expected


def test_more_than_62_chains(many, tmp_path):
    model = rigid_model(many)
    latents = draw(model, 2)
    assert many.n_chains == 72 and not fits_pdb_text(many.atoms)
    script = save_conformations(tmp_path / "a.cxc", model, latents)
    assert opened_file(commands(script)[0]) == "a-models.cif"
    read = prody.parseMMCIF(str(tmp_path / "a-models.cif"))
    expected = decode_ensemble(model, latents).getCoordsets()
    np.testing.assert_allclose(read.getCoordsets(), expected, atol=6e-4)
    # Each chain by the name that it has in the file, in the colour of its body.
    names = list(dict.fromkeys(read.getSegnames().tolist()))
    assert names == list(many.chain_ids)
    for body, command in enumerate(color_commands(script)):
        assert command == [f"#1/{names[body]}", CHAIN_COLORS[body % len(CHAIN_COLORS)]]
    with pytest.raises(ValueError, match="expected at most 62 chains.* got 72; try a .*.cif"):
        save_conformations(tmp_path / "b.pdb", model, latents)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-models.cif", "a.cxc"]
    # A DCD holds any number of atoms, and is read on the atoms of the .cif.
    frames = prody.parseDCD(str(save_conformations(tmp_path / "c.dcd", model, latents)))
    frames.setAtoms(read)
    np.testing.assert_allclose(frames.getCoordsets(), expected, atol=1e-4)
