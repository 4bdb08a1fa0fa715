"""What a result says: principal motions, tables, words, conformations in files, points on a screen.

Modules, each importing only from those before it: `colors` (of chains, in all figures and scripts),
`motions` (principal components of the latents, and the latents in units people read), `words` (a
motion in sentences), `conformations` (latents as files of atoms), `densities` (latents as volumes),
`points` (density, columns and error bars of particles that are drawn as points; selections as
files), `residues` (density of each residue as the images show it), `bodies` (how far chains bend),
`maps` (conformations against a map that never saw the atoms), `halves` (two refinements that share
no particle).
"""

from .bodies import bending_table
from .colors import CHAIN_COLORS
from .conformations import decode_ensemble, save_conformations
from .densities import save_densities
from .halves import HalvesComparison, compare_halves
from .maps import EndsComparison, MapComparison, compare_ends, compare_with_map, split_noise
from .motions import KIND_GROUPS, PrincipalMotions, compute_pca, latent_names, latent_table
from .points import (
    atom_uncertainty,
    average_covariance,
    component_errors,
    decode_one,
    particle_columns,
    point_density,
    save_selection,
)
from .residues import density_table
from .words import describe_motion, motion_sentence

__all__ = [
    "CHAIN_COLORS",
    "KIND_GROUPS",
    "EndsComparison",
    "HalvesComparison",
    "MapComparison",
    "PrincipalMotions",
    "atom_uncertainty",
    "average_covariance",
    "bending_table",
    "compare_ends",
    "compare_halves",
    "compare_with_map",
    "component_errors",
    "compute_pca",
    "decode_ensemble",
    "decode_one",
    "density_table",
    "describe_motion",
    "latent_names",
    "latent_table",
    "motion_sentence",
    "particle_columns",
    "point_density",
    "save_conformations",
    "save_densities",
    "save_selection",
    "split_noise",
]
