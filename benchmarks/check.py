"""Whether `cryochains.check` names what is wrong: faults planted into particles, one at a time.

The particles are those of `benchmarks/realism.py`: heavy atoms in solvent by a simulator that
shares no code with the library's, in states along the morph from the closed to the open GluA3
dimer; the program is given the closed one. A fault is named when its item, and no other, is red; of
two at once one has to be named, and nothing else. The sound sets ("sound"; "mild" with brightness,
poses, noise and junk as real particles have them; "junk" with one particle of ten that shows none;
"noisy" at -20 and "faint" at -30 dB) are called sound when no item is red.

    python benchmarks/check.py --seeds 10 11 12 --snr -10 --out docs/check.csv

``--molecule`` takes another structure file. Its particles show it along a motion of its own elastic
network, drawn at random.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial.transform import Rotation

import cryochains as cc
from cryochains.images import ParticleStack
from cryochains.model import Dynamics, elastic_variance
from cryochains.molecule import Structure, rigid_fit

sys.path.insert(0, str(Path(__file__).resolve().parent))
from realism import (  # noqa: E402
    CONDITIONS,
    N_FRAMES,
    Disturbance,
    Experiment,
    Molecule,
    add_texts,
    load_molecule,
    make_experiment,
    version,
)

# Å, how far the structure is put from where the poses turn about it.
_OFFSETS = (7.0, 20.0)
_STRONG = CONDITIONS["heavy-strong"]
_MIRROR = torch.diag(torch.tensor([1.0, 1.0, -1.0]))


# Of the table: what tells rows apart, and what was measured.
_KEY = ("molecule", "fault", "seed", "n", "box", "snr", "modes")
_COLUMNS = (*_KEY, "hit", "red", "yellow", "significance", "scale", "seconds", "version")


@dataclass(frozen=True)
class Fault:
    """What is done to sound particles or to their reference, and what should be red.

    Attributes
    ----------
    items : tuple of str
        None for what is sound; of several, one has to be red.
    plant : tuple of functions
        Each: particles, reference and random numbers → particles and reference.
    disturbance : Disturbance
        Of the particles.
    pixel_factor : float
        Pixel size that the program is given over the true one.
    snr : float, optional
        dB, in place of that of the run.
    """

    items: tuple[str, ...] = ()
    plant: tuple[Callable, ...] = ()
    disturbance: Disturbance = _STRONG
    pixel_factor: float = 1.0
    snr: float | None = None


def flip_hand(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    """Poses of the mirror image, which no image tells from those of the molecule."""
    return replace(particles, rotations=_MIRROR @ particles.rotations @ _MIRROR), reference


def invert_contrast(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    return replace(particles, images=-particles.read_images()), reference


def negate_shifts(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    return replace(particles, shifts=-particles.shifts), reference


def transpose_rotations(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    return replace(particles, rotations=particles.rotations.transpose(1, 2)), reference


def swap_shifts(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    return replace(particles, shifts=particles.shifts.flip(1)), reference


def transpose_images(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    return replace(particles, images=particles.read_images().transpose(1, 2)), reference


def move_rows(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    step = int(rng.choice([-1, 1]))
    return replace(particles, images=particles.read_images().roll(step, 0)), reference


def negate_defocus(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    ctf = particles.ctf
    ctf = replace(ctf, defocus_u=-ctf.defocus_u, defocus_v=-ctf.defocus_v)
    return replace(particles, ctf=ctf), reference


def move_origin(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    direction = rng.standard_normal(3)
    step = rng.uniform(*_OFFSETS) * direction / np.linalg.norm(direction)
    return particles, reference.with_origin(reference.origin + step)


def turn_reference(particles: ParticleStack, reference: Structure, rng: np.random.Generator):
    """The structure as it comes from the data bank: in a frame of its own."""
    turn = Rotation.random(rng=rng).as_matrix()
    coords = (reference.atoms.getCoords() - reference.origin) @ turn.T + reference.origin
    return move_origin(particles, reference.with_coords(coords), rng)


FAULTS = {
    "sound": Fault(),
    "mild": Fault(disturbance=CONDITIONS["all-mild"]),
    "junk": Fault(disturbance=replace(_STRONG, junk=0.1)),
    "noisy": Fault(snr=-20.0),
    "faint": Fault(snr=-30.0),
    "hand": Fault(("hand",), (flip_hand,)),
    "contrast": Fault(("contrast",), (invert_contrast,)),
    "shift-sign": Fault(("shift sign",), (negate_shifts,)),
    "transposed": Fault(("rotations",), (transpose_rotations,)),
    "swapped-shifts": Fault(("axes",), (swap_shifts,)),
    "swapped-images": Fault(("axes",), (transpose_images,)),
    "pixel-size": Fault(("pixel size",), pixel_factor=1.03),
    "pixel-size-small": Fault(("pixel size",), pixel_factor=0.97),
    "rows": Fault(("rows",), (move_rows,)),
    "ctf-sign": Fault(("CTF",), (negate_defocus,)),
    "origin": Fault(("origin",), (move_origin,)),
    "turned": Fault(("origin",), (turn_reference,)),
    "hand-contrast": Fault(("hand", "contrast"), (flip_hand, invert_contrast)),
    "shift-sign-size": Fault(("shift sign", "pixel size"), (negate_shifts,), pixel_factor=1.03),
}


def load_other(path: str) -> Molecule:
    """A molecule of a structure file, along a motion of its own elastic network."""
    heavy = cc.load_structure(path, atoms="heavy")
    reference = cc.load_structure(path)
    dynamics = Dynamics(reference, cc.compute_modes(reference, n_modes=5))
    variance = elastic_variance(dynamics).numpy()
    end = np.sqrt(variance) * np.random.default_rng(0).standard_normal(len(variance))
    latents = torch.from_numpy(np.linspace(0, 1, N_FRAMES)[:, None] * end).float()
    coords = dynamics.all_atoms().decode(latents).double().numpy()
    alpha = reference.node_rows
    for frame in coords:
        # What all of it moves by is a pose.
        rotation, translation = rigid_fit(frame[alpha], coords[0, alpha])
        frame[:] = frame @ rotation.T + translation
    rows = heavy.rows
    return Molecule(
        reference,
        heavy.atoms.getElements()[rows],
        heavy.atoms.getBetas()[rows],
        coords[:, rows],
        np.searchsorted(rows, alpha),
    )


def run_fault(experiment: Experiment, name: str, seed: int, args: argparse.Namespace) -> dict:
    """What the check says of one fault in these particles."""
    fault = FAULTS[name]
    particles, reference = experiment.particles, experiment.reference
    rng = np.random.default_rng([seed, *name.encode()])
    for plant in fault.plant:
        particles, reference = plant(particles, reference, rng)
    row = {"fault": name, "seed": seed, "red": [], "yellow": [], "significance": np.nan}
    try:
        model = cc.Model(reference, particles, modes=args.modes or None)
    except ValueError:
        # A molecule that leaves the box is refused before any image is read.
        return row | {"hit": "origin" in fault.items, "scale": np.nan, "seconds": 0.0}
    began = time.perf_counter()
    check = cc.check(model, particles, device=args.device)
    for item in check.items:
        if item.status != "green":
            row[item.status].append(item.name)
    if row["red"]:
        row["significance"] = min(abs(check[item].significance) for item in row["red"])
    if args.verbose:
        print(name, seed, check, flush=True)
    return row | {
        "hit": set(row["red"]) <= set(fault.items) and bool(row["red"]) == bool(fault.items),
        "scale": 100 * check["pixel size"].value,
        "seconds": time.perf_counter() - began,
    }


def run_seed(molecule: Molecule, seed: int, args: argparse.Namespace) -> list[dict]:
    """A row a fault; faults in the same particles share them."""
    experiments: dict[tuple, Experiment] = {}
    rows = []
    for name in args.faults:
        fault = FAULTS[name]
        snr = args.snr if fault.snr is None else fault.snr
        key = (fault.disturbance, fault.pixel_factor, snr)
        if key not in experiments:
            disturbance = replace(fault.disturbance, pixel_factor=fault.pixel_factor)
            experiments[key] = make_experiment(molecule, disturbance, args.n, args.box, snr, seed)
        row = run_fault(experiments[key], name, seed, args)
        row |= {"molecule": molecule_name(args), "n": args.n, "box": args.box, "snr": snr}
        rows.append(row | {"modes": args.modes, "version": args.version})
        if args.out is not None:
            texts = {column: as_text(rows[-1][column]) for column in _COLUMNS}
            add_texts(args.out, texts, _KEY)
    return rows


def molecule_name(args: argparse.Namespace) -> str:
    return Path(args.molecule).name.split(".")[0]


def as_text(value: object) -> str:
    if isinstance(value, list):
        return "; ".join(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return str(value)


def print_fault(name: str, rows: list[dict]) -> None:
    """Hits of one fault, the least significance, the longest time, and what was red or yellow."""
    hits = sum(row["hit"] for row in rows)
    least = float(np.min([row["significance"] for row in rows]))
    longest = max(row["seconds"] for row in rows)
    notes = [f"seed {row['seed']}: red {row['red']}" for row in rows if not row["hit"]]
    yellow = sorted({item for row in rows for item in row["yellow"]})
    if yellow:
        notes.append(f"yellow {', '.join(yellow)}")
    scales = [row["scale"] for row in rows if np.isfinite(row["scale"])]
    if scales:
        notes.append(f"size {min(scales):+.2f} to {max(scales):+.2f} %")
    print(f"{name:18}{hits:>4}/{len(rows)}{least:>13.0f}{longest:>8.0f}  {'; '.join(notes)}")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--seeds", type=int, nargs="+", default=[0], help="of the particles")
    add("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS), help="default all")
    add("--n", type=int, default=500, help="particles")
    add("--box", type=int, default=64, help="pixels a side")
    add("--snr", type=float, default=-10.0, help="10·log10(signal variance / noise variance)")
    add("--modes", type=int, default=10, help="normal modes a chain")
    add("--molecule", default="glua3", help="glua3, or a structure file")
    add("--out", type=Path, default=None, help="table that rows are added to")
    add("--verbose", action="store_true", help="print each check")
    add("--device", default=None, help="by default a GPU where there is one")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    # Of the code that runs: the checkout may change meanwhile.
    args.version = version()
    molecule = load_molecule() if args.molecule == "glua3" else load_other(args.molecule)
    rows = [row for seed in args.seeds for row in run_seed(molecule, seed, args)]
    print(f"{'fault':18}{'hits':>7}{'significance':>13}{'s':>8}  else")
    for name in args.faults:
        print_fault(name, [row for row in rows if row["fault"] == name])


if __name__ == "__main__":
    main()
