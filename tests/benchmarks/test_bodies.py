"""The CPU of large bodies: ratios, the bar, and one run with real servers."""

import pytest

from benchmarks.questions import bodies
from benchmarks.questions.bodies import Options, Reading
from benchmarks.report import terminal
from gateway.ingest.wire import MAX_BODY_BYTES
from testbed.bodies import LIST_NUMBER, SHAPES, clean_body


def test_each_shape_is_judged_by_the_clean_bodies_beside_it() -> None:
    readings = [Reading("deep", 200, 30.0, 10.0), Reading("deep", 200, 90.0, 45.0), Reading("wide", 200, 10.0, 10.0)]
    assert [(shape, ratio.median) for shape, ratio in bodies.ratios_of(readings).items()] == [
        ("deep", 2.5),
        ("wide", 1.0),
    ]
    (bar,) = bodies.bars_of(readings)
    assert (bar.row, bar.what, bar.verdict) == ("13", "deep", "missed")


def test_another_list_number_of_fifteen_characters_fits() -> None:
    other = b"+" + b"1" * (len(LIST_NUMBER) - 1)
    assert len(LIST_NUMBER) == 15
    assert len(clean_body(list_number=other)) <= MAX_BODY_BYTES
    assert len(SHAPES["good messages as metadata"]().replace(LIST_NUMBER, other)) <= MAX_BODY_BYTES


@pytest.mark.usefixtures("named_servers")
def test_the_gateway_answers_shape_and_clean_body() -> None:
    measured = bodies.measure(Options(like="fraction as m", bodies=1), lambda _: None)
    answers = {reading.shape: reading.status for reading in measured.readings}
    assert answers["fraction as metadata"] == 200
    assert answers["fraction as messages"] == 400
    assert answers["fraction as metadata of a single send"] == 400
    assert all(reading.cpu_ms > 0 < reading.clean_cpu_ms for reading in measured.readings)
    terminal.show(bodies.report(measured))
