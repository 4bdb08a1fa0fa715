"""Movies of the backbones, without a browser: GIF, or MP4 where ffmpeg is installed."""

from pathlib import Path

import numpy as np
import torch

from .._files import atomic_path
from ..analysis import PrincipalMotions
from .drawing import decode_nodes, draw_backbones, name_ends, new_figure, view_along

MOVIE_SUFFIXES = (".gif", ".mp4")
# Dots an inch: 720 × 384 px.
_MOVIE_DPI = 80


def save_movie(
    path: Path,
    motions: PrincipalMotions,
    component: int,
    n: int,
    percentiles: tuple[float, float],
    fps: int,
) -> None:
    """Write a movie of the backbones moving along a component and back in `n` frames.

    One end stays, pale, as a comparison; the view is that of `plot_conformations`.

    Raises
    ------
    ValueError
        For another suffix, fewer than two frames, a component that does not exist, a folder that
        cannot be written, or an MP4 where the program ffmpeg is not found.
    """
    # Takes as long to import as all other figures together.
    from matplotlib.animation import FFMpegWriter, PillowWriter

    suffix = path.suffix.lower()
    if suffix not in MOVIE_SUFFIXES or n < 2:
        raise ValueError(
            "expected a path that ends in .gif or .mp4 and two frames or more, got "
            f"{path.name}, n={n}; try {path.stem}.gif, n=21"
        )
    if suffix == ".mp4" and not FFMpegWriter.isAvailable():
        raise ValueError(
            f"expected the program ffmpeg, which writes MP4, got none; try {path.stem}.gif"
        )
    ends = motions.traverse(component, 2, percentiles)
    coords = decode_nodes(motions, _there_and_back(ends, n))
    view = view_along(coords, coords[n // 2] - coords[0])
    extent = float(1.05 * np.abs(view).max())
    figure, axes = new_figure(1, 2, 9, 4.8)
    figure.suptitle(name_ends(motions, ends, component, "and back"))
    structure = motions.model.structure
    draw_backbones(axes[0], structure, view[:1], extent)
    # Laid out once, so that the camera stands still.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    writer = PillowWriter(fps=fps) if suffix == ".gif" else FFMpegWriter(fps=fps)
    with atomic_path(path) as part, writer.saving(figure, str(part), dpi=_MOVIE_DPI):
        for frame in view:
            _remove_backbones(axes[0])
            draw_backbones(axes[0], structure, np.stack([view[0], frame]), extent)
            writer.grab_frame()


def _there_and_back(ends: torch.Tensor, n: int) -> torch.Tensor:
    """(n, p) latents from the first of two `ends` (2, p) to the second and back.

    Slow at the ends; the first follows the last.
    """
    share = (1 - torch.cos(2 * torch.pi * torch.arange(n) / n))[:, None] / 2
    return torch.lerp(ends[:1], ends[1:], share)


def _remove_backbones(axes: np.ndarray) -> None:
    for axis in axes:
        for lines in list(axis.collections):
            lines.remove()
