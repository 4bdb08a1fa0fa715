"""One pass of the refinement against the obvious way to get its Jacobian: one forward-mode product a latent.

Both make the same normal equations of the same particles, in turn, in one process. The obvious way is
``torch.func.jvp`` of the same image model, written in plain differentiable operations, once for each latent.
"""

import argparse
import statistics
import sys
import time

import torch

import cryochains as cc
from cryochains.imaging import MIN_EXPONENT, pixel_grid
from cryochains.likelihood import normal_equations

N_MODES, BOX, N_PARTICLES, REPEATS, WANTED = 50, 64, 16, 5, 3


def plain_image(model, z, rotations, shifts, ctf):
    """The image model in operations that torch can differentiate in forward mode."""
    imaging = model.imaging
    x, y = imaging.place(model.decode(z), rotations, shifts).unbind(-1)
    grid = pixel_grid(imaging.box_size, imaging.pixel_size, x)

    def gaussians(positions):
        exponent = -((grid - positions.unsqueeze(-1)) ** 2) / (2 * imaging.sigma**2)
        return torch.exp(exponent.clamp(min=MIN_EXPONENT))

    amplitudes = imaging.weights / (2 * torch.pi * imaging.sigma**2)
    image = (gaussians(y) * amplitudes.unsqueeze(-1)).transpose(1, 2) @ gaussians(x)
    return torch.fft.rfft2(image, norm="ortho") * ctf


def forward_mode_equations(model, images, pose, z):
    """(b, p, p) JᵀJ and (b, p) Jᵀ(y − f), one product J·e_k a latent."""
    box = model.imaging.box_size
    weights = torch.full((box, box // 2 + 1), 2.0, device=z.device)
    weights[:, 0] = weights[:, -1] = 1.0
    weights[0, 0] = 0.0
    root = weights.sqrt()
    columns = []
    for k in range(z.shape[1]):
        direction = torch.zeros_like(z)
        direction[:, k] = 1.0
        image, column = torch.func.jvp(lambda latents: plain_image(model, latents, *pose), (z,), (direction,))
        columns.append(torch.view_as_real(column * root).flatten(1))
    jacobian = torch.stack(columns, dim=1)
    residual = torch.view_as_real((torch.fft.rfft2(images, norm="ortho") - image) * root).flatten(1)
    return jacobian @ jacobian.transpose(1, 2), (jacobian @ residual.unsqueeze(-1)).squeeze(-1)


def now(device: str) -> float:
    """Seconds, after all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    device = parser.parse_args().device
    reference = cc.load_structure("glua3-closed")
    dynamics = cc.Dynamics(reference, cc.compute_modes(reference, N_MODES))
    latents = 0.3 * torch.randn(N_PARTICLES, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    particles = cc.simulate_particles(
        reference, N_PARTICLES, dynamics=dynamics, latents=latents, box_size=BOX, progress=False
    )
    model = cc.CryoChains.for_particles(reference, particles, modes=dynamics.modes, width=0.1).to(device)
    batch = next(particles.batches(N_PARTICLES, device=device))
    z = torch.zeros_like(latents).to(device)

    times = {"analytic": [], "forward mode": []}
    for _ in range(REPEATS + 1):
        began = now(device)
        ours = normal_equations(model, batch.images, batch.pose, z)
        middle = now(device)
        hessian, gradient = forward_mode_equations(model, batch.images, batch.pose, z)
        times["analytic"].append(middle - began)
        times["forward mode"].append(now(device) - middle)
    for name, theirs, mine in (("hessian", hessian, ours.hessian), ("gradient", gradient, ours.gradient)):
        error = float((theirs - mine).abs().max() / theirs.abs().max())
        if error > 1e-3:
            sys.exit(f"the two ways disagree: {name} by {error:.1e}")

    # Where the time must go at least: the Jacobian's matrix products and JᵀJ, in multiply-adds.
    atoms = [layout.atoms.stop - layout.atoms.start for layout in dynamics.chains]
    sizes = [layout.latents.stop - layout.latents.start for layout in dynamics.chains]
    operations = sum(2 * n * k for n, k in zip(atoms, sizes, strict=True)) * BOX**2 + dynamics.n_latents**2 * BOX**2
    square = torch.randn(1024, 1024, device=device)
    square @ square
    began = now(device)
    for _ in range(5):
        square @ square
    rate = 5 * 1024**3 / (now(device) - began)
    floor = 1000 * operations / rate

    median = {name: 1000 * statistics.median(values[1:]) / N_PARTICLES for name, values in times.items()}
    ratios = [slow / fast for slow, fast in zip(times["forward mode"][1:], times["analytic"][1:], strict=True)]
    print(f"{reference.n_atoms} atoms, {BOX} px, p = {dynamics.n_latents}, {torch.get_num_threads()} threads")
    for name, value in median.items():
        print(f"{name:14}{value:8.2f} ms a particle")
    print(f"{'floor':14}{floor:8.2f} ms a particle, at the speed of a large matrix product")
    print(f"{statistics.median(ratios):.1f} times faster (from {min(ratios):.1f} to {max(ratios):.1f})")
    if statistics.median(ratios) < WANTED:
        sys.exit(f"expected at least {WANTED} times")


if __name__ == "__main__":
    main()
