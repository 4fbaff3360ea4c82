"""Measured figures against the bars of benchmarks/README.md. No IO, no clock."""

from collections.abc import Sequence

import msgspec

from benchmarks.report.document import Cell, Table, Verdict
from benchmarks.report.figures import Figure, short

# Below this number of requests in any run behind a figure, chance decides. A slow system needs a larger --seconds.
FEWEST_REQUESTS = 30


class Bar(msgspec.Struct):
    """One figure and the value that it has to reach."""

    row: str
    what: str
    measured: Figure
    bar: float
    at_least: bool  # otherwise: at most
    fewest_requests: int | None = None  # the lowest count of the runs behind the figure, where requests were counted

    @property
    def verdict(self) -> str:
        """The word `met` or `missed`, or a note that the runs had too few requests for either."""
        if self.fewest_requests is not None and self.fewest_requests < FEWEST_REQUESTS:
            return f"too few requests: {self.fewest_requests}"
        return "met" if self.is_met else "missed"

    @property
    def is_met(self) -> bool:
        """True when the median reaches the bar."""
        return self.measured.median >= self.bar if self.at_least else self.measured.median <= self.bar


def table_of(bars: Sequence[Bar]) -> Table:
    """Return the table of figures, bars and verdicts."""
    colours = {"met": True, "missed": False}
    rows: list[list[Cell]] = [
        [
            f"{bar.row}. {bar.what}",
            bar.measured,
            f"{'≥' if bar.at_least else '≤'} {short(bar.bar)}",
            Verdict(bar.verdict, colours.get(bar.verdict)),
        ]
        for bar in bars
    ]
    return Table("Figures against the bars", ["row and figure", "measured", "bar", ""], rows)
