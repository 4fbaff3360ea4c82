"""Depth, consumers and dead letters as metrics: from the real broker, and while it refuses, hangs or loses a queue."""

import asyncio
import re
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractIncomingMessage
from pamqp import commands
from pamqp.base import Frame
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway.amqp import depths
from gateway.amqp.connection import PublishConnection
from gateway.amqp.publisher import Publisher
from gateway.runtime import open_runtime
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.scripted_broker import Declare, ScriptedBroker, Session
from tests.support.tcp_proxy import TcpProxy

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have gateways in this process ask without a pause that a test would have to wait for."""
    monkeypatch.setattr(depths, "ASK_EVERY_S", 0.02)
    monkeypatch.setattr(depths, "REFUSED_FOR_S", 0.0)


async def depths_of(gateway: GatewayUnderTest) -> dict[str, float]:
    """Return the metrics of queues, such as {"messages outbound": 5, "unread": 1}."""
    async with gateway.session.get(f"{gateway.ops_url}/metrics") as response:
        families = list(parse(await response.text()))
    return {
        " ".join([re.sub("^gateway_queues?_", "", sample.name), *sample.labels.values()]): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("gateway_queue")
    }


async def until_shown(gateway: GatewayUnderTest, expected: dict[str, float]) -> None:
    """Return when the metrics of queues have these values, among others."""
    found: dict[str, float] = {}
    try:
        async with asyncio.timeout(20):
            while (found := await depths_of(gateway)).items() & expected.items() != expected.items():  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"{found} instead of {expected}") from None


async def publishes(gateway: GatewayUnderTest) -> bool:
    _, answer = await gateway.send([gateway.message()] * 3)
    return bool(answer["queued_count"] == 3)


async def delete_queues(gateway: GatewayUnderTest) -> None:
    settings = gateway.runtime.settings
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        for name in (*settings.queues(), f"{settings.amqp_queue}.dead"):
            await channel.queue_delete(name)


async def test_messages_consumers_and_dead_letters_are_shown(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await until_shown(gateway, {"messages outbound": 0, "unread": 0, "unknown outbound": 0, "unknown dead_letters": 0})
    await gateway.send([gateway.message()] * 5)
    await until_shown(gateway, {"messages outbound": 5, "consumers outbound": 0, "unread": 1})

    rejected = asyncio.Event()

    async def reject(message: AbstractIncomingMessage) -> None:
        await message.reject(requeue=False)
        rejected.set()

    connection = await aio_pika.connect(gateway.runtime.settings.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.set_qos(prefetch_count=1)
        await (await channel.get_queue(queue.name, ensure=False)).consume(reject)
        await rejected.wait()
        await until_shown(gateway, {"messages outbound": 0, "consumers outbound": 1, "unread": 0})
        await until_shown(gateway, {"messages dead_letters": 5, "consumers dead_letters": 0})
    await delete_queues(gateway)


async def test_one_shard_without_a_consumer_is_seen_among_others(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    settings = make_settings(queue_shards=3)
    gateway = await start_gateway(settings)
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        for name in settings.queues():
            await channel.default_exchange.publish(aio_pika.Message(b"x"), name)
        await until_shown(gateway, {"messages outbound": 3, "unread": 3})
        for name in settings.queues()[1:]:
            await (await channel.get_queue(name, ensure=False)).consume(AbstractIncomingMessage.ack)
        await until_shown(gateway, {"messages outbound": 1, "consumers outbound": 2, "unread": 1})
    await delete_queues(gateway)


async def test_a_stream_has_no_depth(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    gateway = await start_gateway(make_settings(amqp_queue_type="stream"))
    assert await publishes(gateway)
    await asyncio.sleep(0.1)
    assert await depths_of(gateway) == {"unread": 0, "unknown outbound": 0, "unknown dead_letters": 0}
    async with OutboundQueue(gateway.runtime.settings.amqp_url, gateway.runtime.settings.amqp_queue) as queue:
        await queue.delete()


async def test_a_missing_queue_is_unknown_and_costs_no_connection_and_no_message(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, connections = gateway.runtime.settings, gateway.runtime.publisher.connections
    await eventually(lambda: connections.connects == settings.amqp_connections)
    await until_shown(gateway, {"messages dead_letters": 0})
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.queue_delete(f"{settings.amqp_queue}.dead")
        await until_shown(gateway, {"messages outbound": 0, "unknown outbound": 0, "unknown dead_letters": 1})
        assert "messages dead_letters" not in await depths_of(gateway)

        # The numbers of channels that the broker has closed are free again: a connection has 2,047.
        (dead,) = [one for one in gateway.runtime.depths.all if one.kind == depths.DEAD_LETTERS]
        refuse, refusals = dead.refuse, 0

        def count(words: str) -> None:
            nonlocal refusals
            refusals += 1
            refuse(words)

        monkeypatch.setattr(dead, "refuse", count)
        monkeypatch.setattr(depths, "ASK_EVERY_S", 0.0)
        while refusals < 200:
            assert await publishes(gateway)
        assert connections.connects == settings.amqp_connections
        assert max(max(channels_of(one)) for one in connections.open) <= 3
        assert caplog.text.count("the depth of the queue") == 1
        assert "no queue" in caplog.text
    await delete_queues(gateway)


def channels_of(connection: PublishConnection) -> list[int]:
    """Return the numbers of the channels that the library considers open."""
    transport = connection._connection.transport if connection._connection else None
    return list(transport.connection.channels) if transport else []


async def test_a_queue_that_comes_back_is_shown_again(
    gateway: GatewayUnderTest, caplog: pytest.LogCaptureFixture
) -> None:
    settings = gateway.runtime.settings
    connection = await aio_pika.connect(settings.amqp_url)
    async with connection, connection.channel() as channel:
        await channel.queue_delete(f"{settings.amqp_queue}.dead")
        await until_shown(gateway, {"unknown dead_letters": 1})
        await channel.declare_queue(f"{settings.amqp_queue}.dead", durable=True)
        await until_shown(gateway, {"unknown dead_letters": 0, "messages dead_letters": 0})
    assert "shows the queue" in caplog.text
    await delete_queues(gateway)


async def test_a_queue_that_the_user_may_not_see_is_unknown_and_the_others_are_known(
    start_gateway: StartGateway, make_settings: MakeSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """RabbitMQ 4.2.6 and later refuse a passive declaration to users without a right to the queue."""

    def refuse(frame: Declare) -> tuple[int, str] | None:
        if _is_passive(frame) and str(getattr(frame, "queue", "")).endswith(".0"):
            return 403, "ACCESS_REFUSED - access to queue refused"
        return None

    async with ScriptedBroker() as broker:
        broker.on_declare = refuse
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, queue_shards=3))
        await until_shown(gateway, {"messages outbound": 0, "unknown outbound": 1, "unknown dead_letters": 0})
        await eventually(lambda: len([one for one in broker.topology if _is_passive(one)]) > 20)
        assert await publishes(gateway)
        assert caplog.text.count("ACCESS_REFUSED") == 1
        assert (len(broker.sessions), broker.violations) == (1, [])


async def test_a_broker_that_does_not_answer_gets_one_question_and_delays_nothing(
    start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "KNOWN_FOR_S", 0.2)
    asked: list[Frame] = []

    def stay_silent(_session: Session, _channel: int, frame: Frame) -> bool:
        if _is_passive(frame):
            asked.append(frame)
        return _is_passive(frame)

    async with ScriptedBroker() as broker:
        settings = make_settings(amqp_url=broker.url, amqp_connections=1)
        async with asyncio.timeout(20):
            gateway = await start_gateway(settings)
            await until_shown(gateway, {"messages outbound": 0, "unknown outbound": 0})
            broker.on_method = stay_silent
            await until_shown(gateway, {"unknown outbound": 1, "unknown dead_letters": 1})
            assert "messages outbound" not in await depths_of(gateway)
            assert await publishes(gateway)
            await asyncio.sleep(0.3)
            assert len(asked) == 1
            broker.sessions[0].abort()  # the question ends with its connection, and the next one has another
            await eventually(lambda: len(asked) == 2)
            assert await publishes(gateway)
        assert broker.violations == []

        async with asyncio.timeout(5):  # nor does it delay the end of a process
            async with open_runtime(settings) as runtime:
                await eventually(lambda: len(asked) == 3)
                assert runtime.publisher.is_usable()


async def test_a_broker_alarm_makes_the_depth_unknown_until_it_ends(
    start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "KNOWN_FOR_S", 0.2)
    async with ScriptedBroker() as broker:
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1))
        await until_shown(gateway, {"messages outbound": 0, "unknown outbound": 0})
        broker.sessions[0].blocked()
        await until_shown(gateway, {"unknown outbound": 1, "unknown dead_letters": 1})
        broker.sessions[0].unblocked()
        await until_shown(gateway, {"unknown outbound": 0, "unknown dead_letters": 0})
        assert (len(broker.sessions), broker.violations) == (1, [])


async def test_the_next_node_is_asked_when_one_is_lost(
    servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(depths, "KNOWN_FOR_S", 1.0)
    broker = urlsplit(servers.amqp_url)
    async with (
        TcpProxy(broker.hostname or "", broker.port or 0) as one,
        TcpProxy(broker.hostname or "", broker.port or 0) as other,
    ):
        nodes = ",".join(servers.amqp_url.replace(f":{broker.port}/", f":{proxy.port}/") for proxy in (one, other))
        gateway = await start_gateway(make_settings(amqp_url=nodes))
        await eventually(lambda: len(gateway.runtime.publisher.connections.open) == 2)
        assert await publishes(gateway)
        await until_shown(gateway, {"messages outbound": 3})
        for proxy in (one, other):
            proxy.refuse()
            proxy.reset()
            await asyncio.sleep(2 * depths.KNOWN_FOR_S)  # longer than an answer of the lost node counts
            await until_shown(gateway, {"unknown outbound": 0, "messages outbound": 3})
            proxy.pass_through()
            await eventually(lambda: len(gateway.runtime.publisher.connections.open) == 2)
        gateway_settings = gateway.runtime.settings
    connection = await aio_pika.connect(servers.amqp_url)
    async with connection, connection.channel() as channel:
        await delete_names(channel, gateway_settings.amqp_queue, f"{gateway_settings.amqp_queue}.dead")


async def delete_names(channel: AbstractChannel, *names: str) -> None:
    for name in names:
        await channel.queue_delete(name)


def _is_passive(frame: Any) -> bool:
    return isinstance(frame, commands.Queue.Declare) and bool(frame.passive)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("end", ["give_up", "close"])
async def test_nobody_asks_any_more_once_the_waits_for_a_connection_have_ended(
    make_settings: MakeSettings, end: str
) -> None:
    """At the end of a drain without a broker. It must not hold up the event loop by asking itself for ever."""
    settings = make_settings(amqp_url="amqp://127.0.0.1:1/")
    publisher = Publisher(settings)
    publisher.start()
    watching = asyncio.create_task(depths.QueueDepths(settings, publisher.connections).watch_for_ever())
    await asyncio.sleep(0.1)
    assert not watching.done()
    if end == "give_up":
        publisher.give_up()
        await asyncio.wait_for(watching, 5)
    await publisher.close()
    await asyncio.wait_for(watching, 5)
