"""A gateway process as it ships stays within its memory, whatever its clients send. Promise 10.

Each row of ROWS is an attack on a process of its own. The process is watched in /proc during the attack, and for
SETTLE_S after it.
"""

import asyncio
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import MappingProxyType
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec
import pytest

from gateway.ingest.wire import MAX_BODY_BYTES
from testbed import Servers
from testbed.processes import http_get
from tests.hostile import table
from tests.hostile.attacked_gateway import AttackedGateway, open_gateway
from tests.support.callers import Caller, make_caller
from tests.support.neighbour import Neighbour
from tests.support.raw_http import exchange

SETTLE_S = 5.0
WATCH_S = 0.05
PIECE = 64 * 1024
PATIENCE_S = 20.0


class Attack(NamedTuple):
    """The gateway, the attackers' accounts, and their sockets, which are closed at the end of the attack."""

    gateway: AttackedGateway
    callers: list[Caller]
    sockets: ExitStack

    def connect(self, *, receive_buffer: int | None = None) -> socket.socket:
        """Open a connection."""
        opened = self.sockets.enter_context(socket.socket())
        if receive_buffer is not None:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        opened.settimeout(PATIENCE_S)
        parts = urlsplit(self.gateway.url)
        opened.connect((parts.hostname, parts.port))
        return opened

    def post(self, body: bytes, caller: int = 0) -> bytes:
        """Return a request with the key of an attacker."""
        return table.post(body, key=self.callers[caller].key.encode())

    def chunked(self, *chunks: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
        """Return a request with an attacker's key, whose body comes in chunks."""
        return table.chunked(*chunks, end=end).replace(table.KEY, self.callers[0].key.encode())

    def in_flight(self) -> float:
        """Return the number of requests in flight, as the gateway counts them."""
        _, text = http_get(self.gateway.process.ops_port, "/metrics") or (0, b"")
        (line,) = [line for line in text.splitlines() if line.startswith(b"gateway_requests_in_flight ")]
        return float(line.split()[1])


def uploads_that_break_off(attack: Attack) -> None:
    """Break off uploads of 5 MB shortly before their end, with a FIN and with a RST in turn."""
    request = attack.post(b" " * MAX_BODY_BYTES)[:-100_000]
    for number in range(200):
        uploading = attack.connect()
        try:
            uploading.sendall(request)
            if number % 2:
                time.sleep(0.02)  # a reset discards what the gateway has not read
                uploading.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        except OSError:  # refused
            pass
        uploading.close()


def bodies_with_broken_chunks(attack: Attack) -> None:
    """Send 5 MB in chunks, and then something that is no chunk."""
    request = attack.chunked(*[b" " * PIECE] * 79, end=b"zz\r\n")
    for _ in range(20):
        _send_and_read(attack, request)


def chunked_bodies_that_are_too_large(attack: Attack) -> None:
    """Send more than 5 MB in chunks, so that the size shows only at the end."""
    request = attack.chunked(*[b" " * PIECE] * 81)
    for _ in range(60):
        _send_and_read(attack, request)


def malformed_requests(attack: Attack) -> None:
    """Send large segments that are no HTTP."""
    for _ in range(500):
        _send_and_read(attack, b"\r\n".join([b"NONSENSE " + b"x" * 200_000, b""]))


def _send_and_read(attack: Attack, request: bytes) -> None:
    with attack.connect() as sending:
        try:
            sending.sendall(request)
            sending.recv(65536)
        except OSError:  # the answer was sent before all was read
            pass


def answers_that_nobody_reads(attack: Attack) -> None:
    """Ask for large answers over connections whose receive buffers are small, until no connection takes more."""
    refused = msgspec.json.encode({"messages": [{"to": "\1" * 64}] * 1_000})
    requests = attack.post(refused) * 16
    waiting = [attack.connect(receive_buffer=4096) for _ in range(100)]
    for each in waiting:
        each.setblocking(False)
    _send_until_stuck(dict.fromkeys(waiting, requests))
    in_flight = attack.in_flight()
    assert in_flight > 10, f"{in_flight} requests in flight, but their answers are not read"


def bodies_with_emoji(attack: Attack) -> None:
    """Send the most expensive valid bodies at the same time, from two accounts."""
    requests = []
    for number, caller in enumerate(attack.callers):
        message = caller.message(body="\N{PILE OF POO}{{messageId}}" + "x" * 5_080)
        body = msgspec.json.encode({"messages": [message] * 990})
        assert 5_000_000 < len(body) <= MAX_BODY_BYTES
        requests.append(attack.post(body, number))
    for _ in range(3):
        with ThreadPoolExecutor(20) as pool:
            for number in range(20):
                pool.submit(_send_and_read, attack, requests[number % 2])


def uploads_that_wait(attack: Attack) -> None:
    """Send bodies of 5 MB but for their last byte over 300 connections, as far as the gateway takes them."""
    requests = [attack.post(b" " * MAX_BODY_BYTES, number)[:-1] for number in range(2)]
    waiting = [attack.connect() for _ in range(300)]
    for each in waiting:
        each.setblocking(False)
    _send_until_stuck({each: requests[number % 2] for number, each in enumerate(waiting)})
    in_flight = attack.in_flight()
    assert in_flight > 200, f"{in_flight} requests in flight: the others are not bounded by anything"


def _send_until_stuck(requests: dict[socket.socket, bytes]) -> None:
    """Send each request over its socket until no socket has taken anything for a second."""
    at = dict.fromkeys(requests, 0)
    moved = time.monotonic()
    while time.monotonic() < moved + 1.0:
        for each, request in requests.items():
            try:
                sent = each.send(request[at[each] : at[each] + 262_144])
            except OSError:
                continue
            if sent:
                at[each] += sent
                moved = time.monotonic()
        time.sleep(0.01)


def halves_of_large_heads(attack: Attack) -> None:
    """Open 8,000 connections, each with half a head of 29 kB. No key is needed."""
    half = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\n" + b"".join(
        b"X-%d: %b\r\n" % (number, b"a" * 7_200) for number in range(4)
    )
    for _ in range(8_000):
        attack.connect().sendall(half)


def pages_that_nobody_reads(attack: Attack) -> None:
    """Ask for the largest file of the documentation over 2,000 connections, and read none. No key is needed."""
    request = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    for _ in range(2_000):
        attack.connect(receive_buffer=4096).sendall(request)
    time.sleep(2.0)


def documents_that_nobody_reads(attack: Attack) -> None:
    """Ask for the OpenAPI document over 8,000 connections, ten times each, and read none. No key is needed."""
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 10
    for _ in range(8_000):
        attack.connect(receive_buffer=4096).sendall(request)
    time.sleep(2.0)


def a_mix_of_all(attack: Attack) -> None:
    """Run several attacks at the same time."""
    with ThreadPoolExecutor() as pool:
        for each in pool.map(lambda part: part(attack), MIXED):
            assert each is None


MIXED = [uploads_that_break_off, bodies_with_broken_chunks, malformed_requests, bodies_with_emoji]


class Row(NamedTuple):
    """An attack, and the bounds on the process's resident memory in MB."""

    attack: Callable[[Attack], None]
    most_mb: float
    settled_mb: float | None = None  # SETTLE_S after the attack
    is_flood: bool = False  # of valid work as well: the neighbour may be refused as overloaded, with a 503
    settings: Mapping[str, str] = MappingProxyType({})


# Nothing is refused as too slow while a busy machine sends.
PATIENT = {"confirm_timeout_s": "60", "abandon_timeout_s": "60", "body_timeout_s": "60"}

ROWS = [
    Row(uploads_that_break_off, 512, 150),
    Row(bodies_with_broken_chunks, 512, 150),
    Row(chunked_bodies_that_are_too_large, 512, 150),
    Row(malformed_requests, 150, 150),
    Row(answers_that_nobody_reads, 512, is_flood=True),
    Row(uploads_that_wait, 260, is_flood=True, settings=PATIENT),
    Row(bodies_with_emoji, 512, is_flood=True),
    Row(halves_of_large_heads, 384),
    Row(pages_that_nobody_reads, 150, settings={"api_docs": "on"}),
    Row(documents_that_nobody_reads, 256, 256),
    Row(a_mix_of_all, 512, is_flood=True),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.attack.__name__ for row in ROWS])
async def test_memory_stays_within_its_bounds(
    servers: Servers, row: Row, record_property: Callable[[str, object], None]
) -> None:
    async with open_gateway(servers, **row.settings) as gateway:
        clean = await make_caller(gateway.admin)
        idle_mb = _megabytes(gateway)
        with ExitStack() as sockets:
            attack = Attack(gateway, [await make_caller(gateway.admin) for _ in range(2)], sockets)
            async with Neighbour(gateway.url, clean, pause_s=0.1) as neighbour:
                most_mb = await _most_mb_during(gateway, asyncio.to_thread(row.attack, attack))
        settled_mb = await _settled_mb(gateway, row.settled_mb or 0)
        figures = f"idle {idle_mb:.0f} MB, at most {most_mb:.0f} MB, {SETTLE_S:.0f} s later {settled_mb:.0f} MB"
        print(row.attack.__name__, figures)
        record_property(row.attack.__name__, figures)
        assert [each for each in neighbour.failures if not (row.is_flood and each.startswith("503"))] == []
        assert most_mb <= row.most_mb, figures
        assert row.settled_mb is None or settled_mb <= row.settled_mb, figures
        assert gateway.alarms() == []
        answer = await exchange(gateway.url, request=table.post(clean.body(), key=clean.key.encode()))
        assert answer.status == 200


async def _most_mb_during(gateway: AttackedGateway, attack: Awaitable[None]) -> float:
    attacking, most_mb = asyncio.ensure_future(attack), 0.0
    while not attacking.done():
        most_mb = max(most_mb, _megabytes(gateway))
        await asyncio.wait([attacking], timeout=WATCH_S)
    await attacking
    return max(most_mb, _megabytes(gateway))


async def _settled_mb(gateway: AttackedGateway, bound_mb: float) -> float:
    """Return the memory as soon as it is within the bound, or SETTLE_S after the attack."""
    until = time.monotonic() + SETTLE_S * (bound_mb > 0)
    while (now_mb := _megabytes(gateway)) > bound_mb and time.monotonic() < until:  # noqa: ASYNC110 - another process
        await asyncio.sleep(WATCH_S)
    return now_mb


def _megabytes(gateway: AttackedGateway) -> float:
    return gateway.process.footprint().resident_mb
