"""Worker processes: start them, set them off together, collect what they counted.

A worker is the module `generator` (HTTP) or `publisher` (AMQP), run with `python -m`. It reads its plan as one JSON
line and writes Ready once it is connected. It reads Start, then writes a Tick several times a second and a Result at
the end. A worker ends when its standard input closes, so it never outlives the process that started it.
"""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import IO, Any, TypeVar

import msgspec

TICK_S = 0.25
REPOSITORY = Path(__file__).parents[2]

Line = TypeVar("Line")


class WorkerError(Exception):
    """A worker failed. The text is the last line of its standard error."""


class Start(msgspec.Struct):
    """The signal to begin. All workers of a run get the same times, on the machine's monotonic clock."""

    begin: float
    warm_up_s: float
    duration_s: float

    @property
    def measure_from(self) -> float:
        return self.begin + self.warm_up_s

    @property
    def measure_until(self) -> float:
        return self.measure_from + self.duration_s


class Ready(msgspec.Struct, tag="ready"):
    """The worker is connected and waits for Start."""


class Tick(msgspec.Struct, tag="tick"):
    """The requests completed since the last tick. `at_s` counts from the beginning of the measurement."""

    at_s: float
    requests: int
    messages: int
    failures: int
    in_flight: int
    slowest_ms: float

    @property
    def middle_s(self) -> float:
        """The middle of the interval, for a time line."""
        return self.at_s - TICK_S / 2


class Result(msgspec.Struct, tag="result"):
    """The counts of one worker. `messages` are those that were accepted, which means confirmed by the broker."""

    seconds: float
    requests: int
    messages: int
    failures: int
    all_requests: int  # with warm-up and run-out, for comparison with the queue's depth
    all_messages: int
    all_failures: int
    statuses: dict[str, int]
    latencies: str  # an encoded histogram
    cpu_s: float
    first_failure: str = ""  # the answer to the first request that failed
    ended_early: str = ""  # the reason, if the worker gave up


Report = Ready | Tick | Result
_decoder = msgspec.json.Decoder(Report)


class Counter:
    """A counter of completed requests, within the measurement and over the whole run."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._tick = Tick(0.0, 0, 0, 0, 0, 0.0)
        self.result = Result(start.duration_s, 0, 0, 0, 0, 0, 0, {}, "", 0.0)

    def completed(self, now: float, latency_s: float, messages: int, *, failed: bool, due: float | None = None) -> bool:
        """Count a request that ended at `now`. Return True when it belongs to the measurement.

        Messages belong to the measurement when they are accepted within it. The same holds for requests of a closed
        loop. Requests of an open loop belong to it when they were `due` within it, however late they end. Otherwise
        a server that stands still when the time is up would not be charged with the requests that it still owes.
        """
        result, tick = self.result, self._tick
        result.all_requests += 1
        result.all_messages += messages
        result.all_failures += failed
        tick.requests += 1
        tick.messages += messages
        tick.failures += failed
        tick.slowest_ms = max(tick.slowest_ms, latency_s * 1000)
        if self._is_measured(now):
            result.messages += messages
        if not self._is_measured(now if due is None else due):
            return False
        result.requests += 1
        result.failures += failed
        return True

    def _is_measured(self, moment: float) -> bool:
        return self._start.measure_from <= moment < self._start.measure_until

    def take_tick(self, now: float, in_flight: int) -> Tick:
        """Return the counts since the last call, and begin the next interval."""
        tick, self._tick = self._tick, Tick(0.0, 0, 0, 0, 0, 0.0)
        tick.at_s = now - self._start.measure_from
        tick.in_flight = in_flight
        return tick


def next_tick_in(start: Start, now: float) -> float:
    """Return the seconds to the next tick, or to an edge of the measurement if that comes first."""
    edges = [edge - now for edge in (start.measure_from, start.measure_until) if edge > now]
    return min([TICK_S, *edges])


def write_line(report: Report) -> None:
    """Write one line to the process that started this worker."""
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")
    sys.stdout.buffer.flush()


def read_line(kind: type[Line]) -> Line:
    """Read the next line from the process that started this worker."""
    return msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)


def exit_with_parent() -> None:
    """Start a thread that ends this process when its standard input closes."""

    def wait() -> None:
        # Not through sys.stdin: its lock would be held while Python ends.
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Workers:
    """The workers of one run."""

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._processes = processes

    def wait_until_ready(self) -> None:
        """Wait until all are connected. Raises WorkerError when one cannot connect."""
        for process in self._processes:
            report = self._next(process)
            if not isinstance(report, Ready):
                raise WorkerError(f"a worker wrote {report!r} before it was ready")

    def start(self, warm_up_s: float, duration_s: float) -> Start:
        """Set all workers off at the same moment."""
        start = Start(time.monotonic() + 0.05, warm_up_s, duration_s)
        for process in self._processes:
            _pipe(process.stdin).write(msgspec.json.encode(start) + b"\n")
            _pipe(process.stdin).flush()
        return start

    def watch(self, on_tick: Callable[[int, Tick], None] | None = None) -> list[Result]:
        """Follow all workers until the last has ended. Return their results in the order of the plans.

        Raises WorkerError when one fails.
        """
        reports: SimpleQueue[tuple[int, Tick | Result | WorkerError]] = SimpleQueue()
        for number, process in enumerate(self._processes):
            threading.Thread(target=self._follow, args=(number, process, reports), daemon=True).start()
        results: dict[int, Result] = {}
        while len(results) < len(self._processes):
            number, report = reports.get()
            if isinstance(report, WorkerError):
                raise report
            if isinstance(report, Result):
                results[number] = report
            elif on_tick is not None:
                on_tick(number, report)
        return [results[number] for number in sorted(results)]

    def _follow(
        self,
        number: int,
        process: "subprocess.Popen[bytes]",
        reports: "SimpleQueue[tuple[int, Tick | Result | WorkerError]]",
    ) -> None:
        try:
            while not isinstance(report := self._next(process), Result):
                if isinstance(report, Tick):
                    reports.put((number, report))
            reports.put((number, report))
        except (WorkerError, msgspec.DecodeError) as error:
            reports.put((number, WorkerError(str(error))))

    @staticmethod
    def _next(process: "subprocess.Popen[bytes]") -> Report:
        line = _pipe(process.stdout).readline()
        if not line:
            error = _pipe(process.stderr).read().decode(errors="replace").strip()
            raise WorkerError(error.splitlines()[-1] if error else f"a worker ended with {process.wait()}")
        report: Report = _decoder.decode(line)
        return report


@contextmanager
def start_workers(module: str, plans: Sequence[Any]) -> Iterator[Workers]:
    """Start one worker for each plan. At the end, kill those that still run."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for plan in plans:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", module],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C in a terminal goes to this process only
            )
            processes.append(process)
            _pipe(process.stdin).write(msgspec.json.encode(plan) + b"\n")
            _pipe(process.stdin).flush()
        yield Workers(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - all three are pipes
    return stream
