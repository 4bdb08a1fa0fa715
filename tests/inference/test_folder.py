"""A run's folder: nothing is lost, nothing of another run is taken, and damage is named."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cryochains._files
import cryochains.inference.passes
from cryochains import Model, load_particles, load_structure, refine, simulate_particles
from cryochains._files import load_tensors
from cryochains.inference.folder import open_folder

QUIET = {"blurs": (4.0, 2.0, 0.0), "progress": False}


@pytest.fixture(scope="module")
def closed():
    return load_structure("glua3-closed")


@pytest.fixture(scope="module")
def particles(closed):
    steps = np.linspace(-3, 3, 20)[:, None, None] * (closed.chain_index == 1)[:, None]
    return simulate_particles(
        closed, 20, conformations=closed.coords + steps, box_size=32, snr_db=0, progress=False
    )


@pytest.fixture(scope="module")
def model(closed, particles):
    return Model(closed, particles, modes=None)


@pytest.fixture(scope="module")
def whole(model, particles):
    return refine(model, particles, **QUIET)


@pytest.fixture(scope="module")
def finished(model, particles, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    refine(model, particles, checkpoint=folder, **QUIET)
    return folder


def copy_of(finished: Path, folder: Path) -> Path:
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def assert_same(one, other):
    for name in ("latents", "std", "scale", "noise", "responsibility"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_a_folder_says_what_is_done_in_it(finished):
    about = json.loads((finished / "run.json").read_text())
    assert about["settings"]["blurs"] == [4.0, 2.0, 0.0] and about["settings"]["seed"] == 0
    assert about["kind"] == "refinement" and "20 particles" in about["particles"]
    assert about["versions"]["torch"] == torch.__version__
    log = (finished / "log.txt").read_text().splitlines()
    assert "20 particles" in log[0]
    assert "block1, pass 1 of 3: blur 4 Å, particles moved by " in log[1]
    assert "converged (" in log[-1]


def test_a_folder_does_not_change_the_answer(finished, model, particles, whole):
    assert_same(refine(model, particles, checkpoint=finished, **QUIET), whole)


# Damage


def test_every_flipped_bit_is_noticed(finished, tmp_path):
    """In the header, which is text, and in the tensors."""
    content = (finished / "block1.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rng = random.Random(5)
    places = [rng.randrange(header) for _ in range(150)]
    places += [rng.randrange(header, len(content)) for _ in range(150)]
    path = tmp_path / "block1.safetensors"
    for number in places:
        damaged = bytearray(content)
        damaged[number] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"expected .*, got .*block1.safetensors.*; try"):
            load_tensors(path, "refinement state")


def test_a_damaged_run_is_refused_and_mended_by_removing_the_file(
    finished, model, particles, whole, tmp_path
):
    folder = copy_of(finished, tmp_path)
    path = folder / "block1.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="got a damaged part: .*checksum differs; try removing"):
        refine(model, particles, checkpoint=folder, **QUIET)
    assert path.read_bytes() == content
    path.unlink()
    assert_same(refine(model, particles, checkpoint=folder, **QUIET), whole)


@pytest.mark.parametrize("name", ["run.json", "log.txt", "lock"])
def test_what_people_read_may_be_damaged(finished, model, particles, whole, tmp_path, name):
    folder = copy_of(finished, tmp_path)
    (folder / name).write_bytes(b"\xff\x00{")
    assert_same(refine(model, particles, checkpoint=folder, **QUIET), whole)


# Two runs


def test_a_folder_in_use_is_refused_by_the_name_of_its_user(tmp_path):
    with open_folder(tmp_path, "refinement", "block", {}):
        with pytest.raises(ValueError, match=f"in which process {os.getpid()} on .* works; try"):
            with open_folder(tmp_path, "refinement", "block", {}):
                pytest.fail("the body must not run")
        (tmp_path / "run.json").unlink()
        with pytest.raises(ValueError, match="in which another process works"):
            with open_folder(tmp_path, "refinement", "block", {}):
                pytest.fail("the body must not run")
    with open_folder(tmp_path, "refinement", "block", {}) as folder:
        folder.log("free again")


HOLD = """
import sys, time
from cryochains.inference.folder import open_folder
with open_folder(sys.argv[1], "refinement", "block", {}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_process_holds_no_folder(model, particles, whole, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {holder.pid} on .* works"):
            refine(model, particles, checkpoint=tmp_path, **QUIET)
    finally:
        holder.kill()
        holder.wait()
    assert_same(refine(model, particles, checkpoint=tmp_path, **QUIET), whole)


def test_a_folder_that_is_a_file_or_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "file", "got a file"), (tmp_path / "file" / "a", "written")):
        with pytest.raises(ValueError, match=f"expected a folder .*{words}.*; try"):
            with open_folder(path, "refinement", "block", {}):
                pytest.fail("the body must not run")


# Cut at any moment

RUN = """
import sys
import torch
from cryochains import Model, load_particles, load_structure, refine
particles = load_particles(sys.argv[1])
model = Model(load_structure("glua3-closed"), particles, modes=None)
print("begins", flush=True)
result = refine(model, particles, blurs=(4.0, 2.0, 0.0), checkpoint=sys.argv[2], progress=False)
torch.save([result.latents, result.std], sys.argv[3])
"""


@pytest.fixture(scope="module")
def star(particles, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "particles.star"
    particles.save(path)
    return path


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(star, closed, tmp_path):
    command = [sys.executable, "-c", RUN, str(star), str(tmp_path / "run"), str(tmp_path / "out")]
    rng = random.Random(3)
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 1.5))
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, capture_output=True)
    particles = load_particles(star)
    expected = refine(Model(closed, particles, modes=None), particles, **QUIET)
    latents, std = torch.load(tmp_path / "out")
    assert torch.equal(latents, expected.latents) and torch.equal(std, expected.std)
    assert not list((tmp_path / "run").glob(".part-*"))


# A full disk, a vanished stack, numbers that are none


@pytest.mark.parametrize("n_written", [0, 2])
def test_a_full_disk_does_not_end_a_run(model, particles, whole, tmp_path, monkeypatch, n_written):
    """States that cannot be written are named; those before stay whole."""
    save = cryochains._files.save_file
    written = []

    def fill_up(*arguments, **settings):
        if len(written) == n_written:
            raise OSError(28, "No space left on device")
        written.append(1)
        save(*arguments, **settings)

    monkeypatch.setattr(cryochains._files, "save_file", fill_up)
    with pytest.warns(UserWarning, match=r"No space left on device.*; try .*; the run goes on"):
        result = refine(model, particles, checkpoint=tmp_path, **QUIET)
    assert_same(result, whole)
    assert "No space left" in (tmp_path / "log.txt").read_text()
    assert not list(tmp_path.glob(".part-*"))
    monkeypatch.setattr(cryochains._files, "save_file", save)
    if n_written:
        _, meta = load_tensors(tmp_path / "block1.safetensors", "refinement state")
        assert len(meta["history"]) == n_written
    assert_same(refine(model, particles, checkpoint=tmp_path, **QUIET), whole)


def after_a_pass(monkeypatch, do):
    """Let something happen once after the first pass."""
    original = cryochains.inference.passes.save_state
    done = []

    def save(run, *arguments):
        original(run, *arguments)
        if run.folder is not None and not done:
            done.append(1)
            do()

    monkeypatch.setattr(cryochains.inference.passes, "save_state", save)


def test_a_stack_that_vanishes_is_named_and_the_run_goes_on_later(
    star, closed, tmp_path, monkeypatch
):
    particles = load_particles(star)
    model = Model(closed, particles, modes=None)
    expected = refine(model, particles, **QUIET)
    stack, elsewhere = star.with_suffix(".mrcs"), tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        # Reading keeps files open: a new stack of the same name is noticed.
        after_a_pass(patch, lambda: (stack.rename(elsewhere), stack.write_bytes(b"")))
        with pytest.raises((ValueError, FileNotFoundError), match=r"expected .*mrcs.*; try") as got:
            refine(model, load_particles(star), checkpoint=tmp_path / "run", **QUIET)
        assert "\n" not in str(got.value)
    elsewhere.rename(stack)
    resumed = refine(model, load_particles(star), checkpoint=tmp_path / "run", **QUIET)
    assert_same(resumed, expected)


def test_a_pass_that_ends_in_nan_is_not_kept(model, particles, whole, tmp_path, monkeypatch):
    original = cryochains.inference.passes._propose
    calls = []

    def propose(*arguments):
        calls.append(1)
        state, step = original(*arguments)
        if len(calls) == 2:
            state.proposal[3] = torch.nan
        return state, step

    with monkeypatch.context() as patch:
        patch.setattr(cryochains.inference.passes, "_propose", propose)
        with pytest.raises(ValueError, match="after pass 2, got NaN or Inf for 1 of 20 .*; try"):
            refine(model, particles, checkpoint=tmp_path, **QUIET)
    assert_same(refine(model, particles, checkpoint=tmp_path, **QUIET), whole)


def test_images_changed_meanwhile_are_refused(model, particles, finished):
    images = particles.read_images().clone()
    images[13, 16, 16] *= 1.001
    before = (finished / "block1.safetensors").read_bytes()
    with pytest.raises(ValueError, match="got one whose images differ; try another folder"):
        refine(model, replace(particles, images=images), checkpoint=finished, **QUIET)
    assert (finished / "block1.safetensors").read_bytes() == before
