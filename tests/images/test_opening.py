"""Tables against the headers of their stacks, and what the caller knows better."""

import gzip
import os
import shutil
from dataclasses import replace
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import starfile
import torch
from scipy.spatial.transform import Rotation

from cryochains.images import load_particles, open_source, random_rotations
from cryochains.images.cryosparc import read_cs, with_fields, write_array
from cryochains.images.resampling import Grid, resample
from cryochains.images.stacks import StackFile, write_stack

N = 6


def table(name="a.mrcs", **columns):
    rng = np.random.default_rng(0)
    block = {
        "rlnImageName": [f"{i + 1:06d}@{name}" for i in range(N)],
        "rlnAngleRot": rng.uniform(-180, 180, N),
        "rlnAngleTilt": rng.uniform(0, 180, N),
        "rlnAnglePsi": rng.uniform(-180, 180, N),
        "rlnOriginXAngst": 3.0,
        "rlnOriginYAngst": -1.0,
        "rlnDefocusU": 15000.0,
        "rlnDefocusV": 14000.0,
        "rlnDefocusAngle": 20.0,
        "rlnOpticsGroup": 1,
    }
    return pd.DataFrame(block | columns)


def optics(n_groups=1, **columns):
    block = {
        "rlnOpticsGroup": range(1, n_groups + 1),
        "rlnOpticsGroupName": [f"g{k}" for k in range(n_groups)],
        "rlnVoltage": 300.0,
        "rlnSphericalAberration": 2.7,
        "rlnAmplitudeContrast": 0.1,
        "rlnImagePixelSize": 1.5,
    }
    return pd.DataFrame(block | columns)


def write(folder, particles=None, groups=None, name="a.star"):
    blocks = {
        "optics": optics() if groups is None else groups,
        "particles": table() if particles is None else particles,
    }
    starfile.write(blocks, folder / name)
    return folder / name


def stack(path, box=16, pixel_size=1.5, n=N, seed=0):
    images = torch.randn(n, box, box, generator=torch.Generator().manual_seed(seed))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_stack(path, [images], n_images=n, box_size=box, pixel_size=pixel_size)
    return images


# Folders


def test_images_are_looked_for_in_a_folder(tmp_path):
    images = stack(tmp_path / "data" / "deep" / "a.mrcs")
    (tmp_path / "project" / "job").mkdir(parents=True)
    star = write(tmp_path / "project" / "job", table("deep/a.mrcs"))
    with pytest.raises(FileNotFoundError, match="got no deep/a.mrcs; try datadir="):
        load_particles(star)
    for folder in (tmp_path / "data", tmp_path / "data" / "deep", str(tmp_path / "data")):
        particles = load_particles(star, datadir=folder)
        torch.testing.assert_close(particles.read_images(), images)
        assert particles.source["datadir"] == os.path.abspath(folder)
    with pytest.raises(FileNotFoundError, match="in .*nowhere, in its folder or one above"):
        load_particles(star, datadir=tmp_path / "nowhere")


def test_names_may_go_up_and_down(tmp_path):
    stack(tmp_path / "data" / "a.mrcs")
    (tmp_path / "job").mkdir()
    star = write(tmp_path / "job", table("../data/a.mrcs"))
    with pytest.warns(UserWarning, match=r"outside of its folders: \.\./data/a\.mrcs in row 1"):
        assert len(load_particles(tmp_path / "job" / ".." / "job" / star.name)) == N


def test_a_compressed_stack_is_read_through_its_table(tmp_path):
    images = stack(tmp_path / "a.mrcs")
    (tmp_path / "a.mrcs.gz").write_bytes(gzip.compress((tmp_path / "a.mrcs").read_bytes()))
    (tmp_path / "a.mrcs").unlink()
    particles = load_particles(write(tmp_path, table("a.mrcs.gz")))
    torch.testing.assert_close(particles[[5, 2]].read_images(), images[[5, 2]])
    # A table that is compressed is named as what it is.
    packed = tmp_path / "b.star"
    packed.write_bytes(gzip.compress((tmp_path / "a.star").read_bytes()))
    with pytest.raises(ValueError, match="b.star .it is compressed, and has to be unpacked"):
        load_particles(packed)


def test_a_table_without_rows(tmp_path):
    stack(tmp_path / "a.mrcs")
    star = write(tmp_path)
    text = star.read_text()
    star.write_text("".join(line for line in text.splitlines(True) if "@" not in line))
    with pytest.raises(ValueError, match="got data_particles without a row in .*a.star; try"):
        load_particles(star)


# Headers


def headless(path, box=16):
    """A stack without MAP and machine stamp, as many programs write them."""
    data = bytearray(path.read_bytes())
    data[208:216] = bytes(8)
    path.write_bytes(data)


def test_stacks_without_the_word_map_are_read(tmp_path):
    images = stack(tmp_path / "a.mrcs")
    headless(tmp_path / "a.mrcs")
    torch.testing.assert_close(load_particles(write(tmp_path)).read_images(), images)
    whole = (tmp_path / "a.mrcs").read_bytes()
    for data in (whole + b"12", whole[:-2]):
        (tmp_path / "a.mrcs").write_bytes(data)
        with pytest.raises(ValueError, match="expected .*a.mrcs"):
            StackFile.open(tmp_path / "a.mrcs")


def test_a_box_that_the_table_contradicts(tmp_path):
    stack(tmp_path / "a.mrcs", box=8, pixel_size=3.0)
    star = write(tmp_path, groups=optics(rlnImageSize=16))
    with pytest.raises(
        ValueError, match=r"expected 16 px × 1.5 Å, as .*got 8 px × 3 Å in .*try .*pixel_size=3"
    ):
        load_particles(star)
    particles = load_particles(star, pixel_size=3.0)
    assert particles.pixel_size == 3 and particles.box_size == 8
    # Binned images show the particle at the same Å.
    torch.testing.assert_close(particles.shifts, torch.tensor([[-3.0, 1.0]]).expand(N, 2))


def test_a_pixel_size_that_the_table_contradicts(tmp_path):
    stack(tmp_path / "a.mrcs", pixel_size=3.0)
    star = write(tmp_path)
    with pytest.raises(ValueError, match="16 px × 1.5 Å.*got 16 px × 3 Å.*pixel_size=3, the head"):
        load_particles(star)
    assert load_particles(star, pixel_size=1.5).pixel_size == 1.5
    # The particle is at the same pixel: a larger pixel makes its shift larger.
    torch.testing.assert_close(
        load_particles(star, pixel_size=3.0).shifts, torch.tensor([[-6.0, 2.0]]).expand(N, 2)
    )


@pytest.mark.parametrize(("given", "expected"), [(None, -2.0), (1.0, -1.0), (4.0, -4.0)])
def test_shifts_in_pixels_are_scaled_once(tmp_path, given, expected):
    """A table of RELION 3.0: origins in px, and a pixel size that the caller knows better."""
    particles = table(rlnOriginX=1.0, rlnOriginY=0.0)
    particles = particles.drop(columns=["rlnOriginXAngst", "rlnOriginYAngst", "rlnOpticsGroup"])
    particles["rlnDetectorPixelSize"] = 2.0
    particles["rlnMagnification"] = 10000.0
    stack(tmp_path / "a.mrcs", pixel_size=2.0)
    starfile.write(particles, tmp_path / "a.star")
    ctf = {"voltage_kv": 300.0, "spherical_aberration_mm": 2.7, "amplitude_contrast": 0.1}
    shifts = load_particles(tmp_path / "a.star", pixel_size=given, **ctf).shifts
    torch.testing.assert_close(shifts[:, 0], torch.full((N,), expected))


def test_a_calibration_later_on_is_a_warning(tmp_path, recwarn):
    stack(tmp_path / "a.mrcs", pixel_size=1.53)
    with pytest.warns(UserWarning, match="1.5 Å a pixel where the header of .* has 1.53 Å"):
        assert load_particles(write(tmp_path)).pixel_size == 1.5
    recwarn.clear()
    stack(tmp_path / "a.mrcs", pixel_size=1.0)
    assert load_particles(write(tmp_path)).pixel_size == 1.5
    assert not recwarn, "1 Å is what programs write that do not know it"


# What the table lacks


def test_missing_values_by_argument(tmp_path):
    stack(tmp_path / "a.mrcs")
    groups = optics().drop(columns=["rlnVoltage", "rlnSphericalAberration", "rlnImagePixelSize"])
    star = write(tmp_path, groups=groups.drop(columns="rlnAmplitudeContrast"))
    given = {"voltage_kv": 200.0, "spherical_aberration_mm": 2.0, "amplitude_contrast": 0.07}
    particles = load_particles(star, pixel_size=1.5, **given)
    for name, value in given.items():
        assert getattr(particles.ctf, name).tolist() == [value] * N
    with pytest.raises(ValueError, match="expected columns rlnSphericalAberration, rlnAmplitude"):
        load_particles(star, pixel_size=1.5, voltage_kv=200.0)
    with pytest.raises(ValueError, match="expected columns rlnImagePixelSize .* try pixel_size="):
        load_particles(star, **given)
    # What was given is written, since the table does not have it.
    particles[:2].save(tmp_path / "b.star", images=False)
    again = load_particles(tmp_path / "b.star")
    assert again.ctf.voltage_kv.tolist() == [200, 200] and again.pixel_size == 1.5
    for wrong in (0.0, -1.0, np.nan):
        with pytest.raises(ValueError, match="expected voltage_kv to be a finite number above 0"):
            load_particles(star, voltage_kv=wrong)


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"rlnDefocusU": [1e4, 1e4, -5.0, 1e4, 1e4, 1e4]}, "defocus u above 0 .*got -5 in row 3"),
        ({"rlnVoltage": [300.0, 0.0] * 3}, "voltage kv above 0 .*got 0 in row 2"),
        ({"rlnAmplitudeContrast": 7.0}, "not per cent, in .*got 7 in row 1.*amplitude_contrast="),
        ({"rlnTomoParticleName": "TS_1/1"}, "table of subtomograms .rlnTomoParticleName"),
        ({"rlnImageDimensionality": 3}, "table of subtomograms .rlnImageDimensionality 3"),
    ],
)
def test_values_that_cannot_be(tmp_path, columns, message):
    stack(tmp_path / "a.mrcs")
    with pytest.raises(ValueError, match=message):
        load_particles(write(tmp_path, table(**columns)))


def test_an_image_named_twice_is_one_warning(tmp_path):
    stack(tmp_path / "a.mrcs")
    names = [f"{i:06d}@a.mrcs" for i in (1, 2, 3, 1, 2, 4)]
    with pytest.warns(UserWarning, match="row 4 as row 1, row 5 as row 2") as caught:
        particles = load_particles(write(tmp_path, table(rlnImageName=names)))
    assert len(caught) == 1 and len(particles) == N


def test_aberrations_of_a_table(tmp_path):
    stack(tmp_path / "a.mrcs")
    lists = {"rlnEvenZernike": ["[0.1,0,-0.2]"], "rlnOddZernike": ["[0,0]"], "rlnBeamTiltX": 0.0}
    star = write(tmp_path, table(rlnCtfScalefactor=0.9), optics(**lists))
    ctf = load_particles(star).ctf
    assert ctf.even_zernikes[5].tolist() == [0.1, 0.0, -0.2]
    assert ctf.scale.tolist() == [0.9] * N and ctf.b_factor is None
    # Into a new table too, where they are no longer those of the file.
    changed = replace(load_particles(star), ctf=replace(ctf, defocus_u=ctf.defocus_u + 1))
    changed.save(tmp_path / "changed.star", images=False)
    again = load_particles(tmp_path / "changed.star").ctf
    for mine, theirs in zip(again.values(), changed.ctf.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-6)
    odd = lists | {"rlnOddZernike": ["[0,1]"], "rlnBeamTiltX": 0.3}
    with pytest.warns(UserWarning, match="has rlnBeamTiltX, rlnOddZernike: the images are not"):
        load_particles(write(tmp_path, groups=optics(**odd)))
    with pytest.raises(ValueError, match="expected lists of numbers in rlnEvenZernike .*a,b"):
        load_particles(write(tmp_path, groups=optics(rlnEvenZernike=["[a,b]"])))


# Binning as they are read


def test_a_smaller_box_is_cropped_in_fourier_space(tmp_path):
    images = stack(tmp_path / "a.mrcs")
    star = write(tmp_path, groups=optics(rlnImageSize=16))
    particles = load_particles(star, box_size=8)
    assert particles.box_size == 8 and particles.pixel_size == 3.0
    expected = resample(images.numpy(), 1.5, Grid(8, 3.0))
    np.testing.assert_allclose(particles.read_images(), expected, atol=1e-6)
    np.testing.assert_allclose(particles[[4, 1]].read_images(), expected[[4, 1]], atol=1e-6)
    whole = load_particles(star)
    torch.testing.assert_close(particles.shifts, whole.shifts)
    # The transfer at the frequencies that are left.
    fine, coarse = next(whole.batches()).ctf, next(particles.batches()).ctf
    torch.testing.assert_close(coarse[:, :4, :4], fine[:, :4, :4], atol=1e-5, rtol=0)
    assert particles.source == {"star": str(star), "invert": False, "box_size": 8}
    for wrong in (7, 0, 32, 8.0, True):
        with pytest.raises(
            ValueError,
            match="expected (an even box_size of 2 to 16 px|box_size to be a whole number)",
        ):
            load_particles(star, box_size=wrong)


def test_binned_images_are_saved_binned(tmp_path):
    stack(tmp_path / "a.mrcs")
    groups = optics(rlnImageSize=16, rlnBeamTiltClass=1, rlnMtfFileName="k3.star")
    particles = load_particles(write(tmp_path, groups=groups), box_size=8)
    particles.save(tmp_path / "binned.star")
    again = load_particles(tmp_path / "binned.star")
    torch.testing.assert_close(again.read_images(), particles.read_images(), atol=0, rtol=0)
    torch.testing.assert_close(again.shifts, particles.shifts)
    assert again.pixel_size == 3.0 and again.box_size == 8
    assert starfile.read(tmp_path / "binned.star")["optics"]["rlnMtfFileName"][0] == "k3.star"
    # A selection names the images as they are in their file, with that file's pixels.
    particles[:3].save(tmp_path / "sub.star", images=False)
    sub = load_particles(tmp_path / "sub.star")
    assert sub.pixel_size == 1.5 and sub.box_size == 16
    turned = replace(particles[:3], rotations=random_rotations(3, 5), ctf=None)
    turned.save(tmp_path / "turned.star", images=False)
    again = load_particles(tmp_path / "turned.star")
    assert again.pixel_size == 1.5 and again.box_size == 16 and again.ctf is None


def test_odd_boxes_become_even_ones(tmp_path):
    images = stack(tmp_path / "a.mrcs", box=17)
    particles = load_particles(write(tmp_path))
    assert particles.box_size == 16 and particles.pixel_size == pytest.approx(1.5 * 17 / 16)
    expected = resample(images.numpy(), 1.5, Grid(16, 1.5 * 17 / 16))
    np.testing.assert_allclose(particles.read_images(), expected, atol=1e-6)
    assert load_particles(write(tmp_path), box_size=8).pixel_size == pytest.approx(1.5 * 17 / 8)


def blobs(path, box, pixel_size):
    """The same scene in other boxes and pixels: a Gaussian at (5, −3) Å."""
    axis = (np.arange(box) - box // 2) * pixel_size
    image = np.exp(-((axis[None] - 5) ** 2 + (axis[:, None] + 3) ** 2) / (2 * 4.0**2))
    pixels = torch.from_numpy(image).float().expand(3, box, box)
    write_stack(path, [pixels], n_images=3, box_size=box, pixel_size=pixel_size)


def test_several_optics_groups_are_brought_to_one(tmp_path):
    blobs(tmp_path / "a.mrcs", 32, 2.0)
    blobs(tmp_path / "b.mrcs", 40, 1.7)
    names = [f"{i + 1:06d}@{name}.mrcs" for i in range(3) for name in "ab"]
    groups = optics(2, rlnImagePixelSize=[2.0, 1.7], rlnImageSize=[32, 40])
    star = write(tmp_path, table(rlnImageName=names, rlnOpticsGroup=[1, 2] * 3), groups)
    message = r"a\.star has images of 32 px × 2 Å \(3\), 40 px × 1\.7 Å \(3\): all are brought to "
    with pytest.warns(UserWarning, match=message + "32 px × 2 Å as they are read") as caught:
        by_default = load_particles(star)
    assert len(caught) == 1 and by_default.box_size == 32 and by_default.pixel_size == 2.0
    pixels = by_default.read_images()
    torch.testing.assert_close(pixels[0], pixels[1], atol=5e-3, rtol=0)
    with pytest.warns(UserWarning, match="all are brought to 24 px × 2.66667 Å"):
        assert load_particles(star, box_size=24).box_size == 24
    for arguments, box, size in (
        ({"optics_group": 1}, 32, 2.0),
        ({"optics_group": 2}, 40, 1.7),
        ({"optics_group": 2, "box_size": 20}, 20, 3.4),
    ):
        particles = load_particles(star, **arguments)
        assert particles.box_size == box and particles.pixel_size == pytest.approx(size)
        pixels = particles.read_images()
        torch.testing.assert_close(pixels[0], pixels[1], atol=5e-3, rtol=0)
    with pytest.raises(ValueError, match="expected an optics group of .*, got 3 where there are 1"):
        load_particles(star, optics_group=3)
    particles = load_particles(star, optics_group=1)
    particles.save(tmp_path / "one.star")
    again = load_particles(tmp_path / "one.star")
    torch.testing.assert_close(again.read_images(), particles.read_images(), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("first", "second", "grid"),
    [
        # (box, Å) of two groups, and of what both are brought to.
        ((32, 2.0), (48, 2.0), (32, 2.0)),
        ((40, 1.7), (32, 2.0), (32, 2.0)),
        # The coarser pixels are of much wider images.
        ((32, 2.0), (40, 2.5), (24, 2.5)),
    ],
)
def test_the_grid_that_all_groups_can_be_brought_to(tmp_path, first, second, grid):
    blobs(tmp_path / "a.mrcs", *first)
    blobs(tmp_path / "b.mrcs", *second)
    names = [f"{i + 1:06d}@{name}.mrcs" for i in range(3) for name in "ab"]
    boxes, sizes = zip(first, second, strict=True)
    groups = optics(2, rlnImagePixelSize=list(sizes), rlnImageSize=list(boxes))
    star = write(tmp_path, table(rlnImageName=names, rlnOpticsGroup=[1, 2] * 3), groups)
    with pytest.warns(UserWarning, match=f"all are brought to {grid[0]} px × {grid[1]:g} Å"):
        particles = load_particles(star)
    assert (particles.box_size, particles.pixel_size) == grid
    pixels = particles.read_images()
    torch.testing.assert_close(pixels[0], pixels[1], atol=5e-3, rtol=0)
    # The same again, from what a result remembers.
    with pytest.warns(UserWarning, match="all are brought to"):
        again = open_source(particles.source)
    torch.testing.assert_close(again.read_images(), pixels, atol=0, rtol=0)


def test_widths_that_have_little_in_common(tmp_path):
    blobs(tmp_path / "a.mrcs", 32, 2.0)
    blobs(tmp_path / "b.mrcs", 32, 5.0)
    names = [f"{i + 1:06d}@{name}.mrcs" for i in range(3) for name in "ab"]
    groups = optics(2, rlnImagePixelSize=[2.0, 5.0], rlnImageSize=32)
    star = write(tmp_path, table(rlnImageName=names, rlnOpticsGroup=[1, 2] * 3), groups)
    with pytest.raises(ValueError, match="images of about one width .* got 64 to 160 Å; try optic"):
        load_particles(star)
    assert load_particles(star, optics_group=1).pixel_size == 2.0


# Real files


@pytest.fixture(scope="module")
def particle_files():
    """Folder named by CRYOCHAINS_PARTICLES; without it the tests of real files are skipped."""
    folder = os.environ.get("CRYOCHAINS_PARTICLES")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CRYOCHAINS_PARTICLES names no folder of particle files")
    return Path(folder)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # mrcfile, of its header
def test_a_real_relion_file(particle_files):
    particles = load_particles(particle_files / "relion31.star")
    assert len(particles) == 5 and particles.box_size == 256
    assert particles.pixel_size == pytest.approx(2.806)
    with mrcfile.open(particle_files / "relion31.mrcs", permissive=True) as mrc:
        np.testing.assert_array_equal(particles.read_images(), mrc.data)


def test_a_real_cs_without_poses_or_images(particle_files):
    with pytest.raises(ValueError, match="expected fields alignments3D/pose .* try passthrough="):
        load_particles(particle_files / "empiar_10076_7.cs")
    with pytest.raises(FileNotFoundError, match="got no J19/extract/.* more; try datadir="):
        load_particles(particle_files / "cryosparc_P12_J24_001_particles.cs")


def test_a_real_refinement_of_cryosparc(particle_files, tmp_path):
    """Its poses and CTFs beside blank stacks of its names, and again out of a .star."""
    name = "cryosparc_P12_J24_001_particles.cs"
    array = np.load(particle_files / name, allow_pickle=False)
    shutil.copy(particle_files / name, tmp_path / name)
    for path in np.unique(array["blob/path"]):
        file = tmp_path / path.decode()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_stack(file, [torch.zeros(1, 180, 180)], n_images=1, box_size=180, pixel_size=2.95)
        n_images = int(array["blob/idx"][array["blob/path"] == path].max()) + 1
        with open(file, "r+b") as stack_file:
            stack_file.seek(8)
            stack_file.write(np.int32(n_images).tobytes())
            # As long as the header says, of zeros that take no room.
            stack_file.truncate(1024 + n_images * 180 * 180 * 4)
    particles = load_particles(tmp_path / name)
    assert len(particles) == 2019 and particles.images.sign == -1
    assert particles.pixel_size == pytest.approx(2.95) and particles.box_size == 180
    turns = Rotation.from_rotvec(array["alignments3D/pose"]).inv().as_matrix()
    np.testing.assert_allclose(particles.rotations, turns, atol=1e-6)
    np.testing.assert_allclose(particles.shifts, -2.95 * array["alignments3D/shift"], atol=1e-5)
    np.testing.assert_allclose(particles.ctf.defocus_u, array["ctf/df1_A"])
    particles.save(tmp_path / "a.star", images=False)
    star = load_particles(tmp_path / "a.star", invert=True)
    torch.testing.assert_close(star.rotations, particles.rotations, atol=1e-5, rtol=0)
    torch.testing.assert_close(star.shifts, particles.shifts, atol=1e-5, rtol=0)
    for one, other in zip(star.ctf.values(), particles.ctf.values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-6)
    particles[::2].save(tmp_path / "half.cs", images=False)
    half = np.load(tmp_path / "half.cs", allow_pickle=False)
    assert half.dtype == array.dtype and (half == array[::2]).all()


def test_ctf_of_the_same_images_in_both_formats(particle_files, tmp_path):
    """Seven images without poses, which are put beside them here."""
    cs = read_cs(particle_files / "empiar_10076_7.cs").array
    zeros = np.zeros((7, 3), dtype=np.float32)
    poses = {"alignments3D/pose": zeros, "alignments3D/shift": zeros[:, :2]}
    write_array(tmp_path / "a.cs", with_fields(cs, poses))
    text = (particle_files / "empiar_10076_7.star").read_text()
    head, rows = text.split("_rlnDetectorPixelSize #10\n")
    names = "".join(f"_rlnAngle{name}\n" for name in ("Rot", "Tilt", "Psi"))
    rows = "".join(f"{row} 0 0 0\n" for row in rows.splitlines() if row.strip())
    (tmp_path / "a.star").write_text(f"{head}_rlnDetectorPixelSize #10\n{names}{rows}")
    one = load_particles(tmp_path / "a.cs", datadir=particle_files)
    other = load_particles(tmp_path / "a.star", datadir=particle_files, invert=True)
    torch.testing.assert_close(one.read_images(), other.read_images())
    assert one.pixel_size == pytest.approx(other.pixel_size, rel=1e-5)
    transfers = [next(p.batches()).ctf for p in (one, other)]
    torch.testing.assert_close(*transfers, atol=1e-3, rtol=0)
