"""Maps from images alone: against a density known beforehand, and where nothing is to be seen."""

from dataclasses import replace

import mrcfile
import numpy as np
import pytest
import torch

from cryochains import simulate_particles
from cryochains.images import (
    Map,
    ParticleStack,
    compute_fsc,
    draw_volume,
    random_rotations,
    reconstruct,
    resolution_of,
    scale_shells,
    soft_sphere,
    sum_shells,
    transform_volume,
    untransform_volume,
)
from cryochains.model import beads_of

QUIET = {"progress": False}


def true_volume(structure, box_size, pixel_size):
    beads = beads_of(structure)
    parts = (beads.coords - structure.origin, beads.weights, beads.widths)
    coords, weights, widths = (torch.from_numpy(part).float() for part in parts)
    return draw_volume(coords, weights, widths, box_size, pixel_size)


@pytest.fixture(scope="module")
def clear(closed):
    """Particles of one conformation with little noise, shifted, with CTFs."""
    return simulate_particles(
        closed,
        600,
        conformations=closed.coords[None],
        box_size=32,
        pixel_size=4.5,
        snr_db=20,
        shift_std=6.0,
        **QUIET,
    )


@pytest.fixture(scope="module")
def volume(clear, closed) -> Map:
    return reconstruct(clear, origin=closed.origin, **QUIET)


def test_a_gaussian_is_drawn_as_its_formula_says():
    center = torch.tensor([[3.0, -2.0, 5.0]])
    drawn = draw_volume(center, torch.tensor([2.0]), torch.tensor([4.0]), 24, 2.0)
    x = (np.arange(24) - 12) * 2.0
    z, y, x = np.meshgrid(x, x, x, indexing="ij")
    squares = (x - 3) ** 2 + (y + 2) ** 2 + (z - 5) ** 2
    expected = 2 * np.exp(-squares / 32) / (2 * np.pi * 16) ** 1.5
    np.testing.assert_allclose(drawn, expected, atol=1e-3 * expected.max())


def test_drawing_adds_up_and_takes_chunks():
    rng = np.random.default_rng(0)
    coords = torch.from_numpy(rng.normal(0, 8, (150, 3))).float()
    weights, widths = torch.from_numpy(rng.uniform(1, 2, (2, 150))).float()
    whole = draw_volume(coords, weights, widths, 16, 4.0)
    parts = [
        draw_volume(coords[rows], weights[rows], widths[rows], 16, 4.0)
        for rows in (slice(0, 70), slice(70, None))
    ]
    np.testing.assert_allclose(whole, sum(parts), atol=1e-6)
    assert whole.sum() * 4.0**3 == pytest.approx(float(weights.sum()), rel=1e-4)


def test_the_map_is_the_density(volume, clear, closed):
    """Also an asymmetric check of R against Rᵀ, of the axes' order and of the shifts' sign."""
    true = true_volume(closed, 32, clear.pixel_size)
    mask = soft_sphere(32)
    fsc = compute_fsc(volume.volume * mask, true * mask)
    assert (fsc[1:15] > 0.98).all()
    assert volume.resolution < 1.1 * 2 * clear.pixel_size
    # As bright as the density: the scale is no free number.
    own, expected = transform_volume(volume.volume), transform_volume(true)
    gain = sum_shells((own * expected.conj()).real) / sum_shells(expected.abs().square())
    np.testing.assert_allclose(gain[1:12], 1, atol=0.05)
    assert volume.gain.shape == own.shape and volume.gain.max() <= 1
    mean = sum_shells(torch.from_numpy(volume.gain)) / sum_shells(torch.ones(own.shape))
    np.testing.assert_allclose(mean[1:12], 1, atol=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda p: replace(p, rotations=p.rotations.mT),
        lambda p: replace(p, shifts=-p.shifts),
        lambda p: replace(p, shifts=p.shifts.flip(1)),
        lambda p: replace(p, ctf=None),
    ],
    ids=["inverse rotations", "negative shifts", "swapped shifts", "no CTF"],
)
def test_what_is_read_wrongly_is_seen(wrong, volume, clear, closed):
    true = true_volume(closed, 32, clear.pixel_size) * soft_sphere(32)
    spoiled = reconstruct(wrong(clear), **QUIET)
    good = compute_fsc(volume.volume, true)[1:12].mean()
    assert compute_fsc(spoiled.volume, true)[1:12].mean() < good - 0.05


def test_without_ctf_and_without_noise(closed):
    particles = simulate_particles(
        closed,
        400,
        conformations=closed.coords[None],
        box_size=32,
        snr_db=np.inf,
        ctf=False,
        **QUIET,
    )
    volume = reconstruct(particles, half_maps=False, **QUIET)
    assert volume.fsc is None and volume.half1 is None and volume.resolution is None
    assert volume.n_resolved == 17
    fsc = compute_fsc(volume.volume, true_volume(closed, 32, particles.pixel_size))
    assert (fsc[1:15] > 0.99).all()


def test_halves_average_to_the_map(volume):
    mean = (volume.half1 + volume.half2) / 2
    assert compute_fsc(mean, volume.volume)[1:14].min() > 0.999


def test_noise_alone_resolves_nothing():
    rotations = random_rotations(300, 0)
    noise = torch.randn(300, 32, 32, generator=torch.Generator().manual_seed(0))
    volume = reconstruct(ParticleStack(noise, rotations, pixel_size=3.0), **QUIET)
    assert np.abs(volume.fsc[4:]).max() < 0.143
    assert volume.resolution > 20


def test_an_image_that_is_listed_twice_is_no_second_image(closed):
    particles = simulate_particles(
        closed, 60, conformations=closed.coords[None], box_size=32, snr_db=-15, progress=False
    )
    twice = particles[np.repeat(np.arange(60), 2)]
    once = reconstruct(particles, progress=False)
    assert reconstruct(twice, progress=False).resolution == pytest.approx(once.resolution, rel=0.02)


def test_more_particles_resolve_more(closed):
    particles = simulate_particles(
        closed, 400, conformations=closed.coords[None], box_size=48, snr_db=-10, **QUIET
    )
    few, many = (reconstruct(particles[:n], **QUIET) for n in (50, 400))
    assert many.resolution < few.resolution
    assert "400 particles" in repr(many)


def test_weights_and_scale(clear):
    """Twice as bright an image of which that is known is the same image with less noise."""
    first = reconstruct(clear[:200], **QUIET)
    images = clear[:200].read_images()
    brighter = replace(clear[:200], images=2 * images)
    known = reconstruct(brighter, scale=np.full(200, 2.0), **QUIET)
    np.testing.assert_allclose(known.volume, first.volume, atol=1e-3 * first.volume.max())
    # Junk that weighs nothing is not read.
    images[100:] = torch.nan
    weights = np.r_[np.full(100, 7.0), np.zeros(100)]
    without = reconstruct(replace(clear[:200], images=images), weights=weights, **QUIET)
    alone = reconstruct(clear[:100], **QUIET)
    assert without.n_particles == 100
    np.testing.assert_allclose(without.volume, alone.volume, atol=1e-5 * alone.volume.max())


def test_batches_do_not_matter(clear):
    first, second = (reconstruct(clear[:90], batch_size=size, **QUIET) for size in (90, 7))
    np.testing.assert_allclose(first.volume, second.volume, atol=1e-5 * first.volume.max())


def test_a_file_lies_over_the_structure(volume, tmp_path, closed):
    path = volume.save(tmp_path / "a.mrc")
    with mrcfile.open(path) as mrc:
        assert mrc.is_volume() and mrc.voxel_size.x == pytest.approx(volume.pixel_size)
        origin = np.array([mrc.header.origin.x, mrc.header.origin.y, mrc.header.origin.z])
        data = mrc.data.copy()
    np.testing.assert_array_equal(data, volume.volume)
    # The centre of the density, in the file's own coordinates, is that of the atoms.
    dense = np.argwhere(data > 0.2 * data.max())[:, ::-1]
    weights = data[tuple(dense[:, ::-1].T)]
    center = origin + volume.pixel_size * (weights[:, None] * dense).sum(0) / weights.sum()
    np.testing.assert_allclose(center, closed.coords.mean(0), atol=1.5)


def test_a_file_of_another_kind_is_refused(volume, tmp_path):
    with pytest.raises(ValueError, match="expected a path that ends in .mrc, got a.pdb"):
        volume.save(tmp_path / "a.pdb")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": np.ones(3)}, "expected weights"),
        ({"weights": -np.ones(600)}, "expected weights"),
        ({"scale": np.full(600, np.nan)}, "expected scale"),
        ({"weights": np.zeros(600)}, "expected two particles or more"),
        ({"mask": np.ones((3, 3, 3))}, "expected a mask"),
    ],
)
def test_what_does_not_fit_is_refused(clear, settings, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(clear, **settings, **QUIET)


def test_transforms_and_shells():
    volume = np.random.default_rng(0).standard_normal((12, 12, 12)).astype(np.float32)
    spectrum = transform_volume(volume)
    np.testing.assert_allclose(untransform_volume(spectrum), volume, atol=1e-5)
    np.testing.assert_allclose(
        sum_shells(torch.ones(spectrum.shape))[:3], [1, 18, 62], err_msg="points of each shell"
    )
    only = scale_shells(spectrum, np.eye(7)[3])
    powers = sum_shells(only.abs().square())
    assert powers[3] > 0 and not np.delete(powers, 3).any()


def test_the_resolution_of_a_curve():
    assert resolution_of(np.ones(9), 32.0) == 4.0
    assert resolution_of(np.array([1.0, 0.9, 0.143, 0.0]), 30.0) == pytest.approx(15.0)
    # The mean counts nowhere, and later shells that correlate by chance do not either.
    assert resolution_of(np.array([-1.0, 1.0, 0.0, 0.9]), 30.0) == pytest.approx(30 / 1.857)
    assert resolution_of(np.zeros(5), 30.0) == pytest.approx(30 / 0.857)
