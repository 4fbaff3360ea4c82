"""The API on a UNIX socket: permissions, the files that it replaces, and other gateways in its folder."""

import asyncio
import fcntl
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest

from gateway.config import ConfigurationError
from gateway.server import process as server
from gateway.server import unix_sockets
from gateway.server.unix_sockets import listen_on_own_socket
from testbed import Servers
from tests.support.callers import Client
from tests.support.gateways import GatewayUnderTest, process_environment, run_gateway


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


async def test_what_is_no_socket_is_left_alone(tmp_path: Path, gateway: GatewayUnderTest) -> None:
    path, folder, link = (tmp_path / name for name in ("precious", "folder", "link"))
    path.write_text("mine")
    folder.mkdir()
    link.symlink_to("nowhere")
    _, runner = server.make_runners(gateway.runtime)
    try:
        for taken in (path, folder, link):
            with pytest.raises(ConfigurationError, match=r"GATEWAY_API_SOCKET='.*' exists and is no socket$"):
                await listen_on_own_socket(runner, str(taken))
        with pytest.raises(ConfigurationError, match="cannot be used: No such file or directory"):
            await listen_on_own_socket(runner, str(tmp_path / "nowhere" / "api"))
    finally:
        await runner.cleanup()
    assert path.read_text() == "mine"
    assert folder.is_dir()
    assert link.is_symlink()


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


LOCK = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


async def test_a_gateway_waits_while_another_opens_a_socket_in_the_same_folder(
    tmp_path: Path, gateway: GatewayUnderTest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other is a process that only locks the folder."""
    monkeypatch.setattr(unix_sockets, "LOCK_TIMEOUT_S", 60.0)
    path = tmp_path / "api"
    _, runner = server.make_runners(gateway.runtime)
    other = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LOCK, str(tmp_path)), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert other.stdout is not None
        await other.stdout.readline()
        listening = asyncio.create_task(listen_on_own_socket(runner, str(path)))
        await asyncio.wait([listening], timeout=0.2)
        assert not listening.done()
        assert not path.exists()
        await other.communicate(b"")
        await listening
        assert path.exists()
    finally:
        if other.returncode is None:
            other.kill()
            await other.wait()
        await runner.cleanup()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder as a gateway does that opens a socket in it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def test_a_gateway_in_a_folder_that_stays_locked_is_refused_with_the_cause(servers: Servers, tmp_path: Path) -> None:
    path = tmp_path / "api"
    with locked(tmp_path):
        done = run_gateway(
            "serve", environment=process_environment(servers, GATEWAY_API_SOCKET=str(path), GATEWAY_OPS_PORT="0")
        )
    (error,) = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert done.returncode == 2
    assert error == f"error: GATEWAY_API_SOCKET={str(path)!r} cannot be used: another process keeps its folder locked"
