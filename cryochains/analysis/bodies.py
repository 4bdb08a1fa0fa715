"""How far chains bend, and whether more bodies than chains would say it better."""

import numpy as np
import pandas as pd

from .._arguments import checked
from ..inference import Result, measure_bending

# Particles that are looked at.
_MOST_PARTICLES = 200


@checked
def bending_table(result: Result) -> pd.DataFrame:
    """One row a body of the model: how far it bends, and how much of that its domains would say.

    Columns "chain"; "bending (Å)", RMS over its residues and particles after each conformation of
    the chain was superposed on the reference; "bodies", the domains that `Structure.as_domains`
    cuts it into with the residues of each; and "expressed (%)", the share of the squared bending
    that turns and shifts of these domains make, 0 where there is no cut. Where bodies of their own
    would say it, the result's verdict suggests them.

    Parameters
    ----------
    result : Result

    Raises
    ------
    ValueError
        When no particle shows the molecule, or the molecule is in pieces.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Model, Result, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=2, box_size=32, pixel_size=5.0)
    >>> weights = torch.zeros(5, 16)
    >>> weights[:, 0] = torch.arange(5.0)  # Å (RMS) along the softest mode of A
    >>> table = bending_table(Result(model, weights))
    >>> table["bending (Å)"].round(1).tolist(), table["bodies"].tolist()
    ([2.4, 0.0], ['A 2–380', 'B 2–380'])
    """
    rows = np.flatnonzero(result.shows_molecule)
    if not len(rows):
        raise ValueError(
            f"expected particles that show the molecule, got none in {result!r}; try other images"
        )
    rows = rows[:: -(-len(rows) // _MOST_PARTICLES)]
    domains = result.model.structure.as_domains()
    bodies = measure_bending(result.model, result.latents[rows], domains)
    return pd.DataFrame(
        {
            "chain": [body.chain for body in bodies],
            "bending (Å)": [body.size for body in bodies],
            "bodies": [", ".join(body.domains) for body in bodies],
            "expressed (%)": [100 * body.expressed for body in bodies],
        }
    )
