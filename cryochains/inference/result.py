"""What is known of every particle: latents with error bars, and all that gives them a meaning."""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._devices import choose_device
from .._files import load_tensors, pack_text, save_tensors, unpack_text
from ..images import ParticleStack, load_particles, positions
from ..model import (
    Model,
    Population,
    pack_model,
    require_population,
    require_same_images,
    unpack_model,
)
from .likelihood import normal_equations, position_variance

RESULT_KIND = "result"
ANSWER_KINDS = ("refined", "encoded", "given")


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """Latents of every particle, one row a particle; what `refine` and `encode` return.

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
        What all particles share, as the refinement learned it.
    particles : ParticleStack, optional
        The particles, in the same order.
    ids : (N,) array, optional
        Strings or integers. By default those of the particles, else numbers from 1.
    contrast : float
        Brightness of the images over the model's.
    history : sequence of dict
        One record a pass over the images.
    kind : {"refined", "encoded", "given"}
        Where the latents come from; "given" by the caller.

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
    latents: Tensor
    std: Tensor | None = None
    population: Population | None = None
    particles: ParticleStack | None = None
    # None only while a result is made: numbers from 1, or the particles' own.
    ids: Any = None
    contrast: float = 1.0
    history: Sequence[Mapping] = ()
    kind: str = "given"

    def __post_init__(self) -> None:
        if self.kind not in ANSWER_KINDS:
            kinds = ", ".join(map(repr, ANSWER_KINDS))
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
            "contrast": float(self.contrast),
            "history": tuple(dict(record) for record in self.history),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _checked_ids(self, n: int) -> np.ndarray:
        if self.particles is not None:
            require_same_images(self.model, self.particles)
            if self.ids is None:
                require_count(n, len(self.particles), "particles")
                return self.particles.ids
            require_same_ids(self.ids, self.particles.ids, "particles")
        if self.ids is None:
            return np.array([f"{i + 1:06d}" for i in range(n)], dtype=object)
        ids = _plain_ids(self.ids)
        require_count(n, len(ids), "ids")
        return ids

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, rows) -> "Result":
        rows = positions(rows, len(self))
        return replace(
            self,
            latents=self.latents[rows],
            std=None if self.std is None else self.std[rows],
            particles=None if self.particles is None else self.particles[rows],
            ids=self.ids[rows],
        )

    @torch.no_grad()
    def decode(self, rows=slice(None)) -> Tensor:
        """(n, n_atoms, 3) coordinates in Å of the particles at `rows`, by default of all."""
        return self.model.decode(self.latents[positions(rows, len(self))])

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all, that opens without anything else.

        It holds the structure, its bodies and modes, but no images: it remembers the .star file
        that they came from, see `load_result`.
        """
        tensors, model_meta = pack_model(self.model)
        tensors |= {"latents": self.latents, "ids": pack_text(self.ids)}
        meta: dict[str, Any] = {
            "kind": RESULT_KIND,
            "answer": self.kind,
            "model": model_meta,
            "contrast": self.contrast,
            "history": list(self.history),
            "population": None,
            "source": None,
            "digest": None,
        }
        if self.std is not None:
            tensors["std"] = self.std
        if self.population is not None:
            tensors |= {f"population/{k}": v for k, v in self.population.tensors().items()}
            meta["population"] = self.population.description()
        if self.particles is not None:
            meta["digest"] = self.particles.metadata_digest()
        if self.particles is not None and self.particles.source is not None:
            tensors["rows"] = torch.from_numpy(np.asarray(self.particles.rows))
            star = os.path.relpath(self.particles.source["star"], Path(path).resolve().parent)
            meta["source"] = {**self.particles.source, "relative": star}
        save_tensors(path, tensors, meta)

    def __repr__(self) -> str:
        size = f"{len(self):,} particles, {self.kind}"
        latents = f"{self.model.n_latents} latents of {self.model.structure.name!r}"
        parts = [size, latents]
        if self.population is not None:
            parts.append(f"spread {float(self.population.covariance.trace()) ** 0.5:.2f} Å")
        return f"Result({', '.join(parts)})"


def load_result(path: str | os.PathLike, particles: ParticleStack | None = None) -> Result:
    """Open a result that ``Result.save`` wrote; nothing else is needed.

    Parameters
    ----------
    path : path
    particles : ParticleStack, optional
        The particles of the result, in any order, possibly among others: they are found by id. By
        default they are opened from the .star file they came from, where it still is: first beside
        the result's file as it was, then at its absolute path.

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
    tensors, meta = load_tensors(path, RESULT_KIND)
    try:
        result = _unpack_result(tensors, meta)
        source, digest = meta["source"], meta["digest"]
        rows = None if source is None else tensors["rows"].numpy()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected a result file, got one that is damaged at {path} "
            f"({type(error).__name__}: {error}); try another copy of it"
        ) from error
    if particles is not None:
        chosen = select_by_id(particles, result.ids)
        if digest is not None and chosen.metadata_digest() != digest:
            raise ValueError(
                "expected the particles of the result, got others with the same ids: their poses, "
                "CTFs, box or pixel size differ; try the particles that it was made of"
            )
        return replace(result, particles=chosen)
    if rows is None:
        return result
    stack = _reopen(source, rows, digest, Path(path).resolve().parent)
    return result if stack is None else replace(result, particles=stack)


def _unpack_result(tensors: dict[str, Tensor], meta: dict) -> Result:
    population = None
    if meta["population"] is not None:
        parts = {name: tensors[f"population/{name}"] for name in ("mean", "covariance")}
        population = Population.restore(parts, meta["population"])
    return Result(
        unpack_model(tensors, meta["model"]),
        tensors["latents"],
        tensors.get("std"),
        population,
        ids=np.array(unpack_text(tensors["ids"]), dtype=object),
        contrast=meta["contrast"],
        history=meta["history"],
        kind=meta["answer"],
    )


def _reopen(source: dict, rows: np.ndarray, digest: str, folder: Path) -> ParticleStack | None:
    """The particles of a saved result, or None, with a warning, where they are no longer there."""
    reason = "it is not there"
    for star in (folder / source["relative"], Path(source["star"])):
        if not star.is_file():
            continue
        try:
            stack = load_particles(star, invert=source["invert"])[rows]
            if stack.metadata_digest() == digest:
                return stack
            reason = "its particles, poses or CTFs are not those that the result was made of"
        except (ValueError, IndexError, FileNotFoundError) as error:
            reason = str(error)
    warnings.warn(
        f"the result opens without its particles: {source['star']} was read when it was made, and "
        f"now {reason}; try load_result(path, particles=…)",
        stacklevel=3,
    )
    return None


def _plain(values: Tensor) -> Tensor:
    return torch.as_tensor(values).detach().cpu().float()


def _plain_ids(ids: Iterable) -> np.ndarray:
    """(N,) object array of Python's strings and integers, which a file can keep."""
    plain: list[str | int] = []
    for one in ids:
        if isinstance(one, (str, int)):
            plain.append(one)
        elif isinstance(one, np.integer):
            plain.append(int(one))
        else:
            raise ValueError(
                f"expected ids that are strings or integers, got {one!r}; try str of each"
            )
    return np.array(plain, dtype=object)


def require_count(expected: int, got: int, what: str) -> None:
    """Raise ValueError when there is not one of `what` for each of the `expected` particles."""
    if expected != got:
        raise ValueError(
            f"expected {expected:,} {what}, one a row of latents, got {got:,}; "
            "try the same selection of both"
        )


def require_same_ids(expected: Iterable, got: Iterable, what: str) -> None:
    """Raise ValueError when two lists of particles' ids are not the same in the same order."""
    expected, got = list(expected), list(got)
    if expected == got:
        return
    if len(expected) != len(got):
        raise ValueError(
            f"expected {len(expected):,} {what}, one for each particle, got {len(got):,}; "
            "try the same selection of both"
        )
    row = next(i for i, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
    same = sorted(map(str, expected)) == sorted(map(str, got))
    order = "the same ones in another order" if same else "others"
    raise ValueError(
        f"expected {what} with the ids of the result, got {order}: row {row} is {got[row]!r} "
        f"instead of {expected[row]!r}; try load_result(path, particles), which finds them by id"
    )


def select_by_id(particles: ParticleStack, ids: Iterable) -> ParticleStack:
    """Those of `particles` with the given `ids`, in the order of the `ids`.

    Raises
    ------
    ValueError
        When an id is missing, or stands for several particles.
    """
    ids = list(ids)
    if list(particles.ids) == ids:
        return particles
    rows: dict = {}
    repeated = set()
    for row, name in enumerate(particles.ids):
        if name in rows:
            repeated.add(name)
        rows[name] = row
    missing = [name for name in ids if name not in rows]
    if missing:
        raise ValueError(
            f"expected particles with the ids of the result, got none with {len(missing):,} of "
            f"them, such as {missing[0]!r}; try the .star file that was refined"
        )
    ambiguous = [name for name in ids if name in repeated]
    if ambiguous:
        raise ValueError(
            f"expected one particle an id, got several with {ambiguous[0]!r}; "
            "try the particles in the order of the result"
        )
    return particles[[rows[name] for name in ids]]


@torch.no_grad()
def posterior_covariance(result: Result, rows, device: str | torch.device | None = None) -> Tensor:
    """(k, p, p) posterior covariance of the particles at `rows`, in latent units (about Å²).

    Computed on demand from the geometry of their images, none of which is read: storing it for all
    particles would take N·p² numbers.

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
    device = choose_device(device)
    model = result.model.to(device)
    chosen = positions(rows, len(result))
    latents = result.latents[chosen].to(device)
    prior = population.covariance.to(device).inverse()
    covariances = []
    for batch in result.particles[chosen].batches(64, device=device, images=False):
        z = latents[batch.rows]
        variance = None
        # Atoms are as wide as they are uncertain: first sharp, then as the refinement saw them.
        for _ in range(2):
            equations = normal_equations(
                model, None, batch.pose, z, contrast=result.contrast, variance=variance
            )
            information = equations.hessian.double() / population.noise_std**2
            covariance = (information + prior).inverse()
            variance = position_variance(model.dynamics, z, batch.pose[0], covariance)
        covariances.append(covariance)
    return torch.cat(covariances)
