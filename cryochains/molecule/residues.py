"""Residues: the nodes of the elastic network, the node that an atom moves with, scattering.

A node is the Cα of an amino acid or the P of a nucleotide. The scattering of an atom is taken as
its atomic number, that of a residue as the sum over the heavy atoms of its type, so that it does
not depend on how many of them a depositor could model. Only ratios matter: `load_structure` scales
the weights to mean 1.
"""

import numpy as np
import prody
from prody.atomic.atomic import AAMAP
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

_ELEMENT_SYMBOLS = (
    "H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE "
    "BR KR RB SR Y ZR NB MO TC RU RH PD AG CD IN SN SB TE I XE CS BA LA CE PR ND PM SM EU GD TB DY "
    "HO ER TM YB LU HF TA W RE OS IR PT AU HG TL PB BI PO AT RN FR RA AC TH PA U"
)
ATOMIC_NUMBERS = {
    symbol: number for number, symbol in enumerate(_ELEMENT_SYMBOLS.split(), start=1)
} | {"D": 1}

# Electrons in the heavy atoms of a residue inside a chain (its free molecule less one water).
_ELECTRONS = {
    "GLY": 27,
    "ALA": 33,
    "SER": 41,
    "CYS": 49,
    "THR": 47,
    "VAL": 45,
    "LEU": 51,
    "ILE": 51,
    "MET": 61,
    "MSE": 79,
    "PRO": 45,
    "ASP": 55,
    "GLU": 61,
    "ASN": 54,
    "GLN": 60,
    "HIS": 65,
    "LYS": 58,
    "ARG": 72,
    "PHE": 69,
    "TYR": 77,
    "TRP": 88,
    "A": 158,
    "C": 146,
    "G": 166,
    "U": 147,
    "DA": 150,
    "DC": 138,
    "DG": 158,
    "DT": 145,
}
# Other names of the same residue types, as simulation programs write them.
_ALIASES = {
    "HSD": "HIS",
    "HSE": "HIS",
    "HSP": "HIS",
    "HID": "HIS",
    "HIE": "HIS",
    "HIP": "HIS",
    "CYX": "CYS",
    "CYM": "CYS",
    "ASH": "ASP",
    "GLH": "GLU",
    "LYN": "LYS",
    "ADE": "A",
    "CYT": "C",
    "GUA": "G",
    "URA": "U",
    "THY": "DT",
    "RA": "A",
    "RC": "C",
    "RG": "G",
    "RU": "U",
    "T": "DT",
}
_NUCLEOTIDES = frozenset(("A", "C", "G", "U", "DA", "DC", "DG", "DT"))
WATERS = ("HOH", "WAT", "DOD", "H2O", "TIP", "TIP3", "TIP4", "SOL", "SPC")

# A free amino acid or nucleotide that is bound as a ligand is no node. Inside a polymer the next
# residue's node is at most this far away (Å).
_NEIGHBOUR_DISTANCE = {"CA": 4.3, "P": 8.0}
# Å: two parts of a ligand with atoms nearer than this are bonded and move as one.
_BOND_LENGTH = 2.0


def residue_ids(atoms: prody.AtomGroup, with_name: bool = True) -> np.ndarray:
    """(n,) residue of every atom, from 0: the same chain, number, insertion code (and name)."""
    columns = [atoms.getChids(), atoms.getResnums(), atoms.getIcodes()]
    if with_name:
        columns.append(atoms.getResnames())
    return combine_codes(columns)


def combine_codes(columns: list[np.ndarray]) -> np.ndarray:
    """(n,) one integer for every distinct combination of what the columns hold, from 0."""
    # Integers instead of text, column by column: np.unique on rows of text is slow for large files.
    ids = np.zeros(len(columns[0]), dtype=np.int64)
    for column in columns:
        _, code = np.unique(column, return_inverse=True)
        _, ids = np.unique(ids * (code.max(initial=0) + 1) + code, return_inverse=True)
    return ids


def one_letter_codes(resnames: np.ndarray) -> np.ndarray:
    """(n,) code of each residue name: "M" for MET and MSE, lower case for bases, else "X"."""
    names, inverse = np.unique(resnames, return_inverse=True)
    return np.array([_one_letter_code(name) for name in names], dtype="U1")[inverse]


def _one_letter_code(resname: str) -> str:
    resname = _ALIASES.get(resname, resname)
    if resname in _NUCLEOTIDES:
        return resname[-1].lower().replace("u", "t")
    code = AAMAP.get(resname, "X") if len(resname) == 3 else "X"
    return code if len(code) == 1 and code.isupper() else "X"


def atomic_numbers(atoms: prody.AtomGroup) -> np.ndarray:
    """(n,) atomic number of every atom; 6, the commonest, where the element is unknown."""
    symbols, inverse = np.unique(atoms.getElements(), return_inverse=True)
    numbers = [ATOMIC_NUMBERS.get(symbol, 6) for symbol in symbols]
    return np.array(numbers, dtype=float)[inverse]


def guess_elements(names: np.ndarray, resnames: np.ndarray) -> np.ndarray:
    """(n,) element symbols from atom names: an ion's name, else the first letter (CA is carbon)."""
    guesses = [_guess_element(*pair) for pair in zip(names, resnames, strict=True)]
    return np.array(guesses, dtype="U2")


def _guess_element(name: str, resname: str) -> str:
    name = name.strip("0123456789'*\" ").upper()
    if name[:2] == "SE" and resname in ("MSE", "SEC"):
        return "SE"
    if name == resname and name in ATOMIC_NUMBERS:
        return name
    return name[:1]


def find_nodes(atoms: prody.AtomGroup) -> np.ndarray:
    """Rows of `atoms` that are nodes, one a residue, increasing.

    Modified residues inside a chain (selenomethionine and the like) count; free amino acids,
    nucleotides and calcium ions do not. A nucleotide without phosphate, as the first of a strand,
    is represented by its O5'. A residue that stands twice in the file has two nodes.
    """
    alpha, phosphorus = _node_candidates(atoms)
    hetero = atoms.getFlags("hetatm")
    coords = atoms.getCoords()
    chids = atoms.getChids()
    nodes = np.zeros(atoms.numAtoms(), dtype=bool)
    for mask, kind in ((alpha, "CA"), (phosphorus, "P")):
        rows = np.flatnonzero(mask)
        if hetero[rows].any() and not hetero[rows].all():
            tree = cKDTree(coords[rows])
            pairs = tree.query_pairs(_NEIGHBOUR_DISTANCE[kind], output_type="ndarray")
            same_chain = chids[rows[pairs[:, 0]]] == chids[rows[pairs[:, 1]]]
            in_polymer = np.isin(np.arange(len(rows)), pairs[same_chain])
            rows = rows[in_polymer | ~hetero[rows]]
        nodes[rows] = True
    return np.flatnonzero(nodes)


def _node_candidates(atoms: prody.AtomGroup) -> tuple[np.ndarray, np.ndarray]:
    """(n,) masks of the atoms that may be nodes of amino acids and of nucleotides."""
    names = atoms.getNames()
    elements = atoms.getElements()
    ids = residue_ids(atoms)

    def in_residue_with(mask: np.ndarray) -> np.ndarray:
        return np.isin(ids, ids[mask])

    types = np.array([_ALIASES.get(name, name) for name in atoms.getResnames()])
    has_phosphorus = in_residue_with(names == "P")
    has_sugar = in_residue_with(np.isin(names, ("C4'", "C4*")))
    nucleotide = np.isin(types, list(_NUCLEOTIDES)) | (has_phosphorus & has_sugar)

    codes = one_letter_codes(types)
    amino_acid = (np.char.isupper(codes) & (codes != "X")) | (types == "UNK")
    amino_acid |= in_residue_with(names == "N") & in_residue_with(names == "C")
    alpha = (names == "CA") & (elements == "C") & amino_acid & ~nucleotide

    phosphorus = (names == "P") & nucleotide
    first_of_strand = nucleotide & ~in_residue_with(phosphorus)
    phosphorus |= np.isin(names, ("O5'", "O5*")) & first_of_strand
    return alpha, phosphorus


def residue_scattering(atoms: prody.AtomGroup, rows: np.ndarray) -> np.ndarray:
    """(n,) electrons in the heavy atoms of the residues that the atoms `rows` belong to.

    A residue of a type that is not listed here counts the atoms that were modelled, as an alanine
    at least.
    """
    modelled = np.maximum(modelled_electrons(atoms, rows), _ELECTRONS["ALA"])
    types = [_ALIASES.get(name, name) for name in atoms.getResnames()[rows]]
    electrons = [_ELECTRONS.get(kind, own) for kind, own in zip(types, modelled, strict=True)]
    return np.array(electrons)


def modelled_electrons(atoms: prody.AtomGroup, rows: np.ndarray) -> np.ndarray:
    """(n,) electrons in the heavy atoms that were modelled of the residues of the atoms `rows`."""
    ids = residue_ids(atoms)
    numbers = atomic_numbers(atoms)
    return np.bincount(ids, weights=np.where(numbers > 1, numbers, 0.0))[ids[rows]]


def assign_nodes(atoms: prody.AtomGroup, body: np.ndarray, node_rows: np.ndarray) -> np.ndarray:
    """(n,) node that every atom moves with: its residue's, else that of the residue it touches.

    A ligand, or a tree of sugars, whose parts are bonded moves with one node and so stays rigid.

    Parameters
    ----------
    body
        (n,) body of every atom.
    node_rows
        Rows of the nodes, increasing.
    """
    # A residue that two bodies share is two parts.
    _, part = np.unique(residue_ids(atoms) * (body.max() + 1) + body, return_inverse=True)
    node_of_part = np.full(part.max() + 1, -1)
    node_of_part[part[node_rows]] = np.arange(len(node_rows))
    own_node = node_of_part[part]
    if (own_node >= 0).all():
        return own_node
    ligand = _bonded_ligands(atoms.getCoords(), body, part, own_node)
    node_of_ligand = _touched_nodes(atoms.getCoords(), body, own_node, ligand)
    return np.where(own_node >= 0, own_node, node_of_ligand[ligand])


def _bonded_ligands(
    coords: np.ndarray, body: np.ndarray, part: np.ndarray, own_node: np.ndarray
) -> np.ndarray:
    """(n,) ligand of every atom: residues without a node that are bonded count as one."""
    rows = np.flatnonzero(own_node < 0)
    bonds = cKDTree(coords[rows]).query_pairs(_BOND_LENGTH, output_type="ndarray")
    bonds = rows[bonds]
    bonds = part[bonds[body[bonds[:, 0]] == body[bonds[:, 1]]]]
    n_parts = part.max() + 1
    graph = coo_matrix((np.ones(len(bonds)), bonds.T), shape=(n_parts, n_parts))
    _, component = connected_components(graph, directed=False)
    return component[part]


def _touched_nodes(
    coords: np.ndarray, body: np.ndarray, own_node: np.ndarray, ligand: np.ndarray
) -> np.ndarray:
    """(n_ligands,) node of the residue of its body that each ligand comes nearest to."""
    node_of_ligand = np.full(ligand.max() + 1, -1)
    for c in np.unique(body[own_node < 0]):
        polymer = np.flatnonzero((body == c) & (own_node >= 0))
        rows = np.flatnonzero((body == c) & (own_node < 0))
        distance, nearest = cKDTree(coords[polymer]).query(coords[rows])
        # Farthest first: the ligand's atom that is nearest to the polymer is written last, and so
        # decides for the whole ligand.
        far_first = np.argsort(-distance, kind="stable")
        node_of_ligand[ligand[rows[far_first]]] = own_node[polymer[nearest[far_first]]]
    return node_of_ligand
