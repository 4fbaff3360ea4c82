"""Exchange, queue and dead letters are declared, or only checked."""

import asyncio
from typing import Any

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp.topology import describe_topology
from gateway.errors import QueueUnavailable
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    RETURNED,
    UNKNOWN,
    close_channel,
    connected,
    publish,
    settings_for,
    started,
    usable_connections,
)
from tests.support.scripted_broker import Declare, Published, ScriptedBroker, Session


def described(frame: Frame) -> tuple[Any, ...]:
    match frame:
        case commands.Exchange.Declare():
            assert frame.durable or frame.passive
            return ("check exchange" if frame.passive else "exchange", frame.exchange, frame.exchange_type)
        case commands.Queue.Declare():
            assert frame.durable or frame.passive
            assert (frame.exclusive, frame.auto_delete) == (False, False)
            return ("check queue" if frame.passive else "queue", frame.queue, frame.arguments or {})
        case commands.Queue.Bind():
            return ("bind", frame.queue, frame.exchange, frame.routing_key)
        case _:
            pytest.fail(f"{frame} was not asked for")


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_exchange_and_queue_are_declared_with_dead_letters_behind_them(
    broker: ScriptedBroker, queue_type: str
) -> None:
    async with connected(broker.url, amqp_exchange="ex", amqp_queue="q", amqp_queue_type=queue_type):
        pass
    assert list(map(described, broker.topology)) == [
        ("exchange", "ex", "direct"),
        ("exchange", "ex.dlx", "fanout"),
        ("queue", "q.dead", {"x-queue-type": queue_type}),
        ("bind", "q.dead", "ex.dlx", "q.dead"),  # a fanout exchange does not look at the key
        ("queue", "q", {"x-queue-type": queue_type, "x-dead-letter-exchange": "ex.dlx"}),
        ("bind", "q", "ex", "q"),
    ]


async def test_a_stream_has_no_dead_letters(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_exchange="ex", amqp_queue="q", amqp_queue_type="stream"):
        pass
    assert list(map(described, broker.topology)) == [
        ("exchange", "ex", "direct"),
        ("queue", "q", {"x-queue-type": "stream"}),
        ("bind", "q", "ex", "q"),
    ]


@pytest.mark.parametrize(
    "changes",
    [{}, {"amqp_queue_type": "classic", "queue_shards": 2}, {"queue_shards": 3}, {"amqp_queue_type": "stream"}],
    ids=str,
)
async def test_everything_that_is_declared_is_named(broker: ScriptedBroker, changes: dict[str, Any]) -> None:
    async with connected(broker.url, amqp_exchange="ex", amqp_queue="q", **changes):
        pass
    lines = describe_topology(settings_for(broker.url, amqp_exchange="ex", amqp_queue="q", **changes))
    exchanges = [frame for frame in broker.topology if isinstance(frame, commands.Exchange.Declare)]
    bound_to = {frame.queue: frame.exchange for frame in broker.topology if isinstance(frame, commands.Queue.Bind)}
    made = [f"exchange {frame.exchange} ({frame.exchange_type})" for frame in exchanges]
    for queue in (frame for frame in broker.topology if isinstance(frame, commands.Queue.Declare)):
        arguments: dict[str, Any] = dict(queue.arguments or {})
        dead_letters = arguments.get("x-dead-letter-exchange")
        made.append(
            f"queue {queue.queue} ({arguments['x-queue-type']}), bound to {bound_to[queue.queue]}"
            + (f", with dead letters to {dead_letters}" if dead_letters else "")
        )
    assert sorted(lines) == sorted(made)


async def test_where_topology_is_only_checked_what_exists_is_verified_and_nothing_made(broker: ScriptedBroker) -> None:
    """GATEWAY_AMQP_TOPOLOGY=check: the active declarations come only after the passive ones have found everything."""
    async with connected(broker.url, amqp_exchange="ex", amqp_queue="q", amqp_topology="check"):
        pass
    assert [described(frame)[:2] for frame in broker.topology] == [
        ("check exchange", "ex"),
        ("check queue", "q"),
        ("queue", "q"),
        ("exchange", "ex"),
    ]
    assert described(broker.topology[2])[2] == {"x-queue-type": "quorum", "x-dead-letter-exchange": "ex.dlx"}


async def test_without_the_right_to_configure_nacks_are_unknown_and_one_warning_says_so(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.on_declare = lambda declare: None if declare.passive else (403, f"ACCESS_REFUSED - access to {declare.name}")
    broker.on_publish = lambda session, message: session.nack(message.delivery_tag, channel=message.channel)
    async with connected(broker.url, amqp_connections=2, amqp_topology="check") as publisher:
        assert list(await publish(publisher, 1)) == [UNKNOWN]
        close_channel(broker.sessions[0])
        await eventually(lambda: usable_connections(publisher) == 2)
    assert caplog.text.count("not verified") == 1
    assert "ACCESS_REFUSED - access to Queue.Declare" in caplog.text


async def test_a_refusal_to_configure_is_no_loss_of_the_next_channel(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    """The library gives the number of a closed channel to the next one, on which the topology is verified."""
    broker.on_declare = lambda declare: None if declare.passive else (403, "ACCESS_REFUSED - access to the queue")
    async with connected(broker.url, amqp_topology="check") as publisher:
        (first,) = publisher.connections.open
        close_channel(broker.sessions[0])
        await first.wait_lost(timeout=5.0)
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]
    assert caplog.text.count("lost the channel") == 1
    assert first.close_reply.startswith("404")


async def test_a_queue_that_is_not_as_expected_is_not_accepted(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    text = "PRECONDITION_FAILED - inequivalent arg 'durable' for queue 'sms.outbound' in vhost '/'"
    broker.on_declare = lambda declare: None if declare.passive else (406, text)
    async with started(broker.url, amqp_topology="check") as publisher:
        await broker.wait_opened(2)
        assert not publisher.connections.has_connected
    assert text in caplog.text


async def test_a_queue_with_other_arguments_is_logged_and_tried_again(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(declare: Declare) -> tuple[int, str] | None:
        if isinstance(declare, commands.Queue.Declare) and declare.queue == "sms.outbound":
            return 406, "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'sms.outbound'"
        return None

    broker.on_declare = refuse
    async with started(broker.url) as publisher:
        await broker.wait_opened(3)
        assert not publisher.connections.is_usable()
        assert not publisher.connections.has_connected
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        broker.on_declare = None  # the operator has removed the old queue
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]
    assert "inequivalent arg 'x-queue-type'" in caplog.text
    assert "exists with other arguments" in caplog.text
    assert "A deleted queue loses its messages" in caplog.text
    assert "remove" not in caplog.text


@pytest.mark.parametrize("topology", ["declare", "check"])
async def test_unroutable_messages_are_warned_of_and_the_topology_declared_again(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture, topology: str
) -> None:
    def return_all(session: Session, message: Published) -> None:
        session.return_(message.delivery_tag, channel=message.channel)

    async with connected(broker.url, amqp_topology=topology) as publisher:
        asked = len(broker.topology)
        broker.on_publish = return_all
        for n in range(10):
            assert list(await publish(publisher, 1, str(n))) == [RETURNED]
            await asyncio.sleep(0.06)
        assert caplog.text.count("could not route a message") == 1, "at most once in some seconds"
        assert len(broker.topology) == asked * (2 if topology == "declare" else 1)
        assert ("no queue is bound. Run `python -m gateway declare`" in caplog.text) == (topology == "check")


async def test_a_missing_queue_is_logged_and_tried_again(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.on_declare = lambda declare: (404, "NOT_FOUND - no exchange 'sms.outbound' in vhost '/'")
    async with started(broker.url, amqp_topology="check") as publisher:
        await broker.wait_opened(2)
        assert not publisher.connections.is_usable()
        broker.on_declare = None
        await eventually(publisher.connections.is_usable)
    assert "no exchange 'sms.outbound'" in caplog.text
