"""What all particles share: the distribution of their latents, the noise, and the brightness.

Symbols: μ → `mean`, Σ → `covariance`, σ → `noise_std`; λ, the modes' eigenvalues, set the elastic
prior.
"""

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._arguments import (
    NotNegative,
    Ordinal,
    Positive,
    PositiveOrInfinite,
    Share,
    check_fields,
    checked,
)
from .._files import load_tensors, save_tensors
from ..molecule import BONDED_DISTANCE, Beads
from .dynamics import KINDS, Dynamics
from .model import Model, require_same_model

# Spread a chain is thought to have before any image was seen: RMS Å of each kind of motion.
START_SPREAD = {"mode": 2.0, "rotation": 4.0, "translation": 4.0}
# Å, neighbours along a chain are not thought to part by more along one mode: a bond's length.
MAX_BOND_STRETCH = 4.0
# Radians², variance of a rotation vector along each axis where all orientations are as likely:
# ∫ θ² (1 − cos θ)/π dθ from 0 to π is π²/3 + 2 along all three.
_ANY_TURN = (np.pi**2 / 3 + 2) / 3
# Å, by which nodes at a joint of two bodies are thought to part; to first order in the turns.
_JOINT_GAP = 2.0
# What is thought of the variances before any image was seen counts as much as so many particles.
_PRIOR_PARTICLES = 20
PRETRAINED_FOLDER = Path(__file__).resolve().parent.parent / "data"
# Of log brightness; images of one set differ by factors, not by powers of ten.
_MOST_SPREAD = 100.0
_POPULATION_KIND = "population"
_BEADS = "beads/"
_NUMBERS = ("noise_std", "contrast", "contrast_spread", "noise_pixels", "junk_share", "rank")


@dataclass(frozen=True, eq=False, repr=False)
class Population:
    """What all particles share: the distribution of their latents, the noise, and the brightness.

    Attributes
    ----------
    mean : (p,) float64 tensor
        In latent units (1 unit ≈ 1 Å).
    covariance : (p, p) float64 tensor
    noise_std : float
        Of a pixel, in the images' grey levels.
        The median particle's; of white noise, or on average over the frequencies.
    contrast : float
        Brightness of the images over the model's: that of the middle of the particles.
    fingerprint : dict
        Of the model whose latents these are; see `Model.fingerprint`.
    contrast_spread : float
        Standard deviation of the particles' log brightness.
    noise_pixels : float
        The common noise level says as much of a particle's own as so many pixels of its image do;
        infinite where all particles have the same.
    noise_spectrum : (R,) float64 tensor, optional
        Variance of the noise on rings of frequencies one Fourier pixel wide, relative to the mean
        over all pixels; None for white noise.
    junk_share : float
        Share of particles that do not show the molecule at their poses.
    beads : Beads, optional
        What scatters, as the images say; None where they do not ask for other beads than the
        model's.
    rank : int, optional
        Directions of the latents in which particles vary by more than chance, as the images'
        evidence says; None where the covariance was not learned.
    """

    mean: Tensor
    covariance: Tensor
    noise_std: NotNegative
    contrast: Positive
    fingerprint: dict
    contrast_spread: Positive = 0.05
    noise_pixels: PositiveOrInfinite = 1e6
    noise_spectrum: Tensor | None = None
    junk_share: Share = 0.02
    beads: Beads | None = None
    rank: Ordinal | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        p = len(self.mean)
        if tuple(self.mean.shape) != (p,) or tuple(self.covariance.shape) != (p, p):
            raise ValueError(
                "expected a mean (p,) and a covariance (p, p) of the latents, got "
                f"{tuple(self.mean.shape)} and {tuple(self.covariance.shape)}; try those of one "
                "model"
            )
        if self.contrast_spread > _MOST_SPREAD or not 0 < self.junk_share < 1:
            raise ValueError(
                f"expected a contrast_spread of at most {_MOST_SPREAD:g} and a junk_share between "
                f"0 and 1, got {self.contrast_spread:g} and {self.junk_share:g}; try the defaults"
            )

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file, whole or not at all; no coordinates but of learned beads."""
        meta = {"kind": _POPULATION_KIND, **self.description()}
        save_tensors(path, self.tensors(), meta)

    def tensors(self) -> dict[str, Tensor]:
        """What a file keeps of it as tensors."""
        tensors = {"mean": self.mean, "covariance": self.covariance}
        if self.noise_spectrum is not None:
            tensors["noise_spectrum"] = self.noise_spectrum
        if self.beads is not None:
            for field in fields(self.beads):
                array = np.ascontiguousarray(getattr(self.beads, field.name))
                tensors[_BEADS + field.name] = torch.from_numpy(array.copy())
        return tensors

    def description(self) -> dict:
        """What a file keeps of it as JSON."""
        return {name: getattr(self, name) for name in (*_NUMBERS, "fingerprint")}

    @classmethod
    def restore(cls, tensors: dict[str, Tensor], meta: dict) -> "Population":
        """The population that `tensors` and `description` describe."""
        return cls(
            tensors["mean"],
            tensors["covariance"],
            fingerprint=meta["fingerprint"],
            noise_spectrum=tensors.get("noise_spectrum"),
            beads=_unpack_beads(tensors),
            **{name: meta[name] for name in _NUMBERS if name in meta},
        )

    def __repr__(self) -> str:
        spread = float(self.covariance.diagonal().sum().sqrt())
        size = f"{len(self.mean)} latents, spread {spread:.2f} Å"
        if self.rank is not None:
            size += f" in {self.rank} {'direction' if self.rank == 1 else 'directions'}"
        return f"Population({size}, noise {self.noise_std:.3g})"


def _unpack_beads(tensors: dict[str, Tensor]) -> Beads | None:
    arrays = {
        name.removeprefix(_BEADS): tensor.numpy()
        for name, tensor in tensors.items()
        if name.startswith(_BEADS)
    }
    return Beads(**arrays) if arrays else None


@checked
def load_population(name: str | os.PathLike) -> Population:
    """A population that was learned before: start `refine` with it.

    Parameters
    ----------
    name : str or path
        "glua3", which comes with the package (synthetic particles, see its card beside it in
        ``cryochains/data``), or a file that ``Population.save`` wrote.

    Raises
    ------
    FileNotFoundError, ValueError
        For an unknown name, or a file that holds no population.

    Examples
    --------
    >>> load_population("glua3")
    Population(52 latents, spread ... Å, noise ...)
    """
    # Encoders lie beside them.
    stems = sorted(path.stem for path in PRETRAINED_FOLDER.glob("*.safetensors"))
    known = [stem for stem in stems if not stem.endswith("-encoder")]
    path = PRETRAINED_FOLDER / f"{name}.safetensors" if str(name) in known else Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a population of {', '.join(known)}, or a file of one, got {str(name)!r}; "
            "try a full path"
        )
    tensors, meta = load_tensors(path, _POPULATION_KIND)
    try:
        return Population.restore(tensors, meta)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a population file, got one that is damaged at {path} "
            f"({type(error).__name__}: {error}); try another copy of it"
        ) from error


def require_population(model: Model, population: Population) -> None:
    """Raise ValueError when `population` is not one of the latents of `model`."""
    require_same_model(model, population.fingerprint, "a population")
    if len(population.mean) != model.n_latents:
        raise ValueError(
            f"expected a population of {model.n_latents} latents, got {len(population.mean)}; "
            "try the model that it was made with"
        )
    if population.beads is not None:
        model.dynamics.with_beads(population.beads)


@dataclass(frozen=True, eq=False)
class ElasticPrior:
    """What is thought of the latents before any image is seen; made by `elastic_prior`.

    Attributes
    ----------
    variance : (p,) float64 tensor
        Å²; see `elastic_variance`.
    limit : (p,) float64 tensor
        Å; see `mode_limit`.
    kinds : tuple of (p,) bool tensors
        Which latents are of each kind that this model has.
    joints : (p, p) float64 tensor or None
        Precision by which bodies that a bond joins stay together; see `_joint_precision`.
    """

    variance: Tensor
    limit: Tensor
    kinds: tuple[Tensor, ...]
    joints: Tensor | None = None

    def covariance(self, variance: Tensor) -> Tensor:
        """(p, p) of latents with these variances (p,), but that joints do not part."""
        if self.joints is None:
            return variance.diag()
        return (variance.reciprocal().diag() + self.joints).inverse()


def elastic_prior(dynamics: Dynamics) -> ElasticPrior:
    """The prior's constants, on the device of `dynamics`."""
    masks = [torch.from_numpy(dynamics.latent_kind == kind) for kind in KINDS]
    joints = _joint_precision(dynamics)
    return ElasticPrior(
        elastic_variance(dynamics).to(dynamics.device),
        mode_limit(dynamics).to(dynamics.device),
        tuple(mask.to(dynamics.device) for mask in masks if mask.any()),
        None if joints is None else joints.to(dynamics.device),
    )


def _joint_precision(dynamics: Dynamics) -> Tensor | None:
    """(p, p) Å⁻², Σ over joints of JᵀJ / gap²; None where no bond joins two bodies.

    J (3, p) is the derivative of the vector from one bonded node to the next by the latents, at the
    reference: parts of one chain turn and shift, but together where they meet.
    """
    structure = dynamics.structure
    plain = replace(dynamics, beads=None).to("cpu")
    atom_of_node = np.searchsorted(structure.rows, structure.node_rows)
    zero = torch.zeros(1, dynamics.n_latents, dtype=torch.float64)
    rows = []
    for pair in structure.joints:
        step = torch.zeros(3, dynamics.n_latents, dtype=torch.float64)
        for node, sign in zip(pair, (-1.0, 1.0), strict=True):
            chain = int(structure.node_chain[node])
            layout = dynamics.chains[chain]
            atom = int(atom_of_node[node]) - layout.atoms.start
            step[:, layout.latents] += sign * plain.tangents(zero, chain)[0, :, atom].T
            if structure.chain_ids[chain] in structure.turning:
                # To first order, a large turn about the joint itself would part it.
                step[:, layout.rotation] = 0.0
        rows.append(step)
    if not rows:
        return None
    jacobian = torch.cat(rows)
    return jacobian.T @ jacobian / _JOINT_GAP**2


def elastic_variance(dynamics: Dynamics) -> Tensor:
    """(p,) variance in Å² of each latent before any image was seen.

    1/λ for modes, the same for every direction of rigid motion; no more than `mode_limit` squared.
    Of a body that may turn by any angle, that of all orientations.
    """
    variance = np.ones(dynamics.n_latents)
    for chain, layout in enumerate(dynamics.chains):
        if dynamics.modes is not None:
            softness = 1 / dynamics.modes.eigenvalues[chain]
            variance[layout.mode] = START_SPREAD["mode"] ** 2 * softness / softness.sum()
        variance[layout.rotation] = START_SPREAD["rotation"] ** 2 / 3
        if dynamics.structure.chain_ids[chain] in dynamics.structure.turning:
            variance[layout.rotation] = _ANY_TURN / dynamics.scale[layout.rotation] ** 2
        variance[layout.translation] = START_SPREAD["translation"] ** 2 / 3
    return torch.from_numpy(variance).minimum(mode_limit(dynamics).square())


def mode_limit(dynamics: Dynamics) -> Tensor:
    """(p,) Å, how far each latent goes before neighbours along a chain part by a bond's length.

    Infinite for rigid motion. A soft mode of a few residues, such as a loose end, would otherwise
    carry them anywhere: a bond costs a linear mode nothing, and images say little of few residues.
    """
    limit = torch.full((dynamics.n_latents,), torch.inf, dtype=torch.float64)
    if dynamics.modes is None:
        return limit
    structure = dynamics.structure
    for chain, layout in enumerate(dynamics.chains):
        nodes = structure.node_coords[structure.node_chain == chain]
        bonded = np.linalg.norm(np.diff(nodes, axis=0), axis=1) < BONDED_DISTANCE
        # One unit of a latent moves its chain by 1 Å (RMS), a vector of norm √n.
        vectors = dynamics.modes.vectors[chain] * np.sqrt(len(nodes))
        stretch = np.linalg.norm(np.diff(vectors, axis=1)[:, bonded], axis=-1)
        limit[layout.mode] = torch.from_numpy(MAX_BOND_STRETCH / stretch.max(-1, initial=1e-9))
    return limit


def shrink_covariance(scatter: Tensor, n: float, prior: ElasticPrior) -> tuple[Tensor, int]:
    """(p, p) covariance from a `scatter` summed over `n` particles, shrunk towards the prior.

    Directions in which particles vary by more than chance makes of independent latents are kept as
    they are: those whose variance, each latent over its own standard deviation, is above the edge
    (1 + √(p/n))² (Marchenko and Pastur 1967). Of the others, the inverse-Wishart maximum a
    posteriori with p prior degrees of freedom: shrunk together, a leading motion would widen all of
    them by a share p/(n + p) of its own variance. The prior's amplitude, one a kind of latent, is
    that of the particles themselves: only its shape (soft modes move more, latents are independent)
    counts. The second answer is how many directions are kept.
    """
    spread, whitened, leading = _leading_directions(scatter, n, prior)
    outer = spread[:, None] * spread
    kept = leading @ (leading.T @ whitened @ leading) @ leading.T
    # Of a symmetric matrix the part that leading directions have nothing of.
    beside = torch.eye(len(scatter)).to(scatter) - leading @ leading.T
    rest = _shrunk(n * outer * (beside @ whitened @ beside), n, prior)
    covariance = outer * (kept + beside @ (rest / outer) @ beside)
    # As wide, kind by kind, as the particles are.
    factor = torch.ones_like(spread)
    for of_kind in prior.kinds:
        observed = scatter.diagonal()[of_kind].sum() / n
        factor[of_kind] = (observed / covariance.diagonal()[of_kind].sum()).sqrt()
    return factor[:, None] * covariance * factor, leading.shape[1]


def with_less_rest(covariance: Tensor, rank: int, factor: float) -> Tensor:
    """The covariance with all but its first `rank` directions times a factor.

    Directions of the latents over their own standard deviations.
    """
    spread = covariance.diagonal().sqrt()
    outer = spread[:, None] * spread
    variances, directions = torch.linalg.eigh(covariance / outer)
    variances[: len(variances) - rank] *= factor
    return outer * (directions * variances @ directions.T)


def _leading_directions(
    scatter: Tensor, n: float, prior: ElasticPrior
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard deviations (p,), the covariance over them (p, p), and its directions (p, k)."""
    p = len(scatter)
    spread = _shrunk(scatter, n, prior).diagonal().sqrt()
    whitened = scatter / n / (spread[:, None] * spread)
    variances, directions = torch.linalg.eigh(whitened)
    return spread, whitened, directions[:, variances > (1 + np.sqrt(p / n)) ** 2]


def _shrunk(scatter: Tensor, n: float, prior: ElasticPrior) -> Tensor:
    """(p, p) the inverse-Wishart maximum a posteriori."""
    p = len(scatter)
    observed = scatter.diagonal()
    target = prior.variance.clone()
    for of_kind in prior.kinds:
        target[of_kind] *= (observed[of_kind] / n).sum() / target[of_kind].sum()
    # Variances are soon the particles' own; what p² correlations would say by chance takes p
    # particles to believe.
    target = (observed + _PRIOR_PARTICLES * target) / (n + _PRIOR_PARTICLES)
    return (scatter + p * prior.covariance(target)) / (n + p)
