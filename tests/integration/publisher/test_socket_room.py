"""Batches wait in the gateway, not on the broker's socket."""

import asyncio

import pytest

from gateway.amqp.connection import SOCKET_BYTES
from gateway.amqp.publisher import Publisher
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    UNKNOWN,
    connected,
    ids,
    ids_of,
    is_idle,
    publish,
    transport_of,
    usable_connections,
)
from tests.support.scripted_broker import ScriptedBroker

BATCH = [b"x" * 1_000] * 100
FRAMES = 200  # bytes of a message's frames, at most
BATCHES = 20
NAMES = [chr(ord("A") + n) for n in range(BATCHES)]


def publish_all(publisher: Publisher) -> "list[asyncio.Task[bytes]]":
    return [publish(publisher, BATCH, name) for name in NAMES]


def acked(outcomes: list[bytes]) -> list[str]:
    """Return the ids of the messages that count as queued."""
    return [
        message_id
        for name, batch in zip(NAMES, outcomes, strict=True)
        for message_id, outcome in zip(ids(len(BATCH), name), batch, strict=True)
        if outcome == ACKED
    ]


def sent(broker: ScriptedBroker) -> int:
    return sum(len(message.body) for message in broker.published)


async def settle_down(broker: ScriptedBroker) -> None:
    """Wait until the broker gets nothing more."""
    before = -1
    while before != len(broker.published):
        before = len(broker.published)
        await asyncio.sleep(0.1)


async def test_a_broker_that_confirms_nothing_gets_no_more_than_fits_its_socket(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        assert SOCKET_BYTES * 0.8 < sent(broker) < SOCKET_BYTES + len(BATCH) * (1_000 + FRAMES)
        assert publisher.unconfirmed_messages == BATCHES * len(BATCH)
        session = await broker.wait_opened(1)
        while not all(batch.done() for batch in batches):
            on_socket = sent(broker)
            session.ack(len(broker.published), multiple=True)
            await settle_down(broker)
            assert sent(broker) - on_socket < SOCKET_BYTES + len(BATCH) * (1_000 + FRAMES)
        assert acked([batch.result() for batch in batches]) == ids_of(broker.published)
        assert len(broker.published) == BATCHES * len(BATCH)
        assert is_idle(publisher)


async def test_a_batch_larger_than_the_socket_is_written_at_once(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, [b"x" * 10_000] * 200)
        await broker.wait_published(200)
        (await broker.wait_opened(1)).ack(200, multiple=True)
        assert list(await batch) == [ACKED] * 200


async def test_what_waited_when_its_connection_was_lost_is_published_on_the_next(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        on_socket = len(broker.published)
        assert on_socket < BATCHES * len(BATCH)
        broker.mode = "ack"
        (await broker.wait_opened(1)).abort()
        async with asyncio.timeout(8):
            outcomes = [await batch for batch in batches]
        assert {outcome for one in outcomes for outcome in one} <= {ACKED, UNKNOWN}
        await eventually(lambda: usable_connections(publisher) == 1)
        assert list(await publish(publisher, BATCH, "Z")) == [ACKED] * len(BATCH)
        assert is_idle(publisher)
    assert set(acked(outcomes)) <= set(ids_of(broker.published[on_socket:]))


async def test_a_waiting_batch_that_cannot_be_written_shifts_no_confirm(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the ack of the batch behind it would count for it."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        on_socket = len(broker.published)
        (connection,) = publisher.connections.open

        def fail(data: bytes) -> None:
            raise ConnectionResetError

        monkeypatch.setattr(transport_of(connection), "write", fail)
        broker.mode = "ack"
        (await broker.wait_opened(1)).ack(on_socket, multiple=True)
        async with asyncio.timeout(8):
            outcomes = [await batch for batch in batches]
        assert connection.is_lost
        assert set(acked(outcomes)) <= set(ids_of(broker.published))
        assert acked(outcomes)[:on_socket] == ids_of(broker.published[:on_socket])
