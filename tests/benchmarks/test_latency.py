"""Percentiles are exact to three digits, and processes add up without loss."""

import pytest

from benchmarks.drivers import latency
from benchmarks.drivers.latency import Recorder


def test_percentiles_are_right_to_three_digits() -> None:
    recorder = Recorder()
    for microseconds in range(1, 100_001):
        recorder.record(microseconds / 1e6)
    merged = latency.merge([recorder.encoded()])
    assert merged.count == 100_000
    for percentile in (50, 90, 99, 99.9):
        assert merged.at(percentile) == pytest.approx(percentile, rel=0.001)
    assert merged.at(100) == pytest.approx(100, rel=0.001)


def test_two_processes_add_up_to_one() -> None:
    latencies = [1e-6, 0.001, 0.0123, 0.2, 3.5, 60.0]
    whole, first, second = Recorder(), Recorder(), Recorder()
    for number, seconds in enumerate(latencies):
        whole.record(seconds)
        (first, second)[number % 2].record(seconds)
    assert latency.merge([first.encoded(), second.encoded()]) == latency.merge([whole.encoded()])


def test_no_request_is_no_error() -> None:
    merged = latency.merge([Recorder().encoded()])
    assert merged.count == 0
    assert merged.at(99) == 0.0
