"""CryoChains: how the chains of a molecule move, from cryo-EM particle images, inside a notebook.

The road through the package, one module a step: a structure (`load_structure`, `match_structures`, `morph`), its
normal modes (`compute_modes`), particle images (`load_particles`, `simulate_particles`), a model (`CryoChains`),
the paper's encoder (`fit`) or the refinement (`refine`), the principal motions (`compute_pca`), the scores
(`score_motion`, `information_limit`), figures (`cryochains.plots`), and a molecule that moves (`explore`).

Conventions: Å; radians inside, degrees where a person reads; rotations act on column vectors, x' = R x; projection
along z; images (batch, y, x) with the origin at pixel ``box_size // 2``; protein-bright.
"""

from importlib import import_module

from .dynamics import Dynamics
from .imaging import CTF, Imaging
from .inference import posterior_covariance, refine
from .latent import PrincipalMotions, compute_pca, decode_ensemble, latent_table, save_ensemble
from .matching import match_structures, morph, superpose
from .metrics import Scores, correlation, information_limit, rmsd, score_motion, true_latents, true_population
from .model import CryoChains
from .modes import Modes, compute_modes
from .particles import ParticleStack, load_particles
from .population import Population, Refinement
from .pretrained import load_pretrained, save_pretrained
from .screws import Screw, change_sentence, describe_change, describe_motion, motion_sentence, screw_motion
from .simulation import Truth, simulate_particles
from .structure import Structure, load_structure
from .training import Epoch, encode_particles, fit

__version__ = "0.1.0"

# Imported when they are asked for: widgets need the extras [lab], and everything else works without them.
LATER = {
    "explore": "explorer", "save_chimerax": "exports", "save_movie": "exports", "view_modes": "widgets",
    "view_structure": "widgets",
}  # fmt: skip

__all__ = [
    "CTF", "CryoChains", "Dynamics", "Epoch", "Imaging", "Modes", "ParticleStack", "Population", "PrincipalMotions",
    "Refinement", "Scores", "Screw", "Structure", "Truth", "change_sentence", "compute_modes", "compute_pca",
    "correlation", "decode_ensemble", "describe_change", "describe_motion", "encode_particles", "fit",
    "information_limit", "latent_table", "load_particles", "load_pretrained", "load_structure", "match_structures",
    "morph", "motion_sentence", "posterior_covariance", "refine", "rmsd", "save_ensemble", "save_pretrained",
    "score_motion", "screw_motion", "simulate_particles", "superpose", "true_latents", "true_population",
]  # fmt: skip


def __getattr__(name: str):
    if name in LATER:
        return getattr(import_module(f".{LATER[name]}", __name__), name)
    raise AttributeError(f"module 'cryochains' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *LATER])
