"""The anisotropic network model of a set of nodes: its springs and its softest motions.

Symbols: coords (n, 3) in Å; H → `_hessian`. See `modes`, which asks for the modes of every body.
"""

import numpy as np
from scipy import sparse
from scipy.linalg import eigh, orth
from scipy.sparse.csgraph import connected_components
from scipy.sparse.linalg import LinearOperator, eigsh, splu
from scipy.spatial import cKDTree

# Motions with smaller eigenvalues meet no resistance; the softest real modes are near 1e-3.
_LEAST_EIGENVALUE = 1e-6
# Å, the largest cutoff that is tried for a network that falls into pieces, and the steps to it.
_WIDEST_CUTOFF = 25.0
_CUTOFF_STEP = 2.5
# Å: nodes nearer than this are two copies of one atom.
_LEAST_DISTANCE = 1e-3
# Bodies of more nodes never need a dense (3n, 3n) matrix; sparse is faster from about there.
_SPARSE_ABOVE = 500


def solve_modes(coords: np.ndarray, k: int, cutoff: float) -> dict[str, np.ndarray]:
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
