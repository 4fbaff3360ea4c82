"""What callers were told against what consumers got. Pure: no IO, no clock.

A message is named by the batch that carried it and its place in it, both of which its text repeats; so a second copy
under another id shows, and so does one that nobody was told of. A repeat of the same id is no double: delivery is at
least once, and consumers drop repeats.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import msgspec

NO_ANSWER = 0  # the status of a request whose connection ended, or whose client lost patience


class Token(NamedTuple):
    """One message, as its caller knows it."""

    batch: int
    place: int


class Attempt(NamedTuple):
    """One request, and what its caller was told. Times are of one monotonic clock, in seconds."""

    request_id: str
    target: int  # which gateway was asked
    batch: int
    size: int
    sent_at: float
    answered_at: float
    status: int
    code: str = ""
    refused: frozenset[int] = frozenset()  # indexes that certainly are not queued: of a 503, all
    unknown: frozenset[int] = frozenset()  # indexes that may be queued: of a 504 or no answer, all
    is_replay: bool = False  # the stored answer to an earlier request

    @property
    def took_s(self) -> float:
        return self.answered_at - self.sent_at

    @property
    def is_whole(self) -> bool:
        """Whether every message was counted."""
        return self.status == 200 and not self.refused and not self.unknown

    def counted(self) -> list[Token]:
        """The messages that `queued_count` stands for."""
        if self.status != 200:
            return []
        left_out = self.refused | self.unknown
        return [Token(self.batch, index) for index in range(self.size) if index not in left_out]


class Consumed(NamedTuple):
    """One message as a consumer got it; `index` and `request_id` are the gateway's word, `token` the text's."""

    token: Token
    message_id: str
    request_id: str


class Fault(NamedTuple):
    """When something was broken."""

    began_at: float
    ended_at: float


class Findings(msgspec.Struct, kw_only=True):
    """The comparison. Every list is of violations, and empty if the promises were kept."""

    counted: int
    consumed: int
    requests: int
    statuses: dict[str, int]
    lost: list[Token]  # counted, and not consumed
    doubled: list[Token]  # consumed under two ids, or handed on twice
    refused_but_consumed: list[Token]  # of a 503, or of a row that says "certainly not queued"
    never_sent: list[Token]  # consumed, and sent by nobody
    unheard_of: list[str]  # answers that an outage does not excuse
    longest_gap_s: float  # between two answers of 200, anywhere
    longest_request_s: float
    recovery_s: float | None  # from the fault's end until every gateway served, and went on serving; None: never

    def broken_promises(self, *, deadline_s: float, room_s: float, recovery_limit_s: float) -> list[str]:
        """What a person should read, if anything."""
        broken = [
            f"{len(tokens)} {what}, such as batch {tokens[0].batch} message {tokens[0].place}"
            for what, tokens in (
                ("counted messages were lost", self.lost),
                ("messages were doubled", self.doubled),
                ("messages were queued although they were refused", self.refused_but_consumed),
                ("messages came from nowhere", self.never_sent),
            )
            if tokens
        ]
        broken += [f"an answer of {answer}" for answer in self.unheard_of]
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
    """Compare both sides.

    Requests under way in an `excused` interval have no deadline: whoever should have kept it was not running.
    `handed_on`: how often a consumer that drops repeats handed each message on.
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
        unheard_of=sorted({_shown(attempt) for attempt in attempts if attempt.status not in expected_statuses}),
        longest_gap_s=longest_gap_s(attempts),
        longest_request_s=max((attempt.took_s for attempt in timed), default=0.0),
        recovery_s=recovery_s(attempts, fault.ended_at),
    )


def longest_gap_s(attempts: Iterable[Attempt]) -> float:
    """The longest time in which nobody was answered with 200, the time before the first and after the last included."""
    attempts = list(attempts)
    if not attempts:
        return 0.0
    good = sorted(attempt.answered_at for attempt in attempts if attempt.status == 200)
    edges = [min(attempt.sent_at for attempt in attempts), *good, max(attempt.answered_at for attempt in attempts)]
    return max(after - before for before, after in pairwise(edges))


def recovery_s(attempts: Iterable[Attempt], ended_at: float) -> float | None:
    """How long after `ended_at` the last gateway served again for good; None if one of them never did.

    For good: a gateway that serves, and fails again, has not recovered. What was sent before the end may fail later.
    """
    by_target: dict[int, list[Attempt]] = {}
    for attempt in attempts:
        by_target.setdefault(attempt.target, []).append(attempt)
    recovered_at = [_recovered_at(own, ended_at) for own in by_target.values()]
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
