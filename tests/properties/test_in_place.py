"""A request that is decoded in place gives what it gives when it is decoded as a whole."""

import re
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import GatewayError
from gateway.ingest import batch, decoding, in_place
from gateway.ingest.decoding import decode_bulk
from tests.properties.test_batch import comparable
from tests.properties.test_contact_data import EXAMPLES, FIELDS, arrays_of, damages, names, scalars, spaces, values

keys = names | st.sampled_from(
    [
        *['"messages"', '"messages"', r'"m\u0065ssages"', '"list_number"', '"dry_run"', r'"dry_ru\u006e"'],
        *['"x' + "x" * 250 + '"', r'"\q"', r'"\ud800"', '"é"', '"messages "', '"\t"'],
    ]
)
numbers = st.sampled_from(
    ["1.5", "{}.5", "[]e1", "-1e300", "1" * 200, "1e400", "01", "-", "true", "false", '"+18005551000"']
)
messages = st.lists(st.just("{" + FIELDS + "}") | values | numbers, max_size=6).map(
    lambda texts: f"[{','.join(texts)}]"
)
fields = st.tuples(spaces, keys, spaces, spaces, messages | values | numbers, spaces).map(
    lambda parts: "{}{}{}:{}{}{}".format(*parts)
)
requests = st.lists(fields, max_size=6).map(lambda texts: "{" + ",".join(texts) + "}") | arrays_of(scalars)


def outcome(body: bytes) -> Any:
    """Return all that comes of a body: its payloads and rows, or the type of the refusal."""
    try:
        decoded = decode_bulk(body)
        return comparable(batch.validate(decoded)), decoded.dry_run
    except GatewayError as refusal:
        position = re.search(r"near byte (\d+)", str(refusal))
        assert position is None or int(position[1]) <= len(body)
        return type(refusal)


@EXAMPLES
@given(
    request=requests,
    damage=damages,
    before=spaces,
    after=spaces,
    most_fields=st.sampled_from([0, 1, 2, 1_000]),
    most_elements=st.sampled_from([0, 1, 1_000]),
    most_failed=st.sampled_from([0, 20, 60, 100, 65_536]),
)
def test_in_place_or_as_a_whole(
    request: str,
    damage: tuple[int, int, str] | None,
    before: str,
    after: str,
    most_fields: int,
    most_elements: int,
    most_failed: int,
) -> None:
    if damage is not None:
        cut, drop, insert = damage
        request = request[:cut] + insert + request[cut + drop :]
    body = f"{before}{request}{after}".encode()
    expected = outcome(body)
    limits: dict[str, Any] = {"MAX_FIELDS": most_fields, "MAX_ELEMENTS": most_elements, "LARGE_BODY_BYTES": 0}
    limits["MAX_FAILED_BYTES"] = most_failed
    for large in ({"MANY_COMMAS": -1}, {"HUGE_BODY_BYTES": 0}, {"MANY_BRACKETS": 0}):
        with patch.multiple(decoding, **limits | large):
            assert outcome(body) == expected


@pytest.mark.parametrize(
    "bad", [".5", "e5", "E+1", " .5", "0", "x", '"', "{}", "null", ":", "]", "}", ",,", ", ", ",1"]
)
@pytest.mark.parametrize(
    "before", ['{"messages":[{}', '{"messages":[{}]', '{"list_number":"+1"', '{"messages":[{}],"x":1 ']
)
@pytest.mark.parametrize("after", ["}", "]}", ',"x":1}', ",{}]}"])
def test_what_stands_between_values_is_not_a_part_of_one(before: str, bad: str, after: str) -> None:
    """The bytes after a value must not be parsed together with what stands for it (`null`)."""
    body = (before + bad + after).encode()
    expected = outcome(body)
    with patch.multiple(decoding, HUGE_BODY_BYTES=0):
        assert outcome(body) == expected


ELEMENT = "{" + FIELDS + ',"metadata":{"x":"' + "x" * 1_000 + '"}}'
LAST = f'"messages":[{ELEMENT}]}}'
EMPTY, THOUSAND = '"messages":[{}],' * 500, f'"messages":[{"1," * 999}1],'
BULKS = {
    "elements of any kind": (f'{{"messages":[{ELEMENT},1.5,[],{ELEMENT}]}}', False),
    "messages last": (f'{{"a":{ELEMENT},"messages" : 1.5, {LAST} ', False),
    "an escaped name": ("{" + LAST.replace("messages", r"m\u0065ssages"), False),
    "several messages": ("{" + EMPTY + LAST, False),
    "too many elements": (f'{{"messages":[{"1," * 1_000}{ELEMENT},2]}}', False),
    "too many fields": ("{" + '"a":1,' * 1_000 + LAST, True),
    "too many earlier elements": ("{" + THOUSAND * 2 + LAST, True),
    "a long name": (f'{{"{"x" * 1_000}":1,{LAST}', False),
}


@pytest.mark.parametrize(("request_", "is_parsed_again"), BULKS.values(), ids=BULKS)
def test_what_was_decoded_in_place_is_not_parsed_again(request_: str, is_parsed_again: bool) -> None:
    body = request_.encode()
    bodies = []

    def decode_array(within: bytes, *rest: Any) -> Any:
        bodies.append(within)
        return in_place.decode_array(within, *rest)

    with patch.multiple(decoding, LARGE_BODY_BYTES=0, HUGE_BODY_BYTES=0, decode_array=decode_array):
        outcome(body)
    assert (bodies[-1] is not body) == is_parsed_again
