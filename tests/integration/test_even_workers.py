"""`serve --workers`: connections are spread evenly, and a worker that is stopped or dead holds up no caller."""

import asyncio
import errno
import os
import signal
import socket
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import psutil

from gateway.web.shared_port import ABSENT
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.raw_http import Conversation, connect

REQUEST = b"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"  # without a key: 401


def open_connections(process: GatewayProcess) -> Counter[int]:
    """Return the number of connections that each worker has accepted, by its pid."""
    found = Counter(dict.fromkeys(process.workers, 0))
    for pid in found:
        found[pid] = sum(
            each.status == psutil.CONN_ESTABLISHED and each.laddr.port == process.port.number
            for each in psutil.Process(pid).net_connections("tcp")
        )
    return found


def shared_counts(process: GatewayProcess) -> list[int]:
    """Return the counts that the workers tell each other, as the supervisor sees them."""
    opened = Path(f"/proc/{process.pid}/fd").iterdir()
    shared, *_ = [each for each in opened if os.readlink(each).startswith("/memfd:connections")]
    return memoryview(shared.read_bytes()).cast("I").tolist()


@asynccontextmanager
async def callers(process: GatewayProcess, number: int) -> AsyncIterator[list[Conversation]]:
    """Open connections in one burst, and close them at the end."""
    async with AsyncExitStack() as stack:
        before = open_connections(process).total()
        opened = [stack.enter_async_context(connect(process.url)) for _ in range(number)]
        yield list(await asyncio.gather(*opened))
    await eventually(lambda: open_connections(process).total() <= before)


async def all_accepted(process: GatewayProcess, number: int) -> list[int]:
    """Return the workers' numbers of connections, in order, once all `number` are accepted."""
    await eventually(lambda: open_connections(process).total() == number)
    return sorted(open_connections(process).values())


async def answered(conversation: Conversation) -> None:
    await conversation.send(REQUEST)
    assert (await conversation.read_answer()).status == 401


def is_even(found: Counter[int]) -> bool:
    """Return True if no worker has 6 connections more than another. On a busy machine, turns may be missed."""
    return max(found.values()) - min(found.values()) < 6


async def test_connections_are_spread_evenly_also_while_a_worker_is_stopped_or_dead(servers: Servers) -> None:
    async with running(GatewayProcess(process_environment(servers), workers=3)) as process:
        even = tries = 0
        while even < 3:
            assert tries < 10, even  # with a hash of the addresses, one of twelve bursts is spread evenly
            tries += 1
            async with callers(process, 9):
                even += await all_accepted(process, 9) == [3, 3, 3]
        async with callers(process, 90):
            await all_accepted(process, 90)
            assert is_even(open_connections(process))
            await a_stopped_worker_holds_up_no_caller(process)
            await a_dead_worker_holds_up_no_caller(process)
        await callers_are_refused_once_the_workers_drain(process)


async def a_stopped_worker_holds_up_no_caller(process: GatewayProcess) -> None:
    stopped = process.workers.pop()
    before = open_connections(process)
    os.kill(stopped, signal.SIGSTOP)
    try:
        async with callers(process, 40) as opened:
            for each in opened:
                await answered(each)
            found = open_connections(process)
            assert found.pop(stopped) == before[stopped]
            assert is_even(found)
    finally:
        os.kill(stopped, signal.SIGCONT)
    async with callers(process, 40):
        await all_accepted(process, before.total() + 40)
        assert open_connections(process)[stopped] > before[stopped]


async def a_dead_worker_holds_up_no_caller(process: GatewayProcess) -> None:
    victim, *survivors = process.workers
    os.kill(victim, signal.SIGKILL)
    await eventually(lambda: victim not in process.workers)
    await eventually(lambda: shared_counts(process).count(ABSENT) == 1)  # the others do not wait for it
    async with callers(process, 10) as opened:
        for each in opened:
            await answered(each)
        await eventually(lambda: process.log.read_text().count("serves the API on") == 4)
        (restarted,) = process.workers.difference(survivors)
        before = open_connections(process)
        async with callers(process, 90):
            await all_accepted(process, before.total() + 90)
            found = open_connections(process)
            assert is_even(found)
            assert all(found[restarted] - before[restarted] > found[each] - before[each] for each in survivors)


async def callers_are_refused_once_the_workers_drain(process: GatewayProcess) -> None:
    """Also while one of them hangs: they would be in the queue of a port that nobody serves."""
    async with connect(process.url) as begun:
        await begun.send(REQUEST[:10])
        await eventually(lambda: open_connections(process).total() == 1)
        serving = [pid for pid, count in open_connections(process).items() if count]
        stopped = process.workers.difference(serving).pop()
        os.kill(stopped, signal.SIGSTOP)
        os.kill(process.pid, signal.SIGTERM)
        try:
            await eventually(lambda: is_refused(process))
            assert process.is_running
            await begun.send(REQUEST[10:])
            assert (await begun.read_answer()).status == 401
        finally:
            os.kill(stopped, signal.SIGCONT)
    await eventually(lambda: not process.is_running)


async def test_a_drain_without_a_worker_has_no_delay(servers: Servers) -> None:
    """A caller in the queue would wait for nobody. Also when a worker cannot start: `serve` ends at once."""
    settings = process_environment(servers, GATEWAY_DRAIN_DELAY_S="60")
    async with running(GatewayProcess(settings, workers=2)) as process:
        for worker in process.workers:
            os.kill(worker, signal.SIGKILL)
        async with connect(process.url) as waiting:
            os.kill(process.pid, signal.SIGTERM)
            assert await waiting.is_closed()
        await eventually(lambda: not process.is_running)


def is_refused(process: GatewayProcess) -> bool:
    with socket.socket() as caller:
        return caller.connect_ex(("127.0.0.1", process.port.number)) == errno.ECONNREFUSED
