"""Scores against a known truth, and what any method could reach (the information limit).

No score re-superposes: poses are given, so a conformation in the wrong place is wrong. Over many particles an RMSD
is pooled (the root of the mean over particles and atoms), so that explained motion = 1 − (RMSD / RMSD of the mean)².
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from .dynamics import Dynamics
from .likelihood import normal_equations
from .model import CryoChains
from .particles import ParticleStack
from .population import Population

CHUNK = 256


def rmsd(coords: Tensor, truth: Tensor) -> Tensor:
    """(b,) RMSD in Å of (b, n_atoms, 3) coordinates, without re-superposition.

    Examples
    --------
    >>> float(rmsd(torch.zeros(1, 4, 3), torch.ones(1, 4, 3)).square())
    3.0
    """
    if coords.shape != truth.shape:
        raise ValueError(f"expected coordinates of one shape, got {tuple(coords.shape)} and {tuple(truth.shape)}")
    return (coords - truth).square().sum(-1).mean(-1).sqrt()


@dataclass(frozen=True, eq=False)
class Scores:
    """How near the predicted conformations of held-out particles are to the true ones.

    rmsd (Å, pooled); rmsd_per_particle (N,); mean_rmsd (Å, pooled): of the mean true conformation;
    mean_rmsd_per_particle (N,); explained_motion: 1 − Σ‖X̂ − X‖² / Σ‖X − mean X‖², 0 is the mean conformation's.
    """

    rmsd: float
    explained_motion: float
    mean_rmsd: float
    rmsd_per_particle: np.ndarray
    mean_rmsd_per_particle: np.ndarray

    def __repr__(self) -> str:
        return (
            f"Scores(RMSD {self.rmsd:.2f} Å, mean conformation {self.mean_rmsd:.2f} Å, "
            f"explained motion {self.explained_motion:.2f})"
        )


@torch.no_grad()
def score_motion(dynamics: Dynamics, latents: Tensor, particles: ParticleStack) -> Scores:
    """Score (N, p) `latents` against the truth that simulated `particles` carry.

    Raises
    ------
    ValueError
        When the particles have no known truth, or there is not one row of latents a particle.
    """
    truth = _truth(particles)
    if len(latents) != len(particles):
        raise ValueError(f"expected one row of latents a particle ({len(particles)}), got {len(latents)}")
    blocks = torch.arange(len(particles)).split(CHUNK)
    total = sum(truth.coords(rows).double().sum(0) for rows in blocks)
    mean = (total / len(particles)).float()
    own, of_mean = [], []
    for rows in blocks:
        true = truth.coords(rows).float()
        own.append(rmsd(dynamics.decode(latents[rows].to(dynamics.reference)).cpu(), true))
        of_mean.append(rmsd(mean.expand_as(true), true))
    own, of_mean = torch.cat(own).double(), torch.cat(of_mean).double()
    squares = float(own.square().mean()), float(of_mean.square().mean())
    explained = 1 - squares[0] / squares[1] if squares[1] > 0 else float("nan")
    return Scores(squares[0] ** 0.5, explained, squares[1] ** 0.5, own.numpy(), of_mean.numpy())


def correlation(component, coordinate) -> float:
    """|Spearman| correlation of a latent coordinate (N,) with a true one (N,); the sign of a component is arbitrary.

    Examples
    --------
    >>> correlation([1, 2, 3, 4], [9, 7, 5, 1])
    1.0
    """
    return abs(float(spearmanr(np.asarray(component), np.asarray(coordinate)).statistic))


def true_latents(dynamics: Dynamics, particles: ParticleStack) -> tuple[Tensor, Tensor]:
    """Best latents of each particle's true conformation (N, p), and the manifold floor (N,): what is left, in Å."""
    truth = _truth(particles)
    if truth.frame is not None:
        # Particles of a morph share conformations: each is fitted once.
        frames, back = torch.unique(truth.frame, return_inverse=True)
        blocks = truth.conformations[frames].split(CHUNK)
    else:
        back = torch.arange(len(particles))
        blocks = map(truth.coords, back.split(CHUNK))
    found, floors = [], []
    for coords in blocks:
        z = dynamics.fit(coords)
        found.append(z.cpu())
        floors.append(rmsd(dynamics.decode(z).cpu(), coords))
    return torch.cat(found)[back], torch.cat(floors)[back]


def true_population(model: CryoChains, particles: ParticleStack, latents: Tensor | None = None) -> Population:
    """The population that simulated `particles` were drawn from: mean and covariance of the true latents, true noise.

    The best prior a Gaussian model can have, which is what the information limit assumes.
    """
    z = (true_latents(model.dynamics, particles)[0] if latents is None else latents).cpu().double()
    off = z - z.mean(0)
    # A morph moves in few directions only; 10⁻³ Å keeps its covariance invertible.
    covariance = off.T @ off / len(z) + 1e-6 * torch.eye(z.shape[1])
    return Population(z.mean(0), covariance, _truth(particles).noise_std, 1.0, model.structure.content_hash)


@torch.no_grad()
def information_limit(
    model: CryoChains, particles: ParticleStack, population: Population | None = None, latents: Tensor | None = None
) -> np.ndarray:
    """(N,) RMSD in Å that no method beats on average: the Laplace / van Trees bound at the truth, on the atoms.

    Σ_post = (JᵀJ/σ² + Σ⁻¹)⁻¹ carried to coordinates, plus the manifold floor. Pool it as RMSDs are pooled: the root of
    the mean square.

    Parameters
    ----------
    population : Population, optional
        Default `true_population` of these particles.
    latents : (N, p) tensor, optional
        The truth, when the model is well specified; default the best fit to the true coordinates.

    Notes
    -----
    Van Trees (1968), Detection, Estimation, and Modulation Theory, section 2.4. For a population that is not Gaussian
    it is the bound for methods that know its mean and covariance only.
    """
    floor = np.zeros(len(particles))
    if latents is None:
        latents, floor_tensor = true_latents(model.dynamics, particles)
        floor = floor_tensor.numpy()
    population = population or true_population(model, particles, latents)
    prior = population.covariance.inverse().to(model.device)
    if not population.noise_std > 0:
        raise ValueError("expected noisy particles, got none of noise: nothing limits what can be known of them")
    before, limits = model.contrast.clone(), []
    latents = latents.to(model.device)
    model.contrast.fill_(population.contrast)
    for batch in particles.batches(64, device=model.device):
        # In float32 the information of what is hidden, divided by little noise, would be far from zero.
        z = latents[batch.rows].double()
        pose = tuple(None if part is None else part.double() for part in batch.pose)
        hessian = normal_equations(model, None, pose, z).hessian / population.noise_std**2
        covariance = (hessian + prior).inverse()
        limits.append((covariance * model.dynamics.gram(z)).sum((1, 2)) / model.structure.n_atoms)
    model.contrast.copy_(before)
    return np.sqrt(torch.cat(limits).cpu().numpy() + floor**2)


def _truth(particles: ParticleStack):
    if particles.truth is None:
        raise ValueError("expected simulated particles, whose truth is known, got particles without one")
    return particles.truth
