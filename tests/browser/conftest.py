"""Opens pages of the report in Chromium, and checks that they ask for nothing."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def open_page(browser):
    """Opens a page of the report and checks in the end that nothing was asked for and nothing went wrong."""
    contexts, requests, faults = [], [], []

    def opener(path: Path, width: int = 1280, height: int = 900, scheme: str = "light", fragment: str = ""):
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on(
            "request", lambda r: requests.append(r.url) if r.url.partition(":")[0] not in ("file", "data") else None
        )
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.goto(path.as_uri() + (f"#{fragment}" if fragment else ""))
        return page

    yield opener
    for context in contexts:
        context.close()
    assert requests == []
    assert faults == []
