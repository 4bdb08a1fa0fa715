"""Which body of one structure is which of another, and which of their residues are the same."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np

from .residues import one_letter_codes
from .structure import Structure
from .superposition import rigid_fit

# Residue numbers are trusted where this share of the residues with a common number agree in type.
_TRUSTED_NUMBERS = 0.9
# Least identity of an alignment: below it the chains are different proteins.
_LEAST_IDENTITY = 0.4
# Bodies are of one sequence where their identity is this high, or this share of the best there is.
_SAME_SEQUENCE = 0.9
# Another pairing of copies replaces the listed one where its RMSD is below this share of the
# other's, and the difference is more than the rounding of coordinates (Å).
_CLEARLY_BETTER = 0.99
# The same where the listed one is by names that agree: a large motion must not look like a swap.
_OVERRULES_NAMES = 0.5
_COORDINATE_ROUNDING = 1e-3
# Residues that stand for a pair of bodies while pairings are searched.
_SAMPLED_RESIDUES = 16
# Superpositions that are tried: one for every pair of 24 bodies.
_MOST_SUPERPOSITIONS = 576
# Å², more than any real distance: the cost of pairing bodies of different sequences.
_FORBIDDEN_COST = 1e12


@dataclass(frozen=True, eq=False)
class _CommonResidues:
    """Residues that two bodies share.

    Attributes
    ----------
    nodes_a, nodes_b
        (n,) nodes of the two structures, pairwise.
    by_sequence
        Whether it took a sequence alignment, as their numbers disagree.
    identity
        How many are of one type, as a share of the residues of the shorter body.
    """

    nodes_a: np.ndarray
    nodes_b: np.ndarray
    by_sequence: bool
    identity: float


@dataclass(frozen=True, eq=False)
class _BodySequence:
    """Nodes of a body, their letters, and numbers: (chain in the body, number, insertion code)."""

    nodes: np.ndarray
    letters: np.ndarray
    numbers: list[tuple[int, int, str]]


# Common residues of body i of one structure and body j of the other.
_Common = Callable[[int, int], _CommonResidues]


def pair_bodies(a: Structure, b: Structure) -> tuple[list[int], list[_CommonResidues], str]:
    """Partner in `b` of every body of `a`, what they share, and how they were paired.

    See `match_structures` for the rules.

    Raises
    ------
    ValueError
        When no pairing gives every body a partner that it shares residues with.
    """
    sequences_a = [_body_sequence(a, c) for c in range(a.n_chains)]
    sequences_b = [_body_sequence(b, c) for c in range(b.n_chains)]

    @cache
    def common(i: int, j: int) -> _CommonResidues:
        return _find_common(sequences_a[i], sequences_b[j])

    partners, paired = _choose_partners(a, b, common)
    return partners, [common(i, j) for i, j in enumerate(partners)], paired


def _choose_partners(a: Structure, b: Structure, common: _Common) -> tuple[list[int], str]:
    listed = list(range(a.n_chains))
    if a.in_given_order and b.in_given_order:
        if all(common(c, c).identity > 0 for c in listed):
            return listed, "in the order given"
    same_names = set(a.chain_ids) == set(b.chain_ids)
    if same_names:
        listed = [b.chain_ids.index(chain) for chain in a.chain_ids]
        if all(common(i, j).identity >= _SAME_SEQUENCE for i, j in enumerate(listed)):
            return _by_name_or_position(a, b, common, listed)

    bodies = range(a.n_chains)
    identities = np.array([[common(i, j).identity for j in bodies] for i in bodies])
    allowed = _of_one_sequence(identities)
    if same_names and allowed[range(a.n_chains), listed].all():
        return listed, "by name"
    if not _can_pair_all(allowed):
        allowed = identities > 0
    if not _can_pair_all(allowed):
        i = next(i for i, j in enumerate(listed) if not allowed[i, j])
        raise ValueError(
            f"expected two conformations of one molecule, got chains {a.chain_ids[i]} of {a.name} "
            f"and {b.chain_ids[listed[i]]} of {b.name} that share no residues; try other chains"
        )
    if (allowed.sum(1) == 1).all():
        return allowed.argmax(1).tolist(), "by sequence"
    partners = _best_superposition(
        a.node_coords, b.node_coords, common, allowed, listed, _CLEARLY_BETTER
    )
    return partners, "by sequence and position"


def _by_name_or_position(
    a: Structure, b: Structure, common: _Common, listed: list[int]
) -> tuple[list[int], str]:
    """The pairing by names that agree, unless copies have clearly changed names between files."""
    copies = np.zeros((a.n_chains, a.n_chains), dtype=bool)
    sizes = np.bincount(a.node_chain)
    for i, j in enumerate(listed):
        copies[i, j] = True
    for i in range(a.n_chains):
        for other in range(a.n_chains):
            # Copies have like lengths: others need not be aligned.
            if min(sizes[i], sizes[other]) >= _SAME_SEQUENCE * max(sizes[i], sizes[other]):
                j = listed[other]
                copies[i, j] = copies[i, j] or common(i, j).identity >= _SAME_SEQUENCE
    if copies.sum() == a.n_chains:
        return listed, "by name"
    partners = _best_superposition(
        a.node_coords, b.node_coords, common, copies, listed, _OVERRULES_NAMES
    )
    if partners == listed:
        return listed, "by name"
    return partners, "by position, against the names"


def _of_one_sequence(identities: np.ndarray) -> np.ndarray:
    """(n, n) whether two bodies are copies: their identity is near the best that either has."""
    best = np.maximum(identities.max(1, keepdims=True), identities.max(0, keepdims=True))
    return (identities > 0) & (identities >= _SAME_SEQUENCE * best)


def _can_pair_all(allowed: np.ndarray) -> bool:
    # Slow to import.
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(~allowed)
    return bool(allowed[rows, columns].all())


def _best_superposition(
    coords_a: np.ndarray,
    coords_b: np.ndarray,
    common: _Common,
    allowed: np.ndarray,
    listed: Sequence[int],
    better: float,
) -> list[int]:
    """Of the allowed pairings the one with the least RMSD over the whole assembly.

    The listed one stays unless the RMSD of that is below `better` times its own.

    Every pair of bodies is superposed in turn; each superposition lays all other bodies on or near
    their partners, which an assignment of least squared distance then finds.
    """
    pairs = [tuple(pair) for pair in np.argwhere(allowed).tolist()]
    samples_a = np.zeros((*allowed.shape, _SAMPLED_RESIDUES, 3))
    samples_b = np.zeros_like(samples_a)
    for pair in pairs:
        shared = common(*pair)
        sample = np.linspace(0, len(shared.nodes_a) - 1, _SAMPLED_RESIDUES).round().astype(int)
        samples_a[pair] = coords_a[shared.nodes_a[sample]]
        samples_b[pair] = coords_b[shared.nodes_b[sample]]

    def rmsd(partners: Sequence[int]) -> float:
        shared = [common(i, j) for i, j in enumerate(partners)]
        return _superposed_rmsd(
            coords_a[np.concatenate([one.nodes_a for one in shared])],
            coords_b[np.concatenate([one.nodes_b for one in shared])],
        )

    candidates = {
        _assign_positions(samples_a, samples_b, allowed, pair)
        for pair in pairs[:_MOST_SUPERPOSITIONS]
    }
    best = min(sorted(candidates), key=rmsd)
    if allowed[range(len(listed)), listed].all():
        if rmsd(best) >= better * rmsd(listed) - _COORDINATE_ROUNDING:
            return list(listed)
    return list(best)


def _assign_positions(
    samples_a: np.ndarray, samples_b: np.ndarray, allowed: np.ndarray, pair: tuple[int, int]
) -> tuple[int, ...]:
    """Partners of all bodies once the bodies of one pair lie on each other."""
    from scipy.optimize import linear_sum_assignment

    rotation, translation = rigid_fit(samples_b[pair], samples_a[pair])
    rows = np.arange(len(allowed))
    partners: np.ndarray | None = None
    # A second and third round, with all bodies superposed, settle what one body left uncertain.
    for _ in range(3):
        moved = samples_b @ rotation.T + translation
        cost = ((samples_a - moved) ** 2).sum(-1).mean(-1)
        cost[~allowed] = _FORBIDDEN_COST
        _, assigned = linear_sum_assignment(cost)
        if partners is not None and (assigned == partners).all():
            break
        partners = assigned
        target = samples_a[rows, partners].reshape(-1, 3)
        rotation, translation = rigid_fit(samples_b[rows, partners].reshape(-1, 3), target)
    return tuple(assigned.tolist())


def _superposed_rmsd(target: np.ndarray, mobile: np.ndarray) -> float:
    rotation, translation = rigid_fit(mobile, target)
    squares = ((mobile @ rotation.T + translation - target) ** 2).sum(1)
    return float(np.sqrt(squares.mean()))


def _body_sequence(structure: Structure, body: int) -> _BodySequence:
    nodes = np.flatnonzero(structure.node_chain == body)
    rows = structure.node_rows[nodes]
    chids = structure.atoms.getChids()[rows].tolist()
    ordinal = {chain: number for number, chain in enumerate(dict.fromkeys(chids))}
    numbers = zip(
        [ordinal[chain] for chain in chids],
        structure.atoms.getResnums()[rows].tolist(),
        structure.atoms.getIcodes()[rows].tolist(),
        strict=True,
    )
    letters = one_letter_codes(structure.atoms.getResnames()[rows])
    return _BodySequence(nodes, letters, list(numbers))


def _find_common(a: _BodySequence, b: _BodySequence) -> _CommonResidues:
    """Residues of the same number, or aligned ones where numbers do not say what is the same."""
    position_b = {number: position for position, number in enumerate(b.numbers)}
    same_number = [
        (position, position_b[number])
        for position, number in enumerate(a.numbers)
        if number in position_b
    ]
    pairs = np.array(same_number, dtype=int).reshape(-1, 2)
    shorter = min(len(a.nodes), len(b.nodes))
    trusted = len(pairs) > 0 and _n_identical(a, b, pairs) >= _TRUSTED_NUMBERS * len(pairs)
    by_sequence = False
    if not trusted or len(pairs) < shorter / 2:
        aligned = _align("".join(a.letters), "".join(b.letters))
        if not trusted or len(aligned) > len(pairs):
            pairs = aligned
            by_sequence = True
    identity = _n_identical(a, b, pairs) / shorter
    return _CommonResidues(a.nodes[pairs[:, 0]], b.nodes[pairs[:, 1]], by_sequence, identity)


def _n_identical(a: _BodySequence, b: _BodySequence, pairs: np.ndarray) -> int:
    return int((a.letters[pairs[:, 0]] == b.letters[pairs[:, 1]]).sum())


# The copies of a homo-oligomer are mostly the same pair of texts again.
@lru_cache(maxsize=128)
def _align(letters_a: str, letters_b: str) -> np.ndarray:
    """(n, 2) aligned positions, none where the sequences are not of one protein."""
    # Slow to import, and seldom needed.
    from Bio.Align import PairwiseAligner

    aligner = PairwiseAligner(
        mode="global",
        match_score=2,
        mismatch_score=-1,
        open_gap_score=-5,
        extend_gap_score=-0.5,
        end_gap_score=0,
    )
    blocks_a, blocks_b = aligner.align(letters_a, letters_b)[0].aligned
    pairs = [
        (position_a, position_b)
        for (start_a, end_a), (start_b, end_b) in zip(blocks_a, blocks_b, strict=True)
        for position_a, position_b in zip(range(start_a, end_a), range(start_b, end_b), strict=True)
    ]
    n_identical = sum(letters_a[i] == letters_b[j] for i, j in pairs)
    # A few residues always align; half of the shorter chain, mostly identical, does not happen by
    # chance.
    if n_identical < max(3, _LEAST_IDENTITY * min(len(letters_a), len(letters_b))):
        pairs = []
    return np.array(pairs, dtype=int).reshape(-1, 2)
