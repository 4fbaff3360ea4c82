"""Connections to the broker, topology, and `publish`: a batch in, an outcome for each of its messages back.

aio-pika and aiormq own handshake, heartbeat, channels and topology. Batches pass them by: one buffer goes straight to
the transport, and a tap in front of aiormq's reader takes the confirms of the publish channel out of what comes back
(ARCHITECTURE.md says why). What may be counted, and what is unknown, is decided in confirms.py.
"""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import groupby
from typing import Any

import aio_pika
import aiormq.exceptions
from aio_pika.abc import AbstractChannel
from aiormq.connection import TransportFactory
from yarl import URL

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
from gateway.amqp.window import ConfirmWindow
from gateway.config import Settings
from gateway.errors import Overloaded, QueueUnavailable

log = logging.getLogger(__name__)

MESSAGE_TYPE, ENVELOPE_TYPE = "sms.v1", "sms.batch.v1"
RECONNECT_DELAYS_S = (0.1, 3.0)  # full jitter between them: replicas do not come back in step
RETRY_MARGIN_S = 0.5  # less than this before the deadline is not worth a second try
TOO_LATE_S = 0.1  # nor, this short before it, a first one: it would only end as unknown
STALLED_S = 1.0  # so much younger batches elsewhere are confirmed already: something is wrong with this connection
CLOSE_TIMEOUT_S = 2.0
WATCH_INTERVAL_S = 0.25
SHARED_CONNECTION_BYTES = 64 * 1024  # some 200 messages


class Publisher:
    """Several publish connections, spread over the broker's nodes; each heals itself."""

    def __init__(self, settings: Settings, *, first_node: int | None = None) -> None:
        """`first_node` is where the first connection goes; None draws one, so that replicas spread over the nodes."""
        self._settings = settings
        self._connections: list[_PublishConnection] = []  # those that may be given batches
        self._leaving: set[_PublishConnection] = set()  # those that only wait for their last confirms
        self._window = ConfirmWindow(
            most_messages=settings.max_unconfirmed_messages, target_s=settings.confirm_timeout_s / 4
        )
        self._first_node = (
            random.randrange(len(settings.amqp_nodes())) if first_node is None else first_node  # noqa: S311
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._unusable_since: float | None = None
        self._changed = asyncio.Event()
        self._closed = False
        self.was_connected = False
        self.late_confirms = 0  # messages settled after their deadline: they had been answered as unknown
        self.republished = 0  # messages written again elsewhere after their connection was lost

    def start(self) -> None:
        """Begin connecting, and go on for ever; returns at once."""
        for number in range(self._settings.amqp_connections):
            task = asyncio.create_task(self._keep_connected(number), name=f"amqp-{number}")
            task.add_done_callback(_log_if_ended)
            self._tasks.add(task)

    async def close(self) -> None:
        """Close every connection. What is unconfirmed by then becomes unknown."""
        self._closed = True
        self._changed.set()  # whoever waits for a connection to come back waits in vain
        while running := {task for task in self._tasks if not task.done()}:
            # Once may not be enough: in the middle of a handshake, aiormq absorbs a cancellation.
            for task in running:
                task.cancel()
            await asyncio.wait(running, timeout=CLOSE_TIMEOUT_S)

    def is_usable(self) -> bool:
        """Whether a batch would be written if it came now."""
        return any(connection.is_usable() for connection in self._connections)

    @property
    def unconfirmed_messages(self) -> int:
        return sum(connection.unconfirmed_messages for connection in [*self._connections, *self._leaving])

    @property
    def unconfirmed_bytes(self) -> int:
        return sum(connection.unconfirmed_bytes for connection in [*self._connections, *self._leaving])

    async def publish(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None = None,
        *,
        deadline: float | None = None,
    ) -> bytes:
        """Publish one batch, in order, on one channel; wait until all is confirmed or the deadline has come.

        `shards` names the queue of each payload, ascending; None means the first for all. `deadline` is on the event
        loop's clock; None means a whole confirm_timeout_s from now. Returns one Outcome per payload. Raises
        QueueUnavailable or Overloaded when nothing at all was written.
        """
        if not payloads:
            return b""
        clock = asyncio.get_running_loop().time
        written_at = clock()
        if deadline is None:
            deadline = written_at + self._settings.confirm_timeout_s
        elif deadline < written_at + TOO_LATE_S:
            raise QueueUnavailable
        connection = self._choose(len(payloads))
        outcomes = await connection.publish(ids, payloads, shards, deadline)
        self._window.note(len(payloads), written_at=written_at, now=clock())
        if connection.is_lost and not self._closed and Outcome.UNKNOWN in outcomes:
            return await self._republish_unknown(ids, payloads, shards, outcomes, deadline)
        return outcomes

    async def _republish_unknown(
        self,
        ids: Sequence[str],
        payloads: Sequence[bytes],
        shards: Sequence[int] | None,
        outcomes: bytes,
        deadline: float,
    ) -> bytes:
        """Write the unknown messages once more, elsewhere, with the same ids: a second copy beats a lost one.

        Only after a lost connection. After a mere timeout, or under an alarm, the first copy is likely still coming,
        and a second one would double the load. What a second try refuses stays unknown: the first may have landed.
        """
        unknown = [position for position, outcome in enumerate(outcomes) if outcome == Outcome.UNKNOWN]
        try:
            connection = await self._choose_before(deadline - RETRY_MARGIN_S, len(unknown))
            second = await connection.publish(
                [ids[position] for position in unknown],
                [payloads[position] for position in unknown],
                [shards[position] for position in unknown] if shards else None,
                deadline,
            )
        except (QueueUnavailable, Overloaded):
            return outcomes
        self.republished += len(unknown)
        merged = bytearray(outcomes)
        for position, outcome in zip(unknown, second, strict=True):
            if outcome == Outcome.ACKED:
                merged[position] = outcome
        return bytes(merged)

    def _choose(self, count: int) -> "_PublishConnection":
        """The connection for a batch of `count` messages. Raises when none may take it.

        While little is on the wire all batches take the same one: what is written to it in one turn of the event loop
        leaves in one system call, and is confirmed by one ack (scripts/bench compare, batches of 1). Beyond that the
        one with the least unconfirmed.
        """
        now = asyncio.get_running_loop().time()
        usable = [connection for connection in self._connections if connection.is_usable()]
        if not usable:
            self._unusable_since = self._unusable_since or now
            raise QueueUnavailable(retry_after_s=(now - self._unusable_since) / 2)  # a long outage may well go on
        self._unusable_since = None
        unconfirmed = self.unconfirmed_messages
        if (
            unconfirmed and unconfirmed + count > self._window.messages
        ) or self.unconfirmed_bytes > self._settings.max_unconfirmed_bytes:
            raise Overloaded(retry_after_s=self._window.confirm_s)
        if len(usable) > 1:
            latest = max(connection.confirmed_written_at for connection in usable)
            usable = [one for one in usable if not one.is_stalled(latest)] or usable
        if usable[0].unconfirmed_bytes < SHARED_CONNECTION_BYTES:
            return usable[0]
        return min(usable, key=lambda connection: connection.unconfirmed_bytes)

    async def _choose_before(self, deadline: float, count: int) -> "_PublishConnection":
        """The same, but wait for a connection to come back. Raises QueueUnavailable when `deadline` has passed."""
        if asyncio.get_running_loop().time() > deadline:
            raise QueueUnavailable
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while not (self.is_usable() or self._closed):
                    self._changed.clear()
                    await self._changed.wait()
        return self._choose(count)

    async def _keep_connected(self, number: int) -> None:
        """One connection's life: connect, serve until it is lost, wait a moment, connect to the next node."""
        nodes = self._settings.amqp_nodes()
        number += self._first_node
        attempt = 0
        on_probation = False
        while not self._closed:
            node = URL(nodes[(number + attempt) % len(nodes)])
            connection = _PublishConnection(self._settings, node, self._count_late, on_probation=on_probation)
            try:
                async with asyncio.timeout(self._settings.amqp_connect_timeout_s), _stray_cancellation_is_loss():
                    await connection.open()
            except Exception as error:  # whatever the library raises, this loop must go on
                log.warning("cannot connect to the broker at %s:%s: %s", node.host, node.port, _reason(error))
                attempt += 1
            else:
                log.info("connected to the broker at %s:%s", node.host, node.port)
                attempt = 0
                self.was_connected = True
                self._connections.append(connection)
                self._changed.set()
                if not self._closed:  # a cancellation may have been absorbed on the way
                    await self._serve(connection)
                number += 1  # the next node first: this one has just failed us
            finally:
                self._connections = [other for other in self._connections if other is not connection]
                on_probation = connection.is_overdue()  # the next one has to show that there are confirms again
                if on_probation and not connection.is_blocked and not self._closed:
                    self._see_out(connection)
                else:
                    await connection.close()
            await asyncio.sleep(reconnect_delay_s(attempt))

    async def _serve(self, connection: "_PublishConnection") -> None:
        """Return when the connection is lost, or a batch on it is past its deadline and no alarm explains that."""
        while not await connection.wait_lost(timeout=WATCH_INTERVAL_S):
            self._changed.set()  # an alarm may have gone
            if connection.is_overdue() and not connection.is_blocked:
                log.warning("no confirms from the broker at %s:%s in time", connection.node.host, connection.node.port)
                return
            if self._is_abandoned(connection):
                return
        log.warning("lost the connection to the broker at %s:%s", connection.node.host, connection.node.port)

    def _is_abandoned(self, connection: "_PublishConnection") -> bool:
        if (age_s := connection.oldest_age_s()) > self._settings.abandon_timeout_s:
            log.warning("a batch is unconfirmed for %.0f s: closing its connection", age_s)
            return True
        return False

    def _see_out(self, connection: "_PublishConnection") -> None:
        """Let a connection that is too slow wait for its last confirms beside the one that takes its place."""
        self._leaving.add(connection)
        task = asyncio.create_task(self._wait_for_the_last(connection), name="amqp-leaving")
        task.add_done_callback(_log_if_ended)
        task.add_done_callback(self._tasks.discard)
        self._tasks.add(task)

    async def _wait_for_the_last(self, connection: "_PublishConnection") -> None:
        try:
            while connection.unconfirmed_messages and not self._is_abandoned(connection):
                if await connection.wait_lost(timeout=WATCH_INTERVAL_S):
                    break
        finally:
            self._leaving.discard(connection)
            await connection.close()

    def _count_late(self, count: int) -> None:
        self.late_confirms += count


def _log_if_ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("%s ended: its connection will not come back", task.get_name(), exc_info=task.exception())


def reconnect_delay_s(failures: int) -> float:
    """How long to wait after so many failures in a row: full jitter, up to RECONNECT_DELAYS_S."""
    shortest, longest = RECONNECT_DELAYS_S
    doublings = min(failures + 1, 10)  # an outage may last for days: without the bound the power would overflow
    return random.uniform(shortest, min(longest, shortest * 2**doublings))  # noqa: S311 - jitter


class _Pending:
    """A batch on the wire, and the one future its publisher waits for."""

    __slots__ = ("deadline", "settled", "size", "written_at")

    def __init__(self, size: int, written_at: float, deadline: float, settled: asyncio.Future[None]) -> None:
        self.size = size
        self.written_at = written_at
        self.deadline = deadline
        self.settled = settled


class _PublishConnection:
    """One connection with one channel in confirm mode, from its opening to its loss; never used again after."""

    def __init__(
        self, settings: Settings, node: URL, count_late: Callable[[int], None], *, on_probation: bool = False
    ) -> None:
        """`on_probation`: one batch at a time until the first is confirmed, because its predecessor's were not."""
        self.node = node
        self._on_probation = on_probation
        self.confirmed_written_at = float("-inf")  # when the youngest batch was written that has been confirmed
        self._settings = settings
        self._count_late = count_late
        self._loop = asyncio.get_running_loop()
        # A classic queue whose process dies has all its unconfirmed messages nacked, also those it has on disk.
        nacked = Outcome.UNKNOWN if settings.amqp_queue_type == "classic" else Outcome.NACKED
        self._tracker = ConfirmTracker(nacked=nacked)
        self._pending: dict[PublishedRange, _Pending] = {}
        self.is_blocked = False
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
            async with _stray_cancellation_is_loss():
                await self._connection.close()
        except Exception as error:  # it is to be gone, and goes
            log.debug("closing a connection: %s", _reason(error))
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

    def is_usable(self) -> bool:
        """Whether a new batch may be written: not lost, no broker alarm, and no batch past its deadline."""
        return not (
            self.is_lost
            or self.is_blocked
            or self._transports.is_closing
            or self.is_overdue()
            or (self._on_probation and self._pending)
        )

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
        self, ids: Sequence[str], payloads: Sequence[bytes], shards: Sequence[int] | None, deadline: float
    ) -> bytes:
        """Write one batch and wait until it is settled, lost, or past `deadline`; one Outcome per message.

        Raises QueueUnavailable when the buffer could not be handed to the transport: then nothing was written.
        """
        buffer = self._pack(ids, payloads, shards)
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

    def _pack(self, ids: Sequence[str], payloads: Sequence[bytes], shards: Sequence[int] | None) -> bytes:
        """One buffer for the batch: each run of payloads for one shard goes through that shard's framer."""
        if shards is None:
            return self._framers[0].pack(ids, payloads)
        buffers, start = [], 0
        for shard, run in groupby(shards):
            stop = start + sum(1 for _ in run)
            buffers.append(self._framers[shard].pack(ids[start:stop], payloads[start:stop]))
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
                self.is_blocked = blocked

    def _on_lost(self) -> None:
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
                self._on_probation = False
            if not pending.settled.done():
                _finish(pending.settled)
            elif not self.is_lost:
                self._count_late(len(published.ids))

    def _oldest(self) -> _Pending | None:
        oldest = self._tracker.oldest()
        return self._pending[oldest] if oldest else None


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

    def data_received(self, data: bytes) -> None:
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
    def is_closing(self) -> bool:
        return self._transport is None or self._transport.is_closing()

    def write(self, buffer: bytes) -> None:
        """Hand whole frames to the socket. Raises when it is closing: then not a byte was taken."""
        if self._transport is None or self._transport.is_closing():
            raise ConnectionResetError("the connection is closing")
        self._transport.write(buffer)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


@asynccontextmanager
async def _stray_cancellation_is_loss() -> AsyncIterator[None]:
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


def _reason(error: BaseException) -> str:
    if isinstance(error, aiormq.exceptions.ChannelPreconditionFailed):
        return (
            f"{error}. A queue or exchange exists with other arguments: remove it, or set GATEWAY_AMQP_TOPOLOGY=check"
        )
    return f"{type(error).__name__} {error}".strip()
