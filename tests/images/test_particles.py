"""A stack of particles: order, splits, laziness, and the way to RELION and back."""

import json
import os
import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pandas as pd
import pytest
import starfile
import torch

import cryochains.images.stacks
from cryochains._files import pack_text, unpack_text
from cryochains.images import (
    CTF,
    ParticleStack,
    load_particles,
    plain_ids,
    random_rotations,
    write_particles,
)


def make(n=20, box=8, ctf=True, seed=0) -> ParticleStack:
    rng = np.random.default_rng(seed)
    images = torch.arange(n, dtype=torch.float32)[:, None, None] + torch.from_numpy(
        rng.uniform(0, 0.5, (n, box, box))
    )
    fields = {
        "defocus_u": rng.uniform(1e4, 2e4, n),
        "defocus_v": rng.uniform(1e4, 2e4, n),
        "defocus_angle": rng.uniform(0, np.pi, n),
        "phase_shift": rng.uniform(0, 1, n),
        "voltage_kv": rng.choice([200.0, 300.0], n),
        "spherical_aberration_mm": np.full(n, 2.7),
        "amplitude_contrast": np.full(n, 0.1),
    }
    return ParticleStack(
        images.float(),
        random_rotations(n, seed),
        torch.from_numpy(rng.normal(0, 3, (n, 2))),
        pixel_size=1.234567,
        ctf=CTF(**{name: torch.from_numpy(values) for name, values in fields.items()})
        if ctf
        else None,
    )


def assert_same(a: ParticleStack, b: ParticleStack, atol=0.0):
    torch.testing.assert_close(a.read_images(), b.read_images(), atol=0, rtol=0)
    torch.testing.assert_close(a.rotations, b.rotations, atol=atol, rtol=0)
    torch.testing.assert_close(a.shifts, b.shifts, atol=atol, rtol=0)
    assert a.pixel_size == pytest.approx(b.pixel_size, rel=1e-8)
    assert (a.ctf is None) == (b.ctf is None)
    for name in () if a.ctf is None else a.ctf.__dataclass_fields__:
        torch.testing.assert_close(
            getattr(a.ctf, name), getattr(b.ctf, name), atol=1e3 * atol, rtol=atol
        )


@pytest.fixture
def saved(tmp_path):
    """A stack in files, with columns that only RELION knows."""
    make().save(tmp_path / "all.star")
    blocks = starfile.read(tmp_path / "all.star")
    table = blocks["particles"]
    table["rlnMicrographName"] = [f"MotionCorr/{i:03d}.mrc" for i in range(len(table))]
    table["rlnRandomSubset"] = 1 + np.arange(len(table)) % 2
    table["rlnHelicalTubeID"] = [f"{i:03d}" for i in range(len(table))]
    table["rlnNormCorrection"] = [f"{1e-9 * (i + 1):.3e}" for i in range(len(table))]
    starfile.write({"general": {"rlnNote": "kept"}, **blocks}, tmp_path / "all.star")
    return tmp_path / "all.star"


@pytest.mark.parametrize("ctf", [True, False])
def test_save_and_load(tmp_path, ctf):
    stack = make(ctf=ctf)
    stack.save(tmp_path / "new" / "a.star")
    loaded = load_particles(tmp_path / "new" / "a.star")
    assert_same(stack, loaded, atol=1e-6)
    assert loaded.ids[3] == "000004@a.mrcs"
    assert set(starfile.read(tmp_path / "new" / "a.star")) == {"optics", "particles"}


def test_origin_in_the_file_is_what_centres_the_particle(tmp_path):
    stack = make()
    stack.save(tmp_path / "a.star")
    table = starfile.read(tmp_path / "a.star")["particles"]
    np.testing.assert_allclose(
        table[["rlnOriginXAngst", "rlnOriginYAngst"]], -stack.shifts.numpy(), atol=1e-6
    )


def test_load_subset_save_load_is_identical(saved, tmp_path):
    subset = load_particles(saved)[[7, 3, 12]]
    subset.save(tmp_path / "sub.star")
    again = load_particles(tmp_path / "sub.star")
    assert_same(subset, again)
    assert subset.rows.tolist() == [7, 3, 12] and again.rows.tolist() == [0, 1, 2]
    again.save(tmp_path / "third.star")
    assert_same(again, load_particles(tmp_path / "third.star"))


def test_columns_of_relion_survive_as_they_were_written(saved, tmp_path):
    load_particles(saved)[[7, 3, 12]].save(tmp_path / "sub.star")
    text = {"parse_as_string": ["rlnHelicalTubeID", "rlnNormCorrection", "rlnAngleRot"]}
    before, after = (starfile.read(path, **text) for path in (saved, tmp_path / "sub.star"))
    assert after["general"] == before["general"]
    assert after["optics"].equals(before["optics"])
    expected = before["particles"].iloc[[7, 3, 12]].reset_index(drop=True)
    assert (
        after["particles"]
        .drop(columns=["rlnImageName", "rlnImageOriginalName"])
        .equals(expected.drop(columns="rlnImageName"))
    )
    assert after["particles"]["rlnHelicalTubeID"].tolist() == ["007", "003", "012"]
    assert after["particles"]["rlnImageOriginalName"].tolist() == expected["rlnImageName"].tolist()


def test_what_was_changed_is_written(saved, tmp_path):
    particles = load_particles(saved)[[7, 3, 12]]
    changes = {
        "rotations": random_rotations(3, seed=9),
        "shifts": particles.shifts + 1,
        "pixel_size": 2.5,
        "ctf": make(3, seed=4).ctf,
    }
    for name, value in changes.items():
        changed = replace(particles, **{name: value})
        changed.save(tmp_path / "changed.star", images=False)
        if name == "pixel_size":
            # The header of the stack, which stays where it is, has the old one.
            with pytest.raises(ValueError, match="8 px × 2.5 Å, as .* got 8 px × 1.23457 Å .* try"):
                load_particles(tmp_path / "changed.star")
        size = {"pixel_size": 2.5} if name == "pixel_size" else {}
        again = load_particles(tmp_path / "changed.star", **size)
        assert_same(changed, again, atol=1e-6)
        table = starfile.read(tmp_path / "changed.star")["particles"]
        assert table["rlnMicrographName"].tolist() == [
            f"MotionCorr/{i:03d}.mrc" for i in (7, 3, 12)
        ]
    smaller = replace(particles, images=torch.zeros(3, 4, 4), pixel_size=2 * particles.pixel_size)
    smaller.save(tmp_path / "smaller.star")
    assert load_particles(tmp_path / "smaller.star").box_size == 4
    assert set(starfile.read(tmp_path / "smaller.star")["optics"]["rlnImageSize"]) == {4}
    replace(particles, ctf=None).save(tmp_path / "none.star")
    assert load_particles(tmp_path / "none.star").ctf is None


def test_a_selection_can_name_the_images_where_they_are(saved, tmp_path):
    particles = load_particles(saved)
    below, elsewhere = (
        tmp_path / "Select" / "sub.star",
        tmp_path.parent / f"{tmp_path.name}-other" / "sub.star",
    )
    for path in (below, elsewhere):
        particles[[7, 3]].save(path, images=False)
        assert [entry.name for entry in path.parent.iterdir()] == ["sub.star"]
        assert_same(particles[[7, 3]], load_particles(path))
    assert load_particles(below).ids.tolist() == particles.ids[[7, 3]].tolist()
    with pytest.raises(ValueError, match="expected images in files .* try images=True"):
        make().save(tmp_path / "b.star", images=False)


def test_corrected_poses_of_a_subset_of_a_subset(saved, tmp_path):
    particles = load_particles(saved)[[7, 3, 12, 5]]
    particles.save(tmp_path / "Select" / "one.star", images=False)
    subset = load_particles(tmp_path / "Select" / "one.star")[[2, 0]]
    changed = replace(subset, rotations=random_rotations(2, seed=9), shifts=subset.shifts - 1)
    for folder in (tmp_path / "Other", tmp_path.parent / f"{tmp_path.name}-other"):
        changed.save(folder / "two.star", images=False)
        assert_same(changed, load_particles(folder / "two.star"), atol=1e-5)
    text = {"parse_as_string": ["rlnHelicalTubeID", "rlnNormCorrection"]}
    before, after = (starfile.read(p, **text) for p in (saved, tmp_path / "Other" / "two.star"))
    assert after["optics"].equals(before["optics"]) and after["general"] == before["general"]
    assert list(after["particles"].columns) == list(before["particles"].columns)
    poses = [name for name in before["particles"] if name.startswith(("rlnAngle", "rlnOrigin"))]
    expected = before["particles"].iloc[[12, 7]].reset_index(drop=True).drop(columns=poses)
    assert after["particles"].drop(columns=poses).equals(expected)
    # A table that was moved to a sibling folder finds its images.
    (tmp_path / "Third").mkdir()
    (tmp_path / "Other" / "two.star").rename(tmp_path / "Third" / "moved.star")
    assert_same(changed, load_particles(tmp_path / "Third" / "moved.star"), atol=1e-5)


def test_order_is_kept_through_shuffle_split_and_file(tmp_path):
    stack = make(50)
    number = stack.read_images()[:, 0, 0].floor()
    assert number.tolist() == list(range(50))
    seen = []
    for batch in stack.batches(batch_size=8, seed=3):
        assert torch.equal(batch.images, stack.read_images(batch.rows))
        assert torch.equal(batch.rotations, stack.rotations[batch.rows])
        assert torch.equal(batch.shifts, stack.shifts[batch.rows])
        assert torch.equal(
            batch.ctf, stack.ctf[batch.rows].evaluate(stack.box_size, stack.pixel_size)
        )
        seen += batch.rows.tolist()
    assert seen != list(range(50)) and sorted(seen) == list(range(50))
    part = stack.split(0.5, 0.3, 0.2, seed=1)[1]
    part.save(tmp_path / "part.star")
    loaded = load_particles(tmp_path / "part.star")
    assert loaded.read_images()[:, 0, 0].floor().tolist() == part.rows.tolist() == sorted(part.rows)


def test_batches_in_order_and_whole(tmp_path):
    stack = make(10)
    batches = list(stack.batches(batch_size=4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.images for batch in batches]), stack.read_images())
    assert batches[0].pose == (batches[0].rotations, batches[0].shifts, batches[0].ctf)
    again = torch.cat([batch.rows for batch in stack.batches(4, seed=1)])
    assert torch.equal(again, torch.cat([batch.rows for batch in stack.batches(3, seed=1)]))
    assert not torch.equal(again, torch.cat([batch.rows for batch in stack.batches(4, seed=2)]))
    assert next(make(ctf=False).batches()).ctf is None
    with pytest.raises(
        ValueError, match="expected batch_size to be a whole number of 1 or more, got 0"
    ):
        next(stack.batches(0))


def test_progress_only_where_asked(capsys):
    list(make().batches(8))
    assert capsys.readouterr().err == ""
    list(make().batches(8, progress="reading"))
    assert "reading" in capsys.readouterr().err


@pytest.mark.parametrize(
    "fractions", [(0.8, 0.1, 0.1), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0), (0.2, 0.2, 0.1)]
)
def test_splits_are_disjoint_and_seeded(fractions):
    stack = make(101)
    parts = stack.split(*fractions, seed=5)
    rows = np.concatenate([part.rows for part in parts])
    assert len(set(rows)) == len(rows)
    for part, fraction in zip(parts, fractions, strict=True):
        assert abs(len(part) - 101 * fraction) <= 1
    if sum(fractions) == 1:
        assert len(rows) == 101
    same, other = stack.split(*fractions, seed=5), stack.split(*fractions, seed=6)
    assert all(np.array_equal(a.rows, b.rows) for a, b in zip(parts, same, strict=True))
    assert fractions[0] == 1 or not np.array_equal(parts[0].rows, other[0].rows)


@pytest.mark.parametrize("fractions", [(0.8, 0.3, 0.1), (-0.1, 0.5, 0.5)])
def test_impossible_splits(fractions):
    with pytest.raises(
        ValueError,
        match="expected (fractions that add up to 1 or less|train to be a share from 0 to 1), got",
    ):
        make().split(*fractions)


def test_indexing_is_that_of_arrays_and_reads_nothing(saved, monkeypatch):
    stack = load_particles(saved)
    monkeypatch.setattr(
        cryochains.images.stacks.Images, "read", lambda self: pytest.fail("an image was read")
    )
    assert len(stack[3]) == 1 and stack[3].ids[0] == stack.ids[3]
    assert stack[::-1].rows.tolist() == list(range(20))[::-1]
    assert stack[torch.tensor([4, 4, -1])].rows.tolist() == [4, 4, 19]
    assert (
        stack[stack.rotations[:, 2, 2] > 0].rows.tolist()
        == np.flatnonzero(stack.rotations[:, 2, 2] > 0).tolist()
    )
    assert stack[5:15][2:4].rows.tolist() == [7, 8]
    assert len(stack[[]]) == 0
    assert sum(len(one) for one in stack) == 20
    assert repr(stack) == "ParticleStack(20 particles of 8 px × 1.23457 Å, with CTF, all.mrcs)"
    with pytest.raises(IndexError, match="expected positions within 20 particles, got 20"):
        stack[20]


def test_memory_does_not_grow_with_the_stack(tmp_path):
    n, box = 2000, 32
    whole = n * box * box * 4
    chunks = (torch.full((100, box, box), float(i)) for i in range(n // 100))
    one = make(1)[np.zeros(n, dtype=int)]
    write_particles(
        tmp_path / "big.star",
        chunks,
        rotations=one.rotations,
        shifts=one.shifts,
        pixel_size=1.0,
        box_size=box,
        ctf=one.ctf,
    )
    stack = load_particles(tmp_path / "big.star")
    tracemalloc.start()
    try:
        for batch in stack.batches(50, seed=0):
            assert torch.equal(batch.images[:, 0, 0], (batch.rows // 100).float())
        assert tracemalloc.get_traced_memory()[1] < whole / 8
        stack[::-1].save(tmp_path / "back.star")
        # The table is text, a few hundred bytes a particle; the images are what must not be held.
        assert tracemalloc.get_traced_memory()[1] < whole / 2
    finally:
        tracemalloc.stop()
    assert load_particles(tmp_path / "back.star").read_images([0, n - 1])[:, 0, 0].tolist() == [
        19,
        0,
    ]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_an_interrupted_save_leaves_the_files_as_they_were(tmp_path, monkeypatch, interruption):
    make().save(tmp_path / "a.star")
    before = files(tmp_path)

    def chunks(self, *_, **__):
        yield next(whole(self, 8))
        raise interruption

    whole = ParticleStack.batches
    monkeypatch.setattr(ParticleStack, "batches", chunks)
    expected = KeyboardInterrupt if isinstance(interruption, KeyboardInterrupt) else ValueError
    sentence = r"expected a folder that can be written.* \(No space left on device\)"
    with pytest.raises(expected, match=sentence if expected is ValueError else None):
        make(30, seed=1).save(tmp_path / "a.star")
    assert files(tmp_path) == before


def test_images_that_are_nan_do_not_become_a_file(tmp_path):
    stack = make()
    stack.images.stacks[0][5, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="expected finite pixels"):
        stack.save(tmp_path / "a.star")
    assert not list(tmp_path.iterdir())


def test_batches_with_images_that_are_nan_when_asked_for():
    """As they are, and by default not at all; without images nobody looks."""
    stack = make()
    pixels = stack.images.stacks[0]
    pixels[5, 0, 0], pixels[6, 1, 1] = torch.nan, torch.inf
    read = [batch.images for batch in stack.batches(4, require_finite=False)]
    torch.testing.assert_close(torch.cat(read), pixels, rtol=0, atol=0, equal_nan=True)
    rows = [batch.rows.tolist() for batch in stack.batches(4, require_finite=False)]
    assert sum(rows, []) == list(range(len(stack)))
    with pytest.raises(ValueError, match="expected finite pixels, got NaN or Inf in image 6"):
        list(stack.batches(4))
    assert len(next(stack.batches(4)).images) == 4, "those before it are read"
    assert all(batch.images is None for batch in stack.batches(4, images=False))


def test_paths_that_cannot_be_written(tmp_path, saved):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="expected a folder that can be written"):
        make().save(tmp_path / "file" / "a.star")
    with pytest.raises(
        ValueError, match=r"expected a path that ends in .star, got .*a.mrcs; try .*a.star"
    ):
        make().save(tmp_path / "a.mrcs")
    with pytest.raises(
        ValueError, match="expected a name that none .* read from, got .*all.mrcs; try a new one"
    ):
        load_particles(saved)[:3].save(saved)
    with pytest.raises(ValueError, match="expected at least one particle"):
        make()[[]].save(tmp_path / "a.star")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"images": torch.zeros(20, 8, 10)}, "even box, got 8 × 10 px"),
        ({"images": torch.zeros(20, 7, 7)}, "even box, got 7 × 7 px"),
        ({"images": torch.zeros(8, 8)}, r"shape \(n, box, box\), got \(8, 8\)"),
        (
            {"rotations": -torch.eye(3).expand(20, 3, 3)},
            "expected rotations .* determinant -1 at position 0",
        ),
        ({"rotations": 1.01 * torch.eye(3).expand(20, 3, 3)}, "expected rotations"),
        ({"rotations": torch.eye(3).expand(20, 3, 3) * torch.nan}, "expected rotations"),
        ({"rotations": torch.eye(3).expand(19, 3, 3)}, r"expected rotations of shape \(20, 3, 3\)"),
        ({"shifts": torch.zeros(20, 3)}, r"expected shifts of shape \(20, 2\)"),
        ({"shifts": torch.full((20, 2), torch.inf)}, "expected shifts to be an array of finite"),
        ({"pixel_size": 0.0}, "expected pixel_size to be a number of Å above 0"),
        ({"ids": ["a"] * 19}, r"expected ids of shape \(20,\)"),
        (
            {"ids": [["a"]] * 20},
            r"expected ids of shape \(n,\), .* a particle, got \(20, 1\); try a list of strings",
        ),
        (
            {"ids": ["a"] * 19 + [1.5]},
            "expected ids .* strings or integers, got 1.5 at position 19",
        ),
        ({"ids": [True] * 20}, "expected ids .* strings or integers, got True at position 0"),
        ({"ids": [None] * 20}, "expected ids .* strings or integers, got None at position 0"),
        ({"rows": range(19)}, r"expected rows of shape \(20,\)"),
        ({"truth": range(19)}, r"expected truths of shape \(20,\)"),
        ({"ctf": make(3).ctf}, "expected CTFs"),
    ],
)
def test_stacks_that_do_not_fit_together(change, message):
    parts = {
        "images": torch.zeros(20, 8, 8),
        "rotations": torch.eye(3).expand(20, 3, 3),
        "pixel_size": 1.0,
    }
    ParticleStack(**parts)
    with pytest.raises(ValueError, match=message):
        ParticleStack(**parts | change)


# Identity


@pytest.mark.parametrize(
    "ids, expected",
    [
        (range(7, 10), [7, 8, 9]),
        (np.arange(3), [0, 1, 2]),
        (np.arange(3, dtype=np.uint8).astype(object), [0, 1, 2]),
        ([np.int64(5), "b\nc", np.str_("d")], [5, "b\nc", "d"]),
        (np.array(["1@a", "2@a", "3@a"]), ["1@a", "2@a", "3@a"]),
        (pd.Series(["x", "y", "z"]), ["x", "y", "z"]),
        (torch.tensor([3, 1, 2]), [3, 1, 2]),
    ],
)
def test_ids_are_strings_or_integers_of_python(ids, expected):
    stack = ParticleStack(
        torch.zeros(3, 8, 8), torch.eye(3).expand(3, 3, 3), pixel_size=1.0, ids=ids
    )
    assert stack.ids.tolist() == expected
    assert [type(one) for one in stack.ids] == [type(one) for one in expected]
    assert unpack_text(pack_text(stack.ids)) == expected
    assert stack[[2, 0]].ids.tolist() == [expected[2], expected[0]]


def test_ids_of_the_stack_are_its_own():
    ids = np.array(["a", "b", "c"], dtype=object)
    stack = ParticleStack(
        torch.zeros(3, 8, 8), torch.eye(3).expand(3, 3, 3), pixel_size=1.0, ids=ids
    )
    ids[0] = "changed"
    assert stack.ids[0] == "a"


def test_truth_is_anything_with_a_row_a_particle():
    stack = replace(make(5), truth=np.arange(5) * 10)
    assert stack[[4, 1]].truth.tolist() == [40, 10]
    assert stack[::2][1].truth.tolist() == [20]


def changes(stack):
    """One change of each kind: what differs is in the name."""
    turned = stack.rotations.clone()
    turned[2] = turned[2] @ torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    ctf = stack.ctf
    return {
        "rotations": replace(stack, rotations=turned),
        "shifts": replace(stack, shifts=stack.shifts + torch.tensor([0.001, 0.0])),
        "pixel size": replace(stack, pixel_size=1.001 * stack.pixel_size),
        "ctf": replace(stack, ctf=replace(ctf, defocus_u=ctf.defocus_u + 0.01)),
        "no ctf": replace(stack, ctf=None),
        "ids": replace(stack, ids=[f"{name}!" for name in stack.ids]),
        "order": stack[::-1],
        "fewer": stack[:-1],
    }


def test_digests_tell_particles_apart(saved, monkeypatch):
    stack = load_particles(saved)
    others = changes(stack).values()
    prints = [one.digest() for one in (stack, *others)]
    assert len(set(prints)) == len(prints)
    assert stack[:].digest() == load_particles(saved).digest() == stack.digest()
    dark = load_particles(saved, invert=True)
    assert dark.digest() != stack.digest(), "images are part of it"
    assert dark.metadata_digest() == stack.metadata_digest()

    monkeypatch.setattr(cryochains.images.stacks.Images, "read", lambda self: pytest.fail("read"))
    digests = [one.metadata_digest() for one in (stack, *others)]
    assert len(set(digests)) == len(digests)
    assert stack[:].metadata_digest() == load_particles(saved).metadata_digest() == digests[0]


@pytest.mark.parametrize("n, digested", [(20, [0, 3, 5, 8, 11, 14, 16, 19]), (3, [0, 1, 2])])
def test_digest_of_some_images(n, digested):
    stack = make(20)[:n]
    images = stack.read_images()
    changed = []
    for row in range(n):
        others = images.clone()
        others[row, 0, 0] += 1
        other = replace(stack, images=others)
        changed += [row] if other.image_digest() != stack.image_digest() else []
        assert (other.digest() != stack.digest()) == (row in digested)
    assert changed == digested
    moved = replace(stack, shifts=stack.shifts + 1)
    assert moved.image_digest() == stack.image_digest(), "of the images alone"
    assert int(stack.image_digest(), 16) and make(20)[[]].image_digest()


def test_digest_reads_few_images(saved, monkeypatch):
    read = []
    original = cryochains.images.stacks.Images.read
    monkeypatch.setattr(
        cryochains.images.stacks.Images,
        "read",
        lambda self: read.append(len(self)) or original(self),
    )
    load_particles(saved).image_digest()
    assert read == [8]


@pytest.mark.parametrize(
    "ids, plain",
    [
        (["b", "a"], ["b", "a"]),
        ((3, "a"), [3, "a"]),
        (range(2), [0, 1]),
        (np.array(["b", "a"]), ["b", "a"]),
        (np.array([3, 1], dtype=np.uint8), [3, 1]),
        ([np.str_("a"), np.int32(4)], ["a", 4]),
        (torch.tensor([3, 1]), [3, 1]),
        ([], []),
    ],
)
def test_plain_ids(ids, plain):
    array = plain_ids(ids)
    assert array.dtype == object and array.shape == (len(plain),)
    assert array.tolist() == plain
    assert set(map(type, array)) <= {str, int}
    assert plain_ids(array) is not array, "a copy"


@pytest.mark.parametrize(
    "ids, got",
    [
        ([1, True], "True at position 1"),
        (np.array([True]), "True at position 0"),
        (torch.tensor([False]), "False at position 0"),
        ([1.0], "1.0 at position 0"),
        (torch.tensor([0.5]), "0.5 at position 0"),
        (["a", None], "None at position 1"),
        ([b"a"], "b'a' at position 0"),
    ],
)
def test_ids_that_are_neither_text_nor_numbers(ids, got):
    sentence = f"expected ids that are strings or integers, got {got}; try str of each"
    with pytest.raises(ValueError, match=sentence):
        plain_ids(ids)


@pytest.mark.parametrize(
    "ids, got", [(None, "None"), ("ab", "'ab'"), (7, "7"), ([[1], [2]], r".2, 1.")]
)
def test_ids_that_are_no_list(ids, got):
    with pytest.raises(ValueError, match=rf"expected ids of shape \(n,\), .*got {got}; try a list"):
        plain_ids(ids)


def test_batches_have_a_short_repr():
    batch = next(make(20).batches(16))
    assert repr(batch) == "Batch(16 particles, 8 px, with CTF, on cpu)"
    bare = next(replace(make(20), ctf=None).batches(16, images=False))
    assert repr(bare) == "Batch(16 particles, no images, no CTF, on cpu)"


def test_digest_is_the_same_in_another_interpreter(saved):
    script = (
        "import sys; from cryochains.images import load_particles; "
        "stack = load_particles(sys.argv[1]); print(stack.metadata_digest(), stack.digest())"
    )
    stack = load_particles(saved)
    for seed in ("0", "1"):
        answer = subprocess.run(
            [sys.executable, "-c", script, str(saved)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert answer.stdout.split() == [stack.metadata_digest(), stack.digest()]


@pytest.mark.parametrize("invert", [False, True])
def test_source_opens_the_same_particles_again(saved, monkeypatch, invert):
    monkeypatch.chdir(saved.parent)
    subset = load_particles(saved.name, invert=invert)[[7, 3, 12]][::-1]
    source = json.loads(json.dumps(subset.source))
    assert source == {"star": str(saved), "invert": invert}
    monkeypatch.chdir("/")
    again = load_particles(source["star"], invert=source["invert"])[subset.rows]
    assert_same(subset, again)
    assert again.ids.tolist() == subset.ids.tolist() and again.rows.tolist() == [12, 3, 7]
    assert again.metadata_digest() == subset.metadata_digest()
    assert again.source == source


def test_no_source_without_a_file_or_after_a_change(saved):
    assert make().source is None
    stack = load_particles(saved)
    for what, changed in changes(stack).items():
        expected = stack.source if what in ("order", "fewer") else None
        assert changed.source == expected, what
    assert replace(stack, images=stack.read_images()).source is None
    assert replace(stack, images=stack.images[::-1]).source is None
    assert replace(stack, truth=np.arange(20)).source == stack.source, "the truth is in no file"


def test_batches_without_images_read_none(saved, monkeypatch):
    stack = load_particles(saved)
    expected = list(stack.batches(8, seed=2))
    monkeypatch.setattr(cryochains.images.stacks.Images, "read", lambda self: pytest.fail("read"))
    batches = list(stack.batches(8, seed=2, images=False))
    assert len(batches) == len(expected) == 3
    for batch, other in zip(batches, expected, strict=True):
        assert batch.images is None and len(batch) == len(other)
        assert torch.equal(batch.rows, other.rows)
        for one, two in zip(batch.pose, other.pose, strict=True):
            assert torch.equal(one, two)


def test_a_stack_is_frozen(saved):
    stack = load_particles(saved)
    for name in ("rotations", "pixel_size", "truth"):
        with pytest.raises(FrozenInstanceError):
            setattr(stack, name, None)
