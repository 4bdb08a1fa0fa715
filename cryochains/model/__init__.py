"""How a molecule moves and how it is seen: dynamics, microscope, simulation.

- `rotations`: rotation vectors, matrices and superposition.
- `dynamics`: latents → coordinates: modes, turn and shift of every chain.
- `frames`: conformation versus pose, the same conformations in another frame.
- `microscope`: coordinates → images: projection, shift and CTF.
- `model`: `Model`, structure, dynamics and microscope together.
- `population`: `Population`, what all particles of a data set share, and the elastic prior.
- `truth`: `Truth`, what a simulation knows of its particles.
- `simulation`: images of known conformations, poses, CTFs and noise.
- `storage`: a model as tensors and JSON.
"""

from .dynamics import KINDS, ChainLayout, Dynamics
from .frames import (
    FrameJacobian,
    InFrame,
    can_change_frame,
    frame_jacobian,
    in_frame,
    superposed,
)
from .microscope import Microscope
from .model import Model, beads_of, require_same_images, require_same_model
from .population import (
    PRETRAINED_FOLDER,
    ElasticPrior,
    Population,
    elastic_prior,
    elastic_variance,
    load_population,
    mode_limit,
    require_population,
    shrink_covariance,
    with_less_rest,
)
from .rotations import matrix_to_rotvec, rotvec_to_matrix
from .simulation import simulate_particles
from .storage import pack_model, unpack_model
from .truth import Truth

__all__ = [
    "KINDS",
    "PRETRAINED_FOLDER",
    "ChainLayout",
    "Dynamics",
    "ElasticPrior",
    "FrameJacobian",
    "InFrame",
    "Microscope",
    "Model",
    "Population",
    "Truth",
    "beads_of",
    "can_change_frame",
    "elastic_prior",
    "elastic_variance",
    "frame_jacobian",
    "in_frame",
    "load_population",
    "matrix_to_rotvec",
    "mode_limit",
    "pack_model",
    "require_population",
    "require_same_images",
    "require_same_model",
    "rotvec_to_matrix",
    "shrink_covariance",
    "simulate_particles",
    "superposed",
    "unpack_model",
    "with_less_rest",
]
