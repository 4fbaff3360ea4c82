"""Decode, validate and build against a slow reader of docs/api.md: any document, in any spelling of JSON, also damaged.

The reader is Python's own json and the model of tests/support/batch_model.py. test_batch.py varies the content of a
request. Here the spelling varies too: white space, escapes, also in field names, repeated fields, numbers of every
size. Then single bytes are changed, and both readers must still agree. Promise 10.
"""

import json
import random
from itertools import chain
from typing import Any, NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway.amqp.confirms import Outcome
from gateway.errors import GatewayError
from gateway.ingest import batch
from gateway.ingest.batch import BatchIds, Origin
from gateway.ingest.decoding import decode_bulk
from gateway.ingest.pipeline import answer_for
from gateway.ingest.wire import encode
from tests.properties import MORE
from tests.support.batch_model import (
    ACCEPTED_AT,
    ACCOUNT_ID,
    OWNED,
    REQUEST_ID,
    ids,
    model_code,
    model_payload,
)

EXAMPLES = settings(derandomize=MORE == 1, max_examples=150 * MORE, deadline=None)


# The slow reader


class NotJson(ValueError):
    """A text that Python's json accepts although it is no JSON."""


class Digits(NamedTuple):
    """A number as it was written: neither string, boolean, array nor object, and equal to itself alone."""

    text: str


def read(text: bytes) -> Any:
    """Return the decoded document. Raises ValueError if it is no JSON in UTF-8, or a string in it is no Unicode."""

    def refuse(constant: str) -> None:
        raise NotJson(constant)

    document = json.loads(text.decode("utf-8"), parse_constant=refuse, parse_int=Digits, parse_float=Digits)
    if any("\ud800" <= character <= "\udfff" for string in strings_of(document) for character in string):
        raise NotJson("half of a surrogate pair")
    return document


def strings_of(document: Any) -> list[str]:
    if isinstance(document, Digits):
        return []
    if isinstance(document, str):
        return [document]
    if isinstance(document, list):
        return list(chain.from_iterable(map(strings_of, document)))
    if isinstance(document, dict):
        return [*document, *chain.from_iterable(map(strings_of, document.values()))]
    return []


class Answer(NamedTuple):
    """The contract's answer to a body: a refusal, or rows (index, to, code) and payloads."""

    refusal: str
    rows: list[tuple[int, str | None, str]]
    payloads: list[list[tuple[str, Any]]]


def model(body: bytes) -> Answer:
    try:
        request = read(body)
    except ValueError:
        return Answer("invalid_json", [], [])
    if not isinstance(request, dict):
        return Answer("invalid_json", [], [])
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        return Answer("missing_messages", [], [])
    rows, payloads = [], []
    for index, message in enumerate(messages):
        code = model_code(message, request.get("list_number"))
        if code:
            to = message.get("to") if isinstance(message, dict) else None
            rows.append((index, to[:64] if isinstance(to, str) else None, code))
        else:
            told = model_payload(message, request.get("list_number"), index, ids(len(messages))[index])
            payloads.append(list(told.items()))
    return Answer("", rows, payloads)


def gateway(body: bytes) -> Answer:
    """Return the code's answer, as a caller and a consumer would see it."""
    try:
        draft = batch.validate(decode_bulk(body))
    except GatewayError as refusal:
        return Answer(refusal.code, [], [])
    prepared = batch.build(draft, OWNED, BatchIds(ids(draft.size), []), Origin(ACCOUNT_ID, REQUEST_ID, ACCEPTED_AT))
    answer = json.loads(encode(answer_for(prepared, bytes([Outcome.ACKED]) * len(prepared.outgoing.payloads))))
    assert answer["queued_count"] + answer["error_count"] == draft.size
    assert answer["error_count"] == len(answer["errors"])
    payloads = [json.loads(payload, parse_int=Digits, parse_float=Digits) for payload in prepared.outgoing.payloads]
    return Answer(
        "",
        [(row["index"], row["to"], row["code"]) for row in answer["errors"]],
        [[(name, plain(name, value)) for name, value in payload.items()] for payload in payloads],
    )


def plain(name: str, value: Any) -> Any:
    """Return the gateway's own numbers as int; the callers' numbers stay as they were written."""
    return int(value.text) if name in ("account_id", "list_id", "index") else value


# Documents, and the many ways to write one


class Pairs(list[tuple[str, Any]]):
    """An object whose fields may be repeated."""


digits = st.sampled_from(
    [*["0", "-0", "1", "-17", "1.50", "1e5", "1E+2", "0.1e-7", "1e400", "-1e-400", "9" * 30, "9" * 5_000]]
).map(Digits)
texts = st.one_of(
    st.text(max_size=6),
    st.sampled_from(["", "Hi {{messageId}}", "\x00\x1f\x7f", '"\\/', "\u2028\ufeff", "\N{PILE OF POO}", "{{x}}"]),
)
scalars = st.one_of(st.none(), st.booleans(), digits, texts)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.lists(st.tuples(st.text(max_size=4), inner), max_size=3).map(Pairs),
    max_leaves=6,
)
recipients = st.one_of(
    st.sampled_from(["+14155551234", "+12", "+123456789012345"]),
    st.from_regex(r"\+?[0-9]{0,17}", fullmatch=True),
    st.sampled_from(["+1415555123\u0664", "+14155551234\n", "\uff0b14155551234", "+1\x00", "+0123", ""]),
)
list_numbers = st.one_of(st.sampled_from(sorted(OWNED)), st.sampled_from([*sorted(OWNED), "+18005553000"]), recipients)
contact_data = st.lists(
    st.tuples(st.sampled_from(["first_name", "last_name", "timezone", "custom_fields", "other"]), values | texts),
    max_size=4,
).map(Pairs)
FIELDS = {
    "to": st.one_of(recipients, recipients, recipients, values),
    "list_number": st.one_of(list_numbers, list_numbers, list_numbers, values),
    "body": st.one_of(texts, texts, texts, values),
    "wrap_links": st.booleans() | values,
    "contact_data": contact_data | values,
    "metadata": st.lists(st.tuples(st.text(max_size=3), values), max_size=2).map(Pairs) | values,
    "unknown": values,
    "To": recipients,
    "messages": values,
}
whole_messages = st.fixed_dictionaries(
    {"to": st.just("+14155551234"), "list_number": st.sampled_from(sorted(OWNED)), "body": texts.filter(bool)},
    optional={"contact_data": contact_data, "metadata": FIELDS["metadata"], "wrap_links": st.booleans()},
).map(lambda fields: Pairs(fields.items()))
odd_messages = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(lambda name: st.tuples(st.just(name), FIELDS[name])), max_size=7
).map(Pairs)
messages = st.one_of(
    whole_messages,
    whole_messages,
    st.builds(lambda a, b: Pairs(a + b), whole_messages, odd_messages),
    odd_messages,
    values,
)
tops = st.lists(
    st.one_of(
        st.tuples(st.just("messages"), st.lists(messages, max_size=6)),
        st.tuples(st.just("messages"), st.lists(messages, min_size=1, max_size=6)),
        st.tuples(st.just("list_number"), list_numbers | values),
        st.tuples(st.sampled_from(["messages", "message", "x"]), values),
    ),
    max_size=4,
).map(Pairs)
documents = st.one_of(
    st.lists(messages, min_size=1, max_size=8).map(lambda sent: Pairs([("messages", sent)])), tops, tops, values
)


def write(document: Any, chance: random.Random) -> str:
    """Return a document in one of its many spellings."""

    def gap() -> str:
        return chance.choice(["", "", "", "", " ", "\n", "\t \r\n"])

    def listed(parts: list[str], opening: str, closing: str) -> str:
        return opening + gap() + f"{gap()},{gap()}".join(parts) + gap() + closing

    match document:
        case Digits(text):
            return text
        case None | bool():
            return json.dumps(document)
        case str():
            return '"' + "".join(spell(character, chance) for character in document) + '"'
        case Pairs():
            fields = [f"{write(name, chance)}{gap()}:{gap()}{write(value, chance)}" for name, value in document]
            return listed(fields, "{", "}")
        case _:
            return listed([write(item, chance) for item in document], "[", "]")


def spell(character: str, chance: random.Random) -> str:
    """Return a character as it is, where JSON allows that, or one of its escapes."""
    units = character.encode("utf-16-be", "surrogatepass")
    escapes = ["".join(f"\\u{units[at]:02x}{units[at + 1]:02X}" for at in range(0, len(units), 2))]
    escapes += [
        short
        for short in ('\\"', "\\\\", "\\/", "\\b", "\\f", "\\n", "\\r", "\\t")
        if json.loads(f'"{short}"') == character
    ]
    may_stay = character not in '"\\' and character >= " "
    return character if may_stay and chance.random() < 0.9 else chance.choice(escapes)


# By their seed: hypothesis' own st.randoms() would draw, and shrink, each toss by itself, at ten times the cost.
chances = st.integers(0, 2**32).map(random.Random)
bodies = st.builds(lambda document, chance: write(document, chance).encode(), documents, chances)


@EXAMPLES
@given(body=bodies)
@example(body=b'{"messages":[{"\\u0074o":5,"to":"+14155551234","list_num\\u0062er":"+18005551000","body":"x"}]}')
@example(body=b'{"messages":[],"messages":[{}],"list_number":[]}')
@example(
    body=b'{"messages":[{"to":"+12","list_number":"+18005551000","body":"x",'
    b'"contact_data":{"last_name":[],"l\\u0061st_name":"x"}}]}'
)
@example(body=b"\xef\xbb\xbf{}")
def test_any_document_in_any_spelling_is_answered_as_the_contract_says(body: bytes) -> None:
    assert gateway(body) == model(body)


damages = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 2),
        st.one_of(
            st.binary(max_size=2),
            st.sampled_from(
                [b'"', b"\\", b"{", b"]", b",", b":", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"e", b".", b"-"]
            ),
        ),
    ),
    min_size=1,
    max_size=3,
)


@EXAMPLES
@given(body=bodies, damages=damages)
def test_a_damaged_document_is_answered_as_the_contract_says(
    body: bytes, damages: list[tuple[float, int, bytes]]
) -> None:
    for where, length, instead in damages:
        at = int(where * len(body))
        body = body[:at] + instead + body[at + length :]
    assert gateway(body) == model(body)
