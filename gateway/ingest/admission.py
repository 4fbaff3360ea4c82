"""Admission: a bounded number of requests in flight, and of bytes reserved for them.

A request holds its slot until its answer has been written, or its connection is lost. It holds the bytes of its body,
or of its answer if that is larger.

No account can take everything. Each may hold up to SHARE (amqp/window.py) times the free part of slots and of bytes.
An account alone gets three quarters of all, and less the more others hold. (Dynamic thresholds, Choudhury and Hahne
1998: no setting per account, and no need to know which accounts are active.)
"""

import time
from collections import Counter
from typing import Self

from gateway.amqp.window import fits_fair_share
from gateway.errors import Draining, Overloaded

SMOOTHING = 0.05  # weight of the newest request in `held_s`
NOBODY = 0  # no account has this id


class Admission:
    """Counts the requests in flight and the bytes reserved for them, in total and by account."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self.max_bytes = max_bytes
        self.requests = 0
        self.reserved_bytes = 0
        self.requests_of: Counter[int] = Counter()
        self.bytes_of: Counter[int] = Counter()
        self.held_s = 0.0  # smoothed time that a request holds its slot; the Retry-After of a shed request
        self.closed = False
        self.shed: Counter[str] = Counter()  # requests refused, by the resource that ran out

    def admit(self) -> "Slot":
        """Return a slot for a request, to be given back at its end. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests:
            self.shed["slots"] += 1
            raise Overloaded(retry_after_s=self.held_s)
        self.requests += 1
        return Slot(self)

    def refuse_beyond(self, account_id: int, requests: int, size: int) -> None:
        """Raise Overloaded unless an account may hold so many requests, and `size` bytes more."""
        free_requests, free_bytes = self._max_requests - self.requests, self.max_bytes - self.reserved_bytes
        has_room = size <= free_bytes
        # An account's only request always fits its share. The request has its slot already, so one more was free.
        fits_share = requests <= 1 or (
            fits_fair_share(requests, free_requests + 1)
            and fits_fair_share(self.bytes_of[account_id] + size, free_bytes)
        )
        if not (has_room and fits_share):
            self.shed["account_share" if has_room else "bytes"] += 1
            raise Overloaded(retry_after_s=self.held_s)

    def change(self, account_id: int, requests: int, size: int) -> None:
        """Change what an account holds by so many requests and bytes."""
        self.reserved_bytes += size
        for counter, amount in ((self.requests_of, requests), (self.bytes_of, size)):
            counter[account_id] += amount
            if not counter[account_id]:
                del counter[account_id]

    def end(self, held_s: float) -> None:
        """Take back the slot of a request that held it for so long."""
        self.requests -= 1
        self.held_s += SMOOTHING * (held_s - self.held_s)


class Slot:
    """The slot of one request in flight, and what is reserved for it. A `with` block gives it back at its end."""

    __slots__ = ("_account_id", "_admission", "_admitted_at", "_is_held", "_reserved")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._admitted_at = time.monotonic()
        self._is_held = True
        self._account_id = NOBODY
        self._reserved = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def reserve(self, account_id: int, size: int) -> None:
        """Reserve `size` bytes for a body of this account before any of it is read. Raises Overloaded."""
        self._admission.refuse_beyond(account_id, self._admission.requests_of[account_id] + 1, size)
        self._admission.change(account_id, 1, size)
        self._account_id, self._reserved = account_id, size

    def weigh(self, size: int) -> None:
        """Reserve `size` bytes instead, once the body's cost is known. Call `reserve` first. Raises Overloaded.

        A single request may take all bytes, so that a body of any allowed size is served.
        """
        size = min(size, self._admission.max_bytes)
        if size != self._reserved:
            if size > self._reserved:
                requests = self._admission.requests_of[self._account_id]
                self._admission.refuse_beyond(self._account_id, requests, size - self._reserved)
            self._change_to(size)

    def hold_answer(self, size: int) -> None:
        """Reserve `size` bytes if that is more than is reserved. An answer cannot be refused any more."""
        if self._account_id != NOBODY and size > self._reserved:
            self._change_to(size)

    def _change_to(self, size: int) -> None:
        self._admission.change(self._account_id, 0, size - self._reserved)
        self._reserved = size

    def give_back(self) -> None:
        """Give back the slot and what was reserved. Further calls do nothing."""
        if self._is_held:
            self._is_held = False
            self._admission.end(time.monotonic() - self._admitted_at)
            if self._account_id != NOBODY:
                self._admission.change(self._account_id, -1, -self._reserved)
