"""Amortised training: the pixel-wise MSE trains the encoder alone (section 2).

Measured at a laptop's scale, an encoder's latents know little of the molecule even where they look
neat: always compare with `refine` and with the mean conformation (see the README).
"""

import math
import os
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._arguments import Count, Positive, Seed, checked
from .._devices import choose_device
from .._files import content_digest
from .._processes import is_first, n_processes, own_share, require_same, total
from ..images import Batch, ParticleStack
from ..model import Model, require_same_images, require_same_model
from .encoder import Encoder, EncoderNetwork, encode_images, new_network
from .folder import RunFolder, open_folder
from .image_model import measure_contrast
from .result import Result
from .scores import score

# Å, whose square is still a number in single precision.
_MOST_SQUARED = 1e18
# Name of what is known after an epoch.
_STATE = "training"


@checked
def train_encoder(
    model: Model,
    train: ParticleStack,
    validation: ParticleStack,
    *,
    width: Positive = 1.0,
    pool: str = "block",
    epochs: Count = 20,
    batch_size: Count = 64,
    learning_rate: Positive = 3e-4,
    patience: Count = 5,
    precision: str = "no",
    seed: Seed = 0,
    checkpoint: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Encoder:
    """Train the paper's encoder against the fixed decoder; the lowest held-out loss is kept.

    Parameters
    ----------
    model : Model
        Is not changed.
    train, validation : ParticleStack
        Only `train` is learned from; `validation` decides when to stop and is scored each epoch.
    width, pool
        Of the network (see `EncoderNetwork`): 1 is the paper's width.
    epochs : int
        At most so many.
    batch_size : int
    learning_rate : float
        Of Adam.
    patience : int
        Stop after this many epochs without a lower held-out loss.
    precision : {"no", "bf16"}
        Of the encoder.
    seed : int
        Of the initial weights and the order of the particles.
    checkpoint : path, optional
        A folder, made where there is none: what was asked, a log, and the weights after each epoch.
        A run that was cut goes on from there and gives the same numbers.
    device : torch device, optional
        By default a GPU where there is one.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Encoder

    Raises
    ------
    ValueError
        When the particles do not fit the model, the loss is not finite, or the folder is of another
        model, data or settings, or in use.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> encoder = train_encoder(
    ...     model, particles[:6], particles[6:], width=0.1, epochs=1, progress=False
    ... )
    >>> len(encoder.history)
    1
    """
    if precision not in ("no", "bf16"):
        raise ValueError(f'expected precision "no" or "bf16", got {precision!r}; try "no"')
    if epochs < 1 or patience < 1 or not width > 0:
        raise ValueError(
            f"expected at least one epoch, patience of one or more and a positive width, got "
            f"epochs={epochs}, patience={patience} and width={width}; try the defaults"
        )
    for particles in (train, validation):
        require_same_images(model, particles)
    model = model.to(choose_device(device))
    settings = {"width": width, "pool": pool, "learning_rate": learning_rate}
    settings |= {"batch_size": batch_size, "seed": seed, "precision": precision}
    settings["data"] = content_digest(train.digest(), validation.digest())
    network = new_network(model, width, pool, seed).to(model.device)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    require_same(model=model.fingerprint, **settings)
    asked = {"model": repr(model), "settings": settings}
    with open_folder(checkpoint, "training", _STATE, asked) as folder:
        progress_so_far = _load_training(folder, model, network, optimizer, settings)
        if progress_so_far is None:
            progress_so_far = _Progress(_weights(network), measure_contrast(model, train))
        elif folder is not None:
            done = len(progress_so_far.history)
            folder.announce(f"going on after {done} epochs", progress)
        trained = _train_epochs(
            _Training(model, network, optimizer, train, validation, batch_size, precision),
            progress_so_far,
            epochs,
            patience,
            seed,
            save=lambda progress_now: _save_training(
                folder, model, network, optimizer, settings, progress_now
            ),
            show=progress,
        )
    network.load_state_dict(trained.best)
    network = deepcopy(network).to("cpu").eval()
    return Encoder(model.to("cpu"), network, trained.contrast, trained.history)


@dataclass(frozen=True, eq=False)
class _Progress:
    """What a training run must remember besides network and optimizer.

    best weights by name, the brightness of the images, and one record an epoch.
    """

    best: dict[str, Tensor]
    contrast: float
    history: tuple[dict, ...] = field(default=())

    @property
    def epochs_without_progress(self) -> int:
        """Epochs since the lowest held-out loss."""
        losses = [record["held_out_loss"] for record in self.history]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def after(self, record: dict, network: EncoderNetwork) -> "_Progress":
        """With one more epoch, whose weights are kept where it is the best so far."""
        later = replace(self, history=(*self.history, record))
        if later.epochs_without_progress == 0:
            later = replace(later, best=_weights(network))
        return later


@dataclass(frozen=True, eq=False)
class _Training:
    """What one epoch needs."""

    model: Model
    network: EncoderNetwork
    optimizer: torch.optim.Optimizer
    train: ParticleStack
    validation: ParticleStack
    batch_size: int
    precision: str

    def loss(self, batch: Batch, contrast: float) -> Tensor:
        """Mean squared difference of the images and their reconstructions."""
        half = self.precision == "bf16"
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=half):
            latents = self.network(batch.images)
        # The projection stays in float32: half precision there costs more accuracy than time.
        coords = self.model.bead_dynamics.decode(latents.float())
        expected = contrast * self.model.microscope.render(coords, *batch.pose)
        loss = (expected - batch.images).square().mean()
        # Atoms that far away touch no pixel, and nothing would call them back.
        is_lost = coords.detach().abs().amax() > _MOST_SQUARED
        return torch.where(is_lost, torch.inf, loss)


def _train_epochs(
    training: _Training,
    progress: _Progress,
    epochs: int,
    patience: int,
    seed: int,
    save: Callable[[_Progress], None],
    show: bool,
) -> _Progress:
    n = len(training.train)
    done = len(progress.history)
    with tqdm(
        total=epochs * n,
        initial=done * n,
        desc="training",
        unit="particle",
        disable=not show or not is_first(),
    ) as bar:
        for number in range(done, epochs):
            if progress.epochs_without_progress >= patience:
                break
            # The order depends on the epoch alone, so a resumed run sees the same batches.
            train_loss = _one_epoch(training, progress.contrast, number, seed + number, bar.update)
            record = {"epoch": number + 1, "train_loss": train_loss}
            record |= _evaluate(training, progress.contrast)
            progress = progress.after(record, training.network)
            bar.set_postfix(held_out_loss=f"{record['held_out_loss']:.4g}")
            save(progress)
    return progress


def _one_epoch(
    training: _Training,
    contrast: float,
    number: int,
    seed: int,
    update: Callable[[int], object],
) -> float:
    """One look at every training image, shuffled by `seed`; returns the mean loss."""
    training.network.train()
    weighed = 0.0
    device = training.model.device
    parameters = list(training.network.parameters())
    for batch, n in _shared_batches(training.train, training.batch_size, device, seed):
        training.optimizer.zero_grad()
        own = torch.zeros((), device=device)
        if batch is not None:
            # As much as this process's particles are of the batch.
            loss = training.loss(batch, contrast) * (len(batch.rows) / n)
            loss.backward()
            own = loss.detach()
        value = float(total(own))
        if not math.isfinite(value):
            raise ValueError(
                f"expected a finite loss, got {value} in epoch {number + 1}; "
                "try a lower learning_rate, precision='no', and check the images for NaN"
            )
        _sum_gradients(parameters)
        training.optimizer.step()
        weighed += value * n
        update(n)
    return weighed / len(training.train)


def _shared_batches(
    particles: ParticleStack, batch_size: int, device: torch.device, seed: int
) -> Iterator[tuple[Batch | None, int]]:
    """Of each batch, shuffled by `seed`, this process's part, if any, and the size of the whole."""
    order = np.random.default_rng(seed).permutation(len(particles))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        own = rows[own_share(len(rows))]
        batch = next(particles[own].batches(len(own), device=device)) if len(own) else None
        yield batch, len(rows)


def _sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Gradients of the whole batch, in every process, from those of each one's part."""
    if n_processes() == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = total(torch.cat([gradient.flatten() for gradient in own]))
    for p, part in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)


@torch.no_grad()
def _evaluate(training: _Training, contrast: float) -> dict:
    """Loss on the validation particles and, where their truth is known, scores."""
    training.network.eval()
    device, particles = training.model.device, training.validation
    weighed = torch.zeros((), dtype=torch.float64)
    for batch in particles[own_share(len(particles))].batches(training.batch_size, device=device):
        weighed += float(training.loss(batch, contrast)) * len(batch.rows)
    held_out = float(total(weighed)) / len(particles)
    record = {"held_out_loss": held_out, "rmsd": None, "explained_motion": None}
    if particles.truth is not None:
        latents = encode_images(training.network, particles, training.batch_size)
        scores = score(Result(training.model, latents, particles=particles))
        record |= {"rmsd": scores.rmsd, "explained_motion": scores.explained_motion}
    return record


def _weights(network: EncoderNetwork) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _save_training(
    folder: RunFolder | None,
    model: Model,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    progress: _Progress,
) -> None:
    if folder is None:
        return
    tensors = {f"last/{name}": value for name, value in _weights(network).items()}
    tensors |= {f"best/{name}": value for name, value in progress.best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"adam/{index}/{name}"] = torch.as_tensor(value)
    meta = {
        "contrast": progress.contrast,
        "history": list(progress.history),
        "fingerprint": model.fingerprint,
        "settings": settings,
    }
    last = progress.history[-1]
    folder.log(
        f"epoch {last['epoch']}: loss {last['train_loss']:.6g}, of held-out particles "
        f"{last['held_out_loss']:.6g}"
    )
    folder.save(_STATE, tensors, meta)


def _load_training(
    folder: RunFolder | None,
    model: Model,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    settings: dict,
) -> _Progress | None:
    """Network and optimizer as a run that was cut left them; None where there is none."""
    kept = None if folder is None else folder.load(_STATE)
    if folder is None or kept is None:
        return None
    tensors, meta = kept
    require_same_model(model, meta["fingerprint"], f"a run ({folder.path})")
    other = meta["settings"]
    differing = [name for name, value in settings.items() if other.get(name) != value]
    if differing:
        raise ValueError(
            f"expected a run of this encoder, data and settings, got one that differs in "
            f"{', '.join(differing)} in {folder.path}; try another folder"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    network.load_state_dict(part("last/"))
    n_parameters = len(list(network.parameters()))
    adam = {index: part(f"adam/{index}/") for index in range(n_parameters)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})
    return _Progress(part("best/"), meta["contrast"], tuple(meta["history"]))
