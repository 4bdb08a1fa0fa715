"""Learn the population that comes with the package: the GluA3 morph (synthetic particles)."""

import argparse
from pathlib import Path

import numpy as np

import cryochains as cc


def main() -> None:
    args = parse_arguments()
    closed = cc.load_structure("glua3-closed")
    closed, opened = cc.match_structures(closed, cc.load_structure("glua3-open"))
    path = cc.morph(closed, cc.superpose(opened, closed), n=50)
    total = args.n_train + args.n_test
    particles = cc.simulate_particles(
        closed, total, conformations=path, box_size=64, snr_db=args.snr_db, seed=100
    )
    train, test = particles[: args.n_train], particles[args.n_train :]
    model = cc.Model(closed, particles, modes=20)
    learned = cc.refine(model, train)
    learned.population.save(args.out)
    held_out = cc.refine(model, test, learned.population)
    limit = np.sqrt((cc.information_limit(model, test) ** 2).mean())
    print(cc.score(held_out, cc.compute_pca(learned)))
    print(f"limit {limit:.2f} Å; {args.out}: {args.out.stat().st_size / 1e3:.0f} kB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-train", type=int, default=2000, help="particles to learn from")
    parser.add_argument("--n-test", type=int, default=500, help="held-out particles")
    parser.add_argument("--snr-db", type=float, default=0.0)
    parser.add_argument("--out", type=Path, default=Path("results/glua3.safetensors"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
