"""CPU of the gateway for a body of 5 MB in any shape, beside that of a clean one.

While a body is decoded, the event loop serves no other caller. So no body may cost much more than a clean one.
"""

import http.client
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import msgspec

from benchmarks.drivers.backends import Backends, open_backends
from benchmarks.drivers.generator import PATH, SINGLE_PATH
from benchmarks.drivers.systems import GATEWAY, Setup, serving
from benchmarks.report import bars, machine
from benchmarks.report.bars import Bar
from benchmarks.report.document import Cell, Report, Table
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine
from testbed.bodies import LIST_NUMBER, SHAPES, SINGLE_SHAPES, clean_body

CLEAN = "a clean body"
BAR = 1.5
SHOWN = 20  # rows of the report: the most expensive shapes


class Options(msgspec.Struct, frozen=True):
    """The bodies to send."""

    like: str = ""  # only shapes whose name contains it
    rounds: int = 1
    bodies: int = 4  # of each shape in a round, and as many clean ones; five times as many if it is above the bar


class Reading(msgspec.Struct):
    """The bodies of one shape in one round, and the clean ones beside them."""

    shape: str
    status: int  # of the last answer
    cpu_ms: float  # of the gateway's process, median
    clean_cpu_ms: float


class Bodies(msgspec.Struct):
    """The content of the file that `bodies --json` writes."""

    machine: Machine
    options: Options
    readings: list[Reading]
    bars: list[Bar]


def measure(options: Options, on_reading: Callable[[Reading], None]) -> Bodies:
    """Measure all shapes, round by round. `on_reading` is called with each reading."""
    described = machine.describe()
    readings: list[Reading] = []
    with open_backends() as backends:
        for reading in _read_all(backends, options):
            readings.append(reading)
            on_reading(reading)
    return Bodies(described, options, readings, bars_of(readings))


def chosen(like: str) -> list[tuple[str, str, Callable[[], bytes]]]:
    """Return the name, the path and the maker of each shape whose name contains `like`."""
    shapes = [(name, PATH, make) for name, make in SHAPES.items()]
    shapes += [(name, SINGLE_PATH, make) for name, make in SINGLE_SHAPES.items()]
    return [shape for shape in shapes if like in shape[0]]


def _read_all(backends: Backends, options: Options) -> Iterator[Reading]:
    clean = clean_body(list_number=backends.list_numbers[0].encode())
    for _ in range(options.rounds):
        with (
            backends.names("quorum", declare=True) as names,
            serving(GATEWAY, backends, names, Setup()) as server,
            closing(_Caller(server.url, backends.key, server.pid)) as caller,
        ):
            caller.send(clean)  # the first one pays for what is set up once
            for name, path, make in chosen(options.like):
                body = make().replace(LIST_NUMBER, backends.list_numbers[0].encode())
                own, clean_own = caller.send_in_turn(body, path, clean, options.bodies)
                if median(own) > BAR * median(clean_own):
                    # Of so many shapes, some meet other work of the machine.
                    for _ in range(4):
                        more, clean_more = caller.send_in_turn(body, path, clean, options.bodies)
                        own, clean_own = own + more, clean_own + clean_more
                yield Reading(name, caller.status, median(own), median(clean_own))


class _Caller:
    """Sends bodies one after the other, and reads the CPU time that each takes the server."""

    def __init__(self, url: str, key: str, pid: int) -> None:
        address = urlsplit(url)
        self._connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=30)
        self._headers = {"X-Api-Key": key, "Content-Type": "application/json"}
        self.status = 0  # of the last answer
        self._threads = Path(f"/proc/{pid}/task")

    def send_in_turn(self, body: bytes, path: str, clean: bytes, count: int) -> tuple[list[float], list[float]]:
        """Return the CPU milliseconds of `count` bodies, sent one after the other, and of as many clean ones before.

        The first of each is not counted: the memory that the bodies before have left costs or saves it 10 ms.
        """
        clean_own = [self.send(clean) for _ in range(1 + count)]
        own = [self.send(body, path) for _ in range(1 + count)]
        return own[1:], clean_own[1:]

    def send(self, body: bytes, path: str = PATH) -> float:
        """Send a body. Return the CPU milliseconds of all threads of the server."""
        before = self._cpu_ns()
        self._connection.request("POST", path, body, self._headers)
        answer = self._connection.getresponse()
        answer.read()
        self.status = answer.status
        return (self._cpu_ns() - before) / 1e6

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _cpu_ns(self) -> int:
        return sum(int(path.read_text(encoding="ascii").split()[0]) for path in self._threads.glob("*/schedstat"))


def ratios_of(readings: list[Reading]) -> dict[str, Figure]:
    """Return the CPU of each shape ÷ that of the clean bodies beside it, the highest first."""
    found: dict[str, list[float]] = {}
    for reading in readings:
        found.setdefault(reading.shape, []).append(reading.cpu_ms / reading.clean_cpu_ms)
    figures = {shape: Figure.of(ratios) for shape, ratios in found.items()}
    return dict(sorted(figures.items(), key=lambda item: -item[1].median))


def bars_of(readings: list[Reading]) -> list[Bar]:
    """Return the bar of row 13: the shape with the highest ratio; no bar without readings."""
    return [Bar("13", shape, ratio, BAR, False) for shape, ratio in list(ratios_of(readings).items())[:1]]


def show(reading: Reading) -> str:
    """Return one line about a reading."""
    ratio = reading.cpu_ms / reading.clean_cpu_ms
    return f"{reading.shape}: {short(ratio)} of {CLEAN} ({short(reading.clean_cpu_ms)} ms), status {reading.status}"


def report(bodies: Bodies) -> Report:
    """Return the most expensive shapes as a table."""
    ratios = ratios_of(bodies.readings)
    rows: list[list[Cell]] = [[shape, ratio] for shape, ratio in list(ratios.items())[:SHOWN]]
    title = f"CPU ÷ that of {CLEAN}: the highest of {len(ratios)} shapes; median, lowest-highest"
    return Report(
        "CPU of a large body", bodies.machine, [Table(title, ["shape", "ratio"], rows), bars.table_of(bodies.bars)]
    )
