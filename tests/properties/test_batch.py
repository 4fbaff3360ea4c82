"""Validation and payloads of random batches, against the model in tests/support/batch_model.py."""

import json
import re
from typing import Any
from unittest.mock import patch

import msgspec
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.ingest import batch, decoding
from gateway.ingest.batch import Draft
from gateway.ingest.decoding import DecodedBody, decode_bulk
from tests.properties import MORE
from tests.support.batch_model import (
    GOOD,
    OWNED,
    assert_as_the_model_says,
    build,
    is_e164,
    only_payload,
    request_of,
)

EXAMPLES = settings(derandomize=MORE == 1, max_examples=250 * MORE, deadline=None)

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
def test_the_fast_path_and_the_slow_path_agree(sent: list[Any], top_level: dict[str, Any]) -> None:
    """The path of a batch must not show: each message alone, and all of them in the slow path, give the same."""
    body = request_of(sent, **top_level)
    whole = batch.validate(decode_bulk(body))
    slow = batch._validate_each(decode_bulk(body))
    assert comparable(whole) == comparable(slow)
    typed = decode_bulk(body)
    untyped = DecodedBody(typed.messages, typed.list_number, typed=False)
    assert comparable(batch.validate(untyped)) == comparable(slow)
    # A mistyped message beside it sends the whole batch through the slow decoder too.
    beside_mistyped = batch.validate(decode_bulk(request_of([*sent, {"to": 5}], **top_level)))
    assert comparable(beside_mistyped._replace(rows=beside_mistyped.rows[:-1])) == comparable(slow)
    alone = [batch.validate(decode_bulk(request_of([message], **top_level))) for message in sent]
    assert [index for index, draft in enumerate(alone) if draft.messages] == list(whole.indexes)
    assert [draft.rows[0].code for draft in alone if draft.rows] == [row.code for row in whole.rows]


@EXAMPLES
@given(sent=batches, top_level=defaults)
@example(sent=[[1], {"to": 5}, {}], top_level={})
def test_a_body_with_very_many_values_is_decoded_as_any_other(sent: list[Any], top_level: dict[str, Any]) -> None:
    body = request_of(sent, **top_level)
    with patch.multiple(decoding, LARGE_BODY_BYTES=-1, MANY_COMMAS=-1):
        large = batch.validate(decode_bulk(body))
    assert comparable(large) == comparable(batch.validate(decode_bulk(body)))


def comparable(draft: Draft) -> tuple[Any, ...]:
    """Return all that shows of a draft from outside: its payloads and its rows."""
    lists = {number: n for n, number in enumerate(sorted(set(draft.list_numbers)))}
    return (
        build(draft, lists).outgoing.payloads,
        list(draft.indexes),
        draft.list_numbers,
        msgspec.to_builtins(draft.rows),
    )


@EXAMPLES
@given(to=st.text(min_size=1, max_size=200), beside=st.sampled_from([{}, {"wrap_links": 0}]), is_owned=st.booleans())
@example(to="\N{PILE OF POO}" * 200, beside={}, is_owned=True)
@example(to="+" + "1" * 15, beside={}, is_owned=False)
def test_a_row_repeats_the_first_64_characters_of_its_recipient(
    to: str, beside: dict[str, Any], is_owned: bool
) -> None:
    draft = batch.validate(decode_bulk(request_of([GOOD | {"to": to} | beside])))
    rows = build(draft, lists=OWNED if is_owned else {}).rows
    assert [row.to for row in rows] == [to[:64]] * len(rows)
    assert len(rows) == 1 or is_e164(to)


@EXAMPLES
@given(text=st.text(min_size=1))
def test_any_text_at_all_arrives_as_it_came(text: str) -> None:
    payload = only_payload(msgspec.json.encode({"messages": [GOOD | {"body": text}]}))
    assert json.loads(payload)["body"] == text.replace("{{messageId}}", "Id000000")
    assert re.sub(rb"[^\n]", b"", payload) == b""
