"""The paper's convolutional encoder (Appendix C): image → latents of every chain.

Symbols of the paper: ℰ → `Encoder`; its outputs α, (w₁, w₂) and t → the flat latents of `dynamics`.
"""

import roma
import torch
from torch import Tensor, nn

from .dynamics import KINDS, Dynamics, two_vectors_to_rotation

FILTERS = (32, 128, 256, 512)
HIDDEN = (512, 256)


class Encoder(nn.Module):
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
        Pool once a block, as the encoders this one descends from, or after every convolution, as Appendix C
        reads literally (eight times: 256 px becomes 1 px).

    Raises
    ------
    ValueError
        For an unknown `pool`, or a box that pooling would shrink to nothing.

    Notes
    -----
    The last layer of every head starts at zero, so an untrained encoder answers with the reference structure.
    The rotation's two 3-vectors are (1, 0, 0) and (0, 1, 0) plus the head's tanh, orthonormalised.
    """

    def __init__(self, dynamics: Dynamics, box_size: int, width: float = 1.0, pool: str = "block"):
        super().__init__()
        if pool not in ("block", "conv"):
            raise ValueError(f'expected pool "block" or "conv", got {pool!r}')
        side = box_size // 2 ** (4 if pool == "block" else 8)
        if side < 1:
            raise ValueError(
                f'expected images of at least {16 if pool == "block" else 256} px for pool="{pool}", '
                f'got {box_size} px; try pool="block" or a larger box'
            )
        self.box_size, self.width, self.pool = box_size, width, pool
        self.chains = dynamics.chains
        filters = [1] + [max(1, round(width * f)) for f in FILTERS]
        hidden = [max(1, round(width * h)) for h in HIDDEN]
        layers = []
        for before, after in zip(filters[:-1], filters[1:], strict=True):
            first_pool = [nn.MaxPool2d(2)] if pool == "conv" else []
            layers += [nn.Conv2d(before, after, 3, padding=1), *first_pool, nn.ReLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleList()
        for layout in self.chains:
            # The two 3-vectors of a rotation take six outputs, its rotation vector three latents.
            sizes = {kind: getattr(layout, kind).stop - getattr(layout, kind).start for kind in KINDS}
            sizes["rotation"] *= 2
            heads = {kind: _head(filters[-1] * side**2, hidden, size) for kind, size in sizes.items() if size}
            self.heads.append(nn.ModuleDict(heads))
        for layer in [*self.features, *(part for heads in self.heads for head in heads.values() for part in head[:-1])]:
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                # torch's own initial weights let features fade over ten layers until they hardly depend on the image.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        radius = [float(1 / dynamics.scale[c.rotation.start]) if dynamics.rotation else 1.0 for c in self.chains]
        self.register_buffer("radius", torch.tensor(radius), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(b, p) latents of (b, box, box) images; every image is standardised first."""
        if images.shape[-2:] != (self.box_size, self.box_size):
            raise ValueError(f"expected images of {self.box_size} px, got {tuple(images.shape[-2:])}")
        centred = images - images.mean(dim=(-2, -1), keepdim=True)
        features = self.features((centred / centred.std(dim=(-2, -1), keepdim=True).clamp_min(1e-12)).unsqueeze(1))
        parts = []
        for chain, heads in enumerate(self.heads):
            for kind, head in heads.items():
                out = head(features)
                if kind == "rotation":
                    # An output of 1 turns the chain's atoms by about 1 Å.
                    vectors = torch.tanh(out.view(-1, 2, 3) / self.radius[chain]) + torch.eye(3, device=out.device)[:2]
                    out = roma.rotmat_to_rotvec(two_vectors_to_rotation(vectors)) * self.radius[chain]
                parts.append(out)
        return torch.cat(parts, dim=1)


def _head(n_features: int, hidden: list[int], n_out: int) -> nn.Sequential:
    last = nn.Linear(hidden[1], n_out)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(n_features, hidden[0]), nn.ReLU(), nn.Linear(hidden[0], hidden[1]), nn.ReLU(), last)
