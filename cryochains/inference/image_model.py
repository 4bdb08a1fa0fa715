"""What an image has of its own: brightness, noise, and whether it shows the molecule at all.

Symbols: y = a f(z) + ε (Eq. 3) with the brightness a = e^b → `scale`, ε ~ N(0, σ_i² s(|k|)), σ_i²
→ `noise_variance` of a particle, s → `noise_spectrum`, of mean 1; r → `responsibility`.

What all particles share is learned from those that show the molecule: b has a mean and a width,
1/σ_i² a gamma distribution around a common level that counts as much as ν → `noise_pixels` pixels.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .._processes import gather, gather_answers, own_share
from ..images import ParticleStack
from ..model import Model
from .likelihood import crop_spectrum, frequency_band, real_parts

# Å. Where atoms are not at their reference positions, sharp images look dimmer than they are.
_REFERENCE_BLUR = 8.0
# The dimmest that an image is thought to be at first, of the median.
_MIN_SCALE = 0.1
# Width of the distribution of log brightness: at least, and at first at least.
_MIN_SCALE_SPREAD = 0.01
_MIN_START_SPREAD = 0.05
# An image is constant when it varies by less than this share of its mean; and squares of larger
# pixels than the second are not numbers in single precision.
_CONSTANT = 1e-7
_MAX_SPREAD = 1e15
# Images whose power tells the noise spectrum before the first pass.
_SPECTRUM_IMAGES = 500
# Of the signal: the model's images are not thought right to better than this, or clear images would
# be overfitted.
MODEL_ERROR = 0.3
# Standard deviations that the reference must stand out of the images by.
_MIN_VISIBLE = 3.0
# Share of clear images that noise does not make: of images that stand out by one standard deviation
# it makes two in a hundred that clear.
_MIN_SHOWN = 0.05
# Brightnesses of an image that shows something else, of those of the others.
_OUTLIER_SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
_NOISE_STEPS = 8
# Degrees of freedom of the tail of bright particles: dim ones are more likely junk.
_TAIL = 4.0
# Of the log evidence of all particles, where those are that look good.
_BETTER = 0.8
_MIN_JUNK = 1e-3
_MAX_JUNK = 0.9
# A MAD times this is a standard deviation.
_MAD_TO_STD = 1.4826


@dataclass(frozen=True, eq=False)
class FirstLook:
    """What images tell before any conformation is known; made by `look_first`.

    Attributes
    ----------
    usable : (n,) bool tensor
        Finite, and not the same everywhere.
    finite : (n,) bool tensor
    scale : (n,) tensor
        Brightness over the reference's projection by regression; 0 where not usable.
    error : (n,) tensor
        Standard deviation of `scale` for noise as strong as the whole image.
    noise_spectrum : (R,) float64 tensor
        Relative to its mean over all pixels.
    noise_level : float
        That mean, of the middle of the images.
    checksums : (n,) int64 tensor
        Of the pixels of every image: tells images that were changed.
    """

    usable: Tensor
    finite: Tensor
    scale: Tensor
    error: Tensor
    noise_spectrum: Tensor
    noise_level: float
    checksums: Tensor

    @property
    def visibility(self) -> float:
        """How far the reference stands out of all images, in standard deviations of noise.

        Negative where the images are its negative.
        """
        ratio = self.scale[self.usable].double() / self.error[self.usable].double()
        return float(ratio.sum() / max(len(ratio), 1) ** 0.5)


@torch.no_grad()
def look_first(model: Model, particles: ParticleStack, batch_size: int = 64) -> FirstLook:
    """Read every image once: which are usable, how bright each is, and how the noise is coloured.

    The spectrum is what the images' power exceeds that of the reference's projections by, which
    hardly depends on where exactly the atoms are.
    """
    n, device = len(particles), model.device
    microscope = model.microscope
    finite = torch.zeros(n, dtype=torch.bool)
    usable = torch.zeros(n, dtype=torch.bool)
    scale = torch.zeros(n)
    error = torch.ones(n)
    checksums = torch.zeros(n, dtype=torch.int64)
    step = -(-n // _SPECTRUM_IMAGES)
    own = own_share(n)
    excess, power, levels = [], [], []
    coarse = frequency_band(microscope, _REFERENCE_BLUR)
    full = frequency_band(microscope)
    for batch in particles[own].batches(batch_size, device=device, require_finite=False):
        images = batch.images
        rows = batch.rows.cpu() + own.start
        checksums[rows] = _checksums(images)
        whole, good = usable_images(images)
        finite[rows] = whole.cpu()
        usable[rows] = good.cpu()
        if not good.any():
            continue
        images = images[good]
        pose = tuple(None if part is None else part[good] for part in batch.pose)
        data, expected = _reference_rings(model, images, pose, _REFERENCE_BLUR)
        overlap = (data * expected).double().sum(1)
        strength = expected.double().square().sum(1)
        scale[rows[good.cpu()]] = (overlap / strength).float().cpu()
        noise = data.double().square().sum(1) / coarse.n_pixels
        error[rows[good.cpu()]] = (noise / strength).sqrt().float().cpu()
        chosen = (rows.to(device)[good] % step == 0).nonzero().squeeze(1)
        if len(chosen):
            of_chosen = tuple(None if part is None else part[chosen] for part in pose)
            data, expected = _reference_rings(model, images[chosen], of_chosen, 0.0)
            brightness = (overlap / strength).clamp_min(0)[chosen, None]
            signal = brightness.square() * full.sum_rings(expected.square()).double()
            total = full.sum_rings(data.square()).double()
            # The median of few squares is below their mean (Wilson and Hilferty 1931).
            of_mean = (1 - 2 / (9 * full.ring_pixels.clamp_min(1))) ** 3
            level = (total.sum(1) / full.n_pixels).unsqueeze(1)
            excess.append((total - signal) / (level * of_mean))
            power.append(signal / level)
            levels.append(level.squeeze(1))
    known = (usable, finite, scale, error, checksums)
    usable, finite, scale, error, checksums = (gather(values[own], n) for values in known)
    excess, power, levels = (gather_answers(parts, device) for parts in (excess, power, levels))
    if not levels:
        white = torch.ones(full.n_rings, dtype=torch.float64, device=device)
        return FirstLook(usable, finite, scale, error, white, 1.0, checksums)
    # Relative to each image, so that none counts more than another.
    middle = float(torch.cat(levels).median())
    spectrum, noise_level = normalised_spectrum(
        middle * torch.cat(excess).median(0).values,
        middle * torch.cat(power).median(0).values,
        full.ring_pixels,
    )
    return FirstLook(usable, finite, scale, error, spectrum, noise_level, checksums)


def _checksums(images: Tensor) -> Tensor:
    """(b,) of the pixels of (b, box, box) images, as they were read."""
    sums = [zlib.crc32(image.tobytes()) for image in images.cpu().numpy()]
    return torch.tensor(sums, dtype=torch.int64)


def usable_images(images: Tensor) -> tuple[Tensor, Tensor]:
    """(b,) bool: which images are finite, and which also neither constant nor huge."""
    spread = images.double().std(dim=(-2, -1))
    constant = spread <= _CONSTANT * images.double().mean(dim=(-2, -1)).abs()
    finite = spread.isfinite()
    return finite, finite & (spread < _MAX_SPREAD) & ~constant


def usable_rows(particles: ParticleStack, batch_size: int = 64) -> np.ndarray:
    """(n,) bool: which images are finite and neither constant nor huge."""
    batches = particles.batches(batch_size, require_finite=False)
    return torch.cat([usable_images(batch.images)[1] for batch in batches]).numpy()


def measure_contrast(model: Model, particles: ParticleStack, n: int = 500) -> float:
    """Brightness of the images over the reference's projections: the median of up to `n`.

    Raises
    ------
    ValueError
        When the images are protein-dark, or none is usable.
    """
    look = look_first(model, particles[:: -(-len(particles) // n)])
    _require_usable(look)
    require_visible(look, learns=False)
    return middle_brightness(look)


def middle_brightness(look: FirstLook) -> float:
    """Brightness of the middle of the usable images over the reference's projections."""
    return _middle_scale(look.scale[look.usable], look.error[look.usable])


def _reference_rings(
    model: Model, images: Tensor, pose: tuple, blur: float
) -> tuple[Tensor, Tensor]:
    """(b, box·(box + 2)) real parts of images and of the reference's projections, both blurred."""
    microscope = model.microscope
    band = frequency_band(microscope, blur)
    rotations, shifts, ctf = pose
    transfer = (model.box_size / band.box_size) * band.weights
    if ctf is not None:
        transfer = transfer * crop_spectrum(ctf, band.box_size)
    coords = model.bead_dynamics.reference.expand(len(images), -1, -1)
    positions = microscope.image_positions(coords, rotations, shifts)
    expected = microscope.spectrum(positions, transfer, blur=blur, box_size=band.box_size)
    observed = crop_spectrum(torch.fft.rfft2(images, norm="ortho"), band.box_size)
    return real_parts(observed * (band.weights * band.low_pass)), real_parts(expected)


def normalised_spectrum(excess: Tensor, power: Tensor, pixels: Tensor) -> tuple[Tensor, float]:
    """(R,) noise spectrum of mean 1 over all pixels, and the mean that it had.

    From what the (R,) power on each ring exceeds the signal's by, the signal's own `power`, and the
    number of `pixels` of each ring. Nowhere below what an error of the model makes, since clear
    images would else be believed where neither they nor the model show anything.
    """
    known = pixels > 0
    level = excess / pixels.clamp_min(1e-9)
    least = MODEL_ERROR**2 * power.sum() / pixels.sum()
    level = torch.maximum(level, least + 1e-3 * level[known].clamp_min(0).mean())
    # The mean of an image is on the innermost ring and counts nowhere.
    level = torch.where(known, level, level[known][0])
    mean = (level * pixels).sum() / pixels.sum()
    return level / mean, float(mean)


def require_visible(look: FirstLook, learns: bool) -> None:
    """Raise ValueError when images are the negative of the model, or show nothing of it.

    The second only where a population shall be learned.
    """
    if learns:
        _require_usable(look)
    if look.visibility < -_MIN_VISIBLE:
        raise ValueError(
            "expected protein-bright images, got images that look like the negative of the "
            "reference; try load_particles(…, invert=True), and check that the poses belong to "
            "this structure"
        )
    if learns and look.visibility < _MIN_VISIBLE:
        raise ValueError(
            f"expected images that show the reference at their poses, got {len(look.scale):,} that "
            f"look like noise to it ({look.visibility:.1f} standard deviations); try other poses, "
            "the right structure, or more particles"
        )


def _require_usable(look: FirstLook) -> None:
    if not look.usable.any():
        raise ValueError(
            f"expected images, got {len(look.usable):,} that are constant or hold NaN or Inf; try "
            "extracting the particles again"
        )


def start_scales(look: FirstLook, known: tuple[float, float] | None) -> tuple[Tensor, float, float]:
    """(n,) log brightnesses of the usable images, their mean and their width.

    `known` mean and width are those of a population that is given.
    """
    scale, error = look.scale[look.usable].double(), look.error[look.usable].double()
    center = _middle_scale(scale, error) if known is None else math.exp(known[0])
    log_scale = (scale / center).clamp_min(_MIN_SCALE).log()
    # Of the logarithm: images that are brighter than by chance know theirs better.
    brighter = scale - center > _MIN_VISIBLE * error
    uncertainty = error / torch.where(brighter, scale, center)
    if known is None:
        shown = _shown(scale, error)
        spread = _MAD_TO_STD * float(log_scale[shown].abs().median())
        by_noise = float(uncertainty[shown].square().median())
        spread = max(spread**2 - by_noise, _MIN_START_SPREAD**2) ** 0.5
        mean = math.log(center)
    else:
        mean, spread = known
    # What one image says of its brightness, between noise and what the others say.
    surprise = log_scale / spread
    prior = tail_weight(surprise) / spread**2
    share = 1 / (1 + uncertainty.square() * prior)
    return (mean + share * log_scale).float(), mean, spread


def _middle_scale(scale: Tensor, error: Tensor) -> float:
    middle = float(scale[_shown(scale, error)].median())
    return middle if middle > 0 else float(scale.clamp_min(0).mean()) or 1.0


def _shown(scale: Tensor, error: Tensor) -> Tensor:
    """(n,) bool: all images; where most show nothing of the reference but some do, those."""
    visible = scale / error
    clearly = visible > _MIN_VISIBLE
    if visible.median() < 1 and clearly.double().mean() > _MIN_SHOWN:
        return clearly
    return torch.ones_like(clearly)


def tail_weight(surprise: Tensor) -> Tensor:
    """(n,) weight of particles that are so many widths brighter than the others.

    Of a Student distribution towards bright, and a normal one towards dim.
    """
    above = (_TAIL + 1) / (_TAIL + surprise.square())
    return torch.where(surprise > 0, above.clamp(max=1.0), torch.ones_like(above))


def learn_scales(
    log_scale: Tensor, variance: Tensor, responsibility: Tensor, mean: float, spread: float
) -> tuple[float, float]:
    """Mean and width of log brightness, from (n,) posterior means and variances."""
    weight = responsibility.double() * tail_weight((log_scale.double() - mean) / spread)
    total = float(weight.sum().clamp_min(1e-9))
    new = float((weight * log_scale).sum()) / total
    square = (log_scale.double() - new).square() + variance.double()
    width = (float((weight * square).sum()) / total) ** 0.5
    return new, max(width, _MIN_SCALE_SPREAD)


def _weighted_median(values: Tensor, weights: Tensor) -> float:
    """Of (n,) values with (n,) weights; half of the weight is on either side.

    Examples
    --------
    >>> _weighted_median(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))
    1.0
    """
    order = values.argsort()
    total = weights[order].double().cumsum(0)
    index = int(torch.searchsorted(total, total[-1:] / 2))
    return float(values[order][min(index, len(values) - 1)])


def learn_noise(measured: Tensor, weights: Tensor, n_independent: float) -> tuple[float, float]:
    """Level σ² that all particles share, and as how many pixels it counts for each of them.

    From (n,) measured variances; what they differ by beyond chance is their own.
    """
    level = _weighted_median(measured, weights)
    off = (measured / level).clamp_min(1e-12).log().abs()
    spread = _MAD_TO_STD * _weighted_median(off, weights)
    own = max(spread**2 - 2 / n_independent, 2 / n_independent)
    return level, 2 / own


def outlier_evidence(
    data_power: Tensor, model_power: Tensor, pixels: Tensor, scale: float
) -> Tensor:
    """(n,) log evidence of images that show noise, or the molecule at a pose that does not fit.

    A random image with the molecule's power on each ring (n, R), times the best of some
    brightnesses, and white noise of the best level: but no less than what an error of the model
    makes, which the molecule's own evidence is also held to.
    """
    counted = pixels > 1e-6
    pixels = pixels[counted]
    data = data_power.double()[:, counted].unsqueeze(1)
    shape = scale**2 * model_power.double()[:, counted].unsqueeze(1) / pixels
    factor = torch.tensor(_OUTLIER_SCALES, dtype=torch.float64, device=data.device)
    signal = factor.square().view(1, -1, 1) * shape
    total = data.sum(2)
    least = (MODEL_ERROR**2 * (shape * pixels).sum(2) / pixels.sum()).clamp_min(1e-30).log()
    least = least.unsqueeze(2)
    start = (total - (signal * pixels).sum(2)).maximum(0.05 * total) / pixels.sum()
    log_noise = start.clamp_min(1e-30).log().unsqueeze(2).maximum(least)
    for _ in range(_NOISE_STEPS):
        noise = log_noise.exp()
        expected = noise + signal
        share = noise / expected
        slope = (share * (data / expected - pixels)).sum(2, keepdim=True)
        curvature = (share.square() * pixels).sum(2, keepdim=True)
        log_noise = log_noise + (slope / curvature.clamp_min(1e-9)).clamp(-1, 1)
        log_noise = log_noise.maximum(least)
    expected = log_noise.exp() + signal
    evidence = -0.5 * (pixels * expected.log() + data / expected).sum(2)
    return evidence.max(1).values


def responsibilities(difference: Tensor, junk_share: float, learns: bool) -> Tensor:
    """(n,) probability of the molecule at its pose, of (n,) log evidence for it over an outlier's.

    While a population is learned and conformations are not yet found, even good particles look
    poor: they are compared with the better ones.
    """
    offset = min(0.0, float(difference.quantile(_BETTER))) if learns else 0.0
    prior = math.log((1 - junk_share) / junk_share)
    return torch.sigmoid(difference - offset + prior)


def fading(overlap: Tensor, power: Tensor, side: float) -> float:
    """Å, how far atoms are off on average, by how much finer detail is dimmer than coarser.

    Atoms that are off by u (RMS, in space) dim the frequency k by exp(−2π² u² k²/3): a straight
    line of log ⟨y, f⟩ / ⟨f, f⟩ over k², which needs no truth. These (R,) are sums over particles,
    `side` is that of the box in Å; negative where fine detail is brighter.
    """
    rings = torch.arange(len(power), device=power.device).double() / side
    used = (overlap > 0.05 * power) & (power > 1e-3 * power.max())
    if int(used.sum()) < 3:
        return float("nan")
    x, y = rings[used].square(), (overlap[used] / power[used]).log()
    w = power[used].sqrt() / power[used].sqrt().sum()
    x = x - (w * x).sum()
    slope = float((w * x * y).sum() / (w * x.square()).sum().clamp_min(1e-30))
    square = -3 * slope / (2 * math.pi**2)
    return math.copysign(abs(square) ** 0.5, square)


def learn_junk_share(responsibility: Tensor) -> float:
    """Share of the particles that do not show the molecule, within bounds."""
    return float((1 - responsibility).double().mean().clamp(_MIN_JUNK, _MAX_JUNK))


def describe_unusable(usable: Tensor, finite: Tensor, ids: Sequence) -> str | None:
    """A sentence on the images that are left out; None where all are usable.

    `usable` and `finite` as of `FirstLook`, of all particles with these `ids`.
    """
    left_out = (~usable).nonzero().squeeze(1).tolist()
    if not left_out:
        return None
    broken = int((~finite).sum())
    shown = ", ".join(f"{ids[i]} (row {i})" for i in left_out[:3])
    more = f" and {len(left_out) - 3:,} more" if len(left_out) > 3 else ""
    return (
        f"{len(left_out):,} of {len(usable):,} images are left out: {broken:,} hold NaN or "
        f"Inf, {len(left_out) - broken:,} are constant or huge ({shown}{more}); their latents are "
        "the population's mean, and nothing is known of them"
    )
