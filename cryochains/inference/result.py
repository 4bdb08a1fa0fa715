"""What is known of every particle: latents with error bars, and all that gives them a meaning."""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._devices import choose_device
from .._files import load_tensors, pack_text, save_tensors, unpack_text
from ..images import ParticleStack, load_particles, plain_ids, positions
from ..model import (
    Model,
    Population,
    pack_model,
    require_population,
    require_same_images,
    unpack_model,
)
from .identity import require_count, require_same_ids, select_by_id
from .likelihood import normal_equations, position_variance

RESULT_KIND = "result"
_ANSWER_KINDS = ("refined", "encoded", "given")


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
    contrast : float, optional
        Brightness of the images over the model's; by default the population's, else 1.
    history : sequence of dict
        One record a pass over the images.
    kind : {"refined", "encoded", "given"}
        Where the latents come from; "given" by the caller.
    particles_digest : str, optional
        Hash of the particles' ids, poses and CTFs. A result keeps it, so that other particles with
        the same ids are refused where it is saved, opened or changed by `dataclasses.replace`.

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
    latents: Tensor
    std: Tensor | None = None
    population: Population | None = None
    particles: ParticleStack | None = None
    # None only while a result is made: numbers from 1, or the particles' own.
    ids: Any = None
    contrast: Any = None
    history: Sequence[Mapping] = ()
    kind: str = "given"
    particles_digest: str | None = None

    def __post_init__(self) -> None:
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
            "contrast": self._checked_contrast(),
            "particles_digest": self._checked_digest(),
            "history": tuple(dict(record) for record in self.history),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def _checked_contrast(self) -> float:
        if self.population is None:
            contrast = 1.0 if self.contrast is None else float(self.contrast)
        else:
            contrast = self.population.contrast
            if self.contrast is not None and not math.isclose(self.contrast, contrast):
                raise ValueError(
                    f"expected the population's contrast {contrast:g}, got {self.contrast:g}; "
                    "try leaving it out"
                )
        if not 0 < contrast < math.inf:
            raise ValueError(f"expected a positive contrast, got {contrast:g}; try leaving it out")
        return contrast

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
        return replace(
            self,
            latents=self.latents[rows],
            std=None if self.std is None else self.std[rows],
            particles=None if self.particles is None else self.particles[rows],
            ids=self.ids[rows],
            particles_digest=None,
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
        source = meta["source"]
        digests = (meta["digest"], meta["images"])
        rows = None if source is None else tensors["rows"].numpy()
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ValueError(
            f"expected a result file, got one that is damaged at {path} "
            f"({type(error).__name__}: {error}); try another copy of it"
        ) from error
    if particles is not None:
        return replace(result, particles=select_by_id(particles, result.ids))
    if rows is None:
        return result
    stack = _reopen(source, rows, digests, Path(path).resolve().parent)
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
        contrast=float(meta["contrast"]),
        history=meta["history"],
        kind=meta["answer"],
        particles_digest=meta["digest"],
    )


def _reopen(source: dict, rows: np.ndarray, digests: tuple, folder: Path) -> ParticleStack | None:
    """The particles of a saved result, or None, with a warning, where they are no longer there."""
    metadata, images = digests
    reason = "it is not there"
    for star in (folder / source["relative"], Path(source["star"])):
        if not star.is_file():
            continue
        try:
            stack = load_particles(star, invert=source["invert"])[rows]
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
        f"the result opens without its particles: {source['star']} was read when it was made, and "
        f"now {reason}; try load_result(path, particles=…)",
        stacklevel=3,
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
