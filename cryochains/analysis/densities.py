"""Conformations as densities in files: an .mrc each, which ChimeraX opens as a volume series.

Symbols: d → `resolution`, σ → width of an atom's Gaussian. As in ChimeraX's molmap,
σ = d / (π√2): the transform of an atom, exp(−2π²σ²k²), falls to 1/e at k = 1/d.
"""

import math
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from .._arguments import Angstroms, Latents, checked
from .._files import atomic_path
from ..images import write_volume
from ..model import Model
from .conformations import decode_ensemble

# Width of an atom over the resolution.
_WIDTH = 1 / (math.pi * math.sqrt(2))
# Voxels a resolution: a Gaussian is then sampled such that its sum is right to 0.1 %.
_VOXELS = 3.0
# Widths at which an atom's Gaussian ends: beyond are 0.01 % of it.
_EXTENT = 4.2
# By default no finer than this, in Å: what normal modes of residues describe.
_LEAST_RESOLUTION = 5.0
# Voxels a side at most: half a gigabyte a file.
_MOST_VOXELS = 512
# Atoms whose Gaussians are held at a time.
_DRAWN_ATOMS = 2048
# Digits of a number in a name, at least: names have to sort in the order of the series.
_DIGITS = 3


@checked
def save_densities(
    path: str | os.PathLike, model: Model, latents: Latents, resolution: Angstroms | None = None
) -> list[Path]:
    """Write the densities of the conformations at (m, p) `latents`: x-001.mrc, x-002.mrc, …

    All atoms, each a Gaussian as heavy as its nucleus, on one grid that holds the molecule in every
    conformation and lies over the atoms that `save_conformations` writes.

    Parameters
    ----------
    path : path
        Ends in .mrc; each file's name has its number between name and suffix.
    model : Model
    latents : (m, p) tensor
    resolution : float, optional
        Å, at which the transform of an atom falls to 1/e, as in ChimeraX's molmap. By default two
        pixels of the model's images, and at least 5 Å.

    Returns
    -------
    list of Path
        Of the files, in order: all are written, or none.

    Raises
    ------
    ValueError
        For another suffix, a folder that cannot be written or holds more files of the series, a
        resolution that is not positive or so fine that a side has over 512 voxels, or latents that
        `decode_ensemble` refuses.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> [file.name for file in save_densities("results/doc/two.mrc", model, torch.zeros(2, 12))]
    ['two-001.mrc', 'two-002.mrc']
    """
    path = Path(path)
    if path.suffix.lower() != ".mrc":
        raise ValueError(
            f"expected a path that ends in .mrc, got {path.name}; "
            f"try {path.name.split('.')[0] or 'motion'}.mrc"
        )
    if resolution is None:
        resolution = max(2 * model.pixel_size, _LEAST_RESOLUTION)
    ensemble = decode_ensemble(model, latents)
    coords = ensemble.getCoordsets()
    files = _series(path, len(coords))
    voxel = resolution / _VOXELS
    corner, shape = _grid_around(coords, voxel, resolution)
    weights = model.structure.all_atoms().weights
    with ExitStack() as stack:
        # All are drawn before the first gets its name.
        parts = [stack.enter_context(atomic_path(file)) for file in files]
        for part, atoms in zip(parts, coords, strict=True):
            volume = _draw_atoms(atoms - corner, weights, _WIDTH * resolution, voxel, shape)
            write_volume(part, volume, voxel, corner)
    return files


def _series(path: Path, n: int) -> list[Path]:
    """Names of `n` files; no other file may be of the series that a program would open."""
    digits = max(_DIGITS, len(str(n)))
    numbers = [f"{number:0{digits}d}" for number in range(1, n + 1)]
    files = [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in numbers]
    names = {file.name for file in files}
    beside = path.parent.iterdir() if path.parent.is_dir() else []
    others = [
        other.name
        for other in beside
        if other.suffix == path.suffix
        and other.name.startswith(f"{path.stem}-")
        and other.stem[len(path.stem) + 1 :].isdecimal()
        and other.name not in names
    ]
    if others:
        raise ValueError(
            f"expected a folder without other files of the series {path.stem}-*{path.suffix}, got "
            f"{min(others)}, which would be opened as one of its {n}; try another name"
        )
    return files


def _grid_around(
    coords: np.ndarray, voxel: float, resolution: float
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(x, y, z) Å of the first voxel, and (z, y, x) voxels, around (m, n, 3) coordinates."""
    margin = _EXTENT * _WIDTH * resolution + voxel
    corner = np.floor((coords.min((0, 1)) - margin) / voxel) * voxel
    sides = np.ceil((coords.max((0, 1)) + margin - corner) / voxel).astype(int) + 1
    if sides.max() > _MOST_VOXELS:
        least = resolution * float(sides.max()) / _MOST_VOXELS
        raise ValueError(
            f"expected a resolution at which a side has at most {_MOST_VOXELS} voxels, got "
            f"{sides.max()} at {resolution:g} Å; try resolution={math.ceil(least)}"
        )
    x, y, z = sides.tolist()
    return corner, (z, y, x)


def _draw_atoms(
    coords: np.ndarray,
    weights: np.ndarray,
    width: float,
    voxel: float,
    shape: tuple[int, int, int],
) -> np.ndarray:
    """(z, y, x) float32 density per Å³ of Gaussians at (n, 3) Å from the first voxel.

    A Gaussian is a product of one factor an axis, and is zero beyond a cube around it.
    """
    extent = math.ceil(_EXTENT * width / voxel)
    steps = torch.arange(-extent, extent + 1)
    _, ny, nx = shape
    volume = torch.zeros(math.prod(shape))
    positions = torch.from_numpy(coords) / voxel
    heights = torch.from_numpy(weights) / (width * math.sqrt(2 * math.pi)) ** 3
    for chunk in torch.arange(len(coords)).split(_DRAWN_ATOMS):
        nearest = positions[chunk].round()
        # (b, 3, 2 extent + 1), along x, y and z.
        distance = (steps - (positions[chunk] - nearest).unsqueeze(-1)) * voxel
        in_x, in_y, in_z = torch.exp(-0.5 * (distance / width).square()).unbind(1)
        x, y, z = (nearest.long().unsqueeze(-1) + steps).unbind(1)
        in_z = in_z * heights[chunk, None]
        values = in_z[:, :, None, None] * in_y[:, None, :, None] * in_x[:, None, None, :]
        index = (z[:, :, None, None] * ny + y[:, None, :, None]) * nx + x[:, None, None, :]
        volume.index_add_(0, index.flatten(), values.flatten().float())
    return volume.view(shape).numpy()
