"""Requests from a seed: most of them nearly valid, some damaged byte by byte.

They are put together from encoded pieces. A request takes some 20 µs, so the gateway is the bottleneck.
"""

import random
from typing import NamedTuple

# Raw JSON values. Some are no JSON, so that the whole request is refused.
NUMBERS = [b'"+14155551234"', b'"+442071838750"', b'"+12"', b'"+123456789012345"']
STRANGE = [
    *[b"null", b"true", b"false", b"0", b"-0", b"1e400", b"-1E-9", b"1" * 400, b"[]", b"{}", b'[{"a":[null]}]', b'""'],
    *[b'"+"', b'"+0123"', b'"+1234567890123456"', b'"4155559876"', b'" +14155551234"', b'"+14155551234\\n"'],
    *[
        b'"+1\\n+2"',
        b'"\\u002b14155551234"',
        '"+١٤١٥"'.encode(),
        '"\uff0b\uff11\uff14"'.encode(),
        b'"\\u0000"',
        b'"\\ud800"',
    ],
    *[b'"\\ud83d\\ude00"', b'"\xff"', b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\\x"', b'"\t"', b"01", b".5", b"+1", b"NaN"],
    *[
        b"'x'",
        b'"' + b"x" * 5000 + b'"',
        b"[" * 60 + b"]" * 60,
        b'{"a":' * 40 + b"1" + b"}" * 40,
        b'"\'; DROP TABLE--"',
    ],
    *[b'{"first_name":7}', b'{"first_name":"A","custom_fields":{}}', b'{"custom_fields":[]}', b'{"timezone":null}'],
    *[b'{"__proto__":{"a":1}}', b'{"a":1,"a":2}', b'{"a":1,}', b'{"\\u0061":"\\u2028"}', b'{ "a" : [ 1 , 2 ] }'],
    *[b'{"contact_data":{"first_name":1}}', b'{"contact_data" : {"contact_data":{}} }', b'"\\"contact_data\\":{}"'],
]
TEXTS = [
    *[
        b'"Hello {{messageId}}"',
        b'"{{{{messageId}}}}"',
        b'"x"',
        '"😀 \\u202e שלום"'.encode(),
        b'"\\u0000\\u0007\\n\\"\\\\\\/"',
    ],
    *[b'"{{firstName}} {{messageId"', b'"' + b"long " * 300 + b'"'],
]
FIELDS = [b"to", b"list_number", b"body", b"wrap_links", b"contact_data", b"metadata", b"dry_run", b"unknown", b"TO"]
FIELDS += [b"t\\u006f", b"contact\\u005fdata", b'\\"contact_data']
TOKENS = [
    *[
        b"\r\n",
        b"\n",
        b"\r",
        b"\x00",
        b"\xff",
        b": ",
        b" ",
        b"\t",
        b",",
        b"{",
        b"}",
        b"[",
        b"]",
        b'"',
        b"\\",
        b"\r\n\r\n",
    ],
    *[
        b"Content-Length: 5\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"0\r\n\r\n",
        b"HTTP/1.0",
        b"HTTP/2",
        b"Expect: x\r\n",
    ],
    *[b"Connection: close\r\n", b"Connection: upgrade\r\nUpgrade: websocket\r\n", b"Content-Encoding: gzip\r\n"],
    *[
        b"\xef\xbb\xbf",
        b"-1",
        b"99999999999999999999",
        b"%00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
]
PATHS = [
    b"/",
    b"/api/v2",
    b"/api/v2/send/bulk/",
    b"/%2e%2e/api",
    b"*",
    b"//",
    b"/%00",
    b"/api/v2/send/bulk?x=%zz#y",
]
BULK, SINGLE = b"/api/v2/send/bulk", b"/api/v2/send"


class Request(NamedTuple):
    """A well-formed HTTP request with any body."""

    data: bytes
    request_id: str


class Requests:
    """An endless source of requests; the same seed gives the same requests."""

    def __init__(self, seed: int | str, *, key: str, list_number: str) -> None:
        self._random = random.Random(seed)  # noqa: S311 - requests that can be repeated
        self._key = key.encode()
        self._list_number = b'"' + list_number.encode() + b'"'
        self._good = b'{"to":"+14155551234","list_number":%s,"body":"Hello {{messageId}}"}' % self._list_number
        self.made = 0

    def whole(self) -> Request:
        """Return HTTP that a parser must accept, with any key, headers and body."""
        self.made += 1
        chance = self._random.random
        request_id = f"fuzz-{self.made}"
        body, sent_to = (self.single_body(), SINGLE) if chance() < 0.2 else (self.body(), BULK)
        if chance() < 0.03:
            method, path = self._random.choice((b"GET", b"PUT", b"DELETE", b"OPTIONS", b"PATCH", b"POST")), sent_to
            if chance() < 0.5:
                path = self._random.choice(PATHS[:4])
        else:
            method, path = b"POST", sent_to
        lines = [b"%s %s HTTP/1.1\r\nHost: x\r\nX-Request-Id: %s\r\n" % (method, path, request_id.encode())]
        if chance() < 0.95:
            lines.append(b"X-Api-Key: %s\r\n" % self._key)
        if chance() < 0.05:
            wrong = (b"", b"x", b"trk_" + b"0" * 32, b"\xff\xfe", self._key, b"x" * 3000)
            lines.append(b"X-Api-Key: %s\r\n" % self._random.choice(wrong))
        if chance() < 0.9:
            lines.append(b"Content-Type: application/json\r\n")
        elif chance() < 0.5:
            kinds = (
                b"text/plain",
                b"application/json; charset=utf-16",
                b'APPLICATION/JSON;charset="UTF-8"',
                b"\xff",
                b";;",
            )
            lines.append(b"Content-Type: %s\r\n" % self._random.choice(kinds))
        if chance() < 0.03:
            keys = (b"a", b"b%d" % self._random.randrange(50), b"", b"x" * 256, b"\xe9", b"a b", b"k" * 255)
            lines.append(b"Idempotency-Key: %s\r\n" % self._random.choice(keys))
        if chance() < 0.05:
            preferences = (
                b"return=representation",
                b'foo, RETURN = "representation";x',
                b"return=minimal",
                b"",
                b"=;,",
            )
            lines.append(b"Prefer: %s\r\n" % self._random.choice(preferences))
        if chance() < 0.01:
            lines.append(b"Content-Encoding: %s\r\n" % self._random.choice((b"gzip", b"identity", b"br, gzip", b"")))
        if chance() < 0.01:
            lines.append(b"Expect: %s\r\n" % self._random.choice((b"100-continue", b"100-Continue", b"y")))
        if chance() < 0.08:
            lines += (b"Transfer-Encoding: chunked\r\n\r\n", self._in_chunks(body))
        else:
            lines += (b"Content-Length: %d\r\n\r\n" % len(body), body)
        return Request(b"".join(lines), request_id)

    def mutant(self) -> bytes:
        """Return a request with some bytes damaged."""
        return self._damaged(self.whole().data, self._random.randint(1, 4))

    def body(self, seed: int | None = None) -> bytes:
        """Return a body, mostly JSON. A seed always gives the same body."""
        if seed is not None:
            self._random.seed(seed)
        chance, choice = self._random.random, self._random.choice
        if chance() < 0.02:
            return choice(STRANGE)
        count = choice((1, 1, 1, 2, 3)) if chance() < 0.98 else choice((0, 20, 40))
        if chance() < 0.001:
            count = choice((1000, 1001))
        # In a large batch, at most 20 messages are drawn; the others are valid.
        messages = [self._message() if chance() < 0.6 else self._good for _ in range(min(count, 20))]
        messages += [self._good] * (count - len(messages))
        body = b'{"messages":[%s]' % b",".join(messages)
        if chance() < 0.1:
            value = self._list_number if chance() < 0.6 else choice(STRANGE)
            body += b',"%s":%s' % (choice((b"list_number", b"messages", b"unknown", b"dry_run")), value)
        if chance() < 0.05:
            body += b',"dry_run":%s' % choice((b"true", b"false"))
        body += b"}"
        return self._damaged(body, choice((1, 1, 2, 5))) if chance() < 0.2 else body

    def single_body(self, seed: int | None = None) -> bytes:
        """Return the body of a single send, mostly JSON. A seed always gives the same body."""
        if seed is not None:
            self._random.seed(seed)
        body = self._message() if self._random.random() < 0.6 else self._good
        return self._damaged(body, 1) if self._random.random() < 0.2 else body

    def _message(self) -> bytes:
        chance, choice = self._random.random, self._random.choice
        if chance() < 0.03:
            return choice(STRANGE)
        fields = [(b"to", choice(NUMBERS)), (b"list_number", self._list_number), (b"body", choice(TEXTS))]
        if chance() < 0.2:
            fields.append((b"metadata", choice((b"{}", b'{"a":[1,2.50,"\\u00e9"]}', b'{ "b" : null }'))))
        fields += [(choice(FIELDS), choice(STRANGE)) for _ in range(choice((0, 1, 1, 2)))]
        if chance() < 0.15:
            del fields[self._random.randrange(len(fields))]
        if chance() < 0.3:
            self._random.shuffle(fields)
        return b"{" + b",".join([b'"%s":%s' % field for field in fields]) + b"}"

    def _damaged(self, data: bytes, times: int) -> bytes:
        between = self._random.randrange
        for _ in range(times):
            at = between(len(data) + 1)
            match between(6):
                case 0:
                    data = data[:at] + bytes([between(256)]) + data[at + 1 :]
                case 1:
                    data = data[:at] + data[at + between(1, 20) :]
                case 2:
                    data = data[:at] + self._random.choice(TOKENS) + data[at:]
                case 3:
                    data = data[:at] + data[max(0, at - between(1, 60)) :]
                case 4:
                    data = (
                        data[:at] + bytes([data[at] ^ (1 << between(8))]) + data[at + 1 :] if at < len(data) else data
                    )
                case _:
                    token = self._random.choice(TOKENS)
                    data = data[:at] + token + data[at + len(token) :]
        return data

    def _in_chunks(self, body: bytes) -> bytes:
        parts, at = [], 0
        while at < len(body):
            size = self._random.choice((1, 7, 100, 5000))
            chunk = body[at : at + size]
            extension = b";x=y" if self._random.random() < 0.1 else b""
            parts.append(b"%x%s\r\n%s\r\n" % (len(chunk), extension, chunk))
            at += size
            if len(parts) > 200:  # enough of small ones
                parts.append(b"%x\r\n%s\r\n" % (len(body) - at, body[at:]) if at < len(body) else b"")
                break
        trailers = b"X-Trailer: 1\r\n" if self._random.random() < 0.05 else b""
        return b"".join(parts) + b"0\r\n" + trailers + b"\r\n"
