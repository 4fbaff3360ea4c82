"""/metrics of `serve --workers`: each worker has a label, sums are right, and a death shows as a counter reset."""

import asyncio
import os
import signal

import aiohttp
from prometheus_client.parser import text_string_to_metric_families as parse

from testbed import Servers
from tests.support.callers import Caller, Client
from tests.support.gateways import GatewayProcess, process_environment, run_gateway, running
from tests.support.outbound_queue import OutboundQueue


async def scrape(session: aiohttp.ClientSession, url: str) -> dict[str, dict[str, float]]:
    """Return the samples: name and other labels → worker → value."""
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


async def test_workers_are_summed_by_the_query_and_a_death_shows_in_one_series(
    servers: Servers, caller: Caller
) -> None:
    settings = process_environment(servers)
    assert run_gateway("declare", environment=settings).returncode == 0
    async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
        await queue.put(5)
    async with (
        running(GatewayProcess(settings, workers=2)) as process,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session,
        aiohttp.ClientSession() as first,
        aiohttp.ClientSession() as second,
    ):
        found = await scrape(session, process.ops_url)
        async with asyncio.timeout(30):  # each worker asks when it has connected, and sees the queue of all
            while found.get("gateway_queue_messages:outbound") != {"0": 5, "1": 5}:
                await asyncio.sleep(0.1)
                found = await scrape(session, process.ops_url)
        assert found["gateway_queues_unread"] == {"0": 1, "1": 1}
        clients = [Client(process.url, each, caller) for each in (first, second)]
        for _ in range(20):  # over two connections, one to each worker
            for client in clients:
                assert (await client.post(caller.body(3)))[0] == 200
        found = await scrape(session, process.ops_url)
        queued = found["gateway_messages_total:queued"]
        assert set(queued) == {"0", "1"}
        assert all(queued.values())
        assert sum(queued.values()) == 120
        assert sum(found["gateway_request_messages_bucket:5.0"].values()) == 40
        assert [list(workers) for sample, workers in found.items() if sample.startswith("gateway_build")] == [[""]]
        assert found["gateway_workers:answering"] == {"": 2}
        assert set(found["process_resident_memory_bytes"]) == {"0", "1", "supervisor"}

        os.kill(process.workers.pop(), signal.SIGKILL)
        while (found := await scrape(session, process.ops_url))["gateway_workers:silent"] != {"": 1}:  # noqa: ASYNC110 - the processes set no event of ours
            await asyncio.sleep(0.01)
        assert len(found["gateway_messages_total:queued"]) == 1  # the dead one says nothing, rather than 0
        while (found := await scrape(session, process.ops_url))["gateway_workers:silent"] != {"": 0}:  # noqa: ASYNC110 - the processes set no event of ours
            await asyncio.sleep(0.01)
        after = found["gateway_messages_total:queued"]
        (survivor,) = [worker for worker in after if after[worker]]
        assert after[survivor] == queued[survivor]
        assert found["gateway_worker_restarts_total"] == {"": 1}
    async with OutboundQueue(servers.amqp_url, settings["GATEWAY_AMQP_QUEUE"]) as queue:
        await queue.delete()
