"""Functions that numba compiles: loops over pixels of atoms, and over entries of small matrices.

Compiled when first used; what was compiled is kept on disk where that can be written. Numba takes
60 MB and a tenth of a second: modules with such functions are imported where they are used.
"""

from collections.abc import Callable

import numba

# Sums in any order, and products that are added in one step; NaN and Inf stay what they are.
_FAST_MATH = {"reassoc", "contract"}


def compiled(function: Callable) -> Callable:
    """`function` compiled when first called; by every process where no folder can be written."""
    try:
        return numba.njit(nogil=True, fastmath=_FAST_MATH, cache=True)(function)
    except RuntimeError:
        return numba.njit(nogil=True, fastmath=_FAST_MATH)(function)
