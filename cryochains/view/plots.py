"""Figures. Each `plot_` function returns a matplotlib Figure and changes no global state."""

import operator
from collections.abc import Callable
from functools import partial
from textwrap import wrap
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from .._arguments import Count, LatentRows, Ordinal, Percent, checked
from ..analysis import (
    CHAIN_COLORS,
    EndsComparison,
    HalvesComparison,
    MapComparison,
    PrincipalMotions,
)
from ..inference import Check, Encoder, ResidualEncoder, Result, Verdict
from ..model import Model
from ..molecule import Modes, Structure, find_chain
from .drawing import (
    GRADE_COLORS,
    chain_color,
    decode_nodes,
    draw_backbones,
    facing,
    name_ends,
    new_figure,
    view_along,
)

__all__ = [
    "plot_check",
    "plot_conformations",
    "plot_explorer",
    "plot_halves",
    "plot_latent_space",
    "plot_map_comparison",
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
# Bars point to the right where something else fits better: a smaller molecule as much as a larger
# one, and the poses of other particles with the reference's own.
_SIGNED: dict[str, Callable[[float], float]] = {"pixel size": abs, "reference": operator.neg}
_SIGNIFICANCE_TICKS = (-1000, -300, -100, -30, -10, 0, 10, 30, 100, 300, 1000)
# Characters in a line of a title, of a figure and of a panel.
_TITLE_WIDTH = 110
_PANEL_TITLE_WIDTH = 55
# Of the small letters of a verdict and of a particle's id.
_VERDICT_WIDTH = 165
_ID_WIDTH = 22
_SMALL = 8
# Inches a line of a verdict.
_LINE_HEIGHT = 0.17
_JUNK_COLOR = "0.6"
# Grades of a verdict that the statuses of a check are drawn as.
_STATUS_GRADES = {"green": "good", "yellow": "doubtful", "red": "not to be trusted"}
# Characters in a line of a check's problem.
_PROBLEM_WIDTH = 130
# Panels of a refinement side by side.
_REFINEMENT_COLUMNS = 4
# Chains that a legend names; of more it would cover the curves.
_MOST_CURVES_NAMED = 8
# Where half maps are said to show nothing more.
_HALF_MAP_THRESHOLD = 0.143
# Panels side by side, of which there is one a chain.
_MAX_PANEL_COLUMNS = 4


def __dir__() -> list[str]:
    """What completion offers: the figures, and nothing that they are made with."""
    return list(__all__)


@torch.no_grad()
@checked
def plot_particles(result: Result, n: Count = 6) -> Figure:
    """First `n` particles: image, the model's reconstruction, and what is left.

    Images have the particles' ids above them, and "junk?" where they are flagged as showing
    something else (``result.shows_molecule``). Pixels that are not finite are white.

    The reconstruction is as bright as the images, by ``result.scale``. Where poses, CTFs and
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
    batch = next(particles.batches(len(chosen), device="cpu", require_finite=False))
    model_images = chosen.imaging_model.render(chosen.latents, *batch.pose)
    model_images = chosen.scale[:, None, None] * model_images
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
        _draw_images(row, images.numpy(), name, chosen.shows_molecule)
    for axis, id_, good in zip(axes.flat, chosen.ids, chosen.shows_molecule, strict=False):
        color = "k" if good else GRADE_COLORS["not to be trusted"]
        axis.set_title(_short_id(str(id_)) + ("" if good else "\njunk?"), size=_SMALL, color=color)
    width = result.model.box_size * result.model.pixel_size
    title = f"{len(chosen)} of {len(result):,} particles, {width:.0f} Å wide; a grey scale a row"
    figure.suptitle(title)
    return figure


def _short_id(text: str) -> str:
    """An id that is no wider than an image: of a long one, both ends."""
    if len(text) <= _ID_WIDTH:
        return text
    half = _ID_WIDTH // 2
    return f"{text[: half - 1]}…{text[-half:]}"


def _draw_images(axes: np.ndarray, images: np.ndarray, name: str, good: np.ndarray) -> None:
    """(k, box, box) images on one grey scale, set by those that are `good` (k,), if any."""
    # A few bright pixels of noise shall not set the scale.
    share = 1.0 if name == "reconstruction" else 0.999
    pixels = np.abs(images[good] if good.any() else images)
    pixels = pixels[np.isfinite(pixels)]
    limit = float(np.quantile(pixels, share)) if len(pixels) else 1.0
    for axis, image in zip(axes, images, strict=True):
        # Pixel row 0 is at negative y, as in the file.
        axis.imshow(image, cmap="gray", vmin=-limit, vmax=limit, origin="lower")
        axis.set(xticks=[], yticks=[])
    axes[0].set_ylabel(name)


@checked
def plot_training(encoder: Encoder | ResidualEncoder) -> Figure:
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


@checked
def plot_refinement(result: Result) -> Figure:
    """How a refinement went, what it says of the images, and whether it is to be trusted.

    At each pass, by how much particles moved, the noise and the population's spread. Of the
    particles, where they are known, brightness, responsibility and misfit, those that are flagged
    as junk in grey; of the noise, its variance by resolution, over its mean. Below, the verdict.

    Raises
    ------
    ValueError
        For a result that was not refined.
    """
    history = result.history
    of_passes = {
        "step": "RMS step (Å)",
        "noise_std": "noise (grey levels)",
        "spread": "population spread (Å)",
    }
    if not history or any(key not in history[0] for key in of_passes):
        hint = "plot_training(encoder)" if result.kind == "encoded" else "refine"
        raise ValueError(f"expected a refined result with its history, got {result!r}; try {hint}")
    panels: list[Callable[[Axes], object]] = []
    for key, label in of_passes.items():
        panels.append(partial(_draw_passes, result, key, label))
    panels += _image_panels(result)
    lines = _verdict_lines(result.verdict)
    n_columns = min(len(panels), _REFINEMENT_COLUMNS)
    n_rows = -(-len(panels) // n_columns)
    text_height = _LINE_HEIGHT * (len(lines) + 1) if lines else 0.0
    height = 2.8 * n_rows + text_height
    figure, axes = new_figure(n_rows, n_columns, 3.2 * n_columns, height)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for draw_panel, axis in zip(panels, axes.flat, strict=False):
        draw_panel(axis)
    _write_below(figure, lines, text_height / height)
    return figure


def _write_below(figure: Figure, lines: list[tuple[str, str, str]], share: float) -> None:
    """Lines of two columns and a colour on the lowest `share` of a figure; the first is bold."""
    figure.set_layout_engine("constrained", rect=(0, share, 1, 1 - share), w_pad=0.08, h_pad=0.06)
    for number, (left, right, color) in enumerate(lines):
        y = share - _LINE_HEIGHT * (number + 0.5) / figure.get_figheight()
        weight = "bold" if number == 0 else "normal"
        for x, words in ((0.1, left), (1.6, right)):
            x /= figure.get_figwidth()
            figure.text(x, y, words, color=color, va="top", size=_SMALL + 1, weight=weight)


def _draw_passes(result: Result, key: str, label: str, axis: Axes) -> None:
    history = result.history
    passes = np.arange(1, len(history) + 1)
    values = [record[key] for record in history]
    axis.plot(passes, values, color=CHAIN_COLORS[0], marker="o")
    axis.set(xlabel="pass (blur in Å)", ylabel=label)
    axis.set_ylim(0, 1.1 * max(values))
    ticks = [f"{k}\n{record['blur']:g}" for k, record in zip(passes, history, strict=True)]
    axis.set_xticks(passes, ticks)


def _image_panels(result: Result) -> list[Callable[[Axes], object]]:
    """Panels of what is known of the images of a refined result."""
    panels: list[Callable[[Axes], object]] = []
    good = result.shows_molecule
    scale = result.scale.numpy()
    if (scale != scale[:1]).any():
        panels.append(partial(_draw_histogram, scale, good, "brightness"))
    if result.responsibility is not None:
        panels.append(partial(_draw_responsibility, result.responsibility.numpy(), good))
    if result.misfit is not None and result.misfit.isfinite().any():
        misfit = result.misfit.numpy()
        panels.append(partial(_draw_histogram, misfit, good, "misfit (χ² per pixel)"))
    if result.population is not None and result.population.noise_spectrum is not None:
        side = result.model.box_size * result.model.pixel_size
        spectrum = result.population.noise_spectrum.numpy()
        panels.append(partial(_draw_noise_spectrum, spectrum, side))
    return panels


def _draw_histogram(
    values: np.ndarray, good: np.ndarray, label: str, axis: Any, bins: np.ndarray | None = None
) -> None:
    """Values (N,) of the particles, in grey of those that are not `good` (N,)."""
    values, good = values[np.isfinite(values)], good[np.isfinite(values)]
    if bins is None:
        # The first and the last bin hold what is farther out.
        low, high = np.quantile(values, (0.01, 0.99))
        room = high - low
        bins = np.linspace(max(values.min(), low - room), min(values.max(), high + room), 31)
    values = np.clip(values, bins[0], bins[-1])
    parts = [values[good], values[~good]]
    axis.hist(parts, bins, stacked=True, color=[CHAIN_COLORS[0], _JUNK_COLOR])
    axis.set(xlabel=label, ylabel="particles")


def _draw_responsibility(values: np.ndarray, good: np.ndarray, axis: Axes) -> None:
    _draw_histogram(values, good, "responsibility", axis, np.linspace(0, 1, 21))
    axis.axvline(0.5, color="0.3", ls="--", lw=1)
    axis.set_title(f"{(~good).sum():,} of {len(good):,} flagged as junk", size="medium")


def _draw_noise_spectrum(spectrum: np.ndarray, side: float, axis: Axes) -> None:
    """Variances (R,) on rings of frequencies, of a box of `side` Å."""
    # The innermost ring is the image's mean. Ring k is of waves that are side / k long.
    rings = np.arange(1, len(spectrum))
    axis.plot(rings, spectrum[1:], color=CHAIN_COLORS[0])
    ticks = np.unique(np.linspace(0, rings[-1], 5)[1:].round().astype(int))
    axis.set_xticks(ticks, [f"{side / k:.3g}" for k in ticks])
    axis.set(xlabel="resolution (Å)", ylabel="noise variance over its mean")
    axis.set_ylim(0, 1.1 * spectrum[1:].max())


def _verdict_lines(verdict: Verdict | None) -> list[tuple[str, str, str]]:
    """Grade, words and colour of each line, what is worst first."""
    if verdict is None:
        return []
    lines = [("Verdict", verdict.grade, GRADE_COLORS[verdict.grade])]
    grades = list(GRADE_COLORS)
    for part in sorted(verdict.findings, key=lambda part: -grades.index(part.grade)):
        words = f"{part.sentence}; {part.remedy}" if part.remedy else part.sentence
        color = GRADE_COLORS[part.grade]
        first, *others = wrap(words, _VERDICT_WIDTH)
        lines.append((part.grade, first, color))
        lines += [("", more, color) for more in others]
    return lines


@checked
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
        were computed from, and as grey crosses those that are flagged as junk. Many are drawn as
        their density, without junk.
    truth : (N,) array, optional
        A true coordinate of each particle.
    title : str
        Should hold the number that says whether the picture means something. What is doubtful of
        the refinement is added.
    """
    if scores is None:
        scores, good = motions.scores, motions.result.shows_molecule
    else:
        good = np.ones(len(scores), dtype=bool)
    of_truth = scores.shape[:1] if truth is None else truth.shape
    if scores.ndim != 2 or of_truth != scores.shape[:1]:
        raise ValueError(
            f"expected scores (N, k) and a truth (N,), got {scores.shape} and {of_truth}; "
            "try motions.transform(result)"
        )
    if truth is None:
        figure, axes = new_figure(1, 1, 4.6, 4)
    else:
        figure, axes = new_figure(1, 2, 9, 4)
    names = _component_names(motions)
    _draw_points(figure, axes[0, 0], scores, good, (0, 1), names, motions.label)
    if truth is not None:
        color = CHAIN_COLORS[0]
        axes[0, 1].plot(truth[good], scores[good, 0], ".", color=color, alpha=0.4, markersize=4)
        _draw_crosses(axes[0, 1], truth[~good], scores[~good, 0])
        axes[0, 1].set(xlabel="true coordinate", ylabel=names[0])
    _set_title(figure, [title], motions.result.verdict)
    return figure


@checked
def plot_rmsd(
    per_particle: dict[str, np.ndarray], mean: np.ndarray, limit: np.ndarray | None = None
) -> Figure:
    """Distributions of RMSD in Å of named methods.

    Parameters
    ----------
    per_particle : dict of (N,) arrays
        RMSD of each particle by each method, all in one frame (see `score`).
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
    axis.set(xlabel="RMSD to the true conformation (Å)", ylabel="particles")
    axis.legend(fontsize="small")
    return figure


@checked
def plot_conformations(
    motions: PrincipalMotions,
    component: Ordinal = 0,
    n: Count = 5,
    percentiles: tuple[Percent, Percent] = (5, 95),
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


@checked
def plot_explorer(motions: PrincipalMotions, component: Ordinal = 0, title: str = "") -> Figure:
    """What ``cryochains.explore`` shows: the particles on two components, and the backbones.

    Parameters
    ----------
    motions : PrincipalMotions
    component : int
        Along which the backbones are drawn; 0 is PC1.
    title : str
        Should say what the component means, such as `motion_sentence` does. What is doubtful of
        the refinement is added where it is not in there.

    Raises
    ------
    ValueError
        For a component that does not exist.
    """
    latents = motions.traverse(component, 5)
    figure, axes = new_figure(1, 2, 10, 4.6)
    pair = (component, 1 if component == 0 else 0)
    names = _component_names(motions)
    good = motions.result.shows_molecule
    _draw_points(figure, axes[0, 0], motions.scores, good, pair, names, motions.label)
    coords = decode_nodes(motions, latents)
    view = view_along(coords, coords[-1] - coords[0])
    draw_backbones(axes[0, 1:], motions.model.structure, view)
    ends = wrap(name_ends(motions, latents, component, "(dark)"), _PANEL_TITLE_WIDTH)
    axes[0, 1].set_title("\n".join(ends), fontsize="medium")
    _set_title(figure, wrap(title, _TITLE_WIDTH), motions.result.verdict, fontsize="medium")
    return figure


@checked
def plot_structure(structure: Structure) -> Figure:
    """Backbone of every chain from two sides, the longest direction of the molecule across."""
    coords = structure.node_coords[None]
    figure, axes = new_figure(1, 2, 9, 4.6)
    view = view_along(coords, coords[0] - coords[0].mean(0))
    draw_backbones(axes[0], structure, view)
    figure.suptitle(f"{structure.name}: {structure.n_nodes:,} residues, from two sides")
    return figure


@checked
def plot_modes(
    structure: Structure, modes: Modes, chain: str | None = None, mode: Ordinal = 0
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
@checked
def plot_residue_motion(model: Model, latents: LatentRows, title: str = "") -> Figure:
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


@checked
def plot_map_comparison(comparison: MapComparison | EndsComparison) -> Figure:
    """Maps beside the densities of conformations; the title says which agrees better.

    A row a map: Fourier shell correlations; the correlation around each chain with conformations
    on the line through both, of which a diamond marks the best; and sums along z of the map and of
    what it shows beside its own conformation.

    Parameters
    ----------
    comparison : MapComparison or EndsComparison
        Of `compare_with_map`, or of `compare_ends`, which has two rows.
    """
    if isinstance(comparison, EndsComparison):
        rows = {"low end, ": comparison.low, "high end, ": comparison.high}
    else:
        rows = {"": comparison}
    figure, axes = new_figure(len(rows), 4, 15, 3.6 * len(rows) + 0.4)
    for (name, row), (curves, line, whole, rest) in zip(rows.items(), axes, strict=True):
        _draw_shell_correlations(row, curves)
        curves.set_title(f"{name}{row.map.n_particles:,} particles", size="medium")
        _draw_line_correlations(row, line)
        _draw_residual(figure, row, whole, rest)
    words = wrap(comparison.sentence, int(11 * figure.get_figwidth()))
    figure.suptitle("\n".join(words), fontsize="medium")
    return figure


@checked
def plot_halves(comparison: HalvesComparison) -> Figure:
    """Overlap of the motions of two halves, and how far each residue moves in their PC1.

    Parameters
    ----------
    comparison : HalvesComparison
    """
    figure, axes = new_figure(1, 2, 12, 3.8)
    matrix, curves = axes[0]
    overlap = comparison.overlap
    image = matrix.imshow(overlap, vmin=0, vmax=1, cmap="viridis")
    for (i, j), value in np.ndenumerate(overlap):
        color = "black" if value > 0.6 else "white"
        matrix.text(j, i, f"{value:.2f}", ha="center", va="center", color=color)
    names = [f"PC{k + 1}" for k in range(max(overlap.shape))]
    for set_ticks, n in ((matrix.set_yticks, len(overlap)), (matrix.set_xticks, len(overlap.T))):
        set_ticks(range(n), names[:n])
    matrix.set(xlabel="second half", ylabel="first half")
    figure.colorbar(image, ax=matrix, label="overlap")
    best = int(np.argmax(overlap[0]))
    halves = (comparison.first, 0, "first"), (comparison.second, best, "second")
    for number, (motions, component, name) in enumerate(halves):
        distances = _residue_distances(motions, component)
        label = f"{name} half, PC{component + 1}"
        curves.plot(distances, color=CHAIN_COLORS[number], label=label, lw=1)
    _name_chains(curves, comparison.first.model.structure)
    curves.set(ylabel="moves by (Å) a standard deviation", ylim=(0, None))
    curves.legend(fontsize="small")
    words = wrap(comparison.sentence, int(11 * figure.get_figwidth()))
    figure.suptitle("\n".join(words), fontsize="medium")
    return figure


def _residue_distances(motions: PrincipalMotions, component: int) -> np.ndarray:
    """(n_nodes,) Å a standard deviation of the scores, over one below the mean to one above."""
    size = motions.shown_scores[:, component].std()
    ends = motions.mean + size * np.array([[-1.0], [1.0]]) * motions.components[component]
    nodes = decode_nodes(motions, torch.from_numpy(ends).float())
    return np.linalg.norm(nodes[1] - nodes[0], axis=1) / 2


def _name_chains(axis: Axes, structure: Structure) -> None:
    """Ticks at the middle of each chain's nodes, and lines between chains."""
    first = np.flatnonzero(np.diff(structure.node_chain, prepend=-1))
    last = np.append(first[1:], len(structure.node_chain))
    for edge in first[1:]:
        axis.axvline(edge, color="0.8", lw=0.8)
    axis.set_xticks((first + last) / 2, [f"chain {chain}" for chain in structure.chain_ids])
    axis.set_xlim(0, len(structure.node_chain))


def _draw_line_correlations(comparison: MapComparison, axis: Axes) -> None:
    for number, chain in enumerate(comparison.chain_ids):
        curve = comparison.chain_correlation[number]
        axis.plot(comparison.line, curve, color=chain_color(number), label=f"chain {chain}")
        best = comparison.chain_position[number]
        if not np.isfinite(best):
            continue
        height = np.interp(best, comparison.line, curve)
        axis.plot(best, height, "D", color=chain_color(number), markersize=5)
    axis.axvline(0, color="0.8", lw=0.8)
    axis.axvline(1, color="0.8", lw=0.8)
    axis.set_xticks((0, 1), [_fold(name) for name in comparison.names[::-1]])
    axis.set_ylabel("correlation with the map")
    if len(comparison.chain_ids) <= _MOST_CURVES_NAMED:
        axis.legend(fontsize="small")


def _draw_residual(figure: Figure, comparison: MapComparison, whole: Axes, rest: Axes) -> None:
    """Sums along z of the map and of what it shows beside its own conformation."""
    pixel_size = comparison.map.pixel_size
    extent = comparison.map.box_size * pixel_size / 2
    shown = comparison.shown
    largest = comparison.residual_significance
    residual = f"residual (a voxel: up to {largest:.1f} × the noise)"
    volumes = ((whole, shown, "map"), (rest, comparison.residual.volume, residual))
    limit = np.abs(shown.sum(0)).max() * pixel_size
    for axis, volume, name in volumes:
        image = axis.imshow(
            volume.sum(0) * pixel_size,
            cmap="RdBu_r",
            origin="lower",
            extent=(-extent, extent, -extent, extent),
            vmin=-limit,
            vmax=limit,
        )
        axis.set_title(name, size="medium")
        axis.set_xlabel("Å")
    figure.colorbar(image, ax=rest, label="density per Å², summed along z")


def _fold(words: str) -> str:
    """Short lines."""
    return "\n".join(wrap(words, 16))


def _draw_shell_correlations(comparison: MapComparison, axis: Axes) -> None:
    volume = comparison.map
    frequencies = volume.frequencies[1:]
    if volume.fsc is not None:
        axis.plot(frequencies, volume.fsc[1:], color="0.3", label="half maps")
    fscs = (comparison.fsc_own, comparison.fsc_other)
    for name, fsc, color in zip(comparison.names, fscs, CHAIN_COLORS, strict=False):
        axis.plot(frequencies, fsc[1:], color=color, label=name)
    axis.axhline(_HALF_MAP_THRESHOLD, color="0.7", lw=0.8)
    ticks = np.linspace(0, frequencies[-1], 5)[1:]
    axis.set_xticks(ticks, [f"{1 / tick:.3g}" for tick in ticks])
    axis.set(xlabel="resolution (Å)", ylabel="FSC", ylim=(-0.1, 1.02))
    axis.legend(fontsize="small", loc="lower left")


def _set_title(figure: Figure, lines: list[str], verdict: Verdict | None, **style: Any) -> None:
    """Lines of a title, in the verdict's colour and with its reasons where it is not good."""
    if verdict is not None and verdict.reasons:
        style["color"] = GRADE_COLORS[verdict.grade]
        if verdict.reasons not in " ".join(lines):
            # About as many characters as there is room for.
            width = int(11 * figure.get_figwidth())
            words = wrap(f"This refinement is {verdict.grade}: {verdict.reasons}.", width)
            lines = [*filter(None, lines), *words]
            style.setdefault("fontsize", "medium")
    figure.suptitle("\n".join(lines), **style)


def _draw_points(
    figure: Figure,
    axis: Any,
    scores: np.ndarray,
    good: np.ndarray,
    components: tuple[int, int],
    names: list[str],
    title: str,
) -> None:
    """Particles on two components, as points or as their density; a histogram where one exists.

    Those that are not `good` (N,) are crosses, or left out.
    """
    as_points = scores.shape[1] > 1 and len(scores) < _MAX_POINTS
    axis.set_xlabel(names[components[0]])
    axis.set_title(title)
    if not good.all():
        how = "grey crosses, or outside" if as_points else "left out"
        words = f"{title}\n{(~good).sum():,} flagged as junk: {how}"
        axis.set_title(words, size="medium")
    if scores.shape[1] == 1:
        axis.hist(scores[good, 0], bins=40, color=CHAIN_COLORS[0])
        axis.set_ylabel("particles")
        return
    x, y = scores[:, components].T
    axis.set_ylabel(names[components[1]])
    if as_points:
        axis.plot(x[good], y[good], ".", color=CHAIN_COLORS[0], alpha=0.4, markersize=4)
        _draw_crosses(axis, x[~good], y[~good])
        return
    density = axis.hexbin(x[good], y[good], gridsize=40, mincnt=1, cmap="viridis")
    figure.colorbar(density, label="particles", ax=axis)


def _draw_crosses(axis: Axes, x: np.ndarray, y: np.ndarray) -> None:
    """Junk (k,), behind all else, and no reason to show more of the plane."""
    if len(x):
        axis.set(xlim=axis.get_xlim(), ylim=axis.get_ylim())
        axis.plot(x, y, "x", color=_JUNK_COLOR, markersize=3, mew=0.8, zorder=1)


def _component_names(motions: PrincipalMotions) -> list[str]:
    shares = motions.explained_variance_ratio
    return [f"PC{k + 1} (Å, {100 * share:.0f} %)" for k, share in enumerate(shares)]


def _root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


@checked
def plot_check(check: Check) -> Figure:
    """What a check looked at: significances, how well images match, and directions of view.

    Left, how many standard errors better (right of the line) or worse the best other reading of the
    table fits, the poses of other particles among them, and how far the pixel size is off; in the
    middle the match of every image with the reference's projection, 1 for the middle one; right the
    directions that particles are seen from, in the frame of the reference.

    Parameters
    ----------
    check : Check
        Of ``cryochains.check``.
    """
    figure, axes = new_figure(1, 3, 13, 4.2)
    _draw_significances(axes[0, 0], check)
    match = check.match[np.isfinite(check.match)]
    axes[0, 1].hist(match, bins=30, color=CHAIN_COLORS[0])
    axes[0, 1].axvline(0, color="0.6", lw=1)
    axes[0, 1].set(xlabel="match with the reference (0 noise, 1 the middle)", ylabel="images")
    x, y, z = check.directions.T
    axes[0, 2].plot(np.degrees(np.arctan2(y, x)), z, ".", color=CHAIN_COLORS[0], markersize=3)
    axes[0, 2].set(
        xlim=(-180, 180),
        ylim=(-1, 1),
        xticks=[-180, -90, 0, 90, 180],
        xlabel="longitude of the view (°)",
        ylabel="height of the view (equal areas)",
    )
    color = GRADE_COLORS[_STATUS_GRADES[check.status]]
    lines = wrap(check.problem, _PROBLEM_WIDTH) or ["nothing has to be mended first"]
    title = f"Check of {check.n_images:,} images: {check.status}"
    figure.suptitle("\n".join([title, *lines]), color=color, fontsize="medium")
    return figure


def _draw_significances(axis: Axes, check: Check) -> None:
    """A bar an item whose significance is known; to the right, another reading fits better."""
    items = [item for item in check.items if np.isfinite(item.significance)][::-1]
    values = [_SIGNED.get(item.name, float)(item.significance) for item in items]
    colors = [GRADE_COLORS[_STATUS_GRADES[item.status]] for item in items]
    names = ["other particles' poses" if item.name == "reference" else item.name for item in items]
    axis.barh(names, values, color=colors)
    axis.set_xscale("symlog", linthresh=5)
    low, high = axis.get_xlim()
    ticks = [tick for tick in _SIGNIFICANCE_TICKS if low <= tick <= high]
    axis.set_xticks(ticks, [str(tick) for tick in ticks])
    axis.xaxis.set_minor_locator(NullLocator())
    axis.axvline(0, color="k", lw=0.8)
    axis.set_xlabel("standard errors (right: fits better than as given)")
