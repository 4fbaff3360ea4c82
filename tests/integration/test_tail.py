"""`python -m gateway tail` as an operator runs it, beside real gateways: sees all, takes nothing, changes nothing."""

import asyncio
import os
import signal
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aio_pika
import aiohttp
import msgspec
import psutil

from gateway.admin import Admin
from gateway.watching import MOST_WATCHERS
from scripts.servers import Gateway, Port, Servers
from tests.conftest import GatewayUnderTest, MakeSettings, StartGateway, new_number
from tests.eventually import eventually
from tests.outbound_queue import OutboundQueue

ROOT = Path(__file__).parents[2]
TOKEN = "a token of some length"  # noqa: S105 - of a gateway under test


class RunningTail:
    """The command, and what it has printed so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.errors = b""
        self.lines: list[bytes] = []
        self._readers = [asyncio.create_task(self._read_lines()), asyncio.create_task(self._read_errors())]

    async def _read_lines(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.lines.append(line)

    async def _read_errors(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.errors += line

    async def wait(self) -> int:
        """Its exit status; all it has printed has been read by then."""
        async with asyncio.timeout(60):
            await asyncio.gather(*self._readers)
            return await self.process.wait()

    async def watching(self, count: int = 1) -> None:
        await eventually(lambda: self.errors.count(b"watching http://") >= count)

    async def shown(self, count: int) -> list[Any]:
        """The first `count` lines, from JSON."""
        await eventually(lambda: len(self.lines) >= count)
        return [msgspec.json.decode(line) for line in self.lines]


@asynccontextmanager
async def running_tail(*arguments: str, **settings: str) -> AsyncIterator[RunningTail]:
    """`python -m gateway tail`, without servers in its environment: it asks gateways, and nobody else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")} | settings
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "tail", *arguments),
        cwd=ROOT,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    running = RunningTail(process)
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await running.wait()


async def test_it_shows_what_is_queued_and_takes_none_of_it(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    async with running_tail("--gateway", gateway.ops_url, "--json") as tail:
        await tail.watching()
        await gateway.send([gateway.message(to=f"+1415555{n:04}", body=f"Hello {n}") for n in range(50)])
        shown = await tail.shown(50)
        assert {line["outcome"] for line in shown} == {"queued"}
        assert {line["to"] for line in shown} == {"+1415*****" + f"{n:02}" for n in range(50)}
        printed = b"".join(tail.lines)
        assert b"Hello" not in printed
        assert gateway.list_number.encode() not in printed
        tail.process.send_signal(signal.SIGINT)
        assert await tail.wait() == 0
    payloads = await queue.take_payloads()
    assert [payload["id"] for payload in payloads] == [line["id"] for line in shown]


async def test_it_changes_no_outcome(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    """Above all not this one: the outbound queue is unbound while somebody watches. Nothing is counted."""
    async with running_tail("--gateway", gateway.ops_url, "--json") as tail:
        await tail.watching()
        settings = gateway.runtime.settings
        connection = await aio_pika.connect(settings.amqp_url)
        async with connection, connection.channel() as channel:
            outbound = await channel.get_queue(queue.name, ensure=False)
            await outbound.unbind(settings.amqp_exchange, routing_key=queue.name)
        message, bad = gateway.message(), gateway.message(to="bad")
        status, answer = await gateway.send([message, bad])
        assert (status, answer["code"]) == (503, "queue_unavailable")
        [line] = await tail.shown(1)
        assert line["outcome"] == "rejected"
    assert await queue.depth() == 0


async def test_a_queue_bound_beside_the_outbound_one_would_be_counted(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    """Why tail has none: to the broker a message is routed when any queue takes it. Once, this is what is wanted."""
    settings = gateway.runtime.settings
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        beside = await channel.declare_queue(exclusive=True)
        await beside.bind(settings.amqp_exchange, routing_key=queue.name)
        outbound = await channel.get_queue(queue.name, ensure=False)
        await outbound.unbind(settings.amqp_exchange, routing_key=queue.name)
        _, answer = await gateway.send([gateway.message()])
        assert answer["queued_count"] == 1
    assert await queue.depth() == 0


async def test_envelopes_shards_and_streams_are_shown_as_sms(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    settings = make_settings(messages_per_envelope=10, queue_shards=2, amqp_queue_type="stream")
    gateway = await start_gateway(settings)
    async with running_tail("--gateway", gateway.ops_url, "--json") as tail:
        await tail.watching()
        _, answer = await gateway.send([gateway.message()] * 25)
        assert answer["queued_count"] == 25
        assert [line["index"] for line in await tail.shown(25)] == list(range(25))
    for name in settings.queues():
        async with OutboundQueue(settings.amqp_url, name) as shard:
            await shard.delete()


async def test_it_ends_after_as_many_as_asked_for_and_shows_only_the_list_and_account_asked_for(
    gateway: GatewayUnderTest, queue: OutboundQueue, admin: Admin
) -> None:
    other = new_number()
    await admin.add_list(gateway.account_id, other)
    arguments = ("--gateway", gateway.ops_url, "--json", "--list-number", other, "--account", str(gateway.account_id))
    async with (
        running_tail(*arguments, "--limit", "3") as tail,
        running_tail("--gateway", gateway.ops_url, "--account", str(gateway.account_id + 1)) as of_nobody,
    ):
        await tail.watching()
        await of_nobody.watching()
        await gateway.send([gateway.message(list_number=other if n % 2 else gateway.list_number) for n in range(10)])
        assert await tail.wait() == 0
        assert [line["index"] for line in await tail.shown(3)] == [1, 3, 5]
        assert not of_nobody.lines
    await queue.take_all()


async def test_texts_are_shown_to_those_who_have_the_token(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    settings = make_settings(tail_token=TOKEN.replace(" ", "-"))
    gateway = await start_gateway(settings)
    body = "Grüße \U0001f389 \x1b[31mred\x07 \u202eback\nsecond line"
    arguments = ("--gateway", gateway.ops_url, "--show", "--limit", "1")
    async with running_tail(*arguments, GATEWAY_TAIL_TOKEN=settings.tail_token) as tail:
        await tail.watching()
        await gateway.send([gateway.message(body=body, to="+447911123412")])
        assert await tail.wait() == 0
        [line] = tail.lines
        text = line.decode()
        assert f"{gateway.list_number} → +447911123412" in text
        assert "Grüße \U0001f389 \\x1b[31mred\\x07 \\u202eback\\nsecond line" in text
        assert "queued" in text
    async with running_tail(*arguments, GATEWAY_TAIL_TOKEN="another-token-of-length") as tail:
        assert await tail.wait() == 2
        assert b"GATEWAY_TAIL_TOKEN" in tail.errors
        assert tail.errors.startswith(b"error: ")
        assert b"Traceback" not in tail.errors
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as outbound:
        await outbound.delete()


async def test_without_a_token_at_the_gateway_nobody_is_shown_texts(gateway: GatewayUnderTest) -> None:
    async with running_tail("--gateway", gateway.ops_url, "--show", GATEWAY_TAIL_TOKEN="any-token-of-length") as tail:
        assert await tail.wait() == 2
        assert b"this gateway has no GATEWAY_TAIL_TOKEN" in tail.errors


async def test_a_reader_that_closes_its_end_is_a_good_end(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    """As in `tail | head -1`."""
    process = await asyncio.create_subprocess_shell(
        f"{sys.executable} -m gateway tail --gateway {gateway.ops_url} | head -1; echo status ${{PIPESTATUS[0]}}",
        executable="/bin/bash",
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert (await process.stderr.readline()).startswith(b"watching ")
    ended = asyncio.create_task(process.communicate())
    async with asyncio.timeout(60):
        while not ended.done():
            await gateway.send([gateway.message()])  # it is told that nobody reads when it writes the next line
            await asyncio.sleep(0.05)
    output, errors = ended.result()
    assert b"queued" in output
    assert output.endswith(b"status 0\n")
    assert errors == b""


async def test_it_waits_for_a_gateway_and_finds_it_again(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers, admin: Admin
) -> None:
    name = f"test.{uuid.uuid4().hex[:12]}"
    process = Gateway(
        {
            **servers.environment(),
            "GATEWAY_AMQP_QUEUE": name,
            "GATEWAY_AMQP_EXCHANGE": name,
            "GATEWAY_DRAIN_DELAY_S": "0",
        }
    )
    try:
        async with running_tail("--gateway", f"127.0.0.1:{process.ops_port}", "--json") as tail:
            await eventually(lambda: b"cannot be reached" in tail.errors)
            for life in (1, 2):
                await asyncio.to_thread(process.start)
                await tail.watching(life)
                await asyncio.to_thread(process.stop)  # with a stream open: it ends, and does not hold the drain up
                assert b"has ended; trying again" in tail.errors
            tail.process.send_signal(signal.SIGTERM)
            assert await tail.wait() == 0
            assert b"Traceback" not in tail.errors
    finally:
        await asyncio.to_thread(process.close)
    assert await delete(servers, name)


async def delete(servers: Servers, name: str) -> bool:
    async with OutboundQueue(servers.amqp_url, name) as outbound:
        await outbound.delete()
    return True


class TwoWorkers(Gateway):
    """The gateway as two processes behind one operations listener."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--workers", "2"]


async def test_all_workers_are_watched_as_one(servers: Servers, admin: Admin) -> None:
    name = f"test.{uuid.uuid4().hex[:12]}"
    account_id = (await admin.create_account("watched"))["id"]
    key, number = (await admin.create_key(account_id))["key"], new_number()
    await admin.add_list(account_id, number)
    environment = {**servers.environment(), "GATEWAY_AMQP_QUEUE": name, "GATEWAY_AMQP_EXCHANGE": name}
    process = TwoWorkers(environment | {"GATEWAY_DRAIN_DELAY_S": "0"})

    async def send(index: int) -> None:
        message = {"to": "+14155551234", "list_number": number, "body": "Hello"}
        headers = {"X-Api-Key": key, "X-Request-Id": f"request-{index}"}
        async with (
            aiohttp.ClientSession() as session,
            session.post(f"{process.url}/api/v2/send/bulk", json={"messages": [message]}, headers=headers) as response,
        ):
            assert response.status == 200

    try:
        await asyncio.to_thread(process.start)
        async with running_tail("--gateway", process.ops_url, "--json") as tail:
            await tail.watching()
            first = 0
            while not tail.lines:  # until the relay has reached the workers
                await send(first)
                first += 1
                await asyncio.sleep(0.2)
            await asyncio.gather(*(send(index) for index in range(100, 140)))
            wanted = {f"request-{index}" for index in range(100, 140)}
            await eventually(lambda: sum(b'"request-1' in line for line in tail.lines) >= 40)
            shown = await tail.shown(40)
            assert wanted <= {line["request_id"] for line in shown}
            assert len({line["id"] for line in shown}) == len(shown)
            supervisor = psutil.Process(process._supervisor.pid if process._supervisor else 0).children()[0]
            os.kill(supervisor.pid, signal.SIGTERM)
            await eventually(lambda: not process.is_running, timeout=15)  # streams do not hold the drain up
    finally:
        await asyncio.to_thread(process.close)
    await delete(servers, name)


async def get(gateway: GatewayUnderTest, **query: str) -> tuple[int, Any]:
    async with gateway.session.get(f"{gateway.ops_url}/tail", params=query) as response:
        return response.status, await response.json()


async def test_what_cannot_be_watched_is_refused_with_a_reason(gateway: GatewayUnderTest) -> None:
    assert (await get(gateway, account="x"))[0] == 400
    assert (await get(gateway, account="9" * 30))[0] == 400
    assert (await get(gateway, list_number="18005551000"))[0] == 400
    assert (await get(gateway, whole="1"))[0] == 403
    streams = [await gateway.session.get(f"{gateway.ops_url}/tail") for _ in range(MOST_WATCHERS)]
    assert [stream.status for stream in streams] == [200] * MOST_WATCHERS
    assert await get(gateway) == (503, {"error": f"{MOST_WATCHERS} watch this gateway already. End another tail first"})
    for stream in streams:
        stream.close()


async def test_callers_cannot_watch(gateway: GatewayUnderTest) -> None:
    async with gateway.session.get(f"{gateway.api_url}/tail") as response:
        assert response.status == 404


async def test_a_wrong_address_is_one_clear_line() -> None:
    async with running_tail("--gateway", "http://[::1") as tail:
        assert await tail.wait() == 2
        assert b"is no URL of an operations listener" in tail.errors
        assert tail.errors.count(b"\n") == 1


async def test_something_else_on_that_port_is_named(gateway: GatewayUnderTest) -> None:
    async with running_tail("--gateway", gateway.api_url) as tail:
        assert await tail.wait() == 2
        assert b"error: " in tail.errors


async def test_by_default_it_asks_this_machine(gateway: GatewayUnderTest) -> None:
    port = Port()
    try:
        async with running_tail(GATEWAY_OPS_HOST="0.0.0.0", GATEWAY_OPS_PORT=str(port)) as tail:  # noqa: S104
            await eventually(lambda: f"http://127.0.0.1:{port} cannot be reached".encode() in tail.errors)
    finally:
        port.release()
