"""Particle images: projection of atoms, the CTF, and stacks of particles in RELION's files.

- `projection`: atoms in Å → images and their derivatives; filters, random poses, noise.
- `ctf`: the contrast transfer function of each particle.
- `stacks`: images in memory or in .mrcs files, of which only those asked for are read.
- `relion`: RELION's tables (.star), converted to this library's conventions and back.
- `particles`: `ParticleStack`, the images with what is known of each.
"""

from .ctf import CTF
from .particles import Batch, ParticleStack, load_particles, plain_ids
from .projection import (
    filter_images,
    gaussian_transfer,
    noise_std_for_snr,
    pixel_grid,
    project,
    project_tangents,
    random_rotations,
)
from .relion import write_particles
from .stacks import positions

__all__ = [
    "CTF",
    "Batch",
    "ParticleStack",
    "filter_images",
    "gaussian_transfer",
    "load_particles",
    "noise_std_for_snr",
    "pixel_grid",
    "plain_ids",
    "positions",
    "project",
    "project_tangents",
    "random_rotations",
    "write_particles",
]
