import time

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryochains.molecule import (
    load_structure,
    match_structures,
    morph,
    rigid_fit,
    superpose,
    superposition,
)


def rmsd(a, b):
    return np.sqrt(((a - b) ** 2).sum(1).mean())


def angle(rotation):
    return np.degrees(Rotation.from_matrix(rotation).magnitude())


@pytest.fixture(scope="module")
def heavy_pair():
    return match_structures(
        load_structure("glua3-closed", atoms="heavy"), load_structure("glua3-open", atoms="heavy")
    )


def test_superposition_undoes_any_rigid_motion(closed):
    rotation = Rotation.random(random_state=1).as_matrix()
    moved = closed.with_coords(closed.atoms.getCoords() @ rotation.T + [10.0, -20.0, 30.0])
    back = superpose(moved, closed)
    np.testing.assert_allclose(back.atoms.getCoords(), closed.atoms.getCoords(), atol=1e-9)
    np.testing.assert_array_equal(back.origin, closed.origin)
    fitted, translation = rigid_fit(closed.coords, moved.coords)
    np.testing.assert_allclose(fitted, rotation, atol=1e-12)
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
        np.linalg.norm(np.diff(x, axis=0), axis=1)[follows]
        for x in (closed.coords, half, opened.coords)
    ]
    assert np.median(bonds[1]) == pytest.approx(3.8, abs=0.02)
    # A few loops flip between the two, which a straight line would shorten to half.
    np.testing.assert_allclose(bonds[1], (bonds[0] + bonds[2]) / 2, atol=1e-3)
    # A straight line through a 20° turn would shrink the chains; a screw does not.
    for c in range(2):
        own = closed.chain_index == c
        sizes = [
            x[own].std(0).__pow__(2).sum() ** 0.5 for x in (closed.coords, half, opened.coords)
        ]
        assert min(sizes[0], sizes[2]) - 0.05 < sizes[1] < max(sizes[0], sizes[2]) + 0.05


def bond_lengths(structure, frames):
    """(n, k) Å, of the Cα of consecutive residues."""
    bonds = np.flatnonzero(structure.bonded_to_next)
    return np.linalg.norm(frames[:, bonds + 1] - frames[:, bonds], axis=-1)


@pytest.mark.parametrize("bodies", ["chains", "domains"])
def test_bonds_stay_whole_on_the_whole_path(closed, opened, bodies):
    a, b = closed, opened
    if bodies == "domains":
        # Parts of one chain, each with a screw of its own, stay bonded.
        middle = {"A": "chain A", "B1": "chain B and resnum 1 to 200"}
        parts = middle | {"B2": "chain B and resnum 201 to 600"}
        a, b = (load_structure(s.atoms, bodies=parts) for s in (closed, opened))
    lengths = bond_lengths(a, morph(a, b, n=11).astype(float))
    assert ((lengths > 3.2) & (lengths < 4.4)).mean() > 0.99
    assert lengths.min() > min(lengths[0].min(), lengths[-1].min()) - 1e-3
    assert lengths.max() < max(lengths[0].max(), lengths[-1].max()) + 1e-3


def test_mended_bonds_move_little_else(closed, opened):
    frames = morph(closed, opened, n=5).astype(float)
    straight = _interpolated(closed, opened, 5)
    moved = np.linalg.norm(frames - straight, axis=-1)
    assert np.median(moved) < 0.02 and np.sqrt((moved**2).mean()) < 0.1
    # A path that needs no mending is left as it is.
    np.testing.assert_allclose(frames[[0, -1]], straight[[0, -1]], atol=1e-4)


def _interpolated(a, b, n):
    args = (a, b, a.coords, b.coords, a.chain_index, np.linspace(0, 1, n))
    return superposition._interpolate(*args)


def test_bonds_are_given_their_lengths_by_the_smallest_displacements():
    rng = np.random.default_rng(0)
    coords = np.cumsum(rng.normal(size=(3, 20, 3)) * 2.2, axis=1)
    bonds = np.delete(np.arange(19), [6, 12])
    lengths = np.full((3, len(bonds)), 3.8)
    moved = superposition.constrain_bonds(coords, bonds, lengths)
    found = np.linalg.norm(moved[:, bonds + 1] - moved[:, bonds], axis=-1)
    np.testing.assert_allclose(found, 3.8, atol=1e-3)
    # Forces between bonded nodes shift no piece of the chain as a whole.
    for piece in (slice(0, 7), slice(7, 13), slice(13, 20)):
        np.testing.assert_allclose(moved[:, piece].mean(1), coords[:, piece].mean(1), atol=1e-4)
    once = superposition.constrain_bonds(moved, bonds, lengths)
    np.testing.assert_allclose(once, moved, atol=1e-3)


def test_a_long_morph_of_a_large_molecule_is_fast(structures_dir):
    pair = [load_structure(entry, chains="AB") for entry in ("6UOA", "6UO8")]
    a, b = match_structures(*pair)
    began = time.process_time()
    frames = morph(a, superpose(b, a), n=50)
    assert time.process_time() - began < 10
    lengths = bond_lengths(a, frames.astype(float))
    assert ((lengths > 3.2) & (lengths < 4.4)).mean() > 0.99


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
