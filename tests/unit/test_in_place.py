"""Values decoded where they stand: the value, and the position of the next byte."""

import json
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from gateway.ingest import in_place
from gateway.ingest.in_place import Body, InPlace, Malformed, check, decode_array, skip


class Point(msgspec.Struct):
    x: int
    y: int = 0


POINT = InPlace(Point)
NEXT = [b"", b",", b"]", b"}", b" \t\r\n,1", b" \n", b"x"]


@pytest.mark.parametrize("after", NEXT)
@pytest.mark.parametrize("before", [b"", b"[1, "])
def test_an_object_and_the_next_byte_are_found(before: bytes, after: bytes) -> None:
    body = before + b'{"x": 1, "z":[{}], "y":2}' + after
    point, end = POINT.decode(body, len(before))
    assert isinstance(point, Point)
    assert (point.x, point.y) == (1, 2)
    assert end == len(body) - len(after.lstrip())


@pytest.mark.parametrize("value", ["{}", "[[]]", '"\\"]"', "-1.5e3", "1" * 5_000, "true", "null"])
@pytest.mark.parametrize("after", [b"", b",", b"]", b" ,"])
def test_any_value_can_be_skipped(value: str, after: bytes) -> None:
    body = b"[" + value.encode() + after
    assert skip(body, 1) == len(body) - len(after.lstrip())


@pytest.mark.parametrize(
    ("body", "what", "position"),
    [
        (b'[{"x":}]', "invalid character", 6),
        (b'[{"x":1', "it ends too early", None),
        (b"[", "it ends too early", None),
        (b"[]", "invalid character", 1),
    ],
)
def test_what_is_malformed_has_its_position_in_the_body(body: bytes, what: str, position: int | None) -> None:
    for decode in (POINT.decode, skip):
        with pytest.raises(Malformed) as raised:
            decode(body, 1)
        assert (raised.value.what, raised.value.position) == (what, position)


def test_an_object_must_end_before_the_stop() -> None:
    body = b'[{"x":1} \n,{"x":2}]'
    for stop in (8, 9, 10, 11, 100):
        assert POINT.decode(body, 1, stop)[1] == 10
    for stop in range(2, 8):
        with pytest.raises(Malformed):
            POINT.decode(body, 1, stop)
    assert POINT.decode(body, 11)[0].x == 2


def test_after_an_error_the_next_object_is_decoded() -> None:
    for bad, error in ((b'{"x":"1"}', msgspec.ValidationError), (b'{"x":1,}', Malformed)):
        with pytest.raises(error):
            POINT.decode(bad, 0)
        assert POINT.decode(b'{"x":7}', 0)[0].x == 7


def test_nothing_is_kept_if_the_decoder_words_its_error_in_another_way() -> None:
    with patch.object(in_place, "_malformed", lambda _: None), pytest.raises(Malformed):
        POINT.decode(b'{"x":1},', 0)
    assert POINT._found == []


def decoded(body: bytes, start: int = 0, most: int = 100) -> tuple[list[Any], int]:
    """Decode an array of any values as the slices of the body that they are."""

    def element(within: Body, at: int) -> tuple[Any, int]:
        end = skip(within, at)
        return json.loads(within[at:end]), end

    return decode_array(body, start, element, most)


@pytest.mark.parametrize("array", ["[]", "[ ]", "[1]", "[1,2]", ' [ 1 ,\n"a" , {"b":[]},\t[ ] ]'])
@pytest.mark.parametrize("after", [b"", b",", b"]", b" }"])
def test_the_elements_of_an_array_and_the_next_byte_are_found(array: str, after: bytes) -> None:
    body = array.encode() + after
    elements, end = decoded(body, array.index("["))
    assert elements == json.loads(array)
    assert end == len(body) - len(after.lstrip())


@pytest.mark.parametrize("after", [b"", b",", b" }"])
@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_elements_beyond_the_most_are_skipped(most: int, after: bytes) -> None:
    body = b'[1, {"a":[2]} , 3]' + after
    elements, end = decoded(body, 0, most)
    assert elements == [1, {"a": [2]}, 3][:most]
    assert end == len(body) - len(after.lstrip())


BAD_ARRAYS = [
    b"[",
    b"[1",
    b"[1,",
    b"[1 2]",
    b"[1,]",
    b"[,1]",
    b"[1}",
    b"[1:2]",
    b"[1,2 3]",
    b"[1,2,]",
    b"[1,2,}",
    b"[1,2",
    b"[1 , ]",
    # The rest of an array is not parsed alone: what stands before it must not become a part of it.
    *[b"[{}" + bad + b"]" for bad in (b".5", b"e5", b"E+1", b"0", b" .5", b"x", b'"', b"{}", b"null", b"1")],
]


@pytest.mark.parametrize("most", [1, 2, 100])
@pytest.mark.parametrize("body", BAD_ARRAYS)
def test_a_malformed_array_is_malformed_where_the_decoder_says(body: bytes, most: int) -> None:
    with pytest.raises(Malformed) as expected:
        check(body)
    with pytest.raises(Malformed) as raised:
        decoded(body, 0, most)
    assert (raised.value.what, raised.value.position) == (expected.value.what, expected.value.position)


def test_the_check_of_a_whole_value_refuses_what_follows() -> None:
    check(b'{"a":1} ')
    with pytest.raises(Malformed, match="trailing characters"):
        check(b'{"a":1} x')
