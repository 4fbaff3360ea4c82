"""Batches wait in the gateway, not on the broker's socket."""

import asyncio
from collections import Counter

import pytest
from pamqp import commands

from gateway.amqp import connection as connection_module
from gateway.amqp.connection import SOCKET_BYTES, PublishConnection
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.publisher import Publisher
from gateway.errors import QueueUnavailable
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
    two_brokers,
    usable_connections,
)
from tests.support.scripted_broker import ScriptedBroker

BATCH = [b"x" * 1_000] * 100
FRAMES = 200  # bytes of a message's frames, at most
BATCHES = 20
NAMES = [chr(ord("A") + n) for n in range(BATCHES)]


def publish_all(publisher: Publisher) -> "list[asyncio.Task[bytes]]":
    return [publish(publisher, BATCH, name) for name in NAMES]


def start_on(connection: PublishConnection, batch: str, messages: int, *, within_s: float) -> "asyncio.Task[bytes]":
    """Publish messages of 1,000 bytes on this connection, in a task. 600 of them fill its socket."""
    deadline = asyncio.get_running_loop().time() + within_s
    return asyncio.create_task(connection.publish(Outgoing(ids(messages, batch), BATCH[:1] * messages), deadline))


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


async def test_a_large_batch_makes_room_as_its_messages_are_confirmed(broker: ScriptedBroker) -> None:
    """If the next one waited for its last confirm, the broker would have nothing to read in between."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = [publish(publisher, [b"x" * 10_000] * 200, name) for name in "ABC"]
        await settle_down(broker)
        assert len(broker.published) == 200
        session = await broker.wait_opened(1)
        session.ack(120, multiple=True)
        await settle_down(broker)
        assert len(broker.published) == 200, "80 messages are still more than fits"
        session.ack(160, multiple=True)
        await broker.wait_published(400)
        await settle_down(broker)
        assert len(broker.published) == 400
        session.ack(200, multiple=True)
        await settle_down(broker)
        assert len(broker.published) == 400
        broker.mode = "ack"
        session.ack(400, multiple=True)
        assert b"".join([await batch for batch in batches]).count(ACKED) == 600
        assert is_idle(publisher)


async def test_what_waited_when_its_connection_was_lost_is_published_once_on_the_next(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = ids_of(broker.published)
        broker.mode = "ack"
        (await broker.wait_opened(1)).abort()
        async with asyncio.timeout(8):
            assert len(acked([await batch for batch in batches])) == BATCHES * len(BATCH)
        assert publisher.republished == len(written), "only what was written is published again"
        assert is_idle(publisher)
    assert Counter(ids_of(broker.published)) == Counter(
        [*written, *(name for n in NAMES for name in ids(len(BATCH), n))]
    )


async def test_what_waits_at_its_deadline_was_certainly_not_queued(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=1) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = len(broker.published)
        answers = await asyncio.gather(*batches, return_exceptions=True)
        unknown = [answer for answer in answers if isinstance(answer, bytes)]
        assert [set(outcomes) for outcomes in unknown] == [{UNKNOWN}] * (written // len(BATCH))
        assert {type(answer) for answer in answers[len(unknown) :]} == {QueueUnavailable}
        session = await broker.wait_opened(1)
        session.ack(written, multiple=True)
        await settle_down(broker)
        assert len(broker.published) == written, "nothing is written after its caller was told"
        assert is_idle(publisher)


async def test_an_ack_counts_for_nothing_that_is_not_written(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=1) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = len(broker.published)
        session = await broker.wait_opened(1)
        session.send(1, commands.Basic.Ack(delivery_tag=BATCHES * len(BATCH), multiple=True))
        answers = await asyncio.gather(*batches, return_exceptions=True)
        assert b"".join(answer for answer in answers if isinstance(answer, bytes)).count(ACKED) == 0
        assert len(broker.published) == written


async def test_the_end_of_a_drain_refuses_what_waits(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = len(broker.published) // len(BATCH)
        publisher.give_up()
        answers = await asyncio.gather(*batches, return_exceptions=True)
    assert [set(answer) for answer in answers[:written] if isinstance(answer, bytes)] == [{UNKNOWN}] * written
    assert {type(answer) for answer in answers[written:]} == {QueueUnavailable}


async def test_the_end_of_a_drain_refuses_what_waits_during_an_alarm(broker: ScriptedBroker) -> None:
    """If it waited for another connection then, its caller would get no answer."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        broker.sessions[0].blocked()
        await eventually(lambda: usable_connections(publisher) == 0)
        publisher.give_up()
        async with asyncio.timeout(2):
            answers = await asyncio.gather(*batches, return_exceptions=True)
    assert {type(answer) for answer in answers} == {bytes, QueueUnavailable}


async def test_the_end_of_a_drain_ends_the_waits_for_another_connection(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        broker.refuse_connections = True
        broker.sessions[0].drop()
        await eventually(lambda: is_idle(publisher))
        assert not any(batch.done() for batch in batches)
        publisher.give_up()
        async with asyncio.timeout(2):
            answers = await asyncio.gather(*batches, return_exceptions=True)
    unknown = [answer for answer in answers if isinstance(answer, bytes)]
    assert {type(answer) for answer in answers} == {bytes, QueueUnavailable}
    assert set(b"".join(unknown)) == {UNKNOWN}
    assert len(unknown) == len(broker.published) // len(BATCH)


async def test_a_batch_whose_caller_is_cancelled_while_it_waits_is_never_written(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        batches[-1].cancel()
        broker.mode = "ack"
        (await broker.wait_opened(1)).ack(len(broker.published), multiple=True)
        outcomes = [await batch for batch in batches[:-1]]
        assert b"".join(outcomes).count(ACKED) == (BATCHES - 1) * len(BATCH)
        await eventually(lambda: is_idle(publisher))
    assert ids_of(broker.published) == [name for n in NAMES[:-1] for name in ids(len(BATCH), n)]


async def test_what_waits_behind_an_overdue_batch_goes_to_another_connection() -> None:
    async with two_brokers() as (frozen, good):
        frozen.mode = "silent"
        async with connected(frozen.url, good.url, amqp_connections=2, confirm_timeout_s=6) as publisher:
            frozen_connection = next(one for one in publisher.connections.open if str(one.node.port) in frozen.url)
            overdue = start_on(frozen_connection, "X", 600, within_s=1)
            await frozen.wait_published(600)
            waiting = start_on(frozen_connection, "Y", 1, within_s=6)
            assert set(await overdue) == {UNKNOWN}
            with pytest.raises(QueueUnavailable):
                await waiting
            assert list(await publish(publisher, 1)) == [ACKED]
            assert len(frozen.published) == 600


async def test_a_waiting_batch_that_cannot_be_written_shifts_no_confirm(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the ack of the batch behind it would count for it."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = len(broker.published)
        (connection,) = publisher.connections.open

        def fail(data: bytes) -> None:
            raise ConnectionResetError

        monkeypatch.setattr(transport_of(connection), "write", fail)
        broker.mode = "ack"
        (await broker.wait_opened(1)).ack(written, multiple=True)
        async with asyncio.timeout(8):
            assert len(acked([await batch for batch in batches])) == BATCHES * len(BATCH)
        assert connection.is_lost
    assert sorted(ids_of(broker.published)) == [name for n in NAMES for name in ids(len(BATCH), n)]


async def test_under_an_alarm_nothing_that_waits_is_written_until_it_ends(broker: ScriptedBroker) -> None:
    """It would be unknown. What waits until its deadline was certainly not queued."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batches = publish_all(publisher)
        await settle_down(broker)
        written = len(broker.published)
        (connection,) = publisher.connections.open
        broker.sessions[0].blocked()
        await eventually(lambda: connection.is_blocked)
        broker.sessions[0].ack(written, multiple=True)
        await settle_down(broker)
        assert len(broker.published) == written
        late = publish(publisher, 1, "Z")
        broker.mode = "ack"
        broker.sessions[0].unblocked()
        assert len(acked([await batch for batch in batches])) == BATCHES * len(BATCH)
        with pytest.raises(QueueUnavailable):
            await late
        assert is_idle(publisher)


async def test_nothing_that_waits_is_written_behind_an_overdue_batch(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        overdue = start_on(connection, "A", 300, within_s=0.3)
        second = start_on(connection, "B", 300, within_s=5)
        waiting = start_on(connection, "C", 1, within_s=5)
        await broker.wait_published(600)
        assert set(await overdue) == {UNKNOWN}
        for tag in range(301, 601):
            broker.sessions[0].ack(tag)
        assert set(await second) == {ACKED}
        with pytest.raises(QueueUnavailable):
            await waiting
        assert len(broker.published) == 600


async def test_what_waited_on_a_connection_that_was_replaced_goes_to_another(broker: ScriptedBroker) -> None:
    """Even if the old one has caught up by the time that its publisher runs."""
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        full = [start_on(one, "F", 600, within_s=5) for one in publisher.connections.open]
        await broker.wait_published(1_200)
        batch = publish(publisher, 1)
        await settle_down(broker)
        replaced = max(publisher.connections.open, key=lambda one: one.unconfirmed_messages)
        publisher.connections.open = [one for one in publisher.connections.open if one is not replaced]
        replaced.refuse_waiting()
        assert replaced.is_usable()
        for session in broker.sessions:
            session.ack(600, multiple=True)
        await broker.wait_published(1_201)
        last = broker.published[-1]
        broker.sessions[last.connection].ack(last.delivery_tag)
        assert list(await batch) == [ACKED]
        for each in full:
            await each
        await replaced.close()


async def test_a_waiting_batch_whose_time_is_nearly_over_is_not_written(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would end as unknown."""
    monkeypatch.setattr(connection_module, "TOO_LATE_S", 2.0)
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        first = start_on(connection, "A", 600, within_s=9)
        late = start_on(connection, "B", 1, within_s=1.5)
        behind = start_on(connection, "C", 1, within_s=9)
        await broker.wait_published(600)
        broker.mode = "ack"
        broker.sessions[0].ack(600, multiple=True)
        assert list(await behind) == [ACKED]
        assert late.done(), "it is refused before its deadline"
        with pytest.raises(QueueUnavailable):
            await late
        await first
    assert ids_of(broker.published)[600:] == ids(1, "C")


async def test_each_waiting_batch_has_its_own_deadline(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        first = start_on(connection, "A", 600, within_s=9)
        early = start_on(connection, "B", 1, within_s=0.5)
        later = start_on(connection, "C", 1, within_s=9)
        with pytest.raises(QueueUnavailable):
            await asyncio.wait_for(early, 5)
        assert not later.done()
        broker.mode = "ack"
        broker.sessions[0].ack(600, multiple=True)
        assert list(await later) == [ACKED]
        await first


async def test_the_limit_is_the_same_after_batches_have_waited_and_were_refused(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        session = broker.sessions[0]
        for number in range(3):
            before = sent(broker)
            batches = publish_all(publisher)
            await settle_down(broker)
            assert SOCKET_BYTES * 0.8 < sent(broker) - before < SOCKET_BYTES + len(BATCH) * (1_000 + FRAMES)
            if number == 1:
                connection.refuse_waiting()
            while not all(batch.done() for batch in batches):
                session.ack(len(broker.published), multiple=True)
                await asyncio.sleep(0.02)
            await asyncio.gather(*batches, return_exceptions=True)


async def test_a_batch_that_goes_to_another_connection_adapts_the_window_by_what_it_finds_there(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The load of the lost connection is gone, and the wait there says nothing about the confirms."""
    monkeypatch.setattr(connection_module, "SOCKET_BYTES", 1)
    broker.mode = "silent"
    adapted: list[tuple[int, float]] = []
    async with connected(broker.url) as publisher:
        (lost,) = publisher.connections.open
        first = start_on(lost, "A", 500, within_s=5)
        await broker.wait_published(500)
        waiting = publish(publisher, 1, "B")
        await eventually(lambda: publisher.unconfirmed_messages == 501)

        def adapt(_load: int, *, unconfirmed: int, published_at: float, now: float) -> None:
            adapted.append((unconfirmed, published_at))

        monkeypatch.setattr(publisher.window, "adapt", adapt)
        broker.mode = "ack"
        lost_at = asyncio.get_running_loop().time()
        broker.sessions[0].drop()
        assert list(await waiting) == [ACKED]
        ((unconfirmed, published_at),) = adapted
        assert unconfirmed == 1
        assert published_at > lost_at
        await first
