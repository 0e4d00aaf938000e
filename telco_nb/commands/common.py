"""Shared parts of the side commands: options, exit codes, and errors shown as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from telco_nb.engine import runner
from telco_nb.engine.schedule import finite
from telco_nb.hosted.api import ProviderError
from telco_nb.hosted.egress import SendingRefused
from telco_nb.hosted.keys import printable, redact
from telco_nb.hosted.lines import StoreError
from telco_nb.hosted.prices import BudgetStop
from telco_nb.hosted.session import CallsStopped
from telco_nb.judge.bradley_terry import RankingError
from telco_nb.lora.errors import PreflightError
from telco_nb.study import params, record, seal
from telco_nb.study.input_files import InputFileError

ExportAction = Annotated[Literal["export"], typer.Argument(help="What to do.")]
NewFolder = Annotated[Path, typer.Argument(metavar="FOLDER", help="Where to; it must not exist, or be empty.")]
Replace = Annotated[bool, typer.Option("--replace", help="Replace an earlier export.")]
Profile = Annotated[str, typer.Option("--profile", "-p", help="The study: a file of params/profiles.")]
ParamsDir = Annotated[Path, typer.Option("--params", metavar="DIR", help="The folder of the parameter files.")]
MaxUsd = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        min=0.0,
        callback=finite,
        help="The study spends no more than this, in dollars, in all.",
    ),
]
NoEgress = Annotated[bool, typer.Option("--no-egress", help="Refuse every host outside this network.")]
Yes = Annotated[bool, typer.Option("--yes", help="Agree to send data to the host that is named.")]


@contextmanager
def locked_study(profile: str, params_dir: Path) -> Generator[None]:
    """Hold the lock of a study. Raises ParameterError for a wrong profile before a folder is made for the lock."""
    params.load_study(profile, params_dir)
    with locked(root := record.profile_root(profile)):
        seal.forget_deleted_stores(root)
        yield


@contextmanager
def locked(root: Path) -> Generator[None]:
    """Hold the lock of the study in a folder, to add to its stores."""
    with runner.lock(root):
        yield


class CommandError(ValueError):
    """A side command cannot do what the user asks; the message says what to do instead. Exit code 2."""


EXIT_CODES: dict[type[Exception], int] = {
    InputFileError: runner.USAGE,
    ProviderError: runner.USAGE,
    StoreError: runner.USAGE,
    CommandError: runner.USAGE,
    RankingError: runner.FAILED,
    CallsStopped: runner.FAILED,
    runner.UnfitError: runner.UNFIT,
    record.RecordError: runner.UNFIT,
    PreflightError: runner.UNFIT,
    OSError: runner.UNFIT,
    SendingRefused: runner.COST,
    BudgetStop: runner.COST,
}


@contextmanager
def errors_as_exit_codes(command: str) -> Generator[None]:
    """Ends the command with one line on stderr and run_all.py's exit code after an error that a user can correct."""
    try:
        yield
    except tuple(EXIT_CODES) as error:
        print(f"{command}: {printable(redact(str(error)))}", file=sys.stderr)
        over_budget = isinstance(error, CallsStopped) and error.status == "budget_stop"
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        raise typer.Exit(runner.COST if over_budget else code) from None
