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
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import httpx2
import typer

from telco_nb.commands.common import Profile, errors_as_exit_codes
from telco_nb.commands.export import weights_dtype, write_merged
from telco_nb.commands.model_card import QUESTION
from telco_nb.commands.trained import Config, Trained, find_trained
from telco_nb.engine.runner import INTERRUPTED, UnfitError
from telco_nb.study import record
from telco_nb.study.model_files import cache_dir

HOST = "127.0.0.1"
READY_SECONDS, END_SECONDS, POLL_SECONDS = 300.0, 10.0, 0.2
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
    return f"curl -s --noproxy {HOST} {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}"


@contextmanager
def serving(trained: Trained, port: int) -> Generator[subprocess.Popen]:
    """The server with the merged model, ready for requests; it and its files are gone afterwards.

    Raises UnfitError if it is not ready within READY_SECONDS.
    """
    with _folder(trained.config) as folder:
        write_merged(trained, folder / trained.config, weights_dtype(trained, "auto"))
        guard_template(folder / trained.config)
        hub = folder / "hub"  # the server's list of models is that of a hub folder, which must exist
        hub.mkdir()
        env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
        # In the folder itself the model's name is its relative path, so requests need no path of this machine.
        program = [sys.executable, "-c", SERVER, "serve", trained.config, "--host", HOST, "--port", str(port)]
        server = subprocess.Popen(program, cwd=folder, env=env, stdout=sys.stderr)
        try:
            _wait_until_ready(server, port)
            yield server
        finally:
            _end(server)


@contextmanager
def _folder(config: str) -> Generator[Path]:
    """A folder of this process in the cache, removed at the end, as are those of servers that were killed."""
    served = served_dir()
    record.sweep(served)
    folder = served / f".{config}.{os.getpid()}.work"  # a name that `sweep` knows
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # another server runs
            served.rmdir()


def served_dir() -> Path:
    """Where the merged models of running servers lie."""
    return cache_dir() / "served"


def guard_template(model: Path) -> None:
    """Let the template of a model's folder keep control tokens in customers' words from having an effect."""
    from transformers import AutoTokenizer

    from telco_nb.lora.chat_template import guarded_template

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    (model / "chat_template.jinja").write_text(guarded_template(tokenizer), encoding="utf-8")


def _wait_until_ready(server: subprocess.Popen, port: int) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise UnfitError(f"the server ended with exit code {server.returncode} before it was ready; see above.")
        with suppress(httpx2.TransportError):
            if httpx2.get(f"http://{HOST}:{port}/health", timeout=2, trust_env=False).is_success:
                return
        time.sleep(POLL_SECONDS)
    raise UnfitError(f"the server did not answer on port {port} within {READY_SECONDS:.0f} s; see above.")


def _end(server: subprocess.Popen) -> None:
    server.terminate()
    try:
        server.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def _stop(*_: object) -> None:
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
        for number in (signal.SIGTERM, signal.SIGHUP):  # so that the server ends and its files are removed
            signal.signal(number, _stop)
        answered = False
        try:
            with serving(trained, port) as server:
                answered = True
                print(
                    f"{config} answers on http://{HOST}:{port}/v1 until Ctrl-C. Try:\n{curl_line(trained, port)}",
                    flush=True,
                )
                server.wait()
        except KeyboardInterrupt:
            if answered:  # ending the server is how this command ends
                return
            raise typer.Exit(INTERRUPTED) from None
        raise UnfitError(f"the server ended with exit code {server.returncode}; see above.")
