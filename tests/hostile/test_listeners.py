"""Attacks on the API over TCP, over TLS and over a unix socket: slots, memory and descriptors are given back."""

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from pathlib import Path

import asyncpg
import pytest

from gateway.ingest.wire import MAX_BODY_BYTES
from gateway.web.connections import LINGER_S
from gateway.web.shared_port import TLS_CLOSE_S
from testbed import Servers
from tests.hostile import table
from tests.hostile.listeners import KINDS, Listener, open_listener
from tests.support.callers import make_caller
from tests.support.eventually import eventually

SEED = 2026

# Of an idle connection that has sent much, without a key. uvloop's TLS keeps two buffers of 256 kB.
MOST_MB = {"TCP": 0.1, "TLS": 0.7, "unix": 0.1}
IDLE = 200
# Nothing is refused as too slow while a busy machine sends.
PATIENT = {"confirm_timeout_s": "60", "abandon_timeout_s": "60", "body_timeout_s": "60"}
TLS_LIMIT = 8_192 // 2  # GATEWAY_MAX_CONNECTIONS, as it ships


@pytest.mark.parametrize("kind", KINDS)
async def test_an_idle_connection_keeps_little_of_what_was_sent(servers: Servers, tmp_path: Path, kind: str) -> None:
    async with open_listener(servers, tmp_path, kind) as listener, AsyncExitStack() as stack:
        refused = table.post(bytes(400_000), key=None)
        before_mb = listener.gateway.memory_mb()
        for _ in range(IDLE):
            conversation = await stack.enter_async_context(listener.connect())
            await conversation.send(refused)
            assert (await conversation.read_answer()).status == 401
        each_mb = (listener.gateway.memory_mb() - before_mb) / IDLE
        print(f"{kind}: {each_mb:.3f} MiB each")
        assert each_mb < MOST_MB[kind]


async def test_tls_does_not_keep_a_closed_connection_open(servers: Servers, tmp_path: Path) -> None:
    """The caller of a refused body sends nothing more, and does not answer the end of TLS."""
    async with open_listener(servers, tmp_path, "TLS") as listener:
        assert listener.context is not None
        address = ("127.0.0.1", listener.gateway.process.port.number)
        refused = table.head(b"X-Api-Key: unknown", b"Transfer-Encoding: chunked") + b"64\r\n"
        with ExitStack() as stack:
            before = listener.gateway.descriptors()
            for _ in range(20):
                connection = stack.enter_context(await asyncio.to_thread(socket.create_connection, address))
                silent = await asyncio.to_thread(listener.context.wrap_socket, connection, server_hostname=address[0])
                stack.enter_context(silent).sendall(refused)
            await eventually(lambda: listener.gateway.descriptors() >= before + 20)
            await eventually(lambda: listener.gateway.descriptors() < before + 5, timeout=LINGER_S + TLS_CLOSE_S + 5)
        assert listener.gateway.alarms() == []


async def test_tls_buffers_of_all_idle_connections_together_are_bounded(servers: Servers, tmp_path: Path) -> None:
    """Without a key, 600 connections took 300 MB so."""
    async with open_listener(servers, tmp_path, "TLS") as listener, AsyncExitStack() as stack:
        caller = await make_caller(listener.gateway.admin)
        small = table.post(caller.body(), key=caller.key.encode())
        clean = await stack.enter_async_context(listener.connect())
        before_mb = listener.gateway.memory_mb()
        for number in range(600):
            conversation = await stack.enter_async_context(listener.connect())
            await conversation.send(table.post(bytes(400_000), key=None))
            assert (await conversation.read_answer()).status == 401
            if number % 100 == 0:  # this connection is older than all others, and never large
                await clean.send(small)
                assert (await clean.read_answer()).status == 200
        more_mb = listener.gateway.memory_mb() - before_mb
        print(f"{more_mb:.0f} MiB")
        assert more_mb < 200
        assert listener.gateway.alarms() == []


@pytest.mark.parametrize("sent", [b"", b"G"], ids=["nothing", "a byte"])
async def test_an_evicted_connection_with_tls_gives_its_place_back_at_once(
    servers: Servers, tmp_path: Path, sent: bytes
) -> None:
    """A caller that does not answer the end of TLS kept it for 5 s, while others took its place."""
    async with open_listener(servers, tmp_path, "TLS", max_connections="40") as listener:
        assert listener.context is not None
        address = ("127.0.0.1", listener.gateway.process.port.number)
        before = listener.gateway.descriptors()
        with ExitStack() as opened:
            for _ in range(100):
                plain = opened.enter_context(await asyncio.to_thread(socket.create_connection, address))
                secure = await asyncio.to_thread(listener.context.wrap_socket, plain, server_hostname=address[0])
                opened.enter_context(secure).sendall(sent)
            assert listener.gateway.descriptors() < before + 25
        assert listener.gateway.alarms() == []


def _fill(listener: Listener, key: bytes, opened: ExitStack) -> None:
    """Open as many idle connections as may be, and 500 with uploads that wait for room."""
    for number in range(TLS_LIMIT + 500):
        plain = opened.enter_context(socket.create_connection(("127.0.0.1", listener.gateway.process.port.number)))
        assert listener.context is not None
        secure = opened.enter_context(listener.context.wrap_socket(plain, server_hostname="127.0.0.1"))
        if number < TLS_LIMIT:
            secure.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            assert secure.recv(4096).startswith(b"HTTP/1.1 404")
        else:
            secure.setblocking(False)
            with suppress(ssl.SSLWantWriteError, ssl.SSLEOFError):
                for _ in range(20):
                    secure.send(table.post(bytes(MAX_BODY_BYTES), key=key)[: 256 * 1024])


async def test_memory_with_tls_is_bounded(servers: Servers, tmp_path: Path) -> None:
    """The bound of docs/operations.md, "Sizing". A connection with TLS counts twice."""
    async with open_listener(servers, tmp_path, "TLS", **PATIENT) as listener:
        caller = await make_caller(listener.gateway.admin)
        before = listener.gateway.descriptors()
        with ExitStack() as opened:
            filling = asyncio.create_task(asyncio.to_thread(_fill, listener, caller.key.encode(), opened))
            most_mb = 0.0
            while not filling.done():
                most_mb = max(most_mb, listener.gateway.memory_mb())
                await asyncio.sleep(0.05)
            await filling
            waiting = listener.gateway.metric("gateway_requests_in_flight")
            most_mb = max(most_mb, listener.gateway.memory_mb())
            print(f"at most {most_mb:.0f} MiB, with {waiting:.0f} uploads in flight")
            assert listener.gateway.descriptors() <= before + TLS_LIMIT + 1
        assert waiting > 300
        assert most_mb < 900
        assert listener.gateway.alarms() == []


@pytest.mark.parametrize("kind", KINDS)
async def test_an_answer_that_is_read_gives_its_slot_back_and_its_connection_ends(
    servers: Servers, tmp_path: Path, kind: str
) -> None:
    """With uvloop's TLS, every second answer counted as unread until the next request, or until `answer_timeout_s`."""
    async with open_listener(servers, tmp_path, kind, answer_timeout_s="60") as listener:
        caller = await make_caller(listener.gateway.admin)
        request = table.post(caller.body(), key=caller.key.encode())
        last = table.post(caller.body(), b"Connection: close", key=caller.key.encode())
        for cuts in range(4):
            async with listener.connect() as conversation:
                for each in (request, last):
                    for start in range(cuts):
                        await conversation.send(each[start : start + 1])
                        await asyncio.sleep(0.05)
                    await conversation.send(each[cuts:])
                    assert (await conversation.read_answer()).status == 200
                    await eventually(lambda: listener.gateway.metric("gateway_requests_in_flight") == 0, timeout=10)
                assert await conversation.is_closed()
        assert listener.gateway.alarms() == []


GAUGES = ("gateway_requests_in_flight", "gateway_requests_waiting", "gateway_body_bytes_in_flight")


@pytest.mark.parametrize("kind", KINDS)
async def test_callers_that_reset_at_any_stage_leave_nothing(servers: Servers, tmp_path: Path, kind: str) -> None:
    """Also while their requests wait for a table that is locked."""
    draw = random.Random(SEED)  # noqa: S311 - a draw that can be repeated
    async with open_listener(servers, tmp_path, kind, database_timeout_s="0.5") as listener:
        gateway, caller = listener.gateway, await make_caller(listener.gateway.admin)
        requests = [table.post(caller.body(count), key=caller.key.encode()) for count in (1, 1_000)]
        requests += [requests[0] * 40, requests[0] + b"X", table.post(b"[" * 200_000, key=None)]

        async def call(request: bytes, sent: int, pause_s: float) -> None:
            async with listener.connect() as conversation:
                await conversation.send(request[:sent])
                await asyncio.sleep(pause_s)

        await call(requests[0], 0, 0)
        before = gateway.descriptors()
        for table_name in ("", "api_keys", "sending_lists"):
            async with locked(servers, table_name):
                drawn = [(request, draw.randint(0, len(request))) for request in requests * 12]
                await asyncio.gather(*(call(*each, draw.choice((0, 0.01, 0.1, 0.7))) for each in drawn))
        await eventually(lambda: gateway.descriptors() <= before + 2, timeout=20)  # the pool may have grown
        await eventually(lambda: [gateway.metric(name) for name in GAUGES] == [0, 0, 0], timeout=20)
        async with listener.connect() as conversation:
            await conversation.send(requests[0])
            assert (await conversation.read_answer()).status == 200
        assert gateway.alarms() == []


@asynccontextmanager
async def locked(servers: Servers, table_name: str) -> AsyncIterator[None]:
    """Lock a table; nothing without a name."""
    database = await asyncpg.connect(servers.database_url)
    try:
        async with database.transaction():
            if table_name:
                await database.execute(f"LOCK TABLE {table_name}")
            yield
    finally:
        await database.close()
