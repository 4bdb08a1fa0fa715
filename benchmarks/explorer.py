"""The explorer's own time and memory: from a slider to coordinates on the wire, and opening it on a million particles.

``python benchmarks/explorer.py`` measures the Python side; what the browser then draws is its graphics card's business.
"""

import resource
import time
import types

import numpy as np
import torch

import cryochains as cc
from cryochains import widgets


def ten_thousand_atoms() -> cc.Structure:
    """The GluA3 dimer and most of another one beside it: four chains."""
    atoms = cc.load_structure("glua3-closed").atoms
    other = atoms.copy()
    other.setChids(np.where(other.getChids() == "A", "C", "D"))
    other.setCoords(other.getCoords() + [100.0, 0.0, 0.0])
    both = (atoms + other).select("not chain D or resnum 1 to 140").toAtomGroup()
    both.setTitle("two dimers")
    return cc.load_structure(both)


def memory() -> float:
    """Peak so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    # It opens in notebooks only: this is as good as one.
    widgets.get_ipython = lambda: types.SimpleNamespace(kernel=None)
    structure = ten_thousand_atoms()
    dynamics = cc.Dynamics(structure, cc.compute_modes(structure, 20))
    p = dynamics.n_latents
    shown = cc.explore(dynamics, torch.randn(1000, p, generator=torch.Generator().manual_seed(0)))
    sent, seconds = [], []
    shown.molecule.send = lambda content, buffers=(): sent.append(sum(len(part) for part in buffers))
    for value in np.linspace(-1, 1, 41):
        start = time.perf_counter()
        shown.components.sliders[0].value = value
        seconds.append(time.perf_counter() - start)
    print(f"{structure.atoms.numAtoms():,} atoms, {p} latents, {torch.get_num_threads()} threads")
    print(f"slider to coordinates on the wire: {1e3 * np.median(seconds):.1f} ms, {max(sent) / 1e3:.0f} kB a message")

    million = torch.randn(1_000_000, p)
    before, start = memory(), time.perf_counter()
    cc.explore(dynamics, million)
    seconds = time.perf_counter() - start
    print(f"open on 1,000,000 particles: {seconds:.1f} s, peak {memory():.2f} GB, {before:.2f} GB before")


if __name__ == "__main__":
    main()
