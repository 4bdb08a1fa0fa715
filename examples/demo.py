"""The whole job on an embedded molecule: simulate, train, refine, score, and save the motion.

Synthetic particles of the GluA3 N-terminal domain dimer, anywhere between its closed (PDB 3O21) and
open (PDB 6FLR) states. The model is given the images, their poses and the closed state; the open
state is known to the simulation and to the scores alone. Writes results/demo/.
"""

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import cryochains as cc
from cryochains import plots
from cryochains._files import atomic_path
from cryochains.analysis import PrincipalMotions
from cryochains.inference import Scores, rmsd
from cryochains.molecule import Structure


def main() -> None:
    args = parse_arguments()
    out = args.out
    began = time.perf_counter()
    closed = cc.load_structure("glua3-closed")
    closed, opened = cc.match_structures(closed, cc.load_structure("glua3-open"))
    opened = cc.superpose(opened, closed)
    path = cc.morph(closed, opened, n=50)

    # Written as .star and .mrcs; the stack that comes back reads its images from there.
    total = args.n_train + args.n_test
    particles = cc.simulate_particles(
        closed,
        total,
        conformations=path,
        box_size=args.box_size,
        snr_db=args.snr_db,
        seed=1,
        path=out / "particles.star",
    )
    train, _, test = particles.split(
        train=args.n_train / total, validation=0, test=args.n_test / total, seed=0
    )
    model = cc.Model(closed, particles, modes=args.modes)

    learn, validation, _ = train.split(train=0.9, validation=0.1, test=0, seed=0)
    encoder = cc.train_encoder(
        model, learn, validation, width=args.width, epochs=args.epochs, seed=0
    )
    encoded = evaluate("encoder", cc.encode(encoder, train), cc.encode(encoder, test))

    started = time.perf_counter()
    result = cc.refine(model, train)
    seconds = time.perf_counter() - started
    ms_per_round = 1000 * seconds / len(train) / len(result.history)
    held_out = cc.refine(model, test, result.population)
    refined = evaluate("MAP refinement", result, held_out)
    limit = cc.information_limit(model, test)

    metrics = {
        "n_train": len(train),
        "n_test": len(test),
        "snr_db": args.snr_db,
        "encoder": encoded.metrics(),
        "map": {**refined.metrics(), "ms_per_particle_round": ms_per_round},
        "mean": {"rmsd": refined.scores.mean_rmsd},
        "limit": {"rmsd": float(np.sqrt(np.mean(limit**2)))},
        "pc1_ends_rmsd": distances_of_ends(refined.motions, closed, opened),
    }
    figures = draw_figures(encoded, refined, limit)
    figures |= {"training": plots.plot_training(encoder)}
    save_figures(out, figures)
    cc.save_motion(out / "pc1.pdb", refined.motions, n=11)
    cc.latent_table(held_out).to_csv(out / "latents.csv")
    metrics["seconds"] = time.perf_counter() - began
    with atomic_path(out / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(metrics, out)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A method on held-out particles.

    Attributes
    ----------
    name : str
    learned, held_out : Result
        Of the particles that were learned from, and of the others.
    motions : PrincipalMotions
        Of the particles that were learned from.
    scores : Scores
        Of the held-out particles.
    """

    name: str
    learned: cc.Result
    held_out: cc.Result
    motions: PrincipalMotions
    scores: Scores

    def metrics(self) -> dict:
        names = ("rmsd", "explained_motion", "spearman")
        return {name: getattr(self.scores, name) for name in names}


def evaluate(name: str, learned: cc.Result, held_out: cc.Result) -> Evaluation:
    motions = cc.compute_pca(learned)
    return Evaluation(name, learned, held_out, motions, cc.score(held_out, motions))


def distances_of_ends(
    motions: PrincipalMotions, closed: Structure, opened: Structure
) -> list[float]:
    """RMSD in Å of the two ends of PC1 from the two real states."""
    ends = motions.model.decode(motions.traverse(0, n=2))
    states = torch.tensor(np.stack([closed.coords, opened.coords]), dtype=torch.float32)
    distances = torch.stack([rmsd(end.expand_as(states), states) for end in ends])
    # The sign of a component is arbitrary: its low end may be either state.
    pairs = (distances.diagonal(), distances.flip(1).diagonal())
    return min(pairs, key=lambda pair: float(pair.sum())).tolist()


def draw_figures(encoded: Evaluation, refined: Evaluation, limit: np.ndarray) -> dict[str, Figure]:
    per_particle = {part.name: part.scores.rmsd_per_particle for part in (encoded, refined)}
    mean = refined.scores.mean_rmsd_per_particle
    return {
        "particles": plots.plot_particles(refined.held_out),
        "refinement": plots.plot_refinement(refined.learned),
        "latent_space_map": draw_latent_space(refined),
        "latent_space_encoder": draw_latent_space(encoded),
        "rmsd": plots.plot_rmsd(per_particle, mean, limit),
        "residue_motion": plots.plot_residue_motion(
            refined.motions.model,
            refined.motions.traverse(0, n=6),
            "PC1 of all chains, 5th to 95th percentile",
        ),
    }


def draw_latent_space(part: Evaluation) -> Figure:
    scores = part.motions.transform(part.held_out)
    truth = part.held_out.particles.truth.coordinate.numpy()
    title = f"{part.name}, held out: |Spearman| {part.scores.spearman:.3f}"
    return plots.plot_latent_space(part.motions, scores, truth, title)


def save_figures(out: Path, figures: dict[str, Figure]) -> None:
    for name, figure in figures.items():
        with atomic_path(out / f"{name}.png") as part:
            figure.savefig(part, dpi=130)


def print_table(metrics: dict, out: Path) -> None:
    n_test, snr_db = metrics["n_test"], metrics["snr_db"]
    print(f"\n{n_test} held-out synthetic particles, {snr_db:g} dB, closed state as reference\n")
    print(f"{'':22}{'RMSD (Å)':>10}{'explained motion':>18}{'|Spearman| PC1':>16}")
    for name, row in (("encoder", metrics["encoder"]), ("MAP refinement", metrics["map"])):
        rmsd_and_motion = f"{row['rmsd']:10.2f}{row['explained_motion']:18.2f}"
        print(f"{name:22}{rmsd_and_motion}{row['spearman']:16.3f}")
    mean, limit = metrics["mean"]["rmsd"], metrics["limit"]["rmsd"]
    print(f"{'mean conformation':22}{mean:10.2f}{0:18.2f}{'–':>16}")
    print(f"{'information limit':22}{limit:10.2f}{1 - (limit / mean) ** 2:18.2f}{'–':>16}")
    low, high = metrics["pc1_ends_rmsd"]
    ends = f"{low:.2f} and {high:.2f} Å from the two real states"
    print(f"\nPC1 at its 5th and 95th percentile: {ends}")
    print(f"{metrics['seconds']:.0f} s; figures, pc1.pdb and metrics.json are in {out}/")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--n-train", type=int, default=2000, help="particles to learn from")
    add("--n-test", type=int, default=500, help="held-out particles")
    add("--box-size", type=int, default=64, help="pixels a side")
    add("--snr-db", type=float, default=0.0, help="10·log10(signal variance / noise variance)")
    add("--modes", type=int, default=20, help="normal modes a chain")
    # A quarter of the paper's filters and six epochs: what two CPU cores do in a minute.
    add("--width", type=float, default=0.25, help="of the encoder; 1 is the paper's")
    add("--epochs", type=int, default=6, help="of the encoder")
    add("--out", type=Path, default=Path("results/demo"), help="folder for the results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
