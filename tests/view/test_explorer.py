"""The explorer: it shows what is decoded, selects the right rows, and errors are seen.

Needs no browser: what arrives there is looked at in test_browser.
"""

import base64
from dataclasses import replace

import numpy as np
import pandas as pd
import prody
import pytest
import torch

from cryochains.analysis import atom_uncertainty, component_errors, latent_table
from cryochains.inference import Result, posterior_covariance, refine
from cryochains.model import Model, Population, simulate_particles
from cryochains.molecule import compute_modes, morph, with_reference_bonds
from cryochains.view import explore
from cryochains.view import notebook as notebook_module

LAB = ("ipywidgets", "nglview", "jscatter")
N = 300


@pytest.fixture(scope="module", autouse=True)
def explorer():
    for name in LAB:
        pytest.importorskip(name, reason="the extras [lab] are not installed")
    global ipywidgets
    import ipywidgets

    from cryochains.view import explorer

    return explorer


@pytest.fixture
def notebook(explorer, monkeypatch):
    """As if this Python were a notebook's kernel."""
    monkeypatch.setattr(notebook_module, "in_notebook", lambda: True)


@pytest.fixture(scope="module")
def model(closed):
    return Model(closed, modes=3, box_size=32, pixel_size=5.0)


@pytest.fixture(scope="module")
def given(model):
    latents = torch.randn(N, model.n_latents, generator=torch.Generator().manual_seed(0))
    return Result(model, latents)


@pytest.fixture(scope="module")
def result(given):
    """In the frame that is shown unless another is asked for."""
    return given.in_frame("molecule")


@pytest.fixture(scope="module")
def latents(result):
    return result.latents


@pytest.fixture
def shown(notebook, result):
    return explore(result, columns=pd.DataFrame({"subset": np.arange(N) % 2}))


@pytest.fixture(scope="module")
def refined(closed):
    """What was found of 12 small particles, in the frame of the molecule."""
    particles = simulate_particles(
        closed, 12, conformations=closed.coords[None], box_size=32, progress=False
    )
    model = Model(closed, particles, modes=2)
    return refine(model, particles, blurs=(4.0, 0.0), progress=False).in_frame()


def sent(shown) -> np.ndarray:
    """Coordinates that were last sent to the browser."""
    return shown.molecule._coordinates_dict[0]


def decoded(shown, latents) -> np.ndarray:
    """Coordinates of all atoms at latents (p,)."""
    return shown.result.model.dynamics.all_atoms().decode(latents[None])[0].numpy()


def complaint(shown) -> str:
    return shown.status.value


def test_slider_sends_what_decode_gives(shown, latents):
    motions = shown.motions
    np.testing.assert_allclose(sent(shown), decoded(shown, latents.mean(0)), atol=1e-3)
    shown.components.sliders[1].value = 1.5
    shown.components.sliders[0].value = -0.5
    deviations = motions.scores.std(0)
    path = latents.mean(0).double() + torch.from_numpy(
        1.5 * deviations[1] * motions.components[1] - 0.5 * deviations[0] * motions.components[0]
    )
    np.testing.assert_allclose(sent(shown), decoded(shown, path.float()), atol=1e-3)
    assert [s.value for s in shown.components.sliders[:3]] == pytest.approx(
        [-0.5, 1.5, 0], abs=0.03
    )


def test_only_coordinates_are_sent(shown, monkeypatch):
    messages = []
    monkeypatch.setattr(
        shown.molecule, "send", lambda content, buffers=(): messages.append((content, buffers))
    )
    archive = list(shown.molecule._ngl_msg_archive)
    shown.components.sliders[0].value = 1.0
    ((content, (buffer,)),) = messages
    assert content["type"] == "binary_single" and len(buffer) == len(shown.reference) * 3 * 4
    assert shown.molecule._ngl_msg_archive == archive


def test_sliders_of_a_chain_are_in_physical_units(shown, model):
    shown.chains.chain.value = "B"
    names = [slider.description for slider in shown.chains.sliders]
    turn, shift, bend = names.index("turn y (°)"), names.index("shift x (Å)"), names.index("by (Å)")
    for index, value in ((turn, 7.0), (shift, -1.2)):
        shown.chains.sliders[index].max = shown.chains.sliders[index].max + 10
        shown.chains.sliders[index].value = value
    shown.chains.mode.value = shown.chains.mode.options[2][1]
    shown.chains.sliders[bend].value = shown.chains.sliders[bend].max
    table = latent_table(Result(model, shown.latents[None]), frame="poses").iloc[0]
    assert table["B turn y (°)"] == pytest.approx(7.0) and table["B shift x (Å)"] == pytest.approx(
        -1.2, abs=1e-5
    )
    rms = table["B mode 3 (Å)"] / np.sqrt((model.structure.node_chain == 1).sum())
    assert rms == pytest.approx(shown.chains.sliders[bend].max, rel=1e-5), (
        "Å a residue, not their sum"
    )
    assert table["A turn y (°)"] == pytest.approx(
        float(shown.motions.mean[4]) * shown.chains.units[4], abs=1e-4
    )
    np.testing.assert_allclose(sent(shown), decoded(shown, shown.latents), atol=1e-3)


def test_browsers_answer_of_the_nearest_step_moves_nothing(shown, latents):
    shown.select([7])
    assert torch.equal(shown.latents, latents[7])
    for slider in (*shown.components.sliders, *shown.chains.sliders):
        slider.value = round(slider.value / slider.step) * slider.step
    assert torch.equal(shown.latents, latents[7])


def test_click_shows_the_particle_and_lasso_the_mean(shown, latents):
    scatter = shown.landscape.scatter
    scatter.selection = np.array([41])
    assert shown.rows.tolist() == [41] and "row 41" in shown.selection.children[0].value
    np.testing.assert_allclose(sent(shown), decoded(shown, latents[41]), atol=1e-3)
    scatter.selection = np.array([3, 250, 17])
    assert shown.rows.tolist() == [3, 250, 17]
    np.testing.assert_allclose(
        sent(shown), decoded(shown, latents[[3, 250, 17]].mean(0)), atol=1e-3
    )
    scatter.selection = np.array([], dtype=int)
    assert len(shown.rows) == 0 and "Nothing is selected" in shown.selection.children[0].value


def test_points_are_the_scores_of_what_is_chosen(shown):
    landscape = shown.landscape
    landscape.chain.value, landscape.kind.value = "B", "rigid"
    landscape.y.value = 2
    landscape.color_by.value = "subset"
    assert shown.motions.label == "chain B, rigid, frame of the molecule"
    # Points come scaled to the screen: from -1 to 1.
    points, scores = landscape.scatter.points, shown.motions.scores[:, [0, 2]]
    for axis in (0, 1):
        assert np.corrcoef(points[:, axis], scores[:, axis])[0, 1] == pytest.approx(1)
    assert set(points[::2, 2]) == {0} and set(points[1::2, 2]) == {1}
    assert [option for option, _ in landscape.x.options] == ["PC1", "PC2", "PC3", "PC4", "PC5"]
    assert len(shown.components.children) == 5
    landscape.kind.value = "modes"
    assert len(shown.components.children) == 3, "three modes have three components"


def test_loop_goes_there_and_back(shown):
    slider, positions = shown.components.sliders[0], []
    for shown.play.value in range(1, 60):
        positions.append(slider.value)
    assert max(positions) == pytest.approx(slider.max, abs=0.03) and np.argmax(positions) == 29
    assert positions[0] < slider.min + 0.2 and positions[-1] < slider.min + 0.2
    assert np.abs(np.diff(positions)).max() < 0.2


def test_colours_are_displacements_with_a_scale(shown, explorer):
    shown.components.sliders[0].value = 1.0
    shown.color_by.value = explorer.BY_DISPLACEMENT
    moved = np.linalg.norm(sent(shown) - shown.reference, axis=-1)
    np.testing.assert_allclose(shown.molecule.values, moved, atol=1e-4)
    top = float(shown.color_scale.value.rpartition("</div>")[0].rpartition(">")[2])
    assert top >= moved.max() - 0.05
    shown.components.sliders[0].value = -1.0
    moved = np.linalg.norm(sent(shown) - shown.reference, axis=-1)
    np.testing.assert_allclose(shown.molecule.values, moved, atol=1e-4)
    shown.color_by.value = explorer.BY_CHAIN
    assert shown.molecule.values is None and shown.color_scale.value == ""


def test_particle_has_its_image_and_exact_error_bar(notebook, explorer, refined):
    shown = explore(refined)
    expected = ["density", "uncertainty (Å)", "brightness", "noise (grey levels)"]
    expected += ["misfit (χ² per pixel)", "pose turn (°)", "pose shift (Å)", "defocus (µm)"]
    offered = shown.landscape.color_by.options
    assert [name for name in offered if name != "responsibility"] == expected
    # Nothing moved here, and the components say so.
    for row, error in zip(
        shown.components.children, component_errors(shown.motions, shown.average), strict=True
    ):
        assert f"error bar {error:.2f} Å: hardly told from noise" in row.children[1].value
    shown.select([5])
    picture, text = shown.selection.children
    for name, values in (("brightness", refined.scale), ("misfit (χ² per pixel)", refined.misfit)):
        assert f"{name} {values[5]:.4g}" in text.value
    assert (
        bytes(picture.value).startswith(b"\x89PNG") and str(refined.particles.ids[5]) in text.value
    )
    shown.color_by.value = explorer.BY_UNCERTAINTY
    exact = posterior_covariance(refined, [5])[0].float().cpu()
    expected = atom_uncertainty(refined.model.dynamics, refined.latents[5], exact)
    rows = refined.model.structure.rows
    np.testing.assert_allclose(shown.molecule.values[rows], expected, rtol=1e-3)
    error = float(text.value.partition("error bar ")[2].partition(" Å")[0])
    assert error == pytest.approx(np.sqrt(np.mean(expected**2)), abs=0.006)


@pytest.mark.parametrize("frame", [None, "molecule", "poses", "A"])
def test_the_frame_is_chosen_and_said(notebook, given, frame):
    shown = explore(given, frame=frame)
    expected = given.in_frame(frame)
    assert shown.result.frame == shown.motions.result.frame == expected.frame
    words = {"poses": "the poses", "A": "chain A"}.get(frame, "the molecule")
    assert shown.motions.label.endswith(f", frame of {words}")
    texts = [part.value for part in descendants(shown) if isinstance(part, ipywidgets.HTML)]
    assert f"Conformations in the frame of {words}" in texts
    shown.select([7])
    np.testing.assert_allclose(sent(shown), decoded(shown, expected.latents[7]), atol=1e-3)
    # Another chain or kind is still of this frame.
    shown.landscape.chain.value = "B"
    assert shown.motions.result is shown.result
    with pytest.raises(ValueError, match="expected the frame 'molecule' or a chain of A, B, got"):
        explore(given, frame="Q")


@pytest.mark.parametrize("frame", ["molecule", "A"])
def test_a_particle_has_the_same_pixels_in_every_frame(notebook, refined, frame):
    """Its latents in the frame go with poses that are corrected for it."""
    given = refined.in_frame("poses")
    shown = explore(given, frame=frame)
    model = shown.result.model
    drawn = [
        model.render(one.latents, *next(one.particles.batches(12)).pose)
        for one in (given, shown.result)
    ]
    assert (drawn[0] - drawn[1]).abs().max() < 1e-5 * drawn[0].abs().max()
    shown.select([3])
    assert len(shown.selection.children) == 2, "its image, and words"


def test_files_of_the_motion(shown, tmp_path):
    shown.folder.value = str(tmp_path)
    shown.landscape.chain.value = "B"
    shown.landscape.x.value = 2
    buttons = {
        part.description: part for part in descendants(shown) if isinstance(part, ipywidgets.Button)
    }
    decoded = shown.all_atoms.decode(shown.motions.traverse(2, 21)).numpy()
    expected = with_reference_bonds(shown.motions.model.structure, decoded)
    for name, kind in (("DCD", "dcd"), ("movie", "gif"), ("ChimeraX", "cxc"), ("PDB", "pdb")):
        buttons[name].click()
        (path,) = tmp_path.glob(f"pc3-chain-B-α-and-Rt-frame-of-the-molecule.{kind}")
        assert path.stat().st_size > 100 and path.name in shown.status.value
    models = prody.parsePDB(str(path)).getCoordsets()
    np.testing.assert_allclose(models, expected, atol=1e-3)
    frames = prody.parseDCD(str(path.with_suffix(".dcd"))).getCoordsets()
    np.testing.assert_allclose(frames, expected, atol=1e-3)
    shown.select([1, 2])
    buttons["selection"].click()
    assert pd.read_csv(tmp_path / "selection-1.csv")["row"].tolist() == [1, 2]
    # The browser answers with the picture later.
    buttons["picture"].click()
    from nglview.widget import _TRACKED_WIDGETS

    list(_TRACKED_WIDGETS.values())[-1].value = b"\x89PNG the view"
    assert (
        tmp_path / "pc3-chain-B-α-and-Rt-frame-of-the-molecule.png"
    ).read_bytes() == b"\x89PNG the view"


def test_movie_is_of_the_component_on_the_x_axis(shown, tmp_path, explorer, monkeypatch):
    asked = []

    def remember(path, motions, component, *, n):
        asked.append((path.suffix, motions, component, n))

    monkeypatch.setattr(explorer, "save_motion", remember)
    shown.landscape.x.value = 3
    shown.save("gif")
    assert asked == [(".gif", shown.motions, 3, 40)]


def test_selection_outlives_other_components_until_reset(shown, latents):
    shown.show_particle(9)
    assert shown.landscape.scatter.selection.tolist() == [9], "its point is marked"
    shown.landscape.chain.value = "B"
    shown.landscape.color_by.value = "subset"
    assert shown.landscape.scatter.selection.tolist() == [9] and torch.equal(
        shown.latents, latents[9]
    )
    with pytest.raises(ValueError, match="expected particles from 0"):
        shown.select([N + 1])
    assert shown.rows.tolist() == [9]
    # A mask selects the particles where it is true.
    shown.select(np.isin(np.arange(N), [2, 9]))
    assert shown.rows.tolist() == [2, 9]
    home = next(w for w in descendants(shown) if getattr(w, "description", "") == "reset")
    home.click()
    assert len(shown.rows) == 0 and len(shown.landscape.scatter.selection) == 0
    assert "Nothing is selected" in shown.selection.children[0].value
    np.testing.assert_allclose(shown.latents, latents.mean(0), atol=1e-5)


def descendants(widget) -> list:
    return [
        widget,
        *(part for child in getattr(widget, "children", ()) for part in descendants(child)),
    ]


def test_controls_are_connected(shown):
    shown.reference_overlay.value = True
    assert len(shown.molecule._ngl_component_ids) == 2
    speed = next(w for w in descendants(shown) if "slow" in getattr(w, "options", ()))
    speed.value = 33
    assert shown.play.interval == 33


def test_scale_follows_what_is_shown(notebook, explorer, refined):
    shown = explore(refined)
    shown.color_by.value = explorer.BY_UNCERTAINTY
    tops = []
    for row in (5, 2):
        shown.select([row])
        np.testing.assert_allclose(shown.molecule.top, shown.molecule.values.max(), rtol=1e-5)
        tops.append(shown.molecule.top)
    assert tops[0] != tops[1]
    shown.select([1, 2, 3])
    pooled = refined.std[[1, 2, 3]].square().mean(0).diag()
    mean = refined.latents[[1, 2, 3]].mean(0)
    expected = atom_uncertainty(refined.model.dynamics, mean, pooled)
    rows = refined.model.structure.rows
    np.testing.assert_allclose(shown.molecule.values[rows], expected, rtol=1e-3)
    shown.color_by.value = explorer.BY_DISPLACEMENT
    shown.landscape.x.value = 1
    ends = shown.all_atoms.decode(shown.motions.traverse(1, 2, (1, 99))).numpy()
    assert shown.molecule.top >= np.linalg.norm(ends - shown.reference, axis=-1).max() - 1e-3


def test_widgets_that_are_gone_are_closed(shown):
    def count() -> int:
        return len(ipywidgets.Widget.widgets)

    shown.select([1])
    values = ["B", "A"] * 3
    sizes = []
    for value in values:
        shown.landscape.chain.value = shown.chains.chain.value = value
        sizes.append(count())
    assert sizes[-1] == sizes[1], sizes


def test_models_of_all_kinds_open(notebook, closed):
    whole = closed.as_one_body()
    for structure, modes, rotation, translation in (
        (closed, None, True, True),
        (closed, compute_modes(closed, (3, 0)), False, False),
        (closed, compute_modes(closed, 2), True, False),
        (whole, compute_modes(whole, 4), False, False),
    ):
        model = Model(
            structure,
            modes=modes,
            rotation=rotation,
            translation=translation,
            box_size=32,
            pixel_size=5.0,
        )
        shown = explore(Result(model, torch.randn(20, model.n_latents)))
        for chain in structure.chain_ids:
            shown.chains.chain.value = chain
        assert complaint(shown).startswith("RMSD to")
        drawings = [
            m for m in shown.molecule._ngl_msg_archive if m["methodName"] == "addRepresentation"
        ]
        colors = {m["kwargs"].get("color") for m in drawings}
        assert {"#0072B2", "#D55E00"} <= colors, "also chains that move as one"
        # A slider is in one row alone.
        sliders = [w for w in descendants(shown.chains) if isinstance(w, ipywidgets.FloatSlider)]
        assert len(sliders) == len(set(sliders)) == len(shown.chains.sliders)


def test_a_result_of_an_encoder_has_no_error_bars(notebook, explorer, refined):
    encoded = Result(refined.model, refined.latents, particles=refined.particles, kind="encoded")
    shown = explore(encoded)
    assert explorer.BY_UNCERTAINTY not in shown.color_by.options
    expected = ("density", "pose turn (°)", "pose shift (Å)", "defocus (µm)")
    assert shown.landscape.color_by.options == expected
    shown.select([5])
    picture, text = shown.selection.children
    assert bytes(picture.value).startswith(b"\x89PNG") and "error bar" not in text.value


def test_a_result_without_its_particles_opens(notebook, refined):
    alone = Result(
        refined.model,
        refined.latents,
        refined.std,
        refined.population,
        ids=refined.ids,
        history=refined.history,
        kind="refined",
    )
    shown = explore(alone)
    shown.select([5])
    (text,) = shown.selection.children
    assert str(refined.ids[5]) in text.value and "error bar" in text.value


# Junk and the verdict


JUNK = np.arange(N) % 3 == 1
GOOD_RECORD = {
    "blur": 0.0,
    "step": 0.05,
    "noise_std": 1.0,
    "contrast": 1.0,
    "spread": 3.0,
    "support": 50.0,
    "fading": 0.0,
}


def judged(result, responsibility=None, **record) -> Result:
    """As if it had been refined, and the last pass had gone like this."""
    n_latents = result.model.n_latents
    population = Population(
        torch.zeros(n_latents).double(),
        torch.eye(n_latents).double(),
        noise_std=1.0,
        contrast=1.0,
        fingerprint=result.model.fingerprint,
    )
    return replace(
        result.in_frame("poses"),
        latents=0.3 * result.in_frame("poses").latents,
        population=population,
        responsibility=responsibility,
        history=[GOOD_RECORD | record],
        kind="refined",
    )


@pytest.fixture(scope="module")
def with_junk(given):
    """Every third particle is junk, and far away."""
    latents = given.latents.clone()
    latents[JUNK] *= 20
    responsibility = torch.from_numpy(np.where(JUNK, 0.25, 0.75))
    return replace(given, latents=latents, responsibility=responsibility)


@pytest.fixture
def filtered(notebook, with_junk):
    return explore(with_junk, columns=pd.DataFrame({"number": np.arange(N)}))


def drawn_rows(shown) -> list[int]:
    """Rows of the points on screen, which are coloured by them."""
    shown.landscape.color_by.value = "number"
    share = shown.landscape.scatter.points[:, 2]
    rows = shown.landscape.drawn
    # Colours run from 0 to 1, from the first row that is drawn to the last.
    np.testing.assert_allclose(share, (rows - rows[0]) / (rows[-1] - rows[0]), atol=1e-5)
    return rows.tolist()


def test_junk_is_not_drawn_and_the_control_says_how_much(filtered):
    landscape = filtered.landscape
    assert landscape.hide_junk in descendants(filtered)
    assert (
        landscape.hide_junk.value and landscape.hide_junk.description == "hide 100 junk particles"
    )
    assert drawn_rows(filtered) == np.flatnonzero(~JUNK).tolist()
    scores = filtered.motions.scores
    assert np.corrcoef(landscape.scatter.points[:, 0], scores[~JUNK, 0])[0, 1] == pytest.approx(1)
    landscape.hide_junk.value = False
    assert drawn_rows(filtered) == list(range(N))
    assert np.corrcoef(landscape.scatter.points[:, 0], scores[:, 0])[0, 1] == pytest.approx(1)
    landscape.hide_junk.value = True
    assert drawn_rows(filtered) == np.flatnonzero(~JUNK).tolist()


def test_without_junk_there_is_no_control(shown):
    assert shown.landscape.hide_junk not in descendants(shown)
    assert shown.landscape.drawn.tolist() == list(range(N))


def test_density_is_that_of_what_shows_the_molecule(filtered):
    """Also of points that are drawn beside junk, which has the colour of an empty plane."""
    filtered.landscape.color_by.value = "density"
    alone = filtered.landscape.scatter.points[:, 2].copy()
    filtered.landscape.hide_junk.value = False
    together = filtered.landscape.scatter.points[:, 2]
    # Colours run from the least to the most, which is 0 for junk.
    assert (together[JUNK] == 0).all()
    assert np.corrcoef(together[~JUNK], alone)[0, 1] == pytest.approx(1)


def test_rows_of_a_selection_are_those_of_the_result(filtered, with_junk, tmp_path):
    """Clicked and drawn around, marked, and saved."""
    result = with_junk.in_frame()
    scatter = filtered.landscape.scatter
    scatter.selection = np.array([1])
    assert filtered.rows.tolist() == [2] and "row 2" in filtered.selection.children[0].value
    np.testing.assert_allclose(sent(filtered), decoded(filtered, result.latents[2]), atol=1e-3)
    scatter.selection = np.array([0, 1, 2, 199])
    assert filtered.rows.tolist() == [0, 2, 3, 299]
    filtered.folder.value = str(tmp_path)
    table = pd.read_csv(filtered.save_selection(), dtype={"id": str})
    assert table["row"].tolist() == [0, 2, 3, 299]
    assert table["id"].tolist() == with_junk.ids[[0, 2, 3, 299]].tolist()
    # The points of other components are other points of the same particles.
    filtered.landscape.chain.value = "B"
    assert filtered.rows.tolist() == [0, 2, 3, 299]
    assert filtered.landscape.scatter.selection.tolist() == [0, 1, 2, 199]
    filtered.landscape.hide_junk.value = False
    assert filtered.landscape.scatter.selection.tolist() == [0, 2, 3, 299]


def test_junk_is_not_selected_where_it_is_hidden(filtered):
    filtered.select(np.arange(6))
    assert filtered.rows.tolist() == [0, 2, 3, 5] and "Mean of 4" in words_of(filtered)
    filtered.select(JUNK | (np.arange(N) == 8))
    assert filtered.rows.tolist() == [8]
    for act in (filtered.select, filtered.show_group):
        with pytest.raises(ValueError, match="expected particles that are drawn, got 2 hidden as"):
            act([1, 4])
    with pytest.raises(ValueError, match="got 1 hidden as junk; try landscape.hide_junk.value = F"):
        filtered.show_particle(1)
    assert filtered.rows.tolist() == [8]
    # Shown, it can be, and says what it is; hidden again, it is let go.
    filtered.landscape.hide_junk.value = False
    filtered.select([1, 8])
    assert filtered.rows.tolist() == [1, 8]
    filtered.show_particle(1)
    assert "flagged as junk" in words_of(filtered)
    filtered.select([1, 8])
    filtered.landscape.hide_junk.value = True
    assert filtered.rows.tolist() == [8] and "flagged" not in words_of(filtered)
    filtered.landscape.hide_junk.value = False
    filtered.select([1])
    filtered.landscape.hide_junk.value = True
    assert len(filtered.rows) == 0 and "Nothing is selected" in words_of(filtered)


def words_of(shown) -> str:
    return shown.selection.children[-1].value


def test_sliders_end_where_what_shows_the_molecule_ends(filtered, notebook, with_junk):
    alone = explore(with_junk[~JUNK])
    for one, other in zip(filtered.components.sliders, alone.components.sliders, strict=True):
        assert (one.min, one.max) == (other.min, other.max)
    np.testing.assert_allclose(filtered.components.spread, alone.components.spread, rtol=1e-5)
    np.testing.assert_allclose(filtered.chains.extent, alone.chains.extent)
    assert filtered.components.spread[0] < 0.5 * filtered.motions.scores[:, 0].std()


def test_what_is_not_known_of_a_particle_has_a_colour(notebook, with_junk, recwarn):
    """As the misfit of an image that could not be used."""
    misfit = torch.linspace(1, 2, N)
    misfit[5] = torch.nan
    shown = explore(replace(with_junk, misfit=misfit))
    shown.landscape.color_by.value = "misfit (χ² per pixel)"
    points = shown.landscape.scatter.points
    assert np.isfinite(points).all()
    number = shown.landscape.drawn.tolist().index(5)
    assert points[number, 2] == points[:, 2].min()
    assert not [w for w in recwarn if "missing values" in str(w.message)]


@pytest.mark.parametrize(
    "step, grade", [(0.05, "good"), (0.2, "doubtful"), (0.9, "not to be trusted")]
)
def test_the_verdict_is_said_where_it_is_not_good(notebook, given, step, grade):
    result = judged(given, step=step)
    assert result.verdict.grade == grade
    shown = explore(result)
    shown.select([3])
    texts = [part.value for part in descendants(shown) if isinstance(part, ipywidgets.HTML)]
    line = (
        f"This refinement is {grade}: stopped after 1 passes while atoms still moved by {step:.2f}"
    )
    assert any(line in text for text in texts) == (grade != "good")
    assert (shown.warning in shown.children) == (grade != "good")
    meanings = [row.children[1].value for row in shown.components.children]
    trusted = grade != "not to be trusted"
    for text in (*meanings, words_of(shown)):
        assert ("Not described, since the refinement is not to be trusted" in text) == (not trusted)
    described = [text for text in texts if "relative to" in text or "percentile" in text]
    assert bool(described) == trusted
    title = shown.static().get_suptitle().replace("\n", " ")
    assert ("not described" in title) == (not trusted)
    assert ("relative to" in title) == trusted
    if grade == "doubtful":
        assert all("percentile (doubtful: stopped" in text for text in meanings)


def test_a_nonsense_run_has_no_description(notebook, closed, opened):
    """Images with each other's poses."""
    particles = simulate_particles(
        closed,
        40,
        conformations=morph(closed, opened, 10),
        box_size=32,
        seed=5,
        progress=False,
    )
    rolled = replace(particles, rotations=particles.rotations.roll(1, 0), truth=None)
    result = refine(Model(closed, rolled, modes=2), rolled, check=False, progress=False)
    shown = explore(result)
    assert "This refinement is not to be trusted: " in shown.warning.value
    shown.select(shown.landscape.drawn[:1])
    texts = [part.value for part in descendants(shown) if isinstance(part, ipywidgets.HTML)]
    texts.append(shown.static().get_suptitle())
    assert any("not described" in text for text in texts)
    assert not any("percentile" in text or "relative to" in text for text in texts)


def test_errors_are_seen_and_the_next_thing_works(shown, monkeypatch):
    shown.landscape.scatter.selection = np.array([N + 5])
    assert f"expected particles from 0 to {N - 1}, got {N + 5}" in complaint(shown)

    def refuse(coordinates):
        raise RuntimeError("the kernel is busy")

    with monkeypatch.context() as patch:
        patch.setattr(shown.molecule, "set_coordinates", refuse)
        shown.components.sliders[0].value = 0.5
        assert "RuntimeError: the kernel is busy" in complaint(shown)
    shown.components.sliders[0].value = 1.0
    assert complaint(shown).startswith("RMSD to")


def test_bad_input_is_a_sentence(notebook, shown, result, latents, refined, opened):
    model = result.model
    with pytest.raises(ValueError, match=f"expected latents .N, {model.n_latents}.* of Model.*got"):
        explore(Result(model, latents[:, 1:]))
    for wrong in (latents, model):
        with pytest.raises(ValueError, match="expected result to be a Result, .* try refine"):
            explore(wrong)
    with pytest.raises(ValueError, match="expected 300 rows of columns, one a row of latents, got"):
        explore(result, columns=pd.DataFrame({"a": [1, 2]}))
    parts = (refined.latents, refined.std, refined.population)
    with pytest.raises(ValueError, match="expected a population of .*, got one of another model"):
        explore(Result(Model(opened, box_size=32, modes=2, pixel_size=5.0), *parts))
    with pytest.raises(ValueError, match="expected 12 particles, one .*, got 5"):
        explore(Result(refined.model, *parts, particles=refined.particles[:5]))
    with pytest.raises(ValueError, match="expected particles with the ids of the result, got"):
        explore(replace(refined, particles=refined.particles[::-1]))
    with pytest.raises(ValueError, match="expected columns of numbers, got 's' of"):
        explore(result, columns=pd.DataFrame({"s": ["a"] * N}))
    sentence = "expected finite latents, got NaN or Inf in 300 of 300 particles"
    with pytest.raises(ValueError, match=sentence):
        explore(Result(model, latents * torch.nan))
    with pytest.raises(ValueError, match="expected at least two particles"):
        explore(result[:1])
    with pytest.raises(
        ValueError, match="expected n_components to be a whole number of 1 or more, got 0"
    ):
        explore(result, n_components=0)
    with pytest.raises(ValueError, match="expected a component from 0 to 4, got 9"):
        shown.set_component(9, 1.0)
    with pytest.raises(ValueError, match="expected at least one particle, got none; try drawing"):
        shown.show_group([])
    with pytest.raises(ValueError, match="expected a selection, got none"):
        shown.save_selection()
    with pytest.raises(ValueError, match="expected one of pdb, dcd, cxc, gif, png, got 'xyz'"):
        shown.save("xyz")


def test_page_without_widgets_has_the_picture(shown):
    bundle = shown._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG")
    assert "application/vnd.jupyter.widget-view+json" in bundle
    label = "all chains, α and R|t, frame of the molecule"
    assert repr(shown) == f"Explorer(300 particles, {label}, 5 components)"


def test_gradients_doubles_and_numpy_are_fine(notebook, model, latents):
    for kind in (latents.clone().requires_grad_(), latents.double(), latents.numpy()):
        columns = pd.DataFrame({"x": np.arange(N), "odd": np.arange(N) % 2 > 0})
        shown = explore(Result(model, kind), columns=columns)
        shown.select([3])
        np.testing.assert_allclose(sent(shown), decoded(shown, latents[3]), atol=1e-3)
        shown.landscape.color_by.value = "x"
        points = shown.landscape.scatter.points
        scores = shown.motions.scores[:, 0]
        assert np.corrcoef(points[:, 0], scores)[0, 1] == pytest.approx(1)
