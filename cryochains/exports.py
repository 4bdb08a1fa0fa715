"""What leaves the notebook in the colours of `plots`: movies without a browser, and ChimeraX scripts."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FFMpegWriter, PillowWriter

from .dynamics import Dynamics
from .files import atomic_path
from .latent import PrincipalMotions, save_ensemble
from .plots import COLORS, decode_nodes, draw_backbones, facing, name_ends, new_figure
from .sources import pdb_letters


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
    coords = decode_nodes(motions, torch.lerp(*ends[:, None], share))
    view = (coords - coords.mean((0, 1))) @ facing(coords[n // 2] - coords[0]).T
    reach = 1.05 * np.abs(view).max()
    figure, axes = new_figure(1, 2, 9, 4.8)
    figure.suptitle(name_ends(motions, ends, component, "and back"))
    structure = motions.dynamics.structure
    draw_backbones(axes[0], structure, view[:1], reach)
    # Laid out once, so that the camera stands still.
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    writer = (PillowWriter if path.suffix == ".gif" else FFMpegWriter)(fps=fps)
    with atomic_path(path) as part, writer.saving(figure, str(part), dpi=80):
        for frame in view:
            for lines in [lines for axis in axes[0] for lines in axis.collections]:
                lines.remove()
            draw_backbones(axes[0], structure, np.stack([view[0], frame]), reach)
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
