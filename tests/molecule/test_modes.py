import tracemalloc
import warnings

import numpy as np
import prody
import pytest
from scipy.spatial.transform import Rotation

from cryochains.molecule import (
    Modes,
    compute_modes,
    load_structure,
    network,
    quiet_prody,
    rigid_fit,
)
from cryochains.molecule import modes as modes_module
from cryochains.molecule.sources import cache_folder


@pytest.fixture(scope="module")
def ubiquitin(prody_files):
    return load_structure(prody_files / "pdb1ubi.pdb")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def rigid_motions(coords):
    offsets = coords - coords.mean(0)
    turns = [np.cross(axis, offsets) for axis in np.eye(3)]
    return np.stack([np.broadcast_to(axis, coords.shape) for axis in np.eye(3)] + turns)


def points(coords):
    """A structure of one chain with a Cα at every point."""
    n = len(coords)
    atoms = prody.AtomGroup("points")
    atoms.setCoords(np.asarray(coords, dtype=float))
    atoms.setNames(["CA"] * n)
    atoms.setResnames(["ALA"] * n)
    atoms.setResnums(np.arange(n) + 1)
    atoms.setChids(["A"] * n)
    atoms.setElements(["C"] * n)
    return load_structure(atoms)


def test_eigenvalues_and_modes_are_those_of_prody(ubiquitin):
    modes = compute_modes(ubiquitin, 20, cache=False, springs="anm")
    anm = prody.ANM("ubiquitin")
    with quiet_prody():
        anm.buildHessian(ubiquitin.coords, cutoff=15.0)
        anm.calcModes(20)
    np.testing.assert_allclose(modes.eigenvalues[0], anm.getEigvals(), rtol=1e-8)
    overlap = np.abs(np.einsum("knx,nxk->k", modes.vectors[0], anm.getEigvecs().reshape(76, 3, 20)))
    np.testing.assert_allclose(overlap, 1, atol=1e-8)


def test_springs_by_sequence_are_those_of_prody(ubiquitin):
    # A whole chain numbered from 1, where raw indices are the sequence.
    n = ubiquitin.n_nodes
    backbone = modes_module._backbone(ubiquitin, np.arange(n))
    pairs, springs = network._edenm_springs(ubiquitin.coords, backbone, 9.0)
    anm = prody.ANM("ubiquitin")
    with quiet_prody():
        gamma = prody.GammaED(ubiquitin.atoms.select("name CA"))
        anm.buildHessian(ubiquitin.coords, cutoff=9.0, gamma=gamma)
    ours = network._hessian(ubiquitin.coords, pairs, springs).toarray()
    # ProDy leaves out neighbours that are beyond the cutoff.
    far = np.linalg.norm(ubiquitin.coords[:, None] - ubiquitin.coords, axis=-1) > 9.0
    off_diagonal = ~np.repeat(np.repeat(far | np.eye(n, dtype=bool), 3, 0), 3, 1)
    np.testing.assert_allclose(
        ours[off_diagonal], anm.getHessian()[off_diagonal], rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("springs", ["edenm", "anm"])
@pytest.mark.parametrize("sparse_above", [0, 10**6])
def test_modes_are_orthonormal_ordered_and_free_of_rigid_motion(
    closed, sparse_above, springs, monkeypatch
):
    monkeypatch.setattr(network, "_SPARSE_ABOVE", sparse_above)
    modes = compute_modes(closed, 50, cache=False, springs=springs)
    assert modes.chain_ids == ("A", "B") and modes.n_modes == (50, 50)
    assert modes.structure_hash == closed.content_hash
    for c in range(2):
        coords = closed.node_coords[closed.node_chain == c]
        vectors, values = modes.vectors[c], modes.eigenvalues[c]
        assert vectors.shape == (50, len(coords), 3) and values.shape == (50,)
        assert (np.diff(values) >= 0).all() and values[0] > 0
        np.testing.assert_allclose(
            np.einsum("inx,jnx->ij", vectors, vectors), np.eye(50), atol=1e-10
        )
        np.testing.assert_allclose(
            np.einsum("inx,jnx->ij", vectors, rigid_motions(coords)), 0, atol=1e-6
        )


@pytest.mark.parametrize("springs", ["edenm", "anm"])
def test_sparse_and_dense_agree(closed, springs, monkeypatch):
    monkeypatch.setattr(network, "_SPARSE_ABOVE", 10**6)
    dense = compute_modes(closed, (30, 10), cache=False, springs=springs)
    monkeypatch.setattr(network, "_SPARSE_ABOVE", 0)
    sparse = compute_modes(closed, (30, 10), cache=False, springs=springs)
    assert dense.n_modes == sparse.n_modes == (30, 10)
    for c in range(2):
        np.testing.assert_allclose(sparse.eigenvalues[c], dense.eigenvalues[c], rtol=1e-8)
        # No two eigenvalues coincide here, so the modes agree one by one, signs too.
        np.testing.assert_allclose(sparse.vectors[c], dense.vectors[c], atol=1e-6)


def test_a_large_body_needs_no_dense_matrix(prody_files, monkeypatch):
    complex_ = load_structure(prody_files / "mmcif_7cth.cif").as_one_body()
    dense = (3 * complex_.n_nodes) ** 2 * 8
    assert complex_.n_nodes > 2000
    tracemalloc.start()
    modes = compute_modes(complex_, 5, cache=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < dense / 2
    assert modes.n_modes == (5,) and modes.eigenvalues[0][0] > 0


def test_the_largest_component_of_a_mode_is_positive(closed):
    for vectors in compute_modes(closed, 10, cache=False).vectors:
        flat = vectors.reshape(10, -1)
        assert (flat[np.arange(10), np.abs(flat).argmax(1)] > 0).all()


def collectivity(vectors):
    """(k,) share of the nodes that a mode moves (Brüschweiler 1995)."""
    squares = (vectors**2).sum(2)
    shares = squares / squares.sum(1, keepdims=True)
    return np.exp(-(shares * np.log(shares + 1e-30)).sum(1)) / vectors.shape[1]


def test_loose_ends_are_not_the_softest_modes(closed, opened):
    for structure in (closed, opened):
        local = {}
        for springs in ("edenm", "anm"):
            modes = compute_modes(structure, 30, springs=springs)
            local[springs] = sum((collectivity(v) < 0.1).sum() for v in modes.vectors)
        assert local["edenm"] == 0 and local["anm"] >= 5


def test_a_tail_in_solvent_is_not_the_softest_mode(ubiquitin):
    turn = np.radians(100) * np.arange(9)
    helix = np.stack([2.3 * np.cos(turn), 2.3 * np.sin(turn), 1.5 * np.arange(9)], 1)
    # Away from the molecule.
    away, _ = Rotation.align_vectors(ubiquitin.coords[-1] - ubiquitin.coords.mean(0), [0, 0, 1])
    tail = ubiquitin.coords[-1] + away.apply(helix - helix[0])[1:]
    longer = points(np.concatenate([ubiquitin.coords, tail]))
    in_tail = {}
    for springs in ("edenm", "anm"):
        modes = compute_modes(longer, 5, springs=springs, cache=False, cutoff=15.0)
        in_tail[springs] = (modes.vectors[0][:, -8:] ** 2).sum((1, 2))
    assert in_tail["edenm"].max() < 0.75 and in_tail["anm"].max() > 0.9
    assert in_tail["edenm"].sum() < 0.8 * in_tail["anm"].sum()


def test_soft_modes_express_a_real_change_better(closed, opened):
    """Squared overlap of 20 modes with the other state, the mean over chains and directions."""
    overlaps = {"edenm": [], "anm": []}
    for a, b in ((closed, opened), (opened, closed)):
        for springs, values in overlaps.items():
            modes = compute_modes(a, 20, springs=springs)
            for c, vectors in enumerate(modes.vectors):
                x, y = (s.node_coords[s.node_chain == c] for s in (a, b))
                rotation, shift = rigid_fit(y, x)
                change = y @ rotation.T + shift - x
                explained = np.einsum("knx,nx->k", vectors, change) ** 2
                values.append(explained.sum() / (change**2).sum())
    assert np.mean(overlaps["edenm"]) > np.mean(overlaps["anm"]) > 0.2


def sequence_pairs(structure):
    """Pairs of nodes that springs by sequence join."""
    backbone = modes_module._backbone(structure, np.arange(structure.n_nodes))
    pairs, springs = network._edenm_springs(structure.node_coords, backbone, 8.0)
    order = np.lexsort(pairs.T[::-1])
    return [tuple(pair) for pair in pairs[order].tolist()], springs[order]


def test_springs_by_sequence_need_true_neighbours(ubiquitin):
    whole, springs = sequence_pairs(ubiquitin)
    stiff = {pair for pair, spring in zip(whole, springs, strict=True) if spring == 60.0}
    assert stiff == {(i, i + 1) for i in range(75)}
    atoms = ubiquitin.atoms.copy()
    # Another first number is the same sequence; a jump, or another chain, is a gap.
    atoms.setResnums(atoms.getResnums() + 100)
    moved, same = sequence_pairs(load_structure(atoms))
    assert moved == whole
    np.testing.assert_array_equal(same, springs)
    atoms.setResnums(atoms.getResnums() + 5 * (atoms.getResnums() > 140))
    gap = load_structure(atoms)
    atoms.setResnums(atoms.getResnums() - 5 * (atoms.getResnums() > 140))
    atoms.setChids(np.where(atoms.getResnums() > 140, "B", "A"))
    for cut in (gap, load_structure(atoms).as_one_body()):
        pairs, values = sequence_pairs(cut)
        across = dict(zip(pairs, values, strict=True))
        last = 39  # the node of residue 140
        distance = np.linalg.norm(cut.node_coords[last] - cut.node_coords[last + 1])
        assert across[last, last + 1] == pytest.approx((6.0 / distance) ** 6)
        assert across[last - 1, last] == 60.0
        assert compute_modes(cut, 3, cache=False).eigenvalues[0][0] > 1e-6


def test_residues_with_insertion_codes_follow_each_other(ubiquitin):
    atoms = ubiquitin.atoms.copy()
    numbers = atoms.getResnums()
    atoms.setIcodes(np.where(numbers == 41, "A", atoms.getIcodes()))
    atoms.setResnums(np.where(numbers > 40, numbers - 1, numbers))
    _, springs = sequence_pairs(load_structure(atoms))
    np.testing.assert_array_equal(springs, sequence_pairs(ubiquitin)[1])


def test_a_stretched_bond_is_still_a_bond(ubiquitin):
    # As in a reference that was bent along a straight line; residues far apart are no neighbours.
    coords = ubiquitin.atoms.getCoords()
    beyond = (ubiquitin.atoms.getResnums() > 72)[:, None]
    for distance, bonded in ((5.0, True), (30.0, False)):
        stretched = ubiquitin.with_coords(coords + distance * beyond * [1.0, 0.0, 0.0])
        pairs, springs = sequence_pairs(stretched)
        assert (dict(zip(pairs, springs, strict=True)).get((71, 72)) == 60.0) == bonded


@pytest.mark.parametrize("springs", ["edenm", "anm"])
def test_modes_turn_with_the_molecule(ubiquitin, springs):
    rotation = Rotation.random(random_state=0).as_matrix()
    turned = ubiquitin.with_coords(ubiquitin.atoms.getCoords() @ rotation.T + 50.0)
    a, b = (compute_modes(x, 10, cache=False, springs=springs) for x in (ubiquitin, turned))
    # Loose ends that weigh next to nothing cost some digits.
    np.testing.assert_allclose(a.eigenvalues[0], b.eigenvalues[0], rtol=1e-7)
    overlap = np.einsum("knx,knx->k", a.vectors[0] @ rotation.T, b.vectors[0])
    np.testing.assert_allclose(np.abs(overlap), 1, atol=1e-7)


def test_soft_modes_resist_as_their_eigenvalues_say(ubiquitin):
    # ½ Σ (d − d₀)² over the springs, moved by ε along a mode, is ½ λ ε².
    modes = compute_modes(ubiquitin, 5, cache=False, springs="anm")
    coords, epsilon = ubiquitin.coords, 1e-3
    i, j = np.triu_indices(len(coords), 1)
    rest = np.linalg.norm(coords[i] - coords[j], axis=1)
    near = rest < 15.0
    for vector, value in zip(modes.vectors[0], modes.eigenvalues[0], strict=True):
        moved = coords + epsilon * vector
        stretch = np.linalg.norm(moved[i] - moved[j], axis=1)[near] - rest[near]
        assert (stretch**2).sum() / epsilon**2 == pytest.approx(value, rel=1e-2)


def test_modes_of_the_whole_assembly(closed):
    whole = compute_modes(closed.as_one_body(), 20, cache=False)
    assert whole.n_modes == (20,) and whole.chain_ids == ("A+B",)
    assert whole.vectors[0].shape == (20, 731, 3)
    # The chains move against each other before they bend.
    assert whole.eigenvalues[0][0] < min(
        values[0] for values in compute_modes(closed, 1).eigenvalues
    )


def test_imaging_atoms_change_nothing(closed):
    ca = compute_modes(closed, 5, cache=False)
    all_atoms = compute_modes(closed.all_atoms(), 5, cache=False)
    assert ca.structure_hash == all_atoms.structure_hash
    np.testing.assert_array_equal(ca.vectors[0], all_atoms.vectors[0])


def test_nucleic_acid_has_modes(prody_files):
    structure = load_structure(prody_files / "pdb3mht.pdb", chains="CD")
    for settings in ({"cutoff": 20.0, "springs": "anm"}, {}):
        modes = compute_modes(structure, 5, cache=False, **settings)
        assert modes.n_modes == (5, 5) and all(values[0] > 1e-6 for values in modes.eigenvalues)
    # Both strands and the protein that holds them, in one body.
    whole = load_structure(prody_files / "pdb3mht.pdb").as_one_body()
    modes = compute_modes(whole, 5, cache=False)
    names = whole.atoms.getNames()[whole.node_rows]
    share = (modes.vectors[0] ** 2).sum(2)[:, names != "CA"].sum(1)
    assert share.max() < 0.8, "the strands do not swing by themselves"


def test_all_modes_there_are(prody_files):
    small = load_structure(prody_files / "pdb2gb1_truncated.pdb")
    most = 3 * small.n_nodes - 6
    assert compute_modes(small, most, cache=False).n_modes == (most,)
    with pytest.raises(
        ValueError,
        match=rf"at most {most} modes for the {small.n_nodes} nodes of chain A, got {most + 1}",
    ):
        compute_modes(small, most + 1)


def test_no_modes_for_a_chain(closed):
    modes = compute_modes(closed, (0, 3), cache=False)
    assert modes.n_modes == (0, 3)
    assert modes.vectors[0].shape == (0, 369, 3)


@pytest.mark.parametrize("n_modes", [-1, (5,), (5, 5, 5), (5, -1), 2.5, "ab", (1.5, 2)])
def test_bad_numbers_of_modes(closed, n_modes):
    with pytest.raises(
        ValueError, match="expected (a number of modes|n_modes to be a whole number)"
    ):
        compute_modes(closed, n_modes)


def test_unknown_springs(closed):
    with pytest.raises(
        ValueError, match="expected springs edenm or anm, got 'hinsen'; try 'edenm'"
    ):
        compute_modes(closed, 5, springs="hinsen")


@pytest.mark.parametrize("cutoff", [0.0, -1.0, np.nan])
def test_bad_cutoffs(closed, cutoff):
    with pytest.raises(ValueError, match="cutoff to be a number of Å above 0"):
        compute_modes(closed, 5, cutoff=cutoff)


def test_a_loose_network_gets_a_wider_cutoff(closed):
    alone = load_structure(closed.atoms, chains="A")
    with pytest.warns(UserWarning, match="chain A is loose at a cutoff of 4.0 Å"):
        modes = compute_modes(alone, 5, cutoff=4.0)
    assert modes.eigenvalues[0][0] > 1e-6
    with pytest.warns(UserWarning, match="chain A is loose"):  # from the cache too
        compute_modes(alone, 5, cutoff=4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_modes(closed, 5)


def test_a_network_in_pieces(ubiquitin):
    far = points(np.concatenate([ubiquitin.coords, ubiquitin.coords + 200.0]))
    with pytest.raises(ValueError, match="in pieces even at 25.0 Å"):
        compute_modes(far, 5)
    with pytest.raises(ValueError, match="in pieces even at 25.0 Å"):
        compute_modes(far, 5, springs="anm")


def test_nodes_at_one_position(ubiquitin):
    with pytest.raises(ValueError, match="a position of its own"):
        compute_modes(points(np.repeat(ubiquitin.coords, 2, axis=0)), 5)


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_nodes_for_any_mode(n):
    with pytest.raises(ValueError, match=f"at most 0 modes for the {n} nodes"):
        compute_modes(points(3.8 * np.eye(3)[:n]), 1)


def test_the_cache_gives_what_was_computed(ubiquitin, monkeypatch):
    computed = compute_modes(ubiquitin, 5)
    monkeypatch.setattr(modes_module, "solve_modes", lambda *_: pytest.fail("computed again"))
    again = compute_modes(ubiquitin, 5)
    np.testing.assert_array_equal(again.vectors[0], computed.vectors[0])
    np.testing.assert_array_equal(again.eigenvalues[0], computed.eigenvalues[0])


def test_the_cache_knows_the_content(ubiquitin):
    moved = ubiquitin.with_coords(ubiquitin.atoms.getCoords() * 1.01)
    for structure, n_modes, cutoff in (
        (ubiquitin, 5, 15.0),
        (ubiquitin, 6, 15.0),
        (ubiquitin, 5, 12.0),
        (moved, 5, 15.0),
    ):
        for springs in ("edenm", "anm"):
            cached = compute_modes(structure, n_modes, cutoff, springs=springs)
            fresh = compute_modes(structure, n_modes, cutoff, cache=False, springs=springs)
            np.testing.assert_array_equal(cached.vectors[0], fresh.vectors[0])
    assert len(list((cache_folder() / "modes").iterdir())) == 8


def damaged_whole(path):
    path.write_bytes(b"")


def damaged_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_inside(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def damaged_shape(path):
    np.savez(path, vectors=np.zeros((2, 3)), eigenvalues=np.zeros(5), cutoff=np.array(15.0))


def damaged_names(path):
    np.savez(path, other=np.zeros(3))


def damaged_objects(path):
    np.savez(path, vectors=np.array([{}]), eigenvalues=np.zeros(5), cutoff=np.array(15.0))


def damaged_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        damaged_whole,
        damaged_half,
        damaged_inside,
        damaged_shape,
        damaged_names,
        damaged_objects,
        damaged_folder,
    ],
)
def test_a_damaged_cache_is_computed_again(ubiquitin, damage):
    computed = compute_modes(ubiquitin, 5)
    (path,) = (cache_folder() / "modes").iterdir()
    damage(path)
    again = compute_modes(ubiquitin, 5)
    np.testing.assert_array_equal(again.vectors[0], computed.vectors[0])


def test_a_cache_that_cannot_be_written_is_ignored(ubiquitin, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert isinstance(compute_modes(ubiquitin, 5), Modes)


def test_repr_is_short(closed):
    assert repr(compute_modes(closed, (3, 2), cache=False)) == "Modes(A: 3, B: 2)"
