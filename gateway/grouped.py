"""Shares one query between the requests in flight together, as a database's group commit shares one flush.

A lone question is asked at once. Questions that come while queries are out wait for one to return and are asked
together: the busier the gateway, the fewer queries a request costs, and none waits longer than it would for its turn
(scripts/bench compare, batches of 1 and of 10).
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

MAX_GROUP = 256  # questions in one query: bounds how long the others of its group wait for a large one
MAX_QUERIES = 2  # at once: while a slow one is out, the others still pass it by


class Grouped(Generic[Question, Answer]):
    """Answers single questions by asking many at once."""

    def __init__(self, ask_all: Callable[[Sequence[Question]], Awaitable[Sequence[Answer]]]) -> None:
        """`ask_all` returns one answer per question, in order; what it raises, all who wait for an answer get."""
        self._ask_all = ask_all
        self._waiting: list[tuple[Question, asyncio.Future[Answer]]] = []
        self._queries: set[asyncio.Task[None]] = set()

    async def ask(self, question: Question) -> Answer:
        """The answer to one question, from a query that starts after the question was asked: never an older one."""
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((question, answer))
        if len(self._queries) < MAX_QUERIES:
            query = asyncio.create_task(self._answer_the_waiting())
            self._queries.add(query)
            query.add_done_callback(self._queries.discard)
        return await answer

    async def _answer_the_waiting(self) -> None:
        while self._waiting:
            group, self._waiting = self._waiting[:MAX_GROUP], self._waiting[MAX_GROUP:]
            try:
                answers = await self._ask_all([question for question, _ in group])
            except Exception as error:
                # Those who waited meanwhile too: to ask a silent server again would make them wait twice as long.
                group, self._waiting = group + self._waiting, []
                for _, answer in group:
                    if not answer.done():
                        answer.set_exception(error)
            else:
                for (_, answer), result in zip(group, answers, strict=True):
                    if not answer.done():
                        answer.set_result(result)
