import gzip

import numpy as np
import prody
import pytest

from cryochains.molecule import quiet_prody, sources
from cryochains.molecule.sources import cache_folder, read_atoms


def pdb_text(records) -> str:
    """PDB text of (name, altloc, resname, resnum, icode, x, occupancy)."""
    lines = [
        f"ATOM  {serial:>5}  {name:<3}{alt:1}{resname:>3} A{resnum:>4}{icode:1}   "
        f"{x:8.3f}   0.000   0.000{occupancy:6.2f}  0.00          {name[0]:>2}\n"
        for serial, (name, alt, resname, resnum, icode, x, occupancy) in enumerate(records, start=1)
    ]
    return "".join(lines) + "END\n"


def cif_text(records) -> str:
    """The same as mmCIF, of author's chain A and label Q."""
    fields = (
        "group_PDB id type_symbol label_atom_id label_alt_id label_comp_id label_asym_id "
        "label_seq_id pdbx_PDB_ins_code Cartn_x Cartn_y Cartn_z occupancy B_iso_or_equiv "
        "auth_seq_id auth_asym_id pdbx_PDB_model_num"
    ).split()
    head = "data_made\n#\nloop_\n" + "".join(f"_atom_site.{field}\n" for field in fields)
    rows = [
        f"ATOM {serial} {name[0]} {name} {alt.strip() or '.'} {resname} Q {serial} "
        f"{icode.strip() or '?'} {x:.3f} 0.000 0.000 {occupancy:.2f} 0.00 {resnum} A 1\n"
        for serial, (name, alt, resname, resnum, icode, x, occupancy) in enumerate(records, start=1)
    ]
    return head + "".join(rows) + "#\n"


@pytest.fixture(params=["pdb", "cif"])
def read(request, tmp_path):
    """Reads records after a trip through a file of either format."""

    def through_file(records):
        path = tmp_path / f"made.{request.param}"
        path.write_text((pdb_text if request.param == "pdb" else cif_text)(records))
        return read_atoms(path)[1]

    return through_file


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """An empty cache, no folder of structures, no fetch that succeeds; a list of the fetches."""
    calls = []

    def fetch(pdb_id, folder):
        calls.append(pdb_id)
        return None, "no route to host"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CRYOCHAINS_STRUCTURES", raising=False)
    monkeypatch.setattr(sources, "fetch_entry", fetch)
    return calls


ONE = [("CA", " ", "ALA", 1, " ", 0.0, 1.0), ("CA", " ", "GLY", 2, " ", 3.8, 1.0)]


def test_the_better_occupied_location_is_taken(read):
    atoms = read([*ONE, ("CA", "A", "SER", 3, " ", 7.0, 0.4), ("CA", "B", "SER", 3, " ", 8.0, 0.6)])
    np.testing.assert_allclose(atoms.getCoords()[:, 0], [0, 3.8, 8.0])


def test_the_first_of_equal_locations_is_taken(read):
    atoms = read([*ONE, ("CA", "A", "SER", 3, " ", 7.0, 0.5), ("CA", "B", "SER", 3, " ", 8.0, 0.5)])
    np.testing.assert_allclose(atoms.getCoords()[:, 0], [0, 3.8, 7.0])


def test_locations_not_called_a_are_not_lost(read):
    atoms = read([*ONE, ("CA", "B", "SER", 3, " ", 7.0, 0.4), ("CA", "C", "SER", 3, " ", 8.0, 0.6)])
    np.testing.assert_allclose(atoms.getCoords()[:, 0], [0, 3.8, 8.0])


def test_an_atom_with_only_the_lesser_location_stays(read):
    atoms = read(
        [
            *ONE,
            ("CA", " ", "SER", 3, " ", 7.0, 1.0),
            ("CB", "A", "SER", 3, " ", 8.0, 0.7),
            ("CB", "B", "SER", 3, " ", 9.0, 0.3),
            ("OG", "B", "SER", 3, " ", 9.5, 0.3),
        ]
    )
    assert atoms.getNames().tolist()[2:] == ["CA", "CB", "OG"]
    np.testing.assert_allclose(atoms.getCoords()[2:, 0], [7.0, 8.0, 9.5])


def test_of_two_residue_types_at_one_position_one_is_taken_whole(read):
    mixed = [
        ("CA", "A", "SER", 7.0, 0.3),
        ("OG", "A", "SER", 8.0, 0.3),
        ("CA", "B", "THR", 7.5, 0.7),
    ]
    atoms = read(
        ONE
        + [(name, alt, resname, 3, " ", x, occupancy) for name, alt, resname, x, occupancy in mixed]
    )
    assert atoms.getResnames().tolist() == ["ALA", "GLY", "THR"]


def test_insertion_codes_keep_residues_apart(read):
    atoms = read([*ONE, ("CA", " ", "SER", 2, "A", 7.0, 1.0), ("CA", " ", "SER", 2, "B", 8.0, 1.0)])
    assert atoms.getIcodes().tolist() == ["", "", "A", "B"]
    assert len(np.unique(sources.residue_ids(atoms))) == 4


def test_chains_of_mmcif_are_the_authors(read):
    assert set(read(ONE).getChids()) == {"A"}  # the label is Q


def test_water_is_left_out(read):
    assert read([*ONE, ("O", " ", "HOH", 3, " ", 9.0, 1.0)]).numAtoms() == 2


def test_the_first_model_is_taken(tmp_path):
    models = [
        pdb_text([(*record[:5], record[5] + shift, 1.0) for record in ONE]) for shift in (0, 100)
    ]
    text = "".join(
        f"MODEL     {i}\n{model.replace('END', 'ENDMDL')}" for i, model in enumerate(models, 1)
    )
    (tmp_path / "made.pdb").write_text(text + "END\n")
    np.testing.assert_allclose(read_atoms(tmp_path / "made.pdb")[1].getCoords()[:, 0], [0, 3.8])


@pytest.mark.parametrize(
    "name", ["made.pdb", "made.PDB", "made.ent", "pdb1abc.ent.gz", "made.pdb.gz"]
)
def test_names_of_pdb_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(
        gzip.compress(pdb_text(ONE).encode()) if name.endswith(".gz") else pdb_text(ONE).encode()
    )
    title, atoms = read_atoms(path)
    assert atoms.numAtoms() == 2
    assert title == ("1ABC" if "1abc" in name else "made")


@pytest.mark.parametrize("name", ["made.cif", "made.mmcif", "made.cif.gz"])
def test_names_of_mmcif_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(
        gzip.compress(cif_text(ONE).encode()) if name.endswith(".gz") else cif_text(ONE).encode()
    )
    assert read_atoms(path)[1].numAtoms() == 2


def test_atoms_of_the_user_are_not_changed():
    atoms = prody.AtomGroup("mine")
    atoms.setCoords(np.arange(6.0).reshape(2, 3))
    atoms.setNames(["CA", "CA"])
    atoms.setResnames(["ALA", "GLY"])
    title, clean = read_atoms(atoms)
    assert title == "mine"
    clean.setCoords(np.zeros((2, 3)))
    np.testing.assert_array_equal(atoms.getCoords(), np.arange(6.0).reshape(2, 3))
    assert atoms.getChids() is None
    assert clean.getChids().tolist() == ["_", "_"]
    assert clean.getElements().tolist() == ["C", "C"]


@pytest.mark.parametrize(
    "content", [b"", b"not a structure\n", b"\x1f\x8b\x08 broken", bytes(range(256)) * 20]
)
@pytest.mark.parametrize("name", ["bad.pdb", "bad.cif", "bad.cif.gz"])
def test_a_file_that_is_no_structure(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="expected a PDB or mmCIF file, got .*bad"):
        read_atoms(tmp_path / name)


def test_a_truncated_file(tmp_path):
    whole = gzip.compress(pdb_text(ONE * 50).encode())
    (tmp_path / "cut.pdb.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        read_atoms(tmp_path / "cut.pdb.gz")


def test_other_bad_sources(tmp_path, no_network):
    with pytest.raises(FileNotFoundError, match="glua3-closed.*'nothing.pdb'"):
        read_atoms("nothing.pdb")
    with pytest.raises(FileNotFoundError, match="here"):
        read_atoms(tmp_path / "nothing.pdb")
    (tmp_path / "made.txt").write_text("")
    with pytest.raises(ValueError, match="ending in .*made.txt"):
        read_atoms(tmp_path / "made.txt")
    with pytest.raises(ValueError, match="got int"):
        read_atoms(5)
    atoms = prody.AtomGroup("nan")
    atoms.setCoords(np.full((1, 3), np.nan))
    with pytest.raises(ValueError, match="finite coordinates"):
        read_atoms(atoms)
    (tmp_path / "wet.pdb").write_text(pdb_text([("O", " ", "HOH", 3, " ", 9.0, 1.0)]))
    with pytest.raises(ValueError, match="only water"):
        read_atoms(tmp_path / "wet.pdb")


@pytest.mark.parametrize(
    "name", ["1abc.pdb", "1ABC.PDB", "pdb1abc.ent.gz", "1Abc.cif", "1ABC.cif.gz"]
)
def test_an_id_is_found_in_the_users_folder(tmp_path, monkeypatch, no_network, name):
    folder = tmp_path / "mine"
    folder.mkdir()
    text = (cif_text(ONE) if ".cif" in name else pdb_text(ONE)).encode()
    (folder / name).write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
    monkeypatch.setenv("CRYOCHAINS_STRUCTURES", str(folder))
    for spelling in ("1abc", "1ABC"):
        title, atoms = read_atoms(spelling)
        assert (title, atoms.numAtoms()) == ("1ABC", 2)
    assert no_network == []


def test_an_id_that_cannot_be_had_says_where_it_was_sought(tmp_path, monkeypatch, no_network):
    monkeypatch.setenv("CRYOCHAINS_STRUCTURES", str(tmp_path))
    with pytest.raises(FileNotFoundError) as error:
        read_atoms("9zzz")
    message = str(error.value)
    assert "9ZZZ" in message and "\n" not in message
    for source in (
        f"CRYOCHAINS_STRUCTURES names ({tmp_path})",
        str(cache_folder()),
        "the PDB",
        "no route to host",
    ):
        assert source in message
    assert list(cache_folder().rglob("*")) == []


def fetched(pdb_id, folder):
    path = folder / f"{pdb_id}.cif.gz"
    path.write_bytes(gzip.compress(cif_text(ONE).encode()))
    return path, ""


def test_a_fetched_entry_is_kept_in_the_cache(monkeypatch, no_network):
    def fetch(pdb_id, folder):
        no_network.append(pdb_id)
        return fetched(pdb_id, folder)

    monkeypatch.setattr(sources, "fetch_entry", fetch)
    for _ in range(2):
        assert read_atoms("1ABC")[1].numAtoms() == 2
    assert no_network == ["1abc"]  # once
    assert [path.name for path in (cache_folder() / "structures").iterdir()] == ["1abc.cif.gz"]


def test_a_cache_that_cannot_be_written_does_not_stop_a_fetch(tmp_path, monkeypatch, no_network):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(sources, "fetch_entry", fetched)
    assert read_atoms("1ABC")[1].numAtoms() == 2


def test_prody_is_quiet_and_keeps_the_users_verbosity(tmp_path, capfd, monkeypatch):
    before = prody.LOGGER.verbosity
    (tmp_path / "made.pdb").write_text(pdb_text(ONE))
    try:
        prody.LOGGER.verbosity = "debug"
        read_atoms(tmp_path / "made.pdb")
        assert prody.LOGGER.verbosity == "debug"
        with pytest.raises(RuntimeError), quiet_prody():
            raise RuntimeError
        assert prody.LOGGER.verbosity == "debug"
    finally:
        prody.LOGGER.verbosity = before
    out, err = capfd.readouterr()
    assert out + err == ""


@pytest.mark.parametrize("name", sources.EMBEDDED)
def test_embedded_structures_are_protein_only(name):
    title, atoms = read_atoms(name)
    assert title == name
    assert set(atoms.getChids()) == {"A", "B"}
    assert not atoms.getFlags("hetatm").any()


def test_several_assemblies_at_once_are_no_source(prody_files):
    assemblies = prody.parsePDB(str(prody_files / "pdb3o21.pdb"), biomol=True)
    with pytest.raises(ValueError, match="got list; try one AtomGroup"):
        read_atoms(assemblies)
    assert set(read_atoms(assemblies[1])[1].getChids()) == {"C", "D"}


def test_quotes_of_mmcif_are_no_part_of_names(tmp_path):
    text = cif_text(ONE).replace(" CA ", " 'CA' ").replace(" A 1\n", ' "A" 1\n')
    (tmp_path / "made.cif").write_text(text)
    atoms = read_atoms(tmp_path / "made.cif")[1]
    assert set(atoms.getNames()) == {"CA"} and set(atoms.getChids()) == {"A"}
