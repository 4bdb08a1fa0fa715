"""Posterior means and spreads of particles whose posterior is wider than a linearised image holds.

Where images say little, the likelihood along a particle's least certain direction is no Gaussian:
skewed, or with two tops, of which the refinement has climbed one. With u that direction (the first
eigenvector of the posterior covariance C, of variance s²), the posterior is taken as exact along u
and as Gaussian across:

    p_k ∝ exp(−½ ‖y − a f(z + t_k u)‖²/σ² − ½ (z + t_k u − μ)ᵀ Σ⁻¹ (z + t_k u − μ))
    mean = z + Σ p_k t_k u,  covariance = C + (Σ p_k (t_k − t̄)² − s²) u uᵀ

on evenly spaced t_k, which for smooth functions is as exact as any rule (Trefethen and Weideman
2014, SIAM Review 56, 385).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..model import Model
from .posterior import LatentPrior

# RMS Å of a particle's atoms, of the width of an atom: less uncertain ones are as linearised.
_WIDE = 0.25
# Standard deviations to either side, of the prior along the line and at most of the posterior, and
# points: spaced by 1.25 of them or less.
_PRIOR_EXTENT = 4.0
_POSTERIOR_EXTENT = 5.0
_POINTS = 9
# Of the variance along the line so much is left in any case.
_LEAST_LEFT = 0.01


def is_wide(model: Model, std: Tensor) -> Tensor:
    """(n,) mask of particles whose conformation is too uncertain to be linearised."""
    uncertainty = (std.square() * model.atom_share.to(std)).sum(1).sqrt()
    return uncertainty > _WIDE * model.microscope.mean_width


def with_error_bars(covariance: Tensor, std: Tensor) -> Tensor:
    """(b, p, p) covariances of linearised images, as wide along u as error bars (b, p) say."""
    line, variance = least_certain(covariance)
    squares = line.square()
    off = std.to(covariance).square() - covariance.diagonal(dim1=1, dim2=2)
    more = (off * squares).sum(1) / squares.square().sum(1)
    more = more.maximum(_LEAST_LEFT * variance - variance)
    return covariance + more[:, None, None] * line[:, :, None] * line[:, None, :]


def least_certain(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """u (b, p) and s² (b,) of covariances (b, p, p)."""
    variances, directions = torch.linalg.eigh(covariance)
    return directions[:, :, -1], variances[:, -1]


def average_along_line(
    latents: Tensor,
    covariance: Tensor,
    prior: LatentPrior,
    residual_at: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Posterior means and standard deviations (b, p) about the most likely `latents` (b, p).

    From linearised covariances (b, p, p), and the images' ‖y − a f(z)‖²/σ² (b,) at any latents z.
    """
    line, variance = least_certain(covariance)
    extent = _POSTERIOR_EXTENT * variance.sqrt()
    # Along the line the prior is a Gaussian too.
    precision = ((line @ prior.precision) * line).sum(1)
    middle = ((line @ prior.precision) * (prior.mean - latents.double())).sum(1) / precision
    width = _PRIOR_EXTENT * precision.rsqrt()
    first = torch.maximum((middle - width).clamp(max=0), -extent)
    last = torch.minimum((middle + width).clamp(min=0), extent)
    shares = torch.linspace(0, 1, _POINTS).to(variance)
    steps = first[:, None] + (last - first)[:, None] * shares
    logs = []
    for step in steps.unbind(1):
        z = latents.double() + step[:, None] * line
        off = z - prior.mean
        logs.append(-(residual_at(z.to(latents)) + ((off @ prior.precision) * off).sum(1)) / 2)
    weights = torch.softmax(torch.stack(logs, dim=1), dim=1)
    mean = (weights * steps).sum(1)
    spread = (weights * (steps - mean[:, None]).square()).sum(1)
    means = latents.double() + mean[:, None] * line
    own = covariance.diagonal(dim1=1, dim2=2) + (spread - variance)[:, None] * line.square()
    return means.to(latents), own.clamp_min(1e-12).sqrt().to(latents)
