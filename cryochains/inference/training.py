"""Amortised training: the pixel-wise MSE trains the encoder alone (section 2).

Measured at a laptop's scale, an encoder's latents know little of the molecule even where they look
neat: always compare with `refine` and with the mean conformation (see the README).
"""

import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._arguments import Count, Positive, Seed, checked
from .._devices import choose_device
from .._files import content_digest, load_tensors, save_tensors
from ..images import Batch, ParticleStack
from ..model import Model, require_same_images, require_same_model
from .encoder import Encoder, EncoderNetwork, encode_images, new_network
from .image_model import measure_contrast
from .result import Result
from .scores import score

_TRAINING_KIND = "training checkpoint"


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
        Written after every epoch; a run that was cut resumes from it and gives the same numbers.
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
        When the particles do not fit the model, the loss is not finite, or the checkpoint is of
        another model, data or settings.

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
    path = None if checkpoint is None else Path(checkpoint)
    progress_so_far = _load_training(path, model, network, optimizer, settings)
    if progress_so_far is None:
        progress_so_far = _Progress(_weights(network), measure_contrast(model, train))
    trained = _train_epochs(
        _Training(model, network, optimizer, train, validation, batch_size, precision),
        progress_so_far,
        epochs,
        patience,
        seed,
        save=lambda progress_now: _save_training(
            path, model, network, optimizer, settings, progress_now
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
        return (expected - batch.images).square().mean()


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
        total=epochs * n, initial=done * n, desc="training", unit="particle", disable=not show
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
    total = 0.0
    device = training.model.device
    for batch in training.train.batches(training.batch_size, device=device, seed=seed):
        loss = training.loss(batch, contrast)
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise ValueError(
                f"expected a finite loss, got {value} in epoch {number + 1}; "
                "try a lower learning_rate, precision='no', and check the images for NaN"
            )
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        total += value * len(batch.rows)
        update(len(batch.rows))
    return total / len(training.train)


@torch.no_grad()
def _evaluate(training: _Training, contrast: float) -> dict:
    """Loss on the validation particles and, where their truth is known, scores."""
    training.network.eval()
    device, particles = training.model.device, training.validation
    total = 0.0
    for batch in particles.batches(training.batch_size, device=device):
        total += float(training.loss(batch, contrast)) * len(batch.rows)
    record = {"held_out_loss": total / len(particles), "rmsd": None, "explained_motion": None}
    if particles.truth is not None:
        latents = encode_images(training.network, particles, training.batch_size)
        scores = score(Result(training.model, latents, particles=particles))
        record |= {"rmsd": scores.rmsd, "explained_motion": scores.explained_motion}
    return record


def _weights(network: EncoderNetwork) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def _save_training(
    path: Path | None,
    model: Model,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    settings: dict,
    progress: _Progress,
) -> None:
    if path is None:
        return
    tensors = {f"last/{name}": value for name, value in _weights(network).items()}
    tensors |= {f"best/{name}": value for name, value in progress.best.items()}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            tensors[f"adam/{index}/{name}"] = torch.as_tensor(value)
    meta = {
        "kind": _TRAINING_KIND,
        "contrast": progress.contrast,
        "history": list(progress.history),
        "fingerprint": model.fingerprint,
        "settings": settings,
    }
    save_tensors(path, tensors, meta)


def _load_training(
    path: Path | None,
    model: Model,
    network: EncoderNetwork,
    optimizer: torch.optim.Optimizer,
    settings: dict,
) -> _Progress | None:
    """Network and optimizer as a run that was cut left them; None where there is no checkpoint."""
    if path is None or not path.exists():
        return None
    tensors, meta = load_tensors(path, _TRAINING_KIND)
    require_same_model(model, meta["fingerprint"], f"a checkpoint ({path})")
    other = meta["settings"]
    differing = [name for name, value in settings.items() if other.get(name) != value]
    if differing:
        raise ValueError(
            f"expected a checkpoint of this encoder, data and settings, got one that differs in "
            f"{', '.join(differing)} at {path}; try another checkpoint path"
        )

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    network.load_state_dict(part("last/"))
    n_parameters = len(list(network.parameters()))
    adam = {index: part(f"adam/{index}/") for index in range(n_parameters)}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": adam})
    return _Progress(part("best/"), meta["contrast"], tuple(meta["history"]))
