"""The whole job on an embedded molecule: simulate, train, refine, score, and walk along the first principal motion.

Synthetic particles of the GluA3 N-terminal domain dimer, anywhere between its closed (PDB 3O21) and open (PDB 6FLR)
states. The model is given the images, their poses and the closed state; the open state is known to the simulation and
to the scores alone. Writes results/demo/.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

import cryochains as cc
from cryochains import plots
from cryochains.files import atomic_path


def main() -> None:
    args = parse_arguments()
    out = args.out
    began = time.perf_counter()
    closed, opened = cc.match_structures(cc.load_structure("glua3-closed"), cc.load_structure("glua3-open"))
    opened = cc.superpose(opened, closed)
    path = cc.morph(closed, opened, n=50)

    # Written as .star and .mrcs; the stack that comes back reads its images from there.
    total = args.n_train + args.n_test
    particles = cc.simulate_particles(
        closed, total, conformations=path, box_size=args.box_size, snr_db=args.snr_db, seed=1,
        path=out / "particles.star",
    )  # fmt: skip
    train, _, test = particles.split(train=args.n_train / total, validation=0, test=args.n_test / total, seed=0)
    model = cc.CryoChains.for_particles(closed, particles, modes=args.modes, width=args.width)

    learn, validation, _ = train.split(train=0.9, validation=0.1, test=0, seed=0)
    epochs = cc.fit(model, learn, validation, epochs=args.epochs, seed=0)
    encoder = evaluate(model, cc.encode_particles(model, train), cc.encode_particles(model, test), test)

    started = time.perf_counter()
    refined = cc.refine(model, train)
    ms_per_round = 1000 * (time.perf_counter() - started) / len(train) / len(refined.history)
    held_out = cc.refine(model, test, refined.population)
    refinement = evaluate(model, refined.latents, held_out.latents, test)
    limit = cc.information_limit(model, test)

    motions = cc.compute_pca(model.dynamics, refined.latents)
    ends = model.decode(motions.traverse(0, n=2)).cpu()
    states = torch.tensor(np.stack([closed.coords, opened.coords]), dtype=torch.float32)
    distances = torch.stack([cc.rmsd(end.expand_as(states), states) for end in ends])
    # The sign of a component is arbitrary: its low end may be either state.
    ends_rmsd = min((distances.diagonal(), distances.flip(1).diagonal()), key=lambda pair: float(pair.sum()))

    metrics = {
        "n_train": len(train),
        "n_test": len(test),
        "snr_db": args.snr_db,
        "encoder": encoder["metrics"],
        "map": {**refinement["metrics"], "ms_per_particle_round": ms_per_round},
        "mean": {"rmsd": refinement["scores"].mean_rmsd},
        "limit": {"rmsd": float(np.sqrt(np.mean(limit**2)))},
        "pc1_ends_rmsd": [float(value) for value in ends_rmsd],
    }
    save_figures(out, model, test, epochs, refined, held_out, motions, encoder, refinement, limit)
    cc.save_ensemble(out / "pc1.pdb", model.dynamics, motions.traverse(0, n=11))
    cc.latent_table(model.dynamics, held_out.latents, test.ids, held_out.std).to_csv(out / "latents.csv")
    metrics["seconds"] = time.perf_counter() - began
    with atomic_path(out / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(metrics, out)


def evaluate(model, train_latents, test_latents, test) -> dict:
    """Held-out scores; the component is found on the training particles, the correlation on the others."""
    motions = cc.compute_pca(model.dynamics, train_latents)
    scores = cc.score_motion(model.dynamics, test_latents, test)
    spearman = cc.correlation(motions.transform(test_latents)[:, 0], test.truth.coordinate)
    metrics = {"rmsd": scores.rmsd, "explained_motion": scores.explained_motion, "spearman": spearman}
    return {"metrics": metrics, "scores": scores, "motions": motions, "pc": motions.transform(test_latents)}


def save_figures(out, model, test, epochs, refined, held_out, motions, encoder, refinement, limit) -> None:
    truth = test.truth.coordinate.numpy()
    spearman = {name: part["metrics"]["spearman"] for name, part in (("encoder", encoder), ("map", refinement))}
    per_particle = {
        "encoder": encoder["scores"].rmsd_per_particle,
        "MAP refinement": refinement["scores"].rmsd_per_particle,
    }
    figures = {
        "particles": plots.plot_particles(model, test, held_out.latents),
        "training": plots.plot_training(epochs),
        "refinement": plots.plot_refinement(refined.history),
        "latent_space_map": plots.plot_latent_space(
            motions, refinement["pc"], truth, f"MAP, held out: |Spearman| {spearman['map']:.3f}"
        ),
        "latent_space_encoder": plots.plot_latent_space(
            encoder["motions"], encoder["pc"], truth, f"encoder, held out: |Spearman| {spearman['encoder']:.3f}"
        ),
        "rmsd": plots.plot_rmsd(per_particle, refinement["scores"].mean_rmsd_per_particle, limit),
        "residue_motion": plots.plot_residue_motion(
            model.dynamics, motions.traverse(0, n=6), "PC1 of all chains, 5th to 95th percentile"
        ),
    }
    for name, figure in figures.items():
        with atomic_path(out / f"{name}.png") as part:
            figure.savefig(part, dpi=130)


def print_table(metrics: dict, out: Path) -> None:
    print(f"\n{metrics['n_test']} held-out synthetic particles, {metrics['snr_db']:g} dB, closed state as reference\n")
    print(f"{'':22}{'RMSD (Å)':>10}{'explained motion':>18}{'|Spearman| PC1':>16}")
    for name, row in (("encoder", metrics["encoder"]), ("MAP refinement", metrics["map"])):
        print(f"{name:22}{row['rmsd']:10.2f}{row['explained_motion']:18.2f}{row['spearman']:16.3f}")
    mean, limit = metrics["mean"]["rmsd"], metrics["limit"]["rmsd"]
    print(f"{'mean conformation':22}{mean:10.2f}{0:18.2f}{'–':>16}")
    print(f"{'information limit':22}{limit:10.2f}{1 - (limit / mean) ** 2:18.2f}{'–':>16}")
    low, high = metrics["pc1_ends_rmsd"]
    print(f"\nPC1 at its 5th and 95th percentile: {low:.2f} and {high:.2f} Å from the two real states")
    print(f"{metrics['seconds']:.0f} s; figures, pc1.pdb and metrics.json are in {out}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n-train", type=int, default=2000, help="particles to learn from")
    parser.add_argument("--n-test", type=int, default=500, help="held-out particles")
    parser.add_argument("--box-size", type=int, default=64, help="pixels a side")
    parser.add_argument("--snr-db", type=float, default=0.0, help="10·log10(signal variance / noise variance)")
    parser.add_argument("--modes", type=int, default=20, help="normal modes a chain")
    # A quarter of the paper's filters and six epochs: what two CPU cores do in a minute.
    parser.add_argument("--width", type=float, default=0.25, help="of the encoder; 1 is the paper's")
    parser.add_argument("--epochs", type=int, default=6, help="of the encoder")
    parser.add_argument("--out", type=Path, default=Path("results/demo"), help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
