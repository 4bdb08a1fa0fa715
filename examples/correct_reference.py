"""A reference corrected for what its own motions cannot express: one change of shape that all particles share.

Symbols: d → `field`, of the nodes in the frame of the reference, so that every chain of every particle is

    X⁽ᶜ⁾ = R⁽ᶜ⁾ (X⁽ᶜ'⁰⁾ + d⁽ᶜ⁾ + Σ_k α_k U_k − com) + com + t⁽ᶜ⁾

Modes and turns are a particle's own; a wrong loop is everybody's, and hundreds of images say where it is:

    found = cc.refine(model, particles)
    model = cc.CryoChains.for_particles(correct_reference(model, particles, found), particles)
    found = cc.refine(model, particles)
"""

from dataclasses import replace

import numpy as np
import roma
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from cryochains import CryoChains, ParticleStack, Refinement, Structure
from cryochains.imaging import filter_images, project
from cryochains.likelihood import place_variance

# Å: how far a residue may be from where the reference has it, and how far from it those within NEAR may differ.
FAR, APART, NEAR = 3.0, 0.5, 8.0
STEPS = 40


def correct_reference(
    model: CryoChains, particles: ParticleStack, refinement: Refinement, *, n_particles: int = 4000
) -> Structure:
    """The model's reference, with the shape that the refined particles have in common.

    Finds the most probable d while every particle's latents stay as they were refined; d is smooth, and has no part
    that a chain's modes, turn or shift could do. Build a model around the answer, and refine again.

    Parameters
    ----------
    particles : ParticleStack
        Those of the `refinement`; the first `n_particles` are used (2.5 s a thousand and step at 64 px, one core).

    Raises
    ------
    ValueError
        When the particles do not fit the model or are not those of the refinement.
    """
    model.check_particles(particles)
    if refinement.ids.tolist() != particles.ids.tolist() or refinement.latents.shape[1] != model.dynamics.n_latents:
        raise ValueError(f"expected the refinement of {particles!r} by this model, got {refinement!r}; try refine")
    structure, dynamics, imaging, population = model.structure, model.dynamics, model.imaging, refinement.population
    chains, device = range(structure.n_chains), model.device
    nodes = replace(structure, rows=structure.node_rows, weights=np.ones(structure.n_nodes))
    steps = dynamics.with_structure(nodes).to(device)
    still = torch.zeros(1, dynamics.n_latents, device=device)
    known = [torch.linalg.qr(steps.tangents(still, c)[0].flatten(1).T)[0] for c in chains]
    pairs = torch.from_numpy(cKDTree(structure.node_coords).query_pairs(NEAR, output_type="ndarray")).to(device)
    neighbours = max(2 * len(pairs) / structure.n_nodes, 1.0)
    free = torch.zeros(structure.n_nodes, 3, device=device, requires_grad=True)

    def field() -> Tensor:
        parts = zip(free.split(np.bincount(structure.node_chain).tolist()), known, strict=True)
        return torch.cat([part - (q @ (q.T @ part.flatten())).view(-1, 3) for part, q in parts])

    @torch.no_grad()
    def look(batch) -> tuple:
        """What of these particles does not change with the field."""
        z, rotations = refinement.latents[batch.rows].to(device), batch.pose[0]
        xy = imaging.place(dynamics.decode(z), *batch.pose[:2])
        frames = [rotations[:, :2] @ roma.rotvec_to_rotmat(dynamics.rotvecs(z, c)) for c in chains]
        unknown = place_variance(dynamics, z, rotations, refinement.std[batch.rows].to(device).square().diag_embed())
        return batch.images, xy, frames, (imaging.sigma**2 + unknown).sqrt(), batch.pose[2]

    seen = [look(batch) for batch in particles[:n_particles].batches(64, device=device)]

    def squares(images: Tensor, xy: Tensor, frames: list, width: Tensor, ctf: Tensor | None) -> Tensor:
        moved = field()[structure.node_index]
        moved = [moved[dynamics.chains[c].atoms] @ frames[c].transpose(1, 2) for c in chains]
        expected = project(xy + torch.cat(moved, 1), imaging.weights, imaging.box_size, imaging.pixel_size, width)
        expected = expected if ctf is None else filter_images(expected, ctf)
        off = images - population.contrast * expected
        return (off - off.mean(dim=(1, 2), keepdim=True)).square().sum() / (2 * population.noise_std**2)

    def objective() -> float:
        optimizer.zero_grad()
        apart = field()[pairs[:, 0]] - field()[pairs[:, 1]]
        prior = (field().square().sum() / FAR**2 + apart.square().sum() / (neighbours * APART**2)) / 2
        prior.backward()
        total = float(prior.detach())
        for of_batch in seen:
            misfit = squares(*of_batch)
            misfit.backward()
            total += float(misfit.detach())
        return total

    optimizer = torch.optim.LBFGS([free], max_iter=STEPS, line_search_fn="strong_wolfe")
    optimizer.step(objective)
    moved = field().detach().cpu().double().numpy()
    return structure.with_coords(structure.atoms.getCoords() + moved[structure.atom_node])
