"""Conformations against maps: what moved is confirmed, and noise that was followed is not."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from cryochains import Model, compute_pca, morph, refine, simulate_particles
from cryochains.analysis import (
    EndsComparison,
    MapComparison,
    compare_ends,
    compare_with_map,
    split_noise,
)
from cryochains.images import reconstruct
from cryochains.inference import Result
from cryochains.model import elastic_prior, rotvec_to_matrix

QUIET = {"progress": False}
N = 240


def shifted_latents(model, distances):
    """(n, p) latents in which chain A shifts along x by these Å."""
    latents = torch.zeros(len(distances), model.n_latents)
    latents[:, model.dynamics.chains[0].translation.start] = torch.as_tensor(distances).float()
    return latents


def moving_result(closed, distances, **settings) -> Result:
    """Chain A shifts by these Å; the latents are the true ones."""
    model = Model(closed, modes=None, box_size=32, pixel_size=4.5)
    latents = shifted_latents(model, distances)
    particles = simulate_particles(
        closed,
        len(distances),
        dynamics=model.dynamics,
        latents=latents,
        box_size=32,
        pixel_size=4.5,
        **QUIET,
        **settings,
    )
    return Result(model, latents, particles=particles)


@pytest.fixture(scope="module")
def moving(closed) -> Result:
    return moving_result(closed, np.linspace(-6, 6, N), snr_db=10)


def test_the_true_conformation_agrees_better(moving):
    rows = moving.latents.abs().max(1).values > 4
    rows &= moving.latents.sum(1) > 0
    # The latents were given and not found in these images.
    comparison = compare_with_map(moving, rows, images=moving.particles, **QUIET)
    assert comparison.favours_own and comparison.significance > 5
    assert comparison.map.n_particles == int(rows.sum())
    assert "agrees better with their mean conformation than with the reference" in repr(comparison)
    assert comparison.chain_ids == ("A", "B")
    own, other = (int(np.flatnonzero(comparison.line == where)[0]) for where in (1, 0))
    assert (comparison.chain_correlation[:, own] > comparison.chain_correlation[:, other]).all()
    assert comparison.chain_position == pytest.approx(np.ones(2), abs=0.25)
    assert (np.diff(comparison.of_halves, axis=1) < 0).all(), "in both halves"
    assert comparison.fsc_own[1:8].mean() > comparison.fsc_other[1:8].mean()
    wrong = compare_with_map(
        moving, rows, images=moving.particles, other=-moving.latents[rows].mean(0), **QUIET
    )
    assert wrong.difference > comparison.difference


def test_the_residual_is_what_the_other_lacks(moving):
    """Beside its own conformation a map shows less than beside the other."""
    rows = moving.latents.sum(1) > 3
    comparison = compare_with_map(moving, rows, **QUIET)
    beside_other = replace(comparison, own=comparison.other)
    left = comparison.residual.volume.std()
    assert left < 0.8 * beside_other.residual.volume.std()
    assert left < 0.5 * comparison.shown.std()
    assert comparison.residual_significance < beside_other.residual_significance
    # As bright as the model says: the density was not fitted to the map.
    product = (comparison.shown * comparison.own).sum() / np.square(comparison.own).sum()
    assert product == pytest.approx(1, abs=0.15)


def test_both_ends_agree_better_with_their_own(moving):
    motions = compute_pca(moving, kind="rigid")
    ends = compare_ends(motions, images=moving.particles, **QUIET)
    assert isinstance(ends, EndsComparison) and ends.confirmed
    assert ends.low.significance > 3 and ends.high.significance > 3
    assert ends.distance > 2
    assert "maps of the images alone confirm the motion" in repr(ends)
    for end in (ends.low, ends.high):
        assert end.chain_position == pytest.approx(np.ones(2), abs=0.3)


def test_latents_that_saw_the_images_claim_nothing(moving):
    with pytest.raises(ValueError, match="expected a refined result"):
        compare_ends(compute_pca(moving), **QUIET)
    comparison = compare_with_map(moving, **QUIET)
    assert not comparison.favours_own and "no difference is claimed" in repr(comparison)


def test_the_same_conformation_twice_is_no_difference(moving):
    own = moving.in_frame().latents.mean(0)
    comparison = compare_with_map(moving, images=moving.particles, other=own, **QUIET)
    assert comparison.difference == pytest.approx(0, abs=1e-5)
    assert not comparison.favours_own


def test_the_error_is_that_of_the_noise(closed):
    """Random directions that no image knows of: as many standard errors as a normal number."""
    n = 60
    still = moving_result(closed, np.zeros(24 * n), snr_db=0)
    n_latents = still.model.n_latents
    steps = torch.randn(24, n_latents, generator=torch.Generator().manual_seed(0)) / 10
    # Within the molecule: a common turn or shift would move the map too.
    steps = Result(still.model, steps).in_frame().latents
    significance = []
    for number, step in enumerate(steps):
        some = still[n * number : n * (number + 1)]
        moved = replace(some, latents=step.repeat(n, 1))
        comparison = compare_with_map(moved, other=-step, images=some.particles, **QUIET)
        significance.append(comparison.significance)
    assert 0.5 < np.std(significance) < 1.4
    assert np.abs(significance).max() < 4


def test_images_of_others_are_refused(moving):
    with pytest.raises(ValueError, match="expected"):
        compare_with_map(moving, images=moving.particles[::-1], **QUIET)
    with pytest.raises(ValueError, match="expected a result with its particles"):
        compare_with_map(replace(moving, particles=None, particles_digest=None), **QUIET)
    with pytest.raises(ValueError, match="expected 4 particles or more"):
        compare_with_map(moving, rows=[0, 1, 2], **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"component": 9}, "expected a component from 0 to"),
        ({"share": 0.7}, "expected a share between 0 and 0.5"),
        ({"share": 0.01}, "expected 4 particles or more"),
    ],
)
def test_ends_that_do_not_exist_are_refused(moving, settings, message):
    with pytest.raises(ValueError, match=message):
        compare_ends(compute_pca(moving), **settings, **QUIET)


def test_split_noise_needs_noise(moving):
    with pytest.raises(ValueError, match="expected a refined result"):
        split_noise(moving, **QUIET)


# With refinements


def refined(closed, conformations, seed) -> Result:
    particles = simulate_particles(
        closed, 200, conformations=conformations, box_size=32, seed=seed, **QUIET
    )
    return refine(Model(closed, particles, modes=2), particles, **QUIET)


@pytest.fixture(scope="module")
def still(closed) -> Result:
    return refined(closed, closed.coords[None], 1)


def test_split_images_share_no_noise(still):
    again, images = split_noise(still, blurs=(4.0, 0.0), **QUIET)
    assert again.ids.tolist() == images.ids.tolist()
    noisier = again.particles.read_images()
    both = (noisier + images.read_images()) / 2
    torch.testing.assert_close(both, still[still.shows_molecule].particles.read_images())
    truth = simulate_particles(
        still.model.structure,
        200,
        conformations=still.model.structure.coords[None],
        box_size=32,
        seed=1,
        snr_db=np.inf,
        **QUIET,
    ).read_images()[still.shows_molecule]
    first, second = noisier - truth, images.read_images() - truth
    assert abs(float((first * second).mean())) < 0.03 * float(first.square().mean())
    few, _ = split_noise(still, n_particles=30, blurs=(4.0, 0.0), **QUIET)
    assert len(few) == 30


def test_nothing_is_claimed_where_nothing_moves(still):
    again, images = split_noise(still, **QUIET)
    ends = compare_ends(compute_pca(again), images=images, **QUIET)
    assert not ends.confirmed and not ends.low.favours_own and not ends.high.favours_own
    assert "not confirmed" in repr(ends)
    comparison = compare_with_map(again, images=images, **QUIET)
    assert isinstance(comparison, MapComparison) and not comparison.favours_own
    assert "agrees no better" in comparison.sentence
    # Why images are split: where a wide population lets particles follow noise, both ends seem to
    # be confirmed in the images that they were found in.
    prior = elastic_prior(still.model.dynamics)
    wide = replace(still.population, covariance=prior.covariance(prior.variance))
    noise = refine(still.model, still.particles, wide, **QUIET)
    followed = compare_ends(compute_pca(noise), images=noise.particles, **QUIET)
    assert followed.low.significance > 3 and followed.high.significance > 3


@pytest.mark.parametrize("moves", [True, False])
def test_corrected_poses_resolve_what_true_ones_do(pair, moves):
    """Poses are off by 3° and 2 Å; the map at those given resolves less."""
    closed, opened = pair
    path = morph(closed, opened, 20) if moves else closed.coords[None]
    particles = simulate_particles(
        closed, 160, conformations=path, box_size=48, snr_db=0, seed=2, **QUIET
    )
    generator = torch.Generator().manual_seed(0)
    turns = rotvec_to_matrix(0.03 * torch.randn(160, 3, generator=generator))
    shifts = 2 * torch.randn(160, 2, generator=generator)
    given = replace(
        particles, rotations=turns @ particles.rotations, shifts=particles.shifts + shifts
    )
    result = refine(Model(closed, given, modes=2), given, **QUIET).in_frame()
    corrected, true, off = (
        reconstruct(stack, **QUIET).resolution for stack in (result.particles, particles, given)
    )
    assert corrected < 1.2 * true
    assert off > 1.2 * true


def test_a_motion_is_confirmed(pair):
    closed, opened = pair
    result = refined(closed, morph(closed, opened, 20), 0)
    again, images = split_noise(result, **QUIET)
    ends = compare_ends(compute_pca(again), images=images, **QUIET)
    assert ends.confirmed
    comparison = compare_with_map(again, images=images, **QUIET)
    assert comparison.favours_own, "the mean of the path is not the closed state"


def test_images_of_another_box_are_refused(moving):
    smaller = replace(
        moving.particles, images=moving.particles.read_images()[:, ::2, ::2], pixel_size=9.0
    )
    with pytest.raises(ValueError, match="expected"):
        compare_with_map(moving, images=smaller, **QUIET)


@pytest.mark.parametrize("other", [torch.zeros(1, 12), torch.full((12,), torch.nan)])
def test_another_conformation_is_one_row_of_latents(moving, other):
    with pytest.raises(ValueError, match=r"expected latents \(12,\), finite"):
        compare_with_map(moving, other=other, **QUIET)


def test_a_chain_that_does_not_move_is_nowhere_on_the_line(moving):
    own = moving.in_frame().latents.mean(0)
    comparison = compare_with_map(moving, other=own, **QUIET)
    assert np.isnan(comparison.chain_position).all()
