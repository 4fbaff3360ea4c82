"""Request heads that have arrived in part: where they end, and the memory of all of them together. No IO."""

import re

MAX_HEAD_BYTES = 32 * 1024  # of a head that arrives in pieces; nginx: 4 buffers of 8 kB
# Memory of all incomplete heads together. Each byte is kept about three times, and each header as a few objects.
MAX_COST_OF_HEADS = 64 * 1024 * 1024
COST_OF_BYTE, COST_OF_LINE = 3, 350
BLANK_LINE = b"\r\n\r\n"
_skip_line_ends = re.compile(rb"[\r\n]*+").match  # the parser skips them before a request


class Heads:
    """The memory of all incomplete heads of a listener together."""

    __slots__ = ("cost",)

    def __init__(self) -> None:
        self.cost = 0  # in bytes

    @property
    def are_too_expensive(self) -> bool:
        """True above MAX_COST_OF_HEADS."""
        return self.cost > MAX_COST_OF_HEADS


class IncompleteHead:
    """The part that has arrived of the next request head of one connection, counted but not kept; often empty."""

    __slots__ = ("_all", "_last_bytes", "_lines", "cost", "size")

    def __init__(self, all_heads: Heads) -> None:
        self._all = all_heads
        self.size = 0  # in bytes
        self.cost = 0  # in bytes of memory
        self._lines = 0
        self._last_bytes = b""  # the last three: the blank line may arrive in two pieces

    def add(self, data: bytes, most_lines: int) -> None:
        """Count more of the head. `most_lines` lines cost memory: with more headers, aiohttp refuses the head."""
        self.size += len(data)
        self._lines += data.count(b"\n")
        if self._last_bytes or data.strip(b"\r\n"):  # the parser skips line ends before a request
            self._last_bytes = (self._last_bytes + data[-3:])[-3:]
        self._set_cost(COST_OF_BYTE * self.size + COST_OF_LINE * min(self._lines, most_lines))

    def clear(self) -> None:
        """Forget the head: it is complete, or it is refused."""
        self.size = self._lines = 0
        self._last_bytes = b""
        self._set_cost(0)

    def end_in(self, data: bytes, at: int) -> int:
        """Return the index after the blank line that ends the head; the length of the data if it goes on.

        The head begins in the data at index `at`, or continues there.
        """
        before = self._last_bytes
        if not before and (line_ends := _skip_line_ends(data, at)):
            at = line_ends.end()
        end = (before + data[at : at + 3]).find(BLANK_LINE) + 4
        if end >= 4:
            return at + end - len(before)
        end = data.find(BLANK_LINE, at) + 4
        return end if end >= 4 else len(data)

    def _set_cost(self, cost: int) -> None:
        self._all.cost += cost - self.cost
        self.cost = cost
