"""Scores: what zero and one mean, and a limit that behaves as information does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cryochains.metrics
from cryochains.dynamics import Dynamics
from cryochains.matching import morph
from cryochains.metrics import correlation, information_limit, rmsd, score_motion, true_latents, true_population
from cryochains.model import CryoChains
from cryochains.modes import compute_modes
from cryochains.particles import ParticleStack
from cryochains.simulation import simulate_particles

N = 40


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, 3))


@pytest.fixture(scope="module")
def particles(closed, dynamics):
    """Well specified: their true conformations are the model's own."""
    latents = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    return simulate_particles(
        closed, N, dynamics=dynamics, latents=latents, box_size=32, snr_db=0.0, seed=1, progress=False
    )


@pytest.fixture(scope="module")
def model(closed, particles):
    return CryoChains.for_particles(closed, particles, modes=3, width=0.02)


@pytest.fixture(scope="module")
def morphing(closed, opened):
    """Not well specified: a morph between two real conformations."""
    path = morph(closed, opened, 7)
    return simulate_particles(closed, N, conformations=path, box_size=32, seed=1, progress=False)


def with_noise(particles, factor):
    return replace(particles, truth=replace(particles.truth, noise_std=factor * particles.truth.noise_std))


def pooled(values) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


# RMSD


def test_rmsd_does_not_superpose():
    coords = torch.randn(5, 30, 3, generator=torch.Generator().manual_seed(0))
    assert (rmsd(coords, coords) == 0).all()
    step = torch.tensor([3.0, 0.0, 4.0])
    torch.testing.assert_close(rmsd(coords + step, coords), torch.full((5,), 5.0))
    other = coords.clone()
    other[2, 7] += 30
    assert (rmsd(other, coords) > 0).tolist() == [False, False, True, False, False]
    with pytest.raises(ValueError, match=r"expected coordinates of one shape, got \(5, 30, 3\) and \(4, 30, 3\)"):
        rmsd(coords, coords[:4])


# Explained motion


def test_truth_scores_one(dynamics, particles):
    scores = score_motion(dynamics, particles.truth.latents, particles)
    assert scores.explained_motion == pytest.approx(1.0, abs=1e-9)
    assert scores.rmsd == pytest.approx(0.0, abs=1e-5)
    assert scores.mean_rmsd > 1.0


def test_mean_conformation_scores_zero(closed):
    """Shifts alone, so that the mean conformation is one that latents can express."""
    dynamics = Dynamics(closed, rotation=False)
    latents = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    particles = simulate_particles(closed, N, dynamics=dynamics, latents=latents, box_size=32, progress=False)
    scores = score_motion(dynamics, latents.mean(0).expand(N, -1), particles)
    assert scores.explained_motion == pytest.approx(0.0, abs=1e-4)
    assert scores.rmsd == pytest.approx(scores.mean_rmsd, rel=1e-4)
    assert score_motion(dynamics, -latents, particles).explained_motion < -1, "the wrong way is worse than the mean"
    shrunk = score_motion(dynamics, 0.5 * (latents + latents.mean(0)), particles)
    assert shrunk.explained_motion == pytest.approx(0.75, abs=1e-3), "half the error is a quarter of its square"


def test_scores_agree_with_each_other(dynamics, particles):
    latents = particles.truth.latents + 0.3 * torch.randn(N, dynamics.n_latents)
    scores = score_motion(dynamics, latents, particles)
    assert scores.explained_motion == pytest.approx(1 - (scores.rmsd / scores.mean_rmsd) ** 2)
    assert scores.rmsd == pytest.approx(pooled(scores.rmsd_per_particle))
    assert scores.mean_rmsd == pytest.approx(pooled(scores.mean_rmsd_per_particle))
    expected = rmsd(dynamics.decode(latents), dynamics.decode(particles.truth.latents))
    np.testing.assert_allclose(scores.rmsd_per_particle, expected, rtol=1e-4)
    assert f"{scores.rmsd:.2f} Å" in repr(scores) and "explained motion" in repr(scores)


def test_scores_follow_the_rows(dynamics, particles):
    latents = particles.truth.latents.clone()
    latents[7] += 1.0
    order = [12, 7, 3]
    scores = score_motion(dynamics, latents[order], particles[order])
    assert (scores.rmsd_per_particle > 0.1).tolist() == [False, True, False]


def test_chunks_change_nothing(dynamics, particles, monkeypatch):
    latents = torch.zeros(N, dynamics.n_latents)
    whole = score_motion(dynamics, latents, particles)
    monkeypatch.setattr(cryochains.metrics, "CHUNK", 7)
    parts = score_motion(dynamics, latents, particles)
    np.testing.assert_allclose(parts.rmsd_per_particle, whole.rmsd_per_particle, rtol=1e-6)
    assert parts.explained_motion == pytest.approx(whole.explained_motion, rel=1e-5)
    torch.testing.assert_close(true_latents(dynamics, particles)[0], particles.truth.latents, rtol=0, atol=1e-3)


def test_without_motion_there_is_none_to_explain(closed, dynamics):
    still = simulate_particles(closed, 5, conformations=closed.coords[None], box_size=32, progress=False)
    scores = score_motion(dynamics, torch.zeros(5, dynamics.n_latents), still)
    assert np.isnan(scores.explained_motion) and scores.rmsd < 1e-3


def test_bad_input(dynamics, model, particles):
    real = ParticleStack(particles.read_images(), particles.rotations, pixel_size=particles.pixel_size)
    for score in (
        lambda: score_motion(dynamics, torch.zeros(N, dynamics.n_latents), real),
        lambda: true_latents(dynamics, real),
        lambda: true_population(model, real),
        lambda: information_limit(model, real),
    ):
        with pytest.raises(ValueError, match="expected simulated particles, whose truth is known"):
            score()
    with pytest.raises(ValueError, match="expected one row of latents a particle.*, got 3"):
        score_motion(dynamics, torch.zeros(3, dynamics.n_latents), particles)


# Correlation


def test_correlation_is_of_ranks_without_sign():
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    assert correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert correlation(torch.from_numpy(x), -(x**3)) == pytest.approx(1.0)
    assert correlation(x, rng.normal(size=300)) < 0.2
    assert 0.5 < correlation(x, x + rng.normal(size=300)) < 0.9


# Truth and floor


def test_floor_is_zero_when_well_specified(dynamics, particles):
    latents, floor = true_latents(dynamics, particles)
    torch.testing.assert_close(latents, particles.truth.latents, rtol=0, atol=1e-3)
    assert floor.max() < 1e-3


def test_floor_is_what_no_latent_expresses(closed, dynamics, morphing):
    latents, floor = true_latents(dynamics, morphing)
    truth = morphing.truth.coords()
    torch.testing.assert_close(rmsd(dynamics.decode(latents), truth), floor, rtol=1e-4, atol=1e-4)
    frames = morphing.truth.frame
    assert floor[frames == 0].max() < 1e-3, "the first frame is the reference itself"
    assert 0.3 < floor[frames == 6].min() < 1.5, "the last has bent by more than three modes can say"
    _, lower = true_latents(Dynamics(closed, compute_modes(closed, 20)), morphing)
    assert (lower <= floor + 1e-4).all(), "more modes, a lower floor"
    for frame in range(7):
        same = latents[frames == frame]
        assert (same == same[:1]).all(), "particles of one conformation have one truth"


def test_true_population_is_that_of_the_latents(model, particles, morphing):
    population = true_population(model, particles)
    z = particles.truth.latents.double()
    torch.testing.assert_close(population.mean, z.mean(0), rtol=0, atol=1e-3)
    covariance = torch.cov(z.T, correction=0)
    torch.testing.assert_close(population.covariance, covariance, rtol=0, atol=1e-2)
    assert population.noise_std == particles.truth.noise_std
    assert population.contrast == 1.0
    assert population.structure_hash == model.structure.content_hash
    # A morph moves along one line: its covariance can be inverted all the same.
    assert torch.linalg.eigvalsh(true_population(model, morphing).covariance).min() > 0


# The limit


def test_limit_grows_with_noise_from_nothing_to_the_prior(model, dynamics, particles):
    population = true_population(model, particles)
    limits = []
    for factor in (1e-3, 0.1, 1.0, 10.0, 1e4):
        noisy = replace(population, noise_std=factor * population.noise_std)
        limits.append(information_limit(model, particles, noisy))
        assert limits[-1].shape == (N,) and np.isfinite(limits[-1]).all()
    assert all((less < more).all() for less, more in zip(limits[:-1], limits[1:], strict=True))
    # Shifts along the beam stay hidden at any noise, so the first is small and not zero.
    assert pooled(limits[0]) < 0.8 * pooled(limits[2])
    gram = dynamics.gram(particles.truth.latents).double()
    prior = np.sqrt((gram * population.covariance).sum((1, 2)).numpy() / dynamics.structure.n_atoms)
    np.testing.assert_allclose(limits[-1], prior, rtol=1e-3)


def test_limit_is_zero_without_noise_for_what_is_seen(closed, particles):
    """Turns and bending are seen in every projection of a molecule this shape; shifts along the beam are not."""
    dynamics = Dynamics(closed, compute_modes(closed, 2), translation=False)
    latents = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    seen = simulate_particles(closed, N, dynamics=dynamics, latents=latents, box_size=32, seed=1, progress=False)
    model = CryoChains.for_particles(closed, seen, modes=2, translation=False, width=0.02)
    clear = replace(true_population(model, seen), noise_std=1e-6 * seen.truth.noise_std)
    assert information_limit(model, seen, clear, seen.truth.latents).max() < 1e-3


def test_noise_of_the_truth_is_the_default(model, particles):
    louder = information_limit(model, with_noise(particles, 3.0))
    assert (louder > information_limit(model, particles)).all()


def test_known_and_fitted_truth_give_one_limit(model, particles):
    known = information_limit(model, particles, latents=particles.truth.latents)
    np.testing.assert_allclose(information_limit(model, particles), known, rtol=1e-2)


def test_limit_stands_on_the_floor(model, morphing):
    floor = true_latents(model.dynamics, morphing)[1].numpy()
    limit = information_limit(model, morphing)
    assert (limit >= floor).all()
    clear = information_limit(model, with_noise(morphing, 1e-3))
    assert (clear >= floor).all() and (clear <= limit + 1e-6).all()
    assert limit[morphing.truth.frame == 6].min() > 0.3


def test_brighter_images_hold_more(model, particles):
    population = true_population(model, particles)
    bright = information_limit(model, particles, replace(population, contrast=3.0))
    quiet = information_limit(model, particles, replace(population, noise_std=population.noise_std / 3))
    np.testing.assert_allclose(bright, quiet, rtol=1e-4)
    assert float(model.contrast) == 1.0, "the model is left as it was"


def test_more_pixels_hold_more(closed, dynamics, particles):
    fine = simulate_particles(
        closed, N, dynamics=dynamics, latents=particles.truth.latents, box_size=64, snr_db=0.0, seed=1, progress=False
    )
    model = CryoChains.for_particles(closed, fine, modes=3, width=0.02)
    coarse_model = CryoChains.for_particles(closed, particles, modes=3, width=0.02)
    assert pooled(information_limit(model, fine)) < 0.9 * pooled(information_limit(coarse_model, particles))
