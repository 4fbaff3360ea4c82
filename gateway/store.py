"""The questions asked of PostgreSQL on the way of a request: one function each, SQL as named constants.

Every wait is bounded, and whatever goes wrong with the database leaves here as DatabaseUnavailable. Reads go to the
primary, without a cache, so that a revoked key or a suspended account is refused on the first request after the commit.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import NamedTuple

import asyncpg

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable

log = logging.getLogger(__name__)

FIND_ACCOUNT_BY_KEY = """
    SELECT account.id, account.status = 'active' AS is_active
    FROM api_keys AS key
    JOIN accounts AS account ON account.id = key.account_id
    WHERE key.sha256 = $1 AND key.revoked_at IS NULL
"""

FIND_OWNED_LISTS = """
    SELECT number, id
    FROM sending_lists
    WHERE account_id = $1 AND number = ANY($2::text[]) AND status = 'active'
"""

LEASE_MESSAGE_IDS = "SELECT nextval('message_id_leases')"

DATABASE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Account(NamedTuple):
    """Who a request comes from."""

    id: int
    is_active: bool


class Store:
    """A pool of connections that connects when first asked, and again whenever the database has been away."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.database_timeout_s
        self._pool = asyncpg.create_pool(
            settings.database_url,
            min_size=0,  # nothing is asked of the database at start: the gateway starts without it
            max_size=settings.database_pool_size,
            timeout=settings.database_timeout_s,  # of one attempt to connect
            statement_cache_size=settings.database_statement_cache,
            target_session_attrs="primary",
            reset=_keep_session,
            server_settings={"application_name": "sms-gateway"},
        )

    async def open(self) -> None:
        """Make the pool ready; connects to nothing yet."""
        await self._pool

    async def close(self) -> None:
        """Close all connections, by force if they do not close in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def find_account(self, key_sha256: bytes) -> Account | None:
        """Whose key it is; None when it is unknown or revoked."""
        async with self._connection() as connection:
            row = await connection.fetchrow(FIND_ACCOUNT_BY_KEY, key_sha256)
        return Account(*row) if row else None

    async def find_owned_lists(self, account_id: int, numbers: list[str]) -> dict[str, int]:
        """List number → list id, for those of `numbers` that are active lists of this account."""
        async with self._connection() as connection:
            rows = await connection.fetch(FIND_OWNED_LISTS, account_id, numbers)
        return dict(map(tuple, rows))

    async def lease_message_ids(self) -> int:
        """The number of a lease that no other process has, or will ever have."""
        async with self._connection() as connection:
            lease: int = await connection.fetchval(LEASE_MESSAGE_IDS)
        return lease

    @asynccontextmanager
    async def _connection(self) -> "AsyncIterator[asyncpg.pool.PoolConnectionProxy]":
        """A connection for one question. Waiting for it, and for the answer, take `timeout_s` together at most."""
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._pool.acquire()
                try:
                    yield connection
                except (TimeoutError, asyncio.CancelledError):
                    connection.terminate()  # a polite cancel request would wait for the same silent server
                    raise
                finally:
                    await self._pool.release(connection)
        except DATABASE_ERRORS as error:
            log.warning("the database is unavailable: %s %s", type(error).__name__, error)
            raise DatabaseUnavailable from error


async def _keep_session(_connection: object) -> None:
    """The pool's reset costs a round trip, a third of our queries' time; ours leave no state behind them."""
