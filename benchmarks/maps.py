"""Do maps that never saw the atoms confirm what a refinement finds, and only that?

Sets of GluA3 particles from the simulator of `realism` (heavy atoms, no code shared with the
renderer): "moving" ones between the closed and the open state, "still" ones all closed, and
"misplaced" ones, moving with poses that are off by 2° and 1 px. Each is refined with the closed
state as reference. A row of the table is a set:

- split_low, split_high, split_mean: standard errors by which the map of either end of PC1 agrees
  better with its own conformation than with the other end's, and the map of all with their mean
  than with the reference; latents and maps from images whose noises are independent
  (`split_noise`).
- same_low, same_high: the same where latents and maps are of the same images, which is no test.
- halves_overlap, halves_first, halves_second, halves_mean: `compare_halves`: how alike PC1 of one
  half and the most similar component of the other are, how far both move (Å), and how far apart
  the mean conformations are (Å).
- resolution_ratio: of the map of PC1's lower end, over that of as many particles chosen by their
  true conformation at their true poses. fsc_true: correlation of the two maps over the shells that
  both resolve.

    python benchmarks/maps.py --condition moving --seeds 0 1 2 --n 300 --box 32
    python benchmarks/maps.py --speed
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from realism import CONDITIONS, Experiment, Molecule, add_texts, load_molecule, make_experiment

import cryochains as cc
from cryochains.analysis import compare_ends, compare_halves, compare_with_map, split_noise
from cryochains.images import compute_fsc, reconstruct, soft_sphere
from cryochains.inference import Result

SHARE = 0.3
QUIET = {"progress": False}
MOVING = replace(CONDITIONS["heavy-mild"])
DISTURBANCES = {
    "moving": MOVING,
    "still": MOVING,
    "misplaced": replace(MOVING, rotation_error=2.0, shift_error=1.0),
}


def measure(
    molecule: Molecule, condition: str, n: int, box: int, snr_db: float, modes: int, seed: int
) -> dict[str, object]:
    """One row of the table."""
    if condition == "still":
        molecule = replace(molecule, path=np.repeat(molecule.path[:1], len(molecule.path), 0))
    experiment = make_experiment(molecule, DISTURBANCES[condition], n, box, snr_db, seed)
    particles = experiment.particles
    model = cc.Model(experiment.reference, particles, modes=modes)
    started = time.perf_counter()
    result = cc.refine(model, particles, device="cpu", **QUIET)
    refined = time.perf_counter()
    motions = cc.compute_pca(result)
    same = compare_ends(motions, share=SHARE, images=result.particles, **QUIET)
    compared = time.perf_counter()
    again, images = split_noise(result, device="cpu", **QUIET)
    ends = compare_ends(cc.compute_pca(again), share=SHARE, images=images, **QUIET)
    whole = compare_with_map(again, images=images, **QUIET)
    halves = compare_halves(result, device="cpu", **QUIET)
    best = int(np.argmax(halves.overlap[0]))
    row = {
        "condition": condition,
        "n": n,
        "box": box,
        "snr_db": snr_db,
        "modes": modes,
        "seed": seed,
        "distance": round(ends.distance, 3),
        "split_low": round(ends.low.significance, 2),
        "split_high": round(ends.high.significance, 2),
        "confirmed": ends.confirmed,
        "split_mean": round(whole.significance, 2),
        "mean_favoured": whole.favours_own,
        "same_low": round(same.low.significance, 2),
        "same_high": round(same.high.significance, 2),
        "halves_overlap": round(float(halves.overlap[0, best]), 3),
        "halves_first": round(float(halves.amplitudes[0, 0]), 3),
        "halves_second": round(float(halves.amplitudes[1, best]), 3),
        "halves_mean": round(halves.mean_distance, 3),
        "refine_s": round(refined - started, 1),
        "compare_s": round(compared - refined, 1),
    }
    if condition != "still":
        low = motions.scores[:, 0] <= np.quantile(motions.shown_scores[:, 0], SHARE)
        row |= against_truth(experiment, motions.result, low)
    return row


def against_truth(experiment: Experiment, result: Result, low: np.ndarray) -> dict[str, object]:
    """The map of a group that was found beside that of the true one at its true poses."""
    last_frames = bool(np.median(experiment.frame[low]) > np.median(experiment.frame))
    order = np.argsort(-experiment.frame if last_frames else experiment.frame, kind="stable")
    true = np.sort(order[: low.sum()])
    at_true_poses = replace(
        experiment.particles,
        rotations=torch.from_numpy(experiment.rotations).float(),
        shifts=torch.from_numpy(experiment.shifts).float(),
    )
    found = reconstruct(result.particles[low], scale=result.scale[low], **QUIET)
    best = reconstruct(at_true_poses[true], **QUIET)
    given = reconstruct(experiment.particles[true], **QUIET)
    mask = soft_sphere(found.box_size)
    fsc = compute_fsc(found.volume * mask, best.volume * mask)
    resolved = slice(1, min(found.n_resolved, best.n_resolved))
    return {
        "resolution": round(found.resolution, 2),
        "best_resolution": round(best.resolution, 2),
        "given_poses_resolution": round(given.resolution, 2),
        "resolution_ratio": round(found.resolution / best.resolution, 3),
        "fsc_true": round(float(fsc[resolved].mean()), 3),
    }


def measure_speed(n: int = 2000, box: int = 128) -> float:
    """Seconds that a reconstruction with its half maps takes."""
    closed = cc.load_structure("glua3-closed")
    particles = cc.simulate_particles(
        closed, n, conformations=closed.coords[None], box_size=box, **QUIET
    )
    reconstruct(particles[:4], **QUIET)  # compiles
    started = time.perf_counter()
    volume = reconstruct(particles, device="cpu", **QUIET)
    seconds = time.perf_counter() - started
    print(f"{volume}: {seconds:.1f} s on {torch.get_num_threads()} threads")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--condition", choices=DISTURBANCES, default="moving")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--box", type=int, default=32)
    parser.add_argument("--snr", type=float, default=0.0)
    parser.add_argument("--modes", type=int, default=5)
    parser.add_argument("--speed", action="store_true", help="time 2,000 particles of 128 px")
    parser.add_argument("--out", type=Path, help="table to add the rows to, .csv")
    arguments = parser.parse_args()
    if arguments.speed:
        measure_speed()
        return
    molecule = load_molecule()
    for seed in arguments.seeds:
        row = measure(
            molecule,
            arguments.condition,
            arguments.n,
            arguments.box,
            arguments.snr,
            arguments.modes,
            seed,
        )
        print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        if arguments.out:
            add_texts(arguments.out, {name: str(value) for name, value in row.items()})


if __name__ == "__main__":
    main()
