"""The listening sockets of a process: their backlog, and the ports that processes share or do not."""

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from gateway.config import ConfigurationError
from gateway.web.sockets import BACKLOG, bind_tcp, open_tcp, open_unix

AT_ONCE = BACKLOG // 2  # connections; asyncio's default backlog is 100


async def listen(port: int = 0) -> asyncio.Server:
    return await open_tcp(asyncio.Protocol, "127.0.0.1", port, listener="API")


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


async def test_only_supervisors_share_a_port() -> None:
    """A new one can start while the workers of a dead one drain; a single process would take half of its callers."""
    alone = await listen()
    with ExitStack() as stack:
        stack.callback(alone.close)
        (shared,) = map(stack.enter_context, await bind_tcp("127.0.0.1", 0, shared=True))
        shared.listen()
        (second,) = map(stack.enter_context, await bind_tcp("127.0.0.1", shared.getsockname()[1], shared=True))
        second.listen()
        taken, in_use = port_of(alone), "127.0.0.1 port {}: .*already in use"
        with pytest.raises(ConfigurationError, match=in_use.format(taken)):
            await bind_tcp("127.0.0.1", taken, shared=True)
        taken = shared.getsockname()[1]
        with pytest.raises(ConfigurationError, match=in_use.format(taken)):
            await listen(taken)


Addresses = list[tuple[int, str]]


@pytest.fixture
async def resolved(monkeypatch: pytest.MonkeyPatch) -> Addresses:
    """Return the list of families and addresses that every name has."""
    found: Addresses = []

    async def resolve(_host: str, port: int, **_options: object) -> list[tuple[object, ...]]:
        return [(family, socket.SOCK_STREAM, 6, "", (address, port)) for family, address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    return found


async def test_all_addresses_of_a_host_share_a_port(resolved: Addresses) -> None:
    """Also a port that the system chooses. `localhost` often has an address of each family."""
    resolved += [(socket.AF_INET, address) for address in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]
    resolved.append((socket.AF_IPX, "::1"))  # Linux has dropped this family
    with ExitStack() as stack:
        names = [stack.enter_context(each).getsockname() for each in await bind_tcp("localhost", 0, shared=True)]
    assert [address for address, _ in names] == ["127.0.0.1", "127.0.0.2"]
    assert len({port for _, port in names}) == 1


async def test_a_host_without_an_address_of_this_systems_families_cannot_be_used(resolved: Addresses) -> None:
    resolved.append((socket.AF_IPX, "::1"))
    with pytest.raises(ConfigurationError, match="cannot listen on localhost port 0: Address family not supported"):
        await bind_tcp("localhost", 0, shared=True)
