"""The kernel manager of a job: no network, the Python that runs the job, and a forked kernel where there is one."""

from __future__ import annotations

import contextlib
import queue
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from jupyter_client import AsyncKernelClient, AsyncKernelManager
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.provisioning import LocalProvisioner
from papermill.engines import NBClientEngine, papermill_engines

from telco_nb.engine.archive import is_executed

START_SECONDS = 120  # a busy machine may need a while to start a kernel
RECONNECT_MS = 5  # how often a client looks for the kernel's sockets, which come later; ZeroMQ's 100 ms add up


class WaitingKernel(Protocol):
    """The parts of fork_server.ForkedKernel that a job uses."""

    pid: int

    def start(self, arguments: list[str], environment: dict[str, str], folder: str) -> bool: ...

    def poll(self) -> int | None: ...


def register_engine() -> str:
    """Register papermill's own engine without the two writes of the notebook per text cell; returns its name."""
    papermill_engines.register("telco_nb", _Engine)
    return "telco_nb"


class _Engine(NBClientEngine):
    @classmethod
    def execute_managed_notebook(cls, nb_man: Any, *arguments: Any, **options: Any) -> Any:
        for name in ("cell_start", "cell_complete"):
            setattr(nb_man, name, partial(_call_if_executed, getattr(nb_man, name)))
        return super().execute_managed_notebook(nb_man, *arguments, **options)


def _call_if_executed(callback: Callable[..., Any], cell: Any, *arguments: Any, **options: Any) -> None:
    if is_executed(cell):
        callback(cell, *arguments, **options)


class _ThisInterpreter(KernelSpecManager):
    # A kernel called python3 in the user's folder may belong to another environment: never look there.
    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        command = [sys.executable, "-m", "telco_nb.engine.kernel", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


class _Provisioner(LocalProvisioner):
    process: Any

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        manager: Any = self.parent
        folder, waiting = kwargs.get("cwd") or str(Path.cwd()), manager.waiting
        if waiting and waiting.start(cmd[3:], kwargs["env"], folder):
            self.process, self.pid, self.pgid, self.cwd = waiting, waiting.pid, waiting.pid, folder
        else:
            await super().launch_kernel(cmd, **kwargs)
        manager.on_kernel(self.process)
        return self.connection_info

    async def wait(self) -> int | None:
        self.process = None  # as in _Manager._async_wait
        return 0


class _Client(AsyncKernelClient):
    async def wait_for_ready(self, timeout: float | None = None) -> None:
        # The parent class then waits 200 ms more for messages that nobody would read.
        seconds = START_SECONDS if timeout is None else timeout
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and await self.is_alive():
            self.kernel_info()
            with contextlib.suppress(queue.Empty):
                reply = await self.get_shell_msg(timeout=1)
                await self.get_iopub_msg(timeout=0.05)  # empty while that socket is not connected
                self._handle_kernel_info_reply(reply)
                return
        raise RuntimeError(f"the kernel did not answer within {seconds:.0f} s")


class _Manager(AsyncKernelManager):
    runtime: Path
    waiting: WaitingKernel | None
    on_kernel: Callable[[Any], None]

    def __init__(self, **options: Any):
        # The sockets lie beside the connection file: k-ipc-1 to k-ipc-5.
        place = {"transport": "ipc", "connection_file": str(self.runtime / "k.json")}
        super().__init__(kernel_spec_manager=_ThisInterpreter(), client_factory=_Client, **place, **options)
        self.provisioner = _Provisioner(kernel_id="", kernel_spec=self.kernel_spec, parent=self)

    def client(self, **options: Any) -> Any:
        client = super().client(**options)
        client.context.rcvhwm = 0  # as in telco_nb.engine.kernel: no limit on waiting messages, so that none is lost
        client.context.reconnect_ivl = RECONNECT_MS
        return client

    async def _async_wait(self, pollinterval: float = 0.0) -> None:
        """Do not wait for the killed kernel: the job does that after everything else."""


def manager_class(runtime: Path, on_kernel: Callable[[Any], None], waiting: WaitingKernel | None) -> type:
    """Return the class of the kernel manager of one job.

    Args:
        runtime: Folder of the connection file and the sockets.
        on_kernel: Called with the kernel's process as soon as it runs.
        waiting: The forked kernel, used if it can start; without it the kernel is a new process.
    """
    attributes = {"runtime": runtime, "on_kernel": staticmethod(on_kernel), "waiting": waiting}
    return type("Manager", (_Manager,), attributes)
