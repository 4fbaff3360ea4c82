"""HTTP as no client library would send it: octets in, octets out."""

import asyncio
from collections.abc import Sequence
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import msgspec


class RawAnswer(NamedTuple):
    """Everything the server sent until it closed, or until the first complete answer."""

    raw: bytes

    @property
    def status(self) -> int:
        """The status of the last answer."""
        return int(self.raw[self.raw.rindex(b"HTTP/1.") :].split(b" ", 2)[1])

    def json(self) -> Any:
        return msgspec.json.decode(self.raw[self.raw.rindex(b"\r\n\r\n") :])


async def exchange(
    url: str,
    *,
    headers: Sequence[bytes] = (),
    body: bytes = b"",
    request: bytes | None = None,
    hang_up: bool = False,
) -> RawAnswer:
    """POST with exactly these header lines (and Host), or send exactly `request`; read one final answer."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        if request is None:
            lines = [f"POST {parts.path} HTTP/1.1".encode(), b"Host: " + parts.netloc.encode(), *headers]
            request = b"\r\n".join(lines) + b"\r\n\r\n" + body
        writer.write(request)
        await writer.drain()
        raw = b""
        async with asyncio.timeout(15):
            while not hang_up and not _is_complete(raw):
                received = await reader.read(65536)
                if not received:
                    break
                raw += received
        return RawAnswer(raw)
    finally:
        writer.transport.abort()


def _is_complete(raw: bytes) -> bool:
    """Whether a final (not 1xx) answer has arrived with all of its body."""
    start = raw.rfind(b"HTTP/1.")
    if start < 0 or raw[start + 9 : start + 10] == b"1":
        return False
    head, blank, body = raw[start:].partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(blank) and len(body) >= int(lengths[0])
