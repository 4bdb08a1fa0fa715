"""Scores: what zero and one mean, and a limit that behaves as information does."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import cryochains.inference.scores
from cryochains.images import ParticleStack
from cryochains.inference import (
    Result,
    Scores,
    correlation,
    information_limit,
    rmsd,
    score,
    true_latents,
    true_population,
)
from cryochains.model import (
    Dynamics,
    Model,
    frame_jacobian,
    in_frame,
    rotvec_to_matrix,
    simulate_particles,
    superposed,
)
from cryochains.molecule import compute_modes, morph

N = 40


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, 3))


@pytest.fixture(scope="module")
def particles(closed, dynamics):
    """Well specified: their true conformations are the model's own."""
    latents = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    return simulate(closed, dynamics, latents)


def simulate(structure, dynamics, latents, box_size=32):
    return simulate_particles(
        structure,
        len(latents),
        dynamics=dynamics,
        latents=latents,
        box_size=box_size,
        snr_db=0.0,
        seed=1,
        progress=False,
    )


@pytest.fixture(scope="module")
def model(closed, particles):
    return Model(closed, particles, modes=3)


@pytest.fixture(scope="module")
def morphing(closed, opened):
    """Not well specified: a morph between two real conformations."""
    path = morph(closed, opened, 7)
    return simulate_particles(closed, N, conformations=path, box_size=32, seed=1, progress=False)


def with_noise(particles, factor):
    truth = particles.truth
    return replace(particles, truth=replace(truth, noise_std=factor * truth.noise_std))


def score_latents(model, latents, particles, frame=None) -> Scores:
    return score(Result(model, latents, particles=particles), frame=frame)


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
    sentence = r"expected coordinates of one shape, got \(5, 30, 3\) and \(4, 30, 3\)"
    with pytest.raises(ValueError, match=sentence):
        rmsd(coords, coords[:4])


# Explained motion


def test_truth_scores_one(model, particles):
    scores = score_latents(model, particles.truth.latents, particles)
    assert scores.explained_motion == pytest.approx(1.0, abs=1e-9)
    assert scores.rmsd == pytest.approx(0.0, abs=1e-5)
    assert scores.mean_rmsd > 1.0


def test_mean_conformation_scores_zero(closed):
    """Shifts alone, so that the mean conformation is one that latents can express."""
    dynamics = Dynamics(closed, rotation=False)
    latents = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
    particles = simulate(closed, dynamics, latents)
    model = Model(closed, particles, modes=None, rotation=False)
    scores = score_latents(model, latents.mean(0).expand(N, -1), particles)
    assert scores.explained_motion == pytest.approx(0.0, abs=1e-4)
    assert scores.rmsd == pytest.approx(scores.mean_rmsd, rel=1e-4)
    # The wrong way is worse than the mean; half the error is a quarter of its square.
    assert score_latents(model, -latents, particles).explained_motion < -1
    shrunk = score_latents(model, 0.5 * (latents + latents.mean(0)), particles)
    assert shrunk.explained_motion == pytest.approx(0.75, abs=1e-3)


@pytest.mark.parametrize("frame", ["molecule", "poses"])
def test_scores_agree_with_each_other(model, dynamics, particles, frame):
    latents = particles.truth.latents + 0.3 * torch.randn(N, dynamics.n_latents)
    scores = score_latents(model, latents, particles, frame)
    assert scores.explained_motion == pytest.approx(1 - (scores.rmsd / scores.mean_rmsd) ** 2)
    assert scores.rmsd == pytest.approx(pooled(scores.rmsd_per_particle))
    assert scores.mean_rmsd == pytest.approx(pooled(scores.mean_rmsd_per_particle))
    coords, truth = dynamics.decode(latents), dynamics.decode(particles.truth.latents)
    if frame == "molecule":
        coords, truth = superposed(dynamics, coords), superposed(dynamics, truth)
    expected = rmsd(coords, truth)
    np.testing.assert_allclose(scores.rmsd_per_particle, expected, rtol=1e-4)
    assert f"{scores.rmsd:.2f} Å" in repr(scores) and "explained motion" in repr(scores)
    assert scores.frame == frame and f"frame of the {frame}" in repr(scores)


def test_a_pose_is_no_error_in_the_frame_of_the_molecule(model, dynamics, particles):
    """Conformations that are right and stand at a wrong pose, each at another."""
    generator = torch.Generator().manual_seed(0)
    turns = rotvec_to_matrix(0.05 * torch.randn(N, 3, generator=generator, dtype=torch.float64))
    shifts = 2 * torch.randn(N, 1, 3, generator=generator, dtype=torch.float64)
    coords = dynamics.decode(particles.truth.latents.double())
    result = Result(model, dynamics.fit(coords @ turns.mT + shifts), particles=particles)
    right = score(result)
    assert right.frame == "molecule" and right.rmsd < 0.01 and right.explained_motion > 0.999
    wrong = score(result, frame="poses")
    assert wrong.frame == "poses" and wrong.rmsd > 3 and wrong.explained_motion < 0
    # The same in whichever frame the result is.
    for other in (result.in_frame(), result.in_frame("A")):
        assert score(other).rmsd == right.rmsd
        assert score(other, frame="poses").rmsd == wrong.rmsd


def test_models_of_one_frame_are_scored_in_it(closed, particles):
    model = Model(closed, particles, modes=3, rotation=False)
    result = Result(model, torch.zeros(N, model.n_latents), particles=particles)
    assert score(result).frame == "poses"
    # Coordinates can be superposed all the same, which compares it with other models.
    whole = Model(closed, particles, modes=3)
    still = score_latents(whole, torch.zeros(N, whole.n_latents), particles)
    assert score(result, frame="molecule").rmsd == pytest.approx(still.rmsd)
    with pytest.raises(ValueError, match="expected a model whose chains turn and shift"):
        information_limit(model, particles, frame="molecule")


def test_chains_are_no_frame_to_score_in(model, particles):
    latents = particles.truth.latents
    sentence = "expected the frame 'molecule' or 'poses', got 'A'; try 'molecule'"
    with pytest.raises(ValueError, match=sentence):
        score_latents(model, latents, particles, "A")
    with pytest.raises(ValueError, match=sentence):
        information_limit(model, particles, frame="A")


def test_scores_follow_the_rows(model, particles):
    latents = particles.truth.latents.clone()
    latents[7] += 1.0
    order = [12, 7, 3]
    scores = score_latents(model, latents[order], particles[order])
    assert (scores.rmsd_per_particle > 0.1).tolist() == [False, True, False]
    same = score(Result(model, latents, particles=particles)[order])
    np.testing.assert_array_equal(same.rmsd_per_particle, scores.rmsd_per_particle)


def test_particles_in_another_order_are_refused(model, particles):
    """Once they were scored against others' truth without a word."""
    order = np.random.default_rng(0).permutation(N)
    with pytest.raises(ValueError, match="the same ones in another order: row .* instead of"):
        Result(model, particles.truth.latents, particles=particles[order], ids=particles.ids)


def test_blocks_change_nothing(model, particles, monkeypatch):
    latents = torch.zeros(N, model.n_latents)
    whole = score_latents(model, latents, particles)
    monkeypatch.setattr(cryochains.inference.scores, "CONFORMATIONS_AT_A_TIME", 7)
    parts = score_latents(model, latents, particles)
    np.testing.assert_allclose(parts.rmsd_per_particle, whole.rmsd_per_particle, rtol=1e-6)
    assert parts.explained_motion == pytest.approx(whole.explained_motion, rel=1e-5)
    fitted, _ = true_latents(model, particles)
    torch.testing.assert_close(fitted, particles.truth.latents, rtol=0, atol=1e-3)


def test_without_motion_there_is_none_to_explain(closed):
    still = simulate_particles(
        closed, 5, conformations=closed.coords[None], box_size=32, progress=False
    )
    model = Model(closed, still, modes=3)
    scores = score_latents(model, torch.zeros(5, model.n_latents), still)
    assert np.isnan(scores.explained_motion) and scores.rmsd < 1e-3


def test_the_first_component_is_compared_with_the_true_coordinate(closed, morphing, particles):
    """By rank and without sign; None without motions, or where latents made the conformations."""

    class Components:
        def __init__(self, scores):
            self.scores = scores

        def transform(self, other):
            return self.scores[: len(other)]

    model = Model(closed, morphing, modes=3)
    latents, _ = true_latents(model, morphing)
    result = Result(model, latents, particles=morphing)
    coordinate = morphing.truth.coordinate.numpy()
    noise = np.random.default_rng(0).normal(size=N)
    components = Components(np.stack([-(coordinate**3), noise], 1))
    assert score(result, components).spearman == pytest.approx(1.0)
    assert "|Spearman| of PC1 1.000" in repr(score(result, components))
    assert score(result).spearman is None and "Spearman" not in repr(score(result))
    of_latents = Result(Model(closed, particles, modes=3), latents, particles=particles)
    assert score(of_latents, components).spearman is None


def test_bad_input(dynamics, model, particles):
    real = ParticleStack(
        particles.read_images(), particles.rotations, pixel_size=particles.pixel_size
    )
    latents = torch.zeros(N, dynamics.n_latents)
    for unknown in (
        lambda: score_latents(model, latents, real),
        lambda: true_latents(model, real),
        lambda: true_population(model, real),
        lambda: information_limit(model, real),
    ):
        with pytest.raises(ValueError, match="expected simulated particles, whose truth is known"):
            unknown()
    with pytest.raises(ValueError, match="expected 3 particles, one a row of latents, got 40; try"):
        score_latents(model, latents[:3], particles)
    with pytest.raises(ValueError, match="expected a result with its particles, got .* without; t"):
        score(Result(model, latents))


# Correlation


def test_correlation_is_of_ranks_without_sign():
    rng = np.random.default_rng(0)
    x = rng.normal(size=300)
    assert correlation(x, np.exp(x)) == pytest.approx(1.0)
    assert correlation(torch.from_numpy(x), -(x**3)) == pytest.approx(1.0)
    assert correlation(x, rng.normal(size=300)) < 0.2
    assert 0.5 < correlation(x, x + rng.normal(size=300)) < 0.9


# Truth and floor


def test_floor_is_zero_when_well_specified(model, particles):
    latents, floor = true_latents(model, particles)
    torch.testing.assert_close(latents, particles.truth.latents, rtol=0, atol=1e-3)
    assert floor.max() < 1e-3


def test_floor_is_what_no_latent_expresses(closed, model, morphing):
    latents, floor = true_latents(model, morphing)
    truth = morphing.truth.coords()
    torch.testing.assert_close(rmsd(model.decode(latents), truth), floor, rtol=1e-4, atol=1e-4)
    frames = morphing.truth.frame
    assert floor[frames == 0].max() < 1e-3, "the first frame is the reference"
    assert 0.3 < floor[frames == 6].min() < 1.5, "the last has bent by more"
    _, lower = true_latents(Model(closed, morphing, modes=20), morphing)
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
    assert population.fingerprint == model.fingerprint
    # A morph moves along one line: its covariance can be inverted all the same.
    assert torch.linalg.eigvalsh(true_population(model, morphing).covariance).min() > 0


# The limit


@pytest.mark.parametrize("frame", ["molecule", "poses"])
def test_limit_grows_with_noise_from_nothing_to_the_prior(model, dynamics, particles, frame):
    population = true_population(model, particles)
    limits = []
    for factor in (1e-3, 0.1, 1.0, 10.0, 1e4):
        noisy = replace(population, noise_std=factor * population.noise_std)
        limits.append(information_limit(model, particles, noisy, frame=frame))
        assert limits[-1].shape == (N,) and np.isfinite(limits[-1]).all()
    pairs = zip(limits[:-1], limits[1:], strict=True)
    assert all((less < more).all() for less, more in pairs)
    # Shifts along the beam stay hidden at any noise, so the first is small and not zero.
    assert pooled(limits[0]) < 0.8 * pooled(limits[2])
    latents = particles.truth.latents.double()
    covariance = population.covariance
    if frame == "molecule":
        jacobian = frame_jacobian(dynamics, latents).latents
        covariance = jacobian @ covariance @ jacobian.mT
        latents = in_frame(dynamics, latents).latents
    squares = (dynamics.gram(latents) * covariance).sum((1, 2)).numpy()
    prior = np.sqrt(squares / dynamics.structure.n_atoms)
    np.testing.assert_allclose(limits[-1], prior, rtol=1e-3)


def test_what_is_not_known_of_the_pose_does_not_count_in_the_molecule(model, particles):
    """The less is known, the more of it is pose: shifts of both chains along the beam, say."""
    limits = {
        frame: information_limit(model, particles, frame=frame) for frame in ("molecule", "poses")
    }
    assert (limits["molecule"] < limits["poses"]).all()
    np.testing.assert_array_equal(information_limit(model, particles), limits["molecule"])


def test_limit_is_zero_without_noise_for_what_is_seen(closed, particles):
    """Turns and bending are seen in all projections of this molecule; shifts along z are not."""
    dynamics = Dynamics(closed, compute_modes(closed, 2), translation=False)
    latents = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    seen = simulate(closed, dynamics, latents)
    model = Model(closed, seen, modes=2, translation=False)
    clear = replace(true_population(model, seen), noise_std=1e-6 * seen.truth.noise_std)
    assert information_limit(model, seen, clear, seen.truth.latents).max() < 1e-3


def test_noise_of_the_truth_is_the_default(model, particles):
    louder = information_limit(model, with_noise(particles, 3.0))
    assert (louder > information_limit(model, particles)).all()


def test_known_and_fitted_truth_give_one_limit(model, particles):
    known = information_limit(model, particles, latents=particles.truth.latents)
    np.testing.assert_allclose(information_limit(model, particles), known, rtol=1e-2)


def test_limit_stands_on_the_floor(closed, morphing):
    model = Model(closed, morphing, modes=3)
    floor = true_latents(model, morphing)[1].numpy()
    limit = information_limit(model, morphing)
    assert (limit >= floor).all()
    clear = information_limit(model, with_noise(morphing, 1e-3))
    assert (clear >= floor).all() and (clear <= limit + 1e-6).all()
    assert limit[morphing.truth.frame == 6].min() > 0.3


def test_brighter_images_hold_more(model, particles):
    population = true_population(model, particles)
    bright = information_limit(model, particles, replace(population, contrast=3.0))
    clearer = replace(population, noise_std=population.noise_std / 3)
    quiet = information_limit(model, particles, clearer)
    np.testing.assert_allclose(bright, quiet, rtol=1e-4)


def test_more_pixels_hold_more(closed, dynamics, particles):
    fine = simulate(closed, dynamics, particles.truth.latents, box_size=64)
    model = Model(closed, fine, modes=3)
    coarse = information_limit(Model(closed, particles, modes=3), particles)
    assert pooled(information_limit(model, fine)) < 0.9 * pooled(coarse)


def test_without_noise_there_is_no_limit(model, particles):
    with pytest.raises(
        ValueError, match="expected noisy particles, got none of noise.*; try a fin"
    ):
        information_limit(model, with_noise(particles, 0.0))
