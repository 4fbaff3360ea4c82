"""The listening sockets of a process: their backlog, and the ports that processes share or do not."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.config import ConfigurationError
from gateway.web.sockets import BACKLOG, open_tcp, open_unix

AT_ONCE = BACKLOG // 2  # connections; asyncio's default backlog is 100


async def listen(port: int = 0, *, shared: bool = False) -> asyncio.Server:
    return await open_tcp(
        asyncio.Protocol, "127.0.0.1", port, listener="API", shared=shared, context=None, handshake_timeout_s=1.0
    )


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_UNIX])
async def test_callers_that_come_at_once_are_connected_before_the_process_accepts_them(
    family: socket.AddressFamily, tmp_path: Path
) -> None:
    path = str(tmp_path / "api")
    server = await (open_unix(asyncio.Protocol, path) if family == socket.AF_UNIX else listen())
    with ExitStack() as stack:
        stack.callback(server.close)
        # The event loop does not run meanwhile. Beyond the backlog, the kernel makes a caller wait.
        for _ in range(AT_ONCE):
            calling = stack.enter_context(socket.socket(family))
            calling.settimeout(10.0)
            calling.connect(server.sockets[0].getsockname())


async def test_only_processes_that_all_ask_for_it_share_a_port() -> None:
    """Otherwise a second gateway on the same port would take half of the connections of the first."""
    alone, shared = await listen(), await listen(shared=True)
    try:
        (await listen(port_of(shared), shared=True)).close()
        for port, is_shared in ((port_of(alone), True), (port_of(shared), False)):
            with pytest.raises(ConfigurationError, match=f"127.0.0.1 port {port}: .*already in use"):
                await listen(port, shared=is_shared)
    finally:
        alone.close()
        shared.close()
