"""Runs jobs in processes of this machine: starts them, follows their events, stops them, and records their death."""

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
from collections.abc import Generator, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Protocol

from telco_nb import ROOT
from telco_nb.engine import archive
from telco_nb.engine.archive import Failure
from telco_nb.engine.fork_server import ForkedJob, ForkServer, is_useful
from telco_nb.engine.job import common_environment, death_reason
from telco_nb.engine.schedule import UsageError
from telco_nb.study import machine
from telco_nb.study.memory import oom_kills
from telco_nb.study.plan import Job

INTERRUPT_SECONDS, TERMINATE_SECONDS = 20.0, 5.0
POLL_SECONDS = 0.2

Event = dict[str, Any]
Place = tuple[Path, str, str]  # root, scope and step of a job


class Control(Protocol):
    """What an engine asks the runner while a job waits or runs."""

    stops: int  # number of requests to stop

    def keep_waiting(self) -> bool:
        """False if a job that has not started yet should not start any more."""
        ...


class Engine(Protocol):
    """Runs jobs somewhere. One job at a time runs at each of its `places`; `first_status` is a job's at its start."""

    places: list[Any]
    first_status: str

    def start(self, job: Job, job_file: Path, place: Any, control: Control) -> Iterator[Event]:
        """Start a job and return its events, at least one every few POLL_SECONDS, be it an empty one.

        An event may tell `cell` and `of`, the `node` on which the job has started, or why it was `lost` and waits for
        another. The last one has `failure` (the fields of a Failure, or None) and `exit_code`, or is `withdrawn`: the
        job never started.
        Raises OSError if the job cannot be started.
        """
        ...

    def close(self) -> None: ...


def gpus_per_place(gpus: tuple[str, ...], jobs: list[Job]) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each place: as many GPUs as one training has processes.

    Without GPUs there is one place that is the whole machine (None). Raises UsageError if they do not divide evenly.
    """
    if not gpus:
        return [None]
    size = max(job.parameters.get("processes", 1) for job in jobs)
    if len(gpus) % size:
        raise UsageError(f"--gpus names {len(gpus)} GPUs, and processes is {size}: name a multiple of {size}.")
    return [",".join(gpus[i : i + size]) for i in range(0, len(gpus), size)]


class LocalEngine:
    """Runs jobs in processes of this machine, forked where that is possible.

    Without GPUs there is one place: each job has the whole machine, so that the measured energy is its own. With GPUs
    there are several, each with its own GPUs (see `gpus_per_place`).
    """

    first_status = "running"

    def __init__(self, places: list[str | None], lock_file: IO[str], jobs: int):
        self.places, self.lock_file, self.jobs = places, lock_file, jobs
        self.fork_server: ForkServer | None = None

    def start(self, job: Job, job_file: Path, place: str | None, control: Control) -> Iterator[Event]:
        values = json.loads(job_file.read_text(encoding="utf-8"))
        where = Path(values["root"]), job.scope, job.step
        with archive.running_log(*where).open("wb") as errors:
            child = self._fork(job_file, errors, control) if place is None else None
            child = child or self._start_afresh(job_file, errors, place)
        return follow(child, where, lambda: control.stops)

    def close(self) -> None:
        if self.fork_server:
            self.fork_server.close()

    def _fork(self, job_file: Path, errors: IO[bytes], control: Control) -> ForkedJob | None:
        """Fork the process of a job, starting the fork server if needed; return None if no fork is possible."""
        if self.fork_server and self.fork_server.is_outdated():
            self.fork_server.close()
            self.fork_server = None
        if self.fork_server is None and is_useful(self.jobs):
            self.fork_server = ForkServer(os.environ | common_environment({}))
        if self.fork_server is None:
            return None
        return self.fork_server.fork(job_file, errors, self.lock_file, control.keep_waiting)

    def _start_afresh(self, job_file: Path, errors: IO[bytes], place: str | None) -> subprocess.Popen[str]:
        gpus = {"CUDA_VISIBLE_DEVICES": str(place), machine.AT_ONCE_VARIABLE: str(len(self.places))}
        return start_process(job_file, errors, gpus if place is not None else {}, (self.lock_file.fileno(),))


def start_process(
    job_file: Path, errors: IO[bytes], environment: dict[str, str], keep: tuple[int, ...] = ()
) -> subprocess.Popen[str]:
    """Start the process of a job, which ends with this one.

    Args:
        job_file: The job, as Runner.write_job writes it.
        errors: The standard error of the process.
        environment: Variables beside those of this process.
        keep: Open files that the process keeps open.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "telco_nb.engine.job", str(job_file), str(os.getpid())],
        cwd=ROOT,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # Ctrl-C in the terminal reaches only the runner, which stops its jobs
        pass_fds=keep,
    )


def follow(child: subprocess.Popen[str] | ForkedJob, place: Place, stops: Any) -> Iterator[Event]:
    """Yield the events of a job's process until it has ended, an empty one every POLL_SECONDS.

    Args:
        child: The process.
        place: Its job.
        stops: Called for the number of requests to stop so far.
    """
    kills, told = oom_kills(), {}
    events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
    threading.Thread(target=_read_events, args=(child.stdout, events), daemon=True).start()
    stopping = _stop_child(child)
    while True:
        try:
            event = events.get(timeout=POLL_SECONDS)
        except queue.Empty:
            event = {}
        if event is None:
            break
        told |= event
        yield event
        if count := stops():
            stopping.send(count)
    child.wait()
    failure = told["end"] if "end" in told else asdict(_record_death(child, place, told, kills, bool(stops())))
    yield {"exit_code": child.returncode, "failure": failure}


def _read_events(stream: IO[str], events: queue.SimpleQueue[Event | None]) -> None:
    for line in stream:
        with contextlib.suppress(json.JSONDecodeError):
            events.put(json.loads(line))
    events.put(None)


def remove_traces(told: Event) -> None:
    """Kill the kernel that a dead process has left, and remove its temporary folder; `told` are its events."""
    if "kernel_pid" in told:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(told["kernel_pid"], signal.SIGKILL)
    if "runtime" in told:
        shutil.rmtree(told["runtime"], ignore_errors=True)


def _record_death(
    child: subprocess.Popen[str] | ForkedJob, place: Place, told: Event, kills_before: int, is_stopped: bool
) -> Failure:
    """Write the failed record of a process that died before it could."""
    remove_traces(told)
    exception = archive.last_exception(archive.running_log(*place))
    how = death_reason(child.returncode, oom_kills() > kills_before, exception=exception)
    failure = Failure("died" if "cell" in told else "not started", f"the process that runs the notebook: {how}")
    if is_stopped:
        failure = Failure("interrupted", "did not stop in time and was killed")
    with contextlib.suppress(OSError):  # a full disk: the summary has the reason
        archive.keep_failed(*place, failure)
    return failure


def _stop_child(child: subprocess.Popen[str] | ForkedJob) -> Generator[None, int, None]:
    """Interrupt, then terminate, then kill a process; `send` the number of stop requests so far to go on."""
    steps = _stop_steps(child.pid)
    next(steps)
    return steps


def _stop_steps(pid: int) -> Generator[None, int, None]:
    stops = yield
    for number, seconds in ((signal.SIGINT, INTERRUPT_SECONDS), (signal.SIGTERM, TERMINATE_SECONDS)):
        signal_group(pid, number)
        stops_before, deadline = stops, time.monotonic() + seconds
        while time.monotonic() < deadline and stops == stops_before:
            stops = yield
    while True:
        signal_group(pid, signal.SIGKILL)
        yield


def signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
