"""A population is known: its particles estimated, and refined, with seconds on one thread.

GluA3 from closed to open, as in the demo; the population is learned from some particles and the
others, which it has not seen, are answered in three ways: by all passes of a refinement, by a
refinement that begins with the estimate, and by the estimate alone. Times are of the process's CPU.
"""

import argparse
import time

import torch

import cryochains as cc
from cryochains.inference import estimate

ALL_PASSES = (8.0, 4.0, 2.0, 0.0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--snr-db", type=float, nargs="+", default=[0.0, -10.0, -20.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=500, help="particles that teach, and others")
    args = parser.parse_args()
    torch.set_num_threads(1)
    closed, opened = cc.match_structures(
        cc.load_structure("glua3-closed"), cc.load_structure("glua3-open")
    )
    path = cc.morph(closed, cc.superpose(opened, closed), n=50)
    print(f"{'dB':>4} {'way':30} explained  |Spearman|  ms a particle  passes")
    for snr_db in args.snr_db:
        particles = cc.simulate_particles(
            closed,
            2 * args.n,
            conformations=path,
            box_size=64,
            snr_db=snr_db,
            seed=args.seed,
            progress=False,
        )
        model = cc.Model(closed, particles, modes=20)
        population = cc.refine(model, particles[: args.n], progress=False).population
        others = particles[args.n :]
        # What is compiled when first used is not counted.
        estimate(model, others[:8], population, progress=False)
        settings = {"population": population, "progress": False}
        answer(snr_db, "all passes", cc.refine, model, others, blurs=ALL_PASSES, **settings)
        answer(snr_db, "begun with the estimate", cc.refine, model, others, **settings)
        answer(snr_db, "the estimate alone", estimate, model, others, **settings)


def answer(snr_db, way, verb, model, particles, **settings) -> None:
    """One line of the table."""
    began = time.process_time()
    result = verb(model, particles, **settings)
    milliseconds = 1000 * (time.process_time() - began) / len(particles)
    scores = cc.score(result, motions=cc.compute_pca(result))
    print(
        f"{snr_db:4.0f} {way:30} {scores.explained_motion:9.3f}  {scores.spearman:10.3f}  "
        f"{milliseconds:13.1f}  {len(result.history):6}",
        flush=True,
    )


if __name__ == "__main__":
    main()
