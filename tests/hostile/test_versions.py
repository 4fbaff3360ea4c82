"""No answer of a listener names the software's versions: they would tell an attacker which flaws to try."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from yarl import URL

from gateway.server.supervisor import make_probes_app
from gateway.web import openapi, ops
from tests.support.gateways import MakeSettings, StartGateway

GETS = ["/", "/livez", "/readyz", "/metrics", "/api/v2/send/bulk", openapi.PATH, *openapi.PAGE_PATHS, "/docs/"]
REQUESTS = [
    *(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode() for path in GETS for method in ("GET", "HEAD", "POST")),
    b"GET /livez HTTP/1.0\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    b"GET /livez HTTP/2.7\r\nHost: x\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nExpect: miracles\r\n\r\n",
    b"GET /docs/swagger-ui.css HTTP/1.1\r\nHost: x\r\nRange: bytes=1-2\r\n\r\n",
    b"GET /docs/swagger-ui.css HTTP/1.1\r\nHost: x\r\nRange: bytes=99999999-\r\n\r\n",
    b"GET /docs/swagger-ui.css HTTP/1.1\r\nHost: x\r\nIf-None-Match: *\r\n\r\n",
    b"GET /metrics HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n\r\n",
    b"POST /api/v2/send HTTP/1.1\r\nHost: x\r\nContent-Length: 6000000\r\n\r\n",
    b"POST /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 40_000 + b"\r\n\r\n",
    b"NONSENSE\r\n\r\n",
    b"\x16\x03\x01\r\n\r\n",
]


@pytest.fixture(params=["api", "operations", "supervisor"])
async def listener(
    start_gateway: StartGateway, make_settings: MakeSettings, request: pytest.FixtureRequest
) -> AsyncIterator[str]:
    """Yield the URL of a listener."""
    settings = make_settings(api_docs="on")
    if request.param == "supervisor":
        runner = ops.make_ops_runner(make_probes_app([]), settings)
        yield f"http://127.0.0.1:{await runner.listen(settings.ops_host, 0)}"
        await runner.cleanup()
    else:
        gateway = await start_gateway(settings, wait_until_ready=False)
        yield gateway.api_url if request.param == "api" else gateway.ops_url


async def head_of_answer(listener: str, request: bytes) -> str:
    url = URL(listener)
    reader, writer = await asyncio.open_connection(url.host, url.port)
    try:
        writer.write(request)
        async with asyncio.timeout(10):
            return (await reader.readuntil(b"\r\n\r\n")).decode()
    finally:
        writer.close()


async def test_no_answer_names_the_versions_of_the_software(listener: str) -> None:
    statuses = set()
    for request in REQUESTS:
        head = await head_of_answer(listener, request)
        assert "\r\nServer: sms-gateway\r\n" in head, request
        assert not any(word in head.lower() for word in ("aiohttp", "python")), request
        statuses.add(int(head.split()[1]))
    assert statuses >= {200, 304, 400, 404, 405, 416}
