"""The scripted broker behaves as its script says, as seen by an independent client: aio-pika."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import aio_pika
import aiormq
import pytest
from aio_pika.exceptions import DeliveryError, PublishError
from aiormq.exceptions import ChannelNotFoundEntity, ChannelPreconditionFailed, ConnectionNotAllowed
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import marshal, unmarshal
from pamqp.header import ContentHeader, ProtocolHeader

from tests.support.scripted_broker import Published, ScriptedBroker, Session

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractChannel, AbstractConnection


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    before = asyncio.all_tasks()
    async with ScriptedBroker() as broker:
        yield broker
    assert asyncio.all_tasks() - before == {asyncio.current_task()}


@asynccontextmanager
async def connected(broker: ScriptedBroker) -> AsyncIterator[AbstractConnection]:
    connection = await aio_pika.connect(broker.url)
    try:
        yield connection
    finally:
        await connection.close()


async def channel_of(connection: AbstractConnection) -> AbstractChannel:
    return await connection.channel(publisher_confirms=True, on_return_raises=True)


def publishing(channel: AbstractChannel, *bodies: bytes) -> list[asyncio.Task[Any]]:
    publish = channel.default_exchange.publish
    return [
        asyncio.create_task(publish(aio_pika.Message(body, message_id=f"m{n}"), "queue"))
        for n, body in enumerate(bodies, start=1)
    ]


async def test_a_publish_is_recorded_and_confirmed(broker: ScriptedBroker) -> None:
    async with connected(broker) as connection:
        channel = await channel_of(connection)
        confirm = await channel.default_exchange.publish(aio_pika.Message(b"hello", message_id="m1"), "queue")

    assert isinstance(confirm, commands.Basic.Ack)
    [message] = broker.published
    assert (message.connection, message.channel, message.delivery_tag) == (0, 1, 1)
    assert (message.exchange, message.routing_key, message.mandatory) == ("", "queue", True)
    assert (message.properties.message_id, message.body, message.body_frames) == ("m1", b"hello", 1)
    assert broker.violations == []


async def test_every_topology_is_agreed_to_and_remembered(broker: ScriptedBroker) -> None:
    async with connected(broker) as connection:
        channel = await channel_of(connection)
        await channel.set_qos(10)
        exchange = await channel.declare_exchange("sms")
        queue = await channel.declare_queue("sms.0", passive=True)
        await queue.bind(exchange, "0")

    assert [frame.name for frame in broker.topology] == ["Exchange.Declare", "Queue.Declare", "Queue.Bind"]


async def test_a_declare_can_be_refused(broker: ScriptedBroker) -> None:
    broker.on_declare = lambda declare: (404, "NOT_FOUND - no queue 'gone'")
    async with connected(broker) as connection:
        channel = await channel_of(connection)
        with pytest.raises(ChannelNotFoundEntity, match="no queue 'gone'"):
            await channel.declare_queue("gone", passive=True)


async def test_a_method_can_be_left_unanswered(broker: ScriptedBroker) -> None:
    broker.on_method = lambda session, channel, frame: isinstance(frame, commands.Queue.Declare)
    async with connected(broker) as connection:
        channel = await channel_of(connection)
        with pytest.raises(TimeoutError):
            await channel.declare_queue("slow", timeout=0.05)
    assert broker.violations == []


async def test_a_nacked_message_raises(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker) as connection:
        [publish] = publishing(await channel_of(connection), b"hello")
        await broker.wait_published(1)
        broker.sessions[0].nack(1)
        with pytest.raises(DeliveryError):
            await publish


async def test_multiple_covers_all_up_to_its_tag_and_no_further(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker) as connection:
        first, second, third = publishing(await channel_of(connection), b"1", b"2", b"3")
        await broker.wait_published(3)
        broker.sessions[0].ack(2, multiple=True)
        await asyncio.gather(first, second)
        assert not third.done()
        broker.sessions[0].nack(3)
        with pytest.raises(DeliveryError):
            await third


async def test_what_a_hook_settled_the_default_ack_leaves_alone(broker: ScriptedBroker) -> None:
    broker.on_publish = lambda session, message: session.nack(message.delivery_tag)
    async with connected(broker) as connection:
        [publish] = publishing(await channel_of(connection), b"hello")
        with pytest.raises(DeliveryError):
            await publish


class Wire(asyncio.Protocol):
    """A client that sends given bytes and keeps each chunk as the kernel returned it."""

    def __init__(self) -> None:
        self.chunks: list[bytes] = []
        self.more = asyncio.Event()
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.write(ProtocolHeader().marshal())
        self.say(0, commands.Connection.StartOk({}, "PLAIN", "\0guest\0guest"))
        self.say(0, commands.Connection.TuneOk(2047, 131_072, 0))
        self.say(0, commands.Connection.Open("/"))
        self.say(1, commands.Channel.Open(), commands.Confirm.Select())

    def data_received(self, data: bytes) -> None:
        self.chunks.append(data)
        self.more.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.set()

    async def heard(self, n: int) -> None:
        async with asyncio.timeout(5):
            while len(self.chunks) < n:
                self.more.clear()
                await self.more.wait()

    def say(self, channel: int, *frames: Any) -> None:
        self.transport.write(b"".join(marshal(frame, channel) for frame in frames))

    def publish(self, body: bytes) -> None:
        """Send a publish. The caller sends the frames of the body, unless the body is empty."""
        self.say(1, commands.Basic.Publish(routing_key="q"), ContentHeader(body_size=len(body)))

    def frames(self) -> list[str]:
        names, data = [], b"".join(self.chunks)
        while data:
            size, _, frame = unmarshal(data)
            names.append(frame.name)
            data = data[size:]
        return names


@asynccontextmanager
async def wired(broker: ScriptedBroker) -> AsyncIterator[tuple[Wire, Session]]:
    loop = asyncio.get_running_loop()
    transport, wire = await loop.create_connection(Wire, "127.0.0.1", broker.port)
    try:
        session = await broker.wait_opened(1)
        while wire.frames()[-1:] != ["Confirm.SelectOk"]:
            await wire.heard(len(wire.chunks) + 1)
        wire.chunks.clear()
        yield wire, session
    finally:
        transport.abort()
        await wire.lost.wait()


async def test_a_returned_message_reaches_the_client_before_its_ack(broker: ScriptedBroker) -> None:
    broker.on_publish = lambda session, message: session.return_(message.delivery_tag)
    async with connected(broker) as connection:
        [publish] = publishing(await channel_of(connection), b"hello")
        with pytest.raises(PublishError) as returned:
            await publish

    message, frame = returned.value.message, returned.value.frame
    assert message is not None
    assert isinstance(frame, commands.Basic.Return)
    assert (frame.reply_code, frame.reply_text, message.body) == (312, "NO_ROUTE", b"hello")


async def test_what_is_said_together_arrives_in_one_chunk(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with wired(broker) as (wire, session):
        wire.publish(b"")
        wire.publish(b"")
        await broker.wait_published(2)
        with session.together():
            session.return_(1)
            session.ack(1)
            session.nack(2)
        await wire.heard(1)
        assert len(wire.chunks) == 1
        assert wire.frames() == ["Basic.Return", "ContentHeader", "Basic.Ack", "Basic.Nack"]


async def test_one_read_gives_one_ack_for_all_of_it(broker: ScriptedBroker) -> None:
    async with wired(broker) as (wire, session):
        one = marshal(commands.Basic.Publish(routing_key="q"), 1) + marshal(ContentHeader(), 1)
        wire.transport.write(one * 1000)
        await broker.wait_published(1000)
        await wire.heard(1)
        assert session.reads == 1
        assert wire.chunks == [marshal(commands.Basic.Ack(1000, multiple=True), 1)]


async def test_dribbled_bytes_arrive_one_by_one(broker: ScriptedBroker) -> None:
    async with wired(broker) as (wire, session):
        session.write_size = 1
        wire.publish(b"")
        ack = marshal(commands.Basic.Ack(1, multiple=True), 1)
        await wire.heard(len(ack))
        assert wire.chunks == [bytes([byte]) for byte in ack]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8])
async def test_a_client_lives_through_every_cut_of_the_frames(broker: ScriptedBroker, size: int) -> None:
    broker.write_size = size  # from the handshake on
    broker.on_publish = lambda session, message: session.return_(message.delivery_tag) if message.body == b"2" else None
    async with connected(broker) as connection:
        outcomes = await asyncio.gather(
            *publishing(await channel_of(connection), b"1", b"2", b"3"), return_exceptions=True
        )
    assert [type(outcome) for outcome in outcomes] == [commands.Basic.Ack, PublishError, commands.Basic.Ack]


async def test_a_body_of_several_frames_comes_and_returns_intact() -> None:
    body = bytes(range(256)) * 100
    async with ScriptedBroker(frame_max=4096) as broker:
        broker.on_publish = lambda session, message: session.return_(message.delivery_tag)
        async with connected(broker) as connection:
            [publish] = publishing(await channel_of(connection), body)
            with pytest.raises(PublishError) as returned:
                await publish
    [message] = broker.published
    assert message.body == body
    assert message.body_frames == -(-len(body) // 4088)
    assert returned.value.message is not None
    assert returned.value.message.body == body


async def test_a_closed_channel_fails_what_is_in_flight_and_spares_the_connection(
    broker: ScriptedBroker,
) -> None:
    broker.mode = "silent"
    async with connected(broker) as connection:
        [publish] = publishing(await channel_of(connection), b"hello")
        await broker.wait_published(1)
        broker.sessions[0].close_channel(406, "PRECONDITION_FAILED - invalid expiration")
        with pytest.raises(ChannelPreconditionFailed, match="invalid expiration"):
            await publish
        broker.mode = "ack"
        await asyncio.gather(*publishing(await channel_of(connection), b"again"))
    assert [message.delivery_tag for message in broker.published] == [1, 1]
    assert broker.violations == []


async def test_a_closed_connection_gives_its_reason(broker: ScriptedBroker) -> None:
    broker.mode = "silent"
    async with connected(broker) as connection:
        [publish] = publishing(await channel_of(connection), b"hello")
        await broker.wait_published(1)
        broker.sessions[0].close_connection(530, "NOT_ALLOWED - vhost deleted")
        with pytest.raises(ConnectionNotAllowed, match="vhost deleted"):
            await publish
        await asyncio.wait_for(broker.sessions[0].closed.wait(), 5)


async def test_a_dropped_connection_fails_what_is_in_flight_but_not_what_was_acked(
    broker: ScriptedBroker,
) -> None:
    def ack_the_first_then_drop(session: Session, message: Published) -> None:
        if message.delivery_tag == 2:
            session.ack(1)
            session.drop()

    broker.mode = "silent"
    broker.on_publish = ack_the_first_then_drop
    async with connected(broker) as connection:
        first, second = publishing(await channel_of(connection), b"1", b"2")
        await first
        with pytest.raises((aiormq.exceptions.AMQPError, ConnectionError, asyncio.CancelledError)):
            await second


async def test_a_drop_is_a_reset(broker: ScriptedBroker) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    await broker.wait_until(lambda: len(broker.sessions) == 1)
    broker.sessions[0].drop()
    with pytest.raises(ConnectionResetError):
        await reader.read()
    writer.close()


async def test_what_comes_after_a_drop_is_as_if_never_received(broker: ScriptedBroker) -> None:
    broker.on_publish = lambda session, message: session.drop() if message.delivery_tag == 3 else None
    async with wired(broker) as (wire, _):
        one = marshal(commands.Basic.Publish(routing_key="q"), 1) + marshal(ContentHeader(), 1)
        wire.transport.write(one * 5)
        await asyncio.wait_for(wire.lost.wait(), 5)
        assert wire.chunks == []
    assert len(broker.published) == 3


async def test_hanging_up_says_what_is_left_to_say_and_no_more(broker: ScriptedBroker) -> None:
    async with wired(broker) as (wire, session):
        session.write_size = 5
        session.send(1, commands.Basic.Ack(1))
        session.hang_up()
        await asyncio.wait_for(wire.lost.wait(), 5)
        assert wire.frames() == ["Basic.Ack"]


async def test_with_several_channels_the_script_has_to_say_which(broker: ScriptedBroker) -> None:
    async with connected(broker) as connection:
        await channel_of(connection)
        await channel_of(connection)
        with pytest.raises(ValueError, match=r"\[1, 2\] are open"):
            broker.sessions[0].ack(1)


async def test_blocked_and_unblocked_are_seen(broker: ScriptedBroker, caplog: pytest.LogCaptureFixture) -> None:
    connection = await aiormq.connect(broker.url)
    session = await broker.wait_opened(1)
    assert isinstance(connection, aiormq.Connection)
    session.blocked("low on disk")
    async with asyncio.timeout(5):
        while "was blocked by: 'low on disk'" not in caplog.text:  # noqa: ASYNC110 - aiormq shows no more
            await asyncio.sleep(0.001)
    ready = asyncio.create_task(connection.ready())
    await asyncio.sleep(0.02)
    assert not ready.done()
    session.unblocked()
    await asyncio.wait_for(ready, 5)
    await connection.close()


async def test_a_client_that_asks_for_heartbeats_gets_them_until_told_otherwise(
    broker: ScriptedBroker,
) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", broker.port)
    writer.write(ProtocolHeader().marshal())
    for frame in (
        commands.Connection.StartOk({}, "PLAIN", "\0guest\0guest"),
        commands.Connection.TuneOk(2047, 131_072, 1),
        commands.Connection.Open("/"),
    ):
        writer.write(marshal(frame, 0))
    beat = b"\x08\0\0\0\0\0\0\xce"
    await asyncio.wait_for(reader.readuntil(beat), 2)
    broker.send_heartbeats = False
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readuntil(beat), 0.8)
    writer.close()
    await writer.wait_closed()


async def test_a_paused_broker_pushes_back_on_the_client() -> None:
    async with ScriptedBroker(receive_buffer=4096) as broker, wired(broker) as (wire, session):
        session.pause_reading()
        before = session.bytes_received
        one = marshal(commands.Basic.Publish(routing_key="q"), 1) + marshal(ContentHeader(), 1)
        wire.transport.write(one * 150_000)
        await asyncio.sleep(0.05)
        assert wire.transport.get_write_buffer_size() > 0
        assert session.bytes_received == before
        session.resume_reading()
        await broker.wait_until(lambda: session.bytes_received > before)


async def test_a_frame_over_frame_max_costs_the_connection(broker: ScriptedBroker) -> None:
    async with wired(broker) as (wire, session):
        wire.publish(b"x" * 200_000)
        wire.say(1, ContentBody(b"x" * (131_072 - 8 + 1)))
        await broker.wait_until(lambda: bool(broker.violations))
        assert broker.violations[0].code == 501
        wire.say(0, commands.Connection.CloseOk())
        await asyncio.wait_for(session.closed.wait(), 5)


async def test_a_refusing_broker_lets_nobody_in_until_it_relents(broker: ScriptedBroker) -> None:
    broker.refuse_connections = True
    with pytest.raises(aiormq.exceptions.AMQPConnectionError):
        await aio_pika.connect(broker.url)
    broker.refuse_connections = False
    await broker.stop_listening()
    with pytest.raises(aiormq.exceptions.AMQPConnectionError):
        await aio_pika.connect(broker.url)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", broker.port)) != 0
    await broker.start_listening()
    async with connected(broker) as connection:
        await asyncio.gather(*publishing(await channel_of(connection), b"at last"))


async def test_an_error_in_the_script_fails_the_test() -> None:
    def bad_script(session: Session, message: Published) -> None:
        raise ZeroDivisionError

    async def run() -> None:
        async with ScriptedBroker() as broker, wired(broker) as (wire, _):
            broker.on_publish = bad_script
            wire.publish(b"")
            await broker.wait_until(lambda: False)

    with pytest.raises(ZeroDivisionError):
        await run()
