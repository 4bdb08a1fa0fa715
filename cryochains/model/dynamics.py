"""Latents → coordinates: normal modes (Eq. 1), rotation and translation of each chain.

Symbols of the paper: α → mode weights, R → `rotvec` or rotation matrix, t → `translation`,
X → `coords`.

    X⁽ᶜ⁾ = R⁽ᶜ⁾ (X⁽ᶜ'⁰⁾ + Σ_k α_k U_k − com) + com + t⁽ᶜ⁾

This is the one module that knows how latents are laid out: a flat vector z, chain by chain
[modes, rotation vector, translation], each scaled so that **one unit moves its chain by about 1 Å
(RMS)**. `scale` turns a unit into physical units: α in Å (Eq. 1, modes of unit norm), radians, Å.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ..molecule import Beads, Modes, Structure
from .rotations import (
    best_rotation,
    cross_matrix,
    matrix_to_rotvec,
    right_jacobian,
    rotvec_to_matrix,
)

KINDS = ("mode", "rotation", "translation")
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class ChainLayout:
    """Where one chain is in the arrays: its atoms (or beads), and its latents of each kind.

    The slice of a kind that is switched off is empty.
    """

    atoms: slice
    mode: slice
    rotation: slice
    translation: slice

    @property
    def latents(self) -> slice:
        """All latents of the chain."""
        return slice(self.mode.start, self.translation.stop)

    @property
    def n_atoms(self) -> int:
        """Number of imaging atoms, or of beads, of the chain."""
        return self.atoms.stop - self.atoms.start


@dataclass(frozen=True, eq=False, repr=False)
class Dynamics:
    """How the chains of a structure move.

    Parameters
    ----------
    structure : Structure
        The reference conformation X⁽⁰⁾. Its bodies are the chains that move.
    modes : Modes, optional
        Normal modes of each body; None switches bending off (the paper's cR and cRT).
    rotation, translation : bool
        Switch the rigid motion of chains on or off (cN50: both off; cR: translation off).
    device : torch.device
        Where coordinates are computed; see `to`.
    beads : Beads, optional
        Whose coordinates these are; None for those of the imaging atoms. See `with_beads`.

    Raises
    ------
    ValueError
        When nothing may move, or the modes are those of another structure.

    Examples
    --------
    >>> from cryochains import load_structure, compute_modes
    >>> closed = load_structure("glua3-closed")
    >>> dynamics = Dynamics(closed, compute_modes(closed, n_modes=10))
    >>> dynamics
    Dynamics('glua3-closed', 32 latents: mode, rotation, translation)
    >>> reference = dynamics.decode(torch.zeros(1, 32))[0]
    >>> bool(np.allclose(reference, closed.coords, atol=1e-4))
    True
    """

    structure: Structure
    modes: Modes | None = None
    rotation: bool = True
    translation: bool = True
    device: torch.device = _CPU
    beads: Beads | None = None

    def __post_init__(self) -> None:
        if self.modes is None and not (self.rotation or self.translation):
            raise ValueError(
                "expected at least one of modes, rotation and translation, got none; "
                "try rotation=True"
            )
        if self.modes is not None and self.modes.structure_hash != self.structure.content_hash:
            raise ValueError(
                f"expected modes of {self.structure!r}, got modes of another structure; "
                "try compute_modes on this structure"
            )
        if self.beads is not None:
            _require_beads_of(self.structure, self.beads)

    # How latents are laid out

    @cached_property
    def chains(self) -> tuple[ChainLayout, ...]:
        """Layout of every chain."""
        layouts = []
        start = 0
        for chain in range(self.structure.n_chains):
            atoms = np.flatnonzero(self._node_chain == chain)
            n_modes = 0 if self.modes is None else len(self.modes.eigenvalues[chain])
            rotation_start = start + n_modes
            translation_start = rotation_start + 3 * self.rotation
            end = translation_start + 3 * self.translation
            layouts.append(
                ChainLayout(
                    atoms=slice(int(atoms[0]), int(atoms[-1]) + 1),
                    mode=slice(start, rotation_start),
                    rotation=slice(rotation_start, translation_start),
                    translation=slice(translation_start, end),
                )
            )
            start = end
        return tuple(layouts)

    @property
    def n_latents(self) -> int:
        """p, the length of z."""
        return self.chains[-1].translation.stop

    @cached_property
    def latent_chain(self) -> np.ndarray:
        """(p,) number of the chain of each latent."""
        chain_of = np.empty(self.n_latents, dtype=int)
        for chain, layout in enumerate(self.chains):
            chain_of[layout.latents] = chain
        return chain_of

    @cached_property
    def latent_kind(self) -> np.ndarray:
        """(p,) "mode", "rotation" or "translation"."""
        kind_of = np.empty(self.n_latents, dtype="<U11")
        for layout in self.chains:
            for kind in KINDS:
                kind_of[getattr(layout, kind)] = kind
        return kind_of

    @cached_property
    def scale(self) -> np.ndarray:
        """(p,) physical units in one unit of z: Å of α, radians, Å."""
        scale = np.ones(self.n_latents)
        n_nodes = np.bincount(self.structure.node_chain)
        for chain, layout in enumerate(self.chains):
            # A unit-norm mode moves n nodes by 1/√n Å (RMS).
            scale[layout.mode] = np.sqrt(n_nodes[chain])
            # A turn by an angle moves the nodes by at most angle · radius. A lone residue has no
            # radius, and its turn moves nothing.
            scale[layout.rotation] = 1 / max(self.structure.radii[chain], 1.0)
        return scale

    # Tensors on the device

    @cached_property
    def reference(self) -> Tensor:
        """(n_atoms, 3) float32 coordinates in Å of the reference."""
        points = self.structure if self.beads is None else self.beads
        return self._tensor(points.coords)

    @cached_property
    def centers(self) -> Tensor:
        """(n_chains, 3) float32, the point in Å that each chain turns about; see `Structure`."""
        return self._tensor(self.structure.centers)

    @cached_property
    def scale_tensor(self) -> Tensor:
        """(p,) `scale` as a float32 tensor."""
        return self._tensor(self.scale)

    @cached_property
    def mode_vectors(self) -> tuple[Tensor, ...]:
        """Per chain (K, n_c, 3): what one unit of each mode's latent adds to its atoms, Å."""
        return tuple(self._tensor(self._vectors(chain)) for chain in range(len(self.chains)))

    @cached_property
    def _vectors_by_axis(self) -> tuple[Tensor, ...]:
        """Per chain (3, n_c, p_c): `mode_vectors`, and zeros for the other latents."""
        parts = []
        for layout, vectors in zip(self.chains, self.mode_vectors, strict=True):
            others = layout.latents.stop - layout.mode.stop
            parts.append(torch.nn.functional.pad(vectors.permute(2, 1, 0), (0, others)))
        return tuple(parts)

    def _vectors(self, chain: int) -> np.ndarray:
        nodes = np.flatnonzero(self.structure.node_chain == chain)
        # Every atom and bead follows its residue's node, so that all share their latents.
        of_atom = self._node[self.chains[chain].atoms] - nodes[0]
        if self.modes is None:
            return np.zeros((0, len(of_atom), 3))
        return self.modes.vectors[chain][:, of_atom] * np.sqrt(len(nodes))

    @cached_property
    def _node(self) -> np.ndarray:
        """(n_atoms,) node that every atom or bead moves with."""
        return self.structure.node_index if self.beads is None else self.beads.node

    @cached_property
    def _node_chain(self) -> np.ndarray:
        """(n_atoms,) chain of every atom or bead."""
        return self.structure.node_chain[self._node]

    def _tensor(self, values: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(values, dtype=np.float32)
        return torch.from_numpy(array.copy()).to(self.device)

    # Variants

    def to(self, device: str | torch.device) -> "Dynamics":
        """The same motions computed on another device; itself where it is there already."""
        device = torch.device(device)
        return self if device == self.device else replace(self, device=device)

    def with_structure(self, structure: Structure) -> "Dynamics":
        """The same motions on another set of atoms of the same molecule."""
        return replace(self, structure=structure, beads=None)

    def with_beads(self, beads: Beads) -> "Dynamics":
        """The same motions of the beads that images are drawn with.

        Raises
        ------
        ValueError
            When the beads are not those of this structure, chain by chain.
        """
        return replace(self, beads=beads)

    def all_atoms(self) -> "Dynamics":
        """The same motions on every atom: side chains and ligands move with their residue."""
        return self.with_structure(self.structure.all_atoms())

    # Latents to coordinates

    def bend(self, latents: Tensor, chain: int) -> Tensor:
        """(b, n_c, 3) chain after Eq. 1 alone, relative to the point that it turns about."""
        layout = self.chains[chain]
        x = (self.reference[layout.atoms] - self.centers[chain]).to(latents.dtype)
        vectors = self.mode_vectors[chain].to(latents.dtype)
        bending = latents[:, layout.mode] @ vectors.flatten(1)
        return x + bending.view(len(latents), *x.shape)

    def rotvecs(self, latents: Tensor, chain: int) -> Tensor:
        """(b, 3) rotation vector of a chain in radians (zero where rotation is off)."""
        if not self.rotation:
            return latents.new_zeros(len(latents), 3)
        layout = self.chains[chain]
        return latents[:, layout.rotation] * self.scale_tensor[layout.rotation].to(latents.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """(…, n_atoms, 3) coordinates in Å of (…, p) latents.

        Raises
        ------
        ValueError
            When the latents are not of this model's length.
        """
        if latents.shape[-1] != self.n_latents:
            raise ValueError(
                f"expected latents of length {self.n_latents}, got {latents.shape[-1]}; "
                "try the model that they are of"
            )
        flat = latents.to(self.device).reshape(-1, self.n_latents)
        parts = []
        for chain, layout in enumerate(self.chains):
            x = self.bend(flat, chain)
            if self.rotation:
                x = x @ rotvec_to_matrix(self.rotvecs(flat, chain)).transpose(1, 2)
            x = x + self.centers[chain].to(x.dtype)
            if self.translation:
                x = x + flat[:, layout.translation].unsqueeze(1)
            parts.append(x)
        return torch.cat(parts, dim=1).view(*latents.shape[:-1], *self.reference.shape)

    def tangents(self, latents: Tensor, chain: int, frame: Tensor | None = None) -> Tensor:
        """(b, p_c, n_c, d) derivative of a chain's coordinates by each of its latents.

        `frame` (b, d, 3) maps the derivative into other axes, such as the two rows of a global
        rotation that span the image; None keeps x, y, z.
        """
        layout = self.chains[chain]
        b = len(latents)
        rotvecs = self.rotvecs(latents, chain)
        if frame is None:
            frame = torch.eye(3, dtype=latents.dtype, device=latents.device).expand(b, 3, 3)
        frame = frame.to(latents.dtype)
        turned = frame @ rotvec_to_matrix(rotvecs)
        # In memory (b, d, n_c, p_c), as projection wants it: see `transform_tangents`.
        vectors = self._vectors_by_axis[chain].to(latents.dtype)
        bending = turned.reshape(-1, 3) @ vectors.flatten(1)
        steps = bending.view(b, frame.shape[1], *vectors.shape[1:])
        first = layout.latents.start
        if self.rotation:
            # d(Rx)/dω_i = R [J_i]× x with J the right Jacobian of SO(3) (Solà 2018, eq. 143).
            jacobian = right_jacobian(rotvecs)
            jacobian = jacobian * self.scale_tensor[layout.rotation.start].to(latents.dtype)
            columns = jacobian.transpose(1, 2).reshape(-1, 3)
            step = turned.unsqueeze(1) @ cross_matrix(columns).view(b, 3, 3, 3)
            of_turns = slice(layout.rotation.start - first, layout.rotation.stop - first)
            bent = self.bend(latents, chain).unsqueeze(1)
            steps[..., of_turns] = bent @ step.permute(0, 2, 3, 1)
        if self.translation:
            of_shifts = slice(layout.translation.start - first, None)
            steps[..., of_shifts] = frame.unsqueeze(2)
        return steps.permute(0, 3, 2, 1)

    def gram(self, latents: Tensor) -> Tensor:
        """(b, p, p) matrix DᵀD of D = ∂coords/∂z.

        It turns a covariance of z into squared Å, summed over atoms.
        """
        gram = latents.new_zeros(len(latents), self.n_latents, self.n_latents)
        for chain, layout in enumerate(self.chains):
            tangents = self.tangents(latents, chain).flatten(2)
            gram[:, layout.latents, layout.latents] = tangents @ tangents.transpose(1, 2)
        return gram

    # Coordinates to latents

    def fit(self, coords: Tensor | np.ndarray, n_steps: int = 30) -> Tensor:
        """(m, p) latents whose coordinates are nearest to (m, n_atoms, 3) `coords`, least squares.

        Gauss–Newton in float64. What remains is the manifold floor: what no latent of this model
        can express.

        Examples
        --------
        >>> from cryochains import load_structure
        >>> rigid = Dynamics(load_structure("glua3-closed"))
        >>> z = torch.randn(3, rigid.n_latents)
        >>> bool(torch.allclose(rigid.fit(rigid.decode(z)), z, atol=1e-2))
        True
        """
        coords = torch.as_tensor(np.asarray(coords), device=self.device).double()
        if coords.ndim != 3 or coords.shape[1:] != self.reference.shape:
            raise ValueError(
                f"expected coordinates (m, {len(self.reference)}, 3), got {tuple(coords.shape)}; "
                "try coords[None]"
            )
        latents = self._superposed(coords)
        for _ in range(n_steps):
            residual = coords - self.decode(latents)
            step = torch.zeros_like(latents)
            for chain, layout in enumerate(self.chains):
                tangents = self.tangents(latents, chain).flatten(2)
                normal = tangents @ tangents.transpose(1, 2)
                right = tangents @ residual[:, layout.atoms].flatten(1).unsqueeze(-1)
                # Turning about the axis of collinear nodes moves nothing: the ridge keeps it at 0.
                ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).mean()
                ridge = ridge * torch.eye(normal.shape[-1]).to(normal)
                step[:, layout.latents] = torch.linalg.solve(normal + ridge, right).squeeze(-1)
            latents = latents + step
            if step.abs().max() < 1e-6:
                break
        return latents.float()

    def _superposed(self, coords: Tensor) -> Tensor:
        """(m, p) latents that lay bodies that may turn by any angle over theirs; all else 0."""
        latents = coords.new_zeros(len(coords), self.n_latents)
        for chain, layout in enumerate(self.chains):
            turns = self.structure.chain_ids[chain] in self.structure.turning
            if not (turns and self.rotation and self.translation):
                continue
            there = coords[:, layout.atoms]
            here = self.reference[layout.atoms].to(coords)
            middle, center = here.mean(0), self.centers[chain].to(coords)
            turn = best_rotation((there - there.mean(1, keepdim=True)).mT @ (here - middle))
            latents[:, layout.rotation] = matrix_to_rotvec(turn) / self.scale_tensor[
                layout.rotation
            ].to(coords)
            latents[:, layout.translation] = there.mean(1) - center - turn @ (middle - center)
        return latents

    def __repr__(self) -> str:
        present = ", ".join(kind for kind in KINDS if (self.latent_kind == kind).any())
        return f"Dynamics({self.structure.name!r}, {self.n_latents} latents: {present})"


def _require_beads_of(structure: Structure, beads: Beads) -> None:
    inside = (beads.node >= 0) & (beads.node < structure.n_nodes)
    chain = structure.node_chain[beads.node[inside]]
    ordered = not (np.diff(chain) < 0).any()
    if not inside.all() or not ordered or len(np.unique(chain)) < structure.n_chains:
        raise ValueError(
            f"expected beads that move with nodes 0 to {structure.n_nodes - 1}, chain by chain, "
            "got others; try those of this structure"
        )
