"""Decoding by example: messages, or one of three refusals. Random bytes: tests/properties/test_decoding.py."""

import json
import tracemalloc
from itertools import product
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from msgspec import UNSET, Raw
from msgspec.structs import astuple

from gateway.errors import GatewayError, InvalidDryRun, InvalidJson, MissingMessages, TooManyMessages
from gateway.ingest import decoding
from gateway.ingest.contact_data import is_null, is_object
from gateway.ingest.decoding import (
    LARGE_BODY_BYTES,
    LEAST_FAILED_BYTES,
    MAX_ELEMENTS,
    MAX_FAILED_BYTES,
    PIECE_BYTES,
    decode_bulk,
    decode_single,
)
from gateway.ingest.wire import MAX_BODY_BYTES, MAX_MESSAGES, WRONG_TYPE, Message, MistypedMessage

GOOD = b'{"to":"+14155551234","list_number":"+18005551000","body":"Hi"}'


def counted(calls: list[int], *names: str) -> dict[str, Any]:
    """Return decoders in place of those of `decoding`, by name. They add one to `calls` for each call."""

    def counting(decode: Any) -> Any:
        def count(*arguments: Any) -> Any:
            calls[0] += 1
            return decode(*arguments)

        return SimpleNamespace(decode=count)

    return {name: counting(getattr(decoding, name).decode) for name in names}


def request_of(*messages: bytes, more: bytes = b"") -> bytes:
    return b'{"messages":[' + b",".join(messages) + b"]" + more + b"}"


NOT_JSON = {
    "empty": b"",
    "space": b" \n",
    "half an object": b'{"messages":[',
    "trailing comma": b'{"messages":[' + GOOD + b",]}",
    "trailing comma in an object": b'{"messages":[],}',
    "trailing data": request_of(GOOD) + b"x",
    "two documents": request_of(GOOD) + request_of(GOOD),
    "NaN": request_of(b'{"to":NaN}'),
    "Infinity": request_of(b'{"unknown":Infinity}'),
    "minus Infinity": request_of(GOOD, more=b',"x":-Infinity'),
    "comment": b'{"messages":[/* none */]}',
    "line comment": b"// hi\n" + request_of(GOOD),
    "single quotes": b"{'messages':[]}",
    "bare key": b"{messages:[]}",
    "leading zero": request_of(b'{"to":01}'),
    "half a number": request_of(b'{"x":1.}'),
    "plus sign": request_of(b'{"x":+1}'),
    "half a literal": request_of(b'{"wrap_links":tru}'),
    "raw newline in a string": request_of(b'{"body":"a\nb"}'),
    "raw NUL in a string": request_of(b'{"body":"a\x00b"}'),
    "unknown escape": request_of(b'{"body":"\\q"}'),
    "short escape": request_of(b'{"body":"\\u12"}'),
    "BOM": b"\xef\xbb\xbf" + request_of(GOOD),
    "UTF-16": request_of(GOOD).decode().encode("utf-16"),
    "UTF-16 without BOM": request_of(GOOD).decode().encode("utf-16-le"),
    "UTF-32": request_of(GOOD).decode().encode("utf-32"),
    "Latin-1 in a body": request_of(b'{"body":"\xfc"}'),
    "Latin-1 in a key": request_of(b'{"\xfc":1}'),
    "Latin-1 in an unknown field": request_of(b'{"unknown":"\xfc"}'),
    "Latin-1 in metadata": request_of(GOOD[:-1] + b',"metadata":{"a":"\xfc"}}'),
    "Latin-1 beside messages": request_of(GOOD, more=b',"x":"\xfc"'),
    "Latin-1 in a mistyped": request_of(b'{"to":5,"unknown":{"a":["\xfc"]}}'),
    "Latin-1 between": request_of(GOOD + b"\xfc"),
    "overlong UTF-8": request_of(b'{"body":"\xc0\xaf"}'),
    "surrogate in UTF-8": request_of(b'{"body":"\xed\xa0\x80"}'),
    "beyond Unicode": request_of(b'{"body":"\xf4\x90\x80\x80"}'),
    "half a character": request_of(b'{"body":"\xe2\x82"}'),
    "null": b"null",
    "array": b"[]",
    "array of messages": b"[" + GOOD + b"]",
    "string": b'"messages"',
    "number": b"1",
    "true": b"true",
    "100,000 brackets": b"[" * 100_000,
    "100,000 braces": b'{"a":' * 100_000,
    "100,000 whole brackets": b"[" * 100_000 + b"]" * 100_000,
    "deep messages": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep metadata": request_of(GOOD[:-1] + b',"metadata":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"),
    "deep contact_data": request_of(GOOD[:-1] + b',"contact_data":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}"),
    "deep unknown": request_of(GOOD, more=b',"x":' + b"[" * 50_000 + b"]" * 50_000),
    "deep mistyped": request_of(b'{"to":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
    "deep beside a mistyped": request_of(b"5", b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}"),
}

LONE_SURROGATES = {
    "body": request_of(b'{"body":"\\ud800"}'),
    "low first": request_of(b'{"body":"\\udc00\\ud800"}'),
    "to": request_of(b'{"to":"\\udfff"}'),
    "key": request_of(b'{"\\ud800":1}'),
    "mistyped": request_of(b'{"to":5,"body":"\\ud800"}'),
    "default": request_of(GOOD, more=b',"list_number":"\\ud800"'),
    "metadata": request_of(GOOD[:-1] + b',"metadata":{"a":"\\ud83d"}}'),
    "contact_data": request_of(GOOD[:-1] + b',"contact_data":{"first_name":"\\ud83d"}}'),
}

NO_MESSAGES = {
    "{}": b"{}",
    "other keys": b'{"message":[' + GOOD + b"]}",
    "null": b'{"messages":null}',
    "empty": b'{"messages":[]}',
    "object": b'{"messages":{}}',
    "object of messages": b'{"messages":{"0":' + GOOD + b"}}",
    "string": b'{"messages":"x"}',
    "string like an array": b'{"messages":"[]"}',
    "number": b'{"messages":0}',
    "true": b'{"messages":true}',
    "the last of two": request_of(GOOD, more=b',"messages":null'),
    "null and a bad default": b'{"messages":null,"list_number":5}',
    "pretty null": b'{ "messages" :\n null }',
}


@pytest.mark.parametrize("body", NOT_JSON.values(), ids=NOT_JSON)
def test_what_is_not_one_json_object_in_utf_8_is_invalid_json(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        decode_bulk(body)


REASONS = {
    b"": "it is empty",
    b" \n": "it ends too early",
    b"[]": "it is not an object",
    b"null": "it is not an object",
    b"[" * LARGE_BODY_BYTES + b" ": "it is not an object",
    request_of(GOOD)[:-1]: "it ends too early",
    request_of(GOOD) + b" x": f"trailing characters near byte {len(request_of(GOOD)) + 2}",
    request_of(GOOD[:-1] + b",}"): f"trailing comma in object near byte {len(request_of(GOOD)) - 2}",
    request_of(b'{"to":5,}'): "trailing comma in object near byte 21",
    request_of(b'{"to":5,"body":"\n"}'): "invalid character near byte 29",
    b"{'messages':[]}": "object keys must be strings near byte 1",
    request_of(b"5", b"NaN"): "invalid character near byte 15",
    request_of(b'{"body":"\\ud800"}'): "half of a surrogate pair near its end",
    b'{"body":"\\ud80067890': "half of a surrogate pair near its end",
    b'{"body":"\\ud800678901': "unexpected end of hex escape near byte 15",
    b'{"body":"\\u00e9678901': "it ends too early",
    b"\xef\xbb\xbf" + request_of(GOOD): "it starts with a byte order mark",
    request_of(b'{"to":"\xff"}'): "invalid UTF-8 near byte 20",
    b'{"x":"' + "€".encode() * PIECE_BYTES + b'\xff"}': f"invalid UTF-8 near byte {6 + 3 * PIECE_BYTES}",
    request_of(GOOD)[:-1] + b',"x":"\xe2\x82': f"invalid UTF-8 near byte {len(request_of(GOOD)) + 5}",
    b'{"x":' + b"[" * 100_000: "it is nested too deeply",
}


@pytest.mark.parametrize(("body", "reason"), REASONS.items(), ids=REASONS.values())
def test_the_refusal_says_what_is_wrong_and_where(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidJson) as raised:
        decode_bulk(body)
    assert str(raised.value) == f"The request body must be one JSON object in UTF-8: {reason}"


@pytest.mark.parametrize("body", LONE_SURROGATES.values(), ids=LONE_SURROGATES)
def test_half_of_a_surrogate_pair_is_invalid_json(body: bytes) -> None:
    """It could not be encoded as UTF-8 for the consumer."""
    with pytest.raises(InvalidJson):
        decode_bulk(body)


@pytest.mark.parametrize("body", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_a_request_without_messages_says_so(body: bytes) -> None:
    with pytest.raises(MissingMessages):
        decode_bulk(body)


# Each body then takes the path of large ones: with very many values, slow to parse, huge, or huge with many fields.
PATHS: list[dict[str, int]] = [
    {"LARGE_BODY_BYTES": 10**9},
    {"LARGE_BODY_BYTES": 0, "MANY_COMMAS": -1},
    {"LARGE_BODY_BYTES": 0, "MANY_BRACKETS": 0},
    {"HUGE_BODY_BYTES": 0},
    {"HUGE_BODY_BYTES": 0, "MAX_FIELDS": 0},
    {"HUGE_BODY_BYTES": 0, "MAX_ELEMENTS": 0},
]


# All kinds of tokens, where a path may end or begin what it decodes.
SMALL = (
    b'{"x":[1,"y"],"dry_run":true,"messages":[{"to":"+1","body":7},null,{"contact_data":{"a":{}},"x":"\\n"}] ,'
    b'"list_number":"+2"}'
)
TOKENS = [b"", *(bytes([byte]) for byte in b'{}[]:,"1n \\x')]


def outcome(decode: Any, body: bytes) -> Any:
    try:
        decoded = decode(body)
    except GatewayError as refusal:
        return type(refusal)
    assert not decoded.typed or not any(isinstance(message, MistypedMessage) for message in decoded.messages)
    fields = [astuple(message)[:6] for message in decoded.messages]  # a typed single send has `dry_run` as well
    messages = [tuple(bytes(value) if isinstance(value, Raw) else value for value in values) for values in fields]
    return messages, decoded.list_number, decoded.dry_run


@pytest.mark.parametrize("path", PATHS[1:], ids=str)
@pytest.mark.parametrize("decode", [decode_bulk, decode_single])
def test_a_request_damaged_anywhere_has_the_same_outcome_in_every_path(decode: Any, path: dict[str, Any]) -> None:
    places = product((SMALL, SMALL.replace(b'"x"', b'"to"', 1)), range(len(SMALL) + 1), (0, 1), TOKENS)
    bodies = {whole[:at] + token + whole[at + cut :] for whole, at, cut, token in places}
    expected = {body: outcome(decode, body) for body in bodies}
    assert len({str(one) for one in expected.values()}) > 20
    with patch.multiple(decoding, **path):
        assert [body for body in bodies if outcome(decode, body) != expected[body]] == []


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("message", [GOOD, b"{}", b"0", b"null", b"[]"])
def test_a_thousand_messages_are_taken_and_one_more_is_too_many(message: bytes, path: dict[str, Any]) -> None:
    with patch.multiple(decoding, **path):
        assert len(decode_bulk(request_of(*[message] * 1_000)).messages) == 1_000
        with pytest.raises(TooManyMessages):
            decode_bulk(request_of(*[message] * 1_001))
        with pytest.raises(TooManyMessages):
            decode_bulk(request_of(*[message] * 1_000, b"5"))


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("decode", [decode_bulk, decode_single])
def test_a_dry_run_is_one_in_every_path(decode: Any, path: dict[str, Any]) -> None:
    request = request_of(GOOD) if decode is decode_bulk else GOOD
    with patch.multiple(decoding, **path):
        for value, expected in ((b"true", True), (b"false", False), (b"null", False)):
            for dry_run in (b',"dry_run":%b}', b',"dry_run" : %b \t\r\n}', b',"dry_run":1,"dry_run":%b ,"x":{}}'):
                assert decode(request[:-1] + dry_run % value).dry_run == expected
        for value in (b"1", b'"true"', b"{}", b"[]", b"true1"):
            with pytest.raises((InvalidDryRun, InvalidJson)):
                decode(request[:-1] + b',"dry_run":%b}' % value)
        with pytest.raises(InvalidDryRun):
            decode(request[:-1] + b',"dry_run":true,"dry_run":0}')


@pytest.mark.parametrize("brackets", [b"[", b"{"])
@pytest.mark.parametrize("more", [0, decoding.HUGE_BODY_BYTES])
def test_brackets_of_one_kind_are_counted(brackets: bytes, more: int) -> None:
    assert not decoding._has_many_brackets(brackets * decoding.MANY_BRACKETS + b" " * more)
    assert decoding._has_many_brackets(b" " * more + brackets * (decoding.MANY_BRACKETS + 1))


def test_a_good_message_is_taken_whatever_its_length() -> None:
    """Beside many brackets, no more than its first bytes are tried."""
    brackets = b',"x":[' + b"[]," * decoding.MANY_BRACKETS + b"[]]"
    for length in range(MAX_FAILED_BYTES - 10, MAX_FAILED_BYTES + 10):
        message = GOOD[:-2] + b"x" * (length - len(GOOD)) + b'"}'
        for after in (b"", b" \n"):
            (decoded,) = decode_bulk(request_of(message + after, more=brackets)).messages
            assert (decoded.to, len(str(decoded.body))) == ("+14155551234", 2 + length - len(GOOD))


def test_long_messages_fail_once() -> None:
    calls = [0]
    long = GOOD[:-1] + b',"x":"%b","to":1}' % (b"x" * 300_000)
    with patch.multiple(decoding, **counted(calls, "_message_in_place")):
        assert len(decode_bulk(request_of(*[long] * 10)).messages) == 10
    assert calls[0] == 1


def test_a_body_full_of_tiny_messages_is_too_many() -> None:
    for tiny in (b"{}", b"0"):
        count = MAX_BODY_BYTES // (len(tiny) + 1) - 10
        with pytest.raises(TooManyMessages):
            decode_bulk(request_of(*[tiny] * count))


@pytest.mark.parametrize(
    "more",
    [
        b',"x":' + b"9" * 4_000_000,
        b',"x":1e400',
        b',"x":-1e-400',
        b"".join(b',"k%d":0' % n for n in range(400_000)),
        b',"list_number":' + b"9" * 4_000_000,
        b',"list_number":1e400',
    ],
    ids=["4 MB number", "1e400", "-1e-400", "400,000 unknown keys", "4 MB default", "1e400 default"],
)
def test_huge_values_in_unknown_fields_are_skipped(more: bytes) -> None:
    assert len(decode_bulk(request_of(GOOD, more=more)).messages) == 1


@pytest.mark.parametrize("value", [b"9" * 1_000_000, b"1e400", b"-1e400"], ids=["1 MB number", "1e400", "-1e400"])
@pytest.mark.parametrize("field", [b"to", b"list_number", b"body", b"wrap_links", b"contact_data", b"metadata"])
def test_huge_numbers_in_a_message_are_values_of_the_wrong_type(field: bytes, value: bytes) -> None:
    (message,) = decode_bulk(request_of(b'{"%s":%s}' % (field, value))).messages
    if field in (b"contact_data", b"metadata"):
        assert not is_object(getattr(message, field.decode()))
    else:
        assert getattr(message, field.decode()) is WRONG_TYPE


# What is decoded


def test_a_well_formed_request_is_decoded_as_it_is() -> None:
    full = GOOD[:-1] + b',"wrap_links":true,"contact_data": {"a":1} ,"metadata":{}}'
    bulk = decode_bulk(request_of(GOOD, full, more=b',"list_number":"+18005552000"'))
    assert (bulk.typed, bulk.list_number) == (True, "+18005552000")
    plain = Message(to="+14155551234", list_number="+18005551000", body="Hi")
    assert bulk.messages[0] == plain
    assert (bulk.messages[0].contact_data, bulk.messages[0].metadata) == (UNSET, UNSET)
    assert bulk.messages[1].wrap_links is True
    assert bytes(Raw(bulk.messages[1].contact_data)) == b'{"a":1}'  # type: ignore[arg-type]
    assert bytes(Raw(bulk.messages[1].metadata)) == b"{}"  # type: ignore[arg-type]


def test_null_and_absent_are_the_same() -> None:
    nulls = b'{"to":null,"list_number":null,"body":null,"wrap_links":null,"contact_data":null,"metadata":null}'
    absent, null = decode_bulk(request_of(b"{}", nulls)).messages
    for name in ("to", "list_number", "body", "wrap_links"):
        assert getattr(absent, name) is getattr(null, name) is None
    for name in ("contact_data", "metadata"):
        assert getattr(absent, name) is UNSET
        assert is_null(getattr(null, name))


@pytest.mark.parametrize("value", [b"5", b"1.5", b"true", b"[]", b"{}", b" [ 1 ]"])
@pytest.mark.parametrize("field", ["to", "list_number", "body"])
def test_a_value_of_the_wrong_type_costs_only_its_message(field: str, value: bytes) -> None:
    bulk = decode_bulk(request_of(GOOD, b'{"to":"+1","body":"x", "%s" : %s }' % (field.encode(), value), GOOD))
    assert not bulk.typed
    first, mistyped, last = bulk.messages
    for one in (first, last):
        assert isinstance(one, Message)
        assert astuple(one) == ("+14155551234", "+18005551000", "Hi", None, UNSET, UNSET)
    assert isinstance(mistyped, MistypedMessage)
    rest = {"to": "+1", "list_number": None, "body": "x"} | {field: WRONG_TYPE}
    assert {name: getattr(mistyped, name) for name in rest} == rest


@pytest.mark.parametrize("value", [b"0", b"1", b'"true"', b"[]", b"{}"])
def test_only_true_false_and_null_are_wrap_links(value: bytes) -> None:
    (message,) = decode_bulk(request_of(b'{"wrap_links": %s }' % value)).messages
    assert message.wrap_links is WRONG_TYPE
    for word, meaning in ((b"true", True), (b"false", False), (b"null", None)):
        (message,) = decode_bulk(request_of(b'{"to":5,"wrap_links" : %s}' % word)).messages
        assert message.wrap_links is meaning


@pytest.mark.parametrize("element", [b"null", b"1", b'"x"', b"true", b"[]", b'["to"]', b"[[]]"])
def test_an_element_that_is_no_object_is_a_message_without_anything(element: bytes) -> None:
    _, mistyped, _ = decode_bulk(request_of(GOOD, element, GOOD)).messages
    assert (mistyped.to, mistyped.list_number, mistyped.body, mistyped.wrap_links) == (None, None, None, None)
    assert (mistyped.contact_data, mistyped.metadata) == (UNSET, UNSET)


def test_the_last_of_several_equal_keys_counts() -> None:
    bulk = decode_bulk(b'{"messages":5,"list_number":5,' + request_of(b'{"to":5,"to":"a","to":"b"}')[1:])
    assert [message.to for message in bulk.messages] == ["b"]
    assert bulk.list_number is WRONG_TYPE
    assert decode_bulk(request_of(GOOD, more=b',"list_number":5,"list_number":"+1"')).list_number == "+1"


def test_strings_are_the_same_in_both_decoders() -> None:
    text = '"\\u20ac\\n\\ud83d\\ude00 \u20ac\N{PILE OF POO}\\"\\/"'.encode()
    fast, slow = (
        decode_bulk(request_of(b'{"to":%s,"body":%s%s}' % (text, text, more))).messages[0]
        for more in (b"", b',"wrap_links":0')
    )
    assert isinstance(fast, Message)
    assert isinstance(slow, MistypedMessage)
    assert fast.to == fast.body == slow.to == slow.body == json.loads(text)


def test_a_bytearray_is_decoded_as_bytes_are() -> None:
    assert decode_bulk(bytearray(request_of(GOOD))) == decode_bulk(request_of(GOOD))


# Bodies with very many values


@pytest.mark.parametrize("element", [b"1", b"{}", b'"x"', b"null", b"[]"])
def test_a_body_full_of_tiny_elements_is_refused_before_a_list_of_them_is_built(element: bytes) -> None:
    body = b'{"messages":[' + b",".join([element] * (5_000_000 // (len(element) + 1))) + b"]}"
    tracemalloc.start()
    try:
        with pytest.raises(TooManyMessages):
            decode_bulk(body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < len(body) + 1_000_000  # at most one copy of the body


MAX_FAILED = MAX_FAILED_BYTES // LEAST_FAILED_BYTES  # short messages
SLOW = b"9" * 770 + b"e-1090"  # to convert it takes 30 µs


@pytest.mark.parametrize("limits", [{"LARGE_BODY_BYTES": 10**9}, {"HUGE_BODY_BYTES": 0}, {"MANY_COMMAS": 0}])
def test_few_numbers_are_converted_to_learn_that_they_are_no_strings(limits: dict[str, int]) -> None:
    calls = [0]
    attempts = counted(calls, "_message", "_message_in_place")
    with patch.multiple(decoding, **attempts | limits):
        messages = decode_bulk(request_of(*[b'{"to":%b}' % SLOW] * 1_000)).messages
        more = b'"messages":[' + b",".join([b'{"to":%b}' % SLOW] * 999) + b"],"
        decode_bulk(b"{" + more * 5 + request_of(b'{"to":%b}' % SLOW)[1:])
    assert {message.to for message in messages} == {WRONG_TYPE}
    assert 0 < calls[0] <= 2 * MAX_FAILED


def test_messages_with_the_right_types_stay_fast_beside_some_others() -> None:
    calls = [0]
    bad = [b'{"to":5}'] * (MAX_FAILED - 1)
    with patch.multiple(decoding, **counted(calls, "_message")):
        messages = decode_bulk(request_of(*bad, *[GOOD] * 500)).messages
    assert sum(isinstance(message, Message) for message in messages) == 500
    assert calls[0] == len(bad) + 500


@pytest.mark.parametrize("element", [b"1", b"{}", b"1e300", b'{"to":1e300}', b"[]"])
def test_of_too_many_elements_none_is_decoded_alone(element: bytes) -> None:
    calls = [0]
    decoders = counted(calls, "_message", "_loose_message")
    with patch.multiple(decoding, **decoders), pytest.raises(TooManyMessages):
        decode_bulk(request_of(*[element] * 8_000, b"1"))
    assert calls[0] == 0


def test_elements_of_earlier_messages_are_decoded_up_to_a_bound() -> None:
    calls = [0]
    decoders = counted(calls, "_message_in_place", "_loose_message_in_place")
    with patch.multiple(decoding, HUGE_BODY_BYTES=0, **decoders):
        decode_bulk(b"{" + (b'"messages":[' + b"{}," * 998 + b"{}],") * 50 + request_of(GOOD)[1:])
    assert MAX_ELEMENTS <= calls[0] <= MAX_ELEMENTS + 2 * (MAX_MESSAGES + 1)


MANY, SIX_HUNDRED = (b"[" + b"{}," * (count - 1) + b"{}]" for count in (200_000, 600))
REPEATED = {
    "200,000 before one": (b'{"messages":%s,"messages":[%s]}' % (MANY, GOOD), 1),
    "of any type": (b'{"messages":1,"messages":%s,"messages":[1e400,[],"x",{},%s]}' % (MANY, GOOD), 5),
    "600 and 600": (b'{"messages":%s,"messages":%s,"x":%s}' % (SIX_HUNDRED, SIX_HUNDRED, MANY), 600),
    "one after the other": (b"{" + b'"messages":[{}],' * 100_000 + b'"messages":[{},{}]}', 2),
    "with an escaped name": (b"{" + rb'"m\u0065ssages":[{}],' * 100_000 + rb'"messag\u0065s":[{},{}]}', 2),
}


@pytest.mark.parametrize(("body", "count"), REPEATED.values(), ids=REPEATED)
def test_the_last_messages_count_also_where_a_body_has_very_many_values(body: bytes, count: int) -> None:
    assert len(decode_bulk(body).messages) == count


@pytest.mark.parametrize("last", [b"null", b"1", b'"x"', b"{}", b"[]"])
def test_a_large_body_without_messages_says_so(last: bytes) -> None:
    with pytest.raises(MissingMessages):
        decode_bulk(b'{"messages":%s,"messages":%s}' % (MANY, last))


def test_commas_in_texts_are_not_elements() -> None:
    messages = [{"to": "+1", "body": "," * 5_000, "metadata": {"a": [1, 2, {}]}}] * 1000
    assert len(decode_bulk(json.dumps({"messages": messages}).encode()).messages) == 1000
