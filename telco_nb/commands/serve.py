"""Serves a trained configuration to programs of this machine: `python -m telco_nb serve CONFIG`.

`transformers serve` answers OpenAI's chat requests with the merged model, on 127.0.0.1 and without the hub.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import psutil
import typer

from telco_nb.commands.common import Profile, errors_as_exit_codes
from telco_nb.commands.export import weights_dtype, write_merged
from telco_nb.commands.model_card import QUESTION
from telco_nb.commands.trained import Config, Trained, find_trained
from telco_nb.engine.runner import UnfitError

HOST = "127.0.0.1"
NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "openai": "openai", "multipart": "python-multipart"}
# The command line of transformers without its search for updates; it ends with this process, however that dies.
SERVER = """
from telco_nb.study.machine import die_with_parent
die_with_parent()
from transformers.cli.transformers import app
app()
"""


def require_server(port: int) -> None:
    """Raise UnfitError if a package of the server is missing or the port is in use."""
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UnfitError(f"serving needs {', '.join(missing)}. Run: pip install --no-deps -r requirements.txt")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            raise UnfitError(f"port {port} is in use. Choose another one: --port {port + 1}") from None


def curl_line(trained: Trained, port: int) -> str:
    """A request that the server answers, for a shell."""
    body = {
        "model": trained.config,
        "messages": [
            {"role": "system", "content": trained.base["system_prompt"]},
            {"role": "user", "content": QUESTION},
        ],
        "max_tokens": trained.values["answer_max_tokens"],
    }
    if trained.values["answer_temperature"]:  # else the model's own configuration decodes greedily
        body["temperature"] = trained.values["answer_temperature"]
    url = f"http://{HOST}:{port}/v1/chat/completions"
    return f"curl -s {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


@contextmanager
def serving(trained: Trained, port: int) -> Generator[subprocess.Popen]:
    """The server with the merged model, ready for requests; it and its files are gone afterwards.

    Raises UnfitError if it ends before it is ready.
    """
    from telco_nb.lora.base_model import cache_dir

    cache_dir().mkdir(parents=True, exist_ok=True)
    remove_leftovers(cache_dir())
    with tempfile.TemporaryDirectory(prefix=f"serve-{os.getpid()}-", dir=cache_dir()) as folder:
        write_merged(trained, Path(folder) / trained.config, weights_dtype(trained, "auto"))
        hub = Path(folder) / "hub"  # the server's list of models is that of a hub folder, which must exist
        hub.mkdir()
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
        # In the folder itself the model's name is its relative path, so requests need no path of this machine.
        program = [sys.executable, "-c", SERVER, "serve", trained.config, "--host", HOST, "--port", str(port)]
        server = subprocess.Popen(program, cwd=folder, env=env, stdout=sys.stderr)
        try:
            _wait_until_ready(server, port)
            yield server
        finally:
            server.terminate()
            server.wait()


def remove_leftovers(cache: Path) -> None:
    """Remove the merged models of servers that were killed."""
    for folder in cache.glob("serve-*-*"):
        if not psutil.pid_exists(int(folder.name.split("-")[1])):
            shutil.rmtree(folder, ignore_errors=True)


def _wait_until_ready(server: subprocess.Popen, port: int) -> None:
    while True:
        if server.poll() is not None:
            raise UnfitError(f"the server ended with exit code {server.returncode} before it was ready; see above.")
        try:
            with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=2):
                return
        except OSError:
            time.sleep(0.2)


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


EPILOG = """
**Example**

- `python -m telco_nb serve c04 --port 8000`: prints a curl line to try; Ctrl-C ends it
"""


def main(
    config: Config,
    profile: Profile = "laptop",
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port on 127.0.0.1.")] = 8000,
) -> None:
    """Serve a trained configuration on 127.0.0.1 to programs that speak OpenAI's chat protocol."""
    with errors_as_exit_codes("serve"):
        trained = find_trained(profile, config)
        require_server(port)
        signal.signal(signal.SIGTERM, _stop)  # so that the server ends and its files are removed
        try:
            with serving(trained, port) as server:
                print(
                    f"{config} answers on http://{HOST}:{port}/v1 until Ctrl-C. Try:\n{curl_line(trained, port)}",
                    flush=True,
                )
                server.wait()
        except KeyboardInterrupt:
            return
        raise UnfitError(f"the server ended with exit code {server.returncode}; see above.")
