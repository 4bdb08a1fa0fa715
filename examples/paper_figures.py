"""Figures 2 to 4 of the paper, drawn from the table and the runs that reproduce_paper.py wrote."""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from paper_protocol import DEFAULT_SPRINGS, MODELS, MOLECULES, load_molecule
from reproduce_paper import KEY, SPRINGS_KEY, read_table, run_name

from cryochains._files import atomic_path
from cryochains.analysis import CHAIN_COLORS
from cryochains.molecule import Structure
from cryochains.view import plots

# The runs that the project keeps: its table, and per-particle numbers of every row.
KEPT = Path(__file__).resolve().parent.parent / "docs" / "paper"
TITLES = {"glua3": "GluA3", "gabab": "GABA-B", "hsp90": "Hsp90"}
# Å, taller bars are cut, with their height written in them.
TALLEST_BAR = 9.0
SNR_COLORS = {32.0: CHAIN_COLORS[2], 0.0: CHAIN_COLORS[0], -20.0: CHAIN_COLORS[1]}
BAR_SPACING = 0.27
# Of the true coordinate in a run's arrays; the first runs that the project keeps have the second.
COORDINATE_KEYS = ("path_coordinate", "place")


def load_rows(folder: Path = KEPT, **chosen) -> list[dict]:
    """Rows of the table with numbers as numbers, those with ``column=value`` for all `chosen`."""
    rows = []
    for texts in read_table(Path(folder) / "table.csv"):
        row = {name: _number(text) for name, text in texts.items()}
        if all(row[name] == value for name, value in chosen.items()):
            rows.append(row | {"folder": folder})
    return rows


def load_run(row: dict) -> dict[str, np.ndarray]:
    """What the figures need of one row.

    RMSD of every particle, error of every residue, principal components.
    """
    path = Path(row["folder"]) / "runs" / f"{run_name(row)}.npz"
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _number(text: str) -> int | float | str:
    try:
        return int(text) if text.lstrip("-").isdigit() else float(text)
    except ValueError:
        return text


def paired_difference(
    a: np.ndarray, b: np.ndarray, n: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a − b over the same particles, and its 95 % interval by bootstrap over particles."""
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(difference), (n, len(difference)))
    low, high = np.percentile(difference[picks].mean(1), [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


def compare_models(rows: Sequence[dict], to: str = "CryoChains") -> list[dict]:
    """How much lower the RMSD of one model is than each other's, with its 95 % interval.

    On the same particles.
    """
    comparisons = []
    for row in rows:
        same = [other for other in rows if other["model"] == to and _cell(other) == _cell(row)]
        if row["model"] == to or not same:
            continue
        mean, low, high = paired_difference(load_run(row)["rmsd"], load_run(same[0])["rmsd"])
        cell = {k: row[k] for k in ("molecule", "reference", "snr_db", "engine", "seed")}
        gain = {"other": row["model"], "gain": mean, "low": low, "high": high}
        comparisons.append(cell | gain)
    return comparisons


def _cell(row: dict) -> tuple:
    return tuple(row[k] for k in (*KEY, "n_test") if k != "model")


def one_seed(rows: Sequence[dict]) -> list[dict]:
    """Of each row of the figure one seed, the same for its models.

    That of the most models, of those the latest: the refinement's settings were chosen on seed 0;
    later ones were looked at once.
    """
    groups: dict[tuple, dict[int, list[dict]]] = {}
    for row in rows:
        cell = tuple(row[k] for k in KEY if k not in ("model", "seed"))
        groups.setdefault(cell, {}).setdefault(row["seed"], []).append(row)
    chosen = []
    for seeds in groups.values():
        latest = max(seeds, key=lambda seed: (len(seeds[seed]), seed))
        chosen += seeds[latest]
    return chosen


def same_springs(rows: Sequence[dict]) -> list[dict]:
    """Those of the springs, of simulation and model, that most rows have."""

    def springs(row: dict) -> tuple:
        return tuple(row[name] for name in SPRINGS_KEY)

    most = Counter(map(springs, rows)).most_common(1)
    return [row for row in rows if springs(row) == most[0][0]]


def caption(rows: Sequence[dict]) -> str:
    """Where the numbers come from, in a line."""

    def span(key: str) -> str:
        values = sorted({row[key] for row in rows if row[key] != ""}, key=str)
        ends = [values[0], values[-1]] if len(values) > 1 else values
        return "–".join(str(value) for value in ends)

    return (
        f"synthetic images, {span('scale')} scale: {span('box_size')} px, population from "
        f"{span('n_train')} particles, {span('n_test')} held out, seed {span('seed')}; "
        f"springs {span('simulated_springs')}, in the models {span('model_springs')}; "
        f"{span('device')}; {span('date')}; no CTF"
    )


def plot_figure2(rows: Sequence[dict], engine: str = "map") -> Figure:
    """RMSD of the five models at each noise level, a panel a molecule.

    Bars: mean over held-out particles, with quartiles. Black marks: the information limit of that
    model with what its modes cannot express. Dotted: the mean conformation. What was not run is
    left out; so are rows of other springs than most have.
    """
    shown = {"figure": 2, "engine": engine, "reference": "reference"}
    rows = [row for row in rows if all(row[k] == v for k, v in shown.items())]
    rows = one_seed(same_springs(rows))
    names = [name for name in MOLECULES if any(row["molecule"] == name for row in rows)]
    figure, axes = plots.new_figure(1, len(names), 1.2 + 4.4 * len(names), 4.2)
    for axis, name in zip(axes[0], names, strict=True):
        _draw_molecule(axis, [row for row in rows if row["molecule"] == name])
        axis.set(title=TITLES[name], ylabel="RMSD (Å), held out")
    method = "MAP refinement" if engine == "map" else "encoder"
    figure.suptitle(f"{method}\n{caption(rows)}", fontsize="small", wrap=True)
    return figure


def _draw_molecule(axis: Axes, rows: Sequence[dict]) -> None:
    """Bars of one molecule: five models, side by side at each noise level."""
    levels = [snr for snr in SNR_COLORS if any(row["snr_db"] == snr for row in rows)]
    for number, snr in enumerate(levels):
        offset = (number - (len(levels) - 1) / 2) * BAR_SPACING
        for position, model in enumerate(MODELS):
            cell = [row for row in rows if (row["snr_db"], row["model"]) == (snr, model)]
            if cell:
                _draw_bar(axis, cell[0], position + offset)
    axis.axhline(rows[0]["mean_conformation_rmsd"], color="0.4", ls=":", label="mean conformation")
    axis.plot([], [], color="k", lw=2, label="limit of the model")
    axis.set_xticks(range(len(MODELS)), MODELS)
    axis.set_ylim(top=min(TALLEST_BAR, axis.get_ylim()[1]))
    axis.legend(fontsize="small")


def _draw_bar(axis: Axes, row: dict, x: float) -> None:
    """Mean RMSD of one row at `x`, with quartiles and the limit."""
    mean = row["rmsd_mean"]
    spread = [[max(mean - row["rmsd_q25"], 0)], [max(row["rmsd_q75"] - mean, 0)]]
    axis.bar(
        x,
        mean,
        0.25,
        color=SNR_COLORS[row["snr_db"]],
        yerr=spread,
        error_kw={"lw": 0.8},
        label=f"{row['snr_db']:g} dB" if row["model"] == "CryoChains" else None,
    )
    axis.plot([x - 0.12, x + 0.12], [row["limit"]] * 2, color="k", lw=2)
    if mean > TALLEST_BAR:
        axis.text(
            x,
            0.98 * TALLEST_BAR,
            f"{mean:.0f} Å",
            rotation=90,
            ha="center",
            va="top",
            fontsize="x-small",
            color="w",
        )


def plot_figure3(row: dict, arrays: dict[str, np.ndarray] | None = None) -> Figure:
    """First two components of α and of R|t, chain by chain.

    And PC1 of R|t against the true coordinate on the path.
    """
    arrays = load_run(row) if arrays is None else arrays
    truth = next(arrays[key] for key in COORDINATE_KEYS if key in arrays)
    chains = _chains_of(arrays)
    figure, axes = plots.new_figure(len(chains), 3, 11, 3.4 * len(chains))
    for line, chain in zip(axes, chains, strict=True):
        for axis, kind, label in zip(line, ("modes", "rigid"), ("α", "R|t"), strict=False):
            if f"{kind}_{chain}" not in arrays:  # cRT has no α
                axis.set_axis_off()
                continue
            _draw_components(axis, arrays, f"{kind}_{chain}")
            axis.set_title(f"chain {chain}: {label}")
        first = arrays[f"rigid_{chain}"][:, 0]
        line[2].plot(truth, first, ".", color=CHAIN_COLORS[0], alpha=0.5)
        line[2].set(
            title=f"chain {chain}: PC1 of R|t",
            xlabel="true coordinate on the morph",
            ylabel="PC1 (Å)",
        )
    figure.suptitle(
        f"{TITLES[row['molecule']]}, {row['snr_db']:g} dB: |Spearman| {row['spearman']:.2f} "
        f"(better chain), the images allow {row['spearman_limit']:.2f}\n{caption([row])}",
        fontsize="small",
    )
    return figure


def _chains_of(arrays: dict[str, np.ndarray]) -> list[str]:
    """Chains whose rigid motion is among the arrays of a run, such as "rigid_A"."""
    names = [name.split("_") for name in arrays]
    return sorted(parts[1] for parts in names if parts[0] == "rigid" and len(parts) == 2)


def _draw_components(axis: Axes, arrays: dict[str, np.ndarray], name: str) -> None:
    """Two components with their density, and three conformations along the first."""
    scores = arrays[name]
    share = 100 * arrays[f"{name}_share"]
    axis.scatter(*scores.T, c=_density(scores), s=6, cmap="viridis")
    path = np.percentile(scores[:, 0], [5, 50, 95])
    middle = np.full(3, np.median(scores[:, 1]))
    axis.plot(path, middle, "o", mfc="none", color=CHAIN_COLORS[1])
    axis.set(xlabel=f"PC1 (Å, {share[0]:.0f} %)", ylabel=f"PC2 (Å, {share[1]:.0f} %)")


def _density(points: np.ndarray) -> np.ndarray:
    """(n,) how many points are near each, by a Gaussian kernel of a third of the spread."""
    scaled = (points - points.mean(0)) / (points.std(0) + 1e-9)
    squares = np.square(scaled[:, None] - scaled[None]).sum(-1)
    return np.exp(-squares / (2 * 0.3**2)).sum(1)


def plot_figure4(
    rows: Sequence[dict], structure: Structure | None = None, top: float = 6.0
) -> Figure:
    """Distance of every residue between the mean true and the mean predicted conformation.

    A row a model. On the backbone seen from two sides where the `structure` is at hand, along the
    sequence where it is not; with the histogram beside the colour bar's scale. Colours end at `top`
    Å.
    """
    figure, axes = plots.new_figure(len(rows), 3, 11, 3.4 * len(rows))
    for line, row in zip(axes, rows, strict=True):
        error = load_run(row)["residue_error"]
        if structure is None:
            line[0].plot(error, color=CHAIN_COLORS[0], lw=0.8)
            line[0].set(xlabel="residue, all chains", ylabel="Å", title=row["model"])
            line[1].set_axis_off()
            colored = line[2].scatter([], [], c=[], vmin=0, vmax=top, cmap="viridis")
        else:
            coords = structure.coords - structure.coords.mean(0)
            coords = coords @ np.linalg.svd(coords, full_matrices=False)[2].T
            for axis, side in zip(line[:2], ([0, 1], [0, 2]), strict=True):
                colored = axis.scatter(
                    *coords[:, side].T, c=error, vmin=0, vmax=top, s=5, cmap="viridis"
                )
                axis.set(aspect="equal", title=row["model"], xlabel="Å", ylabel="Å")
        clipped = np.clip(error, 0, top)
        line[2].hist(clipped, bins=40, range=(0, top), orientation="horizontal", color="0.5")
        rms = np.sqrt((error**2).mean())
        line[2].set(xlabel="residues", ylabel="distance (Å)", title=f"RMS {rms:.2f} Å")
        figure.colorbar(colored, ax=line[2], label="Å")
    molecule = TITLES[rows[0]["molecule"]]
    figure.suptitle(
        f"{molecule}, {rows[0]['snr_db']:g} dB: mean predicted against mean true\n{caption(rows)}",
        fontsize="small",
    )
    return figure


def find_structure(name: str, springs: str = DEFAULT_SPRINGS) -> Structure | None:
    """The reference of a molecule, or None where its files are not at hand.

    `springs` are those of the simulation, which a state that has to be built is bent by.
    """
    try:
        return load_molecule(name, springs).reference
    except FileNotFoundError:
        return None


def main() -> None:
    """Write figure2.png, figure3_<molecule>.png and figure4_<molecule>.png beside the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=KEPT)
    folder = parser.parse_args().folder
    for name, figure in draw_figures(one_seed(load_rows(folder))).items():
        with atomic_path(folder / f"{name}.png") as part:
            figure.savefig(part, dpi=80)


def draw_figures(rows: Sequence[dict]) -> dict[str, Figure]:
    """All figures that the `rows` suffice for, by the name of their file."""
    second = [row for row in rows if row["scale"] == "medium" and row["box_size"] == 64]
    figures = {"figure2": plot_figure2(second)}
    for row in rows:
        if row["figure"] == 3 and row["engine"] == "map":
            figures[f"figure3_{row['molecule']}"] = plot_figure3(row)
    shown = {"figure": 2, "snr_db": 0, "engine": "map", "reference": "reference", "box_size": 64}
    fourth = same_springs([row for row in rows if all(row[k] == v for k, v in shown.items())])
    for name in MOLECULES:
        pair = []
        for model in ("CryoChains", "N100"):
            pair += [row for row in fourth if (row["molecule"], row["model"]) == (name, model)]
        if len(pair) == 2:
            figures[f"figure4_{name}"] = plot_figure4(
                pair, find_structure(name, pair[0]["simulated_springs"])
            )
    return figures


if __name__ == "__main__":
    main()
