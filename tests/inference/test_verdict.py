"""Nonsense is told from a refinement without a truth, and what is not to be trusted not described.

Limits were chosen on seeds 0 to 2 of the simulation; these are others.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.analysis import compute_pca, motion_sentence
from cryochains.inference import Finding, Result, Verdict, load_result, refine
from cryochains.model import Model, simulate_particles
from cryochains.molecule import morph

SEEDS = (11, 12)
N = 80


def simulate(closed, opened, seed, mirrored=False, n=N):
    """Particles between the two states, or of their mirror images through z about the origin."""
    conformations = morph(closed, opened, 20)
    if mirrored:
        conformations = conformations.copy()
        conformations[..., 2] = 2 * closed.origin[2] - conformations[..., 2]
    return simulate_particles(
        closed,
        n,
        conformations=conformations,
        box_size=32,
        snr_db=0.0,
        seed=seed,
        progress=False,
    )


def refined(closed, particles) -> Result:
    return refine(Model(closed, particles, modes=2), particles, check=False, progress=False)


def with_rotations(particles, rotations):
    return replace(particles, rotations=rotations, truth=None)


@pytest.fixture(scope="module", params=SEEDS)
def seed(request):
    return request.param


@pytest.fixture(scope="module")
def particles(closed, opened, seed):
    return simulate(closed, opened, seed)


@pytest.fixture(scope="module")
def good(closed, particles):
    return refined(closed, particles)


def test_a_good_run_is_good(good, tmp_path):
    verdict = good.verdict
    assert verdict.grade == "good" and verdict.trusted and verdict.reasons == ""
    assert all(part.remedy == "" for part in verdict.findings)
    words = motion_sentence(compute_pca(good))
    assert "relative to" in words and "doubtful" not in words and "not described" not in words
    assert "trusted" not in repr(good)
    # A file and other frames say the same.
    good.save(tmp_path / "result.safetensors")
    assert repr(load_result(tmp_path / "result.safetensors").verdict) == repr(verdict)
    assert good.in_frame().verdict.grade == "good"


def require_nonsense(result):
    verdict = result.verdict
    assert verdict.grade == "not to be trusted" and not verdict.trusted, repr(verdict)
    worst = [part for part in verdict.findings if part.grade == verdict.grade]
    assert worst and all(part.sentence in verdict.reasons and part.remedy for part in worst)
    assert "not to be trusted" in repr(result)
    words = motion_sentence(compute_pca(result))
    assert "not described" in words and verdict.reasons in words
    assert "relative to" not in words


def test_poses_of_other_particles_are_not_trusted(closed, particles):
    require_nonsense(refined(closed, with_rotations(particles, particles.rotations.roll(1, 0))))


def test_transposed_rotations_are_not_trusted(closed, particles):
    require_nonsense(refined(closed, with_rotations(particles, particles.rotations.mT)))


def test_the_other_hand_is_not_trusted(closed, opened, seed):
    require_nonsense(refined(closed, simulate(closed, opened, seed, mirrored=True)))


def test_pure_noise_is_refused(closed, particles, seed):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, 32, 32, generator=generator)
    nothing = replace(particles, images=noise, truth=None)
    with pytest.raises(ValueError, match="got 80 that look like noise to it"):
        refined(closed, nothing)


def test_results_that_were_not_refined_have_no_verdict(good):
    assert replace(good, history=[]).verdict is None
    assert replace(good, population=None, history=[]).verdict is None
    # Of an older program, whose records hold less.
    older = [{k: v for k, v in r.items() if k != "support"} for r in good.history]
    assert replace(good, history=older).verdict is None


@pytest.mark.parametrize(
    "name, numbers",
    [
        ("convergence", {"step": (0.05, 0.2, 0.5)}),
        ("support", {"support": (50.0, 2.0, -1.0)}),
        ("detail", {"fading": (0.0, 3.0, 6.0)}),
        ("dimming", {"contrast": (1.0, 0.7, 0.3)}),
    ],
)
def test_each_number_of_the_history_counts(good, name, numbers):
    """And what is worst of all is the grade."""
    ((key, values),) = numbers.items()
    for value, grade in zip(values, ("good", "doubtful", "not to be trusted"), strict=True):
        first = {**good.history[0], "contrast": 1.0}
        last = {**good.history[-1], "contrast": 1.0, key: value}
        verdict = replace(good, history=[first, last]).verdict
        (part,) = (part for part in verdict.findings if part.name == name)
        assert part.grade == verdict.grade == grade
        assert part.value == pytest.approx(value)
        assert (part.sentence in verdict.reasons) == bool(part.remedy) == (grade != "good")


def test_the_share_of_junk_counts(good):
    for share, grade in ((0.2, "good"), (0.5, "doubtful"), (0.95, "not to be trusted")):
        responsibility = torch.from_numpy((np.arange(N) >= share * N).astype(np.float32))
        verdict = replace(good, responsibility=responsibility).verdict
        (part,) = (part for part in verdict.findings if part.name == "junk")
        assert part.grade == grade and part.value == pytest.approx(share)
        assert f"{100 * share:.0f} % of the particles do not show" in part.sentence


def test_the_spread_of_conformations_counts_and_that_of_poses_does_not(good):
    """What all chains share is an error of the poses, and junk has no conformation."""
    wide = replace(good, latents=8 * good.latents).verdict
    (part,) = (part for part in wide.findings if part.name == "spread")
    assert part.grade == "not to be trusted"
    shifted = good.latents.clone()
    for layout in good.model.dynamics.chains:
        shifted[:, layout.translation] += 50 * torch.linspace(-1, 1, N)[:, None]
    assert replace(good, latents=shifted).verdict.grade == "good"
    some = good.latents.clone()
    some[:20] *= 50
    responsibility = torch.ones(N)
    responsibility[:20] = 0
    assert replace(good, latents=some, responsibility=responsibility).verdict.grade == "good"


def test_what_could_not_be_measured_is_no_reason(good):
    last = {**good.history[-1], "fading": math.nan}
    assert replace(good, history=[*good.history[:-1], last]).verdict.grade == "good"


def test_grades_and_reasons_of_findings():
    good = Finding("a", 1.0, "good", "all is well")
    doubtful = Finding("b", 2.0, "doubtful", "this is odd", "try another")
    bad = Finding("c", 3.0, "not to be trusted", "that is wrong", "check it")
    assert Verdict(()).grade == Verdict((good,)).grade == "good"
    one = Verdict((good, doubtful, good))
    assert one.grade == "doubtful" and one.trusted and one.reasons == "this is odd"
    both = Verdict((doubtful, bad, bad))
    assert both.grade == "not to be trusted" and not both.trusted
    assert both.reasons == "that is wrong; that is wrong"
    assert repr(one).splitlines()[2].split() == "doubtful this is odd; try another".split()
