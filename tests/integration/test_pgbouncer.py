"""The gateway and its commands behind a real PgBouncer in transaction mode, without prepared statements."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from gateway.cli.admin import open_admin
from testbed import PgBouncer, Servers
from tests.support.callers import make_caller
from tests.support.gateways import MakeSettings, StartGateway, run_gateway
from tests.support.outbound_queue import OutboundQueue


@pytest.fixture
async def bouncer(servers: Servers) -> AsyncIterator[PgBouncer]:
    running = PgBouncer(servers.database_url)
    try:
        await asyncio.to_thread(running.start)
        yield running
    finally:
        await asyncio.to_thread(running.close)


@pytest.fixture
def environment(bouncer: PgBouncer, servers: Servers) -> dict[str, str]:
    """Return settings that docs/settings.md prescribes behind PgBouncer before 1.21, with two hosts: the same twice."""
    address = f"127.0.0.1:{bouncer.port}"
    return {
        "GATEWAY_DATABASE_URL": bouncer.url.replace(address, f"{address},{address}"),
        "GATEWAY_DATABASE_STATEMENT_CACHE": "0",
        "GATEWAY_AMQP_URL": servers.amqp_url,
    }


@pytest.mark.parametrize("arguments", [("account", "create", "Acme"), ("account", "list"), ("migrate",)])
def test_each_command_works_again_and_again(environment: dict[str, str], arguments: tuple[str, ...]) -> None:
    """A prepared statement would stay at the server, and the next client would find its name taken."""
    for _ in range(3):
        done = run_gateway(*arguments, environment=environment)
        assert done.returncode == 0, done.stderr


def test_status_works_again_and_again(environment: dict[str, str]) -> None:
    for _ in range(2):
        hosts = msgspec.json.decode(run_gateway("status", "--json", environment=environment).stdout)["hosts"]
        assert [(host["role"], host["problem"]) for host in hosts] == [("primary", "")] * 2


async def test_a_gateway_serves_with_and_without_a_key(
    bouncer: PgBouncer, make_settings: MakeSettings, start_gateway: StartGateway, servers: Servers
) -> None:
    settings = make_settings(database_url=bouncer.url, database_statement_cache=0)
    gateway = await start_gateway(settings, wait_until_ready=False)
    await gateway.wait_until_ready()
    async with open_admin(servers.database_url) as admin:
        gateway.caller = await make_caller(admin)
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        body = gateway.caller.body(3)
        for key, replayed in ((None, None), ("one", None), ("one", "true")):
            headers = {"Idempotency_Key": key} if key else {}
            status, answer, answered = await gateway.post(body, **headers)
            assert (status, answer["queued_count"], answered.get("Idempotent-Replayed")) == (200, 3, replayed)
        assert await queue.depth() == 6
        await queue.delete()
