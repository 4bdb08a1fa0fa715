"""The paper's Figures 2 to 4: simulate, fit one of its five models, score, add a row to a table.

Every run writes one row to results/paper/table.csv and what the figures need to
results/paper/runs/. A run whose row is there is skipped, and one that was cut resumes. Two cores do
`--scale small` in minutes; `paper` wants a GPU.
"""

import argparse
import csv
import datetime
import io
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from paper_protocol import (
    DEFAULT_SPRINGS,
    MODELS,
    MOLECULES,
    Molecule,
    build,
    choose,
    expected_path_coordinate,
    load_molecule,
    simulate,
)

import cryochains as cc
from cryochains._files import atomic_path
from cryochains.analysis import KIND_GROUPS, PrincipalMotions
from cryochains.inference import correlation, rmsd, true_latents

TABLE_VERSION = 2
SPRINGS_KEY = ("simulated_springs", "model_springs")
KEY = (
    "figure",
    "molecule",
    "reference",
    "model",
    "engine",
    "scale",
    "box_size",
    "snr_db",
    "seed",
    *SPRINGS_KEY,
)
# What tables of version 1 lack, and the springs that all their rows had.
FIRST_SPRINGS = dict.fromkeys(SPRINGS_KEY, "anm")
SETTINGS = (
    "pixel_size",
    "n_train",
    "n_population",
    "n_test",
    "n_latents",
    "width",
    "epochs",
    "code_version",
    "torch",
    "device",
    "date",
    "seconds",
)
SCORES = (
    "rmsd",
    "rmsd_mean",
    "rmsd_median",
    "rmsd_q25",
    "rmsd_q75",
    "explained_motion",
    "limit",
    "floor",
    "mean_conformation_rmsd",
    "spearman",
    "spearman_limit",
    "end_reference",
    "end_truth",
)
COLUMNS = ("table_version", *KEY, *SETTINGS, *SCORES)


@dataclass(frozen=True)
class Scale:
    """How large a run is.

    `n_population` of the training particles teach the refinement its population.
    """

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


def run(
    name: str, snr_db: float, model_name: str, engine: str, args: argparse.Namespace
) -> dict | None:
    """One row of the table; None when it is there already."""
    scale = SCALES[args.scale]
    if args.reference == "corrected" and engine != "map":
        raise ValueError(
            "expected engine map with a corrected reference, got encoder; try --engine map"
        )
    key = {
        "figure": args.figure,
        "molecule": name,
        "reference": args.reference,
        "model": model_name,
        "engine": engine,
        "scale": args.scale,
        "box_size": args.box_size or scale.box_size,
        "snr_db": snr_db,
        "seed": args.seed,
        "simulated_springs": args.simulated_springs,
        "model_springs": args.model_springs,
    }
    label = " ".join(str(value) for value in key.values())
    table = args.out / "table.csv"
    if any(all(row[k] == str(v) for k, v in key.items()) for row in read_table(table)):
        print(f"done before: {label}")
        return None
    print(label, flush=True)
    began = time.perf_counter()
    molecule = load_molecule(name, args.simulated_springs)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n_population = args.n_population or scale.n_population
    stem = run_name(key)
    checkpoint = args.out / "work" / stem
    sizes = particle_numbers(scale, engine, n_population)
    stacks = simulate_stacks(molecule, key, sizes, device)
    if engine == "map":
        learned, held_out = refine_stacks(molecule, key, stacks, n_population, checkpoint, device)
    else:
        learned, held_out = encode_stacks(molecule, key, stacks, scale, checkpoint, device)
    arrays, scores = evaluate(held_out, learned, molecule, args.figure)
    row = {
        "table_version": TABLE_VERSION,
        **key,
        "pixel_size": stacks["test"].pixel_size,
        "n_train": sizes["train"],
        "n_population": n_population if engine == "map" else "",
        "n_test": len(held_out),
        "n_latents": held_out.model.n_latents,
        "width": "" if engine == "map" else scale.width,
        "epochs": "" if engine == "map" else scale.epochs,
        "code_version": code_version(),
        "torch": torch.__version__,
        "device": describe(device),
        "date": datetime.date.today().isoformat(),
        "seconds": round(time.perf_counter() - began),
        **scores,
    }
    with atomic_path(args.out / "runs" / f"{stem}.npz") as part:
        np.savez_compressed(part, **arrays)
    add_row(table, row)
    shutil.rmtree(checkpoint, ignore_errors=True)
    print({k: row[k] for k in ("seconds", *SCORES) if row[k] != ""}, flush=True)
    return row


def run_name(row: dict) -> str:
    """Name of the files of a row's run; rows of the paper's springs have it without them."""
    key = {name: row[name] for name in KEY}
    if all(key[name] == springs for name, springs in FIRST_SPRINGS.items()):
        key = {name: value for name, value in key.items() if name not in FIRST_SPRINGS}
    return "-".join(str(value) for value in key.values())


def particle_numbers(scale: Scale, engine: str, n_population: int) -> dict[str, int]:
    """How many particles to simulate of each part."""
    if engine == "map":
        # The refinement looks at no more of the training particles than it learns from.
        return {"train": n_population, "validation": 0, "test": scale.n_test}
    return {"train": scale.n_train, "validation": scale.n_validation, "test": scale.n_test}


def simulate_stacks(
    molecule: Molecule, key: dict, sizes: dict[str, int], device: torch.device
) -> dict[str, cc.ParticleStack]:
    """Training, validation and test particles, the same ones for every model."""
    stacks = {}
    for number, (part, n) in enumerate(sizes.items()):
        if not n:
            continue
        # Seeds far apart: training and test particles share neither poses nor noise.
        seed = 1000 * key["seed"] + number
        stacks[part] = simulate(
            molecule,
            key["figure"],
            n,
            key["box_size"],
            key["snr_db"],
            seed,
            device=device,
            springs=key["simulated_springs"],
        )
    return stacks


def starting_model(molecule: Molecule, key: dict, particles: cc.ParticleStack) -> cc.Model:
    start = molecule.truth if key["reference"] == "truth" else molecule.reference
    return build(key["model"], start, particles, key["model_springs"])


def refine_stacks(
    molecule: Molecule,
    key: dict,
    stacks: dict[str, cc.ParticleStack],
    n_population: int,
    checkpoint: Path,
    device: torch.device,
) -> tuple[cc.Result, cc.Result]:
    """Training particles refined, and test particles under the population that they taught."""
    train, test = stacks["train"], stacks["test"]
    model = starting_model(molecule, key, test)
    settings = {"n_population": n_population, "seed": key["seed"], "device": device}
    if key["reference"] == "corrected":
        first = checkpoint.with_name(f"{checkpoint.name}-first")
        learned = cc.refine(model, train, checkpoint=first, **settings)
        corrected = cc.inference.correct_reference(learned, device=device)
        model = build(key["model"], corrected, test, key["model_springs"])
        shutil.rmtree(first, ignore_errors=True)
    learned = cc.refine(model, train, checkpoint=checkpoint, **settings)
    return learned, cc.refine(model, test, learned.population, device=device)


def encode_stacks(
    molecule: Molecule,
    key: dict,
    stacks: dict[str, cc.ParticleStack],
    scale: Scale,
    checkpoint: Path,
    device: torch.device,
) -> tuple[cc.Result, cc.Result]:
    """An encoder's latents of as many training particles as test particles, and of these."""
    train, test = stacks["train"], stacks["test"]
    encoder = cc.train_encoder(
        starting_model(molecule, key, test),
        train,
        stacks["validation"],
        width=scale.width,
        epochs=scale.epochs,
        seed=key["seed"],
        checkpoint=checkpoint,
        device=device,
    )
    learned = cc.encode(encoder, train[: scale.n_test], device=device)
    return learned, cc.encode(encoder, test, device=device)


def evaluate(
    held_out: cc.Result, learned: cc.Result, molecule: Molecule, figure: int
) -> tuple[dict, dict]:
    """What the figures draw, and the numbers of the row."""
    particles = held_out.particles
    # As the paper has it: poses are given, and nothing is superposed.
    scores = cc.score(held_out, frame="poses")
    _, floor = true_latents(held_out.model, particles)
    limit = cc.information_limit(held_out.model, particles, frame="poses")
    per_particle = scores.rmsd_per_particle
    q25, median, q75 = np.percentile(per_particle, [25, 50, 75])
    predicted = held_out.decode().mean(0)
    error = (predicted - particles.truth.coords().mean(0)).norm(dim=1)
    row = dict.fromkeys(SCORES, "") | {
        "rmsd": scores.rmsd,
        "rmsd_mean": per_particle.mean(),
        "rmsd_median": median,
        "rmsd_q25": q25,
        "rmsd_q75": q75,
        "explained_motion": scores.explained_motion,
        "limit": root_mean_square(limit),
        "floor": root_mean_square(floor.numpy()),
        "mean_conformation_rmsd": scores.mean_rmsd,
    }
    arrays = {
        "rmsd": per_particle,
        "mean_conformation_rmsd": scores.mean_rmsd_per_particle,
        "limit": limit,
        "residue_error": error.numpy(),
        "mean_latents": held_out.latents.mean(0).numpy(),
    }
    if figure == 3:
        path_arrays, path_scores = evaluate_path(held_out, learned, molecule)
        arrays |= path_arrays
        row |= path_scores
    row = {name: round(float(value), 4) if value != "" else "" for name, value in row.items()}
    return {name: np.asarray(values, dtype=np.float32) for name, values in arrays.items()}, row


def evaluate_path(held_out: cc.Result, learned: cc.Result, molecule: Molecule) -> tuple[dict, dict]:
    """Of particles on a morph: components against the true coordinate, and the ends of the path."""
    truth = held_out.particles.truth.coordinate.numpy()
    arrays, best_chain = chain_components(held_out, truth)
    motions = cc.compute_pca(learned, frame="poses")
    to_reference, to_truth = distances_of_ends(motions, molecule)
    expected = expected_path_coordinate(molecule, held_out.particles)
    scores = {
        "spearman": best_chain or correlation(motions.transform(held_out)[:, 0], truth),
        "spearman_limit": correlation(expected, truth),
        "end_reference": to_reference,
        "end_truth": to_truth,
    }
    return {"path_coordinate": truth, **arrays}, scores


def chain_components(held_out: cc.Result, truth: np.ndarray) -> tuple[dict, float]:
    """Components of every chain and kind of motion, and |Spearman| of R|t of the better chain."""
    present = set(held_out.model.dynamics.latent_kind)
    arrays = {}
    best = 0.0
    for chain in held_out.model.structure.chain_ids:
        for kind in ("modes", "rigid"):
            if not present & set(KIND_GROUPS[kind]):
                continue
            motions = cc.compute_pca(held_out, chain, kind, n_components=2, frame="poses")
            arrays[f"{kind}_{chain}"] = motions.scores
            arrays[f"{kind}_{chain}_share"] = motions.explained_variance_ratio
            arrays[f"{kind}_{chain}_path"] = motions.traverse(0, n=3).numpy()
            if kind == "rigid":
                best = max(best, correlation(motions.scores[:, 0], truth))
    return arrays, best


def distances_of_ends(motions: PrincipalMotions, molecule: Molecule) -> tuple[float, float]:
    """RMSD in Å of the ends of PC1 (5th and 95th percentile) from the reference and the truth."""
    ends = motions.model.decode(motions.traverse(0, n=2))
    states = torch.tensor(np.stack([molecule.reference.coords, molecule.truth.coords])).float()
    distances = torch.stack([rmsd(end.expand_as(states), states) for end in ends])
    # The sign of a component is arbitrary: its low end may be either state.
    pairs = (distances.diagonal(), distances.flip(0).diagonal())
    to_reference, to_truth = min(pairs, key=lambda pair: float(pair.sum()))
    return float(to_reference), float(to_truth)


def root_mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def read_table(path: Path) -> list[dict]:
    """Rows of a results table; none when there is no file. Tables of version 1 are read as 2.

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
    columns = tuple(reader.fieldnames or ())
    versions = {row.get("table_version") for row in rows}
    first = tuple(name for name in COLUMNS if name not in FIRST_SPRINGS)
    if columns == first and versions <= {"1"}:
        return [row | FIRST_SPRINGS | {"table_version": str(TABLE_VERSION)} for row in rows]
    if columns != COLUMNS or not versions <= {str(TABLE_VERSION)}:
        raise ValueError(
            f"expected a results table of version {TABLE_VERSION}, got another one at {path}; "
            "try another --out"
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
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    return f"{cc.__version__}+{commit}" if commit else cc.__version__


def describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    several = "several with commas, or all"
    add("--figure", type=int, choices=(2, 3), default=2, help="2 (and 4): modes, turns; 3: a morph")
    add("--molecule", default="glua3", help=f"{', '.join(MOLECULES)}, {several}")
    add("--snr", type=float, nargs="+", default=[0.0], help="dB; the paper's are 32 0 -20")
    add("--model", default="all", help=f"{', '.join(MODELS)}, {several}")
    add("--engine", default="all", help=f"{', '.join(ENGINES)} or all")
    add("--scale", default="small", help=", ".join(SCALES))
    add(
        "--reference",
        choices=("reference", "truth", "corrected"),
        default="reference",
        help="what is fitted: the other state, as in the paper, the true one, or (MAP only) the "
        "other with what the training particles of a first refinement say of its shape",
    )
    springs = {"choices": ("edenm", "anm"), "default": DEFAULT_SPRINGS}
    add("--simulated-springs", **springs, help="of the simulation's modes; the paper's are anm")
    add("--model-springs", **springs, help="of the model's modes")
    add("--box-size", type=int, help="pixels a side, if not the scale's")
    add("--n-population", type=int, help="particles that teach the population, if not the scale's")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("results/paper"), help="folder of the table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(str(error)) from None
