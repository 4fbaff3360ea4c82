"""Keeps a lease of message ids ahead of the one in use, so that no batch waits for the database."""

import asyncio

from gateway.ingest.message_ids import IdBlock, LeasedIds
from gateway.postgres.queries import Queries


class IdSupply:
    """Ids for batches. Each batch's ids are neighbours in one lease; the few left at a lease's end are given up."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._current: LeasedIds | None = None
        self._next: LeasedIds | None = None
        self._leasing: asyncio.Task[None] | None = None
        self.leases = 0

    @property
    def available(self) -> int:
        """How many ids are left in the leases that are held."""
        return sum(len(leased) for leased in (self._current, self._next) if leased is not None)

    async def take(self, count: int) -> IdBlock:
        """`count` ids that nobody else has. Raises DatabaseUnavailable when a lease is needed and cannot be had."""
        while self._current is None or len(self._current) < count:
            if self._next is None:
                await asyncio.shield(self._lease())
            if self._next is not None:  # else another batch, woken by the same lease, took it first
                self._current, self._next = self._next, None
        if self._next is None:
            self._lease()
        return self._current.take(count)

    async def close(self) -> None:
        if self._leasing is not None:
            self._leasing.cancel()
            await asyncio.gather(self._leasing, return_exceptions=True)

    def _lease(self) -> asyncio.Task[None]:
        """The running attempt to get the next lease, or a new one."""
        if self._leasing is None:
            self._leasing = asyncio.create_task(self._lease_next(), name="lease message ids")
            self._leasing.add_done_callback(self._leased)
        return self._leasing

    async def _lease_next(self) -> None:
        self._next = LeasedIds(await self._queries.lease_message_ids())
        self.leases += 1

    def _leased(self, task: asyncio.Task[None]) -> None:
        self._leasing = None
        if not task.cancelled():
            task.exception()  # logged by the pool; a batch that needs the lease asks again, and is told
