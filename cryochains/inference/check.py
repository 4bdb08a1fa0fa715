"""Whether particles and reference belong together, before a refinement: what is wrong, by name.

Symbols: y → image, f → the reference's projection at the image's pose, σ² → variance of a pixel on
each ring of frequencies. Of every way in which a table of particles can be misread (the other hand,
swapped axes, …) the projections are drawn as they would be without that fault. For each image

    L = Σ_rings [A ⟨y, f⟩ − ½ A² ⟨f, f⟩] / σ²

is compared with that of the images as they are given. A, one number a ring, are the brightnesses
that the other half of the images asks for, so that detail which the images do not show counts
nothing. What is a matter of degree, position and pixel size, is in `docking`.
"""

import html
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._arguments import Count, checked
from .._devices import choose_device
from ..images import ParticleStack
from ..model import Model, Population, elastic_variance, require_same_images
from .docking import (
    Comparison,
    Docking,
    Scale,
    affordable_images,
    compare_with,
    dock,
    measure_scale,
    normalised_images,
)
from .image_model import look_first, middle_brightness, usable_rows
from .likelihood import crop_spectrum, map_shared
from .scores import information_limit

_STATUSES = ("green", "yellow", "red")
# Standard errors by which another reading of the table has to fit better before it is named, and
# before a refinement refuses. Of twenty readings of sound particles none fitted better at all.
_DOUBTFUL_GAIN = 4.0
_CLEAR_GAIN = 6.0
_CERTAIN_GAIN = 10.0
# A refinement looks at so many images, and of a large molecule at this share of what a check looks
# at; it judges by no fewer than the last.
_FEW_IMAGES = 128
_FEW_SHARE = 0.15
_LEAST_IMAGES = 24
# Deviation of the pixel size, as a share of it. What a change of shape or other scattering makes of
# it was 0.3 % or less.
_DOUBTFUL_SCALE = 0.01
_CLEAR_SCALE = 0.02
# By so many times a mirror image must fit better elsewhere, to be said to be elsewhere.
_ELSEWHERE = 1.2
# Å, RMS over the molecule, by which the structure is off as a whole. Refinements take out less.
_DOUBTFUL_OFFSET = 3.0
_CLEAR_OFFSET = 5.0
# Of the match that an image should have: those with less are suspected junk.
_JUNK_MATCH = 0.5
# A larger share of suspected junk is doubtful.
_MUCH_JUNK = 0.3
# Share of the power at or below which nothing is refined.
_FAINT = 0.003
# Box over the largest diameter that the molecule has about the centre of the box.
_BOX_RATIOS = (1.15, 4.0)
# Å, defocus of micrographs that show particles.
_DEFOCUS_RANGE = (1_000.0, 60_000.0)
# Directions on a half sphere, evenly spread, about 10° apart, and how near a view must be to one.
_N_DIRECTIONS = 200
_NEAR_DIRECTION = np.radians(10.0)
_LEAST_COVERED = 0.6
# Images that tell noise and brightness, and whose information is computed.
_LOOK_IMAGES = 128
_LIMIT_IMAGES = 24
_MIRRORS = ((1.0, 1.0, -1.0), (1.0, -1.0, 1.0), (-1.0, 1.0, 1.0), (-1.0, -1.0, -1.0))
_GIVEN = "as given"
_LATER = "not measured: the rest comes first"
_OTHER_HAND = "replace(particles, rotations=M @ particles.rotations @ {})"

# Other readings of the table: the fault, what the images then show, and what mends it.
_READINGS = {
    "contrast": ("contrast", "dark protein", "load_particles(…, invert=True)"),
    "negative shifts": (
        "shift sign",
        "shifts of the other sign",
        "replace(particles, shifts=-particles.shifts)",
    ),
    "shifts swapped": (
        "axes",
        "shifts whose x and y are swapped",
        "replace(particles, shifts=particles.shifts.flip(1))",
    ),
    "image transposed": (
        "axes",
        "x and y swapped",
        "replace(particles, images=particles.read_images().transpose(1, 2))",
    ),
    "image flipped in x": (
        "axes",
        "x mirrored",
        "replace(particles, images=particles.read_images().flip(2).roll(1, 2))",
    ),
    "image flipped in y": (
        "axes",
        "y mirrored",
        "replace(particles, images=particles.read_images().flip(1).roll(1, 1))",
    ),
    "rotations transposed": (
        "rotations",
        "the inverse of the given rotations",
        "replace(particles, rotations=particles.rotations.transpose(1, 2))",
    ),
    "row before": (
        "rows",
        "the pose of the next row",
        "replace(particles, images=particles.read_images().roll(1, 0)), and look how table and "
        "images were joined",
    ),
    "row after": (
        "rows",
        "the pose of the row before",
        "replace(particles, images=particles.read_images().roll(-1, 0)), and look how table and "
        "images were joined",
    ),
    "no CTF": (
        "CTF",
        "no contrast transfer: they are corrected already",
        "replace(particles, ctf=None)",
    ),
    "phase flipped": (
        "CTF",
        "a contrast transfer without its signs",
        "extracting the particles again without phase flipping",
    ),
    "negative defocus": (
        "CTF",
        "the contrast transfer of a defocus of the other sign",
        "the other sign of defocus_u and defocus_v",
    ),
}
_FAULTS = tuple(dict.fromkeys(fault for fault, _, _ in _READINGS.values()))


@dataclass(frozen=True)
class CheckItem:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    status : str
        "green", "yellow" (look at it), or "red" (mend it first).
    value : float
        In the unit that the sentence names.
    significance : float
        In standard errors; NaN where it is no estimate.
    sentence : str
        What was found and, where it is not green, what to try.
    """

    name: str
    status: str
    value: float
    significance: float
    sentence: str


@dataclass(frozen=True, eq=False, repr=False)
class Check:
    """Whether particles and reference belong together; made by `check`.

    Attributes
    ----------
    items : tuple of CheckItem
    n_images : int
        That were looked at.
    match : (n_images,) float64 array
        How well each fits the reference's projection: 1 is what the middle image has, 0 what noise.
    directions : (n_images, 3) float64 array
        Unit vectors towards the viewer, in the frame of the reference.
    rotation : (3, 3) float64 array
        What turns the reference, about its origin, to where the images show it.
    shift : (3,) float64 array
        Å, what then moves it there.

    Examples
    --------
    >>> item = CheckItem("hand", "green", -21.0, -40.0, "the given hand fits better")
    >>> nowhere = np.zeros((0, 3))
    >>> Check((item,), 500, np.zeros(0), nowhere, np.eye(3), np.zeros(3))
    Check of 500 images: green
      green   hand         the given hand fits better
    """

    items: tuple[CheckItem, ...]
    n_images: int
    match: np.ndarray
    directions: np.ndarray
    rotation: np.ndarray
    shift: np.ndarray

    @property
    def status(self) -> str:
        """That of the worst item."""
        return _STATUSES[max((_STATUSES.index(item.status) for item in self.items), default=0)]

    @property
    def problem(self) -> str:
        """The sentences of what is red, the most significant first; empty where nothing is."""
        red = [item for item in self.items if item.status == _STATUSES[2]]
        red.sort(key=lambda item: -abs(np.nan_to_num(item.significance)))
        return "; ".join(item.sentence for item in red)

    @property
    def table(self) -> pd.DataFrame:
        """One row an item: name, status, value, significance, sentence."""
        rows = [vars(item) for item in self.items]
        return pd.DataFrame(rows, columns=list(CheckItem.__dataclass_fields__))

    def __getitem__(self, name: str) -> CheckItem:
        for item in self.items:
            if item.name == name:
                return item
        names = ", ".join(item.name for item in self.items)
        raise ValueError(f"expected an item among {names}, got {name!r}; try check.table")

    def __repr__(self) -> str:
        lines = [f"Check of {self.n_images:,} images: {self.status}"]
        lines += [f"  {item.status:<7} {item.name:<12} {item.sentence}" for item in self.items]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><span style='color:{_MARKS[item.status]}'>●</span> {item.status}</td>"
            f"<td>{html.escape(item.name)}</td>"
            f"<td style='text-align:left'>{html.escape(item.sentence)}</td></tr>"
            for item in self.items
        )
        title = f"Check of {self.n_images:,} images: {self.status}"
        return f"<table><caption>{title}</caption><tbody>{rows}</tbody></table>"


# Colours of the marks; coloured letters need a font that many machines lack.
_MARKS = {"green": "#00704F", "yellow": "#A85F00", "red": "#C0182B"}


@checked
def check(
    model: Model,
    particles: ParticleStack,
    *,
    n: Count = 500,
    device: str | torch.device | None = None,
) -> Check:
    """Look whether the particles show the reference as their table says, before a refinement.

    Up to `n` images are compared with the reference's projections, as given and as they would be
    with the other hand, contrast or sign of shifts, inverse rotations, swapped axes, another pixel
    size, another CTF, the pose of the next row, or the reference elsewhere. What fits clearly
    better is named. Takes under a minute for any number of particles.

    Parameters
    ----------
    model : Model
    particles : ParticleStack
    n : int
        Images that are looked at, evenly chosen.
    device : torch device, optional
        By default a GPU where there is one.

    Returns
    -------
    Check
        Prints as a table; ``check.problem`` is what has to be mended.

    Raises
    ------
    ValueError
        When the particles are none or of another box or pixel size than the model, no image is
        usable, or `n` is below 1.

    Notes
    -----
    Significance is the mean over images of the difference of log likelihoods, over its standard
    error. The information limit is that of a population as broad as the elastic network allows.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 60, conformations=closed.coords[None], box_size=48, progress=False
    ... )
    >>> inverse = replace(particles, rotations=particles.rotations.transpose(1, 2))
    >>> check(Model(closed, inverse, modes=None), inverse)["rotations"].status
    'red'
    """
    require_same_images(model, particles)
    model = model.to(choose_device(device))
    n = min(n, len(particles), affordable_images(model))
    rows = np.linspace(0, len(particles) - 1, n).round().astype(np.int64)
    usable = usable_rows(particles[rows])
    if not usable.any():
        raise ValueError(
            f"expected images, got {len(rows):,} that are constant or hold NaN or Inf; try "
            "extracting the particles again"
        )
    chosen = rows[usable]
    gains = _compare_readings(model, particles, chosen)
    docking = dock(gains.comparison)
    items, winner = _judge_readings(gains, docking)
    scale = None
    # Of a reference that is not seen, nothing is measured.
    seen = winner == _GIVEN and items[0].status == _STATUSES[0]
    if seen:
        scale = measure_scale(model, gains.comparison)
    items.append(_judge_scale(particles, scale))
    items.append(_usable_item(usable))
    items += _judge_signal(gains, seen)
    items += _judge_table(model, particles)
    sound = seen and all(item.status != _STATUSES[2] for item in items)
    items.append(_judge_limit(model, particles[chosen], sound))
    return Check(
        tuple(items),
        len(rows),
        gains.match,
        _directions(particles[chosen]),
        docking.rotation,
        docking.shift,
    )


@dataclass(frozen=True, eq=False)
class _Gains:
    """Log likelihoods (n,) of every reading, and what they were made with."""

    comparison: Comparison
    log_likelihood: dict[str, Tensor]
    match: np.ndarray
    signal_share: float
    # Of the power of an image: what signal of the reference would not have been seen.
    hidden_share: float

    def gain(self, name: str) -> tuple[float, float]:
        """Mean gain an image over the images as given, in nats, and its significance."""
        return _significance(self.log_likelihood[name] - self.log_likelihood[_GIVEN])


def _significance(difference: Tensor) -> tuple[float, float]:
    """Mean of (n,) differences, and the mean over its standard error."""
    mean, n = float(difference.mean()), len(difference)
    if n < 2:
        return mean, 0.0
    error = float(difference.std()) / n**0.5
    return mean, mean / error if error > 1e-9 * max(abs(mean), 1e-9) else 0.0


def _compare_readings(model: Model, particles: ParticleStack, rows: np.ndarray) -> _Gains:
    comparison = compare_with(model, particles, rows)

    def sums(block: slice) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            name: (comparison.sum_rings(data, drawn), comparison.sum_rings(drawn, drawn))
            for name, data, drawn in _readings(comparison, particles, rows, block)
        }

    parts = map_shared(sums, comparison.views.blocks(), model.device)
    overlaps = {
        name: (
            torch.cat([part[name][0] for part in parts]),
            torch.cat([part[name][1] for part in parts]),
        )
        for name in parts[0]
    }
    overlap, power = overlaps[_GIVEN]
    overlaps["contrast"] = (-overlap, power)
    brightness = comparison.brightness(overlap, power)
    weight = comparison.inverse_noise * brightness
    expected = (weight * brightness * power).sum(1)
    match = (weight * overlap).sum(1) / expected.clamp_min(1e-12)
    middle = float(match.median())
    match = match / middle if middle > 0 else match
    signal = (brightness.square() * power).sum(1).mean() / comparison.n_pixels
    log_likelihood = {name: comparison.log_likelihood(*sums) for name, sums in overlaps.items()}
    hidden = _hidden_share(comparison, overlap, power)
    return _Gains(comparison, log_likelihood, match.cpu().numpy(), float(signal), hidden)


def _hidden_share(comparison: Comparison, overlap: Tensor, power: Tensor) -> float:
    """Share of the power below which the reference would not be seen in these images.

    From (n, R) ⟨y, f⟩ and ⟨f, f⟩, with one A for all rings, the highest not contradicted.
    """
    precision = float((power.sum(0) * comparison.inverse_noise).sum())
    if precision <= 0:
        return 1.0
    brightness = float((overlap.sum(0) * comparison.inverse_noise).sum()) / precision
    # The images are compared with those of other particles, which have as much noise.
    highest = max(brightness, 0.0) + _DOUBTFUL_GAIN * (2 / precision) ** 0.5
    return highest**2 * float(power.sum(1).mean()) / comparison.n_pixels


def _readings(
    comparison: Comparison, particles: ParticleStack, rows: np.ndarray, block: slice
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, spectra of the images, and of the projections: each reading of a block of the rows."""
    device = comparison.device
    view, rows = comparison.views[block], rows[block]
    own = view.spectra
    images = normalised_images(particles, rows, device)
    plain = comparison.draw(view.rotations)
    phases = comparison.phases(view.shifts)
    drawn = plain * phases * view.transfer
    yield _GIVEN, own, drawn
    for step, name in ((1, "row before"), (-1, "row after")):
        # The image of the neighbouring row, which is where the image of this pose would be.
        others = normalised_images(particles, (rows - step) % len(particles), device)
        yield name, comparison.transform(others), drawn
    flipped = (
        ("image transposed", images.transpose(1, 2)),
        ("image flipped in x", images.flip(2).roll(1, 2)),
        ("image flipped in y", images.flip(1).roll(1, 1)),
    )
    for name, changed in flipped:
        yield name, comparison.transform(changed), drawn
    yield "negative shifts", own, plain * phases.conj() * view.transfer
    yield "shifts swapped", own, plain * comparison.phases(view.shifts.flip(1)) * view.transfer
    pose = phases * view.transfer
    yield "rotations transposed", own, comparison.draw(view.rotations.transpose(1, 2)) * pose
    for mirror in _MIRRORS:
        points = comparison.points * torch.tensor(mirror, device=device)
        yield _mirror_name(mirror), own, comparison.draw(view.rotations, points) * pose
    if particles.ctf is not None:
        ctf = particles.ctf[torch.from_numpy(rows)]
        ctf = replace(ctf, defocus_u=-ctf.defocus_u, defocus_v=-ctf.defocus_v)
        other = ctf.evaluate(particles.box_size, particles.pixel_size, device)
        yield "no CTF", own, plain * phases
        yield "phase flipped", own, plain * phases * view.transfer.abs()
        yield "negative defocus", own, plain * phases * crop_spectrum(other, comparison.box_size)


def _mirror_name(mirror: tuple[float, ...]) -> str:
    return f"hand {mirror}"


# What the images say of each fault


def _judge_readings(gains: _Gains, docking: Docking) -> tuple[list[CheckItem], str]:
    """An item a fault, and which reading fits best: of all that fit better only that is red."""
    measured = {name: gains.gain(name) for name in gains.log_likelihood}
    base = gains.log_likelihood[_GIVEN]
    offset = _significance(docking.log_likelihood - base)
    mirrored = _significance(docking.mirrored_log_likelihood - base)
    hands = [_mirror_name(mirror) for mirror in _MIRRORS]
    measured["docked"] = offset
    # Placed anew, a mirror image always fits a little better: states are not the reference.
    if mirrored[0] > _ELSEWHERE * max(measured[name][0] for name in hands):
        measured["docked mirror image"] = mirrored
        hands.append("docked mirror image")
    clear = {
        name: gain
        for name, (gain, significance) in measured.items()
        if significance > _DOUBTFUL_GAIN and (name != "docked" or docking.offset > _DOUBTFUL_OFFSET)
    }
    winner = max(clear, key=lambda name: clear[name], default=_GIVEN)
    items = [_reference_item(gains, winner == _GIVEN)]
    items.append(_hand_item(measured, hands, winner))
    for fault in _FAULTS:
        names = [name for name in measured if _READINGS.get(name, ("",))[0] == fault]
        if names:
            best = max(names, key=lambda name: measured[name][0])
            _, words, remedy = _READINGS[best]
            items.append(_reading_item(fault, words, remedy, measured[best], winner == best))
    items.append(_origin_item(docking, offset, winner == "docked"))
    return items, winner


def _reading_item(
    name: str, words: str, remedy: str, measured: tuple[float, float], wins: bool
) -> CheckItem:
    gain, significance = measured
    if significance <= _DOUBTFUL_GAIN:
        sentence = f"{words} would fit worse, by {-gain:.1f} nats an image"
        if gain == 0:
            sentence = f"{words} would fit as well: these particles cannot tell"
        elif gain > 0 or significance > -_DOUBTFUL_GAIN:
            sentence = f"{words} would not fit clearly better ({significance:.1f} standard errors)"
        return CheckItem(name, _STATUSES[0], gain, significance, sentence)
    how = f"by {gain:.1f} nats an image, {significance:.0f} standard errors"
    if not wins:
        sentence = f"{words} would fit better than the table as given ({how}), but is not the best"
        return CheckItem(name, _STATUSES[1], gain, significance, sentence)
    status = _STATUSES[2 if significance > _CLEAR_GAIN else 1]
    sentence = f"the images show {words} ({how}); try {remedy}"
    return CheckItem(name, status, gain, significance, sentence)


def _hand_item(
    measured: dict[str, tuple[float, float]], names: list[str], winner: str
) -> CheckItem:
    best = max(names, key=lambda name: measured[name][0])
    remedy = "fitting the structure into the map of the other hand, and mirrored poses"
    for mirror in _MIRRORS:
        if best == _mirror_name(mirror):
            other = "M" if mirror == _MIRRORS[0] else f"torch.diag(torch.tensor({list(mirror)}))"
            remedy = (
                f"replace(particles, rotations=M @ particles.rotations @ {other}) with "
                "M = torch.diag(torch.tensor([1.0, 1.0, -1.0])), or the structure's other hand"
            )
    return _reading_item(
        "hand", "the mirror image of the reference", remedy, measured[best], winner == best
    )


def _origin_item(docking: Docking, measured: tuple[float, float], wins: bool) -> CheckItem:
    gain, significance = measured
    offset = docking.offset
    x, y, z = docking.shift
    if offset < _DOUBTFUL_OFFSET or significance <= _DOUBTFUL_GAIN:
        sentence = f"the structure is where the poses turn about it, within {offset:.1f} Å (RMS)"
        if offset >= _DOUBTFUL_OFFSET:
            sentence = "no other position of the structure fits clearly better"
        return CheckItem("origin", _STATUSES[0], offset, significance, sentence)
    status = _STATUSES[int(wins) + int(wins and offset > _CLEAR_OFFSET)]
    if not wins:
        status = _STATUSES[1]
    moved = f"shifted by ({x:.1f}, {y:.1f}, {z:.1f}) Å"
    origin = ", ".join(f"{value:.1f}" for value in docking.origin)
    remedy = f"structure.with_origin([{origin}])"
    if docking.angle > np.radians(5.0):
        moved = f"turned by {np.degrees(docking.angle):.0f}° and {moved}"
        remedy = "fitting the structure into the consensus map of these poses"
    sentence = (
        f"the images show the structure {moved}, {offset:.1f} Å (RMS) from where it is given "
        f"({gain:.1f} nats an image, {significance:.0f} standard errors)"
    )
    sentence += f"; try {remedy}" if wins else ", but that is not the best explanation"
    return CheckItem("origin", status, offset, significance, sentence)


def _reference_item(gains: _Gains, unexplained: bool) -> CheckItem:
    """Whether images fit their own pose better than that of other particles."""
    own = gains.log_likelihood[_GIVEN]
    others = (gains.log_likelihood["row before"] + gains.log_likelihood["row after"]) / 2
    gain, significance = _significance(own - others)
    if significance > _CLEAR_GAIN:
        sentence = (
            f"the images show the reference at their poses ({gain:.1f} nats an image more than at "
            "those of other particles)"
        )
        return CheckItem("reference", _STATUSES[0], gain, significance, sentence)
    sentence = (
        "as the table is given, the images hardly show the reference at their poses better than at "
        f"those of other particles ({significance:.1f} standard errors)"
    )
    if not unexplained:
        return CheckItem("reference", _STATUSES[1], gain, significance, sentence)
    hidden = 10 * np.log10(max(gains.hidden_share, 1e-6))
    if gains.hidden_share > _FAINT:
        sentence += (
            f": too noisy to tell, since a signal of {hidden:.0f} dB would not be seen; try more "
            "particles, or n= for more of them"
        )
        return CheckItem("reference", _STATUSES[1], gain, significance, sentence)
    status = _STATUSES[2 if significance < _DOUBTFUL_GAIN else 1]
    sentence += (
        f", though a signal above {hidden:.0f} dB would be seen; try other poses, the right "
        "structure, or more particles"
    )
    return CheckItem("reference", status, gain, significance, sentence)


def _judge_scale(particles: ParticleStack, scale: Scale | None) -> CheckItem:
    if scale is None or not np.isfinite(scale.error):
        return CheckItem("pixel size", _STATUSES[0], float("nan"), float("nan"), _LATER)
    off = scale.value - 1
    significance = off / scale.error
    measured = f"{100 * off:+.1f} ± {100 * scale.error:.1f} %"
    pixel = particles.pixel_size / scale.value
    if abs(off) < _DOUBTFUL_SCALE or abs(significance) < _DOUBTFUL_GAIN:
        sentence = f"the molecule has the size of the reference ({measured})"
        return CheckItem("pixel size", _STATUSES[0], off, significance, sentence)
    clear = abs(off) > _CLEAR_SCALE and abs(significance) > _CLEAR_GAIN
    sentence = (
        f"the molecule is {measured} larger than the reference, which is no change of its shape; "
        f"try a pixel size of {pixel:.4g} Å"
    )
    return CheckItem("pixel size", _STATUSES[2 if clear else 1], off, significance, sentence)


def _usable_item(usable: np.ndarray) -> CheckItem:
    unusable, n = int((~usable).sum()), len(usable)
    sentence = "all images are finite and not constant"
    if unusable:
        sentence = (
            f"{unusable:,} of {n:,} images are constant or hold NaN or Inf; try extracting them "
            "again"
        )
    return CheckItem("images", _STATUSES[int(unusable > 0)], unusable, float("nan"), sentence)


def _judge_signal(gains: _Gains, sound: bool) -> list[CheckItem]:
    """Signal and junk, which only a table that is read rightly tells."""
    nan = float("nan")
    if not sound:
        return [CheckItem(name, _STATUSES[0], nan, nan, _LATER) for name in ("SNR", "junk")]
    share = gains.signal_share
    decibel = 10 * np.log10(max(share, 1e-6) / max(1 - share, 1e-6))
    sentence = f"about {decibel:.0f} dB, as far as the reference is what the images show"
    faint = share < _FAINT
    if faint:
        sentence += "; try more binning, or more particles"
    items = [CheckItem("SNR", _STATUSES[int(faint)], float(decibel), nan, sentence)]
    junk = float((gains.match < _JUNK_MATCH).mean())
    sentence = f"{100 * junk:.0f} % of the images fit the reference less than half as well as most"
    much = junk > _MUCH_JUNK
    if much:
        sentence += "; try classifying the particles first"
    items.append(CheckItem("junk", _STATUSES[int(much)], junk, nan, sentence))
    return items


# What the table says of itself


def _judge_table(model: Model, particles: ParticleStack) -> list[CheckItem]:
    return [
        _box_item(model),
        *_defocus_items(particles),
        _id_item(particles),
        _direction_item(particles),
    ]


def _box_item(model: Model) -> CheckItem:
    structure = model.structure
    radius = float(np.linalg.norm(structure.coords - structure.origin, axis=1).max())
    ratio = model.box_size * model.pixel_size / (2 * radius)
    sentence = f"the box is {ratio:.1f} times as wide as the molecule"
    status = _STATUSES[0]
    if ratio < _BOX_RATIOS[0]:
        status = _STATUSES[1]
        sentence += "; try a wider box, for motion and for what the CTF spreads"
    if ratio > _BOX_RATIOS[1]:
        status = _STATUSES[1]
        sentence += "; try a smaller box, and check the pixel size"
    return CheckItem("box", status, ratio, float("nan"), sentence)


def _defocus_items(particles: ParticleStack) -> list[CheckItem]:
    nan = float("nan")
    if particles.ctf is None:
        sentence = "no CTF is given: images are taken for projections"
        return [CheckItem("defocus", _STATUSES[0], nan, nan, sentence)]
    defocus = ((particles.ctf.defocus_u + particles.ctf.defocus_v) / 2).numpy()
    low, high = float(defocus.min()), float(defocus.max())
    outside = float(((defocus < _DEFOCUS_RANGE[0]) | (defocus > _DEFOCUS_RANGE[1])).mean())
    sentence = f"defocus from {low / 1e4:.2f} to {high / 1e4:.2f} µm"
    if outside:
        sentence += (
            f", {100 * outside:.0f} % of it outside of {_DEFOCUS_RANGE[0] / 1e4:.1f} to "
            f"{_DEFOCUS_RANGE[1] / 1e4:.0f} µm; try defoci in Å, underfocus positive"
        )
    status = _STATUSES[int(outside > 0)]
    return [CheckItem("defocus", status, float(np.median(defocus)), nan, sentence)]


def _id_item(particles: ParticleStack) -> CheckItem:
    duplicates = len(particles) - len(np.unique(particles.ids))
    sentence = "every particle has an id of its own"
    if duplicates:
        sentence = f"{duplicates:,} ids occur more than once; try removing duplicate particles"
    return CheckItem("ids", _STATUSES[int(duplicates > 0)], duplicates, float("nan"), sentence)


def _direction_item(particles: ParticleStack) -> CheckItem:
    """Share of directions, taken without sign, that some particle is seen from."""
    from scipy.spatial import cKDTree

    seen = _directions(particles)
    turns = np.arange(2 * _N_DIRECTIONS) + 0.5
    height = 1 - turns / _N_DIRECTIONS
    angle = np.pi * (1 + 5**0.5) * turns
    radius = np.sqrt(1 - height**2)
    sphere = np.stack([radius * np.cos(angle), radius * np.sin(angle), height], axis=1)
    distance, _ = cKDTree(np.concatenate([seen, -seen])).query(sphere)
    angles = 2 * np.arcsin(np.clip(distance / 2, 0, 1))
    covered = float((angles < _NEAR_DIRECTION).mean())
    sentence = (
        f"{100 * covered:.0f} % of directions have a view within 10°; the most empty is "
        f"{np.degrees(angles.max()):.0f}° from any"
    )
    low = covered < _LEAST_COVERED
    if low:
        sentence += "; motion along the missing views is hardly seen: try more or tilted particles"
    return CheckItem("directions", _STATUSES[int(low)], covered, float("nan"), sentence)


def _directions(particles: ParticleStack) -> np.ndarray:
    """(n, 3) unit vectors towards the viewer, in the frame of the reference."""
    return particles.rotations[:, 2].double().numpy()


def _judge_limit(model: Model, particles: ParticleStack, sound: bool) -> CheckItem:
    nan = float("nan")
    if not sound:
        return CheckItem("limit", _STATUSES[0], nan, nan, _LATER)
    variance = elastic_variance(model.dynamics)
    look = look_first(model, particles[:: -(-len(particles) // _LOOK_IMAGES)])
    population = Population(
        torch.zeros(model.n_latents, dtype=torch.float64),
        variance.diag(),
        max(look.noise_level, 1e-30) ** 0.5,
        middle_brightness(look),
        model.fingerprint,
        noise_spectrum=look.noise_spectrum.cpu(),
    )
    few = particles[:: -(-len(particles) // _LIMIT_IMAGES)]
    latents = torch.zeros(len(few), model.n_latents)
    limits = information_limit(model, few, population, latents, device=model.device)
    limit = float(np.sqrt(np.mean(np.square(limits))))
    gram = model.dynamics.gram(latents[:1].to(model.device))[0].diagonal().cpu()
    spread = float((gram * variance).sum().sqrt()) / model.structure.n_atoms**0.5
    sentence = (
        f"at best {limit:.1f} Å (RMS) of a particle's conformation, where {spread:.1f} Å were "
        "thought possible before any image"
    )
    status = _STATUSES[0]
    if limit > 0.8 * spread:
        status = _STATUSES[1]
        sentence += "; try more signal or fewer modes: single particles say little"
    return CheckItem("limit", status, limit, nan, sentence)


# What a refinement asks first


def require_sound(model: Model, particles: ParticleStack, rows: np.ndarray) -> None:
    """Raise ValueError when another reading of the table certainly fits the images better.

    From up to 128 images of these `rows`, which are usable; position and pixel size are not looked
    at. Few images decide nothing.
    """
    if len(rows) < _LEAST_IMAGES:
        return
    n = max(_LEAST_IMAGES, min(_FEW_IMAGES, affordable_images(model, _FEW_SHARE), len(rows)))
    rows = rows[np.linspace(0, len(rows) - 1, n).round().astype(np.int64)]
    gains = _compare_readings(model, particles, rows)
    best = max(gains.log_likelihood, key=lambda name: gains.gain(name)[0])
    gain, significance = gains.gain(best)
    if best == _GIVEN or significance < _CERTAIN_GAIN:
        return
    if best in _READINGS:
        _, words, remedy = _READINGS[best]
    else:
        words, remedy = "the mirror image of the reference", "check(model, particles)"
    raise ValueError(
        f"expected images that show the reference at their poses, got images that show {words} "
        f"(by {gain:.1f} nats an image, {significance:.0f} standard errors); try {remedy}, or "
        "check=False"
    )
