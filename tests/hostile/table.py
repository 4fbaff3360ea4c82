"""Malformed and hostile requests, and the exact answer to each.

A request is the bytes on the wire. KEY and LIST stand for a valid key and a list of its account, of the same length as
the real ones. The connection after the answer:

    KEPT     another request over it is answered; never after a chunked request, see "a trailer is never a header"
    CLOSED   the server closes it
    UNREAD   the answer came before the body: the server reads the rest for a moment, then it closes
"""

import gzip
from enum import Enum, auto
from typing import NamedTuple

import msgspec

KEY = b"trk_" + b"K" * 32
LIST = b"+1LLLLLLLLLLLLL"
FOREIGN_KEY = b"trk_" + b"F" * 32  # of another account
FOREIGN_LIST = b"+1FFFFFFFFFFFFF"
REVOKED_KEY = b"trk_" + b"R" * 32
SUSPENDED_KEY = b"trk_" + b"S" * 32
INACTIVE_LIST = b"+1IIIIIIIIIIIII"  # of the good key's account
PATH = b"/api/v2/send/bulk"

GOOD = b'{"to":"+14155551234","list_number":"' + LIST + b'","body":"Hello {{messageId}}"}'
ONE = b'{"messages":[' + GOOD + b"]}"
LARGEST = 5_242_880


class Then(Enum):
    """The state of the connection after the answer."""

    KEPT = auto()
    CLOSED = auto()
    UNREAD = auto()


KEPT, CLOSED, UNREAD = Then.KEPT, Then.CLOSED, Then.UNREAD


class Row(NamedTuple):
    """A request and its answer: the status and the code, or the status and the number of queued messages."""

    name: str
    request: bytes
    answer: str
    then: Then = KEPT


def head(*lines: bytes, first: bytes = b"POST " + PATH + b" HTTP/1.1", host: bytes | None = b"Host: gateway") -> bytes:
    """Return a request line and headers."""
    return b"\r\n".join([first, *([host] if host is not None else []), *lines, b"", b""])


def post(
    body: bytes = ONE,
    *lines: bytes,
    key: bytes | None = KEY,
    first: bytes = b"POST " + PATH + b" HTTP/1.1",
    host: bytes | None = b"Host: gateway",
) -> bytes:
    """Return a request with a key, a body and more header lines."""
    keys = [b"X-Api-Key: " + key] if key is not None else []
    return head(*keys, b"Content-Length: %d" % len(body), *lines, first=first, host=host) + body


def chunked(*chunks: bytes, lines: tuple[bytes, ...] = (), end: bytes = b"0\r\n\r\n") -> bytes:
    """Return a request with a key, whose body comes in these chunks."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head(b"X-Api-Key: " + KEY, b"Transfer-Encoding: chunked", *lines) + body + end


def first_line(line: bytes) -> bytes:
    """Return a valid request under another request line."""
    return post(first=line)


def padded(size: int) -> bytes:
    """Return a valid body of `size` bytes."""
    return ONE[:-1] + b" " * (size - len(ONE)) + ONE[-1:]


MALFORMED = ("400 malformed_http", CLOSED)

# fmt: off
KEYS = [
    Row("no key", post(key=None), "401 missing_api_key"),
    Row("empty key", post(key=b""), "401 missing_api_key"),
    Row("a key of spaces", post(key=b"    "), "401 missing_api_key"),
    Row("unknown key", post(key=b"trk_" + b"0" * 32), "401 invalid_api_key"),
    Row("last character wrong", post(key=KEY[:-1] + b"!"), "401 invalid_api_key"),
    Row("one character more", post(key=KEY + b"K"), "401 invalid_api_key"),
    Row("another case", post(key=KEY.upper()), "401 invalid_api_key"),
    Row("bytes ff fe e9", post(key=b"\xff\xfe\xe9"), "401 invalid_api_key"),
    Row("two headers", post(ONE, b"X-Api-Key: " + KEY), "401 invalid_api_key"),
    Row("two headers, the first empty", post(ONE, b"X-Api-Key: " + KEY, key=b""), "401 invalid_api_key"),
    Row("two keys in one header", post(key=KEY + b", " + KEY), "401 invalid_api_key"),
    Row("8 kB", post(key=b"K" * 8_000), "401 invalid_api_key"),
    Row("SQL", post(key=b"trk_' OR 1=1 --"), "401 invalid_api_key"),
    Row("revoked", post(key=REVOKED_KEY), "401 invalid_api_key"),
    Row("suspended", post(key=SUSPENDED_KEY), "403 account_suspended"),
    Row("in Authorization", post(ONE, b"Authorization: Bearer " + KEY, key=None), "401 missing_api_key"),
    Row("in the query", post(key=None, first=b"POST " + PATH + b"?X-Api-Key=" + KEY + b" HTTP/1.1"), "401 missing_api_key"),
    Row("in a cookie", post(ONE, b"Cookie: X-Api-Key=" + KEY, key=None), "401 missing_api_key"),
    Row("with an underscore for the dash", post(ONE, b"X_Api_Key: " + KEY, key=None), "401 missing_api_key"),
    Row("in a trailer", head(b"Transfer-Encoding: chunked", b"Trailer: X-Api-Key") + b"%x\r\n%b\r\n0\r\nX-Api-Key: %b\r\n\r\n" % (len(ONE), ONE, KEY), "401 missing_api_key", CLOSED),
]

LINES = [
    Row("GET", head(first=b"GET " + PATH + b" HTTP/1.1"), "405 method_not_allowed"),
    Row("PUT", first_line(b"PUT " + PATH + b" HTTP/1.1"), "405 method_not_allowed"),
    Row("DELETE", first_line(b"DELETE " + PATH + b" HTTP/1.1"), "405 method_not_allowed"),
    Row("OPTIONS", head(first=b"OPTIONS " + PATH + b" HTTP/1.1"), "405 method_not_allowed"),
    Row("OPTIONS *", head(first=b"OPTIONS * HTTP/1.1"), "404 not_found"),
    Row("TRACE", head(first=b"TRACE " + PATH + b" HTTP/1.1"), "405 method_not_allowed"),
    Row("CONNECT", head(first=b"CONNECT gateway:443 HTTP/1.1"), "404 not_found"),
    Row("a method in lower case", first_line(b"post " + PATH + b" HTTP/1.1"), *MALFORMED),
    Row("an unknown method", first_line(b"SEND " + PATH + b" HTTP/1.1"), *MALFORMED),
    Row("a method of 100 kB", b"P" * 100_000 + b" / HTTP/1.1\r\n\r\n", *MALFORMED),
    Row("unknown path", first_line(b"POST /api/v2/sends HTTP/1.1"), "404 not_found"),
    Row("a slash more", first_line(b"POST " + PATH + b"/ HTTP/1.1"), "404 not_found"),
    Row("two slashes", first_line(b"POST /api/v2//send/bulk HTTP/1.1"), "404 not_found"),
    Row("dots", first_line(b"POST /api/v2/x/../send/bulk HTTP/1.1"), "404 not_found"),
    Row("out of the root", first_line(b"GET /../../etc/passwd HTTP/1.1"), "404 not_found"),
    Row("another case", first_line(b"POST /API/v2/send/bulk HTTP/1.1"), "404 not_found"),
    Row("NUL, percent-encoded", first_line(b"POST " + PATH + b"%00 HTTP/1.1"), "404 not_found"),
    Row("CRLF, percent-encoded", first_line(b"GET /%0d%0aX-Injected:%20yes HTTP/1.1"), "404 not_found"),
    Row("broken percent-encoding", first_line(b"POST " + PATH + b"%zz%f HTTP/1.1"), "404 not_found"),
    Row("percent-encoded invalid UTF-8", first_line(b"POST /%ff%fe HTTP/1.1"), "404 not_found"),
    Row("a letter percent-encoded is the same path", first_line(b"POST /api/v2/send/%62ulk HTTP/1.1"), "200 1"),
    Row("a query is ignored", first_line(b"POST " + PATH + b"?a=1&b[]=%00 HTTP/1.1"), "200 1"),
    Row("UTF-8 in the path", first_line("POST /schöne/grüße HTTP/1.1".encode()), *MALFORMED),
    Row("bytes over 127 in the path", first_line(b"POST /\xff\xfe HTTP/1.1"), *MALFORMED),
    Row("NUL in the path", first_line(b"POST " + PATH + b"\x00 HTTP/1.1"), *MALFORMED),
    Row("a space in the path", first_line(b"POST /api v2 HTTP/1.1"), *MALFORMED),
    Row("a path of 8,000 bytes", first_line(b"POST /" + b"a" * 8_000 + b" HTTP/1.1"), "404 not_found"),
    Row("a path of 9,000 bytes", first_line(b"POST /" + b"a" * 9_000 + b" HTTP/1.1"), *MALFORMED),
    Row("a path of 1 MB", first_line(b"POST /" + b"a" * 1_000_000 + b" HTTP/1.1"), *MALFORMED),
    Row("a query of 9,000 bytes", first_line(b"POST " + PATH + b"?" + b"a" * 9_000 + b" HTTP/1.1"), *MALFORMED),
    Row("absolute-form", first_line(b"POST http://gateway" + PATH + b" HTTP/1.1"), "200 1"),
    Row("absolute-form, another host", first_line(b"POST http://evil.example" + PATH + b" HTTP/1.1"), "200 1"),
    Row("absolute-form without a host", first_line(b"POST http:// HTTP/1.1"), *MALFORMED),
    Row("absolute-form with a bad port", first_line(b"POST http://gateway:99999" + PATH + b" HTTP/1.1"), *MALFORMED),
    Row("HTTP/1.0", first_line(b"POST " + PATH + b" HTTP/1.0"), "200 1", CLOSED),
    Row("HTTP/0.9", b"GET " + PATH + b"\r\n\r\n", *MALFORMED),
    Row("HTTP/2.0", first_line(b"POST " + PATH + b" HTTP/2.0"), *MALFORMED),
    Row("HTTP/1.2", first_line(b"POST " + PATH + b" HTTP/1.2"), *MALFORMED),
    Row("HTTP/9.9", first_line(b"POST " + PATH + b" HTTP/9.9"), *MALFORMED),
    Row("HTTP/2 by prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), *MALFORMED),
    Row("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64), *MALFORMED),
    Row("SSH", b"SSH-2.0-OpenSSH_9.6\r\n", *MALFORMED),
    Row("AMQP", b"AMQP\x00\x00\x09\x01", *MALFORMED),
    Row("PROXY protocol", b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n" + post(), *MALFORMED),
    Row("binary", bytes(range(128, 256)) * 100, *MALFORMED),
    Row("blank lines first", b"\r\n\r\n" + post(), "200 1"),
]

HEADERS = [
    Row("no Host", post(host=None), *MALFORMED),
    Row("two Hosts", post(ONE, b"Host: evil.example"), *MALFORMED),
    Row("a Host with a path", post(host=b"Host: gateway/evil?x"), "200 1"),
    Row("an empty Host", post(host=b"Host:"), "200 1"),
    Row("obs-fold", post(ONE, b"X-Folded: a", b" b"), *MALFORMED),
    Row("obs-fold before the first header", post(host=b" Host: gateway"), *MALFORMED),
    Row("bare LF", post().replace(b"\r\n", b"\n", 3), *MALFORMED),
    Row("bare CR", post(ONE, b"X-A: a\rX-B: b"), *MALFORMED),
    Row("NUL in a value", post(ONE, b"X-A: a\x00b"), *MALFORMED),
    Row("NUL in a name", post(ONE, b"X-\x00A: a"), *MALFORMED),
    Row("a control character in a value", post(ONE, b"X-A: a\x01b"), *MALFORMED),
    Row("bytes over 127 in a value", post(ONE, b"X-A: \xff\xfe"), "200 1"),
    Row("bytes over 127 in a name", post(ONE, b"X-\xff: a"), *MALFORMED),
    Row("a space in a name", post(ONE, b"X A: a"), *MALFORMED),
    Row("a space before the colon", post(ONE, b"X-A : a"), *MALFORMED),
    Row("an empty name", post(ONE, b": a"), *MALFORMED),
    Row("no colon", post(ONE, b"X-A"), *MALFORMED),
    Row("100 headers", post(ONE, *(b"X-%d: a" % n for n in range(100))), "200 1"),
    Row("129 headers", post(ONE, *(b"X-%d: a" % n for n in range(129))), *MALFORMED),
    Row("100,000 headers", post(ONE, *[b"X-A: a"] * 100_000), *MALFORMED),
    Row("a value of 8,000 bytes", post(ONE, b"X-A: " + b"a" * 8_000), "200 1"),
    Row("a value of 9,000 bytes", post(ONE, b"X-A: " + b"a" * 9_000), *MALFORMED),
    Row("a name of 9,000 bytes", post(ONE, b"A" * 9_000 + b": a"), *MALFORMED),
    Row("a value of 10 MB", post(ONE, b"X-A: " + b"a" * 10_000_000), *MALFORMED),
    Row("a head of 800 kB", post(ONE, *[b"X-A: " + b"a" * 8_000] * 100), *MALFORMED),
    Row("a request id that would forge a log line", post(ONE, b'X-Request-Id: a","level":"error'), "200 1"),
    Row("two request ids", post(ONE, b"X-Request-Id: a", b"X-Request-Id: b"), "200 1"),
    Row("headers of a proxy", post(ONE, b"X-Forwarded-For: 127.0.0.1", b"Forwarded: for=127.0.0.1"), "200 1"),
    Row("a method override", post(ONE, b"X-HTTP-Method-Override: DELETE"), "200 1"),
    Row("an upgrade to a web socket is not taken", post(ONE, b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Key: eA==", b"Sec-WebSocket-Version: 13"), "200 1"),
    Row("an upgrade to HTTP/2 is not taken", post(ONE, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AA"), "200 1"),
    Row("the old web socket", post(ONE, b"Sec-WebSocket-Key1: x"), *MALFORMED),
    Row("Connection: close", post(ONE, b"Connection: close"), "200 1", CLOSED),
    Row("a Range is ignored", post(ONE, b"Range: bytes=0-1"), "200 1"),
    Row("Expect without a key is not told to go on", head(b"Content-Length: 9", b"Expect: 100-continue"), "401 missing_api_key", UNREAD),
    Row("Expect something else", post(ONE, b"Expect: miracles"), "417 expectation_failed"),
]

LENGTHS = [
    Row("no length, no chunks", head(b"X-Api-Key: " + KEY), "400 invalid_json"),
    Row("length 0", post(b""), "400 invalid_json"),
    Row("two lengths", post(ONE, b"Content-Length: 3"), *MALFORMED),
    Row("two equal lengths", post(ONE, b"Content-Length: %d" % len(ONE)), *MALFORMED),
    Row("two lengths in one", head(b"X-Api-Key: " + KEY, b"Content-Length: 2, 2") + b"{}", *MALFORMED),
    Row("length +2", head(b"X-Api-Key: " + KEY, b"Content-Length: +2") + b"{}", *MALFORMED),
    Row("length -2", head(b"X-Api-Key: " + KEY, b"Content-Length: -2") + b"{}", *MALFORMED),
    Row("length 0x2", head(b"X-Api-Key: " + KEY, b"Content-Length: 0x2") + b"{}", *MALFORMED),
    Row("length 2.0", head(b"X-Api-Key: " + KEY, b"Content-Length: 2.0") + b"{}", *MALFORMED),
    Row("length 2^64 + 2", head(b"X-Api-Key: " + KEY, b"Content-Length: 18446744073709551618") + b"{}", *MALFORMED),
    Row("an empty length", head(b"X-Api-Key: " + KEY, b"Content-Length:") + b"{}", *MALFORMED),
    Row("a length in Arabic digits", head(b"X-Api-Key: " + KEY, "Content-Length: ٢".encode()) + b"{}", *MALFORMED),
    Row("10 GB announced", head(b"X-Api-Key: " + KEY, b"Content-Length: 10000000000"), "413 payload_too_large", UNREAD),
    Row("10 GB announced without a key", head(b"Content-Length: 10000000000"), "401 missing_api_key", UNREAD),
    Row("the largest body", post(padded(LARGEST)), "200 1"),
    Row("a byte more", post(padded(LARGEST + 1)), "413 payload_too_large"),
    Row("the largest body, chunked", chunked(padded(LARGEST)), "200 1", CLOSED),
    Row("a byte more, chunked", chunked(padded(LARGEST + 1)), "413 payload_too_large", CLOSED),
    Row("length and chunks", chunked(ONE, lines=(b"Content-Length: 5",)), *MALFORMED),
    Row("chunks and length", head(b"Content-Length: 5", b"X-Api-Key: " + KEY, b"Transfer-Encoding: chunked") + b"0\r\n\r\n", *MALFORMED),
    Row("two transfer codings", chunked(ONE, lines=(b"Transfer-Encoding: chunked",)), *MALFORMED),
    Row("chunked in HTTP/1.0", head(b"X-Api-Key: " + KEY, b"Transfer-Encoding: chunked", first=b"POST " + PATH + b" HTTP/1.0") + b"%x\r\n%b\r\n0\r\n\r\n" % (len(ONE), ONE), "200 1", CLOSED),
    *(
        Row(f"Transfer-Encoding: {coding!r}", head(b"X-Api-Key: " + KEY, b"Transfer-Encoding:" + coding) + b"2\r\n{}\r\n0\r\n\r\n", *MALFORMED)
        for coding in (b" identity", b" chunked,", b" chunked, identity", b" identity, chunked, gzip", b" xchunked", b" chunkedx", b'"chunked"', b" \x0bchunked", b" chunked;q=1", b"", b" chunked, chunked")
    ),
    Row("Transfer-Encoding with a space before the colon", head(b"X-Api-Key: " + KEY, b"Transfer-Encoding : chunked") + b"0\r\n\r\n", *MALFORMED),
    Row("200,000 chunks of one byte", chunked(ONE[:-1], *[b" "] * 200_000, ONE[-1:]), "200 1", CLOSED),
    Row("a chunk of size 0x2", chunked(end=b"0x2\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a chunk of size -2", chunked(end=b"-2\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a chunk of size +2", chunked(end=b"+2\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a chunk of size 2^68", chunked(end=b"fffffffffffffffff\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a chunk without a size", chunked(end=b"\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a chunk that is longer than its size", chunked(end=b"1\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("chunks with bare LF", chunked(end=b"2\n{}\n0\n\n"), *MALFORMED),
    Row("a chunk extension is ignored", chunked(end=b'%x;a="b";c\r\n%b\r\n0\r\n\r\n' % (len(ONE), ONE)), "200 1", CLOSED),
    Row("a chunk extension of 1 MB", chunked(end=b"%x;%b\r\n%b\r\n0\r\n\r\n" % (len(ONE), b"a" * 1_000_000, ONE)), "200 1", CLOSED),
    Row("NUL in a chunk extension", chunked(end=b"2;\x00\r\n{}\r\n0\r\n\r\n"), *MALFORMED),
    Row("a trailer is ignored", chunked(ONE, end=b"0\r\nX-A: a\r\n\r\n"), "200 1", CLOSED),
    Row("a length for a trailer", chunked(ONE, end=b"0\r\nContent-Length: 5\r\n\r\n"), *MALFORMED),
    Row("a Host for a trailer", chunked(ONE, end=b"0\r\nHost: evil.example\r\n\r\n"), "200 1", CLOSED),
    Row("1,000 trailers", chunked(ONE, end=b"0\r\n" + b"X-A: a\r\n" * 1_000 + b"\r\n"), *MALFORMED),
    Row("a request behind the last chunk is not looked at", chunked(ONE) + post(), "200 1", CLOSED),
]

BOMB = gzip.compress(bytes(2**20)) * 1024  # 1 GB in 1 MB

TYPES = [
    Row("text/plain", post(ONE, b"Content-Type: text/plain"), "415 unsupported_media_type"),
    Row("multipart", post(ONE, b"Content-Type: multipart/form-data; boundary=x"), "415 unsupported_media_type"),
    Row("a form", post(ONE, b"Content-Type: application/x-www-form-urlencoded"), "415 unsupported_media_type"),
    Row("utf-16", post(ONE, b"Content-Type: application/json; charset=utf-16"), "415 unsupported_media_type"),
    Row("an unknown charset", post(ONE, b"Content-Type: application/json; charset=\xff"), "415 unsupported_media_type"),
    Row("no JSON", post(ONE, b"Content-Type: /"), "415 unsupported_media_type"),
    Row("1 kB of parameters", post(ONE, b"Content-Type: application/json" + b";a=b" * 250), "200 1"),
    Row("two types", post(ONE, b"Content-Type: application/json", b"Content-Type: text/plain"), *MALFORMED),
    Row("no type is JSON", post(ONE), "200 1"),
    Row("gzip", post(gzip.compress(ONE), b"Content-Encoding: gzip"), "415 unsupported_media_type"),
    Row("br", post(ONE, b"Content-Encoding: br"), "415 unsupported_media_type"),
    Row("foo", post(ONE, b"Content-Encoding: foo"), "415 unsupported_media_type"),
    Row("gzip, gzip", post(ONE, b"Content-Encoding: gzip, gzip"), "415 unsupported_media_type"),
    Row("gzip in a second header", post(ONE, b"Content-Encoding: identity", b"Content-Encoding: gzip"), "415 unsupported_media_type"),
    Row("gzip as a transfer coding", post(ONE, b"Transfer-Encoding: gzip"), *MALFORMED),
    Row("a bomb of 1 GB without a key", post(BOMB, b"Content-Encoding: gzip", key=None), "401 missing_api_key"),
    Row("a bomb of 1 GB with a key", post(BOMB, b"Content-Encoding: gzip"), "415 unsupported_media_type"),
]

MANY = 139_000
WITH_UNKNOWN = ONE[:-1] + b',"unknown":%b}'
METADATA = b'{"messages":[' + GOOD[:-1] + b',"metadata":%b}]}'

JSON = [
    Row("empty", post(b""), "400 invalid_json"),
    Row("null", post(b"null"), "400 invalid_json"),
    Row("a list", post(b"[]"), "400 invalid_json"),
    Row("a list of lists", post(b"[[]]"), "400 invalid_json"),
    Row("a string", post(b'"x"'), "400 invalid_json"),
    Row("a number", post(b"7"), "400 invalid_json"),
    Row("an empty object", post(b"{}"), "400 missing_messages"),
    Row("messages null", post(b'{"messages":null}'), "400 missing_messages"),
    Row("messages an object", post(b'{"messages":{}}'), "400 missing_messages"),
    Row("messages a string", post(b'{"messages":"x"}'), "400 missing_messages"),
    Row("messages empty", post(b'{"messages":[]}'), "400 missing_messages"),
    Row("messages in another case", post(b'{"Messages":[]}'), "400 missing_messages"),
    Row("messages twice: the last counts", post(b'{"messages":7,"messages":[' + GOOD + b"]}"), "200 1"),
    Row("messages twice: the last is empty", post(ONE[:-1] + b',"messages":[]}'), "400 missing_messages"),
    Row("a byte order mark", post(b"\xef\xbb\xbf" + ONE), "400 invalid_json"),
    Row("UTF-16", post('{"messages":[]}'.encode("utf-16")), "400 invalid_json"),
    Row("UTF-32", post('{"messages":[]}'.encode("utf-32")), "400 invalid_json"),
    Row("a trailing comma", post(ONE[:-1] + b",}"), "400 invalid_json"),
    Row("trailing data", post(ONE + b" x"), "400 invalid_json"),
    Row("two documents", post(ONE + b"\n" + ONE), "400 invalid_json"),
    Row("NUL after the document", post(ONE + b"\x00"), "400 invalid_json"),
    Row("cut off", post(ONE[:-2]), "400 invalid_json"),
    Row("NaN", post(WITH_UNKNOWN % b"NaN"), "400 invalid_json"),
    Row("Infinity", post(METADATA % b'{"x":-Infinity}'), "400 invalid_json"),
    Row("a comment", post(b"/**/" + ONE), "400 invalid_json"),
    Row("single quotes", post(ONE.replace(b'"', b"'")), "400 invalid_json"),
    Row("a leading zero", post(WITH_UNKNOWN % b"01"), "400 invalid_json"),
    Row("invalid UTF-8", post(WITH_UNKNOWN % b'"\xff"'), "400 invalid_json"),
    Row("overlong UTF-8", post(WITH_UNKNOWN % b'"\xc0\xaf"'), "400 invalid_json"),
    Row("a surrogate in UTF-8", post(WITH_UNKNOWN % b'"\xed\xa0\x80"'), "400 invalid_json"),
    Row("a lone surrogate, escaped", post(ONE.replace(b"Hello", b"\\ud800")), "400 invalid_json"),
    Row("a lone surrogate, escaped, in metadata", post(METADATA % b'{"x":"\\ud800"}'), "400 invalid_json"),
    Row("a newline in a string", post(ONE.replace(b"Hello", b"Hel\nlo")), "400 invalid_json"),
    Row("100,000 brackets", post(b'{"messages":' + b"[" * 100_000), "400 invalid_json"),
    Row("100,000 levels in an unknown field", post(WITH_UNKNOWN % (b"[" * 100_000 + b"]" * 100_000)), "400 invalid_json"),
    Row("1 million brackets", post(b"[" * 1_000_000), "400 invalid_json"),
    Row("metadata of 100 levels", post(METADATA % (b'{"a":' * 100 + b"1" + b"}" * 100)), "200 1"),
    Row("metadata of 100,000 levels", post(METADATA % (b'{"a":' * 100_000 + b"1" + b"}" * 100_000)), "400 invalid_json"),
    Row("a number of 4 MB in an unknown field", post(WITH_UNKNOWN % (b"9" * 4_000_000)), "200 1"),
    Row("a number of 4 MB in metadata", post(METADATA % (b'{"n":' + b"9" * 4_000_000 + b"}")), "200 1"),
    Row("a number of 4 MB for a body", post(b'{"messages":[' + GOOD.replace(b'"Hello {{messageId}}"', b"9" * 4_000_000) + b"]}"), "200 0"),
    Row("1e400 in an unknown field", post(WITH_UNKNOWN % b"1e400"), "200 1"),
    Row("1e400 in metadata", post(METADATA % b'{"n":1e400}'), "200 1"),
    Row("1e999999999 for a recipient", post(ONE.replace(b'"+14155551234"', b"1e999999999")), "200 0"),
    Row("a key of 1 MB", post(ONE[:-1] + b',"' + b"k" * 1_000_000 + b'":1}'), "200 1"),
    Row("400,000 unknown keys", post(ONE[:-1] + b"".join(b',"%x":1' % n for n in range(400_000)) + b"}"), "200 1"),
    Row("400,000 equal keys", post(ONE[:-1] + b',"unknown":1' * 400_000 + b"}"), "200 1"),
    Row("4 MB of escapes", post(WITH_UNKNOWN % (b'"' + b"\\u0000" * 600_000 + b'"')), "200 1"),
    Row("1,000 messages", post(b'{"messages":[' + b",".join([GOOD] * 1_000) + b"]}"), "200 1000"),
    Row("1,001 messages", post(b'{"messages":[' + b",".join([GOOD] * 1_001) + b"]}"), "413 too_many_messages"),
    Row("139,000 empty messages", post(b'{"messages":[' + b"{}," * MANY + b"{}]}"), "413 too_many_messages"),
    Row("2 million numbers", post(b'{"messages":[' + b"1," * 2_000_000 + b"1]}"), "413 too_many_messages"),
    Row("2 million empty lists in an unknown field", post(WITH_UNKNOWN % (b"[" + b"[]," * 1_700_000 + b"[]]")), "200 1"),
    Row("1,000 foreign lists", post(b'{"messages":[' + b",".join(GOOD.replace(LIST, b"+1999%011d" % n) for n in range(1_000)) + b"]}"), "200 0"),
]


class Idempotency(NamedTuple):
    """A sequence of requests, and the answer to each."""

    name: str
    requests: list[bytes]
    answers: list[str]


def keyed(*keys: bytes, body: bytes = ONE, key: bytes = KEY) -> bytes:
    """Return a request with these Idempotency-Keys."""
    return post(body, *(b"Idempotency-Key: " + each for each in keys), key=key)


TWO = b'{"messages":[' + GOOD + b"," + GOOD + b"]}"

IDEMPOTENCY = [
    Idempotency("empty", [keyed(b"")], ["400 invalid_idempotency_key"]),
    Idempotency("256 characters", [keyed(b"k" * 256)], ["400 invalid_idempotency_key"]),
    Idempotency("255 characters", [keyed(b"k" * 255)] * 2, ["200 1", "200 1 replayed"]),
    Idempotency("a space", [keyed(b"a b")], ["400 invalid_idempotency_key"]),
    Idempotency("not ASCII", [keyed("ä".encode())], ["400 invalid_idempotency_key"]),
    Idempotency("not UTF-8", [keyed(b"\xff")], ["400 invalid_idempotency_key"]),
    Idempotency("two headers", [keyed(b"a", b"a")], ["400 invalid_idempotency_key"]),
    Idempotency("SQL", [keyed(b"';DROP/**/TABLE/**/accounts;--")] * 2, ["200 1", "200 1 replayed"]),
    Idempotency("the same again", [keyed(b"again")] * 3, ["200 1", "200 1 replayed", "200 1 replayed"]),
    Idempotency("the same key in another case is another", [keyed(b"case"), keyed(b"CASE")], ["200 1", "200 1"]),
    Idempotency("another body", [keyed(b"body"), keyed(b"body", body=TWO)], ["200 1", "422 idempotency_key_reused"]),
    Idempotency("a space more in the body", [keyed(b"space"), keyed(b"space", body=ONE + b" ")], ["200 1", "422 idempotency_key_reused"]),
    Idempotency("another account's, with the same bytes, is refused its list and learns nothing", [keyed(b"theirs"), keyed(b"theirs", key=FOREIGN_KEY)], ["200 1", "200 0"]),
    Idempotency("under a revoked key", [keyed(b"revoked", key=REVOKED_KEY), keyed(b"revoked")], ["401 invalid_api_key", "200 1"]),
    Idempotency("after a refusal it is new", [keyed(b"new", body=b"{"), keyed(b"new")], ["400 invalid_json", "200 1"]),
]


class Message(NamedTuple):
    """An element of `messages` between two valid ones: the code of its row, or None when it is queued."""

    name: str
    element: bytes
    code: str | None


def message(**changes: object) -> bytes:
    """Return a valid message with some fields changed; a field set to ... is left out."""
    good: dict[str, object] = msgspec.json.decode(GOOD)
    return msgspec.json.encode({name: value for name, value in (good | changes).items() if value is not ...})


def with_raw(name: bytes, value: bytes) -> bytes:
    """Return a valid message with one more field, whose value is raw JSON."""
    return GOOD[:-1] + b',"%b":%b}' % (name, value)


ABSENT: list[object] = [..., None, ""]
NO_STRINGS: list[object] = [0, 7, -1.5, True, False, [], ["+14155551234"], {}, {"x": 1}]
NO_BOOLEANS: list[object] = [0, 1, "", "true", [], {}, 1.5]
NO_OBJECTS: list[object] = [0, "", "Ann", [], [1], True, False]
NO_NUMBERS = [
    *("4155559876", "14155551234", "+", "+1", "+0", "+04155551234", "0014155551234", "++14155551234", "+1-415-555-1234"),
    *("+1 4155551234", " +14155551234", "+14155551234 ", "+14155551234\n", "+14155551234\r\n", "\t+14155551234"),
    *("+14155551234\n+14155551235", "+14155551234,+14155551235", "+1415555123456789", "+1415555123x", "tel:+14155551234"),
    *("+١٤١٥٥٥٥١٢٣٤", "+１４１５５５５１２３４", "＋14155551234", "+1۴۱۵۵۵۵۱۲۳۴", "+1⁴155551234", "+𝟏𝟒𝟏𝟓𝟓𝟓𝟓𝟏𝟐𝟑𝟒"),
    *("\u200f+14155551234", "+14155551234\u200b", "\ufeff+14155551234", "+1415\u00ad5551234", "+1415555\x001234", "\x00"),
    *("' OR '1'='1", "+1'; DROP TABLE accounts; --", "{+14155551234}", "{{messageId}}", "%s%n", "../../etc/passwd"),
    *("<script>alert(1)</script>", "${jndi:ldap://x}", "null", "NaN", "😀", "+1" + "4" * 10_000, "A" * 100_000),
]

MESSAGES = [
    *(Message(f"an element {raw!r}", raw, "missing_to") for raw in (b"null", b"[]", b"1", b'"x"', b"{}", b"true", b"[[]]", b"1e400")),
    *(Message(f"to {value!r}", message(to=value), "missing_to") for value in ABSENT),
    *(Message(f"list_number {value!r}", message(list_number=value), "missing_list_number") for value in ABSENT),
    *(Message(f"body {value!r}", message(body=value), "missing_body") for value in ABSENT + NO_STRINGS),
    *(Message(f"to {value!r:.40}", message(to=value), "invalid_phone") for value in NO_STRINGS + NO_NUMBERS),
    *(Message(f"list_number {value!r:.40}", message(list_number=value), "invalid_list_number") for value in NO_STRINGS + NO_NUMBERS),
    Message("to with an escaped pair of surrogates", GOOD.replace(b"+1415", b"\\ud83d\\ude00"), "invalid_phone"),
    Message("to spelt with escapes is the same", GOOD.replace(b"+1415", b"\\u002b\\u0031415"), None),
    Message("to twice: the last counts", GOOD.replace(b'"to"', b'"to":5,"to"'), None),
    Message("the field's name in another case", message(to=..., To="+14155551234"), "missing_to"),
    Message("another account's list", GOOD.replace(LIST, FOREIGN_LIST), "list_not_found"),
    Message("an unknown list", GOOD.replace(LIST, b"+19998887777666"), "list_not_found"),
    Message("an inactive list", GOOD.replace(LIST, INACTIVE_LIST), "list_not_found"),
    *(Message(f"wrap_links {value!r}", message(wrap_links=value), "invalid_field") for value in NO_BOOLEANS),
    *(Message(f"contact_data {value!r}", message(contact_data=value), "invalid_field") for value in NO_OBJECTS),
    *(
        Message(f"contact_data.{name} {value!r}", message(contact_data={name: value}), "invalid_field")
        for name, values in {
            "first_name": [1, True, [], {}],
            "last_name": [1, False, [], {}],
            "timezone": [0, [], {}],
            "custom_fields": ["x", 1, [], True],
        }.items()
        for value in values
    ),
    *(Message(f"metadata {value!r}", message(metadata=value), "invalid_field") for value in NO_OBJECTS),
    *(Message(f"null for {name} is nothing sent", message(**{name: None}), None) for name in ("wrap_links", "contact_data", "metadata")),
    Message("null for all of contact_data", message(contact_data=dict.fromkeys(["first_name", "last_name", "timezone", "custom_fields"])), None),
    Message("__proto__", with_raw(b"__proto__", b'{"to":"+19990000000"}'), None),
    Message("__proto__ in metadata", with_raw(b"metadata", b'{"__proto__":{"polluted":true},"constructor":1}'), None),
    Message("properties of AMQP", message(expiration="1", user_id="root", routing_key="x", headers={}, priority=255, reply_to="q"), None),
    Message("fields of the payload", message(id="forged00", account_id=1, list_id=1, index=9, accepted_at="x"), None),
    Message("{{messageId}} twice", message(body="{{messageId}} {{messageId}}"), None),
    Message("{{messageId}} nested", message(body="{{{{messageId}}}} {{message{{messageId}}Id}}"), None),
    Message("{{messageId}} broken", message(body="{{messageId} {messageId}} {{ messageId }} {{MESSAGEID}} {{"), None),
    Message("unknown macros", message(body="{{firstName}} {{7*7}} ${7*7} #{7*7} <%= 7*7 %>"), None),
    Message("a body of control characters", message(body="".join(map(chr, range(32))) + "\x7f\u2028\u202e"), None),
    Message("a body of emoji and right-to-left text", message(body="😀 مرحبا שלום"), None),
    Message("a body of spaces", message(body=" "), None),
    Message("a body of 1 MB", message(body="x" * 1_000_000), None),
    Message("a body of 100,000 macros", message(body="{{messageId}}" * 100_000), None),
]
