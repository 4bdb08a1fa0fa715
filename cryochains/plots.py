"""Figures from plain data: each `plot_` function returns a matplotlib Figure and changes no global state.

What shows the same colours elsewhere is here too: movies and ChimeraX scripts.
"""

from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FFMpegWriter, PillowWriter
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from .dynamics import Dynamics
from .files import atomic_path
from .latent import PrincipalMotions, save_ensemble
from .model import CryoChains
from .modes import Modes
from .particles import ParticleStack
from .sources import pdb_letters
from .structure import Structure

# Okabe and Ito's colours, told apart by everyone.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def _figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
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
    figure, axes = _figure(3, len(chosen), 1.6 * len(chosen), 5.2)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
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
    figure, axes = _figure(1, 1 + scored, 4 * (1 + scored), 3)
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
    figure, axes = _figure(1, 3, 10, 3)
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
    figure, axes = _figure(1, 1 if truth is None else 2, 4.6 if truth is None else 9, 4)
    shares = 100 * motions.explained_variance_ratio
    names = [f"PC{k + 1} (Å, {share:.0f} %)" for k, share in enumerate(shares)]
    if scores.shape[1] > 1 and len(scores) < 2000:
        axes[0, 0].plot(scores[:, 0], scores[:, 1], ".", color=COLORS[0], alpha=0.4, markersize=4)
        axes[0, 0].set(xlabel=names[0], ylabel=names[1], title=motions.label)
    elif scores.shape[1] > 1:
        hexes = axes[0, 0].hexbin(scores[:, 0], scores[:, 1], gridsize=40, mincnt=1, cmap="viridis")
        figure.colorbar(hexes, label="particles", ax=axes[0, 0])
        axes[0, 0].set(xlabel=names[0], ylabel=names[1], title=motions.label)
    else:
        axes[0, 0].hist(scores[:, 0], bins=40, color=COLORS[0])
        axes[0, 0].set(xlabel=names[0], ylabel="particles", title=motions.label)
    if truth is not None:
        axes[0, 1].plot(truth, scores[:, 0], ".", color=COLORS[0], alpha=0.4, markersize=4)
        axes[0, 1].set(xlabel="true coordinate", ylabel=names[0])
    figure.suptitle(title)
    return figure


def plot_rmsd(per_particle: dict[str, np.ndarray], mean: np.ndarray, limit: np.ndarray | None = None) -> Figure:
    """Distributions of RMSD (Å) of named methods, with the mean conformation's and the information limit as lines."""
    figure, axes = _figure(1, 1, 6, 3.6)
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

    The horizontal axis is the direction in which most moves; a widget that turns is ``cryochains.slide``.
    """
    structure, path = motions.dynamics.structure, motions.traverse(component, n, percentiles)
    coords = _decode_nodes(motions, path)
    figure, axes = _figure(1, 2, 9, 4.6)
    view = (coords - coords.mean((0, 1))) @ _facing(coords[-1] - coords[0]).T
    _draw_backbones(axes[0], structure, view)
    figure.suptitle(_ends(motions, path, component, "(dark)"))
    return figure


def plot_structure(structure: Structure) -> Figure:
    """Backbone of every chain from two sides, the longest direction of the molecule across."""
    coords = structure.node_coords - structure.node_coords.mean(0)
    figure, axes = _figure(1, 2, 9, 4.6)
    _draw_backbones(axes[0], structure, (coords @ _facing(coords).T)[None])
    figure.suptitle(f"{structure.name}: {structure.n_nodes:,} residues, from two sides")
    return figure


def plot_modes(structure: Structure, modes: Modes, chain: str | None = None, mode: int = 0) -> Figure:
    """One mode of a chain (by default the first chain's softest): arrows on its backbone, and how far residues move.

    Raises
    ------
    ValueError
        For modes of another structure, an unknown chain, or a mode that does not exist.
    """
    if modes.structure_hash != structure.content_hash:
        raise ValueError(f"expected modes of {structure!r}, got others; try compute_modes on this structure")
    chain = structure.chain_ids[0] if chain is None else chain
    if chain not in structure.chain_ids:
        raise ValueError(f"expected a chain of {', '.join(structure.chain_ids)}, got {chain!r}")
    number = structure.chain_ids.index(chain)
    if not 0 <= mode < modes.n_modes[number]:
        raise ValueError(f"expected a mode from 0 to {modes.n_modes[number] - 1}, got {mode}")
    own, values = structure.node_chain == number, modes.eigenvalues[number]
    moves = modes.vectors[number][mode] * np.sqrt(own.sum())  # 1 Å RMS
    moved = np.linalg.norm(moves, axis=1)
    times, facing = structure.radii[number] / moved.max(), _facing(moves)  # the longest arrow spans the chain's radius
    arrows = times * moves @ facing.T
    view = np.where(own[:, None], structure.node_coords - structure.centers[number], np.nan) @ facing.T
    figure, axes = _figure(1, 2, 10, 4.6)
    reach = 1.05 * np.abs(np.concatenate([view[own], view[own] + arrows])).max()
    _draw_backbones(axes[0, :1], structure, view[None], reach)
    few = slice(None, None, 1 + len(arrows) // 150)
    starts, steps = view[own][few, :2].T, arrows[few, :2].T
    axes[0, 0].quiver(*starts, *steps, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.25", zorder=3)
    axes[0, 0].set_title(f"arrows: {times:.0f} × a motion of 1 Å RMS", fontsize="medium")
    resnums = structure.atoms.getResnums()[structure.node_rows[own]]
    axes[0, 1].plot(resnums, moved, color=COLORS[number % len(COLORS)], lw=1)
    axes[0, 1].set(
        xlabel=f"residue of chain {chain}", ylabel="displacement (Å) at 1 Å RMS", ylim=(0, 1.05 * moved.max())
    )
    stiffness = f"eigenvalue {values[mode]:.3g}, {np.sqrt(values[mode] / values[0]):.2f} × the softest mode's frequency"
    figure.suptitle(f"Mode {mode + 1} of chain {chain}: {stiffness}")
    return figure


def save_movie(
    path,
    motions: PrincipalMotions,
    component: int = 0,
    n: int = 40,
    percentiles: tuple[float, float] = (5, 95),
    fps: int = 15,
) -> Path:
    """Write a movie of the backbones swinging along a component and back in `n` frames: GIF, or MP4 by the suffix.

    One end stays as a pale shadow; the view is that of `plot_conformations`, and no browser is needed.

    Raises
    ------
    ValueError
        For another suffix, fewer than two frames, a component that does not exist, a place that cannot be written, or
        an MP4 where the program ffmpeg is not found.
    """
    path = Path(path)
    if path.suffix not in (".gif", ".mp4") or n < 2:
        raise ValueError(f"expected a path that ends in .gif or .mp4 and two frames or more, got {path.name}, n={n}")
    if path.suffix == ".mp4" and not FFMpegWriter.isAvailable():
        raise ValueError(f"expected the program ffmpeg, which writes MP4, got none; try {path.stem}.gif")
    ends = motions.traverse(component, 2, percentiles)
    # There and back, slow at the ends; the first frame follows the last.
    share = (1 - torch.cos(2 * torch.pi * torch.arange(n) / n))[:, None] / 2
    coords = _decode_nodes(motions, torch.lerp(*ends[:, None], share))
    view = (coords - coords.mean((0, 1))) @ _facing(coords[n // 2] - coords[0]).T
    reach = 1.05 * np.abs(view).max()
    figure, axes = _figure(1, 2, 9, 4.8)
    figure.suptitle(_ends(motions, ends, component, "and back"))
    structure = motions.dynamics.structure
    _draw_backbones(axes[0], structure, view[:1], reach)
    # Laid out once, so that the camera stands still.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    writer = (PillowWriter if path.suffix == ".gif" else FFMpegWriter)(fps=fps)
    with atomic_path(path) as part, writer.saving(figure, str(part), dpi=80):
        for frame in view:
            for lines in [lines for axis in axes[0] for lines in axis.collections]:
                lines.remove()
            _draw_backbones(axes[0], structure, np.stack([view[0], frame]), reach)
            writer.grab_frame()
    return path


def save_chimerax(path, dynamics: Dynamics, latents: torch.Tensor) -> Path:
    """Write a ChimeraX script (.cxc) and, beside it, the PDB that it opens: the conformations at (m, p) `latents`.

    In an empty session the script shows the chains in this module's colours and a slider along the conformations. The
    two files find each other wherever their folder is moved.

    Raises
    ------
    ValueError
        For another suffix, or a place that cannot be written.
    """
    path = Path(path)
    if path.suffix != ".cxc":
        raise ValueError(f"expected a path that ends in .cxc, got {path.name}; try {path.stem}.cxc")
    ensemble = save_ensemble(path.with_suffix(".pdb"), dynamics, latents)
    structure = dynamics.structure
    chids, resnums, letters = structure.atoms.getChids(), structure.atoms.getResnums(), pdb_letters(structure.atoms)
    lines = [f'open "{ensemble.name}" coordset true', "set bgColor white", "hide atoms", "cartoon", "show ligand"]
    for body in range(structure.n_chains):
        own = structure.atom_chain == body
        for chid in dict.fromkeys(chids[own]):
            # A chain that several bodies share is coloured by residues.
            shared = (chids[~own] == chid).any()
            residues = ":" + ",".join(map(str, dict.fromkeys(resnums[own & (chids == chid)]))) if shared else ""
            lines.append(f"color #1/{letters[chid]}{residues} {COLORS[body % len(COLORS)]}")
    with atomic_path(path) as part:
        part.write_text("\n".join([*lines, "view", "coordset slider #1", ""]))
    return path


def plot_residue_motion(dynamics: Dynamics, latents: torch.Tensor, title: str = "") -> Figure:
    """How far each residue moves, from the first of the conformations at (m, p) `latents` to each; a panel a chain."""
    structure = dynamics.structure
    coords = dynamics.decode(latents).detach().cpu().numpy()
    moved = np.linalg.norm(coords - coords[0], axis=-1)
    figure, axes = _figure(1, structure.n_chains, 4.5 * structure.n_chains, 3.2)
    for chain, axis in enumerate(axes[0]):
        of_chain = structure.chain_index == chain
        for share, values in zip(np.linspace(0.15, 1, len(moved)), moved, strict=True):
            color = COLORS[chain % len(COLORS)]
            axis.plot(structure.resnums[of_chain], values[of_chain], color=color, alpha=share, lw=1)
        axis.set(xlabel=f"residue of chain {structure.chain_ids[chain]}", ylim=(0, 1.05 * moved.max() + 1e-9))
    axes[0, 0].set_ylabel("displacement (Å)")
    figure.suptitle(title)
    return figure


def _decode_nodes(motions: PrincipalMotions, latents: torch.Tensor) -> np.ndarray:
    structure = motions.dynamics.structure
    coords = motions.dynamics.decode(latents.to(motions.dynamics.reference)).detach().cpu().numpy()
    return coords[:, np.isin(structure.rows, structure.node_rows)]


def _ends(motions: PrincipalMotions, path: torch.Tensor, component: int, last: str) -> str:
    low, high = motions.transform(path)[[0, -1], component]
    return f"PC{component + 1} of {motions.label}: {low:+.1f} Å (pale) to {high:+.1f} Å {last}"


def _facing(along: np.ndarray) -> np.ndarray:
    """Rotation (3, 3) that lays most of the directions `along` (k, 3) across the picture, then up: no mirror image."""
    directions = np.linalg.svd(along, full_matrices=False)[2]
    return directions * np.linalg.det(directions)


def _draw_backbones(axes, structure: Structure, view: np.ndarray, reach: float | None = None) -> None:
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
