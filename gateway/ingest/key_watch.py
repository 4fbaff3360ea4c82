"""API keys in the background: the day of their last use, and how many are about to expire. A task of each process."""

import asyncio
import logging
import random
from contextlib import suppress

from gateway.errors import DatabaseUnavailable
from gateway.postgres.queries import Queries

log = logging.getLogger(__name__)

INTERVAL_S = 60.0


class KeyWatch:
    """The keys that this process has accepted since they were last written, and the keys about to expire."""

    def __init__(self, queries: Queries) -> None:
        self._queries = queries
        self._used: set[bytes] = set()  # digests
        self.expiring = 0  # usable keys of all accounts that expire soon and have no successor

    def note(self, key_sha256: bytes) -> None:
        """Note that a valid key was used."""
        self._used.add(key_sha256)

    async def watch_for_ever(self) -> None:
        """Write and count at random intervals. What cannot be written is kept for the next time."""
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * INTERVAL_S)  # noqa: S311 - jitter
            # One may fail without the other: on a read-only database, or without the right to write.
            with suppress(DatabaseUnavailable):
                self.expiring = await self._queries.count_expiring_keys()
            try:
                await self.write()
            except DatabaseUnavailable:
                log.warning("the last use of API keys is written later")

    async def write(self) -> None:
        """Write today as the last day of use of the noted keys. Raises DatabaseUnavailable."""
        used, self._used = self._used, set()
        try:
            if used:
                await self._queries.note_key_use(list(used))
        except BaseException:  # cancelled, too
            self._used |= used
            raise

    async def close(self) -> None:
        """Write what is noted, if the database answers."""
        try:
            await self.write()
        except DatabaseUnavailable:
            log.warning("the last use of %d API keys was not written", len(self._used))
