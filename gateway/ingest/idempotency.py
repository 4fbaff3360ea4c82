"""The Idempotency-Key: a request sent again gets the first answer, or runs again with the same message ids.

    absent ──hold──→ held ──keep──→ answered: the answer is stored for 24 hours ──sweep──→ absent
                      ├── 503 in the first run ──→ absent: nothing was queued
                      └── unknown outcome, or the process died ──→ free: the next run takes the same ids

The row is written in the query that finds the lists. A hold expires by the database's clock, shortly after the longest
possible run, so nothing has to clean up after a dead process. (Models: draft-ietf-httpapi-idempotency-key-header, and
Stripe.)
"""

import asyncio
import logging
import random
import re
import secrets
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

from gateway.errors import (
    DatabaseUnavailable,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    OutcomeUnknown,
    Unavailable,
)
from gateway.ingest.batch import BatchIds
from gateway.ingest.message_ids import IdBlock, ids_at
from gateway.ingest.wire import Answer, encode
from gateway.postgres.queries import HeldKey, Queries

log = logging.getLogger(__name__)

HOLD_MARGIN_S = 2.0  # beyond the longest run
SETTLE_WAIT_S = 0.25  # longest time that an answer waits until its row is settled; the query goes on after it
SWEEP_INTERVAL_S = 60.0
MAX_KEPT_BYTES = 256 * 1024  # error rows echo input; a batch with a longer answer runs again instead
_is_key = re.compile(r"[\x21-\x7e]{1,255}").fullmatch


def parse_key(values: Sequence[str]) -> str | None:
    """Return the key of a request's Idempotency-Key headers; None without any. Raises InvalidIdempotencyKey."""
    if not values:
        return None
    if len(values) > 1 or not _is_key(values[0]):
        raise InvalidIdempotencyKey
    return values[0]


class Submission(NamedTuple):
    """One request with an Idempotency-Key. A repetition has the same account, key and body."""

    account_id: int
    key: str
    body_sha256: bytes
    size: int  # messages in the request
    list_numbers: list[str]  # distinct


class Claim:
    """A run of a request without an Idempotency-Key. Enter it before the batch is published, and end with `keep`.

    async with claim:
        if claim.kept_answer is None:
            …  # build and publish with claim.lists and claim.ids
            encoded = await claim.keep(answer)
    """

    __slots__ = ("_account_id", "_numbers", "_queries", "ids", "is_retry", "kept_answer", "lists")

    def __init__(self, queries: Queries, account_id: int, list_numbers: list[str], ids: BatchIds) -> None:
        self._queries = queries
        self._account_id = account_id
        self._numbers = list_numbers
        self.ids = ids
        self.lists: Mapping[str, int] = {}  # list number → list id: the account's active lists
        self.is_retry = False  # an earlier run may have published messages
        self.kept_answer: bytes | None = None  # of an earlier run, encoded

    async def __aenter__(self) -> "Claim":
        self.lists = await self._queries.resolve_lists(self._account_id, self._numbers)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    async def keep(self, answer: Answer) -> bytes:
        """Return the encoded answer."""
        return encode(answer)


class KeyedClaim(Claim):
    """A run of a request with an Idempotency-Key: its row is held until the run has ended."""

    __slots__ = ("_block", "_holder", "_idempotency", "_submission")

    def __init__(self, idempotency: "Idempotency", submission: Submission, block: IdBlock, ids: BatchIds) -> None:
        super().__init__(idempotency.queries, submission.account_id, submission.list_numbers, ids)
        self._idempotency = idempotency
        self._submission = submission
        self._block = block
        self._holder = secrets.randbits(63)

    async def __aenter__(self) -> "KeyedClaim":
        """Hold the key, or find the stored answer.

        Raises IdempotencyInProgress, IdempotencyKeyReused or DatabaseUnavailable.
        """
        sent = self._submission
        known = await self._queries.hold_key(
            sent.account_id,
            sent.key,
            sent.body_sha256,
            first_id=self._block.first,
            holder=self._holder,
            hold_s=self._idempotency.hold_s,
            numbers=sent.list_numbers,
        )
        requests = self._idempotency.requests
        if isinstance(known, HeldKey):
            self.lists = known.lists
            self.is_retry = known.first_id != self._block.first
            requests["again" if self.is_retry else "first"] += 1
            if self.is_retry:  # envelopes always get new ids: the layout may have changed
                self.ids = BatchIds(ids_at(known.first_id, sent.size), self.ids.envelopes)
        elif known is None:  # the row was removed between the two queries: a retry finds the key free
            requests["in_progress"] += 1
            raise IdempotencyInProgress
        elif not known.is_same_body:
            requests["conflict"] += 1
            raise IdempotencyKeyReused
        elif known.answer is None:
            requests["in_progress"] += 1
            raise IdempotencyInProgress
        else:
            requests["replayed"] += 1
            self.kept_answer = known.answer
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """After an error, delete the row if nothing is queued; otherwise release it, for a run with the same ids."""
        if error is None:
            return
        if isinstance(error, Unavailable) and not self.is_retry:
            await self._idempotency.settle(self._queries.forget_key(*self._row))
            return
        await self._idempotency.settle(self._queries.release_key(*self._row))
        if isinstance(error, Unavailable):  # nothing of this run is queued, but the first run may have queued it all
            raise OutcomeUnknown from error

    async def keep(self, answer: Answer) -> bytes:
        """Store the answer, unless a message is unknown or the answer is too long. Return it encoded."""
        encoded = encode(answer)
        if len(encoded) > MAX_KEPT_BYTES or any(row.may_be_queued for row in answer.errors):
            await self._idempotency.settle(self._queries.release_key(*self._row))
        else:
            await self._idempotency.settle(self._queries.keep_answer(*self._row, encoded))
        return encoded

    @property
    def _row(self) -> tuple[int, str, int]:
        return self._submission.account_id, self._submission.key, self._holder


class Idempotency:
    """The claims of requests with a key. Their rows are in the database that all processes share."""

    def __init__(self, queries: Queries, *, longest_run_s: float) -> None:
        self.queries = queries
        self.hold_s = longest_run_s + HOLD_MARGIN_S
        self._settling: set[asyncio.Task[None]] = set()
        self.requests: Counter[str] = Counter()  # requests with a key, by result

    def claim(self, submission: Submission, block: IdBlock, ids: BatchIds) -> KeyedClaim:
        """Return the claim of a request with a key. Its first run uses `ids`, which come from `block`."""
        return KeyedClaim(self, submission, block, ids)

    async def sweep_for_ever(self) -> None:
        """Remove expired rows at random intervals; a task of each process."""
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * SWEEP_INTERVAL_S)  # noqa: S311 - jitter
            try:
                while await self.queries.sweep_keys():
                    pass
            except DatabaseUnavailable:
                log.warning("expired idempotency keys stay until the next sweep")

    async def close(self) -> None:
        """Wait for the rows that are being settled."""
        if self._settling:
            await asyncio.wait(self._settling)

    async def settle(self, settling: Coroutine[Any, Any, None]) -> None:
        """Run a query that settles a row; wait for it up to SETTLE_WAIT_S.

        A failure costs no message: the hold expires by itself, and the next run takes the same ids.
        """
        task = asyncio.create_task(settling, name="settle an idempotency key")
        self._settling.add(task)
        task.add_done_callback(self._settled)
        await asyncio.wait([task], timeout=SETTLE_WAIT_S)

    def _settled(self, task: "asyncio.Task[None]") -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("an idempotency key stays held until its hold expires: %s", type(error).__name__)
