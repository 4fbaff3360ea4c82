"""Reading a request's body: media type, size, deadline, `Expect: 100-continue`."""

import asyncio

from aiohttp import HttpVersion11, hdrs, web

from gateway.errors import ExpectationFailed, MalformedHttp, PayloadTooLarge, RequestTimeout, UnsupportedMediaType
from gateway.ingest.wire import MAX_BODY_BYTES

_JSON_TYPES = (None, "application/json")


def size_to_reserve(request: web.Request) -> int:
    """Return the bytes to reserve for the body before any of it is read."""
    size = request.content_length
    if size is None:  # chunked: it may grow to the largest allowed
        return MAX_BODY_BYTES if request.can_read_body else 0
    return min(size, MAX_BODY_BYTES)


async def read_body(request: web.Request, timeout_s: float) -> bytes:
    """Read the whole body.

    Raises UnsupportedMediaType, PayloadTooLarge, ExpectationFailed, RequestTimeout or MalformedHttp.
    """
    if not _is_plain_json(request):
        raise UnsupportedMediaType
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise PayloadTooLarge
    try:
        if hdrs.EXPECT in request.headers:
            await _continue(request)
        if request.content.is_eof():  # small bodies arrive while the key is looked up: no timer for them
            return await request.read()
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise PayloadTooLarge from None
    except TimeoutError:
        raise RequestTimeout from None
    except (web.RequestPayloadError, ConnectionError) as error:  # a broken chunk, or the caller hung up
        raise MalformedHttp from error
    except RuntimeError as error:  # aiohttp's error when the caller hung up before the first read
        if request.transport is not None:
            raise
        raise MalformedHttp from error


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
