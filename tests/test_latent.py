"""The latent space: a table in people's units, principal motions, and conformations in files."""

import math

import numpy as np
import prody
import pytest
import torch

from cryochains.dynamics import Dynamics
from cryochains.latent import compute_pca, decode_ensemble, latent_table, save_ensemble
from cryochains.modes import compute_modes
from cryochains.structure import load_structure

BODIES = {"A": "chain A and resnum 20 to 45", "B": "chain B and resnum 60 to 80"}


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, (3, 2)))


@pytest.fixture(scope="module")
def small():
    structure = load_structure("glua3-closed", bodies=BODIES)
    return Dynamics(structure, compute_modes(structure, 2))


def draw(dynamics, n=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(dynamics.n_latents, generator=generator) + 0.5
    return spread * torch.randn(n, dynamics.n_latents, generator=generator) + 1.0


@pytest.fixture(autouse=True, scope="module")
def quiet():
    before = prody.confProDy("verbosity")
    prody.confProDy(verbosity="none")
    yield
    prody.confProDy(verbosity=before)


# The table


def test_table_has_a_row_a_particle_and_a_column_a_latent(dynamics):
    ids = np.array([f"{i:06d}@a.mrcs" for i in range(5)], dtype=object)
    table = latent_table(dynamics, draw(dynamics, 5), ids)
    assert table.shape == (5, dynamics.n_latents)
    assert table.index.tolist() == ids.tolist()
    assert table.columns.is_unique
    expected = [f"{chain} mode {k} (Å)" for chain, n in (("A", 3), ("B", 2)) for k in range(1, n + 1)]
    assert [name for name in table.columns if "mode" in name] == expected
    assert table.columns[3] == "A turn x (°)" and table.columns[-1] == "B shift z (Å)"


def test_table_is_in_angstrom_and_degrees(dynamics, closed):
    table = latent_table(dynamics, torch.ones(1, dynamics.n_latents)).iloc[0]
    for chain, radius, n in zip("AB", closed.radii, np.bincount(closed.node_chain), strict=True):
        assert table[f"{chain} mode 1 (Å)"] == pytest.approx(math.sqrt(n)), "α of Eq. 1, for modes of unit norm"
        assert table[f"{chain} turn y (°)"] == pytest.approx(math.degrees(1 / radius))
        assert table[f"{chain} shift z (Å)"] == pytest.approx(1.0)
    quarter = torch.zeros(1, dynamics.n_latents)
    quarter[0, dynamics.chains[1].rotation.start] = math.pi / 2 * closed.radii[1]
    assert latent_table(dynamics, quarter).loc[0, "B turn x (°)"] == pytest.approx(90, rel=1e-5)


def test_error_bars_are_in_the_same_units(dynamics):
    latents, std = draw(dynamics, 4), draw(dynamics, 4, 1).abs()
    table = latent_table(dynamics, latents, std=std)
    assert table.shape == (4, 2 * dynamics.n_latents)
    for number, name in enumerate(table.columns[: dynamics.n_latents]):
        ratio = table[f"± {name}"] / table[name]
        np.testing.assert_allclose(ratio, std[:, number] / latents[:, number], rtol=1e-5)


def test_table_leaves_out_what_is_switched_off(closed):
    columns = latent_table(Dynamics(closed, translation=False), torch.zeros(1, 6)).columns
    assert [name.split()[1] for name in columns] == ["turn"] * 6
    columns = latent_table(Dynamics(closed, rotation=False), torch.zeros(1, 6)).columns
    assert [name.split()[1] for name in columns] == ["shift"] * 6


# Principal motions


@pytest.mark.parametrize("chain", [None, "A", "B"])
@pytest.mark.parametrize("kind", ["all", "modes", "rigid"])
def test_components_stay_within_what_was_asked_for(dynamics, closed, chain, kind):
    motions = compute_pca(dynamics, draw(dynamics), chain, kind, n_components=3)
    wanted = np.ones(dynamics.n_latents, dtype=bool)
    if chain is not None:
        wanted &= dynamics.latent_chain == closed.chain_ids.index(chain)
    if kind != "all":
        wanted &= (dynamics.latent_kind == "mode") == (kind == "modes")
    k = min(3, int(wanted.sum()))
    assert motions.components.shape == (k, dynamics.n_latents) and motions.scores.shape == (200, k)
    assert (motions.components[:, ~wanted] == 0).all()
    np.testing.assert_allclose(motions.components @ motions.components.T, np.eye(k), atol=1e-10)
    ratio = motions.explained_variance_ratio
    assert (np.diff(ratio) <= 0).all() and 0 < ratio.sum() <= 1 + 1e-9
    assert (f"chain {chain}" if chain else "all chains") in repr(motions)
    assert "%" in repr(motions)


def test_all_components_explain_everything(dynamics):
    motions = compute_pca(dynamics, draw(dynamics), n_components=99)
    assert len(motions.components) == dynamics.n_latents
    assert motions.explained_variance_ratio.sum() == pytest.approx(1.0)


def test_scores_are_projections(dynamics):
    latents = draw(dynamics)
    motions = compute_pca(dynamics, latents, n_components=2)
    np.testing.assert_allclose(motions.scores.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(motions.transform(latents), motions.scores, atol=1e-4)
    one_up = torch.from_numpy(motions.mean + motions.components[1]).float()[None]
    np.testing.assert_allclose(motions.transform(one_up), [[0, 1]], atol=1e-5)


def test_a_planted_motion_is_found(dynamics):
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(dynamics.n_latents, generator=generator), dim=0)
    along = 3 * torch.randn(400, generator=generator)
    latents = along[:, None] * direction + 0.1 * torch.randn(400, dynamics.n_latents, generator=generator)
    motions = compute_pca(dynamics, latents)
    assert abs(motions.components[0] @ direction.numpy()) > 0.99
    assert motions.explained_variance_ratio[0] > 0.95
    assert abs(np.corrcoef(motions.scores[:, 0], along)[0, 1]) > 0.99


def test_traverse_runs_between_percentiles(dynamics):
    motions = compute_pca(dynamics, draw(dynamics), n_components=3)
    for component in (0, 2):
        path = motions.traverse(component, n=5, percentiles=(10, 90))
        assert path.shape == (5, dynamics.n_latents) and path.dtype == torch.float32
        scores = motions.transform(path)
        low, high = np.percentile(motions.scores[:, component], (10, 90))
        np.testing.assert_allclose(scores[:, component], np.linspace(low, high, 5), atol=1e-4)
        others = np.delete(scores, component, axis=1)
        np.testing.assert_allclose(others, 0, atol=1e-4, err_msg="the rest stays at the mean")


def test_traverse_of_one_chain_leaves_the_other_at_the_mean(dynamics):
    motions = compute_pca(dynamics, draw(dynamics), chain="B")
    coords = dynamics.decode(motions.traverse(0, n=3))
    moved = (coords[-1] - coords[0]).norm(dim=1)
    assert moved[dynamics.chains[0].atoms].max() < 1e-4 < moved[dynamics.chains[1].atoms].max()


def test_bad_questions(dynamics, closed):
    latents = draw(dynamics)
    rigid = Dynamics(closed)
    for settings, sentence in (
        ({"chain": "Q"}, "expected a chain of A, B, got 'Q'"),
        ({"kind": "bend"}, "expected kind 'modes', 'rigid', 'all', got 'bend'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            compute_pca(dynamics, latents, **settings)
    for wrong in (latents[:, :5], latents[0]):
        with pytest.raises(ValueError, match=rf"expected latents \(N, {dynamics.n_latents}\), got"):
            compute_pca(dynamics, wrong)
    for few in (latents[:1], latents[:0]):
        with pytest.raises(ValueError, match="expected at least two particles and one all latent"):
            compute_pca(dynamics, few)
    with pytest.raises(ValueError, match="expected at least two particles and one modes latent"):
        compute_pca(rigid, draw(rigid), kind="modes")
    with pytest.raises(ValueError, match="expected a component from 0 to 4, got 5"):
        compute_pca(dynamics, latents).traverse(5)


# Conformations


def test_ensemble_has_every_atom(small):
    structure = small.structure
    latents = torch.cat([torch.zeros(1, small.n_latents), draw(small, 2)])
    ensemble = decode_ensemble(small, latents)
    assert ensemble.numConfs() == 3 and ensemble.numAtoms() == structure.atoms.numAtoms() > structure.n_atoms
    coords = ensemble.getCoordsets()
    np.testing.assert_allclose(coords[0], structure.atoms.getCoords(), atol=1e-3)
    np.testing.assert_allclose(coords[:, structure.node_rows], small.decode(latents), atol=1e-3)
    assert ensemble.getAtoms().getNames().tolist() == structure.atoms.getNames().tolist()


def test_ligands_ride_along(prody_files, tmp_path):
    """The sugars of 3O21 are in the file, and move with their chain."""
    structure = load_structure(prody_files / "pdb3o21.pdb", chains="AB")
    latents = torch.zeros(2, 6)
    latents[1, 0] = 5.0
    written = save_ensemble(tmp_path / "a.pdb", Dynamics(structure, rotation=False), latents)
    sugars = prody.parsePDB(str(written)).select("resname NAG")
    moved = sugars.getCoordsets(1) - sugars.getCoordsets(0)
    expected = np.where(sugars.getChids() == "A", 5.0, 0.0)
    assert 0 < expected.mean() < 5, "both chains carry some"
    np.testing.assert_allclose(moved, np.stack([expected, 0 * expected, 0 * expected], 1), atol=2e-3)


@pytest.mark.parametrize("suffix", [".pdb", ".dcd"])
def test_files_are_read_back(small, tmp_path, suffix):
    latents = draw(small, 4)
    written = save_ensemble(tmp_path / "new" / f"path{suffix}", small, latents)
    assert written == tmp_path / "new" / f"path{suffix}"
    expected = decode_ensemble(small, latents).getCoordsets()
    if suffix == ".pdb":
        found = prody.parsePDB(str(written))
        atoms = small.structure.atoms
        for field in ("Names", "Resnames", "Resnums", "Chids", "Elements"):
            assert getattr(found, f"get{field}")().tolist() == getattr(atoms, f"get{field}")().tolist()
        tolerance = 6e-4  # three decimals
    else:
        found = prody.parseDCD(str(written))
        tolerance = 1e-4
    assert found.getCoordsets().shape == expected.shape
    np.testing.assert_allclose(found.getCoordsets(), expected, atol=tolerance)
    assert [path.name for path in written.parent.iterdir()] == [written.name]


def test_chains_of_long_names_stay_apart_in_a_pdb(tmp_path, small):
    atoms = small.structure.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "AB", "AA"))
    structure = load_structure(atoms)
    written = save_ensemble(tmp_path / "a.pdb", Dynamics(structure), torch.zeros(2, 12))
    found = prody.parsePDB(str(written))
    assert found.numCoordsets() == 2 and len(set(found.getChids())) == 2


def test_one_conformation(small, tmp_path):
    written = save_ensemble(tmp_path / "one.pdb", small, torch.zeros(1, small.n_latents))
    assert prody.parsePDB(str(written)).numCoordsets() == 1


def test_places_that_cannot_be_written(small, tmp_path):
    latents = torch.zeros(1, small.n_latents)
    for name in ("a.xyz", "a", "a.pdbx"):
        with pytest.raises(ValueError, match=f"expected a path that ends in .pdb or .dcd, got {name}"):
            save_ensemble(tmp_path / name, small, latents)
    (tmp_path / "file").touch()
    for name in ("a.pdb", "a.dcd"):
        with pytest.raises(ValueError, match="expected a place that can be written"):
            save_ensemble(tmp_path / "file" / name, small, latents)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_interrupted_write_leaves_no_half_file(small, tmp_path, monkeypatch):
    for name, writer in (("a.dcd", "writeDCD"), ("a.pdb", "writePDB")):
        (tmp_path / name).write_text("old")

        def stop(path, *args, **kwargs):
            with open(path, "w") as stream:
                stream.write("half")
            raise KeyboardInterrupt

        monkeypatch.setattr(prody, writer, stop)
        with pytest.raises(KeyboardInterrupt):
            save_ensemble(tmp_path / name, small, torch.zeros(1, small.n_latents))
        assert (tmp_path / name).read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
