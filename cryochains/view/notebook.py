"""Whether this Python shows widgets, and what to say or draw where it does not."""

import sys
import warnings
from collections.abc import Callable
from importlib import import_module

from matplotlib.figure import Figure


def require_lab_packages(*names: str) -> None:
    """Raise ImportError, with what to install, when one of the extras' packages is not there."""
    for name in names:
        try:
            import_module(name)
        except ImportError as error:
            raise ImportError(
                f"expected {', '.join(names)}, which show molecules in a notebook, got: {error}; "
                "try pip install 'cryochains[lab]'"
            ) from error


def in_notebook() -> bool:
    """Whether this Python is the kernel of a notebook."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def figure_instead(draw: Callable[[], Figure]) -> Figure | None:
    """Outside a notebook a warning and the figure that `draw` returns; in a notebook None."""
    if in_notebook():
        return None
    warnings.warn(
        "expected a notebook, which shows widgets, found none: this is the static figure, which "
        ".savefig writes; try make lab",
        stacklevel=4,
    )
    return draw()
