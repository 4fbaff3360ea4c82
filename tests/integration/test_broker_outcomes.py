"""Acks, nacks, returns, a closed channel and a lost connection of a real broker: counts are exact. Promises 1 to 3."""

import asyncio
from typing import Any

import aio_pika
import msgspec
import pytest

from gateway.amqp.confirms import ConfirmTracker
from gateway.cli import status
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue


async def test_the_queue_holds_exactly_what_was_counted(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    messages = [gateway.message(to=f"+1415555{n:04}" if n % 3 else "bad") for n in range(1000)]
    _, answer = await gateway.send(messages)
    taken = await queue.take_payloads()
    assert len(taken) == answer["queued_count"] == 666
    assert [payload["to"] for payload in taken] == [message["to"] for message in messages if message["to"] != "bad"]


async def test_the_broker_confirms_many_messages_at_once(
    gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    settlements = []
    settle = ConfirmTracker.settle

    def record(self: ConfirmTracker, *, acked: bool, delivery_tag: int, multiple: bool) -> object:
        settlements.append(multiple)
        return settle(self, acked=acked, delivery_tag=delivery_tag, multiple=multiple)

    monkeypatch.setattr(ConfirmTracker, "settle", record)
    _, answer = await gateway.send([gateway.message()] * 1000)
    assert answer["queued_count"] == 1000
    assert any(settlements)
    assert len(settlements) < 500


async def test_a_full_queue_refuses_and_only_what_it_took_is_counted(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    if servers.rabbitmq is None:
        pytest.skip("sets a policy: needs a RabbitMQ of its own")
    settings = make_settings()
    name, limit = settings.amqp_queue, '{"max-length": 20, "overflow": "reject-publish"}'
    await asyncio.to_thread(servers.rabbitmq.ctl, "set_policy", "--apply-to", "queues", name, f"^{name}$", limit)
    gateway = await start_gateway(settings)
    async with OutboundQueue(servers.amqp_url, name) as queue:
        _, answer = await gateway.send([gateway.message(body=str(n)) for n in range(1000)])
        assert 20 <= answer["queued_count"] < 1000
        rejected = {row["index"] for row in answer["errors"]}
        assert {row["code"] for row in answer["errors"]} == {"queue_rejected"}
        taken = await queue.take_payloads()
        assert {payload["index"] for payload in taken} == set(range(1000)) - rejected
        assert len(taken) == answer["queued_count"]
        await queue.delete()
    await asyncio.to_thread(servers.rabbitmq.ctl, "clear_policy", name)


UNSUITABLE: dict[str, dict[str, Any]] = {
    "not durable": {"durable": False, "arguments": {}},
    "classic": {"durable": True, "arguments": {}},
    "holds one": {"durable": True, "arguments": {"x-queue-type": "quorum", "x-max-length": 1}},
}


@pytest.mark.parametrize("kind", UNSUITABLE)
async def test_a_queue_that_would_lose_messages_is_not_accepted_by_a_check(
    start_gateway: StartGateway, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    settings = make_settings(amqp_topology="check")
    name, made = settings.amqp_queue, UNSUITABLE[kind]
    arguments = made["arguments"] | {"x-dead-letter-exchange": f"{settings.amqp_exchange}.dlx"}
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        exchange = await channel.declare_exchange(settings.amqp_exchange, durable=True)
        queue = await channel.declare_queue(name, durable=made["durable"], arguments=arguments)
        await queue.bind(exchange, routing_key=name)
        gateway = await start_gateway(settings, wait_until_ready=False)
        await eventually(lambda: "PRECONDITION_FAILED - inequivalent arg" in caplog.text, timeout=10)
        assert any("PRECONDITION_FAILED" in reason for reason in gateway.runtime.not_ready_reasons())
        found = await status.collect(settings, [], [])
        assert any("inequivalent arg" in problem for problem in found.problems)
        await channel.queue_delete(name)


async def test_after_the_limit_of_a_full_queue_is_lifted_messages_are_queued_again(
    servers: Servers, gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    if servers.rabbitmq is None:
        pytest.skip("sets a policy: needs a RabbitMQ of its own")
    ctl, limit = servers.rabbitmq.ctl, '{"max-length": 5, "overflow": "reject-publish"}'
    await asyncio.to_thread(ctl, "set_policy", "--apply-to", "queues", queue.name, f"^{queue.name}$", limit)
    async with asyncio.timeout(20):
        while (await gateway.post(gateway.caller.body(100)))[0] != 503:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    counted = await queue.depth()
    await asyncio.to_thread(ctl, "clear_policy", queue.name)
    async with asyncio.timeout(10):
        while (await gateway.post(gateway.caller.body()))[0] != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    assert await queue.depth() == counted + 1


async def test_what_cannot_be_routed_is_not_counted(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    settings = gateway.runtime.settings
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        exchange = await channel.get_exchange(settings.amqp_exchange)
        outbound = await channel.get_queue(settings.amqp_queue)
        await outbound.unbind(exchange, routing_key=settings.amqp_queue)
        status, answer, headers = await gateway.post(gateway.caller.body(100))
        assert (status, answer["code"]) == (503, "queue_unavailable")
        assert int(headers["Retry-After"]) > 0
        assert await queue.depth() == 0
        await outbound.bind(exchange, routing_key=settings.amqp_queue)
    _, answer = await gateway.send([gateway.message()] * 100)
    assert answer["queued_count"] == await queue.depth() == 100


async def test_a_queue_that_is_deleted_under_a_running_gateway_is_declared_again(
    gateway: GatewayUnderTest, queue: OutboundQueue, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        await queue.delete()
        status, answer, _ = await gateway.post(gateway.caller.body())
        assert (status, answer["code"]) == (503, "queue_unavailable")
        async with asyncio.timeout(10):
            while (await gateway.post(gateway.caller.body()))[0] != 200:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert await queue.depth() == 1
    assert caplog.text.count("could not route a message: no queue is bound") == 2


async def test_what_a_closed_channel_left_unknown_is_published_once_more(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """Without its exchange the broker closes the channel. The next connection declares it, and publishes again."""
    settings = make_settings(amqp_connections=1)
    gateway = await start_gateway(settings)
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.exchange_delete(settings.amqp_exchange)
    _, answer = await gateway.send([gateway.message()] * 1000)
    assert gateway.runtime.publisher.republished == 1000
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        assert answer["queued_count"] == await queue.depth() == 1000
        await queue.delete()


async def test_a_channel_that_stays_closed_leaves_the_outcome_unknown(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    declared = await start_gateway(make_settings())
    names = declared.runtime.settings
    settings = make_settings(
        amqp_exchange=names.amqp_exchange, amqp_queue=names.amqp_queue, amqp_topology="check", confirm_timeout_s=1.5
    )
    gateway = await start_gateway(settings)
    connection = await aio_pika.connect(servers.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.exchange_delete(settings.amqp_exchange)
        status, answer, _ = await gateway.post(gateway.caller.body())
        assert (status, answer["code"]) == (504, "outcome_unknown")
        await channel.queue_delete(settings.amqp_queue)


async def test_after_a_lost_connection_the_gateway_serves_on(
    servers: Servers, gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    for connection in list(gateway.runtime.publisher.connections.open):
        connection.abort()
    await eventually(lambda: not gateway.runtime.publisher.connections.is_usable())
    await eventually(gateway.runtime.publisher.connections.is_usable)
    _, answer = await gateway.send([gateway.message()] * 10)
    assert answer["queued_count"] == await queue.depth() == 10


@pytest.mark.parametrize("queue_type", ["quorum", "classic", "stream"])
async def test_every_queue_type_takes_what_is_counted(
    start_gateway: StartGateway, make_settings: MakeSettings, queue_type: str
) -> None:
    settings = make_settings(amqp_queue_type=queue_type)
    gateway = await start_gateway(settings)
    _, answer = await gateway.send([gateway.message()] * 1000)
    assert answer["queued_count"] == 1000
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        if queue_type == "stream":  # read from an offset, and never emptied
            await gateway.send([gateway.message(body="the last")])
            taken = await queue.read_stream(1001)
            assert b"the last" in taken[1000].body
        else:
            taken = await queue.take_all()
            assert len(taken) == 1000
        assert [msgspec.json.decode(message.body)["index"] for message in taken[:1000]] == list(range(1000))
        await queue.delete()
