"""`save_motion` writes each format by its suffix, and the same conformations in each."""

import numpy as np
import prody
import pytest
import torch
from PIL import Image

from cryochains.analysis import compute_pca, decode_ensemble
from cryochains.inference import Result
from cryochains.model import Model
from cryochains.view import save_motion


@pytest.fixture(scope="module")
def motions(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    generator = torch.Generator().manual_seed(0)
    return compute_pca(Result(model, torch.randn(30, model.n_latents, generator=generator)))


@pytest.mark.parametrize("suffix", [".pdb", ".cif", ".dcd", ".cxc"])
def test_conformations_along_a_component(motions, tmp_path, suffix):
    path = tmp_path / f"pc2{suffix}"
    assert save_motion(path, motions, 1, n=3, percentiles=(10, 90)) == path
    latents = motions.traverse(1, 3, (10, 90))
    expected = decode_ensemble(motions.model, latents).getCoordsets()
    readers = {".dcd": prody.parseDCD, ".cif": prody.parseMMCIF}
    read = readers.get(suffix, prody.parsePDB)
    written = tmp_path / "pc2-models.pdb" if suffix == ".cxc" else path
    np.testing.assert_allclose(read(str(written)).getCoordsets(), expected, atol=1e-3)
    names = {path.name, written.name}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_without_numbers_there_are_21_conformations(motions, tmp_path):
    save_motion(str(tmp_path / "a.dcd"), motions)
    assert prody.parseDCD(str(tmp_path / "a.dcd")).numCoordsets() == 21


def test_densities_are_a_series(motions, tmp_path):
    first = save_motion(tmp_path / "pc1.mrc", motions, n=3, resolution=20.0)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert first.name == names[0] and names == [f"pc1-00{number}.mrc" for number in (1, 2, 3)]
    with pytest.raises(ValueError, match="ends in .mrc for resolution=, got a.pdb; try it without"):
        save_motion(tmp_path / "a.pdb", motions, resolution=20.0)


def test_movie_by_its_suffix(motions, tmp_path):
    with Image.open(save_motion(tmp_path / "a.gif", motions, n=4)) as movie:
        assert movie.n_frames == 4 and movie.format == "GIF"


@pytest.mark.parametrize("name", ["a.PDB", "a.GIF"])
def test_suffixes_in_capitals(motions, tmp_path, name):
    assert save_motion(tmp_path / name, motions, n=3).stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["a.xyz", "a", "a.ccp4", "a.pdb.gz"])
def test_other_suffixes(motions, tmp_path, name):
    sentence = f"expected a path that ends in one of .pdb, .*.mp4, got {name}; try a.pdb"
    with pytest.raises(ValueError, match=sentence):
        save_motion(tmp_path / name, motions)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pdb", ".cif", ".dcd", ".cxc", ".mrc", ".gif"])
def test_component_that_does_not_exist(motions, tmp_path, suffix):
    with pytest.raises(ValueError, match="expected a component from 0 to 4, got 7"):
        save_motion(tmp_path / f"a{suffix}", motions, 7)
    assert not list(tmp_path.iterdir())
