"""JSON answers: refusals, request ids, and the middleware that gives every request exactly one answer."""

import logging
import re
import secrets
from collections.abc import Mapping
from itertools import count

import msgspec
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from gateway.errors import (
    GatewayError,
    InternalError,
    MalformedHttp,
    MethodNotAllowed,
    NotFound,
    OutcomeUnknown,
    drop_tracebacks,
)
from gateway.runtime import RUNTIME
from gateway.web.connections import JSON_HEADERS, accept_version, is_chunked

log = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-Id"
REQUEST_ID = web.RequestKey("request_id", str)
REFUSED_WITH = web.ResponseKey("refused_with", str)
UNKNOWN_CODING = "The only Transfer-Encoding this service takes is chunked"
# Characters that a log line, a header and a JSON string can carry unescaped.
_is_safe_request_id = re.compile(r"[0-9A-Za-z._:/+=@-]{1,128}").fullmatch
# Our own ids are a random prefix for the process and a counter: unique, without a call for randomness per request.
_PROCESS, _requests = secrets.token_hex(8), count()


class Refused(msgspec.Struct, omit_defaults=True):
    """The body of the answer to a request that was refused as a whole."""

    error: str
    code: str
    message_id: str = ""  # of a single send whose outcome is unknown


def json_answer(status: int, body: bytes, headers: Mapping[str, str]) -> web.Response:
    """Return an answer with encoded JSON as its body."""
    return web.Response(
        status=status,
        body=body,
        headers={**JSON_HEADERS, **headers},
    )


def refuse(error: GatewayError) -> web.Response:
    """Return the answer to a request that is refused as a whole."""
    message_id = error.message_id if isinstance(error, OutcomeUnknown) else ""
    body = msgspec.json.encode(Refused(str(error), error.code, message_id))
    response = json_answer(error.status, body, error.headers())
    response[REFUSED_WITH] = error.code
    return response


def refuse_unhandled(error: GatewayError, cause: BaseException | None) -> web.Response:
    """Return the answer to a request that no handler sees. Log an InternalError, with its cause if that is known."""
    request_id = request_id_for([])
    if isinstance(error, InternalError):
        log.error("request %s failed outside its handler", request_id, exc_info=cause)
    response = refuse(error)
    response.headers[REQUEST_ID_HEADER] = request_id
    response.force_close()
    return response


def request_id_for(given: list[str]) -> str:
    """Return the caller's request id if logs and headers can carry it, otherwise a new one."""
    if len(given) == 1 and _is_safe_request_id(given[0]):
        return given[0]
    return f"{_PROCESS}-{next(_requests):x}"


@web.middleware
async def answer_every_request(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Give every request an id, and turn every exception into its JSON answer."""
    request_id = request[REQUEST_ID] = request_id_for(request.headers.getall(REQUEST_ID_HEADER, []))
    try:
        if not accept_version(request):
            raise MalformedHttp
        codings = request.headers.getall(hdrs.TRANSFER_ENCODING, None)
        if codings is not None and ",".join(codings).lower() != "chunked":
            # Another coding, such as `gzip, chunked`, would reach the JSON decoder still encoded. An empty one is no
            # coding for the parser. For a proxy, what comes behind may be a body: it is no other request.
            raise MalformedHttp(UNKNOWN_CODING)
        response = await handler(request)
    except GatewayError as error:
        response = refuse(error)
        if isinstance(error, MalformedHttp):
            response.force_close()  # the start of the connection's next request is unknown
        drop_tracebacks(error)
    except web.HTTPMethodNotAllowed as error:
        response = refuse(MethodNotAllowed(", ".join(sorted(error.allowed_methods))))
    except web.HTTPNotFound:
        response = refuse(NotFound())
    except Exception as error:
        log.exception("request %s failed", request_id)
        drop_tracebacks(error)
        response = refuse(InternalError(f"{InternalError.sentence}: {request_id}"))
    response.headers[REQUEST_ID_HEADER] = request_id
    if is_chunked(request):
        # aiohttp 3.14.5 reads the last trailer of a chunked request as the first header of the connection's next
        # request. Behind a load balancer that may be another caller's.
        response.force_close()
    runtime = request.app.get(RUNTIME)
    if runtime is not None and runtime.draining:
        response.force_close()  # the caller's next request then goes to a process that stays
    return response
