"""The only way to a hosted model: one host, no proxy of the environment, replies of limited size, a line in the log."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import httpx2

from telco_nb.hosted.egress import Call, open_log
from telco_nb.hosted.hosts import Address, is_within

LIVE_BYTES = 8 * 2**20  # of the reply to one request, decompressed
BATCH_BYTES = 2**30  # of the results of one batch
MAX_CONNECTIONS = 200
_OWN_HEADERS = {"content-encoding", "content-length", "transfer-encoding"}  # of the reply as it was sent


class ReplyRefused(httpx2.RemoteProtocolError):
    """A reply is too long or cannot be decompressed."""


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends requests to one address alone.

    A connection is refused before anything is sent if it leads farther away than the address did when it was checked.

    Args:
        address: the only host and port that may be asked.
        purpose: what the requests are for, for the log.
        max_bytes: of a reply, as sent and decompressed; the reading of a longer one stops there, and it is refused.

    `log` is the file that gets a line per call, None for no record.
    """

    def __init__(self, address: Address, purpose: str, max_bytes: int = LIVE_BYTES):
        limits = httpx2.Limits(max_connections=MAX_CONNECTIONS)
        self.inner = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)
        self.address, self.purpose, self.max_bytes = address, purpose, max_bytes
        self.log: Path | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        own, url = httpx2.URL(self.address.url), request.url
        if (url.scheme, url.host, url.port) != (own.scheme, own.host, own.port):
            raise httpx2.UnsupportedProtocol(f"only {self.address.netloc} may be asked, not {url.host}")
        request.headers["Accept-Encoding"] = "identity"
        request.extensions["trace"] = self._check_peer
        body = await request.aread()
        call = Call.now(self.address.netloc, self.address.reach, self.purpose, body)
        try:
            log = open_log(self.log)
        except OSError as error:  # nothing was sent
            raise httpx2.ConnectError(f"the log {self.log} cannot be written: {error.strerror}") from None
        with log as write:
            try:
                return await self._exchange(request, call)
            finally:
                write(call)

    async def _check_peer(self, event: str, info: dict[str, Any]) -> None:
        """Ends a new connection that does not lead where the address led. The pool calls this at each of its events."""
        if event != "connection.connect_tcp.complete":
            return
        stream, allowed = info["return_value"], self.address.reach
        peer = stream.get_extra_info("server_addr")[0]
        if not is_within(peer, allowed):
            await stream.aclose()
            raise httpx2.ConnectError(f"{self.address.netloc} now leads to {peer}, was within this {allowed}")

    async def _exchange(self, request: httpx2.Request, call: Call) -> httpx2.Response:
        reply = await self.inner.handle_async_request(request)
        call.status = reply.status_code
        data = bytearray()
        try:
            async for chunk in reply.aiter_raw():
                call.bytes_in += len(chunk)
                data += chunk
                if len(data) > self.max_bytes:
                    raise ReplyRefused(f"the reply is longer than {self.max_bytes:,} bytes")
        finally:
            await reply.aclose()
        content = decoded(bytes(data), reply.headers.get("content-encoding", ""), self.max_bytes)
        headers = [(name, value) for name, value in reply.headers.multi_items() if name.lower() not in _OWN_HEADERS]
        return httpx2.Response(reply.status_code, headers=headers, content=content)

    async def aclose(self) -> None:
        await self.inner.aclose()


def decoded(data: bytes, encoding: str, max_bytes: int) -> bytes:
    """The content of a reply that a server compressed although it was asked not to.

    Args:
        data: the reply's body.
        encoding: its header Content-Encoding.
        max_bytes: of the content.

    Raises:
        ReplyRefused: the encoding is unknown, the data are broken, or the content is longer.
    """
    encoding = encoding.strip().lower()
    if encoding in ("", "identity"):
        return data
    if encoding not in ("gzip", "deflate"):
        raise ReplyRefused("the reply is compressed in a way that was not asked for")
    unpacker = zlib.decompressobj(wbits=47)  # gzip or zlib, by its first bytes
    try:
        content = unpacker.decompress(data, max_bytes + 1)
    except zlib.error:
        raise ReplyRefused(f"the reply is not valid {encoding}") from None
    if len(content) > max_bytes or not unpacker.eof:
        raise ReplyRefused(f"the reply is cut short, or longer than {max_bytes:,} bytes unpacked")
    return content
