"""One notebook, executed in a process of its own: `python -m telco_nb.engine.job job.json [parent pid]`.

The runner starts this process, reads its events (one JSON object a line on standard output) and believes nothing but
the manifest. A run counts as a success only if papermill reached the end *and* the work folder holds a manifest with
the job's key: papermill alone calls a killed kernel, and `sys.exit(0)` in a cell, a success.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from telco_nb import ROOT
from telco_nb.engine.archive import (
    Failure,
    is_executed,
    keep_failed,
    keep_record,
    read_running,
    running_log,
    running_notebook,
)
from telco_nb.study import record

START_SECONDS = 120  # a busy machine may need a while to start a kernel
END_SECONDS = 5.0  # for a killed kernel to be gone
POLL_SECONDS = 0.3
RECONNECT_MS = 5  # how often our sockets look for the kernel's, which come later; ZeroMQ's own 100 ms add up
MAX_SOCKET_PATH = 104  # bytes; macOS has the shortest limit
SOCKET_NAME = 24  # /tnb-xxxxxxxx/k-ipc-5 and the terminating zero


def main(job_path: str, parent: int | None = None, warm: Any = None) -> int:
    """Execute the job in `job_path`; returns 0 if it left a valid result, else 1. `parent` is a pid to die with.

    `warm` is a fork_server.ForkedKernel that waits for its orders, if there is one.
    """
    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    root, scope, step = Path(job["root"]), job["scope"], job["step"]
    running_notebook(root, scope, step).unlink(missing_ok=True)
    events = _redirect_output(running_log(root, scope, step))
    runtime = _runtime_folder()
    execution = Execution(job, events, runtime, warm)
    if parent is not None:
        threading.Thread(target=execution.die_with, args=(parent,), daemon=True).start()
    try:
        os.environ.update(kernel_environment(job_path, job["parameters"], runtime))
        failure = execution.run()
    finally:
        execution.kill_kernel()
        shutil.rmtree(runtime, ignore_errors=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # the rest is short and must not be cut in two
        signal.signal(number, signal.SIG_IGN)
    if failure is None:
        keep_record(root, scope, step)
    else:
        keep_failed(root, scope, step, failure)
    execution.wait_for_kernel()
    execution.send(end=failure and asdict(failure))
    return 0 if failure is None else 1


class Execution:
    """The run, and the state that it shares with the signal handlers and with the watch on the parent."""

    def __init__(self, job: dict[str, Any], events: Any, runtime: Path, warm: Any = None):
        self.job, self.events, self.runtime, self.warm = job, events, runtime, warm
        self.root, self.scope, self.step = Path(job["root"]), job["scope"], job["step"]
        self.kernel: Any = None  # subprocess.Popen of the kernel
        self.cell: int | None = None  # number of the code cell that runs, from 1
        self.interrupted = False

    def send(self, **event: Any) -> None:
        """Tell the runner; a runner that is gone is none of our business here."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.events.write(json.dumps(event) + "\n")
            self.events.flush()

    def run(self) -> Failure | None:
        """Run the notebook; None means success, with a manifest to show for it."""
        kills_before = oom_kills()
        signal.signal(signal.SIGINT, self._on_interrupt)
        signal.signal(signal.SIGTERM, self._on_terminate)
        try:
            self._papermill()
        except BaseException as error:
            return self._classify(error, oom_kills() > kills_before)
        return self._check_manifest()

    def _papermill(self) -> None:
        import papermill

        notebook = Path(self.job["notebook"])
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        total = sum(map(is_executed, cells)) + bool(self.job["parameters"])  # one cell with the parameters is injected
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        papermill.execute_notebook(
            str(notebook),
            str(running_notebook(self.root, self.scope, self.step)),
            parameters=self.job["parameters"],
            kernel_name="python3",
            engine_name=_engine(),
            kernel_manager_class=_manager_class(self.runtime, self._on_kernel, self.warm),
            progress_bar=False,
            log_output=True,
            coalesce_streams=True,
            store_widget_state=False,
            start_timeout=START_SECONDS,
            execution_timeout=self.job.get("timeout_seconds"),
            iopub_timeout=60,
            shutdown_kernel="immediate",  # whatever counts is on disk by now; to go quietly takes most of a second
            on_cell_start=lambda cell, cell_index: self._on_cell(cell, total),
            cwd=str(notebook.parent),
        )

    def _on_kernel(self, process: Any) -> None:
        self.kernel = process
        self.send(kernel_pid=process.pid, runtime=str(self.runtime), warm=process is self.warm)

    def _on_cell(self, cell: Any, total: int) -> None:
        if self.interrupted:  # between two cells, where the kernel ignores the signal
            raise KeyboardInterrupt
        if is_executed(cell):
            self.cell = (self.cell or 0) + 1
            self.send(cell=self.cell, of=total)

    # ------------------------------------------------ signals: SIGINT interrupts the cell, SIGTERM ends the kernel

    def _on_interrupt(self, *_: Any) -> None:
        self.interrupted = True
        if self.kernel is None or self.cell is None:
            raise KeyboardInterrupt
        self._signal_kernel(signal.SIGINT)

    def _on_terminate(self, *_: Any) -> None:
        self.interrupted = True
        self.kill_kernel()
        raise KeyboardInterrupt

    def _signal_kernel(self, number: int) -> None:
        # The kernel leads a process group of its own: this reaches what the notebook started, too.
        if self.kernel is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.kernel.pid, number)

    def kill_kernel(self) -> None:
        """Kill the kernel and whatever the notebook left running."""
        self._signal_kernel(signal.SIGKILL)

    def wait_for_kernel(self) -> None:
        """Until the killed kernel has given its memory back, which takes a while."""
        deadline = time.monotonic() + END_SECONDS
        while self.kernel is not None and self.kernel.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)

    def die_with(self, parent: int) -> None:
        """Wait until the runner is gone, then leave nothing behind."""
        while os.getppid() == parent:
            time.sleep(POLL_SECONDS)
        self.kill_kernel()
        shutil.rmtree(self.runtime, ignore_errors=True)
        os._exit(1)

    # ------------------------------------------------ what happened

    def _classify(self, error: BaseException, out_of_memory: bool) -> Failure:
        from nbclient.exceptions import CellTimeoutError, DeadKernelError
        from papermill.exceptions import PapermillExecutionError

        if self.interrupted:
            return Failure("interrupted", "stopped before the end", self.cell)
        if isinstance(error, PapermillExecutionError):
            text = " ".join(str(error.evalue).split())[:300]
            return Failure("error", f"{error.ename}: {text}".removesuffix(": "), error.exec_count or self.cell)
        if isinstance(error, CellTimeoutError):
            limit = self.job.get("timeout_seconds")
            return Failure("timeout", f"the cell did not end within {limit} s", self.cell)
        code = self.kernel.poll() if self.kernel else None
        if isinstance(error, DeadKernelError) or code is not None:
            return Failure("died", death_reason(code, out_of_memory), self.cell)
        return Failure("not started", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", self.cell)

    def _check_manifest(self) -> Failure | None:
        try:
            found = json.loads((Path(self.job["work"]) / "manifest.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            return self._no_result()
        except json.JSONDecodeError:
            return Failure("no result", "manifest.json is not readable")
        if found.get("status") != "ok" or found.get("key") != self.job["key"]:
            return Failure("no result", "manifest.json is not of this execution")
        return None

    def _no_result(self) -> Failure:
        """Papermill was content but nothing was recorded: usually a cell ended the notebook early."""
        for cell in read_running(self.root, self.scope, self.step)["cells"]:
            if any(output.get("ename") == "SystemExit" for output in cell.get("outputs", [])):
                number = cell.get("execution_count")
                return Failure("no result", "the cell called sys.exit(), and no manifest was written", number)
        return Failure("no result", "every cell ran, but none wrote manifest.json (run.finish was not reached)")


def _redirect_output(log: Path) -> Any:
    """Events keep the original standard output; all else that is printed, by the kernel too, goes to `log`."""
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    return events


def _runtime_folder() -> Path:
    """A new private folder whose path is short enough for the kernel's sockets."""
    room = MAX_SOCKET_PATH - SOCKET_NAME
    for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
        if len(os.fsencode(place)) <= room and os.access(place, os.W_OK):
            return Path(tempfile.mkdtemp(prefix="tnb-", dir=place))
    raise OSError(f"no writable temporary folder has a path of at most {room} characters. Set TMPDIR to one.")


def _engine() -> str:
    """The name of papermill's own engine, but for cells of prose: it would write the whole notebook twice for each."""
    from papermill.engines import NBClientEngine, papermill_engines

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> Any:
            for name in ("cell_start", "cell_complete"):
                setattr(nb_man, name, partial(_if_executed, getattr(nb_man, name)))
            return super().execute_managed_notebook(nb_man, *arguments, **options)

    papermill_engines.register("telco_nb", Engine)
    return "telco_nb"


def _if_executed(note: Callable[..., Any], cell: Any, *arguments: Any, **options: Any) -> None:
    if is_executed(cell):
        note(cell, *arguments, **options)


def _manager_class(runtime: Path, on_kernel: Callable[[Any], None], warm: Any = None) -> type:
    """A kernel manager that works without a network, starts this very interpreter, and tells who its kernel is.

    The kernel is `warm` (a fork_server.ForkedKernel) if that is given and can be had, else a process of its own.
    """
    from jupyter_client import AsyncKernelClient, AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from jupyter_client.provisioning import LocalProvisioner

    class ThisInterpreter(KernelSpecManager):
        # A kernel called python3 in the user's folder may belong to another environment: never look there.
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            command = [sys.executable, "-m", "telco_nb.engine.kernel", "-f", "{connection_file}"]
            return KernelSpec(argv=command, display_name="Python 3", language="python")

    class Provisioner(LocalProvisioner):
        async def launch_kernel(self, cmd: list[str], **options: Any) -> dict[str, Any]:
            folder = options.get("cwd") or str(Path.cwd())
            if warm is None or not warm.start(cmd[3:], options["env"], folder, JOB_VARIABLES):
                return await super().launch_kernel(cmd, **options)
            self.process, self.pid, self.pgid, self.cwd = warm, warm.pid, warm.pid, folder
            return self.connection_info

        async def wait(self) -> int | None:
            self.process = None  # as _async_wait below
            return 0

    class Client(AsyncKernelClient):
        async def wait_for_ready(self, timeout: float = START_SECONDS) -> None:
            # As its parent's, which then waits 200 ms more for messages that nobody would read.
            until = time.monotonic() + timeout
            while time.monotonic() < until and await self.is_alive():
                self.kernel_info()
                with contextlib.suppress(queue.Empty):
                    reply = await self.get_shell_msg(timeout=1)
                    await self.get_iopub_msg(timeout=0.05)  # nothing comes while that socket is not connected
                    self._handle_kernel_info_reply(reply)
                    return
            raise RuntimeError(f"the kernel did not answer within {timeout:.0f} s")

    class Manager(AsyncKernelManager):
        def __init__(self, **options: Any):
            # The sockets are made beside the connection file: k-ipc-1 to k-ipc-5.
            place = {"transport": "ipc", "connection_file": str(runtime / "k.json")}
            super().__init__(kernel_spec_manager=ThisInterpreter(), client_factory=Client, **place, **options)
            self.provisioner = Provisioner(kernel_id="", kernel_spec=self.kernel_spec, parent=self)

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            await super()._async_launch_kernel(kernel_cmd, **options)
            on_kernel(self.provisioner.process)

        def client(self, **options: Any) -> Any:
            client = super().client(**options)
            client.context.rcvhwm = 0  # as in telco_nb.engine.kernel: no limit on waiting messages, none lost
            client.context.reconnect_ivl = RECONNECT_MS
            return client

        async def _async_wait(self, pollinterval: float = 0.0) -> None:
            """For the end of a killed kernel: main does that, when all else is done."""

    return Manager


# ---------------------------------------------------------------- the kernel's surroundings

JOB_VARIABLES = (
    record.JOB_VARIABLE,
    "JUPYTER_RUNTIME_DIR",
    "JUPYTER_CONFIG_DIR",
    "IPYTHONDIR",
)  # differ in every kernel


def kernel_environment(job_path: str, parameters: dict[str, Any], runtime: Path) -> dict[str, str]:
    """Variables for the kernel: its job and folders, and those that do not depend on the job."""
    own = (str(Path(job_path).resolve()), str(runtime), str(runtime / "config"), str(runtime / "ipython"))
    return common_environment(parameters) | dict(zip(JOB_VARIABLES, own, strict=True))


def common_environment(parameters: dict[str, Any]) -> dict[str, str]:
    """No settings of the user's Jupyter, no telemetry, no hub unless `parameters` ask for it."""
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
        # Threads that wait by spinning without end take the cores from each other as soon as anything else runs;
        # threads that sleep at once are slow when nothing does. A bounded spin is best in both (see LOG.md).
        "GOMP_SPINCOUNT": "20000",
    }
    offline = "0" if is_hub_id(parameters.get("base_model")) else "1"
    default |= dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), offline)
    return {name: os.environ.get(name, value) for name, value in default.items()} | fixed


def is_hub_id(model: str | None) -> bool:
    """`owner/name` on the hub, as opposed to a packaged model's name or a folder on this machine."""
    if not model or model.startswith(".") or not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        return False
    return not (ROOT / model).exists() and not Path(model).exists()


def oom_kills() -> int:
    """How many processes the system has killed for memory so far; 0 where it does not say."""
    for name in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with contextlib.suppress(OSError):
            found = re.search(r"^oom_kill (\d+)$", Path(name).read_text(encoding="utf-8"), flags=re.M)
            if found:
                return int(found.group(1))
    return 0


def death_reason(code: int | None, out_of_memory: bool) -> str:
    """Why a kernel died, from its exit status (negative: a signal)."""
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    used = f"; its largest memory use was {peak / 2**30:.1f} GiB"
    if out_of_memory:
        return f"out of memory: the system killed it{used}"
    if code == -signal.SIGKILL:
        return f"killed by SIGKILL, most often for lack of memory{used}"
    if code is not None and code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"it ended with exit code {code}" if code is not None else "it stopped answering"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None))
