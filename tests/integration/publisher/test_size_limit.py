"""A payload above the broker's max_message_size costs only itself. Promises 2, 3, 4 and 10.

RabbitMQ closes the channel with 406, and with it everything that is unconfirmed there.
"""

import asyncio

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import connection as connection_module
from gateway.amqp import publisher as publisher_module
from gateway.amqp.confirms import Outcome
from gateway.errors import QueueUnavailable
from tests.support.eventually import eventually
from tests.support.publishing import ACKED, connected, ids, ids_of, is_idle, publish, publish_batch
from tests.support.scripted_broker import Published, ScriptedBroker, Session

LIMIT = 100
LARGE = b"x" * (LIMIT + 1)
TOO_LARGE = Outcome.TOO_LARGE


@pytest.fixture
def limited(broker: ScriptedBroker) -> ScriptedBroker:
    """Return a broker with a limit: it ignores what follows on the channel, as RabbitMQ does."""
    refused: set[tuple[int, int]] = set()
    broker.mode = "silent"

    def refuse_large(session: Session, message: Published) -> None:
        if len(message.body) > LIMIT:
            text = f"PRECONDITION_FAILED - message size {len(message.body)} is larger than configured max size {LIMIT}"
            session.close_channel(406, text)
            refused.add((message.connection, message.channel))
        elif message.properties.message_id != "B0000001":
            session.ack(message.delivery_tag)

    broker.on_publish = refuse_large
    return broker


async def test_only_the_large_one_is_refused_and_the_others_are_queued(limited: ScriptedBroker) -> None:
    async with connected(limited.url) as publisher:
        outcomes = await publish_batch(publisher, [b"before", LARGE, b"after"])
        assert list(outcomes) == [ACKED, TOO_LARGE, ACKED]
        assert ids_of(limited.published) == [*ids(2), ids(3)[2]], "the third was ignored, and published again"
        assert is_idle(publisher)
        assert len(limited.sessions) == 1, "a new channel costs no new connection"


async def test_once_the_limit_is_known_nothing_larger_is_written(limited: ScriptedBroker) -> None:
    async with connected(limited.url) as publisher:
        assert list(await publish_batch(publisher, [LARGE])) == [TOO_LARGE]
        assert publisher.max_payload_bytes == LIMIT
        outcomes = await publish_batch(publisher, [LARGE, b"x" * LIMIT, LARGE], "C")
        assert list(outcomes) == [TOO_LARGE, ACKED, TOO_LARGE]
        assert list(await publish_batch(publisher, [LARGE] * 2, "D")) == [TOO_LARGE] * 2
        assert ids_of(limited.published)[1:] == [ids(2, "C")[1]]
        assert publisher.outcomes[TOO_LARGE] == 5


async def test_another_batch_on_the_channel_is_published_again_as_often_as_it_takes(limited: ScriptedBroker) -> None:
    """The innocent batch loses its channel on both connections, before the limit is known."""
    async with connected(limited.url, amqp_connections=2) as publisher:
        innocent = publish(publisher, 1, "B")
        await limited.wait_published(1)
        first, second = publisher.connections.open
        large = publish(publisher, [LARGE], "L")  # on the same connection
        await limited.wait_published(3)  # the innocent one again, on the other connection
        assert list(await large) == [TOO_LARGE]
        session = limited.sessions[limited.published[2].connection]
        session.close_channel(406, f"PRECONDITION_FAILED - message size 200 is larger than configured max size {LIMIT}")
        await limited.wait_published(4)
        last = limited.published[3]
        limited.sessions[last.connection].ack(last.delivery_tag, channel=last.channel)
        assert list(await innocent) == [ACKED]
        assert ids_of(limited.published) == [*ids(1, "B"), *ids(1, "L"), *ids(1, "B") * 2]
        assert first is not second


async def test_large_ones_that_wait_for_room_close_no_further_channel(
    limited: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit becomes known while they wait. Each channel that closes costs every other batch on it."""
    monkeypatch.setattr(connection_module, "SOCKET_BYTES", 1)
    async with connected(limited.url) as publisher:
        first = publish(publisher, 1, "B")
        await limited.wait_published(1)
        large = [publish(publisher, [LARGE], name) for name in "LMN"]
        mixed = publish(publisher, [LARGE, b"small"], "O")
        await asyncio.sleep(0)
        limited.sessions[0].ack(1)
        assert list(await first) == [ACKED]
        assert [list(await one) for one in large] == [[TOO_LARGE]] * 3
        assert list(await mixed) == [TOO_LARGE, ACKED]
        assert ids_of(limited.published) == [*ids(1, "B"), *ids(1, "L"), ids(2, "O")[1]]
        assert is_idle(publisher)


async def test_a_second_copy_that_waits_when_its_channel_is_closed_is_written_to_the_next(
    limited: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "SOCKET_BYTES", 200)
    reply = f"PRECONDITION_FAILED - message size 200 is larger than configured max size {LIMIT}"
    async with connected(limited.url) as publisher:
        limited.on_publish = None
        batches = [publish(publisher, 1, name) for name in "BC"]
        await limited.wait_published(2)
        monkeypatch.setattr(connection_module, "SOCKET_BYTES", 1)
        limited.sessions[0].close_channel(406, reply)
        await limited.wait_published(3)
        assert publisher.unconfirmed_messages == 2, "the second copy of C waits"
        limited.mode = "ack"
        last = limited.published[2]
        limited.sessions[last.connection].close_channel(406, reply, channel=last.channel)
        assert [list(await batch) for batch in batches] == [[ACKED]] * 2
        assert ids_of(limited.published) == [*ids(1, "B"), *ids(1, "C"), *ids(1, "B") * 2, *ids(1, "C")]
        assert is_idle(publisher)


async def test_while_the_channel_is_reopened_batches_wait(limited: ScriptedBroker) -> None:
    held: list[tuple[Session, int]] = []

    def hold(session: Session, channel: int, frame: Frame) -> bool:
        if isinstance(frame, commands.Confirm.Select):
            held.append((session, channel))
        return bool(held)

    async with connected(limited.url) as publisher:
        limited.on_method = hold
        large = publish(publisher, [LARGE])
        await limited.wait_until(lambda: bool(held))
        assert not publisher.connections.is_usable()
        assert publisher.is_usable()
        waiting = publish(publisher, 1, "C")
        await asyncio.sleep(0.05)
        limited.on_method = None
        session, channel = held[0]
        session._channels[channel].confirming = True
        session.send(channel, commands.Confirm.SelectOk())
        assert list(await waiting) == [ACKED]
        assert list(await large) == [TOO_LARGE]


async def test_a_batch_waits_only_briefly_for_a_channel_that_does_not_open(
    limited: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publisher_module, "REOPEN_S", 0.05)
    async with connected(limited.url) as publisher:
        limited.on_method = lambda _session, _channel, frame: isinstance(frame, commands.Confirm.Select)
        large = publish(publisher, [LARGE])
        await eventually(publisher.connections.is_reopening)
        async with asyncio.timeout(5.0):
            with pytest.raises(QueueUnavailable):
                await publish_batch(publisher, 1, "C")
    assert list(await large) == [TOO_LARGE]


async def test_the_limit_is_forgotten_with_its_connection(limited: ScriptedBroker) -> None:
    """A broker's limit changes with its restart."""
    async with connected(limited.url) as publisher:
        await publish_batch(publisher, [LARGE])
        limited.sessions[0].drop()
        await limited.wait_opened(2)
        await eventually(publisher.connections.is_usable)
        assert publisher.max_payload_bytes is None
