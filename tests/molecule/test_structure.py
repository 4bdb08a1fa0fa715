import numpy as np
import prody
import pytest

from cryochains.molecule import load_structure
from cryochains.molecule.residues import residue_ids


@pytest.fixture(scope="module")
def three_o21(prody_files):
    """3O21 chains A and B with the sugars and phosphates of its file."""
    return load_structure(prody_files / "pdb3o21.pdb", chains="AB")


@pytest.fixture(scope="module")
def methylase(prody_files):
    """3MHT: a DNA methyltransferase (A) on a double strand (C, D), with a cofactor."""
    return load_structure(prody_files / "pdb3mht.pdb")


def check(structure):
    """What every structure promises."""
    n_all = structure.atoms.numAtoms()
    assert structure.atom_chain.shape == structure.atom_node.shape == (n_all,)
    assert (np.diff(structure.atom_chain) >= 0).all()
    assert (np.diff(structure.rows) > 0).all() and (np.diff(structure.node_rows) > 0).all()
    assert structure.coords.shape == (structure.n_atoms, 3) and structure.coords.dtype == np.float64
    assert structure.weights.shape == structure.resnums.shape == (structure.n_atoms,)
    assert structure.weights.mean() == pytest.approx(1) and (structure.weights > 0).all()
    assert set(structure.atom_chain) == set(structure.node_chain) == set(range(structure.n_chains))
    # A node rides with itself, and no atom with a node of another body.
    np.testing.assert_array_equal(
        structure.atom_node[structure.node_rows], np.arange(structure.n_nodes)
    )
    np.testing.assert_array_equal(structure.node_chain[structure.atom_node], structure.atom_chain)
    # Within its body every residue rides as one.
    parts = residue_ids(structure.atoms) * structure.n_chains + structure.atom_chain
    _, first, inverse = np.unique(parts, return_index=True, return_inverse=True)
    np.testing.assert_array_equal(structure.atom_node, structure.atom_node[first][inverse])


def test_embedded_structures():
    for name, n_nodes, n_all in (
        ("glua3-closed", (374, 365), 5995),
        ("glua3-open", (370, 371), 5958),
    ):
        structure = load_structure(name)
        check(structure)
        assert structure.chain_ids == ("A", "B")
        assert tuple(np.bincount(structure.node_chain)) == n_nodes
        assert structure.atoms.numAtoms() == n_all
        assert structure.n_atoms == structure.n_nodes
        np.testing.assert_allclose(structure.origin, structure.coords.mean(0))


def test_embedded_structures_are_the_entries(prody_files):
    for name, file in (("glua3-closed", "pdb3o21.pdb"), ("glua3-open", "pdb6flr.pdb")):
        embedded, entry = (
            load_structure(name),
            load_structure(prody_files / file, chains=["A", "B"]),
        )
        np.testing.assert_array_equal(embedded.coords, entry.coords)
        np.testing.assert_array_equal(embedded.weights, entry.weights)
        assert embedded.content_hash == entry.content_hash


def test_closed_is_closed(closed, opened):
    # The lower lobes of the two chains part, as the data's README says.
    def distance(structure):
        numbers = structure.resnums
        lower = ((numbers >= 116) & (numbers <= 244)) | ((numbers >= 354) & (numbers <= 380))
        ends = [structure.coords[lower & (structure.chain_index == c)].mean(0) for c in (0, 1)]
        return np.linalg.norm(ends[0] - ends[1])

    assert distance(closed) == pytest.approx(33.3, abs=0.05)
    assert distance(opened) == pytest.approx(37.1, abs=0.05)


def test_mmcif_and_pdb_of_an_entry_agree(prody_files):
    pdb = load_structure(prody_files / "pdb3o21.pdb")
    cif = load_structure(prody_files / "mmcif_3o21.cif")
    check(pdb)
    check(cif)
    assert pdb.chain_ids == cif.chain_ids == ("A", "B", "C", "D")
    np.testing.assert_array_equal(pdb.coords, cif.coords)
    np.testing.assert_array_equal(pdb.weights, cif.weights)
    assert pdb.content_hash == cif.content_hash
    assert pdb.atoms.numAtoms() == cif.atoms.numAtoms()


def test_chains_are_taken_in_the_order_asked(prody_files):
    both = load_structure(prody_files / "pdb3o21.pdb", chains=["A", "B"])
    for spelling in (["B", "A"], "BA", "B,A", "B A", ("B", "A")):
        swapped = load_structure(prody_files / "pdb3o21.pdb", chains=spelling)
        check(swapped)
        assert swapped.chain_ids == ("B", "A")
        np.testing.assert_array_equal(swapped.centers, both.centers[::-1])
    assert load_structure(prody_files / "pdb3o21.pdb", chains="C").chain_ids == ("C",)


def test_chain_ids_are_case_sensitive_and_may_be_long(prody_files, tmp_path):
    atoms = prody.parsePDB(str(prody_files / "pdb3o21.pdb"), chain="AB").copy()
    names = np.where(atoms.getChids() == "A", "a", "LAA")
    atoms.setChids(names)
    structure = load_structure(atoms)
    assert structure.chain_ids == ("a", "LAA")
    assert load_structure(atoms, chains="LAA").n_chains == 1
    with pytest.raises(ValueError, match="expected chains among a LAA"):
        load_structure(atoms, chains="A")
    structure.save(tmp_path / "long.pdb")
    np.testing.assert_allclose(
        load_structure(tmp_path / "long.pdb").coords, structure.coords, atol=6e-4
    )


def test_sugars_of_a_chain_ride_with_their_residue(three_o21):
    check(three_o21)
    atoms = three_o21.atoms
    first = np.flatnonzero((atoms.getResnames() == "NAG") & (atoms.getNames() == "C1"))
    assert len(first)
    linked = 0
    for row in first:
        node = three_o21.node_rows[three_o21.atom_node[row]]
        distance = np.linalg.norm(atoms.getCoords() - atoms.getCoords()[row], axis=1)
        nitrogen = np.flatnonzero((distance < 1.7) & (atoms.getNames() == "ND2"))
        if len(nitrogen):
            linked += 1
            assert atoms.getResnums()[node] == atoms.getResnums()[nitrogen[0]]
    assert linked


def test_chains_of_sugars_ride_whole_with_the_chain_they_touch(structures_dir):
    everything, polymer = load_structure("6UOA"), load_structure("6UOA", chains=["A", "B"])
    check(everything)
    assert everything.name == "6UOA"
    assert everything.chain_ids == polymer.chain_ids == ("A", "B")
    assert everything.content_hash == polymer.content_hash
    sugars = ~np.isin(everything.atoms.getChids(), ["A", "B"])
    assert sugars.sum() == everything.atoms.numAtoms() - polymer.atoms.numAtoms() > 0
    for chain in set(everything.atoms.getChids()[sugars]):
        assert len(set(everything.atom_chain[everything.atoms.getChids() == chain])) == 1


def test_large_structures(structures_dir):
    active = load_structure("6uo8")
    check(active)
    assert np.bincount(active.node_chain).tolist() == [689, 696]
    for chain, n in (("A", 609), ("B", 618)):
        structure = load_structure(structures_dir / f"2cg9_chain{chain}.pdb.gz")
        check(structure)
        assert (structure.chain_ids, structure.n_nodes) == ((chain,), n)


def test_nucleic_acid(methylase):
    check(methylase)
    assert set(methylase.chain_ids) == {"A", "C", "D"}
    names = methylase.atoms.getNames()[methylase.node_rows]
    strands = np.isin(methylase.node_chain, [methylase.chain_ids.index(c) for c in "CD"])
    assert set(names[~strands]) == {"CA"}
    assert set(names[strands]) <= {"P", "O5'"} and (names[strands] == "P").sum() >= 20
    # A nucleotide scatters more than an amino acid does.
    assert methylase.weights[strands].min() > methylase.weights[~strands].mean()
    cofactor = methylase.atoms.getResnames() == "SAH"
    assert cofactor.any() and len(set(methylase.atom_node[cofactor])) == 1


def test_heavy_atoms(three_o21, prody_files):
    heavy = load_structure(prody_files / "pdb3o21.pdb", chains="AB", atoms="heavy")
    check(heavy)
    assert heavy.n_atoms == heavy.atoms.numAtoms()  # a crystal structure without hydrogens
    sulfur, carbon = (heavy.weights[heavy.atoms.getElements() == element] for element in "SC")
    assert sulfur[0] / carbon[0] == pytest.approx(16 / 6)
    for name in ("centers", "radii", "node_coords", "content_hash"):
        np.testing.assert_array_equal(getattr(heavy, name), getattr(three_o21, name))


def test_hydrogens_are_exported_and_not_imaged(prody_files):
    structure = load_structure(prody_files / "pdb_addH_1ubi.pdb", atoms="heavy")
    hydrogen = structure.atoms.getElements() == "H"
    assert hydrogen.sum() > 500
    assert not hydrogen[structure.rows].any()
    assert structure.all_atoms().n_atoms == structure.atoms.numAtoms()


def test_all_atoms_is_the_same_molecule(three_o21):
    full = three_o21.all_atoms()
    check(full)
    assert full.n_atoms == three_o21.atoms.numAtoms()
    assert full.content_hash == three_o21.content_hash
    np.testing.assert_array_equal(full.origin, three_o21.origin)
    np.testing.assert_array_equal(full.coords[three_o21.rows], three_o21.coords)


def test_one_body_is_the_sum_of_the_bodies(closed):
    whole = closed.as_one_body()
    check(whole)
    assert whole.chain_ids == ("A+B",)
    assert whole.content_hash != closed.content_hash
    np.testing.assert_allclose(whole.centers[0], closed.node_coords.mean(0))
    np.testing.assert_array_equal(whole.coords, closed.coords)


def test_centers_and_radii(closed):
    for c in range(2):
        nodes = closed.node_coords[closed.node_chain == c]
        np.testing.assert_allclose(closed.centers[c], nodes.mean(0))
        gyration = np.sqrt(((nodes - nodes.mean(0)) ** 2).sum() / len(nodes))
        assert closed.radii[c] == pytest.approx(gyration)


def test_other_coordinates_and_origin(closed):
    coords = closed.atoms.getCoords()
    moved = closed.with_coords(coords + [1.0, 2.0, 3.0])
    check(moved)
    np.testing.assert_allclose(moved.coords - closed.coords, [[1, 2, 3]] * closed.n_atoms)
    np.testing.assert_array_equal(closed.atoms.getCoords(), coords)
    np.testing.assert_array_equal(moved.origin, closed.origin)
    np.testing.assert_array_equal(closed.with_origin([1, 2, 3]).origin, [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="of all atoms, got shape"):
        closed.with_coords(closed.coords)
    with pytest.raises(ValueError, match="expected .* finite numbers.* with NaN or infinity; try"):
        closed.with_coords(np.full_like(coords, np.nan))
    with pytest.raises(ValueError, match="three finite numbers"):
        closed.with_origin([0.0, 1.0])


def test_the_hash_knows_coordinates_residues_and_bodies_only(closed, prody_files):
    coords = closed.atoms.getCoords()
    assert closed.with_coords(coords + 1e-5).content_hash == closed.content_hash
    assert closed.with_coords(coords + 1e-2).content_hash != closed.content_hash
    assert closed.with_origin([0, 0, 0]).content_hash == closed.content_hash
    a, b = (load_structure(prody_files / "pdb3o21.pdb", chains=chain) for chain in "AB")
    assert a.content_hash != b.content_hash


@pytest.mark.parametrize("name", ["round.pdb", "round.pdb.gz", "round.cif", "round.cif.gz"])
def test_saved_and_loaded_again(three_o21, tmp_path, name):
    three_o21.save(tmp_path / "new" / name)
    again = load_structure(tmp_path / "new" / name)
    check(again)
    assert again.name == "round"
    np.testing.assert_array_equal(again.coords, three_o21.coords)
    np.testing.assert_array_equal(again.weights, three_o21.weights)
    np.testing.assert_array_equal(again.atom_node, three_o21.atom_node)
    assert again.content_hash == three_o21.content_hash
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


@pytest.mark.parametrize("suffix", ["pdb", "cif"])
def test_insertion_codes_survive_a_round_trip(closed, tmp_path, suffix):
    atoms = closed.atoms.copy()
    numbers, codes = atoms.getResnums(), atoms.getIcodes()
    codes[numbers == 11], numbers[numbers == 11] = "A", 10
    atoms.setResnums(numbers)
    atoms.setIcodes(codes)
    structure = load_structure(atoms)
    assert structure.n_nodes == closed.n_nodes
    structure.save(tmp_path / f"inserted.{suffix}")
    again = load_structure(tmp_path / f"inserted.{suffix}")
    assert again.content_hash == structure.content_hash != closed.content_hash


def test_saving_to_a_bad_path(closed, tmp_path):
    with pytest.raises(
        ValueError, match="ending in .pdb, .pdb.gz, .cif or .cif.gz, got out.txt; try out.pdb"
    ):
        closed.save(tmp_path / "out.txt")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can be written"):
        closed.save(tmp_path / "file" / "out.pdb")


def test_an_interrupted_save_leaves_what_was_there(closed, tmp_path, monkeypatch):
    def interrupted(path, atoms):
        with open(path, "w") as stream:
            stream.write("ATOM  half")
        raise KeyboardInterrupt

    (tmp_path / "out.pdb").write_text("before")
    monkeypatch.setattr(prody, "writePDB", interrupted)
    with pytest.raises(KeyboardInterrupt):
        closed.save(tmp_path / "out.pdb")
    assert [path.name for path in tmp_path.iterdir()] == ["out.pdb"]
    assert (tmp_path / "out.pdb").read_text() == "before"


def test_bodies_by_selection():
    lobes = {
        "upper": "chain A and (resnum 1 to 115 or resnum 245 to 353)",
        "rest": "chain A and resnum 116 to 244",
        "B": "chain B",
    }
    structure = load_structure("glua3-open", bodies=lobes)
    check(structure)
    assert structure.chain_ids == ("upper", "rest", "B")
    numbers = structure.resnums[structure.chain_index == 1]
    assert numbers.min() >= 116 and numbers.max() <= 244
    assert (
        structure.n_nodes < load_structure("glua3-open").n_nodes
    )  # residues 354 on are in no body


def test_a_body_may_cut_through_a_residue():
    halves = {
        "backbone": "chain A and name N CA C O",
        "B": "chain B",
        "one": "chain A and resnum 12 and name CB",
    }
    with pytest.raises(ValueError, match="expected Cα atoms .* in 'one'"):
        load_structure("glua3-open", bodies=halves)
    del halves["one"]
    check(load_structure("glua3-open", bodies=halves))


def test_bad_bodies():
    with pytest.raises(ValueError, match="atoms in body 'tail', got none for 'chain Z'"):
        load_structure("glua3-open", bodies={"head": "chain A", "tail": "chain Z"})
    with pytest.raises(ValueError, match="without common atoms, got .* in 'head' and 'tail'"):
        load_structure("glua3-open", bodies={"head": "chain A", "tail": "resnum 10 to 20"})
    with pytest.raises(ValueError, match="ProDy selection for body 'head', got 'chian A and'"):
        load_structure("glua3-open", bodies={"head": "chian A and"})
    with pytest.raises(ValueError, match="chains or bodies, got both"):
        load_structure("glua3-open", chains="A", bodies={"head": "chain A"})
    with pytest.raises(ValueError, match="at least one body"):
        load_structure("glua3-open", bodies={})


def test_bad_chains(prody_files):
    with pytest.raises(ValueError, match="expected chains among A B of glua3-open, got C"):
        load_structure("glua3-open", chains=["A", "C"])
    with pytest.raises(ValueError, match="every chain once"):
        load_structure("glua3-open", chains=["A", "A"])
    with pytest.raises(ValueError, match="got none"):
        load_structure("glua3-open", chains=[])
    with pytest.raises(ValueError, match="'ca' or 'heavy', got 'all'"):
        load_structure("glua3-open", atoms="all")


def test_no_node_at_all(prody_files):
    ligand = prody.parsePDB(str(prody_files / "pdb3o21.pdb")).select("resname NAG")
    with pytest.raises(ValueError, match="no Cα and no P"):
        load_structure(ligand)


def many_chains(closed, n):
    """A body for each of the first `n` residues, named A0, A1 …."""
    numbers = closed.resnums[closed.chain_index == 0][:n]
    return load_structure(
        "glua3-closed",
        bodies={f"A{k}": f"chain A and resnum {number}" for k, number in enumerate(numbers)},
    )


@pytest.mark.parametrize(
    "n, chains",
    [
        (8, "chains A0 A1 A2 A3 A4 A5 A6 A7"),
        (9, "9 chains A0 A1 … A8"),
        (70, "70 chains A0 A1 … A69"),
    ],
)
def test_repr_of_many_chains_is_short(closed, n, chains):
    many = many_chains(closed, n)
    assert repr(many).startswith(f"Structure('glua3-closed', {chains}, {n} residues, ")
    assert chains.endswith(f"chains {many.chain_summary}")


def test_repr_is_short(closed):
    assert repr(closed) == "Structure('glua3-closed', chains A B, 731 residues, 5,944 atoms)"


def merged(*parts) -> prody.AtomGroup:
    """AtomGroups one after the other, as a careless merge leaves them."""
    whole = parts[0].copy()
    for part in parts[1:]:
        whole = whole + part.copy()
    return whole


def test_a_residue_number_that_stands_twice_is_an_error(closed, prody_files):
    renamed = closed.atoms.copy()
    renamed.setChids(["A"] * renamed.numAtoms())
    with pytest.raises(ValueError) as error:
        load_structure(renamed)
    message = str(error.value)
    first = closed.resnums[closed.chain_index == 0][0]
    assert f"got {first} of chain A of glua3-closed more than once (and 3" in message
    assert "try giving each copy a chain id of its own" in message and "\n" not in message
    # MDTraj wrote both chains of this file as A.
    with pytest.raises(ValueError, match="got 2 of chain A of pdb6fpj.* more than once"):
        load_structure(prody_files / "pdb6fpj_Bb_fixed_solv_ions.pdb")


def test_two_residue_types_of_one_number_are_an_error(closed):
    one = closed.atoms.select("chain A and resnum 50 to 60").copy()
    other = one.copy()
    other.setResnames(["GLY"] * other.numAtoms())
    other.setCoords(other.getCoords() + 100.0)
    with pytest.raises(ValueError, match=r"got 50 of chain A .* more than once \(and 10 more\)"):
        load_structure(merged(one, other))


def test_an_insertion_code_tells_repeated_numbers_apart(closed):
    one = closed.atoms.select("chain A and resnum 50 to 60").copy()
    other = one.copy()
    other.setIcodes(["A"] * other.numAtoms())
    other.setCoords(other.getCoords() + 100.0)
    assert load_structure(merged(one, other)).n_nodes == 22
    with pytest.raises(ValueError, match="got 50A of chain A"):
        load_structure(merged(one, other, other))


def test_repeated_numbers_of_chains_left_out_do_not_matter(closed):
    part = closed.atoms.select("chain B").copy()
    whole = merged(closed.atoms, part)
    assert load_structure(whole, chains="A").n_nodes == 369
    assert load_structure(whole, bodies={"head": "chain A"}).n_nodes == 369
    with pytest.raises(ValueError, match="of chain B"):
        load_structure(whole)


def test_a_ligand_may_share_a_residue_number(closed):
    ligand = prody.AtomGroup("ligand")
    row = closed.node_rows[5]
    ligand.setCoords(closed.atoms.getCoords()[[row, row]] + [[3.0, 3, 3], [3.0, 3, 4]])
    ligand.setNames(["C1", "C2"])
    ligand.setResnames(["LIG", "LIG"])
    ligand.setChids(["A", "A"])
    ligand.setResnums([closed.resnums[0]] * 2)
    ligand.setElements(["C", "C"])
    ligand.setFlags("hetatm", np.ones(2, dtype=bool))
    atoms = closed.atoms.copy()
    structure = load_structure(atoms + ligand)
    assert structure.n_nodes == closed.n_nodes
    assert structure.atoms.numAtoms() == closed.atoms.numAtoms() + 2


def test_alternate_residues_at_one_position_load(prody_files):
    # 1EJG, crambin: Pro/Ser 22 and Leu/Ile 25, and many alternate side chains.
    crambin = load_structure(prody_files / "pdb1ejg.pdb")
    check(crambin)
    np.testing.assert_array_equal(crambin.resnums, np.arange(1, 47))
    raw = prody.parsePDB(str(prody_files / "pdb1ejg.pdb"), altloc="all")
    assert len(set(raw.select("resnum 22").getResnames())) == 2


def test_copies_of_an_assembly_are_bodies(prody_files):
    file = str(prody_files / "pdb3enl.pdb")
    one = load_structure(prody.parsePDB(file))
    both = load_structure(prody.parsePDB(file, biomol=True))
    check(both)
    assert both.chain_ids == ("A", "A_2")
    assert both.n_nodes == 2 * one.n_nodes
    assert both.atoms.numAtoms() == 2 * one.atoms.numAtoms()
    assert np.bincount(both.node_chain).tolist() == [one.n_nodes] * 2
    assert load_structure(prody.parsePDB(file, biomol=True), chains="A_2").n_nodes == one.n_nodes
    body = load_structure(prody.parsePDB(file, biomol=True), bodies={"second": "chain A_2"})
    np.testing.assert_array_equal(body.node_coords, both.node_coords[both.node_chain == 1])


def test_copies_of_an_mmcif_assembly_are_bodies(prody_files, tmp_path):
    # 7CTH, a dengue virus with antibodies: biological assembly 3 is five of its sixty copies.
    atoms, header = prody.parseMMCIF(str(prody_files / "mmcif_7cth.cif"), header=True)
    one = load_structure(atoms)
    five = load_structure(prody.buildBiomolecules(header, atoms, biomol="3"))
    check(five)
    assert five.n_chains == len(set(five.chain_ids)) == 5 * one.n_chains
    assert five.chain_ids[: one.n_chains] == one.chain_ids
    assert five.chain_ids[one.n_chains : 2 * one.n_chains] == tuple(
        f"{chain}_2" for chain in one.chain_ids
    )
    assert five.n_nodes == 5 * one.n_nodes
    assert five.atoms.numAtoms() == 5 * one.atoms.numAtoms()
    # Every copy has its own sugars, and they move with that copy.
    per_body = np.bincount(five.atom_chain).reshape(5, one.n_chains)
    np.testing.assert_array_equal(per_body, np.broadcast_to(per_body[0], per_body.shape))
    # 70 chains, with those of the sugars.
    with pytest.raises(ValueError, match="at most 62 chains.*got 70; try a file name .* .cif"):
        five.save(tmp_path / "five.pdb")
    five.save(tmp_path / "five.cif")
    again = load_structure(tmp_path / "five.cif")
    assert again.chain_ids == five.chain_ids
    assert again.content_hash == five.content_hash
    np.testing.assert_array_equal(again.atom_node, five.atom_node)


def test_segments_that_do_not_repeat_atoms_stay_one_chain(closed):
    atoms = closed.atoms.copy()
    atoms.setSegnames(np.where(atoms.getResnums() < 200, "PRO1", "PRO2"))
    assert load_structure(atoms).chain_ids == ("A", "B")
    # One chain id for all: the segments of the second chain repeat those of the first.
    segments = np.char.add(atoms.getSegnames(), atoms.getChids())
    atoms.setSegnames(segments)
    atoms.setChids(["A"] * atoms.numAtoms())
    structure = load_structure(atoms)
    assert structure.chain_ids == ("A", "A_2")
    np.testing.assert_array_equal(structure.coords, closed.coords)


def test_a_copys_name_is_free(closed):
    atoms = closed.atoms.copy()
    segments = np.where(atoms.getChids() == "A", "1", "2")
    part = atoms.select("chain A").copy()
    part.setChids(["A_2"] * part.numAtoms())
    part.setCoords(part.getCoords() + 100.0)
    part.setSegnames(["3"] * part.numAtoms())
    atoms.setSegnames(segments)
    atoms.setChids(["A"] * atoms.numAtoms())
    assert load_structure(atoms + part).chain_ids == ("A", "A_3", "A_2")


def halves(**settings):
    bodies = {
        "head": "chain A and resnum 1 to 107",
        "tail": "chain A and resnum > 107",
        "other": "chain B",
    }
    return load_structure("glua3-closed", bodies=bodies, **settings)


@pytest.mark.parametrize("atoms", ["ca", "heavy"])
def test_a_body_that_turns_by_any_angle_turns_about_its_joint(atoms):
    plain = halves(atoms=atoms)
    turning = plain.with_turning("tail", "head")
    check(turning)
    assert turning.turning == ("head", "tail") and plain.turning == ()
    ((before, after),) = turning.joints
    assert (plain.node_chain[before], plain.node_chain[after]) == (0, 1)
    joint = plain.node_coords[[before, after]].mean(0)
    for body in (0, 1):
        np.testing.assert_allclose(turning.centers[body], joint)
        own = plain.node_coords[plain.node_chain == body]
        distance = np.sqrt(((own - joint) ** 2).sum(1).mean())
        assert turning.radii[body] == pytest.approx(distance) and distance > plain.radii[body]
    np.testing.assert_array_equal(turning.centers[2], plain.centers[2])
    # A population of the one is none of the other; and all can be taken back.
    assert turning.content_hash != plain.content_hash
    assert turning.with_turning().content_hash == plain.content_hash
    assert "turning by any angle: head tail" in repr(turning)
    assert "turning" not in repr(plain)


def test_a_body_without_a_joint_turns_about_its_centre():
    plain = halves()
    np.testing.assert_array_equal(plain.with_turning("other").centers, plain.centers)


def test_joints_move_with_the_atoms():
    turning = halves().with_turning("head")
    moved = turning.with_coords(turning.atoms.getCoords() + [1.0, 2.0, 3.0])
    np.testing.assert_allclose(moved.centers, turning.centers + [1.0, 2.0, 3.0])


def test_other_bodies_do_not_turn():
    turning = halves().with_turning("head")
    assert turning.all_atoms().turning == ("head",)
    assert turning.as_one_body().turning == turning.as_domains().turning == ()
    with pytest.raises(ValueError, match="expected bodies among head tail other, got foot; try"):
        turning.with_turning("head", "foot")
