"""Each of the three systems, for a moment, on the real servers: every message accepted is in the queue."""

import asyncio

import pytest

from benchmarks import runs
from benchmarks.runs import FASTAPI, GATEWAY, LIMIT, Setup
from benchmarks.stand import QUEUE_TYPES, Names, Stand, become_someone
from testbed.servers import Servers


@pytest.fixture(scope="module")
def stand(servers: Servers) -> Stand:
    return asyncio.run(become_someone(servers, lists=2))


@pytest.mark.parametrize("system", [LIMIT, GATEWAY, FASTAPI])
def test_what_a_system_accepts_is_in_the_queue(stand: Stand, system: str) -> None:
    run = runs.run(system, stand, Setup(batch=100, in_flight=4, warm_up_s=0.3, duration_s=1.0))
    assert run.void == ""
    assert run.messages > 0
    assert run.server_cpu_us_per_message > 0
    assert run.broker_cpu_us_per_message > 0


@pytest.mark.parametrize("system", [LIMIT, GATEWAY])
def test_envelopes_and_shards_are_counted_to_the_last_one(stand: Stand, system: str) -> None:
    """Each list of 50 fills one envelope of 30 and one of 20."""
    setup = Setup(batch=100, in_flight=4, sms_per_message=30, shards=2, warm_up_s=0.3, duration_s=1.0)
    assert runs.run(system, stand, setup).void == ""


@pytest.mark.parametrize("queue_type", QUEUE_TYPES)
def test_every_type_of_queue_can_be_counted(stand: Stand, queue_type: str) -> None:
    setup = Setup(batch=100, in_flight=2, queue_type=queue_type, sms_per_message=10, warm_up_s=0.1, duration_s=0.5)
    assert runs.run(LIMIT, stand, setup).void == ""


def test_a_message_from_elsewhere_makes_a_run_void(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    count = stand.wait_for_depth

    def one_more(names: Names, queue_type: str, expected: int) -> int:
        return count(names, queue_type, expected) + 1

    monkeypatch.setattr(stand, "wait_for_depth", one_more)
    setup = Setup(batch=10, in_flight=1, warm_up_s=0.1, duration_s=0.5)
    assert "are in the queue" in runs.run(LIMIT, stand, setup).void
