"""Load comes from processes of its own: starts them, sets them off together, and collects what they counted.

A worker is `python -m benchmarks.generator` (HTTP) or `benchmarks.publisher` (AMQP). It reads its plan as one JSON
line, says Ready once it is connected, reads Start, then writes a Tick several times a second and a Result at the end.
It ends by itself when its standard input closes, which happens when whoever started it ends, however that ends.
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
REPOSITORY = Path(__file__).parents[1]


Heard = TypeVar("Heard")


class WorkerError(Exception):
    """A worker could not do its work; the text is its own."""


class Start(msgspec.Struct):
    """Set off: all workers of a run get the same, on the one monotonic clock of the machine."""

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
    """Connected, and waiting for Start."""


class Tick(msgspec.Struct, tag="tick"):
    """What was completed since the last tick, `at_s` after the beginning of the measurement (before it: negative)."""

    at_s: float
    requests: int
    messages: int
    failures: int
    in_flight: int
    slowest_ms: float

    @property
    def middle_s(self) -> float:
        """The middle of the interval: where it belongs on a time line."""
        return self.at_s - TICK_S / 2


class Result(msgspec.Struct, tag="result"):
    """What one worker counted. `messages` are those that were accepted: confirmed by the broker."""

    seconds: float
    requests: int
    messages: int
    failures: int
    all_requests: int  # with warm-up and run-out: what the queue's depth is compared with
    all_messages: int
    all_failures: int
    statuses: dict[str, int]
    latencies: str  # an encoded histogram
    cpu_s: float
    first_failure: str = ""  # what the server said to the first request that failed
    ended_early: str = ""  # why, if it gave up


Said = Ready | Tick | Result
_decoder = msgspec.json.Decoder(Said)


class Counter:
    """Counts completed requests, inside the measurement and over all."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._tick = Tick(0.0, 0, 0, 0, 0, 0.0)
        self.result = Result(start.duration_s, 0, 0, 0, 0, 0, 0, {}, "", 0.0)

    def completed(self, now: float, latency_s: float, messages: int, *, failed: bool, due: float | None = None) -> bool:
        """One request came to its end at `now`; whether it belongs to the measurement.

        Messages belong to it when they are accepted within it. So do requests in a closed loop; in an open loop
        those that were `due` within it, however late they end: else a server that stands still when the time is
        up would be forgiven all that it still owes.
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
        tick, self._tick = self._tick, Tick(0.0, 0, 0, 0, 0, 0.0)
        tick.at_s = now - self._start.measure_from
        tick.in_flight = in_flight
        return tick


def next_tick_in(start: Start, now: float) -> float:
    """How long a worker sleeps: to the next tick, or to an edge of the measurement if that comes first."""
    edges = [edge - now for edge in (start.measure_from, start.measure_until) if edge > now]
    return min([TICK_S, *edges])


def say(said: Said) -> None:
    """A worker's line to whoever started it."""
    sys.stdout.buffer.write(msgspec.json.encode(said) + b"\n")
    sys.stdout.buffer.flush()


def hear(kind: type[Heard]) -> Heard:
    """A worker's next line from whoever started it."""
    return msgspec.json.decode(sys.stdin.buffer.readline(), type=kind)


def end_with_starter() -> None:
    """End this process as soon as its standard input closes."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):  # not through sys.stdin: its lock would be held while Python ends
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


class Crew:
    """The workers of one run."""

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._processes = processes

    def wait_until_ready(self) -> None:
        """Raises WorkerError when one cannot connect."""
        for process in self._processes:
            said = self._next(process)
            if not isinstance(said, Ready):
                raise WorkerError(f"a worker said {said!r} before it was ready")

    def start(self, warm_up_s: float, duration_s: float) -> Start:
        """Set all off at the same moment."""
        start = Start(time.monotonic() + 0.05, warm_up_s, duration_s)
        for process in self._processes:
            _pipe(process.stdin).write(msgspec.json.encode(start) + b"\n")
            _pipe(process.stdin).flush()
        return start

    def watch(self, on_tick: Callable[[int, Tick], None] | None = None) -> list[Result]:
        """Follow all until the last has ended. Raises WorkerError when one fails."""
        said: SimpleQueue[tuple[int, Tick | Result | WorkerError]] = SimpleQueue()
        for number, process in enumerate(self._processes):
            threading.Thread(target=self._follow, args=(number, process, said), daemon=True).start()
        results: list[Result] = []
        while len(results) < len(self._processes):
            number, news = said.get()
            if isinstance(news, WorkerError):
                raise news
            if isinstance(news, Result):
                results.append(news)
            elif on_tick is not None:
                on_tick(number, news)
        return results

    def _follow(
        self,
        number: int,
        process: "subprocess.Popen[bytes]",
        said: "SimpleQueue[tuple[int, Tick | Result | WorkerError]]",
    ) -> None:
        try:
            while not isinstance(news := self._next(process), Result):
                if isinstance(news, Tick):
                    said.put((number, news))
            said.put((number, news))
        except (WorkerError, msgspec.DecodeError) as error:
            said.put((number, WorkerError(str(error))))

    @staticmethod
    def _next(process: "subprocess.Popen[bytes]") -> Said:
        line = _pipe(process.stdout).readline()
        if not line:
            error = _pipe(process.stderr).read().decode(errors="replace").strip()
            raise WorkerError(error.splitlines()[-1] if error else f"a worker ended with {process.wait()}")
        said: Said = _decoder.decode(line)
        return said


@contextmanager
def crew(module: str, plans: Sequence[Any]) -> Iterator[Crew]:
    """Start one worker for each plan; kill what is left of them at the end."""
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for plan in plans:
            process = subprocess.Popen(  # noqa: S603 - our own module
                [sys.executable, "-m", module],
                cwd=REPOSITORY,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # a terminal's Ctrl-C is ours to handle
            )
            processes.append(process)
            _pipe(process.stdin).write(msgspec.json.encode(plan) + b"\n")
            _pipe(process.stdin).flush()
        yield Crew(processes)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.communicate()


def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
    assert stream is not None  # noqa: S101 - all three are pipes
    return stream
