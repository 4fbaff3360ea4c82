"""Message ids: 8 characters of [0-9A-Za-z], unique for ever, from numbers leased in blocks. No IO, no randomness.

The ids form a table of 62⁶ rows and 62² columns. A database sequence leases LEASE_ROWS rows at a time. So no two
processes hold the same row, and no request waits for the database. A process hands out its ids row by row. An id's
position is row × COLUMNS + column.

A row's number is multiplied by a constant modulo 62⁶. The constant shares no factor with 62, so this is a bijection.
The product has six digits in base 62. A column's number, through a fixed shuffle, gives the last two characters.
Through fixed tables it also gives six shifts, which are added to the six digits modulo 62. This is one round of a
Feistel network: the last two characters give the column, so the shifts can be subtracted, and the row can be read.
Hence no two positions share an id, and neighbouring ids look unrelated. A whole row takes six `bytes.translate`, which
cost a fraction of arithmetic per id (scripts/bench stages, row "ids").

**Changing any constant here breaks the promise of uniqueness** for databases that have leased ids already.
"""

import hashlib
from typing import NamedTuple

ALPHABET = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
BASE = len(ALPHABET)
COLUMNS = BASE**2  # ids per row
ROWS = BASE**6
LEASE_ROWS = 256  # about a million ids: one lease per second at full speed, of 221 million leases
LEASES = ROWS // LEASE_ROWS
_ROW_MULTIPLIER = 35_105_676_821  # near ROWS / golden ratio, odd and no multiple of 31


def _tables() -> tuple[list[bytes], list[bytes]]:
    """Return, for each column, its six shifts, and the two characters of its shuffled number."""
    noise = hashlib.shake_256(b"sms gateway message ids, version 1").digest(10 * COLUMNS)
    shifts = [bytes(byte % BASE for byte in noise[k * COLUMNS : (k + 1) * COLUMNS]) for k in range(6)]
    keys = noise[6 * COLUMNS :]
    shuffled = sorted(range(COLUMNS), key=lambda column: (keys[4 * column : 4 * column + 4], column))
    endings = [bytes(ALPHABET[n // BASE] for n in shuffled), bytes(ALPHABET[n % BASE] for n in shuffled)]
    return shifts, endings


_SHIFTS, _ENDINGS = _tables()
# By digit: the bytes.translate table that replaces a shift by the character of digit + shift.
_ADD = [bytes(ALPHABET[(digit + shift) % BASE] for shift in range(BASE)).ljust(256) for digit in range(BASE)]


def row_ids(row: int) -> list[str]:
    """Return all COLUMNS ids of one row, in the order of their positions."""
    scattered = row * _ROW_MULTIPLIER % ROWS
    ids = bytearray(b" ") * (9 * COLUMNS)  # ids and spaces: split() is four times faster than slicing
    for k in range(6):
        scattered, digit = divmod(scattered, BASE)
        ids[k::9] = _SHIFTS[k].translate(_ADD[digit])
    ids[6::9], ids[7::9] = _ENDINGS
    return ids.decode("ascii").split()


class IdBlock(NamedTuple):
    """Ids of neighbouring positions."""

    first_position: int
    ids: list[str]


def ids_at(first: int, count: int) -> list[str]:
    """Return the ids of `count` positions, beginning at `first`."""
    row, column = divmod(first, COLUMNS)
    ids = row_ids(row)[column : column + count]
    while len(ids) < count:
        row += 1
        ids += row_ids(row)[: count - len(ids)]
    return ids


class LeasedIds:
    """The ids of one lease, handed out in order."""

    def __init__(self, lease: int) -> None:
        """`lease` is a number from the database sequence, 0 ≤ lease < LEASES."""
        if not 0 <= lease < LEASES:
            raise ValueError(f"lease {lease} is outside the id space of {LEASES} leases")
        self._next_row = lease * LEASE_ROWS
        self._end_row = self._next_row + LEASE_ROWS
        self._row: list[str] = []
        self._column = 0

    def __len__(self) -> int:
        return (self._end_row - self._next_row) * COLUMNS + len(self._row) - self._column

    def take(self, count: int) -> IdBlock:
        """Return the next `count` ids. Raises IndexError, and takes none, when fewer are left."""
        if count > len(self):
            raise IndexError(f"{count} ids requested, {len(self)} left in this lease")
        first = self._next_row * COLUMNS - (len(self._row) - self._column)
        taken = self._row[self._column : self._column + count]
        self._column += len(taken)
        while len(taken) < count:
            self._row = row_ids(self._next_row)
            self._next_row += 1
            self._column = count - len(taken)
            taken += self._row[: self._column]
        return IdBlock(first, taken)
