"""An encoder that is given residuals: what they are, what it learns, what it refuses."""

import inspect
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from cryochains._files import load_tensors, save_tensors
from cryochains.analysis import compute_pca
from cryochains.inference import (
    ResidualEncoder,
    Result,
    encode,
    estimate,
    load_encoder,
    refine,
    score,
    train_residual_encoder,
)
from cryochains.inference.residuals import centred_spectra
from cryochains.model import PRETRAINED_FOLDER, Model, Population, load_population
from cryochains.model import simulate_particles as simulate
from cryochains.molecule import morph

QUIET = {"progress": False}
DRAWS = 9600


@pytest.fixture(scope="module")
def path(pair):
    return morph(*pair, n=20)


def make_particles(structure, path, n=60, seed=1, box=32, pixel=None, **settings):
    settings = {"snr_db": 3.0, **settings}
    return simulate(
        structure,
        n,
        conformations=path,
        box_size=box,
        pixel_size=pixel,
        seed=seed,
        progress=False,
        **settings,
    )


@pytest.fixture(scope="module")
def particles(pair, path):
    return make_particles(pair[0], path, shift_std=2.0)


@pytest.fixture(scope="module")
def result(pair, particles):
    model = Model(pair[0], particles, modes=2)
    return refine(model, particles, blurs=(8.0, 4.0, 0.0), **QUIET)


@pytest.fixture(scope="module")
def encoder(result):
    return train_residual_encoder(result, draws=DRAWS, batch_size=32, learning_rate=5e-3, **QUIET)


@pytest.fixture(scope="module")
def others(pair, path, particles):
    return make_particles(pair[0], path, n=80, seed=2, pixel=particles.pixel_size, shift_std=2.0)


def test_answers_are_near_those_of_a_known_population(encoder, result, others):
    scores = []
    for answer in (
        encode(encoder, others),
        estimate(encoder.model, others, result.population, **QUIET),
    ):
        scores.append(score(answer, compute_pca(answer)))
    encoded, estimated = scores
    assert encoded.explained_motion > 0.6
    assert encoded.explained_motion > estimated.explained_motion - 0.1
    assert encoded.spearman > 0.9


def test_answer_is_a_result_with_error_bars(encoder, others):
    answer = encode(encoder, others)
    assert isinstance(answer, Result) and answer.kind == "encoded"
    assert answer.particles is others and answer.ids.tolist() == others.ids.tolist()
    assert answer.population is encoder.population and answer.verdict is None
    wide = encoder.population.covariance.diagonal().sqrt().float()
    assert (answer.std > 0).all() and (answer.std < 1.5 * wide + 1e-3).all()
    assert answer.std.sum() < 0.9 * wide.sum() * len(others), "images tell something"
    truth = others.truth.noise_std
    assert answer.noise.median() == pytest.approx(truth, rel=0.1)
    assert answer.scale.median() == pytest.approx(1.0, rel=0.1)
    assert (
        refine(encoder.model, others, encoder.population, start=answer, blurs=(0.0,), **QUIET).kind
        == "refined"
    )


def test_answers_stay_in_the_leading_directions(encoder, others):
    moved = (encode(encoder, others).latents - encoder.population.mean.float()).double()
    directions = encoder.directions
    along = torch.linalg.lstsq(directions, moved.T).solution
    torch.testing.assert_close((directions @ along).T, moved, rtol=0, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 3.0, 1e4])
def test_brightness_does_not_matter(encoder, others, factor):
    """Signal and noise together, whatever the grey levels."""
    given = encode(encoder, others)
    brighter = encode(encoder, replace(others, images=factor * others.read_images()))
    torch.testing.assert_close(brighter.latents, given.latents, rtol=0, atol=2e-3)
    torch.testing.assert_close(brighter.std, given.std, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(brighter.scale, factor * given.scale, rtol=1e-3, atol=0)
    torch.testing.assert_close(brighter.noise, factor * given.noise, rtol=1e-3, atol=0)


def test_a_background_does_not_matter(encoder, others):
    given = encode(encoder, others)
    grey = encode(encoder, replace(others, images=others.read_images() + 3.0))
    torch.testing.assert_close(grey.latents, given.latents, rtol=0, atol=2e-3)


def test_order_and_batch_size_do_not_matter(encoder, others):
    given = encode(encoder, others)
    order = [5, 3, 70, 1]
    for batch_size in (1, 7, 64):
        some = encode(encoder, others, batch_size=batch_size)
        torch.testing.assert_close(some.latents, given.latents, rtol=0, atol=1e-4)
    some = encode(encoder, others[order])
    torch.testing.assert_close(some.latents, given.latents[order], rtol=0, atol=1e-4)
    assert some.ids.tolist() == others.ids[order].tolist()


def test_shifts_are_undone(encoder, pair, path, particles):
    """The same particles, noise included, elsewhere in their boxes."""
    still = make_particles(pair[0], path, n=12, seed=3, pixel=particles.pixel_size)
    pixels = torch.tensor([2, -3])
    images = still.read_images().roll((int(pixels[1]), int(pixels[0])), dims=(1, 2))
    shifts = still.shifts + particles.pixel_size * pixels
    moved = replace(still, images=images, shifts=shifts)
    torch.testing.assert_close(
        encode(encoder, moved).latents, encode(encoder, still).latents, rtol=0, atol=2e-3
    )


def test_centred_spectra_shift_back():
    images = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    moved = images.roll((2, -1), dims=(1, 2))
    shifts = 1.5 * torch.tensor([[-1.0, 2.0]]).expand(3, -1)
    expected = torch.fft.rfft2(images, norm="ortho")
    centred = centred_spectra(moved, shifts, 1.5)
    # A shift of the highest frequency has a sign of its own.
    torch.testing.assert_close(centred[:, :8, :8], expected[:, :8, :8], rtol=0, atol=1e-4)


def test_gradient_is_that_of_the_likelihood(encoder, others):
    """The residual's products with tangents sum up to the derivative of χ²."""
    expected = encoder.expected_images("cpu")
    batch = next(others.batches(3))
    observed = centred_spectra(batch.images, batch.shifts, others.pixel_size)
    clues = expected.clues(observed, batch.ctf, expected.spectra(batch.rotations))
    images = batch.images / clues.scale[:, None, None]
    spread = expected.spread
    at = expected.mean - 0.9 * spread[0] * expected.basis[:, 0]
    whiten = expected.relative_spectrum.rsqrt()

    def chi_square(weights):
        latents = at + weights @ expected.basis.T
        drawn = expected.model.render(latents, *batch.pose)
        rest = torch.fft.rfft2(images - drawn, norm="ortho") * whiten
        rest[:, 0, 0] = 0
        counted = torch.fft.irfft2(rest, s=images.shape[-2:], norm="ortho")
        noise = (clues.noise_std / clues.scale)[:, None, None]
        return (counted / noise).square().sum((1, 2))

    weights = torch.zeros(3, len(spread), requires_grad=True)
    chi_square(weights).sum().backward()
    slope = -0.5 * weights.grad[:, 0] * spread[0]
    n_blurs = clues.detail.shape[1] + 1
    k = len(spread)
    numbers = clues.numbers[:, 2 * n_blurs :]
    steps = numbers[:, : k * n_blurs].view(3, n_blurs, k)[:, -1]
    log_std = numbers[:, k * n_blurs : 2 * k * n_blurs].view(3, n_blurs, k)[:, -1]
    assert k == 1
    # The renderer's own gradient and the analytic tangents differ near the Nyquist frequency.
    torch.testing.assert_close(steps[:, 0], slope * (2 * log_std[:, 0]).exp(), rtol=0.1, atol=0.05)


# Refused


def assert_refused(encoder, particles, sentence):
    with pytest.raises(ValueError, match=sentence):
        encode(encoder, particles)


def test_other_boxes_and_pixel_sizes_are_refused(encoder, pair, path, particles):
    pixel = particles.pixel_size
    for box, size in ((48, pixel), (32, 1.1 * pixel)):
        other = make_particles(pair[0], path, n=3, box=box, pixel=size)
        assert_refused(encoder, other, "expected particles of 32 px × .* Å, got")


def test_other_molecules_are_refused(encoder, pair, particles):
    closed = pair[0]
    turned = closed.coords[:, [1, 2, 0]] - closed.origin[[1, 2, 0]] + closed.origin
    small = 0.6 * (closed.coords - closed.origin) + closed.origin
    for coords in (turned, small):
        other = make_particles(closed, coords[None], n=40, pixel=particles.pixel_size)
        assert_refused(encoder, other, "expected images .*, got")


def test_other_noise_is_refused(encoder, pair, path, particles):
    pixel = particles.pixel_size
    other = make_particles(pair[0], path, n=40, pixel=pixel, snr_db=-12.0)
    assert_refused(encoder, other, "expected images .*, got")
    white = make_particles(pair[0], path, n=40, pixel=pixel, snr_db=math.inf)
    noise = torch.randn(white.images.shape, generator=torch.Generator().manual_seed(0))
    frequency = torch.hypot(torch.fft.fftfreq(32)[:, None], torch.fft.rfftfreq(32))
    pink = torch.fft.irfft2(torch.fft.rfft2(noise) / frequency.clamp_min(0.03), s=(32, 32))
    pink = pink * particles.truth.noise_std / pink.std()
    other = replace(white, images=white.read_images() + pink)
    assert_refused(encoder, other, "expected noise of the colour that this encoder was trained on")


def test_other_ctfs_are_refused(encoder, pair, path, others):
    far = replace(others.ctf, defocus_u=4 * others.ctf.defocus_u)
    assert_refused(encoder, replace(others, ctf=far), r"expected a defocus \(µm\) from .*, got")
    slow = replace(others.ctf, voltage_kv=200 + 0 * others.ctf.voltage_kv)
    assert_refused(encoder, replace(others, ctf=slow), r"expected a voltage \(kV\) from 300")
    assert_refused(encoder, replace(others, ctf=None), "expected particles with CTFs, .*got none")


def test_inverted_images_are_refused(encoder, others):
    assert_refused(encoder, replace(others, images=-others.read_images()), "protein-bright")


@pytest.mark.parametrize("brightness", [0.5, 2.0])
def test_brightness_at_the_same_noise_is_allowed(encoder, pair, path, others, brightness):
    clean = make_particles(
        pair[0], path, 80, 2, pixel=others.pixel_size, shift_std=2.0, snr_db=math.inf
    )
    images = others.read_images() + (brightness - 1) * clean.read_images()
    answer = encode(encoder, replace(others, images=images))
    assert answer.scale.median() == pytest.approx(brightness, rel=0.1)
    assert score(answer, compute_pca(answer)).explained_motion > 0.5


def test_unusable_images_are_left_out(encoder, others):
    images = others.read_images().clone()
    images[3, 4, 5] = torch.nan
    images[7] = 1.0
    given = encode(encoder, others)
    with pytest.warns(UserWarning, match="2 of 80 images are left out"):
        answer = encode(encoder, replace(others, images=images))
    usable = torch.ones(80, dtype=torch.bool)
    usable[[3, 7]] = False
    assert answer.responsibility.tolist() == usable.float().tolist()
    torch.testing.assert_close(answer.latents[usable], given.latents[usable], rtol=0, atol=1e-4)
    mean = encoder.population.mean.float().expand(2, -1)
    torch.testing.assert_close(answer.latents[~usable], mean)


# Training


def test_training_says_how_it_went(encoder):
    assert encoder.training["draws"] == DRAWS and len(encoder.history) == 10
    first, last = encoder.history[0], encoder.history[-1]
    assert last["held_out_loss"] < 0.5 * first["held_out_loss"]
    assert last["explained_motion"] > 0.5
    assert repr(encoder).startswith("ResidualEncoder('glua3-closed', 32 px × ")


def test_images_of_the_result_teach_nothing(result, others):
    """Nor do they stand in the way: only CTFs and the population count."""
    settings = {"draws": 64, "batch_size": 32, **QUIET}
    plain = train_residual_encoder(result, **settings)
    nothing = replace(result.particles, images=torch.randn(result.particles.images.shape))
    blind = train_residual_encoder(replace(result, particles=nothing), **settings)
    for one, other in zip(plain.network.parameters(), blind.network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_run_that_was_cut_gives_the_same_numbers(result, tmp_path, monkeypatch):
    settings = {"draws": 320, "batch_size": 16, "seed": 4, **QUIET}
    whole = train_residual_encoder(result, **settings)
    # Its module: where the examples in docstrings are tested too, pytest imports another.
    module = inspect.unwrap(train_residual_encoder).__globals__
    path, save = tmp_path / "checkpoint", module["_save"]
    written = []

    def save_three_times(*arguments):
        save(*arguments)
        written.append(1)
        if len(written) == 3:
            raise KeyboardInterrupt

    monkeypatch.setitem(module, "_save", save_three_times)
    with pytest.raises(KeyboardInterrupt):
        train_residual_encoder(result, checkpoint=path, **settings)
    monkeypatch.undo()
    resumed = train_residual_encoder(result, checkpoint=path, **settings)
    assert resumed.history == whole.history
    for name, weights in whole.network.state_dict().items():
        assert torch.equal(weights, resumed.network.state_dict()[name]), name
    with pytest.raises(ValueError, match="differs in width in"):
        train_residual_encoder(result, checkpoint=path, width=8, **settings)
    with pytest.raises(ValueError, match="differs in result in"):
        train_residual_encoder(result[:40], checkpoint=path, **settings)


def test_the_seed_decides(result):
    settings = {"draws": 32, "batch_size": 16, **QUIET}
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    first, again, other = (
        train_residual_encoder(result, seed=seed, **settings) for seed in (0, 0, 1)
    )
    assert torch.equal(torch.rand(2), expected), "the caller's random state is left alone"
    assert first.history == again.history and first.history != other.history


def test_without_ctfs(pair, path):
    particles = make_particles(pair[0], path, n=20, ctf=False)
    model = Model(pair[0], particles, modes=None)
    result = refine(model, particles, blurs=(8.0, 0.0), **QUIET)
    encoder = train_residual_encoder(result, draws=64, batch_size=32, **QUIET)
    assert not encoder.ctf and len(encode(encoder, particles)) == 20
    with_ctf = make_particles(pair[0], path, n=5, pixel=particles.pixel_size)
    assert_refused(encoder, with_ctf, "expected particles with no CTFs, .* got some")


def test_what_cannot_be_trained_on(result):
    with pytest.raises(ValueError, match="expected a result with .* without a population; try"):
        train_residual_encoder(replace(result, population=None, scale=None))
    with pytest.raises(ValueError, match="expected a result with .* without its particles; try"):
        train_residual_encoder(replace(result, particles=None))
    with pytest.raises(ValueError, match="expected draws to be a whole number of 1 or more"):
        train_residual_encoder(result, draws=0)
    population = result.population
    p = len(population.mean)
    broad = replace(population, covariance=torch.eye(p, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected a population that moves in few directions"):
        train_residual_encoder(replace(result, population=broad), draws=64, **QUIET)


# Saved and read


def test_a_saved_encoder_comes_back_bit_for_bit(encoder, others, tmp_path):
    file = tmp_path / "encoder.safetensors"
    encoder.save(file)
    again = load_encoder(file)
    assert isinstance(again, ResidualEncoder) and repr(again) == repr(encoder)
    for name, weights in encoder.network.state_dict().items():
        assert torch.equal(weights, again.network.state_dict()[name]), name
    assert again.history == encoder.history and again.training == encoder.training
    assert again.ctf == encoder.ctf and torch.equal(again.detail, encoder.detail)
    assert again.model.fingerprint == encoder.model.fingerprint
    given, answer = encode(encoder, others), encode(again, others)
    assert torch.equal(answer.latents, given.latents) and torch.equal(answer.std, given.std)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == file.read_bytes()


def test_damaged_files_are_one_sentence(encoder, tmp_path):
    file = tmp_path / "encoder.safetensors"
    encoder.save(file)
    tensors, meta = load_tensors(file, "encoder")
    fewer = {name: tensor for name, tensor in tensors.items() if "layers.0" not in name}
    for changed, described in (
        (fewer, meta),
        (tensors, meta | {"population": None}),
        (tensors, {name: part for name, part in meta.items() if name != "ctf"}),
    ):
        save_tensors(file, changed, described)
        with pytest.raises(ValueError, match="expected an encoder file, got one that is damaged"):
            load_encoder(file)


# The encoder of the package

IN_A_FRESH_INTERPRETER = """
import cryochains as cc
from cryochains.inference import load_encoder
encoder = load_encoder("glua3")
closed, opened = cc.match_structures(
    cc.load_structure("glua3-closed"), cc.load_structure("glua3-open")
)
cc.model.require_same_model(
    cc.Model(closed, modes=20, box_size=64, pixel_size=1.94), encoder.model.fingerprint, "x"
)
print(encoder)
"""


def test_the_encoder_of_the_package_opens_by_name():
    done = subprocess.run(
        [sys.executable, "-c", IN_A_FRESH_INTERPRETER], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ResidualEncoder('glua3-closed', 64 px × 1.94 Å, 1 direction")


def test_the_encoder_of_the_package_is_small_and_has_a_card():
    file = PRETRAINED_FOLDER / "glua3-encoder.safetensors"
    assert file.stat().st_size < 3e6
    card = file.with_suffix(".md").read_text()
    assert all(word in card for word in ("Data", "Training", "Scores", "Limits"))
    population, own = load_encoder("glua3").population, load_population("glua3")
    assert torch.equal(population.mean, own.mean) and isinstance(population, Population)


@pytest.mark.parametrize("snr_db", [20.0, -12.0])
def test_the_encoder_of_the_package_refuses_other_noise(pair, snr_db):
    particles = make_particles(
        pair[0], morph(*pair, n=50), n=40, seed=72, box=64, pixel=1.94, snr_db=snr_db
    )
    assert_refused(load_encoder("glua3"), particles, "expected images with a brightness over noise")


def test_the_encoder_of_the_package_answers_other_particles(pair):
    particles = make_particles(
        pair[0], morph(*pair, n=50), n=100, seed=71, box=64, pixel=1.94, snr_db=0.0
    )
    answer = encode(load_encoder("glua3"), particles)
    scores = score(answer, compute_pca(answer))
    assert scores.explained_motion > 0.8 and scores.spearman > 0.98
