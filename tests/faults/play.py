"""Plays one scenario: steady load, a fault, its end, recovery; then compares what callers and consumers saw."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import msgspec

from testbed import HaProxy
from tests.faults.client import SteadyLoad
from tests.faults.exactly_once import ReferenceConsumer
from tests.faults.ledger import Fault, Findings, compare
from tests.faults.reader import Reader
from tests.faults.scenarios import Play, Scenario
from tests.faults.stand import Footprint, Stand

START_LIMIT_S = 60.0
BEFORE_S = 0.5  # of load on the healthy stand
AFTER_S = 1.0  # without a failure, and it has recovered
RECOVERY_LIMIT_S = 10.0
RECOVERY_PATIENCE_S = 40.0  # beyond the limit, to know how long it took
SETTLE_S = 10.0
MEMORY_GROWTH_MB = 50.0  # buffers of what was in flight, which Python keeps for the next time; a soak shows a leak
DESCRIPTOR_GROWTH = 7  # the pools of connections to database and broker may have been smaller before


class Report(msgspec.Struct, kw_only=True):
    """One scenario, played once."""

    scenario: str
    faults: int
    findings: Findings
    fault_s: float
    resident_mb: list[float]
    descriptors: list[int]
    broken: list[str]


async def play(stand: Stand, scenario: Scenario, *, room_s: float, hold_s: float | None = None) -> Report:
    """Play it once. What the fault or the stand raise is raised; broken promises stand in the report."""
    await stand.serve(scenario.settings, scenario.gateways, gateway=scenario.gateway)
    async with AsyncExitStack() as stack:
        targets = await stack.enter_async_context(_targets(stand, scenario))
        load = SteadyLoad(targets, stand.sender, scenario.load)
        reader = await _open_reader(stack, stand, scenario, load)
        before = _by_process(await stand.footprints())
        async with load:
            await load.serves(timeout=START_LIMIT_S)
            await asyncio.sleep(BEFORE_S)
            began_at = time.monotonic()
            async with scenario.fault(Play(stand, reader if isinstance(reader, Reader) else None)):
                await asyncio.sleep(scenario.hold_s if hold_s is None else hold_s)
            fault = Fault(began_at, time.monotonic())
            await _recover(load, fault.ended_at)
        await reader.drain({token for attempt in load.attempts for token in attempt.counted()})
        after = await _settled(stand, before)
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
    """The answers that the scenario excuses; anything else is a defect."""
    if scenario.flawless:
        return (200,)
    in_progress = (409,) if scenario.load.keyed else ()
    no_answer = (0,) if scenario.stops_gateways else ()
    return (200, 503, 504, *in_progress, *no_answer)


@asynccontextmanager
async def _targets(stand: Stand, scenario: Scenario) -> AsyncIterator[list[str]]:
    """Where callers send: to each gateway, or to the balancer in front of all."""
    if not scenario.balanced:
        yield [gateway.url for gateway in stand.gateways]
        return
    stand.balancer = HaProxy([(gateway.port.number, gateway.ops_port.number) for gateway in stand.gateways])
    try:
        await asyncio.to_thread(stand.balancer.start)
        yield [stand.balancer.url]
    finally:
        await asyncio.to_thread(stand.balancer.close)
        stand.balancer = None


async def _open_reader(
    stack: AsyncExitStack, stand: Stand, scenario: Scenario, load: SteadyLoad
) -> Reader | ReferenceConsumer:
    if scenario.load.keyed:
        return await stack.enter_async_context(ReferenceConsumer(stand, load.name))
    return await stack.enter_async_context(Reader(stand.amqp_urls, stand.queue, load.name))


def _by_process(footprints: list[Footprint]) -> dict[int, Footprint]:
    return {footprint.pid: footprint for footprint in footprints}


async def _recover(load: SteadyLoad, ended_at: float) -> None:
    """Wait until all is well for a while, or patience is at an end: the ledger will tell."""
    while time.monotonic() < ended_at + RECOVERY_LIMIT_S + RECOVERY_PATIENCE_S:
        recently = time.monotonic() - AFTER_S
        if recently > ended_at and load.served_since(recently) and not load.failed_since(recently):
            return
        await asyncio.sleep(0.05)


async def _settled(stand: Stand, before: dict[int, Footprint]) -> dict[int, Footprint]:
    """What the gateways hold afterwards, once they have let go of what the callers left."""
    until = time.monotonic() + SETTLE_S
    while True:
        after = _by_process(await stand.footprints())
        if not _leaks(before, after) or time.monotonic() > until:
            return after
        await asyncio.sleep(0.2)


def _leaks(before: dict[int, Footprint], after: dict[int, Footprint]) -> list[str]:
    """What a process holds that it did not hold before; a process that was restarted in between has no before."""
    leaks = []
    for pid in before.keys() & after.keys():
        grown_mb = after[pid].resident_mb - before[pid].resident_mb
        more = after[pid].descriptors - before[pid].descriptors
        if grown_mb > MEMORY_GROWTH_MB:
            leaks.append(f"a gateway's memory grew by {grown_mb:.0f} MB")
        if more > DESCRIPTOR_GROWTH:
            leaks.append(f"a gateway holds {more} descriptors more than before")
    return leaks
