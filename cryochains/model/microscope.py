"""Image formation (Eq. 3): global rotation, projection along z, shift and CTF of coordinates in Å.

Symbols of the paper: V → a sum of Gaussians, R → `rotations`, Π → projection along z, t → `shifts`,
PSF → `ctf` (in Fourier space). Knows nothing of chains.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..images import filter_images, project, project_tangents


@dataclass(frozen=True, eq=False, repr=False)
class Microscope:
    """The microscope: images of coordinates in Å, without noise, as bright as the weights say.

    Parameters
    ----------
    weights : (n_atoms,) array
        Scattering of each atom.
    box_size : int
        Pixels a side, even.
    pixel_size : float
        Å a pixel.
    origin : (3,) array
        The point, in the frame of the coordinates, that every pose turns about and that is at the
        centre of the box.
    sigma : float, optional
        Width of an atom's Gaussian in Å. Default ``max(2.0, 0.8 · pixel_size)``, the narrowest that
        the pixels represent without aliasing.
    device : torch.device
        Where images are computed; see `to`.

    Raises
    ------
    ValueError
        For a box that is not even, or sizes that are not positive.

    Examples
    --------
    >>> microscope = Microscope(np.ones(2), box_size=32, pixel_size=2.0, origin=np.zeros(3))
    >>> microscope
    Microscope(32 px × 2 Å, 2 Gaussians of 2 Å)
    >>> microscope.render(torch.zeros(5, 2, 3), torch.eye(3).expand(5, 3, 3)).shape
    torch.Size([5, 32, 32])
    """

    weights: np.ndarray
    box_size: int
    pixel_size: float
    origin: np.ndarray
    sigma: float | None = None
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        box = int(self.box_size)
        if box < 2 or box % 2:
            raise ValueError(f"expected an even box size, got {self.box_size}; try {box + 1}")
        if not 0 < self.pixel_size < np.inf:
            raise ValueError(f"expected a positive pixel size in Å, got {self.pixel_size}; try 1.0")
        sigma = max(2.0, 0.8 * self.pixel_size) if self.sigma is None else self.sigma
        if not sigma > 0:
            raise ValueError(f"expected a positive sigma in Å, got {self.sigma}; try 2.0")
        values = {
            "weights": np.asarray(self.weights, dtype=np.float64),
            "origin": np.asarray(self.origin, dtype=np.float64),
            "box_size": box,
            "pixel_size": float(self.pixel_size),
            "sigma": float(sigma),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def weight_tensor(self) -> Tensor:
        """(n_atoms,) float32 scattering of each atom."""
        return torch.tensor(self.weights, dtype=torch.float32, device=self.device)

    @cached_property
    def origin_tensor(self) -> Tensor:
        """(3,) float32 `origin`."""
        return torch.tensor(self.origin, dtype=torch.float32, device=self.device)

    @property
    def width(self) -> float:
        """Å, width of an atom's Gaussian."""
        return float(self.sigma)  # type: ignore[arg-type]  # __post_init__ filled the default in

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

    def project(
        self, positions: Tensor, width: float | Tensor | None = None, box_size: int | None = None
    ) -> Tensor:
        """(b, box, box) density per Å² of atoms at (b, n, 2) image positions, before the CTF.

        `width` in Å is of every atom, or (b, n); `box_size` other than the microscope's samples the
        same area by larger pixels.
        """
        box = self.box_size if box_size is None else box_size
        width = self.width if width is None else width
        return project(positions, self.weight_tensor, box, self._pixel(box), width)

    def spectrum(
        self, positions: Tensor, transfer: Tensor, width: float | Tensor, box_size: int
    ) -> Tensor:
        """(b, box, box//2 + 1) Fourier transform (orthonormal) of the images, times `transfer`."""
        images = self.project(positions, width, box_size)
        return torch.fft.rfft2(images, norm="ortho") * transfer

    def tangent_spectra(
        self,
        positions: Tensor,
        tangents: Tensor,
        atoms: slice,
        transfer: Tensor,
        width: float | Tensor,
        box_size: int,
    ) -> Tensor:
        """(b, k, box, box//2 + 1) derivative of `spectrum` when `atoms` move along k tangents.

        `positions` (b, n, 2) and `tangents` (b, k, n, 2), `width` a number or (b, n): of
        these atoms.
        """
        steps = project_tangents(
            positions, tangents, self.weight_tensor[atoms], box_size, self._pixel(box_size), width
        )
        return torch.fft.rfft2(steps, norm="ortho").mul_(transfer.unsqueeze(-3))

    def render(
        self,
        coords: Tensor,
        rotations: Tensor,
        shifts: Tensor | None = None,
        ctf: Tensor | None = None,
        blur: float = 0.0,
    ) -> Tensor:
        """(b, box, box) noise-free images of (b, n_atoms, 3) `coords` (Eq. 3).

        `rotations` (b, 3, 3), `shifts` (b, 2) in Å, `ctf` (b, box, box//2 + 1); `blur` in Å widens
        every Gaussian, which is the same as blurring the image.
        """
        positions = self.image_positions(coords, rotations, shifts)
        image = self.project(positions, float(np.hypot(self.width, blur)))
        return image if ctf is None else filter_images(image, ctf)

    def _pixel(self, box_size: int) -> float:
        return self.pixel_size * self.box_size / box_size

    def __repr__(self) -> str:
        size = f"{self.box_size} px × {self.pixel_size:g} Å"
        return f"Microscope({size}, {len(self.weights)} Gaussians of {self.width:g} Å)"


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
