"""Several processes share the particles: the same answers, one writer, and no half answers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cryochains import (
    Model,
    check,
    encode,
    load_particles,
    load_result,
    load_structure,
    reconstruct,
    refine,
    simulate_particles,
    train_encoder,
)
from cryochains._processes import _started_together

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "examples" / "cluster" / "refine.sbatch"
# Two processes of this size take longer to start than to run.
SCRIPT = """
import os, sys, warnings
import torch
from cryochains import *
verb, star, out = sys.argv[1:4]
particles = load_particles(star)
rank = os.environ["RANK"]
if "others" in verb and rank == "1":
    particles = particles[::-1]
closed = load_structure("glua3-closed")
model = Model(closed, particles, modes=2)
print(f"process {os.getpid()}", flush=True)
if "check" in verb:
    torch.save(check(model, particles).table.to_dict(), f"{out}/check{rank}")
if "refine" in verb:
    r = refine(model, particles, n_population=20, checkpoint=f"{out}/run", progress=False)
    torch.save([r.latents, r.std, r.population.mean, r.responsibility], f"{out}/refine{rank}")
if "reconstruct" in verb:
    density = reconstruct(particles, origin=closed.origin, progress=False)
    torch.save([density.volume, density.fsc], f"{out}/reconstruct{rank}")
if "train" in verb:
    settings = dict(width=0.1, epochs=2, batch_size=7, checkpoint=f"{out}/train", progress=False)
    encoder = train_encoder(model, particles[:22], particles[22:], **settings)
    latents = encode(encoder, particles).latents
    torch.save([latents, encoder.network.state_dict(), encoder.history], f"{out}/train{rank}")
"""


@pytest.fixture(scope="module")
def star(tmp_path_factory) -> Path:
    closed = load_structure("glua3-closed")
    steps = np.linspace(-3, 3, 31)[:, None, None] * (closed.chain_index == 1)[:, None]
    path = tmp_path_factory.mktemp("data") / "particles.star"
    simulate_particles(
        closed,
        31,
        conformations=closed.coords + steps,
        box_size=32,
        snr_db=3,
        path=path,
        progress=False,
    )
    return path


def start(verb: str, star: Path, out: Path, n: int = 2) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    script = out / "script.py"
    script.write_text(SCRIPT)
    # A port of their own, since tests run side by side.
    launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.Popen(
        [*launcher, str(script), verb, str(star), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def shared(star, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shared")
    process = start("check refine reconstruct train", star, out)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return out


def of_both(shared: Path, verb: str) -> list:
    return [torch.load(shared / f"{verb}{rank}", weights_only=False) for rank in (0, 1)]


def test_a_refinement_is_that_of_one_process(star, shared):
    one, other = of_both(shared, "refine")
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    particles = load_particles(star)
    model = Model(load_structure("glua3-closed"), particles, modes=2)
    alone = refine(model, particles, n_population=20, progress=False)
    torch.testing.assert_close(one[0], alone.latents, rtol=0, atol=1e-3)
    torch.testing.assert_close(one[1], alone.std, rtol=0, atol=1e-3)
    torch.testing.assert_close(one[2], alone.population.mean, rtol=0, atol=1e-3)
    torch.testing.assert_close(one[3], alone.responsibility, rtol=0, atol=1e-3)


def test_a_run_of_two_processes_goes_on_in_one(star, shared):
    particles = load_particles(star)
    model = Model(load_structure("glua3-closed"), particles, modes=2)
    again = refine(model, particles, n_population=20, checkpoint=shared / "run", progress=False)
    torch.testing.assert_close(again.latents, of_both(shared, "refine")[0][0], rtol=0, atol=1e-3)
    assert "31 particles, 2 processes of 1 threads" in (shared / "run" / "log.txt").read_text()


def test_a_check_says_the_same(star, shared):
    one, other = of_both(shared, "check")
    particles = load_particles(star)
    table = check(Model(load_structure("glua3-closed"), particles, modes=2), particles).table
    assert one.keys() == other.keys() == table.to_dict().keys()
    for name, column in table.to_dict().items():
        for row, value in column.items():
            for answer in (one, other):
                if isinstance(value, float):
                    assert answer[name][row] == pytest.approx(value, rel=1e-4, nan_ok=True)
                else:
                    assert answer[name][row] == value, (name, row)


def test_a_map_is_the_sum_of_all_shares(star, shared):
    one, other = of_both(shared, "reconstruct")
    particles = load_particles(star)
    alone = reconstruct(particles, origin=load_structure("glua3-closed").origin, progress=False)
    np.testing.assert_array_equal(one[0], other[0])
    np.testing.assert_allclose(one[0], alone.volume, atol=1e-4 * abs(alone.volume).max())
    np.testing.assert_allclose(one[1], alone.fsc, atol=1e-4)


def test_the_batch_does_not_grow_with_the_processes(star, shared):
    """The same steps as in one process: the last batch has one particle, of one of them."""
    one, other = of_both(shared, "train")
    assert torch.equal(one[0], other[0])
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    particles = load_particles(star)
    model = Model(load_structure("glua3-closed"), particles, modes=2)
    encoder = train_encoder(
        model, particles[:22], particles[22:], width=0.1, epochs=2, batch_size=7, progress=False
    )
    for mine, theirs in zip(encoder.history, one[2], strict=True):
        assert mine["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-4)
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    latents = encode(encoder, particles).latents
    torch.testing.assert_close(one[0], latents, rtol=0.01, atol=1e-3)


def test_one_process_that_is_killed_ends_all_and_the_run_goes_on(star, shared, tmp_path):
    process = start("refine", star, tmp_path)
    line = ""
    while not line.startswith("process "):
        line = process.stdout.readline()
    time.sleep(2.0)
    os.kill(int(line.split()[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    process = start("refine", star, tmp_path)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    resumed, expected = (torch.load(path / "refine0") for path in (tmp_path, shared))
    assert all(torch.equal(a, b) for a, b in zip(resumed, expected, strict=True))


def test_processes_of_other_particles_are_refused(star, tmp_path):
    process = start("refine others", star, tmp_path)
    output, _ = process.communicate()
    assert process.returncode != 0
    assert "expected the same particles in all 2 processes" in output


# Stands for SLURM's: as many processes as there are tasks.
SRUN = """#!/bin/bash
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_STEP_NUM_TASKS=2 SLURM_STEP_ID=0 \\
        SLURM_STEP_NODELIST=localhost PYTHON -m "$@" &
    echo $! >> tasks
done
wait
"""
# Ends the tasks, as a job that is requeued ends.
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
kill -9 $(cat tasks)
"""


def slurm(star: Path, tmp_path: Path) -> subprocess.Popen:
    programs = tmp_path / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text.replace("PYTHON", sys.executable))
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        ["bash", SBATCH, str(star), "glua3-closed", str(tmp_path / "run"), "--modes", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=tmp_path,
    )


def test_a_job_on_a_cluster_goes_on_after_it_was_requeued(star, tmp_path):
    """The sbatch file as it is, with SLURM's two programs stood in for."""
    job = slurm(star, tmp_path)
    log = tmp_path / "run" / "log.txt"
    while job.poll() is None and not (log.exists() and "pass 1" in log.read_text()):
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert "goes back into the queue" in output, output
    assert (tmp_path / "requeued").read_text().startswith(f"requeue {os.getpid()}")
    assert not (tmp_path / "run" / "result.safetensors").exists()
    job = slurm(star, tmp_path)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "block1: going on after" in output and output.count("Result(31 particles") == 1
    assert len(load_result(tmp_path / "run")) == 31


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_ID": "7"}, None),
        (
            {"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "n1", "MASTER_PORT": "1234"},
            (3, 4, "n1", 1234),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4",
                "SLURM_PROCID": "2",
                "SLURM_JOB_ID": "70123",
                "SLURM_STEP_ID": "1",
                "SLURM_STEP_NODELIST": "gpu[003-005,9],login",
            },
            (2, 4, "gpu003", 20_000 + 70124 % 20_000),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_PROCID": "0",
                "SLURM_STEP_NODELIST": "a1.example,b2",
                "MASTER_PORT": "29511",
            },
            (0, 2, "a1.example", 29511),
        ),
    ],
)
def test_who_was_started_together(environment, expected):
    """A SLURM job without srun is one process, whatever it reserved."""
    assert _started_together(environment) == expected
