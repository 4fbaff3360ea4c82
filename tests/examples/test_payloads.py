"""The reference consumer reads payloads as docs/asyncapi.yaml describes them; tests/api holds the gateway to it."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from examples.consumer.payloads import Poison, Sms, decode

DOCUMENT: dict[str, Any] = yaml.safe_load((Path(__file__).parents[2] / "docs" / "asyncapi.yaml").read_text())
MESSAGES: dict[str, dict[str, Any]] = {each["name"]: each for each in DOCUMENT["components"]["messages"].values()}
SCHEMA: dict[str, Any] = DOCUMENT["components"]["schemas"]["Sms"]


def test_every_field_that_the_consumer_needs_is_always_there() -> None:
    assert set(Sms.__struct_fields__) <= set(SCHEMA["required"])


def test_the_documented_examples_are_read_alone_and_in_an_envelope() -> None:
    payloads = [example["payload"] for example in MESSAGES["sms.v1"]["examples"]]
    assert payloads
    read = [decode("sms.v1", msgspec.json.encode(payload))[0] for payload in payloads]
    assert read == decode("sms.batch.v1", msgspec.json.encode(payloads))
    for sms, payload in zip(read, payloads, strict=True):
        shown = msgspec.to_builtins(sms) | {"accepted_at": payload["accepted_at"]}
        assert shown == {name: payload[name] for name in Sms.__struct_fields__}


@pytest.mark.parametrize(
    "change", [(b'"body":"', b'"body":"\xff'), (b"{", b'{"x":' + b"[" * 100_000), (b'{"id":"', b'{"id":"\\n')]
)
def test_what_can_never_be_read_is_poison(change: tuple[bytes, bytes]) -> None:
    """Another exception would end the consumer."""
    payload = msgspec.json.encode(MESSAGES["sms.v1"]["examples"][0]["payload"])
    assert decode("sms.v1", payload)
    with pytest.raises(Poison):
        decode("sms.v1", payload.replace(*change, 1))


def test_an_id_ends_with_its_last_character() -> None:
    payload = MESSAGES["sms.v1"]["examples"][0]["payload"]
    with pytest.raises(Poison):
        decode("sms.v1", msgspec.json.encode(payload | {"id": payload["id"] + "\n"}))
