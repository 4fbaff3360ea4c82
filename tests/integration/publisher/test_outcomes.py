"""Each message gets the broker's outcome, in every order of acks, nacks and returns. Promises 2 and 3."""

import pytest

from gateway.amqp.confirms import Outcome
from tests.support.publishing import (
    ACKED,
    NACKED,
    RETURNED,
    Script,
    connected,
    is_idle,
    publish,
    publish_batch,
)
from tests.support.scripted_broker import ScriptedBroker, Session


def acks_one_by_one_backwards(session: Session) -> None:
    for tag in (4, 3, 2, 1):
        session.ack(tag)


def acks_all_at_once(session: Session) -> None:
    session.ack(4, multiple=True)


def acks_in_two_steps(session: Session) -> None:
    session.ack(2, multiple=True)
    session.ack(4, multiple=True)


def nacks_one(session: Session) -> None:
    session.ack(1)
    session.nack(3)
    session.ack(2)
    session.ack(4)


def nacks_all_at_once(session: Session) -> None:
    session.nack(4, multiple=True)


def nacks_the_first_two_and_acks_the_rest(session: Session) -> None:
    session.nack(2, multiple=True)
    session.ack(4, multiple=True)


def returns_one_and_acks_all(session: Session) -> None:
    session.return_(3)
    session.ack(4, multiple=True)


def returns_all_and_acks_each(session: Session) -> None:
    for tag in (1, 2, 3, 4):
        session.return_(tag)
        session.ack(tag)


def returns_nacks_and_acks(session: Session) -> None:
    session.return_(1)
    session.nack(2)
    session.return_(4)
    session.ack(1)
    session.ack(4, multiple=True)


def acks_twice_and_beyond(session: Session) -> None:
    session.ack(1)
    session.ack(1)
    session.nack(1)
    session.ack(99, multiple=True)
    session.nack(0)
    session.nack(4, multiple=True)


SCRIPTS: dict[Script, list[Outcome]] = {
    acks_one_by_one_backwards: [ACKED, ACKED, ACKED, ACKED],
    acks_all_at_once: [ACKED, ACKED, ACKED, ACKED],
    acks_in_two_steps: [ACKED, ACKED, ACKED, ACKED],
    nacks_one: [ACKED, ACKED, NACKED, ACKED],
    nacks_all_at_once: [NACKED, NACKED, NACKED, NACKED],
    nacks_the_first_two_and_acks_the_rest: [NACKED, NACKED, ACKED, ACKED],
    returns_one_and_acks_all: [ACKED, ACKED, RETURNED, ACKED],
    returns_all_and_acks_each: [RETURNED, RETURNED, RETURNED, RETURNED],
    returns_nacks_and_acks: [RETURNED, NACKED, ACKED, RETURNED],
    acks_twice_and_beyond: [ACKED, NACKED, NACKED, NACKED],
}


@pytest.mark.parametrize("write_size", [None, 1, 7], ids=["in one read", "byte by byte", "in sevens"])
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
async def test_each_message_has_the_outcome_the_broker_gave_it(
    broker: ScriptedBroker, script: Script, write_size: int | None
) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 4)
        await broker.wait_published(4)
        session = broker.sessions[0]
        session.write_size = write_size
        with session.together():
            script(session)
        assert list(await batch) == SCRIPTS[script]
        assert is_idle(publisher)
        assert (publisher.connections.late_confirms, publisher.republished) == (0, 0)
        assert len(broker.published) == 4


async def test_one_answer_can_settle_several_batches_each_with_its_own_outcomes(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        first, second = publish(publisher, 2, "A"), publish(publisher, 3, "B")
        await broker.wait_published(5)
        assert publisher.unconfirmed_messages == 5
        broker.sessions[0].nack(2)
        broker.sessions[0].ack(5, multiple=True)
        assert list(await first) == [ACKED, NACKED]
        assert list(await second) == [ACKED] * 3
        assert is_idle(publisher)


async def test_a_settled_batch_does_not_wait_for_an_older_one(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        older, younger = publish(publisher, 1, "A"), publish(publisher, 1, "B")
        await broker.wait_published(2)
        broker.sessions[0].ack(2)
        assert list(await younger) == [ACKED]
        assert not older.done()
        broker.sessions[0].ack(1)
        assert list(await older) == [ACKED]


async def test_a_return_of_an_unknown_message_changes_nothing(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected(broker.url) as publisher:
        assert list(await publish(publisher, 1, "A")) == [ACKED]
        broker.mode = "silent"
        batch = publish(publisher, 1, "B")
        await broker.wait_published(2)
        with broker.sessions[0].together():
            broker.sessions[0].return_(1)  # settled long ago
            broker.sessions[0].ack(2)
        assert list(await batch) == [ACKED]
    assert "returned message A0000001, which is not on the wire" in caplog.text


async def test_nothing_to_publish_is_nothing_published(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        assert await publish_batch(publisher, []) == b""
    assert await publish_batch(publisher, []) == b"", "a batch without a valid message needs no broker"
    assert broker.published == []
