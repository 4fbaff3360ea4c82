"""`contact_data`: the check of its known fields, and its replacement in large bodies while they are decoded. No IO.

Consumers get the caller's bytes. The decoder of the request keeps them as Raw, so a check of the known fields parses
them again. In a large body that is too slow. There, `take_out` parses each value once, for its end and its validity,
and puts a stand-in in its place: a short value that passes or fails the same check. `TakenOut.put_back` restores the
bytes after validation.
"""

import re
from itertools import pairwise
from typing import ClassVar, TypedDict

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import InvalidJson

# Up to this size, the typed decoder is tried first. So a value may be parsed twice, and its texts are decoded.
SMALL_BYTES = 4096
# Bounds on the work of `take_out`. Values stay that stand before the last MAX_NAMES. After MANY_VALUES, one also stays
# if the next name, or the end of the body, is less than WORTH_BYTES away: to take it out takes longer than to parse it.
MAX_NAMES, MANY_VALUES, WORTH_BYTES = 10_000, 1_000, 1024
TINY_BYTES = 32  # a value of up to this size stays: to put it back may copy megabytes around it
NESTED_TOO_DEEPLY = "it is nested too deeply"  # of a body: the reason of an InvalidJson


class ContactData(msgspec.Struct, gc=False):
    """The fields of `contact_data` whose types the contract defines, each the last of its name, not decoded."""

    first_name: Raw = Raw(b"null")
    last_name: Raw = Raw(b"null")
    timezone: Raw = Raw(b"null")
    custom_fields: Raw = Raw(b"null")

    def is_valid(self) -> bool:
        """Return True if the fields have the contract's types: a string or null, an object or null."""
        texts = self.first_name, self.last_name, self.timezone
        return all([first_byte(text) in b'"n' for text in texts]) and first_byte(self.custom_fields) in b"{n"


class SkippedObject(TypedDict):
    """An object of which nothing is built. No Struct: msgspec allows only one in a union."""


class _TypedContactData(msgspec.Struct, gc=False):
    """The same fields, decoded: a tenth of the time of ContactData (scripts/bench stages, "contact_data")."""

    first_name: str | None = None
    last_name: str | None = None
    timezone: str | None = None
    custom_fields: SkippedObject | None = None


class _InPlace(ContactData, gc=False):
    """ContactData with other bytes after it. msgspec calls `__post_init__`, and then raises for the other bytes."""

    was_valid: ClassVar[bool]

    def __post_init__(self) -> None:
        _InPlace.was_valid = self.is_valid()


_NAME = b'"contact_data"'
_to_object = re.compile(rb"[ \t\r\n]{0,999}+:[ \t\r\n]{0,999}+(?=\{)").match
_decode = msgspec.json.Decoder(ContactData).decode
_decode_typed = msgspec.json.Decoder(_TypedContactData).decode
_decode_in_place = msgspec.json.Decoder(_InPlace).decode
_trailing = re.compile(r"JSON is malformed: trailing characters \(byte (\d+)\)").fullmatch
_skip = msgspec.json.Decoder(Raw).decode
# Stand-ins. No body has the byte FF: it is no UTF-8. An object passes the check, an array does not.
_MARK = b"\xff"
_VALID, _INVALID = b'{"\xff%d":0}', b'["\xff%d"]'
_stand_in = re.compile(rb'[{[]"\xff(\d+)"(?::0\}|\])').match


def first_byte(value: Raw) -> bytes:
    """Return the first byte of a raw value. It says of which type the value is."""
    # No copy: the value may have megabytes.
    return memoryview(value)[:1].tobytes()


def is_null(value: Raw) -> bool:
    """Return True if a raw value is null."""
    return first_byte(value) == b"n"


def is_object(value: Raw) -> bool:
    """Return True if a raw value is a JSON object."""
    return first_byte(value) == b"{"


def is_contact_data(value: Raw) -> bool:
    """Return True if a raw value is an object whose known fields, each time the last of its name, have their types."""
    if len(value) <= SMALL_BYTES:
        try:
            _decode_typed(value)
            return True
        except (msgspec.DecodeError, RecursionError):
            pass  # the last of each name may be right all the same
    try:
        return _decode(value).is_valid()
    except (msgspec.ValidationError, RecursionError):
        return False


class TakenOut:
    """The values that were taken out of one body, in the order of their stand-ins."""

    def __init__(self) -> None:
        self._values: list[Raw] = []
        # Of each stand-in: its end in the shortened body, and how many bytes were removed up to there.
        self._cuts: list[tuple[int, int]] = []

    def take(self, value: memoryview, start: int, *, is_valid: bool) -> bytes:
        """Keep the value that begins at `start` in the body. Return its stand-in. To be called in order."""
        stand_in = (_VALID if is_valid else _INVALID) % len(self._values)
        removed = self._cuts[-1][1] if self._cuts else 0
        self._cuts.append((start - removed + len(stand_in), removed + len(value) - len(stand_in)))
        self._values.append(Raw(value))
        return stand_in

    def put_back(self, value: Raw | UnsetType) -> Raw | UnsetType:
        """Return the original of a value from the shortened body. Raises InvalidJson if it is nested too deeply."""
        short = b"" if value is UNSET else bytes(memoryview(value))
        at = short.find(_MARK)
        if at < 0:
            return value
        pieces: list[bytes | Raw] = []
        copied = 0
        while at >= 0:
            found = _stand_in(short, at - 2)
            assert found is not None  # noqa: S101 - nothing else has this byte
            original = self._values[int(found[1])]
            if len(found[0]) == len(short):
                return original
            pieces += [short[copied : found.start()], original]
            copied = found.end()
            at = short.find(_MARK, copied)
        return _checked(b"".join([*pieces, short[copied:]]))

    def position(self, at: int) -> int:
        """Return the position in the body. `at` is one in the shortened body, outside the stand-ins."""
        return at + next((removed for end, removed in reversed(self._cuts) if end <= at), 0)


def take_out(body: bytes | bytearray) -> tuple[bytes | bytearray, TakenOut | None]:
    """Return the shortened body and the values taken out of it; the body itself and None if there are none.

    Raises RecursionError if such a value is nested too deeply. The body must be valid UTF-8.

    The shortened body is valid JSON if and only if the body is. For in valid JSON the quote after `contact_data` ends a
    string: if it began one, the letters before it would stand outside of strings. A string before a colon is a key. The
    key may be a longer one that ends so; then its value is put back, or nothing reads it. A name that is written with
    escapes is not found. Its value stays, and is parsed twice.
    """
    taken = TakenOut()
    pieces: list[bytes | memoryview] = []
    whole, copied = memoryview(body), 0
    names = _names_in(body)
    for at, following in pairwise([*names, len(body)]):
        is_worth = len(pieces) < 2 * MANY_VALUES or following - at >= WORTH_BYTES
        if at < copied or not is_worth or not (found := _to_object(body, at + len(_NAME))):
            continue
        start = found.end()
        end = _parse_in_place(body, start)
        if end is None:
            break  # the decoder of the request says what is wrong
        if end - start <= TINY_BYTES:
            continue
        pieces += [whole[copied:start], taken.take(whole[start:end], start, is_valid=_InPlace.was_valid)]
        copied = end
    if not pieces:
        return body, None
    return b"".join([*pieces, whole[copied:]]), taken


def _names_in(body: bytes | bytearray) -> list[int]:
    """Return where the name stands, in order; the last MAX_NAMES of them.

    `find` takes up to 14 ms for 5 MB, with many letters of the name in it; `rfind` 3 ms (scripts/bench bodies).
    """
    names: list[int] = []
    at = len(body)
    while len(names) < MAX_NAMES and (at := body.rfind(_NAME, 0, at)) >= 0:
        names.append(at)
    names.reverse()
    return names


def _parse_in_place(body: bytes | bytearray, start: int) -> int | None:
    """Parse the object at `start` as _InPlace, and return its end; None if it is malformed.

    Raises RecursionError if it is nested too deeply.
    """
    try:
        _decode_in_place(memoryview(body)[start:])
    except msgspec.DecodeError as error:
        found = _trailing(str(error))
        # The position is one past the first byte after the object that is no white space.
        return body.rindex(b"}", start, start + int(found[1]) - 1) + 1 if found else None
    return None  # nothing follows: the body is cut off


def _checked(value: bytes) -> Raw:
    """Return an original that was put together. Raises InvalidJson if it is nested too deeply as a whole."""
    try:
        return _skip(value)
    except RecursionError:
        raise InvalidJson(NESTED_TOO_DEEPLY) from None
