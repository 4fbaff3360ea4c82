"""/metrics of `serve --workers`: each worker under its own label, sums right, and a death is a reset, not a fall."""

import asyncio
import os
import signal
import uuid

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families as parse

from gateway.cli.admin import Admin
from testbed import Gateway, Servers
from tests.conftest import new_number
from tests.support.outbound_queue import OutboundQueue


class TwoWorkers(Gateway):
    """The gateway as two processes."""

    def _command(self) -> list[str]:
        return [*super()._command(), "--workers", "2"]


async def scrape(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, float]]:
    """Sample's name and its other labels → worker → value."""
    async with session.get(f"{url}/metrics") as response:
        assert response.status == 200
        families = list(parse(await response.text()))
    assert len({family.name for family in families}) == len(families), "each name has its HELP and TYPE once"
    found: dict[str, dict[str, float]] = {}
    for family in families:
        assert family.documentation, family.name
        for sample in family.samples:
            labels = [value for name, value in sample.labels.items() if name != "worker"]
            found.setdefault(":".join([sample.name, *labels]), {})[sample.labels.get("worker", "")] = sample.value
    return found


async def test_workers_are_summed_by_the_query_and_a_death_shows_in_one_series(servers: Servers, admin: Admin) -> None:
    name = f"test.{uuid.uuid4().hex[:12]}"
    account_id = (await admin.create_account("measured"))["id"]
    key, number = (await admin.create_key(account_id))["key"], new_number()
    await admin.add_list(account_id, number)
    process = TwoWorkers(servers.environment() | {"GATEWAY_AMQP_EXCHANGE": name, "GATEWAY_AMQP_QUEUE": name})
    try:
        await asyncio.to_thread(process.start)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:

            async def send(count: int) -> None:
                body = {"messages": [{"to": "+447911123412", "list_number": number, "body": "x"}] * count}
                url = f"{process.url}/api/v2/send/bulk"
                async with session.post(url, json=body, headers={"X-Api-Key": key}) as response:
                    assert response.status == 200

            for _ in range(40):  # the kernel spreads connections: one worker alone gets them all once in 2**39
                await send(3)
            found = await scrape(session, process.ops_url)
            queued = found["gateway_messages_total:queued"]
            assert set(queued) == {"0", "1"}
            assert all(queued.values())
            assert sum(queued.values()) == 120
            assert sum(found["gateway_request_messages_bucket:5.0"].values()) == 40
            assert [list(workers) for sample, workers in found.items() if sample.startswith("gateway_build")] == [[""]]
            assert found["gateway_workers:answering"] == {"": 2}
            assert set(found["process_resident_memory_bytes"]) == {"0", "1", "supervisor"}

            supervisor = psutil.Process(process.pid)
            os.kill(supervisor.children()[0].pid, signal.SIGKILL)
            while (found := await scrape(session, process.ops_url))["gateway_workers:silent"] != {"": 1}:  # noqa: ASYNC110 - the processes set no event of ours
                await asyncio.sleep(0.01)
            assert len(found["gateway_messages_total:queued"]) == 1  # the dead one says nothing, rather than 0
            while (found := await scrape(session, process.ops_url))["gateway_workers:silent"] != {"": 0}:  # noqa: ASYNC110 - the processes set no event of ours
                await asyncio.sleep(0.01)
            after = found["gateway_messages_total:queued"]
            (survivor,) = [worker for worker in after if after[worker]]
            assert after[survivor] == queued[survivor]
            assert found["gateway_worker_restarts_total"] == {"": 1}
    finally:
        await asyncio.to_thread(process.close)
        async with OutboundQueue(servers.amqp_url, name) as queue:
            await queue.delete()
