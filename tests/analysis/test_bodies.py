"""How far chains bend, and which of them would rather be several bodies."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from cryochains import Model, Result, load_structure
from cryochains.analysis import bending_table
from cryochains.inference.verdict import judge
from cryochains.model import Population

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


def bending_finding(result):
    record = {"blur": 0.0, "step": 0.01, "support": 100.0, "fading": 0.0, "contrast": 1.0}
    p = result.model.n_latents
    known = Population(torch.zeros(p), torch.eye(p), 1.0, 1.0, result.model.fingerprint)
    verdict = judge(result.model, known, [record, record], result.latents, 0.0)
    return next(part for part in verdict.findings if part.name == "bending")


def test_a_chain_that_turns_at_a_hinge_is_said_to_be_two_bodies(closed, cut_at_half):
    result = hinged(closed, 30.0)
    table = bending_table(result).set_index("chain")
    assert table.loc["A", "bending (Å)"] > 1.5 > table.loc["B", "bending (Å)"]
    assert table.loc["A", "expressed (%)"] > 60
    assert table.loc["A", "bodies"].startswith("A1 2–")
    finding = bending_finding(result)
    # A suggestion, and nothing that speaks against the run.
    assert finding.grade == "good"
    assert finding.sentence == f"chain A bends by {table.loc['A', 'bending (Å)']:.1f} Å"
    assert "chain A bends by" in finding.remedy and "A2" in finding.remedy
    assert "chain B" not in finding.remedy
    assert "bodies='domains'" in finding.remedy


def test_nothing_is_suggested_where_nothing_bends(closed, cut_at_half):
    finding = bending_finding(hinged(closed, 0.0))
    assert finding.remedy == ""
    assert finding.value < 0.1


def test_a_chain_that_has_no_domains_is_no_reason_for_more_bodies(closed):
    result = hinged(closed, 30.0)
    assert bending_table(result)["expressed (%)"].eq(0).all()
    assert bending_finding(result).remedy == ""


def test_a_molecule_in_pieces_has_a_size_of_bending_and_no_suggestion(closed, monkeypatch):
    def in_pieces(*_):
        raise ValueError("a network in pieces")

    result = hinged(closed, 30.0)
    monkeypatch.setattr("cryochains.molecule.structure.cut_chains", in_pieces)
    finding = bending_finding(result)
    assert finding.value > 1.5 and finding.remedy == ""
    with pytest.raises(ValueError, match="expected a molecule in one piece"):
        bending_table(result)


def test_particles_that_show_nothing_are_refused(closed):
    model = Model(closed, modes=2, box_size=32, pixel_size=5.0)
    result = Result(model, torch.zeros(3, 16), responsibility=torch.zeros(3))
    with pytest.raises(ValueError, match="expected particles that show the molecule, got none"):
        bending_table(result)
