"""docs/api.md, "What the consumer gets", "Message ids" and the macro: read from the real queue, byte for byte."""

import re
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from aio_pika import DeliveryMode

from gateway.ingest.decoding import HUGE_BODY_BYTES
from tests.support.gateways import GatewayUnderTest
from tests.support.outbound_queue import OutboundQueue


async def test_the_payload_is_exactly_the_documented_one(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    before = datetime.now(UTC)
    body = f"""
    {{"messages": [{{
        "to": "+14155551234", "list_number": "{gateway.caller.list_number}", "wrap_links": true,
        "body": "Your promo code is SAVE20. Ref: {{{{messageId}}}}",
        "contact_data": {{ "first_name": "Ann",  "custom_fields": {{"a": 1e400}} }},
        "metadata": {{"nested":
            [1, 2.50, "\\u00e9"]}}
    }}]}}"""
    status, answer, _ = await gateway.post(body.encode(), X_Request_Id="order-77")
    assert (status, answer) == (200, {"queued_count": 1, "error_count": 0, "errors": []})
    (message,) = await queue.take_all()
    message_id = message.message_id or ""
    accepted_at = msgspec.json.decode(message.body, type=dict[str, msgspec.Raw])["accepted_at"]
    assert re.fullmatch("[0-9A-Za-z]{8}", message_id)
    assert message.body.decode() == (
        f'{{"id":"{message_id}","account_id":{gateway.caller.account_id},"list_id":{gateway.caller.list_id},'
        f'"list_number":"{gateway.caller.list_number}","to":"+14155551234",'
        f'"body":"Your promo code is SAVE20. Ref: {message_id}","wrap_links":true,'
        '"contact_data":{ "first_name": "Ann",  "custom_fields": {"a": 1e400} },'
        '"metadata":{"nested":\n            [1, 2.50, "\\u00e9"]},'
        f'"accepted_at":{bytes(accepted_at).decode()},"request_id":"order-77","index":0}}'
    )
    stamp = bytes(accepted_at).decode().strip('"')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", stamp)
    assert before - timedelta(milliseconds=1) <= datetime.fromisoformat(stamp) <= datetime.now(UTC)


async def test_a_huge_body_gives_the_same_payloads(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    """Its values are decoded where they stand, and `contact_data` after the others: decision 0049."""
    contact_data = '{ "x": [' + ("[" * 100 + "]" * 100 + ", ") * 3_000 + '1e400], "first_name" : "Ann"}'
    metadata = '{"nested": {"contact_data": {"x": [%s1]}}, "a":\t1e400}' % ("{}, " * 150_000)
    fields = f'"to": "+14155551234", "list_number": "{gateway.caller.list_number}", "body": "Ref: {{{{messageId}}}}"'
    bad = f'{{{fields}, "contact_data": {{"x": [[1]], "first_name": 5}}}}'
    good = f'{{{fields}, "contact_dat\\u0061" : {contact_data} , "metadata": {metadata} }}'
    body = f'{{"x": [{{}}], "messages": [1], "messages" : [ {bad}, 1.5, {good}, [] ] }}\n'.encode()
    assert len(body) > HUGE_BODY_BYTES
    status, answer, _ = await gateway.post(body)
    assert (status, answer["queued_count"]) == (200, 1)
    assert [(row["index"], row["code"]) for row in answer["errors"]] == [
        (0, "invalid_field"),
        (1, "missing_to"),
        (3, "missing_to"),
    ]
    (message,) = await queue.take_all()
    sent = msgspec.json.decode(message.body, type=dict[str, msgspec.Raw])
    assert bytes(sent["contact_data"]).decode() == contact_data
    assert bytes(sent["metadata"]).decode() == metadata
    assert bytes(sent["body"]).decode() == f'"Ref: {message.message_id}"'


async def test_the_amqp_properties_are_the_documented_ones(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await gateway.send([gateway.message()])
    (message,) = await queue.take_all()
    assert message.delivery_mode == DeliveryMode.PERSISTENT
    assert message.content_type == "application/json"
    assert message.type == "sms.v1"
    assert message.message_id == msgspec.json.decode(message.body)["id"]
    assert message.exchange == gateway.runtime.settings.amqp_exchange


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "NUL \x00 and bell \x07 and tab \t and newline \n",
        "emoji 😀👩‍👩‍👧 and flags 🇩🇪",
        "right to left: שלום مرحبا \u202e",
        'quotes " and \\ and / and \u2028',
        "{{firstName}} {{ messageId }} {{messageid}} {{{}}} {{",
        " ",
    ],
)
async def test_a_text_arrives_as_it_was_sent(gateway: GatewayUnderTest, queue: OutboundQueue, text: str) -> None:
    _, answer = await gateway.send([gateway.message(body=text)])
    assert answer["queued_count"] == 1
    (payload,) = await queue.take_payloads()
    assert payload["body"] == text


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("{{messageId}}", "ID"),
        ("{{messageId}} and {{messageId}}", "ID and ID"),
        ("{{{{messageId}}}}", "{{ID}}"),
        ("{{messageId", "{{messageId"),
        ("{{firstName}}: {{messageId}}", "{{firstName}}: ID"),
    ],
)
async def test_only_the_message_id_macro_is_filled(
    gateway: GatewayUnderTest, queue: OutboundQueue, text: str, rendered: str
) -> None:
    await gateway.send([gateway.message(body=text, metadata={"note": "{{messageId}}"})])
    (payload,) = await queue.take_payloads()
    assert payload["body"] == rendered.replace("ID", payload["id"])
    assert payload["metadata"] == {"note": "{{messageId}}"}


async def test_a_text_larger_than_a_frame_arrives_whole(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    text = "0123456789" * 30_000 + "é"
    _, answer = await gateway.send([gateway.message(body="small"), gateway.message(body=text), gateway.message()])
    assert answer["queued_count"] == 3
    bodies = [payload["body"] for payload in await queue.take_payloads()]
    assert bodies[0] == "small"
    assert bodies[1] == text


async def test_messages_of_a_list_keep_their_order(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    await gateway.send([gateway.message(body=str(n)) for n in range(1000)])
    payloads = await queue.take_payloads()
    assert [payload["body"] for payload in payloads] == [str(n) for n in range(1000)]
    assert [payload["index"] for payload in payloads] == list(range(1000))
    assert len({payload["id"] for payload in payloads}) == 1000


@pytest.mark.parametrize("nothing", [..., None])
async def test_what_was_not_sent_is_left_out(gateway: GatewayUnderTest, queue: OutboundQueue, nothing: object) -> None:
    await gateway.send([gateway.message(wrap_links=nothing, contact_data=nothing, metadata=nothing)])
    (payload,) = await queue.take_payloads()
    assert payload["wrap_links"] is False
    assert "contact_data" not in payload
    assert "metadata" not in payload


async def test_metadata_a_hundred_levels_deep_passes_unchanged(gateway: GatewayUnderTest, queue: OutboundQueue) -> None:
    deep = '{"a":' * 100 + "1" + "}" * 100
    number = gateway.caller.list_number
    body = f'{{"messages":[{{"to":"+14155551234","list_number":"{number}","body":"x","metadata":{deep}}}]}}'
    status, answer, _ = await gateway.post(body.encode())
    assert (status, answer["queued_count"]) == (200, 1)
    (message,) = await queue.take_all()
    assert f'"metadata":{deep},' in message.body.decode()
