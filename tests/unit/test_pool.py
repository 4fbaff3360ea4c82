"""Outages of the database, their log lines, and the connection that is kept when several hosts answer."""

import asyncio
from typing import Any
from unittest.mock import AsyncMock, Mock

import asyncpg
import pytest

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.postgres.pool import MORE_RIGHTS, Pool, connect_to_primary, reason
from tests.support.eventually import eventually

OF_TWO_HOSTS = "postgres://u@one,two/name?sslmode=disable"


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
        (
            asyncpg.InsufficientPrivilegeError("permission denied for table api_keys"),
            f"InsufficientPrivilegeError permission denied for table api_keys. {MORE_RIGHTS}",
        ),
    ],
)
def test_the_reason_quotes_no_data(error: Exception, says: str) -> None:
    assert reason(error) == says


async def test_when_no_host_is_a_primary_the_reason_names_each_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is that of the host that should be the primary, not of the standby."""
    errors = {
        "one": asyncpg.InvalidPasswordError("password authentication failed"),
        "two": asyncpg.TargetServerAttributeNotMatched("none of the hosts match"),
    }

    async def connect(host: str, **_options: Any) -> Mock:
        raise errors[host]

    monkeypatch.setattr(asyncpg, "connect", connect)
    with pytest.raises(asyncpg.InvalidPasswordError) as raised:
        await connect_to_primary(OF_TWO_HOSTS)
    assert "one:5432: InvalidPasswordError password authentication failed" in reason(raised.value)
    assert "two:5432: TargetServerAttributeNotMatched none of the hosts match" in reason(raised.value)


@pytest.mark.parametrize("error", [KeyError("secret"), UnicodeError("secret"), AssertionError("secret"), Exception()])
async def test_any_error_of_a_connect_is_an_outage_and_its_text_is_not_shown(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asyncpg, "connect", AsyncMock(side_effect=error))
    pool = Pool(Settings(database_url=OF_TWO_HOSTS, amqp_url="amqp://unused"))
    await pool.open()
    with pytest.raises(DatabaseUnavailable) as raised:
        async with pool.connection():
            pass
    assert not pool.is_up
    assert raised.value.__cause__ is not None
    said = reason(raised.value.__cause__)
    assert f"one:5432: ConnectionError cannot connect: {type(error).__name__}" in said
    assert "secret" not in said
    await pool.close()


async def test_of_two_primaries_that_answer_at_once_one_connection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Mock] = []

    async def connect(**options: Any) -> Mock:
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
    async def connect(host: str, **_options: Any) -> Mock:
        if host == "two":
            await asyncio.Event().wait()
        return Mock()

    monkeypatch.setattr(asyncpg, "connect", connect)
    await connect_to_primary(OF_TWO_HOSTS)
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()}, timeout=5.0)
