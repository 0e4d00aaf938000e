"""What of a study is done, running, failed or out of date, and why: `run_all.py status`. It changes nothing."""

from __future__ import annotations

import fcntl
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from telco_nb.engine import archive, schedule
from telco_nb.engine.progress import STYLES, State, names_text, remaining_text, status_table
from telco_nb.engine.runner import RunOutcome, errors_as_exit_codes
from telco_nb.study import record, seal
from telco_nb.study.plan import plan_jobs

ORDER = ("running", "queued", "failed", "interrupted", "stale", "waiting", "maybe", "done")


def status(options: schedule.Options, metrics_file: Path | None, console: Console) -> int:
    """Print what stands of a study, and write it to the files that are asked for; returns the exit code.

    Args:
        options: of the run that made the study; `json_file` is where to write it machine-readable.
        metrics_file: where to write it as Prometheus text, for a collector of text files; None: nowhere.
        console: for the table.
    """
    result = RunOutcome(profile=options.profile, command=options.command())
    with errors_as_exit_codes(result):
        record.use_outputs(options.outputs)
        json_file = schedule.output_file(options.json_file, "--json")
        metrics_file = schedule.output_file(metrics_file, "--metrics")
        study = schedule.load_study(options)
        root = record.profile_root(study.profile)
        result.root = str(root)
        process = running_process(root)
        states = schedule.plan_states(plan_jobs(study), root, set())
        for state in states:
            _look_at(state, root, process is not None)
        if json_file:
            record.write_json(json_file, _content(result, states, process))
        if metrics_file:
            write_metrics(metrics_file, study.profile, states, process is not None)
        _show(console, result, root, states, process)
    return result.exit_code


def running_process(root: Path) -> str | None:
    """The process that is using a study, as its lock names it; None if nobody is.

    A run that starts in this moment tries again, so that looking never stops one.
    """
    try:
        stream = (root / ".lock").open(encoding="utf-8")
    except OSError:
        return None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return stream.read().strip() or "unknown"
        fcntl.flock(stream, fcntl.LOCK_UN)
    return None


def _look_at(state: State, root: Path, is_locked: bool) -> None:
    """Give a planned job the status of its files, with the reason and the seconds of its last success."""
    job = state.job
    manifest = record.finished(root, job.scope, job.step)
    state.seconds = manifest["seconds"] if manifest else None
    failed = archive.failed_notebook(root, job.scope, job.step)
    started = _start(archive.job_file(root, job.scope, job.step)) if is_locked else None
    if started is not None:
        is_started = archive.running_log(root, job.scope, job.step).exists()  # on a cluster, once a node has taken it
        state.status, state.seconds, state.started = "running" if is_started else "queued", None, started
    elif failed.is_file():
        state.status, state.reason = "failed", f"{archive.read_failure(failed)}; {failed}"
    elif state.decision == "run" and record.work_dir(root, job.scope, job.step).is_dir():
        state.status, state.reason = "interrupted", f"the next run goes on where it can ({state.reason})"
    else:
        state.status = {"skip": "done", "maybe": "maybe"}.get(state.decision, "stale" if manifest else "waiting")


def _start(job_file: Path) -> float | None:
    """When a running job was started, by the clock of time.monotonic; None if it does not run."""
    try:
        return time.monotonic() - max(time.time() - job_file.stat().st_mtime, 0)
    except FileNotFoundError:
        return None


def _content(result: RunOutcome, states: Sequence[State], process: str | None) -> dict[str, Any]:
    steps = [
        {"scope": s.job.scope, "step": s.job.step, "status": s.status, "reason": s.reason, "seconds": s.seconds}
        for s in states
    ]
    counts = dict(Counter(state.status for state in states))
    return {"profile": result.profile, "root": result.root, "process": process, "counts": counts, "steps": steps}


def write_metrics(path: Path, profile: str, states: Sequence[State], is_running: bool) -> None:
    """Write the study's state in Prometheus' text format, whole or not at all.

    Args:
        path: the file; collectors of text files want it to end in .prom.
        profile: the study, a label of every metric.
        states: with the status of each job.
        is_running: whether a run is using the study now.
    """
    from prometheus_client import CollectorRegistry, Gauge
    from prometheus_client.exposition import generate_latest

    registry = CollectorRegistry()
    running = Gauge("telco_nb_running", "1 while a run is using the study.", ["profile"], registry=registry)
    running.labels(profile).set(is_running)
    steps = Gauge("telco_nb_steps", "Steps by status.", ["profile", "status"], registry=registry)
    counts = Counter(state.status for state in states)
    for name in ORDER:
        steps.labels(profile, name).set(counts[name])
    labels = ["profile", "scope", "step"]
    seconds = Gauge("telco_nb_step_seconds", "Seconds that the last success of a step took.", labels, registry=registry)
    for state in states:
        if state.seconds is not None:
            seconds.labels(profile, state.job.scope, state.job.step).set(state.seconds)
    record.write_bytes(path, generate_latest(registry))


def _show(console: Console, result: RunOutcome, root: Path, states: list[State], process: str | None) -> None:
    counts = Counter(state.status for state in states)
    told = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    used = f"Process {process} is using it." if process else "No run is using it."
    console.print(f"{root}: {told}. {used}", markup=False, soft_wrap=True)
    console.print(status_table(states))
    table = Table(box=None, pad_edge=False, show_header=False)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for state in states:
        if state.status not in ("done", "running"):
            reasons.setdefault((state.status, state.job.step, state.reason), []).append(state.job.scope)
    for (name, step, reason), scopes in sorted(reasons.items(), key=lambda row: ORDER.index(row[0][0])):
        table.add_row(Text(name, style=STYLES[name]), step, names_text(scopes), Text(reason))
    if reasons:
        console.print(table)
        to_go = f"To go: {remaining_text(_planned(states))}. Go on with:  {result.command}"
        console.print(to_go, markup=False, soft_wrap=True)
    elif known := seal.seal_hash(root):
        console.print(f"Sealed: {known[:16]}", markup=False)


def _planned(states: Sequence[State]) -> list[State]:
    """The jobs as a plan sees them: those to run are waiting."""
    todo = [state.decision != "skip" and state.status != "running" for state in states]
    return [replace(state, status="waiting") if waits else state for state, waits in zip(states, todo, strict=True)]
