"""TcpProxy breaks the network as it is told, and only then."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from tests.support.tcp_proxy import RESET_ON_CLOSE, TcpProxy

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Echo:
    """A server that echoes everything, and records it."""

    def __init__(self) -> None:
        self.heard = bytearray()
        self.ended: list[str] = []

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while chunk := await reader.read(65_536):
                self.heard += chunk
                writer.write(chunk)
            self.ended.append("eof")
        except ConnectionResetError:
            self.ended.append("reset")
        finally:
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()


@pytest.fixture
async def echo() -> Echo:
    return Echo()


@pytest.fixture
async def proxy(echo: Echo) -> AsyncIterator[TcpProxy]:
    before = asyncio.all_tasks()
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
        yield proxy
    server.close()
    await server.wait_closed()
    async with asyncio.timeout(5):
        while asyncio.all_tasks() - before != {asyncio.current_task()}:  # noqa: ASYNC110 - the last echoes end
            await asyncio.sleep(0.001)


@asynccontextmanager
async def client_of(proxy: TcpProxy) -> AsyncIterator[Stream]:
    reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def says(stream: Stream, data: bytes, timeout: float = 5.0) -> bytes:
    reader, writer = stream
    writer.write(data)
    return await asyncio.wait_for(reader.readexactly(len(data)), timeout)


def reset(stream: Stream) -> None:
    sock = stream[1].get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
    stream[1].transport.abort()


async def until(echo: Echo, ended: int) -> None:
    async with asyncio.timeout(5):
        while len(echo.ended) < ended:  # noqa: ASYNC110 - simpler than an event, in a test
            await asyncio.sleep(0.001)


async def test_everything_passes_both_ways_and_the_end_too(proxy: TcpProxy, echo: Echo) -> None:
    data = bytes(range(256)) * 4096
    async with client_of(proxy) as client:
        assert await says(client, data) == data
        client[1].write_eof()
        assert await asyncio.wait_for(client[0].read(), 5) == b""
    await until(echo, ended=1)
    assert echo.ended == ["eof"]
    assert proxy.bytes_to_server == proxy.bytes_to_client == len(data)


async def test_a_black_hole_swallows_open_and_new_connections(proxy: TcpProxy, echo: Echo) -> None:
    async with client_of(proxy) as old:
        await says(old, b"before")
        proxy.black_hole()
        async with client_of(proxy) as new:
            for client in (old, new):
                with pytest.raises(TimeoutError):
                    await says(client, b"lost", timeout=0.05)
    assert echo.heard == b"before"
    assert echo.ended == []  # nobody was told that the clients went


async def test_after_a_black_hole_no_stream_has_a_gap(proxy: TcpProxy, echo: Echo) -> None:
    async with client_of(proxy) as unhurt, client_of(proxy) as hurt:
        await says(unhurt, b"1")
        await says(hurt, b"2")
        proxy.black_hole()
        with pytest.raises(TimeoutError):
            await says(hurt, b"lost", timeout=0.05)
        proxy.pass_through()
        assert await says(unhurt, b"3") == b"3"
        with pytest.raises(TimeoutError):
            await says(hurt, b"4", timeout=0.05)
        async with client_of(proxy) as new:
            assert await says(new, b"5") == b"5"
    assert echo.heard == b"1235"


async def test_reset_is_felt_on_both_sides_and_new_connections_are_served(proxy: TcpProxy, echo: Echo) -> None:
    async with client_of(proxy) as client:
        await says(client, b"1")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client[0].read(), 5)
        await until(echo, ended=1)
        assert echo.ended == ["reset"]
    async with client_of(proxy) as client:
        assert await says(client, b"2") == b"2"


async def test_a_connection_can_be_reset_before_it_was_served(proxy: TcpProxy, echo: Echo) -> None:
    async with client_of(proxy) as client:
        while not proxy.accepted:  # noqa: ASYNC110 - to the very turn of the loop
            await asyncio.sleep(0)
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client[0].read(), 5)
    assert echo.heard == b""


async def test_a_clients_reset_reaches_the_server_unless_it_falls_into_a_black_hole(
    proxy: TcpProxy, echo: Echo
) -> None:
    async with client_of(proxy) as seen, client_of(proxy) as unseen:
        await says(seen, b"1")
        await says(unseen, b"2")
        reset(seen)
        await until(echo, ended=1)
        proxy.black_hole()
        reset(unseen)
        await asyncio.sleep(0.05)
    assert echo.ended == ["reset"]


async def test_refused_connections_leave_open_ones_alone(proxy: TcpProxy) -> None:
    async with client_of(proxy) as client:
        await says(client, b"1")
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await says(client, b"2") == b"2"
        proxy.pass_through()
        async with client_of(proxy) as new:
            assert await says(new, b"3") == b"3"


async def test_a_delay_is_felt_in_each_direction(proxy: TcpProxy) -> None:
    async with client_of(proxy) as client:
        await says(client, b"1")
        proxy.delay(0.1)
        loop = asyncio.get_running_loop()
        start = loop.time()
        await says(client, b"2")
        assert loop.time() - start >= 0.19


async def test_a_limit_cuts_to_the_byte_and_lets_no_answer_back(proxy: TcpProxy, echo: Echo) -> None:
    async with client_of(proxy) as client:
        await says(client, b"before")
        proxy.limit(1000)
        with pytest.raises(TimeoutError):
            await says(client, b"x" * 1500, timeout=0.1)
    assert echo.heard == b"before" + b"x" * 1000


async def test_a_server_that_is_down_looks_down(unused_tcp_port: int) -> None:
    async with TcpProxy("127.0.0.1", unused_tcp_port) as proxy, client_of(proxy) as client:
        with pytest.raises(ConnectionResetError):
            await asyncio.wait_for(client[0].read(), 5)


async def test_leaving_closes_what_is_still_open(echo: Echo) -> None:
    async with asyncio.timeout(5):
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        async with TcpProxy("127.0.0.1", server.sockets[0].getsockname()[1]) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            await says((reader, writer), b"1")
            proxy.black_hole()
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        server.close()
        await until(echo, ended=1)
