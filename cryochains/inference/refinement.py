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

Here is the order of things; what a pass over the images does is in `passes`.
"""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._arguments import Count, Latents, NotNegative, Seed, checked
from .._devices import choose_device
from .._processes import from_first, n_processes, require_same
from ..images import ParticleStack
from ..model import Model, Population, require_population, require_same_images, require_same_model
from ..molecule import Beads
from . import image_model
from .check import require_sound
from .expectation import taught_by_all
from .folder import RunFolder, open_folder
from .identity import require_latents, require_same_ids
from .leading import are_few, quick_state, told_directions
from .passes import CONVERGED, run_passes
from .reference import learn_beads, unbent
from .restarts import (
    average_uncertain,
    learn_once_more,
    no_worse_than_start,
    search_starts,
    start_again,
)
from .result import Result
from .run import (
    BLOCK_NAME,
    RUN_KIND,
    Run,
    State,
    Taught,
    require_same_run,
    run_identity,
)
from .search import turning_bodies

# Å. Each pass sees a little more detail; the last ones see the images as they are.
_BLURS = (8.0, 4.0, 2.0, 0.0, 0.0)
# Å, after a quick answer.
_KNOWN_BLURS = (0.0, 0.0)
# Particles that are estimated together: what is kept of them meanwhile.
_ESTIMATED_BLOCK = 4000
# A population that learned of them tells better which ones are stuck: at most so many rounds.
_ROUNDS = 3
# Where images ask for other beads they are learned so many times, and particles then refined anew
# from at most these blurs (Å) on.
_DENSITY_BLURS = (4.0, 0.0)
# Of the states in a run's folder: blocks of particles, and these refined anew with other beads.
_STATE_NAMES = rf"{BLOCK_NAME}\d+(-beads\d)?"


@checked
def refine(
    model: Model,
    particles: ParticleStack,
    population: Population | None = None,
    *,
    start: Result | Latents | None = None,
    blurs: NotNegative | Sequence[NotNegative] | None = None,
    n_population: Count = 4000,
    batch_size: Count = 64,
    check: bool = True,
    seed: Seed = 0,
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
    blurs : sequence of float, optional
        Å, one a pass over the images. The longest should be about the largest motion expected. By
        default 8 to 0; where a population of few directions is known and no start is given,
        particles start from what `estimate` says of them and are looked at as they are.
    n_population : int
        So many particles are refined together, which keeps memory from growing. The first ones, at
        random, learn the population; each block of others starts from it and teaches it further.
    batch_size : int
        Images read at a time.
    check : bool
        Where a population is learned, refuse particles that are certainly misread: of the other
        hand, sign or axes, of other rows or CTFs. See `cryochains.check`.
    seed : int
        Chooses the particles that the population is learned from.
    checkpoint : path, optional
        A folder, made where there is none: what was asked (``run.json``), a log with a line a pass
        (``log.txt``), and what is known after each pass. A run that was cut goes on from there when
        it is called again in the same way, and gives the same numbers. No two runs use one folder.
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
        When the particles do not fit the model, the population, start or folder is of another
        model or run, which is named, another run uses the folder, the images are the negative of
        the reference or show nothing of it, or they certainly show it read otherwise than the table
        is given.
    ConnectionError
        When one of several processes ends before the others.

    Warns
    -----
    UserWarning
        Of images that are constant or hold NaN or Inf, which are left out: with responsibility 0,
        and the population's mean and spread for latents and error bars. And where the folder cannot
        be written, such as on a full disk: the run goes on.

    Notes
    -----
    Started in several processes, by ``torchrun``, ``srun`` or accelerate's launcher, these share
    the particles, all return the same result, and the first one writes.

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
    quick = blurs is None and start is None and not turning_bodies(model)
    blurs = tuple(float(blur) for blur in np.atleast_1d(_BLURS if blurs is None else blurs))
    if n_population < 1:
        raise ValueError(f"expected n_population of 1 or more, got {n_population}; try 4000")
    first = _checked_start(model, particles, population, start, blurs)
    n = len(particles)
    settings = {"blurs": blurs, "n_population": n_population, "seed": seed, "check": check}
    settings["population"] = "learned" if population is None else repr(population)
    require_same(model=model.fingerprint, particles=particles.metadata_digest(), **settings)
    asked = {"model": repr(model), "particles": repr(particles), "settings": settings}
    given = model
    model = model.to(choose_device(device))
    if population is not None:
        model = model.with_beads(population.beads)
    answer = _ParticleAnswers.empty(n, model.n_latents)
    history: tuple[dict, ...] = ()
    left_out: list[np.ndarray] = []
    broken: list[np.ndarray] = []
    learns = population is None
    taught: Taught | None = None
    with open_folder(checkpoint, RUN_KIND, _STATE_NAMES, asked) as folder:
        _begin_log(folder, n)
        for number, rows in enumerate(_blocks(n, learns, n_population, seed)):
            look = image_model.look_first(model, particles[rows], batch_size)
            image_model.require_visible(look, population is None)
            usable = look.usable.numpy()
            if check and population is None and first is None:
                require_sound(model, particles, rows[usable])
            left_out.append(rows[~usable])
            broken.append(rows[~look.finite.numpy()])
            state = None
            if usable.any():
                run = Run(
                    model=model,
                    particles=particles[rows[usable]],
                    look=look,
                    start=None if first is None else first[rows[usable]],
                    population=population,
                    blurs=blurs,
                    batch_size=batch_size,
                    folder=folder,
                    name=f"{BLOCK_NAME}{number + 1}",
                    taught=taught,
                )
                if first is None and turning_bodies(model):
                    run = replace(run, searched=search_starts(run, progress))
                if quick and population is not None:
                    run = _begun_quickly(run, population, progress)
                run, state, population = _refine_block(given, run, progress)
                model = run.model
                history = history or state.history
                if learns:
                    population, taught = _taught_further(run, state, population)
                state = average_uncertain(run, no_worse_than_start(run, state))
            answer.fill(rows, usable, state, population)
        _warn_of(np.concatenate(left_out), np.concatenate(broken), particles.ids)
        result = answer.result(given, population, particles, history, "refined")
        if folder is not None:
            folder.log(f"finished, {_how_it_ended(history)}: {result!r}")
    return result


def remove_run_states(path: str | os.PathLike) -> None:
    """Remove from a run's folder what is known after each pass, where a result is kept instead."""
    RunFolder(Path(path), RUN_KIND, _STATE_NAMES).remove_states()


@checked
def estimate(
    model: Model,
    particles: ParticleStack,
    population: Population,
    *,
    batch_size: Count = 64,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Result:
    """Latents of every particle of a known population in a few milliseconds, with error bars.

    Two or three posterior steps from the population's mean, in the directions in which it varies
    most; see `inference.leading`. Where it varies in few, that is as near to the truth as `refine`;
    else start a refinement from it, as ``refine(model, particles, population)`` does by itself.

    Parameters
    ----------
    model : Model
    particles : ParticleStack
    population : Population
        Such as ``refine(…).population`` of some of the particles.
    batch_size : int
        Images read at a time.
    device : torch device, optional
        By default a GPU where there is one.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Result
        In the order of the particles.

    Raises
    ------
    ValueError
        When particles, model and population do not belong together, or the images are the negative
        of the reference.

    Warns
    -----
    UserWarning
        Of images that are left out, as by `refine`.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> population = refine(model, particles, blurs=(4.0, 0.0), progress=False).population
    >>> estimate(model, particles, population, progress=False)
    Result(8 particles, estimated, 12 latents of 'glua3-closed', spread ... Å)
    """
    _checked_start(model, particles, population, None, _KNOWN_BLURS)
    n = len(particles)
    given = model
    model = model.to(choose_device(device)).with_beads(population.beads)
    answer = _ParticleAnswers.empty(n, model.n_latents)
    left_out: list[np.ndarray] = []
    broken: list[np.ndarray] = []
    history: tuple[dict, ...] = ()
    for rows in _blocks(n, False, _ESTIMATED_BLOCK, 0):
        look = image_model.look_first(model, particles[rows], batch_size)
        image_model.require_visible(look, False)
        usable = look.usable.numpy()
        left_out.append(rows[~usable])
        broken.append(rows[~look.finite.numpy()])
        state = None
        if usable.any():
            run = Run(
                model=model,
                particles=particles[rows[usable]],
                look=look,
                start=None,
                population=population,
                blurs=_KNOWN_BLURS,
                batch_size=batch_size,
                folder=None,
            )
            state = quick_state(run, population, told_directions(run, population), progress)
            history = history or state.history
        answer.fill(rows, usable, state, population)
    _warn_of(np.concatenate(left_out), np.concatenate(broken), particles.ids)
    return answer.result(given, population, particles, history, "estimated")


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
        state: State | None,
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

    def result(
        self,
        model: Model,
        population: Population | None,
        particles: ParticleStack,
        history: tuple[dict, ...],
        kind: str,
    ) -> Result:
        """All of it with what it belongs to."""
        return Result(
            model,
            self.latents,
            self.std,
            population,
            particles,
            scale=self.scale,
            noise=self.noise,
            misfit=self.misfit,
            responsibility=self.responsibility,
            history=history,
            kind=kind,
        )


def _warn_of(left_out: np.ndarray, broken: np.ndarray, ids: np.ndarray) -> None:
    """One warning of the rows that were left out, and of those of them that are not finite."""
    usable = torch.ones(len(ids), dtype=torch.bool)
    finite = usable.clone()
    usable[torch.from_numpy(left_out)] = False
    finite[torch.from_numpy(broken)] = False
    problem = image_model.describe_unusable(usable, finite, ids.tolist())
    if problem is not None:
        warnings.warn(problem, stacklevel=4)


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


def _begin_log(folder: RunFolder | None, n: int) -> None:
    """Say that a run begins; what is left of one without a first state is of an earlier one."""
    if folder is None:
        return
    if not folder.has(f"{BLOCK_NAME}1"):
        folder.remove_states()
    folder.log(f"{n:,} particles, {n_processes()} processes of {torch.get_num_threads()} threads")


def _how_it_ended(history: tuple[dict, ...]) -> str:
    if not history:
        return "without a pass"
    step = history[-1]["step"]
    word = "converged" if step < CONVERGED else "not converged"
    return f"{word} (in their last pass the first particles moved by {step:.2f} Å)"


def _learn_population(given: Model, run: Run, progress: bool) -> tuple[Run, State, Population]:
    """Refine particles and learn what they share; again with other beads, where they ask for them.

    Returns the run with those beads, the state that it ended in, and the population.
    """
    # The first sharp look shows what the model lacks, before chains have quite bent into it; where
    # none came before it, the last one.
    n_blurred = sum(blur > 0 for blur in run.blurs)
    n_passes = min(n_blurred + 1, len(run.blurs)) if n_blurred else None
    state = run_passes(run, progress, n_passes)
    result = _result_of(given, run, state, None)
    # A checkpoint from after this was asked says that there was nothing.
    asks = n_passes in (None, len(state.history))

    def learn(*refined: Any) -> Beads | None:
        # In one process, or others would round otherwise.
        return from_first(lambda: learn_beads(*refined, device=run.model.device, progress=progress))

    again = _begun_with_other_beads(given, run, 1)
    if again is None:
        beads = learn(result, unbent(result)) if asks else None
        if beads is not None:
            again = _with_other_beads(given, run, beads, unbent(result), 1)
    if again is None:
        state = run_passes(replace(run, state=state), progress)
        return run, state, _learned_population(run.model, state, None)
    # Now that density is known, chains need not bend into it any more.
    beads = again.model.beads
    after = run_passes(again, progress)
    history = (*state.history, *after.history)
    result = _result_of(given, again, after, beads)
    again = _begun_with_other_beads(given, run, 2)
    if again is None:
        again = _with_other_beads(given, run, learn(result) or beads, result.latents, 2)
    beads = again.model.beads
    after = run_passes(again, progress)
    state = replace(after, history=(*history, *after.history))
    return replace(again, start=run.start), state, _learned_population(run.model, state, beads)


def _refine_block(given: Model, run: Run, progress: bool) -> tuple[Run, State, Population]:
    """Particles refined together, and the population, which those of the first block learn."""
    population = run.population
    if population is not None:
        state, _ = start_again(run, run_passes(run, progress), population)
        return run, state, population
    run, state, population = _learn_population(given, run, progress)
    for _ in range(_ROUNDS):
        state, rescued = start_again(run, state, population)
        if not rescued.any():
            break
        state = learn_once_more(run, state, rescued, progress)
        population = _learned_population(run.model, state, population.beads)
    return run, state, population


def _begun_quickly(run: Run, population: Population, progress: bool) -> Run:
    """A run that begins with a quick answer, where that is worth it and no checkpoint has more."""
    told = told_directions(run, population)
    if not are_few(told[0]):
        return run
    run = replace(run, blurs=_KNOWN_BLURS)
    if run.folder is not None and run.folder.has(run.name):
        return run
    state = quick_state(run, population, told, progress)
    wide = state.wide_covariance if run.taught is None else run.taught.wide_covariance
    state = replace(
        state,
        wide_covariance=wide,
        # Nothing of it is compared with later looks.
        powers=torch.full_like(state.powers, torch.inf),
        damping=torch.zeros_like(state.damping),
        history=(),
    )
    return replace(run, state=state)


def _taught_further(run: Run, state: State, population: Population) -> tuple[Population, Taught]:
    """The population after these particles, and what the next ones need to teach it further."""
    n = len(run.particles)
    wide = state.wide_covariance
    if run.taught is None:
        return population, Taught(n, wide)
    _, wide = taught_by_all(population, run.taught, state)
    mean, covariance = state.mean.cpu(), state.covariance.cpu()
    after = replace(population, mean=mean, covariance=covariance, rank=state.rank)
    return after, Taught(run.taught.n + n, wide)


def _with_other_beads(given: Model, run: Run, beads: Beads, latents: Tensor, number: int) -> Run:
    """The particles refined anew from `latents`, with beads learned for the `number`th time."""
    blurs = tuple(blur for blur in run.blurs if blur <= _DENSITY_BLURS[number - 1])
    return replace(
        run,
        follows={} if run.folder is None else run_identity(run),
        model=given.with_beads(beads).to(run.model.device),
        start=latents,
        blurs=blurs or run.blurs[-1:],
        name=_name_with_beads(run, number),
    )


def _name_with_beads(run: Run, number: int) -> str:
    return f"{run.name.partition('-')[0]}-beads{number}"


def _begun_with_other_beads(given: Model, run: Run, number: int) -> Run | None:
    """What `_with_other_beads` gave before a run was cut; None where it was not begun.

    Beads that were learned anew would differ by rounding, such as on another machine.
    """
    kept = None if run.folder is None else run.folder.load(_name_with_beads(run, number))
    if run.folder is None or kept is None or "start" not in kept[0]:
        return None
    tensors, meta = kept
    require_same_run(run, meta["follows"], run_identity(run))
    names = [field.name for field in fields(Beads)]
    beads = Beads(*(tensors[f"beads/{name}"].numpy() for name in names))
    return _with_other_beads(given, run, beads, tensors["start"], number)


def _result_of(given: Model, run: Run, state: State, beads: Beads | None) -> Result:
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


def _learned_population(model: Model, state: State, beads: Beads | None) -> Population:
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
