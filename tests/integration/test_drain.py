"""The drain of a listener, its bounds on request heads, and its last reads. Promises 11 and 12.

Its application's answers do not say `Connection: close` in a drain.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import pytest
from aiohttp import web

from gateway.web.answers import refuse_unhandled
from gateway.web.connections import NEVER, BoundedRunner, _Connection, _DiscardingParser, _Server
from gateway.web.sockets import Limits
from tests.support.eventually import eventually
from tests.support.raw_http import Conversation, connect

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"


class Listener:
    """A listener whose requests are answered once `may_answer` is set."""

    def __init__(self, drain_s: float = 8.0, header_timeout_s: float = 5.0) -> None:
        self.drain_s = drain_s
        self.may_answer = asyncio.Event()
        self.closes = False  # after an answer
        app = web.Application()
        app.router.add_get("/", self._answer)
        self.runner = BoundedRunner(app, Limits(header_timeout_s, 5.0, 10), refuse_unhandled, drain_timeout_s=drain_s)
        self.url = ""

    async def listen(self) -> None:
        self.url = f"http://127.0.0.1:{await self.runner.listen('127.0.0.1', 0)}/"

    async def _answer(self, _request: web.Request) -> web.Response:
        await self.may_answer.wait()
        response = web.Response(text="answered", headers={"Server": "test"})
        if self.closes:
            response.force_close()
        return response


@asynccontextmanager
async def listening(*, header_timeout_s: float = 5.0) -> AsyncIterator[Listener]:
    one = Listener(header_timeout_s=header_timeout_s)
    await one.listen()
    try:
        yield one
    finally:
        one.may_answer.set()
        await one.runner.cleanup()


@pytest.fixture
async def listener() -> AsyncIterator[Listener]:
    async with listening() as one:
        yield one


@pytest.fixture
async def caller(listener: Listener) -> AsyncIterator[Conversation]:
    async with connect(listener.url) as conversation:
        yield conversation


@asynccontextmanager
async def in_a_request(listener: Listener, request: bytes = GET) -> AsyncIterator[tuple[Conversation, _Connection]]:
    """Yield a caller and its connection, whose request waits for its answer."""
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with connect(listener.url) as caller:
        await caller.send(request)
        await eventually(lambda: any(each._current_request is not None for each in server._connections))
        (connection,) = server._connections
        yield caller, connection


async def test_a_connection_that_becomes_idle_in_a_drain_is_closed(listener: Listener, caller: Conversation) -> None:
    await caller.send(GET)
    await asyncio.sleep(0.1)
    drain = asyncio.create_task(listener.runner.cleanup())
    await asyncio.sleep(0.2)
    listener.may_answer.set()
    answer = await caller.read_answer()
    assert answer.status == 200
    assert b"Connection: close" not in answer.raw
    async with asyncio.timeout(listener.drain_s / 2):
        await drain
    assert await caller.is_closed()


async def test_idle_connections_do_not_delay_a_drain(listener: Listener, caller: Conversation) -> None:
    listener.may_answer.set()
    await caller.send(GET)
    await caller.read_answer()
    async with connect(listener.url), asyncio.timeout(0.8):  # and one without a request
        await asyncio.sleep(0.1)
        await listener.runner.cleanup()
    assert await caller.is_closed()


async def test_a_caller_that_hangs_up_in_a_head_leaves_nothing_and_the_end_no_timer(listener: Listener) -> None:
    """Otherwise the bound on all heads together would in the end close every connection."""
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with connect(listener.url) as caller:
        await caller.send(b"GET / HTTP/1.1\r\nHost: ")
        await eventually(lambda: server.heads.cost > 0)
    await eventually(lambda: server.heads.cost == 0)
    await listener.runner.cleanup()
    assert server._sweeping.cancelled()


async def test_an_evicted_head_costs_nothing_at_once_and_a_request_is_not_evicted(listener: Listener) -> None:
    """Data of other connections, in the same turn of the event loop, would otherwise evict more of them."""
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with connect(listener.url) as caller:
        await caller.send(b"GET / HTTP/1.1\r\nHost: ")
        await eventually(lambda: server.heads.cost > 0)
        (connection,) = server._connections
        assert connection.evict()
        assert server.heads.cost == 0
        assert (await caller.read_answer()).status == 503
    await eventually(lambda: not server._connections)
    async with connect(listener.url) as caller:
        await caller.send(GET)
        await eventually(lambda: bool(server._connections))
        (connection,) = server._connections
        await eventually(lambda: not connection.is_waiting and connection._current_request is not None)
        assert not connection.evict()
        listener.may_answer.set()
        assert (await caller.read_answer()).status == 200


HEADER_OF_1_KB = b"X-A: " + b"a" * 1_017 + b"\r\n"


async def test_a_head_in_pieces_may_have_32_kb(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    listener.may_answer.set()
    async with connect(listener.url) as caller, connect(listener.url) as other:
        await caller.send(GET[:-2] + HEADER_OF_1_KB * 31)
        await eventually(lambda: server.heads.cost > 0)
        await caller.send(b"\r\n")
        assert (await caller.read_answer()).status == 200
        await other.send(GET[:-2] + HEADER_OF_1_KB * 33)
        assert (await other.read_answer()).status == 400


@pytest.mark.parametrize("between", [b"", GET], ids=["", "and another request"])
async def test_a_head_behind_a_request_may_have_32_kb(listener: Listener, between: bytes) -> None:
    async with in_a_request(listener, GET + between) as (caller, connection):
        await caller.send(GET[:-2] + HEADER_OF_1_KB * 33)
        await eventually(lambda: bool(connection._messages))
        assert connection.head.cost == 0
        listener.may_answer.set()
        for _ in range(2 if between else 1):
            assert (await caller.read_answer()).status == 200
        assert (await caller.read_answer()).status == 400
        assert await caller.is_closed()


UPGRADE = GET[:-2] + b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"
POST = GET[:-2] + b"Content-Length: 5\r\n\r\n12345"
BEGUN = GET[:-2] + b"X-A: b"
# What comes before a head, and the length of its first part, if it comes in two.
BEFORE_A_HEAD = {
    "a request": (GET, 0),
    "line ends": (b"\r\n\r\n" + GET, 0),
    "a request whose head is cut": (GET, 10),
    "a request whose end of the head is cut": (GET, len(GET) - 2),
    "a request whose last byte comes alone": (GET, len(GET) - 1),
    "a body": (POST, 0),
    "a body that is cut": (POST, len(POST) - 3),
    "two requests": (POST + GET, 0),
    "a request to upgrade": (UPGRADE, 0),
    "requests around one to upgrade": (POST + UPGRADE + POST, 0),
    "more requests than may wait": (GET * 100, 0),
    "more requests to upgrade than may wait": (UPGRADE * 100, 0),
    "a body that is too large to wait": (GET[:-2] + b"Content-Length: 200000\r\n\r\n" + bytes(200_000), 0),
    "blank lines in a body": (GET[:-2] + b"Content-Length: 40\r\n\r\n" + b"\r\n" * 20, 0),
}


@pytest.mark.parametrize(("before", "cut"), BEFORE_A_HEAD.values(), ids=BEFORE_A_HEAD)
async def test_a_head_is_counted_that_begins_in_one_read_with_the_end_of_a_request(
    listener: Listener, before: bytes, cut: int
) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    listener.may_answer.set()
    requests = before.count(b"GET")
    async with connect(listener.url) as caller:
        await eventually(lambda: bool(server._connections))
        ((connection, _),) = server._connections.items()
        connection.data_received(before[:cut])
        connection.data_received(before[cut:] + BEGUN)
        for _ in range(requests):
            assert (await caller.read_answer()).status == 200
        await eventually(lambda: connection.is_waiting)
        assert server.heads.cost == 3 * len(BEGUN) + 2 * 350
        assert connection.head_due != NEVER
        await caller.send(b"\r\n\r\n")
        assert (await caller.read_answer()).status == 200
        await caller.send(before)  # nothing is left of what was counted
        for _ in range(requests):
            assert (await caller.read_answer()).status == 200
        assert (server.heads.cost, connection.head_due) == (0, NEVER)


async def test_the_most_expensive_head_is_evicted_when_all_together_cost_too_much(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    listener.may_answer.set()
    begun, others = GET[:-2] + HEADER_OF_1_KB * 2 + b"X-B: b", 64 * 1024 * 1024
    async with connect(listener.url) as large, connect(listener.url) as small:
        await large.send(begun)
        await small.send(GET[:10])
        # A byte is kept about three times; each of the four lines is a few objects.
        await eventually(lambda: server.heads.cost == 3 * (len(begun) + 10) + 4 * 350)
        server.heads.cost += others
        await small.send(GET[10:12])
        assert (await large.read_answer()).status == 503
        server.heads.cost -= others
        await small.send(GET[12:])
        assert (await small.read_answer()).status == 200


async def test_the_connection_with_the_most_bytes_ahead_is_closed_when_those_of_all_are_too_many(
    listener: Listener,
) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    large_request, others = GET[:-2] + HEADER_OF_1_KB * 2 + b"\r\n", 64 * 1024 * 1024
    async with connect(listener.url) as large, connect(listener.url) as small:
        for caller in (large, small):
            await caller.send(GET)
        await eventually(lambda: sum(each._current_request is not None for each in server._connections) == 2)
        await large.send(large_request * 3)
        await small.send(GET * 3)
        await eventually(lambda: server.bytes_ahead == 3 * (len(large_request) + len(GET)))
        server.bytes_ahead += others
        await small.send(GET)
        assert await large.is_closed()
        assert server.bytes_ahead == others + 4 * len(GET)
        server.bytes_ahead -= others
        listener.may_answer.set()
        for _ in range(5):
            assert (await small.read_answer()).status == 200
        assert server.bytes_ahead == 0


async def test_a_request_in_progress_is_not_ahead_of_itself(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with in_a_request(listener) as (caller, _):
        await caller.send(GET)
        await eventually(lambda: server.bytes_ahead == len(GET))
        listener.may_answer.set()
        listener.may_answer.clear()  # the second request waits
        assert (await caller.read_answer()).status == 200
        await eventually(lambda: server.bytes_ahead == 0)


async def test_requests_that_had_their_turn_are_not_ahead_any_more(listener: Listener) -> None:
    """Clean callers that always have a request waiting were aborted, with 6 MiB of all of them together."""
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with in_a_request(listener) as (caller, _):
        await caller.send(GET * 3)
        for number in range(50):
            await eventually(lambda: server.bytes_ahead == 3 * len(GET))
            listener.may_answer.set()
            listener.may_answer.clear()
            assert (await caller.read_answer()).status == 200, number
            await eventually(lambda: server.bytes_ahead == 2 * len(GET))
            await caller.send(GET)


async def test_what_cannot_wait_is_counted_too(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with in_a_request(listener) as (caller, connection):
        connection.data_received(GET * 40)  # aiohttp lets 32 wait
        assert len(connection._kept) == 8 * len(GET)
        assert server.bytes_ahead == 40 * len(GET)
        listener.may_answer.set()
        for _ in range(41):
            assert (await caller.read_answer()).status == 200
        assert server.bytes_ahead == 0


@pytest.mark.parametrize("body", [b"", b"12345"])
async def test_a_half_close_in_the_turn_of_a_begun_request_ends_its_connection(listener: Listener, body: bytes) -> None:
    """The task that serves the connection has been woken for the request, and takes it in its next turn."""
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with connect(listener.url) as caller:
        await eventually(lambda: any(each.is_waiting for each in server._connections))
        (connection,) = server._connections
        connection.data_received(GET[:-2] + b"Content-Length: 10\r\n\r\n" + body)
        if not connection.eof_received():
            assert connection.transport is not None
            connection.transport.close()  # as the event loop does
        listener.may_answer.set()
        await caller.read_until_closed()
        await eventually(lambda: not server._connections)


async def test_bytes_ahead_of_a_connection_that_is_lost_are_not_counted_any_more(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with in_a_request(listener) as (caller, _):
        await caller.send(GET * 5)
        await eventually(lambda: server.bytes_ahead == 5 * len(GET))
        caller.abort()
        listener.may_answer.set()  # the end looks like a half-close: the loss shows at the write of the answer
        await eventually(lambda: server.bytes_ahead == 0)


async def test_a_head_that_begins_behind_a_request_must_arrive_in_time_too() -> None:
    async with listening(header_timeout_s=0.5) as listener, connect(listener.url) as caller:
        await caller.send(GET + GET[:-2])
        await caller.send(b"X-A: b")
        await asyncio.sleep(0.1)
        await caller.send(b"\r\n\r\n" + GET[:-2])  # the second request is complete, and the third has begun
        await asyncio.sleep(0.1)
        await caller.send(b"X-A: b")
        listener.may_answer.set()
        for _ in range(2):
            assert (await caller.read_answer()).status == 200
        async with asyncio.timeout(listener.drain_s / 2):
            await listener.runner.cleanup()
        assert (await caller.read_answer()).status == 408


async def test_the_reading_of_ordinary_requests_is_never_paused(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[_Connection] = []
    monkeypatch.setattr(_Connection, "_pause_reading_for_buffer", pauses.append)
    listener.may_answer.set()
    async with connect(listener.url) as caller:
        for _ in range(10):
            await caller.send(GET[:-2] + b"Content-Length: 20000\r\n\r\n" + b" " * 20_000)
            assert (await caller.read_answer()).status == 200
    assert pauses == []


class LastRead:
    """The reading of what arrives before a close: its beginning, and permission to end."""

    def __init__(self) -> None:
        self.begun, self.may_end = asyncio.Event(), asyncio.Event()

    async def drain(self) -> None:
        self.begun.set()
        await self.may_end.wait()


@pytest.fixture
def last_read(monkeypatch: pytest.MonkeyPatch) -> LastRead:
    read = LastRead()
    monkeypatch.setattr(_DiscardingParser, "drain", lambda _parser: read.drain())
    return read


class Ending(NamedTuple):
    """A request, the end of its connection, and whether the last read follows its answer."""

    lines: bytes = b""
    server_closes: bool = False
    caller_ends: bool = False
    rest: bytes = b""  # sent behind the answer
    is_last_read: bool = False


ENDINGS = {
    "kept": Ending(),
    "closed by the caller": Ending(b"Connection: close\r\n"),
    "closed by the server": Ending(server_closes=True, is_last_read=True),
    "half-closed by the caller": Ending(server_closes=True, caller_ends=True),
    "closed by the server in a body": Ending(
        b"Content-Length: 2\r\n", server_closes=True, rest=b"{}", is_last_read=True
    ),
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
async def test_only_what_a_caller_may_have_sent_before_it_learns_of_the_close_is_discarded(
    listener: Listener, last_read: LastRead, ending: Ending
) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    listener.closes = ending.server_closes
    async with connect(listener.url) as caller:
        await caller.send(GET[:-2] + ending.lines + b"\r\n")
        if ending.caller_ends:
            caller.end()
            await eventually(lambda: any(each._is_half_closed for each in server._connections))
        listener.may_answer.set()
        assert (await caller.read_answer()).status == 200
        if ending == Ending():
            await caller.send(GET)
            assert (await caller.read_answer()).status == 200
        else:
            await caller.send(ending.rest)
            assert await caller.is_closed(), "the caller sees the end at once"
    assert last_read.begun.is_set() is ending.is_last_read
    last_read.may_end.set()


async def test_what_comes_behind_a_broken_body_is_discarded_too(listener: Listener, last_read: LastRead) -> None:
    chunked = GET[:-2] + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with in_a_request(listener, chunked) as (caller, connection):
        await caller.send(b"zz\r\n")
        await eventually(lambda: connection._body.exception() is not None)
        listener.may_answer.set()
        assert (await caller.read_answer()).status == 200
        assert await caller.is_closed()
    assert last_read.begun.is_set()
    last_read.may_end.set()


async def test_a_head_behind_a_last_answer_is_discarded_with_the_rest(listener: Listener, last_read: LastRead) -> None:
    """The sweep, or the bound on all heads, would write behind the end of the answers, and fail for others too."""
    listener.closes = True
    async with in_a_request(listener) as (caller, connection):
        await caller.send(BEGUN)
        await eventually(lambda: connection.head.cost > 0)
        listener.may_answer.set()
        await last_read.begun.wait()
        assert (connection.head.cost, connection.head_due) == (0, NEVER)
    last_read.may_end.set()


async def test_requests_behind_a_last_answer_are_read_although_too_many_had_arrived(
    listener: Listener, last_read: LastRead
) -> None:
    """A close with unread bytes makes the kernel send a reset, which can take the answer from the caller."""
    listener.closes = True
    async with in_a_request(listener) as (caller, connection):
        await caller.send(GET * 4_000)
        await eventually(lambda: connection._buffer_paused)
        listener.may_answer.set()
        await last_read.begun.wait()
        assert not connection._buffer_paused
        last_read.may_end.set()


async def test_the_timer_of_an_unread_answer_ends_with_its_connection(listener: Listener) -> None:
    server = listener.runner.server
    assert isinstance(server, _Server)
    async with connect(listener.url) as caller:
        await caller.send(GET)
        await eventually(lambda: bool(server._connections))
        ((connection, transport),) = server._connections.items()
        assert transport.get_write_buffer_limits() == (0, 1), "an answer is written once the kernel has all of it"
        connection.pause_writing()
        timer = connection._answer_timer
        assert timer is not None
        transport.abort()
        await eventually(timer.cancelled, timeout=5.0)


async def test_a_request_that_is_never_answered_delays_a_drain_to_its_end_and_no_longer() -> None:
    listener = Listener(drain_s=1.0)
    await listener.listen()
    async with connect(listener.url) as caller:
        await caller.send(GET)
        await asyncio.sleep(0.1)
        began = asyncio.get_running_loop().time()
        await listener.runner.cleanup()
        assert 1.0 <= asyncio.get_running_loop().time() - began < 2.0
        assert await caller.is_closed()
