"""Normal modes of the anisotropic network model (Appendix A of the paper), body by body.

Symbols of the paper: U_k → `Modes.vectors`, λ_k → `Modes.eigenvalues`, K → `n_modes`, the Hessian
H = Σ over pairs of nodes nearer than `cutoff` of the spring between them, all springs alike
(Atilgan et al. 2001, Biophys. J. 80, 505; spring constant 1). The six rigid motions are taken out:
`Dynamics` has its own. ``compute_modes(structure.as_one_body(), 100)`` gives modes of the whole
assembly.
"""

import warnings
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from .._files import atomic_path, content_digest
from .network import solve_modes
from .sources import cache_folder
from .structure import Structure

# Part of the cache's keys: raise it when the numbers change.
_CACHE_VERSION = 2


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


def compute_modes(
    structure: Structure,
    n_modes: int | Sequence[int] = 50,
    cutoff: float = 15.0,
    cache: bool = True,
) -> Modes:
    """The softest modes of every body, each a network of its own.

    Parameters
    ----------
    structure
        Its nodes carry the network.
    n_modes
        How many modes, for all bodies alike or one number a body.
    cutoff
        Å, the greatest distance of two nodes that a spring joins. Widened, with a warning, up to
        25 Å for a body that would fall into pieces or have parts that swing freely.
    cache
        Keep the modes on disk by content and take them from there.

    Returns
    -------
    Modes

    Raises
    ------
    ValueError
        When a body of n nodes is asked for more than 3n − 6 modes, or is in pieces even at 25 Å.

    Examples
    --------
    >>> from cryochains import compute_modes, load_structure
    >>> compute_modes(load_structure("glua3-open"), n_modes=5)
    Modes(A: 5, B: 5)
    """
    counts = _modes_per_body(structure, n_modes)
    if not cutoff > 0:
        raise ValueError(f"expected a cutoff above 0 Å, got {cutoff}; try 15")
    vectors = []
    eigenvalues = []
    for c, (chain, k) in enumerate(zip(structure.chain_ids, counts, strict=True)):
        coords = structure.node_coords[structure.node_chain == c]
        most = max(3 * len(coords) - 6, 0)
        if k > most:
            raise ValueError(
                f"expected at most {most} modes for the {len(coords)} nodes of chain {chain}, "
                f"got {k}; try {most} or fewer"
            )
        solution = (_cached_modes if cache else solve_modes)(coords, k, cutoff)
        used = float(solution["cutoff"])
        if used > cutoff:
            warnings.warn(
                f"the network of chain {chain} is loose at a cutoff of {cutoff} Å; its modes use "
                f"{used} Å",
                stacklevel=2,
            )
        vectors.append(solution["vectors"])
        eigenvalues.append(solution["eigenvalues"])
    return Modes(tuple(vectors), tuple(eigenvalues), structure.chain_ids, structure.content_hash)


def _modes_per_body(structure: Structure, n_modes: int | Sequence[int]) -> list[int]:
    counts = list(n_modes) if np.iterable(n_modes) else [n_modes] * structure.n_chains
    whole = all(isinstance(k, (int, np.integer)) and k >= 0 for k in counts)
    if len(counts) != structure.n_chains or not whole:
        raise ValueError(
            f"expected a number of modes for each of {structure.n_chains} chains, got "
            f"{n_modes!r}; try 50"
        )
    return counts


def _cached_modes(coords: np.ndarray, k: int, cutoff: float) -> dict[str, np.ndarray]:
    key = content_digest(_CACHE_VERSION, coords, k, float(cutoff))
    path = cache_folder() / "modes" / f"{key}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            solution = dict(stored)
        if solution["vectors"].shape == (k, len(coords), 3):
            return solution
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # absent or damaged: the modes are computed again
    solution = solve_modes(coords, k, cutoff)
    # A cache that cannot be written costs time, nothing else.
    with suppress(OSError, ValueError), atomic_path(path) as part:
        np.savez(part, allow_pickle=False, **solution)
    return solution


def find_chain(structure: Structure, modes: Modes, chain: str | None = None, mode: int = 0) -> int:
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
