"""Where a structure comes from, an embedded example, a file, a PDB id or atoms in memory, and where it goes.

`read_atoms` gives a clean ProDy AtomGroup whatever the source: author chain ids, one location per atom, the
first model, no water. ProDy does the parsing and the fetching.
"""

import gzip
import os
import re
import shutil
import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import prody

from .files import atomic_path
from .residues import ATOMIC_NUMBERS, WATERS, guess_elements, residue_ids

EMBEDDED = ("glua3-closed", "glua3-open")
_SUFFIXES = (".cif.gz", ".cif", ".mmcif.gz", ".mmcif", ".pdb.gz", ".pdb", ".ent.gz", ".ent")
_PDB_ID = re.compile(r"([0-9][a-z0-9]{3}|pdb_[a-z0-9]{8})", re.IGNORECASE)


def cache_folder() -> Path:
    """Folder of what can be fetched or computed again: `cryochains` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "cryochains"


def read_atoms(source: str | os.PathLike | prody.Atomic) -> tuple[str, prody.AtomGroup]:
    """Name and clean atoms of `source`; see `cryochains.structure.load_structure` for what it may be.

    Raises
    ------
    FileNotFoundError
        When there is no such file, or a PDB id is neither at hand nor can be fetched.
    ValueError
        When a file holds no atoms that can be read.
    """
    if isinstance(source, prody.Atomic):
        return source.getTitle(), _clean(source)
    if not isinstance(source, (str, os.PathLike)):
        raise ValueError(f"expected a PDB id, a file or ProDy atoms, got {type(source).__name__}")
    data = Path(__file__).parent / "data"
    path = data / f"{source}.pdb.gz" if source in EMBEDDED else Path(source).expanduser()
    if not path.is_file():
        if not (isinstance(source, str) and _PDB_ID.fullmatch(source)):
            raise FileNotFoundError(
                f"expected a PDB or mmCIF file, a PDB id or {' or '.join(EMBEDDED)}, got {str(source)!r}, "
                "no file here; try a full path"
            )
        return source.upper(), _clean(_by_id(source.lower()))
    return _stem(path), _clean(_parse(path))


def _stem(path: Path) -> str:
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), "")
    stem = path.name[: len(path.name) - len(suffix)]
    return stem[3:].upper() if re.fullmatch(r"pdb[0-9][a-z0-9]{3}", stem) else stem  # ProDy's and the wwPDB's way


@contextmanager
def quiet_prody() -> Iterator[None]:
    """ProDy without its log; the user's own verbosity comes back after."""
    before = prody.LOGGER.verbosity
    prody.LOGGER.verbosity = "none"
    try:
        yield
    finally:
        prody.LOGGER.verbosity = before


def _by_id(pdb_id: str) -> prody.AtomGroup:
    """Atoms of a PDB entry: the user's folder, then the cache, then a fetch into the cache."""
    own = os.environ.get("CRYOCHAINS_STRUCTURES")
    cache = cache_folder() / "structures"
    for folder in ([Path(own)] if own else []) + [cache]:
        found = _in_folder(pdb_id, folder)
        if found:
            return _parse(found)
    with tempfile.TemporaryDirectory() as aside:
        fetched, reason = _fetch(pdb_id, aside)
        if fetched is None:
            raise FileNotFoundError(
                f"expected the PDB entry {pdb_id.upper()} in the folder that CRYOCHAINS_STRUCTURES names "
                f"({own or 'not set'}), in the cache ({cache}) or at the PDB, got it from none of the three "
                f"({reason}); try a file of it"
            )
        atoms = _parse(fetched)
        # A cache that cannot be written costs time, nothing else.
        with suppress(OSError, ValueError), atomic_path(cache / fetched.name) as part:
            shutil.copyfile(fetched, part)
    return atoms


def _in_folder(pdb_id: str, folder: Path) -> Path | None:
    wanted = [stem + suffix for suffix in _SUFFIXES for stem in (pdb_id, f"pdb{pdb_id}")]
    found = {path.name.lower(): path for path in folder.glob("*")}
    return next((found[name] for name in wanted if name in found), None)


def _fetch(pdb_id: str, folder: str) -> tuple[Path | None, str]:
    """Path of the fetched file, or None and why not. mmCIF first: large entries have no PDB file."""
    reason = "nothing came back"
    for form in ("cif", "pdb"):
        try:
            with quiet_prody():
                fetched = prody.fetchPDB(pdb_id, format=form, folder=folder, compressed=True)
        except Exception as error:  # ProDy raises whatever its transport does
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if fetched:
            return Path(fetched), ""
    return None, reason


def _parse(path: Path) -> prody.AtomGroup:
    name = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), None)
    if suffix is None:
        raise ValueError(f"expected a file ending in {', '.join(_SUFFIXES)}, got {path.name}; try renaming it")
    try:
        with quiet_prody(), (gzip.open if suffix.endswith(".gz") else open)(path, "rt", errors="replace") as stream:
            if "cif" in suffix:
                atoms = prody.parseMMCIFStream(stream, altloc="all", title=_stem(path))
            else:
                atoms = prody.parsePDBStream(stream, altloc="all", model=1, title=_stem(path))
    except Exception as error:
        # ProDy raises IndexError, KeyError and more on a file that is not what its name says.
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"expected a PDB or mmCIF file, got {path} that cannot be read ({reason})") from error
    if atoms is None or atoms.numAtoms() == 0:
        raise ValueError(f"expected a PDB or mmCIF file, got {path} without atoms; try opening it as text")
    if "cif" in suffix:
        atoms.setChids(atoms.getSegnames())  # ProDy puts the author's ids there and the label ids in chid
    return atoms


def _clean(source: prody.Atomic) -> prody.AtomGroup:
    """A new AtomGroup of what the rest of the package needs, filled where the source is silent."""
    n = source.numAtoms()

    def filled(field, default):
        values = getattr(source, f"get{field}")()
        return np.full(n, default) if values is None else values

    def text(field, default=""):
        return np.char.strip(filled(field, default))

    names, resnames, chids = text("Names", "X"), text("Resnames", "UNK"), text("Chids")
    chids = np.where(chids == "", text("Segnames"), chids)
    elements = np.char.upper(text("Elements")).astype("U2")
    unknown = ~np.isin(elements, list(ATOMIC_NUMBERS))
    elements[unknown] = guess_elements(names[unknown], resnames[unknown])
    coords = source.getCoords()
    if coords is None or not np.isfinite(coords).all():
        raise ValueError(f"expected finite coordinates, got NaN or none in {source.getTitle()}; try another file")

    atoms = prody.AtomGroup(source.getTitle())
    atoms.setCoords(coords)
    atoms.setNames(names)
    atoms.setResnames(resnames)
    atoms.setChids(np.where(chids == "", "_", chids))
    atoms.setResnums(filled("Resnums", np.arange(1, n + 1)))
    atoms.setIcodes(text("Icodes"))
    atoms.setElements(elements)
    atoms.setOccupancies(filled("Occupancies", 1.0))
    atoms.setBetas(filled("Betas", 0.0))
    hetero = source.getFlags("hetatm")
    atoms.setFlags("hetatm", np.zeros(n, dtype=bool) if hetero is None else hetero)

    altlocs = text("Altlocs")
    keep = _one_location(atoms, np.where(np.isin(altlocs, (".", "?")), "", altlocs))
    keep &= ~np.isin(resnames, WATERS)
    if not keep.any():
        raise ValueError(f"expected a molecule, got only water in {source.getTitle()}; try another file")
    return take(atoms, np.flatnonzero(keep))


def _one_location(atoms: prody.AtomGroup, altlocs: np.ndarray) -> np.ndarray:
    """(n,) mask of one place per atom: the residue's best occupied alternate, the first of equals."""
    keep = np.ones(len(altlocs), dtype=bool)
    residues = residue_ids(atoms, with_name=False)
    occupancies, names, resnames = atoms.getOccupancies(), atoms.getNames(), atoms.getResnames()
    rows = np.flatnonzero(np.isin(residues, residues[altlocs != ""]))
    rows = rows[np.argsort(residues[rows], kind="stable")]
    for group in np.split(rows, np.flatnonzero(np.diff(residues[rows])) + 1) if len(rows) else []:
        labels = [label for label in dict.fromkeys(altlocs[group]) if label]
        best = sorted(labels, key=lambda label: -round(occupancies[group[altlocs[group] == label]].mean(), 3))
        order = {label: rank for rank, label in enumerate(["", *best])}
        # Two residue types at one place: the better occupied type goes whole.
        resname = resnames[next(row for row in group if altlocs[row] == best[0])]
        taken = set()
        for row in sorted(group, key=lambda row: order[altlocs[row]]):
            keep[row] = resnames[row] == resname and names[row] not in taken
            if keep[row]:
                taken.add(names[row])
    return keep


def write_pdb(atoms: prody.AtomGroup, title: str, path: str | os.PathLike) -> None:
    """Write a PDB file whole or not at all; a chain id longer than the format's one letter gets another."""
    path = Path(path)
    if not path.name.lower().endswith((".pdb", ".pdb.gz")):
        raise ValueError(f"expected a file name ending in .pdb or .pdb.gz, got {path.name}; try {path.stem}.pdb")
    atoms, letters = atoms.copy(), pdb_letters(atoms)
    atoms.setChids([letters[chain] for chain in atoms.getChids()])
    atoms.setTitle(title)
    with atomic_path(path) as part, quiet_prody():
        prody.writePDB(str(part), atoms)


def pdb_letters(atoms: prody.AtomGroup) -> dict[str, str]:
    """The letter that each chain id gets in a PDB file."""
    present = list(dict.fromkeys(atoms.getChids()))
    free = [letter for letter in string.ascii_letters + string.digits if letter not in present]
    return {chain: chain if len(chain) == 1 else (free.pop(0) if free else chain[0]) for chain in present}


def take(atoms: prody.AtomGroup, rows: np.ndarray) -> prody.AtomGroup:
    """A new AtomGroup of the given rows in the given order (a ProDy selection would sort them)."""
    taken = prody.AtomMap(atoms, rows).toAtomGroup()
    taken.setTitle(atoms.getTitle())
    return taken
