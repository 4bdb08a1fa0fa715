"""Passes over the images: look at each, learn from all, and say where to look next.

A pass is three steps, each a function from one `State` to the next: `_linearise` (reads the
images), `learn_shared` (EM) and `_propose` (the next latents).
"""

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._processes import from_first, gather, is_first, n_processes, total
from ..model import Microscope, Population
from . import image_model
from .expectation import MAX_SCALE_STEP, learn_shared
from .likelihood import (
    NormalEquations,
    Sampler,
    frequency_band,
    join_equations,
    map_blocks,
    normal_equations,
    position_variance,
)
from .posterior import solve_particles
from .run import (
    Linearisation,
    Run,
    State,
    image_sums,
    load_state,
    prior_of,
    residual_power,
    run_identity,
    save_state,
    solve_slices,
    trusted_noise,
)

# Passes at the last blur go on, up to so many, while particles still move by more than CONVERGED
# (RMS Å).
_MAX_EXTRA_PASSES = 4
CONVERGED = 0.1
# Of a ring's pixels, left by the blur: on rings with fewer the noise is not measured.
_MIN_RING_SHARE = 0.01


def run_passes(run: Run, progress: bool, n_passes: int | None = None) -> State:
    """Pass after pass, from the start or a checkpoint, at most so many or to the schedule's end."""
    identity = {} if run.folder is None else run_identity(run)
    known = load_state(run, identity)
    if known is not None and run.folder is not None and run.state is None:
        done = len(known.history)
        run.folder.announce(f"{run.name}: going on after {done} passes", progress)
    state = known or run.state or _first_state(run)
    n = len(run.particles)
    with tqdm(
        # A bar that ends before its total is drawn as one that failed.
        total=min(n_passes or len(run.blurs), len(run.blurs)) * n,
        initial=len(state.history) * n,
        desc="refining",
        unit="particle",
        disable=not progress or not is_first(),
        leave=n_passes is None,
    ) as bar:
        while not _is_done(run, state) and len(state.history) != n_passes:
            if len(state.history) >= len(run.blurs):
                # More passes than planned, until nothing moves any more.
                bar.total += n
            begun = time.monotonic()
            state = one_pass(run, state, bar.update)
            last = state.history[-1]
            bar.set_postfix(blur=f"{last['blur']:g} Å", step=f"{last['step']:.2f} Å")
            if run.folder is not None:
                run.folder.log(_pass_in_words(run, state, time.monotonic() - begun))
            save_state(run, identity, state)
    return state


def _pass_in_words(run: Run, state: State, seconds: float) -> str:
    """What a person reads to see whether a run converges."""
    number, last = len(state.history), state.history[-1]
    of = f" of {len(run.blurs)}" if number <= len(run.blurs) else ""
    return (
        f"{run.name}, pass {number}{of}: blur {last['blur']:g} Å, particles moved by "
        f"{last['step']:.2f} Å, spread {last['spread']:.2f} Å in {last['rank']} directions, "
        f"brightness {last['contrast']:.3g}, noise {last['noise_std']:.3g}, "
        f"{100 * last['junk']:.1f} % show something else, {seconds:.0f} s"
    )


def _is_done(run: Run, state: State) -> bool:
    extra = len(state.history) - len(run.blurs)
    if extra < 0:
        return False
    return state.history[-1]["step"] < CONVERGED or extra >= _MAX_EXTRA_PASSES


def one_pass(run: Run, state: State, update: Callable[[int], object]) -> State:
    """One look at every image: _linearise, refuse steps that made things worse, EM, next step."""
    number = len(state.history)
    blur = run.blurs[min(number, len(run.blurs) - 1)]
    same_blur = number > 0 and blur == state.history[-1]["blur"]
    following = run.blurs[min(number + 1, len(run.blurs) - 1)]
    width = float(np.hypot(run.model.microscope.mean_width, blur))
    learns_spectrum = following != blur or number == len(run.blurs) - 2
    draws = None
    if run.population is None and learns_spectrum:
        n_pixels = frequency_band(run.model.microscope, blur).n_pixels
        draws = _posterior_draws(run, state, width, n_pixels)
    state, linear = _linearise(run, state, blur, draws, update)
    state, means = learn_shared(run, state, linear, number >= len(run.blurs) - 1)
    state, step = _propose(run, state, linear, means, same_blur, width)
    state = replace(state, variance=_position_variances(run, state, linear))
    correlation = _correlation(state)
    if learns_spectrum:
        state = _next_blur(run, state, linear)
    shown = state.responsibility.double()
    square = (step.square() * run.model.atom_share).sum(1).double()
    record_of_first = {
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
            *_weighed_rings(linear, state), run.model.box_size * run.model.pixel_size
        ),
    }
    # Whether a pass is the last one is the same for all processes.
    record = from_first(lambda: record_of_first)
    _require_numbers(state, len(state.history) + 1)
    return replace(state, history=(*state.history, record))


def _require_numbers(state: State, number: int) -> None:
    """Raise ValueError where a pass ended in numbers that are none."""
    bad = ~(state.proposal.isfinite().all(1) & state.std.isfinite().all(1))
    if bad.any():
        raise ValueError(
            f"expected finite latents after pass {number}, got NaN or Inf for {int(bad.sum()):,} "
            f"of {len(bad):,} particles; try fewer modes, and check the images of these particles"
        )


def _first_state(run: Run) -> State:
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
        covariance = run.prior.covariance(run.prior.variance)
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
    state = State(
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
        own_mean=mean,
        wide_covariance=covariance if run.taught is None else run.taught.wide_covariance,
        scale_mean=scale_mean,
        scale_spread=scale_spread,
        **shared,
    )
    return replace(state, variance=_position_variances(run, state, None))


def _linearise(
    run: Run,
    state: State,
    blur: float,
    draws: Callable[[Tensor, Tensor, Tensor], Sampler] | None,
    update: Callable[[int], object],
) -> tuple[State, Linearisation]:
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
    own = run.own
    for batch in run.particles[own].batches(run.batch_size, device=run.model.device):
        rows = batch.rows + own.start
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
        noise = trusted_noise(state, image_sums(equations), rows, band.n_pixels)
        before = objective(rows, state.powers[rows], state.latents[rows], noise)
        # A tenth of a nat is beyond the precision of a sum over all pixels.
        worse = objective(rows, image_sums(equations), z, noise) > before + 0.1
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
        powers[rows] = image_sums(equations)
        parts.append(equations)
        update(len(rows) * n_processes())
    latents, powers, damping = (gather(known[own], n) for known in (latents, powers, damping))
    moved = latents - state.latents
    looked = replace(state, latents=latents, powers=powers, damping=damping)
    return looked, Linearisation(
        join_equations(parts or [_no_equations(run, state, draws is not None)]),
        own,
        moved,
        band.ring_pixels,
        band.n_independent,
        int(total(torch.tensor(refused))),
    )


def _no_equations(run: Run, state: State, sampled: bool) -> NormalEquations:
    """Of a process that has none of few particles."""
    p, n_rings = state.proposal.shape[1], len(state.noise_spectrum)
    slopes, rings = state.proposal.new_zeros(0, p), state.proposal.new_zeros(0, n_rings)
    return NormalEquations(
        state.proposal.new_zeros(0, p, p),
        slopes,
        slopes,
        rings,
        rings,
        rings,
        rings if sampled else None,
    )


def _correlation(state: State) -> float:
    """Of the middle particle's image with the model's."""
    data, overlap, model = state.powers.unbind(1)
    return float((overlap / (data * model).sqrt().clamp_min(1e-30)).median())


def _weighed_rings(linear: Linearisation, state: State) -> tuple[Tensor, Tensor]:
    """(R,) ⟨y, f⟩ and ⟨f, f⟩ of all particles, as far as they show the molecule."""
    weight = state.responsibility[linear.own].double().unsqueeze(1)
    rings = (linear.equations.overlap, linear.equations.model_power)
    overlap, power = (total((weight * ring.double()).sum(0)) for ring in rings)
    return overlap, power


def _objective(state: State) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Minus the log posterior of the particles at `rows`.

    From powers (b, 3) at latents (b, p), and the variance of the noise (b,).
    """
    precision = state.covariance.inverse()

    def objective(rows: Tensor, powers: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        off = latents.double() - state.mean
        distance = ((off @ precision) * off).sum(1)
        seen = powers.isfinite().all(1)
        finite = torch.where(seen.unsqueeze(1), powers, torch.zeros_like(powers))
        residual = residual_power(finite, state.log_scale[rows].exp())
        return torch.where(seen, residual / (2 * noise) + distance / 2, torch.inf)

    return objective


def _posterior_draws(
    run: Run, state: State, width: float, n_pixels: float
) -> Callable[[Tensor, Tensor, Tensor], Sampler]:
    """A sampler for `normal_equations`: conformations and brightnesses as likely as not.

    What is left of an image at such a one is noise, and nothing that is only not known yet.
    `width` in Å is that of an atom: no step is longer.
    """
    prior = prior_of(state)

    def of_batch(batch_rows: Tensor, latents: Tensor, normal: Tensor) -> Sampler:
        def sample(rows: slice, equations: NormalEquations) -> tuple[Tensor, Tensor]:
            chosen = batch_rows[rows]
            z = latents[rows]
            log_scale = state.log_scale[chosen]
            variance = trusted_noise(state, image_sums(equations), chosen, n_pixels)
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
            drawn = (_no_longer_than(width, step, run) + off[:, :-1]).to(z)
            moved = (posterior.step[:, -1] + off[:, -1]).clamp(-MAX_SCALE_STEP, MAX_SCALE_STEP)
            return drawn, (log_scale + moved.to(log_scale)).exp()

        return sample

    return of_batch


def _next_blur(run: Run, state: State, linear: Linearisation) -> State:
    """The noise spectrum learned anew, before the images are looked at with another blur.

    Only then, since objectives under different spectra cannot be compared.
    """
    unknown = torch.full_like(state.powers, torch.inf)
    sampled = linear.equations.sampled_power
    if sampled is None:
        return replace(state, powers=unknown)
    own = linear.own
    weight = (state.responsibility / state.noise_variance)[own].double().unsqueeze(1)
    n_shown = state.responsibility.double().sum().clamp_min(1e-9)
    full = frequency_band(run.model.microscope).ring_pixels
    measured = linear.pixels > _MIN_RING_SHARE * full
    scale = state.log_scale[own].double().exp().unsqueeze(1)
    signal = scale.square() * linear.equations.model_power.double()

    def level_of(powers: Tensor) -> Tensor:
        """Of each ring, for a particle with the common noise level."""
        mean = total((weight * powers.double()).sum(0))
        mean = mean / (n_shown * linear.pixels.clamp_min(1e-9))
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


def _propose(
    run: Run,
    state: State,
    linear: Linearisation,
    means: Tensor,
    same_blur: bool,
    width: float,
) -> tuple[State, Tensor]:
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
    step = _no_longer_than(width, step, run)
    return replace(state, proposal=state.latents + step), step


def _no_longer_than(width: float, step: Tensor, run: Run) -> Tensor:
    """(n, p) steps shortened to `width` Å, RMS over the molecule."""
    length = (step.square() * run.model.atom_share).sum(1).sqrt()
    return step * (width / length.clamp_min(1e-9)).clamp(max=1.0).unsqueeze(1)


def _position_variances(run: Run, state: State, linear: Linearisation | None) -> Tensor:
    """(n, n_beads) how uncertain every bead's position is, from what is known of each particle.

    Before any image was seen, where there is no `linear`, from the prior.
    """
    model = run.model
    precision = state.covariance.inverse().float()
    variance = torch.empty_like(state.variance)
    own = run.own

    def fill(rows: slice) -> None:
        information = precision.expand(rows.stop - rows.start, -1, -1)
        if linear is not None:
            noise = trusted_noise(state, state.powers[rows], rows, linear.n_pixels)
            weight = (state.log_scale[rows].double().exp().square() / noise).float()
            of_own = slice(rows.start - own.start, rows.stop - own.start)
            information = weight[:, None, None] * linear.equations.hessian[of_own] + precision
        covariance = torch.linalg.inv(information)
        rotations = run.particles.rotations[rows].to(precision)
        variance[rows] = position_variance(
            model.bead_dynamics, state.proposal[rows], rotations, covariance
        )

    map_blocks(fill, solve_slices(own), variance.device)
    return gather(variance[own], len(variance))


def _spectrum_of(population: Population, microscope: Microscope) -> Tensor:
    """(R,) noise spectrum of a population; white where it has none."""
    if population.noise_spectrum is None:
        return torch.ones(microscope.box_size // 2 + 1, dtype=torch.float64)
    return population.noise_spectrum.double()
