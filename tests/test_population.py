"""What particles share: the elastic prior and its shrinkage."""

import numpy as np
import pytest
import torch

from cryochains.dynamics import Dynamics
from cryochains.modes import compute_modes
from cryochains.population import BOND, START_SPREAD, Population, elastic_variance, reach, shrink_covariance

KINDS = ("mode", "rotation", "translation")


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, (4, 3)))


def test_soft_modes_vary_more(dynamics):
    """As the inverse of the eigenvalue; together the modes bend their chain by what START_SPREAD says."""
    variance = elastic_variance(dynamics)
    assert variance.dtype == torch.float64 and variance.shape == (dynamics.n_latents,)
    for chain, layout in enumerate(dynamics.chains):
        energy = variance[layout.mode].numpy() * dynamics.modes.eigenvalues[chain]
        np.testing.assert_allclose(energy, energy[0])
        for kind in KINDS:
            total = float(variance[getattr(layout, kind)].sum())
            assert total == pytest.approx(START_SPREAD[kind] ** 2), kind


def test_no_mode_parts_neighbours_by_more_than_a_bond(closed):
    """Carried to its reach, a mode moves bonded residues apart by BOND; the prior lets none go further."""
    dynamics = Dynamics(closed, compute_modes(closed, 30))
    limit = reach(dynamics)
    assert torch.isinf(limit[torch.from_numpy(dynamics.latent_kind != "mode")]).all()
    assert (elastic_variance(dynamics).sqrt() <= limit).all()
    coords = dynamics.reference.double().numpy()
    for chain, layout in enumerate(dynamics.chains):
        bonded = np.linalg.norm(np.diff(coords[layout.atoms], axis=0), axis=1) < 8.0
        for latent in (layout.mode.start, layout.mode.stop - 1):
            z = torch.zeros(dynamics.n_latents)
            z[latent] = limit[latent]
            moved = dynamics.bend(z[None], chain)[0].double().numpy() - dynamics.bend(0 * z[None], chain)[0].numpy()
            apart = np.linalg.norm(np.diff(moved, axis=0), axis=1)[bonded].max()
            assert apart == pytest.approx(BOND, rel=1e-3)


@pytest.mark.parametrize("rotation, translation", [(True, False), (False, True)])
def test_rigid_chains_have_a_prior_too(closed, rotation, translation):
    dynamics = Dynamics(closed, None, rotation, translation)
    assert elastic_variance(dynamics).tolist() == pytest.approx([16 / 3] * 6)


def draw(dynamics, n, seed=0):
    """Latents with strong correlations, and their scatter matrix."""
    rng = np.random.default_rng(seed)
    p = dynamics.n_latents
    mixing = rng.normal(size=(p, p)) / np.sqrt(p)
    latents = rng.normal(size=(n, p)) @ mixing
    return torch.from_numpy(latents.T @ latents), torch.from_numpy(mixing.T @ mixing)


def test_few_particles_give_the_elastic_shape_and_many_their_own(dynamics):
    shape = elastic_variance(dynamics)
    scatter, _ = draw(dynamics, 1)
    few = shrink_covariance(scatter, 1, dynamics)
    for kind in KINDS:
        of_kind = torch.from_numpy(dynamics.latent_kind == kind)
        ratio = few.diagonal()[of_kind] / shape[of_kind]
        expected = scatter.diagonal()[of_kind].sum() / shape[of_kind].sum()
        # One particle among p of prior: up to its own share, the prior's shape at the particle's amplitude.
        assert (ratio / expected).median() == pytest.approx(1.0, abs=0.25), kind
    scatter, truth = draw(dynamics, 20_000)
    many = shrink_covariance(scatter, 20_000, dynamics)
    assert float((many - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_amplitude_of_each_kind_is_the_particles_own(dynamics, n):
    scatter, _ = draw(dynamics, n)
    shrunk = shrink_covariance(scatter, n, dynamics)
    for kind in KINDS:
        of_kind = torch.from_numpy(dynamics.latent_kind == kind)
        torch.testing.assert_close(shrunk.diagonal()[of_kind].sum(), scatter.diagonal()[of_kind].sum() / n)


@pytest.mark.parametrize("n", [1, 5, 100])
def test_shrunk_covariance_can_be_inverted(dynamics, n):
    scatter, _ = draw(dynamics, n)
    shrunk = shrink_covariance(scatter, n, dynamics)
    torch.testing.assert_close(shrunk, shrunk.mT)
    assert torch.linalg.eigvalsh(shrunk).min() > 0


def test_repr_is_short(dynamics):
    covariance = shrink_covariance(*draw(dynamics, 10)[:1], 10, dynamics)
    text = repr(Population(covariance[0], covariance, 0.123456789012345, 2.5, "abc"))
    assert f"{dynamics.n_latents} latents" in text and "\n" not in text
