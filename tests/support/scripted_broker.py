"""An AMQP 0-9-1 broker for tests of a publisher, which does exactly what the test's script says.

A real broker acks, returns, nacks and dies when it pleases; what a publisher makes of each order of those
can only be shown when the test chooses the order. So this one shakes hands and agrees to every topology as
RabbitMQ does, records every publish, and leaves the rest to the script:

    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        ...                                   # the client connects to broker.url and publishes
        await broker.wait_published(2)
        session = broker.sessions[0]
        with session.together():              # one write: the client reads the three frames in one chunk
            session.return_(1)
            session.ack(1)
            session.nack(2)

It stores and delivers nothing, and never drops a client for missing heartbeats. It is strict where
RabbitMQ is strict (frame sizes, order of the frames, channels not open): the client is closed with RabbitMQ's
code, and the reason is kept in `broker.violations`. Everything runs in callbacks of the test's own loop: no
task, no thread, no sleep.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, cast

from pamqp import commands
from pamqp.base import Frame
from pamqp.body import ContentBody
from pamqp.exceptions import PAMQPException
from pamqp.frame import FrameTypes, frame_parts, marshal, unmarshal
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType
    from typing import Self

    from pamqp.common import FieldTable

FRAME_OVERHEAD = 8  # bytes of a frame around its payload: type 1, channel 2, size 4, end mark 1
PROTOCOL_HEADER = ProtocolHeader().marshal()
RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER on, 0 s: close() sends RST instead of FIN

SERVER_PROPERTIES: FieldTable = {
    "product": "ScriptedBroker",
    "version": "3.13.0",
    "capabilities": {
        "publisher_confirms": True,
        "exchange_exchange_bindings": True,
        "basic.nack": True,
        "consumer_cancel_notify": True,
        "connection.blocked": True,
        "authentication_failure_close": True,
    },
}

Declare = commands.Exchange.Declare | commands.Queue.Declare


@dataclass(frozen=True, slots=True)
class Published:
    """One message as the broker received it."""

    connection: int  # its session is broker.sessions[connection]
    channel: int
    delivery_tag: int  # counts from 1 after confirm.select; 0 on a channel without confirms
    exchange: str
    routing_key: str
    mandatory: bool
    properties: commands.Basic.Properties
    body: bytes
    body_frames: int


class Violation(Exception):
    """A violation of the protocol by the client, with the code with which RabbitMQ would close the connection."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code} {text}")
        self.code = code
        self.text = text


@dataclass(slots=True)
class _Incoming:
    """A publish whose frames have not all arrived."""

    method: commands.Basic.Publish
    header: ContentHeader | None = None
    body: bytearray = field(default_factory=bytearray)
    frames: int = 0


@dataclass(slots=True)
class _Channel:
    confirming: bool = False
    closing: bool = False  # we sent channel.close: like RabbitMQ, ignore all but the answer to it
    last_tag: int = 0
    incoming: _Incoming | None = None
    published: dict[int, Published] = field(default_factory=dict)
    unsettled: set[int] = field(default_factory=set)

    def settle(self, tag: int, *, multiple: bool) -> None:
        self.unsettled -= {each for each in self.unsettled if each <= tag} if multiple else {tag}


class ScriptedBroker:
    """Listens on a free port of 127.0.0.1 as long as its `async with` block lasts.

    `mode` "ack" answers as a broker with nothing else to do: at the end of each read, one
    `basic.ack(multiple=True)` per channel for all that came so far and that the script has not yet acked or
    nacked itself. "silent" acks nothing. `on_publish` is called for each publish in either mode: in "ack" it
    may return or nack a few and let the ack cover the rest, in "silent" it has the whole say.
    """

    def __init__(self, *, frame_max: int = 131_072, receive_buffer: int | None = None) -> None:
        self.frame_max = frame_max
        # The kernel's, per connection. A small one makes back-pressure felt after few bytes; with 212,992
        # a write of 248 KB came in one read; without it only 64 KB, on a fresh connection (measured).
        self.receive_buffer = receive_buffer
        self.mode: Literal["ack", "silent"] = "ack"
        self.on_publish: Callable[[Session, Published], None] | None = None
        # A refusal is (code, text), for instance (404, "NOT_FOUND - no queue 'x'"); None agrees.
        self.on_declare: Callable[[Declare], tuple[int, str] | None] | None = None
        # Sees every method but basic.publish, first. True: the script has dealt with it, or wants silence.
        self.on_method: Callable[[Session, int, Frame], bool] | None = None
        self.send_heartbeats = True
        self.refuse_connections = False  # new ones are accepted and reset at once
        self.write_size: int | None = None  # what new sessions begin with; see Session.write_size

        self.port = 0
        self.sessions: list[Session] = []  # one per connection of a client, the newest last
        self.published: list[Published] = []
        self.topology: list[Frame] = []  # every declare and bind that was asked for
        self.violations: list[Violation] = []
        self.script_error: Exception | None = None  # what a hook raised; leaving the block raises it again

        self._accepted: list[Session] = []
        self._server: asyncio.Server | None = None
        self._closing = False
        self._changed = asyncio.Event()

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}/"

    async def __aenter__(self) -> Self:
        self._socket = self._bound_socket()
        self.port = self._socket.getsockname()[1]
        await self.start_listening()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        await self.stop_listening()
        self._socket.close()
        await asyncio.sleep(0)  # a connection accepted in this very turn of the loop becomes a session
        for session in self._accepted:
            session.abort()
        for session in self._accepted:
            await session.closed.wait()
        if error is None and self.script_error is not None:
            raise self.script_error

    async def start_listening(self) -> None:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self._accept, sock=self._socket)

    async def stop_listening(self) -> None:
        """Have the kernel refuse new connections; open ones stay."""
        if self._server is not None:
            self._server.close()
            self._server = None
            # Bound but not listening: nobody else gets the port meanwhile.
            self._socket = self._bound_socket()

    async def wait_until(self, happened: Callable[[], bool], timeout: float = 5.0) -> None:
        """Wait for anything that shows in the broker's or a session's attributes."""
        async with asyncio.timeout(timeout):
            while not happened():
                if self.script_error is not None:
                    raise self.script_error
                await self._changed.wait()

    async def wait_published(self, n: int, timeout: float = 5.0) -> list[Published]:
        """Wait until there are at least n messages in all; return them."""
        try:
            await self.wait_until(lambda: len(self.published) >= n, timeout)
        except TimeoutError:
            raise TimeoutError(f"{len(self.published)} of {n} messages came in {timeout} s") from None
        return self.published

    async def wait_opened(self, n: int, timeout: float = 5.0) -> Session:
        """Wait until n connections in all have finished the handshake; return the newest session."""
        await self.wait_until(lambda: sum(each.opened for each in self.sessions) >= n, timeout)
        return self.sessions[-1]

    def _bound_socket(self) -> socket.socket:
        # TCP by name: asyncio leaves Nagle's delay on for sockets whose protocol number is the default 0.
        bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if self.receive_buffer is not None:  # before listen(): the window's scale is fixed at the accept
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_buffer)
        bound.bind(("127.0.0.1", self.port))
        return bound

    def _accept(self) -> Session:
        session = Session(self)
        self._accepted.append(session)
        return session

    def _welcome(self, session: Session) -> None:
        if self._closing or self.refuse_connections:
            session.drop()
        else:
            session.index = len(self.sessions)
            self.sessions.append(session)
            self._stir()

    def _stir(self) -> None:
        """Wake all waiters, to check their condition again."""
        self._changed.set()
        self._changed = asyncio.Event()


class Session(asyncio.Protocol):
    """One client's connection, and what the script can do to it.

    Where an action takes `channel=None` it means the one channel in confirm mode, or else the one that is
    open; with several the script has to say which. On a connection that is gone actions do nothing.
    """

    def __init__(self, broker: ScriptedBroker) -> None:
        self.broker = broker
        self.index = -1  # in broker.sessions; -1 when refused
        self.write_size = broker.write_size  # 1 dribbles byte by byte, n cuts all we say every n bytes
        self.opened = False  # the handshake is through
        self.closed = asyncio.Event()  # the TCP connection is gone
        self.client_properties: FieldTable = {}
        self.heartbeat = 0  # seconds, as the client asked for
        self.frame_max = broker.frame_max
        self.bytes_received = 0
        self.reads = 0  # reads that brought a publish or a part of one; asyncio reads 256 KiB at most
        self._channels: dict[int, _Channel] = {}
        self._closing = False  # we sent connection.close: ignore all but the answer to it
        self._inbox = bytearray()
        self._held: bytearray | None = None
        self._outbox = bytearray()
        self._pumping = False
        self._hang_up_when_said = False
        self._beating: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport | None = None

    # What a script can do: confirms and returns

    def ack(self, tag: int, multiple: bool = False, channel: int | None = None) -> None:
        number, state = self._the_channel(channel)
        state.settle(tag, multiple=multiple)
        self.send(number, commands.Basic.Ack(delivery_tag=tag, multiple=multiple))

    def nack(self, tag: int, multiple: bool = False, channel: int | None = None) -> None:
        number, state = self._the_channel(channel)
        state.settle(tag, multiple=multiple)
        # RabbitMQ leaves requeue false in the nacks it sends to publishers.
        self.send(number, commands.Basic.Nack(delivery_tag=tag, multiple=multiple, requeue=False))

    def return_(self, tag: int, code: int = 312, text: str = "NO_ROUTE", channel: int | None = None) -> None:
        """Return the message. That settles nothing: a real broker's ack for it follows."""
        number, state = self._the_channel(channel)
        message = state.published[tag]
        room = self.frame_max - FRAME_OVERHEAD
        chunks = [message.body[at : at + room] for at in range(0, len(message.body), room)]
        self.send(
            number,
            commands.Basic.Return(code, text, message.exchange, message.routing_key),
            ContentHeader(body_size=len(message.body), properties=message.properties),
            *map(ContentBody, chunks),
        )

    # What a script can do: trouble

    def blocked(self, reason: str = "low on memory") -> None:
        """Send connection.blocked and no more: a real broker also stops reading (`pause_reading`)."""
        self.send(0, commands.Connection.Blocked(reason))

    def unblocked(self) -> None:
        self.send(0, commands.Connection.Unblocked())

    def close_channel(self, code: int, text: str, channel: int | None = None) -> None:
        """Close the channel, by default because of basic.publish, as RabbitMQ does for an unknown exchange."""
        self._close_channel(code, text, commands.Basic.Publish.index, channel)

    def close_connection(self, code: int, text: str) -> None:
        self._closing = True
        self.send(0, commands.Connection.Close(code, text, 0, 0))

    def drop(self) -> None:
        """Reset the TCP connection. Called from a hook, later messages of the same read count as never received.

        Bytes sent before are written first, except those that still wait for a piecewise write.
        """
        if self._transport is None or self.closed.is_set():
            return
        if self._held:
            self._transport.write(bytes(self._held))
            self._held.clear()
        sock = cast("socket.socket", self._transport.get_extra_info("socket"))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.abort()

    def hang_up(self) -> None:
        """Close the TCP connection in order but without AMQP, once everything is written."""
        if self._held or self._pumping:
            self._hang_up_when_said = True
        elif self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close the TCP connection now, without writing what waits."""
        if self._transport is not None:
            self._transport.abort()

    def pause_reading(self) -> None:
        """Stop reading: the client's bytes fill the kernel's buffers, then its own."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    # What a script can do: choose how the bytes go out

    @contextmanager
    def together(self) -> Iterator[None]:
        """Collect all frames sent within the block into one write. Hooks are always called within such a block."""
        if self._held is not None:
            yield
            return
        self._held = bytearray()
        try:
            yield
        finally:
            said, self._held = bytes(self._held), None
            if said:
                self.raw(said)
            if self._hang_up_when_said and not self._pumping:
                self.hang_up()

    def send(self, channel: int, *frames: FrameTypes) -> None:
        """Send any frames, in one write."""
        self.raw(b"".join(marshal(frame, channel) for frame in frames))

    def raw(self, data: bytes) -> None:
        """Send any bytes, well-formed or not."""
        if self._transport is None or self._gone:
            return
        if self._held is not None:
            self._held += data
        elif self.write_size is None and not self._pumping:
            self._transport.write(data)
        else:
            self._outbox += data
            if not self._pumping:
                self._pump()

    def _pump(self) -> None:
        """Write the next piece, then give the client two turns of the loop to read it by itself.

        In the first turn the selector sees its socket readable, but a callback already due runs before the
        read does; in the second the read is done.
        """
        assert self._transport is not None
        size = self.write_size or len(self._outbox)
        piece = bytes(self._outbox[:size])
        del self._outbox[:size]
        self._pumping = bool(piece) and not self._gone
        if self._pumping:
            self._transport.write(piece)
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._pump)
        else:
            self._outbox.clear()
            if self._hang_up_when_said:
                self.hang_up()

    # The TCP connection

    @property
    def _gone(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.broker._welcome(self)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._beating is not None:
            self._beating.cancel()
        self.closed.set()
        self.broker._stir()

    def data_received(self, data: bytes) -> None:
        self.bytes_received += len(data)
        self._inbox += data
        with self.together():
            try:
                self._take_frames()
            except Violation as violation:
                if self._closing:
                    self.hang_up()
                else:
                    self.broker.violations.append(violation)
                    self.close_connection(violation.code, violation.text)
            except Exception as error:
                # A hook's own failure, often a failed assert. Raised here it would only be logged.
                self.broker.script_error = error
                self.drop()
            self._ack_all_so_far()
        self.broker._stir()

    def _take_frames(self) -> None:
        brought_publish = False
        while not self._gone and (taken := self._next_frame()) is not None:
            number, frame = taken
            brought_publish |= isinstance(frame, commands.Basic.Publish | ContentHeader | ContentBody)
            self._on_frame(number, frame)
        half_way = any(channel.incoming for channel in self._channels.values())
        self.reads += brought_publish or half_way

    def _next_frame(self) -> tuple[int, FrameTypes] | None:
        if self._inbox.startswith(b"A"):  # no frame type is a letter: a protocol header
            if len(self._inbox) < len(PROTOCOL_HEADER):
                return None
            header = bytes(self._inbox[: len(PROTOCOL_HEADER)])
            del self._inbox[: len(PROTOCOL_HEADER)]
            return 0, unmarshal(header)[2]
        if len(self._inbox) < FRAME_OVERHEAD:
            return None
        payload_size = frame_parts(bytes(self._inbox[: FRAME_OVERHEAD - 1]))[2] or 0
        size = payload_size + FRAME_OVERHEAD
        if size > self.frame_max and not self._closing:
            raise Violation(501, f"FRAME_ERROR - frame of {size} bytes, frame_max is {self.frame_max}")
        if len(self._inbox) < size:
            return None
        raw = bytes(self._inbox[:size])
        del self._inbox[:size]
        try:
            _, channel, frame = unmarshal(raw)
        except (PAMQPException, ValueError) as error:
            raise Violation(501, f"FRAME_ERROR - {error}"[:255]) from error
        return channel, frame

    # AMQP: the connection

    def _on_frame(self, number: int, frame: FrameTypes) -> None:
        if self._closing:
            if isinstance(frame, commands.Connection.Close):
                self.send(0, commands.Connection.CloseOk())
            if isinstance(frame, commands.Connection.Close | commands.Connection.CloseOk):
                self.hang_up()
        elif isinstance(frame, Heartbeat) or self._dealt_with(number, frame):
            pass
        elif number == 0:
            self._on_connection_frame(frame)
        else:
            self._on_channel_frame(number, frame)

    def _dealt_with(self, number: int, frame: FrameTypes) -> bool:
        hook = self.broker.on_method
        is_method = isinstance(frame, Frame) and not isinstance(frame, commands.Basic.Publish)
        return hook is not None and is_method and hook(self, number, cast("Frame", frame))

    def _on_connection_frame(self, frame: FrameTypes) -> None:
        match frame:
            case ProtocolHeader():
                if frame.marshal() == PROTOCOL_HEADER:
                    self.send(0, commands.Connection.Start(0, 9, SERVER_PROPERTIES, "PLAIN AMQPLAIN", "en_US"))
                else:
                    self.raw(PROTOCOL_HEADER)
                    self.hang_up()
            case commands.Connection.StartOk():
                self.client_properties = cast("FieldTable", frame.client_properties or {})
                self.send(0, commands.Connection.Tune(2047, self.frame_max, 60))
            case commands.Connection.TuneOk():
                self.frame_max = min(frame.frame_max or self.frame_max, self.frame_max)
                self.heartbeat = frame.heartbeat or 0
                if self.heartbeat:
                    self._beat()
            case commands.Connection.Open():
                self.opened = True
                self.send(0, commands.Connection.OpenOk())
            case commands.Connection.Close():
                self.send(0, commands.Connection.CloseOk())
                self.hang_up()
            case _:
                raise Violation(503, f"COMMAND_INVALID - {frame.name} on channel 0")

    def _beat(self) -> None:
        if self.opened and self.broker.send_heartbeats:
            self.send(0, Heartbeat())
        self._beating = asyncio.get_running_loop().call_later(self.heartbeat / 2, self._beat)

    # AMQP: the channels

    def _on_channel_frame(self, number: int, frame: FrameTypes) -> None:
        channel = self._channels.get(number)
        if channel is None:
            if not isinstance(frame, commands.Channel.Open):
                raise Violation(504, f"CHANNEL_ERROR - expected 'channel.open', got {frame.name}")
            self._channels[number] = _Channel()
            self.send(number, commands.Channel.OpenOk())
        elif channel.closing:
            if isinstance(frame, commands.Channel.Close):
                self.send(number, commands.Channel.CloseOk())
            if isinstance(frame, commands.Channel.Close | commands.Channel.CloseOk):
                del self._channels[number]
        elif channel.incoming is not None:
            self._on_content(number, channel, channel.incoming, frame)
        elif isinstance(frame, commands.Basic.Publish):
            channel.incoming = _Incoming(frame)
        elif isinstance(frame, commands.Channel.Close):
            del self._channels[number]
            self.send(number, commands.Channel.CloseOk())
        elif isinstance(frame, Frame):
            self._on_method(number, channel, frame)
        else:
            raise Violation(505, f"UNEXPECTED_FRAME - {frame.name} without a method before it")

    def _on_method(self, number: int, channel: _Channel, frame: Frame) -> None:
        if isinstance(frame, Declare):
            self.broker.topology.append(frame)
            refusal = self.broker.on_declare(frame) if self.broker.on_declare is not None else None
            if refusal is not None:
                self._close_channel(*refusal, frame.index, number)
                return
        answer: Frame
        match frame:
            case commands.Exchange.Declare():
                answer = commands.Exchange.DeclareOk()
            case commands.Queue.Declare():
                answer = commands.Queue.DeclareOk(frame.queue or "amq.gen-scripted", 0, 0)
            case commands.Queue.Bind():
                self.broker.topology.append(frame)
                answer = commands.Queue.BindOk()
            case commands.Exchange.Bind():
                self.broker.topology.append(frame)
                answer = commands.Exchange.BindOk()
            case commands.Exchange.Unbind():
                answer = commands.Exchange.UnbindOk()
            case commands.Confirm.Select():
                channel.confirming = True
                answer = commands.Confirm.SelectOk()
            case commands.Basic.Qos():
                answer = commands.Basic.QosOk()
            case commands.Channel.Flow():
                answer = commands.Channel.FlowOk(frame.active)
            case _:
                raise Violation(540, f"NOT_IMPLEMENTED - {frame.name}")
        if not getattr(frame, "nowait", False):
            self.send(number, answer)

    def _on_content(self, number: int, channel: _Channel, incoming: _Incoming, frame: FrameTypes) -> None:
        if isinstance(frame, ContentHeader) and incoming.header is None:
            incoming.header = header = frame
        elif isinstance(frame, ContentBody) and incoming.header is not None:
            header = incoming.header
            incoming.body += frame.value
            incoming.frames += 1
        else:
            raise Violation(505, f"UNEXPECTED_FRAME - {frame.name} within a publish")
        if len(incoming.body) > header.body_size:
            raise Violation(501, f"FRAME_ERROR - body of more than the {header.body_size} bytes announced")
        if len(incoming.body) == header.body_size:
            channel.incoming = None
            self._on_published(number, channel, incoming, header)

    def _on_published(self, number: int, channel: _Channel, whole: _Incoming, header: ContentHeader) -> None:
        if channel.confirming:
            channel.last_tag += 1
        message = Published(
            connection=self.index,
            channel=number,
            delivery_tag=channel.last_tag,
            exchange=whole.method.exchange,
            routing_key=whole.method.routing_key,
            mandatory=whole.method.mandatory,
            properties=header.properties,
            body=bytes(whole.body),
            body_frames=whole.frames,
        )
        self.broker.published.append(message)
        if channel.confirming:
            channel.published[message.delivery_tag] = message
            channel.unsettled.add(message.delivery_tag)
        if self.broker.on_publish is not None:
            self.broker.on_publish(self, message)

    def _ack_all_so_far(self) -> None:
        if self.broker.mode != "ack" or self._closing:
            return
        for number, channel in self._channels.items():
            if channel.unsettled and not channel.closing:
                self.ack(max(channel.unsettled), multiple=True, channel=number)

    def _close_channel(self, code: int, text: str, blamed: int, channel: int | None) -> None:
        number, state = self._the_channel(channel)
        state.closing = True
        class_id, method_id = divmod(blamed, 1 << 16)
        self.send(number, commands.Channel.Close(code, text, class_id, method_id))

    def _the_channel(self, number: int | None) -> tuple[int, _Channel]:
        if number is None:
            confirming = [each for each, state in self._channels.items() if state.confirming]
            candidates = confirming or list(self._channels)
            if len(candidates) != 1:
                raise ValueError(f"say which channel: {candidates} are open")
            number = candidates[0]
        return number, self._channels[number]
