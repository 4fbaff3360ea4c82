"""A histogram counts any value in its bucket."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.telemetry.counters import SECONDS, Histogram


@given(st.lists(st.sampled_from(SECONDS) | st.floats(0, 100)))
def test_a_value_is_in_the_first_bucket_whose_bound_it_does_not_pass(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    for number, bound in enumerate(SECONDS):
        assert sum(histogram.counts[: number + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))
