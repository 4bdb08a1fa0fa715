"""Particles as points: where many are, what is uncertain, and which particles a selection means."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from cryochains.analysis import (
    atom_uncertainty,
    average_covariance,
    component_errors,
    compute_pca,
    decode_one,
    particle_columns,
    point_density,
    save_selection,
)
from cryochains.images import cryosparc, load_particles
from cryochains.inference import Result, load_result, posterior_covariance, refine
from cryochains.model import Model, frame_jacobian, simulate_particles


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, modes=3, box_size=32, pixel_size=5.0)


@pytest.fixture(scope="module")
def dynamics(model):
    return model.dynamics


def simulate(closed, n, **settings):
    return simulate_particles(
        closed,
        n,
        conformations=closed.coords[None],
        box_size=32,
        progress=False,
        **settings,
    )


def test_density_follows_the_crowd():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 50_000))
    density = point_density(x, y)
    assert density.shape == x.shape and density.max() == 1 and density.min() > 0
    # Against the Gaussian that they were drawn from, where there are enough to count.
    true = np.exp(-(x**2 + y**2) / 2)
    inner = true > 0.1
    assert np.corrcoef(density[inner], true[inner])[0, 1] > 0.95
    assert point_density(np.zeros(5), np.zeros(5)).tolist() == [1] * 5
    assert point_density(x[:1], y[:1]).tolist() == [1]


def test_error_bars_of_atoms_are_those_of_drawn_conformations(dynamics):
    generator = torch.Generator().manual_seed(0)
    p = dynamics.n_latents
    root = 0.05 * torch.randn(p, p, generator=generator)
    latents = 0.5 * torch.randn(p, generator=generator)
    drawn = dynamics.decode(latents + torch.randn(4000, p, generator=generator) @ root.T)
    spread = drawn.var(0).sum(-1).sqrt().numpy()
    errors = atom_uncertainty(dynamics, latents, root @ root.T)
    np.testing.assert_allclose(errors, spread, rtol=0.1)


def test_one_conformation_at_once_is_what_decode_gives(dynamics):
    latents = torch.randn(dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    coords = decode_one(dynamics, latents)
    np.testing.assert_allclose(coords, dynamics.decode(latents[None])[0], atol=1e-5)
    assert torch.get_num_threads() == threads


def test_uncertainty_of_a_particle_is_that_of_its_atoms(model, dynamics):
    generator = torch.Generator().manual_seed(0)
    std = 0.2 + torch.rand(3, dynamics.n_latents, generator=generator)
    result = Result(model, torch.zeros(3, dynamics.n_latents), std=std)
    column = particle_columns(result)["uncertainty (Å)"]
    for row, one in enumerate(std):
        atoms = atom_uncertainty(dynamics, torch.zeros(dynamics.n_latents), one.square().diag())
        assert column[row] == pytest.approx(np.sqrt(np.mean(atoms**2)), rel=1e-3)


def test_error_bars_of_components(model):
    generator = torch.Generator().manual_seed(0)
    p = model.n_latents
    root = torch.randn(p, p, generator=generator)
    motions = compute_pca(Result(model, torch.randn(100, p, generator=generator)))
    errors = component_errors(motions, root @ root.T)
    drawn = motions.transform(torch.randn(20_000, p, generator=generator) @ root.T)
    np.testing.assert_allclose(errors, drawn.std(0), rtol=0.03)


def test_average_covariance_is_exact_with_the_images(closed):
    particles = simulate(closed, 5)
    model = Model(closed, particles, modes=2)
    result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    exact = posterior_covariance(result, np.arange(5)).mean(0).cpu()
    torch.testing.assert_close(average_covariance(result), exact.float())
    # Without them the diagonal is the same but for what the last step changed.
    alone = average_covariance(replace(result, particles=None))
    assert (alone == alone.diagonal().diag()).all()
    torch.testing.assert_close(alone.diagonal(), exact.diagonal().float(), rtol=0.2, atol=0.01)


def test_error_bars_of_components_are_of_the_frame_of_their_result(closed):
    particles = simulate(closed, 6)
    model = Model(closed, particles, modes=2)
    result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    motions = compute_pca(result)
    covariance = average_covariance(motions.result)
    given = posterior_covariance(result, np.arange(6))
    jacobian = frame_jacobian(model.dynamics, result.latents).latents
    expected = (jacobian @ given.double() @ jacobian.mT).mean(0).float()
    torch.testing.assert_close(covariance, expected)
    assert component_errors(motions, covariance).max() < 3
    # A rigid motion of all is not known well, and does not count.
    assert covariance.trace() < average_covariance(result).trace()


def test_nothing_is_known_of_an_encoders_errors(model):
    result = Result(model, torch.zeros(3, model.n_latents), kind="encoded")
    with pytest.raises(ValueError, match="expected a result with error bars, got .*; try refine"):
        average_covariance(result)


def test_columns_of_particles(closed):
    particles = simulate(closed, 4)
    model = Model(closed, particles, modes=3)
    latents = torch.zeros(4, model.n_latents)
    columns = particle_columns(Result(model, latents, particles=particles))
    expected = (particles.ctf.defocus_u + particles.ctf.defocus_v).numpy() / 2e4
    assert list(columns) == ["defocus (µm)"]
    np.testing.assert_allclose(columns["defocus (µm)"], expected)
    assert particle_columns(Result(model, latents)).empty


IMAGE_COLUMNS = {
    "brightness": ("scale", [0.5, 1.0, 2.0]),
    "noise (grey levels)": ("noise", [0.1, 0.2, torch.nan]),
    "misfit (χ² per pixel)": ("misfit", [1.0, 1.1, torch.nan]),
    "responsibility": ("responsibility", [0.99, 0.4, 0.0]),
}


def test_columns_of_what_each_image_has_of_its_own(model):
    latents = torch.zeros(3, model.n_latents)
    known = {field: torch.tensor(values) for field, values in IMAGE_COLUMNS.values()}
    columns = particle_columns(Result(model, latents, **known))
    assert list(columns) == list(IMAGE_COLUMNS)
    for name, (field, values) in IMAGE_COLUMNS.items():
        np.testing.assert_allclose(columns[name], values)
        # What is the same for all, or for all of which it is known, tells no two apart.
        for same in ([0.7, 0.7, 0.7], [0.7, 0.7, torch.nan], [torch.nan] * 3):
            if field != "scale" or np.isfinite(same).all():
                constant = Result(model, latents, **(known | {field: torch.tensor(same)}))
                assert set(particle_columns(constant)) == set(IMAGE_COLUMNS) - {name}


def test_columns_of_corrected_poses(closed):
    particles = simulate(closed, 4)
    model = Model(closed, particles, modes=2)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(4, model.n_latents, generator=generator)
    result = Result(model, latents, latents.abs(), particles=particles)
    assert "pose turn (°)" not in particle_columns(result)
    for frame in ("molecule", "A"):
        seen = result.in_frame(frame)
        columns = particle_columns(seen)
        correction = seen.pose_correction
        np.testing.assert_allclose(columns["pose turn (°)"], np.degrees(correction.angles))
        np.testing.assert_allclose(columns["pose shift (Å)"], correction.distances)
    # On the image only where the image is known.
    alone = particle_columns(replace(result, particles=None).in_frame())
    assert "pose turn (°)" in alone and "pose shift (Å)" not in alone


def test_a_typical_particle_shows_the_molecule(model):
    std = torch.full((4, model.n_latents), 0.5)
    std[1] = 9.0
    result = Result(model, torch.zeros(4, model.n_latents), std)
    flagged = replace(result, responsibility=torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert torch.equal(average_covariance(flagged), 0.25 * torch.eye(model.n_latents))
    # Where none does, of all of them.
    none = replace(result, responsibility=torch.zeros(4))
    torch.testing.assert_close(average_covariance(none), average_covariance(result))


def test_columns_of_a_file(tmp_path, closed):
    simulate(closed, 6, path=tmp_path / "all.star")
    blocks = starfile.read(tmp_path / "all.star")
    blocks["particles"]["rlnRandomSubset"] = [1, 1, 1, 2, 1, 1]
    starfile.write(blocks, tmp_path / "all.star", overwrite=True)
    particles = load_particles(tmp_path / "all.star")
    assert particles.columns["rlnRandomSubset"].tolist() == [1, 1, 1, 2, 1, 1]
    model = Model(closed, particles, modes=3)
    chosen = particles[[4, 3]]
    columns = particle_columns(Result(model, torch.zeros(2, model.n_latents), particles=chosen))
    assert columns["rlnRandomSubset"].tolist() == [1, 2] and "rlnVoltage" not in columns
    assert "rlnImageName" not in columns and list(columns)[0] == "defocus (µm)"


def test_columns_of_the_caller(model):
    result = Result(model, torch.zeros(3, model.n_latents))
    others = pd.DataFrame({"class": [1, 2, 3], "odd": [True, False, True]}, index=[7, 8, 9])
    columns = particle_columns(result, others)
    assert columns["class"].tolist() == [1, 2, 3] and columns["odd"].tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match="expected columns of numbers, got 's' of"):
        particle_columns(result, pd.DataFrame({"s": list("abc")}))
    with pytest.raises(ValueError, match="expected 3 rows of columns, one a row of latents, got 2"):
        particle_columns(result, others[:2])


def test_selection_of_cryosparc_goes_back_to_both(tmp_path, closed):
    """A .cs with its fields as they were, and a .star; the columns of the .cs are there too."""
    particles = simulate(closed, 6)
    fields = [("uid", "u8"), ("alignments3D/error", "f4")]
    array = np.array([(k, 2.0 + k) for k in range(6)], dtype=fields)
    array = cryosparc.blob_fields(array, "all.mrcs", 32, particles.pixel_size)
    poses = particles.rotations, particles.shifts
    array = cryosparc.pose_fields(array, *poses, np.ones(6, dtype=bool), particles.pixel_size)
    array = cryosparc.ctf_fields(array, particles.ctf)
    particles.save(tmp_path / "all.star")
    cryosparc.write_array(tmp_path / "all.cs", array)
    opened = load_particles(tmp_path / "all.cs")
    torch.testing.assert_close(opened.rotations, particles.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(opened.shifts, particles.shifts, atol=1e-4, rtol=0)
    model = Model(closed, opened, modes=3)
    latents = torch.randn(6, model.n_latents, generator=torch.Generator().manual_seed(0))
    result = Result(model, latents, particles=opened)
    assert particle_columns(result)["alignments3D/error"].tolist() == [2, 3, 4, 5, 6, 7]
    path = save_selection(tmp_path / "out", compute_pca(result), [4, 1])
    written = cryosparc.read_cs(path.with_suffix(".cs")).array
    given = cryosparc.read_cs(tmp_path / "all.cs").array[[4, 1]]
    for name in given.dtype.names:
        # Beside the images is another folder: the path is a whole one there.
        assert name == "blob/path" or written[name].tobytes() == given[name].tobytes(), name
    scores = compute_pca(result).scores[[4, 1]]
    np.testing.assert_allclose(written["cryochains/PC1"], scores[:, 0], atol=1e-4)
    chosen = load_particles(path.with_suffix(".star"))
    assert torch.equal(chosen.read_images(), opened.read_images([4, 1]))
    torch.testing.assert_close(chosen.rotations, opened.rotations[[4, 1]], atol=1e-5, rtol=0)
    # And a result of them finds the .cs again, binned as it was.
    binned = load_particles(tmp_path / "all.cs", box_size=16)[[5, 0]]
    binned_result = Result(Model(closed, binned, modes=3), latents[[5, 0]], particles=binned)
    binned_result.save(tmp_path / "r.safetensors")
    again = load_result(tmp_path / "r.safetensors").particles
    assert torch.equal(again.read_images(), binned.read_images())
    assert again.source == binned.source


def test_selection_names_its_particles(tmp_path, closed):
    simulate(closed, 6, path=tmp_path / "all.star")
    particles = load_particles(tmp_path / "all.star")[::-1]
    model = Model(closed, particles, modes=3)
    latents = torch.randn(6, model.n_latents, generator=torch.Generator().manual_seed(0))
    result = Result(model, latents, particles=particles)
    motions = compute_pca(result)
    rows = np.array([4, 1])
    path = save_selection(tmp_path / "out", motions, rows)
    table = pd.read_csv(path)
    assert table["row"].tolist() == [4, 1]
    assert table["id"].tolist() == particles.ids[rows].tolist()
    np.testing.assert_allclose(table.iloc[:, 2:], motions.scores[rows], atol=1e-4)
    chosen = load_particles(path.with_suffix(".star"))
    assert torch.equal(chosen.read_images(), particles.read_images(rows))
    # With the poses that were given, although the motions are of corrected ones.
    assert torch.allclose(chosen.rotations, particles.rotations[rows], atol=1e-5)
    corrected = motions.result.particles.rotations[rows]
    assert not torch.allclose(chosen.rotations, corrected, atol=1e-3)
    # A mask, a slice and negative rows mean what they mean of an array.
    mask = np.isin(np.arange(len(particles)), [1, 4])
    for same in (mask, torch.from_numpy(mask), slice(1, 5, 3), [1, 4 - len(particles)]):
        table = pd.read_csv(save_selection(tmp_path / "masks", motions, same))
        assert table["row"].tolist() == [1, 4]
        assert table["id"].tolist() == particles.ids[[1, 4]].tolist()
    for wrong in (mask[:-1], [len(particles)]):
        with pytest.raises(IndexError, match=f"expected positions within {len(particles)} part"):
            save_selection(tmp_path / "wrong", motions, wrong)
    with pytest.raises(ValueError, match="expected a selection, got none; try clicking"):
        save_selection(tmp_path / "wrong", motions, ~mask & mask)
    assert not (tmp_path / "wrong").exists()
    # Nothing is overwritten, and a result without images has a table alone, with its ids.
    alone = compute_pca(Result(model, latents, ids=particles.ids))
    second = save_selection(tmp_path / "out", alone, rows)
    assert second != path and not second.with_suffix(".star").exists()
    assert pd.read_csv(second)["id"].tolist() == particles.ids[rows].tolist()
    with pytest.raises(ValueError, match="expected a selection, got none; try clicking"):
        save_selection(tmp_path / "out", motions, rows[:0])


def test_decoded_uncertainty_needs_no_chain_in_common(dynamics, closed):
    # A chain of which everything is known does not move with the other's error.
    layout = dynamics.chains[1]
    n = layout.latents.stop - layout.latents.start
    covariance = torch.zeros(dynamics.n_latents, dynamics.n_latents)
    covariance[layout.latents, layout.latents] = torch.eye(n)
    error = atom_uncertainty(dynamics, torch.zeros(dynamics.n_latents), covariance)
    own = closed.chain_index == 1
    assert (error[~own] == 0).all() and (error[own] > 0).all()
