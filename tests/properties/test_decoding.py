"""Decoding any bytes gives messages or one of three refusals. Promise 10."""

import json
import re
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.errors import GatewayError, InvalidJson, MissingMessages, TooManyMessages
from gateway.ingest.decoding import decode_bulk
from tests.properties import MORE

# The whole vocabulary: nothing of it can be a part of the body.
REASON = re.compile(
    rf"{InvalidJson.sentence}: (?:it is empty|it is not an object|it is nested too deeply|it ends too early"
    "|it starts with a byte order mark|half of a surrogate pair near its end|invalid UTF-8 near byte (\\d+)"
    "|(?:trailing (?:characters|comma in (?:array|object))|object keys must be strings|expected [^ ]{3}(?: or [^ ]{3})?"
    "|invalid (?:character|number|escaped character|escape character in string|utf-16 surrogate pair"
    "|character in unicode escape)|unexpected end of (?:hex escape|escaped utf-16 surrogate pair)) near byte (\\d+))"
)
EXAMPLES = settings(derandomize=MORE == 1, max_examples=300 * MORE, deadline=None)


def request_of(*messages: bytes, more: bytes = b"") -> bytes:
    return b'{"messages":[' + b",".join(messages) + b"]" + more + b"}"


json_documents = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["messages", "to", "list_number", "body", "wrap_links", "metadata"]), inner)
    ),
    max_leaves=12,
)


@EXAMPLES
@given(
    document=st.fixed_dictionaries(
        {"messages": st.lists(json_documents) | json_documents, "list_number": json_documents}
    )
    | json_documents
)
def test_any_json_is_messages_or_one_of_three_refusals(document: Any) -> None:
    body = json.dumps(document).encode()  # NaN and Infinity as well, as Python spells them
    expected: type[GatewayError] | int
    if not isinstance(document, dict) or not is_strict_json(body):
        expected = InvalidJson
    elif not isinstance(document.get("messages"), list) or not document["messages"]:
        expected = MissingMessages
    else:
        expected = len(document["messages"])
    assert what_comes_of(body) == expected


def is_strict_json(body: bytes) -> bool:
    constants: list[str] = []
    json.loads(body, parse_constant=constants.append)
    return not constants


def what_comes_of(body: bytes) -> type[GatewayError] | int:
    """Return the refusal, or the number of messages."""
    try:
        return len(decode_bulk(body).messages)
    except GatewayError as refusal:
        return type(refusal)


@EXAMPLES
@given(
    cut=st.integers(0, 400),
    drop=st.integers(0, 3),
    insert=st.binary(max_size=3)
    | st.sampled_from([b'"', b"\\", b"{", b"]", b",", b"\xff", b"\xed\xa0\x80", b"\\ud800"]),
)
@example(cut=0, drop=0, insert=b"\xef\xbb\xbf")
def test_a_request_damaged_anywhere_is_messages_or_one_of_three_refusals(cut: int, drop: int, insert: bytes) -> None:
    whole = request_of(
        b'{"to":"+14155551234","list_number":null,"body":"\xe2\x82\xac \\ud83d\\ude00","wrap_links":true,'
        b'"contact_data":{"first_name":"J","custom_fields":{"a":[1,2]}},"metadata":{"a":{"b":[]}}}',
        b'{"to":5,"body":[],"metadata":"x"}',
        b"null",
        more=b',"list_number":"+18005551000"',
    )
    damaged = whole[:cut] + insert + whole[cut + drop :]
    try:
        bulk = decode_bulk(damaged)
    except (MissingMessages, TooManyMessages):
        return
    except InvalidJson as refusal:
        assert_reason_fits(refusal, damaged)
        return
    reference = json.loads(damaged)  # nothing is let in that is no JSON
    assert len(bulk.messages) == len(reference["messages"])


@EXAMPLES
@given(body=st.binary(max_size=60))
def test_random_bytes_are_refused(body: bytes) -> None:
    with pytest.raises((InvalidJson, MissingMessages)) as raised:
        decode_bulk(body)
    if isinstance(raised.value, InvalidJson):
        assert_reason_fits(raised.value, body)


def assert_reason_fits(refusal: InvalidJson, body: bytes) -> None:
    """Assert that a refusal consists of known words and a position in the body."""
    found = REASON.fullmatch(str(refusal))
    assert found, str(refusal)
    assert int(found[1] or found[2] or 0) <= len(body)
