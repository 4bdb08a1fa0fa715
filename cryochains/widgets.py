"""Molecules in a notebook, the only room of NGLView: thin over plain functions.

Only coordinates, and colours when they are asked for, travel to the browser when something moves.
"""

import json
import warnings
from collections.abc import Callable
from html import escape
from io import StringIO
from pathlib import Path
from string import ascii_letters, digits

import numpy as np
import prody
import torch
from IPython import get_ipython
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy.spatial.transform import Rotation

from .dynamics import Dynamics
from .modes import Modes, find_chain
from .plots import COLORS, facing, plot_modes, plot_structure
from .structure import Structure

try:
    import ipywidgets
    import nglview
    from jupyter_core.paths import jupyter_path
    from nglview._frontend import __frontend_version__ as REQUIRED_FRONT_END
except ImportError as error:
    raise ImportError(
        f"expected ipywidgets and nglview, which show molecules in a notebook, got: {error}; "
        "try pip install 'cryochains[lab]'"
    ) from error

# Values on atoms, such as displacements: dark is little.
SCALE = [to_hex(colormaps["viridis"](share)) for share in np.linspace(0, 1, 9)]
# Places of a swing there and back.
SWING = 24


def pdb_text(structure: Structure, coords: np.ndarray) -> tuple[str, list[str]]:
    """PDB text of every atom at `coords` (n_all, 3), each body as a chain of its own, and the letter of each."""
    letters, body_of = list(structure.chain_ids), structure.atom_chain
    atoms = structure.atoms.copy()
    if structure.n_chains == 1:
        # An assembly that moves as one body still has its chains.
        letters, body_of = np.unique(atoms.getChids(), return_inverse=True)
    if any(len(name) != 1 for name in letters):
        letters = (ascii_letters + digits)[: len(letters)]
    atoms.setCoords(coords)
    atoms.setChids(np.array(list(letters))[body_of])
    prody.writePDBStream(stream := StringIO(), atoms)
    return stream.getvalue(), list(letters)


def color_bar(title: str, top: float) -> str:
    """HTML of a colour bar from 0 to `top`."""
    colors = f"background: linear-gradient(to right, {', '.join(SCALE)})"
    bar = f"<div style='flex: 1; height: 12px; margin: 0 6px; {colors}'></div>"
    return f"<div style='display: flex; align-items: center'>{escape(title)}&nbsp; 0{bar}{top:.1f}</div>"


def guard(act: Callable, said: ipywidgets.HTML) -> Callable:
    """An observer that does `act`, and writes what went wrong into `said`: widgets swallow errors."""

    def handle(*_):
        try:
            act()
        except Exception as error:
            said.value = f"<span style='color: #D55E00'>{escape(f'{type(error).__name__}: {error}')}</span>"

    return handle


def figure_instead(draw: Callable[[], Figure]) -> Figure | None:
    """Where this Python is no notebook's kernel, a warning and the figure that `draw` gives; else None."""
    if hasattr(get_ipython(), "kernel"):
        return None
    warnings.warn(
        "expected a notebook, which shows widgets, found none: this is the static figure, which .savefig writes; "
        "try make lab",
        stacklevel=3,
    )
    return draw()


def check_front_end() -> None:
    """Say what to install when NGLView's JavaScript is not the one its Python asks for, instead of a blank cell."""
    packages = [Path(folder, "nglview-js-widgets", "package.json") for folder in jupyter_path("labextensions")]
    package = next(filter(Path.is_file, packages), None)  # None where JupyterLab runs elsewhere: nothing is known
    found = REQUIRED_FRONT_END if package is None else json.loads(package.read_text())["version"]
    if found != REQUIRED_FRONT_END:
        raise ImportError(
            f"expected NGLView's front end {REQUIRED_FRONT_END}, as its Python asks, got {found} in {package.parent}, "
            "which shows a blank cell; try pip install nglview==4.0, restart JupyterLab and reload the page"
        )


class Molecule(nglview.NGLWidget):
    """A structure in NGLView whose atoms can be moved and coloured. ``coords`` (n_all, 3) is what was last sent.

    `moved` (k, 3) are displacements that should lie along the screen; default the structure's own directions.
    """

    def __init__(self, structure: Structure, coords: np.ndarray, moved: np.ndarray | None = None):
        check_front_end()
        text, self.letters = pdb_text(structure, coords)
        self.structure = structure
        self.coords, self.values, self.top, self.centered = coords, None, None, False
        super().__init__(nglview.TextStructure(text), default_representation=False)
        self._draw_chains()
        self.center()
        turn = facing(coords - coords.mean(0) if moved is None else moved)
        self.control.rotate(Rotation.from_matrix(turn).as_quat().tolist())
        # Without a size of its own the view is nothing high.
        self.layout.width, self.layout.height = "100%", "420px"
        self.on_msg(lambda _, message, __: message.get("type") == "request_repr_dict" and self._drawn())

    def move(self, coords: np.ndarray, values: np.ndarray | None = None) -> None:
        """Send coordinates (n_all, 3) in Å and, where atoms are coloured by values, the `values` (n_all,)."""
        self.coords, self.values = coords, values
        self._tell_browser()

    def color_chains(self) -> None:
        """One colour a chain, as it is at first."""
        if self.top is None:
            return
        self.values = self.top = None
        self.clear_representations()
        self._draw_chains()

    def _draw_chains(self) -> None:
        for body, letter in enumerate(self.letters):
            self.add_representation("cartoon", f":{letter}", color=COLORS[body % len(COLORS)])
        self.add_representation("licorice", "not polymer")

    def color_values(self, top: float) -> None:
        """Colours from 0 to `top`, of the values that `move` sends from now on."""
        if self.top is None:
            self.clear_representations()
            for kind, selection in (("cartoon", "polymer"), ("licorice", "not polymer")):
                self.add_representation(kind, selection, color="bfactor", colorScale=SCALE, colorDomain=[0, top])
        self.top = top

    def show_ghost(self, shown: bool) -> None:
        """The reference, pale, behind the molecule."""
        if shown and len(self._ngl_component_ids) == 1:
            text, _ = pdb_text(self.structure, self.structure.atoms.getCoords())
            self.add_component(nglview.TextStructure(text), default_representation=False)
            self.add_representation("cartoon", "polymer", component=1, color="#999999", opacity=0.3)
        elif len(self._ngl_component_ids) > 1:
            self._remote_call("setVisibility", target="compList", args=[shown], kwargs={"component_index": 1})

    def _drawn(self) -> None:
        # A view that has just drawn, or one opened anew, shows the text's conformation, and from afar where it had no
        # size yet: bring it near, once, and send the last conformation.
        if not self.centered:
            self.center()
            self.centered = True
        self._tell_browser()

    def _tell_browser(self) -> None:
        self.set_coordinates({0: self.coords})
        if self.values is not None:
            # NGL has no message for values on atoms; its own B-factors are where its colours look.
            values = json.dumps(np.round(self.values.astype(np.float64), 2).tolist())
            # A change of the scale is answered by a request, which is answered by this: only what differs is changed.
            code = (
                f"var c = this.stage.compList[0]; if (c) {{ c.structure.atomStore.bfactor.set({values}); "
                f"c.reprList.filter(r => r.getParameters().colorDomain[1] !== {self.top:.2f})"
                f".forEach(r => r.setParameters({{colorDomain: [0, {self.top:.2f}]}})); "
                "c.updateRepresentations({color: true}) }"
            )
            # Not kept: what a view opened anew needs is sent when it asks.
            self._remote_call("executeCode", target="Widget", args=[code], fire_once=True)

    def __repr__(self) -> str:
        return f"Molecule({len(self.coords):,} atoms, chains {', '.join(self.letters)})"


def view_structure(structure: Structure) -> Molecule | Figure:
    """The structure in NGLView, one colour a chain; outside a notebook a warning and `plots.plot_structure`.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     view_structure(load_structure("glua3-closed"))
    <Figure size ...>
    """
    instead = figure_instead(lambda: plot_structure(structure))
    return instead or Molecule(structure, structure.atoms.getCoords())


class ModeViewer(ipywidgets.VBox):
    """One chain's modes as arrows, and swinging; made by `view_modes`."""

    def __init__(self, structure: Structure, modes: Modes, chain: int, mode: int, amplitude: float):
        self.chain, self.amplitude = chain, amplitude
        self.dynamics = dynamics = Dynamics(structure, modes, rotation=False, translation=False)
        self.every = dynamics.with_structure(dynamics.structure.all_atoms())
        resting = self.every.reference.numpy()
        self.molecule = Molecule(structure, resting, self.swing(mode)[SWING // 4] - resting)
        self.mode = ipywidgets.Dropdown(
            options=[(f"mode {k + 1}", k) for k in range(modes.n_modes[chain])], value=mode,
            description=f"chain {structure.chain_ids[chain]}",
        )  # fmt: skip
        self.play = ipywidgets.Play(min=0, max=SWING - 1, interval=80, repeat=True)
        self.status = ipywidgets.HTML()
        self.mode.observe(guard(self.draw, self.status), "value")
        self.play.observe(guard(lambda: self.molecule.move(self.frames[self.play.value]), self.status), "value")
        super().__init__([self.molecule, ipywidgets.HBox([self.mode, self.play, self.status])])
        self.arrows = None
        self.draw()

    @torch.no_grad()
    def swing(self, mode: int) -> np.ndarray:
        """(SWING, n_all, 3) coordinates there and back, by `amplitude` Å (RMS of the chain)."""
        phase = torch.sin(torch.arange(SWING) * 2 * torch.pi / SWING)
        latents = torch.zeros(SWING, self.dynamics.n_latents)
        latents[:, self.dynamics.chains[self.chain].mode.start + mode] = self.amplitude * phase
        return self.every.decode(latents).numpy()

    def draw(self) -> None:
        """Arrows and frames of the mode that is chosen."""
        number, structure = self.mode.value, self.dynamics.structure
        self.frames = self.swing(number)
        start = structure.node_coords[structure.node_chain == self.chain]
        vector = self.dynamics.modes.vectors[self.chain][number]
        color = [int(COLORS[self.chain % len(COLORS)][i : i + 2], 16) / 510 for i in (1, 3, 5)]
        # Three times as long as the swing, or nobody would see them.
        ends = start + 3 * self.amplitude * np.sqrt(len(start)) * vector
        shapes = [("arrow", a.tolist(), b.tolist(), color, 0.35) for a, b in zip(start, ends, strict=True)]
        if self.arrows is not None:
            self.molecule.remove_component(self.arrows)
        self.arrows = self.molecule._add_shape(shapes, name="mode")
        softness = self.dynamics.modes.eigenvalues[self.chain]
        self.status.value = f"{np.sqrt(softness[number] / softness[0]):.1f} × the frequency of mode 1"

    def __repr__(self) -> str:
        chain = self.dynamics.structure.chain_ids[self.chain]
        return f"ModeViewer(chain {chain}: {len(self.mode.options)} modes, ±{self.amplitude:g} Å)"


def view_modes(
    structure: Structure, modes: Modes, chain: str | None = None, mode: int = 0, amplitude: float = 2.0
) -> ModeViewer | Figure:
    """A chain's modes as arrows on the structure, and swinging by ± `amplitude` Å (RMS of the chain).

    By default the softest of the first chain. Outside a notebook a warning and `plots.plot_modes`.

    Raises
    ------
    ValueError
        For modes of another structure, an unknown chain, or a mode that does not exist.

    Examples
    --------
    >>> from cryochains import compute_modes, load_structure
    >>> closed = load_structure("glua3-closed")
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     view_modes(closed, compute_modes(closed, 5), chain="B")
    <Figure size ...>
    """
    number = find_chain(structure, modes, chain, mode)
    instead = figure_instead(lambda: plot_modes(structure, modes, structure.chain_ids[number], mode))
    return instead or ModeViewer(structure, modes, number, mode, amplitude)
