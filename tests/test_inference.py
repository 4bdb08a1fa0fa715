"""The refinement: against the information limit where the answer is known, and as a tool that is cut and resumed."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import cryochains.inference
from cryochains.dynamics import Dynamics
from cryochains.inference import Refinement, posterior_covariance, refine
from cryochains.metrics import information_limit, rmsd, score_motion
from cryochains.model import CryoChains
from cryochains.modes import compute_modes
from cryochains.particles import ParticleStack
from cryochains.population import Population, elastic_variance
from cryochains.pretrained import load_pretrained
from cryochains.simulation import simulate_particles

BLURS = (6.0, 3.0, 0.0, 0.0)


def make_model(structure, particles, **settings) -> CryoChains:
    return CryoChains.for_particles(structure, particles, **{"modes": 2, "width": 0.02} | settings)


@pytest.fixture(scope="module")
def small(closed):
    """70 particles of moderate noise whose chains shift, turn and bend; 32 px."""
    dynamics = Dynamics(closed, compute_modes(closed, 2))
    generator = torch.Generator().manual_seed(0)
    latents = elastic_variance(dynamics).sqrt() * torch.randn(70, dynamics.n_latents, generator=generator)
    return simulate_particles(
        closed, 70, dynamics=dynamics, latents=latents, box_size=32, snr_db=3.0, shift_std=2.0, seed=2, progress=False
    )


@pytest.fixture(scope="module")
def refined(closed, small) -> Refinement:
    return refine(make_model(closed, small), small[:50], blurs=BLURS, progress=False)


def assert_same(a: Refinement, b: Refinement):
    for one, other in (
        (a.latents, b.latents),
        (a.std, b.std),
        (a.population.mean, b.population.mean),
        (a.population.covariance, b.population.covariance),
    ):
        assert torch.equal(one, other)
    assert a.population.noise_std == b.population.noise_std
    assert a.population.contrast == b.population.contrast
    assert a.ids.tolist() == b.ids.tolist()
    assert a.history == b.history


# Against the limit


@pytest.fixture(scope="session")
def well_specified(closed):
    """Reference = truth, Gaussian latents, 64 px at 0 dB: nothing but noise is in the way."""
    n_train, n_test = 1000, 200
    dynamics = Dynamics(closed, compute_modes(closed, 10))
    variance = 0.25 * elastic_variance(dynamics)
    generator = torch.Generator().manual_seed(3)
    draws = torch.randn(n_train + n_test, dynamics.n_latents, generator=generator, dtype=torch.float64)
    particles = simulate_particles(
        closed, n_train + n_test, dynamics=dynamics, latents=(draws * variance.sqrt()).float(), snr_db=0.0, seed=1,
        progress=False,
    )  # fmt: skip
    train, test = particles[:n_train], particles[n_train:]
    model = make_model(closed, particles, modes=10)
    truth = Population(
        torch.zeros(dynamics.n_latents, dtype=torch.float64), variance.diag(), particles.truth.noise_std, 1.0,
        closed.content_hash,
    )  # fmt: skip
    found = refine(model, train, progress=False)
    held_out = refine(model, test, found.population, progress=False)
    return model, truth, (train, found), (test, held_out)


def pooled(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("which", ["learned from", "held out"])
def test_rmsd_is_near_the_information_limit(well_specified, which):
    model, truth, *sets = well_specified
    particles, found = sets[which == "held out"]
    scores = score_motion(model.dynamics, found.latents, particles)
    limit = pooled(information_limit(model, particles, truth, particles.truth.latents))
    assert 0.95 < scores.rmsd / limit <= 1.10, (scores, limit)


@pytest.mark.parametrize("which", ["learned from", "held out"])
def test_error_bars_cover_the_truth(well_specified, which):
    _, _, *sets = well_specified
    particles, found = sets[which == "held out"]
    inside = (found.latents - particles.truth.latents).abs() < 1.96 * found.std
    assert 0.90 <= float(inside.float().mean()) <= 0.98


def test_noise_and_brightness_are_found(well_specified):
    _, truth, (_, found), _ = well_specified
    assert found.population.noise_std == pytest.approx(truth.noise_std, rel=0.02)
    assert found.population.contrast == pytest.approx(1.0, rel=0.03)


def test_population_is_found(well_specified):
    """Its spread in all, and the share of each kind of motion."""
    model, truth, (_, found), _ = well_specified
    spread, true_spread = found.population.covariance.diagonal(), truth.covariance.diagonal()
    for kind in ("mode", "rotation", "translation"):
        of_kind = torch.from_numpy(model.dynamics.latent_kind == kind)
        assert float(spread[of_kind].sum() / true_spread[of_kind].sum()) == pytest.approx(1.0, abs=0.25), kind
    assert found.population.mean.abs().max() < 0.5


# What it finds


def test_finds_motion(closed, small, refined):
    scores = score_motion(make_model(closed, small).dynamics, refined.latents, small[:50])
    assert scores.explained_motion > 0.6
    blurs = [step["blur"] for step in refined.history]
    assert blurs[: len(BLURS)] == list(BLURS)
    assert set(blurs[len(BLURS) :]) <= {BLURS[-1]}, "while particles still move, it goes on at the last blur"
    assert {"step", "noise_std", "contrast", "spread"} <= refined.history[0].keys()
    assert refined.history[-1]["step"] < 0.5 * refined.history[0]["step"]


def test_large_motion_is_not_lost(pair):
    """All particles show the open dimer, 20° and 14 Å from the closed reference."""
    closed, opened = pair
    particles = simulate_particles(
        closed, 24, conformations=opened.coords[None], box_size=48, snr_db=5.0, seed=0, progress=False
    )
    model = make_model(closed, particles, modes=None)
    before = rmsd(torch.from_numpy(closed.coords)[None], torch.from_numpy(opened.coords)[None])
    found = refine(model, particles, progress=False)
    after = rmsd(model.decode(found.latents).double(), torch.from_numpy(opened.coords).expand(24, -1, -1))
    assert float(before) > 5.0
    assert float(after.median()) < 1.8


def test_brightness_of_the_images_does_not_matter(closed, small, refined):
    bright = ParticleStack(
        40 * small.read_images() + 7, small.rotations, small.shifts, pixel_size=small.pixel_size, ctf=small.ctf
    )
    found = refine(make_model(closed, small), bright[:50], blurs=BLURS, progress=False)
    assert found.population.contrast / refined.population.contrast == pytest.approx(40, rel=1e-3)
    assert found.population.noise_std / refined.population.noise_std == pytest.approx(40, rel=1e-3)
    torch.testing.assert_close(found.latents, refined.latents, rtol=0, atol=0.02)


def test_nothing_is_claimed_where_noise_hides_everything(closed, small, refined):
    blind = replace(refined.population, noise_std=1e4 * refined.population.noise_std)
    found = refine(make_model(closed, small), small[:5], blind, blurs=(0.0, 0.0), progress=False)
    mean = blind.mean.float().expand(5, -1)
    torch.testing.assert_close(found.latents, mean, rtol=0, atol=1e-3)
    prior = blind.covariance.diagonal().sqrt().float().expand(5, -1)
    torch.testing.assert_close(found.std, prior, rtol=1e-3, atol=0)


def test_error_bars_are_within_the_prior(refined):
    prior = refined.population.covariance.diagonal().sqrt().float()
    assert (refined.std > 0).all() and (refined.std <= 1.001 * prior).all()


def test_posterior_covariance_has_the_error_bars_on_its_diagonal(closed, small, refined):
    rows = [7, 0, 31]
    found = posterior_covariance(make_model(closed, small), small[:50], refined, rows)
    torch.testing.assert_close(found, found.mT)
    assert torch.linalg.eigvalsh(found).min() > 0
    # The error bars are those of the last linearisation, a small step away.
    ratio = found.diagonal(dim1=1, dim2=2).sqrt() / refined.std[rows]
    assert float(ratio.median()) == pytest.approx(1.0, abs=0.01)
    assert float((ratio - 1).abs().max()) < 0.3


# Rows, batches, populations


def test_same_input_same_numbers(closed, small, refined):
    assert_same(refine(make_model(closed, small, seed=5), small[:50], blurs=BLURS, progress=False), refined)


def test_a_given_population_is_used_and_not_changed(closed, small, refined):
    population = refined.population
    mean, covariance = population.mean.clone(), population.covariance.clone()
    model = make_model(closed, small)
    found = refine(model, small[50:], population, blurs=BLURS, progress=False)
    for after in (population, found.population):
        assert torch.equal(after.mean, mean) and torch.equal(after.covariance, covariance)
    for name in ("noise_std", "contrast", "structure_hash"):
        assert getattr(found.population, name) == pytest.approx(getattr(population, name))
    assert float(model.contrast) == pytest.approx(population.contrast)


def test_held_out_particles_are_scored_by_the_others_population(closed, small, refined):
    model = make_model(closed, small)
    held_out = small[50:]
    found = refine(model, held_out, refined.population, blurs=BLURS, progress=False)
    assert found.latents.shape == (20, model.dynamics.n_latents)
    assert score_motion(model.dynamics, found.latents, held_out).explained_motion > 0.5


def test_rows_stay_rows(closed, small, refined):
    model = make_model(closed, small)
    order = np.random.default_rng(0).permutation(70)
    whole = refine(model, small, refined.population, blurs=BLURS, progress=False)
    mixed = refine(model, small[order], refined.population, blurs=BLURS, batch_size=9, progress=False)
    assert mixed.ids.tolist() == small.ids[order].tolist()
    torch.testing.assert_close(mixed.latents, whole.latents[order], rtol=0, atol=5e-3)
    torch.testing.assert_close(mixed.std, whole.std[order], rtol=1e-2, atol=0)
    # With a population given, particles do not see each other but in when to stop.
    some = refine(model, small[order[:5]], refined.population, blurs=BLURS, progress=False)
    torch.testing.assert_close(some.latents, whole.latents[order[:5]], rtol=0, atol=0.2)


def test_population_from_some_of_the_particles(closed, small):
    """Those it was not learned from are refined with it, in their own rows."""
    model = make_model(closed, small)
    found = refine(model, small, blurs=BLURS, n_population=30, progress=False)
    assert found.ids.tolist() == small.ids.tolist() and len(found.latents) == 70
    assert (found.std > 0).all()
    alone = refine(model, small, found.population, blurs=BLURS, progress=False)
    assert (found.latents - alone.latents).abs().median() < 0.02
    scores = score_motion(model.dynamics, found.latents, small)
    assert scores.explained_motion > 0.5


def test_starts_where_it_is_told(closed, small, refined):
    model = make_model(closed, small)
    start = small.truth.latents[:10]
    found = refine(model, small[:10], refined.population, start=start, blurs=(0.0,) * 3, progress=False)
    after = score_motion(model.dynamics, found.latents, small[:10])
    # From the truth, and from the population's mean, the same posterior maximum.
    torch.testing.assert_close(
        found.latents, refine(model, small[:10], refined.population, blurs=BLURS, progress=False).latents,
        rtol=0, atol=0.5,
    )  # fmt: skip
    assert after.explained_motion > 0.6
    assert torch.equal(start, small.truth.latents[:10]), "the caller's tensor is left alone"


# Cut and resumed


def cut_after(monkeypatch, n_looks: int):
    """Let `refine` linearise `n_looks` batches, then stop it as Ctrl-C would."""
    original, looks = cryochains.inference.normal_equations, []

    def look(*args, **kwargs):
        if len(looks) == n_looks:
            raise KeyboardInterrupt
        looks.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(cryochains.inference, "normal_equations", look)


@pytest.mark.parametrize("settings", [{}, {"n_population": 20}, {"population": True}])
@pytest.mark.parametrize("n_looks", [4, 7, 13])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(closed, small, refined, tmp_path, settings, n_looks):
    particles = small[:40]
    settings = {"blurs": BLURS, "batch_size": 13, "progress": False} | settings
    if "population" in settings:
        settings["population"] = refined.population
    whole = refine(make_model(closed, small), particles, **settings)
    checkpoint = tmp_path / "run.safetensors"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, n_looks)
        refine(make_model(closed, small), particles, checkpoint=checkpoint, **settings)
    resumed = refine(make_model(closed, small), particles, checkpoint=checkpoint, **settings)
    assert_same(resumed, whole)


def spoil_second_look(monkeypatch, n_spoiled: int):
    """Let the second pass find that the step of the first particles made them worse."""
    original, looks = cryochains.inference.normal_equations, []

    def look(model, images, pose, latents, *args):
        equations = original(model, images, pose, latents, *args)
        if len(looks) == 1:
            equations.residual[:n_spoiled] += 1e6
        looks.append(latents.clone())
        return equations

    monkeypatch.setattr(cryochains.inference, "normal_equations", look)
    return looks


def test_steps_that_made_things_worse_are_taken_back(closed, small, refined, monkeypatch, tmp_path):
    settings = {"blurs": (0.0,) * 5, "batch_size": 64, "progress": False}
    arguments = (small[:20], refined.population)
    good = refine(make_model(closed, small), *arguments, **settings)
    looks = spoil_second_look(monkeypatch, 6)
    whole = refine(make_model(closed, small), *arguments, **settings)
    assert [len(look) for look in looks[:4]] == [20, 20, 6, 20], "the spoiled ones, and no others, are seen again"
    assert torch.equal(looks[2], looks[0][:6]), "where they were before the step"
    shorter = (looks[3][:6] - looks[0][:6]).norm(dim=1) < (looks[1][:6] - looks[0][:6]).norm(dim=1)
    assert shorter.all(), "and step again with more care"
    assert [step["refused"] for step in whole.history[:3]] == [0, 6, 0]
    torch.testing.assert_close(whole.latents[6:], good.latents[6:], rtol=0, atol=0.1)
    scores = score_motion(make_model(closed, small).dynamics, whole.latents, small[:20])
    assert scores.explained_motion > 0.5

    # How careful a particle has become is part of what a cut run remembers.
    looks.clear()
    checkpoint = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, 3)
        refine(make_model(closed, small), *arguments, checkpoint=checkpoint, **settings)
    assert_same(refine(make_model(closed, small), *arguments, checkpoint=checkpoint, **settings), whole)


def test_a_finished_run_is_read_from_its_checkpoint(closed, small, tmp_path, monkeypatch):
    settings = {"blurs": BLURS[:2], "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    first = refine(make_model(closed, small), small[:10], **settings)
    cut_after(monkeypatch, 0)
    assert_same(refine(make_model(closed, small), small[:10], **settings), first)


def test_checkpoint_of_another_run_is_refused(closed, opened, small, tmp_path):
    checkpoint = tmp_path / "run.safetensors"
    settings = {"blurs": (6.0,), "progress": False, "checkpoint": checkpoint}
    refine(make_model(closed, small), small[:10], **settings)
    content = checkpoint.read_bytes()
    for model, particles in (
        (make_model(closed, small), small[:9]),
        (make_model(opened, small), small[:10]),
        (make_model(closed, small, modes=None), small[:10]),
    ):
        with pytest.raises(ValueError, match="expected a checkpoint of .* try another checkpoint path"):
            refine(model, particles, **settings)
    assert checkpoint.read_bytes() == content


def test_checkpoint_of_other_particles_or_settings_is_refused(closed, small, refined, tmp_path):
    settings = {"blurs": (6.0,), "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    refine(make_model(closed, small), small[:10], **settings)
    for particles, other in (
        (small[10:20], {}),
        (small[:10], {"blurs": (6.0, 0.0)}),
        (small[:10], {"population": refined.population}),
        (small[:10], {"start": torch.ones(10, 16)}),
    ):
        with pytest.raises(ValueError, match="expected a checkpoint of .* try another checkpoint path"):
            refine(make_model(closed, small), particles, **settings | other)


def test_files_that_are_no_checkpoint(closed, small, refined, tmp_path):
    refined.save(tmp_path / "refinement.safetensors")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "folder").mkdir()
    settings = {"blurs": (6.0,), "progress": False}
    for name, sentence in (
        ("refinement.safetensors", "expected a refinement checkpoint file, got refinement at"),
        ("text", "expected a refinement checkpoint file, got something unreadable at"),
        ("text/below", "expected a place that can be written"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refine(make_model(closed, small), small[:5], checkpoint=tmp_path / name, **settings)


# Saved and read


def test_refinement_round_trip(refined, tmp_path):
    refined.save(tmp_path / "refinement.safetensors")
    loaded = Refinement.load(tmp_path / "refinement.safetensors")
    assert_same(loaded, refined)
    assert "50 particles" in repr(loaded)
    with pytest.raises(ValueError, match="expected a pretrained model file, got refinement at"):
        load_pretrained(tmp_path / "refinement.safetensors")


# Bad input


def test_particles_of_another_size(closed, small):
    other_box = CryoChains(closed, box_size=64, pixel_size=small.pixel_size, modes=None, width=0.02)
    other_pixel = CryoChains(closed, box_size=32, pixel_size=1.1 * small.pixel_size, modes=None, width=0.02)
    for model in (other_box, other_pixel):
        with pytest.raises(ValueError, match="expected particles of .* px × .* Å, got 32 px"):
            refine(model, small[:5], progress=False)


def test_population_of_another_molecule(closed, small, refined):
    other = replace(refined.population, structure_hash="another")
    with pytest.raises(ValueError, match="expected a population of Structure.* got one of another molecule"):
        refine(make_model(closed, small), small[:5], other, progress=False)


def test_start_of_another_shape(closed, small):
    with pytest.raises(ValueError, match=r"expected .*start.* of shape \(5, 16\), got \(5, 3\)"):
        refine(make_model(closed, small), small[:5], start=torch.zeros(5, 3), progress=False)


def with_images(particles, images) -> ParticleStack:
    return ParticleStack(
        images, particles.rotations, particles.shifts, pixel_size=particles.pixel_size, ctf=particles.ctf
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_images_that_are_not_numbers(closed, small, value):
    images = small[:5].read_images()
    images[2, 3, 4] = value
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or Inf in image"):
        refine(make_model(closed, small), with_images(small[:5], images), blurs=(0.0,), progress=False)


def test_protein_dark_images(closed, small):
    with pytest.raises(ValueError, match="expected protein-bright images.*invert=True"):
        refine(make_model(closed, small), with_images(small, -small.read_images()), progress=False)


def test_quiet_when_asked(closed, small, capfd):
    refine(make_model(closed, small), small[:5], blurs=(0.0,), progress=False)
    assert capfd.readouterr() == ("", "")
    refine(make_model(closed, small), small[:5], blurs=(0.0,), progress=True)
    assert "refining" in capfd.readouterr().err
