"""Motions built with a known axis, angle, shift and hinge are found again, in correct words."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from cryochains.molecule import (
    change_sentence,
    compute_modes,
    describe_change,
    load_structure,
    screw_motion,
)

AXIS = np.array([2.0, -1.0, 2.0]) / 3
POINT = np.array([30.0, -10.0, 5.0])


def turn(coords, angle, shift, axis=AXIS, point=POINT):
    rotation = Rotation.from_rotvec(np.radians(angle) * axis).as_matrix()
    return (coords - point) @ rotation.T + point + shift * axis


def between(a, b) -> float:
    """Angle between two directions in degrees."""
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(a, b)), np.dot(a, b))))


def to_line(point, axis=AXIS, through=POINT) -> float:
    return float(np.linalg.norm(np.cross(np.asarray(point) - through, axis)))


@pytest.fixture(scope="module")
def chain(closed) -> np.ndarray:
    return closed.node_coords[closed.node_chain == 1]


@pytest.fixture(scope="module")
def moved_b(closed):
    """A change in which chain B alone makes a known screw motion."""

    def change(angle, shift, **axis):
        return np.where(
            (closed.chain_index == 1)[:, None],
            turn(closed.coords, angle, shift, **axis),
            closed.coords,
        )

    return change


# Two sets of coordinates


@pytest.mark.parametrize("angle", [0.1, 1.0, 12.0, 90.0, 179.9])
@pytest.mark.parametrize("shift", [-7.0, 0.0, 4.0])
def test_known_screw_is_recovered(chain, angle, shift):
    screw = screw_motion(chain, turn(chain, angle, shift))
    assert screw.angle == pytest.approx(angle, abs=1e-4)
    assert screw.shift == pytest.approx(shift, abs=1e-4)
    assert between(screw.axis, AXIS) < 1e-3
    assert np.linalg.norm(screw.axis) == pytest.approx(1)
    assert to_line(screw.point) < 0.01
    assert (screw.point - chain.mean(0)) @ AXIS == pytest.approx(0, abs=0.01), (
        "of the axis the nearest to the centre"
    )
    assert screw.pitch == pytest.approx(360 * shift / angle, abs=0.5)
    assert screw.rigid == pytest.approx(1) and screw.bending < 1e-4
    assert screw.moved == pytest.approx(
        np.sqrt(((turn(chain, angle, shift) - chain) ** 2).sum(1).mean())
    )


@pytest.mark.parametrize("angle, shift", [(4.0, 1.0), (12.0, 4.0), (20.0, -5.0), (120.0, 8.0)])
def test_known_screw_is_recovered_from_noisy_atoms(chain, angle, shift):
    rng = np.random.default_rng(0)
    for _ in range(20):
        before, after = (
            x + rng.normal(0, 0.3, x.shape) for x in (chain, turn(chain, angle, shift))
        )
        screw = screw_motion(before, after)
        assert abs(screw.angle - angle) < 0.5
        assert abs(screw.shift - shift) < 0.3
        # Noise that tilts the chain by 0.15° tilts the axis of a turn by 0.15° over the turn.
        assert between(screw.axis, AXIS) < max(1, 16 / angle)
        assert screw.bending == pytest.approx(0.3 * np.sqrt(6), rel=0.1)


def test_half_turn(chain):
    screw = screw_motion(chain, turn(chain, 180, 3))
    assert screw.angle == pytest.approx(180) and abs(screw.shift) == pytest.approx(3)
    assert (
        min(between(screw.axis, AXIS), between(-screw.axis, AXIS)) < 1e-3
        and to_line(screw.point) < 0.01
    )


@pytest.mark.parametrize("noise", [0, 0.3])
def test_pure_shift_has_no_made_up_axis(chain, noise):
    after = chain + 5 * AXIS + np.random.default_rng(1).normal(0, noise, chain.shape)
    screw = screw_motion(chain, after)
    assert (
        screw.angle == 0
        and screw.shift == pytest.approx(5, abs=0.1)
        and between(screw.axis, AXIS) < 1
    )
    assert screw.pitch == np.inf and screw.rigid == pytest.approx(
        25 / (25 + 3 * noise**2), abs=0.01
    )


def test_nothing_moves(chain):
    screw = screw_motion(chain, chain)
    assert screw.angle == screw.shift == screw.moved == 0 and screw.bending < 1e-6
    assert np.isnan(screw.pitch) and np.isnan(screw.rigid) and np.isnan(screw.axis).all()


def test_few_and_collinear_atoms():
    one = np.array([[1.0, 2.0, 3.0]])
    assert screw_motion(one, one + 2 * AXIS).shift == pytest.approx(2)
    assert screw_motion(one, one + 2 * AXIS).angle == 0
    line = np.linspace(-10, 10, 5)[:, None] * [0, 0, 1.0]
    # About the line itself nothing can be seen: of all turns that fit, the least is taken.
    tilted = screw_motion(line, turn(line, 30, 0, axis=np.array([1.0, 0, 0]), point=np.zeros(3)))
    assert tilted.angle == pytest.approx(30, abs=1e-3) and between(tilted.axis, [1, 0, 0]) < 1e-3
    assert screw_motion(line, line + [1.0, 0, 0]).angle == 0


def test_bending_is_no_rigid_motion(closed, chain):
    modes = compute_modes(closed, 3)
    bent = chain + 20 * modes.vectors[1][0]
    screw = screw_motion(chain, bent)
    assert screw.bending == pytest.approx(20 / np.sqrt(len(chain)), rel=0.05) and screw.rigid < 0.05
    both = screw_motion(chain, turn(bent, 30, 2))
    assert both.bending == pytest.approx(screw.bending, abs=1e-6) and 0.9 < both.rigid < 1


def test_bad_coordinates(chain):
    for wrong in (chain[:5], chain[0], chain[:, :2]):
        with pytest.raises(
            ValueError,
            match=r"expected two conformations \(n, 3\) of the same atoms, got \(362, 3\)",
        ):
            screw_motion(chain, wrong)
    with pytest.raises(ValueError, match="of the same atoms"):
        screw_motion(chain[:0], chain[:0])
    with pytest.raises(
        ValueError, match="expected (finite coordinates|.* to be an array of finite numbers)"
    ):
        screw_motion(chain, np.where(chain > 100, np.nan, chain))


# Chain pairs


def test_chain_seen_from_the_other(closed, moved_b):
    table = describe_change(closed, closed.coords, moved_b(12, 4))
    assert table["chain"].tolist() == ["B", "A"] and table["seen from"].tolist() == ["A", "B"]
    row = table.iloc[0]
    assert row["angle (°)"] == pytest.approx(12, abs=1e-3) and row["shift (Å)"] == pytest.approx(
        4, abs=1e-3
    )
    assert row["pitch (Å/turn)"] == pytest.approx(120, abs=0.1)
    assert between(row["axis"], AXIS) < 0.02 and to_line(row["point (Å)"]) < 0.05
    assert row["rigid (%)"] == pytest.approx(100) and row["hinges"] == ""
    # A seen from B does the inverse: as far, about the same axis, the other way.
    other = table.iloc[1]
    assert other["angle (°)"] == pytest.approx(12, abs=1e-3) and other[
        "shift (Å)"
    ] == pytest.approx(4, abs=1e-3)
    assert between(other["axis"], -AXIS) < 0.02 and to_line(other["point (Å)"]) < 0.05


def test_common_motion_of_everything_changes_nothing(closed, moved_b):
    after = moved_b(12, 4)
    axis = np.array([0.0, 0.6, 0.8])
    table = describe_change(closed, closed.coords, after).set_index("chain")
    numbers = ["angle (°)", "shift (Å)", "moved (Å)", "rigid (%)"]
    carried = describe_change(
        closed, closed.coords, turn(after, 77, 30, axis, np.zeros(3))
    ).set_index("chain")
    np.testing.assert_allclose(
        carried.loc[["A", "B"], numbers], table.loc[["A", "B"], numbers], atol=1e-6
    )
    both = [turn(x, 77, 30, axis, np.zeros(3)) for x in (closed.coords, after)]
    carried = describe_change(closed, *both).set_index("chain")
    np.testing.assert_allclose(
        carried.loc[["A", "B"], numbers], table.loc[["A", "B"], numbers], atol=1e-6
    )
    expected = Rotation.from_rotvec(np.radians(77) * axis).apply(AXIS)
    assert between(carried.loc["B", "axis"], expected) < 0.02


def test_nodes_imaging_atoms_and_all_atoms_tell_the_same(closed, moved_b):
    heavy = load_structure(closed.atoms, atoms="heavy")
    everything = [closed.atoms.getCoords(), turn(closed.atoms.getCoords(), 12, 4)]
    everything[1][closed.atom_chain == 0] = everything[0][closed.atom_chain == 0]
    expected = describe_change(closed, closed.coords, moved_b(12, 4))
    for structure, coords in (
        (closed, everything),
        (heavy, [x[heavy.rows] for x in everything]),
        (heavy, [x[heavy.node_rows] for x in everything]),
    ):
        assert describe_change(structure, *coords)["moved (Å)"].tolist() == pytest.approx(
            expected["moved (Å)"].tolist()
        )


def test_wrong_number_of_atoms(closed):
    with pytest.raises(
        ValueError,
        match=r"expected coordinates \(731, 3\) or \(\d+, 3\) of Structure.*got \(730, 3\)",
    ):
        describe_change(closed, closed.coords, closed.coords[1:])
    with pytest.raises(
        ValueError, match="expected (finite coordinates|.* to be an array of finite numbers)"
    ):
        describe_change(closed, closed.coords, np.full_like(closed.coords, np.nan))


def test_glua3_against_another_superposition(pair):
    closed, opened = pair
    angle = describe_change(closed, closed.coords, opened.coords)["angle (°)"]
    turns = []
    for chain in (0, 1):
        x, y = (s.node_coords[closed.node_chain == chain] for s in (closed, opened))
        turns.append(Rotation.align_vectors(y - y.mean(0), x - x.mean(0))[0])
    expected = np.degrees((turns[0].inv() * turns[1]).magnitude())
    assert 15 < expected < 25
    assert angle.tolist() == pytest.approx([expected] * 2, abs=1e-3)


@pytest.mark.parametrize("residue", [60, 150, 240])
@pytest.mark.parametrize("noise", [0, 0.2])
def test_hinge_is_found_where_it_was_built(closed, residue, noise):
    first = np.flatnonzero((closed.resnums >= residue) & (closed.chain_index == 1))[0]
    after = closed.coords.copy()
    beyond = (np.arange(len(after)) > first) & (closed.chain_index == 1)
    after[beyond] = turn(after[beyond], 25, 0, point=after[first])
    after += np.random.default_rng(0).normal(0, noise, after.shape)
    table = describe_change(closed, closed.coords, after).set_index("chain")
    start, end = map(int, table.loc["B", "hinges"].split("–"))
    assert start <= residue + 1 and end >= residue - 1 and end - start < 10
    assert table.loc["A", "hinges"] == "", "noise alone is no hinge"
    assert table.loc["B", "bending (Å)"] > 1 and table.loc["B", "rigid (%)"] < 99


def test_chain_alone_only_bends(closed):
    alone = load_structure(closed.atoms, chains="B")
    mode = compute_modes(alone, 2).vectors[0][0]
    # 2 Å RMS to either side.
    swing = 2 * np.sqrt(alone.n_nodes) * mode
    table = describe_change(alone, alone.coords - swing, alone.coords + swing)
    row = table.iloc[0]
    assert len(table) == 1 and row["chain"] == row["seen from"] == "B"
    assert row["angle (°)"] == row["shift (Å)"] == 0 and row["rigid (%)"] == pytest.approx(
        0, abs=1e-6
    )
    assert row["bending (Å)"] == pytest.approx(row["moved (Å)"]) == pytest.approx(4, rel=0.05)
    # Where a lone chain stands is a pose.
    turned = describe_change(alone, alone.coords, turn(alone.coords, 40, 9)).iloc[0]
    assert turned["moved (Å)"] < 1e-4 and turned["angle (°)"] == 0
    assert (
        change_sentence(describe_change(alone, alone.coords, turn(alone.coords, 40, 9)))
        == "the molecule hardly bends."
    )
    assert change_sentence(table).startswith("the molecule bends by 4.")


def test_one_body_of_two_chains_is_taken_by_chains(closed, moved_b):
    whole = describe_change(closed.as_one_body(), closed.coords, moved_b(12, 4))
    assert whole.equals(describe_change(closed, closed.coords, moved_b(12, 4)))


def test_the_chain_that_travels_comes_first(closed, moved_b):
    back = describe_change(closed, moved_b(12, 4), closed.coords)
    assert back["chain"].tolist() == ["B", "A"]
    only_a = np.where((closed.chain_index == 0)[:, None], turn(closed.coords, 12, 4), closed.coords)
    assert describe_change(closed, closed.coords, only_a)["chain"].tolist() == ["A", "B"]


def test_many_chains(closed):
    bodies = {
        name: f"chain {c} and resnum {span}"
        for name, c, span in (
            ("P", "A", "1 to 120"),
            ("Q", "A", "121 to 380"),
            ("R", "B", "1 to 120"),
            ("S", "B", "121 to 380"),
        )
    }
    structure = load_structure(closed.atoms, bodies=bodies)
    after = structure.coords.copy()
    after[structure.chain_index == 2] = turn(after[structure.chain_index == 2], 20, 0)
    table = describe_change(structure, structure.coords, after)
    assert len(table) == 12 and not table.duplicated(["chain", "seen from"]).any()
    assert table["chain"][:6:2].tolist() == ["R"] * 3, "pairs that move come first"
    assert (table["moved (Å)"][6:] < 1e-6).all()
    words = change_sentence(table)
    assert words.startswith("chain R turns 20° about an axis ") and words.count("turns") == 1
    # The next chain is named where it moves at least half as much.
    for shift, named in ((3.0, False), (15.0, True)):
        after = (
            structure.coords
            + np.array([[0, 0, 0], [shift, 0, 0], [0, 20, 0], [0, 0, 0]])[structure.chain_index]
        )
        words = change_sentence(describe_change(structure, structure.coords, after))
        assert words.startswith("chain R shifts ")
        assert (f". Chain Q shifts {shift} Å relative to chain " in words) == named


# Words


def sentence(closed, after) -> str:
    return change_sentence(describe_change(closed, closed.coords, after))


def test_words_say_what_was_built(closed, moved_b):
    near = closed.coords[(closed.chain_index == 0) & (closed.resnums == 210)][0]
    words = sentence(closed, moved_b(12, 4.1, point=near))
    assert words.startswith("chain B turns 12° about an axis near residue ")
    assert words.endswith(
        " and shifts 4.1 Å along it, relative to chain A; 100 % of its motion is rigid."
    )
    words = sentence(closed, moved_b(5.5, -4.1))
    assert "turns 5.5° about" in words and "shifts 4.1 Å along it" in words, (
        "a shift against the axis is a shift"
    )
    assert "shifts" not in sentence(closed, moved_b(12, 0))
    assert (
        sentence(closed, moved_b(0, 4))
        == "chain B shifts 4.0 Å relative to chain A; 100 % of its motion is rigid."
    )
    for still in (moved_b(0, 0), moved_b(0, 0.1)):
        assert sentence(closed, still) == "the chains hardly move relative to each other."


def test_words_name_a_residue_only_where_the_axis_runs_by(closed, moved_b):
    row = closed.node_coords[(closed.node_chain == 0) & (closed.resnums == 210)][0]
    # Of all directions through residue 210 of A, one that leaves the rest behind.
    away = row - closed.node_coords.mean(0)
    axis = np.cross(away, [0.3, 0.5, 0.8])
    axis /= np.linalg.norm(axis)
    found = describe_change(closed, closed.coords, moved_b(12, 0, axis=axis, point=row)).iloc[0]
    residue = int(found["axis runs"].split()[2])
    chain = 0 if "of chain A" in found["axis runs"] else 1
    named = closed.node_coords[(closed.node_chain == chain) & (closed.resnums == residue)][0]
    nearest = min(to_line(x, axis, row) for x in closed.node_coords)
    assert to_line(named, axis, row) == pytest.approx(nearest, abs=0.05)
    far = describe_change(
        closed, closed.coords, moved_b(3, 0, point=np.array([0, 400.0, 400]))
    ).iloc[0]
    distance = to_line(closed.centers[1], through=np.array([0, 400.0, 400]))
    assert far["axis runs"] == f"{distance:.0f} Å from its centre"


def test_a_chain_too_short_for_hinges(closed):
    bodies = {"peptide": "chain A and resnum 20 to 24", "rest": "chain B"}
    structure = load_structure(closed.atoms, bodies=bodies)
    after = structure.coords + 4.0 * (structure.chain_index == 0)[:, None]
    table = describe_change(structure, structure.coords, after)
    assert table["hinges"].tolist() == ["", ""]
    assert change_sentence(table).startswith("chain peptide shifts 6.9 Å relative to chain rest")
