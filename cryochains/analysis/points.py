"""Particles as points on a screen: their density, their columns, and what is not known of each.

Symbols: z → `latents`; C, the posterior covariance of z; D = ∂X/∂z, so that an atom's error bar is
√tr(D C Dᵀ).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from .._arguments import BY_FUNCTION, Count, checked
from .._files import atomic_path
from ..images import positions
from ..inference import Result, posterior_covariance
from ..model import Dynamics
from .motions import PrincipalMotions, image_columns, pose_columns


def point_density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(N,) density of points where each of them is, 1 at the densest: a smoothed histogram.

    Examples
    --------
    >>> density = point_density(np.r_[np.zeros(99), 5.0], np.r_[np.zeros(99), 5.0])
    >>> bool(density[0] == 1 and density[-1] < 0.02)
    True
    """
    # Few points need wide bins, or none would have a neighbour.
    n_bins = int(np.clip(len(x) ** 0.5, 10, 200))
    counts, x_edges, y_edges = np.histogram2d(x, y, n_bins)
    smooth = gaussian_filter(counts, 1.5, mode="constant")
    # The last point of each axis is in the last bin, not behind it.
    column = np.searchsorted(x_edges[1:-1], x, "right")
    row = np.searchsorted(y_edges[1:-1], y, "right")
    density = smooth[column, row]
    return density / density.max()


@torch.no_grad()
@checked
def particle_columns(result: Result, others: pd.DataFrame | None = None) -> pd.DataFrame:
    """What is known of each particle besides its latents, in numbers to colour the points by.

    Parameters
    ----------
    result : Result
        Its error bars give "uncertainty (Å)", RMS over the atoms; its images what each of them has
        of its own, "brightness", "noise (grey levels)", "misfit (χ² per pixel)" and
        "responsibility"; another frame than that of the poses by how much those are corrected,
        "pose turn (°)" and "pose shift (Å)"; its particles, with a CTF, "defocus (µm)", and from a
        file its columns, such as rlnRandomSubset. What is the same for all is left out.
    others : DataFrame, optional
        More columns of numbers, in the particles' order (the index is not read).

    Raises
    ------
    ValueError
        For a column that is not of numbers, or when there is not one row a particle.

    Examples
    --------
    >>> from cryochains import Model, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> particle_columns(Result(model, torch.zeros(2, 12), std=torch.ones(2, 12))).round(1)
       uncertainty (Å)
    0              2.2
    1              2.2
    """
    columns: dict[str, np.ndarray] = {}
    if result.std is not None:
        columns["uncertainty (Å)"] = _rms_uncertainty(result.model.dynamics, result.std)
    own = image_columns(result) | _pose_change(result)
    columns |= {name: column for name, column in own.items() if not _is_constant(column)}
    particles = result.particles
    if particles is not None:
        if particles.ctf is not None:
            defocus = particles.ctf.defocus_u + particles.ctf.defocus_v
            columns["defocus (µm)"] = (defocus / 2e4).numpy()
        for name, column in particles.columns.items():
            if column.nunique() > 1:
                columns[str(name)] = column.to_numpy()
    if others is not None:
        columns |= _checked_columns(others, len(result))
    return pd.DataFrame(columns)


def _pose_change(result: Result) -> dict[str, np.ndarray]:
    if result.frame == "poses":
        return {}
    # Error bars, which are not asked for, would take five times as long as all else.
    plain = replace(result.in_frame("poses"), std=None).in_frame(result.frame)
    correction = plain.pose_correction
    return pose_columns(correction.angles, correction.distances)


def _is_constant(column: np.ndarray) -> bool:
    known = column[~np.isnan(column)]
    return not len(known) or bool((known == known[0]).all())


def _rms_uncertainty(dynamics: Dynamics, std: Tensor) -> np.ndarray:
    """(N,) Å, RMS over the atoms, of latents with standard deviations (N, p)."""
    # Latents of one chain move its atoms nearly at right angles, so that their squares add up.
    reference = dynamics.reference.new_zeros(1, dynamics.n_latents)
    squares = dynamics.gram(reference)[0].diagonal() / len(dynamics.reference)
    return (std.square() @ squares).sqrt().numpy()


def _checked_columns(others: pd.DataFrame, n: int) -> dict[str, np.ndarray]:
    if len(others) != n:
        raise ValueError(
            f"expected {n:,} rows of columns, one a row of latents, got {len(others):,}; "
            "try the same selection"
        )
    columns = {}
    for name, column in others.items():
        if not pd.api.types.is_numeric_dtype(column):
            raise ValueError(
                f"expected columns of numbers, got {name!r} of {column.dtype}; try pandas.factorize"
            )
        columns[str(name)] = column.to_numpy(dtype=np.float64)
    return columns


@torch.no_grad()
def atom_uncertainty(dynamics: Dynamics, latents: Tensor, covariance: Tensor) -> np.ndarray:
    """(n_atoms,) error bar in Å of every atom's position, of one particle.

    Parameters
    ----------
    dynamics : Dynamics
    latents : (p,) tensor
    covariance : (p, p) tensor
        Of the latents.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"), rotation=False)
    >>> shifted = atom_uncertainty(dynamics, torch.zeros(6), torch.eye(6))  # 1 Å a direction
    >>> bool(np.allclose(shifted, 3**0.5))
    True
    """
    parts = []
    with _one_thread():
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(latents[None].to(dynamics.reference), chain)[0]
            of_chain = covariance[layout.latents, layout.latents].to(tangents)
            spread = (of_chain @ tangents.flatten(1)).view_as(tangents)
            parts.append((spread * tangents).sum((0, 2)).clamp_min(0).sqrt())
    return torch.cat(parts).cpu().numpy()


@checked
def average_covariance(result: Result, n: Count = 32) -> Tensor:
    """(p, p) posterior covariance of the latents of a typical particle, in the result's frame.

    Of a refined result with its particles, the mean of `n` particles'; else of the error bars
    alone, as if latents were independent. Particles that do not show the molecule are left out.

    Raises
    ------
    ValueError
        When nothing is known of the errors, as of an encoder.

    Examples
    --------
    >>> from cryochains import Model, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> result = Result(model, torch.zeros(3, 12), std=torch.full((3, 12), 0.5))
    >>> average_covariance(result)[:2, :2]
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """
    shown = np.flatnonzero(result.shows_molecule)
    shown = shown if len(shown) else np.arange(len(result))
    if result.population is not None and result.particles is not None:
        rows = shown[np.unique(np.linspace(0, len(shown) - 1, n).astype(int))]
        return posterior_covariance(result, rows).mean(0).float().cpu()
    if result.std is None:
        raise ValueError(f"expected a result with error bars, got {result!r} without; try refine")
    return result.std[shown].square().mean(0).diag()


@checked
def component_errors(motions: PrincipalMotions, covariance: Tensor) -> np.ndarray:
    """(k,) Å, the error bar of a particle's score on each component: √(vᵀ C v).

    `covariance` (p, p) is of the latents of ``motions.result``, whose frame is that of the
    components: ``average_covariance(motions.result)``. A component along which particles spread by
    little more than this is noise, as far as the images tell.
    """
    directions = motions.components
    return np.sqrt(np.einsum("kp,pq,kq->k", directions, covariance.double().numpy(), directions))


@torch.no_grad()
def decode_one(dynamics: Dynamics, latents: Tensor) -> np.ndarray:
    """(n_atoms, 3) coordinates in Å of one conformation (p,), as fast as a slider needs them.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> decode_one(dynamics, torch.zeros(12)).shape
    (739, 3)
    """
    with _one_thread():
        return dynamics.decode(latents[None])[0].numpy()


@contextmanager
def _one_thread() -> Iterator[None]:
    """For small products: on a busy machine, threads wait ten times longer than those take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@checked
def save_selection(
    folder: str | os.PathLike,
    motions: PrincipalMotions,
    rows: Annotated[slice | Sequence[int] | np.ndarray | Tensor, BY_FUNCTION],
) -> Path:
    """Write the particles at `rows` of a result as selection-1.csv (or -2, …): row, id, scores.

    Particles that came from files are also written as a .star of the same name, for RELION, and
    those that came from cryoSPARC as a .cs too, with their given poses and with the scores as
    columns, cryochainsPC1 or cryochains/PC1 and so on. Corrected poses
    ``result.in_frame().particles.save`` writes.

    Parameters
    ----------
    folder : path
    motions : PrincipalMotions
        Of the result; their scores are in the table, Å.
    rows : slice, indices or mask
        As for a numpy array of the result's particles.

    Returns
    -------
    Path
        Of the table.

    Raises
    ------
    ValueError
        When no particle is selected, or the folder cannot be written.
    IndexError
        For a row that the result does not have, or a mask of another length.
    """
    rows = positions(rows, len(motions.result)).ravel()
    if not len(rows):
        raise ValueError(
            "expected a selection, got none; try clicking a point or drawing around some"
        )
    path = _new_selection_path(Path(folder))
    scores = motions.scores[rows]
    names = [f"PC{k + 1} of {motions.label} (Å)" for k in range(scores.shape[1])]
    table = pd.DataFrame(scores, columns=names)
    table.insert(0, "row", rows)
    table.insert(1, "id", motions.result.ids[rows])
    particles = motions.result.in_frame("poses").particles
    if particles is not None and particles.images.paths:
        selected = particles[rows]
        columns = {f"PC{k + 1}": scores[:, k] for k in range(scores.shape[1])}
        for suffix in sorted({".star", selected.file_suffix or ".star"}):
            selected.save(path.with_suffix(suffix), images=False, columns=columns)
    with atomic_path(path) as part:
        table.to_csv(part, index=False)
    return path


def _new_selection_path(folder: Path) -> Path:
    number = 1
    while (path := folder / f"selection-{number}.csv").exists():
        number += 1
    return path
