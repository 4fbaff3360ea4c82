"""Unit tests start no process and no server: they are the fast tier, under ten seconds."""

import socket
import subprocess
from collections.abc import Iterator
from typing import NoReturn

import pytest

WAY_OUT = "a unit test starts no process and no server: its place is tests/integration"


@pytest.fixture(scope="session")
def servers() -> NoReturn:
    """Fail: unit tests have no servers."""
    pytest.fail(WAY_OUT)


@pytest.fixture(autouse=True, scope="package")
def no_process_and_no_server() -> Iterator[None]:
    """Fail a test that starts a process, or connects or binds a socket."""

    def refuse(*_arguments: object, **_options: object) -> NoReturn:
        pytest.fail(WAY_OUT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", refuse)
        for name in ("connect", "connect_ex", "bind"):
            patch.setattr(socket.socket, name, refuse)
        yield
