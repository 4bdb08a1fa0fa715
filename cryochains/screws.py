"""A motion in words: how one chain turns about, shifts along and bends beside a screw axis, seen from another chain.

Symbols: R, t → a chain's best rigid motion x′ = R x + t once the other chain is laid on itself; by Chasles' theorem it
is one turn about an axis and one shift along it. What R and t leave over is bending. Chains are compared by their
nodes, one a residue.
"""

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation

from .latent import PrincipalMotions
from .matching import rigid_fit
from .structure import Structure

STILL = 0.3  # Å RMS: below, a chain hardly moves or bends
_NEAR = 8.0  # Å from a residue to an axis that is said to run near it
_WINDOW = 8  # residues on each side of a possible hinge; a turn of fewer is mostly noise
_STANDS_OUT = 5.0  # times the median change of a chain, for a hinge


@dataclass(frozen=True, eq=False)
class Screw:
    """A turn about an axis and a shift along it, and how much of the whole motion that is; made by `screw_motion`.

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
        """Share, 0 to 1, of the squared displacement that the rigid motion explains; NaN where nothing moves."""
        return 1 - (self.bending / self.moved) ** 2 if self.moved > 0 else float("nan")


def screw_motion(before: np.ndarray, after: np.ndarray) -> Screw:
    """Screw motion that best carries (n, 3) coordinates in Å onto others, in least squares.

    A turn below 0.05°, or too small to be told from what bends, counts as none: its axis would be anywhere. Points on a
    line turn no more than they must.

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
    rotation, translation = _fit(before, after)
    center, moved = before.mean(0), _rms(after - before)
    offset = after.mean(0) - center
    bending = _rms(after - before @ rotation.T - translation)
    rotvec = Rotation.from_matrix(rotation).as_rotvec()
    angle = float(np.linalg.norm(rotvec))
    turned = _rms((before - center) @ (rotation - np.eye(3)).T)
    # n points that each bend at random seem to turn by about bending / √n.
    if angle < np.radians(0.05) or turned < 3 * bending / np.sqrt(len(before)):
        shift = float(np.linalg.norm(offset))
        shift = shift if shift > 1e-4 else 0.0  # single precision's rounding
        axis = offset / shift if shift else np.full(3, np.nan)
        return Screw(0.0, shift, axis, center, moved, _rms(after - before - offset))
    axis = rotvec / angle
    shift = float(axis @ offset)
    across = offset - shift * axis
    point = center + across / 2 + np.cross(axis, across) / (2 * np.tan(angle / 2))
    return Screw(float(np.degrees(angle)), shift, axis, point, moved, bending)


def describe_change(structure: Structure, before: np.ndarray, after: np.ndarray) -> pd.DataFrame:
    """Motion of every chain seen from every other, from one conformation to another: two rows a pair of chains.

    Pairs that move most come first. Of a pair's two rows the first has the chain that moves more in the coordinates
    as given (the later of equals), seen from the other, which is laid on itself by least squares; axis and point are
    in the frame of `before`. One body of several chains (modes of the whole assembly) is taken by its chains. One chain
    alone has one row, its bending: where it stands is a pose.

    Parameters
    ----------
    before, after
        (n, 3) Å: nodes, imaging atoms or all atoms of `structure`.

    Returns
    -------
    pandas.DataFrame
        "chain", "seen from", then of `Screw`: "angle (°)", "shift (Å)", "pitch (Å/turn)", "moved (Å)", "rigid (%)",
        "bending (Å)"; "axis runs", such as "near residue 210 of chain A"; "hinges", the residues between which the
        chain's parts turn most against each other, empty where none stand out; "axis" (to 1e-4) and "point (Å)" (to
        0.01), tuples of three.

    Raises
    ------
    ValueError
        When a shape is not that of `structure`, or a coordinate is not finite.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> table = describe_change(closed, closed.coords, closed.coords + 3.0 * (closed.chain_index == 1)[:, None])
    >>> table[["chain", "seen from", "angle (°)", "shift (Å)"]].round(2).values.tolist()
    [['B', 'A', 0.0, 5.2], ['A', 'B', 0.0, 5.2]]
    """
    before, after = _finite_pair(_nodes(structure, before), _nodes(structure, after))
    structure = _by_chain(structure)
    own = [structure.node_chain == chain for chain in range(structure.n_chains)]
    hinges = [_hinges(structure, rows, before[rows], after[rows]) for rows in own]
    travelled = [round(_rms((after - before)[rows]), 1) for rows in own]
    blocks = []
    for pair in list(combinations(range(len(own)), 2)) or [(0, 0)]:
        fixed, moving = sorted(pair, key=travelled.__getitem__)
        views = dict.fromkeys([(moving, fixed), (fixed, moving)])
        blocks.append([_row(structure, own, *view, hinges, before, after) for view in views])
    blocks.sort(key=lambda block: -block[0]["moved (Å)"])
    return pd.DataFrame(sum(blocks, []))


def describe_motion(
    motions: PrincipalMotions, component: int = 0, percentiles: tuple[float, float] = (5, 95)
) -> pd.DataFrame:
    """`describe_change` along a component, from one percentile of the particles to the other.

    Raises
    ------
    ValueError
        For a component that does not exist.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Dynamics, compute_pca, load_structure
    >>> shifts = torch.eye(12)[11] * torch.arange(5)[:, None]
    >>> motions = compute_pca(Dynamics(load_structure("glua3-closed")), shifts)
    >>> describe_motion(motions, percentiles=(0, 100))["shift (Å)"].round(2).tolist()
    [4.0, 4.0]
    """
    before, after = motions.dynamics.decode(motions.traverse(component, 2, percentiles)).detach().cpu().numpy()
    return describe_change(motions.dynamics.structure, before, after)


def motion_sentence(motions: PrincipalMotions, component: int = 0, percentiles: tuple[float, float] = (5, 95)) -> str:
    """One to three short sentences of what a component does, from one percentile of the particles to the other.

    Examples
    --------
    >>> import torch
    >>> from cryochains import Dynamics, compute_pca, load_structure
    >>> shifts = torch.eye(12)[11] * torch.arange(5)[:, None]
    >>> motions = compute_pca(Dynamics(load_structure("glua3-closed")), shifts)
    >>> motion_sentence(motions, percentiles=(0, 100))
    'PC1: chain B shifts 4.0 Å relative to chain A; 100 % of its motion is rigid.'
    """
    return f"PC{component + 1}: {change_sentence(describe_motion(motions, component, percentiles))}"


def change_sentence(table: pd.DataFrame) -> str:
    """What a table of `describe_change` says of the pair that moves most, of one more chain, and of what bends."""
    pairs = table.iloc[::2]
    first, bends = pairs.iloc[0], table.drop_duplicates("chain").sort_values("bending (Å)", ascending=False)
    alone = first["chain"] == first["seen from"]
    if table["moved (Å)"].max() < STILL:
        return "the molecule hardly bends." if alone else "the chains hardly move relative to each other."
    other = (pairs["chain"] != first["chain"]) & (pairs["moved (Å)"] >= max(STILL, first["moved (Å)"] / 2))
    said = [] if alone else [_rigid_words(row) for _, row in pd.concat([pairs[:1], pairs[other][:1]]).iterrows()]
    bent = [
        f"{'the molecule' if alone else 'chain ' + row['chain']} bends by {row['bending (Å)']:.1f} Å"
        + (f", most at {row['hinges']}" if row["hinges"] else "")
        for _, row in bends[bends["bending (Å)"] >= STILL][:2].iterrows()
    ]
    said += ["; ".join(bent)] if bent else []
    return ". ".join([said[0], *(text[0].upper() + text[1:] for text in said[1:])]) + "."


def _rigid_words(row: pd.Series) -> str:
    name, seen_from = f"chain {row['chain']}", f"relative to chain {row['seen from']}"
    if row["moved (Å)"] ** 2 - row["bending (Å)"] ** 2 < STILL**2:
        return f"{name} hardly moves as a whole {seen_from}"
    angle, shift, rigid = row["angle (°)"], abs(row["shift (Å)"]), f"{row['rigid (%)']:.3g} % of its motion is rigid"
    if angle == 0:
        return f"{name} shifts {shift:.1f} Å {seen_from}; {rigid}"
    along = f" and shifts {shift:.1f} Å along it" if shift >= 0.1 else ""
    turns = f"turns {angle:.0f}°" if angle >= 9.95 else f"turns {angle:.1f}°"
    return f"{name} {turns} about an axis {row['axis runs']}{along}, {seen_from}; {rigid}"


def _row(structure, own: list, moving: int, fixed: int, hinges: list, before: np.ndarray, after: np.ndarray) -> dict:
    rotation, translation = _fit(after[own[fixed]], before[own[fixed]])
    screw = screw_motion(before[own[moving]], (after @ rotation.T + translation)[own[moving]])
    return {
        "chain": structure.chain_ids[moving],
        "seen from": structure.chain_ids[fixed],
        "angle (°)": screw.angle,
        "shift (Å)": screw.shift,
        "pitch (Å/turn)": screw.pitch,
        "moved (Å)": screw.moved,
        "rigid (%)": 100 * screw.rigid,
        "bending (Å)": screw.bending,
        "axis runs": _place(structure, own, moving, fixed, before, screw) if screw.angle else "",
        "hinges": hinges[moving] if screw.bending >= STILL else "",
        # Four and two decimals are 0.01° and 0.01 Å; zero is added so that nothing reads -0.0.
        "axis": tuple((screw.axis.round(4) + 0).tolist()),
        "point (Å)": tuple((screw.point.round(2) + 0).tolist()),
    }


def _place(structure, own: list, moving: int, fixed: int, before: np.ndarray, screw: Screw) -> str:
    """Where a screw axis runs: near a residue of the two chains, or how far from the moving one's centre."""
    rows = np.flatnonzero(own[moving] | own[fixed])
    distance = np.linalg.norm(np.cross(before[rows] - screw.point, screw.axis), axis=1)
    nearest = rows[distance.argmin()]
    if distance.min() > _NEAR:
        return f"{np.linalg.norm(screw.point - before[own[moving]].mean(0)):.0f} Å from its centre"
    of_chain = "" if own[moving][nearest] else f" of chain {structure.chain_ids[fixed]}"
    return f"near residue {_names(structure)[nearest]}{of_chain}"


def _hinges(structure: Structure, rows: np.ndarray, before: np.ndarray, after: np.ndarray) -> str:
    """Residues of a chain where the stretches before and after turn most against each other, such as "48–53, 204"."""
    chids = structure.atoms.getChids()[structure.node_rows[rows]]
    turns = np.zeros(len(before))  # between each residue and the next
    for chid in dict.fromkeys(chids):
        own = np.flatnonzero(chids == chid)
        stretches = [own[start : start + _WINDOW] for start in range(len(own) - _WINDOW + 1)]
        local = np.array([_fit(before[part], after[part])[0] for part in stretches])
        relative = local[:-_WINDOW].transpose(0, 2, 1) @ local[_WINDOW:]
        turns[own[_WINDOW - 1 : len(own) - _WINDOW]] = Rotation.from_matrix(relative).magnitude()
    if turns.max() < _STANDS_OUT * np.median(turns):
        return ""
    names = _names(structure)[rows]
    places = np.flatnonzero(turns > 0.7 * turns.max())
    runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    strongest = sorted(runs, key=lambda run: -turns[run].max())[:3]
    return ", ".join(f"{names[run[0]]}–{names[run[-1] + 1]}" for run in sorted(strongest, key=lambda run: run[0]))


def _names(structure: Structure) -> np.ndarray:
    """Residue number of every node, with its chain where a body holds several."""
    atoms, rows = structure.atoms, structure.node_rows
    chids, numbers, codes = (values[rows] for values in (atoms.getChids(), atoms.getResnums(), atoms.getIcodes()))
    several = len(set(chids)) > structure.n_chains
    return np.array([f"{c} {n}{i}" if several else f"{n}{i}" for c, n, i in zip(chids, numbers, codes, strict=True)])


def _by_chain(structure: Structure) -> Structure:
    """One body of several chains as so many bodies, for its nodes alone; others as they are."""
    chids = structure.atoms.getChids()
    ids = tuple(dict.fromkeys(chids[structure.node_rows]))
    if structure.n_chains > 1 or len(ids) == 1:
        return structure
    return replace(structure, chain_ids=ids, atom_chain=np.argmax(chids[:, None] == np.array(ids), axis=1))


def _nodes(structure: Structure, coords: np.ndarray) -> np.ndarray:
    coords = np.asarray(coords, dtype=float)
    rows = {structure.n_nodes: slice(None), structure.n_atoms: np.isin(structure.rows, structure.node_rows)}
    rows.setdefault(structure.atoms.numAtoms(), structure.node_rows)
    if coords.ndim != 2 or len(coords) not in rows:
        counts = " or ".join(f"({n}, 3)" for n in rows)
        raise ValueError(f"expected coordinates {counts} of {structure!r}, got {coords.shape}")
    return coords[rows[len(coords)]]


def _finite_pair(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before, after = np.asarray(before, dtype=float), np.asarray(after, dtype=float)
    if before.shape != after.shape or before.ndim != 2 or before.shape[1] != 3 or not len(before):
        raise ValueError(f"expected two conformations (n, 3) of the same atoms, got {before.shape} and {after.shape}")
    if not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("expected finite coordinates in Å, got NaN or infinity; try leaving out missing atoms")
    return before, after


def _fit(before: np.ndarray, after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`rigid_fit` that turns no more than it must: a tiny cross at each centre settles what points on a line leave."""
    cross = 1e-3 * np.concatenate([np.eye(3), -np.eye(3)])
    return rigid_fit(np.concatenate([before, before.mean(0) + cross]), np.concatenate([after, after.mean(0) + cross]))


def _rms(vectors: np.ndarray) -> float:
    return float(np.sqrt((vectors**2).sum(-1).mean()))
