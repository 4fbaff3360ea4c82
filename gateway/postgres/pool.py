"""A pool of connections to the primary, whichever host that is; what fails leaves here as DatabaseUnavailable.

Once the database does not answer, whoever asks is refused at once, and one task alone goes on asking until it does.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from gateway import tls
from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.urls import urls_of_hosts

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

PROBE_DELAYS_S = (0.05, 0.5)  # jitter between them: the replicas do not knock in step

# What a server that is gone, hung, starting up or stopping looks like; a lost connection alone is no such sign.
IS_AWAY = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
)
DATABASE_ERRORS = (*IS_AWAY, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)


class Pool:
    """Connects when first asked, and again whenever the database has been away or another host became the primary."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.database_timeout_s
        self._return: asyncio.Task[None] | None = None
        self._answered_at = float("-inf")
        self.failures = 0  # questions that were asked and not answered
        self._pool = asyncpg.create_pool(
            settings.database_url_with_tls(),
            connect=connect_to_primary,
            min_size=0,  # nothing is asked of the database at start: the gateway starts without it
            max_size=settings.database_pool_size,
            timeout=settings.database_timeout_s,  # of one attempt to connect
            command_timeout=settings.database_timeout_s,  # and of the pool's own goodbyes to servers that hang
            statement_cache_size=settings.database_statement_cache,
            reset=_keep_session,
            server_settings={"application_name": "sms-gateway"},
        )

    async def open(self) -> None:
        """Make the pool ready; connects to nothing yet."""
        await self._pool

    async def close(self) -> None:
        """Close all connections, by force if they do not close in time."""
        if self._return is not None:
            self._return.cancel()
            await asyncio.wait([self._return])
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    @property
    def is_up(self) -> bool:
        """False from a query that no host answered until a host answers again."""
        return self._return is None

    @property
    def connections(self) -> int:
        """How many are open."""
        return int(self._pool.get_size())

    @property
    def idle_connections(self) -> int:
        """How many of them nobody uses."""
        return int(self._pool.get_idle_size())

    @asynccontextmanager
    async def connection(self, slots: asyncio.Semaphore | None = None) -> "AsyncIterator[PoolConnectionProxy]":
        """A connection for one question. Waiting for it, and for the answer, take database_timeout_s together at most.

        `slots` bounds how many questions of one kind are asked at once. Raises DatabaseUnavailable, from the error that
        shows why.
        """
        if self._return is not None:
            raise DatabaseUnavailable
        try:
            async with self._bounded_connection(slots) as connection:
                yield connection
            self._answered_at = time.monotonic()
        except DATABASE_ERRORS as error:
            self.failures += 1
            log.warning("the database is unavailable: %s", reason(error))
            # One slow question among others that are answered is no outage: to start over would make it one.
            is_silent = time.monotonic() - self._answered_at > self._timeout_s
            if is_silent and isinstance(error, IS_AWAY) and self._return is None:
                self._return = asyncio.create_task(self._wait_for_return(), name="wait for the database")
            raise DatabaseUnavailable from error

    @asynccontextmanager
    async def _bounded_connection(self, slots: asyncio.Semaphore | None = None) -> "AsyncIterator[PoolConnectionProxy]":
        async with asyncio.timeout(self._timeout_s), slots or nullcontext():
            connection = await self._pool.acquire()
            try:
                yield connection
            except (TimeoutError, asyncio.CancelledError):
                with suppress(asyncpg.InterfaceError):  # the pool has noticed that it is dead, and taken it back
                    connection.terminate()  # a polite cancel request would wait for the same silent server
                raise
            finally:
                await self._pool.release(connection)

    async def _wait_for_return(self) -> None:
        try:
            await self._pool.expire_connections()  # they lead to a server that another may have replaced
            while not await self._answers():  # noqa: ASYNC110 - nobody could set an event: we have to ask
                await asyncio.sleep(random.uniform(*PROBE_DELAYS_S))  # noqa: S311 - jitter
            log.info("the database is back")
        finally:
            self._return = None

    async def _answers(self) -> bool:
        try:
            async with self._bounded_connection() as connection:
                await connection.fetchval("SELECT 1")
        except DATABASE_ERRORS:
            return False
        return True


def reason(error: BaseException) -> str:
    """For the log: the kind of error, what it says where it quotes neither arguments nor the URL, and what to do."""
    # A failed verification is a ValueError and an OSError, and says what the operator needs.
    if isinstance(error, (asyncpg.DataError, ValueError)) and not isinstance(error, OSError):
        return type(error).__name__
    # PostgreSQL's details show rows and keys; str() would have them.
    words = error.args[0] if isinstance(error, asyncpg.PostgresError) else error
    return f"{type(error).__name__} {words}{tls.advice(error, 'DATABASE')}".strip()


async def connect_to_primary(url: str, **options: Any) -> asyncpg.Connection:
    """A connection to that host of the URL which is the primary. All are asked at once; the first to agree is taken.

    asyncpg by itself asks one after the other, and a host that hangs would hide those behind it for ever.
    Raises what the last attempt raised, when none agrees.
    """
    connection, _ = await _connect_to_first(url, options)
    return connection


async def find_primary(url: str, *, timeout_s: float) -> str:
    """The URL of the primary alone, for tools that know one host. Raises as connect_to_primary does."""
    if len(urls_of_hosts(url)) == 1:
        return url
    connection, found = await _connect_to_first(url, {"timeout": timeout_s})
    await connection.close()
    return found


async def _connect_to_first(url: str, options: dict[str, Any]) -> tuple[asyncpg.Connection, str]:
    context = await asyncio.to_thread(tls.database_context, url) if tls.is_wanted(url) else False
    urls = {
        asyncio.create_task(asyncpg.connect(one, ssl=context, target_session_attrs="primary", **options)): one
        for one in urls_of_hosts(url)
    }
    pending = set(urls)
    failure: BaseException | None = None
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if (failure := attempt.exception()) is None:
                    done.discard(attempt)
                    pending |= done  # who comes second in the same moment is let go with the others
                    return attempt.result(), urls[attempt]
    finally:
        for late in pending:
            late.cancel()
            late.add_done_callback(_let_go)
    assert failure is not None  # noqa: S101 - a URL has at least one host
    raise failure


def _let_go(late: "asyncio.Task[asyncpg.Connection]") -> None:
    if not late.cancelled() and late.exception() is None:
        late.result().terminate()


async def _keep_session(_connection: object) -> None:
    """The pool's own reset costs a round trip for each question; our queries leave no state behind them."""
