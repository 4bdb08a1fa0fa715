"""Coordinates to images: against brute force, conventions of rotation, shift and origin, CTF, noise."""

import math

import numpy as np
import pytest
import roma
import torch
from torch.autograd import gradcheck

import cryochains.imaging
from cryochains.imaging import (
    CTF,
    MIN_EXPONENT,
    Imaging,
    _multiply,
    check_fits_in_box,
    filter_images,
    gaussian_transfer,
    gaussians,
    noise_std_for_snr,
    pixel_grid,
    project,
    project_tangents,
    random_rotations,
)

BOX, PIXEL = 32, 2.0
EYE = torch.eye(3).unsqueeze(0)


def cloud(n=40, batch=1, width=8.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    coords = width * torch.randn(batch, n, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return coords.to(dtype), weights.to(dtype)


def microscope(n=1, origin=(0.0, 0.0, 0.0), weights=None, **settings):
    settings = {"box_size": BOX, "pixel_size": PIXEL, "sigma": 3.0} | settings
    return Imaging(np.ones(n) if weights is None else weights, origin=origin, **settings)


def brightest(image):
    """(row, column) of the brightest pixel."""
    return divmod(int(image.argmax()), image.shape[-1])


# Projection


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_projection_is_a_sum_of_3d_gaussians_integrated_along_z(dtype):
    coords, weights = cloud(dtype=torch.float64)
    sigma, step = 3.0, 1.0
    x = (np.arange(BOX) - BOX // 2) * PIXEL
    z = np.arange(-60, 60 + step, step)
    volume = np.zeros((len(z), BOX, BOX))
    for (ax, ay, az), weight in zip(coords[0].numpy(), weights.numpy(), strict=True):
        distance = (z - az)[:, None, None] ** 2 + (x - ay)[None, :, None] ** 2 + (x - ax)[None, None, :] ** 2
        volume += weight * np.exp(-distance / (2 * sigma**2)) / (2 * np.pi * sigma**2) ** 1.5
    expected = volume.sum(0) * step

    image = project(coords.to(dtype), weights.to(dtype), BOX, PIXEL, sigma)[0]
    assert image.dtype == dtype
    assert np.abs(image.numpy() - expected).max() / expected.max() < 1e-5


def test_density_is_conserved():
    coords, weights = cloud(batch=5)
    images = project(coords, weights, 64, PIXEL, 3.0)
    torch.testing.assert_close(images.sum((1, 2)) * PIXEL**2, weights.sum().expand(5), rtol=1e-5, atol=0)


def test_gradients_of_projection():
    coords, weights = cloud(n=6, batch=2, width=3.0, dtype=torch.float64)
    for columns in (3, 2):
        positions = coords[..., :columns].clone().requires_grad_()
        assert gradcheck(lambda c: project(c, weights, 10, PIXEL, 3.0), positions)


def test_second_derivative_is_refused_rather_than_wrong():
    coords, weights = cloud(n=6)
    coords.requires_grad_()
    image = project(coords, weights, 10, PIXEL, 3.0)
    (gradient,) = torch.autograd.grad((image * coords.sum()).sum(), coords, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_of_the_whole_microscope():
    coords, weights = cloud(n=5, batch=2, width=3.0, dtype=torch.float64)
    optics = microscope(weights=weights, box_size=12)
    rotations = random_rotations(2, 0).double()
    shifts = torch.tensor([[1.0, -2.0], [0.0, 3.0]], dtype=torch.float64)
    ctf = make_ctf(2).evaluate(12, PIXEL).double()

    def image(coords, shifts):
        return optics(coords, rotations, shifts, ctf, blur=1.5)

    assert gradcheck(image, (coords.requires_grad_(), shifts.requires_grad_()))


def test_chunks_of_atoms_change_nothing(monkeypatch):
    coords, weights = cloud(n=53, batch=3, dtype=torch.float64)
    target = torch.randn(3, BOX, BOX, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def image_and_gradient():
        positions = coords.clone().requires_grad_()
        image = project(positions, weights, BOX, PIXEL, 3.0)
        return image.detach(), torch.autograd.grad((image * target).sum(), positions)[0]

    whole = image_and_gradient()
    for size in (1, 10, 53):
        monkeypatch.setattr(cryochains.imaging, "ATOMS_PER_CHUNK", size)
        torch.testing.assert_close(image_and_gradient(), whole, rtol=1e-12, atol=1e-15)


def test_bf16_under_autocast_is_close_to_float32():
    # Wide as a molecule: positions themselves must not be rounded to bf16.
    coords, weights = cloud(n=400, batch=4, width=15.0)
    optics = microscope(weights=weights, box_size=64)
    rotations = random_rotations(4, 0)
    coords.requires_grad_()
    exact = optics(coords, rotations)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = optics(coords, rotations)
    assert half.dtype == torch.bfloat16
    half = half.float()
    (gradient,) = torch.autograd.grad(half.square().sum(), coords)
    assert (half - exact).norm() / exact.norm() < 0.01
    assert (gradient - exact_gradient).norm() / exact_gradient.norm() < 0.02


def test_no_gaussian_underflows():
    """Numbers below the smallest normal one make exp and the matrix products many times slower."""
    positions = torch.linspace(-1e4, 1e4, 201)
    values = gaussians(positions, pixel_grid(BOX, PIXEL, positions), 2.0)
    assert values.min() >= 0.99 * math.exp(MIN_EXPONENT)
    assert values.min() ** 2 > torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("far", [[500.0, 0.0, 0.0], [0.0, -1e4, 0.0], [1e6, 1e6, 1e6]])
def test_atoms_far_outside_leave_no_trace(far):
    coords = torch.tensor([[far]], requires_grad=True)
    optics = microscope(1)
    image = optics(coords, EYE)
    peak = float(optics(torch.zeros(1, 1, 3), EYE).detach().max())
    assert image.detach().abs().max() < 1e-10 * peak
    (gradient,) = torch.autograd.grad(image.sum(), coords)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-4 * peak


def test_tangents_are_directional_derivatives():
    coords, weights = cloud(n=12, batch=2, width=5.0, dtype=torch.float64)
    xy = coords[..., :2]
    tangents = torch.randn(2, 4, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = project_tangents(xy, tangents, weights, BOX, PIXEL, 3.0)
    assert found.shape == (2, 4, BOX, BOX)
    step = 1e-4
    for k in range(4):
        ahead = project(xy + step * tangents[:, k], weights, BOX, PIXEL, 3.0)
        behind = project(xy - step * tangents[:, k], weights, BOX, PIXEL, 3.0)
        torch.testing.assert_close(found[:, k], (ahead - behind) / (2 * step), rtol=0, atol=1e-8)


def test_sparse_and_dense_tangents_agree_for_atoms_of_any_width_and_at_the_border():
    coords, weights = cloud(n=40, batch=2, width=0.4 * BOX * PIXEL, dtype=torch.float64)
    xy = coords[..., :2]
    generator = torch.Generator().manual_seed(2)
    tangents = torch.randn(2, 3, 40, 2, dtype=torch.float64, generator=generator)
    widths = 2.0 + 10.0 * torch.rand(2, 40, dtype=torch.float64, generator=generator) ** 4
    for sigma in (3.0, widths):
        exact = _multiply(xy, tangents, weights, BOX, PIXEL, sigma)
        found = project_tangents(xy, tangents, weights, BOX, PIXEL, sigma)
        assert float((found - exact).norm() / exact.norm()) < 1e-3


def test_each_atom_may_have_its_own_width():
    coords, weights = cloud(n=6, batch=2, dtype=torch.float64)
    widths = torch.linspace(2, 6, 12, dtype=torch.float64).view(2, 6)
    found = project(coords, weights, BOX, PIXEL, widths)
    for row in range(2):
        alone = [project(coords[row : row + 1, a : a + 1], weights[a : a + 1], BOX, PIXEL, float(widths[row, a]))
                 for a in range(6)]  # fmt: skip
        torch.testing.assert_close(found[row], sum(alone)[0])
    inputs = coords.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: project(x, weights, 12, PIXEL, widths), inputs, atol=1e-6)


# Conventions


def test_origin_sits_at_pixel_half_the_box():
    origin = np.array([100.0, -50.0, 7.0])
    optics = microscope(1, origin)
    for rotation in random_rotations(3, 0):
        image = optics(torch.from_numpy(origin).float().expand(1, 1, 3), rotation[None])[0]
        assert brightest(image) == (BOX // 2, BOX // 2)
        # Symmetric about that pixel, so the origin is in its middle and not at its edge.
        torch.testing.assert_close(image[1:, 1:], image[1:, 1:].flip(0, 1), rtol=0, atol=1e-7)


def test_axes_of_the_image():
    steps = torch.tensor([[4.0, 0, 0], [0, 6.0, 0], [0, 0, 8.0]]) * PIXEL
    images = microscope(1)(steps.unsqueeze(1), EYE.expand(3, 3, 3))
    half = BOX // 2
    assert brightest(images[0]) == (half, half + 4), "x is the column"
    assert brightest(images[1]) == (half + 6, half), "y is the row"
    assert brightest(images[2]) == (half, half), "z is the line of sight"


def test_rotation_acts_on_column_vectors_and_is_not_its_transpose():
    about_z = roma.rotvec_to_rotmat(torch.tensor([[0.0, 0.0, math.pi / 2]]))
    half = BOX // 2
    # A tripod without symmetry: every atom has a length and a brightness of its own.
    atoms = torch.tensor([[[8.0, 0, 0], [0, 5.0, 0], [-3.0, 0, 0]]]) * PIXEL
    image = microscope(weights=[3.0, 2.0, 1.0], sigma=1.5)(atoms, about_z)[0]
    assert brightest(image) == (half + 8, half), "+x of the reference turns to +y: a higher row"
    peak = image.max()
    assert float(image[half, half - 5] / peak) == pytest.approx(2 / 3, abs=0.01), "+y turns to −x"
    assert float(image[half - 3, half] / peak) == pytest.approx(1 / 3, abs=0.01), "−x turns to −y"
    for row, column in ((half - 8, half), (half, half + 5), (half + 3, half)):
        assert image[row, column] < 1e-3 * peak, "where Rᵀ would have put the atoms"

    about_x = roma.rotvec_to_rotmat(torch.tensor([[math.pi / 2, 0.0, 0.0]]))
    along_z = microscope(1)(torch.tensor([[[0.0, 0.0, 6 * PIXEL]]]), about_x)[0]
    assert brightest(along_z) == (half - 6, half), "+z turns to −y about +x"


def test_image_of_a_rotated_pose_is_that_of_rotated_coordinates():
    coords, weights = cloud(batch=4, dtype=torch.float64)
    optics = microscope(weights=weights, origin=[1.0, 2.0, 3.0])
    rotations = random_rotations(4, 1).double()
    origin = optics.origin.double()
    turned = (coords - origin) @ rotations.transpose(1, 2) + origin
    eye = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    torch.testing.assert_close(optics(coords, rotations), optics(turned, eye), rtol=0, atol=1e-8)


def test_shifts_are_displacements_of_the_molecule_in_angstrom():
    image = microscope(1)(torch.zeros(1, 1, 3), EYE, torch.tensor([[5 * PIXEL, -3 * PIXEL]]))[0]
    assert brightest(image) == (BOX // 2 - 3, BOX // 2 + 5)


def test_shift_and_ctf_commute():
    coords, weights = cloud(batch=2)
    optics = microscope(weights=weights, box_size=64)
    rotations, ctf = random_rotations(2, 0), make_ctf(2).evaluate(64, PIXEL)
    still = optics(coords, rotations, None, ctf)
    shifted = optics(coords, rotations, torch.tensor([[3 * PIXEL, -2 * PIXEL]]).expand(2, 2), ctf)
    torch.testing.assert_close(shifted, still.roll((-2, 3), (1, 2)), rtol=0, atol=1e-6)


def test_unit_transfer_changes_nothing():
    coords, weights = cloud(batch=2)
    optics = microscope(weights=weights)
    plain = optics(coords, EYE.expand(2, 3, 3))
    torch.testing.assert_close(filter_images(plain, torch.ones(2, BOX, BOX // 2 + 1)), plain)
    torch.testing.assert_close(optics(coords, EYE.expand(2, 3, 3), torch.zeros(2, 2)), plain)


@pytest.mark.parametrize("blur", [2.0, 8.0])
def test_blur_is_a_gaussian_filter(blur):
    coords, weights = cloud(batch=2, width=6.0)
    optics = microscope(weights=weights, box_size=64)
    rotations = random_rotations(2, 0)
    blurred = optics(coords, rotations, blur=blur)
    filtered = filter_images(optics(coords, rotations), gaussian_transfer(64, PIXEL, blur))
    assert (blurred - filtered).abs().max() / blurred.max() < 1e-4
    assert blurred.max() < optics(coords, rotations).max()


def test_default_sigma_follows_the_pixels():
    assert microscope(1, sigma=None, pixel_size=1.0).sigma == 2.0
    assert microscope(1, sigma=None, pixel_size=5.0).sigma == 4.0
    assert "32 px × 2 Å" in repr(microscope(7)) and "7 Gaussians" in repr(microscope(7))


def test_microscope_has_nothing_to_learn_or_to_save():
    optics = microscope(3)
    assert not list(optics.parameters()) and not optics.state_dict()


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
    check_fits_in_box(coords, np.zeros(3), 32, 2.0)
    check_fits_in_box(coords[None], np.zeros(3), 32, 2.0)
    for origin, box in (([0.0, 0.0, -2.0], 32), (np.zeros(3), 30)):
        with pytest.raises(ValueError, match=r"expected a molecule that fits the box.*try a box of (\d+) px") as error:
            check_fits_in_box(coords, origin, box, 2.0)
        suggested = int(str(error.value).split("try a box of ")[1].split()[0])
        check_fits_in_box(coords, origin, suggested, 2.0)


# CTF


def make_ctf(n: int, seed: int = 0) -> CTF:
    """Astigmatic, with phase shifts, voltages and amplitude contrasts that differ; the last has U < V."""
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


def relion_ctf(ctf: CTF, row: int, box: int, pixel: float) -> np.ndarray:
    """RELION's formula (ctf.cpp, CTF::getGamma and CTF::getCTF), written out."""
    p = {name: float(getattr(ctf, name)[row]) for name in ctf.__dataclass_fields__}
    volts, cs = 1e3 * p["voltage_kv"], 1e7 * p["spherical_aberration_mm"]
    wavelength = 12.2643247 / math.sqrt(volts * (1 + volts * 0.978466e-6))
    c, s = math.cos(p["defocus_angle"]), math.sin(p["defocus_angle"])
    q = np.array([[c, s], [-s, c]])
    a = q.T @ np.diag([-p["defocus_u"], -p["defocus_v"]]) @ q
    fy, fx = np.meshgrid(np.fft.fftfreq(box, pixel), np.fft.rfftfreq(box, pixel), indexing="ij")
    u2 = fx**2 + fy**2
    gamma = math.pi * wavelength * (a[0, 0] * fx**2 + 2 * a[0, 1] * fx * fy + a[1, 1] * fy**2)
    gamma += math.pi / 2 * cs * wavelength**3 * u2**2
    q0 = p["amplitude_contrast"]
    gamma -= p["phase_shift"] + math.atan(q0 / math.sqrt(1 - q0**2))
    return -np.sin(gamma)


@pytest.mark.parametrize("box, pixel", [(64, 2.0), (32, 3.7), (128, 1.5)])
def test_ctf_is_relions(box, pixel):
    ctf = make_ctf(6)
    found = ctf.evaluate(box, pixel)
    assert found.shape == (6, box, box // 2 + 1) and found.dtype == torch.float32
    for row in range(len(ctf)):
        expected = relion_ctf(ctf, row, box, pixel)
        # What differs are the constants in the electron's wavelength: 5e-6 of a phase of hundreds of radians.
        np.testing.assert_allclose(found[row], expected, atol=2e-3)


def test_swapped_defoci_with_the_angle_turned_are_the_same_ctf():
    ctf = make_ctf(3)
    fields = {name: getattr(ctf, name) for name in ctf.__dataclass_fields__}
    swapped = fields | {
        "defocus_u": ctf.defocus_v,
        "defocus_v": ctf.defocus_u,
        "defocus_angle": ctf.defocus_angle + math.pi / 2,
    }
    torch.testing.assert_close(CTF(**swapped).evaluate(64, 2.0), ctf.evaluate(64, 2.0), rtol=0, atol=1e-3)


def test_ctf_is_bright_at_low_frequency():
    found = make_ctf(5).evaluate(64, 2.0)
    assert (found[:, 0, 0] > 0.05).all()


def test_rows_of_ctfs():
    ctf = make_ctf(6)
    assert len(ctf) == 6 and len(ctf[2]) == 1 and len(ctf[1:4]) == 3
    assert len(ctf[torch.tensor([True, False, True, False, False, True])]) == 3
    torch.testing.assert_close(ctf[[4, 1]].evaluate(16, 4.0), ctf.evaluate(16, 4.0)[[4, 1]])


# Poses and noise


def test_random_rotations_are_rotations():
    rotations = random_rotations(500, 3)
    assert rotations.dtype == torch.float32
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand(500, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(500), rtol=0, atol=1e-5)


def test_random_rotations_are_uniform():
    n = 20_000
    rotations = random_rotations(n, 0).double()
    # Of the uniform distribution: every entry has mean 0 and variance 1/3, and the trace has mean 0, variance 1.
    assert rotations.mean(0).abs().max() < 5 * math.sqrt(1 / 3 / n)
    assert (rotations.square().mean(0) - 1 / 3).abs().max() < 0.015
    trace = rotations.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean()) < 5 / math.sqrt(n) and abs(trace.var() - 1) < 0.05
    angle = torch.arccos(((trace - 1) / 2).clamp(-1, 1))
    below = float((angle < 1.0).double().mean())
    assert below == pytest.approx((1.0 - math.sin(1.0)) / math.pi, abs=0.01)


def test_random_rotations_are_reproducible():
    torch.manual_seed(1)
    first = random_rotations(10, 7)
    torch.manual_seed(2)
    assert torch.equal(random_rotations(10, 7), first)
    assert not torch.equal(random_rotations(10, 8), first)


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 10.0])
def test_snr_obtained(snr_db):
    coords, weights = cloud(n=100, batch=200)
    images = microscope(weights=weights)(coords, random_rotations(200, 0))
    noise_std = noise_std_for_snr(images, snr_db)
    noise = noise_std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ratio = images.var(dim=(1, 2)).mean() / noise.var()
    assert 10 * math.log10(float(ratio)) == pytest.approx(snr_db, abs=0.1)
