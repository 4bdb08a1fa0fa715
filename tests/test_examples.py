"""Examples run as a user runs them: at a small size, in a folder of their own."""

import json
import subprocess
import sys
from pathlib import Path

from cryochains.model import load_population

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_writes_its_scores_figures_and_motion(tmp_path):
    small = ["--n-train", "60", "--n-test", "20", "--box-size", "32", "--modes", "3"]
    small += ["--epochs", "1", "--width", "0.1"]
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *small, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean conformation" in done.stdout and "information limit" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    of_data = {"n_train", "n_test", "snr_db"}
    of_methods = {"encoder", "map", "mean", "limit"}
    assert set(metrics) == of_data | of_methods | {"pc1_ends_rmsd", "seconds"}
    assert (metrics["n_train"], metrics["n_test"]) == (60, 20)
    # Even 60 small images tell more than the mean conformation does, and no more than the limit.
    assert metrics["limit"]["rmsd"] < metrics["map"]["rmsd"] < metrics["mean"]["rmsd"]
    assert metrics["map"]["spearman"] > 0.8
    written = {path.name for path in tmp_path.iterdir()}
    assert {"particles.star", "particles.mrcs", "pc1.pdb", "latents.csv"} <= written
    figures = {"particles", "latent_space_map", "latent_space_encoder", "rmsd"}
    assert {f"{name}.png" for name in figures} <= written


def test_the_population_of_the_package_can_be_learned_again(tmp_path):
    path = tmp_path / "glua3.safetensors"
    command = [sys.executable, str(ROOT / "examples" / "learn_population.py")]
    command += ["--n-train", "8", "--n-test", "4", "--out", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "RMSD" in done.stdout and "limit" in done.stdout
    learned = load_population(path)
    assert len(learned.mean) == 52
    # No coordinates and no weights of a network.
    assert path.stat().st_size < 50_000
