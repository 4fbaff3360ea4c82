"""Nothing of a refused batch was written. Promises 4 and 8."""

import asyncio
from functools import partial

import pytest

from gateway.amqp.connection import TOO_LATE_S
from gateway.amqp.publisher import Publisher
from gateway.amqp.window import UNLIMITED
from gateway.errors import Overloaded, QueueUnavailable
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    connected,
    ids,
    ids_of,
    is_idle,
    publish,
    publish_batch,
    publish_on,
    settings_for,
    transport_of,
    usable_connections,
)
from tests.support.scripted_broker import ScriptedBroker


async def test_too_late_to_be_confirmed_nothing_is_written(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        now = asyncio.get_running_loop().time()
        with pytest.raises(QueueUnavailable):
            await publish_batch(publisher, 1, deadline=now + TOO_LATE_S / 2)
        assert broker.published == []
        assert list(await publish_batch(publisher, 1, deadline=now + 5)) == [ACKED]


async def test_a_slow_broker_is_given_less_and_callers_get_retry_after(broker: ScriptedBroker) -> None:
    """A batch unconfirmed for a sixteenth of the deadline narrows the window, here down to two full batches."""
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=2.0, max_unconfirmed_messages=3_000) as publisher:
        for n in range(2):
            batch = publish(publisher, 1, str(n))
            await broker.wait_published(n + 1)
            await asyncio.sleep(0.55)
            broker.sessions[0].ack(n + 1)
            assert list(await batch) == [ACKED]
        full = [publish(publisher, 1_000, batch) for batch in "AB"]
        await broker.wait_published(2_002)
        with pytest.raises(Overloaded) as refused:
            await publish(publisher, 1, "C")
        assert refused.value.headers() == {"Retry-After": "1"}
        broker.sessions[0].ack(2_002, multiple=True)
        assert [list(await batch) for batch in full] == [[ACKED] * 1_000] * 2


async def test_a_batch_fills_the_window_by_its_own_load_and_by_what_is_reserved(broker: ScriptedBroker) -> None:
    async with connected(broker.url, max_unconfirmed_messages=10_000) as publisher:
        publisher.window.messages = 1_000
        assert publisher.room() == UNLIMITED
        assert publisher.room(400) == 600
        assert list(await publish_batch(publisher, 500)) == [ACKED] * 500
        assert publisher.window.messages == 1_500, "half of the window was in use"
        broker.mode = "silent"
        batch = publish(publisher, 300, "B")
        await broker.wait_published(800)
        assert publisher.room(400) == 800
        broker.sessions[0].ack(800, multiple=True)
        await batch


async def test_retry_after_grows_with_the_length_of_an_outage(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with connected(broker.url) as publisher:
        await broker.stop_listening()
        broker.sessions[0].drop()
        await eventually(lambda: not publisher.connections.is_usable())
        loop = asyncio.get_running_loop()
        waits = []
        now = loop.time()
        for moment in (now, now + 7, now + 9_000):
            monkeypatch.setattr(loop, "time", partial(float, moment))
            with pytest.raises(QueueUnavailable) as refused:
                await publish_batch(publisher, 1)
            waits.append(refused.value.headers()["Retry-After"])
            monkeypatch.undo()
        assert waits == ["1", "4", "10"]


async def test_not_connected_is_unavailable(broker: ScriptedBroker) -> None:
    publisher = Publisher(settings_for(broker.url))
    assert not publisher.connections.is_usable()
    with pytest.raises(QueueUnavailable):
        await publish_batch(publisher, 1)
    assert not publisher.connections.has_connected


async def test_a_broker_that_is_gone_is_unavailable_until_it_is_back(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        await broker.stop_listening()
        broker.sessions[0].drop()
        await eventually(lambda: not publisher.connections.is_usable())
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        assert publisher.connections.has_connected
        await broker.start_listening()
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]


async def test_under_an_alarm_nothing_is_written_and_afterwards_batches_are(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        broker.sessions[0].blocked()
        await eventually(lambda: not publisher.connections.is_usable())
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        assert broker.published == []
        broker.sessions[0].unblocked()
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]
        assert len(broker.sessions) == 1, "an alarm costs no connection"


async def test_a_batch_written_before_an_alarm_is_confirmed_under_it(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        with broker.sessions[0].together():
            broker.sessions[0].blocked()
            broker.sessions[0].ack(2, multiple=True)
        assert list(await batch) == [ACKED] * 2


async def test_an_alarm_on_one_connection_leaves_the_other(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_connections=2) as publisher:
        broker.sessions[0].blocked()
        await eventually(lambda: usable_connections(publisher) == 1)
        for n in range(4):
            assert list(await publish(publisher, 1, str(n))) == [ACKED]
        assert {message.connection for message in broker.published} == {1}


async def test_over_the_cap_of_messages_nothing_is_written(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2, max_unconfirmed_messages=3) as publisher:
        first = publish(publisher, 2, "A")
        await broker.wait_published(2)
        publisher.window.confirm_s = 6.5
        with pytest.raises(Overloaded) as refused:
            await publish(publisher, 2, "B")
        assert refused.value.headers() == {"Retry-After": "7"}
        last = publish(publisher, 1, "C")
        await broker.wait_published(3)
        assert sorted(ids_of(broker.published)) == [*ids(2, "A"), *ids(1, "C")]
        broker.sessions[broker.published[0].connection].ack(3, multiple=True)
        assert list(await first + await last) == [ACKED] * 3
        broker.mode = "ack"
        assert list(await publish(publisher, 2, "B")) == [ACKED] * 2


async def test_over_the_cap_of_bytes_nothing_is_written(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, max_unconfirmed_bytes=100) as publisher:
        first = publish(publisher, 1, "A")  # more than 100 bytes with its frames
        await broker.wait_published(1)
        assert publisher.unconfirmed_bytes > 100
        with pytest.raises(Overloaded):
            await publish(publisher, 1, "B")
        broker.sessions[0].ack(1)
        assert list(await first) == [ACKED]
        assert len(broker.published) == 1


async def test_a_closing_transport_is_written_to_no_more(broker: ScriptedBroker) -> None:
    """Between closing and the notice of it lies one turn of the loop, in which a write would be lost."""
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        connection.abort()
        with pytest.raises(QueueUnavailable):
            await publish_batch(publisher, 1)
        with pytest.raises(QueueUnavailable):  # had it been chosen a moment earlier
            await publish_on(connection, 1, within_s=1.0)
        assert is_idle(publisher)
    assert broker.published == []


async def test_a_batch_that_a_closing_transport_refuses_leaves_nothing_and_another_connection_takes_it(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(broker.url, amqp_connections=2) as publisher:
        connection = publisher.connections.open[0]
        transport_of(connection).close()
        with pytest.raises(QueueUnavailable):
            await publish_on(connection, 1, within_s=1.0)
        assert list(await publish_batch(publisher, 2)) == [ACKED] * 2
        await connection.wait_lost(timeout=5.0)
        await broker.wait_opened(3)
    assert [
        record.message for record in caplog.records if record.name == "asyncio" and record.levelname == "ERROR"
    ] == []
