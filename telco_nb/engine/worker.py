"""Runs the jobs of a plan on an engine: in order, blocking, skipping or executing each, and stopping on request."""

from __future__ import annotations

import contextlib
import shutil
import signal
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from telco_nb.engine import archive, schedule
from telco_nb.engine.archive import Failure
from telco_nb.engine.local_engine import POLL_SECONDS, Engine, Event
from telco_nb.engine.progress import State, open_display
from telco_nb.engine.schedule import Options
from telco_nb.study import params, record
from telco_nb.study.content_key import content_key, is_current

ESTIMATE_SECONDS = 1.0


class Runner:
    """Runs the jobs of a plan: one after another if the engine has one place, else as many at once as it has."""

    def __init__(
        self, states: list[State], root: Path, options: Options, console: Console, engine: Engine,
        claims_path: str | None = None,
    ):  # fmt: skip
        self.states, self.root, self.options, self.console, self.engine = states, root, options, console, engine
        self.claims_path = claims_path  # of the study: every record notes it
        self.by_id = {state.job.id: state for state in states}
        # Each of them spends what is left of the cap when it starts, so no two may run at once.
        capped = states if options.max_usd is not None else []
        self.spenders = {state.job.id for state in capped if schedule.hosted_model(state.job)}
        self.stops = 0  # number of requests to stop
        self.estimated = 0.0  # when the time to go was

    def go(self) -> None:
        """Run the jobs. Afterwards every state has ended, except those that a stop left waiting."""
        with self._signals(), open_display(self.console, self.states) as self.display:
            try:
                if len(self.engine.places) > 1:
                    self._run_in_parallel()
                else:
                    self._run_in_order()
            finally:
                self.engine.close()

    def _run_in_order(self) -> None:
        for state in self.states:
            if self._must_stop():
                break
            self._process(state, self.engine.places[0])

    def _run_in_parallel(self) -> None:
        """Give every idle place the next job whose inputs are there, until no job is left."""
        idle, busy = [*self.engine.places], {}
        with ThreadPoolExecutor(len(idle)) as pool:
            while True:
                for state in filter(self._is_ready, self.states):
                    if not idle or self._must_stop():
                        break
                    place = idle.pop()
                    state.status = self.engine.first_status
                    busy[pool.submit(self._process, state, place)] = place
                if not busy:
                    return
                for done in wait(busy, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    idle.append(busy.pop(done))
                    done.result()  # raises the thread's exception
                self.display.tick()

    def _is_ready(self, state: State) -> bool:
        if state.status != "waiting" or not all(self.by_id[d].ended for d in state.job.depends if d in self.by_id):
            return False
        return state.job.id not in self.spenders or not any(map(self._is_under_way, self.spenders))

    def _is_under_way(self, job_id: str) -> bool:
        state = self.by_id[job_id]
        return state.status != "waiting" and not state.ended

    def _must_stop(self) -> bool:
        return bool(self.stops) or (not self.options.keep_going and any(s.status == "failed" for s in self.states))

    def keep_waiting(self) -> bool:
        """False if a job that has not started yet should not start any more."""
        self.display.tick()
        return not self._must_stop()

    @contextlib.contextmanager
    def _signals(self) -> Generator[None]:
        """Count SIGINT, SIGTERM and SIGHUP as requests to stop."""

        def stop(*_: Any) -> None:
            self.stops += 1

        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _process(self, state: State, place: Any) -> None:
        """Block, skip or execute one job."""
        blockers = [d for d in state.job.depends if d in self.by_id and self.by_id[d].status in ("failed", "blocked")]
        if blockers:
            state.status, state.reason = "blocked", f"blocked by {blockers[0]}"
        elif state.decision == "skip" or (state.reason != "forced" and self._is_current(state)):
            state.status = "skipped"
            archive.forget_failure(self.root, state.job.scope, state.job.step)
        else:
            self._execute(state, place)
        self.display.changed(state)

    def _is_current(self, state: State) -> bool:
        """Decide again after the jobs before it have run: its inputs may be the same as before."""
        current, reason = is_current(state.job, self.root)
        state.reason = "inputs unchanged" if current else reason
        return current

    def _execute(self, state: State, place: Any) -> None:
        state.status, state.started = self.engine.first_status, time.monotonic()
        self.display.changed(state)
        try:
            state.failure = self._run_job(state, place)
        finally:
            state.seconds = round(state.elapsed, 3)
        if state.status == "waiting":  # it never started
            state.seconds = state.started = None
        elif state.failure is None:
            state.status = "done"
            self._estimate()
        else:
            state.status = "interrupted" if state.failure.kind == "interrupted" and self.stops else "failed"

    def _estimate(self) -> None:
        """Estimate what is left, unless that was just done: it passes over all jobs, and there may be 20,000."""
        if time.monotonic() - self.estimated >= ESTIMATE_SECONDS:
            schedule.estimate_durations(self.states, self.root)
            self.estimated = time.monotonic()

    def _run_job(self, state: State, place: Any) -> Failure | None:
        """Run a job to its end; return None if it left a valid result, or never started."""
        try:
            job_file = self.write_job(state)
            if job_file is None:
                return Failure("not started", "its inputs are not there")
            events = self.engine.start(state.job, job_file, place, self)
        except OSError as error:  # such as a full disk: other jobs may need less
            return Failure("not started", archive.describe(error))
        failure = None
        try:
            for event in events:
                failure = self._note(state, event)
        finally:
            job_file.unlink(missing_ok=True)
        return failure

    def _note(self, state: State, event: Event) -> Failure | None:
        """Take over what an event tells; return the failure that it tells, if any."""
        state.cell, state.cells = event.get("cell", state.cell), event.get("of", state.cells)
        state.exit_code = event.get("exit_code", state.exit_code)
        if "node" in event or "lost" in event:
            state.status, state.started, state.cell = "running" if "node" in event else "queued", time.monotonic(), 0
            state.where = f"on {event['node']}" if "node" in event else f"again, as {event['lost']}"
            self.display.changed(state)
        if "withdrawn" in event:
            state.status = "waiting"
        self.display.tick()
        return Failure(**event["failure"]) if event.get("failure") else None

    def write_job(self, state: State) -> Path | None:
        """Write the job as its process and its kernel read it; return None if an input is missing."""
        job = state.job
        key, parts = content_key(job, self.root)
        if key is None:
            return None
        if state.reason == "forced":
            shutil.rmtree(record.work_dir(self.root, job.scope, job.step), ignore_errors=True)
        minutes = self.options.timeout_minutes
        values = asdict(job) | {
            "key": key,
            "key_parts": parts,
            "root": str(self.root),
            "work": str(record.prepare_work_dir(job, self.root, key)),
            "notebook": str(params.NOTEBOOKS_DIR / f"{job.step}.ipynb"),
            "claims_path": self.claims_path,  # as max_usd not a parameter: no result of this job depends on it
            "max_usd": self.options.max_usd,
            "timeout_seconds": None if minutes is None else round(60 * minutes),
        }
        path = archive.job_file(self.root, job.scope, job.step)
        record.write_json(path, values)
        return path
