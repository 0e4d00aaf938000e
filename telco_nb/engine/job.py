"""Executes one notebook in its own process: `python -m telco_nb.engine.job job.json [parent pid]`.

The runner starts this process and reads its events, one JSON object per line of standard output. An execution succeeds
only if papermill reached the end *and* the work folder holds a manifest with the job's key: papermill alone also
reports success for a killed kernel and for `sys.exit(0)` in a cell.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from telco_nb import ROOT
from telco_nb.engine import archive
from telco_nb.engine.archive import Failure, is_executed
from telco_nb.study import record
from telco_nb.study.machine import peak_memory_bytes
from telco_nb.study.manifest import load_manifest
from telco_nb.study.memory import oom_kills

if TYPE_CHECKING:  # heavy; imported when the signal handlers are in place
    from telco_nb.engine.kernel_manager import WaitingKernel

END_SECONDS = 5.0  # for a killed kernel to end
POLL_SECONDS = 0.3
MAX_SOCKET_PATH = 104  # bytes; macOS has the shortest limit
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS}
SOCKET_NAME = 24  # bytes of /tnb-xxxxxxxx/k-ipc-5 and the terminating zero


def main(job_path: str, parent: int | None = None, waiting: WaitingKernel | None = None) -> int:
    """Execute a job.

    Args:
        job_path: The job, as Runner.write_job writes it.
        parent: Process id; when that process is gone, this one ends as well.
        waiting: A forked kernel that waits for its request, if there is one.

    Returns:
        0 if the job left a valid result, else 1.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    place = Path(job["root"]), job["scope"], job["step"]
    archive.running_notebook(*place).unlink(missing_ok=True)
    events = _redirect_output(archive.running_log(*place))
    execution: Execution | None = None
    try:
        execution = Execution(job, events, _runtime_folder(), waiting)
        if parent is not None:
            threading.Thread(target=execution.die_with, args=(parent,), daemon=True).start()
        failure = _execute(execution, job_path)
    except Exception as error:  # such as a full disk; the runner would only see an exit code
        _log_traceback()
        failure = Failure("not kept" if execution and execution.ended else "not started", archive.describe(error))
    if failure is not None:
        _keep_failed(place, failure)
    if execution is not None:
        execution.wait_for_kernel()
    _send(events, end=failure and asdict(failure))
    return 0 if failure is None else 1


def _execute(execution: Execution, job_path: str) -> Failure | None:
    """Run the notebook of a job and publish its result; return what went wrong, or None."""
    try:
        os.environ.update(kernel_environment(job_path, execution.job["parameters"], execution.runtime))
        failure = execution.run()
        execution.ended = failure is None
    finally:
        execution.kill_kernel()
        shutil.rmtree(execution.runtime, ignore_errors=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # the rest is short and must not be interrupted
        signal.signal(number, signal.SIG_IGN)
    if failure is None:
        archive.keep_record(*execution.place)
    return failure


def _keep_failed(place: tuple[Path, str, str], failure: Failure) -> None:
    try:
        archive.keep_failed(*place, failure)
    except OSError:  # the disk is full: the reason still reaches the runner
        _log_traceback()


def _log_traceback() -> None:
    with contextlib.suppress(OSError):
        traceback.print_exc()


def _send(events: IO[str], **event: Any) -> None:
    """Send an event to the runner; do nothing if the runner is gone."""
    with contextlib.suppress(BrokenPipeError, ValueError):
        events.write(json.dumps(event) + "\n")
        events.flush()


class Execution:
    """The execution of a job, and the state that it shares with the signal handlers and with `die_with`."""

    def __init__(self, job: dict[str, Any], events: IO[str], runtime: Path, waiting: WaitingKernel | None):
        self.job, self.events, self.runtime, self.waiting = job, events, runtime, waiting
        self.place = Path(job["root"]), job["scope"], job["step"]
        self.kernel: Any = None  # the kernel's process: subprocess.Popen or ForkedKernel
        self.cell: int | None = None  # number of the code cell that runs, from 1
        self.interrupted = False
        self.ended = False  # every cell ran, and the manifest is there

    def send(self, **event: Any) -> None:
        _send(self.events, **event)

    def run(self) -> Failure | None:
        """Run the notebook; return None if it succeeded and left a valid manifest."""
        kills_before = oom_kills()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))  # Ray's processes block the first
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            self._papermill()
        except BaseException as error:
            return self._classify(error, oom_kills() > kills_before)
        return self._check_manifest()

    def _papermill(self) -> None:
        import papermill

        from telco_nb.engine import kernel_manager

        notebook = Path(self.job["notebook"])
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        total = sum(map(is_executed, cells)) + bool(self.job["parameters"])  # papermill adds a cell with the parameters
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        papermill.execute_notebook(
            _literal(notebook),
            _literal(archive.running_notebook(*self.place)),
            parameters=self.job["parameters"],
            kernel_name="python3",
            engine_name=kernel_manager.register_engine(),
            kernel_manager_class=kernel_manager.manager_class(self.runtime, self._on_kernel, self.waiting),
            progress_bar=False,
            log_output=True,
            coalesce_streams=True,
            store_widget_state=False,
            start_timeout=kernel_manager.START_SECONDS,
            execution_timeout=self.job.get("timeout_seconds"),
            iopub_timeout=60,
            shutdown_kernel="immediate",  # all results are on disk by now; an orderly shutdown takes most of a second
            on_cell_start=lambda cell, cell_index: self._on_cell(cell, total),
            cwd=str(notebook.parent),
        )

    def _on_kernel(self, process: Any) -> None:
        self.kernel = process
        self.send(kernel_pid=process.pid, runtime=str(self.runtime), warm=process is self.waiting)

    def _on_cell(self, cell: Any, total: int) -> None:
        if self.interrupted:  # the signal came between two cells, where the kernel ignores it
            raise KeyboardInterrupt
        if is_executed(cell):
            self.cell = (self.cell or 0) + 1
            self.send(cell=self.cell, of=total)

    def _on_interrupt(self, *_: Any) -> None:
        # SIGINT interrupts the cell, SIGTERM ends the kernel.
        self.interrupted = True
        if self.kernel is None or self.cell is None:
            raise KeyboardInterrupt
        self._signal_kernel(signal.SIGINT)

    def _on_terminate(self, *_: Any) -> None:
        self.interrupted = True
        self.kill_kernel()
        raise KeyboardInterrupt

    def _signal_kernel(self, number: int) -> None:
        # The kernel leads its own process group: the signal also reaches what the notebook started.
        if self.kernel is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.kernel.pid, number)

    def kill_kernel(self) -> None:
        """Kill the kernel and all processes that the notebook started."""
        self._signal_kernel(signal.SIGKILL)

    def wait_for_kernel(self) -> None:
        """Wait until the killed kernel has returned its memory."""
        deadline = time.monotonic() + END_SECONDS
        while self.kernel is not None and self.kernel.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def die_with(self, parent: int) -> None:
        """Wait until the parent is gone, then kill the kernel, remove its folder and exit."""
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        self.kill_kernel()
        shutil.rmtree(self.runtime, ignore_errors=True)
        os._exit(1)

    def _classify(self, error: BaseException, out_of_memory: bool) -> Failure:
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        if self.interrupted:
            return Failure("interrupted", "stopped before the end", self.cell)
        if isinstance(error, PapermillExecutionError):
            text = " ".join(str(error.evalue).split())[:300]
            return Failure("error", f"{error.ename}: {text}".removesuffix(": "), error.exec_count or self.cell)
        if isinstance(error, CellTimeoutError):
            return Failure("timeout", f"the cell did not end within {self.job['timeout_seconds']} s", self.cell)
        if (full := disk_error(error)) is not None:  # papermill then kills the kernel, whose death says nothing
            return Failure("not kept", archive.describe(full), self.cell)
        code = self.kernel.poll() if self.kernel else None
        if isinstance(error, DeadKernelError) or code is not None:
            peak = None if code is None else peak_memory_bytes(resource.RUSAGE_CHILDREN)  # the kernel is the only child
            exception = archive.last_exception(archive.running_log(*self.place))
            return Failure("died", death_reason(code, out_of_memory, peak, exception), self.cell)
        return Failure("not started", archive.describe(error), self.cell)

    def _check_manifest(self) -> Failure | None:
        path = Path(self.job["work"]) / "manifest.json"
        if not path.exists():
            return self._no_result()
        manifest, fault = load_manifest(path, self.job["scope"], self.job["step"])
        if manifest is None:
            return Failure("no result", fault)
        if manifest["key"] != self.job["key"]:
            return Failure("no result", "manifest.json is not of this execution")
        return None

    def _no_result(self) -> Failure:
        """Explain a missing manifest after a run without an error: usually a cell ended the notebook early."""
        for cell in archive.read_running(*self.place)["cells"]:
            if any(output.get("ename") == "SystemExit" for output in cell.get("outputs", [])):
                number = cell.get("execution_count")
                return Failure("no result", "the cell called sys.exit(), and no manifest was written", number)
        return Failure("no result", "every cell ran, but none wrote manifest.json (run.finish was not reached)")


def _redirect_output(log: Path) -> IO[str]:
    """Return the original standard output, for events; all other output, also the kernel's, goes to `log`."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return events


def _runtime_folder() -> Path:
    """Make a private folder whose path is short enough for the kernel's sockets."""
    limit = MAX_SOCKET_PATH - SOCKET_NAME
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(place)) <= limit and os.access(place, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="tnb-", dir=place))
    raise OSError(f"no writable temporary folder has a path of at most {limit} characters. Set TMPDIR to one.")


# These differ in every kernel.
JOB_VARIABLES = (record.JOB_VARIABLE, "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR")


def kernel_environment(job_path: str, parameters: dict[str, Any], runtime: Path) -> dict[str, str]:
    """Return the variables of the kernel: its job, its folders, and those of `common_environment`."""
    own = (str(Path(job_path).resolve()), str(runtime), str(runtime / "config"), str(runtime / "ipython"))
    return common_environment(parameters) | dict(zip(JOB_VARIABLES, own, strict=True))


def common_environment(parameters: dict[str, Any]) -> dict[str, str]:
    """Return the variables that turn off telemetry, the user's Jupyter settings, and the hub unless the job uses it."""
    fixed = {
        "JUPYTER_NO_CONFIG": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    default = {
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "DO_NOT_TRACK": "1",
        "WANDB_MODE": "disabled",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONHASHSEED": "0",
        # Threads that spin without a limit slow each other down when anything else runs; threads that sleep at once
        # are slow when nothing else does. A limited spin is best in both cases (see LOG.md).
        "GOMP_SPINCOUNT": "20000",
        # Rows of many sizes leave gaps in a GPU's memory that no later row fits into, unless segments can grow.
        "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    }
    offline = "0" if is_hub_id(parameters.get("base_model")) else "1"
    default |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), offline)
    return {name: os.environ.get(name, value) for name, value in default.items()} | fixed


def is_hub_id(model: str | None) -> bool:
    """True for `owner/name` on the hub, False for the name of the packaged model or a folder on this machine."""
    if not model or model.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return False
    return not (ROOT / model).exists() and not Path(model).exists()


def disk_error(error: BaseException | None) -> OSError | None:
    """The error of a disk that is full, broken or read-only, among an exception and those that it came from."""
    while error is not None and not (isinstance(error, OSError) and error.errno in DISK_ERRORS):
        error = error.__cause__ or error.__context__
    return error


def death_reason(
    code: int | None, out_of_memory: bool, peak_bytes: int | None = None, exception: str | None = None
) -> str:
    """Explain the death of a process.

    Args:
        code: Its exit code; negative: a signal; None: it still lives.
        out_of_memory: The system has killed a process for lack of memory meanwhile.
        peak_bytes: The largest memory use of the process, if known.
        exception: The last exception in its log.
    """
    used = f"; its largest memory use was {peak_bytes / 2**30:.1f} GiB" if peak_bytes else ""
    if out_of_memory:
        return f"out of memory: the system killed it{used}"
    if code == -signal.SIGKILL:
        return f"killed by SIGKILL, most often for lack of memory{used}"
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    if code is None:
        return "it stopped answering"
    return f"it ended with exit code {code}" + (f"; its log ends with {exception}" if code and exception else "")


def _literal(path: Path) -> str:
    """A path for papermill, which would put parameters in the place of what stands in braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
