"""The load test that operators point at a deployment of their own.

Any number of generator processes share the connections (closed loop) or the arrivals (open loop). The test ends when
the time is up or when the server is gone. Thresholds set the exit code, for use in a pipeline.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import urlsplit

import msgspec

from benchmarks.drivers import generator, latency
from benchmarks.drivers.generator import Plan
from benchmarks.drivers.latency import Latencies
from benchmarks.drivers.workers import Result, Tick, start_workers
from benchmarks.report import machine, plots
from benchmarks.report.document import Cell, Chart, Report, Sentence, Table
from benchmarks.report.figures import short
from benchmarks.report.machine import Machine


class ExitCode(IntEnum):
    """The exit status of the command."""

    FINE = 0
    THRESHOLD_BROKEN = 1  # or nothing was accepted
    UNUSABLE = 2  # wrong options, or no server at the address
    SERVER_GONE = 3


class LoadError(Exception):
    """Raised when the load test cannot begin."""


class Thresholds(msgspec.Struct, frozen=True):
    """The limits that set the exit code. None: no limit."""

    max_p99_ms: float | None = None
    min_rate: float | None = None  # accepted messages a second
    max_error_rate: float | None = None  # share of requests


class Options(msgspec.Struct, frozen=True):
    """The load, its duration and the thresholds."""

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
    single: bool = False  # single sends; `batch` is 1


class Moment(msgspec.Struct):
    """One interval of the run, over all processes."""

    at_s: float
    messages_per_s: float
    requests_per_s: float
    failures: int
    in_flight: int
    slowest_ms: float


class Outcome(msgspec.Struct):
    """The content of the file that `load --json` writes. Rates and latencies exclude warm-up and ramp."""

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
    """The ticks of all processes, added up in intervals of a second."""

    def __init__(self, processes: int) -> None:
        self.moments: list[Moment] = []
        self._in_flight = [0] * processes

    def add(self, process: int, tick: Tick) -> Moment:
        """Add a tick and return the interval that it falls into."""
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
    """Run the load test. The key is not part of the options, so that no report shows it.

    Raises LoadError if the server does not accept the key.
    """
    if (status := status_of_dry_run(options, key)) in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        raise LoadError(f"the server answers {status} to the API key: give --key, or set SMS_API_KEY")
    described = machine.describe()
    timeline = Timeline(options.processes)
    with start_workers(generator.__name__, _plans(options, key)) as generators:
        generators.wait_until_ready()
        generators.start(options.warm_up_s + options.ramp_s, options.duration_s)
        results = generators.watch(lambda process, tick: on_moment(timeline.add(process, tick)))
    return judge(described, options, results, timeline.moments)


def status_of_dry_run(options: Options, key: str) -> int | None:
    """Send one message that is not queued, and return the status of the answer; None without one."""
    url = urlsplit(options.url)
    path = url.path.rstrip("/") or (generator.SINGLE_PATH if options.single else generator.PATH)
    message = {"to": "+14155551234", "list_number": options.list_numbers[0], "body": "x"}
    body = (message if options.single else {"messages": [message]}) | {"dry_run": True}
    connect = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = connect(url.hostname or "", url.port, timeout=options.timeout_s)
    try:
        headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        connection.request("POST", path, msgspec.json.encode(body), headers)
        return connection.getresponse().status
    except (OSError, HTTPException, ValueError):  # the generators report it
        return None
    finally:
        connection.close()


def _plans(options: Options, key: str) -> list[Plan]:
    """Return a plan for each process. Connections are divided, arrivals are taken in turn."""
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
            form=generator.SINGLE if options.single else "",
        )
        for number in range(options.processes)
    ]


def judge(described: Machine, options: Options, results: Sequence[Result], moments: Sequence[Moment]) -> Outcome:
    """Add up the counts of the processes and check the thresholds."""
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
        # Without the run-out, when no more requests are sent.
        moments=sorted((one for one in moments if one.at_s < options.duration_s), key=lambda moment: moment.at_s),
        first_failure=next((result.first_failure for result in results if result.first_failure), ""),
        broken=[],
        ended_early=next((result.ended_early for result in results if result.ended_early), ""),
    )
    outcome.broken = broken_thresholds(outcome)
    return outcome


def broken_thresholds(outcome: Outcome) -> list[str]:
    """Return a sentence for each threshold that does not hold, and one if nothing was accepted."""
    limits = outcome.options.thresholds
    p99 = outcome.latencies.at(99)
    sentences = []
    # With bad messages alone (--bad-share 1) a request succeeds, although nothing of it is accepted.
    if not outcome.messages_per_s and (outcome.failures or not outcome.requests):
        sentences.append("no message was accepted")
    if limits.max_p99_ms is not None and p99 > limits.max_p99_ms:
        sentences.append(f"p99 is {p99:,.1f} ms, at most {limits.max_p99_ms:,.1f} ms are allowed")
    if limits.min_rate is not None and outcome.messages_per_s < limits.min_rate:
        sentences.append(
            f"{outcome.messages_per_s:,.0f} messages/s were accepted, at least {limits.min_rate:,.0f} are required"
        )
    if limits.max_error_rate is not None and outcome.error_rate > limits.max_error_rate:
        sentences.append(f"{outcome.error_rate:.2%} of the requests failed, at most {limits.max_error_rate:.2%} may")
    return sentences


class Progress:
    """The state of a load test as lines of text, one for each whole second."""

    def __init__(self, options: Options, on_line: Callable[[int, str], None]) -> None:
        """Call `on_line(second, line)` once for each second of the run."""
        self._before_s = options.warm_up_s + options.ramp_s
        self._total_s = self._before_s + options.duration_s
        self._on_line = on_line
        self._current: Moment | None = None

    def add(self, moment: Moment) -> None:
        """Report the last second, once the next one has begun."""
        done, self._current = self._current, moment
        if done is None or done is moment:
            return
        passed = round(done.at_s + 1 + self._before_s)
        phase = "warm-up " if done.at_s < 0 else ""
        self._on_line(
            passed,
            f"{phase}{passed} of {self._total_s:.0f} s · {short(done.messages_per_s)} msg/s · "
            f"{short(done.requests_per_s)} requests/s · {done.in_flight} in flight · "
            f"slowest {short(done.slowest_ms)} ms · {done.failures} failed",
        )


def report(outcome: Outcome) -> Report:
    """Return rates, latencies, answers, and what broke a threshold."""
    options, moments, latencies = outcome.options, outcome.moments, outcome.latencies
    arrivals = f"open loop, {options.rate:,.0f} msg/s due" if options.rate else "closed loop"
    percentiles: list[list[Cell]] = [[f"{name} %", f"{value:,.2f}"] for name, value in latencies.percentiles_ms.items()]
    seconds = "seconds of measurement"
    rates = {"gateway": [(moment.at_s, moment.messages_per_s) for moment in moments]}
    slowest = {"gateway": [(moment.at_s, moment.slowest_ms) for moment in moments]}
    since_due = ", from the moment a request was due" if options.rate else ""
    failure = [Sentence(f"The first failure was {outcome.first_failure}")] if outcome.first_failure else []
    requests = "single sends" if options.single else f"batches of {options.batch:,}"
    return Report(
        f"Load test of {options.url}",
        outcome.machine,
        [
            Sentence(
                f"{arrivals}, {options.connections} connections, {requests}, "
                f"{options.bad_share:.0%} bad messages, texts of {options.body_length} characters, "
                f"{options.duration_s:g} s after {options.warm_up_s + options.ramp_s:g} s of warm-up and ramp"
            ),
            Sentence(
                f"{short(outcome.messages_per_s)} messages/s accepted, {short(outcome.requests_per_s)} requests/s, "
                f"{outcome.failures} of {outcome.requests} requests failed ({outcome.error_rate:.2%}); "
                f"answers by status: {outcome.statuses}; the generator took {outcome.generator_cpu:.2f} cores"
            ),
            Chart("Accepted messages a second", plots.lines(rates, x_label=seconds, y_label="messages/s")),
            Chart(
                "Latency by percentile",
                plots.lines(
                    {"gateway": latencies.curve_ms},
                    x_label="share of requests that were answered within",
                    y_label="ms",
                    x_ticks=plots.PERCENTILE_TICKS,
                    scale_x=plots.percentile_scale,
                ),
            ),
            Chart("Slowest request of each second", plots.lines(slowest, x_label=seconds, y_label="ms")),
            Table(f"Latency, ms{since_due}", ["percentile", "ms"], percentiles),
            *failure,
            *(Sentence(text, is_bad=True) for text in (outcome.ended_early, *outcome.broken) if text),
        ],
    )
