"""The paper's Figures 2 to 4: simulate, fit one of its five models, score held-out particles, add a row to a table.

Every run writes one row to results/paper/table.csv and what the figures need to results/paper/runs/. A run whose row is
there is skipped, and one that was cut resumes. Two cores do `--scale small` in minutes; `paper` wants a GPU.
"""

import argparse
import csv
import datetime
import io
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from correct_reference import correct_reference
from paper_protocol import MODELS, MOLECULES, build, choose, place_on_path, simulate

import cryochains as cc
from cryochains.files import atomic_path

TABLE_VERSION = 1
KEY = ("figure", "molecule", "reference", "model", "engine", "scale", "box_size", "snr_db", "seed")
COLUMNS = (
    "table_version", *KEY, "pixel_size", "n_train", "n_population", "n_test", "n_latents", "width", "epochs",
    "code_version", "torch", "device", "date", "seconds",
    "rmsd", "rmsd_mean", "rmsd_median", "rmsd_q25", "rmsd_q75", "explained_motion", "limit", "floor",
    "mean_conformation_rmsd", "spearman", "spearman_limit", "end_reference", "end_truth",
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """How large a run is. `n_population` of the training particles teach the refinement its population."""

    n_train: int
    n_validation: int
    n_test: int
    n_population: int
    box_size: int
    epochs: int
    width: float


SCALES = {
    "paper": Scale(50_000, 5_000, 5_000, 4_000, 128, 20, 1.0),
    "medium": Scale(5_000, 500, 300, 600, 64, 10, 0.5),
    "small": Scale(400, 100, 100, 400, 48, 4, 0.25),
}
ENGINES = ("map", "encoder")


def main() -> None:
    args = parse_arguments()
    molecules = list(MOLECULES) if args.molecule == "all" else args.molecule.split(",")
    models = list(MODELS) if args.model == "all" else args.model.split(",")
    engines = list(ENGINES) if args.engine == "all" else args.engine.split(",")
    for name in molecules:
        choose(name, MOLECULES, "a molecule")
    for name in models:
        choose(name, MODELS, "a model")
    for name in engines:
        choose(name, {engine: engine for engine in ENGINES}, "an engine")
    choose(args.scale, SCALES, "a scale")
    for name in molecules:
        for snr_db in args.snr:
            for engine in engines:
                for model in models:
                    run(name, snr_db, model, engine, args)


def run(name: str, snr_db: float, model_name: str, engine: str, args: argparse.Namespace) -> dict | None:
    """One row of the table; None when it is there already."""
    scale = SCALES[args.scale]
    box_size = args.box_size or scale.box_size
    if args.reference == "corrected" and engine != "map":
        raise ValueError("expected engine map with a corrected reference, got encoder; try --engine map")
    n_population = args.n_population or scale.n_population
    key = {
        "figure": args.figure, "molecule": name, "reference": args.reference, "model": model_name, "engine": engine,
        "scale": args.scale, "box_size": box_size, "snr_db": snr_db, "seed": args.seed,
    }  # fmt: skip
    label = " ".join(str(value) for value in key.values())
    table = args.out / "table.csv"
    if any(all(row[k] == str(v) for k, v in key.items()) for row in read_table(table)):
        print(f"done before: {label}")
        return None
    print(label, flush=True)
    began = time.perf_counter()
    molecule = MOLECULES[name]()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Seeds far apart: training and test particles share neither poses nor noise, and every model gets the same ones.
    seeds = {part: 1000 * args.seed + number for number, part in enumerate(("train", "validation", "test"))}
    sizes = {"train": scale.n_train, "validation": scale.n_validation, "test": scale.n_test}
    if engine == "map":
        # The refinement looks at no more of the training particles than it learns its population from.
        sizes |= {"train": n_population, "validation": 0}
    work = args.out / "work"
    stacks = {
        part: simulate(molecule, args.figure, n, box_size, snr_db, seeds[part], device=device)
        for part, n in sizes.items()
        if n
    }
    test = stacks["test"]
    start = molecule.truth if args.reference == "truth" else molecule.reference
    model = build(model_name, start, test, scale.width).to(device)
    stem = "-".join(str(value) for value in key.values())
    checkpoint = work / f"{stem}.safetensors"
    if engine == "map":
        train, settings = stacks["train"], {"n_population": n_population, "seed": args.seed}
        if args.reference == "corrected":
            first = checkpoint.with_stem(f"{stem}-first")
            learned = cc.refine(model, train, checkpoint=first, **settings)
            model = build(model_name, correct_reference(model, train, learned), test, scale.width).to(device)
            first.unlink(missing_ok=True)
        learned = cc.refine(model, train, checkpoint=checkpoint, **settings)
        latents = cc.refine(model, test, learned.population).latents
        basis = learned.latents
    else:
        cc.fit(model, stacks["train"], stacks["validation"], epochs=scale.epochs, seed=args.seed, checkpoint=checkpoint)
        latents = cc.encode_particles(model, test)
        basis = cc.encode_particles(model, stacks["train"][: scale.n_test])
    arrays, scores = evaluate(model.cpu(), latents.cpu(), basis.cpu(), test, molecule, args.figure)
    row = {
        "table_version": TABLE_VERSION, **key, "pixel_size": test.pixel_size, "n_train": sizes["train"],
        "n_population": n_population if engine == "map" else "", "n_test": len(test),
        "n_latents": model.dynamics.n_latents, "width": "" if engine == "map" else scale.width,
        "epochs": "" if engine == "map" else scale.epochs, "code_version": code_version(), "torch": torch.__version__,
        "device": describe(device), "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - began), **scores,
    }  # fmt: skip
    with atomic_path(args.out / "runs" / f"{stem}.npz") as part:
        np.savez_compressed(part, **arrays)
    add_row(table, row)
    checkpoint.unlink(missing_ok=True)
    print({k: row[k] for k in ("seconds", *COLUMNS[-14:]) if row[k] != ""}, flush=True)
    return row


def evaluate(model, latents, basis, test, molecule, figure) -> tuple[dict, dict]:
    """What the figures draw, and the numbers of the row."""
    scores = cc.score_motion(model.dynamics, latents, test)
    best, floor = cc.true_latents(model.dynamics, test)
    limit = cc.information_limit(model, test)
    per_particle = scores.rmsd_per_particle
    q25, median, q75 = np.percentile(per_particle, [25, 50, 75])
    predicted = model.decode(latents).mean(0)
    error = (predicted - test.truth.coords().mean(0)).norm(dim=1)
    row = {
        "rmsd": scores.rmsd, "rmsd_mean": per_particle.mean(), "rmsd_median": median, "rmsd_q25": q25, "rmsd_q75": q75,
        "explained_motion": scores.explained_motion, "limit": root_mean_square(limit),
        "floor": root_mean_square(floor.numpy()), "mean_conformation_rmsd": scores.mean_rmsd,
        "spearman": "", "spearman_limit": "", "end_reference": "", "end_truth": "",
    }  # fmt: skip
    arrays = {
        "rmsd": per_particle, "mean_conformation_rmsd": scores.mean_rmsd_per_particle, "limit": limit,
        "residue_error": error.numpy(), "mean_latents": latents.mean(0).numpy(),
    }  # fmt: skip
    if figure == 3:
        truth = test.truth.coordinate.numpy()
        arrays["place"] = truth
        has = set(model.dynamics.latent_kind)
        kinds = [kind for kind in ("modes", "rigid") if has & set(cc.latent.KIND_GROUPS[kind])]
        best_chain = 0.0
        for chain in model.structure.chain_ids:
            for kind in kinds:
                motions = cc.compute_pca(model.dynamics, latents, chain, kind, n_components=2)
                arrays[f"{kind}_{chain}"] = motions.scores
                arrays[f"{kind}_{chain}_share"] = motions.explained_variance_ratio
                arrays[f"{kind}_{chain}_path"] = motions.traverse(0, n=3).numpy()
                if kind == "rigid":
                    best_chain = max(best_chain, cc.correlation(motions.scores[:, 0], truth))
        everything = cc.compute_pca(model.dynamics, basis)
        ends = model.decode(everything.traverse(0, n=2))
        states = torch.tensor(np.stack([molecule.reference.coords, molecule.truth.coords])).float()
        distances = torch.stack([cc.rmsd(end.expand_as(states), states) for end in ends])
        # The sign of a component is arbitrary: its low end may be either state.
        pairs = (distances.diagonal(), distances.flip(0).diagonal())
        to_reference, to_truth = min(pairs, key=lambda pair: float(pair.sum()))
        row |= {
            "spearman": best_chain or cc.correlation(everything.transform(latents)[:, 0], truth),
            "spearman_limit": cc.correlation(place_on_path(molecule, test), truth),
            "end_reference": float(to_reference), "end_truth": float(to_truth),
        }  # fmt: skip
    row = {k: round(float(v), 4) if v != "" else v for k, v in row.items()}
    return {k: np.asarray(v, dtype=np.float32) for k, v in arrays.items()}, row


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def read_table(path: Path) -> list[dict]:
    """Rows of a results table; none when there is no file.

    Raises
    ------
    ValueError
        When the table was written by another version of this script.
    """
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    versions = {row.get("table_version") for row in rows} or {str(TABLE_VERSION)}
    if tuple(reader.fieldnames or ()) != COLUMNS or versions != {str(TABLE_VERSION)}:
        raise ValueError(
            f"expected a results table of version {TABLE_VERSION}, got another one at {path}; try another --out"
        )
    return rows


def add_row(path: Path, row: dict) -> None:
    """Write the table anew with one more row, whole or not at all."""
    rows = [*read_table(path), row]
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as part:
        part.write_text(text.getvalue())


def code_version() -> str:
    """Version of the library and, in a clone, the commit."""
    here = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    return "+".join(filter(None, [cc.__version__, git.stdout.strip()]))


def describe(device: torch.device) -> str:
    return torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--figure", type=int, choices=(2, 3), default=2, help="2 (and 4): modes and turns; 3: a morph")
    parser.add_argument("--molecule", default="glua3", help=f"{', '.join(MOLECULES)}, several with commas, or all")
    parser.add_argument("--snr", type=float, nargs="+", default=[0.0], help="dB; the paper's are 32 0 -20")
    parser.add_argument("--model", default="all", help=f"{', '.join(MODELS)}, several with commas, or all")
    parser.add_argument("--engine", default="all", help=f"{', '.join(ENGINES)} or all")
    parser.add_argument("--scale", default="small", help=f"{', '.join(SCALES)}")
    parser.add_argument("--reference", choices=("reference", "truth", "corrected"), default="reference",
                        help="what is fitted: the other state, as in the paper, the true one, or (MAP only) the other "
                        "with what the training particles of a first refinement say of its shape")  # fmt: skip
    parser.add_argument("--box-size", type=int, help="pixels a side, if not the scale's")
    parser.add_argument("--n-population", type=int, help="particles that teach the population, if not the scale's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/paper"), help="folder of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
