"""A principal motion as a file, in the format of its suffix."""

import os
from pathlib import Path

from .._arguments import Angstroms, Count, Ordinal, Percent, checked
from ..analysis import PrincipalMotions, save_conformations, save_densities
from .movies import MOVIE_SUFFIXES, save_movie

_CONFORMATION_SUFFIXES = (".pdb", ".cif", ".dcd", ".cxc")
_DENSITY_SUFFIX = ".mrc"


@checked
def save_motion(
    path: str | os.PathLike,
    motions: PrincipalMotions,
    component: Ordinal = 0,
    *,
    n: Count = 21,
    percentiles: tuple[Percent, Percent] = (5, 95),
    fps: Count = 15,
    resolution: Angstroms | None = None,
) -> Path:
    """Write the motion along a component, in the format of the suffix of `path`.

    Parameters
    ----------
    path : path
        - .pdb, .cif: conformations of all atoms as models; .dcd: as frames.
        - .cxc: a ChimeraX script with a slider along the conformations and, beside it, the PDB or
          mmCIF file that it opens, of x.cxc x-models.pdb.
        - .mrc: densities of all atoms, of x.mrc x-001.mrc, x-002.mrc and so on, on one grid that
          lies over the atoms of x.pdb. ``open x-*.mrc vseries true`` in ChimeraX shows them as a
          volume series with a slider.
        - .gif, .mp4: a movie of the backbones, there and back; MP4 needs the program ffmpeg.
    motions : PrincipalMotions
    component : int
        0 is PC1.
    n : int
        Conformations, or frames of the movie.
    percentiles : tuple of float
        Of the particles' scores, from and to which the motion goes.
    fps : int
        Frames a second of a movie.
    resolution : float, optional
        Of densities, Å: where the transform of an atom falls to 1/e, as in ChimeraX's molmap. By
        default two pixels of the particles, and at least 5 Å.

    Returns
    -------
    Path
        `path`; of densities the first file.

    Raises
    ------
    ValueError
        For another suffix, a component that does not exist, or a folder that cannot be written; for
        a resolution that is not positive, too fine for the size of the molecule, or of no density.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Model, Result, compute_pca, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> motions = compute_pca(Result(model, torch.randn(50, 12)))
    >>> save_motion("results/doc/pc1.cxc", motions).name
    'pc1.cxc'
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if resolution is not None and suffix != _DENSITY_SUFFIX:
        raise ValueError(
            f"expected a path that ends in .mrc for resolution=, got {path.name}; try it without"
        )
    if suffix == _DENSITY_SUFFIX:
        latents = motions.traverse(component, n, percentiles)
        return save_densities(path, motions.model, latents, resolution)[0]
    if suffix in MOVIE_SUFFIXES:
        save_movie(path, motions, component, n, percentiles, fps)
    elif suffix in _CONFORMATION_SUFFIXES:
        save_conformations(path, motions.model, motions.traverse(component, n, percentiles))
    else:
        suffixes = ", ".join((*_CONFORMATION_SUFFIXES, _DENSITY_SUFFIX, *MOVIE_SUFFIXES))
        raise ValueError(
            f"expected a path that ends in one of {suffixes}, got {path.name}; "
            f"try {path.name.split('.')[0] or 'motion'}.pdb"
        )
    return path
