"""Very many values that would be parsed twice are refused. Batches as callers send them are not. Promise 10."""

import json

import msgspec
import pytest

from gateway.errors import INVALID_CONTACT_DATA, InvalidJson
from gateway.ingest import batch
from gateway.ingest.decoding import HUGE_BODY_BYTES, decode_bulk
from gateway.ingest.second_pass import MOST_BRACKETS, MOST_COMMAS
from testbed.bodies import GOOD, PLACES


def with_values(place: str, value: bytes, count: int) -> bytes:
    """Return a body with `count` values at a place, and a text that makes it a huge one."""
    before, after = PLACES[place]
    return before + b"[" + value * count + b'"' + b"a" * HUGE_BODY_BYTES + b'"]' + after


SECOND_PASSES = [
    (place, value, most)
    for place in (
        *("a message after many fields", "a message after many elements", "contact_data of metadata"),
        *("contact_data before many of its name", "contact_data with a bad field before many of its name"),
    )
    for value, most in ((b"[],", MOST_BRACKETS), (b"{},", MOST_BRACKETS), (b"1,", MOST_COMMAS))
    if (place, value) != ("contact_data of metadata", b"1,")  # it has few brackets: nothing is taken out
]


@pytest.mark.parametrize(("place", "value", "most"), SECOND_PASSES)
def test_a_second_pass_over_very_many_values_is_refused(place: str, value: bytes, most: int) -> None:
    batch.validate(decode_bulk(with_values(place, value, most - 10)))
    with pytest.raises(InvalidJson, match="too many values"):
        batch.validate(decode_bulk(with_values(place, value, most + 1)))


GUEST = {"contact_data": {"first_name": "Ada", "last_name": "Lovelace", "timezone": "Europe/London"}, "x": [[], {}]}


@pytest.mark.parametrize(("messages", "guests"), [(1_000, 15), (1_000, 35), (400, 90), (10, 3_000)])
@pytest.mark.parametrize("field", ["contact_data", "metadata"])
def test_a_batch_with_nested_contact_data_is_accepted(messages: int, guests: int, field: str) -> None:
    value = {"custom_fields": {"guests": [GUEST] * guests}, "contact_data": {"first_name": "Ada", "a": ["b"] * 10}}
    message = json.loads(GOOD) | {"contact_data": value, field: value}
    draft = batch.validate(decode_bulk(msgspec.json.encode({"messages": [message] * messages})))
    assert len(draft.messages) == messages
    assert {bytes(getattr(each, field)) for each in draft.messages} == {msgspec.json.encode(value)}


def test_an_array_as_contact_data_is_not_parsed_again_and_costs_only_its_message() -> None:
    array = b'{"contact_data":[' + b"[]," * (MOST_BRACKETS + 1) + b"[]]," + GOOD[1:]
    draft = batch.validate(decode_bulk(b'{"messages":[' + array + b"," + GOOD + b"]}"))
    assert [(row.index, row.code) for row in draft.rows] == [(0, INVALID_CONTACT_DATA.code)]
    assert list(draft.indexes) == [1]


def test_a_body_that_is_not_huge_may_have_more_commas() -> None:
    many = b'{"metadata":{"a":[' + b"1," * (MOST_COMMAS + 1) + b"1]}," + GOOD[1:]
    body = b'{"messages":[' + many + b"]}"
    assert len(body) < HUGE_BODY_BYTES
    assert len(batch.validate(decode_bulk(body)).messages) == 1
