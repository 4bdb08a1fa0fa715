"""How far chains bend, and how much of it more bodies than chains would say."""

from dataclasses import dataclass

import numpy as np

from .._arguments import LatentRows, checked
from ..model import Model
from ..molecule import Structure, rigid_fit


@dataclass(frozen=True)
class _ChainBending:
    """Of one body of the model.

    Attributes
    ----------
    chain : str
    size : float
        Å, RMS over residues and conformations, each superposed on the reference.
    domains : tuple of str
        Rigid parts that it could be cut into, with their residues; one where there is no cut.
    expressed : float
        Share of the squared bending that turns and shifts of these parts make.
    """

    chain: str
    size: float
    domains: tuple[str, ...]
    expressed: float


@checked
def measure_bending(
    model: Model, latents: LatentRows, domains: Structure | None
) -> tuple[_ChainBending, ...]:
    """How far each body bends in conformations `latents` (n, p).

    `domains` is ``model.structure.as_domains()``; None where nobody asks for cuts.
    """
    structure = model.structure
    # Of atoms: those of a residue move as its node does.
    atom_of_node = np.searchsorted(structure.rows, structure.node_rows)
    moved = model.decode(latents).double().cpu().numpy()[:, atom_of_node]
    resnums = structure.atoms.getResnums()[structure.node_rows]
    whole = structure if domains is None else domains
    bodies = []
    for number, chain in enumerate(structure.chain_ids):
        own = structure.node_chain == number
        reference = structure.node_coords[own]
        body = whole.node_chain[own]
        parts = {whole.chain_ids[d]: body == d for d in np.unique(body)}
        squares = _squares_left(reference, moved[:, own])
        left = sum(
            (_squares_left(reference[p], moved[:, own][:, p]) for p in parts.values()), start=0.0
        )
        of_residues = {name: resnums[own][p] for name, p in parts.items()}
        names = [f"{name} {of.min()}–{of.max()}" for name, of in of_residues.items()]
        cut = len(parts) > 1 and squares > 0
        size = (squares / (len(moved) * own.sum())) ** 0.5
        bodies.append(_ChainBending(chain, size, tuple(names), 1 - left / squares if cut else 0.0))
    return tuple(bodies)


def _squares_left(reference: np.ndarray, moved: np.ndarray) -> float:
    """Å², summed over nodes and conformations, each after its best superposition."""
    total = 0.0
    for coords in moved:
        rotation, translation = rigid_fit(reference, coords)
        total += float(np.square(reference @ rotation.T + translation - coords).sum())
    return total
