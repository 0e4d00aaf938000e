"""The runner gives jobs to workers; a worker runs one job at a time in its own process, and stops it on request."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from telco_nb import ROOT
from telco_nb.engine import archive, schedule
from telco_nb.engine.archive import Failure
from telco_nb.engine.fork_server import ForkedJob, ForkServer, is_useful
from telco_nb.engine.job import common_environment, death_reason
from telco_nb.engine.progress import State, open_display
from telco_nb.engine.schedule import Options, UsageError
from telco_nb.study import machine, params, record
from telco_nb.study.content_key import content_key, is_current
from telco_nb.study.memory import oom_kills
from telco_nb.study.plan import Job

INTERRUPT_SECONDS, TERMINATE_SECONDS = 20.0, 5.0
POLL_SECONDS = 0.2


def gpus_per_worker(gpus: tuple[str, ...], jobs: list[Job]) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker: as many GPUs as one training has processes.

    Without GPUs there is one worker that uses the whole machine (None). Raises UsageError if they do not divide evenly.
    """
    if not gpus:
        return [None]
    size = max(job.parameters.get("processes", 1) for job in jobs)
    if len(gpus) % size:
        raise UsageError(f"--gpus names {len(gpus)} GPUs, and processes is {size}: name a multiple of {size}.")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus), size)]


class Runner:
    """Runs the jobs of a plan.

    Without --gpus, jobs run one after another: each has the whole machine, so that the measured energy is its own. With
    --gpus, several run at once, each on its own GPUs (see `gpus_per_worker`).
    """

    def __init__(
        self,
        states: list[State],
        root: Path,
        options: Options,
        console: Console,
        lock_file: IO[str],
        gpus: list[str | None],
    ):
        self.states, self.root, self.options, self.console, self.lock_file = states, root, options, console, lock_file
        self.by_id = {state.job.id: state for state in states}
        self.stops = 0  # number of requests to stop
        self.fork_server: ForkServer | None = None
        self.workers = [Worker(self, group) for group in gpus]

    def go(self) -> None:
        """Run the jobs. Afterwards every state has ended, except those that a stop left waiting."""
        with self._signals(), open_display(self.console, self.states) as self.display:
            try:
                if len(self.workers) > 1:
                    self._run_in_parallel()
                else:
                    self._run_in_order(self.workers[0])
            finally:
                if self.fork_server:
                    self.fork_server.close()

    def _run_in_order(self, worker: Worker) -> None:
        for state in self.states:
            if self._must_stop():
                break
            self._process(state, worker)

    def _run_in_parallel(self) -> None:
        """Give every idle worker the next job whose inputs are there, until no job is left."""
        idle, busy = [*self.workers], {}
        with ThreadPoolExecutor(len(idle)) as pool:
            while True:
                for state in filter(self._is_ready, self.states):
                    if not idle or self._must_stop():
                        break
                    worker = idle.pop()
                    state.status = "running"
                    busy[pool.submit(self._process, state, worker)] = worker
                if not busy:
                    return
                for done in wait(busy, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    idle.append(busy.pop(done))
                    done.result()  # raises the worker's exception
                self.display.tick()

    def _is_ready(self, state: State) -> bool:
        return state.status == "waiting" and all(self.by_id[d].ended for d in state.job.depends if d in self.by_id)

    def _must_stop(self) -> bool:
        return bool(self.stops) or (not self.options.keep_going and any(s.status == "failed" for s in self.states))

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

    def _process(self, state: State, worker: Worker) -> None:
        """Block, skip or execute one job."""
        blockers = [d for d in state.job.depends if d in self.by_id and self.by_id[d].status in ("failed", "blocked")]
        if blockers:
            state.status, state.reason = "blocked", f"blocked by {blockers[0]}"
        elif state.decision == "skip" or (state.reason != "forced" and self._is_current(state)):
            state.status = "skipped"
            archive.forget_failure(self.root, state.job.scope, state.job.step)
        else:
            self._execute(state, worker)
        self.display.changed(state)

    def _is_current(self, state: State) -> bool:
        """Decide again after the jobs before it have run: its inputs may be the same as before."""
        current, reason = is_current(state.job, self.root)
        state.reason = "inputs unchanged" if current else reason
        return current

    def _execute(self, state: State, worker: Worker) -> None:
        state.status, state.started = "running", time.monotonic()
        self.display.changed(state)
        try:
            state.failure = worker.run(state)
        finally:
            state.seconds = round(state.elapsed, 3)
        if state.failure is None:
            state.status = "done"
            schedule.estimate_durations(self.states, self.root)
        else:
            state.status = "interrupted" if state.failure.kind == "interrupted" and self.stops else "failed"

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
            "max_usd": self.options.max_usd,  # not a parameter: no result depends on it
            "timeout_seconds": None if minutes is None else round(60 * minutes),
        }
        path = archive.job_file(self.root, job.scope, job.step)
        record.write_json(path, values)
        return path

    def fork(self, job_file: Path, errors: IO[bytes]) -> ForkedJob | None:
        """Fork the process of a job, starting the fork server if needed; return None if no fork is possible."""
        if self.fork_server and self.fork_server.is_outdated():
            self.fork_server.close()
            self.fork_server = None
        if self.fork_server is None and is_useful(sum(state.decision != "skip" for state in self.states)):
            self.fork_server = ForkServer(os.environ | common_environment({}))
        if self.fork_server is None:
            return None
        return self.fork_server.fork(job_file, errors, self.lock_file, self._keep_waiting)

    def _keep_waiting(self) -> bool:
        self.display.tick()
        return not self.stops


class Worker:
    """Runs one job at a time, with its own `gpus` or with the whole machine (None)."""

    def __init__(self, runner: Runner, gpus: str | None):
        self.runner, self.gpus = runner, gpus
        self.kernel_pid: int | None = None
        self.runtime: str | None = None  # the temporary folder of the job's process

    def run(self, state: State) -> Failure | None:
        """Run a job to its end; return None if it left a valid result."""
        kills = oom_kills()
        try:
            child = self._start(state)
        except OSError as error:  # such as a full disk: other jobs may need less
            return Failure("not started", archive.describe(error))
        if child is None:
            return Failure("not started", "its inputs are not there")
        try:
            ended, failure = self._follow(child, state)
        finally:
            archive.job_file(self.runner.root, state.job.scope, state.job.step).unlink(missing_ok=True)
        state.exit_code = child.returncode
        return failure if ended else self._record_death(state, oom_kills() > kills)

    def _start(self, state: State) -> subprocess.Popen[str] | ForkedJob | None:
        """Start the process of a job, forked if possible; return None if an input of the job is missing."""
        job_file = self.runner.write_job(state)
        if job_file is None:
            return None
        log = archive.running_log(self.runner.root, state.job.scope, state.job.step)
        with log.open("wb") as errors:
            forked = self.runner.fork(job_file, errors) if self.gpus is None else None
            return forked or self._start_afresh(job_file, errors)

    def _start_afresh(self, job_file: Path, errors: IO[bytes]) -> subprocess.Popen[str]:
        gpus = {"CUDA_VISIBLE_DEVICES": str(self.gpus), machine.AT_ONCE_VARIABLE: str(len(self.runner.workers))}
        return subprocess.Popen(
            [sys.executable, "-m", "telco_nb.engine.job", str(job_file), str(os.getpid())],
            cwd=ROOT,
            env=os.environ | (gpus if self.gpus is not None else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal reaches only the runner, which stops its workers
            pass_fds=[self.runner.lock_file.fileno()],
        )

    def _follow(self, child: subprocess.Popen[str] | ForkedJob, state: State) -> tuple[bool, Failure | None]:
        """Read the events of a process until it ends; return (False, None) if it sent no result."""
        events: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        threading.Thread(target=_read_events, args=(child.stdout, events), daemon=True).start()
        ended, failure, self.kernel_pid, self.runtime = False, None, None, None
        stopping = _stop_child(child)
        while True:
            try:
                event = events.get(timeout=POLL_SECONDS)
            except queue.Empty:
                event = {}
            if event is None:
                child.wait()
                return ended, failure
            if "end" in event:
                ended, failure = True, event["end"] and Failure(**event["end"])
            state.cell, state.cells = event.get("cell", state.cell), event.get("of", state.cells)
            self.kernel_pid = event.get("kernel_pid", self.kernel_pid)
            self.runtime = event.get("runtime", self.runtime)
            if self.runner.stops:
                stopping.send(self.runner.stops)
            self.runner.display.tick()

    def _record_death(self, state: State, out_of_memory: bool) -> Failure:
        """Write the failed record of a process that died before it could, and kill the kernel that it left."""
        if self.kernel_pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.kernel_pid, signal.SIGKILL)
        if self.runtime is not None:
            shutil.rmtree(self.runtime, ignore_errors=True)
        place = self.runner.root, state.job.scope, state.job.step
        exception = archive.last_exception(archive.running_log(*place))
        how = death_reason(state.exit_code, out_of_memory, exception=exception)
        failure = Failure("not started" if not state.cell else "died", f"the process that runs the notebook: {how}")
        if self.runner.stops:
            failure = Failure("interrupted", "did not stop in time and was killed")
        with contextlib.suppress(OSError):  # a full disk: the summary has the reason
            archive.keep_failed(*place, failure)
        return failure


def _read_events(stream: IO[str], events: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in stream:
        with contextlib.suppress(json.JSONDecodeError):
            events.put(json.loads(line))
    events.put(None)


def _stop_child(child: subprocess.Popen[str] | ForkedJob) -> Generator[None, int, None]:
    """Interrupt, then terminate, then kill a process; `send` the number of stop requests so far to go on."""
    steps = _stop_steps(child.pid)
    next(steps)
    return steps


def _stop_steps(pid: int) -> Generator[None, int, None]:
    stops = yield
    for number, seconds in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
        _signal_group(pid, number)
        stops_before, deadline = stops, time.monotonic() + seconds
        while time.monotonic() < deadline and stops == stops_before:
            stops = yield
    while True:
        _signal_group(pid, signal.SIGKILL)
        yield


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
