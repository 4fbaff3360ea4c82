"""Message ids are unique: each can be decoded to the row and column that it came from."""

import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ingest import message_ids
from gateway.ingest.message_ids import ALPHABET, BASE, COLUMNS, LEASE_ROWS, LEASES, ROWS, LeasedIds, row_ids

EXAMPLES = settings(derandomize=True, max_examples=40, deadline=None)
rows = st.integers(0, ROWS - 1)

DIGIT = {character: digit for digit, character in enumerate(ALPHABET.decode())}


def place_of(message_id: str) -> tuple[int, int]:
    """Return the row and column of an id, by the inverse that the module's docstring states."""
    column = COLUMN_OF_ENDING[message_id[6:]]
    shifts = [shift[column] for shift in message_ids._SHIFTS]
    digits = [(DIGIT[character] - shift) % BASE for character, shift in zip(message_id, shifts, strict=False)]
    scattered = sum(digit * BASE**k for k, digit in enumerate(digits))
    return scattered * pow(message_ids._ROW_MULTIPLIER, -1, ROWS) % ROWS, column


COLUMN_OF_ENDING = {
    chr(first) + chr(second): column for column, (first, second) in enumerate(zip(*message_ids._ENDINGS, strict=True))
}


def test_every_id_is_eight_letters_and_digits() -> None:
    is_id = re.compile("[0-9A-Za-z]{8}").fullmatch
    assert all(is_id(message_id) for row in (0, 1, LEASE_ROWS - 1, ROWS - 1) for message_id in row_ids(row))


def test_ids_of_existing_databases_never_change() -> None:
    """If this fails, ids that were given out will be given out again. Repair the code, not the test."""
    assert (ALPHABET, BASE, COLUMNS, ROWS) == (
        b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz",
        62,
        3_844,
        56_800_235_584,
    )
    assert LEASE_ROWS == 256
    assert LeasedIds(0).take(4).ids == GOLDEN_FIRST
    assert [row_ids(row)[column] for row, column in GOLDEN_PLACES] == list(GOLDEN_PLACES.values())
    assert LeasedIds(7).take(1).ids == row_ids(7 * 256)[:1]


GOLDEN_FIRST = ["ZtfyJv2P", "a2XujsNn", "nrk6ajLN", "5hCp9obr"]
GOLDEN_PLACES = {  # (row, column): id
    (0, 3_843): "DXmd4ptY",
    (1, 0): "S6VlcX2P",
    (256, 1): "gNAhU5Nn",
    (123_456_789, 2_024): "NQKcplDt",
    (56_800_235_583, 3_843): "KJvpkCtY",
}


def test_no_id_repeats_over_neighbouring_and_distant_leases() -> None:
    ids: list[str] = []
    for lease in (0, 1, 2, LEASES // 2, LEASES - 1):
        ids += LeasedIds(lease).take(5 * COLUMNS + 1).ids
    assert len(set(ids)) == len(ids)


def test_all_leases_lie_within_the_table() -> None:
    assert LEASES * LEASE_ROWS <= ROWS
    last = LeasedIds(LEASES - 1)
    assert place_of(last.take(len(last)).ids[-1]) == (LEASES * LEASE_ROWS - 1, COLUMNS - 1)


@EXAMPLES
@given(row=rows)
def test_an_id_can_be_decoded_to_its_place_so_no_two_places_share_one(row: int) -> None:
    """The mapping has an inverse, shown over whole rows anywhere in the table."""
    assert [place_of(message_id) for message_id in row_ids(row)] == [(row, column) for column in range(COLUMNS)]


def test_the_multiplier_scatters_rows_without_loss() -> None:
    """The mapping of rows is a bijection if the multiplier has no factor in common with the number of rows."""
    assert message_ids._ROW_MULTIPLIER % 2
    assert message_ids._ROW_MULTIPLIER % 31  # 62 = 2 · 31
    assert len(COLUMN_OF_ENDING) == COLUMNS


def test_neighbours_do_not_look_like_neighbours() -> None:
    """Neighbours share as many characters as two random ids: 8/62 of one on average, and never more than half."""
    ids = LeasedIds(5).take(4 * COLUMNS).ids
    shared = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in pairwise(ids)]
    assert max(shared) <= 4
    assert sum(shared) / len(shared) == pytest.approx(8 / BASE, rel=0.1)


@EXAMPLES
@given(lease=st.integers(0, LEASES - 1), sizes=st.lists(st.integers(0, 1_000) | st.integers(3_800, 4_000), max_size=12))
def test_taking_ids_in_any_sizes_gives_the_rows_in_order_and_nothing_twice(lease: int, sizes: list[int]) -> None:
    leased = LeasedIds(lease)
    whole = len(leased)
    taken: list[str] = []
    for size in sizes:
        part = leased.take(size).ids
        assert len(part) == size
        taken += part
        assert len(leased) == whole - len(taken)
    first_row = lease * LEASE_ROWS
    expected = [message_id for n in range(len(taken) // COLUMNS + 1) for message_id in row_ids(first_row + n)]
    assert taken == expected[: len(taken)]


def test_a_lease_holds_all_its_rows_and_not_one_id_more() -> None:
    leased = LeasedIds(3)
    assert len(leased) == LEASE_ROWS * COLUMNS
    leased.take(len(leased) - 2)
    with pytest.raises(IndexError, match="3 ids requested, 2 left"):
        leased.take(3)
    assert leased.take(2).ids == row_ids(3 * LEASE_ROWS + LEASE_ROWS - 1)[-2:]
    assert len(leased) == 0
    with pytest.raises(IndexError):
        leased.take(1)
    assert leased.take(0).ids == []


def test_asking_for_too_many_hands_out_none() -> None:
    leased = LeasedIds(9)
    first = leased.take(1).ids
    with pytest.raises(IndexError):
        leased.take(len(leased) + 1)
    assert first + leased.take(1).ids == LeasedIds(9).take(2).ids


@pytest.mark.parametrize("lease", [-1, LEASES, LEASES + 1])
def test_a_number_outside_the_id_space_is_refused(lease: int) -> None:
    with pytest.raises(ValueError, match=f"lease {lease} is outside"):
        LeasedIds(lease)
