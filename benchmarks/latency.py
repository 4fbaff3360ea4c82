"""Latencies: recorded cheaply while the load runs, then as an HdrHistogram, which merges over processes without loss.

The histogram's own `record_value` is Python and takes 4.6 µs, as much as the rest of a small request's handling here.
So a dictionary counts first, by the histogram's own buckets (2,048 to each power of two), and fills it at the end.
"""

from collections.abc import Iterable

import msgspec
from hdrh.histogram import HdrHistogram  # type: ignore[import-untyped]

LONGEST_US = 3_600_000_000
SIGNIFICANT_DIGITS = 3
_BUCKET_BITS = 11  # 2,048 sub-buckets: what three significant digits take

SHOWN = (50.0, 75.0, 90.0, 95.0, 99.0, 99.9, 99.99, 100.0)


class Recorder:
    """Counts latencies of one process."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def record(self, seconds: float) -> None:
        microseconds = max(int(seconds * 1e6), 0)
        shift = max(0, microseconds.bit_length() - _BUCKET_BITS)
        bucket = microseconds >> shift << shift
        self._counts[bucket] = self._counts.get(bucket, 0) + 1

    def encoded(self) -> str:
        """The histogram in HdrHistogram's own compressed, base64 form."""
        histogram = _empty()
        for microseconds, count in self._counts.items():
            histogram.record_value(min(max(microseconds, 1), LONGEST_US), count)
        encoded: bytes = histogram.encode()
        return encoded.decode("ascii")


class Latencies(msgspec.Struct, frozen=True):
    """What callers waited, in milliseconds."""

    count: int
    mean_ms: float
    percentiles_ms: dict[str, float]
    curve_ms: list[tuple[float, float]]  # (percentile, latency), closer together towards 100, for a plot

    def at(self, percentile: float) -> float:
        """One of SHOWN."""
        return self.percentiles_ms[f"{percentile:g}"]


def merge(encoded: Iterable[str]) -> Latencies:
    """One view on the histograms of several processes."""
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
