"""The AMQP messages of one batch, on their way to the broker. No IO."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import msgspec


class Run(NamedTuple):
    """Consecutive messages of a batch that go to the same shard."""

    shard: int
    ids: Sequence[str]
    payloads: Sequence[bytes]


class Outgoing(msgspec.Struct):
    """One batch of AMQP messages: columns of equal length, in the order of publishing."""

    ids: Sequence[str]  # the AMQP message_id of each
    payloads: Sequence[bytes]
    shards: Sequence[int] | None = None  # of each, ascending; None: all go to the first
    headers: Mapping[str, str] | None = None  # AMQP headers of each message, such as a trace's context

    def __len__(self) -> int:
        return len(self.payloads)

    @property
    def payload_bytes(self) -> int:
        """The total size of the payloads."""
        return sum(map(len, self.payloads))

    def only(self, positions: Sequence[int]) -> "Outgoing":
        """Return a batch of the messages at these ascending positions."""
        return Outgoing(
            [self.ids[position] for position in positions],
            [self.payloads[position] for position in positions],
            [self.shards[position] for position in positions] if self.shards else None,
            self.headers,
        )

    def runs_by_shard(self) -> Iterator[Run]:
        """Yield the batch in runs of one shard each, in order."""
        if self.shards is None:
            yield Run(0, self.ids, self.payloads)
            return
        start = 0
        for shard, run in groupby(self.shards):
            stop = start + sum(1 for _ in run)
            yield Run(shard, self.ids[start:stop], self.payloads[start:stop])
            start = stop
