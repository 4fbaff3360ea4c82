"""Publishing policy: which connection takes a batch, what is published again, what is refused.

reconnection.py keeps the connections open. confirms.py decides what counts as queued and what is unknown.
"""

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress

from gateway.amqp.confirms import Outcome
from gateway.amqp.connection import TOO_LATE_S, PublishConnection
from gateway.amqp.outgoing import Outgoing
from gateway.amqp.reconnection import PublishConnections
from gateway.amqp.window import ConfirmWindow
from gateway.config import Settings
from gateway.errors import Overloaded, QueueUnavailable

RETRY_MARGIN_S = 0.5  # a batch with less time than this before its deadline is not given to another connection
REOPEN_S = 2.0  # longest wait for a channel that is being opened again
SHARED_CONNECTION_BYTES = 64 * 1024  # with less unconfirmed, the first connection takes all batches; about 200 messages


class Publisher:
    """Publishes batches, each with one outcome per message."""

    def __init__(self, settings: Settings, *, first_node: int | None = None) -> None:
        """`first_node`: as for PublishConnections."""
        self._settings = settings
        self.connections = PublishConnections(settings, first_node=first_node)
        self.window = ConfirmWindow(
            most_messages=settings.max_unconfirmed_messages,
            most_bytes=settings.max_unconfirmed_bytes,
            # A longer queue at the broker adds latency, not goodput. With four times this target, the goodput at ten
            # times the load was the same, but some batches ended as unknown. The rate on a backlog was the same, too
            # (scripts/faults --scenario overload, scripts/bench sweep).
            target_s=settings.confirm_timeout_s / 16,
        )
        self.outcomes: Counter[Outcome] = Counter()  # of AMQP messages, as `publish` returned them
        self._load_without_connection = 0  # of batches that wait for a channel or a connection
        self.republished = 0  # messages of which a second copy was written, after their connection was lost

    def start(self) -> None:
        """Start connecting. Returns at once."""
        self.connections.start()

    def give_up(self) -> None:
        """End the waits of all batches, shortly before the process ends.

        Written messages that are not settled are unknown. Batches that wait for room on the socket, or for a channel or
        a connection, are refused, as are those that come later.
        """
        self.connections.end_waits()
        for connection in self.connections.all:
            connection.give_up()

    async def close(self) -> None:
        """Close every connection, as PublishConnections.close does."""
        await self.connections.close()

    @property
    def unconfirmed_messages(self) -> int:
        """Number of unconfirmed messages, written or waiting for room on the socket; draining connections included."""
        return sum(connection.unconfirmed_messages for connection in self.connections.all)

    @property
    def unconfirmed_bytes(self) -> int:
        """Bytes of the unconfirmed messages, frames included."""
        return sum(connection.unconfirmed_bytes for connection in self.connections.all)

    @property
    def oldest_age_s(self) -> float:
        """Seconds since the write of the oldest batch that is not settled; 0.0 when there is none."""
        return max((connection.oldest_age_s() for connection in self.connections.all), default=0.0)

    def is_usable(self) -> bool:
        """Return True if a connection may be given a batch now, or as soon as a channel is open again."""
        return self.connections.is_usable() or self.connections.is_reopening()

    @property
    def max_payload_bytes(self) -> int | None:
        """The broker's limit on a payload, in bytes; None as long as it is not known."""
        return self.connections.max_payload_bytes

    def weigh(self, messages: int, size: int) -> int:
        """Return the load of a batch with this number of messages, and with `size` bytes."""
        return self.window.weigh(messages, size)

    def load_of(self, outgoing: Outgoing) -> int:
        """Return the load of a batch."""
        return self.weigh(len(outgoing), outgoing.payload_bytes)

    def room(self, reserved: int = 0) -> int:
        """Return the load that may be published beside the unconfirmed load and what is reserved for others.

        Batches that wait for a channel or a connection count, too: all of them are published as soon as one is open.
        """
        return self.window.room(self._unconfirmed_load() + self._load_without_connection + reserved)

    def _unconfirmed_load(self) -> int:
        """Return the unconfirmed load, without that of draining connections."""
        messages = size = 0
        for connection in self.connections.open:  # a few times per request: twice as fast as sum()
            messages += connection.unconfirmed_messages
            size += connection.unconfirmed_bytes
        return self.window.weigh(messages, size)

    async def publish(self, outgoing: Outgoing, *, deadline: float | None = None) -> bytes:
        """Publish one batch, in order, on one channel. Wait until all is confirmed, or until the deadline.

        `deadline` is on the event loop's clock; None means confirm_timeout_s from now. Returns one Outcome per
        message. Payloads above the broker's limit are not written: they are TOO_LARGE.

        Raises QueueUnavailable or Overloaded if nothing at all was written. Overloaded means that the load of the batch
        does not fit into the confirm window. The caller should wait for room before (ingest/admission.py).
        """
        if deadline is None:
            deadline = asyncio.get_running_loop().time() + self._settings.confirm_timeout_s
        fitting = self._fitting(outgoing)
        if len(fitting) == len(outgoing):
            outcomes = await self._publish(outgoing, deadline)
        else:
            outcomes = await self._publish_only(fitting, outgoing, deadline)
        self._count(outcomes)
        return outcomes

    async def _publish_only(self, fitting: Sequence[int], outgoing: Outgoing, deadline: float) -> bytes:
        """Publish only the payloads at the positions `fitting`; the others are TOO_LARGE."""
        spread = bytearray([Outcome.TOO_LARGE]) * len(outgoing)
        for position, outcome in zip(fitting, await self._publish(outgoing.only(fitting), deadline), strict=True):
            spread[position] = outcome
        return bytes(spread)

    def _fitting(self, outgoing: Outgoing) -> Sequence[int]:
        """Return the positions of the payloads that are not above the broker's limit, as far as that is known."""
        limit = self.max_payload_bytes
        if limit is None:
            return range(len(outgoing))
        return [position for position, payload in enumerate(outgoing.payloads) if len(payload) <= limit]

    async def _publish(self, outgoing: Outgoing, deadline: float) -> bytes:
        if not outgoing:
            return b""
        if self.connections.has_ended_waits:  # after give_up(), nothing would end a wait for confirms
            raise QueueUnavailable
        clock = asyncio.get_running_loop().time
        if deadline < clock() + TOO_LATE_S:
            raise QueueUnavailable
        connection = await self._choose(outgoing, deadline)
        load, unconfirmed, published_at = self.load_of(outgoing), self._unconfirmed_load(), clock()
        if load > self.window.room(unconfirmed):
            raise Overloaded(retry_after_s=self.window.confirm_s)
        while True:
            try:
                outcomes = await connection.publish(outgoing, deadline)
                break
            except QueueUnavailable:
                if self.connections.may_use(connection):  # there was no room in time, or give_up() has ended the wait
                    raise
                # For example, the connection was lost, retired or replaced while the batch waited for room on its
                # socket. Nothing of the batch was written, so another connection can take it without a second copy.
                connection = await self._wait_for_usable(deadline - RETRY_MARGIN_S, outgoing)
                # The broker's limit may have become known in the meantime: a larger payload would close the next
                # channel, too.
                fitting = self._fitting(outgoing)
                if len(fitting) < len(outgoing):
                    return await self._publish_only(fitting, outgoing, deadline)
                unconfirmed, published_at = self._unconfirmed_load(), clock()
        if not connection.is_lost:
            self.window.adapt(load, unconfirmed=unconfirmed + load, published_at=published_at, now=clock())
        elif Outcome.UNKNOWN in outcomes:
            outcomes = await self._republish_unknown(outgoing, outcomes, deadline)
        return outcomes

    async def _choose(self, outgoing: Outgoing, deadline: float) -> PublishConnection:
        """Return the best usable connection. If there is none, and a channel is being reopened, wait up to REOPEN_S.

        Raises QueueUnavailable.
        """
        try:
            return self._best_usable()
        except QueueUnavailable:
            if not self.connections.is_reopening():
                raise
        now = asyncio.get_running_loop().time()
        return await self._wait_for_usable(min(deadline - TOO_LATE_S, now + REOPEN_S), outgoing)

    async def _republish_unknown(self, outgoing: Outgoing, outcomes: bytes, deadline: float) -> bytes:
        """Publish the unknown messages once more, on another connection or channel, with the same ids.

        Called only after a lost connection or channel: a repeated message is better than a lost one. After a timeout,
        or under a broker alarm, the first copy is probably still on its way, and a second would double the load. A
        message that the broker refuses in the second try stays unknown: the first copy may have been queued.

        There is no third try, with two exceptions: nothing of the second copy was written, or the channel of the second
        copy was closed because of a payload above the broker's limit, which may be another caller's.
        """
        merged = bytearray(outcomes)
        while unknown := [n for n in self._fitting(outgoing) if merged[n] == Outcome.UNKNOWN]:
            connection = None
            try:
                again = outgoing.only(unknown)
                connection = await self._wait_for_usable(deadline - RETRY_MARGIN_S, again)
                second = await connection.publish(again, deadline)
            except QueueUnavailable:
                if connection is None or self.connections.may_use(connection):
                    break
                continue  # nothing of the second copy was written, and this connection takes no batches any more
            self.republished += len(unknown)
            for position, outcome in zip(unknown, second, strict=True):
                if outcome == Outcome.ACKED:
                    merged[position] = outcome
            if not connection.has_refused_size:
                break
        return bytes(merged)

    def _best_usable(self) -> PublishConnection:
        """Return the best usable connection. Raises QueueUnavailable if there is none.

        While the first one has less than SHARED_CONNECTION_BYTES unconfirmed, it takes all batches: writes of one turn
        of the event loop then share a system call and an ack (scripts/bench compare, batches of 1). Otherwise the one
        with the fewest unconfirmed bytes is the best.
        """
        usable = self.connections.usable()
        if usable[0].unconfirmed_bytes < SHARED_CONNECTION_BYTES:
            return usable[0]
        return min(usable, key=lambda connection: connection.unconfirmed_bytes)

    async def _wait_for_usable(self, deadline: float, outgoing: Outgoing) -> PublishConnection:
        """Return the best usable connection for a batch; wait for one until `deadline`, on the event loop's clock.

        Meanwhile the load of the batch counts in `room()`. Raises QueueUnavailable: there was none, or give_up() has
        ended the waits.
        """
        if asyncio.get_running_loop().time() > deadline:
            raise QueueUnavailable
        load = self.load_of(outgoing)
        self._load_without_connection += load
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self.connections.wait_usable()
        finally:
            self._load_without_connection -= load
        if self.connections.has_ended_waits:
            raise QueueUnavailable
        return self._best_usable()

    def _count(self, outcomes: bytes) -> None:
        acked = outcomes.count(Outcome.ACKED)
        self.outcomes[Outcome.ACKED] += acked
        if acked < len(outcomes):
            for outcome in (Outcome.NACKED, Outcome.RETURNED, Outcome.UNKNOWN, Outcome.TOO_LARGE):
                self.outcomes[outcome] += outcomes.count(outcome)
