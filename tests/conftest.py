"""Chromium for the tests that need it. They are skipped, with the reason, where none is installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from telco_nb.report.pdf import PrintError, require_chromium


@pytest.fixture(scope="session")
def browser() -> Iterator:
    try:
        path = require_chromium()
    except PrintError as error:
        pytest.skip(str(error))
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()
