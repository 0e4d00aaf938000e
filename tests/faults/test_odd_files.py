"""Odd files and odd command lines, made by mutation of good ones: read or refused in time, and nothing is left behind.

`make test` tries about 500, `make nightly` about 10,000: the same ones on every machine.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from pathlib import Path

import odd_files
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_files import DOCUMENTED, KINDS
from typer.testing import CliRunner

import run_all
from telco_nb.__main__ import app as side_commands

MOST_SECONDS = 2.0  # of processor time, for one case
COUNTS: dict[str, Counter[str]] = {}  # kind: outcome: cases


@pytest.fixture(scope="module", autouse=True)
def report():
    """Prints what was tried; `pytest -s` shows it."""
    yield
    for name, counts in COUNTS.items():
        print(f"{name}: {sum(counts.values())} cases, {', '.join(f'{n} {what}' for what, n in counts.items())}")


def listing(folder: Path) -> dict[str, bytes]:
    """Every file with its content, every folder as empty; a lock and the folders that it needs are nothing made."""
    outputs = folder / "outputs"
    found = (path for path in folder.rglob("*") if path.name != ".lock" and outputs not in (path, path.parent))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


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


# ---------------------------------------------------------------- command lines

ODD_WORDS = [
    "", " ", "-", "--", "-1", "0", "1.5", "inf", "-inf", "nan", "1e308", "1e999", "9" * 5000, "x" * 300, "x" * 5000,
    "~nosuchuser", "~nosuchuser/x", "../base", "folder/../../base", "/", "/dev/null", "/proc/x/y", "loop", "loop/x",
    "folder", "file", "file/x", "fifo", "a{b}", "{0}", "%s", "a\udcffb", "a\nb", "\x1b[2J", "é名", "c01,c01",
    "c01,,c02", "*", "[", "[!", "*" * 500, "c0*/03", "01-99", "05-03", "03_train", "base", "reference", ".", "..",
    "smoke", "c01",
]  # fmt: skip
OPTIONS = [
    "--profile", "--configs", "--steps", "--force", "--timeout", "--json", "--outputs", "--max-usd", "--gpus",
    "--params",
]  # fmt: skip
SIDE = [
    ("pilot", "--profile", "W", "--judge", "W"), ("batch", "poll", "--profile", "W"),
    ("batch", "submit", "--judge", "W"),
    ("votes", "export", "W", "W"), ("votes", "import", "W", "W"), ("votes", "import", "folder", "W", "--judge", "W"),
    ("votes", "export", "folder", "W", "--params", "W"), ("rerank", "W", "--draws", "W"), ("publish", "--profile", "W"),
    ("dataset", "export", "W", "--profile", "W"), ("chat", "W", "--profile", "W"), ("export", "W", "W", "--to", "W"),
    ("export", "W", "W", "--profile", "W"), ("serve", "W", "--port", "W"),
]  # fmt: skip
EXIT_CODES = {0, 1, 2, 3, 4}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working folder with a file, a folder, a link loop and a pipe; results would go below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path / "outputs"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "fifo")
    return tmp_path


def try_command(place: Path, app, words: list[str]) -> None:
    before, start = listing(place), time.process_time()
    result = CliRunner().invoke(app, words, catch_exceptions=True)
    assert isinstance(result.exception, SystemExit | None), (words, result.exception)
    assert result.exit_code in EXIT_CODES and "Traceback" not in result.output, words
    assert time.process_time() - start < MOST_SECONDS, words
    if result.exit_code and "--json" not in words:
        assert listing(place) == before, words
    outcome = "refused" if result.exit_code else "accepted"
    COUNTS.setdefault("command lines", Counter())[outcome] += 1


def try_run(place: Path, data: st.DataObject) -> None:
    words = ["--dry-run", "--profile", "smoke"]
    for option in data.draw(st.lists(st.sampled_from(OPTIONS), min_size=1, max_size=2)):
        words += [option, data.draw(st.sampled_from(ODD_WORDS))]
    try_command(place, run_all.app, words)


def try_side(place: Path, data: st.DataObject) -> None:
    words = [data.draw(st.sampled_from(ODD_WORDS)) if w == "W" else w for w in data.draw(st.sampled_from(SIDE))]
    try_command(place, side_commands, words)


@pytest.mark.parametrize("check", [try_run, try_side])
def test_an_odd_command_line_ends_in_time_with_an_exit_code_and_changes_nothing(check, place):
    tried(30, lambda data: check(place, data))


@pytest.mark.nightly
@pytest.mark.parametrize("check", [try_run, try_side])
def test_many_odd_command_lines_end_in_time_with_an_exit_code_and_change_nothing(check, place):
    tried(500, lambda data: check(place, data))
