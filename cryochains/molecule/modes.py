"""Normal modes of an elastic network (Appendix A of the paper), body by body.

Symbols of the paper: U_k → `Modes.vectors`, λ_k → `Modes.eigenvalues`, K → `n_modes`, the Hessian
H = Σ over pairs of nodes nearer than `cutoff` of the spring between them. The paper's springs are
all alike, "anm"; by default neighbours in the sequence hold each other firmly, "edenm": see
`network`. The six rigid motions are taken out: `Dynamics` has its own.
``compute_modes(structure.as_one_body(), 100)`` gives modes of the whole assembly.
"""

import warnings
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from .._arguments import Angstroms, Ordinal, checked
from .._files import atomic_path, content_digest
from .network import Backbone, edenm_cutoff, solve_modes
from .sources import cache_folder
from .structure import Structure

# Part of the cache's keys: raise it when the numbers change.
_CACHE_VERSION = 4
_SPRINGS = ("edenm", "anm")
# Å, of ANM by default.
_ANM_CUTOFF = 15.0


@dataclass(frozen=True, eq=False)
class Modes:
    """Normal modes of every body of a structure.

    Attributes
    ----------
    vectors
        Per body (K, n_nodes, 3): orthonormal over the body's nodes, free of rigid motion, softest
        first.
    eigenvalues
        Per body (K,), ascending and positive; the variance of a mode's weight goes as the inverse.
    chain_ids
        Names of the bodies.
    structure_hash
        `Structure.content_hash` of the structure they belong to.
    """

    vectors: tuple[np.ndarray, ...]
    eigenvalues: tuple[np.ndarray, ...]
    chain_ids: tuple[str, ...]
    structure_hash: str

    @property
    def n_modes(self) -> tuple[int, ...]:
        """Number of modes of every body."""
        return tuple(len(values) for values in self.eigenvalues)

    def __repr__(self) -> str:
        pairs = zip(self.chain_ids, self.n_modes, strict=True)
        return f"Modes({', '.join(f'{chain}: {k}' for chain, k in pairs)})"


@checked
def compute_modes(
    structure: Structure,
    n_modes: Ordinal | Sequence[Ordinal] = 50,
    cutoff: Angstroms | None = None,
    cache: bool = True,
    springs: str = "edenm",
) -> Modes:
    """The softest modes of every body, each a network of its own.

    Parameters
    ----------
    structure
        Its nodes carry the network.
    n_modes
        How many modes, for all bodies alike or one number a body.
    cutoff
        Å, the greatest distance of two nodes that a spring joins, but for neighbours in the
        sequence; by default 15 of "anm", and 2.9 ln n − 2.9, at least 8, of "edenm" with n nodes.
        Widened, with a warning, up to 25 Å for a body that would fall into pieces or have parts
        that swing freely.
    cache
        Keep the modes on disk by content and take them from there.
    springs
        - "edenm" (Orellana et al. 2010, J. Chem. Theory Comput. 6, 2910): 60/S² between residues
          that are S ≤ 3 apart by their numbers in an unbroken stretch of a chain, else (6 Å/r)⁶ at
          distance r. Residues that few others touch are light, H u = λ M u, lest loose ends be the
          softest modes.
        - "anm" (Atilgan et al. 2001, Biophys. J. 80, 505): 1 at all distances, as in the paper.

    Returns
    -------
    Modes

    Notes
    -----
    "edenm" was chosen by the share of a real change that 20 and 50 modes express, the mean over 22
    changes of chains (GluA3, GABA-B and adenylate kinase between two states, copies of a chain in
    four crystals; both ways), and by how many of 30 modes move less than a tenth of their chain:
    0.53, 0.61 and 0.1; "anm" 0.51, 0.60 and 6.0. With all residues as heavy, "edenm" has 0.53, 0.62
    and 0.6; Hinsen's springs have 0.52, 0.63 and 1.1, REACH 0.51, 0.62 and 1.2, pfANM 0.49, 0.59
    and 6.7.

    Raises
    ------
    ValueError
        When a body of n nodes is asked for more than 3n − 6 modes, or is in pieces even at 25 Å, or
        there are no such springs.

    Examples
    --------
    >>> from cryochains import compute_modes, load_structure
    >>> compute_modes(load_structure("glua3-open"), n_modes=5)
    Modes(A: 5, B: 5)
    """
    counts = _modes_per_body(structure, n_modes)
    if springs not in _SPRINGS:
        raise ValueError(f"expected springs {' or '.join(_SPRINGS)}, got {springs!r}; try 'edenm'")
    vectors = []
    eigenvalues = []
    for c, (chain, k) in enumerate(zip(structure.chain_ids, counts, strict=True)):
        nodes = np.flatnonzero(structure.node_chain == c)
        most = max(3 * len(nodes) - 6, 0)
        if k > most:
            raise ValueError(
                f"expected at most {most} modes for the {len(nodes)} nodes of chain {chain}, "
                f"got {k}; try {most} or fewer"
            )
        backbone = _backbone(structure, nodes) if springs == "edenm" else None
        default = _ANM_CUTOFF if backbone is None else edenm_cutoff(len(nodes))
        asked = float(default if cutoff is None else cutoff)
        solve = _cached_modes if cache else solve_modes
        solution = solve(structure.node_coords[nodes], k, asked, backbone)
        used = float(solution["cutoff"])
        if used > asked:
            warnings.warn(
                f"the network of chain {chain} is loose at a cutoff of {asked:.1f} Å; its modes "
                f"use {used:.1f} Å",
                stacklevel=3,
            )
        vectors.append(solution["vectors"])
        eigenvalues.append(solution["eigenvalues"])
    return Modes(tuple(vectors), tuple(eigenvalues), structure.chain_ids, structure.content_hash)


def _backbone(structure: Structure, nodes: np.ndarray) -> Backbone:
    """Of a body's nodes (n,), which stand in a row."""
    return Backbone(structure.bonded_to_next[nodes[:-1]], structure.node_sizes[nodes])


def _modes_per_body(structure: Structure, n_modes: int | Sequence[int]) -> list[int]:
    counts = [n_modes] * structure.n_chains if isinstance(n_modes, int) else list(n_modes)
    if len(counts) != structure.n_chains:
        raise ValueError(
            f"expected a number of modes for each of {structure.n_chains} chains, got "
            f"{n_modes!r}; try 50"
        )
    return counts


def _cached_modes(
    coords: np.ndarray, k: int, cutoff: float, backbone: Backbone | None
) -> dict[str, np.ndarray]:
    sequence = () if backbone is None else (backbone.follows, backbone.size)
    key = content_digest(_CACHE_VERSION, coords, k, float(cutoff), *sequence)
    path = cache_folder() / "modes" / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            solution = dict(stored)
        if solution["vectors"].shape == (k, len(coords), 3):
            return solution
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged: the modes are computed again
    solution = solve_modes(coords, k, cutoff, backbone)
    # A cache that cannot be written costs time, nothing else.
    with suppress(OSError, ValueError), atomic_path(path) as part:
        np.savez(part, allow_pickle=False, **solution)
    return solution


@checked
def find_chain(
    structure: Structure, modes: Modes, chain: str | None = None, mode: Ordinal = 0
) -> int:
    """Number of the chain with this id, by default the first.

    Raises
    ------
    ValueError
        When the modes are of another structure, or the chain or its mode does not exist.

    Examples
    --------
    >>> from cryochains import compute_modes, load_structure
    >>> structure = load_structure("glua3-open")
    >>> find_chain(structure, compute_modes(structure, n_modes=2), "B", mode=1)
    1
    """
    if modes.structure_hash != structure.content_hash:
        raise ValueError(
            f"expected modes of {structure!r}, got others; try compute_modes on this structure"
        )
    chain = structure.chain_ids[0] if chain is None else chain
    if chain not in structure.chain_ids:
        raise ValueError(
            f"expected a chain of {', '.join(structure.chain_ids)}, got {chain!r}; "
            "try None for the first"
        )
    number = structure.chain_ids.index(chain)
    if not 0 <= mode < modes.n_modes[number]:
        raise ValueError(
            f"expected a mode from 0 to {modes.n_modes[number] - 1}, got {mode}; "
            "try 0, the softest, or compute_modes with more n_modes"
        )
    return number
