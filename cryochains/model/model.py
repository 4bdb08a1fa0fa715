"""Everything fixed about an experiment: the molecule, how it may move, and the microscope."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .._arguments import Angstroms, Count, Ordinal, Rotations, checked
from .._devices import present_device
from .._files import content_digest
from ..images import ParticleStack
from ..molecule import Beads, Modes, Structure, atom_beads, compute_modes, residue_beads
from .dynamics import Dynamics
from .microscope import Microscope, require_fit_in_box

# What each part of a fingerprint is called where it differs.
_PART_NAMES = {
    "structure": "structure or bodies",
    "atoms": "beads or imaging atoms",
    "beads": "beads or imaging atoms",
    "switches": "number of modes, or whether chains turn and shift",
    "modes": "modes",
    "origin": "origin",
    "sigma": "width of an atom (sigma)",
    "box_size": "box size",
    "pixel_size": "pixel size",
}
# Numbers of a fingerprint agree to this: machines differ in the last digits of a mode.
_FINGERPRINT_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Model:
    """A molecule whose chains move, seen by a microscope. Nothing in it learns or changes.

    Parameters
    ----------
    structure : Structure
        The reference conformation X⁽⁰⁾, whose bodies move.
    particles : ParticleStack, optional
        Whose box and pixel size the images have; or give `box_size` and `pixel_size`.
    modes : int or sequence of int or Modes or None
        How many normal modes bend a chain, of all chains alike or one number a chain; or modes that
        `compute_modes` gave. None or 0 for rigid chains.
    rotation, translation : bool
        Whether chains turn and shift. With `modes` these are the paper's ablations: cN50 is
        ``rotation=False, translation=False``; cR is ``modes=None, translation=False``; cRT is
        ``modes=None``; N100 is ``Model(structure.as_one_body(), particles, modes=100,
        rotation=False, translation=False)``.
    sigma : float, optional
        Draws one Gaussian of this width in Å at every imaging atom, as the paper does. By default
        images are drawn of two beads a residue with widths of their own (see `Beads`), or of the
        atoms of a structure that was loaded with ``atoms="heavy"``.
    box_size, pixel_size
        Of the images, px and Å, where no `particles` are given.

    Attributes
    ----------
    structure : Structure
    dynamics : Dynamics
        Latents ↔ coordinates.
    microscope : Microscope
        Coordinates of the beads → images.
    beads : Beads
        What scatters.
    bead_dynamics : Dynamics
        Latents ↔ coordinates of the beads.

    Raises
    ------
    ValueError
        When nothing may move, the molecule does not fit the box, or the box is not known.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> model = Model(load_structure("glua3-closed"), modes=4, box_size=32, pixel_size=5.0)
    >>> model
    Model('glua3-closed', chains A B, 20 latents: mode, rotation, translation; 32 px × 5 Å)
    >>> model.render(torch.zeros(3, 20), torch.eye(3).expand(3, 3, 3)).shape
    torch.Size([3, 32, 32])
    """

    structure: Structure
    dynamics: Dynamics
    microscope: Microscope
    sigma: float | None
    beads: Beads

    @checked
    def __init__(
        self,
        structure: Structure,
        particles: ParticleStack | None = None,
        *,
        modes: Modes | Ordinal | Sequence[Ordinal] | None = 50,
        rotation: bool = True,
        translation: bool = True,
        sigma: Angstroms | None = None,
        box_size: Count | None = None,
        pixel_size: Angstroms | None = None,
    ) -> None:
        box_size, pixel_size = _image_size(particles, box_size, pixel_size)
        beads = beads_of(structure, sigma)
        microscope = Microscope(beads.weights, box_size, pixel_size, structure.origin, beads.widths)
        require_fit_in_box(structure.coords, structure.origin, box_size, pixel_size)
        if modes is not None and not isinstance(modes, Modes):
            modes = None if _is_zero(modes) else compute_modes(structure, n_modes=modes)
        sigma = None if sigma is None else float(sigma)
        self._set(Dynamics(structure, modes, rotation, translation), microscope, sigma, beads)

    def _set(
        self, dynamics: Dynamics, microscope: Microscope, sigma: float | None, beads: Beads
    ) -> None:
        values = {
            "structure": dynamics.structure,
            "dynamics": dynamics,
            "microscope": microscope,
            "sigma": sigma,
            "beads": beads,
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @cached_property
    def bead_dynamics(self) -> Dynamics:
        """The same latents as coordinates of the beads."""
        return self.dynamics.with_beads(self.beads)

    @property
    def modes(self) -> Modes | None:
        """Normal modes of every chain, None where chains are rigid."""
        return self.dynamics.modes

    @property
    def n_latents(self) -> int:
        """p, numbers that describe one conformation."""
        return self.dynamics.n_latents

    @property
    def box_size(self) -> int:
        """Pixels a side of the images."""
        return self.microscope.box_size

    @property
    def pixel_size(self) -> float:
        """Å a pixel."""
        return self.microscope.pixel_size

    @property
    def device(self) -> torch.device:
        """Where this model computes; verbs move it with `to`."""
        return self.dynamics.device

    @cached_property
    def atom_share(self) -> torch.Tensor:
        """(p,) float32, share of the atoms in each latent's chain.

        It turns squares of latents into those of Å, RMS over the molecule.
        """
        share = np.bincount(self.structure.chain_index) / self.structure.n_atoms
        return torch.from_numpy(share[self.dynamics.latent_chain]).float().to(self.device)

    @checked
    def to(self, device: str | torch.device) -> "Model":
        """The same model computed on another device; itself where it is there already."""
        device = present_device(device)
        if device == self.device:
            return self
        return self._copy(self.dynamics.to(device), self.microscope.to(device), self.beads)

    @checked
    def with_beads(self, beads: Beads | None) -> "Model":
        """The same motions drawn with other beads, such as were learned; None leaves all as it is.

        Latents mean the same, and so the fingerprint stays that of the model.
        """
        if beads is None:
            return self
        microscope = replace(self.microscope, weights=beads.weights, sigma=beads.widths)
        return self._copy(self.dynamics, microscope, beads)

    def _copy(self, dynamics: Dynamics, microscope: Microscope, beads: Beads) -> "Model":
        """With the fingerprint of this model."""
        copy = object.__new__(Model)
        copy._set(dynamics, microscope, self.sigma, beads)
        object.__setattr__(copy, "fingerprint", self.fingerprint)
        object.__setattr__(copy, "bead_dynamics", dynamics.with_beads(beads))
        return copy

    @checked
    def decode(self, latents: Tensor) -> Tensor:
        """(…, n_atoms, 3) coordinates in Å of (…, p) latents."""
        return self.dynamics.decode(latents)

    @checked
    def render(
        self,
        latents: Tensor,
        rotations: Rotations,
        shifts: Tensor | None = None,
        ctf: Tensor | None = None,
    ) -> Tensor:
        """(b, box, box) noise-free images of (b, p) latents at the given poses, at brightness 1."""
        coords = self.bead_dynamics.decode(latents)
        self._require_poses(len(coords), rotations, shifts, ctf)
        return self.microscope.render(coords, rotations, shifts, ctf)

    def _require_poses(
        self, n: int, rotations: Tensor, shifts: Tensor | None, ctf: Tensor | None
    ) -> None:
        box = self.box_size
        expected = {
            "rotations": (rotations, (n, 3, 3)),
            "shifts": (shifts, (n, 2)),
            "ctf": (ctf, (n, box, box // 2 + 1)),
        }
        for name, (values, shape) in expected.items():
            if values is None:
                continue
            # One for all is as good as one for each.
            if tuple(values.shape) not in (shape, (1, *shape[1:])):
                raise ValueError(
                    f"expected {name} {shape}, one a row of latents, got {tuple(values.shape)}; "
                    "try those of the same particles"
                )

    @cached_property
    def fingerprint(self) -> dict:
        """All that gives latents and brightness their meaning, as short texts and numbers.

        JSON-able. `require_same_model` compares two and says which part differs.
        """
        microscope, structure = self.microscope, self.structure
        n_beads = np.bincount(self.beads.node, minlength=structure.n_nodes)
        n_modes = "none" if self.modes is None else str(self.modes.n_modes)
        dynamics = self.dynamics
        return {
            "structure": structure.content_hash,
            "atoms": content_digest(n_beads),
            "beads": _bead_numbers(self.beads, structure.n_nodes, self.sigma is None),
            "switches": f"modes {n_modes}, {dynamics.rotation}, {dynamics.translation}",
            "modes": [] if self.modes is None else _mode_numbers(self.modes),
            "origin": microscope.origin.tolist(),
            "sigma": 0.0 if self.sigma is None else self.sigma,
            "box_size": microscope.box_size,
            "pixel_size": microscope.pixel_size,
        }

    def __repr__(self) -> str:
        chains = self.structure.chain_summary
        latents = repr(self.dynamics).split(", ", 1)[1].removesuffix(")")
        size = f"{self.box_size} px × {self.pixel_size:g} Å"
        return f"Model({self.structure.name!r}, chains {chains}, {latents}; {size})"


def require_same_model(model: Model, fingerprint: Mapping, what: str) -> None:
    """Raise ValueError when `fingerprint` is not that of `model`, with the parts that differ.

    `what` says what the fingerprint belongs to, such as "a population".
    """
    own = model.fingerprint
    if "beads" not in fingerprint:
        own = own | {"atoms": _older_digest(model), "beads": None}
    differing = [
        name for key, name in _PART_NAMES.items() if not _same_part(own[key], fingerprint.get(key))
    ]
    # A name that two parts share is said once.
    differing = list(dict.fromkeys(differing))
    if differing:
        raise ValueError(
            f"expected {what} of {model!r}, got one of another model: what differs is its "
            f"{'; its '.join(differing)}; try the model that it was made with"
        )


def require_same_images(model: Model, particles: ParticleStack) -> None:
    """Raise ValueError when `particles` are none, or of another box or pixel size."""
    if not len(particles):
        raise ValueError("expected at least one particle, got none; try another selection or split")
    same_box = particles.box_size == model.box_size
    if not same_box or abs(particles.pixel_size - model.pixel_size) > 1e-3:
        raise ValueError(
            f"expected particles of {model.box_size} px × {model.pixel_size:g} Å, got "
            f"{particles.box_size} px × {particles.pixel_size:g} Å; try Model(structure, particles)"
        )


def beads_of(structure: Structure, sigma: float | None = None) -> Beads:
    """What scatters: one Gaussian of `sigma` Å at every imaging atom; by default see `Model`."""
    if sigma is not None:
        return atom_beads(structure, sigma)
    if np.array_equal(structure.rows, structure.node_rows):
        return residue_beads(structure)
    return atom_beads(structure)


def _image_size(
    particles: ParticleStack | None, box_size: int | None, pixel_size: float | None
) -> tuple[int, float]:
    if particles is not None:
        if box_size is not None or pixel_size is not None:
            raise ValueError(
                "expected either particles, or box_size and pixel_size, got both; "
                "try Model(structure, particles)"
            )
        return particles.box_size, particles.pixel_size
    if box_size is None or pixel_size is None:
        raise ValueError(
            "expected particles, or box_size and pixel_size, got neither; "
            "try Model(structure, particles)"
        )
    return box_size, pixel_size


def _is_zero(modes: int | Sequence[int]) -> bool:
    return np.ndim(modes) == 0 and modes == 0


def _mode_numbers(modes: Modes) -> list[float]:
    """A number a mode: its product with one fixed direction, which other modes do not share.

    Numbers and no hash, since two machines compute a mode to within rounding.
    """
    numbers = []
    for vectors in modes.vectors:
        n_nodes = vectors.shape[1]
        direction = np.cos(1.0 + 12.9898 * np.arange(3 * n_nodes))
        products = vectors.reshape(len(vectors), -1) @ direction
        numbers += products.round(6).tolist()
    return numbers


def _bead_numbers(beads: Beads, n_nodes: int, with_widths: bool) -> list[float]:
    """What the beads of every node amount to, as `_mode_numbers`.

    Sums over a node's beads, since their order and centroids follow the order of the atoms.
    """
    values = [np.ones(len(beads)), *beads.coords.T, (beads.coords**2).sum(1) / 100]
    if with_widths:
        values.append(beads.widths**2)
    sums = [np.bincount(beads.node, beads.weights * value, n_nodes) for value in values]
    direction = np.cos(1.0 + 12.9898 * np.arange(n_nodes))
    return (np.array(sums) @ direction).round(6).tolist()


def _older_digest(model: Model) -> str:
    """What stood for the beads in files that were written before their numbers did."""
    beads = beads_of(model.structure, model.sigma)
    parts = [beads.coords, beads.weights]
    if model.sigma is None:
        parts.append(beads.widths)
    return content_digest(*(np.round(1000 * part).astype("<i8") for part in parts))


def _same_part(a: object, b: object) -> bool:
    if isinstance(a, str) or isinstance(b, str) or b is None:
        return a == b
    first, second = np.atleast_1d(np.asarray(a)), np.atleast_1d(np.asarray(b))
    if first.shape != second.shape:
        return False
    return bool(np.allclose(first, second, rtol=0, atol=_FINGERPRINT_TOLERANCE))
