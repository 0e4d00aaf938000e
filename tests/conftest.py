"""No GPU for any test, and no network beyond loopback. Where Chromium is missing, a test says why it is skipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import loopback
import pytest

from telco_nb.report.pdf import PrintError, require_chromium
from telco_nb.study.machine import device_facts

# Tests, and what they start, compute on the processor also beside a GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# Workers share the cores: threads of two that all want every core wait for each other most of the time.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, device_facts()["cores"] // workers)))
BEYOND_LOOPBACK = loopback.start_watching()
NO_NAMES = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1"  # Chromium is no Python


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first, so that no worker waits alone for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_study.py")


def pytest_unconfigure() -> None:
    BEYOND_LOOPBACK.unlink(missing_ok=True)


def _fail_beyond_loopback() -> None:
    if noted := loopback.take_notes():
        pytest.fail("Tests reach nothing beyond loopback, but:\n" + "\n".join(noted), pytrace=False)


@pytest.fixture(autouse=True, scope="session")
def nothing_beyond_loopback_at_the_end() -> Iterator[None]:
    """What a process still does after its test, or fixtures while they end, fails the last test."""
    yield
    _fail_beyond_loopback()


@pytest.fixture(autouse=True)
def nothing_beyond_loopback(nothing_beyond_loopback_at_the_end: None) -> Iterator[None]:
    """A test during which something tried to reach beyond loopback fails, whoever caught the error."""
    yield
    _fail_beyond_loopback()


@pytest.fixture(autouse=True, scope="module")
def no_inherited_environment() -> Iterator[None]:
    """What a file's tests, and the code under them, set in the environment ends with the file."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def no_chosen_device() -> Iterator[None]:
    """The device is a choice of a process, and a process of tests is many: none inherits it from the one before."""
    if device := sys.modules.get("telco_nb.lora.device"):
        device._chosen["device"] = "auto"
    yield


@pytest.fixture(scope="session")
def browser() -> Iterator:
    try:
        path = require_chromium()
    except PrintError as error:
        pytest.skip(str(error))
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", NO_NAMES])
        yield started
        started.close()
