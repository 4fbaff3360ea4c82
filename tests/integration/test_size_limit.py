"""max_message_size, lowered on a real RabbitMQ: only what is too large is refused. Promises 2, 4 and 10."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from gateway.cli.admin import Admin
from testbed import Servers
from tests.support.callers import make_caller
from tests.support.gateways import MakeSettings, StartGateway
from tests.support.neighbour import Neighbour
from tests.support.outbound_queue import OutboundQueue

LIMIT = 262_144
LARGE = "x" * 300_000


@pytest.fixture
async def _limit(servers: Servers) -> AsyncIterator[None]:
    if servers.rabbitmq is None:
        pytest.skip("changes the broker's limit: needs a RabbitMQ of its own")
    before = await asyncio.to_thread(servers.rabbitmq.limit_messages, LIMIT)
    yield
    await asyncio.to_thread(servers.rabbitmq.limit_messages, before)


@pytest.mark.usefixtures("_limit")
async def test_a_message_above_the_limit_costs_neither_its_batch_nor_a_neighbour(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    gateway = await start_gateway(make_settings())
    settings = gateway.runtime.settings
    async with (
        OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue,
        Neighbour(gateway.url, await make_caller(admin, "neighbour")) as neighbour,
    ):
        messages = [gateway.message(body=body) for body in ("first", LARGE, "last")]
        answers = [await gateway.send(messages) for _ in range(10)]
        alone = await gateway.send([messages[1]])
        await neighbour.stop()
        for status, answer in answers:
            assert (status, answer["queued_count"]) == (200, 2)
            assert [(row["index"], row["code"]) for row in answer["errors"]] == [(1, "queue_rejected")]
            assert "Shorten it" in answer["errors"][0]["error"], "also in the answer that made the limit known"
        assert (alone[0], alone[1]["queued_count"], alone[1]["errors"][0]["code"]) == (200, 0, "queue_rejected")
        assert neighbour.failures == []
        taken = await queue.take_payloads()
        ids = {payload["id"] for payload in taken}
        assert len(ids) == 2 * len(answers) + neighbour.counted
        assert max(len(payload["body"]) for payload in taken) < LIMIT
        await queue.delete()


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize("is_single", [False, True], ids=["batch", "single"])
async def test_a_message_above_the_limit_alone_is_refused_although_the_limit_is_not_known_yet(
    start_gateway: StartGateway, make_settings: MakeSettings, *, is_single: bool
) -> None:
    """A 503 would say that it should be sent again."""
    gateway = await start_gateway(make_settings())
    if is_single:
        status, row, _ = await gateway.post_single(gateway.message(body=LARGE))
    else:
        status, answer = await gateway.send([gateway.message(body=LARGE)])
        row = answer["errors"][0]
    assert (status, row["code"]) == (400 if is_single else 200, "queue_rejected")
    assert "Shorten it" in row["error"]


@pytest.mark.usefixtures("_limit")
async def test_an_envelope_above_the_limit_is_split_once_the_limit_is_known(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    gateway = await start_gateway(make_settings(messages_per_envelope=1000))
    settings = gateway.runtime.settings
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        messages = [gateway.message(body=f"{n} {'x' * 200}") for n in range(1000)]
        status, answer = await gateway.send(messages)
        assert (status, answer["code"]) == (503, "queue_unavailable"), "nothing was queued; to be sent again"
        assert (await gateway.send(messages))[1]["queued_count"] == 1000
        envelopes = await queue.take_all()
        assert all(len(envelope.body) <= LIMIT for envelope in envelopes)
        assert len({envelope.message_id for envelope in envelopes}) == len(envelopes) == 2
        everything = [sms for envelope in envelopes for sms in msgspec.json.decode(envelope.body)]
        assert [sms["index"] for sms in everything] == list(range(1000))
        await queue.delete()
