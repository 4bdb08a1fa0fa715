"""The test bench of real particles' troubles: its simulator, its disturbances and its scores."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

import cryochains as cc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import realism  # noqa: E402

BOX = 64


@pytest.fixture(scope="module")
def molecule():
    return realism.load_molecule()


def simulated(molecule, coords, n=4, seed=3):
    return cc.simulate_particles(
        molecule.reference,
        n,
        conformations=coords,
        box_size=BOX,
        snr_db=np.inf,
        shift_std=6.0,
        # One defocus, not too weak: what differs between images is the pose alone.
        ctf={"defocus": (18_000.0, 25_000.0), "astigmatism": 2000.0},
        seed=seed,
        progress=False,
    )


def with_pose(particles, rotations, shifts):
    return cc.ParticleStack(
        particles.images,
        rotations,
        shifts,
        pixel_size=particles.pixel_size,
        ctf=particles.ctf,
    )


def correlations(a, b):
    a = a.reshape(len(a), -1)
    b = b.reshape(len(b), -1)
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b, strict=True)])


def make(molecule, n=24, box=32, seed=0, **settings):
    return realism.make_experiment(
        molecule, realism.Disturbance(**settings), n, box, snr_db=0.0, seed=seed
    )


def test_scattering_factors_are_peng_s():
    zero = np.zeros(1)
    known = {"C": 2.509, "N": 2.214, "O": 1.983, "P": 5.488, "S": 5.160}
    for element, expected in known.items():
        assert float(realism.form_factor(element, zero)[0]) == pytest.approx(expected, abs=1e-3)
    # Mott and Bethe: 0.023934 (Z − f_X) / s², of carbon with f_X = 2.950 at s = k/2 = 0.25.
    mott_bethe = 0.023934 * (6 - 2.950) / 0.25**2
    assert realism.form_factor("C", np.array([0.5]))[0] == pytest.approx(mott_bethe, rel=0.01)
    assert realism.form_factor("ZN", zero)[0] == realism.form_factor("C", zero)[0]


def test_the_contrast_transfer_is_the_library_s(molecule):
    particles = simulated(molecule, molecule.alpha_path[:1])
    ctf = replace(particles.ctf, phase_shift=particles.ctf.phase_shift + 0.7)
    theirs = ctf.evaluate(BOX, particles.pixel_size).numpy()
    for row in range(len(particles)):
        ours = realism.contrast_transfer(ctf, row, BOX, particles.pixel_size)
        assert np.abs(ours - theirs[row]).max() < 1e-3


def test_fourier_sums_are_those_of_a_gaussian_on_the_pixels():
    pixel, b_factor = 2.0, 900.0
    atoms = realism.HeavyAtoms(np.array(["N"]), np.array([b_factor]), 0.0, BOX, pixel)
    spectrum = atoms.project_atoms(np.array([[7.0, -5.0]]))
    image = np.fft.irfft2(spectrum, s=(BOX, BOX))
    assert image.sum() * pixel**2 == pytest.approx(2.2138, abs=1e-3)
    # Image (y, x), from pixel box // 2.
    grid = (np.arange(BOX) - BOX // 2) * pixel
    y, x = grid[:, None], grid[None]
    expected = np.zeros((BOX, BOX))
    for a, b in zip(*realism.PENG["N"], strict=True):
        variance = (b + b_factor) / (8 * np.pi**2)
        bell = np.exp(-((x - 7) ** 2 + (y + 5) ** 2) / (2 * variance))
        expected += a * bell / (2 * np.pi * variance)
    assert np.abs(image - expected).max() < 1e-4 * expected.max()


def test_the_simulator_shares_the_library_s_conventions(molecule):
    particles = simulated(molecule, molecule.alpha_path[:1])
    b_factors = np.full(len(molecule.elements), realism.B_FACTOR)
    atoms = realism.HeavyAtoms(molecule.elements, b_factors, 0.0, BOX, particles.pixel_size)
    coords = molecule.path[:1] - molecule.reference.origin
    frame = np.zeros(len(particles), dtype=int)
    theirs = particles.read_images().numpy()

    def agreement(rotations, shifts):
        posed = with_pose(particles, rotations, shifts)
        return correlations(theirs, realism.project_particles(atoms, coords, frame, posed)).mean()

    rotations, shifts = particles.rotations, particles.shifts
    same = agreement(rotations, shifts)
    assert same > 0.85
    swapped = rotations[:, [1, 0, 2]] * torch.tensor([1.0, 1.0, -1.0])[:, None]
    for wrong in (
        agreement(rotations.transpose(1, 2), shifts),
        agreement(rotations, -shifts),
        agreement(rotations, shifts.flip(1)),
        agreement(swapped, shifts.flip(1)),
    ):
        assert wrong < same - 0.2


def write_star(folder, particles, images):
    """A .star as RELION defines it, by scipy's Euler angles and starfile."""
    write_mrcs(folder / "a.mrcs", images, particles.pixel_size)
    matrices = Rotation.from_matrix(particles.rotations.double().numpy().transpose(0, 2, 1))
    angles = matrices.as_euler("ZYZ", degrees=True)
    ctf = particles.ctf
    table = {"rlnImageName": [f"{i + 1}@a.mrcs" for i in range(len(particles))]}
    table |= {f"rlnAngle{name}": angles[:, k] for k, name in enumerate(("Rot", "Tilt", "Psi"))}
    table |= {f"rlnOrigin{name}Angst": -particles.shifts[:, k] for k, name in enumerate("XY")}
    table |= {"rlnDefocusU": ctf.defocus_u, "rlnDefocusV": ctf.defocus_v}
    table |= {"rlnDefocusAngle": np.rad2deg(ctf.defocus_angle.numpy()), "rlnOpticsGroup": 1}
    optics = {"rlnOpticsGroup": 1, "rlnVoltage": float(ctf.voltage_kv[0])}
    optics |= {"rlnSphericalAberration": float(ctf.spherical_aberration_mm[0])}
    optics |= {"rlnAmplitudeContrast": float(ctf.amplitude_contrast[0])}
    optics |= {"rlnImagePixelSize": particles.pixel_size, "rlnImageSize": BOX}
    blocks = {"optics": pd.DataFrame([optics]), "particles": pd.DataFrame(table)}
    starfile.write(blocks, folder / "a.star", float_format="%.9f")
    return folder / "a.star"


def write_cs(folder, particles, images):
    """A .cs as cryoSPARC defines it, of dark protein."""
    n = len(particles)
    write_mrcs(folder / "b.mrc", -images, particles.pixel_size)
    ctf = particles.ctf
    matrices = particles.rotations.double().numpy().transpose(0, 2, 1)
    values = {
        "uid": np.arange(n, dtype=np.uint64),
        "blob/path": np.full(n, b">b.mrc"),
        "blob/idx": np.arange(n, dtype=np.uint32),
        "blob/shape": np.full((n, 2), BOX, dtype=np.uint32),
        "blob/psize_A": np.full(n, particles.pixel_size, dtype=np.float32),
        "blob/sign": np.full(n, -1, dtype=np.float32),
        "alignments3D/pose": Rotation.from_matrix(matrices).as_rotvec().astype(np.float32),
        "alignments3D/shift": -particles.shifts.numpy() / np.float32(particles.pixel_size),
        "alignments3D/psize_A": np.full(n, particles.pixel_size, dtype=np.float32),
    }
    for name, field in {
        "df1_A": ctf.defocus_u,
        "df2_A": ctf.defocus_v,
        "df_angle_rad": ctf.defocus_angle,
        "phase_shift_rad": ctf.phase_shift,
        "accel_kv": ctf.voltage_kv,
        "cs_mm": ctf.spherical_aberration_mm,
        "amp_contrast": ctf.amplitude_contrast,
    }.items():
        values[f"ctf/{name}"] = field.numpy().astype(np.float32)
    kinds = [(name, value.dtype, value.shape[1:]) for name, value in values.items()]
    array = np.empty(n, dtype=kinds)
    for name, value in values.items():
        array[name] = value
    with open(folder / "a.cs", "wb") as file:
        np.save(file, array, allow_pickle=False)
    return folder / "a.cs"


def write_mrcs(path, images, pixel_size):
    with mrcfile.new(path) as mrc:
        mrc.set_data(images)
        mrc.set_image_stack()
        mrc.voxel_size = pixel_size


def test_files_of_both_programs_show_what_the_library_draws(molecule, tmp_path):
    """Heavy atoms in solvent, in files that no code of the library wrote."""
    n = 8
    particles = cc.simulate_particles(
        molecule.reference,
        n,
        conformations=molecule.alpha_path[:1],
        box_size=BOX,
        pixel_size=3.0,
        snr_db=np.inf,
        shift_std=5.0,
        ctf={"defocus": (12_000.0, 25_000.0), "astigmatism": 1000.0},
        seed=7,
        progress=False,
    )
    b_factors = np.full(len(molecule.elements), realism.B_FACTOR)
    atoms = realism.HeavyAtoms(molecule.elements, b_factors, realism.SOLVENT_SHARE, BOX, 3.0)
    coords = molecule.path[:1] - molecule.reference.origin
    images = realism.project_particles(atoms, coords, np.zeros(n, dtype=int), particles)
    loaded = [
        cc.load_particles(write(tmp_path, particles, images)) for write in (write_star, write_cs)
    ]
    for found in loaded:
        model = cc.Model(molecule.reference, found, modes=None)
        pose = next(found.batches(images=False)).pose
        drawn = model.render(torch.zeros(n, model.n_latents), *pose)
        assert correlations(found.read_images().numpy(), drawn.numpy()).min() > 0.98
    star, cs = loaded
    torch.testing.assert_close(star.rotations, cs.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(star.shifts, cs.shifts, atol=1e-5, rtol=0)
    torch.testing.assert_close(star.read_images(), cs.read_images(), atol=0, rtol=0)
    for one, other in zip(star.ctf.values(), cs.ctf.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)


def test_solvent_takes_away_its_share_at_low_frequency_alone(molecule):
    b_factors = np.zeros(len(molecule.elements))
    xy = (molecule.path[0] - molecule.reference.origin)[:, :2].astype(float)
    vacuum = realism.HeavyAtoms(molecule.elements, b_factors, 0.0, BOX, 2.0).project_atoms(xy)
    solvated = realism.HeavyAtoms(molecule.elements, b_factors, 0.38, BOX, 2.0).project_atoms(xy)
    assert (solvated[0, 0] / vacuum[0, 0]).real == pytest.approx(0.62, abs=1e-3)
    assert vacuum[0, 0].real * 4 == pytest.approx(realism.scattering(molecule.elements), rel=1e-3)
    high = np.s_[20:28, 20:28]
    assert np.abs(solvated[high]).mean() > 0.8 * np.abs(vacuum[high]).mean()


def test_the_heavy_atoms_path_is_the_morph_of_the_alpha_carbons(molecule, closed, opened):
    path = cc.morph(closed, opened, n=realism.N_FRAMES)
    assert np.abs(path - molecule.alpha_path).max() < 1e-3
    assert len(molecule.elements) > 5800


def test_nothing_disturbed_is_what_was_asked_for(molecule):
    plain = make(molecule, n=64)
    assert np.all(plain.scale == 1) and not plain.is_junk.any() and plain.is_good.all()
    assert plain.rotation_error.max() < 1e-3 and plain.shift_error.max() < 1e-4
    clean, _, frame = realism.draw_clean(molecule, realism.Disturbance(), 64, 32, 0)
    assert np.array_equal(frame, plain.frame)
    noise = plain.particles.read_images().numpy() - clean
    assert noise.var() == pytest.approx(realism.power_of(clean), rel=0.03)
    again = make(molecule, n=64)
    assert torch.equal(again.particles.read_images(), plain.particles.read_images())


def test_brightness_and_noise_levels_are_as_said(molecule):
    plain = make(molecule, n=64).particles.read_images().numpy()
    bright = make(molecule, n=64, brightness=(0.5, 2.0))
    assert 0.5 <= bright.scale.min() < 0.6 and 1.7 < bright.scale.max() <= 2.0
    assert np.log(bright.scale).mean() == pytest.approx(0.0, abs=0.15)
    # The same noise: what is left is the clean image times its factor less one.
    clean, _, _ = realism.draw_clean(molecule, realism.Disturbance(), 64, 32, 0)
    difference = bright.particles.read_images().numpy() - plain
    assert np.allclose(difference, (bright.scale - 1)[:, None, None] * clean, atol=1e-4)
    noisy = make(molecule, n=64, noise_level=(0.5, 2.0))
    noise = noisy.particles.read_images().numpy() - clean
    assert np.allclose(noise.std((1, 2)), noisy.noise_std, rtol=0.1)
    assert noisy.noise_std.max() > 2.5 * noisy.noise_std.min()


@pytest.mark.parametrize("shares", [(0.5, 0.0), (1.0, 0.0), (0.0, 0.5), (0.0, 1.0), (1.0, 1.0)])
def test_coloured_noise_keeps_its_variance(molecule, shares):
    particles = simulated(molecule, molecule.alpha_path[:1], n=16)
    noise = realism.draw_noise(particles, *shares, np.random.default_rng(0))
    assert noise.var() == pytest.approx(1.0, abs=0.06)
    power = (np.abs(np.fft.rfft2(noise)) ** 2 / BOX**2).mean(0)
    if shares == (1.0, 0.0):
        assert power[0, 4] / power[0, 16] == pytest.approx(4.0, rel=0.9)
        assert power[1:4, 1:4].mean() > 5 * power[20:28, 20:28].mean()
    if shares == (0.0, 1.0):
        assert power[1, 1] < 0.2 * power[4:12, 4:12].mean()


def test_junk_is_noise_or_a_wrong_orientation(molecule):
    junk = make(molecule, n=40, junk=0.3)
    assert junk.is_junk.sum() == 12 and (junk.is_good == ~junk.is_junk).all()
    alone = junk.scale == 0
    assert alone.sum() == 6
    turned = junk.rotation_error > 1
    assert turned.sum() == 6 and np.array_equal(alone | turned, junk.is_junk)
    variance = junk.particles.read_images().numpy().var((1, 2))
    assert variance[alone].mean() == pytest.approx(junk.noise_std[0] ** 2, rel=0.1)


def test_pose_errors_have_the_size_that_was_asked_for(molecule):
    experiment = make(molecule, n=400, rotation_error=4.0, shift_error=2.0)
    assert realism.rms(experiment.rotation_error) == pytest.approx(4.0, rel=0.1)
    pixel = experiment.particles.pixel_size
    assert realism.rms(experiment.shift_error) == pytest.approx(2**0.5 * 2 * pixel, rel=0.1)


def test_outliers_and_normalisation(molecule):
    plain = make(molecule)
    spoiled = make(molecule, bright_image=1e6, hot_pixel=1e6)
    assert spoiled.is_spoiled.sum() == 2
    ratio = spoiled.particles.read_images() / plain.particles.read_images()
    assert float(ratio.flatten(1).median(1).values.max()) == pytest.approx(1e6, rel=1e-4)
    changed = (ratio != 1).flatten(1).sum(1)
    assert sorted(changed[changed > 0].tolist()) == [1, 32 * 32]

    images = make(molecule, normalised=True).particles.read_images().numpy()
    offsets = np.arange(32) - 16
    outside = np.hypot(offsets[:, None], offsets) > 0.45 * 32
    assert np.abs(images[:, outside].mean(1)).max() < 1e-5
    assert np.allclose(images[:, outside].std(1), 1, atol=1e-5)


def test_missing_residues_leave_the_rest_as_it_was(molecule):
    experiment = make(molecule, missing=30)
    left = experiment.reference
    assert left.n_atoms == molecule.reference.n_atoms - 30
    assert np.allclose(left.origin, molecule.reference.origin)
    conformations = experiment.truth.conformations.numpy()
    assert np.abs(conformations[0] - left.coords).max() < 1e-3
    lost = realism.surface_stretch(molecule.reference, 30)
    assert len(set(molecule.reference.node_chain[lost])) == 1 and (np.diff(lost) == 1).all()
    cc.Model(left, experiment.particles, modes=None)


def test_the_micelle_has_its_share_of_the_power_and_fits_the_box(molecule):
    disturbance = realism.Disturbance()
    clean, stack, _ = realism.draw_clean(molecule, disturbance, 24, 32, 0)
    with_blob = make(molecule, micelle=0.15).particles.read_images().numpy()
    blob = with_blob - make(molecule).particles.read_images().numpy()
    assert realism.power_of(blob) == pytest.approx(0.15 * realism.power_of(clean), rel=1e-3)
    beads = realism.micelle_beads(molecule.reference.coords - molecule.reference.origin)
    farthest = np.linalg.norm(beads, axis=1).max() + 2 * realism._MICELLE_SIGMA
    assert farthest < 32 * stack.pixel_size / 2


def test_states_and_pixel_size(molecule):
    three = realism.states("three")
    assert [np.mean(three == frame) for frame in (0, 24, 49)] == [0.5, 0.3, 0.2]
    rare = realism.states("rare")
    assert np.mean(rare == 49) == 0.05 and rare[rare < 49].max() < 21
    plain, wrong = make(molecule), make(molecule, pixel_factor=1.03)
    assert wrong.particles.pixel_size == pytest.approx(1.03 * plain.particles.pixel_size)
    with pytest.raises(ValueError, match="expected states"):
        realism.states("none")


def test_superposition_finds_the_turn(molecule):
    coords = molecule.alpha_path[::10].astype(float)
    turns = Rotation.random(len(coords), np.random.default_rng(1)).as_matrix()
    turned = coords @ turns.transpose(0, 2, 1) + 3.0
    moved, rotations = realism.superpose_all(turned, coords)
    assert np.abs(moved - coords).max() < 1e-6
    assert np.abs(rotations @ turns - np.eye(3)).max() < 1e-6
    mirrored = coords * [1, 1, -1]
    _, rotations = realism.superpose_all(mirrored, coords)
    assert np.allclose(np.linalg.det(rotations), 1)
    explained, rmsd, _ = realism.motion_scores(coords, coords)
    assert explained == 1 and rmsd == 0


def test_the_pose_error_that_is_left_is_that_of_the_molecule_as_a_whole(molecule):
    experiment = make(molecule, n=60, rotation_error=4.0, shift_error=2.0)
    rows = np.arange(60)
    true = experiment.truth.coords(rows).double().numpy()
    angles, offsets = realism.pose_errors_left(experiment, true, true, rows)
    assert np.allclose(angles, experiment.rotation_error, atol=1e-3)
    assert np.corrcoef(offsets, experiment.shift_error)[0, 1] > 0.95
    # A molecule that turned against the pose's error leaves none.
    origin = experiment.reference.origin
    given = experiment.particles.rotations.double().numpy()
    shift = np.zeros((60, 1, 3))
    shift[:, 0, :2] = experiment.shifts - experiment.particles.shifts.double().numpy()
    seen = (true - origin) @ experiment.rotations.transpose(0, 2, 1) + shift
    found = seen @ given + origin
    angles, offsets = realism.pose_errors_left(experiment, found, true, rows)
    assert angles.max() < 1e-3 and offsets.max() < 1e-3


def test_the_command_writes_one_row_an_experiment(tmp_path, capsys):
    table = tmp_path / "realism.csv"
    small = ["--n", "10", "--box", "32", "--modes", "0", "--out", str(table), "--device", "cpu"]
    realism.main(["--conditions", "baseline", "junk-strong", *small])
    realism.main(["--conditions", "baseline", *small])
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["condition"] for row in rows] == ["junk", "baseline"]
    assert [row["strength"] for row in rows] == ["strong", ""]
    assert float(rows[1]["rmsd"]) > 0 and 0 <= float(rows[1]["coverage"]) <= 1
    assert "explained" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="expected conditions among"):
        realism.main(["--conditions", "weather", *small])
