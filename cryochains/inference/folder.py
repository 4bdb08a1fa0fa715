"""The folder of a run: what the run is of, how far it is, and a log that a person reads.

    run.json             what was asked, of what, with which versions, by which process
    log.txt              one line a pass
    *.safetensors        what is known after the last pass, with checksums
    lock                 held by the process that works here

Of several processes the first one reads and writes.
"""

import json
import os
import platform
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from .._files import atomic_path, load_tensors, save_tensors
from .._processes import from_first, is_first, n_processes

_MANIFEST = "run.json"
_LOG = "log.txt"
_LOCK = "lock"
_STATE_SUFFIX = ".safetensors"


@dataclass(frozen=True, eq=False)
class RunFolder:
    """Where a run keeps what is known after each pass; made by `open_folder`.

    Attributes
    ----------
    path : Path
    kind : str
        Of its states, such as "refinement".
    states : str
        Regular expression of the names of its states.
    """

    path: Path
    kind: str
    states: str

    def has(self, name: str) -> bool:
        """Whether there is a state of that name."""
        return from_first(self._path_of(name).exists)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        """The state of that name; None where there is none.

        Raises
        ------
        ValueError
            For one that is damaged.
        """
        return from_first(lambda: self._load(name))

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict] | None:
        path = self._path_of(name)
        if not path.exists():
            return None
        try:
            return load_tensors(path, f"{self.kind} state")
        except ValueError as error:
            raise ValueError(
                f"expected the run in {self.path} as it was written, got a damaged part: "
                f"{str(error).partition('; try')[0]}; try removing that file, and its part of the "
                "run is done again"
            ) from error

    def save(self, name: str, tensors: dict[str, Tensor], meta: Mapping) -> None:
        """Write a state, whole or not at all.

        Warns
        -----
        UserWarning
            Where that is not possible, such as on a full disk: what was written before stays, and
            the run goes on.
        """
        if not is_first():
            return
        try:
            save_tensors(self._path_of(name), tensors, {**meta, "kind": f"{self.kind} state"})
        except ValueError as error:
            sentence = f"{error}; the run goes on, and is written after its next pass"
            self.log(sentence)
            warnings.warn(sentence, stacklevel=2)

    def log(self, text: str) -> None:
        """Add a line to the log."""
        if not is_first():
            return
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S}  {text}\n"
        try:
            with open(self.path / _LOG, "a", encoding="utf-8") as log:
                log.write(line)
        except OSError:
            # A state that cannot be written either says why.
            return

    def announce(self, text: str, shown: bool) -> None:
        """Add a line to the log, and show it where progress is `shown`."""
        self.log(text)
        if shown and is_first():
            tqdm.write(f"{self.path}: {text}")

    def remove_states(self) -> None:
        """Remove what is known after each pass; what was asked, and the log, stay."""
        if not is_first():
            return
        for path in self.path.glob(f"*{_STATE_SUFFIX}"):
            if re.fullmatch(self.states, path.stem):
                path.unlink(missing_ok=True)

    def _path_of(self, name: str) -> Path:
        return self.path / f"{name}{_STATE_SUFFIX}"


@contextmanager
def open_folder(
    path: str | os.PathLike | None, kind: str, states: str, asked: Mapping
) -> Iterator[RunFolder | None]:
    """The folder of a run, which no other run may use meanwhile; None for no path.

    Parameters
    ----------
    path : path, optional
        Made where there is none.
    kind : str
        Of the run, such as "refinement".
    states : str
        Regular expression of the names of its states.
    asked : dict
        JSON-able, for people: what the run is of.

    Raises
    ------
    ValueError
        When the folder cannot be made or written, or another run uses it.
    """
    if path is None:
        yield None
        return
    folder = RunFolder(Path(path), kind, states)
    with ExitStack() as stack:

        def begin() -> None:
            stack.enter_context(_locked(folder.path))
            _remove_parts(folder.path)
            _describe(folder, asked)

        from_first(begin)
        yield folder


def _locked(path: Path) -> AbstractContextManager:
    """A lock on a folder, until it is left or the process ends."""
    if path.exists() and not path.is_dir():
        raise ValueError(
            f"expected a folder for the run, got a file at {path}; try another path, or move it"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        return FileLock(path / _LOCK, thread_local=False).acquire(timeout=0)
    except Timeout as error:
        raise ValueError(
            f"expected a folder that no other run uses, got {path}, in which {_user_of(path)} "
            "works; try another folder, or wait for it to end"
        ) from error
    except OSError as error:
        raise ValueError(
            f"expected a folder that can be written, got {path} ({error.strerror}); "
            "try another folder or disk"
        ) from error


def _remove_parts(path: Path) -> None:
    """Remove what a process left that was killed while it wrote."""
    for part in path.glob(".part-*"):
        part.unlink(missing_ok=True)


def _describe(folder: RunFolder, asked: Mapping) -> None:
    """Write what the run is of, and who does it."""
    about = {
        "kind": folder.kind,
        **asked,
        "versions": {name: version(name) for name in ("cryochains", "torch", "numpy")},
        "python": platform.python_version(),
        "processes": n_processes(),
        "threads": torch.get_num_threads(),
        "by": {
            "host": socket.gethostname(),
            "process": os.getpid(),
            "since": f"{datetime.now():%Y-%m-%d %H:%M:%S}",
        },
    }
    with atomic_path(folder.path / _MANIFEST) as part:
        part.write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _user_of(path: Path) -> str:
    """Who works in a folder, as far as it is known."""
    try:
        by = json.loads((path / _MANIFEST).read_text("utf-8"))["by"]
        return f"process {by['process']} on {by['host']} (since {by['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
