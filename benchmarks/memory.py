"""What does the gateway hold: idle, and at 64 concurrent 5 MB requests, from the first second to the last?

Most of those requests are refused: GATEWAY_MAX_BYTES_IN_FLIGHT is what bounds the memory, and 503 `overloaded` is how.
"""

import threading
import time

import msgspec

from benchmarks import generator, machine, runs
from benchmarks.compare import Bar
from benchmarks.figures import Figure
from benchmarks.generator import Plan
from benchmarks.machine import Machine
from benchmarks.processes import ServerProcesses
from benchmarks.runs import GATEWAY, Setup
from benchmarks.stand import Names, Stand, open_stand
from benchmarks.workers import crew
from gateway.ingest.wire import MAX_BODY_BYTES

MESSAGES = 1_000
BODY_LENGTH = MAX_BODY_BYTES // MESSAGES - 80  # 80: the JSON around each text. Just below 5 MB together
PURGE_EVERY_S = 0.5  # each accepted request leaves 5 MB in the queue
SAMPLE_S = 0.1


class Options(msgspec.Struct, frozen=True):
    """What the gateway has to take."""

    connections: int = 64
    seconds: float = 15.0
    queue_type: str = "quorum"


class Memory(msgspec.Struct):
    """Everything `memory --json` writes. Resident memory in MB."""

    machine: Machine
    options: Options
    idle_mb: float
    peak_mb: float
    growth_mb: float  # median of the last third less that of the middle third: what a longer run would add to
    samples: list[tuple[float, float]]  # (second, MB)
    statuses: dict[str, int]
    bars: list[Bar]
    void: str


def measure(options: Options) -> Memory:
    """One run; the queue is emptied all the while, and what was in it counted."""
    described = machine.describe()
    setup = Setup(queue_type=options.queue_type)
    with (
        open_stand() as stand,
        stand.names(options.queue_type, declare=False) as names,
        runs.serving(GATEWAY, stand, names, setup) as server,
    ):
        processes = ServerProcesses(server.port.number)
        time.sleep(1.0)  # what the start left behind is collected
        idle_mb = processes.resident_mb()
        plan = Plan(
            url=server.url,
            key=stand.key,
            list_numbers=stand.list_numbers,
            batch=MESSAGES,
            connections=options.connections,
            body_length=BODY_LENGTH,
        )
        with crew(generator.__name__, [plan]) as generators, _Watch(stand, names, processes) as watch:
            generators.wait_until_ready()
            generators.start(0.0, options.seconds)
            (result,) = generators.watch()
        purged = watch.purged + stand.purge(names)
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
    """Samples the memory and empties the queue, in threads of their own, while a run goes on."""

    def __init__(self, stand: Stand, names: Names, processes: ServerProcesses) -> None:
        self.samples: list[tuple[float, float]] = []
        self.purged = 0
        self._stand = stand
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
            self.purged += self._stand.purge(self._names)
