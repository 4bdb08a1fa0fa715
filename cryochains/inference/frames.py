"""Conformation versus pose: latents, error bars and poses of particles in another frame.

"poses" is the frame of the given poses: in it a turn or shift that all chains share is among the
latents. "molecule", and the id of a chain, are frames without it (see `in_frame`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..images import ParticleStack
from ..model import FrameJacobian, InFrame, Model, can_change_frame, frame_jacobian, in_frame

POSES = "poses"
MOLECULE = "molecule"
# Particles whose derivatives, p² numbers each, are held at a time.
_DERIVATIVES_AT_A_TIME = 256


@dataclass(frozen=True, eq=False, repr=False)
class PoseCorrection:
    """How the given poses change in another frame; what ``Result.pose_correction`` is.

    The corrected rotation of a particle is Rᵢ R, its shift sᵢ plus `shifts`.

    Attributes
    ----------
    frame : str
    turns : (N, 3) array
        Rotation vectors of R in radians, about the molecule's own axes.
    shifts : (N, 2) array or None
        (x, y) on the image, Å; None of a result without its particles.
    turn_covariance, shift_covariance : (N, 3, 3) and (N, 2, 2) arrays, or None
        Of error bars as if latents were independent; None where they are not known.
    """

    frame: str
    turns: np.ndarray
    shifts: np.ndarray | None
    turn_covariance: np.ndarray | None
    shift_covariance: np.ndarray | None

    @property
    def angles(self) -> np.ndarray:
        """(N,) angle of each turn in radians."""
        return np.linalg.norm(self.turns, axis=1)

    @property
    def angle_std(self) -> np.ndarray | None:
        """(N,) error bar of `angles` in radians."""
        return _error_of_length(self.turns, self.turn_covariance)

    @property
    def distances(self) -> np.ndarray | None:
        """(N,) length of each shift in Å."""
        return None if self.shifts is None else np.linalg.norm(self.shifts, axis=1)

    @property
    def distance_std(self) -> np.ndarray | None:
        """(N,) error bar of `distances` in Å."""
        return None if self.shifts is None else _error_of_length(self.shifts, self.shift_covariance)

    @property
    def turn_std(self) -> np.ndarray | None:
        """(N, 3) error bars of `turns` in radians."""
        return _errors(self.turn_covariance)

    @property
    def shift_std(self) -> np.ndarray | None:
        """(N, 2) error bars of `shifts` in Å."""
        return _errors(self.shift_covariance)

    def __len__(self) -> int:
        return len(self.turns)

    def __repr__(self) -> str:
        parts = [f"{len(self):,} particles", frame_words(self.frame)]
        if len(self):
            parts.append(f"turns of {np.degrees(np.square(self.angles).mean() ** 0.5):.2f}°")
            if self.distances is not None:
                parts.append(f"shifts of {np.square(self.distances).mean() ** 0.5:.2f} Å")
        return f"PoseCorrection({', '.join(parts)} RMS)"


def chosen_frame(model: Model, frame: str | None, own: str = POSES) -> str:
    """The frame that is asked for; None is a result's `own`.

    For "poses" it is that of the molecule, where the model has it.
    """
    if frame is not None:
        return frame
    return _internal_frame(model) if own == POSES else own


def _internal_frame(model: Model) -> str:
    """That of the molecule, where chains turn and shift and can differ by more than a pose."""
    dynamics = model.dynamics
    moves_within = len(dynamics.chains) > 1 or dynamics.modes is not None
    return MOLECULE if can_change_frame(dynamics) and moves_within else POSES


def frame_words(frame: str) -> str:
    """Such as "frame of the molecule".

    Examples
    --------
    >>> frame_words("poses"), frame_words("A")
    ('frame of the poses', 'frame of chain A')
    """
    return f"frame of {f'the {frame}' if frame in (POSES, MOLECULE) else f'chain {frame}'}"


def corrected_particles(particles: ParticleStack, seen: InFrame, model: Model) -> ParticleStack:
    """The particles with the poses that belong to latents in another frame."""
    shifts = seen.image_shifts(particles.rotations, model.microscope.origin)
    return replace(
        particles,
        rotations=particles.rotations.double() @ seen.rotations,
        shifts=particles.shifts + shifts,
    )


def std_in_frame(model: Model, latents: Tensor, std: Tensor, frame: str) -> Tensor:
    """(N, p) error bars in another frame: √diag(J diag(std²) Jᵀ).

    As if the given error bars were independent.
    """
    errors = torch.empty(std.shape)
    for rows, by_given in _derivatives(model, latents, frame):
        variance = std[rows].double().square().unsqueeze(-1)
        errors[rows] = (by_given.latents.square() @ variance).squeeze(-1).sqrt().float()
    return errors


def pose_correction(
    model: Model,
    latents: Tensor,
    std: Tensor | None,
    particles: ParticleStack | None,
    frame: str,
) -> PoseCorrection:
    """Of latents, error bars and particles in the frame of the poses."""
    origin = model.microscope.origin
    seen = in_frame(model.dynamics, latents, frame)
    rotations = torch.eye(3).expand(len(latents), 3, 3)
    shifts = None
    if particles is not None:
        rotations = particles.rotations
        shifts = seen.image_shifts(rotations, origin).numpy()
    turn_covariance = None
    shift_covariance = None
    if std is not None:
        turn_covariance = np.empty((len(latents), 3, 3))
        shift_covariance = np.empty((len(latents), 2, 2))
        for rows, by_given in _derivatives(model, latents, frame):
            variance = std[rows].double().square().unsqueeze(1)
            turns_by_z, shifts_by_z = by_given.pose(rotations[rows], origin)
            turn_covariance[rows] = ((turns_by_z * variance) @ turns_by_z.mT).numpy()
            shift_covariance[rows] = ((shifts_by_z * variance) @ shifts_by_z.mT).numpy()
    return PoseCorrection(
        frame,
        seen.turns.numpy(),
        shifts,
        turn_covariance,
        None if particles is None else shift_covariance,
    )


def _derivatives(
    model: Model, latents: Tensor, frame: str
) -> Iterator[tuple[slice, FrameJacobian]]:
    for start in range(0, len(latents), _DERIVATIVES_AT_A_TIME):
        rows = slice(start, start + _DERIVATIVES_AT_A_TIME)
        yield rows, frame_jacobian(model.dynamics, latents[rows], frame)


def _errors(covariance: np.ndarray | None) -> np.ndarray | None:
    return None if covariance is None else np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))


def _error_of_length(vectors: np.ndarray, covariance: np.ndarray | None) -> np.ndarray | None:
    """(N,) √(vᵀ C v) along each vector's direction; of a vector of zero along any."""
    if covariance is None:
        return None
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    still = np.full_like(vectors, vectors.shape[1] ** -0.5)
    directions = np.where(lengths > 0, vectors / np.where(lengths > 0, lengths, 1), still)
    return np.sqrt(np.einsum("nk,nkl,nl->n", directions, covariance, directions))
