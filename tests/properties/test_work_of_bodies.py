"""No body of 5 MB, valid or not, costs much more to process than a clean one of its size. Promises 10 and 13.

The event loop serves nobody else meanwhile. A ratio of CPU times within one run, with a wide margin, shows the work.
Resident memory shows the allocations. docs/evidence/performance.md has the figures.
"""

import ctypes
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from gateway.errors import GatewayError
from gateway.ingest import batch
from gateway.ingest.decoding import decode_bulk, decode_single
from gateway.ingest.wire import MAX_BODY_BYTES, Answer, encode
from testbed.bodies import LIST_NUMBER, PLACES, SHAPES, SINGLE_PLACES, SINGLE_SHAPES, clean_body

# Of decoding, validating, building and answering alone, as a multiple of a clean body, or of one pass of the decoder
# over deep arrays, whichever takes longer: that depends on the build of Python. One pass and all other work take 1.4.
MAX_RATIO = 1.8
MAX_PEAK_MB = 60.0
ROUNDS = 2
MAX_PAIRS = 50
IDS = [f"{number:08}" for number in range(1_000)]
LISTS = {LIST_NUMBER.decode(): 7}
ALL_SHAPES = SHAPES | SINGLE_SHAPES
DEEP = SHAPES["deep as an unknown field"]()


def process(body: bytes, shape: str) -> None:
    """Do what the pipeline does with a body, without servers."""
    decode = decode_single if shape in SINGLE_SHAPES else decode_bulk
    try:
        draft = batch.validate(decode(body))
    except GatewayError:
        return
    built = batch.build(draft, LISTS, batch.BatchIds(IDS[: draft.size], []), batch.Origin(1, "r", "2026-11-23"))
    encode(Answer(len(built.ids), len(built.rows), built.rows))


def cpu_s(body: bytes, shape: str = "") -> float:
    began = time.thread_time()
    process(body, shape)
    return time.thread_time() - began


def unit_s() -> float:
    clean = cpu_s(clean_body())
    began = time.thread_time()
    msgspec.json.decode(DEEP, type=msgspec.Raw)
    return max(clean, time.thread_time() - began)


@pytest.mark.parametrize("place", [*PLACES, "all bodies", *SINGLE_PLACES])
def test_work_is_that_of_a_clean_body(place: str) -> None:
    unit = min([unit_s() for _ in range(2 * ROUNDS)])
    ratios = {}
    for shape, make in ALL_SHAPES.items():
        if shape.endswith(f" as {place}"):
            body = make()
            assert 0.98 * MAX_BODY_BYTES < len(body) <= MAX_BODY_BYTES
            ratios[shape] = min([cpu_s(body, shape) for _ in range(ROUNDS)]) / unit
            pairs: list[tuple[float, float]] = []
            while ratios[shape] > MAX_RATIO and len(pairs) < MAX_PAIRS:  # a busy machine: measure the two in turn
                pairs += [(cpu_s(body, shape), unit_s()) for _ in range(5)]
                ratios[shape] = min(dirty for dirty, _ in pairs) / min(unit for _, unit in pairs)
    print(*(f"{ratio:.2f}: {shape}" for shape, ratio in ratios.items()), sep="\n")
    assert {shape: ratio for shape, ratio in ratios.items() if ratio > MAX_RATIO} == {}


def test_no_body_takes_much_memory() -> None:
    """In a process of its own, whose memory no other test has grown."""
    completed = subprocess.run(  # noqa: S603
        [sys.executable, "-m", __name__], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    peaks = {name: float(mb) for name, mb in (line.rsplit(" ", 1) for line in completed.stdout.splitlines())}
    print(completed.stdout)
    assert peaks.keys() == ALL_SHAPES.keys()
    assert {name: mb for name, mb in peaks.items() if mb > MAX_PEAK_MB} == {}


def measure_peaks() -> Iterator[str]:
    """Yield each shape with the highest resident memory during its processing, above that before, in MB."""
    trim = ctypes.CDLL(None).malloc_trim
    for name, make in ALL_SHAPES.items():
        body = make()
        trim(0)  # memory that earlier shapes have left would not show
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts at the present
        before = _resident_kb("VmRSS")
        process(body, name)
        yield f"{name} {(_resident_kb('VmHWM') - before) / 1024:.1f}"


def _resident_kb(field: str) -> int:
    return int(Path("/proc/self/status").read_text(encoding="ascii").partition(f"{field}:")[2].split()[0])


if __name__ == "__main__":
    print("\n".join(measure_peaks()))
