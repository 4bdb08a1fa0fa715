"""Where images show the reference: offsets and turns that are known, and images that show nothing.

One chain of the dimer: the two together look nearly the same when turned by half a turn.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.inference.docking import (
    affordable_images,
    compare_with,
    dock,
    even_rotations,
    measure_scale,
    normalised_images,
)
from cryochains.model import Model, simulate_particles
from cryochains.molecule import load_structure

N = 64


@pytest.fixture(scope="module")
def chain():
    return load_structure("glua3-closed", chains="A")


@pytest.fixture(scope="module")
def particles(chain):
    return simulate_particles(
        chain,
        N,
        conformations=chain.coords[None],
        box_size=48,
        snr_db=3.0,
        shift_std=3.0,
        seed=5,
        progress=False,
    )


@pytest.fixture(scope="module")
def comparison(chain, particles):
    return compare_with(Model(chain, particles, modes=None), particles, np.arange(N))


@pytest.fixture(scope="module")
def noise(particles):
    images = torch.randn(N, 48, 48, generator=torch.Generator().manual_seed(1))
    return replace(particles, images=images)


def docked(structure, particles):
    return dock(compare_with(Model(structure, particles, modes=None), particles, np.arange(N)))


def significance(log_likelihood):
    return float(log_likelihood.mean() / log_likelihood.std() * len(log_likelihood) ** 0.5)


# Where the reference is


def test_what_is_where_it_should_be_stays_there(chain, comparison):
    docking = dock(comparison)
    assert docking.offset < 1.0 and docking.angle < np.radians(3)
    np.testing.assert_allclose(docking.origin, chain.origin, atol=1.0)
    assert significance(docking.log_likelihood) > 6
    assert docking.log_likelihood.mean() > docking.mirrored_log_likelihood.mean()


def test_a_known_offset_is_found(chain, particles):
    moved = chain.with_origin(chain.origin + np.array([9.0, -6.0, 12.0]))
    docking = docked(moved, particles)
    np.testing.assert_allclose(docking.origin, chain.origin, atol=1.0)
    assert docking.offset == pytest.approx(np.sqrt(9**2 + 6**2 + 12**2), abs=1.0)
    assert docking.angle < np.radians(3)


def test_a_known_turn_and_offset_are_found(chain, particles):
    turn = Rotation.from_rotvec([1.2, -0.5, 0.8]).as_matrix()
    offset = np.array([-5.0, 8.0, 4.0])
    coords = (chain.atoms.getCoords() - chain.origin) @ turn.T + chain.origin + offset
    turned = chain.with_coords(coords).with_origin(chain.origin)
    docking = docked(turned, particles)
    assert Rotation.from_matrix(docking.rotation @ turn).magnitude() < np.radians(4)
    # What was turned and moved is back: x → R (T x + o) + s.
    np.testing.assert_allclose(docking.rotation @ offset + docking.shift, 0.0, atol=1.5)
    assert significance(docking.log_likelihood) > 6


def test_the_other_hand_fits_its_mirror_image_better(chain, particles):
    mirror = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    docking = docked(chain, replace(particles, rotations=mirror @ particles.rotations @ mirror))
    assert docking.mirrored_log_likelihood.mean() > docking.log_likelihood.mean()


# Images that show nothing of it


def test_noise_is_not_claimed(chain, noise):
    docking = docked(chain, noise)
    assert significance(docking.log_likelihood) < 3
    assert significance(docking.mirrored_log_likelihood) < 3


def test_random_poses_are_not_claimed(chain, particles):
    """The molecule is in the images, and no position of it explains them at these poses."""
    order = np.random.default_rng(0).permutation(N)
    docking = docked(chain, replace(particles, rotations=particles.rotations[order]))
    # Something round fits a little; the molecule where it is fits far better.
    aligned = docked(chain, particles)
    assert docking.log_likelihood.mean() < 0.3 * aligned.log_likelihood.mean()


def test_the_scale_of_noise_is_unknown_or_uncertain(chain, noise):
    model = Model(chain, noise, modes=4)
    scale = measure_scale(model, compare_with(model, noise, np.arange(N)))
    assert np.isnan(scale.error) or scale.error > 0.005 or abs(scale.value - 1) < 3 * scale.error


# What is compared


def test_brightness_is_the_images_and_never_negative(comparison):
    drawn = comparison.draw(comparison.views.rotations) * comparison.views.transfer
    drawn = drawn * comparison.phases(comparison.views.shifts)
    overlap = comparison.sum_rings(comparison.views.spectra, drawn)
    power = comparison.sum_rings(drawn, drawn)
    assert (comparison.brightness(overlap, power) >= 0).all()
    assert comparison.brightness(-overlap, power).max() == 0
    # Of images with little noise, the factor that they were multiplied by.
    certain = comparison.brightness(2.5e4 * power, 1e4 * power)[1:10]
    torch.testing.assert_close(certain, torch.full_like(certain, 2.5), atol=1e-2, rtol=0)
    assert significance(comparison.log_likelihood(overlap, power)) > 6


def test_images_count_the_same_however_bright_they_are(particles):
    factors = torch.linspace(0.1, 10.0, N)[:, None, None]
    brighter = replace(particles, images=particles.read_images() * factors)
    device = torch.device("cpu")
    images = [normalised_images(stack, np.arange(N), device) for stack in (particles, brighter)]
    torch.testing.assert_close(*images, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(images[0].var(dim=(1, 2)), torch.ones(N), atol=1e-2, rtol=0)


def test_more_images_are_affordable_of_less_work(comparison, chain, particles):
    model = Model(chain, particles, modes=None)
    assert affordable_images(model) >= affordable_images(model, 0.5) >= 1


def test_orientations_are_rotations_that_leave_no_gap():
    rotations = even_rotations(1152)
    assert rotations.shape == (1152, 3, 3)
    squares = rotations @ rotations.transpose(0, 2, 1)
    np.testing.assert_allclose(squares, np.broadcast_to(np.eye(3), squares.shape), atol=1e-6)
    probes = Rotation.random(200, random_state=0)
    nearest = [
        (Rotation.from_matrix(rotations).inv() * probe).magnitude().min() for probe in probes
    ]
    assert np.degrees(max(nearest)) < 30
