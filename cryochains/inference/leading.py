"""Quick answers where the population is known: posterior steps in its leading directions alone.

With V (p, k) the directions in which the population moves atoms most, z = μ + V c. The numbers c
are few, and independent of each other and of what is left, which stays at the population's mean and
as wide as the population is. The image's derivatives are those along k tangents instead of p, taken
once for all particles, at the mean. Where nearly all latents matter, all of them are looked at.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from ..model import ChainLayout, Dynamics, Microscope, Model, Population
from ..molecule import Beads
from .likelihood import normal_equations
from .passes import run_passes
from .restarts import average_uncertain
from .run import Run, State

# Of what images tell, at least so much is told of leading directions; found out on so many.
_TOLD_SHARE = 0.98
_PROBED = 16
# Of the latents, directions that more are not worth it.
_MOST_DIRECTIONS = 1 / 3
# Å. The first blur is so many times the population's spread (RMS over atoms), but no less and no
# more than these; from the second on, it is halved once more on the way to sharp images.
_BLUR_OF_SPREAD = 2.5
_LEAST_BLUR = 4.0
_WIDE_BLUR = 5.5
_MOST_BLUR = 8.0


@dataclass(frozen=True, eq=False)
class _LeadingDynamics:
    """Directions instead of latents: what likelihoods ask of `Dynamics`.

    Attributes
    ----------
    dynamics : Dynamics
        Of beads.
    mean : (p,) tensor
    directions : (p, k) tensor
    """

    dynamics: Dynamics
    mean: Tensor
    directions: Tensor

    @cached_property
    def chains(self) -> tuple[ChainLayout]:
        """One chain of all beads."""
        k = self.directions.shape[1]
        everything = slice(0, len(self.dynamics.reference))
        return (ChainLayout(everything, slice(0, k), slice(k, k), slice(k, k)),)

    @cached_property
    def _steps(self) -> Tensor:
        return leading_steps(self.dynamics, self.mean, self.directions)

    def decode(self, weights: Tensor) -> Tensor:
        """(b, n_beads, 3) coordinates of (b, k) weights."""
        return self.dynamics.decode(self.mean + weights @ self.directions.T)

    def tangents(self, weights: Tensor, chain: int, frame: Tensor) -> Tensor:
        """(b, k, n_beads, d) as of `Dynamics.tangents`."""
        k, n, _ = self._steps.shape
        moved = self._steps.view(-1, 3) @ frame.to(weights.dtype).transpose(1, 2)
        return moved.view(len(weights), k, n, -1)


@dataclass(frozen=True, eq=False)
class _LeadingModel:
    """What passes over the images ask of a `Model`, with directions instead of latents."""

    bead_dynamics: _LeadingDynamics
    n_latents: int
    atom_share: Tensor
    microscope: Microscope
    beads: Beads
    box_size: int
    pixel_size: float
    device: torch.device


def leading_steps(dynamics: Dynamics, mean: Tensor, directions: Tensor) -> Tensor:
    """(k, n_beads, 3) Å that one unit of each of (p, k) directions moves beads by, at the mean."""
    parts = []
    for chain, layout in enumerate(dynamics.chains):
        tangents = dynamics.tangents(mean[None], chain)[0]
        moved = directions[layout.latents].T @ tangents.flatten(1)
        parts.append(moved.view(-1, *tangents.shape[1:]))
    return torch.cat(parts, dim=1)


def quick_state(
    run: Run, population: Population, told: tuple[Tensor, Tensor], progress: bool
) -> State:
    """What a few looks tell of particles of a known population, in all latents if need be.

    `told` is what `told_directions` gives.
    """
    directions, variances = told
    spread = float((population.covariance.diagonal() * _atom_share(run.model)).sum()) ** 0.5
    blurs = _quick_blurs(spread)
    quick = replace(run, start=None, taught=None, folder=None, blurs=blurs)
    if not are_few(directions):
        return average_uncertain(quick, run_passes(quick, progress, len(blurs)))
    mean = population.mean.float().to(run.model.device)
    basis = directions.float().to(run.model.device)
    of_weights = replace(
        population,
        mean=torch.zeros(len(variances), dtype=torch.float64),
        covariance=variances.diag(),
        rank=None,
    )
    # It has all that passes use of a model.
    leading = cast(Model, _leading_model(run.model, mean, basis))
    quick = replace(quick, model=leading, population=of_weights)
    state = average_uncertain(quick, run_passes(quick, progress, len(blurs)))
    covariance = population.covariance.double()
    left = covariance.diagonal() - (directions.square() * variances).sum(1)
    spread_left = state.std.square() @ basis.square().T + left.clamp_min(0).to(basis)
    latents = mean + state.proposal @ basis.T
    wide = covariance.to(mean.device)
    return replace(
        state,
        proposal=latents,
        latents=latents,
        std=spread_left.sqrt(),
        mean=mean.double(),
        covariance=wide,
        own_mean=mean.double(),
        wide_covariance=wide,
    )


def are_few(directions: Tensor) -> bool:
    """Whether so many directions (p, k) are worth looking at alone."""
    p, k = directions.shape
    return k <= _MOST_DIRECTIONS * p


@torch.no_grad()
def told_directions(run: Run, population: Population) -> tuple[Tensor, Tensor]:
    """Directions (p, k) in which images tell most of a population, and variances (k,) in Å².

    Of independent directions in which atoms move by 1 Å (RMS over the molecule), those that leave
    out little of λ · λh/(1 + λh), the variance that an image tells, with λ that of the population
    and h the mean information of some images at the mean conformation.
    """
    model = run.model
    root = _atom_share(model).sqrt()
    variances, vectors = torch.linalg.eigh(root[:, None] * population.covariance.double() * root)
    variances = variances.clamp_min(1e-12)
    directions = vectors / root[:, None]
    batch = next(iter(run.particles[:_PROBED].batches(_PROBED, device=model.device)))
    mean = population.mean.float().to(model.device).expand(len(batch.rows), -1)
    spectrum = population.noise_spectrum
    hessian = normal_equations(
        model,
        None,
        batch.pose,
        mean,
        noise_spectrum=None if spectrum is None else spectrum.to(model.device),
    ).hessian
    weight = (population.contrast / population.noise_std) ** 2
    information = weight * hessian.double().mean(0).cpu()
    ratio = variances * ((information @ directions) * directions).sum(0)
    told = variances * ratio / (1 + ratio)
    order = told.argsort(descending=True)
    shares = told[order].cumsum(0) / told.sum()
    chosen = order[: int((shares < _TOLD_SHARE).sum()) + 1]
    return directions[:, chosen], variances[chosen]


def _atom_share(model: Model) -> Tensor:
    return model.atom_share.double().cpu()


def _leading_model(model: Model, mean: Tensor, directions: Tensor) -> _LeadingModel:
    k = directions.shape[1]
    return _LeadingModel(
        _LeadingDynamics(model.bead_dynamics, mean, directions),
        k,
        torch.ones(k, device=model.device),
        model.microscope,
        model.beads,
        model.box_size,
        model.pixel_size,
        model.device,
    )


def _quick_blurs(spread: float) -> tuple[float, ...]:
    """Of a population of a spread in Å, RMS over atoms."""
    first = min(max(_BLUR_OF_SPREAD * spread, _LEAST_BLUR), _MOST_BLUR)
    return (first, 0.0) if first < _WIDE_BLUR else (first, first / 2, 0.0)
