"""The manifests in use: a gateway process with the pod's settings, on a broker with the operators' topology."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aio_pika
import aiohttp
import pytest

from testbed import Port, Servers
from tests.deploy.manifests import Object, environment_of, gateway_of, only, probes_of, render
from tests.support.callers import Caller, Client
from tests.support.eventually import eventually
from tests.support.gateways import GatewayProcess, MakeSettings, StartGateway, new_name, running
from tests.support.outbound_queue import OutboundQueue

OUTBOUND = "sms.outbound"


@asynccontextmanager
async def declared_by_the_operators(amqp_url: str, name: str) -> AsyncIterator[None]:
    """Declare the topology of deploy/kubernetes/rabbitmq, with `name` for sms.outbound, and delete it at the end."""

    def specifications(kind: str) -> list[dict[str, Any]]:
        text = [one["spec"] for one in render("rabbitmq") if one["kind"] == kind]
        return [{field: renamed(value) for field, value in spec.items()} for spec in text]

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(item) for key, item in value.items()}
        return value.replace(OUTBOUND, name) if isinstance(value, str) else value

    async with await aio_pika.connect(amqp_url) as connection, await connection.channel() as channel:
        exchanges = [
            await channel.declare_exchange(spec["name"], spec["type"], durable=spec["durable"])
            for spec in specifications("Exchange")
        ]
        queues = [
            await channel.declare_queue(
                spec["name"],
                durable=spec["durable"],
                arguments={"x-queue-type": spec["type"], **spec.get("arguments", {})},
            )
            for spec in specifications("Queue")
        ]
        bound = {queue.name: queue for queue in queues}
        for spec in specifications("Binding"):
            await bound[spec["destination"]].bind(spec["source"], routing_key=spec["routingKey"])
        try:
            yield
        finally:
            for queue in queues:
                await queue.delete(if_unused=False, if_empty=False)
            for exchange in exchanges:
                await exchange.delete()


async def test_the_operators_declare_what_the_gateway_would(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """RabbitMQ refuses to declare a queue with other arguments, so a ready gateway proves that they are the same."""
    settings = make_settings(amqp_topology="declare")
    async with declared_by_the_operators(settings.amqp_url, settings.amqp_queue):
        gateway = await start_gateway(settings)
        status, answer = await gateway.send([gateway.message()])
        assert (status, answer["queued_count"]) == (200, 1)


async def exit_status(probe: Object, port: Port) -> int:
    """Run the command of a probe, with this operations port, and return its exit status."""
    _, *arguments = probe["exec"]["command"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, *arguments, env=os.environ | {"GATEWAY_OPS_PORT": str(port)}
    )
    return await process.wait()


@pytest.mark.parametrize("folder", ["base", "sidecar-example"])
async def test_a_pod_gets_ready_serves_and_ends_within_its_grace_period(
    folder: str, servers: Servers, caller: Caller
) -> None:
    name = new_name()
    # Two runs on one machine cannot both have 8080, and the tests' broker has no certificate.
    own = {"GATEWAY_API_PORT", "GATEWAY_OPS_PORT", "GATEWAY_AMQP_CA_FILE"}
    pods = {key: value for key, value in environment_of(folder).items() if key not in own}
    # Tests listen on the loopback address only.
    tests = {**servers.environment(), "GATEWAY_API_HOST": "127.0.0.1", "GATEWAY_OPS_HOST": "127.0.0.1"}
    names = {"GATEWAY_AMQP_EXCHANGE": name, "GATEWAY_AMQP_QUEUE": name}
    deployment = only(render(folder), "Deployment")
    grace_s = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    probes = probes_of(gateway_of(deployment)).values()

    async with (
        declared_by_the_operators(servers.amqp_url, name),
        running(GatewayProcess(pods | tests | names)) as process,
        aiohttp.ClientSession() as session,
        OutboundQueue(servers.amqp_url, name) as queue,
    ):
        for probe in probes:
            if "exec" in probe:
                assert await exit_status(probe, process.ops_port) == 0, probe
                assert await exit_status(probe, process.port) != 0, "the API has no such path"
            else:
                async with session.get(process.ops_url + probe["httpGet"]["path"]) as answer:
                    assert answer.status == 200, probe
        assert (await Client(process.url, session, caller).post(caller.body(100)))[0] == 200
        assert await queue.depth() == 100
        os.kill(process.pid, signal.SIGTERM)
        told = time.monotonic()
        await eventually(lambda: not process.is_running, timeout=grace_s)
        assert time.monotonic() - told < grace_s
