import numpy as np
import prody
import pytest

from cryochains.molecule.residues import (
    ATOMIC_NUMBERS,
    atomic_numbers,
    find_nodes,
    guess_elements,
    one_letter_codes,
    residue_ids,
    residue_scattering,
)
from cryochains.molecule.sources import read_atoms


def group(records) -> prody.AtomGroup:
    """AtomGroup of (name, resname, chain, resnum, element, hetero, xyz)."""
    atoms = prody.AtomGroup("made")
    names, resnames, chids, resnums, elements, hetero, xyz = zip(*records, strict=True)
    atoms.setCoords(np.array(xyz, dtype=float))
    atoms.setNames(names)
    atoms.setResnames(resnames)
    atoms.setChids(chids)
    atoms.setResnums(resnums)
    atoms.setIcodes([""] * len(names))
    atoms.setElements(elements)
    atoms.setFlags("hetatm", np.array(hetero))
    return atoms


def peptide(resnames, hetero=False, start=1, x=0.0):
    """N, CA, C of residues 3.8 Å apart."""
    return [
        (name, resname, "A", start + i, name[0], hetero, (x + 3.8 * i + offset, offset % 1.3, 0.0))
        for i, resname in enumerate(resnames)
        for name, offset in (("N", -1.2), ("CA", 0.0), ("C", 1.2))
    ]


def node_names(atoms):
    rows = find_nodes(atoms)
    return list(zip(atoms.getNames()[rows], atoms.getResnames()[rows], strict=True))


def test_elements_are_numbered_as_in_the_periodic_table():
    expected = {
        "H": 1,
        "C": 6,
        "N": 7,
        "O": 8,
        "P": 15,
        "S": 16,
        "CA": 20,
        "FE": 26,
        "SE": 34,
        "I": 53,
        "AU": 79,
        "U": 92,
    }
    assert {symbol: ATOMIC_NUMBERS[symbol] for symbol in expected} == expected


def test_scattering_of_a_type_is_the_sum_over_its_complete_residues(prody_files):
    _, atoms = read_atoms(prody_files / "pdb1ubi.pdb")
    numbers = atomic_numbers(atoms)
    rows = find_nodes(atoms)
    ids = residue_ids(atoms)
    summed = np.array([numbers[(ids == ids[row]) & (numbers > 1)].sum() for row in rows])
    # The last residue has the second oxygen of the chain's end.
    np.testing.assert_array_equal(residue_scattering(atoms, rows)[:-1], summed[:-1])
    assert summed[-1] - residue_scattering(atoms, rows)[-1] == 8


def test_scattering_of_nucleotides_is_the_sum_over_their_atoms(prody_files):
    _, atoms = read_atoms(prody_files / "pdb3mht.pdb")
    rows = [
        row for row in find_nodes(atoms) if atoms.getResnames()[row] in ("DA", "DC", "DG", "DT")
    ]
    numbers, ids = atomic_numbers(atoms), residue_ids(atoms)
    complete = [row for row in rows if "OP1" in atoms.getNames()[ids == ids[row]]]
    summed = [numbers[(ids == ids[row]) & (numbers > 1)].sum() for row in complete]
    assert len(complete) > 15
    np.testing.assert_array_equal(residue_scattering(atoms, np.array(complete)), summed)


def test_scattering_does_not_depend_on_what_was_modelled():
    full = group(peptide(["TRP", "TRP"]))
    np.testing.assert_array_equal(
        residue_scattering(full, find_nodes(full)), [11 * 6 + 2 * 7 + 8] * 2
    )


def test_modified_residues_of_a_chain_are_nodes_and_ligands_are_not():
    records = (
        peptide(["ALA", "GLY"])
        + peptide(["MSE"], hetero=True, start=3, x=7.6)
        + peptide(["LEU"], start=4, x=11.4)
    )
    records += peptide(["GLU"], hetero=True, start=101, x=40.0)  # glutamate, the agonist
    records += [("CA", "CA", "A", 102, "CA", True, (3.0, 5.0, 0.0))]  # a calcium ion
    assert node_names(group(records)) == [
        ("CA", "ALA"),
        ("CA", "GLY"),
        ("CA", "MSE"),
        ("CA", "LEU"),
    ]


def test_a_chain_written_as_hetero_atoms_throughout_is_a_chain():
    assert len(find_nodes(group(peptide(["ALA", "XYZ", "GLY"], hetero=True)))) == 3


def test_nucleotide_without_phosphate_is_its_o5():
    records = [
        ("O5'", "DA", "B", 1, "O", False, (0, 0, 0)),
        ("C4'", "DA", "B", 1, "C", False, (1, 1, 0)),
        ("P", "DG", "B", 2, "P", False, (6, 0, 0)),
        ("O5'", "DG", "B", 2, "O", False, (6, 1, 0)),
    ]
    assert node_names(group(records)) == [("O5'", "DA"), ("P", "DG")]


def test_phosphate_of_a_ligand_is_no_node():
    records = peptide(["ALA", "GLY"])
    records += [
        ("P", "PLP", "A", 9, "P", True, (5, 5, 5)),
        ("C4", "PLP", "A", 9, "C", True, (5, 6, 5)),
    ]
    assert node_names(group(records)) == [("CA", "ALA"), ("CA", "GLY")]


@pytest.mark.parametrize(
    ("resname", "letter"),
    [("MET", "M"), ("MSE", "M"), ("HSD", "H"), ("DT", "t"), ("U", "t"), ("A", "a"), ("NAG", "X")],
)
def test_letters(resname, letter):
    assert one_letter_codes(np.array([resname]))[0] == letter


def test_elements_guessed_from_names():
    names = np.array(["CA", "CA", "SE", "1HB", "O5'", "ZN"])
    resnames = np.array(["ALA", "CA", "MSE", "ALA", "DA", "ZN"])
    assert guess_elements(names, resnames).tolist() == ["C", "CA", "SE", "H", "O", "ZN"]
