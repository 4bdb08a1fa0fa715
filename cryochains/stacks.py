"""Stacks of particle images, in memory or in .mrcs files; only the images asked for are read."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import mrcfile
import numpy as np
import torch
from mrcfile.mrcfile import MrcFile
from mrcfile.utils import data_dtype_from_header, data_shape_from_header
from torch import Tensor

OPEN_FILES = 16  # stacks kept open at a time; a RELION project may have tens of thousands


@dataclass(frozen=True)
class StackFile:
    """A stack of square images in an MRC file, of which only the header was read.

    Attributes
    ----------
    path : Path
        Where it lies.
    name : str
        What the table of particles calls it.
    n_images, box_size : int
    stamp : tuple of int
        Size and age of the file when it was opened.

    Examples
    --------
    >>> write_stack(Path("results/doc/three.mrcs"), [torch.ones(3, 8, 8)], (3, 8, 8), pixel_size=2.0)
    >>> stack = StackFile.open(Path("results/doc/three.mrcs"))
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
        try:
            with MrcFile(path, mode="r", permissive=False, header_only=True) as mrc:
                shape, dtype = data_shape_from_header(mrc.header), data_dtype_from_header(mrc.header)
                start = mrc.header.nbytes + int(mrc.header.nsymbt)
        except (ValueError, OSError) as error:
            raise ValueError(f"expected an MRC stack, got {path} ({error}); try exporting it again") from error
        if len(shape) == 4 or dtype.kind == "c":
            raise ValueError(f"expected a stack of real images, got volumes or transforms in {path}; try its images")
        n_images, height, width = (1, *shape) if len(shape) == 2 else shape
        if height != width or width < 2 or width % 2:
            raise ValueError(
                f"expected square images with an even box, got {height} × {width} px in {path}; "
                "try extracting the particles with another box"
            )
        stamp = _stamp(path)
        needed = start + n_images * height * width * dtype.itemsize
        if n_images < 0 or stamp[0] < needed:
            raise ValueError(
                f"expected {needed} bytes for {n_images} images of {width} px, got {stamp[0]} in {path}, "
                "which is truncated; try copying it again"
            )
        return cls(path, str(path) if name is None else name, n_images, width, stamp)

    def read(self, slices: np.ndarray) -> np.ndarray:
        """(n, box, box) images at these places of the stack."""
        if not self.path.is_file() or _stamp(self.path) != self.stamp:
            raise ValueError(f"expected {self.path} as it was when loaded, got it changed or gone; try loading again")
        # The stamp is part of the key, so that a file written anew is opened anew.
        mapped = _open_mapped(self.path, self.stamp).data
        return mapped.reshape(-1, self.box_size, self.box_size)[slices]


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=OPEN_FILES)
def _open_mapped(path: Path, stamp: tuple[int, int]):
    return mrcfile.mmap(path, mode="r", permissive=False)


@dataclass(frozen=True, eq=False)
class Images:
    """(n, box, box) images in memory or in files. Indexing picks images and reads none; `read` reads them.

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

    stacks: tuple
    stack_index: np.ndarray
    slice_index: np.ndarray
    sign: float = 1.0

    @classmethod
    def in_memory(cls, images: Tensor) -> "Images":
        """Images that are a (n, box, box) tensor already."""
        return cls((images,), np.zeros(len(images), dtype=np.int64), np.arange(len(images)))

    def __len__(self) -> int:
        return len(self.slice_index)

    def __getitem__(self, rows) -> "Images":
        return Images(self.stacks, self.stack_index[rows], self.slice_index[rows], self.sign)

    @property
    def shape(self) -> tuple[int, int, int]:
        stack = self.stacks[0]
        height, width = (stack.box_size,) * 2 if isinstance(stack, StackFile) else stack.shape[1:]
        return len(self), height, width

    @property
    def paths(self) -> tuple[Path, ...]:
        """Files the images are read from; none when they are in memory."""
        return tuple(stack.path for stack in self.stacks if isinstance(stack, StackFile))

    def read(self) -> Tensor:
        """(n, box, box) float32 tensor; raises ValueError for an image with NaN or Inf."""
        images = np.empty(self.shape, dtype=np.float32)
        for number in np.unique(self.stack_index):
            where = np.flatnonzero(self.stack_index == number)
            stack, slices = self.stacks[number], self.slice_index[where]
            images[where] = stack.read(slices) if isinstance(stack, StackFile) else stack[slices]
        # A sum needs no memory for a mask, and is not finite when any pixel is not.
        bad = np.flatnonzero(~np.isfinite(images.sum(axis=(1, 2), dtype=np.float64)))
        if len(bad):
            stack = self.stacks[self.stack_index[bad[0]]]
            place = f" of {stack.path}" if isinstance(stack, StackFile) else ""
            number = self.slice_index[bad[0]] + 1
            raise ValueError(f"expected finite pixels, got NaN or Inf in image {number}{place}; try leaving it out")
        return torch.from_numpy(images if self.sign == 1 else images * np.float32(self.sign))


def positions(rows, n: int) -> np.ndarray:
    """(k,) int64 positions 0 … n−1 meant by an int, a slice, indices (negative: from the end) or a mask."""
    rows = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    try:
        return np.array(np.arange(n)[rows], ndmin=1)
    except IndexError as error:
        raise IndexError(f"expected positions within {n} particles, got {np.asarray(rows)} ({error})") from error


def write_stack(path: Path, chunks: Iterable[Tensor], shape: tuple, pixel_size: float) -> None:
    """Write float32 images of `shape` (n, box, box) to an MRC stack, a (k, box, box) tensor of `chunks` at a time."""
    with mrcfile.new_mmap(path, shape, mrc_mode=2, overwrite=True) as mrc:
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size
        start = mrc.header.nbytes
    low, high, total, squares = np.inf, -np.inf, 0.0, 0.0
    # Plain writes and not the memory map: a full disk is then an error, and not the end of the process.
    with open(path, "r+b") as file:
        file.seek(start)
        for chunk in chunks:
            images = np.ascontiguousarray(chunk.cpu().numpy(), dtype=np.float32)
            low, high = min(low, images.min()), max(high, images.max())
            total += images.sum(dtype=np.float64)
            squares += np.square(images, dtype=np.float64).sum()
            file.write(images.data)
    with mrcfile.mmap(path, mode="r+") as mrc:
        mean = total / mrc.data.size
        mrc.header.dmin, mrc.header.dmax, mrc.header.dmean = low, high, mean
        mrc.header.rms = np.sqrt(max(squares / mrc.data.size - mean**2, 0.0))
