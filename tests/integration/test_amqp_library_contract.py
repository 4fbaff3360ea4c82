"""The names and behaviour of aio-pika, aiormq and pamqp that gateway/amqp relies on.

The publisher bypasses the libraries' own publishing, through names that they do not document. After an update of a
library, these tests show which of them has changed.
"""

import asyncio
import inspect
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import aio_pika
import aiormq
import aiormq.connection
import aiormq.exceptions
import pamqp.frame
import pytest
from aio_pika.abc import AbstractConnection
from aiormq.abc import AbstractChannel
from aiormq.abc import AbstractConnection as AiormqConnection
from aiormq.connection import TransportFactory
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.frame import marshal, unmarshal
from pamqp.header import ContentHeader
from yarl import URL

from gateway.amqp.frames import HEARTBEAT_FRAME
from tests.support.eventually import eventually
from tests.support.scripted_broker import ScriptedBroker


@pytest.fixture
async def broker() -> AsyncIterator[ScriptedBroker]:
    async with ScriptedBroker() as scripted:
        yield scripted
        assert scripted.violations == []


class Recorder(TransportFactory):
    """A transport factory like the publisher's: it records its calls, and puts a protocol of its own in between."""

    def __init__(self) -> None:
        self.calls: list[tuple[URL, dict[str, Any]]] = []
        self.inject = b""  # put before the next bytes that come
        self.protocol: asyncio.StreamReaderProtocol | None = None
        self.transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        self.calls.append((url, dict(kwargs)))
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = self.protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        self.transport, _ = await loop.create_connection(lambda: protocol, url.host or "", url.port or 0)
        return reader, asyncio.StreamWriter(self.transport, protocol, reader, loop)


class Opened:
    """An aio-pika connection through a Recorder, with a channel in confirm mode, as the publisher opens them."""

    def __init__(self, broker: ScriptedBroker, *, heartbeat: int = 600) -> None:
        self.transports = Recorder()
        url = URL(broker.url).update_query(heartbeat=heartbeat, name="sms-gateway")
        self.connection: AbstractConnection = aio_pika.Connection(url)
        self.connection.kwargs["transport_factory"] = self.transports

    async def __aenter__(self) -> "Opened":
        await self.connection.connect()
        channel = self.connection.channel(publisher_confirms=True)
        await channel.initialize()
        self.underlay: AbstractChannel = await channel.get_underlay_channel()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.connection.close()

    @property
    def aiormq_connection(self) -> AiormqConnection:
        transport = self.connection.transport
        assert transport is not None
        return transport.connection


def test_the_versions_are_those_that_were_read() -> None:
    assert version("aiormq") == "7.2.4", (
        "publisher.py was written against the source of aiormq 7.2.4: read the differences (connection.py, "
        "channel.py), run tests/integration/publisher, then change the pin here and in pyproject.toml"
    )
    assert version("aio-pika").startswith("10.2."), "publisher.py uses aio_pika.Connection.kwargs, see below"
    assert version("pamqp").startswith("4."), "frames.py packs headers by pamqp's marshalled form"


async def test_the_transport_factory_is_handed_to_aiormq_and_called_with_the_url(broker: ScriptedBroker) -> None:
    async with Opened(broker) as opened:
        ((url, arguments),) = opened.transports.calls
        assert (url.host, url.port) == ("127.0.0.1", broker.port), "_TappedTransport.create connects to url.host/port"
        assert set(arguments) == {"ssl_context_provider"}, (
            "_TappedTransport.create pops ssl_context_provider and gives the rest to loop.create_connection"
        )
        assert inspect.iscoroutinefunction(arguments["ssl_context_provider"].get_context), (
            "_TappedTransport.create awaits ssl_context_provider.get_context() for amqps"
        )
    assert len(broker.sessions) == 1, "aiormq opened a connection of its own beside the factory's: no tap in it"


async def test_the_kwargs_of_a_connection_can_be_added_to_after_it_is_made() -> None:
    connection = aio_pika.Connection(URL("amqp://h/"))
    assert isinstance(connection.kwargs, dict), "_PublishConnection puts its transport_factory into connection.kwargs"
    assert "transport_factory" in inspect.signature(aiormq.connection.Connection.__init__).parameters, (
        "aio-pika passes connection.kwargs on to aiormq.Connection, which would no longer take a transport_factory"
    )


async def test_a_url_without_a_port_gets_amqps_own() -> None:
    """_TappedTransport.create passes `url.port or 0`: 0 would connect nowhere."""
    assert aiormq.connection.Connection(URL("amqp://h/")).url.port == 5672
    assert aiormq.connection.Connection(URL("amqps://h/")).url.port == 5671


async def test_the_number_of_the_publish_channel_is_known(broker: ScriptedBroker) -> None:
    """PublishFramer writes it into every frame, and the tap listens to it."""
    async with Opened(broker) as opened:
        assert isinstance(opened.underlay.number, int)
        await opened.underlay.basic_publish(b"x", routing_key="q")
        assert broker.published[0].channel == opened.underlay.number, "underlay.number is not the channel on the wire"


async def test_the_agreed_frame_size_is_known() -> None:
    async with ScriptedBroker(frame_max=8_192) as broker, Opened(broker) as opened:
        assert opened.underlay.connection.connection_tune.frame_max == 8_192, (
            "PublishFramer splits bodies by it: too large a frame costs the connection"
        )
        assert broker.sessions[0].frame_max == 8_192


async def test_heartbeat_and_name_are_taken_from_the_url(broker: ScriptedBroker) -> None:
    async with Opened(broker, heartbeat=7):
        assert broker.sessions[0].heartbeat == 7, "GATEWAY_AMQP_HEARTBEAT_S would have no effect"
        assert broker.sessions[0].client_properties["connection_name"] == "sms-gateway", (
            "operators would not recognise us in the management interface"
        )


async def test_a_channel_opened_with_publisher_confirms_is_in_confirm_mode(broker: ScriptedBroker) -> None:
    selected: list[int] = []

    def listen(session: object, channel: int, method: object) -> bool:
        if isinstance(method, commands.Confirm.Select):
            selected.append(channel)
        return False

    broker.on_method = listen
    async with Opened(broker) as opened:
        assert selected == [opened.underlay.number], "without confirm.select no ack would ever come"


async def test_delivery_tags_count_from_1_for_frames_written_past_the_library(broker: ScriptedBroker) -> None:
    """ConfirmTracker counts by itself: aiormq must not use up a tag while opening."""
    async with Opened(broker) as opened:
        assert opened.transports.transport is not None
        frames: list[Any] = [commands.Basic.Publish(exchange="", routing_key="q"), ContentHeader(body_size=1)]
        raw = b"".join(marshal(frame, opened.underlay.number) for frame in [*frames, ContentBody(b"x")])
        opened.transports.transport.write(raw)
        (message,) = await broker.wait_published(1)
        assert message.delivery_tag == 1


async def test_aiormq_reads_what_a_protocol_of_ours_feeds_it_and_takes_our_heartbeat(broker: ScriptedBroker) -> None:
    """_Tap is a StreamReaderProtocol: it feeds a heartbeat of its own, and aiormq takes the peer for alive."""
    async with Opened(broker) as opened:
        stamp = "_Connection__last_frame_time"
        connection = opened.aiormq_connection
        assert hasattr(connection, stamp), "this test looks at it to see that the heartbeat was read"
        before = getattr(connection, stamp)
        assert opened.transports.protocol is not None
        opened.transports.protocol.data_received(HEARTBEAT_FRAME)
        await eventually(lambda: getattr(connection, stamp) > before, timeout=5.0)
        assert not connection.is_closed, "the synthetic heartbeat of _Tap.data_received closes the connection"


async def test_a_heartbeat_before_the_first_frame_is_not_taken(broker: ScriptedBroker) -> None:
    """_Tap must not invent heartbeats before the connection is open."""

    class TooEarly(Recorder):
        async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
            reader, writer = await super().create(url, **kwargs)
            reader.feed_data(HEARTBEAT_FRAME)
            return reader, writer

    connection = aio_pika.Connection(URL(broker.url))
    connection.kwargs["transport_factory"] = TooEarly()
    with pytest.raises(aiormq.exceptions.InvalidFrameError, match=r"Expected Connection\.Start"):
        await connection.connect()
    await connection.close()


async def test_the_grace_before_a_silent_peer_is_given_up_is_known(broker: ScriptedBroker) -> None:
    """Aiormq gives up after 3 × (heartbeat + 1) s, which is too late for the publisher."""
    async with Opened(broker, heartbeat=4) as opened:
        assert opened.aiormq_connection._Connection__heartbeat_grace_timeout == 15  # type: ignore[attr-defined]


async def test_the_loss_of_the_transport_reaches_a_stream_reader_protocol(broker: ScriptedBroker) -> None:
    """The publisher learns of a loss by _Tap.connection_lost: aiormq must not swap the protocol."""
    opened = Opened(broker)
    async with opened:
        assert opened.transports.transport is not None
        assert opened.transports.transport.get_protocol() is opened.transports.protocol
        broker.sessions[0].drop()
        await eventually(opened.transports.transport.is_closing, timeout=5.0)


async def test_a_channel_close_is_answered_and_a_connection_close_ends_the_transport(broker: ScriptedBroker) -> None:
    """The tap only notes them; aiormq answers."""
    answered: list[object] = []

    def listen(session: object, channel: int, method: object) -> bool:
        answered.append(type(method))
        return False

    async with Opened(broker) as opened:
        broker.on_method = listen
        broker.sessions[0].close_channel(404, "NOT_FOUND")
        await broker.wait_until(lambda: commands.Channel.CloseOk in answered)
        broker.sessions[0].close_connection(320, "CONNECTION_FORCED")
        assert opened.transports.transport is not None
        await eventually(opened.transports.transport.is_closing, timeout=5.0)


def test_pamqp_marshals_a_header_as_the_framer_takes_it_apart() -> None:
    """PublishFramer cuts a marshalled header at its body size and at the message id."""
    header = ContentHeader(
        body_size=0x0102030405060708,
        properties=commands.Basic.Properties(
            content_type="application/json", delivery_mode=2, message_id="00000000", message_type="sms.v1"
        ),
    )
    raw = pamqp.frame.marshal(header, 1)
    assert raw[:1] == b"\x02", "a header frame"
    assert raw[7:11] == b"\x00\x3c\x00\x00", "class 60 (basic) and weight 0 stand before the body size"
    assert raw[11:19] == bytes(range(1, 9)), "the body size stands at byte 11, 8 bytes long"
    assert raw[19:].count(b"00000000") == 1, "the framer splits the header at the id"
    assert raw[-1:] == b"\xce"


def test_pamqp_reads_a_header_that_is_followed_by_other_bytes() -> None:
    """IncomingFrames gives ContentHeader.unmarshal the buffer from the header on, with whatever stands behind."""
    properties = commands.Basic.Properties(message_id="AbC12345")
    raw = marshal(ContentHeader(body_size=5, properties=properties), 1)
    header = ContentHeader()
    header.unmarshal(raw[7:] + b"anything")
    assert (header.body_size, header.properties.message_id) == (5, "AbC12345")
    assert unmarshal(raw)[2].body_size == 5  # type: ignore[union-attr]
