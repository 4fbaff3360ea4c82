"""A channel on which the broker only nacks is replaced. Promise 9: service resumes after a fault, without a restart."""

import asyncio

import pytest

from gateway.amqp import connection as connection_module
from gateway.amqp import reconnection
from gateway.amqp.outgoing import Outgoing
from tests.support.publishing import ACKED, NACKED, connected, ids, payloads, publish_batch
from tests.support.scripted_broker import Published, ScriptedBroker, Session

QUICK_S = 0.05


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "NACKED_S", QUICK_S)
    monkeypatch.setattr(connection_module, "SHARD_NACKED_S", QUICK_S)
    monkeypatch.setattr(reconnection, "WATCH_INTERVAL_S", 0.02)


def nacking(broker: ScriptedBroker, full: str) -> set[int]:
    """Nack what is for the queue `full` on the channel that is open first. Return the channels, as they are used."""
    selected = set[int]()
    broker.mode = "silent"

    def answer(session: Session, message: Published) -> None:
        selected.add(id(session._channels[message.channel]))
        is_first = len(selected) == 1
        settle = session.nack if is_first and message.routing_key == full else session.ack
        settle(message.delivery_tag, channel=message.channel)

    broker.on_publish = answer
    return selected


async def test_after_nothing_but_nacks_there_is_a_new_channel_on_the_same_connection(broker: ScriptedBroker) -> None:
    channels = nacking(broker, "sms.outbound")
    async with connected(broker.url) as publisher:
        assert list(await publish_batch(publisher, 3)) == [NACKED] * 3
        await asyncio.sleep(4 * QUICK_S)
        assert list(await publish_batch(publisher, 3, "B")) == [ACKED] * 3
        await asyncio.sleep(4 * QUICK_S)
        assert list(await publish_batch(publisher, 3, "C")) == [ACKED] * 3
        assert (len(broker.sessions), len(channels)) == (1, 2)


async def test_acks_of_one_shard_do_not_hide_the_nacks_of_another(broker: ScriptedBroker) -> None:
    channels = nacking(broker, "sms.outbound.1")
    async with connected(broker.url, queue_shards=2) as publisher:
        for batch, expected in (("A", NACKED), ("B", NACKED), ("C", ACKED)):
            outgoing = Outgoing(ids(2, batch), payloads(2), [0, 1])
            assert list(await publisher.publish(outgoing)) == [ACKED, expected]
            if batch == "B":
                await asyncio.sleep(4 * QUICK_S)
        assert (len(broker.sessions), len(channels)) == (1, 2)
