"""What a simulation knows of its particles, for scoring.

Symbols of the paper: X → `coords`, the latents of every chain → `latents`, σ of ε → `noise_std`.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..images import positions
from .dynamics import Dynamics


@dataclass(frozen=True, eq=False, repr=False)
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
        rows = self.latents if self.frame is None else self.frame
        return 0 if rows is None else len(rows)

    def __getitem__(self, rows) -> "Truth":
        chosen = torch.from_numpy(positions(rows, len(self)))
        return replace(
            self,
            frame=None if self.frame is None else self.frame[chosen],
            latents=None if self.latents is None else self.latents[chosen],
        )

    @property
    def coordinate(self) -> Tensor | None:
        """(n,) true coordinate along the conformations, 0 at the first to 1 at the last.

        None where latents made the conformations.
        """
        if self.frame is None or self.conformations is None:
            return None
        return self.frame / max(len(self.conformations) - 1, 1)

    def distinct_rows(self) -> tuple[Tensor, Tensor]:
        """(m,) rows of particles that show different conformations, and (n,) which each shows."""
        if self.frame is None:
            rows = torch.arange(len(self))
            return rows, rows
        _, first, frame = np.unique(self.frame.numpy(), return_index=True, return_inverse=True)
        return torch.from_numpy(first), torch.from_numpy(frame)

    @torch.no_grad()
    def coords(self, rows=slice(None)) -> Tensor:
        """(n, n_atoms, 3) true coordinates in Å of these particles, on the CPU."""
        chosen = torch.from_numpy(positions(rows, len(self)))
        if self.frame is not None and self.conformations is not None:
            return self.conformations[self.frame[chosen]]
        if self.dynamics is not None and self.latents is not None:
            return self.dynamics.decode(self.latents[chosen])
        raise ValueError(
            "expected a truth with conformations and frame, or dynamics and latents, got neither; "
            "try simulate_particles"
        )

    def __repr__(self) -> str:
        source = "latents" if self.frame is None else "conformations"
        return f"Truth({len(self):,} particles, {source}, {self.snr_db:g} dB)"
