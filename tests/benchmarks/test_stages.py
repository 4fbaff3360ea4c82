"""`scripts/bench stages` measures every row, and compares rows with those of a baseline."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.questions import stages
from benchmarks.questions.stages import Stage, Stages
from benchmarks.report import machine
from benchmarks.report.figures import Figure
from gateway.ingest.wire import Answer
from gateway.telemetry.counters import OK, Counters


def test_every_stage_is_measured_at_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "SAMPLE_S", 0.0001)
    measured = stages.measure(sizes=(1, 10))
    names = [stage.name for stage in measured.stages]
    assert len(set(names)) == len(names)
    assert {"decode", "frames", "metrics", "prometheus-client"} <= set(names)
    assert all(set(stage.us_per_message) == {1, 10} for stage in measured.stages)


def test_the_row_metrics_is_a_whole_request() -> None:
    """The row makes as many observations as a request to the API."""
    counters = Counters()
    stages._measure(counters, 100, Answer(100, 0, []))
    assert counters.requests == {(200, OK): 1}
    assert counters.messages == {"queued": 100}
    assert [sum(stage.counts) for stage in counters.stages_s] == [1, 0, 1, 1, 1, 1, 1], "a request that does not wait"
    assert sum(counters.answered_s.counts) == sum(counters.request_messages.counts) == 1
    assert counters.messages_in_flight == 0


def one_stage(name: str, lowest: float) -> Stage:
    return Stage(name, False, {1_000: Figure(2 * lowest, lowest, 3 * lowest)})


def test_rows_are_compared_with_the_baseline_by_their_lowest_samples_within_a_round() -> None:
    described = machine.describe()
    rounds = [
        (
            Stages(described, [one_stage("decode", 0.2 * speed), one_stage("new", 1.0)], []),
            Stages(described, [one_stage("decode", 0.4 * speed), one_stage("old", 1.0)], []),
        )
        for speed in (1, 3)
    ]
    against = stages.compare_rounds(described, "1234567", rounds)
    assert [row.name for row in against.rows] == ["decode"]
    assert [against.rows[0].ratio[1_000].lowest, against.rows[0].ratio[1_000].highest] == pytest.approx([0.5, 0.5])
    assert against.only_here == ["new"]


@pytest.mark.parametrize("command", ["stages", "compare"])
def test_a_baseline_that_is_no_checkout_is_refused(command: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [command, "--baseline", str(tmp_path)])
    assert done.exit_code == 2
    assert "is no checkout" in " ".join(done.output.replace("│", " ").split())  # the output is wrapped in a box
