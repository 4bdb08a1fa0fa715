"""One pass of the refinement against the obvious way to get its Jacobian.

Both make the same normal equations of the same particles, in turn, in one process. The obvious way
is ``torch.func.jvp`` of the same image model, written in plain differentiable operations, once for
each latent.
"""

import argparse
import statistics
import sys
import time

import torch

import cryochains as cc
from cryochains.images import pixel_grid
from cryochains.inference import normal_equations
from cryochains.model import Dynamics

N_MODES = 50
BOX_SIZE = 64
N_PARTICLES = 16
REPEATS = 5
MIN_RATIO = 3
# Pixels, the narrowest Gaussian that is drawn; the image of narrower ones is sharpened.
LEAST_PIXELS = 0.8
# Products of denormal numbers would be slow: the library clamps its exponents alike.
MIN_EXPONENT = -25.0


def plain_image(model, z, rotations, shifts, ctf):
    """The image model in operations that torch can differentiate in forward mode."""
    box, pixel, beads = model.box_size, model.pixel_size, model.beads
    coords = model.bead_dynamics.decode(z)
    x, y = model.microscope.image_positions(coords, rotations, shifts).unbind(-1)
    grid = pixel_grid(box, pixel, x)
    extra = max(0.0, (LEAST_PIXELS * pixel) ** 2 - float(beads.widths.min()) ** 2)
    variance = torch.from_numpy(beads.widths**2 + extra).to(x)

    def gaussians(positions):
        exponent = -((grid - positions.unsqueeze(-1)) ** 2) / (2 * variance.unsqueeze(-1))
        return torch.exp(exponent.clamp(min=MIN_EXPONENT))

    amplitudes = torch.from_numpy(beads.weights).to(x) / (2 * torch.pi * variance)
    image = (gaussians(y) * amplitudes.unsqueeze(-1)).transpose(1, 2) @ gaussians(x)
    ky = torch.fft.fftfreq(box, pixel, device=x.device)
    kx = torch.fft.rfftfreq(box, pixel, device=x.device)
    squared = (ky[:, None] ** 2 + kx**2).clamp(max=0.25 / pixel**2)
    sharpening = torch.exp(2 * torch.pi**2 * extra * squared)
    return torch.fft.rfft2(image, norm="ortho") * (ctf * sharpening)


def forward_mode_equations(model, images, pose, z):
    """(b, p, p) JᵀJ and (b, p) Jᵀ(y − f), one product J·e_k a latent."""
    box = model.box_size
    weights = torch.full((box, box // 2 + 1), 2.0, device=z.device)
    weights[:, 0] = weights[:, -1] = 1.0
    weights[0, 0] = 0.0
    root = weights.sqrt()
    columns = []
    for k in range(z.shape[1]):
        direction = torch.zeros_like(z)
        direction[:, k] = 1.0
        image, column = torch.func.jvp(
            lambda latents: plain_image(model, latents, *pose), (z,), (direction,)
        )
        columns.append(torch.view_as_real(column * root).flatten(1))
    jacobian = torch.stack(columns, dim=1)
    residual = torch.view_as_real((torch.fft.rfft2(images, norm="ortho") - image) * root).flatten(1)
    return jacobian @ jacobian.transpose(1, 2), (jacobian @ residual.unsqueeze(-1)).squeeze(-1)


def now(device: str) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def make_particles(device: str):
    """A model, one batch of its particles, and the latents to linearise at."""
    reference = cc.load_structure("glua3-closed")
    dynamics = Dynamics(reference, cc.compute_modes(reference, N_MODES))
    generator = torch.Generator().manual_seed(0)
    latents = 0.3 * torch.randn(N_PARTICLES, dynamics.n_latents, generator=generator)
    particles = cc.simulate_particles(
        reference,
        N_PARTICLES,
        dynamics=dynamics,
        latents=latents,
        box_size=BOX_SIZE,
        device=device,
        progress=False,
    )
    model = cc.Model(reference, particles, modes=dynamics.modes).to(device)
    batch = next(particles.batches(N_PARTICLES, device=device))
    return model, batch, torch.zeros_like(latents).to(device)


def require_same(name: str, theirs: torch.Tensor, ours: torch.Tensor) -> None:
    error = float((theirs - ours).abs().max() / theirs.abs().max())
    if error > 1e-3:
        sys.exit(f"the two ways disagree: {name} by {error:.1e}")


def dense_ms(dynamics: Dynamics, device: str) -> float:
    """Milliseconds a particle of the Jacobian from all pixels of all beads, and JᵀJ.

    As matrix products at the speed of a large one. A CPU visits only the pixels that a bead
    touches, and may be below.
    """
    operations = dynamics.n_latents**2 * BOX_SIZE**2
    for layout in dynamics.chains:
        n_latents = layout.latents.stop - layout.latents.start
        operations += 2 * layout.n_atoms * n_latents * BOX_SIZE**2
    square = torch.randn(1024, 1024, device=device)
    square @ square
    began = now(device)
    for _ in range(5):
        square @ square
    multiply_adds_per_second = 5 * 1024**3 / (now(device) - began)
    return 1000 * operations / multiply_adds_per_second


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = parser.parse_args().device
    model, batch, z = make_particles(device)
    times = {"analytic": [], "forward mode": []}
    for _ in range(REPEATS + 1):
        began = now(device)
        ours = normal_equations(model, batch.images, batch.pose, z)
        middle = now(device)
        hessian, gradient = forward_mode_equations(model, batch.images, batch.pose, z)
        times["analytic"].append(middle - began)
        times["forward mode"].append(now(device) - middle)
    require_same("hessian", hessian, ours.hessian)
    require_same("gradient", gradient, ours.gradient())

    # The first round warms up.
    fast, slow = times["analytic"][1:], times["forward mode"][1:]
    ratios = [theirs / mine for theirs, mine in zip(slow, fast, strict=True)]
    n_beads, p = len(model.beads), model.n_latents
    print(f"{n_beads} beads, {BOX_SIZE} px, p = {p}, {torch.get_num_threads()} threads")
    for name, values in times.items():
        median = 1000 * statistics.median(values[1:]) / N_PARTICLES
        print(f"{name:14}{median:8.2f} ms a particle")
    dense = dense_ms(model.bead_dynamics, device)
    print(f"{'all pixels':14}{dense:8.2f} ms a particle, at the speed of a large matrix product")
    ratio = statistics.median(ratios)
    print(f"{ratio:.1f} times faster (from {min(ratios):.1f} to {max(ratios):.1f})")
    if ratio < MIN_RATIO:
        sys.exit(f"expected at least {MIN_RATIO} times")


if __name__ == "__main__":
    main()
