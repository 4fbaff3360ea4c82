"""The gateway's resident memory, idle and under 64 concurrent requests of 5 MB.

GATEWAY_MAX_BYTES_IN_FLIGHT bounds the memory. Most of those requests are refused with 503 `overloaded`.
"""

import threading
import time

import msgspec

from benchmarks.drivers import generator
from benchmarks.drivers.backends import Backends, Names, open_backends
from benchmarks.drivers.generator import Plan
from benchmarks.drivers.processes import ServerProcesses
from benchmarks.drivers.systems import GATEWAY, Setup, serving
from benchmarks.drivers.workers import start_workers
from benchmarks.report import bars, machine, plots
from benchmarks.report.bars import Bar
from benchmarks.report.document import Chart, Report, Sentence
from benchmarks.report.figures import Figure, short
from benchmarks.report.machine import Machine
from gateway.ingest.wire import MAX_BODY_BYTES

MESSAGES = 1_000
BODY_LENGTH = MAX_BODY_BYTES // MESSAGES - 80  # 80 bytes of JSON around each text; just below 5 MB together
PURGE_EVERY_S = 0.5  # each accepted request leaves 5 MB in the queue
SAMPLE_S = 0.1


class Options(msgspec.Struct, frozen=True):
    """The load of the run."""

    connections: int = 64
    seconds: float = 15.0
    queue_type: str = "quorum"


class Memory(msgspec.Struct):
    """The content of the file that `memory --json` writes. Resident memory in MB."""

    machine: Machine
    options: Options
    idle_mb: float
    peak_mb: float
    growth_mb: float  # median of the last third minus that of the middle third
    samples: list[tuple[float, float]]  # (second, MB)
    statuses: dict[str, int]
    bars: list[Bar]
    void: str


def measure(options: Options) -> Memory:
    """Measure one run. The queue is emptied throughout, and its messages are counted."""
    described = machine.describe()
    setup = Setup(queue_type=options.queue_type)
    with (
        open_backends() as backends,
        backends.names(options.queue_type, declare=False) as names,
        serving(GATEWAY, backends, names, setup) as server,
    ):
        processes = ServerProcesses(server.port.number)
        time.sleep(1.0)  # lets the garbage of the start be collected
        idle_mb = processes.resident_mb()
        plan = Plan(
            url=server.url,
            key=backends.key,
            list_numbers=backends.list_numbers,
            batch=MESSAGES,
            connections=options.connections,
            body_length=BODY_LENGTH,
        )
        with start_workers(generator.__name__, [plan]) as generators, _Watch(backends, names, processes) as watch:
            generators.wait_until_ready()
            generators.start(0.0, options.seconds)
            (result,) = generators.watch()
        purged = watch.purged + backends.purge(names)
        peak_mb = processes.peak_mb()
    void = result.ended_early
    if purged != result.all_messages:
        void = f"{result.all_messages:,} messages were accepted, {purged:,} were in the queue"
    samples = [(at, size) for at, size in watch.samples if at <= options.seconds]
    middle, last = (
        Figure.of(size for at, size in samples if low <= at / options.seconds <= low + 1 / 3).median
        for low in (1 / 3, 2 / 3)
    )
    return Memory(
        machine=described,
        options=options,
        idle_mb=idle_mb,
        peak_mb=peak_mb,
        growth_mb=last - middle,
        samples=samples,
        statuses=result.statuses,
        bars=[
            Bar("7", "resident MB, idle", Figure.of([idle_mb]), 80, False),
            Bar("7", f"peak MB, {options.connections} × 5 MB at once", Figure.of([peak_mb]), 512, False),
        ],
        void=void,
    )


class _Watch:
    """Threads that sample the memory and empty the queue during a run."""

    def __init__(self, backends: Backends, names: Names, processes: ServerProcesses) -> None:
        self.samples: list[tuple[float, float]] = []
        self.purged = 0
        self._backends = backends
        self._names = names
        self._processes = processes
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._sample, self._purge)]

    def __enter__(self) -> "_Watch":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _sample(self) -> None:
        begin = time.monotonic()
        while not self._over.wait(SAMPLE_S):
            self.samples.append((time.monotonic() - begin, self._processes.resident_mb()))

    def _purge(self) -> None:
        while not self._over.wait(PURGE_EVERY_S):
            self.purged += self._backends.purge(self._names)


def report(memory: Memory) -> Report:
    """Return the bars, the memory over time, and the answers."""
    void = [Sentence(f"Void: {memory.void}", is_bad=True)] if memory.void else []
    return Report(
        "Memory of the gateway",
        memory.machine,
        [
            bars.table_of(memory.bars),
            Chart(
                f"Resident memory under {memory.options.connections} concurrent 5 MB requests",
                plots.lines({"gateway": memory.samples}, x_label="seconds", y_label="MB"),
            ),
            Sentence(f"Growth from the middle third of the run to the last third: {short(memory.growth_mb)} MB."),
            Sentence(f"Answers by status: {memory.statuses}."),
            *void,
        ],
    )
