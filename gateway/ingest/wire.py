"""The types of requests, answers and payloads, with their JSON codecs. No IO, no clock.

A well-formed request is decoded in one pass into typed messages. If a value has the wrong type, the request is decoded
message by message: the error then concerns one message only. `contact_data` and `metadata` keep the caller's bytes.
Huge bodies take neither way: one pass decodes nearly all of them, whatever they contain (docs/decisions, 0048).
"""

import codecs
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias, cast

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import InvalidDryRun, InvalidJson, MissingMessages, TooManyMessages
from gateway.ingest.contact_data import NESTED_TOO_DEEPLY, SkippedObject, TakenOut, first_byte, take_out

MAX_MESSAGES = 1_000  # contract: per request
MAX_BODY_BYTES = 5_242_880  # contract: 5 MB
MAX_ECHO = 64  # contract: characters of `to` in an error row
# A body above the first two limits may have too many values to build, and one above the third takes long to parse. They
# are decoded by slower types, with the same result. A batch of 1,000 messages reaches 20,000 commas with 20 in each.
LARGE_BODY_BYTES, MANY_COMMAS = 64 * 1024, 20_000
HUGE_BODY_BYTES = 1024 * 1024
MANY_BRACKETS = 10_000  # of one kind; a huge body with more is slow to parse: `contact_data` is taken out of it
MAX_ARRAYS = 10  # values of `messages` that are built: only the last counts, and each costs as much as 1,000 elements
PIECE_BYTES = 64 * 1024


class Message(msgspec.Struct, gc=False):
    """One message as the caller sent it. `null` means absent."""

    to: str | None = None
    list_number: str | None = None
    body: str | None = None
    wrap_links: bool | None = None
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class MistypedMessage(msgspec.Struct, gc=False):
    """An element of `messages` in which at least one value has the wrong type.

    Strings and null are decoded. WRONG_TYPE replaces any other value, and fails every check.
    """

    to: object = None
    list_number: object = None
    body: object = None
    wrap_links: object = None
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


WRONG_TYPE: Final = object()
NOT_A_MESSAGE: Final = MistypedMessage()  # stands for an element of `messages` that is no object
NOT_AN_OBJECT: Final = "it is not an object"  # of a body: the reason of an InvalidJson
_malformed = re.compile(r"JSON is malformed: (.+) \(byte (\d+)\)").fullmatch
_is_object = re.compile(rb"[ \t\r\n]*+\{").match
_LITERALS = {b"true": True, b"false": False, b"null": None}


class DecodedBody(msgspec.Struct):
    """A decoded body: 1 to 1,000 messages, and the list number for those that carry none. A single send has one."""

    messages: list[Message | MistypedMessage]
    list_number: object = None
    typed: bool = True  # False: there may be MistypedMessages
    dry_run: bool = False  # validate and resolve only
    taken_out: TakenOut | None = None  # the originals of the stand-ins in the objects of the messages


class ErrorRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One message that was not queued. `to` is the start of the caller's value if that is a string, otherwise null."""

    index: int
    to: str | None
    code: str
    error: str
    may_be_queued: bool = False
    message_id: str = ""


class Answer(msgspec.Struct):
    """The answer to a batch: queued_count + error_count is the number of messages in the request."""

    queued_count: int
    error_count: int
    errors: list[ErrorRow]


class QueuedMessage(msgspec.Struct, gc=False):
    """One message that was queued, in an answer with ids."""

    index: int
    message_id: str


class AnswerWithIds(Answer):
    """The answer to a batch whose caller prefers to have the ids of what was queued."""

    messages: list[QueuedMessage]


class DryRunAnswer(Answer):
    """The answer to a dry run: the counts and rows of validation and ownership."""

    dry_run: bool = True


class SingleAnswer(msgspec.Struct):
    """The answer to a single message that was queued."""

    success: bool
    message_id: str
    status: str


class SingleDryRunAnswer(msgspec.Struct):
    """The answer to a dry run of a single message that would be published."""

    success: bool = True
    status: str = "dry_run"
    dry_run: bool = True


class Payload(msgspec.Struct, gc=False):
    """The payload for one SMS, fields in this order: AMQP type `sms.v1`, or an array of them as `sms.batch.v1`."""

    id: str
    account_id: int
    list_id: int
    list_number: str
    to: str
    body: str
    wrap_links: bool
    contact_data: Raw | UnsetType
    metadata: Raw | UnsetType
    accepted_at: str
    request_id: str
    index: int


class _TypedBulk(msgspec.Struct):
    messages: list[Message]
    list_number: str | None = None
    dry_run: bool | None = None


class _TypedSingle(Message, gc=False):
    dry_run: bool | None = None


class _SkippedArray(msgspec.Struct, array_like=True):
    """An array of which nothing is built."""


# Of any JSON type: a number above the range of floats alone makes the decoder fail.
_AnyValue: TypeAlias = str | float | bool | _SkippedArray | SkippedObject | None


@dataclass
class _LooseMessage:
    # No Struct: msgspec does not take a Struct and a _SkippedArray as types of one value.
    to: _AnyValue = None
    list_number: _AnyValue = None
    body: _AnyValue = None
    wrap_links: _AnyValue = None
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


@dataclass
class _LooseSingle(_LooseMessage):
    dry_run: Raw | UnsetType = UNSET


class _RawMessage(msgspec.Struct, gc=False):
    to: Raw | UnsetType = UNSET
    list_number: Raw | UnsetType = UNSET
    body: Raw | UnsetType = UNSET
    wrap_links: Raw | UnsetType = UNSET
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET
    dry_run: Raw | UnsetType = UNSET  # of a single send


class _Array(msgspec.Struct, array_like=True):
    """An array of which up to MAX_MESSAGES + 1 elements are built, and the others are skipped.

    msgspec checks the length of a list only after it has built all elements, perhaps a million. Decoding fails at the
    array after MAX_ARRAYS.
    """

    built: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _Array.built += 1
        if _Array.built > MAX_ARRAYS:
            raise ValueError("too many arrays")

    @classmethod
    def of(cls, element: Any) -> "type[_Array]":
        """Return the type of arrays of such elements."""
        fields = [(f"element_{index}", element | UnsetType, UNSET) for index in range(MAX_MESSAGES + 1)]
        return cast("type[_Array]", msgspec.defstruct("Array", fields, bases=(cls,)))

    def elements(self) -> list[Any]:
        """Return the elements, up to one more than MAX_MESSAGES."""
        return [element for element in msgspec.structs.astuple(self) if element is not UNSET]


def _bulk_of(messages: Any) -> type[msgspec.Struct]:
    """Return a type of requests in which any value of the other fields is decoded."""
    fields = [
        ("messages", messages | UnsetType, UNSET),
        ("list_number", Raw | UnsetType, UNSET),
        ("dry_run", Raw | UnsetType, UNSET),
    ]
    return msgspec.defstruct("Bulk", fields)


_encoder = msgspec.json.Encoder()
_typed_bulk = msgspec.json.Decoder(_TypedBulk)
_listed_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_bulk_of(list[Raw] | str))
_LooseMessages: Any = _Array.of(_LooseMessage | _SkippedArray | str | float | bool | None)
_loose_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    _bulk_of(_LooseMessages | SkippedObject | str | float | bool | None)
)
_RawMessages: Any = _Array.of(Raw)
_loose_messages: msgspec.json.Decoder[_Array] = msgspec.json.Decoder(_LooseMessages)
_raw_messages: msgspec.json.Decoder[_Array] = msgspec.json.Decoder(_RawMessages)
_raw_messages_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(
    _bulk_of(_RawMessages | SkippedObject | str | float | bool | None)
)
_raw_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_bulk_of(Raw))
_message = msgspec.json.Decoder(Message)
_typed_single = msgspec.json.Decoder(_TypedSingle)
_loose_single = msgspec.json.Decoder(_LooseSingle)
_raw_message = msgspec.json.Decoder(_RawMessage)
_answer = msgspec.json.Decoder(Answer)
_string = msgspec.json.Decoder(str)

encode = _encoder.encode


def decode_bulk(body: bytes | bytearray) -> DecodedBody:
    """Decode the body of a batch. Raises InvalidJson, MissingMessages, TooManyMessages or InvalidDryRun."""
    return _decode(body, _decode_messages)


def decode_single(body: bytes | bytearray) -> DecodedBody:
    """Decode the body of a single send, as a batch of one. Raises InvalidJson or InvalidDryRun."""
    return _decode(body, _decode_message)


def _decode(body: bytes | bytearray, decode: Callable[[bytes | bytearray], DecodedBody]) -> DecodedBody:
    """Decode a body that may be no UTF-8, no JSON, or very large.

    To skip a body of 5 MB with millions of values takes as long as to decode and encode a clean one. So no value is
    built that is not needed, and few bytes are parsed twice (tests/properties/test_work_of_bodies.py).
    """
    short, taken_out = body, None
    try:
        if not body.isascii():
            _check_utf8(body)
        if len(body) > HUGE_BODY_BYTES and _has_many_brackets(body):
            short, taken_out = take_out(body)
        decoded = decode(short)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidJson(_reason(body, error, taken_out)) from None
    decoded.taken_out = taken_out
    return decoded


def _decode_messages(body: bytes | bytearray) -> DecodedBody:
    if len(body) > LARGE_BODY_BYTES:
        if not _is_object(body):
            raise InvalidJson(NOT_AN_OBJECT)
        if len(body) > HUGE_BODY_BYTES or _has_many_commas(body):
            return _decode_loosely(body, _loose_bulk)
    try:
        typed = _typed_bulk.decode(body)
    except msgspec.ValidationError:
        return _decode_loosely(body, _listed_bulk)
    _check_count(len(typed.messages))
    return DecodedBody(typed.messages, typed.list_number, dry_run=typed.dry_run is True)  # type: ignore[arg-type]  # list is invariant; read only


def _decode_message(body: bytes | bytearray) -> DecodedBody:
    if len(body) <= HUGE_BODY_BYTES:
        try:
            typed = _typed_single.decode(body)
            return DecodedBody([typed], dry_run=typed.dry_run is True)
        except msgspec.ValidationError:
            pass
    single: _LooseSingle | _RawMessage
    try:
        single = _loose_single.decode(body)
    except msgspec.ValidationError:
        single = _raw_message.decode(body)  # raises ValidationError, a DecodeError, if the body is no object
    return DecodedBody([_message_of(single)], typed=False, dry_run=_is_dry_run(single.dry_run))


def _has_many_commas(body: bytes | bytearray) -> bool:
    """Return True if there are more than MANY_COMMAS. Stops soon after that number: a body may have 2.6 million."""
    commas = 0
    for start in range(0, len(body), PIECE_BYTES):
        commas += body.count(b",", start, start + PIECE_BYTES)
        if commas > MANY_COMMAS:
            return True
    return False


def _has_many_brackets(body: bytes | bytearray) -> bool:
    """Return True if there are more than MANY_BRACKETS of one kind. With few, `find` is faster than `count`."""
    for bracket in (b"[", b"{"):
        brackets, at = 0, -1
        while (at := body.find(bracket, at + 1)) >= 0:
            brackets += 1
            if brackets > MANY_BRACKETS:
                return True
    return False


def _check_utf8(body: bytes | bytearray) -> None:
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


def _reason(body: bytes | bytearray, error: Exception, taken_out: TakenOut | None) -> str:
    """Return what is wrong with a body that cannot be decoded, from the decoder's error. Bytes count from 0.

    With `taken_out`, the decoder had a shortened body: its positions are mapped to those in the body.

    The texts of msgspec's DecodeError are constants, with a position. Those of its ValidationError may quote the body.
    """
    if not body:
        return "it is empty"
    if body.startswith(codecs.BOM_UTF8):
        return "it starts with a byte order mark"
    if isinstance(error, RecursionError):
        return NESTED_TOO_DEEPLY
    if isinstance(error, msgspec.ValidationError):
        return NOT_AN_OBJECT
    found = _malformed(str(error))
    if found:
        at = int(found[2])
        return f"{found[1]} near byte {taken_out.position(at) if taken_out else at}"
    # Of half of a surrogate pair in the last 11 bytes, the decoder says the same as of a body that is cut off.
    return "half of a surrogate pair near its end" if b"\\u" in body[-11:] else "it ends too early"


def _decode_loosely(body: bytes | bytearray, decoder: msgspec.json.Decoder[Any]) -> DecodedBody:
    """Decode a body that is huge, has very many values, or in which some value has the wrong type."""
    try:
        bulk = _decode_arrays(decoder, body)
    except msgspec.ValidationError:
        bulk = _decode_raw(body)
    elements = _elements(bulk.messages)
    _check_count(len(elements))
    messages = [_message_of(element) for element in elements]
    are_typed = all([type(message) is Message for message in messages])
    return DecodedBody(messages, _string_or_none(bulk.list_number), are_typed, _is_dry_run(bulk.dry_run))


def _decode_arrays(decoder: msgspec.json.Decoder[Any], value: bytes | bytearray | Raw) -> Any:
    _Array.built = 0
    return decoder.decode(value)


def _decode_raw(body: bytes | bytearray) -> Any:
    """Decode a body into raw messages. Raises ValidationError, a DecodeError, if it is no object."""
    # After MAX_ARRAYS, the next types would stop at the same array.
    if _Array.built <= MAX_ARRAYS:
        with suppress(msgspec.ValidationError):
            return _decode_arrays(_raw_messages_bulk, body)
    return _raw_bulk.decode(body)


def _elements(messages: object) -> list[Any]:
    """Return the elements of the last `messages`; none if it is no array."""
    if isinstance(messages, Raw) and first_byte(messages) == b"[":
        raw = messages
        try:
            messages = _decode_arrays(_loose_messages, raw)
        except msgspec.ValidationError:
            messages = _decode_arrays(_raw_messages, raw)
    if isinstance(messages, _Array):
        # Raw elements may be large: they are not tried as typed messages.
        return [_raw(element) if isinstance(element, Raw) else element for element in messages.elements()]
    return messages if isinstance(messages, list) else []


def _raw(element: Raw) -> _RawMessage | None:
    return _raw_message.decode(element) if first_byte(element) == b"{" else None


def _message_of(element: object) -> Message | MistypedMessage:
    if isinstance(element, Raw):
        try:
            return _message.decode(element)
        except msgspec.ValidationError:
            element = _raw(element)
    if isinstance(element, _LooseMessage):
        texts = [
            text if text is None or isinstance(text, str) else WRONG_TYPE
            for text in (element.to, element.list_number, element.body)
        ]
        wrap_links = element.wrap_links
        fields = [*texts, wrap_links if wrap_links is None or isinstance(wrap_links, bool) else WRONG_TYPE]
    elif isinstance(element, _RawMessage):
        texts = [_string_or_none(text) for text in (element.to, element.list_number, element.body)]
        fields = [*texts, _literal(element.wrap_links)]
    else:
        return NOT_A_MESSAGE
    kind: Any = MistypedMessage if WRONG_TYPE in fields else Message
    message: Message | MistypedMessage = kind(*fields, element.contact_data, element.metadata)
    return message


def _literal(value: Raw | UnsetType) -> object:
    """Return True, False or None; None also for a field that was left out, and WRONG_TYPE for any other value."""
    # One byte more than the longest literal has. No copy of the rest: the value may have megabytes.
    return None if value is UNSET else _LITERALS.get(bytes(memoryview(value)[:6]), WRONG_TYPE)


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


def encode_with_ids(answer: Answer, ids: Sequence[str]) -> bytes:
    """Return the encoded answer with the id of each queued message. `ids` has one for each message of the request."""
    refused = {row.index for row in answer.errors}
    messages = [QueuedMessage(index, one) for index, one in enumerate(ids) if index not in refused]
    return encode(AnswerWithIds(answer.queued_count, answer.error_count, answer.errors, messages))


def decode_answer(encoded: bytes) -> Answer:
    """Return a stored answer to a batch."""
    return _answer.decode(encoded)
