"""A reference corrected for what its own motions cannot express: a change of shape all share.

Symbols: d → `field`, of the nodes in the frame of the reference, so that every chain of every
particle is

    X⁽ᶜ⁾ = R⁽ᶜ⁾ (X⁽ᶜ'⁰⁾ + d⁽ᶜ⁾ + Σ_k α_k U_k − com) + com + t⁽ᶜ⁾

Modes and turns are a particle's own; an error of the reference, such as a wrong loop, is common to
all particles, and hundreds of images together determine it:

    result = cc.refine(model, particles)
    model = cc.Model(correct_reference(result), particles)
    result = cc.refine(model, particles)
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from cryochains import Result
from cryochains.images import Batch, filter_images
from cryochains.inference import position_variance
from cryochains.model import Model, rotvec_to_matrix
from cryochains.molecule import Structure

# Å, how far a residue may be from where the reference has it (standard deviation).
DISPLACEMENT_STD = 3.0
# Å, by how much the displacements of residues within NEIGHBOUR_DISTANCE (Å) may differ.
DIFFERENCE_STD = 0.5
NEIGHBOUR_DISTANCE = 8.0
MAX_STEPS = 40
BATCH_SIZE = 64


def correct_reference(
    result: Result, *, n_particles: int = 4000, device: str | torch.device | None = None
) -> Structure:
    """The model's reference, with the shape that the refined particles have in common.

    Finds the most probable d while every particle's latents stay as they were refined; d is smooth,
    and has no part that a chain's modes, turn or shift could do. Build a model around the returned
    structure, and refine again.

    Parameters
    ----------
    result : Result
        Refined, with its particles.
    n_particles : int
        The first so many are used (2.5 s a thousand and step at 64 px, one core).
    device : torch device, optional
        By default a GPU where there is one.

    Raises
    ------
    ValueError
        When the result is not a refined one, or has no particles.
    """
    if result.particles is None or result.population is None or result.std is None:
        raise ValueError(
            f"expected the refinement of particles, with them, got {result!r}; try refine"
        )
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = result.model.to(device)
    # What is learned from junk would be wrong.
    shown = np.flatnonzero(result.shows_molecule)
    chosen = result[shown[:n_particles]]
    batches = chosen.particles.batches(BATCH_SIZE, device=device)
    views = [_view_of(model, chosen, batch) for batch in batches]
    field = _most_probable_field(model, views)
    moved = field.cpu().double().numpy()
    structure = model.structure
    return structure.with_coords(structure.atoms.getCoords() + moved[structure.atom_node])


@dataclass(frozen=True, eq=False)
class _View:
    """What does not change with the field, of b particles.

    Attributes
    ----------
    images : (b, box, box) tensor
    positions : (b, n_atoms, 2) tensor
        Å, of the atoms on the image, without the field.
    frames : list of (b, 2, 3) tensors
        From the reference's frame of each chain to the image.
    widths : (b, n_atoms) tensor
        Å, of the Gaussians: an atom is drawn as wide as it is uncertain.
    ctf : (b, box, box//2 + 1) tensor or None
    scale, noise_variance : (b,) tensors
        Brightness of each image, and the variance of its noise.
    """

    images: Tensor
    positions: Tensor
    frames: list[Tensor]
    widths: Tensor
    ctf: Tensor | None
    scale: Tensor
    noise_variance: Tensor


@torch.no_grad()
def _view_of(model: Model, result: Result, batch: Batch) -> _View:
    dynamics, microscope = model.dynamics, model.microscope
    latents = result.latents[batch.rows.cpu()].to(model.device)
    std = result.std[batch.rows.cpu()].to(model.device)
    variance = position_variance(dynamics, latents, batch.rotations, std.square().diag_embed())
    noise = torch.full((len(latents),), result.population.noise_std)
    if result.noise is not None:
        noise = result.noise[batch.rows.cpu()]
    frames = []
    for chain in range(len(dynamics.chains)):
        turn = rotvec_to_matrix(dynamics.rotvecs(latents, chain))
        frames.append(batch.rotations[:, :2] @ turn)
    return _View(
        images=batch.images,
        positions=microscope.image_positions(
            dynamics.decode(latents), batch.rotations, batch.shifts
        ),
        frames=frames,
        widths=(microscope.width**2 + variance).sqrt(),
        ctf=batch.ctf,
        scale=result.scale[batch.rows.cpu()].to(model.device),
        noise_variance=noise.to(model.device).square(),
    )


def _most_probable_field(model: Model, views: list[_View]) -> Tensor:
    """(n_nodes, 3) Å: d at the smallest sum of misfit and prior, by L-BFGS."""
    structure = model.structure
    directions = _directions_of_chains(model)
    near = cKDTree(structure.node_coords).query_pairs(NEIGHBOUR_DISTANCE, output_type="ndarray")
    pairs = torch.from_numpy(near).to(model.device)
    n_neighbours = max(2 * len(pairs) / structure.n_nodes, 1.0)
    free = torch.zeros(structure.n_nodes, 3, device=model.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

    def prior() -> Tensor:
        field = _without_directions(free, directions, structure)
        difference = field[pairs[:, 0]] - field[pairs[:, 1]]
        size = field.square().sum() / DISPLACEMENT_STD**2
        roughness = difference.square().sum() / (n_neighbours * DIFFERENCE_STD**2)
        return (size + roughness) / 2

    def misfit(view: _View) -> Tensor:
        field = _without_directions(free, directions, structure)
        residual = view.images - view.scale[:, None, None] * _expected_images(model, view, field)
        # The mean of an image is left out: particle extraction normalises it away.
        residual = residual - residual.mean(dim=(1, 2), keepdim=True)
        return (residual.square().sum((1, 2)) / (2 * view.noise_variance)).sum()

    def objective() -> float:
        optimizer.zero_grad()
        loss = prior()
        loss.backward()
        total = float(loss.detach())
        # A batch at a time, so that memory does not grow with the number of particles.
        for view in views:
            loss = misfit(view)
            loss.backward()
            total += float(loss.detach())
        return total

    optimizer.step(objective)
    return _without_directions(free, directions, structure).detach()


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


def _expected_images(model: Model, view: _View, field: Tensor) -> Tensor:
    """(b, box, box) images of the conformations in `view`, each with the `field` added."""
    of_atoms = field[model.structure.node_index]
    moved = []
    for layout, frame in zip(model.dynamics.chains, view.frames, strict=True):
        moved.append(of_atoms[layout.atoms] @ frame.transpose(1, 2))
    images = model.microscope.project(view.positions + torch.cat(moved, dim=1), view.widths)
    return images if view.ctf is None else filter_images(images, view.ctf)
