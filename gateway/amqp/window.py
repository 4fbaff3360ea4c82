"""The bound on unconfirmed messages: as many as the broker confirms in good time. No IO, no clock.

Without a bound, a broker above its capacity receives ever more. Confirms take longer and longer, until every batch
passes its deadline, is answered as unknown, and is sent again. So the window follows the time that confirms take, as
TCP's congestion window follows loss (RFC 5681, additive increase, multiplicative decrease). It grows by the load that
was confirmed in time, while the window is in use (RFC 7661). It shrinks once for all batches on the wire together.

One account may use up to SHARE times the free load, which leaves room for others (ingest/admission.py has the theory).

Loads are counted in messages. A batch with large messages weighs more (`weigh`), so one window bounds messages and
bytes.
"""

from collections import Counter

START_MESSAGES = 20_000  # a broker on one machine confirms them in a few tenths of a second
FLOOR_MESSAGES = 2_000  # two full batches: enough to notice that a broker has recovered
SHRINK = 0.7
SHARE = 3
SMOOTHING = 0.1  # weight of the newest batch in `confirm_s`
MOST_REFUSED = 10_000  # accounts whose last refusal is remembered; at this number all are forgotten


def fits_fair_share(held: int, free: int) -> bool:
    """Return True if an account may hold so much while `free` is free: up to SHARE times the free part."""
    return held <= SHARE * free


class ConfirmWindow:
    """The window of one process. Loads are in messages, times in seconds of one monotonic clock."""

    def __init__(self, *, most_messages: int, most_bytes: int, target_s: float) -> None:
        self._most = most_messages
        self._messages_per_byte = most_messages / most_bytes
        self._target_s = target_s
        self._shrunk_at = float("-inf")
        self._refused: dict[int, int] = {}  # account → its last refused load
        self.load_of: Counter[int] = Counter()  # account → the load that its callers wait for
        self.messages = min(START_MESSAGES, most_messages)
        self.confirm_s = 0.0  # smoothed time from write to last confirm

    def weigh(self, messages: int, size: int) -> int:
        """Return the load of a batch with this number of messages, and with `size` bytes."""
        return max(messages, int(size * self._messages_per_byte))

    def has_room(self, load: int, *, unconfirmed: int, account_id: int) -> bool:
        """Return True if a batch may be written.

        A batch may always be written when nothing is unconfirmed. Otherwise its load must be free, and the load of an
        account with several batches must stay within SHARE times the free load.
        """
        mine, free = self.load_of[account_id], self.messages - unconfirmed
        fits = not unconfirmed or (load <= free and (not mine or fits_fair_share(mine + load, free)))
        if fits:
            self._refused.pop(account_id, None)
        else:
            if len(self._refused) >= MOST_REFUSED:
                self._refused.clear()
            self._refused[account_id] = load
        return fits

    def is_full(self, *, unconfirmed: int, account_id: int) -> bool:
        """Return True if the account's last batch was refused, and would be refused again."""
        load = self._refused.get(account_id)
        return load is not None and not self.has_room(load, unconfirmed=unconfirmed, account_id=account_id)

    def take(self, load: int, account_id: int) -> None:
        """Add the load of a batch that is about to be written."""
        self.load_of[account_id] += load

    def give_back(self, load: int, account_id: int) -> None:
        """Subtract the load of a batch for which no caller waits any more."""
        self.load_of[account_id] -= load
        if not self.load_of[account_id]:
            del self.load_of[account_id]

    def adapt(self, load: int, *, unconfirmed: int, written_at: float, now: float) -> None:
        """Adapt the window to a batch that was confirmed or given up at `now`.

        `unconfirmed` is the load on the wire at `written_at`, the batch included.
        """
        waited_s = now - written_at
        self.confirm_s += SMOOTHING * (waited_s - self.confirm_s)
        if waited_s > self._target_s:
            if written_at > self._shrunk_at:  # otherwise the window has already shrunk for this batch's time
                self.messages = max(min(FLOOR_MESSAGES, self._most), int(self.messages * SHRINK))
                self._shrunk_at = now
        elif 2 * unconfirmed >= self.messages:
            self.messages = min(self._most, self.messages + load)
