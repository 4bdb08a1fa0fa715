"""Components whose motion was built are said in correct words."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains.analysis import compute_pca, describe_motion, motion_sentence
from cryochains.inference import Result
from cryochains.model import Model
from cryochains.molecule import change_sentence, load_structure

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


def test_chain_alone_only_bends(closed):
    alone = load_structure(closed.atoms, chains="B")
    model = Model(alone, modes=2, rotation=False, translation=False, box_size=32, pixel_size=5.0)
    result = Result(model, torch.tensor([[-2.0, 0], [2, 0], [0, 0.1]]))
    table = describe_motion(compute_pca(result), percentiles=(0, 100))
    row = table.iloc[0]
    assert len(table) == 1 and row["chain"] == row["seen from"] == "B"
    assert row["angle (°)"] == row["shift (Å)"] == 0
    assert row["rigid (%)"] == pytest.approx(0, abs=1e-6)
    assert row["bending (Å)"] == pytest.approx(row["moved (Å)"]) == pytest.approx(4, rel=0.05)
    assert change_sentence(table).startswith("the molecule bends by 4.")


def test_component_that_turns_b_about_a_known_axis(closed):
    model = Model(closed, modes=None, box_size=32, pixel_size=5.0)
    rng = np.random.default_rng(0)
    angles = rng.uniform(-8, 8, 40)
    latents = torch.zeros(40, model.n_latents)
    for number, angle in enumerate(angles):
        goal = turn(closed.coords, angle, 0.25 * angle)
        goal[closed.chain_index == 0] = closed.coords[closed.chain_index == 0]
        latents[number] = model.dynamics.fit(torch.from_numpy(goal)[None])[0]
    # Chain A stays where it is, so that the axis is where it was built.
    motions = compute_pca(Result(model, latents), frame="A")
    row = describe_motion(motions, percentiles=(10, 90)).iloc[0]
    expected = np.diff(np.percentile(angles, (10, 90)))[0]
    assert row["chain"] == "B" and row["seen from"] == "A"
    # A component is straight in the latents and the path is not: hence not exact.
    assert row["angle (°)"] == pytest.approx(expected, abs=0.3)
    assert abs(row["shift (Å)"]) == pytest.approx(0.25 * expected, abs=0.1)
    assert min(between(row["axis"], AXIS), between(row["axis"], -AXIS)) < 1
    assert to_line(row["point (Å)"]) < 1
    assert row["rigid (%)"] > 99.99
    # Other frames see the same turn, but for what is not straight.
    for frame in ("poses", "molecule"):
        other = describe_motion(
            compute_pca(Result(model, latents), frame=frame), percentiles=(10, 90)
        )
        assert other.iloc[0]["angle (°)"] == pytest.approx(expected, abs=0.3)
    with pytest.raises(ValueError, match="expected a component from 0 to 4, got 9"):
        describe_motion(motions, 9)


def test_words_of_bending(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    latents = torch.zeros(20, model.n_latents)
    latents[:, model.dynamics.chains[1].mode.start] = torch.linspace(-2, 2, 20)
    words = motion_sentence(compute_pca(Result(model, latents)), percentiles=(0, 100))
    start = "PC1: chain B hardly moves as a whole relative to chain A. Chain B bends by 4."
    assert words.startswith(start)
    assert "chain A bends" not in words and "rigid" not in words
    still = motion_sentence(compute_pca(Result(model, 1e-3 * latents)))
    assert still == "PC1: the chains hardly move relative to each other."
