"""Two refinements of random halves of the particles: do they find the same motions?"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .._arguments import Count, Seed, checked
from ..inference import Result, refine
from .maps import require_whole_number
from .motions import PrincipalMotions, compute_pca

# Fewer particles teach no population.
_FEWEST_A_HALF = 4
# Motions that are this alike are called the same.
_ALIKE = 0.8


@dataclass(frozen=True, eq=False, repr=False)
class HalvesComparison:
    """Principal motions of two halves of the particles; made by `compare_halves`.

    Attributes
    ----------
    first, second : PrincipalMotions
        Of refinements that share no particle and no population.
    overlap : (k, k) array
        |cosine| between how component i of the first (rows) and j of the second move the atoms:
        1 where they are the same motion.
    amplitudes : (2, k) array
        Å, how far atoms move (RMS) from a standard deviation below the mean to the mean.
    mean_distance : float
        Å, RMSD between the two mean conformations.
    """

    first: PrincipalMotions
    second: PrincipalMotions
    overlap: np.ndarray
    amplitudes: np.ndarray
    mean_distance: float

    @property
    def sentence(self) -> str:
        """How alike the leading motion of both halves is, in words."""
        best = int(np.argmax(self.overlap[0]))
        words = "find the same" if self.overlap[0, best] > _ALIKE else "do not find the same"
        ours, theirs = self.amplitudes[0, 0], self.amplitudes[1, best]
        return (
            f"halves of {len(self.first.result):,} and {len(self.second.result):,} particles "
            f"{words} leading motion: overlap {self.overlap[0, best]:.2f} of PC1 with "
            f"PC{best + 1}, {ours:.2f} and {theirs:.2f} Å a standard deviation "
            f"(RMS over atoms); their mean conformations differ by {self.mean_distance:.2f} Å"
        )

    def __repr__(self) -> str:
        return f"HalvesComparison({self.sentence})"


@checked
def compare_halves(
    result: Result,
    chain: str | None = None,
    kind: str = "all",
    n_components: Count = 3,
    *,
    n_particles: Count = 8000,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> HalvesComparison:
    """Refine two random halves of the particles, each on its own, and compare their motions.

    Parameters
    ----------
    result : Result
        With its particles, at the poses given first. Junk is left out.
    chain, kind, n_components
        As of `compute_pca`.
    n_particles : int
        At most so many in both halves, chosen at random.
    seed : int
        Chooses the halves.
    device : torch device, optional
        Of the refinements.
    progress : bool
        Show progress bars.
    **settings
        Of `refine`, such as ``blurs``.

    Returns
    -------
    HalvesComparison

    Raises
    ------
    ValueError
        For a result without its particles, or fewer than eight that show the molecule or are asked
        for.

    Notes
    -----
    Halves that do not agree have too few particles for what was found. Halves that do agree share
    the reference, the poses' errors and the elastic network, so that the same may be found where
    nothing moves; whether the images show the motion is what `compare_ends` says. Of GluA3's
    opening (2 × 150 particles, 32 px, 0 dB, five sets) the overlap is 0.997 and more, and 0.26 to
    0.45 where nothing moves (``docs/maps.csv``).

    Examples
    --------
    >>> from cryochains import Model, load_structure, refine, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 60, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> quick = {"blurs": (4.0, 0.0), "progress": False}
    >>> result = refine(Model(closed, particles, modes=None), particles, **quick)
    >>> compare_halves(result, **quick)
    HalvesComparison(halves of 30 and 30 particles ...
    """
    given = result.in_frame("poses")
    if given.particles is None:
        raise ValueError(
            f"expected a result with its particles, got {result!r}; try "
            "load_result(path, particles)"
        )
    require_whole_number(n_particles, 2 * _FEWEST_A_HALF, "n_particles", 8000)
    shown = np.flatnonzero(given.shows_molecule)
    # An image that is listed twice is in one half with both its rows.
    images, image = np.unique(given.ids[shown].astype(str), return_inverse=True)
    if len(images) < 2 * _FEWEST_A_HALF:
        raise ValueError(
            f"expected {2 * _FEWEST_A_HALF} particles or more that show the molecule, got "
            f"{len(images)}; try more particles"
        )
    order = np.random.default_rng(seed).permutation(len(images))[:n_particles]
    motions = []
    for of_half in (order[::2], order[1::2]):
        rows = shown[np.isin(image, of_half)]
        half = refine(
            given.model,
            given.particles[rows],
            seed=seed,
            device=device,
            progress=progress,
            **settings,
        )
        motions.append(compute_pca(half, chain, kind, n_components))
    first, second = motions
    steps = [_displacements(of_half) for of_half in motions]
    overlap = np.abs(np.einsum("iad,jad->ij", _unit(steps[0]), _unit(steps[1])))
    amplitudes = np.sqrt(np.square(np.stack(steps)).sum(-1).mean(-1))
    means = torch.from_numpy(np.stack([first.mean, second.mean])).float()
    decoded = given.model.decode(means)
    distance = float((decoded[1] - decoded[0]).square().sum(-1).mean().sqrt())
    return HalvesComparison(first, second, overlap, amplitudes, distance)


@torch.no_grad()
def _displacements(motions: PrincipalMotions) -> np.ndarray:
    """(k, n_atoms, 3) Å, half of what moves from a standard deviation below the mean to above."""
    sizes = motions.shown_scores.std(0)
    steps = torch.from_numpy(sizes[:, None] * motions.components).float()
    mean = torch.from_numpy(motions.mean).float()
    return ((motions.model.decode(mean + steps) - motions.model.decode(mean - steps)) / 2).numpy()


def _unit(steps: np.ndarray) -> np.ndarray:
    """Displacements (k, n, 3) over their norms; zero of those that are zero."""
    norms = np.linalg.norm(steps, axis=(1, 2), keepdims=True)
    return np.divide(steps, norms, out=np.zeros_like(steps), where=norms > 0)
