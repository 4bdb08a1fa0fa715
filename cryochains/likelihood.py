"""The images' likelihood, linearised: residual, analytic Jacobian and normal equations of every particle.

Symbols: y → image, f(z) → `model.render`, J = ∂f/∂z, H = JᵀJ → `hessian`, g = Jᵀ(y − f) → `gradient`.

Everything is summed in Fourier space (Parseval), so the CTF costs one product and no inverse transform. The mean
of an image is left out: particle extraction normalises it away.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from .dynamics import Dynamics
from .imaging import gaussian_transfer, project, project_tangents
from .model import CryoChains

# Working memory of one block of Jacobians: small enough for a laptop's cache, large enough to fill a GPU.
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**31}
# Å, no atom is drawn wider for being uncertain: one that could become fog would, wherever the model does not fit.
FOG = 4.0
# Pixels of a blurred image, in widths of a blurred atom: at its Nyquist frequency 10⁻⁵ of an atom is left.
COARSE = 0.65


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
    box, weights, low_pass = _band(model, blur)
    return float((weights * low_pass).square().sum())


@torch.no_grad()
def normal_equations(
    model: CryoChains,
    images: Tensor | None,
    pose: tuple,
    latents: Tensor,
    blur: float = 0.0,
    variance: Tensor | None = None,
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
    variance : (b, n_atoms) tensor, optional
        Å², of every atom's place on the image (see `place_variance`). An uncertain atom is drawn as wide as that, which
        is the image expected of it: a loose end that cannot be seen neither chases noise nor hides what could be seen.
    """
    imaging, dynamics = model.imaging, model.dynamics
    p, full = dynamics.n_latents, imaging.box_size
    box, weights, low_pass = _band(model, blur)
    n_atoms = max(layout.atoms.stop - layout.atoms.start for layout in dynamics.chains)
    bytes_each = 4 * box * p * (2 * n_atoms + 6 * box)
    block = max(1, BLOCK_BYTES["cuda" if latents.is_cuda else "cpu"] // bytes_each)
    sigma = (imaging.sigma**2 + blur**2) ** 0.5
    rotations, shifts, ctf = pose

    def linearise(rows: slice) -> NormalEquations:
        z, frame = latents[rows], rotations[rows][:, :2]
        # The same integral sampled by fewer, larger pixels.
        transfer = model.contrast * (full / box) * (weights if ctf is None else weights * _crop(ctf[rows], box))
        coords = dynamics.decode(z)
        xy = imaging.place(coords, rotations[rows], None if shifts is None else shifts[rows])
        width = sigma if variance is None else (sigma**2 + variance[rows]).sqrt()
        size = (box, imaging.pixel_size * full / box)
        spectrum = _flat(torch.fft.rfft2(project(xy, imaging.weights, *size, width), norm="ortho") * transfer)
        jacobian = z.new_empty(len(z), p, spectrum.shape[1])
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(z, chain, frame)
            own = width if variance is None else width[:, layout.atoms]
            steps = project_tangents(xy[:, layout.atoms], tangents, imaging.weights[layout.atoms], *size, own)
            steps = torch.fft.rfft2(steps, norm="ortho").mul_(transfer.unsqueeze(-3))
            jacobian[:, layout.latents] = _flat(steps)
        data = spectrum
        if images is not None:
            data = _flat(_crop(torch.fft.rfft2(images[rows], norm="ortho"), box) * (weights * low_pass))
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


@torch.no_grad()
def place_variance(dynamics: Dynamics, latents: Tensor, rotations: Tensor, covariance: Tensor) -> Tensor:
    """(b, n_atoms) variance in Å², along an axis of the image, of where uncertain latents put each atom; capped.

    `latents` (b, p) of posterior `covariance` (b, p, p), seen from `rotations` (b, 3, 3).
    """
    parts = []
    for chain, layout in enumerate(dynamics.chains):
        steps = dynamics.tangents(latents, chain, rotations[:, :2]).flatten(2)
        of_chain = ((covariance[:, layout.latents, layout.latents].to(steps.dtype) @ steps) * steps).sum(1)
        parts.append(of_chain.view(len(latents), -1, 2).mean(-1))
    return torch.cat(parts, dim=1).clamp(0, FOG**2)


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


def _band(model: CryoChains, blur: float) -> tuple[int, Tensor, Tensor | float]:
    """Box that holds all a blur leaves, the root of how often each of its rfft2 coefficients counts, and the filter.

    The mean counts 0. A blurred image has nothing left at high frequencies: they are not computed.
    """
    imaging, device = model.imaging, model.device
    full, side = imaging.box_size, imaging.box_size * imaging.pixel_size
    box = full
    if blur:
        box = min(full, 2 * math.ceil(side / (2 * COARSE * math.hypot(imaging.sigma, blur))))
    weights = torch.full((box, box // 2 + 1), 2.0, device=device)
    weights[:, 0] = weights[:, -1] = 1.0
    weights[0, 0] = 0.0
    if box < full:
        # The highest frequency of the smaller box stands for two of the larger one's.
        weights[:, -1] = weights[box // 2] = 0.0
    low_pass = _crop(gaussian_transfer(full, imaging.pixel_size, blur, device), box) if blur else 1.0
    return box, weights.sqrt(), low_pass


def _crop(spectrum: Tensor, box: int) -> Tensor:
    """The low frequencies of (…, full, full//2 + 1): (…, box, box//2 + 1)."""
    if box == spectrum.shape[-2]:
        return spectrum
    return torch.cat([spectrum[..., : box // 2, : box // 2 + 1], spectrum[..., -(box // 2) :, : box // 2 + 1]], dim=-2)


def _flat(spectrum: Tensor) -> Tensor:
    """Complex (…, box, box//2 + 1) → real (…, box·(box + 2)): real and imaginary parts side by side."""
    return torch.view_as_real(spectrum).flatten(-3)
