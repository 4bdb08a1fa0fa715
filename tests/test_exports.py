"""Movies and ChimeraX scripts: whole files in the colours of the figures, that find each other."""

import numpy as np
import prody
import pytest
import torch
from PIL import Image

from cryochains import exports, plots
from cryochains.dynamics import Dynamics
from cryochains.exports import save_chimerax, save_movie
from cryochains.latent import compute_pca
from cryochains.modes import compute_modes
from cryochains.structure import load_structure


@pytest.fixture(scope="module")
def motions(closed):
    dynamics = Dynamics(closed, compute_modes(closed, 2))
    return compute_pca(dynamics, torch.randn(30, dynamics.n_latents, generator=torch.Generator().manual_seed(0)))


def test_movie_swings_there_and_back(motions, tmp_path):
    path = save_movie(tmp_path / "new" / "pc1.gif", motions, n=8, fps=10)
    assert [file.name for file in path.parent.iterdir()] == ["pc1.gif"]
    with Image.open(path) as movie:
        assert movie.n_frames == 8 and movie.info["duration"] == 100 and movie.info["loop"] == 0
        frames = []
        for number in range(8):
            movie.seek(number)
            frames.append(np.asarray(movie.convert("L"), dtype=float))
    apart = [np.abs(frame - frames[0]).mean() for frame in frames]
    assert min(apart[1:]) > 0.1 and np.argmax(apart) == 4, "farthest in the middle"
    assert apart[1] == pytest.approx(apart[7], rel=0.05) and apart[2] == pytest.approx(apart[6], rel=0.05)
    # Only the backbones move: the camera stands still.
    edges = np.stack([np.concatenate([frame[:30].ravel(), frame[-30:].ravel()]) for frame in frames])
    assert np.ptp(edges, axis=0).max() < 40, "but for the colours of a GIF"


def test_movies_that_cannot_be_written(motions, tmp_path, monkeypatch):
    monkeypatch.setattr(exports.FFMpegWriter, "isAvailable", lambda: False)
    for name, settings, sentence in (
        ("a.avi", {}, "expected a path that ends in .gif or .mp4"),
        ("a.gif", {"n": 1}, "two frames or more, got a.gif, n=1"),
        ("a.gif", {"component": 9}, "expected a component from 0 to 4, got 9"),
        ("a.mp4", {}, "expected the program ffmpeg, which writes MP4, got none; try a.gif"),
    ):
        with pytest.raises(ValueError, match=sentence):
            save_movie(tmp_path / name, motions, **settings)
    assert not list(tmp_path.iterdir())


def test_interrupted_movie_leaves_no_half_file(motions, tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_text("old")

    def stop(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(exports.PillowWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        save_movie(tmp_path / "a.gif", motions, n=2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def commands(path) -> list[str]:
    return path.read_text().splitlines()


def test_chimerax_script_finds_its_file(motions, tmp_path):
    script = save_chimerax(tmp_path / "one" / "my pc1.cxc", motions.dynamics, motions.traverse(0, 3))
    moved = (tmp_path / "one").rename(tmp_path / "two") / script.name
    lines = commands(moved)
    name = lines[0].removeprefix('open "').removesuffix('" coordset true')
    assert name == "my pc1.pdb", "beside the script, wherever that is"
    assert prody.parsePDB(str(moved.parent / name)).numCoordsets() == 3
    assert "color #1/A #0072B2" in lines and "color #1/B #D55E00" in lines and "cartoon" in lines
    assert lines[-1] == "coordset slider #1"
    with pytest.raises(ValueError, match="expected a path that ends in .cxc, got a.py; try a.cxc"):
        save_chimerax(tmp_path / "a.py", motions.dynamics, motions.traverse(0, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_chimerax_script_names_chains_as_the_file_does(closed, tmp_path):
    atoms = closed.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "light", "heavy"))
    structure = load_structure(atoms)
    script = save_chimerax(tmp_path / "a.cxc", Dynamics(structure), torch.zeros(2, 12))
    letters = list(dict.fromkeys(prody.parsePDB(str(tmp_path / "a.pdb")).getChids()))
    colors = [line.split()[1:] for line in commands(script) if line.startswith("color")]
    assert colors == [[f"#1/{letter}", color] for letter, color in zip(letters, plots.COLORS, strict=False)]


def test_chimerax_script_colours_bodies_within_a_chain(closed, tmp_path):
    bodies = {"tip": "chain A and resnum 20 to 22", "base": "chain A and resnum 30 to 33", "rest": "chain B"}
    structure = load_structure(closed.atoms, bodies=bodies)
    script = save_chimerax(tmp_path / "a.cxc", Dynamics(structure), torch.zeros(2, 18))
    colors = [line.split()[1:] for line in commands(script) if line.startswith("color")]
    specs = ["#1/A:20,21,22", "#1/A:30,31,32,33", "#1/B"]
    assert colors == [[spec, color] for spec, color in zip(specs, plots.COLORS, strict=False)]
