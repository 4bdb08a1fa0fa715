"""Images that the microscope magnified by another factor in another direction.

The images are direct sums over points, F(k) = CTF(M k) Σ exp(−½ σ² |2π M k|²) exp(−2πi M k·x) times
exp(−2πi k·t), as RELION's ``applyAnisoMag`` and ``CTF::getCTF`` have projection and transfer.
"""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from cryochains.images import load_particles, project, random_rotations
from cryochains.images.relion import rotation_to_euler
from cryochains.images.resampling import Grid, resample
from cryochains.images.stacks import write_stack

N = 6
BOX = 96
PIXEL = 2.0
SIGMA = 3.5
MATRIX = np.array([[1.03, 0.012], [-0.008, 0.98]])
COLUMNS = ("rlnMagMat00", "rlnMagMat01", "rlnMagMat10", "rlnMagMat11")
DEFOCUS = (9_000.0, 7_500.0, 0.6)


def transfer(x, y):
    """RELION's CTF of 300 kV, 2.7 mm, 0.1, positive at low frequency."""
    u, v, angle = DEFOCUS
    wavelength = 12.2643247 / np.sqrt(3e5 * (1 + 3e5 * 0.978466e-6))
    square = x**2 + y**2
    along = np.cos(angle) * x + np.sin(angle) * y
    defocus = v * square + (u - v) * along**2
    chi = np.pi * wavelength * defocus - np.pi / 2 * 2.7e7 * wavelength**3 * square**2
    return np.sin(chi + np.arcsin(0.1))


def brute_force(points, rotation, shift, matrix):
    """(BOX, BOX) image of points, x' = R x, whose transform at k is that of their sum at M k."""
    kx = np.fft.rfftfreq(BOX, PIXEL)[None, :]
    ky = np.fft.fftfreq(BOX, PIXEL)[:, None]
    x = matrix[0, 0] * kx + matrix[0, 1] * ky
    y = matrix[1, 0] * kx + matrix[1, 1] * ky
    spectrum = np.zeros(x.shape, dtype=complex)
    for px, py, _ in points @ rotation.T:
        spectrum += np.exp(-2j * np.pi * (x * px + y * py))
    spectrum *= transfer(x, y) * np.exp(-2 * np.pi**2 * SIGMA**2 * (x**2 + y**2))
    spectrum *= np.exp(-2j * np.pi * (kx * shift[0] + ky * shift[1]))
    return np.fft.fftshift(np.fft.irfft2(spectrum, s=(BOX, BOX))).astype(np.float32)


@pytest.fixture(scope="module")
def scene():
    """Points, rotations, shifts, and images with and without the matrix."""
    rng = np.random.default_rng(2)
    points = rng.uniform(-32, 32, (40, 3))
    rotations = random_rotations(N, 3).numpy()
    shifts = rng.normal(0, 4, (N, 2))
    each = list(zip(rotations, shifts, strict=True))
    distorted = np.stack([brute_force(points, r, t, MATRIX) for r, t in each])
    # On undistorted axes the molecule is displaced by M⁻ᵀ t.
    moved = shifts @ np.linalg.inv(MATRIX)
    plain = [brute_force(points, r, t, np.eye(2)) for r, t in zip(rotations, moved, strict=True)]
    return points, torch.from_numpy(rotations), shifts, distorted, np.stack(plain)


def write_images(folder, images):
    name = "a.mrcs"
    size = {"n_images": N, "box_size": BOX, "pixel_size": PIXEL}
    write_stack(folder / name, [torch.from_numpy(images)], **size)
    return name


def write_star(folder, scene, matrix=MATRIX):
    _, rotations, shifts, images, _ = scene
    name = write_images(folder, images)
    angles = rotation_to_euler(rotations).numpy()
    u, v, angle = DEFOCUS
    particles = {"rlnImageName": [f"{i + 1:06d}@{name}" for i in range(N)]}
    particles |= dict(zip(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"), angles.T, strict=True))
    particles |= {"rlnOriginXAngst": -shifts[:, 0], "rlnOriginYAngst": -shifts[:, 1]}
    particles |= {"rlnDefocusU": u, "rlnDefocusV": v, "rlnDefocusAngle": np.rad2deg(angle)}
    optics = {"rlnOpticsGroup": 1, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7}
    optics |= {"rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": PIXEL, "rlnImageSize": BOX}
    if matrix is not None:
        optics |= dict(zip(COLUMNS, matrix.ravel(), strict=True))
    blocks = {
        "optics": pd.DataFrame([optics]),
        "particles": pd.DataFrame(particles).assign(rlnOpticsGroup=1),
    }
    starfile.write(blocks, folder / "a.star", float_format="%.9f")
    return folder / "a.star"


def write_cs(folder, scene, matrix=MATRIX):
    from scipy.spatial.transform import Rotation

    _, rotations, shifts, images, _ = scene
    name = write_images(folder, images)
    poses = Rotation.from_matrix(rotations.numpy().transpose(0, 2, 1)).as_rotvec()
    u, v, angle = DEFOCUS
    values = {
        "blob/path": np.full(N, name.encode()),
        "blob/idx": np.arange(N, dtype=np.uint32),
        "blob/shape": np.full((N, 2), BOX, dtype=np.uint32),
        "blob/psize_A": np.full(N, PIXEL),
        "blob/sign": np.ones(N),
        "alignments3D/pose": poses,
        "alignments3D/shift": -shifts / PIXEL,
        "alignments3D/psize_A": np.full(N, PIXEL),
        "ctf/anisomag": np.tile((matrix - np.eye(2)).ravel(), (N, 1)),
    }
    for field, value in {"df1_A": u, "df2_A": v, "df_angle_rad": angle, "accel_kv": 300.0}.items():
        values[f"ctf/{field}"] = np.full(N, value)
    values |= {"ctf/cs_mm": np.full(N, 2.7), "ctf/amp_contrast": np.full(N, 0.1)}
    kinds = [
        (field, "<f4" if cells.dtype.kind == "f" else cells.dtype, cells.shape[1:])
        for field, cells in values.items()
    ]
    array = np.empty(N, dtype=kinds)
    for field, cells in values.items():
        array[field] = cells
    with open(folder / "a.cs", "wb") as file:
        np.save(file, array, allow_pickle=False)
    return folder / "a.cs"


def correlations(a, b):
    pairs = zip(np.asarray(a).reshape(N, -1), np.asarray(b).reshape(N, -1), strict=True)
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in pairs])


def modelled(particles, points):
    """What the library draws of the points for these particles."""
    xyz = torch.from_numpy(points).float().expand(N, -1, -1)
    batch = next(particles.batches(images=False))
    turned = xyz @ batch.rotations.mT
    turned = torch.cat([turned[..., :2] + batch.shifts[:, None], turned[..., 2:]], dim=-1)
    drawn = project(turned, torch.ones(len(points)), BOX, PIXEL, SIGMA)
    return torch.fft.irfft2(torch.fft.rfft2(drawn) * batch.ctf, s=(BOX, BOX))


@pytest.mark.parametrize("write", [write_star, write_cs])
def test_distorted_images_load_as_undistorted_ones(tmp_path, scene, write, recwarn):
    points, _, _, _, plain = scene
    particles = load_particles(write(tmp_path, scene))
    assert not len(recwarn) and particles.pixel_size == PIXEL and particles.box_size == BOX
    images = particles.read_images().numpy() * np.linalg.det(MATRIX)
    assert np.abs(images - plain).max() < 1e-5 * np.abs(plain).max()
    assert correlations(images, modelled(particles, points)).min() > 0.999
    # One row alone, and in another order.
    some = particles[[4, 1]].read_images().numpy() * np.linalg.det(MATRIX)
    np.testing.assert_allclose(some, images[[4, 1]], atol=1e-6)


def test_without_the_matrix_the_same_images_agree_less(tmp_path, scene):
    particles = load_particles(write_star(tmp_path, scene, matrix=None))
    assert correlations(particles.read_images(), modelled(particles, scene[0])).mean() < 0.99


@pytest.mark.parametrize("write", [write_star, write_cs])
def test_a_selection_keeps_the_matrix_and_written_images_do_not(tmp_path, scene, write):
    path = write(tmp_path, scene)
    particles = load_particles(path)
    suffix = path.suffix
    # The images where they are: shifts in the axes of the file, the matrix kept.
    particles[1:].save(tmp_path / f"sub{suffix}", images=False)
    turned = replace(particles, rotations=random_rotations(N, 9), shifts=particles.shifts + 1)
    turned.save(tmp_path / f"turned{suffix}", images=False)
    refocused = replace(turned, ctf=replace(turned.ctf, defocus_u=turned.ctf.defocus_u + 10))
    refocused.save(tmp_path / f"refocused{suffix}", images=False)
    for name, expected in (("sub", particles[1:]), ("turned", turned), ("refocused", refocused)):
        again = load_particles(tmp_path / f"{name}{suffix}")
        assert again.images.magnifications is not None
        same(again, expected)
    if suffix == ".star":
        before, after = (starfile.read(tmp_path / f"{name}.star") for name in ("a", "sub"))
        pd.testing.assert_frame_equal(before["optics"], after["optics"])
        columns = [column for column in before["particles"] if column != "rlnImageName"]
        rows = before["particles"][columns].iloc[1:].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, after["particles"][columns])
    # The images anew: undistorted, and nothing that claims otherwise.
    for name, written in (("all", particles), ("all_turned", turned), ("in_memory", None)):
        if written is None:
            written = replace(particles, images=particles.read_images())
        written.save(tmp_path / f"{name}{suffix}")
        again = load_particles(tmp_path / f"{name}{suffix}")
        assert again.images.magnifications is None
        same(again, written)


def same(again, expected):
    torch.testing.assert_close(again.rotations, expected.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.shifts, expected.shifts, atol=1e-5, rtol=0)
    torch.testing.assert_close(again.read_images(), expected.read_images(), atol=1e-6, rtol=0)
    assert again.pixel_size == pytest.approx(expected.pixel_size)


def test_a_star_out_of_a_cs_names_the_matrix(tmp_path, scene):
    particles = load_particles(write_cs(tmp_path, scene))
    particles.save(tmp_path / "from_cs.star", images=False)
    optics = starfile.read(tmp_path / "from_cs.star")["optics"]
    np.testing.assert_allclose(optics[list(COLUMNS)].iloc[0], MATRIX.ravel(), atol=1e-6)
    same(load_particles(tmp_path / "from_cs.star"), particles)


def test_binning_and_the_matrix_in_one_step_are_both(tmp_path, scene):
    star = write_star(tmp_path, scene)
    small = load_particles(star, box_size=48).read_images().numpy()
    whole = load_particles(star).read_images().numpy()
    expected = resample(whole, PIXEL, Grid(48, 2 * PIXEL))
    # At the limit of the coarse pixels they leave out not quite the same waves.
    assert correlations(small, expected).min() > 0.9995


def test_a_matrix_as_converted_from_cryosparc_lacks_the_unit_matrix(tmp_path, scene):
    whole = load_particles(write_star(tmp_path, scene)).read_images()
    lacking = load_particles(write_star(tmp_path, scene, matrix=MATRIX - np.eye(2))).read_images()
    torch.testing.assert_close(lacking, whole, atol=1e-5, rtol=0)
    none = load_particles(write_star(tmp_path, scene, matrix=np.zeros((2, 2))))
    assert none.images.grid is None


@pytest.mark.parametrize("write", [write_star, write_cs])
def test_matrices_that_no_lens_has(tmp_path, scene, write):
    with pytest.raises(ValueError, match=r"magnification matrices .*\[\[1\.4, .*in row 1; try"):
        load_particles(write(tmp_path, scene, matrix=np.array([[1.4, 0.0], [0.0, 1.0]])))
