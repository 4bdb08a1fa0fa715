"""Fetching an entry, from a server on this machine: no test needs a network."""

import gzip
import io
import ssl
import stat
import threading
from contextlib import contextmanager
from http.client import HTTPMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from urllib.error import URLError
from urllib.request import BaseHandler, HTTPHandler, HTTPSHandler
from urllib.response import addinfourl

import pytest

from cryochains.molecule import fetching, load_structure
from cryochains.molecule.fetching import fetch_entry
from cryochains.molecule.sources import cache_folder

secure_opener = fetching._secure_opener


def opener_of_this_machine(handler=HTTPHandler):
    """As the library's, which also opens what a server without a certificate has."""
    opener = secure_opener()
    opener.add_handler(handler())
    return opener


@contextmanager
def served(monkeypatch, answer):
    """A server that gives each request to `answer(handler)`; yields the paths that were asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            answer(self)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    monkeypatch.setattr(
        fetching, "ADDRESS", f"http://127.0.0.1:{server.server_port}/download/{{}}.cif.gz"
    )
    monkeypatch.setattr(fetching, "_secure_opener", opener_of_this_machine)
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()


def send(handler, data, length=None):
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(data) if length is None else length))
    handler.end_headers()
    handler.wfile.write(data)


@pytest.fixture
def entry(tmp_path):
    """A whole mmCIF file, compressed."""
    load_structure("glua3-closed").save(tmp_path / "a.cif")
    return gzip.compress((tmp_path / "a.cif").read_bytes())


def test_the_address_is_https():
    assert fetching.ADDRESS.startswith("https://")


def test_certificates_are_checked():
    (handler,) = [one for one in secure_opener().handlers if isinstance(one, HTTPSHandler)]
    context = handler._context or ssl.create_default_context()
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("pdb_id", "asked"), [("6uo8", "6uo8"), ("pdb_00006uo8", "6uo8"), ("pdb_10006uo8",) * 2]
)
def test_an_entry_is_fetched(monkeypatch, tmp_path, entry, pdb_id, asked):
    with served(monkeypatch, lambda handler: send(handler, entry)) as paths:
        path, reason = fetch_entry(pdb_id, tmp_path)
    assert path.read_bytes() == entry and reason == ""
    assert paths == [f"/download/{asked}.cif.gz"]


def test_an_id_is_fetched_once_and_kept_with_the_usual_permissions(monkeypatch, tmp_path, entry):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CRYOCHAINS_STRUCTURES", raising=False)
    with served(monkeypatch, lambda handler: send(handler, entry)) as paths:
        for _ in range(2):
            assert load_structure("6uo8").n_nodes == 739
    assert len(paths) == 1
    (kept,) = (cache_folder() / "structures").iterdir()
    (tmp_path / "usual").touch()
    assert stat.S_IMODE(kept.stat().st_mode) == stat.S_IMODE((tmp_path / "usual").stat().st_mode)


def refused(monkeypatch, tmp_path, answer):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CRYOCHAINS_STRUCTURES", raising=False)
    with (
        served(monkeypatch, answer),
        pytest.raises((FileNotFoundError, ValueError)) as caught,
    ):
        load_structure("6uo8")
    assert not list(cache_folder().rglob("*.gz"))
    sentence = str(caught.value)
    assert sentence.startswith("expected ") and "try" in sentence and "\n" not in sentence
    return sentence


def test_an_entry_that_does_not_exist(monkeypatch, tmp_path):
    sentence = refused(monkeypatch, tmp_path, lambda handler: handler.send_error(404))
    assert "6uo8.cif.gz does not exist" in sentence


def test_a_server_with_an_error(monkeypatch, tmp_path):
    assert "answers 503" in refused(monkeypatch, tmp_path, lambda handler: handler.send_error(503))


def test_a_server_that_says_nothing(monkeypatch, tmp_path):
    released = threading.Event()
    monkeypatch.setattr(fetching, "SILENCE", 0.2)
    try:
        sentence = refused(monkeypatch, tmp_path, lambda handler: released.wait(2))
    finally:
        released.set()
    assert "timed out" in sentence


def test_an_entry_that_breaks_off(monkeypatch, tmp_path, entry):
    def answer(handler):
        send(handler, entry[:1000], len(entry))

    assert "broke off" in refused(monkeypatch, tmp_path, answer)


def test_an_entry_without_end(monkeypatch, tmp_path, entry):
    monkeypatch.setattr(fetching, "MOST_BYTES", 1000)
    assert "more than 1,000 bytes" in refused(monkeypatch, tmp_path, lambda h: send(h, entry))


def test_what_is_no_entry(monkeypatch, tmp_path):
    refused(monkeypatch, tmp_path, lambda handler: send(handler, b"<html>log in here</html>"))


@pytest.mark.parametrize("to", ["http://127.0.0.1/x.cif.gz", "ftp://127.0.0.1/x", "file:///x"])
def test_no_redirection_leaves_https(monkeypatch, tmp_path, to):
    class Redirecting(BaseHandler):
        handler_order = 1

        def https_open(self, request):
            headers = HTTPMessage()
            headers["Location"] = to
            answer = addinfourl(io.BytesIO(), headers, request.full_url, 302)
            answer.msg = "elsewhere"
            return answer

    monkeypatch.setattr(fetching, "_secure_opener", lambda: opener_of_this_machine(Redirecting))
    path, reason = fetch_entry("6uo8", tmp_path)
    assert path is None
    assert "unknown url type" in reason or "302" in reason


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(fetching, "ADDRESS", "https://127.0.0.1:9/{}")
    path, reason = fetch_entry("6uo8", tmp_path)
    assert path is None and "refused" in reason


def test_a_name_that_no_server_has(monkeypatch, tmp_path):
    def unknown(*_, **__):
        raise URLError(OSError("Name or service not known"))

    monkeypatch.setattr(fetching, "_secure_opener", lambda: type("", (), {"open": unknown})())
    assert fetch_entry("6uo8", tmp_path)[1].endswith("Name or service not known")
