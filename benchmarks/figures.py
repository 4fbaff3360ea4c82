"""Figures: a median with its lowest and highest, and a straight line through costs. No IO, no clock."""

import statistics
from collections.abc import Callable, Iterable, Sequence

import msgspec


class Figure(msgspec.Struct, frozen=True):
    """What several rounds measured: one number never stands without the spread around it."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Figure":
        """Raises ValueError when there are none."""
        measured = list(values)
        if not measured:
            raise ValueError("a figure needs at least one measurement")
        return cls(statistics.median(measured), min(measured), max(measured))

    def shown(self, form: Callable[[float], str]) -> str:
        """`median (lowest-highest)`, or the median alone where that says it all."""
        spread = self.spread(form)
        return f"{form(self.median)} ({spread})" if spread else form(self.median)

    def spread(self, form: Callable[[float], str]) -> str:
        """`lowest-highest`; empty when both read the same."""
        lowest, highest = form(self.lowest), form(self.highest)
        return f"{lowest}-{highest}" if lowest != highest else ""


def short(value: float) -> str:
    """Three significant digits and more, as a person would write it: 0.0123, 1.23, 123, 12,300."""
    magnitude = abs(value)
    if magnitude >= 100 or value == 0:
        return f"{value:,.0f}"
    if magnitude >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if magnitude >= 0.1 else f"{value:.2g}"


class Line(msgspec.Struct, frozen=True):
    """y = a + b·n: what a request costs, and what each message in it adds."""

    a: float
    b: float

    @classmethod
    def through(cls, points: Sequence[tuple[float, float]]) -> "Line":
        """The fit with the least relative error; with absolute errors, the largest n alone would decide `a` as well.

        Raises ValueError for fewer than two different n.
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
