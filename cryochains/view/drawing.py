"""What several figures share: empty figures, backbones, and the direction to look from."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from ..analysis import CHAIN_COLORS, PrincipalMotions
from ..molecule import Structure

# Of a refinement's verdict, by its grade: dark enough to read on white.
GRADE_COLORS = {"good": "#00704F", "doubtful": "#A85F00", "not to be trusted": "#C0182B"}
# Å, no line is drawn between nodes farther apart: residues are missing there, or a chain ends.
_LONGEST_BOND = 8.0
# Chains that a legend names; of more it would cover the picture.
_MOST_IN_LEGEND = 8


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Figure, np.ndarray]:
    """An empty figure of `width` × `height` inches and its (rows, columns) axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    # Notebooks draw pyplot's figures only, which are global state: these bring their own picture.
    figure._repr_png_ = partial(figure_png, figure)  # type: ignore[attr-defined]
    return figure, figure.subplots(rows, columns, squeeze=False)


def figure_png(figure: Figure) -> bytes:
    """The picture of a figure as a PNG file."""
    stream = BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def chain_color(chain: int) -> str:
    """Colour of chain number `chain`, from 0."""
    return CHAIN_COLORS[chain % len(CHAIN_COLORS)]


def facing(along: np.ndarray) -> np.ndarray:
    """(3, 3) rotation that lays most of the directions `along` (k, 3) across the picture, then up.

    It is no mirror image.
    """
    directions = np.linalg.svd(along, full_matrices=False)[2]
    return directions * np.linalg.det(directions)


@torch.no_grad()
def decode_nodes(motions: PrincipalMotions, latents: torch.Tensor) -> np.ndarray:
    """(m, n_nodes, 3) Å, the nodes at (m, p) `latents`."""
    structure = motions.model.structure
    coords = motions.model.decode(latents).numpy()
    return coords[:, np.isin(structure.rows, structure.node_rows)]


def view_along(coords: np.ndarray, displacement: np.ndarray) -> np.ndarray:
    """(m, n_nodes, 3) `coords`, centred and turned so that `displacement` lies across."""
    return (coords - coords.mean((0, 1))) @ facing(displacement).T


def name_ends(motions: PrincipalMotions, latents: torch.Tensor, component: int, last: str) -> str:
    """Title that says from which to which score of a component (m, p) `latents` run."""
    low, high = motions.transform(latents)[[0, -1], component]
    return f"PC{component + 1} of {motions.label}: {low:+.1f} Å (pale) to {high:+.1f} Å {last}"


def draw_backbones(
    axes: Sequence[Any] | np.ndarray,
    structure: Structure,
    view: np.ndarray,
    extent: float | None = None,
) -> None:
    """Conformations (m, n_nodes, 3) in Å, pale to dark, from the front and from below.

    What is far away is paler. Nodes that are NaN are left out; the picture shows what is nearer to
    its centre than `extent` in Å, by default all nodes.
    """
    extent = float(1.05 * np.nanmax(np.abs(view))) if extent is None else extent
    bonds = np.stack([view[:, :-1], view[:, 1:]], axis=2)
    # No line from chain to chain, nor across residues that are missing.
    bonded = np.diff(structure.node_chain) == 0
    bonded &= np.linalg.norm(bonds[0, :, 1] - bonds[0, :, 0], axis=-1) < _LONGEST_BOND
    chains = structure.node_chain[:-1][bonded]
    colors = np.array([to_rgb(chain_color(chain)) for chain in chains])
    # The coordinates across and up, and the direction towards the viewer.
    sides = (([0, 1], [0, 0, 1]), ([0, 2], [0, -1, 0]))
    shares = np.linspace(1, 0.2, len(view))[::-1]
    for axis, (side, toward) in zip(axes, sides, strict=False):
        for share, lines in zip(shares, bonds[:, bonded], strict=True):
            depth = lines.mean(1) @ toward
            order = np.argsort(depth)
            near = 0.75 + 0.25 * np.clip(depth / extent, -1, 1)
            faded = 1 - near[:, None] * (1 - colors)
            segments = LineCollection(
                lines[order][..., side], colors=faded[order], alpha=share, lw=1.5
            )
            axis.add_collection(segments)
        limits = (-extent, extent)
        axis.set(aspect="equal", xlim=limits, ylim=limits, xlabel="Å", ylabel="Å")
    _draw_chain_legend(axes[0], structure, chains)


def _draw_chain_legend(axis: Axes, structure: Structure, chains: np.ndarray) -> None:
    if structure.n_chains > _MOST_IN_LEGEND:
        return
    # A movie draws its backbones many times on the same axes.
    if not axis.lines:
        for chain in dict.fromkeys(chains.tolist()):
            label = f"chain {structure.chain_ids[chain]}"
            axis.plot([], color=chain_color(chain), label=label)
    axis.legend(fontsize="small")
