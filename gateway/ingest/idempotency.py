"""The Idempotency-Key: a request sent again gets the first answer, or runs again with the same message ids.

    absent ──hold──→ held ──store──→ answered: the answer is stored for 24 hours ──sweep──→ absent
                      ├── nothing queued in the first run ──→ absent
                      └── unknown outcome, or the process died ──→ free: the next run takes the same ids

A hold expires by the database's clock, shortly after the longest possible run, so nothing has to clean up after a dead
process. A batch that has no message to publish gets no row. (Models: draft-ietf-httpapi-idempotency-key-header, and
Stripe.)
"""

import asyncio
import logging
import random
import re
import secrets
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from types import TracebackType
from typing import NamedTuple

from gateway.errors import (
    DatabaseUnavailable,
    GatewayError,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    OutcomeUnknown,
    TooManyIdempotencyKeys,
    Unavailable,
)
from gateway.ingest.batch import BatchIds
from gateway.ingest.message_ids import IdBlock, ids_at
from gateway.ingest.wire import Answer
from gateway.postgres.queries import ANSWER_UNIT, EndedRun, HeldKey, Hold, KnownKey, Queries

log = logging.getLogger(__name__)

HOLD_MARGIN_S = 2.0  # beyond the longest run
LATE_SETTLE_S = 0.25  # after its deadline, an answer waits at most this long until its row is settled
SWEEP_INTERVAL_S = 60.0
MAX_STORED_BYTES = 256 * 1024  # error rows echo input; a batch with a longer answer runs again instead
_is_key = re.compile(r"[\x21-\x7e]{1,255}").fullmatch


def parse_key(values: Sequence[str]) -> str | None:
    """Return the key of a request's Idempotency-Key headers; None without any. Raises InvalidIdempotencyKey."""
    if not values:
        return None
    if len(values) > 1 or not _is_key(values[0]):
        raise InvalidIdempotencyKey
    return values[0]


class Submission(NamedTuple):
    """The facts about a request that a claim needs. A repeated request has the same account, key and body."""

    account_id: int
    key: str  # "" without an Idempotency-Key
    body_sha256: bytes  # with the salt of the form; b"" without a key
    size: int  # messages in the request
    list_numbers: list[str]  # distinct
    lists: Mapping[str, int] | None  # as in SendRequest; None: looked up on entry
    deadline: float  # as in SendRequest


class Claim:
    """One run of a request, with its lists and message ids. KeyedClaim is a run with an Idempotency-Key.

    Enter the claim before the batch is published, and end with `store`:

    async with claim:
        if claim.stored_answer is None:
            …  # build and publish with claim.lists and claim.ids
            await claim.store(answer, encoded)
    """

    __slots__ = (
        "_queries",
        "_submission",
        "first_position",
        "ids",
        "is_retry",
        "lists",
        "lost_lists",
        "stored_answer",
    )

    def __init__(self, queries: Queries, submission: Submission, ids: BatchIds) -> None:
        self._queries = queries
        self._submission = submission
        self.ids = ids
        self.lists: Mapping[str, int] = {}  # list number → list id: the account's active lists
        self.is_retry = False  # an earlier run may have published messages
        self.lost_lists: Collection[str] = ()  # numbers not in `lists`, to which an earlier run may have published
        self.stored_answer: bytes | None = None  # of an earlier run, encoded
        self.first_position = 0  # of the message ids in the stored answer

    async def __aenter__(self) -> "Claim":
        sent = self._submission
        if sent.lists is not None:
            self.lists = sent.lists
        else:
            self.lists = await self._queries.resolve_lists(sent.account_id, sent.list_numbers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def store(self, answer: Answer, encoded: bytes) -> None:
        """Do nothing: without a key, no answer is stored."""


class KeyedClaim(Claim):
    """A run of a request with an Idempotency-Key. It holds the key's row until it ends."""

    __slots__ = ("_block", "_holder", "_idempotency", "_is_held")

    def __init__(self, idempotency: "Idempotency", submission: Submission, block: IdBlock, ids: BatchIds) -> None:
        super().__init__(idempotency.queries, submission, ids)
        self._idempotency = idempotency
        self._block = block
        self._holder = secrets.randbits(63)
        self._is_held = False

    async def __aenter__(self) -> "KeyedClaim":
        """Find the lists, and hold the key or find the stored answer.

        Raises IdempotencyInProgress, IdempotencyKeyReused, TooManyIdempotencyKeys or DatabaseUnavailable.
        """
        await super().__aenter__()
        may_store = self._idempotency.may_store_key(self._submission.account_id)
        known = await self._hold(may_insert=may_store and bool(self.lists))
        if isinstance(known, HeldKey):
            self._note_held(known)
        elif known is None and not self.lists:  # a first run that queues nothing: it needs no row
            self._idempotency.requests["first"] += 1
        elif known is not None and known.is_same_body and known.answer is not None:
            self._idempotency.requests["replayed"] += 1
            self.stored_answer, self.first_position = known.answer, known.first_position
        else:
            raise self._refusal(known, may_store=may_store)
        return self

    def _refusal(self, known: KnownKey | None, *, may_store: bool) -> GatewayError:
        """Count and return the refusal of a request that neither holds its key nor finds its stored answer."""
        requests = self._idempotency.requests
        if known is not None and not known.is_same_body:
            requests["conflict"] += 1
            return IdempotencyKeyReused()
        if known is None and not may_store:
            requests["too_many"] += 1
            return TooManyIdempotencyKeys()
        # Another run holds the key, or its row was removed between the two queries: a retry finds the key free.
        requests["in_progress"] += 1
        return IdempotencyInProgress()

    async def _hold(self, *, may_insert: bool) -> HeldKey | KnownKey | None:
        sent = self._submission
        not_found = [number for number in sent.list_numbers if number not in self.lists]
        return await self._queries.hold_key(
            Hold(
                sent.account_id,
                sent.key,
                sent.body_sha256,
                self._block.first_position,
                self._holder,
                self._idempotency.hold_s,
                not_found,
                may_insert,
            )
        )

    def _note_held(self, held: HeldKey) -> None:
        sent = self._submission
        self._is_held = True
        self.is_retry = held.first_position != self._block.first_position
        self._idempotency.requests["again" if self.is_retry else "first"] += 1
        if self.is_retry:
            # Envelopes always get new ids: the layout may have changed.
            self.ids = BatchIds(ids_at(held.first_position, sent.size), self.ids.envelopes)
            self.lost_lists = set(sent.list_numbers).difference(self.lists, held.not_found)
        else:
            self._idempotency.stored_keys[sent.account_id] += 1

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After an error, delete the row if nothing is queued; otherwise release it, for a run with the same ids."""
        if error is None:
            return
        await self._end(is_forgotten=isinstance(error, Unavailable) and not self.is_retry)
        if isinstance(error, Unavailable) and self.is_retry:
            # Nothing of this run is queued, but the first run may have queued it all.
            raise OutcomeUnknown from error

    async def store(self, answer: Answer, encoded: bytes) -> None:
        """Store the encoded answer, unless a message is unknown, none is queued, or it is too long."""
        if not answer.queued_count:  # no message could be published, or all are too large for the queue
            await self._end(is_forgotten=not self.is_retry)
        elif len(encoded) > MAX_STORED_BYTES or any(row.may_be_queued for row in answer.errors):
            await self._end()
        else:
            self._idempotency.stored_keys[self._submission.account_id] += len(encoded) // ANSWER_UNIT
            await self._end(encoded)

    async def _end(self, answer: bytes | None = None, *, is_forgotten: bool = False) -> None:
        """Settle the row, if it is held: store `answer`, or forget the row, or else release it."""
        if not self._is_held:
            return
        sent = self._submission
        self._is_held = False
        self._idempotency.stored_keys[sent.account_id] -= is_forgotten
        ended = EndedRun(sent.account_id, sent.key, self._holder, answer, is_forgotten)
        await self._idempotency.settle(ended, sent.deadline)


class Idempotency:
    """The claims of requests with a key. Their rows are in the database that all processes share."""

    def __init__(self, queries: Queries, *, longest_run_s: float, longest_settle_s: float, max_keys: int) -> None:
        """`max_keys` bounds the stored keys of an account."""
        self.queries = queries
        self.hold_s = longest_run_s + HOLD_MARGIN_S
        self._longest_settle_s = longest_settle_s
        self._max_keys = max_keys
        self._settling: set[asyncio.Task[None]] = set()
        self.stored_keys: Counter[int] = Counter()  # account → keys: at the last count, and of this process since
        self.requests: Counter[str] = Counter()  # requests with a key, by result (web/metrics.py has their meanings)
        self.unsettled = 0  # answers given before their row was settled

    def claim(self, submission: Submission, block: IdBlock, ids: BatchIds) -> Claim:
        """Return the claim in which a request runs. A first run uses `ids`, which come from `block`."""
        if not submission.key:
            return Claim(self.queries, submission, ids)
        return KeyedClaim(self, submission, block, ids)

    def may_store_key(self, account_id: int) -> bool:
        """Return True if the account may store another key."""
        return self.stored_keys[account_id] < self._max_keys

    async def sweep_for_ever(self) -> None:
        """Remove expired rows, and count the others, at random intervals; a task of each process."""
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * SWEEP_INTERVAL_S)  # noqa: S311 - jitter
            try:
                while await self.queries.sweep_keys():
                    pass
                self.stored_keys = Counter(await self.queries.count_keys())
            except DatabaseUnavailable:
                log.warning("expired idempotency keys stay until the next sweep")

    async def close(self) -> None:
        """Wait for the rows that are being settled."""
        if self._settling:
            await asyncio.wait(self._settling)

    async def settle(self, run: EndedRun, deadline: float) -> None:
        """Settle a row; wait for that until `deadline`, at least LATE_SETTLE_S, and at most one database timeout.

        Nothing is raised. If the row is not settled, no message is lost, and the answer stays true: the hold expires by
        itself, and the next run takes the same ids.
        """
        task = asyncio.create_task(self.queries.settle_key(run), name="settle an idempotency key")
        self._settling.add(task)
        task.add_done_callback(self._settled)
        left_s = deadline - asyncio.get_running_loop().time()
        await asyncio.wait([task], timeout=min(max(left_s, LATE_SETTLE_S), self._longest_settle_s))
        if not task.done() or task.cancelled() or task.exception() is not None:
            self.unsettled += 1

    def _settled(self, task: "asyncio.Task[None]") -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning(
                "an idempotency key stays held until its hold expires, then a retry runs with the same ids: %s",
                type(error).__name__,
            )
