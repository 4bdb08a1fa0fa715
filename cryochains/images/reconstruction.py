"""A volume from particle images alone: back-projection weighted by the CTF, in Fourier space.

Symbols: V(q) → the volume's transform, Y_i(k) → an image's, C_i → its brightness times its CTF,
w_i → `weights`, R_i → `rotations`, t_i → `shifts`, λ → the Wiener term, one a shell. The transform
of an image is the plane of the volume's that the first two rows of R span, and so

    V(q) = Σ_i w_i C_i e^(2πi k·t_i) Y_i(k) / (Σ_i w_i C_i² + λ),   q = R_iᵀ (k_x, k_y, 0).

No atom and no reference is seen but through the poses. The sums are made by a kernel compiled by
numba, on a grid twice as fine as the box needs, by trilinear weights.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mrcfile
import numpy as np
import torch
from torch import Tensor

from .._arguments import Angstroms, Count, Point, Seed, Volume, checked
from .._devices import choose_device
from .._files import atomic_path
from .._processes import is_first, own_share, require_same, total
from .particles import Batch, ParticleStack

# Points of the grid of sums a Fourier pixel of the box.
_OVERSAMPLING = 2
# Where half maps correlate less, a map is said to show nothing more (Rosenthal and Henderson 2003).
_RESOLVED = 0.143
# Half maps are compared under a first Wiener term of so many times the mean weight of a shell.
_FIRST_WIENER = 0.5
# The correlation of half maps that a Wiener term is made of is between this and one minus this.
_LEAST_FSC = 1e-3
# Without half maps nothing is known of the noise: the Wiener term over the mean weight of a shell.
_BLIND_WIENER = 0.1
# Beside a mean weight of about one a particle; nothing was added where both are zero.
_TINY = 1e-12
# Gaussians whose planes, box² numbers each, are held at a time.
_ATOMS_AT_A_TIME = 64
# Pixels over which a sphere ends, as a share of the box.
_SOFT_EDGE = 1 / 12


@dataclass(frozen=True, eq=False, repr=False)
class Map:
    """A density map; made by `reconstruct`.

    Attributes
    ----------
    volume : (box, box, box) float32 array
        (z, y, x), density per Å³, protein-bright; `origin` is at voxel ``box // 2``. Its mean is
        uncertain, since the CTF leaves little of it in the images.
    pixel_size : float
        Å.
    origin : (3,) array
        (x, y, z) of that voxel in Å, in the frame of the structure.
    n_particles : int
        With a weight above zero.
    gain : (box, box, box // 2 + 1) float32 array
        What `volume` has of the density at each frequency, on the grid of ``rfftn``: less than 1
        where noise is strong, or few particles show that direction.
    half1, half2 : (box, box, box) float32 array or None
        Of two random halves of the particles, filtered as `volume`, which is about their mean.
    fsc : (box // 2 + 1,) array or None
        Correlation of the half maps on shells of frequencies one Fourier pixel wide. The halves
        share the poses: errors of those that both make alike are not seen.
    """

    volume: np.ndarray
    pixel_size: float
    origin: np.ndarray
    n_particles: int
    gain: np.ndarray
    half1: np.ndarray | None = None
    half2: np.ndarray | None = None
    fsc: np.ndarray | None = None

    @property
    def box_size(self) -> int:
        """Voxels a side."""
        return len(self.volume)

    @property
    def frequencies(self) -> np.ndarray:
        """(box // 2 + 1,) Å⁻¹, of the shells of `fsc`."""
        return np.arange(self.box_size // 2 + 1) / (self.box_size * self.pixel_size)

    @cached_property
    def resolution(self) -> float | None:
        """Å, where `fsc` falls below 0.143 first; at best two pixels. None without half maps."""
        if self.fsc is None:
            return None
        return resolution_of(self.fsc, self.box_size * self.pixel_size)

    @property
    def n_resolved(self) -> int:
        """Shells before the first whose half maps correlate by less than 0.143; all without."""
        return self.box_size // 2 + 1 if self.fsc is None else _n_resolved(self.fsc)

    @checked
    def save(self, path: str | os.PathLike) -> Path:
        """Write `volume` as .mrc, such that it lies over the structure in ChimeraX.

        Raises
        ------
        ValueError
            For another suffix, or a folder that cannot be written.
        """
        path = Path(path)
        if path.suffix.lower() not in (".mrc", ".map"):
            raise ValueError(
                f"expected a path that ends in .mrc, got {path.name}; "
                f"try {path.name.split('.')[0] or 'map'}.mrc"
            )
        corner = self.origin - self.box_size // 2 * self.pixel_size
        with atomic_path(path) as part:
            write_volume(part, self.volume, self.pixel_size, corner)
        return path

    def __repr__(self) -> str:
        parts = [
            f"{self.box_size}³ voxels × {self.pixel_size:g} Å",
            f"{self.n_particles:,} particles",
        ]
        if self.resolution is not None:
            parts.append(f"{self.resolution:.1f} Å at FSC 0.143")
        return f"Map({', '.join(parts)})"


@checked
def reconstruct(
    particles: ParticleStack,
    *,
    weights: Sequence[float] | np.ndarray | Tensor | None = None,
    scale: Sequence[float] | np.ndarray | Tensor | None = None,
    half_maps: bool = True,
    mask: np.ndarray | None = None,
    origin: Point | None = None,
    batch_size: Count = 64,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Map:
    """Reconstruct a density map from particle images and their poses alone.

    Parameters
    ----------
    particles : ParticleStack
        Memory does not grow with their number: about 300 box³ bytes.
    weights : (n,) array, optional
        How much each counts, such as its probability to show the molecule over the variance of its
        noise; by default all alike. Images that weigh nothing are not read.
    scale : (n,) array, optional
        Brightness of each image over the map's; by default 1.
    half_maps : bool
        Also reconstruct two random halves: from their correlation come the resolution and the
        Wiener term. False takes a Wiener term of a tenth of the mean weight on each shell.
    mask : (box, box, box) array, optional
        Half maps are compared within; by default a sphere with a soft edge.
    origin : (3,) array, optional
        Where the point that the poses turn about, which is at the centre of the box, is in the
        frame of a structure, Å: ``model.structure.origin``. By default zero.
    batch_size : int
        Images read at a time.
    seed : int
        Chooses the halves.
    device : torch device, optional
        Where images are transformed; the sums are always made on the CPU.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Map

    Raises
    ------
    ValueError
        For weights or scales that are negative, not finite, or not one a particle, or when fewer
        than two particles weigh more than nothing.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 100, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> reconstruct(particles, origin=closed.origin, progress=False)
    Map(32³ voxels × 3.88 Å, 100 particles, 7.8 Å at FSC 0.143)
    """
    n = len(particles)
    each_weight = _checked_numbers(weights, n, "weights")
    each_scale = _checked_numbers(scale, n, "scale")
    used = np.flatnonzero(each_weight > 0)
    if len(used) < 2:
        raise ValueError(
            f"expected two particles or more of a weight above zero, got {len(used)}; "
            "try more particles or other weights"
        )
    require_same(particles=particles.metadata_digest(), seed=seed)
    box = particles.box_size
    mask = soft_sphere(box) if mask is None else _checked_mask(mask, box)
    # Sums in single precision are best of numbers near one.
    each_weight /= each_weight[used].mean()
    # An image that is listed twice has one noise: both its rows are of one half.
    images, image = np.unique(particles.ids[used].astype(str), return_inverse=True)
    half = (np.random.default_rng(seed).permutation(len(images)) % 2)[image]
    parts = [used[half == 0], used[half == 1]] if half_maps else [used]
    sums = []
    for number, rows in enumerate(parts):
        title = f"back-projecting, half {number + 1} of 2" if half_maps else "back-projecting"
        own = rows[own_share(len(rows))]
        batches = particles[own].batches(
            batch_size,
            choose_device(device),
            progress=title if progress and is_first() else None,
        )
        sums.append(total(_summed(batches, each_weight[own], each_scale[own], particles)))
    known: dict[str, Any] = {
        "pixel_size": particles.pixel_size,
        "origin": np.zeros(3) if origin is None else np.asarray(origin, dtype=np.float64),
        "n_particles": len(used),
    }
    if half_maps:
        wiener = _wiener_term(sums, mask)
        halves = [_divided(part, wiener / 2)[0] for part in sums]
        known["half1"], known["half2"] = halves
        known["fsc"] = compute_fsc(halves[0] * mask, halves[1] * mask)
        sums[0] += sums[1]
    else:
        wiener = _BLIND_WIENER * _shell_means(sums[0][..., 2])
    volume, gain = _divided(sums[0], wiener)
    return Map(volume, gain=gain, **known)


@checked
def compute_fsc(a: Volume, b: Volume) -> np.ndarray:
    """(box // 2 + 1,) Fourier shell correlation of two (box, box, box) volumes.

    On shells one Fourier pixel wide; zero where one of them is zero.

    Examples
    --------
    >>> volume = np.random.default_rng(0).standard_normal((8, 8, 8))
    >>> compute_fsc(volume, 2 * volume).round(6).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0]
    """
    if a.shape != b.shape or len(set(a.shape)) > 1:
        raise ValueError(
            f"expected cubes of one box, got {a.shape} and {b.shape}; try maps of one size"
        )
    first, second = transform_volume(a), transform_volume(b)
    product = sum_shells((first * second.conj()).real)
    powers = sum_shells(first.abs().square()) * sum_shells(second.abs().square())
    return np.divide(product, np.sqrt(powers), out=np.zeros_like(product), where=powers > 0)


def transform_volume(volume: np.ndarray | Tensor) -> Tensor:
    """(box, box, box//2 + 1) Fourier transform of a volume whose origin is voxel ``box // 2``."""
    centred = torch.fft.ifftshift(torch.as_tensor(volume), dim=(0, 1, 2))
    return torch.fft.rfftn(centred)


def untransform_volume(spectrum: Tensor) -> np.ndarray:
    """(box, box, box) volume of what `transform_volume` gives."""
    centred = torch.fft.irfftn(spectrum, s=(len(spectrum),) * 3)
    return torch.fft.fftshift(centred, dim=(0, 1, 2)).numpy()


def sum_shells(values: Tensor) -> np.ndarray:
    """(box // 2 + 1,) float64 sums of real (box, box, box//2 + 1) values, both halves of them.

    Over shells one Fourier pixel wide; what is beyond the last counts nowhere.
    """
    shell = _shell_numbers(len(values))
    counts = torch.full((values.shape[-1],), 2.0, dtype=torch.float64)
    # Columns that are their own mirror image.
    counts[0] = 1.0
    counts[-1] = 1.0
    weighted = (values.double() * counts).flatten()
    sums = torch.zeros(len(values) // 2 + 2, dtype=torch.float64)
    return sums.index_add_(0, shell.flatten(), weighted)[:-1].numpy()


def scale_shells(spectrum: Tensor, factors: np.ndarray) -> Tensor:
    """(box, box, box//2 + 1) `spectrum` times a factor (box // 2 + 1,) on each shell.

    Zero beyond the last shell.
    """
    table = torch.zeros(len(factors) + 1)
    table[:-1] = torch.from_numpy(factors)
    return spectrum * table[_shell_numbers(len(spectrum))]


def _shell_numbers(box: int) -> Tensor:
    """(box, box, box//2 + 1) shell of each frequency; box // 2 + 1 of those beyond the last."""
    k = torch.fft.fftfreq(box, 1 / box)
    radius = torch.sqrt(
        k[:, None, None].square() + k[:, None].square() + k[: box // 2 + 1].square()
    )
    return radius.round().long().clamp_(max=box // 2 + 1)


def draw_volume(
    coords: Tensor, weights: Tensor, widths: Tensor, box_size: int, pixel_size: float
) -> np.ndarray:
    """(box, box, box) float32 density per Å³ of Gaussians, of frequencies up to the voxels' limit.

    Parameters
    ----------
    coords : (n, 3) tensor
        (x, y, z) in Å from voxel ``box // 2``.
    weights, widths : (n,) tensors
        Scattering, and Å.
    box_size, pixel_size
        Voxels a side, and Å.

    Notes
    -----
    V(k) = Σ_a w_a exp(−2πi k·x_a − 2π²σ_a²|k|²), which is a product of one factor an axis: no
    Gaussian is too narrow for the grid, and none is cut off. All of the sum is one matrix product.

    Examples
    --------
    >>> volume = draw_volume(torch.zeros(1, 3), torch.ones(1), torch.ones(1), 16, 2.0)
    >>> round(float(volume.sum()) * 2.0**3, 4)
    1.0
    """
    k = torch.fft.fftfreq(box_size, pixel_size, dtype=torch.float64)
    along_x = k[: box_size // 2 + 1].abs()
    spectrum = torch.zeros(box_size**2, len(along_x), dtype=torch.complex64)
    coords = coords.double()
    falloff = -2 * torch.pi**2 * widths.double().square()
    for chunk in torch.arange(len(coords)).split(_ATOMS_AT_A_TIME):
        factors = []
        for axis, frequencies in ((2, k), (1, k), (0, along_x)):
            phase = -2 * torch.pi * coords[chunk, axis, None] * frequencies
            size = torch.exp(falloff[chunk, None] * frequencies.square())
            factors.append(torch.polar(size, phase).to(torch.complex64))
        in_z, in_y, in_x = factors
        in_z = in_z * weights[chunk, None]
        planes = (in_z[:, :, None] * in_y[:, None]).flatten(1)
        spectrum.addmm_(planes.T, in_x)
    spectrum = spectrum.view(box_size, box_size, -1) / pixel_size**3
    # The highest frequency of an even box has no mirror image: without it the density is the same
    # wherever the grid is.
    spectrum[box_size // 2] = 0
    spectrum[:, box_size // 2] = 0
    spectrum[..., -1] = 0
    return untransform_volume(spectrum)


@checked
def write_volume(
    path: str | os.PathLike,
    volume: Volume,
    pixel_size: Angstroms,
    corner: Point,
) -> None:
    """Write a (z, y, x) volume as an MRC file in float32.

    Parameters
    ----------
    path : path
        Written as it goes: that of `atomic_path`.
    volume : array
    pixel_size : float
        Å a voxel.
    corner : (3,) array
        (x, y, z) of the centre of the first voxel in Å, in the frame of the structure.

    Examples
    --------
    >>> with atomic_path("results/doc/cube.mrc") as part:
    ...     write_volume(part, np.ones((4, 4, 4)), 2.0, (0.0, 0.0, 0.0))
    """
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(np.ascontiguousarray(volume, dtype=np.float32))
        mrc.set_volume()
        mrc.voxel_size = pixel_size
        mrc.header.origin.x, mrc.header.origin.y, mrc.header.origin.z = corner


def resolution_of(fsc: np.ndarray, side: float) -> float:
    """Å, where a curve (R,) of shells 1/`side` Å⁻¹ wide falls below 0.143 first.

    Linear between shells; where it never falls, two pixels.

    Examples
    --------
    >>> round(resolution_of(np.array([1.0, 1.0, 0.5, 0.0]), side=60.0), 1)
    22.1
    """
    last = _n_resolved(fsc)
    if last == len(fsc):
        return side / (len(fsc) - 1)
    above, below = (1.0 if last == 1 else fsc[last - 1]), fsc[last]
    return float(side / (last - 1 + (above - _RESOLVED) / (above - below)))


def soft_sphere(box: int) -> np.ndarray:
    """(box, box, box) float32 mask: the largest sphere, with an edge of a twelfth of the box.

    Examples
    --------
    >>> mask = soft_sphere(24)
    >>> float(mask[12, 12, 12]), float(mask[0, 12, 12])
    (1.0, 0.0)
    """
    x = np.arange(box) - box // 2
    radius = np.sqrt(x[:, None, None] ** 2 + x[:, None] ** 2 + x**2)
    edge = max(2.0, _SOFT_EDGE * box)
    depth = np.clip((box / 2 - radius) / edge, 0, 1)
    return (0.5 - 0.5 * np.cos(np.pi * depth)).astype(np.float32)


def _n_resolved(fsc: np.ndarray) -> int:
    """Number of shells before the first, but the innermost, that correlates too little."""
    low = np.flatnonzero(~(fsc[1:] >= _RESOLVED))
    return int(low[0]) + 1 if len(low) else len(fsc)


def _checked_numbers(
    values: Sequence[float] | np.ndarray | Tensor | None, n: int, name: str
) -> np.ndarray:
    """(n,) float64, ones by default."""
    if values is None:
        return np.ones(n)
    array = np.asarray(values, dtype=np.float64)
    if array.shape != (n,) or not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"expected {name} ({n},), finite and not negative, one a particle, got "
            f"{array.shape}; try {name}=None"
        )
    return array


def _checked_mask(mask: np.ndarray, box: int) -> np.ndarray:
    mask = np.asarray(mask, dtype=np.float32)
    if mask.shape != (box, box, box):
        raise ValueError(
            f"expected a mask ({box}, {box}, {box}), got {mask.shape}; try mask=None, a sphere"
        )
    return mask


def _summed(
    batches: Iterable[Batch], weights: np.ndarray, scale: np.ndarray, particles: ParticleStack
) -> Tensor:
    """(m, m, m/2 + 1, 3) numerator (real, imaginary) and weight, on a grid of m = 2 box points."""
    # numba takes 60 MB, and few who load particles need it.
    from .insertion import insert_planes

    box = particles.box_size
    fine = _OVERSAMPLING * box
    sums = np.zeros((fine, fine, fine // 2 + 1, 3), dtype=np.float32)
    for batch in batches:
        rows = batch.rows.cpu()
        values, powers = _weighted(batch, weights[rows], scale[rows], particles.pixel_size)
        axes = np.ascontiguousarray(batch.rotations[:, :2].cpu().numpy())
        insert_planes(sums, values.cpu().numpy(), powers.cpu().numpy(), axes)
    half = torch.from_numpy(sums)
    # A frequency and its negative were added once, with that half of x that is not negative: on
    # the plane x = 0 both are on the grid.
    plane = half[:, :, 0]
    mirrored = plane.flip((0, 1)).roll((1, 1), (0, 1))
    half[:, :, 0] = plane + mirrored * torch.tensor([1.0, -1.0, 1.0])
    return half


def _weighted(
    batch: Batch, weights: np.ndarray, scale: np.ndarray, pixel_size: float
) -> tuple[Tensor, Tensor]:
    """(b, box, box//2 + 1) w C Y, centred and as of density per Å³, and w C²."""
    images, device = batch.images, batch.images.device
    box = images.shape[-1]
    spectra = torch.fft.rfft2(torch.fft.ifftshift(images, dim=(1, 2)))
    kx = torch.fft.rfftfreq(box, pixel_size, device=device)
    ky = torch.fft.fftfreq(box, pixel_size, device=device)
    x, y = batch.shifts[:, :, None, None].unbind(1)
    phases = 2 * torch.pi * (kx * x + ky[:, None] * y)
    brightness = torch.as_tensor(scale, dtype=torch.float32, device=device)[:, None, None]
    transfer = brightness.expand(spectra.shape) if batch.ctf is None else brightness * batch.ctf
    counts = torch.as_tensor(weights, dtype=torch.float32, device=device)[:, None, None]
    weighted = counts * transfer
    values = spectra * (weighted / pixel_size) * torch.polar(torch.ones_like(phases), phases)
    return values.contiguous(), (weighted * transfer).contiguous()


def _wiener_term(sums: Sequence[Tensor], mask: np.ndarray) -> np.ndarray:
    """(box // 2 + 1,) variance of the noise over that of the signal, of the sums of two halves.

    FSC / (1 − FSC) is the ratio of signal to noise in a half map, and noise there is one over the
    weight.
    """
    weight = np.mean([_shell_means(part[..., 2]) for part in sums], axis=0)
    first, second = (_divided(part, _FIRST_WIENER * weight)[0] for part in sums)
    fsc = np.clip(compute_fsc(first * mask, second * mask), _LEAST_FSC, 1 - _LEAST_FSC)
    # The mean of a map says nothing about the noise.
    fsc[0] = fsc[1]
    return weight * (1 - fsc) / fsc


def _shell_means(values: Tensor) -> np.ndarray:
    """(box // 2 + 1,) means of values (m, m, m//2 + 1) on the grid of sums, on the box's shells."""
    means = sum_shells(values) / sum_shells(torch.ones(1).expand(values.shape))
    # Every second of the shells of the finer grid.
    return means[::_OVERSAMPLING]


def _divided(sums: Tensor, wiener: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(box, box, box) float32 volume of sums, with a Wiener term (box // 2 + 1,); and its gain.

    (box, box, box//2 + 1).
    """
    fine = len(sums)
    box = fine // _OVERSAMPLING
    squares = torch.fft.fftfreq(fine, _OVERSAMPLING / fine).square()
    own = squares[: fine // 2 + 1]
    table = torch.from_numpy(np.append(wiener, wiener[-1])).float()
    spectrum = torch.empty(sums.shape[:3], dtype=torch.complex64)
    gain = torch.empty(sums.shape[:3])
    # A slab at a time: the whole would take much memory more than once.
    for z in range(fine):
        radius = torch.sqrt(squares[z] + squares[:, None] + own).clamp_(max=len(wiener) - 1)
        shell = radius.long()
        term = torch.lerp(table[shell], table[shell + 1], radius - shell)
        weight = sums[z, ..., 2]
        precision = (weight + term).clamp_min(_TINY)
        gain[z] = weight / precision
        spectrum[z] = torch.view_as_complex(sums[z, ..., :2].contiguous()) / precision
    volume = torch.fft.irfftn(spectrum, s=(fine,) * 3)
    x = torch.arange(box) - box // 2
    # Trilinear weights multiply the volume by a squared sinc along each axis.
    falloff = torch.sinc(x / fine).square()
    index = x % fine
    cropped = volume[index][:, index][:, :, index]
    cropped /= falloff[:, None, None] * falloff[:, None] * falloff
    return cropped.numpy(), _coarse_gain(gain)


def _coarse_gain(gain: Tensor) -> np.ndarray:
    """(box, box, box//2 + 1) of a gain on the finer grid: means over neighbours, as cropping takes.

    A crop of the volume mixes each frequency of the box with those between.
    """
    mirrored = gain[:, :, 1].flip((0, 1)).roll((1, 1), (0, 1))
    beyond = torch.cat([mirrored[:, :, None], gain, gain[:, :, -2:-1]], dim=2)
    gain = gain / 2 + (beyond[:, :, :-2] + beyond[:, :, 2:]) / 4
    for axis in (0, 1):
        gain = gain / 2 + (gain.roll(1, axis) + gain.roll(-1, axis)) / 4
    return gain[::_OVERSAMPLING, ::_OVERSAMPLING, ::_OVERSAMPLING].numpy()
