"""Two versions on one database and broker, and migrations under load: no request fails, nothing is lost or doubled.

The older version is a commit of this repository. At a release, PREVIOUS becomes its commit. This test does not show
upgrades over several versions, nor locks that a large table would hold for long.
"""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import aiohttp
import asyncpg
import pytest

from gateway.ingest.auth import hash_key
from testbed import Gateway, Postgres, Servers
from tests.support.callers import Caller, Client, new_number
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway, new_name, process_environment, run_gateway
from tests.support.outbound_queue import OutboundQueue

ROOT = Path(__file__).parents[2]
PREVIOUS = {
    "before a migration": "9b5a25a0b2aedba4923801563c66d534e830e412",  # it knows no idempotency_keys
    "0.1.0": "08eed40b7d1e55f551c8d0cf80251efa5b1a8114",
}
BATCH = 5  # small, and paced: they are read back one by one
PAUSE_S = 0.02

# What an older version that still runs may stand on, or wait for. A migration that contracts says so, and names the
# version from which on nobody uses what it takes away.
CONTRACTS = re.compile(
    r"\bDROP\b|\bRENAME\b|\bSET NOT NULL\b|\bALTER COLUMN \w+ (SET DATA )?TYPE\b|\bTRUNCATE\b|\bLOCK TABLE\b",
    re.IGNORECASE,
)
IS_DECLARED = re.compile(r"^-- contract: \d+\.\d+\.\d+", re.MULTILINE)


@pytest.fixture(scope="module", params=PREVIOUS)
def previous(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Extract the source tree of a previous version."""
    commit = PREVIOUS[request.param]
    found = subprocess.run(["git", "cat-file", "-e", commit], cwd=ROOT, capture_output=True, check=False)  # noqa: S603, S607
    if found.returncode:
        pytest.skip("this checkout has no history back to the previous version (a shallow clone?)")
    directory = tmp_path_factory.mktemp("previous")
    archive = directory / "source.tar"
    command = ["git", "archive", f"--output={archive}", commit, "gateway", "migrations"]
    subprocess.run(command, cwd=ROOT, check=True)  # noqa: S603
    subprocess.run(["tar", "-xf", archive], cwd=directory, check=True)  # noqa: S603, S607
    return directory


async def migrated_by(previous: Path, postgres: Postgres, name: str) -> str:
    """Create a database with the schema of an older version. Return its URL."""
    database_url = await asyncio.to_thread(postgres.create_database, name)
    migrated = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "gateway", "migrate"),
        cwd=previous,
        env={"PATH": "/usr/bin:/bin", "GATEWAY_DATABASE_URL": database_url},
        stdout=asyncio.subprocess.DEVNULL,
    )
    assert await migrated.wait() == 0
    return database_url


async def make_caller_of_old(database_url: str) -> Caller:
    """Create an account, a key and a list in any schema: the commands of this version need their own."""
    key, number = f"trk_{'k' * 32}", new_number()
    connection = await asyncpg.connect(database_url)
    account_id = await connection.fetchval("INSERT INTO accounts (name) VALUES ('between') RETURNING id")
    insert_key = "INSERT INTO api_keys (account_id, sha256, prefix) VALUES ($1, $2, 'trk_kkkk')"
    await connection.execute(insert_key, account_id, hash_key(key))
    await connection.execute("INSERT INTO sending_lists (account_id, number) VALUES ($1, $2)", account_id, number)
    await connection.close()
    return Caller(account_id, key=key, list_number=number)


async def test_old_and_new_serve_side_by_side_while_the_schema_moves(servers: Servers, previous: Path) -> None:
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make a database in")
    name = new_name()
    database_url = await migrated_by(previous, servers.postgres, name)
    caller = await make_caller_of_old(database_url)
    settings = process_environment(
        servers, GATEWAY_DATABASE_URL=database_url, GATEWAY_AMQP_EXCHANGE=name, GATEWAY_AMQP_QUEUE=name
    )
    old, new = Gateway(settings | {"PYTHONPATH": str(previous)}), Gateway(settings)
    serving = [old]
    answered = {old: 0, new: 0}
    failures: list[object] = []
    stop = asyncio.Event()

    async def send(session: aiohttp.ClientSession, gateway: Gateway, **headers: str) -> None:
        status, answer, _ = await Client(gateway.url, session, caller).post(caller.body(BATCH), **headers)
        if status != 200 or answer["queued_count"] != BATCH:
            failures.append(answer)
        answered[gateway] += 1

    async def keep_sending(session: aiohttp.ClientSession, first: int) -> None:
        turn = first
        while not stop.is_set():
            await send(session, serving[turn % len(serving)])
            turn += 1
            await asyncio.sleep(PAUSE_S)

    async def more_answers(*gateways: Gateway) -> None:
        wanted = {gateway: answered[gateway] + 20 for gateway in gateways}
        await eventually(lambda: all(answered[gateway] >= count for gateway, count in wanted.items()))

    try:
        await asyncio.to_thread(old.start)
        async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as callers:
            for first in range(4):
                callers.create_task(keep_sending(session, first))
            await more_answers(old)
            completed = await asyncio.to_thread(run_gateway, "migrate", database_url=database_url)
            assert completed.returncode == 0, completed.stderr
            await more_answers(old)  # the old version, on the new schema
            await asyncio.to_thread(new.start)
            serving.append(new)
            await more_answers(old, new)
            await send(session, new, Idempotency_Key="a-key")  # what only the new one knows
            serving.remove(old)
            await more_answers(new)
            await asyncio.to_thread(old.stop)
            await asyncio.to_thread(old.start)  # and back again: a rollback, without one of the schema
            serving[:] = [old]
            await more_answers(old)
            stop.set()
    finally:
        await asyncio.to_thread(old.close)
        await asyncio.to_thread(new.close)
    assert failures == []
    async with OutboundQueue(servers.amqp_url, name) as queue:
        messages = await queue.take_all()
        await queue.delete()
    assert len(messages) == BATCH * sum(answered.values())
    assert len({message.message_id for message in messages}) == len(messages)
    assert {message.type for message in messages} == {"sms.v1"}
    connection = await asyncpg.connect(database_url)
    assert await connection.fetchval("SELECT count(*) FROM idempotency_keys") == 1
    await connection.close()
    await asyncio.to_thread(servers.postgres.drop_database, name)


async def test_a_version_that_is_newer_than_the_schema_becomes_ready_with_its_migration(
    servers: Servers, previous: Path, start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """It would answer every request with 503: a rolling update would replace all good processes by it."""
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make a database in")
    name = new_name()
    database_url = await migrated_by(previous, servers.postgres, name)
    gateway = await start_gateway(make_settings(database_url=database_url), wait_until_ready=False)
    pool = gateway.runtime.pool
    await eventually(lambda: pool.failures >= 3)
    async with gateway.session.get(gateway.ops_url + "/readyz") as response:
        assert response.status == 503
        (reason,) = (await response.json())["reasons"]
        assert reason.startswith("the database is not migrated: ")
        assert reason.endswith("Run `python -m gateway migrate`")
    completed = await asyncio.to_thread(run_gateway, "migrate", database_url=database_url)
    assert completed.returncode == 0, completed.stderr
    await gateway.wait_until_ready()
    await pool.close()
    await asyncio.to_thread(servers.postgres.drop_database, name)


@pytest.mark.parametrize("migration", sorted(path.name for path in (ROOT / "migrations").glob("*.sql")))
def test_a_migration_expands_or_says_from_which_version_on_it_contracts(migration: str) -> None:
    up = (ROOT / "migrations" / migration).read_text().partition("-- migrate:down")[0]
    statements = re.sub(r"--.*", "", up)
    assert not CONTRACTS.search(statements) or IS_DECLARED.search(up)
