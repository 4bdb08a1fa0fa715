"""Populations in files: what is saved comes back, holds no coordinates, is refused elsewhere."""

import pytest
import torch
from safetensors.torch import load_file

from cryochains.inference import refine
from cryochains.model import Model, Population, load_population, simulate_particles
from cryochains.model.population import PRETRAINED_FOLDER
from cryochains.molecule import load_structure, match_structures

ENTRIES = ("glua3-closed", "glua3-open")


@pytest.fixture(scope="module")
def closed():
    return match_structures(*(load_structure(entry) for entry in ENTRIES)).a


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, box_size=32, pixel_size=5.0, modes=(3, 2))


@pytest.fixture(scope="module")
def particles(closed):
    return simulate_particles(
        closed, 4, conformations=closed.coords[None], box_size=32, pixel_size=5.0, progress=False
    )


@pytest.fixture
def saved(model, tmp_path):
    p = model.n_latents
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(p, generator=generator, dtype=torch.float64)
    population = Population(mean, torch.eye(p).double(), 0.2, 1.3, model.fingerprint)
    population.save(tmp_path / "mine.safetensors")
    return population, tmp_path / "mine.safetensors"


def test_what_is_saved_comes_back(saved, model, particles):
    population, path = saved
    for name in (path, str(path)):
        loaded = load_population(name)
        assert torch.equal(loaded.mean, population.mean)
        assert torch.equal(loaded.covariance, population.covariance)
        assert (loaded.noise_std, loaded.contrast) == (0.2, 1.3)
        assert loaded.fingerprint == population.fingerprint
    settings = {"blurs": (0.0,), "progress": False}
    results = [refine(model, particles, one, **settings) for one in (population, loaded)]
    assert torch.equal(results[0].latents, results[1].latents)


def test_no_coordinates_are_in_the_file(saved, closed):
    tensors = load_file(saved[1])
    assert not any(tensor.numel() == closed.n_atoms * 3 for tensor in tensors.values())
    assert set(tensors) == {"mean", "covariance"}


def test_another_model_is_refused(saved, closed, model, particles):
    population = load_population(saved[1])
    assert len(refine(model, particles, population, blurs=(0.0,), progress=False)) == 4
    moved = closed.with_coords(closed.atoms.getCoords() + 0.5)
    for structure, modes in ((moved, (3, 2)), (closed, (2, 3)), (closed, None)):
        other = Model(structure, particles, modes=modes)
        with pytest.raises(ValueError, match="expected a population of Model.*got one of another"):
            refine(other, particles, population, progress=False)


def test_unknown_names_list_the_choices():
    with pytest.raises(
        FileNotFoundError,
        match="expected a population of glua3, or a file of one, got 'glua4'; try",
    ):
        load_population("glua4")


def test_files_that_hold_no_population(tmp_path):
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="expected a population file, got something unreadable"):
        load_population(tmp_path / "text")


def test_the_populations_of_the_package_are_small_and_have_a_card():
    files = sorted(PRETRAINED_FOLDER.glob("*.safetensors"))
    files = [path for path in files if not path.stem.endswith("-encoder")]
    assert files
    for path in files:
        assert path.stat().st_size < 30e3
        card = path.with_suffix(".md").read_text()
        assert all(word in card for word in ("Data", "Training", "Scores", "Limits"))
        load_population(path.stem)


def test_the_population_of_the_package_is_that_of_its_model(closed):
    population = load_population("glua3")
    assert population.mean.shape == (len(population.covariance),)
    assert torch.linalg.eigvalsh(population.covariance).min() > 0
    assert population.fingerprint["structure"] == closed.content_hash
