"""Figures from plain data. Each function returns a matplotlib Figure and changes no global state."""

from functools import partial
from io import BytesIO

import numpy as np
import torch
from matplotlib.figure import Figure

from .dynamics import Dynamics
from .latent import PrincipalMotions
from .model import CryoChains
from .particles import ParticleStack

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
    coords = motions.dynamics.decode(path.to(motions.dynamics.reference)).detach().cpu().numpy()
    coords = coords[:, np.isin(structure.rows, structure.node_rows)]
    directions = np.linalg.svd(coords[-1] - coords[0], full_matrices=False)[2]
    coords = (coords - coords.mean((0, 1))) @ directions.T
    reach = 1.05 * np.abs(coords).max()
    # No line across residues that are missing.
    jumps = np.linalg.norm(np.diff(coords[0], axis=0), axis=1) > 8.0
    coords[:, 1:][:, jumps] = np.nan
    figure, axes = _figure(1, 2, 9, 4.6)
    for axis, side in zip(axes[0], ([0, 1], [0, 2]), strict=True):
        for chain, name in enumerate(structure.chain_ids):
            traces, color = coords[:, structure.node_chain == chain][..., side], COLORS[chain % len(COLORS)]
            for share, trace in zip(np.linspace(0.15, 1, n), traces, strict=True):
                label = f"chain {name}" if share == 1 else None
                axis.plot(*trace.T, color=color, alpha=share, lw=1, label=label)
        axis.set(aspect="equal", xlim=(-reach, reach), ylim=(-reach, reach), xlabel="Å", ylabel="Å")
    axes[0, 0].legend(fontsize="small")
    ends = motions.transform(path)[[0, -1], component]
    figure.suptitle(f"PC{component + 1} of {motions.label}: {ends[0]:+.1f} Å (pale) to {ends[1]:+.1f} Å (dark)")
    return figure


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


def _pooled_value(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _pooled(values: np.ndarray) -> str:
    return f"{_pooled_value(values):.2f} Å"
