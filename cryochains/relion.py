"""RELION's tables of particles (.star), converted at the door.

RELION → here: Euler matrix A(rot, tilt, psi) → R, the rotation of Eq. 3; rlnOriginX/YAngst → −t, the shift;
degrees → radians. Every cell of a table stays the text it was, so that what this package does not know goes
back to RELION unharmed. Columns as in RELION 3.1 (``relion_refine --print_metadata_labels``).
"""

import linecache
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import roma
import starfile
import torch
from torch import Tensor

from .files import atomic_path
from .imaging import CTF
from .stacks import Images, StackFile, write_stack

EULER = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
# Column → field of the CTF, and what one unit of RELION is here.
CTF_COLUMNS = {
    "rlnDefocusU": ("defocus_u", 1.0),
    "rlnDefocusV": ("defocus_v", 1.0),
    "rlnDefocusAngle": ("defocus_angle", np.pi / 180),
    "rlnPhaseShift": ("phase_shift", np.pi / 180),
    "rlnVoltage": ("voltage_kv", 1.0),
    "rlnSphericalAberration": ("spherical_aberration_mm", 1.0),
    "rlnAmplitudeContrast": ("amplitude_contrast", 1.0),
}
OPTICS = ("rlnVoltage", "rlnSphericalAberration", "rlnAmplitudeContrast")
# What fresh columns say otherwise: the CTF, and what RELION 3.0 and before wrote in pixels.
REPLACED = ["rlnOriginX", "rlnOriginY", "rlnPixelSize", "rlnDetectorPixelSize", "rlnMagnification", *CTF_COLUMNS]
# With these the images are not what the microscope gave, and the CTF is not what the table says.
ALTERED = ("rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped")


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
    return roma.euler_to_rotmat("ZYZ", angles, degrees=True).mT


def rotation_to_euler(rotations: Tensor) -> Tensor:
    """(…, 3) float64 rot, tilt (0 to 180) and psi in degrees of (…, 3, 3) `rotations`.

    Examples
    --------
    >>> rotation_to_euler(euler_to_rotation(torch.tensor([10.0, 20.0, 30.0]))).round(decimals=3).tolist()
    [10.0, 20.0, 30.0]
    """
    return roma.rotmat_to_euler("ZYZ", rotations.double().mT, degrees=True)


@dataclass(frozen=True, eq=False)
class ParticleTable:
    """A .star file: its data blocks with every cell as text; block `name` holds a row for each particle."""

    path: Path
    blocks: dict
    name: str

    @property
    def particles(self) -> pd.DataFrame:
        return self.blocks[self.name]

    def text(self, column: str) -> pd.Series | None:
        """(n,) text of `column` of every particle, its own or its optics group's; None if neither has it."""
        if column in self.particles:
            return self.particles[column]
        optics = self.blocks.get("optics")
        if optics is None or column not in optics or "rlnOpticsGroup" not in self.particles:
            return None
        groups = self.particles["rlnOpticsGroup"]
        unknown = sorted(set(groups.astype(str)) - set(optics["rlnOpticsGroup"]))
        if unknown:
            raise ValueError(f"expected optics group {unknown[0]} in data_optics of {self.path}, got no such row")
        return groups.map(optics.set_index("rlnOpticsGroup")[column])

    def numbers(self, column: str, default=None) -> np.ndarray | None:
        """(n,) float64 values of `column` of every particle; `default` when the table has no such column."""
        text = self.text(column)
        if text is None:
            return default
        values = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
        bad = np.flatnonzero(~np.isfinite(values))
        if len(bad):
            cell, row = text.iloc[bad[0]], bad[0] + 1
            raise ValueError(f"expected numbers in {column} of {self.path}, got {cell!r} in row {row}")
        return values

    def require(self, columns: Iterable[str]) -> None:
        """Raise ValueError that lists the columns which are missing."""
        missing = [column for column in columns if self.text(column) is None]
        if missing:
            raise ValueError(
                f"expected columns {', '.join(missing)} in {self.path}, got {', '.join(self.particles)}; "
                "try the star file of a 3-D refinement"
            )

    def pixel_size(self) -> float:
        """Å a pixel, which all particles have to share."""
        # After the first, the ways of RELION 3.0 and before; the detector's pixel is in µm.
        sizes = self.numbers("rlnImagePixelSize", default=self.numbers("rlnPixelSize"))
        if sizes is None:
            detector, magnification = self.numbers("rlnDetectorPixelSize"), self.numbers("rlnMagnification")
            if detector is None or magnification is None:
                self.require(["rlnImagePixelSize"])
            sizes = 1e4 * detector / magnification
        if not (sizes.min() > 0 and np.allclose(sizes, sizes[0], rtol=1e-4)):
            raise ValueError(
                f"expected one pixel size for all particles of {self.path}, got {sizes.min():g} to "
                f"{sizes.max():g} Å; try rescaling them to one, or a star file for each"
            )
        return float(sizes[0])

    def poses(self, pixel_size: float) -> tuple[Tensor, Tensor]:
        """(n, 3, 3) rotations and (n, 2) shifts in Å, both float32."""
        self.require(EULER)
        angles = torch.from_numpy(np.stack([self.numbers(column) for column in EULER], axis=1))
        shifts = np.zeros((len(angles), 2))
        for axis, name in enumerate(("rlnOriginX", "rlnOriginY")):
            pixels = self.numbers(name, default=0.0)  # RELION 3.0 and before
            # RELION moves an image by its origin to centre the particle, which is displaced by minus that.
            shifts[:, axis] = -self.numbers(f"{name}Angst", default=pixels * pixel_size)
        return euler_to_rotation(angles).float(), torch.from_numpy(shifts).float()

    def ctf(self) -> CTF | None:
        """The CTF of every particle, or None when the table has no defocus."""
        if self.text("rlnDefocusU") is None:
            return None
        for column in ALTERED:
            if np.any(self.numbers(column, default=0)):
                raise ValueError(
                    f"expected images as the microscope gave them, got {column} in {self.path}; "
                    "try extracting the particles without it"
                )
        self.require(column for column in CTF_COLUMNS if column != "rlnPhaseShift")
        fields = {}
        for column, (field, unit) in CTF_COLUMNS.items():
            fields[field] = torch.from_numpy(self.numbers(column, default=np.zeros(len(self.particles))) * unit)
        return CTF(**fields)

    def images(self, sign: float = 1.0) -> Images:
        """The images of the particles, checked by the headers of their stacks alone."""
        parts = self.particles["rlnImageName"].str.extract(r"^(?:(\d+)@)?(.*)$")
        slice_index = parts[0].fillna("1").to_numpy().astype(np.int64) - 1
        stack_index, names = pd.factorize(parts[1])
        paths = [find_stack(name, self.path) for name in names]
        missing = [name for name, path in zip(names, paths, strict=True) if path is None]
        if missing:
            listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise FileNotFoundError(
                f"expected the images of {self.path} in its folder or one above, got no {listed}; "
                "try moving the star file into its project"
            )
        stacks = tuple(StackFile.open(path, name) for path, name in zip(paths, names, strict=True))
        boxes = sorted({stack.box_size for stack in stacks})
        if len(boxes) > 1:
            raise ValueError(f"expected one box size in the stacks of {self.path}, got {boxes} px; try rescaling")
        lengths = np.array([stack.n_images for stack in stacks])[stack_index]
        # Fewer rows than images is a selection, which RELION writes all the time; more rows is a mistake.
        bad = np.flatnonzero((slice_index < 0) | (slice_index >= lengths))
        if len(bad):
            row, stack = bad[0], stacks[stack_index[bad[0]]]
            raise ValueError(
                f"expected {self.path} to name the {stack.n_images} images of {stack.path}, got "
                f"row {row + 1} with image {slice_index[row] + 1}; try the star file of that stack"
            )
        return Images(stacks, stack_index, slice_index, sign)

    def select(self, rows: np.ndarray, image_names: list[str], fresh: dict | None = None) -> dict:
        """Blocks to write: these rows in this order, under new image names.

        The columns of `fresh`, blocks as of `new_blocks`, replace those of the file.
        """
        particles = self.particles.iloc[rows].reset_index(drop=True)
        if "rlnImageOriginalName" not in particles and particles["rlnImageName"].tolist() != image_names:
            particles["rlnImageOriginalName"] = particles["rlnImageName"]
        particles["rlnImageName"] = image_names
        if fresh is None:
            return {**self.blocks, self.name: particles}
        others = {name: block for name, block in self.blocks.items() if name not in ("optics", self.name)}
        kept = particles.drop(columns=REPLACED, errors="ignore")
        return {**others, **fresh, "particles": kept.assign(**fresh["particles"])}


def find_stack(name: str, star: Path) -> Path | None:
    """The file called `name` in the folder of `star` or in one above it, where RELION's projects start."""
    folder = Path(os.path.abspath(star)).parent
    return next((base / name for base in (folder, *folder.parents) if (base / name).is_file()), None)


def read_table(path: str | os.PathLike) -> ParticleTable:
    """Read a .star file of RELION 3.1 (data_optics and data_particles) or before (one table).

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no file, or it is not a table of particles.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"expected a RELION .star file, got {path}, which is not there; try another path")
    try:
        columns = re.findall(r"^\s*_(\S+)", path.read_text(), flags=re.MULTILINE)
        blocks = starfile.read(path, always_dict=True, parse_as_string=columns)
    except Exception as error:  # whatever the parts of the reader raise
        linecache.clearcache()  # starfile reads through it, and would see the broken file again once mended
        reason = str(error).strip()
        raise ValueError(f"expected a RELION .star file, got {path} ({reason}); try exporting it again") from error
    if isinstance(blocks.get("optics"), dict):
        blocks["optics"] = pd.DataFrame([blocks["optics"]])
    tables = [name for name, block in blocks.items() if isinstance(block, pd.DataFrame) and "rlnImageName" in block]
    if not tables or not len(blocks[tables[0]]):
        raise ValueError(f"expected a table of particles with rlnImageName, got none in {path}; try a particles.star")
    return ParticleTable(path, blocks, tables[0])


def new_blocks(rotations: Tensor, shifts: Tensor, ctf, pixel_size: float, box_size: int, names: list[str]) -> dict:
    """Blocks of a RELION 3.1 file for particles that came from no file; `ctf` is a CTF or None."""

    def text(values) -> list[str]:
        return [f"{value:.6f}" for value in np.asarray(values, dtype=np.float64).tolist()]

    particles = {"rlnImageName": names}
    particles |= {column: text(values) for column, values in zip(EULER, rotation_to_euler(rotations).T, strict=True)}
    particles |= {f"rlnOrigin{axis}Angst": text(-shifts[:, i] + 0.0) for i, axis in enumerate("XY")}
    # RELION refuses a file without voltage and Cs, even where no CTF is used.
    optics = np.tile([300.0, 2.7, 0.1], (len(names), 1))
    if ctf is not None:
        values = {column: np.asarray(getattr(ctf, field)) / unit for column, (field, unit) in CTF_COLUMNS.items()}
        optics = np.stack([values.pop(column) for column in OPTICS], axis=1)
        particles |= {column: text(cells) for column, cells in values.items()}
    groups, group = np.unique(optics, axis=0, return_inverse=True)
    numbers = [str(number) for number in range(1, len(groups) + 1)]
    particles["rlnOpticsGroup"] = [numbers[index] for index in group.ravel()]
    table = {"rlnOpticsGroup": numbers, "rlnOpticsGroupName": [f"opticsGroup{number}" for number in numbers]}
    table |= {column: [f"{value:g}" for value in groups[:, i]] for i, column in enumerate(OPTICS)}
    table |= {"rlnImagePixelSize": f"{pixel_size:.9g}", "rlnImageSize": str(box_size), "rlnImageDimensionality": "2"}
    return {"optics": pd.DataFrame(table), "particles": pd.DataFrame(particles)}


def write_table(star: Path, blocks: dict) -> None:
    """Write a .star file whole or not at all."""
    with atomic_path(star) as part:
        starfile.write(blocks, part, na_rep="nan")


def write_particles(star: Path, blocks: dict, chunks: Iterable[Tensor], shape: tuple, pixel_size: float) -> None:
    """Write the .mrcs beside `star` and then `star`, both whole or neither."""
    # On success the inner one is moved into place first: a new table never stands beside old images.
    with atomic_path(star) as star_part, atomic_path(star.with_suffix(".mrcs")) as stack_part:
        try:
            write_stack(stack_part, chunks, shape, pixel_size)
            starfile.write(blocks, star_part, na_rep="nan")
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(
                f"expected room for {shape[0]} images beside {star}, got {reason}; try another disk"
            ) from error


def image_names(stack: str, n: int) -> list[str]:
    """RELION's names of the first n images of a stack."""
    return [f"{number:06d}@{stack}" for number in range(1, n + 1)]


def check_star_path(path: str | os.PathLike) -> Path:
    """`path`, when it ends in .star."""
    path = Path(path)
    if path.suffix != ".star":
        raise ValueError(f"expected a path that ends in .star, got {path}; try {path.with_suffix('.star')}")
    return path


def present_names(star: Path, images: Images) -> list[str]:
    """Names by which the table `star` finds its images where they are; unchanged if they lead there."""
    if len(images.paths) < len(images.stacks):
        raise ValueError("expected images in files to write a .star alone, got images in memory; try images=True")
    names = []
    for stack in images.stacks:
        found = find_stack(stack.name, star)
        same = found is not None and found.samefile(stack.path)
        names.append(stack.name if same else os.path.abspath(stack.path))
    pairs = zip(images.stack_index, images.slice_index, strict=True)
    return [f"{number + 1:06d}@{names[stack]}" for stack, number in pairs]
