"""What a learner does, in a real browser: opens a lesson in JupyterLab, runs all cells, and uses its widgets.

`make browser` runs it; a bare `pytest` leaves it out. Later lessons get their test here with the same fixtures:
`page = open_notebook("04_vae.ipynb")`, then `run_all(page)`.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
MINUTE = 60_000  # milliseconds, as playwright counts
pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

CHROMIUMS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
NO_CHROMIUM = (
    "The browser test needs Chromium: install it (Debian and Ubuntu: sudo apt install chromium) and try again."
)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
SETTINGS = {
    # every cell in the page at once, so that widgets can be found; no question about news
    "notebook-extension/tracker": {"windowingMode": "none", "autoStartDefaultKernel": True},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}

# The state of the open notebook, read from JupyterLab's model rather than from its page
STATE = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget;
    if (!panel?.content?.model || !panel.sessionContext?.isReady) return null;
    const cells = [...panel.content.model.cells].filter(c => c.type === "code");
    return {
        path: panel.context.path,
        kernel: panel.sessionContext.session?.kernel?.status,
        connection: panel.sessionContext.session?.kernel?.connectionStatus,
        unrun: cells.filter(c => c.sharedModel.getSource().trim() && c.executionCount === null).length,
        errors: cells.flatMap(c => c.outputs.toJSON().filter(o => o.output_type === "error").map(
            o => `${o.ename}: ${o.evalue} in the cell that begins ${c.sharedModel.getSource().slice(0, 60)}`)),
    };
}"""
RUN_ALL = """async () => {
    window.ranAll = false;
    await window.jupyterapp.commands.execute("notebook:clear-all-cell-outputs");
    window.jupyterapp.commands.execute("notebook:run-all-cells").finally(() => { window.ranAll = true; });
}"""
PIXELS = """async (img) => {
    const bytes = await (await fetch(img.src)).arrayBuffer();
    const hash = await crypto.subtle.digest("SHA-256", bytes);
    return [...new Uint8Array(hash)].map(b => b.toString(16).padStart(2, "0")).join("");
}"""


def wait_until(what: str, condition: Callable[[], Any], seconds: float) -> Any:
    """Poll until the condition is true; TimeoutError names what was waited for."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.2)
    raise TimeoutError(f"Waited {seconds:.0f} s in vain for {what}.")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's path. Without a browser the test is skipped; in CI, where one is installed, it fails."""
    found = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if found is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(NO_CHROMIUM)
    return found


@pytest.fixture(scope="session")
def lab(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab of its own on a copy of the notebooks: its address and its folder."""
    home = tmp_path_factory.mktemp("home")
    folder = tmp_path_factory.mktemp("lab") / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name, setting in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(setting))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    env |= {"HOME": str(home), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    env |= {"JUPYTER_CONFIG_DIR": str(home / "config"), "JUPYTER_DATA_DIR": str(home / "data")}
    env |= {"JUPYTER_RUNTIME_DIR": str(home / "runtime"), "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces")}
    env |= {"IPYTHONDIR": str(home / "ipython"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", f"--port={port}", "--ip=127.0.0.1", "--allow-root"]
    command += ["--ServerApp.port_retries=0", "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True"]
    address = f"http://127.0.0.1:{port}"
    with (home / "lab.log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)

    def answers() -> bool:
        if server.poll() is not None:
            raise RuntimeError("JupyterLab did not start:\n" + (home / "lab.log").read_text()[-2000:])
        try:
            return urllib.request.urlopen(f"{address}/api/status", timeout=5).status == 200
        except OSError:
            return False

    try:
        wait_until("JupyterLab to start", answers, 180)
        yield address, folder
    finally:
        server.terminate()  # JupyterLab ends its kernels
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@pytest.fixture
def page(chromium, tmp_path) -> Iterator[Any]:
    """A browser page. Its last screen is saved; a failing test's report tells where."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(MINUTE)
        yield page
        page.screenshot(path=tmp_path / "screen.png")
        print(f"The last screen is in {tmp_path / 'screen.png'}")
        browser.close()


@pytest.fixture
def open_notebook(page, lab) -> Callable[[str], Any]:
    """Open a notebook of the lab's folder by its file name; returns the page once its kernel is connected."""

    def opened(name: str) -> Any:
        page.goto(f"{lab[0]}/lab/workspaces/auto-{Path(name).stem}/tree/{name}?reset")

        def ready() -> bool:
            now = page.evaluate(STATE)
            return bool(now and now["path"] == name and now["connection"] == "connected" and now["kernel"] == "idle")

        wait_until(f"{name} and its kernel", ready, 180)
        return page

    return opened


def run_all(page: Any, seconds: float = 600) -> list[str]:
    """Run All, wait until every code cell has run, and return the errors that cells show."""
    page.evaluate(RUN_ALL)
    done = "() => window.ranAll"
    wait_until("Run All to end", lambda: page.evaluate(done) and page.evaluate(STATE)["kernel"] == "idle", seconds)
    state = page.evaluate(STATE)
    return state["errors"] + [f"{state['unrun']} code cells did not run"] * bool(state["unrun"])


def pixels(picture: Any) -> str:
    """A hash of what a picture in the page shows."""
    return picture.evaluate(PIXELS)


WIDGETS = """\
import ipywidgets as w
from PIL import Image
import io

def png(value):
    file = io.BytesIO()
    Image.new("RGB", (64, 64), (value % 256, 80, 80)).save(file, "PNG")
    return file.getvalue()

box, seed, button = w.Text("red"), w.IntSlider(0, 0, 100), w.Button(description="Draw")
picture = w.Image(value=png(0))
for widget, name in ((box, "prompt-box"), (seed, "seed-slider"), (button, "make-picture"), (picture, "picture")):
    widget.add_class(name)
button.on_click(lambda _: setattr(picture, "value", png(100 * len(box.value) + seed.value)))
display(w.VBox([box, seed, button, picture]))"""


def write_notebook(folder: Path, name: str, *sources: str) -> None:
    """A notebook without outputs, with these code cells."""
    from nbformat.v4 import new_code_cell, new_notebook, writes

    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}}
    nb = new_notebook(cells=[new_code_cell(source) for source in sources], metadata=kernel)
    (folder / name).write_text(writes(nb))


def use_the_widget(page: Any, prompt: str, seconds: float = 120) -> None:
    """Type a prompt, move the seed, press the button; wait until another picture is there."""
    picture = page.locator("img.picture, .picture img").first
    picture.scroll_into_view_if_needed()
    src, shown = picture.get_attribute("src"), pixels(picture)
    box = page.locator(".prompt-box input, .prompt-box textarea").first
    box.fill(prompt)
    box.press("Tab")
    page.locator(".seed-slider .noUi-handle").first.focus()
    page.keyboard.press("ArrowRight")
    button = page.locator("button.make-picture, .make-picture button")
    if button.count():
        button.first.click()
    wait_until(
        "the picture to change", lambda: picture.get_attribute("src") != src and pixels(picture) != shown, seconds
    )
    assert picture.evaluate("img => img.complete && img.naturalWidth") > 0


def test_the_helpers_see_errors_and_pictures(open_notebook, lab):
    write_notebook(lab[1], "bad.ipynb", "x = 1", "1 / 0", "x")
    errors = run_all(open_notebook("bad.ipynb"))
    assert errors == ["ZeroDivisionError: division by zero in the cell that begins 1 / 0", "1 code cells did not run"]
    write_notebook(lab[1], "good.ipynb", WIDGETS)
    page = open_notebook("good.ipynb")
    assert run_all(page) == []
    use_the_widget(page, "a longer prompt", 20)
    page.locator(".make-picture").evaluate("button => { button.className = 'gone'; }")
    with pytest.raises(TimeoutError, match="picture to change"):
        use_the_widget(page, "nobody listens", 2)


PAINTED = """\
import numpy as np
from ldm_lessons import widgets
from ldm_lessons.painter import Painter

labels = {"sky": (0, 0, 255), "grass": (0, 255, 0), "water": (0, 255, 255)}
painter = Painter(labels, np.zeros((32, 32)), offered=["grass", "water"])
make = lambda prompt, seed, on_step: np.array([labels[name] for name in labels], np.uint8)[painter.value]
widgets.PromptBox(make, "a", seed=0, steps=1, canvas=painter)"""
ASKED = """\
seen = painter.value
assert seen[28:].min() == seen[28:].max() == 1, seen
assert seen[8, 4:28].min() == seen[8, 4:28].max() == 2, seen
assert seen[16].max() == 0, seen"""


def test_what_the_mouse_paints_is_read_in_python_and_becomes_a_picture(open_notebook, lab):
    write_notebook(lab[1], "paint.ipynb", PAINTED)
    page = open_notebook("paint.ipynb")
    assert run_all(page) == []
    picture, canvas = page.locator("img.picture, .picture img").first, page.locator(".painter-canvas")
    before, box = pixels(picture), canvas.bounding_box()

    def cell(column: float, row: float) -> tuple[float, float]:
        return box["x"] + (column + 0.5) * box["width"] / 32, box["y"] + (row + 0.5) * box["height"] / 32

    def stroke(row: float, first: float, last: float) -> None:
        page.mouse.move(*cell(first, row))
        page.mouse.down()
        page.mouse.move(*cell(last, row), steps=3)
        page.mouse.up()

    stroke(24, 0, 31)  # a bank of grass, and what lies below it filled
    page.locator(".painter-fill").check()
    page.mouse.click(*cell(16, 30))
    page.locator(".painter-fill").uncheck()
    page.locator(".painter-label", has_text="water").click()
    stroke(8, 2, 29)
    wait_until("the painted picture", lambda: pixels(picture) != before, 20)
    stroke(16, 2, 29)
    page.locator(".painter-undo").click()
    page.wait_for_timeout(2000)  # longer than the canvas waits for the next stroke
    page.evaluate(
        "code => window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
        ".requestExecute({code: code}).done.then(reply => { window.answer = reply.content; })",
        ASKED,
    )
    answer = wait_until("the kernel's answer", lambda: page.evaluate("() => window.answer"), 20)
    assert answer["status"] == "ok", answer


def test_lesson_00_makes_another_picture(open_notebook):
    page = open_notebook("00_start_here.ipynb")
    errors = run_all(page)
    assert not errors, "\n".join(errors)
    use_the_widget(page, "a blue boat on a lake at night")
    assert page.evaluate(STATE)["errors"] == []


SLIDERS = {  # a notebook, and the other choice beside its picture's slider
    "01_noise_and_denoising": "cosine",
    "02_pixel_diffusion": "second",
    "03_the_price_of_pixels": "pixels",
    "04_vae": "pixels",
    "05_latent_diffusion": "decoded",
}


@pytest.mark.parametrize("name", SLIDERS)
def test_a_picture_follows_its_slider_and_its_choice(open_notebook, name):
    page = open_notebook(f"{name}.ipynb")
    errors = run_all(page)
    assert not errors, "\n".join(errors)
    picture = page.locator("img.picture, .picture img").first
    picture.scroll_into_view_if_needed()
    before = pixels(picture)
    page.locator(".picture-slider .noUi-handle").first.focus()
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    wait_until("the slider to change the picture", lambda: pixels(picture) != before, 60)
    moved = pixels(picture)
    page.locator(".widget-toggle-button", has_text=SLIDERS[name]).first.click()
    wait_until("the choice to change the picture", lambda: pixels(picture) != moved, 60)
    assert page.evaluate(STATE)["errors"] == []
