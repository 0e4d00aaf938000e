"""The state of each job, and how a run shows it: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from telco_nb.engine.archive import Failure
from telco_nb.hosted.keys import printable
from telco_nb.study.plan import STEPS, Job

HEARTBEAT_SECONDS = 60.0
REDRAW_SECONDS = 0.5
PLAIN_WIDTH = 110  # columns, if the output is not a terminal
MOST_NAMES, MOST_ROWS = 50, 100  # scopes in a row of the plan, rows of the table of what ran
STYLES = {
    "running": "bold cyan",
    "queued": "cyan",
    "done": "green",
    "skipped": "dim",
    "failed": "bold red",
    "blocked": "yellow",
    "interrupted": "yellow",
    "stale": "yellow",
    "maybe": "dim",
    "waiting": "dim",
}


@dataclass(frozen=True)
class Past:
    """What the last success of a job took on this machine: seconds per epoch, None where none is known, and bytes."""

    rate: float | None = None
    bytes: int = 0
    epochs: int = 1


UNREAD = Past()  # not looked up yet


@dataclass
class State:
    """A job within a run. `decision` is the plan's (run, skip or maybe); `status` is one of STYLES."""

    job: Job
    decision: str
    reason: str
    status: str = "waiting"
    expected_seconds: float | None = None
    started: float | None = None
    seconds: float | None = None
    exit_code: int | None = None
    failure: Failure | None = None
    cell: int = 0
    cells: int = 0
    past: Past = UNREAD
    is_counted: bool = False  # `past` is what this run took
    where: str = ""  # on which node of a cluster it runs, or why it is queued again

    @property
    def elapsed(self) -> float:
        """Seconds of work so far; waiting in a queue is none."""
        return time.monotonic() - self.started if self.started is not None and self.status != "queued" else 0.0

    @property
    def ended(self) -> bool:
        return self.status not in ("waiting", "queued", "running")


def remaining_text(states: Iterable[State]) -> str:
    """Estimate the time of the jobs that may still run, as a text that says if some durations are unknown.

    If several jobs run at once now, the rest is expected to do so, too.
    """
    states = [*states]
    at_once = max(1, sum(s.status == "running" for s in states))
    todo = [s for s in states if not s.ended and s.decision != "skip"]
    known = [max(s.expected_seconds - s.elapsed, 0) for s in todo if s.expected_seconds is not None]
    if not todo:
        return "nothing"
    if not known:
        return "unknown, as there is no earlier run"
    seconds = sum(known) / at_once
    text = f"{seconds / 60:.0f} min" if seconds >= 60 else "1 min"
    return f"about {text}" if len(known) == len(todo) else f"more than {text}"


def duration_text(seconds: float) -> str:
    """Write seconds as minutes and seconds: 75.2 -> 1:15."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def names_text(names: Iterable[str]) -> str:
    """Names in order, the first MOST_NAMES of them."""
    known = sorted(names)
    return " ".join(known[:MOST_NAMES]) + (f" and {len(known) - MOST_NAMES:,} more" if len(known) > MOST_NAMES else "")


def plan_table(states: list[State]) -> Table:
    """Return a table with one row for each decision, step and reason, and the scopes that they apply to."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for state in states:
        rows.setdefault((state.decision, state.job.step, state.reason), []).append(state.job.scope)
    table = Table(box=None, pad_edge=False, show_header=False)
    for (decision, step, reason), scopes in sorted(rows.items(), key=lambda row: row[0][1]):
        style = "dim" if decision == "skip" else ""
        table.add_row(decision, step, names_text(scopes), Text(reason), style=style)
    return table


def status_table(states: list[State], most_rows: int = MOST_ROWS) -> Group:
    """Return a table with a row per scope and a column per step; at most `most_rows` rows, the active ones first."""
    steps = [step for step in STEPS if any(s.job.step == step for s in states)]
    steps += sorted({s.job.step for s in states} - set(STEPS))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *steps):
        table.add_column(name, no_wrap=True)
    by_scope: dict[str, dict[str, State]] = {}
    for state in sorted(states, key=lambda state: (state.job.step, state.job.scope)):  # they run in a drawn order
        by_scope.setdefault(state.job.scope, {})[state.job.step] = state
    shown, hidden = _fold(by_scope, most_rows)
    for scope in shown:
        table.add_row(scope, *(_cell(by_scope[scope].get(step)) for step in steps))
    return Group(table, Text(hidden)) if hidden else Group(table)


def _fold(by_scope: dict[str, dict[str, State]], most_rows: int) -> tuple[list[str], str]:
    """Return the scopes to show and a note on the hidden ones: first finished rows, then waiting rows from the end."""
    shown = list(by_scope)
    excess = len(shown) - most_rows
    if excess <= 0:
        return shown, ""
    finished = [c for c in shown if all(s.status in ("done", "skipped") for s in by_scope[c].values())]
    waiting = [c for c in reversed(shown) if all(s.status == "waiting" for s in by_scope[c].values())]
    hidden = {*(finished + waiting)[:excess]}
    count = len(hidden & {*finished})
    note = f"not shown: {count} finished, {len(hidden) - count} waiting"
    return [c for c in shown if c not in hidden], note


def _cell(state: State | None) -> Text:
    if state is None:
        return Text("")
    text = state.status
    if state.status == "running":
        text = f"running {duration_text(state.elapsed)}"
    elif state.seconds is not None:
        text = f"{state.status} {duration_text(state.seconds)}"
    return Text(text, style=STYLES[state.status])


class Lines:
    """Progress for logs and pipes: one line per event, and one per running job and minute; in debug one per cell."""

    def __init__(self, console: Console, states: list[State]):
        self.console, self.states, self.last = console, states, time.monotonic()
        self.is_debug = getattr(console, "level", "info") == "debug"
        self.told: set[tuple[str, int]] = set()  # the cells that were named

    def changed(self, state: State) -> None:
        """Print that a job has started or ended."""
        if state.status == "skipped" and state.decision == "skip":
            return  # the plan shows it
        took = f" in {duration_text(state.seconds)}" if state.seconds is not None else ""
        where = f" {state.where}" if state.where and not state.ended else ""
        why = "" if where or state.status == "done" else f": {state.failure or state.reason}"
        done = sum(s.ended for s in self.states)
        left = f" ({done} of {len(self.states)}; to go: {remaining_text(self.states)})" if state.ended else ""
        self._print(f"{state.job.id} {state.status}{where}{took}{why}{left}", state.failure is not None)

    def tick(self) -> None:
        is_time = time.monotonic() - self.last >= HEARTBEAT_SECONDS
        for state in self.states if is_time or self.is_debug else ():
            is_new = self.is_debug and state.cell > 0 and (state.job.id, state.cell) not in self.told
            if state.status == "running" and (is_time or is_new):
                self.told.add((state.job.id, state.cell))
                self._print(
                    f"{state.job.id} running {duration_text(state.elapsed)}, cell {state.cell} of {state.cells}"
                )

    def _print(self, text: str, is_failure: bool = False) -> None:
        self.last = time.monotonic()
        text = f"{datetime.now().isoformat(timespec='seconds')} {text}"
        if is_failure:
            warn(self.console, text)
        else:
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)


class LiveTable:
    """Progress for terminals: a table that updates itself; failures are also printed above it and stay."""

    def __init__(self, live: Live, states: list[State]):
        self.live, self.states, self.start, self.drawn = live, states, time.monotonic(), 0.0

    def changed(self, state: State) -> None:
        if state.failure:
            self.live.console.print(f"{state.job.id} {state.status}: {state.failure}", markup=False, highlight=False)
        self.drawn = 0.0
        self.tick()

    def tick(self) -> None:
        if time.monotonic() - self.drawn >= REDRAW_SECONDS:
            self.live.update(self._picture(), refresh=True)
            self.drawn = time.monotonic()

    def _picture(self) -> Group:
        lines = [
            f"{s.job.id}: cell {s.cell} of {s.cells} {s.where}".rstrip()
            for s in self.states
            if s.status == "running" and s.cells
        ]
        done = sum(s.ended for s in self.states)
        lines.append(
            f"{done} of {len(self.states)} steps, {duration_text(time.monotonic() - self.start)} elapsed; "
            f"to go: {remaining_text(self.states)}. Ctrl-C stops; the same command goes on."
        )
        table = status_table(self.states, most_rows=self.live.console.height - 5)
        return Group(table, Text("\n".join(lines), style="bold"))


class SafeConsole(Console):
    """A console whose texts cannot steer the terminal: names, reasons and errors come from files and servers, too.

    Its own colours and movements of the cursor stay. rich takes out some control characters itself, but not ESC.
    """

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))


class Output(SafeConsole):
    """Standard output, wide enough for the tables if it is not a terminal.

    Its level says what a run prints: `warning` only warnings and failures, `info` plan, steps and result, `debug` each
    cell, too.
    """

    def __init__(self, level: str = "info"):
        super().__init__(highlight=False, quiet=level == "warning")
        self.level = level
        if not self.is_terminal:
            self.width = max(self.width, PLAIN_WIDTH)


def warn(console: Console, text: str) -> None:
    """Print a warning or a failure; on standard error where the level lets nothing else pass."""
    chosen = SafeConsole(stderr=True, highlight=False) if console.quiet else console
    chosen.print(text, markup=False, soft_wrap=True)


@contextlib.contextmanager
def open_display(console: Console, states: list[State]) -> Generator[Lines | LiveTable]:
    """Open a live table in a terminal, and lines elsewhere or at another level than info."""
    if not console.is_terminal or console.is_dumb_terminal or getattr(console, "level", "info") != "info":
        yield Lines(console, states)
        return
    with Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis") as live:
        display = LiveTable(live, states)
        display.tick()
        yield display
