"""The kernel of a job: ipykernel that loses no output and dies with the process that started it."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from typing import Any

from ipykernel.kernelapp import IPKernelApp

POLL_SECONDS = 0.3
# The client looks for the kernel's sockets every 5 ms (telco_nb.engine.kernel_manager). If it is not connected when the
# kernel answers its first request, it waits 50 ms and asks again.
LISTEN_SECONDS = 0.01


class BatchKernel(IPKernelApp):
    """ipykernel with the changes that an unattended run needs."""

    def init_iopub(self, context: Any) -> None:
        # ZeroMQ silently drops messages when 1,000 wait: a cell that prints much would lose lines, or the message that
        # it has finished. 0 means no limit.
        context.sndhwm = 0
        super().init_iopub(context)

    def start(self) -> None:
        time.sleep(LISTEN_SECONDS)
        super().start()

    def init_poller(self) -> None:
        threading.Thread(target=_die_with, args=(self.parent_handle,), daemon=True, name="die-with-parent").start()


def _die_with(parent: int) -> None:
    """When `parent` is gone, kill this kernel and everything that it started (they share a process group)."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run a kernel with the arguments in sys.argv."""
    # ipykernel reads the parent's id when it is imported, which may have been in another process: pass it here.
    BatchKernel.launch_instance(parent_handle=int(os.environ.get("JPY_PARENT_PID") or os.getppid()))
    # Exit as Python does, but without the seconds that it takes to free torch: first IPython's exit function, which
    # deletes the notebook's variables and so closes their files.
    atexit._run_exitfuncs()
    if sys.__stdout__:
        sys.__stdout__.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
