"""The fair queue loses nothing, keeps each account's order, and is fair by load. Promise 13."""

from collections import Counter, deque

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ingest.fair_queue import FairQueue
from tests.properties import MORE

LARGEST = 4_000
ACCOUNTS = st.integers(1, 4)
LOADS = st.one_of(st.integers(1, 10), st.integers(1, LARGEST))
ADD = st.tuples(st.just("add"), ACCOUNTS, LOADS)
REMOVE = st.tuples(st.just("remove"), ACCOUNTS, st.just(0))
POP = st.tuples(st.just("pop"), st.just(0), st.integers(0, 2 * LARGEST))


@settings(derandomize=MORE == 1, max_examples=100 * MORE, deadline=None)
# Without a smallest size, most lists are too short for an account to come, go and come back.
@given(st.lists(st.one_of(ADD, POP, REMOVE), min_size=30, max_size=120))
def test_every_item_leaves_once_and_in_its_accounts_order(steps: list[tuple[str, int, int]]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    model: dict[int, deque[tuple[int, tuple[int, int]]]] = {account_id: deque() for account_id in range(1, 5)}
    for number, (step, account_id, load) in enumerate(steps):
        if step == "add":
            queue.add(account_id, load, (account_id, number))
            model[account_id].append((load, (account_id, number)))
        elif step == "remove" and model[account_id]:
            removed_load, item = model[account_id].pop()
            queue.remove(account_id, removed_load, item)
        elif step == "pop":
            found = queue.pop(load, lambda _: True)
            if found is not None:
                first_load, first = model[found[0]].popleft()
                assert (first, first_load <= load) == (found, True)
            else:
                assert not any(model.values()) or any(items[0][0] > load for items in model.values() if items)
        assert len(queue) == sum(map(len, model.values()))
    while (found := queue.pop(LARGEST, lambda _: True)) is not None:
        assert model[found[0]].popleft()[1] == found
    assert not any(model.values())


@settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)
@given(st.lists(LOADS, min_size=1, max_size=40), st.lists(LOADS, min_size=1, max_size=40))
def test_two_accounts_that_both_wait_are_given_the_same_but_for_one_item(one: list[int], other: list[int]) -> None:
    queue: FairQueue[tuple[int, int]] = FairQueue()
    for account_id, loads in ((1, one), (2, other)):
        for load in loads:
            queue.add(account_id, load, (account_id, load))
    left, given_load = {1: len(one), 2: len(other)}, Counter[int]()
    while all(left.values()):
        found = queue.pop(LARGEST, lambda _: True)
        assert found is not None
        account_id, load = found
        left[account_id] -= 1
        given_load[account_id] += load
        assert abs(given_load[1] - given_load[2]) <= LARGEST
