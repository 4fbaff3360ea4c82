"""Closing the publisher settles pending batches, closes connections in order, and leaves nothing. Promise 11."""

import asyncio
from contextlib import AsyncExitStack, suppress

import pytest
from pamqp import commands
from pamqp.base import Frame
from yarl import URL

from gateway.amqp import connection as connection_module
from gateway.amqp import reconnection
from gateway.amqp.connection import PublishConnection
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.publisher import Publisher
from gateway.errors import QueueUnavailable
from tests.support.eventually import eventually
from tests.support.publishing import (
    ACKED,
    UNKNOWN,
    connected,
    ids,
    is_idle,
    publish,
    publish_batch,
    scripted_broker,
    settings_for,
    started,
    usable_connections,
)
from tests.support.scripted_broker import ScriptedBroker, Session
from tests.support.tcp_proxy import TcpProxy


async def test_closing_settles_what_is_pending_as_unknown_at_once(broker: ScriptedBroker) -> None:
    """No confirm can arrive any more, so no caller waits for one until its deadline."""
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
    assert not publisher.connections.is_usable()
    with pytest.raises(QueueUnavailable):
        await publish_batch(publisher, 1)
    assert len(broker.published) == 3
    await asyncio.gather(*(session.closed.wait() for session in broker.sessions))


async def test_closing_closes_the_amqp_connections_in_order(broker: ScriptedBroker) -> None:
    goodbyes: list[Session] = []

    def listen(session: Session, channel: int, method: Frame) -> bool:
        if isinstance(method, commands.Connection.Close):
            goodbyes.append(session)
        return False

    broker.on_method = listen
    async with connected(broker.url, amqp_connections=2):
        pass
    assert sorted(session.index for session in goodbyes) == [0, 1]


async def test_a_broker_that_stops_reading_does_not_delay_closing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an alarm the broker does not read, and a close would wait behind the batch."""
    monkeypatch.setattr(reconnection, "CLOSE_TIMEOUT_S", 0.1)
    async with asyncio.timeout(10.0), scripted_broker(receive_buffer=4_096) as broker:
        async with connected(broker.url) as publisher:
            broker.sessions[0].pause_reading()
            batch = publish(publisher, [b"x" * 10_000_000])
            await eventually(lambda: publisher.unconfirmed_messages == 1)
        assert list(await batch) == [UNKNOWN]
        broker.sessions[0].resume_reading()  # to notice that we are gone
        await broker.sessions[0].closed.wait()


async def test_a_broker_that_does_not_read_a_close_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection is replaced only after that."""
    monkeypatch.setattr(connection_module, "CLOSE_TIMEOUT_S", 0.1)
    async with scripted_broker(receive_buffer=4_096) as broker:
        connection = PublishConnection(settings_for(broker.url), URL(broker.url), lambda _late: None)
        await connection.open()
        broker.sessions[0].pause_reading()
        outgoing = Outgoing(ids(1), [b"x" * 10_000_000])
        batch = asyncio.create_task(connection.publish(outgoing, asyncio.get_running_loop().time() + 60))
        await eventually(lambda: connection.unconfirmed_messages == 1)
        async with asyncio.timeout(5.0):
            await connection.close()
        assert connection.is_lost
        assert list(await batch) == [UNKNOWN]
        broker.sessions[0].resume_reading()


async def test_closing_while_connecting_leaves_nothing_behind() -> None:
    async with AsyncExitStack() as stack:
        broker = await stack.enter_async_context(scripted_broker())
        proxy = await stack.enter_async_context(TcpProxy("127.0.0.1", broker.port))
        proxy.black_hole()
        async with started(f"amqp://guest:guest@127.0.0.1:{proxy.port}/"):
            await eventually(lambda: proxy.accepted == 1)


async def test_an_absorbed_cancellation_does_not_delay_closing(
    broker: ScriptedBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a handshake aiormq absorbs a cancellation, and the connection opens all the same."""
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
