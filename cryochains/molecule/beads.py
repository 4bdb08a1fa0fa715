"""Beads: the few Gaussians a residue that a molecule is drawn with.

A residue is drawn as two beads, its backbone and its side chain (three where that is long), at
their centroids and as wide as their atoms spread. Images of them correlate by 0.98 to 0.99 with
those of all heavy atoms, of one Gaussian at the Cα by 0.90 to 0.95 (64 px × 3 Å to 192 px × 1 Å,
with CTF; in solvent 0.975 to 0.99 and 0.87 to 0.94). An atom counts by its electron scattering
factor at zero frequency.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from .._arguments import Angstroms, checked
from .residues import atomic_numbers, modelled_electrons, residue_ids, residue_scattering
from .structure import Structure

# Å, electron scattering factors of neutral atoms at zero frequency (Peng, Ren, Dudarev and Whelan
# 1996, Acta Cryst. A52, 257; International Tables C, section 4.3).
_SCATTERING_FACTORS = {
    "C": 2.51,
    "N": 2.21,
    "O": 1.98,
    "F": 1.80,
    "NA": 4.78,
    "MG": 5.21,
    "P": 5.49,
    "S": 5.16,
    "CL": 4.86,
    "K": 8.98,
    "CA": 9.91,
    "MN": 7.51,
    "FE": 7.17,
    "CO": 6.85,
    "NI": 6.57,
    "CU": 5.60,
    "ZN": 6.06,
    "SE": 7.20,
}
# Å, width of an atom's own Gaussian: its scattering factor, and a B-factor of about 60 Å².
_ATOM_WIDTH = 0.9
# Atoms of the first bead of an amino acid; the second has all others.
_BACKBONE = ("N", "CA", "C", "O", "CB", "OXT")
# Side chains of so many heavy atoms and more have a third bead, of the atoms from ε on.
_LONG_SIDE_CHAIN = 5
_FAR_LETTERS = "EZH"
# Atoms of a ligand that are one bead.
_LIGAND_ATOMS = 6
_FIRST_LIGAND = 3
# Å, how far atoms that were not modelled may be from those of their residue that were.
_UNSEEN_SPREAD = 1.7
# Å within which two beads of a node are the same: far less than beads of a residue are apart, far
# more than machines and files round.
_SAME_BEAD = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class Beads:
    """Gaussians that scatter, and the node that each moves with.

    Attributes
    ----------
    coords : (n, 3) array
        Å, in the reference; chain by chain.
    node : (n,) int array
        Node of the elastic network that each moves with.
    weights : (n,) array
        Scattering, in units of a mean residue's.
    widths : (n,) array
        Å.

    Raises
    ------
    ValueError
        When they are not arrays, shapes differ, or a width is not positive.
    """

    coords: np.ndarray
    node: np.ndarray
    weights: np.ndarray
    widths: np.ndarray

    def __post_init__(self) -> None:
        parts = (self.coords, self.node, self.weights, self.widths)
        shapes = [np.shape(part) for part in parts]
        if not all(isinstance(part, np.ndarray) for part in parts):
            kinds = ", ".join(type(part).__name__ for part in parts)
            raise ValueError(
                f"expected coords (n, 3) and node, weights and widths (n,) as arrays, got {kinds}; "
                "try residue_beads(structure)"
            )
        n = shapes[0][0] if shapes[0] else 0
        if not n or shapes != [(n, 3), (n,), (n,), (n,)]:
            raise ValueError(
                f"expected coords (n, 3) and node, weights and widths (n,), got {shapes}; "
                "try residue_beads(structure)"
            )
        numbers = (self.coords, self.weights, self.widths)
        finite = all(np.isfinite(part).all() for part in numbers)
        if not finite or not (self.widths > 0).all() or self.node.dtype.kind not in "iu":
            raise ValueError(
                "expected finite coordinates and weights, integer nodes and positive widths, got "
                "others; try residue_beads(structure)"
            )

    def __len__(self) -> int:
        return len(self.coords)

    def __repr__(self) -> str:
        narrow, wide = self.widths.min(), self.widths.max()
        return f"Beads({len(self):,} of {narrow:.1f} to {wide:.1f} Å)"


@checked
def atom_beads(structure: Structure, width: Angstroms = _ATOM_WIDTH) -> Beads:
    """A Gaussian of `width` Å at every imaging atom, weighted as the structure says."""
    return Beads(
        structure.coords,
        structure.node_index,
        structure.weights,
        np.full(structure.n_atoms, float(width)),
    )


@checked
def residue_beads(structure: Structure) -> Beads:
    """Two or three Gaussians a residue, for its backbone and its side chain; more for a ligand.

    A residue counts as all heavy atoms of its type, also where some of them were not modelled: its
    last bead is then heavier and wider. A mean residue weighs 1.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> residue_beads(load_structure("glua3-open"))
    Beads(1,532 of 0.9 to 1.8 Å)
    """
    atoms = structure.atoms
    heavy = np.flatnonzero(atomic_numbers(atoms) > 1)
    coords = atoms.getCoords()[heavy]
    # In the order of the nodes, and so chain by chain.
    pairs = np.stack([structure.atom_node[heavy], _groups(structure, heavy)], axis=1)
    parts, part = np.unique(pairs, axis=0, return_inverse=True)
    part = part.reshape(-1)
    node, group = parts.T
    factors = _scattering_factors(atoms.getElements()[heavy])
    weights = np.bincount(part, factors).astype(float)
    sums = np.stack([np.bincount(part, factors * axis) for axis in coords.T], axis=1)
    centres = sums / weights[:, None]
    squares = ((coords - centres[part]) ** 2).sum(1)
    variance = np.bincount(part, factors * squares).astype(float) / weights / 3

    in_polymer = group < _FIRST_LIGAND
    unseen = _unseen_weight(structure, node[in_polymer], weights[in_polymer])
    added = np.zeros(len(parts))
    added[in_polymer] = unseen
    variance += added / (weights + added) * _UNSEEN_SPREAD**2
    weights = weights + added
    widths = np.sqrt(_ATOM_WIDTH**2 + variance)
    return Beads(centres, node, weights * structure.n_nodes / weights.sum(), widths)


def move_beads(structure: Structure, beads: Beads, coords: np.ndarray) -> np.ndarray:
    """(m, n_beads, 3) Å, where beads are in conformations given by their imaging atoms.

    `coords` (m, n_atoms, 3). Every bead stays beside its residue's Cα (or P), turned as
    its chain is by superposition; beads that are the imaging atoms are where those are.
    """
    coords = np.asarray(coords, dtype=float)
    at_atoms = len(beads) == structure.n_atoms
    if at_atoms and np.allclose(beads.coords, structure.coords, rtol=0, atol=_SAME_BEAD):
        return coords
    chain = structure.node_chain[beads.node]
    moved = np.empty((len(coords), len(beads), 3))
    offsets = beads.coords - structure.node_coords[beads.node]
    for c in range(structure.n_chains):
        own = np.flatnonzero(structure.chain_index == c)
        turns = _turns(structure.coords[own], coords[:, own])
        of_chain = np.flatnonzero(chain == c)
        row = np.searchsorted(structure.rows, structure.node_rows[beads.node[of_chain]])
        moved[:, of_chain] = coords[:, row] + offsets[of_chain] @ turns.transpose(0, 2, 1)
    return moved


def compare_beads(structure: Structure, own: Beads, other: Beads) -> tuple[np.ndarray, np.ndarray]:
    """(n_nodes,) occupancy of each residue in `other` beads, and what they have beside it.

    The first is the weight of its `own` beads there over what they weigh here, the second the
    weight, in mean residues, of beads that are none of its own.
    """
    n = structure.n_nodes
    distance, row = cKDTree(own.coords).query(other.coords)
    same = (distance < _SAME_BEAD) & (own.node[row] == other.node)
    theory = np.bincount(own.node, own.weights, minlength=n)
    seen = np.bincount(other.node[same], other.weights[same], minlength=n)
    beside = np.bincount(other.node[~same], other.weights[~same], minlength=n)
    return seen / theory, beside


def _turns(reference: np.ndarray, coords: np.ndarray) -> np.ndarray:
    """(m, 3, 3) rotations that take (n, 3) `reference` nearest to (m, n, 3) `coords` (Kabsch)."""
    centred = reference - reference.mean(0)
    products = np.einsum("mni,nj->mij", coords - coords.mean(1, keepdims=True), centred)
    # Atoms on a line do not say how they turned about it: then as little as can be.
    products += 1e-6 * np.eye(3)
    u, _, vt = np.linalg.svd(products)
    u[:, :, 2] *= np.sign(np.linalg.det(u @ vt))[:, None]
    return u @ vt


def _groups(structure: Structure, heavy: np.ndarray) -> np.ndarray:
    """(n,) which bead of its node every heavy atom belongs to: 0 to 2; of a ligand 3 and more."""
    atoms = structure.atoms
    names = atoms.getNames()[heavy]
    residue = residue_ids(atoms)
    in_polymer = np.isin(residue[heavy], residue[structure.node_rows])
    nucleotide = atoms.getNames()[structure.node_rows] != "CA"
    sugar = np.array([name[-1] in "'*" or "P" in name for name in names])
    backbone = np.where(nucleotide[structure.atom_node[heavy]], sugar, np.isin(names, _BACKBONE))
    node = structure.atom_node[heavy]
    n_side = np.bincount(node[in_polymer & ~backbone], minlength=structure.n_nodes)
    far = np.array([len(name) > 1 and name[1] in _FAR_LETTERS for name in names])
    far &= (n_side[node] >= _LONG_SIDE_CHAIN) & ~nucleotide[node]
    side = np.where(far, 2, 1)
    of_ligand = _FIRST_LIGAND + _ligand_bead(residue[heavy], names)
    return np.where(in_polymer, np.where(backbone, 0, side), of_ligand)


def _ligand_bead(residue: np.ndarray, names: np.ndarray) -> np.ndarray:
    """(n,) number of the bead of every atom, distinct between residues (n,)."""
    # By their names, C2 before C10, so that the order of a file's atoms does not matter.
    order = np.lexsort((np.char.rjust(names.astype(str), 4), residue))
    in_order = residue[order]
    rank = np.empty(len(residue), dtype=int)
    rank[order] = np.arange(len(residue)) - np.searchsorted(in_order, in_order)
    _, bead = np.unique(np.stack([residue, rank // _LIGAND_ATOMS]), axis=1, return_inverse=True)
    return bead.reshape(-1)


def _scattering_factors(elements: np.ndarray) -> np.ndarray:
    """(n,) Å; carbon's where an element's is not listed."""
    kinds, inverse = np.unique(elements, return_inverse=True)
    factors = [_SCATTERING_FACTORS.get(kind, _SCATTERING_FACTORS["C"]) for kind in kinds]
    return np.array(factors)[inverse]


def _unseen_weight(structure: Structure, node: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(n,) what the atoms that were not modelled add to the last of each residue's beads."""
    expected = residue_scattering(structure.atoms, structure.node_rows)
    modelled = modelled_electrons(structure.atoms, structure.node_rows)
    # Scattering goes as electrons do.
    more = np.clip(expected / modelled - 1, 0.0, None)
    of_node = np.bincount(node, weights, minlength=structure.n_nodes)
    last = np.append(node[1:] != node[:-1], True)
    return np.where(last, (of_node * more)[node], 0.0)
