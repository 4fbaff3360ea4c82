"""One scenario of each kind; `scripts/faults` runs them all, longer and repeatedly."""

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from tests.faults.deployment import Deployment, open_deployment
from tests.faults.runner import run_scenario
from tests.faults.scenarios import SCENARIOS

ROOM_S = 2.0  # beyond a request's deadline: the promise is 0.5 s; a busy test machine gets more

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def deployment() -> AsyncIterator[Deployment]:
    """Yield a cluster, a pair of databases, and gateways that stay from scenario to scenario."""
    async with open_deployment() as opened:
        yield opened


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.is_short])
async def test_promises_are_kept_when(deployment: Deployment, name: str) -> None:
    scenario = SCENARIOS[name]
    if scenario.hurts_broker and not deployment.has_own_broker:
        pytest.skip("the broker that GATEWAY_AMQP_URL names must not be broken")
    report = await run_scenario(deployment, scenario, room_s=ROOM_S)
    assert report.broken == []
