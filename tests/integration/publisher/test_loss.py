"""After the loss of a connection unanswered messages are unknown, and only those are published again.

Promises 1, 3 and 5.
"""

import asyncio
from collections.abc import Callable
from functools import partial

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import connection as connection_module
from gateway.amqp import publisher as publisher_module
from gateway.amqp.confirms import Outcome
from gateway.amqp.window import UNLIMITED
from gateway.config import Settings
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    NACKED,
    RETURNED,
    UNKNOWN,
    Script,
    close_channel,
    close_connection,
    connected,
    drop,
    hang_up,
    ids,
    ids_of,
    is_idle,
    payloads,
    publish,
    send_garbage,
)
from tests.support.scripted_broker import Published, ScriptedBroker, Session

REFUSED = "ACCESS_REFUSED - access to exchange 'sms.outbound' in vhost '/' refused for user 'guest'"


def refuse_to_write(session: Session) -> None:
    session.close_channel(403, REFUSED)


def refuse_and_drop(session: Session) -> None:
    session.close_channel(403, REFUSED)
    session.hang_up()


losses = pytest.mark.parametrize("lose", [drop, hang_up, close_channel, close_connection, send_garbage])


@losses
async def test_only_the_unknown_are_published_once_more_elsewhere_with_the_same_ids(
    broker: ScriptedBroker, lose: Script
) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        batch = publish(publisher, 6)
        await broker.wait_published(6)
        first = broker.published[0].connection
        broker.on_publish = lambda session, message: session.ack(message.delivery_tag)
        with broker.sessions[first].together():
            broker.sessions[first].ack(1)
            broker.sessions[first].nack(3)
            broker.sessions[first].return_(4)
            lose(broker.sessions[first])
        assert list(await batch) == [ACKED, ACKED, NACKED, RETURNED, ACKED, ACKED]
        again = broker.published[6:]
        assert ids_of(again) == [ids(6)[n] for n in (1, 4, 5)]
        assert [message.body for message in again] == [payloads(6)[n] for n in (1, 4, 5)]
        assert first not in {message.connection for message in again}
        assert publisher.republished == 3
        assert is_idle(publisher)


async def test_after_a_closed_channel_the_connection_gets_a_new_one(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    selected = []

    def listen(session: Session, channel: int, frame: Frame) -> bool:
        if isinstance(frame, commands.Confirm.Select):
            selected.append(channel)
        return False

    broker.on_method = listen
    async with connected(broker.url) as publisher:
        for n in range(3):
            opened = len(selected)
            close_channel(broker.sessions[0])
            await broker.wait_until(partial(lambda opened: len(selected) > opened, opened))
            assert list(await publish(publisher, 2, str(n))) == [ACKED] * 2
        assert len(broker.sessions) == 1
    logged = [record.message.partition(" to the broker")[0] for record in caplog.records]
    assert logged == ["connected", *["lost the channel", "reopened the channel"] * 3]


async def test_under_an_alarm_a_closed_channel_costs_its_connection(broker: ScriptedBroker) -> None:
    """The object of the next channel would not know of the alarm."""
    async with connected(broker.url) as publisher:
        broker.sessions[0].blocked()
        await eventually(lambda: not publisher.is_usable())
        close_channel(broker.sessions[0])
        await broker.wait_opened(2)


async def test_the_time_under_an_alarm_ends_with_the_connection(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        broker.sessions[0].blocked()
        await eventually(lambda: connection.is_blocked)
        broker.sessions[0].drop()
        await connection.wait_lost(timeout=5.0)
        assert not connection.is_blocked
        blocked_s = connection.blocked_s
        assert blocked_s > 0
        await asyncio.sleep(0.01)
        assert connection.blocked_s == blocked_s


@pytest.mark.parametrize(
    ("rights_kept_s", "acked", "outcomes"),
    [(60.0, 0, [NACKED, NACKED]), (0.0, 0, [UNKNOWN, UNKNOWN]), (60.0, 1, [ACKED, UNKNOWN])],
)
async def test_without_the_right_to_write_only_a_young_batch_is_certainly_not_queued(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch, rights_kept_s: float, acked: int, outcomes: list[Outcome]
) -> None:
    """An older one, or one after an ack, may have been accepted before the right was taken away."""
    monkeypatch.setattr(connection_module, "RIGHTS_KEPT_S", rights_kept_s)
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.5) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        await asyncio.sleep(0.01)
        with broker.sessions[0].together():
            if acked:
                broker.sessions[0].ack(acked)
            broker.sessions[0].close_channel(403, REFUSED)
        assert list(await batch) == outcomes


@pytest.mark.parametrize(("lose", "checks"), [(close_channel, 0), (refuse_to_write, 1), (refuse_and_drop, 1)])
async def test_after_a_refusal_to_write_the_right_is_checked_before_a_connection_takes_batches(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch, lose: Script, checks: int
) -> None:
    """Otherwise each new channel would cost a batch."""
    asked: list[Settings] = []

    async def check_may_publish(_channel: object, settings: Settings) -> None:
        asked.append(settings)

    monkeypatch.setattr(connection_module, "check_may_publish", check_may_publish)
    async with connected(broker.url) as publisher:
        (first,) = publisher.connections.open
        lose(broker.sessions[0])
        await eventually(lambda: first not in publisher.connections.open and publisher.connections.is_usable())
        assert len(asked) == checks


@pytest.mark.parametrize("lose", [drop, hang_up, close_connection, send_garbage])
async def test_a_lost_connection_is_made_anew_and_serves(broker: ScriptedBroker, lose: Script) -> None:
    async with connected(broker.url) as publisher:
        lose(broker.sessions[0])
        await broker.wait_opened(2)
        await eventually(publisher.connections.is_usable)
        assert list(await publish(publisher, 2)) == [ACKED] * 2
        assert {message.connection for message in broker.published} == {1}


async def test_with_no_other_connection_the_second_try_waits_for_a_new_one(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        broker.mode = "ack"
        broker.sessions[0].drop()
        assert list(await batch) == [ACKED] * 2
        assert ids_of(broker.published) == ids(2) * 2
        assert [message.connection for message in broker.published] == [0, 0, 1, 1]


def nack(session: Session, message: Published) -> None:
    session.nack(message.delivery_tag)


def return_and_ack(session: Session, message: Published) -> None:
    session.return_(message.delivery_tag)
    session.ack(message.delivery_tag)


def lose_again(session: Session, message: Published) -> None:
    session.drop()


@pytest.mark.parametrize("answer", [nack, return_and_ack, lose_again])
async def test_what_the_second_try_does_not_queue_stays_unknown(
    broker: ScriptedBroker, answer: Callable[[Session, Published], None]
) -> None:
    """The first copy may be queued: a refusal of the second says nothing about it. There is no third."""
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        broker.on_publish = answer
        broker.sessions[broker.published[0].connection].drop()
        assert list(await batch) == [UNKNOWN]
        assert ids_of(broker.published) == ids(1) * 2
        assert is_idle(publisher)


async def test_unknown_is_the_answer_when_there_is_nowhere_to_try_again(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=1.0) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        await broker.stop_listening()
        broker.sessions[0].drop()
        assert list(await batch) == [UNKNOWN] * 2
        assert publisher.republished == 0
        assert is_idle(publisher)


async def test_too_close_to_the_deadline_nothing_is_tried_again(broker: ScriptedBroker) -> None:
    """With less than RETRY_MARGIN_S left, a second copy would hardly be confirmed in time, and be a duplicate."""
    broker.mode = "silent"
    assert publisher_module.RETRY_MARGIN_S > 0.4
    async with connected(broker.url, amqp_connections=2, confirm_timeout_s=0.4) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        broker.sessions[broker.published[0].connection].drop()
        assert list(await batch) == [UNKNOWN]
        assert publisher.republished == 0
        assert len(broker.published) == 1


async def test_returned_then_lost_is_returned_and_not_tried_again(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        session = broker.sessions[broker.published[0].connection]
        with session.together():
            session.return_(1)
            session.close_channel(406, "PRECONDITION_FAILED")
        assert list(await batch) == [RETURNED]
        assert len(broker.published) == 1


async def test_what_waits_for_a_connection_takes_room(broker: ScriptedBroker) -> None:
    """All of it is published as soon as one is open."""
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 6)
        await broker.wait_published(6)
        await broker.stop_listening()
        broker.sessions[0].drop()
        await eventually(lambda: is_idle(publisher))
        assert publisher.room() == publisher.window.messages - 6
        await broker.start_listening()
        broker.mode = "ack"
        assert list(await batch) == [ACKED] * 6
        assert publisher.republished == 6
        assert publisher.room() == UNLIMITED


async def test_nothing_is_published_again_once_the_waits_have_ended(broker: ScriptedBroker) -> None:
    """Even if a connection is usable by then: the process is about to end."""
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        batch = publish(publisher, 1)
        await broker.wait_published(1)
        lost = broker.published[0].connection
        broker.sessions[1 - lost].blocked()
        await eventually(lambda: any(one.is_blocked for one in publisher.connections.open))
        (other,) = [one for one in publisher.connections.open if one.is_blocked]
        await broker.stop_listening()
        broker.sessions[lost].drop()
        await eventually(lambda: publisher.room() < UNLIMITED and is_idle(publisher))
        other._note_blocked(False)
        assert other.is_usable()
        publisher.give_up()
        assert list(await batch) == [UNKNOWN]
        assert len(broker.published) == 1
