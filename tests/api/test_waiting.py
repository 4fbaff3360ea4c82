"""A request waits for room before its body is read, and accounts take turns (docs/decisions, 0030)."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from urllib.parse import urlsplit

import msgspec
import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import publisher
from gateway.cli.admin import open_admin
from gateway.ingest.admission import Slot
from gateway.ingest.pipeline import SendRequest
from gateway.ingest.wire import MAX_BODY_BYTES
from gateway.telemetry.counters import READ
from gateway.telemetry.requests import RequestRecord
from tests.support.callers import Caller, make_caller
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.raw_http import connect
from tests.support.scripted_broker import ScriptedBroker, Session

FULL = 1_000  # messages in the window of these tests


@asynccontextmanager
async def gateway_with_a_full_window(
    start_gateway: StartGateway, make_settings: MakeSettings, **changes: object
) -> AsyncIterator[tuple[GatewayUnderTest, ScriptedBroker, "asyncio.Task[tuple[int, object]]"]]:
    """Yield a gateway, its broker, which has not confirmed FULL messages, and the request that sent them."""
    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, max_unconfirmed_messages=FULL, **changes)
        gateway = await start_gateway(settings)
        broker.mode = "silent"
        first = asyncio.create_task(gateway.send([gateway.message()] * FULL))
        await broker.wait_published(FULL)
        try:
            yield gateway, broker, first
        finally:
            if not first.done():  # otherwise the gateway would wait for it at its end
                confirm(broker)
            await asyncio.gather(first, return_exceptions=True)


def confirm(broker: ScriptedBroker) -> None:
    """Confirm all that has been published."""
    broker.sessions[0].ack(len(broker.published), multiple=True)


async def test_a_request_without_room_waits_before_its_body_is_read(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings) as (gateway, broker, first):
        admission, body = gateway.runtime.admission, gateway.caller.body()
        async with connect(gateway.url) as conversation:
            head = f"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: {gateway.caller.key}\r\n"
            await conversation.send(f"{head}Content-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n".encode())
            await eventually(lambda: admission.waiting == 1)
            assert admission.reserved_bytes == len(gateway.caller.body(FULL)), "the first body's alone"
            confirm(broker)
            await eventually(lambda: admission.waiting == 0)
            await conversation.send(body)
            await broker.wait_published(FULL + 1)
            confirm(broker)
            answer = await conversation.read_answer()
        assert answer.raw.startswith(b"HTTP/1.1 100 Continue\r\n")
        assert (answer.status, answer.json()["queued_count"]) == (200, 1)
        assert (await first)[0] == 200
        assert not admission.shed


async def test_after_half_the_deadline_a_request_is_refused(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings, confirm_timeout_s=2.0) as (gateway, broker, _):
        status, answer, headers = await gateway.post(gateway.caller.body())
        assert (status, answer["code"]) == (503, "overloaded")
        assert int(headers["Retry-After"]) > 0
        assert gateway.runtime.admission.shed == {"confirm_window": 1}
        assert len(broker.published) == FULL


async def test_a_wait_takes_its_time_from_the_deadline(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter, pipeline, loop = Slot.enter, gateway.runtime.pipeline, asyncio.get_running_loop()
    run, left_s = pipeline.run, list[float]()

    async def enter_late(slot: Slot, account_id: int, size: int, key: str) -> None:
        await enter(slot, account_id, size, key)
        slot.waited_s = 3.0

    async def note_deadline(received: SendRequest, record: RequestRecord) -> bytes:
        left_s.append(received.deadline - loop.time())
        return await run(received, record)

    monkeypatch.setattr(Slot, "enter", enter_late)
    monkeypatch.setattr(pipeline, "run", note_deadline)
    assert (await gateway.send([gateway.message()]))[0] == 200
    assert left_s[0] <= gateway.runtime.settings.confirm_timeout_s - 3.0


async def test_another_accounts_request_is_next_however_many_wait(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings) as (gateway, broker, first):
        admission = gateway.runtime.admission
        async with open_admin(gateway.runtime.settings.database_url) as admin:
            other = await make_caller(admin)
        crowd = [asyncio.create_task(gateway.post(gateway.caller.body(FULL))) for _ in range(20)]
        await eventually(lambda: admission.waiting == len(crowd))
        confirm(broker)
        await broker.wait_published(2 * FULL)
        late = asyncio.create_task(post_as(gateway, other))
        await eventually(lambda: admission.waiting == len(crowd))
        confirm(broker)
        await broker.wait_published(2 * FULL + 1)
        broker.mode = "ack"
        confirm(broker)
        assert await late == 200
        assert (await first)[0] == 200
        assert [status for status, _, _ in await asyncio.gather(*crowd)] == [200] * len(crowd)
        assert msgspec.json.decode(broker.published[2 * FULL].body)["account_id"] == other.account_id


async def test_large_bodies_of_one_account_leave_bytes_for_another(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(max_bytes_in_flight=3 * MAX_BODY_BYTES))
    admission = gateway.runtime.admission
    async with open_admin(gateway.runtime.settings.database_url) as admin:
        other = await make_caller(admin)
    head = f"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: {gateway.caller.key}\r\n"
    chunked = f"{head}Transfer-Encoding: chunked\r\n\r\n".encode()  # counts as the largest body
    async with AsyncExitStack() as conversations:
        for _ in range(3):
            await (await conversations.enter_async_context(connect(gateway.url))).send(chunked)
        await eventually(lambda: admission.requests_of[gateway.caller.account_id] == 3)
        assert (admission.reserved_bytes, admission.waiting) == (2 * MAX_BODY_BYTES, 1)
        assert await post_as(gateway, other) == 200
        assert admission.waiting == 1


async def post_as(gateway: GatewayUnderTest, caller: Caller) -> int:
    """Send one message as this caller and return the status."""
    async with gateway.session.post(gateway.url, data=caller.body(), headers=caller.headers) as response:
        return response.status


@pytest.mark.parametrize("has_reset", [True, False], ids=["reset", "end within the body"])
async def test_a_request_whose_connection_is_lost_waits_no_longer(
    start_gateway: StartGateway, make_settings: MakeSettings, *, has_reset: bool
) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings, confirm_timeout_s=60) as (gateway, broker, _):
        admission, body = gateway.runtime.admission, gateway.caller.body()
        head = f"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: {gateway.caller.key}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection((urlsplit(gateway.url).hostname, urlsplit(gateway.url).port)) as caller:
            if has_reset:
                caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            caller.sendall(request if has_reset else request[:-1])
            await eventually(lambda: admission.waiting == 1)
        await eventually(lambda: admission.requests == 1, timeout=15)  # the wait would end after 30 s
        assert admission.waiting == 0
        assert len(broker.published) == FULL


async def test_a_broker_alarm_ends_the_wait(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings, confirm_timeout_s=60) as (gateway, broker, _):
        request = asyncio.create_task(gateway.post(gateway.caller.body()))
        await eventually(lambda: gateway.runtime.admission.waiting == 1)
        broker.sessions[0].blocked()
        status, answer, _ = await request
        assert (status, answer["code"]) == (503, "queue_unavailable")


async def test_while_a_channel_is_reopened_requests_wait_for_room_on_the_next_one(
    start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all would be let in at once, and refused at once when the channel is open."""
    monkeypatch.setattr(publisher, "REOPEN_S", 10.0)  # the machine may be busy
    held: list[tuple[Session, int]] = []

    def hold(session: Session, channel: int, frame: Frame) -> bool:
        if isinstance(frame, commands.Confirm.Select):
            held.append((session, channel))
        return bool(held)

    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1, max_unconfirmed_messages=FULL)
        gateway = await start_gateway(settings)
        broker.on_method = hold
        broker.sessions[0].close_channel(404, "NOT_FOUND - no exchange")
        await broker.wait_until(lambda: bool(held))
        requests = [asyncio.create_task(gateway.send([gateway.message()] * FULL)) for _ in range(3)]
        # The first will fill the window.
        await eventually(lambda: gateway.runtime.publisher.room() == 0 and gateway.runtime.admission.waiting == 2)
        broker.on_method = None
        session, channel = held[0]
        session._channels[channel].confirming = True
        session.send(channel, commands.Confirm.SelectOk())
        answers = await asyncio.gather(*requests)
        assert [(status, answer.get("queued_count")) for status, answer in answers] == [(200, FULL)] * 3


async def test_a_batch_whose_body_was_slow_waits_for_room_with_its_body(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        gateway = await start_gateway(
            make_settings(amqp_url=broker.url, amqp_connections=1, max_unconfirmed_messages=FULL)
        )
        admission, body = gateway.runtime.admission, gateway.caller.body()
        async with connect(gateway.url) as slow:
            head = f"POST /api/v2/send/bulk HTTP/1.1\r\nHost: x\r\nX-Api-Key: {gateway.caller.key}\r\n"
            await slow.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body[:-1])
            await eventually(lambda: admission.reserved_bytes > 0)
            full = asyncio.create_task(gateway.send([gateway.message()] * FULL))
            await broker.wait_published(FULL)
            await slow.send(body[-1:])
            await eventually(lambda: admission.waiting == 1)
            confirm(broker)
            await broker.wait_published(FULL + 1)
            confirm(broker)
            assert (await slow.read_answer()).status == 200
        assert (await full)[0] == 200
        assert sum(gateway.runtime.counters.stages_s[READ].counts) > 0


async def test_an_account_beyond_its_share_is_refused_without_a_query(
    start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway_with_a_full_window(start_gateway, make_settings, max_requests_in_flight=4) as (
        gateway,
        broker,
        first,
    ):
        queries = 0
        find_account = gateway.runtime.queries.find_account

        async def counted(key_sha256: bytes, numbers: Sequence[str]) -> object:
            nonlocal queries
            queries += 1
            return await find_account(key_sha256, numbers)

        monkeypatch.setattr(gateway.runtime.queries, "find_account", counted)
        waiting = [asyncio.create_task(gateway.post(gateway.caller.body())) for _ in range(2)]
        await eventually(lambda: gateway.runtime.admission.waiting == 2)
        for _ in range(5):
            status, answer, headers = await gateway.post(b"no JSON, and never read")
            assert (status, answer["code"]) == (503, "overloaded")
            assert int(headers["Retry-After"]) > 0
        assert queries == 2 + 1
        broker.mode = "ack"
        confirm(broker)
        assert [status for status, _, _ in await asyncio.gather(*waiting)] == [200, 200]
        assert (await first)[0] == 200
        assert (await gateway.send([gateway.message()]))[0] == 200
