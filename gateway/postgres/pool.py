"""A pool of connections to the primary, whichever host that is. All failures are raised as DatabaseUnavailable.

An outage begins when a query fails by one of OUTAGE_ERRORS and none has succeeded for database_timeout_s. New queries
are then refused at once, while one task probes the database until it answers.
"""

import asyncio
import logging
import random
import ssl
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncpg

from gateway import tls
from gateway.config import Settings
from gateway.errors import DatabaseUnavailable
from gateway.postgres.rights import MissingRights
from gateway.repeat_log import RepeatLog
from gateway.urls import Address, Database

if TYPE_CHECKING:
    from asyncpg.pool import PoolConnectionProxy

log = logging.getLogger(__name__)

SERVER_PARAMETERS = ("application_name", "options", "search_path")  # of a URL, which the server gets as they are
CONNECT_TIMEOUT_S = 60.0  # asyncpg's default, where the caller gives none
PROBE_DELAYS_S = (0.05, 0.5)  # a random delay between these: several gateways do not probe at the same moment

# Errors of a server that is gone, hung, starting or stopping; not asyncpg's errors for a single lost connection.
OUTAGE_ERRORS = (
    OSError,
    TimeoutError,
    asyncpg.CannotConnectNowError,
    asyncpg.TargetServerAttributeNotMatched,
)
# Errors of a database that `migrate` has not made, or not brought up to date.
NOT_MIGRATED_ERRORS = (
    asyncpg.UndefinedTableError,
    asyncpg.UndefinedColumnError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.InvalidSchemaNameError,
)
MORE_RIGHTS = (
    "Run `python -m gateway migrate --grant-to ROLE` as the owner of the tables: it grants the role all rights to "
    "serve, or names the one that it cannot grant"
)
DATABASE_ERRORS = (
    *OUTAGE_ERRORS,
    MissingRights,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,
)


class Pool:
    """A pool that connects at the first query, and again after an outage or when another host became the primary."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.database_timeout_s
        self._recovery: asyncio.Task[None] | None = None
        self._answered_at = float("-inf")
        self.failures = 0  # queries that failed or timed out
        self.last_failure = ""  # as logged; "" without any
        self._hosts = str(settings.database())
        self._failure_log = RepeatLog(log)
        self._pool = asyncpg.create_pool(
            settings.database_url_with_tls(),
            connect=connect_to_primary,
            min_size=0,  # the gateway starts without the database
            max_size=settings.database_pool_size,
            timeout=settings.database_timeout_s,  # to connect
            command_timeout=settings.database_timeout_s,  # bounds the pool's own commands as well
            statement_cache_size=settings.database_statement_cache,
            reset=_keep_session,
        )

    async def open(self) -> None:
        """Prepare the pool. No connection is made yet."""
        await self._pool

    async def close(self) -> None:
        """Close all connections; after database_timeout_s, by force."""
        if self._recovery is not None:
            self._recovery.cancel()
            await asyncio.wait([self._recovery])
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    def log_reached(self) -> None:
        """Log that the database was reached, with the number of failures before."""
        log.info("reached the database at %s%s", self._hosts, self._failure_log.end())

    @property
    def is_up(self) -> bool:
        """False from the beginning of an outage until a host answers again."""
        return self._recovery is None

    @property
    def connections(self) -> int:
        """Number of open connections."""
        return int(self._pool.get_size())

    @property
    def idle_connections(self) -> int:
        """Number of open connections that no query uses."""
        return int(self._pool.get_idle_size())

    @asynccontextmanager
    async def connection(self) -> "AsyncIterator[PoolConnectionProxy]":
        """Yield a connection for a few statements: for at most database_timeout_s, the wait for it included.

        Raises DatabaseUnavailable from the original error.
        """
        if self._recovery is not None:
            raise DatabaseUnavailable
        try:
            async with self._bounded_connection() as connection:
                yield connection
            self._answered_at = time.monotonic()
        except DATABASE_ERRORS as error:
            self.failures += 1
            self._note(error)
            # One slow query among others that succeed is not an outage. Recovery would close the good connections.
            is_silent = time.monotonic() - self._answered_at > self._timeout_s
            if is_silent and isinstance(error, OUTAGE_ERRORS) and self._recovery is None:
                self._recovery = asyncio.create_task(self._recover(), name="wait for the database")
            raise DatabaseUnavailable from error

    def _note(self, error: BaseException) -> None:
        where = "" if _has_hosts(error) else f"{self._hosts}: "
        self.last_failure = f"the database {_state_after(error)}: {where}{reason(error)}"
        self._failure_log.note(self.last_failure)

    @asynccontextmanager
    async def _bounded_connection(self) -> "AsyncIterator[PoolConnectionProxy]":
        async with asyncio.timeout(self._timeout_s):
            connection = await self._pool.acquire()
            try:
                yield connection
            except (TimeoutError, asyncio.CancelledError):
                # InterfaceError: the pool has already noticed that the connection is dead, and taken it back.
                with suppress(asyncpg.InterfaceError):
                    connection.terminate()  # a cancel request would wait for the same silent server
                raise
            finally:
                await self._pool.release(connection)

    async def _recover(self) -> None:
        try:
            await self._pool.expire_connections()  # another server may be the primary now
            while not await self._answers():  # noqa: ASYNC110 - only polling shows that the server is back
                await asyncio.sleep(random.uniform(*PROBE_DELAYS_S))  # noqa: S311 - jitter
            log.info("the database answers again%s", self._failure_log.end())
        finally:
            self._recovery = None

    async def _answers(self) -> bool:
        try:
            async with self._bounded_connection() as connection:
                await connection.fetchval("SELECT 1")
        except DATABASE_ERRORS as error:
            self._note(error)
            return False
        return True


def reason(error: BaseException) -> str:
    """Return one line for the log: the error's type, its text if that quotes no data and no URL, and advice.

    An error of connect_to_primary is described with each host that was tried.
    """
    if _has_hosts(error):
        return str(error.__notes__[0])
    if isinstance(error, MissingRights):
        return str(error)
    # SSLCertVerificationError is both a ValueError and an OSError; its text says what to do, and quotes no data.
    if isinstance(error, (asyncpg.DataError, ValueError)) and not isinstance(error, OSError):
        return type(error).__name__
    # str() of a PostgresError would include its details, which quote rows and keys.
    text = error.args[0] if isinstance(error, asyncpg.PostgresError) else error
    if isinstance(error, NOT_MIGRATED_ERRORS):
        text = f"{text}. Run `python -m gateway migrate`"
    if isinstance(error, asyncpg.InsufficientPrivilegeError):
        text = f"{text}. {MORE_RIGHTS}"
    if isinstance(error, TimeoutError):
        text = "no answer in time"
    return f"{type(error).__name__} {text}{tls.advice(error, 'DATABASE')}".strip()


async def connect_to_primary(url: str, **options: Any) -> asyncpg.Connection:
    """Connect to the primary among the hosts of a URL, trying all hosts at once.

    asyncpg tries one host after the other, so a host that hangs would hide the hosts behind it. When no host is a
    primary, raises the error of one of them, one of DATABASE_ERRORS; `reason` names all hosts.
    """
    connection, _ = await _connect_to_first(Database.of(url), options)
    return connection


async def find_primary(url: str, **options: Any) -> str:
    """Return the URL of the primary alone, for tools that take one host. Raises as connect_to_primary does."""
    database = Database.of(url)
    if len(database.hosts) == 1:
        return database.url(database.hosts[0])
    connection, address = await _connect_to_first(database, options)
    connection.terminate()  # an orderly close would wait for a server that hangs by now
    return database.url(address)


async def connect_to_host(
    database: Database, address: Address, *, context: ssl.SSLContext | bool, timeout: float, **options: Any
) -> asyncpg.Connection:
    """Connect to one host of a database. Raises one of DATABASE_ERRORS."""
    connect_timeout_s = int(database.parameters.get("connect_timeout", "0")) or timeout
    arguments = asyncpg_arguments(database, address)
    try:
        return await asyncpg.connect(ssl=context, timeout=min(timeout, connect_timeout_s), **arguments, **options)
    except DATABASE_ERRORS:
        raise
    except Exception as error:  # whatever a driver raises, requests get 503
        raise ConnectionError(f"cannot connect: {type(error).__name__}") from error


def asyncpg_arguments(database: Database, address: Address) -> dict[str, Any]:
    """Return asyncpg's arguments for one host: all that it would otherwise take from PG… variables or the home folder.

    Only TLS and the role of the server are left to the caller.
    """
    parameters = database.parameters
    return {
        "host": address.host,
        "port": address.port,
        "user": database.user,
        "password": database.password,  # "" if there is none: None would mean PGPASSWORD, or a file
        "database": database.name,
        "direct_tls": parameters.get("sslnegotiation") == "direct",
        "server_settings": {"application_name": "sms-gateway"}
        | {name: parameters[name] for name in SERVER_PARAMETERS if name in parameters},
        "krbsrvname": "postgres",
        "gsslib": "gssapi",
    }


async def _connect_to_first(database: Database, given: dict[str, Any]) -> tuple[asyncpg.Connection, Address]:
    context = await asyncio.to_thread(tls.database_context, database) if tls.is_wanted(database) else False
    options: dict[str, Any] = {"timeout": CONNECT_TIMEOUT_S, "target_session_attrs": "primary", "context": context}
    options |= given
    attempts = {
        asyncio.create_task(connect_to_host(database, address, **options)): address for address in database.hosts
    }
    pending = set(attempts)
    failures: dict[Address, BaseException] = {}
    try:
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for attempt in done:
                if (failure := attempt.exception()) is None:
                    done.discard(attempt)
                    pending |= done  # one of these may have connected at the same moment; closed below
                    return attempt.result(), attempts[attempt]
                failures[attempts[attempt]] = failure
    finally:
        for late in pending:
            late.cancel()
            late.add_done_callback(_close_late)
    # A standby says only that it is none; the host that should be the primary says what is wrong.
    says_more = [one for one in failures.values() if not isinstance(one, asyncpg.TargetServerAttributeNotMatched)]
    failure = (says_more or list(failures.values()))[-1]
    failure.add_note("; ".join(f"{address}: {reason(error)}" for address, error in failures.items()))
    raise failure


def _state_after(error: BaseException) -> str:
    if isinstance(error, (MissingRights, asyncpg.InsufficientPrivilegeError)):
        return "refuses a right"
    return "is not migrated" if isinstance(error, NOT_MIGRATED_ERRORS) else "is unavailable"


def _has_hosts(error: BaseException) -> bool:
    return bool(getattr(error, "__notes__", None))


def _close_late(late: "asyncio.Task[asyncpg.Connection]") -> None:
    if not late.cancelled() and late.exception() is None:
        late.result().terminate()


async def _keep_session(_connection: object) -> None:
    """Do nothing. The pool's own reset would cost a round trip per query, and our queries leave no state."""
