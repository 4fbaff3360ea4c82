"""Medians with their spread, and the line through costs."""

import pytest

from benchmarks.report.figures import Figure, Line, short


def test_a_figure_is_a_median_with_its_spread() -> None:
    figure = Figure.of([3.0, 100.0, 1.0])
    assert figure == Figure(3.0, 1.0, 100.0)
    assert figure.shown(short) == "3.00 (1.00-100)"


def test_a_figure_of_one_round_shows_no_spread() -> None:
    assert Figure.of([12_345.6]).shown(short) == "12,346"


def test_a_figure_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Figure.of([])


def test_the_line_finds_the_cost_of_a_request_and_of_a_message() -> None:
    line = Line.through([(n, 150 + 1.5 * n) for n in (1, 10, 100, 1_000)])
    assert line.a == pytest.approx(150)
    assert line.b == pytest.approx(1.5)


def test_the_largest_batch_does_not_decide_the_cost_of_a_request() -> None:
    """Ten percent off at n = 1,000 are 165 µs: as much as the whole of `a`."""
    off = [(1, 151.5), (10, 165.0), (100, 300.0), (1_000, 1.1 * 1_650)]
    assert Line.through([(float(n), y) for n, y in off]).a == pytest.approx(150, rel=0.1)


def test_one_size_makes_no_line() -> None:
    with pytest.raises(ValueError, match="two different"):
        Line.through([(10, 5.0), (10, 6.0)])
