"""CPU of the gateway per refused request, beside that of an accepted one.

Slow uploads hold the slots. Callers send again at once: either no slot is free, or their account holds its share.
"""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import msgspec

from benchmarks.drivers import generator
from benchmarks.drivers.backends import Backends, open_backends
from benchmarks.drivers.processes import ServerProcesses
from benchmarks.drivers.systems import GATEWAY, Setup, serving
from benchmarks.drivers.workers import start_workers
from benchmarks.report import bars, machine
from benchmarks.report.bars import Bar
from benchmarks.report.document import Cell, Report, Sentence, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine

ACCEPTED, NO_SLOT, SHARE = "accepted", "no slot is free", "the account holds its share"
SLOTS = {ACCEPTED: 512, NO_SLOT: 1, SHARE: 4}
HELD = {ACCEPTED: 0, NO_SLOT: 1, SHARE: 3}  # slots held by slow uploads
CONNECTIONS = 8
WARM_UP_S = 0.5


class Options(msgspec.Struct, frozen=True):
    """The runs to measure."""

    batches: tuple[int, ...] = (1, 100, 1_000)
    rounds: int = 3
    seconds: float = 2.0


class Reading(msgspec.Struct):
    """One run."""

    situation: str
    batch: int
    answered: int  # in the measured time and the warm-up
    cpu_us_per_request: float
    void: str  # the reason, if requests were answered otherwise than the situation says


class Refusals(msgspec.Struct):
    """The content of the file that `refusals --json` writes."""

    machine: Machine
    options: Options
    readings: list[Reading]
    bars: list[Bar]


def measure(options: Options, on_reading: Callable[[Reading], None]) -> Refusals:
    """Measure all situations, round by round. `on_reading` is called with each run as it ends."""
    described = machine.describe()
    readings: list[Reading] = []
    with open_backends() as backends:
        for reading in _read_all(backends, options):
            readings.append(reading)
            on_reading(reading)
    return Refusals(described, options, readings, bars_of(readings))


def _read_all(backends: Backends, options: Options) -> Iterator[Reading]:
    for _ in range(options.rounds):
        for batch in options.batches:
            for situation in SLOTS:
                yield _read(backends, options, situation, batch)


def _read(backends: Backends, options: Options, situation: str, batch: int) -> Reading:
    settings = {"GATEWAY_MAX_REQUESTS_IN_FLIGHT": str(SLOTS[situation]), "GATEWAY_BODY_TIMEOUT_S": "60"}
    with (
        backends.names("quorum", declare=True) as names,
        serving(GATEWAY, backends, names, Setup(settings=settings)) as server,
        ExitStack() as uploads,
    ):
        plan = generator.Plan(
            url=server.url,
            key=backends.key,
            list_numbers=backends.list_numbers,
            batch=batch,
            connections=CONNECTIONS,
        )
        for _ in range(HELD[situation]):
            uploads.enter_context(_upload(plan))
        processes = ServerProcesses(server.port.number)
        with start_workers(generator.__name__, [plan]) as generators:
            generators.wait_until_ready()
            cpu_s = processes.cpu_s()
            generators.start(WARM_UP_S, options.seconds)
            (result,) = generators.watch()
            cpu_s = processes.cpu_s() - cpu_s
    answered, expected = sum(result.statuses.values()), "200" if situation == ACCEPTED else "503"
    void = "" if set(result.statuses) == {expected} else f"answers: {result.statuses}"
    return Reading(situation, batch, answered, cpu_s * 1e6 / max(1, answered), void or result.ended_early)


def _upload(plan: generator.Plan) -> socket.socket:
    """Send a request but for its last byte. It holds a slot until the socket is closed."""
    url = urlsplit(plan.url)
    opened = socket.create_connection((url.hostname, url.port))
    opened.sendall(generator.prepare(plan)[0].content[:-1])
    return opened


def bars_of(readings: list[Reading]) -> list[Bar]:
    """Return the CPU of each kind of refusal as a share of that of an accepted single message."""
    figures = _figures(readings)
    accepted = figures.get((ACCEPTED, 1))
    return [
        Bar("11", f"batch of {batch:,}, {situation}", Figure.of([figure.median / accepted.median]), 1.0, False)
        for (situation, batch), figure in figures.items()
        if accepted is not None and situation != ACCEPTED
    ]


def _figures(readings: list[Reading]) -> dict[tuple[str, int], Figure]:
    found: dict[tuple[str, int], list[float]] = {}
    for reading in readings:
        if not reading.void:
            found.setdefault((reading.situation, reading.batch), []).append(reading.cpu_us_per_request)
    return {key: Figure.of(values) for key, values in found.items()}


def show(reading: Reading) -> str:
    """Return one line about a run."""
    return (
        f"batch of {reading.batch:,}, {reading.situation}: {short(reading.cpu_us_per_request)} µs a request, "
        f"{reading.answered:,} requests {reading.void}"
    )


def report(refusals: Refusals) -> Report:
    """Return the CPU per request as a table."""
    rows: list[list[Cell]] = [
        [f"batch of {batch:,}, {situation}", figure]
        for (situation, batch), figure in sorted(_figures(refusals.readings).items(), key=lambda item: item[0][1])
    ]
    void = [show(reading) for reading in refusals.readings if reading.void]
    return Report(
        "CPU of a refusal",
        refusals.machine,
        [
            Table(f"{refusals.options.rounds} rounds: median, lowest-highest", ["request", "CPU µs"], rows),
            bars.table_of(refusals.bars),
            *(Sentence(f"Void: {line}", is_bad=True) for line in void),
        ],
    )
