"""From images to latents: the refinement, the paper's encoder, and scores against a known truth."""

from .encoder import Encoder, EncoderNetwork, encode, load_encoder
from .identity import require_count, require_same_ids
from .likelihood import NormalEquations, measure_contrast, normal_equations, position_variance
from .refinement import refine
from .result import Result, load_result, posterior_covariance
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

__all__ = [
    "Encoder",
    "EncoderNetwork",
    "NormalEquations",
    "Result",
    "Scores",
    "correlation",
    "encode",
    "information_limit",
    "load_encoder",
    "load_result",
    "measure_contrast",
    "normal_equations",
    "position_variance",
    "posterior_covariance",
    "refine",
    "require_count",
    "require_same_ids",
    "rmsd",
    "score",
    "train_encoder",
    "true_latents",
    "true_population",
]
