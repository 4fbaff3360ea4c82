"""Figures with their spread, and a straight line through costs. No IO, no clock."""

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """The median of several rounds, with the lowest and the highest value."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """Return the figure of these values. Raises ValueError when there are none."""
        measured = list(values)
        if not measured:
            raise ValueError("a figure needs at least one measurement")
        return cls(statistics.median(measured), min(measured), max(measured))

    def shown(self, form: Callable[[float], str]) -> str:
        """Return `median (lowest-highest)`, or the median alone when all three read the same."""
        spread = self.spread(form)
        return f"{form(self.median)} ({spread})" if spread else form(self.median)

    def spread(self, form: Callable[[float], str]) -> str:
        """Return `lowest-highest`, or an empty string when both read the same."""
        lowest, highest = form(self.lowest), form(self.highest)
        return f"{lowest}-{highest}" if lowest != highest else ""


def short(value: float) -> str:
    """Return a number with two to three significant digits, and whole above 100: 0.012, 1.23, 12.3, 12,345."""
    magnitude = abs(value)
    if magnitude >= 100 or value == 0:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 0.1 else f"{value:.2g}"


class Line(msgspec.Struct, frozen=True):
    """The cost of a request of n messages, y = a + b·n."""

    a: float
    b: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """Return the line with the least relative error through (n, y) points.

        With absolute errors the largest n alone would decide `a` as well. Raises ValueError for fewer than two
        different n.
        """
        if len({n for n, _ in points}) < 2:
            raise ValueError("a line needs two different sizes")
        weights = [1 / y**2 for _, y in points]
        total = sum(weights)
        mean_n = sum(w * n for w, (n, _) in zip(weights, points, strict=True)) / total
        mean_y = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        covariance = sum(w * (n - mean_n) * (y - mean_y) for w, (n, y) in zip(weights, points, strict=True))
        variance = sum(w * (n - mean_n) ** 2 for w, (n, _) in zip(weights, points, strict=True))
        b = covariance / variance
        return cls(mean_y - b * mean_n, b)
