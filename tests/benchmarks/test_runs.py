"""Void runs, ratios and verdicts, and the bare publisher's table of confirms."""

import pytest

from benchmarks.drivers import runs
from benchmarks.drivers.publisher import Confirms
from benchmarks.drivers.runs import Run
from benchmarks.drivers.systems import BARE_PUBLISHER, BASELINE, FASTAPI, GATEWAY, Setup
from benchmarks.drivers.workers import Result
from benchmarks.questions import compare
from benchmarks.questions.compare import Options
from benchmarks.report import machine


def result(**changes: object) -> Result:
    counted = Result(3.0, 5, 5_000, 0, 7, 7_000, 0, {"200": 7}, "", 0.1)
    for name, value in changes.items():
        setattr(counted, name, value)
    return counted


def test_a_run_counts_when_the_queue_holds_what_was_accepted() -> None:
    assert runs.why_void([result()], expected_depth=7_000, depth=7_000) == ""


@pytest.mark.parametrize("depth", [6_999, 7_001, 0])
def test_a_run_is_void_when_the_queue_holds_anything_else(depth: int) -> None:
    assert "7,000 AMQP messages were accepted" in runs.why_void([result()], expected_depth=7_000, depth=depth)


@pytest.mark.parametrize(("depth", "counts"), [(6_999, False), (7_000, True), (7_003, True), (7_004, False)])
def test_a_stream_may_say_a_little_more_than_it_holds_and_never_less(depth: int, *, counts: bool) -> None:
    assert (runs.why_void([result()], expected_depth=7_000, depth=depth, extra=3) == "") is counts


def test_a_run_is_void_when_requests_failed() -> None:
    failed = result(all_failures=2, statuses={"200": 5, "503": 2})
    assert "2 requests failed (answers by status: {'200': 5, '503': 2})" in runs.why_void(
        [failed], expected_depth=7_000, depth=7_000
    )


def test_a_run_is_void_when_the_server_went() -> None:
    assert runs.why_void([result(ended_early="gone")], expected_depth=0, depth=0) == "gone"


def test_a_run_is_void_when_nothing_was_answered_in_time() -> None:
    assert runs.why_void([result(requests=0)], expected_depth=7_000, depth=7_000)


@pytest.mark.parametrize(
    ("batch", "lists", "sms_per_message", "expected"),
    [(1_000, 1, 1, 1_000), (1_000, 1, 100, 10), (1_000, 3, 100, 12), (10, 3, 100, 3), (1, 3, 100, 1), (250, 1, 100, 3)],
)
def test_each_list_has_envelopes_of_its_own(batch: int, lists: int, sms_per_message: int, expected: int) -> None:
    assert runs.amqp_messages(Setup(batch=batch, sms_per_message=sms_per_message), lists) == expected


def one_run(system: str, messages: int, cpu_us: float, *, void: str = "") -> Run:
    return Run(
        system=system,
        setup=Setup(batch=1_000, in_flight=8),
        seconds=2.0,
        requests=messages // 1_000,
        messages=messages,
        failures=0,
        p50_ms=5.0,
        p99_ms=9.0,
        client_cpu_us_per_message=0.1,
        server_cpu_us_per_message=cpu_us,
        server_cpu_us_per_request=cpu_us * 1_000,
        broker_cpu_us_per_message=30.0,
        database_cpu_us_per_message=0.3,
        peak_mb=70.0,
        other_cores=0.0,
        ticks=[],
        void=void,
    )


def test_void_runs_enter_no_figure_and_are_shown() -> None:
    rounds = [
        [one_run(BARE_PUBLISHER, 100_000, 0.5), one_run(GATEWAY, 95_000, 2.0)],
        [one_run(BARE_PUBLISHER, 100_000, 0.5), one_run(GATEWAY, 999_000, 0.1, void="7 accepted, 6 in the queue")],
    ]
    compared = compare.evaluate(machine.describe(), Options(sizes={1_000: 8}), rounds)
    gateway = next(one for one in compared.summaries if one.system == GATEWAY)
    assert gateway.messages_per_s.highest == 47_500
    assert [run.void for run in compared.void] == ["7 accepted, 6 in the queue"]


def test_ratios_are_taken_within_a_round() -> None:
    """The machine is twice as fast in the second round. The ratios stay the same."""
    rounds = [
        [one_run(BARE_PUBLISHER, 50_000, 1), one_run(GATEWAY, 45_000, 4), one_run(FASTAPI, 5_000, 200)],
        [one_run(BARE_PUBLISHER, 100_000, 1), one_run(GATEWAY, 90_000, 2), one_run(FASTAPI, 10_000, 100)],
    ]
    bars = compare.evaluate(machine.describe(), Options(sizes={1_000: 8}), rounds).bars
    ratios = {bar.what: bar.measured for bar in bars}
    share = ratios["accepted msg/s ÷ bare publisher's"]
    assert [share.lowest, share.highest] == pytest.approx([0.9, 0.9])
    assert ratios["FastAPI's CPU per message ÷ gateway's"].lowest == pytest.approx(50)


def test_the_gateway_is_compared_with_the_baseline_within_a_round() -> None:
    rounds = [
        [one_run(GATEWAY, 50_000, 4), one_run(BASELINE, 40_000, 8)],
        [one_run(GATEWAY, 100_000, 2), one_run(BASELINE, 80_000, 4)],
    ]
    options = Options(sizes={1_000: 8}, systems=(GATEWAY, BASELINE))
    (against,) = compare.evaluate(machine.describe(), options, rounds).against_baseline
    assert [against.messages_per_s.lowest, against.messages_per_s.highest] == pytest.approx([1.25, 1.25])
    assert against.gateway_cpu_per_request.median == pytest.approx(0.5)


def test_a_handful_of_requests_gives_no_verdict() -> None:
    """Three requests of the slow system are chance, however good the ratio looks."""
    rounds = [[one_run(BARE_PUBLISHER, 100_000, 1), one_run(GATEWAY, 95_000, 2), one_run(FASTAPI, 3_000, 300)]]
    verdicts = {bar.what: bar.verdict for bar in compare.evaluate(machine.describe(), Options({1_000: 8}), rounds).bars}
    assert verdicts["accepted msg/s ÷ FastAPI's, batch of 1,000"] == "too few requests: 3"
    assert verdicts["accepted msg/s ÷ bare publisher's"] == "met"


def test_the_bare_publisher_counts_a_batch_only_when_all_of_it_is_confirmed() -> None:
    confirms = Confirms(size=3)
    confirms.add(1.0)
    confirms.add(2.0)
    assert confirms.settle(2, multiple=False) == []
    assert confirms.settle(1, multiple=False) == []
    assert confirms.settle(3, multiple=False) == [1.0]
    assert confirms.settle(5, multiple=True) == []
    assert confirms.settle(6, multiple=True) == [2.0]
    assert len(confirms) == 0
