"""Bounds on each HTTP connection, and JSON answers to malformed HTTP. The only module with aiohttp's private names.

    waiting for a head ──→ in a request ──→ idle, kept alive ──first byte of the next head──→ waiting for a head

- Waiting for a head: `header_timeout_s`, then 408, or a close without an answer if no byte has arrived.
- In a request: `body_timeout_s` (bodies.py), then 408. The request holds its slot until its answer is written. A
  caller that does not read its answer is cut after `answer_timeout_s`.
- Idle: closed by aiohttp after `keepalive_timeout_s`.

All incomplete heads together are bounded too: beyond MAX_COST_OF_HEADS, the most expensive are refused. Reading pauses
once more than MAX_BYTES_AHEAD bytes of requests wait behind the one in progress. Beyond MAX_BYTES_AHEAD_OF_ALL for all
connections, those with the most are aborted. With TLS, the buffers of all connections together are bounded: beyond
MAX_TLS_BUFFERS, connections without a request are closed, first those whose buffers grew longest ago.

One sweep per second looks at the heads of all connections, so that a request needs no timer for its head.

At `max_connections`, a new connection takes the place of one without a request. Eviction order: connections waiting
for a request head, then idle ones; the oldest first. A normal caller sends its head at once, so slow or silent
connections evict each other. A new connection is refused only if every other one is in a request.

In a drain, idle connections are closed. A request of which a byte has arrived is read to its end and answered.

A head behind a request is bounded too. Its timeout starts after the answer to that request.

tests/integration/test_aiohttp_contract.py names every private name used here, and fails when aiohttp drops one.
"""

import asyncio
import logging
import os
import ssl
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from email.utils import formatdate
from functools import lru_cache
from heapq import nlargest, nsmallest
from math import inf
from typing import Any, Protocol

from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.errors import (
    Draining,
    GatewayError,
    InternalError,
    MalformedHttp,
    Overloaded,
    RequestTimeout,
    drop_tracebacks,
)
from gateway.repeat_log import RepeatLog
from gateway.web.heads import MAX_HEAD_BYTES, Heads, IncompleteHead
from gateway.web.shared_port import InheritedPort, SharedListener, Tls, bind_alone, listen_on_inherited
from gateway.web.sockets import SPARE_DESCRIPTORS, Limits, ListenerName, fit_descriptors, open_tcp, open_unix

log = logging.getLogger(__name__)

SWEEP_S = 1.0
# Before a close, unread data is read and discarded for this time, as nginx does. A close with unread data makes the
# kernel send a TCP reset, which can take the answer from the caller.
LINGER_S = 5.0
QUIET_S = 0.2  # behind the body, the reading ends if nothing arrives for this time
# Memory of the TLS buffers of all connections together: uvloop keeps two, as large as the largest read, to the close.
MAX_TLS_BUFFERS = 128 * 1024 * 1024
SMALL_READ = 16 * 1024  # one TLS record: buffers of this size are not counted
# Bytes of a body that are read while its request waits; one read of the event loop (256 kB) comes on top. aiohttp
# pauses the reading at twice its `read_bufsize`.
READ_AHEAD = 64 * 1024
MAX_BYTES_AHEAD = 64 * 1024  # of requests pipelined behind the one in progress; one read comes on top
MAX_BYTES_AHEAD_OF_ALL = 64 * 1024 * 1024  # of all connections together
# At the end of a drain, so long is kept for the answers to requests that cannot be served any more.
LAST_ANSWERS_S, LAST_ANSWERS_SHARE = 2.0, 0.25  # and at most this share of the drain
CLOSE_S = 0.1  # then connections are closed; aiohttp waits twice for this time
EVICTION_SHARE = 8  # a search through all connections selects an eighth of the waiting ones for eviction
LEAST_HANDSHAKES = SPARE_DESCRIPTORS // 4  # there may be so many TLS handshakes at any number of connections
NEVER = inf
TOO_MANY = "Too many connections are open. Nothing was queued; send it again"
TOO_MANY_HEADS = "Too many incomplete requests have arrived. Nothing was queued; send it again"

SERVER = "sms-gateway"
JSON_HEADERS: dict[str, str] = {hdrs.CONTENT_TYPE: "application/json", hdrs.SERVER: SERVER}


class Place(Protocol):
    """A place that a request holds until its answer is written."""

    def give_back(self) -> None:
        """End it: the answer is written, or cannot be written."""

    def abandon(self) -> None:
        """Note that the caller has hung up."""


# A handler that takes a slot, or another place, leaves it here. The connection gives it back.
SLOT: web.RequestKey[Place] = web.RequestKey("slot", Place)

# Returns the complete answer to a request that no handler sees; logs the exception, if there is one.
Refuse = Callable[[GatewayError, BaseException | None], web.Response]
OnRefused = Callable[[int, str], None]


def accept_version(request: web.BaseRequest) -> bool:
    """Return True for HTTP/1.0 and 1.1. The parser accepts 0.9 and 2.0 as well.

    Sets any other version to 1.1, because aiohttp answers in the version of the request.
    """
    if request._version in (HttpVersion11, HttpVersion10):
        return True
    request._version = HttpVersion11
    return False


def is_chunked(request: web.BaseRequest) -> bool:
    """Return True if the request's body is sent in chunks."""
    return request._message.chunked


class DirectAnswer(web.StreamResponse):
    """An answer 200 in JSON, whose head and body are one write.

    aiohttp's own Response takes longer, because it allows for every kind of answer (docs/decisions, 0037). If the
    request is not HTTP/1.1, or its connection is to be closed, aiohttp writes the head.
    """

    def __init__(self, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(headers={**JSON_HEADERS, **headers})
        self._json = body
        self._writer: AbstractStreamWriter | None = None

    @property
    def keep_alive(self) -> bool | None:
        """True if the connection serves another request."""
        return super().keep_alive if self._writer is None else True

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Return the writer. The head is written here only if aiohttp writes it."""
        self.content_length = len(self._json)
        if request.version != HttpVersion11 or super().keep_alive is False or not request.keep_alive:
            return await super().prepare(request)
        self._writer = request.writer
        return self._writer

    async def write_eof(self, data: bytes = b"") -> None:
        """Write the answer, and return when the kernel has all of it."""
        body, self._json = self._json, b""
        if self._writer is None:
            await super().write_eof(body)
            return
        lines = "".join([f"{name}: {value}\r\n" for name, value in self.headers.items()])
        head = f"HTTP/1.1 200 OK\r\n{lines}Date: {_date(int(time.time()))}\r\n\r\n"
        await self._writer.write(head.encode() + body)
        await self._writer.drain()


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


class BoundedRunner(web.AppRunner):
    """An AppRunner and its listening sockets. Its connections are bounded, and answer malformed HTTP in JSON."""

    def __init__(
        self,
        app: web.Application,
        limits: Limits,
        refuse: Refuse,
        *,
        drain_timeout_s: float,
        on_refused: OnRefused = lambda status, code: None,
        on_drain_ends: Callable[[], None] = lambda: None,
        **options: Any,
    ) -> None:
        """Call `on_refused` with the status and code of each answer that no handler gives.

        `on_drain_ends` is called if requests are left shortly before the end of a drain: it refuses those that wait.
        """
        super().__init__(
            app,
            access_log=None,
            lingering_time=LINGER_S,
            read_bufsize=READ_AHEAD // 2,
            shutdown_timeout=CLOSE_S,
            **options,
        )
        self._limits = limits
        self._refuse = refuse
        self._on_refused = on_refused
        self._drain_timeout_s = drain_timeout_s
        self._on_drain_ends = on_drain_ends
        self._listening: list[asyncio.Server | SharedListener] = []
        self._socket_paths: list[str] = []

    async def listen(
        self,
        host: str,
        port: int,
        *,
        listener: ListenerName = "API",
        inherited: InheritedPort | None = None,
        context: ssl.SSLContext | None = None,
        handshake_timeout_s: float = 10.0,
    ) -> int:
        """Accept connections on a TCP port, and return the port, which the system chooses if `port` is 0.

        A SharedListener serves a port that other processes share, and TLS; any other port is asyncio's.
        """
        server = await self._set_up()
        if inherited is not None or context is not None:
            tls = Tls(context, handshake_timeout_s, server.room_for_handshakes) if context else None
            shared = listen_on_inherited(server, host, inherited or await bind_alone(host, port), tls)
            self._listening.append(shared)
            return shared.port
        opened = await open_tcp(server, host, port, listener=listener)
        self._listening.append(opened)
        bound_port: int = opened.sockets[0].getsockname()[1]
        return bound_port

    async def listen_on_unix_socket(self, path: str) -> None:
        """Accept connections on a unix socket. Raises OSError."""
        self._listening.append(await open_unix(await self._set_up(), path))
        self._socket_paths.append(path)

    async def cleanup(self) -> None:
        """Stop listening, close idle connections, and serve the requests that have begun for `drain_timeout_s`."""
        # While this process still listens, no other takes the path. Python does the same since 3.13.
        while self._socket_paths:
            with suppress(OSError):
                os.unlink(self._socket_paths.pop())
        while self._listening:
            self._listening.pop().close()
        if isinstance(self.server, _Server):
            # aiohttp's own shutdown would discard the bodies that are still arriving.
            await self.server.drain(self._drain_timeout_s, self._on_drain_ends)
        await super().cleanup()

    async def _set_up(self) -> "_Server":
        await self.setup()
        assert isinstance(self.server, _Server)  # noqa: S101  # setup() makes it
        return self.server

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            self._limits,
            self._refuse,
            self._on_refused,
            made.request_handler,
            request_factory=made.request_factory,
            **self._kwargs,
        )

    async def _cleanup_server(self) -> None:
        if isinstance(self.server, _Server):
            self.server.stop_sweeping()
        await super()._cleanup_server()


class _Server(web.Server):
    """A factory of connections, with the sweep and the evictions that concern all of them."""

    _connections: "dict[_Connection, asyncio.Transport]"  # type: ignore[assignment]  # made by __call__

    def __init__(self, limits: Limits, refuse: Refuse, on_refused: OnRefused, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits = fit_descriptors(limits)
        self.loop = asyncio.get_running_loop()
        self.refusals = RepeatLog(log, logging.INFO)
        self._refuse = refuse
        self._on_refused = on_refused
        self._evictable: deque[_Connection] = deque()
        self._may_evict = True
        self._is_draining = False
        self.heads = Heads()
        self.bytes_ahead = 0  # of all connections
        self._tls_buffers: dict[_Connection, int] = {}  # bytes; the connection whose buffers grew last is the last
        self._tls_bytes = 0
        self._sweeping = self.loop.call_later(SWEEP_S, self._sweep)

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self.loop, **self._kwargs)

    def stop_sweeping(self) -> None:
        self._sweeping.cancel()

    async def drain(self, timeout_s: float, on_end: Callable[[], None]) -> None:
        """Close idle connections, and wait until the others are closed. Call `on_end` shortly before the timeout."""
        self._is_draining = True  # the sweep closes what becomes idle
        await asyncio.sleep(0)  # what has arrived by now gets its handler
        for connection in list(self._connections):
            connection.close_if_idle()
        last_answers_s = min(LAST_ANSWERS_S, LAST_ANSWERS_SHARE * timeout_s)
        await self._all_closed(timeout_s - last_answers_s)
        if self._connections:
            on_end()
            for connection in list(self._connections):
                connection.end_body()
            await self._all_closed(last_answers_s)

    async def _all_closed(self, timeout_s: float) -> None:
        """Return when all connections are closed, or after the timeout."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while tasks := [each.task for each in self._connections if each.task is not None]:
                    await asyncio.wait(tasks)

    def _sweep(self) -> None:
        self._sweeping = self.loop.call_later(SWEEP_S, self._sweep)
        now = self.loop.time()
        for connection in self._connections:
            if connection.head_due < now:
                connection.time_out()
            elif self._is_draining:
                connection.close_if_idle()
        self._evictable.clear()  # some may be in a request by now
        self._may_evict = True
        self.refusals.log_counts()

    def refuse(self, error: GatewayError, cause: BaseException | None = None) -> web.Response:
        """Return the answer to a request that no handler sees, and report it."""
        self._on_refused(error.status, error.code)
        return self._refuse(error, cause)

    def room_for_handshakes(self) -> int:
        """Return the number of TLS handshakes that there may be beside the open connections."""
        return max(self.limits.max_connections - len(self._connections), LEAST_HANDSHAKES)

    def make_room(self) -> bool:
        """Return True if there is room for one more connection; evict one if necessary."""
        if len(self._connections) < self.limits.max_connections:
            return True
        while self._may_evict:
            while self._evictable:
                if self._evictable.popleft().evict():
                    return True
            waiting = [connection for connection in self._connections if connection.is_waiting]
            self._evictable.extend(nsmallest(1 + len(waiting) // EVICTION_SHARE, waiting, key=_Connection.eviction_key))
            self._may_evict = bool(waiting)  # until the next sweep: the search through all connections is expensive
        return False

    def bound_heads(self) -> None:
        """Refuse the most expensive heads while all incomplete heads together are too expensive."""
        if self.heads.are_too_expensive:
            with_heads = [connection for connection in self._connections if connection.head.size]
            most = 1 + len(with_heads) // EVICTION_SHARE
            for connection in nlargest(most, with_heads, key=lambda connection: connection.head.cost):
                if self.heads.are_too_expensive:
                    connection.drop_head()

    def bound_bytes_ahead(self) -> None:
        """Abort the connections with the most bytes behind a request while those of all together are too many."""
        if self.bytes_ahead > MAX_BYTES_AHEAD_OF_ALL:
            ahead = [connection for connection in self._connections if connection.size_ahead]
            most = 1 + len(ahead) // EVICTION_SHARE
            for connection in nlargest(most, ahead, key=lambda connection: connection.size_ahead):
                if self.bytes_ahead > MAX_BYTES_AHEAD_OF_ALL:
                    connection.abort_for_bytes_ahead()

    def bound_tls_buffers(self, connection: "_Connection", size: int) -> None:
        """Note the size of a connection's buffers. Close others without a request while all are too large."""
        self.forget_tls_buffers(connection)
        self._tls_buffers[connection] = size
        self._tls_bytes += size
        if self._tls_bytes > MAX_TLS_BUFFERS:
            for other in list(self._tls_buffers):
                if self._tls_bytes > MAX_TLS_BUFFERS and other is not connection and other.abort_if_answered():
                    self.forget_tls_buffers(other)

    def forget_tls_buffers(self, connection: "_Connection") -> None:
        """Forget the buffers of a connection, if they are noted."""
        self._tls_bytes -= self._tls_buffers.pop(connection, 0)


class _Connection(RequestHandler):
    """One HTTP connection, with the bounds of the module's docstring."""

    __slots__ = (
        "_answer_timer",
        "_answered",
        "_body",
        "_body_bytes",
        "_bytes_ahead",
        "_is_half_closed",
        "_kept",
        "_largest_read",
        "_server",
        "_sizes_ahead",
        "_unread",
        "head",
        "head_due",
        "size_ahead",
    )

    def __init__(self, server: _Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._answer_timer: asyncio.TimerHandle | None = None
        self.head_due = NEVER  # the loop's time at which the awaited head must be complete
        self.head = IncompleteHead(server.heads)
        # Bytes of each request that has not had its turn, in order; 0 for one that arrived behind no other.
        self._sizes_ahead: deque[int] = deque()
        self._bytes_ahead = 0  # their sum
        self.size_ahead = 0  # in bytes, with those in `_kept`, as last reported to the server
        self._answered = 0  # requests
        self._body = EMPTY_PAYLOAD  # of the last request that has arrived
        self._body_bytes = 0  # its length, if some of it is to come
        self._kept = b""  # data behind as many requests as may wait
        self._largest_read = SMALL_READ  # in bytes; with TLS
        self._unread = EMPTY_PAYLOAD  # of an answered request: aiohttp reads it and discards it
        self._is_half_closed = False  # the caller sends no more, and waits for its answers

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._server.make_room():
            self._server.refusals.note("connection refused: all connections are in a request")
            self._force_close = True
            transport.write(_encode(self._server.refuse(Overloaded(TOO_MANY))))  # type: ignore[attr-defined]
            transport.close()
            return
        self.head_due = self._server.loop.time() + self._server.limits.header_timeout_s
        # An answer counts as written once the kernel has all of it. With 0, uvloop's TLS would also pause the writing
        # of an empty buffer, at every second read or write: an answer then counted as unread.
        transport.set_write_buffer_limits(high=1)  # type: ignore[attr-defined]
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """Give the parser one head, or one part of a body, at a time.

        At an error, the parser discards the requests that it has parsed from the same data. And an incomplete head is
        counted only if the parser gets it alone.

        Once as many requests wait as aiohttp allows, the rest of the data is kept. aiohttp calls this method with no
        data when it resumes the reading.
        """
        if len(data) > self._largest_read and self.ssl_context is not None:
            self._largest_read = len(data)
            self._server.bound_tls_buffers(self, 2 * len(data))
        if isinstance(self._payload_parser, _DiscardingParser):
            super().data_received(data)
            return
        data, at = self._kept + data, 0
        while self._is_parsing:
            is_queue_full = len(self._messages) >= self._max_msg_queue_size
            rest_of_body = 0 if self._body.is_eof() else self._body_bytes - self._body.total_bytes
            if is_queue_full:
                end = at  # no new data: the parser may go on with what it has buffered
            elif rest_of_body:
                end = min(at + rest_of_body, len(data))
            else:
                end = self.head.end_in(data, at)
            self._receive(data[at:end], is_head=not rest_of_body)
            at = end
            if is_queue_full or at == len(data):
                self._kept = data[at:]
                if self._bytes_ahead or self._kept or self.size_ahead:
                    self._count_bytes_ahead()
                return
        self._kept = b""  # the connection serves no further request
        self._count_bytes_ahead()

    @property
    def _is_parsing(self) -> bool:
        """False if the connection is closing, or the parser has failed: each further error would quote the data."""
        has_failed = bool(self._messages) and isinstance(self._messages[-1][0], _ErrInfo)
        return not (self._close or self._force_close or has_failed)

    def _receive(self, part: bytes, *, is_head: bool) -> None:
        """Receive a head or its beginning, or a part of a body."""
        queued, is_behind = len(self._messages), self._is_in_request
        super().data_received(part)
        self._decline_upgrade()
        if len(self._messages) > queued:
            self._note_message()
            self.head_due = NEVER
            if self.head.size:
                self.head.clear()
            self._sizes_ahead.extend([0] * (len(self._messages) - queued))
        elif is_head:
            self._bound_head(part)
        if self._sizes_ahead and self._messages and is_behind:
            self._bound_bytes_ahead(part)

    def _decline_upgrade(self) -> None:
        """Let the parser go on after a request to upgrade, which is ignored."""
        if self._upgraded and self._parser is not None:
            self._upgraded = False
            self._parser.set_upgraded(False)
            self._message_tail = b""  # not empty only behind chunks, after which the connection is closed

    def _note_message(self) -> None:
        """Note the body of the request that has arrived. After an error of the parser, end the body it stood in."""
        message, body = self._messages[-1]
        if not isinstance(message, _ErrInfo):
            self._body = body
            if not body.is_eof():
                # The end of chunks is not known.
                self._body_bytes = sys.maxsize if message.chunked else int(message.headers.get(hdrs.CONTENT_LENGTH, 0))
            return
        drop_tracebacks(message.exc)  # its frames hold the data, and the message itself
        # The parser gives the body no more data. Without an end, its reader would wait until its timeout.
        if self._body is self._unread:
            self._end_unread()
        elif not self._body.is_eof():
            self._body.set_exception(web.RequestPayloadError())

    def _end_unread(self) -> None:
        """Let aiohttp wait no longer for the rest of a body; an error there would be logged with a traceback."""
        if not self._unread.is_eof():
            self._unread.feed_eof()

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio's protocols return bool | None
        """Keep the connection open for the answers to complete requests (RFC 9112, 9.6). With TLS that cannot be."""
        # Only behind another request: the task of a connection takes the first one by itself.
        is_behind = self._request_count > self._answered + 1
        if is_behind and self._messages and self._messages[-1][1] is self._body and not self._body.is_eof():
            self._messages.pop()  # the rest of its body will never arrive
            if self._sizes_ahead:  # otherwise aborted
                self._bytes_ahead -= self._sizes_ahead.pop()
                self._count_bytes_ahead()
            self._body = EMPTY_PAYLOAD
        self._is_half_closed = (
            self._is_in_request and self._body.is_eof() and self._payload_parser is None and self.ssl_context is None
        )
        return self._is_half_closed

    def _bound_head(self, data: bytes) -> None:
        """Bound the time and the size of an incomplete head, and the size of all of them.

        The time of a head that begins behind a request starts with the answer to that request.
        """
        if not data:
            return
        if self.head_due == NEVER and not self._is_in_request:
            self.head_due = self._server.loop.time() + self._server.limits.header_timeout_s
        self.head.add(data, self.max_headers)
        if self.head.size > MAX_HEAD_BYTES:
            self._refuse_large_head()
        else:
            self._server.bound_heads()

    def _refuse_large_head(self) -> None:
        self._server.refusals.note("request head refused: too large")
        self._refuse_in_turn(MalformedHttp(f"Request line and headers may have {MAX_HEAD_BYTES:,} bytes"))

    def _refuse_in_turn(self, refusal: GatewayError) -> None:
        """Refuse an incomplete head after the answers to the requests before it, and close the connection."""
        self.head_due = NEVER
        self.head.clear()
        self._messages.append((_ErrInfo(refusal.status, refusal, ""), EMPTY_PAYLOAD))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _bound_bytes_ahead(self, data: bytes) -> None:
        """Bound pipelined requests: aiohttp would read 32 of them ahead, each with up to 512 kB of body."""
        self._sizes_ahead[-1] += len(data)
        self._bytes_ahead += len(data)
        if self._bytes_ahead > MAX_BYTES_AHEAD and not self._buffer_paused:
            self._pause_reading_for_buffer()  # until the last of them has its turn

    def _count_bytes_ahead(self) -> None:
        """Report the bytes behind the request in progress to the server, which bounds those of all connections."""
        size = self._bytes_ahead + len(self._kept)
        if size != self.size_ahead:
            self._server.bytes_ahead += size - self.size_ahead
            self.size_ahead = size
            self._server.bound_bytes_ahead()

    def abort_for_bytes_ahead(self) -> None:
        """Abort this connection: with those of the others, the bytes behind its request are too many."""
        self._server.refusals.note("connection closed: all requests sent ahead together are too large")
        self._forget_bytes_ahead()
        if self.transport is not None:
            self.transport.abort()

    def _forget_bytes_ahead(self) -> None:
        self._bytes_ahead, self._kept = 0, b""
        self._sizes_ahead.clear()
        self._server.bytes_ahead -= self.size_ahead
        self.size_ahead = 0

    def _resume_reading_if_drained(self) -> None:
        if not self._messages:  # aiohttp would read on while there are few: each may have a large body
            super()._resume_reading_if_drained()

    @property
    def _is_in_request(self) -> bool:
        """True while a request that has arrived is not answered."""
        return self._request_count > self._answered

    @property
    def is_waiting(self) -> bool:
        """True without a request in progress: the connection waits for a head or for its rest."""
        return self._waiter is not None and not self._waiter.done()

    @property
    def task(self) -> "asyncio.Task[None] | None":
        """The task that serves the requests; None once it has ended."""
        return self._task_handler

    def eviction_key(self) -> tuple[float, float]:
        """Return a key that sorts connections in eviction order."""
        return self.head_due, self._next_keepalive_close_time

    def evict(self) -> bool:
        """Close this connection and return True, or return False if it has a request by now."""
        if not self.is_waiting:
            return False
        self._server.refusals.note("connection closed to make room for another")
        if self.ssl_context is not None and self.transport is not None:
            self.transport.abort()  # an orderly end of TLS would wait for the caller, and keep the place
            self.force_close()
        else:
            self._refuse_now(Overloaded(TOO_MANY))
        return True

    def abort_if_answered(self) -> bool:
        """Abort this connection and return True, or return False if a request is in progress.

        An orderly end of TLS would wait for the caller, and keep the buffers.
        """
        if self._is_in_request or self.transport is None:
            return False
        self._server.refusals.note("connection closed: all TLS buffers together are too large")
        self.transport.abort()
        return True

    def drop_head(self) -> None:
        """Refuse the incomplete head of this connection, because all of them are too expensive."""
        self._server.refusals.note("request head refused: all incomplete heads together are too large")
        self._refuse_in_turn(Overloaded(TOO_MANY_HEADS))

    def close_if_idle(self) -> None:
        """Close this connection if no byte of a request has arrived."""
        if self.is_waiting and not self.head.size:
            self.force_close()

    def end_body(self) -> None:
        """Let the reader of a body that is still arriving fail with Draining."""
        request = self._current_request
        if request is not None and not request.content.is_eof():
            request.content.set_exception(Draining())

    def time_out(self) -> None:
        """Close this connection: its head has not arrived in time."""
        self._server.refusals.note("request head refused: too slow")
        self._refuse_now(RequestTimeout("The request did not arrive in time. Nothing was queued; send it again"))

    def _refuse_now(self, refusal: GatewayError) -> None:
        """Close the connection, with an answer to an incomplete head.

        A caller that has sent no byte gets no answer: it would take this one for the answer to its next request.
        """
        if self.head.size and self.transport is not None:
            self.transport.write(_encode(self._server.refuse(refusal)))
        self.head_due = NEVER
        self.head.clear()
        self.force_close()

    def pause_writing(self) -> None:
        """Start the timeout of a caller that does not read its answer. aiohttp has none."""
        super().pause_writing()
        if self.transport is not None:
            self._answer_timer = self._server.loop.call_later(
                self._server.limits.answer_timeout_s, self.transport.abort
            )

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_answer_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._cancel_answer_timer()
        self.head_due = NEVER
        self.head.clear()
        self._end_unread()
        if self._current_request is not None and SLOT in self._current_request:
            self._current_request[SLOT].abandon()
        self._server.forget_tls_buffers(self)
        self._body = self._unread = EMPTY_PAYLOAD
        self._forget_bytes_ahead()
        # The body of a request behind the one in progress refers to its connection: a reference cycle.
        self._messages = deque((message, EMPTY_PAYLOAD) for message, _ in self._messages)
        # With an error, aiohttp would leave it in the future that the writing frame awaits: a cycle that holds the
        # answer.
        super().connection_lost(None)

    def _cancel_answer_timer(self) -> None:
        if self._answer_timer is not None:
            self._answer_timer.cancel()
            self._answer_timer = None

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        self._payload_parser = _DiscardingParser()  # what arrives from now on is no request

        async def answer_and_linger(request: web.BaseRequest) -> web.StreamResponse:
            response = self.handle_error(request, err_info.status, err_info.exc, err_info.message)
            with suppress(ConnectionError):  # the caller has hung up, and aiohttp notices by itself
                await response.prepare(request)
                await response.write_eof()
                await self._linger(request.content)
            return response

        return answer_and_linger

    async def _handle_request(self, request: web.BaseRequest, *rest: Any) -> tuple[web.StreamResponse, bool]:
        if self._sizes_ahead and (size := self._sizes_ahead.popleft()):
            self._bytes_ahead -= size
            self._count_bytes_ahead()
        try:
            response, is_lost = await super()._handle_request(request, *rest)
        finally:
            self._answered += 1
            if SLOT in request:
                request[SLOT].give_back()
        if isinstance(response, web.Response):
            response.body = None  # aiohttp keeps the response until the connection's next request
        if self.transport is not None:  # otherwise a reference cycle: the body refers to its connection
            self._unread = request.content
        is_body_broken = request.content.exception() is not None
        if is_body_broken:
            self._end_unread()
        if self._is_half_closed and not self._messages:
            self.close()
        # The caller learns only now that the connection closes, and may have sent more.
        is_close_unexpected = is_body_broken or (request.keep_alive and not response.keep_alive)
        is_closed_already = is_lost or self._force_close or self._payload_parser or self._is_half_closed
        if is_close_unexpected and not is_closed_already:
            await self._linger(request.content)
        elif self.head.size and not self._is_in_request:  # the head began behind this request
            self.head_due = self._server.loop.time() + self._server.limits.header_timeout_s
        return response, is_lost

    def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> Coroutine[Any, Any, tuple[web.StreamResponse, bool]]:
        resp.headers.setdefault(hdrs.SERVER, SERVER)  # aiohttp's own header names its version, and Python's
        return super().finish_response(request, resp, start_time)

    async def _linger(self, body: StreamReader) -> None:
        """Discard the rest of the request's body, then what arrives behind it, for at most LINGER_S in all."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while not body.is_eof():
                    await body.readany()
                if not self._force_close:
                    await self._discard_rest()
        if not body.is_eof():
            # After its end, a body must get no data: close() lets data_received drop it. Without an end, aiohttp would
            # wait for the rest once more.
            self.close()
            body.feed_eof()

    async def _discard_rest(self) -> None:
        """Discard what arrives behind the last request. An incomplete head is discarded too."""
        self.head_due = NEVER
        self.head.clear()
        rest = self._payload_parser = _DiscardingParser()
        if self._buffer_paused:
            self._resume_reading_for_buffer()
        if self.transport is not None and self.transport.can_write_eof():
            with suppress(OSError):  # the caller has hung up
                self.transport.write_eof()
        await rest.drain()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Return the answer to a request that the parser refused, or that failed outside its handler."""
        if isinstance(exc, GatewayError):  # of _refuse_in_turn
            return self._server.refuse(exc)
        if status != 400:
            return self._server.refuse(InternalError(), exc)
        self._server.refusals.note(f"malformed HTTP: {type(exc).__name__}")
        return self._server.refuse(MalformedHttp())

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.error(*args, **kwargs)


class _DiscardingParser:
    """A parser that discards all data. RequestHandler calls its two `feed_` methods."""

    def __init__(self) -> None:
        self._is_coming = True
        self._ended = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        self._is_coming = True
        return False, b""

    def feed_eof(self) -> None:
        self._ended.set()

    async def drain(self) -> None:
        """Return when the caller hangs up, or when nothing arrives for QUIET_S."""
        while self._is_coming:
            self._is_coming = False
            with suppress(TimeoutError):
                async with asyncio.timeout(QUIET_S):
                    await self._ended.wait()
                    return


def _encode(response: web.Response) -> bytes:
    """Return an answer as bytes for the transport of a connection that is closed afterwards."""
    headers = {
        **response.headers,
        "Content-Length": str(response.content_length),
        "Date": formatdate(usegmt=True),
        "Connection": "close",
    }
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)  # type: ignore[arg-type]
