"""What a run shows while it goes and when it ends: a live table in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from telco_nb.engine.archive import Failure
from telco_nb.study.plan import STEPS, Job

HEARTBEAT_SECONDS = 60.0
REDRAW_SECONDS = 0.5
PLAIN_WIDTH = 110  # where there is no terminal to ask
STYLES = {
    "running": "bold cyan",
    "done": "green",
    "skipped": "dim",
    "failed": "bold red",
    "blocked": "yellow",
    "interrupted": "yellow",
    "waiting": "dim",
}


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

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.started if self.started is not None else 0.0

    @property
    def ended(self) -> bool:
        return self.status not in ("waiting", "running")


def remaining_text(states: Iterable[State]) -> str:
    """How long the rest takes, from the expected seconds of what may still run; honest about what is unknown.

    If several run at once now, so will the rest.
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
    """75.2 -> 1:15."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


# ---------------------------------------------------------------- tables


def plan_table(states: list[State]) -> Table:
    """One row for each decision, step and reason, with the scopes it holds for."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for state in states:
        rows.setdefault((state.decision, state.job.step, state.reason), []).append(state.job.scope)
    table = Table(box=None, pad_edge=False, show_header=False)
    for (decision, step, reason), scopes in sorted(rows.items(), key=lambda row: row[0][1]):
        style = "dim" if decision == "skip" else ""
        table.add_row(decision, step, " ".join(scopes), Text(reason), style=style)
    return table


def status_table(states: list[State], most_rows: int | None = None) -> Group:
    """A row for each scope and a column for each step; at most `most_rows` rows, the busiest ones."""
    steps = [step for step in STEPS if any(s.job.step == step for s in states)]
    steps += sorted({s.job.step for s in states} - set(STEPS))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", *steps):
        table.add_column(name, no_wrap=True)
    by_scope: dict[str, dict[str, State]] = {}
    for state in states:
        by_scope.setdefault(state.job.scope, {})[state.job.step] = state
    shown, hidden = _fold(by_scope, most_rows)
    for scope in shown:
        table.add_row(scope, *(_cell(by_scope[scope].get(step)) for step in steps))
    return Group(table, Text(hidden)) if hidden else Group(table)


def _fold(by_scope: dict[str, dict[str, State]], most_rows: int | None) -> tuple[list[str], str]:
    """Scopes to show and a note on the rest: quietly finished rows go first, then rows that wait, from the end."""
    shown = list(by_scope)
    excess = len(shown) - most_rows if most_rows else 0
    if excess <= 0:
        return shown, ""
    quiet = [c for c in shown if all(s.status in ("done", "skipped") for s in by_scope[c].values())]
    idle = [c for c in reversed(shown) if all(s.status == "waiting" for s in by_scope[c].values())]
    hidden = {*(quiet + idle)[:excess]}
    finished = len(hidden & {*quiet})
    note = f"not shown: {finished} finished, {len(hidden) - finished} waiting"
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


# ---------------------------------------------------------------- while it runs


class Lines:
    """For logs and pipes: one line an event, and a sign of life every minute."""

    def __init__(self, console: Console, states: list[State]):
        self.console, self.states, self.last = console, states, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def say(self, text: str) -> None:
        self.last = time.monotonic()
        stamp = datetime.now().isoformat(timespec="seconds")
        self.console.print(f"{stamp} {text}", soft_wrap=True, markup=False, highlight=False)

    def changed(self, state: State) -> None:
        """A job has started or ended."""
        if state.status == "skipped" and state.decision == "skip":
            return  # the plan has said so
        took = f" in {duration_text(state.seconds)}" if state.seconds is not None else ""
        why = "" if state.status == "done" else f": {state.failure or state.reason}"
        done = sum(s.ended for s in self.states)
        left = f" ({done} of {len(self.states)}; to go: {remaining_text(self.states)})" if state.ended else ""
        self.say(f"{state.job.id} {state.status}{took}{why}{left}")

    def tick(self) -> None:
        if time.monotonic() - self.last >= HEARTBEAT_SECONDS:
            for state in self.states:
                if state.status == "running":
                    self.say(
                        f"{state.job.id} running {duration_text(state.elapsed)}, cell {state.cell} of {state.cells}"
                    )


class LiveTable:
    """For terminals: one table that keeps itself up to date; failures are also printed above it, to stay."""

    def __init__(self, console: Console, states: list[State]):
        self.console, self.states, self.start, self.drawn = console, states, time.monotonic(), 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="ellipsis")

    def __enter__(self) -> LiveTable:
        self.live.start()
        self.tick()
        return self

    def __exit__(self, *_: Any) -> None:
        self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def changed(self, state: State) -> None:
        if state.failure:
            self.say(f"{state.job.id} {state.status}: {state.failure}")
        self.drawn = 0.0
        self.tick()

    def tick(self) -> None:
        if time.monotonic() - self.drawn >= REDRAW_SECONDS:
            self.live.update(self._picture(), refresh=True)
            self.drawn = time.monotonic()

    def _picture(self) -> Group:
        lines = [f"{s.job.id}: cell {s.cell} of {s.cells}" for s in self.states if s.status == "running" and s.cells]
        done = sum(s.ended for s in self.states)
        lines.append(
            f"{done} of {len(self.states)} steps, {duration_text(time.monotonic() - self.start)} elapsed; "
            f"to go: {remaining_text(self.states)}. Ctrl-C stops; the same command goes on."
        )
        table = status_table(self.states, most_rows=self.console.height - 5)
        return Group(table, Text("\n".join(lines), style="bold"))


def make_console() -> Console:
    """Standard output; wide enough for the tables where it is not a terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, PLAIN_WIDTH))


def open_display(console: Console, states: list[State]) -> Lines | LiveTable:
    """The display that suits this output."""
    return (
        LiveTable(console, states) if console.is_terminal and not console.is_dumb_terminal else Lines(console, states)
    )
