"""Rate of requests with an Idempotency-Key while each commit takes milliseconds, as with a synchronous standby.

Each request has one message and a key of its own. It commits twice: it holds its key, and later stores its answer.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import asyncpg
import msgspec

from benchmarks.drivers import generator
from benchmarks.drivers.backends import Backends, open_backends
from benchmarks.drivers.processes import ServerProcesses
from benchmarks.drivers.systems import GATEWAY, Setup, serving
from benchmarks.drivers.workers import start_workers
from benchmarks.report import bars, machine
from benchmarks.report.bars import Bar
from benchmarks.report.document import Report, Sentence, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine

LEAST_PER_S = 2_000
WARM_UP_S = 1.0
# A statement fires the trigger once for each kind of change that it may make. Each statement of the gateway that
# changes this table may make two: insert and update, or update and delete.
MAKE_SLOW = """
    CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM pg_sleep({half_s}); RETURN NULL; END $$;
    CREATE TRIGGER be_slow AFTER INSERT OR UPDATE OR DELETE ON idempotency_keys EXECUTE FUNCTION be_slow()
"""
MAKE_FAST = "DROP TRIGGER be_slow ON idempotency_keys; DROP FUNCTION be_slow()"


class Options(msgspec.Struct, frozen=True):
    """The runs to measure."""

    connections: tuple[int, ...] = (64, 128, 256)
    commit_ms: int = 10
    rounds: int = 3
    seconds: float = 3.0


class Reading(msgspec.Struct):
    """One run."""

    connections: int
    requests_per_s: float
    cpu_us_per_request: float  # of the gateway
    void: str  # the reason, if a request was not answered 200


class Keyed(msgspec.Struct):
    """The content of the file that `keyed --json` writes."""

    machine: Machine
    options: Options
    readings: list[Reading]
    bars: list[Bar]


def measure(options: Options, on_reading: Callable[[Reading], None]) -> Keyed:
    """Measure all numbers of connections, round by round. `on_reading` is called with each run as it ends."""
    described = machine.describe()
    readings: list[Reading] = []
    with open_backends() as backends, _slow_commits(backends.servers.database_url, options.commit_ms):
        for _ in range(options.rounds):
            for connections in options.connections:
                readings.append(_read(backends, connections, options.seconds))
                on_reading(readings[-1])
    return Keyed(described, options, readings, bars_of(readings))


@contextmanager
def _slow_commits(database_url: str, commit_ms: int) -> Iterator[None]:
    """Let each statement that changes idempotency keys take `commit_ms` longer."""
    asyncio.run(_execute(database_url, MAKE_SLOW.format(half_s=commit_ms / 2_000)))
    try:
        yield
    finally:
        asyncio.run(_execute(database_url, MAKE_FAST))


async def _execute(database_url: str, statements: str) -> None:
    connection = await asyncpg.connect(database_url)
    try:
        await connection.execute(statements)
    finally:
        await connection.close()


def _read(backends: Backends, connections: int, seconds: float) -> Reading:
    with (
        backends.names("quorum", declare=True) as names,
        serving(GATEWAY, backends, names, Setup()) as server,
    ):
        plan = generator.Plan(
            url=server.url,
            key=backends.key,
            list_numbers=backends.list_numbers,
            batch=1,
            connections=connections,
            keyed=True,
        )
        processes = ServerProcesses(server.port.number)
        with start_workers(generator.__name__, [plan]) as workers:
            workers.wait_until_ready()
            cpu_s = processes.cpu_s()
            workers.start(WARM_UP_S, seconds)
            (result,) = workers.watch()
            cpu_s = processes.cpu_s() - cpu_s
    answered = sum(result.statuses.values())
    void = "" if set(result.statuses) == {"200"} else f"answers: {result.statuses}"
    return Reading(
        connections,
        requests_per_s=result.messages / result.seconds,  # each with one message
        cpu_us_per_request=cpu_s * 1e6 / max(1, answered),
        void=void or result.ended_early,
    )


def bars_of(readings: list[Reading]) -> list[Bar]:
    """Return the bar of the highest rate among the numbers of connections; none if every run is void."""
    rates = [rate for rate, _ in _figures(readings).values()]
    if not rates:
        return []
    return [Bar("16", "keyed requests/s", max(rates, key=lambda rate: rate.median), LEAST_PER_S, True)]


def _figures(readings: list[Reading]) -> dict[int, tuple[Figure, Figure]]:
    """Return the rate and the CPU by number of connections."""
    valid = [reading for reading in readings if not reading.void]
    return {
        connections: (
            Figure.of([one.requests_per_s for one in valid if one.connections == connections]),
            Figure.of([one.cpu_us_per_request for one in valid if one.connections == connections]),
        )
        for connections in sorted({one.connections for one in valid})
    }


def show(reading: Reading) -> str:
    """Return one line about a run."""
    return f"{reading.connections} connections: {short(reading.requests_per_s)} requests/s {reading.void}"


def report(keyed: Keyed) -> Report:
    """Return rates and CPU as a table."""
    return Report(
        f"Requests with an Idempotency-Key, commits of {keyed.options.commit_ms} ms",
        keyed.machine,
        [
            Table(
                f"{keyed.options.rounds} rounds: median, lowest-highest",
                ["connections", "requests/s", "CPU µs"],
                [[str(connections), *figures] for connections, figures in _figures(keyed.readings).items()],
            ),
            bars.table_of(keyed.bars),
            *(Sentence(f"Void: {show(reading)}", is_bad=True) for reading in keyed.readings if reading.void),
        ],
    )
