"""One image forward and backward: `cryochains.images.project` against cryoSPHERE's own `project`.

Both draw the same Gaussians of the same molecule on the same pixels, in turns on one core; the
images and the gradients must agree before a time is printed. `make bench` installs cryoSPHERE
beside the environment; by hand: `pip install --no-deps --target .venv/cryosphere cryosphere==0.6.1
einops`, and PYTHONPATH=.venv/cryosphere.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch

from cryochains.images import project, random_rotations
from cryochains.molecule import load_structure

try:
    from cryosphere.model.gmm import EMAN2Grid
    from cryosphere.model.renderer import project as cryosphere_project
except ImportError as error:
    sys.exit(
        f"expected cryoSPHERE beside CryoChains, got: {error}; try `make bench`, which installs it"
    )

N_ATOMS = 1354
BOX_SIZE = 128
FILLED_SHARE = 0.7
TOLERANCE = 1e-4
# With denormal numbers flushed to zero, which products of are slow on some CPUs.
MIN_RATIO = 3


def molecule() -> tuple[torch.Tensor, float]:
    """(n, 3) Å: heavy atoms of a real dimer, thinned evenly.

    And the pixel size at which it fills the box.
    """
    coords = load_structure("glua3-open", atoms="heavy").coords
    coords = coords[np.linspace(0, len(coords) - 1, N_ATOMS).astype(int)]
    coords = coords - (coords.min(0) + coords.max(0)) / 2
    diameter = 2 * np.linalg.norm(coords, axis=1).max()
    return torch.as_tensor(coords, dtype=torch.float32), float(diameter / (FILLED_SHARE * BOX_SIZE))


def forward_backward(
    draw: Callable, coords: torch.Tensor, upstream: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    coords = coords.clone().requires_grad_()
    images = draw(coords)
    images.backward(upstream)
    return images.detach(), coords.grad


def relative_difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def compare(programs: dict, coords: torch.Tensor, repeats: int) -> None:
    """Check that the two programs agree on (batch, n, 3) `coords`; time them in turns."""
    batch = len(coords)
    upstream = torch.randn(batch, BOX_SIZE, BOX_SIZE, generator=torch.Generator().manual_seed(0))
    ours, theirs = (forward_backward(draw, coords, upstream) for draw in programs.values())
    differences = [relative_difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    if max(differences) > TOLERANCE:
        sys.exit(
            "expected the same image and gradient from both, "
            f"got relative differences {differences}"
        )

    times = {name: [] for name in programs}
    for _ in range(repeats):
        for name, draw in programs.items():
            start = time.perf_counter()
            forward_backward(draw, coords, upstream)
            times[name].append((time.perf_counter() - start) / batch * 1e3)

    of_image, of_gradient = differences
    print(f"\n{batch} a call; difference of images {of_image:.1e}, of gradients {of_gradient:.1e}")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        low, high = np.percentile(values, [25, 75])
        print(f"{name:<12}{medians[name]:8.2f} ms an image   (quartiles {low:.2f}–{high:.2f})")
    ratio = medians["cryoSPHERE"] / medians["CryoChains"]
    print(f"CryoChains is {ratio:.1f} times faster")
    if ratio < MIN_RATIO:
        sys.exit(f"expected at least {MIN_RATIO} times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--repeats", type=int, default=30, help="rounds, each timing both programs once")
    add("--batches", type=int, nargs="+", default=[1, 16], help="images a call")
    add("--sigma", type=float, default=2.0, help="width of the Gaussians, Å")
    options = parser.parse_args()
    torch.set_num_threads(1)

    coords, pixel_size = molecule()
    weights = torch.ones(N_ATOMS)
    # cryoSPHERE takes the height of a Gaussian's peak, CryoChains its integral.
    heights = (weights / (2 * torch.pi * options.sigma**2)).unsqueeze(1)
    widths = torch.full((N_ATOMS, 1), options.sigma)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # its grid calls torch.meshgrid in a way that torch will drop
        grid = EMAN2Grid(BOX_SIZE, pixel_size)
    programs = {
        "CryoChains": lambda xyz: project(xyz, weights, BOX_SIZE, pixel_size, options.sigma),
        "cryoSPHERE": lambda xyz: cryosphere_project(xyz, widths, heights, grid),
    }
    print(
        f"{N_ATOMS} atoms × {BOX_SIZE} px × {pixel_size:.2f} Å, σ = {options.sigma:g} Å, one core"
    )
    for flushed in (False, True):
        torch.set_flush_denormal(flushed)
        print(f"\ndenormal numbers {'flushed to zero' if flushed else 'as they are'}")
        for batch in options.batches:
            rotations = random_rotations(batch, seed=0)
            compare(programs, coords @ rotations.transpose(1, 2), options.repeats)


if __name__ == "__main__":
    main()
