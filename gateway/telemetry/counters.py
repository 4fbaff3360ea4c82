"""Counters and histograms of the request path, as plain numbers; web/metrics.py shows them to Prometheus.

Prometheus' own client costs three times as much: 12 µs a request instead of 4 (scripts/bench stages, rows
"metrics" and "prometheus-client"). It would also need a global registry.
"""

from bisect import bisect_left
from collections import Counter

# The steps of a request; metrics and logs call them stages. Small requests are validated first (web/api.py).
STAGES = ("authenticate", "wait", "read", "validate", "resolve_lists", "build", "publish")
AUTHENTICATE, WAIT, READ, VALIDATE, RESOLVE_LISTS, BUILD, PUBLISH = range(len(STAGES))

# Upper bounds of histograms.
SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MESSAGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)

QUEUED, REPLAYED, DRY_RUN = "queued", "replayed", "dry_run"  # outcomes of a message beside the codes of errors.py
OK = "ok"  # the code of a request that was not refused
CANCELLED = 499, "cancelled"  # the process ended before the request was answered


class Histogram:
    """Counts of values by fixed upper bounds. As in Prometheus, a bound includes the value equal to it."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters:
    """The counters of one process."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[int, str]] = Counter()  # (status, code)
        self.messages: Counter[str] = Counter()  # by what their caller was told
        self.messages_in_flight = 0
        self.body_bytes = 0
        self.request_messages = Histogram(MESSAGES)
        self.answered_s, self.refused_s = Histogram(SECONDS), Histogram(SECONDS)
        self.stages_s = tuple(Histogram(SECONDS) for _ in STAGES)
        self.loop_lag_s = Histogram(LAG_SECONDS)

    def count_unhandled(self, status: int, code: str) -> None:
        """Count an answer that no handler gave, such as the one to malformed HTTP."""
        self.requests[status, code] += 1
