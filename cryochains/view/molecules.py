"""`view_structure` and `view_modes`: one molecule in NGLView, in a notebook."""

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from .._arguments import Angstroms, Ordinal, checked
from ..molecule import Modes, Structure, find_chain
from .notebook import figure_instead, require_lab_packages
from .plots import plot_modes, plot_structure

if TYPE_CHECKING:
    from .widgets import ModeViewer, Molecule

_MOLECULE_PACKAGES = ("ipywidgets", "nglview")


@checked
def view_structure(structure: Structure) -> "Molecule | Figure":
    """The structure in NGLView, one colour a chain.

    Returns
    -------
    Molecule
        In a notebook; elsewhere a warning, and the figure of `plots.plot_structure`.

    Raises
    ------
    ImportError
        Without the extras ``cryochains[lab]``, or when NGLView's Python and JavaScript are not of
        one version.

    Examples
    --------
    >>> import warnings
    >>> from cryochains import load_structure
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     view_structure(load_structure("glua3-closed"))
    <Figure size ...>
    """
    require_lab_packages(*_MOLECULE_PACKAGES)
    figure = figure_instead(lambda: plot_structure(structure))
    if figure is not None:
        return figure
    from .widgets import Molecule

    return Molecule(structure, structure.atoms.getCoords())


@checked
def view_modes(
    structure: Structure,
    modes: Modes,
    chain: str | None = None,
    mode: Ordinal = 0,
    amplitude: Angstroms = 2.0,
) -> "ModeViewer | Figure":
    """A chain's modes as arrows on the structure, and moving there and back.

    Parameters
    ----------
    structure : Structure
    modes : Modes
        Of the structure.
    chain : str, optional
        A chain's id; by default the first chain.
    mode : int
        0 is the softest; others can be chosen in the widget.
    amplitude : float
        Å, RMS of the chain at the ends of the motion.

    Returns
    -------
    ModeViewer
        In a notebook; elsewhere a warning, and the figure of `plots.plot_modes`.

    Raises
    ------
    ValueError
        For modes of another structure, an unknown chain, or a mode that does not exist.
    ImportError
        As of `view_structure`.

    Examples
    --------
    >>> import warnings
    >>> from cryochains import compute_modes, load_structure
    >>> closed = load_structure("glua3-closed")
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     view_modes(closed, compute_modes(closed, 5), chain="B")
    <Figure size ...>
    """
    require_lab_packages(*_MOLECULE_PACKAGES)
    number = find_chain(structure, modes, chain, mode)
    chain_id = structure.chain_ids[number]
    figure = figure_instead(lambda: plot_modes(structure, modes, chain_id, mode))
    if figure is not None:
        return figure
    from .widgets import ModeViewer

    return ModeViewer(structure, modes, number, mode, amplitude)
