"""What a run will take, from what earlier runs of the same steps of this profile took on this machine.

Time, disk and energy come from manifests and metrics: what a job took last, else the median, and the range of what was
seen, with its number. What was never seen is said to be unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from telco_nb.engine.progress import UNREAD, Past, State, duration_text
from telco_nb.hosted import prices
from telco_nb.study import record
from telco_nb.study.input_files import InputFileError, read_json
from telco_nb.study.machine import device_facts
from telco_nb.study.manifest import whole_number
from telco_nb.study.plan import STEPS, Job

OVERHEAD_SECONDS = 1.0  # of a forked process and kernel, which manifests do not count; new ones take seconds more
SAME_MACHINE = ("cpu", "cores", "gpus")  # facts of the device that must be those of this machine
ENERGIES = ("train_energy_wh", "answer_energy_wh")
Range = tuple[float, float, float]  # least, middle, most


@dataclass(frozen=True)
class Expected:
    """What the jobs of one step are expected to take: (least, middle, most) by what was seen `n` times, or None."""

    step: str
    jobs: int
    n: int
    seconds: Range | None = None
    bytes: Range | None = None
    energy_wh: Range | None = None
    energy_kind: str | None = None


def look_back(root: Path, job: Job) -> Past:
    """What the last success of a job took, if it was on this machine."""
    manifest, here = record.finished(root, job.scope, job.step), device_facts()
    if manifest is None or any((manifest["device"].get(fact) or None) != (here[fact] or None) for fact in SAME_MACHINE):
        return Past()  # older records name no cards where there are none
    size = sum(output["bytes"] for output in manifest["outputs"])
    epochs = whole_number(manifest["parameters"].get("epochs"))
    return Past(manifest["seconds"] / epochs, size, epochs)


def estimate_durations(states: Collection[State], root: Path) -> None:
    """Set `expected_seconds` from the last time of the job here, else from the median of its step, both per epoch.

    Records are read once; afterwards the jobs that this run has done add their times.
    """
    seen: dict[str, list[float]] = {}
    for state in states:
        if state.past is UNREAD:
            state.past = look_back(root, state.job)
        if state.status == "done" and not state.is_counted and state.seconds is not None:
            rate, state.is_counted = max(state.seconds - OVERHEAD_SECONDS, 0.0) / _epochs(state), True
            state.past = Past(rate, state.past.bytes, _epochs(state))
        if state.past.rate is not None:
            seen.setdefault(state.job.step, []).append(state.past.rate)
    rates = {step: median(values) for step, values in seen.items()}
    for state in states:
        if state.status in ("waiting", "queued", "running") and state.job.step in rates:
            rate = rates[state.job.step] if state.past.rate is None else state.past.rate
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
    seen = [state for state in states if state.past.rate is not None]
    rates = _range({s.job.id: s.past.rate or 0.0 for s in seen}, todo, per_epoch=True)
    if rates is None:
        return Expected(step, len(todo), 0)
    overhead = OVERHEAD_SECONDS * len(todo)
    seconds = rates[0] + overhead, rates[1] + overhead, rates[2] + overhead
    sizes = _range({s.job.id: s.past.bytes for s in seen}, todo)
    found = {s.job.id: energy for s in seen if (energy := _energy(root, s.job))}
    kinds = {kind for _, kind in found.values()}
    if len(kinds) != 1:  # none is known, or kinds that do not add up
        return Expected(step, len(todo), len(seen), seconds, sizes)
    energy_wh = _range({s.job.id: found[s.job.id][0] / s.past.epochs for s in seen if s.job.id in found}, todo, True)
    return Expected(step, len(todo), len(seen), seconds, sizes, energy_wh, kinds.pop())


def _range(known: Mapping[str, float], todo: Sequence[State], per_epoch: bool = False) -> Range | None:
    """The sum over jobs: each as its own last time, else as the median of all; at the ends as the extremes of all."""
    if not known:
        return None
    middle, units = median(known.values()), [_epochs(state) if per_epoch else 1 for state in todo]
    own = [known.get(state.job.id, middle) * unit for state, unit in zip(todo, units, strict=True)]
    return min(known.values()) * sum(units), sum(own), max(known.values()) * sum(units)


def _energy(root: Path, job: Job) -> tuple[float, str] | None:
    """(Wh, kind) of a finished job's training or answers; None where it has none or it is not known."""
    try:
        metrics = read_json(record.step_dir(root, job.scope, job.step) / "metrics.json")
        known = [float(metrics[name]) for name in ENERGIES if metrics.get(name) is not None]
        return (known[0], str(metrics.get("energy_kind"))) if known else None
    except (InputFileError, AttributeError, TypeError, ValueError):
        return None


def show_forecast(
    console: Console, root: Path, jobs: Sequence[Job], states: Sequence[State], estimates: Sequence[prices.Estimate]
) -> list[Expected]:
    """Print and return what the jobs to run are expected to take, with the money for energy and for hosted models.

    Args:
        console: where to print.
        root: the study's folder.
        jobs: all jobs of the study, one of which knows the price of a kWh.
        states: the planned jobs.
        estimates: of the jobs that call a hosted model (`schedule.show_price`).
    """
    rows = expected(states, root)
    if not rows:
        return rows
    total = _total(rows)
    if total.n:
        console.print(
            "Expected: each step as it last was on this machine, else the median (all as the least or as the most)."
        )
        console.print(_table([*rows, total]))
    else:
        console.print("Time, disk and energy are not known: none of these steps has finished on this machine.")
    usd_per_kwh = next((j.parameters["usd_per_kwh"] for j in jobs if "usd_per_kwh" in j.parameters), None)
    for text in _money(total, usd_per_kwh, estimates):
        console.print(text, markup=False, soft_wrap=True)
    return rows


def show_at_once(console: Console, rows: Sequence[Expected], places: Mapping[str, int] | None) -> None:
    """Print what several places make of the time of the table, which counts one job after another.

    Args:
        console: where to print.
        rows: from `show_forecast`.
        places: how many jobs of each step run at once; None: not known yet.
    """
    n = max((min(row.jobs, (places or {}).get(row.step, 1)) for row in rows), default=1)
    if places is None and rows:
        console.print("This is the time of one job after another. The cluster says how many it runs at once.")
    elif n > 1 and (seconds := at_once(rows, places or {})):
        more = "" if all(row.n for row in rows) else "more than "
        text = f"With up to {n} jobs at once, step by step: {more}{_text(seconds, duration_text)}."
        console.print(text, markup=False, soft_wrap=True)


def at_once(rows: Sequence[Expected], places: Mapping[str, int]) -> Range | None:
    """Seconds of steps one after another, where `places` jobs of a step run at once, in rounds of equal length."""
    rounds = {row.step: math.ceil(row.jobs / places.get(row.step, 1)) for row in rows}
    known = [(row.seconds, rounds[row.step] / row.jobs) for row in rows if row.seconds]
    return _sums([(least * share, middle * share, most * share) for (least, middle, most), share in known])


def _total(rows: Sequence[Expected]) -> Expected:
    """The sums of what is known; energies of different kinds have none."""
    sums = {name: _sums([getattr(row, name) for row in rows]) for name in ("seconds", "bytes", "energy_wh")}
    kinds = {row.energy_kind for row in rows if row.energy_kind}
    if len(kinds) != 1:
        sums["energy_wh"] = None
    jobs, n = sum(row.jobs for row in rows), sum(row.n for row in rows)
    return Expected("in all", jobs, n, **sums, energy_kind=kinds.pop() if len(kinds) == 1 else None)


def _sums(ranges: Sequence[Range | None]) -> Range | None:
    known = [values for values in ranges if values]
    least, middle, most = (sum(ends) for ends in zip(*known, strict=True)) if known else (0.0, 0.0, 0.0)
    return (least, middle, most) if known else None


def _table(rows: Sequence[Expected]) -> Table:
    """A row per step; the last one is their sum, which says where a part of it is not known."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("step", "to run", "seen", "time", "disk, MB", "energy, Wh"):
        table.add_column(name, no_wrap=name == "step")
    for row in rows:
        more = "> " if row is rows[-1] and not all(other.n for other in rows) else ""
        time, size = _text(row.seconds, duration_text), _text(row.bytes, lambda size: f"{size / 1e6:,.1f}")
        energy = f"{_text(row.energy_wh, lambda wh: f'{wh:.3g}')} {row.energy_kind}" if row.energy_wh else "-"
        table.add_row(row.step, str(row.jobs), str(row.n), more + time, more + size, energy)
    return table


def _text(values: Range | None, form: Callable[[float], str]) -> str:
    if values is None:
        return "not known"
    least, middle, most = map(form, values)
    return middle if least == most else f"{middle} ({least} to {most})"


def _money(total: Expected, usd_per_kwh: float | None, estimates: Sequence[prices.Estimate]) -> Iterator[str]:
    """What the energy and the hosted models will cost, where it is known."""
    if total.energy_wh and usd_per_kwh is not None:
        usd = _text(total.energy_wh, lambda wh: f"{wh / 1000 * usd_per_kwh:.2g}")
        yield f"Energy: {usd} USD at {usd_per_kwh:g} USD a kWh."
    if estimates and all(estimate.usd_mid is not None for estimate in estimates):
        usd = [(estimate.usd_low or 0.0, estimate.usd_mid or 0.0, estimate.usd_high or 0.0) for estimate in estimates]
        yield f"Hosted models: {_text(_sums(usd), lambda value: f'{value:,.2f}')} USD."
    elif estimates:
        yield "Hosted models: no price is known for some of them."
