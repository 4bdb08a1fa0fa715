"""The posterior of linearised images, where rounding matters."""

import torch

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
