"""Semi-rigid parts of chains, from a structure alone: where the elastic network bends most easily.

Symbols: v_m, λ_m → modes of the whole molecule and their eigenvalues; d_ij → the direction from
node i to node j. How much the distance of two nodes varies is

    V_ij = Σ_m [(v_mi − v_mj) · d_ij]² / λ_m.

A chain is cut into contiguous segments such that Σ over segments of Σ_ij c_i c_j V_ij / Σ_i c_i is
least, where c_i is small of nodes that few others touch: loose ends are no domains.
"""

import numpy as np

from .network import count_touching, solve_modes

# Of the network: Å, and modes of the whole molecule. Its springs are those of ANM, which
# `_WORTH_A_CUT` was chosen with.
_CUTOFF = 15.0
_N_MODES = 20
# Residues in a domain, at least.
_SHORTEST = 30
# Cuts of one chain, at most.
_MOST_CUTS = 8
# A cut has to take the cost below this share of what it was; two cuts together below its square.
# Chains that are known to bend at hinges (GABA-B, antibodies, Hsp90) have 0.001 to 0.34, those of
# one domain 0.46 and more.
_WORTH_A_CUT = 0.4
# Touching nodes that a loose end has at most, and how many more make it count wholly.
_FEW_TOUCHING = 2
_PACKED = 6
_LEAST_WEIGHT = 0.02


def cut_chains(coords: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """(n,) number of the domain of every node within its chain, from 0.

    Parameters
    ----------
    coords : (n, 3) array
        Nodes in Å, chain by chain, in the order of the sequence.
    chain : (n,) array
        Of every node.

    Raises
    ------
    ValueError
        When the network of all nodes is in pieces.
    """
    domain = np.zeros(len(coords), dtype=int)
    if np.bincount(chain).max() < 2 * _SHORTEST:
        return domain
    n_modes = min(_N_MODES, max(3 * len(coords) - 6, 0))
    solution = solve_modes(coords, n_modes, _CUTOFF)
    for number in np.unique(chain):
        own = np.flatnonzero(chain == number)
        if len(own) < 2 * _SHORTEST:
            continue
        varies = _distance_variance(
            coords[own], solution["vectors"][:, own], solution["eigenvalues"]
        )
        edges = _best_cuts(_segment_costs(varies, _contact_weights(coords[own])))
        domain[own] = np.searchsorted(edges, np.arange(len(own)), side="right")
    return domain


def _distance_variance(
    coords: np.ndarray, vectors: np.ndarray, eigenvalues: np.ndarray
) -> np.ndarray:
    """(n, n) V, of nodes (n, 3) and modes (k, n, 3)."""
    direction = coords[:, None] - coords
    distance = np.linalg.norm(direction, axis=-1)
    np.fill_diagonal(distance, 1.0)
    direction /= distance[..., None]
    varies = np.zeros_like(distance)
    for vector, value in zip(vectors, eigenvalues, strict=True):
        # (v_i − v_j) · d_ij, with d_ji = −d_ij.
        along = np.einsum("ik,ijk->ij", vector, direction)
        varies += (along + along.T) ** 2 / value
    return varies


def _contact_weights(coords: np.ndarray) -> np.ndarray:
    """(n,) from almost nothing for loose ends to 1 for what is packed."""
    return np.clip((count_touching(coords) - _FEW_TOUCHING) / _PACKED, _LEAST_WEIGHT, 1.0)


def _segment_costs(varies: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n + 1, n + 1) cost of the segment of nodes from a to b − 1; infinite of short ones."""
    n = len(weights)
    sums = np.zeros((n + 1, n + 1))
    sums[1:, 1:] = (varies * weights * weights[:, None]).cumsum(0).cumsum(1)
    diagonal = sums.diagonal()
    pairs = diagonal + diagonal[:, None] - sums - sums.T
    total = np.concatenate([[0.0], weights.cumsum()])
    start, end = np.arange(n + 1)[:, None], np.arange(n + 1)
    long_enough = end - start >= _SHORTEST
    weight = np.where(long_enough, total - total[:, None], 1.0)
    return np.where(long_enough, pairs / weight, np.inf)


def _best_cuts(costs: np.ndarray) -> np.ndarray:
    """(k,) first nodes of the segments after the first, by dynamic programming over the cuts."""
    n = len(costs) - 1
    best = [costs[0]]
    came_from = []
    for _ in range(min(_MOST_CUTS, n // _SHORTEST - 1)):
        through = best[-1][:, None] + costs
        came_from.append(through.argmin(0))
        best.append(through.min(0))
    total = np.array([cost[n] for cost in best])
    n_cuts = _worthwhile(total[np.isfinite(total)])
    edges = []
    end = n
    for number in range(n_cuts, 0, -1):
        end = int(came_from[number - 1][end])
        edges.append(end)
    return np.array(edges[::-1], dtype=int)


def _worthwhile(total: np.ndarray) -> int:
    """How many cuts of those with costs (k + 1,) pay, one or two at a time."""
    n_cuts = 0
    while True:
        for more in (1, 2):
            if n_cuts + more >= len(total):
                continue
            if total[n_cuts + more] < _WORTH_A_CUT**more * total[n_cuts]:
                n_cuts += more
                break
        else:
            return n_cuts
