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
    hangs_after_s: float = HANGS_AFTER_S,
) -> subprocess.CompletedProcess:
    """Run a command and return its exit code and output, as `subprocess.run` with captured text.

    The output goes to files: a process that a command leaves behind would keep a pipe open, and the test waiting.

    Raises:
        AssertionError: the command runs longer than `hangs_after_s`; the message holds the stacks of its processes.
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
            raise AssertionError(f"{' '.join(command)} hangs:\n{errors.read()[-20_000:]}") from None
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
