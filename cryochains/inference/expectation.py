"""EM on the stored normal equations: what particles share, and what each has of its own.

Symbols: as in `refinement`. No image is read here: expectation and maximisation take turns on the
linearised images of one pass.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from .._processes import agree, gather, total
from ..model import ElasticPrior, Population, shrink_covariance, with_less_rest
from . import image_model
from .gate import damp_following, view_features
from .likelihood import map_blocks
from .posterior import solve_particles
from .run import (
    Linearisation,
    Run,
    State,
    Taught,
    agreed_state,
    prior_of,
    residual_power,
    solve_slices,
    trusted_noise,
)

# EM on the stored normal equations: few steps while they will be made anew, more at the end; it
# stops at a change in Å.
_EM_STEPS = 10
_LAST_EM_STEPS = 20
_EM_TOLERANCE = 3e-3
# EM steps where the population is given: for what a particle has of its own.
_OWN_STEPS = 3
_MOST_HALVINGS = 6
# What is left of the variance of a direction that is not a leading one after all.
_GIVEN_UP = 0.1
# Of posterior covariances that are made at a time on a CPU.
_CACHED_BYTES = 2**22
# Log brightness changes by no more in a step.
MAX_SCALE_STEP = 0.5


def learn_shared(
    run: Run, state: State, linear: Linearisation, settled: bool
) -> tuple[State, Tensor]:
    """EM on the stored equations: what particles have of their own, and share unless it is given.

    `settled` is whether conformations are about known. Returns the state and the posterior means
    (n, p).
    """
    n_steps = _LAST_EM_STEPS if settled else _EM_STEPS
    learns = run.population is None or (run.taught is not None and settled)
    trace = torch.zeros_like(state.evidence)
    outlier = gather(
        image_model.outlier_evidence(
            linear.equations.data_power,
            linear.equations.model_power,
            linear.pixels,
            math.exp(state.scale_mean),
        ),
        len(state.proposal),
    )
    first = state.responsibility
    if learns:
        state = replace(state, mean=state.own_mean, covariance=state.wide_covariance)
    # Damped before conformations are known, a leading motion would keep its first direction.
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
            state = _maximisation(run.prior, state, means, covariance_sum, features)
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
            state = agreed_state(state)
        if number > 0 and _change(before, state) < _EM_TOLERANCE:
            break
    if learns:
        state = replace(state, own_mean=state.mean, wide_covariance=state.covariance)
        if run.population is not None and run.taught is not None:
            mean, covariance = taught_by_all(run.population, run.taught, state)
            state, means, *_ = _expectation(
                replace(state, mean=mean, covariance=covariance), linear
            )
    if learns and settled and state.rank:
        state, means = _fewer_directions(state, linear, means)
    return replace(state, misfit=_misfit(state, linear)), means


def taught_by_all(population: Population, taught: Taught, state: State) -> tuple[Tensor, Tensor]:
    """Mean and wide covariance of the particles before and of these, as many as each are.

    Estimates of independent samples, averaged: their errors shrink as those of all particles
    together, and no sample but the present one has to be kept.
    """
    share = len(state.proposal) / (taught.n + len(state.proposal))
    mean = torch.lerp(population.mean.to(state.own_mean), state.own_mean, share)
    wide = taught.wide_covariance.to(state.wide_covariance)
    return mean, torch.lerp(wide, state.wide_covariance, share)


def _fewer_directions(state: State, linear: Linearisation, means: Tensor) -> tuple[State, Tensor]:
    """Directions beside the leading ones narrowed, and leading ones given up, as images say.

    EM hardly moves an amplitude of which images say little: it is halved as long as they are
    likelier so. A direction is a leading one only where it makes them likelier by more than its
    parameters do by chance: ½ p log n each (Schwarz 1978).
    """

    def look(covariance: Tensor) -> tuple[State, Tensor, float]:
        seen, answer, *_ = _expectation(replace(state, covariance=covariance), linear)
        likelihood = (seen.responsibility.double() * seen.evidence).sum()
        return seen, answer, float(agree(likelihood))

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


def _learn_noise(state: State, linear: Linearisation, trace: Tensor, learns: bool) -> State:
    """The noise of every particle, and what they have in common."""
    scale = state.log_scale.exp()
    residual = residual_power(state.powers, scale).clamp_min(0)
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
    state: State, linear: Linearisation
) -> tuple[State, Tensor, Tensor, Tensor, Tensor]:
    """Of every particle the posterior.

    Returns the state with error bars, brightnesses and evidence, the posterior means (n, p),
    Σ r_i C_i, the traces (n,) and the variances of log brightness (n,).
    """
    n, p = state.latents.shape
    prior = prior_of(state)
    means = torch.empty_like(state.latents)
    std = torch.empty_like(state.latents)
    log_scale = torch.empty_like(state.log_scale)
    scale_variance = torch.empty_like(state.evidence)
    evidence = torch.empty_like(state.evidence)
    trace = torch.empty_like(state.evidence)
    own = linear.own

    def solve(rows: slice) -> Tensor:
        noise = trusted_noise(state, state.powers[rows], rows, linear.n_pixels)
        posterior = solve_particles(
            linear.equations[rows.start - own.start : rows.stop - own.start],
            state.latents[rows],
            state.log_scale[rows],
            noise,
            state.damping[rows],
            prior,
            linear.n_pixels,
        )
        means[rows] = state.latents[rows] + posterior.step[:, :p].to(means)
        moved = posterior.step[:, p].clamp(-MAX_SCALE_STEP, MAX_SCALE_STEP)
        log_scale[rows] = state.log_scale[rows] + moved.to(log_scale)
        variances = posterior.covariance.diagonal(dim1=1, dim2=2)
        std[rows] = variances[:, :p].sqrt().to(std)
        scale_variance[rows] = variances[:, p]
        evidence[rows] = posterior.evidence
        trace[rows] = posterior.trace * noise / state.noise_variance[rows].double()
        weights = state.responsibility[rows].double()
        return (weights @ posterior.covariance.flatten(1)).view(p + 1, p + 1)[:p, :p]

    parts = map_blocks(solve, _covariance_slices(own, p, means.device), means.device)
    # A process may have no particle of few.
    nothing = torch.zeros(p, p, dtype=torch.float64, device=means.device)
    covariance_sum = total(torch.stack([nothing, *parts]).sum(0))
    means, std, log_scale, evidence, trace, scale_variance = (
        gather(known[own], n) for known in (means, std, log_scale, evidence, trace, scale_variance)
    )
    state = replace(state, std=std, log_scale=log_scale, evidence=evidence)
    return state, means, covariance_sum, trace, scale_variance


def _covariance_slices(own: slice, p: int, device: torch.device) -> list[slice]:
    """So few particles at a time that a CPU's cache holds what is known of them."""
    if device.type != "cpu":
        return solve_slices(own)
    step = max(1, _CACHED_BYTES // (8 * (p + 1) ** 2))
    starts = range(own.start, own.stop, step)
    return [slice(start, min(start + step, own.stop)) for start in starts]


def _misfit(state: State, linear: Linearisation) -> Tensor:
    """(n,) χ² per pixel on the rings where the molecule shows, under the shared noise."""
    equations = linear.equations
    scale = state.log_scale[linear.own].double().exp().unsqueeze(1)
    residual = (
        equations.data_power.double()
        - 2 * scale * equations.overlap.double()
        + scale.square() * equations.model_power.double()
    )
    n = len(state.proposal)
    power = total(equations.model_power.double().sum(0)) / n
    shows = power / linear.pixels.clamp_min(1e-9) > 0.1 * power.sum() / linear.n_pixels
    shows &= linear.pixels > 0
    pixels = linear.pixels[shows].sum()
    chi = gather(residual[:, shows].sum(1), n) / (pixels * state.noise_variance.double())
    return chi.to(state.log_scale)


def _maximisation(
    prior: ElasticPrior,
    state: State,
    means: Tensor,
    covariance_sum: Tensor,
    features: Tensor | None,
) -> State:
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
    covariance, rank = shrink_covariance(scatter, n_shown, prior)
    narrower = (prior.limit / covariance.diagonal().sqrt()).clamp(max=1.0)
    covariance = narrower[:, None] * covariance * narrower
    return replace(state, mean=mean, covariance=covariance, rank=rank)


def _change(before: State, after: State) -> float:
    """Å, the largest change of the population's mean or spread along a latent."""
    of_mean = (after.mean - before.mean).abs().max()
    spreads = after.covariance.diagonal().sqrt() - before.covariance.diagonal().sqrt()
    return float(torch.maximum(of_mean, spreads.abs().max()))
