"""What leaves this machine: the rule that nothing may, the log of what did, and the variables that cannot change it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from pathlib import Path

from telco_nb.hosted.hosts import Address
from telco_nb.hosted.keys import KEY_VARIABLES

NO_EGRESS = "TELCO_NB_NO_EGRESS"  # environment variable: `1` refuses every remote host; kernels inherit it
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
HOSTS = (
    "OPENAI_BASE_URL", "ANTHROPIC_BASE_URL", "GOOGLE_GEMINI_BASE_URL", "GOOGLE_VERTEX_BASE_URL",
    "GOOGLE_GENAI_USE_VERTEXAI", "GOOGLE_GENAI_USE_ENTERPRISE",
)  # fmt: skip
_PROVIDERS = ("OPENAI_", "ANTHROPIC_", "GOOGLE_", "GEMINI_")  # first parts of the variables that SDKs read


class CostRefused(RuntimeError):
    """The estimate exceeds the cap, or nobody has agreed to it. Exit code 4."""


class EgressRefused(CostRefused):
    """A request would leave this network, and --no-egress forbids that. Exit code 4."""


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


def ignored_variables() -> list[str]:
    """Variables of this environment that would change where programs send data, and that change nothing here."""
    names = [spelling for name in PROXIES for spelling in (name, name.lower())]
    return [name for name in (*names, *HOSTS) if os.environ.get(name)]


def drop_provider_variables() -> None:
    """Remove the variables with which a provider's SDK changes its host, its headers, its account or its log.

    For good, because the SDKs read some of them again with each request. The keys stay: the SDKs are given theirs, and
    a message must be cleared of all of them at any time.
    """
    keys = {name for names in KEY_VARIABLES.values() for name in names}
    for name in [name for name in os.environ if name.startswith(_PROVIDERS) and name not in keys]:
        del os.environ[name]


# ---------------------------------------------------------------- the log


@dataclass
class Call:
    """One HTTP request to a hosted model, as a line of the log. No text, no key, no path."""

    time: str
    host: str
    reach: str  # machine (loopback; but a server there may forward), network or remote
    purpose: str
    bytes_out: int  # of the bodies alone
    sha256: str  # of the body sent
    bytes_in: int = 0
    status: int | None = None  # of HTTP; None if there was no reply


def log_path(store: Path) -> Path:
    """The study's log `egress.jsonl`, from a store `<study>/<scope>/store/<file>`; else beside the store."""
    folder = store.parents[2] if store.parent.name == "store" else store.parent
    return folder / "egress.jsonl"


@contextlib.contextmanager
def open_log(path: Path | None) -> Generator[Callable[[Call], None]]:
    """Yields the function that appends a line to a log; without a path it does nothing.

    The log is opened before a request leaves, so that none leaves unrecorded. Each line is one write, so that lines of
    several processes do not mix. A disk that is full after the reply loses the line and not the answer, which is paid.

    Raises OSError if the log cannot be opened.
    """
    if path is None:
        yield lambda call: None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(call: Call) -> None:
        with contextlib.suppress(OSError):
            os.write(descriptor, json.dumps(asdict(call)).encode("ascii") + b"\n")

    try:
        yield write
    finally:
        os.close(descriptor)
