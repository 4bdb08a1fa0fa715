"""Figures 2 to 4 of the paper, drawn from the results table and the runs that reproduce_paper.py wrote."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from paper_protocol import MODELS, MOLECULES
from reproduce_paper import KEY, read_table

from cryochains.files import atomic_path
from cryochains.plots import COLORS, new_figure

# The runs that the project keeps: its table, and per-particle numbers of every row.
KEPT = Path(__file__).resolve().parent.parent / "docs" / "paper"
TITLES = {"glua3": "GluA3", "gabab": "GABA-B", "hsp90": "Hsp90"}
TALLEST = 9.0  # Å; taller bars are cut, with their height written in them
SNR_COLORS = {32.0: COLORS[2], 0.0: COLORS[0], -20.0: COLORS[1]}


def load_rows(folder: Path = KEPT, **wanted) -> list[dict]:
    """Rows of the table with numbers as numbers, those with ``column=value`` for every one `wanted`."""
    rows = [{k: _number(v) for k, v in row.items()} for row in read_table(Path(folder) / "table.csv")]
    return [row | {"folder": folder} for row in rows if all(row[k] == v for k, v in wanted.items())]


def load_run(row: dict) -> dict[str, np.ndarray]:
    """What the figures need of one row: per-particle RMSD, error of every residue, principal components."""
    stem = "-".join(str(row[k]) for k in KEY)
    with np.load(Path(row["folder"]) / "runs" / f"{stem}.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def _number(text: str):
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def paired_difference(a: np.ndarray, b: np.ndarray, n: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """Mean of a − b over the same particles, and its 95 % interval by bootstrap over particles."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(difference), (n, len(difference)))
    low, high = np.percentile(difference[picks].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def compare_models(rows: Sequence[dict], to: str = "CryoChains") -> list[dict]:
    """How much lower the RMSD of one model is than each other's on the same particles, with its 95 % interval."""
    found = []
    for row in rows:
        same = [other for other in rows if other["model"] == to and _cell(other) == _cell(row)]
        if row["model"] != to and same:
            ours, theirs = load_run(same[0])["rmsd"], load_run(row)["rmsd"]
            mean, low, high = paired_difference(theirs, ours)
            cell = {k: row[k] for k in ("molecule", "reference", "snr_db", "engine", "seed")}
            found.append(cell | {"other": row["model"], "gain": mean, "low": low, "high": high})
    return found


def _cell(row: dict) -> tuple:
    return tuple(row[k] for k in (*KEY, "n_test") if k != "model")


def one_seed(rows: Sequence[dict]) -> list[dict]:
    """Of each row of the figure one seed, the same for its models: that of the most models, of those the latest.

    The refinement's settings were chosen on seed 0; later ones were looked at once.
    """
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        cell = tuple(row[k] for k in KEY if k not in ("model", "seed"))
        groups.setdefault(cell, {}).setdefault(row["seed"], []).append(row)
    return [row for seeds in groups.values() for row in max(seeds.items(), key=lambda s: (len(s[1]), s[0]))[1]]


def caption(rows: Sequence[dict]) -> str:
    """Where the numbers come from, in a line."""

    def span(key: str) -> str:
        values = sorted({row[key] for row in rows if row[key] != ""}, key=str)
        return "–".join(str(v) for v in ([values[0], values[-1]] if len(values) > 1 else values))

    return (
        f"synthetic images, {span('scale')} scale: {span('box_size')} px, population from {span('n_train')} particles, "
        f"{span('n_test')} held out, seed {span('seed')}; {span('device')}; {span('date')}; no CTF"
    )


def plot_figure2(rows: Sequence[dict], engine: str = "map") -> Figure:
    """RMSD of the five models at each noise level, a panel a molecule; what was not run is left out.

    Bars: mean over held-out particles, with quartiles. Black marks: the information limit of that model with what its
    modes cannot express. Dotted: the mean conformation.
    """
    wanted = {"figure": 2, "engine": engine, "reference": "reference"}
    rows = one_seed([row for row in rows if all(row[k] == v for k, v in wanted.items())])
    names = [name for name in MOLECULES if any(row["molecule"] == name for row in rows)]
    figure, axes = new_figure(1, len(names), 1.2 + 4.4 * len(names), 4.2)
    for axis, name in zip(axes[0], names, strict=True):
        levels = [snr for snr in SNR_COLORS if any(r["molecule"] == name and r["snr_db"] == snr for r in rows)]
        for number, snr in enumerate(levels):
            for place, model in enumerate(MODELS):
                cell = [r for r in rows if (r["molecule"], r["snr_db"], r["model"]) == (name, snr, model)]
                if not cell:
                    continue
                row, x = cell[0], place + (number - (len(levels) - 1) / 2) * 0.27
                spread = [[max(row["rmsd_mean"] - row["rmsd_q25"], 0)], [max(row["rmsd_q75"] - row["rmsd_mean"], 0)]]
                axis.bar(x, row["rmsd_mean"], 0.25, color=SNR_COLORS[snr], yerr=spread, error_kw={"lw": 0.8},
                         label=f"{snr:g} dB" if model == "CryoChains" else None)  # fmt: skip
                axis.plot([x - 0.12, x + 0.12], [row["limit"]] * 2, color="k", lw=2)
                if row["rmsd_mean"] > TALLEST:
                    axis.text(x, 0.98 * TALLEST, f"{row['rmsd_mean']:.0f} Å", rotation=90, ha="center", va="top",
                              fontsize="x-small", color="w")  # fmt: skip
        still = next(row["mean_conformation_rmsd"] for row in rows if row["molecule"] == name)
        axis.axhline(still, color="0.4", ls=":", label="mean conformation")
        axis.plot([], [], color="k", lw=2, label="limit of the model")
        axis.set_xticks(range(len(MODELS)), MODELS)
        axis.set(title=TITLES[name], ylabel="RMSD (Å), held out")
        axis.set_ylim(top=min(TALLEST, axis.get_ylim()[1]))
        axis.legend(fontsize="small")
    name = "MAP refinement" if engine == "map" else "encoder"
    figure.suptitle(f"{name}\n{caption(rows)}", fontsize="small", wrap=True)
    return figure


def plot_figure3(row: dict, arrays: dict[str, np.ndarray] | None = None) -> Figure:
    """First two components of α and of R|t, chain by chain, and PC1 of R|t against the true place on the path."""
    arrays = load_run(row) if arrays is None else arrays
    chains = sorted({name.split("_")[1] for name in arrays if name.startswith("rigid_") and name.count("_") == 1})
    figure, axes = new_figure(len(chains), 3, 11, 3.4 * len(chains))
    for line, chain in zip(axes, chains, strict=True):
        for axis, kind, label in zip(line, ("modes", "rigid"), ("α", "R|t"), strict=False):
            scores, share = arrays[f"{kind}_{chain}"], 100 * arrays[f"{kind}_{chain}_share"]
            axis.scatter(*scores.T, c=_density(scores), s=6, cmap="viridis")
            path = np.percentile(scores[:, 0], [5, 50, 95])
            axis.plot(path, np.full(3, np.median(scores[:, 1])), "o", mfc="none", color=COLORS[1])
            axis.set(title=f"chain {chain}: {label}", xlabel=f"PC1 (Å, {share[0]:.0f} %)",
                     ylabel=f"PC2 (Å, {share[1]:.0f} %)")  # fmt: skip
        line[2].plot(arrays["place"], arrays[f"rigid_{chain}"][:, 0], ".", color=COLORS[0], alpha=0.5)
        line[2].set(title=f"chain {chain}: PC1 of R|t", xlabel="true place on the morph", ylabel="PC1 (Å)")
    figure.suptitle(
        f"{TITLES[row['molecule']]}, {row['snr_db']:g} dB: |Spearman| {row['spearman']:.2f} (better chain), "
        f"the images allow {row['spearman_limit']:.2f}\n{caption([row])}", fontsize="small",
    )  # fmt: skip
    return figure


def _density(points: np.ndarray) -> np.ndarray:
    """(n,) how many points are near each, by a Gaussian kernel of a tenth of the spread."""
    scaled = (points - points.mean(0)) / (points.std(0) + 1e-9)
    return np.exp(-np.square(scaled[:, None] - scaled[None]).sum(-1) / (2 * 0.3**2)).sum(1)


def plot_figure4(rows: Sequence[dict], structure=None, top: float = 6.0) -> Figure:
    """Distance of every residue between the mean true and the mean predicted conformation; a row a model.

    On the backbone seen from two sides where the `structure` is at hand, along the sequence where it is not; with the
    histogram beside the colour bar's scale. Colours end at `top` Å.
    """
    figure, axes = new_figure(len(rows), 3, 11, 3.4 * len(rows))
    for line, row in zip(axes, rows, strict=True):
        error = load_run(row)["residue_error"]
        if structure is None:
            line[0].plot(error, color=COLORS[0], lw=0.8)
            line[0].set(xlabel="residue, all chains", ylabel="Å", title=row["model"])
            line[1].set_axis_off()
            shown = line[2].scatter([], [], c=[], vmin=0, vmax=top, cmap="viridis")
        else:
            coords = structure.coords - structure.coords.mean(0)
            coords = coords @ np.linalg.svd(coords, full_matrices=False)[2].T
            for axis, side in zip(line[:2], ([0, 1], [0, 2]), strict=True):
                shown = axis.scatter(*coords[:, side].T, c=error, vmin=0, vmax=top, s=5, cmap="viridis")
                axis.set(aspect="equal", title=row["model"], xlabel="Å", ylabel="Å")
        line[2].hist(np.clip(error, 0, top), bins=40, range=(0, top), orientation="horizontal", color="0.5")
        line[2].set(xlabel="residues", ylabel="distance (Å)", title=f"RMS {np.sqrt((error**2).mean()):.2f} Å")
        figure.colorbar(shown, ax=line[2], label="Å")
    first = rows[0]
    figure.suptitle(
        f"{TITLES[first['molecule']]}, {first['snr_db']:g} dB: mean predicted against mean true\n{caption(rows)}",
        fontsize="small",
    )
    return figure


def find_structure(name: str):
    """The reference of a molecule, or None where its files are not at hand."""
    try:
        return MOLECULES[name]().reference
    except FileNotFoundError:
        return None


def main() -> None:
    """Write figure2.png, figure3_<molecule>.png and figure4_<molecule>.png beside the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=KEPT)
    folder = parser.parse_args().folder
    rows = one_seed(load_rows(folder))
    figures = {"figure2": plot_figure2([row for row in rows if row["scale"] == "medium" and row["box_size"] == 64])}
    for row in rows:
        if row["figure"] == 3 and row["engine"] == "map":
            figures[f"figure3_{row['molecule']}"] = plot_figure3(row)
    for name in MOLECULES:
        pair = [
            row for model in ("CryoChains", "N100")
            for row in rows
            if (row["figure"], row["molecule"], row["model"], row["snr_db"]) == (2, name, model, 0)
            and (row["engine"], row["reference"], row["box_size"]) == ("map", "reference", 64)
        ]  # fmt: skip
        if len(pair) == 2:
            figures[f"figure4_{name}"] = plot_figure4(pair, find_structure(name))
    for name, figure in figures.items():
        with atomic_path(folder / f"{name}.png") as part:
            figure.savefig(part, dpi=80)


if __name__ == "__main__":
    main()
