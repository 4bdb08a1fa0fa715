"""Things that do not belong together are refused, each with one sentence that says what differs."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cryochains.analysis import (
    PrincipalMotions,
    compute_pca,
    particle_columns,
    save_conformations,
)
from cryochains.images import ParticleStack
from cryochains.inference import (
    Encoder,
    Result,
    encode,
    information_limit,
    load_result,
    refine,
    score,
    train_encoder,
    true_latents,
)
from cryochains.model import Model, Population, simulate_particles
from cryochains.molecule import Structure, compute_modes, load_structure, residue_beads

N = 12
BOX, PIXEL = 32, 5.0
QUICK = {"blurs": (0.0,), "progress": False}
TRAINING = {"width": 0.05, "epochs": 1, "progress": False}
HALVES = {"A": "chain A and resnum 1 to 120", "B": "chain A and resnum 121 to 800 or chain B"}


@dataclass(frozen=True)
class Made:
    """What belongs together, and files of it."""

    structure: Structure
    particles: ParticleStack
    model: Model
    result: Result
    population: Population
    motions: PrincipalMotions
    encoder: Encoder
    checkpoint: Path
    training_checkpoint: Path
    saved: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    folder = tmp_path_factory.mktemp("made")
    structure = load_structure("glua3-closed")
    steps = np.linspace(0, 4, 5)[:, None, None]
    conformations = structure.coords + steps * (structure.chain_index == 1)[:, None]
    particles = simulate_particles(
        structure,
        N,
        conformations=conformations,
        box_size=BOX,
        pixel_size=PIXEL,
        snr_db=3.0,
        progress=False,
    )
    model = Model(structure, particles, modes=2)
    result = refine(model, particles, checkpoint=folder / "refine", **QUICK)
    result.save(folder / "result")
    encoder = train_encoder(
        model, particles[:8], particles[8:], checkpoint=folder / "train", **TRAINING
    )
    return Made(
        structure=structure,
        particles=particles,
        model=model,
        result=result,
        population=result.population,
        motions=compute_pca(result),
        encoder=encoder,
        checkpoint=folder / "refine",
        training_checkpoint=folder / "train",
        saved=folder / "result",
    )


def assert_one_sentence(error: ValueError, *words: str):
    message = str(error)
    assert "\n" not in message, message
    assert message.startswith("expected ") and "got " in message and "; try " in message, message
    for word in words:
        assert word in message, (word, message)


def test_what_belongs_together_is_taken(made):
    model, particles = made.model, made.particles
    again = refine(model, particles, checkpoint=made.checkpoint, **QUICK)
    assert torch.equal(again.latents, made.result.latents)
    refine(model, particles, made.population, start=made.result, **QUICK)
    twin = Model(made.structure, particles, modes=2)
    refine(twin, particles, made.population, start=encode(made.encoder, particles), **QUICK)
    assert load_result(made.saved, particles[::-1]).ids.tolist() == made.result.ids.tolist()
    assert score(load_result(made.saved, particles), made.motions).spearman is not None
    given = Result(twin, made.result.latents, particles=particles, population=made.population)
    np.testing.assert_array_equal(made.motions.transform(given), made.motions.scores)


# Another model

# What each is made of, how its latents look alike, and what the sentence must name.
MODELS = {
    "other modes": (lambda m: Model(m.structure, m.particles, modes=(3, 1)), "number of modes"),
    "other switches": (
        lambda m: Model(m.structure, m.particles, modes=5, translation=False),
        "whether chains turn and shift",
    ),
    "other network cutoff": (
        lambda m: Model(m.structure, m.particles, modes=compute_modes(m.structure, 2, cutoff=11)),
        "its modes",
    ),
    "modes in another order": (
        lambda m: Model(m.structure, m.particles, modes=swapped(m.model.modes)),
        "its modes",
    ),
    "other structure": (
        lambda m: Model(moved(m.structure), m.particles, modes=2),
        "structure or bodies",
    ),
    "other bodies": (
        lambda m: Model(load_structure("glua3-closed", bodies=HALVES), m.particles, modes=2),
        "structure or bodies",
    ),
    "other chain order": (
        lambda m: Model(load_structure("glua3-closed", chains="BA"), m.particles, modes=2),
        "structure or bodies",
    ),
    "other imaging atoms": (
        lambda m: Model(load_structure("glua3-closed", atoms="heavy"), m.particles, modes=2),
        "imaging atoms",
    ),
    "other origin": (
        lambda m: Model(
            m.structure.with_origin(m.structure.origin + [0, 0, 1.0]), m.particles, modes=2
        ),
        "origin",
    ),
    "other sigma": (
        lambda m: Model(m.structure, m.particles, modes=2, sigma=4.5),
        "width of an atom",
    ),
    "other box": (
        lambda m: Model(m.structure, modes=2, box_size=BOX + 2, pixel_size=PIXEL),
        "box size",
    ),
    "other pixel size": (
        lambda m: Model(m.structure, modes=2, box_size=BOX, pixel_size=PIXEL + 0.1),
        "pixel size",
    ),
}
OTHER_IMAGES = ("other box", "other pixel size")


def moved(structure) -> Structure:
    return structure.with_coords(structure.atoms.getCoords() + [0.0, 0.0, 0.01])


def swapped(modes):
    vectors = tuple(of_chain[::-1].copy() for of_chain in modes.vectors)
    return replace(modes, vectors=vectors)


@pytest.fixture(scope="module", params=MODELS)
def other(request, made):
    make, part = MODELS[request.param]
    model = make(made)
    assert model.n_latents == made.model.n_latents, "latents of one shape, and of another meaning"
    return request.param, model, part


USES = {
    "population of refine": lambda m, other: refine(other, m.particles, m.population, **QUICK),
    "checkpoint of refine": lambda m, other: refine(
        other, m.particles, checkpoint=m.checkpoint, **QUICK
    ),
    "start of refine": lambda m, other: refine(other, m.particles, start=m.result, **QUICK),
    "start by an encoder": lambda m, other: refine(
        other, m.particles, start=encode(m.encoder, m.particles), **QUICK
    ),
    "population of a result": lambda m, other: Result(
        other, m.result.latents, population=m.population
    ),
    "model of a result": lambda m, other: replace(m.result, model=other),
    "population of the limit": lambda m, other: information_limit(
        other, m.particles, m.population, m.result.latents
    ),
    "motions.transform": lambda m, other: m.motions.transform(Result(other, m.result.latents)),
    "motions of score": lambda m, other: score(
        m.result, compute_pca(Result(other, m.result.latents))
    ),
    "checkpoint of train_encoder": lambda m, other: train_encoder(
        other,
        m.particles[:8],
        m.particles[8:],
        checkpoint=m.training_checkpoint,
        **TRAINING,
    ),
}


def kept(made) -> tuple[bytes, bytes]:
    """What the folders of a refinement and of a training know."""
    refinement = made.checkpoint / "block1.safetensors"
    training = made.training_checkpoint / "training.safetensors"
    return refinement.read_bytes(), training.read_bytes()


@pytest.mark.parametrize("use", USES)
def test_another_model_is_refused(made, other, use):
    name, model, part = other
    # Images of another size are noticed first.
    takes_images = any(word in use for word in ("refine", "encoder", "limit"))
    words = ["px ×"] if takes_images and name in OTHER_IMAGES else ["Model(", part]
    before = kept(made)
    with pytest.raises(ValueError) as caught:
        USES[use](made, model)
    assert_one_sentence(caught.value, *words)
    assert kept(made) == before


# Other particles, and other shapes


def resume_with_other_beads(m) -> Result:
    """A run that was given a population, resumed with the same but for its beads."""
    checkpoint = m.checkpoint.with_name("with_population")
    refine(m.model, m.particles, m.population, checkpoint=checkpoint, **QUICK)
    beads = replace(m.model.beads, weights=m.model.beads.weights / 2)
    lighter = replace(m.population, beads=beads)
    return refine(m.model, m.particles, lighter, checkpoint=checkpoint, **QUICK)


def foreign(m) -> ParticleStack:
    """Of the same ids, from other directions."""
    return replace(m.particles, rotations=m.particles.rotations.flip(0))


def renamed(m) -> ParticleStack:
    return replace(m.particles, ids=[f"{i}@other.mrcs" for i in range(N)])


def larger(m) -> ParticleStack:
    return simulate(m.structure, BOX + 2, PIXEL)


def coarser(m) -> ParticleStack:
    return simulate(m.structure, BOX, PIXEL + 0.1)


def simulate(structure, box_size, pixel_size, **settings) -> ParticleStack:
    return simulate_particles(
        structure,
        N,
        conformations=structure.coords[None],
        box_size=box_size,
        pixel_size=pixel_size,
        progress=False,
    )


CASES = {
    # Particles
    "refine: another box": (lambda m: refine(m.model, larger(m), **QUICK), "px"),
    "refine: another pixel size": (lambda m: refine(m.model, coarser(m), **QUICK), "5.1 Å"),
    "refine: no particles": (lambda m: refine(m.model, m.particles[:0], **QUICK), "none"),
    "encode: another box": (lambda m: encode(m.encoder, larger(m)), "32 px"),
    "encode: another pixel size": (lambda m: encode(m.encoder, coarser(m)), "5.1 Å"),
    "train_encoder: validation of another box": (
        lambda m: train_encoder(m.model, m.particles, larger(m), **TRAINING),
        "px",
    ),
    "limit: another box": (lambda m: information_limit(m.model, larger(m)), "px"),
    "result: particles of another box": (
        lambda m: Result(m.model, m.result.latents, particles=larger(m)),
        "px",
    ),
    "result: particles in another order": (
        lambda m: replace(m.result, particles=m.particles[::-1]),
        "the same ones in another order",
    ),
    "result: other particles": (lambda m: replace(m.result, particles=renamed(m)), "others"),
    "result: fewer particles": (lambda m: replace(m.result, particles=m.particles[:5]), "got 5"),
    "result: fewer latents": (
        lambda m: Result(m.model, m.result.latents[:5], particles=m.particles),
        "expected 5 particles",
    ),
    "load_result: other particles": (
        lambda m: load_result(m.saved, renamed(m)),
        "such as '000001'",
    ),
    "load_result: others of the same ids": (
        lambda m: load_result(m.saved, foreign(m)),
        "others with the same ids",
    ),
    "load_result: fewer particles": (
        lambda m: load_result(m.saved, m.particles[:5]),
        "none with 7 of them",
    ),
    "load_result: particles of another box": (lambda m: load_result(m.saved, larger(m)), ""),
    # Start
    "start: particles in another order": (
        lambda m: refine(m.model, m.particles[::-1], start=m.result, **QUICK),
        "another order",
    ),
    "start: fewer particles": (
        lambda m: refine(m.model, m.particles[:5], start=m.result, **QUICK),
        "got 5",
    ),
    "start: other particles": (
        lambda m: refine(m.model, renamed(m), start=m.result, **QUICK),
        "others",
    ),
    "start: another shape": (
        lambda m: refine(m.model, m.particles, start=torch.zeros(N, 3), **QUICK),
        "(12, 3)",
    ),
    "start: not finite": (
        lambda m: refine(m.model, m.particles, start=torch.full((N, 16), torch.nan), **QUICK),
        "finite",
    ),
    # Checkpoints
    "checkpoint: other particles": (lambda m: resume(m, foreign(m)), "particles"),
    "checkpoint: particles in another order": (lambda m: resume(m, m.particles[::-1]), "order"),
    "checkpoint: fewer particles": (lambda m: resume(m, m.particles[:5]), "5 particles"),
    "checkpoint: other blurs": (lambda m: resume(m, m.particles, blurs=(2.0, 0.0)), "blurs"),
    "checkpoint: another start": (lambda m: resume(m, m.particles, start=m.result), "start"),
    "checkpoint: another population": (
        lambda m: resume(m, m.particles, population=m.population),
        "population",
    ),
    "checkpoint: a population with other beads": (
        resume_with_other_beads,
        "population",
    ),
    "training checkpoint: other particles": (
        lambda m: train_encoder(
            m.model,
            m.particles[:7],
            m.particles[8:],
            checkpoint=m.training_checkpoint,
            **TRAINING,
        ),
        "data",
    ),
    # Shapes
    "result: std of another shape": (
        lambda m: replace(m.result, std=m.result.std[:, :5]),
        "error bars (12, 16)",
    ),
    "result: std of fewer particles": (
        lambda m: replace(m.result, std=m.result.std[:5]),
        "(5, 16)",
    ),
    "result: latents of another length": (
        lambda m: Result(m.model, torch.zeros(N, 15)),
        "(12, 15)",
    ),
    "result: fewer ids": (
        lambda m: Result(m.model, m.result.latents, ids=[1, 2]),
        "expected 12 ids",
    ),
    "result: an unknown kind": (lambda m: replace(m.result, kind="guessed"), "'guessed'"),
    "population: mean and covariance of other lengths": (
        lambda m: replace(m.population, mean=torch.zeros(3)),
        "(3,)",
    ),
    "population: of fewer latents": (
        lambda m: replace(m.result, population=shorter(m.population)),
        "16 latents, got 15",
    ),
    "refine: population of fewer latents": (
        lambda m: refine(m.model, m.particles, shorter(m.population), **QUICK),
        "16 latents, got 15",
    ),
    "population: beads of a larger molecule": (
        lambda m: replace(m.result, population=with_foreign_beads(m.population)),
        "nodes 0 to 738",
    ),
    "refine: population with beads of a larger molecule": (
        lambda m: refine(m.model, m.particles, with_foreign_beads(m.population), **QUICK),
        "nodes 0 to 738",
    ),
    "limit: population with beads of a larger molecule": (
        lambda m: information_limit(m.model, m.particles, with_foreign_beads(m.population)),
        "nodes 0 to 738",
    ),
    "transform: latents of another length": (
        lambda m: m.motions.transform(torch.zeros(4, 15)),
        "(4, 15)",
    ),
    "decode: latents of another length": (lambda m: m.model.decode(torch.zeros(15)), "15"),
    "save_conformations: latents of another length": (
        lambda m: save_conformations("never.pdb", m.model, torch.zeros(2, 15)),
        "15",
    ),
    "columns: another number of rows": (
        lambda m: particle_columns(m.result, pd.DataFrame({"a": [1.0, 2.0]})),
        "2",
    ),
    # Molecules
    "model: modes of another structure": (
        lambda m: Model(moved(m.structure), m.particles, modes=m.model.modes),
        "modes of another structure",
    ),
    "model: particles and a box": (
        lambda m: Model(m.structure, m.particles, modes=2, box_size=BOX),
        "both",
    ),
    "simulation: dynamics of another molecule": (
        lambda m: simulate_particles(
            load_structure("glua3-closed", chains="A"),
            N,
            dynamics=m.model.dynamics,
            latents=m.result.latents,
            progress=False,
        ),
        "dynamics of",
    ),
    "true_latents: truth of other atoms": (
        lambda m: true_latents(heavy(m), m.particles),
        "truth of 739 atoms",
    ),
    "score: truth of other atoms": (
        lambda m: score(Result(heavy(m), m.result.latents, particles=m.particles)),
        "truth of 739 atoms",
    ),
}


def resume(m, particles, **settings) -> Result:
    return refine(m.model, particles, checkpoint=m.checkpoint, **QUICK | settings)


def shorter(population) -> Population:
    covariance = population.covariance[:-1, :-1]
    return replace(population, mean=population.mean[:-1], covariance=covariance)


def with_foreign_beads(population) -> Population:
    beads = residue_beads(load_structure("glua3-open"))
    return replace(population, beads=replace(beads, node=beads.node + 5))


def heavy(m) -> Model:
    structure = load_structure("glua3-closed", atoms="heavy")
    return Model(structure, m.particles, modes=2)


@pytest.mark.parametrize("case", CASES)
def test_what_does_not_belong_together_is_refused(made, case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    combine, word = CASES[case]
    before = kept(made)
    with pytest.raises(ValueError) as caught:
        combine(made)
    assert_one_sentence(caught.value, word)
    assert kept(made) == before and not list(tmp_path.iterdir())
