"""Particle images: projection of atoms, the CTF, and stacks of particles in files.

- `projection`: atoms in Å → images and their derivatives; filters, random poses, noise.
- `ctf`: the contrast transfer function of each particle.
- `stacks`: images in memory or in .mrcs files, of which only those asked for are read.
- `resampling`: images on another grid: Fourier cropping, other pixel sizes, undistorted axes.
- `star`: STAR files as text.
- `relion`: RELION's tables (.star), converted to this library's conventions and back.
- `cryosparc`: cryoSPARC's tables (.cs), likewise.
- `opening`: what is common to tables: finding images, comparing them with their headers.
- `particles`: `ParticleStack`, the images with what is known of each.
- `reconstruction`: a density map from images and poses alone, half maps and their correlation.
"""

from .ctf import CTF
from .particles import Batch, ParticleStack, load_particles, open_source, plain_ids, source_path
from .projection import (
    filter_images,
    gaussian_transfer,
    noise_std_for_snr,
    pixel_grid,
    project,
    random_rotations,
    transform_tangents,
)
from .reconstruction import (
    Map,
    compute_fsc,
    draw_volume,
    reconstruct,
    resolution_of,
    scale_shells,
    soft_sphere,
    sum_shells,
    transform_volume,
    untransform_volume,
    write_volume,
)
from .relion import write_particles
from .stacks import positions

__all__ = [
    "CTF",
    "Batch",
    "Map",
    "ParticleStack",
    "compute_fsc",
    "draw_volume",
    "filter_images",
    "gaussian_transfer",
    "load_particles",
    "noise_std_for_snr",
    "open_source",
    "pixel_grid",
    "plain_ids",
    "positions",
    "project",
    "random_rotations",
    "reconstruct",
    "resolution_of",
    "scale_shells",
    "soft_sphere",
    "source_path",
    "sum_shells",
    "transform_tangents",
    "transform_volume",
    "untransform_volume",
    "write_particles",
    "write_volume",
]
