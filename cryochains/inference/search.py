"""Where bodies that may turn by any angle are: each image against thousands of orientations.

Symbols: y → image, T → its CTF, R → its pose, Q → how the body is turned in the molecule, G = R Q →
how it is turned on the image, g → the spectrum of the body about the point that it turns about, h →
that of all other bodies, p → the phase that puts the point where it is on the image. Of the image
T (h + p g) at the brightness that fits best, the log likelihood above that of noise is

    ⟨y, T (h + p g)⟩² / 2 ‖T (h + p g)‖²

Whatever the pose of a particle is, G runs over all rotations as Q does. One set of projections of
the body therefore serves all particles: an even grid of G, of which ⟨y, T p g⟩, ⟨T h, T p g⟩ and
‖T g‖² are three products of matrices, particles times orientations.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._processes import gather, is_first, own_share
from ..images import ParticleStack
from ..model import Microscope, Model, matrix_to_rotvec
from .docking import Comparison, compare_with, even_rotations
from .likelihood import map_blocks, real_parts

# Å, pixels of the images that are compared, of which there are no more than so many a side.
_LEAST_PIXEL = 6.0
_MOST_PIXELS = 48
# Beads of a body in the same cube of so many pixels are drawn as one.
_CUBE = 1.3
# Neighbouring orientations differ by about a pixel (RMS over the body); at most so many of them,
# and at least.
_MOST_ORIENTATIONS = 40_000
_LEAST_ORIENTATIONS = 576
_TURNS_AT_A_TIME = 256
_PARTICLES_AT_A_TIME = 512
# How far the second best orientation is from the best one, at least.
_ANOTHER_TURN = math.radians(30.0)


@dataclass(frozen=True, eq=False)
class Starts:
    """Latents to refine n particles from; made by `search_turns`.

    Attributes
    ----------
    latents : (n, p) tensor
        With the likeliest orientation of every body that may turn by any angle.
    others : tuple of (n, p) tensors
        For each such body, the same with its next orientation that is another one; of several
        bodies also what the search found in another order.
    behind : tuple of (n,) tensors
        By how much the log likelihood is lower there.
    score : (n,) tensor
        Log likelihood of `latents`, above that of noise.
    """

    latents: Tensor
    others: tuple[Tensor, ...]
    behind: tuple[Tensor, ...]
    score: Tensor


@dataclass(frozen=True, eq=False)
class _Best:
    """Two best orientations of a body in the molecule (n, 3, 3), and log likelihoods (n,)."""

    first: Tensor
    second: Tensor
    score: Tensor
    second_score: Tensor


def turning_bodies(model: Model) -> list[int]:
    """Numbers of the bodies whose orientation is to be searched."""
    if not model.dynamics.rotation:
        return []
    structure = model.structure
    return [structure.chain_ids.index(name) for name in structure.turning]


@torch.no_grad()
def search_turns(model: Model, particles: ParticleStack, mean: Tensor, progress: bool) -> Starts:
    """Search the orientations of the bodies that may turn by any angle, particle by particle.

    Parameters
    ----------
    model : Model
    particles : ParticleStack
    mean : (p,) tensor
        Latents of all else.
    progress : bool
        Show a progress bar.

    Notes
    -----
    Of several such bodies one is searched after the other. In a first round those that were not
    searched yet are left out of the image; in a second one all others are where they were found.
    Like bodies may take each other's part of the image: it is done in both orders, and of every
    particle the likelier answer kept.
    """
    bodies = turning_bodies(model)
    n = len(particles)
    comparison = compare_with(model, particles, np.arange(n), _coarse_box(model))
    own = own_share(n)
    comparison = replace(comparison, views=comparison.views[own])
    mean = mean.to(model.device).float()
    orders = [bodies] if len(bodies) == 1 else [bodies * 2, bodies[::-1] * 2]
    total = (own.stop - own.start) * sum(len(order) for order in orders)
    shown = progress and is_first()
    with tqdm(total=total, desc="searching", unit="particle", disable=not shown) as bar:
        answers = [_search_in_order(model, comparison, mean, order, bar) for order in orders]
    best = answers[0] if len(answers) == 1 else _likelier(*answers)
    return Starts(
        gather(best.latents, n),
        tuple(gather(others, n) for others in best.others),
        tuple(gather(behind, n) for behind in best.behind),
        gather(best.score, n),
    )


def _search_in_order(
    model: Model, comparison: Comparison, mean: Tensor, order: list[int], bar: tqdm
) -> Starts:
    """One body after the other, the first time without those that were not searched yet."""
    latents = mean.expand(len(comparison.views), -1).clone()
    drawn = torch.ones(len(model.dynamics.chains), dtype=torch.bool)
    drawn[order] = False
    best = {}
    for body in order:
        drawn[body] = False
        best[body] = _best_turns(model, comparison, latents, body, drawn, bar)
        latents = _turned(model, latents, body, best[body].first)
        drawn[body] = True
    return Starts(
        latents,
        tuple(_turned(model, latents, body, one.second) for body, one in best.items()),
        tuple(one.score - one.second_score for one in best.values()),
        best[order[-1]].score,
    )


def _likelier(one: Starts, other: Starts) -> Starts:
    """Of each particle the likelier of two answers, and the latents of the other one."""
    gain = other.score - one.score
    wins = (gain > 0).unsqueeze(1)
    # Bodies stand in the order in which they were searched.
    pairs = zip(one.others, other.others[::-1], strict=True)
    others = [torch.where(wins, b, a) for a, b in pairs]
    gaps = zip(one.behind, other.behind[::-1], strict=True)
    behind = [torch.where(gain > 0, b, a) for a, b in gaps]
    return Starts(
        torch.where(wins, other.latents, one.latents),
        (*others, torch.where(wins, one.latents, other.latents)),
        (*behind, gain.abs()),
        torch.maximum(one.score, other.score),
    )


def _coarse_box(model: Model) -> int:
    """Pixels a side of the images that are compared."""
    side = model.box_size * model.pixel_size
    return min(model.box_size, 2 * math.ceil(side / _LEAST_PIXEL / 2), _MOST_PIXELS)


def _turned(model: Model, latents: Tensor, body: int, turns: Tensor) -> Tensor:
    """The latents (n, p) with a body turned by (n, 3, 3)."""
    layout = model.dynamics.chains[body].rotation
    latents = latents.clone()
    latents[:, layout] = matrix_to_rotvec(turns) / model.dynamics.scale_tensor[layout]
    return latents


def _best_turns(
    model: Model, comparison: Comparison, latents: Tensor, body: int, drawn: Tensor, bar: tqdm
) -> _Best:
    """The best orientations of a body where those of `drawn` (n_chains,) are as `latents` say."""
    shape, points = _coarse_body(model, comparison, latents[0], body)
    grid = _orientations(model, comparison, points)
    parts = []
    for start in range(0, len(latents), _PARTICLES_AT_A_TIME):
        rows = slice(start, start + _PARTICLES_AT_A_TIME)
        some = replace(comparison, views=comparison.views[rows])
        terms = _image_terms(model, some, latents[rows], body, drawn)
        score = partial(_scores, comparison, shape, points, terms)
        blocks = map_blocks(score, list(grid.split(_TURNS_AT_A_TIME)), model.device)
        parts.append(_two_best(torch.cat(blocks, dim=1), grid, some.views.rotations))
        bar.update(len(some.views))
    return _Best(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _coarse_body(
    model: Model, comparison: Comparison, latents: Tensor, body: int
) -> tuple[Microscope, Tensor]:
    """What draws a body of few beads, and their (m, 3) positions from the point it turns about.

    Each stands for the beads of a cube: at their centre, and as wide as they are spread.
    """
    microscope = model.microscope
    layout = model.bead_dynamics.chains[body]
    coords = model.bead_dynamics.bend(latents[None], body)[0]
    weights = microscope.weight_tensor[layout.atoms]
    cubes = torch.floor(coords / (_CUBE * comparison.side / comparison.box_size))
    cube = torch.unique(cubes, dim=0, return_inverse=True)[1]
    total = weights.new_zeros(int(cube.max()) + 1).index_add_(0, cube, weights)
    share = weights / total[cube]
    points = coords.new_zeros(len(total), 3).index_add_(0, cube, share.unsqueeze(1) * coords)
    spread = (coords - points[cube]).square().mean(1) + microscope.variance_tensor[layout.atoms]
    variance = spread.new_zeros(len(total)).index_add_(0, cube, share * spread)
    return replace(
        microscope, weights=total.cpu().numpy(), sigma=variance.sqrt().cpu().numpy()
    ), points


def _orientations(model: Model, comparison: Comparison, points: Tensor) -> Tensor:
    """(k, 3, 3) even grid of orientations, as fine as the pixels of the images are."""
    radius = float(points.square().sum(1).mean().sqrt())
    angle = comparison.side / comparison.box_size / max(radius, 1.0)
    # The volume of all rotations over that of a cube of this angle.
    n = round(8 * math.pi**2 / angle**3)
    n = min(max(n, _LEAST_ORIENTATIONS), _MOST_ORIENTATIONS)
    return torch.from_numpy(even_rotations(n)).float().to(model.device)


@dataclass(frozen=True, eq=False)
class _ImageTerms:
    """What the likelihood of n images needs beside the body; q real numbers a spectrum.

    Attributes
    ----------
    of_data : (n, q) tensor
        T p* y over the noise.
    of_others : (n, q) tensor
        T² p* h over the noise.
    of_square : (n, q/2) tensor
        T² over the noise.
    overlap : (n,) tensor
        ⟨y, T h⟩.
    power : (n,) tensor
        ‖T h‖².
    """

    of_data: Tensor
    of_others: Tensor
    of_square: Tensor
    overlap: Tensor
    power: Tensor


def _image_terms(
    model: Model, comparison: Comparison, latents: Tensor, body: int, drawn: Tensor
) -> _ImageTerms:
    """Of the images of a comparison, whose conformations without the body are known."""
    views = comparison.views
    dynamics = model.bead_dynamics
    shown = torch.cat(
        [
            drawn[chain].expand(layout.n_atoms).float()
            for chain, layout in enumerate(dynamics.chains)
        ]
    )
    weights = model.microscope.weight_tensor * shown.to(model.device)

    def draw(rows: slice) -> Tensor:
        positions = model.microscope.image_positions(
            dynamics.decode(latents[rows]), views.rotations[rows], views.shifts[rows]
        )
        return model.microscope.spectrum(positions, box_size=comparison.box_size, weights=weights)

    parts = map_blocks(draw, views.blocks(), model.device)
    others = comparison.magnification * torch.cat(parts)
    pivot = dynamics.centers[body] - model.microscope.origin_tensor
    point = pivot + _translations(model, latents, body)
    at = (views.rotations[:, :2] @ point.unsqueeze(-1)).squeeze(-1) + views.shifts
    back = comparison.phases(at).conj()
    counted = comparison.inverse_noise.float()[comparison.ring] * comparison.weights.square()
    of_data = counted * views.transfer * views.spectra
    of_square = counted * views.transfer.square()
    return _ImageTerms(
        _counted_parts(comparison, back * of_data),
        _counted_parts(comparison, back * of_square * others),
        of_square.flatten(1)[:, _counted(comparison)],
        (of_data.real * others.real + of_data.imag * others.imag).sum((1, 2)),
        (of_square * others.abs().square()).sum((1, 2)),
    )


def _translations(model: Model, latents: Tensor, body: int) -> Tensor:
    """(n, 3) Å, or nothing to add where bodies do not shift."""
    if not model.dynamics.translation:
        return latents.new_zeros(len(latents), 3)
    return latents[:, model.dynamics.chains[body].translation]


def _counted(comparison: Comparison) -> Tensor:
    """(box·(box//2 + 1),) mask of the frequencies that count."""
    counts = comparison.inverse_noise[comparison.ring] * comparison.weights > 0
    return counts.flatten()


def _counted_parts(comparison: Comparison, spectra: Tensor) -> Tensor:
    """(n, q) real and imaginary parts of the frequencies that count, side by side."""
    return real_parts(spectra.flatten(1)[:, _counted(comparison)].unsqueeze(1))


def _scores(
    comparison: Comparison,
    shape: Microscope,
    points: Tensor,
    terms: _ImageTerms,
    grid: Tensor,
) -> Tensor:
    """(n, k) log likelihood of every image with the body in every orientation of a (k, 3, 3)."""
    spectra = shape.spectrum(points @ grid[:, :2].transpose(1, 2), box_size=comparison.box_size)
    body = _counted_parts(comparison, comparison.magnification * spectra)
    square = body.square().view(len(body), -1, 2).sum(-1)
    overlap = terms.overlap.unsqueeze(1) + terms.of_data @ body.T
    power = terms.power.unsqueeze(1) + 2 * terms.of_others @ body.T + terms.of_square @ square.T
    return overlap.clamp_min(0).square() / (2 * power.clamp_min(1e-30))


def _two_best(scores: Tensor, grid: Tensor, rotations: Tensor) -> Sequence[Tensor]:
    """Of (n, k) scores on a grid of orientations on the image: what `_Best` holds."""
    best = scores.max(1)
    # The trace of G Gᵀ is 1 + 2 cos of the angle between them.
    near = grid[best.indices].flatten(1) @ grid.flatten(1).T > 1 + 2 * math.cos(_ANOTHER_TURN)
    second = scores.masked_fill_(near, -torch.inf).max(1)
    back = rotations.transpose(1, 2).to(grid)
    turns = back @ grid[best.indices], back @ grid[second.indices]
    return *turns, best.values, second.values
