"""Files that are written whole or not at all, and tensors with their description in one file."""

import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# Name in a file's header of the description of all its tensors, after a checksum of both.
_META = "cryochains"


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and vanishes on any error.

    Raises
    ------
    ValueError
        When the folder of `path` cannot be made or written, or the disk is full.

    Examples
    --------
    >>> with atomic_path("results/doc/note.txt") as part:
    ...     _ = part.write_text("whole")
    """
    path = Path(path)
    # The suffix is kept: writers such as ProDy choose the format by it.
    part = path.parent / f".part-{secrets.token_hex(8)}{''.join(path.suffixes)}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise IsADirectoryError("a folder or device has that name")
        part.touch(exist_ok=False)
        usual_mode = part.stat().st_mode
    except OSError as error:
        raise ValueError(_cannot_write(path, error)) from error
    try:
        yield part
        # Some writers make a file of their own that only its owner may read.
        part.chmod(usual_mode)
        # On the disk before it takes the old one's place, should the power fail.
        _flush_to_disk(part)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        # Errors of reading have a sentence of their own; here the disk or the folder is at fault.
        if isinstance(error, OSError) and not _is_of_disk(error):
            raise
        raise ValueError(_cannot_write(path, error)) from error
    finally:
        part.unlink(missing_ok=True)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_of_disk(error: OSError) -> bool:
    """Whether the disk or its folder is at fault, and not a file that was to be read."""
    # Writers in C say only that they could not go on.
    return error.errno in (None, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def _cannot_write(path: Path, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return (
        f"expected a folder that can be written, got {path.parent} ({reason}) for {path.name}; "
        "try another folder or disk"
    )


def content_digest(*parts: object) -> str:
    """16 hex digits of the content of tensors, arrays and plain values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, (torch.Tensor, np.ndarray)):
            array = np.ascontiguousarray(torch.as_tensor(part).cpu())
            digest.update(f"{array.shape}{array.dtype}".encode())
            digest.update(array.tobytes())
        else:
            digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def save_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, whole or not at all.

    With a checksum of all of it.
    """
    # safetensors' metadata maps strings to strings: one JSON text holds the rest.
    text = json.dumps(meta)
    with atomic_path(path) as part:
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
        # One entry: several would stand in another order each time.
        save_file(copies, part, metadata={_META: _checksum(copies, text) + text})


def _checksum(tensors: dict[str, torch.Tensor], text: str) -> str:
    parts = (part for name in sorted(tensors) for part in (name, tensors[name]))
    return content_digest(text, *parts)


def load_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote with ``meta["kind"] == kind``.

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no such file, or it holds something else.
    """
    wanted = f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} file"
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"expected {wanted}, got {path}, where there is none; try a full path"
        )
    try:
        with safe_open(path, framework="pt") as file:
            checksum, brace, text = (file.metadata() or {}).get(_META, "{}").partition("{")
            text = brace + text
            meta = json.loads(text)
            names = list(file.keys())
            tensors = {name: file.get_tensor(name) for name in names}
            # Other programs, and older versions, write none.
            is_whole = not checksum or checksum == _checksum(tensors, text)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"expected {wanted}, got something unreadable at {path} ({error}); "
            "try another copy of it"
        ) from error
    if not is_whole:
        raise ValueError(
            f"expected {wanted}, got one at {path} whose content is not what was written: its "
            "checksum differs; try another copy of it"
        )
    if meta.get("kind") != kind:
        other = meta.get("kind") or "another safetensors file"
        raise ValueError(f"expected {wanted}, got {other} at {path}; try another file")
    return tensors, meta


def pack_text(values: Iterable[str | int]) -> torch.Tensor:
    """(n,) uint8 tensor of strings or integers, as JSON: a million would not fit into a header.

    Examples
    --------
    >>> unpack_text(pack_text(["1@a.mrcs", 7]))
    ['1@a.mrcs', 7]
    """
    return torch.frombuffer(bytearray(json.dumps(list(values)).encode()), dtype=torch.uint8)


def unpack_text(packed: torch.Tensor) -> list:
    """The strings or integers of `pack_text`."""
    return json.loads(bytes(packed.numpy()).decode())
