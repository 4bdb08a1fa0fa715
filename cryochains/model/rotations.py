"""Rotations: vectors and matrices, their derivatives, and the superposition of two sets of points.

Symbols: ω → `rotvec`, whose direction is the axis and whose length the angle in radians;
R = exp([ω]×), with [ω]× v = ω × v.
"""

import torch
from scipy.spatial.transform import Rotation
from torch import Tensor


def rotvec_to_matrix(rotvec: Tensor) -> Tensor:
    """(b, 3, 3) rotation matrix of (b, 3) rotation vectors in radians (Rodrigues' formula).

    Differentiable at zero.
    """
    cross = cross_matrix(rotvec)
    squared = (rotvec * rotvec).sum(-1)[:, None, None]
    small = squared < 1e-6
    half = torch.where(small, torch.ones_like(squared), squared).sqrt() / 2
    # sin θ/θ and (1 − cos θ)/θ² = ½ (sin(θ/2)/(θ/2))², which does not cancel.
    first = torch.where(small, 1 - squared / 6, (2 * half).sin() / (2 * half))
    second = torch.where(small, 0.5 - squared / 24, 0.5 * (half.sin() / half) ** 2)
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return identity + first * cross + second * (cross @ cross)


def matrix_to_rotvec(matrix: Tensor) -> Tensor:
    """(b, 3) shortest rotation vector in radians of (b, 3, 3) rotation matrices."""
    rotvecs = Rotation.from_matrix(matrix.double().cpu().numpy()).as_rotvec()
    return torch.from_numpy(rotvecs).to(matrix)


def cross_matrix(vector: Tensor) -> Tensor:
    """(b, 3, 3) matrix [v]× with [v]× x = v × x."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [zero, -z, y, z, zero, -x, -y, x, zero]
    return torch.stack(rows, dim=-1).view(-1, 3, 3)


def right_jacobian(rotvec: Tensor) -> Tensor:
    """(b, 3, 3) J with exp([ω + δ]×) ≈ exp([ω]×) exp([J δ]×)."""
    squared = (rotvec * rotvec).sum(-1)[:, None, None]
    small = squared < 1e-6
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    first = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe)
    second = torch.where(small, 1 / 6 - squared / 120, (angle - angle.sin()) / (safe * angle))
    cross = cross_matrix(rotvec)
    identity = torch.eye(3, dtype=rotvec.dtype, device=rotvec.device)
    return identity - first * cross + second * (cross @ cross)


def best_rotation(products: Tensor) -> Tensor:
    """(b, 3, 3) rotation R with which Σ ‖x − R y‖² is least (Kabsch 1976).

    `products` (b, 3, 3) is Σ x yᵀ over centred points.
    """
    left, _, right = torch.linalg.svd(products)
    # A reflection would lie nearer where the points are almost flat.
    sign = torch.linalg.det(left @ right)
    last = torch.ones_like(products[:, 0])
    last[:, 2] = sign
    return (left * last.unsqueeze(1)) @ right
