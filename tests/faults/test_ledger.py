"""The ledger finds one broken promise in each of these invented histories."""

from collections import Counter
from typing import Any

import pytest

from tests.faults.ledger import NO_ANSWER, Attempt, Consumed, Fault, Findings, Token, compare, longest_gap_s, recovery_s

FAULT = Fault(10.0, 20.0)
LIMITS = {"deadline_s": 3.0, "room_s": 0.5, "recovery_limit_s": 10.0}


def attempt(batch: int, status: int = 200, *, at: float = 1.0, took: float = 0.1, **changes: Any) -> Attempt:
    """Return a request of two messages, with its answer."""
    everything = frozenset({0, 1})
    defaults: dict[str, Any] = {
        "refused": everything if status == 503 else frozenset(),
        "unknown": everything if status in (504, NO_ANSWER) else frozenset(),
        "target": 0,
    }
    fields = defaults | changes
    number = fields.pop("number", 0)
    return Attempt(
        request_id=f"{batch}.{number}", batch=batch, size=2, sent_at=at, answered_at=at + took, status=status, **fields
    )


def consumed(batch: int, index: int, *, message_id: str = "", number: int = 0) -> Consumed:
    return Consumed(Token(batch, index), message_id or f"id-{batch}-{index}", f"{batch}.{number}")


def both(batch: int, number: int = 0) -> list[Consumed]:
    return [consumed(batch, 0, number=number), consumed(batch, 1, number=number)]


HEALTHY = [attempt(1), attempt(2, at=9.0), attempt(9, at=21.0)]
ALL_OF_IT = both(1) + both(2) + both(9)


def broken(findings: Findings) -> str:
    return "; ".join(findings.broken_promises(**LIMITS))


def test_a_healthy_history_breaks_no_promise() -> None:
    findings = compare(HEALTHY, ALL_OF_IT, FAULT)
    assert broken(findings) == ""
    assert (findings.counted, findings.consumed, findings.statuses) == (6, 6, {"200": 3})


def test_a_counted_message_that_never_came_is_lost() -> None:
    findings = compare(HEALTHY, ALL_OF_IT[1:], FAULT)
    assert findings.lost == [Token(1, 0)]
    assert "lost" in broken(findings)


@pytest.mark.parametrize("status", [503, 504, NO_ANSWER])
def test_what_was_not_counted_cannot_be_lost(status: int) -> None:
    assert compare([*HEALTHY, attempt(3, status)], ALL_OF_IT, FAULT).lost == []


@pytest.mark.parametrize("status", [504, NO_ANSWER])
def test_what_is_unknown_may_have_come(status: int) -> None:
    assert broken(compare([*HEALTHY, attempt(3, status)], ALL_OF_IT + both(3), FAULT)) == ""


def test_a_message_of_a_503_that_came_is_seen() -> None:
    findings = compare([*HEALTHY, attempt(3, 503)], [*ALL_OF_IT, consumed(3, 1)], FAULT)
    assert findings.refused_but_consumed == [Token(3, 1)]
    assert "although they were refused" in broken(findings)


def test_a_retry_that_was_counted_does_not_blame_the_503_before_it() -> None:
    attempts = [*HEALTHY, attempt(3, 503), attempt(3, number=1)]
    assert broken(compare(attempts, ALL_OF_IT + both(3, number=1), FAULT)) == ""
    findings = compare(attempts, [*ALL_OF_IT, *both(3, number=1), consumed(3, 0, number=0)], FAULT)
    assert findings.refused_but_consumed == [Token(3, 0)]


def test_a_row_that_says_certainly_not_queued_is_held_to_it() -> None:
    partly = attempt(3, refused=frozenset({1}))
    assert compare([*HEALTHY, partly], [*ALL_OF_IT, consumed(3, 0)], FAULT).refused_but_consumed == []
    assert compare([*HEALTHY, partly], ALL_OF_IT + both(3), FAULT).refused_but_consumed == [Token(3, 1)]
    assert compare([*HEALTHY, partly], ALL_OF_IT, FAULT).lost == [Token(3, 0)]


def test_a_row_that_says_unknown_is_neither_counted_nor_refused() -> None:
    partly = attempt(3, unknown=frozenset({1}))
    assert broken(compare([*HEALTHY, partly], [*ALL_OF_IT, consumed(3, 0)], FAULT)) == ""
    assert broken(compare([*HEALTHY, partly], ALL_OF_IT + both(3), FAULT)) == ""


def test_a_second_id_is_a_double_and_a_second_copy_is_not() -> None:
    assert compare(HEALTHY, [*ALL_OF_IT, consumed(1, 0)], FAULT).doubled == []
    findings = compare(HEALTHY, [*ALL_OF_IT, consumed(1, 0, message_id="another")], FAULT)
    assert findings.doubled == [Token(1, 0)]
    assert "doubled" in broken(findings)


def test_a_message_handed_on_twice_is_a_double() -> None:
    handed_on = Counter(each.token for each in ALL_OF_IT)
    assert compare(HEALTHY, ALL_OF_IT, FAULT, handed_on=handed_on).doubled == []
    handed_on[Token(2, 1)] += 1
    assert compare(HEALTHY, ALL_OF_IT, FAULT, handed_on=handed_on).doubled == [Token(2, 1)]


def test_a_message_from_nowhere_is_seen() -> None:
    assert "from nowhere" in broken(compare(HEALTHY, [*ALL_OF_IT, consumed(77, 0)], FAULT))
    assert "from nowhere" in broken(compare(HEALTHY, [*ALL_OF_IT, consumed(1, 2)], FAULT))


def test_a_500_is_excused_by_nothing() -> None:
    findings = compare([*HEALTHY, attempt(3, 500, code="internal_error")], ALL_OF_IT, FAULT)
    assert broken(findings) == "an answer of 500 internal_error"


def test_where_no_request_may_fail_a_503_is_seen() -> None:
    findings = compare([*HEALTHY, attempt(3, 503, code="draining")], ALL_OF_IT, FAULT, expected_statuses=(200,))
    assert broken(findings) == "an answer of 503 draining"


def test_a_request_beyond_its_deadline_is_seen() -> None:
    late = [*HEALTHY, attempt(3, 504, at=12.0, took=3.6)]
    assert "3.60 s" in broken(compare(late, ALL_OF_IT, FAULT))
    assert broken(compare(late, ALL_OF_IT, FAULT, excused=[FAULT])) == ""
    assert "3.60 s" in broken(compare(late, ALL_OF_IT, FAULT, excused=[Fault(0.0, 11.0)]))
    assert broken(compare([*HEALTHY, attempt(3, 504, at=12.0, took=3.4)], ALL_OF_IT, FAULT)) == ""


def test_recovery_ends_with_the_last_gateway_and_the_last_failure() -> None:
    first = [attempt(1, at=21.0), attempt(2, at=25.0)]
    second = [attempt(3, 503, at=21.0, target=1), attempt(4, at=24.0, target=1)]
    assert recovery_s(first, 20.0) == pytest.approx(1.1)
    assert recovery_s(first + second, 20.0) == pytest.approx(4.1)
    relapse = [*first, attempt(5, 504, at=26.0), attempt(6, at=27.0)]
    assert recovery_s(relapse, 20.0) == pytest.approx(7.1)
    assert recovery_s([*first, attempt(3, 504, at=19.9, took=9.0)], 20.0) == pytest.approx(1.1)
    assert recovery_s([*first, attempt(3, 503, at=21.0, target=1)], 20.0) is None
    assert recovery_s([attempt(1, at=1.0)], 20.0) is None
    assert recovery_s([], 20.0) is None


def test_a_late_or_missing_recovery_is_seen() -> None:
    assert "11.1 s after" in broken(compare([attempt(1, at=31.0)], both(1), FAULT))
    assert "never served again" in broken(compare([attempt(1)], both(1), FAULT))


def test_the_longest_gap_counts_the_edges() -> None:
    attempts = [attempt(1, at=1.0, took=0.0), attempt(2, 503, at=3.0), attempt(3, at=5.0, took=0.0)]
    assert longest_gap_s(attempts) == pytest.approx(4.0)
    assert longest_gap_s([*attempts, attempt(4, 503, at=14.0, took=1.0)]) == pytest.approx(10.0)
    assert longest_gap_s([attempt(1, 503, at=1.0, took=2.0)]) == pytest.approx(2.0)
    assert longest_gap_s([]) == 0.0
