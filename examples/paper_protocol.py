"""The paper's experiments (arXiv 2306.07274, section 3): molecules, particles and models.

What the paper leaves open is decided here: d is drawn for every mode of every chain; a chain turns
about x, then y, then z, each by an angle uniform in ± the paper's; conformations that leave the box
are drawn anew; images have neither CTF nor shifts. The paper's springs are "anm", in the simulation
and in the models; by default both have those of the library, and every row says which. An open
state of Hsp90 that has to be built is built with the springs of the simulation.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import prody
import torch
from scipy.spatial.transform import Rotation

import cryochains as cc
from cryochains.model import Dynamics
from cryochains.molecule import Structure

N_MODES_TRUE = 15
D_MEANS = (0.0, 2.5)
D_STD = 0.25
# Of the box, by the molecule.
FILLED_SHARE = 0.7
MORPH_FRAMES = 50
DEFAULT_SPRINGS = "edenm"


@dataclass(frozen=True, eq=False)
class Molecule:
    """A truth and the reference that is fitted to its images.

    Both have their common residues only, and the reference is superposed on the truth.

    Attributes
    ----------
    name, title : str
    truth, reference : Structure
    angle : float
        Degrees an axis, of the chains in Figure 2.
    note : str
        What a caption says of where the structures come from.
    """

    name: str
    title: str
    truth: Structure
    reference: Structure
    angle: float
    note: str


def load_glua3() -> Molecule:
    closed = cc.load_structure("glua3-closed")
    truth, reference = cc.match_structures(closed, cc.load_structure("glua3-open"))
    note = "GluA3 N-terminal domains: truth PDB 3O21, reference 6FLR"
    return _molecule("glua3", "GluA3", truth, reference, 5.0, note)


def load_gabab() -> Molecule:
    inactive = cc.load_structure("6UO8", chains="AB")
    truth, reference = cc.match_structures(inactive, cc.load_structure("6UOA", chains="AB"))
    note = "GABA-B receptor: truth PDB 6UO8, reference 6UOA"
    return _molecule("gabab", "GABA-B", truth, reference, 5.0, note)


def load_hsp90(springs: str = DEFAULT_SPRINGS) -> Molecule:
    """Where 2CGE is not at hand, its place is taken by an open state built with these springs."""
    closed = _closed_hsp90()
    try:
        closed, opened = cc.match_structures(closed, cc.load_structure("2CGE", chains="AB"))
        note = "Hsp90: truth PDB 2CG9, reference 2CGE"
    except FileNotFoundError:
        opened = open_hsp90(closed, springs)
        note = (
            "Hsp90: truth PDB 2CG9; 2CGE was not at hand, "
            f"the reference is an open state built from 2CG9 with the springs {springs}"
        )
    return _molecule("hsp90", "Hsp90", closed, opened, 2.5, note)


def open_hsp90(closed: Structure, springs: str) -> Structure:
    """An open state in place of 2CGE.

    Both chains are bent by 1.5 Å along their two softest modes, and chain B is turned by +19° about
    the y axis through Cα 677 of chain A, where the two chains hold each other. With the springs
    "anm" the bend is mostly of loose ends, whose bonds it stretches to 9.5 Å, and which modes of
    other springs hardly express.
    """
    modes = cc.compute_modes(closed, n_modes=2, springs=springs)
    moved = closed.atoms.getCoords().copy()
    # In opposite senses: the others bring two residues of A and B nearer than 3.5 Å.
    for chain, sense in enumerate((1, -1)):
        bend = sense * modes.vectors[chain].sum(0)
        bend *= 1.5 / np.sqrt((bend**2).sum(1).mean())
        nodes = np.flatnonzero(closed.node_chain == chain)
        own = np.flatnonzero(closed.atom_chain == chain)
        moved[own] += bend[closed.atom_node[own] - nodes[0]]
    hinge = closed.node_coords[(closed.node_chain == 0) & (closed.resnums == 677)][0]
    turned = closed.atom_chain == 1
    turn = Rotation.from_euler("y", 19, degrees=True)
    moved[turned] = turn.apply(moved[turned] - hinge) + hinge
    return closed.with_coords(moved)


def _closed_hsp90() -> Structure:
    try:
        return cc.load_structure("2CG9", chains="AB")
    except FileNotFoundError:
        folder = Path(os.environ.get("CRYOCHAINS_STRUCTURES", "."))
        files = [folder / f"2cg9_chain{chain}.pdb.gz" for chain in "AB"]
        if not all(file.is_file() for file in files):
            raise
        parts = [prody.parsePDB(str(file)) for file in files]
        for chain, part in zip("AB", parts, strict=True):
            part.setChids(chain)
        return cc.load_structure(parts[0] + parts[1])


def _molecule(
    name: str, title: str, truth: Structure, reference: Structure, angle: float, note: str
) -> Molecule:
    return Molecule(name, title, truth, cc.superpose(reference, truth), angle, note)


MOLECULES = {"glua3": load_glua3, "gabab": load_gabab, "hsp90": load_hsp90}


def load_molecule(name: str, springs: str = DEFAULT_SPRINGS) -> Molecule:
    """A molecule by its name; `springs` are those that a state which has to be built is bent by."""
    return load_hsp90(springs) if name == "hsp90" else MOLECULES[name]()


def figure2_motion(
    molecule: Molecule, n: int, seed: int, cutoff: float = np.inf, springs: str = DEFAULT_SPRINGS
) -> tuple[Dynamics, torch.Tensor]:
    """The motions of Figure 2: dynamics of the true structure and (n, p) latents.

    Conformations with an atom further than `cutoff` Å from the centre are drawn anew: half a box,
    which a loose end of Hsp90 leaves in one of a thousand.
    """
    rng = np.random.default_rng(seed)
    modes = cc.compute_modes(molecule.truth, N_MODES_TRUE, springs=springs)
    dynamics = Dynamics(molecule.truth, modes, translation=False)
    latents = _draw_figure2_latents(molecule, dynamics, n, rng)
    outside = _farthest_atoms(molecule, dynamics, latents) > cutoff
    while outside.any():
        latents[outside] = _draw_figure2_latents(molecule, dynamics, int(outside.sum()), rng)
        outside = _farthest_atoms(molecule, dynamics, latents) > cutoff
    return dynamics, latents


def _draw_figure2_latents(
    molecule: Molecule, dynamics: Dynamics, n: int, rng: np.random.Generator
) -> torch.Tensor:
    latents = np.zeros((n, dynamics.n_latents))
    for layout in dynamics.chains:
        which = rng.integers(0, 2, (n, N_MODES_TRUE))
        d = np.array(D_MEANS)[which] + D_STD * rng.standard_normal((n, N_MODES_TRUE))
        latents[:, layout.mode] = np.sqrt(molecule.truth.n_atoms / N_MODES_TRUE) * d
        angles = rng.uniform(-molecule.angle, molecule.angle, (n, 3))
        turns = Rotation.from_euler("xyz", angles, degrees=True)
        latents[:, layout.rotation] = turns.as_rotvec()
    return torch.from_numpy(latents / dynamics.scale).float()


def _farthest_atoms(molecule: Molecule, dynamics: Dynamics, latents: torch.Tensor) -> torch.Tensor:
    """(n,) Å from the centre of the box to the farthest atom of each conformation."""
    centre = torch.from_numpy(molecule.truth.origin).float()
    distances = []
    for some in latents.split(100):
        distances.append((dynamics.decode(some) - centre).norm(dim=-1).amax(1))
    return torch.cat(distances)


def pixel_size(molecule: Molecule, box_size: int) -> float:
    """Å, such that the molecule fills 70 % of the box.

    By its largest extent about its centre, in either state.
    """
    states = np.concatenate([molecule.truth.coords, molecule.reference.coords])
    extent = 2 * np.linalg.norm(states - molecule.truth.origin, axis=1).max()
    return round(float(extent / (FILLED_SHARE * box_size)), 2)


def simulate(
    molecule: Molecule,
    figure: int,
    n: int,
    box_size: int,
    snr_db: float,
    seed: int,
    device: str | torch.device | None = None,
    progress: bool = True,
    springs: str = DEFAULT_SPRINGS,
) -> cc.ParticleStack:
    """Particles of figure 2 (modes, turns about the truth) or 3 (a morph, reference to truth).

    `springs` are those of the modes in figure 2.
    """
    size = pixel_size(molecule, box_size)
    motion: dict[str, Any]
    if figure == 2:
        dynamics, latents = figure2_motion(molecule, n, seed, size * box_size / 2, springs)
        motion = {"dynamics": dynamics, "latents": latents}
    else:
        motion = {"conformations": cc.morph(molecule.reference, molecule.truth, MORPH_FRAMES)}
    return cc.simulate_particles(
        molecule.truth,
        n,
        **motion,
        box_size=box_size,
        pixel_size=size,
        snr_db=snr_db,
        sigma=gaussian_width(size),
        ctf=False,
        seed=seed,
        device=device,
        progress=progress,
    )


def gaussian_width(pixel_size: float) -> float:
    """Å, of the one Gaussian a residue that the paper draws: no narrower than pixels represent."""
    return max(2.0, 0.8 * pixel_size)


MODELS: dict[str, dict[str, Any]] = {
    "N100": {"modes": 100, "rotation": False, "translation": False},  # of the whole assembly
    "cN50": {"modes": 50, "rotation": False, "translation": False},
    "cR": {"modes": None, "translation": False},
    "cRT": {"modes": None},
    "CryoChains": {"modes": 50},
}


def build(
    name: str, reference: Structure, particles: cc.ParticleStack, springs: str = DEFAULT_SPRINGS
) -> cc.Model:
    """One of the paper's five models around a reference, with modes of these springs."""
    structure = reference.as_one_body() if name == "N100" else reference
    sigma = gaussian_width(particles.pixel_size)
    settings = dict(MODELS[name])
    n_modes = settings.pop("modes", 0)
    modes = cc.compute_modes(structure, n_modes, springs=springs) if n_modes else None
    return cc.Model(structure, particles, modes=modes, sigma=sigma, **settings)


@torch.no_grad()
def expected_path_coordinate(molecule: Molecule, particles: cc.ParticleStack) -> np.ndarray:
    """(N,) expected coordinate on the morph of each particle, when all else is known.

    Poses, noise and the path itself: the posterior mean over the true conformations. No method that
    must find the path too can order particles better: the correlation of this with the true
    coordinate is what the images allow.
    """
    path = particles.truth.conformations.float()
    m = len(path)
    coordinate = torch.linspace(0, 1, m, dtype=torch.float64)
    sigma = gaussian_width(particles.pixel_size)
    microscope = cc.Model(molecule.truth, particles, modes=None, sigma=sigma).microscope
    expected = []
    for batch in particles.batches(4):
        b = len(batch)
        pose = [None if part is None else part.repeat_interleave(m, 0) for part in batch.pose]
        images = microscope.render(path.repeat(b, 1, 1), *pose).view(b, m, -1)
        data = batch.images.view(b, 1, -1)
        # The mean of an image is left out: particle extraction normalises it away.
        centred_data = data - data.mean(-1, keepdim=True)
        residual = centred_data - (images - images.mean(-1, keepdim=True))
        squares = residual.double().square().sum(-1)
        likelihood = torch.softmax(-squares / (2 * particles.truth.noise_std**2), dim=1)
        expected.append(likelihood @ coordinate)
    return torch.cat(expected).numpy()


def choose(name: str, choices: Mapping, what: str):
    """``choices[name]``, or an error that lists them."""
    if name not in choices:
        raise ValueError(f"expected {what} of {', '.join(map(str, choices))}, got {name!r}")
    return choices[name]
