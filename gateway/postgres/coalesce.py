"""Shares one query between the requests in flight together, as a database's group commit shares one flush.

A lone question is asked at once. Questions that come while queries are out wait for one to return and are asked
together: the busier the gateway, the fewer queries a request costs (scripts/bench compare, batches of 1 and of 10).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
A = TypeVar("A")

MAX_WEIGHT = 2_000  # of the questions in one query: bounds how long the others of its group wait for a large one
MAX_QUERIES = 2  # at once: while a slow one is out, the others still pass it by


class Coalescer(Generic[Q, A]):
    """Answers single questions by asking many at once."""

    def __init__(
        self, fetch_all: Callable[[Sequence[Q]], Awaitable[Sequence[A]]], *, weigh: Callable[[Q], int] = lambda _: 1
    ) -> None:
        """`fetch_all` returns one answer per question, in order; what it raises, every question of the group gets."""
        self._fetch_all = fetch_all
        self._weigh = weigh
        self._waiting: list[tuple[Q, asyncio.Future[A]]] = []
        self._queries: set[asyncio.Task[None]] = set()

    async def get(self, question: Q) -> A:
        """The answer to one question, from a query that starts after the question was asked: never an older one."""
        answer: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._queries) < MAX_QUERIES:
            self._queries.add(asyncio.create_task(self._run()))
        return await answer

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._answer(self._next_group())
        finally:
            # In the very step that saw nobody waiting: whoever asks from now on starts a query again.
            task = asyncio.current_task()
            assert task is not None  # noqa: S101 - it runs as one
            self._queries.discard(task)

    async def _answer(self, group: list[tuple[Q, asyncio.Future[A]]]) -> None:
        try:
            answers = await self._fetch_all([question for question, _ in group])
        except BaseException as error:
            if isinstance(error.__cause__, TimeoutError):
                # Those who waited meanwhile too: to ask a silent server again would make them wait twice as long.
                group, self._waiting = group + self._waiting, []
            for _, answer in group:
                if not answer.done():
                    if isinstance(error, Exception):
                        answer.set_exception(error)
                    else:
                        answer.cancel()
            if not isinstance(error, Exception):
                raise
        else:
            for (_, answer), result in zip(group, answers, strict=True):
                if not answer.done():
                    answer.set_result(result)

    def _next_group(self) -> list[tuple[Q, asyncio.Future[A]]]:
        weight = count = 0
        for question, _ in self._waiting:
            weight += self._weigh(question)
            if count and weight > MAX_WEIGHT:
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group
