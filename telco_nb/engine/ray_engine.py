"""Runs jobs on a Ray cluster: one task a notebook, with whole GPUs or a node's processor, again where one was lost.

All state is on the outputs folder that the nodes share (see `shared_folder`). Ray carries jobs to nodes (`ray_node`)
and events back. It is imported only by a run that asks for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from telco_nb.engine import archive, shared_folder
from telco_nb.engine.archive import Failure
from telco_nb.engine.local_engine import Control, Event
from telco_nb.engine.ray_node import PROCESSOR, check_node, run_on_node
from telco_nb.engine.schedule import UnfitError, UsageError
from telco_nb.hosted import egress
from telco_nb.hosted.hosts import Address
from telco_nb.study import record
from telco_nb.study.machine import device_facts
from telco_nb.study.plan import Job

POLL_SECONDS = 0.5
JOIN_SECONDS = float(os.environ.get("TELCO_NB_JOIN_SECONDS", "120"))  # for nodes to join a cluster that starts
NO_USAGE_REPORT = {  # the head of a cluster reports even that reports are off; so the address is none
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_USAGE_STATS_REPORT_URL": "http://127.0.0.1:9/",
}  # fmt: skip
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
OBJECT_STORE_BYTES = 80 * 2**20  # the least; jobs and events are small, and all results are files
MOST_LOSSES = 3  # of one job, before it fails
INSTALL = "pip install --no-deps -r requirements-ray.txt"
# Variables that a job takes along: what may be sent where was agreed to at the driver, for all nodes.
FROM_DRIVER = (egress.NO_EGRESS, egress.AGREED, "HF_HUB_OFFLINE", "OMP_NUM_THREADS")


def require_ray() -> None:
    """Raise UnfitError if Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UnfitError(f"--engine ray needs the package ray, which is not installed. Run: {INSTALL}")


def require_allowed_cluster(address: str | None) -> None:
    """Returns if jobs may go to the cluster at an address. Raises EgressRefused if --no-egress forbids that.

    The address `auto` names no host; `RayEngine` looks at the nodes that it has joined.
    """
    if address in (None, "auto", "local"):
        return
    try:
        host = urlsplit(address if "//" in address else f"//{address}").hostname
    except ValueError:
        host = None
    if not host:
        raise UsageError(f"--address {address!r:.80} names no host. Write it as host:port.")
    egress.require_allowed(Address("ray", host, None, ""), "--address")


class RayEngine:
    """Runs jobs on the cluster at `address`, or on one of this machine alone, which ends with the run."""

    first_status = "queued"

    def __init__(self, jobs: Sequence[Job], root: Path, address: str | None, say: Callable[[str], None]):
        if not address:
            _stay_on_this_machine()
        os.environ |= NO_USAGE_REPORT
        import ray  # ty: ignore[import-not-found]

        self.ray, self.root = ray, root
        self.folder = None if address else _short_folder()
        try:
            self._join(address) if address else self._start_here()
            self.demands = {job.id: demand(job, self._most("GPU")) for job in jobs}
            self._wait_for_nodes()
            for node in self._nodes():
                require_allowed_cluster(node["NodeManagerAddress"])
            self._check_nodes(jobs if address else [])  # the runner has checked this machine
            # No more than the cluster can run at once: so jobs start in the order of the plan.
            self.places = [None] * max(1, int(self._total("GPU") + self._total(PROCESSOR)))
            gpus = [int(node["Resources"].get("GPU", 0)) for node in self._nodes()]
            self.at_once = at_once(jobs, gpus, int(self._total(PROCESSOR)))
            say(self._description(address))
        except BaseException:
            self.close()
            raise

    def _join(self, address: str) -> None:
        try:
            self.ray.init(address=address, **QUIET)
        except Exception as error:  # Ray raises many kinds, also plain ones
            raise UnfitError(f"the Ray cluster at {address} cannot be joined: {archive.describe(error)}") from None

    def _start_here(self) -> None:
        """Start a cluster of this machine, again if need be: Ray's helpers have 15 s, and a busy machine is slower."""
        small = {"_temp_dir": self.folder, "object_store_memory": OBJECT_STORE_BYTES, "include_dashboard": False}
        for tries_left in (2, 1, 0):
            try:
                self.ray.init(resources={PROCESSOR: 1}, **small, **QUIET)
                break
            except Exception as error:
                self.ray.shutdown()
                for helper in psutil.Process().children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        helper.kill()
                if not tries_left:
                    raise UnfitError(f"Ray does not start here: {archive.describe(error)}") from None
        if found := listening_beyond_loopback():
            raise UnfitError(f"Ray listens beyond this machine, on {', '.join(found)}; nothing was started.")

    def _nodes(self) -> list[dict[str, Any]]:
        return [node for node in self.ray.nodes() if node["Alive"]]

    def _most(self, resource: str) -> float:
        return max((node["Resources"].get(resource, 0) for node in self._nodes()), default=0)

    def _total(self, resource: str) -> float:
        return sum(node["Resources"].get(resource, 0) for node in self._nodes())

    def _wait_for_nodes(self) -> None:
        """Wait until some node can run each job. Raises UnfitError with the fix if none joins in JOIN_SECONDS."""
        deadline = time.monotonic() + JOIN_SECONDS
        while missing := self._missing():
            if time.monotonic() > deadline:
                raise UnfitError("\n".join(["this cluster cannot run the study.", *missing]))
            time.sleep(POLL_SECONDS)

    def _missing(self) -> list[str]:
        gpus = max((needed["num_gpus"] for needed in self.demands.values()), default=0)
        missing = []
        if gpus > self._most("GPU"):
            missing.append(f"No node has {gpus} GPUs, which `processes` and `device` of the profile ask for.")
        if any(needed["resources"] for needed in self.demands.values()) and not self._total(PROCESSOR):
            fix = f"""ray start ... --resources='{{"{PROCESSOR}": 1}}'"""
            missing.append(f"No node offers the resource {PROCESSOR}, for jobs without a GPU. Start nodes with: {fix}")
        return missing

    def _check_nodes(self, jobs: Sequence[Job]) -> None:
        """Let every node look at the shared folder and at itself. Raises UnfitError with all problems."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # ty: ignore[import-not-found]

        with shared_folder.probe(self.root) as probe:
            asked = {}
            for node in self._nodes():
                fits = [job for job in jobs if self.demands[job.id]["num_gpus"] <= node["Resources"].get("GPU", 0)]
                place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = self.ray.remote(check_node).options(num_cpus=0, max_retries=0, scheduling_strategy=place)
                asked[task.remote(probe, fits)] = node["NodeManagerAddress"]
            problems = [f"{name}: {text}" for ref, name in asked.items() for text in self._answer(ref)]
        if problems:
            raise UnfitError("\n".join(["the nodes of this cluster cannot run the study yet.", *problems]))

    def _answer(self, ref: Any) -> list[str]:
        try:
            return self.ray.get(ref, timeout=JOIN_SECONDS)
        except self.ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None) or error
            return [
                f"{archive.describe(cause)}. Every node needs this project and its environment, at the same commit."
            ]

    def _description(self, address: str | None) -> str:
        where = f"at {address}" if address else "on this machine alone, listening on loopback only"
        nodes, gpus, processors = len(self._nodes()), int(self._total("GPU")), int(self._total(PROCESSOR))
        return f"Ray cluster {where}. Nodes: {nodes}; GPUs: {gpus}; jobs at once without a GPU: {processors}."

    def start(self, job: Job, job_file: Path, place: Any, control: Control) -> Iterator[Event]:
        return self._run(job, job_file, control)

    def _run(self, job: Job, job_file: Path, control: Control) -> Iterator[Event]:
        """The events of a job, which starts again where it was lost."""
        key = json.loads(job_file.read_text(encoding="utf-8"))["key"]
        loss = ""
        for _ in range(MOST_LOSSES):
            record.prepare_work_dir(job, self.root, key)
            archive.running_log(self.root, job.scope, job.step).unlink(missing_ok=True)  # without it, it is queued
            claim = shared_folder.Claim(self.root, job.scope, job.step)
            try:
                loss = yield from self._attempt(job, job_file, claim, control)
            finally:
                claim.give_up()  # what may still run somewhere stops
            if not loss:
                return
            yield {"lost": loss}
            time.sleep(shared_folder.FENCE_SECONDS)
        failure = Failure("died", f"lost {MOST_LOSSES} times, the last time as {loss}")
        with contextlib.suppress(OSError):
            archive.keep_failed(self.root, job.scope, job.step, failure)
        yield {"exit_code": None, "failure": asdict(failure)}

    def _attempt(
        self, job: Job, job_file: Path, claim: shared_folder.Claim, control: Control
    ) -> Generator[Event, None, str]:
        """Yield the events of one task; returns why it was lost, or an empty text if it ended."""
        stream, started = self._submit(job, job_file, claim), False
        while True:
            if control.stops > claim.stops:
                claim.tell(control.stops)
            if not self.ray.wait([stream], timeout=POLL_SECONDS)[0]:
                yield {}
                if not started and not control.keep_waiting():
                    self.ray.cancel(stream)
                    yield {"withdrawn": True}
                    return ""
                continue
            try:
                event = self.ray.get(next(stream))
            except (self.ray.exceptions.RayError, StopIteration) as error:
                is_fault = isinstance(
                    error, self.ray.exceptions.RayTaskError
                )  # of the task itself: it would come again
                if not control.stops and not is_fault:
                    return loss_reason(error)
                failure = Failure("interrupted" if control.stops else "not started", loss_reason(error))
                event = {"exit_code": None, "failure": asdict(failure)}
            started = True
            yield event
            if "exit_code" in event:
                return ""

    def _submit(self, job: Job, job_file: Path, claim: shared_folder.Claim) -> Any:
        environment = {name: os.environ[name] for name in FROM_DRIVER if name in os.environ}
        settings = {"num_cpus": 0, "max_retries": 0, "num_returns": "streaming", "name": job.id}
        task = self.ray.remote(run_on_node).options(**settings, **self.demands[job.id])
        return task.remote(str(job_file), claim.token, environment)

    def close(self) -> None:
        self.ray.shutdown()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


def demand(job: Job, most_gpus: float) -> dict[str, Any]:
    """What a task needs of its node: whole GPUs, or one of the node's processors. `most_gpus` are those of any node."""
    device = job.parameters.get("device", "cpu")
    if device == "cuda" or (device == "auto" and most_gpus):
        return {"num_gpus": job.parameters.get("processes", 1), "resources": {}}
    return {"num_gpus": 0, "resources": {PROCESSOR: 1}}


def resources_here() -> tuple[list[int], int]:
    """What a cluster of this machine has for jobs: the GPUs of its one node, and processors."""
    facts = device_facts()
    visible = facts["visible_gpus"]
    named = [] if visible is None else [number for number in visible.split(",") if number not in ("", "-1")]
    return [len(facts["gpus"]) if visible is None else len(named)], 1


def at_once(jobs: Sequence[Job], gpus: Sequence[int], processors: int) -> dict[str, int]:
    """How many jobs of each step a cluster runs at once: as many as have whole GPUs of one node, or a processor.

    `gpus` are those of each node.
    """
    needed = {job.step: demand(job, max(gpus, default=0))["num_gpus"] for job in jobs}
    return {step: max(1, sum(own // n for own in gpus) if n else processors) for step, n in needed.items()}


def loss_reason(error: Exception) -> str:
    """Why a task gave no result, from what Ray raises, in a line."""
    cause = getattr(error, "cause", None) or error
    return archive.describe(cause).partition(". ")[0].rstrip(".")


def _short_folder() -> str:
    """A private folder for Ray's sockets, whose paths add 66 characters and may have 104."""
    place = tempfile.gettempdir() if len(tempfile.gettempdir()) < 24 else "/tmp"
    return tempfile.mkdtemp(prefix="tnb-ray-", dir=place)


def _stay_on_this_machine() -> None:
    """Set what Ray reads when it is imported, for a cluster that nobody else can see or reach."""
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for loopback addresses, on Linux, too
    os.environ |= {"RAY_memory_monitor_refresh_ms": "0"}  # a lack of memory ends the kernel alone, and is named
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # else it lies in the home folder


def listening_beyond_loopback() -> list[str]:
    """Addresses of this machine at which processes below this one listen for others."""
    found = set()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found |= {c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    loopback = ("127.", "::1", "::ffff:127.")
    return sorted(f"{address.ip}:{address.port}" for address in found if not address.ip.startswith(loopback))
