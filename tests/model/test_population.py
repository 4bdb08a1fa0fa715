"""What particles share: the elastic prior and its shrinkage."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.model import (
    KINDS,
    Dynamics,
    Model,
    Population,
    elastic_prior,
    elastic_variance,
    load_population,
    mode_limit,
    require_population,
    shrink_covariance,
    with_less_rest,
)
from cryochains.model.population import MAX_BOND_STRETCH, START_SPREAD
from cryochains.molecule import compute_modes, load_structure, residue_beads


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, (4, 3)))


@pytest.fixture(scope="module")
def prior(dynamics):
    return elastic_prior(dynamics)


def test_soft_modes_vary_more(dynamics):
    """As 1/λ; together the modes bend their chain by what START_SPREAD says."""
    variance = elastic_variance(dynamics)
    assert variance.dtype == torch.float64 and variance.shape == (dynamics.n_latents,)
    for chain, layout in enumerate(dynamics.chains):
        energy = variance[layout.mode].numpy() * dynamics.modes.eigenvalues[chain]
        np.testing.assert_allclose(energy, energy[0])
        for kind in KINDS:
            total = float(variance[getattr(layout, kind)].sum())
            assert total == pytest.approx(START_SPREAD[kind] ** 2), kind


def test_no_mode_parts_neighbours_by_more_than_a_bond(closed):
    """At its limit, a mode moves bonded residues apart by a bond's length; the prior is within."""
    dynamics = Dynamics(closed, compute_modes(closed, 30))
    limit = mode_limit(dynamics)
    assert torch.isinf(limit[torch.from_numpy(dynamics.latent_kind != "mode")]).all()
    assert (elastic_variance(dynamics).sqrt() <= limit).all()
    coords = dynamics.reference.double().numpy()
    for chain, layout in enumerate(dynamics.chains):
        bonded = np.linalg.norm(np.diff(coords[layout.atoms], axis=0), axis=1) < 8.0
        for latent in (layout.mode.start, layout.mode.stop - 1):
            z = torch.zeros(dynamics.n_latents)
            z[latent] = limit[latent]
            bent = dynamics.bend(z[None], chain)[0].double().numpy()
            moved = bent - dynamics.bend(0 * z[None], chain)[0].numpy()
            apart = np.linalg.norm(np.diff(moved, axis=0), axis=1)[bonded].max()
            assert apart == pytest.approx(MAX_BOND_STRETCH, rel=1e-3)


@pytest.mark.parametrize("rotation, translation", [(True, False), (False, True)])
def test_rigid_chains_have_a_prior_too(closed, rotation, translation):
    dynamics = Dynamics(closed, None, rotation, translation)
    assert elastic_variance(dynamics).tolist() == pytest.approx([16 / 3] * 6)


def test_the_priors_constants_are_computed_once(dynamics, prior):
    assert torch.equal(prior.variance, elastic_variance(dynamics))
    assert torch.equal(prior.limit, mode_limit(dynamics))
    together = torch.stack(prior.kinds).sum(0)
    assert len(prior.kinds) == 3 and (together == 1).all(), "every latent is of one kind"
    assert len(elastic_prior(Dynamics(dynamics.structure, translation=False)).kinds) == 1


def draw(dynamics, n, seed=0):
    """Latents with strong correlations, and their scatter matrix."""
    rng = np.random.default_rng(seed)
    p = dynamics.n_latents
    mixing = rng.normal(size=(p, p)) / np.sqrt(p)
    latents = rng.normal(size=(n, p)) @ mixing
    return torch.from_numpy(latents.T @ latents), torch.from_numpy(mixing.T @ mixing)


def test_few_particles_give_the_elastic_shape_and_many_their_own(dynamics, prior):
    shape = elastic_variance(dynamics)
    scatter, _ = draw(dynamics, 1)
    few, _ = shrink_covariance(scatter, 1, prior)
    for kind in KINDS:
        of_kind = torch.from_numpy(dynamics.latent_kind == kind)
        ratio = few.diagonal()[of_kind] / shape[of_kind]
        expected = scatter.diagonal()[of_kind].sum() / shape[of_kind].sum()
        # One particle among p of prior: up to its own share, the prior's shape at the particle's
        # amplitude.
        assert (ratio / expected).median() == pytest.approx(1.0, abs=0.25), kind
    scatter, truth = draw(dynamics, 20_000)
    many, _ = shrink_covariance(scatter, 20_000, prior)
    assert float((many - truth).norm() / truth.norm()) < 0.05


@pytest.mark.parametrize("n", [1, 10, 1000])
def test_amplitude_of_each_kind_is_the_particles_own(dynamics, prior, n):
    scatter, _ = draw(dynamics, n)
    shrunk, _ = shrink_covariance(scatter, n, prior)
    for kind in KINDS:
        of_kind = torch.from_numpy(dynamics.latent_kind == kind)
        amplitude = scatter.diagonal()[of_kind].sum() / n
        torch.testing.assert_close(shrunk.diagonal()[of_kind].sum(), amplitude)


@pytest.mark.parametrize("n", [1, 5, 100])
def test_shrunk_covariance_can_be_inverted(dynamics, prior, n):
    scatter, _ = draw(dynamics, n)
    shrunk, _ = shrink_covariance(scatter, n, prior)
    torch.testing.assert_close(shrunk, shrunk.mT)
    assert torch.linalg.eigvalsh(shrunk).min() > 0


def test_a_leading_direction_does_not_widen_the_others(dynamics, prior):
    """One motion of 3 Å, and next to nothing else: shrinking keeps the one and the other."""
    n, p = 100, dynamics.n_latents
    rng = np.random.default_rng(3)
    direction = rng.normal(size=p)
    direction /= np.linalg.norm(direction)
    latents = 3 * rng.normal(size=(n, 1)) * direction + 0.05 * rng.normal(size=(n, p))
    scatter = torch.from_numpy(latents.T @ latents)
    shrunk, _ = shrink_covariance(scatter, n, prior)
    along = float(direction @ shrunk.numpy() @ direction)
    assert along == pytest.approx(float(direction @ scatter.numpy() @ direction) / n, rel=0.1)
    # Shrunk together, p / (n + p) of it would go to the others.
    others = float(shrunk.trace()) - along
    assert others < 0.05 * along
    assert 0.3 * p * 0.05**2 < others


def test_joined_bodies_do_not_part(closed):
    """Two halves of a chain turn and shift, and where they meet they stay together."""
    selections = {
        "head": "chain A and resnum 1 to 150",
        "tail": "chain A and resnum 151 to 400",
        "other": "chain B",
    }
    halves = load_structure("glua3-closed", bodies=selections)
    dynamics = Dynamics(halves)
    prior = elastic_prior(dynamics)
    assert prior.joints is not None
    assert elastic_prior(Dynamics(closed)).joints is None
    covariance = prior.covariance(0.1 * prior.variance)
    apart = (0.1 * prior.variance).diag()
    edge = int(np.flatnonzero(halves.node_chain == 1)[0])
    gaps = []
    for one in (covariance, apart):
        draws = torch.randn(400, len(one), generator=torch.Generator().manual_seed(0)).double()
        moved = dynamics.decode(draws @ torch.linalg.cholesky(one).T)
        gaps.append(float((moved[:, edge] - moved[:, edge - 1]).std(0).norm()))
    assert gaps[0] < 0.8 * gaps[1]
    # What the third body does is nobody else's business.
    third = torch.from_numpy(dynamics.latent_chain == 2)
    torch.testing.assert_close(covariance[third][:, third], apart[third][:, third])


def test_shrinking_leaves_prior_and_scatter_alone(dynamics, prior):
    scatter, _ = draw(dynamics, 10)
    before = scatter.clone(), prior.variance.clone()
    shrink_covariance(scatter, 10, prior)
    assert torch.equal(scatter, before[0]) and torch.equal(prior.variance, before[1])


@pytest.mark.parametrize("n_motions", [0, 1, 3])
def test_directions_that_are_more_than_chance_are_counted(dynamics, prior, n_motions):
    n, p = 2000, dynamics.n_latents
    rng = np.random.default_rng(4)
    motions = np.linalg.qr(rng.normal(size=(p, p)))[0][:n_motions]
    latents = 0.1 * rng.normal(size=(n, p)) + 2 * rng.normal(size=(n, n_motions)) @ motions
    assert shrink_covariance(torch.from_numpy(latents.T @ latents), n, prior)[1] == n_motions


def test_less_of_the_rest_keeps_the_leading_directions(dynamics, prior):
    """Directions over the latents' own standard deviations; the others keep their shape."""
    covariance, _ = shrink_covariance(draw(dynamics, 200)[0], 200, prior)
    outer = covariance.diagonal().sqrt()[:, None] * covariance.diagonal().sqrt()
    before = torch.linalg.eigvalsh(covariance / outer)
    after = torch.linalg.eigvalsh(with_less_rest(covariance, 2, 0.5) / outer)
    expected = torch.cat([0.5 * before[:-2], before[-2:]]).sort().values
    torch.testing.assert_close(after, expected)
    torch.testing.assert_close(with_less_rest(covariance, 2, 1.0), covariance)


def test_repr_says_in_how_many_directions_particles_vary(dynamics):
    population = Population(torch.zeros(2), torch.eye(2), 1.0, 1.0, {}, rank=1)
    assert "spread 1.41 Å in 1 direction," in repr(population)
    with pytest.raises(
        ValueError, match="expected rank to be a whole number of 0 or more, got 'two'"
    ):
        Population(torch.zeros(2), torch.eye(2), 1.0, 1.0, {}, rank="two")


def test_repr_is_short(dynamics, prior):
    covariance, _ = shrink_covariance(draw(dynamics, 10)[0], 10, prior)
    text = repr(Population(covariance[0], covariance, 0.123456789012345, 2.5, {}))
    assert f"{dynamics.n_latents} latents" in text and "\n" not in text


def test_description_and_tensors_restore_it(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    p = model.n_latents
    population = Population(
        torch.ones(p).double(), torch.eye(p), 0.1 + 0.2, 1 / 3, model.fingerprint
    )
    description = json.loads(json.dumps(population.description()))
    again = Population.restore(population.tensors(), description)
    assert torch.equal(again.mean, population.mean)
    assert torch.equal(again.covariance, population.covariance)
    assert (again.noise_std, again.contrast) == (0.1 + 0.2, 1 / 3), "to the last digit"
    assert again.fingerprint == model.fingerprint
    assert again.noise_spectrum is None
    assert again.description() == population.description()


def full_population(model) -> Population:
    p = model.n_latents
    return Population(
        torch.ones(p).double(),
        torch.eye(p).double(),
        noise_std=0.1 + 0.2,
        contrast=1 / 3,
        fingerprint=model.fingerprint,
        contrast_spread=0.1 * 3,
        noise_pixels=1000 / 7,
        noise_spectrum=torch.linspace(2, 0.3, 17, dtype=torch.float64) / 3,
        junk_share=1 / 9,
    )


@pytest.mark.parametrize("noise_pixels", [1000 / 7, math.inf])
def test_files_keep_what_is_known_of_the_images(closed, tmp_path, noise_pixels):
    """To the last digit: brightness, noise and its spectrum, and the share of junk."""
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    population = replace(full_population(model), noise_pixels=noise_pixels)
    population.save(tmp_path / "p.safetensors")
    again = load_population(tmp_path / "p.safetensors")
    assert again.description() == population.description()
    assert again.description()["noise_pixels"] == noise_pixels
    assert again.tensors().keys() == population.tensors().keys()
    for name, values in population.tensors().items():
        assert torch.equal(again.tensors()[name], values), name
        assert again.tensors()[name].dtype == torch.float64, name


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, modes=2, box_size=32, pixel_size=5.0)


def learned_beads(model):
    """Weights and widths that no formula has, and fewer beads than the model's."""
    rng = np.random.default_rng(0)
    beads = residue_beads(model.structure)
    kept = rng.random(len(beads)) < 0.9
    return replace(
        beads,
        coords=beads.coords[kept],
        node=beads.node[kept],
        weights=beads.weights[kept] * rng.uniform(0.1, 2.0, kept.sum()),
        widths=beads.widths[kept] * rng.uniform(0.5, 3.0, kept.sum()),
    )


def test_files_keep_its_beads(model, tmp_path):
    """To the last digit, of each kind of number; and it still belongs to its model."""
    beads = learned_beads(model)
    population = replace(full_population(model), beads=beads)
    require_population(model, population)
    population.save(tmp_path / "p.safetensors")
    again = load_population(tmp_path / "p.safetensors")
    require_population(model, again)
    for name in ("coords", "node", "weights", "widths"):
        before, after = getattr(beads, name), getattr(again.beads, name)
        assert isinstance(after, np.ndarray) and after.dtype == before.dtype, name
        np.testing.assert_array_equal(after, before)
    assert again.description() == population.description()
    assert again.noise_spectrum is not None, "beside all else"
    restored = Population.restore(population.tensors(), population.description())
    np.testing.assert_array_equal(restored.beads.node, beads.node)
    latents, pose = torch.ones(2, model.n_latents), torch.eye(3).expand(2, 3, 3)
    drawn = [model.with_beads(one).render(latents, pose) for one in (beads, again.beads)]
    assert torch.equal(*drawn)
    assert full_population(model).beads is None
    full_population(model).save(tmp_path / "without.safetensors")
    assert load_population(tmp_path / "without.safetensors").beads is None


def test_tensors_of_its_beads_are_copies(model):
    beads = learned_beads(model)
    population = replace(full_population(model), beads=beads)
    before = beads.weights.copy()
    for tensor in population.tensors().values():
        if tensor.dtype == torch.float64 and len(tensor) == len(beads):
            tensor += 1
    np.testing.assert_array_equal(beads.weights, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda node: np.where(np.arange(len(node)) == 3, -1, node),
        lambda node: node + 1,
        lambda node: node[::-1],
        lambda node: np.where(np.arange(len(node)) == 0, node[-1], node),
    ],
    ids=["below", "above", "reversed", "one of another chain"],
)
def test_beads_that_do_not_belong_to_the_model_are_refused(model, change):
    beads = residue_beads(model.structure)
    n_nodes = model.structure.n_nodes
    wrong = replace(full_population(model), beads=replace(beads, node=change(beads.node)))
    with pytest.raises(
        ValueError,
        match=f"expected beads that move with nodes 0 to {n_nodes - 1}, chain by chain, got others",
    ):
        require_population(model, wrong)


def test_populations_of_an_earlier_version_have_white_noise(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    population = full_population(model)
    tensors = {name: population.tensors()[name] for name in ("mean", "covariance")}
    names = ("noise_std", "contrast", "fingerprint")
    meta = {name: population.description()[name] for name in names}
    again = Population.restore(tensors, meta)
    plain = Population(**tensors, **meta)
    assert again.description() == plain.description() and again.noise_spectrum is None
    assert again.junk_share > 0 and again.contrast_spread > 0 and again.noise_pixels > 0
    for name in names[:2]:
        with pytest.raises(TypeError, match=name):
            Population.restore(tensors, {k: v for k, v in meta.items() if k != name})


def test_a_body_that_turns_by_any_angle_is_thought_anywhere():
    """Its rotation vectors vary as those of random rotations do, and the joint stays closed."""
    selections = {
        "head": "chain A and resnum 1 to 150",
        "tail": "chain A and resnum 151 to 400",
        "other": "chain B",
    }
    halves = load_structure("glua3-closed", bodies=selections)
    dynamics = Dynamics(halves.with_turning("head"))
    plain = Dynamics(halves)
    prior = elastic_prior(dynamics)
    turns = dynamics.chains[0].rotation
    vectors = Rotation.random(20_000, random_state=0).as_rotvec() / dynamics.scale[turns]
    expected = np.square(vectors).mean(0)
    np.testing.assert_allclose(prior.variance[turns], expected, rtol=0.03)
    others = np.ones(dynamics.n_latents, dtype=bool)
    others[turns] = False
    np.testing.assert_array_equal(prior.variance[others], elastic_variance(plain)[others])
    # Nothing holds it at the joint, about which it turns.
    covariance = prior.covariance(prior.variance)
    np.testing.assert_allclose(covariance[turns, turns], prior.variance[turns].diag())
    latents = torch.zeros(500, dynamics.n_latents)
    latents[:, turns] = torch.from_numpy(vectors[:500]).float()
    edge = int(np.flatnonzero(halves.node_chain == 1)[0])
    moved = dynamics.decode(latents)
    assert float((moved[:, edge] - moved[:, edge - 1]).norm(dim=1).max()) < 4.0
