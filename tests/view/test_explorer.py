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
from cryochains.model import Model, simulate_particles
from cryochains.molecule import compute_modes
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
def latents(model):
    return torch.randn(N, model.n_latents, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def result(model, latents):
    return Result(model, latents)


@pytest.fixture
def shown(notebook, result):
    return explore(result, columns=pd.DataFrame({"subset": np.arange(N) % 2}))


@pytest.fixture(scope="module")
def refined(closed):
    """What was found of 12 small particles."""
    particles = simulate_particles(
        closed, 12, conformations=closed.coords[None], box_size=32, progress=False
    )
    model = Model(closed, particles, modes=2)
    return refine(model, particles, blurs=(4.0, 0.0), progress=False)


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
    table = latent_table(Result(model, shown.latents[None])).iloc[0]
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
    assert shown.motions.label == "chain B, rigid"
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
    assert shown.landscape.color_by.options == ("density", "uncertainty (Å)", "defocus (µm)")
    # Nothing moved here, and the components say so.
    for row, error in zip(
        shown.components.children, component_errors(shown.motions, shown.average), strict=True
    ):
        assert f"error bar {error:.2f} Å: hardly told from noise" in row.children[1].value
    shown.select([5])
    picture, text = shown.selection.children
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


def test_files_of_the_motion(shown, tmp_path):
    shown.folder.value = str(tmp_path)
    shown.landscape.chain.value = "B"
    shown.landscape.x.value = 2
    buttons = {
        part.description: part for part in descendants(shown) if isinstance(part, ipywidgets.Button)
    }
    expected = shown.all_atoms.decode(shown.motions.traverse(2, 21)).numpy()
    for name, kind in (("DCD", "dcd"), ("movie", "gif"), ("ChimeraX", "cxc"), ("PDB", "pdb")):
        buttons[name].click()
        (path,) = tmp_path.glob(f"pc3-chain-B-α-and-Rt.{kind}")
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
    assert (tmp_path / "pc3-chain-B-α-and-Rt.png").read_bytes() == b"\x89PNG the view"


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
    assert shown.landscape.color_by.options == ("density", "defocus (µm)")
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
        with pytest.raises(ValueError, match=r"expected a result, .* try Result\(model, latents\)"):
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
    with pytest.raises(ValueError, match="expected one component or more, got 0"):
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
    assert repr(shown) == "Explorer(300 particles, all chains, α and R|t, 5 components)"


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
