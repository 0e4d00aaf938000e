"""The run of a study: plan, with a reason for everything; then one notebook at a time, each in its own process.

Heavy libraries stay in the children, so that a run in which nothing is to be done takes seconds.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from telco_nb import DATA_DIR
from telco_nb.engine import archive, machine_checks, schedule
from telco_nb.engine.fork_server import ForkedJob, ForkServer, is_useful
from telco_nb.engine.job import common_environment
from telco_nb.engine.progress import State, duration_text, make_console, open_display, status_table
from telco_nb.engine.schedule import UsageError
from telco_nb.engine.worker import Worker, gpus_per_worker
from telco_nb.hosted import api, prices
from telco_nb.study import imports, params, record
from telco_nb.study.content_key import content_key, is_current
from telco_nb.study.plan import Job, plan_jobs, unused_parameters

OK, FAILED, USAGE, UNFIT, COST, INTERRUPTED = 0, 1, 2, 3, 4, 130
LOCK_SECONDS = 5.0  # the children of a killed runner need a moment to die
POLL_SECONDS = 0.2
ENDS = {"BudgetStop": COST, "PreflightError": UNFIT, "ModelError": UNFIT}  # errors of a notebook: exit code of a run
ASKING = {"02_synth": "generator", "05_judge": "judge"}  # steps that may ask a hosted model: prefix of its parameters


class UnfitError(RuntimeError):
    """This machine or this outputs folder cannot be used now; the message says what to do. Exit code 3."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

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

    def command(self) -> str:
        """The command that goes on where this run ends: done work is skipped, so no step need be named twice."""
        words = ["./run_all.py", "--profile", self.profile]
        for name in ("configs", "steps", "outputs"):
            if getattr(self, name) is not None:
                words += [f"--{name}", str(getattr(self, name))]
        if self.params_dir != params.PARAMS_DIR:
            words += ["--params", str(self.params_dir)]
        if self.max_usd is not None:
            words += ["--max-usd", f"{self.max_usd:g}"]
        if self.gpus:
            words += ["--gpus", ",".join(self.gpus)]
        return shlex.join(words)


@dataclass(frozen=True)
class Services:
    """What a run needs from rooms that it does not import: each is called as the function of that name is defined."""

    estimate: Callable[..., tuple[prices.Estimate, str]]  # commands.estimate.estimate_job
    build_report: Callable[..., Path]  # report.build.build_report


@dataclass
class RunOutcome:
    """What a run came to; written to --json."""

    exit_code: int = OK
    error: str | None = None
    profile: str = ""
    root: str | None = None
    seconds: float = 0.0
    report: str | None = None
    command: str = ""
    jobs: list[dict[str, Any]] = field(default_factory=list)


def run(options: Options, services: Services, console: Console | None = None) -> int:
    """Plan and run a study as the command line asks; prints everything a person needs.

    Args:
        options: the command line.
        services: the price preview and the report, which need libraries that the runner does without.
        console: where to print; the terminal if left out.

    Returns:
        The exit code.
    """
    console = console or make_console()
    outcome, start = RunOutcome(profile=options.profile, command=options.command()), time.monotonic()
    try:
        _run(options, services, console, outcome)
    except (params.ParameterError, UsageError) as error:
        outcome.exit_code, outcome.error = USAGE, str(error)
    except prices.CostRefused as error:
        outcome.exit_code, outcome.error = COST, str(error)
    except (UnfitError, record.RecordError) as error:
        outcome.exit_code, outcome.error = UNFIT, str(error)
    except OSError as error:  # a full disk, a folder that went away
        outcome.exit_code, outcome.error = UNFIT, f"{error.strerror or error}: {error.filename or outcome.root}"
    except KeyboardInterrupt:
        outcome.exit_code, outcome.error = INTERRUPTED, "interrupted"
    if outcome.error:
        Console(stderr=True, highlight=False).print(f"run_all: {outcome.error}", markup=False, soft_wrap=True)
    outcome.seconds = round(time.monotonic() - start, 3)
    if options.json_file:
        record.write_json(options.json_file, asdict(outcome))
    return outcome.exit_code


def _run(options: Options, services: Services, console: Console, outcome: RunOutcome) -> None:
    if options.outputs:
        os.environ["TELCO_NB_OUTPUTS"] = str(options.outputs.expanduser().resolve())
    study = load_study(options)
    root = record.profile_root(study.profile)
    outcome.root = str(root)
    run_jobs(plan_jobs(study), root, options, services, console, outcome)


def run_jobs(
    jobs: list[Job], root: Path, options: Options, services: Services, console: Console, outcome: RunOutcome
) -> None:
    """Plan, run, report and summarise `jobs`; `outcome` receives what came of it."""
    chosen = schedule.choose_steps(jobs, options.steps)
    gpu_groups = gpus_per_worker(options.gpus, chosen)
    forced = schedule.choose_forced(chosen, options.force)
    if options.dry_run:
        states = schedule.plan_states(chosen, root, forced)
        outcome.jobs = [_summary(state, root) for state in states]
        schedule.show_plan(console, root, states, options.explain)
        show_price(services.estimate, console, root, jobs, states)
        examine(console, root, states, options.gpus)
        return
    with lock(root) as lock_file:
        states = schedule.plan_states(chosen, root, forced)
        schedule.show_plan(console, root, states, options.explain)
        estimates = show_price(services.estimate, console, root, jobs, states)
        prices.require_consent(estimates, options.max_usd, options.yes, _ask_consent if sys.stdin.isatty() else None)
        examine(console, root, states, options.gpus)
        runner = Runner(states, root, options, console, lock_file, gpu_groups)
        runner.go()
        outcome.jobs = [_summary(state, root) for state in states]
        outcome.exit_code = exit_code(states, stopped=runner.stops > 0)
        if outcome.exit_code != INTERRUPTED:
            _make_report(services.build_report, console, root, states, outcome)
        show_end(console, root, states, outcome)


# ---------------------------------------------------------------- may it start?


def load_study(options: Options) -> params.StudyParams:
    """The study that the options describe. Raises ParameterError for any fault in the files or the notebooks."""
    study = params.load_study(options.profile, options.params_dir)
    if options.configs is not None:
        chosen = schedule.choose_configs(options.configs, study)
        study = params.load_study(options.profile, options.params_dir, chosen)
    unused = unused_parameters(study)
    if unused:
        raise params.ParameterError(
            f"{options.params_dir}: no notebook declares {', '.join(unused)}. Remove the key, or declare it in the "
            "parameters cell of the notebook that should use it."
        )
    return study


def examine(console: Console, root: Path, states: list[State], gpus: tuple[str, ...] = ()) -> None:
    """Ask the doctor about what is to run. Raises UnfitError with all remedies at once."""
    jobs = [state.job for state in states if state.decision != "skip"]
    if not jobs:
        return
    problems = machine_checks.find_problems(jobs, root, gpus)
    if problems:
        raise UnfitError("\n".join(["this machine cannot run the study yet.", *problems]))
    for text in machine_checks.find_warnings(jobs):
        console.print(f"warning: {text}", markup=False, soft_wrap=True)


def show_price(
    estimate_job: Callable[..., tuple[prices.Estimate, str]],
    console: Console,
    root: Path,
    jobs: list[Job],
    states: list[State],
) -> list[prices.Estimate]:
    """Show which hosts will be asked, what is sent there and what it will cost; nothing if all stays here."""
    estimates = []
    for state in states:
        source = hosted_model(state.job)
        if source and state.decision != "skip":
            estimate, sent = estimate_job(state.job, source, jobs, root)
            console.print(f"{state.job.id}: {estimate}. Sent there: {sent}.", markup=False, soft_wrap=True)
            estimates.append(estimate)
    return estimates


def hosted_model(job: Job) -> api.HostedModel | None:
    """The hosted model that a job asks, or None. Raises ParameterError for one that cannot be asked as described."""
    prefix = ASKING.get(job.step)
    try:
        return api.hosted_model_from(job.parameters, prefix) if prefix else None
    except api.ProviderError as error:
        raise params.ParameterError(f"{job.id}: {error}") from None


def _ask_consent() -> bool:
    return input("Send it? [y/N] ").strip().lower() in ("y", "yes")


# ---------------------------------------------------------------- the lock


@contextlib.contextmanager
def lock(root: Path) -> Iterator[IO[str]]:
    """Hold `<root>/.lock`; children hold it with us, so that a new run never meets an old kernel.

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


# ---------------------------------------------------------------- running


class Runner:
    """Runs the jobs of a plan. One after another, each with the whole machine, so that its energy is its own; or, with
    `--gpus`, several at once, each with its own (see `lane_gpus`)."""

    def __init__(
        self,
        states: list[State],
        root: Path,
        options: Options,
        console: Console,
        lock_file: IO[str],
        gpu_groups: list[str | None],
    ):
        self.states, self.root, self.options, self.console, self.lock_file = states, root, options, console, lock_file
        self.by_id = {state.job.id: state for state in states}
        self.stops = 0  # how often we were asked to stop
        self.fork_server: ForkServer | None = None
        self.workers = [Worker(self, gpus) for gpus in gpu_groups]

    def go(self) -> None:
        """Run what is to be run. Afterwards every state has ended, but for those that a stop left waiting."""
        with self._signals(), open_display(self.console, self.states) as self.display, self._helpers():
            if len(self.workers) > 1:
                self._spread()
                return
            for state in self.states:
                if self._is_over():
                    break
                self._take(state, self.workers[0])

    def _spread(self) -> None:
        """Give every idle worker the next job whose inputs are there, until nothing is left to give."""
        idle, busy = [*self.workers], {}
        with ThreadPoolExecutor(len(idle)) as pool:
            while True:
                for state in filter(self._is_ready, self.states):
                    if not idle or self._is_over():
                        break
                    worker = idle.pop()
                    state.status = "running"
                    busy[pool.submit(self._take, state, worker)] = worker
                if not busy:
                    return
                for done in wait(busy, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED).done:
                    idle.append(busy.pop(done))
                    done.result()  # raises what the worker raised
                self.display.tick()

    def _is_ready(self, state: State) -> bool:
        return state.status == "waiting" and all(self.by_id[d].ended for d in state.job.depends if d in self.by_id)

    def _is_over(self) -> bool:
        return bool(self.stops) or (not self.options.keep_going and any(s.status == "failed" for s in self.states))

    @contextlib.contextmanager
    def _helpers(self) -> Iterator[None]:
        try:
            yield
        finally:
            if self.fork_server:
                self.fork_server.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(*_: Any) -> None:
            self.stops += 1

        names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {name: signal.signal(name, stop) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _take(self, state: State, worker: Worker) -> None:
        """One job: blocked, skipped or executed."""
        blockers = [d for d in state.job.depends if d in self.by_id and self.by_id[d].status in ("failed", "blocked")]
        if blockers:
            state.status, state.reason = "blocked", f"blocked by {blockers[0]}"
        elif state.decision == "skip" or (state.reason != "forced" and self._current(state)):
            state.status = "skipped"
        else:
            self._execute(state, worker)
        self.display.changed(state)

    def _current(self, state: State) -> bool:
        """Decide again, now that everything before it has run: the inputs may have come out the same."""
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
        """The job as the child and its kernel read it; None if an input is missing."""
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
        path = self.root / job.scope / f".{job.step}.job.json"
        record.write_json(path, values)
        return path

    def fork(self, job_file: Path, errors: IO[bytes]) -> ForkedJob | None:
        """The process of a job from the fork server, which is started for the first; None if this cannot be."""
        if self.fork_server and self.fork_server.is_outdated():
            self.fork_server.close()
            self.fork_server = None
        if self.fork_server is None and is_useful(sum(state.decision != "skip" for state in self.states)):
            self.fork_server = ForkServer(os.environ | common_environment({}))
        return self.fork_server and self.fork_server.fork(job_file, errors, self.lock_file, self._wait_on)

    def _wait_on(self) -> bool:
        self.display.tick()
        return not self.stops


# ---------------------------------------------------------------- the end


def exit_code(states: list[State], stopped: bool) -> int:
    """130 if a stop left work undone; if something failed, 3 or 4 if all failed so (see ENDS), else 1; else 0."""
    statuses = {state.status for state in states}
    if stopped and statuses & {"interrupted", "waiting"}:
        return INTERRUPTED
    failures = [str(state.failure) for state in states if state.failure]
    codes = {next((code for name, code in ENDS.items() if name in failure), FAILED) for failure in failures}
    if len(codes) == 1:
        return codes.pop()
    return FAILED if statuses & {"failed", "blocked"} else OK


def _summary(state: State, root: Path) -> dict[str, Any]:
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
    build_report: Callable[..., Path], console: Console, root: Path, states: list[State], outcome: RunOutcome
) -> None:
    """Build the report if anything that it shows has changed. A failure is reported and makes the run a failure."""
    try:
        outcome.report = str(root / "report" / "telco_report.html")
        key_file, key = root / "report" / ".key", report_key(root)
        ran = any(state.seconds is not None for state in states)
        current = key_file.is_file() and key_file.read_text() == key and Path(outcome.report).is_file()
        if ran or not current:
            console.print("Building the report ...")
            build_report(root, {"profile": outcome.profile, "jobs": outcome.jobs})
            record.write_bytes(key_file, key.encode())
    except Exception as error:
        outcome.report, outcome.exit_code = None, outcome.exit_code or FAILED
        outcome.error = f"the report could not be built: {type(error).__name__}: {error}"


def report_key(root: Path) -> str:
    """Hash of all that the report shows, and of the code that makes it."""
    files = [*sorted(root.glob("*/*.ipynb")), root / "results.csv", root / "findings.json"]
    files += sorted(DATA_DIR.glob("report*"))
    digest = hashlib.sha256(imports.sources_sha256("from telco_nb.report import build").encode())
    for path in files:
        if path.is_file():
            digest.update(f"{path.name} {record.sha256(path)}\n".encode())
    return digest.hexdigest()


def show_end(console: Console, root: Path, states: list[State], outcome: RunOutcome) -> None:
    """The summary: statuses and seconds, what failed and why, how to go on, where the report is."""
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
    if outcome.exit_code != OK:
        console.print(f"Go on with:  {outcome.command}", markup=False, soft_wrap=True)
    if outcome.report:
        console.print(f"Report:  {outcome.report}", markup=False, soft_wrap=True)
