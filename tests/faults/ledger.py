"""The comparison of what callers were told with what consumers got. Pure: no IO, no clock.

A message is named by its batch and its place in the batch. Its text repeats both, so a second copy under another id
is found, and so is a message that no answer counted. A repeat of the same id is no double: delivery is at least once,
and consumers drop repeats.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

NO_ANSWER = 0  # the status of a request whose connection ended, or whose client timed out


class Token(NamedTuple):
    """A message, as its caller names it."""

    batch: int
    place: int


class Attempt(NamedTuple):
    """A request, and what its caller was told. Times are those of one monotonic clock, in seconds."""

    request_id: str
    target: int  # the index of the gateway
    batch: int
    size: int
    sent_at: float
    answered_at: float
    status: int
    code: str = ""
    refused: frozenset[int] = frozenset()  # indexes that certainly are not queued; after a 503 all
    unknown: frozenset[int] = frozenset()  # indexes that may be queued; after a 504 or without an answer all
    is_replay: bool = False  # the stored answer to an earlier request

    @property
    def took_s(self) -> float:
        return self.answered_at - self.sent_at

    @property
    def is_whole(self) -> bool:
        """Return whether every message was counted."""
        return self.status == 200 and not self.refused and not self.unknown

    def counted(self) -> list[Token]:
        """Return the messages that `queued_count` counts."""
        if self.status != 200:
            return []
        left_out = self.refused | self.unknown
        return [Token(self.batch, index) for index in range(self.size) if index not in left_out]


class Consumed(NamedTuple):
    """A message as a consumer got it. `token` comes from its text, the other fields from the gateway."""

    token: Token
    message_id: str
    request_id: str


class Fault(NamedTuple):
    """The interval in which something was broken."""

    began_at: float
    ended_at: float


class Findings(msgspec.Struct, kw_only=True):
    """The result of a comparison. Every list contains violations, and is empty if the promises were kept."""

    counted: int
    consumed: int
    requests: int
    statuses: dict[str, int]
    lost: list[Token]  # counted, and not consumed
    doubled: list[Token]  # consumed under two ids, or handed on twice
    refused_but_consumed: list[Token]  # refused by a 503, or by a row that says "certainly not queued"
    never_sent: list[Token]  # consumed, and sent by no caller
    unexpected: list[str]  # answers that the fault does not excuse
    longest_gap_s: float  # between two answers of 200, anywhere
    longest_request_s: float
    recovery_s: float | None  # from the fault's end until every gateway served, and went on serving; None: never

    def broken_promises(self, *, deadline_s: float, room_s: float, recovery_limit_s: float) -> list[str]:
        """Return a sentence for each broken promise."""
        broken = [
            f"{len(tokens)} {text}, such as batch {tokens[0].batch} message {tokens[0].place}"
            for text, tokens in (
                ("counted messages were lost", self.lost),
                ("messages were doubled", self.doubled),
                ("messages were queued although they were refused", self.refused_but_consumed),
                ("messages came from nowhere", self.never_sent),
            )
            if tokens
        ]
        broken += [f"an answer of {answer}" for answer in self.unexpected]
        if self.longest_request_s > deadline_s + room_s:
            broken.append(f"a request took {self.longest_request_s:.2f} s, its deadline was {deadline_s:g} s")
        if self.recovery_s is None:
            broken.append("a gateway never served again")
        elif self.recovery_s > recovery_limit_s:
            broken.append(f"serving again only {self.recovery_s:.1f} s after the fault's end")
        return broken


def compare(
    attempts: Sequence[Attempt],
    consumed: Iterable[Consumed],
    fault: Fault,
    *,
    excused: Collection[Fault] = (),
    expected_statuses: Collection[int] = (200, 503, 504, NO_ANSWER),
    handed_on: Counter[Token] | None = None,
) -> Findings:
    """Compare callers with consumers.

    Requests in flight during an `excused` interval have no deadline, because the gateway did not run. `handed_on`
    counts how often a consumer that drops repeats delivered each message.
    """
    counted = {token for attempt in attempts for token in attempt.counted()}
    sent = {attempt.batch: attempt.size for attempt in attempts}
    refused = {attempt.request_id: attempt for attempt in attempts if attempt.refused}
    ids: dict[Token, set[str]] = {}
    refused_but_consumed = set()
    for token, message_id, request_id in consumed:
        ids.setdefault(token, set()).add(message_id)
        if request_id in refused and token.place in refused[request_id].refused:
            refused_but_consumed.add(token)
    doubled = {token for token, known_as in ids.items() if len(known_as) > 1}
    doubled |= {token for token, times in (handed_on or {}).items() if times > 1}
    timed = [attempt for attempt in attempts if not any(_overlaps(attempt, interval) for interval in excused)]
    return Findings(
        counted=len(counted),
        consumed=len(ids),
        requests=len(attempts),
        statuses=dict(Counter(_shown(attempt) for attempt in attempts)),
        lost=sorted(counted - set(ids)),
        doubled=sorted(doubled),
        refused_but_consumed=sorted(refused_but_consumed),
        never_sent=sorted(token for token in ids if not 0 <= token.place < sent.get(token.batch, 0)),
        unexpected=sorted({_shown(attempt) for attempt in attempts if attempt.status not in expected_statuses}),
        longest_gap_s=longest_gap_s(attempts),
        longest_request_s=max((attempt.took_s for attempt in timed), default=0.0),
        recovery_s=recovery_s(attempts, fault.ended_at),
    )


def longest_gap_s(attempts: Iterable[Attempt]) -> float:
    """Return the longest time without a 200, in seconds; the times before the first and after the last count too."""
    attempts = list(attempts)
    if not attempts:
        return 0.0
    good = sorted(attempt.answered_at for attempt in attempts if attempt.status == 200)
    edges = [min(attempt.sent_at for attempt in attempts), *good, max(attempt.answered_at for attempt in attempts)]
    return max(after - before for before, after in pairwise(edges))


def recovery_s(attempts: Iterable[Attempt], ended_at: float) -> float | None:
    """Return the seconds from `ended_at` until every gateway served for good; None if one of them never did.

    A gateway that serves and then fails again has not recovered. A request sent before `ended_at` may fail later.
    """
    by_target: dict[int, list[Attempt]] = {}
    for attempt in attempts:
        by_target.setdefault(attempt.target, []).append(attempt)
    recovered_at = [_recovered_at(group, ended_at) for group in by_target.values()]
    if not recovered_at or None in recovered_at:
        return None
    return max(moment - ended_at for moment in recovered_at if moment is not None)


def _recovered_at(attempts: Iterable[Attempt], ended_at: float) -> float | None:
    after = sorted((attempt for attempt in attempts if attempt.answered_at >= ended_at), key=lambda each: each[5])
    recovered_at = None
    for attempt in after:
        if not attempt.is_whole:
            recovered_at = None if attempt.sent_at >= ended_at else recovered_at
        elif recovered_at is None:
            recovered_at = attempt.answered_at
    return recovered_at


def _overlaps(attempt: Attempt, interval: Fault) -> bool:
    return attempt.sent_at <= interval.ended_at and attempt.answered_at >= interval.began_at


def _shown(attempt: Attempt) -> str:
    status = str(attempt.status) if attempt.status else "no answer"
    return f"{status} {attempt.code}".strip()
