"""Images on another grid: Fourier cropping, other pixel sizes, even boxes out of odd ones.

An image is the sum of its Fourier components, a smooth function that can be evaluated anywhere. On
a coarser grid those components are left out that it cannot hold; nothing else is changed. Along one
axis this is one matrix, so that no image is ever larger than it was.
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


def resample(images: np.ndarray, pixel_size: float, grid: Grid) -> np.ndarray:
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

    Examples
    --------
    >>> images = np.ones((2, 15, 15), dtype=np.float32)
    >>> resample(images, 1.0, Grid(8, 15 / 8))[0, 0].round(3).tolist()
    [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    size = images.shape[-1]
    if size == grid.box_size and pixel_size == grid.pixel_size:
        return images.astype(np.float32)
    matrix = _axis_matrix(size, pixel_size, grid)
    result = np.empty((len(images), grid.box_size, grid.box_size), dtype=np.float32)
    step = max(1, _PIECE_BYTES // (4 * size * size))
    for start in range(0, len(images), step):
        piece = images[start : start + step].astype(np.float32)
        # NaN and Inf are the caller's to look for: they spread over their image alone.
        with np.errstate(invalid="ignore", over="ignore"):
            result[start : start + step] = matrix @ piece @ matrix.T
    return result


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


def require_overlap(size: int, pixel_size: float, grid: Grid, name: str) -> None:
    """Raise ValueError where the grid is much wider than images of `size` pixels.

    Examples
    --------
    >>> require_overlap(64, 2.0, Grid(32, 4.0), "a.mrcs")
    """
    width = grid.box_size * grid.pixel_size
    if width > (1 + _MAX_OVERHANG) * size * pixel_size:
        raise ValueError(
            f"expected images about as wide as {width:g} Å, got {size} px × {pixel_size:g} Å in "
            f"{name}; try optics_group= with the group of the narrowest images"
        )
