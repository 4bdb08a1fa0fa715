"""Figures from plain data. Each `plot_` function returns a matplotlib Figure and changes no global state."""

from functools import partial
from io import BytesIO
from textwrap import wrap

import numpy as np
import torch
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .dynamics import Dynamics
from .latent import PrincipalMotions
from .model import CryoChains
from .modes import Modes, find_chain
from .particles import ParticleStack
from .structure import Structure

# Okabe and Ito's colours, told apart by everyone.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks draw pyplot's figures only, which are global state: these bring their own picture.
    figure._repr_png_ = partial(_png, figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Figure) -> bytes:
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


@torch.no_grad()
def plot_particles(model: CryoChains, particles: ParticleStack, latents: torch.Tensor, n: int = 6) -> Figure:
    """First `n` particles: image, the model's reconstruction at `latents` (N, p), and what is left."""
    chosen = particles[: min(n, len(particles))]
    batch = next(chosen.batches(len(chosen), device=model.device))
    model_images = model.render(latents[: len(chosen)].to(model.device), *batch.pose)
    rows = {"image": batch.images, "reconstruction": model_images, "residual": batch.images - model_images}
    # One particle lies down.
    alone = len(chosen) == 1
    figure, axes = new_figure(1, 3, 7.5, 2.9) if alone else new_figure(3, len(chosen), 1.6 * len(chosen), 5.2)
    for row, (name, images) in zip(axes.T if alone else axes, rows.items(), strict=True):
        limit = float(images.abs().quantile(0.999)) if name != "reconstruction" else float(images.abs().max())
        for axis, image in zip(row, images.cpu().numpy(), strict=True):
            # Pixel row 0 is at negative y, as in the file.
            axis.imshow(image, cmap="gray", vmin=-limit, vmax=limit, origin="lower")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name)
    width = particles.box_size * particles.pixel_size
    figure.suptitle(f"{len(chosen)} of {len(particles):,} particles, {width:.0f} Å wide; a grey scale a row")
    return figure


def plot_training(history) -> Figure:
    """Loss, and where the truth is known RMSD, of the epochs that `fit` returned."""
    epochs = [epoch.epoch for epoch in history]
    scored = history[0].rmsd is not None
    figure, axes = new_figure(1, 1 + scored, 4 * (1 + scored), 3)
    axes[0, 0].plot(epochs, [e.train_loss for e in history], color=COLORS[0], label="training", marker=".")
    axes[0, 0].plot(epochs, [e.held_out_loss for e in history], color=COLORS[1], label="held out", marker=".")
    axes[0, 0].set(xlabel="epoch", ylabel="mean squared error")
    axes[0, 0].legend()
    if scored:
        axes[0, 1].plot(epochs, [e.rmsd for e in history], color=COLORS[1], marker=".")
        axes[0, 1].set(xlabel="epoch", ylabel="held-out RMSD (Å)")
    return figure


def plot_refinement(history) -> Figure:
    """How far particles moved, the noise and the population's spread at each pass of `refine`."""
    panels = {"step": "RMS step (Å)", "noise_std": "noise (grey levels)", "spread": "population spread (Å)"}
    figure, axes = new_figure(1, 3, 10, 3)
    passes = np.arange(1, len(history) + 1)
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        axis.plot(passes, [record[key] for record in history], color=COLORS[0], marker="o")
        axis.set(xlabel="pass (blur in Å)", ylabel=label)
        axis.set_ylim(0, 1.1 * max(record[key] for record in history))
        axis.set_xticks(passes, [f"{k}\n{record['blur']:g}" for k, record in zip(passes, history, strict=True)])
    return figure


def plot_latent_space(
    motions: PrincipalMotions, scores: np.ndarray | None = None, truth: np.ndarray | None = None, title: str = ""
) -> Figure:
    """Particles, or their density where they are many, on two components, and against a true coordinate where known.

    `scores` (N, k) default to those the components were found from; `truth` (N,) is a true coordinate. `title` should
    carry the number that says whether the picture means something.
    """
    scores = motions.scores if scores is None else scores
    figure, axes = new_figure(1, 1 if truth is None else 2, 4.6 if truth is None else 9, 4)
    names = _component_names(motions)
    _draw_points(figure, axes[0, 0], scores, (0, 1), names, motions.label)
    if truth is not None:
        axes[0, 1].plot(truth, scores[:, 0], ".", color=COLORS[0], alpha=0.4, markersize=4)
        axes[0, 1].set(xlabel="true coordinate", ylabel=names[0])
    figure.suptitle(title)
    return figure


def plot_rmsd(per_particle: dict[str, np.ndarray], mean: np.ndarray, limit: np.ndarray | None = None) -> Figure:
    """Distributions of RMSD (Å) of named methods, with the mean conformation's and the information limit as lines."""
    figure, axes = new_figure(1, 1, 6, 3.6)
    axis = axes[0, 0]
    top = max(float(np.quantile(values, 0.995)) for values in (*per_particle.values(), mean))
    bins = np.linspace(0, 1.05 * top, 50)
    for color, (name, values) in zip(COLORS, per_particle.items(), strict=False):
        axis.hist(values, bins, histtype="stepfilled", alpha=0.55, color=color, label=f"{name}: {_pooled(values)}")
    axis.axvline(_pooled_value(mean), color="0.3", ls="--", label=f"mean conformation: {_pooled(mean)}")
    if limit is not None:
        axis.axvline(_pooled_value(limit), color="k", label=f"information limit: {_pooled(limit)}")
    axis.set(xlabel="RMSD to the true conformation (Å, no re-superposition)", ylabel="particles")
    axis.legend(fontsize="small")
    return figure


def plot_conformations(
    motions: PrincipalMotions, component: int = 0, n: int = 5, percentiles: tuple[float, float] = (5, 95)
) -> Figure:
    """Backbone at `n` places along a component, pale to dark, one colour a chain, from two sides.

    The horizontal axis is the direction in which most moves; a widget that turns is ``cryochains.explore``.
    """
    structure, path = motions.dynamics.structure, motions.traverse(component, n, percentiles)
    coords = decode_nodes(motions, path)
    figure, axes = new_figure(1, 2, 9, 4.6)
    view = (coords - coords.mean((0, 1))) @ facing(coords[-1] - coords[0]).T
    draw_backbones(axes[0], structure, view)
    figure.suptitle(name_ends(motions, path, component, "(dark)"))
    return figure


def plot_explorer(motions: PrincipalMotions, component: int = 0, title: str = "") -> Figure:
    """What ``cryochains.explore`` shows: particles on `component` and another, and the backbones along it.

    `title` should say what the component means, such as `motion_sentence` does.

    Raises
    ------
    ValueError
        For a component that does not exist.
    """
    structure, path = motions.dynamics.structure, motions.traverse(component, 5)
    figure, axes = new_figure(1, 2, 10, 4.6)
    other = (component, 1 if component == 0 else 0)
    _draw_points(figure, axes[0, 0], motions.scores, other, _component_names(motions), motions.label)
    coords = decode_nodes(motions, path)
    view = (coords - coords.mean((0, 1))) @ facing(coords[-1] - coords[0]).T
    draw_backbones(axes[0, 1:], structure, view)
    axes[0, 1].set_title(name_ends(motions, path, component, "(dark)"), fontsize="medium")
    figure.suptitle("\n".join(wrap(title, 110)), fontsize="medium")
    return figure


def plot_structure(structure: Structure) -> Figure:
    """Backbone of every chain from two sides, the longest direction of the molecule across."""
    coords = structure.node_coords - structure.node_coords.mean(0)
    figure, axes = new_figure(1, 2, 9, 4.6)
    draw_backbones(axes[0], structure, (coords @ facing(coords).T)[None])
    figure.suptitle(f"{structure.name}: {structure.n_nodes:,} residues, from two sides")
    return figure


def plot_modes(structure: Structure, modes: Modes, chain: str | None = None, mode: int = 0) -> Figure:
    """One mode of a chain (by default the first chain's softest): arrows on its backbone, and how far residues move.

    Raises
    ------
    ValueError
        For modes of another structure, an unknown chain, or a mode that does not exist.
    """
    number = find_chain(structure, modes, chain, mode)
    own, values = structure.node_chain == number, modes.eigenvalues[number]
    moves = modes.vectors[number][mode] * np.sqrt(own.sum())  # 1 Å RMS
    moved = np.linalg.norm(moves, axis=1)
    times, turn = structure.radii[number] / moved.max(), facing(moves)  # the longest arrow spans the chain's radius
    arrows = times * moves @ turn.T
    view = np.where(own[:, None], structure.node_coords - structure.centers[number], np.nan) @ turn.T
    figure, axes = new_figure(1, 2, 10, 4.6)
    reach = 1.05 * np.abs(np.concatenate([view[own], view[own] + arrows])).max()
    draw_backbones(axes[0, :1], structure, view[None], reach)
    few = slice(None, None, 1 + len(arrows) // 150)
    starts, steps = view[own][few, :2].T, arrows[few, :2].T
    axes[0, 0].quiver(*starts, *steps, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.25", zorder=3)
    axes[0, 0].set_title(f"arrows: {times:.0f} × a motion of 1 Å RMS", fontsize="medium")
    resnums = structure.atoms.getResnums()[structure.node_rows[own]]
    axes[0, 1].plot(resnums, moved, color=COLORS[number % len(COLORS)], lw=1)
    name = structure.chain_ids[number]
    axes[0, 1].set(
        xlabel=f"residue of chain {name}", ylabel="displacement (Å) at 1 Å RMS", ylim=(0, 1.05 * moved.max())
    )
    stiffness = f"eigenvalue {values[mode]:.3g}, {np.sqrt(values[mode] / values[0]):.2f} × the softest mode's frequency"
    figure.suptitle(f"Mode {mode + 1} of chain {name}: {stiffness}")
    return figure


def plot_residue_motion(dynamics: Dynamics, latents: torch.Tensor, title: str = "") -> Figure:
    """How far each residue moves, from the first of the conformations at (m, p) `latents` to each; a panel a chain."""
    structure = dynamics.structure
    coords = dynamics.decode(latents).detach().cpu().numpy()
    moved = np.linalg.norm(coords - coords[0], axis=-1)
    figure, axes = new_figure(1, structure.n_chains, 4.5 * structure.n_chains, 3.2)
    for chain, axis in enumerate(axes[0]):
        of_chain = structure.chain_index == chain
        for share, values in zip(np.linspace(0.15, 1, len(moved)), moved, strict=True):
            color = COLORS[chain % len(COLORS)]
            axis.plot(structure.resnums[of_chain], values[of_chain], color=color, alpha=share, lw=1)
        axis.set(xlabel=f"residue of chain {structure.chain_ids[chain]}", ylim=(0, 1.05 * moved.max() + 1e-9))
    axes[0, 0].set_ylabel("displacement (Å)")
    figure.suptitle(title)
    return figure


def _draw_points(figure: Figure, axis, scores: np.ndarray, of: tuple[int, int], names: list[str], title: str) -> None:
    """Particles on two components, as points or, where they are many, their density; a histogram where there is one."""
    axis.set(xlabel=names[of[0]], title=title)
    if scores.shape[1] == 1:
        axis.hist(scores[:, 0], bins=40, color=COLORS[0])
        axis.set_ylabel("particles")
        return
    x, y = scores[:, of].T
    axis.set_ylabel(names[of[1]])
    if len(scores) < 2000:
        axis.plot(x, y, ".", color=COLORS[0], alpha=0.4, markersize=4)
    else:
        figure.colorbar(axis.hexbin(x, y, gridsize=40, mincnt=1, cmap="viridis"), label="particles", ax=axis)


def _component_names(motions: PrincipalMotions) -> list[str]:
    return [f"PC{k + 1} (Å, {100 * share:.0f} %)" for k, share in enumerate(motions.explained_variance_ratio)]


def decode_nodes(motions: PrincipalMotions, latents: torch.Tensor) -> np.ndarray:
    structure = motions.dynamics.structure
    coords = motions.dynamics.decode(latents.to(motions.dynamics.reference)).detach().cpu().numpy()
    return coords[:, np.isin(structure.rows, structure.node_rows)]


def name_ends(motions: PrincipalMotions, path: torch.Tensor, component: int, last: str) -> str:
    low, high = motions.transform(path)[[0, -1], component]
    return f"PC{component + 1} of {motions.label}: {low:+.1f} Å (pale) to {high:+.1f} Å {last}"


def facing(along: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) that lays most of the directions `along` (k, 3) across the picture, then up: no mirror image."""
    directions = np.linalg.svd(along, full_matrices=False)[2]
    return directions * np.linalg.det(directions)


def draw_backbones(axes, structure: Structure, view: np.ndarray, reach: float | None = None) -> None:
    """Conformations (m, n_nodes, 3) Å, pale to dark, from the front and from below; what is far away fades.

    Nodes that are NaN are left out; the picture reaches as far as the farthest node, or `reach`.
    """
    reach = 1.05 * np.nanmax(np.abs(view)) if reach is None else reach
    bonds = np.stack([view[:, :-1], view[:, 1:]], axis=2)
    # No line from chain to chain, nor across residues that are missing.
    bonded = np.diff(structure.node_chain) == 0
    bonded &= np.linalg.norm(bonds[0, :, 1] - bonds[0, :, 0], axis=-1) < 8.0
    chains = structure.node_chain[:-1][bonded]
    colors = np.array([to_rgb(COLORS[chain % len(COLORS)]) for chain in chains])
    for axis, side, toward in zip(axes, ([0, 1], [0, 2]), ([0, 0, 1], [0, -1, 0]), strict=False):
        for share, lines in zip(np.linspace(1, 0.2, len(view))[::-1], bonds[:, bonded], strict=True):
            depth = lines.mean(1) @ toward
            order = np.argsort(depth)
            near = 0.75 + 0.25 * np.clip(depth / reach, -1, 1)
            faded = 1 - near[:, None] * (1 - colors)
            axis.add_collection(LineCollection(lines[order][..., side], colors=faded[order], alpha=share, lw=1.5))
        axis.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach), xlabel="Å", ylabel="Å")
    for chain in dict.fromkeys(chains) if not axes[0].lines else ():
        axes[0].plot([], color=COLORS[chain % len(COLORS)], label=f"chain {structure.chain_ids[chain]}")
    axes[0].legend(fontsize="small")


def _pooled_value(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _pooled(values: np.ndarray) -> str:
    return f"{_pooled_value(values):.2f} Å"
