"""Overload: one gateway gets 1×, 2×, 5× and 10× of its peak rate in an open loop.

In an open loop, requests arrive when they are due, whether the gateway keeps up or not. Its goodput must not fall when
the load grows, and it must refuse the excess at once. On a shared machine, the broker's rate changes by the second. So
each run at a multiple stands between two runs at the peak and is compared with these two alone; the median counts.
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

from tests.faults.deployment import Deployment
from tests.faults.reader import QUIET_S
from tests.support.callers import SEND_PATH, Caller

PROMISES_SHOWN = (8,)  # of docs/reliability.md
MULTIPLES = (1, 2, 5, 10)
ROUNDS = 3
BATCH = 1_000
PEAK_CALLERS = 8
PATIENCE_S = 30.0
PAUSE_S = 0.2  # of a caller that was refused: Retry-After is whole seconds, too long for a peak
SECONDS = 9.0  # of each run
WARM_UP_S = 2.0  # until the number of requests in flight is steady; earlier answers do not count
DEADLINE_S = 10.0
GOODPUT_SHARE = 0.8
MEMORY_MB = 512  # what one process may hold (benchmarks/README.md, bar 7)
SAMPLE_S = 0.1
BROKER_MEMORY = "4GB"
DEPTH_TIMEOUT_S = 30.0  # a busy quorum queue counts a message a moment after confirming it


class Run(msgspec.Struct):
    """The figures of one run."""

    asked_per_s: float  # messages
    goodput_per_s: float
    shed_share: float  # of requests
    accepted_p99_s: float
    refused_p99_s: float
    peak_mb: float
    statuses: dict[str, int]


class Stage(msgspec.Struct):
    """The runs at one multiple of the peak."""

    multiple: float
    runs: list[Run]
    peaks_per_s: list[float]  # for each run, the mean goodput of the two peak runs beside it

    def shares(self) -> list[float]:
        """Return each run's goodput as a share of the peak, or of the requested rate if that was lower."""
        return [
            run.goodput_per_s / min(peak, run.asked_per_s)
            for run, peak in zip(self.runs, self.peaks_per_s, strict=True)
        ]


class Overload(msgspec.Struct):
    """The figures of all runs, and a sentence for each broken promise."""

    peaks: list[Run]
    stages: list[Stage]
    counted: int
    unknown: int
    in_queue: int
    broken: list[str]


class _Callers:
    """Callers of one gateway that only count; single messages are not recorded."""

    def __init__(self, url: str, caller: Caller, session: aiohttp.ClientSession) -> None:
        self._body = caller.body(BATCH)
        self._headers = caller.headers
        self._url = url + SEND_PATH
        self._session = session
        self.statuses: Counter[str] = Counter()
        self.accepted: list[tuple[float, float]] = []  # the moment of the answer, and the seconds since it was due
        self.refused: list[tuple[float, float]] = []
        self.counted = 0
        self.unknown = 0

    async def closed_loop(self, until: float) -> None:
        """Send at the peak rate: each caller sends when its last request was answered, or refused PAUSE_S ago."""

        async def call() -> None:
            while (now := time.monotonic()) < until:
                if not await self._send(now):
                    await asyncio.sleep(PAUSE_S)

        await asyncio.gather(*(call() for _ in range(PEAK_CALLERS)))

    async def open_loop(self, requests_per_s: float, until: float) -> None:
        """Send requests at a fixed rate, without waiting for answers."""
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in itertools.count():
                due = began + number / requests_per_s
                if due > until:
                    return
                await asyncio.sleep(due - time.monotonic())
                group.create_task(self._send(due))

    async def _send(self, due: float) -> bool:
        """Send a request and return whether it was accepted. Its time runs from the moment when it was due."""
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
    deployment: Deployment, *, rounds: int = ROUNDS, seconds: float = SECONDS, multiples: Sequence[float] = MULTIPLES
) -> Overload:
    """Run multiples of the peak in turn with the peak, on one gateway with default settings and without proxies."""
    direct = {"GATEWAY_AMQP_URL": ",".join(deployment.amqp_urls), "GATEWAY_DATABASE_URL": deployment.databases.url}
    await deployment.serve(direct, 1)
    if deployment.has_own_broker:
        # Nobody reads meanwhile, and a memory alarm would be another scenario.
        for node in deployment.cluster.nodes:
            await asyncio.to_thread(node.ctl, "set_vm_memory_high_watermark", "absolute", BROKER_MEMORY)
    stages = {multiple: Stage(multiple, [], []) for multiple in multiples}
    measured = Overload([], list(stages.values()), 0, 0, 0, [])
    # The first run warms the broker up.
    await _run(deployment, None, seconds, measured)
    measured.peaks.append(await _run(deployment, None, seconds, measured))
    for multiple in list(multiples) * rounds:
        before = measured.peaks[-1].goodput_per_s
        run = await _run(deployment, multiple * before, seconds, measured)
        measured.peaks.append(await _run(deployment, None, seconds, measured))
        stages[multiple].runs.append(run)
        stages[multiple].peaks_per_s.append(fmean((before, measured.peaks[-1].goodput_per_s)))
    measured.broken = _broken(measured)
    return measured


async def _run(deployment: Deployment, messages_per_s: float | None, seconds: float, measured: Overload) -> Run:
    """Run one load, the peak if no rate is given. Add its counts and the queue's depth to `measured`."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE_S)
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session,
        _MemoryWatch(deployment) as memory,
    ):
        callers = _Callers(deployment.gateways[0].url, deployment.caller, session)
        began = time.monotonic()
        until = began + seconds
        if messages_per_s is None:
            await callers.closed_loop(until)
        else:
            await callers.open_loop(messages_per_s / BATCH, until)
    measured.counted += callers.counted
    measured.unknown += callers.unknown
    measured.in_queue += await _empty(deployment, callers.counted)
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
    """The largest resident memory of the gateway during an `async with` block."""

    def __init__(self, deployment: Deployment) -> None:
        self._deployment = deployment
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
            self.peak_mb = max(self.peak_mb, self._deployment.gateways[0].footprint().resident_mb)
            await asyncio.sleep(SAMPLE_S)


async def _empty(deployment: Deployment, expected: int) -> int:
    """Purge the queue once its depth is the expected one, or after DEPTH_TIMEOUT_S. Return the depth."""
    deadline = time.monotonic() + DEPTH_TIMEOUT_S
    async with deployment.broker_channel() as channel:
        while True:
            queue = await channel.declare_queue(deployment.queue, passive=True)
            depth = queue.declaration_result.message_count or 0
            if depth >= expected or time.monotonic() > deadline:
                # For messages with an unknown outcome, which may still arrive.
                await asyncio.sleep(QUIET_S)
                purged = await queue.purge()
                return purged.message_count or 0
            await asyncio.sleep(0.2)


def _p99(times: Sequence[tuple[float, float]]) -> float:
    durations = [took_s for _, took_s in times]
    return quantiles(durations, n=100)[-1] if len(durations) > 1 else max(durations, default=0.0)
