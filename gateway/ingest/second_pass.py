"""A limit on the values that are parsed a second time. No IO.

A second pass over a few values costs nothing that counts. One over 5 MB of deep arrays takes longer than all the work
for a clean body of that size (docs/decisions/0050).
"""

from typing import Final

from msgspec import Raw

from gateway.errors import InvalidJson

# With so many of each, the second pass takes about 1 ms. Brackets and commas in texts count: only a pass would tell.
MOST_BRACKETS, MOST_COMMAS = 200_000, 500_000
PIECE_BYTES = 64 * 1024  # copied at once, to count in it: a copy of 5 MB takes 3 ms
TOO_MANY_VALUES: Final = (  # of a body: the reason of an InvalidJson
    "it has too many values in messages after 1,000 other fields or 2,000 other messages, or in nested contact_data"
)


class SecondPass:
    """The values of one body that are parsed a second time, counted by their brackets and commas."""

    def __init__(self) -> None:
        self._brackets = self._braces = self._commas = 0

    def add(self, part: Raw) -> None:
        """Count one more part. Raises InvalidJson if the parts together have too many values."""
        whole = memoryview(part)
        for start in range(0, len(whole), PIECE_BYTES):
            piece = bytes(whole[start : start + PIECE_BYTES])
            # `in` finds out in a fraction of the time of `count` that there is none (scripts/bench bodies, escapes).
            self._brackets += piece.count(b"[") if b"[" in piece else 0
            self._braces += piece.count(b"{") if b"{" in piece else 0
            self._commas += piece.count(b",") if b"," in piece else 0
            if max(self._brackets, self._braces) > MOST_BRACKETS or self._commas > MOST_COMMAS:
                raise InvalidJson(TOO_MANY_VALUES)
