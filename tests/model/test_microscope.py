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


@pytest.mark.parametrize("sigma", [3.0, np.linspace(1.0, 2.0, 5)])
def test_gradients_of_the_whole_microscope(sigma):
    coords, weights = cloud(n=5, batch=2, width=3.0, dtype=torch.float64)
    optics = microscope(weights=weights, box_size=12, sigma=sigma)
    rotations = random_rotations(2, 0).double()
    shifts = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    ctf = make_ctf(2).evaluate(12, PIXEL).double()

    def image(coords, shifts):
        return optics.render(coords, rotations, shifts, ctf, blur=0.5 * optics.width)

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
@pytest.mark.parametrize("sigma, tolerance", [(3.0, 1e-4), (0.9, 5e-3)])
def test_blur_is_a_gaussian_filter(blur, sigma, tolerance):
    """Of narrow ones as far as pixels represent them before they are blurred."""
    coords, weights = cloud(batch=2, width=6.0)
    optics = microscope(weights=weights, box_size=64, sigma=sigma)
    rotations = random_rotations(2, 0)
    blurred = optics.render(coords, rotations, blur=blur)
    filtered = filter_images(optics.render(coords, rotations), gaussian_transfer(64, PIXEL, blur))
    assert (blurred - filtered).abs().max() / blurred.max() < tolerance
    assert blurred.max() < optics.render(coords, rotations).max()


# Widths


def test_every_gaussian_has_a_width():
    one, own = microscope(2, sigma=1.5), microscope(2, sigma=np.array([3.0, 4.0]))
    assert one.sigma.tolist() == [1.5, 1.5] and own.sigma.tolist() == [3.0, 4.0]
    assert (one.width, one.mean_width, own.width) == (1.5, 1.5, 3.0)
    assert own.mean_width == pytest.approx(math.sqrt(12.5))
    assert "32 px × 2 Å" in repr(microscope(7)) and "7 Gaussians of 3 Å" in repr(microscope(7))
    assert "2 Gaussians of 3 to 4 Å" in repr(own)
    with pytest.raises(TypeError, match="sigma"):
        Microscope(np.ones(1), BOX, PIXEL, np.zeros(3))


@pytest.mark.parametrize("narrowest", [1.7, 0.9])
def test_image_of_several_widths_is_the_sum_over_them(narrowest):
    """Of each width the image that its Gaussians make beside others of no weight."""
    coords, weights = cloud(batch=3)
    widths = np.linspace(narrowest, 4.0, len(weights))
    rotations = random_rotations(3, 0)
    together = microscope(weights=weights, sigma=widths).render(coords, rotations)
    alone = 0
    for row in range(len(weights)):
        only = torch.zeros_like(weights)
        only[row] = weights[row]
        alone = alone + microscope(weights=only, sigma=widths).render(coords, rotations)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5 * float(together.max()))


def transform(image, pixel_size):
    """(box, box) Fourier transform in units of the total, of an image about its central pixel."""
    shifted = np.fft.ifftshift(image.numpy(), axes=(-2, -1))
    return np.fft.fft2(shifted) * pixel_size**2


def frequencies(box, pixel_size):
    """(box, box) each, 1/Å."""
    axis = np.fft.fftfreq(box, pixel_size)
    return axis[None, :], axis[:, None]


@pytest.mark.parametrize("width", [0.5, 1.1, 2.0, 2.4, 3.5])
@pytest.mark.parametrize("place", [(0.0, 0.0), (1.5, 0.0), (-4.3, 7.1)])
def test_transform_of_a_gaussian(width, place):
    """exp(−2π² σ² |k|²), also where pixels are too large for it and it is drawn wider."""
    pixel_size, place = 3.0, np.array([*place, 0.0])
    optics = microscope(1, sigma=width, pixel_size=pixel_size)
    image = optics.render(torch.from_numpy(place)[None, None], EYE.double())[0]
    kx, ky = frequencies(BOX, pixel_size)
    squared = kx**2 + ky**2
    phase = np.exp(-2j * np.pi * (kx * place[0] + ky * place[1]))
    expected = np.exp(-2 * np.pi**2 * width**2 * squared) * phase
    error = np.abs(transform(image, pixel_size) - expected) / np.abs(expected)
    in_nyquist = np.sqrt(squared) * 2 * pixel_size
    assert error[in_nyquist <= 0.7].max() < 0.03
    assert error[in_nyquist <= 0.4].max() < 0.002
    assert image.sum().item() * pixel_size**2 == pytest.approx(1.0, abs=2e-5)


def test_sharpening_is_bounded_by_the_nyquist_frequency():
    """In the corners, beyond it, nothing is raised further; wide Gaussians stay as they are."""
    optics = microscope(1, sigma=0.9, pixel_size=3.0)
    images = optics.render(torch.zeros(1, 1, 3).double(), EYE.double())
    wide = microscope(1, sigma=2.4, pixel_size=3.0).render(torch.zeros(1, 1, 3).double(), EYE)
    ratio = transform(images[0], 3.0).real / transform(wide[0], 3.0).real
    kx, ky = frequencies(BOX, 3.0)
    squared = np.minimum(kx**2 + ky**2, 0.25 / 9)
    np.testing.assert_allclose(ratio, np.exp(2 * np.pi**2 * (2.4**2 - 0.9**2) * squared), rtol=1e-4)
    assert ratio.max() < 16


def test_a_ctf_and_sharpening_are_both_applied():
    coords, weights = cloud(batch=2)
    optics = microscope(weights=weights, sigma=0.9)
    rotations, ctf = random_rotations(2, 0), make_ctf(2).evaluate(BOX, PIXEL)
    together = optics.render(coords, rotations, None, ctf)
    after = filter_images(optics.render(coords, rotations), ctf)
    # At the Nyquist frequency an image keeps no phase.
    difference = torch.fft.rfft2(together - after)[:, :, : BOX // 2]
    assert difference.abs().max() < 1e-4 * torch.fft.rfft2(after).abs().max()


# Fourier space: what the likelihood draws


WIDTHS = {"as wide as drawn": 3.0, "narrow": 0.9, "mixed": np.linspace(0.9, 4.0, 40)}


@pytest.mark.parametrize("sigma", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("blur", [0.0, 2.5])
def test_spectrum_is_the_transform_of_the_image(sigma, blur):
    coords, weights = cloud(batch=2, dtype=torch.float64)
    optics = microscope(weights=weights, sigma=sigma)
    rotations = random_rotations(2, 0).double()
    positions = optics.image_positions(coords, rotations)
    ctf = gaussian_transfer(BOX, PIXEL, 1.0).double()
    for transfer in (None, ctf):
        image = optics.render(coords, rotations, None, transfer, blur)
        spectrum = optics.spectrum(positions, transfer, blur=blur)
        expected = torch.fft.rfft2(image, norm="ortho")
        torch.testing.assert_close(spectrum, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("sigma", WIDTHS.values(), ids=WIDTHS)
def test_variance_widens_each(sigma):
    """As Gaussians that are as wide to begin with; sharpened by what the narrowest of all needs."""
    coords, weights = cloud(batch=2, dtype=torch.float64)
    rotations = random_rotations(2, 0).double()
    optics = microscope(weights=weights, sigma=sigma)
    positions = optics.image_positions(coords, rotations)
    variance = torch.linspace(2.0, 9.0, 80, dtype=torch.float64).view(2, 40)
    got = optics.spectrum(positions, variance=variance)
    for row in range(2):
        widths = np.sqrt(optics.sigma**2 + variance[row].numpy())
        wide = microscope(weights=weights, sigma=widths)
        expected = wide.spectrum(positions[row : row + 1])[0]
        scale = expected.abs().max()
        # Pixels of 2 Å represent Gaussians of 1.6 Å to a few percent at high frequencies only.
        assert (got[row] - expected).abs().max() < 5e-3 * scale
    plain = optics.spectrum(positions)
    assert torch.equal(optics.spectrum(positions, variance=torch.zeros_like(variance)), plain)


@pytest.mark.parametrize("sigma", WIDTHS.values(), ids=WIDTHS)
def test_larger_pixels_sample_the_same_area(sigma):
    """The same density by fewer pixels: its low frequencies are the same."""
    coords, weights = cloud(batch=2, dtype=torch.float64)
    optics = microscope(weights=weights, sigma=sigma, box_size=64)
    positions = optics.image_positions(coords, random_rotations(2, 0).double())
    fine = optics.spectrum(positions, blur=5.0)
    coarse = optics.spectrum(positions, blur=5.0, box_size=32)
    # Orthonormal sums over a quarter of the pixels.
    low = torch.cat([fine[:, :12, :12], fine[:, -12:, :12]], dim=1)
    same = torch.cat([coarse[:, :12, :12], coarse[:, -12:, :12]], dim=1)
    torch.testing.assert_close(2 * same, low, rtol=0, atol=1e-4 * float(low.abs().max()))


@pytest.mark.parametrize("sigma", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("blur, box", [(0.0, BOX), (4.0, 20)])
@pytest.mark.parametrize("uncertain", [False, True])
def test_tangent_spectra_are_derivatives_of_the_spectrum(sigma, blur, box, uncertain):
    generator = torch.Generator().manual_seed(0)
    coords, weights = cloud(batch=2, dtype=torch.float64)
    optics = microscope(weights=weights, sigma=sigma)
    positions = optics.image_positions(coords, random_rotations(2, 0).double())
    atoms = slice(5, 30)
    tangents = torch.randn(2, 3, 25, 2, generator=generator, dtype=torch.float64)
    transfer = torch.rand(2, box, box // 2 + 1, generator=generator, dtype=torch.float64)
    variance = 4 * torch.rand(2, 40, generator=generator, dtype=torch.float64)
    variance = variance if uncertain else None
    settings = {"blur": blur, "box_size": box}
    of_atoms = None if variance is None else variance[:, atoms]
    got = optics.tangent_spectra(
        positions[:, atoms], tangents, atoms, transfer, variance=of_atoms, **settings
    )
    step = 1e-4
    for k in range(3):
        moved = []
        for way in (step, -step):
            there = positions.clone()
            there[:, atoms] += way * tangents[:, k]
            moved.append(optics.spectrum(there, transfer, variance=variance, **settings))
        expected = torch.view_as_real((moved[0] - moved[1]) / (2 * step)).flatten(1)
        error = (got[:, :, k] - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, float(error)


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
        ({"sigma": np.array([0.0])}, "expected a positive sigma"),
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
