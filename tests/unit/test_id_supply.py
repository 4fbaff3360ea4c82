"""The supply of message ids: one lease for all that wait, and the next one ahead of time."""

import asyncio
from typing import cast

import pytest

from gateway.errors import DatabaseUnavailable
from gateway.ingest.id_supply import IdSupply
from gateway.ingest.message_ids import COLUMNS, LEASE_ROWS
from gateway.postgres.queries import Queries

LEASE = LEASE_ROWS * COLUMNS


class Leases:
    """Stands in for Queries: leases 0, 1 and so on, when the test lets it."""

    def __init__(self) -> None:
        self.asked = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fails = False

    async def lease_message_ids(self) -> int:
        self.asked += 1
        lease = self.asked - 1
        await self.may_answer.wait()
        if self.fails:
            raise DatabaseUnavailable
        return lease


def opened() -> tuple[IdSupply, Leases]:
    leases = Leases()
    return IdSupply(cast("Queries", leases)), leases


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_those_that_wait_share_one_lease_and_the_next_comes_ahead_of_time() -> None:
    supply, leases = opened()
    blocks = await asyncio.gather(*(supply.take(2) for _ in range(3)))
    await settle()
    assert [block.first_position for block in blocks] == [0, 2, 4]
    assert (leases.asked, supply.leases, supply.available) == (2, 2, 2 * LEASE - 6)


async def test_a_lease_is_used_to_its_last_id() -> None:
    supply, leases = opened()
    await supply.take(LEASE - 1)
    await settle()
    assert (await supply.take(1)).first_position == LEASE - 1
    assert (await supply.take(1)).first_position == LEASE
    await settle()
    assert leases.asked == 3


async def test_who_waits_for_a_lease_does_not_lose_it_with_another_caller() -> None:
    supply, leases = opened()
    leases.may_answer.clear()
    one, other = asyncio.create_task(supply.take(1)), asyncio.create_task(supply.take(1))
    await settle()
    one.cancel()
    await settle()
    leases.may_answer.set()
    assert (await other).first_position == 0
    assert leases.asked == 2, "the second is the next lease"
    await supply.close()


async def test_after_a_failure_the_next_batch_asks_again() -> None:
    supply, leases = opened()
    leases.fails = True
    with pytest.raises(DatabaseUnavailable):
        await supply.take(1)
    leases.fails = False
    assert (await supply.take(1)).first_position == LEASE
    await supply.close()


async def test_closing_ends_an_attempt_that_hangs() -> None:
    supply, leases = opened()
    await supply.take(1)
    leases.may_answer.clear()
    await settle()
    async with asyncio.timeout(5):
        await supply.close()
