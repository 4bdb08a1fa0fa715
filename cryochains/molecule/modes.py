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
from scipy import sparse
from scipy.linalg import eigh, orth
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from scipy.spatial import cKDTree

from .._files import atomic_path, content_digest
from .sources import cache_folder
from .structure import Structure

# Motions with smaller eigenvalues meet no resistance; the softest real modes are near 1e-3.
_LEAST_EIGENVALUE = 1e-6
# Å, the largest cutoff that is tried for a network that falls into pieces, and the steps to it.
_WIDEST_CUTOFF = 25.0
_CUTOFF_STEP = 2.5
# Å: nodes nearer than this are two copies of one atom.
_LEAST_DISTANCE = 1e-3
# Bodies of more nodes never need a dense (3n, 3n) matrix; sparse is faster from about there.
_SPARSE_ABOVE = 500
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
        solution = (_cached_modes if cache else _solve_modes)(coords, k, cutoff)
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
    solution = _solve_modes(coords, k, cutoff)
    # A cache that cannot be written costs time, nothing else.
    with suppress(OSError, ValueError), atomic_path(path) as part:
        np.savez(part, allow_pickle=False, **solution)
    return solution


def _solve_modes(coords: np.ndarray, k: int, cutoff: float) -> dict[str, np.ndarray]:
    """Modes at the cutoff, or at the first wider one that leaves no motion without resistance."""
    n = len(coords)
    if k == 0:
        return {
            "vectors": np.zeros((0, n, 3)),
            "eigenvalues": np.zeros(0),
            "cutoff": np.array(cutoff),
        }
    distances, _ = cKDTree(coords).query(coords, k=2)
    if distances[:, 1].min() < _LEAST_DISTANCE:
        raise ValueError(
            "expected every node at a position of its own, got two at one; try the file for "
            "doubled chains"
        )
    rigid = _rigid_motions(coords)
    used = cutoff
    while True:
        solved = _solve_at_cutoff(coords, rigid, k, used)
        if solved is not None:
            break
        if used >= _WIDEST_CUTOFF:
            raise ValueError(
                f"expected nodes that hold together, got a network of {n} nodes in pieces even at "
                f"{used} Å; try fewer chains or residues in one body"
            )
        used = min(used + _CUTOFF_STEP, _WIDEST_CUTOFF)
    eigenvalues, vectors = solved
    # The sign of an eigenvector is arbitrary; fixed, results can be compared between runs and
    # machines.
    largest = np.abs(vectors).argmax(0)
    vectors = vectors * np.sign(vectors[largest, np.arange(k)])
    return {
        "vectors": vectors.T.reshape(k, n, 3),
        "eigenvalues": eigenvalues,
        "cutoff": np.array(float(used)),
    }


def _solve_at_cutoff(
    coords: np.ndarray, rigid: np.ndarray, k: int, cutoff: float
) -> tuple[np.ndarray, np.ndarray] | None:
    """Eigenvalues (k,) and vectors (3n, k), or None where something moves without resistance."""
    n = len(coords)
    pairs = cKDTree(coords).query_pairs(cutoff, output_type="ndarray")
    graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(n, n))
    n_pieces, _ = connected_components(graph, directed=False)
    if n_pieces > 1:
        return None
    solver = _soft_modes_sparse if n > _SPARSE_ABOVE else _soft_modes_dense
    eigenvalues, vectors = solver(_hessian(coords, pairs), rigid, k)
    if eigenvalues[0] <= _LEAST_EIGENVALUE:
        return None
    return eigenvalues, vectors


def _hessian(coords: np.ndarray, pairs: np.ndarray) -> sparse.csc_matrix:
    """(3n, 3n) second derivatives of Σ ½ (distance − rest)² over `pairs`, at rest."""
    i, j = pairs.T
    direction = coords[j] - coords[i]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    # One row a spring: how much longer it gets when each coordinate of its two nodes moves.
    columns = 3 * pairs[:, :, None] + np.arange(3)
    values = np.stack([-direction, direction], axis=1)
    starts = np.arange(0, values.size + 1, 6)
    springs = sparse.csr_matrix(
        (values.ravel(), columns.ravel(), starts), shape=(len(pairs), coords.size)
    )
    return (springs.T @ springs).tocsc()


def _rigid_motions(coords: np.ndarray) -> np.ndarray:
    """(3n, 6 or fewer) orthonormal basis of the translations and infinitesimal rotations."""
    offsets = coords - coords.mean(0)
    axes = np.eye(3)
    shifts = np.tile(axes, (len(coords), 1))
    turns = np.stack([np.cross(axis, offsets).ravel() for axis in axes], 1)
    return orth(np.concatenate([shifts, turns], 1))


def _soft_modes_dense(
    hessian: sparse.csc_matrix, rigid: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    dense = hessian.toarray()
    # Rigid motions are lifted above every mode: what is left is orthogonal to them to rounding.
    dense += np.abs(dense).sum(0).max() * (rigid @ rigid.T)
    return eigh(dense, subset_by_index=(0, k - 1), overwrite_a=True, check_finite=False)


def _soft_modes_sparse(
    hessian: sparse.csc_matrix, rigid: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Shift-invert Lanczos in the space without rigid motions."""
    size = hessian.shape[0]
    # Makes the matrix definite; well below the stiffness of springs, near the softest modes.
    shift = 1e-3
    factor = splu(
        (hessian + shift * sparse.identity(size, format="csc")).tocsc(),
        permc_spec="MMD_AT_PLUS_A",
        diag_pivot_thresh=0.0,
        options={"SymmetricMode": True},
    )

    def without_rigid(x: np.ndarray) -> np.ndarray:
        return x - rigid @ (rigid.T @ x)

    def solve(x: np.ndarray) -> np.ndarray:
        return without_rigid(factor.solve(without_rigid(x.ravel())))

    inverse = LinearOperator((size, size), matvec=solve)
    start = without_rigid(np.random.default_rng(0).standard_normal(size))
    inverted, vectors = eigsh(inverse, k=k, which="LA", v0=start)
    order = np.argsort(-inverted)
    return 1 / inverted[order] - shift, vectors[:, order]


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
