"""Two structures of one molecule, cut down to the residues and imaging atoms that both have."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .._arguments import checked
from .pairing import pair_bodies
from .residues import assign_nodes, residue_ids
from .sources import select_rows
from .structure import MOST_NAMED_CHAINS, Structure


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
    paired
        How bodies were paired: "in the order given", "by name", "by position, against the names",
        "by sequence" or "by sequence and position".
    """

    a: Structure
    b: Structure
    dropped: dict[str, tuple[int, int]]
    aligned: tuple[str, ...] = ()
    paired: str = "by name"

    def __iter__(self) -> Iterator[Structure]:
        return iter((self.a, self.b))

    def __repr__(self) -> str:
        parts = [f"bodies paired {self.paired}"]
        bodies = list(range(self.a.n_chains))
        if len(bodies) <= MOST_NAMED_CHAINS:
            parts += [self._pair_words(body) for body in bodies]
        else:
            parts += [f"{len(bodies)} pairs", *(self._pair_words(body) for body in bodies[:2])]
            parts += ["…", self._pair_words(bodies[-1])]
        return f"Match({self.a.name} and {self.b.name}; {'; '.join(parts)})"

    def _pair_words(self, body: int) -> str:
        """What one body has in common with its partner."""
        chain = self.a.chain_ids[body]
        how = " by sequence" if chain in self.aligned else ""
        lost = " and ".join(map(str, self.dropped[chain]))
        n_common = np.count_nonzero(self.a.node_chain == body)
        pair = f"{chain}={self.b.chain_ids[body]}"
        return f"{pair}: {n_common} residues in common{how}, {lost} dropped"


@checked
def match_structures(a: Structure, b: Structure) -> Match:
    """Cut two structures down to the residues, and imaging atoms, that both have.

    Bodies pair in the order of ``load_structure(…, chains=…)`` where both structures were loaded
    with one; else by name where the same names have the same sequences, unless copies of one
    sequence have changed names between the files (another pairing superposes to less than half
    the RMSD); else by sequence, and among copies so that the two assemblies superpose best. Of
    pairings that superpose alike, as those of a symmetric assembly do, the order of the bodies
    decides. Residues pair by number and insertion code, or by sequence alignment where those that
    share a number are not the same residues. Ligands stay for export, yet are no imaging atoms
    afterwards. Nothing moves: see `superpose`.

    Parameters
    ----------
    a, b
        Two conformations, loaded with the same `atoms`.

    Returns
    -------
    Match
        Unpacks into the two structures and says what was dropped and how bodies were paired.

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
            f"expected as many bodies in both structures, got {a.chain_summary} and "
            f"{b.chain_summary}; try load_structure with the chains that both have"
        )
    partners, common, paired = pair_bodies(a, b)
    sizes_a = np.bincount(a.node_chain)
    sizes_b = np.bincount(b.node_chain)[partners]
    dropped = {}
    for c, chain in enumerate(a.chain_ids):
        n_common = len(common[c].nodes_a)
        dropped[chain] = (int(sizes_a[c]) - n_common, int(sizes_b[c]) - n_common)
    aligned = [chain for c, chain in enumerate(a.chain_ids) if common[c].by_sequence]

    kept_a = np.concatenate([shared.nodes_a for shared in common])
    kept_b = np.concatenate([shared.nodes_b for shared in common])
    rows_a, rows_b = _common_imaging_atoms(a, kept_a, b, kept_b)
    matched_a = _restrict(a, range(a.n_chains), kept_a, rows_a)
    matched_b = _restrict(b, partners, kept_b, rows_b)
    return Match(matched_a, matched_b, dropped, tuple(aligned), paired)


def _common_imaging_atoms(
    a: Structure, kept_a: np.ndarray, b: Structure, kept_b: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the imaging atoms of both: nodes, or atoms of the same name in common residues."""
    only_nodes_a, only_nodes_b = (np.array_equal(s.rows, s.node_rows) for s in (a, b))
    if only_nodes_a != only_nodes_b:
        raise ValueError(
            "expected both structures with the same kind of imaging atoms, got 'ca' and "
            "'heavy'; try load_structure with the same atoms for both"
        )
    if only_nodes_a:
        return a.node_rows[kept_a], b.node_rows[kept_b]
    named_a = _named_atoms(a, kept_a)
    named_b = _named_atoms(b, kept_b)
    common = [key for key in named_a if key in named_b]
    rows_a = np.array([named_a[key] for key in common])
    rows_b = np.array([named_b[key] for key in common])
    return rows_a, rows_b


def _named_atoms(structure: Structure, kept: np.ndarray) -> dict[tuple[int, str], int]:
    """Imaging atoms by (common residue, atom name), ordered by residue."""
    residue = _kept_residue(structure, kept)[structure.rows]
    order = np.argsort(residue, kind="stable")
    order = order[(residue[order] >= 0) & (residue[order] < len(kept))]
    rows = structure.rows[order]
    keys = zip(residue[order].tolist(), structure.atoms.getNames()[rows], strict=True)
    return dict(zip(keys, rows.tolist(), strict=True))


def _kept_residue(structure: Structure, kept: np.ndarray) -> np.ndarray:
    """(n_all,) which of the `kept` nodes' residues an atom is of.

    It is len(kept) for ligands and −1 for residues that are not kept.
    """
    residues = residue_ids(structure.atoms)
    of_polymer = residues == residues[structure.node_rows[structure.atom_node]]
    number = np.full(structure.n_nodes, -1)
    number[kept] = np.arange(len(kept))
    return np.where(of_polymer, number[structure.atom_node], len(kept))


def _restrict(
    structure: Structure, bodies: Sequence[int], kept: np.ndarray, rows: np.ndarray
) -> Structure:
    """The structure with only these nodes, their residues and the ligands.

    Parameters
    ----------
    bodies
        The bodies in their new order.
    kept
        Nodes that stay, in their new order.
    rows
        Rows of the new imaging atoms, in their new order.
    """
    body = np.argsort(bodies)[structure.atom_chain]
    residue = _kept_residue(structure, kept)
    rank = np.full(len(residue), len(rows))
    rank[rows] = np.arange(len(rows))
    order = np.lexsort((rank, residue, body))
    order = order[residue[order] >= 0]
    new_row = np.full(len(residue), -1)
    new_row[order] = np.arange(len(order))

    atoms = select_rows(structure.atoms, order)
    body = body[order]
    node_rows = new_row[structure.node_rows[kept]]
    weights = structure.weights[np.searchsorted(structure.rows, rows)]
    return replace(
        structure,
        atoms=atoms,
        chain_ids=tuple(structure.chain_ids[old] for old in bodies),
        atom_chain=body,
        # Ligands move with the nearest node that is left.
        atom_node=assign_nodes(atoms, body, node_rows),
        rows=new_row[rows],
        node_rows=node_rows,
        weights=weights / weights.mean(),
    )
