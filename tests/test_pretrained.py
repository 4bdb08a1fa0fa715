"""Pretrained models: what is saved comes back, holds no coordinates, and is refused for another structure."""

import pytest
import torch
from safetensors.torch import load_file

from cryochains import CryoChains, load_pretrained, save_pretrained
from cryochains.matching import match_structures
from cryochains.population import Population
from cryochains.pretrained import FOLDER
from cryochains.structure import load_structure

ENTRIES = ("glua3-closed", "glua3-open")


@pytest.fixture(scope="module")
def closed():
    return match_structures(*(load_structure(entry) for entry in ENTRIES)).a


@pytest.fixture
def saved(closed, tmp_path):
    model = CryoChains(closed, box_size=32, pixel_size=5.0, modes=(3, 2), width=0.1)
    model.contrast.fill_(1.3)
    for parameter in model.encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    p = model.dynamics.n_latents
    population = Population(torch.randn(p).double(), torch.eye(p).double(), 0.2, 1.3, closed.content_hash)
    save_pretrained(tmp_path / "mine.safetensors", model, population, ENTRIES)
    return model, population, tmp_path / "mine.safetensors"


def test_what_is_saved_comes_back(saved):
    model, population, path = saved
    loaded, learned = load_pretrained(path)
    images = torch.randn(3, 32, 32)
    assert torch.equal(loaded.encode(images), model.encode(images))
    assert torch.equal(learned.mean, population.mean) and torch.equal(learned.covariance, population.covariance)
    assert (learned.noise_std, learned.contrast, float(loaded.contrast)) == (0.2, 1.3, pytest.approx(1.3))


def test_no_coordinates_are_in_the_file(saved, closed):
    tensors = load_file(saved[2])
    assert not any(tensor.numel() == closed.n_atoms * 3 for tensor in tensors.values())
    assert set(name.split(".")[0] for name in tensors) == {"encoder", "mean", "covariance"}


def test_another_structure_is_refused(saved, closed):
    moved = closed.with_coords(closed.atoms.getCoords() + 0.5)
    with pytest.raises(ValueError, match="expected glua3-closed as matched with glua3-open"):
        load_pretrained(saved[2], moved)
    assert load_pretrained(saved[2], closed)


def test_unknown_names_list_the_choices():
    with pytest.raises(ValueError, match="expected a pretrained model of glua3, or a file of one, got 'glua4'"):
        load_pretrained("glua4")


def test_every_model_of_the_package_is_small_and_has_a_card():
    models = sorted(FOLDER.glob("*.safetensors"))
    assert models
    for path in models:
        assert path.stat().st_size < 10e6
        card = path.with_suffix(".md").read_text()
        assert all(word in card for word in ("Data", "Training", "Scores", "Limits"))
