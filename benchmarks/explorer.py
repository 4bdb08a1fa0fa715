"""The explorer's own time and memory: a slider's way to the wire, and opening a million particles.

``python benchmarks/explorer.py`` measures the Python side; what the browser then draws is its
graphics card's business.
"""

import resource
import time

import numpy as np
import torch

import cryochains as cc
from cryochains.view import notebook


def ten_thousand_atoms():
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
    notebook.in_notebook = lambda: True
    structure = ten_thousand_atoms()
    model = cc.Model(structure, modes=20, box_size=64, pixel_size=5.0)
    p = model.n_latents
    latents = torch.randn(1000, p, generator=torch.Generator().manual_seed(0))
    shown = cc.explore(cc.Result(model, latents))
    sizes, seconds = [], []
    shown.molecule.send = lambda content, buffers=(): sizes.append(sum(map(len, buffers)))
    for value in np.linspace(-1, 1, 41):
        start = time.perf_counter()
        shown.components.sliders[0].value = value
        seconds.append(time.perf_counter() - start)
    threads = torch.get_num_threads()
    print(f"{structure.atoms.numAtoms():,} atoms, {p} latents, {threads} threads")
    milliseconds = 1e3 * np.median(seconds)
    kilobytes = max(sizes) / 1e3
    print(f"slider to coordinates on the wire: {milliseconds:.1f} ms, {kilobytes:.0f} kB a message")

    million = torch.randn(1_000_000, p)
    before = memory()
    start = time.perf_counter()
    cc.explore(cc.Result(model, million))
    taken = time.perf_counter() - start
    print(
        f"open on 1,000,000 particles: {taken:.1f} s, peak {memory():.2f} GB, {before:.2f} before"
    )


if __name__ == "__main__":
    main()
