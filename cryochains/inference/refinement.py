"""Every particle's latents by maximum a posteriori, under a population learned by EM.

Symbols: z → `latents`, μ, Σ → `Population.mean`, `covariance`, a = e^b → `scale`, the brightness of
a particle, σ_i² → `noise_variance`, r → `responsibility`, the probability that a particle shows the
molecule at its pose. For every particle

    ½ ‖y − a f(z)‖²/σ_i² + ½ (z − μ)ᵀ Σ⁻¹ (z − μ) + ½ (b − m)²/τ²

is minimised by Levenberg–Marquardt with the analytic Jacobian, coarse to fine. After each pass over
the images, EM re-estimates μ, Σ, m, τ and the noise from all particles on the stored normal
equations, which needs no image:

    C_i = (a² H_i/σ_i² + Σ⁻¹)⁻¹,  μ = mean z_i,  Σ = mean[(z_i − μ)(z_i − μ)ᵀ + C_i]

where a particle counts r_i in a mean (e.g. Bishop, PRML, section 9.4), with b as one more latent; Σ
is shrunk towards the elastic network's own prior (variance of α_k ∝ 1/λ_k), which decides when
particles are few; in the end, what of it follows the viewing direction is damped (`gate`). What an
image has of its own is in `image_model`.

A pass is three steps, each a function from one `_State` to the next: `_linearise` (reads the
images), `_learn` (EM) and `_propose` (the next latents).
"""

import math
import os
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans
from torch import Tensor
from tqdm.auto import tqdm

from .._devices import choose_device
from .._files import content_digest, load_tensors, save_tensors
from ..images import ParticleStack
from ..model import (
    ElasticPrior,
    Microscope,
    Model,
    Population,
    count_directions,
    elastic_prior,
    require_population,
    require_same_images,
    require_same_model,
    shrink_covariance,
    with_less_rest,
)
from ..molecule import Beads
from . import image_model
from .averaging import ImageFit, average_along_line, is_wide
from .check import require_sound
from .gate import damp_following, view_features
from .identity import require_latents, require_same_ids
from .image_model import MODEL_ERROR, FirstLook
from .likelihood import (
    NormalEquations,
    Sampler,
    frequency_band,
    image_powers,
    join_equations,
    map_blocks,
    normal_equations,
    position_variance,
)
from .posterior import LatentPrior, latent_prior, solve_particles
from .reference import learn_beads, unbent
from .result import Result
from .search import Starts, search_turns, turning_bodies

# Å. Each pass sees a little more detail; the last ones see the images as they are.
_BLURS = (8.0, 6.0, 4.0, 2.0, 0.0, 0.0)
# Passes at the last blur go on, up to so many, while particles still move by more than _CONVERGED
# (RMS Å).
_MAX_EXTRA_PASSES = 4
_CONVERGED = 0.1
# EM on the stored normal equations: few steps while they will be made anew, more at the end; it
# stops at a change in Å.
_EM_STEPS = 10
_LAST_EM_STEPS = 20
_EM_TOLERANCE = 3e-3
# The variance of directions that are not leading ones is halved at most so many times.
_MOST_HALVINGS = 6
# What is left of the variance of a direction that is not a leading one after all.
_GIVEN_UP = 0.1
# EM steps where the population is given: for what a particle has of its own.
_OWN_STEPS = 3
# Log brightness changes by no more in a step.
_MAX_SCALE_STEP = 0.5
# Of a ring's pixels, left by the blur: on rings with fewer the noise is not measured.
_MIN_RING_SHARE = 0.01
# Standard deviations (as a MAD tells) beyond the median distance from the population's mean at
# which a particle is thought to be stuck, and the blurs (Å) of its second start, before the run's
# last one.
_STUCK_DEVIATIONS = 6.0
_RESTART_BLURS = (4.0,)
# Where it begins, beside the population's mean: so many points at which other particles gather.
_STARTS = 8
# A population that learned of them tells better which ones are stuck: at most so many rounds.
_ROUNDS = 3
# Nats by which the second orientation of a body that may turn by any angle is less likely, in the
# search, where it is refined too.
_SECOND_BEST = 15.0
# Where images ask for other beads they are learned so many times, and particles then refined anew
# from at most these blurs (Å) on.
_DENSITY_BLURS = (4.0, 0.0)
# Twice the nats by which a particle is less likely than where it started before it goes back.
_LESS_LIKELY = 0.2
# Particles whose normal equations are solved at a time.
_SOLVE_BLOCK = 64
_CHECKPOINT_KIND = "refinement checkpoint"


def refine(
    model: Model,
    particles: ParticleStack,
    population: Population | None = None,
    *,
    start: Result | Tensor | None = None,
    blurs: Sequence[float] = _BLURS,
    n_population: int = 4000,
    batch_size: int = 64,
    check: bool = True,
    seed: int = 0,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Result:
    """Find the latents of every particle, with error bars.

    Parameters
    ----------
    model : Model
        Is not changed.
    particles : ParticleStack
    population : Population, optional
        Known from earlier, as when scoring held-out particles; None learns it from these.
    start : Result or (N, p) tensor, optional
        Where to start, such as what an encoder answered; by default the population's mean or the
        reference, with bodies that may turn by any angle (`Structure.with_turning`) in the
        orientation that fits each image best.
    blurs : sequence of float
        Å, one a pass over the images. The longest should be about the largest motion expected.
    n_population : int
        The population is learned from at most this many particles, which keeps memory from growing.
    batch_size : int
        Images read at a time.
    check : bool
        Where a population is learned, refuse particles that are certainly misread: of the other
        hand, sign or axes, of other rows or CTFs. See `cryochains.check`.
    seed : int
        Chooses the particles that the population is learned from.
    checkpoint : path, optional
        Written after every pass; a run that was cut resumes from it and gives the same numbers.
        Files beside it have ``.density1`` and ``.density2`` (of particles refined anew with other
        beads) and ``.block1``, ``.block2``, … (of more than `n_population` particles) after its
        name. Where there is no checkpoint yet, such files are of an earlier run and are removed.
    device : torch device, optional
        By default a GPU where there is one.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Result
        Latents, error bars and the population, in the order of the particles.

    Raises
    ------
    ValueError
        When the particles do not fit the model, the population, start or checkpoint is of another
        model, the images are the negative of the reference or show nothing of it, or they
        certainly show it read otherwise than the table is given.

    Warns
    -----
    UserWarning
        Of images that are constant or hold NaN or Inf, which are left out: with responsibility 0,
        and the population's mean and spread for latents and error bars.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> refine(model, particles, blurs=(4.0, 0.0), progress=False)
    Result(8 particles, refined, 12 latents of 'glua3-closed', spread ... Å)
    """
    blurs = tuple(float(blur) for blur in np.atleast_1d(blurs))
    if n_population < 1:
        raise ValueError(f"expected n_population of 1 or more, got {n_population}; try 4000")
    first = _checked_start(model, particles, population, start, blurs)
    _remove_older_files(checkpoint)
    n = len(particles)
    given = model
    model = model.to(choose_device(device))
    if population is not None:
        model = model.with_beads(population.beads)
    answer = _ParticleAnswers.empty(n, model.n_latents)
    history: tuple[dict, ...] = ()
    left_out: list[np.ndarray] = []
    broken: list[np.ndarray] = []
    for number, rows in enumerate(_blocks(n, population is None, n_population, seed)):
        look = image_model.look_first(model, particles[rows], batch_size)
        image_model.require_visible(look, population is None)
        usable = look.usable.numpy()
        if check and population is None and first is None:
            require_sound(model, particles, rows[usable])
        left_out.append(rows[~usable])
        broken.append(rows[~look.finite.numpy()])
        state = None
        if usable.any():
            run = _Run(
                model=model,
                particles=particles[rows[usable]],
                look=look,
                start=None if first is None else first[rows[usable]],
                population=population,
                blurs=blurs,
                batch_size=batch_size,
                checkpoint=_block_path(checkpoint, number),
            )
            if first is None and turning_bodies(model):
                run = replace(run, searched=_searched(run, progress))
            learns = population is None
            if population is None:
                run, state, population = _learn_population(given, run, progress)
                model = run.model
            else:
                state = _run_passes(run, progress)
            for _ in range(_ROUNDS if learns else 1):
                state, rescued = _start_again(run, state, population)
                if not learns or not rescued.any():
                    break
                state = _learn_once_more(run, state, rescued, progress)
                population = _learned_population(model, state, population.beads)
            history = history or state.history
            state = _averaged(run, _no_worse_than_start(run, state))
        answer.fill(rows, usable, state, population)
    _warn_of(np.concatenate(left_out), np.concatenate(broken), particles.ids)
    return Result(
        given,
        answer.latents,
        answer.std,
        population,
        particles,
        scale=answer.scale,
        noise=answer.noise,
        misfit=answer.misfit,
        responsibility=answer.responsibility,
        history=history,
        kind="refined",
    )


@dataclass(frozen=True, eq=False)
class _ParticleAnswers:
    """What `refine` returns of each particle, filled block by block; fields as of `Result`."""

    latents: Tensor
    std: Tensor
    scale: Tensor
    noise: Tensor
    misfit: Tensor
    responsibility: Tensor

    @classmethod
    def empty(cls, n: int, n_latents: int) -> "_ParticleAnswers":
        values = [torch.zeros(n) for _ in range(4)]
        return cls(torch.zeros(n, n_latents), torch.zeros(n, n_latents), *values)

    def fill(
        self,
        rows: np.ndarray,
        usable: np.ndarray,
        state: "_State | None",
        population: Population | None,
    ) -> None:
        """Rows of one block; those that are not usable are known to be in the population."""
        if population is None:
            return
        unusable = torch.from_numpy(rows[~usable])
        self.latents[unusable] = population.mean.float()
        self.std[unusable] = population.covariance.diagonal().sqrt().float()
        self.scale[unusable] = population.contrast
        self.noise[unusable] = torch.nan
        self.misfit[unusable] = torch.nan
        if state is None:
            return
        known = torch.from_numpy(rows[usable])
        self.latents[known] = state.proposal.cpu()
        self.std[known] = state.std.cpu()
        self.scale[known] = state.log_scale.exp().cpu()
        self.noise[known] = state.noise_variance.sqrt().cpu()
        self.misfit[known] = state.misfit.cpu()
        self.responsibility[known] = state.responsibility.cpu()


def _warn_of(left_out: np.ndarray, broken: np.ndarray, ids: np.ndarray) -> None:
    """One warning of the rows that were left out, and of those of them that are not finite."""
    usable = torch.ones(len(ids), dtype=torch.bool)
    finite = usable.clone()
    usable[torch.from_numpy(left_out)] = False
    finite[torch.from_numpy(broken)] = False
    problem = image_model.describe_unusable(usable, finite, ids.tolist())
    if problem is not None:
        warnings.warn(problem, stacklevel=3)


def _checked_start(
    model: Model,
    particles: ParticleStack,
    population: Population | None,
    start: Result | Tensor | None,
    blurs: tuple[float, ...],
) -> Tensor | None:
    """Latents to start from; ValueError for what does not belong together."""
    require_same_images(model, particles)
    if not blurs or not all(0 <= blur < np.inf for blur in blurs):
        raise ValueError(
            f"expected blurs of 0 Å or more, one or several, got {list(blurs)}; try blurs=(0.0,)"
        )
    if population is not None:
        require_population(model, population)
    if start is None:
        return None
    if isinstance(start, Result):
        require_same_model(model, start.model.fingerprint, "a result to start from")
        require_same_ids(start.ids, particles.ids, "particles")
        digest = particles.metadata_digest()
        if start.particles_digest != digest:
            # Latents in another frame belong to corrected poses.
            start = start.in_frame("poses")
        if start.particles_digest not in (None, digest):
            raise ValueError(
                "expected a result of these particles to start from, got one of others with the "
                "same ids: their poses, CTFs, box or pixel size differ; try start=result.latents"
            )
        start = start.latents
    start = torch.as_tensor(start)
    require_latents(start, len(particles), model, "start latents")
    return start


def _blocks(n: int, learns: bool, n_population: int, seed: int) -> list[np.ndarray]:
    """Rows that are refined together: first those the population is learned from.

    The others follow in blocks of about the same size, so that memory does not grow with n.
    """
    chosen = np.zeros(n, dtype=bool)
    if learns:
        chosen[np.random.default_rng(seed).permutation(n)[:n_population]] = True
    blocks = [np.flatnonzero(chosen)] if learns else []
    rest = np.flatnonzero(~chosen)
    if len(rest):
        blocks += np.array_split(rest, -(-len(rest) // n_population))
    return blocks


def _block_path(checkpoint: str | os.PathLike | None, number: int) -> Path | None:
    if checkpoint is None:
        return None
    return Path(checkpoint) if number == 0 else Path(f"{checkpoint}.block{number}")


def _remove_older_files(checkpoint: str | os.PathLike | None) -> None:
    """Remove what an earlier run left beside its checkpoint, where that is not there any more."""
    if checkpoint is None or Path(checkpoint).exists() or not Path(checkpoint).parent.is_dir():
        return
    ours = re.compile(re.escape(Path(checkpoint).name) + r"\.(density[12]|block[1-9][0-9]*)")
    for path in Path(checkpoint).parent.iterdir():
        if ours.fullmatch(path.name) and path.is_file():
            path.unlink()


def _learn_population(
    given: Model, run: "_Run", progress: bool
) -> tuple["_Run", "_State", Population]:
    """Refine particles and learn what they share; again with other beads, where they ask for them.

    Returns the run with those beads, the state that it ended in, and the population.
    """
    # The first sharp look shows what the model lacks, before chains have quite bent into it; where
    # none came before it, the last one.
    n_blurred = sum(blur > 0 for blur in run.blurs)
    n_passes = min(n_blurred + 1, len(run.blurs)) if n_blurred else None
    state = _run_passes(run, progress, n_passes)
    result = _result_of(given, run, state, None)
    # A checkpoint from after this was asked says that there was nothing.
    asks = n_passes in (None, len(state.history))
    learn = partial(learn_beads, device=run.model.device, progress=progress)
    again = _begun_with_other_beads(given, run, 1)
    if again is None:
        beads = learn(result, unbent(result)) if asks else None
        if beads is not None:
            again = _with_other_beads(given, run, beads, unbent(result), 1)
    if again is None:
        state = _run_passes(replace(run, state=state), progress)
        return run, state, _learned_population(run.model, state, None)
    # Now that density is known, chains need not bend into it any more.
    beads = again.model.beads
    after = _run_passes(again, progress)
    history = (*state.history, *after.history)
    result = _result_of(given, again, after, beads)
    again = _begun_with_other_beads(given, run, 2)
    if again is None:
        again = _with_other_beads(given, run, learn(result) or beads, result.latents, 2)
    beads = again.model.beads
    after = _run_passes(again, progress)
    state = replace(after, history=(*history, *after.history))
    return replace(again, start=run.start), state, _learned_population(run.model, state, beads)


def _with_other_beads(
    given: Model, run: "_Run", beads: Beads, latents: Tensor, number: int
) -> "_Run":
    """The particles refined anew from `latents`, with beads learned for the `number`th time."""
    blurs = tuple(blur for blur in run.blurs if blur <= _DENSITY_BLURS[number - 1])
    return replace(
        run,
        follows="" if run.checkpoint is None else _identity(run),
        model=given.with_beads(beads).to(run.model.device),
        start=latents,
        blurs=blurs or run.blurs[-1:],
        checkpoint=_density_path(run, number),
    )


def _density_path(run: "_Run", number: int) -> Path | None:
    return None if run.checkpoint is None else Path(f"{run.checkpoint}.density{number}")


def _begun_with_other_beads(given: Model, run: "_Run", number: int) -> "_Run | None":
    """What `_with_other_beads` gave before a run was cut; None where it was not begun.

    Beads that were learned anew would differ by rounding, such as on another machine.
    """
    path = _density_path(run, number)
    if path is None or not path.exists():
        return None
    tensors, meta = load_tensors(path, _CHECKPOINT_KIND)
    if "start" not in tensors:
        return None
    if meta["follows"] != _identity(run):
        raise ValueError(_another_run(run, path))
    names = [field.name for field in fields(Beads)]
    beads = Beads(*(tensors[f"beads/{name}"].numpy() for name in names))
    return _with_other_beads(given, run, beads, tensors["start"], number)


def _result_of(given: Model, run: "_Run", state: "_State", beads: Beads | None) -> Result:
    population = _learned_population(run.model, state, beads)
    return Result(
        given,
        state.proposal.cpu(),
        state.std.cpu(),
        population,
        run.particles,
        scale=state.log_scale.exp().cpu(),
        noise=state.noise_variance.sqrt().cpu(),
        responsibility=state.responsibility.cpu(),
        history=state.history,
        kind="refined",
    )


def _learned_population(model: Model, state: "_State", beads: Beads | None) -> Population:
    return Population(
        state.mean.cpu(),
        state.covariance.cpu(),
        noise_std=state.noise_level**0.5,
        contrast=math.exp(state.scale_mean),
        fingerprint=model.fingerprint,
        contrast_spread=state.scale_spread,
        noise_pixels=state.noise_pixels,
        noise_spectrum=state.noise_spectrum.cpu(),
        junk_share=state.junk_share,
        beads=beads,
        rank=state.rank,
    )


@dataclass(frozen=True, eq=False)
class _Run:
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
    blurs : tuple of float
    batch_size : int
    checkpoint : Path, optional
    state : _State, optional
        After the first passes, of a run that goes on.
    follows : str, optional
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
    checkpoint: Path | None
    state: "_State | None" = None
    follows: str | None = None
    searched: Starts | None = None


@dataclass(frozen=True, eq=False)
class _Constants:
    """What is computed once for a run.

    Attributes
    ----------
    prior : ElasticPrior
    atom_share : (p,) float32 tensor
        Share of the atoms in each latent's chain: turns a step in z into RMS Å over the molecule.
    """

    prior: ElasticPrior
    atom_share: Tensor


@dataclass(frozen=True, eq=False)
class _State:
    """What is known after a pass, of each particle and of all; a checkpoint holds just this.

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
    wide_covariance : (p, p) float64 tensor
        What EM goes on from: before directions were narrowed, since narrow ones hardly turn.
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
    "wide_covariance",
    "noise_spectrum",
)
# Of them, those that hold what is known of each particle in the end.
_PARTICLE_TENSORS = _STATE_TENSORS[:8]
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
class _Linearisation:
    """The images of all particles, linearised at ``_State.latents``; see `_linearise`.

    Attributes
    ----------
    equations : NormalEquations
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
    moved: Tensor
    pixels: Tensor
    n_independent: float
    refused: int

    @property
    def n_pixels(self) -> float:
        return float(self.pixels.sum())


# The loop


def _run_passes(run: _Run, progress: bool, n_passes: int | None = None) -> _State:
    """Pass after pass, from the start or a checkpoint, at most so many or to the schedule's end."""
    constants = _constants(run.model)
    identity = "" if run.checkpoint is None else _identity(run)
    state = _load_checkpoint(run, identity) or run.state or _first_state(run, constants)
    n = len(run.particles)
    with tqdm(
        # A bar that ends before its total is drawn as one that failed.
        total=min(n_passes or len(run.blurs), len(run.blurs)) * n,
        initial=len(state.history) * n,
        desc="refining",
        unit="particle",
        disable=not progress,
        leave=n_passes is None,
    ) as bar:
        while not _is_done(run, state) and len(state.history) != n_passes:
            if len(state.history) >= len(run.blurs):
                # More passes than planned, until nothing moves any more.
                bar.total += n
            state = _one_pass(run, constants, state, bar.update)
            last = state.history[-1]
            bar.set_postfix(blur=f"{last['blur']:g} Å", step=f"{last['step']:.2f} Å")
            _save_checkpoint(run, identity, state)
    return state


def _is_done(run: _Run, state: _State) -> bool:
    extra = len(state.history) - len(run.blurs)
    if extra < 0:
        return False
    return state.history[-1]["step"] < _CONVERGED or extra >= _MAX_EXTRA_PASSES


def _one_pass(
    run: _Run, constants: _Constants, state: _State, update: Callable[[int], object]
) -> _State:
    """One look at every image: _linearise, refuse steps that made things worse, EM, next step."""
    number = len(state.history)
    blur = run.blurs[min(number, len(run.blurs) - 1)]
    same_blur = number > 0 and blur == state.history[-1]["blur"]
    n_em_steps = _LAST_EM_STEPS if number >= len(run.blurs) - 1 else _EM_STEPS
    following = run.blurs[min(number + 1, len(run.blurs) - 1)]
    width = float(np.hypot(run.model.microscope.mean_width, blur))
    learns_spectrum = following != blur or number == len(run.blurs) - 2
    draws = None
    if run.population is None and learns_spectrum:
        n_pixels = frequency_band(run.model.microscope, blur).n_pixels
        draws = _posterior_draws(constants, state, width, n_pixels)
    state, linear = _linearise(run, state, blur, draws, update)
    state, means = _learn(run, constants, state, linear, n_em_steps)
    state, step = _propose(constants, state, linear, means, same_blur, width)
    state = replace(state, variance=_position_variances(run, state, linear))
    correlation = _correlation(state)
    if learns_spectrum:
        state = _next_blur(run, state, linear)
    shown = state.responsibility.double()
    square = (step.square() * constants.atom_share).sum(1).double()
    record = {
        "blur": blur,
        "step": float(((shown * square).sum() / shown.sum().clamp_min(1e-9)).sqrt()),
        "refused": linear.refused,
        "noise_std": state.noise_level**0.5,
        "contrast": math.exp(state.scale_mean),
        "spread": float(state.covariance.diagonal().sum().sqrt()),
        "rank": state.rank,
        "junk": float(1 - shown.mean()),
        "support": state.support,
        "correlation": correlation,
        "fading": image_model.fading(
            linear.equations, state.responsibility, run.model.box_size * run.model.pixel_size
        ),
    }
    return replace(state, history=(*state.history, record))


def _constants(model: Model) -> _Constants:
    share = np.bincount(model.structure.chain_index) / model.structure.n_atoms
    of_latent = torch.from_numpy(share[model.dynamics.latent_chain]).float()
    return _Constants(elastic_prior(model.dynamics), of_latent.to(model.device))


def _first_state(run: _Run, constants: _Constants) -> _State:
    """Before any conformation is known; only the brightnesses are measured."""
    model, device = run.model, run.model.device
    n, p = len(run.particles), model.n_latents
    population = run.population
    shared: dict = {
        "noise_spectrum": run.look.noise_spectrum.to(device),
        "spectrum_level": run.look.noise_level,
    }
    known = None
    if population is None:
        covariance = constants.prior.covariance(constants.prior.variance)
        mean = covariance.new_zeros(p)
    else:
        covariance = population.covariance.to(device).double()
        mean = population.mean.to(device).double()
        known = (math.log(population.contrast), population.contrast_spread)
        shared = {
            "noise_level": population.noise_std**2,
            "noise_pixels": population.noise_pixels,
            "junk_share": population.junk_share,
            "noise_spectrum": _spectrum_of(population, model.microscope).to(device),
        }
    log_scale, scale_mean, scale_spread = image_model.start_scales(run.look, known)
    if run.start is not None:
        proposal = run.start.to(device).float().clone()
    elif run.searched is not None:
        proposal = run.searched.latents.clone()
    else:
        proposal = mean.float().expand(n, p).clone()
    zeros = torch.zeros(n, device=device)
    state = _State(
        proposal=proposal,
        latents=proposal,
        std=torch.zeros(n, p, device=device),
        log_scale=log_scale.to(device),
        noise_variance=zeros + shared.get("noise_level", 0.0),
        misfit=zeros,
        responsibility=zeros + 1,
        evidence=zeros.double(),
        powers=torch.full((n, 3), torch.inf, dtype=torch.float64, device=device),
        damping=zeros,
        variance=torch.zeros(n, len(model.beads), device=device),
        mean=mean,
        covariance=covariance,
        wide_covariance=covariance,
        scale_mean=scale_mean,
        scale_spread=scale_spread,
        **shared,
    )
    return replace(state, variance=_position_variances(run, state, None))


# The steps of a pass


def _linearise(
    run: _Run,
    state: _State,
    blur: float,
    draws: Callable[[Tensor, Tensor, Tensor], Sampler] | None,
    update: Callable[[int], object],
) -> tuple[_State, _Linearisation]:
    """Look at every image at its proposed latents, and go back where that made things worse.

    Whether it did is only known where the last pass looked at the same blur. `draws` is given where
    the noise spectrum shall be learned; `update` is called with the number of particles that were
    done.
    """
    n, p = state.proposal.shape
    band = frequency_band(run.model.microscope, blur)
    objective = _objective(state)
    generator = torch.Generator().manual_seed(len(state.history))
    normal = torch.randn(n, p + 1, generator=generator).to(state.proposal)
    latents = torch.empty_like(state.proposal)
    powers = torch.empty_like(state.powers)
    damping = torch.empty_like(state.damping)
    parts = []
    refused = 0
    for batch in run.particles.batches(run.batch_size, device=run.model.device):
        rows = batch.rows
        z = state.proposal[rows]
        look = partial(normal_equations, run.model, noise_spectrum=state.noise_spectrum, blur=blur)
        variance = state.variance[rows]
        equations = look(
            batch.images,
            batch.pose,
            z,
            variance=variance,
            sampler=None if draws is None else draws(rows, z, normal),
        )
        noise = _trusted_noise(state, _powers(equations), rows, band.n_pixels)
        before = objective(rows, state.powers[rows], state.latents[rows], noise)
        # A tenth of a nat is beyond the precision of a sum over all pixels.
        worse = objective(rows, _powers(equations), z, noise) > before + 0.1
        if worse.any():
            # Rare: look again from the last good latents, with a shorter step this time.
            z = torch.where(worse.unsqueeze(1), state.latents[rows], z)
            again = look(
                batch.images[worse],
                tuple(None if part is None else part[worse] for part in batch.pose),
                z[worse],
                variance=variance[worse],
                sampler=None if draws is None else draws(rows[worse], z[worse], normal),
            )
            for name in equations.known():
                getattr(equations, name)[worse] = getattr(again, name)
            refused += int(worse.sum())
        longer, shorter = state.damping[rows] / 8, (8 * state.damping[rows]).clamp_min(1.0)
        damping[rows] = torch.where(worse, shorter, longer)
        latents[rows] = z
        powers[rows] = _powers(equations)
        parts.append(equations)
        update(len(rows))
    moved = latents - state.latents
    looked = replace(state, latents=latents, powers=powers, damping=damping)
    return looked, _Linearisation(
        join_equations(parts), moved, band.ring_pixels, band.n_independent, refused
    )


def _powers(equations: NormalEquations) -> Tensor:
    """(b, 3) float64 ‖y‖², ⟨y, f⟩ and ⟨f, f⟩."""
    rings = (equations.data_power, equations.overlap, equations.model_power)
    return torch.stack([power.double().sum(1) for power in rings], dim=1)


def _correlation(state: _State) -> float:
    """Of the middle particle's image with the model's."""
    data, overlap, model = state.powers.unbind(1)
    return float((overlap / (data * model).sqrt().clamp_min(1e-30)).median())


def _misfit_of(powers: Tensor, scale: Tensor) -> Tensor:
    """(b,) ‖y − a f‖²."""
    data, overlap, model = powers.unbind(1)
    scale = scale.double()
    return data - 2 * scale * overlap + scale.square() * model


def _trusted_noise(state: _State, powers: Tensor, rows: Tensor | slice, n_pixels: float) -> Tensor:
    """(b,) σ_i², but no less than what an error of the model makes.

    Before the first pass, all that the image and the model differ by.
    """
    scale = state.log_scale[rows].double().exp()
    least = MODEL_ERROR**2 * scale.square() * powers[:, 2] / n_pixels
    known = state.noise_variance[rows].double()
    measured = _misfit_of(powers, scale) / n_pixels
    return torch.where(known > 0, known, measured).maximum(least).clamp_min(1e-30)


def _objective(state: _State) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Minus the log posterior of the particles at `rows`.

    From powers (b, 3) at latents (b, p), and the variance of the noise (b,).
    """
    precision = state.covariance.inverse()

    def objective(rows: Tensor, powers: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        off = latents.double() - state.mean
        distance = ((off @ precision) * off).sum(1)
        seen = powers.isfinite().all(1)
        finite = torch.where(seen.unsqueeze(1), powers, torch.zeros_like(powers))
        residual = _misfit_of(finite, state.log_scale[rows].exp())
        return torch.where(seen, residual / (2 * noise) + distance / 2, torch.inf)

    return objective


# EM on the stored equations


def _prior_of(state: _State) -> LatentPrior:
    return latent_prior(state.mean, state.covariance, state.scale_mean, state.scale_spread)


def _posterior_draws(
    constants: _Constants, state: _State, width: float, n_pixels: float
) -> Callable[[Tensor, Tensor, Tensor], Sampler]:
    """A sampler for `normal_equations`: conformations and brightnesses as likely as not.

    What is left of an image at such a one is noise, and nothing that is only not known yet.
    `width` in Å is that of an atom: no step is longer.
    """
    prior = _prior_of(state)

    def of_batch(batch_rows: Tensor, latents: Tensor, normal: Tensor) -> Sampler:
        def sample(rows: slice, equations: NormalEquations) -> tuple[Tensor, Tensor]:
            chosen = batch_rows[rows]
            z = latents[rows]
            log_scale = state.log_scale[chosen]
            variance = _trusted_noise(state, _powers(equations), chosen, n_pixels)
            posterior = solve_particles(
                equations,
                z,
                log_scale,
                variance,
                torch.zeros_like(log_scale),
                prior,
                n_pixels,
            )
            factor = torch.linalg.cholesky(posterior.covariance)
            off = (factor @ normal[chosen].double().unsqueeze(-1)).squeeze(-1)
            step = posterior.step[:, :-1]
            drawn = (_no_longer_than(width, step, constants) + off[:, :-1]).to(z)
            moved = (posterior.step[:, -1] + off[:, -1]).clamp(-_MAX_SCALE_STEP, _MAX_SCALE_STEP)
            return drawn, (log_scale + moved.to(log_scale)).exp()

        return sample

    return of_batch


def _learn(
    run: _Run, constants: _Constants, state: _State, linear: _Linearisation, n_steps: int
) -> tuple[_State, Tensor]:
    """EM on the stored equations: what particles have of their own, and share unless it is given.

    Returns the state and the posterior means (n, p).
    """
    learns = run.population is None
    trace = torch.zeros_like(state.evidence)
    outlier = image_model.outlier_evidence(
        linear.equations.data_power,
        linear.equations.model_power,
        linear.pixels,
        math.exp(state.scale_mean),
    )
    first = state.responsibility
    if learns:
        state = replace(state, covariance=state.wide_covariance)
    # Before, conformations are not known: damped early, a leading motion would keep its first
    # direction.
    settled = len(state.history) >= len(run.blurs) - 1
    features = view_features(run.particles.rotations.to(first)) if learns and settled else None
    for number in range(n_steps if learns else _OWN_STEPS):
        before = state
        state = _learn_noise(state, linear, trace, learns)
        state, means, covariance_sum, trace, scale_variance = _expectation(state, linear)
        difference = state.evidence - outlier
        r = image_model.responsibilities(difference, state.junk_share, learns).to(first)
        shown = difference[r > 0.5] if (r > 0.5).any() else difference
        state = replace(state, responsibility=r, support=float(shown.median()))
        if learns:
            state = _maximisation(constants.prior, state, means, covariance_sum, features)
            scale_mean, scale_spread = image_model.learn_scales(
                state.log_scale,
                scale_variance,
                state.responsibility,
                state.scale_mean,
                state.scale_spread,
            )
            state = replace(
                state,
                scale_mean=scale_mean,
                scale_spread=scale_spread,
                junk_share=image_model.learn_junk_share(state.responsibility),
            )
        if number > 0 and _change(before, state) < _EM_TOLERANCE:
            break
    if learns:
        state = replace(state, wide_covariance=state.covariance)
    if learns and n_steps == _LAST_EM_STEPS and state.rank:
        state, means = _fewer_directions(state, linear, means)
    return replace(state, misfit=_misfit(state, linear)), means


def _fewer_directions(
    state: _State, linear: _Linearisation, means: Tensor
) -> tuple[_State, Tensor]:
    """Directions beside the leading ones narrowed, and leading ones given up, as images say.

    EM hardly moves an amplitude of which images say little: it is halved as long as they are
    likelier so. A direction is a leading one only where it makes them likelier by more than its
    parameters do by chance: ½ p log n each (Schwarz 1978).
    """

    def look(covariance: Tensor) -> tuple[_State, Tensor, float]:
        seen, answer, *_ = _expectation(replace(state, covariance=covariance), linear)
        return seen, answer, float((seen.responsibility.double() * seen.evidence).sum())

    seen, means, evidence = look(state.covariance)
    for _ in range(_MOST_HALVINGS):
        other, moved, likelier = look(with_less_rest(seen.covariance, state.rank, 0.5))
        if likelier <= evidence + 1:
            break
        seen, means, evidence = other, moved, likelier
    n, p = means.shape
    chance = p / 2 * math.log(n)
    for rank in range(state.rank - 1, 0, -1):
        other, moved, likelier = look(with_less_rest(seen.covariance, rank, _GIVEN_UP))
        if likelier <= evidence - chance:
            break
        seen, means, evidence = replace(other, rank=rank), moved, likelier
    return seen, means


def _learn_noise(state: _State, linear: _Linearisation, trace: Tensor, learns: bool) -> _State:
    """The noise of every particle, and what they have in common."""
    scale = state.log_scale.exp()
    residual = _misfit_of(state.powers, scale).clamp_min(0)
    measured = (residual + trace * state.noise_variance.double()) / linear.n_pixels
    measured = measured.clamp_min(1e-30)
    level, pixels = state.noise_level, state.noise_pixels
    if learns:
        level, pixels = image_model.learn_noise(
            measured, state.responsibility, linear.n_independent
        )
    # In units of pixels that count: those of a blurred image are not independent.
    own = linear.n_independent
    variance = level + own / (pixels + own) * (measured - level)
    return replace(
        state,
        noise_variance=variance.to(state.log_scale),
        noise_level=level,
        noise_pixels=pixels,
    )


def _expectation(
    state: _State, linear: _Linearisation
) -> tuple[_State, Tensor, Tensor, Tensor, Tensor]:
    """Of every particle the posterior.

    Returns the state with error bars, brightnesses and evidence, the posterior means (n, p),
    Σ r_i C_i, the traces (n,) and the variances of log brightness (n,).
    """
    n, p = state.latents.shape
    prior = _prior_of(state)
    means = torch.empty_like(state.latents)
    std = torch.empty_like(state.latents)
    log_scale = torch.empty_like(state.log_scale)
    scale_variance = torch.empty_like(state.evidence)
    evidence = torch.empty_like(state.evidence)
    trace = torch.empty_like(state.evidence)

    def solve(rows: slice) -> Tensor:
        noise = _trusted_noise(state, state.powers[rows], rows, linear.n_pixels)
        posterior = solve_particles(
            linear.equations[rows],
            state.latents[rows],
            state.log_scale[rows],
            noise,
            state.damping[rows],
            prior,
            linear.n_pixels,
        )
        means[rows] = state.latents[rows] + posterior.step[:, :p].to(means)
        moved = posterior.step[:, p].clamp(-_MAX_SCALE_STEP, _MAX_SCALE_STEP)
        log_scale[rows] = state.log_scale[rows] + moved.to(log_scale)
        variances = posterior.covariance.diagonal(dim1=1, dim2=2)
        std[rows] = variances[:, :p].sqrt().to(std)
        scale_variance[rows] = variances[:, p]
        evidence[rows] = posterior.evidence
        trace[rows] = posterior.trace * noise / state.noise_variance[rows].double()
        weights = state.responsibility[rows].double()
        return (weights[:, None, None] * posterior.covariance[:, :p, :p]).sum(0)

    parts = map_blocks(solve, _slices(n), means.device)
    covariance_sum = torch.stack(parts).sum(0)
    state = replace(state, std=std, log_scale=log_scale, evidence=evidence)
    return state, means, covariance_sum, trace, scale_variance


def _misfit(state: _State, linear: _Linearisation) -> Tensor:
    """(n,) χ² per pixel on the rings where the molecule shows, under the shared noise."""
    equations = linear.equations
    scale = state.log_scale.double().exp().unsqueeze(1)
    residual = (
        equations.data_power.double()
        - 2 * scale * equations.overlap.double()
        + scale.square() * equations.model_power.double()
    )
    power = equations.model_power.double().mean(0)
    shows = power / linear.pixels.clamp_min(1e-9) > 0.1 * power.sum() / linear.n_pixels
    shows &= linear.pixels > 0
    pixels = linear.pixels[shows].sum()
    chi = residual[:, shows].sum(1) / (pixels * state.noise_variance.double())
    return chi.to(state.log_scale)


def _next_blur(run: _Run, state: _State, linear: _Linearisation) -> _State:
    """The noise spectrum learned anew, before the images are looked at with another blur.

    Only then, since objectives under different spectra cannot be compared.
    """
    unknown = torch.full_like(state.powers, torch.inf)
    sampled = linear.equations.sampled_power
    if sampled is None:
        return replace(state, powers=unknown)
    weight = (state.responsibility / state.noise_variance).double().unsqueeze(1)
    n_shown = state.responsibility.double().sum().clamp_min(1e-9)
    full = frequency_band(run.model.microscope).ring_pixels
    measured = linear.pixels > _MIN_RING_SHARE * full
    scale = state.log_scale.double().exp().unsqueeze(1)
    signal = scale.square() * linear.equations.model_power.double()

    def level_of(powers: Tensor) -> Tensor:
        """Of each ring, for a particle with the common noise level."""
        mean = (weight * powers.double()).sum(0) / (n_shown * linear.pixels.clamp_min(1e-9))
        # The images were divided by the present spectrum.
        return state.noise_level * mean * state.noise_spectrum

    before = state.spectrum_level * state.noise_spectrum
    level = torch.where(measured, level_of(sampled), before)
    power = torch.where(measured, level_of(signal), torch.zeros_like(before))
    spectrum, mean = image_model.normalised_spectrum(level * full, power * full, full)
    # Noise is relative to the spectrum: each particle keeps its own on the rings that were seen.
    ratio = mean / state.noise_level
    return replace(
        state,
        noise_spectrum=spectrum,
        spectrum_level=mean,
        noise_level=mean,
        noise_variance=state.noise_variance * ratio,
        powers=unknown,
    )


def _maximisation(
    prior: ElasticPrior,
    state: _State,
    means: Tensor,
    covariance_sum: Tensor,
    features: Tensor | None,
) -> _State:
    """Mean and covariance of all particles, within what the prior thinks possible.

    Particles count as much as they show the molecule; `features` are those of their views.
    """
    weights = state.responsibility.double().unsqueeze(1)
    n_shown = float(weights.sum().clamp_min(1e-9))
    mean = ((weights * means).sum(0) / n_shown).clamp(-prior.limit, prior.limit)
    off = means.double() - mean
    scatter = (weights * off).T @ off + covariance_sum
    if features is not None:
        scatter = damp_following(scatter, off, weights.squeeze(1), features)
    covariance = shrink_covariance(scatter, n_shown, prior)
    narrower = (prior.limit / covariance.diagonal().sqrt()).clamp(max=1.0)
    covariance = narrower[:, None] * covariance * narrower
    rank = count_directions(scatter, n_shown, prior)
    return replace(state, mean=mean, covariance=covariance, rank=rank)


def _change(before: _State, after: _State) -> float:
    """Å, the largest change of the population's mean or spread along a latent."""
    of_mean = (after.mean - before.mean).abs().max()
    spreads = after.covariance.diagonal().sqrt() - before.covariance.diagonal().sqrt()
    return float(torch.maximum(of_mean, spreads.abs().max()))


def _propose(
    constants: _Constants,
    state: _State,
    linear: _Linearisation,
    means: Tensor,
    same_blur: bool,
    width: float,
) -> tuple[_State, Tensor]:
    """Latents to look at next, and the step (n, p) towards them: to the means, but not too far.

    `width` in Å is that of an atom in these images.
    """
    step = means - state.latents
    if same_blur:
        # A step that turns back on the last one is too long: the secant says by how much.
        moved = linear.moved
        back = (step * moved).sum(1) / moved.square().sum(1).clamp_min(1e-9)
        step = step / (1 - back.clamp(max=0)).unsqueeze(1)
    # Gaussians overlap with where they were as long as they move by less than their width.
    step = _no_longer_than(width, step, constants)
    return replace(state, proposal=state.latents + step), step


def _no_longer_than(width: float, step: Tensor, constants: _Constants) -> Tensor:
    """(n, p) steps shortened to `width` Å, RMS over the molecule."""
    length = (step.square() * constants.atom_share).sum(1).sqrt()
    return step * (width / length.clamp_min(1e-9)).clamp(max=1.0).unsqueeze(1)


def _position_variances(run: _Run, state: _State, linear: _Linearisation | None) -> Tensor:
    """(n, n_beads) how uncertain every bead's position is, from what is known of each particle.

    Before any image was seen, where there is no `linear`, from the prior.
    """
    model = run.model
    precision = state.covariance.inverse().float()
    variance = torch.empty_like(state.variance)

    def fill(rows: slice) -> None:
        information = precision.expand(rows.stop - rows.start, -1, -1)
        if linear is not None:
            noise = _trusted_noise(state, state.powers[rows], rows, linear.n_pixels)
            weight = (state.log_scale[rows].double().exp().square() / noise).float()
            information = weight[:, None, None] * linear.equations.hessian[rows] + precision
        covariance = torch.linalg.inv(information)
        rotations = run.particles.rotations[rows].to(precision)
        variance[rows] = position_variance(
            model.bead_dynamics, state.proposal[rows], rotations, covariance
        )

    map_blocks(fill, _slices(len(variance)), variance.device)
    return variance


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + _SOLVE_BLOCK, n)) for start in range(0, n, _SOLVE_BLOCK)]


def _spectrum_of(population: Population, microscope: Microscope) -> Tensor:
    """(R,) noise spectrum of a population; white where it has none."""
    if population.noise_spectrum is None:
        return torch.ones(microscope.box_size // 2 + 1, dtype=torch.float64)
    return population.noise_spectrum.double()


# Particles that are stuck


def _searched(run: _Run, progress: bool) -> Starts:
    """Where bodies that may turn by any angle are, all else as the population's mean."""
    mean = torch.zeros(run.model.n_latents)
    if run.population is not None:
        mean = run.population.mean
    return search_turns(run.model, run.particles, mean, progress)


def _start_again(run: _Run, state: _State, population: Population) -> tuple[_State, Tensor]:
    """Second starts, and a mask (n,) of the particles that found a likelier answer from them."""
    rescued = torch.zeros(len(state.proposal), dtype=torch.bool, device=state.proposal.device)
    if run.searched is not None:
        for latents, behind in zip(run.searched.others, run.searched.behind, strict=True):
            # The next orientation of a body fits about as well.
            close = behind < _SECOND_BEST
            state, better = _started_at(run, state, population, close, latents[None, close])
            rescued |= better
    if run.start is not None:
        return state, rescued
    prior = _prior_of(state)
    off = state.proposal.double() - prior.mean
    distance = ((off @ prior.precision) * off).sum(1)
    middle = distance.median()
    deviation = (distance - middle).abs().median().clamp_min(1e-9)
    stuck = distance > middle + _STUCK_DEVIATIONS * deviation
    starts = torch.cat([prior.mean.to(state.proposal)[None], _gatherings(state, ~stuck)])
    starts = starts[:, None].expand(-1, int(stuck.sum()), -1)
    state, better = _started_at(run, state, population, stuck, starts)
    return state, rescued | better


def _started_at(
    run: _Run, state: _State, population: Population, chosen: Tensor, starts: Tensor
) -> tuple[_State, Tensor]:
    """Particles of a mask (n,) refined anew; the likelier of the two answers is kept.

    Of `starts` (s, n_chosen, p) each takes the one that explains its blurred image best. The mask
    (n,) that is returned is of those whose new answer was kept.
    """
    kept = torch.zeros_like(chosen)
    if not chosen.any():
        return state, kept
    rows = chosen.nonzero().squeeze(1).cpu().numpy()
    usable = run.look.usable.nonzero().squeeze(1)
    of_look = torch.zeros_like(run.look.usable)
    of_look[usable[rows]] = True
    last = run.blurs[-1]
    again = replace(
        run,
        particles=run.particles[rows],
        look=replace(run.look, usable=of_look),
        start=starts[0],
        searched=None,
        population=population,
        # Only evidence of images with the same blur can be compared.
        blurs=(*(blur for blur in _RESTART_BLURS if blur > last), last, last),
        checkpoint=None,
    )
    if len(starts) > 1:
        looks = [
            _run_passes(replace(again, start=start), progress=False, n_passes=1).evidence
            for start in starts
        ]
        best = torch.stack(looks).argmax(0)
        again = replace(again, start=starts[best, torch.arange(len(rows), device=best.device)])
    other = _run_passes(again, progress=False)
    better = other.evidence > state.evidence[chosen] + 1
    kept[chosen] = better
    answer = {}
    for name in _PARTICLE_TENSORS:
        values = getattr(state, name).clone()
        values[kept] = getattr(other, name)[better]
        answer[name] = values
    return replace(state, **answer), kept


def _gatherings(state: _State, of: Tensor) -> Tensor:
    """(k, p) latents about which particles gather, of those in a mask (n,)."""
    latents = state.proposal[of].cpu()
    most = min(_STARTS, len(latents))
    if not most:
        return state.proposal[:0]
    centres = KMeans(most, n_init=1, random_state=0).fit(latents.double().numpy()).cluster_centers_
    return torch.from_numpy(centres).to(state.proposal)


def _learn_once_more(run: _Run, state: _State, rescued: Tensor, progress: bool) -> _State:
    """A pass or two, in which the population learns of particles that were stuck before."""
    powers = state.powers.clone()
    powers[rescued] = torch.inf
    state = replace(state, powers=powers)
    constants = _constants(run.model)
    n = len(run.particles)
    with tqdm(total=n, desc="rescued", unit="particle", disable=not progress, leave=False) as bar:
        state = _one_pass(run, constants, state, bar.update)
        if state.history[-1]["step"] > _CONVERGED:
            bar.total += n
            state = _one_pass(run, constants, state, bar.update)
    return state


# Particles that end less likely than they started


def _no_worse_than_start(run: _Run, state: _State) -> _State:
    """Particles that are less likely than where they started go back; with no start, to the mean.

    Objectives of different blurs cannot be compared while a particle moves, and a model that cannot
    express its conformation may lose its way between them.
    """
    prior = _prior_of(state)
    start = prior.mean.float().expand_as(state.proposal) if run.start is None else run.start
    start = start.to(state.proposal)
    n_pixels = frequency_band(run.model.microscope).n_pixels
    latents, log_scale, misfit = (
        getattr(state, name).clone() for name in ("proposal", "log_scale", "misfit")
    )
    for batch in run.particles.batches(run.batch_size, device=run.model.device):
        rows = batch.rows
        noise = _trusted_noise(state, state.powers[rows], rows, n_pixels)
        residuals, objectives, scales = [], [], []
        for z in (start[rows], state.proposal[rows]):
            powers = image_powers(
                run.model, batch.images, batch.pose, z, noise_spectrum=state.noise_spectrum
            )
            data, overlap, power = powers.unbind(1)
            # At its own best brightness.
            scale = overlap / power.clamp_min(1e-30)
            off = z.double() - prior.mean
            residual = (data - scale * overlap).clamp_min(1e-30)
            residuals.append(residual)
            scales.append(scale)
            objectives.append(residual / noise + ((off @ prior.precision) * off).sum(1))
        better = (scales[0] > 0) & (objectives[0] < objectives[1] - _LESS_LIKELY)
        chosen = rows[better]
        latents[chosen] = start[chosen]
        log_scale[chosen] = scales[0][better].log().to(log_scale)
        misfit[chosen] *= (residuals[0] / residuals[1])[better].to(misfit)
    return replace(state, proposal=latents, log_scale=log_scale, misfit=misfit)


# Particles that are hardly known


def _averaged(run: _Run, state: _State) -> _State:
    """Means and error bars of particles that are too uncertain for a linearised image."""
    wide = is_wide(run.model, state.std).nonzero().squeeze(1)
    if not len(wide):
        return state
    prior = _prior_of(state)
    n_pixels = frequency_band(run.model.microscope).n_pixels
    latents, std = state.proposal.clone(), state.std.clone()
    for batch in run.particles[wide.cpu().numpy()].batches(run.batch_size, run.model.device):
        rows = wide[batch.rows]
        noise = _trusted_noise(state, state.powers[rows], rows, n_pixels)
        fit = ImageFit(
            batch.images,
            batch.pose,
            state.log_scale[rows],
            noise,
            state.noise_spectrum,
            state.variance[rows],
        )
        latents[rows], std[rows] = average_along_line(
            run.model, fit, state.proposal[rows], prior, n_pixels
        )
    return replace(state, proposal=latents, std=std)


# Checkpoints


def _identity(run: _Run) -> str:
    """What a checkpoint must have in common with the run it resumes, beside the model."""
    population = run.population
    given: tuple = ()
    if population is not None:
        given = (*population.tensors().values(), str(population.description()))
    start = -1 if run.start is None else run.start
    return content_digest(run.particles.digest(), run.blurs, start, *given)


def _save_checkpoint(run: _Run, identity: str, state: _State) -> None:
    if run.checkpoint is None:
        return
    tensors = {name: getattr(state, name) for name in _STATE_TENSORS}
    meta = {
        "kind": _CHECKPOINT_KIND,
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
    save_tensors(run.checkpoint, tensors, meta)


def _another_run(run: _Run, path: Path) -> str:
    return (
        f"expected a checkpoint of these {len(run.particles):,} particles, start, population "
        f"and blurs, got another run's in {path}; try another checkpoint path"
    )


def _load_checkpoint(run: _Run, identity: str) -> _State | None:
    """The state of a run that was cut; None where there is no checkpoint yet."""
    if run.checkpoint is None or not run.checkpoint.exists():
        return None
    tensors, meta = load_tensors(run.checkpoint, _CHECKPOINT_KIND)
    require_same_model(run.model, meta["fingerprint"], f"a checkpoint ({run.checkpoint})")
    if meta["identity"] != identity:
        raise ValueError(_another_run(run, run.checkpoint))
    if missing := set(_STATE_TENSORS) - set(tensors):
        raise ValueError(
            f"expected a checkpoint of this version of cryochains at {run.checkpoint}, got an "
            f"older one without {', '.join(sorted(missing))}; try another path, or that version"
        )
    known: dict[str, Any] = {name: tensors[name].to(run.model.device) for name in _STATE_TENSORS}
    return _State(
        **known,
        **meta["numbers"],
        history=tuple(meta["history"]),
    )
