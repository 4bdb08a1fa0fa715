"""Train the model that comes with the package: encoder and population of the GluA3 morph (synthetic particles)."""

import argparse
from pathlib import Path

import numpy as np

import cryochains as cc

ENTRIES = ("glua3-closed", "glua3-open")


def main() -> None:
    args = parse_arguments()
    closed, opened = cc.match_structures(*(cc.load_structure(entry) for entry in ENTRIES))
    path = cc.morph(closed, cc.superpose(opened, closed), n=50)
    total = args.n_train + 1000
    particles = cc.simulate_particles(closed, total, conformations=path, box_size=64, snr_db=args.snr_db, seed=100)
    train, validation, test = (particles[rows] for rows in np.split(np.arange(total), [args.n_train, total - 500]))
    model = cc.CryoChains.for_particles(closed, particles, modes=20, width=args.width)
    checkpoint = args.out.with_suffix(".part")
    cc.fit(model, train, validation, epochs=args.epochs, seed=0, checkpoint=checkpoint)
    learned = cc.refine(model, train[:2000])
    held_out = cc.refine(model, test, learned.population)
    cc.save_pretrained(args.out, model, learned.population, ENTRIES)
    checkpoint.unlink(missing_ok=True)
    limit = np.sqrt((cc.information_limit(model, test) ** 2).mean())
    motions = cc.compute_pca(model.dynamics, learned.latents)
    for name, latents in (("encoder", cc.encode_particles(model, test)), ("refinement", held_out.latents)):
        spearman = cc.correlation(motions.transform(latents)[:, 0], test.truth.coordinate)
        print(name, cc.score_motion(model.dynamics, latents, test), f"|Spearman| {spearman:.3f}")
    print(f"limit {limit:.2f} Å; {args.out}: {args.out.stat().st_size / 1e6:.1f} MB")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n-train", type=int, default=6000)
    parser.add_argument("--snr-db", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--out", type=Path, default=Path("results/glua3.safetensors"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
