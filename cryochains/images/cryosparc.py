"""cryoSPARC's tables of particles (.cs), converted to this library's conventions and back.

cryoSPARC → here: the rotation vector alignments3D/pose → R, transposed, the rotation of Eq. 3;
alignments3D/shift, in pixels of alignments3D/psize_A → −t, the shift in Å; angles are in radians
already; blob/sign −1 → dark protein; ctf/anisomag, row by row and without the unit matrix →
RELION's magnification matrix. A .cs is one numpy array with named fields; one that holds
Python objects is refused. Fields unknown to this package are written again as they were.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.lib import format as npy
from scipy.spatial.transform import Rotation
from torch import Tensor

from .._files import atomic_path
from .ctf import CTF
from .opening import (
    COLUMN_PREFIX,
    ImageNames,
    Known,
    argument_hint,
    is_file,
    make_ctf,
    present_stacks,
    unless_neutral,
    warn_of_ignored,
)
from .stacks import Images, stack_beside

# Field of the .cs → field of the CTF; their units are ours.
_CTF_FIELDS = {
    "ctf/df1_A": "defocus_u",
    "ctf/df2_A": "defocus_v",
    "ctf/df_angle_rad": "defocus_angle",
    "ctf/phase_shift_rad": "phase_shift",
    "ctf/accel_kv": "voltage_kv",
    "ctf/cs_mm": "spherical_aberration_mm",
    "ctf/amp_contrast": "amplitude_contrast",
}
_MORE_CTF_FIELDS = {"ctf/bfactor": ("b_factor", 0.0), "ctf/scale": ("scale", 1.0)}
# What is not used and is worth a word where it is not 0.
_IGNORED_FIELDS = ("ctf/tilt_A", "ctf/shift_A", "ctf/trefoil_A", "ctf/tetra_A")
_MAGNIFICATION = "ctf/anisomag"
_NEEDED_BLOB = ("blob/path", "blob/idx")
_ALIGNMENTS = "alignments3D"
_MANY_ALIGNMENTS = "alignments3D_multi"
# Names and types of the fields; numpy's own limit is less than a long job's file needs.
_MAX_HEADER = 200_000
_NPY_READERS: dict[tuple[int, int], Any] = {
    (1, 0): npy.read_array_header_1_0,
    (2, 0): npy.read_array_header_2_0,
}


@dataclass(frozen=True, eq=False)
class CryosparcTable:
    """A .cs file, joined with its passthrough files.

    Attributes
    ----------
    path : Path
    array : (n,) structured array
    """

    path: Path
    array: np.ndarray

    def __len__(self) -> int:
        return len(self.array)

    @property
    def fields(self) -> tuple[str, ...]:
        return self.array.dtype.names or ()

    @property
    def pixel_column(self) -> str:
        return "blob/psize_A"

    def values(self, field: str, shape: tuple[int, ...] = ()) -> np.ndarray:
        """(n, *shape) float64 values of a field.

        Raises
        ------
        ValueError
            When there is no such field, or it holds something else than finite numbers.
        """
        self.require((field,))
        kind = self.array.dtype[field]
        if kind.shape != shape or kind.base.kind not in "iufb":
            raise ValueError(
                f"expected numbers of shape {shape} in {field} of {self.path}, got {kind}; "
                "try the .cs file that cryoSPARC wrote"
            )
        values = self.array[field].astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(values.reshape(len(values), -1)).all(axis=1))
        if len(bad):
            raise ValueError(
                f"expected numbers in {field} of {self.path}, got {values[bad[0]]} in row "
                f"{bad[0] + 1}; try leaving that particle out"
            )
        return values

    def require(self, fields: Sequence[str]) -> None:
        """Raise ValueError that names the fields which are missing."""
        missing = [field for field in fields if field not in self.fields]
        if missing:
            groups = dict.fromkeys(field.split("/")[0] for field in self.fields)
            known = [_CTF_FIELDS[field] for field in missing if field in _CTF_FIELDS]
            raise ValueError(
                f"expected fields {', '.join(missing)} in {self.path}, got only some of "
                f"{', '.join(groups)}; try passthrough= with the job's passthrough_particles.cs, "
                f"which has the fields that the job did not write{argument_hint(known)}"
            )

    @property
    def sign(self) -> float:
        """−1 where blob/sign says that protein is dark."""
        if "blob/sign" not in self.fields:
            return 1.0
        signs = np.sign(self.values("blob/sign"))
        other = np.flatnonzero(signs != signs[0])
        if len(other) or signs[0] == 0:
            row = other[0] if len(other) else 0
            raise ValueError(
                f"expected one contrast, 1 or -1, in blob/sign of {self.path}, got {signs[row]:g} "
                f"in row {row + 1}; try a .cs file for each"
            )
        return float(signs[0])

    @property
    def ids(self) -> list[str]:
        """Names as a .star of the same particles has them."""
        names = self.names()
        return [
            f"{number + 1:06d}@{names.files[file]}"
            for number, file in zip(names.slice_index, names.file_index, strict=True)
        ]

    def names(self) -> ImageNames:
        """Which image of which file each particle is."""
        self.require(_NEEDED_BLOB)
        file_index, files = pd.factorize(_text(self, "blob/path"))
        slice_index = self.values("blob/idx").astype(np.int64)
        # A path that cryoSPARC marked as being in the project begins so.
        return ImageNames([name.lstrip(">") for name in files], file_index, slice_index)

    def pixel_sizes(self) -> np.ndarray | None:
        if "blob/psize_A" not in self.fields:
            return None
        # float32 in the file: 2.95 and not 2.9500000477.
        return np.array([float(f"{size:.7g}") for size in self.values("blob/psize_A")])

    def box_sizes(self) -> np.ndarray | None:
        if "blob/shape" not in self.fields:
            return None
        return self.values("blob/shape", (2,))[:, 0]

    def groups(self) -> np.ndarray | None:
        """(n,) text: the exposure group of each particle."""
        if "ctf/exp_group_id" not in self.fields:
            return None
        numbers = self.values("ctf/exp_group_id").astype(np.int64)
        return numbers.astype(str).astype(object)

    def magnifications(self) -> np.ndarray | None:
        """(n, 2, 2) matrices, or None: the transform at k is that of the undistorted image at M k.

        As cryoSPARC's developers say (discuss.cryosparc.com/t/12204 and 11402): the unit matrix
        and the four numbers together change coordinates in Fourier space.
        """
        if _MAGNIFICATION not in self.fields:
            return None
        return self.values(_MAGNIFICATION, (4,)).reshape(-1, 2, 2) + np.eye(2)

    def poses(self, pixel_sizes: np.ndarray) -> tuple[Tensor, Tensor]:
        """(n, 3, 3) rotations and (n, 2) shifts in Å, both float32; `pixel_sizes` (n,) in Å."""
        pose, shift, size = self._alignments(pixel_sizes)
        matrices = Rotation.from_rotvec(pose).as_matrix().transpose(0, 2, 1)
        shifts = -shift * size[:, None]
        return torch.from_numpy(matrices.copy()).float(), torch.from_numpy(shifts).float()

    def _alignments(self, pixel_sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(n, 3) rotation vectors, (n, 2) shifts in pixels, (n,) Å of such a pixel.

        Of several classes, each particle has the pose in the one that is most probable for it.
        """
        if f"{_ALIGNMENTS}/pose" in self.fields:
            return self._one_alignment(_ALIGNMENTS, pixel_sizes)
        if f"{_MANY_ALIGNMENTS}/pose" in self.fields:
            return self._of_many_alignments(pixel_sizes)
        classes = [
            field.removesuffix("/pose")
            for field in self.fields
            if field.startswith("alignments_class") and field.endswith("/pose")
        ]
        if not classes:
            self.require((f"{_ALIGNMENTS}/pose",))
        parts = [self._one_alignment(one, pixel_sizes) for one in classes]
        weights = np.stack([self.values(f"{one}/class_posterior") for one in classes], axis=1)
        best = (np.arange(len(self)), weights.argmax(axis=1))
        pose, shift, size = (np.stack(part, axis=1)[best] for part in zip(*parts, strict=True))
        return pose, shift, size

    def _one_alignment(
        self, prefix: str, pixel_sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        pose = self.values(f"{prefix}/pose", (3,))
        shift = self.values(f"{prefix}/shift", (2,))
        field = f"{prefix}/psize_A"
        return pose, shift, self._pixels_of_shifts(field, pixel_sizes)

    def _pixels_of_shifts(self, field: str, pixel_sizes: np.ndarray) -> np.ndarray:
        return self.values(field) if field in self.fields else pixel_sizes

    def _of_many_alignments(
        self, pixel_sizes: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        field = f"{_MANY_ALIGNMENTS}/class_posterior"
        self.require((field,))
        n_classes = self.array.dtype[field].shape
        weights = self.values(field, n_classes)
        pose = self.values(f"{_MANY_ALIGNMENTS}/pose", (*n_classes, 3))
        shift = self.values(f"{_MANY_ALIGNMENTS}/shift", (*n_classes, 2))
        best = (np.arange(len(self)), weights.reshape(len(self), -1).argmax(axis=1))
        size = self._pixels_of_shifts(f"{_MANY_ALIGNMENTS}/psize_A", pixel_sizes)
        return (
            pose.reshape(len(self), -1, 3)[best],
            shift.reshape(len(self), -1, 2)[best],
            size,
        )

    def ctf(self, known: Known) -> CTF | None:
        """The CTF of every particle, or None when the table has no defocus."""
        if "ctf/df1_A" not in self.fields:
            return None
        values: dict[str, np.ndarray] = {}
        for source, field in _CTF_FIELDS.items():
            value = known.ctf_value(field)
            if value is not None:
                values[field] = np.full(len(self), value)
            elif source == "ctf/phase_shift_rad" and source not in self.fields:
                values[field] = np.zeros(len(self))
            else:
                values[field] = self.values(source)
        for source, (field, neutral) in _MORE_CTF_FIELDS.items():
            if source in self.fields:
                more = unless_neutral(self.values(source), neutral)
                if more is not None:
                    values[field] = more
        ignored = [field for field in _IGNORED_FIELDS if self._is_nonzero(field)]
        warn_of_ignored(self.path, ignored)
        return make_ctf(self, values)

    def _is_nonzero(self, field: str) -> bool:
        if field not in self.fields:
            return False
        return bool(self.values(field, self.array.dtype[field].shape).any())

    def columns(self, rows: np.ndarray) -> pd.DataFrame:
        """The numbers of the table, of these rows, by the names of the fields."""
        columns = {}
        for field in self.fields:
            kind = self.array.dtype[field]
            if kind.shape == () and kind.kind in "iuf" and field != "uid":
                values = self.array[field][rows]
                if np.isfinite(values).all():
                    columns[field] = values
        return pd.DataFrame(columns, index=range(len(rows)))

    def relion_columns(self, rows: np.ndarray) -> dict[str, list[str]]:
        """What else a .star of these rows can hold, by RELION's names."""
        columns: dict[str, list[str]] = {}
        chosen = self.array[rows]
        if "uid" in self.fields:
            columns["ucsfUid"] = [str(value) for value in chosen["uid"].tolist()]
        if "location/micrograph_path" in self.fields:
            paths = _text(self, "location/micrograph_path")
            columns["rlnMicrographName"] = [str(paths[row]).lstrip(">") for row in rows]
        # Counted from 0 there and from 1 in RELION; one half only means that there are no halves.
        split = f"{_ALIGNMENTS}/split"
        if split in self.fields and len(np.unique(self.array[split])) > 1:
            columns["rlnRandomSubset"] = [str(int(one) + 1) for one in chosen[split]]
        number = f"{_ALIGNMENTS}/class"
        if number in self.fields:
            columns["rlnClassNumber"] = [str(int(one) + 1) for one in chosen[number]]
        return columns

    def select(self, rows: np.ndarray) -> np.ndarray:
        """(k,) structured array of these rows, a copy."""
        return self.array[rows].copy()


def _text(table: CryosparcTable, field: str) -> np.ndarray:
    """(n,) object array of the text of a field of bytes or characters."""
    values = table.array[field]
    try:
        if values.ndim == 1 and values.dtype.kind == "S":
            return np.array([one.decode("utf-8") for one in values.tolist()], dtype=object)
        if values.ndim == 1 and values.dtype.kind == "U":
            return values.astype(object)
    except UnicodeDecodeError:
        pass
    raise ValueError(
        f"expected text in {field} of {table.path}, got {values.dtype}; "
        "try the .cs file that cryoSPARC wrote"
    )


def read_cs(
    path: str | os.PathLike, passthrough: Sequence[str | os.PathLike] = ()
) -> CryosparcTable:
    """Read a .cs file and join to it, by uid, the fields that only its passthrough files have.

    Raises
    ------
    FileNotFoundError, ValueError
        When a file is missing, is no .cs, holds Python objects, or lacks particles of the first.
    """
    path = Path(path)
    array = _read_array(path)
    for one in passthrough:
        array = _join(path, array, _near(Path(one), path))
    return CryosparcTable(path, array)


def _near(other: Path, path: Path) -> Path:
    """`other`, or the file of its name beside `path` where the two were moved together."""
    beside = path.parent / other.name
    return other if is_file(other) or not is_file(beside) else beside


def _read_array(path: Path) -> np.ndarray:
    if not is_file(path):
        raise FileNotFoundError(
            f"expected a cryoSPARC .cs file, got {path}, which is not there; try another path"
        )
    array = _checked_array(path)
    if array.ndim != 1 or not array.dtype.names or not len(array):
        raise ValueError(
            f"expected a table of particles, got an array of {array.shape} and {array.dtype} in "
            f"{path}; try the particles of a refinement"
        )
    return array


def _checked_array(path: Path) -> np.ndarray:
    """The array, read once its announced size is that of the file."""
    with open(path, "rb") as file:
        try:
            version = npy.read_magic(file)
            shape, _, dtype = _NPY_READERS[version](file, max_header_size=_MAX_HEADER)
        except Exception as error:  # whatever the parts of numpy's reader raise
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise _not_cs(path, reason) from error
        if dtype.hasobject:
            raise _not_cs(path, "it holds Python objects, which are never read")
        if len(shape) != 1 or not 0 <= shape[0] < 1 << 40 or not 0 < dtype.itemsize < 1 << 24:
            raise _not_cs(path, f"an array of shape {shape}")
        n_bytes = shape[0] * dtype.itemsize
        if path.stat().st_size - file.tell() < n_bytes:
            raise _not_cs(path, f"fewer than the {n_bytes} bytes it announces")
        return np.frombuffer(file.read(n_bytes), dtype=dtype, count=shape[0])


def _not_cs(path: Path, reason: str) -> ValueError:
    return ValueError(
        f"expected a cryoSPARC .cs file, got {path} ({reason}); try exporting it again"
    )


def _join(path: Path, array: np.ndarray, other_path: Path) -> np.ndarray:
    other = _read_array(other_path)
    for where, one in ((path, array), (other_path, other)):
        names = one.dtype.names or ()
        if "uid" not in names or one.dtype["uid"].kind not in "iu" or one["uid"].ndim != 1:
            raise ValueError(
                f"expected the field uid to join {path} and {other_path} by, got none in {where}; "
                "try the files of one job"
            )
    uids, first = np.unique(other["uid"], return_index=True)
    position = np.minimum(np.searchsorted(uids, array["uid"]), len(uids) - 1)
    bad = np.flatnonzero(uids[position] != array["uid"])
    if len(bad):
        raise ValueError(
            f"expected every particle of {path} in {other_path}, got none with the uid of row "
            f"{bad[0] + 1} and {len(bad) - 1} more; try the passthrough file of the same job"
        )
    names = [name for name in other.dtype.names or () if name not in (array.dtype.names or ())]
    columns = {name: other[name][first[position]] for name in names}
    return with_fields(array, columns)


def with_fields(array: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """A copy of a structured array with these fields, (n, …) arrays, in place or added at the end.

    Examples
    --------
    >>> with_fields(np.zeros(2, dtype=[("a", "i4")]), {"b": np.ones((2, 3))}).dtype.names
    ('a', 'b')
    """
    kinds: list[Any] = [
        (name, array.dtype[name]) for name in array.dtype.names or () if name not in columns
    ]
    kinds += [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
    kept = {kind[0] for kind in kinds}
    order = [name for name in array.dtype.names or () if name in kept]
    order += [name for name in columns if name not in order]
    by_name = {kind[0]: kind for kind in kinds}
    result = np.empty(len(array), dtype=[by_name[name] for name in order])
    for name in order:
        result[name] = columns[name] if name in columns else array[name]
    return result


def pose_fields(
    array: np.ndarray, rotations: Tensor, shifts: Tensor, changed: np.ndarray, pixel_size: float
) -> np.ndarray:
    """The array with these poses in its alignments3D where they `changed`.

    Parameters
    ----------
    array : (k,) structured array
    rotations : (k, 3, 3) tensor
    shifts : (k, 2) tensor
        Å.
    changed : (k,) mask
    pixel_size : float
        Å, of the shifts' pixels where the array has no alignments3D yet; all poses are then
        written.
    """
    matrices = np.asarray(rotations, dtype=np.float64).transpose(0, 2, 1)
    poses = Rotation.from_matrix(matrices).as_rotvec().astype(np.float32)
    names = array.dtype.names or ()
    size_field = f"{_ALIGNMENTS}/psize_A"
    sizes = np.full(len(array), pixel_size, dtype=np.float32)
    if size_field in names:
        sizes = array[size_field]
    pixels = (-np.asarray(shifts, dtype=np.float64) / sizes[:, None]).astype(np.float32)
    fresh = {f"{_ALIGNMENTS}/pose": poses, f"{_ALIGNMENTS}/shift": pixels}
    for name, values in fresh.items():
        if name in names:
            fresh[name] = np.where(changed[:, None], values, array[name])
    return with_fields(array, fresh | {size_field: sizes})


def ctf_fields(array: np.ndarray, ctf: CTF) -> np.ndarray:
    """The array with this CTF."""
    columns = {
        name: np.asarray(getattr(ctf, field), dtype=np.float32)
        for name, field in _CTF_FIELDS.items()
    }
    for name, (field, _) in _MORE_CTF_FIELDS.items():
        values = getattr(ctf, field)
        if values is not None:
            columns[name] = np.asarray(values, dtype=np.float32)
    return with_fields(array, columns)


def without_magnification(array: np.ndarray) -> np.ndarray:
    """The array of images that are no longer distorted."""
    if _MAGNIFICATION not in (array.dtype.names or ()):
        return array
    return with_fields(array, {_MAGNIFICATION: np.zeros((len(array), 4), dtype=np.float32)})


def blob_fields(array: np.ndarray, stack: str, box_size: int, pixel_size: float) -> np.ndarray:
    """The array whose images are the first of the file `stack`, protein-bright, in this order."""
    n = len(array)
    columns = {
        "blob/path": np.full(n, stack.encode("utf-8")),
        "blob/idx": np.arange(n, dtype=np.uint32),
        "blob/shape": np.full((n, 2), box_size, dtype=np.uint32),
        "blob/psize_A": np.full(n, pixel_size, dtype=np.float32),
        "blob/sign": np.ones(n, dtype=np.float32),
    }
    return with_fields(array, columns)


def present_fields(array: np.ndarray, path: Path, images: Images) -> np.ndarray:
    """The array with paths by which a .cs at `path` finds its images where they are.

    A path that leads there already is kept: cryoSPARC's are relative to the project.
    """
    moved = {
        number: os.path.abspath(stack)
        for number, (name, stack) in enumerate(present_stacks(path, images))
        if name is None
    }
    if not moved:
        return array
    paths = array["blob/path"].astype(object)
    for number, stack in moved.items():
        kind = array.dtype["blob/path"].kind
        paths[images.stack_index == number] = stack.encode("utf-8") if kind == "S" else stack
    return with_fields(array, {"blob/path": np.array(paths.tolist())})


def column_fields(array: np.ndarray, columns: dict[str, np.ndarray]) -> np.ndarray:
    """The array with these numbers (k,) too, as cryochains/X, which cryoSPARC does not read."""
    fields = {
        f"{COLUMN_PREFIX}/{name}": values.astype(np.float32) for name, values in columns.items()
    }
    return with_fields(array, fields)


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a .cs file whole or not at all."""
    with atomic_path(path) as part:
        _write_npy(part, array)


def write_array_and_stack(
    path: Path,
    array: np.ndarray,
    chunks: Iterable[Tensor],
    *,
    n_images: int,
    box_size: int,
    pixel_size: float,
) -> None:
    """Write the .mrcs beside `path` and then the .cs at `path`, both whole or neither."""
    with stack_beside(
        path, chunks, n_images=n_images, box_size=box_size, pixel_size=pixel_size
    ) as part:
        _write_npy(part, array)


def _write_npy(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        npy.write_array(file, array, allow_pickle=False)
