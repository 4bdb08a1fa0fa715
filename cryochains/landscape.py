"""The latent space as points on a screen: their density, their columns, and what is not known of each.

Symbols: z → `latents`; C, the posterior covariance of z; D = ∂X/∂z, so that an atom's error bar is √tr(D C Dᵀ).
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from .dynamics import Dynamics
from .files import atomic_path
from .inference import posterior_covariance
from .latent import PrincipalMotions
from .model import CryoChains
from .particles import ParticleStack
from .population import Refinement


def point_density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) how crowded the place of each point is, 1 at the most crowded one: a histogram a little smoothed.

    Examples
    --------
    >>> crowd = point_density(np.r_[np.zeros(99), 5.0], np.r_[np.zeros(99), 5.0])
    >>> bool(crowd[0] == 1 and crowd[-1] < 0.02)
    True
    """
    # Few points need wide bins to be crowded at all.
    counts, *edges = np.histogram2d(x, y, int(np.clip(len(x) ** 0.5, 10, 200)))
    crowd = gaussian_filter(counts, 1.5, mode="constant")
    # The last point of each axis is in the last bin, not behind it.
    places = [np.searchsorted(edge[1:-1], values, "right") for edge, values in zip(edges, (x, y), strict=True)]
    density = crowd[*places]
    return density / density.max()


@torch.no_grad()
def particle_columns(
    dynamics: Dynamics,
    std: Tensor | None = None,
    particles: ParticleStack | None = None,
    others: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """What is known of each particle besides its latents, in numbers to colour them by, where there are such.

    Parameters
    ----------
    std : (N, p) tensor, optional
        Posterior standard deviations: gives "uncertainty (Å)", RMS over the atoms.
    particles : ParticleStack, optional
        With a CTF: gives "defocus (µm)"; from a file: its columns, such as rlnRandomSubset, unless all are equal.
    others : DataFrame, optional
        More columns of numbers, in the particles' order.

    Raises
    ------
    ValueError
        For a column that is not of numbers.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> particle_columns(dynamics, torch.ones(2, 12)).round(1)
       uncertainty (Å)
    0              2.2
    1              2.2
    """
    columns = {}
    if std is not None:
        # Latents of one chain move its atoms nearly at right angles, so that their squares add up.
        reference = dynamics.reference.new_zeros(1, dynamics.n_latents)
        squares = dynamics.gram(reference)[0].diagonal().cpu() / len(dynamics.reference)
        columns["uncertainty (Å)"] = (std.cpu().to(squares).square() @ squares).sqrt().numpy()
    if particles is not None and particles.ctf is not None:
        columns["defocus (µm)"] = ((particles.ctf.defocus_u + particles.ctf.defocus_v) / 2e4).numpy()
    if particles is not None:
        columns |= {name: column for name, column in particles.columns.items() if column.nunique() > 1}
    for name, column in () if others is None else others.items():
        if not pd.api.types.is_numeric_dtype(column):
            raise ValueError(f"expected columns of numbers, got {name!r} of {column.dtype}; try pandas.factorize")
        columns[str(name)] = column.to_numpy(dtype=np.float64)
    return pd.DataFrame(columns)


@torch.no_grad()
def atom_uncertainty(dynamics: Dynamics, latents: Tensor, covariance: Tensor) -> np.ndarray:
    """(n_atoms,) Å, the error bar of every atom's place of one particle: `latents` (p,), their `covariance` (p, p).

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"), rotation=False)
    >>> shifted = atom_uncertainty(dynamics, torch.zeros(6), torch.eye(6))  # each chain by 1 Å a direction
    >>> bool(np.allclose(shifted, 3**0.5))
    True
    """
    parts = []
    with one_thread():
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(latents[None].to(dynamics.reference), chain)[0]
            of_chain = covariance[layout.latents, layout.latents].to(tangents)
            spread = (of_chain @ tangents.flatten(1)).view_as(tangents)
            parts.append((spread * tangents).sum((0, 2)).clamp_min(0).sqrt())
    return torch.cat(parts).cpu().numpy()


def average_covariance(
    found: Refinement, model: CryoChains | None = None, particles: ParticleStack | None = None, n: int = 32
) -> Tensor:
    """(p, p) posterior covariance of the latents of a typical particle.

    With the model and the particles, the mean of `n` particles'; else their error bars alone, as if independent.

    Examples
    --------
    >>> from cryochains import Population
    >>> population = Population(torch.zeros(2), torch.eye(2), 1.0, 1.0, "")
    >>> average_covariance(Refinement(torch.zeros(3, 2), torch.full((3, 2), 0.5), np.arange(3), population, []))
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """
    if model is None or particles is None:
        return found.std.square().mean(0).diag()
    rows = np.unique(np.linspace(0, len(particles) - 1, n).astype(int))
    return posterior_covariance(model, particles, found, rows).mean(0).float().cpu()


def component_errors(motions: PrincipalMotions, covariance: Tensor) -> np.ndarray:
    """(k,) Å, the error bar of a particle's score on each component: √(vᵀ C v) with the latents' `covariance` (p, p).

    A component along which particles spread by little more than this is noise, as far as the images tell.
    """
    directions = motions.components
    return np.sqrt(np.einsum("kp,pq,kq->k", directions, covariance.double().numpy(), directions))


@torch.no_grad()
def decode_one(dynamics: Dynamics, latents: Tensor) -> np.ndarray:
    """(n_atoms, 3) coordinates in Å of one conformation (p,), at once.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> decode_one(dynamics, torch.zeros(12)).shape
    (739, 3)
    """
    with one_thread():
        return dynamics.decode(latents[None])[0].numpy()


@contextmanager
def one_thread():
    """For what is over at once: on a busy machine, threads wait ten times longer for each other than that takes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def save_selection(
    folder, motions: PrincipalMotions, latents: Tensor, rows: np.ndarray, particles: ParticleStack | None = None
) -> Path:
    """Write the particles at `rows` of `latents` (N, p) as selection-1.csv (or -2, …): row, id, scores in Å.

    Particles that came from files are also written as a .star of the same name, for RELION.

    Raises
    ------
    ValueError
        When no particle is selected, or the folder cannot be written.
    """
    if not len(rows):
        raise ValueError("expected a selection, got none; try clicking a point or drawing around some")
    number = 1
    while (path := Path(folder, f"selection-{number}.csv")).exists():
        number += 1
    scores = motions.transform(latents[rows])
    table = pd.DataFrame(scores, columns=[f"PC{k + 1} of {motions.label} (Å)" for k in range(scores.shape[1])])
    table.insert(0, "row", rows)
    if particles is not None:
        table.insert(1, "id", particles.ids[rows])
        if particles.images.paths:
            particles[rows].save(path.with_suffix(".star"), images=False)
    with atomic_path(path) as part:
        table.to_csv(part, index=False)
    return path
