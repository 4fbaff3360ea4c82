"""Validate and build against a model written from contract.md alone: slow, obvious, and one message at a time.

The model works on the request as Python's own json reads it, and knows nothing of typed decoding, of fast paths,
or of msgspec.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.ingest import batch
from gateway.ingest.batch import Batch, BatchIds, Draft, Origin
from gateway.ingest.wire import Bulk, decode_bulk

EXAMPLES = settings(derandomize=True, max_examples=250, deadline=None)

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


# The model


def is_e164(value: object) -> bool:
    """\\+[1-9][0-9]{1,14}, ASCII digits, the whole string; spelled out."""
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
    """The first failing check, in the contract's order."""
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
    """The code of each refused message, by index."""
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
        assert row.to == (to if isinstance(to, str) else None)
        assert row.error == SENTENCES.get(row.code, row.error)
        assert (row.may_be_queued, row.message_id) == (False, "")

    good = [index for index, code in expected.items() if code is None]
    assert list(prepared.indexes) == good
    assert len(prepared.ids) == len(prepared.outgoing.payloads) == len(prepared.messages) == len(good)
    # Of its place in the request alone, so that a second run gives it to the same message, whatever else is refused.
    assert prepared.ids == [ids(len(messages))[index] for index in good]
    for index, message_id, payload in zip(good, prepared.ids, prepared.outgoing.payloads, strict=True):
        expected_payload = model_payload(messages[index], default, index, message_id)
        assert list(json.loads(payload).items()) == list(expected_payload.items())
    assert {row.index for row in draft.rows} == {
        n for n, code in expected.items() if code not in (None, "list_not_found")
    }


# Strategies: mostly good values, so that batches mix good and bad; and everything that is nasty.

numbers = st.sampled_from(["+14155551234", "+4915112345678", "+12", "+123456789012345"])
nasty_numbers = st.sampled_from(
    [
        *["", "+", "+1", "+0155551234", "14155551234", "0014155551234", "+1234567890123456", "+1 415 555 1234"],
        *["+14155551234\n", "\n+14155551234", "+14155551234\n+14155551235", "+14155551234\r", "+14155551234 "],
        *["+١٤١٥٥٥٥١٢٣٤", "+１４１５５５５１２３４", "+1415555123४", "\u200f+14155551234", "+1415555\x001234"],
        *["+14155551234'; DROP TABLE accounts; --", "{{messageId}}", "+" + "1" * 10_000, "\N{PILE OF POO}"],
    ]
)
wrong_types = st.sampled_from([0, 1, 14155551234, 1.5, 10**30, True, False, [], ["+14155551234"], {}, {"a": None}])
owned_lists = st.sampled_from(sorted(OWNED))
foreign_lists = st.sampled_from(["+18005553000", "+18005554000"])
texts = st.sampled_from(
    ["Hi", "{{messageId}}", "a{{messageId}}b{{messageId}}", "{{first_name}} \x00 \N{PILE OF POO} ‏x"]
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
contact_data = st.fixed_dictionaries(
    {},
    optional={
        "first_name": st.text(max_size=3) | json_values,
        "last_name": st.text(max_size=3) | json_values,
        "timezone": st.sampled_from(["Europe/Berlin", None, 5]),
        "custom_fields": st.dictionaries(st.text(max_size=3), json_values, max_size=2) | json_values,
        "unknown": json_values,
    },
)
nothing = st.sampled_from([None, ""])

good_messages = st.fixed_dictionaries({"to": numbers, "list_number": owned_lists, "body": texts})
messages = st.one_of(
    good_messages,
    good_messages,
    st.fixed_dictionaries(
        {},
        optional={
            "to": st.one_of(numbers, numbers, nasty_numbers, wrong_types, nothing),
            "list_number": st.one_of(owned_lists, owned_lists, foreign_lists, nasty_numbers, wrong_types, nothing),
            "body": st.one_of(texts, texts, st.text(max_size=5), wrong_types, nothing),
            "wrap_links": st.sampled_from([True, False, None, 0, 1, "true", "", [], {}]),
            "contact_data": contact_data | json_values,
            "metadata": st.dictionaries(st.text(max_size=3), json_values, max_size=2) | json_values,
            "unknown": json_values,
        },
    ),
    st.tuples(good_messages, contact_data).map(lambda pair: pair[0] | {"contact_data": pair[1], "metadata": {"a": 1}}),
    st.sampled_from([None, True, 1, 1.5, "x", "", [], [1], {}]),
)
batches = st.lists(messages, min_size=1, max_size=8)
defaults = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {"list_number": st.one_of(owned_lists, owned_lists, foreign_lists, nasty_numbers, wrong_types, nothing)}
    ),
)


@EXAMPLES
@given(sent=batches, top_level=defaults)
@example(sent=[{"to": 1, "to_": "x", "list_number": "+18005551000", "body": "Hi"}], top_level={})
def test_every_batch_is_answered_as_the_contract_says(sent: list[Any], top_level: dict[str, Any]) -> None:
    assert_as_the_model_says(request_of(sent, **top_level))


@EXAMPLES
@given(sent=st.lists(good_messages, min_size=1, max_size=8), top_level=defaults)
def test_a_clean_batch_is_answered_as_the_contract_says(sent: list[Any], top_level: dict[str, Any]) -> None:
    assert_as_the_model_says(request_of(sent, **top_level))


@EXAMPLES
@given(sent=batches, top_level=defaults)
def test_the_fast_way_and_the_slow_way_agree(sent: list[Any], top_level: dict[str, Any]) -> None:
    """Whichever of them a batch takes, it must not show: each message alone, and all the slow way, give the same."""
    body = request_of(sent, **top_level)
    whole = batch.validate(decode_bulk(body))
    slow = batch._validate_each(decode_bulk(body))
    assert comparable(whole) == comparable(slow)
    untyped = decode_bulk(body)
    assert comparable(batch.validate(Bulk(untyped.messages, untyped.list_number, typed=False))) == comparable(slow)
    # A misfit beside it sends the whole batch through the slow decoder too.
    beside_a_misfit = batch.validate(decode_bulk(request_of([*sent, {"to": 5}], **top_level)))
    assert comparable(beside_a_misfit._replace(rows=beside_a_misfit.rows[:-1])) == comparable(slow)
    alone = [batch.validate(decode_bulk(request_of([message], **top_level))) for message in sent]
    assert [index for index, draft in enumerate(alone) if draft.messages] == list(whole.indexes)
    assert [draft.rows[0].code for draft in alone if draft.rows] == [row.code for row in whole.rows]


def comparable(draft: Draft) -> tuple[Any, ...]:
    """What of a draft shows from outside: the payloads it leads to, and its rows."""
    lists = {number: n for n, number in enumerate(sorted(set(draft.list_numbers)))}
    return (
        build(draft, lists).outgoing.payloads,
        list(draft.indexes),
        draft.list_numbers,
        msgspec.to_builtins(draft.rows),
    )


GOOD = {"to": "+14155551234", "list_number": "+18005551000", "body": "Hi"}


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
    """Whole batches are checked joined by newlines; one more or one less must not shift the count."""
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


def test_a_useless_default_harms_only_those_who_need_it() -> None:
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
    assert (prepared.ids, prepared.outgoing.payloads, prepared.messages, list(prepared.indexes)) == ([], [], [], [])
    assert [(row.index, row.code) for row in prepared.rows] == [(0, "list_not_found"), (1, "list_not_found")]


def test_building_leaves_the_draft_as_it_was() -> None:
    """A retry under an idempotency key builds from one draft again."""
    draft = batch.validate(decode_bulk(request_of([GOOD, GOOD | {"list_number": "+18005553000"}, {}])))
    assert build(draft) == build(draft)
    assert [row.index for row in draft.rows] == [2]


def test_one_query_asks_for_each_list_once() -> None:
    draft = batch.validate(decode_bulk(request_of([GOOD] * 3 + [GOOD | {"list_number": "+18005552000"}] * 2)))
    assert sorted(draft.distinct_list_numbers()) == ["+18005551000", "+18005552000"]


# Payloads, to the byte


def only_payload(body: bytes) -> bytes:
    _, prepared = run(body)
    assert not prepared.rows
    (payload,) = prepared.outgoing.payloads
    return payload


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


@pytest.mark.parametrize("nothing", [{}, {"contact_data": None, "metadata": None, "wrap_links": None}])
@pytest.mark.parametrize("neighbour", [GOOD, {"to": 5}])
def test_what_was_not_sent_or_is_null_is_left_out(nothing: dict[str, Any], neighbour: dict[str, Any]) -> None:
    """Whichever way the neighbours send the batch."""
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


@settings(derandomize=True, max_examples=200, deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_at_all_arrives_as_it_came(text: str) -> None:
    payload = only_payload(msgspec.json.encode({"messages": [GOOD | {"body": text}]}))
    assert json.loads(payload)["body"] == text.replace("{{messageId}}", "Id000000")
    assert re.sub(rb"[^\n]", b"", payload) == b""


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
