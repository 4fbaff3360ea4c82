"""The queries of a request: one method each, SQL as named constants.

Concurrent requests share queries (coalesce.py). Reads go to the primary, without a cache: a revoked key or a suspended
account is refused from the first request after the commit. Every method raises DatabaseUnavailable, and no other error.
"""

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple

from gateway.postgres.coalesce import Coalescer
from gateway.postgres.pool import Pool

FIND_ACCOUNTS_BY_KEY = """
    SELECT key.sha256, account.id, account.status = 'active' AS is_active
    FROM api_keys AS key
    JOIN accounts AS account ON account.id = key.account_id
    WHERE key.sha256 = ANY($1::bytea[]) AND key.revoked_at IS NULL
"""

RESOLVE_LISTS = """
    SELECT list.account_id, list.number, list.id
    FROM unnest($1::bigint[], $2::text[]) AS wanted (account_id, number)
    JOIN sending_lists AS list ON list.account_id = wanted.account_id AND list.number = wanted.number
    WHERE list.status = 'active'
"""

LEASE_MESSAGE_IDS = "SELECT nextval('message_id_leases')"

# Insert or take over the row of an Idempotency-Key, and resolve the lists, in one round trip. Returns no row when
# another run holds the key, when the key has an answer, or when the body is another one.
HOLD_KEY = """
    WITH held AS (
        INSERT INTO idempotency_keys AS kept (account_id, key, body_sha256, first_id, holder, held_until)
        VALUES ($1, $2, $3, $4, $5, now() + $6)
        ON CONFLICT (account_id, key) DO UPDATE SET holder = EXCLUDED.holder, held_until = EXCLUDED.held_until
        WHERE kept.answer IS NULL AND kept.held_until < now() AND kept.body_sha256 = EXCLUDED.body_sha256
        RETURNING first_id
    )
    SELECT held.first_id, list.number, list.id
    FROM held
    LEFT JOIN sending_lists AS list ON list.account_id = $1 AND list.number = ANY($7::text[]) AND list.status = 'active'
"""

FIND_KEY = """
    SELECT body_sha256 = $3 AS is_same_body, answer FROM idempotency_keys WHERE account_id = $1 AND key = $2
"""

KEEP_ANSWER = """
    UPDATE idempotency_keys SET answer = $4 WHERE account_id = $1 AND key = $2 AND holder = $3
"""

RELEASE_KEY = """
    UPDATE idempotency_keys SET held_until = '-infinity'
    WHERE account_id = $1 AND key = $2 AND holder = $3 AND answer IS NULL
"""

FORGET_KEY = """
    DELETE FROM idempotency_keys WHERE account_id = $1 AND key = $2 AND holder = $3 AND answer IS NULL
"""

SWEEP_LIMIT = 1000  # rows per statement
# SKIP LOCKED: several processes may sweep at once.
SWEEP_KEYS = f"""
    DELETE FROM idempotency_keys WHERE (account_id, key) IN (
        SELECT account_id, key FROM idempotency_keys
        WHERE created_at < now() - interval '24 hours' AND held_until < now()
        ORDER BY created_at LIMIT {SWEEP_LIMIT} FOR UPDATE SKIP LOCKED
    )
"""  # noqa: S608 - a constant of this module


class Account(NamedTuple):
    """An account with a valid key."""

    id: int
    is_active: bool


class HeldKey(NamedTuple):
    """An Idempotency-Key that this run holds: the position of its first message id, and list ids by number."""

    first_id: int
    lists: dict[str, int]


class KnownKey(NamedTuple):
    """An Idempotency-Key that this run cannot hold."""

    is_same_body: bool
    answer: bytes | None  # None: another run holds the key


class Queries:
    """The queries of a request, on one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._accounts = Coalescer(self._fetch_accounts)
        self._lists = Coalescer(self._fetch_lists, weigh=lambda wanted: len(wanted[1]))
        # Writes wait for disks, and perhaps for a standby: without a bound they would take all connections from reads.
        self._hold_slots, self._settle_slots = asyncio.Semaphore(2), asyncio.Semaphore(1)

    async def find_account(self, key_sha256: bytes) -> Account | None:
        """Return the account of a key; None for an unknown or revoked key."""
        return await self._accounts.get(key_sha256)

    async def resolve_lists(self, account_id: int, numbers: list[str]) -> dict[str, int]:
        """Return list ids by number, for the `numbers` that are active lists of this account."""
        return await self._lists.get((account_id, numbers)) if numbers else {}

    async def _fetch_accounts(self, keys: Sequence[bytes]) -> list[Account | None]:
        async with self._pool.connection() as connection:
            rows = await connection.fetch(FIND_ACCOUNTS_BY_KEY, keys)
        accounts = {sha256: Account(account_id, is_active) for sha256, account_id, is_active in rows}
        return [accounts.get(key) for key in keys]

    async def _fetch_lists(self, wanted: Sequence[tuple[int, list[str]]]) -> list[dict[str, int]]:
        pairs = [(account_id, number) for account_id, numbers in wanted for number in numbers]
        async with self._pool.connection() as connection:
            rows = await connection.fetch(RESOLVE_LISTS, *map(list, zip(*pairs, strict=True)))
        list_ids = {(account_id, number): list_id for account_id, number, list_id in rows}
        return [
            {number: list_ids[account_id, number] for number in numbers if (account_id, number) in list_ids}
            for account_id, numbers in wanted
        ]

    async def hold_key(
        self,
        account_id: int,
        key: str,
        body_sha256: bytes,
        *,
        first_id: int,
        holder: int,
        hold_s: float,
        numbers: list[str],
    ) -> HeldKey | KnownKey | None:
        """Hold an Idempotency-Key for `hold_s` seconds.

        Returns HeldKey on success, otherwise KnownKey; None when the key was removed between the two queries.
        """
        async with self._pool.connection(self._hold_slots) as connection:
            rows = await connection.fetch(
                HOLD_KEY, account_id, key, body_sha256, first_id, holder, timedelta(seconds=hold_s), numbers
            )
            if rows:
                lists = {number: list_id for _, number, list_id in rows if number is not None}
                return HeldKey(rows[0][0], lists)
            known = await connection.fetchrow(FIND_KEY, account_id, key, body_sha256)
        return known and KnownKey(*known)

    async def keep_answer(self, account_id: int, key: str, holder: int, answer: bytes) -> None:
        """Store the answer of a held key, for requests that repeat the key."""
        await self._execute(KEEP_ANSWER, account_id, key, holder, answer)

    async def release_key(self, account_id: int, key: str, holder: int) -> None:
        """Release a held key: another run may hold it, with the same message ids."""
        await self._execute(RELEASE_KEY, account_id, key, holder)

    async def forget_key(self, account_id: int, key: str, holder: int) -> None:
        """Delete a held key, as if it had never been sent."""
        await self._execute(FORGET_KEY, account_id, key, holder)

    async def sweep_keys(self) -> bool:
        """Delete up to SWEEP_LIMIT keys older than 24 hours. Returns True when more may be left."""
        return await self._execute(SWEEP_KEYS) == f"DELETE {SWEEP_LIMIT}"

    async def _execute(self, statement: str, *arguments: object) -> str:
        async with self._pool.connection(self._settle_slots) as connection:
            status: str = await connection.execute(statement, *arguments)
        return status

    async def lease_message_ids(self) -> int:
        """Return the number of a new lease of message ids, unique for ever."""
        async with self._pool.connection() as connection:
            lease: int = await connection.fetchval(LEASE_MESSAGE_IDS)
        return lease
