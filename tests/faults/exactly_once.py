"""The reference consumer, as a source for the ledger: it counts how often each message was delivered."""

import asyncio
import time
from collections import Counter
from collections.abc import Collection
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

import asyncpg

from examples.consumer import Settings, open_consumer
from tests.faults.deployment import Deployment
from tests.faults.ledger import Consumed, Token
from tests.faults.reader import GIVE_UP_S, QUIET_S

DELIVERIES = """
    SELECT number, id, convert_from(body, 'UTF8') AS body FROM deliveries WHERE number > $1 ORDER BY number
"""


class ReferenceConsumer:
    """A run of examples/consumer on the deployment's queue and database, for the length of an `async with` block."""

    def __init__(self, deployment: Deployment, load_name: str) -> None:
        self._deployment = deployment
        self._load_name = load_name
        self._last_number = 0
        self.consumed: set[Consumed] = set()  # without the request id, which is not in the table
        self.handed_on: Counter[Token] = Counter()

    async def __aenter__(self) -> Self:
        settings = Settings(
            database_url=self._deployment.databases.url,
            amqp_url=",".join(self._deployment.amqp_urls),
            queue=self._deployment.queue,
            amqp_heartbeat_s=1,
            database_timeout_s=2.0,
        )
        self._stack = AsyncExitStack()
        await self._stack.enter_async_context(open_consumer(settings))
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(exc_type, exc, traceback)

    async def drain(self, expected: Collection[Token]) -> None:
        """Return when all of `expected` has been delivered and nothing more comes, or after GIVE_UP_S of silence."""
        quiet_since = time.monotonic()
        while True:
            if await self._read_deliveries():
                quiet_since = time.monotonic()
            quiet_s = time.monotonic() - quiet_since
            if quiet_s > (QUIET_S if all(token in self.handed_on for token in expected) else GIVE_UP_S):
                return
            await asyncio.sleep(0.2)

    async def _read_deliveries(self) -> int:
        """Read the new rows of the table and return their number."""
        connection = await asyncpg.connect(self._deployment.databases.primary.url, timeout=5, command_timeout=30)
        try:
            rows = await connection.fetch(DELIVERIES, self._last_number)
        finally:
            await connection.close()
        for number, message_id, body in rows:
            self._last_number = number
            name, batch, place, told_id = body.split()
            assert told_id == message_id, body
            if name == self._load_name:
                token = Token(int(batch), int(place))
                self.handed_on[token] += 1
                self.consumed.add(Consumed(token, message_id, ""))
        return len(rows)
