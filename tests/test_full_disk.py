"""Every writer on a full disk: the old file stays whole, and one sentence says what happened."""

import json
import subprocess
import sys

import pytest

# A limit on the size of files stands for a full disk; it holds for a whole process.
SCRIPT = """
import json, os, resource, signal, sys, warnings
from pathlib import Path
import cryochains as cc
from cryochains.inference import train_encoder

folder, limit = Path(sys.argv[1]), int(sys.argv[2])
closed = cc.load_structure("glua3-closed")
quiet = {"progress": False}
particles = cc.simulate_particles(
    closed, 24, conformations=closed.coords[None], box_size=32, snr_db=0, **quiet
)
model = cc.Model(closed, particles, modes=2)
settings = {"blurs": (4.0, 0.0), **quiet}
result = cc.refine(model, particles, **settings)
motions = cc.compute_pca(result)
density = cc.reconstruct(particles, **quiet)
halves = particles[:16], particles[16:]
encoder = cc.train_encoder(model, *halves, width=0.1, epochs=1, **quiet)
def simulate(path):
    cc.simulate_particles(
        closed, 24, conformations=closed.coords[None], box_size=32, path=path, **quiet
    )
writers = {
    "result.safetensors": result.save,
    "population.safetensors": result.population.save,
    "encoder.safetensors": encoder.save,
    "particles.star": particles.save,
    "simulated.star": simulate,
    "map.mrc": density.save,
    "structure.pdb": closed.save,
    "structure.cif": closed.save,
    **{
        f"motion{suffix}": lambda path: cc.save_motion(path, motions)
        for suffix in (".pdb", ".cif", ".dcd", ".cxc", ".mrc", ".gif")
    },
}
for name in writers:
    (folder / name).write_text("old")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
answers = {}
for name, write in writers.items():
    try:
        write(folder / name)
        answers[name] = ["written", (folder / name).read_bytes()[:3] != b"old"]
    except Exception as error:
        answers[name] = [type(error).__name__, str(error), (folder / name).read_text() == "old"]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    again = cc.refine(model, particles, checkpoint=folder / "run", **settings)
    same = bool((again.latents == result.latents).all())
    answers["run"] = [same, *{str(w.message) for w in caught}]
    cc.train_encoder(model, *halves, width=0.1, epochs=1, checkpoint=folder / "train", **quiet)
    answers["train"] = [True, *{str(w.message) for w in caught}]
answers["left"] = [path.name for path in folder.rglob(".part*")]
sys.__stdout__.write("ANSWERS" + json.dumps(answers))
"""


@pytest.mark.parametrize("limit", [1_000, 6_000])
def test_every_writer_on_a_full_disk(tmp_path, limit):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.partition("ANSWERS")[2])
    assert answers.pop("left") == []
    for kind in ("run", "train"):
        same, *sentences = answers.pop(kind)
        assert same and sentences, kind
        for sentence in sentences:
            assert sentence.startswith("expected ") and "; the run goes on" in sentence
    refused = [name for name, answer in answers.items() if answer[0] != "written"]
    assert len(refused) >= 12, refused
    for name in refused:
        kind, sentence, is_old_whole = answers[name]
        assert kind == "ValueError" and is_old_whole, (name, answers[name])
        assert sentence.startswith("expected a folder that can be written, got "), name
        assert "; try another folder or disk" in sentence and "\n" not in sentence, name
    assert all(answers[name][1] for name in answers if name not in refused)
