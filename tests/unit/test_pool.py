"""Outages of the database, their log lines, and the connection that is kept when several hosts answer."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import asyncpg
import pytest

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.postgres.pool import Pool, connect_to_primary, reason
from tests.support.eventually import eventually

OF_TWO_HOSTS = "postgres://one,two/name?sslmode=disable"


def failing(error: Exception) -> Pool:
    """Return a pool whose first query fails with this error."""
    pool = Pool(Settings(database_url=OF_TWO_HOSTS, amqp_url="amqp://unused"))
    pool._pool = AsyncMock()
    pool._pool.acquire.side_effect = [error, AsyncMock(), AsyncMock()]
    return pool


@pytest.mark.parametrize(
    ("error", "is_outage"),
    [
        (ConnectionRefusedError("refused"), True),
        (TimeoutError(), True),
        (asyncpg.CannotConnectNowError("the database system is starting up"), True),
        (asyncpg.TargetServerAttributeNotMatched("no primary"), True),
        (asyncpg.ConnectionDoesNotExistError("closed in the middle of operation"), False),
        (asyncpg.InterfaceError("closed"), False),
        (asyncpg.DivisionByZeroError("division by zero"), False),
    ],
)
async def test_an_outage_is_a_server_that_does_not_answer(error: Exception, *, is_outage: bool) -> None:
    pool = failing(error)
    with pytest.raises(DatabaseUnavailable):
        async with pool.connection():
            pass
    assert (pool.failures, pool.is_up) == (1, not is_outage)
    await eventually(lambda: pool.is_up, timeout=5.0)
    async with pool.connection():
        pass
    assert pool.failures == 1


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (asyncpg.DataError("invalid input for query argument $1: 'secret'"), "DataError"),
        (ValueError("secret"), "ValueError"),
        (
            asyncpg.PostgresError.new({"C": "23505", "M": "duplicate key", "D": "Key (key)=(secret) already exists."}),
            "UniqueViolationError duplicate key",
        ),
        (ConnectionRefusedError(111, "Connect call failed"), "ConnectionRefusedError [Errno 111] Connect call failed"),
        (
            asyncpg.UndefinedTableError('relation "accounts" does not exist'),
            'UndefinedTableError relation "accounts" does not exist. Run `python -m gateway migrate`',
        ),
    ],
)
def test_the_reason_quotes_no_data(error: Exception, says: str) -> None:
    assert reason(error) == says


async def test_of_two_primaries_that_answer_at_once_one_connection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mock] = []

    async def connect(_url: str, **options: Any) -> Mock:
        assert options["target_session_attrs"] == "primary"
        await asyncio.sleep(0)
        made.append(Mock())
        return made[-1]

    monkeypatch.setattr(asyncpg, "connect", connect)
    kept = await connect_to_primary(OF_TWO_HOSTS)
    await asyncio.sleep(0)
    assert len(made) == 2
    assert [one.terminate.called for one in made] == [one is not kept for one in made]


async def test_an_attempt_that_hangs_ends_with_the_first_that_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    async def connect(url: str, **_options: Any) -> Mock:
        if "two" in url:
            await asyncio.Event().wait()
        return Mock()

    monkeypatch.setattr(asyncpg, "connect", connect)
    await connect_to_primary(OF_TWO_HOSTS)
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()}, timeout=5.0)
