"""Posterior means of particles that are hardly known: against all of a fine grid."""

import numpy as np
import pytest
import torch

from cryochains.inference import averaging, information_limit, refine, restarts, score
from cryochains.inference.averaging import average_along_line, is_wide, with_error_bars
from cryochains.inference.likelihood import image_powers, normal_equations
from cryochains.inference.posterior import latent_prior
from cryochains.model import Model, simulate_particles
from cryochains.molecule import load_structure

QUIET = {"progress": False}
N = 40
SPREAD = torch.tensor([5.0, 1.5])
GRID = 31


@pytest.fixture(scope="module")
def noisy():
    """A model of one mode a chain, and particles of which images tell little."""
    closed = load_structure("glua3-closed")
    settings = {"modes": 1, "rotation": False, "translation": False}
    drawn = Model(closed, box_size=32, pixel_size=5.0, **settings)
    latents = SPREAD * torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    particles = simulate_particles(
        closed,
        N,
        dynamics=drawn.dynamics,
        latents=latents,
        box_size=32,
        snr_db=-22.0,
        seed=0,
        **QUIET,
    )
    return Model(closed, particles, **settings), particles


def log_posterior(model, batch, noise: float, latents: torch.Tensor) -> torch.Tensor:
    """(b,) at latents (b, 2)."""
    powers = image_powers(model, batch.images, batch.pose, latents)
    residual = powers[:, 0] - 2 * powers[:, 1] + powers[:, 2]
    return -residual / (2 * noise) - (latents / SPREAD).double().square().sum(1) / 2


def test_powers_are_those_of_the_equations(noisy):
    model, particles = noisy
    batch = next(iter(particles.batches(20)))
    z = torch.linspace(-3, 3, 40).view(20, 2)
    spectrum = torch.linspace(0.5, 2, 17)
    for blur in (0.0, 4.0):
        settings = {"noise_spectrum": spectrum, "blur": blur}
        equations = normal_equations(model, batch.images, batch.pose, z, **settings)
        rings = (equations.data_power, equations.overlap, equations.model_power)
        expected = torch.stack([ring.double().sum(1) for ring in rings], dim=1)
        powers = image_powers(model, batch.images, batch.pose, z, **settings)
        torch.testing.assert_close(powers, expected, rtol=1e-4, atol=1e-3)


def test_means_and_spreads_are_nearer_to_those_of_a_grid(noisy):
    """Of all conformations on a grid of ±4 standard deviations of the prior."""
    model, particles = noisy
    batch = next(iter(particles.batches(N)))
    noise = particles.truth.noise_std**2
    axis = torch.linspace(-4, 4, GRID)
    points = torch.cartesian_prod(axis, axis) * SPREAD
    logs = [log_posterior(model, batch, noise, point.expand(N, 2)) for point in points]
    weights = torch.softmax(torch.stack(logs, dim=1), dim=1)
    exact = weights @ points.double()
    spread = (weights @ points.double().square() - exact.square()).sqrt()
    best = points[weights.argmax(1)]
    covariance = SPREAD.double().square().diag()
    # Brightness is known here.
    prior = latent_prior(torch.zeros(2, dtype=torch.float64), covariance, 0.0, 1e-4)
    equations = normal_equations(model, batch.images, batch.pose, best)
    linear = torch.linalg.inv(equations.hessian.double() / noise + prior.precision)

    def residual_at(latents):
        powers = image_powers(model, batch.images, batch.pose, latents)
        return (powers[:, 0] - 2 * powers[:, 1] + powers[:, 2]) / noise

    means, std = average_along_line(best, linear, prior, residual_at)
    off = (means - exact).square().sum().sqrt()
    assert off < 0.6 * (best - exact).square().sum().sqrt()
    error = linear.diagonal(dim1=1, dim2=2).sqrt()
    assert (std - spread).square().sum() < 0.8 * (error - spread).square().sum()


def test_covariances_have_the_error_bars_along_the_least_certain_direction():
    generator = torch.Generator().manual_seed(5)
    factor = torch.randn(4, 6, 6, dtype=torch.float64, generator=generator)
    covariance = factor @ factor.mT
    variances, directions = torch.linalg.eigh(covariance)
    line = directions[:, :, -1]
    wider = covariance + 3 * line[:, :, None] * line[:, None, :]
    std = wider.diagonal(dim1=1, dim2=2).sqrt()
    torch.testing.assert_close(with_error_bars(covariance, std), wider)
    # However small the error bars are, a covariance stays one.
    least = torch.linalg.eigvalsh(with_error_bars(covariance, 1e-6 * std)).min()
    assert least > 0


def test_particles_that_are_well_known_stay(noisy, monkeypatch):
    """None of their images is looked at again."""
    model, particles = noisy
    std = torch.tensor([[0.1, 0.1], [3.0, 3.0]])
    assert is_wide(model, std).tolist() == [False, True]
    clear = simulate_particles(
        model.structure,
        20,
        dynamics=model.dynamics,
        latents=torch.randn(20, 2, generator=torch.Generator().manual_seed(1)),
        box_size=32,
        snr_db=10.0,
        **QUIET,
    )
    monkeypatch.setattr(restarts, "average_along_line", None)
    settings = {"modes": 1, "rotation": False, "translation": False}
    refine(Model(model.structure, clear, **settings), clear, **QUIET)


def test_noisy_particles_end_nearer_to_the_limit(noisy, monkeypatch):
    model, particles = noisy
    averaged = refine(model, particles, check=False, **QUIET)
    monkeypatch.setattr(averaging, "_WIDE", np.inf)
    likeliest = refine(model, particles, check=False, **QUIET)
    assert not torch.equal(averaged.latents, likeliest.latents)
    assert score(averaged).rmsd < score(likeliest).rmsd
    assert score(averaged).rmsd > 0.9 * np.sqrt((information_limit(model, particles) ** 2).mean())
