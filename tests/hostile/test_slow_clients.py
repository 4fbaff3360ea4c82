"""Thousands of connections that send a byte now and then cost the others nothing, and end at their timeout."""

import asyncio
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self
from urllib.parse import urlsplit

import msgspec

from testbed import Servers
from tests.hostile import table
from tests.hostile.stand import Caller, Neighbour, Stand, new_caller, open_stand
from tests.support.eventually import eventually
from tests.support.raw_http import connect, exchange

SLOW_HEADS, SLOW_BODIES = 5_000, 500
A_SLOW_BODIES, A_CALLERS = 400, 10
LEAST_AT_ONCE = 1_000  # all of them on an idle machine; on a busy one the first end before the last have connected
SILENT = 500  # of the heads: connections that never send an byte
TIMEOUT_S = 5.0
SWEEP_S = 1.0
PEAK_OF_ONE_MB = 30.0  # a request takes some five times its body
LINGER_S = 5.0
ROOM_S = 20.0  # for a busy test machine
UNDISTURBED_S = 2.0
BOUND_MS = 1_000.0  # of a neighbour's p99: some ten times what it is on two cores that the clients share


def send_one(caller: Caller) -> bytes:
    """A good request of this caller."""
    body = caller.body()
    return table.post(body, key=caller.key.encode())


class SlowClients:
    """Raw sockets, each of which drips its bytes: one in every round."""

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
        """How many have not been closed by the server."""
        return len(self._began)

    def connect(self, count: int, at_once: bytes, drip: bytes) -> None:
        """Open connections; each sends the beginning at once, and then drips the rest."""
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
        """One byte over each connection."""
        for slow, (data, at) in list(self._dripping.items()):
            try:
                slow.send(data[at : at + 1])
            except OSError:  # closed; what it was told is read below
                del self._dripping[slow]
            else:
                self._dripping[slow] = (data, (at + 1) % len(data))

    def listen(self, seconds: float) -> None:
        """Note who has been answered, and who has been closed."""
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
        """Go on, an byte every half second, until the server has closed them all."""
        deadline = time.monotonic() + at_most_s
        while self.open and time.monotonic() < deadline:
            self.drip()
            self.listen(0.5)


async def test_slow_heads_and_slow_bodies_cost_the_others_nothing(
    servers: Servers, record_property: Callable[[str, object], None]
) -> None:
    timeouts = {"header_timeout_s": str(TIMEOUT_S), "body_timeout_s": str(TIMEOUT_S)}
    async with open_stand(servers, **timeouts) as stand:
        slow_caller = await new_caller(stand.admin)
        async with Neighbour(stand, await new_caller(stand.admin)) as neighbour:
            undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            descriptors, memory_mb = stand.descriptors(), stand.memory_mb()
            beginning = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: gateway\r\nX-Slow: "
            request = send_one(slow_caller)
            with SlowClients(stand.url) as slow:
                first, began = len(neighbour.took_s), time.monotonic()
                await asyncio.to_thread(slow.connect, SILENT, b"", b"")
                await asyncio.to_thread(slow.connect, SLOW_HEADS - SILENT, beginning, b"a")
                await asyncio.to_thread(slow.connect, SLOW_BODIES, request[:-80], request[-80:])
                connected_s = time.monotonic() - began
                most_descriptors, most_memory_mb = stand.descriptors(), stand.memory_mb()
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
            await eventually(lambda: stand.descriptors() <= descriptors + 2)
            figures["memory after, MB"] = round(stand.memory_mb())
            for name, value in figures.items():
                record_property(name, value)
            print(figures)
            assert most_descriptors > descriptors + LEAST_AT_ONCE
            # Heads that had begun are answered, the silent are just closed; of the bodies, some find no place.
            refused = slow.answers.pop(b"HTTP/1.1 503 Service Unavailable", 0)
            assert slow.answers == {b"HTTP/1.1 408 Request Timeout": SLOW_HEADS - SILENT + SLOW_BODIES - refused}
            assert refused < SLOW_BODIES / 2
            assert neighbour.wrong == []
            assert disturbed_p99_ms < max(BOUND_MS, 2 * undisturbed_p99_ms)
            await neighbour.stop()
            assert stand.memory_mb() < memory_mb + 150
            assert stand.alarms() == []
            assert len([line for line in stand.log_lines() if line["logger"] != "gateway.requests"]) < 30
            assert await stand.queue.depth() == neighbour.counted


async def test_a_second_request_must_bring_its_head_in_time_too(servers: Servers) -> None:
    async with open_stand(servers, header_timeout_s="1", keepalive_timeout_s="60") as stand:
        caller = await new_caller(stand.admin)
        async with connect(stand.url) as conversation, connect(stand.url) as idle:
            for each in (conversation, idle):
                await each.send(send_one(caller))
                assert (await each.read_answer()).status == 200
            await conversation.send(b"POST /api/v2/send/bulk HTT")
            began = time.monotonic()
            answer = await conversation.read_answer()
            assert (answer.status, answer.json()["code"]) == (408, "request_timeout")
            assert await conversation.is_closed()
            assert 0.9 < time.monotonic() - began < 1 + SWEEP_S + ROOM_S
            await idle.send(send_one(caller))  # it has been idle for as long, and stays
            assert (await idle.read_answer()).status == 200


async def test_an_idle_connection_is_closed_at_its_timeout(servers: Servers) -> None:
    async with open_stand(servers, header_timeout_s="30", keepalive_timeout_s="1") as stand:
        caller = await new_caller(stand.admin)
        async with connect(stand.url) as conversation:
            await conversation.send(send_one(caller))
            assert (await conversation.read_answer()).status == 200
            assert await conversation.is_closed()


async def test_slow_connections_make_room_for_the_others_and_busy_ones_do_not(servers: Servers) -> None:
    most = 20
    timeouts = {"header_timeout_s": "60", "body_timeout_s": "60"}
    async with open_stand(servers, max_connections=str(most), **timeouts) as stand:
        caller = await new_caller(stand.admin)
        request = send_one(caller)
        async with connect(stand.url) as kept:
            await kept.send(request)
            assert (await kept.read_answer()).status == 200
            with SlowClients(stand.url) as slow:
                await asyncio.to_thread(slow.connect, 10 * most, b"POST ", b"")
                for _ in range(50):
                    assert (await exchange(stand.url, request=request)).status == 200
                await asyncio.to_thread(slow.listen, 1.0)
                assert 0 < slow.open <= most
                await kept.send(request)  # it is worth more than a connection that has never sent a request
                assert (await kept.read_answer()).status == 200
            with SlowClients(stand.url) as busy:
                await asyncio.to_thread(busy.connect, most, request[:-10], b"")
                await asyncio.to_thread(busy.listen, 1.0)
                assert busy.open == most, "requests in progress are let finish"
                answer = await exchange(stand.url, request=request)
                assert (answer.status, answer.json()["code"]) == (503, "overloaded")
                assert b"\r\nRetry-After: 1\r\n" in answer.raw
            await eventually_serves(stand, request)
        assert stand.alarms() == []


async def eventually_serves(stand: Stand, request: bytes) -> None:
    async with asyncio.timeout(ROOM_S):
        while (await exchange(stand.url, request=request)).status != 200:  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.1)


async def test_what_is_sent_ahead_of_unread_answers_is_not_hoarded(servers: Servers) -> None:
    """aiohttp alone would hold 32 requests of each connection, with half a megabyte of body each."""
    connections, unread_mb, ahead_mb = 10, 17, 16  # the unread one: its body, its 1,000 rows, and its answer
    async with open_stand(servers) as stand:
        caller = await new_caller(stand.admin)
        echoed = msgspec.json.encode({"messages": [{"to": "x" * 5_000}] * 1_000})
        unread = table.post(echoed, key=caller.key.encode())
        ahead = table.post(bytes(500_000), key=None) * 32
        before_mb = most_mb = stand.memory_mb()
        with ExitStack() as stack:
            for _ in range(connections):
                sender = stack.enter_context(socket.socket())
                sender.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # what is not read stays with the gateway
                sender.connect((urlsplit(stand.url).hostname, urlsplit(stand.url).port))
                sender.setblocking(False)
                await send_until_stuck(sender, unread + ahead)
                most_mb = max(most_mb, stand.memory_mb())
        figures = f"{before_mb:.0f} MB before, {most_mb:.0f} MB at most"
        print(figures)
        assert most_mb < before_mb + connections * (unread_mb + ahead_mb / 4) + PEAK_OF_ONE_MB, figures
        assert stand.alarms() == []


async def send_until_stuck(sender: socket.socket, data: bytes) -> None:
    """Send until nothing has been taken for a moment."""
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
    """A sends as much as it can over many connections, every other of them with slow bodies; B goes on as before."""
    async with open_stand(servers, body_timeout_s="2") as stand:
        greedy = await new_caller(stand.admin)
        batch = table.post(greedy.body(100), key=greedy.key.encode())
        stopping = False
        answered = 0

        async def flood() -> None:
            nonlocal answered
            while not stopping:
                async with connect(stand.url) as conversation:
                    await conversation.send(batch)
                    answered += (await conversation.read_answer()).status in (200, 503)

        async with Neighbour(stand, await new_caller(stand.admin)) as neighbour:
            undisturbed_p99_ms = await neighbour.measure(UNDISTURBED_S)
            with SlowClients(stand.url) as slow:
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
            assert neighbour.wrong == []
            assert answered > 0
            assert disturbed_p99_ms < max(BOUND_MS, 2 * undisturbed_p99_ms)
        assert stand.alarms() == []
