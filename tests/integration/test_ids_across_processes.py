"""Message ids stay unique across processes and restarts, for they come from leases of one database sequence."""

import asyncio
import re
import sys
from pathlib import Path

from gateway.config import Settings
from gateway.ingest.id_supply import IdSupply
from gateway.postgres.pool import Pool
from gateway.postgres.queries import Queries
from testbed import Servers

# One gateway's life, as far as ids are concerned; its process ends with most of a lease unused, as after a crash.
TAKE_IDS = """
import asyncio, os, sys
from gateway.config import Settings
from gateway.postgres.pool import Pool
from gateway.ingest.id_supply import IdSupply
from gateway.postgres.queries import Queries

async def main():
    pool = Pool(Settings(database_url=os.environ["GATEWAY_DATABASE_URL"], amqp_url="amqp://unused"))
    await pool.open()
    supply = IdSupply(Queries(pool))
    for _ in range(100):
        sys.stdout.write(" ".join((await supply.take(1000)).ids) + " ")
    await supply.close()
    await pool.close()

asyncio.run(main())
"""


async def live(servers: Servers, lives: int) -> list[str]:
    """Start a process that takes ids, `lives` times one after the other; return the ids."""
    ids: list[str] = []
    for _ in range(lives):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TAKE_IDS),
            env={"GATEWAY_DATABASE_URL": servers.database_url, "PYTHONPATH": str(Path(__file__).parents[2])},
            stdout=asyncio.subprocess.PIPE,
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        ids += output.decode().split()
    return ids


async def test_two_processes_take_a_million_ids_side_by_side_and_share_none(servers: Servers) -> None:
    one, other = await asyncio.gather(live(servers, 5), live(servers, 5))
    assert len(one) == len(other) == 500_000
    assert len({*one, *other}) == 1_000_000
    assert re.fullmatch("(?:[0-9A-Za-z]{8})+", "".join(one + other))
    assert {len(message_id) for message_id in one + other} == {8}


async def test_a_lease_that_runs_out_is_followed_by_another(servers: Servers) -> None:
    pool = Pool(Settings(database_url=servers.database_url, amqp_url="amqp://unused"))
    await pool.open()
    supply = IdSupply(Queries(pool))
    try:
        taken: list[str] = []
        while len(taken) < 2_100_000:
            for batch in await asyncio.gather(*(supply.take(999) for _ in range(64))):
                taken += batch.ids
        assert len(set(taken)) == len(taken)
    finally:
        await supply.close()
        await pool.close()
