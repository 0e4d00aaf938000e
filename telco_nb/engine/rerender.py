"""Builds the report of a study again from its files, without running anything: `run_all.py report`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from telco_nb.engine import sealing
from telco_nb.engine.runner import RunOutcome, UnfitError, errors_as_exit_codes, lock, report_key
from telco_nb.report.pdf import PrintError, print_pdf, require_chromium
from telco_nb.study import record, seal


def rerender(profile: str, outputs: Path | None, pdf: bool, build_report: Callable[..., Path], console: Console) -> int:
    """Build the report of a study again and, if asked for, print it; returns the exit code.

    Args:
        profile: the study.
        outputs: where results are; None for the usual place.
        pdf: print the one-file report as well.
        build_report: report.build.build_report; it needs pandas, which the runner does without.
        console: for what the command says.
    """
    result = RunOutcome(profile=profile)
    with errors_as_exit_codes(result):
        record.use_outputs(outputs)
        root = record.profile_root(profile)
        result.root = str(root)
        finished, reason = record.find_manifest(root, *seal.ANALYSIS)
        if finished is None:
            told = f"{root} holds no finished study (06_analysis: {reason})."
            raise UnfitError(f"{told} Run: ./run_all.py --profile {profile}")
        from telco_nb.report.files import REPORT_READS  # needs pandas, which the runner does without

        try:
            chromium = require_chromium() if pdf else None
            with lock(root):
                record.complete_swaps(root)
                for text in seal.require_finished(root, *REPORT_READS):
                    console.print(f"{text}: exported again", markup=False, soft_wrap=True)
                with sealing.sealed_again(root, console):
                    _build(root, chromium, build_report, console)
        except PrintError as error:
            raise UnfitError(str(error)) from None
    return result.exit_code


def _build(root: Path, chromium: str | None, build_report: Callable[..., Path], console: Console) -> None:
    page = build_report(root)
    record.write_bytes(root / "report" / ".key", report_key(root).encode())
    console.print(f"Report:  {page}", markup=False, soft_wrap=True)
    if chromium:
        console.print(f"PDF:     {print_pdf(page, chromium)}", markup=False, soft_wrap=True)
