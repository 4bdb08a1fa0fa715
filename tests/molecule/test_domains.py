"""Domains: found where a made-up chain has a hinge, and nowhere in one lump."""

import numpy as np
import pytest

from cryochains import compute_modes, load_structure
from cryochains.molecule.domains import cut_chains


def lump(n, seed=0):
    """(n, 3) nodes of a compact globule, each 3.8 Å from the one before."""
    rng = np.random.default_rng(seed)
    coords = [np.zeros(3)]
    radius = 2.2 * n ** (1 / 3)
    while len(coords) < n:
        steps = rng.standard_normal((200, 3))
        tries = coords[-1] + 3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True)
        inside = tries[np.linalg.norm(tries, axis=1) < radius]
        distance = np.linalg.norm(inside[:, None] - np.array(coords), axis=-1).min(1)
        coords.append(inside[distance.argmax()])
    return np.array(coords)


def dumb_bell(first, second, gap=16.0):
    """Two lumps, joined where the chain leaves the one and enters the other."""
    a, b = lump(first, 1), lump(second, 2)
    reach = a[:, 0].max() - b[:, 0].min() + gap
    linker = np.linspace([a[:, 0].max(), 0, 0], [a[:, 0].max() + gap, 0, 0], 5)[1:-1]
    return np.concatenate([a, linker, b + [reach, 0, 0]])


@pytest.mark.parametrize(("first", "second"), [(80, 80), (60, 120)])
def test_a_chain_is_cut_at_its_linker(first, second):
    coords = dumb_bell(first, second)
    domain = cut_chains(coords, np.zeros(len(coords), dtype=int))
    assert set(domain.tolist()) == {0, 1}
    edge = int(np.argmax(domain == 1))
    assert first - 3 <= edge <= first + 6
    assert (np.diff(domain) >= 0).all(), "contiguous"


def test_one_lump_and_short_chains_stay_whole():
    coords = lump(120)
    assert not cut_chains(coords, np.zeros(120, dtype=int)).any()
    # Parts would be shorter than 30 residues.
    short = dumb_bell(28, 28)
    assert not cut_chains(short, np.zeros(len(short), dtype=int)).any()


def test_chains_of_one_domain_are_as_they_were():
    whole = load_structure("glua3-closed")
    assert load_structure("glua3-closed", bodies="domains").content_hash == whole.content_hash


def test_domains_are_named_shown_and_keep_their_atoms(monkeypatch):
    whole = load_structure("glua3-closed")
    at_half = np.concatenate(
        [np.arange(np.sum(whole.node_chain == c)) > 150 for c in range(whole.n_chains)]
    ).astype(int)
    monkeypatch.setattr("cryochains.molecule.structure.cut_chains", lambda *_: at_half)
    cut = whole.as_domains()
    assert cut.chain_ids == ("A1", "A2", "B1", "B2")
    assert "bodies A1 (A 2–" in repr(cut)
    np.testing.assert_array_equal(cut.coords, whole.coords)
    np.testing.assert_array_equal(cut.weights, whole.weights)
    # Every atom stays with its residue, and each body with its own atoms.
    assert (np.diff(cut.atom_chain) >= 0).all()
    np.testing.assert_array_equal(cut.node_chain[cut.atom_node], cut.atom_chain)
    moved = cut.atoms.getResnums() != cut.atoms.getResnums()[cut.node_rows[cut.atom_node]]
    kept = whole.atoms.getResnums() != whole.atoms.getResnums()[whole.node_rows[whole.atom_node]]
    assert moved.sum() == kept.sum()
    assert compute_modes(cut, 2).n_modes == (2, 2, 2, 2)


def test_bodies_that_are_neither_are_refused():
    with pytest.raises(ValueError, match="expected bodies 'chains', 'domains' or selections"):
        load_structure("glua3-closed", bodies="helices")
