"""CryoChains: how the chains of a molecule move, from cryo-EM particle images, inside a notebook.

A structure (`load_structure`, `match_structures`, `morph`) and particle images (`load_particles`,
`simulate_particles`) make a model (`Model`). `refine` finds the latents of every particle: a
`Result`. Its principal motions (`compute_pca`), tables, words, scores, files and figures
(`cryochains.plots`) take that result, and `explore` shows it as a molecule that moves.

Packages, each importing only from those before it:

    molecule, images  <  model  <  inference  <  analysis  <  view

Conventions: Å; radians inside, degrees where a person reads; rotations act on column vectors,
x' = R x; projection along z; images (batch, y, x) with the origin at pixel ``box_size // 2``;
protein-bright.
"""

from importlib import import_module
from typing import TYPE_CHECKING
from warnings import warn

if TYPE_CHECKING:
    from .analysis import (
        compare_ends,
        compare_with_map,
        compute_pca,
        describe_motion,
        latent_table,
        motion_sentence,
    )
    from .images import ParticleStack, load_particles, reconstruct
    from .inference import (
        Result,
        check,
        encode,
        information_limit,
        load_result,
        refine,
        score,
        train_encoder,
    )
    from .model import Model, load_population, simulate_particles
    from .molecule import (
        compute_modes,
        load_structure,
        match_structures,
        morph,
        superpose,
    )
    from .view import explore, plots, save_motion, view_modes, view_structure

__version__ = "0.1.0"

# The table of contents: every public name and the package it is in. Packages are imported when a
# name is first used, since torch, ProDy and matplotlib take seconds.
_PACKAGE_OF = {
    "load_structure": "molecule",
    "match_structures": "molecule",
    "superpose": "molecule",
    "morph": "molecule",
    "compute_modes": "molecule",
    "load_particles": "images",
    "ParticleStack": "images",
    "reconstruct": "images",
    "simulate_particles": "model",
    "Model": "model",
    "load_population": "model",
    "check": "inference",
    "refine": "inference",
    "Result": "inference",
    "load_result": "inference",
    "train_encoder": "inference",
    "encode": "inference",
    "score": "inference",
    "information_limit": "inference",
    "compute_pca": "analysis",
    "latent_table": "analysis",
    "describe_motion": "analysis",
    "motion_sentence": "analysis",
    "compare_with_map": "analysis",
    "compare_ends": "analysis",
    "save_motion": "view",
    "explore": "view",
    "view_structure": "view",
    "view_modes": "view",
    "plots": "view",
}

# What was in the table before, still answered under its old name.
_MOVED = {
    "correct_reference": "inference",
    "density_table": "analysis",
    "describe_change": "molecule",
    "load_encoder": "inference",
}

__all__ = [  # the keys of _PACKAGE_OF, written out for type checkers
    "Model",
    "ParticleStack",
    "Result",
    "check",
    "compare_ends",
    "compare_with_map",
    "compute_modes",
    "compute_pca",
    "describe_motion",
    "encode",
    "explore",
    "information_limit",
    "latent_table",
    "load_particles",
    "load_population",
    "load_result",
    "load_structure",
    "match_structures",
    "morph",
    "motion_sentence",
    "plots",
    "reconstruct",
    "refine",
    "save_motion",
    "score",
    "simulate_particles",
    "superpose",
    "train_encoder",
    "view_modes",
    "view_structure",
]


def __getattr__(name: str) -> object:
    if name in _PACKAGE_OF.values():
        return import_module(f".{name}", __name__)
    if name in _MOVED:
        home = import_module(f".{_MOVED[name]}", __name__)
        warn(f"cryochains.{name} is now {home.__name__}.{name}", FutureWarning, stacklevel=2)
        return getattr(home, name)
    if name not in _PACKAGE_OF:
        raise AttributeError(f"module 'cryochains' has no attribute {name!r}")
    value = getattr(import_module(f".{_PACKAGE_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    own = {name for name in globals() if name.startswith("__")}
    return sorted({*own, *_PACKAGE_OF, *_PACKAGE_OF.values()})
