"""Projection of atoms onto images, and its derivatives; filters, random poses and noise.

Symbols of the paper (Eq. 3): V → a sum of Gaussians, R → `rotations`, Π → projection along z. The
CTF is in `ctf`; the noise ε is drawn where particles are simulated.

A Gaussian is separable, so an image of n atoms is one matrix product, image = Gyᵀ Gx with G
(n_atoms, box), and its gradient is two more: 2·n·box² multiply-adds forward, twice that backward. A
GPU takes these; a CPU visits the few pixels that each atom touches (`scatter`).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._arguments import Count, Seed, checked

# exp of very negative numbers underflows, and matrix products of denormal numbers are 30 times
# slower on a CPU. e⁻²⁵ is zero beside 1 in float32, and the products of two such with amplitudes
# and tangents are still normal numbers.
MIN_EXPONENT = -25.0
# Gaussians of one chunk stay in the cache, and memory does not grow with the molecule.
ATOMS_PER_CHUNK = 4096


def pixel_grid(box_size: int, pixel_size: float, like: Tensor) -> Tensor:
    """(box_size,) coordinate of each pixel in Å; the origin is pixel ``box_size // 2``.

    Examples
    --------
    >>> pixel_grid(4, 1.5, like=torch.zeros(1)).tolist()
    [-3.0, -1.5, 0.0, 1.5]
    """
    pixels = torch.arange(box_size, device=like.device, dtype=like.dtype)
    return (pixels - box_size // 2) * pixel_size


def gaussians(coordinates: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
    """(…, n, box) value of exp(−(grid − x)² / 2σ²) of each atom at each pixel of one axis.

    `coordinates` (…, n) and `grid` (box,) in Å; `sigma` in Å, one or (…, n).
    """
    exponent = (grid - coordinates.unsqueeze(-1)).square_()
    exponent *= -0.5 / (sigma.unsqueeze(-1) if isinstance(sigma, Tensor) else sigma) ** 2
    return exponent.clamp_(min=MIN_EXPONENT).exp_()


class _Project(torch.autograd.Function):
    """Σ_a w_a gy_a ⊗ gx_a, with the gradient written out.

    Automatic differentiation would pass seven times over the Gaussians.
    """

    @staticmethod
    def forward(ctx, xy: Tensor, amplitudes: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
        x, y = xy.unbind(-1)
        gx = gaussians(x, grid, sigma)
        gy = gaussians(y, grid, sigma)
        ctx.save_for_backward(xy, amplitudes, gx, gy, grid)
        ctx.sigma = sigma
        return torch.bmm((gy * amplitudes.unsqueeze(-1)).transpose(1, 2), gx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        xy, amplitudes, gx, gy, grid = ctx.saved_tensors
        # d gx/dx = gx·(grid − x)/σ²: a sum over pixels with weights `grid` and 1 gives both terms.
        moments = torch.stack([grid, torch.ones_like(grid)], dim=1)
        by_x = torch.bmm(gy, grad.to(gy.dtype)).mul_(gx) @ moments
        by_y = torch.bmm(gx, grad.to(gx.dtype).transpose(1, 2)).mul_(gy) @ moments
        by_axis = torch.stack([by_x, by_y], dim=-2)
        factor = amplitudes / (ctx.sigma**2)
        grad_xy = (by_axis[..., 0] - xy * by_axis[..., 1]) * factor.unsqueeze(-1)
        return grad_xy, by_x[..., 1], None, None


class _ScatterAtoms(torch.autograd.Function):
    """What `_Project` gives, on a CPU: each atom at the few pixels that it touches."""

    @staticmethod
    def forward(ctx, xy: Tensor, amplitudes: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
        # numba takes 60 MB and a tenth of a second.
        from .scatter import scatter_atoms

        ctx.save_for_backward(xy, amplitudes, grid, sigma)
        return scatter_atoms(xy, amplitudes, grid, sigma)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        from .scatter import gather_atoms

        xy, amplitudes, grid, sigma = ctx.saved_tensors
        sums = gather_atoms(grad.to(xy.dtype), xy, grid, sigma)
        factor = amplitudes / sigma.square()
        return sums[..., 1:] * factor.unsqueeze(-1), sums[..., 0], None, None


def project(
    coords: Tensor, weights: Tensor, box_size: int, pixel_size: float, sigma: float | Tensor
) -> Tensor:
    """(batch, box, box) projection along z of Gaussians at `coords`, as density per Å².

    Parameters
    ----------
    coords : (batch, n_atoms, 3) or (batch, n_atoms, 2) tensor
        Already rotated, in Å, relative to the centre of the box.
    weights : (n_atoms,) tensor
        Scattering of each atom.
    box_size : int
        Pixels a side.
    pixel_size : float
        Å.
    sigma : float or (batch, n_atoms) tensor
        Width of the Gaussians in Å; the projection has no derivative by it.

    Notes
    -----
    The potential of the paper's Appendix B as a sum of isotropic Gaussians, integrated along z.

    Examples
    --------
    >>> image = project(torch.zeros(1, 1, 3), torch.ones(1), box_size=32, pixel_size=2.0, sigma=3.0)
    >>> round(float(image.sum() * 2.0**2), 4)
    1.0
    """
    xy = coords[..., :2]
    grid = pixel_grid(box_size, pixel_size, xy)
    amplitudes = (weights / (2 * torch.pi * sigma**2)).to(xy.dtype).expand(xy.shape[:2])
    if xy.device.type == "cpu":
        widths = torch.as_tensor(sigma, dtype=xy.dtype).expand(xy.shape[:2])
        return _ScatterAtoms.apply(xy, amplitudes, grid, widths)

    def part(start: int) -> Tensor:
        chunk = slice(start, start + ATOMS_PER_CHUNK)
        widths = sigma[:, chunk] if isinstance(sigma, Tensor) else sigma
        return _Project.apply(xy[:, chunk], amplitudes[:, chunk], grid, widths)

    image = part(0)
    for start in range(ATOMS_PER_CHUNK, xy.shape[1], ATOMS_PER_CHUNK):
        image = image + part(start)
    return image


def transform_tangents(
    xy: Tensor,
    tangents: Tensor,
    weights: Tensor,
    box_size: int,
    pixel_size: float,
    sigma: float | Tensor,
    transfer: Tensor,
    columns: Tensor | None = None,
) -> Tensor:
    """(batch, box·(box + 2), k) derivative of the projection's spectrum along each of k tangents.

    Parameters
    ----------
    xy : (batch, n_atoms, 2) tensor
        Positions on the image, Å from its centre.
    tangents : (batch, k, n_atoms, 2) tensor
        Å by which each atom moves for one unit of latent k.
    weights, box_size, pixel_size, sigma
        As of `project`.
    transfer : (box, box//2 + 1) or (batch, box, box//2 + 1) tensor
        What the spectrum, orthonormal as of ``rfft2``, is multiplied by.
    columns : (batch, box·(box + 2), k) tensor, optional
        Where the answer is written, such as some columns of a Jacobian: fresh memory costs a CPU as
        much as the sums.

    Returns
    -------
    tensor
        Real and imaginary parts as `torch.view_as_real` has them, all k of a frequency side by
        side.

    Notes
    -----
    An atom touches few pixels, and a CPU visits only those (`scatter`); the pixels that no atom
    touches are left out of the transform, which is two matrix products. A GPU takes all of them, in
    one matrix product of inner size 2·n_atoms for all k.

    Examples
    --------
    >>> xy, move_right = torch.zeros(1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    >>> columns = transform_tangents(
    ...     xy, move_right, torch.ones(1), 32, 2.0, sigma=3.0, transfer=torch.ones(32, 17)
    ... )
    >>> columns.shape, bool(columns[0, :2, 0].abs().max() < 1e-6)
    (torch.Size([1, 1088, 1]), True)
    """
    k, half = tangents.shape[1], box_size // 2 + 1
    transfer = transfer.to(xy.dtype).expand(len(xy), -1, -1)
    if columns is None:
        columns = xy.new_empty(len(xy), 2 * half * box_size, k)
    if xy.device.type != "cpu":
        images = project_tangents(xy, tangents, weights, box_size, pixel_size, sigma)
        spectra = torch.fft.rfft2(images, norm="ortho").mul_(transfer.unsqueeze(1))
        return columns.copy_(torch.view_as_real(spectra).flatten(-3).mT)
    # numba takes 60 MB and a tenth of a second, and only derivatives need it.
    from .scatter import join_waves

    waves = _waves(box_size, xy.dtype)
    both = xy.new_empty(2 * half, 2 * half, k)
    parts = both.view(2, half, 2, half, k).numpy()
    heights = (transfer / box_size).contiguous().numpy()
    answers = columns.view(len(xy), box_size, half, 2, k).numpy()
    windows = _scattered(xy, tangents, weights, box_size, pixel_size, sigma)
    for image, (sums, rows, touched) in enumerate(windows):
        along_y = (waves[:, rows] @ sums.flatten(1)).view(2 * half, -1, k)
        torch.bmm(waves[:, touched].expand(2 * half, -1, -1), along_y, out=both)
        join_waves(parts, heights[image], answers[image])
    return columns


@lru_cache(maxsize=8)
def _waves(box_size: int, dtype: torch.dtype) -> Tensor:
    """(box + 2, box) cosines, then sines, of every frequency not below zero at each pixel."""
    cycles = torch.outer(torch.arange(box_size // 2 + 1), torch.arange(box_size)) % box_size
    angles = cycles.double() * (2 * torch.pi / box_size)
    return torch.cat([angles.cos(), angles.sin()]).to(dtype)


def project_tangents(
    xy: Tensor,
    tangents: Tensor,
    weights: Tensor,
    box_size: int,
    pixel_size: float,
    sigma: float | Tensor,
) -> Tensor:
    """(batch, k, box, box) derivative of the projection; arguments as of `transform_tangents`.

    Examples
    --------
    >>> xy, move_right = torch.zeros(1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    >>> slope = project_tangents(xy, move_right, torch.ones(1), 32, 2.0, sigma=3.0)[0, 0]
    >>> bool(slope[16, 17] > 0), bool(slope[16, 15] < 0)
    (True, True)
    """
    if xy.device.type != "cpu":
        return _multiply(xy, tangents, weights, box_size, pixel_size, sigma)
    images = xy.new_zeros(len(xy), tangents.shape[1], box_size, box_size)
    windows = _scattered(xy, tangents, weights, box_size, pixel_size, sigma)
    for image, (sums, rows, columns) in zip(images, windows, strict=True):
        image[:, rows, columns] = sums.permute(2, 0, 1)
    return images


def _scattered(
    xy: Tensor,
    tangents: Tensor,
    weights: Tensor,
    box_size: int,
    pixel_size: float,
    sigma: float | Tensor,
) -> Iterator[tuple[Tensor, slice, slice]]:
    """`scatter_tangents` of projections as of `project`."""
    from .scatter import scatter_tangents

    widths = torch.as_tensor(sigma, dtype=xy.dtype).expand(xy.shape[:2])
    amplitudes = weights.to(xy.dtype) / (2 * torch.pi * widths**4)
    grid = pixel_grid(box_size, pixel_size, xy)
    return scatter_tangents(xy, tangents.to(xy.dtype), amplitudes, grid, widths)


def _multiply(
    xy: Tensor,
    tangents: Tensor,
    weights: Tensor,
    box_size: int,
    pixel_size: float,
    sigma: float | Tensor,
) -> Tensor:
    """(batch, k, box, box) what `project_tangents` gives, from all pixels of all atoms."""
    batch, k, n, _ = tangents.shape
    grid = pixel_grid(box_size, pixel_size, xy)
    amplitudes = weights / (2 * torch.pi * sigma**4)
    x, y = xy.unbind(-1)
    gx = gaussians(x, grid, sigma)
    gy = gaussians(y, grid, sigma).mul_(amplitudes.to(xy.dtype).unsqueeze(-1))
    right = torch.cat([gx * (grid - x.unsqueeze(-1)), gx], dim=1)
    gy = torch.stack([gy, gy * (grid - y.unsqueeze(-1))], dim=1)
    left = xy.new_empty(batch, 2, n, k, box_size)
    torch.mul(gy.unsqueeze(3), tangents.permute(0, 3, 2, 1).unsqueeze(-1), out=left)
    left = left.view(batch, 2 * n, k * box_size)
    return torch.bmm(left.transpose(1, 2), right).view(batch, k, box_size, box_size)


def filter_images(images: Tensor, transfer: Tensor) -> Tensor:
    """(…, box, box) `images` filtered by `transfer`, a real filter on the grid of ``rfft2``.

    Parameters
    ----------
    images : (…, box, box) tensor
    transfer : (…, box, box//2 + 1) tensor
        Such as `CTF.evaluate` or `gaussian_transfer` give.

    Examples
    --------
    >>> image = torch.eye(8)
    >>> torch.allclose(filter_images(image, torch.ones(8, 5)), image, atol=1e-6)
    True
    """
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def gaussian_transfer(
    box_size: int, pixel_size: float, blur: float, device: torch.device | str | None = None
) -> Tensor:
    """(box, box//2 + 1) transfer of a blur by a Gaussian of width `blur` Å: exp(−2π²·blur²·f²).

    Examples
    --------
    >>> transfer = gaussian_transfer(64, 2.0, blur=3.0)
    >>> transfer.shape, float(transfer[0, 0])
    (torch.Size([64, 33]), 1.0)
    """
    fy = torch.fft.fftfreq(box_size, pixel_size, device=device)
    fx = torch.fft.rfftfreq(box_size, pixel_size, device=device)
    exponent = -2 * torch.pi**2 * blur**2 * (fy[:, None] ** 2 + fx**2)
    return torch.exp(exponent.clamp_(min=MIN_EXPONENT))


@checked
def random_rotations(n: Count, seed: Seed) -> Tensor:
    """(n, 3, 3) float32 rotations, uniform on SO(3) and reproducible.

    Examples
    --------
    >>> random_rotations(5, seed=0).shape
    torch.Size([5, 3, 3])
    """
    generator = torch.Generator().manual_seed(seed)
    quaternions = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    x, y, z, w = torch.nn.functional.normalize(quaternions, dim=1).unbind(1)
    rows = [
        [x * x - y * y - z * z + w * w, 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), -x * x + y * y - z * z + w * w, 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), -x * x - y * y + z * z + w * w],
    ]
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2).float()


def noise_std_for_snr(images: Tensor, snr_db: float) -> float:
    """Standard deviation of the noise that gives `snr_db` decibels beside (n, box, box) `images`.

    snr_db = 10·log10(signal variance / noise variance). The variance of the signal is taken over
    the pixels of each image and averaged over the images.

    Examples
    --------
    >>> images = torch.randn(8, 64, 64, generator=torch.Generator().manual_seed(0))
    >>> round(noise_std_for_snr(images, snr_db=20.0), 2)
    0.1
    """
    return float((images.var(dim=(-2, -1)).mean() / 10 ** (snr_db / 10)).sqrt())
