"""What is known of particles while they are refined together, and how a run's folder keeps it."""

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._files import content_digest
from .._processes import agree, own_share
from ..images import ParticleStack
from ..model import ElasticPrior, Model, Population, elastic_prior, require_same_model
from .folder import RunFolder
from .image_model import MODEL_ERROR, FirstLook
from .likelihood import NormalEquations
from .posterior import LatentPrior, latent_prior
from .search import Starts

# Of a refinement's folder, and what the names of its states begin with.
RUN_KIND = "refinement"
BLOCK_NAME = "block"
# Particles whose normal equations are solved at a time.
_SOLVE_BLOCK = 64


@dataclass(frozen=True, eq=False)
class State:
    """What is known after a pass, of each particle and of all; a run's folder keeps just this.

    Attributes
    ----------
    proposal : (n, p) tensor
        Latents to look at in the next pass; after the last one, the answer.
    latents : (n, p) tensor
        Latents that the images were last linearised at.
    std : (n, p) tensor
        Posterior standard deviations.
    log_scale : (n,) tensor
    noise_variance : (n,) tensor
    misfit : (n,) tensor
        χ² per pixel where the molecule shows, under the noise that all particles share.
    responsibility : (n,) tensor
    evidence : (n,) float64 tensor
        Log evidence of the molecule at its pose.
    powers : (n, 3) float64 tensor
        ‖y‖², ⟨y, f⟩ and ⟨f, f⟩ at `latents`; infinite ‖y‖² where there are none of the same noise
        spectrum and blur.
    damping : (n,) tensor
        Of Levenberg–Marquardt; 0 for particles whose steps never made things worse.
    variance : (n, n_beads) tensor
        Å², how uncertain each bead's position on the image is.
    mean, covariance : (p,) and (p, p) float64 tensors
    own_mean, wide_covariance : (p,) and (p, p) float64 tensors
        What EM goes on from: of these particles alone, and before directions were narrowed, since
        narrow ones hardly turn.
    noise_spectrum : (R,) float64 tensor
    scale_mean, scale_spread : float
        m and τ.
    noise_level : float
        σ², what the particles' noise variances have in common; 0 before the first pass.
    noise_pixels : float
    spectrum_level : float
        σ² that belongs to `noise_spectrum` on rings that were not measured yet.
    junk_share : float
    support : float
        Log evidence that an image shows the molecule at its pose, over that it shows something
        else of the same power: of the middle particle.
    rank : int
        Directions in which particles vary by more than chance.
    history : tuple of dict
    """

    proposal: Tensor
    latents: Tensor
    std: Tensor
    log_scale: Tensor
    noise_variance: Tensor
    misfit: Tensor
    responsibility: Tensor
    evidence: Tensor
    powers: Tensor
    damping: Tensor
    variance: Tensor
    mean: Tensor
    covariance: Tensor
    own_mean: Tensor
    wide_covariance: Tensor
    noise_spectrum: Tensor
    scale_mean: float
    scale_spread: float
    noise_level: float = 0.0
    noise_pixels: float = 0.0
    spectrum_level: float = 0.0
    junk_share: float = 0.02
    support: float = 0.0
    rank: int = 0
    history: tuple[dict, ...] = ()


_STATE_TENSORS = (
    "proposal",
    "latents",
    "std",
    "log_scale",
    "noise_variance",
    "misfit",
    "responsibility",
    "evidence",
    "powers",
    "damping",
    "variance",
    "mean",
    "covariance",
    "own_mean",
    "wide_covariance",
    "noise_spectrum",
)
# Of them, those that hold what is known of each particle in the end.
PARTICLE_TENSORS = _STATE_TENSORS[:8]
_STATE_NUMBERS = (
    "scale_mean",
    "scale_spread",
    "noise_level",
    "noise_pixels",
    "spectrum_level",
    "junk_share",
    "support",
    "rank",
)


@dataclass(frozen=True, eq=False)
class Taught:
    """What some particles taught the population.

    Attributes
    ----------
    n : int
        So many they were.
    wide_covariance : (p, p) float64 tensor
        As of `State`, but of all of them.
    """

    n: int
    wide_covariance: Tensor


@dataclass(frozen=True, eq=False)
class Run:
    """What stays the same while some particles are refined together.

    Attributes
    ----------
    model : Model
        On the device that computes.
    particles : ParticleStack
        The n particles, all of whose normal equations are held in memory at a time; all usable.
    look : FirstLook
        Of these and of particles that are not usable.
    start : (n, p) tensor, optional
    population : Population, optional
        Given and not learned.
    taught : Taught, optional
        What the particles before these taught `population`, where these teach it further.
    blurs : tuple of float
    batch_size : int
    folder : RunFolder, optional
        Where what is known is kept after each pass.
    name : str
        Of the state there, such as "block1".
    state : State, optional
        After the first passes, of a run that goes on.
    follows : dict, optional
        Identity of the run whose particles are refined anew with beads that it learned.
    searched : Starts, optional
        Where there are bodies that may turn by any angle, and no start was given.
    """

    model: Model
    particles: ParticleStack
    look: FirstLook
    start: Tensor | None
    population: Population | None
    blurs: tuple[float, ...]
    batch_size: int
    folder: RunFolder | None
    name: str = BLOCK_NAME
    state: State | None = None
    follows: dict[str, str] | None = None
    searched: Starts | None = None
    taught: Taught | None = None

    @property
    def own(self) -> slice:
        """Of the particles, those that this process looks at."""
        return own_share(len(self.particles))

    @cached_property
    def prior(self) -> ElasticPrior:
        """What is thought of the latents before any image is seen."""
        return elastic_prior(self.model.dynamics)


@dataclass(frozen=True, eq=False)
class Linearisation:
    """The images of particles, linearised at ``State.latents``.

    Attributes
    ----------
    equations : NormalEquations
        Of the particles of this process (see `_processes`).
    own : slice
        Which they are, of the n.
    moved : (n, p) tensor
        The step that led here.
    pixels : (R,) float64 tensor
        Independent pixels on each ring of frequencies at this blur.
    n_independent : float
        So many independent pixels tell a variance as exactly.
    refused : int
        Particles that went back because their step made things worse.
    """

    equations: NormalEquations
    own: slice
    moved: Tensor
    pixels: Tensor
    n_independent: float
    refused: int

    @property
    def n_pixels(self) -> float:
        return float(self.pixels.sum())


def image_sums(equations: NormalEquations) -> Tensor:
    """(b, 3) float64 ‖y‖², ⟨y, f⟩ and ⟨f, f⟩."""
    rings = (equations.data_power, equations.overlap, equations.model_power)
    return torch.stack([power.double().sum(1) for power in rings], dim=1)


def residual_power(powers: Tensor, scale: Tensor) -> Tensor:
    """(b,) ‖y − a f‖²."""
    data, overlap, model = powers.unbind(1)
    scale = scale.double()
    return data - 2 * scale * overlap + scale.square() * model


def trusted_noise(state: State, powers: Tensor, rows: Tensor | slice, n_pixels: float) -> Tensor:
    """(b,) σ_i², but no less than what an error of the model makes.

    Before the first pass, all that the image and the model differ by.
    """
    scale = state.log_scale[rows].double().exp()
    least = MODEL_ERROR**2 * scale.square() * powers[:, 2] / n_pixels
    known = state.noise_variance[rows].double()
    measured = residual_power(powers, scale) / n_pixels
    return torch.where(known > 0, known, measured).maximum(least).clamp_min(1e-30)


def prior_of(state: State) -> LatentPrior:
    return latent_prior(state.mean, state.covariance, state.scale_mean, state.scale_spread)


def solve_slices(own: slice) -> list[slice]:
    """Of the particles of this process, those that are solved at a time."""
    starts = range(own.start, own.stop, _SOLVE_BLOCK)
    return [slice(start, min(start + _SOLVE_BLOCK, own.stop)) for start in starts]


# What is kept of a run


def run_identity(run: Run) -> dict[str, str]:
    """What a state must have in common with the run that goes on from it, beside the model."""
    particles, population = run.particles, run.population
    ids = particles.ids.tolist()
    ctf = () if particles.ctf is None else tuple(particles.ctf.values())
    given: tuple = ()
    if population is not None:
        given = (*population.tensors().values(), str(population.description()))
    if run.taught is not None:
        given = (*given, run.taught.n, run.taught.wide_covariance)
    return {
        "particles": content_digest(sorted(map(str, ids))),
        "order of the particles": content_digest(ids),
        "poses": content_digest(particles.rotations, particles.shifts),
        "CTFs": content_digest(*ctf),
        "images": content_digest(run.look.checksums),
        "blurs": ", ".join(f"{blur:g} Å" for blur in run.blurs),
        "start": "none" if run.start is None else content_digest(run.start),
        "population": content_digest(*given) if given else "learned",
    }


def save_state(run: Run, identity: dict[str, str], state: State) -> None:
    """Keep a state in the folder of its run, if it has one."""
    if run.folder is None:
        return
    tensors = {name: getattr(state, name) for name in _STATE_TENSORS}
    meta = {
        "numbers": {name: getattr(state, name) for name in _STATE_NUMBERS},
        "history": state.history,
        "fingerprint": run.model.fingerprint,
        "identity": identity,
    }
    if run.follows is not None and run.start is not None:
        beads = run.model.beads
        parts = {f"beads/{field.name}": getattr(beads, field.name) for field in fields(beads)}
        tensors |= {name: torch.from_numpy(part.copy()) for name, part in parts.items()}
        tensors["start"] = run.start
        meta["follows"] = run.follows
    run.folder.save(run.name, tensors, meta)


def require_same_run(run: Run, kept: dict[str, str], identity: dict[str, str]) -> None:
    """Raise ValueError, with what differs, unless a state is of the run that has this identity."""
    path = None if run.folder is None else run.folder.path
    differing = [name for name, value in identity.items() if kept.get(name) != value]
    if "particles" in differing:
        # All else of other particles differs too.
        differing = ["particles"]
    if "order of the particles" in differing:
        differing = ["order of the particles"]
    if differing:
        raise ValueError(
            f"expected the run of these {len(run.particles):,} particles and settings in {path}, "
            f"got one whose {' and '.join(differing)} differ; try another folder"
        )


def load_state(run: Run, identity: dict[str, str]) -> State | None:
    """The state of a run that was cut; None where there is none yet."""
    kept = None if run.folder is None else run.folder.load(run.name)
    if run.folder is None or kept is None:
        return None
    tensors, meta = kept
    require_same_model(run.model, meta["fingerprint"], f"a run ({run.folder.path})")
    require_same_run(run, meta["identity"], identity)
    if missing := set(_STATE_TENSORS) - set(tensors):
        raise ValueError(
            f"expected a run of this version of cryochains in {run.folder.path}, got an older one "
            f"without {', '.join(sorted(missing))}; try another folder, or that version"
        )
    known: dict[str, Any] = {name: tensors[name].to(run.model.device) for name in _STATE_TENSORS}
    return State(
        **known,
        **meta["numbers"],
        history=tuple(meta["history"]),
    )


def agreed_state(state: State) -> State:
    """With what particles share as the first of several processes has it."""
    names = ("mean", "covariance", "own_mean", "wide_covariance")
    shared: dict[str, Any] = {name: agree(getattr(state, name)) for name in names}
    numbers = torch.tensor([getattr(state, name) for name in _STATE_NUMBERS], dtype=torch.float64)
    shared |= dict(zip(_STATE_NUMBERS, agree(numbers).tolist(), strict=True))
    shared["rank"] = int(shared["rank"])
    return replace(state, **shared)
