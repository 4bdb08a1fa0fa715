"""Residues: which atoms are nodes of the elastic network, what rides with them, how strongly they scatter.

A node is the Cα of an amino acid or the P of a nucleotide. The scattering of an atom is taken as its atomic
number, that of a residue as the sum over the heavy atoms of its type, so that it does not depend on how many
of them a depositor could model. Only ratios matter: `structure` scales the weights to mean 1.
"""

import numpy as np
import prody
from prody.atomic.atomic import AAMAP
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

_ELEMENTS = (
    "H HE LI BE B C N O F NE NA MG AL SI P S CL AR K CA SC TI V CR MN FE CO NI CU ZN GA GE AS SE BR KR RB "
    "SR Y ZR NB MO TC RU RH PD AG CD IN SN SB TE I XE CS BA LA CE PR ND PM SM EU GD TB DY HO ER TM YB LU "
    "HF TA W RE OS IR PT AU HG TL PB BI PO AT RN FR RA AC TH PA U"
)
ATOMIC_NUMBERS = {symbol: number for number, symbol in enumerate(_ELEMENTS.split(), start=1)} | {"D": 1}

# Electrons in the heavy atoms of a residue inside a chain (its free molecule less one water).
_ELECTRONS = {
    "GLY": 27, "ALA": 33, "SER": 41, "CYS": 49, "THR": 47, "VAL": 45, "LEU": 51, "ILE": 51, "MET": 61, "MSE": 79,
    "PRO": 45, "ASP": 55, "GLU": 61, "ASN": 54, "GLN": 60, "HIS": 65, "LYS": 58, "ARG": 72, "PHE": 69, "TYR": 77,
    "TRP": 88, "A": 158, "C": 146, "G": 166, "U": 147, "DA": 150, "DC": 138, "DG": 158, "DT": 145,
}  # fmt: skip
_ALIASES = {
    "HSD": "HIS", "HSE": "HIS", "HSP": "HIS", "HID": "HIS", "HIE": "HIS", "HIP": "HIS",
    "CYX": "CYS", "CYM": "CYS", "ASH": "ASP", "GLH": "GLU", "LYN": "LYS",
    "ADE": "A", "CYT": "C", "GUA": "G", "URA": "U", "THY": "DT",
    "RA": "A", "RC": "C", "RG": "G", "RU": "U", "T": "DT",
}  # fmt: skip
_NUCLEOTIDES = frozenset(("A", "C", "G", "U", "DA", "DC", "DG", "DT"))
WATERS = ("HOH", "WAT", "DOD", "H2O", "TIP", "TIP3", "TIP4", "SOL", "SPC")

# A free amino acid or nucleotide bound as a ligand is no node: in a polymer the next one is this near (Å).
_NEIGHBOUR = {"CA": 4.3, "P": 8.0}
_BOND = 2.0  # Å: parts of a ligand nearer than this are bonded, and ride as one


def residue_ids(atoms: prody.AtomGroup, with_name: bool = True) -> np.ndarray:
    """(n,) residue of every atom, from 0: same chain, number, insertion code (and name) are one residue."""
    columns = [atoms.getChids(), atoms.getResnums(), atoms.getIcodes()]
    if with_name:
        columns.append(atoms.getResnames())
    # Numbers instead of strings, column by column: np.unique on rows of text is slow for large files.
    ids = np.zeros(atoms.numAtoms(), dtype=np.int64)
    for column in columns:
        _, code = np.unique(column, return_inverse=True)
        _, ids = np.unique(ids * (code.max(initial=0) + 1) + code, return_inverse=True)
    return ids


def letters(resnames: np.ndarray) -> np.ndarray:
    """(n,) one-letter code of each residue name: "M" for MET and MSE, lower case for bases, else "X"."""

    def letter(resname: str) -> str:
        resname = _ALIASES.get(resname, resname)
        if resname in _NUCLEOTIDES:
            return resname[-1].lower().replace("u", "t")
        code = AAMAP.get(resname, "X") if len(resname) == 3 else "X"
        return code if len(code) == 1 and code.isupper() else "X"

    names, inverse = np.unique(resnames, return_inverse=True)
    return np.array([letter(name) for name in names], dtype="U1")[inverse]


def atomic_numbers(atoms: prody.AtomGroup) -> np.ndarray:
    """(n,) atomic number of every atom; 6, the commonest, where the element is unknown."""
    symbols, inverse = np.unique(atoms.getElements(), return_inverse=True)
    return np.array([ATOMIC_NUMBERS.get(symbol, 6) for symbol in symbols], dtype=float)[inverse]


def guess_elements(names: np.ndarray, resnames: np.ndarray) -> np.ndarray:
    """(n,) element symbols from atom names: an ion's name, else the first letter ("CA" of ALA is carbon)."""

    def guess(name: str, resname: str) -> str:
        name = name.strip("0123456789'*\" ").upper()
        if name[:2] == "SE" and resname in ("MSE", "SEC"):
            return "SE"
        return name if name == resname and name in ATOMIC_NUMBERS else name[:1]

    return np.array([guess(*pair) for pair in zip(names, resnames, strict=True)], dtype="U2")


def find_nodes(atoms: prody.AtomGroup) -> np.ndarray:
    """Rows of `atoms` that are nodes, one a residue, increasing.

    Modified residues inside a chain (selenomethionine and the like) count; free amino acids, nucleotides and
    calcium ions do not. A nucleotide without phosphate, as the first of a strand, is represented by its O5'.
    """
    names, elements = atoms.getNames(), atoms.getElements()
    ids = residue_ids(atoms)

    def having(mask):
        return np.isin(ids, ids[mask])

    known = np.array([_ALIASES.get(name, name) for name in atoms.getResnames()])
    codes = letters(known)
    nucleotide = np.isin(known, list(_NUCLEOTIDES)) | (having(names == "P") & having(np.isin(names, ("C4'", "C4*"))))
    amino = (np.char.isupper(codes) & (codes != "X")) | (known == "UNK")
    amino |= having(names == "N") & having(names == "C")
    alpha = (names == "CA") & (elements == "C") & amino & ~nucleotide
    phosphorus = (names == "P") & nucleotide
    phosphorus |= np.isin(names, ("O5'", "O5*")) & nucleotide & ~having(phosphorus)

    hetero = atoms.getFlags("hetatm")
    coords, chids = atoms.getCoords(), atoms.getChids()
    nodes = np.zeros(len(names), dtype=bool)
    for mask, kind in ((alpha, "CA"), (phosphorus, "P")):
        rows = np.flatnonzero(mask)
        if hetero[rows].any() and not hetero[rows].all():
            pairs = cKDTree(coords[rows]).query_pairs(_NEIGHBOUR[kind], output_type="ndarray")
            pairs = pairs[chids[rows[pairs[:, 0]]] == chids[rows[pairs[:, 1]]]]
            rows = rows[np.isin(np.arange(len(rows)), pairs) | ~hetero[rows]]
        nodes[rows] = True
    rows = np.flatnonzero(nodes)
    return np.sort(rows[np.unique(ids[rows], return_index=True)[1]])


def residue_scattering(atoms: prody.AtomGroup, rows: np.ndarray) -> np.ndarray:
    """(n,) electrons in the heavy atoms of the residues that the atoms `rows` belong to.

    A residue of a type that is not listed here counts the atoms that were modelled, as an alanine at least.
    """
    ids, numbers = residue_ids(atoms), atomic_numbers(atoms)
    modelled = np.bincount(ids, weights=np.where(numbers > 1, numbers, 0.0))
    modelled = np.maximum(modelled, _ELECTRONS["ALA"])[ids[rows]]
    types = [_ALIASES.get(name, name) for name in atoms.getResnames()[rows]]
    return np.array([_ELECTRONS.get(kind, own) for kind, own in zip(types, modelled, strict=True)])


def ride(atoms: prody.AtomGroup, body: np.ndarray, node_rows: np.ndarray) -> np.ndarray:
    """(n,) node that every atom rides with: its residue's, else that of the residue its ligand touches.

    A ligand, or a tree of sugars, whose parts are bonded rides as one and so stays rigid.
    """
    coords = atoms.getCoords()
    _, part = np.unique(residue_ids(atoms) * (body.max() + 1) + body, return_inverse=True)
    node_of = np.full(part.max() + 1, -1)
    node_of[part[node_rows]] = np.arange(len(node_rows))
    lost = np.flatnonzero(node_of[part] < 0)
    bonds = cKDTree(coords[lost]).query_pairs(_BOND, output_type="ndarray")
    bonds = part[lost[bonds]][body[lost[bonds[:, 0]]] == body[lost[bonds[:, 1]]]]
    graph = coo_matrix((np.ones(len(bonds)), bonds.T), shape=(len(node_of), len(node_of)))
    ligand = connected_components(graph, directed=False)[1][part]
    node_of_ligand = np.full(ligand.max() + 1, -1)
    for c in set(body[lost]):
        own = np.flatnonzero((body == c) & (node_of[part] >= 0))
        free = lost[body[lost] == c]
        distance, nearest = cKDTree(coords[own]).query(coords[free])
        # Farthest first: the ligand's atom nearest to the polymer writes last and speaks for all of it.
        far_first = np.argsort(-distance, kind="stable")
        node_of_ligand[ligand[free[far_first]]] = node_of[part[own[nearest[far_first]]]]
    return np.where(node_of[part] >= 0, node_of[part], node_of_ligand[ligand])
