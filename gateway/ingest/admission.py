"""Admission: a request waits for room, and is refused if that takes too long.

A request holds its slot until its answer has been written. Without a free slot it is refused at once: slots bound the
number of waiting requests. With a slot it waits for a grant, which accounts get in turn (fair_queue.py): until the
confirm window has room for its messages, and there is room for the bytes of its body. A body that is not small is read
after the wait. Until then TCP flow control slows the caller down. The published batches of an account alone may fill
the whole window. Its grants whose bodies are still being read may take half of the free room.

The wait is limited as in CoDel (Nichols and Jacobson, ACM Queue 2012), in Facebook's adaptive form (Maurer, "Fail at
Scale", ACM Queue 2015): a queue that has been standing for long gets a shorter limit.

An account leaves slots and bytes to the others: it may hold up to SHARE times what is free. That is three quarters for
an account alone, and less the more others hold. (Dynamic thresholds, Choudhury and Hahne 1998: no setting per account,
and no need to know which accounts are active.)

- Slots: the slot that a request has just taken counts as free. So SHARE requests of an account always fit.
- Bytes: what a request is about to take counts as held. The only body of an account needs no share, so that a body of
  any allowed size is served.
"""

import asyncio
import time
from collections import Counter
from typing import Protocol

from gateway.errors import Draining, GatewayError, MalformedHttp, Overloaded, QueueUnavailable
from gateway.ingest.fair_queue import FairQueue
from gateway.ingest.wire import MAX_MESSAGES

SHARE = 3
SMOOTHING = 0.05  # weight of the newest request in `held_s`
NO_ACCOUNT = 0  # before the API key is looked up
MESSAGE_BYTES = 100  # of a short message in JSON; estimates the load of an unread body
GRANT_S = 0.25  # while others wait, a grant that is not used for so long ends: its body may be slow
LONG_WAIT = 0.5  # longest wait, as a share of the deadline
SHORT_WAIT = 0.3  # the same, once there have been waiting requests for LONG_WAIT without a break
TICK_S = 0.1  # room may appear without the end of a request: by late confirms, a grown window, the end of a grant
MAX_REFUSED_KEYS = 10_000  # at this number all are forgotten


class Broker(Protocol):
    """The part of the publisher that admission asks for room."""

    def weigh(self, messages: int, size: int) -> int:
        """Return the load of so many messages with so many bytes."""

    def room(self, reserved: int) -> int:
        """Return the load that may be written beside the unconfirmed and the reserved load."""

    def is_usable(self) -> bool:
        """Return True if a batch could be written now."""


class Admission:
    """The requests in flight, those waiting for room, and the bytes reserved; in total and by account."""

    def __init__(self, *, max_requests: int, max_bytes: int, broker: Broker, deadline_s: float) -> None:
        self._max_requests = max_requests
        self.max_bytes = max_bytes
        self._broker = broker
        self._long_wait_s, self._short_wait_s = LONG_WAIT * deadline_s, SHORT_WAIT * deadline_s
        self.requests = 0
        self.reserved_bytes = 0
        self.requests_of: Counter[int] = Counter()
        self.bytes_of: Counter[int] = Counter()
        self.held_s = 0.0  # smoothed time that a request holds its slot; the Retry-After of a shed request
        self.closed = False
        self.shed: Counter[str] = Counter()  # requests refused, by the resource that ran out
        self._queue: FairQueue[Slot] = FairQueue()
        self._waiting: dict[Slot, asyncio.Future[GatewayError | None]] = {}  # oldest first
        self._standing_since = 0.0  # when the queue was last empty
        self._timer: asyncio.TimerHandle | None = None
        self._granted: dict[Slot, float] = {}  # slot → time of its grant, which is not used yet; oldest first
        self._granted_load = 0
        self._granted_of: Counter[int] = Counter()  # account → load
        self._refused_keys: dict[int, int] = {}  # hash of an API key → account, of requests beyond its share

    @property
    def waiting(self) -> int:
        """Number of requests that wait for room."""
        return len(self._waiting)

    def close(self) -> None:
        """Refuse all requests from now on, those that wait included."""
        self.closed = True
        for slot in list(self._waiting):
            self._refuse(slot, Draining())

    def admit(self) -> "Slot":
        """Return a slot for a request, to be given back at its end. Raises Overloaded or Draining."""
        if self.closed:
            raise Draining
        if self.requests >= self._max_requests:
            raise self._overloaded("slots")
        self.requests += 1
        return Slot(self)

    def check_refused_key(self, key: str) -> None:
        """Raise Overloaded, without a query, if the key's account was over its share of slots and still is."""
        account_id = self._refused_keys.pop(hash(key), NO_ACCOUNT)
        if account_id != NO_ACCOUNT:
            self.check_share(account_id, key)

    def check_share(self, account_id: int, key: str) -> None:
        """Raise Overloaded if the account holds its share of slots. SHARE requests always fit."""
        requests = self.requests_of[account_id] + 1
        if requests > SHARE * (self._max_requests - self.requests + 1):
            # The hash, so that no key stays in memory. With a collision, another key may be refused once.
            if len(self._refused_keys) >= MAX_REFUSED_KEYS:
                self._refused_keys.clear()
            self._refused_keys[hash(key)] = account_id
            raise self._overloaded("account_share")

    def add_held(self, account_id: int, requests: int, size: int) -> None:
        """Add requests and bytes to what an account holds; negative amounts are given back."""
        self.reserved_bytes += size
        if requests:
            _add(self.requests_of, account_id, requests)
        if size:
            _add(self.bytes_of, account_id, size)

    def has_bytes(self, slot: "Slot", size: int) -> bool:
        """Return True if the slot may hold `size` bytes more: if they are free, and within its account's share.

        The only body of an account needs no share.
        """
        held, left = self.bytes_of[slot.account_id], self.max_bytes - self.reserved_bytes - size
        return left >= 0 and (held == slot.reserved or held + size <= SHARE * left)

    def check_bytes(self, slot: "Slot", size: int) -> None:
        """Raise Overloaded unless the slot may hold `size` bytes more."""
        if not self.has_bytes(slot, size):
            raise self._overloaded("bytes")

    def expected_load(self, size: int) -> int:
        """Return the load at the broker of a body of `size` bytes that has not been read."""
        return self._broker.weigh(min(size // MESSAGE_BYTES + 1, MAX_MESSAGES), size)

    def try_enter(self, slot: "Slot") -> bool:
        """Give the slot a grant if nobody waits and there is room. Return False otherwise."""
        if self._waiting or not self._fits(slot) or not self._need_not_wait(slot.load):
            return False
        self._grant(slot)
        return True

    def use_grant(self, slot: "Slot", load: int) -> bool:
        """End the slot's grant. Return True if a batch of this load may be written at once.

        It may if there is room for it. If others wait, the grant must still have been valid.
        """
        if self._waiting:
            # The load may be less than was expected: offer the rest to those that wait.
            asyncio.get_running_loop().call_soon(self.wake)
        had_grant = self.end_grant(slot)
        return not load or ((had_grant or not self._waiting) and self._need_not_wait(load))

    def _need_not_wait(self, load: int) -> bool:
        """Return True if there is room for a load at the broker, or no usable connection.

        Without a connection, waiting does not help: the publisher refuses the batch.
        """
        return load <= self._broker.room(self._granted_load) or not self._broker.is_usable()

    def _fits(self, slot: "Slot") -> bool:
        """Return True if there are bytes for the body, and the account's slow bodies leave room for other accounts.

        All grants of an account, this one included, may take as much room at the broker as all grants so far have left
        free: if no other account has grants, half of the free room. An account's first grant only needs room. A batch
        that is built has its bytes, and will not be slow.
        """
        if slot.has_batch:
            return True
        if not self.has_bytes(slot, slot.wanted):
            return False
        mine = self._granted_of[slot.account_id]
        return not mine or mine + slot.load <= self._broker.room(self._granted_load)

    async def wait(self, slot: "Slot") -> None:
        """Wait for a grant. Raises Overloaded after too long a wait, QueueUnavailable if the broker is gone.

        Waits of one request add up. Raises MalformedHttp if the caller has hung up, and Draining after close().
        """
        if self.closed:
            raise Draining
        loop = asyncio.get_running_loop()
        slot.waits_since = loop.time() - slot.waited_s
        if not self._waiting:
            self._standing_since = loop.time()
        self._timer = self._timer or loop.call_later(TICK_S, self._tick)
        granted = self._waiting[slot] = loop.create_future()
        self._queue.add(slot.account_id, slot.load, slot, first=slot.has_batch)
        self._end_late_grants()
        self.wake()  # other requests may wait for bytes or for their account's share, and this one may fit
        try:
            # The refusal is a result: an exception that the future holds would hold the future, by its traceback.
            refusal = await granted
        finally:
            if self._waiting.pop(slot, None) is not None:  # cancelled
                self._queue.remove(slot.account_id, slot.load, slot)
            slot.waited_s = loop.time() - slot.waits_since
        if refusal is not None:
            raise refusal

    def wake(self) -> None:
        """Give grants to waiting requests while there is room."""
        while self._waiting:
            slot = self._queue.pop(self._broker.room(self._granted_load), self._fits)
            if slot is None:
                return
            self._grant(slot)
            self._end_wait(slot, None)

    def _grant(self, slot: "Slot") -> None:
        """Reserve what the slot wants: bytes until its end, and room at the broker until it is published."""
        slot.was_granted = True
        slot.reserve(slot.wanted)
        self._granted[slot] = time.monotonic()
        self._count_granted(slot, slot.load)

    def end_grant(self, slot: "Slot") -> bool:
        """Give back the room at the broker. Return False if the slot has no grant, or its grant has ended."""
        if self._granted.pop(slot, None) is None:
            return False
        self._count_granted(slot, -slot.load)
        return True

    def _count_granted(self, slot: "Slot", load: int) -> None:
        self._granted_load += load
        _add(self._granted_of, slot.account_id, load)

    def _end_late_grants(self) -> None:
        given_before = time.monotonic() - GRANT_S
        while self._granted:
            slot, given_at = next(iter(self._granted.items()))
            if given_at > given_before:
                return
            self.end_grant(slot)

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        self._timer = None
        self._end_late_grants()
        if not self._broker.is_usable():
            for slot in list(self._waiting):
                self._refuse(slot, QueueUnavailable())
        self.wake()
        now = loop.time()
        is_standing = now - self._standing_since > self._long_wait_s
        waits_before = now - (self._short_wait_s if is_standing else self._long_wait_s)
        # A request may wait behind another one that lacks room.
        is_window_full = not all([self._need_not_wait(slot.load) for slot in self._waiting])
        lacking = "confirm_window" if is_window_full else "bytes"
        for slot in list(self._waiting):
            if slot.waits_since <= waits_before:
                self._refuse(slot, self._overloaded(lacking))
        if self._waiting:
            self._timer = loop.call_later(TICK_S, self._tick)

    def abandon(self, slot: "Slot") -> None:
        """End the wait of a request whose caller has hung up. A batch that is built is published all the same."""
        if slot in self._waiting and not slot.has_batch:
            self._refuse(slot, MalformedHttp())

    def _refuse(self, slot: "Slot", refusal: GatewayError) -> None:
        self._queue.remove(slot.account_id, slot.load, slot)
        self._end_wait(slot, refusal)

    def _end_wait(self, slot: "Slot", refusal: GatewayError | None) -> None:
        granted = self._waiting.pop(slot)
        if not granted.done():  # otherwise cancelled
            granted.set_result(refusal)

    def _overloaded(self, resource: str) -> Overloaded:
        self.shed[resource] += 1
        return Overloaded(retry_after_s=self.held_s)

    def end(self, slot: "Slot", held_s: float) -> None:
        """Take back the slot of a request that held it for so long."""
        self.end_grant(slot)
        self.requests -= 1
        if slot.was_granted:  # a quick refusal says nothing about how long the next request will take
            self.held_s += SMOOTHING * (held_s - self.held_s)
        self.wake()


def _add(counter: Counter[int], key: int, amount: int) -> None:
    """Add to a counter that has no zeros."""
    total = counter.get(key, 0) + amount
    if total:
        counter[key] = total
    else:
        counter.pop(key, None)


class Slot:
    """The slot of one request in flight, and what is reserved for it."""

    __slots__ = (
        "_admission",
        "_admitted_at",
        "_is_held",
        "account_id",
        "has_batch",
        "load",
        "reserved",
        "waited_s",
        "waits_since",
        "wanted",
        "was_granted",
    )

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._admitted_at = time.monotonic()
        self._is_held = True
        self.reserved = 0  # bytes
        self.account_id = NO_ACCOUNT
        self.load = 0  # at the broker: expected, later exact
        self.wanted = 0  # bytes to reserve with the grant
        self.was_granted = False
        self.has_batch = False  # True: its body was read and its batch built before this wait
        # The start of its wait on the loop's clock, minus its earlier waits: all waits together have one limit.
        self.waits_since = 0.0
        self.waited_s = 0.0  # in all waits that have ended

    async def enter(self, account_id: int, size: int, key: str) -> None:
        """Wait for room at the broker, and for `size` bytes of a body, which may still have to be read.

        Raises Overloaded, QueueUnavailable, Draining at the end of a drain, or MalformedHttp if the caller hangs up.
        """
        admission = self._admission
        admission.check_share(account_id, key)
        self.account_id, self.wanted, self.load = account_id, size, admission.expected_load(size)
        admission.add_held(account_id, 1, 0)
        if not admission.try_enter(self):
            await admission.wait(self)

    async def enter_window(self, load: int) -> None:
        """Wait until a batch of this load may be written: needed if the body was slow, or holds more than expected.

        Raises Overloaded or QueueUnavailable. Write the batch before the next await.
        """
        while not self._admission.use_grant(self, load):
            self.load, self.wanted, self.has_batch = load, 0, True
            await self._admission.wait(self)

    def reserve(self, size: int) -> None:
        """Reserve so many bytes more."""
        self._change_to(self.reserved + size)

    def reserve_total(self, size: int) -> None:
        """Reserve `size` bytes instead, once the body's cost is known. Raises Overloaded.

        A single request may take all bytes, so that a body of any allowed size is served.
        """
        size = min(size, self._admission.max_bytes)
        if size > self.reserved:
            self._admission.check_bytes(self, size - self.reserved)
        self._change_to(size)

    def hold_answer(self, size: int) -> None:
        """Reserve `size` bytes if that is more than is reserved. An answer cannot be refused any more."""
        if size > self.reserved:
            self._change_to(size)

    def _change_to(self, size: int) -> None:
        if size != self.reserved:
            self._admission.add_held(self.account_id, 0, size - self.reserved)
            self.reserved = size

    def abandon(self) -> None:
        """End a wait for room before the batch is built: the caller has hung up."""
        self._admission.abandon(self)

    def give_back(self) -> None:
        """Give back the slot and what was reserved. Further calls do nothing."""
        if self._is_held:
            self._is_held = False
            if self.account_id != NO_ACCOUNT:
                self._admission.add_held(self.account_id, -1, -self.reserved)
            self._admission.end(self, time.monotonic() - self._admitted_at)
