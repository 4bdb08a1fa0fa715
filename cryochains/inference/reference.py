"""What is wrong with the reference: density that it lacks or has too much of, and its shape.

Symbols: y → image, a → brightness, w → weights of beads, q → occupancy of a residue, d → `field`.

Two things are learned of all particles together, while their latents stay as they were refined, by
the least

    Σ_i r_i ‖y_i − a_i f(z_i; w, d)‖² / 2σ_i² + prior

with the noise spectrum divided out. First the density (`learn_beads`): every residue's beads times
an occupancy q ~ N(1, 0.3²), and extra beads w ≥ 0 on a grid around the chains where the residual
images say so, each riding with its nearest residue. Then a change of shape that all particles share
and no chain's modes, turn or shift could do (`correct_reference`): d of the nodes, in the frame of
the reference, so that every chain is

    X⁽ᶜ⁾ = R⁽ᶜ⁾ (X⁽ᶜ'⁰⁾ + d⁽ᶜ⁾ + Σ_k α_k U_k − com) + com + t⁽ᶜ⁾
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial import cKDTree
from torch import Tensor
from tqdm.auto import tqdm

from .._arguments import Count, checked
from .._devices import choose_device
from ..images import Batch, ParticleStack
from ..model import Microscope, Model, Population, beads_of, rotvec_to_matrix
from ..molecule import Beads, Structure
from .likelihood import crop_spectrum, frequency_band, position_variance, real_parts
from .result import POSES, Result

# Particles that the density is learned from, and the images' blur in Å: it has no finer detail.
_DENSITY_PARTICLES = 300
_DENSITY_BLUR = 3.0
# Å: spacing of the grid of extra beads, how far they are from the nodes, and how wide they are.
_GRID_SPACING = 5.0
_GRID_DISTANCES = (3.0, 14.0)
_EXTRA_WIDTH = 3.0
# An extra bead is tried where the residual images speak for it by so many standard deviations.
_MIN_SIGNIFICANCE = 4.0
# In residues: by so much the density at one point must differ from the reference's, and that
# clearly, or it is left as it is; and by so much more than anywhere in the other direction. Chosen
# on missing residues, residues that are not there and a micelle, and on motions and shapes that the
# model cannot have, which look like less, or like both.
_ASKING = 3.0
_LACKING_RATIO = 2.0
_TOO_MUCH_RATIO = 1.5
_ASKING_SIGNIFICANCE = 6.0
# Standard deviation of a residue's occupancy, and the most that it can be.
_OCCUPANCY_STD = 0.3
_MAX_OCCUPANCY = 2.0
# Residues, the mean weight of an extra bead before any image was seen; and the least that is kept.
_EXTRA_MEAN = 0.5
_LEAST_EXTRA = 0.05
_DENSITY_STEPS = 30
# Å, how far a residue may be from where the reference has it (standard deviation).
_DISPLACEMENT_STD = 3.0
# Å, by how much the displacements of residues within _RESIDUE_NEIGHBOURS (Å) may differ.
_DIFFERENCE_STD = 0.5
_RESIDUE_NEIGHBOURS = 8.0
_SHAPE_STEPS = 40
# Particles whose images are drawn at a time: at most so many, and so that memory stays below this.
_VIEW_SIZE = 64
_VIEW_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class _View:
    """b particles as they are compared with the model, in units of their noise.

    Attributes
    ----------
    data : (b, m) tensor
        Real parts of the image's spectrum.
    transfer : (b, box, box//2 + 1) tensor
        From a projection's spectrum to that of the image.
    latents : (b, p) tensor
    rotations, shifts : (b, 3, 3) and (b, 2) tensors
    variance : (b, n_beads) tensor
        Å², how uncertain each bead's position on the image is.
    blur : float
        Å.
    """

    data: Tensor
    transfer: Tensor
    latents: Tensor
    rotations: Tensor
    shifts: Tensor
    variance: Tensor
    blur: float

    def misfit(self, expected: Tensor) -> Tensor:
        """½ ‖data − expected‖² of a (b, box, box//2 + 1) spectrum."""
        return (self.data - real_parts(expected)).square().sum() / 2


def _require_refined(result: Result) -> tuple[ParticleStack, Population, Tensor]:
    """Particles, population and error bars of a result, or ValueError where one is absent."""
    particles, population, std = result.particles, result.population, result.std
    if particles is None or population is None or std is None:
        raise ValueError(
            f"expected the refinement of particles, with them, got {result!r}; try refine"
        )
    return particles, population, std


def _views_of(result: Result, model: Model, latents: Tensor, blur: float) -> list[_View]:
    """The particles of a result, in its frame of the poses, at other latents of theirs."""
    particles, _, _ = _require_refined(result)
    box = frequency_band(model.microscope, blur).box_size
    # Of two Gaussians a bead, and of as many extra beads as the molecule's own and more.
    bytes_each = 8 * 3 * len(model.beads) * box
    size = int(np.clip(_VIEW_BYTES // bytes_each, 1, _VIEW_SIZE))
    batches = particles.batches(size, device=model.device)
    return [_view_of(result, model, latents, batch, blur) for batch in batches]


@torch.no_grad()
def _view_of(result: Result, model: Model, latents: Tensor, batch: Batch, blur: float) -> _View:
    _, population, std = _require_refined(result)
    rows, device = batch.rows.cpu(), model.device
    band = frequency_band(model.microscope, blur)
    box = band.box_size
    noise = torch.full((len(rows),), population.noise_std)
    if result.noise is not None:
        noise = torch.where(result.noise[rows].isfinite(), result.noise[rows], noise)
    counts = torch.ones(len(rows))
    if result.responsibility is not None:
        counts = result.responsibility[rows]
    weights = band.weights
    if population.noise_spectrum is not None:
        spectrum = population.noise_spectrum.to(device)
        weights = weights * spectrum.rsqrt()[band.ring].to(weights)
    weights = weights * (counts.sqrt() / noise).to(device)[:, None, None]
    observed = crop_spectrum(torch.fft.rfft2(batch.images, norm="ortho"), box)
    transfer = (model.box_size / box) * weights
    transfer = transfer * result.scale[rows].to(device)[:, None, None]
    if batch.ctf is not None:
        transfer = transfer * crop_spectrum(batch.ctf, box)
    z = latents[rows].to(device)
    covariance = std[rows].to(device).square().diag_embed()
    variance = position_variance(model.bead_dynamics, z, batch.rotations, covariance)
    data = real_parts(observed * (weights * band.low_pass))
    return _View(data, transfer, z, batch.rotations, batch.shifts, variance, blur)


# Density


def learn_beads(
    result: Result,
    latents: Tensor | None = None,
    *,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Beads | None:
    """Beads as the refined images say: occupancies of residues, and density the reference lacks.

    None where the images do not ask for any: the model's own are then better than what could be
    learned.

    Parameters
    ----------
    result : Result
        Refined, with its particles, in the frame of the poses.
    latents : (N, p) tensor, optional
        Where to look at the particles, instead of where they were refined to; see `unbent`.
    device : torch device, optional
        By default a GPU where there is one.
    progress : bool
        Show a progress bar where there is something to learn.
    """
    shown = np.flatnonzero(result.shows_molecule)
    if not len(shown):
        return None
    rows = shown[:: -(-len(shown) // _DENSITY_PARTICLES)]
    model = result.model.to(choose_device(device))
    latents = result.latents if latents is None else latents.cpu()
    extra = _extra_beads(model.structure)
    views = _views_of(result[rows], model, latents[rows], _DENSITY_BLUR)
    lacking = _lacking_density(model, views, extra)
    for_more, for_less = _asks(model, views, lacking)
    if not for_more and not for_less:
        return None
    if not torch.equal(latents, result.latents):
        # A bending that all particles do share looks like it too, but is gone at their own latents.
        own = _views_of(result[rows], model, result.latents[rows], _DENSITY_BLUR)
        too_little, too_much = _departures(model, own, _lacking_density(model, own, extra))
        if (too_little if for_more else too_much) <= _ASKING:
            return None
    _, significance = lacking
    tried = np.flatnonzero(significance >= min(_MIN_SIGNIFICANCE, significance.max()))
    return _most_probable_beads(model, views, _rows_of(extra, tried), progress)


def _asks(
    model: Model, views: list[_View], lacking: tuple[np.ndarray, np.ndarray]
) -> tuple[bool, bool]:
    """Whether the images clearly show density that the model's beads lack, or have too much."""
    too_little, too_much = _departures(model, views, lacking)
    for_more = too_little > max(_ASKING, _LACKING_RATIO * too_much)
    return for_more, too_much > max(_ASKING, _TOO_MUCH_RATIO * too_little)


def _departures(
    model: Model, views: list[_View], lacking: tuple[np.ndarray, np.ndarray]
) -> tuple[float, float]:
    """In residues, the most density at one point that the model's beads lack, and have too much.

    `lacking` is what the extra beads say (see `_lacking_density`). Atoms that are elsewhere than
    the model can move them to look like both, about as much.
    """
    looks = lacking, _lacking_density(model, views, _node_beads(model.structure))
    weight, significance = (np.concatenate(parts) for parts in zip(*looks, strict=True))
    clear = abs(significance) > _ASKING_SIGNIFICANCE
    return weight[clear].max(initial=0.0), -weight[clear].min(initial=0.0)


def unbent(result: Result) -> Tensor:
    """(N, p) latents without the bending that all particles share.

    Where density is missing, chains bend into the gap, and hide what is missing.
    """
    bends = torch.from_numpy(result.model.dynamics.latent_kind == "mode")
    return result.latents - bends * result.latents[result.shows_molecule].mean(0)


def _rows_of(beads: Beads, rows: np.ndarray) -> Beads:
    return Beads(beads.coords[rows], beads.node[rows], beads.weights[rows], beads.widths[rows])


def _extended(first: Beads, second: Beads) -> Beads:
    """The first and then the second ones, whatever their chains."""
    pairs = zip(_columns(first), _columns(second), strict=True)
    return Beads(*(np.concatenate(pair) for pair in pairs))


def _joined(first: Beads, second: Beads, structure: Structure) -> Beads:
    """Both, chain by chain."""
    both = _extended(first, second)
    return _rows_of(both, np.argsort(structure.node_chain[both.node], kind="stable"))


def _columns(beads: Beads) -> tuple[np.ndarray, ...]:
    return beads.coords, beads.node, beads.weights, beads.widths


def _extra_beads(structure: Structure) -> Beads:
    """Of weight 1 on a grid around the chains, each riding with its nearest residue."""
    nearest, farthest = _GRID_DISTANCES
    nodes = structure.node_coords
    low, high = nodes.min(0) - farthest, nodes.max(0) + farthest
    axes = [np.arange(a, b, _GRID_SPACING) for a, b in zip(low, high, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 3)
    distance, node = cKDTree(nodes).query(points)
    kept = np.flatnonzero((distance > nearest) & (distance < farthest))
    kept = kept[np.argsort(node[kept], kind="stable")]
    ones = np.ones(len(kept))
    return Beads(points[kept], node[kept], ones, _EXTRA_WIDTH * ones)


def _node_beads(structure: Structure) -> Beads:
    """Of weight 1 at every node."""
    ones = np.ones(structure.n_nodes)
    return Beads(structure.node_coords, np.arange(len(ones)), ones, _EXTRA_WIDTH * ones)


@dataclass(frozen=True, eq=False)
class _Drawing:
    """The model's beads and extra ones, as particles show them; made by `_draw`.

    Attributes
    ----------
    microscope : Microscope
        Of all of them, the model's first.
    positions, variances : lists of (b, n, 2) and (b, n) tensors
        On the image, Å and Å², one a view.
    """

    microscope: Microscope
    positions: list[Tensor]
    variances: list[Tensor]

    def misfit(self, views: list[_View], weights: Tensor) -> tuple[float, Tensor]:
        """Of all particles at (n,) weights of the beads, with its (n,) derivative."""
        total = 0.0
        slope = torch.zeros(len(weights), dtype=torch.float64, device=weights.device)
        for view, positions, variance in zip(views, self.positions, self.variances, strict=True):
            free = weights.detach().requires_grad_()
            expected = self.microscope.spectrum(
                positions,
                view.transfer,
                blur=view.blur,
                variance=variance,
                box_size=view.transfer.shape[-2],
                weights=free,
            )
            loss = view.misfit(expected)
            (derivative,) = torch.autograd.grad(loss, free)
            total += float(loss.detach())
            slope += derivative
        return total, slope


@torch.no_grad()
def _draw(model: Model, views: list[_View], extra: Beads) -> _Drawing:
    both = _extended(model.beads, extra)
    microscope = replace(model.microscope, weights=both.weights, sigma=both.widths)
    order = np.argsort(model.structure.node_chain[both.node], kind="stable")
    dynamics = model.dynamics.with_beads(_rows_of(both, order))
    back = np.argsort(order)
    positions, variances = [], []
    for view in views:
        coords = dynamics.decode(view.latents)[:, back]
        positions.append(microscope.image_positions(coords, view.rotations, view.shifts))
        none = view.variance.new_zeros(len(view.variance), len(extra))
        variances.append(torch.cat([view.variance, none], dim=1))
    return _Drawing(microscope, positions, variances)


def _lacking_density(
    model: Model, views: list[_View], extra: Beads
) -> tuple[np.ndarray, np.ndarray]:
    """(n,) weight of each of the extra beads if it were the only one, and in standard deviations.

    From the residual images, projected back onto the beads.
    """
    drawing = _draw(model, views, extra)
    weights = drawing.microscope.weight_tensor.clone()
    weights[len(model.beads) :] = 0
    _, slope = drawing.misfit(views, weights)
    score = -slope[len(model.beads) :].cpu().numpy()
    information = sum(_information_of_a_bead(model, view) for view in views)
    return score / information, score / information**0.5


@torch.no_grad()
def _information_of_a_bead(model: Model, view: _View) -> float:
    """Of the weight of an extra bead, anywhere on the image; summed over the particles."""
    one = replace(model.microscope, weights=np.ones(1), sigma=np.full(1, _EXTRA_WIDTH))
    box = view.transfer.shape[-2]
    at_center = torch.zeros(len(view.transfer), 1, 2, device=model.device)
    spectrum = one.spectrum(at_center, view.transfer, blur=view.blur, box_size=box)
    return float(real_parts(spectrum).double().square().sum())


def _most_probable_beads(model: Model, views: list[_View], extra: Beads, progress: bool) -> Beads:
    """Occupancies of residues and weights of extra beads at the least misfit and prior."""
    own = model.beads
    n_nodes = model.structure.n_nodes
    node = torch.from_numpy(own.node).to(model.device)
    drawing = _draw(model, views, extra)
    theory = drawing.microscope.weight_tensor[: len(own)]

    def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
        occupancy, more = torch.from_numpy(values).to(theory).split([n_nodes, len(extra)])
        misfit, slope = drawing.misfit(views, torch.cat([theory * occupancy[node], more]))
        by_bead = slope[: len(own)] * theory
        by_occupancy = slope.new_zeros(n_nodes).index_add_(0, node, by_bead)
        off = values[:n_nodes] - 1
        prior = (off**2).sum() / (2 * _OCCUPANCY_STD**2) + values[n_nodes:].sum() / _EXTRA_MEAN
        gradient = torch.cat([by_occupancy, slope[len(own) :]]).cpu().numpy()
        gradient[:n_nodes] += off / _OCCUPANCY_STD**2
        gradient[n_nodes:] += 1 / _EXTRA_MEAN
        return misfit + float(prior), gradient

    start = np.concatenate([np.ones(n_nodes), np.zeros(len(extra))])
    bounds = [(0.0, _MAX_OCCUPANCY)] * n_nodes + [(0.0, None)] * len(extra)
    with tqdm(
        total=_DENSITY_STEPS, desc="learning density", unit="step", disable=not progress
    ) as bar:
        answer = minimize(
            objective,
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": _DENSITY_STEPS},
            callback=lambda _: bar.update(),
        )
    occupancy, more = np.split(answer.x, [n_nodes])
    kept = np.flatnonzero(more > _LEAST_EXTRA)
    seen = replace(own, weights=own.weights * occupancy[own.node])
    if not len(kept):
        return seen
    more_beads = _rows_of(replace(extra, weights=more), kept)
    return _joined(seen, more_beads, model.structure)


# Shape


@checked
def correct_reference(
    result: Result, *, n_particles: Count = 4000, device: str | torch.device | None = None
) -> Structure:
    """The model's reference, with the shape that the refined particles have in common.

    Finds the most probable change of shape while every particle's latents stay as they are; it is
    smooth, and has no part that a chain's modes, turn or shift could do. Images are drawn with the
    model's own beads, and with those that the refinement learned only where a change of shape does
    not explain what they stand for. Build a model around the returned structure, and refine again.

    Parameters
    ----------
    result : Result
        Refined, with its particles.
    n_particles : int
        At most so many, of those that show the molecule, are used (4 s a thousand and step at
        64 px, one core).
    device : torch device, optional
        By default a GPU where there is one.

    Raises
    ------
    ValueError
        When the result is not a refined one, has no particles, or none that shows the molecule.

    Examples
    --------
    >>> from cryochains import load_structure, refine, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    >>> correct_reference(result)
    Structure('glua3-closed', chains A B, 739 residues, 5,995 atoms)
    """
    _, population, _ = _require_refined(result)
    # What is learned from junk would be wrong.
    shown = np.flatnonzero(result.shows_molecule)
    if not len(shown):
        raise ValueError(
            "expected particles that show the molecule, got none; see result.verdict, and try "
            "other poses or the right structure"
        )
    chosen = result[shown[:: -(-len(shown) // n_particles)]].in_frame(POSES)
    own = chosen.model.to(choose_device(device))
    structure = own.structure

    def corrected(model: Model) -> Structure:
        views = _views_of(chosen, model, chosen.latents, blur=0.0)
        field = _most_probable_field(model, views).cpu().double().numpy()
        return structure.with_coords(structure.atoms.getCoords() + field[structure.atom_node])

    shape = corrected(own)
    if population.beads is None:
        return shape
    # Residues elsewhere than thought look like density that is lacking; only what a change of shape
    # does not explain is.
    moved = own.with_beads(beads_of(shape, own.sigma))
    views = _views_of(chosen, moved, chosen.latents, _DENSITY_BLUR)
    lacking = _lacking_density(moved, views, _extra_beads(structure))
    if not any(_asks(moved, views, lacking)):
        return shape
    return corrected(own.with_beads(population.beads))


def _most_probable_field(model: Model, views: list[_View]) -> Tensor:
    """(n_nodes, 3) Å: d at the smallest sum of misfit and prior, by L-BFGS."""
    structure = model.structure
    directions = _directions_of_chains(model)
    near = cKDTree(structure.node_coords).query_pairs(_RESIDUE_NEIGHBOURS, output_type="ndarray")
    pairs = torch.from_numpy(near).to(model.device)
    n_neighbours = max(2 * len(pairs) / structure.n_nodes, 1.0)
    positions, frames = _undisplaced(model, views)
    free = torch.zeros(structure.n_nodes, 3, device=model.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=_SHAPE_STEPS, line_search_fn="strong_wolfe")

    def prior(field: Tensor) -> Tensor:
        difference = field[pairs[:, 0]] - field[pairs[:, 1]]
        size = field.square().sum() / _DISPLACEMENT_STD**2
        roughness = difference.square().sum() / (n_neighbours * _DIFFERENCE_STD**2)
        return (size + roughness) / 2

    def objective() -> float:
        optimizer.zero_grad()
        loss = prior(_without_directions(free, directions, structure))
        loss.backward()
        total = float(loss.detach())
        # A batch at a time, so that memory does not grow with the number of particles.
        for view, at, frame in zip(views, positions, frames, strict=True):
            field = _without_directions(free, directions, structure)
            loss = view.misfit(_displaced(model, view, at, frame, field))
            loss.backward()
            total += float(loss.detach())
        return total

    optimizer.step(objective)
    return _without_directions(free, directions, structure).detach()


@torch.no_grad()
def _undisplaced(model: Model, views: list[_View]) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Of each view (b, n_beads, 2) positions on the image, and of each chain a (b, 2, 3) frame.

    It takes the reference's frame of the chain to the image.
    """
    dynamics = model.bead_dynamics
    positions, frames = [], []
    for view in views:
        coords = dynamics.decode(view.latents)
        at = model.microscope.image_positions(coords, view.rotations, view.shifts)
        positions.append(at)
        axes = view.rotations[:, :2]
        turns = [
            rotvec_to_matrix(dynamics.rotvecs(view.latents, chain))
            for chain in range(len(dynamics.chains))
        ]
        frames.append([axes @ turn for turn in turns])
    return positions, frames


def _displaced(
    model: Model, view: _View, positions: Tensor, frames: list[Tensor], field: Tensor
) -> Tensor:
    """(b, box, box//2 + 1) spectrum of a view whose conformations each have the `field` added."""
    of_beads = field[torch.from_numpy(model.beads.node).to(field.device)]
    moved = []
    for layout, frame in zip(model.bead_dynamics.chains, frames, strict=True):
        moved.append(of_beads[layout.atoms] @ frame.transpose(1, 2))
    return model.microscope.spectrum(
        positions + torch.cat(moved, dim=1),
        view.transfer,
        blur=view.blur,
        variance=view.variance,
        box_size=view.transfer.shape[-2],
    )


def _directions_of_chains(model: Model) -> list[Tensor]:
    """(3 n_c, k) orthonormal directions in which each chain's own latents move its nodes."""
    structure = model.structure
    nodes = replace(structure, rows=structure.node_rows, weights=np.ones(structure.n_nodes))
    dynamics = model.dynamics.with_structure(nodes)
    reference = torch.zeros(1, dynamics.n_latents, device=model.device)
    directions = []
    for chain in range(structure.n_chains):
        tangents = dynamics.tangents(reference, chain)[0].flatten(1)
        directions.append(torch.linalg.qr(tangents.T)[0])
    return directions


def _without_directions(free: Tensor, directions: list[Tensor], structure: Structure) -> Tensor:
    """(n_nodes, 3) `free` without its part along the `directions` of each chain."""
    sizes = np.bincount(structure.node_chain).tolist()
    parts = []
    for part, known in zip(free.split(sizes), directions, strict=True):
        along = known @ (known.T @ part.flatten())
        parts.append(part - along.view(-1, 3))
    return torch.cat(parts)
