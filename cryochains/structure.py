"""A molecule as bodies that move: chains by default, each with its atoms and its elastic-network nodes.

Symbols of the paper: X⁽⁰⁾ → `Structure.coords`, N → `n_atoms`, com of a chain → `centers`; the chain of an
atom is `chain_index`. Coordinates are (n, 3) in Å. Three sets of atoms share one list: every atom (`atoms`,
for export), the imaging atoms (`rows`) that scatter in a simulated image, and the nodes (`node_rows`), one a
residue, that the normal modes are computed on. Every atom rides with one node.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import prody
from scipy.spatial import cKDTree

from .residues import atomic_numbers, find_nodes, residue_scattering, ride
from .sources import quiet_prody, read_atoms, take, write_pdb


@dataclass(frozen=True, eq=False)
class Structure:
    """Bodies, atoms and nodes of one molecule; made by `load_structure`, never changed in place.

    Attributes
    ----------
    name
        "6UO8", "glua3-open", or the file's stem.
    atoms
        Every atom of the bodies, ligands included and water not, body by body.
    chain_ids
        Names of the bodies.
    atom_chain
        (n_all,) body of every atom of `atoms`, non-decreasing.
    atom_node
        (n_all,) node every atom rides with.
    rows
        (n_atoms,) which of `atoms` are imaging atoms, increasing.
    node_rows
        (n_nodes,) which of `atoms` are nodes (Cα, or P of nucleotides), increasing.
    weights
        (n_atoms,) scattering of every imaging atom, mean 1.
    origin
        (3,) Å, the point of the structure at the centre of the box.
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
        """(n_atoms,) node every imaging atom rides with."""
        return self.atom_node[self.rows]

    @cached_property
    def node_chain(self) -> np.ndarray:
        """(n_nodes,) body of every node."""
        return self.atom_chain[self.node_rows]

    @cached_property
    def resnums(self) -> np.ndarray:
        """(n_atoms,) author's residue number of every imaging atom."""
        return self.atoms.getResnums()[self.rows]

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

    @cached_property
    def centers(self) -> np.ndarray:
        """(n_chains, 3) Å, mean of each body's nodes.

        Nodes, one a residue and of equal mass as in the elastic network, whatever the imaging atoms are:
        "ca", "heavy" and all-atom export then turn about the same point.
        """
        return np.stack([self.node_coords[self.node_chain == c].mean(0) for c in range(self.n_chains)])

    @cached_property
    def radii(self) -> np.ndarray:
        """(n_chains,) Å, radius of gyration of each body's nodes."""
        offsets = self.node_coords - self.centers[self.node_chain]
        return np.sqrt(np.bincount(self.node_chain, (offsets**2).sum(1)) / np.bincount(self.node_chain))

    @cached_property
    def content_hash(self) -> str:
        """16 hex digits of the nodes (to 1e-3 Å), their residues and the bodies; free of file names."""
        parts = [getattr(self.atoms, f"get{field}")()[self.node_rows] for field in ("Resnums", "Icodes", "Resnames")]
        text = "\n".join(" ".join(map(str, part)) for part in (self.chain_ids, self.node_chain, *parts))
        milli = np.round(self.node_coords * 1000).astype("<i8")
        return hashlib.sha256(text.encode() + milli.tobytes()).hexdigest()[:16]

    def all_atoms(self) -> "Structure":
        """The same molecule with every atom, ligands too, as an imaging atom: for deforming and export."""
        numbers = atomic_numbers(self.atoms)
        return replace(self, rows=np.arange(self.atoms.numAtoms()), weights=numbers / numbers.mean())

    def as_one_body(self) -> "Structure":
        """All bodies merged into one, named "A+B": the modes of the whole assembly."""
        return replace(self, chain_ids=("+".join(self.chain_ids),), atom_chain=np.zeros_like(self.atom_chain))

    def with_coords(self, coords: np.ndarray) -> "Structure":
        """The same molecule with other coordinates of every atom, (n_all, 3) Å; the origin stays.

        Raises
        ------
        ValueError
            When `coords` has another shape or is not finite.
        """
        coords = np.asarray(coords, dtype=float)
        expected = (self.atoms.numAtoms(), 3)
        if coords.shape != expected or not np.isfinite(coords).all():
            raise ValueError(f"expected finite coordinates {expected} of all atoms, got shape {coords.shape}")
        atoms = self.atoms.copy()
        atoms.setCoords(coords)
        return replace(self, atoms=atoms)

    def with_origin(self, xyz: Sequence[float]) -> "Structure":
        """The same molecule with the point `xyz` (Å) at the centre of the box.

        Raises
        ------
        ValueError
            When `xyz` is not three finite numbers.
        """
        origin = np.asarray(xyz, dtype=float)
        if origin.shape != (3,) or not np.isfinite(origin).all():
            raise ValueError(f"expected an origin of three finite numbers in Å, got {xyz!r}")
        return replace(self, origin=origin)

    def save(self, path: str | os.PathLike) -> None:
        """Write all atoms as a PDB file, whole or not at all.

        A chain id longer than the format's one letter is replaced by a letter that is free.

        Raises
        ------
        ValueError
            When the name does not end in .pdb or .pdb.gz, or the place cannot be written.
        """
        write_pdb(self.atoms, self.name, path)

    def __repr__(self) -> str:
        chains, n_all = " ".join(self.chain_ids), self.atoms.numAtoms()
        return f"Structure({self.name!r}, chains {chains}, {self.n_nodes:,} residues, {n_all:,} atoms)"


def load_structure(
    source: str | os.PathLike | prody.Atomic,
    chains: str | Sequence[str] | None = None,
    atoms: str = "ca",
    bodies: Mapping[str, str] | None = None,
) -> Structure:
    """Load a molecule as bodies of atoms.

    Of alternate locations the best occupied is taken, of several models the first; water is left out.

    Parameters
    ----------
    source
        "glua3-closed" or "glua3-open" (embedded), a PDB id, a PDB or mmCIF file (.gz too), or ProDy atoms. A
        PDB id is looked for in the folder named by the environment variable CRYOCHAINS_STRUCTURES, then in
        the cache, then fetched.
    chains
        Author's ids of the chains to keep, in this order. By default every chain of protein or nucleic acid;
        ligands and sugars with chain ids of their own then ride with the one they touch.
    atoms
        Imaging atoms: "ca", one a residue (P for nucleotides) that scatters as the whole residue, or "heavy",
        every atom but hydrogen by its atomic number.
    bodies
        Names and ProDy selections of the bodies, in place of chains: ``{"head": "chain A and resnum 1 to
        200"}``.

    Returns
    -------
    Structure
        Its origin is the mean of the imaging atoms.

    Raises
    ------
    FileNotFoundError
        When the source is no file here and no PDB entry that can be had.
    ValueError
        When a file cannot be read, a chain is absent, a body is empty, overlaps another or holds no node.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> load_structure("glua3-open")
    Structure('glua3-open', chains A B, 741 residues, 5,958 atoms)
    """
    if atoms not in ("ca", "heavy"):
        raise ValueError(f"expected atoms 'ca' or 'heavy', got {atoms!r}")
    name, group = read_atoms(source)
    nodes = find_nodes(group)
    if not len(nodes):
        raise ValueError(f"expected protein or nucleic acid, got no Cα and no P in {name}; try another file")
    if bodies is not None:
        if chains is not None:
            raise ValueError("expected chains or bodies, got both; try selecting the chains within the bodies")
        ids, body = _by_selection(group, bodies)
    else:
        ids, body = _by_chain(name, group, nodes, chains)
    for c, chain in enumerate(ids):
        if c not in body[nodes]:
            raise ValueError(f"expected Cα atoms (or P of nucleotides) in {chain!r} of {name}, got none")
    # Body by body; −1 are atoms to leave out.
    order = np.argsort(body, kind="stable")[np.sum(body < 0) :]
    group, body = take(group, order), body[order]
    node_rows = np.flatnonzero(np.isin(order, nodes))
    if atoms == "ca":
        rows, weights = node_rows, residue_scattering(group, node_rows)
    else:
        numbers = atomic_numbers(group)
        rows = np.flatnonzero(numbers > 1)
        weights = numbers[rows]
    return Structure(
        name=name,
        atoms=group,
        chain_ids=tuple(ids),
        atom_chain=body,
        atom_node=ride(group, body, node_rows),
        rows=rows,
        node_rows=node_rows,
        weights=weights / weights.mean(),
        origin=group.getCoords()[rows].mean(0),
    )


def _by_selection(atoms: prody.AtomGroup, bodies: Mapping[str, str]) -> tuple[list[str], np.ndarray]:
    if not bodies:
        raise ValueError("expected at least one body, got none; try chains instead")
    body = np.full(atoms.numAtoms(), -1)
    for c, (name, text) in enumerate(bodies.items()):
        try:
            with quiet_prody():
                selected = atoms.select(text)
        except prody.SelectionError as error:
            raise ValueError(f"expected a ProDy selection for body {name!r}, got {text!r} ({error})") from error
        if selected is None:
            raise ValueError(f"expected atoms in body {name!r}, got none for {text!r}; try another selection")
        taken = body[selected.getIndices()]
        if (taken >= 0).any():
            other = list(bodies)[taken.max()]
            raise ValueError(
                f"expected bodies without common atoms, got {(taken >= 0).sum()} in {other!r} and {name!r}"
            )
        body[selected.getIndices()] = c
    return list(bodies), body


def _by_chain(
    name: str, atoms: prody.AtomGroup, nodes: np.ndarray, chains: str | Sequence[str] | None
) -> tuple[list[str], np.ndarray]:
    chids = atoms.getChids()
    present = list(dict.fromkeys(chids[nodes]))
    if chains is None:
        ids = present
    elif isinstance(chains, str) and chains not in present:
        # "A,B", "A B" and "AB" all mean two chains, unless one chain is called so.
        ids = chains.replace(",", " ").split() if set(chains) & set(", ") else list(chains)
    else:
        ids = [chains] if isinstance(chains, str) else list(chains)
    absent = [chain for chain in ids if chain not in present]
    if absent or not ids:
        raise ValueError(f"expected chains among {' '.join(present)} of {name}, got {', '.join(absent) or 'none'}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"expected every chain once, got {' '.join(ids)}")
    body = np.full(len(chids), -1)
    for c, chain in enumerate(ids):
        body[chids == chain] = c
    if chains is None:
        # Sugars and ligands with a chain id of their own go, whole, with the chain they touch.
        coords, polymer = atoms.getCoords(), np.flatnonzero(body >= 0)
        tree = cKDTree(coords[polymer])
        for chain in set(chids[body < 0]):
            distance, nearest = tree.query(coords[chids == chain])
            body[chids == chain] = body[polymer[nearest[distance.argmin()]]]
    return ids, body
