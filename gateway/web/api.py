"""The API: POST /api/v2/send/bulk and /api/v2/send, and the record of each request."""

import asyncio
import re

from aiohttp import web
from aiohttp.typedefs import Handler
from multidict import CIMultiDictProxy

from gateway.errors import MethodNotAllowed, NotFound
from gateway.ingest import auth, idempotency
from gateway.ingest.admission import Slot
from gateway.ingest.pipeline import BULK, SINGLE, Form, SendRequest, draft_early
from gateway.runtime import RUNTIME, Runtime
from gateway.telemetry.counters import AUTHENTICATE, READ, VALIDATE, WAIT
from gateway.telemetry.requests import RequestRecord
from gateway.web import openapi
from gateway.web.answers import REFUSED_WITH, REQUEST_ID, answer_every_request
from gateway.web.bodies import expect_later, memory_cost, read_arrived, read_body, size_to_reserve
from gateway.web.connections import SLOT, DirectAnswer

SEND, SEND_BULK = "/api/v2/send", "/api/v2/send/bulk"
ALLOWED = {SEND: "POST", SEND_BULK: "POST", openapi.PATH: openapi.METHODS}
ALLOWED_METHODS = web.AppKey("allowed_methods", dict[str, str])
API_KEY_HEADER = "X-Api-Key"
IDEMPOTENCY_HEADER = "Idempotency-Key"
REPLAYED_HEADERS = {"Idempotent-Replayed": "true"}
PREFER_HEADER = "Prefer"
PREFERENCE_HEADERS = {"Preference-Applied": "return=representation"}
# A comma or a semicolon in a quoted string is no separator (RFC 9110, 5.6.4). A string that is not closed ends with its
# header line. Each pattern takes linear time, because callers choose the text.
_preferences_in = re.compile(r'(?:[^",]+|"(?:[^"\\]|\\.?)*"?)+').findall
_is_return = re.compile(r"\s*return\s*(?:[=;]|$)", re.IGNORECASE).match
_value_of_return = re.compile(r'[^=;]+=\s*("(?:[^"\\]|\\.)*"|[^\s;"]+)\s*(?:;|$)').match
RECORD = web.RequestKey("record", RequestRecord)


def make_app(runtime: Runtime) -> web.Application:
    """Return the application for callers."""
    app = web.Application(middlewares=[record_every_request, answer_every_request])
    app[RUNTIME] = runtime
    app.router.add_post(SEND_BULK, send_bulk, expect_handler=expect_later)
    app.router.add_post(SEND, send_single, expect_handler=expect_later)
    if runtime.settings.api_docs == "on":
        openapi.add_page(app, expect_later)
        app[ALLOWED_METHODS] = ALLOWED | dict.fromkeys(openapi.PAGE_PATHS, openapi.METHODS)
    else:
        openapi.add_document(app, expect_later)
        app[ALLOWED_METHODS] = ALLOWED
    app.router.add_route("*", "/{path:.*}", refuse_route, expect_handler=expect_later)
    return app


async def send_bulk(request: web.Request) -> web.StreamResponse:
    """Send a batch."""
    return await _send(request, BULK)


async def send_single(request: web.Request) -> web.StreamResponse:
    """Send one message, as a batch of one."""
    return await _send(request, SINGLE)


async def _send(request: web.Request, form: Form) -> web.StreamResponse:
    """Admit, authenticate, read the body, and answer with what the pipeline made of the batch.

    A small body that has arrived with its head is decoded before the key is looked up. If it is refused, the pipeline
    raises the refusal later: the refusals of the key come first.
    """
    runtime, record = request.app[RUNTIME], request[RECORD]
    request[SLOT] = slot = runtime.admission.admit()  # the connection gives it back
    keys = request.headers.getall(API_KEY_HEADER, [])
    for key in keys:
        runtime.admission.check_refused_key(key)
    key_sha256 = auth.digest(keys)
    body = read_arrived(request)
    draft = draft_early(body, form) if body else None
    if draft is not None:
        record.mark(VALIDATE)
    account = await auth.authenticate(key_sha256, runtime.queries, draft.distinct_list_numbers() if draft else ())
    record.account_id = account.id
    runtime.key_watch.note(key_sha256)
    record.mark(AUTHENTICATE)
    await slot.enter(account.id, size_to_reserve(request), keys[0])
    if slot.waited_s:
        record.mark(WAIT)
    received = await _receive(request, form, slot, account.id, body)
    if draft is not None:
        received.draft, received.lists = draft, account.lists
    del body, draft  # `received` alone holds them now, and the pipeline empties it
    answer = await runtime.pipeline.run(received, record)
    slot.hold_answer(len(answer))
    headers = REPLAYED_HEADERS if record.is_replayed else {}
    if received.wants_ids and not record.is_dry_run:  # a dry run takes no ids
        headers = headers | PREFERENCE_HEADERS
    return DirectAnswer(answer, headers)


async def _receive(request: web.Request, form: Form, slot: Slot, account_id: int, body: bytes | None) -> SendRequest:
    """Return what the pipeline needs of a request. Read the body if `body` is None, and reserve its cost.

    Raises InvalidIdempotencyKey, Overloaded, and what read_body raises.
    """
    settings, record = request.app[RUNTIME].settings, request[RECORD]
    key = idempotency.parse_key(request.headers.getall(IDEMPOTENCY_HEADER, []))
    if body is None:
        body = await read_body(request, settings.body_timeout_s)
        record.mark(READ)
    record.body_bytes = len(body)
    slot.reserve_total(memory_cost(body))
    deadline = asyncio.get_running_loop().time() + settings.confirm_timeout_s - slot.waited_s
    wants_ids = form is BULK and prefers_representation(request.headers)
    return SendRequest(form, account_id, slot, request[REQUEST_ID], body, key, deadline, wants_ids=wants_ids)


def prefers_representation(headers: CIMultiDictProxy[str]) -> bool:
    """Return True if the first `return` among the preferences is `return=representation` (RFC 7240)."""
    for line in headers.getall(PREFER_HEADER, ()):
        for preference in _preferences_in(line):
            if _is_return(preference):
                value = _value_of_return(preference)
                return value is not None and _unquote(value[1]).lower() == "representation"
    return False


def _unquote(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1]) if word.startswith('"') else word


def _path_of(request: web.Request) -> str:
    """Return the path that the router compares: `send%2Fbulk` is not `send/bulk`, as it is in `request.path`."""
    return request.rel_url.path_safe


async def refuse_route(request: web.Request) -> web.Response:
    """Refuse every other path and method. aiohttp's own refusals would first answer an `Expect` header."""
    allowed = request.app[ALLOWED_METHODS].get(_path_of(request))
    raise MethodNotAllowed(allowed) if allowed else NotFound


@web.middleware
async def record_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Keep a record of each request; at its end, write its trace and its line in the request log."""
    runtime = request.app[RUNTIME]
    record = request[RECORD] = RequestRecord(runtime.counters)
    path = _path_of(request)
    route = path if path in (SEND_BULK, SEND) else ""
    runtime.tracing.begin(record, request.method, route, request.headers)
    status, code = 0, ""
    try:
        response = await handler(request)
        status, code = response.status, response.get(REFUSED_WITH, "")
        return response
    finally:
        record.end(request.get(REQUEST_ID, ""), status, code)
        runtime.request_log.write(record, runtime.tracing.end(record))
