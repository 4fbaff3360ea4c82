"""`scripts/bench observing` measures every form of observation, and leaves logging as it was."""

import logging
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from benchmarks.__main__ import app
from benchmarks.questions import observing
from benchmarks.questions.observing import Observing
from gateway.telemetry.requests import RequestLog


def test_every_form_of_observation_is_measured_and_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(observing, "REQUESTS", 20)
    monkeypatch.setattr(observing, "SAMPLES", 2)
    logger = logging.getLogger("gateway.requests")
    before = list(logger.handlers)
    figures, page = tmp_path / "figures.json", tmp_path / "page.html"
    done = CliRunner().invoke(app, ["observing", "--json", str(figures), "--report", str(page)])
    assert done.exit_code == 0, done.output
    measured = msgspec.json.decode(figures.read_bytes(), type=Observing)
    assert [one.name for one in measured.rows] == [
        "record alone",
        *("log, sample 0", "log, sample 0.01", "log, sample 1"),
        *("traces, 0% recorded", "traces, 1% recorded", "traces, 100% recorded"),
    ]
    assert all(one.process_us.lowest >= one.loop_us.lowest > 0 for one in measured.rows)
    assert "traces, 100% recorded" in page.read_text(encoding="utf-8")
    assert logger.handlers == before
    assert logger.propagate


def test_a_request_is_logged_and_traced_as_the_gateway_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the rows would show less than a request costs."""
    exported = []
    monkeypatch.setattr(observing.DroppingExporter, "export", lambda self, spans: exported.extend(spans))
    monkeypatch.setattr(observing, "REQUESTS", 1)
    monkeypatch.setattr(observing, "SAMPLES", 1)
    with caplog.at_level(logging.INFO):
        observing._request(RequestLog(1), None)
    assert [record.getMessage() for record in caplog.records] == ["request"]
    observing.measure()
    steps = {"authenticate", "read", "validate", "resolve_lists", "build", "publish sms.outbound"}
    assert {span.name for span in exported} >= steps
