"""Decoding of JSON values where they stand in a larger body. No IO.

msgspec decodes whole documents only. Of a value with more bytes behind it, it decodes the value, then raises an error
whose text has the position of the next byte. So one pass gives the value and its end.
"""

import re
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

import msgspec
from msgspec import Raw

T = TypeVar("T")
Body: TypeAlias = bytes | bytearray

_malformed = re.compile(r"JSON is malformed: (.+) \(byte (\d+)\)").fullmatch
_spaces = re.compile(rb"[ \t\r\n]*+").match
_decode_raw = msgspec.json.Decoder(Raw).decode


class Malformed(Exception):
    """A malformed body: what is wrong, and at which byte, counted from 0; None if the body ends too early."""

    def __init__(self, what: str, position: int | None) -> None:
        self.what = what
        self.position = position

    @classmethod
    def of(cls, error: msgspec.DecodeError, start: int = 0) -> "Malformed":
        """Convert an error of the decoder. `start` is added to its position.

        Not for a ValidationError: its text may quote the body. The texts of other errors are constants with a position.
        """
        found = _malformed(str(error))
        return cls(found[1], start + int(found[2])) if found else cls("it ends too early", None)


class InPlace(Generic[T]):
    """A decoder of objects of one Struct where they stand in a body. For one thread."""

    def __init__(self, kind: type[T]) -> None:
        self._found: list[T] = []
        # msgspec calls __post_init__ with each object that it has decoded.
        keep = {"__post_init__": self._found.append}
        struct = msgspec.defstruct(kind.__name__, [], bases=(kind,), namespace=keep)
        self._decode = msgspec.json.Decoder(struct).decode

    def decode(self, body: Body, start: int, stop: int | None = None) -> tuple[T, int]:
        """Return the object at `start`, and the position of the next byte after it that is no white space.

        Raises Malformed, also if the object does not end before `stop`, RecursionError, or ValidationError if a value
        has another type.
        """
        try:
            end = _end(self._decode, body, start, stop)
            return self._found[0], end
        finally:
            self._found.clear()


def skip(body: Body, start: int) -> int:
    """Return the position of the next byte after the value at `start` that is no white space.

    Raises Malformed or RecursionError.
    """
    return _end(_decode_raw, body, start)


def after_spaces(body: Body, start: int) -> int:
    """Return the position of the first byte, from `start` on, that is no white space; the body's length if none is."""
    found = _spaces(body, start)
    assert found is not None  # noqa: S101 - it matches everywhere
    return found.end()


def decode_array(
    body: Body, start: int, decode: Callable[[Body, int], tuple[T, int]], most: int
) -> tuple[list[T], int]:
    """Return up to `most` elements of the array at `start`, and the position of the next byte after the array.

    `decode` has the body and the position of an element. It returns the element, and the position of the next byte.
    Elements after `most` are skipped. White space does not count as a next byte. Raises Malformed, RecursionError, and
    what `decode` raises.
    """
    elements: list[T] = []
    at = after_spaces(body, start + 1)
    if body[at : at + 1] == b"]":
        return elements, after_spaces(body, at + 1)
    while True:
        element, at = decode(body, at)
        elements.append(element)
        if body[at : at + 1] == b"]":
            return elements, after_spaces(body, at + 1)
        following = after_spaces(body, at + 1)
        if body[at : at + 1] != b"," or body[following : following + 1] == b"]" or len(elements) == most:
            # The array is malformed, or its other elements are skipped. The decoder skips them, or says what is wrong.
            rest, shift = rest_of(body, at, b"[null")
            return elements, shift + _end(_decode_raw, rest, 0, shift=shift)
        at = following


def rest_of(body: Body, at: int, opening: bytes) -> tuple[bytes, int]:
    """Return `opening` with the body from `at` on, and what to add to a position in it to get that in the body.

    `opening` must not end with a number: the body may go on with a fraction.
    """
    return b"".join([opening, memoryview(body)[at:]]), at - len(opening)


def check(body: Body) -> None:
    """Check that a body is one JSON value. Raises Malformed or RecursionError."""
    try:
        _decode_raw(body)
    except msgspec.DecodeError as error:
        raise Malformed.of(error) from None


def _end(
    decode: Callable[[memoryview], object], body: Body, start: int, stop: int | None = None, shift: int = 0
) -> int:
    """Decode the value at `start`, and return the position of the next byte after it that is no white space.

    `shift` is added to the position of an error.
    """
    part = memoryview(body)[start:stop]
    try:
        decode(part)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError as error:
        found = _malformed(str(error))
        if not found or found[1] != "trailing characters":
            raise Malformed.of(error, start + shift) from None
        return start + int(found[2]) - 1  # the decoder has read the next byte
    return after_spaces(body, start + len(part))
