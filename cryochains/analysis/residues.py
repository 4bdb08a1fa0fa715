"""Residues as the images show them: how much of each is seen, and what is beside it."""

import numpy as np
import pandas as pd

from .._arguments import checked
from ..inference import Result
from ..molecule import compare_beads


@checked
def density_table(result: Result) -> pd.DataFrame:
    """One row a residue: how much of it the images show, and density that the reference lacks.

    Columns "chain", "residue", "name", "occupancy" (1 is what the structure should give; 0 a
    residue that is not seen) and "beside (residues)", density next to it that no residue of the
    reference explains, in mean residues. All occupancies are 1 where the images did not ask for
    another density.

    Parameters
    ----------
    result : Result
        Refined.

    Raises
    ------
    ValueError
        When the result has no population, as of an encoder.

    Examples
    --------
    >>> from cryochains import Model, load_structure, refine, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> result = refine(
    ...     Model(closed, particles, modes=None), particles, blurs=(4.0, 0.0), progress=False
    ... )
    >>> density_table(result).head(1)
      chain  residue name  occupancy  beside (residues)
    0     A        2  PHE        1.0                0.0
    """
    if result.population is None:
        raise ValueError(f"expected a refined result, got {result!r}; try refine")
    structure = result.model.structure
    occupancy, beside = np.ones(structure.n_nodes), np.zeros(structure.n_nodes)
    if result.population.beads is not None:
        occupancy, beside = compare_beads(structure, result.model.beads, result.population.beads)
    atoms, rows = structure.atoms, structure.node_rows
    return pd.DataFrame(
        {
            "chain": np.array(structure.chain_ids)[structure.node_chain],
            "residue": atoms.getResnums()[rows],
            "name": atoms.getResnames()[rows],
            "occupancy": occupancy,
            "beside (residues)": beside,
        }
    )
