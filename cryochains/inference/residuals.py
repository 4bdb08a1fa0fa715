"""What decides of an image whose pose and population are known: residuals and sums of products.

Symbols: f → the image of a conformation of the population at the particle's pose, C → its CTF, tᵢ →
the derivative of f along the i-th leading direction of the population, a → the particle's
brightness, s → the noise spectrum. In Fourier space, with ⟨·,·⟩ weighted by 1/s and by a blur,

    a = ⟨C f, y⟩ / ⟨C f, C f⟩,  r = y/a − C f,  gᵢ = ⟨C tᵢ, r⟩,  Hᵢⱼ = ⟨C tᵢ, C tⱼ⟩

The sums g of products of residual and tangents are the gradient of the log likelihood: what an
image says of a motion. A gradient is true near its conformation alone, and so there are two, on
either side of the mean along the first direction, each under several blurs. Brightness is fitted
for each image, to both, and nothing of this changes when an image is made brighter.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..images import gaussian_transfer
from ..model import Model, Population
from .leading import leading_steps
from .likelihood import frequency_band, real_parts

# Å. Sums over the frequencies that each blur leaves. Brightness is fitted under the first, since
# detail of atoms that are elsewhere looks dim.
_SUM_BLURS = (8.0, 5.0, 2.5, 0.0)
# Where images are compared along the first direction, in its standard deviations from the mean.
_OFFSETS = (-0.9, 0.9)
# Of χ², which is as large as an image has pixels.
_POWER_UNIT = 100.0
# Brightness is no less than this share of the root of the image's power over the model's.
_LEAST_SCALE = 1e-3


@dataclass(frozen=True, eq=False)
class Clues:
    """What b images say, as an encoder is given it; made by `ExpectedImages.clues`.

    Attributes
    ----------
    numbers : (b, q) tensor
        Under each blur, at both conformations, posterior steps in the leading directions and the
        logarithms of their standard deviations, both in the population's standard deviations.
        Before them `detail`, the logarithm of brightness over noise, and by how much one
        conformation fits better than the other.
    detail : (b, n_blurs - 1) tensor
        How bright finer detail is, relative to what the first blur leaves, less 1: well below 0
        where the image shows something else.
    scale : (b,) tensor
        a, over the model's.
    noise_std : (b,) tensor
        In grey levels.
    """

    numbers: Tensor
    detail: Tensor
    scale: Tensor
    noise_std: Tensor


@dataclass(frozen=True, eq=False)
class ExpectedImages:
    """Images of some conformations of a population, and their derivatives.

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
    def n_numbers(self) -> int:
        """q, of `Clues`."""
        k, blurs = len(self.variances), len(_SUM_BLURS)
        return 2 * blurs + len(_OFFSETS) * 2 * k * blurs

    @cached_property
    def mean(self) -> Tensor:
        """(p,) float32 latents."""
        return self.population.mean.float().to(self.model.device)

    @cached_property
    def basis(self) -> Tensor:
        """(p, k) float32 `directions`."""
        return self.directions.float().to(self.model.device)

    @cached_property
    def spread(self) -> Tensor:
        """(k,) Å, standard deviations along the directions."""
        return self.variances.sqrt().float().to(self.model.device)

    @cached_property
    def left(self) -> Tensor:
        """(p,) variance of each latent that the directions leave out."""
        told = (self.directions.square() * self.variances).sum(1)
        left = self.population.covariance.diagonal() - told
        return left.clamp_min(0).float().to(self.model.device)

    @cached_property
    def _conformations(self) -> list[tuple[Tensor, Tensor]]:
        """(n_beads, 3) Å, and (k, n_beads, 3) Å that one unit of each direction moves beads by."""
        dynamics = self.model.bead_dynamics
        first = self.spread[0] * self.basis[:, 0]
        latents = [self.mean + offset * first for offset in _OFFSETS]
        return [
            (dynamics.decode(z[None])[0], leading_steps(dynamics, z, self.basis)) for z in latents
        ]

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
            for blur in _SUM_BLURS
        ]
        squares = torch.stack(low, dim=-1).square()
        return squares.flatten(0, 1).repeat_interleave(2, dim=0)

    @cached_property
    def _n_pixels(self) -> float:
        return frequency_band(self.model.microscope).n_pixels

    def spectra(self, rotations: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each conformation (b, box, box//2 + 1), and of its tangents (b, box·(box + 2), k).

        Without CTF; the second as `real_parts`.
        """
        microscope = self.model.microscope
        axes = rotations[:, None, :2].transpose(2, 3)
        ones = torch.ones_like(self.relative_spectrum)
        answer = []
        for coords, steps in self._conformations:
            positions = microscope.image_positions(coords.expand(len(rotations), -1, -1), rotations)
            moved = microscope.tangent_spectra(positions, steps @ axes, slice(None), ones)
            answer.append((microscope.spectrum(positions), moved))
        return answer

    def clues(
        self, observed: Tensor, ctf: Tensor | None, spectra: list[tuple[Tensor, Tensor]]
    ) -> Clues:
        """Of images (b, box, box//2 + 1) in Fourier space, with shifts undone.

        `spectra` as of the method; `ctf` (b, box, box//2 + 1).
        """
        root = self._root_weights if ctf is None else self._root_weights * ctf
        data = real_parts(observed * self._root_weights)
        first, second = (real_parts(image * root) for image, _ in spectra)
        power = (first.square() + second.square()) @ self._passed
        overlap = ((first + second) * data) @ self._passed
        least = _LEAST_SCALE * (data.square().sum(1) / power[:, -1]).sqrt()
        scale = (overlap[:, 0] / power[:, 0]).maximum(least)
        data = data / scale.unsqueeze(1)
        residuals = (data - first, data - second)
        squares = tuple(rest.square() for rest in residuals)
        noise = ((squares[0] + squares[1]).sum(1) / (2 * self._n_pixels)).sqrt()
        detail = overlap[:, 1:] / power[:, 1:] / scale.unsqueeze(1) - 1
        better = (squares[0] - squares[1]) @ self._passed / noise.square().unsqueeze(1)
        numbers = [detail, -noise.log().unsqueeze(1), better / _POWER_UNIT]
        of_parts = root.flatten(-2).repeat_interleave(2, dim=-1)
        for rest, (_, steps) in zip(residuals, spectra, strict=True):
            numbers.append(self._steps(rest, steps.mT * of_parts.unsqueeze(-2), noise))
        return Clues(torch.cat(numbers, dim=1), detail, scale, scale * noise)

    def _steps(self, rest: Tensor, moved: Tensor, noise: Tensor) -> Tensor:
        """(b, 2·k·n_blurs) posterior steps and log standard deviations, over the population's."""
        slopes = (moved * rest.unsqueeze(1)) @ self._passed
        hessian = (moved.unsqueeze(2) * moved.unsqueeze(1)) @ self._passed
        spread = self.spread
        weight = noise.square().reciprocal()[:, None, None]
        slope = weight * slopes.transpose(1, 2) * spread
        information = weight.unsqueeze(3) * hessian.permute(0, 3, 1, 2) * spread[:, None] * spread
        covariance = (information + torch.eye(len(spread)).to(spread)).inverse()
        step = (covariance @ slope.unsqueeze(3)).squeeze(3)
        std = covariance.diagonal(dim1=2, dim2=3).sqrt()
        return torch.cat([step.flatten(1), std.log().flatten(1)], dim=1)


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
