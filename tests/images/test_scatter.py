"""Projections and their derivatives on a CPU; those against dense ones in `test_projection`."""

import numba
import pytest
import torch

from cryochains._compiled import compiled
from cryochains.images import project, projection, scatter, transform_tangents

GRID = torch.arange(-8.0, 8.0, dtype=torch.float64)


def on_whole_images(xy, tangents, amplitudes, grid, sigma):
    """(b, k, box, box) `scatter_tangents`, with the pixels that no atom touches."""
    images = xy.new_zeros(len(xy), tangents.shape[1], len(grid), len(grid))
    windows = scatter.scatter_tangents(xy, tangents, amplitudes, grid, sigma)
    for image, (sums, rows, columns) in zip(images, windows, strict=True):
        image[:, rows, columns] = sums.permute(2, 0, 1)
    return images


def scattered(xy, sigma=1.0):
    xy = torch.tensor([[xy]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    tangents = torch.eye(2, dtype=torch.float64)[None, :, None]
    return on_whole_images(xy, tangents, one, GRID, sigma * one)[0]


@pytest.mark.parametrize("xy", [(0.3, -1.2), (-8.4, 7.9), (12.0, 0.0)])
def test_an_atom_inside_at_the_border_and_beyond(xy):
    away_x = GRID - xy[0]
    away_y = GRID - xy[1]
    bell = torch.exp(-0.5 * (away_x**2 + away_y[:, None] ** 2))
    expected = torch.stack([bell * away_x, bell * away_y[:, None]])
    torch.testing.assert_close(scattered(xy), expected, rtol=0, atol=1e-12)


def test_an_atom_far_outside_adds_nothing():
    assert not scattered((40.0, 0.0)).any()
    assert not scattered((0.0, -1e6)).any()


@pytest.mark.parametrize("k", [1, 8])
def test_an_atom_does_not_leave_traces_in_the_next(k):
    """Where rounding finds a pixel more in a row through its centre than in its window."""
    grid = 1.94 * torch.arange(-32.0, 32.0)
    x, sigma = 37.2454719543457, 1.4762698411941528
    xy = torch.tensor([[[x + 5 * sigma, -40.0], [x, 0.0]]])
    sigmas = torch.tensor([[3.0, sigma]])
    amplitudes = torch.tensor([[1e6, 1.0]])
    tangents = torch.ones(1, k, 2, 2)
    both = on_whole_images(xy, tangents, amplitudes, grid, sigmas)[0, 0]
    alone = (xy[:, 1:], tangents[:, :, 1:], amplitudes[:, 1:], grid, sigmas[:, 1:])
    # The bright atom is 40 Å from this row.
    middle = on_whole_images(*alone)[0, 0, 32]
    torch.testing.assert_close(both[32], middle, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 3e-6), (torch.float64, 1e-12)])
def test_images_are_those_of_all_pixels(dtype, tolerance):
    """Of atoms inside, at the border and beyond, narrower than a pixel and as wide as the box."""
    generator = torch.Generator().manual_seed(0)
    grid = 1.5 * torch.arange(-16.0, 16.0, dtype=torch.float64)
    xy = 14 * torch.randn(3, 200, 2, generator=generator, dtype=torch.float64)
    xy[0, 0] = 1e6
    sigma = 0.5 + 8 * torch.rand(3, 200, generator=generator, dtype=torch.float64) ** 4
    height = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    bells = torch.exp(-0.5 * ((grid - xy[..., None]) / sigma[..., None, None]) ** 2)
    expected = torch.einsum("bn,bni,bnj->bij", height, bells[:, :, 1], bells[:, :, 0])
    parts = (part.to(dtype) for part in (xy, height, grid, sigma))
    images = scatter.scatter_atoms(*parts)
    assert images.dtype == dtype
    off = (images.double() - expected).abs().max() / expected.abs().max()
    assert off < tolerance


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.float64, 1e-8)])
@pytest.mark.parametrize("box", [2, 6, 20])
@pytest.mark.parametrize("k", [1, 7])
def test_transforms_of_tangents_are_those_of_all_pixels(dtype, tolerance, box, k):
    """Of images whose atoms touch some of the pixels, all, and none; into given columns."""
    generator = torch.Generator().manual_seed(0)
    xy = 3 * torch.randn(4, 30, 2, generator=generator, dtype=torch.float64)
    xy[1] *= 20
    xy[2] += 1e4
    tangents = torch.randn(4, k, 30, 2, generator=generator, dtype=torch.float64)
    weights = torch.rand(30, generator=generator, dtype=torch.float64)
    transfer = torch.rand(4, box, box // 2 + 1, generator=generator, dtype=torch.float64)
    sigma = 1 + torch.rand(4, 30, generator=generator, dtype=torch.float64)
    images = projection._multiply(xy, tangents, weights, box, 2.0, sigma)
    spectra = torch.fft.rfft2(images, norm="ortho") * transfer.unsqueeze(1)
    expected = torch.view_as_real(spectra).flatten(-3).mT
    parts = (part.to(dtype) for part in (xy, tangents, weights))
    given = torch.full((4, box * (box + 2), k + 3), torch.nan, dtype=dtype)
    got = transform_tangents(
        *parts, box, 2.0, sigma.to(dtype), transfer.to(dtype), given[:, :, 1 : k + 1]
    )
    # Beside e⁻²⁵, which is the least that the sum over all pixels knows.
    off = (got.double() - expected).abs().max() / expected.abs().max()
    assert off < tolerance
    assert torch.equal(given[:, :, 1 : k + 1], got)
    assert given[:, :, 0].isnan().all() and given[:, :, k + 1 :].isnan().all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_gradients_are_those_of_all_pixels(dtype, tolerance):
    """Of atoms inside, at the border and beyond, as wide as two pixels and wider."""
    generator = torch.Generator().manual_seed(0)
    xy = 14 * torch.randn(3, 60, 2, generator=generator, dtype=torch.float64)
    xy[0, 0] = 1e6
    sigma = 2 + torch.rand(3, 60, generator=generator, dtype=torch.float64)
    weights = torch.randn(60, generator=generator, dtype=torch.float64)
    upstream = torch.randn(3, 32, 32, generator=generator, dtype=torch.float64)

    def gradients(draw, dtype):
        places = xy.to(dtype).clone().requires_grad_()
        heights = weights.to(dtype).clone().requires_grad_()
        draw(places, heights, sigma.to(dtype)).backward(upstream.to(dtype))
        return places.grad.double(), heights.grad.double()

    def all_pixels(places, heights, widths):
        amplitudes = heights / (2 * torch.pi * widths.square())
        grid = projection.pixel_grid(32, 1.5, places)
        return projection._Project.apply(places, amplitudes, grid, widths)

    expected = gradients(all_pixels, torch.float64)
    got = gradients(lambda *parts: project(*parts[:2], 32, 1.5, parts[2]), dtype)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() < tolerance * other.abs().max()


def test_where_nothing_can_be_written_every_process_compiles_for_itself(monkeypatch):
    compile_one = numba.njit

    def refuse_cache(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_one(**options)

    monkeypatch.setattr(numba, "njit", refuse_cache)
    double = compiled(lambda x: 2 * x)
    assert double(3) == 6
    assert double.signatures


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("of", ["position", "amplitude"])
def test_atoms_that_are_nowhere_are_no_empty_image(value, of):
    grid, sigma = torch.arange(-8.0, 8.0), torch.ones(2, 3)
    xy, amplitudes = torch.zeros(2, 3, 2), torch.ones(2, 3)
    if of == "position":
        xy[1, 2, 0] = value
    else:
        amplitudes[1, 2] = value
    images = scatter.scatter_atoms(xy, amplitudes, grid, sigma)
    assert images[0].isfinite().all() and images[1].isnan().all()
