"""The fault suite in its short form; `scripts/faults` plays it longer, and repeats it."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.play import play
from tests.faults.scenarios import SCENARIOS
from tests.faults.stand import Stand, open_stand

ROOM_S = 2.0  # beyond a request's deadline: the promise is 0.5 s; a busy test machine gets more

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stand() -> AsyncIterator[Stand]:
    """A cluster, a pair of databases, and gateways that stay from scenario to scenario."""
    async with open_stand() as opened:
        yield opened


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.is_short])
async def test_promises_are_kept_when(stand: Stand, name: str) -> None:
    scenario = SCENARIOS[name]
    if scenario.hurts_broker and not stand.has_own_broker:
        pytest.skip("the broker that GATEWAY_AMQP_URL names is not ours to break")
    try:
        report = await play(stand, scenario, room_s=ROOM_S)
    except BaseException:
        await stand.stop_gateways()  # a scenario that failed half-way leaves nothing to the next one
        raise
    finally:
        await stand.heal()
    assert report.broken == []
