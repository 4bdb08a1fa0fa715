"""Images on another grid: Fourier cropping, odd boxes, other pixel sizes."""

import numpy as np
import pytest

from cryochains.images.resampling import Grid, require_overlap, resample


def noise(n, size, seed=0):
    return np.random.default_rng(seed).normal(size=(n, size, size)).astype(np.float32)


def cropped(images, box):
    """Fourier cropping written out; at the new limit, the mean of what the two sides have."""
    size = images.shape[-1]
    spectrum = np.fft.fftshift(np.fft.fft2(images.astype(np.float64)), axes=(1, 2))
    start = size // 2 - box // 2
    kept = spectrum[:, start : start + box + 1, start : start + box + 1]
    for axis in (1, 2):
        first, last = np.take(kept, [0], axis), np.take(kept, [box], axis)
        rest = np.take(kept, range(1, box), axis)
        kept = np.concatenate([(first + last) / 2, rest], axis=axis)
    whole = np.fft.ifft2(np.fft.ifftshift(kept, axes=(1, 2)))
    return whole.real * (box / size) ** 2


@pytest.mark.parametrize("size, box", [(64, 32), (64, 48), (96, 34), (50, 20)])
def test_the_same_width_is_fourier_cropping(size, box):
    """The origin is at size / 2 before and at box / 2 after, so that the grids share a corner."""
    images = noise(3, size)
    result = resample(images, 1.5, Grid(box, 1.5 * size / box))
    np.testing.assert_allclose(result, cropped(images, box), atol=1e-5)


def test_nothing_changes_on_the_same_grid():
    images = noise(2, 20)
    np.testing.assert_array_equal(resample(images, 1.3, Grid(20, 1.3)), images)


def blob(size, pixel_size, x, y, sigma=6.0):
    """A Gaussian at (x, y) Å from the origin pixel."""
    axis = (np.arange(size) - size // 2) * pixel_size
    square = (axis[None, :] - x) ** 2 + (axis[:, None] - y) ** 2
    return np.exp(-square / (2 * sigma**2)).astype(np.float32)[None]


@pytest.mark.parametrize(
    "size, pixel_size, box, target",
    [(65, 2.0, 64, 130 / 64), (65, 2.0, 32, 130 / 32), (64, 2.0, 60, 2.0), (70, 1.7, 48, 2.3)],
)
def test_what_is_somewhere_stays_there(size, pixel_size, box, target):
    """In Å from the origin: odd boxes, crops, and pixel sizes that are no multiple."""
    image = blob(size, pixel_size, 9.0, -14.0)
    result = resample(image, pixel_size, Grid(box, target))
    np.testing.assert_allclose(result, blob(box, target, 9.0, -14.0), atol=2e-3)


def test_two_steps_are_one():
    images = noise(2, 64)
    once = resample(images, 1.0, Grid(16, 4.0))
    twice = resample(resample(images, 1.0, Grid(32, 2.0)), 2.0, Grid(16, 4.0))
    # But at the limit of the grid between, which neither of the two keeps.
    np.testing.assert_allclose(once, twice, atol=1e-5)


def test_grey_levels_are_kept():
    images = np.full((1, 33, 33), 7.0, dtype=np.float32)
    np.testing.assert_allclose(resample(images, 1.0, Grid(20, 33 / 20)), 7.0, rtol=1e-5)


def test_an_image_with_nan_leaves_the_others_alone():
    images = noise(3, 16)
    images[1, 2, 3] = np.nan
    result = resample(images, 1.0, Grid(8, 2.0))
    assert np.isnan(result[1]).any() and np.isfinite(result[[0, 2]]).all()


def test_grids_that_are_much_wider_are_refused():
    require_overlap(64, 2.0, Grid(64, 2.2), "a.mrcs")
    with pytest.raises(ValueError, match="expected images about as wide as 192 Å, got 64 px × 2 Å"):
        require_overlap(64, 2.0, Grid(64, 3.0), "a.mrcs")
