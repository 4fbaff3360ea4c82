"""The AMQP transport: aio-pika's connection, with a tap between the socket and aiormq's reader.

aio-pika and aiormq own handshake, heartbeat, channels and topology. The publisher writes its frames to the transport
itself, and the tap takes the confirms of the publish channel out of what the broker sends (docs/decisions).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import aio_pika
import aiormq.exceptions
from aiormq.connection import TransportFactory
from yarl import URL

from gateway import tls
from gateway.amqp.frames import HEARTBEAT_FRAME, Event, IncomingFrames
from gateway.config import Settings

log = logging.getLogger(__name__)

# aiormq sees no confirms, and would consider a broker that sends nothing else dead. The tap gives it heartbeats.
HEARTBEAT_EVERY_S = 1.0
JOINED_BYTES = 64 * 1024  # a buffer of this size is written alone: another system call costs less than a copy
MAY_NOT_DECLARE = "The user may not declare it: set GATEWAY_AMQP_TOPOLOGY=check, or give it the right"


class Connection(aio_pika.Connection):
    """A connection without aio-pika's finalizer. The owner closes the connection, or aborts its transport.

    For a connection that could not be opened or closed, the finalizer would call close() in the thread that collects
    garbage. Without an event loop in that thread, Python warns of a coroutine that was never awaited.
    """

    def __del__(self) -> None:
        """Do nothing."""


async def prepare_connection(settings: Settings, node: URL, name: str, transport: "TappedTransport") -> Connection:
    """Return a connection to one node over `transport`, with heartbeat and TLS as set, still to be connected.

    `name` is shown in RabbitMQ's list of connections. Raises OSError for certificate files that cannot be read.
    """
    connection = Connection(node.update_query(heartbeat=settings.amqp_heartbeat_s, name=name))
    connection.kwargs["transport_factory"] = transport
    if node.scheme == "amqps":
        connection.kwargs["context"] = await asyncio.to_thread(tls.broker_context, settings)
    return connection


@asynccontextmanager
async def stray_cancellation_is_loss() -> AsyncIterator[None]:
    """Turn a CancelledError of aiormq into ConnectionResetError; let a real cancellation through.

    aiormq ends waits on a dying connection with CancelledError. That would end the task that reconnects.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionResetError("the connection was lost while it was being opened or closed") from None


def _ignore(*_: object) -> None:
    pass


class _Tap(asyncio.StreamReaderProtocol):
    """A protocol between the socket and aiormq's reader: turns the publish channel's frames into events."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(reader, loop=loop)
        self.frames = IncomingFrames()
        self.on_event: Callable[[Event], None] = _ignore
        self.on_lost: Callable[[], None] = _ignore
        self._now = loop.time
        self._passed_on_at = 0.0
        self.receptions = 0

    def data_received(self, data: bytes) -> None:
        self.receptions += 1
        passed_on, events = self.frames.feed(data)
        for event in events:
            self.on_event(event)
        now = self._now()
        if not passed_on and self.frames.channel and now - self._passed_on_at > HEARTBEAT_EVERY_S:
            passed_on = HEARTBEAT_FRAME
        if passed_on:
            self._passed_on_at = now
            super().data_received(passed_on)

    def connection_lost(self, exc: Exception | None) -> None:
        try:
            self.on_lost()
        finally:
            super().connection_lost(exc)


class TappedTransport(TransportFactory):
    """A transport factory for aiormq that inserts the tap, and keeps the transport for the publisher's writes."""

    def __init__(self) -> None:
        self._callbacks: tuple[Callable[[Event], None], Callable[[], None]] = (_ignore, _ignore)
        self._tap: _Tap | None = None
        self._transport: asyncio.Transport | None = None
        self._unsent: list[bytes] = []  # written in this turn of the event loop
        self._unsent_bytes = 0

    def report_to(self, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> None:
        """Call these two from now on, and no others: for each event, and when the socket is lost."""
        self._callbacks = (on_event, on_lost)
        if self._tap is not None:
            self._tap.on_event, self._tap.on_lost = self._callbacks

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect as asyncio.open_connection does, with the tap as protocol. Called by aiormq."""
        context_provider = kwargs.pop("ssl_context_provider")
        context = await context_provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        tap = _Tap(reader)
        tap.on_event, tap.on_lost = self._callbacks
        self._tap = tap
        transport, _ = await loop.create_connection(lambda: tap, url.host or "", url.port or 0, ssl=context, **kwargs)
        self._transport = transport
        return reader, asyncio.StreamWriter(transport, tap, reader, loop)

    def listen_to(self, channel: int | None) -> None:
        """Take the confirms of this channel out of the stream from now on; None: of no channel."""
        assert self._tap is not None  # noqa: S101 - the channel was opened through it
        self._tap.frames.channel = channel

    @property
    def receptions(self) -> int:
        """The number of times that bytes have arrived, heartbeats included."""
        return self._tap.receptions if self._tap is not None else 0

    @property
    def close_reply(self) -> str:
        """Code and text with which the broker has closed the connection; "" if it has not."""
        return self._tap.frames.close_reply if self._tap is not None else ""

    @property
    def is_closing(self) -> bool:
        """True before the transport is opened, and from its closing on."""
        return self._transport is None or self._transport.is_closing()

    def write(self, buffer: bytes) -> None:
        """Hand whole frames to the socket. Raises ConnectionResetError if it is closing: then no byte was taken.

        Small buffers leave together at the end of the event loop's turn. uvloop makes a system call for each write.
        Without joining, these calls take a fifth of the CPU of a small request (docs/evidence/performance.md, Small
        requests).
        """
        if len(buffer) >= JOINED_BYTES:
            self._send()
        if self.is_closing:
            raise ConnectionResetError("the connection is closing")
        self._unsent.append(buffer)
        self._unsent_bytes += len(buffer)
        if self._unsent_bytes >= JOINED_BYTES:
            self._send()
        elif len(self._unsent) == 1:
            asyncio.get_running_loop().call_soon(self._send)

    def _send(self) -> None:
        """Write the collected buffers.

        Where that fails, or the connection is closing, they are lost. The outcome of their messages is unknown: a part
        of the bytes may have left.
        """
        unsent, self._unsent, self._unsent_bytes = self._unsent, [], 0
        if unsent and self._transport is not None and not self._transport.is_closing():
            try:
                self._transport.write(b"".join(unsent))
            except Exception as error:
                # Buffers that are lost on an open connection would shift all later delivery tags: a message could then
                # count as queued by the ack of another one.
                log.error("closing a connection to the broker, because a write failed: %s", reason(error))
                self.abort()

    def abort(self) -> None:
        """Close the socket at once, without writing what is buffered."""
        if self._transport is not None:
            with suppress(AttributeError):  # raised by asyncio up to Python 3.11.3 where TLS has ended already
                self._transport.abort()


def address(node: URL) -> str:
    """Return the host and the port of a node, as logs and `status` show them."""
    return f"{node.host_subcomponent}:{node.port or (5671 if node.scheme == 'amqps' else 5672)}"


def reason(error: BaseException, close_reply: str = "") -> str:
    """Return a line for the log: the kind of error, its text, and what to do about it.

    `close_reply`: the broker's own words, where it has closed the connection or the channel. The library's error does
    not have them.
    """
    if close_reply:
        return f"closed by the broker: {close_reply}"
    if isinstance(error, aiormq.exceptions.ChannelPreconditionFailed):
        return (
            f"{error}. It exists with other arguments than the gateway's. Set GATEWAY_AMQP_QUEUE_TYPE to its type, or "
            "GATEWAY_AMQP_QUEUE and GATEWAY_AMQP_EXCHANGE to new names, and run `python -m gateway declare`. Set "
            "limits by a policy. A deleted queue loses its messages"
        )
    if isinstance(error, aiormq.exceptions.ChannelNotFoundEntity):
        return f"{error}. Run `python -m gateway declare`, or set GATEWAY_AMQP_TOPOLOGY=declare"
    if isinstance(error, aiormq.exceptions.ChannelAccessRefused):
        return f"{error}. {MAY_NOT_DECLARE}"
    return f"{type(error).__name__} {error}{tls.advice(error, 'AMQP')}".strip()
