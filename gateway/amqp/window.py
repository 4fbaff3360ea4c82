"""The bound on unconfirmed messages: as many as the broker confirms in good time. No IO, no clock.

Without a bound, a broker above its capacity receives more and more. Confirms take longer and longer, until every batch
passes its deadline, is answered as unknown, and is sent again by its caller. So the window follows the time that
confirms take, as TCP's congestion window follows loss (RFC 5681, additive increase, multiplicative decrease). It grows
by the load that was confirmed in time, while it is in use (RFC 7661). It shrinks once for all unconfirmed batches
together.

Requests for which there is no room in the window wait (ingest/admission.py). A batch inside the window may still wait
for room on the broker's socket (connection.py): it counts as unconfirmed, and the wait as time to confirm.

Loads are counted in messages. A batch with large messages weighs more (`weigh`), so one window bounds messages and
bytes.
"""

import sys

START_MESSAGES = 20_000  # a broker on one machine confirms them in a few tenths of a second
FLOOR_MESSAGES = 2_000  # two full batches: enough to notice that a broker has recovered
SHRINK = 0.7
SMOOTHING = 0.1  # weight of the newest batch in `confirm_s`
UNLIMITED = sys.maxsize


class ConfirmWindow:
    """The window of one process. Loads are in messages, times in seconds of one monotonic clock."""

    def __init__(self, *, most_messages: int, most_bytes: int, target_s: float) -> None:
        self._most = most_messages
        self._messages_per_byte = most_messages / most_bytes
        self._target_s = target_s
        self._shrunk_at = float("-inf")
        self.messages = min(START_MESSAGES, most_messages)
        self.confirm_s = 0.0  # smoothed time from the choice of a connection to a batch's last confirm

    def weigh(self, messages: int, size: int) -> int:
        """Return the load of a batch with this number of messages, and with `size` bytes."""
        return max(messages, int(size * self._messages_per_byte))

    def room(self, unconfirmed: int) -> int:
        """Return the load that may be published; UNLIMITED when nothing is unconfirmed, so that any batch fits."""
        return self.messages - unconfirmed if unconfirmed else UNLIMITED

    def adapt(self, load: int, *, unconfirmed: int, published_at: float, now: float) -> None:
        """Adapt the window to a batch that was confirmed or given up at `now`.

        `unconfirmed` is the unconfirmed load at `published_at`, the batch included.
        """
        waited_s = now - published_at
        self.confirm_s += SMOOTHING * (waited_s - self.confirm_s)
        if waited_s > self._target_s:
            if published_at > self._shrunk_at:  # otherwise the batch was published before the window shrank
                self.messages = max(min(FLOOR_MESSAGES, self._most), int(self.messages * SHRINK))
                self._shrunk_at = now
        elif 2 * unconfirmed >= self.messages:
            self.messages = min(self._most, self.messages + load)
