"""Admission by slots, bytes, account shares and the room at the broker. Promises 8 and 13.

A request that fits goes on, any other waits for a bounded time, and a slot is released however the request ends.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from gateway.errors import Draining, MalformedHttp, Overloaded, QueueUnavailable
from gateway.ingest import admission as admission_module
from gateway.ingest.admission import Admission, Slot
from tests.support.admission import KEY, BrokerRoom, admission_of, entered, held_slot
from tests.support.eventually import eventually

A, B = 1, 2
BATCH_BYTES = 1_000 * admission_module.MESSAGE_BYTES  # a body with an expected load of 1,000


async def fill(held: AsyncExitStack, admission: Admission, size: int, account_id: int) -> int:
    """Admit requests of one account until one is refused or waits; return how many were admitted."""
    for number in range(1_000):
        request = asyncio.create_task(held.enter_async_context(entered(admission, size, account_id)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if not request.done():
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
            return number
        if isinstance(request.exception(), Overloaded):
            return number
    raise AssertionError


@asynccontextmanager
async def waiting(admission: Admission, size: int, account_id: int, requests: int = 1) -> AsyncIterator[list[Slot]]:
    """Let requests wait. Yield the slots that have had their turn, in order."""
    served: list[Slot] = []

    async def request() -> None:
        async with entered(admission, size, account_id) as slot:
            served.append(slot)
            await asyncio.Event().wait()

    before = admission.waiting
    tasks = [asyncio.create_task(request()) for _ in range(requests)]
    await eventually(lambda: admission.waiting == before + requests)
    try:
        yield served
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def assert_empty(admission: Admission) -> None:
    """Check that nothing is held and nobody waits."""
    assert (admission.requests, admission.reserved_bytes, admission.waiting) == (0, 0, 0)
    assert (dict(admission.requests_of), dict(admission.bytes_of)) == ({}, {})
    assert not any(vars(admission)[name] for name in ("_granted", "_granted_load", "_granted_of"))
    assert not len(vars(admission)["_queue"])


async def test_one_account_alone_gets_three_quarters_of_the_slots_and_leaves_room_for_others() -> None:
    admission = admission_of()
    async with AsyncExitStack() as held:
        assert await fill(held, admission, 0, A) == 75
        assert admission.shed == {"account_share": 1}
        assert await fill(held, admission, 0, B) > 15
        async with entered(admission, 0, account_id=3):
            assert admission.requests_of[3] == 1
    assert_empty(admission)


async def test_one_accounts_large_bodies_leave_room_for_others() -> None:
    admission = admission_of(max_requests=1_000, max_bytes=1_000)
    async with AsyncExitStack() as held:
        assert await fill(held, admission, 10, A) == 75
        async with waiting(admission, 10, A), entered(admission, 150, B):
            assert admission.reserved_bytes == 900
    assert_empty(admission)


async def test_one_account_leaves_bytes_free_when_its_bodies_are_large() -> None:
    admission = admission_of(max_bytes=1_500)
    async with AsyncExitStack() as held:
        assert await fill(held, admission, 500, A) == 2, "a third body would take all bytes"
        async with waiting(admission, 500, A), entered(admission, 500, B):
            assert dict(admission.bytes_of) == {A: 1_000, B: 500}
    assert_empty(admission)


async def test_a_large_body_beside_a_small_one_of_its_account_leaves_a_quarter_free() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 100, A), waiting(admission, 651, A), entered(admission, 250, B):
        assert dict(admission.bytes_of) == {A: 100, B: 250}
    async with entered(admission, 100, A), entered(admission, 650, A):
        assert dict(admission.bytes_of) == {A: 750}
    assert_empty(admission)


async def test_a_body_that_turns_out_costly_leaves_bytes_free() -> None:
    admission = admission_of(max_bytes=1_500)
    async with entered(admission, 500, A), entered(admission, 500, A) as second:
        with pytest.raises(Overloaded):
            second.reserve_total(1_000)
        async with entered(admission, 500, B):
            assert dict(admission.bytes_of) == {A: 1_000, B: 500}
    assert_empty(admission)


@pytest.mark.parametrize("size", [500, 1_000])
async def test_a_body_as_large_as_all_bytes_is_served_once_they_are_free(size: int) -> None:
    """With the smallest setting, one body of the maximum takes all bytes."""
    admission = admission_of(max_bytes=1_000)
    async with AsyncExitStack() as first:
        slot = await first.enter_async_context(entered(admission, size, A))
        slot.reserve_total(1_000)
        async with waiting(admission, 1_000, A) as served:
            await first.aclose()
            await eventually(lambda: len(served) == 1)
            assert admission.reserved_bytes == 1_000
    assert_empty(admission)


async def test_a_released_share_can_be_taken_again() -> None:
    admission = admission_of(max_requests=8, max_bytes=1_000)
    for _ in range(3):
        async with AsyncExitStack() as held:
            assert await fill(held, admission, 1, A) == 6


async def test_retry_after_follows_how_long_a_slot_is_held() -> None:
    admission = admission_of(max_requests=1)
    admission.held_s = 3.2
    async with entered(admission, 1):
        with pytest.raises(Overloaded) as refused:
            admission.admit()
    assert refused.value.headers() == {"Retry-After": "4"}


async def test_requests_are_admitted_up_to_the_limit_and_not_beyond() -> None:
    admission = admission_of(max_requests=2)
    async with entered(admission, 1), entered(admission, 1):
        assert (admission.requests, admission.reserved_bytes) == (2, 2)
        with pytest.raises(Overloaded):
            admission.admit()
        assert (admission.requests, admission.reserved_bytes) == (2, 2), "a refused request holds nothing"
    assert_empty(admission)


async def test_a_body_waits_for_bytes() -> None:
    admission = admission_of(max_bytes=1_000)
    async with AsyncExitStack() as first:
        await first.enter_async_context(entered(admission, 600))
        async with waiting(admission, 401, B) as served:
            async with entered(admission, 400):
                assert admission.reserved_bytes == 1_000
                async with entered(admission, 0):
                    assert admission.requests == 4
            assert not served
            await first.aclose()
            await eventually(lambda: len(served) == 1)
            assert admission.reserved_bytes == 401
    assert_empty(admission)


class Failure(BaseException):
    """A failure that is no Exception, like CancelledError."""


@pytest.mark.parametrize("failure", [ValueError, Failure])
async def test_a_request_that_fails_releases_its_slot(failure: type[BaseException]) -> None:
    admission = admission_of(max_requests=1)
    with pytest.raises(failure):
        async with entered(admission, 10):
            raise failure
    assert_empty(admission)


async def test_draining_admits_no_new_request_and_ends_none() -> None:
    """The caller shall retry on another process: draining is said before overloaded."""
    admission = admission_of(max_requests=1)
    async with entered(admission, 3):
        admission.closed = True
        with pytest.raises(Draining):
            admission.admit()
        assert (admission.requests, admission.reserved_bytes) == (1, 3)
    assert_empty(admission)


async def test_at_the_end_of_a_drain_a_request_without_room_is_refused_and_does_not_begin_to_wait() -> None:
    """The process would end before its turn comes, and the caller would get no answer."""
    room = BrokerRoom(messages=10)
    admission = admission_of(room=room)
    with held_slot(admission) as late, held_slot(admission) as read:
        await read.enter(A, 10, KEY)
        room.unconfirmed = 10
        admission.close()
        for wait in (late.enter(B, 10, KEY), read.enter_window(5)):
            with pytest.raises(Draining):
                async with asyncio.timeout(5):
                    await wait
    assert_empty(admission)


async def test_a_body_that_costs_more_than_its_size_reserves_more_or_is_refused() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 400, A) as first, entered(admission, 150, B) as second:
        first.reserve_total(800)
        with pytest.raises(Overloaded):
            second.reserve_total(300)
        assert admission.reserved_bytes == 950, "a refused body keeps what it had until its slot is given back"
        first.reserve_total(400)
        second.reserve_total(300)
        assert dict(admission.bytes_of) == {A: 400, B: 300}
    assert_empty(admission)


async def test_an_account_may_not_take_more_than_its_share_by_costly_bodies() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 300, A) as first, entered(admission, 300, A) as second:
        first.reserve_total(400)
        with pytest.raises(Overloaded):
            second.reserve_total(600)
    assert admission.shed["bytes"] == 1


async def test_a_single_body_always_fits() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 900) as slot:
        slot.reserve_total(1_800)
        assert admission.reserved_bytes == 1_000


async def test_a_large_answer_is_counted_and_never_refused() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 900) as slot:
        slot.hold_answer(100)
        assert admission.reserved_bytes == 900
        slot.hold_answer(1_500)
        assert admission.reserved_bytes == 1_500
        async with waiting(admission, 1, B) as served:
            assert not served
    assert_empty(admission)


async def test_a_slot_is_given_back_once() -> None:
    admission = admission_of()
    with held_slot(admission) as slot:
        await slot.enter(A, 10, KEY)
        for _ in range(2):
            slot.give_back()
            assert_empty(admission)


async def test_a_body_that_costs_less_than_is_reserved_is_never_refused() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 100, A) as slot, entered(admission, 100, B) as other:
        other.hold_answer(1_500)
        slot.reserve_total(50)
        assert admission.reserved_bytes == 1_550


async def test_the_time_that_a_slot_is_held_is_smoothed() -> None:
    admission = admission_of()
    for held_s in (2.0, 4.0):
        slot = admission.admit()
        slot.was_granted = True
        admission.end(slot, held_s)
    assert admission.held_s == pytest.approx(0.05 * 4.0 + 0.95 * 0.05 * 2.0)
    admission = admission_of()
    async with entered(admission, 1, A):
        pass
    assert 0 < admission.held_s < 1


def test_an_account_may_hold_its_share_to_the_last_slot() -> None:
    admission = admission_of(max_requests=4)
    for account_id in (A, A, B):
        admission.admit()
        admission.add_held(account_id, 1, 0)
    admission.admit()
    admission.check_share(A, KEY)  # its third of four, of which one is free with it


def test_the_keys_of_all_refused_requests_are_remembered() -> None:
    admission = admission_of(max_requests=4)
    for _ in range(4):
        admission.admit()
        admission.add_held(A, 1, 0)
    for key in ("one", "two", "three"):
        with pytest.raises(Overloaded):
            admission.check_share(A, key)
    for key in ("one", "two", "three"):
        with pytest.raises(Overloaded):
            admission.check_refused_key(key)
    admission.check_refused_key("another")


def test_waits_are_parts_of_the_deadline() -> None:
    admission = admission_of(deadline_s=4.0)
    assert admission._long_wait_s == pytest.approx(0.5 * 4.0)
    assert admission._short_wait_s == pytest.approx(0.3 * 4.0)


async def test_the_time_of_all_waits_is_noted() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    with held_slot(admission) as slot:
        assert slot.waited_s == 0
        for _ in range(2):
            room.unconfirmed, before = 1_000, slot.waited_s
            waits = asyncio.create_task(admission.wait(slot))
            await asyncio.sleep(0.01)
            room.unconfirmed = 0
            admission.wake()
            await waits
            admission.end_grant(slot)
            assert before < slot.waited_s < before + 60


async def test_a_request_passes_those_that_wait_for_what_it_does_not_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "TICK_S", 600.0)
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 900, A), waiting(admission, 500, A), asyncio.timeout(30), entered(admission, 10, B):
        assert admission.waiting == 1


async def test_a_small_request_does_not_pass_those_that_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "TICK_S", 600.0)
    room = BrokerRoom(1_000)
    room.unconfirmed = 500
    admission = admission_of(room=room)
    async with waiting(admission, BATCH_BYTES - 1, A):
        for account_id in (A, B):
            small = admission.admit()
            entering = asyncio.create_task(small.enter(account_id, 10, KEY))
            await asyncio.sleep(0)
            assert admission.waiting == 2
            entering.cancel()
            await asyncio.gather(entering, return_exceptions=True)
            small.give_back()


async def test_a_batch_that_takes_less_than_was_expected_makes_room_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "TICK_S", 600.0)
    room = BrokerRoom(1_000)
    admission = admission_of(room=room)
    async with entered(admission, BATCH_BYTES - 1, A) as slot, waiting(admission, BATCH_BYTES // 2, B) as served:
        assert admission.use_grant(slot, 10)
        room.unconfirmed = 10
        await eventually(lambda: len(served) == 1)


async def test_a_batch_without_a_grant_does_not_pass_those_that_wait() -> None:
    admission = admission_of(max_bytes=1_000)
    async with entered(admission, 900, A) as slot:
        assert admission.use_grant(slot, 1)
        async with waiting(admission, 500, B):
            assert not admission.use_grant(slot, 1), "its grant has been used"
        assert admission.use_grant(slot, 1)


async def test_an_account_alone_may_use_the_whole_window() -> None:
    room = BrokerRoom(10_000)
    admission = admission_of(room=room)
    async with AsyncExitStack() as held:
        for _ in range(10):
            slot = await held.enter_async_context(entered(admission, BATCH_BYTES - 1, A))
            await slot.enter_window(1_000)
            room.unconfirmed += 1_000
        async with waiting(admission, BATCH_BYTES - 1, A) as served:
            room.unconfirmed -= 1_000
            admission.wake()
            await eventually(lambda: len(served) == 1)
    assert_empty(admission)


async def test_the_first_batch_goes_even_if_it_is_larger_than_the_window() -> None:
    admission = admission_of(room=BrokerRoom(10))
    async with entered(admission, BATCH_BYTES, A) as slot:
        await slot.enter_window(1_000)


async def test_requests_that_wait_get_their_turns_by_account() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    async with waiting(admission, BATCH_BYTES - 1, A, 5) as of_a, waiting(admission, BATCH_BYTES - 1, B, 2) as of_b:
        for a, b in ((1, 0), (1, 1), (2, 1), (2, 2), (3, 2)):
            room.unconfirmed = 0
            admission.wake()
            await eventually(lambda a=a, b=b: (len(of_a), len(of_b)) == (a, b))  # type: ignore[misc]
            await (of_b if a + b in (2, 4) else of_a)[-1].enter_window(1_000)
            room.unconfirmed = 1_000
    assert_empty(admission)


async def test_turns_are_given_for_room_and_not_for_all_at_once() -> None:
    """Otherwise all would read their bodies at once when the first batch is confirmed, and wait with them."""
    room = BrokerRoom(3_000)
    room.unconfirmed = 3_000
    admission = admission_of(room=room)
    async with waiting(admission, BATCH_BYTES - 1, A, 20) as served:
        room.unconfirmed = 1_000
        admission.wake()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert 1 <= len(served) <= 2


async def test_slow_bodies_of_one_account_leave_room_for_another() -> None:
    """They have had their turn, and nothing comes of it: no other account waits for that."""
    admission = admission_of(room=BrokerRoom(10_000))
    async with AsyncExitStack() as held:
        slow = await fill(held, admission, BATCH_BYTES - 1, A)
        assert slow == 5
        async with (
            waiting(admission, BATCH_BYTES - 1, A),
            asyncio.timeout(admission_module.GRANT_S / 2),
            entered(admission, BATCH_BYTES - 1, B) as slot,
        ):
            await slot.enter_window(1_000)


async def test_a_slow_body_needs_another_turn_and_comes_before_its_accounts_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(admission_module, "GRANT_S", 0.01)
    room = BrokerRoom(1_000)
    admission = admission_of(room=room)
    async with entered(admission, BATCH_BYTES - 1, A) as slow, waiting(admission, BATCH_BYTES - 1, A, 2) as served:
        await eventually(lambda: len(served) == 1)  # GRANT_S has passed
        await served[0].enter_window(1_000)
        room.unconfirmed = 1_000
        published = asyncio.create_task(slow.enter_window(1_000))
        await eventually(lambda: admission.waiting == 2)
        room.unconfirmed = 0
        admission.wake()
        await published
        assert len(served) == 1
    assert_empty(admission)


async def test_a_batch_larger_than_expected_waits_for_the_room_it_needs() -> None:
    room = BrokerRoom(1_000)
    admission = admission_of(room=room)
    async with entered(admission, 100, A) as slot:
        room.unconfirmed = 500
        batch = asyncio.create_task(slot.enter_window(1_000))
        await eventually(lambda: admission.waiting == 1)
        room.unconfirmed = 0
        await batch
    assert_empty(admission)


@pytest.mark.parametrize("resource", ["confirm_window", "bytes"])
async def test_after_too_long_a_wait_a_request_is_refused(resource: str) -> None:
    room = BrokerRoom(1_000)
    admission = admission_of(room=room, max_bytes=1_000, deadline_s=0.4)
    async with entered(admission, 1_000, A):
        room.unconfirmed = 1_000 if resource == "confirm_window" else 0
        for _ in range(2):  # the second after nobody has waited
            began = asyncio.get_running_loop().time()
            with pytest.raises(Overloaded):
                async with entered(admission, 1, B):
                    pytest.fail("admitted")
            assert asyncio.get_running_loop().time() - began > admission_module.LONG_WAIT * 0.4
    assert admission.shed == {resource: 2}
    assert_empty(admission)


@pytest.mark.parametrize(
    ("lacking", "size", "max_bytes", "unconfirmed"), [("bytes", 500, 1_000, 0), ("confirm_window", 100_000, 10**9, 990)]
)
async def test_a_small_request_behind_a_large_one_is_refused_for_what_the_large_one_lacks(
    lacking: str, size: int, max_bytes: int, unconfirmed: int
) -> None:
    """The reason tells an operator which limit to raise."""
    room = BrokerRoom(1_000)
    admission = admission_of(room=room, max_bytes=max_bytes, deadline_s=0.4)
    async with entered(admission, 900, A):
        room.unconfirmed = unconfirmed
        async with waiting(admission, size, B):
            with pytest.raises(Overloaded):
                async with entered(admission, 1, B):
                    pytest.fail("admitted")
            await eventually(lambda: not admission.waiting)
    assert admission.shed == {lacking: 2}
    assert_empty(admission)


@pytest.mark.parametrize(("standing_s", "waits_s", "is_refused"), [(60, 35, True), (60, 25, False), (40, 45, False)])
async def test_a_queue_that_has_been_standing_refuses_earlier(
    standing_s: float, waits_s: float, *, is_refused: bool
) -> None:
    """With a deadline of 100 s the limits are 50 s, and 30 s once the queue has been standing for 50 s."""
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room, deadline_s=100)
    with held_slot(admission) as slot:
        request = asyncio.create_task(slot.enter(A, 1, KEY))
        await eventually(lambda: admission.waiting == 1)
        now = asyncio.get_running_loop().time()
        vars(admission)["_standing_since"], slot.waits_since = now - standing_s, now - waits_s
        newcomer = asyncio.create_task(entered(admission, 1, B).__aenter__())
        await asyncio.sleep(3 * admission_module.TICK_S)
        assert admission.waiting == (1 if is_refused else 2)
        request.cancel()
        newcomer.cancel()
        result, _ = await asyncio.gather(request, newcomer, return_exceptions=True)
        assert isinstance(result, Overloaded) is is_refused
    assert_empty(admission)


async def test_the_waits_of_a_request_add_up() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room, deadline_s=1.0)
    with held_slot(admission) as slot:
        entering = asyncio.create_task(slot.enter(A, 100, KEY))
        await asyncio.sleep(0.35)
        room.unconfirmed = 0
        await entering
        room.unconfirmed = 1_000
        began = asyncio.get_running_loop().time()
        with pytest.raises(Overloaded):
            await slot.enter_window(1)
        assert slot.waited_s >= admission_module.LONG_WAIT
        assert asyncio.get_running_loop().time() - began < slot.waited_s
    assert_empty(admission)


async def test_a_batch_that_has_been_read_needs_no_bytes() -> None:
    """Its body is reserved already. Otherwise it would wait in vain while its account holds all its bytes."""
    room = BrokerRoom(1_000)
    admission = admission_of(room=room, max_bytes=1_000)
    async with entered(admission, 700, A), entered(admission, 50, A) as slot:
        slot.hold_answer(500)
        room.unconfirmed = 1_000
        batch = asyncio.create_task(slot.enter_window(1))
        await eventually(lambda: admission.waiting == 1)
        slot.abandon()
        assert admission.waiting == 1, "its batch is built: it is published although the caller has hung up"
        room.unconfirmed = 0
        await batch
        assert slot not in admission._granted
        assert slot.reserved == 500
    assert_empty(admission)


async def test_the_end_of_a_drain_refuses_those_that_wait() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    request = asyncio.create_task(entered(admission, 1, A).__aenter__())
    await eventually(lambda: admission.waiting == 1)
    admission.close()
    with pytest.raises(Draining):
        await request
    assert_empty(admission)


async def test_a_request_without_a_valid_message_does_not_wait_for_the_broker() -> None:
    room = BrokerRoom(1_000)
    admission = admission_of(room=room)
    async with entered(admission, 100, A) as slot:
        room.unconfirmed = 2_000
        await slot.enter_window(0)
    assert_empty(admission)


async def test_a_caller_that_hangs_up_leaves_the_queue() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    with held_slot(admission) as slot:
        slot.abandon()
        assert admission.requests == 1, "it does not wait yet"
        request = asyncio.create_task(slot.enter(A, 100, KEY))
        await eventually(lambda: admission.waiting == 1)
        slot.abandon()
        with pytest.raises(MalformedHttp):
            await request
    assert not admission.shed
    assert_empty(admission)


async def test_quick_refusals_do_not_shorten_retry_after() -> None:
    admission = admission_of(max_requests=4)
    admission.held_s = 3.2
    async with AsyncExitStack() as held:
        await fill(held, admission, 0, A)
        for _ in range(200):
            with held_slot(admission), pytest.raises(Overloaded):
                admission.check_refused_key(KEY)
        assert admission.held_s == 3.2


async def test_a_broker_that_becomes_unusable_ends_the_wait_at_once() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    request = asyncio.create_task(entered(admission, 1, A).__aenter__())
    await eventually(lambda: admission.waiting == 1)
    room.usable = False
    with pytest.raises(QueueUnavailable):
        await request
    async with entered(admission, 1, A):
        pass  # the publisher refuses it
    assert not admission.shed


async def test_a_cancelled_request_leaves_the_queue() -> None:
    room = BrokerRoom(1_000)
    room.unconfirmed = 1_000
    admission = admission_of(room=room)
    async with waiting(admission, 1, A, 3):
        pass
    assert_empty(admission)


async def test_a_key_whose_account_is_over_its_share_is_refused_again_without_a_query() -> None:
    admission = admission_of(max_requests=4)
    admission.check_refused_key(KEY)
    async with AsyncExitStack() as held:
        assert await fill(held, admission, 0, A) == 3
        for refusals in (2, 3):
            with held_slot(admission), pytest.raises(Overloaded):
                admission.check_refused_key(KEY)
            assert admission.shed == {"account_share": refusals}
        admission.check_refused_key("another key")
    admission.check_refused_key(KEY)
    assert admission.shed == {"account_share": 3}


async def test_remembered_keys_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "MAX_REFUSED_KEYS", 10)
    admission = admission_of(max_requests=4)
    async with AsyncExitStack() as held:
        await fill(held, admission, 0, A)
        for number in range(100):
            with held_slot(admission), pytest.raises(Overloaded):
                admission.check_share(A, f"key {number}")
            assert len(vars(admission)["_refused_keys"]) <= 10
