"""docs/asyncapi.yaml describes the messages in the queue: real messages and its own examples are valid by it."""

from pathlib import Path
from typing import Any

import jsonschema_rs
import msgspec
import pytest
import yaml
from aio_pika.abc import AbstractIncomingMessage

import gateway as package
from gateway.amqp.connection import ENVELOPE_TYPE, MESSAGE_TYPE
from gateway.config import Settings
from gateway.ingest.wire import MAX_MESSAGES, Payload
from tests.support.gateways import MakeSettings, StartGateway
from tests.support.outbound_queue import OutboundQueue

DOCUMENT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs" / "asyncapi.yaml").read_text())
COMPONENTS = DOCUMENT["components"]
MESSAGES: dict[str, dict[str, Any]] = {message["name"]: message for message in COMPONENTS["messages"].values()}
RICH = {
    "wrap_links": True,
    "contact_data": {"first_name": None, "timezone": "Europe/Berlin", "custom_fields": {"a": 1}, "unknown": []},
    "metadata": {"nested": [1, 2.5, None]},
}


def assert_as_documented(message: AbstractIncomingMessage) -> None:
    documented = MESSAGES[message.type or ""]
    assert message.content_type == documented["contentType"]
    assert documented["bindings"]["amqp"]["messageType"] == message.type
    assert message.delivery_mode == DOCUMENT["operations"]["takeSms"]["bindings"]["amqp"]["deliveryMode"]
    schema = {**documented["payload"], "components": COMPONENTS}
    jsonschema_rs.Draft202012Validator(schema).validate(msgspec.json.decode(message.body))


@pytest.mark.parametrize("messages_per_envelope", [1, 3])
async def test_messages_in_the_queue_are_as_documented(
    start_gateway: StartGateway, make_settings: MakeSettings, messages_per_envelope: int
) -> None:
    settings = make_settings(messages_per_envelope=messages_per_envelope)
    gateway = await start_gateway(settings)
    _, answer = await gateway.send([gateway.message(), gateway.message(**RICH), gateway.message(body="\x00 😀")] * 2)
    assert answer["queued_count"] == 6
    async with OutboundQueue(settings.amqp_url, settings.amqp_queue) as queue:
        messages = await queue.take_all()
        await queue.delete()
    assert len(messages) == 6 / messages_per_envelope
    for message in messages:
        assert_as_documented(message)


def test_the_fields_and_limits_are_the_gateways() -> None:
    sms = COMPONENTS["schemas"]["Sms"]
    assert list(sms["properties"]) == list(Payload.__struct_fields__)
    assert set(sms["properties"]) - set(sms["required"]) == {"contact_data", "metadata"}
    assert sms["properties"]["index"]["maximum"] == MAX_MESSAGES - 1
    assert set(MESSAGES) == {MESSAGE_TYPE, ENVELOPE_TYPE}
    defaults = dict(
        zip(Settings.__struct_fields__[-len(Settings.__struct_defaults__) :], Settings.__struct_defaults__, strict=True)
    )
    assert DOCUMENT["channels"]["outbound"]["address"] == defaults["amqp_queue"]
    assert (DOCUMENT["asyncapi"], DOCUMENT["info"]["version"]) == ("3.0.0", package.__version__)


def test_its_examples_are_as_its_schemas_say() -> None:
    for message in MESSAGES.values():
        validator = jsonschema_rs.Draft202012Validator({**message["payload"], "components": COMPONENTS})
        for example in message.get("examples", []):
            validator.validate(example["payload"])


def test_every_reference_leads_somewhere() -> None:
    def follow(node: object) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                found: Any = DOCUMENT
                for step in node["$ref"].removeprefix("#/").split("/"):
                    found = found[step]
            for value in node.values():
                follow(value)
        elif isinstance(node, list):
            for value in node:
                follow(value)

    follow(DOCUMENT)
