"""Examples run as a user runs them: at a small size, in a folder of their own."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_demo_writes_its_scores_figures_and_motion(tmp_path):
    small = ["--n-train", "60", "--n-test", "20", "--box-size", "32", "--modes", "3", "--epochs", "1", "--width", "0.1"]
    command = [sys.executable, str(ROOT / "examples" / "demo.py"), *small, "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mean conformation" in done.stdout and "information limit" in done.stdout
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    keys = {"n_train", "n_test", "snr_db", "encoder", "map", "mean", "limit", "pc1_ends_rmsd", "seconds"}
    assert set(metrics) == keys
    assert (metrics["n_train"], metrics["n_test"]) == (60, 20)
    # Even 60 small images tell more than the mean conformation does, and no more than the limit allows.
    assert metrics["limit"]["rmsd"] < metrics["map"]["rmsd"] < metrics["mean"]["rmsd"]
    assert metrics["map"]["spearman"] > 0.8
    written = {path.name for path in tmp_path.iterdir()}
    assert {"particles.star", "particles.mrcs", "pc1.pdb", "latents.csv"} <= written
    assert {"particles.png", "latent_space_map.png", "latent_space_encoder.png", "rmsd.png"} <= written
