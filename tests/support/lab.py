"""JupyterLab on copies of the notebooks, driven in Chromium."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Generator
from pathlib import Path
from typing import Any

from playwright.sync_api import expect
from ports import free_port

from telco_nb.study.params import NOTEBOOKS_DIR

TOKEN = "only-for-this-test"
START_SECONDS = 120
RUN_MS = 300_000  # until a notebook has finished
ERROR = "[data-mime-type='application/vnd.jupyter.error']"
TRACKER = "@jupyterlab/notebook-extension/tracker.jupyterlab-settings"


@contextlib.contextmanager
def jupyter_lab(folder: Path, outputs: Path) -> Generator[str]:
    """Starts JupyterLab on copies of the notebooks in `folder`; yields its address. Lab saves what it runs."""
    shutil.copytree(NOTEBOOKS_DIR, folder / "notebooks")
    settings = folder / "settings" / TRACKER
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"windowingMode": "none"}))  # every cell is in the page, seen or not
    port = free_port()
    words = {"ServerApp.ip": "127.0.0.1", "ServerApp.port": port, "IdentityProvider.token": TOKEN}
    words |= {"ServerApp.root_dir": folder / "notebooks", "LabApp.news_url": "None"}
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root"]
    environment = os.environ | {
        "TELCO_NB_OUTPUTS": str(outputs),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "HF_HUB_OFFLINE": "1",
    }
    with (folder / "lab.log").open("w") as log:
        server = subprocess.Popen(
            [*command, *(f"--{name}={value}" for name, value in words.items())], env=environment, stdout=log, stderr=log
        )
        try:
            _wait(f"http://127.0.0.1:{port}/api", server, folder / "lab.log")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def _wait(url: str, server: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def run_all(page: Any, address: str, notebook: str) -> Any:
    """Opens a notebook, chooses Run All Cells, waits for its last box and finds no error; returns the notebook."""
    page.goto(f"{address}/lab/tree/{notebook}.ipynb?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=RUN_MS)
    # What is run before the kernel has answered is lost without a word.
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for(timeout=RUN_MS)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.locator(".jp-Notebook").locator(f".headline, {ERROR}").first.wait_for(timeout=RUN_MS)
    assert page.locator(ERROR).all_inner_texts() == []
    return page.locator(".jp-Notebook")


def choose_another(notebook: Any) -> None:
    """Takes the second option of the first menu of a notebook, and waits until the panel says something else."""
    cell = notebook.locator(".jp-Cell:has(select)").first
    shown = cell.locator(".jp-OutputArea .jp-OutputArea").first  # that of the widget, inside that of the cell
    shown.locator(".jp-OutputArea-output").first.wait_for(timeout=RUN_MS)
    before = shown.inner_text()
    cell.locator("select").first.select_option(index=1)
    expect(shown).not_to_have_text(before, use_inner_text=True, timeout=RUN_MS)


def vote_in_the_panel(page: Any, notebook: Any, folder: Path) -> Path:
    """Opens the blind panel of 05, votes on every pair by keyboard, and returns the file of the votes."""
    notebook.get_by_role("button", name="Open the panel").click()
    panel = notebook.frame_locator("iframe[title='Blind panel']")
    panel.get_by_label("Your name").fill("ann")
    page.keyboard.press("Enter")
    panel.locator("#first").wait_for()
    for number in range(int(panel.locator("#progress").get_attribute("max"))):
        page.keyboard.press("120x"[number % 4])
    panel.locator("#done").wait_for()
    with page.expect_download() as waiting:
        panel.get_by_role("button", name="Download the votes").click()
    waiting.value.save_as(folder / waiting.value.suggested_filename)
    return folder / waiting.value.suggested_filename
