"""A worker runs one job at a time, each in a process of its own, and ends it when it is asked to stop."""

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
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from telco_nb import ROOT
from telco_nb.engine import archive
from telco_nb.engine.archive import Failure
from telco_nb.engine.fork_server import ForkedJob
from telco_nb.engine.progress import State
from telco_nb.engine.schedule import UsageError
from telco_nb.study import machine
from telco_nb.study.plan import Job

INTERRUPT_SECONDS, TERMINATE_SECONDS = 20.0, 5.0
POLL_SECONDS = 0.2


def gpus_per_worker(gpus: tuple[str, ...], jobs: list[Job]) -> list[str | None]:
    """The GPUs of each worker, as CUDA_VISIBLE_DEVICES: as many as processes share a training. Without any, one worker.

    Raises UsageError if they do not come out even.
    """
    if not gpus:
        return [None]
    size = max(job.parameters.get("processes", 1) for job in jobs)
    if len(gpus) % size:
        raise UsageError(f"--gpus names {len(gpus)} GPUs, and processes is {size}: name a multiple of {size}.")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus), size)]


class Worker:
    """One job at a time in a process of its own, with its own GPUs of several or with the whole machine (None)."""

    def __init__(self, runner: Any, gpus: str | None):  # a runner.Runner, which imports this module
        self.runner, self.gpus = runner, gpus
        self.child: subprocess.Popen[str] | ForkedJob | None = None
        self.kernel_pid: int | None = None
        self.runtime: str | None = None  # the child's temporary folder

    def run(self, state: State) -> Failure | None:
        """Run a job to its end; None if it left a valid result."""
        job_file = self.runner.write_job(state)
        if job_file is None:
            return Failure("not started", "its inputs are not there")
        log = archive.running_log(self.runner.root, state.job.scope, state.job.step)
        with log.open("wb") as errors:
            forked = self.runner.fork(job_file, errors) if self.gpus is None else None
            self.child = forked or self._start(job_file, errors)
        try:
            ended, failure = self._attend(state)
        finally:
            job_file.unlink(missing_ok=True)
        state.exit_code = self.child.returncode
        return failure if ended else self._record_death(state)

    def _start(self, job_file: Path, errors: IO[bytes]) -> subprocess.Popen[str]:
        several = {"CUDA_VISIBLE_DEVICES": str(self.gpus), machine.AT_ONCE_VARIABLE: str(len(self.runner.workers))}
        return subprocess.Popen(
            [sys.executable, "-m", "telco_nb.engine.job", str(job_file), str(os.getpid())],
            cwd=ROOT,
            env=os.environ | (several if self.gpus is not None else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,  # Ctrl-C in the terminal reaches the runner only, which passes it on
            pass_fds=[self.runner.lock_file.fileno()],
        )

    def _attend(self, state: State) -> tuple[bool, Failure | None]:
        """Follow the child to its end; (False, None) if it died without a word."""
        child, events = self.child, queue.SimpleQueue()
        assert child is not None
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

    def _record_death(self, state: State) -> Failure:
        """The child is dead and has not said why: leave no kernel, and write the failed record in its place."""
        if self.kernel_pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.kernel_pid, signal.SIGKILL)
        if self.runtime is not None:
            shutil.rmtree(self.runtime, ignore_errors=True)
        code = state.exit_code or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        failure = Failure("not started" if not state.cell else "died", f"the process that runs the notebook {how}")
        if self.runner.stops:
            failure = Failure("interrupted", "did not stop in time and was killed")
        archive.keep_failed(self.runner.root, state.job.scope, state.job.step, failure)
        return failure


def _read_events(stream: Any, events: queue.SimpleQueue[Any]) -> None:
    for line in stream:
        with contextlib.suppress(json.JSONDecodeError):
            events.put(json.loads(line))
    events.put(None)


def _stop_child(child: subprocess.Popen[str] | ForkedJob) -> Any:
    """A generator to `send` the number of requests to stop: interrupt, then terminate, then kill."""

    def ladder() -> Iterator[None]:
        stops = yield
        for number, patience in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)
            asked, deadline = stops, time.monotonic() + patience
            while time.monotonic() < deadline and stops == asked:
                stops = yield
        while True:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            stops = yield

    steps_down = ladder()
    next(steps_down)
    return steps_down
