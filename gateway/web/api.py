"""POST /api/v2/send/bulk: the handler, and the record of each request."""

import asyncio
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial

from aiohttp import web
from aiohttp.typedefs import Handler

from gateway.amqp.confirms import REFUSED_IS_UNKNOWN, Outcome
from gateway.errors import OUTCOME_UNKNOWN, QUEUE_REJECTED, MethodNotAllowed, NotFound, OutcomeUnknown, QueueUnavailable
from gateway.ingest import batch, idempotency, wire
from gateway.ingest.auth import authenticate
from gateway.ingest.wire import Answer, ErrorRow
from gateway.postgres.queries import Account
from gateway.runtime import RUNTIME
from gateway.telemetry.counters import AUTHENTICATE, BUILD, PUBLISH, READ, RESOLVE_LISTS, VALIDATE
from gateway.telemetry.requests import RequestRecord
from gateway.web.answers import REFUSED_WITH, REQUEST_ID, json_answer
from gateway.web.bodies import read_body, size_to_reserve

SEND_BULK = "/api/v2/send/bulk"
OPENAPI = "/openapi.json"
ALLOWED = {SEND_BULK: "POST", OPENAPI: "GET, HEAD"}
RECORD = web.RequestKey("record", RequestRecord)


async def send_bulk(request: web.Request) -> web.Response:
    """The way of the data; each step refuses by raising, and a bad message by a row."""
    runtime, record = request.app[RUNTIME], request[RECORD]
    with runtime.admission.admit() as place:
        account = await authenticate(request.headers, runtime.store)
        record.account_id = account.id
        record.mark(AUTHENTICATE)
        runtime.publisher.refuse_if_full(account.id)
        place.reserve(account.id, size_to_reserve(request))  # only now: without a key nobody takes room from the others
        key = idempotency.sent_key(request.headers)
        body = await read_body(request, runtime.settings.body_timeout_s)
        record.body_bytes = len(body)
        record.mark(READ)
        deadline = asyncio.get_running_loop().time() + runtime.settings.confirm_timeout_s
        draft = batch.validate(wire.decode_bulk(body))
        record.hold(draft.size)
        record.mark(VALIDATE)
        block = await runtime.ids.take(batch.ids_needed(draft, runtime.layout))
        send = partial(_send, request, account, draft, deadline)
        if key is None:
            lists = await runtime.store.find_owned_lists(account.id, draft.distinct_list_numbers())
            return json_answer(200, wire.encode(await send(lists, block.ids)))
        sent = await runtime.idempotency.send_once(account.id, key, body, draft, block, send)
        if sent.is_replayed:
            record.is_replayed = True
        return json_answer(200, sent.answer, {idempotency.REPLAYED: "true"} if sent.is_replayed else {})


async def _send(
    request: web.Request,
    account: Account,
    draft: batch.Draft,
    deadline: float,
    lists: Mapping[str, int],
    ids: list[str],
    may_be_queued: bool = False,
) -> Answer:
    """Build and publish what is the account's own, and say what became of it."""
    runtime, record = request.app[RUNTIME], request[RECORD]
    record.mark(RESOLVE_LISTS)
    prepared = batch.build(
        draft,
        lists,
        ids,
        account_id=account.id,
        accepted_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        request_id=request[REQUEST_ID],
        layout=runtime.layout,
    )
    record.payloads = len(prepared.payloads)
    record.mark(BUILD)
    outcomes = await runtime.publisher.publish(
        prepared.payload_ids,
        prepared.payloads,
        prepared.shards,
        deadline=deadline,
        account_id=account.id,
        headers=runtime.tracing.begin_publish(record) if runtime.tracing else None,
    )
    record.mark(PUBLISH)
    if may_be_queued:
        outcomes = outcomes.translate(REFUSED_IS_UNKNOWN)
    answer = _answer(prepared, prepared.outcomes_of_messages(outcomes))
    record.queued = answer.queued_count
    if answer.errors:
        record.errors = Counter([row.code for row in answer.errors])
    return answer


async def refuse_route(request: web.Request) -> web.Response:
    """Every other path, and every other method. A route like any, so that its `Expect` is not answered by aiohttp."""
    allowed = ALLOWED.get(request.path)
    raise MethodNotAllowed(allowed) if allowed else NotFound


def _answer(prepared: batch.Batch, outcomes: bytes) -> Answer:
    """Count the confirmed and write a row for each of the others. Raises when not a single one is confirmed."""
    queued = outcomes.count(Outcome.ACKED)
    rows = prepared.rows
    if queued < len(outcomes):
        if not queued:
            raise OutcomeUnknown if Outcome.UNKNOWN in outcomes else QueueUnavailable
        rows = rows + [
            _unqueued_row(prepared, position, outcome)
            for position, outcome in enumerate(outcomes)
            if outcome != Outcome.ACKED
        ]
    return Answer(queued, len(rows), sorted(rows, key=lambda row: row.index))


def _unqueued_row(prepared: batch.Batch, position: int, outcome: int) -> ErrorRow:
    index, to = prepared.indexes[position], prepared.messages[position].to
    if outcome == Outcome.UNKNOWN:
        code, sentence = OUTCOME_UNKNOWN
        return ErrorRow(index, to, code, sentence, may_be_queued=True, message_id=prepared.ids[position])
    return ErrorRow(index, to, *QUEUE_REJECTED)


@web.middleware
async def record_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep a record of a caller's request on its way; at its end, its trace and its line in the access log."""
    runtime = request.app[RUNTIME]
    record = request[RECORD] = RequestRecord(runtime.counters)
    if runtime.tracing:
        route = SEND_BULK if request.path == SEND_BULK else ""
        runtime.tracing.begin(record, request.method, route, request.headers)
    status, code = 0, ""
    try:
        response = await handler(request)
        status, code = response.status, response.get(REFUSED_WITH, "")
        return response
    finally:
        record.end(request.get(REQUEST_ID, ""), status, code)
        runtime.request_log.write(record, runtime.tracing.end(record) if runtime.tracing else "")
