"""Variation of latents that follows the viewing direction is misfit, and none of the molecule's.

How a molecule bends does not depend on from where it is seen, but what a model that cannot express
its conformation does in its stead does: each view asks for another compromise. Of every eigenvector
of the latents' scatter, R² of a regression of its scores on the view says how much of it does, and
its variance is multiplied by 1 − R²/`_MOST_FOLLOWED`. Only even functions of the view count, since
a projection from behind is the same image mirrored, and the first eigenvector is left as it is:
a leading motion that particles show from some sides more often is real.
"""

import math

import torch
from torch import Tensor

# Share of the variance that follows the view at which nothing of a direction is left.
_MOST_FOLLOWED = 0.25
# Of the variance of a direction so much is left in any case.
_SHARE_LEFT = 0.02
# Standard errors of R² that are thought to be chance.
_CHANCE = 2.0
# Particles for each number of the regression: with fewer nothing is said.
_PARTICLES_EACH = 10


def view_features(rotations: Tensor) -> Tensor | None:
    """(n, 15) orthonormal columns that span all even functions up to degree 4 of the view.

    `rotations` (n, 3, 3) turn the molecule before it is projected along z, so that their last rows
    are viewing directions. None where particles are too few, or seen from too few sides, to tell.
    """
    x, y, z = rotations[:, 2].double().unbind(1)
    powers = [(a, b) for a in range(5) for b in range(5 - a)]
    # On the sphere, monomials of degree 4 span those of degrees 2 and 0 too.
    columns = torch.stack([x**a * y**b * z ** (4 - a - b) for a, b in powers], dim=1)
    if len(columns) < _PARTICLES_EACH * len(powers):
        return None
    factor, triangle = torch.linalg.qr(columns)
    steep = triangle.diagonal().abs()
    return factor if bool((steep > 1e-6 * steep.max()).all()) else None


def damp_following(scatter: Tensor, off: Tensor, weights: Tensor, features: Tensor) -> Tensor:
    """(p, p) scatter of latents, less what of it follows the view.

    From latents less their mean (n, p), weights (n,) of particles and `view_features`.
    """
    root = weights.double().sqrt().unsqueeze(1)
    basis = torch.linalg.qr(root * features).Q
    variances, directions = torch.linalg.eigh(scatter)
    scores = root * (off.double() @ directions)
    followed = (basis.T @ scores).square().sum(0) / scores.square().sum(0).clamp_min(1e-30)
    n = float(weights.double().sum())
    k = features.shape[1]
    adjusted = 1 - (1 - followed) * n / max(n - k, 1.0)
    chance = _CHANCE * math.sqrt(2 * k) / n
    share = 1 - (adjusted - chance).clamp_min(0) / _MOST_FOLLOWED
    share = share.clamp_min(_SHARE_LEFT)
    # Eigenvalues ascend.
    share[-1] = 1.0
    return (directions * (variances * share)) @ directions.T
