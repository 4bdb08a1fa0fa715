"""A shape that all particles share and the reference lacks: found where it is, and not where it is not."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cryochains.dynamics import Dynamics
from cryochains.inference import refine
from cryochains.metrics import true_latents
from cryochains.model import CryoChains
from cryochains.simulation import simulate_particles

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from correct_reference import correct_reference  # noqa: E402

N = 120


def differ(a, b) -> float:
    return float(np.sqrt(((a.coords - b.coords) ** 2).sum(1).mean()))


@pytest.fixture(scope="module")
def bent(closed):
    """The reference with residues displaced by 2 Å (RMS), alike within about 10 Å: nothing a rigid chain could do."""
    rng = np.random.default_rng(0)
    places = closed.node_coords
    near = np.exp(-((places[:, None] - places) ** 2).sum(-1) / (2 * 10.0**2))
    field = near @ rng.standard_normal((closed.n_nodes, 3))
    for c in range(closed.n_chains):
        own = closed.node_chain == c
        offsets = places[own] - closed.centers[c]
        turns = np.stack([np.cross(axis, offsets).ravel() for axis in np.eye(3)], 1)
        rigid = np.linalg.qr(np.concatenate([turns, np.tile(np.eye(3), (own.sum(), 1))], 1))[0]
        field[own] -= (rigid @ (rigid.T @ field[own].ravel())).reshape(-1, 3)
    field *= 2.0 / np.sqrt((field**2).sum(1).mean())
    return closed.with_coords(closed.atoms.getCoords() + field[closed.atom_node])


def look_at(truth, closed):
    """Particles whose rigid chains shift and turn about `truth`, and their refinement around `closed`."""
    dynamics = Dynamics(truth)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(N, dynamics.n_latents, generator=generator)
    particles = simulate_particles(
        truth, N, dynamics=dynamics, latents=latents, box_size=48, snr_db=0.0, seed=3, progress=False
    )
    model = CryoChains.for_particles(closed, particles, modes=None, width=0.02)
    return model, particles, refine(model, particles, progress=False)


@pytest.fixture(scope="module")
def mismatched(bent, closed):
    return look_at(bent, closed)


def test_a_shared_change_of_shape_is_found(mismatched, bent, closed):
    model, particles, refinement = mismatched
    found = correct_reference(model, particles, refinement)
    assert differ(found, bent) < 0.6 * differ(closed, bent)
    again = CryoChains.for_particles(found, particles, modes=None, width=0.02)
    before, after = (true_latents(m.dynamics, particles)[1].square().mean().sqrt() for m in (model, again))
    assert after < 0.6 * before
    assert found.content_hash != closed.content_hash and found.chain_ids == closed.chain_ids


def test_where_nothing_is_amiss_the_reference_stays_within_the_noise(closed):
    """A few tenths of an Å from 120 particles of 0 dB, of the 2 Å that are found where they are."""
    assert differ(correct_reference(*look_at(closed, closed)), closed) < 0.5


def test_what_chains_can_do_themselves_is_left_to_them(mismatched, closed):
    """The field has no part along a chain's turn, shift or modes."""
    _, particles, _ = mismatched
    model = CryoChains.for_particles(closed, particles, modes=5, width=0.02)
    found = correct_reference(model, particles, refine(model, particles, blurs=(4.0, 0.0), progress=False))
    field = torch.from_numpy(found.coords - closed.coords).float()
    for chain, layout in enumerate(model.dynamics.chains):
        tangents = model.dynamics.tangents(torch.zeros(1, model.dynamics.n_latents), chain)[0].flatten(1)
        along = tangents @ field[layout.atoms].flatten() / tangents.norm(dim=1)
        assert along.abs().max() < 1e-3 * field.norm()


def test_the_refinement_of_other_particles_is_refused(mismatched):
    model, particles, refinement = mismatched
    with pytest.raises(ValueError, match="expected the refinement of .* try refine"):
        correct_reference(model, particles[:10], refinement)
    with pytest.raises(ValueError, match="expected the refinement of .* try refine"):
        correct_reference(model, particles, replace(refinement, latents=refinement.latents[:, :3]))
