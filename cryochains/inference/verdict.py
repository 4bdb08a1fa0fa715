"""Whether a refinement is to be trusted: what speaks against it, in sentences.

Nothing here needs a truth. Limits were chosen on runs that were nonsense (poses of other particles,
the other hand, CTFs of other particles, noise) and on good ones from 0 to −20 dB; they are wide
enough that a "not to be trusted" is one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..model import Dynamics, Model, Population, elastic_variance
from ..molecule import Structure, compare_beads
from .bending import measure_bending

_GRADES = ("good", "doubtful", "not to be trusted")
# For each number, from where on it is doubtful and from where on it is not to be trusted.
# Å, RMS step of the last pass.
_STEP_LIMITS = (0.1, 0.3)
# Spread of the conformations, over what the elastic network thinks possible before any image.
_SPREAD_LIMITS = (0.9, 1.15)
# Share of particles that do not show the molecule.
_JUNK_LIMITS = (0.4, 0.9)
# Å, by how much atoms are off, as fine detail that is too dim says.
_FADING_LIMITS = (2.0, 5.0)
# Standard deviation of log brightness.
_SCALE_LIMITS = (0.7, 1.5)
# Of the brightness at the first pass, that of the last; lower is worse.
_DIMMING_LIMITS = (0.85, 0.5)
# Of the noise on the rings where the molecule shows, over that on the others: at most doubtful,
# since noise itself may be so.
_COLOR_LIMITS = (3.0, math.inf)
# Share of the molecule that the images lack, or that the reference does.
_DENSITY_LIMITS = (0.01, 0.5)
# A residue with less of its density than this (mean of so many) is hardly seen; stretches
# beside which the density of so many residues is are named.
_HARDLY_SEEN = 0.5
_SMOOTHED = 5
_NAMED_DENSITY = 3.0
# Residues that far apart in a chain are not one stretch.
_STRETCH_GAP = 10
_MOST_NAMED = 4
# Log evidence of the middle particle for the molecule over something else; lower is worse.
_SUPPORT_LIMITS = (5.0, 0.0)
# Bodies are suggested where a chain bends by so many Å, and they express so much of it.
_LEAST_BENDING = 1.5
_LEAST_EXPRESSED = 0.6
# Conformations in which it is measured how far chains bend.
_MOST_BENT = 200


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    name : str
    value : float
    grade : str
        One of "good", "doubtful", "not to be trusted".
    sentence : str
        What was found.
    remedy : str
        What to try; empty where there is nothing to be done.
    """

    name: str
    value: float
    grade: str
    sentence: str
    remedy: str = ""


@dataclass(frozen=True, repr=False)
class Verdict:
    """What speaks for and against a refinement; made by ``Result.verdict``.

    Attributes
    ----------
    findings : tuple of Finding

    Examples
    --------
    >>> Verdict((Finding("convergence", 0.02, "good", "converged after 6 passes"),))
    Verdict: good
      good               converged after 6 passes
    """

    findings: tuple[Finding, ...]

    @property
    def grade(self) -> str:
        """That of the worst finding."""
        return _GRADES[max((_GRADES.index(part.grade) for part in self.findings), default=0)]

    @property
    def trusted(self) -> bool:
        """Whether nothing is not to be trusted."""
        return self.grade != _GRADES[2]

    @property
    def reasons(self) -> str:
        """What is worst, as one clause; empty where all is good."""
        worst = [part.sentence for part in self.findings if part.grade == self.grade]
        return "" if self.grade == _GRADES[0] else "; ".join(worst)

    def __repr__(self) -> str:
        lines = [f"Verdict: {self.grade}"]
        for part in self.findings:
            remedy = f"; {part.remedy}" if part.remedy else ""
            lines.append(f"  {part.grade:<18} {part.sentence}{remedy}")
        return "\n".join(lines)


def judge(
    model: Model,
    population: Population,
    history: Sequence[Mapping],
    latents: Tensor,
    junk: float,
) -> Verdict:
    """The verdict on a refinement.

    Parameters
    ----------
    model : Model
    population : Population
    history : sequence of dict
        One record a pass.
    latents : (n, p) tensor
        Of particles that show the molecule, without what all chains share.
    junk : float
        Share of particles that do not.
    """
    first, last = history[0], history[-1]
    findings = [
        _convergence(last["step"], len(history)),
        _spread(model.dynamics, latents),
        _graded(
            "junk",
            junk,
            _JUNK_LIMITS,
            f"{100 * junk:.0f} % of the particles do not show the molecule at their poses",
            "try to classify them first",
        ),
        _graded(
            "support",
            last["support"],
            _SUPPORT_LIMITS,
            f"an image speaks for the molecule by {last['support']:.0f} nats over something else "
            "of the same power",
            "try other poses, the other hand, or the right structure",
        ),
        _graded(
            "detail",
            last["fading"],
            _FADING_LIMITS,
            f"fine detail is as clear as atoms that are off by {max(last['fading'], 0):.1f} Å",
            "check pixel size, CTFs and poses",
        ),
        _graded(
            "dimming",
            last["contrast"] / first["contrast"],
            _DIMMING_LIMITS,
            f"fine detail is {last['contrast'] / first['contrast']:.2f} times as bright as coarse "
            "detail",
            "check pixel size, CTFs and poses",
        ),
        _graded(
            "brightness",
            population.contrast_spread,
            _SCALE_LIMITS,
            "brightness differs between particles by a factor of "
            f"{math.exp(population.contrast_spread):.2f} (standard deviation)",
            "check the normalisation of the images",
        ),
        *_color(population),
        *_density(model, population),
        *_bending(model, latents),
    ]
    return Verdict(tuple(findings))


def _graded(
    name: str, value: float, limits: tuple[float, float], sentence: str, remedy: str
) -> Finding:
    doubtful, bad = limits
    sign = 1 if bad > doubtful else -1
    number = 0 if math.isnan(value) else int(sign * value > sign * doubtful)
    number += int(number and sign * value > sign * bad)
    return Finding(name, value, _GRADES[number], sentence, remedy if number else "")


def _convergence(step: float, n_passes: int) -> Finding:
    if step <= _STEP_LIMITS[0]:
        words = f"converged after {n_passes} passes (last step {step:.2f} Å)"
    else:
        words = f"stopped after {n_passes} passes while atoms still moved by {step:.2f} Å"
    return _graded(
        "convergence", step, _STEP_LIMITS, words, "try refine(start=result), and check the poses"
    )


def _spread(dynamics: Dynamics, latents: Tensor) -> Finding:
    """How far conformations spread."""
    spread = float(latents.double().var(0).sum().sqrt()) if len(latents) > 1 else 0.0
    variance = elastic_variance(dynamics)
    for layout, name in zip(dynamics.chains, dynamics.structure.chain_ids, strict=True):
        if name in dynamics.structure.turning:
            # No turn of it is further than half a turn, and any may be of all particles.
            variance[layout.rotation] = (math.pi / dynamics.scale_tensor[layout.rotation]) ** 2 / 3
    plausible = float(variance.sum().sqrt())
    return _graded(
        "spread",
        spread / plausible,
        _SPREAD_LIMITS,
        f"conformations spread by {spread:.1f} Å, where {plausible:.1f} Å was thought possible",
        "check that poses and hand are those of this structure",
    )


def _color(population: Population) -> list[Finding]:
    spectrum = population.noise_spectrum
    if spectrum is None or len(spectrum) < 8:
        return []
    values = spectrum.double().numpy()
    # Detail of a tenth of the box and coarser, the molecule's own, beside the finest half.
    coarse = float(values[2 : max(4, len(values) // 3)].max())
    fine = float(np.median(values[len(values) // 2 :]))
    return [
        _graded(
            "noise",
            coarse / fine,
            _COLOR_LIMITS,
            f"noise is {coarse / fine:.1f} times as strong at coarse detail as at fine detail",
            "that is coloured noise, or something that the model lacks; look at the residuals",
        )
    ]


def _density(model: Model, population: Population) -> list[Finding]:
    """Where the images' density is not the reference's."""
    if population.beads is None:
        return []
    structure = model.structure
    occupancy, beside = compare_beads(structure, model.beads, population.beads)
    smooth = _smoothed(occupancy, structure.node_chain)
    unseen = smooth < _HARDLY_SEEN
    parts = []
    names = [_name(structure, run) for run in _stretches(structure, unseen, 1)]
    if names:
        parts.append(f"{_listed(names)} hardly seen")
    runs = _stretches(structure, beside > 0, _STRETCH_GAP)
    runs = sorted(runs, key=lambda run: -beside[run].sum())
    names = [
        f"{beside[run].sum():.0f} residues beside {_name(structure, run)}"
        for run in runs
        if beside[run].sum() > _NAMED_DENSITY
    ]
    if names:
        parts.append(f"density that the reference lacks, as of {_listed(names)}")
    share = (beside.sum() + (1 - occupancy[unseen]).sum()) / structure.n_nodes
    return [
        _graded(
            "density",
            float(share),
            _DENSITY_LIMITS,
            "; ".join(parts) or "density as in the reference, within what residues vary by",
            "see density_table(result); complete the reference, or try correct_reference(result)",
        )
    ]


def _bending(model: Model, latents: Tensor) -> list[Finding]:
    """Chains that bend as bodies of their own would turn: no doubt, but more than modes may say."""
    if model.dynamics.modes is None or not len(latents):
        return []
    latents = latents[:: -(-len(latents) // _MOST_BENT)]
    bodies = measure_bending(model, latents, None)
    most = max(bodies, key=lambda body: body.size)
    sentence = f"chain {most.chain} bends by {most.size:.1f} Å"
    remedies = []
    if most.size > _LEAST_BENDING:
        try:
            domains = model.structure.as_domains()
        except ValueError:
            # A molecule in pieces has none.
            return [Finding("bending", most.size, _GRADES[0], sentence)]
        remedies = [
            f"{_listed(list(body.domains))} as bodies of their own would express "
            f"{100 * body.expressed:.0f} % of what chain {body.chain} bends by"
            for body in measure_bending(model, latents, domains)
            if body.size > _LEAST_BENDING and body.expressed > _LEAST_EXPRESSED
        ]
    remedy = f"{_listed(remedies)}: try load_structure(…, bodies='domains')" if remedies else ""
    return [Finding("bending", most.size, _GRADES[0], sentence, remedy)]


def _smoothed(values: np.ndarray, chain: np.ndarray) -> np.ndarray:
    """(n,) running means along each chain."""
    means = np.empty(len(values))
    for number in np.unique(chain):
        own = chain == number
        kernel = np.ones(min(_SMOOTHED, own.sum()))
        counts = np.convolve(np.ones(own.sum()), kernel, mode="same")
        means[own] = np.convolve(values[own], kernel, mode="same") / counts
    return means


def _stretches(structure: Structure, chosen: np.ndarray, gap: int) -> list[np.ndarray]:
    """Nodes of each stretch of `chosen` (n_nodes,) ones that are no more than `gap` apart."""
    nodes = np.flatnonzero(chosen)
    if not len(nodes):
        return []
    new = (np.diff(nodes) > gap) | (np.diff(structure.node_chain[nodes]) != 0)
    return np.split(nodes, np.flatnonzero(new) + 1)


def _name(structure: Structure, nodes: np.ndarray) -> str:
    """Such as "chain B 310–325"."""
    numbers = structure.atoms.getResnums()[structure.node_rows[nodes]]
    chain = structure.chain_ids[structure.node_chain[nodes[0]]]
    first, last = numbers.min(), numbers.max()
    return f"chain {chain} {first}" + (f"–{last}" if last > first else "")


def _listed(names: list[str]) -> str:
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
