"""What can break: faults as small functions, and SCENARIOS, the table of what each may cost its callers.

A fault breaks something on entry and mends it on exit; what lies between is up to who plays it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import asyncpg

from testbed import NET_TICK_S, Gateway, RabbitMQ, Server
from tests.faults.client import Load
from tests.faults.jumping_clock import JumpingClockGateway
from tests.faults.reader import Reader
from tests.faults.stand import QUICK, Stand, at_once
from tests.support.eventually import eventually
from tests.support.tcp_proxy import TcpProxy

PROMISES = {
    1: "a counted message is in the queue, whatever dies right after",
    3: "nothing is counted that was returned, refused or merely written",
    4: "503 means that nothing of the request was queued",
    5: "a retry with the same Idempotency-Key gives the consumer each message once",
    8: "under overload goodput stays above 80 % of the peak, latency under the deadline, memory under its bound",
    9: "no request outlives its deadline, and service resumes within 10 s of the fault's end",
    11: "a rolling restart fails no request",
    15: "nothing leaks",
}
QUEUE_LIMIT = 200  # messages; quorum queues overshoot it by what is on its way
REPEAT_EVERY_S = 0.3
GAP_S = 1.5  # longer than the short heartbeat, so that every connection has lost something
TERMINATE_BACKENDS = """
    SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'sms-gateway'
"""


@dataclass(frozen=True)
class Play:
    """What a fault can lay hands on."""

    stand: Stand
    reader: Reader | None  # None: the reference consumer reads


Fault = Callable[[Play], AbstractAsyncContextManager[None]]


# Servers that die, hang, and come back


async def leader(play: Play) -> Server:
    return await play.stand.leader()


async def publishers_node(play: Play) -> Server:
    return await play.stand.publishers_node()


async def one_gateway(play: Play) -> Server:
    return play.stand.gateways[0]


async def database(play: Play) -> Server:
    return play.stand.databases.primary


def killed(find: Callable[[Play], Awaitable[Server]]) -> Fault:
    """SIGKILL; started again at the end."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        server = await find(play)
        await asyncio.to_thread(server.kill)
        try:
            yield
        finally:
            await asyncio.to_thread(server.start)

    return fault


def paused(find: Callable[[Play], Awaitable[Server]]) -> Fault:
    """SIGSTOP; SIGCONT at the end."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        server = await find(play)
        await asyncio.to_thread(server.pause)
        paused_at = time.monotonic()
        try:
            yield
        finally:
            await asyncio.to_thread(server.resume)
            if isinstance(server, RabbitMQ) and time.monotonic() - paused_at > NET_TICK_S / 2:
                play.stand.may_be_partitioned = True

    return fault


@asynccontextmanager
async def quorum_lost(play: Play) -> AsyncIterator[None]:
    """Two of the three nodes are stopped in good order, the leader among them."""
    leading = await play.stand.leader()
    following = next(node for node in play.stand.cluster.nodes if node is not leading)
    await at_once([leading, following], "stop")
    try:
        yield
    finally:
        await at_once([leading, following], "start")


@asynccontextmanager
async def database_stopped(play: Play) -> AsyncIterator[None]:
    """PostgreSQL's "immediate" shutdown: a crash, as far as its clients and its data can tell."""
    primary = play.stand.databases.primary
    await asyncio.to_thread(primary.crash)
    try:
        yield
    finally:
        await asyncio.to_thread(primary.start)


@asynccontextmanager
async def database_failed_over(play: Play) -> AsyncIterator[None]:
    """The primary dies, and the standby becomes the primary; a new standby is made afterwards."""
    await asyncio.to_thread(play.stand.databases.promote)
    try:
        yield
    finally:
        await asyncio.to_thread(play.stand.databases.rebuild_standby)


@asynccontextmanager
async def rolling_restart(play: Play) -> AsyncIterator[None]:
    """As a deployment does it: the next one only when the last one is back behind the balancer."""
    balancer = play.stand.balancer
    assert balancer is not None
    for gateway in play.stand.gateways:
        await asyncio.to_thread(gateway.stop)
        await asyncio.to_thread(gateway.start)
        await eventually(lambda: len(balancer.up()) == len(balancer.backends))
    yield


# Servers that refuse


def alarm(resource: Literal["memory", "disk"]) -> Fault:
    """The broker blocks all publishers."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        node = play.stand.cluster.nodes[0]
        await asyncio.to_thread(node.alarm, True, resource)
        try:
            yield
        finally:
            await asyncio.to_thread(node.alarm, False, resource)

    return fault


@asynccontextmanager
async def queue_full(play: Play) -> AsyncIterator[None]:
    """Nobody reads, and the queue has a limit, with `reject-publish`."""
    stand, reader = play.stand, play.reader
    assert reader is not None
    limit = f'{{"max-length": {QUEUE_LIMIT}, "overflow": "reject-publish"}}'
    ctl = stand.cluster.nodes[0].ctl
    await asyncio.to_thread(ctl, "set_policy", "--apply-to", "queues", stand.queue, f"^{stand.queue}$", limit)
    await reader.pause()
    try:
        yield
    finally:
        reader.resume()
        await asyncio.to_thread(ctl, "clear_policy", stand.queue)


@asynccontextmanager
async def binding_deleted(play: Play) -> AsyncIterator[None]:
    name = play.stand.queue
    async with play.stand.broker_channel() as channel:
        queue = await channel.get_queue(name, ensure=False)
        await queue.unbind(name, routing_key=name)
        try:
            yield
        finally:
            await queue.bind(name, routing_key=name)


@asynccontextmanager
async def backends_terminated(play: Play) -> AsyncIterator[None]:
    connection = await asyncpg.connect(play.stand.databases.primary.url)

    async def terminate() -> None:
        await connection.execute(TERMINATE_BACKENDS)

    try:
        async with _repeated(terminate):
            yield
    finally:
        await connection.close()


# The network


def to_broker(play: Play) -> list[TcpProxy]:
    return play.stand.broker_proxies


def to_database(play: Play) -> list[TcpProxy]:
    return play.stand.database_proxies


def black_hole(find: Callable[[Play], list[TcpProxy]]) -> Fault:
    """Nothing passes, nobody is told."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        for proxy in find(play):
            proxy.black_hole()
        try:
            yield
        finally:
            for proxy in find(play):
                proxy.pass_through()

    return fault


def half_open(find: Callable[[Play], list[TcpProxy]]) -> Fault:
    """The other side has forgotten all connections: they stay open and silent, and new ones are fine."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        async with black_hole(find)(play):
            await asyncio.sleep(GAP_S)
        yield

    return fault


def resets(find: Callable[[Play], list[TcpProxy]]) -> Fault:
    """Every connection is cut, again and again."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        async def reset() -> None:
            for proxy in find(play):
                proxy.reset()

        async with _repeated(reset):
            yield

    return fault


@asynccontextmanager
async def _repeated(action: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Again and again until the end of the block; what the action raises ends the block."""

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
async def clock_jumps(play: Play) -> AsyncIterator[None]:
    """The wall clock goes back and forth while deadlines run: the broker is silent."""
    async with black_hole(to_broker)(play):
        for offset_s in (3600.0, -7200.0):
            for gateway in play.stand.gateways:
                assert isinstance(gateway, JumpingClockGateway)
                gateway.jump(offset_s)
            await asyncio.sleep(0.5)
        yield


def together(*faults: Fault) -> Fault:
    """Several at once; mended in reverse order."""

    @asynccontextmanager
    async def fault(play: Play) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            for each in faults:
                await stack.enter_async_context(each(play))
            yield

    return fault


STEADY = Load()
KEYED = Load(keyed=True)


@dataclass(frozen=True)
class Scenario:
    """A fault under steady load, and what it may cost."""

    name: str
    fault: Fault
    promises: tuple[int, ...] = (1, 3, 4, 9, 15)
    faults: int = 1  # at once
    hold_s: float = 3.0  # how long it stays broken
    load: Load = STEADY
    gateways: int = 2
    gateway: type[Gateway] = Gateway
    settings: Mapping[str, str] = field(default_factory=lambda: QUICK)
    hurts_broker: bool = False  # which must then be ours
    stops_gateways: bool = False  # nobody keeps a deadline while the gateway itself is stopped or dead
    balanced: bool = False  # callers go through HAProxy
    flawless: bool = False  # not a single request may fail
    is_short: bool = False  # belongs to the ordinary test run

    @property
    def deadline_s(self) -> float:
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
    Scenario("binding_deleted", binding_deleted, hold_s=1),
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
    replace(scenario, name=f"{scenario.name}_exactly_once", load=KEYED, promises=(*scenario.promises, 5))
    for scenario in FAST
    if scenario.name in ("gateway_killed", "publishers_node_killed", "leader_paused", "memory_alarm", "broker_resets")
    or scenario.name.startswith("database_")
]
# Here nothing breaks, so no wait may end early because the machine itself stood still for a moment.
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
    load=Load(workers=24, batch=5, every_s=0.02),  # many and small: some request is always on its way
)
# As they run in production, with all that waits waiting its full time.
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
# The ordinary test run takes one of each kind; the others differ in place, not in what they show.
SHORT = (
    *("leader_killed", "leader_paused", "publishers_node_killed", "gateway_paused", "quorum_lost", "queue_full"),
    *("binding_deleted", "database_paused", "database_backends_terminated", "database_failed_over"),
    *("broker_half_open", "broker_resets", "clock_jumps"),
    *("gateway_killed_exactly_once", "memory_alarm_exactly_once", "rolling_restart"),
)
SCENARIOS = {
    scenario.name: replace(scenario, is_short=scenario.name in SHORT)
    for scenario in (
        *FAST,
        *ONCE,
        ROLLING,
        replace(ROLLING, name="rolling_restart_default_settings", settings={}),
        BOTH,
        *DEFAULTS,
    )
}
