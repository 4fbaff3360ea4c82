"""The operations listeners have the bounds of the API's, in a single process and in the supervisor of workers."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from gateway.web.ops import CONNECTIONS
from testbed import Servers
from testbed.processes import http_get
from tests.support.authority import Authority
from tests.support.gateways import GatewayProcess, process_environment, running
from tests.support.raw_http import exchange

DESCRIPTORS = 256


class Cramped(GatewayProcess):
    """A gateway that may have few descriptors."""

    def _command(self) -> list[str]:
        return ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh", *super()._command()]


@pytest.fixture(params=[1, 2], ids=["one process", "workers"])
async def process(servers: Servers, request: pytest.FixtureRequest) -> AsyncIterator[GatewayProcess]:
    """Run a gateway with few descriptors, alone or as a supervisor with workers."""
    async with running(Cramped(process_environment(servers), workers=request.param)) as started:
        yield started


async def test_idle_connections_do_not_stop_the_probes(process: GatewayProcess) -> None:
    """The supervisor used to run out of descriptors, and Kubernetes would then kill all workers."""
    with ExitStack() as stack:
        for _ in range(400):
            idle = stack.enter_context(socket.socket())
            idle.connect(("127.0.0.1", process.ops_port.number))
        for path in ("/livez", "/readyz"):
            answer = await asyncio.to_thread(http_get, process.ops_port, path)
            assert answer is not None, path
            assert answer[0] == 200
        assert process.footprint().descriptors < CONNECTIONS + 100


async def test_slow_readers_of_the_documentation_do_not_stop_the_probes(process: GatewayProcess) -> None:
    """They read nothing, and each asks again before its first answer is written."""
    request = b"GET /docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n" * 20
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", process.ops_port.number))
            slow.sendall(request)
        await asyncio.sleep(1.0)
        for path in ("/livez", "/readyz"):
            answer = await asyncio.to_thread(http_get, process.ops_port, path)
            assert answer is not None, path
            assert answer[0] == 200


@pytest.mark.parametrize("workers", [1, 2])
async def test_unfinished_tls_handshakes_stop_neither_the_probes_nor_other_callers(
    servers: Servers, tmp_path: Path, workers: int
) -> None:
    """A handshake takes a descriptor, and was bounded by its timeout alone."""
    authority = Authority(tmp_path)
    _, cert, key = map(str, authority.issue("127.0.0.1"))
    tls = {"GATEWAY_API_TLS_CERT_FILE": cert, "GATEWAY_API_TLS_KEY_FILE": key, "GATEWAY_HEADER_TIMEOUT_S": "60"}
    environment = process_environment(servers, GATEWAY_MAX_CONNECTIONS=str(DESCRIPTORS - 128), **tls)
    async with running(Cramped(environment, workers=workers)) as process:
        with ExitStack() as stack:
            for _ in range(3 * DESCRIPTORS):
                silent = stack.enter_context(socket.socket())
                silent.setblocking(False)
                silent.connect_ex(("127.0.0.1", process.port.number))
            for _ in range(10):
                answer = await asyncio.to_thread(http_get, process.ops_port, "/readyz")
                assert answer is not None
                assert answer[0] == 200
                connector = aiohttp.TCPConnector(ssl=authority.client_context())
                async with (
                    aiohttp.ClientSession(connector=connector) as session,
                    session.get(process.url.replace("http:", "https:")) as response,
                ):
                    assert response.status == 404
        assert '"level":"error"' not in process.log.read_text()


async def test_malformed_http_is_answered_in_json_without_a_traceback(process: GatewayProcess) -> None:
    for request in (b"NONSENSE\r\n\r\n", b"GET /livez HTTP/1.1\r\nX-A: a\x00b\r\n\r\n"):
        answer = await exchange(process.ops_url, request=request)
        assert (answer.status, answer.json()["code"]) == (400, "malformed_http")
        assert b"\r\nContent-Type: application/json\r\n" in answer.raw
    assert "Traceback" not in process.log.read_text()
    assert '"level":"error"' not in process.log.read_text()
