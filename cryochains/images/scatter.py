"""Projections and their derivatives on a CPU: each atom is added to the few pixels it touches."""

import math

import numpy as np
import torch
from torch import Tensor

from .._compiled import compiled

# An atom ends where it has so many rounding errors of its height left: 5 widths from its centre in
# single precision.
_ROUNDING_ERRORS = 32
# Of so many tangents, it pays to leave out the corners of an atom's square of pixels.
_CORNERS_COUNT = 6


def scatter_tangents(
    xy: Tensor, tangents: Tensor, amplitudes: Tensor, grid: Tensor, sigma: Tensor
) -> Tensor:
    """(b, k, box, box) Σ_a A_a ∂/∂(x, y) exp(−|r − xy_a|² / 2σ_a²) · tangent_a for each tangent.

    Parameters
    ----------
    xy : (b, n, 2) tensor
        Å, on a CPU as all others.
    tangents : (b, k, n, 2) tensor
    amplitudes : (b, n) tensor
        A_a/σ_a²: the height over the square of the width.
    grid : (box,) tensor
        Å, as `pixel_grid` gives it.
    sigma : (b, n) tensor
        Å.

    Examples
    --------
    >>> grid, one = torch.arange(-2.0, 2.0), torch.ones(1, 1)
    >>> right = torch.tensor([[[[1.0, 0.0]]]])
    >>> slope = scatter_tangents(torch.zeros(1, 1, 2), right, one, grid, one)[0, 0]
    >>> [round(value, 4) for value in slope[2].tolist()]
    [-0.2707, -0.6065, 0.0, 0.6065]
    """
    images = xy.new_empty(len(xy), tangents.shape[1], len(grid), len(grid))
    parts = (xy, tangents, amplitudes, *_falloffs_and_extents(sigma), grid, images)
    _scatter(*(part.contiguous().numpy() for part in parts))
    return images


def scatter_atoms(xy: Tensor, amplitudes: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """(b, box, box) Σ_a A_a exp(−|r − xy_a|² / 2σ_a²), from A_a (b, n); as `scatter_tangents`.

    Examples
    --------
    >>> grid, one = torch.arange(-2.0, 2.0), torch.ones(1, 1)
    >>> image = scatter_atoms(torch.zeros(1, 1, 2), one, grid, one)[0]
    >>> [round(value, 4) for value in image[2].tolist()]
    [0.1353, 0.6065, 1.0, 0.6065]
    """
    images = xy.new_zeros(len(xy), len(grid), len(grid))
    parts = (xy, amplitudes, *_falloffs_and_extents(sigma), grid, images)
    _scatter_images(*(part.contiguous().numpy() for part in parts))
    return images


def _falloffs_and_extents(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """−1/2σ², and Å from its centre at which an atom ends."""
    n_widths = math.sqrt(-2 * math.log(_ROUNDING_ERRORS * torch.finfo(sigma.dtype).eps))
    return -0.5 / sigma.square(), n_widths * sigma


@compiled
def _window(center: float, extent: float, grid: np.ndarray) -> tuple[int, int]:
    """First pixel within `extent` of `center`, and the one after the last."""
    pixel = grid[1] - grid[0]
    start = max(0, math.ceil((center - extent - grid[0]) / pixel))
    end = min(len(grid), math.floor((center + extent - grid[0]) / pixel) + 1)
    return start, max(start, end)


@compiled
def _fill_bells(
    bells: np.ndarray, start: int, end: int, center: float, falloff: float, grid: np.ndarray
) -> None:
    """exp(falloff · (grid − center)²) into `bells` from pixel `start` to before `end`.

    From each pixel to the next by products, in double precision, which are quicker than exp.
    """
    if end <= start:
        return
    pixel = np.float64(grid[1] - grid[0])
    away = np.float64(grid[start]) - np.float64(center)
    rate = np.float64(falloff)
    bell = math.exp(rate * away * away)
    step = math.exp(rate * pixel * (2 * away + pixel))
    change = math.exp(2 * rate * pixel * pixel)
    for j in range(start, end):
        bells[j] = bell
        bell *= step
        step *= change


@compiled
def _add_atom(
    sums: np.ndarray,
    across: np.ndarray,
    along: np.ndarray,
    bells_x: np.ndarray,
    bells_y: np.ndarray,
    xy: np.ndarray,
    steps: np.ndarray,
    amplitude: float,
    falloff: float,
    extent: float,
    grid: np.ndarray,
) -> None:
    """Add one atom's derivatives along `steps` (k, 2) to `sums` (box, box·k).

    All tangents of a pixel are side by side, so that a row of the atom is one long loop of two
    multiply-adds; `across` and `along` (box·k,) hold what all its rows have in common.
    """
    k = len(steps)
    left, right = _window(xy[0], extent, grid)
    top, bottom = _window(xy[1], extent, grid)
    _fill_bells(bells_x, left, right, xy[0], falloff, grid)
    _fill_bells(bells_y, top, bottom, xy[1], falloff, grid)
    for j in range(left, right):
        bell = amplitude * bells_x[j]
        slope = bell * (grid[j] - xy[0])
        by_x = across[j * k : (j + 1) * k]
        by_y = along[j * k : (j + 1) * k]
        for m in range(k):
            by_x[m] = slope * steps[m, 0]
            by_y[m] = bell * steps[m, 1]
    for i in range(top, bottom):
        away = grid[i] - xy[1]
        bell = bells_y[i]
        slope = bell * away
        start, end = left, right
        if k >= _CORNERS_COUNT:
            half = math.sqrt(max(0.0, extent * extent - away * away))
            start, end = _window(xy[0], half, grid)
            # Rounding may find one pixel more than `across` holds.
            start = max(start, left)
            end = max(start, min(end, right))
        row = sums[i, start * k : end * k]
        by_x = across[start * k : end * k]
        by_y = along[start * k : end * k]
        for t in range(len(row)):
            row[t] += bell * by_x[t] + slope * by_y[t]


@compiled
def _scatter(
    xy: np.ndarray,
    tangents: np.ndarray,
    amplitudes: np.ndarray,
    falloffs: np.ndarray,
    extents: np.ndarray,
    grid: np.ndarray,
    images: np.ndarray,
) -> None:
    """`scatter_tangents` into `images`."""
    n_images, k, n, _ = tangents.shape
    box = len(grid)
    sums = np.empty((box, box * k), dtype=xy.dtype)
    across = np.empty(box * k, dtype=xy.dtype)
    along = np.empty(box * k, dtype=xy.dtype)
    bells_x = np.empty(box, dtype=xy.dtype)
    bells_y = np.empty(box, dtype=xy.dtype)
    steps = np.empty((k, 2), dtype=xy.dtype)
    for image in range(n_images):
        sums[:] = 0
        for atom in range(n):
            steps[:] = tangents[image, :, atom]
            _add_atom(
                sums,
                across,
                along,
                bells_x,
                bells_y,
                xy[image, atom],
                steps,
                amplitudes[image, atom],
                falloffs[image, atom],
                extents[image, atom],
                grid,
            )
        for i in range(box):
            for m in range(k):
                for j in range(box):
                    images[image, m, i, j] = sums[i, j * k + m]


@compiled
def _scatter_images(
    xy: np.ndarray,
    amplitudes: np.ndarray,
    falloffs: np.ndarray,
    extents: np.ndarray,
    grid: np.ndarray,
    images: np.ndarray,
) -> None:
    """`scatter_atoms` into `images`, which are zero."""
    bells_x = np.empty(len(grid), dtype=xy.dtype)
    bells_y = np.empty(len(grid), dtype=xy.dtype)
    for image in range(len(xy)):
        for atom in range(xy.shape[1]):
            x, y = xy[image, atom]
            falloff, extent = falloffs[image, atom], extents[image, atom]
            left, right = _window(x, extent, grid)
            top, bottom = _window(y, extent, grid)
            _fill_bells(bells_x, left, right, x, falloff, grid)
            _fill_bells(bells_y, top, bottom, y, falloff, grid)
            across = bells_x[left:right]
            for i in range(top, bottom):
                height = amplitudes[image, atom] * bells_y[i]
                row = images[image, i, left:right]
                for j in range(len(row)):
                    row[j] += height * across[j]
