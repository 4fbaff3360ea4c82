"""More than can be done: one gateway at 1×, 2×, 5× and 10× of what it can do, in an open loop.

Requests arrive when they are due, whether the gateway keeps up or not. What it accepts must not fall when more is
asked, and what it cannot do it must refuse at once. What the broker can do changes by the second on a shared machine:
so each multiple runs between two short runs at the peak, is compared with those alone, and the median counts.
"""

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from statistics import fmean, median, quantiles
from types import TracebackType
from typing import Self

import aiohttp
import msgspec

from tests.faults.client import PATH, Sender
from tests.faults.reader import QUIET_S
from tests.faults.stand import Stand

MULTIPLES = (1, 2, 5, 10)
ROUNDS = 3
BATCH = 1_000
PEAK_CALLERS = 8
PATIENCE_S = 30.0
PAUSE_S = 0.2  # of a caller that was refused: Retry-After is whole seconds, too long for a peak
SECONDS = 9.0  # of each run
WARM_UP_S = 2.0  # until as many requests are on their way as will be: what is answered before counts for nothing
DEADLINE_S = 10.0
GOODPUT_SHARE = 0.8
MEMORY_MB = 512  # what one process may hold (benchmarks/README.md, bar 7)
SAMPLE_S = 0.1
BROKER_MEMORY = "4GB"
DEPTH_TIMEOUT_S = 30.0  # a busy quorum queue counts a message a moment after confirming it


class Run(msgspec.Struct):
    """Some seconds of one load."""

    asked_per_s: float  # messages
    goodput_per_s: float
    shed_share: float  # of requests
    accepted_p99_s: float
    refused_p99_s: float
    peak_mb: float
    statuses: dict[str, int]


class Stage(msgspec.Struct):
    """The runs at one multiple of the peak, and what became of the peak's goodput in each."""

    multiple: float
    runs: list[Run]
    peaks_per_s: list[float]  # of the two runs beside each, their mean

    def shares(self) -> list[float]:
        """Goodput of each run, by what could have been had: the peak, or what was asked if that was less."""
        return [
            run.goodput_per_s / min(peak, run.asked_per_s)
            for run, peak in zip(self.runs, self.peaks_per_s, strict=True)
        ]


class Overload(msgspec.Struct):
    """Everything that was measured, and what of it breaks a promise."""

    peaks: list[Run]
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
        """As much as can be done: each caller sends when its last request has been answered, or refused a while ago."""

        async def call() -> None:
            while (now := time.monotonic()) < until:
                if not await self._send(now):
                    await asyncio.sleep(PAUSE_S)

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

    async def _send(self, due: float) -> bool:
        """One request, and whether it was accepted; its time runs from the moment it was due."""
        try:
            async with self._session.post(self._url, data=self._body, headers=self._headers) as response:
                answer = msgspec.json.decode(await response.read())
        except (aiohttp.ClientError, TimeoutError) as error:
            self.statuses[f"no answer: {type(error).__name__}"] += 1
            self.unknown += BATCH
            return False
        now = time.monotonic()
        self.statuses[f"{response.status} {answer.get('code', '')}".strip()] += 1
        if response.status == 200:
            self.accepted.append((now, now - due))
            self.counted += answer["queued_count"]
            self.unknown += sum(1 for row in answer["errors"] if row.get("may_be_queued"))
        else:
            self.refused.append((now, now - due))
            self.unknown += BATCH if response.status == 504 else 0
        return response.status == 200


async def measure(
    stand: Stand, *, rounds: int = ROUNDS, seconds: float = SECONDS, multiples: Sequence[float] = MULTIPLES
) -> Overload:
    """Ask for multiples of the peak, in turn with the peak. One gateway with default settings, no proxies between."""
    direct = {"GATEWAY_AMQP_URL": ",".join(stand.amqp_urls), "GATEWAY_DATABASE_URL": stand.databases.url}
    await stand.serve(direct, 1)
    if stand.has_own_broker:
        for node in stand.cluster.nodes:  # nobody reads meanwhile: an alarm would be another scenario
            await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", BROKER_MEMORY)
    stages = {multiple: Stage(multiple, [], []) for multiple in multiples}
    measured = Overload([], list(stages.values()), 0, 0, 0, [])
    await _run(stand, None, seconds, measured)  # the first is for the broker to find its pace
    measured.peaks.append(await _run(stand, None, seconds, measured))
    for multiple in list(multiples) * rounds:
        before = measured.peaks[-1].goodput_per_s
        run = await _run(stand, multiple * before, seconds, measured)
        measured.peaks.append(await _run(stand, None, seconds, measured))
        stages[multiple].runs.append(run)
        stages[multiple].peaks_per_s.append(fmean((before, measured.peaks[-1].goodput_per_s)))
    measured.broken = _broken(measured)
    return measured


async def _run(stand: Stand, messages_per_s: float | None, seconds: float, measured: Overload) -> Run:
    """One run, at the peak when no rate is given; adds up what was counted and what the queue held."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
        _MemoryWatch(stand) as memory,
    ):
        callers = _Callers(stand.gateways[0].url, stand.sender, session)
        began = time.monotonic()
        until = began + seconds
        if messages_per_s is None:
            await callers.closed_loop(until)
        else:
            await callers.open_loop(messages_per_s / BATCH, until)
    measured.counted += callers.counted
    measured.unknown += callers.unknown
    measured.in_queue += await _empty(stand, callers.counted)
    warm_up_s = min(WARM_UP_S, seconds / 2)
    in_time = sum(1 for answered_at, _ in callers.accepted if began + warm_up_s <= answered_at <= until)
    requests = callers.statuses.total()
    return Run(
        asked_per_s=requests * BATCH / seconds if messages_per_s is None else messages_per_s,
        goodput_per_s=in_time * BATCH / (seconds - warm_up_s),
        shed_share=len(callers.refused) / requests,
        accepted_p99_s=_p99(callers.accepted),
        refused_p99_s=_p99(callers.refused),
        peak_mb=memory.peak_mb,
        statuses=dict(callers.statuses),
    )


def _broken(measured: Overload) -> list[str]:
    broken = []
    if not measured.counted <= measured.in_queue <= measured.counted + measured.unknown:
        broken.append(
            f"{measured.counted:,} messages were counted, {measured.unknown:,} unknown, "
            f"and {measured.in_queue:,} were in the queue"
        )
    for stage in measured.stages:
        where = f"at {stage.multiple:g}×"
        if (share := median(stage.shares())) < GOODPUT_SHARE:
            broken.append(f"{where} goodput was {share:.0%} of the peak")
        if (slowest_s := max(run.accepted_p99_s for run in stage.runs)) > DEADLINE_S:
            broken.append(f"{where} the 99th percentile of what was accepted is {slowest_s:.1f} s")
        if (most_mb := max(run.peak_mb for run in stage.runs)) > MEMORY_MB:
            broken.append(f"{where} the gateway held {most_mb:.0f} MB")
        broken += [
            f"{where} an answer of {status}"
            for status in sorted({status for run in stage.runs for status in run.statuses})
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
