"""Two conformations of one molecule: their common atoms, superposition, and a morph from one to the other.

The morph is the path of the open ↔ closed experiments: every chain follows its screw motion while what
remains of the change interpolates linearly, as ChimeraX's morph does.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import prody
from Bio.Align import PairwiseAligner
from scipy.spatial.transform import RigidTransform, Rotation

from .residues import letters, residue_ids, ride
from .sources import take
from .structure import Structure

_SAME_NAMES = 0.9  # residue numbers are trusted when this fraction of the common residues agree in type
_SAME_SEQUENCE = 0.4  # least identity of an alignment: below it the chains are different proteins


@dataclass(frozen=True, eq=False)
class Match:
    """Two structures cut down to what they share; unpacks as ``a, b = match_structures(a, b)``.

    Attributes
    ----------
    a, b
        The structures, with the same residues and imaging atoms in the same order.
    dropped
        Body of `a` → how many residues of it, and of its partner in `b`, have no counterpart.
    aligned
        Bodies whose residue numbers disagree and that were matched by sequence alignment.
    """

    a: Structure
    b: Structure
    dropped: dict[str, tuple[int, int]]
    aligned: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Structure]:
        return iter((self.a, self.b))

    def __repr__(self) -> str:
        counts = np.bincount(self.a.node_chain, minlength=self.a.n_chains)
        parts = []
        for c, chain in enumerate(self.a.chain_ids):
            how = " by sequence" if chain in self.aligned else ""
            lost = " and ".join(map(str, self.dropped[chain]))
            parts.append(f"{chain}={self.b.chain_ids[c]}: {counts[c]} residues in common{how}, {lost} dropped")
        return f"Match({self.a.name} and {self.b.name}; {'; '.join(parts)})"


def match_structures(a: Structure, b: Structure) -> Match:
    """Cut two structures down to the residues, and imaging atoms, that both have.

    Bodies pair by name where the names agree, else in order. Residues pair by number and insertion code, or
    by sequence alignment where those that share a number are not the same residues. Ligands stay for export,
    yet are no imaging atoms afterwards. Nothing moves: see `superpose`.

    Parameters
    ----------
    a, b
        Two conformations, loaded with the same `atoms`.

    Returns
    -------
    Match
        Unpacks into the two structures and says what was dropped.

    Raises
    ------
    ValueError
        When the numbers of bodies differ, or two bodies share no residues.

    Examples
    --------
    >>> from cryochains import load_structure, match_structures
    >>> match = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    >>> closed, opened = match
    >>> closed.n_nodes, opened.n_nodes
    (731, 731)
    """
    if a.n_chains != b.n_chains:
        raise ValueError(
            f"expected as many bodies in both structures, got {' '.join(a.chain_ids)} and "
            f"{' '.join(b.chain_ids)}; try naming the chains"
        )
    same_ids = set(a.chain_ids) == set(b.chain_ids)
    partners = [b.chain_ids.index(chain) if same_ids else c for c, chain in enumerate(a.chain_ids)]
    kept_a, kept_b, dropped, aligned = [], [], {}, []
    for c, (chain, partner) in enumerate(zip(a.chain_ids, partners, strict=True)):
        nodes_a, nodes_b = np.flatnonzero(a.node_chain == c), np.flatnonzero(b.node_chain == partner)
        common_a, common_b, by_sequence = _common(a, nodes_a, b, nodes_b)
        if not len(common_a):
            raise ValueError(
                f"expected two conformations of one molecule, got chains {chain} of {a.name} and "
                f"{b.chain_ids[partner]} of {b.name} that share no residues; try other chains"
            )
        dropped[chain] = (len(nodes_a) - len(common_a), len(nodes_b) - len(common_b))
        aligned += [chain] if by_sequence else []
        kept_a.append(common_a)
        kept_b.append(common_b)

    kept_a, kept_b = np.concatenate(kept_a), np.concatenate(kept_b)
    rows_a, rows_b = _common_imaging_atoms(a, kept_a, b, kept_b)
    matched_a, matched_b = _restrict(a, range(a.n_chains), kept_a, rows_a), _restrict(b, partners, kept_b, rows_b)
    return Match(matched_a, matched_b, dropped, tuple(aligned))


def superpose(mobile: Structure, target: Structure) -> Structure:
    """Move `mobile`, all its atoms, so that its imaging atoms lie on those of `target` (least squares).

    The result has the origin of `target`: both then stand in one box.

    Raises
    ------
    ValueError
        When the two do not have the same number of imaging atoms, at least three.

    Examples
    --------
    >>> from cryochains import load_structure, match_structures, superpose
    >>> closed, opened = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    >>> opened = superpose(opened, closed)
    >>> round(float(((opened.coords - closed.coords) ** 2).sum(1).mean() ** 0.5), 2)
    5.23
    """
    if mobile.n_atoms != target.n_atoms or mobile.n_atoms < 3:
        raise ValueError(
            f"expected two structures of the same three or more imaging atoms, got {mobile.n_atoms} and "
            f"{target.n_atoms}; try match_structures first"
        )
    rotation, translation = rigid_fit(mobile.coords, target.coords)
    moved = mobile.atoms.getCoords() @ rotation.T + translation
    return mobile.with_coords(moved).with_origin(target.origin)


def rigid_fit(mobile: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best rotation R (3, 3) and translation t (3,) Å: ``target ≈ mobile @ R.T + t`` (Kabsch 1976)."""
    fit = prody.calcTransformation(mobile, target)
    return fit.getRotation(), fit.getTranslation()


def morph(a: Structure, b: Structure, n: int = 50) -> np.ndarray:
    """Path from `a` to `b` in `n` frames: each chain along its screw motion, the rest linearly.

    With T the rigid motion that best carries a chain's nodes from `a` to `b`, frame s of the chain is
    ``T**s [a + s (T**-1 b − a)]``, s from 0 to 1: angle and shift grow evenly, about and along one axis.

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
    >>> closed, opened = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    >>> morph(closed, superpose(opened, closed), n=10).shape
    (10, 731, 3)
    """
    if n < 2:
        raise ValueError(f"expected at least 2 frames, got {n}")
    if not np.array_equal(a.chain_index, b.chain_index) or not np.array_equal(a.node_chain, b.node_chain):
        raise ValueError(
            f"expected two conformations with the same atoms, got {a.n_atoms} and {b.n_atoms} imaging atoms; "
            "try match_structures first"
        )
    frames = np.empty((n, a.n_atoms, 3))
    for c in range(a.n_chains):
        nodes, own = a.node_chain == c, a.chain_index == c
        rotation, translation = rigid_fit(a.node_coords[nodes], b.node_coords[nodes])
        whole = RigidTransform.from_components(translation, Rotation.from_matrix(rotation))
        bend = whole.inv().apply(b.coords[own]) - a.coords[own]
        for frame, s in enumerate(np.linspace(0, 1, n)):
            # A power of a rigid motion is a part of its screw motion.
            frames[frame, own] = (whole**s).apply(a.coords[own] + s * bend)
    frames[0], frames[-1] = a.coords, b.coords
    return frames.astype(np.float32)


def _common(
    a: Structure, nodes_a: np.ndarray, b: Structure, nodes_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Nodes that two bodies share, pairwise, and whether it took a sequence alignment."""
    letters_a, letters_b = _letters(a, nodes_a), _letters(b, nodes_b)
    where = {key: i for i, key in enumerate(_numbers(b, nodes_b))}
    pairs = np.array([(i, where[key]) for i, key in enumerate(_numbers(a, nodes_a)) if key in where]).reshape(-1, 2)
    trusted = len(pairs) > 0 and np.mean(letters_a[pairs[:, 0]] == letters_b[pairs[:, 1]]) >= _SAME_NAMES
    by_sequence = False
    if not trusted or len(pairs) < min(len(nodes_a), len(nodes_b)) / 2:
        aligned = _align(letters_a, letters_b)
        if not trusted or len(aligned) > len(pairs):
            pairs, by_sequence = aligned, True
    return nodes_a[pairs[:, 0]], nodes_b[pairs[:, 1]], by_sequence


def _letters(structure: Structure, nodes: np.ndarray) -> np.ndarray:
    return letters(structure.atoms.getResnames()[structure.node_rows[nodes]])


def _numbers(structure: Structure, nodes: np.ndarray) -> list[tuple[int, int, str]]:
    """Residue numbers as (chain within the body, number, insertion code)."""
    rows, atoms = structure.node_rows[nodes], structure.atoms
    chids = atoms.getChids()[rows]
    ordinal = {chain: i for i, chain in enumerate(dict.fromkeys(chids))}
    return list(zip(map(ordinal.get, chids), atoms.getResnums()[rows].tolist(), atoms.getIcodes()[rows], strict=True))


def _align(letters_a: np.ndarray, letters_b: np.ndarray) -> np.ndarray:
    """(n, 2) aligned positions, none where the sequences are not of one protein."""
    aligner = PairwiseAligner(
        mode="global", match_score=2, mismatch_score=-1, open_gap_score=-5, extend_gap_score=-0.5, end_gap_score=0
    )
    blocks = aligner.align("".join(letters_a), "".join(letters_b))[0].aligned
    pairs = [np.stack([np.arange(*x), np.arange(*y)], 1) for x, y in zip(*blocks, strict=True)]
    pairs = np.concatenate(pairs) if pairs else np.empty((0, 2), dtype=int)
    same = letters_a[pairs[:, 0]] == letters_b[pairs[:, 1]]
    # A few residues always align; half of the shorter chain, mostly identical, does not happen by chance.
    if same.sum() < max(3, _SAME_SEQUENCE * min(len(letters_a), len(letters_b))):
        return np.empty((0, 2), dtype=int)
    return pairs


def _common_imaging_atoms(
    a: Structure, kept_a: np.ndarray, b: Structure, kept_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the imaging atoms of both: the nodes, or the atoms of common residues with common names."""
    only_nodes = [np.array_equal(s.rows, s.node_rows) for s in (a, b)]
    if only_nodes[0] != only_nodes[1]:
        raise ValueError("expected both structures with the same kind of imaging atoms, got 'ca' and 'heavy'")
    if only_nodes[0]:
        return a.node_rows[kept_a], b.node_rows[kept_b]
    named_a, named_b = _named(a, kept_a), _named(b, kept_b)
    common = [key for key in named_a if key in named_b]
    return np.array([named_a[key] for key in common]), np.array([named_b[key] for key in common])


def _named(structure: Structure, kept: np.ndarray) -> dict[tuple[int, str], int]:
    """Imaging atoms by (common residue, atom name), ordered by residue."""
    places = _places(structure, kept)[structure.rows]
    order = np.argsort(places, kind="stable")
    order = order[(places[order] >= 0) & (places[order] < len(kept))]
    rows = structure.rows[order]
    keys = zip(places[order].tolist(), structure.atoms.getNames()[rows], strict=True)
    return dict(zip(keys, rows.tolist(), strict=True))


def _places(structure: Structure, kept: np.ndarray) -> np.ndarray:
    """(n_all,) which of the `kept` nodes' residues an atom is of: len(kept) for ligands, −1 for other residues."""
    residues = residue_ids(structure.atoms)
    own = residues == residues[structure.node_rows[structure.atom_node]]
    place = np.full(structure.n_nodes, -1)
    place[kept] = np.arange(len(kept))
    return np.where(own, place[structure.atom_node], len(kept))


def _restrict(structure: Structure, bodies: Sequence[int], kept: np.ndarray, rows: np.ndarray) -> Structure:
    """The structure with only these nodes, their residues and the ligands; imaging atoms `rows` in order."""
    body = np.argsort(bodies)[structure.atom_chain]
    place = _places(structure, kept)
    rank = np.full(len(place), len(rows))
    rank[rows] = np.arange(len(rows))
    order = np.lexsort((rank, place, body))
    order = order[place[order] >= 0]
    new_row = np.full(len(place), -1)
    new_row[order] = np.arange(len(order))
    # Ligands ride with the nearest node that is left.
    atoms, body, node_rows = take(structure.atoms, order), body[order], new_row[structure.node_rows[kept]]
    weights = structure.weights[np.searchsorted(structure.rows, rows)]
    return replace(
        structure,
        atoms=atoms,
        chain_ids=tuple(structure.chain_ids[old] for old in bodies),
        atom_chain=body,
        atom_node=ride(atoms, body, node_rows),
        rows=new_row[rows],
        node_rows=node_rows,
        weights=weights / weights.mean(),
    )
