"""Failures that repeat are logged once, then counted once per interval."""

import logging

import pytest

from gateway.failure_log import INTERVAL_S, MAX_TEXTS, FailureLog

log = logging.getLogger("test.failure_log")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the time that FailureLog sees, to be changed."""
    now = [1000.0]
    monkeypatch.setattr("gateway.failure_log.time.monotonic", lambda: now[0])
    return now


def test_a_failure_is_logged_at_once_and_then_counted(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = FailureLog(log)
    for _ in range(100):
        seen.note("refused")
    assert caplog.messages == ["refused"]
    clock[0] += INTERVAL_S - 1
    seen.note("refused")
    assert caplog.messages == ["refused"]
    clock[0] += 1
    seen.note("refused")
    seen.note("refused")
    assert caplog.messages == ["refused", "refused (100 more in the last 60 s)"]
    clock[0] += INTERVAL_S
    seen.note("refused")
    assert caplog.messages[-1] == "refused (1 more in the last 60 s)"


def test_another_reason_is_logged_at_once(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = FailureLog(log)
    for text in ("refused", "no route", "refused", "no route"):
        clock[0] += 1
        seen.note(text)
    assert caplog.messages == ["refused", "no route"]


def test_the_next_outage_is_logged_anew(clock: list[float], caplog: pytest.LogCaptureFixture) -> None:
    seen = FailureLog(log)
    assert seen.end() == ""
    for _ in range(3):
        seen.note("refused")
    clock[0] += 1
    assert seen.end() == ", after 3 failures"
    seen.note("refused")
    assert caplog.messages == ["refused", "refused"]
    assert seen.end() == ", after 1 failures"


def test_memory_is_bounded_whatever_the_texts(clock: list[float]) -> None:
    seen = FailureLog(log)
    for number in range(10 * MAX_TEXTS):
        clock[0] += 0.001
        seen.note(f"failure {number}")
    assert len(seen._logged) <= MAX_TEXTS
