"""POST /api/v2/send/bulk: the handler, and the one middleware that turns refusals into answers."""

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from itertools import count
from types import MappingProxyType

import msgspec
from aiohttp import HttpVersion11, hdrs, web
from aiohttp.typedefs import Handler

from gateway import batch, idempotency, wire
from gateway.amqp.confirms import REFUSED_IS_UNKNOWN, Outcome
from gateway.auth import authenticate
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
from gateway.measurements import AUTHENTICATE, BUILD, CANCELLED, OK, OWN, PUBLISH, Stopwatch
from gateway.runtime import RUNTIME
from gateway.store import Account
from gateway.wire import MAX_BODY_BYTES, Answer, ErrorRow

log = logging.getLogger(__name__)

SEND_BULK = "/api/v2/send/bulk"
REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
STOPWATCH = web.RequestKey("stopwatch", Stopwatch)
CODE = web.ResponseKey("code", str)  # why the request was refused
# What a log line, a header and a JSON string can carry as it is.
_is_sane_request_id = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}").fullmatch
_PROCESS, _requests = secrets.token_hex(8), count()  # our ids: unique, and without a call for randomness each time
_JSON_TYPES = (None, "application/json")


async def send_bulk(request: web.Request) -> web.Response:
    """The way of the data; each step refuses by raising, and a bad message by a row."""
    runtime, watch = request.app[RUNTIME], request[STOPWATCH]
    with runtime.admission.admit() as place:
        account = await authenticate(request.headers, runtime.store)
        watch.lap(AUTHENTICATE)
        runtime.publisher.refuse_if_full(account.id)
        place.reserve(account.id, _octets_of_body(request))  # only now: without a key nobody takes room from the others
        key = idempotency.sent_key(request.headers)
        body = await _read_body(request, runtime.settings.body_timeout_s)
        watch.has_read(len(body))
        deadline = asyncio.get_running_loop().time() + runtime.settings.confirm_timeout_s
        draft = batch.validate(wire.decode_bulk(body))
        watch.has_decoded(draft.size)
        block = await runtime.ids.take(batch.ids_needed(draft, runtime.layout))
        send = partial(_send, request, account, draft, deadline)
        if key is None:
            lists = await runtime.store.find_owned_lists(account.id, draft.distinct_list_numbers())
            return _json(200, await send(lists, block.ids))
        sent = await runtime.idempotency.send_once(account.id, key, body, draft, block, send)
        if sent.is_replayed:
            watch.has_replayed()
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
    runtime, watch = request.app[RUNTIME], request[STOPWATCH]
    watch.lap(OWN)
    prepared = batch.build(
        draft,
        lists,
        ids,
        account_id=account.id,
        accepted_at=datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        request_id=request[REQUEST_ID],
        layout=runtime.layout,
    )
    watch.lap(BUILD)
    outcomes = await runtime.publisher.publish(
        prepared.payload_ids, prepared.payloads, prepared.shards, deadline=deadline, account_id=account.id
    )
    watch.lap(PUBLISH)
    if may_be_queued:
        outcomes = outcomes.translate(REFUSED_IS_UNKNOWN)
    answer = _answer(prepared, prepared.outcomes_of_messages(outcomes))
    watch.has_sent(answer)
    return answer


async def refuse_route(request: web.Request) -> web.Response:
    """Every other path, and every other method. A route like any, so that its `Expect` is not answered by aiohttp."""
    raise MethodNotAllowed("POST") if request.path == SEND_BULK else NotFound


def _octets_of_body(request: web.Request) -> int:
    """What to reserve for the body before any of it is read."""
    octets = request.content_length
    if octets is None:  # chunked: it may become the largest allowed
        return MAX_BODY_BYTES if request.can_read_body else 0
    return min(octets, MAX_BODY_BYTES)


async def _read_body(request: web.Request, timeout_s: float) -> bytes:
    """The whole body.

    Raises UnsupportedMediaType, PayloadTooLarge, ExpectationFailed, RequestTimeout or MalformedHttp.
    """
    if not _is_plain_json(request):
        raise UnsupportedMediaType
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise PayloadTooLarge
    if hdrs.EXPECT in request.headers:
        await _continue(request)
    try:
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
    request.writer.output_size = 0  # the answer's own octets are counted from here


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
async def measure_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request its stopwatch, and count how it was answered; around the middleware that answers."""
    measurements = request.app[RUNTIME].measurements
    watch = request[STOPWATCH] = Stopwatch(measurements)
    status, code = CANCELLED
    try:
        response = await handler(request)
        status, code = response.status, response.get(CODE, OK)
    finally:  # also when it was cancelled: its messages are in flight no more
        measurements.finish(watch, status, code)
    return response


@web.middleware
async def answer_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and every refusal its JSON answer; the only place that catches Exception."""
    request_id = sane_request_id(request.headers.getall(REQUEST_ID_HEADER, []))
    request[REQUEST_ID] = request_id
    try:
        response = await handler(request)
    except GatewayError as error:
        response = refuse(error)
    except web.HTTPMethodNotAllowed as error:
        response = refuse(MethodNotAllowed(", ".join(sorted(error.allowed_methods))))
    except web.HTTPNotFound:
        response = refuse(NotFound())
    except Exception:
        log.exception("request %s failed", request_id)
        response = refuse(InternalError(f"{InternalError.sentence}: {request_id}"))
    response.headers[REQUEST_ID_HEADER] = request_id
    runtime = request.app.get(RUNTIME)
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
    response[CODE] = error.code
    return response


def _json(status: int, body: object, headers: Mapping[str, str] = MappingProxyType({})) -> web.Response:
    return web.Response(
        status=status,
        body=body if isinstance(body, bytes) else wire.encode(body),
        headers={hdrs.CONTENT_TYPE: "application/json", hdrs.SERVER: "sms-gateway", **headers},
    )
