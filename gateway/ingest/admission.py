"""Admission: a bounded number of requests in flight, and of bytes reserved for their bodies.

No account can take everything. Each may hold up to SHARE (amqp/window.py) times the free part of slots and of bytes.
An account alone gets three quarters of all, and less the more others hold. (Dynamic thresholds, Choudhury and Hahne
1998: no setting per account, and no need to know which accounts are active.)
"""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.amqp.window import fits_fair_share
from gateway.errors import Draining, Overloaded

SMOOTHING = 0.05  # weight of the newest request in `held_s`


class Admission:
    """Counts the requests in flight and the bytes reserved for their bodies, in total and by account."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self.requests = 0
        self.reserved_bytes = 0
        self.requests_of: Counter[int] = Counter()
        self.bytes_of: Counter[int] = Counter()
        self.held_s = 0.0  # smoothed time that a request holds its slot; the Retry-After of a shed request
        self.closed = False
        self.shed: Counter[str] = Counter()  # requests refused, by the resource that ran out

    @contextmanager
    def admit(self) -> Iterator["Slot"]:
        """Hold a slot for a request. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests:
            self.shed["slots"] += 1
            raise Overloaded(retry_after_s=self.held_s)
        self.requests += 1
        slot = Slot(self)
        admitted_at = time.monotonic()
        try:
            yield slot
        finally:
            self.requests -= 1
            slot.give_back()
            self.held_s += SMOOTHING * (time.monotonic() - admitted_at - self.held_s)

    def reserve(self, account_id: int, size: int) -> None:
        """Reserve an account's share of the slots, and `size` bytes for a body. Raises Overloaded."""
        requests, held = self.requests_of[account_id], self.bytes_of[account_id]
        free_requests, free_bytes = self._max_requests - self.requests, self._max_bytes - self.reserved_bytes
        has_room = size <= free_bytes
        # An account's only request always fits its share. The request has its slot already, so one more was free.
        fits_share = not requests or (
            fits_fair_share(requests + 1, free_requests + 1) and fits_fair_share(held + size, free_bytes)
        )
        if not (has_room and fits_share):
            self.shed["account_share" if has_room else "bytes"] += 1
            raise Overloaded(retry_after_s=self.held_s)
        self.reserved_bytes += size
        self.requests_of[account_id] += 1
        self.bytes_of[account_id] += size

    def give_back(self, account_id: int, size: int) -> None:
        """Give back what reserve() took."""
        self.reserved_bytes -= size
        for counter, amount in ((self.requests_of, 1), (self.bytes_of, size)):
            counter[account_id] -= amount
            if not counter[account_id]:
                del counter[account_id]


class Slot:
    """The slot of one request in flight, and what is reserved for it."""

    __slots__ = ("_admission", "_reserved")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._reserved: tuple[int, int] | None = None

    def reserve(self, account_id: int, size: int) -> None:
        """Reserve `size` bytes for a body of this account before any of it is read. Raises Overloaded."""
        self._admission.reserve(account_id, size)
        self._reserved = (account_id, size)

    def give_back(self) -> None:
        """Give back what was reserved."""
        if self._reserved is not None:
            self._admission.give_back(*self._reserved)
