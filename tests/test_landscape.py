"""The latent space as points: what is crowded, what is uncertain, and which particles a selection means."""

import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from cryochains.dynamics import Dynamics
from cryochains.inference import posterior_covariance, refine
from cryochains.landscape import (
    atom_uncertainty,
    average_covariance,
    component_errors,
    particle_columns,
    point_density,
    save_selection,
)
from cryochains.latent import compute_pca
from cryochains.model import CryoChains
from cryochains.modes import compute_modes
from cryochains.particles import load_particles
from cryochains.simulation import simulate_particles


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, 3))


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
    place = 0.5 * torch.randn(p, generator=generator)
    drawn = dynamics.decode(place + torch.randn(4000, p, generator=generator) @ root.T)
    spread = drawn.var(0).sum(-1).sqrt().numpy()
    found = atom_uncertainty(dynamics, place, root @ root.T)
    np.testing.assert_allclose(found, spread, rtol=0.1)


def test_uncertainty_of_a_particle_is_that_of_its_atoms(dynamics):
    std = 0.2 + torch.rand(3, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    column = particle_columns(dynamics, std)["uncertainty (Å)"]
    for row, one in enumerate(std):
        atoms = atom_uncertainty(dynamics, torch.zeros(dynamics.n_latents), one.square().diag())
        assert column[row] == pytest.approx(np.sqrt(np.mean(atoms**2)), rel=1e-3)


def test_error_bars_of_components(dynamics):
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(dynamics.n_latents, dynamics.n_latents, generator=generator)
    motions = compute_pca(dynamics, torch.randn(100, dynamics.n_latents, generator=generator))
    errors = component_errors(motions, root @ root.T)
    drawn = motions.transform(torch.randn(20_000, dynamics.n_latents, generator=generator) @ root.T)
    np.testing.assert_allclose(errors, drawn.std(0), rtol=0.03)


def test_average_covariance_is_exact_with_the_images(closed):
    particles = simulate_particles(closed, 5, conformations=closed.coords[None], box_size=32, progress=False)
    model = CryoChains.for_particles(closed, particles, modes=2, width=0.02)
    found = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    exact = posterior_covariance(model, particles, found, np.arange(5)).mean(0)
    torch.testing.assert_close(average_covariance(found, model, particles), exact.float())
    # Without them the diagonal is the same but for what the last step changed.
    alone = average_covariance(found)
    assert (alone == alone.diagonal().diag()).all()
    torch.testing.assert_close(alone.diagonal(), exact.diagonal().float(), rtol=0.2, atol=0.01)


def test_columns_of_particles(closed, dynamics):
    particles = simulate_particles(closed, 4, conformations=closed.coords[None], box_size=32, progress=False)
    columns = particle_columns(dynamics, None, particles)
    expected = (particles.ctf.defocus_u + particles.ctf.defocus_v).numpy() / 2e4
    assert list(columns) == ["defocus (µm)"]
    np.testing.assert_allclose(columns["defocus (µm)"], expected)
    assert particle_columns(dynamics).empty


def test_columns_of_a_file(tmp_path, closed, dynamics):
    simulate_particles(
        closed, 6, conformations=closed.coords[None], box_size=32, progress=False, path=tmp_path / "all.star"
    )
    blocks = starfile.read(tmp_path / "all.star")
    blocks["particles"]["rlnRandomSubset"] = [1, 1, 1, 2, 1, 1]
    starfile.write(blocks, tmp_path / "all.star", overwrite=True)
    particles = load_particles(tmp_path / "all.star")
    assert particles.columns["rlnRandomSubset"].tolist() == [1, 1, 1, 2, 1, 1]
    columns = particle_columns(dynamics, None, particles[[4, 3]])
    assert columns["rlnRandomSubset"].tolist() == [1, 2] and "rlnVoltage" not in columns
    assert "rlnImageName" not in columns and list(columns)[0] == "defocus (µm)"


def test_selection_names_its_particles(tmp_path, closed, dynamics):
    particles = simulate_particles(
        closed, 6, conformations=closed.coords[None], box_size=32, progress=False, path=tmp_path / "all.star"
    )
    particles = load_particles(tmp_path / "all.star")[::-1]
    latents = torch.randn(6, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    motions = compute_pca(dynamics, latents)
    rows = np.array([4, 1])
    path = save_selection(tmp_path / "out", motions, latents, rows, particles)
    table = pd.read_csv(path)
    assert table["row"].tolist() == [4, 1] and table["id"].tolist() == particles.ids[rows].tolist()
    np.testing.assert_allclose(table.iloc[:, 2:], motions.scores[rows], atol=1e-4)
    chosen = load_particles(path.with_suffix(".star"))
    assert torch.equal(chosen.read_images(), particles.read_images(rows))
    assert torch.allclose(chosen.rotations, particles.rotations[rows], atol=1e-5)
    # Nothing is overwritten, and latents without images are a table alone.
    second = save_selection(tmp_path / "out", motions, latents, rows)
    assert second != path and not second.with_suffix(".star").exists() and "id" not in pd.read_csv(second)
    with pytest.raises(ValueError, match="expected a selection, got none; try clicking"):
        save_selection(tmp_path / "out", motions, latents, rows[:0])


def test_decoded_uncertainty_needs_no_chain_in_common(dynamics, closed):
    # A chain of which everything is known does not move with the other's error.
    layout = dynamics.chains[1]
    covariance = torch.zeros(dynamics.n_latents, dynamics.n_latents)
    covariance[layout.latents, layout.latents] = torch.eye(layout.latents.stop - layout.latents.start)
    error = atom_uncertainty(dynamics, torch.zeros(dynamics.n_latents), covariance)
    assert (error[closed.chain_index == 0] == 0).all() and (error[closed.chain_index == 1] > 0).all()
