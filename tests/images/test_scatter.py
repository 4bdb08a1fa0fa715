"""Derivatives of projections on a CPU; against the dense ones in `test_projection`."""

import numba
import pytest
import torch

from cryochains.images import scatter

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


def test_an_atom_does_not_leave_traces_in_the_next():
    """Where rounding finds a pixel more in a row through its centre than in its window."""
    grid = 1.94 * torch.arange(-32.0, 32.0)
    x, sigma = 37.2454719543457, 1.4762698411941528
    xy = torch.tensor([[[x + 5 * sigma, -40.0], [x, 0.0]]])
    sigmas = torch.tensor([[3.0, sigma]])
    amplitudes = torch.tensor([[1e6, 1.0]])
    tangents = torch.ones(1, 1, 2, 2)
    both = scatter.scatter_tangents(xy, tangents, amplitudes, grid, sigmas)[0, 0]
    alone = (xy[:, 1:], tangents[:, :, 1:], amplitudes[:, 1:], grid, sigmas[:, 1:])
    # The bright atom is 40 Å from this row.
    middle = scatter.scatter_tangents(*alone)[0, 0, 32]
    torch.testing.assert_close(both[32], middle, rtol=0, atol=1e-5)


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
