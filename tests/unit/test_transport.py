"""The transport joins small writes, and its tap gives the library heartbeats; addresses of nodes."""

import asyncio
import gc
import warnings

import aiormq.exceptions
import pytest
from pamqp import commands
from pamqp.frame import marshal
from yarl import URL

from gateway import config
from gateway.amqp.frames import HEARTBEAT_FRAME, Event, Settled
from gateway.amqp.transport import (
    TappedTransport,
    _Tap,
    address,
    prepare_connection,
    reason,
    stray_cancellation_is_loss,
)

CHANNEL = 3
ACK = marshal(commands.Basic.Ack(1), CHANNEL)


class Wire(asyncio.Transport):
    """A socket's transport that records what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closing = False
        self.error: Exception | None = None  # of writes

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.error is not None:
            raise self.error
        self.written.append(bytes(data))

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
def transport(wire: Wire) -> TappedTransport:
    opened = TappedTransport()
    opened._transport = wire
    return opened


async def test_small_buffers_leave_together_and_in_order_at_the_end_of_a_turn(
    transport: TappedTransport, wire: Wire
) -> None:
    for buffers in ([b"a", b"b", b"c"], [b"d"]):
        for buffer in buffers:
            transport.write(buffer)
        assert wire.written == []
        await asyncio.sleep(0)
        assert wire.written == [b"".join(buffers)]
        wire.written.clear()


async def test_a_large_buffer_leaves_at_once_uncopied_behind_those_before_it(
    transport: TappedTransport, wire: Wire
) -> None:
    large = b"x" * (64 * 1024)
    transport.write(b"a")
    transport.write(large)
    assert wire.written == [b"a", large]
    transport.write(b"b")
    assert len(wire.written) == 2
    await asyncio.sleep(0)
    assert wire.written[2:] == [b"b"]


async def test_small_buffers_leave_before_the_end_of_the_turn_once_they_are_large_together(
    transport: TappedTransport, wire: Wire
) -> None:
    transport.write(b"a" * 40_000)
    transport.write(b"b" * 40_000)
    assert wire.written == [b"a" * 40_000 + b"b" * 40_000]


async def test_a_closing_connection_takes_no_buffer_and_drops_those_it_has(
    transport: TappedTransport, wire: Wire
) -> None:
    transport.write(b"a")
    wire.closing = True
    with pytest.raises(ConnectionResetError):
        transport.write(b"b")
    await asyncio.sleep(0)
    assert wire.written == []
    with pytest.raises(ConnectionResetError):
        TappedTransport().write(b"before it is opened")


@pytest.mark.parametrize("size", [1, 64 * 1024])
async def test_a_write_that_fails_closes_the_connection_and_raises_nothing(
    transport: TappedTransport, wire: Wire, size: int
) -> None:
    """A part of the bytes may have left: that is no refusal to take them."""
    wire.error = MemoryError()
    transport.write(b"x" * size)
    await asyncio.sleep(0)
    assert wire.closing
    with pytest.raises(ConnectionResetError):
        transport.write(b"y")


@pytest.mark.parametrize("scheme", ["amqp", "amqps"])
async def test_a_connection_has_heartbeat_and_name_and_tls_if_its_url_says_so(
    transport: TappedTransport, scheme: str
) -> None:
    settings = config.load({"GATEWAY_DATABASE_URL": "postgres://u:p@h/d", "GATEWAY_AMQP_URL": f"{scheme}://h/"})
    prepared = await prepare_connection(settings, URL(f"{scheme}://h/"), "gateway 1", transport)
    query = prepared.url.query
    assert (query["heartbeat"], query["name"]) == (str(settings.amqp_heartbeat_s), "gateway 1")
    assert prepared.kwargs["transport_factory"] is transport
    assert (prepared.kwargs.get("context") is not None) is (scheme == "amqps")


async def test_a_connection_that_failed_starts_nothing_in_the_thread_that_collects_it(
    transport: TappedTransport,
) -> None:
    settings = config.load({"GATEWAY_DATABASE_URL": "postgres://u:p@h/d", "GATEWAY_AMQP_URL": "amqp://h/"})
    dropped = [await prepare_connection(settings, URL("amqp://h/"), "gateway 1", transport)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        await asyncio.to_thread(dropped.clear)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


class Tapped:
    """A tap with a clock that is set, and what the library and the publisher get from it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.events: list[Event] = []
        self.reader = asyncio.StreamReader()
        self.tap = _Tap(self.reader)
        self.tap._now = lambda: self.now
        self.tap.on_event = self.events.append

    def receive(self, data: bytes) -> bytes:
        """Return what is passed on to the library."""
        before = len(self.reader._buffer)  # type: ignore[attr-defined]
        self.tap.data_received(data)
        return bytes(self.reader._buffer[before:])  # type: ignore[attr-defined]


async def test_beside_confirms_the_library_gets_a_heartbeat_a_second_at_most() -> None:
    tapped = Tapped()
    tapped.tap.frames.channel = CHANNEL
    passed_on = []
    for seconds in (0, 0.5, 0.6, 0.5):
        tapped.now += seconds
        passed_on.append(tapped.receive(ACK))
    assert passed_on == [HEARTBEAT_FRAME, b"", HEARTBEAT_FRAME, b""]
    assert tapped.events == [Settled(True, 1, False)] * 4
    assert tapped.tap.receptions == 4


async def test_a_frame_of_the_broker_replaces_a_heartbeat() -> None:
    tapped, frame = Tapped(), marshal(commands.Connection.Unblocked(), 0)
    tapped.tap.frames.channel = CHANNEL
    assert tapped.receive(frame) == frame
    assert tapped.receive(ACK) == b""


async def test_before_the_channel_is_open_there_is_no_heartbeat() -> None:
    """The library takes none before the first frame of the handshake."""
    assert Tapped().receive(HEARTBEAT_FRAME[:3]) == b""


async def test_the_loss_of_the_socket_is_reported_and_ends_the_librarys_reading() -> None:
    tapped = Tapped()
    lost: list[bool] = []
    tapped.tap.on_lost = lambda: lost.append(True)
    tapped.tap.connection_lost(None)
    assert lost == [True]
    assert tapped.reader.at_eof()


async def test_an_error_in_the_report_of_the_loss_does_not_keep_it_from_the_library() -> None:
    tapped = Tapped()

    def fail() -> None:
        raise KeyError

    tapped.tap.on_lost = fail
    with pytest.raises(KeyError):
        tapped.tap.connection_lost(None)
    assert tapped.reader.at_eof()


async def test_the_reply_with_which_the_broker_closes_is_kept() -> None:
    tapped, transport = Tapped(), TappedTransport()
    assert transport.close_reply == ""
    transport._tap = tapped.tap
    tapped.receive(marshal(commands.Connection.Close(320, "CONNECTION_FORCED", 0, 0), 0))
    assert transport.close_reply == "320 CONNECTION_FORCED"


async def _be_cancelled() -> None:
    async with stray_cancellation_is_loss():
        raise asyncio.CancelledError


async def _wait() -> None:
    async with stray_cancellation_is_loss():
        await asyncio.Event().wait()


async def test_only_a_cancellation_by_the_library_is_a_loss() -> None:
    with pytest.raises(ConnectionResetError):
        await _be_cancelled()
    waiting = asyncio.create_task(_wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ("amqp://user:secret@rabbit/name", "rabbit:5672"),
        ("amqps://user:secret@rabbit/name", "rabbit:5671"),
        ("amqp://user:secret@rabbit:1234/name", "rabbit:1234"),
    ],
)
def test_an_address_has_the_port_also_where_the_url_leaves_it_out(node: str, expected: str) -> None:
    assert address(URL(node)) == expected


@pytest.mark.parametrize(
    ("error", "close_reply", "advice"),
    [
        (OSError("no"), "320 CONNECTION_FORCED", "closed by the broker: 320 CONNECTION_FORCED"),
        (aiormq.exceptions.ChannelPreconditionFailed("no"), "", "Set GATEWAY_AMQP_QUEUE_TYPE"),
        (aiormq.exceptions.ChannelAccessRefused("no"), "", "GATEWAY_AMQP_TOPOLOGY=check"),
        (OSError("no"), "", "OSError no"),
    ],
)
def test_a_reason_says_what_to_do(error: Exception, close_reply: str, advice: str) -> None:
    assert advice in reason(error, close_reply)
