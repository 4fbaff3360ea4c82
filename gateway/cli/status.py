"""`python -m gateway status`: the state of gateways, broker and database, collected concurrently.

It changes nothing and publishes nothing to an outbound queue: confirms are timed on a temporary queue. AMQP does not
show bindings, so `status` does not check them. It verifies the queues' type and arguments if the user may configure.
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
from gateway.amqp.depths import DEAD_LETTERS, OUTBOUND
from gateway.amqp.topology import check_may_publish, dead_letter_queue, verify_topology
from gateway.amqp.transport import (
    MAY_NOT_DECLARE,
    TappedTransport,
    address,
    prepare_connection,
    stray_cancellation_is_loss,
)
from gateway.amqp.transport import reason as broker_reason
from gateway.config import Settings
from gateway.postgres.pool import DATABASE_ERRORS, NOT_MIGRATED_ERRORS, connect_to_host
from gateway.postgres.pool import reason as database_reason
from gateway.postgres.rights import ALL_RIGHTS, MissingRights, check_rights
from gateway.telemetry.log import printable
from gateway.urls import Address, Database

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aio_pika.abc import AbstractChannel, AbstractConnection

ANSWER_TIMEOUT_S = 3.0  # per server
CLOSE_TIMEOUT_S = 0.5
MAX_ANSWER_SHOWN = 200  # characters of an answer that is not the gateway's
# SMS in one outbound queue. 30 minutes after it was accepted an SMS is stale, and 17,000 a minute is the default rate
# at which the platform sends from one list.
MAX_BACKLOG = 30 * 17_000

SERVER_STATE = "SELECT pg_is_in_recovery(), current_setting('server_version')"
STANDBY_LAG = """
    SELECT CASE WHEN pg_last_wal_receive_lsn() = pg_last_wal_replay_lsn() THEN 0
                ELSE extract(epoch FROM now() - pg_last_xact_replay_timestamp()) END::float8
"""
HAS_MIGRATIONS = "SELECT to_regclass('schema_migrations') IS NOT NULL"
APPLIED_MIGRATIONS = "SELECT version FROM schema_migrations ORDER BY version"
# The view needs only USAGE on the sequence. Reading the sequence itself needs SELECT.
LEASED_IDS = """
    SELECT last_value, max_value FROM pg_sequences
    WHERE format('%I.%I', schemaname, sequencename)::regclass = to_regclass('message_id_leases')
"""


class GatewayState(msgspec.Struct):
    """The state of one gateway, from its operations listener."""

    url: str
    status: str  # "ready", "not ready", "not running"
    problem: str = ""


class _Readiness(msgspec.Struct):
    """An answer of /readyz: of one process, or of a supervisor with its workers."""

    status: str = ""
    reasons: list[str] = []
    workers: list["_Readiness"] = []


class Node(msgspec.Struct):
    """The state of one broker node."""

    node: str
    version: str = ""
    confirm_ms: float | None = None
    note: str = ""
    problem: str = ""


class Limits(msgspec.Struct):
    """Numbers of AMQP messages in one queue above which they are a problem."""

    backlog: int | None = None  # None: MAX_BACKLOG SMS
    dead_letters: int = 0


class Queue(msgspec.Struct):
    """The state of one queue. `configured_type` comes from the settings."""

    name: str
    configured_type: str
    kind: str = OUTBOUND  # or DEAD_LETTERS
    messages: int | None = None
    consumers: int | None = None
    problem: str = ""


class Host(msgspec.Struct):
    """The state of one database host."""

    host: str
    role: str = ""  # "primary" or "standby"
    version: str = ""
    lag_s: float | None = None  # of a standby
    sslmode: str = ""  # in force, also where the URL names none
    problem: str = ""


class Schema(msgspec.Struct):
    """Migrations and message id leases, from the primary; None: unknown."""

    applied: list[str] | None = None
    pending: list[str] | None = None
    newer: list[str] | None = None  # applied by a later version, during its rollout
    leases_used: int | None = None
    leases_in_all: int | None = None
    problem: str = ""


class Status(msgspec.Struct, kw_only=True):
    """The whole state, in display order. docs/operations.md describes the JSON."""

    ok: bool
    version: str
    gateways: list[GatewayState]
    nodes: list[Node]
    queues: list[Queue]
    hosts: list[Host]
    schema: Schema
    settings: dict[str, Any]
    problems: list[str]


async def collect(
    settings: Settings,
    gateways: Sequence[URL],
    migrations: Sequence[str],
    *,
    must_run: bool = False,
    limits: Limits | None = None,
) -> Status:
    """Collect the state of all servers within about 4 × ANSWER_TIMEOUT_S. A server that is down is a problem, no error.

    `migrations` are the versions that this gateway has. `must_run`: a gateway that is not running is a problem.
    """
    database = settings.database()
    states, nodes_and_queues, hosts_and_schemas = await asyncio.gather(
        asyncio.gather(*(_check_gateway(url, must_run=must_run) for url in gateways)),
        asyncio.gather(*(_check_node(settings, URL(node)) for node in settings.amqp_nodes())),
        asyncio.gather(
            *(_check_host(database, one, migrations, settings.database_statement_cache) for one in database.hosts)
        ),
    )
    # The first node's answer about a queue, and without one the next node's.
    answered = {queue.name: queue for _, queues in reversed(nodes_and_queues) for queue in queues}
    queues = [answered.get(queue.name, queue) for queue in _queues(settings)]
    for queue in queues:
        if queue.name not in answered:
            queue.problem = "no answer from a broker node"
        queue.problem = queue.problem or _contents_problem(queue, settings, limits or Limits())
    status = Status(
        ok=False,
        version=__version__,
        gateways=list(states),
        nodes=[node for node, _ in nodes_and_queues],
        queues=queues,
        hosts=[host for host, _ in hosts_and_schemas],
        schema=_only_schema([schema for _, schema in hosts_and_schemas if schema is not None]),
        settings=settings.masked(),
        problems=[],
    )
    status.problems = list(_problems(status))
    status.ok = not status.problems
    return status


def _queues(settings: Settings) -> list[Queue]:
    queues = [Queue(name, settings.amqp_queue_type) for name in settings.queues()]
    if dead := dead_letter_queue(settings):
        queues.append(Queue(dead, settings.amqp_queue_type, DEAD_LETTERS))
    return queues


def _contents_problem(queue: Queue, settings: Settings, limits: Limits) -> str:
    """Return a sentence if messages in the queue are a problem. A stream keeps what was read: its length says nothing.

    MAX_BACKLOG is in SMS. With envelopes a message may have so many that the limit is lower.
    """
    messages = queue.messages or 0
    if queue.kind == DEAD_LETTERS:
        if messages > limits.dead_letters:
            return f"dead letters ({messages:,}): see docs/runbook.md#gatewaydeadletters"
        return ""
    backlog = limits.backlog if limits.backlog is not None else MAX_BACKLOG // settings.messages_per_envelope
    if queue.configured_type == "stream" or not messages:
        return ""
    if not queue.consumers:
        return f"no consumer reads its messages ({messages:,}). An SMS is stale 30 minutes after it was accepted"
    if messages > backlog:
        return f"messages ({messages:,}) above the limit of {backlog:,}: the consumers are too slow, or hang"
    return ""


def _only_schema(found: Sequence[Schema]) -> Schema:
    if not found:
        return Schema(problem="no primary answers")
    if len(found) > 1:
        return Schema(problem="several hosts are primaries: fence all but one at once")
    return found[0]


def _problems(status: Status) -> Iterator[str]:
    parts = [
        *((f"gateway {gateway.url}", gateway.problem) for gateway in status.gateways),
        *((f"broker {node.node}", node.problem) for node in status.nodes),
        *((f"queue {queue.name}", queue.problem) for queue in status.queues),
        *((f"database {host.host}", host.problem) for host in status.hosts),
        ("schema", status.schema.problem),
    ]
    return (f"{name}: {problem}" for name, problem in parts if problem)


async def _check_gateway(url: URL, *, must_run: bool) -> GatewayState:
    try:
        timeout = aiohttp.ClientTimeout(total=ANSWER_TIMEOUT_S)
        async with aiohttp.ClientSession(timeout=timeout) as session, session.get(url.with_path("/readyz")) as response:
            if response.status == 200:
                return GatewayState(str(url), "ready")
            text = (await response.read()).decode(errors="replace")  # another service may answer with any bytes
            return GatewayState(str(url), "not ready", _why_not_ready(response.status, text))
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        is_absent = isinstance(error, aiohttp.ClientConnectorError) and not must_run
        return GatewayState(
            str(url), "not running", "" if is_absent else _one_line(error, f"{type(error).__name__} {error}")
        )


def _why_not_ready(status: int, text: str) -> str:
    """Return the reasons in an answer of /readyz, each once; the answer itself if it is not the gateway's."""
    with suppress(msgspec.DecodeError, RecursionError):
        answer = msgspec.json.decode(text, type=_Readiness)
        reasons = [reason for one in (answer, *answer.workers) for reason in one.reasons]
        reasons += [f"a worker {one.status}" for one in answer.workers if one.status not in ("ready", "not ready")]
        if reasons:
            return "; ".join(dict.fromkeys(reasons))
    return f"/readyz answered {status}: {text[:MAX_ANSWER_SHOWN]}".removesuffix(": ")


async def _check_node(settings: Settings, node: URL) -> tuple[Node, list[Queue]]:
    """Return one node's state, and the queues about which it has answered."""
    state, queues = Node(address(node)), list[Queue]()
    socket = TappedTransport()
    try:
        async with stray_cancellation_is_loss(), _broker(settings, node, socket) as connection:
            transport = connection.transport
            properties = transport.connection.server_properties if transport else {}
            state.version = " ".join(str(properties.get(name, "")) for name in ("product", "version")).strip()
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await _ask_about_queues(connection, settings, queues)
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await _check_topology(connection, settings, queues, state)
            await _time_confirm(connection, state)
    except Exception as error:  # the library raises many kinds; each is a problem of this node alone
        problem = _one_line(error, broker_reason(error, socket.close_reply))
        if queues and isinstance(error, TimeoutError):
            problem = f"it answers too slowly, or hangs: not every answer came within {ANSWER_TIMEOUT_S:.0f} s"
        _add_problem(state, problem)
    return state, queues


def _add_problem(state: Node, problem: str) -> None:
    state.problem = ". ".join(filter(None, [state.problem, problem]))


async def _check_topology(
    connection: "AbstractConnection", settings: Settings, queues: Sequence[Queue], state: Node
) -> None:
    """Check the right to publish, and exchange and queues unless a problem of `queues` is known."""
    await check_may_publish(await connection.channel(), settings)
    if any(queue.problem for queue in queues if queue.kind == OUTBOUND):
        return
    with_dead_letters = _may_verify_dead_letters(settings, queues)
    refused = await verify_topology(connection, settings, with_dead_letters=with_dead_letters)
    if refused and settings.amqp_topology == "declare":
        _add_problem(state, f"{refused}. {MAY_NOT_DECLARE}")


def _may_verify_dead_letters(settings: Settings, queues: Sequence[Queue]) -> bool:
    """Return True if gateways declare the dead letters, and no problem of their queue is known."""
    is_known_good = any(queue.kind == DEAD_LETTERS and not queue.problem for queue in queues)
    return settings.amqp_topology == "declare" and is_known_good


@asynccontextmanager
async def _broker(settings: Settings, node: URL, socket: TappedTransport) -> "AsyncIterator[AbstractConnection]":
    connection = await prepare_connection(settings, node, "sms-gateway-status", socket)
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        await connection.connect()
    try:
        yield connection
    finally:
        closing = asyncio.create_task(connection.close())
        await asyncio.wait([closing], timeout=CLOSE_TIMEOUT_S)  # a blocked broker does not answer
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)


async def _ask_about_queues(connection: "AbstractConnection", settings: Settings, answered: list[Queue]) -> None:
    """Ask about each queue, and add it to `answered`. After a refusal, the broker closes the channel: open another."""
    due = _queues(settings)
    while due:
        async with connection.channel(publisher_confirms=False) as channel:
            is_open = True
            while due and is_open:
                await _ask_about_queue(channel, due[0])
                answered.append(due.pop(0))
                is_open = not answered[-1].problem


async def _ask_about_queue(channel: "AbstractChannel", queue: Queue) -> None:
    """Set messages and consumers of the queue, or its problem."""
    try:
        found = (await channel.declare_queue(queue.name, passive=True)).declaration_result
        queue.messages, queue.consumers = found.message_count, found.consumer_count
    except aiormq.exceptions.ChannelNotFoundEntity:
        queue.problem = (
            "does not exist. `python -m gateway declare` makes it. So does a gateway that connects, unless "
            "GATEWAY_AMQP_TOPOLOGY=check"
        )
        if queue.kind == DEAD_LETTERS:
            queue.problem += ". RabbitMQ drops what consumers reject"
    except aiormq.exceptions.ChannelAccessRefused as error:  # RabbitMQ 4.2.6 and later ask for a right to the queue
        queue.problem = f"{error}. Its messages are not counted: docs/security.md#broker"
    except aiormq.exceptions.AMQPChannelError as error:
        queue.problem = _one_line(error, broker_reason(error))


async def _time_confirm(connection: "AbstractConnection", state: Node) -> None:
    """Measure the confirm of one message to a temporary queue, in milliseconds."""
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            channel = await connection.channel(publisher_confirms=True)
            queue = await channel.declare_queue(exclusive=True, auto_delete=True, arguments={"x-max-length": 1})
            begin = time.perf_counter()
            await channel.default_exchange.publish(aio_pika.Message(b"status"), queue.name)
            state.confirm_ms = round((time.perf_counter() - begin) * 1000, 2)
    except aiormq.exceptions.ChannelAccessRefused:
        state.note = "confirms not timed: the user may not declare a temporary queue"
    except TimeoutError:
        _add_problem(state, "no confirm in time: a memory or disk alarm blocks publishing, or the node hangs")


async def _check_host(
    database: Database, address: Address, migrations: Sequence[str], statement_cache: int
) -> tuple[Host, Schema | None]:
    """Return one host's state, and the schema if the host is a primary."""
    host = Host(str(address), sslmode=database.parameters["sslmode"])
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            context = await asyncio.to_thread(tls.database_context, database)
            connection = await connect_to_host(
                database,
                address,
                context=context,
                timeout=ANSWER_TIMEOUT_S,
                command_timeout=ANSWER_TIMEOUT_S,
                target_session_attrs="any",
                statement_cache_size=statement_cache,
            )
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                is_standby, host.version = await connection.fetchrow(SERVER_STATE)
                host.role = "standby" if is_standby else "primary"
                if is_standby:
                    host.lag_s = await connection.fetchval(STANDBY_LAG)
                    return host, None
                return host, await _check_schema(connection, migrations)
        finally:
            connection.terminate()
    except DATABASE_ERRORS as error:
        host.problem = _one_line(error, database_reason(error))
        return host, None


async def _check_schema(connection: Any, migrations: Sequence[str]) -> Schema:
    problem = await _missing_rights(connection)
    try:
        applied = []
        if await connection.fetchval(HAS_MIGRATIONS):
            applied = [row["version"] for row in await connection.fetch(APPLIED_MIGRATIONS)]
        leased = await connection.fetchrow(LEASED_IDS)
    except asyncpg.InsufficientPrivilegeError as error:  # to read the migrations, for example
        return Schema(problem=problem or _one_line(error, database_reason(error)))
    schema = Schema(
        problem=problem,
        applied=applied,
        pending=[version for version in migrations if version not in applied],
        newer=[version for version in applied if version not in migrations],
    )
    if leased is not None:
        last, schema.leases_in_all = leased[0], leased[1] + 1
        schema.leases_used = 0 if last is None else last + 1
    if schema.pending:
        pending = f"pending migrations: {len(schema.pending)}. Run `python -m gateway migrate`"
        schema.problem = ". ".join(filter(None, [pending, problem]))
    return schema


async def _missing_rights(connection: Any) -> str:
    """Return a sentence about the rights to serve that the role of this connection lacks; "" if it has them all."""
    try:
        await check_rights(connection, ALL_RIGHTS)
    except MissingRights as error:
        return str(error)
    except NOT_MIGRATED_ERRORS:  # the pending migrations are the problem
        return ""
    return ""


def _one_line(error: BaseException, reason: str) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {ANSWER_TIMEOUT_S:.0f} s"
    return " ".join(reason.split())


def as_text(status: Status) -> str:
    """Return the status as text for people: a row for each part, the settings, and all problems.

    A problem stands below its row, and again at the end.
    """
    lines = [f"gateway version {status.version}", ""]
    for gateway in status.gateways:
        lines += _row("gateway", gateway.url, gateway.status, gateway.problem)
    for node in status.nodes:
        confirm = f"confirm {node.confirm_ms} ms" if node.confirm_ms is not None else node.note
        lines += _row("broker", node.node, f"{node.version}  {confirm}", node.problem)
    for queue in status.queues:
        counts = "" if queue.messages is None else f"{queue.messages:,} messages, {queue.consumers} consumers  "
        kind = "queue" if queue.kind == OUTBOUND else "dead letters"
        lines += _row(kind, queue.name, f"{counts}configured as {queue.configured_type}", queue.problem)
    for host in status.hosts:
        lag = "" if host.lag_s is None else f"  {host.lag_s:.1f} s behind"
        state = f"{host.role}  {host.version}{lag}  sslmode={host.sslmode}"
        lines += _row("database", host.host, state, host.problem)
    schema = status.schema
    lines += _row("schema", "", _migrations(schema), schema.problem)
    if schema.leases_used is not None and schema.leases_in_all is not None:
        share = schema.leases_used / schema.leases_in_all
        lines += _row("message ids", "", f"{schema.leases_used:,} of {schema.leases_in_all:,} leases ({share:.4%})", "")
    lines += ["", "settings", *(f"  {name:26} {value}" for name, value in status.settings.items() if value != "")]
    lines += ["", "problems" if status.problems else "no problems", *(f"  {problem}" for problem in status.problems)]
    return "\n".join(printable(line.rstrip()) for line in lines)


def _migrations(schema: Schema) -> str:
    if schema.applied is None or schema.pending is None:
        return "migrations unknown"
    newer = f", {len(schema.newer)} of a newer version" if schema.newer else ""
    return f"{len(schema.applied)} migrations applied, {len(schema.pending)} pending{newer}"


def _row(kind: str, name: str, state: str, problem: str) -> list[str]:
    mark = "✗" if problem else "✓"
    shown = f"{mark} {kind:12} {name:30} {state.strip()}" if name else f"{mark} {kind:12} {state.strip()}"
    return [shown, *([f"    {problem}"] if problem else [])]
