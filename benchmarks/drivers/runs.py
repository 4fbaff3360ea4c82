"""One run of one system under test.

Every run has fresh processes, and an exchange and queues of its own. After the run the messages in the queue are
counted. When their number differs from what was accepted, the run is void and enters no figure.
"""

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import msgspec

from benchmarks.drivers import generator, latency, publisher
from benchmarks.drivers.backends import Backends, Names
from benchmarks.drivers.processes import ServerProcesses, busy_s
from benchmarks.drivers.systems import BARE_PUBLISHER, FASTAPI, FASTAPI_LOGGED, Setup, serving
from benchmarks.drivers.workers import Result, Start, Tick, Workers, start_workers
from testbed import Server

STREAM_SEGMENT_BYTES = 500_000_000  # RabbitMQ's default
MOST_BYTES_OF_AN_SMS = 500  # in a stream, for the texts sent here


class Run(msgspec.Struct):
    """The figures of one run. CPU is in microseconds, user and system, within the measured time."""

    system: str
    setup: Setup
    seconds: float
    requests: int
    messages: int
    failures: int
    p50_ms: float
    p99_ms: float
    client_cpu_us_per_message: float
    server_cpu_us_per_message: float  # of the system under test; for the bare publisher, its own
    server_cpu_us_per_request: float
    broker_cpu_us_per_message: float
    database_cpu_us_per_message: float
    peak_mb: float
    other_cores: float  # cores that other processes took: above some tenths, measure again
    ticks: list[tuple[float, float]]  # (seconds since the measurement began, messages a second)
    void: str = ""  # the reason, when the run enters no figure

    @property
    def messages_per_s(self) -> float:
        return self.messages / self.seconds

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def amqp_messages(setup: Setup, lists: int) -> int:
    """Return the number of AMQP messages of a clean batch. Each list has envelopes of its own, and lists take turns."""
    of_list = [len(range(first, setup.batch, lists)) for first in range(lists)]
    return sum(math.ceil(count / setup.sms_per_message) for count in of_list)


def why_void(results: Sequence[Result], *, expected_depth: int, depth: int, extra: int = 0) -> str:
    """Return the reason why a run is void, or an empty string. `depth` may exceed the true depth by `extra`."""
    failures = sum(result.all_failures for result in results)
    if early := next((result.ended_early for result in results if result.ended_early), ""):
        return early
    if failures:
        statuses: dict[str, int] = {}
        for result in results:
            for status, count in result.statuses.items():
                statuses[status] = statuses.get(status, 0) + count
        return f"{failures} requests failed (answers by status: {statuses})"
    if not expected_depth <= depth <= expected_depth + extra:
        return f"{expected_depth:,} AMQP messages were accepted, {depth:,} are in the queue"
    if not any(result.requests for result in results):
        return "not one request was answered within the measured time"
    return ""


def run(system: str, backends: Backends, setup: Setup) -> Run:
    """Run a system once. Its processes and its queue exist for this run only."""
    shards = 1 if system in (FASTAPI, FASTAPI_LOGGED) else setup.shards
    with backends.names(setup.queue_type, declare=system == BARE_PUBLISHER, shards=shards) as names:
        if system == BARE_PUBLISHER:
            measured = _run_publisher(backends, names, setup)
        else:
            with serving(system, backends, names, setup) as server:
                measured = _run_server(system, backends, names, setup, server)
    return measured


def _run_publisher(backends: Backends, names: Names, setup: Setup) -> Run:
    plan = publisher.Plan(
        amqp_url=backends.servers.amqp_url,
        exchange=names.exchange,
        routing_keys=names.queues(),
        batch=setup.batch,
        sms_per_message=setup.sms_per_message,
        body_length=setup.body_length,
        in_flight=setup.in_flight,
        connections=setup.amqp_connections,
    )
    with start_workers(publisher.__name__, [plan]) as publishers:
        publishers.wait_until_ready()
        return _measure(BARE_PUBLISHER, backends, names, setup, publishers, None)


def _run_server(system: str, backends: Backends, names: Names, setup: Setup, server: Server) -> Run:
    per_process, left = divmod(setup.in_flight, setup.processes)
    plans = [
        generator.Plan(
            url=server.url,
            key=backends.key,
            list_numbers=backends.list_numbers,
            batch=setup.batch,
            connections=per_process + (number < left),
            body_length=setup.body_length,
            all_bad=setup.all_bad,
            form=setup.form,
        )
        for number in range(setup.processes)
    ]
    with start_workers(generator.__name__, plans) as generators:
        generators.wait_until_ready()
        return _measure(system, backends, names, setup, generators, ServerProcesses(server.port.number))


def _measure(
    system: str, backends: Backends, names: Names, setup: Setup, workers: Workers, server: ServerProcesses | None
) -> Run:
    broker = local(backends.servers.amqp_url, 5672)
    database = local(backends.servers.database_url, 5432)
    start = workers.start(setup.warm_up_s, setup.duration_s)
    ticks: list[Tick] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        costs = pool.submit(cpu_during, start, [server, broker, database])
        results = workers.watch(lambda _, tick: ticks.append(tick))
        server_s, broker_s, database_s, machine_s = costs.result()
    peak_mb = server.peak_mb() if server else 0.0
    requests = sum(result.all_requests for result in results)
    messages = sum(result.all_messages for result in results)
    expected = messages
    if setup.sms_per_message > 1 and not setup.all_bad and system not in (FASTAPI, FASTAPI_LOGGED):
        expected = requests * amqp_messages(setup, 1 if system == BARE_PUBLISHER else len(backends.list_numbers))
    extra = _most_snapshots(messages) if setup.queue_type == "stream" else 0
    depth = backends.wait_for_depth(names, setup.queue_type, expected)
    measured = sum(result.messages for result in results)
    measured_requests = sum(result.requests for result in results)
    client_s = sum(result.cpu_s for result in results)
    other_s = machine_s - server_s - broker_s - database_s - client_s
    if server is None:
        server_s = client_s
    latencies = latency.merge(result.latencies for result in results)
    us_per_message = 1e6 / max(measured, 1)
    return Run(
        system=system,
        setup=setup,
        seconds=setup.duration_s,
        requests=measured_requests,
        messages=measured,
        failures=sum(result.failures for result in results),
        p50_ms=latencies.at(50),
        p99_ms=latencies.at(99),
        client_cpu_us_per_message=client_s * us_per_message,
        server_cpu_us_per_message=server_s * us_per_message,
        server_cpu_us_per_request=server_s * 1e6 / max(measured_requests, 1),
        broker_cpu_us_per_message=broker_s * us_per_message,
        database_cpu_us_per_message=database_s * us_per_message,
        peak_mb=peak_mb,
        other_cores=max(0.0, other_s / setup.duration_s),
        ticks=rates(tick for tick in ticks if tick.middle_s < setup.duration_s),  # without the run-out
        void=why_void(results, expected_depth=expected, depth=depth, extra=extra),
    )


def _most_snapshots(messages: int) -> int:
    """Return the largest number of a stream's offsets that belong to no message.

    A stream tells its offsets, not its number of messages. Each segment may have one offset more, for a snapshot of its
    writers. Source: rabbitmq/osiris, osiris_log, evaluate_tracking_snapshot.
    """
    return messages * MOST_BYTES_OF_AN_SMS // STREAM_SEGMENT_BYTES + 1


def rates(ticks: Iterable[Tick]) -> list[tuple[float, float]]:
    """Return throughput over time: (seconds since the measurement began, messages a second), over all workers."""
    width = 0.5
    sums: dict[int, int] = {}
    for tick in ticks:
        place = math.floor(tick.middle_s / width)
        sums[place] = sums.get(place, 0) + tick.messages
    return [((place + 0.5) * width, sums[place] / width) for place in sorted(sums)]


def local(url: str, default_port: int) -> ServerProcesses | None:
    """Return the processes of a server on this machine, or None for a server elsewhere."""
    parts = urlsplit(url.split(",")[0])
    if parts.hostname not in ("127.0.0.1", "localhost"):
        return None
    try:
        return ServerProcesses(parts.port or default_port)
    except LookupError:
        return None


def cpu_during(start: Start, servers: Sequence[ServerProcesses | None]) -> list[float]:
    """Return the CPU seconds of each server, and last of the whole machine, within the measurement."""
    edges = []
    for edge in (start.measure_from, start.measure_until):
        time.sleep(max(0.0, edge - time.monotonic()))
        edges.append([*(server.cpu_s() if server else 0.0 for server in servers), busy_s()])
    return [after - before for before, after in zip(*edges, strict=True)]
