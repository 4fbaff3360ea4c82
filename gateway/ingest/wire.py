"""The types of requests, answers and payloads, with their JSON codecs. No IO, no clock.

A well-formed request is decoded in one pass into typed messages. If a value has the wrong type, the request is decoded
message by message: the error then concerns one message only. `contact_data` and `metadata` keep the caller's bytes.
"""

from contextlib import suppress
from typing import Final

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import InvalidJson, MissingMessages, TooManyMessages

MAX_MESSAGES = 1_000  # contract: per request
MAX_BODY_BYTES = 5_242_880  # contract: 5 MB
MAX_ECHO = 64  # contract: characters of `to` in an error row
# The elements of a body above both bounds are counted before it is decoded. Few valid bodies have so many commas.
LARGE_BODY_BYTES, MANY_COMMAS = 64 * 1024, 20_000


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


class Bulk(msgspec.Struct):
    """A decoded request: 1 to 1,000 messages, and the list number for those that carry none."""

    messages: list[Message | MistypedMessage]
    list_number: object = None
    typed: bool = True  # False: there may be MistypedMessages


class ErrorRow(msgspec.Struct, omit_defaults=True, gc=False):
    """One message that was not queued. `to` is the caller's value if that is a string, otherwise null."""

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


class ContactData(msgspec.Struct):
    """The fields of `contact_data` whose types the contract defines. Other fields are not checked."""

    first_name: str | None = None
    last_name: str | None = None
    timezone: str | None = None
    custom_fields: dict[str, Raw] | None = None


class _TypedBulk(msgspec.Struct):
    messages: list[Message]
    list_number: str | None = None


class _Element:
    """A stand-in for any element of `messages` during counting."""


_ELEMENT = _Element()


class _CountedBulk(msgspec.Struct):
    messages: list[_Element] = []


class _LooseBulk(msgspec.Struct):
    messages: Raw = Raw(b"null")
    list_number: Raw = Raw(b"null")


class _LooseMessage(msgspec.Struct):
    to: Raw = Raw(b"null")
    list_number: Raw = Raw(b"null")
    body: Raw = Raw(b"null")
    wrap_links: Raw = Raw(b"null")
    contact_data: Raw | UnsetType = UNSET
    metadata: Raw | UnsetType = UNSET


class _LooseContactData(msgspec.Struct):
    first_name: Raw = Raw(b"null")
    last_name: Raw = Raw(b"null")
    timezone: Raw = Raw(b"null")
    custom_fields: Raw = Raw(b"null")


_encoder = msgspec.json.Encoder()
_typed_bulk = msgspec.json.Decoder(_TypedBulk)
_loose_bulk = msgspec.json.Decoder(_LooseBulk)
_raw_list = msgspec.json.Decoder(list[Raw])
_message = msgspec.json.Decoder(Message)
_loose_message = msgspec.json.Decoder(_LooseMessage)
_string = msgspec.json.Decoder(str)
_contact_data = msgspec.json.Decoder(ContactData)
_loose_contact_data = msgspec.json.Decoder(_LooseContactData)

encode = _encoder.encode


def decode_bulk(body: bytes | bytearray) -> Bulk:
    """Decode a request body. Raises InvalidJson, MissingMessages or TooManyMessages."""
    try:
        if not body.isascii():
            # msgspec does not check the bytes of raw and unknown fields.
            body.decode("utf-8")
        if len(body) > LARGE_BODY_BYTES and body.count(b",") > MANY_COMMAS:
            _count_before_building(body)
        try:
            typed = _typed_bulk.decode(body)
        except msgspec.ValidationError:
            return _decode_loosely(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson from error
    _check_count(len(typed.messages))
    return Bulk(typed.messages, typed.list_number)  # type: ignore[arg-type]  # list is invariant; read only


def _count_before_building(body: bytes | bytearray) -> None:
    """Raise TooManyMessages at the 1,001st element, before a list of perhaps a million objects is built."""
    seen = 0

    def count(_kind: type, _element: object) -> _Element:
        nonlocal seen
        seen += 1
        if seen > MAX_MESSAGES:
            raise TooManyMessages
        return _ELEMENT

    with suppress(msgspec.ValidationError):  # decode_bulk reports these
        msgspec.json.decode(body, type=_CountedBulk, dec_hook=count)


def _decode_loosely(body: bytes | bytearray) -> Bulk:
    """Decode a body in which some value has the wrong type, message by message."""
    bulk = _loose_bulk.decode(body)  # raises ValidationError, a DecodeError, if the body is no object
    if _first_byte(bulk.messages) != b"[":
        raise MissingMessages
    elements = _raw_list.decode(bulk.messages)
    _check_count(len(elements))
    messages = [_decode_message(element) for element in elements]
    return Bulk(messages, _string_or_none(bulk.list_number), typed=False)


def _decode_message(element: Raw) -> Message | MistypedMessage:
    try:
        return _message.decode(element)
    except msgspec.ValidationError:
        pass
    if _first_byte(element) != b"{":
        return MistypedMessage()
    loose = _loose_message.decode(element)
    return MistypedMessage(
        to=_string_or_none(loose.to),
        list_number=_string_or_none(loose.list_number),
        body=_string_or_none(loose.body),
        wrap_links={b"true": True, b"false": False, b"null": None}.get(bytes(loose.wrap_links), WRONG_TYPE),
        contact_data=loose.contact_data,
        metadata=loose.metadata,
    )


def _string_or_none(value: Raw) -> object:
    start = _first_byte(value)
    if start == b'"':
        return _string.decode(value)
    return None if start == b"n" else WRONG_TYPE


def _first_byte(value: Raw) -> bytes:
    return memoryview(value)[:1].tobytes()  # no copy: the value may have megabytes


def _check_count(count: int) -> None:
    if count == 0:
        raise MissingMessages
    if count > MAX_MESSAGES:
        raise TooManyMessages


def is_absent(value: Raw | UnsetType) -> bool:
    """Return True if an optional object was left out, or sent as null."""
    return value is UNSET or bytes(value) == b"null"


def is_object(value: Raw | UnsetType) -> bool:
    """Return True if a raw value is a JSON object."""
    return value is not UNSET and _first_byte(value) == b"{"


def is_contact_data(value: Raw | UnsetType) -> bool:
    """Return True if a raw value is an object whose known fields have the contract's types."""
    if value is UNSET:
        return False
    try:
        _contact_data.decode(value)
    except msgspec.ValidationError:
        return is_object(value) and _is_valid_by_last_values(value)
    except RecursionError:
        return False
    return True


def _is_valid_by_last_values(value: Raw) -> bool:
    """Return True if the last value of each known field has its type: msgspec checks every repetition of a field."""
    last = _loose_contact_data.decode(value)
    texts = last.first_name, last.last_name, last.timezone
    return {_first_byte(text) for text in texts} <= {b'"', b"n"} and _first_byte(last.custom_fields) in (b"{", b"n")
