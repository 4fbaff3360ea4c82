"""Requests share statements: owners take turns, up to the weight of a statement, and no more statements at a time."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, cast

from gateway.postgres.pool import Pool
from gateway.postgres.queries import ANSWER_UNIT, HOLD_KEYS, MAX_RUNS, EndedRun, Hold, Queries
from tests.support.eventually import eventually

CROWD, NEIGHBOUR = 1, 2


class Statements:
    """Stands in for a pool and its connections: a statement ends when the test lets it."""

    def __init__(self) -> None:
        self.begun: list[list[Any]] = []  # the arguments of each
        self._running: list[asyncio.Event] = []

    @asynccontextmanager
    async def connection(self) -> "AsyncIterator[Statements]":
        yield self

    async def fetch(self, sql: str, *columns: Any) -> Sequence[Any]:
        self.begun.append(list(columns))
        self._running.append(may_end := asyncio.Event())
        await may_end.wait()
        return [(holder, 0, []) for holder in columns[4]] if sql == HOLD_KEYS else []

    execute = fetch

    async def end_one(self) -> list[Any]:
        """End the oldest statement; return the arguments of the next one."""
        begun = len(self.begun)
        self._running.pop(0).set()
        await eventually(lambda: len(self.begun) > begun, timeout=5.0)
        return self.begun[-1]


@asynccontextmanager
async def asking(*lookups: Any) -> AsyncIterator[list[asyncio.Task[Any]]]:
    """Start lookups in order; cancel them at the end."""
    tasks = []
    for lookup in lookups:
        tasks.append(asyncio.create_task(lookup))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def opened() -> tuple[Queries, Statements]:
    statements = Statements()
    return Queries(cast("Pool", statements)), statements


async def test_many_lists_of_one_account_do_not_make_another_wait() -> None:
    queries, statements = opened()
    many = [f"+1800555{n:04}" for n in range(1_000)]
    crowd = [queries.resolve_lists(CROWD, many) for _ in range(5)]
    async with asking(*crowd, queries.resolve_lists(NEIGHBOUR, many[:1])):
        assert len(statements.begun) == 2
        account_ids, _ = await statements.end_one()
        assert sorted(account_ids) == [CROWD] * 1_000 + [NEIGHBOUR]


async def test_lists_of_an_empty_batch_take_no_query() -> None:
    queries, statements = opened()
    assert await queries.resolve_lists(CROWD, []) == {}
    assert statements.begun == []


def hold(account_id: int, number: int, **changes: Any) -> Hold:
    return Hold(account_id, f"{number}", bytes(32), number, number, 1.0, (), may_insert=True)._replace(**changes)


async def test_many_holds_of_one_account_do_not_make_another_wait() -> None:
    queries, statements = opened()
    crowd = [queries.hold_key(hold(CROWD, n)) for n in range(2 * MAX_RUNS)]
    async with asking(*crowd, queries.hold_key(hold(NEIGHBOUR, 9_999))):
        assert len(statements.begun) == 2
        account_ids, *_ = await statements.end_one()
        assert sorted(account_ids) == [CROWD] * (MAX_RUNS - 1) + [NEIGHBOUR]


def end(account_id: int, number: int, answer: bytes | None = None) -> EndedRun:
    return EndedRun(account_id, f"{number}", number, answer, is_forgotten=False)


async def test_many_ends_of_one_account_do_not_make_another_wait() -> None:
    queries, statements = opened()
    crowd = [queries.settle_key(end(CROWD, n)) for n in range(2 * MAX_RUNS)]
    async with asking(*crowd, queries.settle_key(end(NEIGHBOUR, 9_999))):
        assert len(statements.begun) == 1, "one at a time: it waits for disks, and holds a connection"
        account_ids, *_ = await statements.end_one()
        assert sorted(account_ids) == [CROWD] * (MAX_RUNS - 1) + [NEIGHBOUR]


async def test_a_statement_takes_fewer_holds_of_many_lists_and_fewer_long_answers() -> None:
    queries, statements = opened()
    lists = ["+18005551000"] * (MAX_RUNS // 4)
    async with asking(*[queries.hold_key(hold(CROWD, n, not_found=lists)) for n in range(10)]):
        account_ids, *_ = await statements.end_one()
        assert len(account_ids) == 3
    queries, statements = opened()
    answer = bytes(ANSWER_UNIT * MAX_RUNS // 4)
    async with asking(*[queries.settle_key(end(CROWD, n, answer)) for n in range(10)]):
        account_ids, *_ = await statements.end_one()
        assert len(account_ids) == 3
