"""The rate of keyed requests: its bar, void runs, and one run with real servers."""

import pytest

from benchmarks.drivers import generator
from benchmarks.questions import keyed
from benchmarks.questions.keyed import Keyed, Options, Reading
from benchmarks.report import machine, terminal


def test_the_highest_rate_is_judged_and_void_runs_are_not() -> None:
    readings = [Reading(64, 1_500.0, 300.0, ""), Reading(256, 2_100.0, 250.0, ""), Reading(512, 9_000.0, 1.0, "lost")]
    (bar,) = keyed.bars_of(readings)
    assert (bar.row, bar.verdict, bar.measured.median) == ("16", "met", 2_100.0)
    shown = keyed.report(Keyed(machine.describe(), Options(), readings, [bar]))
    assert [part for part in shown.parts if "Void: 512" in str(part)]
    terminal.show(shown)


def test_each_request_has_a_key_of_its_own() -> None:
    plan = generator.Plan("http://127.0.0.1", "key", ["+1"], batch=1, keyed=True)
    load, request = generator.Load(plan), generator.prepare(plan)[0]
    first, second = (load.with_key(request.content) for _ in range(2))
    assert b"\r\nIdempotency-Key: " in first
    assert first != second


@pytest.mark.usefixtures("named_servers")
def test_keyed_requests_are_accepted_while_commits_are_slow() -> None:
    measured = keyed.measure(Options(connections=(8,), rounds=1, seconds=0.5), lambda _: None)
    (reading,) = measured.readings
    assert reading.void == ""
    assert reading.requests_per_s > 10
