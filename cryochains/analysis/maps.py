"""Conformations against a map that never saw the atoms: is what was found in the images?

The map of some particles is made of their images and poses alone, by back-projection. A density of
their decoded mean conformation, and another such as the reference's, are compared with it.

Latents that were found in the very images of a map have followed the noise of those, and so agree
with it better than with other images even where nothing moves. `split_noise` makes two images of
each, whose noises are independent: latents are found in one, the map is made of the other. Only
then is a difference claimed. `compare_ends` does so by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .._arguments import Count, Latents, Ordinal, Seed, Share, checked
from ..images import (
    Map,
    ParticleStack,
    draw_volume,
    filter_images,
    positions,
    reconstruct,
    scale_shells,
    soft_sphere,
    sum_shells,
    transform_volume,
    untransform_volume,
)
from ..inference import Result, refine, require_same_ids
from ..model import require_same_images
from .motions import PrincipalMotions, compute_pca

# Standard errors that a difference has to exceed.
_CLAIMED = 3.0
# Å around the beads of a chain, within which its correlation is taken.
_AROUND_CHAIN = 6.0
_TINY_WEIGHT = 1e-12
# Standard errors are this times what the noise on the shells makes them: which directions few
# particles happen to show does not average out on a shell. Measured over 40 draws of the poses:
# 1.2 of 90 particles, 1.07 of 400 (32 px, 0 dB).
_UNEVEN_ERROR = 1.25
# Fewer particles make no map.
_FEWEST = 4
# Shells that are compared of a map that resolves nothing.
_FEWEST_SHELLS = 2
# A curve along the line that varies by less says nothing of where a chain is.
_FLAT = 1e-4
# Of the line through both conformations, on which the second is at 0 and the first at 1.
_LINE = np.linspace(-0.5, 1.5, 9)


@dataclass(frozen=True, eq=False, repr=False)
class MapComparison:
    """A map beside the densities of two conformations; made by `compare_with_map`.

    Attributes
    ----------
    map : Map
        Of images and poses alone.
    own, other : (box, box, box) float32 arrays
        Densities of the two conformations, filtered as the map is and as bright as the model says.
    names : tuple of str
        What the two conformations are.
    fsc_own, fsc_other : (box // 2 + 1,) arrays
        Fourier shell correlation of each with the map.
    agreement : (2,) array
        Mean over the resolved shells of these, each shell weighted by its number of frequencies
        and the correlation of the half maps.
    of_halves : (2, 2) array
        The same of each half map (rows).
    error : float
        Standard error of `difference`, by the noise in which the half maps differ.
    chain_ids : tuple of str
    line : (m,) array
        Points on the straight line through both conformations: the second is at 0, the first at 1.
    chain_correlation : (n_chains, m) array
        Correlation in real space of the map with the conformations on that line, within 6 Å of the
        beads of each chain in either. Where it is highest, the map says the chain is.
    independent : bool
        Whether the map is of other images than those that the conformations were found in.
    """

    map: Map
    own: np.ndarray
    other: np.ndarray
    names: tuple[str, str]
    fsc_own: np.ndarray
    fsc_other: np.ndarray
    agreement: np.ndarray
    of_halves: np.ndarray
    error: float
    chain_ids: tuple[str, ...]
    line: np.ndarray
    chain_correlation: np.ndarray
    independent: bool

    @property
    def difference(self) -> float:
        """By how much the map agrees better with the first conformation than with the second."""
        return float(self.agreement[0] - self.agreement[1])

    @property
    def significance(self) -> float:
        """`difference` in standard errors; zero where the two conformations are the same."""
        return self.difference / self.error if self.error > 0 else 0.0

    @property
    def favours_own(self) -> bool:
        """Whether the map agrees better with the first conformation, by over 3 standard errors.

        Never where the conformations were found in the images of the map.
        """
        return self.independent and self.significance > _CLAIMED

    @property
    def shown(self) -> np.ndarray:
        """(box, box, box) the map on the shells that it resolves, without its mean."""
        return _resolved(self.map, self.map.volume)

    @cached_property
    def residual(self) -> Map:
        """What the map shows beside `own`, at the brightness that fits it best.

        On the shells that the map resolves; ``comparison.residual.save("residual.mrc")``.
        """
        shown = self.shown
        inside = self.own * soft_sphere(self.map.box_size)
        brightness = (shown * inside).sum() / (self.own * inside).sum()
        left = (shown - brightness * self.own).astype(np.float32)
        return replace(self.map, volume=left, half1=None, half2=None, fsc=None)

    @cached_property
    def noise(self) -> float:
        """Standard deviation of the noise in a voxel of `shown`, by what the half maps differ."""
        half1, half2, _ = _halves_of(self.map)
        noise = _resolved(self.map, (half1 - half2) / 2)
        return float(np.sqrt(np.average(noise**2, weights=soft_sphere(self.map.box_size))))

    @property
    def residual_significance(self) -> float:
        """The residual's largest voxel in the sphere over `noise`; noise alone seldom exceeds 5."""
        mask = soft_sphere(self.map.box_size)
        return float(np.abs(self.residual.volume * mask).max() / self.noise)

    @property
    def chain_position(self) -> np.ndarray:
        """(n_chains,) point of `line` where each chain correlates best with the map.

        By the parabola through the best and its neighbours; an end of the line may be beyond it.
        NaN for a chain that is at the same place in both.
        """
        return np.array([_highest(self.line, curve) for curve in self.chain_correlation])

    @property
    def sentence(self) -> str:
        """Which conformation agrees better, in words."""
        own, other = self.names
        numbers = (
            f"{self.agreement[0]:.3f} and {self.agreement[1]:.3f}, "
            f"difference {self.difference:+.4f} ± {self.error:.4f}"
        )
        if not self.independent:
            return (
                f"correlation with {own} and {other}: {numbers}; they were found in the images of "
                "the map, so that no difference is claimed"
            )
        better = "better" if self.favours_own else "no better"
        return f"the map agrees {better} with {own} than with {other}: {numbers}"

    def __repr__(self) -> str:
        return f"MapComparison({self.map.n_particles:,} particles: {self.sentence})"


@dataclass(frozen=True, eq=False, repr=False)
class EndsComparison:
    """Maps of the two ends of a component, each beside both conformations; of `compare_ends`.

    Attributes
    ----------
    label : str
        Such as "PC1 of all chains, α and R|t, frame of the molecule".
    low, high : MapComparison
        The map of one end beside its own decoded conformation and the other end's. What else
        differs between maps and densities favours the same conformation in both, and so confirms
        nothing.
    distance : float
        Å, RMSD between the two decoded conformations.
    """

    label: str
    low: MapComparison
    high: MapComparison
    distance: float

    @property
    def confirmed(self) -> bool:
        """Whether each map agrees better with its own, by more than three standard errors."""
        return self.low.favours_own and self.high.favours_own

    @property
    def sentence(self) -> str:
        """Whether the maps confirm the motion, in words."""
        words = "maps of the images alone confirm the motion"
        if not self.confirmed:
            words = "not confirmed by maps of the images alone"
        numbers = " and ".join(f"{end.significance:+.1f}" for end in (self.low, self.high))
        return (
            f"{self.label}, ends {self.distance:.1f} Å apart: {words}; preference of each for its "
            f"own conformation over the other's: {numbers} standard errors"
        )

    def __repr__(self) -> str:
        return f"EndsComparison({self.sentence})"


@checked
def split_noise(
    result: Result,
    *,
    n_particles: Count = 4000,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> tuple[Result, ParticleStack]:
    """Refine images with noise added; and the same images with that noise subtracted.

    Noise e as strong as an image's own, and of its colour, is drawn for each. The noises of y + e
    and y − e are then independent, each with twice the variance: what `refine` finds in the first
    cannot have followed the noise of the second, and so maps of the second may speak for or against
    it: ``compare_ends(compute_pca(again), images=images)``.

    Parameters
    ----------
    result : Result
        Refined, with its particles. Junk is left out.
    n_particles : int
        At most so many, chosen at random: their images are held in memory.
    seed : int
        Chooses the particles and the noise.
    device : torch device, optional
        Of the refinement.
    progress : bool
        Show a progress bar.
    **settings
        Of `refine`, such as ``blurs``.

    Returns
    -------
    again : Result
        Latents found in y + e, with a population of their own.
    images : ParticleStack
        y − e of the same particles, in the same order.

    Raises
    ------
    ValueError
        For a result without its particles or their noise.

    Notes
    -----
    Exact as far as the noise is Gaussian and its variance known (data fission; Leiner, Duan,
    Wasserman and Ramdas 2023, J. Am. Stat. Assoc. 120, 135): an error of x % in the variance leaves
    a correlation of x/2 % between the noises.

    Examples
    --------
    >>> from cryochains import Model, load_structure, refine, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 20, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> quick = {"blurs": (4.0, 0.0), "progress": False}
    >>> result = refine(Model(closed, particles, modes=None), particles, **quick)
    >>> again, images = split_noise(result, **quick)
    >>> again.ids.tolist() == images.ids.tolist(), len(again) <= 20
    (True, True)
    """
    given = result.in_frame("poses")
    if given.particles is None or given.noise is None:
        raise ValueError(
            f"expected a refined result with its particles, got {result!r}; try "
            "load_result(path, particles)"
        )
    rng = np.random.default_rng(seed)
    shown = np.flatnonzero(given.shows_molecule)
    chosen = np.sort(rng.permutation(shown)[:n_particles])
    particles = given.particles[chosen]
    # A stack takes a tensor in place of its images.
    images: Any = particles.read_images()
    spectrum = None if given.population is None else given.population.noise_spectrum
    noise = _draw_noise(given.noise[chosen], spectrum, particles, rng)
    noisier = replace(particles, images=images + noise)
    again = refine(given.model, noisier, seed=seed, device=device, progress=progress, **settings)
    return again, replace(particles, images=images - noise)


@checked
def compare_with_map(
    result: Result,
    rows=None,
    *,
    images: ParticleStack | None = None,
    other: Latents | None = None,
    names: tuple[str, str] = ("their mean conformation", "the reference"),
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> MapComparison:
    """Compare the map of some particles with their decoded mean conformation and with another.

    Parameters
    ----------
    result : Result
        With its particles. A turn or shift that all chains share is taken out, as `compute_pca`
        does; particles count by their responsibility over the variance of their noise.
    rows : int, slice, indices or mask, optional
        The group of particles; by default all. Junk is left out.
    images : ParticleStack, optional
        Other images of the same particles, which the map is made of: what `split_noise` gives
        beside its result. Without them no difference is claimed, since the latents have followed
        the noise of the images; nor is one to be believed where `rows` were chosen by latents that
        have.
    other : (p,) tensor, optional
        Latents of the conformation to compare with, in the frame of the comparison; by default the
        reference.
    names : tuple of str
        What the two conformations are called.
    seed : int
        Chooses the halves of the map.
    device, progress
        As of `reconstruct`.

    Returns
    -------
    MapComparison

    Raises
    ------
    ValueError
        For a result without its particles, images of others, or fewer than four particles.

    Examples
    --------
    >>> from cryochains import Model, load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 100, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> result = Result(model, torch.zeros(100, 12), particles=particles)
    >>> compare_with_map(result, progress=False)  # they are the same
    MapComparison(100 particles: correlation with their mean conformation and the reference: ...
    """
    framed = result.in_frame(None)
    stack = _stack_of(framed, images)
    group = _shown_rows(framed, rows)
    own = _mean_latents(framed, group)
    other = torch.zeros_like(own) if other is None else torch.as_tensor(other, dtype=own.dtype)
    if other.shape != own.shape or not other.isfinite().all():
        raise ValueError(
            f"expected latents ({len(own)},), finite, got {tuple(other.shape)}; try "
            "result.latents[row]"
        )
    volume = _group_map(framed, stack, group, seed, device, progress)
    return _compare(framed, volume, (own, other), names, images is not None)


@checked
def compare_ends(
    motions: PrincipalMotions,
    component: Ordinal = 0,
    share: Share = 0.3,
    *,
    images: ParticleStack | None = None,
    seed: Seed = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    **settings: Any,
) -> EndsComparison:
    """Compare the maps of both ends of a component, each with its own conformation and the other's.

    A motion that the images show makes each map agree better with its own. Which particles are at
    an end was found in the images too: by default all is found again in images with noise added,
    and the maps are made of the same images with that noise subtracted (`split_noise`), which
    takes as long as a refinement of at most 4,000 particles. The component is then that of the new
    refinement which is most like the one asked for.

    Parameters
    ----------
    motions : PrincipalMotions
    component : int
        0 is PC1.
    share : float
        Of the particles at each end.
    images : ParticleStack, optional
        Other images of the same particles, that these motions were not found in: such as
        `split_noise` gives beside the result of which these motions are. Nothing is then refined.
    seed, device, progress
        As of `compare_with_map`.
    **settings
        Of `split_noise` and `refine`, such as ``blurs``, where all is refined once more.

    Returns
    -------
    EndsComparison

    Raises
    ------
    ValueError
        For a component that does not exist, a share that is not between 0 and 0.5, ends of fewer
        than four particles, a result without its particles or their noise, or images of which, with
        noise added, nothing of the reference is seen any more.

    Examples
    --------
    >>> from cryochains import Model, compute_pca, load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> model = Model(closed, modes=None, box_size=32, pixel_size=4.0)
    >>> latents = torch.zeros(100, 12)
    >>> latents[:, 3] = torch.linspace(-8, 8, 100)  # chain A shifts along x
    >>> particles = simulate_particles(closed, 100, dynamics=model.dynamics, latents=latents,
    ...     box_size=32, pixel_size=4.0, progress=False)
    >>> motions = compute_pca(Result(model, latents, particles=particles))
    >>> compare_ends(motions, images=particles, progress=False)  # the latents are the true ones
    EndsComparison(PC1 of all chains, ... Å apart: maps of the images alone confirm the motion; ...
    """
    is_whole = isinstance(component, (int, np.integer))
    if not is_whole or not 0 <= component < len(motions.components):
        raise ValueError(
            f"expected a component from 0 to {len(motions.components) - 1}, got {component!r}; "
            "try 0, which is PC1"
        )
    if not 0 < share <= 0.5:
        raise ValueError(f"expected a share between 0 and 0.5, got {share}; try 0.3")
    n_shown = int(motions.result.shows_molecule.sum())
    if share * n_shown < _FEWEST:
        raise ValueError(
            f"expected {_FEWEST} particles or more at each end, got {share} of {n_shown}; try a "
            "larger share"
        )
    if images is None:
        again, images = split_noise(
            motions.result, seed=seed, device=device, progress=progress, **settings
        )
        motions, component = _same_motion(motions, component, again)
    framed = motions.result
    stack = _stack_of(framed, images)
    scores = motions.scores[:, component]
    low, high = np.quantile(motions.shown_scores[:, component], (share, 1 - share))
    groups = [_shown_rows(framed, scores <= low), _shown_rows(framed, scores >= high)]
    own = [_mean_latents(framed, group) for group in groups]
    ends = []
    for number in (0, 1):
        volume = _group_map(framed, stack, groups[number], seed, device, progress)
        pair = (own[number], own[1 - number])
        names = ("their own conformation", "the other end's")
        end = _compare(framed, volume, pair, names, independent=True)
        # Halfway between the two conformations neither should agree better, and that point was
        # found from as many noisy images as are in both groups.
        part = len(groups[number]) / (len(groups[0]) + len(groups[1]))
        ends.append(replace(end, error=end.error * float(np.sqrt(1 + part))))
    moved = framed.model.decode(torch.stack(own))
    distance = float((moved[1] - moved[0]).square().sum(-1).mean().sqrt())
    label = f"PC{component + 1} of {motions.label}"
    return EndsComparison(label, ends[0], ends[1], distance)


def require_whole_number(value: Any, least: int, name: str, usual: int) -> None:
    """Raise for what is no whole number of `least` or more."""
    if not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(
            f"expected {name} of {least} or more, a whole number, got {value!r}; try {usual:,}"
        )


def _draw_noise(
    levels: Tensor, spectrum: Tensor | None, particles: ParticleStack, rng: np.random.Generator
) -> Tensor:
    """(n, box, box) noise of standard deviations (n,), and of the colour of a spectrum (R,).

    Of an image that is listed twice the same.
    """
    box_size = particles.box_size
    images, image = np.unique(particles.ids.astype(str), return_inverse=True)
    shape = (len(images), box_size, box_size)
    noise = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))[image]
    noise *= levels[:, None, None]
    if spectrum is None:
        return noise
    k = torch.fft.fftfreq(box_size, 1 / box_size)
    ring = torch.hypot(k[:, None], k[: box_size // 2 + 1]).round().long()
    amplitude = spectrum.clamp_min(0).sqrt()[ring.clamp_(max=len(spectrum) - 1)]
    return filter_images(noise, amplitude.float())


def _same_motion(
    motions: PrincipalMotions, component: int, again: Result
) -> tuple[PrincipalMotions, int]:
    """The motions of another result, of the same chain and kind, and which is most like one."""
    asked = motions.components[component]
    motions_again = compute_pca(
        again, motions.chain, motions.kind, len(motions.components), motions.result.frame
    )
    return motions_again, int(np.argmax(np.abs(motions_again.components @ asked)))


def _stack_of(result: Result, images: ParticleStack | None) -> ParticleStack:
    """The particles of a result at its poses, or other images of them."""
    if result.particles is None:
        raise ValueError(
            f"expected a result with its particles, got {result!r}; try "
            "load_result(path, particles)"
        )
    if images is None:
        return result.particles
    require_same_ids(images.ids, result.particles.ids, "images")
    require_same_images(result.model, images)
    return replace(result.particles, images=images.images)


def _shown_rows(result: Result, rows) -> np.ndarray:
    """(k,) positions of the group without junk."""
    n = len(result)
    chosen = np.arange(n) if rows is None else positions(rows, n)
    chosen = chosen[result.shows_molecule[chosen]]
    if len(chosen) < _FEWEST:
        raise ValueError(
            f"expected {_FEWEST} particles or more that show the molecule, got {len(chosen)}; "
            "try a larger group"
        )
    return chosen


def _map_weights(result: Result, rows: np.ndarray) -> np.ndarray:
    """(k,) responsibility over the variance of the noise."""
    weights = np.ones(len(rows))
    if result.responsibility is not None:
        weights *= result.responsibility.double().numpy()[rows]
    if result.noise is not None and (result.noise[rows] > 0).all():
        weights /= result.noise.double().numpy()[rows] ** 2
    return weights


def _mean_latents(result: Result, rows: np.ndarray) -> Tensor:
    """(p,) mean of the group, each by its responsibility."""
    weights = torch.ones(len(rows))
    if result.responsibility is not None:
        weights = result.responsibility[rows]
    return (weights[:, None] * result.latents[rows]).sum(0) / weights.sum()


def _group_map(
    result: Result, stack: ParticleStack, rows: np.ndarray, seed: int, device: Any, progress: bool
) -> Map:
    return reconstruct(
        stack[rows],
        weights=_map_weights(result, rows),
        scale=result.scale[rows],
        origin=result.model.microscope.origin,
        seed=seed,
        device=device,
        progress=progress,
    )


def _compare(
    result: Result,
    volume: Map,
    latents: tuple[Tensor, Tensor],
    names: tuple[str, str],
    independent: bool,
) -> MapComparison:
    """A map beside the densities at two latents (p,)."""
    own, other = latents
    noise = _noise_between_halves(volume)
    densities, coords = zip(*(_expected(result, volume, one) for one in latents), strict=True)
    agreement, error, fscs = _agreement(volume.volume, densities, noise)
    halves = [_agreement(half, densities, noise)[0] for half in _halves_of(volume)[:2]]
    structure = result.model.structure
    chain = structure.node_chain[result.imaging_model.beads.node]
    chains = [torch.cat(coords)[np.tile(chain == c, 2)] for c in range(structure.n_chains)]
    near = [_near_beads(beads.numpy(), volume) for beads in chains]
    visible = _resolved(volume, volume.volume)
    curves = []
    for position in _LINE:
        if position in (0, 1):
            density = densities[1 - int(position)]
        else:
            density, _ = _expected(result, volume, other + float(position) * (own - other))
        drawn = _resolved(volume, density)
        curves.append([np.corrcoef(visible[inside], drawn[inside])[0, 1] for inside in near])
    return MapComparison(
        volume,
        _resolved(volume, densities[0]),
        _resolved(volume, densities[1]),
        names,
        fscs[0],
        fscs[1],
        agreement,
        np.stack(halves),
        error,
        tuple(structure.chain_ids),
        _LINE,
        np.array(curves).T,
        independent,
    )


@torch.no_grad()
def _expected(result: Result, volume: Map, latents: Tensor) -> tuple[np.ndarray, Tensor]:
    """(box, box, box) density at latents (p,) as the particles of a map would show it; its beads.

    With little of the directions that few of them show. The beads are (n, 3), Å from voxel
    ``box // 2``.
    """
    model = result.imaging_model
    coords = model.bead_dynamics.decode(latents[None])[0] - model.microscope.origin_tensor
    weights = torch.from_numpy(model.beads.weights).float()
    widths = torch.from_numpy(model.beads.widths).float()
    density = draw_volume(coords, weights, widths, volume.box_size, volume.pixel_size)
    gain = torch.from_numpy(volume.gain)
    return untransform_volume(transform_volume(density) * gain), coords


def _halves_of(volume: Map) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The half maps and their correlation."""
    if volume.half1 is None or volume.half2 is None or volume.fsc is None:
        raise ValueError(f"expected a map with its halves, got {volume!r}; try half_maps=True")
    return volume.half1, volume.half2, volume.fsc


def _highest(x: np.ndarray, y: np.ndarray) -> float:
    """Where evenly sampled y is highest, by the parabola through three points; or an end of x."""
    if not np.ptp(y) > _FLAT:
        return float("nan")
    best = int(np.argmax(y))
    if best in (0, len(y) - 1):
        return float(x[best])
    before, there, after = y[best - 1 : best + 2]
    offset = 0.5 * (before - after) / (before - 2 * there + after)
    return float(x[best] + offset * (x[1] - x[0]))


@dataclass(frozen=True, eq=False)
class _Noise:
    """What the two halves of a map say about it.

    Attributes
    ----------
    mask : (box, box, box) array
        Within which maps and densities are compared.
    power : (R,) array
        Of the map's noise, for each frequency of a shell: half of what the halves differ by.
    weights : (R,) array
        Of each shell in the agreement; zero of the mean and of what is not resolved.
    """

    mask: np.ndarray
    power: np.ndarray
    weights: np.ndarray


def _noise_between_halves(volume: Map) -> _Noise:
    half1, half2, fsc = _halves_of(volume)
    mask = soft_sphere(volume.box_size)
    spectrum = transform_volume((half1 - half2) / 2 * mask)
    counts = sum_shells(torch.ones(1).expand(spectrum.shape))
    power = sum_shells(spectrum.abs().square()) / counts / np.mean(mask**2)
    weights = counts * fsc.clip(0.0, 1.0)
    weights[0] = 0
    weights[max(volume.n_resolved, _FEWEST_SHELLS) :] = 0
    return _Noise(mask, power, weights / max(weights.sum(), _TINY_WEIGHT))


def _agreement(
    volume: np.ndarray, densities: Sequence[np.ndarray], noise: _Noise
) -> tuple[np.ndarray, float, list[np.ndarray]]:
    """(2,) agreement of a volume with two densities, error of the difference, and both FSCs.

    On a shell the product of noise of power P with u = a/|a| − b/|b| has the variance P Σ|u|².
    """
    spectrum = transform_volume(volume * noise.mask)
    inverse = _inverse_norms(spectrum)
    units = []
    for density in densities:
        of_density = transform_volume(density * noise.mask)
        units.append(scale_shells(of_density, _inverse_norms(of_density)))
    fscs = [sum_shells((spectrum * unit.conj()).real) * inverse for unit in units]
    agreement = np.array([(noise.weights * fsc).sum() for fsc in fscs])
    variance = noise.power * sum_shells((units[0] - units[1]).abs().square())
    error = np.sqrt((np.square(noise.weights * inverse) * variance).sum())
    return agreement, _UNEVEN_ERROR * float(error), fscs


def _inverse_norms(spectrum: Tensor) -> np.ndarray:
    """(R,) one over the norm of each shell; zero of shells that are zero."""
    norms = np.sqrt(sum_shells(spectrum.abs().square()))
    return np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)


def _resolved(volume: Map, density: np.ndarray) -> np.ndarray:
    """A density on the shells that a map resolves.

    Without its mean, of which images say next to nothing.
    """
    shells = np.ones(volume.box_size // 2 + 1)
    shells[0] = 0
    shells[max(volume.n_resolved, _FEWEST_SHELLS) :] = 0
    return untransform_volume(scale_shells(transform_volume(density), shells))


def _near_beads(beads: np.ndarray, volume: Map) -> np.ndarray:
    """(box, box, box) bool, voxels near (n, 3) `beads`, Å from the central voxel."""
    box = volume.box_size
    grid = (np.arange(box) - box // 2) * volume.pixel_size
    z, y, x = np.meshgrid(grid, grid, grid, indexing="ij")
    voxels = np.stack([x, y, z], axis=-1).reshape(-1, 3)
    distance, _ = cKDTree(beads).query(voxels, distance_upper_bound=_AROUND_CHAIN)
    return np.isfinite(distance).reshape(box, box, box)
