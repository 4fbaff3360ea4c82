"""A bounded place for requests in flight: what does not fit is refused before it costs anything.

No account can fill the house: each may hold at most SHARE times what is free, of places and of bytes. Alone it gets
three quarters of all; the more others hold, the less. (Dynamic thresholds, Choudhury and Hahne 1998: nothing to set
per account, and nobody has to know who is active.)
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.errors import Draining, Overloaded

SHARE = 3
SMOOTHING = 0.05


class Admission:
    """Counts the requests in flight and the bytes of their bodies, in all and by account."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.reserved_bytes = 0
        self.requests_of: Counter[int] = Counter()
        self.bytes_of: Counter[int] = Counter()
        self.held_s = 0.0  # how long a request keeps its place, smoothed: when one may be free again
        self.closed = False
        self.shed: Counter[str] = Counter()  # how many requests found no room, and what there was too little of

    @contextmanager
    def admit(self) -> Iterator["Place"]:
        """Hold a place for a request. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests:
            self.shed["slots"] += 1
            raise Overloaded(retry_after_s=self.held_s)
        self.requests += 1
        place = Place(self)
        admitted_at = time.monotonic()
        try:
            yield place
        finally:
            self.requests -= 1
            place.give_back()
            self.held_s += SMOOTHING * (time.monotonic() - admitted_at - self.held_s)

    def reserve(self, account_id: int, size: int) -> None:
        """Take an account's share of the places, and room for a body; a Place gives them back."""
        requests, held = self.requests_of[account_id], self.bytes_of[account_id]
        free_requests, free_bytes = self._max_requests - self.requests, self._max_bytes - self.reserved_bytes
        has_no_room = size > free_bytes
        if has_no_room or (
            requests  # its only one is nobody's loss
            and (requests >= SHARE * (free_requests + 1) or held + size > SHARE * free_bytes)
        ):
            self.shed["bytes" if has_no_room else "account_share"] += 1
            raise Overloaded(retry_after_s=self.held_s)
        self.reserved_bytes += size
        self.requests_of[account_id] += 1
        self.bytes_of[account_id] += size

    def give_back(self, account_id: int, size: int) -> None:
        """What reserve() took."""
        self.reserved_bytes -= size
        for counter, amount in ((self.requests_of, 1), (self.bytes_of, size)):
            counter[account_id] -= amount
            if not counter[account_id]:
                del counter[account_id]


class Place:
    """One request's place, and what is reserved for it."""

    __slots__ = ("_admission", "_reserved")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._reserved: tuple[int, int] | None = None

    def reserve(self, account_id: int, size: int) -> None:
        """Reserve room for a body of this account before any of it is read. Raises Overloaded."""
        self._admission.reserve(account_id, size)
        self._reserved = (account_id, size)

    def give_back(self) -> None:
        """Give back what was reserved."""
        if self._reserved is not None:
            self._admission.give_back(*self._reserved)
