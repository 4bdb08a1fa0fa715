"""Every particle's latents by maximum a posteriori, under a population learned by EM.

Symbols: z → `latents`, μ, Σ → `Population.mean`, `covariance`, σ → `noise_std`. For every particle

    ½ ‖y − f(z)‖²/σ² + ½ (z − μ)ᵀ Σ⁻¹ (z − μ)

is minimised by Levenberg–Marquardt with the analytic Jacobian, coarse to fine. After each pass over
the images, EM re-estimates μ, Σ and σ from all particles on the stored normal equations, which
needs no image:

    C_i = (H_i/σ² + Σ⁻¹)⁻¹,  μ = mean z_i,  Σ = mean[(z_i − μ)(z_i − μ)ᵀ + C_i]

(e.g. Bishop, PRML, section 9.4). Σ is shrunk towards the elastic network's own prior (variance of
α_k ∝ 1/λ_k), which decides when particles are few.

A pass is four steps, each a function from one `_State` to the next: `_linearise` (reads the
images), `_rescale`, `_learn_population` (EM) and `_propose` (the next latents).
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._devices import choose_device
from .._files import content_digest, load_tensors, save_tensors
from ..images import ParticleStack
from ..model import (
    ElasticPrior,
    Model,
    Population,
    elastic_prior,
    require_population,
    require_same_images,
    require_same_model,
    shrink_covariance,
)
from .identity import require_latents, require_same_ids
from .likelihood import (
    frequency_band,
    map_blocks,
    measure_contrast,
    normal_equations,
    position_variance,
    require_bright_protein,
)
from .result import Result

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
# Of the signal: the model's images are not thought right to better than this, or clear images would
# be overfitted.
_MODEL_ERROR = 0.3
# Å. At this blur and above the brightness is measured: there a misplaced atom hardly lowers it.
_MIN_CONTRAST_BLUR = 4.0
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
        reference.
    blurs : sequence of float
        Å, one a pass over the images. The longest should be about the largest motion expected.
    n_population : int
        The population is learned from at most this many particles, which keeps memory from growing.
    batch_size : int
        Images read at a time.
    seed : int
        Chooses the particles that the population is learned from.
    checkpoint : path, optional
        Written after every pass; a run that was cut resumes from it and gives the same numbers.
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
        model, or an image holds NaN.

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
    n = len(particles)
    model = model.to(choose_device(device))
    latents = torch.zeros(n, model.n_latents)
    std = torch.zeros(n, model.n_latents)
    history: tuple[dict, ...] = ()
    for number, rows in enumerate(_blocks(n, population is None, n_population, seed)):
        run = _Run(
            model=model,
            particles=particles[rows],
            start=None if first is None else first[rows],
            population=population,
            blurs=blurs,
            batch_size=batch_size,
            checkpoint=_block_path(checkpoint, number),
        )
        state = _run_passes(run, progress)
        latents[rows] = state.proposal.cpu()
        std[rows] = state.std.cpu()
        if population is None:
            population = _learned_population(model, state)
        history = history or state.history
    return Result(
        model,
        latents,
        std,
        population,
        particles,
        history=history,
        kind="refined",
    )


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
        if start.particles_digest not in (None, particles.metadata_digest()):
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


def _learned_population(model: Model, state: "_State") -> Population:
    return Population(
        state.mean.cpu(),
        state.covariance.cpu(),
        _known(state.noise_std),
        state.contrast,
        model.fingerprint,
    )


@dataclass(frozen=True, eq=False)
class _Run:
    """What stays the same while some particles are refined together.

    Attributes
    ----------
    model : Model
        On the device that computes.
    particles : ParticleStack
        The n particles, all of whose normal equations are held in memory at a time.
    start : (n, p) tensor, optional
    population : Population, optional
        Given and not learned.
    blurs : tuple of float
    batch_size : int
    checkpoint : Path, optional
    """

    model: Model
    particles: ParticleStack
    start: Tensor | None
    population: Population | None
    blurs: tuple[float, ...]
    batch_size: int
    checkpoint: Path | None


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
    residual : (n,) tensor
        ‖y − f‖² at `latents`.
    damping : (n,) tensor
        Of Levenberg–Marquardt; 0 for particles whose steps never made things worse.
    variance : (n, n_atoms) tensor
        Å², how uncertain each atom's position on the image is.
    mean, covariance : (p,) and (p, p) float64 tensors
    noise_std : float or None
        None before the first pass.
    contrast : float
    history : tuple of dict
    """

    proposal: Tensor
    latents: Tensor
    std: Tensor
    residual: Tensor
    damping: Tensor
    variance: Tensor
    mean: Tensor
    covariance: Tensor
    noise_std: float | None
    contrast: float
    history: tuple[dict, ...] = ()


_STATE_TENSORS = (
    "proposal",
    "latents",
    "std",
    "residual",
    "damping",
    "variance",
    "mean",
    "covariance",
)


@dataclass(frozen=True, eq=False)
class _Linearisation:
    """The images of all particles, linearised at ``_State.latents``; see `_linearise`.

    Attributes
    ----------
    hessian : (n, p, p) tensor
    right : (n, p) tensor
        H z + g, so that the posterior mean solves (H/σ² + Σ⁻¹) z = right/σ² + Σ⁻¹ μ.
    moved : (n, p) tensor
        The step that led here.
    n_pixels : float
        Independent pixels of an image at this blur.
    overlap, power : float
        ⟨y, f⟩ and ⟨f, f⟩, summed over particles.
    refused : int
        Particles that went back because their step made things worse.
    """

    hessian: Tensor
    right: Tensor
    moved: Tensor
    n_pixels: float
    overlap: float
    power: float
    refused: int


# The loop


def _run_passes(run: _Run, progress: bool) -> _State:
    """Pass after pass, from the start or a checkpoint to the end of the schedule."""
    constants = _constants(run.model)
    identity = "" if run.checkpoint is None else _identity(run)
    state = _load_checkpoint(run, identity) or _first_state(run, constants)
    n = len(run.particles)
    with tqdm(
        total=len(run.blurs) * n,
        initial=len(state.history) * n,
        desc="refining",
        unit="particle",
        disable=not progress,
    ) as bar:
        while not _is_done(run, state):
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
    state, equations = _linearise(run, state, blur, same_blur, update)
    if run.population is None and blur >= _MIN_CONTRAST_BLUR:
        state, equations = _rescale(state, equations)
    state, means = _learn_population(run, constants, state, equations, n_em_steps)
    width = float(np.hypot(run.model.microscope.width, blur))
    state, step = _propose(constants, state, equations, means, same_blur, width)
    state = replace(state, variance=_position_variances(run, state, equations.hessian))
    record = {
        "blur": blur,
        "step": float((step.square() * constants.atom_share).sum(1).mean().sqrt()),
        "refused": equations.refused,
        "noise_std": state.noise_std,
        "contrast": state.contrast,
        "spread": float(state.covariance.diagonal().sum().sqrt()),
    }
    return replace(state, history=(*state.history, record))


def _constants(model: Model) -> _Constants:
    share = np.bincount(model.structure.chain_index) / model.structure.n_atoms
    of_latent = torch.from_numpy(share[model.dynamics.latent_chain]).float()
    return _Constants(elastic_prior(model.dynamics), of_latent.to(model.device))


def _first_state(run: _Run, constants: _Constants) -> _State:
    """Before any image was seen; only the brightness is measured."""
    model, device = run.model, run.model.device
    n, p = len(run.particles), model.n_latents
    if run.population is None:
        covariance = constants.prior.variance.diag()
        mean = covariance.new_zeros(p)
        noise_std = None
        contrast = measure_contrast(model, run.particles)
    else:
        covariance = run.population.covariance.to(device).double()
        mean = run.population.mean.to(device).double()
        noise_std = run.population.noise_std
        contrast = run.population.contrast
    if run.start is None:
        proposal = mean.float().expand(n, p).clone()
    else:
        proposal = run.start.to(device).float().clone()
    state = _State(
        proposal=proposal,
        latents=proposal,
        std=torch.zeros(n, p, device=device),
        residual=torch.full((n,), torch.inf, device=device),
        damping=torch.zeros(n, device=device),
        variance=torch.zeros(n, model.structure.n_atoms, device=device),
        mean=mean,
        covariance=covariance,
        noise_std=noise_std,
        contrast=contrast,
    )
    return replace(state, variance=_position_variances(run, state, None))


# The steps of a pass


def _linearise(
    run: _Run, state: _State, blur: float, same_blur: bool, update: Callable[[int], object]
) -> tuple[_State, _Linearisation]:
    """Look at every image at its proposed latents, and go back where that made things worse.

    Whether it did is only known where the last pass looked at the same blur. `update` is called
    with the number of particles that were done.
    """
    n, p = state.proposal.shape
    n_pixels = frequency_band(run.model.microscope, blur).n_pixels
    objective = _objective(state) if same_blur else None
    hessian = state.proposal.new_empty(n, p, p)
    right = torch.empty_like(state.proposal)
    latents = torch.empty_like(state.proposal)
    residual = torch.empty_like(state.residual)
    damping = torch.empty_like(state.damping)
    overlap = 0.0
    power = 0.0
    refused = 0
    for batch in run.particles.batches(run.batch_size, device=run.model.device):
        rows = batch.rows
        z = state.proposal[rows]
        settings = {"contrast": state.contrast, "blur": blur}
        variance = state.variance[rows]
        equations = normal_equations(
            run.model, batch.images, batch.pose, z, variance=variance, **settings
        )
        # Of the whole proposal: brightness is measured before any step is taken back.
        overlap += float(equations.overlap.double().sum())
        power += float(equations.power.double().sum())
        worse = torch.zeros(len(rows), dtype=torch.bool, device=z.device)
        if objective is not None:
            before = objective(state.residual[rows], state.latents[rows])
            # A tenth of a nat is beyond the precision of a sum over all pixels.
            worse = objective(equations.residual, z) > before + 0.1
        if worse.any():
            # Rare: look again from the last good latents, with a shorter step this time.
            z = torch.where(worse.unsqueeze(1), state.latents[rows], z)
            again = normal_equations(
                run.model,
                batch.images[worse],
                tuple(None if part is None else part[worse] for part in batch.pose),
                z[worse],
                variance=variance[worse],
                **settings,
            )
            for name in ("hessian", "gradient", "residual"):
                getattr(equations, name)[worse] = getattr(again, name)
            refused += int(worse.sum())
        longer, shorter = state.damping[rows] / 8, (8 * state.damping[rows]).clamp_min(1.0)
        damping[rows] = torch.where(worse, shorter, longer)
        latents[rows] = z
        hessian[rows] = equations.hessian
        residual[rows] = equations.residual
        right[rows] = equations.gradient + (equations.hessian @ z.unsqueeze(-1)).squeeze(-1)
        update(len(rows))
    noise_std = state.noise_std
    if noise_std is None:
        noise_std = float((residual.double().mean() / n_pixels).sqrt())
    moved = latents - state.latents
    looked = replace(
        state, latents=latents, residual=residual, damping=damping, noise_std=noise_std
    )
    return looked, _Linearisation(hessian, right, moved, n_pixels, overlap, power, refused)


def _objective(state: _State) -> Callable[[Tensor, Tensor], Tensor]:
    """Minus the log posterior of particles with a ‖y − f‖² (b,) at latents (b, p)."""
    precision = state.covariance.inverse()
    noise_variance = _known(state.noise_std) ** 2

    def objective(residual: Tensor, latents: Tensor) -> Tensor:
        off = latents.double() - state.mean
        distance = ((off @ precision) * off).sum(1).float()
        return residual / (2 * noise_variance) + distance / 2

    return objective


def _rescale(state: _State, equations: _Linearisation) -> tuple[_State, _Linearisation]:
    """The brightness by regression of all images on the model's, and the equations under it."""
    require_bright_protein(equations.overlap)
    factor = equations.overlap / equations.power
    # In place, since they are the bulk of the memory and of this pass alone.
    equations.hessian.mul_(factor**2)
    equations.right.mul_(factor)
    return replace(state, contrast=state.contrast * factor), equations


def _learn_population(
    run: _Run, constants: _Constants, state: _State, equations: _Linearisation, n_steps: int
) -> tuple[_State, Tensor]:
    """EM on the stored equations: μ, Σ and σ, unless they are given, and the posterior means."""
    residual = float(state.residual.double().sum())
    signal = float(np.sqrt(equations.power / (len(state.latents) * equations.n_pixels)))
    for _ in range(1 if run.population is not None else n_steps):
        before = state
        means, std, covariance_sum, trace = _expectation(state, equations)
        state = replace(state, std=std)
        if run.population is None:
            total = residual + trace * _known(state.noise_std) ** 2
            estimate = float(np.sqrt(total / (len(means) * equations.n_pixels)))
            state = _maximisation(constants.prior, state, means, covariance_sum)
            state = replace(state, noise_std=max(estimate, _MODEL_ERROR * signal))
        if _change(before, state) < _EM_TOLERANCE:
            break
    return state, means


def _expectation(state: _State, equations: _Linearisation) -> tuple[Tensor, Tensor, Tensor, float]:
    """Of every particle the posterior mean and standard deviations; Σ C_i and Σ tr(C_i H_i)/σ²."""
    n, p = state.latents.shape
    precision = state.covariance.inverse()
    noise_variance = _known(state.noise_std) ** 2
    means = torch.empty_like(state.latents)
    std = torch.empty_like(state.latents)

    def solve(rows: slice) -> tuple[Tensor, float]:
        information = equations.hessian[rows].double() / noise_variance
        covariance = torch.cholesky_inverse(torch.linalg.cholesky(information + precision))
        right = equations.right[rows].double() / noise_variance + precision @ state.mean
        z = (covariance @ right.unsqueeze(-1)).squeeze(-1)
        damping = state.damping[rows].double()
        if damping.any():
            ridge = damping[:, None, None] * torch.eye(p).to(right)
            right = right + damping[:, None] * state.latents[rows].double()
            z = torch.linalg.solve(information + precision + ridge, right)
        means[rows] = z.float()
        std[rows] = covariance.diagonal(dim1=1, dim2=2).sqrt().float()
        return covariance.sum(0), float((covariance * information).sum())

    parts = map_blocks(solve, _slices(n), means.device)
    covariance_sum = torch.stack([covariance for covariance, _ in parts]).sum(0)
    return means, std, covariance_sum, sum(trace for _, trace in parts)


def _maximisation(
    prior: ElasticPrior, state: _State, means: Tensor, covariance_sum: Tensor
) -> _State:
    """Mean and covariance of all particles, within what the prior thinks possible."""
    mean = means.double().mean(0).clamp(-prior.limit, prior.limit)
    off = means.double() - mean
    covariance = shrink_covariance(off.T @ off + covariance_sum, len(means), prior)
    narrower = (prior.limit / covariance.diagonal().sqrt()).clamp(max=1.0)
    covariance = narrower[:, None] * covariance * narrower
    return replace(state, mean=mean, covariance=covariance)


def _change(before: _State, after: _State) -> float:
    """Å, the largest change of the population's mean or spread along a latent."""
    of_mean = (after.mean - before.mean).abs().max()
    spreads = after.covariance.diagonal().sqrt() - before.covariance.diagonal().sqrt()
    return float(torch.maximum(of_mean, spreads.abs().max()))


def _propose(
    constants: _Constants,
    state: _State,
    equations: _Linearisation,
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
        moved = equations.moved
        back = (step * moved).sum(1) / moved.square().sum(1).clamp_min(1e-9)
        step = step / (1 - back.clamp(max=0)).unsqueeze(1)
    # Gaussians overlap with where they were as long as they move by less than their width.
    length = (step.square() * constants.atom_share).sum(1).sqrt()
    step = step * (width / length.clamp_min(1e-9)).clamp(max=1.0).unsqueeze(1)
    return replace(state, proposal=state.latents + step), step


def _position_variances(run: _Run, state: _State, hessian: Tensor | None) -> Tensor:
    """(n, n_atoms) how uncertain every atom's position is, from what is known of each particle.

    Before any image was seen, where there is no `hessian`, from the prior.
    """
    model = run.model
    precision = state.covariance.inverse().float()
    variance = torch.empty_like(state.variance)

    def fill(rows: slice) -> None:
        information = precision.expand(rows.stop - rows.start, -1, -1)
        if hessian is not None:
            information = hessian[rows] / _known(state.noise_std) ** 2 + precision
        covariance = torch.linalg.inv(information)
        rotations = run.particles.rotations[rows].to(precision)
        variance[rows] = position_variance(
            model.dynamics, state.proposal[rows], rotations, covariance
        )

    map_blocks(fill, _slices(len(variance)), variance.device)
    return variance


def _slices(n: int) -> list[slice]:
    return [slice(start, min(start + _SOLVE_BLOCK, n)) for start in range(0, n, _SOLVE_BLOCK)]


def _known(noise_std: float | None) -> float:
    if noise_std is None:
        raise ValueError(
            "expected noise that was measured, got none before the first pass; try linearise first"
        )
    return noise_std


# Checkpoints


def _identity(run: _Run) -> str:
    """What a checkpoint must have in common with the run it resumes, beside the model."""
    population = run.population
    given: tuple = ()
    if population is not None:
        given = (population.mean, population.covariance, population.noise_std, population.contrast)
    start = -1 if run.start is None else run.start
    return content_digest(run.particles.digest(), run.blurs, start, *given)


def _save_checkpoint(run: _Run, identity: str, state: _State) -> None:
    if run.checkpoint is None:
        return
    tensors = {name: getattr(state, name) for name in _STATE_TENSORS}
    meta = {
        "kind": _CHECKPOINT_KIND,
        "noise_std": state.noise_std,
        "contrast": state.contrast,
        "history": state.history,
        "fingerprint": run.model.fingerprint,
        "identity": identity,
    }
    save_tensors(run.checkpoint, tensors, meta)


def _load_checkpoint(run: _Run, identity: str) -> _State | None:
    """The state of a run that was cut; None where there is no checkpoint yet."""
    if run.checkpoint is None or not run.checkpoint.exists():
        return None
    tensors, meta = load_tensors(run.checkpoint, _CHECKPOINT_KIND)
    require_same_model(run.model, meta["fingerprint"], f"a checkpoint ({run.checkpoint})")
    if meta["identity"] != identity:
        raise ValueError(
            f"expected a checkpoint of these {len(run.particles):,} particles, start, population "
            f"and blurs, got another run's in {run.checkpoint}; try another checkpoint path"
        )
    return _State(
        **{name: tensors[name].to(run.model.device) for name in _STATE_TENSORS},
        noise_std=meta["noise_std"],
        contrast=meta["contrast"],
        history=tuple(meta["history"]),
    )
