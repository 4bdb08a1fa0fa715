"""The paper's protocol: the numbers of its section 3, its particles, and the results table."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cryochains.inference import passes
from cryochains.molecule import compute_modes

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

import paper_figures  # noqa: E402
import paper_protocol as protocol  # noqa: E402
import reproduce_paper as reproduce  # noqa: E402


@pytest.fixture(scope="module")
def molecule():
    return protocol.load_glua3()


def test_modes_have_the_paper_s_amplitudes(molecule):
    n_atoms = molecule.truth.n_atoms
    dynamics, latents = protocol.figure2_motion(molecule, 4000, seed=0)
    physical = latents.double().numpy() * dynamics.scale
    for layout in dynamics.chains:
        d = physical[:, layout.mode] / np.sqrt(n_atoms / protocol.N_MODES_TRUE)
        assert d.shape[1] == 15
        high = d > 1.25
        assert high.mean() == pytest.approx(0.5, abs=0.02)
        assert d[high].mean() == pytest.approx(2.5, abs=0.02)
        assert d[high].std() == pytest.approx(0.25, abs=0.01)
        assert d[~high].mean() == pytest.approx(0.0, abs=0.02)
        assert d[~high].std() == pytest.approx(0.25, abs=0.01)
        # Neither two modes nor two particles share a draw.
        assert np.abs(np.corrcoef(d.T) - np.eye(15)).max() < 0.08
        turns = np.degrees(np.linalg.norm(physical[:, layout.rotation], axis=1))
        assert 0.9 * 5 * np.sqrt(3) < turns.max() < 1.02 * 5 * np.sqrt(3)


def test_conformations_that_leave_the_box_are_drawn_anew(molecule):
    dynamics, free = protocol.figure2_motion(molecule, 200, seed=0)

    def farthest(latents):
        centre = torch.from_numpy(molecule.truth.origin).float()
        return (dynamics.decode(latents) - centre).norm(dim=-1).amax(1)

    cutoff = float(farthest(free).median())
    _, kept = protocol.figure2_motion(molecule, 200, seed=0, cutoff=cutoff)
    assert farthest(kept).max() <= cutoff
    inside = farthest(free) <= cutoff
    assert torch.equal(kept[inside], free[inside]), "those that fit are the same"


def test_every_model_gets_the_same_particles_and_none_of_the_test_s(molecule):
    first = protocol.simulate(molecule, 2, 20, 32, 0.0, seed=2, progress=False)
    second = protocol.simulate(molecule, 2, 20, 32, 0.0, seed=2, progress=False)
    assert torch.equal(first.read_images(), second.read_images())
    train = protocol.simulate(molecule, 2, 20, 32, 0.0, seed=0, progress=False)
    distance = torch.cdist(train.truth.latents, first.truth.latents)
    assert distance.min() > 0.1
    pixels, others = (stack.read_images().flatten(1) for stack in (train, first))
    assert torch.cdist(pixels, others).min() > 0


def test_models_are_the_paper_s_five(molecule):
    particles = protocol.simulate(molecule, 2, 2, 32, 0.0, seed=0, progress=False)
    sizes = {
        name: protocol.build(name, molecule.reference, particles).n_latents
        for name in protocol.MODELS
    }
    assert sizes == {"N100": 100, "cN50": 100, "cR": 6, "cRT": 12, "CryoChains": 112}


def test_molecule_fills_seventy_percent_of_the_box(molecule):
    states = np.concatenate([molecule.truth.coords, molecule.reference.coords])
    extent = 2 * np.linalg.norm(states - molecule.truth.origin, axis=1).max()
    for box in (48, 64, 128):
        assert extent / (box * protocol.pixel_size(molecule, box)) == pytest.approx(0.7, abs=0.01)


def test_expected_path_coordinate_is_what_the_images_allow(molecule):
    clear = protocol.simulate(molecule, 3, 30, 48, 20.0, seed=0, progress=False)
    dim = protocol.simulate(molecule, 3, 30, 48, -30.0, seed=0, progress=False)
    truth = clear.truth.coordinate.numpy()
    assert np.abs(protocol.expected_path_coordinate(molecule, clear) - truth).max() < 0.05
    blind = protocol.expected_path_coordinate(molecule, dim)
    assert blind.std() < 0.5 * truth.std() and abs(blind.mean() - 0.5) < 0.1


def test_paper_molecules_are_the_paper_s(structures_dir):
    gabab, hsp90 = protocol.load_gabab(), protocol.load_hsp90(springs="anm")
    assert gabab.truth.n_nodes == 657 + 666

    def apart(molecule):
        return np.sqrt(((molecule.truth.coords - molecule.reference.coords) ** 2).sum(1).mean())

    assert apart(gabab) == pytest.approx(7.69, abs=0.01)
    assert "built from 2CG9" in hsp90.note
    assert apart(hsp90) == pytest.approx(11.1, abs=0.2)
    chain = hsp90.reference.chain_index
    coords_a, coords_b = (hsp90.reference.coords[chain == number] for number in (0, 1))
    assert np.linalg.norm(coords_a[:, None] - coords_b, axis=-1).min() > 3.5
    other = protocol.load_molecule("hsp90", "edenm")
    assert apart(other) == pytest.approx(11.1, abs=0.3)
    coords_a, coords_b = (other.reference.coords[chain == number] for number in (0, 1))
    assert np.linalg.norm(coords_a[:, None] - coords_b, axis=-1).min() > 3.5


# The script


def arguments(tmp_path, *more):
    return ["--box-size", "24", "--n-population", "12", "--out", str(tmp_path), *more]


@pytest.mark.parametrize("springs", ["edenm", "anm"])
def test_simulation_and_model_have_the_springs_that_were_asked_for(molecule, springs):
    def modes(structure, n_modes):
        return compute_modes(structure, n_modes, springs=springs).vectors[0]

    dynamics, _ = protocol.figure2_motion(molecule, 2, seed=0, springs=springs)
    np.testing.assert_array_equal(dynamics.modes.vectors[0], modes(molecule.truth, 15))
    particles = protocol.simulate(molecule, 2, 2, 32, 0.0, 0, progress=False, springs=springs)
    model = protocol.build("CryoChains", molecule.reference, particles, springs)
    np.testing.assert_array_equal(model.modes.vectors[0], modes(molecule.reference, 50))


@pytest.fixture
def tiny(monkeypatch):
    scale = reproduce.Scale(12, 6, 6, 12, 24, 1, 0.1)
    monkeypatch.setitem(reproduce.SCALES, "small", scale)


def start(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["reproduce_paper.py", *words])
    reproduce.main()


def test_a_run_writes_one_row_that_adds_up_and_is_not_run_twice(
    tiny, tmp_path, monkeypatch, capsys
):
    words = arguments(tmp_path, "--model", "cR,cRT", "--engine", "all", "--molecule", "glua3")
    start(monkeypatch, *words)
    rows = paper_figures.load_rows(tmp_path)
    assert [(row["model"], row["engine"]) for row in rows] == [
        ("cR", "map"),
        ("cRT", "map"),
        ("cR", "encoder"),
        ("cRT", "encoder"),
    ]
    for row in rows:
        run = paper_figures.load_run(row)
        assert run["rmsd"].mean() == pytest.approx(row["rmsd_mean"], abs=1e-3)
        pooled = np.sqrt((run["rmsd"] ** 2).mean())
        assert pooled == pytest.approx(row["rmsd"], abs=1e-3)
        expected = 1 - (row["rmsd"] / row["mean_conformation_rmsd"]) ** 2
        assert row["explained_motion"] == pytest.approx(expected, abs=0.01)
        assert row["floor"] <= row["limit"]
    capsys.readouterr()
    before = (tmp_path / "table.csv").read_bytes()
    start(monkeypatch, *words)
    assert (tmp_path / "table.csv").read_bytes() == before
    assert capsys.readouterr().out.count("done before") == 4
    assert not list((tmp_path / "work").glob("*"))


def test_a_corrected_reference_is_a_row_of_its_own(tiny, tmp_path, monkeypatch):
    words = arguments(tmp_path, "--model", "cRT", "--engine")
    for reference in ("reference", "corrected"):
        start(monkeypatch, *words, "map", "--reference", reference)
    plain, corrected = paper_figures.load_rows(tmp_path)
    assert (plain["reference"], corrected["reference"]) == ("reference", "corrected")
    assert plain["floor"] != corrected["floor"], "another shape expresses other conformations"
    same = plain["mean_conformation_rmsd"] == corrected["mean_conformation_rmsd"]
    assert same, "of the same particles"
    assert not list((tmp_path / "work").glob("*"))
    with pytest.raises(ValueError, match="try --engine map"):
        start(monkeypatch, *words, "encoder", "--reference", "corrected")


def test_springs_are_part_of_a_row(tiny, tmp_path, monkeypatch):
    words = arguments(tmp_path, "--model", "cRT", "--engine", "map")
    start(monkeypatch, *words)
    start(monkeypatch, *words, "--simulated-springs", "anm", "--model-springs", "anm")
    first, second = paper_figures.load_rows(tmp_path)
    assert (first["simulated_springs"], first["model_springs"]) == ("edenm", "edenm")
    assert (second["simulated_springs"], second["model_springs"]) == ("anm", "anm")
    assert first["mean_conformation_rmsd"] != second["mean_conformation_rmsd"]
    runs = [paper_figures.load_run(row) for row in (first, second)]
    assert not np.array_equal(runs[0]["rmsd"], runs[1]["rmsd"])
    assert paper_figures.same_springs([first, second, second]) == [second, second]


def test_tables_without_springs_are_those_of_the_paper_s(tiny, tmp_path, monkeypatch):
    words = arguments(tmp_path, "--model", "cRT", "--engine", "map")
    paper_s = ["--simulated-springs", "anm", "--model-springs", "anm"]
    start(monkeypatch, *words, *paper_s)
    table = tmp_path / "table.csv"
    rows = reproduce.read_table(table)
    # As version 1 wrote it.
    columns = [name for name in reproduce.COLUMNS if name not in reproduce.SPRINGS_KEY]
    values = [rows[0][name] for name in columns[1:]]
    table.write_text(f"{','.join(columns)}\n1,{','.join(map(quoted, values))}\n")
    assert reproduce.read_table(table) == rows
    assert len(paper_figures.load_run(paper_figures.load_rows(tmp_path)[0])["rmsd"]) == 6
    start(monkeypatch, *words, *paper_s)
    assert len(reproduce.read_table(table)) == 1, "it is not run again"
    start(monkeypatch, *words)
    assert len(reproduce.read_table(table)) == 2


def quoted(text):
    return f'"{text}"' if "," in text else text


def test_a_run_that_was_cut_gives_the_same_numbers(tiny, tmp_path, monkeypatch):
    words = ["--model", "cRT", "--engine", "map"]
    start(monkeypatch, *arguments(tmp_path / "whole", *words))
    save = passes.save_state
    saved = []

    def cut(run, identity, state):
        save(run, identity, state)
        saved.append(len(state.history))
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(passes, "save_state", cut)
    with pytest.raises(KeyboardInterrupt):
        start(monkeypatch, *arguments(tmp_path / "cut", *words))
    assert not (tmp_path / "cut" / "table.csv").exists()
    start(monkeypatch, *arguments(tmp_path / "cut", *words))
    assert saved[:3] == [1, 2, 3], "it went on where it was cut"
    whole, resumed = (paper_figures.load_rows(tmp_path / name)[0] for name in ("whole", "cut"))
    for column in reproduce.COLUMNS[reproduce.COLUMNS.index("rmsd") :]:
        assert whole[column] == resumed[column], column


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--molecule", "6XYZ"], "glua3, gabab, hsp90"),
        (["--model", "N50"], "N100, cN50, cR, cRT, CryoChains"),
        (["--engine", "gpu"], "map, encoder"),
        (["--scale", "huge"], "paper, medium, small"),
    ],
)
def test_unknown_names_list_the_choices(tmp_path, monkeypatch, words, expected):
    with pytest.raises(ValueError, match=f"expected .* of {expected}, got"):
        start(monkeypatch, *arguments(tmp_path, *words))


def test_a_table_of_another_version_is_refused(tmp_path, tiny, monkeypatch):
    (tmp_path / "table.csv").write_text("table_version,model\n0,cRT\n")
    with pytest.raises(ValueError, match="results table of version 2, got another one"):
        start(monkeypatch, *arguments(tmp_path, "--model", "cRT", "--engine", "map"))
    assert (tmp_path / "table.csv").read_text() == "table_version,model\n0,cRT\n"


# Figures


def test_paired_difference_knows_a_gain_from_none():
    rng = np.random.default_rng(0)
    shared = 5 * rng.standard_normal(300)
    mean, low, high = paper_figures.paired_difference(shared + 1, shared)
    assert mean == pytest.approx(1) and low == pytest.approx(1) and high == pytest.approx(1)
    mean, low, high = paper_figures.paired_difference(shared + rng.standard_normal(300), shared)
    assert low < 0 < high


def test_a_figure_shows_models_of_one_seed():
    """The latest seed that as many models as any were run on: never two seeds side by side."""

    def row(model, seed, snr_db=0.0):
        key = dict.fromkeys(reproduce.KEY, "")
        return key | {"model": model, "seed": seed, "snr_db": snr_db}

    full = [row(model, seed) for seed in (0, 1) for model in ("cR", "cRT")]
    begun = [row("cR", 2), row("cR", 3, snr_db=32.0)]
    assert paper_figures.one_seed(full + begun) == [*full[2:], begun[1]]


def test_kept_table_has_a_run_for_every_row_and_its_figures_draw():
    rows = paper_figures.load_rows()
    assert rows
    for row in rows:
        run = paper_figures.load_run(row)
        assert len(run["rmsd"]) == row["n_test"]
        assert run["rmsd"].mean() == pytest.approx(row["rmsd_mean"], abs=1e-3)
        assert "coords" not in run
    assert paper_figures.plot_figure2(rows).axes
    third = [row for row in rows if row["figure"] == 3]
    assert paper_figures.plot_figure3(third[0]).axes
    second = [row for row in rows if row["figure"] == 2][:2]
    assert paper_figures.plot_figure4(second).axes


def test_a_run_of_figure_3_draws(tiny, tmp_path, monkeypatch):
    words = ["--figure", "3", "--model", "cRT", "--engine", "map"]
    start(monkeypatch, *arguments(tmp_path, *words))
    (row,) = paper_figures.load_rows(tmp_path)
    run = paper_figures.load_run(row)
    assert len(run["path_coordinate"]) == len(run["rigid_A"]) == row["n_test"]
    assert 0 <= row["spearman"] <= 1 and 0 <= row["spearman_limit"] <= 1
    assert row["end_reference"] > 0 and row["end_truth"] > 0
    assert paper_figures.plot_figure3(row).axes
