"""What decides of an image, where its pose and its population are known: residuals and their sums.

Symbols: f → the image of the population's mean conformation at the particle's pose, C → its CTF, V
(p, k) → the leading directions of the population, tᵢ → the derivative of f by the i-th of them, a →
the particle's brightness, s → the noise spectrum. In Fourier space

    a = ⟨C f, y⟩ / ⟨C f, C f⟩,  r = y/a − C f,  gᵢ = ⟨C tᵢ, r⟩,  Hᵢⱼ = ⟨C tᵢ, C tⱼ⟩

with ⟨·,·⟩ weighted by 1/s. C r/s, back in real space and times tᵢ, is a map whose sum is gᵢ: where
in the image it speaks for a motion. Brightness is fitted for each image, so none of this changes
when an image is made brighter.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..images import gaussian_transfer
from ..model import Model, Population
from .leading import leading_steps
from .likelihood import crop_spectrum, frequency_band, real_parts

# Å. Sums over frequencies that these blurs leave; brightness is fitted under the first, since
# detail of atoms that are elsewhere looks dim.
_BLURS = (8.0, 5.0, 2.5, 0.0)
# Å a pixel of the maps, about: what moves by some Å is to be seen, and little else computed.
_MAP_PIXEL = 3.9
_LEAST_MAP = 16
# Brightness is no less than this share of the root of the image's power over the mean's.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True, eq=False)
class Clues:
    """What b images say, as an encoder is given it; made by `ExpectedImages.clues`.

    Attributes
    ----------
    maps : (b, c, m, m) tensor
        The residual C r/s, the mean's image, k tangents, and k products of residual and tangent.
    numbers : (b, q) tensor
        Posterior steps and their standard deviations in the leading directions, in those of the
        population, at each blur; how bright detail is; and the logarithm of the brightness over the
        noise.
    scale : (b,) tensor
        a, the brightness of each image over the model's.
    noise_std : (b,) tensor
        In grey levels.
    """

    maps: Tensor
    numbers: Tensor
    scale: Tensor
    noise_std: Tensor

    @property
    def log_clarity(self) -> Tensor:
        """(b,) logarithm of brightness over noise."""
        return (self.scale / self.noise_std).log()


@dataclass(frozen=True, eq=False)
class ExpectedImages:
    """Images of a population's mean conformation, and of its leading directions.

    Attributes
    ----------
    model : Model
        With the population's beads, on the device that computes.
    population : Population
    directions : (p, k) tensor
        In each, atoms move by 1 Å (RMS); see `told_directions`.
    variances : (k,) tensor
        Å².
    """

    model: Model
    population: Population
    directions: Tensor
    variances: Tensor

    @property
    def n_directions(self) -> int:
        return len(self.variances)

    @property
    def n_maps(self) -> int:
        return 2 + 2 * self.n_directions

    @property
    def n_numbers(self) -> int:
        return 2 * self.n_directions * len(_BLURS) + len(_BLURS)

    @cached_property
    def map_size(self) -> int:
        """Pixels a side of the maps."""
        side = self.model.box_size * self.model.pixel_size
        size = 4 * round(side / _MAP_PIXEL / 4)
        return min(max(size, _LEAST_MAP), self.model.box_size)

    @cached_property
    def mean(self) -> Tensor:
        """(p,) float32 latents."""
        return self.population.mean.float().to(self.model.device)

    @cached_property
    def _coords(self) -> Tensor:
        """(n_beads, 3) Å of the mean conformation."""
        return self.model.bead_dynamics.decode(self.mean[None])[0]

    @cached_property
    def _steps(self) -> Tensor:
        """(k, n_beads, 3) Å, what one unit of each direction moves beads by."""
        directions = self.directions.float().to(self.model.device)
        return leading_steps(self.model.bead_dynamics, self.mean, directions)

    @cached_property
    def relative_spectrum(self) -> Tensor:
        """(box, box//2 + 1) variance of the noise at each frequency, of mean 1."""
        band = frequency_band(self.model.microscope)
        spectrum = self.population.noise_spectrum
        if spectrum is None:
            return torch.ones_like(band.weights)
        return spectrum.to(band.weights)[band.ring]

    @cached_property
    def _root_weights(self) -> Tensor:
        """(box, box//2 + 1) what makes noise white, and each frequency count as often as it is."""
        return frequency_band(self.model.microscope).weights * self.relative_spectrum.rsqrt()

    @cached_property
    def _passed(self) -> Tensor:
        """(box·(box + 2), n_blurs) what each blur leaves of a product."""
        model = self.model
        low = [
            gaussian_transfer(model.box_size, model.pixel_size, blur, model.device)
            for blur in _BLURS
        ]
        squares = torch.stack(low, dim=-1).square()
        return squares.flatten(0, 1).repeat_interleave(2, dim=0)

    @cached_property
    def _n_pixels(self) -> float:
        return float(frequency_band(self.model.microscope).n_pixels)

    @cached_property
    def map_weights(self) -> Tensor:
        """(m, m//2 + 1) what the residual's frequencies are multiplied by besides the CTF."""
        weights = crop_spectrum(self.relative_spectrum.reciprocal(), self.map_size).clone()
        weights[0, 0] = 0
        return weights

    def spectra(self, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """(b, box, box//2 + 1) of the mean and (b, k, box, box//2 + 1) of tangents, without CTF."""
        microscope = self.model.microscope
        coords = self._coords.expand(len(rotations), -1, -1)
        positions = microscope.image_positions(coords, rotations)
        axes = rotations[:, None, :2].transpose(2, 3)
        ones = torch.ones_like(self.relative_spectrum)
        steps = microscope.tangent_spectra(positions, self._steps @ axes, slice(None), ones)
        return microscope.spectrum(positions), steps

    def clues(self, observed: Tensor, ctf: Tensor | None, mean: Tensor, steps: Tensor) -> Clues:
        """Of images (b, box, box//2 + 1) in Fourier space, with shifts undone.

        `mean` and `steps` as of `spectra`; `ctf` (b, box, box//2 + 1).
        """
        root = self._root_weights if ctf is None else self._root_weights * ctf
        data = real_parts(observed * self._root_weights)
        expected = real_parts(mean * root)
        moved = real_parts(steps * root.unsqueeze(-3))
        power = expected.square() @ self._passed
        overlap = (expected * data) @ self._passed
        total = data.square().sum(1)
        least = _LEAST_SCALE * (total / power[:, -1]).sqrt()
        scale = (overlap[:, 0] / power[:, 0]).maximum(least)
        rest = data - scale.unsqueeze(1) * expected
        noise = (rest.square().sum(1) / self._n_pixels).sqrt()
        rest = rest / scale.unsqueeze(1)
        clarity = scale / noise
        slopes = (moved * rest.unsqueeze(1)) @ self._passed
        hessian = (moved.unsqueeze(2) * moved.unsqueeze(1)) @ self._passed
        numbers = self._numbers(slopes, hessian, clarity)
        detail = overlap[:, 1:] / power[:, 1:] / scale.unsqueeze(1)
        numbers = torch.cat([numbers, detail - 1, clarity.log().unsqueeze(1)], dim=1)
        maps = self._maps(observed / scale[:, None, None], ctf, mean, steps)
        return Clues(maps, numbers, scale, noise)

    def _numbers(self, slopes: Tensor, hessian: Tensor, clarity: Tensor) -> Tensor:
        """(b, 2·k·n_blurs) posterior steps and standard deviations over the population's."""
        spread = self.variances.sqrt().to(slopes)
        weight = clarity.square()[:, None, None]
        slope = weight * slopes.transpose(1, 2) * spread
        information = weight.unsqueeze(3) * hessian.permute(0, 3, 1, 2) * spread[:, None] * spread
        eye = torch.eye(len(spread)).to(slopes)
        covariance = (information + eye).inverse()
        step = (covariance @ slope.unsqueeze(3)).squeeze(3)
        std = covariance.diagonal(dim1=2, dim2=3).sqrt()
        return torch.cat([step.flatten(1), std.log().flatten(1)], dim=1)

    def _maps(self, observed: Tensor, ctf: Tensor | None, mean: Tensor, steps: Tensor) -> Tensor:
        m = self.map_size
        observed, mean, steps = (crop_spectrum(part, m) for part in (observed, mean, steps))
        if ctf is None:
            residual = (observed - mean) * self.map_weights
        else:
            ctf = crop_spectrum(ctf, m)
            residual = (observed - ctf * mean) * (ctf * self.map_weights)
        spectra = torch.cat([residual.unsqueeze(1), mean.unsqueeze(1), steps], dim=1)
        maps = torch.fft.irfft2(spectra, s=(m, m), norm="ortho")
        return torch.cat([maps, maps[:, :1] * maps[:, 2:]], dim=1)


def centred_spectra(images: Tensor, shifts: Tensor, pixel_size: float) -> Tensor:
    """(b, box, box//2 + 1) Fourier transforms of images whose shifts (b, 2) in Å are undone."""
    box = images.shape[-1]
    spectra = torch.fft.rfft2(images, norm="ortho")
    if not shifts.any():
        return spectra
    y = torch.fft.fftfreq(box, pixel_size, device=images.device)
    x = torch.fft.rfftfreq(box, pixel_size, device=images.device)
    turns = shifts[:, 0, None, None] * x + shifts[:, 1, None, None] * y[:, None]
    return spectra * torch.polar(torch.ones_like(turns), 2 * torch.pi * turns)
