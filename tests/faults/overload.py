"""More than can be done: one gateway at 1×, 2×, 5× and 10× of what it can do, in an open loop.

Requests arrive when they are due, whether the gateway keeps up or not. What it accepts must not fall when more is
asked, and what it cannot do it must refuse at once. The callers share the machine with what they measure: the table
says how busy it was, and at 10× they are a good part of it.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from statistics import quantiles
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from tests.faults.client import PATH, Sender
from tests.faults.reader import QUIET_S
from tests.faults.stand import Stand

MULTIPLES = (1, 2, 5, 10)
PEAK = 0  # the multiple of the closed loop that finds the peak
BATCH = 1_000
PEAK_CALLERS = 8
PATIENCE_S = 30.0
SECONDS = 15.0  # of each multiple: what is on its way at the end counts for nothing, and is not to count for much
DEADLINE_S = 10.0
GOODPUT_SHARE = 0.8
MEMORY_MB = 512  # what one process may hold (benchmarks/README.md, bar 7)
SAMPLE_S = 0.1
BROKER_MEMORY = "4GB"
DEPTH_TIMEOUT_S = 30.0  # a busy quorum queue counts a message a moment after confirming it


class Stage(msgspec.Struct):
    """One multiple of the peak, for some seconds."""

    multiple: float  # or PEAK
    asked_per_s: float  # messages
    goodput_per_s: float
    shed_share: float  # of requests
    accepted_p99_s: float
    refused_p99_s: float
    peak_mb: float
    statuses: dict[str, int]


class Overload(msgspec.Struct):
    """Everything that was measured, and what of it breaks a promise."""

    stages: list[Stage]
    counted: int
    unknown: int
    in_queue: int
    broken: list[str]


class _Callers:
    """Send to one gateway, and count; nothing is written down of single messages."""

    def __init__(self, url: str, sender: Sender, session: aiohttp.ClientSession) -> None:
        message = {"to": "+14155551234", "list_number": sender.list_number, "body": "Your code is 1234 {{messageId}}"}
        self._body = msgspec.json.encode({"messages": [message] * BATCH})
        self._headers = {"X-Api-Key": sender.key, "Content-Type": "application/json"}
        self._url = url + PATH
        self._session = session
        self.statuses: Counter[str] = Counter()
        self.accepted: list[tuple[float, float]] = []  # when answered, and how long after it was due
        self.refused: list[tuple[float, float]] = []
        self.counted = 0
        self.unknown = 0

    async def closed_loop(self, until: float) -> None:
        """As much as can be done: each caller sends when its last request has been answered."""

        async def call() -> None:
            while (now := time.monotonic()) < until:
                await self._send(now)

        await asyncio.gather(*(call() for _ in range(PEAK_CALLERS)))

    async def open_loop(self, requests_per_s: float, until: float) -> None:
        """One request every so often, whatever became of the others."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due = began + number / requests_per_s
                if due > until:
                    return
                await asyncio.sleep(due - time.monotonic())
                group.create_task(self._send(due))

    async def _send(self, due: float) -> None:
        """One request; its time runs from the moment it was due."""
        try:
            async with self._session.post(self._url, data=self._body, headers=self._headers) as response:
                answer = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            self.statuses[f"no answer: {type(error).__name__}"] += 1
            self.unknown += BATCH
            return
        now = time.monotonic()
        self.statuses[f"{response.status} {answer.get('code', '')}".strip()] += 1
        if response.status == 200:
            self.accepted.append((now, now - due))
            self.counted += answer["queued_count"]
            self.unknown += sum(1 for row in answer["errors"] if row.get("may_be_queued"))
        else:
            self.refused.append((now, now - due))
            self.unknown += BATCH if response.status == 504 else 0


async def measure(stand: Stand, *, seconds: float = SECONDS, multiples: Sequence[float] = MULTIPLES) -> Overload:
    """Find the peak, then ask for multiples of it. One gateway with default settings, and no proxies between."""
    direct = {"GATEWAY_AMQP_URL": ",".join(stand.amqp_urls), "GATEWAY_DATABASE_URL": stand.databases.url}
    await stand.serve(direct, 1)
    if stand.has_own_broker:
        for node in stand.cluster.nodes:  # nobody reads meanwhile: an alarm would be another scenario
            await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", BROKER_MEMORY)
    stages: list[Stage] = []
    counted = unknown = in_queue = 0
    for multiple in (PEAK, *multiples):
        timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
            _MemoryWatch(stand) as memory,
        ):
            callers = _Callers(stand.gateways[0].url, stand.sender, session)
            began = time.monotonic()
            until = began + seconds
            if multiple == PEAK:
                await callers.closed_loop(until)
            else:
                await callers.open_loop(multiple * stages[0].goodput_per_s / BATCH, until)
        requests = callers.statuses.total()
        in_time = sum(1 for answered_at, _ in callers.accepted if answered_at <= until)
        stages.append(
            Stage(
                multiple=multiple,
                asked_per_s=requests * BATCH / seconds,
                goodput_per_s=in_time * BATCH / seconds,
                shed_share=len(callers.refused) / requests,
                accepted_p99_s=_p99(callers.accepted),
                refused_p99_s=_p99(callers.refused),
                peak_mb=memory.peak_mb,
                statuses=dict(callers.statuses),
            )
        )
        counted += callers.counted
        unknown += callers.unknown
        in_queue += await _empty(stand, callers.counted)
    return Overload(stages, counted, unknown, in_queue, _broken(stages, counted, unknown, in_queue))


def _broken(stages: Sequence[Stage], counted: int, unknown: int, in_queue: int) -> list[str]:
    peak = stages[0].goodput_per_s
    broken = []
    if not counted <= in_queue <= counted + unknown:
        broken.append(f"{counted:,} messages were counted, {unknown:,} unknown, and {in_queue:,} were in the queue")
    for stage in stages[1:]:
        where = f"at {stage.multiple:g}×"
        if stage.goodput_per_s < GOODPUT_SHARE * min(peak, stage.asked_per_s):
            broken.append(f"{where} {stage.goodput_per_s:,.0f} messages/s were counted, at the peak {peak:,.0f}")
        if stage.accepted_p99_s > DEADLINE_S:
            broken.append(f"{where} the 99th percentile of what was accepted is {stage.accepted_p99_s:.1f} s")
        if stage.peak_mb > MEMORY_MB:
            broken.append(f"{where} the gateway held {stage.peak_mb:.0f} MB")
        broken += [
            f"{where} an answer of {status}"
            for status in stage.statuses
            if not status.startswith(("200", "503", "504"))
        ]
    return broken


class _MemoryWatch:
    """The largest memory of the gateway during the `async with` block."""

    def __init__(self, stand: Stand) -> None:
        self._stand = stand
        self.peak_mb = 0.0

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _watch(self) -> None:
        while True:
            (footprint,) = await self._stand.footprints()
            self.peak_mb = max(self.peak_mb, footprint.resident_mb)
            await asyncio.sleep(SAMPLE_S)


async def _empty(stand: Stand, expected: int) -> int:
    """Purge the queue once it holds what it should, or the time is up; how many it held."""
    deadline = time.monotonic() + DEPTH_TIMEOUT_S
    async with stand.broker_channel() as channel:
        while True:
            queue = await channel.declare_queue(stand.queue, passive=True)
            depth = queue.declaration_result.message_count or 0
            if depth >= expected or time.monotonic() > deadline:
                await asyncio.sleep(QUIET_S)  # for what is unknown, and perhaps on its way
                purged = await queue.purge()
                return purged.message_count or 0
            await asyncio.sleep(0.2)


def _p99(times: Sequence[tuple[float, float]]) -> float:
    durations = [took_s for _, took_s in times]
    return quantiles(durations, n=100)[-1] if len(durations) > 1 else max(durations, default=0.0)
