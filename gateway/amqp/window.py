"""How much may be unconfirmed at a time: what the broker confirms in good time. No IO, no clock.

A broker that is asked for more than it can do would otherwise be handed ever more, and every batch would come closer
to its deadline, until all of them passed it: written, answered as unknown, sent again. So the window follows the time
that confirms take, as TCP's follows loss (RFC 5681, additive increase, multiplicative decrease): it grows by what was
confirmed in time, while it is made use of (RFC 7661), and shrinks once for all that was on the wire together.
"""

START_MESSAGES = 20_000  # some tenths of a second of one machine's broker
FLOOR_MESSAGES = 2_000  # two full batches: with less a broker that has recovered would not be found out
SHRINK = 0.7
REOPEN = 0.9  # once full, it is full until so much of it, and no more, is in use
SMOOTHING = 0.1


class ConfirmWindow:
    """The most messages that may be unconfirmed; times are in seconds on one monotonic clock."""

    def __init__(self, *, most_messages: int, target_s: float) -> None:
        self._most = most_messages
        self._target_s = target_s
        self._shrunk_at = float("-inf")
        self._was_full = False
        self.messages = min(START_MESSAGES, most_messages)
        self.confirm_s = 0.0  # what a batch waits for its confirms, smoothed

    @property
    def share(self) -> float:
        """How far it is open, 0 < share ≤ 1: for what is bounded in octets as well."""
        return self.messages / self._most

    def has_room(self, messages: int, *, unconfirmed: int) -> bool:
        """Whether a batch of `messages` may be written; one alone always may."""
        self._was_full = bool(unconfirmed) and unconfirmed + messages > self.messages
        return not self._was_full

    def is_full(self, *, unconfirmed: int) -> bool:
        """Whether a batch has been refused, and little has been confirmed since: so would be whatever comes now."""
        self._was_full = self._was_full and unconfirmed > REOPEN * self.messages
        return self._was_full

    def note(self, messages: int, *, unconfirmed: int, written_at: float, now: float) -> None:
        """A batch was confirmed, or given up, `now`; when it was written, `unconfirmed` were on the wire, with it."""
        waited_s = now - written_at
        self.confirm_s += SMOOTHING * (waited_s - self.confirm_s)
        if waited_s > self._target_s:
            if written_at > self._shrunk_at:  # else it was on the wire together with one that has been counted
                self.messages = max(min(FLOOR_MESSAGES, self._most), int(self.messages * SHRINK))
                self._shrunk_at = now
        elif 2 * unconfirmed >= self.messages:
            self.messages = min(self._most, self.messages + messages)
