"""Malformed requests cannot fill the disk: the first of a kind is a log line, the others are one line with a count."""

import asyncio
import time

from gateway.telemetry.requests import MAX_LINES_A_SECOND
from testbed import Servers
from tests.hostile import table
from tests.hostile.attacked_gateway import open_gateway
from tests.support.callers import make_caller
from tests.support.raw_http import exchange

TIMES = 500
RUBBISH = {
    "nonsense": b"NONSENSE\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "a header with NUL": table.post(table.ONE, b"X-A: a\x00b"),
    "no Host": table.post(host=None),
    "a bad chunk": table.chunked(end=b"zz\r\n"),
    "a path that is too long": b"GET /" + b"a" * 9_000 + b" HTTP/1.1\r\n\r\n",
    "a head that is too large": table.post(table.ONE, *[b"X-A: " + b"a" * 7_000] * 60),
    "a wrong key": table.post(key=b"trk_" + b"0" * 32),
}


async def test_thousands_of_malformed_requests_are_a_handful_of_lines(servers: Servers) -> None:
    async with open_gateway(servers, log_level="DEBUG") as gateway:
        await make_caller(gateway.admin)
        before, began = len(gateway.log_lines()), time.monotonic()
        for request in RUBBISH.values():
            for _ in range(TIMES // 50):
                answers = await asyncio.gather(*(exchange(gateway.url, request=request) for _ in range(50)))
                assert {answer.status for answer in answers} <= {400, 401}
        took_s = time.monotonic() - began
        lines = gateway.log_lines()[before:]
        of_requests = [line for line in lines if line["logger"] == "gateway.requests"]  # these reached a handler
        assert 0 < len(lines) - len(of_requests) <= 4 * len(RUBBISH), f"of {TIMES * len(RUBBISH):,} requests"
        codes = {line["code"] for line in of_requests}
        assert len(of_requests) <= MAX_LINES_A_SECOND * (took_s + 1) * len(codes)
        assert max(len(str(line)) for line in lines) < 300
        assert gateway.alarms() == []
