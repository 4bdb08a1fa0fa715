"""Stacks of particle images, in memory or in .mrcs files; only the images asked for are read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import mrcfile
import numpy as np
import torch
from mrcfile.mrcfile import MrcFile
from mrcfile.mrcmemmap import MrcMemmap
from mrcfile.utils import data_dtype_from_header, data_shape_from_header
from torch import Tensor

# Stacks kept open at a time; a RELION project may have tens of thousands.
_MAX_OPEN_STACKS = 16

Rows: TypeAlias = int | slice | Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class StackFile:
    """A stack of square images in an MRC file, of which only the header was read.

    Attributes
    ----------
    path : Path
        Where the file is.
    name : str
        What the table of particles calls it.
    n_images, box_size : int
    stamp : tuple of int
        Size in bytes and time of the last change when the file was opened.

    Examples
    --------
    >>> path = Path("results/doc/three.mrcs")
    >>> write_stack(path, [torch.ones(3, 8, 8)], n_images=3, box_size=8, pixel_size=2.0)
    >>> stack = StackFile.open(path)
    >>> stack.n_images, stack.box_size, stack.read(np.array([2])).shape
    (3, 8, (1, 8, 8))
    """

    path: Path
    name: str
    n_images: int
    box_size: int
    stamp: tuple[int, int]

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "StackFile":
        """Check the header of `path` and the length of the file, without reading an image.

        Raises
        ------
        ValueError
            When the file is not MRC, is truncated, or its images are not square with an even box.
        """
        shape, dtype, start = _read_header(path)
        if len(shape) == 4 or dtype.kind == "c":
            raise ValueError(
                f"expected a stack of real images, got volumes or transforms in {path}; "
                "try its images"
            )
        n_images, height, width = (1, *shape) if len(shape) == 2 else shape
        if height != width or width < 2 or width % 2:
            raise ValueError(
                f"expected square images with an even box, got {height} × {width} px in {path}; "
                "try extracting the particles with another box"
            )
        stamp = _file_stamp(path)
        expected_bytes = start + n_images * height * width * dtype.itemsize
        if n_images < 0 or stamp[0] < expected_bytes:
            raise ValueError(
                f"expected {expected_bytes} bytes for {n_images} images of {width} px, got "
                f"{stamp[0]} in {path}, which is truncated; try copying it again"
            )
        return cls(path, str(path) if name is None else name, n_images, width, stamp)

    def read(self, slices: np.ndarray) -> np.ndarray:
        """(k, box, box) images with these (k,) numbers, the first of the stack being 0."""
        if not self.path.is_file() or _file_stamp(self.path) != self.stamp:
            raise ValueError(
                f"expected {self.path} as it was when loaded, got it changed or gone; "
                "try loading again"
            )
        # The stamp is part of the key, so that a file written anew is opened anew.
        mapped = _open_mapped(self.path, self.stamp).data
        return mapped.reshape(-1, self.box_size, self.box_size)[slices]


def _read_header(path: Path) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and type of the data of an MRC file, and the byte at which they start."""
    try:
        with MrcFile(path, mode="r", permissive=False, header_only=True) as mrc:
            shape = data_shape_from_header(mrc.header)
            dtype = data_dtype_from_header(mrc.header)
            start = mrc.header.nbytes + int(mrc.header.nsymbt)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"expected an MRC stack, got {path} ({error}); try exporting it again"
        ) from error
    return shape, dtype, start


def _file_stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=_MAX_OPEN_STACKS)
def _open_mapped(path: Path, stamp: tuple[int, int]) -> MrcMemmap:
    return mrcfile.mmap(path, mode="r", permissive=False)


@dataclass(frozen=True, eq=False)
class Images:
    """(n, box, box) images in memory or in files.

    Indexing picks images and reads none; `read` reads them.

    Attributes
    ----------
    stacks : tuple of (m, box, box) tensor or StackFile
    stack_index, slice_index : (n,) int arrays
        Image i is number ``slice_index[i]`` of stack ``stack_index[i]``.
    sign : float
        Factor on every pixel: −1 for images in which protein is dark.

    Examples
    --------
    >>> images = Images.in_memory(torch.arange(3.0).view(3, 1, 1).expand(3, 4, 4))
    >>> images[[2, 0]].read()[:, 0, 0].tolist()
    [2.0, 0.0]
    """

    stacks: tuple[Tensor | StackFile, ...]
    stack_index: np.ndarray
    slice_index: np.ndarray
    sign: float = 1.0

    @classmethod
    def in_memory(cls, images: Tensor) -> "Images":
        """Images that are a (n, box, box) tensor already."""
        n = len(images)
        return cls((images,), np.zeros(n, dtype=np.int64), np.arange(n))

    def __len__(self) -> int:
        return len(self.slice_index)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "Images":
        return Images(self.stacks, self.stack_index[rows], self.slice_index[rows], self.sign)

    @property
    def shape(self) -> tuple[int, int, int]:
        stack = self.stacks[0]
        if isinstance(stack, StackFile):
            return len(self), stack.box_size, stack.box_size
        return len(self), stack.shape[1], stack.shape[2]

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files the images are read from; none when they are in memory."""
        return tuple(stack.path for stack in self.stacks if isinstance(stack, StackFile))

    def same_as(self, other: "Images") -> bool:
        """Whether these are the same images of the same opened stacks; reads none."""
        return (
            self.stacks is other.stacks
            and self.sign == other.sign
            and np.array_equal(self.stack_index, other.stack_index)
            and np.array_equal(self.slice_index, other.slice_index)
        )

    def read(self, require_finite: bool = True) -> Tensor:
        """(n, box, box) float32 tensor of the images.

        Parameters
        ----------
        require_finite : bool
            False also returns images that hold NaN or Inf.

        Raises
        ------
        ValueError
            For an image with NaN or Inf, or a file that changed since it was opened.
        """
        images = np.empty(self.shape, dtype=np.float32)
        for number in np.unique(self.stack_index):
            rows = np.flatnonzero(self.stack_index == number)
            stack = self.stacks[number]
            slices = self.slice_index[rows]
            images[rows] = stack.read(slices) if isinstance(stack, StackFile) else stack[slices]
        # A sum needs no memory for a mask, and is not finite when any pixel is not.
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~np.isfinite(images.sum(axis=(1, 2), dtype=np.float64)))
        if require_finite and len(bad):
            raise ValueError(
                f"expected finite pixels, got NaN or Inf in {self._describe(bad[0])}; "
                "try leaving it out"
            )
        return torch.from_numpy(images if self.sign == 1 else images * np.float32(self.sign))

    def _describe(self, row: int) -> str:
        stack = self.stacks[self.stack_index[row]]
        number = f"image {self.slice_index[row] + 1}"
        return f"{number} of {stack.path}" if isinstance(stack, StackFile) else number


def positions(rows: Rows, n: int) -> np.ndarray:
    """(k,) int64 positions 0 … n−1 that an index into n particles means.

    Parameters
    ----------
    rows : int, slice, indices or mask
        As for a numpy array; negative numbers count from the end.
    n : int

    Raises
    ------
    IndexError
        When a position is not among 0 … n−1.

    Examples
    --------
    >>> positions([0, -1], 5).tolist(), positions(slice(None, None, 2), 5).tolist()
    ([0, 4], [0, 2, 4])
    """
    index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    try:
        return np.array(np.arange(n)[index], ndmin=1)
    except IndexError as error:
        raise IndexError(
            f"expected positions within {n} particles, got {np.asarray(index)} ({error}); "
            f"try numbers from 0 to {n - 1}, or a mask of {n}"
        ) from error


def write_stack(
    path: Path, chunks: Iterable[Tensor], *, n_images: int, box_size: int, pixel_size: float
) -> None:
    """Write (k, box, box) `chunks` of images to an MRC stack in float32, one chunk at a time.

    Raises
    ------
    ValueError
        When the chunks do not hold `n_images` images of `box_size` pixels.
    """
    shape = (n_images, box_size, box_size)
    with mrcfile.new_mmap(path, shape, mrc_mode=2, overwrite=True) as mrc:
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size
        start = mrc.header.nbytes
    low = np.inf
    high = -np.inf
    total = 0.0
    squares = 0.0
    # Plain writes and not the memory map: on a full disk they raise, the map ends the process.
    with open(path, "r+b") as file:
        file.seek(start)
        for images in _as_announced(chunks, n_images, box_size):
            low = min(low, images.min())
            high = max(high, images.max())
            total += images.sum(dtype=np.float64)
            squares += np.square(images, dtype=np.float64).sum()
            file.write(images.data)
    with mrcfile.mmap(path, mode="r+") as mrc:
        mean = total / mrc.data.size
        mrc.header.dmin = low
        mrc.header.dmax = high
        mrc.header.dmean = mean
        mrc.header.rms = np.sqrt(max(squares / mrc.data.size - mean**2, 0.0))


def _as_announced(chunks: Iterable[Tensor], n_images: int, box_size: int) -> Iterator[np.ndarray]:
    """The chunks as float32 arrays; ValueError when their size or number is another."""
    n_seen = 0
    for chunk in chunks:
        if tuple(chunk.shape[1:]) != (box_size, box_size):
            raise ValueError(
                f"expected chunks of shape (k, {box_size}, {box_size}), got "
                f"{tuple(chunk.shape)}; try images of the announced box"
            )
        n_seen += len(chunk)
        if n_seen > n_images:
            raise ValueError(
                f"expected {n_images} images, got {n_seen} or more; try one image a particle"
            )
        yield np.ascontiguousarray(chunk.cpu().numpy(), dtype=np.float32)
    if n_seen < n_images:
        raise ValueError(f"expected {n_images} images, got {n_seen}; try one image a particle")
