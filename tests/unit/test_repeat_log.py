"""Failures that repeat are logged once, then counted once per interval."""

import logging

import pytest

from gateway.repeat_log import INTERVAL_S, MAX_TEXTS, RepeatLog

log = logging.getLogger("test.repeat_log")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time that RepeatLog sees, to be changed."""
    now = [1000.0]
    monkeypatch.setattr("gateway.repeat_log.time.monotonic", lambda: now[0])
    return now


def test_a_failure_is_logged_at_once_and_then_counted(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = RepeatLog(log)
    for _ in range(100):
        seen.note("refused")
    assert caplog.messages == ["refused"]
    clock[0] += INTERVAL_S - 1
    seen.note("refused")
    assert caplog.messages == ["refused"]
    clock[0] += 1
    seen.note("refused")
    seen.note("refused")
    assert caplog.messages == ["refused", "refused (101 more in the last 60 s)"]
    clock[0] += INTERVAL_S
    seen.note("refused")
    assert caplog.messages[-1] == "refused (2 more in the last 60 s)"


def test_counts_are_logged_without_another_event(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    seen = RepeatLog(log, logging.INFO)
    for _ in range(1_235):
        seen.note("malformed")
    seen.note("too slow")
    clock[0] += INTERVAL_S - 1
    seen.log_counts()
    assert caplog.messages == ["malformed", "too slow"]
    clock[0] += 1
    seen.log_counts()
    assert caplog.messages[2:] == ["malformed (1,234 more in the last 60 s)"]
    seen.note("too slow")
    assert caplog.messages[3:] == ["too slow"], "a new event after an interval without one"
    clock[0] += INTERVAL_S
    seen.log_counts()
    assert [record.levelname for record in caplog.records] == ["INFO"] * 4
    assert seen._logged == {}


def test_another_reason_is_logged_at_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = RepeatLog(log)
    for text in ("refused", "no route", "refused", "no route"):
        clock[0] += 1
        seen.note(text)
    assert caplog.messages == ["refused", "no route"]


def test_the_next_outage_is_logged_anew(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = RepeatLog(log)
    assert seen.end() == ""
    for _ in range(3):
        seen.note("refused")
    clock[0] += 1
    assert seen.end() == ", after 3 failures"
    seen.note("refused")
    assert caplog.messages == ["refused", "refused"]
    assert seen.end() == ", after 1 failures"


def test_memory_is_bounded_whatever_the_texts(clock: list[float]) -> None:
    seen = RepeatLog(log)
    for number in range(10 * MAX_TEXTS):
        clock[0] += 0.001
        seen.note(f"failure {number}")
        assert len(seen._logged) == number % MAX_TEXTS + 1
