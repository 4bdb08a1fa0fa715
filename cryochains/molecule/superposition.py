"""Superposition of two conformations, and a morph from one to the other.

The morph is the path of the open ↔ closed experiments: every chain follows its screw motion while
what remains of the change interpolates linearly, as ChimeraX's morph does, and the bonds of the
backbone are then brought to their lengths.
"""

import numpy as np
import prody
from scipy.linalg import solveh_banded
from scipy.spatial.transform import RigidTransform, Rotation

from .._arguments import Count, checked
from .structure import Structure

# Å: bonds of the backbone on a morph are so near to the lengths they should have.
_BOND_TOLERANCE = 1e-4
_MOST_SWEEPS = 30
# Å: a shorter bond has no direction that means anything.
_LEAST_BOND = 1e-6


@checked
def superpose(mobile: Structure, target: Structure) -> Structure:
    """Move all atoms of `mobile` so that its imaging atoms lie on those of `target`.

    Least squares, by one rotation and one shift (Kabsch 1976, Acta Cryst. A 32, 922). The result
    has the origin of `target`: both then stand in one box.

    Raises
    ------
    ValueError
        When the two do not have the same number of imaging atoms, at least three.

    Examples
    --------
    >>> from cryochains import load_structure, match_structures, superpose
    >>> structures = load_structure("glua3-closed"), load_structure("glua3-open")
    >>> closed, opened = match_structures(*structures)
    >>> opened = superpose(opened, closed)
    >>> round(float(((opened.coords - closed.coords) ** 2).sum(1).mean() ** 0.5), 2)
    5.23
    """
    if mobile.n_atoms != target.n_atoms or mobile.n_atoms < 3:
        raise ValueError(
            f"expected two structures of the same three or more imaging atoms, got "
            f"{mobile.n_atoms} and {target.n_atoms}; try match_structures first"
        )
    rotation, translation = rigid_fit(mobile.coords, target.coords)
    moved = mobile.atoms.getCoords() @ rotation.T + translation
    return mobile.with_coords(moved).with_origin(target.origin)


def rigid_fit(mobile: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotation R (3, 3) and translation t (3,) Å of least squares: ``target ≈ mobile @ R.T + t``.

    Examples
    --------
    >>> mobile = np.array([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    >>> rotation, translation = rigid_fit(mobile, mobile + [1, 2, 3])
    >>> rotation.round(6).tolist() == np.eye(3).tolist(), translation.round(6).tolist()
    (True, [1.0, 2.0, 3.0])
    """
    fit = prody.calcTransformation(mobile, target)
    return fit.getRotation(), fit.getTranslation()


@checked
def morph(a: Structure, b: Structure, n: Count = 50) -> np.ndarray:
    """Path from `a` to `b` in `n` frames: each chain along its screw motion, the rest linearly.

    With T the rigid motion that best carries a chain's nodes from `a` to `b`, frame s of the chain
    is ``T**s [a + s (T**-1 b − a)]``, s from 0 to 1: angle and shift grow evenly, about and along
    one axis. A straight line shortens what turns beside its chain; bonds of the backbone, between
    nodes of consecutive residues, are therefore given their interpolated lengths by the smallest
    displacements that do (SHAKE: Ryckaert et al. 1977, J. Comput. Phys. 23, 327), which every atom
    of a residue shares.

    Parameters
    ----------
    a, b
        Matched conformations in one frame: see `match_structures` and `superpose`.
    n
        Number of frames, at least 2.

    Returns
    -------
    numpy.ndarray
        (n, n_atoms, 3) Å, float32; the first frame is ``a.coords`` and the last ``b.coords``.

    Raises
    ------
    ValueError
        When `a` and `b` do not match, or `n` is below 2.

    Examples
    --------
    >>> from cryochains import load_structure, match_structures, morph, superpose
    >>> structures = load_structure("glua3-closed"), load_structure("glua3-open")
    >>> closed, opened = match_structures(*structures)
    >>> morph(closed, superpose(opened, closed), n=10).shape
    (10, 731, 3)
    """
    if n < 2:
        raise ValueError(f"expected at least 2 frames, got {n}; try 11")
    same_atoms = np.array_equal(a.chain_index, b.chain_index)
    if not same_atoms or not np.array_equal(a.node_chain, b.node_chain):
        raise ValueError(
            f"expected two conformations with the same atoms, got {a.n_atoms} and {b.n_atoms} "
            "imaging atoms; try match_structures first"
        )
    shares = np.linspace(0, 1, n)
    frames = _interpolate(a, b, a.coords, b.coords, a.chain_index, shares)
    nodes = _interpolate(a, b, a.node_coords, b.node_coords, a.node_chain, shares)
    frames += (_with_bonds(a, b, nodes, shares) - nodes)[:, a.node_index]
    frames[0] = a.coords
    frames[-1] = b.coords
    return frames.astype(np.float32)


def _interpolate(
    a: Structure,
    b: Structure,
    start: np.ndarray,
    end: np.ndarray,
    chain: np.ndarray,
    shares: np.ndarray,
) -> np.ndarray:
    """(n, m, 3) path of the points of a chain (m,) from `start` to `end`, before bonds are mended.

    Points follow the screw motions of their chains' nodes.
    """
    frames = np.empty((len(shares), *start.shape))
    for c in range(a.n_chains):
        nodes = a.node_chain == c
        own = chain == c
        rotation, translation = rigid_fit(a.node_coords[nodes], b.node_coords[nodes])
        whole = RigidTransform.from_components(translation, Rotation.from_matrix(rotation))
        bend = whole.inv().apply(end[own]) - start[own]
        for frame, s in enumerate(shares):
            # A power of a rigid motion is a part of its screw motion.
            frames[frame, own] = (whole**s).apply(start[own] + s * bend)
    return frames


def _with_bonds(a: Structure, b: Structure, nodes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Frames of nodes (n, n_nodes, 3) with bonds as long as between `a` and `b`, at each share."""
    bonds = np.flatnonzero(a.bonded_to_next & b.bonded_to_next)
    lengths = [
        np.linalg.norm(coords[bonds + 1] - coords[bonds], axis=1)
        for coords in (a.node_coords, b.node_coords)
    ]
    share = shares[:, None]
    return constrain_bonds(nodes, bonds, (1 - share) * lengths[0] + share * lengths[1])


def with_reference_bonds(structure: Structure, coords: np.ndarray) -> np.ndarray:
    """Conformations with the backbone's bonds as long as in the structure, moved least.

    A linear mode stretches what it turns. Every atom of a residue shares the displacement of its
    node.

    Parameters
    ----------
    structure
        The reference.
    coords
        (m, n_all, 3) Å, all atoms of the structure.

    Returns
    -------
    numpy.ndarray
        (m, n_all, 3) Å.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> stretched = 1.1 * closed.atoms.getCoords()[None]
    >>> whole = with_reference_bonds(closed, stretched)[0, closed.node_rows]
    >>> round(float(np.median(np.linalg.norm(np.diff(whole, axis=0), axis=1))), 1)
    3.8
    """
    bonds = np.flatnonzero(structure.bonded_to_next)
    reference = structure.node_coords
    lengths = np.linalg.norm(reference[bonds + 1] - reference[bonds], axis=1)
    nodes = coords[:, structure.node_rows]
    lengths = np.broadcast_to(lengths, (len(coords), len(bonds)))
    moved = constrain_bonds(nodes, bonds, lengths) - nodes
    return coords + moved[:, structure.atom_node]


def constrain_bonds(coords: np.ndarray, bonds: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(m, n, 3) `coords` moved least such that bonds have the given lengths.

    Newton's method for the multipliers of all bonds of a conformation at once: each bond shares
    nodes with two others at most, so that the matrix has three diagonals.

    Parameters
    ----------
    coords : (m, n, 3) array
        Å.
    bonds : (k,) array
        First nodes i of the bonds of i and i + 1, increasing.
    lengths : (m, k) array
        Å.
    """
    coords = coords.copy()
    touching = np.diff(bonds, prepend=-2) == 1
    for _ in range(_MOST_SWEEPS if len(bonds) else 0):
        vectors = coords[:, bonds + 1] - coords[:, bonds]
        distance = np.linalg.norm(vectors, axis=-1)
        error = distance - lengths
        if np.abs(error).max() < _BOND_TOLERANCE:
            break
        direction = vectors / np.maximum(distance, _LEAST_BOND)[..., None]
        beside = np.zeros_like(distance)
        beside[:, 1:] = -(direction[:, 1:] * direction[:, :-1]).sum(-1)
        beside *= touching
        # A little more than 2 on the diagonal keeps it definite where bonds lie in one line.
        matrix = np.stack([beside.ravel(), np.full(beside.size, 2 + 1e-6)])
        multiplier = solveh_banded(matrix, error.ravel()).reshape(error.shape)
        pull = multiplier[..., None] * direction
        coords[:, bonds] += pull
        coords[:, bonds + 1] -= pull
    return coords
