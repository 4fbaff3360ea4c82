"""Keyed requests while each commit takes milliseconds, as with a synchronous standby. Promises 5 and 13.

Statements and failures are counted, not times.
"""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import NamedTuple

import aiohttp
import asyncpg
import pytest

from gateway.cli.admin import open_admin
from testbed import Servers
from tests.support.callers import Caller, Client, make_caller
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway, new_name, run_gateway
from tests.support.outbound_queue import OutboundQueue

CALLERS, EACH = 64, 5
CROWD = 350
# A statement that inserts or updates both, or that deletes and updates, fires twice: 10 ms.
SLOW_STATEMENTS = """
    CREATE SEQUENCE fired;
    CREATE FUNCTION be_slow() RETURNS trigger LANGUAGE plpgsql
        AS $$ BEGIN PERFORM nextval('fired'), pg_sleep(0.005); RETURN NULL; END $$;
    CREATE TRIGGER be_slow AFTER INSERT OR UPDATE OR DELETE ON idempotency_keys EXECUTE FUNCTION be_slow()
"""


class Slow(NamedTuple):
    """A gateway on a database whose writes of keys are slow, and a connection to that database."""

    gateway: GatewayUnderTest
    database: asyncpg.Connection
    other: Caller

    async def statements(self) -> int:
        """Return how many statements have written keys."""
        statements: int = await self.database.fetchval("SELECT last_value / 2 FROM fired")
        return statements


@pytest.fixture
async def slow(servers: Servers, start_gateway: StartGateway, make_settings: MakeSettings) -> AsyncIterator[Slow]:
    if servers.postgres is None:
        pytest.skip("needs a PostgreSQL of its own, to make a database in")
    name = new_name()
    url = await asyncio.to_thread(servers.postgres.create_database, name)
    completed = await asyncio.to_thread(run_gateway, "migrate", database_url=url)
    assert completed.returncode == 0, completed.stderr
    database = await asyncpg.connect(url)
    await database.execute(SLOW_STATEMENTS)
    # Patient: the machine may be busy, and counts decide.
    settings = make_settings(database_url=url, database_timeout_s=10.0)
    gateway = await start_gateway(settings, database_url=url)
    async with open_admin(url) as admin:
        other = await make_caller(admin, "neighbour")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as gateway.session:
        yield Slow(gateway, database, other)
    async with OutboundQueue(gateway.runtime.settings.amqp_url, gateway.runtime.settings.amqp_queue) as queue:
        await queue.delete()
    await database.close()
    await gateway.runtime.pool.close()
    await asyncio.to_thread(servers.postgres.drop_database, name)


async def test_every_answer_is_stored_and_repeated(slow: Slow) -> None:
    gateway = slow.gateway
    body = gateway.caller.body()

    async def call(number: int, replayed: str | None) -> list[bool]:
        answers = [await gateway.post(body, Idempotency_Key=f"{number}-{n}") for n in range(EACH)]
        return [answer[0] == 200 and answer[2].get("Idempotent-Replayed") == replayed for answer in answers]

    first = await asyncio.gather(*(call(number, None) for number in range(CALLERS)))
    statements = await slow.statements()
    print(f"{statements} statements for {CALLERS * EACH} requests")
    assert all(map(all, first))
    again = await asyncio.gather(*(call(number, "true") for number in range(CALLERS)))
    assert all(map(all, again)), "answers were lost, and their batches published again"
    assert (gateway.runtime.idempotency.unsettled, gateway.runtime.pool.failures) == (0, 0)
    assert await slow.database.fetchval("SELECT count(*) FROM idempotency_keys WHERE answer IS NOT NULL") == (
        CALLERS * EACH
    )
    assert statements < CALLERS * EACH / 4, "without groups there are two for each request"


async def test_one_accounts_crowd_does_not_cost_a_neighbour_an_answer(slow: Slow) -> None:
    gateway, stop = slow.gateway, asyncio.Event()
    neighbour = Client(gateway.api_url, gateway.session, slow.other)

    async def keep_sending(number: int) -> None:
        for n in count():
            if stop.is_set():
                return
            await gateway.post(gateway.caller.body(), Idempotency_Key=f"{number}-{n}")

    crowd = [asyncio.create_task(keep_sending(number)) for number in range(CROWD)]
    await asyncio.sleep(0.5)
    before = await slow.statements()
    answers = [await neighbour.post(slow.other.body(), Idempotency_Key=f"{number}") for number in range(5)]
    statements = await slow.statements() - before
    stop.set()
    await asyncio.gather(*crowd)
    print(f"{statements} statements during 5 requests of the neighbour")
    assert [status for status, _, _ in answers] == [200] * 5
    assert (gateway.runtime.idempotency.unsettled, gateway.runtime.pool.failures) == (0, 0)
    assert statements <= 5 * 40, "a request of the neighbour waits for a hundred statements of the crowd"
