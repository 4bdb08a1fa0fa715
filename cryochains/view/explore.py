"""`explore`: all particles as points, beside the molecule they show."""

from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.figure import Figure

from .._arguments import Count, checked
from ..analysis import compute_pca, motion_sentence, particle_columns
from ..inference import Result
from .notebook import figure_instead, require_lab_packages
from .plots import plot_explorer

if TYPE_CHECKING:
    from .explorer import Explorer

_EXPLORER_PACKAGES = ("ipywidgets", "nglview", "jscatter")


@checked
def explore(
    result: Result,
    *,
    columns: pd.DataFrame | None = None,
    n_components: Count = 5,
    frame: str | None = None,
) -> "Explorer | Figure":
    """All particles as points, beside the molecule they show.

    Slide along the components, click a point, draw around some. With a result that has its
    particles, a click shows the image and its reconstruction.

    Parameters
    ----------
    result : Result
    columns : DataFrame, optional
        N rows of numbers in the particles' order (the index is not read) to colour the points by,
        beside their density, uncertainty, defocus and what their file says of them.
    n_components : int
        Principal components, a slider each.
    frame : str, optional
        "molecule", "poses" or a chain's id, in which conformations are shown, as of
        ``Result.in_frame``. By default that of the molecule, where the model has it. Images are the
        same in all.

    Returns
    -------
    Explorer
        In a notebook; elsewhere a warning, and the matplotlib figure of the same.

    Raises
    ------
    ValueError
        For columns that are not numbers, or not one row a particle, and for an unknown frame.
    ImportError
        Without the extras ``cryochains[lab]``, or when NGLView's Python and JavaScript are not of
        one version.

    Examples
    --------
    >>> import warnings
    >>> import torch
    >>> from cryochains import Model, load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> with warnings.catch_warnings(action="ignore"):  # there is no notebook here
    ...     explore(Result(model, torch.randn(50, 12)))
    <Figure size ...>
    """
    require_lab_packages(*_EXPLORER_PACKAGES)
    result = result.in_frame(frame)
    table = particle_columns(result, columns)
    figure = figure_instead(lambda: _explorer_figure(result, n_components))
    if figure is not None:
        return figure
    from .explorer import Explorer

    return Explorer(result, table, n_components)


def _explorer_figure(result: Result, n_components: int) -> Figure:
    motions = compute_pca(result, n_components=n_components, frame=result.frame)
    return plot_explorer(motions, 0, motion_sentence(motions))
