"""Molecules in a notebook: the one module that knows NGLView. Needs the extras ``cryochains[lab]``.

Only coordinates, and colours when they are asked for, travel to the browser when something moves.
"""

import json
from collections.abc import Callable
from html import escape
from io import StringIO
from itertools import islice, product
from pathlib import Path
from string import ascii_letters, digits
from tempfile import TemporaryDirectory

import ipywidgets
import nglview
import numpy as np
import prody
import torch
from jupyter_core.paths import jupyter_path
from matplotlib import colormaps
from matplotlib.colors import to_hex
from nglview._frontend import __frontend_version__ as REQUIRED_FRONT_END
from scipy.spatial.transform import Rotation

from ..model import Dynamics
from ..molecule import Modes, Structure, fits_pdb_text, write_structure
from .drawing import chain_color, facing

# Values on atoms, such as displacements: dark is little.
_VALUE_COLORS = [to_hex(colormaps["viridis"](share)) for share in np.linspace(0, 1, 9)]
# Conformations of a mode's motion there and back.
_N_MODE_FRAMES = 24
# Arrows of a mode are so many times its amplitude, or nobody would see them.
_ARROW_LENGTH = 3


def molecule_text(structure: Structure, coords: np.ndarray) -> tuple[str, str, list[str]]:
    """A molecule as text for NGL, each body as a chain of its own.

    PDB text where that can hold it, else mmCIF, whose chains may have names of several letters.

    Parameters
    ----------
    structure : Structure
    coords : (n_all, 3) array
        Å, of every atom.

    Returns
    -------
    text : str
    extension : {"pdb", "cif"}
    chain_names : list of str
        What NGL knows each body by.
    """
    names, body_of_atom = list(structure.chain_ids), structure.atom_chain
    atoms = structure.atoms.copy()
    if structure.n_chains == 1:
        # An assembly that moves as one body still has its chains.
        present, body_of_atom = np.unique(atoms.getChids(), return_inverse=True)
        names = present.tolist()
    if any(len(name) != 1 for name in names):
        names = _short_names(len(names))
    atoms.setCoords(coords)
    atoms.setChids(np.array(names)[body_of_atom])
    extension = "pdb" if fits_pdb_text(atoms) else "cif"
    if extension == "pdb":
        stream = StringIO()
        prody.writePDBStream(stream, atoms)
        return stream.getvalue(), extension, names
    with TemporaryDirectory() as folder:
        path = Path(folder, "molecule.cif")
        write_structure(atoms, structure.name, path)
        return path.read_text() + _residue_types(atoms), extension, names


def _residue_types(atoms: prody.AtomGroup) -> str:
    """Table of residue names, without which NGL reads no mmCIF; it finds their types by itself."""
    names = sorted(set(atoms.getResnames().tolist()))
    lines = ["loop_", "_chem_comp.id", "_chem_comp.type", *(f'"{name}" ?' for name in names)]
    return "\n".join(["", *lines, "#", ""])


def _short_names(n: int) -> list[str]:
    """n names of letters and digits, as short as can be: NGL knows no chain by more than four."""
    letters = ascii_letters + digits
    length = 1
    while len(letters) ** length < n:
        length += 1
    return ["".join(parts) for parts in islice(product(letters, repeat=length), n)]


def color_scale_html(title: str, top: float) -> str:
    """HTML of a colour scale from 0 to `top`."""
    colors = f"background: linear-gradient(to right, {', '.join(_VALUE_COLORS)})"
    bar = f"<div style='flex: 1; height: 12px; margin: 0 6px; {colors}'></div>"
    parts = f"{escape(title)}&nbsp; 0{bar}{top:.1f}"
    return f"<div style='display: flex; align-items: center'>{parts}</div>"


def guard(act: Callable[[], object], status: ipywidgets.HTML) -> Callable[..., None]:
    """An observer that does `act`, and writes what went wrong to `status`: widgets hide errors."""

    def handle(*_):
        try:
            act()
        except Exception as error:
            message = escape(f"{type(error).__name__}: {error}")
            status.value = f"<span style='color: #D55E00'>{message}</span>"

    return handle


def check_front_end() -> None:
    """Raise ImportError when NGLView's JavaScript is not the one its Python asks for.

    A notebook would show a blank cell.
    """
    folders = jupyter_path("labextensions")
    packages = [Path(folder, "nglview-js-widgets", "package.json") for folder in folders]
    package = next(filter(Path.is_file, packages), None)
    if package is None:
        return  # JupyterLab runs elsewhere: nothing is known
    version = json.loads(package.read_text())["version"]
    if version != REQUIRED_FRONT_END:
        raise ImportError(
            f"expected NGLView's front end {REQUIRED_FRONT_END}, as its Python asks, got {version} "
            f"in {package.parent}, which shows a blank cell; try pip install nglview==4.0, restart "
            "JupyterLab and reload the page"
        )


class Molecule(nglview.NGLWidget):
    """A structure in NGLView whose atoms can be moved and coloured.

    Parameters
    ----------
    structure : Structure
    coords : (n_all, 3) array
        Å, of every atom; the attribute ``coords`` is what was last sent.
    moved : (k, 3) array, optional
        Displacements that should lie along the screen; by default the structure's own directions.
    """

    def __init__(
        self, structure: Structure, coords: np.ndarray, moved: np.ndarray | None = None
    ) -> None:
        check_front_end()
        text, extension, self.chain_names = molecule_text(structure, coords)
        self.structure = structure
        self.coords = coords
        self.values: np.ndarray | None = None
        self.top: float | None = None
        self.centered = False
        super().__init__(nglview.TextStructure(text, ext=extension), default_representation=False)
        self._draw_chains()
        self.center()
        turn = facing(coords - coords.mean(0) if moved is None else moved)
        self.control.rotate(Rotation.from_matrix(turn).as_quat().tolist())
        # Without a size of its own the view is nothing high.
        self.layout.width = "100%"
        self.layout.height = "420px"
        self.on_msg(self._answer)

    def move(self, coords: np.ndarray, values: np.ndarray | None = None) -> None:
        """Send coordinates and, where atoms are coloured by values, these.

        Parameters
        ----------
        coords : (n_all, 3) array
            Å.
        values : (n_all,) array, optional
        """
        self.coords = coords
        self.values = values
        self._send_conformation()

    def color_chains(self) -> None:
        """One colour a chain, as it is at first."""
        if self.top is None:
            return
        self.values = None
        self.top = None
        self.clear_representations()
        self._draw_chains()

    def _draw_chains(self) -> None:
        for body, name in enumerate(self.chain_names):
            self.add_representation("cartoon", f":{name}", color=chain_color(body))
        self.add_representation("licorice", "not polymer")

    def color_values(self, top: float) -> None:
        """Colours from 0 to `top`, of the values that `move` sends from now on."""
        if self.top is None:
            self.clear_representations()
            for kind, selection in (("cartoon", "polymer"), ("licorice", "not polymer")):
                self.add_representation(
                    kind, selection, color="bfactor", colorScale=_VALUE_COLORS, colorDomain=[0, top]
                )
        self.top = top

    def show_reference(self, shown: bool) -> None:
        """The reference, pale, behind the molecule."""
        if shown and len(self._ngl_component_ids) == 1:
            coords = self.structure.atoms.getCoords()
            text, extension, _ = molecule_text(self.structure, coords)
            reference = nglview.TextStructure(text, ext=extension)
            self.add_component(reference, default_representation=False)
            self.add_representation("cartoon", "polymer", component=1, color="#999999", opacity=0.3)
        elif len(self._ngl_component_ids) > 1:
            self._remote_call(
                "setVisibility", target="compList", args=[shown], kwargs={"component_index": 1}
            )

    def _answer(self, _widget, message: dict, _buffers) -> None:
        if message.get("type") != "request_repr_dict":
            return
        # A view that has just drawn, or one opened anew, shows the text's conformation, and from
        # afar where it had no size yet: bring it near, once, and send the last conformation.
        if not self.centered:
            self.center()
            self.centered = True
        self._send_conformation()

    def _send_conformation(self) -> None:
        self.set_coordinates({0: self.coords})
        if self.values is None:
            return
        # NGL has no message for values on atoms; its colours look at its own B-factors. A change of
        # the scale is answered by a request, which is answered by this: only what differs is
        # changed.
        values = json.dumps(np.round(self.values.astype(np.float64), 2).tolist())
        domain = f"[0, {self.top:.2f}]"
        code = (
            "var c = this.stage.compList[0]; if (c) { "
            f"c.structure.atomStore.bfactor.set({values}); "
            f"c.reprList.filter(r => r.getParameters().colorDomain[1] !== {self.top:.2f})"
            f".forEach(r => r.setParameters({{colorDomain: {domain}}})); "
            "c.updateRepresentations({color: true}) }"
        )
        # Not kept: what a view opened anew needs is sent when it asks.
        self._remote_call("executeCode", target="Widget", args=[code], fire_once=True)

    def __repr__(self) -> str:
        return f"Molecule({len(self.coords):,} atoms, chains {', '.join(self.chain_names)})"


class ModeViewer(ipywidgets.VBox):
    """One chain's modes as arrows, and as motion there and back; made by `view_modes`."""

    def __init__(
        self, structure: Structure, modes: Modes, chain: int, mode: int, amplitude: float
    ) -> None:
        self.chain = chain
        self.amplitude = amplitude
        self.modes = modes
        self.dynamics = Dynamics(structure, modes, rotation=False, translation=False)
        self.all_atoms = self.dynamics.all_atoms()
        resting = self.all_atoms.reference.numpy()
        farthest = self.mode_frames(mode)[_N_MODE_FRAMES // 4]
        self.molecule = Molecule(structure, resting, farthest - resting)
        self.mode = ipywidgets.Dropdown(
            options=[(f"mode {k + 1}", k) for k in range(modes.n_modes[chain])],
            value=mode,
            description=f"chain {structure.chain_ids[chain]}",
        )
        self.play = ipywidgets.Play(min=0, max=_N_MODE_FRAMES - 1, interval=80, repeat=True)
        self.status = ipywidgets.HTML()
        self.mode.observe(guard(self.draw, self.status), "value")
        self.play.observe(guard(self._show_frame, self.status), "value")
        super().__init__([self.molecule, ipywidgets.HBox([self.mode, self.play, self.status])])
        self.arrows = None
        self.draw()

    @torch.no_grad()
    def mode_frames(self, mode: int) -> np.ndarray:
        """(_N_MODE_FRAMES, n_all, 3) Å, there and back by `amplitude` Å (RMS of the chain)."""
        phase = torch.sin(torch.arange(_N_MODE_FRAMES) * 2 * torch.pi / _N_MODE_FRAMES)
        latents = torch.zeros(_N_MODE_FRAMES, self.dynamics.n_latents)
        latents[:, self.dynamics.chains[self.chain].mode.start + mode] = self.amplitude * phase
        return self.all_atoms.decode(latents).numpy()

    def draw(self) -> None:
        """Arrows and frames of the mode that is chosen."""
        mode = self.mode.value
        structure = self.dynamics.structure
        self.frames = self.mode_frames(mode)
        starts = structure.node_coords[structure.node_chain == self.chain]
        length = _ARROW_LENGTH * self.amplitude * np.sqrt(len(starts))
        ends = starts + length * self.modes.vectors[self.chain][mode]
        # Half as bright as the chain, from 0 to 1.
        hex_color = chain_color(self.chain)
        color = [int(hex_color[i : i + 2], 16) / 510 for i in (1, 3, 5)]
        shapes = [
            ("arrow", start.tolist(), end.tolist(), color, 0.35)
            for start, end in zip(starts, ends, strict=True)
        ]
        if self.arrows is not None:
            self.molecule.remove_component(self.arrows)
        self.arrows = self.molecule._add_shape(shapes, name="mode")
        eigenvalues = self.modes.eigenvalues[self.chain]
        times = np.sqrt(eigenvalues[mode] / eigenvalues[0])
        self.status.value = f"{times:.1f} × the frequency of mode 1"

    def _show_frame(self) -> None:
        self.molecule.move(self.frames[self.play.value])

    def __repr__(self) -> str:
        chain = self.dynamics.structure.chain_ids[self.chain]
        return f"ModeViewer(chain {chain}: {len(self.mode.options)} modes, ±{self.amplitude:g} Å)"
