"""Placing SMS in envelopes: none is lost, lists are never mixed, order is kept, and each SMS has its outcome."""

from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.amqp.outgoing import Outgoing
from gateway.ingest.batch import Batch
from gateway.ingest.envelopes import Layout, place
from tests.properties import MORE

EXAMPLES = settings(derandomize=MORE == 1, max_examples=200 * MORE, deadline=None)
list_ids = st.lists(st.integers(1, 5), max_size=40)
layouts = st.builds(Layout, st.integers(1, 7), st.integers(1, 4))


@EXAMPLES
@given(list_ids, layouts)
def test_every_sms_is_placed_once_and_lists_keep_their_order(lists: list[int], layout: Layout) -> None:
    placed = place(lists, layout) if lists else []
    by_list: defaultdict[int, list[int]] = defaultdict(list)
    for shard, positions in placed:
        assert 1 <= len(positions) <= layout.messages_per_envelope
        (list_id,) = {lists[position] for position in positions}
        assert shard == list_id % layout.shards
        by_list[list_id] += positions
    assert by_list == {
        list_id: [position for position, other in enumerate(lists) if other == list_id] for list_id in set(lists)
    }
    assert [shard for shard, _ in placed] == sorted(shard for shard, _ in placed)


@EXAMPLES
@given(list_ids, layouts)
def test_no_more_envelopes_than_ids_were_taken_for(lists: list[int], layout: Layout) -> None:
    if layout.messages_per_envelope > 1:
        assert len(place(lists, layout) if lists else []) <= layout.most_envelopes([str(number) for number in lists])


@EXAMPLES
@given(st.lists(st.integers(1, 5), min_size=1, max_size=40), layouts, st.data())
def test_the_outcome_of_an_envelope_is_the_outcome_of_each_sms_in_it(
    lists: list[int], layout: Layout, data: st.DataObject
) -> None:
    placed = place(lists, layout)
    outcomes = bytes(data.draw(st.lists(st.integers(2, 5), min_size=len(placed), max_size=len(placed))))
    batch = Batch([""] * len(lists), [], [], [], Outgoing([], []), placed)
    spread = batch.outcomes_of_messages(outcomes)
    assert len(spread) == len(lists)
    for (_, positions), outcome in zip(placed, outcomes, strict=True):
        assert {spread[position] for position in positions} == {outcome}
