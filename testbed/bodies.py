"""Bodies of 5 MB in every shape that might cost more than a clean one: deep, wide, doubled, huge, escaped, mistyped."""

import functools
from collections.abc import Callable, Iterator
from itertools import product

from gateway.ingest.wire import MAX_BODY_BYTES

LIST_NUMBER = b"+18005551000000"  # of 14 digits, so that any other can take its place
FIELDS = b'"to":"+14155551234","list_number":"%b","body":"Hi {{messageId}}"' % LIST_NUMBER
GOOD = b"{" + FIELDS + b"}"
HEAD, TAIL = b'{"messages":[', b"]}"
MANY_NAMES = b'"metadata":{"x":[' + b'{"contact_data":1},' * 10_000 + b"1]}"


def clean_body(text: bytes = b"a", list_number: bytes = LIST_NUMBER) -> bytes:
    """Return 1,000 good messages with long texts, just below 5 MB."""
    empty = b'{"to":"+14155551234","list_number":"%b","body":"{{messageId}}%%b"}' % list_number
    room = MAX_BODY_BYTES // 1_000 - len(empty) - 10
    return HEAD + b",".join([empty % (text * (room // len(text)))] * 1_000) + TAIL


def filled(before: bytes, unit: bytes, after: bytes) -> bytes:
    """Repeat `unit` between two parts, up to 5 MB."""
    return before + unit * ((MAX_BODY_BYTES - len(before) - len(after)) // len(unit)) + after


def numbered(before: bytes, unit: bytes, after: bytes) -> bytes:
    """Repeat `unit`, which is formatted with a number of seven digits, between two parts, up to 5 MB."""
    count = (MAX_BODY_BYTES - len(before) - len(after)) // len(unit % 0)
    return before + b"".join([unit % number for number in range(count)]) + after


# Where the shape stands: the bytes before and after it, which is one value.
PLACES = {
    "the whole body": (b"", b""),
    "messages": (b'{"messages":', b"}"),
    "messages after a bad one": (b'{"messages":1,"messages":', b"}"),
    "an element": (HEAD, TAIL),
    "the last element of a thousand": (HEAD + (GOOD + b",") * 999, TAIL),
    "the default list": (HEAD + GOOD + b'],"list_number":', b"}"),
    "an unknown field": (HEAD + GOOD + b'],"unknown":', b"}"),
    "an unknown field of a message": (HEAD + b"{" + FIELDS + b',"unknown":', b"}" + TAIL),
    "an unknown field before a bad one": (HEAD + b'{"unknown":', b',"to":1}' + TAIL),
    "an unknown field before an array": (HEAD + b'{"unknown":', b"},[]" + TAIL),
    "an unknown field before too many elements": (HEAD + b'{"unknown":', b"}" + b",{}" * 1_000 + TAIL),
    "an unknown field before a fraction": (HEAD + b'{"unknown":', b"},1.5" + TAIL),
    "messages before the last": (b'{"messages":', b',"messages":[1]}'),
    "an unknown field of the fourth messages": (b"{" + b'"messages":[],' * 3 + HEAD[1:] + b'{"unknown":', b"}" + TAIL),
    "an unknown field after an escaped name": (rb'{"m\u0065ssages":[{"unknown":', b"}]}"),
    "an unknown field after two arrays": (
        b"{" + (b'"messages":[' + b"{}," * 1_000 + b"{}],") * 2 + HEAD[1:] + GOOD + b'],"unknown":',
        b"}",
    ),
    "a message after many fields": (b"{" + b'"a":1,' * 1_000 + HEAD[1:] + b'{"unknown":', b"}" + TAIL),
    "a message after many elements": (
        b"{" + (b'"messages":[' + b"{}," * 1_000 + b"{}],") * 2 + HEAD[1:] + b'{"unknown":',
        b"}" + TAIL,
    ),
    "to": (HEAD + b'{"to":', b"}" + TAIL),
    "to of a whole message": (HEAD + b'{"list_number":"%b","body":"a","to":' % LIST_NUMBER, b"}" + TAIL),
    "list_number": (HEAD + b'{"to":"+14155551234","body":"a","list_number":', b"}" + TAIL),
    "the list of all messages": (HEAD + b'{"to":"+14155551234","body":"a"}],"list_number":', b"}"),
    "body": (HEAD + b'{"to":"+14155551234","list_number":"%b","body":' % LIST_NUMBER, b"}" + TAIL),
    "metadata": (HEAD + b"{" + FIELDS + b',"metadata":', b"}" + TAIL),
    "metadata beside contact_data": (HEAD + b"{" + FIELDS + b',"metadata":{"contact_data":{},"x":', b"}}" + TAIL),
    "contact_data": (HEAD + b"{" + FIELDS + b',"contact_data":', b"}" + TAIL),
    "contact_data before a bad message": (HEAD + b"{" + FIELDS + b',"contact_data":{"x":', b'}},{"to":1}' + TAIL),
    "contact_data with an escaped name": (HEAD + b"{" + FIELDS + rb',"contact_dat\u0061":', b"}" + TAIL),
    "contact_data with an escaped name before a fraction": (
        HEAD + b"{" + FIELDS + rb',"contact_dat\u0061":{"x":',
        b"}},1.5" + TAIL,
    ),
    "contact_data before its end is malformed": (HEAD + b"{" + FIELDS + b',"contact_data":{"x":', b"!}}" + TAIL),
    "contact_data of metadata": (HEAD + b"{" + FIELDS + b',"metadata":{"contact_data":{"x":', b'},"y":1}}' + TAIL),
    "contact_data before many of its name": (
        HEAD + b"{" + FIELDS + b',"contact_data":{"x":',
        b"}," + MANY_NAMES + b"}" + TAIL,
    ),
    "contact_data with a bad field before many of its name": (
        HEAD + b"{" + FIELDS + b',"contact_data":{"x":',
        b',"first_name":1},' + MANY_NAMES + b"}" + TAIL,
    ),
    "contact_data after many fields and before many of its name": (
        b"{" + b'"a":1,' * 1_000 + HEAD[1:] + b"{" + FIELDS + b',"contact_data":{"x":',
        b',"first_name":1},' + MANY_NAMES + b"}" + TAIL,
    ),
    "first_name": (HEAD + b"{" + FIELDS + b',"contact_data":{"first_name":', b"}}" + TAIL),
    "custom_fields": (HEAD + b"{" + FIELDS + b',"contact_data":{"custom_fields":', b"}}" + TAIL),
}

# Places in the body of a single send. It has the form of one element of `messages`.
SINGLE_PLACES = {"a single send": (b"", b"")} | {
    f"{place} of a single send": (PLACES[place][0].removeprefix(HEAD), PLACES[place][1].removesuffix(TAIL))
    for place in ("to", "body", "metadata", "contact_data", "first_name", "custom_fields")
}
SINGLE_PLACES["an unknown field of a single send"] = (b"{" + FIELDS + b',"unknown":', b"}")

Fill = Callable[[bytes, bytes, bytes], bytes]
# How it is filled: the value's first bytes, what is repeated, its last bytes.
VALUES: dict[str, tuple[Fill, bytes, bytes, bytes]] = {
    "numbers": (filled, b"[", b"1,", b"1]"),
    "floats": (filled, b"[", b"1e300,", b"1]"),
    "long numbers": (filled, b"[", b"1234567890" * 400 + b",", b"1]"),
    "known keys with floats": (filled, b"{", b'"to":1e300,', b'"to":"a"}'),
    "objects": (filled, b"[", b"{},", b"1]"),
    "good messages": (filled, b"[", GOOD + b",", GOOD + b"]"),
    "deep": (filled, b"[", b"[" * 300 + b"]" * 300 + b",", b"1]"),
    "deep known names": (filled, b"[", b"[" * 300 + b'{"first_name":1}' + b"]" * 300 + b",", b"1]"),
    "deep names": (filled, b"[", b"[" * 300 + b'{"contact_data":{}}' + b"]" * 300 + b",", b"1]"),
    "shallow": (filled, b"[", b"[" * 10 + b"]" * 10 + b",", b"1]"),
    "keys": (numbered, b"{", b'"%07d":1,', b'"last":1}'),
    "one key": (filled, b"{", b'"a":1,', b'"a":1}'),
    "known keys": (filled, b"{", b'"to":"a",', b'"to":"a"}'),
    "known keys of the wrong type": (filled, b"{", b'"first_name":1,"body":1,', b'"to":1}'),
    "arrays of messages": (filled, b"{", b'"messages":[{}],', b'"messages":[1]}'),
    "ASCII": (filled, b'"', b"a", b'"'),
    "emoji": (filled, b'"', "\N{PILE OF POO}".encode(), b'"'),
    "newlines": (filled, b'"', b"\\n", b'"'),
    "escapes": (filled, b'"', b"\\u20ac", b'"'),
    "phone numbers": (filled, b'"', b"+10\\n", b'+10"'),
    "macros": (filled, b'"', b"{{messageId}}", b'"'),
    "digits": (filled, b"", b"1", b"1"),
    "fraction": (filled, b"0.", b"1", b"e5"),
    "space": (filled, b"", b" ", b"{}"),
    "space in an object": (filled, b'{"a":', b" ", b"{}}"),
}


def _make(place: tuple[bytes, bytes], value: str) -> bytes:
    before, after = place
    fill, first, unit, last = VALUES[value]
    return fill(before + first, unit, last + after)


def _shapes(places: dict[str, tuple[bytes, bytes]]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    for value, (name, place) in product(VALUES, places.items()):
        yield f"{value} as {name}", functools.partial(_make, place, value)


def _texts() -> Iterator[tuple[str, Callable[[], bytes]]]:
    texts = {
        "letters": b"a",
        "escapes": b"\\u20ac",
        "emoji": "\N{PILE OF POO}".encode(),
        "euros": "€".encode(),
        "newlines": b"\\n",
        "letters and an emoji": "\N{PILE OF POO}".encode() + b"a" * 100,
        "letters and brackets": b"[[[" + b"a" * 100,
    }
    for name, text in texts.items():
        yield f"{name} as all bodies", functools.partial(clean_body, text)
        yield f"{name} before a bad one as all bodies", functools.partial(_with_a_bad_one, text)


def _slow_numbers() -> Iterator[tuple[str, Callable[[], bytes]]]:
    slow = b"9" * 770 + b"e-1090"  # to convert it takes 30 µs
    field = b'"to":"+14155551234"'
    for place, changed in {
        "to": b'"to":' + slow,
        "first names": field + b',"contact_data":{"first_name":%b}' % slow,
        "first names before good ones": field + b',"contact_data":{"first_name":%b,"first_name":""}' % slow,
    }.items():
        yield f"slow numbers in {place} as all bodies", functools.partial(_changed, field, changed)


def _changed(field: bytes, changed: bytes) -> bytes:
    """Return a clean body in which a field is longer, and the text is shorter."""
    extra = b"a" * (len(changed) - len(field))
    return clean_body().replace(extra + b'"', b'"').replace(field, changed)


def _with_a_bad_one(text: bytes) -> bytes:
    """Return a clean body but for the number of the last message, which has the wrong type."""
    before, to, after = clean_body(text).rpartition(b'"+14155551234"')
    return before + b"1" * len(to) + after


SHAPES: dict[str, Callable[[], bytes]] = dict([*_shapes(PLACES), *_texts(), *_slow_numbers()])
SINGLE_SHAPES: dict[str, Callable[[], bytes]] = dict(_shapes(SINGLE_PLACES))  # for POST /api/v2/send
