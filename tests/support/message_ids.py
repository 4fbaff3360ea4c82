"""Decoding a message id to its place in the table of ids."""

from gateway.ingest import message_ids
from gateway.ingest.message_ids import ALPHABET, BASE, ROWS

DIGIT = {character: digit for digit, character in enumerate(ALPHABET.decode())}
COLUMN_OF_ENDING = {
    chr(first) + chr(second): column for column, (first, second) in enumerate(zip(*message_ids._ENDINGS, strict=True))
}


def place_of(message_id: str) -> tuple[int, int]:
    """Return the row and column of an id, by the inverse that the module's docstring states."""
    column = COLUMN_OF_ENDING[message_id[6:]]
    shifts = [shift[column] for shift in message_ids._SHIFTS]
    digits = [(DIGIT[character] - shift) % BASE for character, shift in zip(message_id, shifts, strict=False)]
    scattered = sum(digit * BASE**k for k, digit in enumerate(digits))
    return scattered * pow(message_ids._ROW_MULTIPLIER, -1, ROWS) % ROWS, column
