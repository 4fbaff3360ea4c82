"""The outcomes of published messages, from the confirms and returns of their channel. No IO, no clock.

On a channel in confirm mode the broker numbers our messages 1, 2, 3, … These numbers are the delivery tags. The broker
settles every tag once, by basic.ack or basic.nack: one at a time, or with `multiple` all tags up to the given one. We
publish `mandatory`: a message that cannot be routed comes back as basic.return *before* its ack. The return
marks the message as returned, and the ack only settles it. A batch has a contiguous range of tags. So one array of
states and one count of unsettled messages represent the batch, and its publisher waits for one future.

Per message:   WRITTEN ──ack──→ ACKED      WRITTEN ──return──→ RETURNING ──ack, nack, loss, deadline──→ RETURNED
               WRITTEN ──nack─→ NACKED     WRITTEN ──loss, deadline──→ UNKNOWN

A message is written once its bytes were handed to the transport. A message that was never written is certainly not
queued, and has no tag and no state here. A message that was written and never settled may be queued. Its outcome is
UNKNOWN, and never guessed.
"""

from bisect import bisect_right
from collections.abc import Sequence
from enum import IntEnum
from operator import attrgetter


class Outcome(IntEnum):
    """The state of one message, in the end its outcome. Only ACKED counts as queued."""

    WRITTEN = 0
    RETURNING = 1
    ACKED = 2
    NACKED = 3
    RETURNED = 4
    UNKNOWN = 5
    TOO_LARGE = 6  # above the broker's limit: certainly not queued; once the limit is known, not written


_first_tag = attrgetter("first_tag")
_WRITTEN, _RETURNING = int(Outcome.WRITTEN), int(Outcome.RETURNING)  # the unsettled states; all above are settled


def _table(written: Outcome) -> bytes:
    """Return a bytes.translate table that settles states: WRITTEN becomes `written`, RETURNING becomes RETURNED."""
    return bytes([written, Outcome.RETURNED, *range(Outcome.ACKED, 256)])


# For a second copy of a message whose first copy may be queued: a refusal of the second says nothing about the first.
REFUSED_IS_UNKNOWN = bytes(
    Outcome.UNKNOWN if state in (Outcome.NACKED, Outcome.RETURNED, Outcome.TOO_LARGE) else state for state in range(256)
)
_ACK, _LOSS = _table(Outcome.ACKED), _table(Outcome.UNKNOWN)


class PublishedRange:
    """One written batch: its contiguous delivery tags, and the state of each message."""

    __slots__ = ("_position", "first_tag", "ids", "states", "unsettled")

    def __init__(self, first_tag: int, ids: Sequence[str]) -> None:
        self.first_tag = first_tag
        self.ids = ids
        self.states = bytearray(len(ids))  # one Outcome per message
        self.unsettled = len(ids)
        self._position: dict[str, int] | None = None

    @property
    def last_tag(self) -> int:
        """The delivery tag of the last message."""
        return self.first_tag + len(self.ids) - 1

    def outcomes(self) -> bytes:
        """Return one Outcome per message, in order. An unsettled message is UNKNOWN, or RETURNED if it came back."""
        return bytes(self.states.translate(_LOSS))

    def settle(self, start: int, stop: int, table: bytes) -> None:
        """Settle the messages from position `start` to before `stop` that are not settled yet."""
        # Frequent for small batches and single acks. The slices below would copy one byte three times.
        if stop - start == 1:
            state = self.states[start]
            if state <= _RETURNING:
                self.states[start] = table[state]
                self.unsettled -= 1
            return
        part = self.states[start:stop]
        self.unsettled -= part.count(_WRITTEN) + part.count(_RETURNING)
        self.states[start:stop] = part.translate(table)

    def mark_returned(self, message_id: str) -> bool:
        """Mark the message as returned. Return False if it is not of this range, or already settled."""
        if self._position is None:  # built at the first return: most batches have none
            self._position = {known: position for position, known in enumerate(self.ids)}
        position = self._position.get(message_id)
        if position is None or self.states[position] != Outcome.WRITTEN:
            return False
        self.states[position] = Outcome.RETURNING
        return True


class ConfirmTracker:
    """The unsettled ranges of one channel. Methods that settle return the ranges that they settled completely."""

    def __init__(self, *, nacked: Outcome = Outcome.NACKED) -> None:
        """`nacked` is the outcome of a nack: NACKED (certainly not queued) for quorum queues, otherwise UNKNOWN."""
        self._nack = _table(nacked)
        self._ranges: list[PublishedRange] = []  # ascending, contiguous; settled ones are removed from the front
        self._next_tag = 1

    def add(self, ids: Sequence[str]) -> PublishedRange:
        """Assign the next delivery tags to a batch that is about to be written."""
        published = PublishedRange(self._next_tag, ids)
        self._next_tag += len(ids)
        self._ranges.append(published)
        return published

    def withdraw(self, published: PublishedRange) -> None:
        """Take back the tags of the newest range, after its write failed before the first byte."""
        if not self._ranges or self._ranges[-1] is not published:
            raise ValueError("only the newest range can be withdrawn")
        self._ranges.pop()
        self._next_tag = published.first_tag

    def settle(self, *, acked: bool, delivery_tag: int, multiple: bool) -> list[PublishedRange]:
        """Apply an ack or a nack. Unknown tags and settled tags change nothing."""
        if delivery_tag >= self._next_tag:
            return []
        return self._settle(_ACK if acked else self._nack, 1 if multiple else delivery_tag, delivery_tag)

    def ack_range(self, first_tag: int, last_tag: int) -> list[PublishedRange]:
        """Apply the acks of consecutive tags, each for one message. Unknown and settled tags change nothing."""
        return self._settle(_ACK, first_tag, last_tag)

    def _settle(self, table: bytes, first_tag: int, last_tag: int) -> list[PublishedRange]:
        ranges = self._ranges
        oldest = newest = bisect_right(ranges, last_tag, key=_first_tag) - 1
        if newest < 0:
            return []
        while oldest and ranges[oldest].first_tag > first_tag:
            oldest -= 1
        touched = [r for r in ranges[oldest : newest + 1] if r.unsettled]
        for published in touched:
            start = max(first_tag - published.first_tag, 0)
            stop = min(last_tag, published.last_tag) - published.first_tag + 1
            published.settle(start, stop, table)
        settled = [published for published in touched if not published.unsettled]
        if settled:
            self._forget_settled()
        return settled

    def mark_returned(self, message_id: str) -> bool:
        """Apply a basic.return; False if no range has the message. Its ack will settle it as RETURNED."""
        return any(published.mark_returned(message_id) for published in self._ranges)

    def lose(self, outcome: Outcome = Outcome.UNKNOWN) -> list[PublishedRange]:
        """Settle all messages after the loss of the channel: with `outcome`, or as RETURNED if they came back."""
        lost, self._ranges = [r for r in self._ranges if r.unsettled], []
        for published in lost:
            published.settle(0, len(published.states), _table(outcome))
        return lost

    def is_untouched(self) -> bool:
        """Return True if messages were written on the channel, and the broker has settled and returned none of them."""
        return bool(self._ranges) and self._ranges[0].first_tag == 1 and not any(any(r.states) for r in self._ranges)

    def oldest(self) -> PublishedRange | None:
        """Return the oldest range that is not completely settled; None if there is none."""
        return self._ranges[0] if self._ranges else None

    def _forget_settled(self) -> None:
        # Only from the front: the ranges must stay contiguous for bisect.
        first_unsettled = next((n for n, each in enumerate(self._ranges) if each.unsettled), len(self._ranges))
        del self._ranges[:first_unsettled]
