"""What the reference lacks, in density or shape: it is recovered, and none invented."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree

import cryochains.inference.passes
import cryochains.inference.refinement
from cryochains.analysis import density_table
from cryochains.images import ParticleStack
from cryochains.inference import (
    Result,
    correct_reference,
    information_limit,
    load_result,
    refine,
    true_latents,
)
from cryochains.model import Dynamics, Model, simulate_particles
from cryochains.molecule import Structure, load_structure

N = 120


def distance(a, b) -> float:
    return float(np.sqrt(((a.coords - b.coords) ** 2).sum(1).mean()))


@pytest.fixture(scope="module")
def bent(closed):
    """The reference with residues displaced by 2 Å (RMS), alike within about 10 Å.

    Nothing that a rigid chain could do.
    """
    rng = np.random.default_rng(0)
    coords = closed.node_coords
    squares = ((coords[:, None] - coords) ** 2).sum(-1)
    near = np.exp(-squares / (2 * 10.0**2))
    field = near @ rng.standard_normal((closed.n_nodes, 3))
    for c in range(closed.n_chains):
        own = closed.node_chain == c
        offsets = coords[own] - closed.centers[c]
        turns = np.stack([np.cross(axis, offsets).ravel() for axis in np.eye(3)], 1)
        shifts = np.tile(np.eye(3), (own.sum(), 1))
        rigid = np.linalg.qr(np.concatenate([turns, shifts], 1))[0]
        field[own] -= (rigid @ (rigid.T @ field[own].ravel())).reshape(-1, 3)
    field *= 2.0 / np.sqrt((field**2).sum(1).mean())
    return closed.with_coords(closed.atoms.getCoords() + field[closed.atom_node])


def simulate_and_refine(truth, closed) -> Result:
    """Particles whose rigid chains shift and turn about `truth`, refined around `closed`."""
    dynamics = Dynamics(truth)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(N, dynamics.n_latents, generator=generator)
    particles = simulate_particles(
        truth,
        N,
        dynamics=dynamics,
        latents=latents,
        box_size=48,
        snr_db=0.0,
        seed=3,
        progress=False,
    )
    return refine(Model(closed, particles, modes=None), particles, progress=False)


@pytest.fixture(scope="module")
def mismatched(bent, closed) -> Result:
    return simulate_and_refine(bent, closed)


def floor(model, particles) -> float:
    return float(true_latents(model, particles)[1].square().mean().sqrt())


def test_a_shared_change_of_shape_is_recovered(mismatched, bent, closed):
    corrected = correct_reference(mismatched)
    assert distance(corrected, bent) < 0.6 * distance(closed, bent)
    particles = mismatched.particles
    again = Model(corrected, particles, modes=None)
    assert floor(again, particles) < 0.6 * floor(mismatched.model, particles)
    assert corrected.content_hash != closed.content_hash
    assert corrected.chain_ids == closed.chain_ids


def test_a_correct_reference_stays_within_the_noise(closed):
    """A few tenths of an Å from 120 particles of 0 dB, of the 2 Å that are recovered above."""
    assert distance(correct_reference(simulate_and_refine(closed, closed)), closed) < 0.5


def test_what_chains_can_do_themselves_is_left_to_them(mismatched, closed):
    """The field has no part along a chain's turn, shift or modes."""
    particles = mismatched.particles
    model = Model(closed, particles, modes=5)
    result = refine(model, particles, blurs=(4.0, 0.0), progress=False)
    corrected = correct_reference(result)
    field = torch.from_numpy(corrected.coords - closed.coords).float()
    for chain, layout in enumerate(model.dynamics.chains):
        reference = torch.zeros(1, model.n_latents)
        tangents = model.dynamics.tangents(reference, chain)[0].flatten(1)
        along = tangents @ field[layout.atoms].flatten() / tangents.norm(dim=1)
        assert along.abs().max() < 1e-3 * field.norm()


def test_the_model_and_the_result_are_not_changed(mismatched):
    """Nor does the correction depend on who asked before."""
    latents = mismatched.latents.clone()
    std = mismatched.std.clone()
    coords = mismatched.model.structure.coords.copy()
    first = correct_reference(mismatched, n_particles=20)
    second = correct_reference(mismatched, n_particles=20)
    assert np.array_equal(first.coords, second.coords)
    assert torch.equal(mismatched.latents, latents)
    assert torch.equal(mismatched.std, std)
    assert np.array_equal(mismatched.model.structure.coords, coords)


def test_the_refinement_of_other_particles_is_refused(mismatched):
    """Particles and latents that do not belong together make no result at all."""
    with pytest.raises(ValueError, match="expected .*particles.* got"):
        replace(mismatched, particles=mismatched.particles[:10])
    with pytest.raises(ValueError, match="expected particles with the ids of the result"):
        replace(mismatched, particles=mismatched.particles[::-1])
    with pytest.raises(ValueError, match="expected latents"):
        replace(mismatched, latents=mismatched.latents[:, :3])


def test_what_is_not_a_refinement_is_refused(mismatched):
    for missing in ("particles", "population", "std"):
        with pytest.raises(ValueError, match="expected the refinement of .* try refine"):
            correct_reference(replace(mismatched, **{missing: None}))


# Density


@pytest.fixture(scope="module")
def lost(closed) -> np.ndarray:
    """30 residues in a row of chain B, at the surface."""
    rows = np.flatnonzero(closed.node_chain == 1)
    tree = cKDTree(closed.node_coords)
    crowd = np.array([len(near) for near in tree.query_ball_point(closed.node_coords[rows], 12.0)])
    first = rows[np.convolve(crowd, np.ones(30), mode="valid").argmin()]
    return np.arange(first, first + 30)


@pytest.fixture(scope="module")
def incomplete(closed, lost) -> Structure:
    kept = np.flatnonzero(~np.isin(closed.atom_node, lost))
    return load_structure(closed.atoms[kept]).with_origin(closed.origin)


def particles_of(structure) -> ParticleStack:
    dynamics = Dynamics(structure)
    generator = torch.Generator().manual_seed(4)
    return simulate_particles(
        structure,
        N,
        dynamics=dynamics,
        latents=torch.randn(N, dynamics.n_latents, generator=generator),
        box_size=48,
        pixel_size=2.6,
        seed=5,
        progress=False,
    )


@pytest.fixture(scope="module")
def lacking(closed, incomplete) -> Result:
    """Particles of the whole molecule, and a reference without 30 of its residues."""
    particles = particles_of(closed)
    return refine(Model(incomplete, particles, modes=5), particles, progress=False)


def names_of(structure, nodes) -> tuple[int, int]:
    numbers = structure.atoms.getResnums()[structure.node_rows[nodes]]
    return int(numbers.min()), int(numbers.max())


def test_density_that_the_reference_lacks_is_learned(lacking, closed, incomplete, lost):
    beads = lacking.population.beads
    table = density_table(lacking)
    beside = table["beside (residues)"].sum()
    assert 20 < beside < 45, "30 residues"
    # It is where they are.
    extra = beads.coords[beads.widths == 3.0]
    weights = beads.weights[beads.widths == 3.0]
    distance, _ = cKDTree(closed.node_coords[lost]).query(extra)
    assert weights[distance < 6].sum() > 0.75 * weights.sum()
    assert table["occupancy"].between(0.4, 1.6).all()
    assert (lacking.model.beads.widths < 3).all(), "the model is as it was"
    finding = {part.name: part for part in lacking.verdict.findings}["density"]
    assert finding.grade == "doubtful" and "the reference lacks" in finding.sentence
    assert "chain B" in finding.sentence


def test_learned_density_explains_the_images_as_the_residues_would(lacking, closed, monkeypatch):
    particles = lacking.particles
    complete = refine(Model(closed, particles, modes=5), particles, progress=False)
    monkeypatch.setattr(cryochains.inference.refinement, "learn_beads", lambda *_, **__: None)
    ignored = refine(lacking.model, particles, progress=False)
    assert ignored.population.beads is None
    best, learned, worst = (
        result.history[-1]["correlation"] for result in (complete, lacking, ignored)
    )
    assert best - learned < 0.25 * (best - worst)


def test_residues_that_are_not_there_are_named(closed, incomplete, lost):
    particles = particles_of(incomplete)
    result = refine(Model(closed, particles, modes=None), particles, progress=False)
    occupancy = density_table(result)["occupancy"].to_numpy()
    assert np.median(occupancy[lost]) < 0.3
    assert np.median(np.delete(occupancy, lost)) == pytest.approx(1, abs=0.1)
    finding = {part.name: part for part in result.verdict.findings}["density"]
    first, last = map(int, re.search(r"chain B (\d+)–(\d+) hardly seen", finding.sentence).groups())
    true_first, true_last = names_of(closed, lost)
    assert abs(first - true_first) <= 4 and abs(last - true_last) <= 4


def test_a_reference_that_lacks_nothing_keeps_its_beads(closed):
    particles = particles_of(closed)
    result = refine(Model(closed, particles, modes=5), particles, progress=False)
    assert result.population.beads is None
    assert (density_table(result)["occupancy"] == 1).all()
    assert "density" not in {part.name for part in result.verdict.findings}


def test_held_out_particles_and_files_know_the_density(lacking, tmp_path):
    few = lacking.particles[:10]
    again = refine(lacking.model, few, lacking.population, progress=False)
    near = (again.decode() - lacking[:10].decode()).square().sum(2).mean().sqrt()
    assert near < 0.5
    lacking.save(tmp_path / "r.safetensors")
    loaded = load_result(tmp_path / "r.safetensors")
    for name in ("coords", "node", "weights", "widths"):
        before = getattr(lacking.population.beads, name)
        np.testing.assert_array_equal(getattr(loaded.population.beads, name), before)
    latents = lacking.latents[:2]
    pose = (few.rotations[:2], few.shifts[:2])
    seen, plain = (m.render(latents, *pose) for m in (loaded.imaging_model, loaded.model))
    assert (seen - plain).square().mean() > 0.01 * plain.square().mean()
    limits = [
        information_limit(lacking.model, few, population, latents=lacking.latents[:10])
        for population in (lacking.population, replace(lacking.population, beads=None))
    ]
    assert not np.allclose(*limits, rtol=1e-3)


SHORT = {"blurs": (4.0, 2.0, 0.0, 0.0), "progress": False}


@pytest.fixture(scope="module")
def whole(lacking) -> Result:
    return refine(lacking.model, lacking.particles[:40], **SHORT)


@pytest.mark.parametrize("n_passes", [3, 5, 8])
def test_a_run_that_was_cut_resumes_exactly(lacking, whole, tmp_path, monkeypatch, n_passes):
    """Cut while beads are the model's own, and after they were learned once and twice."""
    particles = lacking.particles[:40]
    assert whole.population.beads is not None
    checkpoint = tmp_path / "run.safetensors"
    original = cryochains.inference.passes.one_pass
    passes = iter(range(n_passes))

    def cut(*arguments):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cryochains.inference.passes, "one_pass", cut)
        refine(lacking.model, particles, checkpoint=checkpoint, **SHORT)
    learn = cryochains.inference.refinement.learn_beads

    def learn_elsewhere(*arguments, **settings):
        """As on another machine, once the beads are in a checkpoint."""
        beads = learn(*arguments, **settings)
        if n_passes == 8:
            beads = replace(beads, weights=np.nextafter(beads.weights, 9.0))
        return beads

    monkeypatch.setattr(cryochains.inference.refinement, "learn_beads", learn_elsewhere)
    resumed = refine(lacking.model, particles, checkpoint=checkpoint, **SHORT)
    assert torch.equal(resumed.latents, whole.latents)
    assert torch.equal(resumed.std, whole.std)
    assert resumed.history == whole.history


@pytest.fixture(scope="module")
def blocks(lacking) -> Result:
    """As `whole`, of more particles than the population is learned from."""
    result = refine(lacking.model, lacking.particles[:60], n_population=30, **SHORT)
    assert result.population.beads is not None
    return result


def refine_until(n_passes, *arguments, **settings) -> None:
    """A refinement that is cut off after so many passes."""
    original = cryochains.inference.passes.one_pass
    passes = iter(range(n_passes))

    def cut(*arguments):
        if next(passes, None) is None:
            raise KeyboardInterrupt
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cryochains.inference.passes, "one_pass", cut)
        refine(*arguments, **settings)


def assert_same(resumed: Result, whole: Result) -> None:
    for name in ("latents", "std", "scale", "noise", "responsibility"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name)), name
    assert resumed.history == whole.history
    for name in ("coords", "node", "weights", "widths"):
        of_both = (getattr(one.population.beads, name) for one in (resumed, whole))
        np.testing.assert_array_equal(*of_both)


@pytest.mark.parametrize("n_passes", [4, 7])
def test_a_run_goes_on_where_beads_would_be_learned_otherwise(
    lacking, whole, tmp_path, monkeypatch, n_passes
):
    """As on another machine, by a rounding error: those that were learned are kept."""
    particles = lacking.particles[:40]
    settings = {**SHORT, "checkpoint": tmp_path / "run.safetensors"}
    refine_until(n_passes, lacking.model, particles, **settings)
    original = cryochains.inference.refinement.learn_beads

    def learn(*arguments, **settings):
        beads = original(*arguments, **settings)
        return None if beads is None else replace(beads, weights=np.nextafter(beads.weights, 9))

    monkeypatch.setattr(cryochains.inference.refinement, "learn_beads", learn)
    resumed = refine(lacking.model, particles, **settings)
    torch.testing.assert_close(resumed.latents, whole.latents, rtol=0, atol=1e-2)

    def learn_again(*arguments, **settings):
        raise AssertionError("they are in the checkpoint")

    # And those that were learned now are read too.
    monkeypatch.setattr(cryochains.inference.refinement, "learn_beads", learn_again)
    assert_same(refine(lacking.model, particles, **settings), resumed)


@pytest.mark.parametrize("n_passes", [5, 8, 12, 16])
def test_a_run_in_blocks_that_was_cut_resumes_exactly(lacking, blocks, tmp_path, n_passes):
    """Cut while beads are learned, and within a block of particles beyond `n_population`."""
    particles = lacking.particles[:60]
    settings = {**SHORT, "n_population": 30, "checkpoint": tmp_path / "run.safetensors"}
    refine_until(n_passes, lacking.model, particles, **settings)
    assert_same(refine(lacking.model, particles, **settings), blocks)


def test_files_that_an_earlier_run_left_do_not_stop_a_new_one(lacking, whole, tmp_path):
    """Where its first state is gone; other files are let be."""
    settings = {**SHORT, "checkpoint": tmp_path}
    refine_until(13, lacking.model, lacking.particles[:60], **settings, n_population=30)
    left = {path.stem for path in tmp_path.glob("*.safetensors")}
    assert left >= {f"block1{part}" for part in ("", "-beads1", "-beads2")}
    (tmp_path / "block1.safetensors").unlink()
    kept = [tmp_path / f"{name}.safetensors" for name in ("block", "other-beads1")]
    for path in kept:
        path.write_text("not ours")
    assert_same(refine(lacking.model, lacking.particles[:40], **settings), whole)
    assert all(path.read_text() == "not ours" for path in kept)
    assert not (tmp_path / "block2.safetensors").exists()


def test_beads_of_another_run_are_refused(lacking, tmp_path):
    particles = lacking.particles
    one, other = (tmp_path / name for name in ("one", "other"))
    refine_until(4, lacking.model, particles[:40], **SHORT, checkpoint=one)
    refine_until(3, lacking.model, particles[5:45], **SHORT, checkpoint=other)
    (one / "block1-beads1.safetensors").rename(other / "block1-beads1.safetensors")
    with pytest.raises(ValueError, match="of these 40 particles .*got one whose particles differ"):
        refine(lacking.model, particles[5:45], **SHORT, checkpoint=other)
