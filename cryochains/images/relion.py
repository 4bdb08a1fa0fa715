"""RELION's tables of particles (.star), converted to this library's conventions and back.

RELION → here: Euler matrix A(rot, tilt, psi) → R, the rotation of Eq. 3; rlnOriginX/YAngst → −t,
the shift; degrees → radians. Every cell of a table stays the text it was, so that columns unknown
to this package go back to RELION unchanged. Columns as in RELION 3.1
(``relion_refine --print_metadata_labels``).
"""

import linecache
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import starfile
import torch
from torch import Tensor

from .._files import atomic_path
from .ctf import CTF
from .stacks import Images, StackFile, write_stack

_EULER_COLUMNS = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
# Column → field of the CTF, and what one unit of RELION is here.
_CTF_COLUMNS = {
    "rlnDefocusU": ("defocus_u", 1.0),
    "rlnDefocusV": ("defocus_v", 1.0),
    "rlnDefocusAngle": ("defocus_angle", np.pi / 180),
    "rlnPhaseShift": ("phase_shift", np.pi / 180),
    "rlnVoltage": ("voltage_kv", 1.0),
    "rlnSphericalAberration": ("spherical_aberration_mm", 1.0),
    "rlnAmplitudeContrast": ("amplitude_contrast", 1.0),
}
# Columns of an optics group, with values for images without CTF: RELION refuses a file without
# voltage and spherical aberration, even where no CTF is used.
_OPTICS_DEFAULTS = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
# Columns that fresh ones replace: the CTF, and what RELION 3.0 and before wrote in pixels.
_REPLACED_COLUMNS = (
    "rlnOriginX",
    "rlnOriginY",
    "rlnPixelSize",
    "rlnDetectorPixelSize",
    "rlnMagnification",
    *_CTF_COLUMNS,
)
# Where one of these is not 0, the images were changed and no longer show the CTF of the table.
_ALTERED_COLUMNS = ("rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped")
# At a smaller sine of tilt, rot and psi turn about the same axis to the precision of float32.
_MIN_SIN_TILT = 1e-7


def euler_to_rotation(angles: Tensor) -> Tensor:
    """(…, 3, 3) rotation from the reference to the image, x' = R x, of RELION's angles.

    Parameters
    ----------
    angles : (…, 3) tensor
        rot, tilt, psi in degrees.

    Notes
    -----
    RELION's ``Euler_angles2matrix``: the inverse of the intrinsic turns Z(rot) Y(tilt) Z(psi).

    Examples
    --------
    >>> euler_to_rotation(torch.tensor([0.0, 90.0, 0.0])).round().int().tolist()
    [[0, 0, -1], [0, 1, 0], [1, 0, 0]]
    """
    radians = torch.deg2rad(angles)
    sin_rot, sin_tilt, sin_psi = radians.sin().unbind(-1)
    cos_rot, cos_tilt, cos_psi = radians.cos().unbind(-1)
    rows = [
        [
            cos_psi * cos_tilt * cos_rot - sin_psi * sin_rot,
            cos_psi * cos_tilt * sin_rot + sin_psi * cos_rot,
            -cos_psi * sin_tilt,
        ],
        [
            -sin_psi * cos_tilt * cos_rot - cos_psi * sin_rot,
            -sin_psi * cos_tilt * sin_rot + cos_psi * cos_rot,
            sin_psi * sin_tilt,
        ],
        [sin_tilt * cos_rot, sin_tilt * sin_rot, cos_tilt],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def rotation_to_euler(rotations: Tensor) -> Tensor:
    """(…, 3) float64 rot, tilt (0 to 180) and psi in degrees of (…, 3, 3) `rotations`.

    Where tilt is 0 or 180 only the sum or difference of rot and psi matters, and psi is 0.

    Examples
    --------
    >>> angles = torch.tensor([10.0, 20.0, 30.0])
    >>> rotation_to_euler(euler_to_rotation(angles)).round(decimals=3).tolist()
    [10.0, 20.0, 30.0]
    """
    matrix = rotations.double()
    sin_tilt = torch.hypot(matrix[..., 0, 2], matrix[..., 1, 2])
    tilt = torch.atan2(sin_tilt, matrix[..., 2, 2])
    psi = torch.atan2(matrix[..., 1, 2], -matrix[..., 0, 2])
    psi = torch.where(sin_tilt > _MIN_SIN_TILT, psi, 0.0)
    # The second row of the matrix once psi is turned back, (−sin rot, cos rot, 0): of length 1
    # for every tilt, so rot is as precise near the poles as elsewhere.
    turned_back = (
        psi.sin().unsqueeze(-1) * matrix[..., 0, :] + psi.cos().unsqueeze(-1) * matrix[..., 1, :]
    )
    rot = torch.atan2(-turned_back[..., 0], turned_back[..., 1])
    return torch.rad2deg(torch.stack([rot, tilt, psi], dim=-1))


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """A .star file with every cell as text.

    Attributes
    ----------
    path : Path
    blocks : dict
        Data blocks by name: a DataFrame for a loop, a dictionary for a simple block.
    name : str
        The block that holds a row for each particle.
    """

    path: Path
    blocks: dict
    name: str

    @property
    def particles(self) -> pd.DataFrame:
        return self.blocks[self.name]

    def text(self, column: str) -> pd.Series | None:
        """(n,) text of `column` of every particle: its own, or that of its optics group.

        None when neither has the column.
        """
        if column in self.particles:
            return self.particles[column]
        if not self._has_by_group(column):
            return None
        optics = self.blocks["optics"]
        groups = self.particles["rlnOpticsGroup"]
        unknown = sorted(set(groups.astype(str)) - set(optics["rlnOpticsGroup"]))
        if unknown:
            raise ValueError(
                f"expected optics group {unknown[0]} in data_optics of {self.path}, got no such "
                "row; try the .star file that RELION wrote"
            )
        return groups.map(optics.set_index("rlnOpticsGroup")[column])

    def numbers(self, column: str, default: float | None = None) -> np.ndarray:
        """(n,) float64 values of `column` of every particle.

        Raises
        ------
        ValueError
            When a cell is not a number, or the column is missing and there is no `default`.
        """
        text = self.text(column)
        if text is None:
            if default is None:
                raise self._missing([column])
            return np.full(len(self.particles), default)
        values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            cell = text.iloc[bad[0]]
            raise ValueError(
                f"expected numbers in {column} of {self.path}, got {cell!r} in row "
                f"{bad[0] + 1}; try leaving that particle out"
            )
        return values

    def has(self, column: str) -> bool:
        """Whether the particles, or their optics groups, have this column."""
        return column in self.particles or self._has_by_group(column)

    def _has_by_group(self, column: str) -> bool:
        optics = self.blocks.get("optics")
        return optics is not None and column in optics and "rlnOpticsGroup" in self.particles

    def require(self, columns: Iterable[str]) -> None:
        """Raise ValueError that lists the columns which are missing."""
        missing = [column for column in columns if not self.has(column)]
        if missing:
            raise self._missing(missing)

    def _missing(self, columns: list[str]) -> ValueError:
        return ValueError(
            f"expected columns {', '.join(columns)} in {self.path}, got "
            f"{', '.join(self.particles)}; try the star file of a 3-D refinement"
        )

    def pixel_size(self) -> float:
        """Å a pixel, which all particles have to share."""
        sizes = self._pixel_sizes()
        if not (sizes.min() > 0 and np.allclose(sizes, sizes[0], rtol=1e-4)):
            raise ValueError(
                f"expected one pixel size for all particles of {self.path}, got {sizes.min():g} to "
                f"{sizes.max():g} Å; try rescaling them to one, or a star file for each"
            )
        return float(sizes[0])

    def _pixel_sizes(self) -> np.ndarray:
        # The first is of RELION 3.1 and later, the others are of RELION 3.0 and before.
        for column in ("rlnImagePixelSize", "rlnPixelSize"):
            if self.has(column):
                return self.numbers(column)
        if self.has("rlnDetectorPixelSize") and self.has("rlnMagnification"):
            micrometres = self.numbers("rlnDetectorPixelSize")
            return 1e4 * micrometres / self.numbers("rlnMagnification")
        raise self._missing(["rlnImagePixelSize"])

    def poses(self, pixel_size: float) -> tuple[Tensor, Tensor]:
        """(n, 3, 3) rotations and (n, 2) shifts in Å, both float32."""
        self.require(_EULER_COLUMNS)
        angles = np.stack([self.numbers(column) for column in _EULER_COLUMNS], axis=1)
        origins = [self._origin(axis, pixel_size) for axis in "XY"]
        # RELION moves an image by its origin to centre the particle, which is displaced by minus
        # that.
        shifts = -np.stack(origins, axis=1)
        rotations = euler_to_rotation(torch.from_numpy(angles))
        return rotations.float(), torch.from_numpy(shifts).float()

    def _origin(self, axis: str, pixel_size: float) -> np.ndarray:
        """(n,) RELION's origin along X or Y, in Å; 0 where the table has none."""
        in_angstrom = f"rlnOrigin{axis}Angst"
        if self.has(in_angstrom):
            return self.numbers(in_angstrom)
        # RELION 3.0 and before.
        return self.numbers(f"rlnOrigin{axis}", default=0.0) * pixel_size

    def ctf(self) -> CTF | None:
        """The CTF of every particle, or None when the table has no defocus."""
        if not self.has("rlnDefocusU"):
            return None
        for column in _ALTERED_COLUMNS:
            if self.numbers(column, default=0.0).any():
                raise ValueError(
                    f"expected images as the microscope gave them, got {column} in {self.path}; "
                    "try extracting the particles without it"
                )
        self.require(column for column in _CTF_COLUMNS if column != "rlnPhaseShift")
        fields = {}
        for column, (field, unit) in _CTF_COLUMNS.items():
            fields[field] = torch.from_numpy(self.numbers(column, default=0.0) * unit)
        return CTF(**fields)

    def images(self, sign: float = 1.0) -> Images:
        """The images of the particles, checked by the headers of their stacks alone."""
        parts = self.particles["rlnImageName"].str.extract(r"^(?:(\d+)@)?(.*)$")
        slice_index = parts[0].fillna("1").to_numpy().astype(np.int64) - 1
        stack_index, names = pd.factorize(parts[1])
        stacks = self._open_stacks(list(names))
        lengths = np.array([stack.n_images for stack in stacks])[stack_index]
        # Fewer rows than images is a selection, which RELION writes all the time; more rows is a
        # mistake.
        bad = np.flatnonzero((slice_index < 0) | (slice_index >= lengths))
        if len(bad):
            row = bad[0]
            stack = stacks[stack_index[row]]
            raise ValueError(
                f"expected {self.path} to name the {stack.n_images} images of {stack.path}, got "
                f"row {row + 1} with image {slice_index[row] + 1}; try the star file of that stack"
            )
        return Images(stacks, stack_index, slice_index, sign)

    def _open_stacks(self, names: list[str]) -> tuple[StackFile, ...]:
        paths = [_find_stack(name, self.path) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if missing:
            listed = ", ".join(missing[:3])
            if len(missing) > 3:
                listed += f" and {len(missing) - 3} more"
            raise FileNotFoundError(
                f"expected the images of {self.path} in its folder or one above, got no {listed}; "
                "try moving the star file into its project"
            )
        stacks = tuple(
            StackFile.open(path, name)
            for path, name in zip(paths, names, strict=True)
            if path is not None
        )
        box_sizes = sorted({stack.box_size for stack in stacks})
        if len(box_sizes) > 1:
            raise ValueError(
                f"expected one box size in the stacks of {self.path}, got {box_sizes} px; "
                "try rescaling"
            )
        return stacks

    def select(self, rows: np.ndarray, names: list[str], fresh: dict | None = None) -> dict:
        """Blocks to write: these rows in this order, under new names of their images.

        The columns of `fresh`, blocks as of `new_blocks`, replace those of the file.
        """
        particles = self.particles.iloc[rows].reset_index(drop=True)
        renamed = particles["rlnImageName"].tolist() != names
        if renamed and "rlnImageOriginalName" not in particles:
            particles["rlnImageOriginalName"] = particles["rlnImageName"]
        particles["rlnImageName"] = names
        if fresh is None:
            return {**self.blocks, self.name: particles}
        others = {
            name: block for name, block in self.blocks.items() if name not in ("optics", self.name)
        }
        kept = particles.drop(columns=list(_REPLACED_COLUMNS), errors="ignore")
        return {**others, **fresh, "particles": kept.assign(**fresh["particles"])}


def _find_stack(name: str, star: Path) -> Path | None:
    """The file called `name` in the folder of `star` or in one above it.

    RELION's names are relative to the folder of the project, in which the .star files lie deeper.
    """
    folder = Path(os.path.abspath(star)).parent
    for base in (folder, *folder.parents):
        if (base / name).is_file():
            return base / name
    return None


def read_table(path: str | os.PathLike) -> ParticleTable:
    """Read a .star file of RELION 3.1 (data_optics and data_particles) or before (one table).

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no file, or it is not a table of particles.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a RELION .star file, got {path}, which is not there; try another path"
        )
    try:
        blocks = starfile.read(path, always_dict=True, parse_as_string=_column_names(path))
    except Exception as error:  # whatever the parts of the reader raise
        # starfile reads through this cache, and would see the broken file again once mended.
        linecache.clearcache()
        reason = str(error).strip()
        raise ValueError(
            f"expected a RELION .star file, got {path} ({reason}); try exporting it again"
        ) from error
    if isinstance(blocks.get("optics"), dict):
        blocks["optics"] = pd.DataFrame([blocks["optics"]])
    for name, block in blocks.items():
        if isinstance(block, pd.DataFrame) and "rlnImageName" in block and len(block):
            return ParticleTable(path, blocks, name)
    raise ValueError(
        f"expected a table of particles with rlnImageName, got none in {path}; try a particles.star"
    )


def _column_names(path: Path) -> list[str]:
    """The columns of all blocks of a .star file, without the underscore they begin with."""
    names: dict[str, None] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            stripped = line.lstrip()
            if stripped.startswith("_"):
                names[stripped.split(maxsplit=1)[0][1:]] = None
    return list(names)


def new_blocks(
    names: list[str],
    *,
    rotations: Tensor,
    shifts: Tensor,
    pixel_size: float,
    box_size: int,
    ctf: CTF | None,
) -> dict[str, pd.DataFrame]:
    """Blocks of a RELION 3.1 file for particles that came from no file."""
    particles: dict[str, list[str]] = {"rlnImageName": names}
    angles = rotation_to_euler(rotations)
    for number, column in enumerate(_EULER_COLUMNS):
        particles[column] = _six_decimals(angles[:, number])
    for number, axis in enumerate("XY"):
        # Adding 0 turns −0 into 0.
        particles[f"rlnOrigin{axis}Angst"] = _six_decimals(-shifts[:, number] + 0.0)
    optics = np.tile(list(_OPTICS_DEFAULTS.values()), (len(names), 1))
    if ctf is not None:
        values = {
            column: np.asarray(getattr(ctf, field)) / unit
            for column, (field, unit) in _CTF_COLUMNS.items()
        }
        optics = np.stack([values.pop(column) for column in _OPTICS_DEFAULTS], axis=1)
        particles |= {column: _six_decimals(cells) for column, cells in values.items()}
    groups, particles["rlnOpticsGroup"] = _optics_groups(optics)
    groups["rlnImagePixelSize"] = f"{pixel_size:.9g}"
    groups["rlnImageSize"] = str(box_size)
    groups["rlnImageDimensionality"] = "2"
    return {"optics": groups, "particles": pd.DataFrame(particles)}


def _optics_groups(optics: np.ndarray) -> tuple[pd.DataFrame, list[str]]:
    """One optics group for each distinct row of `optics`, and the group of each of its n rows."""
    rows, group_index = np.unique(optics, axis=0, return_inverse=True)
    numbers = [str(number) for number in range(1, len(rows) + 1)]
    table = {
        "rlnOpticsGroup": numbers,
        "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers],
    }
    for column, values in zip(_OPTICS_DEFAULTS, rows.T, strict=True):
        table[column] = [f"{value:g}" for value in values]
    return pd.DataFrame(table), [numbers[index] for index in group_index.ravel()]


def _six_decimals(values: Tensor | np.ndarray) -> list[str]:
    return [f"{value:.6f}" for value in np.asarray(values, dtype=np.float64).tolist()]


def write_particles(
    path: str | os.PathLike,
    chunks: Iterable[Tensor],
    *,
    rotations: Tensor,
    shifts: Tensor,
    pixel_size: float,
    box_size: int,
    ctf: CTF | None,
) -> None:
    """Write new particles as a RELION 3.1 .star file and the .mrcs beside it, whole or neither.

    Parameters
    ----------
    path : path
        Ends in .star.
    chunks : iterable of (k, box, box) tensors
        The images in order, n in all; only one chunk is held at a time.
    rotations : (n, 3, 3) tensor
        From the reference to the image: x' = R x.
    shifts : (n, 2) tensor
        (x, y) displacement of the projected molecule on the image, Å.
    pixel_size : float
        Å.
    box_size : int
        Pixels a side.
    ctf : CTF or None
        Of n particles; None for images that show the projection itself.

    Raises
    ------
    ValueError
        When numbers of particles differ, or the files cannot be written.

    Examples
    --------
    >>> chunks = (torch.zeros(2, 16, 16) for _ in range(3))
    >>> poses = {"rotations": torch.eye(3).expand(6, 3, 3), "shifts": torch.zeros(6, 2)}
    >>> path = "results/doc/six.star"
    >>> write_particles(path, chunks, **poses, pixel_size=2.0, box_size=16, ctf=None)
    """
    star = check_star_path(path)
    n = len(rotations)
    n_ctfs = n if ctf is None else len(ctf)
    if n < 1 or len(shifts) != n or n_ctfs != n:
        raise ValueError(
            "expected a rotation, a shift and a CTF for each of one particle or more, got "
            f"{n} rotations, {len(shifts)} shifts and {n_ctfs} CTFs; "
            "try the same selection of all three"
        )
    blocks = new_blocks(
        image_names(star.with_suffix(".mrcs").name, n),
        rotations=rotations,
        shifts=shifts,
        pixel_size=pixel_size,
        box_size=box_size,
        ctf=ctf,
    )
    write_table_and_stack(
        star, blocks, chunks, n_images=n, box_size=box_size, pixel_size=pixel_size
    )


def write_table(star: Path, blocks: dict) -> None:
    """Write a .star file whole or not at all."""
    with atomic_path(star) as part:
        starfile.write(blocks, part, na_rep="nan")


def write_table_and_stack(
    star: Path,
    blocks: dict,
    chunks: Iterable[Tensor],
    *,
    n_images: int,
    box_size: int,
    pixel_size: float,
) -> None:
    """Write the .mrcs beside `star` and then `star`, both whole or neither."""
    # On success the inner one is moved to its name first: a new table is never beside old images.
    with atomic_path(star) as star_part, atomic_path(star.with_suffix(".mrcs")) as stack_part:
        write_stack(stack_part, chunks, n_images=n_images, box_size=box_size, pixel_size=pixel_size)
        starfile.write(blocks, star_part, na_rep="nan")


def image_names(stack: str, n: int) -> list[str]:
    """RELION's names of the first n images of a stack."""
    return [f"{number:06d}@{stack}" for number in range(1, n + 1)]


def check_star_path(path: str | os.PathLike) -> Path:
    """`path`, when it ends in .star."""
    path = Path(path)
    if path.suffix != ".star":
        raise ValueError(
            f"expected a path that ends in .star, got {path}; try {path.with_suffix('.star')}"
        )
    return path


def present_names(star: Path, images: Images) -> list[str]:
    """Names by which the table `star` finds its images where they are.

    A name from the file is kept where it leads to the same images.
    """
    names = []
    for stack in images.stacks:
        if not isinstance(stack, StackFile):
            raise ValueError(
                "expected images in files to write a .star alone, got images in memory; "
                "try images=True"
            )
        nearby = _find_stack(stack.name, star)
        same = nearby is not None and nearby.samefile(stack.path)
        names.append(stack.name if same else os.path.abspath(stack.path))
    pairs = zip(images.stack_index, images.slice_index, strict=True)
    return [f"{number + 1:06d}@{names[stack]}" for stack, number in pairs]
