"""Secrets on real servers: keys are shown once and stored as digests, and no refusal of a server is logged with one."""

import asyncio
import hashlib
import os
import signal
import uuid
from dataclasses import replace
from urllib.parse import urlsplit

import asyncpg
import msgspec
import pytest

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.postgres.pool import Pool
from testbed import Gateway, ServerError, Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, run_gateway
from tests.support.secrecy import BODY

TABLES = "SELECT quote_ident(table_name) FROM information_schema.tables WHERE table_schema = 'public'"


async def everything_in(database_url: str) -> str:
    """Return all rows of all tables as text."""
    connection = await asyncpg.connect(database_url)
    try:
        tables = [name for (name,) in await connection.fetch(TABLES)]
        assert {"accounts", "api_keys", "sending_lists", "idempotency_keys"} <= set(tables)
        rows = [await connection.fetch(f"SELECT t::text FROM {table} AS t") for table in tables]  # noqa: S608 - names
        return "\n".join(text for table in rows for (text,) in table)
    finally:
        await connection.close()


async def test_a_key_is_shown_once_and_a_copy_of_the_database_lets_nobody_send(
    servers: Servers, gateway: GatewayUnderTest
) -> None:
    arguments = ("key", "create", str(gateway.caller.account_id), "--json")
    created = await asyncio.to_thread(run_gateway, *arguments, database_url=servers.database_url)
    key = msgspec.json.decode(created.stdout)["key"]
    gateway.caller = replace(gateway.caller, key=key)
    _, answer, _ = await gateway.post(gateway.caller.body(), Idempotency_Key="kept")
    assert answer["queued_count"] == 1
    _, answer, _ = await gateway.post(gateway.caller.body(to="junk"), Idempotency_Key="refused")
    assert answer["error_count"] == 1

    copy = await everything_in(servers.database_url)
    assert hashlib.sha256(key.encode()).hexdigest() in copy
    for part in (key, key[4:], key[8:], key.encode().hex(), key[8:].encode().hex()):
        assert part not in copy
    for text in (BODY, BODY.encode().hex()):
        assert text not in copy, "no text is kept, with an Idempotency-Key neither"


async def test_values_quoted_by_postgresql_stay_out_of_the_log(
    servers: Servers, caplog: pytest.LogCaptureFixture
) -> None:
    pool = Pool(Settings(database_url=servers.database_url, amqp_url="amqp://unused"))
    await pool.open()
    try:
        for statement, argument, told in (
            # "Key (account_id)=(987654321) is not present in table": a detail
            ("INSERT INTO api_keys (account_id, sha256, prefix) VALUES ($1, sha256(''), '')", 987654321, "foreign key"),
            # "invalid input for query argument $1: 'text of 987654321'": asyncpg's own words
            ("SELECT $1::bigint", "text of 987654321", "DataError"),
            # "Failing row contains (5, text of 987654321, …)"
            ("INSERT INTO accounts (name, status) VALUES ($1, 'odd')", "text of 987654321", "check constraint"),
        ):
            caplog.clear()
            with pytest.raises(DatabaseUnavailable):
                async with pool.connection() as connection:
                    await connection.execute(statement, argument)
            assert told in caplog.text
            assert "987654321" not in caplog.text
    finally:
        await pool.close()


async def test_a_password_that_a_server_refuses_is_not_logged(servers: Servers) -> None:
    """The log is at DEBUG, and the password stands in every part of the URL that can hold it."""
    wrong = f"wrong{uuid.uuid4().hex}"
    parts = urlsplit(servers.amqp_url.split(",")[0])
    host = parts.netloc.rpartition("@")[2]
    process = Gateway(
        {
            "GATEWAY_AMQP_URL": parts._replace(netloc=f"{parts.username}:{wrong}@{host}").geturl(),
            "GATEWAY_DATABASE_URL": f"postgres://postgres:{wrong}@127.0.0.1:1/gateway?sslmode=disable&options={wrong}",
            "GATEWAY_LOG_LEVEL": "DEBUG",
            "GATEWAY_DRAIN_DELAY_S": "0",
        }
    )
    start = asyncio.create_task(asyncio.to_thread(process.start))
    try:
        await eventually(lambda: process.is_running and "cannot connect to the broker" in process.log.read_text())
        await eventually(lambda: "the database is unavailable" in process.log.read_text())
        log = process.log.read_text()
        assert '"settings":{"database_url":"postgres://postgres:***@127.0.0.1:1/gateway"' in log
        assert "ACCESS_REFUSED" in log
        assert wrong not in log
        for pid in process.processes:
            os.kill(pid, signal.SIGTERM)
        with pytest.raises(ServerError):  # it ended without ever having been ready
            await start
    finally:
        await asyncio.wait([start])
        await asyncio.to_thread(process.close)
