"""Envelopes and shards: counted, placed, refused and delivered per SMS, on the real servers and a scripted broker."""

from collections import Counter
from typing import Any

import msgspec
import pytest

from gateway.cli.admin import Admin
from tests.support.callers import new_number
from tests.support.gateways import MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.scripted_broker import Published, ScriptedBroker, Session


@pytest.mark.parametrize("queue_type", ["quorum", "classic"])
async def test_envelopes_carry_every_counted_sms_of_one_list_in_order(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin, queue_type: str
) -> None:
    settings = make_settings(messages_per_envelope=100, amqp_queue_type=queue_type)
    gateway = await start_gateway(settings)
    other = new_number()
    other_id = (await admin.add_list(gateway.caller.account_id, other))["id"]
    messages = [gateway.message(body=f"{n} {{{{messageId}}}}") for n in range(1000)]
    for n in range(0, 1000, 4):
        messages[n]["list_number"] = other
    messages[500]["to"] = "bad"
    _, answer = await gateway.send(messages)
    assert answer["queued_count"] == 999
    assert [row["index"] for row in answer["errors"]] == [500]
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        envelopes = await queue.take_all()
        await queue.delete()
    assert [envelope.type for envelope in envelopes] == ["sms.batch.v1"] * (3 + 8)
    carried: list[list[dict[str, Any]]] = [msgspec.json.decode(envelope.body) for envelope in envelopes]
    assert Counter(len(sms) for sms in carried) == {100: 9, 49: 1, 50: 1}
    assert all(len({sms["list_id"] for sms in envelope}) == 1 for envelope in carried)
    everything = [sms for envelope in carried for sms in envelope]
    for list_id in (gateway.caller.list_id, other_id):
        indexes = [sms["index"] for sms in everything if sms["list_id"] == list_id]
        assert indexes == sorted(indexes)
    assert all(sms["body"] == f"{sms['index']} {sms['id']}" for sms in everything)
    ids = {sms["id"] for sms in everything} | {envelope.message_id for envelope in envelopes}
    assert len(ids) == 999 + 11


async def test_an_envelope_in_a_stream_is_counted(start_gateway: StartGateway, make_settings: MakeSettings) -> None:
    settings = make_settings(messages_per_envelope=500, amqp_queue_type="stream")
    gateway = await start_gateway(settings)
    _, answer = await gateway.send([gateway.message()] * 1000)
    assert answer == {"queued_count": 1000, "error_count": 0, "errors": []}
    _, answer = await gateway.send([gateway.message()])
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        envelopes = [msgspec.json.decode(message.body) for message in await queue.read_stream(3)]
        assert [len(envelope) for envelope in envelopes] == [500, 500, 1]  # these, and no other before the last
        assert [sms["index"] for envelope in envelopes[:2] for sms in envelope] == list(range(1000))
        await queue.delete()


async def test_a_refused_or_unanswered_envelope_costs_each_sms_in_it(
    start_gateway: StartGateway, make_settings: MakeSettings
) -> None:
    """Three envelopes of two SMS: acked, nacked, never answered."""
    async with ScriptedBroker() as broker:
        broker.mode = "silent"

        def settle_some(session: Session, published: Published) -> None:
            if published.delivery_tag == 3:
                session.ack(1)
                session.nack(2)

        broker.on_publish = settle_some
        settings = make_settings(
            amqp_url=broker.url, amqp_connections=1, messages_per_envelope=2, confirm_timeout_s=0.5
        )
        gateway = await start_gateway(settings)
        _, answer = await gateway.send([gateway.message()] * 6)
        assert answer["queued_count"] == 2
        assert [(row["index"], row["code"]) for row in answer["errors"]] == [
            (2, "queue_rejected"),
            (3, "queue_rejected"),
            (4, "outcome_unknown"),
            (5, "outcome_unknown"),
        ]
        third = msgspec.json.decode(broker.published[2].body)
        assert [row["message_id"] for row in answer["errors"][2:]] == [sms["id"] for sms in third]
        assert broker.violations == []


@pytest.mark.parametrize("messages_per_envelope", [1, 3])
async def test_a_list_always_goes_to_the_same_shard_and_keeps_its_order(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin, messages_per_envelope: int
) -> None:
    settings = make_settings(queue_shards=3, messages_per_envelope=messages_per_envelope)
    gateway = await start_gateway(settings)
    numbers = [new_number() for _ in range(5)]
    list_ids = {(await admin.add_list(gateway.caller.account_id, number))["id"] for number in numbers}
    for _ in range(2):
        messages = [gateway.message(list_number=numbers[n % 5], body=str(n)) for n in range(100)]
        assert (await gateway.send(messages))[1]["queued_count"] == 100
    seen: Counter[int] = Counter()
    for shard, name in enumerate(settings.queues()):
        async with OutboundQueue(settings.amqp_url, name) as queue:
            bodies = [msgspec.json.decode(message.body) for message in await queue.take_all()]
            await queue.delete()
        payloads: list[dict[str, Any]] = (
            bodies if messages_per_envelope == 1 else [sms for envelope in bodies for sms in envelope]
        )
        by_list: dict[int, list[int]] = {}
        for payload in payloads:
            by_list.setdefault(payload["list_id"], []).append(payload["index"])
        for list_id, indexes in by_list.items():
            assert list_id % 3 == shard
            assert indexes == sorted(indexes[:20]) * 2
            seen[list_id] += len(indexes)
    assert seen == dict.fromkeys(list_ids, 40)
