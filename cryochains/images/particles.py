"""Particle images with their poses, shifts and CTFs: index, split, batch, read and write.

Symbols of the paper: I → images, R → `rotations`, t → `shifts`, PSF → `ctf`. Images stay on disk
until a batch asks for them, and the order of particles never changes by itself.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._arguments import BY_FUNCTION, WITH_NAN, Angstroms, Count, Positive, Seed, Share, checked
from .._devices import choose_device
from .._files import content_digest
from . import cryosparc, relion
from .cryosparc import CryosparcTable
from .ctf import CTF
from .opening import (
    Known,
    choose_grid,
    distort,
    magnifications_of,
    open_images,
    scaled_shifts,
    sizes_of_shifts,
    undistort,
)
from .relion import ParticleTable
from .stacks import Images, Rows, positions

# Largest deviation of an element of R Rᵀ and of the determinant from those of a rotation.
_ROTATION_TOLERANCE = 1e-3
# Images read at a time while a stack is written.
_SAVED_CHUNK = 256
# What a source may say of how to open a file.
_SOURCE_ARGUMENTS = (
    "invert",
    "box_size",
    "datadir",
    "passthrough",
    "optics_group",
    "pixel_size",
    "voltage_kv",
    "spherical_aberration_mm",
    "amplitude_contrast",
)
# Images that tell a stack from another.
_DIGESTED_IMAGES = 8


class _PerParticle(Protocol):
    """Anything that holds one row a particle: ``len(it)``, and ``it[rows]`` as of an array."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> "_PerParticle": ...


@dataclass(frozen=True, eq=False)
class Batch:
    """Some particles of a stack, read.

    Attributes
    ----------
    rows : (b,) int64 tensor
        Their positions in the stack.
    images : (b, box, box) tensor or None
        None where no images were asked for.
    rotations : (b, 3, 3) tensor
    shifts : (b, 2) tensor
        Å.
    ctf : (b, box, box//2 + 1) tensor or None
        Evaluated.
    """

    rows: Tensor
    images: Any
    rotations: Tensor
    shifts: Tensor
    ctf: Tensor | None

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        size = "no images" if self.images is None else f"{self.images.shape[-1]} px"
        ctf = "no CTF" if self.ctf is None else "with CTF"
        return f"Batch({len(self):,} particles, {size}, {ctf}, on {self.rotations.device})"

    @property
    def pose(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rotations, shifts and CTF: what a microscope takes after coordinates."""
        return self.rotations, self.shifts, self.ctf


@dataclass(frozen=True, eq=False)
class _Origin:
    """A file, how it was opened and what was read from it, to tell what was changed since."""

    source: dict[str, Any]
    table: ParticleTable | CryosparcTable
    known: Known
    particles: "ParticleStack"


@dataclass(frozen=True, eq=False, repr=False, init=False)
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
    ids : (n,) array of str or int, optional
        RELION's image names; by default the strings "000001", "000002" and so on.
    rows : (n,) int array, optional
        Row of each particle in the file it came from.
    truth : object, optional
        What a simulation knows of each particle: anything with ``len()`` and ``[rows]``.

    Attributes
    ----------
    box_size : int
    source : dict or None
        How to open these particles again.

    Raises
    ------
    ValueError
        For images that are not square or have an odd box, numbers of particles that differ, ids
        that are neither strings nor integers, or poses that are not rotations.

    Examples
    --------
    >>> rotations = torch.eye(3).expand(10, 3, 3)
    >>> particles = ParticleStack(torch.zeros(10, 32, 32), rotations, pixel_size=2.0)
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
    shifts: Tensor
    pixel_size: float
    ctf: CTF | None
    ids: np.ndarray
    rows: np.ndarray
    truth: _PerParticle | None
    # Columns of the file are written again as they were.
    _origin: _Origin | None

    @checked
    def __init__(
        self,
        images: Images | Annotated[Tensor | np.ndarray, WITH_NAN],
        rotations: Tensor | np.ndarray,
        shifts: Tensor | np.ndarray | None = None,
        *,
        pixel_size: Angstroms,
        ctf: CTF | None = None,
        ids: Annotated[Sequence[str | int] | np.ndarray | Tensor | None, BY_FUNCTION] = None,
        rows: Sequence[int] | np.ndarray | None = None,
        truth: _PerParticle | None = None,
        _origin: _Origin | None = None,
    ) -> None:
        images = _as_images(images)
        n = len(images)
        if shifts is None:
            shifts = torch.zeros(n, 2)
        if ids is None:
            ids = [f"{number:06d}" for number in range(1, n + 1)]
        if rows is None:
            rows = range(n)
        values = {
            "images": images,
            "rotations": torch.as_tensor(rotations, dtype=torch.float32),
            "shifts": torch.as_tensor(shifts, dtype=torch.float32),
            "pixel_size": float(pixel_size),
            "ctf": ctf,
            "ids": plain_ids(ids),
            "rows": np.asarray(rows, dtype=np.int64),
            "truth": truth,
            "_origin": _origin,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_shapes()
        _check_rotations(self.rotations)

    def _check_shapes(self) -> None:
        n = len(self)
        n_ctfs = n if self.ctf is None else len(self.ctf)
        n_truths = n if self.truth is None else len(self.truth)
        for name, got, expected in (
            ("rotations", self.rotations.shape, (n, 3, 3)),
            ("shifts", self.shifts.shape, (n, 2)),
            ("ids", self.ids.shape, (n,)),
            ("rows", self.rows.shape, (n,)),
            ("CTFs", (n_ctfs,), (n,)),
            ("truths", (n_truths,), (n,)),
        ):
            if tuple(got) != expected:
                raise ValueError(
                    f"expected {name} of shape {expected} for {n} images, got {tuple(got)}; "
                    "try the same selection of both"
                )

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
        """n rows of the numbers that the file holds, such as rlnRandomSubset or alignments3D/error.

        Without columns when the particles came from no file.
        """
        if self._origin is None:
            return pd.DataFrame(index=range(len(self)))
        return self._origin.table.columns(self.rows)

    @property
    def file_suffix(self) -> str | None:
        """ ".star" or ".cs": what `save` writes that goes back to where the particles came from.

        None when they came from no file.
        """
        if self._origin is None:
            return None
        return ".cs" if isinstance(self._origin.table, CryosparcTable) else ".star"

    @property
    def source(self) -> dict[str, Any] | None:
        """How to open these particles again, as a dictionary that fits into JSON.

        ``open_source(source)[particles.rows]`` are the same particles, without their `truth`: the
        path is under "star" or "cs", the rest are arguments of `load_particles`. None when they
        came from no file, or their images, ids, poses or CTFs are no longer those of the file.

        Examples
        --------
        >>> particles = ParticleStack(torch.ones(4, 16, 16), torch.eye(3).expand(4, 3, 3),
        ...                           pixel_size=2.0)
        >>> particles.source is None
        True
        >>> particles.save("results/doc/four.star")
        >>> source = load_particles("results/doc/four.star")[1:].source
        >>> os.path.basename(source["star"]), source["invert"]
        ('four.star', False)
        """
        if self._origin is None:
            return None
        as_read = self._origin.particles[self.rows]
        same = (
            _same_metadata(self, as_read)
            and np.array_equal(self.ids, as_read.ids)
            and self.images.same_as(as_read.images)
        )
        if not same:
            return None
        return dict(self._origin.source)

    def __getitem__(self, rows: Rows) -> "ParticleStack":
        """The particles at these positions (int, slice, indices or mask), in this order.

        Reads no image.
        """
        chosen = positions(rows, len(self))
        names = ("images", "rotations", "shifts", "ctf", "ids", "rows", "truth")
        known = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: values[chosen] for name, values in known.items()})

    def digest(self) -> str:
        """Short hash of ids, poses, CTFs and up to 8 images.

        Tells the particles of an interrupted run from others.
        """
        return content_digest(self.metadata_digest(), self.image_digest())

    def image_digest(self) -> str:
        """Short hash of up to 8 evenly spaced images, the first and the last among them.

        Only these are read: tells images from others, such as those of another polishing, in
        little time.
        """
        n = len(self)
        rows = np.linspace(0, n - 1, min(n, _DIGESTED_IMAGES)).round().astype(np.int64)
        return content_digest(self.read_images(rows))

    def metadata_digest(self) -> str:
        """Short hash of ids, poses and CTFs, for which no image is read.

        The same in every interpreter: recognises particles that are opened again.

        Examples
        --------
        >>> rotations = torch.eye(3).expand(2, 3, 3)
        >>> particles = ParticleStack(torch.zeros(2, 8, 8), rotations, pixel_size=2.0)
        >>> particles.metadata_digest() == particles[[0, 1]].metadata_digest()
        True
        >>> particles.metadata_digest() == particles[[1, 0]].metadata_digest()
        False
        """
        return content_digest(
            self.ids.tolist(),
            self.box_size,
            self.pixel_size,
            self.rotations,
            self.shifts,
            *([] if self.ctf is None else self.ctf.values()),
        )

    def read_images(self, rows: Rows = slice(None)) -> Tensor:
        """(n, box, box) float32 images at these positions; only they are read."""
        return self.images[positions(rows, len(self))].read()

    @checked
    def batches(
        self,
        batch_size: Count = 64,
        device: torch.device | str | None = None,
        seed: Seed | None = None,
        progress: str | None = None,
        images: bool = True,
        require_finite: bool = True,
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
        images : bool
            False reads no image: ``batch.images`` is None.
        require_finite : bool
            False also gives images that hold NaN or Inf.

        Raises
        ------
        ValueError
            For a batch size below 1, or an image that holds NaN or Inf.
        """
        if device is not None:
            device = choose_device(device)
        n = len(self)
        order = np.arange(n) if seed is None else np.random.default_rng(seed).permutation(n)
        with tqdm(total=n, desc=progress, unit="particle", disable=progress is None) as bar:
            for start in range(0, n, batch_size):
                rows = order[start : start + batch_size]
                batch = self._read_batch(rows, device)
                if images:
                    pixels = self.images[rows].read(require_finite)
                    batch = replace(batch, images=pixels.to(device))
                yield batch
                bar.update(len(rows))

    def _read_batch(self, rows: np.ndarray, device: torch.device | str | None) -> Batch:
        """Poses and CTFs, without images."""
        index = torch.from_numpy(rows)
        transfer = None
        if self.ctf is not None:
            transfer = self.ctf[index].evaluate(self.box_size, self.pixel_size, device)
        return Batch(
            rows=index.to(device),
            images=None,
            rotations=self.rotations[index].to(device),
            shifts=self.shifts[index].to(device),
            ctf=transfer,
        )

    @checked
    def split(
        self, train: Share = 0.8, validation: Share = 0.1, test: Share = 0.1, seed: Seed = 0
    ) -> tuple["ParticleStack", "ParticleStack", "ParticleStack"]:
        """Three stacks that share no particle, drawn at random, each in the order of this one.

        Raises
        ------
        ValueError
            When a fraction is negative or they add up to more than 1.
        """
        fractions = np.array([train, validation, test], dtype=np.float64)
        if fractions.sum() > 1 + 1e-9:
            raise ValueError(
                f"expected fractions that add up to 1 or less, got {train}, {validation} and "
                f"{test}; try 0.8, 0.1 and 0.1"
            )
        ends = np.round(np.cumsum(fractions) * len(self)).astype(int)
        order = np.random.default_rng(seed).permutation(len(self))
        first, second, third = np.split(order, ends)[:3]
        return self[np.sort(first)], self[np.sort(second)], self[np.sort(third)]

    @checked
    def save(
        self,
        path: str | os.PathLike,
        images: bool = True,
        progress: str | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a table of the particles and the .mrcs with its images beside it, whole or neither.

        Columns of the file the particles came from are kept as they were; poses, CTFs and pixel
        size are written anew where they are no longer those of the file.

        Parameters
        ----------
        path : path
            Ends in .star, for RELION 3.1 or later, or, for particles that came from a .cs, in .cs.
        images : bool
            False writes the table alone, which names the images where they are, as they are there:
            a selection for RELION or cryoSPARC. True writes them as they are read, binned where
            `load_particles` was to bin them, and protein-bright.
        progress : str, optional
            Title of a progress bar; None shows none.
        columns : DataFrame or dict of (n,) numbers, optional
            More columns, such as scores: "PC1 (Å)" becomes cryochainsPC1 in a .star and
            cryochains/PC1 in a .cs, names that neither program reads anything from.

        Raises
        ------
        ValueError
            When the file cannot be written, or is the one that these images are read from, or a
            column is not one finite number a particle.
        """
        path = Path(path)
        more = _plain_columns({} if columns is None else columns, len(self))
        if path.suffix == ".cs":
            self._require_cs_origin(path)
        else:
            relion.check_star_path(path)
        if not len(self):
            raise ValueError(
                "expected at least one particle to save, got none; try another selection"
            )
        if not images:
            self._save_table(path, more)
            return
        stack = path.with_suffix(".mrcs")
        read_from = [source for source in self.images.paths if source.exists()]
        if stack.exists() and any(stack.samefile(source) for source in read_from):
            raise ValueError(
                "expected a name that none of these images is read from, got "
                f"{stack}; try a new one"
            )
        batches = self.batches(_SAVED_CHUNK, progress=progress)
        chunks = (batch.images for batch in batches if batch.images is not None)
        size: dict[str, Any] = {"n_images": len(self)}
        size |= {"box_size": self.box_size, "pixel_size": self.pixel_size}
        if path.suffix == ".cs":
            array = self._array(with_images=True)
            array = cryosparc.blob_fields(array, stack.name, self.box_size, self.pixel_size)
            array = cryosparc.column_fields(array, more)
            cryosparc.write_array_and_stack(path, array, chunks, **size)
        else:
            names = relion.image_names(stack.name, len(self))
            blocks = relion.with_columns(self._blocks(names, with_images=True), more)
            relion.write_table_and_stack(path, blocks, chunks, **size)

    def _save_table(self, path: Path, more: dict[str, np.ndarray]) -> None:
        """The table alone, for images that stay in their files."""
        if path.suffix != ".cs":
            names = relion.present_names(path, self.images)
            blocks = relion.with_columns(self._blocks(names, with_images=False), more)
            relion.write_table(path, blocks)
            return
        array = cryosparc.present_fields(self._array(with_images=False), path, self.images)
        array = cryosparc.column_fields(array, more)
        origin = self._origin
        if origin and (origin.known.pixel_size or self.pixel_size != origin.particles.pixel_size):
            sizes = np.full(len(self), self._written_geometry(False)[1], dtype=np.float32)
            array = cryosparc.with_fields(array, {"blob/psize_A": sizes})
        cryosparc.write_array(path, array)

    def _require_cs_origin(self, path: Path) -> None:
        if self.file_suffix != ".cs":
            raise ValueError(
                f"expected particles that came from a .cs file to write {path}, got others; "
                f"try {path.with_suffix('.star')}"
            )

    def _array(self, with_images: bool) -> np.ndarray:
        """Rows of a .cs file, with the poses and CTFs of these particles."""
        origin = self._origin
        if origin is None or not isinstance(origin.table, CryosparcTable):
            raise ValueError("expected particles of a .cs file, got others; try a .star")
        array = origin.table.select(self.rows)
        as_read = origin.particles[self.rows]
        changed = (self.rotations != as_read.rotations).flatten(1).any(1)
        changed |= (self.shifts != as_read.shifts).any(1)
        undistorted = self._is_undistorted(with_images)
        if origin.known.pixel_size is not None or undistorted:
            changed[:] = True
        if changed.any():
            mask = changed.numpy()
            shifts = self._written_shifts(with_images)
            array = cryosparc.pose_fields(array, self.rotations, shifts, mask, self.pixel_size)
        if undistorted:
            array = cryosparc.without_magnification(array)
        same_ctf = _same_ctf(self, as_read) and not origin.known.replaces_values
        if self.ctf is not None and not same_ctf:
            array = cryosparc.ctf_fields(array, self.ctf)
        return array

    def _blocks(self, names: list[str], with_images: bool) -> dict:
        """Blocks of a .star file in which the images have these names."""
        origin = self._origin
        if origin is None:
            return self._fresh_blocks(names, with_images)
        if isinstance(origin.table, CryosparcTable):
            blocks = self._fresh_blocks(names, with_images)
            more = origin.table.relion_columns(self.rows)
            return {**blocks, "particles": blocks["particles"].assign(**more)}
        as_read = origin.particles[self.rows]
        same_ctf = _same_ctf(self, as_read) and not origin.known.replaces_values
        same_poses = _same_poses(self, as_read)
        # Images in memory may have another box: the optics of the file are then no longer true.
        same_images = bool(self.images.paths) and not (with_images and self.images.grid)
        same_images = same_images and self.pixel_size == as_read.pixel_size
        if same_ctf and same_poses and same_images:
            return origin.table.select(self.rows, names)
        if same_ctf and origin.table.has_optics:
            undistorted = self._is_undistorted(with_images)
            poses = (self.rotations, self._written_shifts(with_images))
            return origin.table.select_with_poses(
                self.rows,
                names,
                None if same_poses and not undistorted else poses,
                None if same_images else self._written_geometry(with_images),
                undistorted,
            )
        return origin.table.select_with(self.rows, names, self._fresh_blocks(names, with_images))

    def _fresh_blocks(self, names: list[str], with_images: bool) -> dict[str, pd.DataFrame]:
        box_size, pixel_size = self._written_geometry(with_images)
        return relion.new_blocks(
            names,
            rotations=self.rotations,
            shifts=self._written_shifts(with_images),
            pixel_size=pixel_size,
            box_size=box_size,
            ctf=self.ctf,
            magnifications=None if with_images else self.images.magnifications,
        )

    def _is_undistorted(self, with_images: bool) -> bool:
        """Whether the file's magnification matrix no longer is that of the images to be written."""
        if self._origin is None or self._origin.particles.images.magnifications is None:
            return False
        return with_images or self.images.magnifications is None

    def _written_shifts(self, with_images: bool) -> Tensor:
        """(n, 2) Å, on the images that a table names."""
        matrices = self.images.magnifications
        if with_images or matrices is None:
            return self.shifts
        return distort(self.shifts, matrices)

    def _written_geometry(self, with_images: bool) -> tuple[int, float]:
        """Box in px and pixel size in Å of the images that a table names."""
        images = self.images
        if with_images or images.grid is None or images.pixel_sizes is None:
            return self.box_size, self.pixel_size
        sizes = np.unique(images.pixel_sizes)
        boxes = np.unique(images.box_sizes)
        if len(sizes) > 1 or len(boxes) > 1:
            raise ValueError(
                "expected images of one box and pixel size to name in a new table, got "
                f"{boxes.tolist()} px and {sizes.tolist()} Å; try images=True"
            )
        # A pixel size that was changed by hand changes that of the files as much.
        return int(boxes[0]), float(sizes[0]) * self.pixel_size / images.grid.pixel_size


@checked
def load_particles(
    path: str | os.PathLike,
    invert: bool = False,
    *,
    box_size: int | None = None,
    datadir: str | os.PathLike | None = None,
    passthrough: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    optics_group: str | int | None = None,
    pixel_size: Angstroms | None = None,
    voltage_kv: Positive | None = None,
    spherical_aberration_mm: float | None = None,
    amplitude_contrast: Share | None = None,
) -> ParticleStack:
    """Open the particles of a RELION .star or a cryoSPARC .cs file; images stay on disk.

    Parameters
    ----------
    path : path
        A .star file of RELION 3.1 to 5 (optics groups) or before (one table), or a .cs file. Image
        names are relative to its folder or to one above it.
    invert : bool
        True for images in which protein is dark. A .cs says so itself, in blob/sign: True there
        turns what it says.
    box_size : int, optional
        Even box that images are cropped to in Fourier space as they are read, px; pixel size and
        CTF follow. By default images are read as they are; an odd box becomes the next smaller even
        one in the same way.
    datadir : path, optional
        Folder that image names are relative to, or that holds the files themselves.
    passthrough : path or list of paths, optional
        Of a .cs: files with the fields that its job did not write, joined by uid.
    optics_group : str or int, optional
        Group (of a .cs: ctf/exp_group_id) whose pixel size and box are kept where several differ,
        and that the others are rescaled to as they are read. By default the coarsest pixels, said
        in a warning.
    pixel_size : float, optional
        Å, of the images in their files: decides where table and headers differ.
    voltage_kv, spherical_aberration_mm, amplitude_contrast : float, optional
        In place of what the table says or lacks.

    Returns
    -------
    ParticleStack
        One particle a row, in the order of the file; a file may name some of a stack's images
        only. Without defocus columns, `ctf` is None.

    Raises
    ------
    FileNotFoundError, ValueError
        For missing files or columns, rows without an image, truncated stacks, boxes or pixel sizes
        that differ between table and stacks, images of very different widths, CTF values that
        cannot be, subtomograms.

    Notes
    -----
    A .cs of several classes (alignments3D_multi, alignments_class_0 and so on) gives each particle
    its pose in the class that is most probable for it. An image that is named twice is read twice,
    with a warning. Where a magnification matrix (rlnMagMat.., ctf/anisomag) says that images are
    distorted, they are resampled to undistorted axes as they are read, and shifts with them. Of
    aberrations, symmetric ones of a .star are part of the CTF; beam tilt and other odd ones are
    named in a warning and not corrected.

    Examples
    --------
    >>> rotations = torch.eye(3).expand(4, 3, 3)
    >>> ParticleStack(torch.ones(4, 16, 16), rotations, pixel_size=2.0).save("results/doc/a.star")
    >>> load_particles("results/doc/a.star")
    ParticleStack(4 particles of 16 px × 2 Å, no CTF, a.mrcs)
    >>> load_particles("results/doc/a.star", box_size=8)
    ParticleStack(4 particles of 8 px × 4 Å, no CTF, a.mrcs)
    """
    known = Known(datadir, pixel_size, voltage_kv, spherical_aberration_mm, amplitude_contrast)
    joined = _as_paths(passthrough)
    table: ParticleTable | CryosparcTable
    if Path(path).suffix == ".cs":
        table = cryosparc.read_cs(path, joined)
    elif joined:
        raise ValueError(
            f"expected a .cs file for passthrough=, got {path}; try it without passthrough="
        )
    else:
        table = relion.read_table(path)
    images, sizes = open_images(table, known, invert)
    rotations, shifts = table.poses(sizes_of_shifts(table, sizes))
    factors = torch.from_numpy(scaled_shifts(table, known, images, sizes)).float()
    shifts = shifts * factors
    matrices = magnifications_of(table)
    if matrices is not None:
        shifts = undistort(shifts, matrices)
    images, size = choose_grid(table, images, sizes, matrices, box_size, optics_group)
    particles = ParticleStack(
        images,
        rotations,
        shifts,
        pixel_size=size,
        ctf=table.ctf(known),
        ids=table.ids,
    )
    source = {
        "cs" if isinstance(table, CryosparcTable) else "star": os.path.abspath(path),
        "invert": invert,
        "box_size": box_size,
        "datadir": None if datadir is None else os.path.abspath(datadir),
        "passthrough": [os.path.abspath(one) for one in joined] or None,
        "optics_group": optics_group,
        "pixel_size": pixel_size,
        "voltage_kv": voltage_kv,
        "spherical_aberration_mm": spherical_aberration_mm,
        "amplitude_contrast": amplitude_contrast,
    }
    source = {name: value for name, value in source.items() if value is not None}
    return replace(particles, _origin=_Origin(source, table, known, particles))


@checked
def open_source(source: Mapping[str, Any], path: str | os.PathLike | None = None) -> ParticleStack:
    """The particles that a `ParticleStack.source` tells of.

    Parameters
    ----------
    source : dict
        As of `ParticleStack.source`.
    path : path, optional
        Of the file, where it is no longer at the path in `source`.

    Raises
    ------
    FileNotFoundError, ValueError
        As of `load_particles`.

    Examples
    --------
    >>> particles = ParticleStack(torch.ones(4, 16, 16), torch.eye(3).expand(4, 3, 3),
    ...                           pixel_size=2.0)
    >>> particles.save("results/doc/four.star")
    >>> source = load_particles("results/doc/four.star", box_size=8).source
    >>> open_source(source)
    ParticleStack(4 particles of 8 px × 4 Å, no CTF, four.mrcs)
    """
    arguments = {name: value for name, value in source.items() if name not in ("star", "cs")}
    unknown = sorted(set(arguments) - set(_SOURCE_ARGUMENTS))
    if unknown:
        raise ValueError(
            f"expected a source with {', '.join(_SOURCE_ARGUMENTS)}, got {', '.join(unknown)}; try "
            "load_particles(path)"
        )
    return load_particles(source_path(source) if path is None else path, **arguments)


def source_path(source: Mapping[str, Any]) -> str:
    """Path of the .star or .cs file in a `ParticleStack.source`.

    Examples
    --------
    >>> source_path({"cs": "/data/a.cs", "invert": False})
    '/data/a.cs'
    """
    path = source.get("star", source.get("cs"))
    if not isinstance(path, str):
        raise ValueError(
            "expected a source with the path of a .star or .cs file, got one with "
            f"{sorted(map(str, source))}; try that of load_particles(path)"
        )
    return path


def _as_paths(
    passthrough: str | os.PathLike | Sequence[str | os.PathLike] | None,
) -> list[str | os.PathLike]:
    if passthrough is None:
        return []
    if isinstance(passthrough, (str, os.PathLike)):
        return [passthrough]
    return list(passthrough)


def _as_images(images: Images | Tensor | np.ndarray) -> Images:
    if not isinstance(images, Images):
        images = torch.as_tensor(images, dtype=torch.float32)
        if images.ndim != 3:
            raise ValueError(
                f"expected images of shape (n, box, box), got {tuple(images.shape)}; "
                "try images[None]"
            )
        images = Images.in_memory(images)
    _, height, width = images.shape
    if height != width or width < 2 or width % 2:
        raise ValueError(
            f"expected square images with an even box, got {height} × {width} px; try cropping them"
        )
    return images


def plain_ids(ids: Sequence[str | int] | np.ndarray | Tensor) -> np.ndarray:
    """(n,) object array of Python's strings and integers: how this library keeps ids of particles.

    Parameters
    ----------
    ids : list, array or tensor
        Strings or integers, of numpy and torch too.

    Raises
    ------
    ValueError
        When they are no list, or one of them is anything else, such as None, a bool or a float.

    Examples
    --------
    >>> plain_ids(np.array([3, 1]))
    array([3, 1], dtype=object)
    """
    if isinstance(ids, Tensor):
        ids = ids.tolist()
    # A copy: the ids of a stack do not change with an array of the caller.
    array = np.array(ids, dtype=object)
    if array.ndim != 1:
        got = repr(ids) if array.ndim == 0 else f"{array.shape}"
        raise ValueError(
            f"expected ids of shape (n,), one string or integer a particle, got {got}; "
            "try a list of strings"
        )
    if set(map(type, array)) <= {str, int}:
        return array
    for position, one in enumerate(array):
        if isinstance(one, str):
            array[position] = str(one)
        elif isinstance(one, (int, np.integer)) and not isinstance(one, bool):
            array[position] = int(one)
        else:
            raise ValueError(
                f"expected ids that are strings or integers, got {one!r} at position {position}; "
                "try str of each"
            )
    return array


def _plain_columns(columns: Mapping[str, Any], n: int) -> dict[str, np.ndarray]:
    """Columns (n,) float64 by names of letters, digits and _ alone, without their units."""
    plain: dict[str, np.ndarray] = {}
    for name in columns:
        word = re.sub(r"[^A-Za-z0-9]+", "_", re.sub(r"\(.*\)", "", str(name))).strip("_")
        try:
            values = np.asarray(columns[name], dtype=np.float64)
        except (TypeError, ValueError):
            values = np.zeros(0)
        if values.shape != (n,) or not np.isfinite(values).all():
            raise ValueError(
                f"expected one finite number a particle in the column {name!r}, got "
                f"{np.shape(columns[name])} for {n:,}; try the same selection of both"
            )
        if not word or word in plain:
            raise ValueError(
                f"expected columns of different names of letters and digits, got {name!r}; "
                "try PC1, PC2 and so on"
            )
        plain[word] = values
    return plain


def _same_metadata(particles: ParticleStack, others: ParticleStack) -> bool:
    """Whether poses, pixel size and CTFs are the same numbers."""
    same_size = particles.pixel_size == others.pixel_size
    return same_size and _same_poses(particles, others) and _same_ctf(particles, others)


def _same_poses(particles: ParticleStack, others: ParticleStack) -> bool:
    return torch.equal(particles.rotations, others.rotations) and torch.equal(
        particles.shifts, others.shifts
    )


def _same_ctf(particles: ParticleStack, others: ParticleStack) -> bool:
    if particles.ctf is None or others.ctf is None:
        return particles.ctf is others.ctf
    mine, theirs = list(particles.ctf.values()), list(others.ctf.values())
    return len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))


def _check_rotations(rotations: Tensor) -> None:
    error = (rotations @ rotations.mT - torch.eye(3)).abs().amax(dim=(1, 2))
    determinant = torch.linalg.det(rotations)
    is_rotation = (error < _ROTATION_TOLERANCE) & ((determinant - 1).abs() < _ROTATION_TOLERANCE)
    if not is_rotation.all():
        row = int((~is_rotation).nonzero()[0])
        raise ValueError(
            f"expected rotations (R Rᵀ = 1, determinant 1), got one off by {error[row]:.2g} with "
            f"determinant {determinant[row]:.3g} at position {row}; try the nearest rotation, "
            "U Vᵀ of its singular value decomposition"
        )
