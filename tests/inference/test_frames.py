"""A result in another frame: the same images, the way back, and errors of poses that are found."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from cryochains.analysis import compute_pca
from cryochains.images import load_particles
from cryochains.inference import Result, load_result, posterior_covariance, refine, score
from cryochains.model import Model, frame_jacobian, in_frame, simulate_particles
from cryochains.molecule import morph

N = 60
FRAMES = ["molecule", "A", "B"]
QUICK = {"blurs": (0.0,), "progress": False}
# RMS, of the given poses.
TURN_ERROR = 3.0
SHIFT_ERROR = 1.5


@pytest.fixture(scope="module")
def errors():
    """What is wrong with the given poses: rotation vectors in radians, and shifts in pixels."""
    rng = np.random.default_rng(0)
    turns = np.radians(TURN_ERROR) / 3**0.5 * rng.normal(size=(N, 3))
    return turns, SHIFT_ERROR / 2**0.5 * rng.normal(size=(N, 2))


@pytest.fixture(scope="module")
def star(pair, errors, tmp_path_factory):
    """Particles on a morph, in a file with wrong poses and a column of its own; and their truth."""
    folder = tmp_path_factory.mktemp("particles")
    particles = simulate_particles(
        pair[0],
        N,
        conformations=morph(*pair, 11),
        box_size=32,
        snr_db=5.0,
        shift_std=2.0,
        seed=1,
        progress=False,
    )
    turns, shifts = errors
    undone = torch.from_numpy(Rotation.from_rotvec(-turns).as_matrix())
    given = replace(
        particles,
        rotations=particles.rotations.double() @ undone,
        shifts=particles.shifts - particles.pixel_size * torch.from_numpy(shifts),
    )
    given.save(folder / "given.star")
    blocks = starfile.read(folder / "given.star")
    blocks["particles"]["rlnRandomSubset"] = 1 + np.arange(N) % 2
    blocks["particles"]["rlnMicrographName"] = [f"m{k:03d}.mrc" for k in range(N)]
    starfile.write(blocks, folder / "given.star", overwrite=True)
    return folder / "given.star", particles.truth


@pytest.fixture(scope="module")
def result(pair, star) -> Result:
    path, truth = star
    particles = replace(load_particles(path), truth=truth)
    return refine(Model(pair[0], particles, modes=3), particles, progress=False)


def assert_same(a: Result, b: Result):
    assert torch.equal(a.latents, b.latents) and torch.equal(a.std, b.std)
    assert a.ids.tolist() == b.ids.tolist()
    assert torch.equal(a.particles.rotations, b.particles.rotations)
    assert torch.equal(a.particles.shifts, b.particles.shifts)
    assert (a.frame, a.kind, a.history) == (b.frame, b.kind, b.history)
    assert a.particles_digest == b.particles_digest
    assert torch.equal(a.population.mean, b.population.mean)


# The same, seen from elsewhere


@pytest.mark.parametrize("frame", FRAMES)
def test_images_are_the_same(result, frame):
    seen = result.in_frame(frame)
    assert seen.frame == frame and len(seen) == N
    drawn = [
        one.model.render(one.latents, *next(one.particles.batches(N)).pose)
        for one in (result, seen)
    ]
    assert (drawn[0] - drawn[1]).norm() < 1e-5 * drawn[0].norm()
    assert torch.equal(seen.particles.read_images(), result.particles.read_images())
    expected = in_frame(result.model.dynamics, result.latents, frame)
    torch.testing.assert_close(seen.latents, expected.latents.float())


@pytest.mark.parametrize("frame", FRAMES)
def test_the_way_back_is_exact(result, frame):
    seen = result.in_frame(frame)
    assert seen.in_frame("poses") is result and result.in_frame("poses") is result
    assert seen.in_frame(frame) is seen and seen.in_frame(None) is seen
    for other in FRAMES:
        assert_same(seen.in_frame(other), result.in_frame(other))
    assert_same(result.in_frame(None), result.in_frame("molecule"))
    assert_same(result.in_frame(), result.in_frame("molecule"))


def test_what_has_no_frame_is_kept(result):
    seen = result.in_frame()
    assert seen.ids.tolist() == result.ids.tolist()
    assert (seen.kind, seen.history) == (result.kind, result.history)
    assert seen.model is result.model and seen.population is result.population
    assert torch.equal(seen.scale, result.scale)
    assert seen.particles.truth is result.particles.truth
    assert seen.particles_digest == seen.particles.metadata_digest() != result.particles_digest
    assert repr(seen) == repr(result)[:-1] + ", frame of the molecule)"
    assert repr(result.in_frame("A")).endswith(", frame of chain A)")


def test_rows_are_those_of_everything(result):
    rows = [7, 3, 12]
    part = result.in_frame()[rows]
    assert torch.equal(part.latents, result.in_frame().latents[rows])
    assert torch.equal(part.std, result.in_frame().std[rows])
    assert torch.equal(part.particles.rotations, result.in_frame().particles.rotations[rows])
    assert_same(part.in_frame("poses"), result[rows])
    torch.testing.assert_close(part.latents, result[rows].in_frame().latents)
    assert part[[0]].in_frame("B").ids.tolist() == [result.ids[7]]
    assert len(result.in_frame()[:0].in_frame("poses")) == len(result[:0].in_frame()) == 0


def test_without_particles_or_error_bars(result):
    alone = Result(result.model, result.latents)
    seen = alone.in_frame()
    assert seen.std is None and seen.particles is None and seen.particles_digest is None
    torch.testing.assert_close(seen.latents, result.in_frame().latents)
    correction = seen.pose_correction
    assert correction.shifts is None and correction.distances is None
    assert correction.turn_std is correction.angle_std is correction.shift_std is None
    np.testing.assert_allclose(correction.turns, result.pose_correction.turns)
    given = Result(result.model, result.latents, std=result.std)
    assert given.pose_correction.shift_std is given.pose_correction.distance_std is None


# Error bars


@pytest.mark.parametrize("frame", FRAMES)
def test_error_bars_are_those_of_independent_latents(result, frame):
    """Against many latents that are drawn, with error bars so small that all is linear."""
    generator = torch.Generator().manual_seed(0)
    std = 1e-3 * (0.5 + torch.rand(3, result.model.n_latents, generator=generator))
    few = Result(result.model, result.latents[:3], std=std, particles=result.particles[:3])
    seen = few.in_frame(frame)
    correction = seen.pose_correction
    rows = torch.arange(3).repeat_interleave(4000)
    noise = torch.randn(len(rows), std.shape[1], generator=generator, dtype=torch.float64)
    drawn = in_frame(seen.model.dynamics, few.latents[rows].double() + std[rows] * noise, frame)
    shifts = drawn.image_shifts(few.particles.rotations[rows], seen.model.microscope.origin)

    def spread(values):
        return values.view(3, 4000, -1).std(1)

    expected = spread(drawn.latents)
    torch.testing.assert_close(seen.std.double(), expected, rtol=0.06, atol=1e-6)
    np.testing.assert_allclose(correction.turn_std, spread(drawn.turns), rtol=0.06)
    np.testing.assert_allclose(correction.shift_std, spread(shifts), rtol=0.06)
    angles = spread(drawn.turns.norm(dim=1))[:, 0]
    np.testing.assert_allclose(correction.angle_std, angles, rtol=0.06)
    distances = spread(shifts.norm(dim=1))[:, 0]
    np.testing.assert_allclose(correction.distance_std, distances, rtol=0.06)


@pytest.mark.parametrize("frame", FRAMES)
def test_covariances_are_carried_into_the_frame(result, frame):
    rows = [5, 2]
    seen = result.in_frame(frame)
    given = posterior_covariance(result, rows)
    jacobian = frame_jacobian(result.model.dynamics, result.latents[rows], frame).latents
    expected = jacobian @ given.double() @ jacobian.mT
    torch.testing.assert_close(posterior_covariance(seen, rows).double(), expected)
    torch.testing.assert_close(posterior_covariance(seen[rows], [0, 1]).double(), expected)


# Files


def test_it_is_saved_as_it_was_given_with_its_frame(result, tmp_path):
    seen = result.in_frame("B")
    seen.save(tmp_path / "seen")
    result.save(tmp_path / "given")
    again = load_result(tmp_path / "seen")
    assert_same(again, seen)
    assert_same(again.in_frame("poses"), load_result(tmp_path / "given"))
    # Particles that are given have the given poses.
    for path, expected in (("seen", seen), ("given", result)):
        assert_same(load_result(tmp_path / path, result.particles[::-1]), expected)
    with pytest.raises(ValueError, match="others with the same ids: their poses"):
        load_result(tmp_path / "seen", seen.particles)


def test_corrected_poses_are_written_and_all_else_is_kept(result, star, tmp_path):
    seen = result.in_frame()
    seen.particles.save(tmp_path / "corrected.star", images=False)
    again = load_particles(tmp_path / "corrected.star")
    torch.testing.assert_close(again.rotations, seen.particles.rotations, rtol=0, atol=1e-5)
    torch.testing.assert_close(again.shifts, seen.particles.shifts, rtol=0, atol=1e-4)
    assert torch.equal(again.read_images(), result.particles.read_images())
    before, after = starfile.read(star[0]), starfile.read(tmp_path / "corrected.star")
    changed = {"rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi", "rlnOriginXAngst", "rlnOriginYAngst"}
    same = [name for name in before["particles"] if name not in changed | {"rlnImageName"}]
    assert {"rlnRandomSubset", "rlnMicrographName", "rlnDefocusU"} <= set(same)
    pd.testing.assert_frame_equal(
        after["particles"][same], before["particles"][same], check_exact=False, atol=1e-3
    )
    assert set(after["particles"]) >= set(before["particles"])


# Errors of the given poses


def test_motion_is_found_in_spite_of_wrong_poses(result):
    """3° and 1.5 px: in the frame of the poses, they are taken for motion."""
    inside, outside = score(result), score(result, frame="poses")
    assert inside.explained_motion > 0.7
    assert outside.explained_motion < 0
    spearman = score(result, compute_pca(result)).spearman
    in_poses = score(result, compute_pca(result, frame="poses")).spearman
    assert spearman > 0.95 > in_poses
    assert compute_pca(result).explained_variance_ratio[0] > 0.8


def test_errors_of_poses_are_found(result, errors):
    turns, shifts = errors
    correction = result.pose_correction
    assert correction.frame == "molecule" and len(correction) == N
    wrong = np.sqrt(np.mean(np.sum(turns**2, axis=1)))
    left = np.sqrt(np.mean(np.sum((correction.turns - turns) ** 2, axis=1)))
    assert left < 0.5 * wrong
    for axis in range(3):
        assert np.corrcoef(correction.turns[:, axis], turns[:, axis])[0, 1] > 0.8
    for axis in range(2):
        assert np.corrcoef(correction.shifts[:, axis], shifts[:, axis])[0, 1] > 0.98
    np.testing.assert_allclose(correction.angles, np.linalg.norm(correction.turns, axis=1))
    assert f"{np.degrees(np.sqrt(np.mean(correction.angles**2))):.2f}°" in repr(correction)


def test_the_correction_is_that_of_the_particles(result):
    for seen in (result.in_frame(), result.in_frame("B")):
        correction = seen.pose_correction
        turned = torch.from_numpy(Rotation.from_rotvec(correction.turns).as_matrix())
        rotations = result.particles.rotations.double() @ turned
        torch.testing.assert_close(seen.particles.rotations, rotations.float())
        shifts = seen.particles.shifts - result.particles.shifts
        np.testing.assert_allclose(shifts, correction.shifts, atol=1e-4)
        assert correction.frame == seen.frame


def test_a_refinement_starts_from_given_or_corrected_poses(result):
    seen = result.in_frame()
    population, model = result.population, result.model
    expected = refine(model, result.particles, population, start=result, **QUICK)
    given = refine(model, result.particles, population, start=seen, **QUICK)
    assert torch.equal(given.latents, expected.latents)
    # From the corrected ones what is left of the pose is small.
    corrected = refine(model, seen.particles, start=seen, **QUICK)
    before, after = result.pose_correction.angles, corrected.pose_correction.angles
    assert np.mean(after**2) < 0.25 * np.mean(before**2)
    assert score(corrected).explained_motion > 0.7
    with pytest.raises(ValueError, match="others with the same ids: their poses"):
        refine(model, result.in_frame("A").particles, start=seen, **QUICK)


# What does not belong together


def test_what_was_made_is_not_replaced(result):
    seen = result.in_frame()
    for change in (
        {"latents": 0.5 * seen.latents},
        {"std": None},
        {"std": seen.std.clone()},
        {"particles": None},
        {"particles": result.particles, "particles_digest": None},
        {"frame": "poses"},
        {"_given": None},
    ):
        with pytest.raises(
            ValueError, match=r"expected what in_frame.*; try .*in_frame\('poses'\)"
        ):
            replace(seen, **change)
    with pytest.raises(ValueError, match=r"expected what in_frame\('A'\) gives"):
        Result(result.model, result.latents, frame="A")
    # What has no frame can be.
    assert replace(seen, history=()).in_frame("poses") is result


def test_bad_questions(pair, result):
    with pytest.raises(ValueError, match="expected the frame 'molecule' or a chain of A, B, got"):
        result.in_frame("Q")
    latents = result.latents.clone()
    latents[3, 1] = torch.nan
    broken = Result(result.model, latents)
    sentence = "expected finite latents, got NaN or Inf in 1 of 60 particles"
    with pytest.raises(ValueError, match=sentence):
        broken.in_frame()
    with pytest.raises(ValueError, match=sentence):
        broken.pose_correction  # noqa: B018
    for switches in ({"rotation": False}, {"translation": False}):
        model = Model(pair[0], modes=2, box_size=32, pixel_size=5.0, **switches)
        one = Result(model, torch.zeros(4, model.n_latents))
        assert one.in_frame(None) is one and one.in_frame("poses") is one
        for question in (one.in_frame, lambda one=one: one.pose_correction):
            with pytest.raises(ValueError, match="expected a model whose chains turn and shift"):
                question()
