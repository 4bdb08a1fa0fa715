"""Stacks of particle images, in memory or in .mrcs files; only the images asked for are read."""

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal, TypeAlias

import mrcfile
import numpy as np
import torch
from torch import Tensor

from .._files import atomic_path
from .resampling import Grid, resample

# Stacks kept open at a time; a RELION project may have tens of thousands.
_MAX_OPEN_STACKS = 16
# Neighbouring images are read in pieces of at most about this many bytes.
_READ_BYTES = 1 << 18
_HEADER_BYTES = 1024
# How compressed files begin.
_GZIP = b"\x1f\x8b"
# Compressed stacks that are kept unpacked at a time, in files without a name.
_MAX_UNPACKED_STACKS = 128
# Characters of an index that is none, in a sentence.
_SHOWN_TEXT = 80
# Larger numbers are no header of particle images.
_MAX_BOX = 32_768
_MAX_EXTENDED_HEADER = 1 << 28
# Modes of MRC2014, and numpy's names of their types.
_MODES = {0: "i1", 1: "i2", 2: "f4", 4: "c8", 6: "u2", 12: "f2"}

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
    pixel_size : float or None
        Å, as the header says; None where it says nothing.
    start : int
    dtype : str

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
    pixel_size: float | None = None
    # Byte at which the pixels begin, and numpy's name of their type.
    start: int = 1024
    dtype: str = "<f4"
    # Compressed by gzip, in which no image can be found but by unpacking all before it.
    is_packed: bool = False

    @classmethod
    def open(cls, path: Path, name: str | None = None) -> "StackFile":
        """Check the header of `path` and the length of the file, without reading an image.

        The word "MAP " and the machine stamp may be missing, as in stacks of many programs; the
        length of the file then has to be exactly what the header announces. A stack compressed by
        gzip is unpacked into a temporary file when an image is first read.

        Raises
        ------
        ValueError
            When the file is not MRC, is truncated, or its images are not square.
        """
        path = Path(path)
        header = _read_header(path)
        if header.is_volume or header.dtype.kind == "c":
            raise ValueError(
                f"expected a stack of real images, got volumes or transforms in {path}; "
                "try its images"
            )
        n_images, height, width = header.shape
        if height != width or width < 2:
            raise ValueError(
                f"expected square images with an even box, got {height} × {width} px in {path}; "
                "try extracting the particles with another box"
            )
        stamp = _file_stamp(path)
        expected_bytes = header.start + n_images * height * width * header.dtype.itemsize
        if header.is_packed:
            _require_unpacked_length(path, expected_bytes)
        elif stamp[0] < expected_bytes:
            raise ValueError(
                f"expected {expected_bytes} bytes for {n_images} images of {width} px, got "
                f"{stamp[0]} in {path}, which is truncated; try copying it again"
            )
        elif not header.is_marked and stamp[0] != expected_bytes:
            raise _not_mrc(path, "no word MAP, and another length than its header announces")
        return cls(
            path,
            str(path) if name is None else name,
            n_images,
            width,
            stamp,
            header.pixel_size,
            header.start,
            header.dtype.str,
            header.is_packed,
        )

    def read(self, slices: np.ndarray) -> np.ndarray:
        """(k, box, box) images with these (k,) numbers, the first of the stack being 0."""
        if not self.path.is_file() or _file_stamp(self.path) != self.stamp:
            raise self._changed()
        dtype = np.dtype(self.dtype)
        images = np.empty((len(slices), self.box_size, self.box_size), dtype=dtype)
        image_bytes = self.box_size**2 * dtype.itemsize
        # The stamp is part of the key, so that a file written anew is opened anew.
        opener = _open_packed_file if self.is_packed else _open_file
        file = opener(self.path, self.stamp)
        # In the order of the file, and neighbours in one piece: a memory map of the whole file
        # would read pages around each of scattered images.
        order = np.argsort(slices, kind="stable")
        ordered = np.asarray(slices)[order]
        breaks = np.flatnonzero(np.diff(ordered) != 1) + 1
        step = max(1, _READ_BYTES // image_bytes)
        for run in np.split(order, breaks) if len(order) else []:
            for start in range(0, len(run), step):
                part = run[start : start + step]
                offset = self.start + int(slices[part[0]]) * image_bytes
                data = file.read(len(part) * image_bytes, offset)
                if len(data) != len(part) * image_bytes:
                    raise self._changed()
                images[part] = np.frombuffer(data, dtype).reshape(-1, *images.shape[1:])
        return images

    def _changed(self) -> ValueError:
        return ValueError(
            f"expected {self.path} as it was when loaded, got it changed or gone; try loading again"
        )


@dataclass(frozen=True)
class _Header:
    """What the first 1024 bytes of an MRC file say."""

    shape: tuple[int, int, int]
    dtype: np.dtype
    start: int
    pixel_size: float | None
    is_volume: bool
    is_marked: bool
    is_packed: bool = False


def _read_header(path: Path) -> _Header:
    try:
        with open(path, "rb") as file:
            data = file.read(_HEADER_BYTES)
        is_packed = data[:2] == _GZIP
        if is_packed:
            with gzip.open(path) as packed:
                data = packed.read(_HEADER_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise _not_mrc(path, getattr(error, "strerror", None) or str(error)) from error
    if len(data) < _HEADER_BYTES:
        raise _not_mrc(path, f"{len(data)} bytes, fewer than a header has")
    # A stamp that says nothing: the order of bytes in which the numbers make sense.
    orders: tuple[Literal["<", ">"], ...] = ("<", ">")
    for order in {b"\x44": orders[:1], b"\x11": orders[1:]}.get(data[212:213], orders):
        header = _parse_header(data, order)
        if header is not None:
            return replace(header, is_packed=is_packed)
    raise _not_mrc(path, "its header has no sizes or no mode that images have")


def _parse_header(data: bytes, order: Literal["<", ">"]) -> _Header | None:
    """The header in this order of bytes; None where its numbers are not those of an MRC file."""
    columns, rows, sections, mode = (int(n) for n in np.frombuffer(data, f"{order}i4", 4))
    intervals = int(np.frombuffer(data, f"{order}i4", 1, 28)[0])
    width_angstrom = float(np.frombuffer(data, f"{order}f4", 1, 40)[0])
    space_group, extended = (int(n) for n in np.frombuffer(data, f"{order}i4", 2, 88))
    is_size = 0 < min(columns, rows) and max(columns, rows) <= _MAX_BOX and sections > 0
    if not is_size or mode not in _MODES or not 0 <= extended <= _MAX_EXTENDED_HEADER:
        return None
    pixel_size = None
    if intervals > 0 and np.isfinite(width_angstrom) and width_angstrom > 0:
        pixel_size = width_angstrom / intervals
    return _Header(
        (sections, rows, columns),
        np.dtype(_MODES[mode]).newbyteorder(order),
        _HEADER_BYTES + extended,
        pixel_size,
        401 <= space_group <= 630,
        data[208:212] == b"MAP ",
    )


def _not_mrc(path: Path, reason: str) -> ValueError:
    return ValueError(f"expected an MRC stack, got {path} ({reason}); try exporting it again")


def _require_unpacked_length(path: Path, expected: int) -> None:
    """Raise ValueError where a compressed file says that it holds another number of bytes."""
    with open(path, "rb") as file:
        file.seek(-4, os.SEEK_END)
        # gzip counts up to 2³² and begins anew.
        length = int.from_bytes(file.read(4), "little")
    if length != expected % (1 << 32):
        raise ValueError(
            f"expected {expected} bytes in the compressed {path}, as its header says, got another "
            "number, so that it is truncated or in several parts; try copying it again, or gunzip"
        )


def _file_stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class _OpenFile:
    """A file that is read at given bytes, and closed when nobody holds it any more."""

    def __init__(self, path: Path, is_packed: bool = False) -> None:
        self._file: IO[bytes] = open(path, "rb", buffering=0)
        if is_packed:
            self._file = _unpacked(path, self._file)

    def read(self, n_bytes: int, offset: int) -> bytes:
        """`n_bytes` from byte `offset` on, or fewer at the end of the file."""
        parts = []
        while n_bytes > 0:
            part = os.pread(self._file.fileno(), n_bytes, offset)
            if not part:
                break
            parts.append(part)
            n_bytes -= len(part)
            offset += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


def _unpacked(path: Path, packed: IO[bytes]) -> IO[bytes]:
    """A temporary file of what `packed` holds, which is closed."""
    unpacked = tempfile.TemporaryFile()
    try:
        with packed, gzip.open(packed) as content:
            shutil.copyfileobj(content, unpacked, _READ_BYTES)
        unpacked.flush()
    except (OSError, EOFError, zlib.error) as error:
        unpacked.close()
        raise ValueError(
            f"expected a whole compressed stack and room for it in {tempfile.gettempdir()}, got "
            f"{path} ({error}); try unpacking it with gunzip"
        ) from error
    return unpacked


@lru_cache(maxsize=_MAX_UNPACKED_STACKS)
def _open_packed_file(path: Path, stamp: tuple[int, int]) -> _OpenFile:
    return _OpenFile(path, is_packed=True)


@lru_cache(maxsize=_MAX_OPEN_STACKS)
def _open_file(path: Path, stamp: tuple[int, int]) -> _OpenFile:
    return _OpenFile(path)


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
    pixel_sizes : (n,) array, optional
        Å of each image in its file; only with `grid`.
    grid : Grid, optional
        Box and pixel size that the images are brought to as they are read, see `resample`. None:
        they are read as they are.
    magnifications : (n, 2, 2) array, optional
        RELION's matrix of each image in its file, which is undone as it is read; only with `grid`.

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
    pixel_sizes: np.ndarray | None = None
    grid: Grid | None = None
    magnifications: np.ndarray | None = None

    @classmethod
    def in_memory(cls, images: Tensor) -> "Images":
        """Images that are a (n, box, box) tensor already."""
        n = len(images)
        return cls((images,), np.zeros(n, dtype=np.int64), np.arange(n))

    def __len__(self) -> int:
        return len(self.slice_index)

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray) -> "Images":
        return replace(
            self,
            stack_index=self.stack_index[rows],
            slice_index=self.slice_index[rows],
            pixel_sizes=None if self.pixel_sizes is None else self.pixel_sizes[rows],
            magnifications=None if self.magnifications is None else self.magnifications[rows],
        )

    def on_grid(
        self, grid: Grid, pixel_sizes: np.ndarray, magnifications: np.ndarray | None = None
    ) -> "Images":
        """These images, brought to one box, pixel size and undistorted axes as they are read."""
        return replace(self, grid=grid, pixel_sizes=pixel_sizes, magnifications=magnifications)

    @property
    def box_sizes(self) -> np.ndarray:
        """(n,) px of each image in its file."""
        sizes = [
            stack.box_size if isinstance(stack, StackFile) else stack.shape[-1]
            for stack in self.stacks
        ]
        return np.array(sizes, dtype=np.int64)[self.stack_index]

    @property
    def shape(self) -> tuple[int, int, int]:
        if self.grid is not None:
            return len(self), self.grid.box_size, self.grid.box_size
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
            and self.grid == other.grid
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
        images = self._read_pixels()
        # A sum needs no memory for a mask, and is not finite when any pixel is not.
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~np.isfinite(images.sum(axis=(1, 2), dtype=np.float64)))
        if require_finite and len(bad):
            raise ValueError(
                f"expected finite pixels, got NaN or Inf in {self._describe(bad[0])}; "
                "try leaving it out"
            )
        return torch.from_numpy(images if self.sign == 1 else images * np.float32(self.sign))

    def _read_pixels(self) -> np.ndarray:
        """(n, box, box) float32 images as they are in their stacks, on the grid."""
        numbers = np.unique(self.stack_index)
        if len(numbers) == 1:
            return self._read_stack(int(numbers[0]), np.arange(len(self)))
        images = np.empty(self.shape, dtype=np.float32)
        for number in numbers:
            rows = np.flatnonzero(self.stack_index == number)
            images[rows] = self._read_stack(int(number), rows)
        return images

    def _read_stack(self, number: int, rows: np.ndarray) -> np.ndarray:
        """(k, box, box) float32 images of the k `rows`, which all are in this stack."""
        stack = self.stacks[number]
        slices = self.slice_index[rows]
        pixels = stack.read(slices) if isinstance(stack, StackFile) else stack[slices].numpy()
        if self.grid is not None:
            return self._on_grid(pixels, rows)
        return pixels.astype(np.float32, copy=False)

    def _on_grid(self, pixels: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """(k, box, box) images of one stack, the k `rows`, on the grid."""
        if self.grid is None or self.pixel_sizes is None:
            return pixels
        result = np.empty((len(rows), *self.shape[1:]), dtype=np.float32)
        kinds = self.pixel_sizes[rows, None]
        if self.magnifications is not None:
            kinds = np.concatenate([kinds, self.magnifications[rows].reshape(-1, 4)], axis=1)
        distinct, kind_of_row = np.unique(kinds, axis=0, return_inverse=True)
        for number, (size, *cells) in enumerate(distinct):
            same = kind_of_row.ravel() == number
            matrix = np.reshape(cells, (2, 2)) if cells else None
            result[same] = resample(pixels[same], float(size), self.grid, matrix)
        return result

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
    index = rows if isinstance(rows, slice) else _as_index(rows, n)
    try:
        return np.array(np.arange(n)[index], ndmin=1)
    except (IndexError, TypeError, ValueError) as error:
        raise _no_positions(rows, n, str(error)) from error


def _as_index(rows: int | Sequence[int] | np.ndarray | Tensor, n: int) -> np.ndarray:
    """Whole numbers (k,) or one, or a mask (n,)."""
    index = rows.cpu().numpy() if isinstance(rows, Tensor) else rows
    if isinstance(index, (list, tuple)) and len(set(map(type, index)) & {bool, int}) > 1:
        raise _no_positions(rows, n, "numbers and True or False")
    if not isinstance(index, (int, np.integer, Sequence)) and not hasattr(index, "__array__"):
        raise _no_positions(type(rows).__name__, n, "neither numbers nor a mask")
    try:
        array = np.asarray(index)
    except ValueError as error:
        raise _no_positions(rows, n, str(error)) from error
    if array.size == 0 and array.ndim == 1:
        return array.astype(np.int64)
    is_mask = array.dtype == bool and array.ndim == 1
    if not is_mask and (array.dtype.kind not in "iu" or array.ndim > 1):
        raise _no_positions(rows, n, f"{array.dtype} of shape {array.shape}")
    return array


def _no_positions(rows: object, n: int, reason: str) -> IndexError:
    got = " ".join(str(rows).split())
    if len(got) > _SHOWN_TEXT:
        got = f"{got[:_SHOWN_TEXT]}…"
    return IndexError(
        f"expected positions within {n} particles, got {got} ({' '.join(reason.split())}); "
        f"try numbers from 0 to {n - 1}, or a mask of {n}"
    )


@contextmanager
def stack_beside(
    table: Path, chunks: Iterable[Tensor], *, n_images: int, box_size: int, pixel_size: float
) -> Iterator[Path]:
    """Write the .mrcs beside `table`; what is written at the path it gives becomes `table`.

    Both whole or neither.
    """
    # On success the inner one is moved to its name first: a new table is never beside old images.
    with atomic_path(table) as part, atomic_path(table.with_suffix(".mrcs")) as stack_part:
        write_stack(stack_part, chunks, n_images=n_images, box_size=box_size, pixel_size=pixel_size)
        yield part


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
