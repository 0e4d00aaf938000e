"""What a run prints at each level, and what stays readable with many configurations."""

import contextlib
import io
import re

import pytest
from rich.console import Console

from telco_nb.engine import progress, runner
from telco_nb.engine.archive import Failure
from telco_nb.engine.progress import Output, State
from telco_nb.engine.schedule import Options
from telco_nb.study.plan import Job


def output(level: str) -> Output:
    console = Output(level)
    console.file = io.StringIO()
    return console


def follow(level: str) -> tuple[str, Output]:
    """The lines of a job that runs three cells and fails, and the console."""
    console, state = output(level), State(Job("03_train", "c01", {}, ()), "run", "x changed", cells=3)
    with progress.open_display(console, [state]) as display:
        state.status = "running"
        display.changed(state)
        for state.cell in (1, 2, 2, 3):
            display.tick()
        state.status, state.failure = "failed", Failure("error", "ValueError: no", 3)
        display.changed(state)
    return console.file.getvalue(), console


def test_the_level_info_prints_a_line_when_a_job_starts_and_one_when_it_ends():
    said = follow("info")[0].splitlines()
    assert len(said) == 2 and "c01/03_train running" in said[0] and "failed: error in a cell In [3]" in said[1]


def test_the_level_debug_names_each_cell_once():
    said = follow("debug")[0]
    assert [said.count(f"cell {k} of 3") for k in (1, 2, 3)] == [1, 1, 1]


def test_the_level_warning_prints_failures_only_and_on_standard_error(capsys):
    assert follow("warning")[0] == ""
    said = capsys.readouterr().err
    assert "c01/03_train failed" in said and "running" not in said and "cell" in said


def test_a_run_without_faults_prints_nothing_at_the_level_warning(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TELCO_NB_OUTPUTS", str(tmp_path))
    options = Options(profile="smoke", dry_run=True, log_level="warning")
    assert runner.run(options, runner.Services(None, None)) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "")


def test_what_will_leave_this_machine_is_told_at_every_level(capsys):
    progress.warn(output("warning"), "judge-x/05_judge: 100 calls. Sent there: answers.")
    assert "Sent there" in capsys.readouterr().err


@pytest.mark.parametrize("n", [16, 1000])
def test_plan_and_table_of_many_configurations_stay_short_and_show_every_failure(n):
    states = [State(Job("03_train", f"c{i:04}", {}, ()), "run", "no result yet", "done") for i in range(n)]
    states[n // 2].status = "failed"
    console = Console(file=io.StringIO(), width=110)
    console.print(progress.plan_table(states), progress.status_table(states))
    said = console.file.getvalue()
    assert len(said.splitlines()) <= progress.MOST_ROWS + 15 and said.count("failed") == 1
    assert ("more" in said) == (n > progress.MOST_NAMES)


HOSTILE = "\x1b[2J\x1b]0;owned\x07\x1b]8;;https://evil.example\x1b\\click\x9b31m\u202eevil\r\b\x7f"


def steers(text: str) -> bool:
    """True if a text holds more than rich's own colours, frames and movements of the cursor."""
    return not re.sub(r"\x1b\[[0-9;?]*[A-KmhlG]|\r", "", text).replace("\n", "").isprintable()


def test_what_a_run_prints_of_files_and_servers_cannot_steer_a_terminal(tmp_path, capsys):
    console = progress.SafeConsole(file=io.StringIO(), force_terminal=True, width=200)
    state = State(Job("03_train", HOSTILE, {}, ()), "run", HOSTILE, cells=3)
    state.failure = Failure("error", HOSTILE, 3)
    for status in ("running", "failed"):
        state.status = status
        for display in (progress.Lines(console, [state]), None):
            with contextlib.nullcontext(display) if display else progress.open_display(console, [state]) as shown:
                shown.changed(state)
        console.print(progress.status_table([state]), HOSTILE)
        progress.warn(console, HOSTILE)
    runner._print_error(HOSTILE)
    said = console.file.getvalue()
    assert said.count("click") > 8 and "\x1b[" in said and not steers(said.replace("\x1b[2J", ""))
    assert "\x1b[2J" not in said and "\r\b" not in said
    error = capsys.readouterr().err
    assert "click" in error and not steers(error)
