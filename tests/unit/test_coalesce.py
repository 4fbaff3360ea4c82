"""Coalescing: lookups in flight share queries; each gets its own answer, from a query that began after the lookup."""

import asyncio
import gc
import weakref
from collections.abc import Sequence

import pytest

from gateway.postgres.coalesce import MAX_QUERIES, MAX_WEIGHT, Coalescer


class Oracle:
    """A database that answers n with 10 n; each query waits until the test lets it go."""

    def __init__(self) -> None:
        self.queries: list[list[int]] = []
        self.gates: list[asyncio.Future[None]] = []

    async def fetch_all(self, questions: Sequence[int]) -> list[int]:
        self.queries.append(list(questions))
        self.gates.append(asyncio.get_running_loop().create_future())
        await self.gates[-1]
        return [10 * question for question in questions]


async def turns(count: int = 5) -> None:
    """Let the event loop run a few turns."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_a_lone_lookup_is_sent_at_once() -> None:
    oracle = Oracle()
    answer = asyncio.create_task(Coalescer(oracle.fetch_all).get(1))
    await turns()
    assert oracle.queries == [[1]]
    oracle.gates[0].set_result(None)
    assert await answer == 10


async def test_lookups_that_arrive_during_queries_share_the_next_query() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all)
    answers = []
    for question in range(10):
        answers.append(asyncio.create_task(coalescer.get(question)))
        await turns()
    assert oracle.queries == [[0], [1]]
    oracle.gates[0].set_result(None)
    await turns()
    assert oracle.queries == [[0], [1], [2, 3, 4, 5, 6, 7, 8, 9]]
    for gate in oracle.gates[1:]:
        gate.set_result(None)
    assert await asyncio.gather(*answers) == [10 * question for question in range(10)]


async def test_a_lookup_added_in_the_turn_in_which_all_queries_end_is_not_lost() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all)

    async def ask_twice(question: int) -> int:
        await coalescer.get(question)
        return await coalescer.get(question + 100)

    answers = []
    for question in range(MAX_QUERIES):
        answers.append(asyncio.create_task(ask_twice(question)))
        await turns()
    for gate in oracle.gates[:]:
        gate.set_result(None)
    await turns(20)
    for gate in oracle.gates[MAX_QUERIES:]:
        gate.set_result(None)
    async with asyncio.timeout(5):
        assert await asyncio.gather(*answers) == [1000, 1010]


async def test_a_failed_query_fails_its_own_lookups_only() -> None:
    async def fetch_all(questions: Sequence[int]) -> list[int]:
        await turns()
        if 0 in questions:
            raise LookupError
        return list(questions)

    coalescer = Coalescer(fetch_all)
    first = asyncio.create_task(coalescer.get(0))
    await turns(1)
    others = [asyncio.create_task(coalescer.get(question)) for question in range(1, 5)]
    with pytest.raises(LookupError):
        await first
    assert await asyncio.gather(*others) == [1, 2, 3, 4]


async def looked_up(cause: BaseException | None) -> tuple[list[object], int]:
    """Let the queries fail while three more lookups wait; return all outcomes and the number of queries."""
    gate: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    queries = 0

    async def fetch_all(questions: Sequence[int]) -> list[int]:
        nonlocal queries
        queries += 1
        if queries > MAX_QUERIES:
            return list(questions)
        await asyncio.shield(gate)
        raise LookupError from cause

    coalescer = Coalescer(fetch_all)
    answers = []
    for question in range(MAX_QUERIES + 3):
        answers.append(asyncio.create_task(coalescer.get(question)))
        await turns()
    answers[0].cancel()  # a lookup that is over does not disturb the others
    await turns()
    gate.set_result(None)
    outcomes = (await asyncio.gather(*answers, return_exceptions=True))[1:]
    return [type(each) if isinstance(each, Exception) else each for each in outcomes], queries


async def test_a_lookup_that_waited_behind_a_silent_server_does_not_wait_again() -> None:
    assert await looked_up(TimeoutError()) == ([LookupError] * 4, MAX_QUERIES)


async def test_a_lookup_that_waited_behind_another_failure_is_asked_for() -> None:
    assert await looked_up(OSError()) == ([LookupError, 2, 3, 4], MAX_QUERIES + 1)


async def test_a_cancelled_query_cancels_its_lookups_and_ends() -> None:
    """As at the end of the event loop."""
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all)
    answers = []
    for question in range(MAX_QUERIES + 1):
        answers.append(asyncio.create_task(coalescer.get(question)))
        await turns()
    queries = list(coalescer._queries)
    for query in queries:
        query.cancel()
    await turns()
    assert [query.cancelled() for query in queries] == [True] * MAX_QUERIES
    assert [answer.cancelled() for answer in answers] == [True, True, False]
    assert len(oracle.queries) == MAX_QUERIES
    answers[-1].cancel()


async def test_each_failed_lookup_raises_an_exception_of_its_own_and_leaves_no_cycle() -> None:
    """A traceback holds the frames of its request: one exception for all lookups would hold the bodies of all."""

    class Body:
        pass

    async def fetch_all(_: Sequence[int]) -> list[int]:
        await turns()
        raise LookupError("gone") from OSError()

    coalescer = Coalescer(fetch_all)
    bodies: list[weakref.ref[Body]] = []

    async def look_up(key: int) -> BaseException:
        body = Body()
        bodies.append(weakref.ref(body))
        try:
            return LookupError(await coalescer.get(key))
        except LookupError as error:
            return error

    gc.disable()
    try:
        errors = await asyncio.gather(*(look_up(key) for key in range(5)))
        assert [(str(error), error.__cause__) for error in errors] == [("gone", None)] * 5
        assert len(set(map(id, errors))) == 5
        del errors
        await turns()
        assert [body() for body in bodies] == [None] * 5
    finally:
        gc.enable()


async def test_a_cancelled_lookup_does_not_disturb_the_others() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all)
    one, other = asyncio.create_task(coalescer.get(1)), asyncio.create_task(coalescer.get(2))
    await turns()
    one.cancel()
    await turns()
    for gate in oracle.gates:
        gate.set_result(None)
    assert await other == 20


async def test_a_query_takes_at_most_its_limit_and_at_least_one_lookup() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all, weigh=lambda question: question)
    weights = [1, 1, 2 * MAX_WEIGHT, MAX_WEIGHT // 2, MAX_WEIGHT // 2, 1, MAX_WEIGHT]
    answers = []
    for weight in weights:
        answers.append(asyncio.create_task(coalescer.get(weight)))
        await turns()
    while not all(answer.done() for answer in answers):
        for gate in oracle.gates:
            if not gate.done():
                gate.set_result(None)
        await turns()
    assert oracle.queries[2:] == [[2 * MAX_WEIGHT], [MAX_WEIGHT // 2, MAX_WEIGHT // 2], [1], [MAX_WEIGHT]]


async def test_a_query_takes_so_many_lookups_of_no_special_weight() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all)
    answers = [asyncio.create_task(coalescer.get(question)) for question in range(MAX_WEIGHT + 1)]
    await turns()
    assert list(map(len, oracle.queries)) == [MAX_WEIGHT, 1]
    for gate in oracle.gates:
        gate.set_result(None)
    await asyncio.gather(*answers)


async def test_a_failure_that_cannot_be_copied_still_reaches_every_lookup() -> None:
    class Particular(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(first)
            self.second = second

    async def fail(keys: Sequence[int]) -> Sequence[int]:
        await asyncio.sleep(0)
        raise Particular("one", "two")

    coalescer = Coalescer(fail)
    async with asyncio.timeout(2):
        failures = await asyncio.gather(*map(coalescer.get, range(4)), return_exceptions=True)
    assert [type(failure) for failure in failures] == [Particular] * 4


async def test_owners_take_turns_and_their_own_lookups_stay_in_order() -> None:
    """A neighbour's lookup is in the next query, however many and however large another's are that came first."""
    oracle = Oracle()
    coalescer = Coalescer(
        oracle.fetch_all, weigh=lambda _: MAX_WEIGHT // 4, owner_of=lambda key: key % 100, max_queries=1
    )
    many = [100 * number for number in range(20)]
    answers = [asyncio.create_task(coalescer.get(key)) for key in [*many, 1, 2, 101]]
    while not all(answer.done() for answer in answers):
        await turns()
        oracle.gates[-1].set_result(None)
        await turns()
    assert oracle.queries[:3] == [[0, 1, 2, 100], [101, 200, 300, 400], [500, 600, 700, 800]]
    assert [answer.result() for answer in answers] == [10 * key for key in [*many, 1, 2, 101]]


async def test_no_more_queries_run_at_once_than_allowed() -> None:
    oracle = Oracle()
    coalescer = Coalescer(oracle.fetch_all, max_queries=1)
    answers = [asyncio.create_task(coalescer.get(key)) for key in range(3)]
    await turns()
    answers.append(asyncio.create_task(coalescer.get(3)))
    await turns()
    assert oracle.queries == [[0, 1, 2]]
    for gate in range(2):
        oracle.gates[gate].set_result(None)
        await turns()
    assert await asyncio.gather(*answers) == [0, 10, 20, 30]
