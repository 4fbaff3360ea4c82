"""The sweep's series, bars and refusals."""

from benchmarks.drivers.systems import BASELINE, GATEWAY
from benchmarks.questions import sweep
from benchmarks.questions.sweep import Options, Point, Reading, Sweep
from benchmarks.report import machine, terminal


def reading(connections: int, rate: float, *, system: str = GATEWAY, refused: float = 0.0, void: str = "") -> Reading:
    point = Point(system, 0, False, 1_000, connections)
    return Reading(point, rate, refused, 4.0, 100.0, 200.0, 80.0, void)


def test_a_series_is_judged_by_its_medians_and_its_refusals() -> None:
    rounds = [reading(4, 40_000), reading(4, 44_000), reading(4, 42_000), reading(64, 21_000), reading(64, 30_000)]
    flat, refused = sweep.bars_of([*rounds, reading(64, 25_000, refused=3.0)])
    assert (flat.row, flat.verdict, round(flat.measured.median, 3)) == ("10", "missed", round(25_000 / 42_000, 3))
    assert (refused.verdict, refused.measured.median) == ("missed", 3.0)


def test_void_runs_and_the_baseline_enter_no_bar() -> None:
    readings = [reading(4, 40_000), reading(64, 40_000), reading(64, 1, void="3 came"), reading(4, 9, system=BASELINE)]
    flat, refused = sweep.bars_of(readings)
    assert (flat.verdict, refused.verdict) == ("met", "met")


def test_a_void_run_is_reported_with_its_reason() -> None:
    readings = [reading(4, 40_000), reading(64, 40_000, void="2,000 messages were accepted, 1,000 came")]
    swept = Sweep(machine.describe(), Options(), readings, sweep.bars_of(readings))
    shown = [part for part in sweep.report(swept).parts if "1,000 came" in str(part)]
    assert len(shown) == 1
    terminal.show(sweep.report(swept))
