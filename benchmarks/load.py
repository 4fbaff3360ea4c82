"""What does a deployment stand? The load test that operators point at their own gateway.

Any number of generator processes share the connections (closed loop) or the arrivals (open loop). It ends by itself:
at the end of the time, or when the server is gone. Thresholds set the exit code, for use in a pipeline.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import msgspec

from benchmarks import generator, latency, machine
from benchmarks.generator import Plan
from benchmarks.latency import Latencies
from benchmarks.machine import Machine
from benchmarks.workers import Result, Tick, crew


class ExitCode(IntEnum):
    """What a pipeline sees."""

    FINE = 0
    THRESHOLD_BROKEN = 1
    UNUSABLE = 2  # wrong options, or nobody listens there
    SERVER_GONE = 3


class Thresholds(msgspec.Struct, frozen=True):
    """What must hold; None is not looked at."""

    max_p99_ms: float | None = None
    min_rate: float | None = None  # accepted messages a second
    max_error_rate: float | None = None  # share of requests


class Options(msgspec.Struct, frozen=True):
    """What is sent, for how long, and what must hold."""

    url: str
    list_numbers: tuple[str, ...]
    batch: int
    connections: int
    rate: float  # messages a second that arrive, in an open loop; 0: closed loop
    bad_share: float
    body_length: int
    duration_s: float
    warm_up_s: float
    ramp_s: float
    timeout_s: float
    processes: int
    thresholds: Thresholds


class Moment(msgspec.Struct):
    """One interval of the run, over all processes."""

    at_s: float
    messages_per_s: float
    requests_per_s: float
    failures: int
    in_flight: int
    slowest_ms: float


class Outcome(msgspec.Struct):
    """Everything `load --json` writes. Rates and latencies are of the measured time, after warm-up and ramp."""

    machine: Machine
    options: Options
    messages_per_s: float
    requests_per_s: float
    requests: int
    failures: int
    error_rate: float
    statuses: dict[str, int]  # of the whole run
    latencies: Latencies
    generator_cpu: float  # cores
    moments: list[Moment]
    first_failure: str
    broken: list[str]
    ended_early: str

    @property
    def exit_code(self) -> ExitCode:
        if self.ended_early:
            return ExitCode.SERVER_GONE
        return ExitCode.THRESHOLD_BROKEN if self.broken else ExitCode.FINE


class Timeline:
    """Adds up the ticks of all processes by intervals of a second."""

    def __init__(self, processes: int) -> None:
        self.moments: list[Moment] = []
        self._in_flight = [0] * processes

    def add(self, process: int, tick: Tick) -> Moment:
        """The interval that the tick falls into."""
        second = float(tick.middle_s // 1)
        self._in_flight[process] = tick.in_flight
        moment = next((one for one in reversed(self.moments) if one.at_s == second), None)
        if moment is None:
            moment = Moment(second, 0.0, 0.0, 0, 0, 0.0)
            self.moments.append(moment)
        moment.messages_per_s += tick.messages
        moment.requests_per_s += tick.requests
        moment.failures += tick.failures
        moment.in_flight = sum(self._in_flight)
        moment.slowest_ms = max(moment.slowest_ms, tick.slowest_ms)
        return moment


def run(options: Options, key: str, on_moment: Callable[[Moment], None]) -> Outcome:
    """Send, follow, judge. The key is no part of the options, so that no report shows it."""
    described = machine.describe()
    timeline = Timeline(options.processes)
    with crew(generator.__name__, _plans(options, key)) as generators:
        generators.wait_until_ready()
        generators.start(options.warm_up_s + options.ramp_s, options.duration_s)
        results = generators.watch(lambda process, tick: on_moment(timeline.add(process, tick)))
    return judge(described, options, results, timeline.moments)


def _plans(options: Options, key: str) -> list[Plan]:
    """One for each process: connections are divided, arrivals taken in turn."""
    per_process, left = divmod(options.connections, options.processes)
    return [
        Plan(
            url=options.url,
            key=key,
            list_numbers=list(options.list_numbers),
            batch=options.batch,
            connections=per_process + (number < left),
            body_length=options.body_length,
            bad_share=options.bad_share,
            requests_per_s=options.rate / options.batch,
            ramp_s=options.ramp_s,
            timeout_s=options.timeout_s,
            share=number,
            shares=options.processes,
        )
        for number in range(options.processes)
    ]


def judge(described: Machine, options: Options, results: Sequence[Result], moments: Sequence[Moment]) -> Outcome:
    """Add up what the processes counted, and hold it against the thresholds."""
    latencies = latency.merge(result.latencies for result in results)
    statuses: dict[str, int] = {}
    for result in results:
        for status, count in result.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    requests = sum(result.requests for result in results)
    failures = sum(result.failures for result in results)
    seconds = max(result.seconds for result in results) or options.duration_s  # less when it ended early
    outcome = Outcome(
        machine=described,
        options=options,
        messages_per_s=sum(result.messages for result in results) / seconds,
        requests_per_s=requests / seconds,
        requests=requests,
        failures=failures,
        error_rate=failures / requests if requests else 1.0,
        statuses=statuses,
        latencies=latencies,
        generator_cpu=sum(result.cpu_s for result in results) / seconds,
        # Without the run-out, in which no more requests are sent.
        moments=sorted((one for one in moments if one.at_s < options.duration_s), key=lambda moment: moment.at_s),
        first_failure=next((result.first_failure for result in results if result.first_failure), ""),
        broken=[],
        ended_early=next((result.ended_early for result in results if result.ended_early), ""),
    )
    outcome.broken = broken_thresholds(outcome)
    return outcome


def broken_thresholds(outcome: Outcome) -> list[str]:
    """A sentence for each threshold that does not hold."""
    limits = outcome.options.thresholds
    p99 = outcome.latencies.at(99)
    sentences = []
    if limits.max_p99_ms is not None and p99 > limits.max_p99_ms:
        sentences.append(f"p99 is {p99:,.1f} ms, at most {limits.max_p99_ms:,.1f} ms are allowed")
    if limits.min_rate is not None and outcome.messages_per_s < limits.min_rate:
        sentences.append(
            f"{outcome.messages_per_s:,.0f} messages/s were accepted, {limits.min_rate:,.0f} are asked for"
        )
    if limits.max_error_rate is not None and outcome.error_rate > limits.max_error_rate:
        sentences.append(f"{outcome.error_rate:.2%} of the requests failed, at most {limits.max_error_rate:.2%} may")
    return sentences
