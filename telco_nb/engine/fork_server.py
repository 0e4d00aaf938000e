"""Processes that need not import the heavy libraries: forked from one that has imported them, the fork server.

The runner starts `python -m telco_nb.engine.fork_server FD LIBRARY...` once and asks it for a process per job over the socket FD.
The new process (as `python -m telco_nb.engine.job`) has already forked its kernel (as `python -m telco_nb.engine.kernel`),
which waits to be told its command, environment, folder and log. The modules of telco_nb are imported before the forks,
too, and the packaged model is loaded; a fork server whose sources have changed since is replaced (`is_outdated`). Whatever
does not fit gets an ordinary process.
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

from telco_nb import PACKAGE_DIR, ROOT

SWITCH = "TELCO_NB_WARM_KERNELS"  # 0: never, 1: always where possible, unset: if more than one job is to run
# The first three start threads that end before a fork and start anew after it. No other may start any: a thread of
# libgomp, for one, would mean that a parallel region has run, and after that a fork can hang in the next one.
THREADED = ("numpy", "scipy.linalg", "pyarrow")
LIBRARIES = (
    *THREADED, "pandas", "seaborn", "torch", "transformers.trainer", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.models.llama.modeling_llama",
    "transformers.models.qwen2.modeling_qwen2", "peft", "peft.tuners.lora", "safetensors", "IPython",
    "ipykernel.ipkernel", "ipykernel.kernelapp", "ipykernel.debugger", "jupyter_client", "papermill", "pydantic.types",
    "pydantic.json_schema", "carbontracker.tracker", "matplotlib_inline.backend_inline", "IPython.core.pylabtools",
    "IPython.core.completerlib", "IPython.extensions.storemagic", "sqlite3", "torch.nn.attention.varlen",
    "pandas.io.formats.html", "tornado.platform.asyncio", "telco_nb.engine.job", "telco_nb.engine.kernel", "telco_nb.lora.base_model",
    "telco_nb.lora.trainer", "telco_nb.lora.decoding", "telco_nb.lora.preflight", "IPython.core.debugger", "IPython.core.oinspect",
    "IPython.core.logger",
)  # fmt: skip
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/proc/driver/nvidia", "/dev/dxg", "/dev/kfd")
START_SECONDS = 120.0
POLL_SECONDS = 0.2
MESSAGE_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1


# ---------------------------------------------------------------- messages: JSON and open files


def send(channel: socket.socket, message: dict[str, Any], files: tuple[int, ...] = ()) -> None:
    socket.send_fds(channel, [json.dumps(message).encode()], files)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next message with its open files; None if the other side is gone."""
    data, files, _, _ = socket.recv_fds(channel, MESSAGE_BYTES, 8)
    return (json.loads(data), files) if data else None


# ---------------------------------------------------------------- the runner's side


def is_useful(jobs: int) -> bool:
    """Whether to start a fork server for so many jobs: Linux only, never beside a GPU (CUDA does not survive a fork)."""
    wish = os.environ.get(SWITCH)
    possible = sys.platform == "linux" and hasattr(os, "pidfd_open") and not any(map(os.path.exists, GPU_DEVICES))
    return possible and wish != "0" and (jobs > 1 or wish == "1")


def source_states() -> dict[str, tuple[int, int]]:
    """When each module of telco_nb was last changed (ns), and its size."""
    states = {str(path): path.stat() for path in PACKAGE_DIR.rglob("*.py")}
    return {name: (state.st_mtime_ns, state.st_size) for name, state in states.items()}


class ForkServer:
    """The process that has imported everything, as the runner sees it. `environment` is that of the kernels to come."""

    def __init__(self, environment: dict[str, str]):
        self.sources = source_states()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.channel.settimeout(START_SECONDS)
        nowhere = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        command = [sys.executable, "-m", "telco_nb.engine.fork_server", str(theirs.fileno()), *LIBRARIES]
        with theirs:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, **nowhere
            )
        self.ready = False

    def is_outdated(self) -> bool:
        """Whether a source has changed since this began: then what it imported may not be what a job is to run."""
        return source_states() != self.sources

    def fork(self, job_file: Path, log: IO[bytes], lock: IO[str], keep_waiting: Callable[[], bool]) -> ForkedJob | None:
        """The process of a job, or None if there is none to be had: then start an ordinary one.

        `keep_waiting` is asked now and then, while the libraries are being imported, whether to wait any longer.
        """
        if self.process.returncode is not None:
            return None
        read, write = os.pipe()
        answer = None
        with contextlib.suppress(OSError):
            if self.wait_until_ready(keep_waiting):
                order = {"job": str(job_file), "environment": dict(os.environ)}
                send(self.channel, order, (write, log.fileno(), lock.fileno()))
                answer = receive(self.channel)
        os.close(write)
        if answer is None or "pid" not in answer[0]:
            os.close(read)
            self.close()
            return None
        return ForkedJob(answer[0]["pid"], os.fdopen(read, encoding="utf-8"), self.channel)

    def wait_until_ready(self, keep_waiting: Callable[[], bool]) -> bool:
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
    """A job's process, with the part of subprocess.Popen that the runner uses."""

    def __init__(self, pid: int, stdout: IO[str], channel: socket.socket):
        self.pid, self.stdout, self.channel = pid, stdout, channel
        self.returncode: int | None = None

    def wait(self) -> int:
        """Wait for the end, and say how it came. A process whose fork server died counts as killed, and is."""
        if self.returncode is None:
            self.channel.settimeout(None)
            answer = None
            with contextlib.suppress(OSError):
                answer = receive(self.channel)
            if answer is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.pid, signal.SIGKILL)
            self.returncode = answer[0]["exit_code"] if answer else -signal.SIGKILL
            self.channel.settimeout(START_SECONDS)
        return self.returncode


# ---------------------------------------------------------------- the fork server


def main(channel: socket.socket, libraries: list[str]) -> int:
    """Import, then fork a process for each order. Returns in the forked processes only, with their exit status."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # when the runner is gone, there is nothing to do
    if select.select([channel], [], [], 0)[0]:  # nothing was sent yet, so this is the end of it
        os._exit(0)
    fresh = StartState()
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")  # as ipykernel does
    for library in libraries:
        threads = _thread_count()
        importlib.import_module(library)
        if _thread_count() > threads and library not in THREADED:
            return 1
    _warm_up()
    fresh.added = {k: v for k, v in os.environ.items() if k not in fresh.environment and k != "MPLBACKEND"}
    if not _load_model():
        return 1
    send(channel, {"ready": True})
    while order := receive(channel):
        me = os.getpid()
        pid = os.fork()
        if pid == 0:
            return _run_job(*order, me, channel, fresh)
        for file in order[1]:
            os.close(file)
        send(channel, {"exit_code": _wait_for(pid, channel)})
        if not _load_model():
            return 1
    os._exit(0)


class StartState:
    """What a new process would find at its start, and what the imports `added` to the environment."""

    def __init__(self) -> None:
        self.environment, self.path = dict(os.environ), sys.path[1:]
        self.added: dict[str, str] = {}


def _warm_up() -> None:
    """What takes longest for the first time: fonts and image formats, the schema of notebooks, versions of packages."""
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
    """The packaged model, once a job has unpacked it; False if that has left a thread, with which no fork is safe."""
    threads = _thread_count()
    if "telco_nb.lora.base_model" in sys.modules:
        sys.modules["telco_nb.lora.base_model"].preload()
    gc.freeze()  # the libraries' million objects stay shared after a fork, and no collection walks through them again
    return _thread_count() <= threads


def _thread_count() -> int:
    return len([*Path("/proc/self/task").iterdir()])


def _wait_for(pid: int, channel: socket.socket) -> int:
    """The exit code of a job. If the runner hangs up, so does the fork server: the job will notice."""
    descriptor = os.pidfd_open(pid)
    if channel in select.select([channel, descriptor], [], [])[0]:
        os._exit(0)
    os.close(descriptor)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- a job's process and its kernel


def _run_job(order: dict[str, Any], files: list[int], parent: int, channel: socket.socket, fresh: StartState) -> int:
    """What `python -m telco_nb.engine.job` does, with a kernel at hand."""
    os.setsid()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        for end in (channel, ours):
            end.close()
        for file in files:
            os.close(file)
        return _run_kernel(theirs, fresh)
    theirs.close()
    for file, standard in zip(files, (1, 2), strict=False):  # the third is the lock, which stays open
        os.dup2(file, standard)
        os.close(file)
    os.environ.clear()
    os.environ.update(order["environment"])
    sys.argv[1:] = [order["job"], str(parent)]
    send(channel, {"pid": os.getpid()})
    channel.close()
    importlib.invalidate_caches()
    from telco_nb.engine import job

    code = job.main(order["job"], parent, ForkedKernel(pid, ours, fresh.environment))
    sys.stdout.flush()
    os._exit(code)  # to take the libraries down as Python does at its end would take seconds


def _run_kernel(orders: socket.socket, fresh: StartState) -> int:
    """What `python -m telco_nb.engine.kernel` does, once told to; nothing if nobody does."""
    os.setsid()
    if "numpy" in sys.modules:  # random reseeds itself in a fork, and torch starts from a constant
        sys.modules["numpy"].random.seed()
    send(orders, {"ready": True})
    order = receive(orders)
    if order is None:
        os._exit(0)
    orders.close()
    for file, standard in zip(order[1], (1, 2), strict=True):
        os.dup2(file, standard)
        os.close(file)
    os.environ.clear()
    os.environ.update({**fresh.added, **order[0]["environment"]})
    os.chdir(order[0]["folder"])
    sys.path[:] = [str(Path.cwd()), *fresh.path]
    importlib.invalidate_caches()
    from telco_nb.engine import kernel

    sys.argv[:] = [kernel.__file__, *order[0]["arguments"]]
    kernel.main()
    return 0


class ForkedKernel:
    """A forked kernel that waits for its orders, with the part of subprocess.Popen that jupyter_client uses.

    A child of this process, so that its exit status is known and nobody else can collect it.
    """

    stdin = stdout = stderr = None

    def __init__(self, pid: int, orders: socket.socket, environment: dict[str, str]):
        self.pid, self.orders, self.environment = pid, orders, environment
        self.returncode: int | None = None

    def start(self, arguments: list[str], environment: dict[str, str], folder: str, own: tuple[str, ...]) -> bool:
        """Set it going; False if it cannot be, because a variable other than its `own` is not what the imports saw."""
        own = (*own, "JPY_PARENT_PID", "JPY_SESSION_NAME")
        seen, wanted = ({k: v for k, v in e.items() if k not in own} for e in (self.environment, environment))
        started = False
        with contextlib.suppress(OSError):
            if seen == wanted and receive(self.orders):
                environment = {**environment, "JPY_PARENT_PID": str(os.getpid())}
                order = {"arguments": arguments, "environment": environment, "folder": folder}
                send(self.orders, order, (1, 2))
                started = True
        self.orders.close()
        if not started:
            self.kill()
            self.wait()
        return started

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode  # type: ignore[return-value]

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]))
