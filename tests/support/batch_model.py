"""A model of validation and of payloads, written from docs/api.md alone: slow, obvious, and one message at a time.

The model works on the request as Python's own json reads it, and knows nothing of typed decoding, of fast paths,
or of msgspec. assert_as_the_model_says() compares it with the code under test.
"""

import json
from collections.abc import Mapping
from typing import Any

from gateway.ingest import batch
from gateway.ingest.batch import Batch, BatchIds, Draft, Origin
from gateway.ingest.decoding import decode_bulk

ACCOUNT_ID = 42
ACCEPTED_AT = "2026-11-23T11:00:00.123Z"
REQUEST_ID = "req-1"
OWNED = {"+18005551000": 7, "+18005552000": 9}

SENTENCES = {
    "missing_to": "to is required",
    "missing_list_number": "list_number is required",
    "missing_body": "body is required and must be a non-empty string",
    "invalid_phone": "to must be an E.164 phone number such as +14155551234",
    "invalid_list_number": "list_number must be an E.164 phone number such as +18005551000",
    "list_not_found": "No active list of this account has this list_number",
}
NO_OBJECT = "A message must be an object with to, list_number and body"


# The model


def is_e164(value: object) -> bool:
    """Return True for a plus sign and 2 to 15 ASCII digits, the first not 0, and nothing else."""
    if not isinstance(value, str) or not 3 <= len(value) <= 16:
        return False
    return value[0] == "+" and value[1] in "123456789" and all(character in "0123456789" for character in value[2:])


def is_missing(value: object) -> bool:
    return value is None or value == ""


def is_valid_contact_data(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    texts_fit = all(isinstance(value.get(name), str | None) for name in ("first_name", "last_name", "timezone"))
    return texts_fit and isinstance(value.get("custom_fields"), dict | None)


def model_code(message: object, default: object, owned: Mapping[str, int] = OWNED) -> str | None:
    """Return the code of the first failing check, in the order of docs/api.md."""
    if not isinstance(message, dict):
        return "missing_to"
    to, body = message.get("to"), message.get("body")
    list_number = default if is_missing(message.get("list_number")) else message["list_number"]
    checks = {
        "missing_to": is_missing(to),
        "missing_list_number": is_missing(list_number),
        "missing_body": is_missing(body) or not isinstance(body, str),
        "invalid_phone": not is_e164(to),
        "invalid_list_number": not is_e164(list_number),
        "invalid_field": not (
            isinstance(message.get("wrap_links"), bool | None)
            and (message.get("contact_data") is None or is_valid_contact_data(message["contact_data"]))
            and isinstance(message.get("metadata"), dict | None)
        ),
        "list_not_found": not isinstance(list_number, str) or list_number not in owned,
    }
    return next((code for code, fails in checks.items() if fails), None)


def model_payload(message: dict[str, Any], default: Any, index: int, message_id: str) -> dict[str, Any]:
    list_number = message.get("list_number") or default
    payload = {
        "id": message_id,
        "account_id": ACCOUNT_ID,
        "list_id": OWNED[list_number],
        "list_number": list_number,
        "to": message["to"],
        "body": message_id.join(message["body"].split("{{messageId}}")),
        "wrap_links": bool(message.get("wrap_links")),
    }
    payload |= {
        name: message[name] for name in ("contact_data", "metadata") if isinstance(message.get(name), dict)
    }  # left out where the caller sent none
    return payload | {"accepted_at": ACCEPTED_AT, "request_id": REQUEST_ID, "index": index}


# The system under test


def ids(count: int) -> list[str]:
    return [f"Id{n:06}" for n in range(count)]


def request_of(messages: Any, **top_level: Any) -> bytes:
    return json.dumps({"messages": messages} | top_level).encode()


def run(body: bytes) -> tuple[Draft, Batch]:
    draft = batch.validate(decode_bulk(body))
    return draft, build(draft)


def build(draft: Draft, lists: Mapping[str, int] = OWNED) -> Batch:
    return batch.build(draft, lists, BatchIds(ids(draft.size), []), Origin(ACCOUNT_ID, REQUEST_ID, ACCEPTED_AT))


def codes(body: bytes) -> dict[int, str]:
    """Return the code of each refused message, by index."""
    return {row.index: row.code for row in run(body)[1].rows}


def assert_as_the_model_says(body: bytes) -> None:
    request = json.loads(body)
    messages, default = request["messages"], request.get("list_number")
    draft, prepared = run(body)

    expected = {index: model_code(message, default) for index, message in enumerate(messages)}
    assert {row.index: row.code for row in prepared.rows} == {n: code for n, code in expected.items() if code}
    for row in prepared.rows:
        sent = messages[row.index]
        to = sent.get("to") if isinstance(sent, dict) else None
        assert row.to == (to[:64] if isinstance(to, str) else None)
        assert row.error == (SENTENCES.get(row.code, row.error) if isinstance(sent, dict) else NO_OBJECT)
        assert (row.may_be_queued, row.message_id) == (False, "")

    good = [index for index, code in expected.items() if code is None]
    assert list(prepared.indexes) == good
    assert len(prepared.ids) == len(prepared.outgoing.payloads) == len(prepared.recipients) == len(good)
    # Of its place in the request alone, so that a second run gives it to the same message, whatever else is refused.
    assert prepared.ids == [ids(len(messages))[index] for index in good]
    for index, message_id, payload in zip(good, prepared.ids, prepared.outgoing.payloads, strict=True):
        expected_payload = model_payload(messages[index], default, index, message_id)
        assert list(json.loads(payload).items()) == list(expected_payload.items())
    assert {row.index for row in draft.rows} == {
        n for n, code in expected.items() if code not in (None, "list_not_found")
    }


GOOD = {"to": "+14155551234", "list_number": "+18005551000", "body": "Hi"}


def only_payload(body: bytes) -> bytes:
    _, prepared = run(body)
    assert not prepared.rows
    (payload,) = prepared.outgoing.payloads
    return payload
