"""Coalescing of lookups: concurrent lookups share one query, as a database's group commit shares one flush.

A lone lookup starts a query at once. A lookup that finds all queries running waits for one to return, and shares the
next. Under load a request therefore costs fewer queries (scripts/bench compare, batches of 1 and of 10). Writes are
lookups too: their value is what the statement returned for them.

Owners take turns: each adds one lookup to the next query, then each a second one, up to the weight of a query. So one
owner's many or large lookups do not make the others wait.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from copy import copy
from itertools import chain
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MAX_WEIGHT = 2_000  # per query by default: bounds how long small lookups wait for a large one
MAX_QUERIES = 2  # at once by default: one slow query does not delay all others


class Coalescer(Generic[K, V]):
    """Looks up single keys with queries for many keys."""

    def __init__(
        self,
        fetch_all: Callable[[Sequence[K]], Awaitable[Sequence[V]]],
        *,
        weigh: Callable[[K], int] = lambda _: 1,
        owner_of: Callable[[K], Hashable] = lambda _: None,
        max_weight: int = MAX_WEIGHT,
        max_queries: int = MAX_QUERIES,
    ) -> None:
        """`fetch_all` returns one value per key, in order. By default all keys have one owner.

        If it raises, each lookup of that query raises its own copy of the exception, without the cause. A traceback
        holds all frames up to the request's body: one exception for all lookups would hold the bodies of all.
        """
        self._fetch_all = fetch_all
        self._weigh = weigh
        self._owner_of = owner_of
        self._max_weight = max_weight
        self._max_queries = max_queries
        self._waiting: dict[Hashable, deque[tuple[K, asyncio.Future[V]]]] = {}  # by owner, the next in turn first
        self._queries: set[asyncio.Task[None]] = set()

    async def get(self, key: K) -> V:
        """Return the value of one key, from a query that starts after this call. No value is cached."""
        value: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        owner = self._owner_of(key)
        if owner in self._waiting:
            self._waiting[owner].append((key, value))
        else:
            self._waiting[owner] = deque([(key, value)])
        if len(self._queries) < self._max_queries:
            self._queries.add(asyncio.create_task(self._run()))
        try:
            return await value
        finally:
            # The future holds the exception, whose traceback holds this frame: without this, a cycle.
            del value

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._query(self._next_group())
        finally:
            # No await between the last look at `_waiting` and this: a later lookup must start a task of its own.
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - it runs as one
            self._queries.discard(task)

    async def _query(self, group: list[tuple[K, asyncio.Future[V]]]) -> None:
        try:
            values = await self._fetch_all([key for key, _ in group])
        except BaseException as error:
            if isinstance(error.__cause__, TimeoutError):
                # Fail the waiting lookups as well: the next query would time out too, and double their wait.
                group = [*group, *chain.from_iterable(self._waiting.values())]
                self._waiting.clear()
            _fail([value for _, value in group], error)
            if not isinstance(error, Exception):
                raise
        else:
            for (_, value), fetched in zip(group, values, strict=True):
                if not value.done():
                    value.set_result(fetched)
        finally:
            # Since Python 3.13 the frames of a query that timed out are in a cycle: without this, the lookups too.
            del group

    def _next_group(self) -> list[tuple[K, asyncio.Future[V]]]:
        """Remove and return the lookups of the next query: one of each owner in turn."""
        group: list[tuple[K, asyncio.Future[V]]] = []
        weight = 0
        while self._waiting:
            owner, lookups = next(iter(self._waiting.items()))
            weight += self._weigh(lookups[0][0])
            if group and weight > self._max_weight:
                break
            group.append(lookups.popleft())
            if not lookups:
                del self._waiting[owner]
            elif len(self._waiting) > 1:
                self._waiting[owner] = self._waiting.pop(owner)  # behind the others
        return group


def _fail(values: "list[asyncio.Future[V]]", error: BaseException) -> None:
    """Fail the lookups that wait, each with a copy of the error; cancel them if the query was cancelled."""
    for value in values:
        if not value.done():
            if isinstance(error, Exception):
                value.set_exception(_copy_of(error))
            else:
                value.cancel()


def _copy_of(error: Exception) -> Exception:
    """Return a copy without traceback, or the exception itself if its constructor takes other arguments."""
    try:
        return copy(error)
    except Exception:  # a constructor may raise anything, and without an answer the lookups would wait for ever
        return error
