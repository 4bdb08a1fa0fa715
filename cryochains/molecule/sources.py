"""Where a structure comes from: an embedded example, a file, a PDB id or atoms in memory.

`read_atoms` gives a clean ProDy AtomGroup whatever the source: author chain ids, one location per
atom, the first model, no water. ProDy does the parsing.
"""

import gzip
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import prody

from .._files import atomic_path
from .fetching import fetch_entry
from .residues import ATOMIC_NUMBERS, WATERS, combine_codes, guess_elements, residue_ids

EMBEDDED = ("glua3-closed", "glua3-open")
_FILE_SUFFIXES = (
    ".cif.gz",
    ".cif",
    ".mmcif.gz",
    ".mmcif",
    ".pdb.gz",
    ".pdb",
    ".ent.gz",
    ".ent",
)
_PDB_ID = re.compile(r"([0-9][a-z0-9]{3}|pdb_[a-z0-9]{8})", re.IGNORECASE)


def cache_folder() -> Path:
    """Folder of what can be fetched or computed again: $XDG_CACHE_HOME or ~/.cache, cryochains."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "cryochains"


@contextmanager
def quiet_prody() -> Iterator[None]:
    """ProDy without its log; the user's own verbosity comes back after."""
    before = prody.LOGGER.verbosity
    prody.LOGGER.verbosity = "none"
    try:
        yield
    finally:
        prody.LOGGER.verbosity = before


def read_atoms(source: str | os.PathLike | prody.Atomic) -> tuple[str, prody.AtomGroup]:
    """Name and clean atoms of `source`; see `load_structure` for what it may be.

    Raises
    ------
    FileNotFoundError
        When there is no such file, or a PDB id is neither at hand nor can be fetched.
    ValueError
        When a file holds no atoms that can be read.
    """
    if isinstance(source, prody.Atomic):
        return source.getTitle(), _clean_atoms(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(
            f"expected a PDB id, a file or ProDy atoms, got {type(source).__name__}; "
            "try one AtomGroup"
        )
    if source in EMBEDDED:
        path = Path(__file__).parent.parent / "data" / f"{source}.pdb.gz"
    else:
        path = Path(source).expanduser()
    if path.is_file():
        return _stem(path), _clean_atoms(_parse_file(path))
    if isinstance(source, str) and _PDB_ID.fullmatch(source):
        return source.upper(), _clean_atoms(_read_entry(source.lower()))
    raise FileNotFoundError(
        f"expected a PDB or mmCIF file, a PDB id or {' or '.join(EMBEDDED)}, got {str(source)!r}, "
        "no file here; try a full path"
    )


def _stem(path: Path) -> str:
    suffix = _suffix(path) or ""
    stem = path.name[: len(path.name) - len(suffix)]
    # ProDy and the wwPDB name the file of an entry pdb1abc.
    if re.fullmatch(r"pdb[0-9][a-z0-9]{3}", stem):
        return stem[3:].upper()
    return stem


def _suffix(path: Path) -> str | None:
    name = path.name.lower()
    return next((suffix for suffix in _FILE_SUFFIXES if name.endswith(suffix)), None)


def _read_entry(pdb_id: str) -> prody.AtomGroup:
    """Atoms of a PDB entry: the user's folder, then the cache, then a fetch into the cache."""
    own = os.environ.get("CRYOCHAINS_STRUCTURES")
    cache = cache_folder() / "structures"
    folders = [Path(own), cache] if own else [cache]
    for folder in folders:
        path = _find_in_folder(pdb_id, folder)
        if path:
            return _parse_file(path)
    with tempfile.TemporaryDirectory() as aside:
        fetched, reason = fetch_entry(pdb_id, Path(aside))
        if fetched is None:
            raise FileNotFoundError(
                f"expected the PDB entry {pdb_id.upper()} in the folder that CRYOCHAINS_STRUCTURES "
                f"names ({own or 'not set'}), in the cache ({cache}) or at the PDB, got it from "
                f"none of the three ({reason}); try a file of it"
            )
        atoms = _parse_file(fetched)
        # A cache that cannot be written costs time, nothing else.
        with suppress(OSError, ValueError), atomic_path(cache / fetched.name) as part:
            shutil.copyfile(fetched, part)
    return atoms


def _find_in_folder(pdb_id: str, folder: Path) -> Path | None:
    present = {path.name.lower(): path for path in folder.glob("*")}
    for suffix in _FILE_SUFFIXES:
        for stem in (pdb_id, f"pdb{pdb_id}"):
            if stem + suffix in present:
                return present[stem + suffix]
    return None


def _parse_file(path: Path) -> prody.AtomGroup:
    suffix = _suffix(path)
    if suffix is None:
        raise ValueError(
            f"expected a file ending in {', '.join(_FILE_SUFFIXES)}, got {path.name}; "
            "try renaming it"
        )
    opener = gzip.open if suffix.endswith(".gz") else open
    try:
        with quiet_prody(), opener(path, "rt", errors="replace") as stream:
            if "cif" in suffix:
                atoms = prody.parseMMCIFStream(stream, altloc="all", title=_stem(path))
            else:
                atoms = prody.parsePDBStream(stream, altloc="all", model=1, title=_stem(path))
    except Exception as error:
        # ProDy raises IndexError, KeyError and more on a file that is not what its name says.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(
            f"expected a PDB or mmCIF file, got {path} that cannot be read ({reason}); "
            "try another copy of it"
        ) from error
    if atoms is None or atoms.numAtoms() == 0:
        raise ValueError(
            f"expected a PDB or mmCIF file, got {path} without atoms; try opening it as text"
        )
    if "cif" in suffix:
        _use_author_ids(atoms)
    return atoms


def _use_author_ids(atoms: prody.AtomGroup) -> None:
    """Swap what ProDy's mmCIF reader calls chain (the label id) and segment (the author's id)."""
    labels = atoms.getChids()
    atoms.setChids(_without_quotes(atoms.getSegnames()))
    atoms.setSegnames(_without_quotes(labels))
    # ProDy's reader takes off double quotes, from atom names alone.
    atoms.setNames(_without_quotes(atoms.getNames()))
    atoms.setResnames(_without_quotes(atoms.getResnames()))


def _without_quotes(words: np.ndarray) -> np.ndarray:
    """(n,) words of an mmCIF file without the quotes that some of them stand in."""
    distinct, inverse = np.unique(words, return_inverse=True)
    bare = [
        word[1:-1] if len(word) > 1 and word[0] == word[-1] and word[0] in "'\"" else word
        for word in distinct.tolist()
    ]
    return np.array(bare)[inverse]


def _clean_atoms(source: prody.Atomic) -> prody.AtomGroup:
    """A new AtomGroup of what the rest of the package needs, filled where the source is silent."""
    n = source.numAtoms()
    title = source.getTitle()
    coords = source.getCoords()
    if coords is None or not np.isfinite(coords).all():
        raise ValueError(
            f"expected finite coordinates, got NaN or none in {title}; try another file"
        )
    names = _text_field(source, "Names", "X")
    resnames = _text_field(source, "Resnames", "UNK")
    elements = np.char.upper(_text_field(source, "Elements")).astype("U2")
    unknown = ~np.isin(elements, list(ATOMIC_NUMBERS))
    elements[unknown] = guess_elements(names[unknown], resnames[unknown])
    hetero = source.getFlags("hetatm")

    atoms = prody.AtomGroup(title)
    atoms.setCoords(coords)
    atoms.setNames(names)
    atoms.setResnames(resnames)
    atoms.setResnums(_field(source, "Resnums", np.arange(1, n + 1)))
    atoms.setIcodes(_text_field(source, "Icodes"))
    atoms.setChids(_chain_ids(source, atoms))
    atoms.setElements(elements)
    atoms.setOccupancies(_field(source, "Occupancies", 1.0))
    atoms.setBetas(_field(source, "Betas", 0.0))
    atoms.setFlags("hetatm", np.zeros(n, dtype=bool) if hetero is None else hetero)

    altlocs = _text_field(source, "Altlocs")
    altlocs = np.where(np.isin(altlocs, (".", "?")), "", altlocs)
    keep = _one_location(atoms, altlocs) & ~np.isin(resnames, WATERS)
    if not keep.any():
        raise ValueError(f"expected a molecule, got only water in {title}; try another file")
    return select_rows(atoms, np.flatnonzero(keep))


def _field(source: prody.Atomic, field: str, default: object) -> np.ndarray:
    values = getattr(source, f"get{field}")()
    return np.full(source.numAtoms(), default) if values is None else values


def _text_field(source: prody.Atomic, field: str, default: str = "") -> np.ndarray:
    return np.char.strip(_field(source, field, default))


def _chain_ids(source: prody.Atomic, atoms: prody.AtomGroup) -> np.ndarray:
    """(n,) chain id of every atom; copies of a chain that share its id get "A", "A_2", "A_3" …

    Biological assemblies as ProDy builds them repeat the chain ids, and only the segment names tell
    the copies apart. Segments that do not repeat each other's atoms stay one chain.
    """
    chids = _text_field(source, "Chids")
    segments = _text_field(source, "Segnames")
    chids = np.where(chids == "", segments, chids)
    chids = np.where(chids == "", "_", chids)

    # What is once in a chain: an atom name of a residue number. Waters are left out later anyway.
    altlocs = _text_field(source, "Altlocs")
    columns = [chids, atoms.getResnums(), atoms.getIcodes(), atoms.getNames(), altlocs]
    atom = combine_codes(columns)
    segment = combine_codes([chids, segments])
    dry = np.flatnonzero(~np.isin(atoms.getResnames(), WATERS))
    _, first = np.unique(combine_codes([atom, segment])[dry], return_index=True)
    repeated = np.bincount(atom[dry[first]], minlength=atom.max() + 1) > 1

    ids = chids.astype(object)
    taken = set(chids.tolist())
    for chain in dict.fromkeys(chids[dry[repeated[atom[dry]]]].tolist()):
        rows = dry[chids[dry] == chain]
        copies = _group_copies(atom[rows], segment[rows])
        for number in range(1, copies.max() + 1):
            name = _free_id(chain, number + 1, taken)
            taken.add(name)
            ids[rows[copies == number]] = name
    return ids.astype(str)


def _group_copies(atom: np.ndarray, segment: np.ndarray) -> np.ndarray:
    """(n,) copy of its chain that every atom is of, from 0.

    A segment belongs to the first copy of which it repeats no atom.
    """
    _, atom = np.unique(atom, return_inverse=True)
    copy_of_atom = np.zeros(len(atom), dtype=np.int64)
    copies: list[np.ndarray] = []
    for one in dict.fromkeys(segment.tolist()):
        own = segment == one
        free = [k for k, present in enumerate(copies) if not present[atom[own]].any()]
        number = free[0] if free else len(copies)
        if not free:
            copies.append(np.zeros(atom.max() + 1, dtype=bool))
        copies[number][atom[own]] = True
        copy_of_atom[own] = number
    return copy_of_atom


def _free_id(chain: str, number: int, taken: set[str]) -> str:
    while f"{chain}_{number}" in taken:
        number += 1
    return f"{chain}_{number}"


def _one_location(atoms: prody.AtomGroup, altlocs: np.ndarray) -> np.ndarray:
    """(n,) mask of one location per atom: the residue's best occupied, the first of equals."""
    keep = np.ones(len(altlocs), dtype=bool)
    residues = residue_ids(atoms, with_name=False)
    rows = np.flatnonzero(np.isin(residues, residues[altlocs != ""]))
    if not len(rows):
        return keep
    rows = rows[np.argsort(residues[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(residues[rows])) + 1
    names = atoms.getNames()
    resnames = atoms.getResnames()
    occupancies = atoms.getOccupancies()
    for group in np.split(rows, starts):
        labels = _best_occupied_first(altlocs[group], occupancies[group])
        rank = {label: number for number, label in enumerate(["", *labels])}
        ranks = [rank[label] for label in altlocs[group].tolist()]
        # Two residue types at one position: the better occupied type is kept whole.
        resname = resnames[next(row for row in group if altlocs[row] == labels[0])]
        taken = set()
        for row in group[np.argsort(ranks, kind="stable")]:
            keep[row] = resnames[row] == resname and names[row] not in taken
            if keep[row]:
                taken.add(names[row])
    return keep


def _best_occupied_first(altlocs: np.ndarray, occupancies: np.ndarray) -> list[str]:
    """Labels of a residue's alternate locations, by falling mean occupancy."""
    labels = [label for label in dict.fromkeys(altlocs.tolist()) if label]
    means = {label: round(occupancies[altlocs == label].mean(), 3) for label in labels}
    return sorted(labels, key=lambda label: -means[label])


def select_rows(atoms: prody.AtomGroup, rows: np.ndarray) -> prody.AtomGroup:
    """A new AtomGroup of the given rows in the given order (a ProDy selection would sort them)."""
    selected = prody.AtomMap(atoms, rows).toAtomGroup()
    selected.setTitle(atoms.getTitle())
    return selected
