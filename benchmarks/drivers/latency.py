"""Latencies, counted in a dictionary while the load runs, then merged over processes as HdrHistograms.

The histogram's own `record_value` takes 4.6 µs, as much as the rest of the generator's work for a small request. The
dictionary counts by the histogram's own buckets (2,048 for each power of two) and fills the histogram at the end.
"""

from collections.abc import Iterable

import msgspec
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

LONGEST_US = 3_600_000_000
SIGNIFICANT_DIGITS = 3
_BUCKET_BITS = 11  # three significant digits take 2,048 buckets

SHOWN = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 100.0)


class Recorder:
    """A counter of the latencies of one process."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def record(self, seconds: float) -> None:
        microseconds = max(int(seconds * 1e6), 0)
        shift = max(0, microseconds.bit_length() - _BUCKET_BITS)
        bucket = microseconds >> shift << shift
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def encoded(self) -> str:
        """Return the histogram in HdrHistogram's own compressed, base64 form."""
        histogram = _empty()
        for microseconds, count in self._counts.items():
            histogram.record_value(min(max(microseconds, 1), LONGEST_US), count)
        encoded: bytes = histogram.encode()
        return encoded.decode("ascii")


class Latencies(msgspec.Struct, frozen=True):
    """Latencies of all requests of a run, in milliseconds."""

    count: int
    mean_ms: float
    percentiles_ms: dict[str, float]
    curve_ms: list[tuple[float, float]]  # (percentile, latency), closer together towards 100, for a plot

    def at(self, percentile: float) -> float:
        """Return the latency at a percentile, one of SHOWN."""
        return self.percentiles_ms[f"{percentile:g}"]


def merge(encoded: Iterable[str]) -> Latencies:
    """Return the latencies of several processes together."""
    histogram = _empty()
    for one in encoded:
        histogram.decode_and_add(one)
    count: int = histogram.get_total_count()
    if count == 0:
        return Latencies(0, 0.0, {f"{p:g}": 0.0 for p in SHOWN}, [])
    percentiles = {f"{p:g}": histogram.get_value_at_percentile(p) / 1000 for p in SHOWN}
    fine = [100 - 100 / 2 ** (step / 4) for step in range(4, 60)]
    curve = [(p, histogram.get_value_at_percentile(p) / 1000) for p in fine if 100 - p >= 100 / count]
    return Latencies(count, histogram.get_mean_value() / 1000, percentiles, curve)


def _empty() -> HdrHistogram:
    return HdrHistogram(1, LONGEST_US, SIGNIFICANT_DIGITS)
