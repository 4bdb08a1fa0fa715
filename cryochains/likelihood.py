"""The images' likelihood, linearised: residual, analytic Jacobian and normal equations of every particle.

Symbols: y → image, f(z) → `model.render`, J = ∂f/∂z, H = JᵀJ → `hessian`, g = Jᵀ(y − f) → `gradient`.

Everything is summed in Fourier space (Parseval), so the CTF costs one product and no inverse transform. The mean
of an image is left out: particle extraction normalises it away.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .imaging import gaussian_transfer, project, project_tangents
from .model import CryoChains

# Working memory of one block of Jacobians: small enough for a laptop's cache, large enough to fill a GPU.
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**31}


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Of b particles, not yet divided by the noise variance.

    hessian (b, p, p), gradient (b, p), residual (b,) = ‖y − f‖², overlap (b,) = ⟨y, f⟩, power (b,) = ⟨f, f⟩.
    """

    hessian: Tensor
    gradient: Tensor
    residual: Tensor
    overlap: Tensor
    power: Tensor


def independent_pixels(model: CryoChains, blur: float = 0.0) -> float:
    """Sum of the squared filter over all frequencies but the mean: what ‖noise‖² divides by to give its variance."""
    imaging = model.imaging
    power = _half_weights(imaging.box_size, model.device)
    if blur:
        power = power * gaussian_transfer(imaging.box_size, imaging.pixel_size, blur, model.device).square()
    return float(power.sum())


@torch.no_grad()
def normal_equations(
    model: CryoChains, images: Tensor | None, pose: tuple, latents: Tensor, blur: float = 0.0
) -> NormalEquations:
    """Linearise the images of b particles at `latents` (b, p).

    Parameters
    ----------
    images : (b, box, box) tensor, or None
        None takes the model's own images, so that the gradient and the residual are zero: the information alone.
    pose : (rotations, shifts, ctf)
        Of the particles (see `Imaging.forward`).
    blur : float
        Å. Images and model are compared after a Gaussian blur: less information, but no local minimum within it.
    """
    imaging, dynamics = model.imaging, model.dynamics
    p, box = dynamics.n_latents, imaging.box_size
    n_atoms = max(layout.atoms.stop - layout.atoms.start for layout in dynamics.chains)
    bytes_each = 4 * box * p * (2 * n_atoms + 6 * box)
    block = max(1, BLOCK_BYTES["cuda" if latents.is_cuda else "cpu"] // bytes_each)
    sigma = (imaging.sigma**2 + blur**2) ** 0.5
    weights = _half_weights(box, latents.device).sqrt()
    low_pass = gaussian_transfer(box, imaging.pixel_size, blur, latents.device) if blur else 1.0
    rotations, shifts, ctf = pose

    def linearise(rows: slice) -> NormalEquations:
        z, frame = latents[rows], rotations[rows][:, :2]
        transfer = model.contrast * (weights if ctf is None else weights * ctf[rows])
        coords = dynamics.decode(z)
        xy = imaging.place(coords, rotations[rows], None if shifts is None else shifts[rows])
        size = (box, imaging.pixel_size, sigma)
        spectrum = _flat(torch.fft.rfft2(project(xy, imaging.weights, *size), norm="ortho") * transfer)
        jacobian = z.new_empty(len(z), p, spectrum.shape[1])
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(z, chain, frame)
            steps = project_tangents(xy[:, layout.atoms], tangents, imaging.weights[layout.atoms], *size)
            steps = torch.fft.rfft2(steps, norm="ortho").mul_(transfer.unsqueeze(-3))
            jacobian[:, layout.latents] = _flat(steps)
        data = spectrum
        if images is not None:
            data = _flat(torch.fft.rfft2(images[rows], norm="ortho") * (weights * low_pass))
        residual = data - spectrum
        return NormalEquations(
            torch.bmm(jacobian, jacobian.transpose(1, 2)),
            (jacobian @ residual.unsqueeze(-1)).squeeze(-1),
            residual.square().sum(1),
            (data * spectrum).sum(1),
            spectrum.square().sum(1),
        )

    rows = [slice(start, start + block) for start in range(0, len(latents), block)]
    blocks = map_blocks(linearise, rows, latents.device)
    fields = ("hessian", "gradient", "residual", "overlap", "power")
    return NormalEquations(*(torch.cat([getattr(block, name) for block in blocks]) for name in fields))


def map_blocks(function, blocks: list, device: torch.device) -> list:
    """``[function(block) for block in blocks]`` without gradients; on a CPU one thread takes a whole block.

    Threads that share every small operation wait for each other after each: on a machine with other work to do that
    took forty times as long, and on an idle one half as long again.
    """
    threads = torch.get_num_threads()

    def without_gradients(block):
        with torch.no_grad():
            return function(block)

    if device.type != "cpu" or threads == 1 or len(blocks) == 1:
        return [without_gradients(block) for block in blocks]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(without_gradients, blocks))
    finally:
        torch.set_num_threads(threads)


def _half_weights(box_size: int, device) -> Tensor:
    """(box, box//2 + 1) how often each rfft2 coefficient counts in a sum over the whole plane; the mean counts 0."""
    weights = torch.full((box_size, box_size // 2 + 1), 2.0, device=device)
    weights[:, 0] = weights[:, -1] = 1.0
    weights[0, 0] = 0.0
    return weights


def _flat(spectrum: Tensor) -> Tensor:
    """Complex (…, box, box//2 + 1) → real (…, box·(box + 2)): real and imaginary parts side by side."""
    return torch.view_as_real(spectrum).flatten(-3)
