"""The fork server imports the heavy libraries once and forks a process for each job.

The runner starts `python -m telco_nb.engine.fork_server FD LIBRARY...` and requests one process per job over the socket
FD. A forked process does what `python -m telco_nb.engine.job` does. Before that it forks its kernel, which waits for
its arguments, environment, folder and log and then does what `python -m telco_nb.engine.kernel` does. The fork server
also imports modules of telco_nb and loads the packaged model; the runner replaces it when a source has changed. Where
a fork is not possible, the job or the kernel starts as an ordinary process. Beside a GPU of NVIDIA it forks only while
nothing that it imports has started the driver: a forked process cannot use a driver that its parent has started.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from telco_nb import ROOT

SWITCH = "TELCO_NB_WARM_KERNELS"  # 0: never, 1: where possible, unset: for more than one job
# These three start threads that end before a fork and start again after it. No other library may start a thread: a
# thread of libgomp, for example, means that a parallel region has run, and then the next one can hang after a fork.
THREADED = ("numpy", "scipy.linalg", "pyarrow")
LIBRARIES = (
    *THREADED, "pandas", "seaborn", "torch", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2", "peft", "peft.tuners.lora", "safetensors", "IPython",
    "ipykernel.ipkernel", "ipykernel.kernelapp", "ipykernel.debugger", "jupyter_client", "papermill", "pydantic.types",
    "pydantic.json_schema", "carbontracker.tracker", "matplotlib_inline.backend_inline", "IPython.core.pylabtools",
    "IPython.core.completerlib", "IPython.extensions.storemagic", "sqlite3", "torch.nn.attention.varlen",
    "pandas.io.formats.html", "tornado.platform.asyncio", "telco_nb.engine.job", "telco_nb.engine.kernel",
    "telco_nb.engine.kernel_manager", "telco_nb.lora.base_model", "telco_nb.lora.trainer", "telco_nb.lora.decoding",
    "telco_nb.lora.preflight", "IPython.core.debugger", "IPython.core.oinspect", "IPython.core.logger",
)  # fmt: skip
OTHER_GPUS = ("/dev/dxg", "/dev/kfd")  # WSL and AMD: not tried
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # 1: torch asks the sensors' library for a GPU, which starts no driver
CUDA_LIBRARY, NOT_STARTED = "libcuda.so.1", 3  # what cuCtxGetCurrent answers before cuInit: CUDA_ERROR_NOT_INITIALIZED
START_SECONDS = 120.0
POLL_SECONDS = 0.2
MESSAGE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


# ---------------------------------------------------------------- messages: JSON and open files


def send(channel: socket.socket, message: dict[str, Any], files: tuple[int, ...] = ()) -> None:
    socket.send_fds(channel, [json.dumps(message).encode()], files)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Return the next message with its open files; None if the other side has closed the channel."""
    data, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 8)
    return (json.loads(data), files) if data else None


# ---------------------------------------------------------------- the runner's side


def is_useful(jobs: int) -> bool:
    """True if a fork server should run for so many jobs: on Linux only."""
    choice = os.environ.get(SWITCH)
    possible = sys.platform == "linux" and hasattr(os, "pidfd_open") and not any(map(os.path.exists, OTHER_GPUS))
    return possible and choice != "0" and (jobs > 1 or choice == "1")


def _source_states() -> tuple[tuple[str, int, int], ...]:
    """The state of every source; imported here, so that a forked kernel holds no more modules than a fresh one."""
    from telco_nb.study.imports import source_states

    return source_states()


class ForkServer:
    """Starts the fork server with the `environment` of later kernels, and requests processes from it."""

    def __init__(self, environment: dict[str, str]):
        self.sources = _source_states()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fd = theirs.fileno()
        streams: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, "-m", "telco_nb.engine.fork_server", str(fd), *LIBRARIES]
        with theirs:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=[fd], start_new_session=True, **streams
            )
        self.ready = False

    def is_outdated(self) -> bool:
        """True if a source has changed since the start: the imported modules may not be what a job has to run."""
        return _source_states() != self.sources

    def fork(self, job_file: Path, log: IO[bytes], lock: IO[str], keep_waiting: Callable[[], bool]) -> ForkedJob | None:
        """Fork the process of a job.

        Args:
            job_file: The job, as Runner.write_job writes it.
            log: The standard error of the process.
            lock: The lock file, which the process keeps open.
            keep_waiting: Called every POLL_SECONDS during the imports; False gives up.

        Returns:
            The process, or None if there is none; then the caller starts an ordinary process.
        """
        if self.process.returncode is not None:
            return None
        read, write = os.pipe()
        answer = None
        with contextlib.suppress(OSError):
            if self.wait_until_ready(keep_waiting):
                self.channel.settimeout(START_SECONDS)
                request = {"job": str(job_file), "environment": dict(os.environ)}
                send(self.channel, request, (write, log.fileno(), lock.fileno()))
                answer = receive(self.channel)
        os.close(write)
        if answer is None or "pid" not in answer[0]:
            os.close(read)
            self.close()
            return None
        return ForkedJob(answer[0]["pid"], os.fdopen(read, encoding="utf-8"), self.channel)

    def wait_until_ready(self, keep_waiting: Callable[[], bool]) -> bool:
        """Wait for the end of the imports; False after START_SECONDS, after an error and if `keep_waiting` says so."""
        deadline = time.monotonic() + START_SECONDS
        while not self.ready and time.monotonic() < deadline and keep_waiting():
            if select.select([self.channel], [], [], POLL_SECONDS)[0]:
                self.ready = receive(self.channel) is not None
                break
        return self.ready

    def close(self) -> None:
        self.channel.close()
        self.process.kill()
        self.process.wait()


class ForkedJob:
    """The process of a job, with the part of subprocess.Popen that a worker uses."""

    def __init__(self, pid: int, stdout: IO[str], channel: socket.socket):
        self.pid, self.stdout, self.channel = pid, stdout, channel
        self.returncode: int | None = None

    def wait(self) -> int:
        """Wait for the end and return the exit code. If the fork server dies, kill the process."""
        if self.returncode is None:
            self.channel.settimeout(None)
            answer = None
            with contextlib.suppress(OSError):
                answer = receive(self.channel)
            if answer is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self.returncode = answer[0]["exit_code"] if answer else -signal.SIGKILL
        return self.returncode


# ---------------------------------------------------------------- the fork server


def main(channel: socket.socket, libraries: list[str]) -> int:
    """Import the libraries, then fork a process for each request. Returns in forked processes and after a failure."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # die with the runner
    if select.select([channel], [], [], 0)[0]:  # nothing was sent yet: the runner died before prctl
        os._exit(0)
    start = StartState()
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel does
    os.environ.setdefault(NVML_CHECK, "1")
    if not _import_all(libraries):
        return 1
    _warm_up()
    own = ("MPLBACKEND", NVML_CHECK)
    start.added = {k: v for k, v in os.environ.items() if k not in start.environment and k not in own}
    if not _load_model():
        return 1
    send(channel, {"ready": True})
    while request := receive(channel):
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            return _run_job(*request, server, channel, start)
        for file in request[1]:
            os.close(file)
        send(channel, {"exit_code": _wait_for(pid, channel)})
        if not _load_model():
            return 1
    os._exit(0)


def _import_all(libraries: list[str]) -> bool:
    """Import libraries; False after one that leaves a thread or starts a GPU's driver, since no fork would be safe."""
    for library in libraries:
        threads = _thread_count()
        importlib.import_module(library)
        if (_thread_count() > threads and library not in THREADED) or _has_started_cuda():
            return False
    return True


class StartState:
    """The environment and module path at the start, and the variables that the imports `added`."""

    def __init__(self) -> None:
        self.environment, self.path = dict(os.environ), sys.path[1:]
        self.added: dict[str, str] = {}


def _warm_up() -> None:
    """Do what is slow only the first time: load fonts and image formats, the notebook schema, package versions."""
    if "matplotlib" in sys.modules:
        from matplotlib import pyplot

        figure, _ = pyplot.subplots()
        figure.savefig(io.BytesIO())
        pyplot.close(figure)
    if "nbformat" in sys.modules:
        import nbformat

        nbformat.validate(nbformat.v4.new_notebook())
    if "telco_nb.study.content_key" in sys.modules:
        sys.modules["telco_nb.study.content_key"].versions()


def _load_model() -> bool:
    """Load the packaged model once a job has unpacked it; False if a thread or a GPU's driver makes a fork unsafe."""
    threads = _thread_count()
    if "telco_nb.lora.base_model" in sys.modules:
        sys.modules["telco_nb.lora.base_model"].preload()
    gc.freeze()  # a collection would write to the libraries' million objects, which then are no longer shared
    return _thread_count() <= threads and not _has_started_cuda()


def _has_started_cuda() -> bool:
    """Whether this process has started the driver of NVIDIA's GPUs."""
    try:
        driver = ctypes.CDLL(CUDA_LIBRARY)
    except OSError:  # there is none
        return False
    return driver.cuCtxGetCurrent(ctypes.byref(ctypes.c_void_p())) != NOT_STARTED


def _thread_count() -> int:
    return len([*Path("/proc/self/task").iterdir()])


def _wait_for(pid: int, channel: socket.socket) -> int:
    """Return the exit code of a job. If the runner closes the channel, exit: the job notices that and ends, too."""
    descriptor = os.pidfd_open(pid)
    if channel in select.select([channel, descriptor], [], [])[0]:
        os._exit(0)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- a job's process and its kernel


def _run_job(request: dict[str, Any], files: list[int], server: int, channel: socket.socket, start: StartState) -> int:
    """Fork a kernel, then do what `python -m telco_nb.engine.job` does."""
    os.setsid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        for end in (channel, ours):
            end.close()
        for file in files:
            os.close(file)
        return _run_kernel(theirs, start)
    theirs.close()
    _take_over(files, request["environment"])
    sys.argv[1:] = [request["job"], str(server)]
    send(channel, {"pid": os.getpid()})
    channel.close()
    from telco_nb.engine import job

    code = job.main(request["job"], server, ForkedKernel(pid, ours, start.environment, job.JOB_VARIABLES))
    sys.stdout.flush()
    os._exit(code)  # Python's own exit would spend seconds on the libraries


def _run_kernel(channel: socket.socket, start: StartState) -> int:
    """Wait for a request, then do what `python -m telco_nb.engine.kernel` does; exit if the channel closes first."""
    os.setsid()
    if "numpy" in sys.modules:  # random seeds itself anew after a fork, and torch starts from a constant
        sys.modules["numpy"].random.seed()
    send(channel, {"ready": True})
    message = receive(channel)
    if message is None:
        os._exit(0)
    channel.close()
    request, files = message
    _take_over(files, {**start.added, **request["environment"]})
    os.chdir(request["folder"])
    sys.path[:] = [str(Path.cwd()), *start.path]
    from telco_nb.engine import kernel

    sys.argv[:] = [kernel.__file__, *request["arguments"]]
    kernel.main()
    return 0


def _take_over(files: list[int], environment: dict[str, str]) -> None:
    """Use the first two files as standard output and error, and replace the environment."""
    for file, standard in zip(files, (1, 2), strict=False):  # a third is the lock, which stays open
        os.dup2(file, standard)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    importlib.invalidate_caches()


class ForkedKernel:
    """A forked kernel that waits for its request, with the part of subprocess.Popen that jupyter_client uses.

    It is a child of the job's process, so that only this process can collect its exit code.
    """

    def __init__(self, pid: int, channel: socket.socket, environment: dict[str, str], own: tuple[str, ...]):
        # `environment` is what the imports saw; the kernel's `own` variables may differ from it
        self.pid, self.channel, self.environment = pid, channel, environment
        self.own: tuple[str, ...] = (*own, "JPY_PARENT_PID", "JPY_SESSION_NAME")
        self.returncode: int | None = None

    def start(self, arguments: list[str], environment: dict[str, str], folder: str) -> bool:
        """Send the request to the kernel.

        Args:
            arguments: Command line arguments of ipykernel.
            environment: All variables of the kernel.
            folder: Working directory.

        Returns:
            True if the kernel starts. False if it cannot, because a variable differs; the kernel is then killed.
        """
        seen, wanted = ({k: v for k, v in e.items() if k not in self.own} for e in (self.environment, environment))
        started = False
        with contextlib.suppress(OSError):
            if seen == wanted and receive(self.channel):
                environment = {**environment, "JPY_PARENT_PID": str(os.getpid())}
                request = {"arguments": arguments, "environment": environment, "folder": folder}
                send(self.channel, request, (1, 2))
                started = True
        self.channel.close()
        if not started:
            os.kill(self.pid, signal.SIGKILL)
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return started

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
