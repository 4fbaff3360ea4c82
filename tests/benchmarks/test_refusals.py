"""The cost of refusals: bars, void runs, and one run with real servers."""

import pytest

from benchmarks.questions import refusals
from benchmarks.questions.refusals import ACCEPTED, NO_SLOT, SHARE, Options, Reading, Refusals
from benchmarks.report import machine, terminal


def test_a_refusal_is_judged_by_an_accepted_single_message() -> None:
    readings = [Reading(ACCEPTED, 1, 9, 200.0, ""), Reading(ACCEPTED, 1_000, 9, 4_000.0, "")]
    readings += [Reading(NO_SLOT, 1, 9, 100.0, ""), Reading(SHARE, 1_000, 9, 300.0, "")]
    cheap, expensive = refusals.bars_of(readings)
    assert (cheap.row, cheap.verdict, cheap.measured.median) == ("11", "met", 0.5)
    assert (expensive.verdict, expensive.measured.median) == ("missed", 1.5)


def test_a_void_run_is_reported_and_enters_no_bar() -> None:
    readings = [Reading(ACCEPTED, 1, 9, 200.0, ""), Reading(NO_SLOT, 1, 9, 1.0, "answers: {'200': 9}")]
    assert refusals.bars_of(readings) == []
    shown = refusals.report(Refusals(machine.describe(), Options(), readings, []))
    assert [part for part in shown.parts if "answers: " in str(part)]
    terminal.show(shown)


@pytest.mark.usefixtures("named_servers")
def test_the_gateway_refuses_what_the_situation_says() -> None:
    measured = refusals.measure(Options(batches=(1,), rounds=1, seconds=0.5), lambda _: None)
    assert [(reading.situation, reading.void) for reading in measured.readings] == [
        (ACCEPTED, ""),
        (NO_SLOT, ""),
        (SHARE, ""),
    ]
    assert all(reading.answered > 10 for reading in measured.readings)
