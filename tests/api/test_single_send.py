"""docs/api.md, "Single send": through HTTP, on the real servers; the broker is scripted where it must fail."""

import asyncio

import msgspec
import pytest

from examples.conformance.refusals import REFUSED
from gateway.cli.admin import Admin
from tests.support.callers import SINGLE_PATH, make_caller
from tests.support.gateways import GatewayUnderTest, MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue
from tests.support.scripted_broker import ScriptedBroker


async def test_a_message_is_queued_under_the_id_of_the_answer(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    sent = gateway.message(body="Ref {{messageId}}", wrap_links=True, contact_data={"x": 1}, metadata={"y": [2]})
    status, answer, headers = await gateway.post_single(sent, X_Request_Id="mine")
    assert (status, set(answer)) == (200, {"success", "message_id", "status"})
    assert (answer["success"], answer["status"], headers["X-Request-Id"]) == (True, "queued", "mine")
    (message,) = await queue.take_all()
    payload = msgspec.json.decode(message.body)
    assert message.message_id == payload["id"] == answer["message_id"]
    expected = {"body": f"Ref {payload['id']}", "wrap_links": True, "contact_data": {"x": 1}, "metadata": {"y": [2]}}
    expected |= {"index": 0, "request_id": "mine", "to": sent["to"], "list_id": gateway.caller.list_id}
    assert {name: payload[name] for name in expected} == expected


async def test_a_refused_message_is_a_refused_request(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    bad = [gateway.message(**changes) for _, changes, _ in REFUSED]
    _, bulk = await gateway.send(bad)
    for (name, _, code), message, row in zip(REFUSED, bad, bulk["errors"], strict=True):
        status, answer, _ = await gateway.post_single(message, Idempotency_Key="k")
        assert (status, answer) == (400, {"error": row["error"], "code": code}), name
    assert (await gateway.post_single(gateway.message(), Idempotency_Key="k"))[0] == 200, "nothing is kept for a 400"
    assert len(await queue.take_all()) == 1


async def test_a_foreign_and_an_inactive_list_are_not_found(
    gateway: GatewayUnderTest, admin: Admin, queue: OutboundQueue
) -> None:
    other = await make_caller(admin, "other")
    foreign = await gateway.post_single(gateway.message(list_number=other.list_number))
    await admin.set_list_status(gateway.caller.list_id, "inactive")
    inactive = await gateway.post_single(gateway.message())
    assert foreign[:2] == inactive[:2]
    assert (foreign[0], foreign[1]["code"]) == (400, "list_not_found")
    assert await queue.take_all() == []


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"[{}]", b'"x"', b"5", b"null", b"{", b"{}{}", b'{"to":"\xff"}', b"[" * 5_000, b'{"to":' * 5_000],
)
async def test_a_body_that_is_no_object_is_invalid(gateway: GatewayUnderTest, body: bytes) -> None:
    status, answer, _ = await gateway.post(body, SINGLE_PATH)
    assert (status, answer["code"]) == (400, "invalid_json")


async def test_requests_are_refused_as_batches_are(gateway: GatewayUnderTest) -> None:
    good = msgspec.json.encode(gateway.message())
    assert (await gateway.post(good, SINGLE_PATH, X_Api_Key="trk_" + "x" * 32))[1]["code"] == "invalid_api_key"
    assert (await gateway.post(good, SINGLE_PATH, Content_Type="text/plain"))[1]["code"] == "unsupported_media_type"
    assert (await gateway.post(good, SINGLE_PATH, Idempotency_Key="ü"))[1]["code"] == "invalid_idempotency_key"
    assert (await gateway.post(b" " * 5_300_000, SINGLE_PATH))[1]["code"] == "payload_too_large"
    async with gateway.session.get(gateway.api_url + SINGLE_PATH) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")


async def test_a_message_of_five_megabytes_is_queued(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    body = "€" * 1_700_000
    status, _, _ = await gateway.post_single(gateway.message(body=body))
    (message,) = await queue.take_all()
    assert (status, msgspec.json.decode(message.body)["body"]) == (200, body)


async def test_a_repeated_request_is_answered_again_and_published_once(
    gateway: GatewayUnderTest, queue: OutboundQueue
) -> None:
    first = await gateway.post_single(gateway.message(), Idempotency_Key="k")
    again = await gateway.post_single(gateway.message(), Idempotency_Key="k")
    assert first[:2] == again[:2]
    assert again[2]["Idempotent-Replayed"] == "true"
    assert len(await queue.take_all()) == 1


async def test_a_key_belongs_to_one_of_the_two_calls(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    body = msgspec.json.encode(gateway.message() | {"messages": [gateway.message()]})  # valid for both
    assert (await gateway.post(body, Idempotency_Key="k"))[1]["queued_count"] == 1
    status, answer, _ = await gateway.post(body, SINGLE_PATH, Idempotency_Key="k")
    assert (status, answer["code"]) == (422, "idempotency_key_reused")
    assert len(await queue.take_all()) == 1


async def test_an_unknown_outcome_names_the_message_and_a_retry_has_its_id(
    start_gateway: StartGateway, make_settings: MakeSettings, admin: Admin
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        gateway = await start_gateway(make_settings(amqp_url=broker.url, amqp_connections=1, confirm_timeout_s=0.3))
        status, answer, _ = await gateway.post_single(gateway.message(), Idempotency_Key="k")
        (published,) = broker.published
        assert (status, answer["code"], set(answer)) == (504, "outcome_unknown", {"error", "code", "message_id"})
        assert answer["message_id"] == published.properties.message_id
        await admin.set_list_status(gateway.caller.list_id, "inactive")
        again = await gateway.post_single(gateway.message(), Idempotency_Key="k")
        assert again[:2] == (504, answer), "the first run may have queued it: list_not_found would be too little"
        await admin.set_list_status(gateway.caller.list_id, "active")
        await gateway.wait_until_ready()  # the connection without confirms is replaced
        broker.on_publish = lambda session, published: session.nack(published.delivery_tag)
        assert (await gateway.post_single(gateway.message(), Idempotency_Key="k"))[:2] == (504, answer)
        assert len(broker.published) == 2
        broker.on_publish = lambda session, published: session.ack(published.delivery_tag)
        status, answer, _ = await gateway.post_single(gateway.message(), Idempotency_Key="k")
        assert (status, answer["message_id"]) == (200, published.properties.message_id)


async def test_what_the_broker_refuses_is_unavailable_and_what_is_too_large_is_refused(
    start_gateway: StartGateway, make_settings: MakeSettings, gateway: GatewayUnderTest
) -> None:
    async with ScriptedBroker() as broker:
        broker.mode = "silent"
        broker.on_publish = lambda session, published: session.nack(published.delivery_tag)
        refused = await start_gateway(make_settings(amqp_url=broker.url))
        status, answer, headers = await refused.post_single(refused.message())
        assert (status, answer["code"], headers["Retry-After"]) == (503, "queue_unavailable", "1")
    for connection in gateway.runtime.publisher.connections.open:
        connection.max_payload_bytes = 1_000
    status, answer, _ = await gateway.post_single(gateway.message(body="x" * 1_000))
    assert (status, answer["code"]) == (400, "queue_rejected")


async def test_single_sends_share_queries_with_small_batches(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    sends = [gateway.post_single(gateway.message()) for _ in range(30)]
    batches = [gateway.post(gateway.caller.body(2)) for _ in range(30)]
    answers = await asyncio.gather(*sends, *batches)
    assert {status for status, _, _ in answers} == {200}
    assert len({answer["message_id"] for _, answer, _ in answers[:30]}) == 30
    assert len(await queue.take_all()) == 90
