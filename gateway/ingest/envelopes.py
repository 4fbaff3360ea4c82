"""Which SMS travel in which AMQP message, and to which shard. No IO, no clock, no randomness.

By default every SMS is an AMQP message of its own, and there is one queue: then none of this is used.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """How SMS are laid out over AMQP messages and queues; the same for the life of a process."""

    messages_per_envelope: int = 1
    shards: int = 1

    @property
    def is_plain(self) -> bool:
        """One SMS an AMQP message, one queue."""
        return self.messages_per_envelope == self.shards == 1

    def most_envelopes(self, list_numbers: Sequence[str]) -> int:
        """How many envelopes messages with these list numbers can take at the most; 0 without envelopes."""
        if self.messages_per_envelope == 1:
            return 0
        return len(list_numbers) // self.messages_per_envelope + len(set(list_numbers))


class Placed(NamedTuple):
    """One AMQP message to be: its shard, and the positions of the SMS it carries."""

    shard: int
    positions: Sequence[int]


def place(list_ids: Sequence[int], layout: Layout) -> list[Placed]:
    """Place SMS, given by their list ids, in AMQP messages, ordered by shard.

    Only SMS of one list share an envelope, in the order in which they came; and all of a list go to the same shard: so
    a list keeps its order.
    """
    size = layout.messages_per_envelope
    placed = [
        Placed(list_id % layout.shards, positions[start : start + size])
        for list_id, positions in _positions_by_list(list_ids).items()
        for start in range(0, len(positions), size)
    ]
    if layout.shards > 1:
        placed.sort(key=lambda one: one.shard)  # stable: the order within a list stays
    return placed


def _positions_by_list(list_ids: Sequence[int]) -> dict[int, Sequence[int]]:
    if len(set(list_ids)) == 1:  # nearly every batch
        return {list_ids[0]: range(len(list_ids))}
    by_list: dict[int, list[int]] = {}
    for position, list_id in enumerate(list_ids):
        by_list.setdefault(list_id, []).append(position)
    return dict(by_list)
