"""The publisher against a broker that does exactly what the script says: every order of acks, nacks, returns, loss.

What a message's outcome is, and when a batch is written again, refused or given up, is decided here and not by luck.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
from pamqp import commands
from pamqp.base import Frame

from gateway.amqp import connection as connection_module
from gateway.amqp import publisher as publisher_module
from gateway.amqp import reconnection
from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import PublishConnection
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.publisher import Publisher
from gateway.amqp.reconnection import reconnect_delay_s
from gateway.config import Settings
from gateway.errors import Overloaded, QueueUnavailable
from tests.support.eventually import eventually
from tests.support.scripted_broker import Declare, Published, ScriptedBroker, Session
from tests.support.tcp_proxy import TcpProxy

ACKED, NACKED, RETURNED, UNKNOWN = Outcome.ACKED, Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN


@pytest.fixture(autouse=True)
def reconnects_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reconnection, "RECONNECT_DELAYS_S", (0.0, 0.01))


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    async with scripted_broker() as scripted:
        yield scripted


@asynccontextmanager
async def scripted_broker(**options: Any) -> AsyncIterator[ScriptedBroker]:
    """A broker that was never given reason to complain."""
    async with ScriptedBroker(**options) as scripted:
        yield scripted
        assert scripted.violations == []


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await eventually(lambda: asyncio.all_tasks() - before <= {asyncio.current_task()}, timeout=5.0)


def settings_for(*urls: str, **changes: Any) -> Settings:
    defaults: dict[str, Any] = {"amqp_connections": 1, "amqp_heartbeat_s": 600}
    return Settings(database_url="postgres://unused@localhost/x", amqp_url=",".join(urls), **(defaults | changes))


@asynccontextmanager
async def started(*urls: str, **changes: Any) -> AsyncIterator[Publisher]:
    """A publisher that has begun to connect."""
    publisher = Publisher(settings_for(*urls, **changes), first_node=0)
    publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()


@asynccontextmanager
async def connected(*urls: str, **changes: Any) -> AsyncIterator[Publisher]:
    """A publisher all of whose connections are up."""
    async with started(*urls, **changes) as publisher:
        await eventually(lambda: usable_connections(publisher) == changes.get("amqp_connections", 1))
        yield publisher


def usable_connections(publisher: Publisher) -> int:
    return sum(connection.is_usable() for connection in publisher.connections.open)


def ids(count: int, batch: str = "A") -> list[str]:
    return [f"{batch}{n:07}" for n in range(1, count + 1)]


def payloads(count: int) -> list[bytes]:
    return [b'{"n":%d}' % n for n in range(1, count + 1)]


def publish(publisher: Publisher, count: int, batch: str = "A") -> "asyncio.Task[bytes]":
    return asyncio.create_task(publisher.publish(Outgoing(ids(count, batch), payloads(count))))


def ids_of(published: list[Published]) -> list[str]:
    return [message.properties.message_id or "" for message in published]


def is_idle(publisher: Publisher) -> bool:
    return (publisher.unconfirmed_messages, publisher.unconfirmed_bytes) == (0, 0)


# What the broker says of each message is its outcome

Script = Callable[[Session], None]


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


async def test_a_return_of_something_unknown_harms_nobody(
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
        assert await publisher.publish(Outgoing([], [])) == b""
    assert broker.published == []


# What is written


async def test_messages_arrive_whole_in_order_persistent_and_mandatory(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_exchange="my.exchange", amqp_queue="my.queue") as publisher:
        await publish(publisher, 3)
    assert ids_of(broker.published) == ids(3)
    assert [message.body for message in broker.published] == payloads(3)
    for message in broker.published:
        assert (message.exchange, message.routing_key, message.mandatory) == ("my.exchange", "my.queue", True)
        properties = message.properties
        assert (properties.delivery_mode, properties.content_type) == (2, "application/json")
        assert properties.message_type == "sms.v1"


async def test_a_payload_over_the_brokers_frame_size_takes_several_frames() -> None:
    """The broker closes a connection that sends it a larger frame than was agreed."""
    async with scripted_broker(frame_max=4_096) as broker, connected(broker.url) as publisher:
        large = [b"x" * 4_088, b"y" * 4_089, b"z" * 100_000, b"small"]
        assert list(await publisher.publish(Outgoing(ids(4), large))) == [ACKED] * 4
        assert [message.body for message in broker.published] == large
        assert [message.body_frames for message in broker.published] == [1, 2, 25, 1]


async def test_a_batch_of_a_thousand_is_one_write_and_one_future(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.mode = "silent"
    broker.on_publish = lambda session, message: session.ack(message.delivery_tag)
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        transport, loop = connection._transports._transport, asyncio.get_running_loop()
        assert transport is not None
        write, create_future = transport.write, loop.create_future
        writes: list[int] = []
        futures: list[object] = []

        def counting_write(data: bytes) -> None:
            writes.append(len(data))
            write(data)

        def counting_create_future() -> "asyncio.Future[Any]":
            if asyncio.current_task() is batch:
                futures.append(1)
            return create_future()

        monkeypatch.setattr(transport, "write", counting_write)
        monkeypatch.setattr(loop, "create_future", counting_create_future)
        batch = publish(publisher, 1_000)
        tasks = asyncio.all_tasks()
        assert list(await batch) == [ACKED] * 1_000
        assert len(writes) == 1
        assert len(futures) == 1
        assert asyncio.all_tasks() <= tasks, "no task was made for it"
    assert ids_of(broker.published) == ids(1_000)


# Loss: what was written and not answered is unknown, and only that is written once more


def drop(session: Session) -> None:
    session.drop()


def hang_up(session: Session) -> None:
    session.hang_up()


def close_channel(session: Session) -> None:
    session.close_channel(404, "NOT_FOUND - no exchange 'sms.outbound' in vhost '/'")


def close_connection(session: Session) -> None:
    session.close_connection(320, "CONNECTION_FORCED - broker forced connection closure")


def send_garbage(session: Session) -> None:
    # Zeros: frames of length 0. Had it a large number where the length stands, aiormq would wait for its end.
    session.raw(b"\x00" * 40)


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


@losses
async def test_a_lost_connection_is_made_anew_and_serves(broker: ScriptedBroker, lose: Script) -> None:
    async with connected(broker.url) as publisher:
        lose(broker.sessions[0])
        await broker.wait_opened(2)
        await eventually(publisher.is_usable)
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
    """The first copy may have landed: a refusal of the second says nothing of it. And there is no third."""
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
    """With less than RETRY_MARGIN_S left a second copy could hardly be confirmed: it would only be a duplicate."""
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


# Silence: the deadline answers, the tracking goes on


async def test_silence_until_the_deadline_is_unknown_and_is_not_tried_again(broker: ScriptedBroker) -> None:
    """The first copy is likely still coming: a second would double the load of a broker in trouble."""
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2, confirm_timeout_s=0.3) as publisher:
        batch = publish(publisher, 3)
        await broker.wait_published(3)
        broker.sessions[broker.published[0].connection].ack(2)
        assert list(await batch) == [UNKNOWN, ACKED, UNKNOWN]
        assert publisher.republished == 0
        assert len(broker.published) == 3
        assert publisher.unconfirmed_messages == 3, "it is still on the wire"


async def test_a_late_confirm_is_counted_and_gives_the_room_back(broker: ScriptedBroker) -> None:
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
        assert not publisher.is_usable()
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
        await eventually(publisher.is_usable)
        assert is_idle(publisher)
        assert publisher.connections.late_confirms == 0, "what was given up has not been confirmed"
        broker.mode = "ack"
        assert list(await publish(publisher, 1, "B")) == [ACKED]
        assert len(broker.published) == 3
    assert "a batch is unconfirmed for" in caplog.text


async def test_an_overdue_connection_is_replaced_at_once_and_still_hears_its_confirms(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.2, abandon_timeout_s=60) as publisher:
        assert list(await publish(publisher, 2)) == [UNKNOWN] * 2
        await broker.wait_opened(2)
        await eventually(publisher.is_usable)
        assert publisher.unconfirmed_messages == 2, "what the old one has on the wire counts on"
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
    """The broker that left the first unconfirmed is most likely still in trouble: one batch finds out, not all."""
    broker.mode = "silent"
    async with connected(broker.url, confirm_timeout_s=0.5) as publisher:
        await publish(publisher, 1, "A")
        await broker.wait_opened(2)
        await eventually(publisher.is_usable)
        probe = publish(publisher, 1, "B")
        await broker.wait_published(2)
        assert not publisher.is_usable()
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1, "C")
        broker.sessions[1].ack(1)
        assert list(await probe) == [ACKED]
        others = [publish(publisher, 1, str(n)) for n in range(3)]
        await broker.wait_published(5)
        broker.sessions[1].ack(4, multiple=True)
        assert [list(await other) for other in others] == [[ACKED]] * 3


async def test_under_an_alarm_an_overdue_connection_is_not_replaced(broker: ScriptedBroker) -> None:
    """The broker has said what is wrong, and will confirm when the alarm is over. A new one would not be told."""
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
        await eventually(publisher.is_usable)
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
        on_the_hung = asyncio.create_task(
            publisher.publish(Outgoing(ids(1, "B"), [large]))
        )  # nothing shows yet that it hangs
        await broker.wait_published(2)
        assert list(await publish(publisher, 1, "C")) == [ACKED]
        elsewhere = asyncio.create_task(publisher.publish(Outgoing(ids(3, "D"), [large] * 3)))
        await broker.wait_published(6)
        for n in range(5):  # by what is unconfirmed, the hung one would be the better choice
            assert list(await publish(publisher, 1, str(n))) == [ACKED]
        assert {message.connection for message in broker.published[2:]} == {1 - hung}
        broker.sessions[hung].ack(2, multiple=True)
        broker.sessions[1 - hung].ack(4, multiple=True)
        assert [list(await hanging), list(await on_the_hung), list(await elsewhere)] == [[ACKED], [ACKED], [ACKED] * 3]


async def test_too_late_to_be_confirmed_nothing_is_written(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        now = asyncio.get_running_loop().time()
        with pytest.raises(QueueUnavailable):
            await publisher.publish(Outgoing(ids(1), payloads(1)), deadline=now + publisher_module.TOO_LATE_S / 2)
        assert broker.published == []
        assert list(await publisher.publish(Outgoing(ids(1), payloads(1)), deadline=now + 5)) == [ACKED]


async def test_a_slow_broker_is_handed_less_and_callers_are_told_when_to_come_back(broker: ScriptedBroker) -> None:
    """Whatever was on the wire past a sixteenth of the deadline narrows the window; here down to two full batches."""
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


async def test_one_account_that_floods_does_not_lock_another_out(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, max_unconfirmed_messages=4_000) as publisher:
        batches: list[asyncio.Task[bytes]] = []
        while True:
            task = asyncio.create_task(publisher.publish(Outgoing(ids(500), payloads(500), None, 1)))
            await asyncio.sleep(0)
            if task.done():
                break
            batches.append(task)
        assert isinstance(task.exception(), Overloaded)
        assert len(batches) == 6
        with pytest.raises(Overloaded):
            publisher.refuse_if_full(1)
        publisher.refuse_if_full(2)
        batches.append(asyncio.create_task(publisher.publish(Outgoing(ids(500), payloads(500), None, 2))))
        await broker.wait_published(3_500)
        broker.sessions[0].ack(3_500, multiple=True)
        assert [list(await batch) for batch in batches] == [[ACKED] * 500] * 7
        publisher.refuse_if_full(1)


async def test_a_long_outage_is_told_to_be_long(broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(broker.url) as publisher:
        await broker.stop_listening()
        broker.sessions[0].drop()
        await eventually(lambda: not publisher.is_usable())
        loop = asyncio.get_running_loop()
        waits = []
        now = loop.time()
        for moment in (now, now + 7, now + 9_000):
            monkeypatch.setattr(loop, "time", partial(float, moment))
            with pytest.raises(QueueUnavailable) as refused:
                await publisher.publish(Outgoing(ids(1), payloads(1)))
            waits.append(refused.value.headers()["Retry-After"])
            monkeypatch.undo()
        assert waits == ["1", "4", "10"]


async def test_a_caller_who_goes_away_stops_no_tracking(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url) as publisher:
        batch = publish(publisher, 2)
        await broker.wait_published(2)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert publisher.unconfirmed_messages == 2
        assert publisher.is_usable()
        broker.sessions[0].ack(2, multiple=True)
        await eventually(lambda: is_idle(publisher))
        broker.mode = "ack"
        assert list(await publish(publisher, 1, "B")) == [ACKED]


# Refusals: certain, because nothing was written


async def test_not_connected_is_unavailable(broker: ScriptedBroker) -> None:
    publisher = Publisher(settings_for(broker.url))
    assert not publisher.is_usable()
    with pytest.raises(QueueUnavailable):
        await publisher.publish(Outgoing(ids(1), payloads(1)))
    assert not publisher.connections.was_connected


async def test_a_broker_that_is_gone_is_unavailable_until_it_is_back(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        await broker.stop_listening()
        broker.sessions[0].drop()
        await eventually(lambda: not publisher.is_usable())
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        assert publisher.connections.was_connected
        await broker.start_listening()
        await eventually(publisher.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]


async def test_under_an_alarm_nothing_is_written_and_after_it_all_is_well(broker: ScriptedBroker) -> None:
    async with connected(broker.url) as publisher:
        broker.sessions[0].blocked()
        await eventually(lambda: not publisher.is_usable())
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        assert broker.published == []
        broker.sessions[0].unblocked()
        await eventually(publisher.is_usable)
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
        with pytest.raises(Overloaded):
            await publish(publisher, 2, "B")
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
    """Between the closing and its notice lies a turn of the loop, in which a write would be swallowed."""
    async with connected(broker.url) as publisher:
        (connection,) = publisher.connections.open
        connection._transports.abort()
        with pytest.raises(QueueUnavailable):
            await publisher.publish(Outgoing(ids(1), payloads(1)))
        with pytest.raises(QueueUnavailable):  # had it been chosen a moment earlier
            await connection.publish(Outgoing(ids(1), payloads(1)), asyncio.get_running_loop().time() + 1)
        assert is_idle(publisher)
    assert broker.published == []


async def test_small_batches_in_flight_together_share_a_connection(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_connections=2) as publisher:
        assert [list(outcomes) for outcomes in await asyncio.gather(*(publish(publisher, 1) for _ in range(6)))] == [
            [ACKED]
        ] * 6
    assert len({message.connection for message in broker.published}) == 1


async def test_beyond_that_the_connection_with_less_on_the_wire_is_chosen(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker.url, amqp_connections=2) as publisher:
        large = [b" " * 70_000]
        batches = [asyncio.create_task(publisher.publish(Outgoing(ids(1, f"{n}"), large))) for n in range(6)]
        await broker.wait_published(6)
        by_connection = [message.connection for message in broker.published]
        assert by_connection.count(0) == by_connection.count(1) == 3
        for session in broker.sessions:
            session.ack(3, multiple=True)
        assert [list(outcomes) for outcomes in await asyncio.gather(*batches)] == [[ACKED]] * 6


# Nodes


@asynccontextmanager
async def two_brokers() -> AsyncIterator[tuple[ScriptedBroker, ScriptedBroker]]:
    async with scripted_broker() as one, scripted_broker() as other:
        yield one, other


async def test_connections_are_spread_over_the_nodes() -> None:
    async with two_brokers() as (one, other), connected(one.url, other.url, amqp_connections=2):
        assert (len(one.sessions), len(other.sessions)) == (1, 1)


@pytest.mark.parametrize("is_reset", [False, True], ids=["refuses", "resets"])
async def test_when_one_node_refuses_the_next_is_tried(is_reset: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with two_brokers() as (one, other):
        if is_reset:
            one.refuse_connections = True
        else:
            await one.stop_listening()
        async with connected(one.url, other.url) as publisher:
            assert list(await publish(publisher, 1)) == [ACKED]
        assert (len(one.sessions), len(other.sessions)) == (0, 1)
        assert f"cannot connect to the broker at 127.0.0.1:{one.port}" in caplog.text
        assert "guest" not in caplog.text


async def test_after_a_loss_the_next_node_comes_first() -> None:
    async with two_brokers() as (one, other), connected(one.url, other.url) as publisher:
        one.sessions[0].drop()
        await other.wait_opened(1)
        await eventually(publisher.is_usable)
        assert len(one.sessions) == 1


async def test_a_node_that_swallows_everything_costs_the_connect_timeout_and_no_more() -> None:
    async with two_brokers() as (one, other), TcpProxy("127.0.0.1", one.port) as proxy:
        proxy.black_hole()
        hole = f"amqp://guest:guest@127.0.0.1:{proxy.port}/"
        async with connected(hole, other.url, amqp_connect_timeout_s=0.3) as publisher:
            assert list(await publish(publisher, 1)) == [ACKED]
            assert proxy.accepted == 1


# The handshake may break anywhere

HANDSHAKE: list[type[Frame]] = [
    commands.Connection.StartOk,
    commands.Connection.TuneOk,
    commands.Connection.Open,
    commands.Channel.Open,
    commands.Exchange.Declare,
    commands.Queue.Declare,
    commands.Queue.Bind,
    commands.Channel.Close,  # of the channel on which the topology was declared
    commands.Confirm.Select,
]


def say_nothing(session: Session) -> None:
    """And the connect timeout has to end it."""


@pytest.mark.parametrize("broken", HANDSHAKE, ids=lambda method: method.__name__)
@pytest.mark.parametrize("trouble", [drop, hang_up, close_connection, send_garbage, say_nothing])
async def test_a_handshake_broken_anywhere_is_only_tried_again(
    broker: ScriptedBroker, broken: type[Frame], trouble: Script
) -> None:
    is_broken = False

    def break_the_first(session: Session, channel: int, method: Frame) -> bool:
        nonlocal is_broken
        if session.index > 0:
            return False
        if not is_broken and isinstance(method, broken):
            is_broken = True
            trouble(session)
            return True
        return is_broken and not isinstance(method, commands.Connection.Close | commands.Connection.CloseOk)

    broker.on_method = break_the_first
    async with connected(broker.url, amqp_connect_timeout_s=0.5) as publisher:
        assert len(broker.sessions) == 2
        assert list(await publish(publisher, 1)) == [ACKED]


async def test_a_handshake_that_comes_byte_by_byte_succeeds(broker: ScriptedBroker) -> None:
    """TCP promises no more: the first frame is some 500 bytes, and may well come in two reads."""
    broker.write_size = 1
    async with started(broker.url) as publisher:
        await eventually(publisher.is_usable, timeout=5.0)
        assert list(await publish(publisher, 2)) == [ACKED] * 2
    assert len(broker.sessions) == 1


# Heartbeats


async def test_a_broker_that_only_acks_is_not_taken_for_dead(broker: ScriptedBroker) -> None:
    """Busy with confirms a broker sends no heartbeats; aiormq, who sees no confirms, is told that the peer lives."""
    broker.send_heartbeats = False
    async with connected(broker.url, amqp_heartbeat_s=1) as publisher:
        loop = asyncio.get_running_loop()
        until = loop.time() + 3 * (1 + 1) + 1.4  # the grace, and the next time that aiormq looks
        while loop.time() < until:
            assert list(await publish(publisher, 1)) == [ACKED]
            await asyncio.sleep(0.2)
        assert publisher.is_usable()
        assert len(broker.sessions) == 1


async def test_a_silent_peer_is_dead_soon_enough_to_publish_again_elsewhere(broker: ScriptedBroker) -> None:
    """As after the crash of a machine: nothing is closed, nothing is said. The heartbeat tells, before the deadline."""
    async with TcpProxy("127.0.0.1", broker.port) as proxy:
        url = broker.url.replace(f":{broker.port}", f":{proxy.port}")
        async with connected(url, amqp_heartbeat_s=1) as publisher:
            assert list(await publish(publisher, 1, "A")) == [ACKED]
            proxy.black_hole()
            batch = publish(publisher, 2, "B")
            await asyncio.sleep(0.1)
            proxy.pass_through()  # for new connections
            assert list(await batch) == [ACKED] * 2
            assert publisher.republished == 2
            assert len(broker.sessions) == 2
            assert is_idle(publisher)


async def test_a_quiet_peer_that_sends_heartbeats_is_not_dead(broker: ScriptedBroker) -> None:
    async with connected(broker.url, amqp_heartbeat_s=1) as publisher:
        await asyncio.sleep(1 + reconnection.HEARTBEAT_MARGIN_S + 1.0)
        assert publisher.is_usable()
        assert len(broker.sessions) == 1


# Topology


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


async def test_where_topology_is_only_checked_nothing_is_declared(broker: ScriptedBroker) -> None:
    """For operators whose gateway may not configure the broker."""
    async with connected(broker.url, amqp_exchange="ex", amqp_queue="q", amqp_topology="check"):
        pass
    assert [described(frame)[:2] for frame in broker.topology] == [("check exchange", "ex"), ("check queue", "q")]


async def test_a_queue_with_other_arguments_is_said_so_and_tried_again(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(declare: Declare) -> tuple[int, str] | None:
        if isinstance(declare, commands.Queue.Declare) and declare.queue == "sms.outbound":
            return 406, "PRECONDITION_FAILED - inequivalent arg 'x-queue-type' for queue 'sms.outbound'"
        return None

    broker.on_declare = refuse
    async with started(broker.url) as publisher:
        await broker.wait_opened(3)
        assert not publisher.is_usable()
        assert not publisher.connections.was_connected
        with pytest.raises(QueueUnavailable):
            await publish(publisher, 1)
        broker.on_declare = None  # the operator has removed the old queue
        await eventually(publisher.is_usable)
        assert list(await publish(publisher, 1)) == [ACKED]
    assert "inequivalent arg 'x-queue-type'" in caplog.text
    assert "GATEWAY_AMQP_TOPOLOGY=check" in caplog.text


async def test_a_missing_queue_is_said_so_and_tried_again(
    broker: ScriptedBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker.on_declare = lambda declare: (404, "NOT_FOUND - no exchange 'sms.outbound' in vhost '/'")
    async with started(broker.url, amqp_topology="check") as publisher:
        await broker.wait_opened(2)
        assert not publisher.is_usable()
        broker.on_declare = None
        await eventually(publisher.is_usable)
    assert "no exchange 'sms.outbound'" in caplog.text


# The end


async def test_closing_settles_what_is_pending_as_unknown_at_once(broker: ScriptedBroker) -> None:
    """Nobody will come back to confirm it, so nobody is left to wait for it until the deadline."""
    broker.mode = "silent"
    publisher = Publisher(settings_for(broker.url, amqp_connections=2, confirm_timeout_s=60.0))
    publisher.start()
    await eventually(lambda: usable_connections(publisher) == 2)
    batch = publish(publisher, 3)
    await broker.wait_published(3)
    broker.sessions[broker.published[0].connection].ack(1)
    await publisher.close()
    try:
        async with asyncio.timeout(5.0):
            assert list(await asyncio.shield(batch)) == [ACKED, UNKNOWN, UNKNOWN]
    finally:
        batch.cancel()
    assert is_idle(publisher)
    assert not publisher.is_usable()
    with pytest.raises(QueueUnavailable):
        await publisher.publish(Outgoing(ids(1), payloads(1)))
    assert len(broker.published) == 3
    await asyncio.gather(*(session.closed.wait() for session in broker.sessions))


async def test_closing_says_goodbye_to_the_broker(broker: ScriptedBroker) -> None:
    goodbyes: list[Session] = []

    def listen(session: Session, channel: int, method: Frame) -> bool:
        if isinstance(method, commands.Connection.Close):
            goodbyes.append(session)
        return False

    broker.on_method = listen
    async with connected(broker.url, amqp_connections=2):
        pass
    assert sorted(session.index for session in goodbyes) == [0, 1]


async def test_a_broker_that_reads_no_more_cannot_hold_the_closing_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under an alarm: our goodbye would wait behind a batch that the broker does not take."""
    monkeypatch.setattr(reconnection, "CLOSE_TIMEOUT_S", 0.1)
    async with asyncio.timeout(10.0), scripted_broker(receive_buffer=4_096) as broker:
        async with connected(broker.url) as publisher:
            broker.sessions[0].pause_reading()
            batch = asyncio.create_task(publisher.publish(Outgoing(ids(1), [b"x" * 10_000_000])))
            await eventually(lambda: publisher.unconfirmed_messages == 1)
        assert list(await batch) == [UNKNOWN]
        broker.sessions[0].resume_reading()  # to notice that we are gone
        await broker.sessions[0].closed.wait()


async def test_closing_while_connecting_leaves_nothing_behind() -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(scripted_broker())
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", broker.port))
        proxy.black_hole()
        async with started(f"amqp://guest:guest@127.0.0.1:{proxy.port}/"):
            await eventually(lambda: proxy.accepted == 1)


@pytest.fixture(autouse=True)
def no_message_text_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.INFO, logger="gateway")
    yield
    assert '{"n":' not in caplog.text


def test_after_days_of_failures_the_delay_is_still_a_delay() -> None:
    shortest, longest = reconnection.RECONNECT_DELAYS_S
    assert all(shortest <= reconnect_delay_s(failures) <= longest for failures in (0, 1, 10, 1_100, 10**6))


async def test_a_cancellation_that_is_absorbed_on_the_way_does_not_hold_the_closing_up(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a handshake aiormq swallows it, and the connection opens all the same."""
    opening = asyncio.Event()
    open_for_real = PublishConnection.open

    async def open_absorbing(connection: PublishConnection) -> None:
        await open_for_real(connection)
        opening.set()
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)

    monkeypatch.setattr(PublishConnection, "open", open_absorbing)
    publisher = Publisher(settings_for(broker.url))
    publisher.start()
    await opening.wait()
    async with asyncio.timeout(10):
        await publisher.close()
