"""Validation and payloads by example, as docs/api.md states them. Random batches: tests/properties/test_batch.py."""

import bisect
import json
from typing import Any
from unittest.mock import patch

import pytest
from msgspec import Raw

from gateway.amqp.confirms import Outcome
from gateway.amqp.outgoing import Outgoing
from gateway.errors import InvalidJson
from gateway.ingest import batch, contact_data
from gateway.ingest.batch import Batch
from gateway.ingest.decoding import decode_bulk, decode_single
from gateway.ingest.envelopes import Placement
from tests.support.batch_model import (
    GOOD,
    build,
    codes,
    only_payload,
    request_of,
    run,
)


def test_one_bad_message_costs_only_itself() -> None:
    bads: list[Any] = [None, "x", {}, GOOD | {"to": 5}, GOOD | {"to": "5"}, GOOD | {"metadata": []}]
    for bad in bads:
        _, prepared = run(request_of([GOOD] * 500 + [bad] + [GOOD] * 499))
        assert [row.index for row in prepared.rows] == [500]
        assert list(prepared.indexes) == [*range(500), *range(501, 1_000)]
        assert len(prepared.outgoing.payloads) == 999


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        # Everything wrong at once, mended from the first check on: the next one shows.
        ({"to": None, "list_number": None, "body": None, "wrap_links": 1}, "missing_to"),
        ({"to": "x", "list_number": None, "body": None, "wrap_links": 1}, "missing_list_number"),
        ({"to": "x", "list_number": "x", "body": None, "wrap_links": 1}, "missing_body"),
        ({"to": "x", "list_number": "x", "body": 5, "wrap_links": 1}, "missing_body"),
        ({"to": "x", "list_number": "x", "wrap_links": 1}, "invalid_phone"),
        ({"list_number": "x", "wrap_links": 1}, "invalid_list_number"),
        ({"list_number": "+18005553000", "wrap_links": 1}, "invalid_field"),
        ({"list_number": "+18005553000", "contact_data": 1}, "invalid_field"),
        ({"list_number": "+18005553000", "metadata": 1}, "invalid_field"),
        ({"list_number": "+18005553000"}, "list_not_found"),
    ],
)
def test_only_the_first_failing_check_is_reported_and_checks_have_one_order(changes: dict[str, Any], code: str) -> None:
    assert codes(request_of([GOOD | changes])) == {0: code}


@pytest.mark.parametrize("number", ["+14155551234\n+14155551235", "+14155551234\n", "\n+14155551234"])
def test_a_newline_does_not_smuggle_a_second_number_in(number: str) -> None:
    """Numbers of a whole batch are checked joined by newlines: a newline inside one must not shift the others."""
    for neighbours in ([], [GOOD], [GOOD | {"to": ""}], [GOOD, GOOD | {"to": None}]):
        for changes, code in (({"to": number}, "invalid_phone"), ({"list_number": number}, "invalid_list_number")):
            assert codes(request_of([*neighbours, GOOD | changes])).get(len(neighbours)) == code


def test_a_newline_in_the_default_list_number_smuggles_nothing_in() -> None:
    sent = [{"to": "+14155551234", "body": "Hi"}]
    assert codes(request_of(sent, list_number="+18005551000\n+18005552000")) == {0: "invalid_list_number"}


@pytest.mark.parametrize("digits", ["٠١٢٣٤٥٦٧٨٩", "０１２３４５６７８９", "०१२३४५६७८९", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗", "①②③④⑤⑥⑦⑧⑨⑩"])
def test_digits_of_other_scripts_make_no_number(digits: str) -> None:
    assert codes(request_of([GOOD | {"to": "+1415555" + digits[:5]}])) == {0: "invalid_phone"}
    assert codes(request_of([GOOD | {"to": "+" + digits[1:]}])) == {0: "invalid_phone"}


@pytest.mark.parametrize(
    ("length", "is_good"), [(1, False), (2, True), (3, True), (14, True), (15, True), (16, False), (17, False)]
)
def test_a_number_has_2_to_15_digits(length: int, is_good: bool) -> None:
    assert (codes(request_of([GOOD | {"to": "+" + "9" * length}])) == {}) == is_good


def test_the_default_list_number_is_for_messages_that_carry_none() -> None:
    without = {name: value for name, value in GOOD.items() if name != "list_number"}
    sent = [without, without | {"list_number": None}, without | {"list_number": ""}, GOOD | {"list_number": 5}, GOOD]
    _, prepared = run(request_of(sent, list_number="+18005552000"))
    assert [json.loads(payload)["list_id"] for payload in prepared.outgoing.payloads] == [9, 9, 9, 7]
    assert [(row.index, row.code) for row in prepared.rows] == [(3, "invalid_list_number")]


def test_a_bad_default_list_number_costs_only_the_messages_that_need_it() -> None:
    without = {name: value for name, value in GOOD.items() if name != "list_number"}
    for default, code in (
        *[(None, "missing_list_number"), ("", "missing_list_number"), ("x", "invalid_list_number")],
        *[(5, "invalid_list_number"), ([], "invalid_list_number"), ("+18005553000", "list_not_found")],
    ):
        assert codes(request_of([GOOD, without], list_number=default)) == {1: code}


def test_the_last_of_several_equal_keys_counts() -> None:
    def one(fields: str) -> bytes:
        return b'{"messages": [{' + fields.encode() + b"}]}"

    good = '"to": "+14155551234", "list_number": "+18005551000", "body": "Hi"'
    assert codes(one(f'"to": 5, {good}')) == {}
    assert codes(one(f'"to": "bad", {good}')) == {}
    assert codes(one(f'{good}, "to": "bad"')) == {0: "invalid_phone"}
    assert codes(one(f'{good}, "to": 5')) == {0: "invalid_phone"}
    assert codes(one(f'"body": [], "metadata": 5, {good}, "metadata": {{}}')) == {}
    twice = '{{"first_name": {}, "first_name": {}, "custom_fields": {}, "custom_fields": {}}}'
    assert codes(one(f'{good}, "contact_data": {twice.format(5, "null", "[]", "{}")}')) == {}
    assert codes(one(f'{good}, "contact_data": {twice.format("null", 5, "[]", "{}")}')) == {0: "invalid_field"}
    assert codes(one(f'{good}, "contact_data": {twice.format(5, "null", "{}", "[]")}')) == {0: "invalid_field"}
    assert codes(b'{"messages": 5, "list_number": 5, ' + one(good)[1:-1] + b', "list_number": null}') == {}


def test_a_foreign_list_costs_a_row_and_its_id_and_nothing_else() -> None:
    sent = [GOOD, GOOD | {"list_number": "+18005553000", "to": "+12"}, GOOD | {"to": "bad"}, GOOD]
    _, prepared = run(request_of(sent))
    assert [(row.index, row.to, row.code) for row in sorted(prepared.rows, key=lambda row: row.index)] == [
        (1, "+12", "list_not_found"),
        (2, "bad", "invalid_phone"),
    ]
    assert list(prepared.indexes) == [0, 3]
    assert [json.loads(payload)["id"] for payload in prepared.outgoing.payloads] == prepared.ids


def test_a_batch_none_of_which_is_ours_gives_rows_only() -> None:
    draft = batch.validate(decode_bulk(request_of([GOOD, GOOD])))
    prepared = build(draft, {})
    assert (prepared.ids, prepared.outgoing.payloads, prepared.recipients, list(prepared.indexes)) == ([], [], [], [])
    assert [(row.index, row.code) for row in prepared.rows] == [(0, "list_not_found"), (1, "list_not_found")]


def test_building_leaves_the_draft_as_it_was() -> None:
    """A retry under an idempotency key builds from the same draft again."""
    draft = batch.validate(decode_bulk(request_of([GOOD, GOOD | {"list_number": "+18005553000"}, {}])))
    assert build(draft) == build(draft)
    assert [row.index for row in draft.rows] == [2]


def test_one_query_asks_for_each_list_once() -> None:
    draft = batch.validate(decode_bulk(request_of([GOOD] * 3 + [GOOD | {"list_number": "+18005552000"}] * 2)))
    assert sorted(draft.distinct_list_numbers()) == ["+18005551000", "+18005552000"]


# Payloads, to the byte


def test_a_payload_is_the_contracts_to_the_byte() -> None:
    body = (
        b'{"messages": [{"metadata": {"b":1, "a" : [1.50, 1e400]},"contact_data":{"first_name":"J\\u00fcrgen"},'
        b'"wrap_links":true,"unknown":1,"body":"Ref: {{messageId}} \xe2\x82\xac","list_number":"+18005551000",'
        b'"to":"+14155551234"}]}'
    )
    assert only_payload(body) == (
        b'{"id":"Id000000","account_id":42,"list_id":7,"list_number":"+18005551000","to":"+14155551234",'
        b'"body":"Ref: Id000000 \xe2\x82\xac","wrap_links":true,"contact_data":{"first_name":"J\\u00fcrgen"},'
        b'"metadata":{"b":1, "a" : [1.50, 1e400]},"accepted_at":"2026-11-23T11:00:00.123Z","request_id":"req-1",'
        b'"index":0}'
    )


@pytest.mark.parametrize("size", [10, 4_000, 4_096, 4_097, 100_000])
@pytest.mark.parametrize("beside", [[], [GOOD | {"to": 5}]])
def test_contact_data_is_checked_whatever_its_size(size: int, beside: list[Any]) -> None:
    for field, code in (({"first_name": 1}, "invalid_field"), ({"first_name": "J"}, None)):
        contact_data = {"x": ""} | field
        contact_data["x"] = "x" * (size - len(json.dumps(contact_data)))
        draft = batch.validate(decode_bulk(request_of([GOOD | {"contact_data": contact_data}, *beside])))
        assert [row.code for row in draft.rows if row.index == 0] == ([code] if code else [])


def test_large_contact_data_of_the_wrong_type_is_parsed_once() -> None:
    parsed = []

    def decode(value: Raw) -> contact_data.ContactData:
        parsed.append(len(value))
        return contact_data_decoder(value)

    contact_data_decoder = contact_data._decode
    bad = GOOD | {"contact_data": {"x": "x" * contact_data.SMALL_BYTES, "first_name": 1}}
    decoded = decode_bulk(request_of([GOOD, bad]))
    with patch.object(contact_data, "_decode", decode):
        draft = batch.validate(decoded)
    assert [(row.index, row.code) for row in draft.rows] == [(1, "invalid_field")]
    assert len(parsed) == 1


def test_contact_data_of_any_depth_is_valid_or_refused() -> None:
    """Near the decoder's limit, what is parsed once may be too deep the second time."""

    def outcome(levels: int) -> str:
        fields = json.dumps(GOOD)[:-1]
        value = f'{{"z":{"[" * levels}{"]" * levels}}}'
        try:
            draft = batch.validate(decode_single(f'{fields},"contact_data":{value}}}'.encode()))
        except InvalidJson:
            return "refused"
        return "valid" if draft.messages else "invalid"

    deepest = bisect.bisect_left(range(20_000), True, key=lambda levels: outcome(levels) != "valid")
    outcomes = [outcome(levels) for levels in range(deepest - 10, deepest + 20)]
    assert (outcomes[0], outcomes[-1]) == ("valid", "refused")


@pytest.mark.parametrize("first_name", [b"9" * 770 + b"e-1090", b'1e300,"first_name":"J"'])
def test_only_the_first_number_in_contact_data_is_converted(first_name: bytes) -> None:
    """To learn that it is no string takes up to 30 µs."""
    calls = [0]

    def decode_typed(value: Any, decode: Any = contact_data._decode_typed) -> Any:
        calls[0] += 1
        return decode(value)

    message = json.dumps(GOOD).encode()[:-1] + b',"contact_data":{"first_name":%b}}' % first_name
    with patch.object(contact_data, "_decode_typed", decode_typed):
        draft = batch.validate(decode_bulk(b'{"messages":[%b]}' % b",".join([message] * 1_000)))
    assert len(draft.messages) == (1_000 if b'"J"' in first_name else 0)
    assert calls[0] == 1


@pytest.mark.parametrize("nothing", [{}, {"contact_data": None, "metadata": None, "wrap_links": None}])
@pytest.mark.parametrize("neighbour", [GOOD, {"to": 5}])
def test_fields_that_are_absent_or_null_are_left_out(nothing: dict[str, Any], neighbour: dict[str, Any]) -> None:
    """The same holds in the fast and in the slow path, which the neighbour decides."""
    _, prepared = run(request_of([GOOD | nothing, neighbour]))
    assert prepared.outgoing.payloads[0] == (
        b'{"id":"Id000000","account_id":42,"list_id":7,"list_number":"+18005551000","to":"+14155551234",'
        b'"body":"Hi","wrap_links":false,"accepted_at":"2026-11-23T11:00:00.123Z","request_id":"req-1","index":0}'
    )


@pytest.mark.parametrize("break_", [b"\n", b"\r\n", b"\n\n\n"])
def test_a_pretty_printed_object_is_passed_on_byte_for_byte_and_its_neighbours_are_whole(break_: bytes) -> None:
    pretty = b'{\n  "a": 1.10,\n\t"b": "\\u00e4\\/"\n}'.replace(b"\n", break_)
    plain = json.dumps(GOOD).encode()
    body = b'{"messages":[%s,%s,"metadata":%s,"contact_data" :%s },%s]}' % (plain, plain[:-1], pretty, pretty, plain)
    _, prepared = run(body)
    assert [json.loads(payload)["index"] for payload in prepared.outgoing.payloads] == [0, 1, 2]
    assert b',"contact_data":' + pretty + b',"metadata":' + pretty + b',"accepted_at"' in prepared.outgoing.payloads[1]


def test_metadata_100_levels_deep_is_passed_on() -> None:
    deep = b'{"a":' * 100 + b"1" + b"}" * 100
    body = (
        b'{"messages":[' + json.dumps(GOOD).encode()[:-1] + b',"metadata":' + deep + b',"contact_data":' + deep + b"}]}"
    )
    assert only_payload(body).count(deep) == 2


@pytest.mark.parametrize(
    ("text", "sent"),
    [
        ("{{messageId}}", "Id000000"),
        ("a {{messageId}} b {{messageId}}", "a Id000000 b Id000000"),
        ("{{messageId}}{{messageId}}", "Id000000Id000000"),
        ("{{{{messageId}}}}", "{{Id000000}}"),
        ("{{{messageId}}}", "{Id000000}"),
        ("{{message{{messageId}}Id}}", "{{messageId000000Id}}"),
        *(
            (text, text)
            for text in ["{{messageId}", "{messageId}}", "{{ messageId }}", "{{messageid}}", "{{MessageId}}"]
        ),
        *((text, text) for text in ["{{first_name}}", "{{custom.x}}", "{{}}", "%s {0} {id} $id \\1 \\g<0>"]),
    ],
)
def test_the_message_id_macro_is_filled_in_and_every_other_left_for_the_consumer(text: str, sent: str) -> None:
    assert json.loads(only_payload(request_of([GOOD | {"body": text}])))["body"] == sent


def test_the_macro_is_filled_in_nowhere_but_in_the_body() -> None:
    macro = {"first_name": "{{messageId}}", "custom_fields": {"{{messageId}}": "{{messageId}}"}}
    payload = json.loads(only_payload(request_of([GOOD | {"contact_data": macro, "metadata": macro}])))
    assert (payload["contact_data"], payload["metadata"]) == (macro, macro)


@pytest.mark.parametrize("name", ["first_name", "last_name", "timezone", "custom_fields"])
@pytest.mark.parametrize("value", [5, True, [], "x", {}, None])
def test_the_known_fields_of_contact_data_have_their_types_and_null_is_none(name: str, value: object) -> None:
    fits = isinstance(value, dict if name == "custom_fields" else str) or value is None
    expected = {} if fits else {0: "invalid_field"}
    assert codes(request_of([GOOD | {"contact_data": {name: value, "other": 5}}])) == expected


@pytest.mark.parametrize("field", ["expiration", "user_id", "routing_key", "__proto__", "exchange", "id", "index"])
def test_fields_the_contract_does_not_know_go_nowhere(field: str) -> None:
    payload = only_payload(request_of([GOOD | {field: "hostile"}], **{field: "hostile"}))
    assert b"hostile" not in payload


def test_an_envelope_that_is_too_large_does_not_say_that_of_each_sms_in_it() -> None:
    """The broker's limit may become known after the envelopes were made: the next run halves them."""
    placements = [Placement(0, range(2)), Placement(0, range(2, 3))]
    batch = Batch([""] * 3, [], [], [], Outgoing([], []), placements)
    outcomes = batch.outcomes_of_messages(bytes([Outcome.TOO_LARGE] * 2))
    assert list(outcomes) == [Outcome.NACKED, Outcome.NACKED, Outcome.TOO_LARGE]
