"""The refinement: against the information limit, and as a tool that is cut and resumed."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

import cryochains.inference.passes
from cryochains.images import ParticleStack, load_particles
from cryochains.inference import (
    Result,
    information_limit,
    load_result,
    posterior_covariance,
    refine,
    rmsd,
    score,
)
from cryochains.inference.likelihood import image_powers
from cryochains.model import (
    Dynamics,
    Model,
    Population,
    elastic_variance,
    load_population,
    simulate_particles,
)
from cryochains.molecule import compute_modes, morph

BLURS = (6.0, 3.0, 0.0, 0.0)


def make_model(structure, particles, **settings) -> Model:
    return Model(structure, particles, **{"modes": 2} | settings)


@pytest.fixture(scope="module")
def small(closed):
    """70 particles of moderate noise whose chains shift, turn and bend; 32 px."""
    dynamics = Dynamics(closed, compute_modes(closed, 2))
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(70, dynamics.n_latents, generator=generator)
    return simulate_particles(
        closed,
        70,
        dynamics=dynamics,
        latents=elastic_variance(dynamics).sqrt() * draws,
        box_size=32,
        snr_db=3.0,
        shift_std=2.0,
        seed=2,
        progress=False,
    )


@pytest.fixture(scope="module")
def refined(closed, small) -> Result:
    return refine(make_model(closed, small), small[:50], blurs=BLURS, progress=False)


def assert_same(a: Result, b: Result):
    for one, other in (
        (a.latents, b.latents),
        (a.std, b.std),
        (a.population.mean, b.population.mean),
        (a.population.covariance, b.population.covariance),
        (a.population.noise_spectrum, b.population.noise_spectrum),
        (a.scale, b.scale),
        (a.noise, b.noise),
        (a.misfit, b.misfit),
        (a.responsibility, b.responsibility),
    ):
        # Nothing is known of the noise in images that were left out.
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    assert a.population.description() == b.population.description()
    assert a.ids.tolist() == b.ids.tolist()
    assert a.population.fingerprint == b.population.fingerprint
    assert a.history == b.history
    assert a.kind == b.kind


# Against the limit


@pytest.fixture(scope="session")
def well_specified(closed):
    """Reference = truth, Gaussian latents, 64 px at 0 dB: nothing but noise is in the way."""
    n_train, n_test = 1000, 200
    dynamics = Dynamics(closed, compute_modes(closed, 10))
    variance = 0.25 * elastic_variance(dynamics)
    generator = torch.Generator().manual_seed(3)
    shape = (n_train + n_test, dynamics.n_latents)
    draws = torch.randn(shape, generator=generator, dtype=torch.float64)
    particles = simulate_particles(
        closed,
        n_train + n_test,
        dynamics=dynamics,
        latents=(draws * variance.sqrt()).float(),
        snr_db=0.0,
        seed=1,
        progress=False,
    )
    train, test = particles[:n_train], particles[n_train:]
    model = make_model(closed, particles, modes=10)
    mean = torch.zeros(dynamics.n_latents, dtype=torch.float64)
    noise_std = particles.truth.noise_std
    truth = Population(mean, variance.diag(), noise_std, 1.0, model.fingerprint)
    result = refine(model, train, progress=False)
    held_out = refine(model, test, result.population, progress=False)
    return model, truth, result, held_out


def pooled(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@pytest.mark.parametrize("frame", ["molecule", "poses"])
@pytest.mark.parametrize("which", ["learned from", "held out"])
def test_rmsd_is_near_the_information_limit(well_specified, which, frame):
    model, truth, *results = well_specified
    result = results[which == "held out"]
    scores = score(result, frame=frame)
    particles = result.particles
    limits = information_limit(model, particles, truth, particles.truth.latents, frame=frame)
    limit = pooled(limits)
    assert 0.95 < scores.rmsd / limit <= 1.10, (scores, limit)


@pytest.mark.parametrize("which", ["learned from", "held out"])
def test_error_bars_cover_the_truth(well_specified, which):
    _, _, *results = well_specified
    result = results[which == "held out"]
    inside = (result.latents - result.particles.truth.latents).abs() < 1.96 * result.std
    assert 0.90 <= float(inside.float().mean()) <= 0.98


def test_noise_and_brightness_are_measured(well_specified):
    _, truth, result, _ = well_specified
    assert result.population.noise_std == pytest.approx(truth.noise_std, rel=0.02)
    assert result.population.contrast == pytest.approx(1.0, rel=0.03)


def test_population_is_learned(well_specified):
    """Its spread in all, and the share of each kind of motion."""
    model, truth, result, _ = well_specified
    spread = result.population.covariance.diagonal()
    true_spread = truth.covariance.diagonal()
    for kind in ("mode", "rotation", "translation"):
        of_kind = torch.from_numpy(model.dynamics.latent_kind == kind)
        ratio = float(spread[of_kind].sum() / true_spread[of_kind].sum())
        assert ratio == pytest.approx(1.0, abs=0.25), kind
    assert result.population.mean.abs().max() < 0.5


# What it learns


def test_finds_motion(refined):
    scores = score(refined)
    assert scores.explained_motion > 0.6
    blurs = [step["blur"] for step in refined.history]
    assert blurs[: len(BLURS)] == list(BLURS)
    assert set(blurs[len(BLURS) :]) <= {BLURS[-1]}, "it goes on at the last"
    assert {"step", "noise_std", "contrast", "spread"} <= refined.history[0].keys()
    assert refined.history[-1]["step"] < 0.5 * refined.history[0]["step"]


def test_large_motion_is_not_lost(pair):
    """All particles show the open dimer, 20° and 14 Å from the closed reference."""
    closed, opened = pair
    particles = simulate_particles(
        closed,
        24,
        conformations=opened.coords[None],
        box_size=48,
        snr_db=5.0,
        seed=0,
        progress=False,
    )
    model = make_model(closed, particles, modes=None)
    truth = torch.from_numpy(opened.coords)
    before = rmsd(torch.from_numpy(closed.coords)[None], truth[None])
    result = refine(model, particles, progress=False)
    after = rmsd(model.decode(result.latents).double(), truth.expand(24, -1, -1))
    assert float(before) > 5.0
    assert float(after.median()) < 1.8


@pytest.mark.parametrize(
    "settings",
    [
        {"modes": 10, "rotation": False, "translation": False},
        {"modes": None, "translation": False},
        {"modes": None},
    ],
    ids=["bends", "turns", "turns and shifts"],
)
def test_no_particle_ends_farther_from_its_image_than_it_started(pair, settings):
    """Also of models that cannot express the change from their reference."""
    closed, opened = pair
    path = morph(closed, opened, 8)[4:]
    particles = simulate_particles(
        closed, 60, conformations=path, box_size=32, snr_db=20.0, seed=3, progress=False
    )
    result = refine(Model(closed, particles, **settings), particles, check=False, progress=False)
    correlations = []
    for latents in (torch.zeros_like(result.latents), result.latents):
        for batch in particles.batches(60):
            powers = image_powers(result.imaging_model, batch.images, batch.pose, latents)
            correlations.append(powers[:, 1] / (powers[:, 0] * powers[:, 2]).sqrt())
    start, end = correlations
    assert (end > start - 1e-4).all()
    assert end.mean() > start.mean() + 0.02


def test_brightness_of_the_images_does_not_matter(closed, small, refined):
    bright = with_images(small, 40 * small.read_images() + 7)
    result = refine(make_model(closed, small), bright[:50], blurs=BLURS, progress=False)
    for name in ("scale", "noise"):
        ratio = getattr(result, name) / getattr(refined, name)
        torch.testing.assert_close(ratio, torch.full((50,), 40.0), rtol=1e-3, atol=0)
    brighter, plain = result.population, refined.population
    assert brighter.contrast / plain.contrast == pytest.approx(40, rel=1e-3)
    assert brighter.noise_std / plain.noise_std == pytest.approx(40, rel=1e-3)
    torch.testing.assert_close(result.latents, refined.latents, rtol=0, atol=0.02)


def test_nothing_is_claimed_where_noise_hides_everything(closed, small, refined):
    blind = replace(refined.population, noise_std=1e4 * refined.population.noise_std)
    result = refine(make_model(closed, small), small[:5], blind, blurs=(0.0, 0.0), progress=False)
    mean = blind.mean.float().expand(5, -1)
    torch.testing.assert_close(result.latents, mean, rtol=0, atol=1e-3)
    prior = blind.covariance.diagonal().sqrt().float().expand(5, -1)
    torch.testing.assert_close(result.std, prior, rtol=1e-3, atol=0)


def test_error_bars_are_within_the_prior(refined):
    prior = refined.population.covariance.diagonal().sqrt().float()
    assert (refined.std > 0).all() and (refined.std <= 1.001 * prior).all()


def test_posterior_covariance_has_the_error_bars_on_its_diagonal(refined):
    rows = [7, 0, 31]
    covariance = posterior_covariance(refined, rows)
    torch.testing.assert_close(covariance, covariance.mT)
    assert torch.linalg.eigvalsh(covariance).min() > 0
    # The error bars are those of the last linearisation, a small step away.
    ratio = covariance.diagonal(dim1=1, dim2=2).sqrt() / refined.std[rows]
    assert float(ratio.median()) == pytest.approx(1.0, abs=0.01)
    assert float((ratio - 1).abs().max()) < 0.3
    some = posterior_covariance(refined[[31, 7]], [1])
    torch.testing.assert_close(some[0], covariance[0], rtol=1e-4, atol=1e-6)


def test_posterior_covariance_needs_noise_and_particles(refined):
    for result, sentence in (
        (replace(refined, population=None), "expected a refined result, whose noise is known, got"),
        (replace(refined, particles=None), "expected a result with its particles, got .*try load_"),
    ):
        with pytest.raises(ValueError, match=sentence):
            posterior_covariance(result, [0])


def test_geometry_needs_no_image(closed, small, refined, tmp_path):
    """Pixels may be NaN, or gone from the disk, where only poses and CTFs count."""
    expected = posterior_covariance(refined, [3, 1]), information_limit(refined.model, small[:9])
    images = torch.full((70, 32, 32), math.nan)
    blank = replace(small, images=images)
    small.save(tmp_path / "a.star")
    on_disk = load_result_of(refined, tmp_path)
    (tmp_path / "a.mrcs").unlink()
    result = replace(refined, particles=blank[:50])
    assert torch.equal(posterior_covariance(result, [3, 1]), expected[0])
    np.testing.assert_array_equal(information_limit(refined.model, blank[:9]), expected[1])
    # RELION's angles have six decimals.
    gone = posterior_covariance(on_disk, [3, 1])
    torch.testing.assert_close(gone, expected[0], rtol=1e-2, atol=1e-4)
    with_truth = replace(on_disk.particles, truth=small.truth[:50])[:9]
    limit = information_limit(refined.model, with_truth)
    np.testing.assert_allclose(limit, expected[1], rtol=1e-3)
    for particles in (blank[:50], on_disk.particles):
        with pytest.raises(ValueError, match="expected finite pixels|expected .* as it was when"):
            particles.read_images([0])


def load_result_of(result, folder) -> Result:
    """The result with its particles in ``a.star`` of a folder."""
    particles = load_particles(folder / "a.star")[: len(result)]
    # Their poses went through text and their ids are the file's, so that they are no longer known.
    return replace(result, particles=particles, ids=particles.ids, particles_digest=None)


# Rows, batches, populations


def test_same_input_same_numbers(closed, small, refined):
    torch.manual_seed(5)
    again = refine(make_model(closed, small), small[:50], blurs=BLURS, progress=False)
    assert_same(again, refined)


def test_a_given_population_is_used_and_not_changed(closed, small, refined):
    population = refined.population
    mean, covariance = population.mean.clone(), population.covariance.clone()
    model = make_model(closed, small)
    result = refine(model, small[50:], population, blurs=BLURS, progress=False)
    for after in (population, result.population):
        assert torch.equal(after.mean, mean) and torch.equal(after.covariance, covariance)
    assert torch.equal(result.population.noise_spectrum, population.noise_spectrum)
    assert result.population.description() == population.description()


def test_held_out_particles_are_scored_by_the_others_population(closed, small, refined):
    model = make_model(closed, small)
    held_out = small[50:]
    result = refine(model, held_out, refined.population, blurs=BLURS, progress=False)
    assert result.latents.shape == (20, model.dynamics.n_latents)
    assert score(result).explained_motion > 0.5


def test_rows_stay_rows(closed, small, refined):
    model = make_model(closed, small)
    order = np.random.default_rng(0).permutation(70)
    whole = refine(model, small, refined.population, blurs=BLURS, progress=False)
    settings = {"blurs": BLURS, "batch_size": 9, "progress": False}
    mixed = refine(model, small[order], refined.population, **settings)
    assert mixed.ids.tolist() == small.ids[order].tolist()
    torch.testing.assert_close(mixed.latents, whole.latents[order], rtol=0, atol=5e-3)
    torch.testing.assert_close(mixed.std, whole.std[order], rtol=1e-2, atol=0)
    # With a population given, particles do not see each other but in when to stop.
    some = refine(model, small[order[:5]], refined.population, blurs=BLURS, progress=False)
    torch.testing.assert_close(some.latents, whole.latents[order[:5]], rtol=0, atol=0.2)


def test_population_from_some_of_the_particles(closed, small):
    """Those it was not learned from are refined with it, in their own rows."""
    model = make_model(closed, small)
    result = refine(model, small, blurs=BLURS, n_population=30, progress=False)
    assert result.ids.tolist() == small.ids.tolist() and len(result.latents) == 70
    assert (result.std > 0).all()
    alone = refine(model, small, result.population, blurs=BLURS, progress=False)
    assert (result.latents - alone.latents).abs().median() < 0.02
    assert score(result).explained_motion > 0.5


@pytest.mark.parametrize("seed", [3, 4])
def test_particles_beyond_the_first_block_teach_the_population_too(closed, seed):
    """In four blocks it is nearer to what all of them teach together than the first block is."""
    dynamics = Dynamics(closed)
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dynamics.n_latents, dynamics.n_latents, generator=generator)
    draws = torch.randn(320, dynamics.n_latents, generator=generator)
    particles = simulate_particles(
        closed,
        320,
        dynamics=dynamics,
        latents=0.4 * draws @ mixing + 0.5,
        box_size=32,
        snr_db=-6.0,
        seed=seed,
        progress=False,
    )
    model = make_model(closed, particles, modes=None)
    settings = {"blurs": BLURS, "check": False, "progress": False}
    pooled = refine(model, particles, **settings).population
    streamed = refine(model, particles, n_population=80, **settings)
    first_block = np.sort(np.random.default_rng(0).permutation(320)[:80])
    alone = refine(model, particles[first_block], **settings).population
    for name in ("mean", "covariance"):
        together = getattr(pooled, name)
        off = [
            float((getattr(population, name) - together).norm())
            for population in (streamed.population, alone)
        ]
        assert off[0] < 0.6 * off[1], (name, off)
    assert score(streamed).explained_motion > 0.5
    # What is no matter of the molecule stays as the first block says.
    assert streamed.population.noise_std == pytest.approx(pooled.noise_std, rel=0.01)


def test_starts_where_it_is_told(closed, small, refined):
    model = make_model(closed, small)
    start = small.truth.latents[:10]
    settings = {"blurs": (0.0,) * 3, "progress": False}
    result = refine(model, small[:10], refined.population, start=start, **settings)
    # From the truth, and from the population's mean, the same posterior maximum.
    of_mean = refine(model, small[:10], refined.population, blurs=BLURS, progress=False)
    torch.testing.assert_close(result.latents, of_mean.latents, rtol=0, atol=0.5)
    assert score(result).explained_motion > 0.6
    assert torch.equal(start, small.truth.latents[:10]), "the caller's tensor is left alone"
    # A result, such as an encoder's, is a start too.
    given = Result(model, start, particles=small[:10])
    assert_same(refine(model, small[:10], refined.population, start=given, **settings), result)


# Cut and resumed


def cut_after(monkeypatch, n_looks: int):
    """Let `refine` linearise `n_looks` batches, then stop it as Ctrl-C would."""
    original = cryochains.inference.passes.normal_equations
    looks = []

    def look(*args, **kwargs):
        if len(looks) == n_looks:
            raise KeyboardInterrupt
        looks.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(cryochains.inference.passes, "normal_equations", look)


@pytest.mark.parametrize("settings", [{}, {"n_population": 20}, {"population": True}])
@pytest.mark.parametrize("n_looks", [4, 7, 13])
def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(
    closed, small, refined, tmp_path, settings, n_looks
):
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
    original = cryochains.inference.passes.normal_equations
    looks = []

    def look(model, images, pose, latents, **settings):
        equations = original(model, images, pose, latents, **settings)
        if len(looks) == 1:
            equations.data_power[:n_spoiled] += 1e6
        looks.append(latents.clone())
        return equations

    monkeypatch.setattr(cryochains.inference.passes, "normal_equations", look)
    return looks


def test_steps_that_made_things_worse_are_taken_back(closed, small, refined, monkeypatch, tmp_path):
    settings = {"blurs": (4.0,) * 5, "batch_size": 64, "progress": False}
    arguments = (small[:20], refined.population)
    good = refine(make_model(closed, small), *arguments, **settings)
    looks = spoil_second_look(monkeypatch, 6)
    whole = refine(make_model(closed, small), *arguments, **settings)
    # The spoiled ones, and no others, are seen again, where they were before the step.
    assert [len(look) for look in looks[:4]] == [20, 20, 6, 20]
    assert torch.equal(looks[2], looks[0][:6])
    first, second = ((looks[number][:6] - looks[0][:6]).norm(dim=1) for number in (1, 3))
    assert (second < first).all(), "and step again with more care"
    assert [step["refused"] for step in whole.history[:3]] == [0, 6, 0]
    torch.testing.assert_close(whole.latents[6:], good.latents[6:], rtol=0, atol=0.1)
    assert score(whole).explained_motion > 0.5

    # How careful a particle has become is part of what a cut run remembers.
    looks.clear()
    checkpoint = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, 3)
        refine(make_model(closed, small), *arguments, checkpoint=checkpoint, **settings)
    resumed = refine(make_model(closed, small), *arguments, checkpoint=checkpoint, **settings)
    assert_same(resumed, whole)


def test_files_that_an_earlier_run_left_are_no_hindrance(closed, small, tmp_path):
    """Its first state is gone, but not the others; files of like names are kept."""
    earlier = ("block1-beads1", "block2", "block12-beads2", "block", "block2-old", "my_block2")
    for name in earlier:
        (tmp_path / f"{name}.safetensors").write_text("of an earlier run")
    (tmp_path / ".part-0123456789abcdef.safetensors").write_text("of a run that was killed")
    settings = {"blurs": (6.0,), "n_population": 20, "progress": False}
    model = make_model(closed, small)
    result = refine(model, small[:40], checkpoint=tmp_path, **settings)
    assert_same(result, refine(model, small[:40], **settings))
    left = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert left == {"block1", "block2", "block", "block2-old", "my_block2"}
    assert not list(tmp_path.glob(".part-*"))


def test_a_finished_run_is_read_from_its_checkpoint(closed, small, tmp_path, monkeypatch):
    settings = {"blurs": BLURS[:2], "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    first = refine(make_model(closed, small), small[:10], **settings)
    cut_after(monkeypatch, 0)
    assert_same(refine(make_model(closed, small), small[:10], **settings), first)


def test_checkpoint_of_another_run_is_refused(closed, opened, small, tmp_path):
    settings = {"blurs": (6.0,), "progress": False, "checkpoint": tmp_path}
    refine(make_model(closed, small), small[:10], **settings)
    content = (tmp_path / "block1.safetensors").read_bytes()
    for model, particles, sentence in (
        (make_model(closed, small), small[:9], "of these 9 particles.*try another folder"),
        (make_model(opened, small), small[:10], "of Model.*its structure.*try the model that"),
        (make_model(closed, small, modes=None), small[:10], "of Model.*number of modes.*try the"),
    ):
        with pytest.raises(ValueError, match=f"expected .*run .*{sentence}"):
            refine(model, particles, **settings)
    assert (tmp_path / "block1.safetensors").read_bytes() == content


def test_checkpoint_of_other_particles_or_settings_is_refused(closed, small, refined, tmp_path):
    settings = {"blurs": (6.0,), "progress": False, "checkpoint": tmp_path / "run.safetensors"}
    refine(make_model(closed, small), small[:10], **settings)
    images = small[:10].read_images().clone()
    images[7, 3, 5] += 0.01
    shifted = replace(small[:10], shifts=small[:10].shifts + 0.01)
    for particles, other, words in (
        (small[10:20], {}, "particles"),
        (small[:10][::-1], {}, "order of the particles"),
        (replace(small[:10], images=images), {}, "images"),
        (replace(small[:10], images=2 * small[:10].read_images()), {}, "images"),
        (shifted, {}, "poses"),
        (small[:10], {"blurs": (6.0, 0.0)}, "blurs"),
        (small[:10], {"population": refined.population}, "population"),
        (small[:10], {"start": torch.ones(10, 16)}, "start"),
    ):
        with pytest.raises(
            ValueError, match=f"expected the run of .*got one whose {words} differ; try another"
        ):
            refine(make_model(closed, small), particles, **settings | other)


def test_folders_that_are_of_no_run(closed, small, refined, tmp_path):
    for folder in ("result", "text"):
        (tmp_path / folder).mkdir()
    refined.save(tmp_path / "result" / "block1.safetensors")
    (tmp_path / "text" / "block1.safetensors").write_text("hello")
    (tmp_path / "file").write_text("hello")
    settings = {"blurs": (6.0,), "progress": False}
    for name, sentence in (
        ("result", "expected a refinement state file, got result at"),
        ("text", "expected a refinement state file, got something unreadable at"),
        ("file", "expected a folder for the run, got a file at"),
        ("file/below", "expected a folder that can be written"),
    ):
        with pytest.raises(ValueError, match=sentence):
            refine(make_model(closed, small), small[:5], checkpoint=tmp_path / name, **settings)


# Saved and read


def test_result_round_trip(refined, tmp_path):
    refined.save(tmp_path / "result.safetensors")
    loaded = load_result(tmp_path / "result.safetensors")
    assert_same(loaded, refined)
    assert "50 particles" in repr(loaded)
    with pytest.raises(ValueError, match="expected a population file, got result at"):
        load_population(tmp_path / "result.safetensors")


# What real particles do to it


@pytest.fixture(scope="module")
def parts(closed, small):
    """Signal and noise of `small`, whose sum it is."""
    clean = simulate_particles(
        closed,
        70,
        dynamics=Dynamics(closed, compute_modes(closed, 2)),
        latents=small.truth.latents,
        box_size=32,
        snr_db=math.inf,
        shift_std=2.0,
        seed=2,
        progress=False,
    )
    signal = clean.read_images()
    noise = small.read_images() - signal
    assert float(noise.std()) == pytest.approx(small.truth.noise_std, rel=0.01)
    return signal, noise


@pytest.fixture(scope="module")
def factors():
    """From ½ to 2, one a particle."""
    generator = torch.Generator().manual_seed(5)
    return 2 ** (2 * torch.rand(70, generator=generator) - 1)


def of(closed, particles, rows=slice(50), **settings) -> Result:
    settings = {"blurs": BLURS, "progress": False} | settings
    return refine(make_model(closed, particles), particles[rows], **settings)


def apart(one: Result, other: Result) -> torch.Tensor:
    """(n,) RMS Å between conformations."""
    return rmsd(one.decode().double(), other.decode().double())


def pooled_apart(one: Result, other: Result) -> float:
    return float(apart(one, other).square().mean().sqrt())


def log_error(got: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    return (got / expected).log()


def test_equal_particles_have_equal_brightness_and_noise(small, refined):
    """Scales are known to 0.3 % when they are all the same, and the noise to 1 %."""
    assert float(log_error(refined.scale, refined.scale.mean()).std()) < 0.01
    assert float(log_error(refined.noise, torch.tensor(small.truth.noise_std)).abs().max()) < 0.05
    assert refined.shows_molecule.all() and (refined.responsibility > 0.99).all()
    assert float(refined.misfit.median()) == pytest.approx(1.0, abs=0.2)
    population = refined.population
    assert population.contrast_spread < 0.02 and population.junk_share < 0.01
    pixels = torch.ones(17).double()
    assert population.noise_spectrum.shape == pixels.shape
    assert float((population.noise_spectrum - 1).abs().max()) < 0.4


@pytest.mark.parametrize("what", ["image", "signal"])
def test_brightness_of_each_particle_is_found(closed, small, refined, parts, factors, what):
    """And conformations are found as if all particles were as bright."""
    signal, noise = parts
    scale = factors[:, None, None]
    images = scale * signal + (scale * noise if what == "image" else noise)
    particles = replace(small, images=images)
    result = of(closed, particles)
    error = log_error(result.scale, factors[:50])
    # At 3 dB and 32 px 0.025, and at most 0.08.
    assert float(error.square().mean().sqrt()) < 0.05
    assert float(error.abs().max()) < 0.1
    expected = float(factors[:50].log().std())
    assert result.population.contrast_spread == pytest.approx(expected, rel=0.15)
    assert result.shows_molecule.all()
    if what == "image":
        assert pooled_apart(result, refined) < 0.15
        torch.testing.assert_close(result.std, refined.std, rtol=0.25, atol=0)
        assert float(log_error(result.noise / refined.noise, factors[:50]).abs().max()) < 0.1
    assert score(result).explained_motion > score(refined).explained_motion - 0.05


def test_noise_of_each_particle_is_found(closed, small, refined, parts, factors):
    signal, noise = parts
    particles = replace(small, images=signal + factors[:, None, None] * noise)
    result = of(closed, particles)
    error = log_error(result.noise, small.truth.noise_std * factors[:50])
    # As well as 1023 pixels tell, 0.022.
    assert float(error.square().mean().sqrt()) < 0.03
    assert float(error.abs().max()) < 0.1
    assert abs(float(error.mean())) < 0.02
    assert result.shows_molecule.all()
    assert result.population.noise_pixels < 10, "particles hardly tell each other's noise"
    assert result.population.noise_std == pytest.approx(
        small.truth.noise_std * float(factors[:50].median()), rel=0.1
    )
    # Clear images are known better, and noisy ones less well.
    clear = factors[:50] < 0.7
    assert float((result.std / refined.std)[clear].mean()) < 0.9
    assert float((result.std / refined.std)[factors[:50] > 1.4].mean()) > 1.1
    assert score(result).explained_motion > score(refined).explained_motion - 0.08


def test_coloured_noise_is_learned(closed, small, parts):
    """1/f noise: as strong at each ring of frequencies as it was made."""
    frequency = np.fft.fftfreq(32, 1 / 32)
    radius = torch.from_numpy(np.hypot(frequency[:, None], frequency[None, :17])).float()
    signal, noise = parts
    filtered = torch.fft.irfft2(torch.fft.rfft2(noise) * radius.clamp_min(1) ** -0.5, s=(32, 32))
    particles = replace(small, images=signal + filtered * noise.std() / filtered.std())
    result = of(closed, particles, slice(70))
    rings = torch.arange(1, 16).double()
    slope = np.polyfit(rings.log(), result.population.noise_spectrum[1:16].log(), 1)[0]
    assert slope == pytest.approx(-1.0, abs=0.15)
    assert score(result).explained_motion > 0.6
    assert result.population.noise_std == pytest.approx(small.truth.noise_std, rel=0.05)
    # A particle's own noise is relative to the spectrum.
    assert float(log_error(result.noise, torch.tensor(small.truth.noise_std)).abs().max()) < 0.1


def area_under_curve(good: torch.Tensor, bad: torch.Tensor) -> float:
    """Probability that a good particle has more than a bad one."""
    more = (good[:, None] > bad[None]).double() + 0.5 * (good[:, None] == bad[None]).double()
    return float(more.mean())


@pytest.mark.parametrize("strength", ["of the noise", "of the images"])
def test_images_of_noise_are_told_from_molecules(closed, small, parts, strength):
    """A quarter of them; the others and the population are found as without."""
    junk = torch.arange(70) % 4 == 1
    images = small.read_images()
    generator = torch.Generator().manual_seed(8)
    noise = torch.randn(int(junk.sum()), 32, 32, generator=generator)
    noise_std = parts[1].std() if strength == "of the noise" else images.std()
    images[junk] = noise_std * noise
    result = of(closed, replace(small, images=images), slice(70))
    without = of(closed, small, (~junk).nonzero().squeeze(1))
    good, bad = result.responsibility[~junk], result.responsibility[junk]
    assert area_under_curve(good, bad) > 0.98
    assert result.shows_molecule.tolist() == (~junk).tolist()
    spread, expected = (
        float(one.population.covariance.diagonal().sum().sqrt()) for one in (result, without)
    )
    assert spread == pytest.approx(expected, rel=0.1)
    off = (result.population.mean - without.population.mean).abs()
    assert float(off.max()) < 0.1
    assert pooled_apart(result[~junk], without) < 0.2
    assert result.population.junk_share == pytest.approx(float(junk.double().mean()), abs=0.01)
    assert result.population.contrast == pytest.approx(without.population.contrast, rel=0.02)
    assert f"{int(junk.sum())} flagged as junk" in repr(result)
    assert result.history[-1]["junk"] == pytest.approx(float(junk.double().mean()), abs=0.01)
    # With the population given too, as of held-out particles.
    held_out = of(closed, replace(small, images=images), slice(70), population=result.population)
    assert held_out.shows_molecule.tolist() == (~junk).tolist()


def make_bright(images):
    images[7] *= 100


def make_hot(images):
    images[7, 5, 9] = 1e6


@pytest.mark.parametrize("damage", [make_bright, make_hot])
def test_one_image_does_not_move_the_others(closed, small, refined, damage):
    """100 times as bright, or with one hot pixel: 0.03 Å at most from what they are without it."""
    others = np.setdiff1d(np.arange(50), [7])
    without = of(closed, small, others)
    images = small.read_images()
    damage(images)
    result = of(closed, replace(small, images=images))
    # A bright image is a particle like any other, a hot one is none.
    is_particle = damage is make_bright
    expected = refined[others] if is_particle else without
    assert pooled_apart(result[others], expected) < 0.05
    assert float(apart(result[others], expected).max()) < 0.15
    assert result.shows_molecule[others].all() and result.shows_molecule[7] == is_particle
    for name in ("contrast", "noise_std"):
        got, before = (getattr(one.population, name) for one in (result, expected))
        assert got == pytest.approx(before, rel=0.01), name
    if is_particle:
        assert float(result.scale[7] / refined.scale[7]) == pytest.approx(100, rel=0.1)
        assert float(apart(result[[7]], refined[[7]])) < 0.3


UNUSABLE = [3, 20, 31, 44]


@pytest.fixture(scope="module")
def spoiled(small) -> ParticleStack:
    """All-zero, constant, NaN and Inf."""
    images = small.read_images()
    images[3], images[20] = 0.0, 17.0
    images[31, 4, 4] = math.nan
    images[44, 31, 0] = math.inf
    return with_images(small, images)


@pytest.fixture(scope="module")
def of_spoiled(closed, spoiled):
    with pytest.warns(UserWarning, match="images are left out") as caught:
        result = of(closed, spoiled)
    return result, caught


def test_images_that_are_no_images_are_left_out(closed, small, spoiled, of_spoiled):
    """One warning says which; the others are as without them, to the last bit."""
    result, caught = of_spoiled
    assert len(caught) == 1 and caught[0].filename == __file__, "it points at the caller"
    message = str(caught[0].message)
    assert "4 of 50 images are left out: 2 hold NaN or Inf, 2 are constant" in message
    for row in (3, 20, 31):
        assert f"{small.ids[row]} (row {row})" in message
    assert "and 1 more" in message
    rows, usable = UNUSABLE, np.setdiff1d(np.arange(50), UNUSABLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without = of(closed, small, usable)
    assert_same_rows(result, usable, without)
    assert_same_population(result, without)
    mean = result.population.mean.float().expand(4, -1)
    spread = result.population.covariance.diagonal().sqrt().float().expand(4, -1)
    torch.testing.assert_close(result.latents[rows], mean)
    torch.testing.assert_close(result.std[rows], spread)
    assert result.responsibility[rows].tolist() == [0.0] * 4
    assert result.scale[rows].tolist() == pytest.approx([result.population.contrast] * 4)
    assert result.noise[rows].isnan().all() and result.misfit[rows].isnan().all()
    assert "4 flagged as junk" in repr(result) and result.ids.tolist() == small.ids[:50].tolist()
    assert result.noise[usable].isfinite().all()


def assert_same_rows(result, rows, other):
    for name in ("latents", "std", "scale", "noise", "misfit", "responsibility"):
        assert torch.equal(getattr(result, name)[rows], getattr(other, name)), name


def assert_same_population(result, other):
    assert torch.equal(result.population.mean, other.population.mean)
    assert torch.equal(result.population.covariance, other.population.covariance)
    assert result.population.description() == other.population.description()


def test_what_is_not_known_of_them_is_what_is_known_of_all(of_spoiled):
    """Their posterior covariance is finite and no wider than the population's."""
    result, _ = of_spoiled
    covariance = posterior_covariance(result, [3, 31])
    assert covariance.isfinite().all() and torch.linalg.eigvalsh(covariance).min() > 0


def test_they_are_kept_in_files(of_spoiled, tmp_path):
    result, _ = of_spoiled
    result.save(tmp_path / "r.safetensors")
    assert_same(load_result(tmp_path / "r.safetensors"), result)


def test_a_start_is_one_of_the_particles_that_are_left(closed, small, spoiled):
    """Rows of the start stay those of their particles."""
    start = small.truth.latents[:50]
    usable = np.setdiff1d(np.arange(50), UNUSABLE)
    with pytest.warns(UserWarning, match="4 of 50 images are left out"):
        result = of(closed, spoiled, start=start, blurs=(0.0,))
    without = of(closed, small, usable, start=start[usable], blurs=(0.0,))
    assert_same_rows(result, usable, without)


def test_held_out_particles_may_be_no_images_too(closed, small, spoiled, refined):
    usable = np.setdiff1d(np.arange(50), UNUSABLE)
    with pytest.warns(UserWarning, match="4 of 50 images are left out"):
        result = of(closed, spoiled, population=refined.population)
    without = of(closed, small, usable, population=refined.population)
    assert_same_rows(result, usable, without)
    assert result.responsibility[UNUSABLE].tolist() == [0.0] * 4


@pytest.mark.parametrize("n_looks", [4, 13])
def test_a_run_with_them_that_was_cut_goes_on(closed, spoiled, of_spoiled, tmp_path, n_looks):
    settings = {"batch_size": 13, "checkpoint": tmp_path / "run.safetensors"}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut_after(patch, n_looks)
        with pytest.warns(UserWarning, match="4 of 50 images"):
            of(closed, spoiled, **settings)
    with pytest.warns(UserWarning, match="4 of 50 images"):
        whole = of(closed, spoiled, batch_size=13)
    with pytest.warns(UserWarning, match="4 of 50 images"):
        resumed = of(closed, spoiled, **settings)
    assert_same(resumed, whole)


def test_images_of_which_none_is_one(closed, small):
    images = torch.zeros(70, 32, 32)
    images[:40] = math.nan
    sentence = "expected images, got 50 that are constant or hold NaN or Inf; try"
    with pytest.raises(ValueError, match=sentence):
        of(closed, with_images(small, images))


def test_images_of_nothing_but_noise(closed, small, parts, refined):
    """No population is learned from them; with one that is known, all are junk."""
    noise = with_images(small, parts[1])
    sentence = r"got 50 that look like noise to it \(.* standard deviations\); try other poses"
    with pytest.raises(ValueError, match=sentence):
        of(closed, noise)
    result = of(closed, noise, population=refined.population)
    assert not result.shows_molecule.any() and result.latents.isfinite().all()


def test_a_run_resumes_with_all_that_it_knew_of_each_particle(
    closed, small, parts, factors, tmp_path
):
    """Brightness, noise, spectrum and responsibility that differ between particles."""
    signal, noise = parts
    images = factors[:, None, None] * signal + factors.flip(0)[:, None, None] * noise
    images[::5] = noise[::5]
    particles = replace(small, images=images)
    settings = {"batch_size": 13, "rows": slice(40)}
    whole = of(closed, particles, **settings)
    assert 0 < (~whole.shows_molecule).sum() < 40
    for n_looks in (5, 12):
        checkpoint = tmp_path / f"run{n_looks}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            cut_after(patch, n_looks)
            of(closed, particles, checkpoint=checkpoint, **settings)
        assert_same(of(closed, particles, checkpoint=checkpoint, **settings), whole)


# Bad input


def test_particles_of_another_size(closed, small):
    other_box = Model(closed, box_size=64, pixel_size=small.pixel_size, modes=None)
    other_pixel = Model(closed, box_size=32, pixel_size=1.1 * small.pixel_size, modes=None)
    for model in (other_box, other_pixel):
        with pytest.raises(ValueError, match="expected particles of .* px × .* Å, got 32 px"):
            refine(model, small[:5], progress=False)


def test_population_of_another_molecule(closed, small, refined):
    fingerprint = refined.population.fingerprint | {"structure": "another"}
    other = replace(refined.population, fingerprint=fingerprint)
    sentence = "expected a population of Model.*got one of another model: .*its structure or bodies"
    with pytest.raises(ValueError, match=sentence):
        refine(make_model(closed, small), small[:5], other, progress=False)


def test_start_of_another_shape(closed, small):
    with pytest.raises(ValueError, match=r"expected .*start.* of shape \(5, 16\), got \(5, 3\)"):
        refine(make_model(closed, small), small[:5], start=torch.zeros(5, 3), progress=False)


def with_images(particles, images) -> ParticleStack:
    return replace(particles, images=images, truth=None)


def test_protein_dark_images(closed, small):
    with pytest.raises(ValueError, match="expected protein-bright images.*invert=True"):
        dark = with_images(small, -small.read_images())
        refine(make_model(closed, small), dark, progress=False)


def test_quiet_when_asked(closed, small, capfd):
    refine(make_model(closed, small), small[:5], blurs=(0.0,), progress=False)
    assert capfd.readouterr() == ("", "")
    refine(make_model(closed, small), small[:5], blurs=(0.0,), progress=True)
    assert "refining" in capfd.readouterr().err


def test_binning_while_reading_is_binning_before(closed, opened, tmp_path):
    particles = simulate_particles(
        closed,
        40,
        conformations=morph(closed, opened, 20),
        box_size=64,
        snr_db=-3.0,
        shift_std=2.0,
        seed=6,
        progress=False,
    )
    particles.save(tmp_path / "whole.star")
    while_reading = load_particles(tmp_path / "whole.star", box_size=32)
    while_reading.save(tmp_path / "binned.star")
    before = load_particles(tmp_path / "binned.star")
    torch.testing.assert_close(before.read_images(), while_reading.read_images(), atol=1e-5, rtol=0)
    one, other = (
        refine(make_model(closed, stack), stack, blurs=(6.0, 3.0), progress=False)
        for stack in (while_reading, before)
    )
    assert ((one.latents - other.latents).abs() / one.std).max() < 0.01
