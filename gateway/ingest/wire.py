"""The types of requests, answers and payloads, with their JSON codecs. No IO, no clock.

A well-formed request is decoded in one pass into typed messages. If a value has the wrong type, the request is decoded
message by message: the error then concerns one message only. `contact_data` and `metadata` keep the caller's bytes.
Bodies with very many values, and huge ones with a wrong type, are decoded by types that take any value.
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
# A body above both limits may have too many values to build. It is decoded by slower types, with the same result. A
# batch of 1,000 messages reaches the limit with 20 commas in each.
LARGE_BODY_BYTES, MANY_COMMAS = 64 * 1024, 20_000
# A body above both limits, of one kind of bracket, is slow to parse. So `contact_data` is taken out of it. If it still
# has so many, typed messages are not tried: one late value of the wrong type would waste that pass.
HUGE_BODY_BYTES, MANY_BRACKETS = 1024 * 1024, 10_000
MAX_ARRAYS = 3  # values of `messages` that are built: only the last counts, and each costs as much as 1,000 elements
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
_TO_ZEROS_AND_SPACES = bytes(ord("0") if chr(byte) in "0123456789" else ord(" ") for byte in range(256))
_LONG_NUMBER = b"0" * 100
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


@dataclass(slots=True)
class _LooseMessage:
    # No Struct: msgspec does not take a Struct and a _SkippedArray as types of one value.
    to: Raw | UnsetType = UNSET
    list_number: Raw | UnsetType = UNSET
    body: Raw | UnsetType = UNSET
    wrap_links: Raw | UnsetType = UNSET
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


@dataclass(slots=True)
class _LooseSingle(_LooseMessage):
    dry_run: Raw | UnsetType = UNSET


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


_AnyDecoder: TypeAlias = msgspec.json.Decoder[Any]
_encoder = msgspec.json.Encoder()
_typed_bulk = msgspec.json.Decoder(_TypedBulk)
_listed_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_bulk_of(list[Raw] | str))
# What is no message. No float: to convert 1e300 takes up to 9 µs. Decoding fails at a fraction or an exponent.
_Other: TypeAlias = str | int | bool | None
_LooseMessages: Any = _Array.of(_LooseMessage | _SkippedArray | _Other)
_RawMessages: Any = _Array.of(Raw)
# Tried in order; from the second on where a long number would take long to convert.
_loose_bulks: list[_AnyDecoder] = [
    msgspec.json.Decoder(_bulk_of(messages | SkippedObject | _Other)) for messages in (_LooseMessages, _RawMessages)
]
_loose_arrays: list[_AnyDecoder] = [msgspec.json.Decoder(messages) for messages in (_LooseMessages, _RawMessages)]
_raw_bulk: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_bulk_of(Raw))
_message = msgspec.json.Decoder(Message)
_typed_single = msgspec.json.Decoder(_TypedSingle)
_loose_message = msgspec.json.Decoder(_LooseMessage)
_loose_single = msgspec.json.Decoder(_LooseSingle)
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
        # Brackets are counted again: those that were taken out do not matter any more.
        if _has_more(MANY_COMMAS, b",", body) or (len(body) > HUGE_BODY_BYTES and _has_many_brackets(body)):
            return _decode_loosely(body, _fast_enough(_loose_bulks, body))
    try:
        typed = _typed_bulk.decode(body)
    except msgspec.ValidationError:
        is_huge = len(body) > HUGE_BODY_BYTES
        return _decode_loosely(body, _fast_enough(_loose_bulks, body) if is_huge else [_listed_bulk])
    _check_count(len(typed.messages))
    return DecodedBody(typed.messages, typed.list_number, dry_run=typed.dry_run is True)  # type: ignore[arg-type]  # list is invariant; read only


def _decode_message(body: bytes | bytearray) -> DecodedBody:
    if len(body) <= HUGE_BODY_BYTES:
        try:
            typed = _typed_single.decode(body)
            return DecodedBody([typed], dry_run=typed.dry_run is True)
        except msgspec.ValidationError:
            pass
    single = _loose_single.decode(body)  # raises ValidationError, a DecodeError, if the body is no object
    return DecodedBody([_message_of(single)], typed=False, dry_run=_is_dry_run(single.dry_run))


def _has_many_brackets(body: bytes | bytearray) -> bool:
    return any(_has_more(MANY_BRACKETS, bracket, body) for bracket in (b"[", b"{"))


def _has_more(most: int, mark: bytes, body: bytes | bytearray) -> bool:
    """Return True if a byte occurs more than `most` times. In a huge body with few, `find` is faster than `count`."""
    if len(body) <= HUGE_BODY_BYTES:
        return body.count(mark) > most
    found, at = 0, -1
    while (at := body.find(mark, at + 1)) >= 0:
        found += 1
        if found > most:
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


def _decode_loosely(body: bytes | bytearray, decoders: Sequence[_AnyDecoder]) -> DecodedBody:
    """Decode a body in which some value has the wrong type, or that has very many values."""
    bulk = _first_bulk(body, decoders)
    elements = _elements(bulk.messages)
    _check_count(len(elements))
    messages = [_message_of(element) for element in elements]
    are_typed = all([type(message) is Message for message in messages])
    return DecodedBody(messages, _string_or_none(bulk.list_number), are_typed, _is_dry_run(bulk.dry_run))


def _first_bulk(body: bytes | bytearray, decoders: Sequence[_AnyDecoder]) -> Any:
    """Decode a body by the first of these that does not fail.

    Raises ValidationError, a DecodeError, if the body is no object.
    """
    for decoder in decoders:
        _Array.built = 0
        try:
            return decoder.decode(body)
        except msgspec.ValidationError:
            if _Array.built > MAX_ARRAYS:
                break  # the next one would fail at the same array
    return _raw_bulk.decode(body)


def _fast_enough(decoders: list[_AnyDecoder], value: bytes | bytearray | Raw) -> list[_AnyDecoder]:
    """Return the decoders that take no long time for a number of many digits."""
    whole = bytes(value)
    # A number of 100 digits has two of every 50th byte.
    if b"00" in whole[::50].translate(_TO_ZEROS_AND_SPACES):
        for start in range(0, len(whole), PIECE_BYTES):
            piece = whole[start : start + PIECE_BYTES + len(_LONG_NUMBER)]
            if _LONG_NUMBER in piece.translate(_TO_ZEROS_AND_SPACES):
                return decoders[1:]
    return decoders


def _elements(messages: object) -> list[Any]:
    """Return the elements of the last `messages`; none if it is no array."""
    if isinstance(messages, Raw):
        messages = _array_of(messages)
    if isinstance(messages, _Array):
        # Raw elements may be large: they are not tried as typed messages.
        return [_loose(element) if isinstance(element, Raw) else element for element in messages.elements()]
    return messages if isinstance(messages, list) else []


def _array_of(messages: Raw) -> _Array | None:
    for decoder in _fast_enough(_loose_arrays, messages):
        _Array.built = 0
        with suppress(msgspec.ValidationError):
            return cast("_Array", decoder.decode(messages))
    return None


def _loose(element: Raw) -> _LooseMessage | None:
    return _loose_message.decode(element) if first_byte(element) == b"{" else None


def _message_of(element: object) -> Message | MistypedMessage:
    if isinstance(element, Raw):
        try:
            return _message.decode(element)
        except msgspec.ValidationError:
            element = _loose(element)
    if not isinstance(element, _LooseMessage):
        return NOT_A_MESSAGE
    to, list_number, body = map(_string_or_none, (element.to, element.list_number, element.body))
    wrap_links = _literal(element.wrap_links)
    kind: Any = MistypedMessage if WRONG_TYPE in (to, list_number, body, wrap_links) else Message
    message: Message | MistypedMessage = kind(to, list_number, body, wrap_links, element.contact_data, element.metadata)
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
