"""The latents of all particles: a table, and principal motions (section 3.2 of the paper)."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from .._arguments import Count, Ordinal, Percent, checked
from ..inference import Result, frame_words, require_finite_latents
from ..model import KINDS, Dynamics, Model, require_same_model

# What people ask for: Fig. 3's two panels a chain, or everything.
KIND_GROUPS = {"modes": ("mode",), "rigid": ("rotation", "translation"), "all": KINDS}
# Particles that components are computed from.
_MAX_PCA_PARTICLES = 200_000


@checked
def latent_table(result: Result, frame: str | None = None) -> pd.DataFrame:
    """One row a particle, one column a latent, in units people read.

    Parameters
    ----------
    result : Result
    frame : str, optional
        "molecule", "poses" or a chain's id, as of ``Result.in_frame``. By default that of the
        molecule, or the result's own where that is not the frame of the poses.

    Returns
    -------
    pandas.DataFrame
        α and shifts in Å, turns in degrees, by the particles' ids. In another frame than that of
        the poses also by how much the pose is corrected, "pose turn (°)" and, of a result with its
        particles, "pose shift (Å)". Where error bars are known there is a column "±" for each. At
        the end, where it is known, what each image has of its own (see `Result`): "brightness" over
        the model's, "noise (grey levels)", "misfit (χ² per pixel)" and "responsibility", the
        probability that it shows the molecule.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> list(latent_table(Result(model, torch.zeros(2, 12))).columns[:4])
    ['A turn x (°)', 'A turn y (°)', 'A turn z (°)', 'A shift x (Å)']
    """
    result = result.in_frame(frame)
    names, units = latent_names(result.model.dynamics)
    table = pd.DataFrame(result.latents.numpy() * units, columns=names, index=result.ids)
    errors = None
    if result.std is not None:
        errors = pd.DataFrame(result.std.numpy() * units, columns=names, index=result.ids)
    if result.frame != "poses":
        correction = result.pose_correction
        table = table.assign(**pose_columns(correction.angles, correction.distances))
        if errors is not None:
            of_pose = pose_columns(correction.angle_std, correction.distance_std)
            errors = errors.assign(**of_pose)
    if errors is not None:
        table = pd.concat([table, errors.add_prefix("± ")], axis=1)
    return table.assign(**image_columns(result))


def image_columns(result: Result) -> dict[str, np.ndarray]:
    """(N,) columns of what is known of each image; NaN where an image could not be used."""
    scale = result.scale
    # One brightness for all that no population has was not measured.
    measured = result.population is not None or bool((scale != scale[:1]).any())
    columns = {
        "brightness": scale if measured else None,
        "noise (grey levels)": result.noise,
        "misfit (χ² per pixel)": result.misfit,
        "responsibility": result.responsibility,
    }
    return {name: values.numpy() for name, values in columns.items() if values is not None}


def pose_columns(angles: np.ndarray | None, distances: np.ndarray | None) -> dict[str, np.ndarray]:
    """What is known of them, of (N,) radians and (N,) Å."""
    columns = {}
    if angles is not None:
        columns["pose turn (°)"] = np.degrees(angles)
    if distances is not None:
        columns["pose shift (Å)"] = distances
    return columns


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
        Whose particles the components were computed from, in the frame of the components.
    label : str
        Such as "chain B, rigid, frame of the molecule".
    chain, kind : str or None, str
        What was asked for: a chain's id or None for all; and as of `compute_pca`.
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
    chain: str | None
    kind: str
    mean: np.ndarray
    components: np.ndarray
    explained_variance_ratio: np.ndarray
    scores: np.ndarray

    @property
    def model(self) -> Model:
        """Whose latents the components are made of."""
        return self.result.model

    @property
    def shown_scores(self) -> np.ndarray:
        """(n, k) `scores` of the particles that show the molecule: junk is left out."""
        return self.scores[self.result.shows_molecule]

    @checked
    def transform(self, other: Result | Tensor) -> np.ndarray:
        """(n, k) scores in Å of other particles or conformations.

        Parameters
        ----------
        other : Result or (n, p) tensor
            Such as a result of held-out particles, which is brought into this frame; or latents in
            this frame, such as `traverse` returns.

        Raises
        ------
        ValueError
            When a result is of another model, or a tensor has not p columns: of which model its
            latents are is not known.
        """
        if isinstance(other, Result):
            if other.model is not self.model:
                require_same_model(self.model, other.model.fingerprint, "a result")
            values = other.in_frame(self.result.frame).latents
        else:
            values = torch.as_tensor(other).detach().cpu()
        if values.ndim != 2 or values.shape[1] != self.model.n_latents:
            raise ValueError(
                f"expected latents (n, {self.model.n_latents}) of {self.model!r}, got "
                f"{tuple(values.shape)}; try latents[None] for one conformation"
            )
        return _projected(values.numpy(), self.mean, self.components)

    @checked
    def traverse(
        self, component: Ordinal = 0, n: Count = 11, percentiles: tuple[Percent, Percent] = (5, 95)
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
        low, high = np.percentile(self.shown_scores[:, component], percentiles)
        path = self.mean + np.linspace(low, high, n)[:, None] * self.components[component]
        return torch.from_numpy(path).float()

    def __repr__(self) -> str:
        shares = ", ".join(f"{100 * ratio:.0f} %" for ratio in self.explained_variance_ratio[:3])
        return f"PrincipalMotions({self.label}: {shares})"


@checked
def compute_pca(
    result: Result,
    chain: str | None = None,
    kind: str = "all",
    n_components: Count = 5,
    frame: str | None = None,
) -> PrincipalMotions:
    """Principal motions of the particles, of one chain or all, of one kind of motion or all.

    Particles that do not show the molecule (``result.shows_molecule``) have scores, but the
    components are not computed from them.

    Parameters
    ----------
    result : Result
    chain : str, optional
        A chain's id; None takes all chains.
    kind : {"all", "modes", "rigid"}
        α alone, R|t alone (rotations as rotation vectors), or both: the panels of Fig. 3.
    n_components : int
    frame : str, optional
        "molecule", "poses" or a chain's id, as of ``Result.in_frame``. By default that of the
        molecule, where a turn or shift that all chains share is no motion; or the result's own
        where that is not the frame of the poses. Models whose chains do not both turn and shift
        have the frame of the poses alone.

    Returns
    -------
    PrincipalMotions

    Raises
    ------
    ValueError
        For an unknown chain, kind or frame, or when nothing is left to analyse.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> motions = compute_pca(Result(model, torch.randn(50, 12)), chain="B", n_components=2)
    >>> motions.components.shape
    (2, 12)
    """
    from sklearn.decomposition import PCA  # takes longer to import than the rest of this package

    result = result.in_frame(frame)
    wanted = _chosen_latents(result, chain, kind)
    require_finite_latents(result.latents)
    shown = np.flatnonzero(result.shows_molecule)
    n_components = min(n_components, int(wanted.sum()), len(shown))
    if n_components < 1 or len(shown) < 2:
        raise ValueError(
            f"expected at least two particles and one {kind} latent, got {len(shown)} particles "
            f"and {wanted.sum()} latents; try more particles, kind='all' or another chain"
        )
    # A view: the latents of a million particles are not copied.
    values = result.latents.numpy()
    # Of a million particles every fifth tells the components as well.
    chosen = shown[:: -(-len(shown) // _MAX_PCA_PARTICLES)]
    pca = PCA(n_components, random_state=0).fit(values[chosen][:, wanted].astype(np.float64))
    components = np.zeros((n_components, len(wanted)))
    components[:, wanted] = pca.components_
    of_shown = result.shows_molecule[:, None]
    mean = values.mean(0, dtype=np.float64, where=of_shown)
    of_chain = "all chains" if chain is None else f"chain {chain}"
    of_kind = "α and R|t" if kind == "all" else kind
    return PrincipalMotions(
        result,
        f"{of_chain}, {of_kind}, {frame_words(result.frame)}",
        chain,
        kind,
        mean,
        components,
        pca.explained_variance_ratio_,
        _projected(values, mean, components),
    )


def _chosen_latents(result: Result, chain: str | None, kind: str) -> np.ndarray:
    """(p,) mask of the latents of a chain (None for all) and kind, that can differ in its frame."""
    dynamics = result.model.dynamics
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
    if result.frame not in ("poses", "molecule"):
        still = dynamics.latent_chain == ids.index(result.frame)
        wanted &= ~still | (dynamics.latent_kind == "mode")
    return wanted


def _projected(values: np.ndarray, mean: np.ndarray, components: np.ndarray) -> np.ndarray:
    """(n, k) scores of (n, p) latents, without a copy of them in double precision."""
    scores = values @ components.T.astype(values.dtype)
    return scores.astype(np.float64) - mean @ components.T
