"""The whole job on an embedded molecule: simulate, train, refine, score, and walk along the first principal motion.

Synthetic particles of the GluA3 N-terminal domain dimer, anywhere between its closed (PDB 3O21) and open (PDB 6FLR)
states. The model is given the images, their poses and the closed state; the open state is known to the simulation and
to the scores alone. Writes results/demo/.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch

import cryochains as cc
from cryochains import plots
from cryochains.files import atomic_path

OUT = Path("results/demo")
N_TRAIN, N_TEST, SNR_DB, N_MODES = 2000, 500, 0.0, 20
# A quarter of the paper's filters and three epochs: what two CPU cores do in about a minute.
WIDTH, EPOCHS = 0.25, 3


def main() -> None:
    began = time.perf_counter()
    closed, opened = cc.match_structures(cc.load_structure("glua3-closed"), cc.load_structure("glua3-open"))
    opened = cc.superpose(opened, closed)
    path = cc.morph(closed, opened, n=50)

    # Written as .star and .mrcs; the stack that comes back reads its images from there.
    particles = cc.simulate_particles(
        closed, N_TRAIN + N_TEST, conformations=path, box_size=64, snr_db=SNR_DB, seed=1, path=OUT / "particles.star"
    )
    total = N_TRAIN + N_TEST
    train, _, test = particles.split(train=N_TRAIN / total, validation=0, test=N_TEST / total, seed=0)
    model = cc.CryoChains.for_particles(closed, particles, modes=N_MODES, width=WIDTH)

    learn, validation, _ = train.split(train=0.9, validation=0.1, test=0, seed=0)
    epochs = cc.fit(model, learn, validation, epochs=EPOCHS, seed=0)
    encoder = evaluate(model, cc.encode_particles(model, train), cc.encode_particles(model, test), test)

    started = time.perf_counter()
    refined = cc.refine(model, train)
    ms_per_round = 1000 * (time.perf_counter() - started) / N_TRAIN / len(refined.history)
    held_out = cc.refine(model, test, refined.population)
    refinement = evaluate(model, refined.latents, held_out.latents, test)
    limit = cc.information_limit(model, test)

    motions = cc.compute_pca(model.dynamics, refined.latents)
    ends = model.decode(motions.traverse(0, n=2)).detach()
    states = torch.tensor(np.stack([closed.coords, opened.coords]), dtype=torch.float32)
    distances = torch.stack([cc.rmsd(end.expand_as(states), states) for end in ends])
    # The sign of a component is arbitrary: its low end may be either state.
    ends_rmsd = min((distances.diagonal(), distances.flip(1).diagonal()), key=lambda pair: float(pair.sum()))

    metrics = {
        "n_train": N_TRAIN,
        "n_test": N_TEST,
        "snr_db": SNR_DB,
        "encoder": encoder["metrics"],
        "map": {**refinement["metrics"], "ms_per_particle_round": ms_per_round},
        "mean": {"rmsd": refinement["scores"].mean_rmsd},
        "limit": {"rmsd": float(np.sqrt(np.mean(limit**2)))},
        "pc1_ends_rmsd": [float(value) for value in ends_rmsd],
    }
    save_figures(model, test, epochs, refined, held_out, motions, encoder, refinement, limit)
    cc.save_ensemble(OUT / "pc1.pdb", model.dynamics, motions.traverse(0, n=11))
    cc.latent_table(model.dynamics, held_out.latents, test.ids, held_out.std).to_csv(OUT / "latents.csv")
    metrics["seconds"] = time.perf_counter() - began
    with atomic_path(OUT / "metrics.json") as part:
        part.write_text(json.dumps(metrics, indent=2) + "\n")
    print_table(metrics)


def evaluate(model, train_latents, test_latents, test) -> dict:
    """Held-out scores; the component is found on the training particles, the correlation on the others."""
    motions = cc.compute_pca(model.dynamics, train_latents)
    scores = cc.score_motion(model.dynamics, test_latents, test)
    spearman = cc.correlation(motions.transform(test_latents)[:, 0], test.truth.coordinate)
    metrics = {"rmsd": scores.rmsd, "explained_motion": scores.explained_motion, "spearman": spearman}
    return {"metrics": metrics, "scores": scores, "motions": motions, "pc": motions.transform(test_latents)}


def save_figures(model, test, epochs, refined, held_out, motions, encoder, refinement, limit) -> None:
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
            motions, refinement["pc"], truth, f"MAP, held out: |Spearman| {spearman['map']:.2f}"
        ),
        "latent_space_encoder": plots.plot_latent_space(
            encoder["motions"], encoder["pc"], truth, f"encoder, held out: |Spearman| {spearman['encoder']:.2f}"
        ),
        "rmsd": plots.plot_rmsd(per_particle, refinement["scores"].mean_rmsd_per_particle, limit),
        "residue_motion": plots.plot_residue_motion(
            model.dynamics, motions.traverse(0, n=6), "PC1 of all chains, 5th to 95th percentile"
        ),
    }
    for name, figure in figures.items():
        with atomic_path(OUT / f"{name}.png") as part:
            figure.savefig(part, dpi=130)


def print_table(metrics: dict) -> None:
    print(f"\n{metrics['n_test']} held-out synthetic particles, {metrics['snr_db']:g} dB, closed state as reference\n")
    print(f"{'':22}{'RMSD (Å)':>10}{'explained motion':>18}{'|Spearman| PC1':>16}")
    for name, row in (("encoder", metrics["encoder"]), ("MAP refinement", metrics["map"])):
        print(f"{name:22}{row['rmsd']:10.2f}{row['explained_motion']:18.2f}{row['spearman']:16.2f}")
    mean, limit = metrics["mean"]["rmsd"], metrics["limit"]["rmsd"]
    print(f"{'mean conformation':22}{mean:10.2f}{0:18.2f}{'–':>16}")
    print(f"{'information limit':22}{limit:10.2f}{1 - (limit / mean) ** 2:18.2f}{'–':>16}")
    low, high = metrics["pc1_ends_rmsd"]
    print(f"\nPC1 at its 5th and 95th percentile: {low:.2f} and {high:.2f} Å from the two real states")
    print(f"{metrics['seconds']:.0f} s; figures, pc1.pdb and metrics.json are in {OUT}/")


if __name__ == "__main__":
    main()
