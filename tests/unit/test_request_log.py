"""The request log: the content of a line, and the requests that get one."""

import json
import logging
import random
from collections import Counter

import msgspec
import pytest

from gateway.telemetry import requests as access
from gateway.telemetry.counters import AUTHENTICATE, READ, SECONDS, VALIDATE, Counters
from gateway.telemetry.log import JsonLines, WriterThread, redact
from gateway.telemetry.requests import MAX_LINES_A_SECOND, RequestLine, RequestLog, RequestRecord


def ended(status: int = 200, code: str = "", errors: tuple[str, ...] = (), queued: int = 1) -> RequestRecord:
    record = RequestRecord(Counters())
    record.account_id = 42
    record.mark(AUTHENTICATE)
    record.body_bytes = 100
    record.mark(READ)
    record.count_in_flight(queued + len(errors))
    record.mark(VALIDATE)
    if status == 200:
        record.queued, record.errors = queued, Counter(errors)
    record.end("id-1", status, code)
    return record


def read_a_document() -> RequestRecord:
    record = RequestRecord(Counters())
    record.end("id-1", 200, "")
    return record


def replayed() -> RequestRecord:
    record = ended()
    record.is_replayed = True
    return record


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [vars(record)["fields"] for record in caplog.records]


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        (ended(), "queued"),
        (read_a_document(), "read"),
        (replayed(), "replayed"),
        (ended(errors=("invalid_phone",)), "partial"),
        (ended(errors=("invalid_phone",), queued=0), "refused"),
        (ended(errors=("outcome_unknown",)), "unknown"),
        (ended(504, "outcome_unknown"), "unknown"),
        (ended(503, "overloaded"), "refused"),
        (ended(401, "invalid_api_key"), "refused"),
        (ended(500, "internal_error"), "failed"),
        (ended(0), "cancelled"),
    ],
)
def test_an_outcome_is_one_word(record: RequestRecord, outcome: str) -> None:
    assert record.outcome == outcome


def test_a_line_has_counts_and_times_and_the_errors_by_code(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    RequestLog(1).write(ended(errors=("invalid_phone", "invalid_phone", "missing_to")), "abc")
    (line,) = lines(caplog)
    stages = line.pop("stages_ms")
    assert isinstance(stages, dict)
    assert list(stages) == ["authenticate", "read", "validate"]
    assert line.pop("duration_ms") >= sum(stages.values()) - 0.01  # type: ignore[operator]
    assert line == {
        "request_id": "id-1",
        "outcome": "partial",
        "status": 200,
        "account_id": 42,
        "messages": 4,
        "queued": 1,
        "errors": {"invalid_phone": 2, "missing_to": 1},
        "body_bytes": 100,
        "trace_id": "abc",
    }


def test_a_step_lasts_from_the_end_of_the_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 10.25, 10.75, 11.0])
    monkeypatch.setattr(access, "perf_counter", lambda: next(times))
    counters = Counters()
    record = RequestRecord(counters)
    record.mark(AUTHENTICATE)
    record.mark(READ)
    record.end("id-1", 200, "")
    assert [histogram.total for histogram in counters.stages_s if histogram.total] == [0.25, 0.5]
    assert counters.stages_s[READ].counts[SECONDS.index(0.5)] == 1
    assert (counters.answered_s.total, counters.refused_s.total) == (1.0, 0.0)
    line = msgspec.to_builtins(RequestLine.of(record, "read", "", 0))
    assert (line["stages_ms"], line["duration_ms"]) == ({"authenticate": 250.0, "read": 500.0}, 1000.0)


def test_a_line_is_the_same_however_it_is_encoded(caplog: pytest.LogCaptureFixture) -> None:
    """With a writer the line is encoded without `logging`: same fields, in the same order."""
    caplog.set_level(logging.INFO)
    for record in (ended(), ended(504, "outcome_unknown"), ended(500, "internal_error"), ended(0), read_a_document()):
        written: list[bytes] = []
        writer = WriterThread()
        writer.setFormatter(form := JsonLines("worker-1"))
        writer.write_line = written.append  # type: ignore[method-assign, assignment]
        RequestLog(1, writer).write(record, "abc")
        writer.close()
        RequestLog(1).write(record, "abc")
        direct, formatted = json.loads(written[0]), json.loads(form.format(caplog.records[-1]))
        assert written[0].endswith(b"}\n")
        assert direct.pop("time")[:17] == formatted.pop("time")[:17]
        assert list(direct) == list(formatted)
        assert direct == formatted


@pytest.mark.parametrize("request_id", ["+14155551234", "trk_" + "a" * 32, "amqp://user:secret@host"])
@pytest.mark.parametrize("direct", [False, True])
def test_a_callers_request_id_is_redacted(request_id: str, direct: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    record = ended()
    record.request_id = request_id
    writer = WriterThread()
    writer.setFormatter(JsonLines())
    written: list[bytes] = []
    writer.write_line = written.append  # type: ignore[method-assign, assignment]
    RequestLog(1, writer if direct else None).write(record)
    writer.close()
    line = json.loads(written[0] if direct else JsonLines().format(caplog.records[0]))
    assert line["request_id"] == redact(request_id) != request_id


def test_successes_are_sampled_and_unknown_or_failed_requests_are_not(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    draws = iter([0.0, 0.009, 0.01, 0.5, 0.999])
    monkeypatch.setattr(random, "random", lambda: next(draws))
    log = RequestLog(0.01)
    for _ in range(5):
        log.write(ended())
    assert len(lines(caplog)) == 2
    caplog.clear()
    for _ in range(MAX_LINES_A_SECOND * 2):
        log.write(ended(504, "outcome_unknown"))
        log.write(ended(500, "internal_error"))
    assert len(lines(caplog)) == 4 * MAX_LINES_A_SECOND


def test_no_success_has_a_line_in_a_sample_of_none_or_below_the_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    for record in (ended(), replayed(), read_a_document()):
        RequestLog(0).write(record)
    assert lines(caplog) == []
    caplog.set_level(logging.WARNING, "gateway")
    written: list[bytes] = []
    writer = WriterThread()
    writer.write_line = written.append  # type: ignore[method-assign, assignment]
    RequestLog(1, writer).write(ended())
    writer.close()
    assert written == []


def test_a_flood_of_refusals_costs_few_lines_and_omissions_are_counted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    now = 100.0
    monkeypatch.setattr(access, "monotonic", lambda: now)
    log = RequestLog(0)
    for _ in range(5_000):
        log.write(ended(503, "overloaded"))
    log.write(ended(401, "invalid_api_key"))  # its kind is not flooded
    assert len(lines(caplog)) == MAX_LINES_A_SECOND + 1
    now += 0.5
    log.write(ended(503, "overloaded"))
    now += 0.5
    caplog.clear()
    log.write(ended(503, "overloaded"))
    log.write(ended(503, "overloaded"))
    assert [line.get("unlogged") for line in lines(caplog)] == [5_001 - MAX_LINES_A_SECOND, None]
