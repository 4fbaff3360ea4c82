"""Faults as small functions, and SCENARIOS, the table of what each fault may cost its callers.

A fault is a context manager: it breaks something on entry and mends it on exit. The runner decides how long it lasts.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import aiohttp
import asyncpg

from gateway.cli.admin import open_admin
from testbed import NET_TICK_S, Gateway, RabbitMQ, Server, ServerError, in_parallel
from tests.faults.client import Load, SteadyLoad
from tests.faults.deployment import QUICK, Deployment, start_all
from tests.faults.jumping_clock import JumpingClockGateway
from tests.faults.reader import Reader
from tests.support.callers import SEND_PATH, make_caller
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

QUEUE_LIMIT = 200  # messages; quorum queues overshoot it by what is on its way
SIZE_LIMIT = 262_144  # bytes of a message
RECOVERY_S = 10.0  # promise 9
AFTER_RESET_S = 2.0  # then all connections are open again
REPEAT_EVERY_S = 0.3
GAP_S = 1.5  # longer than the short heartbeat, so that every connection has lost something
TERMINATE_BACKENDS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'sms-gateway'
"""


@dataclass(frozen=True)
class Context:
    """The things that a fault can break. `reader` is None when the reference consumer reads."""

    deployment: Deployment
    reader: Reader | None


Fault = Callable[[Context], AbstractAsyncContextManager[None]]


# Servers that die, hang, and come back


async def leader(context: Context) -> Server:
    """Find the broker's node that leads the queue."""
    return await context.deployment.leader()


async def publishers_node(context: Context) -> Server:
    """Find the broker's node that the gateways send most to."""
    return await context.deployment.publishers_node()


async def one_gateway(context: Context) -> Server:
    """Find the first gateway."""
    return context.deployment.gateways[0]


async def database(context: Context) -> Server:
    """Find the primary."""
    return context.deployment.databases.primary


def killed(find: Callable[[Context], Awaitable[Server]]) -> Fault:
    """Kill a server with SIGKILL; start it again at the end."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        server = await find(context)
        await asyncio.to_thread(server.kill)
        try:
            yield
        finally:
            await asyncio.to_thread(server.start)

    return fault


def paused(find: Callable[[Context], Awaitable[Server]]) -> Fault:
    """Freeze a server with SIGSTOP; SIGCONT at the end."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        server = await find(context)
        await asyncio.to_thread(server.pause)
        paused_at = time.monotonic()
        try:
            yield
        finally:
            await asyncio.to_thread(server.resume)
            if isinstance(server, RabbitMQ) and time.monotonic() - paused_at > NET_TICK_S / 2:
                context.deployment.may_be_partitioned = True

    return fault


@asynccontextmanager
async def quorum_lost(context: Context) -> AsyncIterator[None]:
    """Stop two of the three nodes in an orderly way, the leader among them."""
    leading = await context.deployment.leader()
    following = next(node for node in context.deployment.cluster.nodes if node is not leading)
    await asyncio.to_thread(in_parallel, [leading.stop, following.stop])
    try:
        yield
    finally:
        await start_all([leading, following])


@asynccontextmanager
async def database_stopped(context: Context) -> AsyncIterator[None]:
    """Let the primary crash; start it again at the end."""
    primary = context.deployment.databases.primary
    await asyncio.to_thread(primary.crash)
    try:
        yield
    finally:
        await asyncio.to_thread(primary.start)


@asynccontextmanager
async def database_failed_over(context: Context) -> AsyncIterator[None]:
    """Kill the primary and promote the standby; make a new standby afterwards."""
    await asyncio.to_thread(context.deployment.databases.promote)
    try:
        yield
    finally:
        await asyncio.to_thread(context.deployment.databases.rebuild_standby)


@asynccontextmanager
async def rolling_restart(context: Context) -> AsyncIterator[None]:
    """Restart the gateways one after the other, each when the one before is back behind the load balancer."""
    balancer = context.deployment.balancer
    assert balancer is not None
    for gateway in context.deployment.gateways:
        await asyncio.to_thread(gateway.stop)
        await asyncio.to_thread(gateway.start)
        await eventually(lambda: len(balancer.up()) == len(balancer.backends))
    yield


# Servers that refuse


def alarm(resource: Literal["memory", "disk"]) -> Fault:
    """Raise a resource alarm: the broker blocks all publishers."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        node = context.deployment.cluster.nodes[0]
        await asyncio.to_thread(node.alarm, True, resource)
        try:
            yield
        finally:
            await asyncio.to_thread(node.alarm, False, resource)

    return fault


@asynccontextmanager
async def queue_full(context: Context) -> AsyncIterator[None]:
    """Limit the queue with `reject-publish`, and stop reading from it."""
    reader = context.reader
    assert reader is not None
    async with _limited_queue(context.deployment):
        await reader.pause()
        try:
            yield
        finally:
            reader.resume()


@asynccontextmanager
async def policy_cleared(context: Context) -> AsyncIterator[None]:
    """Limit the queue as above. Clear the policy before anything is read: the queue must grow again."""
    deployment, reader = context.deployment, context.reader
    assert reader is not None
    try:
        async with _limited_queue(deployment):
            await reader.pause()
            yield
        async with deployment.broker_channel() as channel, asyncio.timeout(RECOVERY_S):
            queue = await channel.declare_queue(deployment.queue, passive=True)
            full = (await queue.declare()).message_count or 0
            while (await queue.declare()).message_count == full:  # noqa: ASYNC110 - the broker reports no such event
                await asyncio.sleep(0.1)
    finally:
        reader.resume()


@asynccontextmanager
async def _limited_queue(deployment: Deployment) -> AsyncIterator[None]:
    limit = f'{{"max-length": {QUEUE_LIMIT}, "overflow": "reject-publish"}}'
    ctl = deployment.cluster.nodes[0].ctl
    await asyncio.to_thread(ctl, "set_policy", "--apply-to", "queues", deployment.queue, f"^{deployment.queue}$", limit)
    try:
        yield
    finally:
        await asyncio.to_thread(ctl, "clear_policy", deployment.queue)


@asynccontextmanager
async def poison_message(context: Context) -> AsyncIterator[None]:
    """Lower the broker's limit on messages, and let an account send larger ones. Not one request of another may fail.

    The connections are reset, because RabbitMQ 3.10 reads the limit when a channel is opened.
    """
    deployment = context.deployment
    url = deployment.gateways[0].url + SEND_PATH
    async with open_admin(deployment.databases.primary.url) as admin:
        sender, clean = await make_caller(admin, "poison"), await make_caller(admin, "clean")
    body = sender.body(1, body="x" * 2 * SIZE_LIMIT)
    codes: set[str] = set()

    async def send() -> None:
        async with aiohttp.request("POST", url, data=body, headers=sender.headers) as response:
            codes.update(row["code"] for row in (await response.json()).get("errors", []))

    limit = await _limit_sizes(context, SIZE_LIMIT)
    await asyncio.sleep(AFTER_RESET_S)
    try:
        async with SteadyLoad([deployment.gateways[0].url], clean, CLEAN) as neighbour, _repeated(send):
            yield
        if failures := [attempt for attempt in neighbour.attempts if not attempt.is_whole]:
            raise ServerError(f"{len(failures)} requests of a clean account failed: {failures[0]}")
        if "queue_rejected" not in codes:
            raise ServerError("the broker has not refused a message above its limit")
    finally:
        await _limit_sizes(context, limit)


async def _limit_sizes(context: Context, max_bytes: int) -> int:
    before = await asyncio.to_thread(context.deployment.cluster.nodes[0].limit_messages, max_bytes)
    for proxy in to_broker(context):
        proxy.reset()
    return before


@asynccontextmanager
async def binding_deleted(context: Context) -> AsyncIterator[None]:
    """Unbind the queue from its exchange; bind it again at the end."""
    name = context.deployment.queue
    async with context.deployment.broker_channel() as channel:
        queue = await channel.get_queue(name, ensure=False)
        await queue.unbind(name, routing_key=name)
        try:
            yield
        finally:
            await queue.bind(name, routing_key=name)


@asynccontextmanager
async def slow_commits(context: Context) -> AsyncIterator[None]:
    """Make every commit of the primary take 10 ms more, as with a synchronous standby."""
    primary = context.deployment.databases.primary
    await asyncio.to_thread(primary.set, commit_delay="10000", commit_siblings="0")
    try:
        yield
    finally:
        await asyncio.to_thread(primary.set, commit_delay="0", commit_siblings="5")


@asynccontextmanager
async def queue_deleted(context: Context) -> AsyncIterator[None]:
    """Delete the queue while it is empty and the gateways are stopped. They have to declare it again."""
    deployment, reader = context.deployment, context.reader
    assert reader is not None
    for gateway in deployment.gateways:
        gateway.pause()
    try:
        async with deployment.broker_channel() as channel:
            queue = await channel.declare_queue(deployment.queue, passive=True)
            while (await queue.declare()).message_count:  # noqa: ASYNC110 - the broker reports no such event
                await asyncio.sleep(0.1)
            await reader.pause()
            await channel.queue_delete(deployment.queue)
    finally:
        for gateway in deployment.gateways:
            gateway.resume()
        reader.resume()
    yield


@asynccontextmanager
async def backends_terminated(context: Context) -> AsyncIterator[None]:
    """End the gateways' sessions on the primary, again and again."""
    connection = await asyncpg.connect(context.deployment.databases.primary.url)

    async def terminate() -> None:
        await connection.execute(TERMINATE_BACKENDS)

    try:
        async with _repeated(terminate):
            yield
    finally:
        await connection.close()


# The network


def to_broker(context: Context) -> list[TcpProxy]:
    """Find the proxies between gateways and broker."""
    return context.deployment.broker_proxies


def to_database(context: Context) -> list[TcpProxy]:
    """Find the proxies between gateways and databases."""
    return context.deployment.database_proxies


def black_hole(find: Callable[[Context], list[TcpProxy]]) -> Fault:
    """Swallow all bytes, without closing a connection."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        for proxy in find(context):
            proxy.black_hole()
        try:
            yield
        finally:
            for proxy in find(context):
                proxy.pass_through()

    return fault


def half_open(find: Callable[[Context], list[TcpProxy]]) -> Fault:
    """Let open connections become silent for ever; new ones are served."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        async with black_hole(find)(context):
            await asyncio.sleep(GAP_S)
        yield

    return fault


def resets(find: Callable[[Context], list[TcpProxy]]) -> Fault:
    """Reset every connection, again and again."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        async def reset() -> None:
            for proxy in find(context):
                proxy.reset()

        async with _repeated(reset):
            yield

    return fault


@asynccontextmanager
async def _repeated(action: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Repeat an action until the end of the block. Raises what the action raises."""

    async def repeat() -> None:
        while True:
            await action()
            await asyncio.sleep(REPEAT_EVERY_S)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(repeat())
        try:
            yield
        finally:
            task.cancel()


# Time, and two at once


@asynccontextmanager
async def clock_jumps(context: Context) -> AsyncIterator[None]:
    """Move the wall clock forward and back while deadlines run, because the broker is silent."""
    async with black_hole(to_broker)(context):
        for offset_s in (3600.0, -7200.0):
            for gateway in context.deployment.gateways:
                assert isinstance(gateway, JumpingClockGateway)
                gateway.jump(offset_s)
            await asyncio.sleep(0.5)
        yield


def together(*faults: Fault) -> Fault:
    """Combine faults; they are mended in reverse order."""

    @asynccontextmanager
    async def fault(context: Context) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in faults:
                await stack.enter_async_context(each(context))
            yield

    return fault


STEADY = Load()
CLEAN = Load(batch=5, every_s=0.02)
KEYED = Load(keyed=True)
FULL_SOCKETS = Load(workers=6, batch=1_000, every_s=1.0)  # in a fault, two batches of each connection wait for room


@dataclass(frozen=True)
class Scenario:
    """A fault under steady load, and what it may cost. `promises` are numbers of docs/reliability.md."""

    name: str
    fault: Fault
    promises: tuple[int, ...] = (1, 3, 4, 9, 15)
    faults: int = 1  # at once
    hold_s: float = 3.0  # the time from breaking to mending
    load: Load = STEADY
    gateways: int = 2
    gateway: type[Gateway] = Gateway
    settings: Mapping[str, str] = field(default_factory=lambda: QUICK)
    hurts_broker: bool = False  # only a private broker may be broken
    stops_gateways: bool = False  # a stopped or dead gateway keeps no deadline
    balanced: bool = False  # callers go through HAProxy
    flawless: bool = False  # not a single request may fail
    is_short: bool = False  # belongs to the ordinary test run

    @property
    def deadline_s(self) -> float:
        """Return the deadline of a request under the scenario's settings."""
        return float(self.settings.get("GATEWAY_CONFIRM_TIMEOUT_S", 10))


FAST = [
    Scenario("leader_killed", killed(leader), hold_s=1, hurts_broker=True),
    Scenario("leader_paused", paused(leader), hold_s=3.5, hurts_broker=True),
    Scenario("publishers_node_killed", killed(publishers_node), hold_s=1, hurts_broker=True),
    Scenario("publishers_node_paused", paused(publishers_node), hold_s=3.5, hurts_broker=True),
    Scenario("gateway_killed", killed(one_gateway), hold_s=1, stops_gateways=True),
    Scenario("gateway_paused", paused(one_gateway), hold_s=4, stops_gateways=True),
    Scenario("quorum_lost", quorum_lost, hold_s=2, hurts_broker=True),
    Scenario("memory_alarm", alarm("memory"), hurts_broker=True),
    Scenario("disk_alarm", alarm("disk"), hurts_broker=True),
    Scenario("queue_full", queue_full, hold_s=2, hurts_broker=True),
    Scenario("policy_cleared", policy_cleared, hold_s=2, hurts_broker=True),
    Scenario("poison_message", poison_message, promises=(1, 3, 4, 9, 10, 15), hurts_broker=True),
    Scenario("binding_deleted", binding_deleted, hold_s=1),
    Scenario("queue_deleted", queue_deleted, hold_s=1, stops_gateways=True),
    Scenario("database_paused", paused(database)),
    Scenario("database_stopped", database_stopped, hold_s=1),
    Scenario("database_backends_terminated", backends_terminated, hold_s=2),
    Scenario("database_failed_over", database_failed_over, hold_s=2),
    Scenario("broker_black_hole", black_hole(to_broker), hold_s=4),
    Scenario("broker_half_open", half_open(to_broker), hold_s=0),
    Scenario("broker_resets", resets(to_broker), hold_s=1.5),
    Scenario("database_black_hole", black_hole(to_database)),
    Scenario("database_half_open", half_open(to_database), hold_s=0),
    Scenario("database_resets", resets(to_database), hold_s=1.5),
    Scenario("clock_jumps", clock_jumps, hold_s=1, gateway=JumpingClockGateway),
]
ONCE = [
    replace(scenario, name=f"{scenario.name}_exactly_once", load=KEYED, promises=tuple(sorted((*scenario.promises, 5))))
    for scenario in FAST
    if scenario.name in ("gateway_killed", "publishers_node_killed", "leader_paused", "memory_alarm", "broker_resets")
    or scenario.name.startswith("database_")
]
# Some batches are written to the broker and some are not yet when it fails (gateway/amqp/connection.py, SOCKET_BYTES).
FULL = [
    replace(scenario, name=f"{scenario.name}_full_sockets", load=FULL_SOCKETS)
    for scenario in FAST
    if scenario.name
    in (
        *("publishers_node_killed", "publishers_node_paused", "leader_paused", "memory_alarm"),
        *("broker_black_hole", "broker_half_open", "broker_resets"),
    )
]
# Nothing breaks here, so no wait may end early when the machine itself stands still for a moment.
PATIENT = {"GATEWAY_DATABASE_TIMEOUT_S": "10", "GATEWAY_DRAIN_DELAY_S": QUICK["GATEWAY_DRAIN_DELAY_S"]}
ROLLING = Scenario(
    "rolling_restart",
    rolling_restart,
    promises=(1, 11),
    settings=PATIENT,
    hold_s=0.5,
    gateways=3,
    balanced=True,
    flawless=True,
    # Many small requests: at any moment some are in flight. And slow uploads, which begin before a drain and end in it.
    load=Load(workers=24, batch=5, every_s=0.02, uploads=6),
)
# Every answer must be stored, so that its repetition is not published again.
SLOW_COMMITS = Scenario(
    "slow_commits_exactly_once",
    slow_commits,
    promises=(1, 3, 4, 5, 9, 15),
    settings=PATIENT,
    flawless=True,
    load=Load(workers=32, batch=1, every_s=0.1, keyed=True, repeated=True),
)
# The default settings, as in production: every wait takes its full time.
DEFAULTS = [
    replace(scenario, name=f"{scenario.name}_default_settings", settings={}, hold_s=15.0 if scenario.hold_s else 0.0)
    for scenario in FAST
    if scenario.name
    in (
        *("leader_paused", "publishers_node_killed", "gateway_killed", "quorum_lost", "memory_alarm", "queue_full"),
        *("database_paused", "broker_black_hole", "broker_half_open", "database_black_hole"),
    )
]
BOTH = Scenario(
    "broker_and_database_black_hole",
    together(black_hole(to_broker), black_hole(to_database)),
    faults=2,
    hold_s=4,
)
# The ordinary test run takes one scenario of each kind; the others show the same in another place.
SHORT = (
    *("leader_killed", "leader_paused", "queue_full", "binding_deleted"),
    *("database_paused", "database_backends_terminated", "database_failed_over"),
    *("broker_half_open", "clock_jumps"),
    *("gateway_killed_exactly_once", "memory_alarm_exactly_once", "rolling_restart"),
)
SCENARIOS = {
    scenario.name: replace(scenario, is_short=scenario.name in SHORT)
    for scenario in (
        *FAST,
        *ONCE,
        *FULL,
        ROLLING,
        replace(ROLLING, name="rolling_restart_default_settings", settings={}),
        BOTH,
        SLOW_COMMITS,
        *DEFAULTS,
    )
}
