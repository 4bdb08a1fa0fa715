"""Latents → coordinates: normal modes (Eq. 1), rotation and translation of each chain.

Symbols of the paper: α → mode weights, R → `rotvec` or rotation matrix, t → `translation`, X → `coords`.

    X⁽ᶜ⁾ = R⁽ᶜ⁾ (X⁽ᶜ'⁰⁾ + Σ_k α_k U_k − com) + com + t⁽ᶜ⁾

This is the one place that knows how latents are laid out: a flat vector z, chain by chain
[modes, rotation vector, translation], each scaled so that **one unit moves its chain by about 1 Å (RMS)**. `scale`
turns a unit into physical units: α in Å (Eq. 1, modes of unit norm), radians, Å.
"""

from dataclasses import dataclass

import numpy as np
import roma
import torch
from torch import Tensor, nn

from .modes import Modes
from .structure import Structure

KINDS = ("mode", "rotation", "translation")


@dataclass(frozen=True)
class ChainLayout:
    """Where one chain lives: its atoms, and its latents of each kind (empty slices where a kind is off)."""

    atoms: slice
    mode: slice
    rotation: slice
    translation: slice

    @property
    def latents(self) -> slice:
        return slice(self.mode.start, self.translation.stop)


def two_vectors_to_rotation(vectors: Tensor) -> Tensor:
    """(…, 3, 3) rotation whose first two columns are the two 3-vectors of (…, 2, 3), orthonormalised in order.

    The paper's parameterisation of R (section 2.1), by Gram–Schmidt.

    Examples
    --------
    >>> two_vectors_to_rotation(torch.tensor([[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])).tolist()
    [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    return roma.special_gramschmidt(vectors.transpose(-1, -2), epsilon=1e-12)


class Dynamics(nn.Module):
    """How the chains of a structure move.

    Parameters
    ----------
    structure : Structure
        The reference conformation X⁽⁰⁾. Its bodies are the chains that move.
    modes : Modes, optional
        Normal modes of each body; None switches bending off (the paper's cR and cRT).
    rotation, translation : bool
        Switch the rigid motion of chains on or off (cN50: both off; cR: translation off).

    Attributes
    ----------
    n_latents : int
        p, the length of z.
    chains : tuple of ChainLayout
    latent_chain : (p,) int array
        Chain of each latent.
    latent_kind : (p,) str array
        "mode", "rotation" or "translation".
    scale : (p,) array
        Physical units in one unit of z: Å of α, radians, Å.

    Raises
    ------
    ValueError
        When nothing may move, or the modes are those of another structure.

    Examples
    --------
    >>> from cryochains import load_structure, compute_modes
    >>> closed = load_structure("glua3-closed")
    >>> dynamics = Dynamics(closed, compute_modes(closed, n_modes=10))
    >>> dynamics.n_latents
    32
    >>> still = dynamics.decode(torch.zeros(1, 32))[0]
    >>> bool(np.allclose(still, closed.coords, atol=1e-4))
    True
    """

    def __init__(
        self, structure: Structure, modes: Modes | None = None, rotation: bool = True, translation: bool = True
    ):
        super().__init__()
        if modes is None and not (rotation or translation):
            raise ValueError("expected at least one of modes, rotation and translation, got none; try rotation=True")
        if modes is not None and modes.structure_hash != structure.content_hash:
            raise ValueError(
                f"expected modes of {structure!r}, got modes of another structure; try compute_modes on this structure"
            )
        self.structure = structure
        self.modes = modes
        self.rotation, self.translation = rotation, translation

        chains, latent_chain, latent_kind, scale = [], [], [], []
        start = 0
        for chain in range(structure.n_chains):
            n_nodes = int((structure.node_chain == chain).sum())
            n_modes = 0 if modes is None else len(modes.eigenvalues[chain])
            sizes = (n_modes, 3 * rotation, 3 * translation)
            edges = np.cumsum((start, *sizes))
            slices = [slice(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:], strict=True)]
            atoms = np.flatnonzero(structure.chain_index == chain)
            chains.append(ChainLayout(slice(int(atoms[0]), int(atoms[-1]) + 1), *slices))
            # A unit-norm mode moves n nodes by 1/√n Å (RMS); a turn by an angle moves them by at most angle·radius.
            # A lone residue has no radius, and its turn moves nothing.
            units = (np.sqrt(n_nodes), 1 / max(structure.radii[chain], 1.0), 1.0)
            for kind, size, unit in zip(KINDS, sizes, units, strict=True):
                latent_chain += [chain] * size
                latent_kind += [kind] * size
                scale += [unit] * size
            start = int(edges[-1])
        self.chains = tuple(chains)
        self.n_latents = start
        self.latent_chain = np.array(latent_chain)
        self.latent_kind = np.array(latent_kind)
        self.scale = np.array(scale)

        self._keep("reference", structure.coords)
        self._keep("centers", structure.centers)
        self._keep("scale_tensor", self.scale)
        for chain, layout in enumerate(self.chains):
            rows = np.flatnonzero(structure.node_chain == chain)
            # Every atom rides with its residue's node, so "ca", "heavy" and all atoms share the same latents.
            nodes = structure.node_index[layout.atoms] - rows[0]
            vectors = np.zeros((0, len(nodes), 3)) if modes is None else modes.vectors[chain][:, nodes]
            self._keep(f"modes_{chain}", vectors * np.sqrt(len(rows)))

    def _keep(self, name: str, values) -> None:
        self.register_buffer(name, torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)), persistent=False)

    def with_structure(self, structure: Structure) -> "Dynamics":
        """The same motions on another set of atoms of the same molecule, such as ``structure.all_atoms()``."""
        return Dynamics(structure, self.modes, self.rotation, self.translation)

    def bend(self, latents: Tensor, chain: int) -> Tensor:
        """(b, n_c, 3) chain after Eq. 1 alone, relative to its centre of mass."""
        layout = self.chains[chain]
        x = (self.reference[layout.atoms] - self.centers[chain]).to(latents.dtype)
        vectors = getattr(self, f"modes_{chain}").to(latents.dtype)
        return x + (latents[:, layout.mode] @ vectors.flatten(1)).view(len(latents), *x.shape)

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
            raise ValueError(f"expected latents of length {self.n_latents}, got {latents.shape[-1]}")
        flat = latents.to(self.reference.device).reshape(-1, self.n_latents)
        parts = []
        for chain, layout in enumerate(self.chains):
            x = self.bend(flat, chain)
            if self.rotation:
                x = x @ roma.rotvec_to_rotmat(self.rotvecs(flat, chain)).transpose(1, 2)
            x = x + self.centers[chain].to(x.dtype)
            if self.translation:
                x = x + flat[:, layout.translation].unsqueeze(1)
            parts.append(x)
        return torch.cat(parts, dim=1).view(*latents.shape[:-1], *self.reference.shape)

    def tangents(self, latents: Tensor, chain: int, frame: Tensor | None = None) -> Tensor:
        """(b, p_c, n_c, d) derivative of a chain's coordinates by each of its latents.

        `frame` (b, d, 3) maps the derivative into other axes on the way, such as the two rows of a global rotation
        that span the image; None keeps x, y, z.
        """
        layout = self.chains[chain]
        b = len(latents)
        turn = roma.rotvec_to_rotmat(self.rotvecs(latents, chain))
        if frame is None:
            frame = torch.eye(3, dtype=latents.dtype, device=latents.device).expand(b, 3, 3)
        turned = frame.to(latents.dtype) @ turn
        d, n = frame.shape[1], layout.atoms.stop - layout.atoms.start
        vectors = getattr(self, f"modes_{chain}").to(latents.dtype)
        parts = [(vectors.view(-1, 3) @ turned.transpose(1, 2)).view(b, -1, n, d)]
        if self.rotation:
            # d(Rx)/dω_i = R [J_i]× x with J the right Jacobian of SO(3) (e.g. Solà 2018, eq. 143).
            jacobian = _right_jacobian(self.rotvecs(latents, chain))
            jacobian = jacobian * self.scale_tensor[layout.rotation.start].to(latents.dtype)
            generators = _hat(jacobian.transpose(1, 2).reshape(-1, 3)).view(b, 3, 3, 3)
            step = turned.unsqueeze(1) @ generators
            parts.append(self.bend(latents, chain).unsqueeze(1) @ step.transpose(2, 3))
        if self.translation:
            parts.append(frame.to(latents.dtype).transpose(1, 2).unsqueeze(2).expand(b, 3, n, d))
        return torch.cat(parts, dim=1)

    def gram(self, latents: Tensor) -> Tensor:
        """(b, p, p) matrix DᵀD of D = ∂coords/∂z: turns a covariance of z into squared Å, summed over atoms."""
        gram = latents.new_zeros(len(latents), self.n_latents, self.n_latents)
        for chain, layout in enumerate(self.chains):
            tangents = self.tangents(latents, chain).flatten(2)
            gram[:, layout.latents, layout.latents] = tangents @ tangents.transpose(1, 2)
        return gram

    def fit(self, coords: Tensor, n_steps: int = 30) -> Tensor:
        """(m, p) latents whose coordinates are nearest, in least squares, to (m, n_atoms, 3) `coords`.

        Gauss–Newton in float64. What remains is the manifold floor: what no latent of this model can express.

        Examples
        --------
        >>> from cryochains import load_structure
        >>> rigid = Dynamics(load_structure("glua3-closed"))
        >>> z = torch.randn(3, rigid.n_latents)
        >>> bool(torch.allclose(rigid.fit(rigid.decode(z)), z, atol=1e-2))
        True
        """
        coords = torch.as_tensor(np.asarray(coords), device=self.reference.device).double()
        if coords.ndim != 3 or coords.shape[1:] != self.reference.shape:
            raise ValueError(f"expected coordinates (m, {len(self.reference)}, 3), got {tuple(coords.shape)}")
        latents = coords.new_zeros(len(coords), self.n_latents)
        for _ in range(n_steps):
            residual = coords - self.decode(latents)
            step = torch.zeros_like(latents)
            for chain, layout in enumerate(self.chains):
                tangents = self.tangents(latents, chain).flatten(2)
                normal = tangents @ tangents.transpose(1, 2)
                right = tangents @ residual[:, layout.atoms].flatten(1).unsqueeze(-1)
                # Turning about the axis of collinear nodes moves nothing: the ridge leaves it at rest.
                ridge = 1e-9 * normal.diagonal(dim1=1, dim2=2).mean() * torch.eye(normal.shape[-1]).to(normal)
                step[:, layout.latents] = torch.linalg.solve(normal + ridge, right).squeeze(-1)
            latents = latents + step
            if step.abs().max() < 1e-6:
                break
        return latents.float()

    def relative_to(self, latents: Tensor, chain: str) -> Tensor:
        """(n, p) latents of the same conformations seen from one chain, whose turn and shift become zero.

        A rotation or shift that all chains share is a pose change and not a conformation: this takes it out.

        Raises
        ------
        ValueError
            For an unknown chain, or when chains do not both turn and shift in this model.

        Examples
        --------
        >>> from cryochains import load_structure
        >>> dynamics = Dynamics(load_structure("glua3-closed"))
        >>> from_a = dynamics.relative_to(torch.randn(5, 12), "A")
        >>> bool(from_a[:, :6].abs().max() < 1e-4)
        True
        """
        ids = self.structure.chain_ids
        if chain not in ids:
            raise ValueError(f"expected a chain of {', '.join(ids)}, got {chain!r}")
        if not (self.rotation and self.translation):
            raise ValueError("expected a model whose chains turn and shift, got one with either switched off")
        latents = latents.to(self.reference.device)
        base = self.chains[ids.index(chain)]
        center = self.centers[ids.index(chain)]
        back = roma.rotvec_to_rotmat(self.rotvecs(latents, ids.index(chain))).transpose(1, 2)
        moved = latents.clone()
        for number, layout in enumerate(self.chains):
            turn = back @ roma.rotvec_to_rotmat(self.rotvecs(latents, number))
            offset = self.centers[number] - center
            shift = offset + latents[:, layout.translation] - latents[:, base.translation]
            moved[:, layout.rotation] = roma.rotmat_to_rotvec(turn) / self.scale_tensor[layout.rotation]
            moved[:, layout.translation] = (back @ shift.unsqueeze(-1)).squeeze(-1) - offset
        return moved

    def extra_repr(self) -> str:
        kinds = [kind for kind in KINDS if (self.latent_kind == kind).any()]
        return f"{self.structure!r}, {self.n_latents} latents: {', '.join(kinds)}"


def _hat(vector: Tensor) -> Tensor:
    """(b, 3, 3) matrix [v]× with [v]× x = v × x."""
    x, y, z = vector.unbind(-1)
    zero = torch.zeros_like(x)
    return torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).view(-1, 3, 3)


def _right_jacobian(rotvec: Tensor) -> Tensor:
    """(b, 3, 3) J with exp([ω + δ]×) ≈ exp([ω]×) exp([J δ]×)."""
    squared = (rotvec * rotvec).sum(-1)[:, None, None]
    small = squared < 1e-6
    safe = torch.where(small, torch.ones_like(squared), squared)
    angle = safe.sqrt()
    first = torch.where(small, 0.5 - squared / 24, (1 - angle.cos()) / safe)
    second = torch.where(small, 1 / 6 - squared / 120, (angle - angle.sin()) / (safe * angle))
    cross = _hat(rotvec)
    return torch.eye(3, dtype=rotvec.dtype, device=rotvec.device) - first * cross + second * (cross @ cross)
