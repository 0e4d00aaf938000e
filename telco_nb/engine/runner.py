"""Runs a study: plans every job with a reason, lets the workers run the notebooks, and builds the report.

Only the child processes import heavy libraries, so that a run with nothing to do takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console

from telco_nb import DATA_DIR
from telco_nb.engine import archive, forecast, machine_checks, ray_engine, schedule, sealing, shared_folder
from telco_nb.engine.local_engine import Engine, LocalEngine, gpus_per_place
from telco_nb.engine.progress import Output, SafeConsole, State, duration_text, status_table, warn
from telco_nb.engine.schedule import Options, UnfitError, UsageError, load_study
from telco_nb.engine.worker import Runner
from telco_nb.hosted import egress, prices
from telco_nb.study import imports, params, record, seal
from telco_nb.study.input_files import InputFileError
from telco_nb.study.plan import Job, plan_jobs, refuse_too_few

OK, FAILED, USAGE, UNFIT, COST, INTERRUPTED = 0, 1, 2, 3, 4, 130
ERROR_CODES = {  # error of a notebook: exit code of the run
    "BudgetStop": COST, "EgressRefused": COST, "StoreError": USAGE, "PreflightError": UNFIT, "ModelError": UNFIT,
    "GlossaryError": USAGE, "InputFileError": USAGE, "ParameterError": USAGE, "VotesError": USAGE,
    "WrittenFileError": USAGE, "NoTextError": USAGE, "RecordError": UNFIT,
}  # fmt: skip
LOCK_SECONDS = 5.0  # the children of a killed runner need a moment to die
POLL_SECONDS = 0.2
NOTIFY_SECONDS = 120.0


@dataclass
class RunOutcome:
    """The result of a run, as --json writes it."""

    exit_code: int = OK
    error: str | None = None
    profile: str = ""
    root: str | None = None
    seconds: float = 0.0
    report: str | None = None
    seal: str | None = None  # hash over all that the study shows
    restored: list[str] = field(default_factory=list)  # exports that were missing, old or changed
    command: str = ""
    jobs: list[dict[str, Any]] = field(default_factory=list)
    expected: list[forecast.Expected] = field(default_factory=list)  # before the run


@dataclass(frozen=True)
class Services:
    """Functions that a run needs from rooms that it does not import."""

    estimate: schedule.Estimator  # commands.estimate.estimate_job
    build_report: Callable[..., Path]  # report.build.build_report
    needs: Callable[..., list[machine_checks.Needs]] | None = None  # commands.needs.study_needs
    read_own_data: Callable[[list[Job]], None] | None = None  # commands.estimate.read_own_data


def run(options: Options, services: Services) -> int:
    """Plan and run a study, print the plan, the progress and the result, and return the exit code."""
    result, start = RunOutcome(profile=options.profile, command=options.command()), time.monotonic()
    json_file = None
    with errors_as_exit_codes(result):
        json_file = schedule.output_file(options.json_file, "--json")
        _run(options, services, Output(options.log_level), result)
    result.seconds = round(time.monotonic() - start, 3)
    try:
        if json_file:
            record.write_json(json_file, {name: _readable(value) for name, value in asdict(result).items()})
    except OSError as error:
        _print_error(f"--json {json_file}: {error.strerror}")
        result.exit_code = result.exit_code or UNFIT
    if options.notify and not options.dry_run:
        _notify(options.notify, result)
    return result.exit_code


def _notify(command: str, result: RunOutcome) -> None:
    """Run the user's command with the outcome in its environment. Whether it succeeds does not change the outcome."""
    counts = Counter(job["status"] for job in result.jobs)
    told = result.error or ", ".join(f"{n} {name}" for name, n in counts.items()) or "nothing to do"
    outcome = {"EXIT_CODE": str(result.exit_code), "PROFILE": result.profile, "SUMMARY": told}
    outcome["REPORT"] = result.report or ""
    environment = os.environ | {f"TELCO_NB_{name}": value for name, value in outcome.items()}
    try:
        done = subprocess.run(command, shell=True, env=environment, timeout=NOTIFY_SECONDS, stdin=subprocess.DEVNULL)
        fault = f"exit code {done.returncode}" if done.returncode else ""
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        fault = archive.describe(error)
    if fault:
        _print_error(f"--notify: {fault}")


def verify(profile: str, outputs: Path | None, known_seal: str | None) -> int:
    """Compare a study with its seal (see `sealing.verify`), print what differs, and return the exit code."""
    result = RunOutcome(profile=profile)
    with errors_as_exit_codes(result):
        record.use_outputs(outputs)
        root = record.profile_root(profile)
        result.root = str(root)
        if not (root / seal.SEAL_NAME).exists():
            params.load_study(profile)  # a misspelt profile is named as such
        result.exit_code = OK if sealing.verify(root, known_seal, Output()) else FAILED
    return result.exit_code


@contextlib.contextmanager
def errors_as_exit_codes(result: RunOutcome) -> Generator[None]:
    """Write an error and its exit code to `result`, and print it as one line."""
    try:
        yield
    except (InputFileError, UsageError) as error:
        result.exit_code, result.error = USAGE, str(error)
    except egress.SendingRefused as error:
        result.exit_code, result.error = COST, str(error)
    except (UnfitError, record.RecordError) as error:
        result.exit_code, result.error = UNFIT, str(error)
    except OSError as error:  # such as a full disk or a removed folder
        result.exit_code, result.error = UNFIT, f"{error.strerror or error}: {error.filename or result.root}"
    except KeyboardInterrupt:
        result.exit_code, result.error = INTERRUPTED, "interrupted"
    except Exception as error:
        traceback.print_exc()
        result.exit_code, result.error = FAILED, archive.describe(error)
    if result.error:
        _print_error(result.error)


def _readable(value: Any) -> Any:
    """A text without bytes of the command line that are no UTF-8; any other value as it is."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def _print_error(text: str) -> None:
    SafeConsole(stderr=True, highlight=False).print(f"run_all: {text}", markup=False, soft_wrap=True)


class Planned(NamedTuple):
    """What the options ask for: all jobs of the study, those chosen of them, and where they can run."""

    root: Path
    jobs: list[Job]
    chosen: list[Job]
    forced: set[str]
    places: list[str | None]


def _run(options: Options, services: Services, console: Console, result: RunOutcome) -> None:
    """Plan, run and report the study of the options; `result` receives the outcome."""
    plan = _plan(options, result)
    if not options.dry_run:
        with lock(plan.root) as lock_file:
            _execute(plan, options, services, console, result, lock_file)
        return
    sealing.show_changes(console, sealing.changes_since(plan.root))
    states, _ = _expect(plan, options, services, console, result)
    _check_machine(plan, options, services, console, states)


def _plan(options: Options, result: RunOutcome) -> Planned:
    """Read the parameter files and choose the jobs of the options."""
    schedule.check_engine(options)
    if options.engine == "ray":
        ray_engine.require_allowed_cluster(options.address)
        ray_engine.require_ray()
    record.use_outputs(options.outputs)
    study = load_study(options)
    root = record.profile_root(study.profile)
    result.root = str(root)
    jobs = plan_jobs(study)
    chosen = schedule.choose_steps(jobs, options.steps)
    refuse_too_few(chosen)
    places = gpus_per_place(options.gpus, chosen)
    return Planned(root, jobs, chosen, schedule.choose_forced(chosen, options.force), places)


def _execute(
    plan: Planned, options: Options, services: Services, console: Console, result: RunOutcome, lock_file: IO[str]
) -> None:
    """Clean up after earlier runs, ask for consent, run what is not up to date, and report."""
    root, jobs = plan.root, plan.jobs
    shared_folder.sweep_claims(root)
    record.sweep(root)
    for job in jobs:
        archive.sweep_attempt(root, job.scope, job.step)
    changes = sealing.changes_since(root)
    sealing.show_changes(console, changes)
    states, estimates = _expect(plan, options, services, console, result)
    prices.require_consent(estimates, options.max_usd, options.yes, _ask_consent if sys.stdin.isatty() else None)
    _check_machine(plan, options, services, console, states)
    engine = _engine(options, states, root, console, lock_file, plan.places)
    if options.address and isinstance(engine, ray_engine.RayEngine):
        forecast.show_at_once(console, result.expected, engine.at_once)
    claims = next((job.parameters["claims_path"] for job in jobs if "claims_path" in job.parameters), None)
    runner = Runner(states, root, options, console, engine, claims)
    seal.forget_deleted_stores(root)
    runner.go()
    result.jobs = [_summary(state, root) for state in states]
    result.exit_code = exit_code(states, stopped=runner.stops > 0)
    _conclude(services.build_report, console, root, jobs, states, changes, result)
    show_end(console, root, states, result)


def _expect(
    plan: Planned, options: Options, services: Services, console: Console, result: RunOutcome
) -> tuple[list[State], list[prices.Estimate]]:
    """Show what will be done and what it is expected to take; returns the states of the jobs and the prices."""
    states = schedule.plan_states(plan.chosen, plan.root, plan.forced)
    if options.dry_run:
        result.jobs = [_summary(state, plan.root) for state in states]
    schedule.show_plan(console, plan.root, states, options.explain)
    if services.read_own_data and any(s.job.step < "03" and s.decision != "skip" for s in states):
        services.read_own_data(plan.jobs)
    estimates = schedule.show_price(services.estimate, console, plan.root, plan.jobs, states)
    result.expected = forecast.show_forecast(console, plan.root, plan.jobs, states, estimates)
    if any(row.n for row in result.expected):
        forecast.show_at_once(console, result.expected, _places(plan, options))
    return states, estimates


def _places(plan: Planned, options: Options) -> dict[str, int] | None:
    """How many jobs of each step run at once; None for a cluster, which is joined later."""
    if options.address:
        return None
    if options.engine == "ray":
        return ray_engine.at_once(plan.jobs, *ray_engine.resources_here())
    return {job.step: len(plan.places) for job in plan.jobs}


def _check_machine(plan: Planned, options: Options, services: Services, console: Console, states: list[State]) -> None:
    """Check this machine for the jobs; the nodes of a cluster are checked when it is joined."""
    if not options.address:
        needs = services.needs and partial(services.needs, plan=plan.jobs, root=plan.root, at_once=len(plan.places))
        check_machine(console, plan.root, states, options.gpus, needs)


def _engine(
    options: Options, states: list[State], root: Path, console: Console, lock_file: IO[str], places: list[str | None]
) -> Engine:
    """The engine of the options; a cluster only if there is something to run."""
    jobs = [state.job for state in states if state.decision != "skip"]
    if options.engine == "ray" and jobs:
        return ray_engine.RayEngine(
            jobs, root, options.address, lambda text: console.print(text, markup=False, soft_wrap=True)
        )
    return LocalEngine(places, lock_file, len(jobs))


def _conclude(
    build_report: Callable[..., Path],
    console: Console,
    root: Path,
    jobs: list[Job],
    states: list[State],
    changes: list[seal.Difference],
    result: RunOutcome,
) -> None:
    """Bring exports and report up to date, and seal the study. What fails goes to `result`."""
    try:
        result.restored = sealing.restore_exports(root, jobs)
        if result.exit_code != INTERRUPTED:
            changed_report = any(change.path.startswith("report/") for change in changes)
            _make_report(build_report, console, root, states, result, changed_report)
        result.seal = seal.seal_study(root)
    except OSError as error:  # such as a full disk
        result.exit_code = result.exit_code or FAILED
        result.error = f"exports, report or seal could not be written: {archive.describe(error)}"


def _ask_consent() -> bool:
    return input("Send it? [y/N] ").strip().lower() in ("y", "yes")


def check_machine(
    console: Console,
    root: Path,
    states: list[State],
    gpus: tuple[str, ...],
    find_needs: Callable[..., list[machine_checks.Needs]] | None = None,
) -> None:
    """Check this machine for the jobs that are to run, and print what they need, with warnings.

    Raises UnfitError with all problems.
    """
    jobs = [state.job for state in states if state.decision != "skip"]
    if not jobs:
        return
    if line := machine_checks.device_line(jobs):
        console.print(line, markup=False, soft_wrap=True)
    problems = machine_checks.find_problems(jobs, root, gpus)
    needs = find_needs(jobs, usable=not problems and machine_checks.times_a_gpu(jobs)) if find_needs else []
    for line in (line for need in needs for line in need.lines):
        console.print(line, markup=False, soft_wrap=True)
    problems += machine_checks.disk_problems(place for need in needs for place in need.disk)
    problems += [fault for need in needs for fault in need.faults]
    if problems:
        raise UnfitError("\n".join(["this machine cannot run the study yet.", *dict.fromkeys(problems)]))
    for text in machine_checks.find_warnings(jobs):
        warn(console, f"warning: {text}")


@contextlib.contextmanager
def lock(root: Path) -> Generator[IO[str]]:
    """Hold the lock file `<root>/.lock`, which child processes also keep open: no new run meets an old kernel.

    Raises UnfitError if another run holds it for longer than the children of a killed runner take to die.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        stream = (root / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise UnfitError(f"{root} cannot be used: {error.strerror}. Choose another place with --outputs.") from None
    with stream:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _try_lock(stream):
            if time.monotonic() > deadline:
                stream.seek(0)
                raise UnfitError(
                    f"another run (process {stream.read().strip() or 'unknown'}) is using {root}. "
                    "Wait for it, stop it, or choose another place with --outputs."
                )
            time.sleep(POLL_SECONDS)
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield stream


def _try_lock(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def exit_code(states: list[State], stopped: bool) -> int:
    """Return the exit code of a run.

    INTERRUPTED if a stop left work undone; after failures the code of ERROR_CODES that all of them share, else FAILED;
    otherwise OK.
    """
    statuses = {state.status for state in states}
    if stopped and statuses & {"interrupted", "waiting"}:
        return INTERRUPTED
    failures = [str(state.failure) for state in states if state.failure]
    codes = {next((code for name, code in ERROR_CODES.items() if name in failure), FAILED) for failure in failures}
    if len(codes) == 1:
        return codes.pop()
    return FAILED if statuses & {"failed", "blocked"} else OK


def _summary(state: State, root: Path) -> dict[str, Any]:
    """Return the entry of a job in RunOutcome.jobs."""
    failed = archive.failed_notebook(root, state.job.scope, state.job.step)
    return {
        "id": state.job.id,
        "scope": state.job.scope,
        "step": state.job.step,
        "decision": state.decision,
        "status": state.status,
        "reason": str(state.failure or state.reason),
        "seconds": state.seconds,
        "exit_code": state.exit_code,
        "failed_notebook": str(failed) if state.failure and failed.is_file() else None,
    }


def _make_report(
    build_report: Callable[..., Path],
    console: Console,
    root: Path,
    states: list[State],
    result: RunOutcome,
    changed: bool,
) -> None:
    """Build the report if anything that it shows, or (`changed`) its own files, have changed.

    An error goes to `result` and makes the run a failure.
    """
    try:
        result.report = str(root / "report" / "telco_report.html")
        key_file, key = root / "report" / ".key", report_key(root)
        ran = any(state.seconds is not None for state in states)
        current = _text_or_none(key_file) == key and Path(result.report).is_file() and not changed
        if ran or not current:
            console.print("Building the report ...")
            build_report(root, result.jobs)
            record.write_bytes(key_file, key.encode())
    except Exception as error:
        result.report, result.exit_code = None, result.exit_code or FAILED
        result.error = f"the report could not be built: {type(error).__name__}: {error}"


def _text_or_none(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def report_key(root: Path) -> str:
    """Return a hash of everything that the report shows, and of the code that builds it."""
    files = [*sorted(root.glob("*/*.ipynb")), root / "results.csv", root / "findings.json"]
    files += sorted(DATA_DIR.glob("report*"))
    digest = hashlib.sha256(imports.sources_sha256("from telco_nb.report import build").encode())
    for path in files:
        if path.is_file():
            digest.update(f"{path.name} {record.sha256(path)}\n".encode())
    return digest.hexdigest()


def show_end(console: Console, root: Path, states: list[State], result: RunOutcome) -> None:
    """Print the statuses and seconds, the failures with their reasons, the command that goes on, and the report."""
    console.print()
    if any(state.status != "skipped" for state in states):
        console.print(status_table(states))
    for state in states:
        if state.failure:
            notebook = archive.failed_notebook(root, state.job.scope, state.job.step)
            console.print(f"{state.job.id}: {state.failure}\n  {notebook}", markup=False, soft_wrap=True)
    counts = {status: sum(s.status == status for s in states) for status in dict.fromkeys(s.status for s in states)}
    total = sum(state.seconds or 0 for state in states)
    console.print(f"{', '.join(f'{n} {status}' for status, n in counts.items())}; {duration_text(total)} of execution.")
    for text in result.restored:
        console.print(text, markup=False, soft_wrap=True)
    if result.exit_code != OK:
        console.print(f"Go on with:  {result.command}", markup=False, soft_wrap=True)
    if result.report:
        console.print(f"Report:  {result.report}", markup=False, soft_wrap=True)
    if result.seal:
        compare = f"./run_all.py verify --profile {result.profile} --seal {sealing.short(result.seal)}"
        console.print(f"Sealed:  {compare}", markup=False, soft_wrap=True)
