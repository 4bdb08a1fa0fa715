"""Images on another grid: Fourier cropping, other pixel sizes, undistorted axes, even boxes.

An image is the sum of its Fourier components, a smooth function that can be evaluated anywhere. On
a coarser grid those components are left out that it cannot hold; nothing else is changed. Along one
axis this is one matrix, so that no image is ever larger than it was; where the microscope magnified
by another factor in another direction, each row and each column is moved besides.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# A grid may be wider than an image by this share of its width; the image is continued periodically.
_MAX_OVERHANG = 0.2
# Images are multiplied in pieces of about this many bytes.
_PIECE_BYTES = 1 << 26


@dataclass(frozen=True)
class Grid:
    """A box of pixels with its origin at pixel ``box_size // 2``.

    Attributes
    ----------
    box_size : int
    pixel_size : float
        Å.
    """

    box_size: int
    pixel_size: float


def resample(
    images: np.ndarray, pixel_size: float, grid: Grid, magnification: np.ndarray | None = None
) -> np.ndarray:
    """(n, box, box) float32 `images` of this pixel size on `grid`, with the grey levels kept.

    With the same width in Å this is Fourier cropping. The origin of the images, pixel ``size // 2``
    for odd sizes too, becomes the origin of the grid. A grid that is wider shows the other side of
    the image at its rim.

    Parameters
    ----------
    images : (n, size, size) array
    pixel_size : float
        Å, of the images.
    grid : Grid
    magnification : (2, 2) array, optional
        RELION's matrix M: the transform of the images at k is that of the undistorted ones at M k.
        The undistorted ones are returned, which at x have the value of the images at Mᵀ x.

    Examples
    --------
    >>> images = np.ones((2, 15, 15), dtype=np.float32)
    >>> resample(images, 1.0, Grid(8, 15 / 8))[0, 0].round(3).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    size = images.shape[-1]
    is_same_grid = size == grid.box_size and pixel_size == grid.pixel_size
    if is_same_grid and magnification is None:
        return images.astype(np.float32)
    stretch = _Stretch(1.0, 1.0, 0.0, 0.0) if magnification is None else _stretch_of(magnification)
    along_x = _axis_matrix(size, pixel_size, Grid(grid.box_size, grid.pixel_size * stretch.x))
    along_y = _axis_matrix(size, pixel_size, Grid(grid.box_size, grid.pixel_size * stretch.y))
    result = np.empty((len(images), grid.box_size, grid.box_size), dtype=np.float32)
    step = max(1, _PIECE_BYTES // (4 * size * size))
    for start in range(0, len(images), step):
        piece = images[start : start + step].astype(np.float32)
        # NaN and Inf are the caller's to look for: they spread over their image alone.
        with np.errstate(invalid="ignore", over="ignore"):
            piece = _move_rows(piece, stretch.rows)
            piece = along_y @ piece @ along_x.T
            piece = _move_rows(piece.transpose(0, 2, 1), stretch.columns).transpose(0, 2, 1)
            result[start : start + step] = piece
    return result


@dataclass(frozen=True)
class _Stretch:
    """The matrix Mᵀ as three steps along one axis each.

    Mᵀ = [[1, rows], [0, 1]] [[x, 0], [0, y]] [[1, 0], [columns, 1]]
    """

    x: float
    y: float
    rows: float
    columns: float


def _stretch_of(magnification: np.ndarray) -> _Stretch:
    (a, b), (c, d) = np.asarray(magnification, dtype=np.float64).T
    return _Stretch(float(a - b * c / d), float(d), float(b / d), float(c / d))


def _move_rows(images: np.ndarray, slope: float) -> np.ndarray:
    """Images whose row y is that of `images` at x + slope · y, both from the origin."""
    if slope == 0:
        return images
    height, width = images.shape[1:]
    moves = slope * (np.arange(height) - height // 2)
    phases = np.exp(2j * np.pi * np.outer(moves, np.fft.rfftfreq(width))).astype(np.complex64)
    return np.fft.irfft(np.fft.rfft(images, axis=2) * phases, n=width, axis=2)


@lru_cache(maxsize=64)
def _axis_matrix(size: int, pixel_size: float, grid: Grid) -> np.ndarray:
    """(grid.box_size, size) float32: values along one axis → values on the grid."""
    points = (np.arange(grid.box_size) - grid.box_size // 2) * (grid.pixel_size / pixel_size)
    pixels = np.arange(size) - size // 2
    # Cycles an image; those that the grid cannot hold are left out.
    limit = size / 2 * min(1.0, pixel_size / grid.pixel_size)
    waves = np.arange(int(np.floor(limit + 1e-6)) + 1)
    # A wave stands for the two of +k and −k, but the constant; at the grid's own limit the two are
    # the same, and of their sum half is left, as in a cropped transform.
    weights = np.where(waves == 0, 1.0, 2.0)
    weights[np.abs(waves - limit) < 1e-6] = 1.0
    # cos(a − b) from cosines and sines; at the limit the sine is 0 on every pixel.
    angle = 2 * np.pi / size
    at_points = angle * np.outer(points, waves)
    at_pixels = angle * np.outer(pixels, waves)
    matrix = (weights * np.cos(at_points)) @ np.cos(at_pixels).T
    matrix += (weights * np.sin(at_points)) @ np.sin(at_pixels).T
    return (matrix / size).astype(np.float32)


def is_wider(width: float, other: float) -> bool:
    """Whether a grid of this width, in Å, is wider than images of the `other` can be brought to.

    Examples
    --------
    >>> is_wider(110.0, 100.0), is_wider(130.0, 100.0)
    (False, True)
    """
    return width > (1 + _MAX_OVERHANG) * other


def require_overlap(size: int, pixel_size: float, grid: Grid, name: str) -> None:
    """Raise ValueError where the grid is much wider than images of `size` pixels.

    Examples
    --------
    >>> require_overlap(64, 2.0, Grid(32, 4.0), "a.mrcs")
    """
    width = grid.box_size * grid.pixel_size
    if is_wider(width, size * pixel_size):
        raise ValueError(
            f"expected images about as wide as {width:g} Å, got {size} px × {pixel_size:g} Å in "
            f"{name}; try optics_group= with the group of the narrowest images"
        )
