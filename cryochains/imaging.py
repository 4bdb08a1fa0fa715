"""Image formation: coordinates → projection → CTF → shift → noise (Eq. 3). Knows nothing of chains.

Symbols of the paper: V → a sum of Gaussians, R → `rotations`, Π → projection along z, t → `shifts`,
PSF → `ctf` (in Fourier space); ε is drawn where particles are simulated.

A Gaussian is separable, so an image of n atoms is one matrix product, image = Gyᵀ Gx with G (n_atoms, box),
and its gradient is two more. That is the floor: 2·n·box² multiply-adds forward, twice that backward.
"""

import math
from dataclasses import dataclass, fields

import numpy as np
import roma
import torch
from scipy.sparse import csc_array
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch_ctf import calculate_ctf_2d

# exp of very negative numbers underflows, and matrix products of denormal numbers are 30 times slower on a CPU. e⁻²⁵ is
# zero beside 1 in float32, and the products of two such with amplitudes and tangents are still normal numbers.
MIN_EXPONENT = -25.0
# Widths from its centre at which an atom ends where only its pixels are visited: e⁻⁸ of its height.
REACH = 4.0
# Gaussians of one chunk stay in the cache, and memory does not grow with the molecule.
ATOMS_PER_CHUNK = 4096


def pixel_grid(box_size: int, pixel_size: float, like: Tensor) -> Tensor:
    """(box_size,) position of each pixel in Å; the origin is pixel ``box_size // 2``."""
    return (torch.arange(box_size, device=like.device, dtype=like.dtype) - box_size // 2) * pixel_size


def gaussians(positions: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
    """(…, n, box) value of exp(−(grid − position)² / 2σ²) of each atom at each pixel of one axis; `sigma` (…, n)."""
    exponent = (grid - positions.unsqueeze(-1)).square_()
    exponent *= -0.5 / (sigma.unsqueeze(-1) if isinstance(sigma, Tensor) else sigma) ** 2
    return exponent.clamp_(min=MIN_EXPONENT).exp_()


class _Project(torch.autograd.Function):
    """Σ_a w_a gy_a ⊗ gx_a, with the gradient written out: autograd would pass seven times over the Gaussians."""

    @staticmethod
    def forward(ctx, xy: Tensor, amplitudes: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
        x, y = xy.unbind(-1)
        gx = gaussians(x, grid, sigma)
        gy = gaussians(y, grid, sigma).mul_(amplitudes.unsqueeze(-1))
        ctx.save_for_backward(xy, gx, gy, grid)
        ctx.sigma = sigma
        return torch.bmm(gy.transpose(1, 2), gx)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        xy, gx, gy, grid = ctx.saved_tensors
        # d gx/dx = gx·(grid − x)/σ²: a sum over pixels with the weights `grid` and 1 gives both terms.
        moments = torch.stack([grid, torch.ones_like(grid)], dim=1)
        by_x = torch.bmm(gy, grad.to(gy.dtype)).mul_(gx) @ moments
        by_y = torch.bmm(gx, grad.to(gx.dtype).transpose(1, 2)).mul_(gy) @ moments
        by_axis = torch.stack([by_x, by_y], dim=-2)
        sigma = ctx.sigma.unsqueeze(-1) if isinstance(ctx.sigma, Tensor) else ctx.sigma
        grad_xy = (by_axis[..., 0] - xy * by_axis[..., 1]) / sigma**2
        return grad_xy, None, None, None


def project(coords: Tensor, weights: Tensor, box_size: int, pixel_size: float, sigma: float | Tensor) -> Tensor:
    """(batch, box, box) projection along z of Gaussians at `coords`, as density per Å².

    Parameters
    ----------
    coords : (batch, n_atoms, 3) or (batch, n_atoms, 2) tensor
        Already rotated, in Å, relative to the centre of the box.
    weights : (n_atoms,) tensor
        Scattering of each atom.
    box_size, pixel_size, sigma
        Pixels, Å a pixel, and width of the Gaussians in Å: one, or (batch, n_atoms).

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
    amplitudes = (weights / (2 * torch.pi * sigma**2)).to(xy.dtype)
    image = None
    for start in range(0, xy.shape[1], ATOMS_PER_CHUNK):
        chunk = slice(start, start + ATOMS_PER_CHUNK)
        own = sigma[:, chunk] if isinstance(sigma, Tensor) else sigma
        part = _Project.apply(xy[:, chunk], amplitudes[..., chunk], grid, own)
        image = part if image is None else image + part
    return image


def project_tangents(
    xy: Tensor, tangents: Tensor, weights: Tensor, box_size: int, pixel_size: float, sigma: float | Tensor
) -> Tensor:
    """(batch, k, box, box) derivative of the projection when every atom moves along each of k tangents.

    `xy` (batch, n, 2) positions on the image and `tangents` (batch, k, n, 2), dxy of atom a for a unit of latent k. One
    matrix product of inner size 2n for all k. An atom touches few pixels, so on a CPU its matrix is a sparse one, which
    takes a fifth (64 px) to a twentieth (128 px) of the time; a GPU multiplies the dense one.
    """
    if xy.device.type != "cpu":
        return _multiply(xy, tangents, weights, box_size, pixel_size, sigma)
    widths = torch.as_tensor(sigma, dtype=xy.dtype).expand(xy.shape[:2])
    rows = zip(xy, tangents, widths, strict=True)
    return torch.stack([_scatter(x, t, weights.to(xy.dtype), box_size, pixel_size, width) for x, t, width in rows])


def _multiply(
    xy: Tensor, tangents: Tensor, weights: Tensor, box_size: int, pixel_size: float, sigma: float | Tensor
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


def _scatter(
    xy: Tensor, tangents: Tensor, weights: Tensor, box_size: int, pixel_size: float, sigma: Tensor
) -> Tensor:
    """(k, box, box) what `project_tangents` gives for one image, from the pixels within REACH widths of each atom."""
    k, n, _ = tangents.shape
    nearest = (xy / pixel_size).round()
    # Few window sizes: atoms of similar width share one.
    reach = 2 ** torch.log2(REACH * sigma / pixel_size).mul_(2).ceil_().div_(2)
    values, pixels, counts, order = [], [], [], []
    for r in reach.unique():
        atoms = torch.nonzero(reach == r).squeeze(1)
        steps = torch.arange(-math.ceil(float(r)), math.ceil(float(r)) + 1)
        index = nearest[atoms].long().unsqueeze(-1) + steps  # (m, 2, w) pixel from the centre
        away = index * pixel_size - xy[atoms].unsqueeze(-1)
        width = sigma[atoms, None, None]
        index += box_size // 2
        inside = (index >= 0) & (index < box_size)
        bell = torch.exp(-0.5 * (away / width) ** 2) * inside
        slope = bell * away
        (gx, gy), (sx, sy) = bell.unbind(1), slope.unbind(1)
        gy, sy = (part * (weights[atoms, None] / (2 * torch.pi * sigma[atoms, None] ** 4)) for part in (gy, sy))
        values += [(gy.unsqueeze(2) * sx.unsqueeze(1)).flatten(), (sy.unsqueeze(2) * gx.unsqueeze(1)).flatten()]
        index.clamp_(0, box_size - 1)
        where = (index[:, 1].unsqueeze(2) * box_size + index[:, 0].unsqueeze(1)).int().flatten()
        pixels += [where, where]
        counts += [len(steps) ** 2] * (2 * len(atoms))
        order += [2 * atoms, 2 * atoms + 1]
    edges = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    shape = (box_size**2, 2 * n)
    matrix = csc_array((torch.cat(values).numpy(), torch.cat(pixels).numpy(), edges), shape=shape)
    # (k, n, 2) → (2n, k): atom by atom, x and y; in the order of the columns.
    moves = tangents.permute(1, 2, 0).reshape(2 * n, k)[torch.cat(order)]
    images = torch.from_numpy(matrix @ moves.numpy())
    return images.T.reshape(k, box_size, box_size)


@dataclass(frozen=True, eq=False)
class CTF:
    """Contrast transfer of each particle: seven (n,) float64 tensors.

    defocus_u, defocus_v in Å (positive is underfocus); defocus_angle (from the x axis to defocus_u) and
    phase_shift in radians; voltage_kv; spherical_aberration_mm; amplitude_contrast as a fraction.
    """

    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    phase_shift: Tensor
    voltage_kv: Tensor
    spherical_aberration_mm: Tensor
    amplitude_contrast: Tensor

    def __len__(self) -> int:
        return len(self.defocus_u)

    def __getitem__(self, rows) -> "CTF":
        return CTF(*(torch.atleast_1d(getattr(self, field.name)[rows]) for field in fields(self)))

    def evaluate(self, box_size: int, pixel_size: float, device=None) -> Tensor:
        """(n, box, box//2 + 1) float32 transfer function on the grid of ``torch.fft.rfft2``.

        Positive at low frequency, as RELION's and cryoSPARC's for protein-bright particles.

        Examples
        --------
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> ctf = CTF(15e3 * one, 15e3 * one, 0 * one, 0 * one, 300 * one, 2.7 * one, 0.1 * one)
        >>> transfer = ctf.evaluate(64, 2.0)
        >>> transfer.shape, round(float(transfer[0, 0, 0]), 3)
        (torch.Size([1, 64, 33]), 0.1)
        """
        to = {"device": device, "dtype": torch.float32}
        difference = self.defocus_u - self.defocus_v
        # torch-ctf takes the root of the astigmatism: the larger defocus has to come first. Its angle is from the
        # x axis as RELION's (measured against RELION's formula; its docstring says the y axis).
        angle = self.defocus_angle + torch.where(difference < 0, torch.pi / 2, 0.0)
        return calculate_ctf_2d(
            defocus=((self.defocus_u + self.defocus_v) / 2e4).to(**to),
            astigmatism=(difference.abs() / 2e4).to(**to),
            astigmatism_angle=torch.rad2deg(angle).to(**to),
            voltage=self.voltage_kv.to(**to),
            spherical_aberration=self.spherical_aberration_mm.to(**to),
            amplitude_contrast=self.amplitude_contrast.to(**to),
            phase_shift=torch.rad2deg(self.phase_shift).to(**to),
            pixel_size=pixel_size,
            image_shape=(box_size, box_size),
            rfft=True,
            fftshift=False,
        )


def filter_images(images: Tensor, transfer: Tensor) -> Tensor:
    """(…, box, box) `images` filtered by `transfer` (…, box, box//2 + 1), a real filter on the rfft2 grid."""
    return torch.fft.irfft2(torch.fft.rfft2(images) * transfer, s=images.shape[-2:])


def gaussian_transfer(box_size: int, pixel_size: float, blur: float, device=None) -> Tensor:
    """(box, box//2 + 1) transfer of a blur by a Gaussian of width `blur` Å: exp(−2π²·blur²·f²)."""
    fy = torch.fft.fftfreq(box_size, pixel_size, device=device)
    fx = torch.fft.rfftfreq(box_size, pixel_size, device=device)
    return torch.exp((-2 * torch.pi**2 * blur**2 * (fy[:, None] ** 2 + fx**2)).clamp_(min=MIN_EXPONENT))


class Imaging(nn.Module):
    """The microscope: global rotation, projection, shift and CTF of coordinates in Å.

    Parameters
    ----------
    weights : (n_atoms,) array
        Scattering of each atom.
    box_size : int
        Pixels a side, even.
    pixel_size : float
        Å a pixel.
    origin : (3,) array
        The point, in the frame of the coordinates, that every pose turns about and that sits at the box's centre.
    sigma : float, optional
        Width of an atom's Gaussian in Å. Default ``max(2.0, 0.8 · pixel_size)``, the narrowest that the pixels
        represent without aliasing.

    Raises
    ------
    ValueError
        For a box that is not even, or sizes that are not positive.

    Examples
    --------
    >>> microscope = Imaging(np.ones(2), box_size=32, pixel_size=2.0, origin=np.zeros(3))
    >>> microscope(torch.zeros(5, 2, 3), random_rotations(5, seed=0)).shape
    torch.Size([5, 32, 32])
    """

    def __init__(self, weights, box_size: int, pixel_size: float, origin, sigma: float | None = None):
        super().__init__()
        if box_size < 2 or box_size % 2:
            raise ValueError(f"expected an even box size, got {box_size}; try {box_size + 1}")
        if not pixel_size > 0:
            raise ValueError(f"expected a positive pixel size in Å, got {pixel_size}")
        self.box_size = int(box_size)
        self.pixel_size = float(pixel_size)
        self.sigma = float(max(2.0, 0.8 * pixel_size) if sigma is None else sigma)
        if not self.sigma > 0:
            raise ValueError(f"expected a positive sigma in Å, got {sigma}")
        self.register_buffer("weights", torch.as_tensor(np.asarray(weights), dtype=torch.float32), persistent=False)
        self.register_buffer("origin", torch.as_tensor(np.asarray(origin), dtype=torch.float32), persistent=False)

    def place(self, coords: Tensor, rotations: Tensor, shifts: Tensor | None = None) -> Tensor:
        """(batch, n, 2) where the atoms fall on the image, in Å from its centre."""
        # Under autocast a bf16 product would misplace atoms by up to half an Å.
        with torch.autocast(coords.device.type, enabled=False):
            xy = (coords - self.origin.to(coords.dtype)) @ rotations[:, :2].transpose(1, 2).to(coords.dtype)
        return xy if shifts is None else xy + shifts.to(coords.dtype).unsqueeze(1)

    def forward(
        self,
        coords: Tensor,
        rotations: Tensor,
        shifts: Tensor | None = None,
        ctf: Tensor | None = None,
        blur: float = 0.0,
    ) -> Tensor:
        """(batch, box, box) noise-free images of (batch, n_atoms, 3) `coords` (Eq. 3).

        `rotations` (batch, 3, 3), `shifts` (batch, 2) in Å, `ctf` (batch, box, box//2 + 1); `blur` in Å widens
        every Gaussian, which is the same as blurring the image.
        """
        sigma = float(np.hypot(self.sigma, blur))
        image = project(self.place(coords, rotations, shifts), self.weights, self.box_size, self.pixel_size, sigma)
        return image if ctf is None else filter_images(image, ctf)

    def extra_repr(self) -> str:
        return f"{self.box_size} px × {self.pixel_size:g} Å, {len(self.weights)} Gaussians of {self.sigma:g} Å"


def check_fits_in_box(coords, origin, box_size: int, pixel_size: float) -> None:
    """Raise ValueError when atoms of (…, 3) `coords` leave the box in some orientation about `origin`."""
    reach = float(np.linalg.norm(np.asarray(coords) - np.asarray(origin), axis=-1).max())
    if reach > box_size * pixel_size / 2:
        needed = int(2 * np.ceil(reach / pixel_size))
        raise ValueError(
            f"expected a molecule that fits the box of {box_size} px × {pixel_size:g} Å = "
            f"{box_size * pixel_size:.0f} Å, got atoms {reach:.0f} Å from its centre; "
            f"try a box of {needed} px or more, or centre the molecule"
        )


def random_rotations(n: int, seed: int) -> Tensor:
    """(n, 3, 3) float32 rotations, uniform on SO(3) and reproducible."""
    quaternions = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return roma.unitquat_to_rotmat(nn.functional.normalize(quaternions, dim=1)).float()


def noise_std_for_snr(images: Tensor, snr_db: float) -> float:
    """Standard deviation of the noise that gives `snr_db` = 10·log10(signal variance / noise variance).

    The variance is taken over the pixels of each image and averaged over the images.
    """
    return float((images.var(dim=(-2, -1)).mean() / 10 ** (snr_db / 10)).sqrt())
