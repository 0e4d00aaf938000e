"""Chromium for the browser tests. They are skipped, with the reason, where no Chromium is installed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from telco_nb.report.pdf import PLACES, find_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator:
    path = find_chromium()
    if path is None:
        pytest.skip(f"no Chromium found; looked at $CHROMIUM, {', '.join(PLACES)}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def open_page(browser):
    """Opens a page of the report and checks in the end that nothing was asked for and nothing went wrong."""
    contexts, requests, faults = [], [], []

    def opener(path: Path, width: int = 1280, height: int = 900, scheme: str = "light"):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request", lambda r: requests.append(r.url) if r.url.partition(":")[0] not in ("file", "data") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri())
        return page

    yield opener
    for context in contexts:
        context.close()
    assert requests == []
    assert faults == []
