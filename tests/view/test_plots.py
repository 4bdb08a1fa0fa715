"""Every figure can be drawn, says what its axes are, and leaves matplotlib's global state alone."""

import inspect
from dataclasses import replace
from io import BytesIO

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from cryochains.analysis import compare_with_map, compute_pca, motion_sentence
from cryochains.images import ParticleStack
from cryochains.inference import CheckItem, Encoder, Result, check, score, train_encoder
from cryochains.model import Dynamics, Model, Population, simulate_particles
from cryochains.molecule import compute_modes, load_structure
from cryochains.view import drawing, plots


@pytest.fixture(scope="module")
def particles(closed):
    dynamics = Dynamics(closed, compute_modes(closed, 2))
    latents = torch.randn(30, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    return simulate_particles(
        closed, 30, dynamics=dynamics, latents=latents, box_size=32, progress=False
    )


@pytest.fixture(scope="module")
def model(closed, particles):
    return Model(closed, particles, modes=2)


@pytest.fixture(scope="module")
def result(model, particles):
    """The true latents of the particles."""
    return Result(model, particles.truth.latents, particles=particles)


@pytest.fixture(scope="module")
def motions(result):
    return compute_pca(result)


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
def test_particles(result, n, shown):
    figure = plots.plot_particles(result[:7], n)
    text = draw(figure, panels=3 * shown)
    words = ("image", "reconstruction", "residual", f"{shown} of 7 particles")
    assert all(word in text for word in words)


def shown_images(figure) -> list[np.ndarray]:
    """Images, reconstructions and residuals of three particles."""
    rows = (figure.axes[3 * row : 3 * row + 3] for row in range(3))
    return [np.stack([axis.images[0].get_array() for axis in row]) for row in rows]


def test_check(model, particles):
    sound = check(model, particles)
    text = draw(plots.plot_check(sound), panels=3)
    assert all(word in text for word in ("30 images", "standard errors", "match", "longitude"))
    item = CheckItem("hand", "red", 3.0, 12.0, "the images show the mirror image")
    wrong = replace(sound, items=(item, *sound.items[2:]))
    assert "the images show the mirror image" in draw(plots.plot_check(wrong))


def test_residual_is_what_is_left(result, particles):
    image, reconstruction, residual = shown_images(plots.plot_particles(result, 3))
    np.testing.assert_allclose(image - reconstruction, residual, atol=1e-5)
    np.testing.assert_allclose(image, particles.read_images(slice(3)), atol=1e-6)
    # The truth explains all but the noise.
    assert residual.std() == pytest.approx(particles.truth.noise_std, rel=0.05)


def test_reconstruction_is_as_bright_as_the_images(result, particles):
    brighter = ParticleStack(
        7 * particles.read_images(),
        particles.rotations,
        particles.shifts,
        pixel_size=particles.pixel_size,
        ctf=particles.ctf,
    )
    seven = replace(result, particles=brighter, particles_digest=None, scale=torch.full((30,), 7.0))
    once = shown_images(plots.plot_particles(result, 3))
    for bright, plain in zip(shown_images(plots.plot_particles(seven, 3)), once, strict=True):
        np.testing.assert_allclose(bright, 7 * plain, atol=1e-4)


def test_particles_without_truth_or_ctf(model, particles):
    bare = ParticleStack(
        particles.read_images(), particles.rotations, pixel_size=particles.pixel_size
    )
    result = Result(model, torch.zeros(30, model.n_latents), particles=bare)
    draw(plots.plot_particles(result, 2), panels=6)


def test_images_have_ids_and_junk_is_marked(result):
    responsibility = torch.full((30,), 0.9)
    responsibility[2] = 0.5
    flagged = replace(result, responsibility=responsibility)
    for one, figure in ((flagged, plots.plot_particles(flagged, 4)), (result, None)):
        axes = (figure or plots.plot_particles(result, 4)).axes
        titles = [axis.get_title() for axis in axes]
        assert [title.partition("\n")[0] for title in titles[:4]] == [str(i) for i in one.ids[:4]]
        assert [k for k, title in enumerate(titles) if "junk?" in title] == [2] * (one is flagged)
        assert not any(titles[4:])
    alone = plots.plot_particles(flagged[[2]])
    assert [axis.get_title() for axis in alone.axes] == [f"{result.ids[2]}\njunk?", "", ""]


def test_long_ids_are_shortened_at_both_ends(result, particles):
    ids = [f"{k:06d}@Extract/job012/Micrographs/mic_{k:04d}.mrcs" for k in range(30)]
    named = Result(result.model, result.latents, particles=replace(particles, ids=np.array(ids)))
    figure = plots.plot_particles(named, 3)
    draw(figure)
    for k, axis in enumerate(figure.axes[:3]):
        title = axis.get_title()
        assert title.startswith(f"{k:06d}@") and title.endswith(f"{k:04d}.mrcs") and len(title) < 24


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20])
def test_broken_images_do_not_hide_the_others(result, particles, bad):
    images = particles.read_images().clone()
    images[1] = bad
    responsibility = torch.ones(30)
    responsibility[1] = 0
    broken = Result(
        result.model,
        result.latents,
        particles=replace(particles, images=images, truth=None),
        responsibility=responsibility,
    )
    figure = plots.plot_particles(broken, 3)
    draw(figure)
    whole = plots.plot_particles(result[[0, 2]], 2)
    limits = [axis.images[0].get_clim() for axis in (figure.axes[0], whole.axes[0])]
    assert limits[0] == pytest.approx(limits[1])


def test_result_without_its_particles_has_no_images(result):
    with pytest.raises(ValueError, match="expected a result with its particles, got .* without"):
        plots.plot_particles(replace(result, particles=None))


@pytest.mark.parametrize("n_epochs", [1, 4])
@pytest.mark.parametrize("scored", [True, False])
def test_training(model, n_epochs, scored):
    scores = {"rmsd": 1.5, "explained_motion": 0.1} if scored else {}
    history = [
        {"epoch": k + 1, "train_loss": 1 / (k + 1), "held_out_loss": 1.1 / (k + 1), **scores}
        for k in range(n_epochs)
    ]
    text = draw(plots.plot_training(Encoder(model, None, 1.0, history)), panels=1 + scored)
    assert "epoch" in text and "held out" in text and ("RMSD (Å)" in text) == scored


def test_training_of_an_encoder(model, particles):
    encoder = train_encoder(
        model, particles[:20], particles[20:], width=0.02, epochs=2, progress=False
    )
    figure = plots.plot_training(encoder)
    draw(figure, panels=2)
    for line, key in zip(figure.axes[0].lines, ("train_loss", "held_out_loss"), strict=True):
        assert line.get_ydata().tolist() == [record[key] for record in encoder.history]
    with pytest.raises(ValueError, match="expected an encoder with a history"):
        plots.plot_training(replace(encoder, history=()))


@pytest.mark.parametrize("n_passes", [1, 6])
def test_refinement(result, n_passes):
    record = {"blur": 2.0, "step": 0.3, "refused": 0, "noise_std": 0.1, "contrast": 1.0}
    record["spread"] = 3.0
    refined = replace(result, history=[record] * n_passes, kind="refined")
    text = draw(plots.plot_refinement(refined), panels=3)
    assert "step (Å)" in text and "noise" in text and "spread (Å)" in text


JUNK = np.arange(30) % 5 == 3


@pytest.fixture(scope="module")
def refined(result):
    """As if it had been refined; every fifth particle is junk, and one could not be used."""
    n_latents = result.model.n_latents
    population = Population(
        torch.zeros(n_latents).double(),
        torch.eye(n_latents).double(),
        noise_std=1.0,
        contrast=1.0,
        fingerprint=result.model.fingerprint,
        noise_spectrum=torch.linspace(0.5, 1.5, 17).double(),
    )
    record = {"blur": 2.0, "step": 0.05, "noise_std": 0.1, "contrast": 1.0, "spread": 3.0}
    record |= {"support": 50.0, "fading": 0.0}
    misfit = torch.linspace(0.8, 1.2, 30)
    misfit[3] = torch.nan
    return replace(
        result,
        latents=0.3 * result.latents,
        population=population,
        scale=torch.linspace(0.5, 2, 30),
        noise=torch.linspace(1, 2, 30),
        misfit=misfit,
        responsibility=torch.from_numpy(np.where(JUNK, 0.2, 0.99)),
        history=[record],
        kind="refined",
    )


def after(refined, **record) -> Result:
    """The same, whose last pass went like this."""
    return replace(refined, history=[{**refined.history[-1], **record}])


def panel(figure, label):
    return next(axis for axis in figure.axes if axis.get_xlabel() == label)


def counted(axis) -> tuple[float, float]:
    """Particles in the bars of a histogram: good ones and junk."""
    good, junk = axis.containers
    return sum(bar.get_height() for bar in good), sum(bar.get_height() for bar in junk)


def test_refinement_has_a_panel_for_all_that_is_known(refined):
    figure = plots.plot_refinement(refined)
    text = draw(figure, panels=7)
    assert "6 of 30 flagged as junk" in text
    assert counted(panel(figure, "brightness")) == (24, 6)
    assert counted(panel(figure, "responsibility")) == (24, 6)
    assert counted(panel(figure, "misfit (χ² per pixel)")) == (24, 5), "of one it is not known"
    spectrum = panel(figure, "resolution (Å)")
    (line,) = spectrum.lines
    np.testing.assert_allclose(line.get_ydata(), refined.population.noise_spectrum[1:])
    # Ring k is at box · pixel / k.
    side = refined.model.box_size * refined.model.pixel_size
    labels = [float(label.get_text()) for label in spectrum.get_xticklabels()]
    np.testing.assert_allclose(labels, side / spectrum.get_xticks(), rtol=1e-2)
    assert spectrum.get_xticks().tolist() == [4, 8, 12, 16]


@pytest.mark.parametrize("name, n_panels", [("misfit", 6), ("responsibility", 6), ("scale", 6)])
def test_refinement_leaves_out_what_is_not_known(refined, name, n_panels):
    draw(plots.plot_refinement(replace(refined, **{name: None})), panels=n_panels)
    white = replace(refined, population=replace(refined.population, noise_spectrum=None))
    draw(plots.plot_refinement(white), panels=6)


def test_histograms_are_not_squashed_by_one_particle(refined):
    misfit = torch.linspace(0.8, 1.2, 30).repeat(10)
    misfit[7] = 1e6
    many = refined[np.tile(np.arange(30), 10)]
    figure = plots.plot_refinement(replace(many, misfit=misfit))
    axis = panel(figure, "misfit (χ² per pixel)")
    assert axis.get_xlim()[1] < 2 and sum(counted(axis)) == 300


@pytest.mark.parametrize(
    "step, grade", [(0.05, "good"), (0.2, "doubtful"), (0.9, "not to be trusted")]
)
def test_the_verdict_is_below_the_panels(refined, step, grade):
    result = after(refined, step=step)
    assert result.verdict.grade == grade
    figure = plots.plot_refinement(result)
    draw(figure, panels=7)
    words = " ".join(text.get_text() for text in figure.texts)
    assert all(part.sentence in words for part in result.verdict.findings)
    assert all(part.remedy in words for part in result.verdict.findings)
    first, second = (text for text in figure.texts[:2])
    assert first.get_text() == "Verdict" and second.get_text() == grade
    assert first.get_color() == second.get_color() == drawing.GRADE_COLORS[grade]
    # What is worst comes next, and nothing is outside or on something else.
    assert figure.texts[2].get_text() == grade
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.texts if text.get_text()]
    width, height = figure.get_size_inches() * figure.dpi
    assert all(0 <= box.x0 and box.x1 <= width and 0 <= box.y0 for box in boxes)
    panels = min(axis.get_tightbbox().y0 for axis in figure.axes)
    assert max(box.y1 for box in boxes) < panels
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_refinement_of_what_was_not_refined(result):
    with pytest.raises(
        ValueError, match="expected a refined result with its history, got .*refine"
    ):
        plots.plot_refinement(result)
    record = {"epoch": 1, "train_loss": 1.0, "held_out_loss": 1.0}
    encoded = replace(result, history=[record], kind="encoded")
    with pytest.raises(ValueError, match=r"try plot_training\(encoder\)"):
        plots.plot_refinement(encoded)


@pytest.mark.parametrize("with_truth", [True, False])
@pytest.mark.parametrize("n_components", [1, 2, 5])
def test_latent_space(result, with_truth, n_components):
    motions = compute_pca(result, n_components=n_components)
    truth = np.linspace(0, 1, 30) if with_truth else None
    figure = plots.plot_latent_space(motions, truth=truth, title="|Spearman| 0.97")
    text = draw(figure, panels=1 + with_truth)
    assert "|Spearman| 0.97" in text and "PC1 (Å, " in text and motions.label in text
    assert ("PC2" in text) == (n_components > 1)


def test_latent_space_of_other_particles(result):
    motions = compute_pca(result[:20], chain="B", kind="rigid")
    figure = plots.plot_latent_space(motions, motions.transform(result[20:]), np.arange(10.0))
    draw(figure, panels=2)
    assert len(figure.axes[1].lines[0].get_xdata()) == 10


def test_junk_is_crosses_behind_the_points(refined):
    """Wherever it is, it does not change what is seen of the plane."""
    latents = refined.latents.clone()
    latents[JUNK] *= 100
    motions = compute_pca(replace(refined, latents=latents), frame="poses")
    truth = np.linspace(0, 1, 30)
    for figure, x in (
        (plots.plot_latent_space(motions), motions.scores[:, 0]),
        (plots.plot_explorer(motions), motions.scores[:, 0]),
        (plots.plot_latent_space(motions, truth=truth), truth),
    ):
        draw(figure)
        axis = figure.axes[1] if x is truth else figure.axes[0]
        points, crosses = axis.lines
        np.testing.assert_allclose(points.get_xdata(), x[~JUNK])
        np.testing.assert_allclose(crosses.get_xdata(), x[JUNK])
        assert crosses.get_zorder() < points.get_zorder() and crosses.get_marker() == "x"
        low, high = axis.get_ylim()
        spread = np.ptp(points.get_ydata())
        assert spread < high - low < 1.2 * spread
        assert "6 flagged as junk: grey crosses" in figure.axes[0].get_title()


def test_many_particles_are_drawn_without_junk(refined):
    for n, n_components in ((100, 2), (3, 1)):
        many = refined[np.tile(np.arange(30), n)]
        motions = compute_pca(many, n_components=n_components)
        figure = plots.plot_latent_space(motions)
        text = draw(figure)
        assert f"{6 * n} flagged as junk: left out" in text
        axis = figure.axes[0]
        if n_components > 1:
            assert axis.collections[0].get_array().sum() == 24 * n
        else:
            assert sum(bar.get_height() for bar in axis.patches) == 24 * n


def test_other_scores_are_not_flagged(refined):
    motions = compute_pca(refined)
    figure = plots.plot_latent_space(motions, motions.scores[:7])
    assert "junk" not in draw(figure) and len(figure.axes[0].lines) == 1


@pytest.mark.parametrize(
    "step, grade", [(0.05, "good"), (0.2, "doubtful"), (0.9, "not to be trusted")]
)
def test_a_latent_plot_says_what_is_doubtful(refined, step, grade):
    motions = compute_pca(after(refined, step=step))
    words = f"This refinement is {grade}: stopped after 1 passes while atoms still moved by {step}"
    for figure in (
        plots.plot_latent_space(motions, title="held out"),
        plots.plot_explorer(motions, title="held out"),
    ):
        draw(figure)
        title = figure.get_suptitle()
        assert title.startswith("held out")
        assert (words in title.replace("\n", " ")) == (grade != "good")
        color = figure._suptitle.get_color()
        assert color == ("black" if grade == "good" else drawing.GRADE_COLORS[grade])
    # Once, where the title says it already.
    figure = plots.plot_explorer(motions, title=motion_sentence(motions))
    draw(figure)
    title = figure.get_suptitle().replace("\n", " ")
    assert title.count("stopped after 1 passes") == (grade != "good")
    assert ("not described" in title) == (grade == "not to be trusted")
    assert ("relative to" in title) == (grade != "not to be trusted")


def test_rmsd(result):
    scores = score(replace(result, latents=0.5 * result.latents))
    methods = {"encoder": 1.2 * scores.rmsd_per_particle, "MAP": scores.rmsd_per_particle}
    mean = scores.mean_rmsd_per_particle
    text = draw(plots.plot_rmsd(methods, mean, 0.5 * scores.rmsd_per_particle))
    assert f"MAP: {scores.rmsd:.2f} Å" in text
    assert f"mean conformation: {scores.mean_rmsd:.2f} Å" in text
    assert "information limit" in text and "RMSD to the true conformation (Å)" in text
    assert "information limit" not in draw(plots.plot_rmsd({"MAP": methods["MAP"]}, mean))


@pytest.mark.parametrize("component", [0, 1])
def test_conformations(motions, component):
    text = draw(plots.plot_conformations(motions, component, n=4), panels=2)
    assert f"PC{component + 1}" in text and "chain A" in text and "chain B" in text


def test_conformations_draw_every_chain(motions, closed):
    figure = plots.plot_conformations(motions, component=1, n=3)
    for axis in figure.axes:
        # Three conformations, each with every chain whole; missing residues are gaps, and
        # everything else is inside.
        apart = np.linalg.norm(np.diff(closed.node_coords, axis=0), axis=1)
        bonds = ((apart < 8) & (np.diff(closed.node_chain) == 0)).sum()
        assert 0.95 * closed.n_nodes < bonds < closed.n_nodes - closed.n_chains
        drawn = np.array([lines.get_segments() for lines in axis.collections])
        assert drawn.shape == (3, bonds, 2, 2) and np.isfinite(drawn).all()
        low, high = axis.get_xlim()
        assert (drawn > low).all() and (drawn < high).all()


def test_residue_motion(motions, closed):
    path = motions.traverse(0, n=3)
    figure = plots.plot_residue_motion(motions.model, path, title="PC1")
    text = draw(figure, panels=2)
    assert "residue of chain A" in text and "displacement (Å)" in text and "PC1" in text
    coords = motions.model.decode(path)
    expected = (coords[-1] - coords[0]).norm(dim=1)[closed.chain_index == 1]
    last = figure.axes[1].lines[-1]
    np.testing.assert_allclose(last.get_ydata(), expected, atol=1e-4)
    assert last.get_xdata().tolist() == closed.resnums[closed.chain_index == 1].tolist()


@pytest.mark.parametrize("n, n_rows", [(4, 1), (9, 3), (70, 18)])
def test_residue_motion_of_many_chains_is_no_ribbon(n, n_rows):
    resnums = load_structure("glua3-closed", chains="A").resnums[:n]
    bodies = {f"A{k}": f"chain A and resnum {number}" for k, number in enumerate(resnums)}
    many = load_structure("glua3-closed", bodies=bodies)
    model = Model(many, modes=None, rotation=False, box_size=32, pixel_size=5.0)
    figure = plots.plot_residue_motion(model, torch.eye(2, model.n_latents))
    assert len(figure.axes) == n
    assert len({axis.get_subplotspec().rowspan.start for axis in figure.axes}) == n_rows
    width, height = figure.get_size_inches() * figure.dpi
    assert width <= 2000 and height <= 5000


def test_completion_offers_figures_alone():
    assert dir(plots) == sorted(plots.__all__)
    assert all(name.startswith("plot_") for name in dir(plots))
    for name in plots.__all__:
        assert isinstance(inspect.signature(getattr(plots, name)), inspect.Signature)
    defined = {name for name in vars(plots) if name.startswith("plot_")}
    assert defined == set(plots.__all__)


def one_body(closed, n_modes) -> Model:
    whole = closed.as_one_body()
    return Model(
        whole, modes=n_modes, rotation=False, translation=False, box_size=32, pixel_size=5.0
    )


def test_one_body_is_one_panel(closed):
    model = one_body(closed, 2)
    draw(plots.plot_residue_motion(model, torch.eye(2)), panels=1)
    still = torch.zeros(2, 2)
    draw(plots.plot_residue_motion(model, still), panels=1)


def test_nothing_needs_a_gradient_free_caller(result, particles):
    latents = particles.truth.latents.clone().requires_grad_()
    draw(plots.plot_residue_motion(result.model, latents[:2]))
    draw(plots.plot_particles(replace(result, latents=latents), 1))


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
        assert {tuple(np.argsort(color[:3])) for color in axis.collections[0].get_colors()} == {
            (0, 1, 2),
            (2, 1, 0),
        }
    # The longest direction lies across.
    across, up = drawn(figure.axes[0]).reshape(-1, 2).std(0)
    assert across > up > drawn(figure.axes[1]).reshape(-1, 2).std(0)[1]


def test_no_picture_is_a_mirror_image():
    rng = np.random.default_rng(0)
    for _ in range(20):
        assert np.linalg.det(drawing.facing(rng.normal(size=(30, 3)))) == pytest.approx(1)
    np.testing.assert_allclose(drawing.facing(np.zeros((5, 3))), np.eye(3))


@pytest.mark.parametrize("chain, mode", [(None, 0), ("B", 1)])
def test_modes(closed, chain, mode):
    modes = compute_modes(closed, 2)
    figure = plots.plot_modes(closed, modes, chain, mode)
    text = draw(figure, panels=2)
    name, number = (chain or "A"), 0 if chain is None else 1
    value = modes.eigenvalues[number][mode]
    assert (
        f"Mode {mode + 1} of chain {name}: eigenvalue {value:.3g}" in text
        and f"residue of chain {name}" in text
    )
    ratio = np.sqrt(value / modes.eigenvalues[number][0])
    assert f"{ratio:.2f} × the softest mode's frequency" in text
    curve = figure.axes[1].lines[0]
    expected = np.linalg.norm(modes.vectors[number][mode], axis=1)
    np.testing.assert_allclose(
        curve.get_ydata() / curve.get_ydata().max(), expected / expected.max()
    )
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


# The explorer's figure


@pytest.mark.parametrize("n", [30, 3000])
@pytest.mark.parametrize("component", [0, 2])
def test_explorer_is_its_points_and_its_molecule(model, n, component):
    latents = torch.randn(n, model.n_latents, generator=torch.Generator().manual_seed(0))
    motions = compute_pca(Result(model, latents))
    text = draw(plots.plot_explorer(motions, component, "chain B turns"), panels=2)
    other = 2 if component == 0 else 1
    assert f"PC{component + 1} (Å, " in text and f"PC{other} (Å, " in text
    assert "chain B turns" in text and "chain A" in text and "(pale)" in text


def test_explorer_of_one_component(closed):
    model = Model(closed, modes=1, rotation=False, translation=False, box_size=32, pixel_size=5.0)
    motions = compute_pca(Result(model, torch.randn(30, 2)), chain="A")
    assert "particles" in draw(plots.plot_explorer(motions), panels=2)
    with pytest.raises(ValueError, match="expected a component from 0 to 0, got 1"):
        plots.plot_explorer(motions, 1)


def test_a_map_comparison_says_what_agrees_better(result):
    comparison = compare_with_map(result, images=result.particles, progress=False)
    text = draw(plots.plot_map_comparison(comparison), panels=4)
    for words in ("half maps", "the reference", "correlation with the map", "residual", "Å"):
        assert words in text
    assert comparison.sentence[:30] in text.replace("\n", " ")
