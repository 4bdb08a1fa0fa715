"""Projections and their derivatives on a CPU: each atom is added to the few pixels it touches."""

import math
from collections.abc import Iterator

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
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Σ_a A_a ∂/∂(x, y) exp(−|r − xy_a|² / 2σ_a²) · tangent_a for each tangent, image by image.

    Parameters
    ----------
    xy : (b, n, 2) tensor
        Å, on a CPU as all others.
    tangents : (b, k, n, 2) tensor
        Quickest where the k numbers of an atom are side by side in memory.
    amplitudes : (b, n) tensor
        A_a/σ_a²: the height over the square of the width.
    grid : (box,) tensor
        Å, as `pixel_grid` gives it.
    sigma : (b, n) tensor
        Å.

    Yields
    ------
    sums : (rows, columns, k) tensor
        Of the pixels that atoms touch; all others are 0. In memory that the next image takes.
    rows, columns : slice
        Of the image.

    Examples
    --------
    >>> grid, one = torch.arange(-2.0, 2.0), torch.ones(1, 1)
    >>> right = torch.tensor([[[[1.0, 0.0]]]])
    >>> [(slope, rows, _)] = scatter_tangents(torch.zeros(1, 1, 2), right, one, grid, one)
    >>> [round(value, 4) for value in slope[2, :, 0].tolist()], rows
    ([-0.2707, -0.6065, 0.0, 0.6065], slice(0, 4, None))
    """
    k = tangents.shape[1]
    falloffs, extents = _falloffs_and_extents(sigma)
    positions, heights, axis = (part.numpy() for part in (xy, amplitudes, grid))
    rates, ends = falloffs.numpy(), extents.numpy()
    windows = _windows(positions, ends, axis)
    largest = max((bottom - top) * (right - left) for top, bottom, left, right in windows)
    memory = xy.new_empty(largest * k)
    for image, (top, bottom, left, right) in enumerate(windows):
        shape = (bottom - top, right - left, k)
        sums = memory[: math.prod(shape)].view(shape)
        steps = tangents[image].permute(2, 1, 0).contiguous().numpy()
        _scatter(
            np.ascontiguousarray(positions[image]),
            steps,
            np.ascontiguousarray(heights[image]),
            np.ascontiguousarray(rates[image]),
            np.ascontiguousarray(ends[image]),
            axis[left:right],
            axis[top:bottom],
            sums.numpy(),
        )
        yield sums, slice(top, bottom), slice(left, right)


def _windows(xy: np.ndarray, extents: np.ndarray, grid: np.ndarray) -> list[list[int]]:
    """Of each image first row, row after the last, first and last column that atoms touch.

    Two of each at least, which tell how wide a pixel is.
    """
    pixel = grid[1] - grid[0]
    bounds = []
    for axis in (1, 0):
        # As of `_window`.
        low = (xy[..., axis] - extents).min(1, initial=np.inf)
        high = (xy[..., axis] + extents).max(1, initial=-np.inf)
        start = np.nan_to_num(np.ceil((low - grid[0]) / pixel)).clip(0, len(grid) - 2)
        end = np.nan_to_num(np.floor((high - grid[0]) / pixel + 1)).clip(start + 2, len(grid))
        bounds += [start, end]
    return np.stack(bounds, axis=1).astype(int).tolist()


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
    # Atoms that are nowhere touch no pixel, but are no empty image either.
    images[~(xy.isfinite().all(2) & amplitudes.isfinite()).all(1)] = torch.nan
    return images


def gather_atoms(images: Tensor, xy: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """(b, n, 3) Σ_r I(r) exp(−|r − xy_a|² / 2σ_a²) · (1, r − xy_a), over pixels that a touches.

    Of (b, box, box) images; what derivatives of images of `scatter_atoms` amount to.

    Examples
    --------
    >>> grid, one = torch.arange(-2.0, 2.0), torch.ones(1, 1)
    >>> image = torch.zeros(1, 4, 4)
    >>> image[0, 2, 3] = 1.0
    >>> sums = gather_atoms(image, torch.zeros(1, 1, 2), grid, one)[0, 0]
    >>> [round(value, 4) for value in sums.tolist()]
    [0.6065, 0.6065, 0.0]
    """
    sums = xy.new_empty(*xy.shape[:2], 3)
    parts = (images, xy, *_falloffs_and_extents(sigma), grid, sums)
    _gather(*(part.contiguous().numpy() for part in parts))
    return sums


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
def _scatter(
    xy: np.ndarray,
    tangents: np.ndarray,
    amplitudes: np.ndarray,
    falloffs: np.ndarray,
    extents: np.ndarray,
    grid_x: np.ndarray,
    grid_y: np.ndarray,
    sums: np.ndarray,
) -> None:
    """Derivatives of one image along `tangents` (2, n, k) into `sums` (rows, columns, k).

    All tangents of a pixel are side by side, so that a row of an atom is one long loop of two
    multiply-adds; `across` and `along` hold what all its rows have in common.
    """
    k = tangents.shape[2]
    n_rows, n_columns, _ = sums.shape
    sums[:] = 0
    lines = sums.reshape(n_rows, n_columns * k)
    across = np.empty(n_columns * k, dtype=sums.dtype)
    along = np.empty(n_columns * k, dtype=sums.dtype)
    bells_x = np.empty(n_columns, dtype=sums.dtype)
    bells_y = np.empty(n_rows, dtype=sums.dtype)
    for atom in range(len(xy)):
        x, y = xy[atom]
        extent, falloff = extents[atom], falloffs[atom]
        left, right = _window(x, extent, grid_x)
        top, bottom = _window(y, extent, grid_y)
        _fill_bells(bells_x, left, right, x, falloff, grid_x)
        _fill_bells(bells_y, top, bottom, y, falloff, grid_y)
        step_x, step_y = tangents[0, atom], tangents[1, atom]
        for j in range(left, right):
            bell = amplitudes[atom] * bells_x[j]
            slope = bell * (grid_x[j] - x)
            by_x = across[j * k : (j + 1) * k]
            by_y = along[j * k : (j + 1) * k]
            for m in range(k):
                by_x[m] = slope * step_x[m]
                by_y[m] = bell * step_y[m]
        for i in range(top, bottom):
            away = grid_y[i] - y
            bell = bells_y[i]
            slope = bell * away
            start, end = left, right
            if k >= _CORNERS_COUNT:
                half = math.sqrt(max(0.0, extent * extent - away * away))
                start, end = _window(x, half, grid_x)
                # Rounding may find one pixel more than `across` holds.
                start = max(start, left)
                end = max(start, min(end, right))
            row = lines[i, start * k : end * k]
            by_x = across[start * k : end * k]
            by_y = along[start * k : end * k]
            for t in range(len(row)):
                row[t] += bell * by_x[t] + slope * by_y[t]


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


@compiled
def _gather(
    images: np.ndarray,
    xy: np.ndarray,
    falloffs: np.ndarray,
    extents: np.ndarray,
    grid: np.ndarray,
    sums: np.ndarray,
) -> None:
    """`gather_atoms` into `sums`."""
    bells_x = np.empty(len(grid), dtype=xy.dtype)
    bells_y = np.empty(len(grid), dtype=xy.dtype)
    slopes = np.empty(len(grid), dtype=xy.dtype)
    # Of the images' precision.
    nothing = bells_x.dtype.type(0)
    for image in range(len(xy)):
        for atom in range(xy.shape[1]):
            x, y = xy[image, atom]
            falloff, extent = falloffs[image, atom], extents[image, atom]
            left, right = _window(x, extent, grid)
            top, bottom = _window(y, extent, grid)
            _fill_bells(bells_x, left, right, x, falloff, grid)
            _fill_bells(bells_y, top, bottom, y, falloff, grid)
            across, sloping = bells_x[left:right], slopes[left:right]
            for j in range(len(across)):
                sloping[j] = across[j] * (grid[left + j] - x)
            total, by_x, by_y = nothing, nothing, nothing
            for i in range(top, bottom):
                row = images[image, i, left:right]
                height, slope = nothing, nothing
                for j in range(len(row)):
                    height += row[j] * across[j]
                    slope += row[j] * sloping[j]
                total += bells_y[i] * height
                by_x += bells_y[i] * slope
                by_y += bells_y[i] * (grid[i] - y) * height
            sums[image, atom, 0] = total
            sums[image, atom, 1] = by_x
            sums[image, atom, 2] = by_y


@compiled
def join_waves(waves: np.ndarray, transfer: np.ndarray, columns: np.ndarray) -> None:
    """Coefficients as of ``rfft2`` times `transfer` (box, h), from sums with cosines and sines.

    `waves` (2, h, 2, h, k): with the cosine or sine along y of every frequency not below zero, and
    along x. `columns` (box, h, 2, k): real and imaginary parts.
    """
    _, h, _, _, k = waves.shape
    box = len(columns)
    for y in range(h):
        for x in range(h):
            both_even, odd_x = waves[0, y, 0, x], waves[0, y, 1, x]
            odd_y, both_odd = waves[1, y, 0, x], waves[1, y, 1, x]
            height = transfer[y, x]
            real, imaginary = columns[y, x, 0], columns[y, x, 1]
            for m in range(k):
                real[m] = height * (both_even[m] - both_odd[m])
                imaginary[m] = -height * (odd_x[m] + odd_y[m])
            if 0 < y < h - 1:
                height = transfer[box - y, x]
                real, imaginary = columns[box - y, x, 0], columns[box - y, x, 1]
                for m in range(k):
                    real[m] = height * (both_even[m] + both_odd[m])
                    imaginary[m] = height * (odd_y[m] - odd_x[m])
