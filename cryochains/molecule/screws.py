"""A motion in words: how a chain turns about and shifts along a screw axis, and bends beside it.

Symbols: R, t → a chain's best rigid motion x′ = R x + t once the other chain is laid on itself; by
Chasles' theorem it is one turn about an axis and one shift along it. What R and t leave over is
bending. Chains are compared by their nodes, one a residue.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from .._arguments import checked
from .structure import Structure
from .superposition import rigid_fit

# Å RMS: below, a chain hardly moves or bends.
_HARDLY_MOVES = 0.3
# Degrees: a smaller turn has no axis that means anything.
_LEAST_TURN = 0.05
# Å: smaller shifts are the rounding of single precision.
_LEAST_SHIFT = 1e-4
# Å from an axis to a residue that it is said to run near.
_NEAR_AXIS = 8.0
# Residues on each side of a possible hinge; a turn of fewer is mostly noise.
_HINGE_WINDOW = 8
# A hinge turns this many times as much as the median residue of its chain.
_HINGE_STANDS_OUT = 5.0
# Residues that turn this share of the strongest hinge's turn belong to a hinge.
_HINGE_SHARE = 0.7
_MOST_HINGES = 3


@dataclass(frozen=True, eq=False)
class Screw:
    """A turn about an axis and a shift along it, and how much of the whole motion that is.

    Made by `screw_motion`.

    Attributes
    ----------
    angle
        Degrees, 0 to 180, right-handed about `axis`.
    shift
        Å along `axis`, negative for a left-handed screw.
    axis
        (3,) unit vector; that of the shift where nothing turns, NaN where nothing moves.
    point
        (3,) Å, the point of the axis nearest to the centre before the motion.
    moved
        Å, RMS displacement.
    bending
        Å, RMS displacement that no rigid motion explains.
    """

    angle: float
    shift: float
    axis: np.ndarray
    point: np.ndarray
    moved: float
    bending: float

    @property
    def pitch(self) -> float:
        """Å of shift in a full turn; infinite where nothing turns, NaN where nothing moves."""
        if self.angle > 0:
            return 360 * self.shift / self.angle
        return float("inf") if self.shift > 0 else float("nan")

    @property
    def rigid(self) -> float:
        """Share, 0 to 1, of the squared displacement that the rigid motion explains.

        NaN where nothing moves.
        """
        return 1 - (self.bending / self.moved) ** 2 if self.moved > 0 else float("nan")


@checked
def screw_motion(before: np.ndarray, after: np.ndarray) -> Screw:
    """Screw motion that best carries (n, 3) coordinates in Å onto others, in least squares.

    A turn below 0.05°, or too small to be told from what bends, counts as none: its axis would be
    anywhere. Points on a line turn no more than they must.

    Raises
    ------
    ValueError
        When the shapes differ, or a coordinate is not finite.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 3))
    >>> screw = screw_motion(x, x @ np.array([[0, 1, 0], [-1, 0, 0], [0, 0, 1]]) + [0, 0, 2])
    >>> round(screw.angle, 3), round(screw.shift, 3), round(screw.pitch, 3)
    (90.0, 2.0, 8.0)
    """
    before, after = _finite_pair(before, after)
    rotation, translation = _least_turning_fit(before, after)
    center = before.mean(0)
    offset = after.mean(0) - center
    moved = _rms_length(after - before)
    bending = _rms_length(after - before @ rotation.T - translation)
    rotvec = Rotation.from_matrix(rotation).as_rotvec()
    angle = float(np.linalg.norm(rotvec))
    turned = _rms_length((before - center) @ (rotation - np.eye(3)).T)
    # n points that each bend at random seem to turn by about bending / √n.
    if angle < np.radians(_LEAST_TURN) or turned < 3 * bending / np.sqrt(len(before)):
        return _pure_shift(center, offset, moved, _rms_length(after - before - offset))
    axis = rotvec / angle
    shift = float(axis @ offset)
    across = offset - shift * axis
    point = center + across / 2 + np.cross(axis, across) / (2 * np.tan(angle / 2))
    return Screw(float(np.degrees(angle)), shift, axis, point, moved, bending)


def _pure_shift(center: np.ndarray, offset: np.ndarray, moved: float, bending: float) -> Screw:
    shift = float(np.linalg.norm(offset))
    if shift <= _LEAST_SHIFT:
        return Screw(0.0, 0.0, np.full(3, np.nan), center, moved, bending)
    return Screw(0.0, shift, offset / shift, center, moved, bending)


@checked
def describe_change(structure: Structure, before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """Motion of every chain seen from every other, between two conformations: two rows a pair.

    Pairs that move most come first. Of a pair's two rows the first has the chain that moves more in
    the coordinates as given (the later of equals), seen from the other, which is laid on itself by
    least squares; axis and point are in the frame of `before`. One body of several chains (modes of
    the whole assembly) is taken by its chains. One chain alone has one row, its bending: where it
    stands is a pose.

    Parameters
    ----------
    before, after
        (n, 3) Å: nodes, imaging atoms or all atoms of `structure`.

    Returns
    -------
    pandas.DataFrame
        "chain", "seen from", then of `Screw`: "angle (°)", "shift (Å)", "pitch (Å/turn)",
        "moved (Å)", "rigid (%)", "bending (Å)"; "axis runs", such as "near residue 210 of chain A";
        "hinges", the residues between which the chain's parts turn most against each other, empty
        where none stand out; "axis" (to 1e-4) and "point (Å)" (to 0.01), tuples of three.

    Raises
    ------
    ValueError
        When a shape is not that of `structure`, or a coordinate is not finite.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> shifted = closed.coords + 3.0 * (closed.chain_index == 1)[:, None]
    >>> table = describe_change(closed, closed.coords, shifted)
    >>> table[["chain", "seen from", "angle (°)", "shift (Å)"]].round(2).values.tolist()
    [['B', 'A', 0.0, 5.2], ['A', 'B', 0.0, 5.2]]
    """
    before, after = _finite_pair(_node_coords(structure, before), _node_coords(structure, after))
    structure = _split_by_chain(structure)
    chains = [
        _ChainMotion.between(structure, chain, before, after) for chain in range(structure.n_chains)
    ]
    pairs = list(combinations(chains, 2)) or [(chains[0], chains[0])]
    blocks = []
    for pair in pairs:
        fixed, moving = sorted(pair, key=lambda chain: chain.travelled)
        views = [(moving, fixed)]
        if moving is not fixed:
            views.append((fixed, moving))
        blocks.append([_change_row(structure, *view) for view in views])
    blocks.sort(key=lambda block: -block[0]["moved (Å)"])
    return pd.DataFrame([row for block in blocks for row in block])


@checked
def change_sentence(table: pd.DataFrame) -> str:
    """What a table of `describe_change` says: the pair that moves most, one more chain, bending.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> shifted = closed.coords + 3.0 * (closed.chain_index == 1)[:, None]
    >>> change_sentence(describe_change(closed, closed.coords, shifted))
    'chain B shifts 5.2 Å relative to chain A; 100 % of its motion is rigid.'
    """
    pairs = table.iloc[::2]
    first = pairs.iloc[0]
    alone = first["chain"] == first["seen from"]
    if table["moved (Å)"].max() < _HARDLY_MOVES and not alone:
        return "the chains hardly move relative to each other."
    sentences = []
    if not alone:
        least = max(_HARDLY_MOVES, first["moved (Å)"] / 2)
        others = pairs[(pairs["chain"] != first["chain"]) & (pairs["moved (Å)"] >= least)]
        described = pd.concat([pairs[:1], others[:1]])
        sentences = [_rigid_words(row) for _, row in described.iterrows()]
    bending = _bending_words(table, alone)
    if bending:
        sentences.append(bending)
    if not sentences:
        return "the molecule hardly bends."
    later = [sentence[0].upper() + sentence[1:] for sentence in sentences[1:]]
    return ". ".join([sentences[0], *later]) + "."


def _rigid_words(row: pd.Series) -> str:
    name = f"chain {row['chain']}"
    seen_from = f"relative to chain {row['seen from']}"
    if row["moved (Å)"] ** 2 - row["bending (Å)"] ** 2 < _HARDLY_MOVES**2:
        return f"{name} hardly moves as a whole {seen_from}"
    angle = row["angle (°)"]
    shift = abs(row["shift (Å)"])
    rigid = f"{row['rigid (%)']:.3g} % of its motion is rigid"
    if angle == 0:
        return f"{name} shifts {shift:.1f} Å {seen_from}; {rigid}"
    along = f" and shifts {shift:.1f} Å along it" if shift >= 0.1 else ""
    turns = f"turns {angle:.0f}°" if angle >= 9.95 else f"turns {angle:.1f}°"
    return f"{name} {turns} about an axis {row['axis runs']}{along}, {seen_from}; {rigid}"


def _bending_words(table: pd.DataFrame, alone: bool) -> str:
    """What the two chains do that bend most; empty where none bends."""
    chains = table.drop_duplicates("chain").sort_values("bending (Å)", ascending=False)
    chains = chains[chains["bending (Å)"] >= _HARDLY_MOVES]
    parts = []
    for _, row in chains[:2].iterrows():
        name = "the molecule" if alone else f"chain {row['chain']}"
        hinges = f", most at {row['hinges']}" if row["hinges"] else ""
        parts.append(f"{name} bends by {row['bending (Å)']:.1f} Å{hinges}")
    return "; ".join(parts)


@dataclass(frozen=True, eq=False)
class _ChainMotion:
    """Node coordinates of one chain before and after, and what is said of it seen from anywhere."""

    chain: int
    nodes: np.ndarray
    before: np.ndarray
    after: np.ndarray
    travelled: float
    hinges: str

    @classmethod
    def between(
        cls, structure: Structure, chain: int, before: np.ndarray, after: np.ndarray
    ) -> "_ChainMotion":
        nodes = np.flatnonzero(structure.node_chain == chain)
        return cls(
            chain,
            nodes,
            before[nodes],
            after[nodes],
            # To 0.1 Å, so that noise does not decide which of two chains moves more.
            round(_rms_length((after - before)[nodes]), 1),
            _describe_hinges(structure, nodes, before[nodes], after[nodes]),
        )


def _change_row(structure: Structure, moving: _ChainMotion, fixed: _ChainMotion) -> dict:
    """Row of `describe_change`: the motion of one chain once another is laid on itself."""
    rotation, translation = _least_turning_fit(fixed.after, fixed.before)
    screw = screw_motion(moving.before, moving.after @ rotation.T + translation)
    return {
        "chain": structure.chain_ids[moving.chain],
        "seen from": structure.chain_ids[fixed.chain],
        "angle (°)": screw.angle,
        "shift (Å)": screw.shift,
        "pitch (Å/turn)": screw.pitch,
        "moved (Å)": screw.moved,
        "rigid (%)": 100 * screw.rigid,
        "bending (Å)": screw.bending,
        "axis runs": _describe_axis(structure, moving, fixed, screw) if screw.angle else "",
        "hinges": moving.hinges if screw.bending >= _HARDLY_MOVES else "",
        # Four and two decimals are 0.01° and 0.01 Å; zero is added so that nothing reads -0.0.
        "axis": tuple((screw.axis.round(4) + 0).tolist()),
        "point (Å)": tuple((screw.point.round(2) + 0).tolist()),
    }


def _describe_axis(
    structure: Structure, moving: _ChainMotion, fixed: _ChainMotion, screw: Screw
) -> str:
    """Where an axis runs: near a residue of the chains, or how far from the moving one's centre."""
    nodes = np.concatenate([moving.nodes, fixed.nodes])
    coords = np.concatenate([moving.before, fixed.before])
    distance = np.linalg.norm(np.cross(coords - screw.point, screw.axis), axis=1)
    nearest = distance.argmin()
    if distance[nearest] > _NEAR_AXIS:
        from_center = np.linalg.norm(screw.point - moving.before.mean(0))
        return f"{from_center:.0f} Å from its centre"
    in_moving = nearest < len(moving.nodes)
    of_chain = "" if in_moving else f" of chain {structure.chain_ids[fixed.chain]}"
    return f"near residue {_residue_names(structure)[nodes[nearest]]}{of_chain}"


def _describe_hinges(
    structure: Structure, nodes: np.ndarray, before: np.ndarray, after: np.ndarray
) -> str:
    """Residues where the stretches before and after turn most against each other: "48–53, 204"."""
    chids = structure.atoms.getChids()[structure.node_rows[nodes]]
    turns = np.zeros(len(before))  # between each residue and the next
    for chid in dict.fromkeys(chids):
        own = np.flatnonzero(chids == chid)
        if len(own) < 2 * _HINGE_WINDOW:
            continue
        starts = range(len(own) - _HINGE_WINDOW + 1)
        stretches = [own[start : start + _HINGE_WINDOW] for start in starts]
        fits = [_least_turning_fit(before[part], after[part]) for part in stretches]
        local = np.array([rotation for rotation, _ in fits])
        relative = local[:-_HINGE_WINDOW].transpose(0, 2, 1) @ local[_HINGE_WINDOW:]
        between = own[_HINGE_WINDOW - 1 : len(own) - _HINGE_WINDOW]
        turns[between] = Rotation.from_matrix(relative).magnitude()
    if not turns.any() or turns.max() < _HINGE_STANDS_OUT * np.median(turns):
        return ""
    names = _residue_names(structure)[nodes]
    strong = np.flatnonzero(turns > _HINGE_SHARE * turns.max())
    runs = np.split(strong, np.flatnonzero(np.diff(strong) > 1) + 1)
    strongest = sorted(runs, key=lambda run: -turns[run].max())[:_MOST_HINGES]
    in_order = sorted(strongest, key=lambda run: run[0])
    return ", ".join(f"{names[run[0]]}–{names[run[-1] + 1]}" for run in in_order)


def _residue_names(structure: Structure) -> np.ndarray:
    """Residue number of every node, with its chain where a body holds several."""
    rows = structure.node_rows
    chids = structure.atoms.getChids()[rows]
    numbers = structure.atoms.getResnums()[rows]
    codes = structure.atoms.getIcodes()[rows]
    names = [f"{number}{code}" for number, code in zip(numbers, codes, strict=True)]
    if len(set(chids)) > structure.n_chains:
        names = [f"{chid} {name}" for chid, name in zip(chids, names, strict=True)]
    return np.array(names)


def _split_by_chain(structure: Structure) -> Structure:
    """One body of several chains as so many bodies, for its nodes alone; others as they are."""
    chids = structure.atoms.getChids()
    ids = tuple(dict.fromkeys(chids[structure.node_rows].tolist()))
    if structure.n_chains > 1 or len(ids) == 1:
        return structure
    atom_chain = np.argmax(chids[:, None] == np.array(ids), axis=1)
    return replace(structure, chain_ids=ids, atom_chain=atom_chain)


def _node_coords(structure: Structure, coords: np.ndarray) -> np.ndarray:
    """Of coordinates of nodes, imaging atoms or all atoms those of the nodes."""
    coords = np.asarray(coords, dtype=float)
    rows = {
        structure.n_nodes: np.arange(structure.n_nodes),
        structure.n_atoms: np.isin(structure.rows, structure.node_rows),
    }
    rows.setdefault(structure.atoms.numAtoms(), structure.node_rows)
    if coords.ndim != 2 or len(coords) not in rows:
        counts = " or ".join(f"({n}, 3)" for n in rows)
        raise ValueError(
            f"expected coordinates {counts} of {structure!r}, got {coords.shape}; "
            "try Structure.coords"
        )
    return coords[rows[len(coords)]]


def _finite_pair(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before = np.asarray(before, dtype=float)
    after = np.asarray(after, dtype=float)
    well_shaped = before.ndim == 2 and before.shape[1] == 3 and len(before) > 0
    if before.shape != after.shape or not well_shaped:
        raise ValueError(
            f"expected two conformations (n, 3) of the same atoms, got {before.shape} and "
            f"{after.shape}; try match_structures first"
        )
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError(
            "expected finite coordinates in Å, got NaN or infinity; try leaving out missing atoms"
        )
    return before, after


def _least_turning_fit(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rigid_fit` that turns no more than it must.

    A tiny cross at each centre settles what points on a line leave open.
    """
    cross = 1e-3 * np.concatenate([np.eye(3), -np.eye(3)])
    mobile = np.concatenate([before, before.mean(0) + cross])
    return rigid_fit(mobile, np.concatenate([after, after.mean(0) + cross]))


def _rms_length(vectors: np.ndarray) -> float:
    return float(np.sqrt((vectors**2).sum(-1).mean()))
