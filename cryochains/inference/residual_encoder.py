"""An encoder that is given what decides: `ResidualEncoder`, which `encode` uses.

A small network answers the numbers of `residuals` with the coordinates c along the leading
directions V of a population, and with their standard deviations: z = μ + V c. What is left of a
particle stays at the population's mean, with the population's spread for an error bar.
"""

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._arguments import checked
from .._devices import choose_device
from .._files import save_tensors
from .._processes import gather, own_share
from ..images import CTF, Batch, ParticleStack
from ..model import Model, Population, pack_model, require_same_images, unpack_model
from .image_model import (
    describe_unusable,
    look_first,
    middle_brightness,
    require_visible,
    usable_images,
)
from .likelihood import map_blocks
from .residuals import Clues, ExpectedImages, centred_spectra
from .result import Result

ENCODER_KIND = "encoder"
# Images are drawn, and answered, up to so many times brighter or dimmer, at the same noise.
CLARITY_FACTOR = 2.5
# Draws have a defocus up to so many times that of a particle, or of that less.
DEFOCUS_FACTOR = 1.25
# Root mean square of the logarithm that noise spectra differ by: up to a factor of 1.75, which is
# noise whose power falls as 1/f, the encoder of the package explains 0.02 less of the motion.
_SPECTRUM_TOLERANCE = math.log(1.75)
# Particles that tell noise and detail before all are answered.
_LOOKED_AT = 64
# Particles that one thread takes.
_ANSWERED_BLOCK = 16
# By name and unit, what a CTF is told apart by, and by how much it may differ from the draws'.
_CTF_TOLERANCES = {
    "defocus (µm)": 0.0,
    "voltage (kV)": 1.0,
    "spherical aberration (mm)": 0.05,
    "amplitude contrast": 0.03,
    "phase shift (rad)": 0.2,
    "B-factor (Å²)": 20.0,
}


class ResidualNetwork(nn.Module):
    """A perceptron of three hidden layers, from the q numbers of images to k answers.

    Parameters
    ----------
    n_numbers : int
    n_directions : int
    width : int
        Hidden units of each layer.
    """

    middle: Tensor
    spread: Tensor

    def __init__(self, n_numbers: int, n_directions: int, width: int) -> None:
        super().__init__()
        self.n_directions = n_directions
        self.width = width
        # Of the numbers, over draws; no weights.
        self.register_buffer("middle", torch.zeros(n_numbers))
        self.register_buffer("spread", torch.ones(n_numbers))
        last = nn.Linear(width, 2 * n_directions)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.layers = nn.Sequential(
            nn.Linear(n_numbers, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            last,
        )

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(b, k) answers in the population's standard deviations, and logarithms of error bars."""
        answer = self.layers((numbers - self.middle) / self.spread)
        return answer[:, : self.n_directions], answer[:, self.n_directions :]


@dataclass(frozen=True, eq=False, repr=False)
class ResidualEncoder:
    """A network that is given residuals, and what it was trained for; `encode` asks it.

    What `train_residual_encoder` returns. It knows one molecule, model and population, and images
    of one box, pixel size, noise spectrum and range of brightness over noise and of CTFs; `encode`
    refuses others.

    Attributes
    ----------
    model : Model
    population : Population
        Whose particles were drawn.
    directions : (p, k) float64 tensor
        Of the latents, in which answers differ; in each, atoms move by 1 Å (RMS).
    variances : (k,) float64 tensor
        Å².
    network : ResidualNetwork
        On the CPU.
    detail : (2, n) float64 tensor
        Least and most of `Clues.detail` of draws.
    ctf : dict
        By name and unit the least and most of the draws' CTFs; empty where there are none.
    training : dict
        "seed", "draws" and "settings" of the training.
    history : tuple of dict
        As of `Encoder`; held out are other draws, and losses are mean squared errors in Å².
    """

    model: Model
    population: Population
    directions: Tensor
    variances: Tensor
    network: ResidualNetwork
    detail: Tensor
    ctf: Mapping[str, Sequence[float]]
    training: Mapping[str, Any]
    history: Sequence[Mapping]

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all, that `load_encoder` opens alone."""
        tensors, model_meta = pack_model(self.model)
        tensors |= {f"population/{k}": v for k, v in self.population.tensors().items()}
        tensors |= {f"network/{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {"directions": self.directions, "variances": self.variances}
        tensors["detail"] = self.detail
        meta = {
            "kind": ENCODER_KIND,
            "given": "residuals",
            "model": model_meta,
            "population": self.population.description(),
            "width": self.network.width,
            "ctf": {name: list(limits) for name, limits in self.ctf.items()},
            "training": dict(self.training),
            "history": [dict(record) for record in self.history],
        }
        save_tensors(path, tensors, meta)

    def expected_images(self, device: str | torch.device) -> ExpectedImages:
        """What residuals are taken against, computed on a device."""
        model = self.model.to(device).with_beads(self.population.beads)
        return ExpectedImages(model, self.population, self.directions, self.variances)

    def __repr__(self) -> str:
        k = len(self.variances)
        directions = f"{k} {'direction' if k == 1 else 'directions'}"
        size = f"{self.model.box_size} px × {self.model.pixel_size:g} Å"
        draws = f"{self.training['draws']:,} draws"
        return f"ResidualEncoder({self.model.structure.name!r}, {size}, {directions}, {draws})"


def unpack_residual_encoder(tensors: dict[str, Tensor], meta: dict) -> ResidualEncoder:
    """The encoder that ``ResidualEncoder.save`` wrote."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    weights = part("network/")
    variances = tensors["variances"]
    network = ResidualNetwork(len(weights["middle"]), len(variances), meta["width"])
    network.load_state_dict(weights)
    return ResidualEncoder(
        unpack_model(tensors, meta["model"]),
        Population.restore(part("population/"), meta["population"]),
        tensors["directions"],
        variances,
        network.eval(),
        tensors["detail"],
        {name: tuple(limits) for name, limits in meta["ctf"].items()},
        meta["training"],
        tuple(meta["history"]),
    )


@torch.no_grad()
def encode_residuals(
    encoder: ResidualEncoder,
    particles: ParticleStack,
    batch_size: int,
    device: str | torch.device | None,
) -> Result:
    """Latents and error bars of every particle; see `encode`."""
    require_same_images(encoder.model, particles)
    expected = encoder.expected_images(choose_device(device))
    _require_known_ctfs(encoder, particles.ctf)
    _require_known_images(encoder, expected, particles)
    # A copy: the encoder stays where and as it is, whatever happens.
    network = deepcopy(encoder.network).to(expected.model.device).eval()
    n = len(particles)
    latents = expected.mean.cpu().repeat(n, 1)
    std = encoder.population.covariance.diagonal().sqrt().float().repeat(n, 1)
    scale = torch.full((n,), encoder.population.contrast)
    noise = torch.full((n,), torch.nan)
    finite = torch.zeros(n, dtype=torch.bool)
    usable = torch.zeros(n, dtype=torch.bool)
    own = own_share(n)
    device = expected.model.device
    for batch in particles[own].batches(batch_size, device=device, require_finite=False):
        rows = batch.rows.cpu() + own.start
        whole, good = usable_images(batch.images)
        finite[rows], usable[rows] = whole.cpu(), good.cpu()
        if not good.any():
            continue
        clues = _clues_of(expected, batch, good)
        answer, log_std = network(clues.numbers)
        weights = answer * expected.spread
        variances = (log_std.exp() * expected.spread).square()
        rows = rows[good.cpu()]
        latents[rows] = (expected.mean + weights @ expected.basis.T).cpu()
        std[rows] = (variances @ expected.basis.square().T + expected.left).sqrt().cpu()
        scale[rows], noise[rows] = clues.scale.cpu(), clues.noise_std.cpu()
    known = (latents, std, scale, noise, finite, usable)
    latents, std, scale, noise, finite, usable = (gather(values[own], n) for values in known)
    problem = describe_unusable(usable, finite, particles.ids.tolist())
    if problem is not None:
        warnings.warn(problem, stacklevel=4)
    return Result(
        encoder.model,
        latents,
        std,
        encoder.population,
        particles,
        scale=scale,
        noise=noise,
        responsibility=usable.float(),
        history=encoder.history,
        kind="encoded",
    )


def _clues_of(expected: ExpectedImages, batch: Batch, rows: Tensor) -> Clues:
    """What the images of a batch say, at `rows` (mask or indices) of it."""
    images, rotations, shifts = batch.images[rows], batch.rotations[rows], batch.shifts[rows]
    ctf = None if batch.ctf is None else batch.ctf[rows]

    def work(block: slice) -> Clues:
        observed = centred_spectra(images[block], shifts[block], expected.model.pixel_size)
        of_block = None if ctf is None else ctf[block]
        return expected.clues(observed, of_block, expected.spectra(rotations[block]))

    return join_clues(map_blocks(work, small_blocks(len(images)), images.device))


def small_blocks(n: int) -> list[slice]:
    """Of n particles, so few that what is computed of them stays in a cache."""
    return [slice(start, min(start + _ANSWERED_BLOCK, n)) for start in range(0, n, _ANSWERED_BLOCK)]


def join_clues(parts: Sequence[Clues]) -> Clues:
    """Of all particles, from those of blocks of them."""
    columns = [(c.numbers, c.detail, c.scale, c.noise_std) for c in parts]
    return Clues(*(torch.cat(column) for column in zip(*columns, strict=True)))


# What it was trained for


def _ctf_columns(ctf: CTF | None) -> dict[str, Tensor]:
    """(n,) values by name and unit that CTFs are told apart by; empty where there are none."""
    if ctf is None:
        return {}
    values = (
        (ctf.defocus_u + ctf.defocus_v) / 2e4,
        ctf.voltage_kv,
        ctf.spherical_aberration_mm,
        ctf.amplitude_contrast,
        ctf.phase_shift,
        torch.zeros_like(ctf.phase_shift) if ctf.b_factor is None else ctf.b_factor,
    )
    return dict(zip(_CTF_TOLERANCES, values, strict=True))


def ctf_limits(ctf: CTF | None) -> dict[str, tuple[float, float]]:
    """Least and most of what draws have whose CTFs are like these."""
    limits = {}
    for name, values in _ctf_columns(ctf).items():
        low, high = float(values.min()), float(values.max())
        if name.startswith("defocus"):
            low, high = low / DEFOCUS_FACTOR, high * DEFOCUS_FACTOR
        limits[name] = (low, high)
    return limits


def _require_known_ctfs(encoder: ResidualEncoder, ctf: CTF | None) -> None:
    columns = _ctf_columns(ctf)
    if bool(columns) != bool(encoder.ctf):
        expected, got = ("CTFs", "none") if encoder.ctf else ("no CTFs", "some")
        raise ValueError(
            f"expected particles with {expected}, as this encoder was trained on, got {got}; try "
            "estimate, or train_residual_encoder on a result of such particles"
        )
    for name, values in columns.items():
        low, high = encoder.ctf[name]
        slack = _CTF_TOLERANCES[name]
        least, most = float(values.min()), float(values.max())
        if least < low - slack or most > high + slack:
            raise ValueError(
                f"expected a {name} from {low:.3g} to {high:.3g}, as this encoder was trained on, "
                f"got {least:.3g} to {most:.3g}; try estimate, or train_residual_encoder on a "
                "result of such particles"
            )


def _require_known_images(
    encoder: ResidualEncoder, expected: ExpectedImages, particles: ParticleStack
) -> None:
    """Raise ValueError for noise, or a molecule, that is not what the encoder was trained on."""
    some = particles[:: -(-len(particles) // _LOOKED_AT)]
    look = look_first(expected.model, some)
    if not look.usable.any():
        return
    require_visible(look, learns=True)
    population = encoder.population
    clarity = middle_brightness(look) / look.noise_level**0.5
    trained = population.contrast / population.noise_std
    if not 1 / CLARITY_FACTOR <= clarity / trained <= CLARITY_FACTOR:
        raise ValueError(
            f"expected images with a brightness over noise within {CLARITY_FACTOR:g} times of "
            f"{trained:.3g}, which this encoder was trained for, got {clarity:.3g}; try estimate, "
            "or train_residual_encoder on a result of such particles"
        )
    spectrum = population.noise_spectrum
    spectrum = torch.ones_like(look.noise_spectrum) if spectrum is None else spectrum
    difference = _spectrum_difference(look.noise_spectrum.cpu(), spectrum.cpu())
    if difference > _SPECTRUM_TOLERANCE:
        raise ValueError(
            "expected noise of the colour that this encoder was trained on, got some whose "
            f"spectrum differs by a factor of {math.exp(difference):.2g} (root mean square); try "
            "estimate, or train_residual_encoder on a result of such particles"
        )
    batch = next(iter(some.batches(len(some), device=expected.model.device, require_finite=False)))
    detail = _clues_of(expected, batch, look.usable.to(expected.model.device)).detail
    middle = detail.double().median(0).values.cpu()
    if ((middle < encoder.detail[0]) | (middle > encoder.detail[1])).any():
        raise ValueError(
            f"expected images of {encoder.model.structure.name!r} at their poses, got images whose "
            f"detail is {(1 + float(middle[-1])):.2f} times as bright as the model's (draws: "
            f"{1 + float(encoder.detail[0, -1]):.2f} and more); try cryochains.check with the model"
        )


def _spectrum_difference(one: Tensor, other: Tensor) -> float:
    """Root mean square of the logarithm of the ratio, over the pixels of all rings."""
    rings = torch.arange(len(one)).double().clamp_min(0.5)
    share = rings / rings.sum()
    return float((share * (one / other).log().square()).sum().sqrt())
