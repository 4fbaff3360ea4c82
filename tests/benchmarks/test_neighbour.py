"""The bars and the report of `scripts/bench neighbour`."""

from benchmarks.questions import neighbour
from benchmarks.questions.neighbour import ALONE, BESIDE, EQUALS, SATURATED, Neighbour, Options, Reading, Situation
from benchmarks.report import machine, terminal


def reading(
    round_: int, others: str, p99_ms: float, *, rate: int = SATURATED, failures: int = 0, void: str = ""
) -> Reading:
    situation, first_failure = Situation(others, rate), "503: no" if failures else ""
    return Reading(round_, situation, 100, 1.0, p99_ms, failures, first_failure, 40_000, 0.0, 300, 0.9, 1.9, 0.1, void)


def test_the_ratio_is_taken_within_each_round() -> None:
    rounds = [(10, 15), (20, 60), (40, 60)]
    readings = [
        reading(number, others, p99_ms)
        for number, (equals, beside) in enumerate(rounds)
        for others, p99_ms in ((ALONE, 1.0), (EQUALS, equals), (BESIDE, beside))
    ]
    ratio, failures = neighbour.bars_of(readings)
    assert (ratio.row, ratio.measured.lowest, ratio.measured.median, ratio.measured.highest) == ("12", 1.5, 1.5, 3.0)
    assert (ratio.verdict, failures.verdict) == ("met", "met")


def test_each_rate_has_a_ratio_of_its_own() -> None:
    loads = ((20_000, 10.0, 11.0), (SATURATED, 100.0, 300.0))
    readings = [
        reading(0, others, p99_ms, rate=rate)
        for rate, *both in loads
        for others, p99_ms in zip((EQUALS, BESIDE), both, strict=True)
    ]
    steady, saturated, _ = neighbour.bars_of(readings)
    assert (steady.measured.median, steady.what[:12], steady.verdict) == (1.1, "20,000 msg/s", "met")
    assert (saturated.measured.median, saturated.what[:9], saturated.verdict) == (3.0, "saturated", "missed")


def test_void_runs_enter_no_ratio_and_their_failures_count() -> None:
    readings = [
        *(reading(0, EQUALS, 10), reading(0, BESIDE, 11)),
        *(reading(1, EQUALS, 1, void="3 came", failures=2), reading(1, BESIDE, 11)),
    ]
    ratio, failures = neighbour.bars_of(readings)
    assert (ratio.measured.highest, ratio.verdict) == (1.1, "met")
    assert (failures.measured.median, failures.verdict) == (2, "missed")
    assert [bar.what for bar in neighbour.bars_of(readings[2:])] == [failures.what]


def test_few_requests_give_no_verdict() -> None:
    readings = [reading(0, EQUALS, 10), reading(0, BESIDE, 90)]
    readings[0].requests = 29
    assert neighbour.bars_of(readings)[0].verdict == "too few requests: 29"


def test_a_void_run_is_reported_with_its_reason() -> None:
    readings = [reading(0, EQUALS, 10), reading(0, BESIDE, 11, void="2,000 messages were accepted, 1,000 came")]
    report = neighbour.report(Neighbour(machine.describe(), Options(), readings, neighbour.bars_of(readings)))
    assert len([part for part in report.parts if "1,000 came" in str(part)]) == 1
    terminal.show(report)
