"""The words with which a real RabbitMQ refuses the gateway are in the log and in `status`. Promises 3, 4 and 14."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from functools import partial

import pytest
from yarl import URL

from gateway.amqp.connection import declare_topology
from gateway.cli import status
from testbed import RabbitMQ, Servers
from tests.support.eventually import eventually
from tests.support.gateways import MakeSettings, StartGateway


@pytest.fixture
def rabbitmq(servers: Servers) -> RabbitMQ:
    """Return the session's broker, if it was started here."""
    if servers.rabbitmq is None:
        pytest.skip("makes users and virtual hosts: needs a RabbitMQ of its own")
    return servers.rabbitmq


@pytest.fixture
async def user(servers: Servers, rabbitmq: RabbitMQ) -> AsyncIterator[URL]:
    """Create a user without any right; yield the URL with which it connects."""
    name = f"refused-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(rabbitmq.ctl, "add_user", name, "s3cret")
    yield URL(servers.amqp_url).with_user(name).with_password("s3cret")
    await asyncio.to_thread(rabbitmq.ctl, "delete_user", name)


async def test_the_brokers_reason_for_closing_a_connection_is_shown(
    servers: Servers,
    rabbitmq: RabbitMQ,
    user: URL,
    start_gateway: StartGateway,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = f"full-{uuid.uuid4().hex[:8]}"
    await asyncio.to_thread(rabbitmq.ctl, "add_vhost", full)
    await asyncio.to_thread(rabbitmq.ctl, "set_permissions", "--vhost", full, "guest", ".*", ".*", ".*")
    await asyncio.to_thread(rabbitmq.ctl, "set_vhost_limits", "--vhost", full, '{"max-connections": 0}')
    guest = URL(servers.amqp_url)
    for url, reason in (
        (guest.with_path("/nowhere"), "530 NOT_ALLOWED - vhost nowhere not found"),
        (user, f"530 NOT_ALLOWED - access to vhost '/' refused for user '{user.user}'"),
        (
            guest.with_path(f"/{full}"),
            f"530 NOT_ALLOWED - access to vhost '{full}' refused for user 'guest': conn",
        ),
        (user.with_password("wrong"), "403 ACCESS_REFUSED - Login was refused"),
    ):
        settings = make_settings(amqp_url=str(url))
        await start_gateway(settings, wait_until_ready=False)
        await eventually(partial(lambda reason: reason in caplog.text, reason), timeout=10)
        assert any(reason in problem for problem in (await status.collect(settings, [], [])).problems)
    await asyncio.to_thread(rabbitmq.ctl, "delete_vhost", full)


async def test_a_user_without_the_right_to_write_is_refused_and_nothing_is_queued(
    rabbitmq: RabbitMQ,
    user: URL,
    start_gateway: StartGateway,
    make_settings: MakeSettings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    declared = make_settings()
    await declare_topology(declared)
    await asyncio.to_thread(rabbitmq.ctl, "set_permissions", str(user.user), "", "", "")
    names = {"amqp_exchange": declared.amqp_exchange, "amqp_queue": declared.amqp_queue}
    settings = make_settings(**names, amqp_url=str(user), amqp_topology="check")
    gateway = await start_gateway(settings)
    answers = [await gateway.post(gateway.caller.body()) for _ in range(20)]
    answers += await asyncio.gather(*(gateway.post(gateway.caller.body()) for _ in range(20)))
    assert {(code, answer["code"]) for code, answer, _ in answers} == {(503, "queue_unavailable")}
    refused = f"access to exchange '{declared.amqp_exchange}' in vhost '/' refused for user '{user.user}'"
    assert refused in caplog.text
    (problem,) = [one for one in (await status.collect(settings, [], [])).problems if one.startswith("broker ")]
    assert refused in problem
    assert "right to write" in problem

    await asyncio.to_thread(rabbitmq.ctl, "set_permissions", str(user.user), "", declared.amqp_exchange, "")
    await eventually(gateway.runtime.publisher.connections.is_usable, timeout=10)
    assert (await gateway.send([gateway.message()]))[1]["queued_count"] == 1
    assert not [one for one in (await status.collect(settings, [], [])).problems if one.startswith("broker ")]
