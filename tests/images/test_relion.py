"""RELION's conventions, written out, and its dialects of .star files."""

import time
from dataclasses import replace
from functools import partial

import mrcfile
import numpy as np
import pandas as pd
import pytest
import roma
import starfile
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cryochains.images import load_particles, random_rotations, write_particles
from cryochains.images.relion import euler_to_rotation, read_table, rotation_to_euler

ANGLE = st.floats(-180, 180)


def relion_matrix(rot, tilt, psi):
    """Euler_angles2matrix of RELION's src/euler.cpp."""
    (sf, st_, sp), (cf, ct, cp) = (
        np.sin(np.radians([rot, tilt, psi])),
        np.cos(np.radians([rot, tilt, psi])),
    )
    return np.array(
        [
            [cp * ct * cf - sp * sf, cp * ct * sf + sp * cf, -cp * st_],
            [-sp * ct * cf - cp * sf, -sp * ct * sf + cp * cf, sp * st_],
            [st_ * cf, st_ * sf, ct],
        ]
    )


@settings(deadline=None)
@given(ANGLE, ANGLE, ANGLE)
@example(10.0, 0.0, 20.0)
@example(10.0, 180.0, 20.0)
@example(-35.0, 1e-4, 120.0)
def test_rotation_is_relions_matrix_and_comes_back(rot, tilt, psi):
    angles = torch.tensor([rot, tilt, psi], dtype=torch.float64)
    matrix = relion_matrix(rot, tilt, psi)
    np.testing.assert_allclose(euler_to_rotation(angles), matrix, atol=1e-12)
    back = rotation_to_euler(torch.from_numpy(matrix))
    assert -1e-9 <= float(back[1]) <= 180 + 1e-9
    np.testing.assert_allclose(euler_to_rotation(back), matrix, atol=1e-6)


def test_float32_poses_survive_at_the_poles():
    angles = torch.tensor(
        [[30.0, 0.0, 40.0], [30.0, 180.0, 40.0], [1.0, 2.0, 3.0]], dtype=torch.float64
    )
    rotations = euler_to_rotation(angles).float()
    torch.testing.assert_close(
        euler_to_rotation(rotation_to_euler(rotations)).float(), rotations, atol=1e-6, rtol=0
    )


@settings(deadline=None)
@given(ANGLE, ANGLE, ANGLE)
@example(10.0, 0.0, 20.0)
@example(10.0, 180.0, 20.0)
@example(10.0, 1e-7, 20.0)
@example(10.0, 1e-4, 20.0)
def test_angles_are_those_of_another_program(rot, tilt, psi):
    matrix = torch.from_numpy(relion_matrix(rot, tilt, psi))
    result = rotation_to_euler(matrix)
    expected = roma.rotmat_to_euler("ZYZ", matrix.mT, degrees=True)
    assert float(result[1]) == pytest.approx(float(expected[1]), abs=1e-5)
    if 0.01 < float(result[1]) < 179.99:
        turn = (result - expected + 180).remainder(360) - 180
        assert float(turn.abs().max()) < 1e-6
    # Near a pole the two angles about one axis may share their sum otherwise.
    torch.testing.assert_close(
        euler_to_rotation(result), euler_to_rotation(expected), rtol=0, atol=2e-7
    )


def test_at_the_poles_psi_is_zero():
    for tilt in (0.0, 180.0):
        angles = torch.tensor([10.0, tilt, 20.0], dtype=torch.float64)
        result = rotation_to_euler(euler_to_rotation(angles))
        assert float(result[2]) == 0
        assert float(result[0]) == pytest.approx(30.0 if tilt == 0 else -10.0, abs=1e-6)


def test_angles_keep_their_shape_and_precision():
    angles = torch.rand(2, 3, 3) * 90 + 1
    assert euler_to_rotation(angles).shape == (2, 3, 3, 3)
    assert euler_to_rotation(angles).dtype == torch.float32
    assert rotation_to_euler(euler_to_rotation(angles)).dtype == torch.float64
    torch.testing.assert_close(
        rotation_to_euler(euler_to_rotation(angles.double())).float(), angles, rtol=0, atol=1e-4
    )


def stack(path, n, box=8, offset=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    images = np.arange(offset, offset + n, dtype=np.float32)[:, None, None] * np.ones(
        (1, box, box), np.float32
    )
    with mrcfile.new(path) as mrc:
        mrc.set_data(images)
    return images


def particles_block(names, **columns):
    n = len(names)
    rng = np.random.default_rng(0)
    block = {
        "rlnImageName": names,
        "rlnAngleRot": rng.uniform(-180, 180, n),
        "rlnAngleTilt": rng.uniform(0, 180, n),
        "rlnAnglePsi": rng.uniform(-180, 180, n),
        "rlnDefocusU": rng.uniform(1e4, 2e4, n),
        "rlnDefocusV": rng.uniform(1e4, 2e4, n),
        "rlnDefocusAngle": rng.uniform(0, 180, n),
    }
    return pd.DataFrame(block | columns)


def optics_block(**columns):
    block = {
        "rlnOpticsGroup": [1, 2],
        "rlnOpticsGroupName": ["one", "two"],
        "rlnVoltage": [300.0, 200.0],
        "rlnSphericalAberration": [2.7, 2.0],
        "rlnAmplitudeContrast": [0.1, 0.07],
        "rlnImagePixelSize": [1.5, 1.5],
    }
    return pd.DataFrame(block | columns)


def star(path, particles, optics=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    starfile.write(
        {"particles": particles} if optics is None else {"optics": optics, "particles": particles},
        path,
    )
    return path


def test_project_with_several_stacks_and_optics_groups(tmp_path):
    """Names relative to the project, two folders above the .star file; each group's own optics."""
    stack(tmp_path / "Extract/job1/a.mrcs", 3)
    stack(tmp_path / "Extract/job1/b.mrcs", 4, offset=10)
    names = [
        f"{i:06d}@Extract/job1/{f}.mrcs"
        for i, f in [(2, "b"), (1, "a"), (4, "b"), (3, "a"), (2, "b")]
    ]
    block = particles_block(names, rlnOpticsGroup=[2, 1, 2, 1, 1], rlnPhaseShift=[90.0] * 5)
    block["rlnOriginXAngst"], block["rlnOriginYAngst"] = 3.0, -1.0
    loaded = load_particles(star(tmp_path / "Refine3D/job2/run_data.star", block, optics_block()))
    assert loaded.read_images()[:, 0, 0].tolist() == [11, 0, 13, 2, 11]
    assert loaded.ids.tolist() == names
    assert loaded.rows.tolist() == [0, 1, 2, 3, 4]
    assert loaded.pixel_size == 1.5 and loaded.box_size == 8
    assert loaded.ctf.voltage_kv.tolist() == [200, 300, 200, 300, 300]
    assert loaded.ctf.spherical_aberration_mm.tolist() == [2.0, 2.7, 2.0, 2.7, 2.7]
    assert loaded.ctf.amplitude_contrast.tolist() == [0.07, 0.1, 0.07, 0.1, 0.1]
    np.testing.assert_allclose(loaded.ctf.phase_shift, np.pi / 2)
    np.testing.assert_allclose(
        loaded.ctf.defocus_angle, np.radians(block["rlnDefocusAngle"]), atol=1e-7
    )
    np.testing.assert_allclose(loaded.shifts, [[-3.0, 1.0]] * 5)
    angles = block[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    np.testing.assert_allclose(loaded.rotations, [relion_matrix(*a) for a in angles], atol=1e-6)
    assert (
        load_particles(tmp_path / "Refine3D/job2/run_data.star", invert=True).read_images()[0, 0, 0]
        == -11
    )


def test_relion_3_0_one_table_with_pixels(tmp_path):
    stack(tmp_path / "a.mrcs", 3)
    names = [f"{i}@a.mrcs" for i in (1, 2, 3)]
    block = particles_block(
        names, rlnVoltage=300.0, rlnSphericalAberration=2.7, rlnAmplitudeContrast=0.1
    )
    block["rlnOriginX"], block["rlnOriginY"] = 2.0, -1.0
    block["rlnDetectorPixelSize"], block["rlnMagnification"] = 14.0, 70_000.0
    loaded = load_particles(star(tmp_path / "a.star", block))
    assert loaded.pixel_size == pytest.approx(2.0)
    np.testing.assert_allclose(loaded.shifts, [[-4.0, 2.0]] * 3)
    assert loaded.ctf.voltage_kv.tolist() == [300] * 3
    turned = replace(loaded, rotations=loaded.rotations[[1, 2, 0]])
    turned.save(tmp_path / "turned.star")
    again = load_particles(tmp_path / "turned.star")
    torch.testing.assert_close(again.rotations, turned.rotations, atol=1e-6, rtol=0)
    torch.testing.assert_close(again.shifts, loaded.shifts)
    assert again.pixel_size == pytest.approx(2.0) and again.ctf.voltage_kv.tolist() == [300] * 3
    loaded[[2]].save(tmp_path / "one.star")
    again = load_particles(tmp_path / "one.star")
    assert again.pixel_size == pytest.approx(2.0) and again.read_images()[0, 0, 0] == 2
    torch.testing.assert_close(again.shifts, loaded.shifts[2:])


def test_without_defocus_and_origin(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    block = particles_block(["1@a.mrcs", "2@a.mrcs"], rlnOpticsGroup=1)
    block = block.drop(columns=["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"])
    loaded = load_particles(star(tmp_path / "a.star", block, optics_block()))
    assert loaded.ctf is None
    assert not loaded.shifts.any()


def test_optics_as_simple_block(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    block = particles_block(["1@a.mrcs", "2@a.mrcs"], rlnOpticsGroup=1)
    optics = {name: column[0] for name, column in optics_block().items()}
    starfile.write({"optics": optics, "particles": block}, tmp_path / "a.star")
    assert load_particles(tmp_path / "a.star").ctf.voltage_kv.tolist() == [300, 300]


def good(tmp_path):
    stack(tmp_path / "a.mrcs", 3)
    return particles_block([f"{i:06d}@a.mrcs" for i in (1, 2, 3)], rlnOpticsGroup=1)


def refused(tmp_path, match, particles, optics=None, error=ValueError):
    with pytest.raises(error, match=match):
        load_particles(
            star(tmp_path / "a.star", particles, optics_block() if optics is None else optics)
        )


def test_more_rows_than_images(tmp_path):
    block = good(tmp_path)
    block = pd.concat([block, block.tail(1).assign(rlnImageName="000004@a.mrcs")])
    refused(
        tmp_path,
        r"expected .*a.star to name the 3 images of .*a.mrcs, got row 4 with image 4; try",
        block,
    )
    block = good_names = block.head(3)
    refused(tmp_path, "got row 1 with image 0", good_names.assign(rlnImageName="000000@a.mrcs"))
    # Fewer rows than images is a selection.
    assert len(load_particles(star(tmp_path / "a.star", block.head(2), optics_block()))) == 2


def test_missing_stacks_are_listed(tmp_path):
    block = good(tmp_path).assign(rlnImageName=["1@x.mrcs", "1@a.mrcs", "1@y.mrcs"])
    refused(tmp_path, r"got no x.mrcs, y.mrcs; try", block, error=FileNotFoundError)


def test_missing_columns_are_listed(tmp_path):
    block = good(tmp_path)
    refused(
        tmp_path,
        "expected columns rlnAngleRot, rlnAnglePsi in .*a.star, got rlnImageName.*; try",
        block.drop(columns=["rlnAngleRot", "rlnAnglePsi"]),
    )
    refused(
        tmp_path,
        "expected columns rlnImagePixelSize",
        block,
        optics_block().drop(columns="rlnImagePixelSize"),
    )
    refused(
        tmp_path, "expected columns rlnVoltage", block, optics_block().drop(columns="rlnVoltage")
    )
    refused(
        tmp_path,
        "expected a table of particles with rlnImageName",
        block.drop(columns="rlnImageName"),
    )


def test_unknown_optics_group(tmp_path):
    refused(
        tmp_path,
        "expected optics group 7 of row 2 in data_optics",
        good(tmp_path).assign(rlnOpticsGroup=[1, 7, 1]),
    )


def test_cells_that_are_no_numbers(tmp_path):
    block = good(tmp_path)
    refused(
        tmp_path,
        "expected numbers in rlnAnglePsi of .*got 'abc' in row 2",
        block.assign(rlnAnglePsi=["1", "abc", "2"]),
    )
    refused(
        tmp_path,
        "expected numbers in rlnDefocusU of .*in row 3",
        block.assign(rlnDefocusU=["1", "2", "nan"]),
    )


@pytest.mark.parametrize("column", ["rlnCtfDataAreCtfPremultiplied", "rlnCtfDataArePhaseFlipped"])
def test_images_already_changed_by_their_ctf(tmp_path, column):
    refused(tmp_path, f"got {column}", good(tmp_path), optics_block(**{column: [1, 0]}))
    assert load_particles(
        star(tmp_path / "a.star", good_again(tmp_path), optics_block(**{column: [0, 0]}))
    ).ctf


def good_again(tmp_path):
    return particles_block([f"{i:06d}@a.mrcs" for i in (1, 2, 3)], rlnOpticsGroup=1)


def test_files_that_are_no_star(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a RELION .star file, got .*absent.star.*; try"
    ):
        load_particles(tmp_path / "absent.star")
    (tmp_path / "noise.star").write_bytes(np.random.default_rng(0).bytes(4000))
    (tmp_path / "text.star").write_text("nothing here\n")
    (tmp_path / "ragged.star").write_text(
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnAngleRot #2\n1@a 1\n2@a 2 3\n"
    )
    (tmp_path / "empty.star").write_text(
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnAngleRot #2\n\n"
    )
    for name in ("noise", "text", "ragged", "empty"):
        with pytest.raises(ValueError, match=f"expected a .*{name}.star.*; try"):
            load_particles(tmp_path / f"{name}.star")


def test_many_blank_lines_take_no_time(tmp_path):
    star(tmp_path / "a.star", good(tmp_path), optics_block())
    text = (tmp_path / "a.star").read_text()
    (tmp_path / "a.star").write_text(text + "\n" * 200_000 + " \t\n" * 1000)
    start = time.process_time()
    assert len(load_particles(tmp_path / "a.star")) == 3
    assert time.process_time() - start < 10


def test_columns_keep_their_text_however_the_file_is_laid_out(tmp_path):
    stack(tmp_path / "a.mrcs", 2)
    (tmp_path / "a.star").write_text(
        "# a comment\r\n\r\ndata_optics\r\n\r\n_rlnOpticsGroup 01\r\n_rlnImagePixelSize 1.50\r\n"
        "\r\n\r\ndata_particles\r\n\r\nloop_\r\n  _rlnImageName #1\r\n\t_rlnAngleRot\r\n"
        "_rlnAngleTilt #3\r\n_rlnAnglePsi #4\r\n_rlnOpticsGroup #5\r\n_rlnHelicalTubeID #6\r\n"
        "1@a.mrcs 1 2 3 01 007\r\n2@a.mrcs 4 5 6 01 008\r\n\r\n"
    )
    table = read_table(tmp_path / "a.star")
    assert table.particles["rlnHelicalTubeID"].tolist() == ["007", "008"]
    assert load_particles(tmp_path / "a.star").pixel_size == 1.5


# Writing new particles


def fresh(n=5, box=8):
    chunks = torch.arange(n, dtype=torch.float32)[:, None, None].expand(n, box, box).split(2)
    rotations = random_rotations(n, 0)
    shifts = torch.arange(2.0 * n).view(n, 2)
    settings = {"rotations": rotations, "shifts": shifts, "pixel_size": 1.5, "box_size": box}
    return chunks, settings


def test_new_particles_are_written_a_chunk_at_a_time(tmp_path):
    chunks, settings = fresh()
    write_particles(tmp_path / "new" / "a.star", iter(chunks), **settings, ctf=None)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["a.mrcs", "a.star"]
    loaded = load_particles(tmp_path / "new" / "a.star")
    assert loaded.read_images()[:, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert loaded.pixel_size == 1.5 and loaded.ctf is None
    torch.testing.assert_close(loaded.rotations, settings["rotations"], atol=1e-6, rtol=0)
    torch.testing.assert_close(loaded.shifts, settings["shifts"])


def test_new_particles_that_do_not_fit_together(tmp_path):
    chunks, settings = fresh()
    write = partial(write_particles, tmp_path / "a.star", ctf=None)
    with pytest.raises(ValueError, match="got 5 rotations, 4 shifts and 5 CTFs"):
        write(chunks, **settings | {"shifts": settings["shifts"][:4]})
    with pytest.raises(ValueError, match="each of one particle or more"):
        write([], **settings | {"rotations": torch.zeros(0, 3, 3), "shifts": torch.zeros(0, 2)})
    with pytest.raises(ValueError, match="expected 5 images, got 3; try"):
        write(chunks[1:], **settings)
    with pytest.raises(ValueError, match="expected 5 images, got 7 or more"):
        write([*chunks, chunks[0]], **settings)
    with pytest.raises(ValueError, match="expected chunks of shape .k, 16, 16., got .2, 8, 8."):
        write(chunks, **settings | {"box_size": 16})
    with pytest.raises(ValueError, match="expected a path that ends in .star"):
        write_particles(tmp_path / "a.mrcs", chunks, **settings, ctf=None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError(), OSError(28, "No space")])
def test_new_particles_are_written_whole_or_not_at_all(tmp_path, error):
    chunks, settings = fresh()
    write_particles(tmp_path / "a.star", chunks, **settings, ctf=None)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted():
        yield chunks[0]
        raise error

    expected = ValueError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        write_particles(tmp_path / "a.star", interrupted(), **settings, ctf=None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    if isinstance(error, OSError):
        sentence = str(caught.value)
        assert sentence.count("expected") == 1 and "No space" in sentence, "said once"


def test_a_mended_file_is_read_anew(tmp_path):
    block = good(tmp_path)
    (tmp_path / "a.star").write_text(
        "data_particles\n\nloop_\n_rlnImageName #1\n_rlnAngleRot #2\n1@a 1\n2@a 2 3\n"
    )
    with pytest.raises(ValueError):
        load_particles(tmp_path / "a.star")
    assert len(load_particles(star(tmp_path / "a.star", block, optics_block()))) == 3
