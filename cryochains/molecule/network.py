"""The elastic network of a set of nodes: its springs and its softest motions.

Symbols: coords (n, 3) in Å; r, distance of two nodes; S, residues from one to the other; H →
`_hessian`; M → `contact_weights`. Two kinds of springs:

- ANM: spring constant 1 wherever r is below the cutoff.
- edENM (Orellana et al. 2010, J. Chem. Theory Comput. 6, 2910): 60 / S² for S up to 3 in an
  unbroken stretch of a chain, whatever r is; else (6 Å / r)⁶ below the cutoff. Here nodes that few
  others touch, such as loose ends, are light: H u = λ M u.

See `modes`, which asks for the modes of every body.
"""

from dataclasses import dataclass

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
# edENM: the spring of neighbours in the sequence, how many residues apart neighbours are at most,
# and the distance in Å at which the spring of two other nodes is 1.
_BOND_SPRING = 60.0
_NEIGHBOURS = 3
_UNIT_SPRING_DISTANCE = 6.0
# Å: its cutoff for n nodes is 2.9 ln n − 2.9, and no shorter than 8.
_EDENM_SLOPE = 2.9
_SHORTEST_CUTOFF = 8.0
# Å within which nodes touch that are no neighbours in the sequence; how many touch a loose end at
# most; and how many more make a node count wholly.
_TOUCHING = 10.0
_LOOSE = 2
_WHOLE = 3
# Share of a whole node's mass that a loose end has: almost none, so that it follows what it is
# bound to. With 0.02 two of 15 modes of Hsp90's chains are still those of its ends.
_LEAST_MASS = 1e-4
# Bodies of more nodes never need a dense (3n, 3n) matrix; sparse is faster from about there.
_SPARSE_ABOVE = 500


@dataclass(frozen=True, eq=False)
class Backbone:
    """What springs by sequence know of n nodes, beside their coordinates.

    Attributes
    ----------
    follows
        (n − 1,) whether the next node is the next residue of the same unbroken stretch.
    size
        (n,) distance of neighbours in the sequence over that of two Cα: 1, nucleotides more. The
        distances of two nodes are measured in the mean of their sizes.
    """

    follows: np.ndarray
    size: np.ndarray

    @property
    def stretch(self) -> np.ndarray:
        """(n,) number of the unbroken stretch of every node, from 0."""
        return np.concatenate([[0], np.cumsum(~self.follows)])


def edenm_cutoff(n: int) -> float:
    """Å, the cutoff that edENM takes for n nodes."""
    return max(_SHORTEST_CUTOFF, _EDENM_SLOPE * (np.log(n) - 1))


def solve_modes(
    coords: np.ndarray, k: int, cutoff: float, backbone: Backbone | None = None
) -> dict[str, np.ndarray]:
    """Modes at the cutoff, or at the first wider one that leaves no motion without resistance.

    Springs are those of edENM where the `backbone` is given, else those of ANM.
    """
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
    used = cutoff
    while True:
        solved = _solve_at_cutoff(coords, k, used, backbone)
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


def count_touching(coords: np.ndarray, backbone: Backbone | None = None) -> np.ndarray:
    """(n,) how many nodes each has within 10 Å that are more than three apart in the sequence.

    Without a `backbone`, the sequence is that of all nodes.
    """
    n = len(coords)
    if backbone is None:
        backbone = Backbone(np.ones(n - 1, dtype=bool), np.ones(n))
    pairs, _ = _contacts(coords, backbone, _TOUCHING)
    return np.bincount(pairs.ravel(), minlength=n)


def _masses(coords: np.ndarray, backbone: Backbone) -> np.ndarray:
    """(n,) from almost nothing for loose ends to 1 for what is packed."""
    touching = count_touching(coords, backbone)
    masses = np.clip((touching - _LOOSE) / _WHOLE, _LEAST_MASS, 1.0)
    return masses / masses.max()


def _solve_at_cutoff(
    coords: np.ndarray, k: int, cutoff: float, backbone: Backbone | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """Eigenvalues (k,) and vectors (3n, k), or None where something moves without resistance."""
    n = len(coords)
    if backbone is None:
        pairs = cKDTree(coords).query_pairs(cutoff, output_type="ndarray")
        springs = np.ones(len(pairs))
    else:
        pairs, springs = _edenm_springs(coords, backbone, cutoff)
    graph = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(n, n))
    n_pieces, _ = connected_components(graph, directed=False)
    if n_pieces > 1:
        return None
    rigid = _rigid_motions(coords)
    hessian = _hessian(coords, pairs, springs)
    if backbone is None:
        eigenvalues, vectors = _soft_modes(hessian, rigid, k)
    else:
        masses = np.repeat(_masses(coords, backbone), 3)
        eigenvalues, vectors = _soft_modes_of_masses(hessian, rigid, k, masses)
    if eigenvalues[0] <= _LEAST_EIGENVALUE:
        return None
    return eigenvalues, vectors


def _contacts(
    coords: np.ndarray, backbone: Backbone, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (m, 2) of nodes nearer than the cutoff that are no neighbours in the sequence.

    And their distances (m,) in Å, both with each distance over the mean size of the two nodes.
    """
    size = backbone.size
    pairs = cKDTree(coords).query_pairs(cutoff * size.max(), output_type="ndarray")
    i, j = pairs.T
    distance = np.linalg.norm(coords[i] - coords[j], axis=1) / ((size[i] + size[j]) / 2)
    stretch = backbone.stretch
    neighbours = (stretch[i] == stretch[j]) & (np.abs(i - j) <= _NEIGHBOURS)
    kept = (distance <= cutoff) & ~neighbours
    return pairs[kept], distance[kept]


def _edenm_springs(
    coords: np.ndarray, backbone: Backbone, cutoff: float
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (m, 2) of nodes that a spring joins, and its constant (m,)."""
    contacts, distance = _contacts(coords, backbone, cutoff)
    pairs = [contacts]
    springs = [(_UNIT_SPRING_DISTANCE / distance) ** 6]
    stretch = backbone.stretch
    for apart in range(1, _NEIGHBOURS + 1):
        first = np.flatnonzero(stretch[:-apart] == stretch[apart:])
        pairs.append(np.stack([first, first + apart], axis=1))
        springs.append(np.full(len(first), _BOND_SPRING / apart**2))
    return np.concatenate(pairs), np.concatenate(springs)


def _hessian(coords: np.ndarray, pairs: np.ndarray, springs: np.ndarray) -> sparse.csc_matrix:
    """(3n, 3n) second derivatives of Σ ½ spring (distance − rest)² over `pairs`, at rest."""
    i, j = pairs.T
    direction = coords[j] - coords[i]
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    direction *= np.sqrt(springs)[:, None]
    # One row a spring: how much longer it gets when each coordinate of its two nodes moves.
    columns = 3 * pairs[:, :, None] + np.arange(3)
    values = np.stack([-direction, direction], axis=1)
    starts = np.arange(0, values.size + 1, 6)
    stretches = sparse.csr_matrix(
        (values.ravel(), columns.ravel(), starts), shape=(len(pairs), coords.size)
    )
    return (stretches.T @ stretches).tocsc()


def _rigid_motions(coords: np.ndarray) -> np.ndarray:
    """(3n, 6 or fewer) orthonormal basis of the translations and infinitesimal rotations."""
    offsets = coords - coords.mean(0)
    axes = np.eye(3)
    shifts = np.tile(axes, (len(coords), 1))
    turns = np.stack([np.cross(axis, offsets).ravel() for axis in axes], 1)
    return orth(np.concatenate([shifts, turns], 1))


def _soft_modes(
    hessian: sparse.csc_matrix, rigid: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (k,), ascending, and vectors (3n, k) of H u = λ u without rigid motions."""
    solver = _soft_modes_sparse if hessian.shape[0] > 3 * _SPARSE_ABOVE else _soft_modes_dense
    return solver(hessian, rigid, k)


def _soft_modes_of_masses(
    hessian: sparse.csc_matrix, rigid: np.ndarray, k: int, masses: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (k,) of H u = λ M u, and orthonormal vectors (3n, k) without rigid motions.

    With w = M^½ u, M^-½ H M^-½ w = λ w. What is left of rigid motion in u is taken out, which
    changes no shape, and each u is made orthogonal to the softer ones.
    """
    scale = 1 / np.sqrt(masses)
    by_scale = sparse.diags(scale)
    scaled = (by_scale @ hessian @ by_scale).tocsc()
    eigenvalues, vectors = _soft_modes(scaled, orth(rigid / scale[:, None]), k)
    vectors = vectors * scale[:, None]
    vectors -= rigid @ (rigid.T @ vectors)
    return eigenvalues, np.linalg.qr(vectors)[0]


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
