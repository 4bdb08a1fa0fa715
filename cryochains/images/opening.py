"""What tables of particles of every program have in common as they are opened.

A table names images; they are found in folders, their headers are compared with the table, and what
the caller knows takes the place of what the table lacks or has wrong.
"""

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .ctf import CTF
from .resampling import Grid, is_wider, require_overlap
from .stacks import Images, StackFile

# A header's pixel size and the table's may differ by as much without a word: digits of a header.
_SAME_PIXEL_SIZE = 5e-3
# By more than this no calibration changes a pixel size: one of the two belongs to other images.
_OTHER_PIXEL_SIZE = 0.05
# What programs write that do not know the pixel size.
_UNSET_PIXEL_SIZE = 1.0
# Of columns that this library adds to a table: no other program's.
COLUMN_PREFIX = "cryochains"
# Lenses distort by some per cent; a matrix that stretches by more is none of an image.
_MAX_STRETCH = 0.2
# Of images that are narrower than this share of the widest, too little is seen in the others.
_MIN_WIDTH = 0.5
# Rows, and kinds of images, named in a warning.
_SHOWN_ROWS = 3
_SHOWN_KINDS = 4


@dataclass(frozen=True)
class Known:
    """What the caller knows of particles, in place of what their table says.

    Attributes
    ----------
    datadir : path, optional
        Folder that image names are relative to.
    pixel_size : float, optional
        Å, of the images in their files.
    voltage_kv, spherical_aberration_mm, amplitude_contrast : float, optional
    """

    datadir: str | os.PathLike | None = None
    pixel_size: float | None = None
    voltage_kv: float | None = None
    spherical_aberration_mm: float | None = None
    amplitude_contrast: float | None = None

    def __post_init__(self) -> None:
        for name in ("pixel_size", "voltage_kv"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and value > 0):
                raise ValueError(
                    f"expected {name} above 0, got {value}; try the microscope's settings"
                )

    def ctf_value(self, field: str) -> float | None:
        """The value of this field of the CTF; None where the table has to say it."""
        return getattr(self, field, None) if field in _CTF_ARGUMENTS else None

    @property
    def replaces_values(self) -> bool:
        """Whether numbers of the table are no longer those of the particles."""
        return any(getattr(self, name) is not None for name in ("pixel_size", *_CTF_ARGUMENTS))


_CTF_ARGUMENTS = ("voltage_kv", "spherical_aberration_mm", "amplitude_contrast")


def argument_hint(fields: list[str]) -> str:
    """What else to try where these fields of the CTF are missing: the arguments of their names.

    Examples
    --------
    >>> argument_hint(["voltage_kv", "defocus_u"]), argument_hint(["defocus_u"])
    (', or voltage_kv=', '')
    """
    known = [f"{field}=" for field in fields if field in _CTF_ARGUMENTS]
    return f", or {', '.join(known)}" if known else ""


@dataclass(frozen=True, eq=False)
class ImageNames:
    """Which image of which file each of n particles is.

    Attributes
    ----------
    files : list of str
        As the table calls them.
    file_index, slice_index : (n,) int arrays
        Particle i is image ``slice_index[i]``, the first being 0, of ``files[file_index[i]]``.
    """

    files: list[str]
    file_index: np.ndarray
    slice_index: np.ndarray


class _Table(Protocol):
    """Particles of a file, in this library's conventions."""

    def __len__(self) -> int: ...

    @property
    def path(self) -> Path: ...

    @property
    def pixel_column(self) -> str:
        """Where the pixel size stands in such files."""
        ...

    @property
    def sign(self) -> float:
        """−1 where the file says that protein is dark."""
        ...

    @property
    def ids(self) -> list[str]: ...

    def names(self) -> ImageNames: ...

    def pixel_sizes(self) -> np.ndarray | None:
        """(n,) Å, or None where the table does not say."""
        ...

    def box_sizes(self) -> np.ndarray | None:
        """(n,) px that the table announces, or None where it does not."""
        ...

    def groups(self) -> np.ndarray | None:
        """(n,) text: the optics group of each particle."""
        ...

    def magnifications(self) -> np.ndarray | None:
        """(n, 2, 2) RELION's matrix of each particle, or None where no image is distorted."""
        ...

    def poses(self, pixel_sizes: np.ndarray) -> tuple[Tensor, Tensor]:
        """(n, 3, 3) rotations and (n, 2) shifts in Å, float32."""
        ...

    def ctf(self, known: Known) -> CTF | None: ...

    def columns(self, rows: np.ndarray) -> pd.DataFrame: ...


def open_images(table: _Table, known: Known, invert: bool) -> tuple[Images, np.ndarray]:
    """The images of a table, checked by the headers of their stacks, and the (n,) Å of each."""
    names = table.names()
    stacks = _open_stacks(names.files, table.path, known.datadir)
    _require_images(table, names, stacks)
    _warn_of_ways_out(table, names)
    _warn_of_duplicates(table, names)
    sizes = _pixel_sizes(table, known)
    _compare_headers(table, known, names, stacks, sizes)
    sign = table.sign * (-1.0 if invert else 1.0)
    return Images(stacks, names.file_index, names.slice_index, sign), sizes


def _find_stack(name: str, table: Path, datadir: str | os.PathLike | None = None) -> Path | None:
    """The file called `name` in `datadir`, in the folder of `table` or in one above it.

    Names are relative to the folder of the project, in which the tables lie deeper. In `datadir`
    the file may also lie without the folders of its name.
    """
    folder = Path(os.path.abspath(table)).parent
    paths = [base / name for base in (folder, *folder.parents)]
    if datadir is not None:
        paths = [Path(datadir) / name, Path(datadir) / Path(name).name, *paths]
    return next((path for path in paths if is_file(path)), None)


def present_stacks(table: Path, images: Images) -> list[tuple[str | None, Path]]:
    """Of each file of images its name, by which `table` finds it where it is, and its path.

    None where the name that it had does not lead to the same file from there.
    """
    stacks: list[tuple[str | None, Path]] = []
    for stack in images.stacks:
        if not isinstance(stack, StackFile):
            raise ValueError(
                "expected images in files to write a table alone, got images in memory; "
                "try images=True"
            )
        nearby = _find_stack(stack.name, table)
        same = nearby is not None and nearby.samefile(stack.path)
        stacks.append((stack.name if same else None, stack.path))
    return stacks


def is_file(path: Path) -> bool:
    """Whether there is such a file; False for names that no file can have."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _open_stacks(
    names: list[str], table: Path, datadir: str | os.PathLike | None
) -> tuple[StackFile, ...]:
    paths = [_find_stack(name, table, datadir) for name in names]
    missing = [name for name, path in zip(names, paths, strict=True) if path is None]
    if missing:
        listed = ", ".join(missing[:3])
        if len(missing) > 3:
            listed += f" and {len(missing) - 3} more"
        where = "in its folder or one above"
        if datadir is not None:
            where = f"in {datadir}, {where}"
        raise FileNotFoundError(
            f"expected the images of {table} {where}, got no {listed}; "
            "try datadir=, the folder that these names are relative to"
        )
    return tuple(
        StackFile.open(path, name)
        for path, name in zip(paths, names, strict=True)
        if path is not None
    )


def _require_images(table: _Table, names: ImageNames, stacks: tuple[StackFile, ...]) -> None:
    lengths = np.array([stack.n_images for stack in stacks])[names.file_index]
    # Fewer rows than images is a selection, which all programs write; more rows is a mistake.
    bad = np.flatnonzero((names.slice_index < 0) | (names.slice_index >= lengths))
    if len(bad):
        row = bad[0]
        stack = stacks[names.file_index[row]]
        raise ValueError(
            f"expected {table.path} to name the {stack.n_images} images of {stack.path}, got "
            f"row {row + 1} with image {names.slice_index[row] + 1}; try the table of that stack"
        )


def _warn_of_ways_out(table: _Table, names: ImageNames) -> None:
    """One warning for names that lead out of the folders that they are relative to."""
    outside = [name for name in names.files if os.path.normpath(name).startswith("..")]
    if outside:
        more = f" and {len(outside) - 1} more stacks" if len(outside) > 1 else ""
        row = int(np.flatnonzero(names.file_index == names.files.index(outside[0]))[0])
        warnings.warn(
            f"{table.path} names images that are outside of its folders: {outside[0]} in row "
            f"{row + 1}{more}. They are read; a copy of the project does not have them",
            stacklevel=5,
        )


def _warn_of_duplicates(table: _Table, names: ImageNames) -> None:
    """One warning for images that are named twice: resampled tables do so on purpose."""
    keys = names.file_index.astype(np.int64) << 32 | names.slice_index
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(keys)))
    if len(again):
        pairs = [f"{row + 1} as row {first[inverse[row]] + 1}" for row in again[:_SHOWN_ROWS]]
        more = f" and {len(again) - _SHOWN_ROWS} more" if len(again) > _SHOWN_ROWS else ""
        warnings.warn(
            f"{table.path} names the same image more than once: row {', row '.join(pairs)}{more}. "
            "They are read as they are; what is looked up by a particle's id finds one of them",
            stacklevel=5,
        )


def _pixel_sizes(table: _Table, known: Known) -> np.ndarray:
    """(n,) Å of the images in their files; sizes that are the same but for rounding are one."""
    if known.pixel_size is not None:
        return np.full(len(table), float(known.pixel_size))
    sizes = table.pixel_sizes()
    if sizes is None:
        raise ValueError(
            f"expected columns {table.pixel_column} in {table.path}, got no pixel size; "
            "try pixel_size= in Å"
        )
    bad = np.flatnonzero(~(sizes > 0))
    if len(bad):
        raise ValueError(
            f"expected positive pixel sizes in {table.path}, got {sizes[bad[0]]:g} Å in row "
            f"{bad[0] + 1}; try pixel_size="
        )
    if np.allclose(sizes, sizes[0], rtol=1e-4):
        return np.full(len(sizes), float(sizes[0]))
    return sizes


def _compare_headers(
    table: _Table,
    known: Known,
    names: ImageNames,
    stacks: tuple[StackFile, ...],
    sizes: np.ndarray,
) -> None:
    """Box and pixel size of the headers against the table's, unless the caller decided."""
    if known.pixel_size is not None:
        return
    _, first = np.unique(names.file_index, return_index=True)
    boxes = table.box_sizes()
    doubtful = ""
    for row in first:
        stack = stacks[names.file_index[row]]
        size = float(sizes[row])
        header = stack.pixel_size
        if header is None or abs(header - _UNSET_PIXEL_SIZE) < 1e-3:
            header = None
        box = stack.box_size if boxes is None else int(boxes[row])
        off = 0.0 if header is None else abs(header - size) / size
        if box != stack.box_size or off > _OTHER_PIXEL_SIZE:
            raise _contradiction(table, stack, header, box, size)
        if off > _SAME_PIXEL_SIZE and not doubtful:
            doubtful = f"{size:g} Å a pixel where the header of {stack.path} has {header:g} Å"
    if doubtful:
        warnings.warn(
            f"{table.path} has {doubtful}; the table's is taken, pixel_size= takes another",
            stacklevel=5,
        )


def _contradiction(
    table: _Table, stack: StackFile, header: float | None, box: int, size: float
) -> ValueError:
    in_header = f"{stack.box_size} px"
    if header is not None:
        in_header += f" × {header:g} Å"
    if box == stack.box_size:
        advice = f"pixel_size={header:.6g}, the header's, or pixel_size={size:.6g}, the table's"
    else:
        likely = header if header is not None else box * size / stack.box_size
        advice = (
            f"the table that was written with these images or, where they were binned later, "
            f"pixel_size={likely:.6g}"
        )
    return ValueError(
        f"expected {box} px × {size:g} Å, as {table.path} says, got {in_header} in the header of "
        f"{stack.path}; try {advice}"
    )


def sizes_of_shifts(table: _Table, sizes: np.ndarray) -> np.ndarray:
    """(n,) Å of a pixel where the table was written; `sizes` where it does not say."""
    in_table = table.pixel_sizes()
    return sizes if in_table is None else np.where(in_table > 0, in_table, sizes)


def scaled_shifts(table: _Table, known: Known, images: Images, sizes: np.ndarray) -> np.ndarray:
    """(n, 1) factors of the table's shifts in Å where the caller knows another pixel size.

    Particles lie at fixed pixels of their images: a pixel that is larger than the table says makes
    their shifts larger. Images that were binned since have fewer and larger pixels, and then
    nothing changes.
    """
    if known.pixel_size is None:
        return np.ones((len(sizes), 1))
    boxes = table.box_sizes()
    ratio = sizes / sizes_of_shifts(table, sizes)
    if boxes is not None:
        ratio = np.where(boxes > 0, ratio * images.box_sizes / np.maximum(boxes, 1), ratio)
    return ratio[:, None]


def magnifications_of(table: _Table) -> np.ndarray | None:
    """(n, 2, 2) matrices of the table, once checked; None where they change nothing.

    Raises
    ------
    ValueError
        For a matrix that stretches, turns or mirrors more than a lens does.
    """
    matrices = table.magnifications()
    matrices = None if matrices is None else unless_neutral(matrices, np.eye(2))
    if matrices is None:
        return None
    bad = np.flatnonzero(np.abs(matrices - np.eye(2)).max(axis=(1, 2)) > _MAX_STRETCH)
    if len(bad):
        raise ValueError(
            f"expected magnification matrices within {_MAX_STRETCH:g} of the unit matrix in "
            f"{table.path}, got {matrices[bad[0]].round(4).tolist()} in row {bad[0] + 1}; try the "
            "file that the program wrote, or the table without these columns"
        )
    return matrices


def undistort(shifts: Tensor, matrices: np.ndarray) -> Tensor:
    """(n, 2) shifts on images as in their files → those on undistorted ones, M⁻ᵀ t."""
    columns = np.asarray(shifts, dtype=np.float64)[..., None]
    solved = np.linalg.solve(matrices.transpose(0, 2, 1), columns)
    return torch.from_numpy(solved[..., 0]).float()


def distort(shifts: Tensor, matrices: np.ndarray) -> Tensor:
    """(n, 2) shifts on undistorted images → those on images as in their files, Mᵀ t.

    Examples
    --------
    >>> matrices = np.array([[[1.02, 0.01], [0.0, 0.99]]])
    >>> distort(undistort(torch.ones(1, 2), matrices), matrices).round(decimals=4).tolist()
    [[1.0, 1.0]]
    """
    moved = matrices.transpose(0, 2, 1) @ np.asarray(shifts, dtype=np.float64)[..., None]
    return torch.from_numpy(moved[..., 0]).float()


def choose_grid(
    table: _Table,
    images: Images,
    sizes: np.ndarray,
    magnifications: np.ndarray | None,
    box_size: int | None,
    optics_group: str | int | None,
) -> tuple[Images, float]:
    """The images on one grid with undistorted axes, and its pixel size in Å.

    Parameters
    ----------
    table : _Table
    images : Images
    sizes : (n,) array
        Å of each image in its file.
    magnifications : (n, 2, 2) array or None
        As of `magnifications_of`.
    box_size : int or None
        Box to crop to in Fourier space.
    optics_group : str, int or None
        Group whose pixel size and box are kept.
    """
    boxes = images.box_sizes
    is_one = bool((boxes == boxes[0]).all() and (sizes == sizes[0]).all())
    if optics_group is None:
        box, size = _common_grid(table, sizes, boxes)
    else:
        row = _row_of_group(table, optics_group)
        box, size = int(boxes[row]), float(sizes[row])
    target = box - box % 2 if box_size is None else _checked_box(box_size, box)
    if target == box and is_one and magnifications is None:
        return images, size
    # The same width in Å with another number of pixels.
    grid = Grid(target, size if target == box else size * box / target)
    # One of each width in each stack.
    widths = np.stack([images.stack_index, boxes * sizes], axis=1)
    _, some = np.unique(widths, axis=0, return_index=True)
    for first in some:
        stack = images.stacks[images.stack_index[first]]
        name = str(stack.path) if isinstance(stack, StackFile) else "memory"
        require_overlap(int(boxes[first]), float(sizes[first]), grid, name)
    if optics_group is None and not is_one:
        _warn_of_rescaling(table, sizes, boxes, grid)
    return images.on_grid(grid, sizes, magnifications), grid.pixel_size


def _row_of_group(table: _Table, optics_group: str | int) -> int:
    groups = table.groups()
    rows = np.zeros(0, dtype=int) if groups is None else np.flatnonzero(groups == str(optics_group))
    if not len(rows):
        known = "none" if groups is None else ", ".join(sorted(set(groups))[:10])
        raise ValueError(
            f"expected an optics group of {table.path}, got {optics_group!r} where there are "
            f"{known}; try one of them"
        )
    return int(rows[0])


def _common_grid(table: _Table, sizes: np.ndarray, boxes: np.ndarray) -> tuple[int, float]:
    """Box and pixel size that images of several ones can be brought to without loss.

    The coarsest pixels, since finer ones would have frequencies at which some images have nothing;
    the smallest box of those, made smaller where others are much narrower.

    Raises
    ------
    ValueError
        Where the widths of the images are too different.
    """
    widths = boxes * sizes
    narrowest, widest = float(widths.min()), float(widths.max())
    if narrowest < _MIN_WIDTH * widest:
        raise ValueError(
            f"expected images of about one width in {table.path}, got {narrowest:g} to "
            f"{widest:g} Å; try optics_group=, the group that the others are rescaled to as they "
            "are read"
        )
    size = float(sizes.max())
    box = int(boxes[sizes == size].min())
    if is_wider(box * size, narrowest):
        box = 2 * int(narrowest / size / 2 + 1e-6)
    return box, size


def _warn_of_rescaling(table: _Table, sizes: np.ndarray, boxes: np.ndarray, grid: Grid) -> None:
    kinds, counts = np.unique(np.stack([boxes, sizes], axis=1), axis=0, return_counts=True)
    listed = [
        f"{box:.0f} px × {size:g} Å ({count:,})"
        for (box, size), count in zip(kinds, counts, strict=True)
    ]
    more = f" and {len(listed) - _SHOWN_KINDS} more" if len(listed) > _SHOWN_KINDS else ""
    warnings.warn(
        f"{table.path} has images of {', '.join(listed[:_SHOWN_KINDS])}{more}: all are brought to "
        f"{grid.box_size} px × {grid.pixel_size:g} Å as they are read; optics_group= chooses "
        "another group's",
        stacklevel=5,
    )


def _checked_box(box_size: int, box: int) -> int:
    is_whole = isinstance(box_size, (int, np.integer)) and not isinstance(box_size, bool)
    if not is_whole or box_size < 2 or box_size % 2 or box_size > box:
        raise ValueError(
            f"expected an even box_size of 2 to {box} px, got {box_size!r}; try 64 or 128"
        )
    return int(box_size)


def make_ctf(table: _Table, values: dict[str, np.ndarray]) -> CTF:
    """A CTF of (n, …) arrays by the names of its fields, in this library's units, once checked.

    Raises
    ------
    ValueError
        For defocus or voltages that are not positive, and amplitude contrast that is no fraction.
    """
    for field in ("defocus_u", "defocus_v", "voltage_kv"):
        _require_all(table, field, values[field], values[field] > 0, "above 0")
    contrast = values["amplitude_contrast"]
    is_fraction = (contrast >= 0) & (contrast <= 1)
    _require_all(table, "amplitude_contrast", contrast, is_fraction, "from 0 to 1, not per cent,")
    tensors: dict[str, Any] = {
        field: torch.from_numpy(np.array(array, dtype=np.float64))
        for field, array in values.items()
    }
    return CTF(**tensors)


def _require_all(
    table: _Table, field: str, values: np.ndarray, good: np.ndarray, expected: str
) -> None:
    bad = np.flatnonzero(~good)
    if len(bad):
        name = field.replace("_", " ")
        hint = f" or {field}=" if field in _CTF_ARGUMENTS else ""
        raise ValueError(
            f"expected {name} {expected} in {table.path}, got {values[bad[0]]:g} in row "
            f"{bad[0] + 1}; try leaving that particle out{hint}"
        )


def unless_neutral(values: np.ndarray, neutral: float | np.ndarray) -> np.ndarray | None:
    """`values`, or None where all of them change nothing."""
    return None if np.allclose(values, neutral, atol=1e-9, rtol=0) else values


def warn_of_ignored(path: Path, ignored: list[str]) -> None:
    """One warning that names what of a table is not used."""
    if ignored:
        warnings.warn(
            f"{path} has {', '.join(ignored)}: the images are not corrected for that. At the "
            "resolution of motions it matters little",
            stacklevel=5,
        )
