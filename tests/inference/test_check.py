"""What is wrong with a table of particles is named as itself, and sound particles are called sound.

Numbers at −10 dB with an independent simulator are in `benchmarks/check.py`; these are small.
"""

import importlib
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.images import ParticleStack
from cryochains.inference import Check, CheckItem, check, refine
from cryochains.inference.check import require_sound
from cryochains.inference.docking import compare_with, dock, measure_scale
from cryochains.model import Model, simulate_particles
from cryochains.molecule import morph

# The module, which the function of its name hides.
module = importlib.import_module("cryochains.inference.check")

N = 100
MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0]))


def simulate(closed, opened, seed=3, n=N, snr_db=0.0, **options):
    return simulate_particles(
        closed,
        n,
        conformations=morph(closed, opened, 20),
        box_size=48,
        snr_db=snr_db,
        shift_std=3.0,
        seed=seed,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def particles(closed, opened):
    return simulate(closed, opened)


@pytest.fixture(scope="module")
def model(closed, particles):
    return Model(closed, particles, modes=4)


@pytest.fixture(scope="module")
def sound(model, particles):
    return check(model, particles)


def with_negative_defocus(particles):
    ctf = particles.ctf
    return replace(ctf, defocus_u=-ctf.defocus_u, defocus_v=-ctf.defocus_v)


FAULTS = {
    "hand": lambda p: replace(p, rotations=MIRROR @ p.rotations @ MIRROR),
    "contrast": lambda p: replace(p, images=-p.read_images()),
    "shift sign": lambda p: replace(p, shifts=-p.shifts),
    "axes": lambda p: replace(p, shifts=p.shifts.flip(1)),
    "axes of images": lambda p: replace(p, images=p.read_images().transpose(1, 2)),
    "rotations": lambda p: replace(p, rotations=p.rotations.transpose(1, 2)),
    "rows": lambda p: replace(p, images=p.read_images().roll(1, 0)),
    "CTF": lambda p: replace(p, ctf=with_negative_defocus(p)),
}


def red(result: Check) -> list[str]:
    return [item.name for item in result.items if item.status == "red"]


def test_sound_particles_are_sound(sound):
    assert red(sound) == [] and sound.problem == ""
    assert sound["reference"].significance > 10
    faults = ("hand", "contrast", "shift sign", "axes", "rotations", "rows", "CTF")
    assert all(sound[name].significance < -4 for name in faults)
    assert abs(sound["pixel size"].value) < 0.01
    assert sound["origin"].value < 2
    assert sound["junk"].value < 0.05
    assert abs(sound["SNR"].value) < 3
    # The limit lies between nothing and what was thought possible.
    assert 0 < sound["limit"].value < 8


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_as_itself(model, particles, fault):
    """Docking and scale are not needed for it, and take the longest."""
    wrong = FAULTS[fault](particles)
    gains = module._compare_readings(model, wrong, np.arange(N))
    best = max(gains.log_likelihood, key=lambda name: gains.gain(name)[0])
    named = "hand" if best.startswith("hand") else module._READINGS[best][0]
    assert named == fault.removesuffix(" of images")
    assert gains.gain(best)[1] > 6


def test_a_whole_check_names_one_thing_and_how_to_mend_it(model, particles):
    wrong = FAULTS["hand"](particles)
    result = check(model, wrong)
    assert red(result) == ["hand"] and result.status == "red"
    assert result.problem == result["hand"].sentence
    assert np.isnan(result["pixel size"].value), "measured only where the table is read rightly"
    code = result.problem.split("try ")[1].split(" with ")[0]
    mended = eval(code, {"replace": replace, "particles": wrong, "torch": torch, "M": MIRROR})
    torch.testing.assert_close(mended.rotations, particles.rotations)


def test_the_origin_is_measured(closed, particles):
    origin = closed.origin + np.array([6.0, -8.0, 5.0])
    moved = Model(closed.with_origin(origin), particles, modes=4)
    result = check(moved, particles)
    assert red(result) == ["origin"]
    np.testing.assert_allclose(result.shift, [6.0, -8.0, 5.0], atol=1.0)
    # The origin that the sentence asks for.
    text = result["origin"].sentence.split("with_origin([")[1].split("]")[0]
    np.testing.assert_allclose([float(part) for part in text.split(",")], closed.origin, atol=1.0)


def test_a_turned_structure_is_found(closed, particles):
    turn = Rotation.from_rotvec([0.9, -0.4, 1.1]).as_matrix()
    coords = (closed.atoms.getCoords() - closed.origin) @ turn.T + closed.origin
    turned = Model(closed.with_coords(coords), particles, modes=None)
    comparison = compare_with(turned, particles, np.arange(N))
    docking = dock(comparison)
    # What was turned is turned back, or to where the dimer looks nearly the same.
    back = Rotation.from_matrix(docking.rotation @ turn).magnitude()
    assert min(back, abs(np.pi - back)) < np.radians(10)
    assert docking.offset > 5


@pytest.mark.parametrize("factor", [0.97, 1.0, 1.03])
def test_the_pixel_size_is_not_confused_with_a_change_of_shape(closed, particles, factor):
    """The particles are between two states, and the model has the first."""
    ctf = particles.ctf
    ctf = replace(ctf, defocus_u=ctf.defocus_u * factor**2, defocus_v=ctf.defocus_v * factor**2)
    pixel_size = particles.pixel_size * factor
    told = replace(particles, pixel_size=pixel_size, shifts=particles.shifts * factor, ctf=ctf)
    model = Model(closed, told, modes=4)
    scale = measure_scale(model, compare_with(model, told, np.arange(N)))
    assert scale.value == pytest.approx(factor, abs=0.008)
    assert 0 < scale.error < 0.01


def test_noise_is_not_called_the_reference(model, particles):
    noise = torch.randn(N, 48, 48, generator=torch.Generator().manual_seed(0))
    result = check(model, replace(particles, images=noise))
    assert red(result) == ["reference"]
    assert "noise" not in result.problem and "other poses" in result.problem
    assert "would be seen" in result.problem and np.isnan(result["pixel size"].value)


def test_few_faint_images_are_too_noisy_to_tell(closed, opened):
    faint = simulate(closed, opened, n=8, snr_db=-30.0)
    result = check(Model(closed, faint, modes=4), faint)
    assert result["reference"].status == "yellow" and not red(result)
    assert "too noisy to tell" in result["reference"].sentence
    # Nothing is measured of what is not seen.
    for name in ("pixel size", "junk", "limit"):
        assert result[name].status == "green" and np.isnan(result[name].value)


def test_brightness_and_outliers_do_not_count(model, particles, sound):
    images = particles.read_images() * torch.rand(N, 1, 1).add(0.5)
    images[3] *= 1e6
    images[5] = float("nan")
    images[7] = 2.0
    result = check(model, replace(particles, images=images))
    assert red(result) == []
    assert result["images"].value == 2 and result["images"].status == "yellow"
    assert result["hand"].value == pytest.approx(sound["hand"].value, rel=0.1)


def test_what_the_table_says_of_itself(closed, particles, model):
    ids = particles.ids.copy()
    ids[1] = ids[0]
    ctf = replace(particles.ctf, defocus_u=particles.ctf.defocus_u / 1e4)
    rotations = particles.rotations.clone()
    rotations[:] = rotations[0]
    items = {
        item.name: item
        for item in module._judge_table(
            model, replace(particles, ids=ids, ctf=ctf, rotations=rotations)
        )
    }
    assert items["ids"].value == 1 and items["ids"].status == "yellow"
    assert items["directions"].value < 0.1 and items["directions"].status == "yellow"
    assert items["box"].status == "green"
    half = replace(particles, ctf=replace(ctf, defocus_v=ctf.defocus_v / 1e4))
    assert module._judge_table(model, half)[1].status == "yellow"
    bare = ParticleStack(
        particles.read_images(), particles.rotations, pixel_size=particles.pixel_size
    )
    assert "no CTF" in module._judge_table(model, bare)[1].sentence


def test_particles_without_ctf_or_shifts_cannot_tell(closed, opened):
    plain = simulate(closed, opened, n=40, snr_db=6.0)
    bare = ParticleStack(plain.read_images(), plain.rotations, pixel_size=plain.pixel_size)
    gains = module._compare_readings(Model(closed, bare, modes=None), bare, np.arange(40))
    assert gains.gain("negative shifts") == (0.0, 0.0)
    assert "no CTF" not in gains.log_likelihood


def test_few_images_and_wrong_arguments(model, particles):
    for n in (1, 5):
        assert check(model, particles, n=n).n_images == n
    with pytest.raises(
        ValueError, match="expected n to be a whole number of 1 or more, got 0 .*; try n=500"
    ):
        check(model, particles, n=0)
    with pytest.raises(ValueError, match="constant or hold NaN"):
        check(model, replace(particles, images=torch.zeros(N, 48, 48)))
    with pytest.raises(ValueError, match="at least one particle"):
        check(model, particles[:0])


def test_it_prints_and_is_a_table(sound):
    text = repr(sound)
    assert text.startswith(f"Check of {N} images: ")
    assert len(text.splitlines()) == 1 + len(sound.items)
    assert isinstance(sound.table, pd.DataFrame)
    assert list(sound.table) == ["name", "status", "value", "significance", "sentence"]
    assert len(sound.table) == len(sound.items)
    with pytest.raises(ValueError, match="expected an item among reference"):
        sound["colour"]
    odd = CheckItem("hand", "red", 1.0, 9.0, "a < b")
    page = replace(sound, items=(odd,))._repr_html_()
    assert "a &lt; b" in page and "red" in page
    assert replace(sound, items=()).status == "green"


@pytest.mark.parametrize("fault", ["hand", "shift sign", "rows"])
def test_a_refinement_refuses_what_is_certainly_wrong(closed, opened, fault):
    particles = simulate(closed, opened, snr_db=0.0)
    wrong = FAULTS[fault](particles)
    model = Model(closed, wrong, modes=None)
    with pytest.raises(ValueError, match="expected images that show the reference at their poses"):
        refine(model, wrong, progress=False)
    refine(model, wrong[:40], blurs=(8.0,), check=False, progress=False)


def test_a_refinement_is_not_refused_by_few_or_sound_images(model, particles):
    require_sound(model, particles, np.arange(N))
    require_sound(model, FAULTS["hand"](particles), np.arange(10))
