"""Results: one row a particle, and one file that opens in a fresh interpreter without the rest."""

import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cryochains._files import load_tensors, save_tensors
from cryochains.images import load_particles
from cryochains.inference import Result, load_result, refine
from cryochains.inference.result import RESULT_KIND
from cryochains.model import Dynamics, Model, elastic_variance, simulate_particles
from cryochains.molecule import compute_modes, load_structure

N = 40
# Of the images over the model's.
BRIGHTNESS = 30.0
# What is known of each particle besides its latents.
COLUMNS = ("scale", "noise", "misfit", "responsibility")
BODIES = {
    "front": "chain A or chain B and resnum 1 to 120",
    "back": "chain B and resnum 121 to 900",
}


@pytest.fixture(scope="module")
def structure():
    """Bodies and origin of its own: what no entry's name would give back."""
    structure = load_structure("glua3-closed", bodies=BODIES)
    return structure.with_origin(structure.origin + [1.0, -2.0, 0.5])


@pytest.fixture(scope="module")
def particles(structure):
    dynamics = Dynamics(structure, compute_modes(structure, (2, 1)))
    draws = torch.randn(N, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    particles = simulate_particles(
        structure,
        N,
        dynamics=dynamics,
        latents=elastic_variance(dynamics).sqrt() * draws,
        box_size=32,
        snr_db=3.0,
        shift_std=2.0,
        progress=False,
    )
    return replace(particles, images=BRIGHTNESS * particles.read_images())


@pytest.fixture(scope="module")
def folder(particles, tmp_path_factory):
    """A folder with a stack, and a result of some of its particles, in an order of their own."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "data").mkdir()
    particles.save(folder / "data" / "a.star")
    return folder


@pytest.fixture(scope="module")
def chosen_rows():
    return np.random.default_rng(0).permutation(N)[:30]


@pytest.fixture(scope="module")
def result(structure, folder, chosen_rows) -> Result:
    on_disk = load_particles(folder / "data" / "a.star")[chosen_rows]
    model = Model(structure, on_disk, modes=(2, 1))
    result = refine(model, on_disk, blurs=(6.0, 3.0, 0.0, 0.0), progress=False)
    result.save(folder / "results" / "run.safetensors")
    return result


@pytest.fixture
def project(result, folder, tmp_path):
    """A copy of the folder for one test; the first is still there."""
    return shutil.copytree(folder, tmp_path / "project")


@pytest.fixture
def in_memory(structure, particles) -> Result:
    model = Model(structure, particles, modes=(2, 1))
    latents = torch.randn(N, model.n_latents, generator=torch.Generator().manual_seed(1))
    return Result(model, latents, particles=particles, kind="encoded")


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def assert_same(a: Result, b: Result):
    """All but the particles, bit for bit."""
    assert torch.equal(a.latents, b.latents)
    assert (a.std is None) == (b.std is None) and (a.std is None or torch.equal(a.std, b.std))
    assert a.ids.tolist() == b.ids.tolist()
    assert [*map(type, a.ids)] == [*map(type, b.ids)]
    assert (a.history, a.kind) == (b.history, b.kind)
    for name in COLUMNS:
        one, other = getattr(a, name), getattr(b, name)
        assert (one is None) == (other is None), name
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)
    assert a.model.fingerprint == b.model.fingerprint
    if a.population is None:
        assert b.population is None
        return
    assert torch.equal(a.population.mean, b.population.mean)
    assert torch.equal(a.population.covariance, b.population.covariance)
    assert torch.equal(a.population.noise_spectrum, b.population.noise_spectrum)
    assert a.population.description() == b.population.description()


# A fresh interpreter

SEEN_FROM_OUTSIDE = """
import json, sys
import numpy as np
import torch
import cryochains as cc

result = cc.load_result(sys.argv[1])
model, structure, population = result.model, result.model.structure, result.population
batch = next(result.particles.batches(100))
drawn = model.render(result.latents, *batch.pose)
np.savez(
    sys.argv[2],
    latents=result.latents, std=result.std, mean=population.mean,
    scale=result.scale, noise=result.noise, misfit=result.misfit,
    responsibility=result.responsibility, spectrum=population.noise_spectrum,
    covariance=population.covariance, all_atoms=structure.atoms.getCoords(),
    betas=structure.atoms.getBetas(), coords=structure.coords, origin=structure.origin,
    weights=structure.weights, chain_index=structure.chain_index,
    vectors=model.modes.vectors[0], eigenvalues=model.modes.eigenvalues[1],
    decoded=model.dynamics.all_atoms().decode(result.latents[:2]),
    rotations=result.particles.rotations, images=batch.images, drawn=drawn,
    errors=cc.inference.posterior_covariance(result, [4]),
)
atoms = structure.atoms
names = [atoms.getNames(), atoms.getResnames(), atoms.getChids(), atoms.getIcodes()]
print(json.dumps({
    "ids": result.ids.tolist(), "history": list(result.history), "kind": result.kind,
    "population": population.description(),
    "names": [part.tolist() for part in names], "chain_ids": structure.chain_ids,
    "name": structure.name, "fingerprint": model.fingerprint, "star": result.particles.source,
    "resnums": atoms.getResnums().tolist(), "elements": atoms.getElements().tolist(),
}))
"""


@pytest.fixture(scope="module")
def from_outside(result, folder):
    """What a fresh interpreter, in another folder, sees in the file: texts and arrays."""
    arrays = folder / "seen.npz"
    elsewhere = folder / "data"
    path = folder / "results" / "run.safetensors"
    command = [sys.executable, "-c", SEEN_FROM_OUTSIDE, str(path), str(arrays)]
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=elsewhere)
    assert "Warning" not in run.stderr, run.stderr
    with np.load(arrays) as seen:
        return json.loads(run.stdout), dict(seen)


def test_a_fresh_interpreter_sees_all_of_it(result, from_outside, folder):
    texts, arrays = from_outside
    model, structure, population = result.model, result.model.structure, result.population
    atoms = structure.atoms
    for name, expected in {
        "latents": result.latents,
        "std": result.std,
        "scale": result.scale,
        "noise": result.noise,
        "misfit": result.misfit,
        "responsibility": result.responsibility,
        "spectrum": population.noise_spectrum,
        "mean": population.mean,
        "covariance": population.covariance,
        "all_atoms": atoms.getCoords(),
        "betas": atoms.getBetas(),
        "coords": structure.coords,
        "origin": structure.origin,
        "weights": structure.weights,
        "chain_index": structure.chain_index,
        "vectors": model.modes.vectors[0],
        "eigenvalues": model.modes.eigenvalues[1],
        "rotations": result.particles.rotations,
        "images": result.particles.read_images(),
    }.items():
        np.testing.assert_array_equal(arrays[name], expected, err_msg=name)
    decoded = model.dynamics.all_atoms().decode(result.latents[:2])
    np.testing.assert_allclose(arrays["decoded"], decoded, rtol=0, atol=1e-4)
    assert decoded.shape[1] > structure.n_atoms
    assert texts["ids"] == result.ids.tolist()
    assert texts["kind"] == "refined"
    assert texts["history"] == list(result.history) and len(result.history) >= 4
    assert texts["population"] == population.description()
    assert texts["fingerprint"] == model.fingerprint
    words = (atoms.getNames(), atoms.getResnames(), atoms.getChids(), atoms.getIcodes())
    assert texts["names"] == [part.tolist() for part in words]
    assert texts["resnums"] == atoms.getResnums().tolist()
    assert texts["elements"] == atoms.getElements().tolist()
    assert (texts["name"], texts["chain_ids"]) == ("glua3-closed", ["front", "back"])
    assert texts["star"]["star"] == str(folder / "data" / "a.star")
    assert arrays["errors"].shape == (1, model.n_latents, model.n_latents)


def correlations(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n,) correlation of each image with its other."""
    flat = [part.reshape(len(part), -1) for part in (images, others)]
    off = [part - part.mean(1, keepdims=True) for part in flat]
    norms = np.prod([np.linalg.norm(part, axis=1) for part in off], axis=0)
    return (off[0] * off[1]).sum(1) / norms


def test_no_shape_of_the_molecule_is_left_in_the_residual(from_outside):
    """README's check for wrong poses: images minus scale × model, in a fresh interpreter."""
    _, arrays = from_outside
    np.testing.assert_allclose(arrays["scale"], BRIGHTNESS, rtol=0.1)
    residual = arrays["images"] - arrays["scale"][:, None, None] * arrays["drawn"]
    left = correlations(residual, arrays["drawn"])
    assert abs(left.mean()) < 0.05, left
    # It would be seen: the images themselves, and with the brightness forgotten.
    assert correlations(arrays["images"], arrays["drawn"]).mean() > 0.6
    forgotten = arrays["images"] - arrays["drawn"]
    assert correlations(forgotten, arrays["drawn"]).mean() > 0.6


# Saved and read


def test_it_is_small_and_holds_no_image(result, folder):
    path = folder / "results" / "run.safetensors"
    sizes = {name: tensor.numel() for name, tensor in load_file(path).items()}
    assert "latents" in sizes and max(sizes.values()) <= 3 * result.model.structure.atoms.numAtoms()


@pytest.mark.parametrize("atoms", ["ca", "heavy"])
@pytest.mark.parametrize("modes", [None, 2])
def test_round_trip_without_std_population_or_particles(tmp_path, quiet, atoms, modes):
    structure = load_structure("glua3-open", atoms=atoms)
    model = Model(structure, modes=modes, translation=False, box_size=32, pixel_size=5.0)
    scale = torch.tensor([1 / 3, 1.0, 40.0])
    result = Result(model, torch.randn(3, model.n_latents), scale=scale, history=[{"a": 0.1}])
    result.save(tmp_path / "r.safetensors")
    loaded = load_result(tmp_path / "r.safetensors")
    assert_same(loaded, result)
    assert loaded.std is None and loaded.population is None and loaded.particles is None
    assert torch.equal(loaded.scale, scale)
    assert loaded.noise is None and loaded.misfit is None and loaded.responsibility is None
    assert torch.equal(loaded.decode(), result.decode())


def test_saved_twice_it_is_the_same(result, folder, tmp_path):
    loaded = load_result(folder / "results" / "run.safetensors")
    assert_same(loaded, result)
    loaded.save(tmp_path / "again.safetensors")
    assert_same(load_result(tmp_path / "again.safetensors"), result)


@pytest.mark.parametrize(
    "ids",
    [
        [3, 1, 4, 15, 9],
        ["1@a.mrcs", "line\nbreak", "", 'quo"te', "tab\tand ünïcode"],
        [1, "1", "01", 2**60, -7],
        np.array([5, 6, 7, 8, 9]),
        [np.int64(1), np.int32(2), np.str_("three"), 4, 5],
    ],
)
def test_ids_stay_what_they_are(in_memory, tmp_path, ids):
    result = Result(in_memory.model, in_memory.latents[:5], ids=ids)
    result.save(tmp_path / "r.safetensors")
    again = load_result(tmp_path / "r.safetensors").ids.tolist()
    assert again == list(ids)
    assert [type(one) for one in again] == [str if isinstance(one, str) else int for one in ids]


def test_ids_that_no_file_keeps_are_refused(in_memory):
    for ids in ([1.5, 2, 3], [None, 1, 2], [(1, 2), 3, 4], torch.rand(3), [True, 1, 2]):
        with pytest.raises(
            ValueError, match="expected ids that are strings or integers, got .*try"
        ):
            Result(in_memory.model, in_memory.latents[:3], ids=ids)


def test_a_folder_that_cannot_be_written(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder that can be written, got .*file"):
        result.save(tmp_path / "file" / "r.safetensors")


def test_saving_is_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "r.safetensors"
    result[:3].save(path)
    before = path.read_bytes()

    def cut(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("cryochains._files.save_file", cut)
    with pytest.raises(KeyboardInterrupt):
        result.save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


# Its particles


def test_particles_are_opened_again_in_their_order(result, folder, quiet):
    loaded = load_result(folder / "results" / "run.safetensors")
    assert loaded.particles.ids.tolist() == result.particles.ids.tolist()
    assert torch.equal(loaded.particles.read_images(), result.particles.read_images())
    assert torch.equal(loaded.particles.shifts, result.particles.shifts)
    part = loaded[[5, 2]]
    part.save(folder / "results" / "part.safetensors")
    again = load_result(folder / "results" / "part.safetensors")
    assert torch.equal(again.particles.read_images(), result.particles[[5, 2]].read_images())


def test_moved_together_they_find_each_other(project, folder, result, tmp_path, quiet):
    moved = project.rename(tmp_path / "moved")
    away = folder.rename(folder.with_name("away"))
    try:
        loaded = load_result(moved / "results" / "run.safetensors")
        assert loaded.particles.source["star"] == str(moved / "data" / "a.star")
    finally:
        away.rename(folder)
    assert torch.equal(loaded.particles.read_images(), result.particles.read_images())


def test_moved_alone_it_finds_the_file_where_it_was(folder, result, tmp_path, quiet):
    path = shutil.copy(folder / "results" / "run.safetensors", tmp_path / "alone.safetensors")
    assert load_result(path).particles.source["star"] == str(folder / "data" / "a.star")
    # Another stack that happens to be where it would be: it is not taken for the right one.
    (tmp_path / "data").mkdir()
    (tmp_path / "results").mkdir()
    load_particles(folder / "data" / "a.star")[::-1].save(tmp_path / "data" / "a.star")
    path = shutil.copy(path, tmp_path / "results" / "run.safetensors")
    assert load_result(path).particles.source["star"] == str(folder / "data" / "a.star")


def delete(star):
    star.unlink()


def delete_images(star):
    star.with_suffix(".mrcs").unlink()


def change_poses(star):
    particles = load_particles(star)
    shifts = particles.shifts.clone()
    shifts[:, 0] += 0.5
    replace(particles, shifts=shifts).save(star.with_name("b.star"))
    star.with_name("b.star").replace(star)
    star.with_name("b.mrcs").replace(star.with_suffix(".mrcs"))
    # The names of the images are those they were.
    star.write_text(star.read_text().replace("b.mrcs", "a.mrcs"))


def change_defocus(star):
    particles = load_particles(star)
    ctf = replace(particles.ctf, defocus_u=particles.ctf.defocus_u + 100)
    replace(particles, ctf=ctf).save(star.with_name("b.star"))
    star.write_text(star.with_name("b.star").read_text().replace("b.mrcs", "a.mrcs"))


def reorder(star):
    load_particles(star)[::-1].save(star.with_name("b.star"), images=False)
    star.with_name("b.star").replace(star)


def keep_few(star):
    load_particles(star)[:5].save(star.with_name("b.star"), images=False)
    star.with_name("b.star").replace(star)


def overwrite(star):
    star.write_text("hello")


@pytest.mark.parametrize(
    "damage, reason",
    [
        (delete, "it is not there"),
        (delete_images, "a.mrcs"),
        (change_poses, "poses or CTFs are not those"),
        (change_defocus, "poses or CTFs are not those"),
        (reorder, "poses or CTFs are not those"),
        (keep_few, "expected positions within 5 particles"),
        (overwrite, "expected"),
    ],
)
def test_particles_that_are_gone_or_changed_are_one_warning(
    project, folder, result, damage, reason
):
    damage(project / "data" / "a.star")
    away = folder.rename(folder.with_name("away"))
    try:
        with pytest.warns(UserWarning) as caught:
            loaded = load_result(project / "results" / "run.safetensors")
    finally:
        away.rename(folder)
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith("the result opens without its particles: ")
    assert reason in message and "try load_result(path, particles=…)" in message
    assert caught[0].filename == __file__, "it points at the caller"
    assert loaded.particles is None
    assert_same(loaded, result)


def test_in_memory_particles_are_none_without_a_warning(in_memory, tmp_path, quiet):
    in_memory.save(tmp_path / "r.safetensors")
    loaded = load_result(tmp_path / "r.safetensors")
    assert loaded.particles is None
    assert_same(loaded, in_memory)


@pytest.mark.parametrize("change", ["same", "reversed", "shuffled", "among others"])
def test_given_particles_are_matched_by_id(in_memory, tmp_path, quiet, change):
    some = in_memory[np.random.default_rng(1).permutation(N)[:25]]
    some.save(tmp_path / "r.safetensors")
    given = {
        "same": some.particles,
        "reversed": some.particles[::-1],
        "shuffled": some.particles[np.random.default_rng(2).permutation(25)],
        "among others": in_memory.particles,
    }[change]
    loaded = load_result(tmp_path / "r.safetensors", given)
    assert loaded.particles.ids.tolist() == some.ids.tolist() == loaded.ids.tolist()
    assert torch.equal(loaded.particles.read_images(), some.particles.read_images())
    assert torch.equal(loaded.particles.truth.latents, some.particles.truth.latents)
    assert_same(loaded, some)


def test_particles_that_are_not_those_of_the_result(in_memory, tmp_path):
    path = tmp_path / "r.safetensors"
    in_memory.save(path)
    particles = in_memory.particles
    names = particles.ids.copy()
    names[3] = names[30]
    turned = replace(particles, rotations=particles.rotations.flip(0))
    for given, sentence in (
        (particles[1:], "got none with 1 of them, such as '000001'; try the .star"),
        (replace(particles, ids=np.arange(N)), "got none with 40 of them, such as '000001'"),
        (replace(particles, ids=names), "got none with 1 of them, such as '000004'"),
        (turned, "got others with the same ids: their poses, CTFs, box or pixel size differ; try"),
        (replace(particles, ctf=None), "got others with the same ids"),
    ):
        with pytest.raises(ValueError, match=f"expected .*{sentence}"):
            load_result(path, given)
    twice = particles[[*range(N), 7]]
    with pytest.raises(ValueError, match="expected one particle an id, got several with '000008'"):
        load_result(path, twice[::-1])


# Damaged files


def assert_one_sentence(path):
    with pytest.raises(ValueError) as caught:
        load_result(path)
    message = str(caught.value)
    assert message.startswith("expected ") and ", got " in message, message
    assert "\n" not in message.strip()
    return message


@pytest.fixture
def whole(result, folder):
    """Tensors and description of the file."""
    return load_tensors(folder / "results" / "run.safetensors", RESULT_KIND)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a result file, got .*none.safetensors"):
        load_result(tmp_path / "none.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.9, 0.9999])
def test_truncated_files(result, folder, tmp_path, share):
    content = (folder / "results" / "run.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(content[: int(share * len(content))])
    assert "expected a result file, got something unreadable at" in assert_one_sentence(path)


def test_files_of_another_kind(result, tmp_path):
    path = tmp_path / "other"
    result.population.save(path)
    assert "expected a result file, got population at" in assert_one_sentence(path)
    path.write_text("hello")
    assert "something unreadable" in assert_one_sentence(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match="expected a result file"):
        load_result(path)


# Results may be without them.
OPTIONAL_TENSORS = {"std", *COLUMNS, "population/noise_spectrum"}
# And populations of an earlier version are without these.
OPTIONAL_NUMBERS = {"contrast_spread", "noise_pixels", "junk_share", "rank"}


def test_each_tensor_that_is_missing(whole, tmp_path):
    tensors, meta = whole
    path = tmp_path / "less.safetensors"
    assert tensors.keys() > OPTIONAL_TENSORS
    for name in tensors.keys() - OPTIONAL_TENSORS:
        save_tensors(path, {k: v for k, v in tensors.items() if k != name}, meta)
        assert "damaged" in assert_one_sentence(path), name


def test_each_part_of_the_description_that_is_missing(whole, tmp_path):
    tensors, meta = whole
    path = tmp_path / "less.safetensors"
    for name in meta:
        save_tensors(path, tensors, {k: v for k, v in meta.items() if k != name})
        assert_one_sentence(path)
    for part in ("model", "population"):
        for name in meta[part].keys() - OPTIONAL_NUMBERS:
            less = {k: v for k, v in meta[part].items() if k != name}
            save_tensors(path, tensors, meta | {part: less})
            assert "damaged" in assert_one_sentence(path), name


def test_what_may_be_missing(whole, result, tmp_path):
    """Nothing is known of it then, and the rest is as it was."""
    tensors, meta = whole
    path = tmp_path / "less.safetensors"
    numbers = {k: v for k, v in meta["population"].items() if k not in OPTIONAL_NUMBERS}
    kept = {k: v for k, v in tensors.items() if k not in OPTIONAL_TENSORS}
    save_tensors(path, kept, meta | {"population": numbers})
    loaded = load_result(path)
    assert torch.equal(loaded.latents, result.latents) and loaded.std is None
    assert loaded.noise is None and loaded.misfit is None and loaded.responsibility is None
    assert loaded.scale.tolist() == pytest.approx([result.population.contrast] * 30)
    assert loaded.shows_molecule.all() and loaded.shows_molecule.dtype == bool
    assert loaded.population.noise_spectrum is None and loaded.population.junk_share == 0.02
    assert loaded.population.noise_std == result.population.noise_std


WRONG = [
    (part, value)
    for part in ("model", "population", "history", "answer")
    for value in (None, 7, "text", [3], {"a": 1})
    if (part, value) != ("population", None)
]


@pytest.mark.parametrize("part, value", WRONG)
def test_parts_of_the_description_that_are_something_else(whole, tmp_path, part, value):
    tensors, meta = whole
    save_tensors(tmp_path / "r.safetensors", tensors, meta | {part: value})
    assert_one_sentence(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    "change",
    [
        {"latents": torch.zeros(30, 3)},
        {"latents": torch.zeros(30)},
        {"latents": torch.zeros(29, 15)},
        {"std": torch.zeros(29, 15)},
        {"scale": torch.ones(29)},
        {"scale": torch.ones(30, 1)},
        {"scale": torch.zeros(30)},
        {"noise": torch.ones(31)},
        {"misfit": torch.tensor(1.0)},
        {"responsibility": torch.ones(1, 30)},
        {"ids": torch.tensor([1, 2], dtype=torch.uint8)},
        {"ids": torch.zeros(3)},
        {"population/mean": torch.zeros(4)},
        {"structure/coords": torch.zeros(5, 3)},
    ],
)
def test_tensors_of_another_shape(whole, tmp_path, change):
    tensors, meta = whole
    save_tensors(tmp_path / "r.safetensors", tensors | change, meta)
    assert_one_sentence(tmp_path / "r.safetensors")


# Rows


@pytest.mark.parametrize(
    "rows",
    [3, -1, slice(2, 20, 3), slice(None, None, -1), [7, 7, 0], np.arange(30) % 4 == 1]
    + [torch.arange(30) > 25, np.array([5, 2]), torch.tensor([9])],
)
def test_rows_are_those_of_everything(result, rows):
    part = result[rows]
    index = rows if isinstance(rows, slice) else np.asarray(rows)
    expected = np.atleast_1d(np.arange(30)[index]).copy()
    assert len(part) == len(expected)
    assert torch.equal(part.latents, result.latents[expected])
    assert torch.equal(part.std, result.std[expected])
    assert part.ids.tolist() == result.ids[expected].tolist()
    assert part.particles.ids.tolist() == part.ids.tolist()
    assert torch.equal(part.particles.rotations, result.particles.rotations[expected])
    assert part.model is result.model and part.population is result.population
    assert (part.history, part.kind) == (result.history, result.kind)
    for name in COLUMNS:
        assert torch.equal(getattr(part, name), getattr(result, name)[expected]), name
    assert part.shows_molecule.tolist() == result.shows_molecule[expected].tolist()
    assert torch.equal(part.decode(), result.decode(rows))


def test_rows_that_are_not_there(result):
    for rows in (30, [0, 31], np.ones(29, dtype=bool)):
        with pytest.raises(IndexError, match="expected positions within 30 particles"):
            result[rows]


def test_decode_is_the_models(result):
    coords = result.decode([4, 2])
    assert coords.shape == (2, result.model.structure.n_atoms, 3) and coords.device.type == "cpu"
    assert not coords.requires_grad
    torch.testing.assert_close(coords, result.model.decode(result.latents[[4, 2]]))


def test_it_is_frozen_and_plain(result, in_memory):
    with pytest.raises(FrozenInstanceError):
        result.latents = None
    learned = torch.randn(3, in_memory.model.n_latents, dtype=torch.float64, requires_grad=True)
    given = Result(in_memory.model, learned, std=learned.detach().abs())
    assert given.latents.dtype == given.std.dtype == torch.float32
    assert not given.latents.requires_grad and given.kind == "given"
    assert given.ids.tolist() == ["000001", "000002", "000003"]
    record = {"blur": 1.0}
    of_record = Result(in_memory.model, learned, history=[record])
    record["blur"] = 2.0
    assert of_record.history == ({"blur": 1.0},)


def test_repr_is_short(result):
    text = repr(result)
    assert "30 particles, refined" in text and "15 latents" in text and "\n" not in text
    assert "junk" not in text, "there is none"


def test_repr_counts_what_is_no_molecule(in_memory):
    responsibility = torch.ones(N)
    responsibility[[3, 5, 8]] = torch.tensor([0.0, 0.49, 0.5])
    result = replace(in_memory, responsibility=responsibility)
    assert "40 particles, encoded" in repr(result) and "3 flagged as junk" in repr(result)
    assert result.shows_molecule.dtype == bool
    assert np.flatnonzero(~result.shows_molecule).tolist() == [3, 5, 8]
    assert "1 flagged as junk" in repr(result[[3, 4]]) and "junk" not in repr(result[:3])
    unknown = replace(result, responsibility=None)
    assert unknown.shows_molecule.all() and len(unknown.shows_molecule) == N
    assert "junk" not in repr(unknown)


# What is known of each particle


def test_columns_are_those_of_the_particles(result):
    for name in COLUMNS:
        values = getattr(result, name)
        assert values.shape == (30,) and values.dtype == torch.float32, name
        assert values.isfinite().all() and not values.requires_grad, name


def test_a_result_made_by_hand_has_the_brightness_of_its_population(result):
    again = Result(result.model, result.latents, result.std, result.population, result.particles)
    assert again.scale.tolist() == pytest.approx([result.population.contrast] * 30)
    assert again.noise is None and again.misfit is None and again.responsibility is None
    alone = Result(result.model, result.latents)
    assert alone.scale.tolist() == [1.0] * 30
    assert again[:2].scale.shape == (2,) and again[:2].noise is None


def test_scales_are_positive(result):
    for value in (0.0, -1.0, float("nan"), float("inf")):
        scale = torch.ones(30)
        scale[7] = value
        with pytest.raises(ValueError, match="expected positive scales, got .* try scale=None"):
            Result(result.model, result.latents, scale=scale)
        sentence = "expected (positive .*)?contrast.* above 0, got .* try "
        with pytest.raises(ValueError, match=sentence):
            replace(result, scale=None, population=replace(result.population, contrast=value))


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("shape", [(29,), (31,), (30, 1), (), (0,)])
def test_columns_of_another_length(result, name, shape):
    sentence = rf"expected {name} \(30,\), one number a particle, got .*; try {name}=None"
    with pytest.raises(ValueError, match=sentence) as caught:
        replace(result, **{name: torch.ones(shape)})
    assert "\n" not in str(caught.value)


def test_columns_go_through_files(in_memory, tmp_path):
    """NaN too, where nothing is known; plain arrays are as good as tensors."""
    rng = np.random.default_rng(0)
    columns = {name: rng.uniform(0.1, 2.0, N) for name in COLUMNS}
    columns["noise"][[3, 7]] = columns["misfit"][[3, 7]] = np.nan
    columns["responsibility"] = np.linspace(0, 1, N)
    result = replace(in_memory, **columns)
    result.save(tmp_path / "r.safetensors")
    loaded = load_result(tmp_path / "r.safetensors")
    assert_same(loaded, result)
    for name, values in columns.items():
        np.testing.assert_allclose(getattr(loaded, name), values, rtol=1e-6, err_msg=name)
    assert loaded.shows_molecule.tolist() == (columns["responsibility"] > 0.5).tolist()
    part = result[[7, 1]]
    part.save(tmp_path / "part.safetensors")
    assert_same(load_result(tmp_path / "part.safetensors"), part)
    assert part.noise.isnan().tolist() == [True, False]


# Particles that are known by more than their ids


def test_other_particles_with_the_same_ids_are_refused(in_memory):
    """In-memory stacks all number their particles from 1."""
    particles = in_memory.particles
    turned = replace(particles, rotations=particles.rotations.flip(0))
    assert turned.ids.tolist() == particles.ids.tolist()
    with pytest.raises(ValueError, match="others with the same ids.*; try the particles"):
        replace(in_memory, particles=turned)
    with pytest.raises(ValueError, match="to start from, got one of others with the same ids"):
        refine(in_memory.model, turned, start=in_memory, progress=False)
    # A selection is known by its own particles.
    assert in_memory[:2].particles_digest == particles[:2].metadata_digest()


def test_other_images_behind_the_same_table_are_noticed(result, tmp_path):
    if result.particles.source is None:
        pytest.skip("this result's particles are in memory")
    particles = load_particles(result.particles.source["star"])[result.particles.rows]
    moved = tmp_path / "moved"
    particles.save(moved / "a.star")
    known = load_particles(moved / "a.star")
    replace(result, particles=known, ids=known.ids, particles_digest=None).save(moved / "r")
    assert load_result(moved / "r").particles is not None
    stack = moved / "a.mrcs"
    content = bytearray(stack.read_bytes())
    content[1024:1028] = np.float32(5).tobytes()
    stack.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="its images are not those"):
        assert load_result(moved / "r").particles is None


def test_an_empty_selection_is_a_result_of_none(result, in_memory):
    for one in (result, in_memory, replace(in_memory, particles=None)):
        assert len(one[[]]) == 0
