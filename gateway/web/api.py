"""POST /api/v2/send/bulk: the handler, and the one middleware that turns refusals into answers."""

import asyncio
import logging
import re
import secrets
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import count
from types import MappingProxyType

import msgspec
from aiohttp import HttpVersion10, HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

from gateway.amqp.confirms import REFUSED_IS_UNKNOWN, Outcome
from gateway.errors import (
    OUTCOME_UNKNOWN,
    QUEUE_REJECTED,
    ExpectationFailed,
    GatewayError,
    InternalError,
    MalformedHttp,
    MethodNotAllowed,
    NotFound,
    OutcomeUnknown,
    PayloadTooLarge,
    QueueUnavailable,
    RequestTimeout,
    UnsupportedMediaType,
)
from gateway.ingest import batch, idempotency, wire
from gateway.ingest.auth import authenticate
from gateway.ingest.wire import MAX_BODY_BYTES, Answer, ErrorRow
from gateway.postgres.queries import Account
from gateway.runtime import RUNTIME
from gateway.telemetry.counters import AUTHENTICATE, BUILD, PUBLISH, READ, RESOLVE_LISTS, VALIDATE
from gateway.telemetry.requests import RequestRecord

log = logging.getLogger(__name__)

SEND_BULK = "/api/v2/send/bulk"
OPENAPI = "/openapi.json"
ALLOWED = {SEND_BULK: "POST", OPENAPI: "GET, HEAD"}
REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
RECORD = web.RequestKey("record", RequestRecord)
REFUSED_WITH = web.ResponseKey("refused_with", str)
# What a log line, a header and a JSON string can carry as it is.
_is_sane_request_id = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}").fullmatch
_PROCESS, _requests = secrets.token_hex(8), count()  # our ids: unique, and without a call for randomness each time
_SPOKEN = (HttpVersion11, HttpVersion10)  # the parser takes 0.9 and 2.0 as well
_JSON_TYPES = (None, "application/json")


async def send_bulk(request: web.Request) -> web.Response:
    """The way of the data; each step refuses by raising, and a bad message by a row."""
    runtime, record = request.app[RUNTIME], request[RECORD]
    with runtime.admission.admit() as place:
        account = await authenticate(request.headers, runtime.store)
        record.account_id = account.id
        record.mark(AUTHENTICATE)
        runtime.publisher.refuse_if_full(account.id)
        place.reserve(account.id, _bytes_of_body(request))  # only now: without a key nobody takes room from the others
        key = idempotency.sent_key(request.headers)
        body = await _read_body(request, runtime.settings.body_timeout_s)
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
            return _json(200, await send(lists, block.ids))
        sent = await runtime.idempotency.send_once(account.id, key, body, draft, block, send)
        if sent.is_replayed:
            record.is_replayed = True
        return _json(200, sent.answer, {idempotency.REPLAYED: "true"} if sent.is_replayed else {})


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


def _bytes_of_body(request: web.Request) -> int:
    """What to reserve for the body before any of it is read."""
    size = request.content_length
    if size is None:  # chunked: it may become the largest allowed
        return MAX_BODY_BYTES if request.can_read_body else 0
    return min(size, MAX_BODY_BYTES)


async def _read_body(request: web.Request, timeout_s: float) -> bytes:
    """The whole body.

    Raises UnsupportedMediaType, PayloadTooLarge, ExpectationFailed, RequestTimeout or MalformedHttp.
    """
    if not _is_plain_json(request):
        raise UnsupportedMediaType
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise PayloadTooLarge
    try:
        if hdrs.EXPECT in request.headers:
            await _continue(request)
        if request.content.is_eof():  # it came while the key was looked up, as small ones do: no timer
            return await request.read()
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise PayloadTooLarge from None
    except TimeoutError:
        raise RequestTimeout from None
    except (web.RequestPayloadError, ConnectionError) as error:
        raise MalformedHttp from error  # a broken chunk, or the caller hung up in the middle
    except RuntimeError as error:  # how aiohttp says that the caller was gone before we came to read
        if request.transport is not None:
            raise
        raise MalformedHttp from error


def _is_plain_json(request: web.Request) -> bool:
    if any(coding.lower() not in ("", "identity") for coding in request.headers.getall(hdrs.CONTENT_ENCODING, [])):
        return False
    raw = request.headers.get(hdrs.CONTENT_TYPE)
    if raw in _JSON_TYPES:  # nearly every request: spares the parsing of parameters
        return True
    return request.content_type == "application/json" and (request.charset or "utf-8").lower() in (
        "utf-8",
        "utf8",
    )


async def expect_later(_request: web.Request) -> None:
    """Ask for no body yet: aiohttp calls this before the handler, and so before the key has been looked at."""


async def _continue(request: web.Request) -> None:
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        raise ExpectationFailed
    if request.version < HttpVersion11:  # RFC 9110, 10.1.1: such a client cannot know what it would be told
        return
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer's own bytes are counted from here


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


@web.middleware
async def answer_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and every refusal its JSON answer; the only place that catches Exception."""
    request_id = sane_request_id(request.headers.getall(REQUEST_ID_HEADER, []))
    request[REQUEST_ID] = request_id
    try:
        if request._version not in _SPOKEN:
            request._version = HttpVersion11  # aiohttp answers in the version that it was asked in
            raise MalformedHttp
        response = await handler(request)
    except GatewayError as error:
        response = refuse(error)
        if isinstance(error, MalformedHttp):
            response.force_close()  # where its next request would begin is anybody's guess
    except web.HTTPMethodNotAllowed as error:
        response = refuse(MethodNotAllowed(", ".join(sorted(error.allowed_methods))))
    except web.HTTPNotFound:
        response = refuse(NotFound())
    except Exception:
        log.exception("request %s failed", request_id)
        response = refuse(InternalError(f"{InternalError.sentence}: {request_id}"))
    response.headers[REQUEST_ID_HEADER] = request_id
    runtime = request.app.get(RUNTIME)
    if request._message.chunked:
        # aiohttp 3.14.5 takes the last trailer of a chunked request for the first header of the connection's next one,
        # and that may be another caller's: a load balancer sends everyone's over the same connection.
        response.force_close()
    if runtime is not None and runtime.draining:
        response.force_close()  # so that the caller's next request goes to a process that stays
    return response


def sane_request_id(given: list[str]) -> str:
    """The caller's id if it is one that logs and headers can carry, else one of ours."""
    if len(given) == 1 and _is_sane_request_id(given[0]):
        return given[0]
    return f"{_PROCESS}-{next(_requests):x}"


class Refused(msgspec.Struct):
    """The answer to a request that was refused as a whole."""

    error: str
    code: str


def refuse(error: GatewayError) -> web.Response:
    """The answer to a refused request."""
    response = _json(error.status, Refused(str(error), error.code), error.headers())
    response[REFUSED_WITH] = error.code
    return response


def _json(status: int, body: object, headers: Mapping[str, str] = MappingProxyType({})) -> web.Response:
    return web.Response(
        status=status,
        body=body if isinstance(body, bytes) else wire.encode(body),
        headers={hdrs.CONTENT_TYPE: "application/json", hdrs.SERVER: "sms-gateway", **headers},
    )
