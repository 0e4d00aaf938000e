"""What a study's folder holds that nothing needs any more, and its removal: `run_all.py clean`.

What a manifest names as an output stays, unless everything is to go. What was paid for (the stores of judges and of the
generator, the log of calls) stays in any case.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from telco_nb.engine import archive, forecast, schedule, sealing
from telco_nb.engine.progress import State
from telco_nb.engine.runner import RunOutcome, UnfitError, errors_as_exit_codes, lock
from telco_nb.study import params, record, seal
from telco_nb.study.plan import plan_jobs

KINDS = {
    "checkpoints": "of trainings that have finished",
    "attempts": "notebooks and logs of failures, and what ended attempts left",
    "temporary": "files of processes that are gone",
    "by hand": "results of notebooks run by hand, beside the record",
    "results": "of all steps, with notebooks, report and unfinished work",
}
SHOWN = 20  # paths of a kind
LEDGERS = (seal.STORE_FOLDER, "egress.jsonl", ".lock", ".publish.lock")  # paid for, or in use


@dataclass(frozen=True)
class Removable:
    """A file or folder that may go, why (one of KINDS), and its size in bytes."""

    kind: str
    path: Path
    bytes: int


def clean(options: schedule.Options, everything: bool, console: Console) -> int:
    """Print what may be removed from a study, and remove it under the study's lock; returns the exit code.

    Args:
        options: of the run that made the study; with `dry_run` nothing is removed.
        everything: the results of its steps as well.
        console: for the list.
    """
    result = RunOutcome(profile=options.profile, command=options.command())
    with errors_as_exit_codes(result):
        record.use_outputs(options.outputs)
        study = schedule.load_study(options)
        root = record.profile_root(study.profile)
        result.root = str(root)
        states = schedule.plan_states(plan_jobs(study), root, set())
        if options.dry_run or not root.is_dir():
            _show(console, root, find(root, states, everything), "may be removed")
        else:
            with lock(root), sealing.sealed_again(root, console):
                _refuse_if_in_use(root)
                found = find(root, states, everything)
                for item in found:
                    _remove(item.path)
                _show(console, root, found, "removed")
        if everything:
            _show_need(console, root, states)
    return result.exit_code


def find(root: Path, states: list[State], everything: bool) -> list[Removable]:
    """What may go, each path once, in the order of KINDS. Nothing is found twice: a folder stands for all in it."""
    kinds = [("checkpoints", _checkpoints(root, states)), ("attempts", _attempts(root, states))]
    kinds += [("temporary", (path for path, is_alive in record.owned(root) if not is_alive))]
    kinds += [("by hand", iter([_by_hand(root)]))]
    kinds += [("results", _results(root))] if everything else []
    found: dict[Path, Removable] = {}
    for kind, paths in kinds:
        for path in paths:
            if os.path.lexists(path) and not any(parent in found for parent in (path, *path.parents)):
                found[path] = Removable(kind, path, _size(path))
    return list(found.values())


def _by_hand(root: Path) -> Path:
    return root.parent / params.BY_HAND / root.name


def _refuse_if_in_use(root: Path) -> None:
    """Raise UnfitError if a notebook that is run by hand, which takes no lock, is writing."""
    writing = [path for folder in (root, _by_hand(root)) for path, is_alive in record.owned(folder) if is_alive]
    if writing:
        raise UnfitError(f"{writing[0]}: a notebook that is run by hand writes there. Shut its kernel down first.")


def _checkpoints(root: Path, states: list[State]) -> Iterator[Path]:
    for state in states:
        yield record.step_dir(root, state.job.scope, state.job.step) / record.CHECKPOINTS
        if state.decision == "skip":  # its record is up to date: nobody goes on with another attempt
            yield record.work_dir(root, state.job.scope, state.job.step) / record.CHECKPOINTS


def _attempts(root: Path, states: list[State]) -> Iterator[Path]:
    for state in states:
        place = root, state.job.scope, state.job.step
        for leftover in (archive.failed_notebook, archive.failed_log, archive.running_notebook, archive.running_log):
            yield leftover(*place)
        yield archive.job_file(*place)
        if state.decision == "skip":
            yield record.work_dir(*place)


def _results(root: Path) -> Iterator[Path]:
    """Everything in a study's folder but what was paid for."""
    for path in sorted(root.glob("*")):
        if path.name in LEDGERS:
            continue
        if path.is_dir() and any(child.name in LEDGERS for child in path.iterdir()):
            yield from (child for child in sorted(path.iterdir()) if child.name not in LEDGERS)
        else:
            yield path


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    return sum(file.lstat().st_size for file in files if not file.is_dir() or file.is_symlink())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _show(console: Console, root: Path, found: list[Removable], verb: str) -> None:
    if not found:
        console.print(f"{root}: nothing to remove.", markup=False, soft_wrap=True)
        return
    for kind, meaning in KINDS.items():
        items = [item for item in found if item.kind == kind]
        if items:
            console.print(f"{kind}, {_megabytes(items)}: {meaning}", markup=False, soft_wrap=True)
            console.print(_table(root, items))
    console.print(f"{root}: {_megabytes(found)} {verb}.", markup=False, soft_wrap=True)


def _table(root: Path, items: list[Removable]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(justify="right")
    for item in items[:SHOWN]:
        table.add_row(f"{item.bytes:,}", os.path.relpath(item.path, root.parent))
    if len(items) > SHOWN:
        table.add_row("", f"and {len(items) - SHOWN} more")
    return table


def _megabytes(items: list[Removable]) -> str:
    return f"{sum(item.bytes for item in items) / 1e6:,.1f} MB"


def _show_need(console: Console, root: Path, states: list[State]) -> None:
    """Say what the study will have to do again without its results."""
    again = [replace(state, decision="run", expected_seconds=None) for state in states]
    console.print(f"Without its results the study needs all {len(again)} steps again.")
    forecast.estimate_durations(again, root)
    forecast.show_forecast(console, root, [state.job for state in again], again, [])
