"""More connections than the broker keeps up with wait in turn, and are not refused. Promise 8."""

import asyncio
import re
from collections import Counter

import aiohttp
import msgspec

from testbed import Servers
from testbed.processes import http_get
from tests.hostile.attacked_gateway import open_gateway
from tests.support.callers import make_caller

CONNECTIONS, BATCH, REQUESTS = 60, 500, 240  # together one and a half times the window's first size


async def test_more_connections_than_the_window_holds_are_all_served(servers: Servers) -> None:
    async with open_gateway(servers, confirm_timeout_s="30") as gateway:
        caller = await make_caller(gateway.admin)
        body, numbers = caller.body(BATCH), iter(range(REQUESTS))
        answers: Counter[int] = Counter()
        counted = 0

        async def send(session: aiohttp.ClientSession) -> None:
            nonlocal counted
            for _ in numbers:
                async with session.post(gateway.url, data=body, headers=caller.headers) as response:
                    answers[response.status] += 1
                    counted += msgspec.json.decode(await response.read()).get("queued_count", 0)

        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            await asyncio.gather(*(send(session) for _ in range(CONNECTIONS)))
        assert answers == {200: REQUESTS}
        _, metrics = http_get(gateway.process.ops_port, "/metrics") or (0, b"")
        (waited,) = re.findall(rb'gateway_stage_duration_seconds_count\{stage="wait"\} (\S+)', metrics)
        assert float(waited) > 0
        assert counted == await gateway.queue.depth() == REQUESTS * BATCH
        assert gateway.alarms() == []
