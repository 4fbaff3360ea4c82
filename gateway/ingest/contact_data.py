"""`contact_data`: the check of its known fields, and its replacement in large bodies while they are decoded. No IO.

Consumers get the caller's bytes. The decoder of the request keeps them as Raw, so a check of the known fields parses
them again. In a large body that is too slow. There, `take_out` parses each value once, for its end and its validity,
and puts a stand-in in its place: a short value that passes or fails the same check. `TakenOut.put_back` restores the
bytes after validation.
"""

import re
from itertools import pairwise
from typing import TypedDict

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gateway.errors import InvalidJson
from gateway.ingest.in_place import Body, InPlace, Malformed, check
from gateway.ingest.second_pass import SecondPass

SMALL_BYTES = 4096  # a larger value is checked by ContactData alone: the typed check would decode its texts
# Limits on the work of `take_out`. Only the last MAX_NAMES names are considered. After MANY_VALUES values, another one
# is taken out only if the next name, or the end of the body, is at least WORTH_BYTES away: a small one is better left.
MAX_NAMES, MANY_VALUES, WORTH_BYTES = 10_000, 1_000, 4096
TINY_BYTES = 32  # a value of up to this size stays: to put it back may copy megabytes around it
NESTED_TOO_DEEPLY = "it is nested too deeply"  # of a body: the reason of an InvalidJson


class ContactData(msgspec.Struct, gc=False):
    """The fields of `contact_data` whose types the contract defines, each the last of its name, not decoded."""

    first_name: Raw | UnsetType = UNSET
    last_name: Raw | UnsetType = UNSET
    timezone: Raw | UnsetType = UNSET
    custom_fields: Raw | UnsetType = UNSET

    def is_valid(self) -> bool:
        """Return True if the fields have the contract's types: a string or null, an object or null."""
        texts = self.first_name, self.last_name, self.timezone
        return all([text is UNSET or first_byte(text) in b'"n' for text in texts]) and (
            self.custom_fields is UNSET or first_byte(self.custom_fields) in b"{n"
        )


class SkippedObject(TypedDict):
    """An object of which nothing is built. No Struct: msgspec allows only one in a union."""


class _TypedContactData(msgspec.Struct, gc=False):
    """The fields of ContactData, decoded."""

    first_name: str | None = None
    last_name: str | None = None
    timezone: str | None = None
    custom_fields: SkippedObject | None = None


_NAME = b'"contact_data"'
_ESCAPE = b"\\u00"
_escaped_name = re.compile(rb'"%b"' % b"".join([rb"(?:%c|\\u00(?i:%x))" % (byte, byte) for byte in _NAME[1:-1]])).match
_LONGEST_NAME = 2 + 12 * len(b"\\u0000")
_to_object = re.compile(rb"[ \t\r\n]*+:[ \t\r\n]*+(?=\{)").match
_decode = msgspec.json.Decoder(ContactData).decode
_decode_raw = msgspec.json.Decoder(Raw).decode
_decode_typed = msgspec.json.Decoder(_TypedContactData).decode
_in_place = InPlace(ContactData)
# Stand-ins: an object passes the check of `contact_data`, an array does not. No body has the byte FF: it is no UTF-8.
_MARK = b"\xff"
_VALID, _INVALID = b'{"\xff%d":0}', b'["\xff%d"]'
_stand_in = re.compile(rb'[{[]"\xff(\d+)"(?::0\}|\])').match


def first_byte(value: Raw) -> bytes:
    """Return the first byte of a raw value, which shows the value's type."""
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
    if not is_object(value):
        return False  # the decoder would parse a text to its end
    try:
        return _decode(value).is_valid()
    except RecursionError:
        return False


def is_contact_data_fast(value: Raw) -> bool:
    """Return True only if is_contact_data does. After False, is_contact_data must decide.

    For a valid value this takes a fraction of the time (scripts/bench stages, "contact_data"). But to learn that a
    number is no string takes up to 30 µs.
    """
    if len(value) > SMALL_BYTES:
        return is_contact_data(value)
    try:
        _decode_typed(value)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class TakenOut:
    """The values that were taken out of one body, in the order of their stand-ins."""

    def __init__(self) -> None:
        self._values: list[Raw] = []
        self._second_pass = SecondPass()
        # Of each stand-in: its end in the shortened body, and how many bytes were removed up to there.
        self._cuts: list[tuple[int, int]] = []

    def take(self, value: memoryview, start: int, *, is_valid: bool) -> bytes:
        """Keep the value that begins at `start` in the body, and return its stand-in. Values are taken in order."""
        stand_in = (_VALID if is_valid else _INVALID) % len(self._values)
        removed = self._cuts[-1][1] if self._cuts else 0
        self._cuts.append((start - removed + len(stand_in), removed + len(value) - len(stand_in)))
        self._values.append(Raw(value))
        return stand_in

    def put_back(self, value: Raw | UnsetType) -> Raw | UnsetType:
        """Return the original of a value from the shortened body.

        Raises InvalidJson if that is nested too deeply as a whole, or has too much to parse it again to find out.
        """
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
        whole = Raw(b"".join([*pieces, short[copied:]]))
        self._second_pass.add(whole)
        try:
            _decode_raw(whole)
        except RecursionError:
            raise InvalidJson(NESTED_TOO_DEEPLY) from None
        return whole

    def position(self, at: int) -> int:
        """Return the position in the body. `at` is one in the shortened body, outside the stand-ins."""
        return at + next((removed for end, removed in reversed(self._cuts) if end <= at), 0)


def take_out(body: Body) -> tuple[Body, TakenOut | None]:
    """Return the shortened body and the values taken out of it; the body itself and None if there are none.

    Raises Malformed, and RecursionError if such a value is nested too deeply. The body must be valid UTF-8.

    The shortened body is valid JSON if and only if the body is. In valid JSON, the quote after `contact_data` ends a
    string: otherwise the letters before the quote would stand outside of strings. As a colon follows, this string is a
    key. It may be a longer key that ends with these letters. Then its value is put back, or nothing reads it.
    """
    taken = TakenOut()
    pieces: list[bytes | memoryview] = []
    whole, copied, parsed = memoryview(body), 0, 0
    for at, following in pairwise([*_ends_of_names(body), len(body)]):
        may_parse = parsed < MANY_VALUES or following - at >= WORTH_BYTES
        if at < copied or not may_parse or not (found := _to_object(body, at)):
            continue
        start = found.end()
        parsed += 1
        try:
            value, after = _in_place.decode(body, start)
        except Malformed:
            _check_start([*pieces, whole[copied:start]], taken)
            raise
        end = body.rindex(b"}", start, after) + 1
        if end - start <= TINY_BYTES:
            continue
        pieces += [whole[copied:start], taken.take(whole[start:end], start, is_valid=value.is_valid())]
        copied = end
    if not pieces:
        return body, None
    return b"".join([*pieces, whole[copied:]]), taken


def _check_start(pieces: list[bytes | memoryview], taken: TakenOut) -> None:
    """Raise Malformed if the start of a body, up to a value, is malformed. `pieces` are those of the shortened body."""
    try:
        check(b"".join(pieces))
    except Malformed as malformed:
        if malformed.position is not None:
            raise Malformed(malformed.what, taken.position(malformed.position)) from None


def _ends_of_names(body: Body) -> list[int]:
    r"""Return the ends of the names in a body, in order.

    These are the last MAX_NAMES plain names, and the names with one of the last MAX_NAMES escapes `\u00`.
    """
    ends = {at + len(_NAME) for at in _last(_NAME, body, MAX_NAMES)}
    for at in _last(_ESCAPE, body, MAX_NAMES):
        start = body.rfind(b'"', max(0, at - _LONGEST_NAME), at)
        if start >= 0 and (found := _escaped_name(body, start)):
            ends.add(found.end())
    return sorted(ends)


def _last(text: bytes, body: Body, most: int) -> list[int]:
    """Return the last `most` positions of a text in a body, the last one first.

    `find` takes up to 14 ms for 5 MB, with many letters of the text in it; `rfind` 3 ms (scripts/bench bodies).
    """
    found: list[int] = []
    at = len(body)
    while len(found) < most and (at := body.rfind(text, 0, at)) >= 0:
        found.append(at)
    return found
