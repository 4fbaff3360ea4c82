"""Run one scenario: steady load, a fault, its end, recovery. Then compare callers with consumers."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from testbed import Footprint, HaProxy, ServerError
from tests.faults.client import SteadyLoad
from tests.faults.deployment import Deployment
from tests.faults.exactly_once import ReferenceConsumer
from tests.faults.ledger import Fault, Findings, compare
from tests.faults.reader import Reader
from tests.faults.scenarios import Context, Scenario

START_LIMIT_S = 60.0
BEFORE_S = 0.5  # of load on the healthy deployment
AFTER_S = 1.0  # without a failure: the deployment has recovered
RECOVERY_LIMIT_S = 10.0
ROOM_S = 0.5  # beyond a request's deadline
RECOVERY_PATIENCE_S = 40.0  # beyond the limit, to know how long it took
SETTLE_S = 10.0
# Buffers of messages in flight, which Python keeps for the next time; a soak shows a leak.
MEMORY_GROWTH_MB = 50.0
# The pools of connections to database and broker may have been smaller before.
DESCRIPTOR_GROWTH = 7


class Report(msgspec.Struct, kw_only=True):
    """The result of one run of a scenario. `broken` describes each broken promise."""

    scenario: str
    faults: int
    findings: Findings
    fault_s: float
    resident_mb: list[float]
    descriptors: list[int]
    broken: list[str]


def silence_consumers() -> None:
    """Silence the log of the consumers: that a fault ends their connections is expected."""
    for name in ("aio_pika", "aiormq", "examples"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


async def try_scenario(
    deployment: Deployment, scenario: Scenario, failures: list[str], *, hold_s: float | None = None
) -> Report | None:
    """Run a scenario. When the deployment fails, print the reason, append it to `failures` and return None."""
    try:
        return await run_scenario(deployment, scenario, room_s=ROOM_S, hold_s=hold_s)
    except (ServerError, TimeoutError, OSError) as error:
        failures.append(f"{scenario.name}: {type(error).__name__} {error}")
        print(failures[-1], flush=True)
        return None


async def run_scenario(
    deployment: Deployment, scenario: Scenario, *, room_s: float, hold_s: float | None = None
) -> Report:
    """Run a scenario once, and leave a whole deployment behind.

    A request may take `room_s` longer than its deadline. `hold_s` replaces the scenario's own. Exceptions of the fault
    and the deployment are raised; broken promises are in the report.
    """
    try:
        return await _run(deployment, scenario, room_s=room_s, hold_s=hold_s)
    except BaseException:
        # A scenario that failed half-way leaves nothing to the next one.
        await deployment.stop_gateways()
        raise
    finally:
        await deployment.heal()


async def _run(deployment: Deployment, scenario: Scenario, *, room_s: float, hold_s: float | None) -> Report:
    await deployment.serve(scenario.settings, scenario.gateways, gateway=scenario.gateway)
    async with AsyncExitStack() as stack:
        targets = await stack.enter_async_context(_targets(deployment, scenario))
        load = SteadyLoad(targets, deployment.caller, scenario.load)
        reader = await _open_reader(stack, deployment, scenario, load)
        before = deployment.footprints()
        async with load:
            await load.serves(timeout=START_LIMIT_S)
            await asyncio.sleep(BEFORE_S)
            began_at = time.monotonic()
            async with scenario.fault(Context(deployment, reader if isinstance(reader, Reader) else None)):
                await asyncio.sleep(scenario.hold_s if hold_s is None else hold_s)
            fault = Fault(began_at, time.monotonic())
            await _recover(load, fault.ended_at)
        await reader.drain({token for attempt in load.attempts for token in attempt.counted()})
        after = await _settled(deployment, before)
        findings = compare(
            load.attempts,
            reader.consumed,
            fault,
            excused=[fault] if scenario.stops_gateways else [],
            expected_statuses=_expected(scenario),
            handed_on=reader.handed_on if isinstance(reader, ReferenceConsumer) else None,
        )
    broken = findings.broken_promises(
        deadline_s=scenario.deadline_s, room_s=room_s, recovery_limit_s=RECOVERY_LIMIT_S
    ) + _leaks(before, after)
    return Report(
        scenario=scenario.name,
        faults=scenario.faults,
        findings=findings,
        fault_s=fault.ended_at - fault.began_at,
        resident_mb=[footprint.resident_mb for footprint in after.values()],
        descriptors=[footprint.descriptors for footprint in after.values()],
        broken=broken,
    )


def _expected(scenario: Scenario) -> tuple[int, ...]:
    """Return the statuses that the scenario excuses; any other is a defect."""
    if scenario.flawless:
        return (200,)
    in_progress = (409,) if scenario.load.keyed else ()
    no_answer = (0,) if scenario.stops_gateways else ()
    return (200, 503, 504, *in_progress, *no_answer)


@asynccontextmanager
async def _targets(deployment: Deployment, scenario: Scenario) -> AsyncIterator[list[str]]:
    """Yield the URLs that callers send to: one per gateway, or that of a load balancer in front of all."""
    if not scenario.balanced:
        yield [gateway.url for gateway in deployment.gateways]
        return
    deployment.balancer = HaProxy([(gateway.port.number, gateway.ops_port.number) for gateway in deployment.gateways])
    try:
        await asyncio.to_thread(deployment.balancer.start)
        yield [deployment.balancer.url]
    finally:
        await asyncio.to_thread(deployment.balancer.close)
        deployment.balancer = None


async def _open_reader(
    stack: AsyncExitStack, deployment: Deployment, scenario: Scenario, load: SteadyLoad
) -> Reader | ReferenceConsumer:
    if scenario.load.keyed:
        return await stack.enter_async_context(ReferenceConsumer(deployment, load.name))
    return await stack.enter_async_context(Reader(deployment.amqp_urls, deployment.queue, load.name))


async def _recover(load: SteadyLoad, ended_at: float) -> None:
    """Return when nothing has failed for AFTER_S, or when the time for a recovery is over."""
    while time.monotonic() < ended_at + RECOVERY_LIMIT_S + RECOVERY_PATIENCE_S:
        recently = time.monotonic() - AFTER_S
        if recently > ended_at and load.served_since(recently) and not load.failed_since(recently):
            return
        await asyncio.sleep(0.05)


async def _settled(deployment: Deployment, before: dict[int, Footprint]) -> dict[int, Footprint]:
    """Return the gateways' footprints afterwards, once they have released what belonged to the callers."""
    until = time.monotonic() + SETTLE_S
    while True:
        after = deployment.footprints()
        if not _leaks(before, after) or time.monotonic() > until:
            return after
        await asyncio.sleep(0.2)


def _leaks(before: dict[int, Footprint], after: dict[int, Footprint]) -> list[str]:
    """Describe the growth of each process that ran before and after; one that was restarted has no `before`."""
    leaks = []
    for pid in before.keys() & after.keys():
        grown_mb = after[pid].resident_mb - before[pid].resident_mb
        more = after[pid].descriptors - before[pid].descriptors
        if grown_mb > MEMORY_GROWTH_MB:
            leaks.append(f"a gateway's memory grew by {grown_mb:.0f} MB")
        if more > DESCRIPTOR_GROWTH:
            leaks.append(f"a gateway holds {more} descriptors more than before")
    return leaks
