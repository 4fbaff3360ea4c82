"""The gateway as a process of its own: ready, serving, drained by SIGTERM, and what it writes to its log."""

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import psutil
import pytest

from gateway.cli.admin import Admin
from testbed import Gateway, Port, Servers
from tests.conftest import new_number
from tests.support.eventually import eventually
from tests.support.outbound_queue import OutboundQueue
from tests.support.secrecy import BODY, PASSWORD

TEXT = f"the text of a message is {BODY}"


class Caller:
    """Someone with an account, who calls a gateway process."""

    def __init__(self, process: Gateway, session: aiohttp.ClientSession) -> None:
        self.process = process
        self.session = session

    async def become_someone(self, admin: Admin) -> None:
        account_id = (await admin.create_account("caller"))["id"]
        self.key = (await admin.create_key(account_id))["key"]
        self.number = new_number()
        await admin.add_list(account_id, self.number)

    async def send(self, count: int) -> tuple[int, Any, str]:
        """POST a batch; status, answer, and the Connection header."""
        message = {"to": "+447911123412", "list_number": self.number, "body": TEXT}
        url = f"{self.process.url}/api/v2/send/bulk"
        body = msgspec.json.encode({"messages": [message] * count})
        headers = {"X-Api-Key": self.key, "Content-Type": "application/json"}
        async with self.session.post(url, data=body, headers=headers) as response:
            return response.status, await response.json(), response.headers.get("Connection", "")


@pytest.fixture
def settings(servers: Servers) -> dict[str, str]:
    """The environment of a gateway process, with half a second of drain delay."""
    name = f"test.{uuid.uuid4().hex[:12]}"
    return {
        **servers.environment(),
        "GATEWAY_AMQP_EXCHANGE": name,
        "GATEWAY_AMQP_QUEUE": name,
        "GATEWAY_DRAIN_DELAY_S": "0.5",
        "GATEWAY_LOG_LEVEL": "DEBUG",
        "GATEWAY_TYPO": "1",
    }


@pytest.fixture
async def caller(settings: dict[str, str], admin: Admin) -> AsyncIterator[Caller]:
    """A caller of a gateway that runs as a process of its own."""
    process = Gateway(settings)
    try:
        await asyncio.to_thread(process.start)
        async with aiohttp.ClientSession() as session:
            someone = Caller(process, session)
            await someone.become_someone(admin)
            yield someone
    finally:
        await asyncio.to_thread(process.close)


@pytest.fixture
async def queue(servers: Servers, caller: Caller) -> AsyncIterator[OutboundQueue]:
    """The queue behind the process."""
    async with OutboundQueue(servers.amqp_url, caller.process.settings["GATEWAY_AMQP_QUEUE"]) as outbound:
        yield outbound
        await outbound.delete()


def gateway_pid(process: Gateway) -> int:
    """The gateway's own process, below its supervisor."""
    return process.pid


async def test_sigterm_loses_no_confirm(caller: Caller, queue: OutboundQueue) -> None:
    """Callers go on until they are told to leave: every answer is a 200, and all that was counted is in the queue."""
    pid = gateway_pid(caller.process)
    counted: list[int] = []
    told_to_leave: list[bool] = []

    async def call_until_told_to_leave() -> None:
        while True:
            status, answer, connection = await caller.send(200)
            assert status == 200
            counted.append(answer["queued_count"])
            if connection == "close":
                told_to_leave.append(True)
                return

    async def probe() -> int:
        async with caller.session.get(f"{caller.process.ops_url}/readyz") as response:
            return response.status

    async with asyncio.TaskGroup() as calls:
        for _ in range(8):
            calls.create_task(call_until_told_to_leave())
        await eventually(lambda: len(counted) >= 20)
        assert await probe() == 200
        os.kill(pid, signal.SIGTERM)
        while await probe() == 200:  # noqa: ASYNC110 - the process sets no event of ours
            await asyncio.sleep(0.01)
    await eventually(lambda: not caller.process.is_running)
    assert len(told_to_leave) == 8
    assert sum(counted) == await queue.depth()
    assert '"message":"stopped"' in caller.process.log.read_text()


async def test_the_log_is_json_lines_without_texts_numbers_or_keys(caller: Caller, servers: Servers) -> None:
    good_key = caller.key
    assert (await caller.send(10))[0] == 200
    caller.key += "x"
    assert (await caller.send(10))[0] == 401
    await asyncio.to_thread(caller.process.signal_and_wait, signal.SIGTERM)
    text = caller.process.log.read_text()
    lines = [msgspec.json.decode(line) for line in text.splitlines()]
    assert {"time", "level", "logger", "message"} <= set(lines[0])
    messages = [line["message"] for line in lines]
    assert "GATEWAY_TYPO is no setting of the gateway; is it misspelt?" in messages
    for secret in (TEXT, "+447911123412", good_key, caller.number, PASSWORD):
        assert secret not in text


class SeveralWorkers(Gateway):
    """The gateway as three processes."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--workers", "3"]


async def test_several_workers_serve_die_return_and_drain_as_one(
    servers: Servers, admin: Admin, settings: dict[str, str]
) -> None:
    process = SeveralWorkers(settings)
    try:
        await asyncio.to_thread(process.start)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
            caller = Caller(process, session)
            await caller.become_someone(admin)

            async def probe(path: str) -> tuple[int, Any]:
                async with session.get(process.ops_url + path) as response:
                    return response.status, await response.json()

            assert await probe("/readyz") == (200, {"workers": [{"status": "ready"}] * 3})
            supervisor = psutil.Process(gateway_pid(process))
            workers = {child.pid for child in supervisor.children()}
            assert len(workers) == 3
            counted = 0
            for _ in range(60):
                status, answer, _ = await caller.send(10)
                assert status == 200
                counted += answer["queued_count"]

            victim = workers.pop()
            os.kill(victim, signal.SIGKILL)
            while (await probe("/readyz"))[0] == 200:  # noqa: ASYNC110 - the processes set no event of ours
                await asyncio.sleep(0.01)
            while (await probe("/readyz"))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            now = {child.pid for child in supervisor.children()}
            assert len(now) == 3
            assert now >= workers
            assert victim not in now

            os.kill(supervisor.pid, signal.SIGTERM)
            await eventually(lambda: not process.is_running)
            assert not any(psutil.pid_exists(pid) for pid in now)
            lines = [msgspec.json.decode(line) for line in process.log.read_bytes().splitlines()]
            assert {line["process"] for line in lines} == {"supervisor", "worker-0", "worker-1", "worker-2"}
        async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
            payloads = await queue.take_payloads()
            await queue.delete()
        assert len(payloads) == counted
        assert len({payload["request_id"].split("-")[0] for payload in payloads}) == 3  # each of them served
    finally:
        await asyncio.to_thread(process.close)


async def test_workers_whose_supervisor_is_gone_drain_themselves(settings: dict[str, str]) -> None:
    """Started without the tests' own supervision, which would end them for us."""
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


async def is_ready(session: aiohttp.ClientSession, url: str) -> bool:
    """Whether the probe says so; False also while nobody listens."""
    try:
        async with session.get(url) as response:
            return response.status == 200
    except aiohttp.ClientError:
        return False
