"""`explore`: all particles as points, beside the molecule they show.

Symbols: z → `place`, the latents of the conformation on screen, which every control reads and writes.
"""

import base64
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from . import landscape
from .dynamics import Dynamics
from .exports import save_chimerax, save_movie
from .files import atomic_path
from .inference import posterior_covariance
from .latent import compute_pca, save_ensemble
from .model import CryoChains
from .panels import PERCENTILES, ChainSliders, ComponentSliders, Landscape, refill
from .particles import ParticleStack
from .plots import plot_explorer, plot_particles
from .population import Refinement
from .screws import change_sentence, describe_change, motion_sentence
from .widgets import Molecule, color_bar, figure_instead, guard, ipywidgets

CHAIN, DISPLACEMENT, UNCERTAINTY = "chain", "displacement from the reference (Å)", "uncertainty (Å)"
# Files of "Save", by what they are called on the buttons.
FILES = {"PDB": "pdb", "DCD": "dcd", "ChimeraX": "cxc", "movie": "gif", "picture": "png"}
# Conformations in a saved ensemble, and places of a loop there and back.
N_SAVED, LOOP = 21, 60


class Explorer(ipywidgets.VBox):
    """Latent space and molecule side by side; made by `explore`.

    What the mouse does has names too: `set_component`, `show_particle`, `show_group`, `reset`, `save`,
    `save_selection`. ``motions`` and ``place`` (p,), latents, are those on screen, ``rows`` the selected particles'
    positions in the stack.
    """

    def __init__(self, dynamics, latents, columns, n_components, model=None, particles=None, found=None):
        self.dynamics, self.latents = dynamics, latents
        self.columns, self.model, self.particles, self.found = columns, model, particles, found
        self.every = dynamics.with_structure(dynamics.structure.all_atoms())
        self.reference = self.every.reference.numpy()
        self.rows = np.zeros(0, dtype=int)
        self.average = None if found is None else landscape.average_covariance(found, model, particles)
        self.said = ipywidgets.HTML()
        self.components = ComponentSliders(self.said, self.set_component)
        self.chains = ChainSliders(dynamics, latents, self.said, self._set_latent)
        self.selection = ipywidgets.HBox()
        calls = self.said, self._new_motions, self.select
        self.landscape = Landscape(dynamics, latents, columns, n_components, *calls)
        tabs = ipywidgets.Tab([self.components, self.chains, self.selection, self._build_saving()])
        tabs.titles = ("Principal motions", "Chains", "Selection", "Save")
        super().__init__([ipywidgets.HBox([self.landscape, self._build_molecule()]), self.said, tabs])
        self.landscape.analyse()

    def _build_molecule(self) -> ipywidgets.VBox:
        # The camera has the main motion lie along the screen.
        main = compute_pca(self.dynamics, self.latents[:: -(-len(self.latents) // 2000)], n_components=1)
        low, high = self.every.decode(main.traverse(0, 2)).numpy()
        self.molecule = Molecule(self.dynamics.structure, self.reference, high - low)
        paints = (CHAIN, DISPLACEMENT) if self.found is None else (CHAIN, DISPLACEMENT, UNCERTAINTY)
        self.paint = ipywidgets.Dropdown(options=paints, description="colour by", layout={"width": "58%"})
        self.ghost = ipywidgets.Checkbox(description="reference", indent=False, layout={"width": "20%"})
        home = ipywidgets.Button(description="reset", layout={"width": "18%"})
        self.bar = ipywidgets.HTML(layout={"width": "96%"})
        self.play = ipywidgets.Play(min=0, max=LOOP - 1, interval=66, repeat=True)
        paces = {"slow": 200, "normal": 66, "fast": 33}
        speed = ipywidgets.Dropdown(options=paces, value=66, layout={"width": "100px"})
        ipywidgets.link((speed, "value"), (self.play, "interval"))
        self.paint.observe(guard(self.recolor, self.said), "value")
        self.ghost.observe(guard(lambda: self.molecule.show_ghost(self.ghost.value), self.said), "value")
        self.play.observe(guard(self._step, self.said), "value")
        self.landscape.x.observe(guard(self.recolor, self.said), "value")
        home.on_click(guard(self.reset, self.said))
        rows = [ipywidgets.HBox([self.paint, self.ghost, home]), self.bar, ipywidgets.HBox([self.play, speed])]
        return ipywidgets.VBox([self.molecule, *rows], layout={"width": "56%"})

    def _build_saving(self) -> ipywidgets.VBox:
        self.folder = ipywidgets.Text("results/explorer", description="folder")
        acts = {name: lambda kind=kind: self.save(kind) for name, kind in FILES.items()}
        buttons = []
        for name, act in (acts | {"selection": self.save_selection}).items():
            buttons.append(ipywidgets.Button(description=name))
            buttons[-1].on_click(guard(act, self.said))
        return ipywidgets.VBox([self.folder, ipywidgets.HBox(buttons)])

    def _new_motions(self) -> None:
        self.motions = self.landscape.motions
        errors = None if self.average is None else landscape.component_errors(self.motions, self.average)
        self.components.show(self.motions, errors)
        if len(self.rows):
            self.select(self.rows)
        else:
            self.reset()

    def move(self, place: torch.Tensor) -> None:
        """Show the conformation at latents `place` (p,): atoms, colours and every slider follow."""
        self.place = place
        coords = landscape.decode_one(self.every, place)
        self.molecule.move(coords, self._values(coords))
        self.components.follow(place)
        self.chains.follow(place)
        moved = np.sqrt(np.square(coords - self.reference).sum(-1).mean())
        self.said.value = f"RMSD to {escape(self.dynamics.structure.name)} {moved:.2f} Å (every atom)"

    def reset(self) -> None:
        """Back to the mean of all particles, of which none is selected."""
        self.rows, self.covariance = np.zeros(0, dtype=int), self.average
        self.landscape.highlight(self.rows)
        refill(self.selection, [ipywidgets.HTML("Nothing is selected: click a point, or draw around some.")])
        self.move(torch.from_numpy(self.motions.mean).float())
        self.recolor()

    def set_component(self, component: int, deviations: float) -> None:
        """Move along a component (0 is PC1) to so many standard deviations from the mean; the rest stays.

        Raises
        ------
        ValueError
            For a component that does not exist.
        """
        n = len(self.components.spread)
        if not 0 <= component < n:
            raise ValueError(f"expected a component from 0 to {n - 1}, got {component}")
        score = self.motions.transform(self.place[None])[0, component]
        step = (deviations * self.components.spread[component] - score) * self.motions.components[component]
        self.move(self.place + torch.from_numpy(step).float())

    def _set_latent(self, latent: int, value: float) -> None:
        place = self.place.clone()
        place[latent] = value
        self.move(place)

    def select(self, rows) -> None:
        """What a click or a lasso does: one particle is shown as it is, of several the mean conformation."""
        rows = np.asarray(rows, dtype=int).ravel()
        if len(rows) == 1:
            self.show_particle(int(rows[0]))
        elif len(rows):
            self.show_group(rows)
        else:
            self.reset()

    def show_particle(self, row: int) -> None:
        """The conformation of particle number `row` of the stack, its error bar, its image and reconstruction."""
        self._choose([row])
        name = f"row {row}" if self.particles is None else f"{self.particles.ids[row]} (row {row})"
        lines = [f"<b>Particle {escape(name)}</b>"]
        if self.covariance is not None:
            error = np.sqrt(np.mean(landscape.atom_uncertainty(self.dynamics, self.place, self.covariance) ** 2))
            lines.append(f"error bar {error:.2f} Å (RMS over the atoms)")
        shown = [column for column in self.columns if not column.startswith("rln")]
        lines += [f"{column} {self.columns[column].iloc[row]:.4g}" for column in shown]
        lines.append(self._words())
        parts = [ipywidgets.HTML("<br>".join(lines))]
        if self.model is not None and self.particles is not None:
            figure = plot_particles(self.model, self.particles[[row]], self.latents[[row]])
            parts.insert(0, ipywidgets.Image(value=figure._repr_png_(), layout={"width": "600px"}))
        refill(self.selection, parts)

    def show_group(self, rows) -> None:
        """The mean conformation of the particles at these positions of the stack."""
        self._choose(rows)
        refill(self.selection, [ipywidgets.HTML(f"<b>Mean of {len(self.rows):,} particles</b><br>{self._words()}")])

    def recolor(self) -> None:
        """Colours of the atoms as chosen, and their scale."""
        values = self._values(self.molecule.coords)
        if values is None:
            self.molecule.color_chains()
            self.bar.value = ""
            return
        top = float(values.max())
        if self.paint.value == DISPLACEMENT:
            # What the loop will show fits the scale.
            ends = self.every.decode(self.motions.traverse(self.landscape.x.value, 2, PERCENTILES)).numpy()
            top = max(top, float(np.linalg.norm(ends - self.reference, axis=-1).max()))
        self.molecule.color_values(max(top, 0.1))
        self.molecule.move(self.molecule.coords, values)
        self.bar.value = color_bar(self.paint.value, max(top, 0.1))

    def save(self, kind: str) -> Path:
        """Write the motion along the component on the x axis: "pdb", "dcd", "cxc" (ChimeraX), "gif"; "png" is the view.

        Returns the path. The browser draws the view: it is written a moment later, and `said` says when.
        """
        component = self.landscape.x.value
        if kind not in FILES.values():
            raise ValueError(f"expected one of {', '.join(FILES.values())}, got {kind!r}")
        label = "".join(c for c in self.motions.label.replace(" ", "-") if c.isalnum() or c in "-_")
        path = Path(self.folder.value, f"pc{component + 1}-{label}.{kind}")
        if kind == "png":
            image = self.molecule.render_image(factor=2, trim=True)
            image.observe(guard(lambda: self._write(path, image.value), self.said), "value")
            return path
        self.said.value = "Writing …"
        if kind == "gif":
            save_movie(path, self.motions, component)
        else:
            write = save_chimerax if kind == "cxc" else save_ensemble
            write(path, self.dynamics, self.motions.traverse(component, N_SAVED))
        self.said.value = f"Wrote {escape(str(path))}"
        return path

    def save_selection(self) -> Path:
        """Write the selected particles into the folder, see `landscape.save_selection`; returns the path."""
        path = landscape.save_selection(self.folder.value, self.motions, self.latents, self.rows, self.particles)
        self.said.value = f"Wrote {len(self.rows):,} particles to {escape(str(path))}"
        return path

    def static(self) -> Figure:
        """The picture of what is chosen, for a page without widgets."""
        return _picture(self.motions, self.landscape.x.value)

    @torch.no_grad()
    def _words(self) -> str:
        """What the conformation on screen is, from the mean of all particles."""
        mean = torch.from_numpy(self.motions.mean).float()
        before, after = self.dynamics.decode(torch.stack([mean, self.place])).numpy()
        words = change_sentence(describe_change(self.dynamics.structure, before, after))
        return escape(f"From the mean of all particles: {words}")

    def _write(self, path: Path, content: bytes) -> None:
        with atomic_path(path) as part:
            part.write_bytes(content)
        self.said.value = f"Wrote {escape(str(path))}"

    def _choose(self, rows) -> None:
        """Select particles, mark their points, and show their mean."""
        rows, n = np.asarray(rows, dtype=int).ravel(), len(self.latents)
        if not len(rows):
            raise ValueError("expected at least one particle, got none; try drawing around some points")
        if rows.min() < 0 or rows.max() >= n:
            raise ValueError(f"expected particles from 0 to {n - 1}, got {rows.min()} to {rows.max()}")
        self.rows = rows
        self.landscape.highlight(rows)
        self.covariance = self._uncertain()
        self.move(self.latents[rows].mean(0))
        self.recolor()

    def _uncertain(self) -> torch.Tensor | None:
        """(p, p) covariance of the selected particle, exact with its image; of several, what their error bars say."""
        if self.found is None:
            return None
        if None not in (self.model, self.particles) and len(self.rows) == 1:
            return posterior_covariance(self.model, self.particles, self.found, self.rows)[0].float().cpu()
        return self.found.std[self.rows].square().mean(0).diag()

    def _values(self, coords: np.ndarray) -> np.ndarray | None:
        """(n_all,) Å by which atoms are coloured; None for chains."""
        if self.paint.value == DISPLACEMENT:
            return np.linalg.norm(coords - self.reference, axis=-1)
        if self.paint.value == UNCERTAINTY:
            return landscape.atom_uncertainty(self.every, self.place, self.covariance)
        return None

    def _step(self) -> None:
        """One frame of the loop, there and back along the component on the x axis."""
        slider = self.components.sliders[self.landscape.x.value]
        slider.value = slider.min + (1 - abs(2 * self.play.value / LOOP - 1)) * (slider.max - slider.min)

    def _repr_mimebundle_(self, **kwargs):
        # A page that shows no widgets, such as a preview of the notebook on the web, shows the picture.
        picture = base64.b64encode(self.static()._repr_png_()).decode()
        return super()._repr_mimebundle_(**kwargs) | {"image/png": picture}

    def __repr__(self) -> str:
        n, k = self.motions.scores.shape
        return f"Explorer({n:,} particles, {self.motions.label}, {k} components)"


def _picture(motions, component: int = 0) -> Figure:
    return plot_explorer(motions, component, motion_sentence(motions, component))


def explore(
    model: CryoChains | Dynamics,
    found: Refinement | torch.Tensor,
    particles: ParticleStack | None = None,
    *,
    columns: pd.DataFrame | None = None,
    n_components: int = 5,
) -> Explorer | Figure:
    """All particles as points, beside the molecule they show: slide along the components, click, draw around some.

    Parameters
    ----------
    model : CryoChains or Dynamics
        Of `found`; with a CryoChains and `particles`, a click shows the image and its reconstruction.
    found : Refinement or (N, p) tensor
        What `refine` returned, with error bars, or latents alone, such as an encoder's.
    particles : ParticleStack, optional
        The N particles, in the same order.
    columns : DataFrame, optional
        N rows of numbers in the particles' order (the index is not read) to colour the points by, beside their density,
        uncertainty, defocus and what their file says of them.
    n_components : int
        Principal components, a slider each.

    Returns
    -------
    Explorer
        In a notebook; elsewhere a warning, and the matplotlib figure of the same.

    Raises
    ------
    ValueError
        For latents of another model, or particles or columns that are not as many.
    ImportError
        When NGLView's Python and JavaScript are not of one version.

    Examples
    --------
    >>> import warnings
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     explore(dynamics, torch.randn(50, 12))
    <Figure size ...>
    """
    model, dynamics = (model, model.dynamics) if isinstance(model, CryoChains) else (None, model)
    found, latents = (found, found.latents) if isinstance(found, Refinement) else (None, torch.as_tensor(found))
    if found is not None and found.population.structure_hash != dynamics.structure.content_hash:
        raise ValueError(
            f"expected a refinement of {dynamics.structure!r}, got one of another structure; try the model it is of"
        )
    if latents.ndim != 2 or latents.shape[1] != dynamics.n_latents:
        raise ValueError(
            f"expected latents (N, {dynamics.n_latents}), got {tuple(latents.shape)}; try the model that they are of"
        )
    for name, table in (("particles", particles), ("rows of columns", columns)):
        if table is not None and len(table) != len(latents):
            raise ValueError(
                f"expected {len(latents):,} {name}, one a row of latents, got {len(table):,}; try the same selection"
            )
    if None not in (found, particles) and not np.array_equal(found.ids, particles.ids):
        raise ValueError("expected the particles that were refined, in their order, got others; try the same stack")
    table = landscape.particle_columns(dynamics, None if found is None else found.std, particles, columns)
    if figure := figure_instead(lambda: _picture(compute_pca(dynamics, latents, n_components=n_components))):
        return figure
    # Sliders decode on the CPU: one conformation is not worth a GPU's while.
    dynamics = Dynamics(dynamics.structure, dynamics.modes, dynamics.rotation, dynamics.translation)
    return Explorer(dynamics, latents.detach().cpu().float(), table, n_components, model, particles, found)
