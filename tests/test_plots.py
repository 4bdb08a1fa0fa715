"""Every figure can be drawn, says what its axes are, and leaves matplotlib's global state alone."""

from io import BytesIO

import matplotlib.pyplot
import numpy as np
import prody
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from cryochains import plots
from cryochains.dynamics import Dynamics
from cryochains.latent import compute_pca
from cryochains.metrics import score_motion
from cryochains.model import CryoChains
from cryochains.modes import compute_modes
from cryochains.particles import ParticleStack
from cryochains.simulation import simulate_particles
from cryochains.structure import load_structure
from cryochains.training import Epoch


@pytest.fixture(scope="module")
def dynamics(closed):
    return Dynamics(closed, compute_modes(closed, 2))


@pytest.fixture(scope="module")
def particles(closed, dynamics):
    latents = torch.randn(30, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    return simulate_particles(closed, 30, dynamics=dynamics, latents=latents, box_size=32, progress=False)


@pytest.fixture(scope="module")
def model(closed, particles):
    return CryoChains.for_particles(closed, particles, modes=2, width=0.02)


@pytest.fixture(autouse=True)
def global_state():
    yield
    assert matplotlib.pyplot.get_fignums() == [], "figures are returned, not kept by pyplot"


def draw(figure, panels=None) -> str:
    """Render a figure and return all its text."""
    assert isinstance(figure, Figure)
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=50)
    assert stream.getvalue().startswith(b"\x89PNG") and len(stream.getvalue()) > 1000
    assert figure._repr_png_().startswith(b"\x89PNG"), "a notebook shows it as the value of a cell"
    shown = [axis for axis in figure.axes if axis.get_label() != "<colorbar>"]
    assert panels is None or len(shown) == panels
    parts = [figure.get_suptitle()]
    for axis in figure.axes:
        parts += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel()]
        if axis.get_legend():
            parts += [text.get_text() for text in axis.get_legend().get_texts()]
    return " | ".join(parts)


@pytest.mark.parametrize("n, shown", [(1, 1), (4, 4), (99, 7)])
def test_particles(model, particles, n, shown):
    figure = plots.plot_particles(model, particles[:7], particles.truth.latents[:7], n)
    text = draw(figure, panels=3 * shown)
    assert all(word in text for word in ("image", "reconstruction", "residual", f"{shown} of 7 particles"))


def test_residual_is_what_is_left(model, particles):
    figure = plots.plot_particles(model, particles, particles.truth.latents, 3)
    image, reconstruction, residual = (
        np.stack([axis.images[0].get_array() for axis in figure.axes[3 * row : 3 * row + 3]]) for row in range(3)
    )
    np.testing.assert_allclose(image - reconstruction, residual, atol=1e-5)
    np.testing.assert_allclose(image, particles.read_images(slice(3)), atol=1e-6)
    # The truth explains all but the noise.
    assert residual.std() == pytest.approx(particles.truth.noise_std, rel=0.05)


def test_particles_without_truth_or_ctf(model, particles):
    bare = ParticleStack(particles.read_images(), particles.rotations, pixel_size=particles.pixel_size)
    draw(plots.plot_particles(model, bare, torch.zeros(30, model.dynamics.n_latents), 2), panels=6)


@pytest.mark.parametrize("n_epochs", [1, 4])
@pytest.mark.parametrize("scored", [True, False])
def test_training(n_epochs, scored):
    score = {"rmsd": 1.5, "explained_motion": 0.1} if scored else {}
    history = [Epoch(k + 1, 1 / (k + 1), 1.1 / (k + 1), **score) for k in range(n_epochs)]
    text = draw(plots.plot_training(history), panels=1 + scored)
    assert "epoch" in text and "held out" in text and ("RMSD (Å)" in text) == scored


@pytest.mark.parametrize("n_passes", [1, 6])
def test_refinement(n_passes):
    record = {"blur": 2.0, "step": 0.3, "refused": 0, "noise_std": 0.1, "contrast": 1.0, "spread": 3.0}
    text = draw(plots.plot_refinement([record] * n_passes), panels=3)
    assert "step (Å)" in text and "noise" in text and "spread (Å)" in text


@pytest.mark.parametrize("with_truth", [True, False])
@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_latent_space(dynamics, particles, with_truth, n_components):
    motions = compute_pca(dynamics, particles.truth.latents, n_components=n_components)
    truth = np.linspace(0, 1, 30) if with_truth else None
    text = draw(plots.plot_latent_space(motions, truth=truth, title="|Spearman| 0.97"), panels=1 + with_truth)
    assert "|Spearman| 0.97" in text and "PC1 (Å, " in text and motions.label in text
    assert ("PC2" in text) == (n_components > 1)


def test_latent_space_of_other_particles(dynamics, particles):
    motions = compute_pca(dynamics, particles.truth.latents[:20], chain="B", kind="rigid")
    figure = plots.plot_latent_space(motions, motions.transform(particles.truth.latents[20:]), np.arange(10.0))
    draw(figure, panels=2)
    assert len(figure.axes[1].lines[0].get_xdata()) == 10


def test_rmsd(dynamics, particles):
    scores = score_motion(dynamics, 0.5 * particles.truth.latents, particles)
    methods = {"encoder": 1.2 * scores.rmsd_per_particle, "MAP": scores.rmsd_per_particle}
    text = draw(plots.plot_rmsd(methods, scores.mean_rmsd_per_particle, 0.5 * scores.rmsd_per_particle))
    assert f"MAP: {scores.rmsd:.2f} Å" in text and f"mean conformation: {scores.mean_rmsd:.2f} Å" in text
    assert "information limit" in text and "no re-superposition" in text
    assert "information limit" not in draw(plots.plot_rmsd({"MAP": methods["MAP"]}, scores.mean_rmsd_per_particle))


@pytest.mark.parametrize("component", [0, 1])
def test_conformations(dynamics, particles, component):
    motions = compute_pca(dynamics, particles.truth.latents)
    text = draw(plots.plot_conformations(motions, component, n=4), panels=2)
    assert f"PC{component + 1}" in text and "chain A" in text and "chain B" in text


def test_residue_motion(dynamics, particles, closed):
    motions = compute_pca(dynamics, particles.truth.latents)
    path = motions.traverse(0, n=3)
    figure = plots.plot_residue_motion(dynamics, path, title="PC1")
    text = draw(figure, panels=2)
    assert "residue of chain A" in text and "displacement (Å)" in text and "PC1" in text
    coords = dynamics.decode(path)
    expected = (coords[-1] - coords[0]).norm(dim=1)[closed.chain_index == 1]
    last = figure.axes[1].lines[-1]
    np.testing.assert_allclose(last.get_ydata(), expected, atol=1e-4)
    assert last.get_xdata().tolist() == closed.resnums[closed.chain_index == 1].tolist()


def test_one_body_is_one_panel(closed):
    whole = closed.as_one_body()
    dynamics = Dynamics(whole, compute_modes(whole, 2), rotation=False, translation=False)
    draw(plots.plot_residue_motion(dynamics, torch.eye(2)), panels=1)
    still = torch.zeros(2, 2)
    draw(plots.plot_residue_motion(dynamics, still), panels=1)


def test_nothing_needs_a_gradient_free_caller(model, particles):
    latents = particles.truth.latents.clone().requires_grad_()
    draw(plots.plot_residue_motion(model.dynamics, latents[:2]))
    draw(plots.plot_particles(model, particles, latents, 1))


# Backbones


def drawn(axis) -> np.ndarray:
    """(k, 2, 2) segments of the backbone in a panel."""
    return np.array(axis.collections[0].get_segments())


def test_structure(closed):
    figure = plots.plot_structure(closed)
    text = draw(figure, panels=2)
    assert "glua3-closed: 731 residues" in text and "chain A" in text and "chain B" in text
    gaps = np.linalg.norm(np.diff(closed.node_coords, axis=0), axis=1)
    assert (gaps > 8).sum() > 1, "between chains, and where residues are missing"
    for axis in figure.axes:
        assert len(drawn(axis)) == (gaps < 8).sum()
        assert np.linalg.norm(drawn(axis)[:, 1] - drawn(axis)[:, 0], axis=1).max() < 8
        assert {tuple(np.argsort(color[:3])) for color in axis.collections[0].get_colors()} == {(0, 1, 2), (2, 1, 0)}
    # The longest direction lies across.
    across, up = drawn(figure.axes[0]).reshape(-1, 2).std(0)
    assert across > up > drawn(figure.axes[1]).reshape(-1, 2).std(0)[1]


def test_no_picture_is_a_mirror_image():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert np.linalg.det(plots._facing(rng.normal(size=(30, 3)))) == pytest.approx(1)
    np.testing.assert_allclose(plots._facing(np.zeros((5, 3))), np.eye(3))


@pytest.mark.parametrize("chain, mode", [(None, 0), ("B", 1)])
def test_modes(closed, chain, mode):
    modes = compute_modes(closed, 2)
    figure = plots.plot_modes(closed, modes, chain, mode)
    text = draw(figure, panels=2)
    name, number = (chain or "A"), 0 if chain is None else 1
    value = modes.eigenvalues[number][mode]
    assert f"Mode {mode + 1} of chain {name}: eigenvalue {value:.3g}" in text and f"residue of chain {name}" in text
    ratio = np.sqrt(value / modes.eigenvalues[number][0])
    assert f"{ratio:.2f} × the softest mode's frequency" in text
    curve = figure.axes[1].lines[0]
    expected = np.linalg.norm(modes.vectors[number][mode], axis=1)
    np.testing.assert_allclose(curve.get_ydata() / curve.get_ydata().max(), expected / expected.max())
    assert np.sqrt((curve.get_ydata() ** 2).mean()) == pytest.approx(1)
    assert curve.get_xdata().tolist() == closed.resnums[closed.chain_index == number].tolist()
    # Arrows start on the backbone of this chain alone.
    ends = drawn(figure.axes[0]).reshape(-1, 2)
    starts = figure.axes[0].collections[1].get_offsets()
    assert len(ends) <= 2 * len(expected) and len(starts) > 50
    assert np.abs(starts[:, None] - ends[None]).sum(-1).min(1).max() < 1e-5


def test_modes_that_do_not_exist(closed, opened):
    modes = compute_modes(closed, 2)
    for arguments, sentence in (
        ((closed, modes, "Q"), "expected a chain of A, B, got 'Q'"),
        ((closed, modes, "B", 2), "expected a mode from 0 to 1, got 2"),
        ((opened, modes), "expected modes of Structure"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plots.plot_modes(*arguments)


# Files


@pytest.fixture(scope="module")
def motions(dynamics, particles):
    return compute_pca(dynamics, particles.truth.latents)


def test_movie_swings_there_and_back(motions, tmp_path):
    path = plots.save_movie(tmp_path / "new" / "pc1.gif", motions, n=8, fps=10)
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
    monkeypatch.setattr(plots.FFMpegWriter, "isAvailable", lambda: False)
    for name, settings, sentence in (
        ("a.avi", {}, "expected a path that ends in .gif or .mp4"),
        ("a.gif", {"n": 1}, "two frames or more, got a.gif, n=1"),
        ("a.gif", {"component": 9}, "expected a component from 0 to 4, got 9"),
        ("a.mp4", {}, "expected the program ffmpeg, which writes MP4, got none; try a.gif"),
    ):
        with pytest.raises(ValueError, match=sentence):
            plots.save_movie(tmp_path / name, motions, **settings)
    assert not list(tmp_path.iterdir())


def test_interrupted_movie_leaves_no_half_file(motions, tmp_path, monkeypatch):
    (tmp_path / "a.gif").write_text("old")

    def stop(writer):
        raise KeyboardInterrupt

    monkeypatch.setattr(plots.PillowWriter, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        plots.save_movie(tmp_path / "a.gif", motions, n=2)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def commands(path) -> list[str]:
    return path.read_text().splitlines()


def test_chimerax_script_finds_its_file(motions, tmp_path):
    script = plots.save_chimerax(tmp_path / "one" / "my pc1.cxc", motions.dynamics, motions.traverse(0, 3))
    moved = (tmp_path / "one").rename(tmp_path / "two") / script.name
    lines = commands(moved)
    name = lines[0].removeprefix('open "').removesuffix('" coordset true')
    assert name == "my pc1.pdb", "beside the script, wherever that is"
    assert prody.parsePDB(str(moved.parent / name)).numCoordsets() == 3
    assert "color #1/A #0072B2" in lines and "color #1/B #D55E00" in lines and "cartoon" in lines
    assert lines[-1] == "coordset slider #1"
    with pytest.raises(ValueError, match="expected a path that ends in .cxc, got a.py; try a.cxc"):
        plots.save_chimerax(tmp_path / "a.py", motions.dynamics, motions.traverse(0, 3))
    assert [path.name for path in tmp_path.iterdir()] == ["two"]


def test_chimerax_script_names_chains_as_the_file_does(closed, tmp_path):
    atoms = closed.atoms.copy()
    atoms.setChids(np.where(atoms.getChids() == "A", "light", "heavy"))
    structure = load_structure(atoms)
    script = plots.save_chimerax(tmp_path / "a.cxc", Dynamics(structure), torch.zeros(2, 12))
    letters = list(dict.fromkeys(prody.parsePDB(str(tmp_path / "a.pdb")).getChids()))
    colors = [line.split()[1:] for line in commands(script) if line.startswith("color")]
    assert colors == [[f"#1/{letter}", color] for letter, color in zip(letters, plots.COLORS, strict=False)]


def test_chimerax_script_colours_bodies_within_a_chain(closed, tmp_path):
    bodies = {"tip": "chain A and resnum 20 to 22", "base": "chain A and resnum 30 to 33", "rest": "chain B"}
    structure = load_structure(closed.atoms, bodies=bodies)
    script = plots.save_chimerax(tmp_path / "a.cxc", Dynamics(structure), torch.zeros(2, 18))
    colors = [line.split()[1:] for line in commands(script) if line.startswith("color")]
    specs = ["#1/A:20,21,22", "#1/A:30,31,32,33", "#1/B"]
    assert colors == [[spec, color] for spec, color in zip(specs, plots.COLORS, strict=False)]
