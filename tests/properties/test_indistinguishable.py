"""A refused list or key is refused the same way for every reason: same answer, same work. Promise 6.

The work is counted at the database: bytes asked, bytes answered, statements, and the query plan. The plans are those
of a database with many accounts, where they could differ.
"""

import json
import re
import uuid
from collections.abc import AsyncIterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from gateway.cli.admin import Admin
from gateway.ingest.auth import hash_key
from gateway.postgres.queries import FIND_ACCOUNTS_AND_LISTS, FIND_ACCOUNTS_BY_KEY, RESOLVE_LISTS
from testbed import Servers
from tests.support.callers import make_caller, new_number
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.raw_http import exchange
from tests.support.tcp_proxy import TcpProxy

UNKNOWN_KEY = "trk_" + "0" * 32
_literal = re.compile(r"'\{[^']*\}'")  # a parameter's value, as plans show it
_date = re.compile(rb"\r\nDate: [^\r]*")


@pytest.fixture
async def database(servers: Servers) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(servers.database_url)
    yield connection
    await connection.close()


async def refused_lists(gateway: GatewayUnderTest, admin: Admin) -> dict[str, str]:
    """Create numbers that `gateway`'s account cannot send from, each for another reason, all of the same length."""
    other, suspended = await make_caller(admin, "other"), await make_caller(admin, "suspended")
    numbers = {name: new_number() for name in ("absent", "inactive", "foreign, inactive")}
    numbers |= {"foreign": other.list_number, "foreign, suspended": suspended.list_number}
    mine = await admin.add_list(gateway.caller.account_id, numbers["inactive"])
    await admin.set_list_status(mine["id"], "inactive")
    theirs = await admin.add_list(other.account_id, numbers["foreign, inactive"])
    await admin.set_list_status(theirs["id"], "inactive")
    await admin.set_account_status(suspended.account_id, "suspended")
    moved = await admin.add_list(gateway.caller.account_id, number := new_number())
    await admin.set_list_status(moved["id"], "inactive")
    await admin.add_list(other.account_id, number)
    return numbers | {"moved to another": number}


async def refused_keys(gateway: GatewayUnderTest, admin: Admin) -> dict[str, str]:
    """Create keys of the right form that are not valid."""
    revoked = await admin.create_key(gateway.caller.account_id)
    await admin.revoke_key(revoked["id"])
    expired = await admin.create_key(gateway.caller.account_id)
    await admin._connection.execute(
        "UPDATE api_keys SET expires_at = now() - interval '1 day' WHERE id = $1", expired["id"]
    )
    suspended = await make_caller(admin, "suspended")
    await admin.set_account_status(suspended.account_id, "suspended")
    await admin.revoke_key(suspended.key_id)
    keys = {"unknown": UNKNOWN_KEY, "revoked": revoked["key"], "expired": expired["key"]}
    return keys | {"revoked, of a suspended account": suspended.key}


async def ask(gateway: GatewayUnderTest, messages: list[Any], *lines: bytes, key: str | None = None) -> bytes:
    """Return the whole answer to a request, byte for byte, without its date."""
    body = msgspec.json.encode({"messages": messages})
    keys = (
        []
        if any(line.startswith(b"X-Api-Key") for line in lines)
        else [f"X-Api-Key: {key or gateway.caller.key}".encode()]
    )
    head = [b"Content-Length: %d" % len(body), b"X-Request-Id: the-same-for-all", *keys, *lines]
    answer = await exchange(gateway.url, headers=head, body=body)
    return _date.sub(b"", answer.raw)


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "with an Idempotency-Key"])
async def test_an_absent_a_foreign_and_an_inactive_list_get_the_same_bytes(
    gateway: GatewayUnderTest, admin: Admin, *, keyed: bool
) -> None:
    answers = {}
    for reason, number in (await refused_lists(gateway, admin)).items():
        lines = [b"Idempotency-Key: " + uuid.uuid4().hex.encode()] if keyed else []
        answers[reason] = await ask(gateway, [gateway.message(), gateway.message(list_number=number)], *lines)
    assert len(set(answers.values())) == 1, answers
    assert b'"code":"list_not_found"' in answers["absent"]


async def test_an_unknown_a_revoked_and_a_malformed_key_get_the_same_bytes(
    gateway: GatewayUnderTest, admin: Admin
) -> None:
    lines: dict[str, list[bytes]] = {
        reason: [f"X-Api-Key: {key}".encode()] for reason, key in (await refused_keys(gateway, admin)).items()
    }
    good = gateway.caller.key.encode()
    lines |= {
        "too short": [b"X-Api-Key: " + good[:-1]],
        "too long": [b"X-Api-Key: " + good + b"0"],
        "other prefix": [b"X-Api-Key: sk_" + good[4:]],
        "last character wrong": [b"X-Api-Key: " + good[:-1] + (b"a" if good[-1:] != b"a" else b"b")],
        "bytes over 127": [b"X-Api-Key: \xff\xfe\xe9"],
        "twice": [b"X-Api-Key: " + good] * 2,
        "7 kB": [b"X-Api-Key: " + good * 200],
        "SQL": [b"X-Api-Key: ' OR '1'='1"],
    }
    answers = {reason: await ask(gateway, [gateway.message()], *line) for reason, line in lines.items()}
    assert len(set(answers.values())) == 1, answers
    assert b'{"error":"Invalid API key","code":"invalid_api_key"}' in answers["unknown"]


class Work(NamedTuple):
    """The cost of a request at the database."""

    bytes_asked: int
    bytes_answered: int
    statements: int | None  # by the server's own log, where it is ours to read


class Watched(NamedTuple):
    """A gateway with one connection to the database, through a proxy that counts bytes."""

    gateway: GatewayUnderTest
    proxy: TcpProxy
    servers: Servers

    async def work_of(self, *lines: bytes, key: str | None = None, number: str | None = None) -> Work:
        message = self.gateway.message(**({"list_number": number} if number else {}))
        asked, answered, statements = self.proxy.bytes_to_server, self.proxy.bytes_to_client, self._statements()
        await ask(self.gateway, [message], *lines, key=key)
        return Work(
            self.proxy.bytes_to_server - asked,
            self.proxy.bytes_to_client - answered,
            None if statements is None else (self._statements() or 0) - statements,
        )

    def _statements(self) -> int | None:
        postgres = self.servers.postgres
        return None if postgres is None else postgres.log.read_text().count(" LOG:  execute ")


@pytest.fixture
async def watched(servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings) -> AsyncIterator[Watched]:
    parts = urlsplit(servers.database_url)
    async with TcpProxy(parts.hostname or "", parts.port or 5432) as proxy:
        url = parts._replace(netloc=parts.netloc.rpartition("@")[0] + f"@127.0.0.1:{proxy.port}").geturl()
        separator = "&" if parts.query else "?"
        settings = make_settings(database_url=f"{url}{separator}options=-c%20log_statement%3Dall", database_pool_size=1)
        yield Watched(await start_gateway(settings), proxy, servers)


@pytest.mark.parametrize("keyed", [False, True], ids=["plain", "with an Idempotency-Key"])
async def test_an_absent_a_foreign_and_an_inactive_list_cost_the_same_work(
    watched: Watched, admin: Admin, *, keyed: bool
) -> None:
    numbers = await refused_lists(watched.gateway, admin)
    works = {}
    for _ in range(2):  # the first time statements are prepared
        for reason, number in numbers.items():
            lines = [b"Idempotency-Key: " + uuid.uuid4().hex.encode()] if keyed else []
            works[reason] = await watched.work_of(*lines, number=number)
    assert len(set(works.values())) == 1, works
    # Key and lists at once; with an Idempotency-Key nothing to hold is found, and a row of the key is looked for.
    assert works["absent"].statements in (None, 3 if keyed else 1)


async def test_an_unknown_and_a_revoked_key_cost_the_same_work_and_a_malformed_one_none(
    watched: Watched, admin: Admin
) -> None:
    keys = await refused_keys(watched.gateway, admin)
    works = {}
    for _ in range(2):
        for reason, key in keys.items():
            works[reason] = await watched.work_of(key=key)
    assert len(set(works.values())) == 1, works
    assert works["unknown"].bytes_asked > 0
    assert works["unknown"].statements in (None, 1)
    # What form a key has is no secret: nothing is learnt from a quick answer, and the database is spared.
    assert (await watched.work_of(key="nonsense"))[:2] == (0, 0)


# Plans


@pytest.fixture
async def crowded(database: asyncpg.Connection) -> AsyncIterator[asyncpg.Connection]:
    """Add so many accounts and lists that indexes are used; roll back afterwards."""
    transaction = database.transaction()
    await transaction.start()
    await database.execute(
        """
        WITH made AS (INSERT INTO accounts (name) SELECT 'crowd' FROM generate_series(1, 2000) RETURNING id),
        lists AS (
            INSERT INTO sending_lists (account_id, number)
            SELECT id, '+99' || lpad((id * 10 + n)::text, 12, '0') FROM made, generate_series(0, 4) AS n
        )
        INSERT INTO api_keys (account_id, sha256, prefix) SELECT id, sha256(id::text::bytea), 'trk_' FROM made
        """
    )
    for table in ("accounts", "sending_lists", "api_keys"):
        await database.execute(f"ANALYZE {table}")
    yield database
    await transaction.rollback()


async def plan_of(database: asyncpg.Connection, question: str, *arguments: object) -> Any:
    """Return the plan as it was carried out, without parameters and row counts."""
    explain = "EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF, FORMAT JSON) "
    savepoint = database.transaction()
    await savepoint.start()
    try:
        [told] = json.loads(await database.fetchval(explain + question, *arguments))
    finally:
        await savepoint.rollback()
    return without_counts(told["Plan"])


def without_counts(plan: Any) -> Any:
    if isinstance(plan, list):
        return [without_counts(step) for step in plan]
    if isinstance(plan, str):
        return _literal.sub("$1", plan)
    if not isinstance(plan, dict):
        return plan
    counts = ("Actual", "Rows Removed", "Heap Fetches", "Tuples Inserted", "Conflicting Tuples")
    return {name: without_counts(value) for name, value in plan.items() if not name.startswith(counts)}


async def test_the_query_plan_for_a_list_is_the_same_in_every_state(
    gateway: GatewayUnderTest, admin: Admin, crowded: asyncpg.Connection
) -> None:
    numbers = await refused_lists(gateway, admin) | {"resolve_lists": gateway.caller.list_number}
    plans = {
        reason: await plan_of(crowded, RESOLVE_LISTS, [gateway.caller.account_id], [number])
        for reason, number in numbers.items()
    }
    assert all(plan == plans["resolve_lists"] for plan in plans.values()), plans
    assert "sending_lists" in json.dumps(plans["resolve_lists"])
    assert "Seq Scan" not in json.dumps(plans["resolve_lists"])
    key = hash_key(gateway.caller.key)
    plans = {
        reason: await plan_of(crowded, FIND_ACCOUNTS_AND_LISTS, [key], [number]) for reason, number in numbers.items()
    }
    assert all(plan == plans["resolve_lists"] for plan in plans.values()), plans
    assert "sending_lists" in json.dumps(plans["resolve_lists"])
    assert "Seq Scan" not in json.dumps(plans["resolve_lists"])


async def test_the_query_plan_for_a_refused_key_is_the_same_in_every_state(
    gateway: GatewayUnderTest, admin: Admin, crowded: asyncpg.Connection
) -> None:
    keys = await refused_keys(gateway, admin)
    for sql, more in ((FIND_ACCOUNTS_BY_KEY, []), (FIND_ACCOUNTS_AND_LISTS, [[gateway.caller.list_number]])):
        plans = {reason: await plan_of(crowded, sql, [hash_key(key)], *more) for reason, key in keys.items()}
        assert all(plan == plans["unknown"] for plan in plans.values()), plans
        assert "Seq Scan" not in json.dumps(plans["unknown"])
