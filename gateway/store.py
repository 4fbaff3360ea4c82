"""The questions asked of PostgreSQL on the way of a request: one function each, SQL as named constants.

Requests in flight together share queries (grouped.py); an answer is always from a query that began after its question.
Every wait is bounded, and whatever goes wrong with the database leaves here as DatabaseUnavailable. Reads go to the
primary, without a cache, so that a revoked key or a suspended account is refused on the first request after the commit.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

import asyncpg

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.grouped import Grouped

log = logging.getLogger(__name__)

FIND_ACCOUNTS_BY_KEY = """
    SELECT key.sha256, account.id, account.status = 'active' AS is_active
    FROM api_keys AS key
    JOIN accounts AS account ON account.id = key.account_id
    WHERE key.sha256 = ANY($1::bytea[]) AND key.revoked_at IS NULL
"""

FIND_OWNED_LISTS = """
    SELECT list.account_id, list.number, list.id
    FROM unnest($1::bigint[], $2::text[]) AS asked (account_id, number)
    JOIN sending_lists AS list ON list.account_id = asked.account_id AND list.number = asked.number
    WHERE list.status = 'active'
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
        self._accounts = Grouped(self._find_accounts)
        self._lists = Grouped(self._find_lists, weigh=lambda question: len(question[1]))

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
        return await self._accounts.ask(key_sha256)

    async def find_owned_lists(self, account_id: int, numbers: list[str]) -> dict[str, int]:
        """List number → list id, for those of `numbers` that are active lists of this account."""
        return await self._lists.ask((account_id, numbers))

    async def _find_accounts(self, keys: Sequence[bytes]) -> list[Account | None]:
        async with self._connection() as connection:
            rows = await connection.fetch(FIND_ACCOUNTS_BY_KEY, keys)
        accounts = {sha256: Account(account_id, is_active) for sha256, account_id, is_active in rows}
        return [accounts.get(key) for key in keys]

    async def _find_lists(self, questions: Sequence[tuple[int, list[str]]]) -> list[dict[str, int]]:
        asked = [(account_id, number) for account_id, numbers in questions for number in numbers]
        async with self._connection() as connection:
            rows = await connection.fetch(FIND_OWNED_LISTS, *map(list, zip(*asked, strict=True)))
        owned = {(account_id, number): list_id for account_id, number, list_id in rows}
        return [
            {number: owned[account_id, number] for number in numbers if (account_id, number) in owned}
            for account_id, numbers in questions
        ]

    async def lease_message_ids(self) -> int:
        """The number of a lease that no other process has, or will ever have."""
        async with self._connection() as connection:
            lease: int = await connection.fetchval(LEASE_MESSAGE_IDS)
        return lease

    @asynccontextmanager
    async def _connection(self) -> "AsyncIterator[asyncpg.pool.PoolConnectionProxy]":
        """A connection for one query. Waiting for it, and for the answer, take `timeout_s` together at most."""
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
    """The pool's own reset costs a round trip for each question; our queries leave no state behind them."""
