"""Structures as files: PDB text within its fixed columns, mmCIF without such limits."""

import gzip
import os
import re
import string
from pathlib import Path

import numpy as np
import prody

from .._arguments import checked
from .._files import atomic_path
from .residues import find_nodes, residue_ids
from .sources import quiet_prody

_PDB_CHAIN_LETTERS = string.ascii_letters + string.digits
# What the columns of PDB text hold: name, getter, lowest, highest, decimals.
_PDB_NUMBER_COLUMNS = (
    ("coordinates", "Coordsets", -999.999, 9999.999, 3),
    ("residue numbers", "Resnums", -999, 9999, 0),
    ("occupancies", "Occupancies", -99.99, 999.99, 2),
    ("B-factors", "Betas", -99.99, 999.99, 2),
)
_PDB_TEXT_COLUMNS = (
    ("atom names", "Names", 4),
    ("residue names", "Resnames", 3),
)
_PDB_MOST_ATOMS = 99_999
# ProDy's reader cuts longer words of an mmCIF file off, quotes counted.
_CIF_WORD_LENGTH = 6
_CIF_ATOM_COLUMNS = (
    "group_PDB",
    "id",
    "type_symbol",
    "label_atom_id",
    "label_alt_id",
    "label_comp_id",
    "label_asym_id",
    "label_entity_id",
    "label_seq_id",
    "pdbx_PDB_ins_code",
    "Cartn_x",
    "Cartn_y",
    "Cartn_z",
    "occupancy",
    "B_iso_or_equiv",
    "auth_seq_id",
    "auth_asym_id",
    "pdbx_PDB_model_num",
)


@checked
def write_structure(atoms: prody.AtomGroup, title: str, path: str | os.PathLike) -> None:
    """Write atoms as PDB text or mmCIF, by the suffix, whole or not at all.

    Every coordinate set of `atoms` becomes a model. In PDB text a chain id of several letters is
    replaced by a letter that is free, see `chain_names`; mmCIF keeps every id.

    Parameters
    ----------
    atoms
        `Structure.atoms`, or a copy with other coordinates.
    title
        Name of the molecule, written into the file.
    path
        Ends in .pdb, .pdb.gz, .cif or .cif.gz.

    Raises
    ------
    ValueError
        For another suffix, a folder that cannot be written, coordinates that are not finite, or
        what does not fit into the columns of PDB text: more than 62 chains or 99,999 atoms, a
        coordinate of 10000 Å.
    """
    path = Path(path)
    name = path.name.lower()
    if not name.endswith((".pdb", ".pdb.gz", ".cif", ".cif.gz")):
        raise ValueError(
            "expected a file name ending in .pdb, .pdb.gz, .cif or .cif.gz, got "
            f"{path.name or path}; try {path.name.split('.')[0] or 'structure'}.pdb"
        )
    _require_finite(atoms)
    write = _write_pdb if name.endswith((".pdb", ".pdb.gz")) else _write_mmcif
    write(atoms, title, path)


@checked
def chain_names(atoms: prody.AtomGroup) -> dict[str, str]:
    """The one letter or digit that each chain id gets in PDB text: its own, else one that is free.

    Raises
    ------
    ValueError
        When there are more than 62 chains.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> atoms = load_structure("glua3-open").atoms.copy()
    >>> atoms.setChids(np.where(atoms.getChids() == "A", "LA0", "B"))
    >>> chain_names(atoms) == {"LA0": "a", "B": "B"}
    True
    """
    present = list(dict.fromkeys(atoms.getChids().tolist()))
    if len(present) > len(_PDB_CHAIN_LETTERS):
        raise ValueError(
            f"expected at most {len(_PDB_CHAIN_LETTERS)} chains, as PDB text has one letter or "
            f"digit for each, got {len(present)}; try a file name that ends in .cif"
        )
    free = iter([letter for letter in _PDB_CHAIN_LETTERS if letter not in present])
    return {chain: chain if len(chain) == 1 else next(free) for chain in present}


def fits_pdb_text(atoms: prody.AtomGroup) -> bool:
    """Whether PDB text can hold the chains, atoms, numbers and names; mmCIF can hold any.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> atoms = load_structure("glua3-open").atoms.copy()
    >>> fits_pdb_text(atoms)
    True
    >>> atoms.setCoords(atoms.getCoords() + 20_000)
    >>> fits_pdb_text(atoms)
    False
    """
    try:
        _require_finite(atoms)
        chain_names(atoms)
        _require_pdb_columns(atoms)
    except ValueError:
        return False
    return True


def _write_pdb(atoms: prody.AtomGroup, title: str, path: Path) -> None:
    letters = chain_names(atoms)
    _require_pdb_columns(atoms)
    atoms = atoms.copy()
    atoms.setChids([letters[chain] for chain in atoms.getChids()])
    atoms.setTitle(" ".join(title.split()))
    with atomic_path(path) as part, quiet_prody():
        prody.writePDB(str(part), atoms)


def _require_pdb_columns(atoms: prody.AtomGroup) -> None:
    """Raise where a value is too wide for its columns: it would be cut, or would shift others."""
    n = atoms.numAtoms()
    if n > _PDB_MOST_ATOMS:
        raise ValueError(
            f"expected at most {_PDB_MOST_ATOMS:,} atoms for PDB text, got {n:,}; "
            "try a file name that ends in .cif"
        )
    for what, field, lowest, highest, decimals in _PDB_NUMBER_COLUMNS:
        values = np.round(_values(atoms, field), decimals)
        outside = (values < lowest) | (values > highest)
        if outside.any():
            raise ValueError(
                f"expected {what} from {lowest} to {highest} for PDB text, got "
                f"{values[outside][0]}; try a file name that ends in .cif"
            )
    for what, field, length in _PDB_TEXT_COLUMNS:
        words = np.unique(_values(atoms, field)).tolist()
        too_long = [word for word in words if len(word) > length]
        if too_long:
            raise ValueError(
                f"expected {what} of at most {length} characters for PDB text, got "
                f"{too_long[0]!r}; try a file name that ends in .cif"
            )


def _require_finite(atoms: prody.AtomGroup) -> None:
    for what, field, _, _, _ in _PDB_NUMBER_COLUMNS:
        if not np.isfinite(_values(atoms, field)).all():
            raise ValueError(
                f"expected finite {what} to write, got NaN or infinity; try leaving those atoms out"
            )


def _values(atoms: prody.AtomGroup, field: str) -> np.ndarray:
    return getattr(atoms, f"get{field}")()


def _write_mmcif(atoms: prody.AtomGroup, title: str, path: Path) -> None:
    before, after = _words_around_coordinates(atoms)
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    serial = 0
    with atomic_path(path) as part, opener(part, "wt", encoding="utf-8") as stream:
        stream.write(f"data_{re.sub(r'[^A-Za-z0-9_.+-]+', '_', title) or 'structure'}\n#\nloop_\n")
        stream.writelines(f"_atom_site.{column}\n" for column in _CIF_ATOM_COLUMNS)
        for model, coords in enumerate(atoms.getCoordsets(), start=1):
            for start, xyz, end in zip(before, coords.tolist(), after, strict=True):
                serial += 1
                record, words = start
                position = "{:.3f} {:.3f} {:.3f}".format(*xyz)
                stream.write(f"{record} {serial} {words} {position} {end} {model}\n")
        stream.write("#\n")


def _words_around_coordinates(
    atoms: prody.AtomGroup,
) -> tuple[list[tuple[str, str]], list[str]]:
    """Of every atom (record, type to insertion code) and (occupancy to author's chain id)."""
    chains = _cif_words(atoms.getChids(), "chain ids")
    columns = zip(
        np.where(atoms.getFlags("hetatm"), "HETATM", "ATOM").tolist(),
        _cif_words(atoms.getElements(), "elements"),
        _cif_words(atoms.getNames(), "atom names"),
        _cif_words(atoms.getResnames(), "residue names"),
        chains,
        _sequence_numbers(atoms),
        [code or "?" for code in _cif_words(atoms.getIcodes(), "insertion codes")],
        strict=True,
    )
    before = [
        (record, f"{element} {name} . {resname} {chain} ? {number} {icode}")
        for record, element, name, resname, chain, number, icode in columns
    ]
    columns = zip(
        atoms.getOccupancies().tolist(),
        atoms.getBetas().tolist(),
        atoms.getResnums().tolist(),
        chains,
        strict=True,
    )
    after = [
        f"{occupancy:.2f} {beta:.2f} {number} {chain}" for occupancy, beta, number, chain in columns
    ]
    return before, after


def _cif_words(values: np.ndarray, what: str) -> list[str]:
    """Values as words of an mmCIF line."""
    distinct, inverse = np.unique(values, return_inverse=True)
    words = [_cif_word(value) for value in distinct.tolist()]
    for value, word in zip(distinct.tolist(), words, strict=True):
        if len(word) > _CIF_WORD_LENGTH or re.search(r"\s", value):
            raise ValueError(
                f"expected {what} of at most {_CIF_WORD_LENGTH} characters without spaces for "
                f"mmCIF, got {value!r}; try shorter ones"
            )
    return np.array(words, dtype=object)[inverse].tolist()


def _cif_word(value: str) -> str:
    """A value, in quotes where bare it would mean something else (CIF 1.1 syntax)."""
    if not value:
        return "?"
    reserved = value in (".", "?") or re.match(r"(data|save|loop|stop|global)_", value, re.I)
    if reserved or value[0] in "_#$\"'[];" or "'" in value:
        quote = "'" if '"' in value else '"'
        return f"{quote}{value}{quote}"
    return value


def _sequence_numbers(atoms: prody.AtomGroup) -> list[str]:
    """Position in the sequence of every atom's residue, from 1 in each chain; "." for ligands.

    Steps are those of the author's numbers, so that a gap in the model stays a gap for programs
    that join what is next to each other in the sequence.
    """
    ids = residue_ids(atoms)
    chids = atoms.getChids()
    resnums = atoms.getResnums()
    _, first = np.unique(ids, return_index=True)
    polymer = np.unique(ids[find_nodes(atoms)])
    numbers = np.full(len(first), ".", dtype=object)
    last: dict[str, tuple[int, int]] = {}
    for row in np.sort(first[polymer]).tolist():
        resnum = int(resnums[row])
        if chids[row] in last:
            number, before = last[chids[row]]
            number += max(1, resnum - before)
        else:
            number = 1
        last[chids[row]] = (number, resnum)
        numbers[ids[row]] = str(number)
    return numbers[ids].tolist()
