"""The latents in people's units, and principal motions that know the result they are of."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from cryochains.analysis import compute_pca, latent_table
from cryochains.inference import Result
from cryochains.model import Model


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, modes=(3, 2), box_size=32, pixel_size=5.0)


def draw(model, n=200, seed=0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(model.n_latents, generator=generator) + 0.5
    return spread * torch.randn(n, model.n_latents, generator=generator) + 1.0


@pytest.fixture(scope="module")
def result(model):
    return Result(model, draw(model))


# The table


def test_table_has_a_row_a_particle_and_a_column_a_latent(model):
    ids = np.array([f"{i:06d}@a.mrcs" for i in range(5)], dtype=object)
    table = latent_table(Result(model, draw(model, 5), ids=ids))
    assert table.shape == (5, model.n_latents)
    assert table.index.tolist() == ids.tolist()
    assert table.columns.is_unique
    expected = [
        f"{chain} mode {k} (Å)" for chain, n in (("A", 3), ("B", 2)) for k in range(1, n + 1)
    ]
    assert [name for name in table.columns if "mode" in name] == expected
    assert table.columns[3] == "A turn x (°)" and table.columns[-1] == "B shift z (Å)"


def test_table_is_in_angstrom_and_degrees(model, closed):
    table = latent_table(Result(model, torch.ones(1, model.n_latents))).iloc[0]
    for chain, radius, n in zip("AB", closed.radii, np.bincount(closed.node_chain), strict=True):
        # The α of Eq. 1, for modes of unit norm.
        assert table[f"{chain} mode 1 (Å)"] == pytest.approx(math.sqrt(n))
        assert table[f"{chain} turn y (°)"] == pytest.approx(math.degrees(1 / radius))
        assert table[f"{chain} shift z (Å)"] == pytest.approx(1.0)
    quarter = torch.zeros(1, model.n_latents)
    quarter[0, model.dynamics.chains[1].rotation.start] = math.pi / 2 * closed.radii[1]
    table = latent_table(Result(model, quarter))
    assert table["B turn x (°)"].item() == pytest.approx(90, rel=1e-5)


def test_error_bars_are_in_the_same_units(model):
    latents = draw(model, 4)
    std = draw(model, 4, 1).abs()
    table = latent_table(Result(model, latents, std=std))
    assert table.shape == (4, 2 * model.n_latents)
    for number, name in enumerate(table.columns[: model.n_latents]):
        ratio = table[f"± {name}"] / table[name]
        np.testing.assert_allclose(ratio, std[:, number] / latents[:, number], rtol=1e-5)


def test_table_leaves_out_what_is_switched_off(closed):
    for switches, word in (({"translation": False}, "turn"), ({"rotation": False}, "shift")):
        model = Model(closed, modes=None, box_size=32, pixel_size=5.0, **switches)
        columns = latent_table(Result(model, torch.zeros(1, 6))).columns
        assert [name.split()[1] for name in columns] == [word] * 6


# Principal motions


@pytest.mark.parametrize("chain", [None, "A", "B"])
@pytest.mark.parametrize("kind", ["all", "modes", "rigid"])
def test_components_stay_within_what_was_asked_for(result, closed, chain, kind):
    motions = compute_pca(result, chain, kind, n_components=3)
    dynamics = result.model.dynamics
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
    assert motions.result is result and motions.model is result.model


def test_all_components_explain_everything(result):
    motions = compute_pca(result, n_components=99)
    assert len(motions.components) == result.model.n_latents
    assert motions.explained_variance_ratio.sum() == pytest.approx(1.0)


def test_scores_are_projections(result):
    motions = compute_pca(result, n_components=2)
    np.testing.assert_allclose(motions.scores.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(motions.transform(result), motions.scores, atol=1e-4)
    np.testing.assert_allclose(motions.transform(result.latents), motions.scores, atol=1e-4)
    one_up = torch.from_numpy(motions.mean + motions.components[1]).float()[None]
    np.testing.assert_allclose(motions.transform(one_up), [[0, 1]], atol=1e-5)


def test_other_particles_of_the_model_are_projected_alike(result, closed):
    motions = compute_pca(result[:150], n_components=2)
    rest = motions.transform(result[150:])
    np.testing.assert_allclose(rest, motions.transform(result.latents[150:]), atol=1e-6)
    # The same model, made again.
    again = Model(closed, modes=(3, 2), box_size=32, pixel_size=5.0)
    held_out = Result(again, result.latents[150:])
    np.testing.assert_allclose(motions.transform(held_out), rest, atol=1e-6)


def test_a_result_of_another_model_is_refused(result, closed, opened):
    motions = compute_pca(result)
    n_latents = result.model.n_latents
    others = {
        "modes": Model(closed, modes=(2, 3), box_size=32, pixel_size=5.0),
        "structure": Model(opened, modes=(3, 2), box_size=32, pixel_size=5.0),
        "pixel size": Model(closed, modes=(3, 2), box_size=32, pixel_size=6.0),
    }
    for what, model in others.items():
        assert model.n_latents == n_latents, "their latents look the same"
        with pytest.raises(ValueError, match=f"expected a result of .*another model.*{what}"):
            motions.transform(Result(model, torch.zeros(3, n_latents)))


def test_latents_of_another_length_are_refused(result):
    motions = compute_pca(result)
    for wrong in (torch.zeros(3, 5), result.latents[0]):
        with pytest.raises(ValueError, match=r"expected latents \(n, 17\) of Model.*, got"):
            motions.transform(wrong)


def test_a_planted_motion_is_found(model):
    generator = torch.Generator().manual_seed(1)
    n_latents = model.n_latents
    direction = torch.randn(n_latents, generator=generator)
    direction = torch.nn.functional.normalize(direction, dim=0)
    along = 3 * torch.randn(400, generator=generator)
    noise = 0.1 * torch.randn(400, n_latents, generator=generator)
    motions = compute_pca(Result(model, along[:, None] * direction + noise))
    assert abs(motions.components[0] @ direction.numpy()) > 0.99
    assert motions.explained_variance_ratio[0] > 0.95
    assert abs(np.corrcoef(motions.scores[:, 0], along)[0, 1]) > 0.99


def test_traverse_runs_between_percentiles(result):
    motions = compute_pca(result, n_components=3)
    for component in (0, 2):
        path = motions.traverse(component, n=5, percentiles=(10, 90))
        assert path.shape == (5, result.model.n_latents) and path.dtype == torch.float32
        scores = motions.transform(path)
        low, high = np.percentile(motions.scores[:, component], (10, 90))
        np.testing.assert_allclose(scores[:, component], np.linspace(low, high, 5), atol=1e-4)
        others = np.delete(scores, component, axis=1)
        np.testing.assert_allclose(others, 0, atol=1e-4, err_msg="the rest stays at the mean")


def test_traverse_of_one_chain_leaves_the_other_at_the_mean(result):
    motions = compute_pca(result, chain="B")
    coords = result.model.decode(motions.traverse(0, n=3))
    moved = (coords[-1] - coords[0]).norm(dim=1)
    first, second = (layout.atoms for layout in result.model.dynamics.chains)
    assert moved[first].max() < 1e-4 < moved[second].max()


def test_latents_of_many_particles_are_not_copied(model):
    result = Result(model, torch.randn(300_000, model.n_latents))
    size = result.latents.numpy().nbytes
    tracemalloc.start()
    motions = compute_pca(result, n_components=2)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert motions.result.latents.data_ptr() == result.latents.data_ptr()
    assert held < 1.2 * motions.scores.nbytes < size


def test_bad_questions(model, result, closed):
    for settings, sentence in (
        ({"chain": "Q"}, "expected a chain of A, B, got 'Q'"),
        ({"kind": "bend"}, "expected kind 'modes', 'rigid', 'all', got 'bend'"),
        ({"n_components": 0}, "expected one component or more, got 0"),
    ):
        with pytest.raises(ValueError, match=sentence):
            compute_pca(result, **settings)
    for wrong in (result.latents[:, :5], result.latents[0]):
        with pytest.raises(ValueError, match=rf"expected latents \(N, {model.n_latents}\).*, got"):
            compute_pca(Result(model, wrong))
    for few in (result[:1], result[:0]):
        with pytest.raises(ValueError, match="expected at least two particles and one all latent"):
            compute_pca(few)
    rigid = Model(closed, modes=None, box_size=32, pixel_size=5.0)
    with pytest.raises(ValueError, match="expected at least two particles and one modes latent"):
        compute_pca(Result(rigid, draw(rigid)), kind="modes")
    with pytest.raises(ValueError, match="expected a component from 0 to 4, got 5"):
        compute_pca(result).traverse(5)
    broken = result.latents.clone()
    broken[3, 1] = torch.nan
    with pytest.raises(ValueError, match="expected finite latents, got NaN or Inf in 1 of 200"):
        compute_pca(Result(model, broken))
