"""Coalescing of lookups: concurrent lookups share one query, as a database's group commit shares one flush.

A lone lookup starts a query at once. A lookup that finds MAX_QUERIES running waits for one to return, and shares the
next. Under load a request therefore costs fewer queries (scripts/bench compare, batches of 1 and of 10).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MAX_WEIGHT = 2_000  # per query: bounds how long small lookups wait for a large one
MAX_QUERIES = 2  # at once: one slow query does not delay all others


class Coalescer(Generic[K, V]):
    """Looks up single keys with queries for many keys."""

    def __init__(
        self, fetch_all: Callable[[Sequence[K]], Awaitable[Sequence[V]]], *, weigh: Callable[[K], int] = lambda _: 1
    ) -> None:
        """`fetch_all` returns one value per key, in order.

        What it raises, every lookup of its query raises as a copy of its own, without the cause. A traceback holds all
        frames up to the request's body: one exception for all lookups would hold the bodies of all.
        """
        self._fetch_all = fetch_all
        self._weigh = weigh
        self._waiting: list[tuple[K, asyncio.Future[V]]] = []
        self._queries: set[asyncio.Task[None]] = set()

    async def get(self, key: K) -> V:
        """Return the value of one key, from a query that starts after this call. No value is cached."""
        value: asyncio.Future[V] = asyncio.get_running_loop().create_future()
        self._waiting.append((key, value))
        if len(self._queries) < MAX_QUERIES:
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
                group, self._waiting = group + self._waiting, []
            for _, value in group:
                if not value.done():
                    if isinstance(error, Exception):
                        value.set_exception(_copy_of(error))
                    else:
                        value.cancel()
            if not isinstance(error, Exception):
                raise
        else:
            for (_, value), fetched in zip(group, values, strict=True):
                if not value.done():
                    value.set_result(fetched)

    def _next_group(self) -> list[tuple[K, asyncio.Future[V]]]:
        weight = count = 0
        for key, _ in self._waiting:
            weight += self._weigh(key)
            if count and weight > MAX_WEIGHT:
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group


def _copy_of(error: Exception) -> Exception:
    """Return a copy without traceback, or the exception itself if its constructor takes other arguments."""
    try:
        return copy(error)
    except Exception:  # a constructor may raise anything, and without an answer the lookups would wait for ever
        return error
