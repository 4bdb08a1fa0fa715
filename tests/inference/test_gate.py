"""Variation that follows the viewing direction: what is damped, what is not, and what it is for."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.inference import expectation, refine, score
from cryochains.inference.gate import damp_following, view_features
from cryochains.model import Model, simulate_particles
from cryochains.molecule import load_structure

QUIET = {"progress": False}
N = 2000


@pytest.fixture(scope="module")
def rotations() -> torch.Tensor:
    return torch.from_numpy(Rotation.random(N, random_state=0).as_matrix())


def test_features_are_those_of_the_projection(rotations):
    """Neither a turn of the image nor the view from behind, mirrored, changes them."""
    features = view_features(rotations)
    assert features.shape == (N, 15)
    torch.testing.assert_close(features.T @ features, torch.eye(15).double())
    turned = torch.from_numpy(Rotation.from_euler("z", 40, degrees=True).as_matrix()) @ rotations
    behind = torch.from_numpy(Rotation.from_euler("x", 180, degrees=True).as_matrix()) @ rotations
    torch.testing.assert_close(view_features(turned), features)
    torch.testing.assert_close(view_features(behind), features)
    squares = rotations[:, 2].square()
    assert torch.allclose(features @ (features.T @ squares), squares)


def test_too_few_particles_or_views_say_nothing(rotations):
    assert view_features(rotations[:100]) is None
    one_side = Rotation.from_rotvec(np.linspace(0, 6, N)[:, None] * [0.0, 0.0, 1.0]).as_matrix()
    assert view_features(torch.from_numpy(one_side)) is None
    around = Rotation.from_rotvec(np.linspace(0, 6, N)[:, None] * [1.0, 0.0, 0.0]).as_matrix()
    assert view_features(torch.from_numpy(around)) is None


def test_what_does_not_follow_the_view_is_kept(rotations):
    """Latents that are independent of it, whatever their spread, in nearly every direction."""
    draws = torch.randn(N, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    off = draws * torch.linspace(0.2, 3, 40)
    scatter = off.T @ off
    damped = damp_following(scatter, off, torch.ones(N), view_features(rotations))
    assert float(damped.trace() / scatter.trace()) > 0.99


def test_what_follows_the_view_is_damped_but_for_the_leading_motion(rotations):
    x, y, z = rotations[:, 2].unbind(1)
    noise = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    off = torch.stack([5 * (x**2 - 1 / 3), 2 * y * z, 0.2 * noise[:, 0]], dim=1)
    off = off + 0.02 * noise
    off = off - off.mean(0)
    scatter = off.T @ off
    damped = damp_following(scatter, off, torch.ones(N), view_features(rotations))
    share = (damped.diagonal() / scatter.diagonal()).tolist()
    assert share[0] == pytest.approx(1, abs=0.02)
    assert share[1] < 0.05
    assert share[2] > 0.9


def test_particles_that_show_nothing_do_not_count(rotations):
    """Weights of 0 take a particle out of the regression."""
    x, y, _ = rotations[:, 2].unbind(1)
    generator = torch.Generator().manual_seed(3)
    off = torch.randn(N, 2, dtype=torch.float64, generator=generator) * torch.tensor([3.0, 1.0])
    junk = torch.arange(N) % 4 == 0
    off[junk, 1] = 4 * (x * y)[junk]
    shown = (~junk).double()
    scatter = (shown[:, None] * off).T @ off
    damped = damp_following(scatter, off, shown, view_features(rotations))
    assert float(damped[1, 1] / scatter[1, 1]) > 0.9


def test_chains_that_cannot_bend_end_nearer_to_the_truth(monkeypatch):
    """Rigid chains stand in for bent ones by turning, differently in each view."""
    closed = load_structure("glua3-closed")
    bends = Model(closed, modes=5, rotation=False, translation=False, box_size=32, pixel_size=5.0)
    latents = torch.randn(400, bends.n_latents, generator=torch.Generator().manual_seed(4)) + 2.0
    particles = simulate_particles(
        closed, 400, dynamics=bends.dynamics, latents=latents, box_size=32, seed=4, **QUIET
    )
    model = Model(closed, particles, modes=None)
    gated = score(refine(model, particles, **QUIET))
    monkeypatch.setattr(expectation, "view_features", lambda rotations: None)
    free = score(refine(model, particles, **QUIET))
    assert gated.rmsd < 0.98 * free.rmsd
