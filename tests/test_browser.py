"""The quickstart in a real JupyterLab and a real browser: it runs, the molecule is drawn, and the slider moves it.

Screenshots are left in results/browser. Needs Chromium; runs on a copy of the notebook with fewer particles.
"""

import importlib.util
import io
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "results" / "browser"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name in ("playwright", "jupyterlab", "nglview") if importlib.util.find_spec(name) is None]
# WebGL on the CPU; and a browser that talks to nobody else.
FLAGS = (
    "--use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist --no-sandbox --disable-dev-shm-usage "
    "--disable-background-networking --disable-component-update --disable-sync --no-first-run"
).split()
SECONDS = 240  # for all cells together, on a machine that does other things too

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed; try apt-get install chromium"),
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; try pip install -e '.[lab,test]'"),
]


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Path:
    """A copy of the quickstart whose 800 particles are 120: the full one is run by nbval."""
    text = (ROOT / "notebooks" / "01_quickstart.ipynb").read_text()
    assert text.count("closed, 800, ") == 1
    path = tmp_path_factory.mktemp("lab") / "01_quickstart.ipynb"
    path.write_text(text.replace("closed, 800, ", "closed, 120, "))
    return path


@pytest.fixture(scope="module")
def address(notebook) -> str:
    """URL of the notebook in a JupyterLab of our own, with default settings and none of the user's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, token = notebook.parent / "home", secrets.token_hex(16)
    (home / "labconfig").mkdir(parents=True)
    # It asks whether to fetch news, over the page.
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(no_news))
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")
    environment = os.environ | {name: str(home) for name in (*folders, "IPYTHONDIR")} | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={notebook.parent}"]
    log = home / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=environment, cwd=notebook.parent, stdout=out, stderr=subprocess.STDOUT)
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=5)
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.25)
        else:
            pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")
        yield f"http://127.0.0.1:{port}/lab/tree/{notebook.name}?token={token}"
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture(scope="module")
def page(address):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.complaints = []
        page.on("pageerror", lambda error: page.complaints.append(f"uncaught: {error}"))
        page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
        page.set_default_timeout(60_000)
        page.goto(address)
        yield page
        PICTURES.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=PICTURES / "4-end-page.png")  # what it looked like where a test failed
        browser.close()


def wait_for_kernel(page) -> None:
    """Until the page has its kernel: whoever runs cells before is asked to choose one."""
    address = page.url.partition("/lab")[0] + "/api/sessions"
    for _ in range(240):
        kernels = [session["kernel"] for session in page.request.get(address).json()]
        if any(kernel["connections"] and kernel["execution_state"] == "idle" for kernel in kernels):
            break
        time.sleep(0.25)
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()


def picture(page, name: str) -> np.ndarray:
    """(y, x, 3) colours of the molecule's canvas once it has come to rest; kept as a file."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    last = None
    for _ in range(30):
        png = page.locator(".jp-OutputArea canvas").last.screenshot(path=PICTURES / f"{name}.png")
        pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)
        if last is not None and drawn(pixels) > 0.05 and np.array_equal(pixels, last):
            break
        last = pixels
        time.sleep(0.7)
    page.screenshot(path=PICTURES / f"{name}-page.png")
    return pixels


def drawn(pixels: np.ndarray) -> float:
    """Share of the canvas that is not white."""
    return float((pixels.min(-1) < 230).mean())


def changed(pixels: np.ndarray, before: np.ndarray) -> float:
    """Share of the canvas that looks different, in squares of 4 px: edges are smoothed anew at each drawing."""
    now, then = (np.asarray(Image.fromarray(p.astype(np.uint8)).reduce(4)).astype(int) for p in (pixels, before))
    return float((np.abs(now - then).max(-1) > 40).mean())


def test_quickstart_in_jupyterlab(page, notebook):
    wait_for_kernel(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    status = page.locator(".jp-OutputArea .widget-label", has_text="RMSD to glua3-closed")
    status.wait_for(timeout=1000 * SECONDS)
    status.scroll_into_view_if_needed()
    before = picture(page, "1-start")
    assert drawn(before) > 0.05, "the canvas is blank"
    for color in ("#0072B2", "#D55E00"):
        # Shading changes brightness, not the order of the channels.
        order = np.argsort([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        strong = before[before.max(-1) - before.min(-1) > 60]
        assert (np.argsort(strong, axis=-1) == order).all(-1).mean() > 0.1, f"no chain is {color}"

    said = status.inner_text()
    handle = page.locator(".jp-OutputArea .noUi-handle").last
    handle.focus()
    for _ in range(8):
        handle.press("ArrowRight")
    page.wait_for_function("said => !document.body.innerText.includes(said)", arg=said)
    assert changed(picture(page, "2-slid"), before) > 0.02, "the slider moved and the molecule did not"
    # Back again: only coordinates were sent, so the picture is the same.
    for _ in range(8):
        handle.press("ArrowLeft")
    page.wait_for_function("said => document.body.innerText.includes(said)", arg=said)
    assert changed(picture(page, "3-back"), before) < 0.002

    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").first.wait_for(state="detached")
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    errors = [output["evalue"] for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert not errors
    pictures = sum("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    assert pictures == 3, "a figure was not shown"
    assert (notebook.parent / "results" / "quickstart" / "pc1.pdb").stat().st_size > 1e6


def test_no_javascript_errors(page):
    assert not page.complaints
