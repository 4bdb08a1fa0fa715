"""Simulated particles: the noise, poses and truth that were asked for; one seed, one result."""

import math

import numpy as np
import pytest
import starfile
import torch

from cryochains.images import load_particles
from cryochains.model import Dynamics, Microscope, Model, simulate_particles
from cryochains.molecule import atom_beads, load_structure, residue_beads, rigid_fit

QUIET = {"box_size": 32, "progress": False}


@pytest.fixture(scope="module")
def structure():
    return load_structure("glua3-closed")


@pytest.fixture(scope="module")
def path(structure):
    """Five conformations: the molecule shears."""
    steps = np.linspace(0, 0.3, 5)[:, None, None]
    return structure.coords + steps * (structure.coords - structure.origin)[:, [1, 2, 0]] * [
        1.0,
        0.0,
        0.0,
    ]


def bead_coords(structure, beads, conformations):
    """(m, n_beads, 3) beside the Cα of their residue, each chain turned by superposition."""
    moved = []
    for coords in np.asarray(conformations, dtype=float):
        here = np.empty((len(beads), 3))
        for chain in range(structure.n_chains):
            atoms = structure.chain_index == chain
            rotation, _ = rigid_fit(structure.coords[atoms], coords[atoms])
            own = structure.node_chain[beads.node] == chain
            node = beads.node[own]
            offsets = beads.coords[own] - structure.node_coords[node]
            here[own] = coords[node] + offsets @ rotation.T
        moved.append(here)
    return torch.from_numpy(np.stack(moved)).float()


def clean_images(particles, structure, sigma=None):
    """Drawn of beads by default, or of one Gaussian at every imaging atom."""
    beads = residue_beads(structure)
    weights, widths = beads.weights, beads.widths
    if sigma is not None:
        weights, widths = structure.weights, sigma
    microscope = Microscope(
        weights, particles.box_size, particles.pixel_size, structure.origin, widths
    )
    truth = particles.truth
    images = []
    for batch in particles.batches(100):
        if sigma is not None:
            coords = truth.coords(batch.rows)
        elif truth.latents is not None:
            coords = truth.dynamics.with_beads(beads).decode(truth.latents[batch.rows])
        else:
            conformations = bead_coords(structure, beads, truth.conformations)
            coords = conformations[truth.frame[batch.rows]]
        images.append(microscope.render(coords, *batch.pose))
    return torch.cat(images)


@pytest.mark.parametrize("snr_db", [0.0, -10.0, 5.0])
@pytest.mark.parametrize("ctf", [True, False])
@pytest.mark.parametrize("sigma", [None, 4.0])
def test_requested_snr_is_obtained(structure, path, snr_db, ctf, sigma):
    particles = simulate_particles(
        structure, 700, conformations=path, snr_db=snr_db, ctf=ctf, sigma=sigma, **QUIET
    )
    clean = clean_images(particles, structure, sigma)
    noise = particles.read_images() - clean
    ratio = float(clean.var(dim=(1, 2)).mean() / noise.var())
    assert ratio == pytest.approx(10 ** (snr_db / 10), rel=0.03)
    assert float(noise.std()) == pytest.approx(particles.truth.noise_std, rel=0.01)
    assert abs(float(noise.mean())) < 4 * particles.truth.noise_std / math.sqrt(noise.numel())


@pytest.mark.parametrize("sigma", [None, 4.0])
def test_infinite_snr_is_the_image_itself(structure, path, sigma):
    particles = simulate_particles(
        structure, 5, conformations=path, snr_db=math.inf, shift_std=3.0, sigma=sigma, **QUIET
    )
    assert particles.truth.noise_std == 0
    torch.testing.assert_close(
        particles.read_images(), clean_images(particles, structure, sigma), atol=1e-5, rtol=1e-4
    )


def test_images_of_the_reference_are_the_models(structure):
    """Whether it is a conformation or latents: the model's beads, none of them displaced."""
    dynamics = Dynamics(structure)
    settings = {"snr_db": math.inf, "seed": 3, "pixel_size": 6.0, **QUIET}
    conformation = {"conformations": structure.coords[None]}
    latents = {"dynamics": dynamics, "latents": torch.zeros(4, dynamics.n_latents)}
    for sigma in (None, 4.0):
        model = Model(structure, box_size=32, pixel_size=6.0, modes=None, sigma=sigma)
        for motion in (conformation, latents):
            particles = simulate_particles(structure, 4, **motion, sigma=sigma, **settings)
            pose = next(particles.batches(4)).pose
            expected = model.render(torch.zeros(4, model.n_latents), *pose)
            torch.testing.assert_close(particles.read_images(), expected, atol=1e-5, rtol=1e-4)


def test_heavy_atoms_are_drawn_as_they_are(structure, path):
    heavy = load_structure("glua3-closed", atoms="heavy")
    settings = {"snr_db": math.inf, "ctf": False, **QUIET}
    particles = simulate_particles(heavy, 3, conformations=heavy.coords[None], **settings)
    beads = atom_beads(heavy)
    microscope = Microscope(heavy.weights, 32, particles.pixel_size, heavy.origin, beads.widths)
    batch = next(particles.batches(3))
    expected = microscope.render(particles.truth.coords(batch.rows), *batch.pose)
    torch.testing.assert_close(batch.images, expected, atol=1e-5, rtol=1e-4)


def test_truth_of_conformations(structure, path):
    particles = simulate_particles(structure, 200, conformations=path, ctf=False, **QUIET)
    truth = particles.truth
    assert sorted(set(truth.coordinate.tolist())) == [0, 0.25, 0.5, 0.75, 1.0]
    counts = np.bincount(truth.frame.numpy())
    assert counts.min() > 20  # uniform: 40 expected of each
    np.testing.assert_allclose(truth.coords([3, 7]), path[truth.frame[[3, 7]]], atol=1e-4)
    part = particles[[9, 3, 7]]
    torch.testing.assert_close(part.truth.coords([1, 2]), truth.coords([3, 7]))
    torch.testing.assert_close(part.truth.coordinate, truth.coordinate[[9, 3, 7]])
    assert simulate_particles(
        structure, 2, conformations=path[:1], **QUIET
    ).truth.coordinate.tolist() == [
        0,
        0,
    ]


@pytest.mark.parametrize("sigma", [None, 4.0])
def test_truth_of_latents(structure, sigma):
    dynamics = Dynamics(structure)
    latents = torch.randn(20, dynamics.n_latents, generator=torch.Generator().manual_seed(0))
    particles = simulate_particles(
        structure, 20, dynamics=dynamics, latents=latents, snr_db=math.inf, sigma=sigma, **QUIET
    )
    torch.testing.assert_close(particles.truth[4:].latents, latents[4:])
    torch.testing.assert_close(particles.truth.coords([2]), dynamics.decode(latents[[2]]))
    assert particles.truth.coordinate is None
    torch.testing.assert_close(
        particles.read_images(), clean_images(particles, structure, sigma), atol=1e-5, rtol=1e-4
    )


def test_same_seed_same_particles_however_they_are_made(structure, path, tmp_path):
    settings = {"conformations": path, "shift_std": 2.0, **QUIET}
    one = simulate_particles(structure, 30, seed=4, **settings)
    chunks = simulate_particles(structure, 30, seed=4, chunk_size=7, **settings)
    on_disk = simulate_particles(
        structure, 30, seed=4, chunk_size=11, path=tmp_path / "a.star", **settings
    )
    other = simulate_particles(structure, 30, seed=5, **settings)
    scale = float(one.read_images().std())
    for same in (chunks, on_disk):
        torch.testing.assert_close(
            same.read_images() / scale, one.read_images() / scale, atol=1e-4, rtol=0
        )
        torch.testing.assert_close(same.rotations, one.rotations, atol=1e-6, rtol=0)
        torch.testing.assert_close(same.shifts, one.shifts, atol=1e-6, rtol=0)
        assert torch.equal(same.truth.frame, one.truth.frame)
    assert not torch.allclose(one.read_images(), other.read_images())
    assert not torch.allclose(one.rotations, other.rotations)


def test_on_disk_is_lazy_and_the_truth_stays_out_of_the_file(structure, path, tmp_path):
    particles = simulate_particles(
        structure, 10, conformations=path, path=tmp_path / "a.star", **QUIET
    )
    assert particles.images.paths == (tmp_path / "a.mrcs",)
    assert particles.truth is not None and load_particles(tmp_path / "a.star").truth is None
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["a.mrcs", "a.star"]
    columns = set(starfile.read(tmp_path / "a.star")["particles"])
    assert not {
        column for column in columns if "frame" in column.lower() or "latent" in column.lower()
    }


@pytest.mark.parametrize("sigma", [None, 4.0])
def test_shift_moves_the_molecule_and_relions_origin_brings_it_back(structure, tmp_path, sigma):
    """A particle displaced by (x, y) on the image: RELION's rlnOrigin centres it again."""
    settings = {
        "conformations": structure.coords[None],
        "sigma": sigma,
        "snr_db": math.inf,
        "ctf": False,
        "progress": False,
    }
    particles = simulate_particles(
        structure,
        20,
        box_size=64,
        pixel_size=4.0,
        shift_std=10.0,
        path=tmp_path / "a.star",
        **settings,
    )
    images = particles.read_images()
    grid = (torch.arange(64) - 32) * 4.0
    mass = images.sum((1, 2))
    centre = torch.stack(
        [(images.sum(1) * grid).sum(1) / mass, (images.sum(2) * grid).sum(1) / mass], dim=1
    )
    beads = residue_beads(structure) if sigma is None else atom_beads(structure, sigma)
    weights = beads.weights / beads.weights.sum()
    middle = torch.from_numpy((beads.coords - structure.origin).T @ weights).float()
    projected = (particles.rotations @ middle)[:, :2]
    torch.testing.assert_close(centre, particles.shifts + projected, atol=0.05, rtol=0)
    table = starfile.read(tmp_path / "a.star")["particles"]
    origin = torch.tensor(table[["rlnOriginXAngst", "rlnOriginYAngst"]].to_numpy()).float()
    torch.testing.assert_close(centre + origin, projected, atol=0.05, rtol=0)
    assert float(particles.shifts.std()) == pytest.approx(10.0, rel=0.4)


def test_default_pixel_size_fills_the_box(structure, path):
    particles = simulate_particles(structure, 2, conformations=path, **QUIET)
    extent = np.linalg.norm(path - structure.origin, axis=-1).max()
    assert 2 * (extent + 6) / (32 * particles.pixel_size) == pytest.approx(0.85, abs=0.005)
    dynamics = Dynamics(structure)
    latents = torch.zeros(3, dynamics.n_latents)
    still = simulate_particles(structure, 3, dynamics=dynamics, latents=latents, **QUIET)
    latents[1, dynamics.chains[0].translation] = 30.0
    moved = simulate_particles(
        structure, 3, dynamics=dynamics, latents=latents, chunk_size=2, **QUIET
    )
    assert moved.pixel_size > still.pixel_size


def test_ctf_ranges(structure):
    settings = {"conformations": structure.coords[None], **QUIET}
    ctf = simulate_particles(structure, 400, **settings).ctf
    defocus, astigmatism = (ctf.defocus_u + ctf.defocus_v) / 2, ctf.defocus_u - ctf.defocus_v
    assert 10_000 <= defocus.min() < 10_300 and 24_700 < defocus.max() <= 25_000
    assert 0 <= astigmatism.min() and 400 < astigmatism.max() <= 500
    assert set(ctf.voltage_kv.tolist()) == {300.0} and set(
        ctf.spherical_aberration_mm.tolist()
    ) == {2.7}
    assert set(ctf.amplitude_contrast.tolist()) == {0.1} and not ctf.phase_shift.any()
    changed = simulate_particles(
        structure, 5, ctf={"voltage_kv": 200, "defocus": (5e3, 6e3)}, **settings
    ).ctf
    assert changed.voltage_kv.tolist() == [200] * 5
    assert ((changed.defocus_u + changed.defocus_v) / 2).max() <= 6000
    torch.testing.assert_close(
        changed.defocus_angle, simulate_particles(structure, 5, **settings).ctf.defocus_angle
    )
    assert simulate_particles(structure, 5, ctf=False, **settings).ctf is None


def test_progress_only_where_asked(structure, capsys):
    settings = {"conformations": structure.coords[None], "box_size": 32}
    simulate_particles(structure, 5, progress=False, **settings)
    assert capsys.readouterr().err == ""
    simulate_particles(structure, 5, **settings)
    assert "simulating" in capsys.readouterr().err


def test_interrupted_simulation_leaves_nothing(structure, path, tmp_path, monkeypatch):
    calls = []

    def noise(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return torch.zeros(())

    monkeypatch.setattr("cryochains.model.simulation._noise", noise)
    with pytest.raises(KeyboardInterrupt):
        simulate_particles(
            structure, 30, conformations=path, path=tmp_path / "a.star", chunk_size=8, **QUIET
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_particles": 0}, "expected n_particles to be a whole number of 1 or more, got 0"),
        ({"box_size": 33}, "expected an even box size, got 33"),
        (
            {"conformations": None},
            "expected either conformations, or dynamics and latents, got nothing",
        ),
        ({"latents": torch.zeros(4, 6)}, "got conformations and latents"),
        (
            {"conformations": np.zeros((3, 5, 3))},
            r"expected conformations of shape \(m, 7\d\d, 3\), got \(3, 5, 3\)",
        ),
        ({"conformations": np.zeros((5, 3))}, r"got \(5, 3\); try structure.coords\[None\]"),
        ({"pixel_size": 1.0}, "expected a molecule that fits the box"),
        ({"ctf": {"defocs": 1}}, "expected CTF ranges among defocus, .*, got defocs"),
        ({"path": "a.mrcs"}, "expected a path that ends in .star"),
    ],
)
def test_requests_that_make_no_sense(structure, change, message):
    request = {"n_particles": 4, "conformations": structure.coords[None], **QUIET} | change
    with pytest.raises(ValueError, match=message):
        simulate_particles(structure, **request)


def test_motions_that_do_not_fit(structure):
    dynamics = Dynamics(structure)
    good = torch.zeros(4, dynamics.n_latents)
    for latents in (good[:3], good[:, 1:], good * torch.nan):
        with pytest.raises(
            ValueError, match=r"expected (finite )?latents (of shape \(4, \d+\)|to be .* finite)"
        ):
            simulate_particles(structure, 4, dynamics=dynamics, latents=latents, **QUIET)
    with pytest.raises(
        ValueError, match="expected either conformations, or dynamics and latents, got dynamics"
    ):
        simulate_particles(structure, 4, dynamics=dynamics, **QUIET)
    with pytest.raises(ValueError, match="expected finite coordinates"):
        simulate_particles(structure, 4, conformations=structure.coords[None] * np.nan, **QUIET)
    with pytest.raises(ValueError, match="expected dynamics of"):
        simulate_particles(
            load_structure("glua3-closed", chains="A"), 4, dynamics=dynamics, latents=good, **QUIET
        )
