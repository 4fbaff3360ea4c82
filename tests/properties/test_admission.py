"""Admission keeps its limits under any order of requests, and leaves nobody waiting who fits. Promises 8 and 13."""

import asyncio
from contextlib import AsyncExitStack

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import Overloaded
from tests.properties import MORE
from tests.support.admission import BrokerRoom, admission_of, entered

WINDOW, SLOTS, BYTES = 3_000, 8, 500_000


@settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 400_000), st.integers(1, 3), st.integers(0, 29)), max_size=40))
def test_no_limit_is_ever_passed_and_everybody_is_served(steps: list[tuple[int, int, int]]) -> None:
    asyncio.run(_run(steps))


async def _run(steps: list[tuple[int, int, int]]) -> None:
    room = BrokerRoom(WINDOW)
    admission = admission_of(max_requests=SLOTS, max_bytes=BYTES, room=room)
    inside: list[tuple[AsyncExitStack, int]] = []
    served = 0

    async def request(size: int, account_id: int) -> None:
        nonlocal served
        async with AsyncExitStack() as stack:
            slot = await stack.enter_async_context(entered(admission, size, account_id))
            load = size // 200 + 1
            await slot.enter_window(load)
            assert not room.unconfirmed or room.unconfirmed + load <= WINDOW
            room.unconfirmed += load
            served += 1
            inside.append((stack.pop_all(), load))

    async def confirm(number: int) -> None:
        stack, load = inside.pop(number % len(inside))
        room.unconfirmed -= load
        await stack.aclose()

    tasks = []
    refused = 0
    for size, account_id, confirms in steps:
        tasks.append(asyncio.create_task(request(size, account_id)))
        await asyncio.sleep(0)
        if confirms % 3 and inside:
            await confirm(confirms)
        assert admission.requests <= SLOTS
        assert admission.reserved_bytes <= BYTES
    while admission.waiting or inside:
        if inside:
            await confirm(0)
        await asyncio.sleep(0)
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if result is not None:
            assert isinstance(result, Overloaded)
            refused += 1
    assert served + refused == len(steps)
    assert set(admission.shed) <= {"slots", "account_share"}, "nobody who could wait was refused"
    assert (admission.requests, admission.reserved_bytes) == (0, 0)
