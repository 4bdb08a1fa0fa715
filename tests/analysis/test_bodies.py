"""How far chains bend, and which of them would rather be several bodies."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains import Model, Result, load_structure
from cryochains.analysis import bending_table, suggest_bodies

HALF = 190


@pytest.fixture(scope="module")
def closed():
    return load_structure("glua3-closed")


@pytest.fixture
def cut_at_half(closed, monkeypatch):
    halves = [np.arange(np.sum(closed.node_chain == c)) >= HALF for c in range(2)]
    cut = np.concatenate(halves).astype(int)
    monkeypatch.setattr("cryochains.molecule.structure.cut_chains", lambda *_: cut)


def hinged(closed, degrees):
    """A result of chain A turned at its middle by up to so many degrees, as 60 modes express it."""
    model = Model(closed, modes=60, box_size=32, pixel_size=5.0)
    moving = np.flatnonzero(closed.chain_index == 0)[HALF:]
    latents = []
    for share in (0.0, 0.5, 1.0):
        coords = closed.coords.copy()
        turn = Rotation.from_rotvec([0, 0, np.radians(degrees * share)])
        coords[moving] = turn.apply(coords[moving] - coords[moving[0]]) + coords[moving[0]]
        latents.append(model.dynamics.fit(torch.from_numpy(coords[None]).float()))
    return Result(model, torch.cat(latents))


def test_a_chain_that_turns_at_a_hinge_is_said_to_be_two_bodies(closed, cut_at_half):
    result = hinged(closed, 30.0)
    table = bending_table(result).set_index("chain")
    assert table.loc["A", "bending (Å)"] > 1.5 > table.loc["B", "bending (Å)"]
    assert table.loc["A", "expressed (%)"] > 60
    assert table.loc["A", "bodies"].startswith("A1 2–")
    sentence = suggest_bodies(result)
    assert "chain A bends by" in sentence
    assert "chain B" not in sentence
    assert 'bodies="domains"' in sentence


def test_nothing_is_suggested_where_nothing_bends(closed, cut_at_half):
    assert suggest_bodies(hinged(closed, 0.0)) == ""


def test_a_chain_that_has_no_domains_is_no_reason_for_more_bodies(closed):
    result = hinged(closed, 30.0)
    assert bending_table(result)["expressed (%)"].eq(0).all()
    assert suggest_bodies(result) == ""


def test_particles_that_show_nothing_are_refused(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    result = Result(model, torch.zeros(3, 16), responsibility=torch.zeros(3))
    with pytest.raises(ValueError, match="expected particles that show the molecule, got none"):
        bending_table(result)
