"""What is written is read back the same, by this package and by others."""

import errno
import gzip

import numpy as np
import prody
import pytest
from Bio.PDB import MMCIFIO, MMCIFParser, PDBParser

from cryochains.molecule import chain_names, load_structure, write_structure, writing

TEXT = ("Names", "Resnames", "Chids", "Icodes", "Elements")


def trace(n_chains: int, n_residues: int = 3) -> prody.AtomGroup:
    """Chains "c0", "c1" … of Cα atoms."""
    n = n_chains * n_residues
    atoms = prody.AtomGroup("trace")
    atoms.setCoords(np.random.default_rng(0).uniform(-90, 90, (n, 3)).round(3))
    atoms.setNames(["CA"] * n)
    atoms.setResnames(["ALA"] * n)
    atoms.setResnums(np.tile(np.arange(n_residues) + 1, n_chains))
    atoms.setChids([f"c{number}" for number in np.arange(n) // n_residues])
    atoms.setElements(["C"] * n)
    return load_structure(atoms).atoms.copy()


def assert_same_atoms(a: prody.AtomGroup, b: prody.AtomGroup):
    for field in (*TEXT, "Resnums"):
        np.testing.assert_array_equal(getattr(a, f"get{field}")(), getattr(b, f"get{field}")())
    np.testing.assert_array_equal(a.getFlags("hetatm"), b.getFlags("hetatm"))
    np.testing.assert_allclose(a.getCoords(), b.getCoords(), atol=5.001e-4)
    np.testing.assert_allclose(a.getOccupancies(), b.getOccupancies(), atol=5.001e-3)
    np.testing.assert_allclose(a.getBetas(), b.getBetas(), atol=5.001e-3)


@pytest.mark.parametrize("suffix", ["pdb", "pdb.gz", "cif", "cif.gz"])
@pytest.mark.parametrize("file", ["pdb3o21.pdb", "pdb3mht.pdb", "pdb1ejg.pdb", "mmcif_6yfy.cif"])
def test_a_file_reads_back_the_same(prody_files, tmp_path, file, suffix):
    structure = load_structure(prody_files / file)
    path = tmp_path / f"again.{suffix}"
    structure.save(path)
    again = load_structure(path)
    assert_same_atoms(again.atoms, structure.atoms)
    assert again.chain_ids == structure.chain_ids
    assert again.content_hash == structure.content_hash
    for field in ("atom_chain", "atom_node", "rows", "node_rows", "weights"):
        np.testing.assert_array_equal(getattr(again, field), getattr(structure, field))


def test_unusual_identifiers_read_back_from_mmcif(closed, tmp_path):
    atoms = closed.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "_", "#1"))
    numbers = atoms.getResnums()
    icodes = np.where(numbers == 60, "B", "")
    numbers = np.where(numbers == 60, 59, numbers) - 50
    numbers = np.where(numbers > 300, numbers + 20000, numbers)
    atoms.setResnums(numbers)
    atoms.setIcodes(icodes)
    names = atoms.getNames()
    swaps = {"CB": "C2'", "CG": "H5''", "CD1": "'X", "CD2": '"Y', "OG": "_Z"}
    atoms.setNames([swaps.get(name, name) for name in names])
    structure = load_structure(atoms)
    structure.save(tmp_path / "odd.cif")
    again = load_structure(tmp_path / "odd.cif")
    assert_same_atoms(again.atoms, structure.atoms)
    assert again.chain_ids == ("_", "#1")
    assert again.content_hash == structure.content_hash


def test_mmcif_is_read_by_another_program(prody_files, tmp_path):
    structure = load_structure(prody_files / "pdb3o21.pdb", chains="BA")
    structure.save(tmp_path / "out.cif")
    (model,) = MMCIFParser(QUIET=True).get_structure("out", str(tmp_path / "out.cif"))
    assert [chain.id for chain in model] == ["B", "A"]
    atoms = list(model.get_atoms())
    assert [atom.get_name() for atom in atoms] == structure.atoms.getNames().tolist()
    numbers = [atom.get_parent().id[1] for atom in atoms]
    np.testing.assert_array_equal(numbers, structure.atoms.getResnums())
    hetero = [atom.get_parent().id[0] != " " for atom in atoms]
    np.testing.assert_array_equal(hetero, structure.atoms.getFlags("hetatm"))
    coords = [atom.coord for atom in atoms]
    np.testing.assert_allclose(coords, structure.atoms.getCoords(), atol=1e-3)
    assert [atom.element for atom in atoms] == structure.atoms.getElements().tolist()


def test_mmcif_that_biopython_wrote_is_read(prody_files, tmp_path):
    # It puts O5' into single quotes, which ProDy's reader leaves on.
    entry = PDBParser(QUIET=True).get_structure("3mht", str(prody_files / "pdb3mht.pdb"))
    writer = MMCIFIO()
    writer.set_structure(entry)
    writer.save(str(tmp_path / "out.cif"))
    again = load_structure(tmp_path / "out.cif")
    structure = load_structure(prody_files / "pdb3mht.pdb")
    assert again.content_hash == structure.content_hash
    assert_same_atoms(again.atoms, structure.atoms)


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_every_coordinate_set_is_a_model(closed, tmp_path, suffix):
    atoms = closed.atoms.copy()
    shifts = np.array([0.0, 5.0, 10.0])[:, None, None]
    atoms.setCoords(closed.atoms.getCoords() + shifts)
    path = tmp_path / f"models.{suffix}"
    write_structure(atoms, "models", path)
    parse = prody.parsePDB if suffix == "pdb" else prody.parseMMCIF
    read = parse(str(path)).getCoordsets()
    np.testing.assert_allclose(read, atoms.getCoordsets(), atol=5.001e-4)
    # The molecule itself is the first model.
    np.testing.assert_allclose(load_structure(path).node_coords, closed.node_coords, atol=6e-4)


def test_sequence_numbers_of_mmcif_keep_gaps_and_leave_ligands_out(prody_files, tmp_path):
    structure = load_structure(prody_files / "pdb3o21.pdb", chains="A")
    structure.save(tmp_path / "out.cif")
    lines = (tmp_path / "out.cif").read_text().splitlines()
    words = [line.split() for line in lines if line.startswith(("ATOM", "HETATM"))]
    sequence = np.array([line[8] for line in words])
    ligands = structure.atoms.getFlags("hetatm")
    assert ligands.any() and set(sequence[ligands]) == {"."}
    nodes = sequence[structure.node_rows].astype(int)
    assert nodes[0] == 1
    np.testing.assert_array_equal(np.diff(nodes), np.diff(structure.resnums))
    assert np.diff(nodes).max() > 1


def test_every_chain_gets_a_letter_of_its_own():
    atoms = trace(62)
    letters = chain_names(atoms)
    assert list(letters) == [f"c{number}" for number in range(62)]
    assert len(set(letters.values())) == 62 and all(len(name) == 1 for name in letters.values())
    atoms.setChids(np.where(atoms.getChids() == "c3", "a", atoms.getChids()))
    letters = chain_names(atoms)
    assert letters["a"] == "a" and len(set(letters.values())) == 62


def test_more_chains_than_letters(tmp_path):
    write_structure(trace(62), "many", tmp_path / "many.pdb")
    assert load_structure(tmp_path / "many.pdb").n_chains == 62
    atoms = trace(63)
    with pytest.raises(ValueError) as error:
        write_structure(atoms, "many", tmp_path / "more.pdb")
    assert "at most 62 chains" in str(error.value) and "got 63" in str(error.value)
    assert "try a file name that ends in .cif" in str(error.value)
    with pytest.raises(ValueError, match="at most 62 chains"):
        chain_names(atoms)
    assert not (tmp_path / "more.pdb").exists()
    write_structure(trace(700), "many", tmp_path / "more.cif")
    again = load_structure(tmp_path / "more.cif")
    assert again.chain_ids == tuple(f"c{number}" for number in range(700))
    assert_same_atoms(again.atoms, trace(700))


@pytest.mark.parametrize(
    "field, value, fits",
    [
        ("Coords", 9999.999, True),
        ("Coords", 9999.9996, False),
        ("Coords", 10000.0, False),
        ("Coords", -999.999, True),
        ("Coords", -999.9996, False),
        ("Coords", -1000.0, False),
        ("Resnums", 9999, True),
        ("Resnums", 10000, False),
        ("Resnums", -999, True),
        ("Resnums", -1000, False),
        ("Occupancies", 1000.0, False),
        ("Betas", 999.99, True),
        ("Betas", 1000.0, False),
        ("Betas", -100.0, False),
    ],
)
def test_numbers_beyond_the_columns_of_pdb_text(tmp_path, field, value, fits):
    atoms = trace(2)
    values = getattr(atoms, f"get{field}")()
    values[1] = value
    getattr(atoms, f"set{field}")(values)
    path = tmp_path / "out.pdb"
    if fits:
        write_structure(atoms, "out", path)
    else:
        with pytest.raises(ValueError, match="for PDB text, got .*; try a file name .* .cif"):
            write_structure(atoms, "out", path)
        assert not path.exists()
        path = tmp_path / "out.cif"
        write_structure(atoms, "out", path)
    again = load_structure(path).atoms
    np.testing.assert_allclose(getattr(again, f"get{field}")(), values, atol=6e-4)


@pytest.mark.parametrize("field, word", [("Names", "C1234"), ("Resnames", "A1ABC")])
def test_names_beyond_the_columns_of_pdb_text(tmp_path, field, word):
    atoms = trace(1)
    getattr(atoms, f"set{field}")([word, *getattr(atoms, f"get{field}")()[1:]])
    with pytest.raises(ValueError, match=f"characters for PDB text, got '{word}'; try .* .cif"):
        write_structure(atoms, "out", tmp_path / "out.pdb")
    write_structure(atoms, "out", tmp_path / "out.cif")
    read = prody.parseMMCIF(str(tmp_path / "out.cif"))
    assert getattr(read, f"get{field}")()[0] == word


def test_more_atoms_than_pdb_text_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_PDB_MOST_ATOMS", 5)
    with pytest.raises(ValueError, match="at most 5 atoms for PDB text, got 6; try .* .cif"):
        write_structure(trace(2), "out", tmp_path / "out.pdb")


def test_mmcif_holds_any_number_of_atoms_and_models(tmp_path):
    atoms = trace(20, 5001)
    with pytest.raises(ValueError, match="at most 99,999 atoms .* got 100,020; try .*.cif"):
        write_structure(atoms, "out", tmp_path / "out.pdb")
    coords = atoms.getCoords() / 100
    atoms.setCoords(np.stack([coords, coords[::-1]]))
    write_structure(atoms, "out", tmp_path / "out.cif")
    read = prody.parseMMCIF(str(tmp_path / "out.cif"))
    np.testing.assert_allclose(read.getCoordsets(), atoms.getCoordsets(), atol=5.001e-4)
    assert read.getSegnames()[-1] == "c19"


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_coordinates_that_are_not_finite(tmp_path, suffix, value):
    atoms = trace(2)
    atoms.addCoordset(np.where(np.arange(6)[:, None] == 2, value, atoms.getCoords()))
    with pytest.raises(ValueError, match="expected finite coordinates to write, got NaN"):
        write_structure(atoms, "out", tmp_path / f"out.{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("chain", ["much too long", "A B"])
def test_chain_ids_that_no_reader_of_mmcif_takes(tmp_path, chain):
    atoms = trace(1)
    atoms.setChids([chain] * 3)
    with pytest.raises(ValueError, match=f"chain ids of at most 6 .*'{chain}'; try shorter"):
        write_structure(atoms, "out", tmp_path / "out.cif")


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_a_title_of_several_lines_does_no_harm(closed, tmp_path, suffix):
    path = tmp_path / f"out.{suffix}"
    write_structure(closed.atoms, "two\nlines 'and' \"quotes\"", path)
    assert load_structure(path).n_nodes == closed.n_nodes


@pytest.mark.parametrize("suffix", ["pdb", "pdb.gz", "cif", "cif.gz"])
def test_a_full_disk_is_named(closed, tmp_path, monkeypatch, suffix):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prody, "writePDB", full)
    monkeypatch.setattr(gzip, "open", full)
    monkeypatch.setattr(writing, "open", full, raising=False)
    with pytest.raises(ValueError, match="No space left on device.*try another folder or disk"):
        write_structure(closed.atoms, "out", tmp_path / f"out.{suffix}")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_atoms_are_not_changed_by_writing(closed, tmp_path, suffix):
    before = closed.atoms.copy()
    write_structure(closed.atoms, "other name", tmp_path / f"out.{suffix}")
    assert_same_atoms(closed.atoms, before)
    assert closed.atoms.getTitle() == before.getTitle()
