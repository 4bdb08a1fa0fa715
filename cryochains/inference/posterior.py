"""The posterior of a particle's latents and brightness, as its linearised image and a prior say.

Symbols: as in `refinement`. With e the step of (z, b) from where the image was linearised, P the
precision of the prior and p its pull,

    A = [a²H, a²Jᵀf; ·, a²fᵀf]/σ² + P,  e = A⁻¹ (a Jᵀ(y − a f)/σ² − p),  C = A⁻¹

and the log evidence is Laplace's: of the best fit, less what it costs to have looked for it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .image_model import tail_weight
from .likelihood import NormalEquations

# Of the largest information, what rounding in single precision may take from any direction.
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class _Posterior:
    """Of b particles: steps of latents and log brightness, and how well these are known.

    Attributes
    ----------
    step : (b, p + 1) float64 tensor
        From the latents and brightness that the equations are of.
    covariance : (b, p + 1, p + 1) float64 tensor
    trace : (b,) float64 tensor
        How much of the residual (in σ²) what is not known takes away.
    evidence : (b,) float64 tensor
        Log evidence of the molecule at its pose.
    """

    step: Tensor
    covariance: Tensor
    trace: Tensor
    evidence: Tensor


@dataclass(frozen=True, eq=False)
class LatentPrior:
    """The prior of latents and log brightness, as matrices; made by `latent_prior`.

    Attributes
    ----------
    mean : (p,) tensor
    precision : (p, p) tensor
    log_determinant : float
        Of `precision`.
    scale_mean, scale_spread : float
        Of log brightness.
    """

    mean: Tensor
    precision: Tensor
    log_determinant: float
    scale_mean: float
    scale_spread: float


def latent_prior(
    mean: Tensor, covariance: Tensor, scale_mean: float, scale_spread: float
) -> LatentPrior:
    """The matrices of a prior with a mean (p,), a covariance (p, p), and the widths of b."""
    precision = covariance.inverse()
    return LatentPrior(mean, precision, float(torch.logdet(precision)), scale_mean, scale_spread)


def solve_particles(
    equations: NormalEquations,
    latents: Tensor,
    log_scale: Tensor,
    noise: Tensor,
    damping: Tensor,
    prior: LatentPrior,
    n_pixels: float,
) -> _Posterior:
    """The posterior of b particles, as their linearised images and the prior say.

    With b as one more latent, whose derivative of the image is the image itself.
    """
    p = latents.shape[1]
    scale = log_scale.double().exp()
    inverse_noise = 1 / noise
    power = equations.model_power.double().sum(1)
    overlap = equations.overlap.double().sum(1)
    data = equations.data_power.double().sum(1)
    # The prior, whose tail towards bright particles is heavy.
    surprise = (log_scale.double() - prior.scale_mean) / prior.scale_spread
    stiffness = tail_weight(surprise) / prior.scale_spread**2
    off = latents.double() - prior.mean
    pull = off @ prior.precision
    slope = latents.new_empty(len(latents), p + 1, dtype=torch.float64)
    slope[:, :p] = inverse_noise[:, None] * equations.gradient(scale).double() - pull
    slope[:, p] = inverse_noise * (scale * overlap - scale.square() * power)
    slope[:, p] -= stiffness * prior.scale_spread * surprise
    weight = scale.square() * inverse_noise
    covariance, log_determinant, trace = _known(equations, weight, power, stiffness, prior)
    step = (covariance @ slope.unsqueeze(-1)).squeeze(-1)
    residual = data - 2 * scale * overlap + scale.square() * power
    evidence = (
        -residual * inverse_noise
        - n_pixels * noise.log()
        - (pull * off).sum(1)
        - stiffness * (prior.scale_spread * surprise).square()
        + (slope * step).sum(1)
        - log_determinant
        + prior.log_determinant
        + stiffness.log()
    ) / 2
    damped = damping > 0
    if damped.any():
        total = _information(equations[damped], weight[damped], power[damped])
        total[:, :p, :p] += prior.precision
        total[:, p, p] += stiffness[damped]
        total.diagonal(dim1=1, dim2=2)[:, :p] += damping[damped].double().unsqueeze(1)
        step[damped] = torch.linalg.solve(total, slope[damped])
    return _Posterior(step, covariance, trace, evidence)


def _known(
    equations: NormalEquations,
    weight: Tensor,
    power: Tensor,
    stiffness: Tensor,
    prior: LatentPrior,
) -> tuple[Tensor, Tensor, Tensor]:
    """C (b, p + 1, p + 1), log determinant of A (b,), and the trace of C (A − P) (b,)."""
    n, p = equations.model_slope.shape
    if weight.device.type == "cpu":
        # Numba is only needed here.
        from .inversion import invert_information

        covariance, log_determinant = invert_information(
            equations.hessian, weight, equations.model_slope, power, prior.precision, stiffness
        )
        of_prior = torch.nn.functional.pad(prior.precision, (0, 1, 0, 1)).flatten()
        trace = p + 1 - covariance.flatten(1) @ of_prior - covariance[:, p, p] * stiffness
        again = log_determinant.isnan()
    else:
        covariance = weight.new_empty(n, p + 1, p + 1)
        log_determinant, trace = torch.empty_like(weight), torch.empty_like(weight)
        again = torch.ones_like(weight, dtype=torch.bool)
    if again.any():
        information = _information(equations[again], weight[again], power[again])
        total = information.clone()
        total[:, :p, :p] += prior.precision
        total[:, p, p] += stiffness[again]
        factor = _factor(total)
        inverse = torch.cholesky_inverse(factor)
        covariance[again] = inverse
        log_determinant[again] = 2 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        trace[again] = (inverse * information).sum((1, 2))
    return covariance, log_determinant, trace


def _information(equations: NormalEquations, weight: Tensor, power: Tensor) -> Tensor:
    """(b, p + 1, p + 1) a²/σ² [H, Jᵀf; ·, fᵀf]."""
    n, p = equations.model_slope.shape
    information = weight.new_empty(n, p + 1, p + 1)
    information[:, :p, :p] = equations.hessian
    information[:, :p, p] = equations.model_slope
    information[:, p, :p] = equations.model_slope
    information[:, p, p] = power
    return information.mul_(weight[:, None, None])


def _factor(precision: Tensor) -> Tensor:
    """(b, q, q) Cholesky factors, also where single precision made a matrix indefinite.

    Of images that say much of most latents and next to nothing of one, with a wide prior.
    """
    factor, failed = torch.linalg.cholesky_ex(precision)
    ridge = _ROUNDING
    while failed.any() and ridge < 1:
        bad = failed > 0
        largest = precision[bad].diagonal(dim1=1, dim2=2).amax(1)
        more = ridge * largest[:, None, None] * torch.eye(precision.shape[1]).to(precision)
        factor[bad], failed[bad] = torch.linalg.cholesky_ex(precision[bad] + more)
        ridge *= 100
    return factor
