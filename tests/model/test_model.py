"""The model: dynamics and microscope as one; nothing in it learns or changes."""

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import prody
import pytest
import torch
from torch import nn

from cryochains.images import random_rotations
from cryochains.model import (
    Microscope,
    Model,
    pack_model,
    require_same_images,
    require_same_model,
    simulate_particles,
    unpack_model,
)
from cryochains.molecule import (
    Beads,
    Modes,
    atom_beads,
    compute_modes,
    load_structure,
    residue_beads,
)

BOX, PIXEL = 32, 5.0
# Of the beads of glua3-closed, as files had it before they had numbers.
OLDER_DIGEST = "35b705798c39f4da"


def make(structure, **settings) -> Model:
    return Model(structure, **{"box_size": BOX, "pixel_size": PIXEL, "modes": 2} | settings)


@pytest.fixture(scope="module")
def particles(closed):
    return simulate_particles(
        closed,
        6,
        conformations=closed.coords[None],
        box_size=BOX,
        pixel_size=PIXEL,
        shift_std=2.0,
        progress=False,
    )


def reachable(thing, seen: dict) -> None:
    """Put all arrays, tensors and modules that `thing` leads to into `seen`, by identity."""
    if id(thing) in seen or isinstance(thing, (str, bytes, int, float, type(None))):
        return
    seen[id(thing)] = thing
    if isinstance(thing, prody.AtomGroup):
        for name in thing.getDataLabels():
            reachable(thing.getData(name), seen)
        reachable(thing.getCoordsets(), seen)
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            reachable(part, seen)
    elif isinstance(thing, dict):
        for part in thing.values():
            reachable(part, seen)
    elif is_dataclass(thing):
        # Cached properties are in __dict__ beside the fields.
        for part in vars(thing).values():
            reachable(part, seen)


def n_bytes(thing) -> int:
    seen: dict = {}
    reachable(thing, seen)
    arrays = [part for part in seen.values() if isinstance(part, (np.ndarray, torch.Tensor))]
    return sum(array.nbytes for array in arrays)


# What it is


def test_it_has_no_parameters_and_nothing_that_learns(closed):
    model = make(closed)
    model.render(torch.zeros(1, model.n_latents), random_rotations(1, 0))
    names = ["structure", "dynamics", "microscope", "sigma", "beads"]
    assert [field.name for field in fields(model)] == names
    seen: dict = {}
    reachable(model, seen)
    assert not isinstance(model, nn.Module) and not hasattr(model, "parameters")
    assert not any(isinstance(part, (nn.Module, nn.Parameter)) for part in seen.values())
    tensors = [part for part in seen.values() if isinstance(part, torch.Tensor)]
    assert tensors and not any(tensor.requires_grad for tensor in tensors)
    assert not hasattr(model, "contrast") and not hasattr(model, "encoder")


def test_it_is_frozen_and_hashed_by_identity(closed):
    model, twin = make(closed), make(closed)
    for name in ("structure", "dynamics", "microscope", "beads", "contrast", "anything"):
        with pytest.raises(FrozenInstanceError):
            setattr(model, name, None)
    assert model != twin and {model: 1}[model] == 1
    assert model.fingerprint == twin.fingerprint


def test_it_draws_the_reference_at_zero(closed):
    """Of beads, or where a width is given of one Gaussian an atom."""
    rotations = random_rotations(3, 0)
    shifts = torch.tensor([[1.0, 2.0], [0.0, 0.0], [-3.0, 5.0]])
    beads = residue_beads(closed)
    for model, coords, weights, widths in (
        (make(closed), beads.coords, beads.weights, beads.widths),
        (make(closed, sigma=4.0), closed.coords, closed.weights, 4.0),
    ):
        microscope = Microscope(weights, BOX, PIXEL, closed.origin, widths)
        coords = torch.from_numpy(coords).float().expand(3, -1, -1)
        torch.testing.assert_close(
            model.render(torch.zeros(3, model.n_latents), rotations, shifts),
            microscope.render(coords, rotations, shifts),
            rtol=0,
            atol=1e-5,
        )


def test_render_is_decode_then_the_microscope(closed, particles):
    pose = next(particles.batches(6)).pose
    for sigma in (None, 4.0):
        model = make(closed, sigma=sigma)
        latents = torch.randn(6, model.n_latents, generator=torch.Generator().manual_seed(1))
        images = model.render(latents, *pose)
        coords = model.dynamics.with_beads(model.beads).decode(latents)
        assert torch.equal(images, model.microscope.render(coords, *pose))
        if sigma is not None:
            assert torch.equal(images, model.microscope.render(model.decode(latents), *pose))
        assert not torch.allclose(images, model.render(0 * latents, *pose), rtol=0, atol=1e-2)


def assert_same_beads(one: Beads, other: Beads):
    for field in fields(Beads):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_what_it_is_drawn_with(closed):
    """Two or three beads a residue; of a structure of heavy atoms, or with a width, its atoms."""
    heavy = load_structure("glua3-closed", atoms="heavy")
    for model, beads in (
        (make(closed), residue_beads(closed)),
        (make(closed, sigma=4.0), atom_beads(closed, 4.0)),
        (make(heavy), atom_beads(heavy)),
        (make(heavy, sigma=2.0), atom_beads(heavy, 2.0)),
    ):
        assert_same_beads(model.beads, beads)
        assert_same_beads(model.bead_dynamics.beads, beads)
        np.testing.assert_array_equal(model.microscope.weights, beads.weights)
        np.testing.assert_array_equal(model.microscope.sigma, beads.widths)
        assert model.dynamics.beads is None, "conformations are of the atoms"
    assert make(closed).sigma is None and make(closed, sigma=4).sigma == 4.0
    for sigma in (0.0, -1.0):
        with pytest.raises(ValueError, match="expected sigma to be a number of Å above 0"):
            make(closed, sigma=sigma)


# Other beads


def learned_beads(model, seed=0) -> Beads:
    """The model's, as images might change them."""
    rng = np.random.default_rng(seed)
    n = len(model.beads)
    return replace(
        model.beads,
        weights=model.beads.weights * rng.uniform(0.5, 1.5, n),
        widths=model.beads.widths * rng.uniform(0.8, 2.0, n),
    )


def test_other_beads_change_images_and_not_what_latents_mean(closed):
    model = make(closed)
    beads = learned_beads(model)
    drawn = model.with_beads(beads)
    assert drawn.fingerprint == model.fingerprint
    require_same_model(drawn, model.fingerprint, "a population")
    assert drawn.beads is beads and drawn.structure is closed and drawn.modes is model.modes
    assert_same_beads(model.beads, residue_beads(closed))
    assert model.with_beads(None) is model
    latents = torch.randn(3, model.n_latents, generator=torch.Generator().manual_seed(1))
    assert torch.equal(drawn.decode(latents), model.decode(latents))
    rotations = random_rotations(3, 0)
    images, before = (one.render(latents, rotations) for one in (drawn, model))
    assert float((images - before).norm() / before.norm()) > 0.05
    microscope = Microscope(beads.weights, BOX, PIXEL, closed.origin, beads.widths)
    coords = model.bead_dynamics.decode(latents)
    assert torch.equal(images, microscope.render(coords, rotations)), "where they were"
    again = drawn.with_beads(model.beads).render(latents, rotations)
    assert torch.equal(again, before)


def test_other_beads_may_be_fewer_or_more_and_elsewhere(closed):
    """As Gaussians of the atoms: what a model of that width draws, which is another model."""
    model, of_atoms = make(closed), make(closed, sigma=4.0)
    drawn = model.with_beads(atom_beads(closed, 4.0))
    latents = torch.randn(3, model.n_latents, generator=torch.Generator().manual_seed(1))
    rotations = random_rotations(3, 0)
    assert torch.equal(drawn.render(latents, rotations), of_atoms.render(latents, rotations))
    assert drawn.fingerprint == model.fingerprint != of_atoms.fingerprint


def test_a_model_of_other_beads_moves_to_another_device(closed):
    model = make(closed)
    beads = learned_beads(model)
    moved = model.with_beads(beads).to("meta")
    assert moved.beads is beads and moved.device.type == "meta"
    assert moved.microscope.variance_tensor.device.type == "meta"
    assert model.to("meta").with_beads(beads).fingerprint == model.fingerprint
    assert moved.fingerprint == model.fingerprint


def test_modes_are_a_number_or_modes_or_none(closed):
    assert make(closed, modes=3).n_latents == 18
    assert make(closed, modes=compute_modes(closed, (1, 2))).n_latents == 15
    assert make(closed, modes=(1, 2)).n_latents == make(closed, modes=[2, 1]).n_latents == 15
    assert make(closed, modes=np.int64(3)).n_latents == 18
    assert make(closed, modes=None).n_latents == make(closed, modes=0).n_latents == 12
    assert make(closed, modes=None).modes is None and isinstance(make(closed).modes, Modes)
    assert make(closed, modes=3, rotation=False, translation=False).n_latents == 6
    with pytest.raises(ValueError, match="expected modes to be .* of 0 or more.*, got -1"):
        make(closed, modes=-1)
    with pytest.raises(ValueError, match="expected at least one of modes, rotation and translat"):
        make(closed, modes=None, rotation=False, translation=False)


def test_particles_give_their_size(closed, particles):
    model = Model(closed, particles, modes=None, sigma=6.0)
    assert (model.box_size, model.pixel_size, model.microscope.width) == (BOX, PIXEL, 6.0)
    assert model.structure is closed and model.device.type == "cpu"
    require_same_images(model, particles)
    for settings in ({"box_size": BOX}, {"pixel_size": PIXEL}):
        with pytest.raises(ValueError, match="expected either particles, or box_size and pixel_si"):
            Model(closed, particles, modes=None, **settings)
        with pytest.raises(ValueError, match="expected particles, or box_size and pixel_size, got"):
            Model(closed, modes=None, **settings)


def test_the_random_state_of_the_caller_is_left_alone(closed):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make(closed)
    assert torch.equal(torch.rand(3), expected)


def test_molecule_larger_than_the_box(closed):
    with pytest.raises(ValueError, match="expected a molecule that fits the box of 32 px × 2 Å"):
        make(closed, pixel_size=2.0)


def test_moving_it_there_already_gives_it_back(closed):
    model = make(closed)
    assert model.to("cpu") is model
    moved = model.to("meta")
    assert moved.device.type == "meta" and model.device.type == "cpu"
    assert moved.structure is closed and moved.modes is model.modes
    assert moved.fingerprint == model.fingerprint
    assert moved.microscope.weight_tensor.device.type == "meta"


def test_it_takes_little_memory_beyond_the_modes():
    """Of 128 px and four chains; an encoder took 400 MB and more."""
    bodies = {f"{c}{half}": f"chain {c} and resnum {r}" for c in "AB" for half, r in HALVES.items()}
    structure = load_structure("glua3-closed", bodies=bodies)
    assert structure.n_chains == 4
    modes = compute_modes(structure, 50)
    of_modes = n_bytes(modes)
    of_structure = n_bytes(structure)
    model = Model(structure, modes=modes, box_size=128, pixel_size=1.5)
    assert n_bytes(model) - of_modes - of_structure < 1e6, "as it is built"
    model.render(torch.zeros(1, model.n_latents), random_rotations(1, 0))
    model.fingerprint  # noqa: B018  (cached)
    assert n_bytes(model) <= 20e6, "after its use, all caches, the modes and the structure included"


HALVES = {"front": "1 to 120", "back": "121 to 800"}


# What it is told apart by


def differing(closed) -> dict:
    """Models of which one part differs from ``make(closed)``, and what that part is called."""
    a_and_b = closed.as_one_body()
    return {
        "modes": make(closed, modes=compute_modes(closed, 2, cutoff=11.0)),
        "number of modes": make(closed, modes=3),
        "origin": make(closed.with_origin(closed.origin + 1.0)),
        "width of an atom": make(closed, sigma=5.5),
        "beads or imaging atoms": make(load_structure(closed.atoms, atoms="heavy")),
        "box size": make(closed, box_size=34),
        "pixel size": make(closed, pixel_size=5.1),
        "structure": make(closed.with_coords(closed.atoms.getCoords() + 0.5)),
        "bodies": make(a_and_b),
        "chains turn and shift": make(closed, modes=None),
    }


def test_a_model_is_told_from_others_and_its_like(closed):
    model = make(closed)
    require_same_model(model, make(closed).fingerprint, "a population")
    for name, other in differing(closed).items():
        with pytest.raises(ValueError, match=f"expected a population of Model.*{name}.*; try"):
            require_same_model(model, other.fingerprint, "a population")


def test_models_of_one_gaussian_an_atom_differ_by_its_width_alone(closed):
    model = make(closed, sigma=5.0)
    require_same_model(model, make(closed, sigma=5).fingerprint, "a population")
    with pytest.raises(ValueError, match=r"what differs is its width of an atom \(sigma\); try"):
        require_same_model(model, make(closed, sigma=5.5).fingerprint, "a population")


def test_modes_that_differ_by_rounding_are_the_same(closed):
    modes = compute_modes(closed, 2)
    rounded = tuple(vectors.astype(np.float32).astype(float) for vectors in modes.vectors)
    require_same_model(
        make(closed, modes=modes),
        make(closed, modes=replace(modes, vectors=rounded)).fingerprint,
        "a population",
    )


@pytest.mark.parametrize("atoms", ["ca", "heavy"])
def test_atoms_in_another_order_within_residues_are_the_same_molecule(closed, atoms):
    group = closed.atoms
    random = np.random.default_rng(0)
    order = np.lexsort([random.random(group.numAtoms()), group.getResindices()])
    other = prody.AtomGroup("another order")
    other.setCoords(group.getCoords()[order])
    for name in ("names", "resnums", "resnames", "chids", "elements", "icodes"):
        values = getattr(group, f"get{name.capitalize()}")()
        getattr(other, f"set{name.capitalize()}")(values[order])
    models = [make(load_structure(of, atoms=atoms)) for of in (group, other)]
    require_same_model(models[0], models[1].fingerprint, "a population")


def test_fingerprints_of_older_files_are_understood():
    model = make(load_structure("glua3-closed"))
    older = {key: value for key, value in model.fingerprint.items() if key != "beads"}
    older["atoms"] = OLDER_DIGEST
    require_same_model(model, older, "a population")
    with pytest.raises(ValueError, match="what differs is its beads or imaging atoms; try"):
        require_same_model(model, older | {"atoms": "0123456789abcdef"}, "a population")


def test_same_latents_of_other_switches_are_told_apart(closed):
    """12 latents each: rigid chains, or six modes of either."""
    bends = make(closed, modes=6, rotation=False, translation=False)
    turns = make(closed, modes=3, rotation=True, translation=False)
    shifts = make(closed, modes=3, rotation=False, translation=True)
    models = [make(closed, modes=None), bends, turns, shifts]
    assert {model.n_latents for model in models} == {12}
    for model in models:
        for other in models:
            if other is not model:
                with pytest.raises(ValueError, match="number of modes, or whether chains turn"):
                    require_same_model(model, other.fingerprint, "a population")


# Packed and unpacked


@pytest.mark.parametrize("settings", [{}, {"modes": None}, {"rotation": False, "sigma": 6.0}])
@pytest.mark.parametrize("atoms", ["ca", "heavy"])
def test_a_packed_model_is_the_same_model(settings, atoms):
    structure = load_structure("glua3-closed", atoms=atoms)
    structure = structure.with_origin(structure.origin + [1.0, 2.0, 3.0])
    model = make(structure, **settings)
    tensors, meta = pack_model(model)
    again = unpack_model(tensors, meta)
    assert again.fingerprint == model.fingerprint and again.sigma == model.sigma
    assert_same_beads(again.beads, model.beads)
    latents = torch.randn(2, model.n_latents, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.decode(latents), model.decode(latents))
    pose = random_rotations(2, 0)
    assert torch.equal(again.render(latents, pose), model.render(latents, pose))
    of_all = (one.dynamics.all_atoms().decode(latents) for one in (model, again))
    assert torch.equal(*of_all)
    atoms_before, atoms_after = model.structure.atoms, again.structure.atoms
    assert atoms_after.getNames().tolist() == atoms_before.getNames().tolist()
    assert np.array_equal(atoms_after.getBetas(), atoms_before.getBetas())


def test_repr_is_short(closed):
    assert repr(make(closed)) == (
        f"Model({closed.name!r}, chains A B, 16 latents: mode, rotation, translation; 32 px × 5 Å)"
    )
