"""Densities: where the atoms are, as heavy as they are, as sharp as was asked, all or none."""

import math

import mrcfile
import numpy as np
import prody
import pytest
import torch

from cryochains.analysis import densities, save_conformations, save_densities
from cryochains.images import compute_fsc, draw_volume
from cryochains.model import Model


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, modes=2, box_size=32, pixel_size=5.0)


@pytest.fixture(scope="module")
def latents(model):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, model.n_latents, generator=generator)


def read(path):
    """Volume, Å a voxel and (x, y, z) Å of the first one, as any reader of MRC finds them."""
    with mrcfile.open(path, mode="r") as mrc:
        assert mrc.is_volume() and mrcfile.validate(path)
        origin = np.array([mrc.header.origin[axis].item() for axis in "xyz"])
        return mrc.data.copy(), float(mrc.voxel_size.x), origin


def weights_of(model):
    return model.structure.all_atoms().weights


def test_densities_lie_over_the_atoms_of_the_same_conformations(model, latents, tmp_path):
    files = save_densities(tmp_path / "a.mrc", model, latents, resolution=9.0)
    assert [file.name for file in files] == ["a-001.mrc", "a-002.mrc", "a-003.mrc"]
    frames = prody.parsePDB(str(save_conformations(tmp_path / "a.pdb", model, latents)))
    weights = weights_of(model)
    grids = set()
    for file, atoms in zip(files, frames.getCoordsets(), strict=True):
        volume, voxel, corner = read(file)
        grids.add((volume.shape, voxel, tuple(corner)))
        z, y, x = (corner[2 - axis] + voxel * np.arange(n) for axis, n in enumerate(volume.shape))
        total = volume.sum()
        assert total * voxel**3 == pytest.approx(weights.sum(), rel=2e-3)
        center = [
            (volume.sum((0, 1)) * x).sum() / total,
            (volume.sum((0, 2)) * y).sum() / total,
            (volume.sum((1, 2)) * z).sum() / total,
        ]
        np.testing.assert_allclose(center, weights @ atoms / weights.sum(), atol=0.02)
        nearest = np.rint((atoms - corner) / voxel).astype(int)
        at_atoms = volume[nearest[:, 2], nearest[:, 1], nearest[:, 0]]
        # Nothing is at the border, and every atom is in density far above the mean.
        assert np.median(at_atoms) > 8 * volume.mean()
        assert at_atoms.min() > 0.05 * np.median(at_atoms)
        border = volume.copy()
        border[1:-1, 1:-1, 1:-1] = 0
        assert border.max() < 1e-3 * volume.max()
    assert len(grids) == 1


@pytest.mark.parametrize("resolution", [5.0, 8.0, 15.0])
def test_an_atom_is_as_wide_as_the_resolution_says(resolution):
    voxel = resolution / densities._VOXELS
    shape = (48, 48, 48)
    width = resolution / (math.pi * math.sqrt(2))
    center = np.array([[24.3, 23.6, 24.1]]) * voxel
    volume = densities._draw_atoms(center, np.array([7.0]), width, voxel, shape)
    spectrum = np.abs(np.fft.rfftn(volume)) * voxel**3
    k = np.fft.rfftfreq(48, voxel)
    assert spectrum[0, 0, 0] == pytest.approx(7.0, rel=1e-3)
    # 1/e at k = 1/d.
    at = np.interp(1 / resolution, k, spectrum[0, 0])
    assert at == pytest.approx(7.0 / math.e, rel=0.02)
    peak, half = volume.max(), volume[24, 24] > volume.max() / 2
    assert peak == pytest.approx(7.0 / (width * math.sqrt(2 * math.pi)) ** 3, rel=0.25)
    assert abs(half.sum() * voxel - 2.355 * width) < 1.1 * voxel


def test_drawn_as_the_exact_sum_in_fourier_space():
    rng = np.random.default_rng(0)
    coords, weights = rng.uniform(-12, 12, (50, 3)), rng.uniform(0.5, 2, 50)
    box, voxel, width = 32, 2.0, 2.4
    volume = densities._draw_atoms(coords + 16 * voxel, weights, width, voxel, (box, box, box))
    widths = torch.full((50,), width)
    exact = draw_volume(*map(torch.from_numpy, (coords, np.float32(weights))), widths, box, voxel)
    # The highest shell has frequencies that the grid does not tell from their negatives.
    assert (compute_fsc(volume, exact)[:-1] > 0.995).all()
    assert np.abs(volume - exact).max() < 0.02 * exact.max()


def test_finer_detail_is_in_the_density_of_a_finer_resolution(model, tmp_path):
    zero = torch.zeros(1, model.n_latents)
    contrast = []
    for resolution in (6.0, 9.0, 18.0):
        (file,) = save_densities(tmp_path / f"{resolution:g}.mrc", model, zero, resolution)
        volume, voxel, _ = read(file)
        assert voxel == pytest.approx(resolution / 3)
        contrast.append(volume.max())
    assert contrast[0] > 1.3 * contrast[1] > 1.3 * contrast[2]


def test_by_default_two_pixels_and_no_less_than_5_angstrom(closed, tmp_path):
    for pixel_size, expected in ((5.0, 10.0), (1.5, 5.0)):
        wide = Model(closed, modes=None, box_size=128, pixel_size=pixel_size)
        (file,) = save_densities(tmp_path / f"{pixel_size}.mrc", wide, torch.zeros(1, 12))
        assert read(file)[1] == pytest.approx(expected / 3)


def test_names_sort_in_the_order_of_the_series(tmp_path):
    names = [file.name for file in densities._series(tmp_path / "a.b.mrc", 1200)]
    assert names == sorted(names) and names[0] == "a.b-0001.mrc"


def test_a_longer_series_of_the_same_name_is_not_mixed_in(model, latents, tmp_path):
    save_densities(tmp_path / "a.mrc", model, latents, 20.0)
    save_densities(tmp_path / "a.mrc", model, latents.flip(0), 20.0)
    (tmp_path / "a-mask.mrc").write_bytes(b"not of the series")
    with pytest.raises(ValueError, match=r"other files of the series a-\*.mrc, got a-003.mrc.*try"):
        save_densities(tmp_path / "a.mrc", model, latents[:2], 20.0)
    assert len(list(tmp_path.iterdir())) == 4


def test_all_or_none_are_written(model, latents, tmp_path, monkeypatch):
    draw = densities._draw_atoms
    calls = []

    def fail_at_the_third(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(densities, "_draw_atoms", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        save_densities(tmp_path / "a.mrc", model, latents, 20.0)
    assert len(calls) == 3 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "resolution, message",
    [
        (0.0, "resolution to be a number of Å above 0, got 0.0"),
        (math.nan, "resolution to be a number of Å above 0, got nan"),
        (0.1, r"at most 512 voxels, got \d+ at 0.1 Å; try resolution=1"),
    ],
)
def test_resolutions_that_cannot_be(model, latents, tmp_path, resolution, message):
    with pytest.raises(ValueError, match=message):
        save_densities(tmp_path / "a.mrc", model, latents, resolution)
    with pytest.raises(ValueError, match="a path that ends in .mrc, got a.pdb; try a.mrc"):
        save_densities(tmp_path / "a.pdb", model, latents)
    assert not list(tmp_path.iterdir())
