"""Delivery tags ↔ outcomes. No IO, no clock.

The theory. On a channel in confirm mode the broker numbers what we publish 1, 2, 3, … and settles every number once,
by basic.ack or basic.nack, one at a time or, with `multiple`, all numbers up to the one named. A message that cannot
be routed (we publish `mandatory`) comes back as basic.return *before* its ack: the return marks it, the ack only
settles it. A batch takes a contiguous range of numbers, so one array of states and one count of the unsettled
stand for all its messages, and whoever published it waits for one thing.

Per message:   WRITTEN ──ack──→ ACKED      WRITTEN ──return──→ RETURNING ──ack, nack, loss──→ RETURNED
               WRITTEN ──nack─→ NACKED     WRITTEN ──loss, deadline──→ UNKNOWN

The line between definite and unknown is the moment the buffer is handed to the connection: what was never written
is certainly not queued; what was written and never settled may be. Unknown is an outcome of its own, never rounded.
"""

from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum


class Outcome(IntEnum):
    """What is known of one message. Only ACKED counts as queued."""

    WRITTEN = 0
    RETURNING = 1
    ACKED = 2
    NACKED = 3
    RETURNED = 4
    UNKNOWN = 5


_WRITTEN, _RETURNING = int(Outcome.WRITTEN), int(Outcome.RETURNING)  # what is not settled; all above is


def _table(written: Outcome) -> bytes:
    """A bytes.translate table that settles states: WRITTEN becomes `written`, RETURNING becomes RETURNED."""
    return bytes([written, Outcome.RETURNED, *range(Outcome.ACKED, 256)])


# For a second copy of messages whose first may be queued: that the broker refused this one says nothing of the other.
REFUSED_IS_UNKNOWN = bytes(
    Outcome.UNKNOWN if state in (Outcome.NACKED, Outcome.RETURNED) else state for state in range(256)
)
_ACK, _LOSS = _table(Outcome.ACKED), _table(Outcome.UNKNOWN)


class PublishedRange:
    """One batch on the wire: its contiguous delivery tags and what is known of each message."""

    __slots__ = ("_position", "first_tag", "ids", "states", "unsettled")

    def __init__(self, first_tag: int, ids: Sequence[str]) -> None:
        self.first_tag = first_tag
        self.ids = ids
        self.states = bytearray(len(ids))  # one Outcome per message
        self.unsettled = len(ids)
        self._position: dict[str, int] | None = None

    @property
    def last_tag(self) -> int:
        return self.first_tag + len(self.ids) - 1

    def outcomes(self) -> bytes:
        """One Outcome per message, in order: what is not settled by now is UNKNOWN."""
        return bytes(self.states.translate(_LOSS))

    def settle(self, start: int, stop: int, table: bytes) -> None:
        """Settle the messages from `start` to `stop` that are not settled yet."""
        if stop - start == 1:  # batches of one, and brokers that ack one by one: spared three copies of one byte
            state = self.states[start]
            if state <= _RETURNING:
                self.states[start] = table[state]
                self.unsettled -= 1
            return
        part = self.states[start:stop]
        self.unsettled -= part.count(_WRITTEN) + part.count(_RETURNING)
        self.states[start:stop] = part.translate(table)

    def mark_returned(self, message_id: str) -> bool:
        """Mark the message as returned; False when it is not of this range, or settled already."""
        if self._position is None:  # built at the first return: most batches never see one
            self._position = {known: position for position, known in enumerate(self.ids)}
        position = self._position.get(message_id)
        if position is None or self.states[position] != Outcome.WRITTEN:
            return False
        self.states[position] = Outcome.RETURNING
        return True


class ConfirmTracker:
    """The unsettled ranges of one channel. Methods that settle return the ranges that became wholly settled."""

    def __init__(self, *, nacked: Outcome = Outcome.NACKED) -> None:
        """`nacked` is what a nack says of a message; with quorum queues, that it is certainly not queued."""
        self._nack = _table(nacked)
        self._ranges: list[PublishedRange] = []  # ascending, contiguous; settled ones leave from the front
        self._next_tag = 1

    def add(self, ids: Sequence[str]) -> PublishedRange:
        """Give the next delivery tags to a batch that is about to be written."""
        published = PublishedRange(self._next_tag, ids)
        self._next_tag += len(ids)
        self._ranges.append(published)
        return published

    def withdraw(self, published: PublishedRange) -> None:
        """Take back the tags of the newest range: its write failed before a byte left."""
        if not self._ranges or self._ranges[-1] is not published:
            raise ValueError("only the newest range can be withdrawn")
        self._ranges.pop()
        self._next_tag = published.first_tag

    def settle(self, *, acked: bool, delivery_tag: int, multiple: bool) -> list[PublishedRange]:
        """An ack or a nack. Tags we never gave out, or that are settled already, change nothing."""
        table = _ACK if acked else self._nack
        newest = bisect_right(self._ranges, delivery_tag, key=lambda r: r.first_tag) - 1
        if newest < 0 or delivery_tag >= self._next_tag:
            return []
        touched = [r for r in self._ranges[0 if multiple else newest : newest + 1] if r.unsettled]
        for published in touched:
            stop = min(delivery_tag, published.last_tag) - published.first_tag + 1
            published.settle(0 if multiple else delivery_tag - published.first_tag, stop, table)
        settled = [published for published in touched if not published.unsettled]
        if settled:
            self._forget_settled()
        return settled

    def mark_returned(self, message_id: str) -> bool:
        """A basic.return. The ack that follows it settles the message as RETURNED."""
        return any(published.mark_returned(message_id) for published in self._ranges)

    def lose(self) -> list[PublishedRange]:
        """The channel is gone: everything written and unsettled is unknown, what was returned stays returned."""
        lost, self._ranges = [r for r in self._ranges if r.unsettled], []
        for published in lost:
            published.settle(0, len(published.states), _LOSS)
        return lost

    def oldest(self) -> PublishedRange | None:
        """The range that has been waiting longest."""
        return self._ranges[0] if self._ranges else None

    def _forget_settled(self) -> None:
        # Only from the front, to keep the ranges contiguous for bisect: a range settled early waits for its elders.
        kept = next((n for n, published in enumerate(self._ranges) if published.unsettled), len(self._ranges))
        del self._ranges[:kept]
