"""Stops and notes what a Python process of the tests sends, or looks up, beyond loopback.

`loopback.py` starts it in a process of tests; every Python that those start does it itself, as this folder is on
PYTHONPATH. What programs in other languages do, and native code such as Ray's, is not seen here.
"""

from __future__ import annotations

import os
import sys
from typing import Any

NOTES = "TESTS_BEYOND_LOOPBACK"  # the variable that names the file of the notes
_CLOUD = "Ray's dashboard asks in which cloud it runs, and no setting of Ray turns that off"
EXPECTED = {  # (part of the program's path, host): why the attempt is stopped as all are, but fails no test
    ("ray/dashboard/", "169.254.169.254"): _CLOUD,
    ("ray/dashboard/", "metadata.google.internal"): _CLOUD,
}
AT_ADDRESS = ("socket.connect", "socket.sendto", "socket.sendmsg")
BY_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """The audit hook: adds a line to the notes and raises OSError, as on a machine without a network."""
    if event not in AT_ADDRESS and event not in BY_NAME:
        return
    host = _host(event, arguments)
    if host is None or _stays_here(event, host):
        return
    if notes := os.environ.get(NOTES):
        error = _error(event, f"tests reach nothing beyond loopback: {host}")
        if any(program in sys.argv[0] and host == expected for program, expected in EXPECTED):
            raise error
        with open(notes, "a", encoding="utf-8") as stream:  # noqa: PTH123 - every Python pays for what is imported here
            stream.write(f"{event} {host} by {sys.argv[:3]} in {os.environ.get('PYTEST_CURRENT_TEST', 'no test')}\n")
        raise error


def _host(event: str, arguments: tuple[Any, ...]) -> str | None:
    """The host that an event is about; None where it has none, as with sockets that are files."""
    import socket

    host = arguments[0]
    if event in AT_ADDRESS:
        is_inet = arguments[0].family in (socket.AF_INET, socket.AF_INET6)
        host = arguments[1][0] if is_inet and arguments[1] else None
    return host.decode(errors="replace") if isinstance(host, bytes) else host


def _stays_here(event: str, host: str) -> bool:
    """Whether nothing leaves this machine: loopback, no host at all, or an address where a name would be looked up."""
    import ipaddress

    if host in ("", "localhost") or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified or event in ("socket.getaddrinfo", "socket.gethostbyname")


def _error(event: str, text: str) -> OSError:
    import errno
    import socket

    return socket.gaierror(socket.EAI_AGAIN, text) if event in BY_NAME else OSError(errno.ENETUNREACH, text)


if __name__ == "sitecustomize" and os.environ.get(NOTES):
    sys.addaudithook(watch)
