"""One connection to the broker with one channel in confirm mode, and the tap that writes and reads past the library.

aio-pika and aiormq own handshake, heartbeat, channels and topology. Batches pass them by: one buffer goes straight to
the transport, and a tap in front of aiormq's reader takes the confirms of the publish channel out of what comes back
(ARCHITECTURE.md says why).
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from typing import Any

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq.connection import TransportFactory
from yarl import URL

from gateway import tls
from gateway.amqp.confirms import ConfirmTracker, Outcome, PublishedRange
from gateway.amqp.frames import (
    HEARTBEAT_FRAME,
    Blocked,
    ChannelClosed,
    Event,
    IncomingFrames,
    PublishFramer,
    Returned,
    Settled,
)
from gateway.config import Settings
from gateway.errors import QueueUnavailable

log = logging.getLogger(__name__)

MESSAGE_TYPE, ENVELOPE_TYPE = "sms.v1", "sms.batch.v1"
CLOSE_TIMEOUT_S = 2.0
STATES = ("open", "half_open", "blocked", "overdue", "lost")
STALLED_S = 1.0  # so much younger batches elsewhere are confirmed already: something is wrong with this connection


class _Pending:
    """A batch on the wire, and the one future its publisher waits for."""

    __slots__ = ("deadline", "settled", "size", "written_at")

    def __init__(self, size: int, written_at: float, deadline: float, settled: asyncio.Future[None]) -> None:
        self.size = size
        self.written_at = written_at
        self.deadline = deadline
        self.settled = settled


class PublishConnection:
    """One connection with one channel in confirm mode, from its opening to its loss; never used again after."""

    def __init__(
        self, settings: Settings, node: URL, count_late: Callable[[int], None], *, half_open: bool = False
    ) -> None:
        """`half_open`: one batch at a time until the first is confirmed, because its predecessor's were not."""
        self.node = node
        self._half_open = half_open
        self.confirmed_written_at = float("-inf")  # when the youngest batch was written that has been confirmed
        self._settings = settings
        self._count_late = count_late
        self._loop = asyncio.get_running_loop()
        # A classic queue whose process dies has all its unconfirmed messages nacked, also those it has on disk.
        nacked = Outcome.UNKNOWN if settings.amqp_queue_type == "classic" else Outcome.NACKED
        self._tracker = ConfirmTracker(nacked=nacked)
        self._pending: dict[PublishedRange, _Pending] = {}
        self.is_blocked = False
        self._blocked_at = 0.0
        self._blocked_s = 0.0
        self._lost = self._loop.create_future()
        self.unconfirmed_messages = 0
        self.unconfirmed_bytes = 0
        self._transports = _TappedTransport(self._on_event, self._on_lost)
        self._connection = aio_pika.Connection(
            node.update_query(heartbeat=settings.amqp_heartbeat_s, name="sms-gateway")
        )
        self._connection.kwargs["transport_factory"] = self._transports

    async def open(self) -> None:
        """Connect, declare or check the topology, open the publish channel. Raises what connecting raises."""
        if self.node.scheme == "amqps":
            self._connection.kwargs["context"] = await asyncio.to_thread(tls.broker_context, self._settings)
        await self._connection.connect()
        async with self._connection.channel() as channel:
            await _ensure_topology(channel, self._settings)
        publish_channel = self._connection.channel(publisher_confirms=True)
        await publish_channel.initialize()
        underlay = await publish_channel.get_underlay_channel()
        self._framers = [
            PublishFramer(
                channel=underlay.number,
                exchange=self._settings.amqp_exchange,
                routing_key=queue,
                message_type=MESSAGE_TYPE if self._settings.messages_per_envelope == 1 else ENVELOPE_TYPE,
                frame_max=underlay.connection.connection_tune.frame_max,
            )
            for queue in self._settings.queues()
        ]
        self._transports.listen_to(underlay.number)

    async def close(self) -> None:
        """Close in good order where the broker still answers; in any case settle what is pending as unknown."""
        # No timeout around it: aiormq, waiting for a broker that reads no more, absorbs the cancellation. A transport
        # that is aborted under it does end the wait.
        last_word = self._loop.call_later(CLOSE_TIMEOUT_S, self._transports.abort)
        try:
            async with stray_cancellation_is_loss():
                await self._connection.close()
        except Exception as error:  # it is to be gone, and goes
            log.debug("closing a connection: %s", reason(error))
        finally:
            last_word.cancel()
            self._transports.abort()
            self._on_lost()

    @property
    def is_lost(self) -> bool:
        return self._lost.done()

    async def wait_lost(self, *, timeout: float) -> bool:
        """Wait for the connection's loss, at most `timeout` seconds; whether it is lost."""
        await asyncio.wait([self._lost], timeout=timeout)
        return self.is_lost

    @property
    def receptions(self) -> int:
        """How often the broker has been heard, heartbeats included."""
        return self._transports.receptions

    def abort(self) -> None:
        """Take the peer for dead: nothing more is written or heard, and what is unconfirmed is unknown."""
        self._transports.abort()
        self._on_lost()

    def is_usable(self) -> bool:
        """Whether a new batch may be written: not lost, no broker alarm, and no batch past its deadline."""
        return not (
            self.is_lost
            or self.is_blocked
            or self._transports.is_closing
            or self.is_overdue()
            or (self._half_open and self._pending)
        )

    @property
    def blocked_s(self) -> float:
        """How long the broker's alarms have blocked it, in all."""
        return self._blocked_s + (self._loop.time() - self._blocked_at if self.is_blocked else 0.0)

    @property
    def state(self) -> str:
        """What a new batch would find; one of STATES."""
        if self.is_lost or self._transports.is_closing:
            return "lost"
        if self.is_blocked:
            return "blocked"
        if self.is_overdue():
            return "overdue"
        return "half_open" if self._half_open else "open"

    def is_overdue(self) -> bool:
        """Whether a batch has passed its deadline unconfirmed, on a connection that is not lost."""
        oldest = self._oldest()
        return oldest is not None and oldest.deadline < self._loop.time()

    def is_stalled(self, latest: float) -> bool:
        """Whether its oldest batch waits while much younger ones, up to `latest`, have been confirmed elsewhere."""
        oldest = self._oldest()
        return oldest is not None and oldest.written_at + STALLED_S < latest

    def oldest_age_s(self) -> float:
        """How long the oldest unconfirmed batch has been waiting; 0.0 when there is none."""
        oldest = self._oldest()
        return self._loop.time() - oldest.written_at if oldest else 0.0

    async def publish(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None,
        deadline: float,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """Write one batch and wait until it is settled, lost, or past `deadline`; one Outcome per message.

        Raises QueueUnavailable when the buffer could not be handed to the transport: then nothing was written.
        """
        buffer = self._pack(ids, payloads, shards, headers)
        published = self._tracker.add(ids)
        try:
            self._transports.write(buffer)
        except (OSError, RuntimeError) as error:
            self._tracker.withdraw(published)
            raise QueueUnavailable from error
        pending = _Pending(len(buffer), self._loop.time(), deadline, self._loop.create_future())
        self._pending[published] = pending
        self.unconfirmed_messages += len(ids)
        self.unconfirmed_bytes += pending.size
        # The range outlives its waiter: past the deadline, or if the caller is cancelled, its confirms still count
        # down what is unconfirmed, and come to be counted as late.
        give_up = self._loop.call_at(deadline, _finish, pending.settled)
        try:
            await pending.settled
        finally:
            give_up.cancel()
        return published.outcomes()

    def _pack(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None,
        headers: Mapping[str, str] | None,
    ) -> bytes:
        """One buffer for the batch: each run of payloads for one shard goes through that shard's framer."""
        if shards is None:
            return _carrying(self._framers[0], headers).pack(ids, payloads)
        buffers, start = [], 0
        for shard, run in groupby(shards):
            stop = start + sum(1 for _ in run)
            buffers.append(_carrying(self._framers[shard], headers).pack(ids[start:stop], payloads[start:stop]))
            start = stop
        return b"".join(buffers)

    def _on_event(self, event: Event) -> None:
        match event:
            case Settled(acked, delivery_tag, multiple):
                self._settle(self._tracker.settle(acked=acked, delivery_tag=delivery_tag, multiple=multiple))
            case Returned(message_id):
                if not self._tracker.mark_returned(message_id):
                    log.error("the broker returned message %s, which is not on the wire", message_id)
            case ChannelClosed():
                self._on_lost()
            case Blocked(blocked):
                log.warning("the broker %s this connection", "blocked" if blocked else "unblocked")
                self._note_blocked(blocked)

    def _note_blocked(self, blocked: bool) -> None:
        self._blocked_s, self._blocked_at, self.is_blocked = self.blocked_s, self._loop.time(), blocked

    def _on_lost(self) -> None:
        self._note_blocked(False)
        if not self._lost.done():
            self._lost.set_result(None)
        self._settle(self._tracker.lose())

    def _settle(self, ranges: list[PublishedRange]) -> None:
        for published in ranges:
            pending = self._pending.pop(published)
            self.unconfirmed_messages -= len(published.ids)
            self.unconfirmed_bytes -= pending.size
            if not self.is_lost:
                self.confirmed_written_at = max(self.confirmed_written_at, pending.written_at)
                self._half_open = False
            if not pending.settled.done():
                _finish(pending.settled)
            elif not self.is_lost:
                self._count_late(len(published.ids))

    def _oldest(self) -> _Pending | None:
        oldest = self._tracker.oldest()
        return self._pending[oldest] if oldest else None


def _carrying(framer: PublishFramer, headers: Mapping[str, str] | None) -> PublishFramer:
    return framer.carrying(headers) if headers else framer


def _finish(settled: asyncio.Future[None]) -> None:
    if not settled.done():
        settled.set_result(None)


class _Tap(asyncio.StreamReaderProtocol):
    """Stands between the socket and aiormq's reader: takes out what is the publisher's, passes on the rest."""

    def __init__(
        self, reader: asyncio.StreamReader, on_event: Callable[[Event], None], on_lost: Callable[[], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        super().__init__(reader, loop=loop)
        self.frames = IncomingFrames()
        self._now = loop.time
        self._on_event = on_event
        self._on_lost = on_lost
        self._passed_on_at = 0.0
        self.receptions = 0

    def data_received(self, data: bytes) -> None:
        self.receptions += 1
        passed_on, events = self.frames.feed(data)
        for event in events:
            self._on_event(event)
        now = self._now()
        if not passed_on and self.frames.channel and now - self._passed_on_at > 1.0:
            # Busy with confirms, the broker sends no heartbeats, and aiormq, who sees no confirms, would take it
            # for dead: a heartbeat of ours tells it that the peer lives.
            passed_on = HEARTBEAT_FRAME
        if passed_on:
            self._passed_on_at = now
            super().data_received(passed_on)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()
        super().connection_lost(exc)


class _TappedTransport(TransportFactory):
    """Opens aiormq's transport with a tap in it, and keeps hold of it to write to."""

    def __init__(self, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> None:
        self._callbacks = (on_event, on_lost)
        self._tap: _Tap | None = None
        self._transport: asyncio.Transport | None = None

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """What asyncio.open_connection does, with the tap as protocol."""
        context_provider = kwargs.pop("ssl_context_provider")
        context = await context_provider.get_context() if url.scheme == "amqps" else None
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        tap = _Tap(reader, *self._callbacks)
        try:
            transport, _ = await loop.create_connection(
                lambda: tap, url.host or "", url.port or 0, ssl=context, **kwargs
            )
        except OSError as error:
            raise aiormq.exceptions.AMQPConnectionError(*error.args) from error
        self._tap, self._transport = tap, transport
        return reader, asyncio.StreamWriter(transport, tap, reader, loop)

    def listen_to(self, channel: int) -> None:
        """From now on, take the confirms of this channel out of the stream."""
        assert self._tap is not None  # noqa: S101 - the channel was opened through it
        self._tap.frames.channel = channel

    @property
    def receptions(self) -> int:
        """How often something has been received, heartbeats included."""
        return self._tap.receptions if self._tap is not None else 0

    @property
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def write(self, buffer: bytes) -> None:
        """Hand whole frames to the socket. Raises when it is closing: then not a byte was taken."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closing")
        self._transport.write(buffer)

    def abort(self) -> None:
        if self._transport is not None:
            with suppress(AttributeError):  # asyncio's, up to Python 3.11.3, where TLS has ended already
                self._transport.abort()


@asynccontextmanager
async def stray_cancellation_is_loss() -> AsyncIterator[None]:
    """Tell aiormq's CancelledError from a real one.

    It rejects what waits on a dying connection with CancelledError. Let through, that would end the task that
    reconnects, without a trace.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise ConnectionResetError("the connection was lost while it was being opened or closed") from None


async def _ensure_topology(channel: AbstractChannel, settings: Settings) -> None:
    """Declare, or only check, exchange and queue, and the dead-letter exchange and queue behind them."""
    check_only = settings.amqp_topology == "check"
    exchange = await channel.declare_exchange(
        settings.amqp_exchange, aio_pika.ExchangeType.DIRECT, durable=True, passive=check_only
    )
    arguments: dict[str, Any] = {"x-queue-type": settings.amqp_queue_type}
    if settings.amqp_queue_type != "stream":  # streams keep everything, and dead-letter nothing
        dead_letters = f"{settings.amqp_exchange}.dlx"
        arguments["x-dead-letter-exchange"] = dead_letters
        if not check_only:
            dead_exchange = await channel.declare_exchange(dead_letters, aio_pika.ExchangeType.FANOUT, durable=True)
            dead_queue = await channel.declare_queue(
                f"{settings.amqp_queue}.dead",
                durable=True,
                arguments={"x-queue-type": settings.amqp_queue_type},
            )
            await dead_queue.bind(dead_exchange)
    if settings.queue_shards > 1 and settings.amqp_queue_type != "classic":
        arguments["x-queue-leader-locator"] = "balanced"  # leaders are what works: spread them over the nodes
    for name in settings.queues():
        queue = await channel.declare_queue(name, durable=True, passive=check_only, arguments=arguments)
        if not check_only:
            await queue.bind(exchange, routing_key=name)


async def declare_topology(settings: Settings) -> None:
    """Make exchange and queues, as somebody who may. Raises OSError, with what to do, when that fails."""
    connection = PublishConnection(settings, URL(settings.amqp_nodes()[0]), lambda _late: None)
    try:
        async with asyncio.timeout(settings.amqp_connect_timeout_s), stray_cancellation_is_loss():
            await connection.open()
    except Exception as error:  # whatever the library raises
        raise OSError(reason(error)) from error
    finally:
        await connection.close()


def reason(error: BaseException) -> str:
    if isinstance(error, aiormq.exceptions.ChannelPreconditionFailed):
        return (
            f"{error}. A queue or exchange exists with other arguments: remove it, or set GATEWAY_AMQP_TOPOLOGY=check"
        )
    if isinstance(error, aiormq.exceptions.ChannelAccessRefused):
        return f"{error}. The user may not declare it: set GATEWAY_AMQP_TOPOLOGY=check, or give it the right"
    return f"{type(error).__name__} {error}{tls.advice(error, 'AMQP')}".strip()
