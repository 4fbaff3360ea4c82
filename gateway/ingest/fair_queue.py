"""A queue in which accounts take turns by load: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Each account has a queue of its own. The account that has been given the least is next. An account that joins starts
with what the account next in turn has been given, so its past neither helps nor harms it.
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
        self._turns: list[tuple[int, int, int]] = []  # heap of (load given so far, order of joining, account)
        self._joined = count()
        self._given = 0  # of the account whose turn was last
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def add(self, account_id: int, load: int, item: T, *, first: bool = False) -> None:
        """Add an item behind the account's other items, or before them."""
        items = self._items.get(account_id)
        if items is None:
            items = self._items[account_id] = deque()
            heappush(self._turns, (self._given, next(self._joined), account_id))
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
        """Remove and return the next item, or None if its load is above `room`.

        Accounts whose first item does not fit are passed over and keep their turn.
        """
        turns: list[tuple[int, int, int]] = []
        found: T | None = None
        while self._turns and found is None:
            given, joined, account_id = heappop(self._turns)
            items = self._items[account_id]
            if not items:
                del self._items[account_id]
                continue
            load, item = items[0]
            if not fits(item):
                turns.append((given, joined, account_id))
            elif load > room:
                turns.append((given, joined, account_id))
                break
            else:
                items.popleft()
                self._given = given
                turns.append((given + load, joined, account_id))
                found = item
        for turn in turns:
            heappush(self._turns, turn)
        if found is not None:
            self._note_removed()
        return found

    def _note_removed(self) -> None:
        self._length -= 1
        if not self._length:
            self._items.clear()
            self._turns.clear()
            self._given = 0
