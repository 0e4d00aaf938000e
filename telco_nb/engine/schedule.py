"""The options of a run, the jobs that they choose, and the plan: a decision with a reason for every job."""

from __future__ import annotations

import fnmatch
import os
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import typer
from rich.console import Console

from telco_nb.engine.progress import State, plan_table, remaining_text
from telco_nb.hosted import api, attempts, egress, lines, prices
from telco_nb.study import params, record
from telco_nb.study.content_key import content_key, describe_difference, is_current
from telco_nb.study.manifest import whole_number
from telco_nb.study.plan import Job, unused_parameters

MOST_PID = 2**22  # of Linux, as part of a temporary file's name
OVERHEAD_SECONDS = 1.0  # of a forked process and kernel, which manifests do not count; new ones take seconds more
HOSTED_STEPS = {"02_synth": "generator", "05_judge": "judge"}  # steps that can use a hosted model: parameter prefix

Estimator = Callable[..., tuple[prices.Estimate, str]]  # commands.estimate.estimate_job


class UsageError(ValueError):
    """The command line names something that does not exist; the message says what does. Exit code 2."""


class UnfitError(RuntimeError):
    """This machine, cluster or outputs folder cannot be used now; the message says what to do. Exit code 3."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    profile: str = "laptop"
    configs: str | None = None
    steps: str | None = None
    force: tuple[str, ...] = ()
    keep_going: bool = True
    dry_run: bool = False
    explain: bool = False
    timeout_minutes: float | None = None
    json_file: Path | None = None
    outputs: Path | None = None
    params_dir: Path = params.PARAMS_DIR
    max_usd: float | None = None
    yes: bool = False
    gpus: tuple[str, ...] = ()
    no_egress: bool = False
    notify: str | None = None
    engine: str = "local"
    address: str | None = None

    def command(self) -> str:
        """Return the command that continues this run. It forces nothing, because finished jobs are skipped."""
        values = {
            "--profile": self.profile,
            "--configs": self.configs,
            "--steps": self.steps,
            "--outputs": self.outputs,
            "--params": None if self.params_dir == params.PARAMS_DIR else self.params_dir,
            "--max-usd": None if self.max_usd is None else f"{self.max_usd:g}",
            "--gpus": ",".join(self.gpus) or None,
            "--notify": self.notify,
            "--engine": None if self.engine == "local" else self.engine,
            "--address": self.address,
        }
        words = [word for name, value in values.items() if value is not None for word in (name, str(value))]
        words += ["--no-egress"] if self.no_egress else []
        return shlex.join(["./run_all.py", *words])


def check_engine(options: Options) -> None:
    """Raise UsageError for options that do not go together with the engine."""
    if options.engine not in ("local", "ray"):
        raise UsageError(f"--engine {options.engine}: no such engine. Known: local, ray.")
    if options.address and options.engine != "ray":
        raise UsageError("--address names a Ray cluster: add --engine ray.")
    if options.gpus and options.engine == "ray":
        raise UsageError(
            "--gpus is for --engine local: Ray gives each job GPUs of its own, of all that it finds. Leave it out; to "
            "keep some GPUs back, start Ray with CUDA_VISIBLE_DEVICES."
        )


def finite(value: float | None) -> float | None:
    """Check an option of the command line that is a number: `nan` would pass every comparison with a limit."""
    if value is not None and not lines.is_amount(value):
        raise typer.BadParameter(f"{value} is not a finite number from 0 up")
    return value


def output_file(path: Path | None, option: str) -> Path | None:
    """The absolute path of a file to write; nothing is written yet.

    Args:
        path: the option's value.
        option: its name, such as --json.

    Raises:
        ParameterError, UsageError: no file can be there.
    """
    if path is None:
        return None
    file = params.given_path(path, option)
    folder = next(parent for parent in (*file.parents, file) if os.path.exists(parent))  # noqa: PTH110 - never raises
    try:
        fault = "" if folder.is_dir() else f"{folder} is no folder."
        if file.exists() and not file.is_file():  # a device such as /dev/null would be replaced
            fault = "this is a folder." if file.is_dir() else "this is no plain file."
        elif not fault:
            file.with_name(f".{file.name}.{MOST_PID}.tmp").exists()  # raises if a temporary file's name is too long
    except OSError as error:
        fault = f"{error.strerror}."
    if fault or not os.access(folder, os.W_OK):
        raise UsageError(f"{option} {file}: {fault or f'{folder} cannot be written to.'} Name a file.")
    return file


def load_study(options: Options) -> params.StudyParams:
    """Read the parameters of a study. Raises ParameterError for any fault in the parameter files or the notebooks."""
    study = params.load_study(options.profile, options.params_dir)
    if options.configs is not None:
        study = params.load_study(options.profile, options.params_dir, choose_configs(options.configs, study))
    unused = unused_parameters(study)
    if unused:
        raise params.ParameterError(
            f"{options.params_dir}: no notebook declares {', '.join(unused)}. Remove the key, or declare it in the "
            "parameters cell of the notebook that should use it."
        )
    return study


def choose_configs(text: str, study: params.StudyParams) -> list[str]:
    """Return the configurations of `c01,c05` or `c0*`: any known name, or a pattern within the profile."""
    chosen = set()
    for word in _comma_separated(text):
        matches = [word] if word in study.lora else fnmatch.filter(study.configs, word)
        if not matches:
            raise UsageError(f"--configs {word}: no such configuration. Known: {', '.join(study.lora)}.")
        chosen |= {*matches}
    if not chosen:
        raise UsageError("--configs: name at least one configuration.")
    return [config for config in study.lora if config in chosen]


def choose_steps(jobs: list[Job], text: str | None) -> list[Job]:
    """Return the jobs of the steps that `text` names: `03-06`, `03,04`, `3` or `03_train`."""
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
    """Return the ids of the jobs that --force names: a step (`03`, `03_train`) or scope/step (`c03/03`, `c*/04`)."""
    forced: set[str] = set()
    names = sorted({job.step for job in jobs})
    for word in words:
        scope, slash, step = word.rpartition("/")
        name = names[_step_index(names, step)]
        matches = {j.id for j in jobs if j.step == name and fnmatch.fnmatch(j.scope, scope if slash else "*")}
        if not matches:
            raise UsageError(f"--force {word}: no such step in this run. It has {', '.join(j.id for j in jobs)}.")
        forced |= matches
    return forced


def _comma_separated(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def plan_states(chosen: list[Job], root: Path, forced: set[str]) -> list[State]:
    """Decide for every chosen job: run, skip, or maybe (it runs if the jobs before it change its inputs).

    Raises UsageError if a job that is not chosen and has never finished makes an input.
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
    """Set `expected_seconds` from the last time of the job, else from the mean of its step, both per epoch."""
    rates: dict[str, list[float]] = {}
    own: dict[str, float] = {}
    for state in states:
        manifest = record.read_manifest(root, state.job.scope, state.job.step)
        if manifest:
            own[state.job.id] = manifest["seconds"] / whole_number(manifest["parameters"].get("epochs"))
            rates.setdefault(state.job.step, []).append(own[state.job.id])
    for state in states:
        known = rates.get(state.job.step)
        if known and not state.ended:
            rate = own.get(state.job.id, sum(known) / len(known))
            state.expected_seconds = OVERHEAD_SECONDS + rate * whole_number(state.job.parameters.get("epochs"))


def show_plan(console: Console, root: Path, states: list[State], explain: bool) -> None:
    """Print the decision for each job with its reason; with `explain`, also what it depends on."""
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
    """Return all differences between a job and its record, and the parts of its content key."""
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


def show_price(
    estimate_job: Estimator, console: Console, root: Path, jobs: list[Job], states: list[State]
) -> list[prices.Estimate]:
    """Print and return the estimates of all jobs that will call a hosted model, with the data that leave this machine.

    Args:
        estimate_job: Estimates the price of one job and names the data to send.
        console: Where to print.
        root: Outputs folder of the profile.
        jobs: All jobs of the study.
        states: The planned jobs.

    Raises:
        EgressRefused: A job would ask a remote host, and --no-egress forbids that.
        ParameterError: The parameters of a job, or a store, cannot be used.
    """
    chosen = [(state, source) for state in states if (source := hosted_model(state.job)) and state.decision != "skip"]
    for _, source in chosen:
        egress.require_allowed(source.address, source.parameter)
    try:
        spent = attempts.spent_usd(root) if chosen else 0.0
        estimates = [(state, *estimate_job(state.job, source, jobs, root)) for state, source in chosen]
    except lines.StoreError as error:
        raise params.ParameterError(str(error)) from None
    for state, estimate, data in estimates:
        console.print(f"{state.job.id}: {estimate}. Sent there: {data}.", markup=False, soft_wrap=True)
    if spent:
        console.print(f"Spent by this study so far, at most: ${spent:,.2f}.", markup=False, soft_wrap=True)
    if chosen and (ignored := egress.ignored_variables()):
        text = f"Requests go straight to these hosts: {', '.join(ignored)} of the environment does not count."
        console.print(text, markup=False, soft_wrap=True)
    return [estimate for _, estimate, _ in estimates]


def hosted_model(job: Job) -> api.HostedModel | None:
    """Return the hosted model that a job calls, if any. Raises ParameterError if its parameters are wrong."""
    prefix = HOSTED_STEPS.get(job.step)
    try:
        return api.hosted_model_from(job.parameters, prefix) if prefix else None
    except api.ProviderError as error:
        raise params.ParameterError(f"{job.id}: {error}") from None
