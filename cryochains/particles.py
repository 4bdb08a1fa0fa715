"""Particle images with their poses, shifts and CTFs: index, split, batch, read and write.

Symbols of the paper: I → images, R → `rotations`, t → `shifts`, PSF → `ctf`. Images stay on disk until a
batch asks for them, and the order of rows never changes by itself.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import relion
from .files import fingerprint
from .imaging import CTF
from .stacks import Images, positions
from .truth import Truth

POSE_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class Batch:
    """Some particles of a stack, read: their positions `rows` in it (b,), images (b, box, box) and poses.

    `ctf` is evaluated, (b, box, box//2 + 1), or None. ``batch.pose`` is what `Imaging` takes after coords.
    """

    rows: Tensor
    images: Tensor
    rotations: Tensor
    shifts: Tensor
    ctf: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pose(self) -> tuple[Tensor, Tensor, Tensor | None]:
        return self.rotations, self.shifts, self.ctf


@dataclass(frozen=True, eq=False, repr=False)
class ParticleStack:
    """Particle images with what is known of each.

    Parameters
    ----------
    images : (n, box, box) array, tensor or Images
        Protein-bright, square, with an even box. `Images` are read from their files when asked for.
    rotations : (n, 3, 3) array
        From the reference to the image: x' = R x, then a projection along z.
    shifts : (n, 2) array, optional
        (x, y) displacement of the projected molecule on the image, Å. Default zero.
    pixel_size : float
        Å.
    ctf : CTF, optional
        None: the images show the projection itself.
    ids : (n,) array of str, optional
        RELION's image names, by default numbers from 1.
    rows : (n,) int array, optional
        Row of each particle in the file it came from.
    truth : Truth, optional
        Of simulated particles.

    Attributes
    ----------
    box_size : int

    Raises
    ------
    ValueError
        For images that are not square or have an odd box, numbers of particles that differ, or poses that
        are not rotations.

    Examples
    --------
    >>> particles = ParticleStack(torch.zeros(10, 32, 32), torch.eye(3).expand(10, 3, 3), pixel_size=2.0)
    >>> particles
    ParticleStack(10 particles of 32 px × 2 Å, no CTF, in memory)
    >>> train, validation, test = particles.split()
    >>> len(train), len(validation), len(test)
    (8, 1, 1)
    >>> [len(batch) for batch in particles[::2].batches(batch_size=3)]
    [3, 2]
    """

    images: Images
    rotations: Tensor
    shifts: Tensor | None = None
    pixel_size: float = field(kw_only=True)
    ctf: CTF | None = None
    ids: np.ndarray | None = None
    rows: np.ndarray | None = None
    truth: Truth | None = None
    # What was read from a file, and as what: columns of the file are written again as they were.
    _source: tuple[relion.ParticleTable, "ParticleStack"] | None = None

    def __post_init__(self):
        images = self.images
        if not isinstance(images, Images):
            images = torch.as_tensor(images, dtype=torch.float32)
            if images.ndim != 3:
                raise ValueError(f"expected images of shape (n, box, box), got {tuple(images.shape)}; try images[None]")
            images = Images.in_memory(images)
        n, height, width = images.shape
        if height != width or width < 2 or width % 2:
            raise ValueError(f"expected square images with an even box, got {height} × {width} px; try cropping them")
        if not self.pixel_size > 0:
            raise ValueError(f"expected a positive pixel size in Å, got {self.pixel_size}")
        rotations = torch.as_tensor(self.rotations, dtype=torch.float32)
        shifts = torch.zeros(n, 2) if self.shifts is None else self.shifts
        shifts = torch.as_tensor(shifts, dtype=torch.float32)
        ids = np.asarray([f"{i + 1:06d}" for i in range(n)] if self.ids is None else self.ids, dtype=object)
        rows = np.asarray(range(n) if self.rows is None else self.rows, dtype=np.int64)
        for name, got, expected in (
            ("rotations", rotations.shape, (n, 3, 3)),
            ("shifts", shifts.shape, (n, 2)),
            ("ids", ids.shape, (n,)),
            ("rows", rows.shape, (n,)),
            ("CTFs", (n if self.ctf is None else len(self.ctf),), (n,)),
            ("truths", (n if self.truth is None else len(self.truth),), (n,)),
        ):
            if tuple(got) != expected:
                raise ValueError(f"expected {name} of shape {expected} for {n} images, got {tuple(got)}")
        _check_rotations(rotations)
        if not torch.isfinite(shifts).all():
            raise ValueError("expected finite shifts in Å, got NaN or Inf; try zeros where they are unknown")
        values = {"images": images, "rotations": rotations, "shifts": shifts, "ids": ids, "rows": rows}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        paths = self.images.paths
        source = paths[0].name if paths else "in memory"
        source += f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        ctf = "no CTF" if self.ctf is None else "with CTF"
        size = f"{self.box_size} px × {self.pixel_size:g} Å"
        return f"ParticleStack({len(self)} particles of {size}, {ctf}, {source})"

    @property
    def box_size(self) -> int:
        return self.images.shape[-1]

    @property
    def columns(self) -> pd.DataFrame:
        """n rows of the numbers that the .star file holds, such as rlnRandomSubset; no columns without a file."""
        if self._source is None:
            return pd.DataFrame(index=range(len(self)))
        table = self._source[0].particles
        # Names are left out unread: there may be a million.
        numbers = pd.to_numeric(table.iloc[0], errors="coerce").notna()
        table = table.loc[:, numbers].iloc[self.rows].apply(pd.to_numeric, errors="coerce")
        return table.dropna(axis=1).reset_index(drop=True)

    def __getitem__(self, rows) -> "ParticleStack":
        """The particles at these positions (int, slice, indices or mask), in this order. Reads no image."""
        rows = positions(rows, len(self))
        names = ("images", "rotations", "shifts", "ctf", "ids", "rows", "truth")
        known = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: values[rows] for name, values in known.items()})

    def fingerprint(self) -> str:
        """Short hash of ids, poses, CTFs and the first image: tells a checkpoint's particles from others."""
        return fingerprint(list(self.ids), *self._metadata(), self.read_images([0]))

    def _metadata(self) -> list:
        optics = [] if self.ctf is None else vars(self.ctf).values()
        return [self.rotations, self.shifts, self.pixel_size, *optics]

    def read_images(self, rows=slice(None)) -> Tensor:
        """(n, box, box) float32 images at these positions; only they are read."""
        return self.images[positions(rows, len(self))].read()

    def batches(
        self, batch_size: int = 64, device=None, seed: int | None = None, progress: str | None = None
    ) -> Iterator[Batch]:
        """Read the particles a batch at a time; memory does not grow with their number.

        Parameters
        ----------
        batch_size : int
        device : torch device, optional
            Where the tensors go.
        seed : int, optional
            Shuffles the particles; None keeps their order. ``batch.rows`` says which they are.
        progress : str, optional
            Title of a progress bar; None shows none.
        """
        if batch_size < 1:
            raise ValueError(f"expected a batch size of 1 or more, got {batch_size}; try 64")
        n = len(self)
        order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
        with tqdm(total=n, desc=progress, unit="particle", disable=progress is None) as bar:
            for start in range(0, n, batch_size):
                rows = order[start : start + batch_size]
                index = torch.from_numpy(rows)
                transfer = None
                if self.ctf is not None:
                    transfer = self.ctf[index].evaluate(self.box_size, self.pixel_size, device)
                yield Batch(
                    index.to(device),
                    self.read_images(rows).to(device),
                    self.rotations[index].to(device),
                    self.shifts[index].to(device),
                    transfer,
                )
                bar.update(len(rows))

    def split(
        self, train: float = 0.8, validation: float = 0.1, test: float = 0.1, seed: int = 0
    ) -> tuple["ParticleStack", "ParticleStack", "ParticleStack"]:
        """Three stacks that share no particle, drawn at random, each in the order of this one.

        Raises
        ------
        ValueError
            When a fraction is negative or they add up to more than 1.
        """
        fractions = np.array([train, validation, test], dtype=np.float64)
        if (fractions < 0).any() or fractions.sum() > 1 + 1e-9:
            raise ValueError(
                f"expected fractions that add up to 1 or less, got {train}, {validation} and {test}; "
                "try 0.8, 0.1 and 0.1"
            )
        ends = np.round(np.cumsum(fractions) * len(self)).astype(int)
        order = np.random.default_rng(seed).permutation(len(self))
        parts = np.split(order, ends)[:3]
        return tuple(self[np.sort(part)] for part in parts)

    def save(self, path: str | os.PathLike, images: bool = True, progress: str | None = None) -> None:
        """Write a RELION 3.1 .star file and, beside it, the .mrcs with its images; both whole or not at all.

        Columns of the file the particles came from are kept as they were; poses, CTFs and pixel size are
        written anew where they are no longer those of the file.

        Parameters
        ----------
        path : path
            Ends in .star.
        images : bool
            False writes the .star alone, which names the images where they are: a selection for RELION.
        progress : str, optional
            Title of a progress bar; None shows none.

        Raises
        ------
        ValueError
            When the place cannot be written, or is the file that these images are read from.
        """
        path = relion.check_star_path(path)
        if not len(self):
            raise ValueError("expected at least one particle to save, got none")
        if images:
            stack = path.with_suffix(".mrcs")
            if stack.exists() and any(stack.samefile(source) for source in self.images.paths if source.exists()):
                raise ValueError(f"expected another name than {stack}, from which these images are read; try a new one")
            names = relion.image_names(stack.name, len(self))
            chunks = (batch.images for batch in self.batches(256, progress=progress))
            relion.write_particles(path, self._blocks(names), chunks, self.images.shape, self.pixel_size)
        else:
            relion.write_table(path, self._blocks(relion.present_names(path, self.images)))

    def _blocks(self, names: list[str]) -> dict:
        table, read = self._source or (None, None)
        if table and self.images.paths and fingerprint(*self._metadata()) == fingerprint(*read[self.rows]._metadata()):
            return table.select(self.rows, names)
        fresh = relion.new_blocks(self.rotations, self.shifts, self.ctf, self.pixel_size, self.box_size, names)
        return table.select(self.rows, names, fresh) if table else fresh


def load_particles(path: str | os.PathLike, invert: bool = False) -> ParticleStack:
    """Open the particles of a RELION .star file; images stay on disk.

    Parameters
    ----------
    path : path
        A .star file of RELION 3.1 or later (optics groups) or before (one table). Image names are relative to
        its folder or to one above it.
    invert : bool
        True for images in which protein is dark.

    Returns
    -------
    ParticleStack
        One particle a row, in the order of the file; a file may name some of a stack's images only. Without defocus
        columns, `ctf` is None.

    Raises
    ------
    FileNotFoundError, ValueError
        For missing files or columns, rows without an image, truncated or odd stacks, several pixel sizes.

    Examples
    --------
    >>> particles = ParticleStack(torch.ones(4, 16, 16), torch.eye(3).expand(4, 3, 3), pixel_size=2.0)
    >>> particles.save("results/doc/four.star")
    >>> load_particles("results/doc/four.star")
    ParticleStack(4 particles of 16 px × 2 Å, no CTF, four.mrcs)
    """
    table = relion.read_table(path)
    images = table.images(sign=-1.0 if invert else 1.0)
    pixel_size = table.pixel_size()
    poses, ids = table.poses(pixel_size), table.particles["rlnImageName"]
    read = ParticleStack(images, *poses, pixel_size=pixel_size, ctf=table.ctf(), ids=ids)
    return replace(read, _source=(table, read))


def _check_rotations(rotations: Tensor) -> None:
    error = (rotations @ rotations.mT - torch.eye(3)).abs().amax(dim=(1, 2))
    determinant = torch.linalg.det(rotations)
    bad = ~((error < POSE_TOLERANCE) & ((determinant - 1).abs() < POSE_TOLERANCE))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"expected rotations (R Rᵀ = 1, determinant 1), got one off by {error[row]:.2g} with determinant "
            f"{determinant[row]:.3g} at position {row}; try roma.special_procrustes"
        )
