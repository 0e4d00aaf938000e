"""What a run will take, from what earlier runs of the same steps of this profile took on this machine.

Time, disk and energy come from manifests and metrics: the median and the range of what was seen, with its number. What
was never seen is said to be unknown.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from telco_nb.engine.progress import Past, State, duration_text
from telco_nb.hosted import prices
from telco_nb.study import record
from telco_nb.study.input_files import InputFileError, read_json
from telco_nb.study.machine import device_facts
from telco_nb.study.manifest import whole_number
from telco_nb.study.plan import STEPS, Job

OVERHEAD_SECONDS = 1.0  # of a forked process and kernel, which manifests do not count; new ones take seconds more
SAME_MACHINE = ("cpu", "cores", "gpus")  # facts of the device that must be those of this machine
ENERGIES = ("train_energy_wh", "answer_energy_wh")


@dataclass(frozen=True)
class Expected:
    """What the jobs of one step are expected to take: (least, median, most) by what was seen `n` times, or None."""

    step: str
    jobs: int
    n: int
    seconds: tuple[float, float, float] | None = None
    bytes: tuple[float, float, float] | None = None
    energy_wh: tuple[float, float, float] | None = None
    energy_kind: str | None = None


def look_back(root: Path, job: Job) -> Past:
    """What the last success of a job took, if it was on this machine."""
    manifest, here = record.finished(root, job.scope, job.step), device_facts()
    if manifest is None or any(manifest["device"].get(fact) != here[fact] for fact in SAME_MACHINE):
        return Past()
    size = sum(output["bytes"] for output in manifest["outputs"])
    return Past(manifest["seconds"], size, whole_number(manifest["parameters"].get("epochs")))


def estimate_durations(states: Collection[State], root: Path) -> None:
    """Set `expected_seconds` from the last time of the job here, else from the median of its step, both per epoch.

    Records are read once; afterwards the jobs that this run has done add their times.
    """
    seen: dict[str, list[float]] = {}
    for state in states:
        if state.past is None:
            state.past = look_back(root, state.job)
        if state.status == "done" and state.seconds is not None:
            seconds, epochs = max(state.seconds - OVERHEAD_SECONDS, 0.0), _epochs(state)
            state.past = Past(seconds, state.past.bytes, epochs)
        if state.past.seconds is not None:
            seen.setdefault(state.job.step, []).append(state.past.seconds / state.past.epochs)
    rates = {step: median(values) for step, values in seen.items()}
    for state in states:
        if state.job.step in rates and not state.ended:
            own = state.past and state.past.seconds
            rate = own / state.past.epochs if own is not None else rates[state.job.step]
            state.expected_seconds = OVERHEAD_SECONDS + rate * _epochs(state)


def _epochs(state: State) -> int:
    return whole_number(state.job.parameters.get("epochs"))


def expected(states: Sequence[State], root: Path) -> list[Expected]:
    """What each step that has jobs to run is expected to take; jobs that run only perhaps count."""
    todo = [state for state in states if state.decision != "skip"]
    steps = [step for step in STEPS if any(state.job.step == step for state in todo)]
    return [
        _of_step(step, [s for s in todo if s.job.step == step], [s for s in states if s.job.step == step], root)
        for step in steps
    ]


def _of_step(step: str, todo: list[State], states: list[State], root: Path) -> Expected:
    seen = [state for state in states if state.past and state.past.seconds is not None]
    if not seen:
        return Expected(step, len(todo), 0)
    epochs = sum(map(_epochs, todo))
    rates = [state.past.seconds / state.past.epochs for state in seen]
    least, most = (OVERHEAD_SECONDS * len(todo) + end(rates) * epochs for end in (min, max))
    seconds = (least, sum(state.expected_seconds or 0.0 for state in todo), most)
    sizes = _scaled([state.past.bytes for state in seen], len(todo))
    energies = [(wh / state.past.epochs, kind) for state in seen for wh, kind in _energy(root, state.job)]
    kinds = {kind for _, kind in energies}
    if len(kinds) != 1:  # none is known, or kinds that do not add up
        return Expected(step, len(todo), len(seen), seconds, sizes)
    return Expected(
        step, len(todo), len(seen), seconds, sizes, _scaled([wh for wh, _ in energies], epochs), kinds.pop()
    )


def _scaled(values: list[float], times: int) -> tuple[float, float, float]:
    return min(values) * times, median(values) * times, max(values) * times


def _energy(root: Path, job: Job) -> list[tuple[float, str]]:
    """(Wh, kind) of a finished job's training or answers; empty where it has none or it is not known."""
    try:
        metrics = read_json(record.step_dir(root, job.scope, job.step) / "metrics.json")
        found = [metrics.get(name) for name in ENERGIES]
        return [(float(wh), str(metrics.get("energy_kind"))) for wh in found if wh is not None]
    except (InputFileError, AttributeError, TypeError, ValueError):
        return []
