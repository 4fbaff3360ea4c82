"""Each system for a moment on the real servers: every accepted message is in the queue."""

import asyncio

import pytest

from benchmarks.drivers import runs
from benchmarks.drivers.backends import QUEUE_TYPES, Backends, Names, with_account
from benchmarks.drivers.systems import BARE_PUBLISHER, BASELINE, FASTAPI, FASTAPI_LOGGED, GATEWAY, Setup
from benchmarks.drivers.workers import REPOSITORY
from benchmarks.questions import neighbour, sweep
from testbed import Servers


@pytest.fixture(scope="module")
def backends(servers: Servers) -> Backends:
    return asyncio.run(with_account(servers, lists=2))


@pytest.mark.parametrize("system", [BARE_PUBLISHER, GATEWAY, BASELINE, FASTAPI, FASTAPI_LOGGED])
def test_what_a_system_accepts_is_in_the_queue(backends: Backends, system: str) -> None:
    setup = Setup(batch=100, in_flight=4, warm_up_s=0.3, duration_s=1.0, baseline=str(REPOSITORY))
    run = runs.run(system, backends, setup)
    assert run.void == ""
    assert run.messages > 0
    assert run.server_cpu_us_per_message > 0
    assert run.broker_cpu_us_per_message > 0


@pytest.mark.parametrize("system", [BARE_PUBLISHER, GATEWAY])
def test_envelopes_and_shards_are_counted_to_the_last_one(backends: Backends, system: str) -> None:
    """Each list of 50 fills one envelope of 30 and one of 20."""
    setup = Setup(batch=100, in_flight=4, sms_per_message=30, shards=2, warm_up_s=0.3, duration_s=1.0)
    assert runs.run(system, backends, setup).void == ""


@pytest.mark.parametrize("queue_type", QUEUE_TYPES)
def test_every_type_of_queue_can_be_counted(backends: Backends, queue_type: str) -> None:
    setup = Setup(batch=100, in_flight=2, queue_type=queue_type, sms_per_message=10, warm_up_s=0.1, duration_s=0.5)
    assert runs.run(BARE_PUBLISHER, backends, setup).void == ""


def test_a_sweep_counts_on_an_empty_queue_and_on_a_backlog(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "FILL_S", 0.5)
    options = sweep.Options(series={10: (2,)}, rounds=1, seconds=0.5, warm_up_s=0.1)
    for backlog in (0, 1_000):
        (reading,) = sweep.readings_on(backends, options, backlog)
        assert reading.void == ""
        assert reading.messages_per_s > 0
        assert reading.refused_per_s == 0


def test_a_caller_beside_a_greedy_account_is_served(backends: Backends) -> None:
    """Each situation for a moment: counts decide, not timings."""
    load = neighbour.Options(
        rates=(100, neighbour.SATURATED),
        connections=4,
        batch=10,
        slow_bodies=5,
        drip_s=0.05,
        rounds=1,
        seconds=0.5,
        warm_up_s=0.1,
    )
    readings = {one.situation: one for one in neighbour.readings_on(backends, load)}
    assert list(readings) == neighbour.situations(load)
    for situation, reading in readings.items():
        assert (reading.void, reading.failures) == ("", 0)
        assert reading.requests > 0
        assert (reading.messages_per_s > 0) is (situation.others != neighbour.ALONE)
        assert (reading.slow_bodies > 0) is (situation.others == neighbour.BESIDE)


def test_a_message_from_elsewhere_makes_a_run_void(backends: Backends, monkeypatch: pytest.MonkeyPatch) -> None:
    count = backends.wait_for_depth

    def one_more(names: Names, queue_type: str, expected: int) -> int:
        return count(names, queue_type, expected) + 1

    monkeypatch.setattr(backends, "wait_for_depth", one_more)
    setup = Setup(batch=10, in_flight=1, warm_up_s=0.1, duration_s=0.5)
    assert "are in the queue" in runs.run(BARE_PUBLISHER, backends, setup).void
