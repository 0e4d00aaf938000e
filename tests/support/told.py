"""Commands that a test runs: one that hangs is ended, and each Python process of its tree tells where it stood."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

HANGS_AFTER_S = 1200.0  # no command of the tests takes a third of it; a guard, not a measure of speed


def run_told(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: Path | None = None,
    logs: Path | None = None,
    hangs_after_s: float = HANGS_AFTER_S,
) -> subprocess.CompletedProcess:
    """Run a command and return its exit code and output, as `subprocess.run` with captured text.

    The output goes to files: a process that a command leaves behind would keep a pipe open, and the test waiting.

    Args:
        command, environment, folder: as of subprocess.run.
        logs: a folder; processes of the command write their stacks to `*.log` files below it.
        hangs_after_s: how long the command may run.

    Raises:
        AssertionError: the command runs longer than that; the message holds the stacks of its processes.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, env={**environment, "PYTHONFAULTHANDLER": "1"}, cwd=folder, stdout=out, stderr=errors, text=True
        )
        try:
            process.wait(hangs_after_s)
        except subprocess.TimeoutExpired:
            _abort(process.pid)
            errors.seek(0)
            told = [errors.read()]
            told += [path.read_text(errors="replace") for path in (logs.rglob("*.log") if logs else ())]
            raise AssertionError("\n".join([f"{' '.join(command)} hangs:", *(text[-8000:] for text in told)])) from None
        except BaseException:
            _abort(process.pid)
            raise
        out.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), errors.read())


def _abort(pid: int) -> None:
    """End a process and all that it started; Python writes its stacks to the standard error first."""
    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(pid)
        tree = [*reversed(first.children(recursive=True)), first]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)
        _, alive = psutil.wait_procs(tree, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
