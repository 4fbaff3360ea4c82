"""The work of a request, counted: queries, writes, futures, timers and log lines. Timings decide no test; these can."""

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import asyncpg
import pytest

from gateway.postgres.queries import FIND_ACCOUNTS_AND_LISTS, FIND_ACCOUNTS_BY_KEY, RESOLVE_LISTS
from gateway.telemetry.log import JsonLines, WriterThread
from gateway.telemetry.requests import RequestLog
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway
from tests.support.publishing import transport_of

CALLERS = 64
MAX_LINE_BYTES = 400


async def test_a_batch_is_two_queries_one_write_and_one_future(
    start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(make_settings(amqp_connections=1))
    await gateway.send([gateway.message()])  # the statements are prepared, the ids leased
    queries: list[str] = []
    for method in ("execute", "executemany", "fetch", "fetchrow", "fetchval"):
        monkeypatch.setattr(asyncpg.Connection, method, recording(getattr(asyncpg.Connection, method), queries))
    (connection,) = gateway.runtime.publisher.connections.open
    transport = transport_of(connection)
    writes: list[bytes] = []
    monkeypatch.setattr(transport, "write", recording_writes(transport.write, writes))
    futures: list[object] = []
    monkeypatch.setattr(connection, "_loop", CountingLoop(connection._loop, futures))

    _, answer = await gateway.send([gateway.message()] * 1000)

    assert answer["queued_count"] == 1000
    assert queries == [FIND_ACCOUNTS_BY_KEY, RESOLVE_LISTS]
    assert len(writes) == 1
    assert len(futures) == 1

    _, answer = await gateway.send([gateway.message()] * 100)

    assert answer["queued_count"] == 100
    assert queries[2:] == [FIND_ACCOUNTS_AND_LISTS], "a body that has arrived with its head: key and lists in one query"
    assert len(writes) == 2
    assert len(futures) == 2


def recording(method: Callable[..., Any], queries: list[str]) -> Callable[..., Any]:
    """Return the same method of asyncpg's connection, which also records the SQL."""

    async def recorded(self: object, sql: str, *arguments: object, **options: object) -> object:
        queries.append(sql)
        return await method(self, sql, *arguments, **options)

    return recorded


def recording_writes(write: Callable[[bytes], None], writes: list[bytes]) -> Callable[[bytes], None]:
    """Return `write`, which now also records what is written."""

    def recorded(data: bytes) -> None:
        writes.append(data)
        write(data)

    return recorded


class CountingLoop:
    """The publish connection's event loop; collects the futures made for batches."""

    def __init__(self, loop: asyncio.AbstractEventLoop, futures: list[object]) -> None:
        self._loop = loop
        self._futures = futures

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)

    def create_future(self) -> asyncio.Future[None]:
        future: asyncio.Future[None] = self._loop.create_future()
        self._futures.append(future)
        return future


async def test_small_requests_at_once_share_queries_and_timers(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(make_settings(amqp_connections=1))
    await gateway.send([gateway.message()])
    queries: list[str] = []
    monkeypatch.setattr(asyncpg.Connection, "fetch", recording(asyncpg.Connection.fetch, queries))
    (connection,) = gateway.runtime.publisher.connections.open
    futures: list[object] = []
    monkeypatch.setattr(connection, "_loop", CountingLoop(connection._loop, futures))
    timers: list[str] = []
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_at", recording_timers(loop.call_at, timers))
    lines = logged_lines(gateway.runtime.request_log, monkeypatch)
    database = await asyncpg.connect(servers.database_url)
    try:
        async with database.transaction():
            await database.execute("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
            callers = [asyncio.create_task(gateway.send([gateway.message()])) for _ in range(CALLERS)]
            await eventually(lambda: gateway.runtime.admission.requests == CALLERS)
        answers = await asyncio.gather(*callers)
    finally:
        await database.close()

    assert {(status, answer["queued_count"]) for status, answer in answers} == {(200, 1)}
    assert set(queries) == {FIND_ACCOUNTS_AND_LISTS}
    assert len(queries) <= 3, "two that wait for the lock, and one for all who came meanwhile"
    assert len(futures) == CALLERS
    assert len([timer for timer in timers if timer.startswith("PublishConnection")]) <= 1, "for all deadlines"
    assert len(timers) < CALLERS / 2, "some for each query and each new connection to the database, none for a request"
    assert len(lines) == CALLERS
    assert max(map(len, lines)) < MAX_LINE_BYTES


def recording_timers(call_at: Callable[..., asyncio.TimerHandle], timers: list[str]) -> Callable[..., Any]:
    """Return the same method of the event loop, which also records the timers that the gateway's code starts."""

    def recorded(when: float, callback: Callable[..., object], *arguments: Any, **options: Any) -> asyncio.TimerHandle:
        frame = sys._getframe()
        while (caller := frame.f_back) is not None:
            frame = caller
            if "/gateway/" in frame.f_code.co_filename and "/web/" not in frame.f_code.co_filename:
                timers.append(f"{frame.f_code.co_qualname} {callback}")
                break
        return call_at(when, callback, *arguments, **options)

    return recorded


def logged_lines(request_log: RequestLog, monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Return the list to which the request log writes its lines, as a process writes them to standard error."""
    lines: list[bytes] = []
    writer = WriterThread()
    writer.setFormatter(JsonLines())
    writer.close()
    monkeypatch.setattr(writer, "write_line", lines.append)
    monkeypatch.setattr(request_log, "_writer", writer)
    return lines
