"""One batch from bytes to answer: decode, validate, resolve lists, build, publish, answer.

HTTP, SQL and AMQP are elsewhere: it calls `Queries` and `Publisher`. ARCHITECTURE.md has the table of the steps. A bad
message becomes an error row; a bad request raises a GatewayError.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from time import time
from typing import NamedTuple

import msgspec

from gateway.amqp.confirms import REFUSED_IS_UNKNOWN, Outcome
from gateway.amqp.publisher import Publisher
from gateway.errors import (
    QUEUE_REJECTED,
    TOO_LARGE,
    GatewayError,
    MessageRefused,
    OutcomeUnknown,
    QueueUnavailable,
)
from gateway.ingest.admission import Slot
from gateway.ingest.batch import Batch, BatchIds, Draft, Origin, build, drop_unresolved, unknown_row, validate
from gateway.ingest.decoding import DecodedBody, decode_bulk, decode_single
from gateway.ingest.envelopes import Layout
from gateway.ingest.id_supply import IdSupply
from gateway.ingest.idempotency import Claim, Idempotency, Submission
from gateway.ingest.message_ids import ids_at
from gateway.ingest.wire import (
    Answer,
    DryRunAnswer,
    ErrorRow,
    SingleAnswer,
    SingleDryRunAnswer,
    decode_answer,
    encode,
    encode_with_ids,
)
from gateway.postgres.queries import Queries
from gateway.telemetry.counters import BUILD, PUBLISH, RESOLVE_LISTS, VALIDATE
from gateway.telemetry.log import utc
from gateway.telemetry.requests import RequestRecord
from gateway.telemetry.tracing import NoTracing, Tracing


class Form(NamedTuple):
    """One of the two forms of a request: BULK or SINGLE."""

    decode: Callable[[bytes], DecodedBody]
    salt: bytes  # of the body's digest: the same body in the other form is another request


BULK, SINGLE = Form(decode_bulk, b""), Form(decode_single, b"single send\n")


class SendRequest(msgspec.Struct):
    """An authenticated request whose body has been read. The pipeline empties `body` and `draft`."""

    form: Form
    account_id: int
    slot: Slot
    request_id: str
    body: bytes
    idempotency_key: str | None
    deadline: float  # the time at which the answer is due, on the event loop's clock
    draft: Draft | None = None  # of a body that was decoded before the API key was looked up
    lists: Mapping[str, int] | None = None  # list number → list id, for that draft: looked up with the key
    wants_ids: bool = False  # BULK alone: the answer lists the ids of what was queued


def draft_early(body: bytes, form: Form) -> Draft | None:
    """Return the draft of a body, before the API key is looked up; None if the body is refused.

    Pipeline.run then decodes the body again and raises the refusal: refusals of the API key come first.
    """
    try:
        return validate(form.decode(body))
    except GatewayError:
        return None


class Pipeline:
    """Runs batches. One per process."""

    def __init__(
        self,
        *,
        queries: Queries,
        ids: IdSupply,
        idempotency: Idempotency,
        publisher: Publisher,
        layout: Layout,
        tracing: Tracing | NoTracing,
    ) -> None:
        self._queries = queries
        self._ids = ids
        self._idempotency = idempotency
        self._publisher = publisher
        self._layout = layout
        self._tracing = tracing

    async def run(self, request: SendRequest, record: RequestRecord) -> bytes:
        """Return the encoded answer once the broker has settled every message, or the deadline has passed.

        Sets `record.is_replayed` if the answer is the stored one of an earlier request, and `record.is_dry_run`.

        Raises the GatewayErrors of decoding, of the Idempotency-Key and of the database; Unavailable or OutcomeUnknown
        if nothing is confirmed; MessageRefused if the message of a single send is refused.
        """
        draft = request.draft
        if draft is None:
            draft = validate(request.form.decode(request.body))
            record.mark(VALIDATE)
        body_sha256 = b""
        if request.idempotency_key is not None:
            body_sha256 = hashlib.sha256(request.form.salt + request.body).digest()
        request.body = b""
        record.count_in_flight(draft.size)
        if draft.dry_run:
            record.is_dry_run = True
            return await self._answer_dry_run(request, draft, record)
        claim = await self._claim(request, draft, body_sha256)
        request.draft = draft
        del draft  # the only reference is then in the request: `_publish` frees the draft
        try:
            return await self._publish(request, claim, record)
        except OutcomeUnknown as error:
            if request.form is SINGLE:
                error.message_id = claim.ids.messages[0]
            raise

    async def _publish(self, request: SendRequest, claim: Claim, record: RequestRecord) -> bytes:
        """Run the batch of `request.draft` in its claim: steps 4 to 7. Returns and raises as `run` does."""
        draft, request.draft = request.draft, None
        assert draft is not None  # noqa: S101 - `run` sets it
        async with claim:
            if claim.stored_answer is not None:
                record.is_replayed = True
                return _with_ids(claim.stored_answer, claim) if request.wants_ids else claim.stored_answer
            if request.lists is None or request.idempotency_key is not None:
                record.mark(RESOLVE_LISTS)
            origin = Origin(request.account_id, request.request_id, f"{utc(time())}Z")
            batch = build(
                draft,
                claim.lists,
                claim.ids,
                origin,
                lost_lists=claim.lost_lists,
                layout=self._layout,
                most_bytes=self._publisher.max_payload_bytes,
            )
            del draft  # its texts may take four times the memory of the body
            record.payloads = len(batch.outgoing)
            record.mark(BUILD)
            batch.outgoing.headers = self._tracing.begin_publish(record)
            await request.slot.enter_window(self._publisher.load_of(batch.outgoing))
            outcomes = await self._publisher.publish(batch.outgoing, deadline=request.deadline)
            record.mark(PUBLISH)
            if claim.is_retry:
                outcomes = outcomes.translate(REFUSED_IS_UNKNOWN)
            answer = answer_for(batch, batch.outcomes_of_messages(outcomes))
            record.queued = answer.queued_count
            if answer.errors:
                record.errors = Counter([row.code for row in answer.errors])
            encoded = encode(answer) if request.form is BULK else _single_answer(answer, claim)
            await claim.store(answer, encoded)
            if request.form is SINGLE and answer.errors:
                raise _refusal_of(answer.errors[0])
            return encode_with_ids(answer, claim.ids.messages) if request.wants_ids else encoded

    async def _answer_dry_run(self, request: SendRequest, draft: Draft, record: RequestRecord) -> bytes:
        """Return the encoded answer to a dry run: what validation and ownership say. Nothing is published."""
        lists = request.lists
        if lists is None:
            lists = await self._queries.resolve_lists(request.account_id, draft.distinct_list_numbers())
            record.mark(RESOLVE_LISTS)
        resolved = drop_unresolved(draft, lists)
        if request.form is BULK:
            rows = sorted(resolved.rows, key=lambda row: row.index)
            return encode(DryRunAnswer(len(resolved.messages), len(rows), rows))
        if resolved.rows:
            raise _refusal_of(resolved.rows[0])
        return encode(SingleDryRunAnswer())

    async def _claim(self, request: SendRequest, draft: Draft, body_sha256: bytes) -> Claim:
        """Take message ids, and return the claim for the batch, not entered yet."""
        block = await self._ids.take(draft.size + self._layout.most_envelopes(draft.list_numbers))
        ids = BatchIds(block.ids[: draft.size], block.ids[draft.size :])
        submission = Submission(
            request.account_id,
            request.idempotency_key or "",
            body_sha256,
            draft.size,
            draft.distinct_list_numbers(),
            request.lists,
            request.deadline,
        )
        return self._idempotency.claim(submission, block, ids)


def _with_ids(stored_answer: bytes, claim: Claim) -> bytes:
    """Return the stored answer to a batch, with the ids of what was queued: those of the first run."""
    answer = decode_answer(stored_answer)
    return encode_with_ids(answer, ids_at(claim.first_position, answer.queued_count + answer.error_count))


def _single_answer(answer: Answer, claim: Claim) -> bytes:
    """Return the encoded answer to a single send; b"" if its message is not queued.

    `Claim.store` does not store the answer then, and the caller gets a refusal.
    """
    return encode(SingleAnswer(True, claim.ids.messages[0], "queued")) if answer.queued_count else b""


def _refusal_of(row: ErrorRow) -> MessageRefused:
    return MessageRefused(row.code, row.error)


def answer_for(batch: Batch, outcomes: bytes) -> Answer:
    """Return the answer: the number of confirmed messages, and an error row for each of the others.

    `outcomes` has one Outcome per message. If none is confirmed, raises OutcomeUnknown if a message is unknown, or else
    QueueUnavailable if the queue refused one. If all are too large, they get error rows: sending them again is no use.
    """
    queued = outcomes.count(Outcome.ACKED)
    rows = batch.rows
    if not queued:
        if Outcome.UNKNOWN in outcomes or any(row.may_be_queued for row in rows):
            raise OutcomeUnknown
        if outcomes.count(Outcome.TOO_LARGE) < len(outcomes):
            raise QueueUnavailable
    if queued < len(outcomes):
        rows = rows + [
            _unqueued_row(batch, position, outcome)
            for position, outcome in enumerate(outcomes)
            if outcome != Outcome.ACKED
        ]
    return Answer(queued, len(rows), sorted(rows, key=lambda row: row.index))


def _unqueued_row(batch: Batch, position: int, outcome: int) -> ErrorRow:
    index, to = batch.indexes[position], batch.recipients[position]
    if outcome == Outcome.UNKNOWN:
        return unknown_row(index, to, batch.ids[position])
    return ErrorRow(index, to, *(TOO_LARGE if outcome == Outcome.TOO_LARGE else QUEUE_REJECTED))
