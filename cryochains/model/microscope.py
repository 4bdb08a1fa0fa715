"""Image formation (Eq. 3): global rotation, projection along z, shift and CTF of coordinates in Å.

Symbols of the paper: V → a sum of Gaussians, R → `rotations`, Π → projection along z, t → `shifts`,
PSF → `ctf` (in Fourier space). Knows nothing of chains.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..images import filter_images, project, transform_tangents

# Pixels, the narrowest Gaussian that is drawn.
_LEAST_PIXELS = 0.8


@dataclass(frozen=True, eq=False, repr=False)
class Microscope:
    """The microscope: images of coordinates in Å, without noise, as bright as the weights say.

    Parameters
    ----------
    weights : (n,) array
        Scattering of each Gaussian (an atom, or a bead).
    box_size : int
        Pixels a side, even.
    pixel_size : float
        Å a pixel.
    origin : (3,) array
        The point, in the frame of the coordinates, that every pose turns about and that is at the
        centre of the box.
    sigma : float or (n,) array
        Width of each Gaussian in Å.
    device : torch.device
        Where images are computed; see `to`.

    Raises
    ------
    ValueError
        For a box that is not even, or sizes that are not positive.

    Notes
    -----
    Pixels represent no Gaussian narrower than 0.8 of them without aliasing. Narrower ones are drawn
    wider, by `_extra_variance`, which is undone in Fourier space.

    Examples
    --------
    >>> microscope = Microscope(np.ones(2), 32, 2.0, origin=np.zeros(3), sigma=1.5)
    >>> microscope
    Microscope(32 px × 2 Å, 2 Gaussians of 1.5 Å)
    >>> microscope.render(torch.zeros(5, 2, 3), torch.eye(3).expand(5, 3, 3)).shape
    torch.Size([5, 32, 32])
    """

    weights: np.ndarray
    box_size: int
    pixel_size: float
    origin: np.ndarray
    sigma: float | np.ndarray
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        box = int(self.box_size)
        if box < 2 or box % 2:
            raise ValueError(f"expected an even box size, got {self.box_size}; try {box + 1}")
        if not 0 < self.pixel_size < np.inf:
            raise ValueError(f"expected a positive pixel size in Å, got {self.pixel_size}; try 1.0")
        sigma = np.asarray(self.sigma, dtype=np.float64)
        if not (sigma > 0).all():
            raise ValueError(f"expected a positive sigma in Å, got {self.sigma}; try 2.0")
        weights = np.asarray(self.weights, dtype=np.float64)
        values = {
            "weights": weights,
            "origin": np.asarray(self.origin, dtype=np.float64),
            "box_size": box,
            "pixel_size": float(self.pixel_size),
            "sigma": np.broadcast_to(sigma, weights.shape),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def weight_tensor(self) -> Tensor:
        """(n,) float32 scattering of each Gaussian."""
        return torch.tensor(self.weights, dtype=torch.float32, device=self.device)

    @cached_property
    def variance_tensor(self) -> Tensor:
        """(n,) float32 Å², square of the width of each Gaussian."""
        squares = np.square(self.sigma)
        return torch.tensor(squares, dtype=torch.float32, device=self.device)

    @cached_property
    def origin_tensor(self) -> Tensor:
        """(3,) float32 `origin`."""
        return torch.tensor(self.origin, dtype=torch.float32, device=self.device)

    @cached_property
    def width(self) -> float:
        """Å, of the narrowest Gaussian."""
        return float(np.min(self.sigma))

    @cached_property
    def mean_width(self) -> float:
        """Å, RMS width of the Gaussians."""
        return float(np.sqrt(np.mean(np.square(self.sigma))))

    def to(self, device: str | torch.device) -> "Microscope":
        """The same microscope on another device; itself where it is there already."""
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device)

    def image_positions(
        self, coords: Tensor, rotations: Tensor, shifts: Tensor | None = None
    ) -> Tensor:
        """(b, n, 2) positions of (b, n, 3) atoms on the image, in Å from its centre."""
        # Under autocast a bf16 product would displace atoms by up to half an Å.
        with torch.autocast(coords.device.type, enabled=False):
            axes = rotations[:, :2].transpose(1, 2).to(coords.dtype)
            positions = (coords - self.origin_tensor.to(coords.dtype)) @ axes
        if shifts is None:
            return positions
        return positions + shifts.to(coords.dtype).unsqueeze(1)

    def spectrum(
        self,
        positions: Tensor,
        transfer: Tensor | None = None,
        *,
        blur: float = 0.0,
        variance: Tensor | None = None,
        box_size: int | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """(b, box, box//2 + 1) Fourier transform (orthonormal) of the images, times `transfer`.

        Of density per Å², of Gaussians at (b, n, 2) image positions. `blur` in Å widens all of
        them, which is the same as blurring the image; `variance` in Å² widens each, (b, n). A
        `box_size` other than the microscope's samples the same area by larger pixels. `weights`
        (n,) other than the microscope's may ask for derivatives, as positions may.
        """
        box = self.box_size if box_size is None else box_size
        widths = self._drawn_widths(slice(None), positions, blur, variance, box)
        pixel = self._pixel(box)
        weights = self.weight_tensor.to(positions) if weights is None else weights
        images = project(positions, weights, box, pixel, widths)
        spectrum = torch.fft.rfft2(images, norm="ortho")
        sharpening = self._sharpening(blur, box)
        if sharpening is not None:
            transfer = sharpening if transfer is None else transfer * sharpening
        return spectrum if transfer is None else spectrum * transfer

    def tangent_spectra(
        self,
        positions: Tensor,
        tangents: Tensor,
        atoms: slice,
        transfer: Tensor,
        *,
        blur: float = 0.0,
        variance: Tensor | None = None,
        box_size: int | None = None,
        columns: Tensor | None = None,
    ) -> Tensor:
        """(b, box·(box + 2), k) derivative of `spectrum` when `atoms` move along k tangents.

        `positions` (b, m, 2), `tangents` (b, k, m, 2) and `variance` (b, m): of these atoms. Real
        and imaginary parts of a frequency one after the other, as `torch.view_as_real` has them;
        into `columns` where they are given.
        """
        box = self.box_size if box_size is None else box_size
        widths = self._drawn_widths(atoms, positions, blur, variance, box)
        weights = self.weight_tensor[atoms]
        sharpening = self._sharpening(blur, box)
        if sharpening is not None:
            transfer = transfer * sharpening
        return transform_tangents(
            positions, tangents, weights, box, self._pixel(box), widths, transfer, columns
        )

    def render(
        self,
        coords: Tensor,
        rotations: Tensor,
        shifts: Tensor | None = None,
        ctf: Tensor | None = None,
        blur: float = 0.0,
    ) -> Tensor:
        """(b, box, box) noise-free images of (b, n, 3) `coords` (Eq. 3).

        `rotations` (b, 3, 3), `shifts` (b, 2) in Å, `ctf` (b, box, box//2 + 1); `blur` in Å.
        """
        positions = self.image_positions(coords, rotations, shifts)
        widths = self._drawn_widths(slice(None), positions, blur, None, self.box_size)
        weights = self.weight_tensor.to(positions)
        image = project(positions, weights, self.box_size, self.pixel_size, widths)
        sharpening = self._sharpening(blur, self.box_size)
        if sharpening is not None:
            ctf = sharpening.to(image.dtype) if ctf is None else ctf * sharpening
        return image if ctf is None else filter_images(image, ctf)

    def _sharpening(self, blur: float, box_size: int) -> Tensor | None:
        """(box, box//2 + 1) what undoes the extra width that Gaussians are drawn with; None: none.

        exp(2π² v |k|²) for an extra variance v, no further than the Nyquist frequency.
        """
        extra = self._extra_variance(blur, box_size)
        if extra == 0:
            return None
        pixel = self._pixel(box_size)
        ky = torch.fft.fftfreq(box_size, pixel, device=self.device)
        kx = torch.fft.rfftfreq(box_size, pixel, device=self.device)
        squared = (ky[:, None].square() + kx.square()).clamp(max=0.25 / pixel**2)
        return torch.exp(2 * torch.pi**2 * extra * squared)

    def _extra_variance(self, blur: float, box_size: int) -> float:
        """Å², by how much Gaussians are drawn wider, so that pixels can represent the narrowest."""
        least = (_LEAST_PIXELS * self._pixel(box_size)) ** 2
        return max(0.0, least - self.width**2 - blur**2)

    def _drawn_widths(
        self,
        atoms: slice,
        positions: Tensor,
        blur: float,
        variance: Tensor | None,
        box_size: int,
    ) -> Tensor:
        """(b, m) Å, widths of Gaussians as they are drawn."""
        own = self.variance_tensor[atoms].to(positions)
        squares = own + (blur**2 + self._extra_variance(blur, box_size))
        if variance is not None:
            squares = squares + variance
        return squares.sqrt().expand(positions.shape[:2])

    def _pixel(self, box_size: int) -> float:
        return self.pixel_size * self.box_size / box_size

    def __repr__(self) -> str:
        size = f"{self.box_size} px × {self.pixel_size:g} Å"
        narrow, wide = self.width, float(np.max(self.sigma))
        widths = f"{narrow:.3g}" if narrow == wide else f"{narrow:.2g} to {wide:.2g}"
        return f"Microscope({size}, {len(self.weights)} Gaussians of {widths} Å)"


def require_fit_in_box(
    coords: np.ndarray, origin: np.ndarray, box_size: int, pixel_size: float
) -> None:
    """Raise ValueError when atoms of (…, 3) `coords` leave the box in some orientation."""
    distances = np.linalg.norm(np.asarray(coords) - np.asarray(origin), axis=-1)
    farthest = float(distances.max())
    if farthest > box_size * pixel_size / 2:
        needed = int(2 * np.ceil(farthest / pixel_size))
        raise ValueError(
            f"expected a molecule that fits the box of {box_size} px × {pixel_size:g} Å = "
            f"{box_size * pixel_size:.0f} Å, got atoms {farthest:.0f} Å from its centre; "
            f"try a box of {needed} px or more, or centre the molecule"
        )
