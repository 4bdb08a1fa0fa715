"""Quick answers under a known population: as good as a refinement's where few directions matter."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.inference import estimate, leading, passes, refine, refinement, score
from cryochains.inference.run import Run
from cryochains.model import (
    Dynamics,
    Model,
    Population,
    elastic_variance,
    load_population,
    simulate_particles,
)
from cryochains.molecule import compute_modes, load_structure, match_structures, morph, superpose

QUIET = {"progress": False}
N = 80


@pytest.fixture(scope="module")
def closed():
    return load_structure("glua3-closed")


@pytest.fixture(scope="module")
def path(closed):
    one, other = match_structures(closed, load_structure("glua3-open"))
    return morph(one, superpose(other, one), 20)


def particles_of(closed, path, seed, snr_db=0.0, n=N):
    one, _ = match_structures(closed, load_structure("glua3-open"))
    return simulate_particles(
        one, n, conformations=path, box_size=48, snr_db=snr_db, seed=seed, **QUIET
    )


@pytest.fixture(scope="module")
def known(closed, path):
    """A model, a population that others taught it, and particles that it has not seen."""
    one, _ = match_structures(closed, load_structure("glua3-open"))
    teachers = particles_of(closed, path, 1, n=200)
    model = Model(one, teachers, modes=10)
    population = refine(model, teachers, check=False, **QUIET).population
    return model, population, particles_of(closed, path, 2)


@pytest.fixture(scope="module")
def estimated(known):
    model, population, particles = known
    return estimate(model, particles, population, **QUIET)


@pytest.fixture(scope="module")
def refined(known):
    model, population, particles = known
    return refine(model, particles, population, blurs=(8.0, 4.0, 2.0, 0.0, 0.0), **QUIET)


def test_it_is_as_near_to_the_truth_as_a_refinement(estimated, refined):
    assert score(refined).explained_motion > 0.8
    assert score(estimated).explained_motion > score(refined).explained_motion - 0.01
    assert estimated.kind == "estimated"
    assert estimated.ids.tolist() == refined.ids.tolist()


def test_error_bars_are_those_of_a_refinement(estimated, refined):
    ratio = estimated.std / refined.std
    assert 0.9 < ratio.median() < 1.2
    off = ((estimated.latents - refined.latents) / refined.std).abs()
    assert off.median() < 0.5


def test_its_verdict_speaks_of_all_but_convergence(estimated):
    names = [finding.name for finding in estimated.verdict.findings]
    assert "convergence" not in names and "junk" in names
    assert estimated.verdict.grade == "good"
    assert "estimated" in repr(estimated)


def test_a_refinement_that_begins_with_it_ends_where_it_did_before(known, refined):
    model, population, particles = known
    begun = refine(model, particles, population, **QUIET)
    assert len(begun.history) < len(refined.history)
    off = ((begun.latents - refined.latents) / refined.std).abs()
    assert off.quantile(0.95) < 0.05
    torch.testing.assert_close(begun.std, refined.std, rtol=0.02, atol=0)


def test_a_refinement_that_begins_with_it_resumes_exactly(known, tmp_path, monkeypatch):
    model, population, particles = known
    particles = particles[:12]
    whole = refine(model, particles, population, **QUIET)
    save = passes.save_state

    def cut(run, *arguments):
        save(run, *arguments)
        if run.folder is not None:
            raise KeyboardInterrupt

    checkpoint = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(passes, "save_state", cut)
        refine(model, particles, population, checkpoint=checkpoint, **QUIET)
    # What it began with is not asked for again.
    monkeypatch.setattr(refinement, "quick_state", None)
    resumed = refine(model, particles, population, checkpoint=checkpoint, **QUIET)
    assert torch.equal(resumed.latents, whole.latents)
    assert torch.equal(resumed.std, whole.std)


def test_blocks_beyond_the_first_begin_with_it_and_teach(known, path, closed, monkeypatch):
    model, population, _ = known
    particles = particles_of(closed, path, 1, n=200)
    original, wide = refinement.quick_state, []

    def quick_state(run, *arguments):
        wide.append(float(run.taught.wide_covariance.trace()))
        return original(run, *arguments)

    monkeypatch.setattr(refinement, "quick_state", quick_state)
    result = refine(model, particles, n_population=100, check=False, **QUIET)
    # What EM goes on from is wider than the population that a block was given.
    assert len(wide) == 1 and wide[0] > float(result.population.covariance.trace())
    assert score(result).explained_motion > 0.8
    ratio = result.population.covariance.trace() / population.covariance.trace()
    assert float(ratio) == pytest.approx(1.0, abs=0.15)


@pytest.mark.parametrize("snr_db", [-10.0, -20.0])
def test_noisy_particles_too(known, path, closed, snr_db):
    model, population, _ = known
    particles = particles_of(closed, path, 3, snr_db, n=150)
    noisy = replace(population, noise_std=particles.truth.noise_std, noise_spectrum=None)
    quick = score(estimate(model, particles, noisy, **QUIET)).explained_motion
    slow = score(refine(model, particles, noisy, **QUIET)).explained_motion
    assert quick > slow - 0.02
    assert quick > 0.2


def test_a_population_that_moves_in_many_directions_is_looked_at_in_all(closed):
    dynamics = Dynamics(closed, compute_modes(closed, 5))
    variance = elastic_variance(dynamics)
    draws = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(4))
    particles = simulate_particles(
        closed,
        N,
        dynamics=dynamics,
        latents=0.5 * variance.sqrt() * draws,
        box_size=48,
        snr_db=0.0,
        seed=4,
        **QUIET,
    )
    model = Model(closed, particles, modes=5)
    known = Population(
        torch.zeros(model.n_latents, dtype=torch.float64),
        (0.25 * variance).diag(),
        particles.truth.noise_std,
        1.0,
        model.fingerprint,
    )
    run = Run(model, particles, None, None, known, (0.0,), 64, None)
    directions, variances = leading.told_directions(run, known)
    assert not leading.are_few(directions)
    # Independent, and one unit of each is 1 Å.
    share = model.atom_share.double()
    unit = directions.T @ (share[:, None] * directions)
    torch.testing.assert_close(unit, torch.eye(len(unit), dtype=torch.float64))
    quick = score(estimate(model, particles, known, **QUIET)).explained_motion
    assert quick > 0.85 * score(refine(model, particles, known, **QUIET)).explained_motion > 0.4


def test_blocks_and_batches_make_no_difference(known, estimated, monkeypatch):
    model, population, particles = known
    monkeypatch.setattr(refinement, "_ESTIMATED_BLOCK", 30)
    small = estimate(model, particles, population, batch_size=7, **QUIET)
    off = ((small.latents - estimated.latents) / estimated.std).abs()
    assert off.max() < 0.01


def test_junk_and_broken_images_are_told(known, estimated):
    model, population, particles = known
    images = particles.read_images()
    generator = torch.Generator().manual_seed(5)
    images[3] = images[3].std() * torch.randn(48, 48, generator=generator)
    images[5, 0, 0] = torch.nan
    spoiled = replace(particles, images=images)
    with pytest.warns(UserWarning, match="1 of 80 images are left out"):
        result = estimate(model, spoiled, population, **QUIET)
    assert result.responsibility[3] < 0.5
    torch.testing.assert_close(result.latents[5], population.mean.float())
    others = np.setdiff1d(np.arange(N), [3, 5])
    torch.testing.assert_close(result.latents[others], estimated.latents[others], rtol=0, atol=1e-2)


def test_a_population_of_another_model_is_refused(known):
    model, _, particles = known
    with pytest.raises(ValueError, match="expected a population of"):
        estimate(model, particles, load_population("glua3"), **QUIET)
