"""The posterior of linearised images, where rounding matters."""

import pytest
import torch

from cryochains.inference.inversion import invert_information
from cryochains.inference.likelihood import NormalEquations
from cryochains.inference.posterior import latent_prior, solve_particles


def solve(hessian: torch.Tensor):
    """Of two particles with one Hessian (p, p), a wide prior and 400 pixels."""
    p = len(hessian)
    equations = NormalEquations(
        hessian=hessian.float().expand(2, p, p).clone(),
        data_slope=torch.ones(2, p),
        model_slope=torch.zeros(2, p),
        data_power=torch.full((2, 3), 5.0),
        overlap=torch.full((2, 3), 4.0),
        model_power=torch.full((2, 3), 4.0),
    )
    prior = latent_prior(torch.zeros(p).double(), 1e4 * torch.eye(p).double(), 0.0, 0.1)
    zeros = torch.zeros(2)
    return solve_particles(
        equations, torch.zeros(2, p), zeros, torch.ones(2).double(), zeros, prior, 400.0
    )


def test_information_that_rounding_made_indefinite_is_solved():
    """An eigenvalue of −3·10⁻⁷ times the largest one."""
    clean = torch.diag(torch.tensor([1e6, 1e3, 1.0]))
    broken = torch.diag(torch.tensor([1e6, 1e3, -0.3]))
    before, after = solve(clean), solve(broken)
    for answer in (before, after):
        assert answer.step.isfinite().all() and answer.evidence.isfinite().all()
        assert torch.linalg.eigvalsh(answer.covariance).min() > 0
    # What is well known is known as before.
    torch.testing.assert_close(
        after.covariance[:, 1, 1], before.covariance[:, 1, 1], rtol=0.01, atol=0
    )


def test_sound_information_is_not_changed():
    hessian = torch.diag(torch.tensor([40.0, 9.0, 3.0]))
    posterior = solve(hessian)
    expected = 1 / (hessian.diagonal().double() + 1e-4)
    torch.testing.assert_close(posterior.covariance[0].diagonal()[:3], expected)


@pytest.mark.parametrize("p", [1, 7, 8, 30])
def test_inverses_are_those_of_double_precision(p):
    """Of fewer latents than pivots at a time, as many, and some blocks of them and a rest."""
    generator = torch.Generator().manual_seed(p)
    root = torch.randn(5, p + 1, 2 * p + 2, generator=generator, dtype=torch.float64)
    # Latents of very different units.
    units = 10 ** (4 * torch.rand(p + 1, generator=generator, dtype=torch.float64) - 2)
    whole = units[:, None] * (root @ root.mT) * units
    precision = torch.diag(units[:p] ** 2)
    weight = 0.5 + torch.rand(5, generator=generator, dtype=torch.float64)
    last = 0.1 + torch.rand(5, generator=generator, dtype=torch.float64)
    parts = (whole[:, :p, :p].float(), weight, whole[:, p, :p], whole[:, p, p], precision, last)
    inverses, log_determinants = invert_information(*parts)
    total = weight[:, None, None] * whole
    total[:, :p, :p] += precision
    total[:, p, p] += last
    expected = total.inverse()
    spread = expected.diagonal(dim1=1, dim2=2).sqrt()
    off = (inverses - expected) / (spread.unsqueeze(2) * spread.unsqueeze(1))
    assert off.abs().max() < 1e-4
    torch.testing.assert_close(log_determinants, torch.logdet(total), rtol=0, atol=1e-4)
    assert torch.equal(inverses, inverses.mT)


def test_a_matrix_that_single_precision_hardly_inverts_is_named():
    hessian = torch.tensor([[1.0, 1.0 - 1e-6], [1.0 - 1e-6, 1.0]]).expand(2, 2, 2)
    one, zeros = torch.ones(2), torch.zeros(2, 2)
    wide, narrow = 1e-9 * torch.eye(2), torch.eye(2)
    assert invert_information(hessian, one, zeros, one, wide, one)[1].isnan().all()
    assert invert_information(hessian, one, zeros, one, narrow, one)[1].isfinite().all()
