"""Amortised training: the pixel-wise MSE trains the encoder alone (section 2).

Measured at a laptop's scale, an encoder's latents know little of the molecule even where they look neat: always
compare with `refine` and with the mean conformation (see the README).
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .files import fingerprint, load_tensors, save_tensors
from .metrics import score_motion
from .model import CryoChains
from .particles import ParticleStack


@dataclass(frozen=True)
class Epoch:
    """One line of a training history; rmsd (Å) and explained_motion are None where the truth is not known."""

    epoch: int
    train_loss: float
    held_out_loss: float
    rmsd: float | None = None
    explained_motion: float | None = None


def fit(
    model: CryoChains,
    train: ParticleStack,
    held_out: ParticleStack,
    *,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 3e-4,
    patience: int = 5,
    precision: str = "no",
    seed: int = 0,
    checkpoint=None,
    progress: bool = True,
) -> list[Epoch]:
    """Train the encoder; afterwards the model holds the weights with the lowest held-out loss.

    Parameters
    ----------
    train, held_out : ParticleStack
        Only `train` is learned from; `held_out` decides when to stop and is scored each epoch.
    patience : int
        Stop after this many epochs without a lower held-out loss.
    precision : {"no", "bf16"}
        Of the encoder. (The device is chosen by accelerate: a GPU where there is one.)
    checkpoint : path, optional
        Written after every epoch; a run that was cut resumes from it and gives the same numbers.

    Returns
    -------
    list of Epoch

    Raises
    ------
    ValueError
        When the loss is not finite, or the checkpoint is of another molecule or model.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(closed, 8, conformations=closed.coords[None], box_size=32, progress=False)
    >>> model = CryoChains.for_particles(closed, particles, modes=None, width=0.1)
    >>> history = fit(model, particles[:6], particles[6:], epochs=1, progress=False)
    >>> len(history)
    1
    """
    if precision not in ("no", "bf16"):
        raise ValueError(f'expected precision "no" or "bf16", got {precision!r}')
    for particles in (train, held_out):
        model.check_particles(particles)
    # Not Apple's MPS, which accelerate would choose: it has no float64, and the scores need it.
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    model.to(accelerator.device)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=learning_rate)
    data = fingerprint(train.fingerprint(), held_out.fingerprint(), learning_rate, batch_size, seed)
    run = _Run(model, optimizer, data)
    if checkpoint is not None and Path(checkpoint).exists():
        run.load(checkpoint)
    else:
        model.estimate_contrast(train)
    encoder, optimizer = accelerator.prepare(model.encoder, optimizer)

    def loss_of(batch) -> Tensor:
        # accelerate takes one precision a process, and a notebook may want to try both.
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            latents = encoder(batch.images)
        # The projection stays in float32: half precision there costs more accuracy than time.
        return (model.render(latents.float(), *batch.pose) - batch.images).square().mean()

    bar = tqdm(total=epochs * len(train), initial=len(run.history) * len(train),
               desc="training", unit="particle", disable=not progress)  # fmt: skip
    with bar:
        for number in range(len(run.history), epochs):
            if run.epochs_without_progress() >= patience:
                break
            model.train()
            total = 0.0
            # The order depends on the epoch alone, so a resumed run sees the same batches.
            for batch in train.batches(batch_size, device=model.device, seed=seed + number):
                loss = loss_of(batch)
                if not torch.isfinite(loss.detach()):
                    raise ValueError(
                        f"expected a finite loss, got {float(loss.detach())} in epoch {number + 1}; "
                        "try a lower learning_rate, precision='no', and check the images for NaN"
                    )
                optimizer.zero_grad()
                accelerator.backward(loss)
                optimizer.step()
                total += float(loss.detach()) * len(batch.rows)
                bar.update(len(batch.rows))
            run.add(_evaluate(model, number + 1, total / len(train), held_out, loss_of, batch_size))
            bar.set_postfix(held_out_loss=f"{run.history[-1].held_out_loss:.4g}")
            if checkpoint is not None:
                run.save(checkpoint)
    model.encoder.load_state_dict(run.best)
    model.eval()
    return run.history


@torch.no_grad()
def encode_particles(model: CryoChains, particles: ParticleStack, batch_size: int = 64) -> Tensor:
    """(N, p) the encoder's latents of every particle, on the CPU, in the stack's order."""
    model.eval()
    return torch.cat([model.encode(b.images).cpu() for b in particles.batches(batch_size, device=model.device)])


@torch.no_grad()
def _evaluate(model, number, train_loss, held_out, loss_of, batch_size) -> Epoch:
    model.eval()
    total, latents = 0.0, []
    for batch in held_out.batches(batch_size, device=model.device):
        total += float(loss_of(batch)) * len(batch.rows)
        if held_out.truth is not None:
            latents.append(model.encode(batch.images).cpu())
    if held_out.truth is None:
        return Epoch(number, train_loss, total / len(held_out))
    scores = score_motion(model.dynamics, torch.cat(latents), held_out)
    return Epoch(number, train_loss, total / len(held_out), scores.rmsd, scores.explained_motion)


class _Run:
    """What a training run must remember to go on as if it had never stopped."""

    def __init__(self, model: CryoChains, optimizer: torch.optim.Optimizer, data: str):
        self.model, self.optimizer, self.data = model, optimizer, data
        self.history: list[Epoch] = []
        self.best = self._weights()

    def _weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.model.encoder.state_dict().items()}

    def epochs_without_progress(self) -> int:
        losses = [epoch.held_out_loss for epoch in self.history]
        return len(losses) - 1 - losses.index(min(losses)) if losses else 0

    def add(self, epoch: Epoch) -> None:
        self.history.append(epoch)
        if self.epochs_without_progress() == 0:
            self.best = self._weights()

    def _identity(self) -> dict:
        encoder = self.model.encoder
        return {
            "structure_hash": self.model.structure.content_hash, "n_latents": self.model.dynamics.n_latents,
            "data and settings": self.data, "box_size": encoder.box_size, "width": encoder.width, "pool": encoder.pool,
        }  # fmt: skip

    def save(self, path) -> None:
        tensors = {f"last/{name}": value for name, value in self._weights().items()}
        tensors |= {f"best/{name}": value for name, value in self.best.items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"adam/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
        history = [asdict(epoch) for epoch in self.history]
        meta = {"kind": "training checkpoint", "contrast": float(self.model.contrast), "history": history}
        save_tensors(path, tensors, meta | self._identity())

    def load(self, path) -> None:
        tensors, meta = load_tensors(path, "training checkpoint")
        identity = self._identity()
        differing = [name for name, value in identity.items() if meta.get(name) != value]
        if differing:
            raise ValueError(
                f"expected a checkpoint of {self.model.structure!r} and this encoder, got one that differs in "
                f"{', '.join(differing)} at {path}; try another checkpoint path"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.model.encoder.load_state_dict(part("last/"))
        self.model.contrast.fill_(meta["contrast"])
        self.best = part("best/")
        adam = {index: part(f"adam/{index}/") for index, _ in enumerate(self.model.encoder.parameters())}
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": adam})
        self.history = [Epoch(**epoch) for epoch in meta["history"]]
