"""A molecule as bodies that move: chains by default, each with its atoms and its network nodes.

Symbols of the paper: X⁽⁰⁾ → `Structure.coords`, N → `n_atoms`, com of a chain → `centers`; the
chain of an atom is `chain_index`. Coordinates are (n, 3) in Å. Three sets of atoms share one list:
all atoms (`atoms`, for export), the imaging atoms (`rows`) that scatter in a simulated image, and
the nodes (`node_rows`), one a residue, that the normal modes are computed on. Every atom moves with
one node.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import prody
from scipy.spatial import cKDTree

from .._arguments import Point, checked
from .domains import cut_chains
from .residues import (
    assign_nodes,
    atomic_numbers,
    find_nodes,
    residue_ids,
    residue_scattering,
)
from .sources import quiet_prody, read_atoms, select_rows
from .writing import write_structure

# Å, nodes of a chain that are nearer are neighbours along it.
BONDED_DISTANCE = 8.0
# Bodies that a line of text names one by one.
MOST_NAMED_CHAINS = 8
# Parts of chains whose residues a line of text names.
_MOST_PARTS = 6
# Å: residues of consecutive numbers that are farther apart are no neighbours. Bonds of two Cα are
# 3.8 Å, but 9.5 Å in a structure that was bent along a straight line.
_FARTHEST_NEIGHBOUR = 10.0
# The distance of two nucleotides' P, about 6.5 Å, over that of two Cα.
_NUCLEOTIDE_SIZE = 1.7


@dataclass(frozen=True, eq=False)
class Structure:
    """Bodies, atoms and nodes of one molecule; made by `load_structure`, never changed in place.

    Attributes
    ----------
    name
        "6UO8", "glua3-open", or the file's stem.
    atoms
        All atoms of the bodies, ligands included and water not, body by body.
    chain_ids
        Names of the bodies.
    atom_chain
        (n_all,) body of every atom of `atoms`, non-decreasing.
    atom_node
        (n_all,) node that every atom moves with.
    rows
        (n_atoms,) which of `atoms` are imaging atoms, increasing.
    node_rows
        (n_nodes,) which of `atoms` are nodes (Cα, or P of nucleotides), increasing.
    weights
        (n_atoms,) scattering of every imaging atom, mean 1.
    origin
        (3,) Å, the point of the structure at the centre of the box.
    in_given_order
        Whether the bodies stand in an order that the user asked for by `chains`.
    turning
        Names of the bodies that may turn by any angle; see `with_turning`.
    """

    name: str
    atoms: prody.AtomGroup
    chain_ids: tuple[str, ...]
    atom_chain: np.ndarray
    atom_node: np.ndarray
    rows: np.ndarray
    node_rows: np.ndarray
    weights: np.ndarray
    origin: np.ndarray
    in_given_order: bool = False
    turning: tuple[str, ...] = ()

    @cached_property
    def coords(self) -> np.ndarray:
        """(n_atoms, 3) Å, imaging atoms."""
        return self.atoms.getCoords()[self.rows]

    @cached_property
    def node_coords(self) -> np.ndarray:
        """(n_nodes, 3) Å, elastic-network nodes."""
        return self.atoms.getCoords()[self.node_rows]

    @cached_property
    def chain_index(self) -> np.ndarray:
        """(n_atoms,) body of every imaging atom."""
        return self.atom_chain[self.rows]

    @cached_property
    def node_index(self) -> np.ndarray:
        """(n_atoms,) node that every imaging atom moves with."""
        return self.atom_node[self.rows]

    @cached_property
    def node_chain(self) -> np.ndarray:
        """(n_nodes,) body of every node."""
        return self.atom_chain[self.node_rows]

    @cached_property
    def resnums(self) -> np.ndarray:
        """(n_atoms,) author's residue number of every imaging atom."""
        return self.atoms.getResnums()[self.rows]

    @cached_property
    def bonded_to_next(self) -> np.ndarray:
        """(n_nodes − 1,) whether the next node is the next residue of an unbroken stretch.

        By chain and residue numbers, so that a gap in the model is no bond, whatever the body.
        """
        rows = self.node_rows
        chids = self.atoms.getChids()[rows]
        # Residues with an insertion code share the number of the one before.
        step = np.diff(self.atoms.getResnums()[rows])
        distance = np.linalg.norm(np.diff(self.node_coords, axis=0), axis=1)
        size = self.node_sizes
        near = distance < _FARTHEST_NEIGHBOUR * np.maximum(size[1:], size[:-1])
        return (step >= 0) & (step <= 1) & (chids[1:] == chids[:-1]) & near

    @cached_property
    def node_sizes(self) -> np.ndarray:
        """(n_nodes,) distance of neighbours in the sequence over that of two Cα: 1 or 1.7."""
        names = self.atoms.getNames()[self.node_rows]
        return np.where(names == "CA", 1.0, _NUCLEOTIDE_SIZE)

    @property
    def n_atoms(self) -> int:
        """Number of imaging atoms."""
        return len(self.rows)

    @property
    def n_nodes(self) -> int:
        """Number of nodes: residues of the polymer."""
        return len(self.node_rows)

    @property
    def n_chains(self) -> int:
        """Number of bodies."""
        return len(self.chain_ids)

    @property
    def chain_summary(self) -> str:
        """Names of the bodies; of more than eight the first two and the last: "AA AB … CR"."""
        if self.n_chains <= MOST_NAMED_CHAINS:
            return " ".join(self.chain_ids)
        first, second, *_, last = self.chain_ids
        return f"{first} {second} … {last}"

    @cached_property
    def centers(self) -> np.ndarray:
        """(n_chains, 3) Å, the point that each body turns about: the mean of its nodes.

        Nodes, one a residue and of equal mass as in the elastic network, whatever the imaging atoms
        are: "ca", "heavy" and all-atom export then turn about the same point. A body of `turning`
        turns about its joint, the middle of the bonds that join it to others, if there are any.
        """
        means = [self.node_coords[self.node_chain == c].mean(0) for c in range(self.n_chains)]
        for name in self.turning:
            body = self.chain_ids.index(name)
            bonds = [pair for pair in self.joints if body in self.node_chain[list(pair)]]
            if bonds:
                means[body] = self.node_coords[np.array(bonds)].mean((0, 1))
        return np.stack(means)

    @cached_property
    def joints(self) -> tuple[tuple[int, int], ...]:
        """Pairs of nodes, next to each other in a chain's sequence, that are of two bodies."""
        chids = self.atoms.getChids()[self.node_rows]
        order = np.lexsort((self.atoms.getResnums()[self.node_rows], chids))
        first, second = order[:-1], order[1:]
        apart = self.node_coords[second] - self.node_coords[first]
        joined = chids[first] == chids[second]
        joined &= self.node_chain[first] != self.node_chain[second]
        joined &= np.linalg.norm(apart, axis=1) < BONDED_DISTANCE
        return tuple(zip(first[joined].tolist(), second[joined].tolist(), strict=True))

    @cached_property
    def radii(self) -> np.ndarray:
        """(n_chains,) Å, RMS distance of each body's nodes from its centre."""
        offsets = self.node_coords - self.centers[self.node_chain]
        squares = np.bincount(self.node_chain, (offsets**2).sum(1))
        return np.sqrt(squares / np.bincount(self.node_chain))

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits of the nodes (to 1e-3 Å), residues and bodies; free of file names."""
        parts: list[Sequence | np.ndarray] = [
            self.chain_ids,
            self.node_chain,
            self.atoms.getResnums()[self.node_rows],
            self.atoms.getIcodes()[self.node_rows],
            self.atoms.getResnames()[self.node_rows],
        ]
        if self.turning:
            parts.append(self.turning)
        text = "\n".join(" ".join(map(str, part)) for part in parts)
        milli = np.round(self.node_coords * 1000).astype("<i8")
        return hashlib.sha256(text.encode() + milli.tobytes()).hexdigest()[:16]

    def all_atoms(self) -> "Structure":
        """The same molecule with all atoms, ligands too, as imaging atoms: to deform and export."""
        numbers = atomic_numbers(self.atoms)
        rows = np.arange(self.atoms.numAtoms())
        return replace(self, rows=rows, weights=numbers / numbers.mean())

    def as_one_body(self) -> "Structure":
        """All bodies merged into one, named "A+B": the modes of the whole assembly."""
        one_body = np.zeros_like(self.atom_chain)
        name = "+".join(self.chain_ids)
        return replace(self, chain_ids=(name,), atom_chain=one_body, turning=())

    def as_domains(self) -> "Structure":
        """The same molecule with chains cut where its elastic network bends most easily.

        Into semi-rigid parts of 30 residues or more, "A1" and "A2" of "A"; chains that are one
        domain stay whole. Two structures are matched first and then cut, so that both are cut
        alike: ``with_coords`` keeps the bodies.

        Raises
        ------
        ValueError
            When the molecule is in pieces.
        """
        try:
            domain = cut_chains(self.node_coords, self.node_chain)
        except ValueError as error:
            raise ValueError(
                f"expected a molecule in one piece to cut into domains, got another ({error}); try "
                "bodies='chains'"
            ) from error
        names: list[str] = []
        part_of_node = np.zeros(self.n_nodes, dtype=int)
        for c, name in enumerate(self.chain_ids):
            own = self.node_chain == c
            parts = [f"{name}{k + 1}" for k in range(domain[own].max() + 1)]
            if set(parts) & set(self.chain_ids):
                parts = [f"{name}.{k + 1}" for k in range(len(parts))]
            part_of_node[own] = len(names) + domain[own]
            names += parts if len(parts) > 1 else [name]
        part = part_of_node[self.atom_node]
        order = np.argsort(part, kind="stable")
        new_row = np.argsort(order)
        node_order = np.argsort(new_row[self.node_rows])
        row_order = np.argsort(new_row[self.rows])
        return replace(
            self,
            atoms=select_rows(self.atoms, order),
            chain_ids=tuple(names),
            atom_chain=part[order],
            atom_node=np.argsort(node_order)[self.atom_node[order]],
            rows=new_row[self.rows][row_order],
            node_rows=new_row[self.node_rows][node_order],
            weights=self.weights[row_order],
            turning=(),
        )

    @checked
    def with_coords(self, coords: np.ndarray) -> "Structure":
        """The same molecule with other coordinates of all atoms, (n_all, 3) Å; the origin stays.

        Raises
        ------
        ValueError
            When `coords` has another shape or is not finite.
        """
        coords = np.asarray(coords, dtype=float)
        expected = (self.atoms.numAtoms(), 3)
        if coords.shape != expected or not np.isfinite(coords).all():
            got = "NaN or infinity" if coords.shape == expected else f"shape {coords.shape}"
            raise ValueError(
                f"expected finite coordinates {expected} of all atoms, got {got}; "
                "try Structure.atoms.getCoords() for the order of the atoms"
            )
        atoms = self.atoms.copy()
        atoms.setCoords(coords)
        return replace(self, atoms=atoms)

    @checked
    def with_origin(self, xyz: Point) -> "Structure":
        """The same molecule with the point `xyz` (Å) at the centre of the box.

        Raises
        ------
        ValueError
            When `xyz` is not three finite numbers.
        """
        return replace(self, origin=np.asarray(xyz, dtype=float))

    @checked
    def with_turning(self, *bodies: str) -> "Structure":
        """The same molecule, of which these bodies may turn by any angle, up to 360°.

        Such as an antibody's Fab at its hinge. A body that a bond joins to another then turns about
        that joint, and `refine` searches its orientation over all angles before it refines. Of
        other bodies it finds turns that it can follow from the reference: by some tens of degrees.

        Parameters
        ----------
        *bodies : str
            Their names, of `chain_ids`; none takes it back.

        Raises
        ------
        ValueError
            When there is no such body.

        Examples
        --------
        >>> from cryochains import load_structure
        >>> halves = {"upper": "chain A and resnum 1 to 120", "lower": "chain A and resnum > 120"}
        >>> structure = load_structure("glua3-closed", bodies=halves).with_turning("upper")
        >>> structure.turning, structure.joints
        (('upper',), ((118, 119),))
        """
        absent = [name for name in bodies if name not in self.chain_ids]
        if absent:
            raise ValueError(
                f"expected bodies among {' '.join(self.chain_ids)}, got {', '.join(absent)}; "
                "try Structure.chain_ids for their names"
            )
        return replace(self, turning=tuple(name for name in self.chain_ids if name in bodies))

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write all atoms as PDB text (.pdb, .pdb.gz) or mmCIF (.cif), whole or not at all.

        In PDB text a chain id of several letters is replaced by a letter that is free.

        Raises
        ------
        ValueError
            For another suffix, a folder that cannot be written, or what does not fit into the
            columns of PDB text, such as more than 62 chains.
        """
        write_structure(self.atoms, self.name, path)

    @cached_property
    def residue_ranges(self) -> tuple[str, ...]:
        """First and last residue of every body, such as "A 20–180"; author's chain and numbers."""
        chids = self.atoms.getChids()[self.node_rows]
        numbers = self.atoms.getResnums()[self.node_rows]
        ranges = []
        for c in range(self.n_chains):
            own = np.flatnonzero(self.node_chain == c)
            first, last = own[0], own[-1]
            end = f"{numbers[last]}"
            if chids[last] != chids[first]:
                end = f"{chids[last]} {end}"
            ranges.append(f"{chids[first]} {numbers[first]}–{end}")
        return tuple(ranges)

    @property
    def _has_parts_of_chains(self) -> bool:
        """Whether two bodies are parts of one chain: copies of a chain have the same numbers."""
        chids = self.atoms.getChids()[self.node_rows]
        numbers = zip(
            self.atoms.getResnums()[self.node_rows].tolist(),
            self.atoms.getIcodes()[self.node_rows].tolist(),
            strict=True,
        )
        bodies = len(set(zip(chids, self.node_chain, strict=True)))
        residues = len(set(zip(chids, numbers, strict=True)))
        return bodies > len(set(chids)) and residues == self.n_nodes

    def __repr__(self) -> str:
        chains = f"chains {self.chain_summary}"
        if self.n_chains > MOST_NAMED_CHAINS:
            chains = f"{self.n_chains} {chains}"
        elif self.n_chains <= _MOST_PARTS and self._has_parts_of_chains:
            pairs = zip(self.chain_ids, self.residue_ranges, strict=True)
            chains = ", ".join(f"{name} ({residues})" for name, residues in pairs)
            chains = f"bodies {chains}"
        if self.turning:
            chains = f"{chains}, turning by any angle: {' '.join(self.turning)}"
        counts = f"{self.n_nodes:,} residues, {self.atoms.numAtoms():,} atoms"
        return f"Structure({self.name!r}, {chains}, {counts})"


@checked
def load_structure(
    source: str | os.PathLike | prody.Atomic,
    chains: str | Sequence[str] | None = None,
    atoms: str = "ca",
    bodies: Mapping[str, str] | str | None = "chains",
) -> Structure:
    """Load a molecule as bodies of atoms.

    Of alternate locations the best occupied is taken, of several models the first; water is left
    out.

    Parameters
    ----------
    source
        "glua3-closed" or "glua3-open" (embedded), a PDB id, a PDB or mmCIF file (.gz too), or ProDy
        atoms. A PDB id is looked for in the folder named by the environment variable
        CRYOCHAINS_STRUCTURES, then in the cache, then fetched. In ProDy atoms, copies that share a
        chain id and differ by segment, as of ``prody.parseMMCIF(file, biomol=True)``, are chains of
        their own: "A", "A_2", "A_3" ….
    chains
        Author's ids of the chains to keep, in this order. By default every chain of protein or
        nucleic acid; ligands and sugars with chain ids of their own then move with the one they
        touch.
    atoms
        Imaging atoms: "ca", one a residue (P for nucleotides) that scatters as the whole residue,
        or "heavy", every atom but hydrogen by its atomic number.
    bodies
        - "chains".
        - "domains": chains are cut where the elastic network of the whole molecule bends most
          easily, into semi-rigid parts of 30 residues or more, "A1" and "A2" of chain "A". Chains
          that are one domain stay whole.
        - Names and ProDy selections of the bodies: ``{"head": "chain A and resnum 1 to 200"}``.

        A body that may turn by any angle is named by `Structure.with_turning`.

    Returns
    -------
    Structure
        Its origin is the mean of the imaging atoms.

    Raises
    ------
    FileNotFoundError
        When the source is no file here and no PDB entry that can be had.
    ValueError
        When a file cannot be read, a chain is absent, a residue number stands twice in a chain, a
        body is empty, overlaps another or holds no node.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> load_structure("glua3-open")
    Structure('glua3-open', chains A B, 741 residues, 5,958 atoms)
    """
    if atoms not in ("ca", "heavy"):
        raise ValueError(f"expected atoms 'ca' or 'heavy', got {atoms!r}; try 'ca'")
    bodies = "chains" if bodies is None else bodies
    if isinstance(bodies, str) and bodies not in ("chains", "domains"):
        raise ValueError(
            f"expected bodies 'chains', 'domains' or selections by name, got {bodies!r}; "
            "try 'chains'"
        )
    if not isinstance(bodies, str) and chains is not None:
        raise ValueError(
            "expected chains or bodies, got both; try selecting the chains within the bodies"
        )
    name, group = read_atoms(source)
    nodes = find_nodes(group)
    if not len(nodes):
        raise ValueError(
            f"expected protein or nucleic acid, got no Cα and no P in {name}; try another file"
        )
    if isinstance(bodies, str):
        ids, body = _select_chains(name, group, nodes, chains)
    else:
        ids, body = _select_bodies(group, bodies)
    nodes = nodes[body[nodes] >= 0]
    _require_unique_numbers(name, group, nodes)
    for c, chain in enumerate(ids):
        if c not in body[nodes]:
            raise ValueError(
                f"expected Cα atoms (or P of nucleotides) in {chain!r} of {name}, got none; "
                "try joining it to the body that it touches"
            )
    # Body by body; −1 are atoms to leave out.
    order = np.argsort(body, kind="stable")[np.sum(body < 0) :]
    group = select_rows(group, order)
    body = body[order]
    node_rows = np.flatnonzero(np.isin(order, nodes))
    rows, weights = _imaging_atoms(group, node_rows, atoms)
    structure = Structure(
        name=name,
        atoms=group,
        chain_ids=tuple(ids),
        atom_chain=body,
        atom_node=assign_nodes(group, body, node_rows),
        rows=rows,
        node_rows=node_rows,
        weights=weights / weights.mean(),
        origin=group.getCoords()[rows].mean(0),
        in_given_order=chains is not None,
    )
    return structure.as_domains() if bodies == "domains" else structure


def _imaging_atoms(
    atoms: prody.AtomGroup, node_rows: np.ndarray, kind: str
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the imaging atoms, and the electrons that each stands for."""
    if kind == "ca":
        return node_rows, residue_scattering(atoms, node_rows)
    numbers = atomic_numbers(atoms)
    rows = np.flatnonzero(numbers > 1)
    return rows, numbers[rows]


def _require_unique_numbers(name: str, atoms: prody.AtomGroup, nodes: np.ndarray) -> None:
    """Raise where two residues of one chain share number and insertion code.

    Alternate residues at one position are one by now: see `read_atoms`.
    """
    ids = residue_ids(atoms, with_name=False)[nodes]
    _, first, counts = np.unique(ids, return_index=True, return_counts=True)
    if (counts == 1).all():
        return
    row = nodes[first[counts > 1].min()]
    number = f"{atoms.getResnums()[row]}{atoms.getIcodes()[row]}"
    n_repeated = int((counts > 1).sum())
    others = f" (and {n_repeated - 1:,} more)" if n_repeated > 1 else ""
    raise ValueError(
        f"expected every residue number once in a chain, got {number} of chain "
        f"{atoms.getChids()[row]} of {name} more than once{others}; try giving each copy a chain "
        "id of its own, or loading one copy"
    )


def _select_bodies(
    atoms: prody.AtomGroup, bodies: Mapping[str, str]
) -> tuple[list[str], np.ndarray]:
    """Names of the bodies, and (n,) body of every atom: −1 for atoms in none."""
    if not bodies:
        raise ValueError("expected at least one body, got none; try chains instead")
    names = list(bodies)
    body = np.full(atoms.numAtoms(), -1)
    for c, (name, text) in enumerate(bodies.items()):
        try:
            with quiet_prody():
                selected = atoms.select(text)
        except prody.SelectionError as error:
            raise ValueError(
                f"expected a ProDy selection for body {name!r}, got {text!r} ({error}); "
                "try one like 'chain A and resnum 1 to 200'"
            ) from error
        if selected is None:
            raise ValueError(
                f"expected atoms in body {name!r}, got none for {text!r}; try another selection"
            )
        earlier = body[selected.getIndices()]
        shared = earlier >= 0
        if shared.any():
            raise ValueError(
                f"expected bodies without common atoms, got {shared.sum()} in "
                f"{names[earlier.max()]!r} and {name!r}; try selections that exclude each other"
            )
        body[selected.getIndices()] = c
    return names, body


def _select_chains(
    name: str, atoms: prody.AtomGroup, nodes: np.ndarray, chains: str | Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    """Ids of the chains, and (n,) chain of every atom: −1 for atoms to leave out."""
    chids = atoms.getChids()
    present = list(dict.fromkeys(chids[nodes].tolist()))
    ids = present if chains is None else _chain_list(chains, present)
    absent = [chain for chain in ids if chain not in present]
    if absent or not ids:
        raise ValueError(
            f"expected chains among {' '.join(present)} of {name}, got "
            f"{', '.join(absent) or 'none'}; try leaving chains out, which takes all of them"
        )
    if len(set(ids)) < len(ids):
        raise ValueError(
            f"expected every chain once, got {' '.join(ids)}; try {' '.join(dict.fromkeys(ids))}"
        )
    body = np.full(len(chids), -1)
    for c, chain in enumerate(ids):
        body[chids == chain] = c
    if chains is None:
        _join_touched_chains(atoms, body)
    return ids, body


def _chain_list(chains: str | Sequence[str], present: list[str]) -> list[str]:
    """Chain ids: "A,B", "A B" and "AB" all mean two chains, unless one chain is called so."""
    if not isinstance(chains, str):
        return list(chains)
    if chains in present:
        return [chains]
    if "," in chains or " " in chains:
        return chains.replace(",", " ").split()
    return list(chains)


def _join_touched_chains(atoms: prody.AtomGroup, body: np.ndarray) -> None:
    """Give sugars and ligands with a chain id of their own, whole, the body that they touch."""
    coords = atoms.getCoords()
    chids = atoms.getChids()
    polymer = np.flatnonzero(body >= 0)
    tree = cKDTree(coords[polymer])
    for chain in set(chids[body < 0]):
        distance, nearest = tree.query(coords[chids == chain])
        body[chids == chain] = body[polymer[nearest[distance.argmin()]]]
