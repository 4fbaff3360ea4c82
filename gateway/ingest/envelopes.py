"""The distribution of SMS over AMQP messages and shards. No IO, no clock, no randomness.

By default every SMS is an AMQP message of its own, and there is one queue. Then this module is not used.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """The number of SMS per AMQP message, and of queues. Both are constant for the life of a process."""

    messages_per_envelope: int = 1
    shards: int = 1

    @property
    def is_plain(self) -> bool:
        """True with one SMS per AMQP message, and one queue."""
        return self.messages_per_envelope == self.shards == 1

    def most_envelopes(self, list_numbers: Sequence[str]) -> int:
        """Return an upper bound on the envelopes for messages with these list numbers; 0 without envelopes."""
        if self.messages_per_envelope == 1:
            return 0
        return len(list_numbers) // self.messages_per_envelope + len(set(list_numbers))


class Placement(NamedTuple):
    """The shard of one AMQP message, and the positions of its SMS in the batch."""

    shard: int
    positions: Sequence[int]


def place(list_ids: Sequence[int], layout: Layout) -> list[Placement]:
    """Distribute SMS, given by their list ids, over AMQP messages. The result is ordered by shard.

    An envelope has SMS of one list only, in request order. All SMS of a list go to the same shard. So each list keeps
    its order.
    """
    size = layout.messages_per_envelope
    placements = [
        Placement(list_id % layout.shards, positions[start : start + size])
        for list_id, positions in _positions_by_list(list_ids).items()
        for start in range(0, len(positions), size)
    ]
    if layout.shards > 1:
        placements.sort(key=lambda placement: placement.shard)  # stable: the order within a list stays
    return placements


def _positions_by_list(list_ids: Sequence[int]) -> dict[int, Sequence[int]]:
    if len(set(list_ids)) == 1:  # nearly every batch
        return {list_ids[0]: range(len(list_ids))}
    by_list: dict[int, list[int]] = {}
    for position, list_id in enumerate(list_ids):
        by_list.setdefault(list_id, []).append(position)
    return dict(by_list)
