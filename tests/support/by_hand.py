"""Runs a notebook as papermill does without a runner: `python by_hand.py NOTEBOOK TARGET`.

A panel's Output widget lets nbclient send on the very socket on which it waits for a cell's reply. Such a send can take
the wake-up of a reply that arrives at that moment, and the client waits for ever beside an idle kernel (nbclient 0.11,
jupyter_client 8.10). Here the client looks again every second. JupyterLab has another client, and a batch no panels.
"""

import contextlib
import sys
from queue import Empty

import papermill
from jupyter_client.channels import AsyncZMQSocketChannel

LOOK_AGAIN_S = 1.0
wait_for_message = AsyncZMQSocketChannel.get_msg


async def get_msg(self, timeout=None):
    """The next message; without a timeout, the socket is asked again and again."""
    if timeout is not None:
        return await wait_for_message(self, timeout)
    while True:
        with contextlib.suppress(Empty):
            return await wait_for_message(self, LOOK_AGAIN_S)


if __name__ == "__main__":
    AsyncZMQSocketChannel.get_msg = get_msg
    papermill.execute_notebook(sys.argv[1], sys.argv[2], kernel_name="python3", progress_bar=False)
