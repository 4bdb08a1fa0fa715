"""The images' likelihood, linearised: analytic Jacobian, normal equations, powers on rings.

Symbols: y → image, f(z) → `Model.render` at brightness 1, J = ∂f/∂z, a → brightness of a particle.
The equations hold for every a: with H = JᵀJ → `hessian`, Jᵀy → `data_slope`, Jᵀf → `model_slope`,

    ‖y − a f(z + δ)‖² ≈ ‖y‖² − 2a ⟨y, f⟩ + a² ⟨f, f⟩ − 2 (a Jᵀy − a² Jᵀf)ᵀ δ + a² δᵀ H δ

Everything is summed in Fourier space (Parseval), so the CTF costs one product and no inverse
transform, and noise that is not white is divided by its amplitude at each frequency. The mean of an
image is left out: particle extraction normalises it away.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from .._processes import gather_answers, own_share
from ..images import gaussian_transfer
from ..model import Dynamics, Microscope, Model, Population

_Item = TypeVar("_Item")
_Answer = TypeVar("_Answer")

# Of one block of Jacobians: small enough for a CPU's cache, large enough to fill a GPU.
BLOCK_BYTES = {"cpu": 2**23, "cuda": 2**31}
# Å, no atom is drawn wider for being uncertain: without a limit, atoms of loose ends would be drawn
# so wide that the images say nothing of them, wherever the model does not fit.
MAX_ATOM_SIGMA = 4.0
# Of the latents' products, which are symmetric: so many panels, and so wide at least.
_PANELS = 4
_LEAST_PANEL = 32
# Pixels of a blurred image, in widths of a blurred atom: at its Nyquist frequency 10⁻⁵ of an atom
# is left.
_COARSE_PIXEL = 0.65


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Of b particles at brightness 1, not yet divided by the noise variance.

    Powers are summed over rings of frequencies one Fourier pixel wide, R = box // 2 + 1 of them;
    the last one also holds the corners.

    Attributes
    ----------
    hessian : (b, p, p) tensor
    data_slope : (b, p) tensor
        Jᵀy.
    model_slope : (b, p) tensor
        Jᵀf.
    data_power : (b, R) tensor
        ‖y‖² on each ring.
    overlap : (b, R) tensor
        ⟨y, f⟩.
    model_power : (b, R) tensor
        ⟨f, f⟩.
    sampled_power : (b, R) tensor or None
        ‖y − a (f + J δ)‖² at the steps that `normal_equations` was given.
    """

    hessian: Tensor
    data_slope: Tensor
    model_slope: Tensor
    data_power: Tensor
    overlap: Tensor
    model_power: Tensor
    sampled_power: Tensor | None = None

    def known(self) -> list[str]:
        """Names of the tensors that are not None."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def __getitem__(self, rows) -> "NormalEquations":
        return replace(self, **{name: getattr(self, name)[rows] for name in self.known()})

    def gradient(self, scale: Tensor | float = 1.0) -> Tensor:
        """(b, p) a Jᵀ(y − a f) at brightnesses (b,)."""
        a = torch.as_tensor(scale).to(self.hessian).reshape(-1, 1)
        return a * self.data_slope - a.square() * self.model_slope

    def residual(self, scale: Tensor | float = 1.0) -> Tensor:
        """(b,) ‖y − a f‖² at brightnesses (b,)."""
        a = torch.as_tensor(scale).to(self.hessian)
        powers = (self.data_power, self.overlap, self.model_power)
        data, overlap, model = (rings.double().sum(1) for rings in powers)
        return (data - 2 * a * overlap + a.square() * model).to(self.hessian)


# Of some particles, by their slice of the batch: steps (b, p) from the linearised equations, and
# brightnesses (b,).
Sampler = Callable[[slice, NormalEquations], tuple[Tensor, Tensor]]


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
    ring : (box, box//2 + 1) int64 tensor
        Which ring a coefficient is on.
    n_rings : int
    """

    box_size: int
    weights: Tensor
    low_pass: Tensor
    ring: Tensor
    n_rings: int

    @cached_property
    def ring_pixels(self) -> Tensor:
        """(R,) float64: ‖white noise‖² on a ring divided by it is the variance of the noise."""
        squares = (self.weights * self.low_pass).double().square().flatten()
        return squares.new_zeros(self.n_rings).index_add_(0, self.ring.flatten(), squares)

    @cached_property
    def n_pixels(self) -> float:
        """`ring_pixels` of all rings."""
        return float(self.ring_pixels.sum())

    @cached_property
    def n_independent(self) -> float:
        """So many independent pixels tell a variance as exactly as those of a blurred image do."""
        fourth = (self.weights.double() * self.low_pass.double().square()).square()
        return self.n_pixels**2 / float(fourth.sum())

    def sum_rings(self, products: Tensor) -> Tensor:
        """(b, R) sums over rings of (b, box·(box + 2)) products of real parts."""
        of_parts = self.ring.flatten().repeat_interleave(2)
        sums = products.new_zeros(len(products), self.n_rings)
        return sums.index_add_(1, of_parts, products)


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
        low_pass = crop_spectrum(whole, box)
    n_rings = full // 2 + 1
    radius = torch.hypot(
        torch.fft.fftfreq(box, 1 / box, device=microscope.device)[:, None],
        torch.fft.rfftfreq(box, 1 / box, device=microscope.device),
    )
    ring = radius.round().long().clamp_(max=n_rings - 1)
    return _FrequencyBand(box, weights.sqrt(), low_pass, ring, n_rings)


def crop_spectrum(spectrum: Tensor, box: int) -> Tensor:
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
    noise_spectrum: Tensor | None = None,
    blur: float = 0.0,
    variance: Tensor | None = None,
    sampler: Sampler | None = None,
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
    noise_spectrum : (R,) or (b, R) tensor, optional
        Variance of the noise on each ring of frequencies, relative to the mean over all pixels;
        None for white noise.
    blur : float
        Å. Images and model are compared after a Gaussian blur: less information, but no local
        minimum within it.
    variance : (b, n_beads) tensor, optional
        Å², of every bead's position on the image (see `position_variance`). An uncertain bead is
        drawn as wide as that, which is the image expected of it: a loose end that cannot be seen
        then neither follows noise nor hides what could be seen.
    sampler : function, optional
        Gives steps of the latents, and brightnesses, at which `NormalEquations.sampled_power` is
        computed; see `Sampler`.

    Returns
    -------
    NormalEquations
    """
    band = frequency_band(model.microscope, blur)
    n, n_numbers = len(latents), band.box_size * (band.box_size + 2)
    bytes_each = 4 * n_numbers * model.n_latents
    if latents.is_cuda:
        # A GPU takes all pixels of all beads of a chain.
        largest = max(layout.n_atoms for layout in model.bead_dynamics.chains)
        bytes_each += 8 * band.box_size * model.n_latents * largest
    block = max(1, BLOCK_BYTES["cuda" if latents.is_cuda else "cpu"] // bytes_each)
    blocks = [slice(start, min(start + block, n)) for start in range(0, n, block)]

    def linearise(rows: slice, jacobian: Tensor) -> NormalEquations:
        return _linearise_block(
            model,
            None if images is None else images[rows],
            tuple(None if part is None else part[rows] for part in pose),
            latents[rows],
            band.weights * _whitening(band, noise_spectrum, rows),
            band,
            blur,
            None if variance is None else variance[rows],
            None if sampler is None else partial(sampler, rows),
            jacobian,
        )

    def linearise_share(share: list[slice]) -> list[NormalEquations]:
        # Memory that is asked for anew is cleared by the system, which takes as long as the sums.
        memory = latents.new_empty(min(block, n), n_numbers, model.n_latents)
        return [linearise(rows, memory[: rows.stop - rows.start]) for rows in share]

    n_shares = torch.get_num_threads() if latents.device.type == "cpu" else 1
    shares = [blocks[start::n_shares] for start in range(min(n_shares, len(blocks)))]
    answers = map_blocks(linearise_share, shares, latents.device)
    parts = [answers[number % len(shares)][number // len(shares)] for number in range(len(blocks))]
    return join_equations(parts)


@torch.no_grad()
def image_powers(
    model: Model,
    images: Tensor,
    pose: tuple,
    latents: Tensor,
    *,
    noise_spectrum: Tensor | None = None,
    blur: float = 0.0,
    variance: Tensor | None = None,
) -> Tensor:
    """(b, 3) float64 ‖y‖², ⟨y, f⟩ and ⟨f, f⟩ at `latents`, as of `normal_equations`.

    No derivative is computed, which takes a small part of the time.
    """
    band = frequency_band(model.microscope, blur)

    def compare(rows: slice) -> Tensor:
        microscope, box = model.microscope, band.box_size
        rotations = pose[0][rows]
        shifts, ctf = (None if part is None else part[rows] for part in pose[1:])
        weights = band.weights * _whitening(band, noise_spectrum, rows)
        transfer = (model.box_size / box) * weights
        if ctf is not None:
            transfer = transfer * crop_spectrum(ctf, box)
        coords = model.bead_dynamics.decode(latents[rows])
        positions = microscope.image_positions(coords, rotations, shifts)
        own = None if variance is None else variance[rows]
        expected = real_parts(
            microscope.spectrum(positions, transfer, blur=blur, variance=own, box_size=box)
        ).double()
        observed = crop_spectrum(torch.fft.rfft2(images[rows], norm="ortho"), box)
        data = real_parts(observed * (weights * band.low_pass)).double()
        products = (data.square(), data * expected, expected.square())
        return torch.stack([product.sum(1) for product in products], dim=1)

    n = len(latents)
    blocks = [slice(start, min(start + 8, n)) for start in range(0, n, 8)]
    return torch.cat(map_blocks(compare, blocks, latents.device))


def join_equations(parts: Sequence[NormalEquations]) -> NormalEquations:
    """The equations of all particles, from those of blocks of them."""
    names = parts[0].known()
    return NormalEquations(
        **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    )


def information_of(
    equations: NormalEquations, scale: Tensor, noise_std: Tensor, population: Population
) -> Tensor:
    """(b, p, p) float64 what images say of the latents, where brightness is not known either.

    From equations of the model's own images, brightnesses and noise (b,). The Fisher information of
    latents and log brightness, from which the brightness is taken out: what could be either tells
    less of the latents.
    """
    weight = (scale.double() / noise_std.double()).square()
    slope = weight[:, None] * equations.model_slope.double()
    of_scale = weight * equations.model_power.double().sum(1) + 1 / population.contrast_spread**2
    lost = slope.unsqueeze(2) * slope.unsqueeze(1) / of_scale[:, None, None]
    return weight[:, None, None] * equations.hessian.double() - lost


def _whitening(band: _FrequencyBand, noise_spectrum: Tensor | None, rows: slice) -> Tensor | float:
    """(box, box//2 + 1), or one a particle: what divides noise by its amplitude."""
    if noise_spectrum is None:
        return 1.0
    of_rows = noise_spectrum if noise_spectrum.ndim == 1 else noise_spectrum[rows]
    return of_rows.rsqrt()[..., band.ring].to(band.weights.dtype)


def _linearise_block(
    model: Model,
    images: Tensor | None,
    pose: tuple,
    latents: Tensor,
    weights: Tensor,
    band: _FrequencyBand,
    blur: float,
    variance: Tensor | None,
    sampler: Callable[[NormalEquations], tuple[Tensor, Tensor]] | None,
    jacobian: Tensor,
) -> NormalEquations:
    """Normal equations of so few particles that their Jacobian fits the working memory.

    It is written into `jacobian` (b, box·(box + 2), p).
    """
    microscope, dynamics, box = model.microscope, model.bead_dynamics, band.box_size
    rotations, shifts, ctf = pose
    # The same integral sampled by fewer, larger pixels.
    transfer = (model.box_size / box) * weights
    if ctf is not None:
        transfer = transfer * crop_spectrum(ctf, box)
    positions = microscope.image_positions(dynamics.decode(latents), rotations, shifts)
    expected = microscope.spectrum(positions, transfer, blur=blur, variance=variance, box_size=box)
    spectrum = real_parts(expected)
    for chain, layout in enumerate(dynamics.chains):
        microscope.tangent_spectra(
            positions[:, layout.atoms],
            dynamics.tangents(latents, chain, rotations[:, :2]),
            layout.atoms,
            transfer,
            blur=blur,
            variance=None if variance is None else variance[:, layout.atoms],
            box_size=box,
            columns=jacobian[:, :, layout.latents],
        )
    data = spectrum
    if images is not None:
        observed = crop_spectrum(torch.fft.rfft2(images, norm="ortho"), box)
        data = real_parts(observed * (weights * band.low_pass))
    slopes = torch.stack([data, spectrum], dim=1) @ jacobian
    equations = NormalEquations(
        _products(jacobian),
        # Equal to the last bit where there are no images.
        slopes[:, 0 if images is not None else 1],
        slopes[:, 1],
        band.sum_rings(data.square()),
        band.sum_rings(data * spectrum),
        band.sum_rings(spectrum.square()),
    )
    if sampler is None:
        return equations
    step, scale = sampler(equations)
    moved = spectrum + (jacobian @ step.unsqueeze(2)).squeeze(2)
    sampled = band.sum_rings((data - scale.unsqueeze(1) * moved).square())
    return replace(equations, sampled_power=sampled)


def _products(columns: Tensor) -> Tensor:
    """(b, p, p) products of (b, n, p) columns with each other, each pair of panels once."""
    p = columns.shape[2]
    products = columns.new_empty(len(columns), p, p)
    width = max(_LEAST_PANEL, math.ceil(p / _PANELS))
    for start in range(0, p, width):
        panel = slice(start, start + width)
        before = columns[:, :, : panel.stop].mT @ columns[:, :, panel]
        products[:, : panel.stop, panel] = before
        products[:, panel, :start] = before[:, :start].mT
    return products


def real_parts(spectrum: Tensor) -> Tensor:
    """Complex (…, box, box//2 + 1) → real (…, box·(box + 2)): real and imaginary side by side."""
    return torch.view_as_real(spectrum).flatten(-3)


@torch.no_grad()
def position_variance(
    dynamics: Dynamics, latents: Tensor, rotations: Tensor, covariance: Tensor
) -> Tensor:
    """(b, n_atoms) Å², variance of an atom's position along an axis of the image; limited.

    Of `latents` (b, p) with posterior `covariance` (b, p, p), seen from `rotations` (b, 3, 3).
    """
    n = len(latents)
    n_beads = dynamics.chains[-1].atoms.stop
    bytes_each = 8 * n_beads * dynamics.chains[-1].latents.stop
    block = max(1, BLOCK_BYTES["cuda" if latents.is_cuda else "cpu"] // bytes_each)
    variances = latents.new_empty(n, n_beads)
    for start in range(0, n, block):
        rows = slice(start, start + block)
        for chain, layout in enumerate(dynamics.chains):
            tangents = dynamics.tangents(latents[rows], chain, rotations[rows, :2])
            # Axes of the image one after the other, all latents of an atom side by side.
            steps = tangents.permute(0, 3, 2, 1).flatten(1, 2)
            of_chain = covariance[rows, layout.latents, layout.latents].to(steps.dtype)
            squares = (steps @ of_chain).mul_(steps).sum(2)
            variances[rows, layout.atoms] = squares.view(len(steps), 2, -1).mean(1)
    return variances.clamp_(0, MAX_ATOM_SIGMA**2)


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


def map_shared(
    function: Callable[[_Item], _Answer], blocks: list[_Item], device: torch.device
) -> list[_Answer]:
    """As `map_blocks`, with the blocks shared between processes; every one gets all answers."""
    own = blocks[own_share(len(blocks))]
    return gather_answers(map_blocks(function, own, device) if own else [], device)


def _without_gradients(function: Callable[[_Item], _Answer], block: _Item) -> _Answer:
    with torch.no_grad():
        return function(block)
