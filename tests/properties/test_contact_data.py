"""`contact_data` is taken out of large bodies while they are decoded. The result is the same as without."""

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Raw

from gateway.errors import GatewayError, InvalidJson
from gateway.ingest import batch, contact_data, decoding
from gateway.ingest.contact_data import MANY_VALUES, MAX_NAMES, TINY_BYTES, WORTH_BYTES, is_contact_data, take_out
from gateway.ingest.decoding import decode_bulk, decode_single
from gateway.ingest.in_place import Body, Malformed, check
from gateway.ingest.wire import encode
from tests.properties import MORE
from tests.properties.test_batch import comparable

EXAMPLES = settings(derandomize=MORE == 1, max_examples=500 * MORE, deadline=None)
FIELDS = '"to":"+14155551234","list_number":"+18005551000","body":"Hi"'

# JSON texts, so that names can be doubled, escaped, and stand in texts.
spaces = st.sampled_from(["", "", "", " ", "\n\t", " " * 20])
names = st.sampled_from(
    [
        *['"contact_data"', '"contact_data"', '"metadata"', '"first_name"', '"custom_fields"', '"a"', '""'],
        *[r'"contact\u005fdata"', r'"first\u005fname"', r'"\"contact_data\":{"', r'"x\\"', r'"\\\"contact_data"'],
    ]
)
scalars = st.sampled_from(["1", "null", '"x"', '"{"', '"}"', '"[]"', '"contact_data"', r'"\"contact_data\":{}"', '"é"'])


def objects_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    members = st.tuples(spaces, names, spaces, spaces, values).map(lambda parts: "{}{}{}:{}{}".format(*parts))
    return st.lists(members, max_size=4).map(lambda texts: "{" + ",".join(texts) + "}")


def arrays_of(values: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(values, max_size=3).map(lambda texts: "[" + ",".join(texts) + "]")


values = st.recursive(scalars, lambda inner: objects_of(inner) | arrays_of(inner), max_leaves=8)
known_members = st.sampled_from(
    ['"contact_data":{"first_name":1}', '"contact_data":{"first_name":1,"first_name":""}', '"contact_data":{"a":[]}']
)
more_members = st.lists(known_members | st.tuples(names, values).map(":".join), max_size=4).map(
    lambda texts: "".join("," + text for text in texts)
)
messages = more_members.map(lambda more: "{" + FIELDS + more + "}") | values
requests = st.tuples(arrays_of(messages), more_members).map(lambda parts: '{"messages":' + "".join(parts) + "}")
damages = st.none() | st.tuples(
    st.integers(0, 300), st.integers(0, 3), st.sampled_from(["", '"', "\\", "{", "}", "]", ",", ":", "contact_data"])
)
EDGE_CASES = [
    "{" + FIELDS + ',"contact_data":{"contact_data":{}}}',
    "{" + FIELDS + ',"metadata":{"contact_data":{"first_name":1}}}',
    "{" + FIELDS + ',"contact_data":{"a":1} \n , "to":}',
    "{" + FIELDS + ',"contact_data":{}}x',
    "{" + FIELDS + ',"contact_data":{}',
]


SMALL, LARGE = (
    b'{"contact_data":{"a":"%b"}},' % (b"a" * TINY_BYTES),
    b'{"contact_data":{"x":"' + b"x" * WORTH_BYTES + b'"}}',
)
# Every body with a bracket then counts as large, and as slow to parse.
NO_LIMITS: Any = {"LARGE_BODY_BYTES": 0, "MANY_BRACKETS": 0}


def outcome(body: bytes, decode: Any, *, is_taken_out: bool) -> Any:
    """Return all that comes of a body that counts as large: its payloads and rows, or the type of the refusal."""
    keep: Any = patch.object(decoding, "take_out", lambda whole: (whole, None))
    tiny = patch.object(contact_data, "TINY_BYTES", 0)
    with patch.multiple(decoding, **NO_LIMITS), tiny, nullcontext() if is_taken_out else keep:
        try:
            return comparable(batch.validate(decode(body)))
        except GatewayError as refusal:
            return type(refusal)


@EXAMPLES
@given(request=requests | messages, damage=damages, decode=st.sampled_from([decode_bulk, decode_single]))
def test_taking_out_does_not_change_the_result(request: str, damage: tuple[int, int, str] | None, decode: Any) -> None:
    if damage is not None:
        cut, drop, insert = damage
        request = request[:cut] + insert + request[cut + drop :]
    body = request.encode()
    assert outcome(body, decode, is_taken_out=True) == outcome(body, decode, is_taken_out=False)


@pytest.mark.parametrize("request_", EDGE_CASES)
def test_taking_out_does_not_change_the_result_of_these(request_: str) -> None:
    expected = outcome(request_.encode(), decode_single, is_taken_out=False)
    assert outcome(request_.encode(), decode_single, is_taken_out=True) == expected


@EXAMPLES
@given(value=objects_of(values))
def test_a_value_passes_the_check_as_its_last_fields_do(value: str) -> None:
    fields = json.loads(value)  # the last of each name
    kinds = {"first_name": str, "last_name": str, "timezone": str, "custom_fields": dict}
    expected = all(fields.get(name) is None or isinstance(fields[name], kind) for name, kind in kinds.items())
    assert is_contact_data(Raw(value.encode())) == expected


@pytest.mark.parametrize("more", ["", " \n", ',"metadata":{"contact_data":{"x":%s}}'], ids=["last", "space", "nested"])
def test_large_values_are_taken_out_and_put_back(more: str) -> None:
    large = json.dumps([["\N{PILE OF POO}", {"contact_data": {}}]] * 1_000)
    value = f'{{"x":{large}, "first_name": "A" }}'
    more = more.replace("%s", large)
    request = f'{{"messages":[{{{FIELDS},"contact_data" : {value}{more}}},{{{FIELDS},"contact_data":{{}}}}]}}'.encode()
    short, taken_out = take_out(request)
    assert taken_out is not None
    assert len(short) < 600
    with patch.multiple(decoding, **NO_LIMITS):
        draft = batch.validate(decode_bulk(request))
    assert [encode(message.contact_data) for message in draft.messages] == [value.encode(), b"{}"]


def test_nothing_of_a_body_is_kept() -> None:
    large = b'{"first_name":"A","x":[' + b"{}," * 2_000 + b"{}]}"
    body = bytearray(b'{"messages":[{' + FIELDS.encode() + b',"contact_data":' + large + b"}]}")
    with patch.multiple(decoding, **NO_LIMITS):
        assert len(batch.validate(decode_bulk(body)).messages) == 1
    body.clear()  # raises BufferError as long as anything refers to it


@pytest.mark.parametrize("names", [0, MANY_VALUES - 1, MANY_VALUES + 500])
def test_with_many_names_only_large_values_are_taken_out(names: int) -> None:
    short, _ = take_out(b"[" + SMALL * names + LARGE + b"]")
    assert short.count(b"\xff") == min(names, MANY_VALUES) + 1
    assert b"xx" not in short


def test_of_many_names_few_are_parsed() -> None:
    parsed = []

    def decode(body: Body, start: int) -> Any:
        parsed.append(start)
        return in_place(body, start)

    in_place = contact_data._in_place.decode
    with patch.object(contact_data, "_in_place", SimpleNamespace(decode=decode)):
        take_out(b"[" + b'{"contact_data":{}},' * 5_000 + b"1]")
    assert len(parsed) == MANY_VALUES


def test_the_last_names_are_found() -> None:
    short, _ = take_out(b"[" + LARGE + b"," + SMALL * MAX_NAMES + b"1]")
    assert short.count(b"\xff") == MANY_VALUES
    assert b"xx" in short


NAME = "contact_data"
ESCAPED = [rf"{NAME[:at]}\u00{ord(NAME[at]):02x}{NAME[at + 1 :]}" for at in range(len(NAME))]
ESCAPED += ["".join(rf"\u00{ord(letter):02X}" for letter in NAME), r"contact_d\u0061t\u0061"]


@pytest.mark.parametrize("name", ESCAPED)
def test_names_that_are_written_with_escapes_are_found(name: str) -> None:
    value = f'{{"x":"{"x" * WORTH_BYTES}"}}'
    request = f'{{"messages":[{{{FIELDS},"{name}" : {value}}}]}}'.encode()
    short, _ = take_out(request)
    assert b"xx" not in short
    with patch.multiple(decoding, **NO_LIMITS):
        (message,) = batch.validate(decode_bulk(request)).messages
    assert encode(message.contact_data) == value.encode()


@pytest.mark.parametrize(
    "name", [r"contact_dat\\u0061", r"contact_dat\u0062", r"contact_dat\u0061a", r"ontact_dat\u0061"]
)
def test_other_names_with_escapes_are_left(name: str) -> None:
    request = f'{{"messages":[{{{FIELDS},"{name}":{{"x":"{"x" * WORTH_BYTES}"}}}}]}}'.encode()
    assert take_out(request) == (request, None)


def test_the_last_names_with_escapes_are_found() -> None:
    escaped = LARGE.replace(b"c", rb"\u0063", 1)
    assert json.loads(escaped) == json.loads(LARGE)
    with patch.object(contact_data, "MAX_NAMES", 3):
        short, _ = take_out(b"[" + (escaped + b",") * 5 + LARGE + b"]")
    assert short.count(b"\xff") == 4
    assert short.startswith(b"[" + (escaped + b",") * 2)


@pytest.mark.parametrize("size", [TINY_BYTES, TINY_BYTES + 1])
def test_a_tiny_value_stays(size: int) -> None:
    value = b'{"x":"' + b"x" * (size - 8) + b'"}'
    assert len(value) == size
    short, _ = take_out(b'{"contact_data":' + value + b"}")
    assert (b"xx" in short) == (size == TINY_BYTES)


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_defect_has_its_position_whatever_is_taken_out_before_and_after(bad: int) -> None:
    elements = [f'{{{FIELDS},"contact_data":{LARGE.decode()}}}' for _ in range(3)]
    elements.insert(bad, "!")
    request = f'{{"messages":[{",".join(elements)}]}}'.encode()
    with patch.multiple(decoding, **NO_LIMITS), pytest.raises(InvalidJson) as raised:
        decode_bulk(request)
    assert str(raised.value).endswith(f" near byte {request.index(b'!')}")


MALFORMED = b'"contact_data":{"x":!}'


@pytest.mark.parametrize("before", ["", '"contact_data":%s,', '"metadata":%s,'], ids=["nothing", "taken", "left"])
@pytest.mark.parametrize("flaw", ['"to":,', '"to" 1,', "", '"a":[{]},'])
def test_the_first_defect_is_named(before: str, flaw: str) -> None:
    """Also if one in `contact_data` is found first."""
    start = f'{{"messages":[{{{before.replace("%s", LARGE.decode())}{flaw}'.encode()
    request = start + MALFORMED + b"}]}"
    with pytest.raises(Malformed) as expected:
        check(request)
    with patch.multiple(decoding, **NO_LIMITS), pytest.raises(InvalidJson) as raised:
        decode_bulk(request)
    assert str(raised.value).endswith(f" near byte {expected.value.position}")


def test_objects_that_are_nested_too_deeply_together_are_refused() -> None:
    """Each is within the decoder's limit: about 1,000 levels, and with Python 3.13 10,000."""
    levels = 6_000 if is_accepted("metadata", f'{{"x":{arrays(6_000)}}}') else 600
    inner = f'{{"contact_data":{{"x":{arrays(levels)}}}}}'
    assert is_accepted("metadata", inner)
    nested = '{"y":{"contact_data":{}},"x":' + "[" * levels + inner + "]" * levels + "}"
    assert not is_accepted("metadata", nested)
    assert not is_accepted("contact_data", nested)


def is_accepted(field: str, value: str) -> bool:
    request = f'{{"messages":[{{{FIELDS},"{field}":{value}}}]}}'.encode()
    with patch.multiple(decoding, **NO_LIMITS):
        try:
            return bool(batch.validate(decode_bulk(request)).messages)
        except InvalidJson as refusal:
            if "nested too deeply" not in str(refusal):
                raise
            return False


def arrays(levels: int) -> str:
    return "[" * levels + "]" * levels
