"""What is to be run, and why: the choice of the command line, then a decision with a reason for every job."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from telco_nb.engine.progress import State, plan_table, remaining_text
from telco_nb.study import params, record
from telco_nb.study.content_key import content_key, describe_difference, is_current
from telco_nb.study.plan import Job

OVERHEAD_SECONDS = 1.0  # of a forked process and kernel, which no manifest counts; fresh ones take seconds more


class UsageError(ValueError):
    """What was asked for cannot be meant; the message says what can. Exit code 2."""


# ---------------------------------------------------------------- what to run


def choose_configs(text: str, study: params.StudyParams) -> list[str]:
    """`c01,c05` or `c0*`: names may be any known configuration, patterns choose among those of the profile."""
    chosen = set()
    for word in _comma_separated(text):
        found = [word] if word in study.lora else fnmatch.filter(study.configs, word)
        if not found:
            raise UsageError(f"--configs {word}: no such configuration. Known: {', '.join(study.lora)}.")
        chosen |= {*found}
    if not chosen:
        raise UsageError("--configs: name at least one configuration.")
    return [config for config in study.lora if config in chosen]


def choose_steps(jobs: list[Job], text: str | None) -> list[Job]:
    """`03-06`, `03,04`, `3`, `03_train`: the jobs of those steps."""
    if text is None:
        return jobs
    names = sorted({job.step for job in jobs})
    chosen: set[str] = set()
    for word in _comma_separated(text):
        first, dash, last = word.partition("-")
        ends = [_step_index(names, first), _step_index(names, last if dash else first)]
        if ends[0] > ends[1]:
            raise UsageError(f"--steps {word}: the first step comes after the last.")
        chosen |= {*names[ends[0] : ends[1] + 1]}
    if not chosen:
        raise UsageError("--steps: name at least one step.")
    return [job for job in jobs if job.step in chosen]


def _step_index(names: list[str], word: str) -> int:
    for index, name in enumerate(names):
        number = name.split("_")[0]
        if word in (name, number, number.lstrip("0")):
            return index
    raise UsageError(f"--steps {word}: no such step. Known: {', '.join(names)}.")


def choose_forced(jobs: list[Job], words: tuple[str, ...]) -> set[str]:
    """Ids of the jobs that --force names: a step (`03`, `03_train`) or scope/step (`c03/03`, `c*/04_energy`)."""
    forced: set[str] = set()
    names = sorted({job.step for job in jobs})
    for word in words:
        scope, slash, step = word.rpartition("/")
        name = names[_step_index(names, step)]
        found = {j.id for j in jobs if j.step == name and fnmatch.fnmatch(j.scope, scope if slash else "*")}
        if not found:
            raise UsageError(f"--force {word}: no such step in this run. It has {', '.join(j.id for j in jobs)}.")
        forced |= found
    return forced


def _comma_separated(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


# ---------------------------------------------------------------- the plan


def plan_states(chosen: list[Job], root: Path, forced: set[str]) -> list[State]:
    """Decide for every chosen job: run, skip, or maybe (if what runs before it changes its inputs).

    Raises UsageError if an input comes from a job that is not chosen and has never finished.
    """
    states: dict[str, State] = {}
    ids = {job.id for job in chosen}
    for job in chosen:
        missing = [d for d in job.depends if d not in ids and record.read_manifest(root, *d.split("/")) is None]
        if missing:
            first = missing[0].split("/")[1]
            raise UsageError(
                f"{job.id} reads from {', '.join(missing)}, which has never finished and is not among the chosen "
                f"steps. Choose it too, for example --steps {first[:2]}-{chosen[-1].step[:2]}."
            )
        states[job.id] = _decide(job, root, forced, [states[d] for d in job.depends if d in states])
    estimate_durations(states.values(), root)
    return list(states.values())


def _decide(job: Job, root: Path, forced: set[str], before: list[State]) -> State:
    if job.id in forced:
        return State(job, "run", "forced")
    current, reason = is_current(job, root)
    if not current:
        return State(job, "run", reason)
    if any(state.decision != "skip" for state in before):
        return State(job, "maybe", "only if its inputs change")
    return State(job, "skip", reason)


def estimate_durations(states: Collection[State], root: Path) -> None:
    """Set `expected_seconds`: the job's own last time, else the mean of its step's, both per epoch where it has any."""
    rates: dict[str, list[float]] = {}
    own: dict[str, float] = {}
    for state in states:
        manifest = record.read_manifest(root, state.job.scope, state.job.step)
        if manifest:
            own[state.job.id] = manifest["seconds"] / (manifest["parameters"].get("epochs") or 1)
            rates.setdefault(state.job.step, []).append(own[state.job.id])
    for state in states:
        known = rates.get(state.job.step)
        if known and not state.ended:
            rate = own.get(state.job.id, sum(known) / len(known))
            state.expected_seconds = OVERHEAD_SECONDS + rate * (state.job.parameters.get("epochs") or 1)


def show_plan(console: Console, root: Path, states: list[State], explain: bool) -> None:
    """Print what will be done and why; with `explain`, all that decides about each job."""
    todo = [s for s in states if s.decision == "run"]
    maybe = [s for s in states if s.decision == "maybe"]
    more = f" and perhaps {len(maybe)} more" if maybe else ""
    summary = f"{len(todo)} of {len(states)} steps to run{more}; time: {remaining_text(states)}."
    console.print(f"{summary} Results: {root}", markup=False, soft_wrap=True)
    console.print(plan_table(states))
    if explain:
        for state in states:
            console.print("\n".join(explanation(state, root)), markup=False, soft_wrap=True)


def explanation(state: State, root: Path) -> list[str]:
    """Every difference between a job's record and now, and what its content key is made of."""
    key, parts = content_key(state.job, root)
    manifest = record.read_manifest(root, state.job.scope, state.job.step)
    lines = [
        f"{state.job.id}: {state.decision} ({state.reason})",
        f"  content key {key or 'unknown until its inputs exist'}",
    ]
    if manifest and key and manifest["key"] != key:
        changes = describe_difference(manifest["key_parts"], parts, limit=10_000)
        lines.append(f"  changed: {changes}")
    lines.append(f"  parameters: {', '.join(f'{k}={v!r}' for k, v in parts['parameters'].items())}")
    for part in ("inputs", "modules"):
        lines += [f"  {part}: {name} {value[:12]}" for name, value in parts[part].items()]
    return lines
