"""Message ids are unique: each can be decoded to the row and column that it came from."""

import re
from itertools import pairwise

import pytest

from gateway.ingest import message_ids
from gateway.ingest.message_ids import ALPHABET, BASE, COLUMNS, LEASE_ROWS, LEASES, ROWS, LeasedIds, ids_at, row_ids
from tests.support.message_ids import COLUMN_OF_ENDING, place_of


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


@pytest.mark.parametrize("before", [0, 1, COLUMNS - 1, COLUMNS, COLUMNS + 1])
@pytest.mark.parametrize("count", [1, 2, 1_000, 3 * COLUMNS])
def test_a_block_is_found_again_by_its_first_position(before: int, count: int) -> None:
    """A second run with an Idempotency-Key takes its ids from there."""
    leased = LeasedIds(11)
    leased.take(before)
    block = leased.take(count)
    assert block.first_position == 11 * LEASE_ROWS * COLUMNS + before
    assert ids_at(block.first_position, count) == block.ids


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
