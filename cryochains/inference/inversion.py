"""Inverses of many small information matrices on a CPU, each while it is in the cache.

The sweep operator (Beaton 1964), eight pivots at a time. Swept by all its pivots a matrix A becomes
−A⁻¹; the pivots are those of a Cholesky factorisation, and their product is the determinant. It
takes p³/2 multiply-adds, all of them in one loop, and no second matrix. In single precision, with
every latent scaled to an information of 1: the images' information is no more precise.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .._compiled import compiled

# Pivots at a time: their rows stay in the first-level cache while every other row changes once.
_PIVOTS = 8
# Of an information of 1 that other latents leave a latent, no less is told in single precision from
# rounding.
_LEAST_PIVOT = 1e-4


def invert_information(
    hessian: Tensor, weight: Tensor, slope: Tensor, power: Tensor, precision: Tensor, last: Tensor
) -> tuple[Tensor, Tensor]:
    """(b, p + 1, p + 1) float64 inverses of w_i [H_i, s_i; s_iᵀ, f_i] + [P, 0; 0, t_i].

    Parameters
    ----------
    hessian : (b, p, p) tensor
        H_i, of which the lower triangle is read.
    weight : (b,) tensor
        w_i.
    slope : (b, p) tensor
        s_i.
    power : (b,) tensor
        f_i.
    precision : (p, p) tensor
        P.
    last : (b,) tensor
        t_i.

    Returns
    -------
    inverses : (b, p + 1, p + 1) float64 tensor
    log_determinants : (b,) float64 tensor
        Of the matrices; NaN where one is hardly positive definite, whose inverse is of no use.
    """
    b, p, _ = hessian.shape
    inverses = torch.empty(b, p + 1, p + 1, dtype=torch.float64)
    log_determinants = torch.empty(b, dtype=torch.float64)
    numbers = (weight.double(), slope.double(), power.double(), precision.double(), last.double())
    parts = (hessian, *numbers, inverses, log_determinants)
    _invert_each(*(part.contiguous().numpy() for part in parts))
    return inverses, log_determinants


@compiled
def _invert_each(
    hessian: np.ndarray,
    weight: np.ndarray,
    slope: np.ndarray,
    power: np.ndarray,
    precision: np.ndarray,
    last: np.ndarray,
    inverses: np.ndarray,
    log_determinants: np.ndarray,
) -> None:
    """`invert_information` into `inverses` and `log_determinants`."""
    p = len(precision)
    matrix = np.empty((p + 1, p + 1), dtype=np.float32)
    panel = np.empty((_PIVOTS, p + 1), dtype=np.float32)
    steps = np.empty((_PIVOTS, p + 1), dtype=np.float32)
    pivots = np.empty((_PIVOTS, _PIVOTS), dtype=np.float32)
    unit = np.empty(p + 1)
    for item in range(len(inverses)):
        w = weight[item]
        for i in range(p):
            unit[i] = w * hessian[item, i, i] + precision[i, i]
        unit[p] = w * power[item] + last[item]
        log_units = np.log(unit).sum()
        unit[:] = 1 / np.sqrt(unit)
        for i in range(p):
            own, shared, row = hessian[item, i], precision[i], matrix[i]
            for j in range(i + 1):
                row[j] = (w * own[j] + shared[j]) * unit[i] * unit[j]
            matrix[p, i] = w * slope[item, i] * unit[i] * unit[p]
        matrix[p, p] = 1
        log_determinants[item] = log_units + _sweep(matrix, panel, steps, pivots)
        _mirror_negative(matrix, unit, inverses[item])


@compiled
def _sweep(matrix: np.ndarray, panel: np.ndarray, steps: np.ndarray, pivots: np.ndarray) -> float:
    """Minus the inverse of a matrix, in its place; only lower triangles are read and written.

    Returns the logarithm of its determinant, or NaN. `panel` and `steps` (_PIVOTS, n) and `pivots`
    (_PIVOTS, _PIVOTS) are working memory.
    """
    n = len(matrix)
    log_determinant = 0.0
    for start in range(0, n, _PIVOTS):
        end = min(start + _PIVOTS, n)
        _take_panel(matrix, panel, start, end)
        for a in range(end - start):
            for b in range(end - start):
                pivots[a, b] = panel[a, start + b]
        log_determinant += _invert_pivots(pivots, end - start)
        if math.isnan(log_determinant):
            return log_determinant
        # Rows of pivots get no step.
        panel[:, start:end] = 0
        _make_steps(steps, panel, pivots, start, end)
        for i in range(n):
            _step_row(matrix[i, : i + 1], panel, steps[:, i])
        _put_panel(matrix, steps, pivots, start, end)
    return log_determinant


@compiled
def _make_steps(
    steps: np.ndarray, panel: np.ndarray, pivots: np.ndarray, start: int, end: int
) -> None:
    """The inverse of the pivots times the panel into `steps`."""
    steps[:] = 0
    for a in range(end - start):
        for b in range(end - start):
            factor = pivots[b, a]
            own, row = steps[a], panel[b]
            for i in range(len(own)):
                own[i] += factor * row[i]


@compiled
def _put_panel(
    matrix: np.ndarray, steps: np.ndarray, pivots: np.ndarray, start: int, end: int
) -> None:
    """Rows and columns of the pivots, after all others."""
    for a in range(end - start):
        matrix[start + a, :start] = steps[a, :start]
        for b in range(a + 1):
            matrix[start + a, start + b] = -pivots[a, b]
    for i in range(end, len(matrix)):
        for a in range(end - start):
            matrix[i, start + a] = steps[a, i]


@compiled
def _take_panel(matrix: np.ndarray, panel: np.ndarray, start: int, end: int) -> None:
    """Rows `start` to before `end` of the symmetric matrix; what is left of the panel is 0."""
    panel[end - start :] = 0
    for a in range(end - start):
        panel[a, : start + a + 1] = matrix[start + a, : start + a + 1]
    for i in range(start, len(matrix)):
        for a in range(min(end, i) - start):
            panel[a, i] = matrix[i, start + a]


@compiled
def _invert_pivots(pivots: np.ndarray, n: int) -> float:
    """The inverse of the first (n, n) of a matrix, in its place; the log determinant, or NaN."""
    log_determinant = 0.0
    for k in range(n):
        pivot = pivots[k, k]
        if not pivot > _LEAST_PIVOT:
            return math.nan
        log_determinant += math.log(pivot)
        for i in range(n):
            if i != k:
                factor = pivots[i, k] / pivot
                for j in range(n):
                    if j != k:
                        pivots[i, j] -= factor * pivots[k, j]
        for i in range(n):
            if i != k:
                pivots[i, k] /= pivot
                pivots[k, i] /= pivot
        pivots[k, k] = -1 / pivot
    pivots[:n, :n] *= -1
    return log_determinant


@compiled
def _step_row(row: np.ndarray, panel: np.ndarray, steps: np.ndarray) -> None:
    """Subtract Σ_a steps_a · panel_a from the row: the loop in which all the time goes."""
    n = len(row)
    s0, s1, s2, s3 = steps[0], steps[1], steps[2], steps[3]
    s4, s5, s6, s7 = steps[4], steps[5], steps[6], steps[7]
    p0, p1, p2, p3 = panel[0, :n], panel[1, :n], panel[2, :n], panel[3, :n]
    p4, p5, p6, p7 = panel[4, :n], panel[5, :n], panel[6, :n], panel[7, :n]
    for j in range(n):
        first = s0 * p0[j] + s1 * p1[j] + s2 * p2[j] + s3 * p3[j]
        row[j] -= first + s4 * p4[j] + s5 * p5[j] + s6 * p6[j] + s7 * p7[j]


@compiled
def _mirror_negative(matrix: np.ndarray, unit: np.ndarray, inverse: np.ndarray) -> None:
    """Minus the matrix of which the lower triangle is read, in units of its latents."""
    n = len(matrix)
    for start in range(0, n, _PIVOTS):
        end = min(start + _PIVOTS, n)
        for i in range(start, end):
            own, row = matrix[i], inverse[i]
            scale = -unit[i]
            for j in range(i + 1):
                row[j] = scale * unit[j] * own[j]
        for j in range(end):
            for i in range(max(start, j), end):
                inverse[j, i] = inverse[i, j]
