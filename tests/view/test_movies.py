"""Movies: whole files of backbones that move there and back before a camera that stands still."""

import matplotlib.animation
import numpy as np
import pytest
import torch
from PIL import Image

from cryochains.analysis import compute_pca
from cryochains.inference import Result
from cryochains.model import Model
from cryochains.view import save_motion


@pytest.fixture(scope="module")
def motions(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    generator = torch.Generator().manual_seed(0)
    return compute_pca(Result(model, torch.randn(30, model.n_latents, generator=generator)))


def test_movie_swings_there_and_back(motions, tmp_path):
    path = save_motion(tmp_path / "new" / "pc1.gif", motions, n=8, fps=10)
    assert [file.name for file in path.parent.iterdir()] == ["pc1.gif"]
    with Image.open(path) as movie:
        assert movie.n_frames == 8 and movie.info["duration"] == 100 and movie.info["loop"] == 0
        frames = []
        for number in range(8):
            movie.seek(number)
            frames.append(np.asarray(movie.convert("L"), dtype=float))
    apart = [np.abs(frame - frames[0]).mean() for frame in frames]
    assert min(apart[1:]) > 0.1 and np.argmax(apart) == 4, "farthest in the middle"
    assert apart[1] == pytest.approx(apart[7], rel=0.05)
    assert apart[2] == pytest.approx(apart[6], rel=0.05)
    # Only the backbones move: the camera stands still.
    edges = [np.concatenate([frame[:30].ravel(), frame[-30:].ravel()]) for frame in frames]
    assert np.ptp(np.stack(edges), axis=0).max() < 40, "but for the colours of a GIF"


def test_movies_that_cannot_be_written(motions, tmp_path, monkeypatch):
    monkeypatch.setattr(matplotlib.animation.FFMpegWriter, "isAvailable", lambda: False)
    for name, settings, sentence in (
        ("a.avi", {}, "expected a path that ends in .*.gif, .mp4"),
        ("a.gif", {"n": 1}, "two frames or more, got a.gif, n=1"),
        ("a.gif", {"component": 9}, "expected a component from 0 to 4, got 9"),
        ("a.mp4", {}, "expected the program ffmpeg, which writes MP4, got none; try a.gif"),
    ):
        with pytest.raises(ValueError, match=sentence):
            save_motion(tmp_path / name, motions, **settings)
    assert not list(tmp_path.iterdir())


def test_interrupted_movie_leaves_no_half_file(motions, tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_text("old")

    def stop(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(matplotlib.animation.PillowWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        save_motion(tmp_path / "a.gif", motions, n=2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(
    not matplotlib.animation.FFMpegWriter.isAvailable(), reason="ffmpeg is not installed"
)
def test_mp4(motions, tmp_path):
    path = save_motion(tmp_path / "a.mp4", motions, n=3)
    assert path.read_bytes()[4:8] == b"ftyp"
