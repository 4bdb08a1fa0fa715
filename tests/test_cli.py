"""The command line: what it writes opens in Python, what it refuses is one sentence."""

import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner

from cryochains import cli
from cryochains.images import load_particles
from cryochains.inference import load_result, passes, refine
from cryochains.model import Model, simulate_particles
from cryochains.molecule import load_structure, match_structures, morph, superpose

MODES = ["--modes", "2"]


@pytest.fixture(scope="module")
def star(tmp_path_factory):
    """Particles of GluA3 between its two states, in a .star beside its images."""
    closed, opened = match_structures(load_structure("glua3-closed"), load_structure("glua3-open"))
    path = morph(closed, superpose(opened, closed), 10)
    particles = simulate_particles(
        closed, 60, conformations=path, box_size=32, snr_db=3.0, seed=1, progress=False
    )
    star = tmp_path_factory.mktemp("job") / "job.star"
    particles.save(star)
    return star


def run(*arguments):
    return CliRunner().invoke(cli.main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(star, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "new"
    answer = run("refine", star, "glua3-closed", "-o", folder, *MODES)
    assert answer.exit_code == 0, answer.output
    return folder, answer


def test_a_run_is_what_python_gives(star, finished):
    folder, answer = finished
    result = load_result(folder)
    particles = load_particles(star)
    model = Model(load_structure("glua3-closed"), particles, modes=2)
    expected = refine(model, particles, progress=False)
    assert torch.equal(result.latents, expected.latents)
    assert torch.equal(result.std, expected.std)
    assert result.particles is not None
    assert "Result(60 particles, refined" in answer.output
    assert "Verdict: good" in answer.output
    names = {path.name for path in folder.iterdir()}
    assert names == {"result.safetensors", "run.json", "log.txt", "lock"}


def test_a_result_is_not_overwritten(star, finished):
    folder, _ = finished
    before = (folder / "result.safetensors").read_bytes()
    answer = run("refine", star, "glua3-closed", "-o", folder, *MODES)
    assert answer.exit_code == 1
    assert "expected a folder without a result" in answer.output
    assert (folder / "result.safetensors").read_bytes() == before


def test_a_run_that_was_cut_goes_on(star, finished, tmp_path, monkeypatch):
    save = passes.save_state

    def cut(given, *arguments):
        save(given, *arguments)
        if given.folder is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(passes, "save_state", cut)
        assert run("refine", star, "glua3-closed", "-o", tmp_path, *MODES).exit_code == 1
    assert (tmp_path / "block1.safetensors").exists()
    answer = run("refine", star, "glua3-closed", "-o", tmp_path, *MODES)
    assert answer.exit_code == 0 and "block1: going on after 1 passes" in answer.output
    assert "finished, converged" in (tmp_path / "log.txt").read_text()
    assert torch.equal(load_result(tmp_path).latents, load_result(finished[0]).latents)


def test_check_says_what_is_wrong_by_its_exit_status(star):
    sound = run("check", star, "glua3-closed", *MODES)
    assert sound.exit_code == 0, sound.output
    assert "Check of 60 images" in sound.output
    dark = run("check", star, "glua3-closed", "--invert", *MODES)
    assert dark.exit_code == 3
    assert "red" in dark.output


def test_a_map_is_written_with_or_without_a_structure(star, tmp_path):
    for more in ([], ["--structure", "glua3-closed"]):
        path = tmp_path / f"map{len(more)}.mrc"
        answer = run("reconstruct", star, "-o", path, *more)
        assert answer.exit_code == 0, answer.output
        assert path.stat().st_size > 32**3 * 4 and "Map(32³ voxels" in answer.output


@pytest.mark.parametrize(
    "arguments, status, sentence",
    [
        (["refine", "none.star", "glua3-closed", "-o", "x"], 1, "Error: expected"),
        (["check", "STAR", "none.pdb"], 1, "Error: expected a PDB or mmCIF file"),
        (["refine", "STAR", "glua3-closed"], 2, "Missing option '-o'"),
        (["refine", "STAR", "glua3-closed", "-o", "x", "--modes", "-1"], 2, "Invalid value"),
        (["reconstruct", "STAR", "-o", "map.txt"], 1, "Error: expected"),
        (["refine", "STAR", "glua3-closed", "-o", "x", "--population", "y"], 1, "a population"),
        (["melt"], 2, "No such command"),
    ],
)
def test_what_is_refused_is_one_sentence(star, tmp_path, monkeypatch, arguments, status, sentence):
    monkeypatch.chdir(tmp_path)
    answer = run(*[star if argument == "STAR" else argument for argument in arguments])
    assert answer.exit_code == status, answer.output
    assert sentence in answer.output and "Traceback" not in answer.output
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").iterdir())


def test_a_log_file_holds_lines(star, tmp_path):
    """As a batch job writes it: what a terminal overwrites is not run together."""
    log = tmp_path / "log.txt"
    command = [sys.executable, "-m", "cryochains.cli", "reconstruct", str(star), "-o"]
    with log.open("w") as stream:
        subprocess.run([*command, str(tmp_path / "m.mrc")], stderr=stream, check=True)
    text = log.read_text()
    assert "\r" not in text
    assert 0 < len(text.splitlines()) < 10
