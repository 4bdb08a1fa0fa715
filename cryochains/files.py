"""Files that are written whole or not at all."""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` on success and vanishes on any error.

    Raises
    ------
    ValueError
        When the folder of `path` does not exist and cannot be made, or cannot be written.

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
        if path.is_dir():
            raise IsADirectoryError("a folder has that name")
        part.touch(exist_ok=False)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"expected a place that can be written, got {path} ({reason}); try another folder") from error
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def fingerprint(*parts) -> str:
    """Short hash of tensors, arrays and plain values: what a checkpoint must have in common with the run it resumes."""
    digest = hashlib.sha256()
    for part in parts:
        array = isinstance(part, (torch.Tensor, np.ndarray)) and np.asarray(torch.as_tensor(part).cpu())
        digest.update(repr(part).encode() if array is False else f"{array.shape}{array.dtype}".encode())
        digest.update(b"" if array is False else np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


def save_tensors(path: str | os.PathLike, tensors: dict[str, torch.Tensor], meta: dict) -> None:
    """Write tensors and a JSON-able `meta` as one safetensors file, whole or not at all."""
    # safetensors' metadata maps strings to strings: one JSON text holds the rest.
    with atomic_path(path) as part:
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
        save_file(copies, part, metadata={"cryochains": json.dumps(meta)})


def load_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Read what `save_tensors` wrote with ``meta["kind"] == kind``.

    Raises
    ------
    FileNotFoundError, ValueError
        When there is no such file, or it holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"expected a {kind} file, found nothing at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("cryochains", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"expected a {kind} file, got something unreadable at {path} ({error})") from error
    if meta.get("kind") != kind:
        raise ValueError(f"expected a {kind} file, got {meta.get('kind') or 'another safetensors file'} at {path}")
    return tensors, meta
