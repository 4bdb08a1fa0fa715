"""`train_residual_encoder`: a network taught by particles that are drawn, whose latents are known.

A draw has latents of the population, a random pose, the CTF of one of the particles at a somewhat
other defocus, the population's noise, and a brightness between 1/2.5 and 2.5 times that of the
particles. There are as many as one asks for. The loss is the squared error in Å².
"""

import math
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .._arguments import Count, Positive, Seed, checked
from .._devices import choose_device
from .._files import content_digest
from .._processes import is_first
from ..images import CTF, ParticleStack, random_rotations
from ..model import Model, Population, require_same_model
from .folder import RunFolder, open_folder
from .image_model import look_first
from .leading import are_few, told_directions
from .likelihood import map_blocks
from .residual_encoder import (
    CLARITY_FACTOR,
    DEFOCUS_FACTOR,
    ResidualEncoder,
    ResidualNetwork,
    ctf_limits,
    join_clues,
    small_blocks,
)
from .residuals import Clues, ExpectedImages
from .result import Result
from .run import Run

# Name of what is known after each part of the training.
_STATE_NAME = "residual_training"
_EPOCHS = 10
# Images of each drawn conformation and pose, which differ in CTF, brightness and noise: drawing
# the first two takes the time.
_COPIES = 2
_HELD_OUT_DRAWS = 1024
_WARM_UP_STEPS = 50
_WEIGHT_DECAY = 1e-4
# Of the error bars' log likelihood, beside the squared error in units of the population's.
_ERROR_BAR_SHARE = 0.05
_MAX_GRADIENT = 1.0
# Streams of random numbers.
_TRAINED, _HELD_OUT, _FIRST = range(3)


@checked
def train_residual_encoder(
    result: Result,
    *,
    draws: Count = 200_000,
    width: Count = 64,
    batch_size: Count = 128,
    learning_rate: Positive = 2e-3,
    seed: Seed = 0,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> ResidualEncoder:
    """Train an encoder for particles like those of a result, on particles drawn from what it knows.

    Parameters
    ----------
    result : Result
        Of `refine` or `estimate`: its model and population are drawn from, its particles say which
        CTFs there are. None of its images teaches the encoder anything.
    draws : int
        Images to learn from: about 1.3 ms each on one core at 64 px, with one leading direction.
    width : int
        Hidden units of each of three layers.
    batch_size : int
        Draws a step.
    learning_rate : float
        Of Adam; it falls to zero along half a cosine.
    seed : int
        Of the initial weights and the draws.
    checkpoint : path, optional
        A folder, made where there is none: what was asked, a log, and ten times the weights. A run
        that was cut goes on from there and gives the same numbers.
    device : torch device, optional
        By default a GPU where there is one.
    progress : bool
        Show a progress bar.

    Returns
    -------
    ResidualEncoder

    Raises
    ------
    ValueError
        For a result without population or particles, a population that moves in too many directions
        for this, a loss that is not finite, or a folder of another result or settings, or in use.

    Examples
    --------
    >>> from cryochains import encode, load_structure, match_structures, morph, refine
    >>> from cryochains import simulate_particles, superpose
    >>> closed, opened = match_structures(
    ...     load_structure("glua3-closed"), load_structure("glua3-open")
    ... )
    >>> path = morph(closed, superpose(opened, closed), n=5)
    >>> particles = simulate_particles(
    ...     closed, 20, conformations=path, box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=2)
    >>> result = refine(model, particles, blurs=(8.0, 4.0, 0.0), progress=False)
    >>> encoder = train_residual_encoder(result, draws=64, batch_size=32, progress=False)
    >>> encode(encoder, particles)
    Result(20 particles, encoded, 16 latents of 'glua3-closed', spread ... Å)
    """
    population, particles = _drawn_from(result)
    model = result.model.to(choose_device(device)).with_beads(population.beads)
    expected = ExpectedImages(model, population, *_told(model, particles, population))
    settings: dict = {"draws": draws, "width": width, "batch_size": batch_size, "seed": seed}
    settings["learning_rate"] = learning_rate
    source = _Source(expected, particles.ctf, seed)
    training = _start(source, settings)
    identity = content_digest(
        *population.tensors().values(), str(population.description()), particles.metadata_digest()
    )
    steps = -(-draws // batch_size)
    asked = {"result": repr(result), "settings": settings}
    with open_folder(checkpoint, "residual training", _STATE_NAME, asked) as folder:
        history = _load(folder, training, settings, identity)
        if history and folder is not None:
            folder.announce(f"going on after {len(history)} of {_EPOCHS} parts", progress)
        history = _train(
            training,
            history,
            steps,
            save=lambda history_now: _save(folder, training, settings, identity, history_now),
            show=progress and is_first(),
        )
    return ResidualEncoder(
        result.model,
        population,
        expected.directions,
        expected.variances,
        deepcopy(training.network).to("cpu").eval(),
        _detail_limits(training.held_out.clues),
        ctf_limits(particles.ctf),
        {"seed": seed, "draws": steps * batch_size, "settings": settings},
        history,
    )


def _drawn_from(result: Result) -> tuple[Population, ParticleStack]:
    given = result.in_frame("poses")
    if given.population is None or given.particles is None:
        missing = "a population" if given.population is None else "its particles"
        raise ValueError(
            f"expected a result with its population and particles, got {result!r} without "
            f"{missing}; try that of refine or estimate"
        )
    return given.population, given.particles


def _told(model: Model, particles: ParticleStack, population: Population) -> tuple[Tensor, Tensor]:
    some = particles[:: -(-len(particles) // 64)]
    run = Run(
        model=model,
        particles=some,
        look=look_first(model, some),
        start=None,
        population=population,
        blurs=(0.0,),
        batch_size=64,
        folder=None,
    )
    directions, variances = told_directions(run, population)
    if not are_few(directions):
        raise ValueError(
            "expected a population that moves in few directions, got one in which images tell of "
            f"{len(variances)} directions of {model.n_latents} latents; try estimate or refine"
        )
    return directions, variances


# Draws


@dataclass(frozen=True, eq=False)
class _Draws:
    """What images say, and the truth.

    Attributes
    ----------
    clues : Clues
    weights : (b, k) tensor
        Å along each direction.
    left : (b,) tensor
        Å², squared distance from the mean that no direction has.
    """

    clues: Clues
    weights: Tensor
    left: Tensor


@dataclass(frozen=True, eq=False)
class _Source:
    """Where draws come from."""

    expected: ExpectedImages
    ctf: CTF | None
    seed: int

    def draw(self, n: int, stream: int, number: int = 0) -> _Draws:
        """So many images, the same for the same stream and number."""
        key = np.random.SeedSequence(self.seed, spawn_key=(stream, number))
        generator = torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))
        expected, model = self.expected, self.expected.model
        device, box = model.device, model.box_size
        each = -(-n // _COPIES)
        latents = self._latents(each, generator)
        turn_seed = int(torch.randint(2**62, (), generator=generator))
        rotations = random_rotations(each, turn_seed).to(device)
        brightness = (self._even(n, generator) * math.log(CLARITY_FACTOR)).exp().to(device)
        transfer = self._transfer(n, generator)
        noise = torch.randn(n, box, box, generator=generator).to(device)
        level = self.expected.population.noise_std / self.expected.population.contrast
        amplitude = level * expected.relative_spectrum.sqrt()

        def work(block: slice) -> list[Clues]:
            turned = rotations[block]
            microscope = model.microscope
            coords = model.bead_dynamics.decode(latents[block])
            clean = microscope.spectrum(microscope.image_positions(coords, turned))
            spectra = expected.spectra(turned)
            parts = []
            for copy in range(_COPIES):
                rows = slice(copy * each + block.start, min(copy * each + block.stop, n))
                m = max(0, rows.stop - rows.start)
                of_rows = None if transfer is None else transfer[rows]
                signal = clean[:m] if of_rows is None else clean[:m] * of_rows
                grain = torch.fft.rfft2(noise[rows], norm="ortho") * amplitude
                observed = brightness[rows, None, None] * signal + grain
                cut = [(mean[:m], steps[:m]) for mean, steps in spectra]
                parts.append(expected.clues(observed, of_rows, cut))
            return parts

        blocks = map_blocks(work, small_blocks(each), device)
        ordered = [parts[copy] for copy in range(_COPIES) for parts in blocks]
        moved = latents - expected.mean
        share = model.atom_share
        inverse = expected.basis * share.unsqueeze(1)
        weights = (moved @ inverse).repeat(_COPIES, 1)[:n]
        left = (moved.square() @ share).repeat(_COPIES)[:n] - weights.square().sum(1)
        return _Draws(join_clues(ordered), weights, left.clamp_min(0))

    def _latents(self, n: int, generator: torch.Generator) -> Tensor:
        population = self.expected.population
        variances, vectors = torch.linalg.eigh(population.covariance.double())
        root = vectors * variances.clamp_min(0).sqrt()
        normal = torch.randn(n, len(variances), generator=generator, dtype=torch.float64)
        return (population.mean.double() + normal @ root.T).float().to(self.expected.model.device)

    def _transfer(self, n: int, generator: torch.Generator) -> Tensor | None:
        if self.ctf is None:
            return None
        ctf = self.ctf[torch.randint(len(self.ctf), (n,), generator=generator)]
        factor = (self._even(n, generator).double() * math.log(DEFOCUS_FACTOR)).exp()
        ctf = replace(ctf, defocus_u=ctf.defocus_u * factor, defocus_v=ctf.defocus_v * factor)
        model = self.expected.model
        return ctf.evaluate(model.box_size, model.pixel_size, model.device)

    @staticmethod
    def _even(n: int, generator: torch.Generator) -> Tensor:
        """(n,) between -1 and 1."""
        return 2 * torch.rand(n, generator=generator) - 1


def _detail_limits(clues: Clues) -> Tensor:
    """(2, n) float64 least and most of `Clues.detail`."""
    detail = clues.detail.double().cpu()
    return torch.stack([detail.amin(0), detail.amax(0)])


# Training


@dataclass(frozen=True, eq=False)
class _ResidualTraining:
    """What a step needs."""

    source: _Source
    network: ResidualNetwork
    optimizer: torch.optim.Optimizer
    held_out: _Draws
    batch_size: int
    learning_rate: float

    def losses(self, draws: _Draws) -> tuple[Tensor, Tensor]:
        """Mean squared error in Å², and what is minimised."""
        expected = self.source.expected
        answer, log_std = self.network(draws.clues.numbers)
        error = answer - draws.weights / expected.spread
        square = (error * expected.spread).square().sum(1).mean()
        # The answers are taught by the squared error alone.
        surprise = (0.5 * (error.detach() / log_std.exp()).square() + log_std).sum(1).mean()
        return square, square / expected.spread.square().sum() + _ERROR_BAR_SHARE * surprise


def _start(source: _Source, settings: dict) -> _ResidualTraining:
    """An untrained network that knows how large its numbers are."""
    expected = source.expected
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings["seed"])
        network = ResidualNetwork(expected.n_numbers, len(expected.variances), settings["width"])
    numbers = source.draw(_HELD_OUT_DRAWS, _FIRST).clues.numbers.cpu()
    network.middle.copy_(numbers.mean(0))
    network.spread.copy_(numbers.std(0).clamp_min(1e-6))
    network = network.to(expected.model.device)
    rate = settings["learning_rate"]
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=_WEIGHT_DECAY)
    held_out = source.draw(_HELD_OUT_DRAWS, _HELD_OUT)
    return _ResidualTraining(source, network, optimizer, held_out, settings["batch_size"], rate)


def _train(
    training: _ResidualTraining,
    history: tuple[dict, ...],
    steps: int,
    save: Callable[[tuple[dict, ...]], None],
    show: bool,
) -> tuple[dict, ...]:
    ends = [round(steps * (number + 1) / _EPOCHS) for number in range(_EPOCHS)]
    ends = sorted({end for end in ends if end})
    done = ends[len(history) - 1] if history else 0
    size = training.batch_size
    with tqdm(
        total=steps * size, initial=done * size, desc="training", unit="draw", disable=not show
    ) as bar:
        for number in range(len(history), len(ends)):
            start = ends[number - 1] if number else 0
            train_loss = _teach(training, range(start, ends[number]), steps, bar.update)
            record = {"epoch": number + 1, "train_loss": train_loss, **_held_out(training)}
            history = (*history, record)
            bar.set_postfix(explained_motion=f"{record['explained_motion']:.3f}")
            save(history)
    return history


def _teach(
    training: _ResidualTraining, numbers: range, steps: int, update: Callable[[int], object]
) -> float:
    """Steps of these numbers, of so many in all; returns the mean loss in Å²."""
    network, optimizer = training.network, training.optimizer
    network.train()
    total = 0.0
    for number in numbers:
        # Everything depends on the number alone, so a resumed run sees the same.
        warm = min(1.0, (number + 1) / _WARM_UP_STEPS)
        rate = training.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * number / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        draws = training.source.draw(training.batch_size, _TRAINED, number)
        square, loss = training.losses(draws)
        value = float(square.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"expected a finite loss, got {value} at step {number}; try a lower learning_rate"
            )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), _MAX_GRADIENT)
        optimizer.step()
        total += value
        update(training.batch_size)
    return total / len(numbers)


@torch.no_grad()
def _held_out(training: _ResidualTraining) -> dict:
    """Scores on draws that teach nothing."""
    training.network.eval()
    draws = training.held_out
    error = float(training.losses(draws)[0])
    left = float(draws.left.mean())
    spread = float(draws.weights.square().sum(1).mean()) + left
    return {
        "held_out_loss": error,
        "rmsd": (error + left) ** 0.5,
        "explained_motion": 1 - (error + left) / spread,
    }


def _save(
    folder: RunFolder | None,
    training: _ResidualTraining,
    settings: dict,
    identity: str,
    history: tuple[dict, ...],
) -> None:
    if folder is None:
        return
    tensors = {f"network/{k}": v for k, v in training.network.state_dict().items()}
    for index, state in training.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"adam/{index}/{name}"] = torch.as_tensor(value)
    meta = {
        "settings": settings,
        "identity": identity,
        "fingerprint": training.source.expected.model.fingerprint,
        "history": list(history),
    }
    last = history[-1]
    folder.log(
        f"part {last['epoch']} of {_EPOCHS}: loss {last['train_loss']:.6g} Å², explained motion of "
        f"held-out draws {last['explained_motion']:.3f}"
    )
    folder.save(_STATE_NAME, tensors, meta)


def _load(
    folder: RunFolder | None, training: _ResidualTraining, settings: dict, identity: str
) -> tuple[dict, ...]:
    """History of a run that was cut, whose network and optimizer are taken up; else empty."""
    kept = None if folder is None else folder.load(_STATE_NAME)
    if folder is None or kept is None:
        return ()
    tensors, meta = kept
    model = training.source.expected.model
    require_same_model(model, meta["fingerprint"], f"a run ({folder.path})")
    differing = [name for name, value in settings.items() if meta["settings"].get(name) != value]
    if meta["identity"] != identity:
        differing.append("result")
    if differing:
        raise ValueError(
            f"expected a run of this result and these settings, got one that differs in "
            f"{', '.join(differing)} in {folder.path}; try another folder"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    training.network.load_state_dict(part("network/"))
    n_parameters = len(list(training.network.parameters()))
    adam = {index: part(f"adam/{index}/") for index in range(n_parameters)}
    training.optimizer.load_state_dict(training.optimizer.state_dict() | {"state": adam})
    return tuple(meta["history"])
