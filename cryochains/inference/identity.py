"""Whether particles, ids and latents belong together."""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..images import ParticleStack
from ..model import Model


def require_count(expected: int, got: int, what: str) -> None:
    """Raise ValueError when there is not one of `what` for each of the `expected` particles."""
    if expected != got:
        raise ValueError(
            f"expected {expected:,} {what}, one a row of latents, got {got:,}; "
            "try the same selection of both"
        )


def require_latents(latents: Tensor, n: int, model: Model, what: str) -> None:
    """Raise ValueError unless `latents` are finite and (n, p) of this model."""
    expected = (n, model.n_latents)
    if tuple(latents.shape) != expected:
        raise ValueError(
            f"expected finite {what} of shape {expected}, got {tuple(latents.shape)}; "
            "try those of these particles, one row each, or None"
        )
    bad = int((~torch.isfinite(latents)).any(1).sum())
    if bad:
        raise ValueError(
            f"expected finite {what}, got NaN or Inf in {bad:,} of {n:,} rows; try None"
        )


def require_finite_latents(latents: Tensor) -> None:
    """Raise ValueError when some particles' latents (N, p) are not finite."""
    # Sums of the columns hold every NaN, and need no copy of a million rows.
    if torch.isfinite(latents.sum(0)).all():
        return
    n_bad = int((~torch.isfinite(latents)).any(1).sum())
    raise ValueError(
        f"expected finite latents, got NaN or Inf in {n_bad:,} of {len(latents):,} particles; "
        "try result[torch.isfinite(result.latents).all(1)]"
    )


def require_same_ids(expected: Iterable, got: Iterable, what: str) -> None:
    """Raise ValueError when two lists of particles' ids are not the same in the same order."""
    expected, got = list(expected), list(got)
    if expected == got:
        return
    if len(expected) != len(got):
        raise ValueError(
            f"expected {len(expected):,} {what}, one for each particle, got {len(got):,}; "
            "try the same selection of both"
        )
    row = next(i for i, pair in enumerate(zip(expected, got, strict=True)) if pair[0] != pair[1])
    same = sorted(map(str, expected)) == sorted(map(str, got))
    order = "the same ones in another order" if same else "others"
    raise ValueError(
        f"expected {what} with the ids of the result, got {order}: row {row} is {got[row]!r} "
        f"instead of {expected[row]!r}; try load_result(path, particles), which finds them by id"
    )


def select_by_id(particles: ParticleStack, ids: Iterable) -> ParticleStack:
    """Those of `particles` with the given `ids`, in the order of the `ids`.

    Raises
    ------
    ValueError
        When an id is missing, or stands for several particles.
    """
    ids = list(ids)
    if list(particles.ids) == ids:
        return particles
    rows: dict = {}
    repeated = set()
    for row, name in enumerate(particles.ids):
        if name in rows:
            repeated.add(name)
        rows[name] = row
    missing = [name for name in ids if name not in rows]
    if missing:
        raise ValueError(
            f"expected particles with the ids of the result, got none with {len(missing):,} of "
            f"them, such as {missing[0]!r}; try the .star file that was refined"
        )
    ambiguous = [name for name in ids if name in repeated]
    if ambiguous:
        raise ValueError(
            f"expected one particle an id, got several with {ambiguous[0]!r}; "
            "try the particles in the order of the result"
        )
    return particles[[rows[name] for name in ids]]
