"""The latents of all particles: a table, and principal motions (section 3.2 of the paper)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ..inference import Result
from ..model import KINDS, Dynamics, Model, require_same_model

# What people ask for: Fig. 3's two panels a chain, or everything.
KIND_GROUPS = {"modes": ("mode",), "rigid": ("rotation", "translation"), "all": KINDS}
# Particles that components are computed from.
_MAX_PCA_PARTICLES = 200_000


def latent_table(result: Result) -> pd.DataFrame:
    """One row a particle, one column a latent, in units people read.

    Parameters
    ----------
    result : Result

    Returns
    -------
    pandas.DataFrame
        α and shifts in Å, turns in degrees, by the particles' ids. Where error bars are known there
        is a column "±" for each latent.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> list(latent_table(Result(model, torch.zeros(2, 12))).columns[:4])
    ['A turn x (°)', 'A turn y (°)', 'A turn z (°)', 'A shift x (Å)']
    """
    names, units = latent_names(result.model.dynamics)
    table = pd.DataFrame(result.latents.numpy() * units, columns=names, index=result.ids)
    if result.std is None:
        return table
    error_names = [f"± {name}" for name in names]
    errors = pd.DataFrame(result.std.numpy() * units, columns=error_names, index=result.ids)
    return pd.concat([table, errors], axis=1)


def latent_names(dynamics: Dynamics) -> tuple[list[str], np.ndarray]:
    """Names of the latents in units people read, and how many of those one latent unit is.

    Returns
    -------
    names : list of p strings
        Such as "A turn x (°)".
    units : (p,) array
        One unit of a latent in the unit of its name: Å of α, degrees, Å.
    """
    names = []
    for chain_id, layout in zip(dynamics.structure.chain_ids, dynamics.chains, strict=True):
        n_modes = layout.mode.stop - layout.mode.start
        names += [f"{chain_id} mode {k + 1} (Å)" for k in range(n_modes)]
        if dynamics.rotation:
            names += [f"{chain_id} turn {axis} (°)" for axis in "xyz"]
        if dynamics.translation:
            names += [f"{chain_id} shift {axis} (Å)" for axis in "xyz"]
    degrees = np.where(dynamics.latent_kind == "rotation", 180 / np.pi, 1.0)
    return names, dynamics.scale * degrees


@dataclass(frozen=True, eq=False, repr=False)
class PrincipalMotions:
    """Principal components of the latents of a result; made by `compute_pca`.

    Scores are in Å: RMS displacements, in quadrature over the chains.

    Attributes
    ----------
    result : Result
        Whose particles the components were computed from.
    label : str
        Such as "chain B, rigid".
    mean : (p,) array
        Mean latents of the particles.
    components : (k, p) array
        Orthonormal, with zeros outside the chain and kind that were asked for.
    explained_variance_ratio : (k,) array
        Share of the variance of that chain and kind.
    scores : (N, k) array
        Of every particle of `result`, Å.
    """

    result: Result
    label: str
    mean: np.ndarray
    components: np.ndarray
    explained_variance_ratio: np.ndarray
    scores: np.ndarray

    @property
    def model(self) -> Model:
        """Whose latents the components are made of."""
        return self.result.model

    def transform(self, other: Result | Tensor) -> np.ndarray:
        """(n, k) scores in Å of other particles or conformations.

        Parameters
        ----------
        other : Result or (n, p) tensor
            Such as a result of held-out particles, or what `traverse` returns.

        Raises
        ------
        ValueError
            When a result is of another model, or a tensor has not p columns: of which model its
            latents are is not known.
        """
        if isinstance(other, Result):
            if other.model is not self.model:
                require_same_model(self.model, other.model.fingerprint, "a result")
            values = other.latents
        else:
            values = torch.as_tensor(other).detach().cpu()
        if values.ndim != 2 or values.shape[1] != self.model.n_latents:
            raise ValueError(
                f"expected latents (n, {self.model.n_latents}) of {self.model!r}, got "
                f"{tuple(values.shape)}; try latents[None] for one conformation"
            )
        return _projected(values.numpy(), self.mean, self.components)

    def traverse(
        self, component: int = 0, n: int = 11, percentiles: tuple[float, float] = (5, 95)
    ) -> Tensor:
        """(n, p) latents evenly along a component; what is not of the component stays at the mean.

        Parameters
        ----------
        component : int
            0 is PC1.
        n : int
            Conformations.
        percentiles : tuple of float
            Of the particles' scores, where the conformations begin and end.

        Raises
        ------
        ValueError
            For a component that does not exist.
        """
        if not 0 <= component < len(self.components):
            raise ValueError(
                f"expected a component from 0 to {len(self.components) - 1}, got {component}; "
                "try 0, which is PC1, or compute_pca with more n_components"
            )
        low, high = np.percentile(self.scores[:, component], percentiles)
        path = self.mean + np.linspace(low, high, n)[:, None] * self.components[component]
        return torch.from_numpy(path).float()

    def __repr__(self) -> str:
        shares = ", ".join(f"{100 * ratio:.0f} %" for ratio in self.explained_variance_ratio[:3])
        return f"PrincipalMotions({self.label}: {shares})"


def compute_pca(
    result: Result, chain: str | None = None, kind: str = "all", n_components: int = 5
) -> PrincipalMotions:
    """Principal motions of the particles, of one chain or all, of one kind of motion or all.

    Parameters
    ----------
    result : Result
    chain : str, optional
        A chain's id; None takes all chains.
    kind : {"all", "modes", "rigid"}
        α alone, R|t alone (rotations as rotation vectors), or both: the panels of Fig. 3.
    n_components : int

    Returns
    -------
    PrincipalMotions

    Raises
    ------
    ValueError
        For an unknown chain or kind, or when nothing is left to analyse.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> motions = compute_pca(Result(model, torch.randn(50, 12)), chain="B", n_components=2)
    >>> motions.components.shape
    (2, 12)
    """
    from sklearn.decomposition import PCA  # takes longer to import than the rest of this package

    wanted = _chosen_latents(result.model.dynamics, chain, kind)
    _require_finite_latents(result.latents)
    if n_components < 1:
        raise ValueError(f"expected one component or more, got {n_components}; try 5")
    n_components = min(n_components, int(wanted.sum()), len(result))
    if n_components < 1 or len(result) < 2:
        raise ValueError(
            f"expected at least two particles and one {kind} latent, got {len(result)} particles "
            f"and {wanted.sum()} latents; try more particles or kind='all'"
        )
    # A view: the latents of a million particles are not copied.
    values = result.latents.numpy()
    # Of a million particles every fifth tells the components as well.
    step = -(-len(values) // _MAX_PCA_PARTICLES)
    pca = PCA(n_components, random_state=0).fit(values[::step, wanted].astype(np.float64))
    components = np.zeros((n_components, len(wanted)))
    components[:, wanted] = pca.components_
    mean = values.mean(0, dtype=np.float64)
    of_chain = "all chains" if chain is None else f"chain {chain}"
    of_kind = "α and R|t" if kind == "all" else kind
    return PrincipalMotions(
        result,
        f"{of_chain}, {of_kind}",
        mean,
        components,
        pca.explained_variance_ratio_,
        _projected(values, mean, components),
    )


def _chosen_latents(dynamics: Dynamics, chain: str | None, kind: str) -> np.ndarray:
    """(p,) mask of the latents of a chain (None for all) and kind."""
    ids = dynamics.structure.chain_ids
    if chain is not None and chain not in ids:
        raise ValueError(
            f"expected a chain of {', '.join(ids)}, got {chain!r}; try None for all chains"
        )
    if kind not in KIND_GROUPS:
        kinds = ", ".join(map(repr, KIND_GROUPS))
        raise ValueError(f"expected kind {kinds}, got {kind!r}; try 'all'")
    wanted = np.isin(dynamics.latent_kind, KIND_GROUPS[kind])
    if chain is not None:
        wanted &= dynamics.latent_chain == ids.index(chain)
    return wanted


def _require_finite_latents(latents: Tensor) -> None:
    # Sums of the columns hold every NaN, and need no copy of a million rows.
    if torch.isfinite(latents.sum(0)).all():
        return
    n_bad = int((~torch.isfinite(latents)).any(1).sum())
    raise ValueError(
        f"expected finite latents, got NaN or Inf in {n_bad:,} of {len(latents):,} particles; "
        "try result[torch.isfinite(result.latents).all(1)]"
    )


def _projected(values: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """(n, k) scores of (n, p) latents, without a copy of them in double precision."""
    scores = values @ components.T.astype(values.dtype)
    return scores.astype(np.float64) - mean @ components.T
