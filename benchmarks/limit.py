"""How far from the information limit a refinement ends, on molecules that move in different ways.

A row of the table is a case and a seed. Particles are simulated by the library's own renderer, the
program is given one end of the motion, and what is scored are held-out particles, each conformation
superposed on the reference:

- glua3: the dimer between its closed and open states; its chains move almost as rigid bodies.
- gaussian: GluA3 with latents drawn from a Gaussian of full rank, in the model's own modes.
- bend, bend-gabab, bend-igg: every chain of GluA3, GABA-B (6UOA) or an antibody (1HZH) turns at
  its hinge by 20° and bends by 4 Å besides.
- gabab: between 6UOA and 6UO8. These files are in the folder that CRYOCHAINS_STRUCTURES names.
- states: half of the particles show 6UOA as it is, the others one of two ways to turn and bend it.
- fab: one Fab of the antibody turns by 360° about the bonds of its hinge, as in CryoBench's IgG-1D
  (Jeon et al. 2024); fab-any: by any turn about that hinge. Its bodies are two Fabs and the Fc, and
  the model knows which one may turn by any angle.

    python benchmarks/limit.py --cases glua3 bend --seeds 0 1

`ratio` is the root mean square over the limit's, `explained` the explained motion, `best` that of
the limit, `coverage` the share of true latents in their 95 % intervals (of "gaussian" alone, where
true latents exist), `again` the ratio of the particles that the population was learned from,
`within` the share of particles whose body that turns is within 10° of its true orientation, seen
from the others.
Of "states", `ari_k` is the adjusted Rand index of three Gaussians fitted to k components of the
particles that were refined, and `states_k` the number of Gaussians of the least BIC.
"""

import argparse
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from realism import add_texts
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture

import cryochains as cc
from cryochains.images import ParticleStack
from cryochains.inference import Result, true_population
from cryochains.molecule import Structure

QUIET = {"progress": False}
# Of the path from one end of a motion to the other.
N_FRAMES = 50
# Residues over which a hinge turns.
HINGE_WIDTH = 6
# What the reference's chains do besides turning, Å (RMS).
BENDING = 4.0
HINGE_DEGREES = 20.0
# Components that clusters are looked for in, and Gaussians that are tried.
CLUSTERED = (2, 3, 5, 10)
MOST_STATES = 6
# Å, standard deviation of the latents of "gaussian".
SPREAD = 0.4
# Of "fab" and "fab-any": the bodies, the residues of chain H whose direction is the axis, and how
# many conformations there are.
FAB_BODIES = {
    "Fab": "(chain H and resnum 1 to 230) or chain L",
    "other Fab": "(chain K and resnum 1 to 230) or chain M",
    "Fc": "(chain H or chain K) and resnum > 230",
}
FAB_AXIS = (225, 235)
FAB_FRAMES = 100
# Degrees, what is found is no further from the truth.
FOUND_DEGREES = 10.0


@dataclass(frozen=True, eq=False)
class Case:
    """A molecule that moves.

    Attributes
    ----------
    reference : Structure
        What the program is given.
    path : (m, n_atoms, 3) array or None
        Å, drawn evenly; None where latents are drawn instead.
    """

    reference: Structure
    path: np.ndarray | None


def make_case(name: str, bodies: str) -> Case:
    """The molecule of a case, with chains or domains as bodies."""
    if name in ("glua3", "gaussian"):
        pair = load("glua3-closed"), load("glua3-open")
    elif name == "gabab":
        pair = load("6UOA.cif.gz"), load("6UO8.cif.gz")
    elif name == "states":
        reference = load("6UOA.cif.gz")
        bent = [bent_path(reference, seed)[-1] for seed in (7, 8)]
        states = np.stack([reference.coords, *bent])
        # As many particles show a state as it has conformations here.
        return Case(with_bodies(reference, bodies), states.repeat((5, 3, 2), axis=0))
    elif name in ("fab", "fab-any"):
        antibody = load("1hzh.pdb.gz", FAB_BODIES).with_turning("Fab")
        return Case(antibody, fab_path(antibody, any_turn=name == "fab-any"))
    else:
        source = {"bend": "glua3-closed", "bend-gabab": "6UOA.cif.gz", "bend-igg": "1hzh.pdb.gz"}
        reference = load(source[name])
        return Case(with_bodies(reference, bodies), bent_path(reference))
    given, other = cc.match_structures(*pair)
    path = cc.morph(given, cc.superpose(other, given), n=N_FRAMES)
    return Case(with_bodies(given, bodies), None if name == "gaussian" else path)


def load(source: str, bodies: Mapping[str, str] | str = "chains") -> Structure:
    """An embedded molecule, or a file."""
    if source.startswith("glua3"):
        return cc.load_structure(source, bodies=bodies)
    folder = os.environ.get("CRYOCHAINS_STRUCTURES")
    if folder is None:
        raise FileNotFoundError(
            f"expected {source} in the folder that CRYOCHAINS_STRUCTURES names, got no such "
            "variable; try --cases glua3 gaussian bend, which need no file"
        )
    return cc.load_structure(Path(folder) / source, bodies=bodies)


def with_bodies(structure: Structure, bodies: str) -> Structure:
    """The same atoms in the same order; domains are contiguous in the sequence."""
    return structure.as_domains() if bodies == "domains" else structure


def bent_path(reference: Structure, seed: int = 7) -> np.ndarray:
    """(N_FRAMES, n_atoms, 3) Å: every chain turns at its hinge, and bends.

    The hinge is where a cut leaves the fewest contacts between both sides.
    """
    rng = np.random.default_rng(seed)
    path = np.repeat(reference.coords[None], N_FRAMES, axis=0)
    shares = np.linspace(0, 1, N_FRAMES)
    bending = soft_bending(reference, rng)
    for chain in range(reference.n_chains):
        own = np.flatnonzero(reference.chain_index == chain)
        coords = reference.coords[own]
        cut = best_cut(coords)
        across = coords[cut:].mean(0) - coords[:cut].mean(0)
        axis = np.cross(across, rng.standard_normal(3))
        axis /= np.linalg.norm(axis)
        turned = np.clip((np.arange(len(own)) - cut) / HINGE_WIDTH + 0.5, 0, 1)
        for number, share in enumerate(shares):
            angles = np.radians(HINGE_DEGREES) * share * turned
            turn = Rotation.from_rotvec(angles[:, None] * axis)
            path[number, own] = coords[cut] + turn.apply(coords - coords[cut])
    return path + shares[:, None, None] * bending


def fab_path(antibody: Structure, any_turn: bool) -> np.ndarray:
    """(FAB_FRAMES, n_atoms, 3) Å: the first body turns about its hinge."""
    if any_turn:
        turns = Rotation.random(FAB_FRAMES, random_state=0)
    else:
        chids = antibody.atoms.getChids()[antibody.rows]
        ends = [np.flatnonzero((chids == "H") & (antibody.resnums == n))[0] for n in FAB_AXIS]
        axis = antibody.coords[ends[1]] - antibody.coords[ends[0]]
        angles = np.linspace(0, 2 * np.pi, FAB_FRAMES, endpoint=False)
        turns = Rotation.from_rotvec(angles[:, None] * axis / np.linalg.norm(axis))
    hinge = antibody.centers[0]
    own = antibody.chain_index == 0
    path = np.repeat(antibody.coords[None], FAB_FRAMES, axis=0)
    path[:, own] = hinge + np.einsum("kij,nj->kni", turns.as_matrix(), path[0, own] - hinge)
    return path


def share_found(result: Result) -> float:
    """Share of particles whose turning body is within `FOUND_DEGREES` of where it should be."""
    structure = result.model.structure
    body = structure.chain_ids.index(structure.turning[0])
    own = structure.chain_index == body
    off = []
    for found, true in zip(
        result.decode().numpy(), result.particles.truth.coords().numpy(), strict=True
    ):
        turns = [
            Rotation.align_vectors(moved[part] - moved[part].mean(0), still - still.mean(0))[0]
            for moved in (found, true)
            for part, still in ((own, structure.coords[own]), (~own, structure.coords[~own]))
        ]
        seen, expected = turns[1].inv() * turns[0], turns[3].inv() * turns[2]
        off.append(np.degrees((seen.inv() * expected).magnitude()))
    return float(np.mean(np.array(off) < FOUND_DEGREES))


def best_cut(coords: np.ndarray) -> int:
    """Residue before which a cut leaves the fewest contacts, in the middle three fifths."""
    pairs = cKDTree(coords).query_pairs(10.0, output_type="ndarray")
    first, last = np.sort(pairs, axis=1).T
    candidates = np.arange(len(coords) // 5, 4 * len(coords) // 5)
    contacts = [np.sum((first < cut) & (last >= cut)) for cut in candidates]
    return int(candidates[int(np.argmin(contacts))])


def soft_bending(reference: Structure, rng: np.random.Generator) -> np.ndarray:
    """(n_atoms, 3) Å, `BENDING` (RMS) of every chain, by modes of another network."""
    modes = cc.compute_modes(reference, 40, cutoff=10.0, springs="anm")
    moved = np.zeros_like(reference.coords)
    for chain, (vectors, values) in enumerate(zip(modes.vectors, modes.eigenvalues, strict=True)):
        weights = rng.standard_normal(len(values)) / np.sqrt(values)
        own = np.tensordot(weights, vectors, 1)
        own *= BENDING / np.sqrt(np.square(own).sum(1).mean())
        moved[reference.chain_index == chain] = own
    return moved


def simulate(case: Case, args: argparse.Namespace, seed: int) -> ParticleStack:
    """Particles to learn from and, after them, particles that are held out."""
    n = args.n + args.n_test
    settings = {"box_size": args.box, "snr_db": args.snr, "seed": seed, **QUIET}
    if case.path is not None:
        return cc.simulate_particles(case.reference, n, conformations=case.path, **settings)
    # Any box that holds it: a simulation takes the dynamics alone.
    model = cc.Model(case.reference, modes=args.modes, box_size=256, pixel_size=2.0)
    generator = torch.Generator().manual_seed(seed)
    latents = SPREAD * torch.randn(n, model.n_latents, generator=generator)
    return cc.simulate_particles(
        case.reference, n, dynamics=model.dynamics, latents=latents, **settings
    )


def measure(name: str, seed: int, args: argparse.Namespace) -> dict[str, object]:
    """One row of the table."""
    case = make_case(name, args.bodies)
    particles = simulate(case, args, seed)
    model = cc.Model(case.reference, particles, modes=args.modes)
    train, test = particles[: args.n], particles[args.n :]
    started = time.perf_counter()
    result = cc.refine(model, train, **QUIET)
    seconds = time.perf_counter() - started
    held_out = cc.refine(model, test, result.population, **QUIET)
    scores, again = cc.score(held_out), cc.score(result)
    # Of all particles: a sample of few has a narrower covariance than what it was drawn from.
    population = true_population(model, particles)
    limit = np.sqrt((cc.information_limit(model, test, population) ** 2).mean())
    row = {
        "case": name,
        "bodies": "selections" if case.reference.turning else args.bodies,
        "n": args.n,
        "box": args.box,
        "snr_db": args.snr,
        "modes": args.modes,
        "seed": seed,
        "rmsd": round(scores.rmsd, 3),
        "limit": round(float(limit), 3),
        "mean_rmsd": round(scores.mean_rmsd, 3),
        "ratio": round(scores.rmsd / float(limit), 3),
        "explained": round(scores.explained_motion, 3),
        "best": round(1 - float(limit) ** 2 / scores.mean_rmsd**2, 3),
        "again": round(again.rmsd / float(limit), 3),
        "verdict": result.verdict.grade,
        "seconds": round(seconds, 1),
    }
    if case.reference.turning:
        row["within"] = round(share_found(held_out), 3)
    if case.path is None:
        row["coverage"] = round(covered(held_out), 3)
    if name == "states":
        row |= score_states(result)
    return row


def score_states(result: Result) -> dict[str, object]:
    """How well clusters of the particles are the states, and how many there seem to be."""
    coords = result.particles.truth.coords().flatten(1).numpy()
    _, state = np.unique(coords[:, :30], axis=0, return_inverse=True)
    scores = cc.compute_pca(result, n_components=max(CLUSTERED)).transform(result)
    row: dict[str, object] = {}
    for k in CLUSTERED:
        fits = [
            GaussianMixture(m, n_init=5, random_state=0).fit(scores[:, :k])
            for m in range(1, MOST_STATES + 1)
        ]
        groups = fits[state.max()].predict(scores[:, :k])
        row[f"ari_{k}"] = round(float(adjusted_rand_score(state, groups)), 3)
        bic = [fit.bic(scores[:, :k]) for fit in fits]
        row[f"states_{k}"] = int(np.argmin(bic)) + 1
    return row


def covered(result: Result) -> float:
    """Share of true latents, as they were drawn, within 1.96 standard deviations."""
    off = result.latents - result.particles.truth.latents
    return float((off.abs() < 1.96 * result.std).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--cases", nargs="+", default=["glua3", "gaussian", "bend"])
    add("--seeds", type=int, nargs="+", default=[0])
    add("--n", type=int, default=400, help="particles to learn from")
    add("--n-test", type=int, default=300, help="held-out particles")
    add("--box", type=int, default=64, help="pixels a side")
    add("--snr", type=float, default=0.0, help="10·log10(signal variance / noise variance)")
    add("--modes", type=int, default=10, help="normal modes a body")
    add("--bodies", default="chains", help="or domains")
    add("--out", type=Path, default=Path("results/limit.csv"), help="table that rows go to")
    args = parser.parse_args()
    for name in args.cases:
        for seed in args.seeds:
            row = measure(name, seed, args)
            print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            add_texts(args.out, {key: str(value) for key, value in row.items()})


if __name__ == "__main__":
    main()
