"""A shape that all particles share and the reference lacks: it is recovered, and none invented."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.inference import Result, correct_reference, refine, true_latents
from cryochains.model import Dynamics, Model, simulate_particles

N = 120


def distance(a, b) -> float:
    return float(np.sqrt(((a.coords - b.coords) ** 2).sum(1).mean()))


@pytest.fixture(scope="module")
def bent(closed):
    """The reference with residues displaced by 2 Å (RMS), alike within about 10 Å.

    Nothing that a rigid chain could do.
    """
    rng = np.random.default_rng(0)
    coords = closed.node_coords
    squares = ((coords[:, None] - coords) ** 2).sum(-1)
    near = np.exp(-squares / (2 * 10.0**2))
    field = near @ rng.standard_normal((closed.n_nodes, 3))
    for c in range(closed.n_chains):
        own = closed.node_chain == c
        offsets = coords[own] - closed.centers[c]
        turns = np.stack([np.cross(axis, offsets).ravel() for axis in np.eye(3)], 1)
        shifts = np.tile(np.eye(3), (own.sum(), 1))
        rigid = np.linalg.qr(np.concatenate([turns, shifts], 1))[0]
        field[own] -= (rigid @ (rigid.T @ field[own].ravel())).reshape(-1, 3)
    field *= 2.0 / np.sqrt((field**2).sum(1).mean())
    return closed.with_coords(closed.atoms.getCoords() + field[closed.atom_node])


def simulate_and_refine(truth, closed) -> Result:
    """Particles whose rigid chains shift and turn about `truth`, refined around `closed`."""
    dynamics = Dynamics(truth)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(N, dynamics.n_latents, generator=generator)
    particles = simulate_particles(
        truth,
        N,
        dynamics=dynamics,
        latents=latents,
        box_size=48,
        snr_db=0.0,
        seed=3,
        progress=False,
    )
    return refine(Model(closed, particles, modes=None), particles, progress=False)


@pytest.fixture(scope="module")
def mismatched(bent, closed) -> Result:
    return simulate_and_refine(bent, closed)


def floor(model, particles) -> float:
    return float(true_latents(model, particles)[1].square().mean().sqrt())


def test_a_shared_change_of_shape_is_recovered(mismatched, bent, closed):
    corrected = correct_reference(mismatched)
    assert distance(corrected, bent) < 0.6 * distance(closed, bent)
    particles = mismatched.particles
    again = Model(corrected, particles, modes=None)
    assert floor(again, particles) < 0.6 * floor(mismatched.model, particles)
    assert corrected.content_hash != closed.content_hash
    assert corrected.chain_ids == closed.chain_ids


def test_a_correct_reference_stays_within_the_noise(closed):
    """A few tenths of an Å from 120 particles of 0 dB, of the 2 Å that are recovered above."""
    assert distance(correct_reference(simulate_and_refine(closed, closed)), closed) < 0.5


def test_what_chains_can_do_themselves_is_left_to_them(mismatched, closed):
    """The field has no part along a chain's turn, shift or modes."""
    particles = mismatched.particles
    model = Model(closed, particles, modes=5)
    result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    corrected = correct_reference(result)
    field = torch.from_numpy(corrected.coords - closed.coords).float()
    for chain, layout in enumerate(model.dynamics.chains):
        reference = torch.zeros(1, model.n_latents)
        tangents = model.dynamics.tangents(reference, chain)[0].flatten(1)
        along = tangents @ field[layout.atoms].flatten() / tangents.norm(dim=1)
        assert along.abs().max() < 1e-3 * field.norm()


def test_the_model_and_the_result_are_not_changed(mismatched):
    """Nor does the correction depend on who asked before."""
    latents = mismatched.latents.clone()
    std = mismatched.std.clone()
    coords = mismatched.model.structure.coords.copy()
    first = correct_reference(mismatched, n_particles=20)
    second = correct_reference(mismatched, n_particles=20)
    assert np.array_equal(first.coords, second.coords)
    assert torch.equal(mismatched.latents, latents)
    assert torch.equal(mismatched.std, std)
    assert np.array_equal(mismatched.model.structure.coords, coords)


def test_the_refinement_of_other_particles_is_refused(mismatched):
    """Particles and latents that do not belong together make no result at all."""
    with pytest.raises(ValueError, match="expected .*particles.* got"):
        replace(mismatched, particles=mismatched.particles[:10])
    with pytest.raises(ValueError, match="expected particles with the ids of the result"):
        replace(mismatched, particles=mismatched.particles[::-1])
    with pytest.raises(ValueError, match="expected latents"):
        replace(mismatched, latents=mismatched.latents[:, :3])


def test_what_is_not_a_refinement_is_refused(mismatched):
    for missing in ("particles", "population", "std"):
        with pytest.raises(ValueError, match="expected the refinement of .* try refine"):
            correct_reference(replace(mismatched, **{missing: None}))
