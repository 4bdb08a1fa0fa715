"""Superposition of two conformations, and a morph from one to the other.

The morph is the path of the open ↔ closed experiments: every chain follows its screw motion while
what remains of the change interpolates linearly, as ChimeraX's morph does.
"""

import numpy as np
import prody
from scipy.spatial.transform import RigidTransform, Rotation

from .structure import Structure


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


def morph(a: Structure, b: Structure, n: int = 50) -> np.ndarray:
    """Path from `a` to `b` in `n` frames: each chain along its screw motion, the rest linearly.

    With T the rigid motion that best carries a chain's nodes from `a` to `b`, frame s of the chain
    is ``T**s [a + s (T**-1 b − a)]``, s from 0 to 1: angle and shift grow evenly, about and along
    one axis.

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
    frames = np.empty((n, a.n_atoms, 3))
    for c in range(a.n_chains):
        nodes = a.node_chain == c
        own = a.chain_index == c
        rotation, translation = rigid_fit(a.node_coords[nodes], b.node_coords[nodes])
        whole = RigidTransform.from_components(translation, Rotation.from_matrix(rotation))
        bend = whole.inv().apply(b.coords[own]) - a.coords[own]
        for frame, s in enumerate(np.linspace(0, 1, n)):
            # A power of a rigid motion is a part of its screw motion.
            frames[frame, own] = (whole**s).apply(a.coords[own] + s * bend)
    frames[0] = a.coords
    frames[-1] = b.coords
    return frames.astype(np.float32)
