"""Particles that a run did not serve well: stuck ones, lost ones, and hardly known ones."""

from dataclasses import replace
from functools import partial

import torch
from sklearn.cluster import KMeans
from torch import Tensor
from tqdm.auto import tqdm

from .._processes import agree, gather, is_first, own_share
from ..images import Batch
from ..model import Population
from .averaging import average_along_line, is_wide, least_certain
from .likelihood import frequency_band, image_powers, normal_equations, position_variance
from .passes import CONVERGED, one_pass, run_passes
from .posterior import solve_particles
from .run import PARTICLE_TENSORS, Run, State, prior_of, residual_power, trusted_noise
from .search import Starts, search_turns

# Standard deviations (as a MAD tells) beyond the median distance from the population's mean at
# which a particle is thought to be stuck, and the blurs (Å) of its second start, before the run's
# last one.
_STUCK_DEVIATIONS = 6.0
_RESTART_BLURS = (4.0,)
# Where it begins, beside the population's mean: so many points at which other particles gather.
_STARTS = 8
# Nats by which the second orientation of a body that may turn by any angle is less likely, in the
# search, where it is refined too.
_SECOND_BEST = 15.0
# Twice the nats by which a particle is less likely than where it started before it goes back.
_LESS_LIKELY = 0.2


def search_starts(run: Run, progress: bool) -> Starts:
    """Where bodies that may turn by any angle are, all else as the population's mean."""
    mean = torch.zeros(run.model.n_latents)
    if run.population is not None:
        mean = run.population.mean
    return search_turns(run.model, run.particles, mean, progress)


def start_again(run: Run, state: State, population: Population) -> tuple[State, Tensor]:
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
    prior = prior_of(state)
    off = state.proposal.double() - prior.mean
    distance = ((off @ prior.precision) * off).sum(1)
    middle = distance.median()
    deviation = (distance - middle).abs().median().clamp_min(1e-9)
    stuck = agree(distance > middle + _STUCK_DEVIATIONS * deviation)
    starts = agree(torch.cat([prior.mean.to(state.proposal)[None], _gatherings(state, ~stuck)]))
    starts = starts[:, None].expand(-1, int(stuck.sum()), -1)
    state, better = _started_at(run, state, population, stuck, starts)
    return state, rescued | better


def _started_at(
    run: Run, state: State, population: Population, chosen: Tensor, starts: Tensor
) -> tuple[State, Tensor]:
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
        folder=None,
        taught=None,
        state=None,
        # Only evidence of images with the same blur can be compared.
        blurs=(*(blur for blur in _RESTART_BLURS if blur > last), last, last),
    )
    if len(starts) > 1:
        looks = [
            run_passes(replace(again, start=start), progress=False, n_passes=1).evidence
            for start in starts
        ]
        best = torch.stack(looks).argmax(0)
        again = replace(again, start=starts[best, torch.arange(len(rows), device=best.device)])
    other = run_passes(again, progress=False)
    better = other.evidence > state.evidence[chosen] + 1
    kept[chosen] = better
    answer = {}
    for name in PARTICLE_TENSORS:
        values = getattr(state, name).clone()
        values[kept] = getattr(other, name)[better]
        answer[name] = values
    return replace(state, **answer), kept


def _gatherings(state: State, of: Tensor) -> Tensor:
    """(k, p) latents about which particles gather, of those in a mask (n,)."""
    latents = state.proposal[of].cpu()
    most = min(_STARTS, len(latents))
    if not most:
        return state.proposal[:0]
    centres = KMeans(most, n_init=1, random_state=0).fit(latents.double().numpy()).cluster_centers_
    return torch.from_numpy(centres).to(state.proposal)


def learn_once_more(run: Run, state: State, rescued: Tensor, progress: bool) -> State:
    """A pass or two, in which the population learns of particles that were stuck before."""
    powers = state.powers.clone()
    powers[rescued] = torch.inf
    state = replace(state, powers=powers)
    n, shown = len(run.particles), progress and is_first()
    with tqdm(total=n, desc="rescued", unit="particle", disable=not shown, leave=False) as bar:
        state = one_pass(run, state, bar.update)
        if state.history[-1]["step"] > CONVERGED:
            bar.total += n
            state = one_pass(run, state, bar.update)
    return state


def no_worse_than_start(run: Run, state: State) -> State:
    """Particles that are less likely than where they started go back; with no start, to the mean.

    Objectives of different blurs cannot be compared while a particle moves, and a model that cannot
    express its conformation may lose its way between them.
    """
    prior = prior_of(state)
    start = prior.mean.float().expand_as(state.proposal) if run.start is None else run.start
    start = start.to(state.proposal)
    n_pixels = frequency_band(run.model.microscope).n_pixels
    latents, log_scale, misfit = (
        getattr(state, name).clone() for name in ("proposal", "log_scale", "misfit")
    )
    own = run.own
    for batch in run.particles[own].batches(run.batch_size, device=run.model.device):
        rows = batch.rows + own.start
        noise = trusted_noise(state, state.powers[rows], rows, n_pixels)
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
    n = len(latents)
    latents, log_scale, misfit = (gather(known[own], n) for known in (latents, log_scale, misfit))
    return replace(state, proposal=latents, log_scale=log_scale, misfit=misfit)


def average_uncertain(run: Run, state: State) -> State:
    """Means and error bars of particles that are too uncertain for a linearised image."""
    wide = agree(is_wide(run.model, state.std)).nonzero().squeeze(1)
    if not len(wide):
        return state
    own = own_share(len(wide))
    prior = prior_of(state)
    n_pixels = frequency_band(run.model.microscope).n_pixels
    latents, std = state.proposal.clone(), state.std.clone()
    particles = run.particles[wide[own].cpu().numpy()]
    for batch in particles.batches(run.batch_size, run.model.device):
        rows = wide[own][batch.rows]
        noise = trusted_noise(state, state.powers[rows], rows, n_pixels)
        covariance = _covariance_at(run, state, rows, batch, noise)
        line, variance = least_certain(covariance)
        # Atoms are as wide as they are uncertain across the line.
        across = covariance - variance[:, None, None] * line[:, :, None] * line[:, None, :]
        residual_at = partial(
            _residual_at,
            run,
            state,
            batch,
            noise,
            position_variance(
                run.model.bead_dynamics,
                state.proposal[rows],
                batch.pose[0],
                across.to(state.proposal),
            ),
            state.log_scale[rows].exp(),
        )
        latents[rows], std[rows] = average_along_line(
            state.proposal[rows], covariance, prior, residual_at
        )
    for known in (latents, std):
        known[wide] = gather(known[wide[own]], len(wide))
    return replace(state, proposal=latents, std=std)


def _covariance_at(run: Run, state: State, rows: Tensor, batch: Batch, noise: Tensor) -> Tensor:
    """(b, p, p) posterior covariances of a batch's images, linearised at their proposals."""
    equations = normal_equations(
        run.model,
        batch.images,
        batch.pose,
        state.proposal[rows],
        noise_spectrum=state.noise_spectrum,
        variance=state.variance[rows],
    )
    log_scale = state.log_scale[rows]
    posterior = solve_particles(
        equations,
        state.proposal[rows],
        log_scale,
        noise,
        torch.zeros_like(log_scale),
        prior_of(state),
        frequency_band(run.model.microscope).n_pixels,
    )
    p = state.proposal.shape[1]
    return posterior.covariance[:, :p, :p]


def _residual_at(
    run: Run,
    state: State,
    batch: Batch,
    noise: Tensor,
    variance: Tensor,
    scale: Tensor,
    latents: Tensor,
) -> Tensor:
    """(b,) ‖y − a f‖²/σ² of a batch's images."""
    powers = image_powers(
        run.model,
        batch.images,
        batch.pose,
        latents,
        noise_spectrum=state.noise_spectrum,
        variance=variance,
    )
    return residual_power(powers, scale) / noise
