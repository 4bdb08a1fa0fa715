"""Widgets for JupyterLab, the only room of NGLView and ipywidgets: thin over plain functions.

Symbols: X → `coords`, along a component; only they travel to the browser when the slider moves.
"""

import json
from io import StringIO
from pathlib import Path
from string import ascii_letters, digits

import numpy as np
import prody
import torch
from scipy.spatial.transform import Rotation

from .latent import PrincipalMotions
from .metrics import rmsd
from .plots import COLORS
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


@torch.no_grad()
def conformations(
    motions: PrincipalMotions, component: int = 0, percentiles: tuple[float, float] = (5, 95), n: int = 21
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores (n,) in Å evenly along a component, all atoms (n, n_all, 3) there, and RMSD (n,) to the reference in Å."""
    if n < 2:
        raise ValueError(f"expected two conformations or more, got n={n}; try n=21")
    structure = motions.dynamics.structure
    path = motions.traverse(component, n, percentiles)
    coords = motions.dynamics.with_structure(structure.all_atoms()).decode(path)
    reference = torch.from_numpy(structure.coords).float()
    to_reference = rmsd(coords[:, structure.rows], reference.expand(n, -1, -1))
    return motions.transform(path)[:, component], coords.numpy(), to_reference.numpy()


def pdb_text(structure: Structure, coords: np.ndarray) -> tuple[str, list[str]]:
    """PDB text of every atom at `coords` (n_all, 3), each body as a chain of its own, and the letter of each."""
    letters = list(structure.chain_ids)
    if any(len(name) != 1 for name in letters):
        letters = [(ascii_letters + digits)[body % 62] for body in range(structure.n_chains)]
    atoms = structure.atoms.copy()
    atoms.setCoords(coords)
    atoms.setChids(np.array(letters)[structure.atom_chain])
    prody.writePDBStream(stream := StringIO(), atoms)
    return stream.getvalue(), letters


def facing(moved: np.ndarray) -> list[float]:
    """Quaternion (x, y, z, w) that lays the main direction of displacements (n, 3) along the screen."""
    directions = np.linalg.svd(moved, full_matrices=False)[2]
    return Rotation.from_matrix(directions * np.linalg.det(directions)).as_quat().tolist()


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


class MotionSlider(ipywidgets.VBox):
    """NGLView over a slider along one component; made by `slide`. ``view``, ``slider`` and ``status`` are its parts."""

    def __init__(self, motions: PrincipalMotions, component: int, percentiles: tuple[float, float], n: int):
        self.scores, self.coords, self.rmsd = conformations(motions, component, percentiles, n)
        structure = motions.dynamics.structure
        self.title, self.reference = f"PC{component + 1} of {motions.label}", structure.name
        spread = float(motions.scores[:, component].std()) or 1.0
        # Zero is added so that nothing reads -0.0.
        values = [(round(score, 1) + 0, round(score / spread, 1) + 0) for score in self.scores]
        places = [(f"{score:+.1f} Å ({deviations:+.1f} SD)", i) for i, (score, deviations) in enumerate(values)]
        start = int(np.abs(self.scores).argmin())

        text, letters = pdb_text(structure, self.coords[start])
        self.view = nglview.NGLWidget(nglview.TextStructure(text), default_representation=False)
        for body, letter in enumerate(letters):
            self.view.add_representation("cartoon", f":{letter}", color=COLORS[body % len(COLORS)])
        self.view.add_representation("licorice", "not polymer")
        self.view.center()
        self.view.control.rotate(facing(self.coords[-1] - self.coords[0]))
        # Without a size of its own the view is nothing high.
        self.view.layout.width, self.view.layout.height = "100%", "420px"
        # A view that has just drawn, or one opened anew, shows the text's conformation: send the slider's.
        self.view.on_msg(lambda _, message, __: message.get("type") == "request_repr_dict" and self.show())

        self.slider = ipywidgets.SelectionSlider(
            options=places, value=start, description=f"PC{component + 1}", readout=False, layout={"width": "100%"}
        )
        self.slider.observe(lambda _: self.show(), "value")
        self.status = ipywidgets.Label()
        super().__init__([self.view, self.slider, self.status], layout={"width": "720px"})
        self.show()

    def show(self) -> None:
        """Move the atoms to the slider's conformation; an error is written below the slider, where it is seen."""
        try:
            number = self.slider.value
            self.view.set_coordinates({0: self.coords[number]})
            distance = f"RMSD to {self.reference} {self.rmsd[number]:.2f} Å"
            self.status.value = f"{self.title} at {self.slider.label}: {distance}"
        except Exception as error:
            self.status.value = f"This conformation could not be shown: {type(error).__name__}: {error}"

    def __repr__(self) -> str:
        (n, n_atoms), ends = self.coords.shape[:2], f"{self.scores[0]:+.1f} to {self.scores[-1]:+.1f} Å"
        return f"MotionSlider({self.title}: {n} conformations of {n_atoms:,} atoms, {ends})"


def slide(
    motions: PrincipalMotions, component: int = 0, percentiles: tuple[float, float] = (5, 95), n: int = 21
) -> MotionSlider:
    """A molecule that moves with a slider of `n` places along a component, between two percentiles of the particles.

    Component 0 is PC1; every chain has its colour.

    Raises
    ------
    ValueError
        For a component that does not exist, or fewer than two places.
    ImportError
        When NGLView's Python and JavaScript are not of one version.

    Examples
    --------
    >>> from cryochains import Dynamics, compute_pca, load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> shifts = torch.eye(12)[11] * torch.arange(5)[:, None]
    >>> slide(compute_pca(dynamics, shifts, chain="B", kind="rigid"), n=5)
    MotionSlider(PC1 of chain B, rigid: 5 conformations of 5,995 atoms, -1.8 to +1.8 Å)
    """
    check_front_end()
    return MotionSlider(motions, component, percentiles, n)
