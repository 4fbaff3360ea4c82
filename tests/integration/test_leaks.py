"""Rounds of faults leave no task, connection, slot or unconfirmed message behind. Promise 15. Longer: scripts/soak."""

import asyncio
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil

from gateway.amqp.connection import CLOSE_TIMEOUT_S
from testbed import Servers
from tests.support.eventually import eventually
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.tcp_proxy import TcpProxy

ROUNDS = 8
LOOK_AGAIN_S = 0.25


async def post(gateway: GatewayUnderTest, **headers: str) -> int:
    body = gateway.caller.body(20)
    status, _, _ = await gateway.post(body, **headers)
    return status


async def serves(gateway: GatewayUnderTest) -> None:
    async with asyncio.timeout(60):
        while await post(gateway) != 200:  # noqa: ASYNC110 - only asking tells
            await asyncio.sleep(0.05)


async def held(gateway: GatewayUnderTest, ports: set[int]) -> dict[str, Any]:
    """Return all that an idle gateway holds; connections are those to these ports."""
    runtime = gateway.runtime
    await eventually(
        lambda: runtime.publisher.unconfirmed_messages == 0 and not runtime.publisher.connections.states()["draining"]
    )
    await eventually(lambda: len(runtime.publisher.connections.open) == runtime.settings.amqp_connections)
    await eventually(lambda: not runtime.idempotency._settling)
    names = [task.get_coro().__qualname__ for task in asyncio.all_tasks()]  # type: ignore[union-attr]
    return {
        "tasks": Counter(name for name in names if not name.startswith("_Link.")),  # without the proxies' own
        "connections": sum(
            1
            for connection in psutil.Process().net_connections("tcp")
            if connection.raddr and connection.raddr.port in ports
        ),
        "requests in flight": runtime.admission.requests,
        "bytes in flight": runtime.admission.reserved_bytes,
        "accounts in flight": dict(runtime.admission.requests_of),
        "unconfirmed bytes": runtime.publisher.unconfirmed_bytes,
    }


async def held_at_rest(gateway: GatewayUnderTest, ports: set[int]) -> dict[str, Any]:
    """Return what `held` returns, with only those tasks that are there at every look, once no more of them end.

    A heartbeat or a question about the queues has a task for a moment, and the closing of a lost connection for up to
    CLOSE_TIMEOUT_S.
    """
    at_rest, unchanged = await held(gateway, ports), 0
    while unchanged * LOOK_AGAIN_S < 2 * CLOSE_TIMEOUT_S:
        await asyncio.sleep(LOOK_AGAIN_S)
        moment = await held(gateway, ports)
        moment["tasks"] &= at_rest["tasks"]
        unchanged = unchanged + 1 if moment["tasks"] == at_rest["tasks"] else 0
        at_rest = moment
    return at_rest


async def test_faults_leave_nothing_behind(
    start_gateway: StartGateway, make_settings: MakeSettings, servers: Servers
) -> None:
    broker_url, database_url = urlsplit(servers.amqp_url.split(",")[0]), urlsplit(servers.database_url)
    async with (
        TcpProxy(broker_url.hostname or "", broker_url.port or 5672) as to_broker,
        TcpProxy(database_url.hostname or "", database_url.port or 5432) as to_database,
    ):
        gateway = await start_gateway(
            make_settings(
                amqp_url=servers.amqp_url.replace(f":{broker_url.port}", f":{to_broker.port}"),
                database_url=servers.database_url.replace(f":{database_url.port}", f":{to_database.port}"),
                amqp_heartbeat_s=1,
                confirm_timeout_s=0.6,
                database_timeout_s=0.3,
                abandon_timeout_s=1.0,
            )
        )

        async def a_round(number: int) -> None:
            async with aiohttp.ClientSession() as gateway.session:  # whose connections are not the gateway's leak
                for proxy in (to_broker, to_database):
                    proxy.black_hole()
                    keys = [f"{number}-{n}" for n in range(6)]
                    statuses = await asyncio.gather(*(post(gateway, Idempotency_Key=key) for key in keys))
                    assert set(statuses) <= {200, 503, 504}
                    proxy.pass_through()  # for new connections: the old ones stay open, and it is ours to close them
                    await serves(gateway)

        await a_round(0)  # what the first fault makes, such as a wider pool, is not a leak
        before = await held_at_rest(gateway, {to_broker.port, to_database.port})
        for number in range(1, ROUNDS):
            await a_round(number)
        after = await held_at_rest(gateway, {to_broker.port, to_database.port})
        # The pool may be wider than after the first round, by what it may have at most: a leak would be one each round.
        assert after.pop("connections") <= before.pop("connections") + gateway.runtime.settings.database_pool_size
        assert after == before
