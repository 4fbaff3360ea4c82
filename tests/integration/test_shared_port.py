"""The port that workers share, with several listeners in one process: which of them accepts, and who defers."""

import asyncio
import errno
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from math import inf
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop
from aiohttp import web

from gateway.errors import GatewayError
from gateway.web import shared_port
from gateway.web.connections import BoundedRunner
from gateway.web.shared_port import (
    ABSENT,
    MAX_SAVED_STEPS,
    MAX_STEPS_PER_WAIT,
    STEP_S,
    STEPS_PER_SECOND,
    ConnectionCounts,
    InheritedPort,
    SharedListener,
    SharedPort,
    Tls,
    _Deferral,
    open_shared_port,
)
from gateway.web.sockets import Limits
from tests.support.authority import Authority
from tests.support.eventually import eventually


@pytest.fixture(autouse=True)
def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every wait end by what the other workers do."""
    monkeypatch.setattr(shared_port, "MAX_STEPS_PER_WAIT", -1)
    monkeypatch.setattr(shared_port, "MAX_SAVED_STEPS", inf)


def inherited(port: SharedPort, number: int) -> InheritedPort:
    """Return what a worker inherits, with descriptors of its own, as a process would have them."""
    found = port.inherited_by(number)
    return InheritedPort(number, os.dup(found.counts), [os.dup(each) for each in found.sockets])


def address_of(port: SharedPort) -> tuple[str, int]:
    with socket.socket(fileno=os.dup(port.inherited_by(0).sockets[0])) as shared:
        address: tuple[str, int] = shared.getsockname()
        return address


class Worker:
    """A worker's listener, whose connections do nothing."""

    def __init__(self, port: SharedPort, number: int, context: ssl.SSLContext | None = None) -> None:
        self.transports: list[asyncio.Transport] = []
        self.is_listening = True
        worker = self

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                worker.transports.append(cast(asyncio.Transport, transport))

            def connection_lost(self, exc: Exception | None) -> None:
                worker.transports.pop()

        tls = Tls(context, 0.2, lambda: 10) if context else None
        self.listener = SharedListener(Connection, inherited(port, number), tls)
        self.listener.listen()

    def stop(self) -> None:
        """Accept no more."""
        if self.is_listening:
            self.is_listening = False
            self.listener.close()


class Bench:
    """A port with its workers, and callers."""

    def __init__(self, port: SharedPort, stack: ExitStack) -> None:
        self.port = port
        self.stack = stack
        self.counts = ConnectionCounts(port.inherited_by(0).counts)
        self.workers: list[Worker] = []
        self.address = address_of(port)

    def start(self, number: int, context: ssl.SSLContext | None = None) -> Worker:
        self.workers.append(Worker(self.port, number, context))
        self.stack.callback(self.workers[-1].stop)
        return self.workers[-1]

    def call(self, times: int = 1) -> list[socket.socket]:
        """Open connections, which wait in the queue until the event loop runs."""
        return [self.stack.enter_context(socket.create_connection(self.address, 5.0)) for _ in range(times)]

    def open(self) -> list[int]:
        """Return the numbers of open connections, as the workers tell them."""
        return list(self.counts.read())


@asynccontextmanager
async def bench(workers: int) -> AsyncIterator[Bench]:
    async with open_shared_port("127.0.0.1", 0, workers) as port:
        with ExitStack() as stack:
            yield Bench(port, stack)


LOOPS: list[Callable[[Awaitable[None]], None]] = [asyncio.run, uvloop.run]  # type: ignore[list-item]
both_loops = pytest.mark.parametrize("run", LOOPS, ids=["asyncio", "uvloop"])


@both_loops
def test_a_burst_is_spread_evenly_and_the_closed_are_made_up_for(run: Callable[[Any], None]) -> None:
    async def scenario() -> None:
        async with bench(3) as it:
            for number in range(3):
                it.start(number)
            it.call(8)
            await eventually(lambda: sum(it.open()) == 8)
            assert sorted(it.open()) == [2, 3, 3]
            it.call(100)
            await eventually(lambda: sum(it.open()) == 108)
            assert it.open() == [36, 36, 36]
            await eventually(lambda: len(it.workers[1].transports) == 36)  # a connection counts before it has one
            for transport in list(it.workers[1].transports):
                transport.close()
            await eventually(lambda: it.open() == [36, 0, 36])
            it.call(30)
            await eventually(lambda: sum(it.open()) == 102)
            assert it.open() == [36, 30, 36]
            (accepted, *_) = it.workers[0].transports
            assert accepted.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1

    run(scenario())


async def test_nobody_waits_for_a_worker_that_does_not_accept() -> None:
    """Worker 2 does not run yet, 1 ends; what 1 closes later changes nothing."""
    async with bench(3) as it:
        it.start(0)
        it.start(1)
        it.call(10)
        await eventually(lambda: it.open() == [5, 5, ABSENT])
        it.workers[1].stop()
        it.workers[1].transports[0].close()
        it.call(10)
        await eventually(lambda: it.open() == [15, ABSENT, ABSENT])
        await eventually(lambda: len(it.workers[1].transports) == 4)
        assert it.open() == [15, ABSENT, ABSENT]
        it.counts.write(1, 0)  # its process begins anew, and dies without a word
        it.port.mark_absent(1)
        it.call(1)
        await eventually(lambda: it.open() == [16, ABSENT, ABSENT])


async def test_a_worker_that_does_not_accept_is_passed_over_until_its_number_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.undo()
    steps = count_calls(monkeypatch, "_stop_watching")
    async with bench(3) as it:
        it.start(0)
        it.counts.write(1, 0)  # it is stopped
        it.call(1)
        await eventually(lambda: it.open()[0] == 1)
        assert len(steps) == 0, "nobody has fewer connections"
        it.call(20)
        await eventually(lambda: it.open()[0] == 21)
        assert len(steps) == MAX_STEPS_PER_WAIT
        it.counts.write(1, 1)
        it.call(2)
        await eventually(lambda: it.open()[0] == 23)
        assert len(steps) == 2 * MAX_STEPS_PER_WAIT
        it.counts.write(2, 9)  # one more begins, and does not accept either
        it.call(2)
        await eventually(lambda: it.open()[0] == 25)
        assert len(steps) == 3 * MAX_STEPS_PER_WAIT


def test_steps_are_a_share_of_all_time_although_the_numbers_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers with a new connection for each request would otherwise let a worker wait for ever."""
    monkeypatch.undo()
    deferral = _Deferral()
    began, steps, now = 1_000.0, 0, 1_000.0
    for number in range(100_000):
        if deferral.take_step(now, 2, (2, number % 2)):
            steps += 1
            now += STEP_S
        now += 0.001
    assert steps == pytest.approx(MAX_SAVED_STEPS + STEPS_PER_SECOND * (now - began), abs=2)


async def test_a_worker_that_waits_has_its_turn_when_its_own_connections_are_closed() -> None:
    async with bench(2) as it:
        worker = it.start(0)
        it.call(1)
        await eventually(lambda: it.open() == [1, ABSENT])
        it.counts.write(1, 0)
        it.call(1)
        await asyncio.sleep(0.05)
        assert it.open() == [1, 0]
        worker.transports[0].close()
        await eventually(
            lambda: it.open() == [1, 0] and [each.is_closing() for each in worker.transports] == [False], timeout=5
        )


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Return a list that grows with each call of a listener's method."""
    calls: list[str] = []
    method = getattr(SharedListener, name)

    def count(*arguments: Any) -> Any:
        calls.append(name)
        return method(*arguments)

    monkeypatch.setattr(SharedListener, name, count)
    return calls


@contextmanager
def no_descriptor() -> Iterator[None]:
    """Let every further descriptor of this process be refused."""
    lowest = os.dup(0)
    os.close(lowest)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


async def test_without_descriptors_the_queue_is_left_alone_for_a_while(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same error at each turn of the event loop would occupy a core, and fill the log."""
    monkeypatch.setattr(shared_port, "RETRY_S", 0.02)
    async with bench(1) as it:
        it.start(0)
        attempts = count_calls(monkeypatch, "_accept")
        it.call(3)
        with no_descriptor():
            await eventually(lambda: len(attempts) == 1)
            assert it.open() == [ABSENT], "the other workers would wait for it"
            await asyncio.sleep(0)
            assert len(attempts) == 1, "it spins"
            await eventually(lambda: len(attempts) == 4)
        await eventually(lambda: it.open() == [3])
        lines = [line for line in caplog.messages if line.startswith("no connection can be accepted")]
        assert lines == [f"no connection can be accepted: {os.strerror(errno.EMFILE)}"]


@both_loops
def test_handshakes_count_and_those_that_fail_until_they_end(run: Callable[[Any], None], tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    issued = authority.issue("127.0.0.1")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(issued.cert, issued.key)

    async def scenario() -> None:
        async with bench(1) as it:
            worker = it.start(0, context)
            silent, plain, gone, _late = it.call(4)
            await eventually(lambda: it.open() == [4])
            plain.sendall(b"GET / HTTP/1.1\r\n\r\n")
            silent.close()
            gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # close with a reset
            gone.close()
            await eventually(lambda: it.open() == [0], timeout=5)
            assert worker.transports == []
            _, writer = await asyncio.open_connection(*it.address, ssl=authority.client_context())
            await eventually(lambda: len(worker.transports) == 1)
            assert worker.transports[0].get_extra_info("cipher") is not None
            assert it.open() == [1]
            writer.close()
            await eventually(lambda: it.open() == [0], timeout=5)

    run(scenario())


async def test_a_full_worker_leaves_the_connection_to_one_that_has_room() -> None:
    async with open_shared_port("127.0.0.1", 0, 2) as port, AsyncExitStack() as stack:
        runners = [
            BoundedRunner(web.Application(), Limits(60.0, 60.0, 3), refuse, drain_timeout_s=0.1) for _ in range(2)
        ]
        for number, runner in enumerate(runners):
            stack.push_async_callback(runner.cleanup)
            await runner.listen("127.0.0.1", 0, inherited=inherited(port, number))
        counts = ConnectionCounts(port.inherited_by(0).counts)
        address = address_of(port)
        opened = [await asyncio.open_connection(*address) for _ in range(6)]
        await eventually(lambda: list(counts.read()) == [3, 3])
        await asyncio.sleep(0.05)
        assert not any(reader.at_eof() for reader, _ in opened), "a connection was closed while there was room"
        opened.append(await asyncio.open_connection(*address))  # beyond all bounds: one makes room, as ever
        await eventually(lambda: sum(reader.at_eof() for reader, _ in opened) == 1)
        await eventually(lambda: list(counts.read()) == [3, 3])
        for _, writer in opened:
            writer.close()


def refuse(error: GatewayError, _cause: BaseException | None) -> web.Response:
    return web.json_response({"error": str(error)}, status=error.status)


async def test_a_closed_port_refuses_callers_although_a_worker_still_listens() -> None:
    """A worker that hangs would keep the queue open, and callers waiting in it."""
    async with bench(2) as it:
        it.start(0)
        it.start(1)
        it.port.close()
        with pytest.raises(ConnectionRefusedError):
            it.call(1)
        await eventually(lambda: it.open() == [ABSENT, ABSENT])


class FailingQueue(socket.socket):
    """A listening socket whose next connection has failed."""

    def accept(self) -> tuple[socket.socket, Any]:
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))


async def test_an_error_of_one_connection_stops_no_worker() -> None:
    async with bench(1) as it:
        worker = it.start(0)
        with FailingQueue() as failing:
            worker.listener._accept(failing)
        assert it.open() == [0], "it still accepts"
        it.call(1)
        await eventually(lambda: it.open() == [1])


async def test_a_connection_that_cannot_be_handed_over_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    async with bench(1) as it:
        worker = it.start(0)

        def fail() -> asyncio.Protocol:
            raise RuntimeError("no protocol")

        monkeypatch.setattr(worker.listener, "_factory", fail)
        worker.listener._loop.set_exception_handler(lambda *_: None)
        it.call(2)
        await eventually(lambda: not worker.listener._handovers and it.open() == [0])
