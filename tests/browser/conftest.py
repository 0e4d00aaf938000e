"""Chromium for the browser tests. They are skipped, with the reason, where no Chromium is installed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PLACES = (
    "/usr/bin/chromium",
    "/usr/bin/chromium-browser",
    "/snap/bin/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


def chromium() -> str | None:
    """Path of an installed Chromium: $CHROMIUM, the usual places, or the search path."""
    given = os.environ.get("CHROMIUM")
    found = [given, *(p for p in PLACES if Path(p).is_file()), *(shutil.which(name) for name in CHROMIUMS)]
    return next((path for path in found if path), None)


@pytest.fixture(scope="session")
def browser() -> Iterator:
    path = chromium()
    if path is None:
        pytest.skip(f"no Chromium found; looked at $CHROMIUM, {', '.join(PLACES)}")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
