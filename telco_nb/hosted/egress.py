"""What leaves this machine: the rule that nothing may, the log of calls, and the variables that cannot change it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from telco_nb.hosted.hosts import Address, is_farther, reach
from telco_nb.hosted.keys import KEY_VARIABLES
from telco_nb.study.seal import CALLS, STORE_FOLDER

NO_EGRESS = "TELCO_NB_NO_EGRESS"  # environment variable: `1` refuses every remote host; kernels inherit it
AGREED = "TELCO_NB_AGREED"  # environment variable: JSON, how far each host of the plan reaches; kernels inherit it
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
_PROVIDERS = ("OPENAI_", "ANTHROPIC_", "GOOGLE_", "GEMINI_")  # first parts of the variables that SDKs read


class SendingRefused(RuntimeError):
    """Nothing may be sent; the message says why and what to do. Exit code 4."""


class CostRefused(SendingRefused):
    """The estimate exceeds the cap, or nobody has agreed to it."""


class EgressRefused(SendingRefused):
    """A request would leave this network, and --no-egress or the plan that was agreed to forbids that."""


def forbid() -> None:
    """Refuse every remote host from now on, in this process and in those that it starts."""
    os.environ[NO_EGRESS] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"  # no base model is downloaded either


def is_forbidden() -> bool:
    return os.environ.get(NO_EGRESS, "") not in ("", "0")


def require_allowed(address: Address, parameter: str) -> None:
    """Returns if requests may go to an address, which a parameter chose. Raises EgressRefused, with both, if not."""
    if is_forbidden() and address.reach == "remote":
        raise EgressRefused(
            f"--no-egress: the host {address.netloc} lies outside this network (parameter {parameter}). Nothing was "
            "sent. Name a server of this network there, choose an offline one, or run without --no-egress."
        )


def agree(addresses: Iterable[Address]) -> None:
    """Hold hosts to how far away a plan found them, in this process and in those that it starts.

    Any other host must lie in this network from now on.
    """
    os.environ[AGREED] = json.dumps({address.host: address.reach for address in addresses})


def require_agreed(address: Address, parameter: str) -> None:
    """Returns if an address lies no farther away than was agreed to, or if there is no plan. Raises EgressRefused."""
    plan = os.environ.get(AGREED)
    agreed = json.loads(plan).get(address.host, "network") if plan else "remote"
    if is_farther(address.reach, agreed):
        raise EgressRefused(
            f"the host {address.netloc} (parameter {parameter}) lies farther away than what was agreed to: {agreed}. "
            "Nothing was sent. Run ./run_all.py: its plan says where the name leads now, what is sent and what that "
            "costs, and asks. A notebook run by hand asks only models of this network."
        )


def ignored_variables() -> list[str]:
    """Variables of this environment with which proxies and SDKs change the host, the headers, the account or the log.

    The keys are none of them: the SDKs are given theirs, and a message must be cleared of all of them at any time.
    """
    keys = {name for names in KEY_VARIABLES.values() for name in names}
    return sorted(
        name for name in os.environ if name.upper() in PROXIES or (name.startswith(_PROVIDERS) and name not in keys)
    )


def drop_ignored_variables() -> None:
    """Remove them from this process for good, because the SDKs read some of them again with each request."""
    for name in ignored_variables():
        del os.environ[name]


# ---------------------------------------------------------------- the log


@dataclass
class Call:
    """One HTTP request, as a line of the log. No text, no key, no path."""

    time: str
    host: str
    reach: str  # machine (loopback; but a server there may forward), network or remote
    purpose: str
    bytes_out: int  # of the bodies alone
    sha256: str  # of the body sent
    bytes_in: int = 0
    status: int | None = None  # of HTTP; None if there was no reply

    @classmethod
    def now(cls, host: str, reach: str, purpose: str, body: bytes) -> Call:
        """A call that is about to be made with this body."""
        time = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(time, host, reach, purpose, len(body), hashlib.sha256(body).hexdigest())


def log_path(store: Path) -> Path:
    """The study's log `egress.jsonl`, from a store `<study>/<scope>/store/<file>`; else beside the store."""
    folder = store.parents[2] if store.parent.name == STORE_FOLDER else store.parent
    return folder / CALLS


def open_log(path: Path | None) -> contextlib.AbstractContextManager[Callable[[Call], None]]:
    """A context with the function that appends a line to a log; without a path it does nothing.

    The log is opened before a request leaves, so none leaves where no log can be. The line follows the reply: a process
    that is killed in between, or a disk that is full by then, loses the line, and never an answer, which is paid. Each
    line is one write, so that lines of several processes do not mix.

    Raises OSError, here and not in the context, if the log cannot be opened.
    """
    if path is None:
        return contextlib.nullcontext(lambda call: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    return _appending(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644))


@contextlib.contextmanager
def _appending(descriptor: int) -> Generator[Callable[[Call], None]]:
    def write(call: Call) -> None:
        with contextlib.suppress(OSError):
            size = os.fstat(descriptor).st_size
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"  # of a full disk, or of a kill
            os.write(descriptor, b"\n" * torn + json.dumps(asdict(call)).encode("ascii") + b"\n")

    try:
        yield write
    finally:
        os.close(descriptor)


def log_hub(root: Path) -> None:
    """Write a line to a study's log for each reply of the hub, and fetch files by requests that can be seen alone.

    It does nothing where the hub is turned off.
    """
    if os.environ.get("HF_HUB_OFFLINE") == "1":
        return
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils import _detect_agent
    from huggingface_hub.utils._http import default_client_factory

    def note(reply: Any) -> None:
        request = reply.request
        call = Call.now(request.url.netloc.decode(), reach(request.url.host), "base model", request.content)
        call.status, call.bytes_in = reply.status_code, int(reply.headers.get("content-length") or 0)
        with open_log(root / CALLS) as write:
            write(call)

    def client() -> Any:
        made = default_client_factory()
        made.event_hooks = {**made.event_hooks, "response": [note]}
        return made

    constants.HF_HUB_DISABLE_XET = True  # its transfers are made outside Python
    _detect_agent._registry = _detect_agent._EMPTY_REGISTRY  # else it asks for a list, to say which program runs it
    set_client_factory(client)
