"""How much may be unconfirmed at a time: what the broker confirms in good time. No IO, no clock.

A broker that is asked for more than it can do would otherwise be handed ever more, and every batch would come closer
to its deadline, until all of them passed it: written, answered as unknown, sent again. So the window follows the time
that confirms take, as TCP's follows loss (RFC 5681, additive increase, multiplicative decrease): it grows by what was
confirmed in time, while it is made use of (RFC 7661), and shrinks once for all that was on the wire together.

One account may take up to SHARE times the free part, and so leaves room for others (ingest/admission.py has the
theory).

Loads are counted in messages; large ones weigh more (`weigh`), so that one window bounds messages and bytes.
"""

from collections import Counter

START_MESSAGES = 20_000  # some tenths of a second of one machine's broker
FLOOR_MESSAGES = 2_000  # two full batches: with less a broker that has recovered would not be found out
SHRINK = 0.7
SHARE = 3
SMOOTHING = 0.1
MOST_REFUSED = 10_000  # accounts remembered as refused; beyond, all are forgotten


def fits_fair_share(held: int, free: int) -> bool:
    """Return True if an account may hold so much while `free` is free: up to SHARE times the free part."""
    return held <= SHARE * free


class ConfirmWindow:
    """The most that may be unconfirmed; times are in seconds on one monotonic clock."""

    def __init__(self, *, most_messages: int, most_bytes: int, target_s: float) -> None:
        self._most = most_messages
        self._messages_per_byte = most_messages / most_bytes
        self._target_s = target_s
        self._shrunk_at = float("-inf")
        self._refused: dict[int, int] = {}  # account → the load that had no room
        self.of: Counter[int] = Counter()  # account → what its callers are waiting for
        self.messages = min(START_MESSAGES, most_messages)
        self.confirm_s = 0.0  # what a batch waits for its confirms, smoothed

    def weigh(self, messages: int, size: int) -> int:
        """The load of so many messages with so many bytes."""
        return max(messages, int(size * self._messages_per_byte))

    def has_room(self, load: int, *, unconfirmed: int, account_id: int) -> bool:
        """Whether a batch may be written; one alone always may, and an account's only one where there is room."""
        mine, free = self.of[account_id], self.messages - unconfirmed
        fits = not unconfirmed or (load <= free and (not mine or fits_fair_share(mine + load, free)))
        if fits:
            self._refused.pop(account_id, None)
        else:
            if len(self._refused) >= MOST_REFUSED:
                self._refused.clear()
            self._refused[account_id] = load
        return fits

    def is_full(self, *, unconfirmed: int, account_id: int) -> bool:
        """Whether a batch of this account has been refused, and would be again."""
        load = self._refused.get(account_id)
        return load is not None and not self.has_room(load, unconfirmed=unconfirmed, account_id=account_id)

    def take(self, load: int, account_id: int) -> None:
        """A batch is about to be written."""
        self.of[account_id] += load

    def give_back(self, load: int, account_id: int) -> None:
        """Its caller no longer waits for it."""
        self.of[account_id] -= load
        if not self.of[account_id]:
            del self.of[account_id]

    def note(self, load: int, *, unconfirmed: int, written_at: float, now: float) -> None:
        """A batch was confirmed, or given up, `now`; when it was written, `unconfirmed` were on the wire, with it."""
        waited_s = now - written_at
        self.confirm_s += SMOOTHING * (waited_s - self.confirm_s)
        if waited_s > self._target_s:
            if written_at > self._shrunk_at:  # else it was on the wire together with one that has been counted
                self.messages = max(min(FLOOR_MESSAGES, self._most), int(self.messages * SHRINK))
                self._shrunk_at = now
        elif 2 * unconfirmed >= self.messages:
            self.messages = min(self._most, self.messages + load)
