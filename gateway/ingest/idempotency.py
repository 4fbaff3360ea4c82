"""The Idempotency-Key: a request sent again is answered as the first time, or runs again with the same message ids.

    absent ──hold──→ held ──keep──→ kept: the answer, for 24 hours ──sweep──→ absent
                      ├── 503 of the first run ──→ absent: nothing was queued, as if never sent
                      └── unknown outcome, or the process died ──→ free: the next run takes the same ids

The row is written in the round trip that finds the lists. A hold ends by itself, a moment after the longest that a run
can take: nobody has to clean up behind a dead process. (Models: draft-ietf-httpapi-idempotency-key-header, and Stripe.)
"""

import asyncio
import hashlib
import logging
import random
import re
import secrets
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, NamedTuple

from multidict import CIMultiDictProxy

from gateway.errors import (
    DatabaseUnavailable,
    IdempotencyInProgress,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    OutcomeUnknown,
    Unavailable,
)
from gateway.ingest.batch import Draft
from gateway.ingest.message_ids import IdBlock, ids_at
from gateway.ingest.wire import Answer, encode
from gateway.postgres.queries import HeldKey, Store

log = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
REPLAYED = "Idempotent-Replayed"
HOLD_MARGIN_S = 2.0  # beyond the longest run
SETTLE_WAIT_S = 0.25  # for the row to be settled before the caller is answered; it is settled all the same
SWEEP_INTERVAL_S = 60.0
MOST_KEPT_BYTES = 256 * 1024  # rows echo what came in: beyond a thousand sane ones, the batch simply runs again
_is_key = re.compile(r"[\x21-\x7e]{1,255}").fullmatch


def sent_key(headers: "CIMultiDictProxy[str]") -> str | None:
    """The request's key; None when it has none. Raises InvalidIdempotencyKey."""
    keys = headers.getall(HEADER, [])
    if not keys:
        return None
    if len(keys) > 1 or not _is_key(keys[0]):
        raise InvalidIdempotencyKey
    return keys[0]


class Sent(NamedTuple):
    """The encoded answer of a request with a key."""

    answer: bytes
    is_replayed: bool


class Idempotency:
    """Runs requests with a key; their rows are in the database that all processes share."""

    def __init__(self, store: Store, *, longest_run_s: float) -> None:
        self._store = store
        self._hold_s = longest_run_s + HOLD_MARGIN_S
        self._settling: set[asyncio.Task[None]] = set()
        self.requests: Counter[str] = Counter()  # with a key, by what it led to

    async def send_once(
        self,
        account_id: int,
        key: str,
        body: bytes,
        draft: Draft,
        ids: IdBlock,
        send: Callable[[dict[str, int], list[str], bool], Awaitable[Answer]],
    ) -> Sent:
        """The kept answer, or that of `send`, called with the draft's lists, the ids of the first run, and whether the
        first run may have queued them already: then nothing can be said to be certainly not queued.

        `ids` are used if this is the first. Raises IdempotencyInProgress, IdempotencyKeyReused, DatabaseUnavailable,
        and whatever `send` raises.
        """
        holder = secrets.randbits(63)
        digest = hashlib.sha256(body).digest()
        known = await self._store.hold_key(
            account_id,
            key,
            digest,
            first_id=ids.first,
            holder=holder,
            hold_s=self._hold_s,
            numbers=draft.distinct_list_numbers(),
        )
        if known is None:
            self.requests["in_progress"] += 1
            raise IdempotencyInProgress  # forgotten between two looks at it: the next try finds it free
        if not isinstance(known, HeldKey):
            if not known.is_same_body:
                self.requests["conflict"] += 1
                raise IdempotencyKeyReused
            if known.answer is None:
                self.requests["in_progress"] += 1
                raise IdempotencyInProgress
            self.requests["replayed"] += 1
            return Sent(known.answer, is_replayed=True)
        is_first = known.first_id == ids.first
        self.requests["first" if is_first else "again"] += 1
        # Envelopes' own ids, behind those of the messages, are fresh in any case: the layout may have changed.
        same_ids = ids.ids if is_first else ids_at(known.first_id, draft.size) + ids.ids[draft.size :]
        try:
            answer = await send(known.lists, same_ids, not is_first)
        except Unavailable as error:
            if is_first:
                await self._settle(self._store.forget_key(account_id, key, holder))
                raise
            await self._settle(self._store.release_key(account_id, key, holder))
            raise OutcomeUnknown from error  # of this run nothing is queued, of the first perhaps all
        except BaseException:
            await self._settle(self._store.release_key(account_id, key, holder))
            raise
        encoded = encode(answer)
        if len(encoded) > MOST_KEPT_BYTES or any(row.may_be_queued for row in answer.errors):
            await self._settle(self._store.release_key(account_id, key, holder))
        else:
            await self._settle(self._store.keep_answer(account_id, key, holder, encoded))
        return Sent(encoded, is_replayed=False)

    async def sweep_for_ever(self) -> None:
        """Remove expired rows, now and then; a task of each process."""
        while True:
            await asyncio.sleep(random.uniform(0.5, 1.5) * SWEEP_INTERVAL_S)  # noqa: S311 - jitter
            try:
                while await self._store.sweep_keys():
                    pass
            except DatabaseUnavailable:
                log.warning("expired idempotency keys stay until the next sweep")

    async def close(self) -> None:
        """Wait for the rows that are being settled."""
        if self._settling:
            await asyncio.wait(self._settling)

    async def _settle(self, settling: Coroutine[Any, Any, None]) -> None:
        """Settle a row. What fails here costs a later run, never a message: the hold ends by itself, the ids stay."""
        task = asyncio.create_task(settling, name="settle an idempotency key")
        self._settling.add(task)
        task.add_done_callback(self._settled)
        await asyncio.wait([task], timeout=SETTLE_WAIT_S)

    def _settled(self, task: "asyncio.Task[None]") -> None:
        self._settling.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("an idempotency key stays held until its time is over: %s", type(error).__name__)
