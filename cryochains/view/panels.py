"""Parts of the explorer: the points on the left, and the two sets of sliders.

Each tells what happened to a function. Symbols: z → `latents` (p,), those of the conformation on
screen; a panel's `follow` brings its sliders there. Needs the extras ``cryochains[lab]``.
"""

from collections.abc import Callable
from functools import partial
from html import escape

import ipywidgets
import jscatter
import numpy as np
import pandas as pd
import torch

from ..analysis import (
    KIND_GROUPS,
    PrincipalMotions,
    compute_pca,
    latent_names,
    motion_sentence,
    point_density,
)
from ..inference import Result, Verdict, frame_words
from .drawing import GRADE_COLORS
from .widgets import guard

_KIND_LABELS = {
    "bending, turns and shifts": "all",
    "turns and shifts (R|t)": "rigid",
    "bending (α)": "modes",
}
# Sliders go from one to the other of these percentiles of the particles.
SLIDER_PERCENTILES = (1, 99)
_SLIDER_LAYOUT = {"width": "400px", "flex": "0 0 auto"}
_HALF_WIDTH = {"width": "48%"}
# Particles that the ends of the chains' sliders, and the camera, are found from.
_SAMPLE_SIZE = 2000


def _set_slider(slider: ipywidgets.FloatSlider, value: float) -> None:
    """Bring a slider to a value, unless it is there to within half a step.

    One that a hand is dragging is, and would jump back at an answer.
    """
    if abs(slider.value - value) > slider.step / 2:
        slider.value = value


def refill(box: ipywidgets.Box, children: list) -> None:
    """New children; the old ones are closed with all that is in them, or the kernel keeps them."""
    old = [widget for widget in box.children if widget not in children]
    box.children = children
    while old:
        widget = old.pop(0)
        old += getattr(widget, "children", ())
        for part in ("layout", "style"):
            if part in widget.trait_names():
                old.append(getattr(widget, part))
        widget.close()


def every_nth(result: Result) -> Result:
    """About _SAMPLE_SIZE of the particles of a result that show the molecule, evenly spread."""
    rows = np.flatnonzero(result.shows_molecule)
    return result[rows[:: max(1, -(-len(rows) // _SAMPLE_SIZE))]]


def verdict_html(verdict: Verdict | None) -> str:
    """HTML of one line: grade and reasons, and what to try where the mouse rests; empty if good."""
    if verdict is None or not verdict.reasons:
        return ""
    words = escape(f"This refinement is {verdict.grade}: {verdict.reasons}.")
    color = f"color: {GRADE_COLORS[verdict.grade]}"
    return f"<b style='{color}' title='{escape(repr(verdict))}'>{words}</b>"


def _least(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.min()) if len(known) else 0.0


class Landscape(ipywidgets.VBox):
    """Particles on two principal components.

    ``motions`` are those of the chain and kind that are chosen, ``drawn`` (k,) the rows of the
    particles that are points. Where some do not show the molecule, a checkbox leaves them out.

    Parameters
    ----------
    result : Result
    columns : DataFrame
        To colour the points by.
    n_components : int
    status : ipywidgets.HTML
        Where errors are written.
    on_motions : callable
        Called without arguments when the motions change.
    on_select : callable
        Called with the rows of the particles that were clicked or drawn around.
    on_filter : callable
        Called without arguments when other particles are drawn.
    """

    def __init__(
        self,
        result: Result,
        columns: pd.DataFrame,
        n_components: int,
        status: ipywidgets.HTML,
        on_motions: Callable[[], None],
        on_select: Callable[[np.ndarray], None],
        on_filter: Callable[[], None],
    ) -> None:
        self.result = result
        self.columns = columns
        self.n_components = n_components
        self.status = status
        self.on_motions = on_motions
        self.on_select = on_select
        self.on_filter = on_filter
        self.shows_molecule = result.shows_molecule
        self.rows = np.zeros(0, dtype=int)
        self.quiet = False
        chains = [("all chains", "")]
        chains += [(f"chain {name}", name) for name in result.model.structure.chain_ids]
        present = set(result.model.dynamics.latent_kind)
        kinds = [
            (label, kind)
            for label, kind in _KIND_LABELS.items()
            if present & set(KIND_GROUPS[kind])
        ]
        self.chain = ipywidgets.Dropdown(options=chains, layout=_HALF_WIDTH)
        self.kind = ipywidgets.Dropdown(options=kinds, layout=_HALF_WIDTH)
        self.x = ipywidgets.Dropdown(layout=_HALF_WIDTH)
        self.y = ipywidgets.Dropdown(layout=_HALF_WIDTH)
        self.color_by = ipywidgets.Dropdown(
            options=["density", *columns], description="colour by", layout={"width": "96%"}
        )
        n_junk = int((~self.shows_molecule).sum())
        self.hide_junk = ipywidgets.Checkbox(
            True,
            description=f"hide {n_junk:,} junk particle{'s' if n_junk > 1 else ''}",
            tooltip="whose image more likely shows something else, or the molecule at another pose",
            indent=False,
            layout={"width": "96%"},
        )
        self.hide_junk.observe(guard(self._filter, status), "value")
        self.canvas = ipywidgets.VBox(layout={"height": "370px"})
        in_frame = ipywidgets.HTML(f"Conformations in the {escape(frame_words(result.frame))}")
        for control in (self.chain, self.kind):
            control.observe(guard(self.analyse, status), "value")
        for control in (self.x, self.y, self.color_by):
            control.observe(guard(self.draw, status), "value")
        rows = [
            ipywidgets.HBox([self.chain, self.kind]),
            ipywidgets.HBox([self.x, self.y]),
            self.color_by,
            *([self.hide_junk] if n_junk else []),
            self.canvas,
            in_frame,
        ]
        super().__init__(rows, layout={"width": "44%"})

    def analyse(self) -> None:
        """Principal components of the chain and kind that are chosen, and the points anew."""
        chain = self.chain.value or None
        self.motions = compute_pca(
            self.result, chain, self.kind.value, self.n_components, frame=self.result.frame
        )
        n = self.motions.scores.shape[1]
        options = [(f"PC{k + 1}", k) for k in range(n)]
        self.quiet = True
        self.x.options = options
        self.y.options = options
        self.x.value = 0
        self.y.value = min(1, n - 1)
        self.quiet = False
        self.draw()
        self.on_motions()

    def draw(self) -> None:
        """The particles on the two components and in the colours that are chosen."""
        if self.quiet:
            return
        name = self.color_by.value
        axes = (self.x.value, self.y.value)
        values = self._density(axes) if name == "density" else self.columns[name].to_numpy()
        self.drawn = self.visible(np.arange(len(self.result)))
        x, y = self.motions.scores[np.ix_(self.drawn, axes)].T
        # What is not known of a particle is drawn as the least that is known.
        values = np.nan_to_num(values[self.drawn].astype(np.float64), nan=_least(values))
        scatter = jscatter.Scatter(
            data=pd.DataFrame({" x": x, " y": y, name: values}, dtype=np.float32),
            x=" x",
            y=" y",
            color_by=name,
            color_map="viridis",
            axes_labels=[f"PC{k + 1} (Å)" for k in axes],
            legend=True,
            height=330,
            selection=self._points(self.rows),
            size=int(np.clip(120 / len(x) ** 0.5, 1, 8)),
        )
        self.scatter = scatter.widget
        self.scatter.observe(guard(self._selected, self.status), "selection")
        refill(self.canvas, [scatter.show(["pan_zoom", "lasso", "reset"])])

    def highlight(self, rows: np.ndarray) -> None:
        """Mark the particles at `rows`, as if they had been clicked."""
        self.rows = rows
        points = self._points(rows)
        if not np.array_equal(self.scatter.selection, points):
            self.scatter.selection = points

    def visible(self, rows: np.ndarray) -> np.ndarray:
        """Those of the `rows` of the result whose particles are not hidden as junk."""
        return rows[self.shows_molecule[rows]] if self.hide_junk.value else rows

    def _density(self, axes: tuple[int, int]) -> np.ndarray:
        """(N,) density of the points that show the molecule, where each of them is; else 0."""
        density = np.zeros(len(self.result))
        x, y = self.motions.shown_scores[:, axes].T
        density[self.shows_molecule] = point_density(x, y)
        return density

    def _points(self, rows: np.ndarray) -> np.ndarray:
        """Numbers of the points that are the particles at `rows`."""
        return np.searchsorted(self.drawn, self.visible(rows))

    def _filter(self) -> None:
        self.draw()
        self.on_filter()

    def _selected(self) -> None:
        points = np.asarray(self.scatter.selection, dtype=int).ravel()
        if len(points) and points.max() >= len(self.drawn):
            raise ValueError(
                f"expected particles from 0 to {len(self.drawn) - 1}, got {points.max()}; "
                "try drawing around some"
            )
        rows = self.drawn[points]
        if not np.array_equal(rows, self.rows):
            self.on_select(rows)


class ComponentSliders(ipywidgets.VBox):
    """A slider a principal component, in standard deviations, with what it means.

    Parameters
    ----------
    status : ipywidgets.HTML
        Where errors are written.
    on_move : callable
        Called with a component and its standard deviations.
    """

    def __init__(self, status: ipywidgets.HTML, on_move: Callable[[int, float], None]) -> None:
        self.status = status
        self.on_move = on_move
        self.quiet = False
        super().__init__()

    def show(self, motions: PrincipalMotions, errors: np.ndarray | None) -> None:
        """Sliders of other components, whose scores are known to within `errors` (k,) in Å."""
        self.motions = motions
        # Junk is not on the sliders.
        scores = motions.shown_scores
        self.spread = scores.std(0)
        self.spread[self.spread == 0] = 1.0
        self.sliders = []
        rows = []
        ends = np.percentile(scores / self.spread, SLIDER_PERCENTILES, axis=0)
        for component, (low, high) in enumerate(ends.T):
            # The browser knows no values between the steps: the ends are whole ones.
            slider = ipywidgets.FloatSlider(
                0.0,
                min=np.floor(min(10 * low, -10)) / 10,
                max=np.ceil(max(10 * high, 10)) / 10,
                step=0.05,
                readout_format="+.2f",
                description=f"PC{component + 1} (SD)",
                layout=_SLIDER_LAYOUT,
            )
            slider.observe(guard(partial(self._moved, component), self.status), "value")
            self.sliders.append(slider)
            text = ipywidgets.HTML(self._meaning(component, errors))
            rows.append(ipywidgets.HBox([slider, text]))
        refill(self, rows)

    def _meaning(self, component: int, errors: np.ndarray | None) -> str:
        """HTML of what moves along a component, and how well its scores are known."""
        spread = self.spread[component]
        known = f"spread {spread:.2f} Å"
        if errors is not None:
            known += f", error bar {errors[component]:.2f} Å"
            if spread < 2 * errors[component]:
                known += ": hardly told from noise"
        verdict = self.motions.result.verdict
        if verdict is not None and not verdict.trusted:
            return f"<b>{known}</b>. Not described, since the refinement is {verdict.grade}"
        sentence = motion_sentence(self.motions, component)
        words = escape(sentence.removeprefix(f"PC{component + 1}: "))
        return f"<b>{known}</b>. From the 5th to the 95th percentile {words}"

    def follow(self, latents: torch.Tensor) -> None:
        """Bring the sliders to the conformation at `latents` (p,)."""
        self.quiet = True
        self.deviations = self.motions.transform(latents[None])[0] / self.spread
        for slider, deviation in zip(self.sliders, self.deviations, strict=True):
            _set_slider(slider, float(np.clip(deviation, slider.min, slider.max)))
        self.quiet = False

    def _moved(self, component: int) -> None:
        slider = self.sliders[component]
        # The browser answers with the nearest step, which nobody asked for.
        off_step = abs(slider.value - self.deviations[component])
        if not self.quiet and off_step > slider.step / 2:
            self.on_move(component, slider.value)


class ChainSliders(ipywidgets.VBox):
    """Turns (°), shifts (Å) and one mode (Å, RMS) of a chain.

    Parameters
    ----------
    result : Result
        Whose particles set the ends of the sliders.
    status : ipywidgets.HTML
        Where errors are written.
    on_move : callable
        Called with the number of a latent and its value in latent units.
    """

    def __init__(
        self, result: Result, status: ipywidgets.HTML, on_move: Callable[[int, float], None]
    ) -> None:
        self.dynamics = result.model.dynamics
        self.status = status
        self.on_move = on_move
        self.quiet = False
        self.names, units = latent_names(self.dynamics)
        # The α of Eq. 1 is summed over residues: people think in Å a residue, which is a latent's
        # own unit.
        self.units = np.where(self.dynamics.latent_kind == "mode", 1.0, units)
        # About as far as the particles go, and somewhere where they do not move.
        sample = every_nth(result).latents.abs().numpy() * self.units
        self.extent = np.maximum(np.percentile(sample, SLIDER_PERCENTILES[1], axis=0), 1.0)
        self.latents = torch.zeros(self.dynamics.n_latents)
        self.chain = ipywidgets.Dropdown(
            options=self.dynamics.structure.chain_ids, description="chain"
        )
        self.chain.observe(guard(self.show, status), "value")
        super().__init__()
        self.show()

    def show(self) -> None:
        """Sliders of the chain that is chosen."""
        layout = self.dynamics.chains[self.dynamics.structure.chain_ids.index(self.chain.value)]
        self.rigid_latents = range(layout.mode.stop, layout.translation.stop)
        n_modes = layout.mode.stop - layout.mode.start
        self.mode = ipywidgets.Dropdown(
            options=[(f"mode {k + 1}", layout.mode.start + k) for k in range(n_modes)],
            description="bend along",
        )
        self.mode.observe(guard(self._follow_again, self.status), "value")
        prefix = f"{self.chain.value} "
        names = [self.names[latent].removeprefix(prefix) for latent in self.rigid_latents]
        if n_modes:
            names.append("by (Å)")
        self.sliders = [
            ipywidgets.FloatSlider(
                0.0, step=0.1, readout_format="+.1f", description=name, layout=_SLIDER_LAYOUT
            )
            for name in names
        ]
        for number, slider in enumerate(self.sliders):
            slider.observe(guard(partial(self._moved, number), self.status), "value")
        rows = [self.chain]
        for start in range(0, len(self.rigid_latents), 2):
            stop = min(start + 2, len(self.rigid_latents))
            rows.append(ipywidgets.HBox(self.sliders[start:stop]))
        if n_modes:
            rows.append(ipywidgets.HBox([self.mode, self.sliders[-1]]))
        refill(self, rows)
        self.follow(self.latents)

    def follow(self, latents: torch.Tensor) -> None:
        """Bring the sliders to the conformation at `latents` (p,)."""
        self.latents = latents
        self.quiet = True
        for number, slider in enumerate(self.sliders):
            latent = self._latent_of(number)
            value = float(latents[latent] * self.units[latent])
            extent = max(self.extent[latent], abs(value))
            slider.max = extent
            slider.min = -extent
            _set_slider(slider, value)
        self.quiet = False

    def _follow_again(self) -> None:
        self.follow(self.latents)

    def _latent_of(self, number: int) -> int:
        """Which latent slider `number` is: one of the rigid motion, or the mode that is chosen."""
        if number < len(self.rigid_latents):
            return self.rigid_latents[number]
        return self.mode.value

    def _moved(self, number: int) -> None:
        slider = self.sliders[number]
        latent = self._latent_of(number)
        off_step = abs(slider.value - float(self.latents[latent] * self.units[latent]))
        if not self.quiet and off_step > slider.step / 2:
            self.on_move(latent, slider.value / self.units[latent])
