"""Slots held by a test, and a broker's room for tests without a broker."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import count

from gateway.amqp.window import UNLIMITED
from gateway.ingest.admission import Admission, Slot

KEY = "trk_" + "k" * 32
strangers = count(1_000)


class BrokerRoom:
    """A confirm window of fixed size; the test sets what is unconfirmed."""

    def __init__(self, messages: int = 1_000_000) -> None:
        self.messages = messages
        self.unconfirmed = 0
        self.usable = True

    def weigh(self, messages: int, _size: int) -> int:
        """Return the load of a batch: its number of messages."""
        return messages

    def room(self, reserved: int) -> int:
        """Return the free load."""
        used = self.unconfirmed + reserved
        return self.messages - used if used else UNLIMITED

    def is_usable(self) -> bool:
        """Return what the test has set."""
        return self.usable


def admission_of(
    *, max_requests: int = 100, max_bytes: int = 10**9, room: BrokerRoom | None = None, deadline_s: float = 10.0
) -> Admission:
    """Return an admission with so many slots and bytes, and by default with more room at the broker than it needs."""
    return Admission(max_requests=max_requests, max_bytes=max_bytes, broker=room or BrokerRoom(), deadline_s=deadline_s)


@contextmanager
def held_slot(admission: Admission) -> Iterator[Slot]:
    """Hold a slot without an account."""
    slot = admission.admit()
    try:
        yield slot
    finally:
        slot.give_back()


@asynccontextmanager
async def entered(admission: Admission, size: int, account_id: int | None = None) -> AsyncIterator[Slot]:
    """Hold a slot and `size` bytes for the given account, or for a new one; wait for room like a request."""
    with held_slot(admission) as slot:
        await slot.enter(next(strangers) if account_id is None else account_id, size, KEY)
        yield slot
