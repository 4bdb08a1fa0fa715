"""Where images show the reference, and how large: its position, its orientation and its scale.

Symbols: y → image, f → the reference's projection, σ² → variance of a pixel on each ring of
frequencies, A → brightness on each ring, as in `check`, whose comparisons of images are here too.

A structure that is elsewhere is found in two steps. The images, each as its CTF and noise ask for,
are added up in three dimensions; the reference is laid over that map in thousands of orientations
and all positions; the best few are refined on the images. The scale is found together with what
all particles' conformations have in common, and with every particle's own conformation integrated
out, or a change of shape would be taken for another pixel size.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from ..images import ParticleStack
from ..model import Dynamics, Microscope, Model, elastic_variance, rotvec_to_matrix
from .likelihood import crop_spectrum, frequency_band, map_shared, real_parts

# Å, pixels of images that are compared are no smaller, and images have no more of them a side:
# finer detail says little here.
_LEAST_COMPARED_PIXEL = 1.9
_MOST_COMPARED_PIXELS = 80
# Beads times pixels times images that are compared, at most: what takes half a minute on two cores.
_MOST_WORK = 1.2e10
_LEAST_COMPARED_IMAGES = 100
_DRAWN_IMAGES = 32
# Side of the map, in voxels, and of these no smaller than so many Å.
_MAP_SIDE = 24
_LEAST_VOXEL = 4.0
# Orientations that are tried, about 21° apart, at a time so many, and how many points of the
# reference are enough for it.
_N_ORIENTATIONS = 1152
_ORIENTATIONS_AT_A_TIME = 64
_MAP_POINTS = 600
# The best orientations of either hand that are refined on images, and how far apart they are.
_CANDIDATES = 2
_APART = math.radians(30.0)
_RIGID_STEPS = 3
_RIGID_IMAGES = 128
# What tells the candidates of a hand apart.
_FEW_RIGID_IMAGES = 48
# Radians and Å: no step of the refinement turns or shifts further.
_MAX_TURN = 0.2
_MAX_SHIFT = 6.0
# Standard errors by which a turned structure must fit better than one that is shifted alone:
# molecules of several like chains fit in several ways.
_TURN_GAIN = 5.0
# The scale: images, passes, latents at most, and bands of frequencies with a brightness each.
_SCALE_IMAGES = 256
_SCALE_PASSES = 3
_SCALE_LATENTS = 64
_SCALE_BANDS = 6
_SCALE_BLOCK = 16


@dataclass(frozen=True, eq=False)
class _Views:
    """Images as spectra, and how each was taken.

    Attributes
    ----------
    spectra : (n, box, box//2 + 1) complex64 tensor
        Of images whose pixels have variance 1, so that none counts more than another.
    rotations : (n, 3, 3) tensor
    shifts : (n, 2) tensor
        Å.
    transfer : (n, box, box//2 + 1) tensor
        Contrast transfer.
    """

    spectra: Tensor
    rotations: Tensor
    shifts: Tensor
    transfer: Tensor

    def __len__(self) -> int:
        return len(self.spectra)

    def __getitem__(self, rows: slice) -> "_Views":
        return _Views(
            self.spectra[rows], self.rotations[rows], self.shifts[rows], self.transfer[rows]
        )

    def blocks(self, size: int = _DRAWN_IMAGES) -> list[slice]:
        """Slices of so many images."""
        return [slice(start, start + size) for start in range(0, len(self), size)]

    def spread(self, n: int) -> "_Views":
        """Up to `n` of them, evenly chosen."""
        return self[:: -(-len(self) // n)]


@dataclass(frozen=True, eq=False)
class Comparison:
    """How images are compared with the reference's projections; made by `compare_with`.

    Attributes
    ----------
    microscope : Microscope
    points : (m, 3) tensor
        Å, the reference's beads from the point that poses turn about.
    box_size : int
        Of the frequencies that are compared.
    noise : (R,) float64 tensor
        Variance of a pixel on each ring, of images whose pixels have variance 1.
    views : _Views
    """

    microscope: Microscope
    points: Tensor
    box_size: int
    noise: Tensor
    views: _Views

    @property
    def device(self) -> torch.device:
        return self.microscope.device

    @property
    def side(self) -> float:
        """Å, of an image."""
        return self.microscope.box_size * self.microscope.pixel_size

    @property
    def n_rings(self) -> int:
        return self.box_size // 2 + 1

    @cached_property
    def n_pixels(self) -> float:
        """Of an image, in independent pixels: what the powers of an image are to be divided by."""
        return float(self.microscope.box_size**2)

    @cached_property
    def weights(self) -> Tensor:
        """(box, box//2 + 1) root of how often each coefficient counts; 0 for the mean."""
        weights = crop_spectrum(frequency_band(self.microscope).weights, self.box_size).clone()
        if self.box_size < self.microscope.box_size:
            # The highest frequency of the smaller box stands for two of the larger one's.
            weights[:, -1] = 0.0
            weights[self.box_size // 2] = 0.0
        return weights

    @cached_property
    def ring(self) -> Tensor:
        """(box, box//2 + 1) int64: which ring a coefficient is on; the last has the corners too."""
        radius = torch.hypot(self._rows[:, None], self._columns)
        return radius.round().long().clamp_(max=self.n_rings - 1)

    @cached_property
    def _rows(self) -> Tensor:
        return torch.fft.fftfreq(self.box_size, 1 / self.box_size, device=self.device)

    @cached_property
    def _columns(self) -> Tensor:
        return torch.fft.rfftfreq(self.box_size, 1 / self.box_size, device=self.device)

    @cached_property
    def ring_pixels(self) -> Tensor:
        """(R,) float64, coefficients on each ring."""
        squares = self.weights.double().square().flatten()
        return squares.new_zeros(self.n_rings).index_add_(0, self.ring.flatten(), squares)

    @cached_property
    def inverse_noise(self) -> Tensor:
        """(R,) float64 1/σ²; 0 on rings that are not counted."""
        return torch.where(self.noise > 0, 1 / self.noise.clamp_min(1e-30), 0.0)

    def sum_rings(self, a: Tensor, b: Tensor) -> Tensor:
        """(b, R) float64 scalar products of two spectra on each ring."""
        product = (a.real * b.real + a.imag * b.imag) * self.weights.square()
        sums = product.new_zeros(len(product), self.n_rings)
        return sums.index_add_(1, self.ring.flatten(), product.flatten(1)).double()

    def transform(self, images: Tensor) -> Tensor:
        """(b, box, box//2 + 1) coarse frequencies of images."""
        return crop_spectrum(torch.fft.rfft2(images, norm="ortho"), self.box_size)

    def draw(self, rotations: Tensor, points: Tensor | None = None) -> Tensor:
        """(b, box, box//2 + 1) spectra of projections without shift and CTF."""
        points = self.points if points is None else points
        positions = points @ rotations[:, :2].transpose(1, 2)
        return self.magnification * self.microscope.spectrum(positions, box_size=self.box_size)

    @property
    def magnification(self) -> float:
        """What spectra of the smaller box are multiplied by, to be those of the larger one."""
        return self.microscope.box_size / self.box_size

    def phases(self, shifts: Tensor) -> Tensor:
        """(b, box, box//2 + 1) what displaces images by (b, 2) `shifts` in Å."""
        x, y = shifts.unbind(-1)
        turns = y[:, None, None] * self._rows[:, None] + x[:, None, None] * self._columns
        angle = (-2 * torch.pi / self.side) * turns
        return torch.polar(torch.ones_like(angle), angle)

    def brightness(self, overlap: Tensor, power: Tensor) -> Tensor:
        """(R,) A of each ring from (n, R) ⟨y, f⟩ and ⟨f, f⟩, shrunk by what noise makes; ≥ 0."""
        total, square = overlap.sum(0), power.sum(0)
        seen = (square > 0) & (self.noise > 0)
        plain = torch.where(seen, total / square.clamp_min(1e-30), 0.0).clamp_min(0)
        evidence = plain.square() * square * self.inverse_noise
        return plain * (1 - 1 / evidence.clamp_min(1e-9)).clamp_min(0)

    def log_likelihood(self, overlap: Tensor, power: Tensor) -> Tensor:
        """(n,) of each image, above that of noise; A is that of the other half of the images."""
        first = torch.arange(len(overlap), device=overlap.device) % 2 == 0
        values = overlap.new_zeros(len(overlap))
        for own in (first, ~first):
            a = self.brightness(overlap[~own], power[~own])
            terms = a * overlap[own] - 0.5 * a.square() * power[own]
            values[own] = (terms * self.inverse_noise).sum(1)
        return values


def compare_with(
    model: Model, particles: ParticleStack, rows: np.ndarray, box_size: int | None = None
) -> Comparison:
    """How the images of these rows are compared; the noise is the median power of their rings.

    At frequencies that a box of `box_size` pixels holds, by default as many as say something.
    """
    box = _compared_box(model) if box_size is None else box_size
    points = model.bead_dynamics.reference - model.microscope.origin_tensor
    blank = torch.zeros(box // 2 + 1, dtype=torch.float64, device=model.device)
    nothing = _Views(*(torch.zeros(0, device=model.device) for _ in range(4)))
    plain = Comparison(model.microscope, points, box, blank, nothing)
    spectra, transfers, powers = [], [], []
    for block in np.array_split(rows, -(-len(rows) // _DRAWN_IMAGES)):
        spectra.append(plain.transform(normalised_images(particles, block, model.device)))
        transfers.append(_transfer_of_rows(particles, block, box, model.device))
        powers.append(plain.sum_rings(spectra[-1], spectra[-1]))
    pixels = plain.ring_pixels
    noise = torch.cat(powers).median(0).values / pixels.clamp_min(1e-9)
    noise = torch.where(pixels > 0, noise, 0.0)
    # The mean of an image is on the innermost ring and counts nowhere.
    noise[0] = 0.0
    index = torch.from_numpy(rows)
    views = _Views(
        torch.cat(spectra),
        particles.rotations[index].to(model.device),
        particles.shifts[index].to(model.device),
        torch.cat(transfers),
    )
    return replace(plain, noise=noise, views=views)


def _compared_box(model: Model) -> int:
    """Pixels a side of the images that are compared."""
    side = model.box_size * model.pixel_size
    fine = 2 * math.ceil(side / _LEAST_COMPARED_PIXEL / 2)
    return min(model.box_size, fine, _MOST_COMPARED_PIXELS)


def affordable_images(model: Model, share: float = 1.0) -> int:
    """How many images of so large a molecule are compared: in about half a minute times `share`."""
    work = len(model.beads.weights) * _compared_box(model) ** 2
    return int(share * max(_LEAST_COMPARED_IMAGES, _MOST_WORK / work))


def normalised_images(particles: ParticleStack, rows: np.ndarray, device: torch.device) -> Tensor:
    """(b, box, box) images with pixels of variance 1; blank where constant or not finite."""
    images = particles.images[rows].read(False).to(device)
    spread = images.double().std(dim=(-2, -1), keepdim=True)
    usable = spread.isfinite() & (spread > 0)
    return torch.where(usable, images / spread, 0.0).float()


def _transfer_of_rows(
    particles: ParticleStack, rows: np.ndarray, box_size: int, device: torch.device
) -> Tensor:
    """(b, box, box//2 + 1) contrast transfer at coarse frequencies; 1 where no CTF is known."""
    if particles.ctf is None:
        return torch.ones(len(rows), box_size, box_size // 2 + 1, device=device)
    ctf = particles.ctf[torch.from_numpy(rows)]
    whole = ctf.evaluate(particles.box_size, particles.pixel_size, device)
    return crop_spectrum(whole, box_size)


# Position and orientation


@dataclass(frozen=True, eq=False)
class Docking:
    """Where the images show the reference; made by `dock`.

    Attributes
    ----------
    rotation : (3, 3) float64 array
        Turns the reference about its origin.
    shift : (3,) float64 array
        Å, what then moves it.
    origin : (3,) float64 array
        Å, in the frame of the structure: the point that poses turn about, where nothing is turned.
    offset : float
        Å, RMS over the molecule.
    log_likelihood, mirrored_log_likelihood : (n,) float64 tensor
        Of every image with the reference there, and with its mirror image where that fits best.
    """

    rotation: np.ndarray
    shift: np.ndarray
    origin: np.ndarray
    offset: float
    log_likelihood: Tensor
    mirrored_log_likelihood: Tensor

    @property
    def angle(self) -> float:
        """Radians that the reference is turned by."""
        return _angle_of(self.rotation)


def _angle_of(rotation: np.ndarray) -> float:
    return math.acos(min(max((float(np.trace(rotation)) - 1) / 2, -1.0), 1.0))


def dock(comparison: Comparison) -> Docking:
    """Where the images show the reference, and its mirror image.

    A position that is only shifted is preferred to a turned one that does not fit clearly better.
    """
    volume = _back_projection(comparison)
    orientations = even_rotations(_N_ORIENTATIONS)
    views = comparison.views.spread(_RIGID_IMAGES)
    few = views.spread(_FEW_RIGID_IMAGES)
    fits = []
    for mirror in (False, True):
        points = comparison.points * torch.tensor([1.0, 1.0, -1.0 if mirror else 1.0])
        starts = _laid_over(comparison, volume, points, orientations)
        if not mirror:
            starts = [*_laid_over(comparison, volume, points, np.eye(3)[None]), *starts]
        fitted = [_refine_rigid(comparison, few, points, *start) for start in starts]
        poses = [fitted[0]] if not mirror else []
        fit = partial(_mean_fit, comparison, few, points)
        poses.append(max(fitted, key=fit))
        poses = [_refine_rigid(comparison, views, points, *pose) for pose in poses]
        fits.append([(pose, _fit(comparison, views, points, pose)) for pose in poses])
    plain, mirrored = fits
    best = plain[1]
    difference = best[1] - plain[0][1]
    error = float(difference.std(correction=0)) / len(difference) ** 0.5
    if float(difference.mean()) < _TURN_GAIN * error:
        best = plain[0]
    rotation, shift = best[0]
    log_likelihood = _fit(comparison, comparison.views, comparison.points, best[0])
    mirrored_pose = mirrored[0][0]
    turned = comparison.points.double() @ torch.from_numpy(rotation.T) + torch.from_numpy(shift)
    offset = (turned - comparison.points.double()).square().sum(1).mean().sqrt()
    return Docking(
        rotation,
        shift,
        comparison.microscope.origin - rotation.T @ shift,
        float(offset),
        log_likelihood,
        _fit(comparison, comparison.views, points, mirrored_pose),
    )


def _back_projection(comparison: Comparison) -> Tensor:
    """(v, v, v) complex Fourier coefficients of the map that the images add up to.

    Every image's coefficients times its CTF over the noise, where its rotation puts them; indices
    are x, y, z, and the point that poses turn about is at the corner.
    """
    size = min(_MAP_SIDE, comparison.box_size, 2 * int(comparison.side / _LEAST_VOXEL / 2))
    half = size // 2
    x = torch.arange(half + 1).float()
    y = torch.fft.fftfreq(size, 1 / size)
    inside = torch.hypot(y[:, None], x) < half - 1
    inside[0, 0] = False
    steps = torch.stack([x.expand(size, -1), y[:, None].expand(-1, half + 1)], dim=-1)[inside]
    # The centre of an image is at its middle, and the corner counts for Fourier transforms.
    signs = 1 - 2 * ((steps.sum(-1).round().long() % 2).abs())
    # Coefficients with kx = 0 are there twice, as their own conjugates.
    counts = torch.where(steps[:, 0] == 0, 0.5, 1.0)
    inverse = crop_spectrum(comparison.inverse_noise[comparison.ring].float(), size)[inside]
    total = torch.zeros(size**3, dtype=torch.complex64)
    for block in comparison.views.blocks():
        view = comparison.views[block]
        data = view.spectra * view.transfer * comparison.phases(view.shifts).conj()
        values = crop_spectrum(data, size).cpu()[:, inside] * (signs * counts * inverse.cpu())
        positions = steps @ view.rotations[:, :2].cpu()
        _splat(total, size, positions, values)
        _splat(total, size, -positions, values.conj())
    return total.view(size, size, size)


def _splat(
    total: Tensor, size: int, positions: Tensor, values: Tensor, first: Tensor | int = 0
) -> None:
    """Add values to the grid points of a periodic cube around (b, m, 3) positions, in steps.

    `total` is flat; `first` says where the cube of each of the b begins.
    """
    low = positions.floor()
    share = positions - low
    corner = low.long()
    for dx in (0, 1):
        for dy in (0, 1):
            for dz in (0, 1):
                step = torch.tensor([dx, dy, dz])
                weight = torch.where(step.bool(), share, 1 - share).prod(-1)
                i, j, k = ((corner + step) % size).unbind(-1)
                index = (i * size + j) * size + k + first
                total.index_add_(0, index.flatten(), (weight * values).flatten())


def even_rotations(n: int) -> np.ndarray:
    """(n, 3, 3) rotations spread evenly: a spiral over unit quaternions.

    Alexa (2022), Super-Fibonacci spirals, CVPR.
    """
    from scipy.spatial.transform import Rotation

    phi = math.sqrt(2)
    psi = 1.533751168755204288118041
    s = np.arange(n) + 0.5
    r, other = np.sqrt(s / n), np.sqrt(1 - s / n)
    alpha, beta = 2 * np.pi * s / phi, 2 * np.pi * s / psi
    quaternions = np.stack(
        [r * np.sin(alpha), r * np.cos(alpha), other * np.sin(beta), other * np.cos(beta)], axis=1
    )
    return Rotation.from_quat(quaternions).as_matrix()


def _laid_over(
    comparison: Comparison, volume: Tensor, points: Tensor, orientations: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The best few rotations and shifts (Å) of (m, 3) points over the map, best first."""
    size = len(volume)
    voxel = comparison.side / size
    step = -(-len(points) // _MAP_POINTS)
    points = points.cpu()[::step] / voxel
    weights = comparison.microscope.weight_tensor.cpu()[::step]
    rotations = torch.from_numpy(orientations).float()
    scores, indices = [], []
    for block in rotations.split(_ORIENTATIONS_AT_A_TIME):
        cubes = torch.zeros(len(block) * size**3)
        first = size**3 * torch.arange(len(block)).unsqueeze(1)
        _splat(cubes, size, points @ block.transpose(1, 2), weights, first)
        drawn = torch.fft.fftn(cubes.view(-1, size, size, size), dim=(1, 2, 3))
        overlap = torch.fft.ifftn(volume * drawn.conj(), dim=(1, 2, 3)).real.flatten(1)
        best = overlap.max(1)
        scores.append(best.values)
        indices.append(best.indices)
    score, index = torch.cat(scores), torch.cat(indices)
    chosen: list[int] = []
    for number in score.argsort(descending=True).tolist():
        turns = [_angle_of(orientations[number] @ orientations[other].T) for other in chosen]
        if all(turn > _APART for turn in turns):
            chosen.append(number)
        if len(chosen) == _CANDIDATES:
            break
    answers = []
    for number in chosen:
        at = np.array(np.unravel_index(int(index[number]), (size,) * 3))
        shift = (at - size * (at > size // 2)) * voxel
        answers.append((orientations[number], shift))
    return answers


def _refine_rigid(
    comparison: Comparison,
    views: _Views,
    points: Tensor,
    rotation: np.ndarray,
    shift: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Rotation and shift after some Gauss–Newton steps on these images."""
    for _ in range(_RIGID_STEPS):
        moved = _moved(points, rotation, shift)
        overlap, power = _overlaps(comparison, views, moved)
        brightness = comparison.brightness(overlap, power)

        def equations(
            block: slice, moved: Tensor = moved, brightness: Tensor = brightness
        ) -> tuple[Tensor, Tensor]:
            return _rigid_equations(comparison, views[block], moved, brightness)

        parts = map_shared(equations, views.blocks(), comparison.device)
        hessian = torch.stack([part[0] for part in parts]).sum(0).cpu()
        slope = torch.stack([part[1] for part in parts]).sum(0).cpu()
        ridge = 1e-6 * hessian.diagonal().clamp_min(1e-12)
        step = torch.linalg.solve(hessian + ridge.diag(), slope)
        turn = step[:3] * min(1.0, _MAX_TURN / max(float(step[:3].norm()), 1e-12))
        move = step[3:] * min(1.0, _MAX_SHIFT / max(float(step[3:].norm()), 1e-12))
        matrix = rotvec_to_matrix(turn[None])[0].numpy()
        rotation = matrix @ rotation
        shift = matrix @ shift + move.numpy()
    return rotation, shift


def _moved(points: Tensor, rotation: np.ndarray, shift: np.ndarray) -> Tensor:
    matrix = torch.from_numpy(rotation).to(points)
    return points @ matrix.T + torch.from_numpy(shift).to(points)


def _overlaps(comparison: Comparison, views: _Views, points: Tensor) -> tuple[Tensor, Tensor]:
    """(n, R) ⟨y, f⟩ and ⟨f, f⟩ of points elsewhere."""

    def sums(block: slice) -> tuple[Tensor, Tensor]:
        view = views[block]
        drawn = comparison.draw(view.rotations, points) * view.transfer
        drawn = drawn * comparison.phases(view.shifts)
        return comparison.sum_rings(view.spectra, drawn), comparison.sum_rings(drawn, drawn)

    parts = map_shared(sums, views.blocks(), comparison.device)
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _fit(
    comparison: Comparison,
    views: _Views,
    points: Tensor,
    pose: tuple[np.ndarray, np.ndarray],
) -> Tensor:
    """(n,) log likelihood of these images with the points there."""
    overlap, power = _overlaps(comparison, views, _moved(points, *pose))
    return comparison.log_likelihood(overlap, power)


def _mean_fit(
    comparison: Comparison, views: _Views, points: Tensor, pose: tuple[np.ndarray, np.ndarray]
) -> float:
    return float(_fit(comparison, views, points, pose).mean())


def _rigid_equations(
    comparison: Comparison,
    view: _Views,
    points: Tensor,
    brightness: Tensor,
) -> tuple[Tensor, Tensor]:
    """(6, 6) and (6,) normal equations of a turn and a shift of all points, summed over images."""
    axes = view.rotations[:, :2].transpose(1, 2)
    x, y, z = points.unbind(-1)
    zero = torch.zeros_like(x)
    # ω × x, for ω along x, y and z.
    turns = torch.stack(
        [
            torch.stack([zero, -z, y], dim=-1),
            torch.stack([z, zero, -x], dim=-1),
            torch.stack([-y, x, zero], dim=-1),
        ]
    )
    turns = turns.unsqueeze(0) @ axes.unsqueeze(1)
    shifts = view.rotations[:, :2].transpose(1, 2).unsqueeze(2).expand(-1, 3, len(points), 2)
    positions = points @ axes + view.shifts.unsqueeze(1)
    noise_scale = comparison.inverse_noise.sqrt()
    of_model = (brightness * noise_scale)[comparison.ring].float() * comparison.weights
    of_data = noise_scale[comparison.ring].float() * comparison.weights
    transfer = comparison.magnification * of_model * view.transfer
    box = comparison.box_size
    drawn = comparison.microscope.spectrum(positions, transfer, box_size=box)
    steps = comparison.microscope.tangent_spectra(
        positions, torch.cat([turns, shifts], dim=1), slice(None), transfer, box_size=box
    )
    jacobian = steps.mT
    residual = real_parts(view.spectra * of_data - drawn)
    hessian = jacobian @ jacobian.transpose(1, 2)
    slope = (jacobian @ residual.unsqueeze(-1)).squeeze(-1)
    return hessian.double().sum(0), slope.double().sum(0)


# Scale


@dataclass(frozen=True)
class Scale:
    """Size of the molecule over that of the reference; made by `measure_scale`.

    Attributes
    ----------
    value : float
    error : float
        Standard error, from how much the images differ; NaN where it cannot be measured.
    """

    value: float
    error: float


@dataclass(frozen=True, eq=False)
class _ScaleState:
    """Latents (n, p) of every image, their common mean (q,) in those that are free, the scale."""

    latents: Tensor
    mean: Tensor
    scale: Scale


def measure_scale(model: Model, comparison: Comparison) -> Scale:
    """How much larger than the reference the images show the molecule.

    Gauss–Newton in the scale, the mean of all conformations, and a brightness in each of some bands
    of frequencies; the conformation of each particle is integrated out under the elastic network's
    prior. The pixel size is that of the table over the scale.
    """
    views = comparison.views.spread(_SCALE_IMAGES)
    dynamics = model.bead_dynamics
    free = _free_latents(dynamics).to(model.device)
    variance = elastic_variance(model.dynamics).to(model.device)[free]
    state = _ScaleState(
        torch.zeros(len(views), model.n_latents, device=model.device),
        variance.new_zeros(len(free)),
        Scale(1.0, float("nan")),
    )
    for _ in range(_SCALE_PASSES):
        following = _scale_pass(model, comparison, views, state, free, variance)
        if following is None:
            return Scale(state.scale.value, float("nan"))
        state = following
    return state.scale


def _free_latents(dynamics: Dynamics) -> Tensor:
    """(q,) int64 rigid motion of all chains, and as many of their first modes as there is room."""
    n_rigid = sum(layout.latents.stop - layout.mode.stop for layout in dynamics.chains)
    room = max(0, _SCALE_LATENTS - n_rigid) // len(dynamics.chains)
    kept = np.ones(dynamics.n_latents, dtype=bool)
    for layout in dynamics.chains:
        kept[layout.mode.start + room : layout.mode.stop] = False
    return torch.from_numpy(np.flatnonzero(kept))


def _scale_pass(
    model: Model,
    comparison: Comparison,
    views: _Views,
    state: _ScaleState,
    free: Tensor,
    variance: Tensor,
) -> _ScaleState | None:
    """One Gauss–Newton step; None where the images show nothing."""
    blocks = views.blocks(_SCALE_BLOCK)
    device = comparison.device

    def sums(block: slice) -> tuple[Tensor, Tensor]:
        drawn, _ = _drawn_states(model, comparison, views[block], state, block, None)
        return comparison.sum_rings(views.spectra[block], drawn), comparison.sum_rings(drawn, drawn)

    parts = map_shared(sums, blocks, device)
    brightness = comparison.brightness(*(torch.cat(part) for part in zip(*parts, strict=True)))
    used = ((brightness > 0) & (comparison.noise > 0)).nonzero().squeeze(1)
    if len(used) < _SCALE_BANDS:
        return None
    band = torch.full((comparison.n_rings,), -1, device=device)
    for number, part in enumerate(torch.tensor_split(used, _SCALE_BANDS)):
        band[part] = number

    def reduced(block: slice) -> tuple[Tensor, ...]:
        answer = _scale_equations(
            model, comparison, views[block], state, block, brightness, band, free
        )
        return _integrate_conformations(*answer, variance)

    solved = map_shared(reduced, blocks, device)
    information, slope, covariance, own_slope, own_rows = (
        torch.cat(part) for part in zip(*solved, strict=True)
    )
    q = len(free)
    total, gradient = information.sum(0), slope.sum(0)
    total[:q, :q] += (1 / variance).diag()
    gradient[:q] -= state.mean / variance
    total += (1e-9 * total.diagonal().mean()) * torch.eye(len(total), device=device)
    step = torch.linalg.solve(total, gradient)
    # What each image pulls the scale by: their scatter is its error, whatever the noise is.
    pulls = torch.linalg.solve(total, (slope - information @ step).T)[q]
    value = state.scale.value + float(step[q].clamp(-0.05, 0.05))
    latents = state.latents.clone()
    own_step = own_slope - (own_rows @ step.unsqueeze(-1)).squeeze(-1)
    mean = state.mean + step[:q]
    latents[:, free] = (mean + (covariance @ own_step.unsqueeze(-1)).squeeze(-1)).float()
    return _ScaleState(latents, mean, Scale(value, float(pulls.square().sum().sqrt())))


def _drawn_states(
    model: Model,
    comparison: Comparison,
    view: _Views,
    state: _ScaleState,
    block: slice,
    weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Spectra of the conformations of these particles, and positions (b, m, 2) on the image."""
    coords = model.bead_dynamics.decode(state.latents[block]) - model.microscope.origin_tensor
    positions = state.scale.value * (coords @ view.rotations[:, :2].transpose(1, 2))
    positions = positions + view.shifts.unsqueeze(1)
    transfer = comparison.magnification * view.transfer
    if weights is not None:
        transfer = transfer * weights
    drawn = model.microscope.spectrum(positions, transfer, box_size=comparison.box_size)
    return drawn, positions


def _scale_equations(
    model: Model,
    comparison: Comparison,
    view: _Views,
    state: _ScaleState,
    block: slice,
    brightness: Tensor,
    band: Tensor,
    free: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """(b, k, k) and (b, k) normal equations of latents, scale and bands; (b, q) z − μ."""
    noise_scale = comparison.inverse_noise.sqrt()
    of_model = (brightness * noise_scale)[comparison.ring].float() * comparison.weights
    counted = torch.where(brightness > 0, noise_scale, 0.0)
    of_data = counted[comparison.ring].float() * comparison.weights
    drawn, positions = _drawn_states(model, comparison, view, state, block, of_model)
    latents, dynamics = state.latents[block], model.bead_dynamics
    axes = view.rotations[:, :2]
    transfer = comparison.magnification * of_model * view.transfer
    centred = (positions - view.shifts.unsqueeze(1)) / state.scale.value
    parts = []
    of_scale = torch.zeros((), device=comparison.device)
    for chain, layout in enumerate(dynamics.chains):
        tangents = state.scale.value * dynamics.tangents(latents, chain, axes)
        tangents = torch.cat([tangents, centred[:, layout.atoms].unsqueeze(1)], dim=1)
        steps = model.microscope.tangent_spectra(
            positions[:, layout.atoms],
            tangents,
            layout.atoms,
            transfer,
            box_size=comparison.box_size,
        )
        columns = steps.mT
        parts.append(columns[:, :-1])
        of_scale = of_scale + columns[:, -1:]
    spectrum = real_parts(drawn)
    of_part = band[comparison.ring].flatten().repeat_interleave(2)
    bands = torch.stack([spectrum * (of_part == number) for number in range(_SCALE_BANDS)], dim=1)
    jacobian = torch.cat([torch.cat(parts, dim=1)[:, free], of_scale, bands], dim=1)
    residual = (real_parts(view.spectra * of_data) - spectrum).unsqueeze(-1)
    hessian = (jacobian @ jacobian.transpose(1, 2)).double()
    slope = (jacobian @ residual).squeeze(-1).double()
    return hessian, slope, latents[:, free].double() - state.mean


def _integrate_conformations(
    hessian: Tensor, slope: Tensor, off_mean: Tensor, variance: Tensor
) -> tuple[Tensor, ...]:
    """Equations of what all particles share: mean of latents, scale and bands.

    With z = μ + δ and δ ~ N(0, Σ) of every particle: H − H_z C H_zᵀ and g − H_z C g_z, where
    C = (H_zz + Σ⁻¹)⁻¹. Also C, g_z and H_zᵀ, from which each particle's latents follow.
    """
    q = len(variance)
    of_latents = hessian[:, :, :q]
    slope = slope + (of_latents @ off_mean.unsqueeze(-1)).squeeze(-1)
    covariance = (hessian[:, :q, :q] + (1 / variance).diag()).inverse()
    gain = of_latents @ covariance
    information = hessian - gain @ of_latents.transpose(1, 2)
    reduced = slope - (gain @ slope[:, :q, None]).squeeze(-1)
    return information, reduced, covariance, slope[:, :q], of_latents.transpose(1, 2)
