"""Conformation versus pose: only the frame differs, images stay, and derivatives are right."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch.autograd.functional import jacobian

from cryochains.images import random_rotations
from cryochains.model import (
    Dynamics,
    Microscope,
    frame_jacobian,
    in_frame,
    rotvec_to_matrix,
    superposed,
)
from cryochains.model.rotations import best_rotation, matrix_to_rotvec, right_jacobian
from cryochains.molecule import atom_beads, compute_modes, load_structure, residue_beads, rigid_fit

BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}
FRAMES = ["molecule", "A", "B"]


@pytest.fixture(scope="module")
def small():
    """Two pieces of the two chains, of different length, whose origin is nothing's centre."""
    structure = load_structure("glua3-closed", bodies=BODIES)
    return structure.with_origin(structure.origin + [3.0, -2.0, 5.0])


@pytest.fixture(scope="module")
def dynamics(small):
    return Dynamics(small, compute_modes(small, (3, 2)))


@pytest.fixture(scope="module")
def latents(dynamics):
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randn(5, dynamics.n_latents, generator=generator, dtype=torch.float64)


def assert_close(one, other, atol):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# Superposition


def test_superposition_is_that_of_kabsch(dynamics, small, latents):
    """Against ProDy's, of one conformation at a time."""
    coords = dynamics.decode(latents)
    for one, seen in zip(coords, superposed(dynamics, coords), strict=True):
        rotation, shift = rigid_fit(one.numpy(), small.coords)
        np.testing.assert_allclose(seen, one.numpy() @ rotation.T + shift, atol=1e-4)
    single = superposed(dynamics, coords.float())
    assert single.dtype == torch.float32
    assert_close(single.double(), superposed(dynamics, coords), 1e-4)


def test_superposition_of_a_mirror_image_is_a_rotation():
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points -= points.mean(0)
    mirrored = points * torch.tensor([1.0, 1.0, -1.0])
    rotation = best_rotation((mirrored.mT @ points)[None])[0]
    assert torch.linalg.det(rotation) == pytest.approx(1.0)
    assert_close(rotation @ rotation.mT, torch.eye(3, dtype=torch.float64), 1e-12)


# The same conformations


@pytest.mark.parametrize("frame", FRAMES)
def test_only_the_frame_differs(dynamics, latents, frame):
    seen = in_frame(dynamics, latents, frame)
    coords = dynamics.decode(latents)
    back = dynamics.decode(seen.latents) @ seen.rotations.mT + seen.shifts.unsqueeze(1)
    assert_close(back, coords, 1e-11)
    modes = torch.from_numpy(dynamics.latent_kind == "mode")
    assert torch.equal(seen.latents[:, modes], latents[:, modes])
    assert seen.turns.norm(dim=1).min() > 0.01, "there was something to take out"


@pytest.mark.parametrize("frame", FRAMES)
def test_seen_again_nothing_changes(dynamics, latents, frame):
    seen = in_frame(dynamics, latents, frame)
    again = in_frame(dynamics, seen.latents, frame)
    assert_close(again.latents, seen.latents, 1e-11)
    assert_close(again.rotations, torch.eye(3, dtype=torch.float64).expand(5, 3, 3), 1e-11)
    assert_close(again.shifts, torch.zeros(5, 3, dtype=torch.float64), 1e-10)
    # It does not matter where they were seen from before.
    other = in_frame(dynamics, latents, "B")
    assert_close(in_frame(dynamics, other.latents, frame).latents, seen.latents, 1e-11)


def test_in_the_molecule_each_is_superposed_on_the_reference(dynamics, latents):
    coords = dynamics.decode(in_frame(dynamics, latents).latents)
    assert_close(superposed(dynamics, coords), coords, 1e-11)
    assert_close(superposed(dynamics, dynamics.decode(latents)), coords, 1e-11)


@pytest.mark.parametrize("chain", ["A", "B"])
def test_in_the_frame_of_a_chain_it_neither_turns_nor_shifts(dynamics, small, latents, chain):
    layout = dynamics.chains[small.chain_ids.index(chain)]
    seen = in_frame(dynamics, latents, chain).latents
    assert seen[:, layout.rotation].abs().max() < 1e-12
    assert seen[:, layout.translation].abs().max() < 1e-12


@pytest.mark.parametrize("frame", FRAMES)
def test_a_motion_that_all_chains_share_is_pose_alone(dynamics, small, frame):
    turn = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64)
    rotation = rotvec_to_matrix(turn[None])[0]
    shift = torch.tensor([5.0, -3.0, 2.0], dtype=torch.float64)
    coords = torch.from_numpy(small.coords) @ rotation.T + shift
    seen = in_frame(dynamics, dynamics.fit(coords[None]), frame)
    assert seen.latents.abs().max() < 1e-3
    assert_close(seen.turns[0], turn, 1e-4)
    # Where the origin of the box went.
    origin = torch.from_numpy(small.origin)
    poses = torch.eye(3)[None]
    expected = (rotation @ origin + shift - origin)[:2]
    assert_close(seen.image_shifts(poses, small.origin)[0], expected, 1e-3)


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", [lambda small: atom_beads(small, 3.2), residue_beads])
def test_images_are_the_same(dynamics, small, latents, frame, dtype, draw):
    beads = draw(small)
    microscope = Microscope(beads.weights, 32, 4.0, small.origin, beads.widths)
    drawn = dynamics.with_beads(beads)
    rotations = random_rotations(5, 0)
    shifts = 3 * torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    seen = in_frame(dynamics, latents, frame)
    given = microscope.render(drawn.decode(latents.to(dtype)), rotations, shifts)
    corrected = microscope.render(
        drawn.decode(seen.latents.to(dtype)),
        (rotations.double() @ seen.rotations).float(),
        (shifts + seen.image_shifts(rotations, small.origin)).float(),
    )
    assert (given - corrected).norm() < 1e-5 * given.norm()


def test_many_are_as_one_at_a_time(dynamics, latents):
    many = latents.repeat(60, 1)  # more than are in memory at a time
    seen = in_frame(dynamics, many)
    assert seen.latents.shape == many.shape and seen.rotations.shape == (300, 3, 3)
    alone = in_frame(dynamics, latents[3:4])
    assert_close(seen.latents[253:254], alone.latents, 1e-12)
    none = in_frame(dynamics, latents[:0])
    assert none.latents.shape == (0, dynamics.n_latents) and none.shifts.shape == (0, 3)
    traced = latents.clone().requires_grad_()
    assert torch.equal(in_frame(dynamics, traced).latents, in_frame(dynamics, latents).latents)


# Derivatives


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("spread", [0.0, 0.5, 1.0])
def test_derivatives_are_those_of_small_steps(dynamics, small, latents, frame, spread):
    """At the reference too, where rotation vectors are zero."""
    latents = spread * latents
    rotations = random_rotations(5, 0)
    by_z = frame_jacobian(dynamics, latents, frame)
    turns_by_z, shifts_by_z = by_z.pose(rotations, small.origin)
    assert_close(by_z.seen.latents, in_frame(dynamics, latents, frame).latents, 1e-12)
    step = 1e-4
    for latent in range(dynamics.n_latents):
        move = torch.zeros_like(latents)
        move[:, latent] = step
        more, less = (in_frame(dynamics, latents + way * move, frame) for way in (1, -1))

        def slope(value, more=more, less=less):
            return (value(more) - value(less)) / (2 * step)

        assert_close(by_z.latents[..., latent], slope(lambda seen: seen.latents), 1e-7)
        assert_close(turns_by_z[..., latent], slope(lambda seen: seen.turns), 1e-7)
        moved = slope(lambda seen: seen.image_shifts(rotations, small.origin))
        assert_close(shifts_by_z[..., latent], moved, 1e-7)


def test_derivatives_are_those_of_a_superposition(dynamics, latents):
    """Against automatic derivatives of coordinates that were superposed with all their atoms."""

    def conformation(z):
        x = dynamics.decode(z[None])[0]
        x = x - x.mean(0)
        reference = dynamics.reference.double()
        centre = reference.mean(0)
        left, _, right = torch.linalg.svd(x.mT @ (reference - centre))
        return x @ left @ right + centre

    for one in latents[:2]:
        by_z = frame_jacobian(dynamics, one[None])
        atoms = jacobian(lambda z: dynamics.decode(z[None])[0], by_z.seen.latents[0])
        expected = jacobian(conformation, one)
        assert_close(atoms @ by_z.latents[0], expected, 1e-8)


def test_derivative_of_a_shared_motion_is_zero(dynamics, latents):
    """Whatever all chains do together changes the pose, and no latent in the molecule."""
    seen = in_frame(dynamics, latents)
    spin = torch.tensor([0.2, 0.1, -0.3], dtype=torch.float64)
    moved = []
    for way in (1e-5, -1e-5):
        rotation = rotvec_to_matrix(way * spin[None])[0]
        coords = dynamics.decode(latents) @ rotation.T + 100 * way
        moved.append(coords)
    step = (moved[0] - moved[1]) / 2e-5
    by_z = frame_jacobian(dynamics, latents)
    for row, one in enumerate(latents):
        atoms = jacobian(lambda z: dynamics.decode(z[None])[0], one).flatten(0, 1)
        direction = torch.linalg.lstsq(atoms, step[row].flatten()[:, None]).solution
        assert_close(atoms @ direction, step[row].flatten()[:, None], 1e-6)
        assert (by_z.latents[row] @ direction).abs().max() < 1e-6
        turned = seen.rotations[row].mT @ spin
        assert_close((by_z.turns[row] @ direction)[:, 0], turned, 1e-7)


# Rotations


def test_rotation_vectors_of_matrices():
    rotvecs = torch.tensor(
        [[0.0, 0, 0], [1e-9, 0, 0], [0.1, -2, 1], [3.1, 0, 0]], dtype=torch.float64
    )
    assert_close(matrix_to_rotvec(rotvec_to_matrix(rotvecs)), rotvecs, 1e-12)
    long = torch.tensor([[4.0, 0.0, 0.0]], dtype=torch.float64)
    assert_close(matrix_to_rotvec(rotvec_to_matrix(long)), long * (1 - 2 * np.pi / 4), 1e-12)


def test_right_jacobian_is_of_a_small_step():
    rotvec = np.array([0.4, -1.0, 0.7])
    step = 1e-6 * np.array([1.0, 2.0, -1.0])
    turned = Rotation.from_rotvec(rotvec).inv() * Rotation.from_rotvec(rotvec + step)
    expected = right_jacobian(torch.from_numpy(rotvec)[None])[0].numpy() @ step
    np.testing.assert_allclose(turned.as_rotvec(), expected, rtol=1e-5)


# Bad input


def test_frames_that_are_not_there(dynamics, small, latents):
    for frame in ("Q", "poses", ""):
        with pytest.raises(ValueError, match="expected the frame 'molecule' or a chain of A, B, g"):
            in_frame(dynamics, latents, frame)
    for switches in ({"rotation": False}, {"translation": False}):
        other = Dynamics(small, **switches)
        zeros = torch.zeros(1, other.n_latents)
        for frame in FRAMES:
            with pytest.raises(ValueError, match="expected a model whose chains turn and shift"):
                in_frame(other, zeros, frame)
            with pytest.raises(ValueError, match="expected a model whose chains turn and shift"):
                frame_jacobian(other, zeros, frame)
    for wrong in (latents[0], latents[:, 1:]):
        with pytest.raises(ValueError, match=r"expected latents \(n, 17\), got"):
            in_frame(dynamics, wrong)


def test_a_chain_that_is_called_molecule_has_no_frame():
    named = {"molecule": BODIES["A"], "B": BODIES["B"]}
    dynamics = Dynamics(load_structure("glua3-closed", bodies=named))
    latents = torch.ones(1, 12, dtype=torch.float64)
    latents[0, 3:6] = 5.0
    seen = in_frame(dynamics, latents, "molecule").latents
    assert seen[:, dynamics.chains[0].translation].abs().max() > 0.1
    coords = dynamics.decode(seen)
    assert_close(superposed(dynamics, coords), coords, 1e-10)
