"""The quickstart in a real JupyterLab and a real browser.

It runs, the explorer is drawn, and answers the mouse. Screenshots are left in results/browser.
Needs Chromium; runs on a copy of the notebook with fewer particles.
"""

import importlib.util
import io
import json
import os
import re
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

ROOT = Path(__file__).resolve().parents[2]
PICTURES = ROOT / "results" / "browser"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
NEEDED = ("playwright", "jupyterlab", "nglview", "jscatter")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
# WebGL on the CPU; and a browser that talks to nobody else.
FLAGS = (
    "--use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist --no-sandbox "
    "--disable-dev-shm-usage --disable-background-networking --disable-component-update "
    "--disable-sync --no-first-run"
).split()
SECONDS = 240  # for all cells together, on a machine that does other things too

pytestmark = [
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium is installed; try apt-get install chromium"
    ),
    pytest.mark.skipif(
        bool(MISSING),
        reason=f"not installed: {', '.join(MISSING)}; try pip install -e '.[lab,test]'",
    ),
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
    """URL of the notebook in a JupyterLab of our own, with none of the user's settings."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home, token = notebook.parent / "home", secrets.token_hex(16)
    (home / "labconfig").mkdir(parents=True)
    # It asks whether to fetch news, over the page.
    no_news = {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}
    (home / "labconfig" / "page_config.json").write_text(json.dumps(no_news))
    folders = (
        "JUPYTER_CONFIG_DIR",
        "JUPYTER_RUNTIME_DIR",
        "JUPYTERLAB_SETTINGS_DIR",
        "JUPYTERLAB_WORKSPACES_DIR",
    )
    environment = (
        os.environ
        | {name: str(home) for name in (*folders, "IPYTHONDIR")}
        | {"OMP_NUM_THREADS": "1"}
    )
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--ServerApp.port={port}",
    ]
    command += ["--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={notebook.parent}"]
    log = home / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env=environment, cwd=notebook.parent, stdout=out, stderr=subprocess.STDOUT
        )
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
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, address):
    """A page whose ``complaints`` are the errors of its JavaScript."""
    page = browser.new_page(viewport={"width": 1400, "height": 1250})
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(f"uncaught: {error}"))
    page.on("console", lambda m: page.complaints.append(m.text) if m.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(address)
    return page


@pytest.fixture(scope="module")
def page(browser, address):
    page = open_page(browser, address)
    yield page
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / "7-end-page.png")  # what it looked like where a test failed


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
    """Share of the canvas that looks different, in squares of 4 px.

    Edges are smoothed anew at each drawing.
    """
    now, then = (
        np.asarray(Image.fromarray(p.astype(np.uint8)).reduce(4)).astype(int)
        for p in (pixels, before)
    )
    return float((np.abs(now - then).max(-1) > 40).mean())


def share_of(pixels: np.ndarray, color: str) -> float:
    """Share of the strongly coloured pixels whose channels are in the order of `color`.

    Shading keeps the order.
    """
    strong = pixels[pixels.max(-1) - pixels.min(-1) > 60]
    order = np.argsort([int(color[i : i + 2], 16) for i in (1, 3, 5)])
    return float((np.argsort(strong, axis=-1) == order).all(-1).mean())


def wait_for_text(page, text: str) -> None:
    page.wait_for_function("text => document.body.innerText.includes(text)", arg=text)


def run_all_cells(page) -> None:
    wait_for_kernel(page)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


@pytest.fixture(scope="module")
def explorer(page):
    """The page once the notebook has run; the output of the explorer's cell."""
    run_all_cells(page)
    output = page.locator(".jp-OutputArea", has=page.locator(".widget-tab")).last
    output.get_by_text("RMSD to glua3-closed").wait_for(timeout=1000 * SECONDS)
    output.locator("canvas").last.scroll_into_view_if_needed()
    return output


def test_molecule_is_drawn_in_the_chains_colours(page, explorer):
    before = picture(page, "1-start")
    assert drawn(before) > 0.05, "the canvas is blank"
    for color in ("#0072B2", "#D55E00"):
        assert share_of(before, color) > 0.1, f"no chain is {color}"


def test_slider_moves_the_molecule_and_back(page, explorer):
    before = picture(page, "1-start")
    handle = explorer.locator(".noUi-handle:visible").first
    handle.focus()
    # The mean is on no step of the slider: a step there and back is where the walk starts.
    handle.press("ArrowRight")
    handle.press("ArrowLeft")
    wait_for_text(page, "+0.00")
    start = picture(page, "2-first-step")
    assert changed(start, before) < 0.01
    for _ in range(20):
        handle.press("ArrowRight")
    wait_for_text(page, "+1.00")
    assert changed(picture(page, "2-slid"), start) > 0.02, (
        "the slider moved and the molecule did not"
    )
    # Back again: only coordinates were sent, so the picture is the same.
    for _ in range(20):
        handle.press("ArrowLeft")
    wait_for_text(page, "+0.00")
    assert changed(picture(page, "3-back"), start) < 0.002


def on_points(explorer):
    """A function from shares of the scatter's width and height to places on the page."""
    box = explorer.locator("canvas").first.bounding_box()
    return lambda x, y: (box["x"] + x * box["width"], box["y"] + y * box["height"])


def test_click_shows_a_particle(page, explorer):
    explorer.get_by_role("tab", name="Selection").click()
    at = on_points(explorer)
    # Somewhere in the middle there is a particle.
    for x, y in np.stack(
        np.meshgrid(np.linspace(0.25, 0.75, 11), np.linspace(0.3, 0.7, 9)), -1
    ).reshape(-1, 2):
        page.mouse.click(*at(x, y))
        page.wait_for_timeout(300)
        if explorer.get_by_text("Particle 0").count():
            break
    explorer.get_by_text("Particle 0").wait_for()
    assert "error bar" in explorer.inner_text() and "uncertainty (Å)" in explorer.inner_text()
    image = explorer.locator("img.widget-image")
    assert image.evaluate("image => image.naturalWidth") > 300, "no image of the particle"
    picture(page, "4-particle")


def test_lasso_shows_the_mean_of_those_inside(page, explorer):
    """Those on the right have a mean on the right, as the slider of PC1 says; at the top, alike."""

    def group_size() -> int:
        """Particles in the group on screen, 0 where there is none."""
        groups = explorer.get_by_text(re.compile(r"^Mean of [\d,]+ particles"))
        if not groups.count():
            return 0
        return int(groups.first.text_content().split()[2].replace(",", ""))

    def draw(left: float, top: float, right: float, bottom: float) -> None:
        explorer.get_by_role("tab", name="Selection").click()
        page.wait_for_timeout(500)
        at = on_points(explorer)
        page.mouse.move(*at(left, top))
        page.mouse.down()
        for corner in ((right, top), (right, bottom), (left, bottom), (left, top + 0.02)):
            page.mouse.move(*at(*corner), steps=20)
            # A busy browser thins the path of the mouse out: at rest, the corner is noticed.
            x, y = at(*corner)
            for step in (3, 0):
                page.wait_for_timeout(150)
                page.mouse.move(x + step, y + step)
            page.wait_for_timeout(150)
        page.mouse.up()
        explorer.get_by_role("tab", name="Principal motions").click()

    def surround(left: float, top: float, right: float, bottom: float, answered) -> None:
        # Whoever misses on a machine that is busy draws again.
        for _ in range(4):
            draw(left, top, right, bottom)
            # The kernel answers in several messages: sliders, status, and the group's words.
            for _ in range(80):
                readouts = explorer.locator(".widget-readout:visible").all_inner_texts()
                scores = [float(text.replace("−", "-")) for text in readouts[:2]]
                if group_size() > 5 and answered(scores):
                    return
                page.wait_for_timeout(100)
        pytest.fail(f"{group_size()} particles around {left}, {top} have scores {scores}")

    explorer.locator("button[title*=asso]").first.click()
    surround(0.55, 0.02, 0.95, 0.98, lambda scores: scores[0] > 0.3)
    surround(0.05, 0.02, 0.45, 0.98, lambda scores: scores[0] < -0.3)
    surround(0.05, 0.02, 0.95, 0.48, lambda scores: scores[1] > 0.2)
    picture(page, "5-group")


def test_atoms_are_coloured_by_displacement_beside_the_reference(page, explorer):
    before = picture(page, "5-group")
    explorer.get_by_label("reference").check()
    color_by = explorer.locator("select", has=page.locator("option", has_text="displacement"))
    color_by.select_option(label="displacement from the reference (Å)")
    explorer.get_by_text("displacement from the reference (Å)").last.wait_for()
    after = picture(page, "6-displacement")
    assert changed(after, before) > 0.02 and share_of(after, "#D55E00") < 0.5 * share_of(
        before, "#D55E00"
    )


def test_picture_of_the_view_arrives_in_python(page, explorer, notebook):
    explorer.get_by_role("tab", name="Save").click()
    explorer.get_by_role("button", name="picture").click()
    wait_for_text(page, "Wrote results/explorer/pc1")
    (path,) = (notebook.parent / "results" / "explorer").glob("*.png")
    assert drawn(np.asarray(Image.open(path).convert("RGB")).astype(int)) > 0.05


def test_notebook_ran_whole(page, explorer, notebook):
    page.keyboard.press("Control+s")
    page.locator(".jp-mod-dirty").first.wait_for(state="detached")
    cells = [
        cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    ]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    errors = [
        output["evalue"]
        for cell in cells
        for output in cell["outputs"]
        if output["output_type"] == "error"
    ]
    assert not errors
    # Three figures, and the one of the explorer for pages that show no widgets.
    pictures = sum(
        "image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"]
    )
    assert pictures == 4, "a figure was not shown"


def test_no_javascript_errors(page, explorer):
    assert not page.complaints


MANY_BODIES = """
import numpy as np
import cryochains as cc

atoms = cc.load_structure("glua3-closed").atoms
resnums = np.unique(atoms.select("chain A").getResnums())
bodies = {f"residue {n}": f"chain A and resnum {n}" for n in resnums[:72]}
bodies["rest of A"] = f"chain A and resnum {resnums[72]} to {resnums[-1]}"
bodies["B"] = "chain B"
cc.view_structure(cc.load_structure(atoms, bodies=bodies))
"""


def test_more_bodies_than_pdb_text_has_letters_for(browser, address, notebook):
    """The last two of 74 bodies are most of the molecule, and have the first two colours."""
    cell = {"cell_type": "code", "id": "many", "metadata": {}, "outputs": []}
    cell |= {"execution_count": None, "source": MANY_BODIES}
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    content = {"cells": [cell], "metadata": {"kernelspec": kernel}}
    content |= {"nbformat": 4, "nbformat_minor": 5}
    (notebook.parent / "many.ipynb").write_text(json.dumps(content))
    # Another workspace: the first page has the default one.
    other = address.replace(f"/lab/tree/{notebook.name}", "/lab/workspaces/many/tree/many.ipynb")
    page = open_page(browser, other)
    run_all_cells(page)
    page.locator(".jp-OutputArea canvas").last.wait_for()
    pixels = picture(page, "8-many-bodies")
    assert drawn(pixels) > 0.05, "the canvas is blank"
    for color in ("#0072B2", "#D55E00"):
        assert share_of(pixels, color) > 0.1, f"no body is {color}"
    assert not page.complaints
