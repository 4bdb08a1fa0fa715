"""What images tell of themselves: brightness, noise, and whether they show the molecule at all."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains.images import ParticleStack
from cryochains.inference import measure_contrast, normal_equations
from cryochains.inference.image_model import (
    MODEL_ERROR,
    FirstLook,
    _weighted_median,
    describe_unusable,
    learn_junk_share,
    learn_noise,
    learn_scales,
    look_first,
    normalised_spectrum,
    outlier_evidence,
    require_visible,
    responsibilities,
    start_scales,
    tail_weight,
)
from cryochains.inference.likelihood import frequency_band
from cryochains.model import Model, simulate_particles
from cryochains.molecule import morph

N, BOX = 60, 32


@pytest.fixture(scope="module")
def particles(closed):
    # Without noise: what is measured from them is exact.
    return simulate_particles(
        closed,
        N,
        conformations=closed.coords[None],
        box_size=BOX,
        pixel_size=5.0,
        snr_db=np.inf,
        shift_std=2.0,
        progress=False,
    )


@pytest.fixture(scope="module")
def rigid(closed, particles):
    return Model(closed, particles, modes=None)


@pytest.fixture(scope="module")
def scales():
    """Brightness of each particle, over a factor of four."""
    generator = torch.Generator().manual_seed(4)
    return 2 ** (2 * torch.rand(N, generator=generator) - 1)


def with_images(particles, images) -> ParticleStack:
    return replace(particles, images=images, truth=None)


def scaled(particles, factor, offset=0.0) -> ParticleStack:
    if isinstance(factor, torch.Tensor):
        factor = factor[:, None, None]
    return with_images(particles, factor * particles.read_images() + offset)


def white(n, seed=0, box=BOX) -> torch.Tensor:
    return torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))


def coloured(n, exponent, seed=0) -> torch.Tensor:
    """(n, box, box) images of noise whose variance at the frequency |k| is |k| ** -exponent."""
    frequency = np.fft.fftfreq(BOX, 1 / BOX)
    radius = np.hypot(frequency[:, None], frequency[None, : BOX // 2 + 1])
    radius[0, 0] = 1
    amplitude = torch.from_numpy(radius ** (-exponent / 2)).float()
    transform = torch.fft.rfft2(white(n, seed))
    return torch.fft.irfft2(transform * amplitude, s=(BOX, BOX))


# The first look


@pytest.mark.parametrize("factor", [1.0, 0.02, 350.0])
def test_brightness_of_each_image_is_found(rigid, particles, scales, factor):
    """Exactly where the reference is all there is, whatever the background."""
    look = look_first(rigid, scaled(particles, factor * scales, 3 * factor))
    torch.testing.assert_close(look.scale, factor * scales, rtol=1e-3, atol=0)
    assert look.usable.all() and look.finite.all()
    assert look.visibility > 10


def test_batches_and_rows_change_nothing(rigid, particles, scales):
    noisy = with_images(particles, scaled(particles, scales).read_images() + 0.05 * white(N))
    whole = look_first(rigid, noisy)
    parts = look_first(rigid, noisy, batch_size=7)
    order = np.random.default_rng(0).permutation(N)
    mixed = look_first(rigid, noisy[order])
    for other, rows in ((parts, slice(None)), (mixed, order)):
        torch.testing.assert_close(other.scale, whole.scale[rows])
        torch.testing.assert_close(other.error, whole.error[rows])
        torch.testing.assert_close(other.noise_spectrum, whole.noise_spectrum, rtol=1e-4, atol=0)
        assert other.noise_level == pytest.approx(whole.noise_level, rel=1e-4)


def test_error_of_the_brightness_is_what_noise_does_to_it(rigid, particles):
    """Up to a factor of 2, which the blur makes it too large by, and never less."""
    strong = 20 * float(particles.read_images().std())
    signal = particles[:1].read_images()
    one = particles[[0] * N]
    stack = with_images(one, signal + strong * white(N))
    look = look_first(rigid, replace(stack, ids=np.arange(N)))
    # Of 60 draws, a standard deviation is known to 9 %.
    assert 0.5 < float(look.scale.std() / look.error.median()) < 1.0


BROKEN = {
    "NaN": lambda images: images.view(-1)[7:8].fill_(math.nan),
    "Inf": lambda images: images.view(-1)[7:8].fill_(math.inf),
    "-Inf": lambda images: images.view(-1)[7:8].fill_(-math.inf),
    "both": lambda images: images.view(-1)[7:9].copy_(torch.tensor([math.inf, -math.inf])),
    "zeros": lambda images: images.zero_(),
    "constant": lambda images: images.fill_(1234.5),
    "nearly constant": lambda images: images.fill_(1e7).view(-1)[3:4].add_(1.0),
    "huge": lambda images: images.mul_(1e20),
    "one huge pixel": lambda images: images.view(-1)[7:8].fill_(1e20),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_images_that_are_no_images_are_flagged(rigid, particles, kind):
    """One and several of them, wherever they are in their batch; the others are as without."""
    rows = [0, 13, 41]
    images = particles.read_images() + 0.05 * white(N)
    others = np.setdiff1d(np.arange(N), rows)
    without = look_first(rigid, with_images(particles, images)[others])
    for row in rows:
        BROKEN[kind](images[row])
    look = look_first(rigid, with_images(particles, images), batch_size=13)
    assert (~look.usable).nonzero().squeeze(1).tolist() == rows
    finite = kind not in ("NaN", "Inf", "-Inf", "both")
    assert look.finite[rows].tolist() == [finite] * 3
    assert look.scale[rows].tolist() == [0, 0, 0]
    assert look.scale.isfinite().all() and look.error.isfinite().all()
    torch.testing.assert_close(look.scale[others], without.scale, rtol=1e-4, atol=1e-5)
    assert look.visibility == pytest.approx(without.visibility, rel=1e-3)
    assert look.noise_level == pytest.approx(without.noise_level, rel=0.1)


def test_a_whole_batch_may_be_unusable(rigid, particles):
    images = particles.read_images()
    images[10:20] = math.nan
    look = look_first(rigid, with_images(particles, images), batch_size=10)
    assert int(look.usable.sum()) == N - 10 and not look.usable[10:20].any()


def test_no_image_is_usable(rigid, particles):
    images = torch.zeros(N, BOX, BOX)
    images[3:] = math.nan
    look = look_first(rigid, with_images(particles, images))
    assert not look.usable.any() and look.finite.tolist() == [True] * 3 + [False] * (N - 3)
    with pytest.raises(ValueError, match="expected images, got 60 that are constant or hold NaN"):
        require_visible(look, learns=True)
    require_visible(look, learns=False)


def test_images_that_are_small_or_large_numbers_are_images(rigid, particles, scales):
    """Grey levels are whatever the microscope wrote."""
    for factor in (1e-12, 1e12):
        look = look_first(rigid, scaled(particles, factor * scales))
        assert look.usable.all(), factor
        torch.testing.assert_close(look.scale / factor, scales, rtol=1e-3, atol=0)
        assert (look.noise_spectrum > 0).all() and look.noise_spectrum.isfinite().all()


# The noise


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_spectrum_of_white_noise_is_flat(rigid, particles, scale):
    """Also below the molecule, that stands out of it."""
    signal = scale * particles.read_images()
    noise_std = 3 * float(particles.read_images().std())
    look = look_first(rigid, with_images(particles, signal + noise_std * white(N)))
    pixels = frequency_band(rigid.microscope).ring_pixels
    spectrum = look.noise_spectrum[1:]
    # Medians of 60 images of chi² with as many degrees of freedom as the ring has pixels.
    off = (spectrum - 1).abs() / (1.25 * (2 / (N * pixels[1:])).sqrt() + 0.7 / pixels[1:])
    assert float(off.max()) < 4, off
    assert look.noise_level**0.5 == pytest.approx(noise_std, rel=0.02)
    assert float((look.noise_spectrum * pixels).sum() / pixels.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("exponent", [1.0, 2.0, -1.0])
def test_spectrum_of_coloured_noise_has_its_slope(rigid, particles, exponent):
    noise = coloured(N, exponent)
    noise = noise / noise.std() * 3 * float(particles.read_images().std())
    look = look_first(rigid, with_images(particles, particles.read_images() + noise))
    radius = torch.arange(2, BOX // 2, dtype=torch.float64)
    slope = np.polyfit(radius.log(), look.noise_spectrum[2 : BOX // 2].log(), 1)[0]
    assert slope == pytest.approx(-exponent, abs=0.1)
    middle = float(noise.var(dim=(1, 2)).median())
    assert look.noise_level == pytest.approx(middle, rel=0.05)


def test_some_images_do_not_tell_the_spectrum_of_the_others(rigid, particles):
    """A tenth of them a hundred times as noisy, and brighter by as much."""
    noise_std = 3 * float(particles.read_images().std())
    images = particles.read_images() + noise_std * white(N)
    plain = look_first(rigid, with_images(particles, images))
    images[::10] = 100 * images[::10] + 1e4 * coloured(N // 10, 3.0)
    look = look_first(rigid, with_images(particles, images))
    assert look.noise_level == pytest.approx(plain.noise_level, rel=0.05)
    ratio = look.noise_spectrum / plain.noise_spectrum
    assert 0.8 < float(ratio.min()) and float(ratio.max()) < 1.25


def test_spectra_are_relative_to_their_mean():
    """Over all pixels; and no ring is thought to be without noise."""
    pixels = torch.tensor([0.0, 8, 12, 30, 50], dtype=torch.float64)
    level = torch.tensor([7.0, 4, 3, 2, 1], dtype=torch.float64)
    excess, power = level * pixels, torch.zeros(5).double()
    spectrum, mean = normalised_spectrum(excess, power, pixels)
    assert float((spectrum * pixels).sum() / pixels.sum()) == pytest.approx(1.0)
    torch.testing.assert_close(mean * spectrum[1:], level[1:])
    assert mean == pytest.approx(float(excess.sum() / pixels.sum()))
    assert spectrum[0] == spectrum[1], "the mean of an image is not known"
    # Ten times as much is the same shape.
    again, larger = normalised_spectrum(10 * excess, power, pixels)
    torch.testing.assert_close(again, spectrum)
    assert larger == pytest.approx(10 * mean)
    # Where nothing is left beside the signal, an error of the model still is.
    empty = excess.clone()
    empty[2] = -5
    floored, mean = normalised_spectrum(empty, 100 * pixels, pixels)
    assert float(floored.min()) > 0
    assert mean * float(floored[2]) == pytest.approx(MODEL_ERROR**2 * 100, rel=1e-2)


@pytest.mark.parametrize("spread", [0.0, 0.2, 0.6])
@pytest.mark.parametrize("n_independent", [100.0, 1000.0])
def test_noise_levels_that_particles_have_of_their_own(spread, n_independent):
    """Measured variances are chi² around each particle's own; the prior says how far those are."""
    rng = np.random.default_rng(0)
    own = 4.0 * np.exp(spread * rng.normal(size=4000))
    measured = torch.from_numpy(own * rng.chisquare(n_independent, 4000) / n_independent)
    level, pixels = learn_noise(measured, torch.ones(4000), n_independent)
    assert level == pytest.approx(4.0, rel=0.03)
    # Of gamma distributed precisions 2 / pixels is the variance of the log. Less than what chance
    # does can not be seen.
    smallest = (2 / n_independent) ** 0.5
    assert (2 / pixels) ** 0.5 == pytest.approx(max(spread, smallest), rel=0.1)
    # Junk has no say, and a few broken images little.
    weights = torch.ones(4000)
    weights[:1500] = 0
    spoiled = measured.clone()
    spoiled[:1500] = 1e6
    again, of_some = learn_noise(spoiled, weights, n_independent)
    assert again == pytest.approx(level, rel=0.03)
    assert of_some == pytest.approx(pixels, rel=0.15)
    spoiled = measured.clone()
    spoiled[:40] = 1e12
    assert learn_noise(spoiled, torch.ones(4000), n_independent)[0] == pytest.approx(
        level, rel=0.02
    )


# Brightness


@pytest.mark.parametrize("factor", [1.0, 0.02, 350.0])
def test_contrast_is_measured(rigid, particles, factor):
    # A constant background is no brightness of the molecule.
    bright = scaled(particles, factor, 3 * factor)
    assert measure_contrast(rigid, bright) == pytest.approx(factor, rel=1e-3)


def test_contrast_is_that_of_the_middle(rigid, particles, scales):
    bright = scales.clone()
    bright[:5] = 1000
    middle = float(bright.median())
    assert measure_contrast(rigid, scaled(particles, bright)) == pytest.approx(middle, rel=1e-3)


def test_motion_does_not_dim_the_images(pair):
    closed, opened = pair
    path = morph(closed, opened, 10)
    moving = simulate_particles(
        closed, 200, conformations=path, box_size=48, snr_db=0.0, seed=0, progress=False
    )
    model = Model(closed, moving, modes=None)
    assert measure_contrast(model, moving) == pytest.approx(1.0, abs=0.06)


def test_contrast_from_some_of_the_particles(rigid, particles):
    assert measure_contrast(rigid, particles, n=10) == pytest.approx(1.0, rel=1e-3)
    assert measure_contrast(rigid, particles[:1]) == pytest.approx(1.0, rel=1e-3)


def test_protein_dark_images_are_noticed(rigid, particles):
    with pytest.raises(ValueError, match=r"expected protein-bright images.*invert=True"):
        measure_contrast(rigid, scaled(particles, -1.0))


def test_images_that_are_not_numbers_have_no_brightness(rigid, particles):
    """The others have; without any there is none."""
    images = particles.read_images()
    images[3, 5, 5] = math.nan
    assert measure_contrast(rigid, with_images(particles, images)) == pytest.approx(1.0, rel=1e-3)
    with pytest.raises(ValueError, match="expected images, got 1 that are constant or hold NaN"):
        measure_contrast(rigid, with_images(particles, images)[3:4])


def test_what_images_show(rigid, particles):
    """The reference, its negative, or neither."""
    signal, noise = particles.read_images(), white(N)
    for images, shown in ((signal, 1), (signal + noise, 1), (noise, 0), (-signal, -1)):
        look = look_first(rigid, with_images(particles, images))
        for learns in (True, False):
            if shown < 0:
                with pytest.raises(ValueError, match="expected protein-bright images"):
                    require_visible(look, learns)
            elif not shown and learns:
                with pytest.raises(ValueError, match="got 60 that look like noise to it .* try"):
                    require_visible(look, learns)
            else:
                require_visible(look, learns)


@pytest.mark.parametrize("exponent", [0.0, 1.0])
def test_noise_is_hardly_ever_visible(rigid, particles, exponent):
    """Its visibility spreads by no more than that of a standard deviation, and is none."""
    seen = [
        look_first(rigid, with_images(particles, coloured(N, exponent, seed))).visibility
        for seed in range(30)
    ]
    assert abs(np.mean(seen)) < 4 / 30**0.5
    assert 0.3 < np.std(seen) < 1.2


def made(scale, error) -> FirstLook:
    scale = torch.as_tensor(scale)
    every = torch.ones(len(scale), dtype=torch.bool)
    error = torch.as_tensor(error).expand(len(scale))
    sums = torch.zeros(len(scale), dtype=torch.int64)
    return FirstLook(every, every, scale, error, torch.ones(BOX // 2 + 1), 1.0, sums)


@pytest.mark.parametrize("center", [1.0, 40.0])
def test_first_scales_are_those_seen_where_they_are_clear(center):
    """And nearly the middle's where noise hides them."""
    scales = center * (0.4 * torch.randn(500, generator=torch.Generator().manual_seed(0))).exp()
    log_scale, mean, spread = start_scales(made(scales, 1e-3 * center), None)
    torch.testing.assert_close(log_scale, scales.log(), rtol=0, atol=1e-3)
    assert mean == pytest.approx(math.log(center), abs=0.06)
    assert spread == pytest.approx(0.4, rel=0.15)
    # Noise as strong as at -15 dB: images seem to be from nothing to twice as bright.
    noise = 0.4 * center * torch.randn(500, generator=torch.Generator().manual_seed(1))
    equal = torch.full((500,), center)
    log_scale, mean, spread = start_scales(made(equal + noise, 0.4 * center), None)
    assert mean == pytest.approx(math.log(center), abs=0.06)
    seem = ((equal + noise) / center).clamp_min(0.1).log()
    ratio = (log_scale - mean).square().mean() / seem.square().mean()
    assert float(ratio.sqrt()) < 0.25, "by far less than they seem to"
    # And stronger: bright by chance is not taken for the middle, as few images are that clear.
    noise = 2 * center * torch.randn(500, generator=torch.Generator().manual_seed(1))
    log_scale, mean, spread = start_scales(made(scales + noise, 2 * center), None)
    assert mean == pytest.approx(math.log(center), abs=0.15)
    assert log_scale.isfinite().all()
    moved = (log_scale - mean).abs()
    assert float(moved.quantile(0.99)) < 0.5, "but for what is beyond three standard deviations"


def test_one_bright_image_starts_bright():
    """A hundred times as bright is no chance, and its error is as much larger."""
    scale = torch.ones(50)
    error = torch.full((50,), 0.2)
    scale[7], error[7] = 100.0, 20.0
    log_scale, mean, _ = start_scales(made(scale, error), None)
    assert float(log_scale[7]) == pytest.approx(math.log(100), abs=0.1)
    assert float(log_scale[:7].abs().max()) < 1e-3 and mean == 0


@pytest.mark.parametrize("share, bias", [(0.2, 0.1), (0.6, 0.3)])
def test_first_scales_where_many_images_show_nothing(share, bias):
    """Where that is most of them, the middle is that of those that show something."""
    generator = torch.Generator().manual_seed(0)
    n_shown = int(share * 500)
    scales = torch.zeros(500)
    scales[:n_shown] = 3.0 * (0.2 * torch.randn(n_shown, generator=generator)).exp()
    seen = scales + 0.4 * torch.randn(500, generator=generator)
    log_scale, mean, _ = start_scales(made(seen, 0.4), None)
    assert mean == pytest.approx(math.log(3.0), abs=bias)
    torch.testing.assert_close(
        log_scale[:n_shown].mean(), scales[:n_shown].log().mean(), rtol=0, atol=0.1
    )


def test_first_scales_within_a_known_population():
    look = made(torch.tensor([0.5, 1.0, 2.0, -3.0, 0.0]), 1e-4)
    log_scale, mean, spread = start_scales(look, (math.log(2.0), 0.3))
    assert (mean, spread) == (math.log(2.0), 0.3)
    assert log_scale[:3].tolist() == pytest.approx([math.log(0.5), 0.0, math.log(2.0)], abs=1e-3)
    # Images that show nothing or the negative are dim, and no less than so.
    assert log_scale[3] == log_scale[4] and log_scale.isfinite().all()
    unsure, _, _ = start_scales(replace(look, error=torch.full((5,), 1e3)), (math.log(2.0), 0.3))
    torch.testing.assert_close(unsure, torch.full((5,), math.log(2.0)), rtol=0, atol=1e-3)


def test_images_of_which_most_show_nothing_have_scales():
    scale = torch.tensor([-1.0, -0.5, -0.1, 0.3, -2.0])
    log_scale, mean, spread = start_scales(made(scale, 1.0), None)
    assert log_scale.isfinite().all() and math.isfinite(mean) and spread > 0
    nothing, mean, spread = start_scales(made(-scale.abs(), 1.0), None)
    assert nothing.isfinite().all() and math.isfinite(mean) and spread > 0


def test_bright_particles_are_believed_less_and_less():
    """Dim ones are as surprising as of a normal distribution."""
    surprise = torch.linspace(-50, 50, 1001, dtype=torch.float64)
    weight = tail_weight(surprise)
    assert (weight[1:] <= weight[:-1] + 1e-12).all()
    assert (weight[surprise <= 0] == 1).all() and (weight > 0).all()
    assert float(weight[-1]) < 0.01
    assert (weight <= 1).all()
    # What pulls a particle back grows no more once it is far.
    pull = (weight * surprise)[surprise > 3]
    assert (pull[1:] < pull[:-1]).all()


def test_scales_are_learned_from_what_is_known_of_each():
    """Posterior means and variances of a normal distribution give it back."""
    generator = torch.Generator().manual_seed(0)
    mean, spread, error = 0.7, 0.25, 0.2
    truth = mean + spread * torch.randn(20_000, generator=generator)
    seen = truth + error * torch.randn(20_000, generator=generator)
    share = spread**2 / (spread**2 + error**2)
    posterior = mean + share * (seen - mean)
    variance = torch.full((20_000,), share * error**2)
    ones = torch.ones(20_000)
    got = learn_scales(posterior, variance, ones, mean, spread)
    assert got[0] == pytest.approx(mean, abs=0.02)
    assert got[1] == pytest.approx(spread, rel=0.05)
    # Junk has no say; a few that are a thousand times as bright hardly any.
    junk = posterior.clone()
    junk[::4] = -2.0
    weights = ones.clone()
    weights[::4] = 0
    without = learn_scales(junk, variance, weights, mean, spread)
    assert without == pytest.approx(got, rel=0.03)
    bright = posterior.clone()
    bright[:20] += math.log(1000)
    assert learn_scales(bright, variance, ones, mean, spread)[0] == pytest.approx(got[0], abs=0.01)
    nothing = learn_scales(posterior, variance, 0 * ones, mean, spread)
    assert all(map(math.isfinite, nothing)) and nothing[1] > 0


def test_equal_particles_keep_a_width():
    mean, spread = learn_scales(torch.zeros(5), torch.zeros(5), torch.ones(5), 0.0, 0.1)
    assert mean == 0 and spread > 0


@pytest.mark.parametrize("seed", range(5))
def test_weighted_median_is_that_of_repeated_values(seed):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=31)
    counts = rng.integers(0, 6, 31)
    if counts.sum() % 2 == 0:
        counts[0] += 1
    expected = np.median(np.repeat(values, counts))
    got = _weighted_median(torch.from_numpy(values), torch.from_numpy(counts))
    assert got == expected
    scaled_weights = torch.from_numpy(counts) / 7.0
    assert _weighted_median(torch.from_numpy(values), scaled_weights) == expected


def test_median_of_values_without_weight():
    assert _weighted_median(torch.tensor([3.0, 1.0, 2.0]), torch.zeros(3)) in (1.0, 2.0, 3.0)
    assert _weighted_median(torch.tensor([5.0]), torch.ones(1)) == 5.0


# Whether they show the molecule


def powers_of(rigid, particles, images):
    """(n, R) powers of images and of the model at the reference, and pixels a ring."""
    n = len(images)
    batch = next(particles.batches(n))
    equations = normal_equations(rigid, images, batch.pose, torch.zeros(n, rigid.n_latents))
    band = frequency_band(rigid.microscope)
    return equations.data_power, equations.model_power, band.ring_pixels


@pytest.fixture(scope="module")
def noise_powers(rigid, particles):
    return powers_of(rigid, particles, 2.0 * white(N))


def evidence_of_noise(data_power, pixels, variance) -> torch.Tensor:
    total = data_power.double().sum(1)
    return -0.5 * (pixels.sum() * math.log(variance) + total / variance)


def test_evidence_of_noise_is_that_of_its_best_level(noise_powers):
    data, model, pixels = noise_powers
    got = outlier_evidence(data, model, pixels, 1.0)
    for wrong in (1.0, 2.0, 3.0, 3.8, 4.0, 4.2, 5.0, 9.0):
        assert (got > evidence_of_noise(data, pixels, wrong) - 1e-6).all(), wrong
    # It knows no more than the best level and one of a few brightnesses.
    best = data.double().sum(1) / pixels.sum()
    exact = torch.stack(
        [
            evidence_of_noise(data[i : i + 1], pixels, float(level))[0]
            for i, level in enumerate(best)
        ]
    )
    assert (got >= exact - 1e-3).all() and float((got - exact).max()) < 5


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_evidence_does_not_depend_on_grey_levels(noise_powers, factor):
    """But for the unit of the noise, which that of the molecule has too."""
    data, model, pixels = noise_powers
    plain = outlier_evidence(data, model, pixels, 1.0)
    other = outlier_evidence(factor**2 * data.double(), model, pixels, factor)
    unit = float(pixels.sum()) * math.log(factor)
    torch.testing.assert_close(other + unit, plain, rtol=0, atol=1e-2)


def test_molecules_at_wrong_poses_have_evidence_too(rigid, particles):
    """More than their power says as noise, less than at the right pose."""
    turned = particles.read_images().roll(1, 0) + 0.3 * particles.read_images().std() * white(N)
    data, model, pixels = powers_of(rigid, particles, turned)
    got = outlier_evidence(data, model, pixels, 1.0)
    noise = outlier_evidence(data, 0 * model, pixels, 1.0)
    assert (got >= noise - 1e-6).all() and float((got > noise + 10).float().mean()) > 0.9


def test_probability_of_the_molecule():
    difference = torch.tensor([-50.0, -3.0, 0.0, 3.0, 50.0]).double()
    given = responsibilities(difference, 0.02, learns=False)
    assert (given[1:] > given[:-1]).all()
    assert float(given[2]) == pytest.approx(0.98), "nothing known but the share"
    assert float(given[0]) < 1e-6 and float(given[-1]) > 1 - 1e-6
    # While conformations are still looked for, the better particles are none of the junk.
    poor = torch.linspace(-1100, -900, 101).double()
    assert float(responsibilities(poor, 0.02, learns=True)[80]) == pytest.approx(0.98)
    assert float(responsibilities(poor, 0.02, learns=True)[70]) < 1e-6
    assert float(responsibilities(poor, 0.02, learns=False)[80]) < 1e-6
    # But no particle is worse for the others being good.
    good = difference + 1000
    torch.testing.assert_close(
        responsibilities(good, 0.02, learns=True), responsibilities(good, 0.02, learns=False)
    )


def test_share_of_junk_is_within_bounds():
    shown = torch.ones(1000)
    assert 0 < learn_junk_share(shown) < 0.01
    shown[:250] = 0
    assert learn_junk_share(shown) == pytest.approx(0.25)
    assert learn_junk_share(0 * shown) == 0.9


def test_what_is_left_out_is_named():
    """Ids and rows of some, how many of each kind, and nothing where all are usable."""
    n = 7
    every = torch.ones(n, dtype=torch.bool)
    ids = [f"{i}@a.mrcs" for i in range(n)]
    assert describe_unusable(every, every, ids) is None
    usable, finite = every.clone(), every.clone()
    usable[[1, 4]] = False
    finite[4] = False
    text = describe_unusable(usable, finite, ids)
    assert "2 of 7 images are left out: 1 hold NaN or Inf, 1 are constant or huge" in text
    assert "1@a.mrcs (row 1), 4@a.mrcs (row 4)" in text and "more" not in text
    usable[:5] = False
    text = describe_unusable(usable, finite, ids)
    assert "5 of 7 images" in text and "and 2 more" in text and "\n" not in text
