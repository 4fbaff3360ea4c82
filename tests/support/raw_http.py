"""HTTP as raw bytes, which no client library would send."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, cast
from urllib.parse import urlsplit

import msgspec

PATIENCE_S = 15.0
PIECE = 256 * 1024


class RawAnswer(NamedTuple):
    """The bytes that the server sent until the first complete answer, or until it closed."""

    raw: bytes

    @property
    def status(self) -> int:
        """Return the status of the last answer."""
        return int(self.raw[self.raw.rindex(b"HTTP/1.") :].split(b" ", 2)[1])

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of the last answer, by their names in lower case."""
        head = self.raw[self.raw.rindex(b"HTTP/1.") : self.raw.rindex(b"\r\n\r\n")].decode("ascii")
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in head.split("\r\n")[1:])}

    def json(self) -> Any:
        """Return the decoded body of the last answer."""
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
    if request is None:
        lines = [f"POST {parts.path} HTTP/1.1".encode(), b"Host: " + parts.netloc.encode(), *headers]
        request = b"\r\n".join(lines) + b"\r\n\r\n" + body
    async with connect(url) as conversation:
        await conversation.send(request)
        return RawAnswer(b"") if hang_up else await conversation.read_answer()


@asynccontextmanager
async def connect(url: str) -> "AsyncIterator[Conversation]":
    """Open a connection; abort it at the end."""
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    _, conversation = await loop.create_connection(Conversation, parts.hostname or "", parts.port or 80)
    try:
        yield conversation
    finally:
        conversation.abort()


class Conversation(asyncio.Protocol):
    """A connection for several requests.

    It is no asyncio stream: a stream loses the bytes received before the server resets the connection.
    """

    def __init__(self) -> None:
        self._received = b""
        self._is_closed = False
        self._may_write = asyncio.Event()
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._may_write.set()

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._is_closed = True
        self._news.set()
        self._may_write.set()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def abort(self) -> None:
        """End the connection."""
        # asyncio's transport cannot be aborted twice.
        if not self._is_closed:
            self._transport.abort()

    def end(self) -> None:
        """Send no more; answers still arrive."""
        self._transport.write_eof()

    async def send(self, data: bytes) -> None:
        """Send the bytes until the server has taken them all, or closes."""
        async with asyncio.timeout(PATIENCE_S):
            for start in range(0, len(data), PIECE):
                await self._may_write.wait()
                if self._is_closed:
                    return
                self._transport.write(data[start : start + PIECE])
            await self._may_write.wait()

    async def read_answer(self) -> RawAnswer:
        """Return the next final (not 1xx) answer and the bytes before it, or all bytes when the server closes."""
        async with asyncio.timeout(PATIENCE_S):
            while (end := _end_of_answer(self._received)) is None and not self._is_closed:
                await self._more()
        answer, self._received = self._received[:end], self._received[end:] if end is not None else b""
        return RawAnswer(answer)

    async def read_until_closed(self) -> bytes:
        """Return all bytes until the server closes."""
        async with asyncio.timeout(PATIENCE_S):
            while not self._is_closed:
                await self._more()
        return self._received

    async def is_closed(self) -> bool:
        """Return whether the server closes the connection without sending more, within PATIENCE_S."""
        try:
            return not await self.read_until_closed()
        except TimeoutError:
            return False

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()


def _end_of_answer(raw: bytes) -> int | None:
    """Return the index of the end of the first final (not 1xx) answer; None before it is complete."""
    start = raw.find(b"HTTP/1.")
    while start >= 0 and raw[start + 9 : start + 10] == b"1":
        start = raw.find(b"HTTP/1.", start + 1)
    blank = raw.find(b"\r\n\r\n", start)
    if start < 0 or blank < 0:
        return None
    lengths = [
        line.split(b":")[1] for line in raw[start:blank].split(b"\r\n") if line.lower().startswith(b"content-length:")
    ]
    end = blank + 4 + int(lengths[0])
    return end if len(raw) >= end else None
