"""The gateway as a process: readiness, serving, drain after SIGTERM, workers, log. Promise 11."""

import asyncio
import os
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest
from yarl import URL

from gateway.server import process as server
from testbed import Port, Servers
from testbed.processes import http_get
from tests.support.callers import RECIPIENT, SEND_PATH, Caller, Client
from tests.support.eventually import eventually
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.outbound_queue import OutboundQueue
from tests.support.raw_http import RawAnswer, connect
from tests.support.scripted_broker import ScriptedBroker
from tests.support.secrecy import BODY, PASSWORD
from tests.support.tcp_proxy import TcpProxy


@pytest.fixture
def settings(servers: Servers) -> dict[str, str]:
    """Return the environment of a gateway process with half a second of drain delay."""
    return process_environment(servers, GATEWAY_DRAIN_DELAY_S="0.5", GATEWAY_LOG_LEVEL="DEBUG", GATEWAY_TYPO="1")


@pytest.fixture
async def process(settings: dict[str, str]) -> AsyncIterator[GatewayProcess]:
    """Run a gateway as a process."""
    async with running(GatewayProcess(settings)) as started:
        yield started


@pytest.fixture
async def client(process: GatewayProcess, caller: Caller) -> AsyncIterator[Client]:
    """Yield a client of `process`."""
    async with aiohttp.ClientSession() as session:
        yield Client(process.url, session, caller)


@pytest.fixture
async def queue(servers: Servers, process: GatewayProcess) -> AsyncIterator[OutboundQueue]:
    """Yield the queue behind the process; delete it afterwards."""
    async with OutboundQueue(servers.amqp_url, process.settings["GATEWAY_AMQP_QUEUE"]) as outbound:
        yield outbound
        await outbound.delete()


async def test_sigterm_loses_no_confirm(process: GatewayProcess, client: Client, queue: OutboundQueue) -> None:
    """Callers send until they get Connection: close. Every answer is 200, and every counted message is in the queue."""
    counted: list[int] = []
    told_to_leave: list[bool] = []

    async def call_until_told_to_leave() -> None:
        while True:
            status, answer, headers = await client.post(client.caller.body(200))
            assert status == 200
            counted.append(answer["queued_count"])
            if headers.get("Connection") == "close":
                told_to_leave.append(True)
                return

    async def probe() -> int:
        async with client.session.get(f"{process.ops_url}/readyz") as response:
            return response.status

    async with asyncio.TaskGroup() as calls:
        for _ in range(8):
            calls.create_task(call_until_told_to_leave())
        await eventually(lambda: len(counted) >= 20)
        assert await probe() == 200
        os.kill(process.pid, signal.SIGTERM)
        while await probe() == 200:  # noqa: ASYNC110 - the process sets no event of ours
            await asyncio.sleep(0.01)
    await eventually(lambda: not process.is_running)
    assert len(told_to_leave) == 8
    assert sum(counted) == await queue.depth()
    assert '"message":"stopped"' in process.log.read_text()


def head(caller: Caller, body: bytes, *more: str) -> bytes:
    """Return the head of a request with this body."""
    lines = (
        "POST /api/v2/send/bulk HTTP/1.1",
        "Host: x",
        f"X-Api-Key: {caller.key}",
        f"Content-Length: {len(body)}",
        *more,
        "\r\n",
    )
    return "\r\n".join(lines).encode()


async def test_a_request_that_has_begun_at_sigterm_is_read_to_its_end_and_served(
    process: GatewayProcess, client: Client, queue: OutboundQueue
) -> None:
    """With half a head, a head, or a part of the body; the rest comes after the listener is closed."""
    body = client.caller.body(3)
    begun = head(client.caller, body)
    request, cuts = begun + body, (10, len(begun), len(begun) + 20)
    async with AsyncExitStack() as stack:
        idle, *uploads = [await stack.enter_async_context(connect(client.url)) for _ in range(1 + len(cuts))]
        await idle.send(request)
        assert (await idle.read_answer()).status == 200
        for upload, cut in zip(uploads, cuts, strict=True):
            await upload.send(request[:cut])
        await asyncio.sleep(0.2)  # it has arrived
        os.kill(process.pid, signal.SIGTERM)
        assert await idle.is_closed()
        await asyncio.sleep(1.0)
        for upload, cut in zip(uploads, cuts, strict=True):
            await upload.send(request[cut:])
        answers = [await upload.read_answer() for upload in uploads]
    assert [answer.status for answer in answers] == [200] * len(cuts)
    assert all(b"\r\nConnection: close\r\n" in answer.raw for answer in answers)
    await eventually(lambda: not process.is_running, timeout=2)
    assert await queue.depth() == 3 * (1 + len(cuts))


async def test_a_request_that_waits_at_sigterm_gets_its_turn(settings: dict[str, str], caller: Caller) -> None:
    async with full_window(settings, caller) as (process, broker, first), connect(f"{process.url}{SEND_PATH}") as late:
        body = caller.body()
        await late.send(head(caller, body) + body[:20])
        await eventually(lambda: waiting(process) == 1)
        os.kill(process.pid, signal.SIGTERM)
        await asyncio.sleep(1.5)  # the drain's delay is half a second
        broker.mode = "ack"
        broker.sessions[0].ack(FULL, multiple=True)
        await eventually(lambda: waiting(process) == 0)
        await late.send(body[20:])
        answer = await late.read_answer()
        assert (answer.status, answer.json()["queued_count"]) == (200, 1)
        assert (await first)[0] == 200
        await eventually(lambda: not process.is_running, timeout=2)
        assert len(broker.published) == FULL + 1


async def test_what_cannot_be_served_before_the_drain_ends_is_answered_as_draining(
    settings: dict[str, str], caller: Caller
) -> None:
    short = settings | {"GATEWAY_DRAIN_TIMEOUT_S": "2"}
    async with full_window(short, caller) as (process, broker, first), AsyncExitStack() as stack:
        fills, waits = [await stack.enter_async_context(connect(f"{process.url}{SEND_PATH}")) for _ in range(2)]
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
        stack.callback(writer.close)
        broker.sessions[0].ack(FULL, multiple=True)
        assert (await first)[0] == 200
        body = caller.body(FULL)
        writer.write(head(caller, body, "Connection: close") + body[:20])
        await asyncio.sleep(0.5)  # it has had its turn
        await fills.send(head(caller, body) + body)
        await broker.wait_published(2 * FULL)
        await waits.send(head(caller, body) + body)
        await eventually(lambda: waiting(process) == 1)
        os.kill(process.pid, signal.SIGTERM)
        began = time.monotonic()
        answers = [RawAnswer(await reader.read()), await waits.read_answer()]
        for _ in range(4):  # the rest of the body is discarded: a reset could take the answer from its caller
            writer.write(body[:20])
            await writer.drain()
            await asyncio.sleep(0.05)
        for answer in answers:
            assert (answer.status, answer.json()["code"]) == (503, "draining")
            assert b"\r\nConnection: close\r\n" in answer.raw
        unconfirmed = await fills.read_answer()
        assert (unconfirmed.status, unconfirmed.json()["code"]) == (504, "outcome_unknown")
        await eventually(lambda: not process.is_running, timeout=5)
        assert time.monotonic() - began < 0.5 + 2 + 1
        assert len(broker.published) == 2 * FULL


class AliveGateway(GatewayProcess):
    """A gateway that counts as started before it is ready."""

    def _answers(self) -> bool:
        answer = http_get(self.ops_port, "/livez")
        return answer is not None and answer[0] == 200


async def test_a_drain_ends_in_time_without_a_broker(settings: dict[str, str], caller: Caller) -> None:
    """At its end the waits for a connection end. What waits for ever for one must not go round in circles then."""
    without = settings | {"GATEWAY_DRAIN_TIMEOUT_S": "2", "GATEWAY_AMQP_URL": "amqp://127.0.0.1:1/"}
    async with running(AliveGateway(without)) as process:
        reader, writer = await asyncio.open_connection("127.0.0.1", process.port.number)
        body = caller.body(100)
        writer.write(head(caller, body, "Connection: close") + body[:20])
        await asyncio.sleep(0.5)
        os.kill(process.pid, signal.SIGTERM)
        async with asyncio.timeout(0.5 + 2 + 2):
            answer = RawAnswer(await reader.read(65_536))
        assert (answer.status, answer.json()["code"]) == (503, "draining")
        writer.close()
        await eventually(lambda: not process.is_running, timeout=5)


FULL = 1_000  # messages in the confirm window


@asynccontextmanager
async def full_window(
    settings: dict[str, str], caller: Caller
) -> "AsyncIterator[tuple[GatewayProcess, ScriptedBroker, asyncio.Task[tuple[int, Any, Any]]]]":
    """Yield a gateway process, its broker, which has not confirmed FULL messages, and the request that sent them."""
    async with ScriptedBroker() as broker, aiohttp.ClientSession() as session:
        one = {"GATEWAY_AMQP_CONNECTIONS": "1", "GATEWAY_MAX_UNCONFIRMED_MESSAGES": str(FULL)}
        async with running(GatewayProcess(settings | one | {"GATEWAY_AMQP_URL": broker.url})) as process:
            broker.mode = "silent"
            first = asyncio.create_task(Client(process.url, session, caller).post(caller.body(FULL)))
            await broker.wait_published(FULL)
            try:
                yield process, broker, first
            finally:
                first.cancel()
                await asyncio.gather(first, return_exceptions=True)


def waiting(process: GatewayProcess) -> int:
    """Return the number of requests that wait for room."""
    answer = http_get(process.ops_port, "/metrics")
    assert answer is not None
    found = re.search(rb"^gateway_requests_waiting ([0-9.]+)$", answer[1], re.MULTILINE)
    assert found is not None
    return int(float(found[1]))


async def test_the_log_is_json_lines_without_texts_numbers_or_keys(process: GatewayProcess, client: Client) -> None:
    caller, body = client.caller, client.caller.body(10)
    assert (await client.post(body))[0] == 200
    assert (await client.post(body, X_Api_Key=caller.key + "x"))[0] == 401
    await asyncio.to_thread(process.stop)
    text = process.log.read_text()
    lines = [msgspec.json.decode(line) for line in text.splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    messages = [line["message"] for line in lines]
    assert "GATEWAY_TYPO is no setting of the gateway; is it misspelt?" in messages
    [settings] = [line["settings"] for line in lines if line["message"] == "settings in force"]
    assert (settings["drain_delay_s"], settings["amqp_queue"]) == (0.5, process.settings["GATEWAY_AMQP_QUEUE"])
    for secret in (BODY, RECIPIENT, caller.key, caller.list_number, PASSWORD):
        assert secret not in text


async def test_during_the_drain_delay_new_connections_are_served_although_it_is_not_ready(
    settings: dict[str, str], caller: Caller
) -> None:
    """Load balancers need time to see that it is not ready."""
    async with (
        running(GatewayProcess(settings | {"GATEWAY_DRAIN_DELAY_S": "60"})) as process,
        aiohttp.ClientSession() as session,
    ):
        os.kill(process.pid, signal.SIGTERM)
        async with asyncio.timeout(30):
            while (await session.get(process.ops_url + "/readyz")).status != 503:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        status, _, headers = await Client(process.url, session, caller).post(caller.body())
        assert (status, headers["Connection"]) == (200, "close")


async def test_several_workers_serve_die_return_and_drain_as_one(
    servers: Servers, caller: Caller, settings: dict[str, str]
) -> None:
    async with running(GatewayProcess(settings, workers=3)) as process:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

            async def probe(path: str) -> tuple[int, Any]:
                async with session.get(process.ops_url + path) as response:
                    return response.status, await response.json()

            assert await probe("/readyz") == (200, {"workers": [{"status": "ready"}] * 3})
            supervisor, workers = process.pid, process.workers
            assert len(workers) == 3
            counted = 0
            async with AsyncExitStack() as stack:
                for _ in range(3):  # connections, one to each worker
                    held = await stack.enter_async_context(aiohttp.ClientSession())
                    for _ in range(20):
                        status, answer, _ = await Client(process.url, held, caller).post(caller.body(10))
                        assert status == 200
                        counted += answer["queued_count"]

            victim = workers.pop()
            os.kill(victim, signal.SIGKILL)
            while (await probe("/readyz"))[0] == 200:  # noqa: ASYNC110 - the processes set no event of ours
                await asyncio.sleep(0.01)
            while (await probe("/readyz"))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            now = process.workers
            assert len(now) == 3
            assert now >= workers
            assert victim not in now

            os.kill(supervisor, signal.SIGTERM)
            await eventually(lambda: not process.is_running)
            assert not any(psutil.pid_exists(pid) for pid in now)
            lines = [msgspec.json.decode(line) for line in process.log.read_bytes().splitlines()]
            assert {line["process"] for line in lines} == {"supervisor", "worker-0", "worker-1", "worker-2"}
        async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
            payloads = await queue.take_payloads()
            await queue.delete()
        assert len(payloads) == counted
        assert len({payload["request_id"].split("-")[0] for payload in payloads}) == 3  # each of them served


async def test_the_end_of_the_supervisor_is_noticed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """At its end the pipe stays readable: a drain would take a whole processor."""
    read_end, write_end = os.pipe()
    with os.fdopen(read_end) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        stop = asyncio.Event()
        server._stop_with_supervisor(stop)
        os.close(write_end)
        async with asyncio.timeout(5.0):
            await stop.wait()
        assert not asyncio.get_running_loop().remove_reader(stdin)


async def test_workers_whose_supervisor_is_gone_drain_themselves(settings: dict[str, str]) -> None:
    """Started without the testbed's supervisor, which would end the workers itself."""
    api_port, ops_port = Port(), Port()
    ports = {"GATEWAY_API_PORT": str(api_port), "GATEWAY_OPS_PORT": str(ops_port), "GATEWAY_DRAIN_DELAY_S": "5"}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "serve", "--workers", "2"),
        cwd=Path(__file__).parents[2],
        env=os.environ | settings | ports,
        stderr=asyncio.subprocess.DEVNULL,
    )
    workers: list[psutil.Process] = []
    try:
        async with aiohttp.ClientSession() as session:
            while not await is_ready(session, f"http://127.0.0.1:{ops_port}/readyz"):  # noqa: ASYNC110 - the process sets no event of ours
                await asyncio.sleep(0.05)
        workers = psutil.Process(process.pid).children()
        assert len(workers) == 2
        before = sum(worker.cpu_times().user for worker in workers)
        process.kill()
        await asyncio.sleep(1.0)  # of the five seconds that they go on serving
        spent = sum(worker.cpu_times().user for worker in workers) - before
        assert spent < 0.3, "they spin: idle workers spend next to nothing, spinning ones all they can get"
        await eventually(lambda: not any(worker.is_running() for worker in workers))
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        for worker in workers:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        api_port.release()
        ops_port.release()


async def test_workers_end_by_themselves_although_their_connections_do_not_close(
    settings: dict[str, str], caller: Caller
) -> None:
    """The database hangs: the last use of the key cannot be written, nor can a connection be closed."""
    url = URL(settings["GATEWAY_DATABASE_URL"])
    async with TcpProxy(str(url.host), url.port or 5432) as proxy, aiohttp.ClientSession() as session:
        hung = {
            "GATEWAY_DATABASE_URL": str(url.with_host("127.0.0.1").with_port(proxy.port)),
            "GATEWAY_DATABASE_TIMEOUT_S": "10",
            "GATEWAY_DRAIN_DELAY_S": "0",
            "GATEWAY_DRAIN_TIMEOUT_S": "1",
        }
        async with running(GatewayProcess(settings | hung, workers=2)) as process:
            assert (await Client(process.url, session, caller).post(caller.body()))[0] == 200
            proxy.black_hole()
            os.kill(process.pid, signal.SIGTERM)
            await eventually(lambda: not process.is_running)
            log = process.log.read_text()
    assert "killing it" not in log
    assert log.count("ended before everything was closed") == 2


@pytest.mark.parametrize("workers", [1, 2])
async def test_sighup_without_a_certificate_is_ignored_from_the_start_on(
    settings: dict[str, str], caller: Caller, workers: int
) -> None:
    async with running(GatewayProcess(settings, workers=workers)) as process, aiohttp.ClientSession() as session:
        pids = {process.pid, *(process.workers if workers > 1 else ())}
        for pid in pids:
            os.kill(pid, signal.SIGHUP)
        await eventually(lambda: process.log.read_text().count("SIGHUP is ignored") == len(pids), timeout=10)
        assert pids == {process.pid, *(process.workers if workers > 1 else ())}
        assert (await Client(process.url, session, caller).post(caller.body()))[0] == 200


@pytest.mark.parametrize("arguments", [["serve"], ["serve", "--workers", "2"]])
async def test_ctrl_c_during_the_imports_ends_the_process_without_a_traceback(
    settings: dict[str, str], tmp_path: Path, arguments: list[str]
) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", *arguments),
            cwd=Path(__file__).parents[2],
            env=os.environ | settings,
            stderr=log,
        )
    await eventually(lambda: "asyncpg" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(signal.SIGINT)
    assert await process.wait() == -signal.SIGINT
    assert (tmp_path / "log").read_text() == ""


class WithoutStandardStreams(GatewayProcess):
    """A gateway whose standard input and output are closed."""

    def _command(self) -> list[str]:
        return ["sh", "-c", 'exec "$@" <&- >&-', "sh", *super()._command()]


@pytest.mark.parametrize("workers", [1, 2])
async def test_serve_needs_no_standard_streams(settings: dict[str, str], workers: int) -> None:
    """The event loop's own descriptors would get their numbers, and uvloop aborts when it closes one of these."""
    async with running(WithoutStandardStreams(settings, workers=workers)) as process:
        os.kill(process.pid, signal.SIGTERM)
        await eventually(lambda: not process.is_running)
        log = process.log.read_text()
        assert '"stopped"' in log
        assert "Assertion" not in log


async def test_sighup_during_the_start_is_ignored(settings: dict[str, str], tmp_path: Path) -> None:
    """Started without the testbed, which waits until the gateway is ready."""
    api_port, ops_port = Port(), Port()
    ports = {"GATEWAY_API_PORT": str(api_port), "GATEWAY_OPS_PORT": str(ops_port)}
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway", "serve"),
            cwd=Path(__file__).parents[2],
            env=os.environ | settings | ports,
            stderr=log,
        )
    try:
        # The first module that the imports load from a library of its own.
        await eventually(lambda: "asyncpg" in Path(f"/proc/{process.pid}/maps").read_text())
        async with aiohttp.ClientSession() as session:
            while not await is_ready(session, f"http://127.0.0.1:{ops_port}/readyz"):
                assert process.returncode is None
                process.send_signal(signal.SIGHUP)
                await asyncio.sleep(0.02)
        assert "SIGHUP is ignored" in (tmp_path / "log").read_text()
        process.terminate()
        assert await process.wait() == 0
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        api_port.release()
        ops_port.release()


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Return True when the probe says so; False also while nobody listens."""
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
