"""The API on a UNIX socket: permissions, and the files that it replaces."""

import socket
import stat
from pathlib import Path

import aiohttp
import pytest

from gateway.config import ConfigurationError
from gateway.server import process as server
from gateway.server.unix_sockets import listen_on_own_socket
from tests.support.callers import Client
from tests.support.gateways import GatewayUnderTest


async def test_a_unix_socket_is_for_its_user_and_group_replaces_a_dead_one_and_steals_no_living_one(
    tmp_path: Path, gateway: GatewayUnderTest
) -> None:
    path = tmp_path / "api"
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    _, first = server.make_runners(gateway.runtime)
    _, second = server.make_runners(gateway.runtime)
    try:
        await listen_on_own_socket(first, str(path))
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
        with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET=.* is served by another process"):
            await listen_on_own_socket(second, str(path))
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
            client = Client("http://gateway", session, gateway.caller)
            assert (await client.send([client.message()]))[1]["queued_count"] == 1
        await first.cleanup()
        await listen_on_own_socket(second, str(path))
    finally:
        await first.cleanup()
        await second.cleanup()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path, gateway: GatewayUnderTest) -> None:
    path = tmp_path / "precious"
    path.write_text("mine")
    _, runner = server.make_runners(gateway.runtime)
    try:
        with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET=.*cannot be used: .*already in use"):
            await listen_on_own_socket(runner, str(path))
        with pytest.raises(ConfigurationError, match="cannot be used: No such file or directory"):
            await listen_on_own_socket(runner, str(tmp_path / "nowhere" / "api"))
    finally:
        await runner.cleanup()
    assert path.read_text() == "mine"


async def test_a_clean_stop_removes_its_own_socket_and_no_other(tmp_path: Path, gateway: GatewayUnderTest) -> None:
    path = tmp_path / "api"
    _, first = server.make_runners(gateway.runtime)
    _, second = server.make_runners(gateway.runtime)
    try:
        await listen_on_own_socket(first, str(path))
        with pytest.raises(ConfigurationError):
            await listen_on_own_socket(second, str(path))
        await second.cleanup()
        assert path.exists()
        await first.cleanup()
        assert not path.exists()
    finally:
        await first.cleanup()
        await second.cleanup()
