"""The images' likelihood, linearised: residual, analytic Jacobian and normal equations.

Symbols: y → image, f(z) → contrast · `Model.render`, J = ∂f/∂z, H = JᵀJ → `hessian`,
g = Jᵀ(y − f) → `gradient`.

Everything is summed in Fourier space (Parseval), so the CTF costs one product and no inverse
transform. The mean of an image is left out: particle extraction normalises it away.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from ..images import ParticleStack, filter_images, gaussian_transfer
from ..model import Dynamics, Microscope, Model

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

# Working memory of one block of Jacobians: small enough for a laptop's cache, large enough to fill
# a GPU.
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**31}
# Å, no atom is drawn wider for being uncertain: without a limit, atoms of loose ends would be drawn
# so wide that the images say nothing of them, wherever the model does not fit.
MAX_ATOM_SIGMA = 4.0
# Pixels of a blurred image, in widths of a blurred atom: at its Nyquist frequency 10⁻⁵ of an atom
# is left.
_COARSE_PIXEL = 0.65
# Å. Where atoms are not at their reference positions, sharp images look dimmer than they are.
_REFERENCE_BLUR = 8.0


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Of b particles, not yet divided by the noise variance.

    Attributes
    ----------
    hessian : (b, p, p) tensor
    gradient : (b, p) tensor
    residual : (b,) tensor
        ‖y − f‖².
    overlap : (b,) tensor
        ⟨y, f⟩.
    power : (b,) tensor
        ⟨f, f⟩.
    """

    hessian: Tensor
    gradient: Tensor
    residual: Tensor
    overlap: Tensor
    power: Tensor


@dataclass(frozen=True, eq=False)
class _FrequencyBand:
    """The frequencies that a blur leaves; made by `frequency_band`.

    Attributes
    ----------
    box_size : int
        Of the smallest image that holds them.
    weights : (box, box//2 + 1) tensor
        Root of how often each rfft2 coefficient counts; 0 for the mean.
    low_pass : (box, box//2 + 1) tensor
        The blur's transfer function.
    """

    box_size: int
    weights: Tensor
    low_pass: Tensor

    @property
    def n_pixels(self) -> float:
        """Sum of the squared filter: ‖noise‖² divided by it is the variance of the noise."""
        return float((self.weights * self.low_pass).square().sum())


def frequency_band(microscope: Microscope, blur: float = 0.0) -> _FrequencyBand:
    """The frequencies that a Gaussian blur of `blur` Å leaves; the others are not computed."""
    full = microscope.box_size
    side = full * microscope.pixel_size
    box = full
    if blur:
        pixel = _COARSE_PIXEL * math.hypot(microscope.width, blur)
        box = min(full, 2 * math.ceil(side / (2 * pixel)))
    weights = torch.full((box, box // 2 + 1), 2.0, device=microscope.device)
    weights[:, 0] = 1.0
    weights[:, -1] = 1.0
    weights[0, 0] = 0.0
    if box < full:
        # The highest frequency of the smaller box stands for two of the larger one's.
        weights[:, -1] = 0.0
        weights[box // 2] = 0.0
    low_pass = torch.ones_like(weights)
    if blur:
        whole = gaussian_transfer(full, microscope.pixel_size, blur, microscope.device)
        low_pass = _crop_spectrum(whole, box)
    return _FrequencyBand(box, weights.sqrt(), low_pass)


def _crop_spectrum(spectrum: Tensor, box: int) -> Tensor:
    """The low frequencies of (…, full, full//2 + 1): (…, box, box//2 + 1)."""
    if box == spectrum.shape[-2]:
        return spectrum
    half = box // 2
    low = spectrum[..., :half, : half + 1]
    high = spectrum[..., -half:, : half + 1]
    return torch.cat([low, high], dim=-2)


@torch.no_grad()
def normal_equations(
    model: Model,
    images: Tensor | None,
    pose: tuple,
    latents: Tensor,
    *,
    contrast: float = 1.0,
    blur: float = 0.0,
    variance: Tensor | None = None,
) -> NormalEquations:
    """Linearise the images of b particles at `latents` (b, p).

    Parameters
    ----------
    model : Model
    images : (b, box, box) tensor, or None
        None takes the model's own images, so that the gradient and the residual are zero: the
        information alone.
    pose : (rotations, shifts, ctf)
        Of the particles (see `Microscope.render`).
    latents : (b, p) tensor
    contrast : float
        Brightness of the images over the model's.
    blur : float
        Å. Images and model are compared after a Gaussian blur: less information, but no local
        minimum within it.
    variance : (b, n_atoms) tensor, optional
        Å², of every atom's position on the image (see `position_variance`). An uncertain atom is
        drawn as wide as that, which is the image expected of it: a loose end that cannot be seen
        then neither follows noise nor hides what could be seen.

    Returns
    -------
    NormalEquations
    """
    band = frequency_band(model.microscope, blur)
    largest = max(layout.n_atoms for layout in model.dynamics.chains)
    bytes_each = 4 * band.box_size * model.n_latents * (2 * largest + 6 * model.box_size)
    block = max(1, BLOCK_BYTES["cuda" if latents.is_cuda else "cpu"] // bytes_each)
    blocks = [slice(start, start + block) for start in range(0, len(latents), block)]
    sigma = math.hypot(model.microscope.width, blur)

    def linearise(rows: slice) -> NormalEquations:
        width: float | Tensor = sigma
        if variance is not None:
            width = (sigma**2 + variance[rows]).sqrt()
        return _linearise_block(
            model,
            None if images is None else images[rows],
            tuple(None if part is None else part[rows] for part in pose),
            latents[rows],
            contrast,
            band,
            width,
        )

    parts = map_blocks(linearise, blocks, latents.device)
    return NormalEquations(
        torch.cat([part.hessian for part in parts]),
        torch.cat([part.gradient for part in parts]),
        torch.cat([part.residual for part in parts]),
        torch.cat([part.overlap for part in parts]),
        torch.cat([part.power for part in parts]),
    )


def _linearise_block(
    model: Model,
    images: Tensor | None,
    pose: tuple,
    latents: Tensor,
    contrast: float,
    band: _FrequencyBand,
    width: float | Tensor,
) -> NormalEquations:
    """Normal equations of so few particles that their Jacobian fits the working memory."""
    microscope, dynamics, box = model.microscope, model.dynamics, band.box_size
    rotations, shifts, ctf = pose
    # The same integral sampled by fewer, larger pixels.
    transfer = contrast * (model.box_size / box) * band.weights
    if ctf is not None:
        transfer = transfer * _crop_spectrum(ctf, box)
    positions = microscope.image_positions(dynamics.decode(latents), rotations, shifts)
    spectrum = _real_parts(microscope.spectrum(positions, transfer, width, box))
    jacobian = latents.new_empty(len(latents), model.n_latents, spectrum.shape[1])
    for chain, layout in enumerate(dynamics.chains):
        of_chain = width[:, layout.atoms] if isinstance(width, Tensor) else width
        steps = microscope.tangent_spectra(
            positions[:, layout.atoms],
            dynamics.tangents(latents, chain, rotations[:, :2]),
            layout.atoms,
            transfer,
            of_chain,
            box,
        )
        jacobian[:, layout.latents] = _real_parts(steps)
    data = spectrum
    if images is not None:
        observed = _crop_spectrum(torch.fft.rfft2(images, norm="ortho"), box)
        data = _real_parts(observed * (band.weights * band.low_pass))
    residual = data - spectrum
    return NormalEquations(
        torch.bmm(jacobian, jacobian.transpose(1, 2)),
        (jacobian @ residual.unsqueeze(-1)).squeeze(-1),
        residual.square().sum(1),
        (data * spectrum).sum(1),
        spectrum.square().sum(1),
    )


def _real_parts(spectrum: Tensor) -> Tensor:
    """Complex (…, box, box//2 + 1) → real (…, box·(box + 2)): real and imaginary side by side."""
    return torch.view_as_real(spectrum).flatten(-3)


@torch.no_grad()
def position_variance(
    dynamics: Dynamics, latents: Tensor, rotations: Tensor, covariance: Tensor
) -> Tensor:
    """(b, n_atoms) Å², variance of an atom's position along an axis of the image; limited.

    Of `latents` (b, p) with posterior `covariance` (b, p, p), seen from `rotations` (b, 3, 3).
    """
    parts = []
    for chain, layout in enumerate(dynamics.chains):
        steps = dynamics.tangents(latents, chain, rotations[:, :2]).flatten(2)
        of_chain = covariance[:, layout.latents, layout.latents].to(steps.dtype)
        squares = ((of_chain @ steps) * steps).sum(1)
        parts.append(squares.view(len(latents), -1, 2).mean(-1))
    return torch.cat(parts, dim=1).clamp(0, MAX_ATOM_SIGMA**2)


@torch.no_grad()
def measure_contrast(model: Model, particles: ParticleStack, n: int = 500) -> float:
    """Brightness of the images over the reference's projections, by regression on up to `n`.

    Raises
    ------
    ValueError
        When the regression is negative: the images are protein-dark.
    """
    microscope = model.microscope
    step = -(-len(particles) // n)
    low_pass = gaussian_transfer(
        model.box_size, model.pixel_size, _REFERENCE_BLUR, microscope.device
    )
    overlap = 0.0
    power = 0.0
    for batch in particles[::step].batches(64, device=microscope.device):
        coords = model.dynamics.reference.expand(len(batch), -1, -1)
        expected = microscope.render(coords, *batch.pose, blur=_REFERENCE_BLUR)
        expected = expected - expected.mean(dim=(-2, -1), keepdim=True)
        overlap += float((filter_images(batch.images, low_pass) * expected).sum())
        power += float((expected * expected).sum())
    require_bright_protein(overlap)
    return overlap / power


def require_bright_protein(overlap: float) -> None:
    """Raise ValueError when images are the negative of the model."""
    if overlap <= 0:
        raise ValueError(
            "expected protein-bright images, got images that look like the negative of the "
            "reference; try load_particles(…, invert=True), and check that the poses belong to "
            "this structure"
        )


def map_blocks(
    function: Callable[[_Item], _Answer], blocks: list[_Item], device: torch.device
) -> list[_Answer]:
    """``[function(block) for block in blocks]``; on a CPU one thread takes a whole block.

    Without gradients. Threads that share every small operation wait for each other after each: on a
    machine with other work to do that took forty times as long, and on an idle one half as long
    again.
    """
    threads = torch.get_num_threads()
    # A thread has a gradient mode of its own.
    work = partial(_without_gradients, function)
    if device.type != "cpu" or threads == 1 or len(blocks) == 1:
        return [work(block) for block in blocks]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(work, blocks))
    finally:
        torch.set_num_threads(threads)


def _without_gradients(function: Callable[[_Item], _Answer], block: _Item) -> _Answer:
    with torch.no_grad():
        return function(block)
