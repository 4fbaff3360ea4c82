"""How much may be unconfirmed at a time: what the broker confirms in good time. No IO, no clock.

A broker that slows down would otherwise be handed as much as before, and every batch would come closer to its deadline,
until all of them passed it: written, answered as unknown, sent again. So the window follows the time that confirms
take, as TCP's follows loss (additive increase, multiplicative decrease; RFC 5681): it grows by what was
confirmed in time, and shrinks once for all that was on the wire together.
"""

SHRINK = 0.7
FLOOR_MESSAGES = 2_000  # two full batches: with less a broker that has recovered would not be found out
SMOOTHING = 0.1


class ConfirmWindow:
    """The most messages that may be unconfirmed; times are in seconds on one monotonic clock."""

    def __init__(self, *, most_messages: int, target_s: float) -> None:
        self.messages = self._most = most_messages
        self._target_s = target_s
        self._shrunk_at = float("-inf")
        self.confirm_s = 0.0  # what a batch waits for its confirms, smoothed

    @property
    def share(self) -> float:
        """How far it is open, 0 < share ≤ 1: for what is bounded in octets as well."""
        return self.messages / self._most

    def note(self, messages: int, *, written_at: float, now: float) -> None:
        """A batch of `messages` has been confirmed, or given up, `now`."""
        waited_s = now - written_at
        self.confirm_s += SMOOTHING * (waited_s - self.confirm_s)
        if waited_s <= self._target_s:
            self.messages = min(self._most, self.messages + messages)
        elif written_at > self._shrunk_at:  # else it was on the wire together with one that has been counted
            self.messages = max(min(FLOOR_MESSAGES, self._most), int(self.messages * SHRINK))
            self._shrunk_at = now
