"""Stacks of images: only what is asked for is read, and a bad file is named in one sentence."""

import gzip
import tracemalloc

import mrcfile
import numpy as np
import pytest
import torch

from cryochains.images import ParticleStack
from cryochains.images.resampling import Grid
from cryochains.images.stacks import Images, StackFile, positions, write_stack


def write(path, images):
    with mrcfile.new(path, overwrite=True) as mrc:
        mrc.set_data(images)
        if images.ndim == 3:
            mrc.set_image_stack()
    return path


def lazy(path) -> Images:
    stack = StackFile.open(path)
    n = stack.n_images
    return Images((stack,), np.zeros(n, dtype=np.int64), np.arange(n))


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.uint16, np.float16, np.float32])
def test_every_mode_of_real_numbers_is_read_as_float32(tmp_path, dtype):
    images = np.arange(3 * 8 * 8).reshape(3, 8, 8).astype(dtype) % 100
    read = lazy(write(tmp_path / "a.mrcs", images))[[2, 0]].read()
    assert read.dtype == torch.float32
    np.testing.assert_array_equal(read.numpy(), images[[2, 0]].astype(np.float32))


def test_one_image_is_a_stack_of_one(tmp_path):
    image = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    np.testing.assert_array_equal(lazy(write(tmp_path / "a.mrc", image)).read()[0], image)


def test_big_endian_files_are_read(tmp_path):
    images = np.random.default_rng(0).normal(size=(3, 8, 8)).astype(np.float32)
    write(tmp_path / "a.mrcs", images)
    with mrcfile.mmap(tmp_path / "a.mrcs") as mrc:
        header = mrc.header.copy()
    swapped = header.astype(header.dtype.newbyteorder(">"))
    swapped.machst = (0x11, 0x11, 0, 0)
    (tmp_path / "b.mrcs").write_bytes(swapped.tobytes() + images.astype(">f4").tobytes())
    np.testing.assert_array_equal(lazy(tmp_path / "b.mrcs").read(), images)


def test_a_batch_of_a_large_file_allocates_a_batch(tmp_path):
    write(tmp_path / "large.mrcs", np.zeros((2000, 32, 32), dtype=np.float32))
    whole = 2000 * 32 * 32 * 4
    tracemalloc.start()
    try:
        images = lazy(tmp_path / "large.mrcs")
        images[np.arange(0, 2000, 50)].read()
        assert tracemalloc.get_traced_memory()[1] < whole / 10
    finally:
        tracemalloc.stop()


def test_written_stack_is_valid_mrc_with_voxels_and_statistics(tmp_path):
    images = torch.randn(7, 16, 16, generator=torch.Generator().manual_seed(0)) + 3
    write_stack(tmp_path / "a.mrcs", images.split(3), n_images=7, box_size=16, pixel_size=1.25)
    with mrcfile.open(tmp_path / "a.mrcs") as mrc:
        assert mrc.is_image_stack()
        assert float(mrc.voxel_size.x) == pytest.approx(1.25)
        assert float(mrc.header.dmean) == pytest.approx(float(images.mean()), rel=1e-5)
        assert float(mrc.header.rms) == pytest.approx(float(images.std(correction=0)), rel=1e-5)
        np.testing.assert_array_equal(mrc.data, images)
    assert mrcfile.validate(tmp_path / "a.mrcs")


@pytest.mark.parametrize(
    "n_images, box_size, message",
    [
        (6, 16, "expected 6 images, got 7 or more"),
        (8, 16, "expected 8 images, got 7; try"),
        (7, 8, r"expected chunks of shape \(k, 8, 8\), got \(3, 16, 16\)"),
    ],
)
def test_chunks_that_are_not_what_was_announced(tmp_path, n_images, box_size, message):
    chunks = torch.zeros(7, 16, 16).split(3)
    size = {"n_images": n_images, "box_size": box_size}
    with pytest.raises(ValueError, match=message):
        write_stack(tmp_path / "a.mrcs", chunks, **size, pixel_size=1.0)


def test_same_images_are_recognised_without_reading(tmp_path):
    images = lazy(write(tmp_path / "a.mrcs", np.zeros((5, 8, 8), dtype=np.float32)))
    assert images[[1, 3]].same_as(images[1:4:2])
    assert not images[[1, 3]].same_as(images[[3, 1]])
    dark = Images(images.stacks, images.stack_index, images.slice_index, sign=-1.0)
    assert not images.same_as(dark)
    assert not images.same_as(lazy(tmp_path / "a.mrcs"))


def test_sign_turns_contrast(tmp_path):
    images = Images.in_memory(torch.randn(3, 8, 8))
    turned = Images(images.stacks, images.stack_index, images.slice_index, sign=-1.0)
    torch.testing.assert_close(turned[1:].read(), -images[1:].read())


def test_positions_mean_what_they_mean_in_numpy():
    rows = np.arange(7)
    mask = rows % 2 == 0
    for index in (3, -1, slice(1, 6, 2), slice(None, None, -1), [5, 0, -2], mask, [], [4, 4]):
        expected = np.atleast_1d(rows[index])
        np.testing.assert_array_equal(positions(index, 7), expected)
    np.testing.assert_array_equal(positions(torch.from_numpy(mask), 7), rows[mask])
    for wrong in (7, -8, [0, 7], mask[:3], [0.5]):
        with pytest.raises(IndexError, match="expected positions within 7 particles, got"):
            positions(wrong, 7)


def test_truncated_file(tmp_path):
    path = write(tmp_path / "a.mrcs", np.zeros((5, 8, 8), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(
        ValueError, match=r"expected 2304 bytes for 5 images of 8 px, got 2294 in .*truncated; try"
    ):
        StackFile.open(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match="expected an MRC stack, got .*a.mrcs"):
        StackFile.open(path)


def test_not_mrc(tmp_path):
    path = write(tmp_path / "a.mrcs", np.zeros((5, 8, 8), dtype=np.float32))
    (tmp_path / "a.txt").write_text("hello " * 500)
    (tmp_path / "a.gz").write_bytes(gzip.compress(path.read_bytes())[:60])
    for wrong in (tmp_path / "a.txt", tmp_path / "a.gz", tmp_path / "absent.mrcs"):
        with pytest.raises(ValueError, match="expected an MRC stack, got .*; try"):
            StackFile.open(wrong)


def test_compressed_stacks_are_read(tmp_path):
    images = np.random.default_rng(0).normal(size=(7, 8, 8)).astype(np.float32)
    path = write(tmp_path / "a.mrcs", images)
    packed = tmp_path / "a.mrcs.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    stack = StackFile.open(packed)
    np.testing.assert_array_equal(stack.read(np.array([5, 0, 1])), images[[5, 0, 1]])
    # One that was cut, and one that was damaged in between.
    packed.write_bytes(gzip.compress(path.read_bytes())[:-20])
    with pytest.raises(ValueError, match="bytes in the compressed .*a.mrcs.gz.* truncated .*; try"):
        StackFile.open(packed)
    data = bytearray(gzip.compress(path.read_bytes()))
    data[-300:-200] = bytes(100)
    packed.write_bytes(data)
    with pytest.raises(ValueError, match="expected a whole compressed stack .*a.mrcs.gz .*; try"):
        StackFile.open(packed).read(np.array([0]))


@pytest.mark.parametrize("shape", [(3, 8, 10), (3, 7, 9)])
def test_not_square(tmp_path, shape):
    path = write(tmp_path / "a.mrcs", np.zeros(shape, dtype=np.float32))
    with pytest.raises(ValueError, match=f"even box, got {shape[1]} × {shape[2]} px in .*; try"):
        StackFile.open(path)


def test_odd_boxes_are_no_particles_until_they_are_resampled(tmp_path):
    images = lazy(write(tmp_path / "a.mrcs", np.zeros((3, 7, 7), dtype=np.float32)))
    with pytest.raises(ValueError, match="even box, got 7 × 7 px"):
        ParticleStack(images, torch.eye(3).expand(3, 3, 3), pixel_size=1.0)
    assert images.on_grid(Grid(6, 7 / 6), np.ones(3)).read().shape == (3, 6, 6)


def test_transforms_are_no_images(tmp_path):
    path = write(tmp_path / "a.mrcs", np.zeros((3, 8, 8), dtype=np.complex64))
    with pytest.raises(ValueError, match="expected a stack of real images"):
        StackFile.open(path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile warns as it writes them
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_named_when_read(tmp_path, value):
    images = np.zeros((5, 8, 8), dtype=np.float32)
    images[3, 2, 1] = value
    stack = lazy(write(tmp_path / "a.mrcs", images))
    stack[:3].read()
    with pytest.raises(
        ValueError, match=r"expected finite pixels, got NaN or Inf in image 4 of .*a.mrcs; try"
    ):
        stack[2:].read()
    with pytest.raises(ValueError, match="NaN or Inf in image 4;"):
        Images.in_memory(torch.from_numpy(images)).read()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile warns as it writes them
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_are_read_when_asked_for(tmp_path, value):
    """Pixel by pixel what is in the file, in the rows and with the sign that are asked for."""
    images = np.random.default_rng(0).normal(size=(5, 8, 8)).astype(np.float32)
    images[3, 2, 1] = value
    stack = lazy(write(tmp_path / "a.mrcs", images))
    for one in (stack, Images.in_memory(torch.from_numpy(images))):
        np.testing.assert_array_equal(one.read(require_finite=False), images)
        np.testing.assert_array_equal(one[[4, 3]].read(require_finite=False), images[[4, 3]])
        torch.testing.assert_close(one[:3].read(require_finite=False), one[:3].read())
    turned = Images(stack.stacks, stack.stack_index, stack.slice_index, sign=-1.0)
    np.testing.assert_array_equal(turned.read(require_finite=False), -images)


def test_other_faults_are_none_of_the_pixels(tmp_path):
    """A file that is gone is no image with NaN."""
    stack = lazy(write(tmp_path / "a.mrcs", np.zeros((5, 8, 8), dtype=np.float32)))
    (tmp_path / "a.mrcs").unlink()
    with pytest.raises(ValueError, match="changed or gone"):
        stack.read(require_finite=False)


def test_a_file_that_changed_is_not_read_as_the_old_one(tmp_path):
    path = write(tmp_path / "a.mrcs", np.zeros((5, 8, 8), dtype=np.float32))
    stack = lazy(path)
    stack.read()
    write(path, np.ones((4, 8, 8), dtype=np.float32))
    with pytest.raises(ValueError, match="as it was when loaded"):
        stack[:2].read()
    assert float(lazy(path).read().mean()) == 1
    path.unlink()
    with pytest.raises(ValueError, match="changed or gone"):
        stack[:2].read()


def test_scattered_rows_in_any_order_are_those_of_the_file(tmp_path):
    """Neighbours are read in one piece, whatever is asked for twice or backwards."""
    images = np.random.default_rng(0).normal(size=(300, 16, 16)).astype(np.float32)
    stack = lazy(write(tmp_path / "a.mrcs", images))
    rng = np.random.default_rng(1)
    for rows in (rng.integers(0, 300, 500), np.arange(300)[::-1], np.arange(300), [7], []):
        rows = np.asarray(rows, dtype=np.int64)
        np.testing.assert_array_equal(stack[rows].read(), images[rows])


def test_images_larger_than_a_piece_are_read(tmp_path):
    images = np.random.default_rng(0).normal(size=(2, 320, 320)).astype(np.float32)
    np.testing.assert_array_equal(
        lazy(write(tmp_path / "a.mrcs", images))[[1, 0]].read(), images[[1, 0]]
    )
