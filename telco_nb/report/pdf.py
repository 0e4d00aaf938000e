"""Prints a page of the report as PDF, by an installed Chromium."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

PLACES = (
    "/usr/bin/chromium",
    "/usr/bin/chromium-browser",
    "/snap/bin/chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MOST_SECONDS = 180


class PrintError(RuntimeError):
    """The page cannot be printed; the message names the reason and what to do."""


def find_chromium() -> str | None:
    """Path of an installed Chromium: $CHROMIUM, the usual places, or the search path; None if there is none."""
    given = [os.environ["CHROMIUM"]] if os.environ.get("CHROMIUM") else [*PLACES, *NAMES]
    return next((path for name in given if (path := shutil.which(name))), None)


def require_chromium() -> str:
    """Path of an installed Chromium. Raises PrintError if there is none."""
    chromium = find_chromium()
    if chromium is None:
        looked = os.environ.get("CHROMIUM") or ", ".join(["$CHROMIUM", *PLACES, *NAMES])
        raise PrintError(
            f"no Chromium was found to print with. Looked for: {looked}. Install one (apt-get install chromium), or "
            "open report/telco_report.html in any browser and print it."
        )
    return chromium


def print_pdf(page: Path, chromium: str) -> Path:
    """Print an HTML file as PDF beside it, by this Chromium; returns the path of the PDF.

    Raises PrintError if Chromium does not print.
    """
    pdf = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Chromium may still write
        made = Path(folder) / pdf.name
        options = ["--headless", "--disable-gpu", "--no-pdf-header-footer", f"--user-data-dir={folder}/profile"]
        options += ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses to start as root with one
        _run([chromium, *options, f"--print-to-pdf={made}", page.resolve().as_uri()], made)
        shutil.move(made, pdf)
    return pdf


def _run(command: list[str], made: Path) -> None:
    """Run Chromium. Raises PrintError unless it has written the file `made`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise PrintError(f"{command[0]} did not finish printing in {MOST_SECONDS} s.") from None
    except OSError as error:
        raise PrintError(f"{command[0]} cannot be started: {error.strerror}. Set $CHROMIUM to another one.") from None
    if not made.is_file():
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PrintError(f"{command[0]} printed nothing (exit code {done.returncode}): {said[:300]}")
