"""The latency of a caller B beside one account A with ten times the load of others, and slow bodies.

The ten accounts together and A alone send the same load, so A has ten times the load of each of them. It is a fixed
rate below the capacity, sent as an open loop, or as much as the gateway takes, sent as a closed loop.

- "alone": B only, for information.
- "among equals": B beside the ten accounts, whose bodies are complete. This is B undisturbed under the same load.
- "beside A": B beside A, which also holds connections with slow bodies. Each sends its last 80 bytes one by one, until
  the gateway's body timeout, and then begins again.

B sends single messages, one after another on each of its connections, with a pause. One gateway process serves all
situations, in turn within each round. The queue is emptied before each.
"""

import asyncio
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product

import msgspec

from benchmarks.drivers import generator, latency, runs
from benchmarks.drivers.backends import Backends, open_backends, with_account
from benchmarks.drivers.generator import Plan
from benchmarks.drivers.processes import ServerProcesses
from benchmarks.drivers.systems import GATEWAY, Setup, serving
from benchmarks.drivers.workers import start_workers
from benchmarks.report import bars, machine
from benchmarks.report.bars import Bar
from benchmarks.report.document import Cell, Report, Sentence, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine

ALONE, EQUALS, BESIDE = "alone", "among equals", "beside A"
EQUAL_ACCOUNTS = 10
B_CONNECTIONS, B_PAUSE_S = 8, 0.05  # enough requests for a p99, and below a hundredth of the others' messages
SATURATED = 0  # the rate of a closed loop
MOST_RATIO = 2.0
_FIGURES = {  # field of Reading → head of its column
    "p50_ms": "B p50 ms",
    "p99_ms": "B p99 ms",
    "failures": "B failed",
    "messages_per_s": "others msg/s",
    "failed_per_s": "failed/s",
    "slow_bodies": "slow bodies",
    "gateway_cores": "gateway cores",
    "machine_cores": "machine cores",
    "other_cores": "other cores",
}


class Options(msgspec.Struct, frozen=True):
    """The load of the others, and the length of the runs."""

    rates: tuple[int, ...] = (10_000, SATURATED)  # messages a second of all others together
    connections: int = 40  # of all others together, without the slow ones
    batch: int = 1_000  # messages in their requests
    slow_bodies: int = 300  # connections of A with slow bodies
    slow_batch: int = 10  # their messages; many more take A's room from its other requests, and lower the load
    drip_s: float = 0.5  # from one byte of a slow body to the next
    rounds: int = 3
    seconds: float = 12.0  # longer than GATEWAY_BODY_TIMEOUT_S, so that slow bodies end and begin within it
    warm_up_s: float = 2.0


class Situation(msgspec.Struct, frozen=True):
    """The others beside B, and their rate in messages a second."""

    others: str  # ALONE, EQUALS or BESIDE
    rate: int = SATURATED

    @property
    def name(self) -> str:
        return self.others if self.others == ALONE else f"{self.others}, {self.load}"

    @property
    def load(self) -> str:
        return f"{self.rate:,} msg/s" if self.rate else "saturated"


class Reading(msgspec.Struct):
    """One run of one situation."""

    round: int
    situation: Situation
    requests: int  # of B
    p50_ms: float
    p99_ms: float
    failures: int  # B's answers other than 200 with all messages queued, warm-up included
    first_failure: str
    messages_per_s: float  # of the others, accepted
    failed_per_s: float  # refusals and lost connections
    slow_bodies: float  # connections whose request is in flight; median over the run
    gateway_cores: float
    machine_cores: float
    other_cores: float  # that processes outside the benchmark took: above some tenths, measure again
    void: str  # the reason, if the queue does not hold what was accepted


class Neighbour(msgspec.Struct):
    """The content of the file that `neighbour --json` writes."""

    machine: Machine
    options: Options
    readings: list[Reading]
    bars: list[Bar]


def measure(options: Options, on_reading: Callable[[Reading], None]) -> Neighbour:
    """Measure all situations, round by round. `on_reading` is called with each run as it ends."""
    described = machine.describe()
    readings: list[Reading] = []
    with open_backends() as backends:
        for reading in readings_on(backends, options):
            readings.append(reading)
            on_reading(reading)
    return Neighbour(described, options, readings, bars_of(readings))


def situations(options: Options) -> list[Situation]:
    """Return the situations of one round."""
    return [Situation(ALONE), *(Situation(others, rate) for rate in options.rates for others in (EQUALS, BESIDE))]


def readings_on(backends: Backends, options: Options) -> Iterator[Reading]:
    """Run all situations on one gateway. B is the account of `backends`."""
    others = [asyncio.run(with_account(backends.servers, 1)) for _ in range(EQUAL_ACCOUNTS)]
    setup = Setup(queue_type="quorum")
    with (
        backends.names(setup.queue_type, declare=True) as names,
        serving(GATEWAY, backends, names, setup) as server,
    ):
        servers = backends.servers
        backing = [runs.local(servers.amqp_url, 5672), runs.local(servers.database_url, 5432)]
        processes = [ServerProcesses(server.port.number), *backing]
        for number, situation in product(range(options.rounds), situations(options)):
            depth = partial(backends.wait_for_depth, names, setup.queue_type)
            plans = _plans(situation, server.url, backends, others, options)
            backends.purge(names)
            yield _read(number, situation, plans, options, processes, depth)


def _plans(situation: Situation, url: str, b: Backends, others: list[Backends], options: Options) -> list[Plan]:
    """Return the plans of the workers: B's, that of the others, and that of the slow bodies."""
    plans = [Plan(url, b.key, b.list_numbers, batch=1, connections=B_CONNECTIONS, pause_s=B_PAUSE_S)]
    a, *equals = others
    if situation.others != ALONE:
        load = Plan(url, a.key, a.list_numbers, batch=options.batch, connections=options.connections)
        load.requests_per_s = situation.rate / options.batch
        if situation.others == EQUALS:
            load.more_callers = {one.key: one.list_numbers for one in equals}
        plans.append(load)
    if situation.others == BESIDE:
        slow = Plan(url, a.key, a.list_numbers, batch=options.slow_batch, connections=options.slow_bodies)
        slow.drip_s = slow.ramp_s = options.drip_s
        plans.append(slow)
    return plans


def _read(
    number: int,
    situation: Situation,
    plans: list[Plan],
    options: Options,
    processes: list[ServerProcesses | None],
    depth: Callable[[int], int],
) -> Reading:
    in_flight = [0]  # of the slow bodies
    with start_workers(generator.__name__, plans) as workers, ThreadPoolExecutor(max_workers=1) as pool:
        workers.wait_until_ready()
        start = workers.start(options.warm_up_s, options.seconds)
        cpu = pool.submit(runs.cpu_during, start, processes)
        results = workers.watch(lambda worker, tick: in_flight.append(tick.in_flight) if worker == 2 else None)
        gateway_s, broker_s, database_s, machine_s = cpu.result()
    other_s = machine_s - gateway_s - broker_s - database_s - sum(result.cpu_s for result in results)
    accepted = sum(result.all_messages for result in results)
    found = depth(accepted)
    void = "" if found == accepted else f"{accepted:,} messages were accepted, {found:,} came"
    b, *others = results
    latencies = latency.merge([b.latencies])
    return Reading(
        number,
        situation,
        requests=b.requests,
        p50_ms=latencies.at(50),
        p99_ms=latencies.at(99),
        failures=b.all_failures,
        first_failure=b.first_failure,
        messages_per_s=sum(one.messages for one in others[:1]) / options.seconds,
        failed_per_s=sum(one.failures for one in others[:1]) / options.seconds,
        slow_bodies=statistics.median(in_flight),
        gateway_cores=gateway_s / options.seconds,
        machine_cores=machine_s / options.seconds,
        other_cores=max(0.0, other_s / options.seconds),
        void=void or next((result.ended_early for result in results if result.ended_early), ""),
    )


def bars_of(readings: list[Reading]) -> list[Bar]:
    """Return B's p99 beside A ÷ among equals, within each round, and B's failures. Void runs enter no ratio."""
    found: list[Bar] = []
    valid = {(one.round, one.situation): one for one in readings if not one.void}
    for situation in dict.fromkeys(one.situation for one in readings if one.situation.others == BESIDE):
        equals = Situation(EQUALS, situation.rate)
        rounds = [n for n, place in valid if place == situation and (n, equals) in valid]
        if rounds:
            ratio = Figure.of(valid[n, situation].p99_ms / valid[n, equals].p99_ms for n in rounds)
            fewest = min(valid[n, place].requests for n in rounds for place in (situation, equals))
            name = f"{situation.load}: B's p99 beside A ÷ among equals"
            found.append(Bar("12", name, ratio, MOST_RATIO, False, fewest))
    failures = Figure.of([sum(one.failures for one in readings)])
    return [*found, Bar("12", "B's requests that failed", failures, 0, False)]


def show(reading: Reading) -> str:
    """Return one line about a run."""
    figures = ", ".join(f"{name} {short(getattr(reading, field))}" for field, name in _FIGURES.items())
    return f"{reading.situation.name}: {figures} {reading.first_failure} {reading.void}".rstrip()


def report(measured: Neighbour) -> Report:
    """Return the situations as a table, and the bars."""
    rows: list[list[Cell]] = []
    for situation in situations(measured.options):
        valid = [one for one in measured.readings if one.situation == situation and not one.void]
        if valid:
            figures = (Figure.of(getattr(one, field) for one in valid) for field in _FIGURES)
            rows.append([situation.name, *figures])
    void = [show(one) for one in measured.readings if one.void]
    title = f"{measured.options.rounds} rounds: median, lowest-highest"
    return Report(
        "A caller beside a greedy account",
        measured.machine,
        [
            Table(title, ["situation", *_FIGURES.values()], rows),
            bars.table_of(measured.bars),
            *(Sentence(f"Void: {line}", is_bad=True) for line in void),
        ],
    )
