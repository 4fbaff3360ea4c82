"""The sweep's series, bars and refusals."""

import pytest

from benchmarks.drivers.systems import BASELINE, GATEWAY
from benchmarks.questions import sweep
from benchmarks.questions.sweep import Options, Point, Reading, Sweep
from benchmarks.report import machine, terminal


def reading(connections: int, share: float, *, system: str = GATEWAY, refused: float = 0.0, void: str = "") -> Reading:
    point = Point(system, 0, False, 1_000, connections)
    return Reading(point, 40_000 * share, refused, 4.0, 100.0, 200.0, 80.0, void, share)


def test_a_series_is_judged_by_its_medians_and_its_refusals() -> None:
    rounds = [reading(4, 1.0), reading(16, 1.1), reading(64, 0.5), reading(64, 0.75)]
    flat, refused = sweep.bars_of([*rounds, reading(64, 0.6, refused=3.0)])
    assert (flat.row, flat.verdict, round(flat.measured.median, 3)) == ("10", "missed", round(0.6 / 1.1, 3))
    assert (refused.verdict, refused.measured.median) == ("missed", 3.0)


def test_void_runs_and_the_baseline_enter_no_bar() -> None:
    readings = [
        reading(4, 1.0),
        reading(64, 0.9),
        reading(64, 0.1, void="3 came"),
        reading(64, 0.1, system=BASELINE),
    ]
    flat, refused = sweep.bars_of(readings)
    assert (flat.verdict, refused.verdict) == ("met", "met")


@pytest.mark.usefixtures("named_servers")
def test_each_run_stands_between_two_with_the_fewest_connections() -> None:
    options = Options(series={1_000: (4,), 100: (16, 2)}, backlogs=(0,), rounds=1, seconds=0.5, warm_up_s=0.2)
    measured = sweep.measure(options, lambda _: None).readings
    assert [(one.point.batch, one.point.connections) for one in measured] == [(1_000, 4), (100, 2), (100, 16), (100, 2)]
    assert [one.share for one in measured if one.point.connections < 16] == [1, 1, 1]
    assert [one.void for one in measured] == [""] * 4


def test_a_void_run_is_reported_with_its_reason() -> None:
    readings = [reading(4, 1.0), reading(64, 0.9, void="2,000 messages were accepted, 1,000 came")]
    swept = Sweep(machine.describe(), Options(), readings, sweep.bars_of(readings))
    shown = [part for part in sweep.report(swept).parts if "1,000 came" in str(part)]
    assert len(shown) == 1
    terminal.show(sweep.report(swept))
