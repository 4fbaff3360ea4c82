"""The queries of a request: one method each, SQL as named constants.

Concurrent requests share queries (coalesce.py). Reads go to the primary, without a cache: a revoked key or a suspended
account is refused from the first request after the commit. Every method raises DatabaseUnavailable, and no other error.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.postgres.coalesce import Coalescer
from gateway.postgres.pool import Pool
from gateway.postgres.rights import RIGHTS_OF_REQUESTS, check_rights

FIND_ACCOUNTS_BY_KEY = """
    SELECT key.sha256, account.id, account.status = 'active' AS is_active
    FROM api_keys AS key
    JOIN accounts AS account ON account.id = key.account_id
    WHERE key.sha256 = ANY($1::bytea[]) AND key.revoked_at IS NULL
        AND (key.expires_at IS NULL OR key.expires_at > now())
"""

# A row for each wanted pair whose key is valid. Without an active list of that number, list.id is null.
FIND_ACCOUNTS_AND_LISTS = """
    SELECT wanted.sha256, account.id, account.status = 'active' AS is_active, wanted.number, list.id
    FROM unnest($1::bytea[], $2::text[]) AS wanted (sha256, number)
    JOIN api_keys AS key ON key.sha256 = wanted.sha256 AND key.revoked_at IS NULL
        AND (key.expires_at IS NULL OR key.expires_at > now())
    JOIN accounts AS account ON account.id = key.account_id
    LEFT JOIN sending_lists AS list
        ON list.account_id = account.id AND list.number = wanted.number AND list.status = 'active'
"""

RESOLVE_LISTS = """
    SELECT list.account_id, list.number, list.id
    FROM unnest($1::bigint[], $2::text[]) AS wanted (account_id, number)
    JOIN sending_lists AS list ON list.account_id = wanted.account_id AND list.number = wanted.number
    WHERE list.status = 'active'
"""

# Each key once a day, whatever the number of processes. In the order of the digests: statements of several processes
# would otherwise deadlock.
NOTE_KEY_USE = """
    UPDATE api_keys SET last_used_on = current_date
    WHERE sha256 IN (
        SELECT sha256 FROM api_keys
        WHERE sha256 = ANY($1::bytea[]) AND last_used_on IS DISTINCT FROM current_date
        ORDER BY sha256 FOR NO KEY UPDATE
    )
"""
EXPIRES_SOON_DAYS = 14  # the notice of the alert
# A replaced key ends by design. A key with a short life counts only in its second half: otherwise it would count from
# its creation on, and so would its successors.
COUNT_EXPIRING_KEYS = f"""
    SELECT count(*) FROM api_keys
    WHERE revoked_at IS NULL AND replaced_by IS NULL
        AND expires_at > now() AND expires_at < now() + interval '{EXPIRES_SOON_DAYS} days'
        AND (lifetime IS NULL OR expires_at < now() + lifetime / 2)
"""  # noqa: S608 - a constant of this module

LEASE_MESSAGE_IDS = "SELECT nextval('message_id_leases')"

# Insert or take over rows of Idempotency-Keys, each at most once. Returns no row where another run holds the key, where
# the key has an answer, or where the body is another one. Rows are locked in the order of the primary key, here and in
# SETTLE_KEYS: statements of several processes would otherwise deadlock.
HOLD_KEYS = """
    INSERT INTO idempotency_keys AS stored (account_id, key, body_sha256, first_id, holder, held_until, not_found)
    SELECT account_id, key, body_sha256, first_id, holder, now() + hold_s * interval '1 second',
        string_to_array(not_found, ',')
    FROM unnest(
        $1::bigint[], $2::text[], $3::bytea[], $4::bigint[], $5::bigint[], $6::float8[], $7::text[], $8::boolean[]
    ) AS wanted (account_id, key, body_sha256, first_id, holder, hold_s, not_found, may_insert)
    WHERE may_insert OR EXISTS (
        SELECT FROM idempotency_keys AS known WHERE known.account_id = wanted.account_id AND known.key = wanted.key
    )
    ORDER BY account_id, key
    ON CONFLICT (account_id, key) DO UPDATE SET
        holder = EXCLUDED.holder,
        held_until = EXCLUDED.held_until,
        not_found = ARRAY(SELECT unnest(stored.not_found) INTERSECT SELECT unnest(EXCLUDED.not_found))
    WHERE stored.answer IS NULL AND stored.held_until < now() AND stored.body_sha256 = EXCLUDED.body_sha256
    RETURNING holder, first_id, not_found
"""

FIND_KEYS = """
    SELECT wanted.holder, stored.body_sha256 = wanted.body_sha256 AS is_same_body, answer, first_id
    FROM unnest($1::bigint[], $2::text[], $3::bytea[], $4::bigint[])
        AS wanted (account_id, key, body_sha256, holder)
    JOIN idempotency_keys AS stored USING (account_id, key)
"""

# A row without an answer is kept for a later run with the same ids, or forgotten. Only the run that holds a row changes
# it: a late run must not touch the row of the next one.
SETTLE_KEYS = """
    WITH ended AS (
        SELECT stored.account_id, stored.key, run.answer, run.is_forgotten
        FROM unnest($1::bigint[], $2::text[], $3::bigint[], $4::bytea[], $5::boolean[])
            AS run (account_id, key, holder, answer, is_forgotten)
        JOIN idempotency_keys AS stored USING (account_id, key, holder)
        ORDER BY stored.account_id, stored.key
        FOR UPDATE OF stored
    ), forgotten AS (
        DELETE FROM idempotency_keys AS stored USING ended
        WHERE ended.is_forgotten AND stored.account_id = ended.account_id AND stored.key = ended.key
    )
    UPDATE idempotency_keys AS stored SET answer = ended.answer, held_until = '-infinity'
    FROM ended
    WHERE NOT ended.is_forgotten AND stored.account_id = ended.account_id AND stored.key = ended.key
"""

MAX_RUNS = 128  # per statement of holds or settles: when it returns, all its requests go on at once
ANSWER_UNIT = 4096  # bytes: an answer counts as one key more for each
SAMPLE_BYTES = 80 * 1024 * 1024  # of the table: about 300,000 rows. A smaller table is counted completely
_share = f"least(1.0, {SAMPLE_BYTES}.0 / greatest(1, pg_relation_size('idempotency_keys')))"
# Neither column is read from TOAST: pg_column_size() takes the size from the row.
COUNT_KEYS = f"""
    SELECT account_id, (sum(
        1 + (coalesce(pg_column_size(answer), 0) + pg_column_size(not_found)) / {ANSWER_UNIT}
    ) / {_share})::bigint AS keys
    FROM idempotency_keys TABLESAMPLE SYSTEM (100 * {_share})
    GROUP BY account_id
"""  # noqa: S608 - constants of this module

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
    lists: Mapping[str, int]  # list number → list id: its active lists among those that were asked for


class Hold(NamedTuple):
    """A run that wants to hold its Idempotency-Key."""

    account_id: int
    key: str
    body_sha256: bytes
    first_position: int  # of the first message id, should this be the first run
    holder: int  # unique for each run
    hold_s: float
    not_found: Sequence[str]  # list numbers
    may_insert: bool  # False: hold only a key that has a row already


class HeldKey(NamedTuple):
    """An Idempotency-Key that this run holds."""

    first_position: int  # of the first message id of the first run
    not_found: Sequence[str]  # list numbers that no run has found


class KnownKey(NamedTuple):
    """An Idempotency-Key that this run cannot hold."""

    is_same_body: bool
    answer: bytes | None  # None: another run holds the key
    first_position: int  # of the first message id of the first run


class EndedRun(NamedTuple):
    """A run that held its Idempotency-Key, and what becomes of the row."""

    account_id: int
    key: str
    holder: int
    answer: bytes | None  # to be stored for requests that repeat the key; None: another run may hold the key
    is_forgotten: bool  # True: the row is deleted, as if the key had never been sent


def _account_of(found: tuple[int, bool, dict[str, int]] | None, numbers: Sequence[str]) -> Account | None:
    if found is None:
        return None
    account_id, is_active, lists = found
    return Account(account_id, is_active, {number: lists[number] for number in numbers if number in lists})


class Queries:
    """The queries of a request, on one pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._accounts = Coalescer(self._fetch_accounts)
        self._accounts_and_lists = Coalescer(
            self._fetch_accounts_and_lists, weigh=lambda wanted: len(wanted[1]), owner_of=lambda wanted: wanted[0]
        )
        self._lists = Coalescer(
            self._fetch_lists, weigh=lambda wanted: len(wanted[1]), owner_of=lambda wanted: wanted[0]
        )
        # Writes wait for disks, and perhaps for a standby: more at once would take all connections from reads.
        self._holds = Coalescer(
            self._hold_keys,
            weigh=lambda hold: 1 + len(hold.not_found),
            owner_of=lambda hold: hold.account_id,
            max_weight=MAX_RUNS,
        )
        self._ends = Coalescer(
            self._settle_keys,
            weigh=lambda run: 1 + len(run.answer or b"") // ANSWER_UNIT,
            owner_of=lambda run: run.account_id,
            max_weight=MAX_RUNS,
            max_queries=1,
        )

    async def find_account(self, key_sha256: bytes, numbers: Sequence[str] = ()) -> Account | None:
        """Return the account of a key, with those of its active lists that have one of these numbers, in one query.

        Returns None for an unknown, revoked or expired key.
        """
        if numbers:
            return await self._accounts_and_lists.get((key_sha256, numbers))
        return await self._accounts.get(key_sha256)

    async def resolve_lists(self, account_id: int, numbers: list[str]) -> dict[str, int]:
        """Return list ids by number, for the `numbers` that are active lists of this account."""
        return await self._lists.get((account_id, numbers)) if numbers else {}

    async def _fetch_accounts(self, keys: Sequence[bytes]) -> list[Account | None]:
        async with self._pool.connection() as connection:
            rows = await connection.fetch(FIND_ACCOUNTS_BY_KEY, keys)
        accounts = {sha256: Account(account_id, is_active, {}) for sha256, account_id, is_active in rows}
        return [accounts.get(key) for key in keys]

    async def _fetch_accounts_and_lists(self, wanted: Sequence[tuple[bytes, Sequence[str]]]) -> list[Account | None]:
        # Concurrent requests of one caller often ask for the same list.
        pairs = {(key, number) for key, numbers in wanted for number in numbers}
        async with self._pool.connection() as connection:
            rows = await connection.fetch(FIND_ACCOUNTS_AND_LISTS, *map(list, zip(*pairs, strict=True)))
        found: dict[bytes, tuple[int, bool, dict[str, int]]] = {}
        for key, account_id, is_active, number, list_id in rows:
            _, _, lists = found.setdefault(key, (account_id, is_active, {}))
            if list_id is not None:
                lists[number] = list_id
        return [_account_of(found.get(key), numbers) for key, numbers in wanted]

    async def _fetch_lists(self, wanted: Sequence[tuple[int, list[str]]]) -> list[dict[str, int]]:
        pairs = [(account_id, number) for account_id, numbers in wanted for number in numbers]
        async with self._pool.connection() as connection:
            rows = await connection.fetch(RESOLVE_LISTS, *map(list, zip(*pairs, strict=True)))
        list_ids = {(account_id, number): list_id for account_id, number, list_id in rows}
        return [
            {number: list_ids[account_id, number] for number in numbers if (account_id, number) in list_ids}
            for account_id, numbers in wanted
        ]

    async def hold_key(self, hold: Hold) -> HeldKey | KnownKey | None:
        """Hold an Idempotency-Key. Returns KnownKey if another run holds it, or has ended.

        Returns None if the key has no row, and the hold may not insert one; rarely, if the row has just been removed.
        """
        return await self._holds.get(hold)

    async def _hold_keys(self, holds: Sequence[Hold]) -> list[HeldKey | KnownKey | None]:
        # Of several runs with one key the first in line takes part: a statement cannot touch a row twice.
        first = {(hold.account_id, hold.key): hold for hold in reversed(holds)}.values()
        *columns, not_found, may_insert = map(list, zip(*first, strict=True))
        async with self._pool.connection() as connection:
            rows = await connection.fetch(HOLD_KEYS, *columns, list(map(",".join, not_found)), may_insert)
            found: dict[int, HeldKey | KnownKey] = {holder: HeldKey(*row) for holder, *row in rows}
            others = [hold for hold in holds if hold.holder not in found]
            if others:
                accounts, keys, bodies, _, holders, *_ = map(list, zip(*others, strict=True))
                rows = await connection.fetch(FIND_KEYS, accounts, keys, bodies, holders)
                found.update({holder: KnownKey(*row) for holder, *row in rows})
        return [found.get(hold.holder) for hold in holds]

    async def settle_key(self, run: EndedRun) -> None:
        """Store the answer of a run, or release or forget its row, unless another run has taken it."""
        await self._ends.get(run)

    async def _settle_keys(self, runs: Sequence[EndedRun]) -> list[None]:
        async with self._pool.connection() as connection:
            await connection.execute(SETTLE_KEYS, *map(list, zip(*runs, strict=True)))
        return [None] * len(runs)

    async def sweep_keys(self) -> bool:
        """Delete up to SWEEP_LIMIT keys older than 24 hours. Returns True when more may be left."""
        async with self._pool.connection() as connection:
            status: str = await connection.execute(SWEEP_KEYS)
        return status == f"DELETE {SWEEP_LIMIT}"

    async def count_keys(self) -> dict[int, int]:
        """Return about how many keys each account has stored; a long answer counts as several."""
        async with self._pool.connection() as connection:
            return dict(await connection.fetch(COUNT_KEYS))

    async def note_key_use(self, keys: Sequence[bytes]) -> None:
        """Write today as the last day of use of these keys, by their digests."""
        async with self._pool.connection() as connection:
            await connection.execute(NOTE_KEY_USE, keys)

    async def count_expiring_keys(self) -> int:
        """Return how many usable keys of all accounts expire soon and have no successor (COUNT_EXPIRING_KEYS)."""
        async with self._pool.connection() as connection:
            keys: int = await connection.fetchval(COUNT_EXPIRING_KEYS)
        return keys

    async def check_rights(self) -> None:
        """Raise DatabaseUnavailable if the role lacks a right that requests need; Pool.last_failure names it."""
        async with self._pool.connection() as connection:
            await check_rights(connection, RIGHTS_OF_REQUESTS)

    async def lease_message_ids(self) -> int:
        """Return the number of a new lease of message ids, unique for ever."""
        async with self._pool.connection() as connection:
            lease: int = await connection.fetchval(LEASE_MESSAGE_IDS)
        return lease
