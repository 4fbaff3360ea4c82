"""`scripts/bench stages` measures what it says, and every row of it."""

import pytest

from benchmarks import stages
from gateway.ingest.wire import Answer
from gateway.telemetry.counters import OK, Counters


def test_every_stage_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SAMPLE_S", 0.0001)
    measured = stages.measure(sizes=(1, 10))
    names = [stage.name for stage in measured.stages]
    assert len(set(names)) == len(names)
    assert {"decode", "frames", "metrics", "prometheus-client"} <= set(names)
    assert all(set(stage.us_per_message) == {1, 10} for stage in measured.stages)


def test_the_row_metrics_is_a_whole_request() -> None:
    """As many observations as a request through api.py leaves, so that the row cannot flatter."""
    counters = Counters()
    stages._measure(counters, 100, Answer(100, 0, []))
    assert counters.requests == {(200, OK): 1}
    assert counters.messages == {"queued": 100}
    assert [sum(stage.counts) for stage in counters.stages_s] == [1] * 6
    assert sum(counters.answered_s.counts) == sum(counters.request_messages.counts) == 1
    assert counters.messages_in_flight == 0
