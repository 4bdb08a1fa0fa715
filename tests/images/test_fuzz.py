"""Damaged tables and stacks: each is read, or refused in one sentence; none hangs or crashes."""

import time
import warnings

import numpy as np
import pytest
import torch

from cryochains.images import load_particles
from cryochains.images.cryosparc import write_array
from cryochains.images.stacks import write_stack

N = 4
BOX = 8
# What numbers are replaced by in texts, and names by.
WORDS = (
    b"nan inf -inf -1 0 1e400 1e-400 99999999999999999999 0x10 abc # ' \" ; data_ loop_ _x "
    b"data_optics data_particles _rlnImageName 1@a.mrcs 0@a.mrcs @a.mrcs 7@ 1@../../a.mrcs "
    b"1@/dev/null 1@/tmp 999999999999@a.mrcs \xff\xfe \x00 \r [1,2 [] True"
).split(b" ")


@pytest.fixture
def good(tmp_path):
    """A whole .star, .cs and .mrcs."""
    stack = tmp_path / "a.mrcs"
    write_stack(stack, [torch.ones(N, BOX, BOX)], n_images=N, box_size=BOX, pixel_size=2.0)
    rows = "".join(f"{i + 1:06d}@a.mrcs {i} {2 * i} 30 1.5 -2 1 2e4 1.9e4 12\n" for i in range(N))
    columns = "ImageName AngleRot AngleTilt AnglePsi OriginXAngst OriginYAngst OpticsGroup "
    columns += "DefocusU DefocusV DefocusAngle"
    names = "".join(f"_rln{name} #{k + 1}\n" for k, name in enumerate(columns.split()))
    optics = {
        "OpticsGroup": 1,
        "Voltage": 300,
        "SphericalAberration": 2.7,
        "AmplitudeContrast": 0.1,
        "ImagePixelSize": 2.0,
        "ImageSize": BOX,
        "EvenZernike": "[0,0.1,0]",
        "MagMat00": 1.01,
        "MagMat01": 0,
        "MagMat10": 0,
        "MagMat11": 1,
    }
    heads = "".join(f"_rln{name}\n" for name in optics)
    cells = " ".join(map(str, optics.values()))
    (tmp_path / "a.star").write_text(
        f"# version 30001\n\ndata_optics\n\nloop_\n{heads}{cells}\n\n# version 30001\n\n"
        f"data_particles\n\nloop_\n{names}{rows}\n"
    )
    kinds = [("uid", "u8"), ("blob/path", "S8"), ("blob/idx", "u4"), ("blob/shape", "u4", 2)]
    kinds += [("blob/psize_A", "f4"), ("blob/sign", "f4"), ("alignments3D/pose", "f4", 3)]
    kinds += [("alignments3D/shift", "f4", 2), ("alignments3D/psize_A", "f4")]
    ctf = ("df1_A", "df2_A", "df_angle_rad", "accel_kv", "cs_mm", "amp_contrast")
    kinds += [(f"ctf/{name}", "f4") for name in ctf]
    array = np.ones(N, dtype=kinds)
    array["blob/path"], array["blob/idx"], array["blob/shape"] = b">a.mrcs", range(N), BOX
    array["blob/psize_A"] = 2.0
    write_array(tmp_path / "a.cs", array)
    for name in ("a.star", "a.cs"):
        assert load_particles(tmp_path / name).read_images().shape == (N, BOX, BOX)
    return tmp_path


def damaged(data, rng, is_text):
    """The bytes with one to three things wrong."""
    for _ in range(rng.integers(1, 4)):
        kind = rng.integers(8)
        at = int(rng.integers(len(data) + 1))
        to = min(len(data), at + int(rng.integers(1, 40)))
        if kind == 0:
            data = data[:at]
        elif kind == 1:
            data = data[:at] + data[to:]
        elif kind == 2:
            data = data[:at] + data[at:to] * int(rng.integers(2, 5)) + data[to:]
        elif kind == 3:
            data = data[:at] + rng.bytes(to - at) + data[to:]
        elif is_text and kind < 7:
            words = data.split(b" ")
            word = WORDS[rng.integers(len(WORDS))]
            words[rng.integers(len(words))] = word
            data = b" ".join(words)
        elif is_text:
            lines = data.split(b"\n")
            one, other = rng.integers(len(lines), size=2)
            lines[one], lines[other] = lines[other], lines[one]
            data = b"\n".join(lines)
        else:
            # A whole number or a bit, most often of the header.
            at = int(rng.integers(min(len(data), 1100) or 1)) // 4 * 4
            value = int(rng.choice([0, -1, 1, 2**31 - 1, -(2**31), int(rng.integers(300))]))
            data = data[:at] + value.to_bytes(4, "little", signed=True) + data[at + 4 :]
    return data


@pytest.mark.parametrize(
    "name, opened, n", [("a.star", "a.star", 900), ("a.cs", "a.cs", 700), ("a.mrcs", "a.star", 700)]
)
def test_damaged_files_are_read_or_refused(good, name, opened, n):
    """One sentence from here, whatever the parts that read a file would raise."""
    rng = np.random.default_rng(0)
    whole = (good / name).read_bytes()
    n_refused = 0
    for number in range(n):
        data = damaged(whole, rng, name.endswith(".star"))
        (good / name).write_bytes(data)
        start = time.perf_counter()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load_particles(good / opened).read_images([0])
        except (ValueError, FileNotFoundError) as error:
            n_refused += 1
            sentence = str(error)
            assert sentence.startswith("expected ") and "try" in sentence, (number, sentence)
        assert time.perf_counter() - start < 5, number
    assert n_refused > n / 4


@pytest.mark.parametrize("at", ["end", "between names", "before rows", "between rows"])
def test_blank_lines_anywhere_take_no_time(good, at):
    text = (good / "a.star").read_text()
    mark = {
        "end": "",
        "between names": "_rlnAngleTilt",
        "before rows": "000001@",
        "between rows": "000003@",
    }[at]
    start_of_blank = text.index(mark) if mark else len(text)
    for blank in ("\n" * 40_000, " \t\r\n" * 40_000, "\n# a comment\n" * 20_000):
        spaced = text[:start_of_blank] + blank + text[start_of_blank:]
        (good / "a.star").write_bytes(spaced.encode())
        start = time.process_time()
        assert len(load_particles(good / "a.star")) == N
        assert time.process_time() - start < 2


def test_long_lines_take_no_time(good):
    text = (good / "a.star").read_text()
    for long in ("\"'" * 200_000, "# " * 300_000, "x" * 2_000_000, "' " * 200_000):
        (good / "a.star").write_text(text + long)
        start = time.process_time()
        with (
            pytest.raises(ValueError, match="expected a RELION .star file")
            if (not long.startswith("#"))
            else warnings.catch_warnings()
        ):
            load_particles(good / "a.star")
        assert time.process_time() - start < 5
