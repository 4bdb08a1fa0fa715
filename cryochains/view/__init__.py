"""Pictures: matplotlib figures, movies, molecules in NGLView, and the explorer.

Modules, each importing only from those before it: `drawing` (backbones and empty figures), `plots`
(one figure a function), `movies` (GIF, MP4), `saving` (a motion as a file, by its suffix),
`notebook` (whether this Python shows widgets, and has the packages for them), `molecules`
(`view_structure`, `view_modes`), `explore`. The widgets themselves, `widgets` (NGLView), `panels`
and `explorer`, need the extras ``cryochains[lab]`` and are imported when they are shown.
"""

from . import plots
from .explore import explore
from .molecules import view_modes, view_structure
from .saving import save_motion

__all__ = ["explore", "plots", "save_motion", "view_modes", "view_structure"]
