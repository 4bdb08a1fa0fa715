"""Parts of the explorer: the points on the left, and the two sets of sliders. Each tells what happened to a function.

Symbols: z → `place`, the latents of the conformation on screen; a panel's `follow` brings its sliders there.
"""

from collections.abc import Callable
from functools import partial
from html import escape

import numpy as np
import pandas as pd
import torch

from .dynamics import Dynamics
from .landscape import point_density
from .latent import KIND_GROUPS, PrincipalMotions, compute_pca, latent_names
from .screws import motion_sentence
from .widgets import guard

try:
    import ipywidgets
    import jscatter
except ImportError as error:
    raise ImportError(
        f"expected ipywidgets and jupyter-scatter, which show the explorer in a notebook, got: {error}; "
        "try pip install 'cryochains[lab]'"
    ) from error

KINDS = {"bending, turns and shifts": "all", "turns and shifts (R|t)": "rigid", "bending (α)": "modes"}
# Sliders go from one to the other of these percentiles of the particles.
PERCENTILES = (1, 99)
SLIDER = {"width": "400px", "flex": "0 0 auto"}


def stand(slider: ipywidgets.FloatSlider, value: float) -> None:
    """Bring a slider to a value; one that a hand is dragging is there already, and would jump back at an answer."""
    if abs(slider.value - value) > slider.step / 2:
        slider.value = value


def refill(box: ipywidgets.Box, children: list) -> None:
    """New children; the old ones are closed with all that is in them, or the kernel would keep them for good."""
    old = [widget for widget in box.children if widget not in children]
    box.children = children
    while old:
        old += getattr(old[0], "children", ())
        for part in ("layout", "style"):
            old += [getattr(old[0], part)] if part in old[0].trait_names() else []
        old.pop(0).close()


class Landscape(ipywidgets.VBox):
    """Particles on two principal components. ``motions`` are those of the chain and kind that are chosen.

    `on_motions()` is called when they change, `on_select(rows)` when points are clicked or drawn around.
    """

    def __init__(self, dynamics, latents, columns, n_components, said, on_motions, on_select):
        self.dynamics, self.latents, self.columns, self.n_components = dynamics, latents, columns, n_components
        self.said, self.on_motions, self.on_select = said, on_motions, on_select
        self.rows, self.quiet = np.zeros(0, dtype=int), False
        ids, present, half = dynamics.structure.chain_ids, set(dynamics.latent_kind), {"width": "48%"}
        chains = [("all chains", ""), *((f"chain {name}", name) for name in ids)]
        kinds = [(name, kind) for name, kind in KINDS.items() if present & set(KIND_GROUPS[kind])]
        self.chain = ipywidgets.Dropdown(options=chains, layout=half)
        self.kind = ipywidgets.Dropdown(options=kinds, layout=half)
        self.x, self.y = ipywidgets.Dropdown(layout=half), ipywidgets.Dropdown(layout=half)
        self.color = ipywidgets.Dropdown(
            options=["density", *columns], description="colour by", layout={"width": "96%"}
        )
        self.frame = ipywidgets.VBox(layout={"height": "370px"})
        for control in (self.chain, self.kind):
            control.observe(guard(self.analyse, said), "value")
        for control in (self.x, self.y, self.color):
            control.observe(guard(self.draw, said), "value")
        rows = [ipywidgets.HBox([self.chain, self.kind]), ipywidgets.HBox([self.x, self.y]), self.color, self.frame]
        super().__init__(rows, layout={"width": "44%"})

    def analyse(self) -> None:
        """Principal components of the chain and kind that are chosen, and the points anew."""
        chain, kind = self.chain.value or None, self.kind.value
        self.motions = compute_pca(self.dynamics, self.latents, chain, kind, self.n_components)
        n = self.motions.scores.shape[1]
        self.quiet = True
        self.x.options = self.y.options = [(f"PC{k + 1}", k) for k in range(n)]
        self.x.value, self.y.value = 0, min(1, n - 1)
        self.quiet = False
        self.draw()
        self.on_motions()

    def draw(self) -> None:
        """The particles on the two components and in the colours that are chosen."""
        if self.quiet:
            return
        by, axes = self.color.value, (self.x.value, self.y.value)
        x, y = self.motions.scores[:, axes].T
        values = point_density(x, y) if by == "density" else self.columns[by].to_numpy()
        scatter = jscatter.Scatter(
            data=pd.DataFrame({" x": x, " y": y, by: values}, dtype=np.float32), x=" x", y=" y", color_by=by,
            color_map="viridis", axes_labels=[f"PC{k + 1} (Å)" for k in axes], legend=True, height=330,
            selection=self.rows, size=int(np.clip(120 / len(x) ** 0.5, 1, 8)),
        )  # fmt: skip
        self.scatter = scatter.widget
        self.scatter.observe(guard(self._selected, self.said), "selection")
        refill(self.frame, [scatter.show(["pan_zoom", "lasso", "reset"])])

    def highlight(self, rows: np.ndarray) -> None:
        """Mark the particles at `rows`, as if they had been clicked."""
        self.rows = rows
        if not np.array_equal(self.scatter.selection, rows):
            self.scatter.selection = rows

    def _selected(self) -> None:
        rows = np.asarray(self.scatter.selection, dtype=int).ravel()
        if not np.array_equal(rows, self.rows):
            self.on_select(rows)


class ComponentSliders(ipywidgets.VBox):
    """A slider a principal component, in standard deviations, with what it means; `on_move(component, deviations)`."""

    def __init__(self, said: ipywidgets.HTML, on_move: Callable):
        self.said, self.on_move, self.quiet = said, on_move, False
        super().__init__()

    def show(self, motions: PrincipalMotions, errors: np.ndarray | None) -> None:
        """Sliders of other components, whose scores are known to within `errors` (k,) in Å."""
        self.motions, self.spread = motions, motions.scores.std(0)
        self.spread[self.spread == 0] = 1.0
        self.sliders, rows = [], []
        for k, (low, high) in enumerate(np.percentile(motions.scores / self.spread, PERCENTILES, axis=0).T):
            # Whole steps: the browser knows no other places.
            slider = ipywidgets.FloatSlider(
                0.0, min=np.floor(min(10 * low, -10)) / 10, max=np.ceil(max(10 * high, 10)) / 10, step=0.05,
                readout_format="+.2f",
                description=f"PC{k + 1} (SD)", layout=SLIDER,
            )  # fmt: skip
            slider.observe(guard(lambda k=k: self._moved(k), self.said), "value")
            self.sliders.append(slider)
            words = motion_sentence(motions, k).removeprefix(f"PC{k + 1}: ")
            known = f"spread {self.spread[k]:.2f} Å" + ("" if errors is None else f", error bar {errors[k]:.2f} Å")
            if errors is not None and self.spread[k] < 2 * errors[k]:
                known += ": hardly told from noise"
            text = f"<b>{known}</b>. From the 5th to the 95th percentile {escape(words)}"
            rows.append(ipywidgets.HBox([slider, ipywidgets.HTML(text)]))
        refill(self, rows)

    def follow(self, place: torch.Tensor) -> None:
        """Stand where the conformation at `place` (p,) is."""
        self.quiet = True
        self.places = self.motions.transform(place[None])[0] / self.spread
        for slider, score in zip(self.sliders, self.places, strict=True):
            stand(slider, float(np.clip(score, slider.min, slider.max)))
        self.quiet = False

    def _moved(self, component: int) -> None:
        slider = self.sliders[component]
        # The browser answers with the nearest step, which is nobody's wish.
        if not self.quiet and abs(slider.value - self.places[component]) > slider.step / 2:
            self.on_move(component, slider.value)


class ChainSliders(ipywidgets.VBox):
    """Turns (°), shifts (Å) and one mode (Å, RMS) of a chain; `on_move(latent, value)` in latent units."""

    def __init__(self, dynamics: Dynamics, latents: torch.Tensor, said: ipywidgets.HTML, on_move: Callable):
        self.dynamics, self.said, self.on_move, self.quiet = dynamics, said, on_move, False
        self.names, units = latent_names(dynamics)
        # The α of Eq. 1 is summed over residues: people think in Å a residue, which is a latent's own unit.
        self.units = np.where(dynamics.latent_kind == "mode", 1.0, units)
        # About as far as the particles go, and somewhere where they do not move.
        sample = latents[:: -(-len(latents) // 2000)].abs().numpy() * self.units
        self.reach = np.maximum(np.percentile(sample, PERCENTILES[1], axis=0), 1.0)
        self.place = torch.zeros(dynamics.n_latents)
        self.chain = ipywidgets.Dropdown(options=dynamics.structure.chain_ids, description="chain")
        self.chain.observe(guard(self.show, said), "value")
        super().__init__()
        self.show()

    def show(self) -> None:
        """Sliders of the chain that is chosen."""
        layout = self.dynamics.chains[self.dynamics.structure.chain_ids.index(self.chain.value)]
        modes = [(f"mode {k + 1}", index) for k, index in enumerate(range(layout.mode.start, layout.mode.stop))]
        self.mode = ipywidgets.Dropdown(options=modes, description="bend along")
        self.mode.observe(guard(lambda: self.follow(self.place), self.said), "value")
        rigid = range(layout.mode.stop, layout.translation.stop)
        names = [self.names[index].removeprefix(f"{self.chain.value} ") for index in rigid] + ["by (Å)"] * bool(modes)
        self.sliders = [
            ipywidgets.FloatSlider(0.0, step=0.1, readout_format="+.1f", description=name, layout=SLIDER)
            for name in names
        ]
        # Which latent a slider is; the mode's is read when it is needed.
        self.latents = [lambda index=index: index for index in rigid] + [lambda: self.mode.value] * bool(modes)
        for slider, latent in zip(self.sliders, self.latents, strict=True):
            act = partial(lambda slider, latent: self._moved(slider, latent()), slider, latent)
            slider.observe(guard(act, self.said), "value")
        rows = [ipywidgets.HBox(self.sliders[start : start + 2]) for start in range(0, len(rigid), 2)]
        if modes:
            rows.append(ipywidgets.HBox([self.mode, self.sliders[-1]]))
        refill(self, [self.chain, *rows])
        self.follow(self.place)

    def follow(self, place: torch.Tensor) -> None:
        """Stand where the conformation at `place` (p,) is."""
        self.place, self.quiet = place, True
        for slider, latent in zip(self.sliders, self.latents, strict=True):
            value = float(place[latent()] * self.units[latent()])
            reach = max(self.reach[latent()], abs(value))
            slider.max, slider.min = reach, -reach
            stand(slider, value)
        self.quiet = False

    def _moved(self, slider: ipywidgets.FloatSlider, latent: int) -> None:
        if not self.quiet and abs(slider.value - self.place[latent] * self.units[latent]) > slider.step / 2:
            self.on_move(latent, slider.value / self.units[latent])
