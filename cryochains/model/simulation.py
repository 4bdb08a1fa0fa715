"""Particle images of known conformations, poses, CTFs and noise (Eq. 3, Appendix B).

Symbols of the paper: X → conformations or decoded latents, R → random rotations, t → shifts,
PSF → CTF, ε → noise.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._arguments import WITH_NAN, Angstroms, Count, Decibels, NotNegative, Seed, checked
from .._devices import choose_device
from ..images import (
    CTF,
    ParticleStack,
    load_particles,
    noise_std_for_snr,
    random_rotations,
    write_particles,
)
from ..molecule import Beads, Structure, move_beads
from .dynamics import Dynamics
from .microscope import Microscope, require_fit_in_box
from .model import beads_of
from .truth import Truth

# Å, radians, kV, mm; a pair is a range to draw from. Those of a 300 kV microscope.
_CTF_RANGES: dict = {
    "defocus": (10_000.0, 25_000.0),
    "astigmatism": (0.0, 500.0),
    "defocus_angle": (0.0, math.pi),
    "phase_shift": 0.0,
    "voltage_kv": 300.0,
    "spherical_aberration_mm": 2.7,
    "amplitude_contrast": 0.1,
}
# Share of the box that the molecule's largest extent takes.
_FILLED_SHARE = 0.85
# Å beyond the centre of the outermost atom where nothing is left to see.
_MARGIN = 6.0
# So many images' variance sets the noise.
_N_FOR_SNR = 512
# Streams of random numbers: each quantity has its own, so that drawing one more changes no other.
_FRAMES, _SHIFTS, _OPTICS, _NOISE = range(4)


@checked
def simulate_particles(
    structure: Structure,
    n_particles: Count,
    *,
    conformations: Annotated[np.ndarray | Tensor, WITH_NAN] | None = None,
    dynamics: Dynamics | None = None,
    latents: Annotated[np.ndarray | Tensor, WITH_NAN] | None = None,
    box_size: Count = 64,
    pixel_size: Angstroms | None = None,
    snr_db: Decibels = 0.0,
    sigma: Angstroms | None = None,
    ctf: bool | Mapping = True,
    shift_std: NotNegative = 0.0,
    seed: Seed = 0,
    path: str | os.PathLike | None = None,
    device: str | torch.device | None = None,
    chunk_size: Count = 256,
    progress: bool = True,
) -> ParticleStack:
    """Simulate particle images of a molecule that moves.

    Parameters
    ----------
    structure : Structure
        Says how much each atom scatters and which point is at the centre of the box.
    n_particles : int
    conformations : (m, n_atoms, 3) array
        Coordinates in Å, such as of ``morph``. Each particle shows one of them, drawn uniformly.
    dynamics, latents : Dynamics and (n_particles, n_latents) array
        Instead of `conformations`: every particle shows its own decoded latents.
    box_size : int
        Pixels a side, even.
    pixel_size : float, optional
        Å. By default the molecule fills 85 % of the box at its largest extent.
    snr_db : float
        10·log10(signal variance / noise variance), over the data set. ``math.inf`` adds no noise.
    sigma : float, optional
        Draws one Gaussian of this width in Å at every imaging atom, as the paper does; by default
        two beads a residue, as `Model` does.
    ctf : bool or mapping
        True: 300 kV, Cs 2.7 mm, amplitude contrast 0.1, defocus 1–2.5 µm. False: none. A mapping
        changes some of "defocus" and "astigmatism" (Å), "defocus_angle" and "phase_shift"
        (radians), "voltage_kv", "spherical_aberration_mm", "amplitude_contrast": a number, or a
        pair to draw from uniformly.
    shift_std : float
        Standard deviation of the shifts along x and y, Å.
    seed : int
        The same seed gives the same particles, whatever `chunk_size` is and wherever they go.
    path : path, optional
        A .star file to write, with the .mrcs beside it. Images go straight there and are read
        lazily.
    device : torch device, optional
        Where the images are computed; by default a GPU where there is one.
    chunk_size : int
        Images computed at a time.
    progress : bool
        Show a progress bar.

    Returns
    -------
    ParticleStack
        With ``truth``: coordinates, latents or morph coordinate, and noise of every particle.

    Raises
    ------
    ValueError
        When the motion does not fit the structure, the molecule does not fit the box, or the folder
        cannot be written.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> particles = simulate_particles(
    ...     closed, 4, conformations=closed.coords[None], box_size=32, progress=False
    ... )
    >>> particles.read_images().shape, particles.truth.coords().shape == (4, closed.n_atoms, 3)
    (torch.Size([4, 32, 32]), True)
    """
    if conformations is not None and dynamics is None and latents is None:
        truth = _truth_of_conformations(structure, conformations, n_particles, snr_db, seed)
    elif conformations is None and dynamics is not None and latents is not None:
        truth = _truth_of_latents(structure, dynamics, latents, n_particles, snr_db)
    else:
        raise ValueError(_either_or(conformations, dynamics, latents))

    farthest = _farthest_coords(truth, structure.origin, chunk_size)
    if pixel_size is None:
        pixel_size = _filling_pixel_size(farthest, structure.origin, box_size)
    require_fit_in_box(farthest, structure.origin, box_size, pixel_size)
    device = choose_device(device)
    beads = beads_of(structure, sigma)
    microscope = Microscope(beads.weights, box_size, pixel_size, structure.origin, beads.widths)
    optics = None
    if ctf is not False:
        optics = _draw_ctf({} if ctf is True else ctf, n_particles, seed)
    shifts = _stream(seed, _SHIFTS).normal(0.0, shift_std, (n_particles, 2))
    poses = _Poses(random_rotations(n_particles, seed), torch.from_numpy(shifts).float(), optics)
    microscope = microscope.to(device)

    def clean(rows: Tensor) -> Tensor:
        return _clean_images(microscope, _bead_coords(structure, beads, truth, rows), poses, rows)

    measured = torch.arange(min(n_particles, _N_FOR_SNR)).split(chunk_size)
    noise_std = noise_std_for_snr(torch.cat([clean(rows) for rows in measured]), snr_db)
    truth = replace(truth, noise_std=noise_std)
    chunks = _noisy_chunks(clean, n_particles, noise_std, box_size, seed, chunk_size, progress)
    if path is not None:
        write_particles(
            path,
            chunks,
            rotations=poses.rotations,
            shifts=poses.shifts,
            pixel_size=pixel_size,
            box_size=box_size,
            ctf=optics,
        )
        return replace(load_particles(path), truth=truth)
    images = torch.empty(n_particles, box_size, box_size)
    for part, chunk in zip(images.split(chunk_size), chunks, strict=True):
        part.copy_(chunk)
    return ParticleStack(
        images, poses.rotations, poses.shifts, pixel_size=pixel_size, ctf=optics, truth=truth
    )


@dataclass(frozen=True, eq=False)
class _Poses:
    """(n, 3, 3) rotations, (n, 2) shifts in Å and the CTFs of n particles."""

    rotations: Tensor
    shifts: Tensor
    ctf: CTF | None


def _bead_coords(structure: Structure, beads: Beads, truth: Truth, rows: Tensor) -> Tensor:
    """(k, n_beads, 3) float32 Å, beads of the particles at `rows`."""
    if truth.dynamics is not None and truth.latents is not None:
        return truth.dynamics.with_beads(beads).decode(truth.latents[rows])
    return torch.from_numpy(move_beads(structure, beads, truth.coords(rows).numpy())).float()


@torch.no_grad()
def _clean_images(microscope: Microscope, coords: Tensor, poses: _Poses, rows: Tensor) -> Tensor:
    """(k, box, box) images without noise of the particles at `rows`, on the CPU."""
    device = microscope.device
    transfer = None
    if poses.ctf is not None:
        transfer = poses.ctf[rows].evaluate(microscope.box_size, microscope.pixel_size, device)
    rotations, shifts = poses.rotations[rows].to(device), poses.shifts[rows].to(device)
    return microscope.render(coords.to(device), rotations, shifts, transfer).cpu()


def _noisy_chunks(
    clean: Callable[[Tensor], Tensor],
    n: int,
    noise_std: float,
    box_size: int,
    seed: int,
    chunk_size: int,
    progress: bool,
) -> Iterator[Tensor]:
    with tqdm(total=n, desc="simulating", unit="particle", disable=not progress) as bar:
        for rows in torch.arange(n).split(chunk_size):
            yield clean(rows) + noise_std * _noise(rows, box_size, seed)
            bar.update(len(rows))


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _noise(rows: Tensor, box_size: int, seed: int) -> Tensor:
    # A generator for each particle: the noise does not depend on how particles are grouped.
    shape = (box_size, box_size)
    noise = [
        _stream(seed, _NOISE, row).standard_normal(shape, dtype=np.float32) for row in rows.tolist()
    ]
    return torch.from_numpy(np.stack(noise))


def _either_or(conformations, dynamics, latents) -> str:
    given = {"conformations": conformations, "dynamics": dynamics, "latents": latents}
    names = " and ".join(name for name, value in given.items() if value is not None) or "nothing"
    return (
        f"expected either conformations, or dynamics and latents, got {names}; "
        "try conformations=structure.coords[None]"
    )


def _truth_of_conformations(
    structure: Structure, conformations: np.ndarray | Tensor, n: int, snr_db: float, seed: int
) -> Truth:
    coords = torch.as_tensor(np.asarray(conformations), dtype=torch.float32)
    expected = (structure.n_atoms, 3)
    if coords.ndim != 3 or coords.shape[1:] != expected or not len(coords):
        raise ValueError(
            f"expected conformations of shape (m, {structure.n_atoms}, 3), got "
            f"{tuple(coords.shape)}; try structure.coords[None] or morph(a, b)"
        )
    if not torch.isfinite(coords).all():
        raise ValueError(
            "expected finite coordinates in Å, got NaN or Inf in conformations; "
            "try leaving those conformations out"
        )
    frame = torch.from_numpy(_stream(seed, _FRAMES).integers(0, len(coords), n))
    return Truth(0.0, snr_db, conformations=coords, frame=frame)


def _truth_of_latents(
    structure: Structure,
    dynamics: Dynamics,
    latents: np.ndarray | Tensor,
    n: int,
    snr_db: float,
) -> Truth:
    latents = torch.as_tensor(latents, dtype=torch.float32).cpu()
    expected = (n, dynamics.n_latents)
    if tuple(latents.shape) != expected or not torch.isfinite(latents).all():
        raise ValueError(
            f"expected finite latents of shape {expected}, one row a particle, "
            f"got {tuple(latents.shape)}; try n_particles=len(latents)"
        )
    if dynamics.structure.n_atoms != structure.n_atoms:
        raise ValueError(
            f"expected dynamics of {structure!r}, got dynamics of {dynamics.structure!r}; "
            "try simulate_particles(dynamics.structure, …)"
        )
    return Truth(0.0, snr_db, dynamics=dynamics.to("cpu"), latents=latents)


def _farthest_coords(truth: Truth, origin: np.ndarray, chunk_size: int) -> np.ndarray:
    """(3,) position, over all conformations, of the atom farthest from `origin`."""
    if truth.conformations is not None:
        chunks = iter(truth.conformations.split(chunk_size))
    else:
        chunks = map(truth.coords, torch.arange(len(truth)).split(chunk_size))
    farthest = []
    for chunk in chunks:
        coords = chunk.reshape(-1, 3).numpy()
        farthest.append(coords[np.linalg.norm(coords - origin, axis=1).argmax()])
    return farthest[int(np.linalg.norm(np.stack(farthest) - origin, axis=1).argmax())]


def _filling_pixel_size(farthest: np.ndarray, origin: np.ndarray, box_size: int) -> float:
    extent = 2 * (np.linalg.norm(farthest - origin) + _MARGIN)
    return math.ceil(100 * extent / (_FILLED_SHARE * box_size)) / 100


def _draw_ctf(changes: Mapping, n: int, seed: int) -> CTF:
    unknown = sorted(set(changes) - set(_CTF_RANGES))
    if unknown:
        raise ValueError(
            f"expected CTF ranges among {', '.join(_CTF_RANGES)}, got {', '.join(unknown)}; "
            "try ctf=True"
        )
    drawn = {}
    for key, (name, value) in enumerate({**_CTF_RANGES, **changes}.items()):
        low, high = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,))
        drawn[name] = _stream(seed, _OPTICS, key).uniform(low, high, n)
    defocus = drawn.pop("defocus")
    half = drawn.pop("astigmatism") / 2
    drawn["defocus_u"] = defocus + half
    drawn["defocus_v"] = defocus - half
    return CTF(**{name: torch.from_numpy(values) for name, values in drawn.items()})
