"""One publish connection: one channel in confirm mode, from its opening to its loss.

A batch is written at once, or waits here for room on the socket. It gets its delivery tags when it is written, and only
then can its outcome be unknown (confirms.py). A batch that only waited is certainly not queued.
"""

import asyncio
import logging
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import aio_pika
from aio_pika.abc import AbstractChannel
from yarl import URL

from gateway.amqp.confirms import ConfirmTracker, Outcome, PublishedRange
from gateway.amqp.frames import AckedRange, Blocked, ChannelClosed, Destination, Event, PublishFramer, Returned, Settled
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.topology import check_may_publish, ensure_topology
from gateway.amqp.transport import TappedTransport, prepare_connection, reason, stray_cancellation_is_loss
from gateway.config import Settings
from gateway.errors import QueueUnavailable

log = logging.getLogger(__name__)

MESSAGE_TYPE, ENVELOPE_TYPE = "sms.v1", "sms.batch.v1"
CLOSE_TIMEOUT_S = 2.0
STATES = ("open", "half_open", "blocked", "overdue", "lost")
# 406: the payload is above the broker's max_message_size. RabbitMQ closes the channel with all that is on it.
_size_limit = re.compile(r"406 .*message size \d+ is larger than (?:configured )?max size (\d+)").match
# RabbitMQ 3.10 goes on nacking on a channel after a full queue (`reject-publish`) has lost its limit. A channel is
# replaced after NACKED_S of nacks without an ack. With several shards, the acks of one hide the nacks of another: the
# channel is also replaced SHARD_NACKED_S after its first nack.
NACKED_S, SHARD_NACKED_S = 3.0, 30.0
RIGHTS_KEPT_S = 0.9  # RabbitMQ forgets a channel's rights when it hibernates, after a second without work
NEVER = float("inf")  # on the event loop's clock
TOO_LATE_S = 0.1  # a batch with less time than this before its deadline is not written: it would end as unknown
TIMER_RESOLUTION_S = 0.001  # uvloop may call a timer up to this much too early
# A batch waits here while this many written bytes are not settled. They hold two batches of 1,000 short messages, so
# the broker always has something to read. With more, RabbitMQ 4.0 becomes slower (docs/decisions/0046).
SOCKET_BYTES = 512 * 1024
STALLED_S = 1.0  # a connection is stalled if a batch that was written this much later is confirmed on another one


class _Batch:
    """A batch that waits for room on the socket, or is written, with the future that `publish` waits for."""

    __slots__ = ("buffer", "deadline", "ended", "ids", "published", "size", "written_at")

    def __init__(self, ids: Sequence[str], buffer: bytes, deadline: float, ended: asyncio.Future[None]) -> None:
        self.ids = ids
        self.buffer = buffer  # its frames; b"" once they are written
        self.size = len(buffer)
        self.deadline = deadline
        self.ended = ended  # done once the batch is settled, lost, refused or past its deadline
        self.published: PublishedRange | None = None  # None: not written
        self.written_at = 0.0


class PublishConnection:
    """A connection with one channel in confirm mode. It is never used again after its loss.

    Where the broker has closed only the channel, a new object opens the next channel on the same socket (`successor`).

    States: open → blocked (a broker alarm) → open; open → overdue (the oldest written batch is past its deadline);
    any → lost. half_open: one batch at a time until the first confirm, because the connection replaces an overdue one,
    or a half-open one that was lost.
    """

    def __init__(
        self, settings: Settings, node: URL, count_late: Callable[[int], None], *, half_open: bool = False
    ) -> None:
        """`count_late` is called with the number of messages that were confirmed after their deadline."""
        self.node = node
        self.is_half_open = half_open  # after the loss: whether the next connection starts half-open
        self.confirmed_written_at = float("-inf")  # of the confirmed batch that was written last
        self._settings = settings
        self._count_late = count_late
        self._loop = asyncio.get_running_loop()
        # The socket and the channel.
        self._transport = TappedTransport()
        self._transport.report_to(self._on_event, self._on_lost)
        self._connection: aio_pika.Connection | None = None
        self._channel: AbstractChannel | None = None
        self._channel_reply = ""  # why the channel was closed or given up; "" while it is in use
        self._framers: list[PublishFramer] = []  # one for each shard
        self._lost = self._loop.create_future()
        self.is_blocked = False
        self._blocked_at = 0.0
        self._blocked_s = 0.0  # without the block that lasts
        # The batches.
        self._tracker = ConfirmTracker()
        self._written: dict[PublishedRange, _Batch] = {}  # those that are not settled
        self._waiting: deque[_Batch] = deque()  # batches that wait for room on the socket, oldest first
        self._waiting_bytes = 0
        self.unconfirmed_messages = 0  # those that wait for room on the socket included
        self.unconfirmed_bytes = 0  # likewise; frames included
        self._due_at = NEVER  # the earliest deadline of a batch; the timer is set to it
        self._timer: asyncio.TimerHandle | None = None
        # What the broker refuses.
        self.unverified = ""  # the broker's words, if it does not let the user verify the queues' type
        self.is_right_in_doubt = False  # True: open() checks the right to publish, because the broker has refused one
        self.max_payload_bytes: int | None = None  # the broker's limit; None: not known
        self.has_refused_size = False  # the broker has closed the channel because of a payload above that
        self.has_returned = False  # the broker has returned a message; reset when the topology is restored
        self._nacked_since = NEVER  # the first nack after the last ack
        self._first_nack_at = NEVER
        self._is_retiring = False

    async def open(self) -> None:
        """Connect, declare or check the topology, and open the publish channel. Raises any error of connecting."""
        settings = self._settings
        if self._connection is None:
            self._connection = await prepare_connection(settings, self.node, "sms-gateway", self._transport)
            await self._connection.connect()
        self.unverified = await self.declare()
        # When a classic queue's process dies, the broker nacks all its unconfirmed messages, even those on disk.
        if settings.amqp_queue_type == "classic" or self.unverified:
            self._tracker = ConfirmTracker(nacked=Outcome.UNKNOWN)
        if self.is_right_in_doubt:
            async with self._connection.channel() as channel:
                await check_may_publish(channel, settings)
        if self._channel is not None:  # the predecessor's; it is closed already, unless it was retired
            await self._channel.close()
        self._channel = self._connection.channel(publisher_confirms=True)
        await self._channel.initialize()
        underlay = await self._channel.get_underlay_channel()
        frame_max = underlay.connection.connection_tune.frame_max
        message_type = MESSAGE_TYPE if settings.messages_per_envelope == 1 else ENVELOPE_TYPE
        self._framers = [
            PublishFramer(Destination(settings.amqp_exchange, queue, message_type), underlay.number, frame_max)
            for queue in settings.queues()
        ]
        self._transport.listen_to(underlay.number)

    async def declare(self) -> str:
        """Declare or check the topology, as ensure_topology does. Raises any error of the libraries."""
        assert self._connection is not None  # noqa: S101 - called by open(), and after it
        return await ensure_topology(self._connection, self._settings)

    def side_channel(self) -> AbstractChannel:
        """Return a channel beside the publish channel, still to be opened. Its loss harms no message."""
        assert self._connection is not None  # noqa: S101 - called after open()
        return self._connection.channel(publisher_confirms=False)

    def successor(self) -> "PublishConnection":
        """Return an object for the next channel on the same socket; call its open()."""
        successor = PublishConnection(self._settings, self.node, self._count_late, half_open=self.is_half_open)
        successor._transport, successor._connection = self._transport, self._connection
        successor._channel = self._channel
        successor._transport.report_to(successor._on_event, successor._on_lost)
        successor.is_right_in_doubt = self._channel_reply.startswith("403")
        successor._blocked_s, successor.max_payload_bytes = self.blocked_s, self.max_payload_bytes
        return successor

    def retire(self) -> None:
        """Take no more batches, refuse those that wait, and give up the channel once nothing on it is unsettled."""
        self._is_retiring = True
        self.refuse_waiting()
        self._give_up_retired()

    def _give_up_retired(self) -> None:
        """Give up the retired channel if nothing on it is unsettled: go on as if the broker had closed it."""
        if not self.unconfirmed_messages and not self.is_lost:
            self._on_channel_closed("the broker only nacks: a new channel may be served")

    async def close(self) -> None:
        """Close, with AMQP's closing handshake if the broker still answers; then discard the connection (`abort`)."""
        # No timeout around the call: aiormq, waiting for a broker that no longer reads, absorbs the cancellation.
        # Aborting the transport does end the wait.
        give_up = self._loop.call_later(CLOSE_TIMEOUT_S, self._transport.abort)
        try:
            if self._connection is not None:
                async with stray_cancellation_is_loss():
                    await self._connection.close()
        except Exception as error:  # best effort: the connection is discarded anyway
            log.debug("closing a connection: %s", reason(error))
        finally:
            give_up.cancel()
            self.abort()

    def abort(self) -> None:
        """Discard the connection: nothing more is written or read.

        Written messages that are not settled become unknown. Batches that wait for room on the socket are refused.
        """
        self._transport.abort()
        self._on_lost()

    @property
    def is_lost(self) -> bool:
        """True from the loss of the connection or its channel on."""
        return self._lost.done()

    @property
    def is_reopening(self) -> bool:
        """True if only the channel is lost, or about to be given up: the next one is opened on the same socket."""
        is_ending = self._is_retiring or bool(self._channel_reply)
        return is_ending and not self.is_blocked and not self._transport.is_closing

    @property
    def close_reply(self) -> str:
        """Code and text with which the broker has closed the channel or the connection; "" if it has not.

        Of a retired channel: why it was given up.
        """
        return self._channel_reply or self._transport.close_reply

    async def wait_lost(self, *, timeout: float) -> bool:
        """Wait for the connection's loss, at most `timeout` seconds. Return True if it is lost."""
        await asyncio.wait([self._lost], timeout=timeout)
        return self.is_lost

    @property
    def receptions(self) -> int:
        """The number of times that bytes have arrived, heartbeats included."""
        return self._transport.receptions

    def is_usable(self) -> bool:
        """Return True if the connection may be given a new batch. It is written, or waits for room on the socket."""
        return not (
            self.is_lost
            or self.is_blocked
            or self._transport.is_closing
            or self.is_overdue()
            or self._is_retiring
            or (self.is_half_open and self._written)
        )

    @property
    def state(self) -> str:
        """The state of the connection; one of STATES. A retired one counts as open until it is replaced."""
        if self.is_lost or self._transport.is_closing:
            return "lost"
        if self.is_blocked:
            return "blocked"
        if self.is_overdue():
            return "overdue"
        return "half_open" if self.is_half_open else "open"

    @property
    def blocked_s(self) -> float:
        """Seconds that broker alarms have blocked the connection, in total."""
        return self._blocked_s + (self._loop.time() - self._blocked_at if self.is_blocked else 0.0)

    def is_nacked(self) -> bool:
        """Return True if the broker has nacked for so long that another channel is to be tried."""
        now = self._loop.time()
        is_shard_nacked = len(self._framers) > 1 and now - self._first_nack_at > SHARD_NACKED_S
        return now - self._nacked_since > NACKED_S or is_shard_nacked

    def is_overdue(self) -> bool:
        """Return True if the oldest written batch is past its deadline. A lost connection is never overdue."""
        oldest = self._oldest()
        return oldest is not None and oldest.deadline < self._loop.time()

    def is_stalled(self, latest: float) -> bool:
        """Return True if the oldest written batch is unsettled, and was written more than STALLED_S before `latest`.

        `latest`: the greatest `confirmed_written_at` of the usable connections.
        """
        oldest = self._oldest()
        return oldest is not None and oldest.written_at + STALLED_S < latest

    def oldest_age_s(self) -> float:
        """Return the seconds since the write of the oldest batch that is not settled; 0.0 when there is none."""
        oldest = self._oldest()
        return self._loop.time() - oldest.written_at if oldest else 0.0

    async def publish(self, outgoing: Outgoing, deadline: float) -> bytes:
        """Publish one batch and wait until it is settled, lost, or past `deadline`, on the event loop's clock.

        The batch is written at once, or waits for room on the socket. Returns one Outcome per message. Raises
        QueueUnavailable if nothing of the batch was written. Either the write failed, or there was no room in time, or
        the wait was ended (refuse_waiting).
        """
        batch = _Batch(outgoing.ids, self._pack(outgoing), deadline, self._loop.create_future())
        if self._waiting or self._socket_is_full():
            self._waiting.append(batch)
            self._waiting_bytes += batch.size
        else:
            self._write(batch)
        self.unconfirmed_messages += len(outgoing)
        self.unconfirmed_bytes += batch.size
        if deadline < self._due_at:
            self._set_timer(deadline)
        # The written range outlives this call. Past the deadline, or if the caller is cancelled, late confirms still
        # reduce the unconfirmed counts, and are counted as late.
        await batch.ended
        if batch.published is None:
            raise QueueUnavailable
        outcomes = batch.published.outcomes()
        return self._with_refused_sizes(outcomes, outgoing.payloads) if self.has_refused_size else outcomes

    def _write(self, batch: _Batch) -> None:
        """Write a batch. Raises QueueUnavailable if it could not be handed to the transport."""
        published = self._tracker.add(batch.ids)
        try:
            self._transport.write(batch.buffer)
        except ConnectionResetError as error:
            self._tracker.withdraw(published)
            raise QueueUnavailable from error
        batch.buffer = b""  # 5 MB less to hold until the broker has confirmed it
        batch.published, batch.written_at = published, self._loop.time()
        self._written[published] = batch

    def _socket_is_full(self) -> bool:
        written_bytes = self.unconfirmed_bytes - self._waiting_bytes
        if written_bytes < SOCKET_BYTES:
            return False
        # The settled part of the oldest batch is not on the socket any more. If it counted, the batch after a large one
        # would wait for the last confirm, and the broker would have nothing to read.
        oldest = self._tracker.oldest()
        if oldest is not None:
            written_bytes -= self._written[oldest].size * (len(oldest.ids) - oldest.unsettled) // len(oldest.ids)
        return written_bytes >= SOCKET_BYTES

    def _write_waiting(self) -> None:
        """Write the waiting batches, in order, while there is room on the socket.

        Nothing is written where it would probably end as unknown: under an alarm, or behind an overdue batch.
        """
        while self._waiting and not (self.is_lost or self.is_blocked or self.is_overdue() or self._socket_is_full()):
            batch = self._waiting[0]
            if batch.ended.done() or batch.deadline < self._loop.time() + TOO_LATE_S:
                self._refuse(batch)  # its caller was cancelled, or it would end as unknown
                continue
            try:
                self._write(batch)
            except QueueUnavailable:
                self._refuse(batch)
            else:
                self._waiting.popleft()
                self._waiting_bytes -= batch.size

    def refuse_waiting(self) -> None:
        """End the waits for room on the socket. Nothing of these batches was written: publish() raises."""
        for batch in list(self._waiting):
            self._refuse(batch)

    def _refuse(self, batch: _Batch) -> None:
        """Take a batch out of those that wait for room, and end its wait: publish() raises."""
        self._waiting.remove(batch)
        self._waiting_bytes -= batch.size
        self.unconfirmed_messages -= len(batch.ids)
        self.unconfirmed_bytes -= batch.size
        if not batch.ended.done():
            batch.ended.set_result(None)

    def _set_timer(self, deadline: float) -> None:
        """Set the timer to the earliest deadline of a batch, on the event loop's clock.

        One timer for all batches costs less than one for each.
        """
        if self._timer is not None:
            self._timer.cancel()
        self._due_at, self._timer = deadline, self._loop.call_at(deadline, self._give_up_late)

    def _give_up_late(self) -> None:
        """End the waits of batches that are past their deadline, and set the timer for the others."""
        self._due_at, self._timer = NEVER, None
        now = self._loop.time() + TIMER_RESOLUTION_S
        for batch in [batch for batch in self._waiting if batch.deadline <= now]:
            self._refuse(batch)
        awaited = [batch for batch in self._written.values() if not batch.ended.done()]
        for batch in awaited:
            if batch.deadline <= now:
                batch.ended.set_result(None)
        if later := [batch.deadline for batch in [*awaited, *self._waiting] if batch.deadline > now]:
            self._set_timer(min(later))

    def give_up(self) -> None:
        """End the waits of all batches: those for room are refused, and written messages not settled are unknown."""
        self.refuse_waiting()
        for batch in self._written.values():
            if not batch.ended.done():
                batch.ended.set_result(None)

    def _with_refused_sizes(self, outcomes: bytes, payloads: Sequence[bytes]) -> bytes:
        """Return the outcomes after the broker has closed the channel because of a payload's size.

        Unknown messages above the limit were certainly not queued: they are TOO_LARGE.
        """
        limit = self.max_payload_bytes or 0
        return bytes(
            Outcome.TOO_LARGE if outcome == Outcome.UNKNOWN and len(payload) > limit else outcome
            for outcome, payload in zip(outcomes, payloads, strict=True)
        )

    def _pack(self, outgoing: Outgoing) -> bytes:
        """Return one buffer with all frames of the batch; each run of a shard goes through that shard's framer."""
        if outgoing.shards is None:
            return self._framer(0, outgoing.headers).pack(outgoing.ids, outgoing.payloads)
        return b"".join(
            [self._framer(run.shard, outgoing.headers).pack(run.ids, run.payloads) for run in outgoing.runs_by_shard()]
        )

    def _framer(self, shard: int, headers: Mapping[str, str] | None) -> PublishFramer:
        # A layout with headers takes about 15 µs: it is made only for the shards of the batch, of up to 256.
        framer = self._framers[shard]
        return framer.with_headers(headers) if headers else framer

    def _on_event(self, event: Event) -> None:
        match event:
            case Settled(acked, delivery_tag, multiple):
                if acked:
                    self._nacked_since = NEVER
                else:
                    self._nacked_since = min(self._nacked_since, self._loop.time())
                    self._first_nack_at = min(self._first_nack_at, self._nacked_since)
                self._settle(self._tracker.settle(acked=acked, delivery_tag=delivery_tag, multiple=multiple))
            case AckedRange(first_tag, last_tag):
                self._nacked_since = NEVER
                self._settle(self._tracker.ack_range(first_tag, last_tag))
            case Returned(message_id):
                self.has_returned = True
                if not self._tracker.mark_returned(message_id):
                    log.error("the broker returned message %s, which is not on the wire", message_id)
            case ChannelClosed(reply):
                self._on_channel_closed(reply)
            case Blocked(blocked):
                log.warning("the broker %s this connection", "blocked" if blocked else "unblocked")
                self._note_blocked(blocked)
                self._write_waiting()

    def _note_blocked(self, blocked: bool) -> None:
        self._blocked_s, self._blocked_at, self.is_blocked = self.blocked_s, self._loop.time(), blocked

    def _on_channel_closed(self, reply: str) -> None:
        self._channel_reply = reply
        self._transport.listen_to(None)  # aiormq may give the channel's number to another channel
        if found := _size_limit(reply):
            self.has_refused_size, self.max_payload_bytes = True, int(found[1])
        self._lose(Outcome.NACKED if self._has_refused_all(reply) else Outcome.UNKNOWN)

    def _has_refused_all(self, reply: str) -> bool:
        """Return True if the broker has refused all that was written here, for want of the right to write.

        RabbitMQ checks the right at the first message, and keeps a positive result until the channel is idle for a
        second (rabbit_channel.erl: check_resource_access, handle_pre_hibernate). So if nothing was settled, and the
        first message was written less than RIGHTS_KEPT_S ago, the broker has accepted none.
        """
        return reply.startswith("403") and self._tracker.is_untouched() and self.oldest_age_s() < RIGHTS_KEPT_S

    def _on_lost(self) -> None:
        self._note_blocked(False)
        self._lose()

    def _lose(self, outcome: Outcome = Outcome.UNKNOWN) -> None:
        if not self._lost.done():
            self.is_half_open = self.is_half_open or self.is_overdue()
            self._lost.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        self._settle(self._tracker.lose(outcome))
        self.refuse_waiting()

    def _settle(self, ranges: list[PublishedRange]) -> None:
        for published in ranges:
            batch = self._written.pop(published)
            self.unconfirmed_messages -= len(published.ids)
            self.unconfirmed_bytes -= batch.size
            if not self.is_lost:
                self.confirmed_written_at = max(self.confirmed_written_at, batch.written_at)
                self.is_half_open = False
            if not batch.ended.done():
                batch.ended.set_result(None)
            elif not self.is_lost:
                self._count_late(len(published.ids))
        if self._waiting:
            self._write_waiting()
        if self._is_retiring:
            self._give_up_retired()

    def _oldest(self) -> _Batch | None:
        oldest = self._tracker.oldest()
        return self._written[oldest] if oldest else None


async def declare_topology(settings: Settings) -> None:
    """Declare exchange and queues over a connection of its own. Raises OSError with what to do if that fails."""
    connection = PublishConnection(settings, URL(settings.amqp_nodes()[0]), lambda _late: None)
    try:
        async with asyncio.timeout(settings.amqp_connect_timeout_s), stray_cancellation_is_loss():
            await connection.open()
    except Exception as error:  # the libraries raise many kinds
        raise OSError(reason(error, connection.close_reply)) from error
    finally:
        await connection.close()
