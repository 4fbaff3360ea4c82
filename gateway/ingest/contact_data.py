"""`contact_data`: the check of its known fields, and its removal from large bodies while they are decoded. No IO.

It is passed on byte for byte. So the decoder of a request keeps its bytes, and its known fields take a second parse.
For 5 MB, that takes too long. So in a large body a parse gives both, where the value stands; then a short value takes
its place, which passes or fails the same check. Once the messages are validated, the valid ones get theirs back.
"""

import re
from typing import ClassVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

# To find a name takes time, and to take its value out takes longer. After MANY_NAMES, only values that may be large are
# taken out: those whose name is WORTH_BYTES before the next one, or before the end. After MAX_NAMES, none.
MANY_NAMES, MAX_NAMES, WORTH_BYTES = 1_000, 10_000, 4096
SMALL_BYTES = 4096  # up to this size, a value may be parsed twice, and its texts are decoded


class ContactData(msgspec.Struct, gc=False):
    """The fields of `contact_data` whose types the contract defines, each the last of its name, not decoded."""

    first_name: Raw = Raw(b"null")
    last_name: Raw = Raw(b"null")
    timezone: Raw = Raw(b"null")
    custom_fields: Raw = Raw(b"null")

    def is_valid(self) -> bool:
        """Return True if the fields have the contract's types."""
        texts = self.first_name, self.last_name, self.timezone
        return all([first_byte(text) in b'"n' for text in texts]) and first_byte(self.custom_fields) in b"{n"


class _NoFields(msgspec.Struct, gc=False):
    """An object of which nothing is built."""


class _TypedContactData(msgspec.Struct, gc=False):
    """The same fields, decoded: a sixth of the time (scripts/bench stages, row "validate, with objects")."""

    first_name: str | None = None
    last_name: str | None = None
    timezone: str | None = None
    custom_fields: _NoFields | None = None


class _ParsedInPlace(ContactData, gc=False):
    """An object that other bytes follow. The decoder raises an error then, but has called `__post_init__` before."""

    last: ClassVar["_ParsedInPlace"]

    def __post_init__(self) -> None:
        _ParsedInPlace.last = self


_NAME = b'"contact_data"'
_to_object = re.compile(rb"[ \t\r\n]{0,9}+:[ \t\r\n]{0,9}+(?=\{)").match
_BRACE = ord("{")
_decode = msgspec.json.Decoder(ContactData).decode
_decode_typed = msgspec.json.Decoder(_TypedContactData).decode
_decode_in_place = msgspec.json.Decoder(_ParsedInPlace).decode
_trailing = re.compile(r"JSON is malformed: trailing characters \(byte (\d+)\)").fullmatch
# No body has the byte FF: it is no UTF-8. An object stands for a valid value, a string for any other.
_VALID, _INVALID = b'{"\xff%d":0}', b'"\xff%d"'
_stand_ins = re.compile(rb'\{"\xff(\d+)":0\}|"\xff(\d+)"')


def first_byte(value: Raw) -> bytes:
    """Return the first byte of a raw value. It says of which type the value is."""
    return memoryview(value)[:1].tobytes()  # no copy: the value may have megabytes


def is_null(value: Raw) -> bool:
    """Return True if a raw value is null."""
    return first_byte(value) == b"n"


def is_object(value: Raw) -> bool:
    """Return True if a raw value is a JSON object."""
    return memoryview(value)[0] == _BRACE


def is_contact_data(value: Raw) -> bool:
    """Return True if a raw value is an object whose known fields, each time the last of its name, have their types."""
    if len(value) <= SMALL_BYTES:
        try:
            _decode_typed(value)
            return True
        except (msgspec.DecodeError, RecursionError):
            pass  # the last value of each name may have its type nevertheless
    try:
        return _decode(value).is_valid()
    except (msgspec.ValidationError, RecursionError):
        return False


class TakenOut:
    """The values that were taken out of one body."""

    def __init__(self) -> None:
        self._values: list[Raw] = []
        self._cuts: list[tuple[int, int]] = []  # the end of each stand-in, and the bytes that are missing up to there

    def take(self, value: memoryview, start: int, *, valid: bool) -> bytes:
        """Keep a value. Return what stands for it, from `start` on in the shortened body."""
        stand_in = (_VALID if valid else _INVALID) % len(self._values)
        missing = self._cuts[-1][1] if self._cuts else 0
        self._cuts.append((start + len(stand_in), missing + len(value) - len(stand_in)))
        self._values.append(Raw(value))
        return stand_in

    def put_back(self, value: Raw | UnsetType) -> Raw | UnsetType:
        """Return what a value of the shortened body was in the body."""
        short = b"" if value is UNSET else bytes(memoryview(value))
        if b"\xff" not in short:
            return value
        found = _stand_ins.fullmatch(short)
        return self._value_of(found) if found else Raw(_stand_ins.sub(self._value_of, short))

    def _value_of(self, found: re.Match[bytes]) -> Raw:
        return self._values[int(found[1] or found[2])]

    def position(self, short: int) -> int:
        """Return the position in the body of a byte of the shortened body that is in no stand-in."""
        return short + next((missing for end, missing in reversed(self._cuts) if end <= short), 0)


def take_out(body: bytes | bytearray) -> tuple[bytes | bytearray, TakenOut | None]:
    """Return a body of valid UTF-8 without its large values of `contact_data`, and these values; None without any.

    The shortened body is valid JSON if and only if the body is. For in valid JSON, the quote after `contact_data` ends
    a string: after the end of a string there are no letters, so the quote before it begins a string, or is part of one.
    A string before a colon is a key. Where it is another key, its value is put back, or not needed. A name that is
    written with escapes is not found: its value stays, and is parsed twice.
    """
    taken = TakenOut()
    pieces: list[bytes | memoryview] = []
    whole = memoryview(body)
    copied = length = 0
    at = body.find(_NAME)
    for names in range(MAX_NAMES):
        if at < 0:
            break
        following = body.find(_NAME, at + len(_NAME))
        reach = (following if following >= 0 else len(body)) - at
        is_worth = names < MANY_NAMES or reach >= WORTH_BYTES
        if is_worth and (found := _to_object(body, at + len(_NAME))):
            start = found.end()
            end = _end_of_object(body, start)
            if end is None:  # malformed: the decoder of the request says where
                break
            length += start - copied
            stand_in = taken.take(whole[start:end], length, valid=_ParsedInPlace.last.is_valid())
            pieces += [whole[copied:start], stand_in]
            length += len(stand_in)
            copied = end
            following = body.find(_NAME, end)
        at = following
    if not pieces:
        return body, None
    return b"".join([*pieces, whole[copied:]]), taken


def _end_of_object(body: bytes | bytearray, start: int) -> int | None:
    """Return the end of the object at `start`, after it was parsed as _ParsedInPlace.last; None if it is malformed."""
    try:
        _decode_in_place(memoryview(body)[start:])
    except msgspec.DecodeError as error:
        found = _trailing(str(error))  # its position is behind the first byte that follows, space apart
        return body.rindex(b"}", start, start + int(found[1]) - 1) + 1 if found else None
    except RecursionError:
        return None
    return None  # nothing follows it, so the body is malformed
