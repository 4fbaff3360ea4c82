"""Histograms and stopwatches: plain numbers that must be right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.measurements import CANCELLED, SECONDS, Histogram, Measurements, Stopwatch
from gateway.wire import Answer, ErrorRow


@given(st.lists(st.sampled_from(SECONDS) | st.floats(0, 100)))
def test_a_value_is_in_the_first_bucket_whose_bound_it_does_not_pass(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)
    for number, bound in enumerate(SECONDS):
        assert sum(histogram.counts[: number + 1]) == sum(value <= bound for value in values)
    assert sum(histogram.counts) == len(values)
    assert histogram.total == pytest.approx(sum(values))


def test_a_request_that_ends_in_the_middle_leaves_nothing_in_flight() -> None:
    measurements = Measurements()
    watch = Stopwatch(measurements)
    watch.has_read(10)
    watch.has_decoded(3)
    assert measurements.messages_in_flight == 3
    watch.finish(*CANCELLED)
    assert measurements.messages_in_flight == 0
    assert measurements.messages == {"cancelled": 3}
    assert measurements.body_octets == 10


def test_every_message_is_told_of_once() -> None:
    measurements = Measurements()
    watch = Stopwatch(measurements)
    watch.has_decoded(5)
    rows = [ErrorRow(index, None, code, "") for index, code in enumerate(("a", "b", "a"))]
    watch.has_sent(Answer(2, 3, rows))
    watch.finish(200, "ok")
    assert measurements.messages == {"queued": 2, "a": 2, "b": 1}
