"""Derivatives of projections on a CPU: each atom is added to the few pixels that it touches.

Compiled by numba when first used; what was compiled is kept on disk where that can be written.
"""

import math
from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

# An atom ends where it has so many rounding errors of its height left: 5 widths from its centre in
# single precision.
_ROUNDING_ERRORS = 32
# Sums in any order, and products that are added in one step; NaN and Inf stay what they are.
_FAST_MATH = {"reassoc", "contract"}


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
    n_widths = math.sqrt(-2 * math.log(_ROUNDING_ERRORS * torch.finfo(xy.dtype).eps))
    falloffs = -0.5 / sigma.square()
    images = xy.new_empty(len(xy), tangents.shape[1], len(grid), len(grid))
    parts = (xy, tangents, amplitudes, falloffs, n_widths * sigma, grid, images)
    _scatter(*(part.contiguous().numpy() for part in parts))
    return images


def compiled(function: Callable) -> Callable:
    """`function` compiled when first called; by every process where no folder can be written."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST_MATH, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, fastmath=_FAST_MATH)(function)


@compiled
def _window(center: float, extent: float, grid: np.ndarray) -> tuple[int, int]:
    """First pixel within `extent` of `center`, and the one after the last."""
    pixel = grid[1] - grid[0]
    start = max(0, math.ceil((center - extent - grid[0]) / pixel))
    end = min(len(grid), math.floor((center + extent - grid[0]) / pixel) + 1)
    return start, max(start, end)


@compiled
def _add_atom(
    sums: np.ndarray,
    across: np.ndarray,
    along: np.ndarray,
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
    for j in range(left, right):
        away = grid[j] - xy[0]
        bell = amplitude * math.exp(falloff * away * away)
        slope = bell * away
        by_x = across[j * k : (j + 1) * k]
        by_y = along[j * k : (j + 1) * k]
        for m in range(k):
            by_x[m] = slope * steps[m, 0]
            by_y[m] = bell * steps[m, 1]
    for i in range(top, bottom):
        away = grid[i] - xy[1]
        bell = math.exp(falloff * away * away)
        slope = bell * away
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
    steps = np.empty((k, 2), dtype=xy.dtype)
    for image in range(n_images):
        sums[:] = 0
        for atom in range(n):
            steps[:] = tangents[image, :, atom]
            _add_atom(
                sums,
                across,
                along,
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
