"""An unconfirmed batch is unknown at the deadline; it is tracked on, and its connection is replaced. Promise 9."""

import asyncio

import pytest

from gateway.amqp import connection as connection_module
from gateway.amqp import publisher as publisher_module
from gateway.amqp import reconnection
from gateway.amqp.window import UNLIMITED
from gateway.errors import QueueUnavailable
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    UNKNOWN,
    Script,
    close_channel,
    connected,
    drop,
    is_idle,
    publish,
    usable_connections,
)
from tests.support.scripted_broker import Published, ScriptedBroker, Session


async def test_silence_until_the_deadline_is_unknown_and_is_not_tried_again(broker: ScriptedBroker) -> None:
    """The first copy most likely arrives late: a second one would double the load of a broker in trouble."""
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2, confirm_timeout_s=0.3) as publisher:
        batch = publish(publisher, 3)
        await broker.wait_published(3)
        broker.sessions[broker.published[0].connection].ack(2)
        assert list(await batch) == [UNKNOWN, ACKED, UNKNOWN]
        assert publisher.republished == 0
        assert len(broker.published) == 3
        assert publisher.unconfirmed_messages == 3, "it is still on the wire"


async def test_a_late_confirm_is_counted_and_frees_the_window(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.3, max_unconfirmed_messages=3) as publisher:
        before = broker.sessions[0].bytes_received
        assert list(await publish(publisher, 3)) == [UNKNOWN] * 3
        assert (publisher.unconfirmed_messages, publisher.connections.late_confirms) == (3, 0)
        assert publisher.unconfirmed_bytes == broker.sessions[0].bytes_received - before
        broker.mode = "ack"
        broker.sessions[0].ack(3, multiple=True)
        await eventually(lambda: publisher.connections.late_confirms == 3)
        assert is_idle(publisher)
        assert list(await publish(publisher, 3, "B")) == [ACKED] * 3
        assert publisher.connections.late_confirms == 3


async def test_a_connection_with_an_overdue_batch_takes_no_new_ones_while_another_does(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2, confirm_timeout_s=0.3) as publisher:
        assert list(await publish(publisher, 1, "A")) == [UNKNOWN]
        overdue = broker.published[0].connection
        assert usable_connections(publisher) == 1
        broker.on_publish = lambda session, message: session.ack(message.delivery_tag)
        for n in range(5):
            assert list(await publish(publisher, 1, str(n))) == [ACKED]
        assert overdue not in {message.connection for message in broker.published[1:]}
        broker.sessions[overdue].ack(1)
        await eventually(lambda: usable_connections(publisher) == 2)


async def test_with_every_connection_overdue_nothing_is_written(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.3) as publisher:
        await publish(publisher, 1, "A")
        assert not publisher.connections.is_usable()
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1, "B")
        assert len(broker.published) == 1


async def test_a_connection_stuck_for_too_long_is_closed_and_made_anew(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.2, abandon_timeout_s=0.3) as publisher:
        assert list(await publish(publisher, 2)) == [UNKNOWN] * 2
        await broker.wait_opened(2)
        await broker.sessions[0].closed.wait()
        await eventually(publisher.connections.is_usable)
        assert is_idle(publisher)
        broker.mode = "ack"
        assert list(await publish(publisher, 1, "B")) == [ACKED]
        assert len(broker.published) == 3
    assert publisher.connections.late_confirms == 0, "what was given up has not been confirmed"
    assert "a batch is unconfirmed for" in caplog.text


async def test_an_overdue_connection_is_replaced_at_once_and_still_hears_its_confirms(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.2, abandon_timeout_s=60) as publisher:
        assert list(await publish(publisher, 2)) == [UNKNOWN] * 2
        await broker.wait_opened(2)
        await eventually(publisher.connections.is_usable)
        assert publisher.unconfirmed_messages == 2, "what the old one has on the wire counts on"
        assert publisher.room() == UNLIMITED, "but takes no room from what the new one may write"
        assert not broker.sessions[0].closed.is_set()
        broker.sessions[0].ack(2, multiple=True)
        await eventually(lambda: publisher.connections.late_confirms == 2)
        await broker.sessions[0].closed.wait()
        assert is_idle(publisher)
        broker.mode = "ack"
        assert list(await publish(publisher, 1, "B")) == [ACKED]
        assert broker.published[-1].connection == 1
        assert len(broker.sessions) == 2


async def test_the_replacement_takes_one_batch_until_it_has_shown_that_there_are_confirms(
    broker: ScriptedBroker,
) -> None:
    """The broker is most likely still in trouble, so one batch finds out, and not all of them."""
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.5) as publisher:
        await publish(publisher, 1, "A")
        await broker.wait_opened(2)
        await eventually(publisher.connections.is_usable)
        probe = publish(publisher, 1, "B")
        await broker.wait_published(2)
        assert not publisher.connections.is_usable()
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1, "C")
        broker.sessions[1].ack(1)
        assert list(await probe) == [ACKED]
        others = [publish(publisher, 1, str(n)) for n in range(3)]
        await broker.wait_published(5)
        broker.sessions[1].ack(4, multiple=True)
        assert [list(await other) for other in others] == [[ACKED]] * 3


async def test_after_a_failed_connect_the_replacement_still_takes_one_batch(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.2) as publisher:
        broker.refuse_connections = True
        assert list(await publish(publisher, 1, "A")) == [UNKNOWN]
        await eventually(lambda: publisher.connections.connect_failures > 0)
        broker.refuse_connections = False
        await eventually(publisher.connections.is_usable)
        assert publisher.connections.states()["half_open"] == 1


@pytest.mark.parametrize("lose", [drop, close_channel])
async def test_a_replacement_that_is_lost_before_its_first_confirm_has_shown_nothing(
    broker: ScriptedBroker, lose: Script
) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.5) as publisher:
        assert list(await publish(publisher, 1, "A")) == [UNKNOWN]
        await eventually(publisher.connections.is_usable)
        for _ in range(2):
            (replacement,) = publisher.connections.open
            lose(broker.sessions[-1])
            await replacement.wait_lost(timeout=5.0)
            await eventually(publisher.connections.is_usable)
            assert publisher.connections.states()["half_open"] == 1
        probe = publish(publisher, 1, "B")
        await broker.wait_published(2)
        assert not publisher.connections.is_usable()
        last = broker.published[-1]
        broker.sessions[last.connection].ack(last.delivery_tag, channel=last.channel)
        assert list(await probe) == [ACKED]
        assert publisher.connections.states()["open"] == 1


@pytest.mark.parametrize("lose", [drop, close_channel])
async def test_a_connection_that_is_lost_while_it_is_overdue_is_replaced_by_a_half_open_one(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch, lose: Script
) -> None:
    """Before the check of every quarter second has seen that it is overdue."""
    async with connected(broker.url, confirm_timeout_s=0.2) as publisher:
        (first,) = publisher.connections.open
        monkeypatch.setattr(reconnection, "WATCH_INTERVAL_S", 60.0)
        await asyncio.sleep(0.3)  # the longer wait has begun
        broker.mode = "silent"
        assert list(await publish(publisher, 1, "A")) == [UNKNOWN]
        assert first.is_overdue()
        lose(broker.sessions[0])
        await first.wait_lost(timeout=5.0)
        await eventually(publisher.connections.is_usable)
        assert publisher.connections.states()["half_open"] == 1


async def test_under_an_alarm_an_overdue_connection_is_not_replaced(broker: ScriptedBroker) -> None:
    """The broker confirms when the alarm is over. A new connection would not learn of the alarm."""
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.2) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        broker.sessions[0].blocked("low on memory")
        assert list(await batch) == [UNKNOWN]
        await asyncio.sleep(3 * reconnection.WATCH_INTERVAL_S)
        assert len(broker.sessions) == 1
        broker.mode = "ack"
        with broker.sessions[0].together():
            broker.sessions[0].ack(1)
            broker.sessions[0].unblocked()
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 1, "B")) == [ACKED]
        assert len(broker.sessions) == 1


async def test_a_connection_that_hangs_is_left_alone_while_another_confirms(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "STALLED_S", 0.2)
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        hanging = publish(publisher, 1, "A")
        await broker.wait_published(1)
        hung = broker.published[0].connection
        large = b"x" * publisher_module.SHARED_CONNECTION_BYTES

        def ack_small_ones_elsewhere(session: Session, message: Published) -> None:
            if message.connection != hung and len(message.body) < len(large):
                session.ack(message.delivery_tag)

        broker.on_publish = ack_small_ones_elsewhere
        await asyncio.sleep(0.3)
        on_the_hung = publish(publisher, [large], "B")  # nothing shows yet that it hangs
        await broker.wait_published(2)
        assert list(await publish(publisher, 1, "C")) == [ACKED]
        elsewhere = publish(publisher, [large] * 3, "D")
        await broker.wait_published(6)
        for n in range(5):  # by what is unconfirmed, the hung one would be the better choice
            assert list(await publish(publisher, 1, str(n))) == [ACKED]
        assert {message.connection for message in broker.published[2:]} == {1 - hung}
        broker.sessions[hung].ack(2, multiple=True)
        broker.sessions[1 - hung].ack(4, multiple=True)
        assert [list(await hanging), list(await on_the_hung), list(await elsewhere)] == [[ACKED], [ACKED], [ACKED] * 3]


async def test_a_caller_who_goes_away_stops_no_tracking(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert publisher.unconfirmed_messages == 2
        assert publisher.connections.is_usable()
        broker.sessions[0].ack(2, multiple=True)
        await eventually(lambda: is_idle(publisher))
        broker.mode = "ack"
        assert list(await publish(publisher, 1, "B")) == [ACKED]
