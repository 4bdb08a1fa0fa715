"""The contrast transfer function of each particle (PSF of Eq. 3, in Fourier space)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CTF:
    """Contrast transfer of each particle: seven (n,) float64 tensors, and three more where known.

    Attributes
    ----------
    defocus_u, defocus_v : (n,) tensor
        Å; positive is underfocus.
    defocus_angle : (n,) tensor
        Radians, from the x axis to the direction of defocus_u.
    phase_shift : (n,) tensor
        Radians.
    voltage_kv, spherical_aberration_mm : (n,) tensor
    amplitude_contrast : (n,) tensor
        A fraction, 0 to 1.
    b_factor : (n,) tensor, optional
        Å²: the transfer is multiplied by exp(−B k²/4) at k in 1/Å.
    scale : (n,) tensor, optional
        Factor of the whole transfer.
    even_zernikes : (n, m) tensor, optional
        RELION's coefficients of symmetric aberrations, radians; added to the phase.
    """

    defocus_u: Tensor
    defocus_v: Tensor
    defocus_angle: Tensor
    phase_shift: Tensor
    voltage_kv: Tensor
    spherical_aberration_mm: Tensor
    amplitude_contrast: Tensor
    b_factor: Tensor | None = None
    scale: Tensor | None = None
    even_zernikes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.defocus_u)

    def __getitem__(self, rows) -> "CTF":
        # One particle stays a row.
        index = rows
        if not isinstance(rows, slice):
            index = torch.as_tensor(rows).reshape(-1)
            # An empty list is a tensor of floats.
            index = index if len(index) else index.long()
        known = {field.name: getattr(self, field.name) for field in fields(self)}
        return replace(
            self, **{name: values[index] for name, values in known.items() if values is not None}
        )

    def __repr__(self) -> str:
        parts = [f"{len(self):,} particles"]
        if len(self):
            defocus = (self.defocus_u + self.defocus_v) / 2e4
            low, high = f"{defocus.min():.1f}", f"{defocus.max():.1f}"
            parts.append(f"defocus {low if low == high else f'{low}–{high}'} µm")
        return f"CTF({', '.join(parts)})"

    def values(self) -> Iterator[Tensor]:
        """The seven tensors and those of the others that are known, in the order of the fields."""
        everything = (getattr(self, field.name) for field in fields(self))
        return (values for values in everything if values is not None)

    def evaluate(
        self, box_size: int, pixel_size: float, device: torch.device | str | None = None
    ) -> Tensor:
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
        if self.even_zernikes is not None:
            transfer = self._evaluate_with_aberrations(box_size, pixel_size, device)
        else:
            transfer = self._evaluate_plain(box_size, pixel_size, device)
        return self._damp(transfer, box_size, pixel_size)

    def _damp(self, transfer: Tensor, box_size: int, pixel_size: float) -> Tensor:
        """The transfer times what B-factors and scales make of it."""
        if self.b_factor is not None:
            x, y = _frequencies(box_size, pixel_size)
            exponent = -self.b_factor[:, None, None] / 4 * (x**2 + y**2)
            transfer = transfer * exponent.exp().to(transfer)
        if self.scale is not None:
            transfer = transfer * self.scale[:, None, None].to(transfer)
        return transfer

    def _evaluate_with_aberrations(
        self, box_size: int, pixel_size: float, device: torch.device | str | None
    ) -> Tensor:
        """RELION's formula in float64, with the Zernike polynomials."""

        def column(values: Tensor) -> Tensor:
            return values.to(device=device, dtype=torch.float64)[:, None, None]

        x, y = (axis.to(device)[None] for axis in _frequencies(box_size, pixel_size))
        square = x**2 + y**2
        angle = column(self.defocus_angle)
        mean = column(self.defocus_u + self.defocus_v) / 2
        difference = column(self.defocus_u - self.defocus_v) / 2
        # Σ k² (u cos² + v sin²) of the angle between k and the axis of u.
        along = angle.cos() * x + angle.sin() * y
        defocus = mean * square + difference * (2 * along**2 - square)
        wavelength = column(_wavelength(self.voltage_kv))
        aberration = column(self.spherical_aberration_mm) * 1e7
        contrast = column(self.amplitude_contrast)
        phase = math.pi / 2 * aberration * wavelength**3 * square**2
        phase = phase - math.pi * wavelength * defocus
        phase = phase - column(self.phase_shift) - torch.asin(contrast)
        if self.even_zernikes is not None:
            for number in range(self.even_zernikes.shape[1]):
                coefficient = column(self.even_zernikes[:, number])
                phase = phase + coefficient * _even_zernike(number, x, y)
        return -phase.sin().float()

    def _evaluate_plain(
        self, box_size: int, pixel_size: float, device: torch.device | str | None
    ) -> Tensor:
        # A quarter of a second to import, and needed only where there are CTFs.
        from torch_ctf import calculate_ctf_2d

        def convert(values: Tensor) -> Tensor:
            return values.to(device=device, dtype=torch.float32)

        difference = self.defocus_u - self.defocus_v
        # torch-ctf takes the root of the astigmatism: the larger defocus has to come first. Its
        # angle is from the x axis as RELION's (measured against RELION's formula; its docstring
        # says the y axis).
        angle = self.defocus_angle + torch.where(difference < 0, torch.pi / 2, 0.0)
        return calculate_ctf_2d(
            defocus=convert((self.defocus_u + self.defocus_v) / 2e4),
            astigmatism=convert(difference.abs() / 2e4),
            astigmatism_angle=convert(torch.rad2deg(angle)),
            voltage=convert(self.voltage_kv),
            spherical_aberration=convert(self.spherical_aberration_mm),
            amplitude_contrast=convert(self.amplitude_contrast),
            phase_shift=convert(torch.rad2deg(self.phase_shift)),
            pixel_size=pixel_size,
            image_shape=(box_size, box_size),
            rfft=True,
            fftshift=False,
        )


def _frequencies(box_size: int, pixel_size: float) -> tuple[Tensor, Tensor]:
    """x and y of the grid of ``torch.fft.rfft2``, in 1/Å, float64."""
    x = torch.fft.rfftfreq(box_size, pixel_size, dtype=torch.float64)
    y = torch.fft.fftfreq(box_size, pixel_size, dtype=torch.float64)
    return x[None, :], y[:, None]


def _wavelength(voltage_kv: Tensor) -> Tensor:
    """Å of an electron; RELION's constants."""
    volts = 1e3 * voltage_kv
    return 12.2643247 / torch.sqrt(volts * (1 + volts * 0.978466e-6))


def _even_zernike(number: int, x: Tensor, y: Tensor) -> Tensor:
    """RELION's symmetric Zernike polynomial of this number at frequencies in 1/Å.

    Number k² + k + m/2 has degree n = 2k and order m from −2k to 2k.
    """
    k = math.isqrt(number)
    degree = 2 * k
    order = 2 * (number - k * k - k)
    radius = torch.hypot(x, y)
    angle = torch.atan2(y, x)
    size = abs(order)
    radial = torch.zeros_like(radius)
    for step in range((degree - size) // 2 + 1):
        parts = (step, (degree + size) // 2 - step, (degree - size) // 2 - step)
        factor = math.factorial(degree - step) / math.prod(math.factorial(part) for part in parts)
        radial = radial + (-1) ** step * factor * radius ** (degree - 2 * step)
    return radial * (torch.cos(size * angle) if order >= 0 else torch.sin(size * angle))
