"""The search over orientations: against a plain likelihood, and turns that are found."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

import cryochains.inference.search
from cryochains.inference import Result, load_result, refine
from cryochains.inference.docking import compare_with, even_rotations
from cryochains.inference.search import Starts, search_turns, turning_bodies
from cryochains.model import Model, simulate_particles
from cryochains.molecule import Structure, load_structure

QUIET = {"progress": False}
BODIES = {
    "head": "chain A and resnum 1 to 107",
    "tail": "chain A and resnum > 107",
    "other": "chain B",
}
FAB = {
    "Fab": "(chain H and resnum 1 to 230) or chain L",
    "other Fab": "(chain K and resnum 1 to 230) or chain M",
    "Fc": "(chain H or chain K) and resnum > 230",
}


def turned_particles(
    structure: Structure, bodies: list[str], n: int, seed: int = 0, **settings
) -> tuple[Model, object, np.ndarray]:
    """Model, particles, and the (n, n_bodies, 3, 3) rotations of these bodies about their joints.

    Every angle is as likely as any other.
    """
    model = Model(structure, modes=None, box_size=128, pixel_size=3.0)
    latents = torch.zeros(n, model.n_latents)
    turns = []
    for number, name in enumerate(bodies):
        layout = model.dynamics.chains[structure.chain_ids.index(name)].rotation
        directions = Rotation.random(n, random_state=seed + number).apply([0.0, 0.0, 1.0])
        angles = np.random.default_rng(seed).uniform(0, np.pi, n)
        turn = Rotation.from_rotvec(angles[:, None] * directions)
        turns.append(turn.as_matrix())
        latents[:, layout] = torch.from_numpy(
            turn.as_rotvec() / model.dynamics.scale[layout]
        ).float()
    particles = simulate_particles(
        structure, n, dynamics=model.dynamics, latents=latents, seed=seed, **QUIET, **settings
    )
    return Model(structure, particles, modes=None), particles, np.stack(turns, axis=1)


def degrees_off(model: Model, latents: torch.Tensor, turns: np.ndarray, names: list) -> np.ndarray:
    """(n, n_bodies) angles between the turns of bodies and the true ones."""
    angles = []
    for number, name in enumerate(names):
        rotvecs = model.dynamics.rotvecs(latents, model.structure.chain_ids.index(name))
        off = Rotation.from_rotvec(rotvecs.numpy()).inv() * Rotation.from_matrix(turns[:, number])
        angles.append(np.degrees(off.magnitude()))
    return np.stack(angles, axis=1)


@pytest.fixture(scope="module")
def head() -> Structure:
    return load_structure("glua3-closed", bodies=BODIES)


@pytest.fixture(scope="module")
def turned(head):
    return turned_particles(head.with_turning("head"), ["head"], 24, box_size=32, snr_db=10.0)


@pytest.fixture(scope="module")
def refined(turned) -> Result:
    model, particles, _ = turned
    return refine(model, particles, **QUIET)


def test_a_body_that_turns_by_any_angle_is_found(turned, refined):
    model, _, turns = turned
    off = degrees_off(model, refined.latents, turns, ["head"])
    assert np.mean(off < 10) >= 0.95
    assert refined.verdict.trusted


def test_it_is_not_found_without_a_search(head, turned):
    _, particles, turns = turned
    model = Model(head, particles, modes=None)
    result = refine(model, particles, check=False, blurs=(8.0, 4.0, 0.0), **QUIET)
    assert np.mean(degrees_off(model, result.latents, turns, ["head"]) < 10) < 0.7


def test_particles_that_are_held_out_are_found_too(turned, refined):
    model, _, _ = turned
    _, others, turns = turned_particles(
        model.structure,
        ["head"],
        16,
        seed=5,
        box_size=32,
        pixel_size=model.pixel_size,
        snr_db=10.0,
    )
    result = refine(model, others, refined.population, **QUIET)
    assert np.mean(degrees_off(model, result.latents, turns, ["head"]) < 10) >= 0.9


def test_two_bodies_are_found_whatever_the_order():
    halves = {
        "head": "chain A and resnum 1 to 107",
        "second head": "chain B and resnum 1 to 107",
        "rest": "resnum > 107",
    }
    names = ["head", "second head"]
    structure = load_structure("glua3-closed", bodies=halves).with_turning(*names)
    model, particles, turns = turned_particles(structure, names, 24, box_size=48, snr_db=10.0)
    starts = search_turns(model, particles, torch.zeros(model.n_latents), **QUIET)
    assert len(starts.others) == len(starts.behind) == 3
    assert np.mean(degrees_off(model, starts.latents, turns, names) < 20) >= 0.9


def test_scores_are_the_likelihoods_of_rendered_images(turned, monkeypatch):
    """A body whose beads are drawn one by one, in some orientations: nothing but the images."""
    monkeypatch.setattr(cryochains.inference.search, "_CUBE", 1e-4)
    model, particles, _ = turned
    few = particles[:5]
    box = cryochains.inference.search._coarse_box(model)
    comparison = compare_with(model, few, np.arange(5), box)
    latents = torch.zeros(5, model.n_latents)
    # The others need not be where the reference has them.
    latents[:, model.dynamics.chains[1].translation] = torch.tensor([3.0, -2.0, 1.0])
    latents[:, model.dynamics.chains[0].translation] = torch.tensor([1.0, 2.0, -1.0])
    drawn = torch.tensor([False, True, True])
    shape, points = cryochains.inference.search._coarse_body(model, comparison, latents[0], 0)
    terms = cryochains.inference.search._image_terms(model, comparison, latents, 0, drawn)
    grid = torch.from_numpy(even_rotations(7)).float()
    scores = cryochains.inference.search._scores(comparison, shape, points, terms, grid)
    counted = comparison.inverse_noise.float()[comparison.ring] * comparison.weights.square()
    views = comparison.views
    for number, orientation in enumerate(grid):
        turns = views.rotations.mT @ orientation
        there = cryochains.inference.search._turned(model, latents, 0, turns)
        positions = model.microscope.image_positions(
            model.bead_dynamics.decode(there), views.rotations, views.shifts
        )
        image = views.transfer * model.microscope.spectrum(positions, box_size=box)
        image = comparison.magnification * image
        overlap = (counted * (image.conj() * views.spectra).real).sum((1, 2))
        power = (counted * image.abs().square()).sum((1, 2))
        expected = overlap.clamp_min(0).square() / (2 * power)
        # Pixels as coarse as these draw an atom a little otherwise wherever it is between them.
        torch.testing.assert_close(scores[:, number], expected, rtol=0.05, atol=0.1)
    assert (scores.max(1).values > 1.15 * scores.min(1).values).all()


def test_the_second_orientation_is_another_one(turned):
    model, particles, _ = turned
    starts = search_turns(model, particles, torch.zeros(model.n_latents), **QUIET)
    first, second = (
        Rotation.from_rotvec(model.dynamics.rotvecs(latents, 0).numpy())
        for latents in (starts.latents, starts.others[0])
    )
    assert (first.inv() * second).magnitude().min() > math.radians(29)
    assert (starts.behind[0] >= 0).all()
    # Nothing else moves.
    still = np.ones(model.n_latents, dtype=bool)
    still[model.dynamics.chains[0].rotation] = False
    assert (starts.latents[:, still] == 0).all() and (starts.others[0][:, still] == 0).all()


def test_a_second_start_mends_what_the_search_confused(turned, refined, monkeypatch):
    """The search's first and second answers swapped: the refinement takes the likelier one."""
    model, particles, turns = turned

    def confused(*args) -> Starts:
        starts = search_turns(*args)
        zeros = torch.zeros(len(particles))
        return Starts(starts.others[0], (starts.latents,), (zeros,), starts.score)

    monkeypatch.setattr(cryochains.inference.restarts, "search_turns", confused)
    result = refine(model, particles, refined.population, **QUIET)
    assert np.mean(degrees_off(model, result.latents, turns, ["head"]) < 10) >= 0.95


def test_a_start_that_is_given_is_not_searched(turned, refined, monkeypatch):
    def refuse(*args):
        raise AssertionError("searched")

    monkeypatch.setattr(cryochains.inference.restarts, "search_turns", refuse)
    model, particles, turns = turned
    again = refine(model, particles, start=refined, blurs=0.0, **QUIET)
    assert np.mean(degrees_off(model, again.latents, turns, ["head"]) < 10) >= 0.95


def test_a_run_that_was_cut_is_resumed(turned, refined, tmp_path):
    model, particles, _ = turned
    path = tmp_path / "run.safetensors"
    for _ in range(2):
        result = refine(model, particles, checkpoint=path, **QUIET)
        assert torch.equal(result.latents, refined.latents)


def test_a_saved_result_knows_what_turns(refined, tmp_path):
    refined.save(tmp_path / "result.safetensors")
    loaded = load_result(tmp_path / "result.safetensors")
    assert loaded.model.structure.turning == ("head",)
    assert loaded.model.fingerprint == refined.model.fingerprint


def test_populations_of_bodies_that_turn_otherwise_are_refused(head, turned, refined):
    _, particles, _ = turned
    with pytest.raises(ValueError, match="structure or bodies"):
        refine(Model(head, particles, modes=None), particles, refined.population, **QUIET)


def test_nothing_is_searched_where_bodies_do_not_turn(head):
    structure = head.with_turning("head")
    settings = {"modes": 2, "box_size": 32, "pixel_size": 6.0}
    assert turning_bodies(Model(structure, **settings)) == [0]
    assert turning_bodies(Model(head, **settings)) == []
    assert turning_bodies(Model(structure, **settings, rotation=False)) == []


def test_the_fab_of_an_antibody_is_found(structures_dir):
    """Its two chains look alike when the Fab is turned by half a turn about its long axis."""
    structure = load_structure(structures_dir / "1hzh.pdb.gz", bodies=FAB).with_turning("Fab")
    model, particles, turns = turned_particles(
        structure, ["Fab"], 60, box_size=64, snr_db=0.0, shift_std=2.0
    )
    result = refine(model, particles, **QUIET)
    assert np.mean(degrees_off(model, result.latents, turns, ["Fab"]) < 10) >= 0.95
