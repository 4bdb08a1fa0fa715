"""What all particles share: the distribution of their latents, the noise, and the brightness of the images.

Symbols: μ → `mean`, Σ → `covariance`, σ → `noise_std`; λ, the modes' eigenvalues, set the elastic prior.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dynamics import KINDS, Dynamics
from .files import load_tensors, save_tensors

# Spread a chain is thought to have before any image was seen: RMS Å of bending, of turning and of shifting.
START_SPREAD = {"mode": 2.0, "rotation": 4.0, "translation": 4.0}
# Å, neighbours along a chain are not thought to part by more along one mode: about the length of a bond.
BOND = 4.0
# What is thought of the variances before any image was seen counts as much as so many particles.
PRIOR_PARTICLES = 20


@dataclass(frozen=True, eq=False)
class Population:
    """What all particles share: the distribution of their latents, the noise, and the brightness of the images.

    mean (p,) and covariance (p, p) in latent units (1 unit ≈ 1 Å), float64; noise_std; contrast.
    """

    mean: Tensor
    covariance: Tensor
    noise_std: float
    contrast: float
    structure_hash: str

    def __repr__(self) -> str:
        spread = float(self.covariance.diagonal().sum().sqrt())
        return f"Population({len(self.mean)} latents, spread {spread:.2f} Å, noise {self.noise_std:.3g})"


@dataclass(frozen=True, eq=False)
class Refinement:
    """The outcome of `refine`: one row a particle, in the order of the stack.

    latents (N, p) posterior means; std (N, p) posterior standard deviations; ids (N,); population; history, one dict
    an image pass.
    """

    latents: Tensor
    std: Tensor
    ids: np.ndarray
    population: Population
    history: list

    def save(self, path) -> None:
        """Write a safetensors file, whole or not at all."""
        p = self.population
        # Of a million particles the names would not fit into the file's header.
        ids = torch.frombuffer(bytearray("\n".join(self.ids).encode()), dtype=torch.uint8)
        tensors = {"latents": self.latents, "std": self.std, "ids": ids, "mean": p.mean, "covariance": p.covariance}
        shared = {"noise_std": p.noise_std, "contrast": p.contrast, "structure_hash": p.structure_hash}
        save_tensors(path, tensors, {"kind": "refinement", **shared, "history": self.history})

    @classmethod
    def load(cls, path) -> "Refinement":
        t, meta = load_tensors(path, "refinement")
        shared = {k: meta[k] for k in ("noise_std", "contrast", "structure_hash")}
        population = Population(t["mean"], t["covariance"], **shared)
        ids = np.array(bytes(t["ids"].numpy()).decode().split("\n"), dtype=object)
        return cls(t["latents"], t["std"], ids, population, meta["history"])

    def __repr__(self) -> str:
        return f"Refinement({len(self.latents)} particles, {self.population!r})"


def elastic_variance(dynamics: Dynamics) -> Tensor:
    """(p,) variance in Å² of each latent before any image was seen: 1/λ for modes, flat for rigid motion."""
    variance = np.ones(dynamics.n_latents)
    for chain, layout in enumerate(dynamics.chains):
        if dynamics.modes is not None:
            softness = 1 / dynamics.modes.eigenvalues[chain]
            variance[layout.mode] = START_SPREAD["mode"] ** 2 * softness / softness.sum()
        for kind in ("rotation", "translation"):
            variance[getattr(layout, kind)] = START_SPREAD[kind] ** 2 / 3
    return torch.from_numpy(variance).minimum(reach(dynamics).square())


def reach(dynamics: Dynamics) -> Tensor:
    """(p,) Å, how far each latent goes before neighbours along a chain part by more than BOND; inf for rigid motion.

    A soft mode of a few residues, such as a loose end, would otherwise carry them anywhere: a bond costs a linear
    mode nothing, and images say little of few residues.
    """
    limit = torch.full((dynamics.n_latents,), torch.inf, dtype=torch.float64)
    for chain, layout in enumerate(dynamics.chains if dynamics.modes is not None else ()):
        nodes = dynamics.structure.node_coords[dynamics.structure.node_chain == chain]
        bonded = np.linalg.norm(np.diff(nodes, axis=0), axis=1) < 8.0
        steps = np.diff(dynamics.modes.vectors[chain], axis=1)[:, bonded] * np.sqrt(len(nodes))
        strain = np.linalg.norm(steps, axis=-1).max(-1, initial=1e-9)
        limit[layout.mode] = torch.from_numpy(BOND / strain)
    return limit


def shrink_covariance(scatter: Tensor, n: int, dynamics: Dynamics) -> Tensor:
    """(p, p) covariance from a (p, p) `scatter` matrix summed over `n` particles, shrunk towards the elastic prior.

    The inverse-Wishart maximum a posteriori with p prior degrees of freedom. The prior's amplitude, one a kind of
    latent, is that of the particles themselves: only its shape (soft modes move more, latents are independent) counts.
    """
    target = elastic_variance(dynamics).to(scatter.device)
    for kind in KINDS:
        of_kind = torch.from_numpy(dynamics.latent_kind == kind).to(scatter.device)
        if of_kind.any():
            target[of_kind] *= (scatter.diagonal()[of_kind] / n).sum() / target[of_kind].sum()
    # Variances are soon the particles' own; what p² correlations would say by chance takes p particles to believe.
    target = (scatter.diagonal() + PRIOR_PARTICLES * target) / (n + PRIOR_PARTICLES)
    p = len(scatter)
    return (scatter + p * target.diag()) / (n + p)
