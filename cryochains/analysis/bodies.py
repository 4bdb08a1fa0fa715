"""How far chains bend, and whether more bodies than chains would say it better."""

import numpy as np
import pandas as pd

from ..inference import Result
from ..molecule import rigid_fit

# Particles that are looked at.
_MOST_PARTICLES = 200
# Bodies are suggested where a chain bends by so many Å, and they express so much of it.
_LEAST_BENDING = 1.5
_LEAST_SHARE = 0.6


def bending_table(result: Result) -> pd.DataFrame:
    """One row a body of the model: how far it bends, and how much of that its domains would say.

    Columns "chain"; "bending (Å)", RMS over its residues and particles after each conformation of
    the chain was superposed on the reference; "bodies", the domains that `Structure.as_domains`
    cuts it into with the residues of each; and "expressed (%)", the share of the squared bending
    that turns and shifts of these domains make, 0 where there is no cut.

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
    structure = result.model.structure
    rows = np.flatnonzero(result.shows_molecule)
    if not len(rows):
        raise ValueError(
            f"expected particles that show the molecule, got none in {result!r}; try other images"
        )
    rows = rows[:: -(-len(rows) // _MOST_PARTICLES)]
    # Of atoms: those of a residue move as its node does.
    atom_of_node = np.searchsorted(structure.rows, structure.node_rows)
    moved = result.decode(rows).double().numpy()[:, atom_of_node]
    domains = structure.as_domains()
    resnums = structure.atoms.getResnums()[structure.node_rows]
    table = []
    for number, chain in enumerate(structure.chain_ids):
        own = structure.node_chain == number
        reference = structure.node_coords[own]
        body = domains.node_chain[own]
        parts = {domains.chain_ids[d]: body == d for d in np.unique(body)}
        bending = left = 0.0
        for coords in moved[:, own]:
            bending += _squares_left(reference, coords)
            left += sum(_squares_left(reference[p], coords[p]) for p in parts.values())
        cut = len(parts) > 1 and bending > 0
        of_residues = {name: resnums[own][p] for name, p in parts.items()}
        names = [f"{name} {of.min()}–{of.max()}" for name, of in of_residues.items()]
        table.append(
            {
                "chain": chain,
                "bending (Å)": (bending / (len(rows) * own.sum())) ** 0.5,
                "bodies": ", ".join(names),
                "expressed (%)": 100 * (1 - left / bending) if cut else 0.0,
            }
        )
    return pd.DataFrame(table)


def suggest_bodies(result: Result) -> str:
    """Which chains bend by much, and nearly as two or more rigid parts would turn and shift.

    Empty where there is none. See `bending_table`.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Model, Result, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=2, box_size=32, pixel_size=5.0)
    >>> suggest_bodies(Result(model, torch.zeros(5, 16)))
    ''
    """
    table = bending_table(result)
    asks = (table["bending (Å)"] > _LEAST_BENDING) & (table["expressed (%)"] > 100 * _LEAST_SHARE)
    sentences = [
        f"chain {row['chain']} bends by {row['bending (Å)']:.1f} Å; {row['bodies']} as bodies of "
        f"their own would express {row['expressed (%)']:.0f} % of that"
        for _, row in table[asks].iterrows()
    ]
    if not sentences:
        return ""
    return f'{"; ".join(sentences)}: try load_structure(…, bodies="domains").'


def _squares_left(reference: np.ndarray, coords: np.ndarray) -> float:
    """Å², summed over nodes, after the best superposition."""
    rotation, translation = rigid_fit(reference, coords)
    return float(np.square(reference @ rotation.T + translation - coords).sum())
