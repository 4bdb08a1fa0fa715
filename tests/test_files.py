"""Files are written whole or not at all, and say what they are."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from cryochains._files import atomic_path, load_tensors, pack_text, save_tensors, unpack_text


def test_success_replaces_the_file_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "note.txt"
    for text in ("first", "second"):
        with atomic_path(path) as part:
            assert part.parent == path.parent, (
                "a move within a folder is atomic, between disks it is not"
            )
            part.write_text(text)
        assert path.read_text() == text
    assert os.listdir(path.parent) == ["note.txt"]


def test_until_the_end_the_old_content_stands(tmp_path):
    path = tmp_path / "note.txt"
    path.write_text("old")
    with atomic_path(path) as part:
        part.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("old", [None, "old"])
def test_interrupted_write_leaves_no_half_file(tmp_path, error, old):
    path = tmp_path / "note.txt"
    if old is not None:
        path.write_text(old)
    with pytest.raises(error), atomic_path(path) as part:
        part.write_text("ha")
        raise error
    assert os.listdir(tmp_path) == ([] if old is None else ["note.txt"])
    assert old is None or path.read_text() == old


def test_suffixes_are_kept_for_writers_that_go_by_them(tmp_path):
    with atomic_path(tmp_path / "model.pdb.gz") as part:
        part.write_bytes(b"")
        assert part.name.endswith(".pdb.gz")


def test_permissions_are_those_of_any_new_file(tmp_path):
    plain, written = tmp_path / "plain", tmp_path / "written"
    plain.touch()
    with atomic_path(written) as part:
        part.touch()
    assert written.stat().st_mode == plain.stat().st_mode
    save_tensors(written, {"x": torch.ones(2)}, {"kind": "test"})
    assert written.stat().st_mode == plain.stat().st_mode


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "below.txt", tmp_path / "folder"):
        with pytest.raises(
            ValueError,
            match=r"expected a folder that can be written, got .* \(.+\).*try another folder",
        ):
            with atomic_path(path):
                pytest.fail("the body must not run")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


FILL_THE_DISK = """
import resource, signal, sys
import torch
from cryochains._files import atomic_path, save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    if sys.argv[2] == "text":
        with atomic_path(sys.argv[1]) as part:
            part.write_text("x" * 20_000)
    else:
        save_tensors(sys.argv[1], {"x": torch.zeros(100_000)}, {"kind": "test"})
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("writer", ["text", "tensors"])
def test_no_room_is_named_and_the_old_file_stays(tmp_path, writer):
    """A limit on the size of files stands for a full disk."""
    path = tmp_path / "a.safetensors"
    path.write_text("old")
    command = [sys.executable, "-c", FILL_THE_DISK, str(path), writer]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and "try another folder or disk" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.safetensors"]


def test_errors_of_reading_are_not_blamed_on_the_disk(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "a.txt"):
        (tmp_path / "absent").read_text()


def test_text_round_trip():
    values = ["1@a.mrcs", 7, "two\nlines", "µ", -3, ""]
    assert unpack_text(pack_text(values)) == values
    assert unpack_text(pack_text([])) == []


def test_tensors_round_trip(tmp_path):
    grid = torch.arange(12, dtype=torch.float64).view(3, 4)
    tensors = {
        "transposed": grid.T,
        "expanded": torch.ones(1, 3).expand(5, 3),
        "integers": torch.tensor([2**40, -1]),
        "scalar": torch.tensor(1.5, requires_grad=True),
        "empty": torch.zeros(0, 3),
        "shared": grid,
        "shared too": grid,
    }
    meta = {"kind": "test", "history": [{"loss": 0.1, "note": None}], "µ": 1e-300}
    save_tensors(tmp_path / "a.safetensors", tensors, meta)
    loaded, loaded_meta = load_tensors(tmp_path / "a.safetensors", "test")
    assert loaded_meta == meta
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value.detach()), name


def test_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"x": torch.ones(2)}, {"kind": "test"})
    with pytest.raises(TypeError):
        save_tensors(path, {"x": torch.zeros(2)}, {"kind": "test", "cannot be JSON": {1, 2}})
    assert torch.equal(load_tensors(path, "test")[0]["x"], torch.ones(2))
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_files_of_another_kind(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(
        FileNotFoundError, match="expected a population file, got .*, where there is none"
    ):
        load_tensors(path, "population")
    save_tensors(path, {"x": torch.zeros(1000)}, {"kind": "refinement"})
    with pytest.raises(ValueError, match="expected a population file, got refinement at"):
        load_tensors(path, "population")
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"not a safetensors file at all", b""):
        path.write_bytes(broken)
        with pytest.raises(
            ValueError, match="expected a refinement file, got something unreadable"
        ):
            load_tensors(path, "refinement")
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="got another safetensors file"):
        load_tensors(path, "refinement")
