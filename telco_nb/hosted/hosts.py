"""Where a base URL leads: its host in one spelling, and whether this host lies in this network."""

from __future__ import annotations

import ipaddress
import re
import socket
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import SplitResult, urlsplit, urlunsplit

# Addresses of this machine, and private ones of RFC 1918 and RFC 4193. Others that never leave a network, such as
# link-local ones (where clouds keep credentials) and documentation ranges, are not where a model server should be.
LOCAL_NETWORKS = [
    ipaddress.ip_network(network)
    for network in ("127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")
]
REACHES = ("machine", "network", "remote")  # how far a request goes, from near to far
LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".home.arpa", ".lan")  # names that public DNS does not have
_NUMBER = re.compile(r"\d+|0x[0-9a-f]*")  # a host that ends in one is an address in an odd spelling, or nothing
_FORBIDDEN = set('"<>\\^`{|}%')  # in a URL they are a mistake, or make two programs read two hosts


class AddressError(ValueError):
    """A text is not the base URL of a server; the message says why, without repeating it."""


@dataclass(frozen=True)
class Address:
    """A base URL, split; `host` is in ASCII and lower case, as it is sent to the resolver."""

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def netloc(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port is None else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return urlunsplit((self.scheme, self.netloc, self.path, "", ""))

    @cached_property
    def reach(self) -> str:
        """How far a request goes: `machine`, `network` (private addresses), or `remote`.

        A name is resolved once in each process, because it can lead elsewhere a moment later. A kernel is held to what
        the plan found (`egress.require_agreed`), and every connection to what its process found (`GuardedTransport`).
        """
        return reach(self.host)


def parse_address(url: str) -> Address:
    """Reads the base URL of a server.

    Args:
        url: such as http://127.0.0.1:8000/v1.

    Raises:
        AddressError: it is not an http(s) URL of one host, or holds what does not belong there, such as a password.
    """
    if any(c <= " " or c == "\x7f" or c in _FORBIDDEN for c in url):
        raise AddressError("it holds a space, a control character or one of " + " ".join(sorted(_FORBIDDEN)))
    try:
        parts = urlsplit(url)
    except ValueError:
        raise AddressError("it is not a URL") from None
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise AddressError("credentials or a query would write a secret into the record")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise AddressError("it is not an http(s) URL")
    return Address(parts.scheme, _normalised(parts.hostname), _port(parts), parts.path)


def _port(parts: SplitResult) -> int | None:
    """The port; None for that of the scheme."""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0 or parts.netloc.endswith(":"):
        raise AddressError("the port must be a number from 1 to 65535")
    return port


def _normalised(host: str) -> str:
    """The host in ASCII: full-width letters and ideographic dots are mapped, other scripts become punycode."""
    if ":" in host:
        return host
    try:
        name = host.encode("idna").decode("ascii").lower()
    except UnicodeError:
        raise AddressError("the host is not a name or an address") from None
    if not name or "" in name.removesuffix(".").split("."):
        raise AddressError("the host is not a name or an address")
    return name


def reach(host: str) -> str:
    """How far a request to this host would go now: one of `REACHES`.

    Only an address of this network, or a name without a public domain all of whose addresses are such, is not remote.
    Everything odd is: decimal, octal and hexadecimal numbers, IPv6 zones, and names that do not resolve.
    """
    if address := _address(host):
        return _reach_of([address])
    labels = host.rstrip(".").split(".")
    if _NUMBER.fullmatch(labels[-1]) or not (len(labels) == 1 or host.rstrip(".").endswith(LOCAL_SUFFIXES)):
        return "remote"
    try:
        found = {entry[4][0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):
        return "remote"
    return _reach_of([_address(str(text)) for text in found])


def is_farther(found: str, allowed: str) -> bool:
    """True if one reach goes farther than another."""
    return REACHES.index(found) > REACHES.index(allowed)


def is_within(peer: str, allowed: str) -> bool:
    """True if an address lies no farther away than the reach `allowed`."""
    return not is_farther(reach(peer), allowed)


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, ipaddress.IPv6Address) else address


def _reach_of(addresses: list[ipaddress.IPv4Address | ipaddress.IPv6Address | None]) -> str:
    if addresses and all(address is not None and address.is_loopback for address in addresses):
        return "machine"
    local = [address is not None and any(address in network for network in LOCAL_NETWORKS) for address in addresses]
    return "network" if local and all(local) else "remote"
