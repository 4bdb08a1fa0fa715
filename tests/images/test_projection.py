"""Coordinates to images: against brute force, at the borders, filters, random poses and noise."""

import math

import numpy as np
import pytest
import roma
import torch
from torch.autograd import gradcheck

import cryochains.images.projection
from cryochains.images import (
    filter_images,
    gaussian_transfer,
    noise_std_for_snr,
    pixel_grid,
    project,
    random_rotations,
)
from cryochains.images.projection import MIN_EXPONENT, _multiply, gaussians, project_tangents

BOX, PIXEL = 32, 2.0


def cloud(n=40, batch=1, width=8.0, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    coords = width * torch.randn(batch, n, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(n, generator=generator, dtype=torch.float64) + 0.5
    return coords.to(dtype), weights.to(dtype)


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
        distance = (
            (z - az)[:, None, None] ** 2
            + (x - ay)[None, :, None] ** 2
            + (x - ax)[None, None, :] ** 2
        )
        volume += weight * np.exp(-distance / (2 * sigma**2)) / (2 * np.pi * sigma**2) ** 1.5
    expected = volume.sum(0) * step

    image = project(coords.to(dtype), weights.to(dtype), BOX, PIXEL, sigma)[0]
    assert image.dtype == dtype
    assert np.abs(image.numpy() - expected).max() / expected.max() < 1e-5


def test_density_is_conserved():
    coords, weights = cloud(batch=5)
    images = project(coords, weights, 64, PIXEL, 3.0)
    torch.testing.assert_close(
        images.sum((1, 2)) * PIXEL**2, weights.sum().expand(5), rtol=1e-5, atol=0
    )


def test_gradients_of_projection():
    coords, weights = cloud(n=6, batch=2, width=3.0, dtype=torch.float64)
    for columns in (3, 2):
        positions = coords[..., :columns].clone().requires_grad_()
        assert gradcheck(lambda c: project(c, weights, 10, PIXEL, 3.0), positions)


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_by_weights(wide):
    """Also where each Gaussian has a width of its own; images are linear in weights."""
    coords, weights = cloud(n=6, batch=2, width=3.0, dtype=torch.float64)
    sigma = torch.linspace(2, 6, 12, dtype=torch.float64).view(2, 6) if wide else 3.0
    inputs = coords.requires_grad_(), weights.clone().requires_grad_()
    assert gradcheck(lambda c, w: project(c, w, 10, PIXEL, sigma), inputs, atol=1e-6)
    with torch.no_grad():
        twice = project(coords, 2 * weights, 10, PIXEL, sigma)
        torch.testing.assert_close(twice, 2 * project(coords, weights, 10, PIXEL, sigma))


def test_second_derivative_is_refused_rather_than_wrong():
    coords, weights = cloud(n=6)
    coords.requires_grad_()
    image = project(coords, weights, 10, PIXEL, 3.0)
    (gradient,) = torch.autograd.grad((image * coords.sum()).sum(), coords, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_chunks_of_atoms_change_nothing(monkeypatch):
    coords, weights = cloud(n=53, batch=3, dtype=torch.float64)
    target = torch.randn(
        3, BOX, BOX, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )

    def image_and_gradient():
        positions = coords.clone().requires_grad_()
        image = project(positions, weights, BOX, PIXEL, 3.0)
        return image.detach(), torch.autograd.grad((image * target).sum(), positions)[0]

    whole = image_and_gradient()
    for size in (1, 10, 53):
        monkeypatch.setattr(cryochains.images.projection, "ATOMS_PER_CHUNK", size)
        torch.testing.assert_close(image_and_gradient(), whole, rtol=1e-12, atol=1e-15)


def test_no_atoms_leave_no_image():
    assert not project(torch.zeros(2, 0, 3), torch.zeros(0), BOX, PIXEL, 3.0).any()


def test_axes_and_origin_of_the_image():
    steps = torch.tensor([[4.0, 0, 0], [0, 6.0, 0], [0, 0, 8.0]]) * PIXEL
    images = project(steps.unsqueeze(1), torch.ones(1), BOX, PIXEL, 3.0)
    half = BOX // 2
    assert brightest(images[0]) == (half, half + 4), "x is the column"
    assert brightest(images[1]) == (half + 6, half), "y is the row"
    assert brightest(images[2]) == (half, half), "z is the line of sight"


def test_bf16_under_autocast_is_close_to_float32():
    coords, weights = cloud(n=400, batch=4, width=15.0)
    coords.requires_grad_()
    exact = project(coords, weights, 64, PIXEL, 3.0)
    (exact_gradient,) = torch.autograd.grad(exact.square().sum(), coords)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = project(coords, weights, 64, PIXEL, 3.0)
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
    image = project(coords, torch.ones(1), BOX, PIXEL, 3.0)
    peak = float(project(torch.zeros(1, 1, 3), torch.ones(1), BOX, PIXEL, 3.0).max())
    assert image.detach().abs().max() < 1e-10 * peak
    (gradient,) = torch.autograd.grad(image.sum(), coords)
    assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-4 * peak


def test_tangents_are_directional_derivatives():
    coords, weights = cloud(n=12, batch=2, width=5.0, dtype=torch.float64)
    xy = coords[..., :2]
    tangents = torch.randn(
        2, 4, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    result = project_tangents(xy, tangents, weights, BOX, PIXEL, 3.0)
    assert result.shape == (2, 4, BOX, BOX)
    step = 1e-4
    for k in range(4):
        ahead = project(xy + step * tangents[:, k], weights, BOX, PIXEL, 3.0)
        behind = project(xy - step * tangents[:, k], weights, BOX, PIXEL, 3.0)
        torch.testing.assert_close(result[:, k], (ahead - behind) / (2 * step), rtol=0, atol=1e-8)


def test_scattered_and_multiplied_tangents_agree_for_atoms_of_any_width_and_at_the_border():
    coords, weights = cloud(n=40, batch=2, width=0.4 * BOX * PIXEL, dtype=torch.float64)
    xy = coords[..., :2]
    generator = torch.Generator().manual_seed(2)
    tangents = torch.randn(2, 3, 40, 2, dtype=torch.float64, generator=generator)
    widths = 2.0 + 10.0 * torch.rand(2, 40, dtype=torch.float64, generator=generator) ** 4
    for sigma in (3.0, widths):
        exact = _multiply(xy, tangents, weights, BOX, PIXEL, sigma)
        result = project_tangents(xy, tangents, weights, BOX, PIXEL, sigma)
        assert float((result - exact).norm() / exact.norm()) < 1e-8
        rough = project_tangents(xy.float(), tangents.float(), weights, BOX, PIXEL, sigma)
        assert float((rough - exact).norm() / exact.norm()) < 1e-4


def test_each_atom_may_have_its_own_width():
    coords, weights = cloud(n=6, batch=2, dtype=torch.float64)
    widths = torch.linspace(2, 6, 12, dtype=torch.float64).view(2, 6)
    result = project(coords, weights, BOX, PIXEL, widths)
    for row in range(2):
        alone = []
        for a in range(6):
            one = slice(a, a + 1)
            width = float(widths[row, a])
            alone.append(project(coords[row : row + 1, one], weights[one], BOX, PIXEL, width))
        torch.testing.assert_close(result[row], sum(alone)[0])
    inputs = coords.clone().requires_grad_()
    assert gradcheck(lambda x: project(x, weights, 12, PIXEL, widths), inputs, atol=1e-6)


# Filters


def test_unit_transfer_changes_nothing():
    coords, weights = cloud(batch=2)
    plain = project(coords, weights, BOX, PIXEL, 3.0)
    torch.testing.assert_close(filter_images(plain, torch.ones(2, BOX, BOX // 2 + 1)), plain)


@pytest.mark.parametrize("blur", [2.0, 8.0])
def test_gaussian_transfer_widens_the_atoms(blur):
    coords, weights = cloud(batch=2, width=6.0)
    wide = project(coords, weights, 64, PIXEL, math.hypot(3.0, blur))
    narrow = project(coords, weights, 64, PIXEL, 3.0)
    filtered = filter_images(narrow, gaussian_transfer(64, PIXEL, blur))
    assert (wide - filtered).abs().max() / wide.max() < 1e-4
    assert wide.max() < narrow.max()


# Poses and noise


def test_random_rotations_are_rotations():
    rotations = random_rotations(500, 3)
    assert rotations.dtype == torch.float32
    torch.testing.assert_close(
        rotations @ rotations.mT, torch.eye(3).expand(500, 3, 3), rtol=0, atol=1e-5
    )
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(500), rtol=0, atol=1e-5)


def test_random_rotations_are_uniform():
    n = 20_000
    rotations = random_rotations(n, 0).double()
    # Of the uniform distribution: every entry has mean 0 and variance 1/3, and the trace has mean
    # 0 and variance 1.
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


def test_random_rotations_are_those_of_their_quaternions():
    generator = torch.Generator().manual_seed(4)
    quaternions = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    unit = quaternions / quaternions.norm(dim=1, keepdim=True)
    expected = roma.unitquat_to_rotmat(unit)
    torch.testing.assert_close(random_rotations(50, 4).double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("snr_db", [-20.0, 0.0, 10.0])
def test_snr_obtained(snr_db):
    coords, weights = cloud(n=100, batch=200)
    turned = coords @ random_rotations(200, 0).mT
    images = project(turned, weights, BOX, PIXEL, 3.0)
    noise_std = noise_std_for_snr(images, snr_db)
    noise = noise_std * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    ratio = images.var(dim=(1, 2)).mean() / noise.var()
    assert 10 * math.log10(float(ratio)) == pytest.approx(snr_db, abs=0.1)
