"""Structures and modes as plain arrays and JSON, for files that open without anything else.

``pack_x(obj)`` gives named numpy arrays and a JSON-able dict; ``unpack_x(arrays, meta)`` gives the
same object back, bit for bit. Text of many atoms is kept as a table of distinct words and one
integer an atom. What is unpacked may come from a damaged file or a hostile one: everything is
checked before use.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import prody

from .modes import Modes
from .structure import Structure

# What ProDy calls the text, number and flag of every atom.
_ATOM_TEXT = ("Names", "Resnames", "Chids", "Icodes", "Elements")
_ATOM_NUMBERS = ("Occupancies", "Betas")
_LONGEST_WORD = 64


def pack_structure(structure: Structure) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and JSON-able description of a structure, from which `unpack_structure` rebuilds it.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> structure = load_structure("glua3-open")
    >>> arrays, meta = pack_structure(structure)
    >>> unpack_structure(arrays, meta).content_hash == structure.content_hash
    True
    """
    atoms = structure.atoms
    arrays = {
        "coords": atoms.getCoords(),
        "resnums": _narrow(atoms.getResnums()),
        "hetatm": atoms.getFlags("hetatm").astype(np.uint8),
        "atom_chain": _narrow(structure.atom_chain),
        "atom_node": _narrow(structure.atom_node),
        "rows": _narrow(structure.rows),
        "node_rows": _narrow(structure.node_rows),
        "weights": structure.weights.astype(np.float64),
        "origin": structure.origin.astype(np.float64),
    }
    words = {}
    for field in _ATOM_TEXT:
        distinct, codes = np.unique(getattr(atoms, f"get{field}")(), return_inverse=True)
        words[field.lower()] = distinct.tolist()
        arrays[field.lower()] = _narrow(codes)
    for field in _ATOM_NUMBERS:
        arrays[field.lower()] = getattr(atoms, f"get{field}")().astype(np.float64)
    meta = {
        "name": structure.name,
        "title": atoms.getTitle(),
        "chain_ids": list(structure.chain_ids),
        "in_given_order": structure.in_given_order,
        "words": words,
    }
    if structure.turning:
        meta["turning"] = list(structure.turning)
    return arrays, meta


def unpack_structure(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Structure:
    """The structure that `pack_structure` took apart.

    Raises
    ------
    ValueError
        When something is missing, has another shape or type, or points outside of the structure.
    """
    packed = _Packed("structure", arrays, meta)
    coords = packed.floats("coords", (None, 3))
    n_all = len(coords)
    packed.require(n_all > 0, "it has no atoms")
    atoms = prody.AtomGroup(packed.text("title"))
    atoms.setCoords(coords)
    atoms.setResnums(packed.integers("resnums", n_all, None))
    atoms.setFlags("hetatm", packed.integers("hetatm", n_all, 2).astype(bool))
    for field in _ATOM_TEXT:
        getattr(atoms, f"set{field}")(packed.words(field.lower(), n_all))
    for field in _ATOM_NUMBERS:
        getattr(atoms, f"set{field}")(packed.floats(field.lower(), (n_all,), finite=False))

    chain_ids = packed.names("chain_ids")
    rows = packed.rising("rows", n_all)
    node_rows = packed.rising("node_rows", n_all)
    atom_chain = packed.integers("atom_chain", n_all, len(chain_ids))
    atom_node = packed.integers("atom_node", n_all, len(node_rows))
    weights = packed.floats("weights", (len(rows),))
    origin = packed.floats("origin", (3,))
    in_given_order = packed.truth("in_given_order")
    turning = packed.names("turning") if "turning" in meta else ()

    packed.require((weights >= 0).all() and weights.sum() > 0, "weights are not positive")
    packed.require(set(turning) <= set(chain_ids), "a body that turns is unknown")
    packed.require((np.diff(atom_chain) >= 0).all(), "atoms do not stand body by body")
    node_chain = atom_chain[node_rows]
    packed.require(len(set(node_chain)) == len(chain_ids), "a body has no node")
    own_node = np.arange(len(node_rows))
    packed.require((atom_node[node_rows] == own_node).all(), "a node does not move with itself")
    packed.require((node_chain[atom_node] == atom_chain).all(), "an atom moves with another body")
    return Structure(
        name=packed.text("name"),
        atoms=atoms,
        chain_ids=chain_ids,
        atom_chain=atom_chain,
        atom_node=atom_node,
        rows=rows,
        node_rows=node_rows,
        weights=weights,
        origin=origin,
        in_given_order=in_given_order,
        turning=turning,
    )


def pack_modes(modes: Modes) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and JSON-able description of modes, from which `unpack_modes` rebuilds them.

    Examples
    --------
    >>> from cryochains import compute_modes, load_structure
    >>> modes = compute_modes(load_structure("glua3-open"), n_modes=2)
    >>> arrays, meta = pack_modes(modes)
    >>> sorted(arrays)
    ['eigenvalues_0', 'eigenvalues_1', 'vectors_0', 'vectors_1']
    >>> unpack_modes(arrays, meta)
    Modes(A: 2, B: 2)
    """
    arrays = {}
    for c, (vectors, eigenvalues) in enumerate(zip(modes.vectors, modes.eigenvalues, strict=True)):
        arrays[f"vectors_{c}"] = vectors.astype(np.float64)
        arrays[f"eigenvalues_{c}"] = eigenvalues.astype(np.float64)
    meta = {"chain_ids": list(modes.chain_ids), "structure_hash": modes.structure_hash}
    return arrays, meta


def unpack_modes(arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> Modes:
    """The modes that `pack_modes` took apart.

    Raises
    ------
    ValueError
        When something is missing, or has another shape or type.
    """
    packed = _Packed("modes", arrays, meta)
    chain_ids = packed.names("chain_ids")
    all_vectors = []
    all_eigenvalues = []
    for c in range(len(chain_ids)):
        vectors = packed.floats(f"vectors_{c}", (None, None, 3))
        eigenvalues = packed.floats(f"eigenvalues_{c}", (len(vectors),))
        positive = (eigenvalues > 0).all() and (np.diff(eigenvalues) >= 0).all()
        packed.require(positive, f"eigenvalues_{c} are not positive and ascending")
        all_vectors.append(vectors)
        all_eigenvalues.append(eigenvalues)
    structure_hash = packed.text("structure_hash")
    return Modes(tuple(all_vectors), tuple(all_eigenvalues), chain_ids, structure_hash)


def _narrow(values: np.ndarray) -> np.ndarray:
    """Integers in the narrowest of uint8, int32 and int64 that holds them."""
    lowest = values.min(initial=0)
    highest = values.max(initial=0)
    if 0 <= lowest and highest <= np.iinfo(np.uint8).max:
        return values.astype(np.uint8)
    bounds = np.iinfo(np.int32)
    if bounds.min <= lowest and highest <= bounds.max:
        return values.astype(np.int32)
    return values.astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Packed:
    """Checked access to the arrays and the description of something packed."""

    what: str
    arrays: Mapping[str, Any]
    meta: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.arrays, Mapping) or not isinstance(self.meta, Mapping):
            self.fail("it is no pair of arrays and description")

    def fail(self, reason: str) -> NoReturn:
        raise ValueError(
            f"expected a stored {self.what}, got one that is damaged ({reason}); try another "
            "copy of the file"
        )

    def require(self, holds: bool | np.bool_, reason: str) -> None:
        """Raise unless a condition holds."""
        if not holds:
            self.fail(reason)

    def floats(self, name: str, shape: tuple[int | None, ...], finite: bool = True) -> np.ndarray:
        """Array of float64; None in `shape` is any length."""
        values = self._array(name, shape, "f")
        self.require(values.dtype == np.float64, f"{name} is {values.dtype}, not float64")
        self.require(not finite or np.isfinite(values).all(), f"{name} is not finite")
        return values.copy()

    def integers(self, name: str, length: int | None, below: int | None) -> np.ndarray:
        """(length,) int64, from 0 to `below` − 1 where that is given."""
        values = self._array(name, (length,), "iu").astype(np.int64)
        if below is not None:
            inside = ((values >= 0) & (values < below)).all()
            self.require(inside, f"{name} points outside of 0 to {below - 1}")
        return values

    def rising(self, name: str, below: int) -> np.ndarray:
        """(n,) rows, at least one, each greater than the one before."""
        values = self.integers(name, None, below)
        rises = len(values) > 0 and (np.diff(values) > 0).all()
        self.require(rises, f"{name} does not rise")
        return values

    def words(self, name: str, length: int) -> np.ndarray:
        """(length,) text of every atom."""
        table = self.meta.get("words")
        words = table.get(name) if isinstance(table, Mapping) else None
        if not isinstance(words, list) or not words:
            self.fail(f"the words of {name} are missing")
        if not all(isinstance(word, str) for word in words):
            self.fail(f"the words of {name} are no text")
        self.require(max(map(len, words)) <= _LONGEST_WORD, f"a word of {name} is too long")
        return np.array(words)[self.integers(name, length, len(words))]

    def names(self, name: str) -> tuple[str, ...]:
        """Distinct texts, at least one."""
        values = self.meta.get(name)
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            self.fail(f"{name} is no list of text")
        self.require(0 < len(values) == len(set(values)), f"{name} repeats or is empty")
        return tuple(values)

    def text(self, name: str) -> str:
        """One text of the description."""
        value = self.meta.get(name)
        if not isinstance(value, str):
            self.fail(f"{name} is no text")
        return value

    def truth(self, name: str) -> bool:
        """True or false, of the description."""
        value = self.meta.get(name)
        if not isinstance(value, bool):
            self.fail(f"{name} is not true or false")
        return value

    def _array(self, name: str, shape: tuple[int | None, ...], kinds: str) -> np.ndarray:
        values = self.arrays.get(name)
        if not isinstance(values, np.ndarray):
            self.fail(f"{name} is missing")
        fits = values.ndim == len(shape) and all(
            expected in (None, length) for expected, length in zip(shape, values.shape, strict=True)
        )
        self.require(fits, f"{name} has the shape {values.shape}")
        self.require(values.dtype.kind in kinds, f"{name} holds {values.dtype}")
        return values
