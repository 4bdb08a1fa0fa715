"""Principal motions in words: which chain turns or shifts, about which axis, and what bends."""

import pandas as pd

from .._arguments import Ordinal, Percent, checked
from ..molecule import change_sentence, describe_change
from .motions import PrincipalMotions


@checked
def describe_motion(
    motions: PrincipalMotions,
    component: Ordinal = 0,
    percentiles: tuple[Percent, Percent] = (5, 95),
) -> pd.DataFrame:
    """Motion of every chain seen from every other along a component: `describe_change` of its ends.

    Parameters
    ----------
    motions : PrincipalMotions
    component : int
        0 is PC1.
    percentiles : tuple of float
        Of the particles' scores, from and to which the motion is described.

    Raises
    ------
    ValueError
        For a component that does not exist.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Model, Result, compute_pca, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> shifts = torch.eye(12)[11] * torch.arange(5)[:, None]
    >>> motions = compute_pca(Result(model, shifts))
    >>> describe_motion(motions, percentiles=(0, 100))["shift (Å)"].round(2).tolist()
    [4.0, 4.0]
    """
    ends = motions.traverse(component, 2, percentiles)
    before, after = motions.model.decode(ends).numpy()
    return describe_change(motions.model.structure, before, after)


@checked
def motion_sentence(
    motions: PrincipalMotions,
    component: Ordinal = 0,
    percentiles: tuple[Percent, Percent] = (5, 95),
) -> str:
    """One to three short sentences that say what a component does, as of `describe_motion`.

    What is doubtful of the refinement is said first; where it is not to be trusted, only that.

    Parameters
    ----------
    motions : PrincipalMotions
    component : int
        0 is PC1.
    percentiles : tuple of float
        Of the particles' scores, from and to which the motion is described.

    Raises
    ------
    ValueError
        For a component that does not exist.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Model, Result, compute_pca, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> shifts = torch.eye(12)[11] * torch.arange(5)[:, None]
    >>> motion_sentence(compute_pca(Result(model, shifts)), percentiles=(0, 100))
    'PC1: chain B shifts 4.0 Å relative to chain A; 100 % of its motion is rigid.'
    """
    name = f"PC{component + 1}"
    verdict = motions.result.verdict
    if verdict is not None and not verdict.trusted:
        return f"{name}: not described, since the refinement is {verdict.grade}: {verdict.reasons}."
    table = describe_motion(motions, component, percentiles)
    if verdict is not None and verdict.reasons:
        return f"{name}: (doubtful: {verdict.reasons}) {change_sentence(table)}"
    return f"{name}: {change_sentence(table)}"
