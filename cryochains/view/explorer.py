"""The widget of `explore`: all particles as points, beside the molecule they show.

Symbols: z → `latents` (p,), those of the conformation on screen, which every control reads and
writes. Needs the extras ``cryochains[lab]``.
"""

import base64
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from pathlib import Path

import ipywidgets
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from .._files import atomic_path
from ..analysis import (
    atom_uncertainty,
    average_covariance,
    component_errors,
    compute_pca,
    decode_one,
    motion_sentence,
    save_selection,
)
from ..images import positions
from ..inference import Result, posterior_covariance
from ..molecule import change_sentence, describe_change
from .drawing import figure_png
from .panels import (
    SLIDER_PERCENTILES,
    ChainSliders,
    ComponentSliders,
    Landscape,
    every_nth,
    refill,
    verdict_html,
)
from .plots import plot_explorer, plot_particles
from .saving import save_motion
from .widgets import Molecule, color_scale_html, guard

# What atoms can be coloured by.
BY_CHAIN = "chain"
BY_DISPLACEMENT = "displacement from the reference (Å)"
BY_UNCERTAINTY = "uncertainty (Å)"
# Files of "Save", by what they are called on the buttons.
_FILE_KINDS = {"PDB": "pdb", "DCD": "dcd", "ChimeraX": "cxc", "movie": "gif", "picture": "png"}
# Conformations in a saved ensemble, frames of a saved movie, and of the loop on screen.
_N_SAVED_CONFORMATIONS = 21
_N_MOVIE_FRAMES = 40
_N_LOOP_FRAMES = 60
# Milliseconds a frame of the loop.
_PLAY_SPEEDS = {"slow": 200, "normal": 66, "fast": 33}
# Columns of particle files, RELION's and cryoSPARC's: too many to show of a particle.
_FILE_COLUMNS = ("rln", "alignments", "blob/", "ctf/", "location/", "pick_stats/", "filament/")
_NOTHING_SELECTED = "Nothing is selected: click a point, or draw around some."


class Explorer(ipywidgets.VBox):
    """Latent space and molecule side by side; made by `explore`.

    What the mouse does has names too: `set_component`, `show_particle`, `show_group`, `reset`,
    `save`, `save_selection`.

    Attributes
    ----------
    result : Result
        Whose particles are shown, in the frame that they are shown in.
    motions : PrincipalMotions
        Those on screen.
    latents : (p,) tensor
        Those of the conformation on screen.
    rows : (k,) array
        Of the selected particles in the result.
    """

    def __init__(self, result: Result, columns: pd.DataFrame, n_components: int) -> None:
        self.result = result
        self.columns = columns
        self.dynamics = result.model.dynamics
        self.all_atoms = self.dynamics.all_atoms()
        self.reference = self.all_atoms.reference.numpy()
        self.rows = np.zeros(0, dtype=int)
        self.average = None if result.std is None else average_covariance(result)
        self.status = ipywidgets.HTML()
        molecule_box = self._build_molecule()
        self.components = ComponentSliders(self.status, self.set_component)
        self.chains = ChainSliders(result, self.status, self._set_latent)
        self.selection = ipywidgets.HBox()
        self.landscape = Landscape(
            result,
            columns,
            n_components,
            self.status,
            on_motions=self._new_motions,
            on_select=self.select,
            on_filter=self._filtered,
        )
        self.landscape.x.observe(guard(self.recolor, self.status), "value")
        tabs = ipywidgets.Tab([self.components, self.chains, self.selection, self._build_saving()])
        tabs.titles = ("Principal motions", "Chains", "Selection", "Save")
        self.warning = ipywidgets.HTML(verdict_html(result.verdict))
        rows = [ipywidgets.HBox([self.landscape, molecule_box]), self.status, tabs]
        if self.warning.value:
            rows.insert(1, self.warning)
        super().__init__(rows)
        self.landscape.analyse()

    def _build_molecule(self) -> ipywidgets.VBox:
        # The camera has the main motion lie along the screen.
        sample = every_nth(self.result)
        main_motion = compute_pca(sample, n_components=1, frame=sample.frame)
        low, high = self.all_atoms.decode(main_motion.traverse(0, 2)).numpy()
        self.molecule = Molecule(self.dynamics.structure, self.reference, high - low)
        choices = [BY_CHAIN, BY_DISPLACEMENT]
        if self.result.std is not None:
            choices.append(BY_UNCERTAINTY)
        self.color_by = ipywidgets.Dropdown(
            options=choices, description="colour by", layout={"width": "58%"}
        )
        self.reference_overlay = ipywidgets.Checkbox(
            description="reference", indent=False, layout={"width": "20%"}
        )
        home = ipywidgets.Button(description="reset", layout={"width": "18%"})
        self.color_scale = ipywidgets.HTML(layout={"width": "96%"})
        self.play = ipywidgets.Play(min=0, max=_N_LOOP_FRAMES - 1, interval=66, repeat=True)
        play_speed = ipywidgets.Dropdown(options=_PLAY_SPEEDS, value=66, layout={"width": "100px"})
        ipywidgets.link((play_speed, "value"), (self.play, "interval"))
        self.color_by.observe(guard(self.recolor, self.status), "value")
        self.reference_overlay.observe(guard(self._show_reference, self.status), "value")
        self.play.observe(guard(self._show_loop_frame, self.status), "value")
        home.on_click(guard(self.reset, self.status))
        rows = [
            ipywidgets.HBox([self.color_by, self.reference_overlay, home]),
            self.color_scale,
            ipywidgets.HBox([self.play, play_speed]),
        ]
        return ipywidgets.VBox([self.molecule, *rows], layout={"width": "56%"})

    def _build_saving(self) -> ipywidgets.VBox:
        self.folder = ipywidgets.Text("results/explorer", description="folder")
        acts: dict[str, Callable[[], object]] = {
            name: partial(self.save, kind) for name, kind in _FILE_KINDS.items()
        }
        acts["selection"] = self.save_selection
        buttons = []
        for name, act in acts.items():
            button = ipywidgets.Button(description=name)
            button.on_click(guard(act, self.status))
            buttons.append(button)
        return ipywidgets.VBox([self.folder, ipywidgets.HBox(buttons)])

    def _new_motions(self) -> None:
        self.motions = self.landscape.motions
        errors = None
        if self.average is not None:
            errors = component_errors(self.motions, self.average)
        self.components.show(self.motions, errors)
        if len(self.rows):
            self.select(self.rows)
        else:
            self.reset()

    def _filtered(self) -> None:
        """What is hidden is not selected."""
        rows = self.landscape.visible(self.rows)
        if len(rows) < len(self.rows):
            self.select(rows)

    def move(self, latents: torch.Tensor) -> None:
        """Show the conformation at `latents` (p,): atoms, colours and every slider follow."""
        self.latents = latents
        coords = decode_one(self.all_atoms, latents)
        self.molecule.move(coords, self._atom_values(coords))
        self.components.follow(latents)
        self.chains.follow(latents)
        rmsd = np.sqrt(np.square(coords - self.reference).sum(-1).mean())
        name = escape(self.dynamics.structure.name)
        self.status.value = f"RMSD to {name} {rmsd:.2f} Å (every atom)"

    def reset(self) -> None:
        """Back to the mean of all particles, of which none is selected."""
        self.rows = np.zeros(0, dtype=int)
        self.covariance = self.average
        self.landscape.highlight(self.rows)
        refill(self.selection, [ipywidgets.HTML(_NOTHING_SELECTED)])
        self.move(torch.from_numpy(self.motions.mean).float())
        self.recolor()

    def set_component(self, component: int, deviations: float) -> None:
        """Move along a component to so many standard deviations from the mean; the rest stays.

        Raises
        ------
        ValueError
            For a component that does not exist; 0 is PC1.
        """
        n = len(self.components.spread)
        if not 0 <= component < n:
            raise ValueError(
                f"expected a component from 0 to {n - 1}, got {component}; try 0, which is PC1"
            )
        score = self.motions.transform(self.latents[None])[0, component]
        distance = deviations * self.components.spread[component] - score
        step = distance * self.motions.components[component]
        self.move(self.latents + torch.from_numpy(step).float())

    def _set_latent(self, latent: int, value: float) -> None:
        latents = self.latents.clone()
        latents[latent] = value
        self.move(latents)

    def select(self, rows: np.ndarray | Sequence[int]) -> None:
        """What a click or a lasso does: one particle is shown, of several the mean conformation.

        Particles that are hidden as junk are left out.

        Raises
        ------
        ValueError
            When there is no such particle, or all of them are hidden.
        """
        rows = self._visible(rows)
        if len(rows) == 1:
            self.show_particle(int(rows[0]))
        elif len(rows):
            self.show_group(rows)
        else:
            self.reset()

    def show_particle(self, row: int) -> None:
        """Conformation, error bar, image and reconstruction of particle number `row`.

        Raises
        ------
        ValueError
            When there is no such particle, or it is hidden as junk.
        """
        self._choose([row])
        lines = [f"<b>Particle {escape(str(self.result.ids[row]))} (row {row})</b>"]
        if self.covariance is not None:
            errors = atom_uncertainty(self.dynamics, self.latents, self.covariance)
            error = np.sqrt(np.mean(errors**2))
            lines.append(f"error bar {error:.2f} Å (RMS over the atoms)")
        for column in self.columns:
            if not column.startswith(_FILE_COLUMNS):
                lines.append(f"{column} {self.columns[column].iloc[row]:.4g}")
        if not self.landscape.shows_molecule[row]:
            lines.append("flagged as junk: it more likely shows something else than the molecule")
        lines.append(self._change_words())
        parts = [ipywidgets.HTML("<br>".join(lines))]
        if self.result.particles is not None:
            figure = plot_particles(self.result[[row]])
            # At its own height: the text beside it would stretch it.
            layout = {"width": "600px", "align_self": "flex-start"}
            image = ipywidgets.Image(value=figure_png(figure), layout=layout)
            parts.insert(0, image)
        refill(self.selection, parts)

    def show_group(self, rows: np.ndarray) -> None:
        """The mean conformation of the particles at these rows of the result, but hidden ones.

        Raises
        ------
        ValueError
            When there are no such particles, or all of them are hidden as junk.
        """
        self._choose(rows)
        text = f"<b>Mean of {len(self.rows):,} particles</b><br>{self._change_words()}"
        refill(self.selection, [ipywidgets.HTML(text)])

    def recolor(self) -> None:
        """Colours of the atoms as chosen, and their scale."""
        values = self._atom_values(self.molecule.coords)
        if values is None:
            self.molecule.color_chains()
            self.color_scale.value = ""
            return
        top = float(values.max())
        if self.color_by.value == BY_DISPLACEMENT:
            # What the loop will show fits the scale.
            latents = self.motions.traverse(self.landscape.x.value, 2, SLIDER_PERCENTILES)
            ends = self.all_atoms.decode(latents).numpy()
            top = max(top, float(np.linalg.norm(ends - self.reference, axis=-1).max()))
        top = max(top, 0.1)
        self.molecule.color_values(top)
        self.molecule.move(self.molecule.coords, values)
        self.color_scale.value = color_scale_html(self.color_by.value, top)

    def save(self, kind: str) -> Path:
        """Write the motion along the component on the x axis.

        Parameters
        ----------
        kind : {"pdb", "dcd", "cxc", "gif", "png"}
            "cxc" is for ChimeraX; "png" is the view, which the browser draws: it is written a
            moment later, and `status` says when.

        Returns
        -------
        Path
        """
        component = self.landscape.x.value
        if kind not in _FILE_KINDS.values():
            kinds = ", ".join(_FILE_KINDS.values())
            raise ValueError(f"expected one of {kinds}, got {kind!r}; try 'pdb'")
        words = self.motions.label.replace(" ", "-")
        label = "".join(c for c in words if c.isalnum() or c in "-_")
        path = Path(self.folder.value, f"pc{component + 1}-{label}.{kind}")
        if kind == "png":
            image = self.molecule.render_image(factor=2, trim=True)
            write = guard(lambda: self._write_picture(path, image.value), self.status)
            image.observe(write, "value")
            return path
        self.status.value = "Writing …"
        n = _N_MOVIE_FRAMES if kind == "gif" else _N_SAVED_CONFORMATIONS
        save_motion(path, self.motions, component, n=n)
        self.status.value = f"Wrote {escape(str(path))}"
        return path

    def save_selection(self) -> Path:
        """Write the selected particles into the folder; returns the path of their table."""
        path = save_selection(self.folder.value, self.motions, self.rows)
        self.status.value = f"Wrote {len(self.rows):,} particles to {escape(str(path))}"
        return path

    def static(self) -> Figure:
        """The picture of what is chosen, for a page without widgets."""
        component = self.landscape.x.value
        return plot_explorer(self.motions, component, motion_sentence(self.motions, component))

    @torch.no_grad()
    def _change_words(self) -> str:
        """HTML that says what the conformation on screen is, from the mean of all particles."""
        verdict = self.result.verdict
        if verdict is not None and not verdict.trusted:
            return f"Not described, since the refinement is {verdict.grade}"
        mean = torch.from_numpy(self.motions.mean).float()
        before, after = self.dynamics.decode(torch.stack([mean, self.latents])).numpy()
        words = change_sentence(describe_change(self.dynamics.structure, before, after))
        return escape(f"From the mean of all particles: {words}")

    def _write_picture(self, path: Path, content: bytes) -> None:
        with atomic_path(path) as part:
            part.write_bytes(content)
        self.status.value = f"Wrote {escape(str(path))}"

    def _choose(self, rows) -> None:
        """Select particles, mark their points, and show their mean."""
        rows = self._visible(rows)
        if not len(rows):
            raise ValueError(
                "expected at least one particle, got none; try drawing around some points"
            )
        self.rows = rows
        self.landscape.highlight(rows)
        self.covariance = self._selected_covariance()
        self.move(self.result.latents[rows].mean(0))
        self.recolor()

    def _visible(self, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """(k,) rows of the result, of numbers or a mask, without those that are hidden."""
        n = len(self.result)
        rows = np.asarray(rows)
        rows = positions(rows, n) if rows.dtype == bool else rows.astype(int).ravel()
        if len(rows) and (rows.min() < 0 or rows.max() >= n):
            raise ValueError(
                f"expected particles from 0 to {n - 1}, got {rows.min()} to "
                f"{rows.max()}; try rows of this result"
            )
        visible = self.landscape.visible(rows)
        if len(rows) and not len(visible):
            raise ValueError(
                f"expected particles that are drawn, got {len(rows):,} hidden as junk; "
                "try landscape.hide_junk.value = False"
            )
        return visible

    def _selected_covariance(self) -> torch.Tensor | None:
        """(p, p) covariance of the latents of what is selected; None where it is not known.

        Exact for one particle of a refined result; of several, what their error bars say.
        """
        result = self.result
        if result.std is None:
            return None
        exact = result.population is not None and result.particles is not None
        if exact and len(self.rows) == 1:
            return posterior_covariance(result, self.rows)[0].float().cpu()
        return result.std[self.rows].square().mean(0).diag()

    def _atom_values(self, coords: np.ndarray) -> np.ndarray | None:
        """(n_all,) Å by which atoms are coloured; None for chains."""
        if self.color_by.value == BY_DISPLACEMENT:
            return np.linalg.norm(coords - self.reference, axis=-1)
        if self.color_by.value == BY_UNCERTAINTY and self.covariance is not None:
            return atom_uncertainty(self.all_atoms, self.latents, self.covariance)
        return None

    def _show_reference(self) -> None:
        self.molecule.show_reference(self.reference_overlay.value)

    def _show_loop_frame(self) -> None:
        """One frame of the loop, there and back along the component on the x axis."""
        slider = self.components.sliders[self.landscape.x.value]
        share = 1 - abs(2 * self.play.value / _N_LOOP_FRAMES - 1)
        slider.value = slider.min + share * (slider.max - slider.min)

    def _repr_mimebundle_(self, **kwargs):
        # A page that shows no widgets, such as a notebook on the web, shows the picture.
        picture = base64.b64encode(figure_png(self.static())).decode()
        return super()._repr_mimebundle_(**kwargs) | {"image/png": picture}

    def __repr__(self) -> str:
        n, k = self.motions.scores.shape
        return f"Explorer({n:,} particles, {self.motions.label}, {k} components)"
