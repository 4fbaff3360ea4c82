"""The supply of message ids: one lease in use and the next one ready, so that no batch waits for the database."""

import asyncio

from gateway.ingest.message_ids import IdBlock, LeasedIds
from gateway.postgres.queries import Queries


class IdSupply:
    """Message ids for batches. A batch's ids are neighbours in one lease; a lease's last ids may stay unused."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._current: LeasedIds | None = None
        self._next: LeasedIds | None = None
        self._leasing: asyncio.Task[None] | None = None
        self.leases = 0  # obtained so far

    @property
    def available(self) -> int:
        """Number of ids left in the leases of this process."""
        return sum(len(leased) for leased in (self._current, self._next) if leased is not None)

    async def take(self, count: int) -> IdBlock:
        """Return `count` new ids. Raises DatabaseUnavailable if a new lease is needed and the database gives none."""
        while self._current is None or len(self._current) < count:
            if self._next is None:
                await asyncio.shield(self._lease())
            if self._next is not None:  # otherwise another batch that waited for it has taken it
                self._current, self._next = self._next, None
        if self._next is None:
            self._lease()
        return self._current.take(count)

    async def close(self) -> None:
        """Cancel a running attempt to lease ids."""
        if self._leasing is not None:
            self._leasing.cancel()
            await asyncio.gather(self._leasing, return_exceptions=True)

    def _lease(self) -> asyncio.Task[None]:
        """Return the running attempt to get the next lease, or start one."""
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
            task.exception()  # marks it as retrieved: the pool logged it, and take() tries again
