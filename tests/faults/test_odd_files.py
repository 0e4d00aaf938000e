"""Odd files and odd command lines, made by mutation of good ones: read or refused in time, and nothing is left behind.

`make test` tries about 500, `make nightly` about 10,000: the same ones on every machine.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from pathlib import Path

import odd_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_files import DOCUMENTED, KINDS

MOST_SECONDS = 2.0  # of processor time, for one case
COUNTS: dict[str, Counter[str]] = {}  # kind: outcome: cases


@pytest.fixture(scope="module", autouse=True)
def report():
    """Prints what was tried; `pytest -s` shows it."""
    yield
    for name, counts in COUNTS.items():
        print(f"{name}: {sum(counts.values())} cases, {', '.join(f'{n} {what}' for what, n in counts.items())}")


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def try_file(name: str, folder: Path, data: st.DataObject) -> None:
    kind = KINDS[name]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    kind.prepare(folder)
    path = folder / kind.name
    path.write_bytes(odd_files.mutated(data, kind.mutate, path.read_bytes()))
    before, start = listing(folder), time.process_time()
    try:
        kind.read(folder)
        outcome = "accepted"
    except DOCUMENTED as error:
        outcome = "refused"
        assert str(error).strip()
    assert time.process_time() - start < MOST_SECONDS
    assert listing(folder) == before
    COUNTS.setdefault(name, Counter())[outcome] += 1


def tried(cases: int, check) -> None:
    """Try so many cases of a check, the same ones each time."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
    with_settings = settings(
        max_examples=cases, derandomize=True, deadline=None, database=None, suppress_health_check=checks
    )
    with_settings(given(st.data())(check))()


@pytest.mark.parametrize("name", KINDS)
def test_an_odd_file_is_read_or_refused_by_name_in_time_and_changes_nothing(name, tmp_path):
    tried(22, lambda data: try_file(name, tmp_path / "case", data))


@pytest.mark.nightly
@pytest.mark.parametrize("name", KINDS)
def test_many_odd_files_are_read_or_refused_by_name_in_time_and_change_nothing(name, tmp_path):
    tried(450, lambda data: try_file(name, tmp_path / "case", data))
