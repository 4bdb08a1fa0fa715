"""Entries of the PDB over HTTPS: with a time-out, a limit of size, and the certificate checked."""

import time
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.error import HTTPError, URLError
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

ADDRESS = "https://files.rcsb.org/download/{}.cif.gz"
# Seconds without a byte, and for a whole entry.
SILENCE = 30.0
_LONGEST_FETCH = 600.0
# The largest entries have about 10⁸.
MOST_BYTES = 1 << 29
_CHUNK_BYTES = 1 << 20
# An id of twelve characters that continues one of four.
_SHORT_ID_PREFIX = "pdb_0000"


def _secure_opener() -> OpenerDirector:
    """Opens HTTPS and what it redirects to, and follows nothing out of HTTPS."""
    opener = OpenerDirector()
    for handler in (
        ProxyHandler,
        HTTPSHandler,
        HTTPErrorProcessor,
        HTTPDefaultErrorHandler,
        HTTPRedirectHandler,
        UnknownHandler,
    ):
        opener.add_handler(handler())
    return opener


def fetch_entry(pdb_id: str, folder: Path) -> tuple[Path | None, str]:
    """Path of the entry's mmCIF file, fetched into `folder`; or None, and why not."""
    name = pdb_id.removeprefix(_SHORT_ID_PREFIX)
    path = folder / f"{pdb_id}.cif.gz"
    address = ADDRESS.format(name)
    try:
        with _secure_opener().open(address, timeout=SILENCE) as answer:
            announced = answer.headers.get("Content-Length")
            with path.open("wb") as file:
                _copy(answer, file)
    except HTTPError as error:
        if error.code == 404:
            return None, f"{address} does not exist"
        return None, f"{address} answers {error.code}: {error.reason}"
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        return None, f"{address}: {' '.join(str(reason).split()) or type(error).__name__}"
    if announced is not None and announced != str(path.stat().st_size):
        return None, f"{address} broke off"
    return path, ""


def _copy(answer: IO[bytes], file: IO[bytes]) -> None:
    end = time.monotonic() + _LONGEST_FETCH
    n_bytes = 0
    while chunk := answer.read(_CHUNK_BYTES):
        n_bytes += len(chunk)
        if n_bytes > MOST_BYTES:
            raise URLError(f"more than {MOST_BYTES:,} bytes")
        if time.monotonic() > end:
            raise URLError(f"more than {_LONGEST_FETCH:.0f} s")
        file.write(chunk)
