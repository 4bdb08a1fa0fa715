"""The paper's experiments (arXiv 2306.07274, section 3): molecules, particles and models, in one place.

What the paper leaves open is decided here: d is drawn for every mode of every chain; a chain turns about x, then y,
then z, each by an angle uniform in ± the paper's; conformations that leave the box are drawn anew; images have neither
CTF nor shifts.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import prody
import torch
from scipy.spatial.transform import Rotation

import cryochains as cc

N_MODES_TRUE = 15
D_MEANS, D_STD = (0.0, 2.5), 0.25
FILL = 0.7  # of the box, by the molecule
MORPH_FRAMES = 50


@dataclass(frozen=True)
class Molecule:
    """A truth and the reference that is fitted to its images: common residues, reference superposed on truth."""

    name: str
    title: str
    truth: cc.Structure
    reference: cc.Structure
    angle: float  # degrees an axis, of the chains in Figure 2
    note: str  # what every caption says of where it comes from


def load_glua3() -> Molecule:
    pair = cc.match_structures(cc.load_structure("glua3-closed"), cc.load_structure("glua3-open"))
    return _molecule("glua3", "GluA3", *pair, 5.0, "GluA3 N-terminal domains: truth PDB 3O21, reference 6FLR")


def load_gabab() -> Molecule:
    pair = cc.match_structures(cc.load_structure("6UO8", chains="AB"), cc.load_structure("6UOA", chains="AB"))
    return _molecule("gabab", "GABA-B", *pair, 5.0, "GABA-B receptor: truth PDB 6UO8, reference 6UOA")


def load_hsp90() -> Molecule:
    closed = _closed_hsp90()
    try:
        closed, opened = cc.match_structures(closed, cc.load_structure("2CGE", chains="AB"))
        note = "Hsp90: truth PDB 2CG9, reference 2CGE"
    except FileNotFoundError:
        opened = open_hsp90(closed)
        note = "Hsp90: truth PDB 2CG9; 2CGE was not at hand, the reference is an open state built from 2CG9"
    return _molecule("hsp90", "Hsp90", closed, opened, 2.5, note)


def open_hsp90(closed: cc.Structure) -> cc.Structure:
    """An open state in place of 2CGE: both chains bent by 1.5 Å along their two softest modes, and chain B turned by
    +19° about the y axis through Cα 677 of chain A, where the two chains hold each other."""
    modes = cc.compute_modes(closed, n_modes=2)
    moved = closed.atoms.getCoords().copy()
    for chain in range(2):
        # In opposite senses: the others bring two residues of A and B nearer than 3.5 Å.
        bend = (1, -1)[chain] * modes.vectors[chain].sum(0)
        bend *= 1.5 / np.sqrt((bend**2).sum(1).mean())
        nodes = np.flatnonzero(closed.node_chain == chain)
        own = np.flatnonzero(closed.atom_chain == chain)
        moved[own] += bend[closed.atom_node[own] - nodes[0]]
    hinge = closed.node_coords[(closed.node_chain == 0) & (closed.resnums == 677)][0]
    turned = closed.atom_chain == 1
    moved[turned] = Rotation.from_euler("y", 19, degrees=True).apply(moved[turned] - hinge) + hinge
    return closed.with_coords(moved)


def _closed_hsp90() -> cc.Structure:
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


def _molecule(name, title, truth, reference, angle, note) -> Molecule:
    return Molecule(name, title, truth, cc.superpose(reference, truth), angle, note)


MOLECULES = {"glua3": load_glua3, "gabab": load_gabab, "hsp90": load_hsp90}


def figure2_motion(molecule: Molecule, n: int, seed: int, reach: float = np.inf) -> tuple[cc.Dynamics, torch.Tensor]:
    """The motions of Figure 2: dynamics of the true structure and (n, p) latents.

    Conformations with an atom further than `reach` Å from the centre are drawn anew: half a box, which a loose end
    of Hsp90 leaves in one of a thousand.
    """
    rng = np.random.default_rng(seed)
    dynamics = cc.Dynamics(molecule.truth, cc.compute_modes(molecule.truth, N_MODES_TRUE), translation=False)
    centre = torch.from_numpy(molecule.truth.origin).float()

    def draw(m: int) -> torch.Tensor:
        latents = np.zeros((m, dynamics.n_latents))
        for layout in dynamics.chains:
            which = rng.integers(0, 2, (m, N_MODES_TRUE))
            d = np.array(D_MEANS)[which] + D_STD * rng.standard_normal((m, N_MODES_TRUE))
            latents[:, layout.mode] = np.sqrt(molecule.truth.n_atoms / N_MODES_TRUE) * d
            angles = rng.uniform(-molecule.angle, molecule.angle, (m, 3))
            latents[:, layout.rotation] = Rotation.from_euler("xyz", angles, degrees=True).as_rotvec()
        return torch.from_numpy(latents / dynamics.scale).float()

    def furthest(latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([(dynamics.decode(z) - centre).norm(dim=-1).amax(1) for z in latents.split(100)])

    latents = draw(n)
    while (outside := furthest(latents) > reach).any():
        latents[outside] = draw(int(outside.sum()))
    return dynamics, latents


def pixel_size(molecule: Molecule, box_size: int) -> float:
    """Å, such that the molecule's largest extent about its centre, in either state, fills 70 % of the box."""
    states = np.concatenate([molecule.truth.coords, molecule.reference.coords])
    extent = 2 * np.linalg.norm(states - molecule.truth.origin, axis=1).max()
    return round(float(extent / (FILL * box_size)), 2)


def simulate(
    molecule: Molecule, figure: int, n: int, box_size: int, snr_db: float, seed: int, **where
) -> cc.ParticleStack:
    """Particles of figure 2 (modes and turns about the truth) or 3 (the morph from the reference to the truth)."""
    if figure == 2:
        half = pixel_size(molecule, box_size) * box_size / 2
        dynamics, latents = figure2_motion(molecule, n, seed, reach=half)
        motion = {"dynamics": dynamics, "latents": latents}
    else:
        motion = {"conformations": cc.morph(molecule.reference, molecule.truth, MORPH_FRAMES)}
    return cc.simulate_particles(
        molecule.truth, n, **motion, box_size=box_size, pixel_size=pixel_size(molecule, box_size), snr_db=snr_db,
        ctf=False, seed=seed, **where,
    )  # fmt: skip


MODELS = {
    "N100": {"modes": 100, "rotation": False, "translation": False},  # of the whole assembly
    "cN50": {"modes": 50, "rotation": False, "translation": False},
    "cR": {"modes": None, "translation": False},
    "cRT": {"modes": None},
    "CryoChains": {"modes": 50},
}


def build(name: str, reference: cc.Structure, particles: cc.ParticleStack, width: float = 1.0) -> cc.CryoChains:
    """One of the paper's five models around a reference."""
    structure = reference.as_one_body() if name == "N100" else reference
    return cc.CryoChains.for_particles(structure, particles, width=width, **MODELS[name])


@torch.no_grad()
def place_on_path(molecule: Molecule, particles: cc.ParticleStack) -> np.ndarray:
    """(N,) expected place on the morph of each particle, when all else is known: poses, noise and the path itself.

    The posterior mean over the true conformations. No method that must find the path too can order particles better:
    the correlation of this with the true place is what the images allow.
    """
    path = particles.truth.conformations.float()
    place = torch.linspace(0, 1, len(path), dtype=torch.float64)
    model = cc.CryoChains.for_particles(molecule.truth, particles, modes=None, width=0.1)
    found = []
    for batch in particles.batches(4):
        b, m = len(batch.rows), len(path)
        pose = tuple(None if part is None else part.repeat_interleave(m, 0) for part in batch.pose)
        images = model.imaging(path.repeat(b, 1, 1), *pose).view(b, m, -1)
        # The mean of an image is nobody's information: extraction normalises it away.
        data = batch.images.view(b, 1, -1)
        off = (data - data.mean(-1, keepdim=True)) - (images - images.mean(-1, keepdim=True))
        log = -off.double().square().sum(-1) / (2 * particles.truth.noise_std**2)
        found.append(torch.softmax(log, dim=1) @ place)
    return torch.cat(found).numpy()


def choose(name: str, choices, what: str):
    """``choices[name]``, or an error that lists them."""
    if name not in choices:
        raise ValueError(f"expected {what} of {', '.join(map(str, choices))}, got {name!r}")
    return choices[name]
