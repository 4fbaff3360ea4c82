"""A channel on which the broker only nacks is replaced. Promise 9: service resumes after a fault, without a restart."""

import asyncio

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import connection as connection_module
from gateway.amqp import reconnection
from gateway.amqp.outgoing import Outgoing
from tests.support.eventually import eventually
from tests.support.publishing import ACKED, NACKED, UNKNOWN, connected, ids, payloads, publish, publish_batch
from tests.support.scripted_broker import Published, ScriptedBroker, Session

QUICK_S = 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "NACKED_S", QUICK_S)
    monkeypatch.setattr(connection_module, "SHARD_NACKED_S", QUICK_S)
    monkeypatch.setattr(reconnection, "WATCH_INTERVAL_S", 0.02)


def nacking(broker: ScriptedBroker, full: str) -> dict[int, object]:
    """Nack what is for the queue `full` on the channel that is open first. Return the channels, as they are used."""
    selected: dict[int, object] = {}  # by id; kept, so that no later channel gets the id of a closed one
    broker.mode = "silent"

    def answer(session: Session, message: Published) -> None:
        channel = session._channels[message.channel]
        selected[id(channel)] = channel
        is_first = len(selected) == 1
        settle = session.nack if is_first and message.routing_key == full else session.ack
        settle(message.delivery_tag, channel=message.channel)

    broker.on_publish = answer
    return selected


async def test_after_nothing_but_nacks_there_is_a_new_channel_on_the_same_connection(broker: ScriptedBroker) -> None:
    channels = nacking(broker, "sms.outbound")
    closed = []

    def note_closed(_session: Session, channel: int, method: Frame) -> bool:
        if isinstance(method, commands.Channel.Close):
            closed.append(channel)
        return False

    async with connected(broker.url) as publisher:
        broker.on_method = note_closed
        (first,) = publisher.connections.open
        assert list(await publish_batch(publisher, 3)) == [NACKED] * 3
        await eventually(lambda: first not in publisher.connections.open)
        assert list(await publish_batch(publisher, 3, "B")) == [ACKED] * 3
        await asyncio.sleep(4 * QUICK_S)
        assert list(await publish_batch(publisher, 3, "C")) == [ACKED] * 3
        assert (len(broker.sessions), len(channels)) == (1, 2)
        assert broker.published[0].channel in closed


async def test_a_channel_is_given_up_only_when_nothing_is_unconfirmed_on_it(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        (connection,) = publisher.connections.open
        connection.retire()
        assert not connection.is_usable()
        broker.sessions[0].ack(1, channel=broker.published[0].channel)
        assert list(await batch) == [ACKED]
        await eventually(lambda: publisher.connections.is_usable())
        assert connection not in publisher.connections.open


async def test_nacks_of_a_classic_queue_say_nothing(broker: ScriptedBroker) -> None:
    nacking(broker, "sms.outbound")
    async with connected(broker.url, amqp_queue_type="classic") as publisher:
        assert list(await publish_batch(publisher, 3)) == [UNKNOWN] * 3


async def test_acks_end_the_nacks_of_a_single_queue(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        (first,) = publisher.connections.open
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        with broker.sessions[0].together():
            broker.sessions[0].nack(1)
            broker.sessions[0].ack(2)
        assert list(await batch) == [NACKED, ACKED]
        await asyncio.sleep(4 * QUICK_S)
        assert publisher.connections.open == [first]


async def test_acks_of_one_shard_do_not_hide_the_nacks_of_another(broker: ScriptedBroker) -> None:
    channels = nacking(broker, "sms.outbound.1")
    async with connected(broker.url, queue_shards=2) as publisher:
        (first,) = publisher.connections.open
        for batch, expected in (("A", NACKED), ("B", NACKED), ("C", ACKED)):
            outgoing = Outgoing(ids(2, batch), payloads(2), [0, 1])
            assert list(await publisher.publish(outgoing)) == [ACKED, expected]
            if batch == "B":
                await eventually(lambda: first not in publisher.connections.open)
        assert (len(broker.sessions), len(channels)) == (1, 2)
