"""Histograms, and what records add to them: plain numbers that must be right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access import Record
from gateway.measurements import SECONDS, Histogram, Measurements
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
    record = Record(measurements)
    record.read(10)
    record.validated(3)
    assert measurements.messages_in_flight == 3
    record.end("id", 0, "")
    assert measurements.messages_in_flight == 0
    assert measurements.messages == {"cancelled": 3}
    assert measurements.requests == {(499, "cancelled"): 1}
    assert measurements.body_octets == 10
    assert sum(measurements.refused_s.counts) == 1


def test_every_message_is_told_of_once() -> None:
    measurements = Measurements()
    record = Record(measurements)
    record.validated(5)
    rows = [ErrorRow(index, None, code, "") for index, code in enumerate(("a", "b", "a"))]
    record.counted(Answer(2, 3, rows))
    record.end("id", 200, "")
    assert measurements.messages == {"queued": 2, "a": 2, "b": 1}
    assert measurements.requests == {(200, "ok"): 1}


def test_messages_that_are_refused_together_are_told_of_together() -> None:
    measurements = Measurements()
    record = Record(measurements)
    record.validated(4)
    record.end("id", 503, "queue_unavailable")
    assert measurements.messages == {"queue_unavailable": 4}
    assert measurements.requests == {(503, "queue_unavailable"): 1}


def test_a_replayed_answer_counts_its_messages_as_replayed() -> None:
    measurements = Measurements()
    record = Record(measurements)
    record.validated(6)
    record.replayed()
    record.end("id", 200, "")
    assert measurements.messages == {"replayed": 6}
