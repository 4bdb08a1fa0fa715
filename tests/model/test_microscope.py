"""The microscope: conventions of rotation, shift and origin; CTF, blur and sizes."""

import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import roma
import torch
from torch import nn
from torch.autograd import gradcheck

from cryochains.images import (
    CTF,
    filter_images,
    gaussian_transfer,
    noise_std_for_snr,
    random_rotations,
)
from cryochains.model import Microscope
from cryochains.model.microscope import require_fit_in_box

BOX, PIXEL = 32, 2.0
EYE = torch.eye(3).unsqueeze(0)


def cloud(n=40, batch=1, width=8.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    coords = width * torch.randn(batch, n, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return coords.to(dtype), weights.to(dtype)


def microscope(n=1, origin=(0.0, 0.0, 0.0), weights=None, **settings):
    settings = {"box_size": BOX, "pixel_size": PIXEL, "sigma": 3.0} | settings
    return Microscope(
        np.ones(n) if weights is None else weights, origin=np.asarray(origin), **settings
    )


def brightest(image):
    """(row, column) of the brightest pixel."""
    return divmod(int(image.argmax()), image.shape[-1])


def make_ctf(n: int, seed: int = 0) -> CTF:
    """Astigmatic; phase shifts, voltages and amplitudes differ; the last has U < V."""
    rng = np.random.default_rng(seed)
    u = rng.uniform(8e3, 25e3, n)
    v = u - rng.uniform(0, 2e3, n)
    u[-1], v[-1] = v[-1], u[-1]
    values = {
        "defocus_u": u,
        "defocus_v": v,
        "defocus_angle": rng.uniform(-np.pi, np.pi, n),
        "phase_shift": rng.uniform(0, 2.0, n) * (np.arange(n) % 2),
        "voltage_kv": rng.choice([200.0, 300.0], n),
        "spherical_aberration_mm": rng.choice([0.01, 2.7], n),
        "amplitude_contrast": rng.choice([0.07, 0.1], n),
    }
    return CTF(**{name: torch.from_numpy(value) for name, value in values.items()})


def test_gradients_of_the_whole_microscope():
    coords, weights = cloud(n=5, batch=2, width=3.0, dtype=torch.float64)
    optics = microscope(weights=weights, box_size=12)
    rotations = random_rotations(2, 0).double()
    shifts = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    ctf = make_ctf(2).evaluate(12, PIXEL).double()

    def image(coords, shifts):
        return optics.render(coords, rotations, shifts, ctf, blur=1.5)

    assert gradcheck(image, (coords.requires_grad_(), shifts.requires_grad_()))


def test_bf16_under_autocast_is_close_to_float32():
    # Wide as a molecule: positions themselves must not be rounded to bf16.
    coords, weights = cloud(n=400, batch=4, width=15.0)
    optics = microscope(weights=weights, box_size=64)
    rotations = random_rotations(4, 0)
    coords.requires_grad_()
    exact = optics.render(coords, rotations)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = optics.render(coords, rotations)
    assert half.dtype == torch.bfloat16
    half = half.float()
    (gradient,) = torch.autograd.grad(half.square().sum(), coords)
    assert (half - exact).norm() / exact.norm() < 0.01
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.02


@pytest.mark.parametrize("far", [[500.0, 0.0, 0.0], [0.0, -1e4, 0.0], [1e6, 1e6, 1e6]])
def test_atoms_far_outside_leave_no_trace(far):
    coords = torch.tensor([[far]], requires_grad=True)
    optics = microscope(1)
    image = optics.render(coords, EYE)
    peak = float(optics.render(torch.zeros(1, 1, 3), EYE).detach().max())
    assert image.detach().abs().max() < 1e-10 * peak
    (gradient,) = torch.autograd.grad(image.sum(), coords)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-4 * peak


# Conventions


def test_origin_sits_at_pixel_half_the_box():
    origin = np.array([100.0, -50.0, 7.0])
    optics = microscope(1, origin)
    for rotation in random_rotations(3, 0):
        image = optics.render(torch.from_numpy(origin).float().expand(1, 1, 3), rotation[None])[0]
        assert brightest(image) == (BOX // 2, BOX // 2)
        # Symmetric about that pixel, so the origin is in its middle and not at its edge.
        torch.testing.assert_close(image[1:, 1:], image[1:, 1:].flip(0, 1), rtol=0, atol=1e-7)


def test_axes_of_the_image():
    steps = torch.tensor([[4.0, 0, 0], [0, 6.0, 0], [0, 0, 8.0]]) * PIXEL
    images = microscope(1).render(steps.unsqueeze(1), EYE.expand(3, 3, 3))
    half = BOX // 2
    assert brightest(images[0]) == (half, half + 4), "x is the column"
    assert brightest(images[1]) == (half + 6, half), "y is the row"
    assert brightest(images[2]) == (half, half), "z is the line of sight"


def test_rotation_acts_on_column_vectors_and_is_not_its_transpose():
    about_z = roma.rotvec_to_rotmat(torch.tensor([[0.0, 0.0, math.pi / 2]]))
    half = BOX // 2
    # A tripod without symmetry: every atom has a length and a brightness of its own.
    atoms = torch.tensor([[[8.0, 0, 0], [0, 5.0, 0], [-3.0, 0, 0]]]) * PIXEL
    image = microscope(weights=[3.0, 2.0, 1.0], sigma=1.5).render(atoms, about_z)[0]
    assert brightest(image) == (half + 8, half), "+x of the reference turns to +y: a higher row"
    peak = image.max()
    assert float(image[half, half - 5] / peak) == pytest.approx(2 / 3, abs=0.01), "+y turns to −x"
    assert float(image[half - 3, half] / peak) == pytest.approx(1 / 3, abs=0.01), "−x turns to −y"
    for row, column in ((half - 8, half), (half, half + 5), (half + 3, half)):
        assert image[row, column] < 1e-3 * peak, "where Rᵀ would have put the atoms"

    about_x = roma.rotvec_to_rotmat(torch.tensor([[math.pi / 2, 0.0, 0.0]]))
    along_z = microscope(1).render(torch.tensor([[[0.0, 0.0, 6 * PIXEL]]]), about_x)[0]
    assert brightest(along_z) == (half - 6, half), "+z turns to −y about +x"


def test_image_of_a_rotated_pose_is_that_of_rotated_coordinates():
    coords, weights = cloud(batch=4, dtype=torch.float64)
    optics = microscope(weights=weights, origin=[1.0, 2.0, 3.0])
    rotations = random_rotations(4, 1).double()
    origin = optics.origin_tensor.double()
    turned = (coords - origin) @ rotations.transpose(1, 2) + origin
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    torch.testing.assert_close(
        optics.render(coords, rotations), optics.render(turned, eye), rtol=0, atol=1e-8
    )


def test_shifts_are_displacements_of_the_molecule_in_angstrom():
    image = microscope(1).render(
        torch.zeros(1, 1, 3), EYE, torch.tensor([[5 * PIXEL, -3 * PIXEL]])
    )[0]
    assert brightest(image) == (BOX // 2 - 3, BOX // 2 + 5)


def test_shift_and_ctf_commute():
    coords, weights = cloud(batch=2)
    optics = microscope(weights=weights, box_size=64)
    rotations, ctf = random_rotations(2, 0), make_ctf(2).evaluate(64, PIXEL)
    still = optics.render(coords, rotations, None, ctf)
    shifted = optics.render(
        coords, rotations, torch.tensor([[3 * PIXEL, -2 * PIXEL]]).expand(2, 2), ctf
    )
    torch.testing.assert_close(shifted, still.roll((-2, 3), (1, 2)), rtol=0, atol=1e-6)


def test_unit_transfer_changes_nothing():
    coords, weights = cloud(batch=2)
    optics = microscope(weights=weights)
    plain = optics.render(coords, EYE.expand(2, 3, 3))
    torch.testing.assert_close(filter_images(plain, torch.ones(2, BOX, BOX // 2 + 1)), plain)
    torch.testing.assert_close(optics.render(coords, EYE.expand(2, 3, 3), torch.zeros(2, 2)), plain)


@pytest.mark.parametrize("blur", [2.0, 8.0])
def test_blur_is_a_gaussian_filter(blur):
    coords, weights = cloud(batch=2, width=6.0)
    optics = microscope(weights=weights, box_size=64)
    rotations = random_rotations(2, 0)
    blurred = optics.render(coords, rotations, blur=blur)
    filtered = filter_images(optics.render(coords, rotations), gaussian_transfer(64, PIXEL, blur))
    assert (blurred - filtered).abs().max() / blurred.max() < 1e-4
    assert blurred.max() < optics.render(coords, rotations).max()


def test_default_sigma_follows_the_pixels():
    assert microscope(1, sigma=None, pixel_size=1.0).sigma == 2.0
    assert microscope(1, sigma=None, pixel_size=5.0).sigma == 4.0
    assert "32 px × 2 Å" in repr(microscope(7)) and "7 Gaussians" in repr(microscope(7))


def test_microscope_is_frozen_and_has_nothing_to_learn():
    optics = microscope(3)
    assert not isinstance(optics, nn.Module)
    assert not optics.weight_tensor.requires_grad and not optics.origin_tensor.requires_grad
    with pytest.raises(FrozenInstanceError):
        optics.sigma = 1.0


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"box_size": 33}, "expected an even box size, got 33; try 34"),
        ({"box_size": 0}, "expected an even box size, got 0"),
        ({"pixel_size": 0.0}, "expected a positive pixel size in Å, got 0"),
        ({"pixel_size": -1.0}, "expected a positive pixel size"),
        ({"pixel_size": math.nan}, "expected a positive pixel size"),
        ({"sigma": 0.0}, "expected a positive sigma in Å, got 0"),
        ({"sigma": math.nan}, "expected a positive sigma"),
    ],
)
def test_bad_sizes(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        microscope(1, **settings)


def test_molecule_larger_than_the_box():
    coords = np.array([[0.0, 0.0, 31.0], [5.0, 0.0, 0.0]])
    require_fit_in_box(coords, np.zeros(3), 32, 2.0)
    require_fit_in_box(coords[None], np.zeros(3), 32, 2.0)
    for origin, box in (([0.0, 0.0, -2.0], 32), (np.zeros(3), 30)):
        with pytest.raises(
            ValueError, match=r"expected a molecule that fits the box.*try a box of (\d+) px"
        ) as error:
            require_fit_in_box(coords, origin, box, 2.0)
        suggested = int(str(error.value).split("try a box of ")[1].split()[0])
        require_fit_in_box(coords, origin, suggested, 2.0)


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 10.0])
def test_snr_obtained(snr_db):
    coords, weights = cloud(n=100, batch=200)
    images = microscope(weights=weights).render(coords, random_rotations(200, 0))
    noise_std = noise_std_for_snr(images, snr_db)
    noise = noise_std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ratio = images.var(dim=(1, 2)).mean() / noise.var()
    assert 10 * math.log10(float(ratio)) == pytest.approx(snr_db, abs=0.1)
