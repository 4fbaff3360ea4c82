"""Message ids are unique, anywhere in their table and in blocks of any sizes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.ingest.message_ids import COLUMNS, LEASE_ROWS, LEASES, ROWS, LeasedIds, row_ids
from tests.properties import MORE
from tests.support.message_ids import place_of

EXAMPLES = settings(derandomize=MORE == 1, max_examples=40 * MORE, deadline=None)

rows = st.integers(0, ROWS - 1)


@EXAMPLES
@given(row=rows)
def test_an_id_can_be_decoded_to_its_place_so_no_two_places_share_one(row: int) -> None:
    """The mapping has an inverse, shown over whole rows anywhere in the table."""
    assert [place_of(message_id) for message_id in row_ids(row)] == [(row, column) for column in range(COLUMNS)]


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
