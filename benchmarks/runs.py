"""One run of one system: the bare publisher, the gateway, or the comparison service, under the same load.

Every run has names of its own on the broker and fresh processes, and is followed by a count of what is in the queue:
when that is not exactly what was accepted, the run is void, and its figures count for nothing.
"""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException
from urllib.parse import urlsplit

import msgspec

from benchmarks import generator, latency, publisher, traffic
from benchmarks.processes import ServerProcesses, busy_s
from benchmarks.stand import Names, Stand
from benchmarks.workers import REPOSITORY, Crew, Result, Start, Tick, crew
from testbed.servers import Gateway, Server

LIMIT, GATEWAY, FASTAPI = "limit", "gateway", "fastapi"
STREAM_SEGMENT_BYTES = 500_000_000  # RabbitMQ's default
MOST_BYTES_OF_AN_SMS = 500  # of ours, in a stream


class Setup(msgspec.Struct, frozen=True):
    """What a run is asked to do; the same for all systems that are compared."""

    batch: int = 1_000
    in_flight: int = 8  # batches: connections of the HTTP client, or batches on the wire of the bare publisher
    queue_type: str = "quorum"
    sms_per_message: int = 1
    shards: int = 1  # queues; of the comparison service always one
    body_length: int = traffic.BODY_LENGTH
    warm_up_s: float = 1.0
    duration_s: float = 3.0
    amqp_connections: int = 2  # of the bare publisher: as many as the gateway has by default
    processes: int = 1  # of the load generator
    settings: dict[str, str] = {}  # of the gateway, beside those that the run needs
    all_bad: str = ""  # one flaw in every message, "format" or "type": nothing is to be queued


class Run(msgspec.Struct):
    """What one run measured. CPU is in microseconds, user and system, over the measured time alone."""

    system: str
    setup: Setup
    seconds: float
    requests: int
    messages: int
    failures: int
    p50_ms: float
    p99_ms: float
    client_cpu_us_per_message: float
    server_cpu_us_per_message: float  # of the system itself; of the bare publisher, its own
    server_cpu_us_per_request: float
    broker_cpu_us_per_message: float
    database_cpu_us_per_message: float
    peak_mb: float
    other_cores: float  # what the rest of the machine was doing meanwhile: above some tenths, measure again
    ticks: list[tuple[float, float]]  # (seconds since the measurement began, messages a second)
    void: str = ""  # why the run counts for nothing

    @property
    def messages_per_s(self) -> float:
        return self.messages / self.seconds

    @property
    def requests_per_s(self) -> float:
        return self.requests / self.seconds


def amqp_messages(setup: Setup, lists: int) -> int:
    """How many AMQP messages a clean batch becomes, when its lists take turns: each list has envelopes of its own."""
    of_list = [len(range(first, setup.batch, lists)) for first in range(lists)]
    return sum(math.ceil(count / setup.sms_per_message) for count in of_list)


def why_void(results: Sequence[Result], *, expected_depth: int, depth: int, extra: int = 0) -> str:
    """Why a run counts for nothing; empty when it counts. `extra`: how much more `depth` may say than there is."""
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


class FastApiService(Server):
    """The comparison service, one uvicorn process."""

    name = "FastAPI"

    def __init__(self, settings: dict[str, str]) -> None:
        super().__init__()
        self.settings = settings

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _environment(self) -> dict[str, str]:
        return super()._environment() | self.settings | {"PYTHONPATH": str(REPOSITORY)}

    def _command(self) -> list[str]:
        options = f"--host 127.0.0.1 --port {self.port} --loop uvloop --http httptools --no-access-log"
        service = ["-m", "uvicorn", "benchmarks.fastapi_service:app", *options.split(), "--log-level", "warning"]
        return [sys.executable, *service]

    def _answers(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port.number, timeout=1.0)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == HTTPStatus.NOT_FOUND
        except (OSError, HTTPException):
            return False
        finally:
            connection.close()


@contextmanager
def serving(system: str, stand: Stand, names: Names, setup: Setup) -> Iterator[Server]:
    """The gateway or the comparison service, as a fresh process."""
    settings = stand.servers.environment() | names.settings() | {"GATEWAY_AMQP_QUEUE_TYPE": setup.queue_type}
    server: Server
    if system == GATEWAY:
        own = {
            "GATEWAY_DRAIN_DELAY_S": "0",
            "GATEWAY_AMQP_CONNECTIONS": str(setup.amqp_connections),
        }
        if setup.shards > 1:
            own["GATEWAY_QUEUE_SHARDS"] = str(setup.shards)
        if setup.sms_per_message > 1:
            own["GATEWAY_MESSAGES_PER_ENVELOPE"] = str(setup.sms_per_message)
        server = Gateway(settings | own | setup.settings)
    else:
        server = FastApiService(settings)
    with server:
        yield server


def run(system: str, stand: Stand, setup: Setup) -> Run:
    """One run from nothing to nothing: processes started and stopped, queue declared and deleted."""
    shards = 1 if system == FASTAPI else setup.shards
    with stand.names(setup.queue_type, declare=system == LIMIT, shards=shards) as names:
        if system == LIMIT:
            measured = _run_limit(stand, names, setup)
        else:
            with serving(system, stand, names, setup) as server:
                measured = _run_server(system, stand, names, setup, server)
    return measured


def _run_limit(stand: Stand, names: Names, setup: Setup) -> Run:
    plan = publisher.Plan(
        amqp_url=stand.servers.amqp_url,
        exchange=names.exchange,
        routing_keys=names.queues(),
        batch=setup.batch,
        sms_per_message=setup.sms_per_message,
        body_length=setup.body_length,
        in_flight=setup.in_flight,
        connections=setup.amqp_connections,
    )
    with crew(publisher.__name__, [plan]) as publishers:
        publishers.wait_until_ready()
        return _measure(LIMIT, stand, names, setup, publishers, None)


def _run_server(system: str, stand: Stand, names: Names, setup: Setup, server: Server) -> Run:
    per_process, left = divmod(setup.in_flight, setup.processes)
    plans = [
        generator.Plan(
            url=server.url,
            key=stand.key,
            list_numbers=stand.list_numbers,
            batch=setup.batch,
            connections=per_process + (number < left),
            body_length=setup.body_length,
            all_bad=setup.all_bad,
        )
        for number in range(setup.processes)
    ]
    with crew(generator.__name__, plans) as generators:
        generators.wait_until_ready()
        return _measure(system, stand, names, setup, generators, ServerProcesses(server.port.number))


def _measure(
    system: str, stand: Stand, names: Names, setup: Setup, workers: Crew, server: ServerProcesses | None
) -> Run:
    broker = _local(stand.servers.amqp_url, 5672)
    database = _local(stand.servers.database_url, 5432)
    start = workers.start(setup.warm_up_s, setup.duration_s)
    ticks: list[Tick] = []
    with ThreadPoolExecutor(max_workers=1) as pool:
        costs = pool.submit(_cpu_during, start, [server, broker, database])
        results = workers.watch(lambda _, tick: ticks.append(tick))
        server_s, broker_s, database_s, machine_s = costs.result()
    peak_mb = server.peak_mb() if server else 0.0
    requests = sum(result.all_requests for result in results)
    messages = sum(result.all_messages for result in results)
    expected = messages
    if setup.sms_per_message > 1 and not setup.all_bad and system != FASTAPI:
        expected = requests * amqp_messages(setup, 1 if system == LIMIT else len(stand.list_numbers))
    extra = _most_snapshots(messages) if setup.queue_type == "stream" else 0
    depth = stand.wait_for_depth(names, setup.queue_type, expected)
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
    """How many offsets of a stream can be taken by no message: one in each segment, for a snapshot of its writers.

    (rabbitmq/osiris, osiris_log: evaluate_tracking_snapshot. A stream tells its offsets, not how many messages it has.)
    """
    return messages * MOST_BYTES_OF_AN_SMS // STREAM_SEGMENT_BYTES + 1


def rates(ticks: Iterable[Tick]) -> list[tuple[float, float]]:
    """Throughput over time, from the ticks of all workers: (seconds since the measurement began, messages a second)."""
    width = 0.5
    sums: dict[int, int] = {}
    for tick in ticks:
        place = math.floor(tick.middle_s / width)
        sums[place] = sums.get(place, 0) + tick.messages
    return [((place + 0.5) * width, sums[place] / width) for place in sorted(sums)]


def _local(url: str, default_port: int) -> ServerProcesses | None:
    """The processes of a server of this machine; None for one elsewhere, whose CPU time is not ours to see."""
    parts = urlsplit(url.split(",")[0])
    if parts.hostname not in ("127.0.0.1", "localhost"):
        return None
    try:
        return ServerProcesses(parts.port or default_port)
    except LookupError:
        return None


def _cpu_during(start: Start, servers: Sequence[ServerProcesses | None]) -> list[float]:
    """The CPU seconds each server, and last the whole machine, spends between the two edges of the measurement."""
    edges = []
    for edge in (start.measure_from, start.measure_until):
        time.sleep(max(0.0, edge - time.monotonic()))
        edges.append([*(server.cpu_s() if server else 0.0 for server in servers), busy_s()])
    return [after - before for before, after in zip(*edges, strict=True)]
