"""The gateway's rate by number of connections, on an empty queue and on a backlog: a series should be flat.

On a shared machine, the broker's rate changes by the second. So each run stands between two runs with the fewest
connections of its series, and is compared with these two alone.

All runs of a backlog share one queue, without consumers, so it only grows. Callers that get 503 send again, at once or
after the answer's Retry-After. A refused request is a figure here, not a reason to void the run.
"""

from collections.abc import Callable, Iterator

import msgspec

from benchmarks.drivers import generator, latency, publisher
from benchmarks.drivers.backends import Backends, Names, open_backends
from benchmarks.drivers.processes import ServerProcesses
from benchmarks.drivers.systems import BASELINE, GATEWAY, Setup, serving
from benchmarks.drivers.workers import start_workers
from benchmarks.report import bars, machine
from benchmarks.report.bars import Bar
from benchmarks.report.document import Cell, Report, Sentence, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine

SERIES = {1_000: (4, 8, 16, 32, 64), 100: (16, 64, 256)}  # batch size → connections
FLAT = 0.85  # the lowest of a series ÷ its highest
FILL_S = 5.0  # the length of one of the bare publisher's runs that make the backlog


class Options(msgspec.Struct, frozen=True):
    """The runs to measure."""

    series: dict[int, tuple[int, ...]] = msgspec.field(default_factory=SERIES.copy)
    backlogs: tuple[int, ...] = (0, 1_000_000)  # messages in the queue at the start
    backoff: tuple[bool, ...] = (False,)  # callers that wait for Retry-After after a 503
    rounds: int = 3
    seconds: float = 10.0
    warm_up_s: float = 2.0
    baseline: str = ""  # the folder of another checkout, measured in turn


class Point(msgspec.Struct, frozen=True):
    """One place of a series."""

    system: str
    backlog: int
    has_backoff: bool
    batch: int
    connections: int


class Reading(msgspec.Struct):
    """One run at a point."""

    point: Point
    messages_per_s: float
    refused_per_s: float
    cpu_us_per_message: float
    p50_ms: float
    p99_ms: float  # of all answers, refusals included
    peak_mb: float
    void: str  # the reason, if the queue does not hold what was accepted
    share: float | None = 1.0  # of the rate of the two runs beside it; None if one of the three is void


class Sweep(msgspec.Struct):
    """The content of the file that `sweep --json` writes."""

    machine: Machine
    options: Options
    readings: list[Reading]
    bars: list[Bar]


def measure(options: Options, on_reading: Callable[[Reading], None]) -> Sweep:
    """Measure all points, round by round. `on_reading` is called with each run as it ends."""
    described = machine.describe()
    readings: list[Reading] = []
    with open_backends() as backends:
        for backlog in options.backlogs:
            for reading in readings_on(backends, options, backlog):
                readings.append(reading)
                on_reading(reading)
    return Sweep(described, options, readings, bars_of(readings))


def readings_on(backends: Backends, options: Options, backlog: int) -> Iterator[Reading]:
    """Run all points on a queue with this backlog. An empty queue is emptied before each run."""
    with backends.names("quorum", declare=True) as names:
        depth = _fill(backends, names, backlog)

        def read(point: Point) -> Reading:
            nonlocal depth
            if not backlog:
                backends.purge(names)
                depth = 0
            reading, depth = _read(options, backends, names, point, depth)
            return reading

        for fewest, others in _series_of(options, backlog):
            before = read(fewest)
            yield before
            for point in others:
                reading, after = read(point), read(fewest)
                is_void = reading.void or before.void or after.void
                beside_per_s = (before.messages_per_s + after.messages_per_s) / 2
                reading.share = None if is_void else reading.messages_per_s / beside_per_s
                yield from (reading, after)
                before = after


def _series_of(options: Options, backlog: int) -> Iterator[tuple[Point, list[Point]]]:
    """Yield each series of each round: the point with the fewest connections, and the others."""
    systems = [GATEWAY, BASELINE] if options.baseline else [GATEWAY]
    for _ in range(options.rounds):
        for has_backoff in options.backoff:
            for batch, series in options.series.items():
                for system in systems:
                    fewest, *others = [Point(system, backlog, has_backoff, batch, each) for each in sorted(series)]
                    yield fewest, others


def _fill(backends: Backends, names: Names, backlog: int) -> int:
    """Publish at least `backlog` messages, and return the depth of the queue."""
    depth = 0
    while depth < backlog:
        plan = publisher.Plan(
            amqp_url=backends.servers.amqp_url,
            exchange=names.exchange,
            routing_keys=names.queues(),
            batch=1_000,
            in_flight=8,
            connections=2,
        )
        with start_workers(publisher.__name__, [plan]) as publishers:
            publishers.wait_until_ready()
            publishers.start(0.0, FILL_S)
            (result,) = publishers.watch()
        depth = backends.wait_for_depth(names, "quorum", depth + result.all_messages)
    return depth


def _read(options: Options, backends: Backends, names: Names, point: Point, depth: int) -> tuple[Reading, int]:
    """Run one point. Return its figures, and the depth of the queue behind it."""
    setup = Setup(queue_type="quorum", baseline=options.baseline)
    with serving(point.system, backends, names, setup) as server:
        plan = generator.Plan(
            url=server.url,
            key=backends.key,
            list_numbers=backends.list_numbers,
            batch=point.batch,
            connections=point.connections,
            honours_retry_after=point.has_backoff,
        )
        processes = ServerProcesses(server.port.number)
        with start_workers(generator.__name__, [plan]) as generators:
            generators.wait_until_ready()
            generators.start(options.warm_up_s, options.seconds)
            cpu_s = processes.cpu_s()
            (result,) = generators.watch()
            cpu_s = processes.cpu_s() - cpu_s
        peak_mb = processes.peak_mb()
    expected = depth + result.all_messages
    found = backends.wait_for_depth(names, "quorum", expected)
    void = "" if found == expected else f"{result.all_messages:,} messages were accepted, {found - depth:,} came"
    latencies = latency.merge([result.latencies])
    reading = Reading(
        point,
        messages_per_s=result.messages / options.seconds,
        refused_per_s=result.failures / options.seconds,
        cpu_us_per_message=cpu_s * 1e6 / max(1, result.all_messages),
        p50_ms=latencies.at(50),
        p99_ms=latencies.at(99),
        peak_mb=peak_mb,
        void=void or result.ended_early,
    )
    return reading, found


def bars_of(readings: list[Reading]) -> list[Bar]:
    """Return for each series of the gateway its lowest share ÷ its highest, and its refusals."""
    found = []
    for series, points in _series(readings).items():
        system, backlog, has_backoff, batch = series
        if system == GATEWAY:
            shares = [figure.median for figure in map(_share, points.values()) if figure is not None]
            name = f"batches of {batch:,}, backlog {backlog:,}{', backoff' if has_backoff else ''}"
            found.append(Bar("10", f"{name}: lowest ÷ highest", Figure.of([min(shares) / max(shares)]), FLAT, True))
            refused = max(one.refused_per_s for runs in points.values() for one in runs)
            found.append(Bar("10", f"{name}: refused a second", Figure.of([refused]), 0, False))
    return found


def _series(readings: list[Reading]) -> dict[tuple[str, int, bool, int], dict[int, list[Reading]]]:
    """Return the valid runs by series, and within a series by connections."""
    found: dict[tuple[str, int, bool, int], dict[int, list[Reading]]] = {}
    for reading in readings:
        point = reading.point
        series = (point.system, point.backlog, point.has_backoff, point.batch)
        if not reading.void:
            found.setdefault(series, {}).setdefault(point.connections, []).append(reading)
    return found


def _share(runs: list[Reading]) -> Figure | None:
    shares = [run.share for run in runs if run.share is not None]
    return Figure.of(shares) if shares else None


def show(reading: Reading) -> str:
    """Return one line about a run."""
    point = reading.point
    return (
        f"{point.system}, backlog {point.backlog:,}, {point.batch:,} × {point.connections}"
        f"{', backoff' if point.has_backoff else ''}: {short(reading.messages_per_s)} msg/s, "
        f"{short(reading.refused_per_s)} refused/s, p50 {short(reading.p50_ms)} ms, p99 {short(reading.p99_ms)} ms, "
        f"CPU {short(reading.cpu_us_per_message)} µs a message, {short(reading.peak_mb)} MB {reading.void}"
    )


def report(sweep: Sweep) -> Report:
    """Return the series as a table."""
    rows: list[list[Cell]] = []
    for (system, backlog, has_backoff, batch), points in _series(sweep.readings).items():
        for connections, runs in points.items():
            name = f"{system}, backlog {backlog:,}{', backoff' if has_backoff else ''}, {batch:,} × {connections}"
            figures = ("messages_per_s", "refused_per_s", "cpu_us_per_message", "p50_ms", "p99_ms", "peak_mb")
            rows.append([name, _share(runs), *(Figure.of(getattr(run, figure) for run in runs) for figure in figures)])
    head = ["series, batch × connections", "÷ fewest", "msg/s", "refused/s", "CPU µs/msg", "p50 ms", "p99 ms", "MB"]
    void = [show(reading) for reading in sweep.readings if reading.void]
    return Report(
        "Rate by number of connections",
        sweep.machine,
        [
            Table(f"{sweep.options.rounds} rounds: median, lowest-highest", head, rows),
            bars.table_of(sweep.bars),
            *(Sentence(f"Void: {line}") for line in void),
        ],
    )
