"""What aiohttp's own listener lacks: bounds on what a connection may cost, and errors of the HTTP parser in JSON.

    waiting for a head ──→ in a request ──→ idle, kept alive ──first byte of the next head──→ waiting for a head
     │                      │                └ keepalive_timeout_s: closed
     │                      └ body_timeout_s (api.py): 408 · answer_timeout_s, for an answer that nobody reads: cut
     └ header_timeout_s: 408, or just closed if not an byte has come

Heads are looked at by one sweep a second over all connections; no request has a timer of its own for that.

When max_connections are open, room for a new one is made by closing the one that can best be spared: the one that has
waited longest for a head, else the one that has been idle longest. A caller sends its head at once, so slow or silent
connections, however many and from wherever, push each other out and nobody else. Only when every connection is in a
request is a new one refused.
"""

import asyncio
import logging
import resource
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from email.utils import formatdate
from heapq import nsmallest
from math import inf
from typing import Any, NamedTuple

from aiohttp import web
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway import errors
from gateway.web import answers

log = logging.getLogger(__name__)

SWEEP_S = 1.0
LINGER_S = 5.0  # an unread body is drained so long, for a RST would take the answer from its caller (as nginx does)
QUIET_S = 0.2  # and no longer than until nothing comes
MAX_HEAD_BYTES = 32 * 1024  # of a request line and headers that come in pieces; nginx: 4 buffers of 8 kB
MAX_BYTES_AHEAD = 64 * 1024
SPARE_DESCRIPTORS = 128  # for everything that is no caller's connection
SPARED_SHARE = 8  # one look at all connections finds an eighth of them to be spared, not one
NEVER = inf


class Limits(NamedTuple):
    """What a listener grants its connections."""

    header_timeout_s: float  # for a request's head: from the accept, later from its first byte
    answer_timeout_s: float  # for a caller to read its answer
    max_connections: int


def fit_descriptors(limits: Limits) -> Limits:
    """The limits, with as many connections as this process may have descriptors for; it is allowed more, if possible.

    Without a free descriptor nothing could be accepted, and no connection to broker or database opened again.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = limits.max_connections + SPARE_DESCRIPTORS
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return limits
    soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    fitting = max(1, min(limits.max_connections, soft - SPARE_DESCRIPTORS))
    if fitting < limits.max_connections:
        log.warning(
            "at most %s connections instead of %s: this process may have %s descriptors (ulimit -n)",
            fitting,
            limits.max_connections,
            soft,
        )
    return limits._replace(max_connections=fitting)


class Noise:
    """What strangers can cause is logged in few lines: the first of a kind at once, then how many more there were."""

    INTERVAL_S = 10.0

    def __init__(self, now: float) -> None:
        self._more: Counter[str] = Counter()
        self._since = now

    def heard(self, kind: str) -> None:
        """Note one of a kind; kinds are few, and none is made of what a caller sent."""
        if kind in self._more:
            self._more[kind] += 1
        else:
            self._more[kind] = 0
            log.info("%s", kind)

    def sum_up(self, now: float) -> None:
        """Called now and then: once in an interval, say what was heard again."""
        if now - self._since < self.INTERVAL_S:
            return
        for kind, count in self._more.items():
            if count:
                log.info("%s: and %s more in the last %.0f s", kind, f"{count:,}", now - self._since)
        self._more.clear()
        self._since = now


class JsonRunner(web.AppRunner):
    """An AppRunner whose connections are bounded, and answer malformed HTTP as everything else: in JSON."""

    def __init__(
        self,
        app: web.Application,
        limits: Limits,
        *,
        on_refused: Callable[[int, str], None] = lambda status, code: None,
        **options: Any,
    ) -> None:
        """`on_refused` is told status and code of what no handler sees."""
        super().__init__(app, access_log=None, lingering_time=LINGER_S, **options)
        self._limits = limits
        self._on_refused = on_refused

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            self._limits,
            self._on_refused,
            made.request_handler,
            request_factory=made.request_factory,
            **self._kwargs,
        )

    async def _cleanup_server(self) -> None:
        if isinstance(self._server, _Server):
            self._server.stop_sweeping()
        await super()._cleanup_server()


class Site(web.TCPSite):
    """A TCPSite that waits no longer for a TLS handshake than it is told; aiohttp's takes the event loop's 60 s.

    A connection is no connection of the server's before, and so is not in its bounds.
    """

    def __init__(self, *arguments: Any, handshake_timeout_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._handshake_timeout_s = handshake_timeout_s

    async def start(self) -> None:
        await web.BaseSite.start(self)
        assert self._runner.server is not None  # noqa: S101  # setup() has been called
        self._server = await asyncio.get_running_loop().create_server(
            self._runner.server,
            self._host,
            self._port,
            ssl=self._ssl_context,
            ssl_handshake_timeout=self._handshake_timeout_s if self._ssl_context else None,
            backlog=self._backlog,
            reuse_port=self._reuse_port,
        )


class _Server(web.Server):
    _connections: "dict[_Connection, asyncio.Transport]"  # type: ignore[assignment]  # of our own making, all of them

    def __init__(self, limits: Limits, on_refused: Callable[[int, str], None], *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.limits = fit_descriptors(limits)
        self.on_refused = on_refused
        self.noise = Noise(self._loop.time())
        self._spared: deque[_Connection] = deque()
        self._none_to_spare = False
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def __call__(self) -> RequestHandler:
        return _Connection(self, loop=self._loop, **self._kwargs)

    def stop_sweeping(self) -> None:
        self._sweeping.cancel()

    def _sweep(self) -> None:
        now = self._loop.time()
        for connection in self._connections:
            if connection.head_due < now:
                connection.give_up_waiting()
        self._spared.clear()  # what could be spared a while ago may be busy by now
        self._none_to_spare = False
        self.noise.sum_up(now)
        self._sweeping = self._loop.call_later(SWEEP_S, self._sweep)

    def has_room(self) -> bool:
        """Whether one more connection can be had, if need be in place of another."""
        if len(self._connections) < self.limits.max_connections:
            return True
        while not self._none_to_spare:
            while self._spared:
                if self._spared.popleft().make_room():
                    return True
            waiting = [connection for connection in self._connections if connection.is_waiting]
            self._spared.extend(nsmallest(1 + len(waiting) // SPARED_SHARE, waiting, key=_Connection.worth))
            self._none_to_spare = not waiting  # until the next sweep: looking at all of them is not cheap
        return False


class _Connection(RequestHandler):
    __slots__ = ("_bytes_ahead", "_cut", "_head_bytes", "_server", "head_due")

    def __init__(self, server: _Server, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._cut: asyncio.TimerHandle | None = None
        self.head_due = NEVER  # when the head that we wait for must be here; of an idle connection: never
        self._head_bytes = 0  # of a head of which a part has come
        self._bytes_ahead = 0  # of requests sent before the one in progress is answered

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if not self._server.has_room():
            self._server.noise.heard("connection refused: every other is in a request")
            self._force_close = True
            refusal = errors.Overloaded("Too many connections are open. Nothing was queued; send it again")
            self._server.on_refused(refusal.status, refusal.code)
            transport.write(_bytes(refusal))  # type: ignore[attr-defined]
            transport.close()
            return
        self.head_due = self._loop.time() + self._server.limits.header_timeout_s
        super().connection_made(transport)

    def data_received(self, data: bytes) -> None:
        request = self._current_request
        is_ahead = request is not None and request.content.is_eof()  # else it is the request's own body
        super().data_received(data)
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            self._wait_for_rest_of_head(len(data))
        elif self.head_due != NEVER:
            if self._request_count:  # the head is complete
                self.head_due, self._head_bytes = NEVER, 0
            else:  # it came before aiohttp's task had begun to wait for it
                self._head_bytes += len(data)
        elif is_ahead:
            self._bound_what_is_sent_ahead(len(data))
        elif self._head_bytes:
            self._head_bytes = 0

    def _wait_for_rest_of_head(self, size: int) -> None:
        if self.head_due == NEVER:
            self.head_due = self._loop.time() + self._server.limits.header_timeout_s
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES:
            self._server.noise.heard("head refused: too large")
            refusal = errors.MalformedHttp(f"Request line and headers may have {MAX_HEAD_BYTES:,} bytes")
            self._messages.append((_ErrInfo(refusal.status, refusal, ""), EMPTY_PAYLOAD))
            if self._waiter is not None:
                self._waiter.set_result(None)

    def _bound_what_is_sent_ahead(self, size: int) -> None:
        """A request is being handled, and more comes: aiohttp would read 32 ahead, each with up to 512 kB of body."""
        if self._messages:
            self._head_bytes = 0
            self._bytes_ahead += size
            if self._bytes_ahead > MAX_BYTES_AHEAD and not self._buffer_paused:
                self._pause_reading_for_buffer()  # until the next of them has its turn
        else:
            self._head_bytes += size
            if self._head_bytes > MAX_HEAD_BYTES:
                self._server.noise.heard("head refused: too large")
                self.close()  # behind the answer that is being made

    def _resume_reading_if_drained(self) -> None:
        self._bytes_ahead = 0
        super()._resume_reading_if_drained()

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for a request, or for the rest of its head: nothing is in progress."""
        return self._waiter is not None and not self._waiter.done()

    def worth(self) -> tuple[float, float]:
        """Who waits for a head goes first, then who is idle; of each the one that has been so for longest."""
        return self.head_due, self._next_keepalive_close_time

    def make_room(self) -> bool:
        """Close this connection, unless it has something to do by now."""
        if not self.is_waiting:
            return False
        self._server.noise.heard("connection closed to make room for another")
        self._turn_away(errors.Overloaded("Too many connections are open. Nothing was queued; send it again"))
        return True

    def give_up_waiting(self) -> None:
        """The head has not arrived in time."""
        self._server.noise.heard("head refused: too slow")
        self._turn_away(errors.RequestTimeout("The request did not arrive in time. Nothing was queued; send it again"))

    def _turn_away(self, refusal: errors.GatewayError) -> None:
        """Answer half a head. Who has not sent an byte is not answered: it would take that for its next request's."""
        if self._head_bytes and self.transport is not None:
            self._server.on_refused(refusal.status, refusal.code)
            self.transport.write(_bytes(refusal))
        self.head_due = NEVER
        self.force_close()

    def pause_writing(self) -> None:
        """The transport holds more than it likes: the caller does not read. aiohttp would wait for ever."""
        super().pause_writing()
        if self.transport is not None:
            self._cut = self._loop.call_later(self._server.limits.answer_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._keep()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._keep()
        self.head_due = NEVER
        super().connection_lost(exc)

    def _keep(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None

    def _make_error_handler(self, err_info: _ErrInfo) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        """Answer, and drain."""

        async def answer_and_drain(request: web.BaseRequest) -> web.StreamResponse:
            response = self.handle_error(request, err_info.status, err_info.exc, err_info.message)
            with suppress(ConnectionError):  # the caller has hung up: aiohttp finds out by itself
                await response.prepare(request)
                await response.write_eof()
                await self._linger()
            return response

        return answer_and_drain

    async def _handle_request(self, request: web.BaseRequest, *rest: Any) -> tuple[web.StreamResponse, bool]:
        response, is_lost = await super()._handle_request(request, *rest)
        if (
            request.keep_alive
            and not response.keep_alive  # its caller may have sent more, and hears only now that we close
            and request.content.is_eof()  # else aiohttp drains
            and not (is_lost or self._force_close or self._payload_parser)
        ):
            await self._linger()
        return response, is_lost

    async def _linger(self) -> None:
        """Drain before closing: with bytes unread the kernel would send a reset, which overtakes the answers."""
        rest = self._payload_parser = _Rest()  # nothing is looked at any more
        if self._buffer_paused:
            self._resume_reading_for_buffer()
        if self.transport is not None and self.transport.can_write_eof():
            self.transport.write_eof()
        await rest.drain()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what the HTTP parser refused, and log a line where aiohttp logs a traceback."""
        request_id = answers.request_id_for([])
        if status == 400:
            self._server.noise.heard(f"malformed HTTP: {type(exc).__name__}")
            response = answers.refuse(exc if isinstance(exc, errors.MalformedHttp) else errors.MalformedHttp())
        else:
            log.error("request %s failed outside its handler", request_id, exc_info=exc)
            response = answers.refuse(errors.InternalError())
        self._server.on_refused(response.status, response[answers.REFUSED_WITH])
        response.headers[answers.REQUEST_ID_HEADER] = request_id
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kwargs: Any) -> None:
        log.error(*args, **kwargs)


class _Rest:
    """Whatever a refused caller still sends: taken, and thrown away."""

    def __init__(self) -> None:
        self._is_coming = True
        self._ended = asyncio.Event()

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Called by RequestHandler in place of a parser."""
        self._is_coming = True
        return False, b""

    def feed_eof(self) -> None:
        """Called by RequestHandler when the connection is lost."""
        self._ended.set()

    async def drain(self) -> None:
        """Until the caller hangs up, or nothing has come for a moment, or it has been enough."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self._is_coming:
                    self._is_coming = False
                    with suppress(TimeoutError):
                        async with asyncio.timeout(QUIET_S):
                            await self._ended.wait()
                            return


def _bytes(refusal: errors.GatewayError) -> bytes:
    """The answer to a caller whose request was not looked at, as it goes over the wire."""
    response = answers.refuse(refusal)
    headers = {
        **response.headers,
        "Content-Length": str(response.content_length),
        "Date": formatdate(usegmt=True),
        "Connection": "close",
        answers.REQUEST_ID_HEADER: answers.request_id_for([]),
    }
    lines = [f"HTTP/1.1 {response.status} {response.reason}", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, "", ""]).encode() + bytes(response.body)  # type: ignore[arg-type]
