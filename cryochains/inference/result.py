"""What is known of every particle: latents with error bars, and all that gives them a meaning."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import Latents, check_fields, checked
from .._devices import choose_device
from .._files import load_tensors, pack_text, save_tensors, unpack_text
from ..images import ParticleStack, open_source, plain_ids, positions, source_path
from ..model import (
    Model,
    Population,
    frame_jacobian,
    in_frame,
    pack_model,
    require_population,
    require_same_images,
    unpack_model,
)
from .averaging import is_wide, with_error_bars
from .frames import (
    MOLECULE,
    POSES,
    PoseCorrection,
    chosen_frame,
    corrected_particles,
    frame_words,
    pose_correction,
    std_in_frame,
)
from .identity import (
    require_count,
    require_finite_latents,
    require_same_ids,
    select_by_id,
)
from .likelihood import information_of, normal_equations, position_variance
from .verdict import Verdict, judge

RESULT_KIND = "result"
# Of the folder of a run.
RESULT_FILE = "result.safetensors"
# Particles whose conformations the verdict looks at.
_JUDGED = 2000
# Nothing else is opened, whatever a file says of where its particles came from.
_TABLE_SUFFIXES = (".star", ".cs")
# What is known of each particle besides its latents.
_COLUMNS = ("scale", "noise", "misfit", "responsibility")
_ANSWER_KINDS = ("refined", "estimated", "encoded", "given")


@dataclass(frozen=True, eq=False)
class _Given:
    """The result in the frame of the given poses, and what was made of it in another frame."""

    result: "Result"
    latents: Tensor
    std: Tensor | None
    particles: ParticleStack | None

    def made(self, other: "Result") -> bool:
        """Whether the other's latents, error bars and particles are these."""
        pairs = ((self.latents, other.latents), (self.std, other.std))
        same = all(_same_tensor(one, another) for one, another in pairs)
        return same and self.particles is other.particles


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Latents of every particle, one row a particle; what `refine`, `estimate` and `encode` return.

    ``result[rows]`` is a `Result` of those particles (int, slice, indices or mask).

    Parameters
    ----------
    model : Model
        Whose latents these are.
    latents : (N, p) tensor
        Posterior means, in the model's units (1 unit moves a chain by about 1 Å).
    std : (N, p) tensor, optional
        Posterior standard deviations; None where they are not known, as of an encoder.
    population : Population, optional
        What all particles share, as the refinement learned it: always in the frame of the poses.
    particles : ParticleStack, optional
        The particles, in the same order, with the poses of this frame.
    ids : (N,) array, optional
        Strings or integers. By default those of the particles, else numbers from 1.
    scale : (N,) tensor, optional
        Brightness of each image over the model's; by default the population's, else 1.
    noise : (N,) tensor, optional
        Standard deviation of the noise in each image, in grey levels.
    misfit : (N,) tensor, optional
        χ² per pixel, at the frequencies at which the molecule shows: about 1 where the model says
        all that is in an image, more where the image shows something else as well.
    responsibility : (N,) tensor, optional
        Probability that the image shows the molecule at its pose; see `shows_molecule`.
    history : sequence of dict
        One record a pass over the images.
    kind : {"refined", "estimated", "encoded", "given"}
        Where the latents come from; "given" by the caller.
    particles_digest : str, optional
        Hash of the particles' ids, poses and CTFs. A result keeps it, so that other particles with
        the same ids are refused where it is saved, opened or changed by `dataclasses.replace`.
    frame : str
        "poses", the frame of the given poses. Other frames are made by `in_frame`.

    Notes
    -----
    Tensors are not copied, since there may be a million particles: do not write into them.

    Raises
    ------
    ValueError
        For parts that do not belong together.

    Examples
    --------
    >>> from cryochains import Model, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> result = Result(model, torch.zeros(5, 12))
    >>> result
    Result(5 particles, given, 12 latents of 'glua3-closed')
    >>> len(result[:2]), result.decode([0]).shape
    (2, torch.Size([1, 739, 3]))
    """

    model: Model
    latents: Latents
    std: Latents | None = None
    population: Population | None = None
    particles: ParticleStack | None = None
    # None only while a result is made: numbers from 1, or the particles' own.
    ids: Any = None
    scale: Latents = None  # type: ignore[assignment]
    noise: Latents | None = None
    misfit: Latents | None = None
    responsibility: Latents | None = None
    history: Sequence[Mapping] = ()
    kind: str = "given"
    particles_digest: str | None = None
    frame: str = POSES
    # None in the frame of the poses.
    _given: _Given | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kind not in _ANSWER_KINDS:
            kinds = ", ".join(map(repr, _ANSWER_KINDS))
            raise ValueError(
                f"expected a result that is one of {kinds}, got {self.kind!r}; try kind='given'"
            )
        latents = _plain(self.latents)
        if latents.ndim != 2 or latents.shape[1] != self.model.n_latents:
            raise ValueError(
                f"expected latents (N, {self.model.n_latents}) of {self.model!r}, got "
                f"{tuple(latents.shape)}; try the model that they are of"
            )
        std = None if self.std is None else _plain(self.std)
        if std is not None and std.shape != latents.shape:
            raise ValueError(
                f"expected error bars {tuple(latents.shape)}, one a latent, got "
                f"{tuple(std.shape)}; try std=None"
            )
        if self.population is not None:
            require_population(self.model, self.population)
        ids = self._checked_ids(len(latents))
        values = {
            "model": self.model.to("cpu"),
            "latents": latents,
            "std": std,
            "ids": ids,
            **self._checked_columns(len(latents)),
            "particles_digest": self._checked_digest(),
            "history": tuple(dict(record) for record in self.history),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check_frame()

    def _check_frame(self) -> None:
        given = self._given
        if (self.frame == POSES) != (given is None) or (given and not given.made(self)):
            raise ValueError(
                f"expected what in_frame({self.frame!r}) gives, got other latents, error bars or "
                "particles; try to change those of result.in_frame('poses')"
            )

    def _checked_columns(self, n: int) -> dict[str, Tensor | None]:
        """Scale, noise, misfit and responsibility: (N,) each, or None."""
        columns: dict[str, Tensor | None] = {}
        for name in _COLUMNS:
            values = getattr(self, name)
            if name == "scale" and values is None:
                values = torch.full((n,), self._contrast())
            if values is not None:
                values = _plain(values)
                if values.shape != (n,):
                    raise ValueError(
                        f"expected {name} ({n},), one number a particle, got "
                        f"{tuple(values.shape)}; try {name}=None"
                    )
            columns[name] = values
        scale = columns["scale"]
        if scale is not None and not (scale.isfinite() & (scale > 0)).all():
            raise ValueError(
                "expected positive scales, got some that are zero, negative or not finite; "
                "try scale=None"
            )
        return columns

    def _contrast(self) -> float:
        return 1.0 if self.population is None else self.population.contrast

    def _checked_digest(self) -> str | None:
        if self.particles is None:
            return self.particles_digest
        digest = self.particles.metadata_digest()
        if self.particles_digest not in (None, digest):
            raise ValueError(
                "expected the particles of the result, got others with the same ids: their poses, "
                "CTFs, box or pixel size differ; try the particles that it was made of"
            )
        return digest

    def _checked_ids(self, n: int) -> np.ndarray:
        if self.particles is not None:
            if len(self.particles):
                require_same_images(self.model, self.particles)
            if self.ids is None:
                require_count(n, len(self.particles), "particles")
                return self.particles.ids
            require_same_ids(self.ids, self.particles.ids, "particles")
        if self.ids is None:
            return np.array([f"{i + 1:06d}" for i in range(n)], dtype=object)
        ids = plain_ids(self.ids)
        require_count(n, len(ids), "ids")
        return ids

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows) -> "Result":
        rows = positions(rows, len(self))
        latents = self.latents[rows]
        std = None if self.std is None else self.std[rows]
        particles = None if self.particles is None else self.particles[rows]
        given = self._given
        return replace(
            self,
            latents=latents,
            std=std,
            **{name: values[rows] for name, values in self._columns().items()},
            particles=particles,
            ids=self.ids[rows],
            particles_digest=None,
            _given=None if given is None else _Given(given.result[rows], latents, std, particles),
        )

    def _columns(self) -> dict[str, Any]:
        """Those of scale, noise, misfit and responsibility that are known."""
        columns = {name: getattr(self, name) for name in _COLUMNS}
        return {name: values for name, values in columns.items() if values is not None}

    @property
    def shows_molecule(self) -> np.ndarray:
        """(N,) bool: particles that more likely than not show the molecule at their pose.

        All of them where that was not asked of the images. The others are kept, and left out of
        principal motions.
        """
        if self.responsibility is None:
            return np.ones(len(self), dtype=bool)
        return (self.responsibility > 0.5).numpy()

    @torch.no_grad()
    def decode(self, rows=slice(None)) -> Tensor:
        """(n, n_atoms, 3) coordinates in Å of the particles at `rows`, by default of all."""
        return self.model.decode(self.latents[positions(rows, len(self))])

    @cached_property
    def imaging_model(self) -> Model:
        """The model with the beads that the population learned: what images are expected to be."""
        beads = None if self.population is None else self.population.beads
        return self.model.with_beads(beads)

    @cached_property
    def verdict(self) -> Verdict | None:
        """Whether the refinement is to be trusted, and why; None for other results."""
        if self.population is None or not self.history or "support" not in self.history[-1]:
            return None
        shown = np.flatnonzero(self.shows_molecule)
        some = self[shown[:: max(1, -(-len(shown) // _JUDGED))]]
        finite = some[some.latents.isfinite().all(1).numpy()]
        junk = 1 - len(shown) / max(len(self), 1)
        latents = finite.in_frame(None).latents
        verdict = judge(self.model, self.population, self.history, latents, junk)
        if self.kind != "estimated":
            return verdict
        # The last of two steps is still a long one, and ends where it should.
        return Verdict(tuple(part for part in verdict.findings if part.name != "convergence"))

    @checked
    def in_frame(self, frame: str | None = MOLECULE) -> "Result":
        """The same conformations in another frame, with particles whose poses are corrected for it.

        A turn or shift that all chains share changes the pose and not the conformation. In the
        frame of the poses it is among the latents, as an error of a pose is; in the others it is
        taken out of them and put into ``particles.rotations`` and ``shifts``, so that images of
        both are the same. ``result.in_frame().particles.save("x.star", images=False)`` writes the
        corrected poses.

        Parameters
        ----------
        frame : str, optional
            - "molecule": every conformation superposed on the reference.
            - A chain's id: that chain neither turns nor shifts.
            - "poses": the result that this one was made of, as it was.
            - None: this result's own frame; in place of "poses" it is "molecule", where chains turn
              and shift and more can change than a pose.

        Returns
        -------
        Result
            Error bars are √diag(J diag(std²) Jᵀ), with J the derivative of the latents by the given
            ones: correlations among those are neglected, and `posterior_covariance` has them. The
            population is that of the poses' frame.

        Raises
        ------
        ValueError
            For an unknown frame, latents that are not finite, or when chains do not both turn and
            shift in this model.

        Examples
        --------
        >>> from cryochains import Model, load_structure
        >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
        >>> result = Result(model, torch.tensor([[0.0, 0, 0, 3, 0, 0, 0, 0, 0, 3, 0, 0]]))
        >>> seen = result.in_frame()  # both chains shift by 3 Å: nothing moves in the molecule
        >>> seen
        Result(1 particles, given, 12 latents of 'glua3-closed', frame of the molecule)
        >>> bool(seen.latents.abs().max() < 1e-4), seen.in_frame("poses") is result
        (True, True)
        """
        given = self if self._given is None else self._given.result
        frame = chosen_frame(self.model, frame, self.frame)
        if frame == self.frame:
            return self
        if frame == POSES:
            return given
        require_finite_latents(given.latents)
        seen = in_frame(self.model.dynamics, given.latents, frame)
        latents = seen.latents.float()
        std = given.std
        if std is not None:
            std = std_in_frame(self.model, given.latents, std, frame)
        particles = given.particles
        if particles is not None:
            particles = corrected_particles(particles, seen, self.model)
        return replace(
            given,
            latents=latents,
            std=std,
            particles=particles,
            particles_digest=None,
            frame=frame,
            _given=_Given(given, latents, std, particles),
        )

    @property
    def pose_correction(self) -> PoseCorrection:
        """By how much the given poses change in this result's frame, with error bars.

        In the frame of the poses: by how much they would in that of the molecule.
        """
        given = self.in_frame(POSES)
        require_finite_latents(given.latents)
        frame = MOLECULE if self.frame == POSES else self.frame
        return pose_correction(self.model, given.latents, given.std, given.particles, frame)

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all, that opens without anything else.

        It holds the structure, its bodies and modes, but no images: it remembers the .star or
        .cs file that they came from, see `load_result`. In another frame, it holds the given
        latents and poses, and the name of the frame.
        """
        self.in_frame(POSES)._write(path, self.frame)

    def _write(self, path: str | os.PathLike, frame: str) -> None:
        tensors, model_meta = pack_model(self.model)
        tensors |= {"latents": self.latents, "ids": pack_text(self.ids)}
        tensors |= self._columns()
        meta: dict[str, Any] = {
            "kind": RESULT_KIND,
            "answer": self.kind,
            "frame": frame,
            "model": model_meta,
            "history": list(self.history),
            "population": None,
            "source": None,
            "digest": self.particles_digest,
            "images": None,
        }
        if self.std is not None:
            tensors["std"] = self.std
        if self.population is not None:
            tensors |= {f"population/{k}": v for k, v in self.population.tensors().items()}
            meta["population"] = self.population.description()
        if self.particles is not None and self.particles.source is not None:
            tensors["rows"] = torch.from_numpy(np.asarray(self.particles.rows))
            meta["images"] = _image_digest(self.particles)
            source = self.particles.source
            relative = os.path.relpath(source_path(source), Path(path).resolve().parent)
            meta["source"] = {**source, "relative": relative}
        save_tensors(path, tensors, meta)

    def __repr__(self) -> str:
        size = f"{len(self):,} particles, {self.kind}"
        latents = f"{self.model.n_latents} latents of {self.model.structure.name!r}"
        parts = [size, latents]
        if self.population is not None:
            parts.append(f"spread {float(self.population.covariance.trace()) ** 0.5:.2f} Å")
        n_others = int((~self.shows_molecule).sum())
        if n_others:
            parts.append(f"{n_others:,} flagged as junk")
        verdict = self.verdict
        if verdict is not None and verdict.grade != "good":
            parts.append(verdict.grade)
        if self.frame != POSES:
            parts.append(frame_words(self.frame))
        return f"Result({', '.join(parts)})"


@checked
def load_result(path: str | os.PathLike, particles: ParticleStack | None = None) -> Result:
    """Open a result that ``Result.save`` wrote; nothing else is needed.

    Parameters
    ----------
    path : path
        A file, or the folder of a run of ``cryochains refine``.
    particles : ParticleStack, optional
        The particles of the result, in any order, possibly among others: they are found by id, and
        have the given poses, whatever the frame of the result. By default they are opened from the
        .star or .cs file they came from, where it still is: first beside the result's file as it
        was, then at its absolute path. A result of someone else names paths on this machine too:
        only tables with these suffixes are opened, nothing is fetched, and particles with other
        ids, poses or CTFs than those that the result was made of are left out, with a warning.

    Returns
    -------
    Result
        Its `particles` are None where they were only in memory, or are not found; in the second
        case a warning says why.

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no such file, it is damaged, or `particles` are not those of the result.

    Examples
    --------
    >>> from cryochains import Model, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> Result(model, torch.ones(5, 12), ids=[3, 1, 4, 2, 5]).save("results/doc/r.safetensors")
    >>> load_result("results/doc/r.safetensors").ids.tolist()
    [3, 1, 4, 2, 5]
    """
    if Path(path).is_dir():
        path = Path(path) / RESULT_FILE
    tensors, meta = load_tensors(path, RESULT_KIND)
    try:
        result = _unpack_result(tensors, meta)
        source = meta["source"]
        if source is not None:
            source = {**source, "relative": str(source["relative"])}
            source_path(source)
        frame = meta["frame"]
        digests = (meta["digest"], meta["images"])
        rows = None if source is None else tensors["rows"].numpy()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected a result file, got one that is damaged at {path} "
            f"({type(error).__name__}: {error}); try another copy of it"
        ) from error
    if particles is not None:
        result = replace(result, particles=select_by_id(particles, result.ids))
    elif rows is not None:
        stack = _reopen(source, rows, digests, Path(path).resolve().parent)
        result = result if stack is None else replace(result, particles=stack)
    return result.in_frame(frame)


def _unpack_result(tensors: dict[str, Tensor], meta: dict) -> Result:
    population = None
    if meta["population"] is not None:
        prefix = "population/"
        parts = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        population = Population.restore(parts, meta["population"])
    columns: dict[str, Any] = {name: tensors[name] for name in _COLUMNS if name in tensors}
    return Result(
        unpack_model(tensors, meta["model"]),
        tensors["latents"],
        tensors.get("std"),
        population,
        ids=np.array(unpack_text(tensors["ids"]), dtype=object),
        **columns,
        history=meta["history"],
        kind=meta["answer"],
        particles_digest=meta["digest"],
    )


def _reopen(source: dict, rows: np.ndarray, digests: tuple, folder: Path) -> ParticleStack | None:
    """The particles of a saved result, or None, with a warning, where they are no longer there."""
    metadata, images = digests
    reason = "it is not there"
    arguments = {name: value for name, value in source.items() if name != "relative"}
    for table in (folder / source["relative"], Path(source_path(source))):
        if table.suffix not in _TABLE_SUFFIXES or not table.is_file():
            continue
        try:
            stack = open_source(arguments, table)[rows]
        except (ValueError, IndexError, FileNotFoundError) as error:
            reason = str(error)
            continue
        if stack.metadata_digest() != metadata:
            reason = "its particles, poses or CTFs are not those that the result was made of"
        elif images not in (None, _image_digest(stack)):
            reason = "its images are not those that the result was made of"
        else:
            return stack
    warnings.warn(
        f"the result opens without its particles: {source_path(source)} was read when it was made, "
        f"and now {reason}; try load_result(path, particles=…)",
        stacklevel=4,
    )
    return None


def _image_digest(particles: ParticleStack) -> str | None:
    """Hash of some images; None where they cannot be read, which is no reason not to save."""
    try:
        return particles.image_digest()
    except (ValueError, OSError):
        return None


def _plain(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().cpu().float()


def _same_tensor(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory: nothing is compared of a million particles."""
    if one is None or other is None:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


@torch.no_grad()
@checked
def posterior_covariance(result: Result, rows, device: str | torch.device | None = None) -> Tensor:
    """(k, p, p) posterior covariance of the particles at `rows`, in latent units (about Å²).

    Computed on demand from the geometry of their images, none of which is read: storing it for all
    particles would take N·p² numbers. In another frame than that of the poses it is J C Jᵀ, with C
    of the given latents and J the derivative by them.

    Raises
    ------
    ValueError
        When the result has no population, as of an encoder, or no particles.
    """
    population = result.population
    if population is None:
        raise ValueError(
            f"expected a refined result, whose noise is known, got {result!r}; try refine"
        )
    if result.particles is None:
        raise ValueError(
            f"expected a result with its particles, got {result!r} without; "
            "try load_result(path, particles)"
        )
    chosen = positions(rows, len(result))
    if result.frame != POSES:
        given = result.in_frame(POSES)
        covariance = posterior_covariance(given, chosen, device)
        dynamics = result.model.dynamics
        jacobian = frame_jacobian(dynamics, given.latents[chosen], result.frame)
        by_given = jacobian.latents.to(covariance)
        return by_given @ covariance @ by_given.mT
    device = choose_device(device)
    model = result.imaging_model.to(device)
    latents = result.latents[chosen].to(device)
    prior = population.covariance.to(device).inverse()
    spectrum = population.noise_spectrum
    spectrum = None if spectrum is None else spectrum.to(device)
    scale, noise = result.scale[chosen].to(device), _noise_of(result)[chosen].to(device)
    covariances = []
    for batch in result.particles[chosen].batches(64, device=device, images=False):
        z = latents[batch.rows]
        variance = None
        # Atoms are as wide as they are uncertain: first sharp, then as the refinement saw them.
        for _ in range(2):
            equations = normal_equations(
                model, None, batch.pose, z, noise_spectrum=spectrum, variance=variance
            )
            information = information_of(
                equations, scale[batch.rows], noise[batch.rows], population
            )
            covariance = (information + prior).inverse()
            variance = position_variance(model.bead_dynamics, z, batch.pose[0], covariance)
        covariances.append(covariance)
    covariance = torch.cat(covariances)
    if result.std is not None:
        std = result.std[chosen].to(device)
        wide = is_wide(model, std)
        covariance[wide] = with_error_bars(covariance[wide], std[wide])
    return covariance


def _noise_of(result: Result) -> Tensor:
    """(N,) standard deviation of each image's noise; where it is not known, the population's."""
    level = result.population.noise_std if result.population is not None else math.nan
    if result.noise is None:
        return torch.full((len(result),), level)
    return torch.where(result.noise.isfinite(), result.noise, torch.full_like(result.noise, level))
