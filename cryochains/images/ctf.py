"""The contrast transfer function of each particle (PSF of Eq. 3, in Fourier space)."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CTF:
    """Contrast transfer of each particle: seven (n,) float64 tensors.

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
        return CTF(*(torch.atleast_1d(values[rows]) for values in self.values()))

    def __repr__(self) -> str:
        parts = [f"{len(self):,} particles"]
        if len(self):
            defocus = (self.defocus_u + self.defocus_v) / 2e4
            low, high = f"{defocus.min():.1f}", f"{defocus.max():.1f}"
            parts.append(f"defocus {low if low == high else f'{low}–{high}'} µm")
        return f"CTF({', '.join(parts)})"

    def values(self) -> Iterator[Tensor]:
        """The seven tensors, in the order of the fields."""
        return (getattr(self, field.name) for field in fields(self))

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
