"""The latents in people's units, and principal motions that know the result they are of."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from cryochains.analysis import compute_pca, latent_table
from cryochains.inference import Result
from cryochains.model import Model, Population, in_frame, simulate_particles


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
    table = latent_table(Result(model, draw(model, 5), ids=ids), "poses")
    assert table.shape == (5, model.n_latents)
    assert table.index.tolist() == ids.tolist()
    assert table.columns.is_unique
    expected = [
        f"{chain} mode {k} (Å)" for chain, n in (("A", 3), ("B", 2)) for k in range(1, n + 1)
    ]
    assert [name for name in table.columns if "mode" in name] == expected
    assert table.columns[3] == "A turn x (°)" and table.columns[-1] == "B shift z (Å)"


def test_table_is_in_angstrom_and_degrees(model, closed):
    table = latent_table(Result(model, torch.ones(1, model.n_latents)), "poses").iloc[0]
    for chain, radius, n in zip("AB", closed.radii, np.bincount(closed.node_chain), strict=True):
        # The α of Eq. 1, for modes of unit norm.
        assert table[f"{chain} mode 1 (Å)"] == pytest.approx(math.sqrt(n))
        assert table[f"{chain} turn y (°)"] == pytest.approx(math.degrees(1 / radius))
        assert table[f"{chain} shift z (Å)"] == pytest.approx(1.0)
    quarter = torch.zeros(1, model.n_latents)
    quarter[0, model.dynamics.chains[1].rotation.start] = math.pi / 2 * closed.radii[1]
    table = latent_table(Result(model, quarter), frame="A")
    assert table["B turn x (°)"].item() == pytest.approx(90, rel=1e-5)


def test_error_bars_are_in_the_same_units(model):
    latents = draw(model, 4)
    std = draw(model, 4, 1).abs()
    table = latent_table(Result(model, latents, std=std), "poses")
    assert table.shape == (4, 2 * model.n_latents)
    for number, name in enumerate(table.columns[: model.n_latents]):
        ratio = table[f"± {name}"] / table[name]
        np.testing.assert_allclose(ratio, std[:, number] / latents[:, number], rtol=1e-5)


def test_table_says_how_the_pose_is_corrected(model, closed):
    """In a frame without what all chains share; that of the molecule is the default."""
    particles = simulate_particles(
        closed, 4, conformations=closed.coords[None], box_size=32, progress=False
    )
    latents, std = draw(model, 4), draw(model, 4, 1).abs()
    seen = Model(closed, particles, modes=(3, 2))
    result = Result(seen, latents, std=std, particles=particles)
    for frame in ("molecule", "B"):
        table = latent_table(result, frame)
        of_result = result.in_frame(frame)
        correction = of_result.pose_correction
        half = model.n_latents + 2
        assert table.shape == (4, 2 * half)
        assert list(table.columns[[half - 2, half - 1]]) == ["pose turn (°)", "pose shift (Å)"]
        assert list(table.columns[half:]) == [f"± {name}" for name in table.columns[:half]]
        np.testing.assert_allclose(table["pose turn (°)"], np.degrees(correction.angles))
        np.testing.assert_allclose(table["pose shift (Å)"], correction.distances)
        np.testing.assert_allclose(table["± pose shift (Å)"], correction.distance_std)
        np.testing.assert_allclose(table["B shift z (Å)"], of_result.latents[:, -1])
        np.testing.assert_allclose(table["± B shift z (Å)"], of_result.std[:, -1])
        # A result that is in a frame stays there.
        assert latent_table(of_result).equals(table)
    assert latent_table(result).equals(latent_table(result, "molecule"))
    # On the image only where the image is known.
    alone = latent_table(Result(model, latents))
    assert list(alone.columns[model.n_latents :]) == ["pose turn (°)"]


def test_table_ends_with_what_each_image_has_of_its_own(model):
    latents, std = draw(model, 4), draw(model, 4, 1).abs()
    columns = {
        "brightness": ("scale", [0.5, 1.0, 2.0, 1.5]),
        "noise (grey levels)": ("noise", [0.1, 0.2, math.nan, 0.1]),
        "misfit (χ² per pixel)": ("misfit", [1.0, 1.1, math.nan, 0.9]),
        "responsibility": ("responsibility", [0.99, 0.4, 0.0, 1.0]),
    }
    known = {field: torch.tensor(values) for field, values in columns.values()}
    table = latent_table(Result(model, latents, std=std, **known))
    assert list(table.columns[-4:]) == list(columns)
    assert table.columns[-5].startswith("± ")
    for name, (_, values) in columns.items():
        np.testing.assert_allclose(table[name], values)
    # Where they are not known there are none; one brightness for all was measured on no image.
    plain = latent_table(Result(model, latents, std=std, scale=torch.full((4,), 3.0)))
    assert list(table.columns[:-4]) == list(plain.columns)
    flagged = latent_table(Result(model, latents, responsibility=known["responsibility"]))
    assert [name for name in flagged.columns if name in columns] == ["responsibility"]


def test_table_of_one_refined_particle_has_the_columns_of_all(model):
    """Also of a population whose particles are all as bright."""
    n = model.n_latents
    population = Population(
        torch.zeros(n), torch.eye(n), noise_std=1.0, contrast=2.5, fingerprint=model.fingerprint
    )
    table = latent_table(Result(model, draw(model, 3), population=population, kind="refined")[[1]])
    assert table["brightness"].tolist() == [2.5]


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
    assert motions.label.endswith(", frame of the molecule") and motions.label in repr(motions)
    assert motions.result.in_frame("poses") is result and motions.model is result.model


@pytest.mark.parametrize("frame", ["molecule", "poses", "A"])
def test_components_are_of_the_frame_that_is_asked_for(result, frame):
    motions = compute_pca(result, frame=frame)
    assert motions.result.frame == frame
    expected = result.latents
    if frame != "poses":
        expected = in_frame(result.model.dynamics, result.latents, frame).latents
    np.testing.assert_allclose(motions.transform(expected), motions.scores, atol=1e-4)
    np.testing.assert_allclose(motions.mean, expected.mean(0), atol=1e-5)
    # Of a result that is in a frame, that is the default; the other way there is none.
    again = compute_pca(motions.result)
    assert again.result is motions.result or frame == "poses"
    assert compute_pca(motions.result, frame="poses").result is result
    # Other particles are brought there.
    for other in (result, result.in_frame("B"), result.in_frame()):
        np.testing.assert_allclose(motions.transform(other), motions.scores, atol=1e-4)


def test_a_chain_does_not_move_in_its_own_frame(result):
    motions = compute_pca(result, frame="A")
    still = result.model.dynamics.chains[0]
    assert motions.label == "all chains, α and R|t, frame of chain A"
    assert (motions.components[:, still.rotation] == 0).all()
    assert (motions.components[:, still.mode] != 0).any()
    with pytest.raises(ValueError, match="one rigid latent, got .* and 0 latents; .*another chain"):
        compute_pca(result, "A", "rigid", frame="A")


def test_models_of_one_frame_stay_in_it(closed):
    """Chains that only turn or only shift, and one rigid body, of which all motion is pose."""
    whole = closed.as_one_body()
    for structure, settings in (
        (closed, {"rotation": False}),
        (closed, {"translation": False}),
        (whole, {}),
    ):
        model = Model(structure, modes=None, box_size=32, pixel_size=5.0, **settings)
        result = Result(model, torch.randn(9, model.n_latents))
        motions = compute_pca(result)
        assert motions.result is result and "frame of the poses" in motions.label
        assert "pose turn (°)" not in latent_table(result)


def test_a_motion_that_all_chains_share_is_none(model):
    """What a wrong pose looks like: it has most of the variance, and none within the molecule."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.zeros(300, model.n_latents)
    first, second = model.dynamics.chains
    shared = 5 * torch.randn(300, 3, generator=generator)
    latents[:, first.translation] = shared
    opening = torch.randn(300, generator=generator)
    latents[:, second.translation] = shared
    latents[:, second.translation.start] += opening
    result = Result(model, latents)
    motions = compute_pca(result)
    assert motions.explained_variance_ratio[0] > 0.99
    assert abs(np.corrcoef(motions.scores[:, 0], opening)[0, 1]) > 0.999
    in_poses = compute_pca(result, frame="poses")
    assert abs(np.corrcoef(in_poses.scores[:, 0], opening)[0, 1]) < 0.5


def test_junk_has_scores_and_no_say(result):
    """Components are those of the other particles, and so are the ends of their motion."""
    junk = np.arange(200) % 4 == 0
    latents = result.latents.clone()
    latents[junk] = 50 * latents[junk].flip(1)
    responsibility = torch.from_numpy(np.where(junk, 0.5, 0.6))
    flagged = Result(result.model, latents, responsibility=responsibility)
    motions = compute_pca(flagged, frame="poses")
    alone = compute_pca(result[~junk], frame="poses")
    signs = np.sign((motions.components * alone.components).sum(1))
    np.testing.assert_allclose(signs[:, None] * motions.components, alone.components, atol=1e-4)
    np.testing.assert_allclose(motions.mean, alone.mean, atol=1e-5)
    assert motions.scores.shape == (200, 5) and motions.shown_scores.shape == (150, 5)
    np.testing.assert_allclose(signs * motions.shown_scores, alone.scores, atol=1e-3)
    np.testing.assert_allclose(motions.scores[~junk], motions.shown_scores)
    assert np.abs(motions.scores[junk]).max() > 5 * np.abs(motions.shown_scores).max()
    ends = motions.transform(motions.traverse(0, 2, (0, 100)))[:, 0]
    expected = motions.shown_scores[:, 0].min(), motions.shown_scores[:, 0].max()
    np.testing.assert_allclose(ends, expected, rtol=1e-4)


def test_all_components_explain_everything(result):
    motions = compute_pca(result, n_components=99)
    assert len(motions.components) == result.model.n_latents
    assert motions.explained_variance_ratio.sum() == pytest.approx(1.0)


def test_scores_are_projections(result):
    motions = compute_pca(result, n_components=2)
    np.testing.assert_allclose(motions.scores.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(motions.transform(result), motions.scores, atol=1e-4)
    latents = motions.result.latents
    np.testing.assert_allclose(motions.transform(latents), motions.scores, atol=1e-4)
    one_up = torch.from_numpy(motions.mean + motions.components[1]).float()[None]
    np.testing.assert_allclose(motions.transform(one_up), [[0, 1]], atol=1e-5)


def test_other_particles_of_the_model_are_projected_alike(result, closed):
    motions = compute_pca(result[:150], n_components=2)
    rest = motions.transform(result[150:])
    latents = result.in_frame().latents[150:]
    np.testing.assert_allclose(rest, motions.transform(latents), atol=1e-4)
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
    planted = Result(model, along[:, None] * direction + noise)
    motions = compute_pca(planted, frame="poses")
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
    motions = compute_pca(result, n_components=2, frame="poses")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert motions.result.latents.data_ptr() == result.latents.data_ptr()
    assert held < 1.2 * motions.scores.nbytes < size


def test_bad_questions(model, result, closed):
    for settings, sentence in (
        ({"chain": "Q"}, "expected a chain of A, B, got 'Q'"),
        ({"kind": "bend"}, "expected kind 'modes', 'rigid', 'all', got 'bend'"),
        ({"n_components": 0}, "expected n_components to be a whole number of 1 or more, got 0"),
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
