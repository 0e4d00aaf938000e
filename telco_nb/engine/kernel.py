"""The kernel of a batch run: ipykernel that loses no output and does not outlive the process that started it."""

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
# Until a client listens, which looks for our sockets every 5 ms (telco_nb.engine.job). If it missed what we say to its
# first request, it would wait for 50 ms and ask again.
LISTEN_SECONDS = 0.01


class BatchKernel(IPKernelApp):
    """ipykernel with two changes that an unattended run needs."""

    def init_iopub(self, context: Any) -> None:
        # ZeroMQ drops messages without a word once 1,000 wait: a cell that prints a lot would lose lines, or the
        # message that says it has finished. 0 means no limit.
        context.sndhwm = 0
        super().init_iopub(context)

    def start(self) -> None:
        time.sleep(LISTEN_SECONDS)
        super().start()

    def init_poller(self) -> None:
        threading.Thread(target=_die_with, args=(self.parent_handle,), daemon=True, name="die-with-parent").start()


def _die_with(parent: int) -> None:
    """Kill this kernel and everything it started (they share a process group) when `parent` is gone."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Run a kernel as sys.argv says. ipykernel looks for its parent when it is imported, which may have been before."""
    BatchKernel.launch_instance(parent_handle=int(os.environ.get("JPY_PARENT_PID") or os.getppid()))
    # Python's own end, but for the seconds that it takes to dismantle torch: IPython's exit function, the first of all,
    # drops the notebook's variables, which closes their files.
    atexit._run_exitfuncs()
    if sys.__stdout__:
        sys.__stdout__.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
