"""Histograms, and the numbers that request records add to them."""

from collections import Counter

from gateway.telemetry.counters import Counters
from gateway.telemetry.requests import RequestRecord


def test_a_request_that_ends_in_the_middle_leaves_nothing_in_flight() -> None:
    counters = Counters()
    record = RequestRecord(counters)
    record.body_bytes = 10
    record.count_in_flight(3)
    assert counters.messages_in_flight == 3
    record.end("id", 0, "")
    assert counters.messages_in_flight == 0
    assert counters.messages == {"cancelled": 3}
    assert counters.requests == {(499, "cancelled"): 1}
    assert counters.body_bytes == 10
    assert sum(counters.refused_s.counts) == 1


def test_every_message_is_counted_once() -> None:
    counters = Counters()
    record = RequestRecord(counters)
    record.count_in_flight(5)
    record.queued, record.errors = 2, Counter(("a", "b", "a"))
    record.end("id", 200, "")
    assert counters.messages == {"queued": 2, "a": 2, "b": 1}
    assert counters.request_messages.total == 5
    assert counters.requests == {(200, "ok"): 1}


def test_messages_that_are_refused_together_are_counted_together() -> None:
    counters = Counters()
    record = RequestRecord(counters)
    record.count_in_flight(4)
    record.end("id", 503, "queue_unavailable")
    assert counters.messages == {"queue_unavailable": 4}
    assert counters.requests == {(503, "queue_unavailable"): 1}


def test_a_replayed_answer_counts_its_messages_as_replayed() -> None:
    counters = Counters()
    record = RequestRecord(counters)
    record.count_in_flight(6)
    record.is_replayed = True
    record.end("id", 200, "")
    assert counters.messages == {"replayed": 6}


def test_answers_that_no_handler_gave_are_counted_by_status_and_code() -> None:
    counters = Counters()
    for _ in range(2):
        counters.count_unhandled(400, "malformed_http")
    assert counters.requests == {(400, "malformed_http"): 2}
