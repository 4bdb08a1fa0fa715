"""The paper's convolutional encoder (Appendix C): image → latents of every chain.

Symbols of the paper: ℰ → `EncoderNetwork`; its outputs α, (w₁, w₂) and t → the flat latents of
`Dynamics`.
"""

import os
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .._arguments import Count, checked
from .._devices import choose_device
from .._files import load_tensors, save_tensors
from .._processes import gather, own_share
from ..images import ParticleStack
from ..model import (
    KINDS,
    PRETRAINED_FOLDER,
    Dynamics,
    Model,
    pack_model,
    require_same_images,
    unpack_model,
)
from .residual_encoder import (
    ENCODER_KIND,
    ResidualEncoder,
    encode_residuals,
    unpack_residual_encoder,
)
from .result import Result

_FILTERS = (32, 128, 256, 512)
_HIDDEN = (512, 256)
# Of the encoders that come with the package, after the name of the molecule.
_PRETRAINED_SUFFIX = "-encoder.safetensors"


class EncoderNetwork(nn.Module):
    """Four DoubleConvBlocks of 3 × 3 kernels, then one small perceptron a chain and kind of latent.

    Parameters
    ----------
    dynamics : Dynamics
        Says which latents there are and what a unit of each means.
    box_size : int
        Pixels a side of the images.
    width : float
        Multiplies every number of filters and hidden units; 1 is the paper's.
    pool : {"block", "conv"}
        Pool once a block, as the encoders this one descends from, or after every convolution, as
        Appendix C reads literally (eight times: 256 px becomes 1 px).

    Raises
    ------
    ValueError
        For an unknown `pool`, or a box that pooling would shrink to nothing.

    Notes
    -----
    The last layer of every head starts at zero, so an untrained encoder answers with the reference
    structure. The rotation's two 3-vectors are (1, 0, 0) and (0, 1, 0) plus the head's tanh,
    orthonormalised.
    """

    def __init__(
        self, dynamics: Dynamics, box_size: int, width: float = 1.0, pool: str = "block"
    ) -> None:
        super().__init__()
        if pool not in ("block", "conv"):
            raise ValueError(f'expected pool "block" or "conv", got {pool!r}; try "block"')
        side = box_size // 2 ** (4 if pool == "block" else 8)
        if side < 1:
            least = 16 if pool == "block" else 256
            raise ValueError(
                f'expected images of at least {least} px for pool="{pool}", '
                f'got {box_size} px; try pool="block" or a larger box'
            )
        self.box_size = box_size
        self.width = width
        self.pool = pool
        self.chains = dynamics.chains
        filters = [1] + [max(1, round(width * f)) for f in _FILTERS]
        hidden = [max(1, round(width * h)) for h in _HIDDEN]
        self.features = _convolutions(filters, pool)
        self.heads = nn.ModuleList()
        for layout in self.chains:
            sizes = {kind: _n_of_kind(layout, kind) for kind in KINDS}
            # The two 3-vectors of a rotation take six outputs, its rotation vector three latents.
            sizes["rotation"] *= 2
            n_features = filters[-1] * side**2
            heads = {k: _head(n_features, hidden, size) for k, size in sizes.items() if size}
            self.heads.append(nn.ModuleDict(heads))
        _spread_initial_weights(self)
        radius = [1.0] * len(self.chains)
        if dynamics.rotation:
            radius = [float(1 / dynamics.scale[c.rotation.start]) for c in self.chains]
        self.n_latents = max(layout.latents.stop for layout in self.chains)
        # Å an output of 1 of each chain's rotation moves its atoms by; no weight.
        self.radius = radius

    def forward(self, images: Tensor) -> Tensor:
        """(b, p) latents of (b, box, box) images; every image is standardised first."""
        if images.shape[-2:] != (self.box_size, self.box_size):
            raise ValueError(
                f"expected images of {self.box_size} px, got {tuple(images.shape[-2:])}; "
                "try particles of the box that the encoder was trained on"
            )
        centred = images - images.mean(dim=(-2, -1), keepdim=True)
        spread = centred.std(dim=(-2, -1), keepdim=True).clamp_min(1e-12)
        features = self.features((centred / spread).unsqueeze(1))
        parts = []
        for chain, heads in enumerate(self.heads):
            for kind, head in cast(nn.ModuleDict, heads).items():
                out = head(features)
                if kind == "rotation":
                    # An output of 1 turns the chain's atoms by about 1 Å.
                    out = _outputs_to_rotvec(out / self.radius[chain]) * self.radius[chain]
                parts.append(out)
        return torch.cat(parts, dim=1)


def two_vectors_to_rotation(vectors: Tensor) -> Tensor:
    """(…, 3, 3) rotation whose first two columns are the two 3-vectors of (…, 2, 3).

    They are orthonormalised in order, by Gram–Schmidt: the paper's parameterisation of R (section
    2.1).

    Examples
    --------
    >>> two_vectors_to_rotation(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    import roma  # pulls in torch._dynamo, which takes longer to import than all of this package

    return roma.special_gramschmidt(vectors.transpose(-1, -2), epsilon=1e-12)


def _outputs_to_rotvec(outputs: Tensor) -> Tensor:
    """(b, 3) rotation vectors of (b, 6) outputs, by the paper's two vectors."""
    import roma

    offsets = torch.tanh(outputs.view(-1, 2, 3))
    axes = torch.eye(3, device=outputs.device)[:2]
    return roma.rotmat_to_rotvec(two_vectors_to_rotation(offsets + axes))


def _n_of_kind(layout, kind: str) -> int:
    latents = getattr(layout, kind)
    return latents.stop - latents.start


def _convolutions(filters: list[int], pool: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in zip(filters[:-1], filters[1:], strict=True):
        layers.append(nn.Conv2d(before, after, 3, padding=1))
        if pool == "conv":
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.ReLU())
        layers.append(nn.Conv2d(after, after, 3, padding=1))
        layers.append(nn.MaxPool2d(2))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.Flatten())


def _head(n_features: int, hidden: list[int], n_out: int) -> nn.Sequential:
    last = nn.Linear(hidden[1], n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(
        nn.Linear(n_features, hidden[0]),
        nn.ReLU(),
        nn.Linear(hidden[0], hidden[1]),
        nn.ReLU(),
        last,
    )


def _spread_initial_weights(network: EncoderNetwork) -> None:
    """Kaiming's weights for all but the last layer of each head.

    torch's own initial weights let features fade over ten layers until they hardly depend on the
    image.
    """
    layers = list(network.features)
    for heads in network.heads:
        for head in cast(nn.ModuleDict, heads).values():
            layers += list(cast(nn.Sequential, head))[:-1]
    for layer in layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")


@dataclass(frozen=True, eq=False, repr=False)
class Encoder:
    """A network trained to answer an image with latents, and the model whose latents they are.

    What `train_encoder` returns. Measured at a laptop's scale, its latents know little of the
    molecule even where they look neat: always compare with `refine` and the mean conformation.

    Attributes
    ----------
    model : Model
    network : EncoderNetwork
        With the weights of the lowest held-out loss, on the CPU.
    contrast : float
        Brightness of the training images over the model's.
    history : tuple of dict
        One record an epoch: "epoch", "train_loss", "held_out_loss", and where the truth is known
        "rmsd" (Å) and "explained_motion" of the held-out particles.
    """

    model: Model
    network: EncoderNetwork
    contrast: float
    history: Sequence[Mapping]

    @checked
    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all, that `load_encoder` opens alone."""
        tensors, model_meta = pack_model(self.model)
        weights = self.network.state_dict()
        tensors |= {f"network/{name}": value for name, value in weights.items()}
        meta = {
            "kind": ENCODER_KIND,
            "model": model_meta,
            "width": self.network.width,
            "pool": self.network.pool,
            "contrast": self.contrast,
            "history": [dict(record) for record in self.history],
        }
        save_tensors(path, tensors, meta)

    def __repr__(self) -> str:
        n_weights = sum(parameter.numel() for parameter in self.network.parameters())
        epochs = f"{len(self.history)} epochs"
        return f"Encoder({self.model.structure.name!r}, {n_weights / 1e6:.1f} M weights, {epochs})"


def new_network(model: Model, width: float, pool: str, seed: int) -> EncoderNetwork:
    """An untrained network for the latents and images of `model`; `seed` sets its weights."""
    # The caller's random state stays as it is.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return EncoderNetwork(model.dynamics, model.box_size, width, pool)


@checked
def load_encoder(path: str | os.PathLike) -> Encoder | ResidualEncoder:
    """Open an encoder of the package, or one that ``save`` wrote; nothing else is needed.

    Parameters
    ----------
    path : str or path
        "glua3", the `ResidualEncoder` that comes with the package (synthetic particles, see its
        card beside it in ``cryochains/data``), or a file.

    Returns
    -------
    Encoder or ResidualEncoder

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no such file, or it is damaged.

    Examples
    --------
    >>> load_encoder("glua3")
    ResidualEncoder('glua3-closed', 64 px × 1.94 Å, 1 direction, ... draws)
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=None, box_size=32, pixel_size=5.0)
    >>> untrained = Encoder(model, new_network(model, width=0.1, pool="block", seed=0), 1.0, ())
    >>> untrained.save("results/doc/encoder.safetensors")
    >>> load_encoder("results/doc/encoder.safetensors")
    Encoder('glua3-closed', 0.1 M weights, 0 epochs)
    """
    pretrained = PRETRAINED_FOLDER / f"{path}{_PRETRAINED_SUFFIX}"
    if os.fspath(path).isidentifier() and pretrained.is_file():
        path = pretrained
    tensors, meta = load_tensors(path, ENCODER_KIND)
    unpack = unpack_residual_encoder if meta.get("given") == "residuals" else _unpack_encoder
    try:
        return unpack(tensors, meta)
    except (KeyError, TypeError, RuntimeError, ValueError, AttributeError) as error:
        # torch names every weight, a line each.
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"expected an encoder file, got one that is damaged at {path} "
            f"({type(error).__name__}: {reason}); try another copy of it"
        ) from error


def _unpack_encoder(tensors: dict[str, Tensor], meta: dict) -> Encoder:
    model = unpack_model(tensors, meta["model"])
    network = new_network(model, meta["width"], meta["pool"], seed=0)
    prefix = "network/"
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    network.load_state_dict(weights)
    return Encoder(model, network.eval(), float(meta["contrast"]), tuple(meta["history"]))


@torch.no_grad()
@checked
def encode(
    encoder: Encoder | ResidualEncoder,
    particles: ParticleStack,
    *,
    batch_size: Count = 64,
    device: str | torch.device | None = None,
) -> Result:
    """The encoder's latents of every particle; with error bars where it is given residuals.

    Parameters
    ----------
    encoder : Encoder or ResidualEncoder
        The paper's, or one that `train_residual_encoder` returned.
    particles : ParticleStack
        Of the box and pixel size that the encoder was trained on. A `ResidualEncoder` also looks
        at the CTFs, the noise and the detail of some, and refuses what it was not trained on.
    batch_size : int
    device : torch device, optional
        By default a GPU where there is one.

    Returns
    -------
    Result
        In the order of the particles; ``refine(…, start=result)`` starts from it.

    Raises
    ------
    ValueError
        For particles of another box or pixel size, and to a `ResidualEncoder` of another molecule,
        noise or CTF.

    Warns
    -----
    UserWarning
        A `ResidualEncoder`, of images that are constant or hold NaN or Inf: with responsibility 0,
        and the population's mean and spread for latents and error bars.

    Examples
    --------
    >>> from cryochains import load_structure, simulate_particles
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 8, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> model = Model(closed, particles, modes=None)
    >>> untrained = Encoder(model, new_network(model, width=0.1, pool="block", seed=0), 1.0, ())
    >>> encode(untrained, particles)
    Result(8 particles, encoded, 12 latents of 'glua3-closed')
    """
    if isinstance(encoder, ResidualEncoder):
        return encode_residuals(encoder, particles, batch_size, device)
    require_same_images(encoder.model, particles)
    device = choose_device(device)
    # A copy: the encoder stays where and as it is, whatever happens.
    network = deepcopy(encoder.network).to(device).eval()
    latents = encode_images(network, particles, batch_size)
    return Result(
        encoder.model,
        latents,
        particles=particles,
        scale=torch.full((len(latents),), encoder.contrast),
        history=encoder.history,
        kind="encoded",
    )


@torch.no_grad()
def encode_images(network: EncoderNetwork, particles: ParticleStack, batch_size: int) -> Tensor:
    """(N, p) latents of every particle, on the CPU, by a network in evaluation mode."""
    device = next(network.parameters()).device
    n = len(particles)
    # Of several processes each takes its share.
    own = particles[own_share(n)]
    latents = torch.empty(len(own), network.n_latents)
    for batch in own.batches(batch_size, device=device):
        latents[batch.rows.cpu()] = network(batch.images).cpu()
    return gather(latents, n)
