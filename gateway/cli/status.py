"""`python -m gateway status`: asks everything the gateway rests on, all at once, and says what is wrong.

It changes nothing, and puts nothing in an outbound queue: confirms are timed on a temporary queue of its own. What the
protocols do not show it does not claim: a queue's type and its bindings (a gateway that connects checks the type).
"""

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import aio_pika
import aiohttp
import aiormq.exceptions
import asyncpg
import msgspec
from yarl import URL

from gateway import __version__, tls
from gateway.config import Settings
from gateway.postgres.pool import DATABASE_ERRORS
from gateway.urls import urls_of_hosts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractChannel, AbstractConnection

ANSWER_TIMEOUT_S = 3.0  # for each of those asked
CLOSE_TIMEOUT_S = 0.5

SERVER_STATE = "SELECT pg_is_in_recovery(), current_setting('server_version')"
STANDBY_LAG = """
    SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
                ELSE extract(epoch FROM now() - pg_last_xact_replay_timestamp()) END::float8
"""
HAS_MIGRATIONS = "SELECT to_regclass('schema_migrations') IS NOT NULL"
APPLIED_MIGRATIONS = "SELECT version FROM schema_migrations ORDER BY version"
# A sequence's view shows its value to whoever may use it; the sequence itself only to whoever may read it.
LEASED_IDS = """
    SELECT last_value, max_value FROM pg_sequences
    WHERE format('%I.%I', schemaname, sequencename)::regclass = to_regclass('message_id_leases')
"""


class GatewayState(msgspec.Struct):
    """A gateway's operations listener."""

    url: str
    status: str  # "ready", "not ready", "not running"
    problem: str = ""


class Node(msgspec.Struct):
    """A node of the broker."""

    node: str
    version: str = ""
    confirm_ms: float | None = None
    note: str = ""
    problem: str = ""


class Queue(msgspec.Struct):
    """An outbound queue. `configured_type` is what the settings say."""

    name: str
    configured_type: str
    messages: int | None = None
    consumers: int | None = None
    problem: str = ""


class Host(msgspec.Struct):
    """A host of the database."""

    host: str
    role: str = ""  # "primary" or "standby"
    version: str = ""
    lag_s: float | None = None  # of a standby
    problem: str = ""


class Schema(msgspec.Struct):
    """What the primary knows of migrations and of message ids."""

    applied: list[str] = []
    pending: list[str] = []
    newer: list[str] = []  # applied by a later version: fine while that one is being rolled out
    leases_used: int | None = None
    leases_in_all: int | None = None
    problem: str = ""


class Status(msgspec.Struct, kw_only=True):
    """Everything, in the order in which it is shown; docs/operations.md describes the JSON."""

    ok: bool
    version: str
    gateways: list[GatewayState]
    nodes: list[Node]
    queues: list[Queue]
    hosts: list[Host]
    schema: Schema
    settings: dict[str, Any]
    problems: list[str]


async def ask_all(
    settings: Settings, gateways: Sequence[URL], migrations: Sequence[str], *, must_run: bool = False
) -> Status:
    """The state of everything, within about ANSWER_TIMEOUT_S, whatever is down.

    `migrations` are the versions that this gateway knows. `must_run`: a gateway that does not run is a problem.
    """
    brokers = [_ask_node(settings, URL(node)) for node in settings.amqp_nodes()]
    hosts = [_ask_host(url, migrations) for url in urls_of_hosts(settings.database_url_with_tls())]
    states, nodes_and_queues, hosts_and_schemas = await asyncio.gather(
        asyncio.gather(*(_ask_gateway(url, must_run=must_run) for url in gateways)),
        asyncio.gather(*brokers),
        asyncio.gather(*hosts),
    )
    queues = next((queues for _, queues in nodes_and_queues if queues), None)
    schemas = [schema for _, schema in hosts_and_schemas if schema is not None]
    status = Status(
        ok=False,
        version=__version__,
        gateways=list(states),
        nodes=[node for node, _ in nodes_and_queues],
        queues=queues or [Queue(name, settings.amqp_queue_type, problem="nobody to ask") for name in settings.queues()],
        hosts=[host for host, _ in hosts_and_schemas],
        schema=schemas[0] if len(schemas) == 1 else Schema(problem=f"{len(schemas) or 'no'} primary to ask"),
        settings=settings.masked(),
        problems=[],
    )
    if len(schemas) > 1:
        status.schema.problem = "several hosts say that they are the primary: fence all but one at once"
    status.problems = list(_problems(status))
    status.ok = not status.problems
    return status


def _problems(status: Status) -> Iterator[str]:
    for gateway in status.gateways:
        yield from _named(f"gateway {gateway.url}", gateway.problem)
    for node in status.nodes:
        yield from _named(f"broker {node.node}", node.problem)
    for queue in status.queues:
        yield from _named(f"queue {queue.name}", queue.problem)
    for host in status.hosts:
        yield from _named(f"database {host.host}", host.problem)
    yield from _named("schema", status.schema.problem)


def _named(what: str, problem: str) -> Iterator[str]:
    if problem:
        yield f"{what}: {problem}"


async def _ask_gateway(url: URL, *, must_run: bool) -> GatewayState:
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url.with_path("/readyz")) as response:
            if response.status == 200:
                return GatewayState(str(url), "ready")
            why = (await response.text())[:200] or f"it answered {response.status}"
            return GatewayState(str(url), "not ready", why)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        is_absent = isinstance(error, aiohttp.ClientConnectorError) and not must_run
        return GatewayState(str(url), "not running", "" if is_absent else _reason(error))


async def _ask_node(settings: Settings, node: URL) -> tuple[Node, list[Queue]]:
    state, queues = Node(f"{node.host}:{node.port or (5671 if node.scheme == 'amqps' else 5672)}"), []
    try:
        async with _broker(settings, node) as connection:
            transport = connection.transport
            properties = transport.connection.server_properties if transport else {}
            state.version = " ".join(str(properties.get(name, "")) for name in ("product", "version")).strip()
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                queues = [await _ask_queue(connection, name, settings.amqp_queue_type) for name in settings.queues()]
            await _time_a_confirm(connection, state)
    except Exception as error:  # whatever the library raises, the others are to be shown
        state.problem = _reason(error)
    except asyncio.CancelledError:  # aiormq's word for a connection that died
        if (task := asyncio.current_task()) is None or task.cancelling():
            raise
        state.problem = "the connection was lost"
    return state, queues


@asynccontextmanager
async def _broker(settings: Settings, node: URL) -> "AsyncIterator[AbstractConnection]":
    connection = aio_pika.Connection(node.update_query(heartbeat=settings.amqp_heartbeat_s, name="sms-gateway-status"))
    if node.scheme == "amqps":
        connection.kwargs["context"] = await asyncio.to_thread(tls.broker_context, settings)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await connection.connect()
    try:
        yield connection
    finally:
        closing = asyncio.create_task(connection.close())
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)  # a blocked broker reads no goodbyes
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)


async def _ask_queue(connection: "AbstractConnection", name: str, queue_type: str) -> Queue:
    queue = Queue(name, queue_type)
    channel: AbstractChannel = await connection.channel(publisher_confirms=False)
    try:
        found = (await channel.declare_queue(name, passive=True)).declaration_result
        queue.messages, queue.consumers = found.message_count, found.consumer_count
    except aiormq.exceptions.ChannelNotFoundEntity:
        queue.problem = "does not exist; a gateway makes it when it connects, unless GATEWAY_AMQP_TOPOLOGY=check"
    except aiormq.exceptions.AMQPChannelError as error:
        queue.problem = _reason(error)
    finally:
        with suppress(Exception):
            await channel.close()
    return queue


async def _time_a_confirm(connection: "AbstractConnection", state: Node) -> None:
    """Publish one message to a temporary queue of our own."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            channel = await connection.channel(publisher_confirms=True)
            own = await channel.declare_queue(exclusive=True, auto_delete=True, arguments={"x-max-length": 1})
            begin = time.perf_counter()
            await channel.default_exchange.publish(aio_pika.Message(b"status"), own.name)
            state.confirm_ms = round((time.perf_counter() - begin) * 1000, 2)
    except aiormq.exceptions.ChannelAccessRefused:
        state.note = "confirms not timed: the user may not make a temporary queue"
    except TimeoutError:
        state.problem = "no confirm in time: a memory or disk alarm blocks publishing, or the node hangs"


async def _ask_host(url: str, migrations: Sequence[str]) -> tuple[Host, Schema | None]:
    """One host's state; and the schema, if it is the primary."""
    host = Host(URL(url).authority.rpartition("@")[2])
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            context = await asyncio.to_thread(tls.database_context, url)
            connection = await asyncpg.connect(
                url, ssl=context, timeout=ANSWER_TIMEOUT_S, command_timeout=ANSWER_TIMEOUT_S
            )
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                is_standby, host.version = await connection.fetchrow(SERVER_STATE)
                host.role = "standby" if is_standby else "primary"
                if is_standby:
                    host.lag_s = await connection.fetchval(STANDBY_LAG)
                    return host, None
                return host, await _ask_schema(connection, migrations)
        finally:
            connection.terminate()
    except DATABASE_ERRORS as error:
        host.problem = _reason(error)
        return host, None


async def _ask_schema(connection: Any, migrations: Sequence[str]) -> Schema:
    try:
        applied = []
        if await connection.fetchval(HAS_MIGRATIONS):
            applied = [row["version"] for row in await connection.fetch(APPLIED_MIGRATIONS)]
        leased = await connection.fetchrow(LEASED_IDS)
    except asyncpg.InsufficientPrivilegeError:
        return Schema(problem="this database user may not read schema_migrations: ask as the owner of the tables")
    schema = Schema(
        applied=applied,
        pending=[version for version in migrations if version not in applied],
        newer=[version for version in applied if version not in migrations],
    )
    if leased is not None:
        last, schema.leases_in_all = leased[0], leased[1] + 1
        schema.leases_used = 0 if last is None else last + 1
    if schema.pending:
        schema.problem = f"{len(schema.pending)} migrations are pending: run `python -m gateway migrate`"
    return schema


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
    return " ".join(f"{type(error).__name__} {error}".split())


def as_text(status: Status) -> str:
    """For people, on 100 columns; problems stand on their own lines, and again at the end."""
    lines = [f"gateway version {status.version}", ""]
    for gateway in status.gateways:
        lines += _row("gateway", gateway.url, gateway.status, gateway.problem)
    for node in status.nodes:
        confirm = f"confirm {node.confirm_ms} ms" if node.confirm_ms is not None else node.note
        lines += _row("broker", node.node, f"{node.version}  {confirm}", node.problem)
    for queue in status.queues:
        counts = "" if queue.messages is None else f"{queue.messages} messages, {queue.consumers} consumers"
        lines += _row("queue", queue.name, f"{counts}  configured as {queue.configured_type}", queue.problem)
    for host in status.hosts:
        lag = "" if host.lag_s is None else f"  {host.lag_s:.1f} s behind"
        lines += _row("database", host.host, f"{host.role}  {host.version}{lag}", host.problem)
    schema = status.schema
    newer = f", {len(schema.newer)} of a newer version" if schema.newer else ""
    state = f"{len(schema.applied)} migrations applied, {len(schema.pending)} pending{newer}"
    lines += _row("schema", "", state, schema.problem)
    if schema.leases_used is not None and schema.leases_in_all is not None:
        share = schema.leases_used / schema.leases_in_all
        lines += _row("message ids", "", f"{schema.leases_used:,} of {schema.leases_in_all:,} leases ({share:.4%})", "")
    lines += ["", "settings", *(f"  {name:26} {value}" for name, value in status.settings.items() if value != "")]
    lines += ["", "problems" if status.problems else "all is well", *(f"  {problem}" for problem in status.problems)]
    return "\n".join(line.rstrip() for line in lines)


def _row(kind: str, name: str, state: str, problem: str) -> list[str]:
    mark = "✗" if problem else "✓"
    shown = f"{mark} {kind:12} {name:30} {state.strip()}" if name else f"{mark} {kind:12} {state.strip()}"
    return [shown, *([f"    {problem}"] if problem else [])]
