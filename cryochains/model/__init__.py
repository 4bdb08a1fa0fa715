"""How a molecule moves and how it is seen: dynamics, microscope, simulation.

A `Model` is both together; a `Population` is what all particles of a data set share.
"""

from .dynamics import KINDS, ChainLayout, Dynamics, rotvec_to_matrix
from .microscope import Microscope
from .model import Model, require_same_images, require_same_model
from .population import (
    ElasticPrior,
    Population,
    elastic_prior,
    elastic_variance,
    load_population,
    mode_limit,
    require_population,
    shrink_covariance,
)
from .simulation import simulate_particles
from .storage import pack_model, unpack_model
from .truth import Truth

__all__ = [
    "KINDS",
    "ChainLayout",
    "Dynamics",
    "ElasticPrior",
    "Microscope",
    "Model",
    "Population",
    "Truth",
    "elastic_prior",
    "elastic_variance",
    "load_population",
    "mode_limit",
    "pack_model",
    "require_population",
    "require_same_images",
    "require_same_model",
    "rotvec_to_matrix",
    "shrink_covariance",
    "simulate_particles",
    "unpack_model",
]
