"""Figures. Each `plot_` function returns a matplotlib Figure and changes no global state."""

from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..analysis import CHAIN_COLORS, PrincipalMotions
from ..inference import Encoder, Result
from ..model import Model
from ..molecule import Modes, Structure, find_chain
from .drawing import (
    chain_color,
    decode_nodes,
    draw_backbones,
    facing,
    name_ends,
    new_figure,
    view_along,
)

__all__ = [
    "plot_conformations",
    "plot_explorer",
    "plot_latent_space",
    "plot_modes",
    "plot_particles",
    "plot_refinement",
    "plot_residue_motion",
    "plot_rmsd",
    "plot_structure",
    "plot_training",
]

# Above so many particles their density is drawn instead of points.
_MAX_POINTS = 2000
# Arrows of a mode, at most.
_MAX_ARROWS = 150
# Characters in a line of a title.
_TITLE_WIDTH = 110
# Panels side by side, of which there is one a chain.
_MAX_PANEL_COLUMNS = 4


def __dir__() -> list[str]:
    """What completion offers: the figures, and nothing that they are made with."""
    return list(__all__)


@torch.no_grad()
def plot_particles(result: Result, n: int = 6) -> Figure:
    """First `n` particles: image, the model's reconstruction, and what is left.

    The reconstruction is as bright as the images, by ``result.contrast``. Where poses, CTFs and
    latents are right, no shape of the molecule is left in the residual.

    Raises
    ------
    ValueError
        For a result without its particles.
    """
    if result.particles is None:
        raise ValueError(
            f"expected a result with its particles, got {result!r} without; "
            "try load_result(path, particles)"
        )
    chosen = result[: min(n, len(result))]
    particles = result.particles[: len(chosen)]
    batch = next(particles.batches(len(chosen), device="cpu"))
    model_images = chosen.contrast * chosen.model.render(chosen.latents, *batch.pose)
    shown = {
        "image": batch.images,
        "reconstruction": model_images,
        "residual": batch.images - model_images,
    }
    # The three images of one particle lie side by side.
    alone = len(chosen) == 1
    if alone:
        figure, axes = new_figure(1, 3, 7.5, 2.9)
    else:
        figure, axes = new_figure(3, len(chosen), 1.6 * len(chosen), 5.2)
    for row, (name, images) in zip(axes.T if alone else axes, shown.items(), strict=True):
        _draw_images(row, images.numpy(), name)
    width = result.model.box_size * result.model.pixel_size
    title = f"{len(chosen)} of {len(result):,} particles, {width:.0f} Å wide; a grey scale a row"
    figure.suptitle(title)
    return figure


def _draw_images(axes: np.ndarray, images: np.ndarray, name: str) -> None:
    """(k, box, box) images on one grey scale."""
    # A few bright pixels of noise shall not set the scale.
    share = 1.0 if name == "reconstruction" else 0.999
    limit = float(np.quantile(np.abs(images), share))
    for axis, image in zip(axes, images, strict=True):
        # Pixel row 0 is at negative y, as in the file.
        axis.imshow(image, cmap="gray", vmin=-limit, vmax=limit, origin="lower")
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(name)


def plot_training(encoder: Encoder) -> Figure:
    """Loss, and where the truth is known RMSD, of every epoch that an encoder was trained.

    Raises
    ------
    ValueError
        For an encoder that was not trained.
    """
    history = encoder.history
    if not history:
        raise ValueError(f"expected an encoder with a history, got {encoder!r}; try train_encoder")
    epochs = [record["epoch"] for record in history]
    scored = history[0].get("rmsd") is not None
    figure, axes = new_figure(1, 1 + scored, 4 * (1 + scored), 3)
    for key, label, color in (
        ("train_loss", "training", CHAIN_COLORS[0]),
        ("held_out_loss", "held out", CHAIN_COLORS[1]),
    ):
        values = [record[key] for record in history]
        axes[0, 0].plot(epochs, values, color=color, label=label, marker=".")
    axes[0, 0].set(xlabel="epoch", ylabel="mean squared error")
    axes[0, 0].legend()
    if scored:
        values = [record["rmsd"] for record in history]
        axes[0, 1].plot(epochs, values, color=CHAIN_COLORS[1], marker=".")
        axes[0, 1].set(xlabel="epoch", ylabel="held-out RMSD (Å)")
    return figure


def plot_refinement(result: Result) -> Figure:
    """How far particles moved, the noise and the population's spread at each pass of `refine`.

    Raises
    ------
    ValueError
        For a result that was not refined.
    """
    history = result.history
    panels = {
        "step": "RMS step (Å)",
        "noise_std": "noise (grey levels)",
        "spread": "population spread (Å)",
    }
    if not history or any(key not in history[0] for key in panels):
        hint = "plot_training(encoder)" if result.kind == "encoded" else "refine"
        raise ValueError(f"expected a refined result with its history, got {result!r}; try {hint}")
    figure, axes = new_figure(1, 3, 10, 3)
    passes = np.arange(1, len(history) + 1)
    ticks = [f"{k}\n{record['blur']:g}" for k, record in zip(passes, history, strict=True)]
    for axis, (key, label) in zip(axes[0], panels.items(), strict=True):
        values = [record[key] for record in history]
        axis.plot(passes, values, color=CHAIN_COLORS[0], marker="o")
        axis.set(xlabel="pass (blur in Å)", ylabel=label)
        axis.set_ylim(0, 1.1 * max(values))
        axis.set_xticks(passes, ticks)
    return figure


def plot_latent_space(
    motions: PrincipalMotions,
    scores: np.ndarray | None = None,
    truth: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Particles on the first two components, and against a true coordinate where one is known.

    Parameters
    ----------
    motions : PrincipalMotions
    scores : (N, k) array, optional
        Of other particles, as ``motions.transform`` gives; by default those that the components
        were computed from. Many are drawn as their density.
    truth : (N,) array, optional
        A true coordinate of each particle.
    title : str
        Should hold the number that says whether the picture means something.
    """
    scores = motions.scores if scores is None else scores
    if truth is None:
        figure, axes = new_figure(1, 1, 4.6, 4)
    else:
        figure, axes = new_figure(1, 2, 9, 4)
    names = _component_names(motions)
    _draw_points(figure, axes[0, 0], scores, (0, 1), names, motions.label)
    if truth is not None:
        color = CHAIN_COLORS[0]
        axes[0, 1].plot(truth, scores[:, 0], ".", color=color, alpha=0.4, markersize=4)
        axes[0, 1].set(xlabel="true coordinate", ylabel=names[0])
    figure.suptitle(title)
    return figure


def plot_rmsd(
    per_particle: dict[str, np.ndarray], mean: np.ndarray, limit: np.ndarray | None = None
) -> Figure:
    """Distributions of RMSD in Å of named methods.

    Parameters
    ----------
    per_particle : dict of (N,) arrays
        RMSD of each particle by each method.
    mean : (N,) array
        That of the mean conformation, a dashed line at its pooled value.
    limit : (N,) array, optional
        The information limit, a solid line at its pooled value.
    """
    figure, axes = new_figure(1, 1, 6, 3.6)
    axis = axes[0, 0]
    top = max(float(np.quantile(values, 0.995)) for values in (*per_particle.values(), mean))
    bins = np.linspace(0, 1.05 * top, 50)
    for color, (name, values) in zip(CHAIN_COLORS, per_particle.items(), strict=False):
        label = f"{name}: {_root_mean_square(values):.2f} Å"
        axis.hist(values, bins, histtype="stepfilled", alpha=0.55, color=color, label=label)
    value = _root_mean_square(mean)
    axis.axvline(value, color="0.3", ls="--", label=f"mean conformation: {value:.2f} Å")
    if limit is not None:
        value = _root_mean_square(limit)
        axis.axvline(value, color="k", label=f"information limit: {value:.2f} Å")
    axis.set(xlabel="RMSD to the true conformation (Å, no re-superposition)", ylabel="particles")
    axis.legend(fontsize="small")
    return figure


def plot_conformations(
    motions: PrincipalMotions,
    component: int = 0,
    n: int = 5,
    percentiles: tuple[float, float] = (5, 95),
) -> Figure:
    """Backbone at `n` positions along a component, pale to dark, from two sides.

    Chains have a colour each. Across is the direction in which most moves; a widget that turns is
    ``cryochains.explore``.

    Raises
    ------
    ValueError
        For a component that does not exist.
    """
    latents = motions.traverse(component, n, percentiles)
    coords = decode_nodes(motions, latents)
    figure, axes = new_figure(1, 2, 9, 4.6)
    view = view_along(coords, coords[-1] - coords[0])
    draw_backbones(axes[0], motions.model.structure, view)
    figure.suptitle(name_ends(motions, latents, component, "(dark)"))
    return figure


def plot_explorer(motions: PrincipalMotions, component: int = 0, title: str = "") -> Figure:
    """What ``cryochains.explore`` shows: the particles on two components, and the backbones.

    Parameters
    ----------
    motions : PrincipalMotions
    component : int
        Along which the backbones are drawn; 0 is PC1.
    title : str
        Should say what the component means, such as `motion_sentence` does.

    Raises
    ------
    ValueError
        For a component that does not exist.
    """
    latents = motions.traverse(component, 5)
    figure, axes = new_figure(1, 2, 10, 4.6)
    pair = (component, 1 if component == 0 else 0)
    names = _component_names(motions)
    _draw_points(figure, axes[0, 0], motions.scores, pair, names, motions.label)
    coords = decode_nodes(motions, latents)
    view = view_along(coords, coords[-1] - coords[0])
    draw_backbones(axes[0, 1:], motions.model.structure, view)
    axes[0, 1].set_title(name_ends(motions, latents, component, "(dark)"), fontsize="medium")
    figure.suptitle("\n".join(wrap(title, _TITLE_WIDTH)), fontsize="medium")
    return figure


def plot_structure(structure: Structure) -> Figure:
    """Backbone of every chain from two sides, the longest direction of the molecule across."""
    coords = structure.node_coords[None]
    figure, axes = new_figure(1, 2, 9, 4.6)
    view = view_along(coords, coords[0] - coords[0].mean(0))
    draw_backbones(axes[0], structure, view)
    figure.suptitle(f"{structure.name}: {structure.n_nodes:,} residues, from two sides")
    return figure


def plot_modes(
    structure: Structure, modes: Modes, chain: str | None = None, mode: int = 0
) -> Figure:
    """One mode of a chain: arrows on its backbone, and how far each residue moves.

    By default the first chain's softest.

    Raises
    ------
    ValueError
        For modes of another structure, an unknown chain, or a mode that does not exist.
    """
    number = find_chain(structure, modes, chain, mode)
    own = structure.node_chain == number
    eigenvalues = modes.eigenvalues[number]
    displacements = modes.vectors[number][mode] * np.sqrt(own.sum())  # 1 Å RMS
    distances = np.linalg.norm(displacements, axis=1)
    turn = facing(displacements)
    # The longest arrow is as long as the chain's radius.
    times = structure.radii[number] / distances.max()
    arrows = times * displacements @ turn.T
    centred = structure.node_coords - structure.centers[number]
    view = np.where(own[:, None], centred, np.nan) @ turn.T
    figure, axes = new_figure(1, 2, 10, 4.6)
    extent = 1.05 * np.abs(np.concatenate([view[own], view[own] + arrows])).max()
    draw_backbones(axes[0, :1], structure, view[None], extent)
    _draw_arrows(axes[0, 0], view[own], arrows)
    axes[0, 0].set_title(f"arrows: {times:.0f} × a motion of 1 Å RMS", fontsize="medium")
    resnums = structure.atoms.getResnums()[structure.node_rows[own]]
    axes[0, 1].plot(resnums, distances, color=chain_color(number), lw=1)
    name = structure.chain_ids[number]
    axes[0, 1].set(
        xlabel=f"residue of chain {name}",
        ylabel="displacement (Å) at 1 Å RMS",
        ylim=(0, 1.05 * distances.max()),
    )
    value = eigenvalues[mode]
    times_softest = np.sqrt(value / eigenvalues[0])
    figure.suptitle(
        f"Mode {mode + 1} of chain {name}: eigenvalue {value:.3g}, "
        f"{times_softest:.2f} × the softest mode's frequency"
    )
    return figure


def _draw_arrows(axis: Axes, starts: np.ndarray, steps: np.ndarray) -> None:
    """Some of the arrows (k, 3) Å from (k, 3) `starts`, seen from the front."""
    few = slice(None, None, 1 + len(steps) // _MAX_ARROWS)
    x, y = starts[few, :2].T
    along_x, along_y = steps[few, :2].T
    axis.quiver(
        x,
        y,
        along_x,
        along_y,
        angles="xy",
        scale_units="xy",
        scale=1,
        width=0.004,
        color="0.25",
        zorder=3,
    )


@torch.no_grad()
def plot_residue_motion(model: Model, latents: torch.Tensor, title: str = "") -> Figure:
    """How far each residue moves from the first of several conformations to each; a panel a chain.

    Parameters
    ----------
    model : Model
    latents : (m, p) tensor
        Such as ``motions.traverse(0)``.
    title : str

    Raises
    ------
    ValueError
        For another number of latents than the model has. Whether they are of this model, and not
        of one with as many, is not known.
    """
    structure = model.structure
    coords = model.decode(latents).cpu().numpy()
    moved = np.linalg.norm(coords - coords[0], axis=-1)
    n_columns = min(structure.n_chains, _MAX_PANEL_COLUMNS)
    n_rows = -(-structure.n_chains // n_columns)
    height = 3.2 if n_rows == 1 else 2.4 * n_rows
    figure, axes = new_figure(n_rows, n_columns, 4.5 * n_columns, height)
    for axis in axes.flat[structure.n_chains :]:
        axis.remove()
    shares = np.linspace(0.15, 1, len(moved))
    for chain, axis in enumerate(axes.flat[: structure.n_chains]):
        own = structure.chain_index == chain
        for share, distances in zip(shares, moved[:, own], strict=True):
            color = chain_color(chain)
            axis.plot(structure.resnums[own], distances, color=color, alpha=share, lw=1)
        axis.set(
            xlabel=f"residue of chain {structure.chain_ids[chain]}",
            ylim=(0, 1.05 * moved.max() + 1e-9),
        )
    for axis in axes[:, 0]:
        axis.set_ylabel("displacement (Å)")
    figure.suptitle(title)
    return figure


def _draw_points(
    figure: Figure,
    axis: Any,
    scores: np.ndarray,
    components: tuple[int, int],
    names: list[str],
    title: str,
) -> None:
    """Particles on two components, as points or as their density; a histogram where one exists."""
    axis.set(xlabel=names[components[0]], title=title)
    if scores.shape[1] == 1:
        axis.hist(scores[:, 0], bins=40, color=CHAIN_COLORS[0])
        axis.set_ylabel("particles")
        return
    x, y = scores[:, components].T
    axis.set_ylabel(names[components[1]])
    if len(scores) < _MAX_POINTS:
        axis.plot(x, y, ".", color=CHAIN_COLORS[0], alpha=0.4, markersize=4)
        return
    density = axis.hexbin(x, y, gridsize=40, mincnt=1, cmap="viridis")
    figure.colorbar(density, label="particles", ax=axis)


def _component_names(motions: PrincipalMotions) -> list[str]:
    shares = motions.explained_variance_ratio
    return [f"PC{k + 1} (Å, {100 * share:.0f} %)" for k, share in enumerate(shares)]


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
