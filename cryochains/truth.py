"""What a simulation knows of its particles, for scoring.

Symbols of the paper: X → `coords`, the latents of every chain → `latents`, σ of ε → `noise_std`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .dynamics import Dynamics
from .stacks import positions


@dataclass(frozen=True, eq=False)
class Truth:
    """What a simulation knows of its particles, for scoring only. It is never written to a file.

    Attributes
    ----------
    noise_std : float
        Standard deviation of the noise in every pixel.
    snr_db : float
        10·log10(signal variance / noise variance).
    conformations : (m, n_atoms, 3) tensor, optional
        Å, of which each particle shows number ``frame[i]``.
    frame : (n,) int64 tensor, optional
    dynamics : Dynamics, optional
        Decodes `latents` to coordinates.
    latents : (n, n_latents) tensor, optional
    """

    noise_std: float
    snr_db: float
    conformations: Tensor | None = None
    frame: Tensor | None = None
    dynamics: Dynamics | None = None
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.frame if self.latents is None else self.latents)

    def __getitem__(self, rows) -> "Truth":
        rows = torch.from_numpy(positions(rows, len(self)))
        if self.latents is None:
            return replace(self, frame=self.frame[rows])
        return replace(self, latents=self.latents[rows])

    @property
    def coordinate(self) -> Tensor | None:
        """(n,) place along the conformations, 0 at the first to 1 at the last; None if latents made it."""
        return None if self.frame is None else self.frame / max(len(self.conformations) - 1, 1)

    @torch.no_grad()
    def coords(self, rows=slice(None)) -> Tensor:
        """(n, n_atoms, 3) true coordinates in Å of these particles, on the CPU."""
        rows = torch.from_numpy(positions(rows, len(self)))
        if self.frame is not None:
            return self.conformations[self.frame[rows]]
        device = next(self.dynamics.buffers()).device
        return self.dynamics.decode(self.latents[rows].to(device)).cpu()
