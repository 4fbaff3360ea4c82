"""Accounts take turns by load; items of one account stay in order."""

from gateway.ingest.fair_queue import FairQueue

ROOM = 10**9


def drain(queue: FairQueue[str], turns: int = 1_000) -> list[str]:
    """Take up to so many items."""
    taken: list[str] = []
    while len(taken) < turns and (item := queue.pop(ROOM, lambda _: True)) is not None:
        taken.append(item)
    return taken


def test_one_account_leaves_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.add(1, 1_000, name)
    assert drain(queue) == ["a", "b", "c"]
    assert not len(queue)


def test_an_account_that_comes_late_does_not_wait_for_the_others_backlog() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.add(1, 1_000, f"A{number}")
    assert drain(queue, 40) == [f"A{number}" for number in range(40)]
    queue.add(2, 1_000, "B0")
    queue.add(2, 1_000, "B1")
    assert drain(queue, 5) == ["B0", "A40", "B1", "A41", "A42"]


def test_turns_are_by_load_and_not_by_request() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(3):
        queue.add(1, 1_000, f"A{number}")
    for number in range(1_500):
        queue.add(2, 1, f"b{number}")
    taken = drain(queue, 1_501)
    assert taken[0] == "A0"
    assert [name for name in taken if name.startswith("A")] == ["A0", "A1"]


def test_an_account_that_comes_and_goes_gets_no_more_than_its_share() -> None:
    """Its queue is empty each time that its item has left; the others' is not."""
    queue: FairQueue[str] = FairQueue()
    for number in range(100):
        queue.add(1, 1_000, f"A{number}")
    queue.add(2, 1_000, "B")
    taken = []
    for _ in range(20):
        (name,) = drain(queue, 1)
        taken.append(name[0])
        if name == "B":
            queue.add(2, 1_000, "B")
    assert taken.count("B") == 10


def test_an_item_above_the_room_is_waited_for() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(1, 1_000, "large")
    queue.add(2, 1, "small")
    assert queue.pop(999, lambda _: True) is None, "otherwise small batches would keep large ones out for ever"
    assert queue.pop(1_000, lambda _: True) == "large"
    assert drain(queue) == ["small"]


def test_an_account_whose_item_does_not_fit_is_passed_over_and_keeps_its_turn() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(1, 1_000, "misfit")
    queue.add(2, 1_000, "B0")
    queue.add(2, 1_000, "B1")
    assert queue.pop(ROOM, lambda item: item != "misfit") == "B0"
    assert drain(queue) == ["misfit", "B1"]


def test_an_account_that_was_passed_over_for_long_gains_no_credit() -> None:
    queue: FairQueue[str] = FairQueue()
    for number in range(200):
        queue.add(1, 1_000, f"A{number}")
        queue.add(2, 1_000, f"B{number}")
    for _ in range(150):
        assert queue.pop(ROOM, lambda item: not item.startswith("A")) is not None
    taken = [name[0] for name in drain(queue, 40)]
    assert taken.count("A") in (20, 21)


def test_an_item_may_be_added_before_the_others_of_its_account() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(1, 1, "second")
    queue.add(1, 1, "first", first=True)
    assert drain(queue) == ["first", "second"]


def test_a_removed_item_does_not_leave() -> None:
    queue: FairQueue[str] = FairQueue()
    for name in "abc":
        queue.add(1, 1_000, name)
    queue.add(2, 1, "d")
    queue.remove(1, 1_000, "b")
    queue.remove(2, 1, "d")
    assert len(queue) == 2
    assert drain(queue) == ["a", "c"]


def test_an_account_whose_turn_found_it_empty_comes_back() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(1, 1, "A0")
    for name in ("B0", "B1", "B2"):
        queue.add(2, 1, name)
    assert drain(queue, 3) == ["A0", "B0", "B1"]
    queue.add(1, 1, "A1")
    assert sorted(drain(queue)) == ["A1", "B2"]


def test_the_past_of_an_account_is_forgotten_once_the_queue_is_empty() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.add(1, 1_000, "A0")
    assert drain(queue, 1) == ["A0"]
    queue.add(2, 1, "B")
    queue.add(1, 1, "A1")
    queue.add(2, 1, "C")
    assert drain(queue) == ["B", "A1", "C"]


def test_nothing_is_remembered_of_accounts_once_the_queue_is_empty() -> None:
    queue: FairQueue[str] = FairQueue()
    for account_id in range(10_000):
        queue.add(account_id, 1, "x")
        assert drain(queue, 1) == ["x"]
    assert not any(vars(queue)[name] for name in ("_items", "_turns", "_virtual_time", "_length"))
