"""Linearised images and posteriors against what cannot be avoided, and how they grow; one thread.

The floor of a linearisation, of an image along p latents, is what cannot be left out. Every bead
touches the pixels within its extent, at each of which the tangents of its chain take two
multiply-adds, and the image and its two derivatives three; one real FFT a tangent takes
5/2 N log₂ N operations; the tangents have p (p + 1)/2 products: all at the rate of a large float32
matrix product. And p spectra are written and read once, at the memory's rate. Both rates are
measured in the same run. The floor of a posterior is p³/2 multiply-adds of an inverse at the same
rate. Times are of the process's CPU, the least of several.
"""

import argparse
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch

import cryochains as cc
from cryochains.inference import normal_equations
from cryochains.inference.inversion import invert_information
from cryochains.model import Dynamics

# Å, of all images.
SIDE = 288.0
# Widths from its centre at which an atom ends.
EXTENT = 5.0
# What growth is fitted on: modes a chain, pixels, bodies.
MODES, BOXES, BODIES = (10, 20, 50, 144), (64, 96, 128), (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=16, help="particles a call")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate, bandwidth = matmul_rate(args.repeats), memory_rate(args.repeats)
    print(f"{rate / 1e9:.0f} G float32 multiply-adds a second, {bandwidth / 1e9:.1f} GB a second")
    print("\nlinearisation; milliseconds a particle")
    print(f"{'beads':>6} {'bodies':>6} {'p':>4} {'px':>4}    floor  measured  ratio")
    times = {}
    for modes, box in [*((modes, 64) for modes in MODES), *((m, 128) for m in (10, 50)), (50, 96)]:
        case = Case(2, modes, box, args.n)
        times[modes, box] = report(case, rate, bandwidth, args.repeats)
    of_bodies = {}
    for bodies in BODIES:
        # As many latents in all.
        case = Case(bodies, 112 // bodies - 6, 64, args.n)
        of_bodies[bodies] = report(case, rate, bandwidth, args.repeats)
    single = Case(2, 50, 64, args.n, sigma=3.2)
    half_the_beads = report(single, rate, bandwidth, args.repeats)
    latents = [2 * (modes + 6) for modes in MODES]
    print(f"grows with p^{exponent(latents, [times[m, 64] for m in MODES]):.2f}, ", end="")
    print(f"box^{exponent(BOXES, [times[50, box] for box in BOXES]):.2f}, ", end="")
    n_beads = (single.n_beads, Case(2, 50, 64, 1).n_beads)
    print(f"beads^{exponent(n_beads, [half_the_beads, times[50, 64]]):.2f}, ", end="")
    print(f"bodies^{exponent(BODIES, list(of_bodies.values())):.2f}")
    print("\nposterior of linearised images; milliseconds a particle")
    print(f"{'p':>4}   floor  measured  ratio")
    measured = [posterior(p, rate, args.repeats) for p in latents]
    print(f"grows with p^{exponent(latents, measured):.2f}")


class Case:
    """Particles of GluA3 in so many bodies, each with so many modes."""

    def __init__(
        self, bodies: int, modes: int, box: int, n: int, sigma: float | None = None
    ) -> None:
        reference = cc.load_structure("glua3-closed", bodies=pieces(bodies))
        dynamics = Dynamics(reference, cc.compute_modes(reference, modes))
        generator = torch.Generator().manual_seed(0)
        self.latents = 0.3 * torch.randn(n, dynamics.n_latents, generator=generator)
        particles = cc.simulate_particles(
            reference,
            n,
            dynamics=dynamics,
            latents=self.latents,
            box_size=box,
            pixel_size=SIDE / box,
            snr_db=0.0,
            progress=False,
        )
        settings = {} if sigma is None else {"sigma": sigma}
        self.model = cc.Model(reference, particles, modes=dynamics.modes, **settings)
        self.batch = next(particles.batches(n))
        self.n_beads = len(self.model.beads)
        self.variance = torch.full((n, self.n_beads), 0.3)

    def linearise(self) -> None:
        normal_equations(
            self.model, self.batch.images, self.batch.pose, self.latents, variance=self.variance
        )

    def floor(self, rate: float, bandwidth: float) -> float:
        """Seconds a particle."""
        microscope, box, p = self.model.microscope, self.model.box_size, self.model.n_latents
        widths = microscope._drawn_widths(
            slice(None), torch.zeros(1, self.n_beads, 2), 0.0, self.variance[:1], box
        )
        pixels = (math.pi * (EXTENT * widths[0] / microscope.pixel_size).square()).double()
        touched = 3 * float(pixels.sum())
        for layout in self.model.bead_dynamics.chains:
            tangents = layout.latents.stop - layout.latents.start
            touched += 2 * tangents * float(pixels[layout.atoms].sum())
        n_numbers = box * (box + 2)
        transforms = p * 2.5 * box**2 * math.log2(box**2) / 2
        products = p * (p + 1) / 2 * n_numbers
        return (touched + transforms + products) / rate + 2 * 4 * p * n_numbers / bandwidth


def pieces(n: int) -> str | dict[str, str]:
    """Both chains, each cut into n/2 stretches."""
    if n == 2:
        return "chains"
    structure = cc.load_structure("glua3-closed")
    bodies = {}
    resnums = np.asarray(structure.resnums)
    for index, chain in enumerate(structure.chain_ids):
        own = np.unique(resnums[structure.chain_index == index])
        for number, part in enumerate(np.array_split(own, n // 2)):
            bodies[f"{chain}{number}"] = f"chain {chain} and resnum {part[0]} to {part[-1]}"
    return bodies


def report(case: Case, rate: float, bandwidth: float, repeats: int) -> float:
    """One line of the table; seconds a particle."""
    n = len(case.latents)
    measured = least_time(case.linearise, repeats) / n
    floor = case.floor(rate, bandwidth)
    model = case.model
    print(
        f"{case.n_beads:6} {len(model.dynamics.chains):6} {model.n_latents:4} {model.box_size:4} "
        f"{1e3 * floor:7.2f} {1e3 * measured:9.2f} {measured / floor:6.1f}",
        flush=True,
    )
    return measured


def posterior(p: int, rate: float, repeats: int, n: int = 8) -> float:
    """One line of the table; seconds a particle."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(n, p, 2 * p, generator=generator)
    hessian, one, slope = root @ root.mT, torch.ones(n), torch.zeros(n, p)
    measured = least_time(
        lambda: invert_information(hessian, one, slope, one, torch.eye(p), one), repeats
    )
    floor = p**3 / 2 / rate
    print(f"{p:4} {1e3 * floor:7.3f} {1e3 * measured / n:9.3f} {measured / n / floor:6.1f}")
    return measured / n


def matmul_rate(repeats: int) -> float:
    """Multiply-adds a second of a float32 matrix product."""
    a = torch.randn(1024, 1024)
    return 1024**3 / least_time(lambda: a @ a, repeats)


def memory_rate(repeats: int) -> float:
    """Bytes a second that are read and written by a copy that no cache holds."""
    a, b = torch.randn(2**25), torch.empty(2**25)
    return 8 * 2**25 / least_time(lambda: b.copy_(a), repeats)


def least_time(function: Callable[[], object], repeats: int) -> float:
    """Seconds of the process's CPU; what is compiled when first used is not counted."""
    function()
    times = []
    for _ in range(repeats):
        began = time.process_time()
        function()
        times.append(time.process_time() - began)
    return min(times)


def exponent(sizes: Sequence[float], times: Sequence[float]) -> float:
    """Of the power law that fits best."""
    return float(np.polyfit(np.log(sizes), np.log(times), 1)[0])


if __name__ == "__main__":
    main()
