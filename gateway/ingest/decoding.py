"""The decoding of request bodies into messages. No IO, no clock.

There are four ways to decode a batch:

1. Typed, in one pass: the normal case.
2. One by one (`_decode_one_by_one`), if the typed pass has found a value of the wrong type: the error then concerns one
   message only.
3. `messages` in place, after a pass over the whole (`_decode_in_place`, `most_fields=0`): above LARGE_BODY_BYTES with
   more than MANY_COMMAS commas. If there are too many messages, few of them are built.
4. In place from the start (`most_fields=MAX_FIELDS`): above HUGE_BODY_BYTES, or if the body is still slow to parse
   after its `contact_data` was taken out.
"""

import codecs
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, TypeAlias, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import InvalidDryRun, InvalidJson, MissingMessages, TooManyMessages
from gateway.ingest.contact_data import NESTED_TOO_DEEPLY, TakenOut, first_byte, is_object, take_out
from gateway.ingest.in_place import (
    Body,
    InPlace,
    Malformed,
    after_spaces,
    decode_array,
    rest_of,
    skip,
)
from gateway.ingest.second_pass import SecondPass
from gateway.ingest.wire import MAX_MESSAGES, NOT_A_MESSAGE, WRONG_TYPE, Message, MistypedMessage

# A body above both limits may have too many values to build all. A batch of 1,000 messages reaches the limit with 50
# commas in each.
LARGE_BODY_BYTES, MANY_COMMAS = 64 * 1024, 50_000
# A large body with so many brackets of one kind is slow to parse. So `contact_data` is taken out of it.
MANY_BRACKETS = 10_000
# It takes longer to decode messages one by one, but then a value of the wrong type in a huge body costs no second pass.
HUGE_BODY_BYTES = 1024 * 1024
# Limits on what is decoded one by one. Fields after the first MAX_FIELDS are parsed as a whole, and `messages` among
# them a second time. If a body has several `messages`, those after MAX_ELEMENTS elements are skipped, and the last of
# them is parsed a second time.
MAX_FIELDS, MAX_ELEMENTS = 1_000, 2 * MAX_MESSAGES
# A message is first decoded with the right types. After MAX_FAILED_BYTES of messages that failed, this is no longer
# tried. A failed message counts as at least LEAST_FAILED_BYTES: to learn that a number is no string takes up to 30 µs.
MAX_FAILED_BYTES, LEAST_FAILED_BYTES = 64 * 1024, 4096
PIECE_BYTES = 64 * 1024  # of a text while its UTF-8 is checked
NOT_AN_OBJECT: Final = "it is not an object"  # of a body: the reason of an InvalidJson
_FIELDS = frozenset(("messages", "list_number", "dry_run"))
_LITERALS = {b"true": True, b"false": False, b"null": None}


class DecodedBody(msgspec.Struct):
    """A decoded body: 1 to 1,000 messages, and the list number for those that carry none. A single send has one."""

    messages: list[Message | MistypedMessage]
    list_number: object = None
    typed: bool = True  # False: there may be MistypedMessages
    dry_run: bool = False
    taken_out: TakenOut | None = None  # the originals of the stand-ins in the objects of the messages


# Typed: decoded in one pass, which fails if a value has the wrong type. Listed: the elements of `messages` stay raw.
# Loose: all values stay raw.
class _TypedBulk(msgspec.Struct):
    messages: list[Message]
    list_number: str | None = None
    dry_run: bool | None = None


class _TypedSingle(Message, gc=False):
    dry_run: bool | None = None


class _LooseMessage(msgspec.Struct, gc=False):
    to: Raw | UnsetType = UNSET
    list_number: Raw | UnsetType = UNSET
    body: Raw | UnsetType = UNSET
    wrap_links: Raw | UnsetType = UNSET
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


_Element: TypeAlias = Message | _LooseMessage | None  # of `messages`; None is no object


class _LooseSingle(_LooseMessage, gc=False):
    dry_run: Raw | UnsetType = UNSET


class _LooseBulk(msgspec.Struct):
    messages: Raw | UnsetType = UNSET
    list_number: Raw | UnsetType = UNSET
    dry_run: Raw | UnsetType = UNSET


class _ListedBulk(msgspec.Struct):
    messages: list[Raw]
    list_number: Raw | UnsetType = UNSET
    dry_run: Raw | UnsetType = UNSET


_typed_bulk = msgspec.json.Decoder(_TypedBulk)
_listed_bulk = msgspec.json.Decoder(_ListedBulk)
_loose_bulk = msgspec.json.Decoder(_LooseBulk)
_message = msgspec.json.Decoder(Message)
_loose_message = msgspec.json.Decoder(_LooseMessage)
_message_in_place = InPlace(Message)
_loose_message_in_place = InPlace(_LooseMessage)
_typed_single = msgspec.json.Decoder(_TypedSingle)
_loose_single = msgspec.json.Decoder(_LooseSingle)
_string = msgspec.json.Decoder(str)


def decode_bulk(body: Body) -> DecodedBody:
    """Decode the body of a batch. Raises InvalidJson, MissingMessages, TooManyMessages or InvalidDryRun."""
    return _decode(body, _decode_messages)


def decode_single(body: Body) -> DecodedBody:
    """Decode the body of a single send, as a batch of one. Raises InvalidJson or InvalidDryRun."""
    return _decode(body, _decode_message)


def _decode(body: Body, decode: Callable[[Body, bool], DecodedBody]) -> DecodedBody:
    """Decode a body that may be no UTF-8, no JSON, or very large.

    To skip a body of 5 MB with millions of values takes as long as to decode and encode a clean one. So no value is
    built that is not needed, and few values are parsed twice (tests/properties/test_work_of_bodies.py).
    """
    short, taken_out = body, None
    try:
        if not body.isascii():
            _check_utf8(body)
        is_slow_to_parse = len(body) > LARGE_BODY_BYTES and _has_many_brackets(body)
        if is_slow_to_parse:
            short, taken_out = take_out(body)
            is_slow_to_parse = taken_out is None or _has_many_brackets(short)
        decoded = decode(short, is_slow_to_parse)
        if is_slow_to_parse:
            _limit_second_pass(decoded.messages)
    except (msgspec.DecodeError, Malformed, RecursionError) as error:
        # An error of `take_out` has its position in the body: `taken_out` is None then.
        raise InvalidJson(_reason(body, error, taken_out)) from None
    decoded.taken_out = taken_out
    return decoded


def _has_many_brackets(body: Body) -> bool:
    return any(_has_more(MANY_BRACKETS, bracket, body) for bracket in (b"[", b"{"))


def _limit_second_pass(messages: list[Message | MistypedMessage]) -> None:
    """Raise InvalidJson if validation would parse too much again: the `contact_data` that `take_out` has left."""
    second_pass = SecondPass()
    for message in messages:
        if message.contact_data is not UNSET and is_object(message.contact_data):
            second_pass.add(message.contact_data)


def _has_more(most: int, mark: bytes, body: Body) -> bool:
    """Return True if the byte `mark` occurs more than `most` times.

    In a huge body that has few of them, `find` is faster than `count`.
    """
    if len(body) <= HUGE_BODY_BYTES:
        return body.count(mark) > most
    found, at = 0, -1
    while (at := body.find(mark, at + 1)) >= 0:
        found += 1
        if found > most:
            return True
    return False


def _decode_messages(body: Body, is_slow_to_parse: bool) -> DecodedBody:
    decoder = _ElementDecoder(MAX_FAILED_BYTES if is_slow_to_parse else len(body))
    if is_slow_to_parse or len(body) > HUGE_BODY_BYTES:
        return _decode_in_place(body, decoder, MAX_FIELDS)
    if len(body) > LARGE_BODY_BYTES and _has_more(MANY_COMMAS, b",", body):
        return _decode_in_place(body, decoder, 0)
    try:
        typed = _typed_bulk.decode(body)
    except msgspec.ValidationError:
        return _decode_one_by_one(body, decoder)
    _check_count(len(typed.messages))
    return DecodedBody(typed.messages, typed.list_number, dry_run=typed.dry_run is True)  # type: ignore[arg-type]  # list is invariant; read only


def _decode_message(body: Body, is_slow_to_parse: bool) -> DecodedBody:
    if len(body) <= HUGE_BODY_BYTES and not is_slow_to_parse:
        try:
            typed = _typed_single.decode(body)
            return DecodedBody([typed], dry_run=typed.dry_run is True)
        except msgspec.ValidationError:
            pass
    single = _loose_single.decode(body)  # raises ValidationError, a DecodeError, if the body is no object
    return DecodedBody([_message_of(single)], typed=False, dry_run=_is_dry_run(single.dry_run))


def _check_utf8(body: Body) -> None:
    """Raise InvalidJson for invalid UTF-8: msgspec does not check the bytes of raw and unknown fields.

    In pieces, because a character may take four times its bytes in Python.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(body), PIECE_BYTES):
            decoder.decode(body[start : start + PIECE_BYTES])
        start = len(body)
        decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        # The decoder prepends the bytes of a character that began in the piece before.
        begun = len(error.object) - len(body[start : start + PIECE_BYTES])
        raise InvalidJson(f"invalid UTF-8 near byte {start - begun + error.start}") from None


def _reason(body: Body, error: Exception, taken_out: TakenOut | None) -> str:
    """Return what is wrong with a body that cannot be decoded, from the decoder's error. Bytes count from 0.

    With `taken_out`, the decoder had a shortened body: its positions are mapped to those in the body.
    """
    if not body:
        return "it is empty"
    if body.startswith(codecs.BOM_UTF8):
        return "it starts with a byte order mark"
    if isinstance(error, RecursionError):
        return NESTED_TOO_DEEPLY
    if isinstance(error, msgspec.ValidationError):
        return NOT_AN_OBJECT
    malformed = Malformed.of(error) if isinstance(error, msgspec.DecodeError) else cast("Malformed", error)
    if malformed.position is not None:
        at = taken_out.position(malformed.position) if taken_out else malformed.position
        return f"{malformed.what} near byte {at}"
    # Of half of a surrogate pair in the last 11 bytes, the decoder says the same as of a body that is cut off.
    return "half of a surrogate pair near its end" if b"\\u" in body[-11:] else malformed.what


class _ElementDecoder:
    """Decodes the elements of `messages` of one body, with the right types until MAX_FAILED_BYTES have failed."""

    def __init__(self, trial_bytes: int) -> None:
        """`trial_bytes` bounds the attempt with the right types, in place: a longer message is decoded loosely."""
        self._trial_bytes = trial_bytes
        self._failed_bytes_left = MAX_FAILED_BYTES

    def decode(self, element: Raw) -> _Element:
        """Decode an element. Raises DecodeError."""
        if first_byte(element) != b"{":
            return None
        if self._failed_bytes_left > 0:
            try:
                return _message.decode(element)
            except msgspec.ValidationError:
                self._failed_bytes_left -= max(len(element), LEAST_FAILED_BYTES)
        return _loose_message.decode(element)

    def decode_in_place(self, body: Body, at: int) -> tuple[_Element, int]:
        """Return the element at a position, and the position of the next byte. Raises Malformed or RecursionError."""
        if body[at : at + 1] != b"{":
            return None, skip(body, at)
        if self._failed_bytes_left > 0:
            with suppress(msgspec.ValidationError, Malformed):
                return _message_in_place.decode(body, at, at + self._trial_bytes)
        element, end = _loose_message_in_place.decode(body, at)
        self._failed_bytes_left -= max(end - at, LEAST_FAILED_BYTES)
        return element, end


def _decode_one_by_one(body: Body, decoder: _ElementDecoder) -> DecodedBody:
    """Decode a body in which some value has the wrong type. Raises what _decode_in_place raises, and DecodeError.

    This is faster than _decode_in_place, although it parses the body twice: 0.5 ms instead of 2.4 for 1,000 messages
    with one bad one.
    """
    try:
        bulk = _listed_bulk.decode(body)
    except msgspec.ValidationError:
        return _decode_in_place(body, decoder, 0)
    _check_count(len(bulk.messages))
    return _decoded(list(map(decoder.decode, bulk.messages)), bulk.list_number, bulk.dry_run)


def _decode_in_place(body: Body, decoder: _ElementDecoder, most_fields: int) -> DecodedBody:
    """Decode a body: its first `most_fields` one by one, the others as a whole, and `messages` element by element.

    Raises Malformed, RecursionError, ValidationError if the body is no object, and what decode_bulk raises.
    """
    start = at = after_spaces(body, 0)
    fields: dict[str, Any] = {}
    elements_left = MAX_ELEMENTS
    for _ in range(most_fields if body[start : start + 1] == b"{" else 0):
        name, value_at = _next_key(body, at)
        if name is None:
            break
        if name == "messages" and elements_left > 0 and body[value_at : value_at + 1] == b"[":
            fields[name], at = decode_array(body, value_at, decoder.decode_in_place, MAX_MESSAGES + 1)
            elements_left -= len(fields[name])
        else:
            at = skip(body, value_at)
            if name in _FIELDS:
                fields[name] = Raw(memoryview(body)[value_at:at])
        if body[at : at + 1] != b",":
            break
    fields |= _rest_of_fields(body, at, is_first=at == start)
    elements = fields.get("messages")
    if isinstance(elements, Raw):
        if at > start:  # otherwise the body has few brackets, and at most HUGE_BODY_BYTES
            SecondPass().add(elements)
        array = bytes(elements) if first_byte(elements) == b"[" else b"[]"
        elements, _ = decode_array(array, 0, decoder.decode_in_place, MAX_MESSAGES + 1)
    return _decoded(elements or [], fields.get("list_number", UNSET), fields.get("dry_run", UNSET))


def _next_key(body: Body, at: int) -> tuple[str | None, int]:
    """Return the key after the `{` or `,` at a position, and the position of its value; None if there is no key.

    Raises Malformed or RecursionError.
    """
    start = after_spaces(body, at + 1)
    end = skip(body, start) if body[start : start + 1] == b'"' else start
    if body[end : end + 1] == b":":
        with suppress(msgspec.DecodeError):
            return _string.decode(memoryview(body)[start:end]), after_spaces(body, end + 1)
    return None, at


def _rest_of_fields(body: Body, at: int, *, is_first: bool) -> dict[str, Raw]:
    """Return the known fields of a request after a position: its start (`is_first`), or the end of a field.

    The rest of the body is checked. Raises Malformed, RecursionError, or ValidationError if the body is no object.
    """
    rest, shift = (body, 0) if is_first else rest_of(body, at, b'{"":null')
    try:
        bulk = _loose_bulk.decode(rest)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        raise Malformed.of(error, shift) from None
    return {name: value for name, value in msgspec.structs.asdict(bulk).items() if value is not UNSET}


def _decoded(elements: list[_Element], list_number: Raw | UnsetType, dry_run: Raw | UnsetType) -> DecodedBody:
    _check_count(len(elements))
    messages = [element if isinstance(element, Message) else _message_of(element) for element in elements]
    are_typed = all([isinstance(message, Message) for message in messages])
    return DecodedBody(messages, _string_or_none(list_number), are_typed, _is_dry_run(dry_run))


def _message_of(loose: _LooseMessage | None) -> Message | MistypedMessage:
    if loose is None:
        return NOT_A_MESSAGE
    to, list_number, body = map(_string_or_none, (loose.to, loose.list_number, loose.body))
    wrap_links = _literal(loose.wrap_links)
    kind: Any = MistypedMessage if WRONG_TYPE in (to, list_number, body, wrap_links) else Message
    message: Message | MistypedMessage = kind(to, list_number, body, wrap_links, loose.contact_data, loose.metadata)
    return message


def _literal(value: Raw | UnsetType) -> object:
    """Return True, False or None; None also for a field that was left out, and WRONG_TYPE for any other value."""
    if value is UNSET:
        return None
    # One byte more than the longest literal has. No copy of the rest: the value may have megabytes.
    return _LITERALS.get(bytes(memoryview(value)[:6]).rstrip(b" \t\r\n"), WRONG_TYPE)


def _is_dry_run(value: Raw | UnsetType) -> bool:
    """Return True if the value of `dry_run` is true. Raises InvalidDryRun if it is no boolean and not null."""
    literal = _literal(value)
    if literal is WRONG_TYPE:
        raise InvalidDryRun
    return literal is True


def _string_or_none(value: Raw | UnsetType) -> object:
    if value is UNSET:
        return None
    start = first_byte(value)
    if start == b'"':
        return _string.decode(value)
    return None if start == b"n" else WRONG_TYPE


def _check_count(count: int) -> None:
    if count == 0:
        raise MissingMessages
    if count > MAX_MESSAGES:
        raise TooManyMessages
