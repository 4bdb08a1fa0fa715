"""Particle images of known conformations, poses, CTFs and noise (Eq. 3, Appendix B).

Symbols of the paper: X → conformations or decoded latents, R → random rotations, t → shifts, PSF → CTF,
ε → noise.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .dynamics import Dynamics
from .imaging import CTF, Imaging, check_fits_in_box, noise_std_for_snr, random_rotations
from .particles import ParticleStack, load_particles
from .relion import check_star_path, image_names, new_blocks, write_particles
from .structure import Structure
from .truth import Truth

# Å, radians, kV, mm; a pair is a range to draw from. Those of a 300 kV microscope.
CTF_RANGES = {
    "defocus": (10_000.0, 25_000.0),
    "astigmatism": (0.0, 500.0),
    "defocus_angle": (0.0, math.pi),
    "phase_shift": 0.0,
    "voltage_kv": 300.0,
    "spherical_aberration_mm": 2.7,
    "amplitude_contrast": 0.1,
}
FILL = 0.85  # of the box, by the molecule's largest extent
MEASURED = 512  # images whose variance sets the noise
# Streams of random numbers: each quantity has its own, so that drawing one more changes no other.
FRAMES, SHIFTS, OPTICS, NOISE = range(4)


def simulate_particles(
    structure: Structure,
    n_particles: int,
    *,
    conformations=None,
    dynamics: Dynamics | None = None,
    latents=None,
    box_size: int = 64,
    pixel_size: float | None = None,
    snr_db: float = 0.0,
    sigma: float | None = None,
    ctf: bool | Mapping = True,
    shift_std: float = 0.0,
    seed: int = 0,
    path=None,
    device=None,
    chunk_size: int = 256,
    progress: bool = True,
) -> ParticleStack:
    """Simulate particle images of a molecule that moves.

    Parameters
    ----------
    structure : Structure
        Says how much each atom scatters and which point sits at the centre of the box.
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
        Width in Å of an atom (see `Imaging`).
    ctf : bool or mapping
        True: 300 kV, Cs 2.7 mm, amplitude contrast 0.1, defocus 1–2.5 µm. False: none. A mapping changes
        some of ``CTF_RANGES``: a number, or a pair to draw from uniformly (Å and radians).
    shift_std : float
        Standard deviation of the shifts along x and y, Å.
    seed : int
        The same seed gives the same particles, whatever `chunk_size` is and wherever they go.
    path : path, optional
        A .star file to write, with the .mrcs beside it. Images go straight there and are read lazily.
    device : torch device, optional
        Where the images are computed.
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
        When the motion does not fit the structure, the molecule does not fit the box, or the place cannot be
        written.

    Examples
    --------
    >>> from cryochains import load_structure
    >>> closed = load_structure("glua3-closed")
    >>> still = closed.coords[None]
    >>> particles = simulate_particles(closed, 4, conformations=still, box_size=32, progress=False)
    >>> particles.read_images().shape, particles.truth.coords().shape == (4, closed.n_atoms, 3)
    (torch.Size([4, 32, 32]), True)
    """
    if n_particles < 1 or chunk_size < 1:
        raise ValueError(f"expected one particle or more, got {n_particles} ({chunk_size} at a time)")
    path = None if path is None else check_star_path(path)

    truth = _motion(structure, n_particles, conformations, dynamics, latents, snr_db, seed)
    farthest = _farthest(truth, structure.origin, chunk_size)
    if pixel_size is None:
        # Three widths of an atom beyond its centre nothing is left to see.
        extent = 2 * (np.linalg.norm(farthest - structure.origin) + 3 * (sigma or 2.0))
        pixel_size = math.ceil(100 * extent / (FILL * box_size)) / 100
    check_fits_in_box(farthest, structure.origin, box_size, pixel_size)
    microscope = Imaging(structure.weights, box_size, pixel_size, structure.origin, sigma).to(device)

    rotations = random_rotations(n_particles, seed)
    shifts = torch.from_numpy(_stream(seed, SHIFTS).normal(0.0, shift_std, (n_particles, 2))).float()
    changes = {} if ctf is True else ctf
    optics = None if changes in (None, False) else _draw_ctf(changes, n_particles, seed)

    @torch.no_grad()
    def clean(rows: Tensor) -> Tensor:
        transfer = None if optics is None else optics[rows].evaluate(box_size, pixel_size, device)
        coords = truth.coords(rows).to(device)
        return microscope(coords, rotations[rows].to(device), shifts[rows].to(device), transfer).cpu()

    measured = torch.arange(min(n_particles, MEASURED)).split(chunk_size)
    noise_std = noise_std_for_snr(torch.cat([clean(rows) for rows in measured]), snr_db)
    truth = replace(truth, noise_std=noise_std)

    def noisy() -> Iterator[Tensor]:
        with tqdm(total=n_particles, desc="simulating", unit="particle", disable=not progress) as bar:
            for rows in torch.arange(n_particles).split(chunk_size):
                yield clean(rows) + noise_std * _noise(rows, box_size, seed)
                bar.update(len(rows))

    if path is not None:
        names = image_names(path.with_suffix(".mrcs").name, n_particles)
        blocks = new_blocks(rotations, shifts, optics, pixel_size, box_size, names)
        write_particles(path, blocks, noisy(), (n_particles, box_size, box_size), pixel_size)
        return replace(load_particles(path), truth=truth)
    images = torch.empty(n_particles, box_size, box_size)
    for part, chunk in zip(images.split(chunk_size), noisy(), strict=True):
        part.copy_(chunk)
    return ParticleStack(images, rotations, shifts, pixel_size=pixel_size, ctf=optics, truth=truth)


def _stream(seed: int, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _noise(rows: Tensor, box_size: int, seed: int) -> Tensor:
    # A generator for each particle: the noise does not depend on how particles are grouped.
    shape = (box_size, box_size)
    noise = [_stream(seed, NOISE, row).standard_normal(shape, dtype=np.float32) for row in rows.tolist()]
    return torch.from_numpy(np.stack(noise))


def _motion(structure, n, conformations, dynamics, latents, snr_db, seed) -> Truth:
    if (conformations is None) == (dynamics is None) or (dynamics is None) != (latents is None):
        given = {"conformations": conformations, "dynamics": dynamics, "latents": latents}
        names = " and ".join(name for name, value in given.items() if value is not None) or "nothing"
        raise ValueError(
            f"expected either conformations, or dynamics and latents, got {names}; "
            "try conformations=structure.coords[None]"
        )
    if conformations is not None:
        conformations = torch.as_tensor(np.asarray(conformations), dtype=torch.float32)
        if conformations.ndim != 3 or conformations.shape[1:] != (structure.n_atoms, 3) or not len(conformations):
            raise ValueError(
                f"expected conformations of shape (m, {structure.n_atoms}, 3), got "
                f"{tuple(conformations.shape)}; try structure.coords[None] or morph(a, b)"
            )
        if not torch.isfinite(conformations).all():
            raise ValueError("expected finite coordinates in Å, got NaN or Inf in conformations")
        frame = torch.from_numpy(_stream(seed, FRAMES).integers(0, len(conformations), n))
        return Truth(0.0, snr_db, conformations=conformations, frame=frame)
    latents = torch.as_tensor(latents, dtype=torch.float32).cpu()
    if tuple(latents.shape) != (n, dynamics.n_latents) or not torch.isfinite(latents).all():
        raise ValueError(
            f"expected finite latents of shape ({n}, {dynamics.n_latents}), one row a particle, "
            f"got {tuple(latents.shape)}; try n_particles=len(latents)"
        )
    if dynamics.structure.n_atoms != structure.n_atoms:
        raise ValueError(
            f"expected dynamics of {structure!r}, got dynamics of {dynamics.structure!r}; "
            "try simulate_particles(dynamics.structure, …)"
        )
    return Truth(0.0, snr_db, dynamics=dynamics, latents=latents)


def _farthest(truth: Truth, origin: np.ndarray, chunk_size: int) -> np.ndarray:
    """(3,) the place, over all conformations, of the atom farthest from `origin`."""
    if truth.conformations is not None:
        chunks = truth.conformations.split(chunk_size)
    else:
        chunks = map(truth.coords, torch.arange(len(truth)).split(chunk_size))
    places = []
    for coords in chunks:
        coords = coords.reshape(-1, 3).numpy()
        places.append(coords[np.linalg.norm(coords - origin, axis=1).argmax()])
    return places[int(np.linalg.norm(np.stack(places) - origin, axis=1).argmax())]


def _draw_ctf(changes: Mapping, n: int, seed: int) -> CTF:
    unknown = sorted(set(changes) - set(CTF_RANGES))
    if unknown:
        raise ValueError(f"expected CTF ranges among {', '.join(CTF_RANGES)}, got {', '.join(unknown)}")
    drawn = {}
    for key, (name, value) in enumerate({**CTF_RANGES, **changes}.items()):
        low, high = np.broadcast_to(np.asarray(value, dtype=np.float64), (2,))
        drawn[name] = _stream(seed, OPTICS, key).uniform(low, high, n)
    defocus, half = drawn.pop("defocus"), drawn.pop("astigmatism") / 2
    drawn |= {"defocus_u": defocus + half, "defocus_v": defocus - half}
    return CTF(**{name: torch.from_numpy(values) for name, values in drawn.items()})
