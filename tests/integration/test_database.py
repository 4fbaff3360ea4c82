"""The pool finds the primary among hosts, and does not wait for a database that is known to be down."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import asyncpg
import pytest

from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.postgres.pool import Pool, connect_to_primary, find_primary
from gateway.urls import Address, Database
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import run_gateway
from tests.support.tcp_proxy import TcpProxy


def through(url: str, *ports: int) -> str:
    """Return the URL with these ports of 127.0.0.1 as its hosts."""
    parts = urlsplit(url)
    hosts = ",".join(f"127.0.0.1:{port}" for port in ports)
    return parts._replace(netloc=parts.netloc.rpartition("@")[0] + "@" + hosts).geturl()


def proxy_to(servers: Servers) -> TcpProxy:
    parts = urlsplit(servers.database_url)
    return TcpProxy(parts.hostname or "", parts.port or 5432)


@asynccontextmanager
async def opened(url: str, **changes: float) -> AsyncIterator[Pool]:
    pool = Pool(Settings(database_url=url, amqp_url="amqp://unused", **changes))  # type: ignore[arg-type]
    await pool.open()
    try:
        yield pool
    finally:
        await pool.close()


async def ask(pool: Pool) -> int:
    async with pool.connection() as connection:
        answer: int = await connection.fetchval("SELECT 1")
    return answer


def test_dbmate_gets_a_url_of_one_host() -> None:
    database = Database.of("postgres://me:p%40ss@one:1,two,[::1]:3/name?sslmode=disable&target_session_attrs=primary")
    assert [database.url(address) for address in database.hosts] == [
        "postgres://me:p%40ss@one:1/name?sslmode=disable",
        "postgres://me:p%40ss@two:5432/name?sslmode=disable",
        "postgres://me:p%40ss@[::1]:3/name?sslmode=disable",
    ]
    of_a_socket = Database.of("postgres://me@/name?host=/run/pg&port=5433&connect_timeout=3")
    assert of_a_socket.hosts == [Address("/run/pg", 5433)]
    assert of_a_socket.url(of_a_socket.hosts[0]) == (
        "postgres://me@/name?connect_timeout=3&sslmode=disable&host=%2Frun%2Fpg&port=5433"
    )


@pytest.mark.parametrize("fault", ["hangs", "refuses"])
async def test_a_host_that_hangs_or_refuses_does_not_hide_the_next(servers: Servers, fault: str) -> None:
    async with proxy_to(servers) as bad:
        if fault == "hangs":
            bad.black_hole()
        else:
            bad.refuse()
        url = through(servers.database_url, bad.port, urlsplit(servers.database_url).port or 5432)
        async with opened(url, database_timeout_s=5.0) as database:
            assert await ask(database) == 1
            assert database.is_up


async def test_when_two_hosts_answer_one_connection_is_kept(servers: Servers) -> None:
    async with proxy_to(servers) as one, proxy_to(servers) as other:
        connection = await connect_to_primary(through(servers.database_url, one.port, other.port))
        assert await connection.fetchval("SELECT 1") == 1
        await connection.close()
        await eventually(lambda: not one._links and not other._links)


async def test_when_no_host_accepts_the_last_reason_is_raised(servers: Servers) -> None:
    async with proxy_to(servers) as one:
        url = through(servers.database_url, one.port) + "&application_name=x"
        with pytest.raises(asyncpg.InvalidCatalogNameError):
            await connect_to_primary(url.replace("/gateway?", "/nosuchdatabase?"))


async def test_during_an_outage_queries_fail_at_once_and_afterwards_succeed(servers: Servers) -> None:
    async with (
        proxy_to(servers) as proxy,
        opened(through(servers.database_url, proxy.port), database_timeout_s=1.0) as db,
    ):
        assert await ask(db) == 1
        proxy.black_hole()
        with pytest.raises(DatabaseUnavailable):
            await ask(db)
        assert not db.is_up
        started = time.monotonic()
        for _ in range(100):
            with pytest.raises(DatabaseUnavailable):
                await ask(db)
        assert time.monotonic() - started < 0.9, "a hundred waits in vain would take a hundred timeouts"
        proxy.pass_through()
        await eventually(lambda: db.is_up)
        assert await ask(db) == 1


async def test_after_an_outage_no_connection_from_before_is_used(servers: Servers) -> None:
    """Another host may be the primary now."""

    async def backend(db: Pool) -> int:
        async with db.connection() as connection:
            pid: int = await connection.fetchval("SELECT pg_backend_pid() FROM pg_sleep(0.1)")
        return pid

    async with (
        proxy_to(servers) as proxy,
        opened(through(servers.database_url, proxy.port), database_timeout_s=1.0) as db,
    ):
        before = set(await asyncio.gather(*(backend(db) for _ in range(3))))
        proxy.black_hole()
        with pytest.raises(DatabaseUnavailable):
            await ask(db)
        proxy.pass_through()
        await eventually(lambda: db.is_up)
        assert before.isdisjoint(await asyncio.gather(*(backend(db) for _ in range(3))))


async def test_a_connection_is_lent_for_one_timeout_and_a_cancelled_query_does_not_wait_for_the_server(
    servers: Servers,
) -> None:
    async with (
        proxy_to(servers) as proxy,
        opened(through(servers.database_url, proxy.port), database_timeout_s=1.0) as db,
    ):
        async with asyncio.timeout(5.0):
            with pytest.raises(DatabaseUnavailable):
                async with db.connection():
                    await asyncio.sleep(60)
        await eventually(lambda: db.is_up)
        assert await ask(db) == 1
        query = asyncio.create_task(ask(db))
        proxy.black_hole()
        await asyncio.sleep(0.05)
        query.cancel()
        await asyncio.wait([query], timeout=0.5)
        assert query.cancelled()


async def test_one_lost_connection_is_no_outage(servers: Servers) -> None:
    async with proxy_to(servers) as proxy, opened(through(servers.database_url, proxy.port)) as db:
        async with db.connection() as connection:
            backend = await connection.fetchval("SELECT pg_backend_pid()")
        with pytest.raises(DatabaseUnavailable):
            async with db.connection() as connection:
                await connection.fetchval("SELECT pg_terminate_backend($1)", backend)
        assert db.is_up
        assert await ask(db) == 1


async def test_a_bad_query_is_no_outage(servers: Servers) -> None:
    async with opened(servers.database_url) as db:
        with pytest.raises(DatabaseUnavailable):
            async with db.connection() as connection:
                await connection.fetchval("SELECT 1 / 0")
        assert db.is_up


async def test_it_closes_in_time_while_the_database_is_away(servers: Servers) -> None:
    async with proxy_to(servers) as proxy:
        async with opened(through(servers.database_url, proxy.port), database_timeout_s=0.5) as db:
            assert await ask(db) == 1
            proxy.black_hole()
            with pytest.raises(DatabaseUnavailable):
                await ask(db)
            started = time.monotonic()
        assert time.monotonic() - started < 5.0


async def test_tools_that_take_one_host_get_the_primary(servers: Servers) -> None:
    async with proxy_to(servers) as dead, proxy_to(servers) as alive:
        dead.black_hole()
        url = through(servers.database_url, dead.port, alive.port)
        assert await find_primary(url, timeout=5.0) == through(servers.database_url, alive.port)
        assert await find_primary("postgres://u@one/name?sslmode=disable", timeout=5.0) == (
            "postgres://u@one:5432/name?sslmode=disable"
        )


async def test_migrations_and_administration_take_a_url_with_several_hosts(servers: Servers) -> None:
    async with proxy_to(servers) as refusing, proxy_to(servers) as alive:
        refusing.refuse()
        url = through(servers.database_url, refusing.port, alive.port)
        for arguments in (["migrate"], ["account", "create", "of two hosts"]):
            completed = await asyncio.to_thread(run_gateway, *arguments, database_url=url)
            assert completed.returncode == 0, completed.stderr


async def test_one_slow_query_among_quick_ones_is_no_outage(servers: Servers) -> None:
    """A commit may wait for a standby. Expiring the pool because of it would cause an outage."""
    async with opened(servers.database_url, database_timeout_s=0.5) as db:

        async def slow() -> None:
            async with db.connection() as connection:
                await connection.fetchval("SELECT pg_sleep(5)")

        waiting = asyncio.create_task(slow())
        for _ in range(10):
            assert await ask(db) == 1
            await asyncio.sleep(0.07)
        with pytest.raises(DatabaseUnavailable):
            await waiting
        assert db.is_up
        assert await ask(db) == 1
