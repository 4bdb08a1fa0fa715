"""cryoSPARC's .cs files: the same particles as a .star of them, and back."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch

from cryochains.images import load_particles, open_source, random_rotations
from cryochains.images.cryosparc import read_cs, with_fields
from cryochains.images.relion import rotation_to_euler
from cryochains.images.stacks import write_stack

N = 12
PIXEL = 1.31
UIDS = np.arange(N, dtype=np.uint64) * 1_000_003 + (1 << 63)


def images(seed=0):
    return torch.randn(N, 16, 16, generator=torch.Generator().manual_seed(seed))


def fields(**changes):
    """Fields of a refinement's particles, as cryoSPARC names and types them."""
    rng = np.random.default_rng(1)
    ones = np.ones(N, dtype=np.float32)
    values = {
        "uid": UIDS,
        "blob/path": np.full(N, b">J19/extract/a.mrc"),
        "blob/idx": np.arange(N, dtype=np.uint32)[::-1],
        "blob/shape": np.full((N, 2), 16, dtype=np.uint32),
        "blob/psize_A": np.float32(PIXEL) * ones,
        "blob/sign": -ones,
        "ctf/exp_group_id": np.arange(N, dtype=np.uint32) % 2,
        "ctf/accel_kv": 300 * ones,
        "ctf/cs_mm": 2.7 * ones,
        "ctf/amp_contrast": np.float32(0.1) * ones,
        "ctf/df1_A": rng.uniform(1e4, 2e4, N).astype(np.float32),
        "ctf/df2_A": rng.uniform(1e4, 2e4, N).astype(np.float32),
        "ctf/df_angle_rad": rng.uniform(-3, 3, N).astype(np.float32),
        "ctf/phase_shift_rad": rng.uniform(0, 1, N).astype(np.float32),
        "ctf/scale": ones,
        "ctf/scale_const": 0 * ones,
        "ctf/tilt_A": np.zeros((N, 2), dtype=np.float32),
        "ctf/anisomag": np.zeros((N, 4), dtype=np.float32),
        "ctf/bfactor": 0 * ones,
        "alignments3D/split": np.arange(N, dtype=np.uint32) % 2,
        "alignments3D/shift": rng.normal(0, 2, (N, 2)).astype(np.float32),
        "alignments3D/pose": rng.normal(0, 1.2, (N, 3)).astype(np.float32),
        "alignments3D/psize_A": np.float32(PIXEL) * ones,
        "alignments3D/error": rng.uniform(1, 2, N).astype(np.float32),
        "alignments3D/class": np.zeros(N, dtype=np.uint32),
    } | changes
    return {name: value for name, value in values.items() if value is not None}


def write_cs(path, values):
    kinds = [(name, value.dtype, value.shape[1:]) for name, value in values.items()]
    array = np.empty(len(next(iter(values.values()))), dtype=kinds)
    for name, value in values.items():
        array[name] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.save(file, array, allow_pickle=False)
    return path


@pytest.fixture
def project(tmp_path):
    """A cryoSPARC project: a stack in J19, a refinement in J24."""
    (tmp_path / "J19" / "extract").mkdir(parents=True)
    write_stack(
        tmp_path / "J19/extract/a.mrc", [images()], n_images=N, box_size=16, pixel_size=PIXEL
    )
    return write_cs(tmp_path / "J24" / "particles.cs", fields())


def expmap(vector):
    """pyem's of a rotation vector: Rodrigues' formula, transposed."""
    angle = np.linalg.norm(vector)
    x, y, z = vector / angle
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return (np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k).T


def write_star(path, values, pixel_size=PIXEL):
    """The same particles for RELION: as csparc2star.py of pyem has them."""
    matrices = np.stack([expmap(pose.astype(float)) for pose in values["alignments3D/pose"]])
    angles = rotation_to_euler(torch.from_numpy(matrices)).numpy()
    table = {"rlnImageName": [f"{i + 1:06d}@J19/extract/a.mrc" for i in values["blob/idx"]]}
    for number, column in enumerate(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")):
        table[column] = angles[:, number]
    for number, axis in enumerate("XY"):
        table[f"rlnOrigin{axis}Angst"] = values["alignments3D/shift"][:, number] * pixel_size
    table["rlnDefocusU"] = values["ctf/df1_A"]
    table["rlnDefocusV"] = values["ctf/df2_A"]
    table["rlnDefocusAngle"] = np.rad2deg(values["ctf/df_angle_rad"])
    table["rlnPhaseShift"] = np.rad2deg(values["ctf/phase_shift_rad"])
    table["rlnOpticsGroup"] = 1
    optics = {
        "rlnOpticsGroup": [1],
        "rlnVoltage": [300.0],
        "rlnSphericalAberration": [2.7],
        "rlnAmplitudeContrast": [0.1],
        "rlnImagePixelSize": [pixel_size],
        "rlnImageSize": [16],
    }
    blocks = {"optics": optics, "particles": table}
    frames = {name: pd.DataFrame(block) for name, block in blocks.items()}
    starfile.write(frames, path, float_format="%.9f")
    return path


def assert_same(one, other, atol=1e-5):
    torch.testing.assert_close(one.rotations, other.rotations, atol=atol, rtol=0)
    torch.testing.assert_close(one.shifts, other.shifts, atol=atol, rtol=0)
    assert one.pixel_size == pytest.approx(other.pixel_size, rel=1e-6)
    for mine, theirs in zip(one.ctf.values(), other.ctf.values(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(one.read_images(), other.read_images(), atol=0, rtol=0)
    assert one.ids.tolist() == other.ids.tolist()


def test_cs_and_star_of_the_same_particles_are_the_same(project):
    star = write_star(project.parent / "particles.star", fields())
    cs = load_particles(project)
    # A .star cannot say that protein is dark; the .cs does.
    assert_same(cs, load_particles(star, invert=True))
    torch.testing.assert_close(cs.read_images(), -images().flip(0))
    torch.testing.assert_close(load_particles(project, invert=True).read_images(), images().flip(0))
    transfers = [one.ctf.evaluate(16, PIXEL) for one in (cs, load_particles(star))]
    # Phases of hundreds of radians, in float32.
    torch.testing.assert_close(*transfers, atol=1e-4, rtol=0)


def test_shifts_are_in_pixels_of_the_alignment(project):
    values = fields()
    values["alignments3D/psize_A"] = 2 * values["alignments3D/psize_A"]
    values["alignments3D/shift"] = values["alignments3D/shift"] / 2
    other = load_particles(write_cs(project.parent / "binned.cs", values))
    torch.testing.assert_close(other.shifts, load_particles(project).shifts)


def test_passthrough_is_joined_by_uid(project):
    first = ("uid", "alignments3D/")
    whole = fields()
    main = {name: value for name, value in whole.items() if name.startswith(first)}
    rest = {name: value for name, value in whole.items() if not name.startswith("alignments3D")}
    order = np.random.default_rng(0).permutation(N)
    write_cs(project.parent / "main.cs", main)
    write_cs(project.parent / "rest.cs", {name: value[order] for name, value in rest.items()})
    joined = load_particles(project.parent / "main.cs", passthrough=project.parent / "rest.cs")
    assert_same(joined, load_particles(project), atol=0)
    with pytest.raises(
        ValueError, match="expected fields blob/path, blob/idx in .*main.cs.* try p"
    ):
        load_particles(project.parent / "main.cs")
    with pytest.raises(ValueError, match="expected fields alignments3D/pose in .*rest.cs"):
        load_particles(project.parent / "rest.cs")
    few = {name: value[:3] for name, value in rest.items()}
    write_cs(project.parent / "few.cs", few)
    with pytest.raises(ValueError, match="every particle of .*main.cs in .*few.cs, got .* row 4"):
        load_particles(project.parent / "main.cs", passthrough=[project.parent / "few.cs"])
    with pytest.raises(ValueError, match="expected a .cs file for passthrough"):
        load_particles(project.parent / "a.star", passthrough="b.cs")


def test_of_several_classes_the_most_probable(project):
    values = fields()
    rng = np.random.default_rng(2)
    poses = {name: values.pop(f"alignments3D/{name}") for name in ("pose", "shift", "psize_A")}
    posterior = rng.dirichlet(np.ones(3), N).astype(np.float32)
    best = posterior.argmax(1)
    many = {
        name: rng.normal(size=(N, 3, poses[name].shape[1])).astype(np.float32)
        for name in ("pose", "shift")
    }
    for name, value in many.items():
        value[np.arange(N), best] = poses[name]
    stacked = {f"alignments3D_multi/{name}": value for name, value in many.items()}
    stacked |= {"alignments3D_multi/class_posterior": posterior}
    separate = {}
    for k in range(3):
        separate[f"alignments_class_{k}/class_posterior"] = posterior[:, k]
        separate |= {f"alignments_class_{k}/{name}": many[name][:, k] for name in many}
    for number, more in enumerate((stacked, separate)):
        loaded = load_particles(write_cs(project.parent / f"{number}.cs", values | more))
        assert_same(loaded, load_particles(project))


def test_a_subset_goes_back_to_cryosparc_as_it_was(project):
    subset = load_particles(project)[[7, 3, 4]]
    subset.save(project.parent / "subset.cs", images=False)
    before = read_cs(project).array[[7, 3, 4]]
    after = read_cs(project.parent / "subset.cs").array
    assert after.dtype == before.dtype and after.tobytes() == before.tobytes()
    assert_same(load_particles(project.parent / "subset.cs"), subset, atol=0)


def test_changed_poses_are_written_and_others_are_as_they_were(project):
    particles = load_particles(project)
    rotations = particles.rotations.clone()
    rotations[2] = random_rotations(1, seed=3)[0]
    shifts = particles.shifts.clone()
    shifts[5] += 1.0
    changed = replace(particles, rotations=rotations, shifts=shifts)
    changed.save(project.parent / "changed.cs", images=False)
    before, after = read_cs(project).array, read_cs(project.parent / "changed.cs").array
    rows = [row for row in range(N) if row not in (2, 5)]
    assert after[rows].tobytes() == before[rows].tobytes()
    assert_same(load_particles(project.parent / "changed.cs"), changed)


def test_images_can_be_written_beside_a_cs(project):
    particles = load_particles(project, box_size=8)[::2]
    particles.save(project.parent / "binned.cs")
    again = load_particles(project.parent / "binned.cs")
    torch.testing.assert_close(again.read_images(), particles.read_images(), atol=1e-6, rtol=0)
    torch.testing.assert_close(again.shifts, particles.shifts, atol=1e-5, rtol=0)
    assert again.pixel_size == pytest.approx(2 * PIXEL) and again.box_size == 8


def test_a_star_out_of_a_cs_keeps_what_relion_has_a_name_for(project):
    particles = load_particles(project)[[4, 9]]
    particles.save(project.parent / "out.star", images=False)
    again = load_particles(project.parent / "out.star", invert=True)
    assert_same(again, particles)
    table = starfile.read(project.parent / "out.star", parse_as_string=["ucsfUid"])["particles"]
    assert table["ucsfUid"].tolist() == [str(uid) for uid in UIDS[[4, 9]]]
    assert table["rlnRandomSubset"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="expected particles that came from a .cs file"):
        again.save(project.parent / "back.cs")


def test_source_opens_the_same_particles_again(project):
    particles = load_particles(project, box_size=8, voltage_kv=200.0)[[3, 1]]
    assert particles.source["cs"] == str(project) and particles.file_suffix == ".cs"
    again = open_source(particles.source)[particles.rows]
    assert again.metadata_digest() == particles.metadata_digest()
    assert again.ctf.voltage_kv.tolist() == [200, 200]


def test_columns_are_the_numbers_of_the_file(project):
    columns = load_particles(project)[[2, 0]].columns
    assert columns["alignments3D/split"].tolist() == [0, 0] and "uid" not in columns
    assert "alignments3D/error" in columns and "blob/path" not in columns


def test_ctf_scale_and_b_factor_are_used_and_tilt_is_named(project):
    values = fields()
    values["ctf/scale"] = values["ctf/scale"] * np.float32(0.8)
    values["ctf/bfactor"] = values["ctf/bfactor"] + np.float32(50)
    values["ctf/tilt_A"] = values["ctf/tilt_A"] + np.float32(3)
    path = write_cs(project.parent / "more.cs", values)
    with pytest.warns(UserWarning, match="more.cs has ctf/tilt_A: the images are not"):
        loaded = load_particles(path)
    plain = load_particles(project).ctf.evaluate(16, PIXEL)
    x, y = np.fft.rfftfreq(16, PIXEL)[None, :], np.fft.fftfreq(16, PIXEL)[:, None]
    damping = 0.8 * np.exp(-50 / 4 * (x**2 + y**2))
    np.testing.assert_allclose(loaded.ctf.evaluate(16, PIXEL), plain.numpy() * damping, atol=1e-5)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ctf/df1_A": np.zeros(N, np.float32)}, "defocus u above 0 in .*, got 0 in row 1"),
        ({"ctf/amp_contrast": np.full(N, 7.0)}, "amplitude contrast from 0 to 1.*got 7 in row 1"),
        ({"blob/sign": np.array([1.0, -1.0] * (N // 2))}, "one contrast, .* got -1 in row 2"),
        ({"blob/shape": np.full((N, 2), 32)}, "expected 32 px × 1.31 Å, as .*, got 16 px"),
        ({"blob/psize_A": np.full(N, 2.62)}, "expected 16 px × 2.62 Å, as .* × 1.31 Å in the head"),
        ({"blob/idx": np.full(N, 99)}, "got row 1 with image 100"),
        ({"alignments3D/pose": np.full((N, 3), np.nan)}, "numbers in alignments3D/pose.* row 1"),
        ({"alignments3D/pose": np.zeros((N, 4))}, r"numbers of shape \(3,\) in alignments3D/pose"),
        ({"blob/path": np.zeros(N)}, "expected text in blob/path"),
        ({"ctf/cs_mm": None}, "expected fields ctf/cs_mm"),
    ],
)
def test_values_that_cannot_be(project, changes, message):
    path = write_cs(project.parent / "bad.cs", fields(**changes))
    with pytest.raises(ValueError, match=message):
        load_particles(path)


def test_files_that_are_no_cs(project, tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a cryoSPARC .cs file, got .*absent.cs"):
        load_particles(tmp_path / "absent.cs")
    array = np.array([{"a": 1}], dtype=object)
    with open(tmp_path / "pickle.cs", "wb") as file:
        np.save(file, array, allow_pickle=True)
    (tmp_path / "text.cs").write_text("hello")
    (tmp_path / "short.cs").write_bytes(project.read_bytes()[:-10])
    with open(tmp_path / "plain.cs", "wb") as file:
        np.save(file, np.zeros(5))
    for name, reason in {
        "pickle": "Python objects, which are never read",
        "text": "expected a cryoSPARC .cs file",
        "short": "fewer than the",
        "plain": "expected a table of particles",
    }.items():
        with pytest.raises(ValueError, match=f"expected .*{reason}|{reason}"):
            load_particles(tmp_path / f"{name}.cs")


def test_fields_are_replaced_where_they_are():
    array = np.zeros(2, dtype=[("a", "i4"), ("b", "f4"), ("c", "S2")])
    result = with_fields(array, {"b": np.ones((2, 2)), "d": np.arange(2)})
    assert result.dtype.names == ("a", "b", "c", "d") and result["b"].shape == (2, 2)


def test_a_subset_finds_its_images_from_any_folder(project):
    root = project.parent.parent
    elsewhere = root.parent / f"{root.name}-other"
    subset = load_particles(project)[[7, 3]]
    for folder in (root / "J30", root / "J24" / "deeper", elsewhere):
        subset.save(folder / "subset.cs", images=False)
        paths = read_cs(folder / "subset.cs").array["blob/path"].tolist()
        kept = b">J19/extract/a.mrc"
        absolute = str(root / "J19/extract/a.mrc").encode()
        assert paths == [absolute if folder == elsewhere else kept] * 2
        assert_same(load_particles(folder / "subset.cs"), subset_of(subset, folder, root), atol=0)
    # Moved to a sibling folder, and a subset of a subset.
    (root / "J31").mkdir()
    (root / "J30/subset.cs").rename(root / "J31/moved.cs")
    moved = load_particles(root / "J31/moved.cs")[[1]]
    assert_same(moved, subset[[1]], atol=0)
    moved.save(elsewhere / "one.cs", images=False)
    one = load_particles(elsewhere / "one.cs")
    assert torch.equal(one.read_images(), subset.read_images([1]))
    before, after = read_cs(project).array[[3]], read_cs(elsewhere / "one.cs").array
    assert after.dtype.names == before.dtype.names
    for name in before.dtype.names:
        assert name == "blob/path" or after[name].tobytes() == before[name].tobytes()


def subset_of(particles, folder, root):
    """The particles with the ids that a table in this folder gives them."""
    if folder.is_relative_to(root):
        return particles
    ids = [one.replace("J19", str(root / "J19")) for one in particles.ids]
    return replace(particles, ids=ids)


@pytest.mark.parametrize("kind", ["multi", "class"])
def test_corrected_poses_of_several_classes_are_read_again(project, kind):
    values = fields()
    pose, shift = values.pop("alignments3D/pose"), values.pop("alignments3D/shift")
    values.pop("alignments3D/psize_A")
    prefix = "alignments3D_multi" if kind == "multi" else "alignments_class_0"
    if kind == "multi":
        pose, shift = pose[:, None], shift[:, None]
    values |= {f"{prefix}/pose": pose, f"{prefix}/shift": shift}
    values |= {f"{prefix}/class_posterior": np.ones(pose.shape[:-1], dtype=np.float32)}
    particles = load_particles(write_cs(project.parent / "many.cs", values))
    changed = replace(particles, rotations=random_rotations(N, seed=3), shifts=particles.shifts + 1)
    changed.save(project.parent / "changed.cs", images=False)
    assert_same(load_particles(project.parent / "changed.cs"), changed)
    after = read_cs(project.parent / "changed.cs").array
    for name in values:
        assert after[name].tobytes() == read_cs(project.parent / "many.cs").array[name].tobytes()


def test_more_columns_go_into_either_table(project):
    particles = load_particles(project)[[4, 1, 2]]
    scores = {"PC1 (Å)": [1.5, -2.0, 0.25], "weight": np.array([1, 0, 1])}
    particles.save(project.parent / "more.cs", images=False, columns=scores)
    particles.save(project.parent / "more.star", images=False, columns=scores)
    names = {".cs": "cryochains/", ".star": "cryochains"}
    for suffix, prefix in names.items():
        again = load_particles(project.parent / f"more{suffix}", invert=suffix == ".star")
        assert_same(again, particles)
        assert again.columns[f"{prefix}PC1"].tolist() == [1.5, -2.0, 0.25]
        # Kept in a subset, and replaced by a column of the same name.
        again[[2, 0]].save(
            project.parent / f"less{suffix}", images=False, columns={"weight": [5, 6]}
        )
        less = load_particles(project.parent / f"less{suffix}").columns
        assert less[f"{prefix}PC1"].tolist() == [0.25, 1.5]
        assert less[f"{prefix}weight"].tolist() == [5, 6]
        assert list(less.columns) == list(again.columns)
    before = read_cs(project).array[[4, 1, 2]]
    after = read_cs(project.parent / "more.cs").array
    for name in before.dtype.names:
        assert after[name].tobytes() == before[name].tobytes()


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"a": [1.0]}, r"one finite number a particle in the column 'a', got \(1,\) for 12"),
        ({"a": [np.nan] * N}, "one finite number a particle in the column 'a'"),
        ({"a": ["x"] * N}, "one finite number a particle in the column 'a'"),
        ({"(Å)": [1.0] * N}, "names of letters and digits, got '\\(Å\\)'; try PC1"),
        ({"a b": [1.0] * N, "a-b": [1.0] * N}, "different names .* got 'a-b'"),
    ],
)
def test_columns_that_cannot_be_written(project, columns, message):
    with pytest.raises(ValueError, match=message):
        load_particles(project).save(project.parent / "b.cs", images=False, columns=columns)
    assert not (project.parent / "b.cs").exists()
