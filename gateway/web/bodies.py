"""Reading a request's body: media type, size, cost in memory, timeout, `Expect: 100-continue`."""

import asyncio
from contextlib import nullcontext

from aiohttp import HttpVersion11, hdrs, web

from gateway.errors import (
    Draining,
    ExpectationFailed,
    GatewayError,
    MalformedHttp,
    PayloadTooLarge,
    RequestTimeout,
    UnsupportedMediaType,
    drop_tracebacks,
)
from gateway.ingest.wire import MAX_BODY_BYTES

# The factor for a body with characters beyond ASCII, or `\u` escapes. Python stores a text with the width of its widest
# character: with one emoji, four bytes for each. But 2 is enough: such a body takes 4.0 times its bytes only until its
# payloads are built. Then, until its confirms, it takes 2.6 times its bytes, like any other
# (docs/evidence/performance.md, "Large bodies"). tests/hostile/test_memory.py checks the bound of a process.
WIDE_FACTOR = 2
# Up to this size, a body that arrives with its head is decoded before the API key is looked up: key and lists then take
# one query. Decoded, it may take seven times its bytes, in each slot (tests/hostile/test_memory_of_bodies.py).
SMALL_REQUEST_BYTES = 32 * 1024
_JSON_TYPES = (None, "application/json")


def read_arrived(request: web.Request) -> bytes | None:
    """Return the body of a small request that has arrived with its head; None for any other request.

    Nothing is refused here: `read_body` does that, after the key is checked.
    """
    content = request.content
    if (
        not content.is_eof()
        or content.exception() is not None
        or content.total_bytes > SMALL_REQUEST_BYTES
        or hdrs.EXPECT in request.headers
        or not _is_plain_json(request)
    ):
        return None
    return content.read_nowait()


def size_to_reserve(request: web.Request) -> int:
    """Return the bytes to reserve for the body before any of it is read."""
    size = request.content_length
    if size is None:  # chunked: it may grow to the largest allowed
        return MAX_BODY_BYTES if request.can_read_body else 0
    return min(size, MAX_BODY_BYTES)


async def read_body(request: web.Request, timeout_s: float) -> bytes:
    """Read the whole body.

    Raises UnsupportedMediaType, PayloadTooLarge, ExpectationFailed, RequestTimeout, MalformedHttp, or Draining when
    the process ends before the body has arrived.
    """
    if not _is_plain_json(request):
        raise UnsupportedMediaType
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise PayloadTooLarge
    body = bytearray()
    refusal = await _read_into(body, request, timeout_s)
    if refusal is not None:
        # A refusal raised in _read_into would have the original error as its context: the error's traceback reaches the
        # stream that holds it, a reference cycle.
        body.clear()
        raise refusal
    return bytes(body)


async def _read_into(body: bytearray, request: web.Request, timeout_s: float) -> GatewayError | None:
    """Read the body; return the refusal if it cannot be read. Raises ExpectationFailed."""
    try:
        if hdrs.EXPECT in request.headers:
            await _continue(request)
        request.content.set_read_chunk_size(MAX_BODY_BYTES)  # no pause of the reading: the bytes are reserved
        # Small bodies arrive while the key is looked up: no timer for them.
        async with nullcontext() if request.content.is_eof() else asyncio.timeout(timeout_s):
            while piece := await request.content.readany():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    return PayloadTooLarge()
            return None
    except TimeoutError as error:
        drop_tracebacks(error)
        return RequestTimeout()
    except Draining as error:
        drop_tracebacks(error)
        return Draining()
    except (web.RequestPayloadError, ConnectionError) as error:  # a broken chunk, or the caller hung up
        drop_tracebacks(error)
        return MalformedHttp()
    except RuntimeError:  # aiohttp's error when the caller hung up before the first read
        if request.transport is not None:
            raise
        return MalformedHttp()


def memory_cost(body: bytes) -> int:
    """Return the bytes to reserve for a body that has arrived."""
    # rfind takes less than half the time of `in` (scripts/bench bodies, newlines).
    is_narrow = body.isascii() and not (b"\\" in body and body.rfind(b"\\u") >= 0)
    return len(body) if is_narrow else WIDE_FACTOR * len(body)


async def expect_later(_request: web.Request) -> None:
    """Send no `100 Continue` yet: aiohttp calls this before the handler, and so before the key is checked."""


def _is_plain_json(request: web.Request) -> bool:
    if any(coding.lower() not in ("", "identity") for coding in request.headers.getall(hdrs.CONTENT_ENCODING, [])):
        return False
    raw = request.headers.get(hdrs.CONTENT_TYPE)
    if raw in _JSON_TYPES:  # nearly every request: no parameters to parse
        return True
    charset = (request.charset or "utf-8").lower()
    return request.content_type == "application/json" and charset in ("utf-8", "utf8")


async def _continue(request: web.Request) -> None:
    if request.headers[hdrs.EXPECT].lower() != "100-continue":
        raise ExpectationFailed
    if request.version < HttpVersion11:  # RFC 9110, 10.1.1: an HTTP/1.0 client does not understand the answer
        return
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # the answer's own bytes are counted from here
