"""A queue in which accounts take turns by load: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Each account has a queue of its own, whose first item has a start tag: the start tag of the account's previous item plus
its load, or the virtual time for an account that joins. The lowest start tag is next, so the past of an account neither
helps nor harms it. Loads are those expected when the item was added; they are not corrected later.
"""

from collections import deque
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Items of several accounts, each with a load. Items of one account leave in order."""

    def __init__(self) -> None:
        self._items: dict[int, deque[tuple[int, T]]] = {}  # by account
        # Heap of (start tag, order of joining, account). An account without items leaves it when its turn comes.
        self._turns: list[tuple[int, int, int]] = []
        self._joined = count()
        self._virtual_time = 0  # the start tag of the item that left last; start tags are loads
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, account_id: int, load: int, item: T, *, first: bool = False) -> None:
        """Add an item behind the account's other items, or before them."""
        items = self._items.get(account_id)
        if items is None:
            items = self._items[account_id] = deque()
            heappush(self._turns, (self._virtual_time, next(self._joined), account_id))
        if first:
            items.appendleft((load, item))
        else:
            items.append((load, item))
        self._length += 1

    def remove(self, account_id: int, load: int, item: T) -> None:
        """Remove an item that has not left yet."""
        self._items[account_id].remove((load, item))
        self._note_removed()

    def pop(self, room: int, fits: Callable[[T], bool]) -> T | None:
        """Remove and return the next item. Return None if there is none, or if its load is above `room`.

        Accounts whose first item does not fit are passed over. Such an account is next as soon as the item fits, but
        gains no credit for the turns that it missed.
        """
        turns: list[tuple[int, int, int]] = []
        found: T | None = None
        while self._turns and found is None:
            start, joined, account_id = heappop(self._turns)
            items = self._items[account_id]
            if not items:
                del self._items[account_id]
                continue
            load, item = items[0]
            if not fits(item):
                turns.append((start, joined, account_id))
            elif load > room:
                turns.append((start, joined, account_id))
                break
            else:
                items.popleft()
                self._virtual_time = max(self._virtual_time, start)
                turns.append((start + load, joined, account_id))
                found = item
        for start, joined, account_id in turns:
            heappush(self._turns, (max(start, self._virtual_time), joined, account_id))
        if found is not None:
            self._note_removed()
        return found

    def _note_removed(self) -> None:
        self._length -= 1
        if not self._length:
            self._items.clear()
            self._turns.clear()
            self._virtual_time = 0
