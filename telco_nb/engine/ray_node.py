"""What runs on a node of a Ray cluster: the check of the node, and the task that runs a job there."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from telco_nb.engine import archive, machine_checks, shared_folder
from telco_nb.engine.archive import Failure
from telco_nb.engine.local_engine import Event, follow, remove_traces, signal_group, start_process
from telco_nb.study import machine
from telco_nb.study.content_key import content_key, describe_difference
from telco_nb.study.plan import Job

PROCESSOR = "processor"  # custom resource of a node: how many jobs without a GPU it runs at once


def check_node(probe: dict[str, Any], jobs: Sequence[Job]) -> list[str]:
    """Problems of this node: the shared folder; packages, disk, model and GPUs for the jobs that it may run."""
    if any(job.parameters.get("device") in ("auto", "cuda") for job in jobs):
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides the GPUs from a task that owns none
    problems = shared_folder.find_problems(probe)
    return problems or machine_checks.find_problems(jobs, Path(probe["root"]))


def run_on_node(job_file: str, token: str, environment: dict[str, str]) -> Iterator[Event]:
    """Run a job in a process of this node and yield its events; stop when the job is no longer this task's."""
    import ray  # ty: ignore[import-not-found]

    here = ray.get_runtime_context().get_node_id()
    (facts,) = [node for node in ray.nodes() if node["NodeID"] == here]
    node, gpus = node_name(facts), sorted(map(str, ray.get_gpu_ids()), key=lambda number: (len(number), number))
    yield {"node": f"{node}, GPU {', '.join(gpus)}" if gpus else node}
    values = json.loads(Path(job_file).read_text(encoding="utf-8"))
    if difference := difference_here(values):
        reason = f"{node} would compute something else than the driver: {difference}. Install the same there."
        yield {"exit_code": None, "failure": asdict(Failure("not started", reason))}
        return
    place = Path(values["root"]), values["scope"], values["step"]
    own = {"CUDA_VISIBLE_DEVICES": ",".join(gpus), machine.NODE_VARIABLE: node}
    own |= {machine.AT_ONCE_VARIABLE: str(jobs_at_once(facts, len(gpus)))}
    os.environ.pop("OMP_NUM_THREADS", None)  # Ray's is 1: other sums than on all cores, and slow; the driver's counts
    with archive.running_log(*place).open("wb") as errors:
        child = start_process(Path(job_file), errors, environment | own)
    told: Event = {}
    try:
        for event in follow(child, place, shared_folder.Orders(*place, token)):
            told |= event
            if event:
                yield event
    finally:
        if child.poll() is None:
            signal_group(child.pid, signal.SIGKILL)
            remove_traces(told)


def node_name(facts: dict[str, Any]) -> str:
    """The name that `ray start --node-name` gave a node, which is this one; else its host name."""
    return facts["NodeName"] if facts["NodeName"] != facts["NodeManagerAddress"] else socket.gethostname()


def jobs_at_once(facts: dict[str, Any], gpus: int) -> int:
    """How many jobs may share a node's processors: those with `gpus` GPUs each, and those without."""
    resources = facts["Resources"]
    return max(1, int(resources.get("GPU", 0) // max(1, gpus) + resources.get(PROCESSOR, 0)))


def difference_here(values: dict[str, Any]) -> str | None:
    """What would make this node compute something else than the driver planned, in words; None if nothing."""
    inputs = tuple(tuple(read) for read in values["inputs"])
    job = Job(values["step"], values["scope"], values["parameters"], inputs)
    key, parts = content_key(job, Path(values["root"]), Path(values["notebook"]).parent)
    return None if key == values["key"] else describe_difference(values["key_parts"], parts) or "an input is missing"
