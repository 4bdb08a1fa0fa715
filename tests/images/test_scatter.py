"""Projections and their derivatives on a CPU; those against dense ones in `test_projection`."""

import numba
import pytest
import torch

from cryochains.images import project, scatter

GRID = torch.arange(-8.0, 8.0, dtype=torch.float64)


def scattered(xy, sigma=1.0):
    xy = torch.tensor([[xy]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    tangents = torch.eye(2, dtype=torch.float64)[None, :, None]
    return scatter.scatter_tangents(xy, tangents, one, GRID, sigma * one)[0]


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
    both = scatter.scatter_tangents(xy, tangents, amplitudes, grid, sigmas)[0, 0]
    alone = (xy[:, 1:], tangents[:, :, 1:], amplitudes[:, 1:], grid, sigmas[:, 1:])
    # The bright atom is 40 Å from this row.
    middle = scatter.scatter_tangents(*alone)[0, 0, 32]
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


def test_a_gradient_is_asked_for_elsewhere():
    """An image for which a gradient is asked is the same, and has one."""
    xy = torch.tensor([[[0.3, -1.2], [2.0, 1.0]]], requires_grad=True)
    weights = torch.ones(2)
    with_gradient = project(xy, weights, 32, 1.5, 2.0)
    assert with_gradient.requires_grad
    without = project(xy.detach(), weights, 32, 1.5, 2.0)
    torch.testing.assert_close(without, with_gradient.detach(), rtol=0, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(project(xy, weights, 32, 1.5, 2.0), without)
    brighter = weights.clone().requires_grad_()
    assert project(xy.detach(), brighter, 32, 1.5, 2.0).requires_grad


def test_where_nothing_can_be_written_every_process_compiles_for_itself(monkeypatch):
    compile_one = numba.njit

    def refuse_cache(**options):
        if options.pop("cache", False):
            raise RuntimeError("cannot cache function: no locator available")
        return compile_one(**options)

    monkeypatch.setattr(numba, "njit", refuse_cache)
    double = scatter.compiled(lambda x: 2 * x)
    assert double(3) == 6
    assert double.signatures
