"""From images to latents: the refinement, the paper's encoder, and scores against a known truth.

- `identity`: whether particles, ids and latents belong together.
- `frames`: conformation versus pose, latents and poses in another frame.
- `likelihood`: images linearised around latents: normal equations, widths of atoms.
- `image_model`: what an image has of its own: brightness, noise, whether it shows the molecule.
- `result`: `Result`, the latents with error bars and all that gives them a meaning, in one file.
- `posterior`: a particle's posterior, from its linearised image and the prior.
- `reference`: what is wrong with the reference: the density and the shape that images ask for.
- `docking`: where images show the reference, and how large; how images are compared.
- `search`: where bodies that may turn by any angle are, before a refinement.
- `check`: `check`, whether particles and reference belong together, before a refinement.
- `gate`, `averaging`: latents that follow the view; posterior means of particles hardly known.
- `folder`: a run's folder: what was asked, a log, what is known after each pass, a lock.
- `run`: what is known of particles while they are refined, and what of it a run's folder keeps.
- `expectation`: EM on linearised images. `passes`: one look after the other at the images.
- `restarts`: particles that are stuck, lost, or hardly known.
- `leading`: quick answers of particles whose population is known.
- `refinement`: `refine`, latents by maximum a posteriori under a population learned by EM.
- `bending`: how far chains bend, and how much of it more bodies than chains would say.
- `verdict`: what speaks against a refinement, without a truth.
- `scores`: scores against a known truth, and the information limit.
- `encoder`: the paper's network, image → latents, and `Encoder`, which `encode` uses.
- `training`: `train_encoder`, by the images' mean squared error alone.
- `residuals`: what decides of an image whose pose and population are known.
- `residual_encoder`: `ResidualEncoder`, a network that is given just that.
- `residual_training`: `train_residual_encoder`, on particles drawn from a population.
"""

from .bending import measure_bending
from .check import Check, CheckItem, check
from .encoder import Encoder, EncoderNetwork, encode, load_encoder
from .frames import PoseCorrection, frame_words
from .identity import require_count, require_finite_latents, require_same_ids
from .image_model import measure_contrast
from .likelihood import NormalEquations, normal_equations, position_variance
from .reference import correct_reference
from .refinement import estimate, refine, remove_run_states
from .residual_encoder import ResidualEncoder, ResidualNetwork
from .residual_training import train_residual_encoder
from .result import RESULT_FILE, Result, load_result, posterior_covariance
from .scores import (
    Scores,
    correlation,
    information_limit,
    rmsd,
    score,
    true_latents,
    true_population,
)
from .training import train_encoder
from .verdict import Finding, Verdict

__all__ = [
    "RESULT_FILE",
    "Check",
    "CheckItem",
    "Encoder",
    "EncoderNetwork",
    "Finding",
    "NormalEquations",
    "PoseCorrection",
    "ResidualEncoder",
    "ResidualNetwork",
    "Result",
    "Scores",
    "Verdict",
    "check",
    "correct_reference",
    "correlation",
    "encode",
    "estimate",
    "frame_words",
    "information_limit",
    "load_encoder",
    "load_result",
    "measure_bending",
    "measure_contrast",
    "normal_equations",
    "position_variance",
    "posterior_covariance",
    "refine",
    "remove_run_states",
    "require_count",
    "require_finite_latents",
    "require_same_ids",
    "rmsd",
    "score",
    "train_encoder",
    "train_residual_encoder",
    "true_latents",
    "true_population",
]
