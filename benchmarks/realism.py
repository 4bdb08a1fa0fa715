"""What real cryo-EM particles do to the refinement: one disturbance at a time, and all together.

The particles show the GluA3 dimer between its closed and open states, and the program is given the
closed one. The images are the library's own, or (conditions "heavy" and "all", or all conditions
with --independent) those of a simulator that shares no code with `cryochains.images.projection` and
`cryochains.model.microscope`: direct Fourier sums over heavy atoms, with a contrast transfer
function of its own. Poses, optics and states are drawn by `simulate_particles` for both, so that
both show the same particles. Every row of the table is a condition, a strength and a seed.

    python benchmarks/realism.py --conditions baseline brightness-strong --n 600 --seed 0

Symbols: F(k) → `project_atoms`, f_a → `form_factor`, χ → the phase in `contrast_transfer`.
"""

import argparse
import csv
import dataclasses
import math
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import prody
import torch
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

import cryochains as cc
from cryochains._files import atomic_path
from cryochains.images import CTF, ParticleStack
from cryochains.inference import correlation, posterior_covariance, true_latents
from cryochains.model import Truth
from cryochains.molecule import Structure, rigid_fit

# Electron scattering factors of neutral atoms for s = sin(θ)/λ up to 2 Å⁻¹: f = Σ a exp(−b s²) in
# Å, with s = k/2 (Peng, Ren, Dudarev and Whelan 1996, Acta Cryst. A52, 257; International Tables C,
# table 4.3.2.2). First the five a, then the five b in Å².
PENG = {
    "C": (
        (0.0893, 0.2563, 0.7570, 1.0487, 0.3575),
        (0.2465, 1.7100, 6.4094, 18.6113, 50.2523),
    ),
    "N": (
        (0.1022, 0.3219, 0.7982, 0.8197, 0.1715),
        (0.2451, 1.7481, 6.1925, 17.3894, 48.1431),
    ),
    "O": (
        (0.0974, 0.2921, 0.6910, 0.6990, 0.2039),
        (0.2067, 1.3815, 4.6943, 12.7105, 32.4726),
    ),
    "P": (
        (0.2548, 0.6106, 1.4541, 2.3204, 0.8477),
        (0.2908, 1.8740, 8.5176, 24.3434, 63.2996),
    ),
    "S": (
        (0.2497, 0.5628, 1.3899, 2.1865, 0.7715),
        (0.2681, 1.6711, 7.0267, 19.5377, 50.3888),
    ),
}
# Any other element scatters and displaces solvent as carbon does.
_FALLBACK = "C"
# Å³ of solvent that a heavy atom displaces together with the hydrogens that it carries on average
# in a protein: the volumes of Fraser, MacRae and Suzuki (1978, J. Appl. Cryst. 11, 693) and 5.15 Å³
# a hydrogen, 1.2 of them on a C or an N and 0.15 on an O. A mean residue adds up to 140 Å³.
VOLUMES = {"C": 22.6, "N": 8.7, "O": 9.9, "P": 5.7, "S": 19.9}
# Å², B-factor of every atom unless the file's are asked for: blurs by 0.9 Å.
B_FACTOR = 60.0
# Share of the heavy atoms' scattering at zero frequency that the displaced solvent takes away.
SOLVENT_SHARE = 0.38

# Frames of the path from the closed to the open state.
N_FRAMES = 50
# Å, standard deviation of the particles' true shifts.
_SHIFT_STD = 2.0
# Residues on either side of a Cα that do not count as its neighbours, and how far away others do.
_SEQUENCE_GAP = 3
_NEIGHBOUR_DISTANCE = 10.0
# The background of a normalised image is what lies outside a circle of this share of the box.
_BACKGROUND_RADIUS = 0.45
# The micelle: Å from the molecule's end to the torus's centre, its radius, the width of its
# Gaussians, and their number.
_MICELLE_INSET = 14.0
_MICELLE_RADIUS = 18.0
_MICELLE_SIGMA = 6.0
_MICELLE_BEADS = 24
# Good particles whose posterior covariance is computed for the coverage of the 95 % interval.
_N_COVERAGE = 200
# A particle farther from its true conformation than so many times the median is stuck elsewhere.
_STUCK_RATIO = 5.0
# Streams of random numbers: each disturbance has its own, so that one changes no other.
(
    _BRIGHTNESS,
    _NOISE_LEVEL,
    _NOISE,
    _JUNK,
    _JUNK_ROTATIONS,
    _OUTLIERS,
    _ROTATION_ERRORS,
    _SHIFT_ERRORS,
) = range(8)


# Simulator: heavy atoms, central slice, contrast transfer


def form_factor(element: str, k: np.ndarray) -> np.ndarray:
    """Electron scattering factor in Å of an atom at rest, at spatial frequencies `k` in Å⁻¹."""
    a, b = PENG.get(element, PENG[_FALLBACK])
    quarter = k**2 / 4
    terms = [ai * np.exp(-bi * quarter) for ai, bi in zip(a, b, strict=True)]
    return np.sum(terms, axis=0)


def scattering(elements: np.ndarray) -> float:
    """Å, scattering factors at zero frequency of all these atoms together."""
    kinds, counts = np.unique(elements, return_counts=True)
    factors = [float(form_factor(str(kind), np.zeros(1))[0]) for kind in kinds]
    return float(np.dot(counts, factors))


def solvent_factor(element: str, k: np.ndarray) -> np.ndarray:
    """Å³, transform of the Gaussian of solvent that an atom displaces: V exp(−π V^(2/3) k²)."""
    volume = VOLUMES.get(element, VOLUMES[_FALLBACK])
    return volume * np.exp(-np.pi * volume ** (2 / 3) * k**2)


def frequencies(box_size: int, pixel_size: float) -> tuple[np.ndarray, np.ndarray]:
    """(box, 1) and (1, box//2 + 1) ky and kx in Å⁻¹ of ``rfft2``."""
    ky = np.fft.fftfreq(box_size, pixel_size)[:, None]
    kx = np.fft.rfftfreq(box_size, pixel_size)[None]
    return ky, kx


class HeavyAtoms:
    """Atoms that draw images of themselves by direct Fourier sums.

        F(k) = Σ_a [f_a(|k|) − ρ g_a(|k|)] exp(−B_a k²/4) exp(−2πi k·x_a)

    with f_a Peng's factor, g_a the solvent that the atom displaces and ρ its scattering in Å a Å³.
    The sums are the coefficients of a band-limited image, so nothing aliases in them; the Nyquist
    row and column, which stand for two frequencies at once, are set to zero.

    Solvent: ρ is chosen such that Σ ρ V_a is the share `solvent` of Σ f_a(0); 0.38 is 3 V of ice
    under 8 V of protein. What is known of that share: isolated atoms of ice would make 4.5 V, 0.55;
    electron holography of vitrified ice gave 3.5 ± 1.2 V (Harscher and Lichte 1998), 0.43. So 0.38
    is on the mild side. Hydrogens are left out of Σ f_a and of the images: they lie within 1.1 Å of
    their heavy atom, and add about a fifth to it. The solvent is blurred by the atom's B-factor.

    Parameters
    ----------
    elements : (n,) array of str
    b_factors : (n,) array
        Å².
    solvent : float
        0 for atoms in vacuum.
    box_size : int
    pixel_size : float
        Å.
    """

    def __init__(
        self,
        elements: np.ndarray,
        b_factors: np.ndarray,
        solvent: float,
        box_size: int,
        pixel_size: float,
    ) -> None:
        self.box_size = box_size
        self.pixel_size = pixel_size
        ky, kx = frequencies(box_size, pixel_size)
        radius = np.hypot(ky, kx)
        kinds = np.where(np.isin(elements, list(PENG)), elements, _FALLBACK)
        self.groups = {str(kind): np.flatnonzero(kinds == kind) for kind in np.unique(kinds)}
        displaced = sum(len(a) * VOLUMES[kind] for kind, a in self.groups.items())
        density = solvent * scattering(elements) / displaced
        inside = np.ones_like(radius)
        inside[box_size // 2] = 0.0
        inside[:, box_size // 2] = 0.0
        # Per Å² of the image: the coefficients of rfft2 are those of its pixels' sums.
        inside /= pixel_size**2
        self.factors = {}
        for kind in self.groups:
            factor = form_factor(kind, radius) - density * solvent_factor(kind, radius)
            self.factors[kind] = (inside * factor).astype(np.float32)
        half = np.arange(box_size // 2 + 1)[:, None] / (box_size * pixel_size)
        # exp(−B k²/4) is a product of one factor of kx and one of ky.
        self.damping = np.exp(-b_factors * half**2 / 4).astype(np.float32)

    def project_atoms(self, xy: np.ndarray) -> np.ndarray:
        """(box, box//2 + 1) rfft2 coefficients of atoms at (n, 2) x and y in Å from the centre."""
        half = self.box_size // 2
        waves_x = self._waves(xy[:, 0])
        waves_y = self._waves(xy[:, 1])
        # Rows of rfft2: 0, 1, … half − 1, −half, … −1.
        waves_y = np.concatenate([waves_y[:half], waves_y[half:0:-1].conj()])
        spectrum = np.zeros((self.box_size, half + 1), dtype=np.complex64)
        for kind, atoms in self.groups.items():
            slices = waves_y[:, atoms] @ waves_x[:, atoms].T
            spectrum += self.factors[kind] * slices
        return spectrum

    def _waves(self, x: np.ndarray) -> np.ndarray:
        """(box//2 + 1, n) exp(−B k²/4) exp(−2πi k x), counted from the corner of pixel 0."""
        length = self.box_size * self.pixel_size
        turn = np.exp(-2j * np.pi * (x / length + (self.box_size // 2) / self.box_size))
        powers = np.empty((self.box_size // 2 + 1, len(x)), dtype=np.complex128)
        powers[0] = 1.0
        powers[1:] = turn
        waves = np.multiply.accumulate(powers, axis=0)
        return waves.astype(np.complex64) * self.damping


def contrast_transfer(ctf: CTF, row: int, box_size: int, pixel_size: float) -> np.ndarray:
    """(box, box//2 + 1) weak-phase contrast transfer of one particle, RELION's convention.

    sin(χ + arcsin(A) + phase shift) with χ = πλΔk² − ½π Cs λ³k⁴ and Δ = ½(Δu + Δv) +
    ½(Δu − Δv) cos 2(φ − φ₀): positive at low frequency, for bright protein. A is the amplitude
    contrast, λ the relativistic wavelength.
    """
    parts = {field.name: getattr(ctf, field.name) for field in dataclasses.fields(ctf)}
    values = {name: float(part[row]) for name, part in parts.items() if part is not None}
    volts = 1e3 * values["voltage_kv"]
    wavelength = 12.2642598 / math.sqrt(volts + 0.9784764e-6 * volts**2)
    aberration = 1e7 * values["spherical_aberration_mm"]
    ky, kx = frequencies(box_size, pixel_size)
    squared = kx**2 + ky**2
    mean = (values["defocus_u"] + values["defocus_v"]) / 2
    half_difference = (values["defocus_u"] - values["defocus_v"]) / 2
    angle = np.arctan2(ky, kx) - values["defocus_angle"]
    defocus = mean + half_difference * np.cos(2 * angle)
    phase = np.pi * wavelength * defocus * squared
    phase -= np.pi / 2 * aberration * wavelength**3 * squared**2
    shift = math.asin(values["amplitude_contrast"]) + values["phase_shift"]
    return np.sin(phase + shift)


def transfer_of(particles: ParticleStack, row: int) -> np.ndarray | float:
    """The contrast transfer of the particle at `row`; 1 where there is none."""
    if particles.ctf is None:
        return 1.0
    return contrast_transfer(particles.ctf, row, particles.box_size, particles.pixel_size)


def project_particles(
    atoms: HeavyAtoms, coords: np.ndarray, frame: np.ndarray, particles: ParticleStack
) -> np.ndarray:
    """(n, box, box) float32 images without noise of (m, n_atoms, 3) `coords` in Å.

    Particle i shows ``coords[frame[i]]``, relative to the point at the centre of the box, at the
    pose and with the contrast transfer of ``particles[i]``: x' = R x + shift, projected along z.
    """
    rotations = particles.rotations.double().numpy()
    shifts = particles.shifts.double().numpy()
    box = particles.box_size
    images = np.empty((len(particles), box, box), dtype=np.float32)
    for row in range(len(particles)):
        xy = coords[frame[row]] @ rotations[row, :2].T + shifts[row]
        spectrum = atoms.project_atoms(xy) * transfer_of(particles, row)
        images[row] = np.fft.irfft2(spectrum, s=(box, box))
    return images


# What the particles show


@dataclass(frozen=True, eq=False)
class Molecule:
    """What the particles show.

    Attributes
    ----------
    reference : Structure
        The closed state, whose imaging atoms are Cα: what the program is given.
    elements : (n_heavy,) array of str
    b_factors : (n_heavy,) array
        Å², as in the file of the closed state.
    path : (N_FRAMES, n_heavy, 3) array
        Å, heavy atoms from the closed to the open state.
    alpha : (n_ca,) array
        Which of the heavy atoms are the reference's imaging atoms.
    """

    reference: Structure
    elements: np.ndarray
    b_factors: np.ndarray
    path: np.ndarray
    alpha: np.ndarray

    @property
    def alpha_path(self) -> np.ndarray:
        """(N_FRAMES, n_ca, 3) the same path of the reference's imaging atoms."""
        return self.path[:, self.alpha]


def load_molecule() -> Molecule:
    """GluA3: the heavy atoms of both states, superposed and joined by a path."""
    names = ("glua3-closed", "glua3-open")
    closed, opened = cc.match_structures(*(cc.load_structure(name) for name in names))
    heavy = cc.match_structures(*(cc.load_structure(name, atoms="heavy") for name in names))
    heavy_closed, heavy_opened = heavy
    # Superposed by the Cα, as everywhere else.
    rotation, translation = rigid_fit(opened.coords, closed.coords)
    moved = heavy_opened.atoms.getCoords() @ rotation.T + translation
    path = cc.morph(heavy_closed, heavy_opened.with_coords(moved), n=N_FRAMES)
    alpha = np.searchsorted(heavy_closed.rows, heavy_closed.node_rows)
    return Molecule(
        closed,
        heavy_closed.atoms.getElements()[heavy_closed.rows],
        heavy_closed.atoms.getBetas()[heavy_closed.rows],
        path,
        alpha,
    )


def states(kind: str) -> np.ndarray:
    """Frames of the path that particles show, each with the same probability.

    "path" is all of it, "rare" the open state for 5 % and the path's first two fifths for the
    others, "three" the closed, half and open states for 50, 30 and 20 %.
    """
    last = N_FRAMES - 1
    if kind == "path":
        return np.arange(N_FRAMES)
    if kind == "rare":
        common = np.linspace(0, 0.4 * last, 95).round().astype(int)
        return np.concatenate([common, np.full(5, last)])
    if kind == "three":
        return np.repeat([0, last // 2, last], [5, 3, 2])
    raise ValueError(f"expected states path, rare or three, got {kind!r}; try 'path'")


# Disturbances


@dataclass(frozen=True)
class Disturbance:
    """What is unlike a simulation of the library's own; by default nothing.

    Attributes
    ----------
    heavy : bool
        Images of heavy atoms by direct Fourier sums.
    solvent : float
        Share of the heavy atoms' scattering that the solvent takes away.
    b_factor : float or None
        Å², of every heavy atom; None takes the file's.
    brightness, noise_level : pair of float
        Lowest and highest factor of a particle, drawn log-uniformly.
    one_over_f : float
        Share of the noise's power that falls as 1/f; the others are white.
    through_ctf : float
        Share of the noise's power that passes through the particle's contrast transfer.
    junk : float
        Share of particles of which half are noise alone, and half are given a random orientation.
    bright_image : float
        Factor of one image.
    hot_pixel : float
        Value of a pixel of another image, in standard deviations of the noise.
    rotation_error : float
        Degrees, RMS angle between the rotations that the program is given and the true ones.
    shift_error : float
        Pixels, standard deviation of the error of the given shifts along x and along y.
    missing : int
        Residues that the reference lacks.
    micelle : float
        Power of a torus of Gaussians around one end, as a share of the molecule's own.
    pixel_factor : float
        Pixel size that the program is given over the true one.
    normalised : bool
        Every image has a background of mean 0 and standard deviation 1.
    states : str
        See `states`.
    two_microscopes : bool
        The second half of the particles is of another voltage and spherical aberration, which makes
        two optics groups. Of heavy atoms only.
    """

    heavy: bool = False
    solvent: float = 0.0
    b_factor: float | None = B_FACTOR
    brightness: tuple[float, float] = (1.0, 1.0)
    noise_level: tuple[float, float] = (1.0, 1.0)
    one_over_f: float = 0.0
    through_ctf: float = 0.0
    junk: float = 0.0
    bright_image: float = 1.0
    hot_pixel: float = 0.0
    rotation_error: float = 0.0
    shift_error: float = 0.0
    missing: int = 0
    micelle: float = 0.0
    pixel_factor: float = 1.0
    normalised: bool = False
    states: str = "path"
    two_microscopes: bool = False


_MILD = (0.7, 1.4)
_STRONG = (0.5, 2.0)
# What a user's refinement hands over: nothing is badly wrong.
PROJECT = Disturbance(
    heavy=True,
    solvent=SOLVENT_SHARE,
    brightness=_MILD,
    rotation_error=1.0,
    shift_error=0.3,
    through_ctf=0.3,
    junk=0.05,
    normalised=True,
    two_microscopes=True,
)
# Where a condition has one strength only, its name has none.
CONDITIONS = {
    "baseline": Disturbance(),
    "brightness-mild": Disturbance(brightness=_MILD),
    "brightness-strong": Disturbance(brightness=_STRONG),
    "noise_level-mild": Disturbance(noise_level=_MILD),
    "noise_level-strong": Disturbance(noise_level=_STRONG),
    "one_over_f-mild": Disturbance(one_over_f=0.5),
    "one_over_f-strong": Disturbance(one_over_f=1.0),
    "ctf_noise-mild": Disturbance(through_ctf=0.5),
    "ctf_noise-strong": Disturbance(through_ctf=1.0),
    "junk-mild": Disturbance(junk=0.1),
    "junk-strong": Disturbance(junk=0.3),
    "outlier-mild": Disturbance(bright_image=100.0),
    "outlier-strong": Disturbance(bright_image=1e6, hot_pixel=1e6),
    "pose-mild": Disturbance(rotation_error=2.0, shift_error=1.0),
    "pose-strong": Disturbance(rotation_error=4.0, shift_error=2.0),
    "missing-mild": Disturbance(missing=30),
    "missing-strong": Disturbance(missing=60),
    "micelle-mild": Disturbance(micelle=0.06),
    "micelle-strong": Disturbance(micelle=0.15),
    "heavy-mild": Disturbance(heavy=True),
    "heavy-strong": Disturbance(heavy=True, solvent=SOLVENT_SHARE),
    "pixel_size-mild": Disturbance(pixel_factor=1.01),
    "pixel_size-strong": Disturbance(pixel_factor=1.03),
    "normalised": Disturbance(normalised=True),
    "rare_state": Disturbance(states="rare"),
    "three_states": Disturbance(states="three"),
    "all-mild": Disturbance(
        heavy=True,
        solvent=SOLVENT_SHARE,
        brightness=_MILD,
        rotation_error=2.0,
        shift_error=0.5,
        through_ctf=0.5,
        junk=0.1,
        normalised=True,
    ),
}


def stream(seed: int, key: int) -> np.random.Generator:
    """The random numbers of one disturbance."""
    return np.random.default_rng([seed, key])


def draw_factors(limits: tuple[float, float], n: int, rng: np.random.Generator) -> np.ndarray:
    """(n,) factors, log-uniform between the limits."""
    low, high = limits
    return np.exp(rng.uniform(math.log(low), math.log(high), n))


def mark_junk(share: float, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """(n,) masks of the particles that are noise alone and that have a random orientation."""
    chosen = rng.permutation(n)[: round(share * n)]
    noise_alone = np.zeros(n, dtype=bool)
    misplaced = np.zeros(n, dtype=bool)
    noise_alone[chosen[: len(chosen) // 2]] = True
    misplaced[chosen[len(chosen) // 2 :]] = True
    return noise_alone, misplaced


def noise_power(
    one_over_f: float, through_ctf: float, transfer: np.ndarray | float, box_size: int
) -> np.ndarray:
    """(box, box//2 + 1) power of the noise at each frequency over that of white noise, mean 1.

    The power at zero frequency is that of the lowest other one.
    """
    ky, kx = frequencies(box_size, 1.0)
    radius = np.maximum(np.hypot(ky, kx), 1 / box_size)
    power = 1 - one_over_f + one_over_f * _mean_one(1 / radius)
    seen = _mean_one(np.broadcast_to(np.square(transfer), radius.shape))
    return _mean_one(power * (1 - through_ctf + through_ctf * seen))


def _mean_one(power: np.ndarray) -> np.ndarray:
    """The same with mean 1 over all box² frequencies, half of which rfft2 leaves out."""
    counts = np.full(power.shape, 2.0)
    counts[:, 0] = 1.0
    counts[:, -1] = 1.0
    return power * counts.sum() / (power * counts).sum()


def draw_noise(
    particles: ParticleStack, one_over_f: float, through_ctf: float, rng: np.random.Generator
) -> np.ndarray:
    """(n, box, box) float32 noise whose expected variance is 1 in every image."""
    n, box = len(particles), particles.box_size
    noise = rng.standard_normal((n, box, box), dtype=np.float32)
    if one_over_f == 0 and through_ctf == 0:
        return noise
    for row in range(n):
        power = noise_power(one_over_f, through_ctf, transfer_of(particles, row), box)
        spectrum = np.fft.rfft2(noise[row]) * np.sqrt(power)
        noise[row] = np.fft.irfft2(spectrum, s=(box, box))
    return noise


def add_outliers(
    images: np.ndarray,
    bright_image: float,
    hot_pixel: float,
    noise_std: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Images with one made brighter and a hot pixel in another, and (n,) which two they are."""
    images = images.copy()
    spoiled = np.zeros(len(images), dtype=bool)
    bright, hot = rng.permutation(len(images))[:2]
    if bright_image != 1:
        images[bright] *= bright_image
        spoiled[bright] = True
    if hot_pixel:
        y, x = rng.integers(0, images.shape[-1], 2)
        images[hot, y, x] = hot_pixel * noise_std
        spoiled[hot] = True
    return images, spoiled


def normalise(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images whose background has mean 0 and deviation 1, and (n,) what each was divided by.

    RELION's normalisation; the background is what lies outside a circle.
    """
    box = images.shape[-1]
    offsets = np.arange(box) - box // 2
    outside = np.hypot(offsets[:, None], offsets) > _BACKGROUND_RADIUS * box
    background = images[:, outside]
    mean = background.mean(1)[:, None, None]
    deviation = background.std(1)
    return (images - mean) / deviation[:, None, None], deviation


def disturb_rotations(
    rotations: np.ndarray, degrees: float, rng: np.random.Generator
) -> np.ndarray:
    """(n, 3, 3) rotations turned about random axes, by angles whose RMS is `degrees`."""
    rotvecs = rng.normal(0.0, math.radians(degrees) / math.sqrt(3), (len(rotations), 3))
    return Rotation.from_rotvec(rotvecs).as_matrix() @ rotations


def surface_stretch(structure: Structure, n: int) -> np.ndarray:
    """(n,) nodes of the stretch of `n` residues of one chain with the fewest neighbours."""
    coords = structure.node_coords
    chain = structure.node_chain
    pairs = cKDTree(coords).query_pairs(_NEIGHBOUR_DISTANCE, output_type="ndarray")
    near = (pairs[:, 1] - pairs[:, 0] <= _SEQUENCE_GAP) & (chain[pairs[:, 0]] == chain[pairs[:, 1]])
    neighbours = np.bincount(pairs[~near].ravel(), minlength=len(coords))
    sums = np.convolve(neighbours, np.ones(n), mode="valid")
    sums[chain[: len(sums)] != chain[n - 1 :]] = np.inf
    first = int(sums.argmin())
    return np.arange(first, first + n)


def without_residues(structure: Structure, nodes: np.ndarray) -> Structure:
    """The structure without these residues, with the same point at the centre of the box."""
    kept = np.flatnonzero(~np.isin(structure.atom_node, nodes))
    return cc.load_structure(structure.atoms[kept]).with_origin(structure.origin)


def micelle_beads(coords: np.ndarray) -> np.ndarray:
    """(beads, 3) Å, a torus about the molecule's longest axis near one of its ends.

    `coords` (n, 3) are relative to the centre of the box.
    """
    centre = coords.mean(0)
    axes = np.linalg.svd(coords - centre, full_matrices=False)[2]
    along = (coords - centre) @ axes[0]
    angles = 2 * np.pi * np.arange(_MICELLE_BEADS) / _MICELLE_BEADS
    ring = np.cos(angles)[:, None] * axes[1] + np.sin(angles)[:, None] * axes[2]
    return centre + (along.max() - _MICELLE_INSET) * axes[0] + _MICELLE_RADIUS * ring


def project_micelle(beads: np.ndarray, particles: ParticleStack) -> np.ndarray:
    """(n, box, box) images without noise of (k, 3) Gaussians at rest in the molecule's frame."""
    # A Gaussian of width σ is a point with the B-factor 8π²σ².
    b_factors = np.full(len(beads), 8 * np.pi**2 * _MICELLE_SIGMA**2)
    elements = np.full(len(beads), "C")
    atoms = HeavyAtoms(elements, b_factors, 0.0, particles.box_size, particles.pixel_size)
    return project_particles(atoms, beads[None], np.zeros(len(particles), dtype=int), particles)


def power_of(images: np.ndarray) -> float:
    """Variance over the pixels of an image, averaged over the images."""
    return float(images.var(axis=(1, 2)).mean())


# From disturbances to what the program is given


@dataclass(frozen=True, eq=False)
class Experiment:
    """What the program is given, and what is true of every particle.

    Attributes
    ----------
    reference : Structure
        What the program is given.
    particles : ParticleStack
        What the program is given; their `truth` is for the scores alone.
    truth : Truth
        Conformations of the reference's atoms, and which of them each particle shows.
    frame : (n,) array
        Which conformation each particle shows, 0 for the closed state.
    is_junk : (n,) bool array
        Noise alone, or a random orientation.
    is_spoiled : (n,) bool array
        Made much brighter, or with a hot pixel.
    scale : (n,) array
        Brightness over the clean image's; 0 for noise alone.
    noise_std : (n,) array
        Of the noise in the image as the program gets it.
    rotations, shifts : (n, 3, 3) and (n, 2) array
        The true ones; Å.
    """

    reference: Structure
    particles: ParticleStack
    truth: Truth
    frame: np.ndarray
    is_junk: np.ndarray
    is_spoiled: np.ndarray
    scale: np.ndarray
    noise_std: np.ndarray
    rotations: np.ndarray
    shifts: np.ndarray

    @property
    def is_good(self) -> np.ndarray:
        """(n,) bool: neither junk nor spoiled."""
        return ~(self.is_junk | self.is_spoiled)

    @property
    def rotation_error(self) -> np.ndarray:
        """(n,) degrees between the given and the true rotation."""
        return turn_angles(self.particles.rotations.double().numpy(), self.rotations)

    @property
    def shift_error(self) -> np.ndarray:
        """(n,) Å between the given and the true shift."""
        given = self.particles.shifts.double().numpy()
        return np.linalg.norm(given - self.shifts, axis=1)


def turn_angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n,) degrees from the rotations `a` to `b`, (n, 3, 3)."""
    return np.degrees(Rotation.from_matrix(a @ b.transpose(0, 2, 1)).magnitude())


def make_experiment(
    molecule: Molecule, disturbance: Disturbance, n: int, box_size: int, snr_db: float, seed: int
) -> Experiment:
    """Particles of the molecule, and what the program is told of them.

    The noise is that of `snr_db` beside the molecule's clean images, before any particle's own
    brightness and noise level.
    """
    clean, stack, frame = draw_clean(molecule, disturbance, n, box_size, seed)
    base_std = math.sqrt(power_of(clean) / 10 ** (snr_db / 10))
    if disturbance.micelle:
        origin = molecule.reference.origin
        blob = project_micelle(micelle_beads(molecule.reference.coords - origin), stack)
        clean = clean + blob * math.sqrt(disturbance.micelle * power_of(clean) / power_of(blob))

    noise_alone, misplaced = mark_junk(disturbance.junk, n, stream(seed, _JUNK))
    scale = draw_factors(disturbance.brightness, n, stream(seed, _BRIGHTNESS))
    scale[noise_alone] = 0.0
    levels = draw_factors(disturbance.noise_level, n, stream(seed, _NOISE_LEVEL))
    noise_std = base_std * levels
    shares = (disturbance.one_over_f, disturbance.through_ctf)
    noise = draw_noise(stack, *shares, stream(seed, _NOISE))
    images = clean * scale[:, None, None] + noise * noise_std[:, None, None]
    images, is_spoiled = add_outliers(
        images,
        disturbance.bright_image,
        disturbance.hot_pixel,
        base_std,
        stream(seed, _OUTLIERS),
    )
    if disturbance.normalised:
        images, divided = normalise(images)
        scale = scale / divided
        noise_std = noise_std / divided
    told = tell_program(molecule, disturbance, stack, misplaced, seed)
    reference, conformations = remove_residues(molecule, disturbance.missing)
    truth = Truth(
        noise_std=float(np.median(noise_std)),
        snr_db=snr_db,
        conformations=torch.from_numpy(conformations),
        frame=torch.from_numpy(frame),
    )
    particles = ParticleStack(
        images.astype(np.float32),
        told.rotations,
        told.shifts,
        pixel_size=told.pixel_size,
        ctf=told.ctf,
        truth=truth,
    )
    return Experiment(
        reference,
        particles,
        truth,
        frame,
        noise_alone | misplaced,
        is_spoiled,
        scale,
        noise_std,
        stack.rotations.double().numpy(),
        stack.shifts.double().numpy(),
    )


def draw_clean(
    molecule: Molecule, disturbance: Disturbance, n: int, box_size: int, seed: int
) -> tuple[np.ndarray, ParticleStack, np.ndarray]:
    """(n, box, box) images without noise, particles with their true poses, and (n,) frames."""
    shown = states(disturbance.states)
    alpha_path = molecule.alpha_path
    stack = cc.simulate_particles(
        molecule.reference,
        n,
        conformations=alpha_path[shown],
        box_size=box_size,
        snr_db=math.inf,
        shift_std=_SHIFT_STD,
        seed=seed,
        device="cpu",
        progress=False,
    )
    if not isinstance(stack.truth, Truth) or stack.truth.frame is None:
        raise ValueError("expected particles of known conformations, got others; try a morph")
    frame = shown[stack.truth.frame.numpy()]
    if not disturbance.heavy:
        return stack.read_images().numpy(), stack, frame
    if disturbance.two_microscopes:
        stack = replace(stack, ctf=second_half_elsewhere(stack.ctf))
    b_factors = molecule.b_factors
    if disturbance.b_factor is not None:
        b_factors = np.full(len(b_factors), disturbance.b_factor)
    atoms = HeavyAtoms(
        molecule.elements, b_factors, disturbance.solvent, box_size, stack.pixel_size
    )
    coords = molecule.path - molecule.reference.origin
    # In units of a mean residue's scattering, as the library's images are: the brightness that a
    # refinement finds is then comparable.
    unit = scattering(molecule.elements) / molecule.reference.n_atoms
    images = project_particles(atoms, coords, frame, stack) / np.float32(unit)
    return images, stack, frame


def second_half_elsewhere(ctf: CTF) -> CTF:
    """A CTF whose second half of particles is of a microscope of 200 kV and 2.0 mm."""
    voltage_kv = ctf.voltage_kv.clone()
    voltage_kv[len(ctf) // 2 :] = 200.0
    spherical_aberration_mm = ctf.spherical_aberration_mm.clone()
    spherical_aberration_mm[len(ctf) // 2 :] = 2.0
    return replace(ctf, voltage_kv=voltage_kv, spherical_aberration_mm=spherical_aberration_mm)


@dataclass(frozen=True, eq=False)
class Told:
    """What the program is told of the particles' poses and of their microscope."""

    rotations: np.ndarray
    shifts: np.ndarray
    pixel_size: float
    ctf: CTF | None


def tell_program(
    molecule: Molecule,
    disturbance: Disturbance,
    stack: ParticleStack,
    misplaced: np.ndarray,
    seed: int,
) -> Told:
    """Poses with their errors, and the pixel size with its own.

    Shifts are measured in pixels, so they scale with a wrong pixel size. So does the root of the
    defocus: it was fitted to the same micrographs' rings, which tell defocus · k².
    """
    rotations = stack.rotations.double().numpy()
    rng = stream(seed, _ROTATION_ERRORS)
    rotations = disturb_rotations(rotations, disturbance.rotation_error, rng)
    rng = stream(seed, _JUNK_ROTATIONS)
    rotations[misplaced] = Rotation.random(len(rotations), rng).as_matrix()[misplaced]
    rng = stream(seed, _SHIFT_ERRORS)
    errors = rng.normal(0.0, disturbance.shift_error * stack.pixel_size, (len(rotations), 2))
    factor = disturbance.pixel_factor
    ctf = stack.ctf
    if ctf is not None:
        ctf = replace(ctf, defocus_u=ctf.defocus_u * factor**2, defocus_v=ctf.defocus_v * factor**2)
    shifts = factor * (stack.shifts.double().numpy() + errors)
    return Told(rotations, shifts, factor * stack.pixel_size, ctf)


def remove_residues(molecule: Molecule, n: int) -> tuple[Structure, np.ndarray]:
    """The reference without `n` residues, and the path (m, atoms, 3) of the atoms that are left."""
    reference = molecule.reference
    if not n:
        return reference, molecule.alpha_path
    lost = surface_stretch(reference, n)
    kept = np.flatnonzero(~np.isin(reference.node_index, lost))
    return without_residues(reference, lost), molecule.alpha_path[:, kept]


# Scores


def superpose_all(coords: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, atoms, 3) conformations superposed on one or n targets, and their rotations (n, 3, 3).

    Least squares, without mirror images (Kabsch 1976): ``moved ≈ (coords − mean) @ Rᵀ + mean of
    the target``.
    """
    target = np.broadcast_to(target, coords.shape)
    centre = coords.mean(1, keepdims=True)
    goal = target.mean(1, keepdims=True)
    covariance = (target - goal).transpose(0, 2, 1) @ (coords - centre)
    u, _, vt = np.linalg.svd(covariance)
    signs = np.ones((len(coords), 3))
    signs[:, 2] = np.sign(np.linalg.det(u @ vt))
    rotations = (u * signs[:, None]) @ vt
    return (coords - centre) @ rotations.transpose(0, 2, 1) + goal, rotations


def motion_scores(found: np.ndarray, true: np.ndarray) -> tuple[float, float, np.ndarray]:
    """Explained motion, pooled RMSD in Å, and the RMSD of each of (n, atoms, 3) conformations."""
    per_particle = np.sqrt(((found - true) ** 2).sum(2).mean(1))
    square = float((per_particle**2).mean())
    of_mean = float(((true - true.mean(0)) ** 2).sum(2).mean())
    explained = 1 - square / of_mean if of_mean > 0 else float("nan")
    return explained, math.sqrt(square), per_particle


def coords_of(result: cc.Result) -> np.ndarray:
    """(n, atoms, 3) decoded coordinates in double precision."""
    return result.decode().double().numpy()


def score_conformations(experiment: Experiment, result: cc.Result) -> dict:
    """How near the good particles' conformations are to the true ones, in both frames."""
    good = np.flatnonzero(experiment.is_good)
    reference = experiment.reference.coords
    found = coords_of(result[good])
    true = experiment.truth.coords(good).double().numpy()
    explained_given, rmsd_given, _ = motion_scores(found, true)
    moved_found, _ = superpose_all(found, reference)
    moved_true, _ = superpose_all(true, reference)
    explained, rmsd, each = motion_scores(moved_found, moved_true)
    rotation_left, shift_left = pose_errors_left(experiment, found, true, good)
    return {
        "explained": explained,
        "rmsd": rmsd,
        "explained_given": explained_given,
        "rmsd_given": rmsd_given,
        "n_stuck": int((each > _STUCK_RATIO * np.median(each)).sum()),
        "rotation_error": rms(experiment.rotation_error[good]),
        "rotation_error_left": rms(rotation_left),
        "shift_error": rms(experiment.shift_error[good]),
        "shift_error_left": rms(shift_left),
    }


def pose_errors_left(
    experiment: Experiment, found: np.ndarray, true: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(k,) degrees and Å by which the found molecule, as a whole, is off on the image.

    A refinement that takes up a pose error as a motion of all chains leaves none.
    """
    particles = experiment.particles
    origin = experiment.reference.origin
    given = particles.rotations[rows].double().numpy()
    seen = (found - origin) @ given.transpose(0, 2, 1)
    truly = (true - origin) @ experiment.rotations[rows].transpose(0, 2, 1)
    _, rotations = superpose_all(seen, truly)
    angles = np.degrees(Rotation.from_matrix(rotations).magnitude())
    offsets = seen.mean(1)[:, :2] + particles.shifts[rows].double().numpy()
    offsets -= truly.mean(1)[:, :2] + experiment.shifts[rows]
    return angles, np.linalg.norm(offsets, axis=1)


def rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def score_component(experiment: Experiment, result: cc.Result) -> dict:
    """PC1 of all particles against the truth of the good ones: rank order, and error bars.

    In the molecule's own frame where the library knows one, else in that of the given poses.
    """
    good = np.flatnonzero(experiment.is_good)
    model = result.model
    if hasattr(result, "in_frame"):
        result = result.in_frame("molecule")
        true = true_latents_in_frame(experiment, model)
    else:
        true, _ = true_latents(model, experiment.particles)
    motions = cc.compute_pca(result)
    found_scores = motions.transform(result)
    frame = experiment.frame[good]
    row = {"spearman": correlation(found_scores[good, 0], frame)}
    step = -(-len(good) // _N_COVERAGE)
    rows = good[::step]
    direction = motions.components[0]
    covariance = posterior_covariance(result, rows, device="cpu").double().numpy()
    half_width = 1.96 * np.sqrt(np.einsum("i,nij,j->n", direction, covariance, direction))
    errors = found_scores[rows, 0] - motions.transform(true[rows])[:, 0]
    row["coverage"] = float((np.abs(errors) < half_width).mean())
    return row | score_clusters(found_scores[good], frame)


def true_latents_in_frame(experiment: Experiment, model: cc.Model) -> torch.Tensor:
    """(n, p) best latents of the true conformations, each superposed on the reference."""
    rows, row_of_particle = experiment.truth.distinct_rows()
    coords = experiment.truth.coords(rows.numpy()).double().numpy()
    moved, _ = superpose_all(coords, experiment.reference.coords)
    latents = model.dynamics.fit(torch.from_numpy(moved).float())
    return latents.cpu()[row_of_particle]


def score_clusters(scores: np.ndarray, frame: np.ndarray) -> dict:
    """Adjusted Rand index of three Gaussians fitted to 2, 3 and 5 components.

    Empty unless the particles show three states.
    """
    from sklearn.metrics import adjusted_rand_score
    from sklearn.mixture import GaussianMixture

    if len(np.unique(frame)) != 3:
        return {}
    row = {}
    for k in (2, 3, 5):
        mixture = GaussianMixture(3, n_init=5, random_state=0)
        groups = mixture.fit_predict(scores[:, :k])
        row[f"ari_{k}"] = float(adjusted_rand_score(frame, groups))
    return row


def score_images(experiment: Experiment, result: cc.Result) -> dict:
    """How well brightness and noise of the good particles were measured; empty where they were not.

    Standard deviation of the logarithm of found over true: a factor that all share is no error.
    """
    good = experiment.is_good
    row = {}
    for column, name, true in (
        ("scale_error", "scale", experiment.scale),
        ("noise_error", "noise", experiment.noise_std),
    ):
        found = getattr(result, name, None)
        if found is not None:
            found = np.maximum(np.asarray(found)[good], 1e-12)
            row[column] = float(np.std(np.log(found / true[good])))
    return row


def score_responsibility(experiment: Experiment, result: cc.Result) -> dict:
    """How well the result tells junk from good particles; empty where it does not try."""
    from sklearn.metrics import roc_auc_score

    responsibility = getattr(result, "responsibility", None)
    if responsibility is None:
        return {}
    responsibility = np.asarray(responsibility)
    row: dict = {"good_called_junk": int((responsibility[experiment.is_good] < 0.5).sum())}
    if experiment.is_junk.any():
        row["auc"] = float(roc_auc_score(experiment.is_junk, -responsibility))
    return row


def move_of_others(experiment: Experiment, result: cc.Result, undisturbed: cc.Result) -> float:
    """Å, RMS move of the good particles' atoms between two refinements, superposed."""
    good = np.flatnonzero(experiment.is_good)
    reference = experiment.reference.coords
    moved, _ = superpose_all(coords_of(result[good]), reference)
    before, _ = superpose_all(coords_of(undisturbed[good]), reference)
    return float(np.sqrt(((moved - before) ** 2).sum(2).mean()))


# Command line

COLUMNS = (
    "condition",
    "strength",
    "seed",
    "source",
    "n",
    "box",
    "snr_db",
    "modes",
    "explained",
    "rmsd",
    "explained_given",
    "rmsd_given",
    "spearman",
    "coverage",
    "auc",
    "good_called_junk",
    "n_junk",
    "n_stuck",
    "rotation_error",
    "rotation_error_left",
    "shift_error",
    "shift_error_left",
    "scale_error",
    "noise_error",
    "move_of_others",
    "ari_2",
    "ari_3",
    "ari_5",
    "seconds",
    "passes",
    "version",
    "error",
)
# What makes two rows the same experiment: the later one replaces the earlier.
_KEY = ("condition", "strength", "seed", "source", "n", "box", "snr_db", "modes")


def run_condition(
    molecule: Molecule, name: str, disturbance: Disturbance, args: argparse.Namespace
) -> dict:
    """One row of the table."""
    condition, _, strength = name.partition("-")
    row = {
        "condition": condition,
        "strength": strength,
        "seed": args.seed,
        "source": "heavy atoms" if disturbance.heavy else "library",
        "n": args.n,
        "box": args.box,
        "snr_db": args.snr,
        "modes": args.modes,
        "version": version(),
    }
    experiment = make_experiment(molecule, disturbance, args.n, args.box, args.snr, args.seed)
    row["n_junk"] = int(experiment.is_junk.sum())
    model = cc.Model(experiment.reference, experiment.particles, modes=args.modes or None)
    began = time.perf_counter()
    try:
        result = cc.refine(model, experiment.particles, progress=False, device=args.device)
    except ValueError as error:
        # A refusal is an answer as well.
        return row | {"error": str(error), "seconds": time.perf_counter() - began}
    row |= {"seconds": time.perf_counter() - began, "passes": len(result.history)}
    row |= score_conformations(experiment, result)
    row |= score_component(experiment, result)
    row |= score_images(experiment, result)
    row |= score_responsibility(experiment, result)
    if experiment.is_spoiled.any():
        calm = replace(disturbance, bright_image=1.0, hot_pixel=0.0)
        other = make_experiment(molecule, calm, args.n, args.box, args.snr, args.seed)
        undisturbed = cc.refine(model, other.particles, progress=False, device=args.device)
        row["move_of_others"] = move_of_others(experiment, result, undisturbed)
    return row


def version() -> str:
    """Version of the library and, in a clone, the commit."""
    here = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, cwd=here, capture_output=True, text=True).stdout.strip()
    return f"{cc.__version__}+{commit}" if commit else cc.__version__


def add_row(path: Path, row: dict) -> None:
    """Add a row to the table; of the same experiment, it replaces a row."""
    add_texts(path, {column: as_text(row.get(column)) for column in COLUMNS}, _KEY)


def add_texts(path: Path, texts: dict[str, str], key: Iterable[str] = ()) -> None:
    """Write a table anew with one row more, in place of rows that are alike in all of `key`."""
    rows = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as stream_in:
            rows = list(csv.DictReader(stream_in))
    key = tuple(key)
    if key:
        rows = [old for old in rows if any(old.get(name) != texts[name] for name in key)]
    # In the order of the new row; columns that only older rows have come last.
    names = list(dict.fromkeys(name for one in (texts, *rows) for name in one))
    with atomic_path(path) as part, part.open("w", newline="", encoding="utf-8") as stream_out:
        writer = csv.DictWriter(stream_out, names)
        writer.writeheader()
        writer.writerows([*rows, texts])


def as_text(value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


# Heading, column and width of the printed table.
_PRINTED = (
    ("explained", "explained", 10),
    ("(given)", "explained_given", 9),
    ("RMSD", "rmsd", 7),
    ("Spearman", "spearman", 9),
    ("coverage", "coverage", 9),
    ("AUC", "auc", 7),
    ("lost", "good_called_junk", 6),
    ("turn left", "rotation_error_left", 10),
    ("shift left", "shift_error_left", 11),
    ("passes", "passes", 7),
    ("s", "seconds", 7),
)


def print_heading() -> None:
    print(f"{'condition':20}" + "".join(f"{title:>{width}}" for title, _, width in _PRINTED))


def print_row(row: dict) -> None:
    name = "-".join(filter(None, (row["condition"], row["strength"])))
    cells = "".join(f"{short(row.get(column)):>{width}}" for _, column, width in _PRINTED)
    extras = {key: row[key] for key in COLUMNS if key in row and key.startswith(("ari", "move"))}
    notes = [f"{key} {short(value)}" for key, value in extras.items()]
    notes += [row["error"]] if "error" in row else []
    print(f"{name:20}{cells}  {'; '.join(notes)}".rstrip(), flush=True)


def short(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_project(folder: Path, molecule: Molecule, args: argparse.Namespace) -> None:
    """Files as a refinement leaves them: run_data.star, its images, and fitted.pdb.

    And truth.csv, which no refinement has: each particle's state, 0 closed to 1 open, and whether
    it is junk.
    """
    experiment = make_experiment(molecule, PROJECT, args.n, args.box, args.snr, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    replace(experiment.particles, truth=None).save(folder / "run_data.star")
    # The frame of a map whose origin is at its corner, as RELION and cryoSPARC write them.
    centre = experiment.particles.box_size // 2 * experiment.particles.pixel_size
    atoms = experiment.reference.atoms.copy()
    atoms.setCoords(atoms.getCoords() - experiment.reference.origin + centre)
    with atomic_path(folder / "fitted.pdb") as part:
        prody.writePDB(str(part), atoms)
    ids = cc.load_particles(folder / "run_data.star").ids
    rows = zip(ids, experiment.frame, experiment.is_junk, strict=True)
    with atomic_path(folder / "truth.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["particle", "state", "junk"])
        for name, frame, junk in rows:
            writer.writerow([name, f"{frame / (len(molecule.path) - 1):.3f}", int(junk)])
    print(f"{folder}: run_data.star with {args.n} synthetic particles, fitted.pdb, truth.csv")


def chosen_conditions(names: Iterable[str]) -> dict[str, Disturbance]:
    """The conditions of these names, all of them where none is given."""
    names = list(names) or list(CONDITIONS)
    unknown = [name for name in names if name not in CONDITIONS]
    if unknown:
        raise ValueError(
            f"expected conditions among {', '.join(CONDITIONS)}, got {', '.join(unknown)}; "
            "try baseline"
        )
    return {name: CONDITIONS[name] for name in names}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--conditions", nargs="*", default=[], help="such as baseline junk-strong; default all")
    add("--n", type=int, default=600, help="particles")
    add("--box", type=int, default=64, help="pixels a side")
    add("--snr", type=float, default=0.0, help="10·log10(signal variance / noise variance)")
    add("--modes", type=int, default=10, help="normal modes a chain")
    add("--seed", type=int, default=0, help="of poses, states, noise and disturbances")
    add("--independent", action="store_true", help="heavy atoms in solvent in every condition")
    add("--device", default=None, help="of the refinement; by default a GPU where there is one")
    add("--out", type=Path, default=Path("results/realism.csv"), help="table that rows go to")
    add("--project", type=Path, help="write a folder of files for other programs instead, and end")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    try:
        conditions = chosen_conditions(args.conditions)
    except ValueError as error:
        sys.exit(str(error))
    molecule = load_molecule()
    if args.project:
        write_project(args.project, molecule, args)
        return
    print_heading()
    for name, disturbance in conditions.items():
        if args.independent and not disturbance.heavy:
            disturbance = replace(disturbance, heavy=True, solvent=SOLVENT_SHARE)
        row = run_condition(molecule, name, disturbance, args)
        add_row(args.out, row)
        print_row(row)


if __name__ == "__main__":
    main()
