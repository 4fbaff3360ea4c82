"""PostgreSQL: store the ids that were handed on, and hand new ones on in the same transaction.

A transaction either commits, or its connection is closed. So a missing answer blocks nothing: a commit with an unknown
outcome is tried again, and finds its own ids if it had happened.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import asyncpg

from examples.consumer.payloads import Sms
from examples.consumer.settings import Settings

SCHEMA = Path(__file__).with_name("schema.sql").read_text()
SCHEMA_LOCK = 0x5357  # any number, the same in all replicas, so that only one of them makes the tables
SWEEP_ROWS = 10_000  # per transaction; small, because an insert waits for the end of a transaction that removes its id

# In the order of the ids: otherwise two consumers with the same ids could deadlock. An insert that meets an uncommitted
# id waits, and takes the id if that transaction fails.
REMEMBER_IDS = """
    INSERT INTO inbox (id, expires_at)
    SELECT id, now() + make_interval(secs => $2)
    FROM unnest($1::text[]) AS id
    ORDER BY id COLLATE "C"
    ON CONFLICT (id) DO NOTHING
    RETURNING id
"""

FIND_IDS = "SELECT id FROM inbox WHERE id = ANY ($1::text[])"

INSERT_DELIVERIES = """
    INSERT INTO deliveries (id, list_number, recipient, body)
    SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bytea[])
"""

FORGET_EXPIRED_IDS = """
    DELETE FROM inbox
    WHERE id = ANY (ARRAY(
        SELECT id FROM inbox WHERE expires_at <= now() ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
    ))
"""

DATABASE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)

Deliver = Callable[[asyncpg.Connection, list[Sms]], Awaitable[None]]


async def insert_deliveries(connection: asyncpg.Connection, messages: list[Sms]) -> None:
    """Hand SMS on, by inserting them into a table; in the transaction of their ids, and so exactly once."""
    rows = [(sms.id, sms.list_number, sms.to, sms.body.encode()) for sms in messages]
    await connection.execute(INSERT_DELIVERIES, *map(list, zip(*rows, strict=True)))


class Inbox:
    """The ids handed on so far. Its pool connects when first needed, and again after an outage."""

    def __init__(self, settings: Settings, deliver: Deliver = insert_deliveries) -> None:
        self._deliver = deliver
        self._remember_ids_s = settings.remember_ids_s
        self._timeout_s = settings.database_timeout_s
        self._has_tables = False
        timeout_ms = str(round(settings.database_timeout_s * 1000))
        self._pool = asyncpg.create_pool(
            settings.database_url,
            min_size=0,
            max_size=2,  # one for the groups, one for the sweep
            timeout=settings.database_timeout_s,
            target_session_attrs="primary",
            reset=_keep_session,
            server_settings={
                "application_name": "sms-consumer",
                # When the network loses the end of the connection, the server must end the transaction by itself.
                # Until then its ids stay locked, and the next try waits for them.
                "statement_timeout": timeout_ms,
                "idle_in_transaction_session_timeout": timeout_ms,
            },
        )

    async def __aenter__(self) -> "Inbox":
        await self._pool
        return self

    async def __aexit__(self, *_: object) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def hand_on(self, messages: Mapping[str, Sms]) -> int:
        """Hand on the messages whose ids are new; return their number. Raises one of DATABASE_ERRORS.

        `messages`: SMS by id.
        """
        async with self._transaction() as connection:
            new = {row["id"] for row in await connection.fetch(REMEMBER_IDS, list(messages), self._remember_ids_s)}
            if new:
                await self._deliver(connection, [sms for id_, sms in messages.items() if id_ in new])
        return len(new)

    async def find_known(self, ids: list[str]) -> set[str]:
        """Return those of the ids whose SMS were handed on. Raises one of DATABASE_ERRORS."""
        async with self._transaction() as connection:
            return {row["id"] for row in await connection.fetch(FIND_IDS, ids)}

    async def sweep(self) -> int:
        """Remove expired ids; return their number. Several replicas may sweep at once."""
        removed, last = 0, SWEEP_ROWS
        while last == SWEEP_ROWS:
            async with self._transaction() as connection:
                last = int((await connection.execute(FORGET_EXPIRED_IDS, SWEEP_ROWS)).removeprefix("DELETE "))
            removed += last
        return removed

    @asynccontextmanager
    async def _transaction(self) -> AsyncIterator[asyncpg.Connection]:
        """Open a transaction, and commit it at the end of the block. Raises TimeoutError when it takes too long."""
        async with asyncio.timeout(self._timeout_s):
            connection = await self._pool.acquire()
            try:
                # Named explicitly: at a higher level, a conflict with another consumer would be an error.
                await connection.execute("BEGIN ISOLATION LEVEL READ COMMITTED")
                if not self._has_tables:
                    await _make_tables(connection)
                yield connection
                await connection.execute("COMMIT")
                self._has_tables = True
            except BaseException:
                # The pool may already have taken a dead connection back.
                with suppress(asyncpg.InterfaceError):
                    # A ROLLBACK would wait for a server that may be silent.
                    connection.terminate()
                raise
            finally:
                await self._pool.release(connection)


async def _make_tables(connection: asyncpg.Connection) -> None:
    await connection.execute("SELECT pg_advisory_xact_lock($1)", SCHEMA_LOCK)
    if await connection.fetchval("SELECT to_regclass('deliveries') IS NULL"):
        await connection.execute(SCHEMA)


async def _keep_session(_connection: object) -> None:
    """Skip the pool's reset: it costs a round trip per transaction, and these transactions leave no state."""
