"""RELION's tables of particles (.star), converted to this library's conventions and back.

RELION → here: Euler matrix A(rot, tilt, psi) → R, the rotation of Eq. 3; rlnOriginX/YAngst → −t,
the shift; degrees → radians. Every cell of a table stays the text it was, so that columns unknown
to this package go back to RELION unchanged. Columns as in RELION 3.1
(``relion_refine --print_metadata_labels``).
"""

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
from .opening import (
    COLUMN_PREFIX,
    ImageNames,
    Known,
    argument_hint,
    make_ctf,
    present_stacks,
    unless_neutral,
    warn_of_ignored,
)
from .stacks import Images, stack_beside
from .star import parse_numbers, read_star

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
# More of the CTF: column → field of the CTF, and the value that changes nothing.
_MORE_CTF_COLUMNS = {"rlnCtfBfactor": ("b_factor", 0.0), "rlnCtfScalefactor": ("scale", 1.0)}
# Columns of an optics group, with values for images without CTF: RELION refuses a file without
# voltage and spherical aberration, even where no CTF is used.
_OPTICS_DEFAULTS = {"rlnVoltage": 300.0, "rlnSphericalAberration": 2.7, "rlnAmplitudeContrast": 0.1}
# RELION's magnification matrix, row by row.
_MAGNIFICATION_COLUMNS = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
# Columns that fresh ones replace: the CTF, and what RELION 3.0 and before wrote in pixels.
_REPLACED_COLUMNS = (
    "rlnOriginX",
    "rlnOriginY",
    "rlnPixelSize",
    "rlnDetectorPixelSize",
    "rlnMagnification",
    "rlnImagePixelSize",
    "rlnImageSize",
    *_MORE_CTF_COLUMNS,
    *_CTF_COLUMNS,
    *_MAGNIFICATION_COLUMNS,
)
# Columns that tables of subtomograms have and those of particles do not.
_SUBTOMOGRAM_COLUMNS = ("rlnTomoParticleName", "rlnTomoVisibleFrames", "rlnTomoParticleId")
# Rows whose rotations are computed at a time.
_PIECE_ROWS = 1 << 14
# Numbers of images have leading zeros, and no more digits than this.
_MAX_DIGITS = 12
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

    def __len__(self) -> int:
        return len(self.particles)

    @property
    def particles(self) -> pd.DataFrame:
        return self.blocks[self.name]

    def text(self, column: str) -> pd.Series | None:
        """(n,) text of `column` of every particle: its own, or that of its optics group.

        None when neither has the column.
        """
        cells, codes = self._cells(column)
        if cells is None or codes is None:
            return cells
        return cells.iloc[codes].reset_index(drop=True)

    def _cells(self, column: str) -> tuple[pd.Series | None, np.ndarray | None]:
        """Cells of `column`, and which of them each particle has where they belong to groups."""
        if column in self.particles:
            return self.particles[column], None
        if not self._has_by_group(column):
            return None, None
        optics = self.blocks["optics"]
        codes, groups = pd.factorize(self.particles["rlnOpticsGroup"])
        cells = optics.set_index("rlnOpticsGroup")[column]
        unknown = sorted(set(groups) - set(cells.index))
        if unknown:
            row = np.flatnonzero(np.isin(groups[codes], unknown))[0]
            raise ValueError(
                f"expected optics group {groups[codes[row]]} of row {row + 1} in data_optics of "
                f"{self.path}, got no such group; try the .star file that RELION wrote"
            )
        return cells.loc[list(groups)], codes

    def numbers(self, column: str, default: float | None = None) -> np.ndarray:
        """(n,) float64 values of `column` of every particle.

        Raises
        ------
        ValueError
            When a cell is not a number, or the column is missing and there is no `default`.
        """
        cells, codes = self._cells(column)
        if cells is None:
            if default is None:
                raise self._missing([column])
            return np.full(len(self), default)
        # Of a group's value, which may be a million particles', one is read.
        values = parse_numbers(cells)
        values = values if codes is None else values[codes]
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            cell = cells.iloc[bad[0] if codes is None else codes[bad[0]]]
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
        fields = [_CTF_COLUMNS[column][0] for column in columns if column in _CTF_COLUMNS]
        return ValueError(
            f"expected columns {', '.join(columns)} in {self.path}, got "
            f"{', '.join(self.particles)}; try the star file of a 3-D refinement"
            f"{argument_hint(fields)}"
        )

    @property
    def pixel_column(self) -> str:
        return "rlnImagePixelSize"

    @property
    def sign(self) -> float:
        """RELION's images are protein-bright, whatever the table says."""
        return 1.0

    @property
    def ids(self) -> list[str]:
        return self.particles["rlnImageName"].tolist()

    def pixel_sizes(self) -> np.ndarray | None:
        """(n,) Å, or None where the table does not say."""
        # The first is of RELION 3.1 and later, the others are of RELION 3.0 and before.
        for column in ("rlnImagePixelSize", "rlnPixelSize"):
            if self.has(column):
                return self.numbers(column)
        if self.has("rlnDetectorPixelSize") and self.has("rlnMagnification"):
            micrometres = self.numbers("rlnDetectorPixelSize")
            magnification = self.numbers("rlnMagnification")
            self._require_nonzero("rlnMagnification", magnification)
            return 1e4 * micrometres / magnification
        return None

    def _require_nonzero(self, column: str, values: np.ndarray) -> None:
        bad = np.flatnonzero(values == 0)
        if len(bad):
            raise ValueError(
                f"expected {column} above 0 in {self.path}, got 0 in row {bad[0] + 1}; "
                "try pixel_size="
            )

    def box_sizes(self) -> np.ndarray | None:
        """(n,) px of the images, as the optics group has it; None where it has not."""
        if not self.has("rlnImageSize"):
            return None
        sizes = self.numbers("rlnImageSize")
        self._require_nonzero("rlnImageSize", sizes)
        return sizes

    def groups(self) -> np.ndarray | None:
        """(n,) text: the optics group of each particle."""
        if "rlnOpticsGroup" not in self.particles:
            return None
        return self.particles["rlnOpticsGroup"].to_numpy(dtype=object)

    def magnifications(self) -> np.ndarray | None:
        """(n, 2, 2) matrices, or None: projection and CTF of RELION are those at M k."""
        if not all(self.has(column) for column in _MAGNIFICATION_COLUMNS):
            return None
        cells = [self.numbers(column) for column in _MAGNIFICATION_COLUMNS]
        matrices = np.stack(cells, axis=1).reshape(-1, 2, 2)
        # pyem's csparc2star.py copies cryoSPARC's numbers, which lack the unit matrix.
        lacks_unit = np.abs(matrices).max(axis=(1, 2), keepdims=True) < 0.5
        return np.where(lacks_unit, matrices + np.eye(2), matrices)

    def columns(self, rows: np.ndarray) -> pd.DataFrame:
        """The numbers of the table, of these rows."""
        table = self.particles
        # Columns of names are left out by their first row alone: there may be a million rows.
        numeric = pd.to_numeric(table.iloc[0], errors="coerce").notna()
        chosen = table.loc[:, numeric].iloc[rows].apply(pd.to_numeric, errors="coerce")
        return chosen.dropna(axis=1).reset_index(drop=True)

    def poses(self, pixel_sizes: np.ndarray) -> tuple[Tensor, Tensor]:
        """(n, 3, 3) rotations and (n, 2) shifts in Å, both float32; `pixel_sizes` (n,) in Å."""
        self.require(_EULER_COLUMNS)
        angles = np.stack([self.numbers(column) for column in _EULER_COLUMNS], axis=1)
        origins = [self._origin(axis, pixel_sizes) for axis in "XY"]
        # RELION moves an image by its origin to centre the particle, which is displaced by minus
        # that.
        shifts = -np.stack(origins, axis=1)
        # In pieces: what is in between takes ten times the memory of the rotations.
        pieces = torch.from_numpy(angles).split(_PIECE_ROWS)
        rotations = torch.cat([euler_to_rotation(piece).float() for piece in pieces])
        return rotations, torch.from_numpy(shifts).float()

    def _origin(self, axis: str, pixel_sizes: np.ndarray) -> np.ndarray:
        """(n,) RELION's origin along X or Y, in Å; 0 where the table has none."""
        in_angstrom = f"rlnOrigin{axis}Angst"
        if self.has(in_angstrom):
            return self.numbers(in_angstrom)
        # RELION 3.0 and before.
        return self.numbers(f"rlnOrigin{axis}", default=0.0) * pixel_sizes

    def ctf(self, known: Known) -> CTF | None:
        """The CTF of every particle, or None when the table has no defocus."""
        if not self.has("rlnDefocusU"):
            return None
        for column in _ALTERED_COLUMNS:
            if self.numbers(column, default=0.0).any():
                raise ValueError(
                    f"expected images as the microscope gave them, got {column} in {self.path}; "
                    "try extracting the particles without it"
                )
        given = {column: known.ctf_value(field) for column, (field, _) in _CTF_COLUMNS.items()}
        needed = [column for column, value in given.items() if value is None]
        self.require(column for column in needed if column != "rlnPhaseShift")
        values: dict[str, np.ndarray] = {}
        for column, (field, unit) in _CTF_COLUMNS.items():
            value = given[column]
            if value is None:
                values[field] = self.numbers(column, default=0.0) * unit
            else:
                values[field] = np.full(len(self), value)
        more = self._more_of_the_ctf()
        warn_of_ignored(self.path, self._ignored())
        return make_ctf(self, values | more)

    def _more_of_the_ctf(self) -> dict[str, np.ndarray]:
        """What few tables have, by the names of the CTF's fields; without what changes nothing."""
        more: dict[str, np.ndarray | None] = {}
        for column, (field, neutral) in _MORE_CTF_COLUMNS.items():
            if self.has(column):
                more[field] = unless_neutral(self.numbers(column), neutral)
        if self.has("rlnEvenZernike"):
            more["even_zernikes"] = unless_neutral(self._lists("rlnEvenZernike"), 0.0)
        return {field: values for field, values in more.items() if values is not None}

    def _lists(self, column: str) -> np.ndarray:
        """(n, m) numbers of a column whose cells are lists, such as [0.1,-2]; short ones end in 0.

        Few lists are different: they belong to optics groups.
        """
        text = self.text(column)
        codes, cells = pd.factorize(text)
        lists = [
            parse_numbers(pd.Series(str(cell).strip("[]").split(","), dtype=str)) for cell in cells
        ]
        bad = [cell for cell, numbers in zip(cells, lists, strict=True) if np.isnan(numbers).any()]
        if bad or (codes < 0).any():
            raise ValueError(
                f"expected lists of numbers in {column} of {self.path}, got "
                f"{bad[0] if bad else 'nothing'!r}; try the file that RELION wrote"
            )
        table = np.zeros((len(lists), max(map(len, lists))))
        for row, numbers in enumerate(lists):
            table[row, : len(numbers)] = numbers
        return table[codes]

    def _ignored(self) -> list[str]:
        """What the table says of the microscope and is not used."""
        ignored = [
            column
            for column in ("rlnBeamTiltX", "rlnBeamTiltY")
            if self.has(column) and self.numbers(column).any()
        ]
        if self.has("rlnOddZernike") and self._lists("rlnOddZernike").any():
            ignored.append("rlnOddZernike")
        return ignored

    def names(self) -> ImageNames:
        """Which image of which file each particle is."""
        numbers = np.empty(len(self), dtype=np.int64)
        files = []
        for row, name in enumerate(self.ids):
            number, at, file = name.partition("@")
            # Without a number, the file has one image.
            number, file = (number, file) if at and number.isdecimal() else ("1", name)
            if not file or len(number) > _MAX_DIGITS:
                raise ValueError(
                    f"expected names of images such as 000001@a.mrcs in {self.path}, got {name!r} "
                    f"in row {row + 1}; try the file that RELION wrote"
                )
            numbers[row] = int(number)
            files.append(file)
        file_index, unique = pd.factorize(np.array(files, dtype=object))
        return ImageNames(list(unique), file_index, numbers - 1)

    def select(self, rows: np.ndarray, names: list[str]) -> dict:
        """Blocks to write: these rows in this order, under new names of their images."""
        return {**self.blocks, self.name: self._renamed(rows, names)}

    def _renamed(self, rows: np.ndarray, names: list[str]) -> pd.DataFrame:
        particles = self.particles.iloc[rows].reset_index(drop=True)
        renamed = particles["rlnImageName"].tolist() != names
        if renamed and "rlnImageOriginalName" not in particles:
            particles["rlnImageOriginalName"] = particles["rlnImageName"]
        particles["rlnImageName"] = names
        return particles

    def select_with_poses(
        self,
        rows: np.ndarray,
        names: list[str],
        poses: tuple[Tensor, Tensor] | None,
        geometry: tuple[int, float] | None,
        undistorted: bool,
    ) -> dict:
        """Blocks as of `select` of a table with optics groups, all of whose columns are kept.

        Parameters
        ----------
        rows : (k,) array
        names : list of str
        poses : tuple, optional
            (k, 3, 3) rotations and (k, 2) shifts in Å that replace those of the file.
        geometry : tuple, optional
            Box in px and pixel size in Å that replace those of all optics groups.
        undistorted : bool
            Whether the images are no longer those of a magnification matrix.
        """
        particles = self._renamed(rows, names)
        optics = self.blocks["optics"].copy()
        if poses is not None:
            particles = particles.drop(columns=["rlnOriginX", "rlnOriginY"], errors="ignore")
            particles = particles.assign(**_pose_columns(*poses))
        if geometry is not None:
            cells = {"rlnImagePixelSize": f"{geometry[1]:.9g}", "rlnImageSize": str(geometry[0])}
            particles = particles.drop(columns=list(cells), errors="ignore")
            optics = optics.assign(**cells)
        if undistorted:
            particles = particles.drop(columns=list(_MAGNIFICATION_COLUMNS), errors="ignore")
            optics = optics.drop(columns=list(_MAGNIFICATION_COLUMNS), errors="ignore")
        return {**self.blocks, "optics": optics, self.name: particles}

    def select_with(self, rows: np.ndarray, names: list[str], fresh: dict) -> dict:
        """Blocks as of `select`, with the columns of `fresh` in place of those of the file.

        `fresh` are blocks as of `new_blocks`.
        """
        others = {
            name: block for name, block in self.blocks.items() if name not in ("optics", self.name)
        }
        kept = self._renamed(rows, names).drop(columns=list(_REPLACED_COLUMNS), errors="ignore")
        return {**others, **fresh, "particles": kept.assign(**fresh["particles"])}

    @property
    def has_optics(self) -> bool:
        """Whether every particle has an optics group: RELION 3.1 and later."""
        return "optics" in self.blocks and "rlnOpticsGroup" in self.particles


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
    blocks = read_star(path)
    if isinstance(blocks.get("optics"), dict):
        blocks["optics"] = pd.DataFrame([blocks["optics"]])
    _check_optics(path, blocks.get("optics"))
    tables = [
        name
        for name, block in blocks.items()
        if isinstance(block, pd.DataFrame) and "rlnImageName" in block
    ]
    for name in tables:
        if len(blocks[name]):
            table = ParticleTable(path, blocks, name)
            _refuse_subtomograms(table)
            return table
    got = f"data_{tables[0]} without a row" if tables else "none"
    raise ValueError(
        f"expected a table of particles with rlnImageName, got {got} in {path}; try a "
        "particles.star"
    )


def _check_optics(path: Path, optics: pd.DataFrame | None) -> None:
    if optics is None or "rlnOpticsGroup" not in optics:
        return
    twice = optics["rlnOpticsGroup"][optics["rlnOpticsGroup"].duplicated()]
    if len(twice):
        raise ValueError(
            f"expected each optics group once in data_optics of {path}, got {twice.iloc[0]} again; "
            "try the .star file that RELION wrote"
        )


def _refuse_subtomograms(table: ParticleTable) -> None:
    """Raise ValueError for tables of subtomograms, as volumes or as stacks of tilt images."""
    seen = [column for column in _SUBTOMOGRAM_COLUMNS if table.has(column)]
    if table.has("rlnImageDimensionality"):
        dimensions = table.numbers("rlnImageDimensionality")
        seen += ["rlnImageDimensionality 3"] if (dimensions == 3).any() else []
    if seen:
        raise ValueError(
            f"expected images of single particles, got a table of subtomograms ({seen[0]}) in "
            f"{table.path}; try the particles of a single-particle project"
        )


def new_blocks(
    names: list[str],
    *,
    rotations: Tensor,
    shifts: Tensor,
    pixel_size: float,
    box_size: int,
    ctf: CTF | None,
    magnifications: np.ndarray | None = None,
) -> dict[str, pd.DataFrame]:
    """Blocks of a RELION 3.1 file for particles that came from no file.

    Shifts are those on images as they are in their files, with these (n, 2, 2) magnifications.
    """
    particles: dict[str, list[str]] = {"rlnImageName": names}
    particles |= _pose_columns(rotations, shifts)
    optics = np.tile(list(_OPTICS_DEFAULTS.values()), (len(names), 1))
    aberrations: dict[str, np.ndarray] = {}
    if magnifications is not None:
        cells = magnifications.reshape(len(names), 4, 1)
        aberrations |= {
            column: cells[:, number] for number, column in enumerate(_MAGNIFICATION_COLUMNS)
        }
    if ctf is not None:
        values = {
            column: np.asarray(getattr(ctf, field)) / unit
            for column, (field, unit) in _CTF_COLUMNS.items()
        }
        optics = np.stack([values.pop(column) for column in _OPTICS_DEFAULTS], axis=1)
        for column, (field, _) in _MORE_CTF_COLUMNS.items():
            if getattr(ctf, field) is not None:
                values[column] = np.asarray(getattr(ctf, field))
        particles |= {column: _six_decimals(numbers) for column, numbers in values.items()}
        if ctf.even_zernikes is not None:
            aberrations["rlnEvenZernike"] = np.asarray(ctf.even_zernikes)
    groups, particles["rlnOpticsGroup"] = _optics_groups(optics, aberrations)
    groups["rlnImagePixelSize"] = f"{pixel_size:.9g}"
    groups["rlnImageSize"] = str(box_size)
    groups["rlnImageDimensionality"] = "2"
    return {"optics": groups, "particles": pd.DataFrame(particles)}


def _pose_columns(rotations: Tensor, shifts: Tensor) -> dict[str, list[str]]:
    """RELION's angles in degrees and origins in Å."""
    columns: dict[str, list[str]] = {}
    angles = rotation_to_euler(rotations)
    for number, column in enumerate(_EULER_COLUMNS):
        columns[column] = _six_decimals(angles[:, number])
    for number, axis in enumerate("XY"):
        # Adding 0 turns −0 into 0.
        columns[f"rlnOrigin{axis}Angst"] = _six_decimals(-shifts[:, number] + 0.0)
    return columns


def _optics_groups(
    optics: np.ndarray, aberrations: dict[str, np.ndarray]
) -> tuple[pd.DataFrame, list[str]]:
    """One optics group for each distinct row of `optics`, and the group of each of its n rows."""
    everything = np.concatenate([optics, *aberrations.values()], axis=1)
    _, first, group_index = np.unique(everything, axis=0, return_index=True, return_inverse=True)
    numbers = [str(number) for number in range(1, len(first) + 1)]
    table: dict[str, list[str]] = {
        "rlnOpticsGroup": numbers,
        "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers],
    }
    for column, values in zip(_OPTICS_DEFAULTS, optics[first].T, strict=True):
        table[column] = [f"{value:g}" for value in values]
    for column, cells in aberrations.items():
        if cells.shape[1] == 1:
            table[column] = [f"{value:.9g}" for value in cells[first, 0]]
        else:
            lists = [",".join(f"{value:.9g}" for value in row) for row in cells[first]]
            table[column] = [f"[{text}]" for text in lists]
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
    with stack_beside(
        star, chunks, n_images=n_images, box_size=box_size, pixel_size=pixel_size
    ) as star_part:
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
    names = [name or os.path.abspath(path) for name, path in present_stacks(star, images)]
    pairs = zip(images.stack_index, images.slice_index, strict=True)
    return [f"{number + 1:06d}@{names[stack]}" for stack, number in pairs]


def with_columns(blocks: dict, columns: dict[str, np.ndarray]) -> dict:
    """Blocks whose table of particles has these columns of numbers too, or in place of its own.

    Named cryochainsX: RELION keeps columns that it does not know, and reads nothing from them.
    """
    cells = {
        f"{COLUMN_PREFIX}{name}": [f"{value:.9g}" for value in values.tolist()]
        for name, values in columns.items()
    }
    return {
        name: block.assign(**cells)
        if isinstance(block, pd.DataFrame) and "rlnImageName" in block
        else block
        for name, block in blocks.items()
    }
