"""The latent space of all particles: a table, principal motions, and conformations along them (section 3.2)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import prody
import torch
from sklearn.decomposition import PCA
from torch import Tensor

from .dynamics import KINDS, Dynamics
from .files import atomic_path
from .sources import write_pdb

# What people ask for: Fig. 3's two panels a chain, or everything.
KIND_GROUPS = {"modes": ("mode",), "rigid": ("rotation", "translation"), "all": KINDS}
# Particles that components are found from.
MOST = 200_000


def latent_table(dynamics: Dynamics, latents: Tensor, ids=None, std: Tensor | None = None) -> pd.DataFrame:
    """One row a particle, one column a latent, in units people read: α and shifts in Å, turns in degrees.

    Parameters
    ----------
    latents : (N, p) tensor
    ids : (N,) array, optional
        Index of the table, such as ``particles.ids``.
    std : (N, p) tensor, optional
        Posterior standard deviations: adds a column "±" beside each latent.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> list(latent_table(dynamics, torch.zeros(2, 12)).columns[:4])
    ['A turn x (°)', 'A turn y (°)', 'A turn z (°)', 'A shift x (Å)']
    """
    names, units = latent_names(dynamics)
    table = pd.DataFrame(latents.cpu().numpy() * units, columns=names, index=ids)
    if std is not None:
        errors = pd.DataFrame(std.cpu().numpy() * units, columns=[f"± {name}" for name in names], index=ids)
        table = pd.concat([table, errors], axis=1)
    return table


def latent_names(dynamics: Dynamics) -> tuple[list[str], np.ndarray]:
    """(p,) names of the latents, such as "A turn x (°)", and (p,) how many of those units one latent unit is."""
    names = []
    for chain, chain_id in enumerate(dynamics.structure.chain_ids):
        layout = dynamics.chains[chain]
        n_modes = layout.mode.stop - layout.mode.start
        names += [f"{chain_id} mode {k + 1} (Å)" for k in range(n_modes)]
        names += [f"{chain_id} turn {axis} (°)" for axis in "xyz"] if dynamics.rotation else []
        names += [f"{chain_id} shift {axis} (Å)" for axis in "xyz"] if dynamics.translation else []
    return names, dynamics.scale * np.where(dynamics.latent_kind == "rotation", 180 / np.pi, 1.0)


@dataclass(frozen=True, eq=False)
class PrincipalMotions:
    """Principal components of the latents, in Å: scores are RMS displacements, in quadrature over the chains.

    mean (p,), components (k, p) with zeros outside the selection, explained_variance_ratio (k,), scores (N, k),
    label such as "chain B, rigid".
    """

    dynamics: Dynamics
    label: str
    mean: np.ndarray
    components: np.ndarray
    explained_variance_ratio: np.ndarray
    scores: np.ndarray

    def transform(self, latents: Tensor) -> np.ndarray:
        """(N, k) scores of other latents (N, p), such as those of held-out particles."""
        return _scores(latents.cpu().numpy(), self.mean, self.components)

    def traverse(self, component: int = 0, n: int = 11, percentiles: tuple[float, float] = (5, 95)) -> Tensor:
        """(n, p) latents evenly along a component between two percentiles of the particles; the rest at the mean.

        Raises
        ------
        ValueError
            For a component that does not exist.
        """
        if not 0 <= component < len(self.components):
            raise ValueError(f"expected a component from 0 to {len(self.components) - 1}, got {component}")
        low, high = np.percentile(self.scores[:, component], percentiles)
        path = self.mean + np.linspace(low, high, n)[:, None] * self.components[component]
        return torch.from_numpy(path).float()

    def __repr__(self) -> str:
        shares = ", ".join(f"{100 * ratio:.0f} %" for ratio in self.explained_variance_ratio[:3])
        return f"PrincipalMotions({self.label}: {shares})"


def compute_pca(
    dynamics: Dynamics, latents: Tensor, chain: str | None = None, kind: str = "all", n_components: int = 5
) -> PrincipalMotions:
    """Principal motions of the particles, of one chain or all, of bending, rigid motion or both (Fig. 3).

    Parameters
    ----------
    latents : (N, p) tensor
    chain : str, optional
        A chain's id; None takes all chains.
    kind : {"all", "modes", "rigid"}
        α alone, R|t alone (rotations as rotation vectors), or both.

    Raises
    ------
    ValueError
        For an unknown chain or kind, or when nothing is left to analyse.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> compute_pca(dynamics, torch.randn(50, 12), chain="B", kind="rigid", n_components=2).components.shape
    (2, 12)
    """
    ids = dynamics.structure.chain_ids
    if chain is not None and chain not in ids:
        raise ValueError(f"expected a chain of {', '.join(ids)}, got {chain!r}")
    if kind not in KIND_GROUPS:
        raise ValueError(f"expected kind {', '.join(map(repr, KIND_GROUPS))}, got {kind!r}")
    latents = torch.as_tensor(latents)
    if latents.ndim != 2 or latents.shape[1] != dynamics.n_latents:
        raise ValueError(f"expected latents (N, {dynamics.n_latents}), got {tuple(latents.shape)}")
    if n_components < 1:
        raise ValueError(f"expected one component or more, got {n_components}; try 5")
    # Sums of the columns hold every NaN, and need no copy of a million rows.
    if not torch.isfinite(latents.sum(0)).all():
        bad = int((~torch.isfinite(latents)).any(1).sum())
        raise ValueError(f"expected finite latents, got NaN or Inf in {bad:,} of {len(latents):,} particles")
    wanted = np.isin(dynamics.latent_kind, KIND_GROUPS[kind])
    if chain is not None:
        wanted &= dynamics.latent_chain == ids.index(chain)
    n_components = min(n_components, int(wanted.sum()), len(latents))
    if n_components < 1 or len(latents) < 2:
        raise ValueError(f"expected at least two particles and one {kind} latent, got {latents.shape} latents")
    values = latents.detach().cpu().numpy()
    # Of a million particles every fifth tells the components as well.
    sample = values[:: -(-len(values) // MOST), wanted].astype(np.float64)
    pca = PCA(n_components, random_state=0).fit(sample)
    components = np.zeros((n_components, dynamics.n_latents))
    components[:, wanted] = pca.components_
    mean = values.mean(0, dtype=np.float64)
    label = f"{'all chains' if chain is None else f'chain {chain}'}, {'α and R|t' if kind == 'all' else kind}"
    ratios, scores = pca.explained_variance_ratio_, _scores(values, mean, components)
    return PrincipalMotions(dynamics, label, mean, components, ratios, scores)


def _scores(values: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """(N, k) scores of (N, p) latents, without a copy of them in double precision."""
    return (values @ components.T.astype(values.dtype)).astype(np.float64) - mean @ components.T


@torch.no_grad()
def decode_ensemble(dynamics: Dynamics, latents: Tensor) -> prody.Ensemble:
    """ProDy ensemble of every atom (side chains and ligands ride with their residue) at (m, p) `latents`.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> decode_ensemble(dynamics, torch.zeros(3, 12)).numConfs()
    3
    """
    structure = dynamics.structure.all_atoms()
    coords = dynamics.with_structure(structure).to(latents.device).decode(latents).double().cpu().numpy()
    ensemble = prody.Ensemble(structure.name)
    ensemble.setAtoms(structure.atoms)
    ensemble.setCoords(structure.coords)
    ensemble.addCoordset(coords)
    return ensemble


def save_ensemble(path, dynamics: Dynamics, latents: Tensor) -> Path:
    """Write the conformations at (m, p) `latents`, all atoms: models of a PDB, or frames of a DCD, by the suffix.

    A DCD holds no names: open it on a PDB of the same atoms, which ``structure.save`` writes.

    Raises
    ------
    ValueError
        For another suffix, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pdb", ".dcd"):
        raise ValueError(f"expected a path that ends in .pdb or .dcd, got {path.name}")
    ensemble = decode_ensemble(dynamics, latents)
    if path.suffix == ".dcd":
        with atomic_path(path) as part:
            prody.writeDCD(str(part), ensemble)
    else:
        models = ensemble.getAtoms().copy()
        models.setCoords(ensemble.getCoordsets())
        write_pdb(models, dynamics.structure.name, path)
    return path
