"""Conformation versus pose: the same conformations seen from another frame, and the way back.

A turn or shift that all chains share changes the pose and not the conformation. Symbols: X → coords
of latents z, X′ of z′; R → `rotations` and t → `shifts` of the frame,

    X = R X′ + t,  so that  R′ᶜ = Rᵀ Rᶜ,  u′ᶜ = Rᵀ (uᶜ − t)

for the rotation Rᶜ of a chain and the position uᶜ of its centre; modes stay as they are. A small
step of z turns R into R exp([ω]×) and shifts t by R τ.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .dynamics import Dynamics
from .rotations import (
    best_rotation,
    cross_matrix,
    matrix_to_rotvec,
    right_jacobian,
    rotvec_to_matrix,
)

_MOLECULE = "molecule"
# Conformations in memory at a time.
_CONFORMATIONS_IN_MEMORY = 256


@dataclass(frozen=True, eq=False)
class InFrame:
    """Conformations in another frame; made by `in_frame`. All in float64.

    Attributes
    ----------
    latents : (n, p) tensor
        z′.
    rotations : (n, 3, 3) tensor
        R of X = R X′ + t.
    shifts : (n, 3) tensor
        t, Å.
    """

    latents: Tensor
    rotations: Tensor
    shifts: Tensor

    @property
    def turns(self) -> Tensor:
        """(n, 3) rotation vectors of R in radians."""
        return matrix_to_rotvec(self.rotations)

    def image_shifts(self, rotations: Tensor, origin: np.ndarray) -> Tensor:
        """(n, 2) Å by which the poses' shifts grow: [Rᵢ (R o + t − o)]xy.

        An image of z with the pose Rᵢ, sᵢ is that of z′ with Rᵢ R and sᵢ plus this; `origin` (3,)
        is the microscope's.
        """
        o = torch.as_tensor(origin).to(self.shifts)
        return _apply(rotations[:, :2].to(self.shifts), self.rotations @ o + self.shifts - o)


@dataclass(frozen=True, eq=False)
class FrameJacobian:
    """`in_frame` and its derivatives; made by `frame_jacobian`. All in float64.

    Attributes
    ----------
    seen : InFrame
    latents : (n, p, p) tensor
        ∂z′/∂z.
    turns, shifts : (n, 3, p) tensors
        ∂ω/∂z in radians, ∂τ/∂z in Å.
    """

    seen: InFrame
    latents: Tensor
    turns: Tensor
    shifts: Tensor

    def pose(self, rotations: Tensor, origin: np.ndarray) -> tuple[Tensor, Tensor]:
        """(n, 3, p) and (n, 2, p): ``seen.turns`` and ``seen.image_shifts`` by z."""
        turned = self.seen.rotations
        turns = torch.linalg.solve(right_jacobian(self.seen.turns), self.turns)
        moved = self.shifts - cross_matrix(torch.as_tensor(origin).to(turned)) @ self.turns
        return turns, rotations[:, :2].to(turned) @ turned @ moved


def can_change_frame(dynamics: Dynamics) -> bool:
    """Whether every conformation of this model has latents in any frame."""
    return dynamics.rotation and dynamics.translation


@torch.no_grad()
def in_frame(dynamics: Dynamics, latents: Tensor, frame: str = _MOLECULE) -> InFrame:
    """The same conformations seen from another frame, and the way back.

    Parameters
    ----------
    dynamics : Dynamics
    latents : (n, p) tensor
    frame : str
        - "molecule": every conformation is superposed on the reference, over the imaging atoms.
        - A chain's id: the turn and shift of that chain become zero. A chain that is itself called
          "molecule" cannot be chosen.

    Returns
    -------
    InFrame

    Raises
    ------
    ValueError
        For an unknown frame, or when chains do not both turn and shift in this model.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> z = torch.randn(5, 12)
    >>> seen = in_frame(dynamics, z, "A")
    >>> bool(seen.latents[:, :6].abs().max() < 1e-6)
    True
    >>> back = dynamics.decode(seen.latents) @ seen.rotations.mT + seen.shifts[:, None]
    >>> bool(torch.allclose(back.float(), dynamics.decode(z), atol=1e-3))
    True
    """
    base = _checked_frame(dynamics, latents, frame)
    products = _frame_products(dynamics)
    parts = []
    for some in latents.to(dynamics.device).double().split(_CONFORMATIONS_IN_MEMORY):
        parts.append(_seen_from(_block(dynamics, some, *products), base)[0])
    return InFrame(
        torch.cat([part.latents for part in parts]),
        torch.cat([part.rotations for part in parts]),
        torch.cat([part.shifts for part in parts]),
    )


@torch.no_grad()
def frame_jacobian(dynamics: Dynamics, latents: Tensor, frame: str = _MOLECULE) -> FrameJacobian:
    """What `in_frame` gives, with its derivatives by the latents; n·p² numbers.

    Raises
    ------
    ValueError
        As of `in_frame`.
    """
    base = _checked_frame(dynamics, latents, frame)
    products = _frame_products(dynamics)
    block = _block(dynamics, latents.to(dynamics.device).double(), *products)
    seen, turns, positions = _seen_from(block, base)
    if base is None:
        by_z = _superposition_by_latents(block, seen.rotations, turns, *products)
    else:
        by_z = _chain_by_latents(block, seen.rotations, base)
    latents_by_z = _latents_by_latents(block, seen, turns, positions, *by_z)
    return FrameJacobian(seen, latents_by_z, *by_z)


@torch.no_grad()
def superposed(dynamics: Dynamics, coords: Tensor) -> Tensor:
    """(b, n_atoms, 3) `coords`, each turned and shifted onto the reference (Kabsch 1976).

    Examples
    --------
    >>> from cryochains import load_structure
    >>> dynamics = Dynamics(load_structure("glua3-closed"))
    >>> shifted = superposed(dynamics, dynamics.reference[None] + 5.0)
    >>> bool((shifted - dynamics.reference).abs().max() < 1e-4)
    True
    """
    x = coords.double()
    x = x - x.mean(1, keepdim=True)
    reference = dynamics.reference.to(x)
    center = reference.mean(0)
    rotations = best_rotation(x.mT @ (reference - center))
    return (x @ rotations + center).to(coords)


def _checked_frame(dynamics: Dynamics, latents: Tensor, frame: str) -> int | None:
    """Number of the chain whose frame is asked for; None for that of the molecule."""
    ids = dynamics.structure.chain_ids
    if frame != _MOLECULE and frame not in ids:
        raise ValueError(
            f"expected the frame {_MOLECULE!r} or a chain of {', '.join(ids)}, got {frame!r}; "
            f"try {_MOLECULE!r}"
        )
    if not can_change_frame(dynamics):
        raise ValueError(
            "expected a model whose chains turn and shift, got one with either switched off; "
            "try rotation=True and translation=True"
        )
    if latents.ndim != 2 or latents.shape[1] != dynamics.n_latents:
        raise ValueError(
            f"expected latents (n, {dynamics.n_latents}), got {tuple(latents.shape)}; "
            "try latents[None] for one conformation"
        )
    return None if frame == _MOLECULE else ids.index(frame)


def _frame_products(dynamics: Dynamics) -> tuple[tuple[Tensor, ...], Tensor]:
    """Per chain (1 + K, 3, 4) Σ x (y, 1)ᵀ over its atoms, and of all (n_chains, 4) Σ (y, 1).

    x is the atom's position from the chain's centre, then what each mode adds to it; y is the
    reference from its mean. With these a superposition needs no atom: a million take a minute.
    """
    reference = dynamics.reference.double()
    centred = torch.nn.functional.pad(reference - reference.mean(0), (0, 1), value=1.0)
    products = []
    weights = []
    for chain, layout in enumerate(dynamics.chains):
        x = dynamics.bend(reference.new_zeros(1, dynamics.n_latents), chain)
        x = torch.cat([x, dynamics.mode_vectors[chain].double()])
        y = centred[layout.atoms]
        products.append(x.mT @ y)
        weights.append(y.sum(0))
    return tuple(products), torch.stack(weights)


def _apply(matrices: Tensor, vectors: Tensor) -> Tensor:
    """(b, k) products of (b, k, 3) matrices with (b, 3) vectors."""
    return (matrices @ vectors.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class _Block:
    """Some conformations, and what is computed of all of them at once, in float64.

    Attributes
    ----------
    dynamics : Dynamics
    latents : (b, p) tensor
    turns : (b, n_chains, 3, 3) tensor
        Rᶜ.
    positions : (b, n_chains, 3) tensor
        uᶜ, Å.
    own_turns : (b, n_chains, 3, 3) tensor
        What one unit of each rotation latent turns its chain by, in the chain's own axes, radians.
    products : (b, n_chains, 3, 4) tensor
        Σ x (y, 1)ᵀ of each chain as it is bent.
    total : (b, 3, 4) tensor
        Σ X (y, 1)ᵀ of all atoms.
    """

    dynamics: Dynamics
    latents: Tensor
    turns: Tensor
    positions: Tensor
    own_turns: Tensor
    products: Tensor
    total: Tensor


def _block(
    dynamics: Dynamics, latents: Tensor, of_modes: tuple[Tensor, ...], weights: Tensor
) -> _Block:
    """Of (b, p) float64 latents, and what `_frame_products` gave."""
    turns = []
    own_turns = []
    products = []
    for chain, layout in enumerate(dynamics.chains):
        rotvecs = dynamics.rotvecs(latents, chain)
        turns.append(rotvec_to_matrix(rotvecs))
        own_turns.append(
            right_jacobian(rotvecs) * dynamics.scale_tensor[layout.rotation.start].double()
        )
        bending = latents[:, layout.mode] @ of_modes[chain][1:].flatten(1)
        products.append(of_modes[chain][0] + bending.view(-1, 3, 4))
    turn = torch.stack(turns, dim=1)
    product = torch.stack(products, dim=1)
    shifts = torch.stack([latents[:, layout.translation] for layout in dynamics.chains], dim=1)
    positions = dynamics.centers.double() + shifts
    total = turn @ product + positions.unsqueeze(-1) * weights.unsqueeze(1)
    own_turn = torch.stack(own_turns, dim=1)
    return _Block(dynamics, latents, turn, positions, own_turn, product, total.sum(1))


def _superposition(block: _Block) -> tuple[Tensor, Tensor]:
    """R (b, 3, 3) and t (b, 3) with X′ superposed on the reference."""
    reference = block.dynamics.reference.double()
    rotations = best_rotation(block.total[..., :3])
    mean = block.total[..., 3] / len(reference)
    return rotations, mean - rotations @ reference.mean(0)


def _frame_of_chain(block: _Block, chain: int) -> tuple[Tensor, Tensor]:
    """R (b, 3, 3) and t (b, 3) with the chain where it is in the reference."""
    rotations = block.turns[:, chain]
    center = block.dynamics.centers[chain].double()
    return rotations, block.positions[:, chain] - rotations @ center


def _seen_from(block: _Block, base: int | None) -> tuple[InFrame, Tensor, Tensor]:
    """The conformations from a chain or the molecule; R′ᶜ (b, n_chains, 3, 3), u′ᶜ (…, 3)."""
    dynamics = block.dynamics
    rotations, shifts = _superposition(block) if base is None else _frame_of_chain(block, base)
    turns = rotations.mT.unsqueeze(1) @ block.turns
    # Rᵀ v of many v, which are rows: vᵀ R.
    positions = (block.positions - shifts.unsqueeze(1)) @ rotations
    latents = block.latents.clone()
    for chain, layout in enumerate(dynamics.chains):
        radians = dynamics.scale_tensor[layout.rotation.start].double()
        latents[:, layout.rotation] = matrix_to_rotvec(turns[:, chain]) / radians
        latents[:, layout.translation] = positions[:, chain] - dynamics.centers[chain]
    return InFrame(latents, rotations, shifts), turns, positions


# Derivatives


def _superposition_by_latents(
    block: _Block,
    rotations: Tensor,
    turns: Tensor,
    of_modes: tuple[Tensor, ...],
    weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """(b, 3, p) each, ω and τ by z when X′ stays superposed on the reference.

    At the superposition Σ y × x′ = 0 for centred y. A step δ = Rᵀ dX of the atoms leaves it so
    with (tr S − S) ω = Σ y × δ, where S = Σ x′ yᵀ, and τ = mean(δ) − ω × mean(x′).
    """
    b, p = block.latents.shape
    # Σ δ (y, 1)ᵀ of each latent.
    steps = block.latents.new_zeros(b, p, 3, 4)
    for chain, layout in enumerate(block.dynamics.chains):
        turn = turns[:, chain].unsqueeze(1)
        steps[:, layout.mode] = turn @ of_modes[chain][1:]
        axes = cross_matrix(block.own_turns[:, chain].mT.reshape(-1, 3)).view(b, 3, 3, 3)
        steps[:, layout.rotation] = turn @ axes @ block.products[:, chain].unsqueeze(1)
        steps[:, layout.translation] = rotations.unsqueeze(-1) * weights[chain]
    torque = torch.stack(
        [
            steps[..., 2, 1] - steps[..., 1, 2],
            steps[..., 0, 2] - steps[..., 2, 0],
            steps[..., 1, 0] - steps[..., 0, 1],
        ],
        dim=1,
    )
    products = rotations.mT @ block.total[..., :3]
    trace = products.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    turn_by_z = torch.linalg.solve(trace * torch.eye(3).to(products) - products, torque)
    reference = block.dynamics.reference.double()
    moved = steps[..., 3].mT / len(reference)
    return turn_by_z, moved + cross_matrix(reference.mean(0)) @ turn_by_z


def _chain_by_latents(block: _Block, rotations: Tensor, chain: int) -> tuple[Tensor, Tensor]:
    """(b, 3, p) each, ω and τ by z when the chain stays where it is."""
    layout = block.dynamics.chains[chain]
    b, p = block.latents.shape
    turn_by_z = block.latents.new_zeros(b, 3, p)
    turn_by_z[:, :, layout.rotation] = block.own_turns[:, chain]
    shift_by_z = cross_matrix(block.dynamics.centers[chain].double()) @ turn_by_z
    shift_by_z[:, :, layout.translation] += rotations.mT
    return turn_by_z, shift_by_z


def _latents_by_latents(
    block: _Block,
    seen: InFrame,
    turns: Tensor,
    positions: Tensor,
    turn_by_z: Tensor,
    shift_by_z: Tensor,
) -> Tensor:
    """(b, p, p) ∂z′/∂z, of R′ᶜ, u′ᶜ, ω and τ by z."""
    dynamics = block.dynamics
    by_z = torch.eye(dynamics.n_latents).to(block.latents).repeat(len(block.latents), 1, 1)
    for chain, layout in enumerate(dynamics.chains):
        # R′ᶜ turns, about its own axes, by what Rᶜ does less what the frame does.
        turned = -turns[:, chain].mT @ turn_by_z
        turned[:, :, layout.rotation] += block.own_turns[:, chain]
        turned = torch.linalg.solve(right_jacobian(dynamics.rotvecs(seen.latents, chain)), turned)
        radians = dynamics.scale_tensor[layout.rotation.start].double()
        by_z[:, layout.rotation] = turned / radians
        # du′ = Rᵀ du − τ − ω × u′.
        moved = cross_matrix(positions[:, chain]) @ turn_by_z - shift_by_z
        moved[:, :, layout.translation] += seen.rotations.mT
        by_z[:, layout.translation] = moved
    return by_z
