"""Admission of requests by count, by bytes and by account share. Promise 13.

A request that fits is admitted, any other is refused, and a slot is released however the request ends.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import count

import pytest

from gateway.errors import Draining, Overloaded
from gateway.ingest.admission import Admission

strangers = count(1_000)


@contextmanager
def held(admission: Admission, size: int, account_id: int | None = None) -> Iterator[None]:
    """Hold a slot and `size` bytes, for the given account or for a new one."""
    with admission.admit() as place:
        place.reserve(next(strangers) if account_id is None else account_id, size)
        yield


def fill(house: ExitStack, admission: Admission, size: int, account_id: int) -> int:
    """Admit requests of one account until one is refused; return how many were admitted."""
    for number in count():
        try:
            house.enter_context(held(admission, size, account_id))
        except Overloaded:
            return number
    raise AssertionError


def test_one_account_alone_gets_three_quarters_and_leaves_room_for_others() -> None:
    admission = Admission(max_requests=100, max_bytes=1_000_000)
    with ExitStack() as house:
        assert fill(house, admission, 0, account_id=1) == 75
        assert fill(house, admission, 0, account_id=2) > 15
        with held(admission, 0, account_id=3):
            assert admission.requests_of[3] == 1
    assert not admission.requests_of


def test_one_accounts_large_bodies_leave_room_for_others() -> None:
    admission = Admission(max_requests=100, max_bytes=1_000)
    with ExitStack() as house:
        assert fill(house, admission, 10, account_id=1) == 75
        with held(admission, 150, account_id=2):
            assert admission.reserved_bytes == 900
    assert (admission.reserved_bytes, admission.bytes_of) == (0, {})


def test_a_released_share_can_be_taken_again() -> None:
    admission = Admission(max_requests=8, max_bytes=1_000)
    for _ in range(3):
        with ExitStack() as house:
            assert fill(house, admission, 1, account_id=1) == 6


def test_retry_after_follows_how_long_a_slot_is_held() -> None:
    admission = Admission(max_requests=1, max_bytes=10)
    admission.held_s = 3.2
    with held(admission, 1), pytest.raises(Overloaded) as refused, held(admission, 1):
        pytest.fail("admitted")
    assert refused.value.headers() == {"Retry-After": "4"}


def test_requests_are_admitted_up_to_the_limit_and_not_beyond() -> None:
    admission = Admission(max_requests=2, max_bytes=1_000)
    with held(admission, 1), held(admission, 1):
        assert (admission.requests, admission.reserved_bytes) == (2, 2)
        with pytest.raises(Overloaded), held(admission, 0):
            pytest.fail("a third was admitted")
        assert (admission.requests, admission.reserved_bytes) == (2, 2), "a refused request holds nothing"
    assert (admission.requests, admission.reserved_bytes) == (0, 0)


def test_bytes_are_admitted_up_to_the_limit_and_not_beyond() -> None:
    admission = Admission(max_requests=10, max_bytes=1_000)
    with held(admission, 600):
        with pytest.raises(Overloaded), held(admission, 401):
            pytest.fail("1,001 bytes were admitted")
        with held(admission, 400):
            assert admission.reserved_bytes == 1_000
            with held(admission, 0):
                assert admission.requests == 3


def test_a_released_slot_can_be_taken_again() -> None:
    admission = Admission(max_requests=1, max_bytes=10)
    for _ in range(3):
        with held(admission, 10):
            assert admission.requests == 1


class Failure(BaseException):
    """A failure that is no Exception, like CancelledError."""


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, Failure])
def test_a_request_that_fails_releases_its_slot(failure: type[BaseException]) -> None:
    admission = Admission(max_requests=1, max_bytes=10)
    with pytest.raises(failure), held(admission, 10):
        raise failure
    assert (admission.requests, admission.reserved_bytes) == (0, 0)


def test_draining_admits_no_new_request_and_ends_none() -> None:
    admission = Admission(max_requests=2, max_bytes=10)
    with held(admission, 3):
        admission.closed = True
        with pytest.raises(Draining), held(admission, 1):
            pytest.fail("admitted while draining")
        assert (admission.requests, admission.reserved_bytes) == (1, 3)
    assert (admission.requests, admission.reserved_bytes) == (0, 0)


def test_draining_is_said_before_overloaded() -> None:
    """The caller shall retry on another process, and not wait for this one."""
    admission = Admission(max_requests=1, max_bytes=10)
    with held(admission, 10):
        admission.closed = True
        with pytest.raises(Draining), held(admission, 10):
            pytest.fail("admitted")


def test_a_body_that_costs_more_than_its_size_reserves_more_or_is_refused() -> None:
    admission = Admission(max_requests=10, max_bytes=1_000)
    with admission.admit() as first, admission.admit() as second:
        first.reserve(1, 400)
        first.weigh(800)
        second.reserve(2, 150)
        with pytest.raises(Overloaded):
            second.weigh(300)
        assert admission.reserved_bytes == 950, "a refused body keeps what it had until its slot is given back"
        first.weigh(400)
        second.weigh(300)
        assert dict(admission.bytes_of) == {1: 400, 2: 300}
    assert (admission.reserved_bytes, admission.requests) == (0, 0)


def test_an_account_may_not_take_more_than_its_share_by_costly_bodies() -> None:
    admission = Admission(max_requests=100, max_bytes=1_000)
    with admission.admit() as first, admission.admit() as second:
        first.reserve(1, 300)
        second.reserve(1, 300)
        first.weigh(400)
        with pytest.raises(Overloaded):
            second.weigh(600)
    assert admission.shed["account_share"] == 1


def test_a_single_body_always_fits() -> None:
    admission = Admission(max_requests=10, max_bytes=1_000)
    with admission.admit() as slot:
        slot.reserve(1, 900)
        slot.weigh(1_800)
        assert admission.reserved_bytes == 1_000


def test_a_large_answer_is_counted_and_never_refused() -> None:
    admission = Admission(max_requests=10, max_bytes=1_000)
    with admission.admit() as slot:
        slot.reserve(1, 900)
        slot.hold_answer(100)
        assert admission.reserved_bytes == 900
        slot.hold_answer(1_500)
        assert admission.reserved_bytes == 1_500
        with pytest.raises(Overloaded), held(admission, 1):
            pytest.fail("admitted beside a large answer")
    assert admission.reserved_bytes == 0


def test_a_slot_is_given_back_once() -> None:
    admission = Admission(max_requests=10, max_bytes=1_000)
    slot = admission.admit()
    slot.reserve(1, 10)
    for _ in range(2):
        slot.give_back()
        assert (admission.requests, admission.reserved_bytes, dict(admission.requests_of)) == (0, 0, {})
