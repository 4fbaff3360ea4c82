"""Promises 12 and 13: thousands of slow connections cost other callers nothing, and end at their timeout."""

import asyncio
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from typing import Self
from urllib.parse import urlsplit

import msgspec

from testbed import Servers
from tests.hostile import table
from tests.hostile.attacked_gateway import AttackedGateway, open_gateway
from tests.support.callers import Caller, make_caller
from tests.support.eventually import eventually
from tests.support.neighbour import Neighbour
from tests.support.raw_http import connect, exchange

SLOW_HEADS, SLOW_BODIES = 5_000, 500
A_SLOW_BODIES, A_CALLERS = 400, 10
LEAST_AT_ONCE = 1_000  # on an idle machine all; on a busy one the first end before the last have connected
SILENT = 500  # of the heads: connections that never send a byte
TIMEOUT_S = 5.0
SWEEP_S = 1.0
PEAK_OF_ONE_MB = 30.0  # a request takes some five times its body
LINGER_S = 5.0
HEADER_OF_1_KB = b"X-A: " + b"a" * 1_017 + b"\r\n"
ROOM_S = 20.0  # for a busy test machine
UNDISTURBED_S = 2.0
BOUND_MS = 1_000.0  # of a neighbour's p99: some ten times its value on two cores shared with the clients


def send_one(caller: Caller) -> bytes:
    """Return a valid request of this caller."""
    body = caller.body()
    return table.post(body, key=caller.key.encode())


class SlowClients:
    """Raw sockets that each send one byte per round."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._stack = ExitStack()
        self._dripping: dict[socket.socket, tuple[bytes, int]] = {}
        self._selector = self._stack.enter_context(selectors.DefaultSelector())
        self.ended_after_s: list[float] = []
        self.answers: dict[bytes, int] = {}
        self._began: dict[socket.socket, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def open(self) -> int:
        """Return the number of connections that the server has not closed."""
        return len(self._began)

    def connect(self, count: int, at_once: bytes, drip: bytes) -> None:
        """Open connections. Each sends `at_once` at once, and later the bytes of `drip` one by one."""
        for _ in range(count):
            opened = self._stack.enter_context(socket.socket())
            opened.connect(self._address)
            opened.setblocking(False)
            if at_once:
                opened.send(at_once)
            self._began[opened] = time.monotonic()
            if drip:
                self._dripping[opened] = (drip, 0)
            self._selector.register(opened, selectors.EVENT_READ)

    def drip(self) -> None:
        """Send one byte over each connection."""
        for slow, (data, at) in list(self._dripping.items()):
            try:
                slow.send(data[at : at + 1])
            except OSError:  # closed; listen() reads the answer
                del self._dripping[slow]
            else:
                self._dripping[slow] = (data, (at + 1) % len(data))

    def listen(self, seconds: float) -> None:
        """Record which connections were answered and which were closed."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0 and self._began:
            for key, _ in self._selector.select(left):
                slow = key.fileobj
                assert isinstance(slow, socket.socket)
                try:
                    received = slow.recv(65536)
                except OSError:
                    received = b""
                if received:
                    line = received.partition(b"\r\n")[0]
                    self.answers[line] = self.answers.get(line, 0) + 1
                else:
                    self.ended_after_s.append(time.monotonic() - self._began.pop(slow))
                    self._dripping.pop(slow, None)
                    self._selector.unregister(slow)
                    slow.close()

    def drip_until_closed(self, at_most_s: float) -> None:
        """Send a byte every half second until the server has closed all connections."""
        deadline = time.monotonic() + at_most_s
        while self.open and time.monotonic() < deadline:
            self.drip()
            self.listen(0.5)


async def test_slow_heads_and_slow_bodies_cost_the_others_nothing(
    servers: Servers, record_property: Callable[[str, object], None]
) -> None:
    timeouts = {"header_timeout_s": str(TIMEOUT_S), "body_timeout_s": str(TIMEOUT_S)}
    async with open_gateway(servers, **timeouts) as gateway:
        slow_caller = await make_caller(gateway.admin)
        async with Neighbour(gateway.url, await make_caller(gateway.admin)) as neighbour:
            undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            descriptors, memory_mb = gateway.descriptors(), gateway.memory_mb()
            beginning = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: gateway\r\nX-Slow: "
            request = send_one(slow_caller)
            with SlowClients(gateway.url) as slow:
                first, began = len(neighbour.took_s), time.monotonic()
                await asyncio.to_thread(slow.connect, SILENT, b"", b"")
                await asyncio.to_thread(slow.connect, SLOW_HEADS - SILENT, beginning, b"a")
                await asyncio.to_thread(slow.connect, SLOW_BODIES, request[:-80], request[-80:])
                connected_s = time.monotonic() - began
                most_descriptors, most_memory_mb = gateway.descriptors(), gateway.memory_mb()
                await asyncio.to_thread(slow.drip_until_closed, TIMEOUT_S + LINGER_S + ROOM_S)
                disturbed_p99_ms = neighbour.p99_ms(first)
                requests = len(neighbour.took_s) - first
                figures = {
                    "connections": SLOW_HEADS + SLOW_BODIES,
                    "connected in, s": round(connected_s, 1),
                    "open at once": most_descriptors - descriptors,
                    "longest open, s": round(max(slow.ended_after_s), 1),
                    "neighbour's requests meanwhile": requests,
                    "p99 undisturbed, ms": round(undisturbed_p99_ms, 1),
                    "p99 meanwhile, ms": round(disturbed_p99_ms, 1),
                    "memory before, at most, MB": (round(memory_mb), round(most_memory_mb)),
                    "answers": slow.answers,
                }
                assert slow.open == 0, figures
            await eventually(lambda: gateway.descriptors() <= descriptors + 2)
            figures["memory after, MB"] = round(gateway.memory_mb())
            for name, value in figures.items():
                record_property(name, value)
            print(figures)
            assert most_descriptors > descriptors + LEAST_AT_ONCE
            # Heads that had begun are answered, silent connections are closed; for some bodies there is no slot.
            refused = slow.answers.pop(b"HTTP/1.1 503 Service Unavailable", 0)
            assert slow.answers == {b"HTTP/1.1 408 Request Timeout": SLOW_HEADS - SILENT + SLOW_BODIES - refused}
            assert refused < SLOW_BODIES / 2
            assert neighbour.failures == []
            assert disturbed_p99_ms < max(BOUND_MS, 2 * undisturbed_p99_ms)
            await neighbour.stop()
            assert gateway.memory_mb() < memory_mb + 150
            assert gateway.alarms() == []
            assert len([line for line in gateway.log_lines() if line["logger"] != "gateway.requests"]) < 30
            assert await gateway.queue.depth() == neighbour.counted


async def test_a_second_request_must_bring_its_head_in_time_too(servers: Servers) -> None:
    async with open_gateway(servers, header_timeout_s="1", keepalive_timeout_s="60") as gateway:
        caller = await make_caller(gateway.admin)
        async with connect(gateway.url) as conversation, connect(gateway.url) as idle:
            for each in (conversation, idle):
                await each.send(send_one(caller))
                assert (await each.read_answer()).status == 200
            await conversation.send(b"POST /api/v2/send/bulk HTT")
            began = time.monotonic()
            answer = await conversation.read_answer()
            assert (answer.status, answer.json()["code"]) == (408, "request_timeout")
            assert await conversation.is_closed()
            assert 0.9 < time.monotonic() - began < 1 + SWEEP_S + ROOM_S
            # It has been idle for as long, and stays open.
            await idle.send(send_one(caller))
            assert (await idle.read_answer()).status == 200


async def test_an_idle_connection_is_closed_at_its_timeout(servers: Servers) -> None:
    async with open_gateway(servers, header_timeout_s="30", keepalive_timeout_s="1") as gateway:
        caller = await make_caller(gateway.admin)
        async with connect(gateway.url) as conversation:
            await conversation.send(send_one(caller))
            assert (await conversation.read_answer()).status == 200
            assert await conversation.is_closed()


async def test_slow_connections_are_closed_for_others_and_busy_ones_are_not(servers: Servers) -> None:
    most = 20
    timeouts = {"header_timeout_s": "60", "body_timeout_s": "60"}
    async with open_gateway(servers, max_connections=str(most), **timeouts) as gateway:
        caller = await make_caller(gateway.admin)
        request = send_one(caller)
        async with connect(gateway.url) as kept:
            await kept.send(request)
            assert (await kept.read_answer()).status == 200
            with SlowClients(gateway.url) as slow:
                await asyncio.to_thread(slow.connect, 10 * most, b"POST ", b"")
                for _ in range(50):
                    assert (await exchange(gateway.url, request=request)).status == 200
                await asyncio.to_thread(slow.listen, 1.0)
                assert 0 < slow.open <= most
                # A connection that has sent a request is kept in preference to one that has not.
                await kept.send(request)
                assert (await kept.read_answer()).status == 200
            with SlowClients(gateway.url) as busy:
                await asyncio.to_thread(busy.connect, most, request[:-10], b"")
                await asyncio.to_thread(busy.listen, 1.0)
                assert busy.open == most, "requests in progress may finish"
                answer = await exchange(gateway.url, request=request)
                assert (answer.status, answer.json()["code"]) == (503, "overloaded")
                assert b"\r\nRetry-After: 1\r\n" in answer.raw
            await eventually_serves(gateway, request)
        assert gateway.alarms() == []


async def eventually_serves(gateway: AttackedGateway, request: bytes) -> None:
    async with asyncio.timeout(ROOM_S):
        while (await exchange(gateway.url, request=request)).status != 200:  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.1)


async def test_requests_sent_ahead_of_unread_answers_do_not_fill_the_memory(servers: Servers) -> None:
    """Plain aiohttp would hold 32 requests of each connection, with half a megabyte of body each."""
    connections, unread_mb, ahead_mb = 10, 17, 16  # unread: a body, its 1,000 rows, and its answer
    async with open_gateway(servers) as gateway:
        caller = await make_caller(gateway.admin)
        echoed = msgspec.json.encode({"messages": [{"to": "x" * 5_000}] * 1_000})
        unread = table.post(echoed, key=caller.key.encode())
        ahead = table.post(bytes(500_000), key=None) * 32
        before_mb = most_mb = gateway.memory_mb()
        with ExitStack() as stack:
            for _ in range(connections):
                sender = stack.enter_context(socket.socket())
                # Unread answers must stay with the gateway.
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                sender.connect((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port))
                sender.setblocking(False)
                await send_until_stuck(sender, unread + ahead)
                most_mb = max(most_mb, gateway.memory_mb())
        figures = f"{before_mb:.0f} MB before, {most_mb:.0f} MB at most"
        print(figures)
        assert most_mb < before_mb + connections * (unread_mb + ahead_mb / 4) + PEAK_OF_ONE_MB, figures
        assert gateway.alarms() == []


async def send_until_stuck(sender: socket.socket, data: bytes) -> None:
    """Send until the socket has taken nothing for 0.2 s."""
    at, stuck_since = 0, time.monotonic()
    while at < len(data) and time.monotonic() < stuck_since + 0.2:
        try:
            at += sender.send(data[at : at + 65536])
            stuck_since = time.monotonic()
        except BlockingIOError:
            await asyncio.sleep(0.01)


async def test_an_account_with_slow_bodies_and_too_many_requests_does_not_starve_another(
    servers: Servers, record_property: Callable[[str, object], None]
) -> None:
    """A sends as much as it can, and opens many connections with slow bodies; B goes on as before."""
    async with open_gateway(servers, body_timeout_s="2") as gateway:
        greedy = await make_caller(gateway.admin)
        batch = table.post(greedy.body(100), key=greedy.key.encode())
        stopping = False
        answered = 0

        async def flood() -> None:
            nonlocal answered
            while not stopping:
                async with connect(gateway.url) as conversation:
                    await conversation.send(batch)
                    answered += (await conversation.read_answer()).status in (200, 503)

        async with Neighbour(gateway.url, await make_caller(gateway.admin)) as neighbour:
            undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            with SlowClients(gateway.url) as slow:
                await asyncio.to_thread(slow.connect, A_SLOW_BODIES, batch[:-80], batch[-80:])
                first = len(neighbour.took_s)
                floods = [asyncio.create_task(flood()) for _ in range(A_CALLERS)]
                await asyncio.to_thread(slow.drip_until_closed, ROOM_S)
                disturbed_p99_ms = neighbour.p99_ms(first)
                stopping = True
                await asyncio.gather(*floods)
            figures = {
                "A's requests answered": answered,
                "A's slow bodies": A_SLOW_BODIES,
                "B's p99 undisturbed, ms": round(undisturbed_p99_ms, 1),
                "B's p99 meanwhile, ms": round(disturbed_p99_ms, 1),
            }
            for name, value in figures.items():
                record_property(name, value)
            print(figures)
            assert neighbour.failures == []
            assert answered > 0
            assert disturbed_p99_ms < max(BOUND_MS, 2 * undisturbed_p99_ms)
        assert gateway.alarms() == []


async def test_connections_whose_callers_hang_up_after_the_answer_are_closed(servers: Servers) -> None:
    """The end of the stream may arrive before aiohttp waits for the next request. It is no half-closed request then."""
    async with open_gateway(servers) as gateway:
        request, parts = table.post(b"{}", key=None), urlsplit(gateway.url)
        before = gateway.descriptors()

        def call() -> None:
            for _ in range(500):
                with socket.create_connection((parts.hostname, parts.port)) as calling:
                    calling.sendall(request)
                    calling.recv(65536)

        await asyncio.gather(*(asyncio.to_thread(call) for _ in range(4)))
        await eventually(lambda: gateway.descriptors() <= before + 2, timeout=10)


async def test_a_refused_head_that_goes_on_does_not_end_the_timeouts_of_other_heads(servers: Servers) -> None:
    """The refused head became due while the rest was discarded. The sweep then failed, and never ran again."""
    async with open_gateway(servers, header_timeout_s="1") as gateway:
        parts = urlsplit(gateway.url)

        def call() -> bytes:
            with socket.create_connection((parts.hostname, parts.port), timeout=ROOM_S) as large:
                large.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n" + HEADER_OF_1_KB * 31)
                time.sleep(0.5)
                large.sendall(HEADER_OF_1_KB * 2)
                for _ in range(25):
                    time.sleep(0.1)
                    large.sendall(b"a")
                return large.recv(65536)

        answers = await asyncio.to_thread(call)
        assert (answers.count(b" 400 Bad Request"), answers.count(b"HTTP/1.")) == (1, 1)
        async with connect(gateway.url) as slow:
            await slow.send(b"POST / HT")
            assert (await slow.read_answer()).status == 408
        assert gateway.alarms() == []


async def test_heads_of_one_caller_do_not_close_the_idle_connections_of_others(servers: Servers) -> None:
    """Line feeds before a request line are skipped, and cost no memory. Each was counted as a header."""
    async with open_gateway(servers) as gateway, AsyncExitStack() as stack:
        request = send_one(await make_caller(gateway.admin))
        others = [await stack.enter_async_context(connect(gateway.url)) for _ in range(32)]
        for one in others:
            await one.send(request)
            assert (await one.read_answer()).status == 200
        for beginning in (b"", b"GET / HTTP/1.1\r\nHost: x\r\n" + HEADER_OF_1_KB * 33):
            async with connect(gateway.url) as attacker:
                await attacker.send(beginning)
                for _ in range(4):
                    await attacker.send(b"\n" * 250_000)
                    await asyncio.sleep(0.05)
        for one in others:
            await one.send(request)
            assert (await one.read_answer()).status == 200


async def test_what_follows_malformed_http_is_discarded_while_it_arrives(servers: Servers) -> None:
    """A close with unread data makes the kernel send a reset, which can take the answer from the caller."""
    async with open_gateway(servers) as gateway:
        parts = urlsplit(gateway.url)

        def call() -> bytes:
            with socket.create_connection((parts.hostname, parts.port), timeout=ROOM_S) as calling:
                calling.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nBad header\r\n\r\n")
                for _ in range(15):
                    calling.sendall(b"a" * 64 * 1024)
                    time.sleep(0.1)
                return calling.recv(65536)

        assert b"400 Bad Request" in await asyncio.to_thread(call)
