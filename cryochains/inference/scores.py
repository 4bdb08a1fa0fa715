"""Scores against a known truth, and what any method could reach (the information limit).

Two frames: in that of the molecule, conformations are compared after each was superposed on the
reference, since what a superposition takes out is a pose. In that of the given poses nothing is
superposed, and a conformation at the wrong position is wrong. Over many particles an RMSD is pooled
(the root of the mean over particles and atoms), so that
explained motion = 1 − (RMSD / RMSD of the mean)².
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .._arguments import Latents, checked
from .._devices import choose_device
from ..images import ParticleStack
from ..model import (
    Model,
    Population,
    Truth,
    frame_jacobian,
    require_population,
    require_same_images,
    superposed,
)
from .frames import MOLECULE, POSES, chosen_frame, frame_words
from .identity import require_latents
from .likelihood import information_of, normal_equations
from .result import Result

# Width of log brightness in simulations, whose images are all as bright.
_NO_SPREAD = 1e-6
# Conformations compared at a time.
CONFORMATIONS_AT_A_TIME = 256


class _Components(Protocol):
    """What `score` needs of principal motions: the scores of a result on each component."""

    def transform(self, other: Result) -> np.ndarray:
        """(N, k) scores of the particles of a result."""


@checked
def rmsd(coords: Tensor, truth: Tensor) -> Tensor:
    """(b,) RMSD in Å of (b, n_atoms, 3) coordinates, without re-superposition.

    Examples
    --------
    >>> float(rmsd(torch.zeros(1, 4, 3), torch.ones(1, 4, 3)).square())
    3.0
    """
    if coords.shape != truth.shape:
        raise ValueError(
            f"expected coordinates of one shape, got {tuple(coords.shape)} and "
            f"{tuple(truth.shape)}; try expand_as"
        )
    return (coords - truth).square().sum(-1).mean(-1).sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """How near the predicted conformations of held-out particles are to the true ones.

    Attributes
    ----------
    rmsd : float
        Å, pooled over particles and atoms.
    explained_motion : float
        1 − Σ‖X̂ − X‖² / Σ‖X − mean X‖²; 0 is the mean conformation's.
    mean_rmsd : float
        Å, pooled, of the mean true conformation.
    rmsd_per_particle, mean_rmsd_per_particle : (N,) arrays
    spearman : float or None
        |Spearman| of the first of the given components with the true coordinate, where there are
        both.
    frame : {"molecule", "poses"}
        Whether conformations were superposed on the reference.
    """

    rmsd: float
    explained_motion: float
    mean_rmsd: float
    rmsd_per_particle: np.ndarray
    mean_rmsd_per_particle: np.ndarray
    spearman: float | None = None
    frame: str = POSES

    def __repr__(self) -> str:
        parts = [
            f"RMSD {self.rmsd:.2f} Å",
            f"mean conformation {self.mean_rmsd:.2f} Å",
            f"explained motion {self.explained_motion:.2f}",
        ]
        if self.spearman is not None:
            parts.append(f"|Spearman| of PC1 {self.spearman:.3f}")
        parts.append(frame_words(self.frame))
        return f"Scores({', '.join(parts)})"


@torch.no_grad()
@checked
def score(result: Result, motions: _Components | None = None, frame: str | None = None) -> Scores:
    """Score a result against the truth that its simulated particles carry.

    Parameters
    ----------
    result : Result
        Of particles that nothing was learned from.
    motions : PrincipalMotions, optional
        Whose first component is compared with the true coordinate.
    frame : {"molecule", "poses"}, optional
        "molecule" superposes every conformation, predicted and true, on the reference; "poses"
        superposes none. By default "molecule" where the model's chains turn and shift, else
        "poses": name one to compare models of both kinds.

    Returns
    -------
    Scores

    Raises
    ------
    ValueError
        When the particles are absent or their truth is not known, and for another frame.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> score(Result(model, torch.zeros(8, 12), particles=particles)).rmsd < 1e-3
    True
    """
    if result.particles is None:
        raise ValueError(
            f"expected a result with its particles, got {result!r} without; "
            "try load_result(path, particles)"
        )
    frame = _scored_frame(result.model, frame)
    truth = _truth_of(result.particles)
    _require_same_atoms(result.model, truth)
    dynamics = result.model.dynamics

    def framed(coords: Tensor) -> Tensor:
        return superposed(dynamics, coords) if frame == MOLECULE else coords

    own_frame = result.in_frame(POSES)
    blocks = torch.arange(len(result)).split(CONFORMATIONS_AT_A_TIME)
    total = torch.stack([framed(truth.coords(rows)).double().sum(0) for rows in blocks]).sum(0)
    mean = (total / len(result)).float()
    own, of_mean = [], []
    for rows in blocks:
        true = framed(truth.coords(rows)).float()
        own.append(rmsd(framed(own_frame.decode(rows)), true))
        of_mean.append(rmsd(mean.expand_as(true), true))
    per_particle = torch.cat(own).double()
    mean_per_particle = torch.cat(of_mean).double()
    square = float(per_particle.square().mean())
    mean_square = float(mean_per_particle.square().mean())
    spearman = None
    if motions is not None and truth.coordinate is not None:
        spearman = correlation(motions.transform(result)[:, 0], truth.coordinate)
    return Scores(
        rmsd=square**0.5,
        explained_motion=1 - square / mean_square if mean_square > 0 else float("nan"),
        mean_rmsd=mean_square**0.5,
        rmsd_per_particle=per_particle.numpy(),
        mean_rmsd_per_particle=mean_per_particle.numpy(),
        spearman=spearman,
        frame=frame,
    )


def _scored_frame(model: Model, frame: str | None) -> str:
    frame = chosen_frame(model, frame)
    if frame not in (MOLECULE, POSES):
        raise ValueError(
            f"expected the frame {MOLECULE!r} or {POSES!r}, got {frame!r}; try {MOLECULE!r}, in "
            "which all chains count"
        )
    return frame


@checked
def correlation(component: np.ndarray | Tensor, coordinate: np.ndarray | Tensor) -> float:
    """|Spearman| correlation of two coordinates (N,): the sign of a component is arbitrary.

    Examples
    --------
    >>> correlation([1, 2, 3, 4], [9, 7, 5, 1])
    1.0
    """
    from scipy.stats import spearmanr

    return abs(float(spearmanr(np.asarray(component), np.asarray(coordinate)).statistic))


@checked
def true_latents(model: Model, particles: ParticleStack) -> tuple[Tensor, Tensor]:
    """Best latents of each particle's true conformation (N, p), and the manifold floor (N,) in Å.

    The floor is what no latents of this model express.
    """
    truth = _truth_of(particles)
    _require_same_atoms(model, truth)
    # Particles of a morph share conformations: each is fitted once.
    rows, row_of_particle = truth.distinct_rows()
    latents, floors = [], []
    for block in rows.split(CONFORMATIONS_AT_A_TIME):
        coords = truth.coords(block)
        z = model.dynamics.fit(coords)
        latents.append(z.cpu())
        floors.append(rmsd(model.decode(z).cpu(), coords))
    return torch.cat(latents)[row_of_particle], torch.cat(floors)[row_of_particle]


@checked
def true_population(
    model: Model, particles: ParticleStack, latents: Latents | None = None
) -> Population:
    """The population that simulated `particles` were drawn from: of true latents and true noise.

    The best prior a Gaussian model can have, which is what the information limit assumes.
    """
    if latents is None:
        latents, _ = true_latents(model, particles)
    require_latents(latents, len(particles), model, "true latents")
    z = latents.cpu().double()
    off = z - z.mean(0)
    # A morph moves in few directions only; 10⁻³ Å keeps its covariance invertible.
    covariance = off.T @ off / len(z) + 1e-6 * torch.eye(z.shape[1])
    noise_std = _truth_of(particles).noise_std
    return Population(
        z.mean(0), covariance, noise_std, 1.0, model.fingerprint, contrast_spread=_NO_SPREAD
    )


@torch.no_grad()
@checked
def information_limit(
    model: Model,
    particles: ParticleStack,
    population: Population | None = None,
    latents: Latents | None = None,
    *,
    frame: str | None = None,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """(N,) RMSD in Å that no method beats on average: the van Trees bound, on the atoms.

    Σ_post = (JᵀJ/σ² + Σ⁻¹)⁻¹ at the truth carried to coordinates, plus the manifold floor. Pool it
    as RMSDs are pooled: the root of the mean square.

    Parameters
    ----------
    model : Model
    particles : ParticleStack
        Simulated. No image is read.
    population : Population, optional
        Default `true_population` of these particles.
    latents : (N, p) tensor, optional
        The truth, when the model is well specified; default the best fit to the true coordinates.
    frame : {"molecule", "poses"}, optional
        As of `score`, whose RMSD is to be compared: what is not known of the pose does not count in
        that of the molecule. The default is the same.
    device : torch device, optional
        By default a GPU where there is one.

    Raises
    ------
    ValueError
        When the truth is not known, or there is no noise; for another frame, and for that of the
        molecule when chains do not both turn and shift in this model.

    Notes
    -----
    Van Trees (1968), Detection, Estimation, and Modulation Theory, section 2.4. For a population
    that is not Gaussian it is the bound for methods that know its mean and covariance only.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> bool((information_limit(model, particles) < 0.1).all())  # all show one conformation
    True
    """
    require_same_images(model, particles)
    frame = _scored_frame(model, frame)
    floor = np.zeros(len(particles))
    if latents is None:
        latents, floors = true_latents(model, particles)
        floor = floors.numpy()
    latents = torch.as_tensor(latents)
    require_latents(latents, len(particles), model, "true latents")
    if population is None:
        population = true_population(model, particles, latents)
    require_population(model, population)
    if not population.noise_std > 0:
        raise ValueError(
            "expected noisy particles, got none of noise: nothing limits what can be known of "
            "them; try a finite snr_db"
        )
    model = model.with_beads(population.beads).to(choose_device(device))
    latents = latents.to(model.device)
    prior = population.covariance.inverse().to(model.device)
    limits = []
    for batch in particles.batches(64, device=model.device, images=False):
        # In float32 the information of what is hidden, divided by little noise, would be far from
        # zero.
        z = latents[batch.rows].double()
        pose = tuple(None if part is None else part.double() for part in batch.pose)
        spectrum = population.noise_spectrum
        spectrum = None if spectrum is None else spectrum.to(model.device)
        equations = normal_equations(model, None, pose, z, noise_spectrum=spectrum)
        ones = z.new_ones(len(z))
        scale, noise = population.contrast * ones, population.noise_std * ones
        covariance = (information_of(equations, scale, noise, population) + prior).inverse()
        if frame == MOLECULE:
            jacobian = frame_jacobian(model.dynamics, z)
            covariance = jacobian.latents @ covariance @ jacobian.latents.mT
            z = jacobian.seen.latents
        squares = (covariance * model.dynamics.gram(z)).sum((1, 2))
        limits.append(squares / model.structure.n_atoms)
    return np.sqrt(torch.cat(limits).cpu().numpy() + floor**2)


def _require_same_atoms(model: Model, truth: Truth) -> None:
    n_atoms = truth.coords([0]).shape[1]
    if n_atoms != model.structure.n_atoms:
        raise ValueError(
            f"expected particles that show the {model.structure.n_atoms:,} atoms of {model!r}, got "
            f"a truth of {n_atoms:,} atoms; try the structure that they were simulated from"
        )


def _truth_of(particles: ParticleStack) -> Truth:
    if not isinstance(particles.truth, Truth):
        raise ValueError(
            "expected simulated particles, whose truth is known, got particles without one; "
            "try those that simulate_particles returned"
        )
    return particles.truth
