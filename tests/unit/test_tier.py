"""The fast tier stays fast: a unit test that starts a process or a server fails, and is told where it belongs."""

import asyncio
import socket
import subprocess
import sys
from pathlib import Path

import pytest

REFUSED = pytest.raises(pytest.fail.Exception, match="tests/integration")


@pytest.mark.parametrize("fixture", ["servers", "make_settings", "start_gateway", "gateway", "admin", "caller"])
def test_fixtures_with_servers_are_refused(request: pytest.FixtureRequest, fixture: str) -> None:
    with REFUSED:
        request.getfixturevalue(fixture)


def test_processes_are_refused() -> None:
    with REFUSED:
        subprocess.run([sys.executable, "--version"], check=False)


async def test_sockets_are_refused() -> None:
    with REFUSED, socket.socket() as unbound:
        unbound.bind(("127.0.0.1", 0))
    with REFUSED:
        await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0)
    with REFUSED:
        await asyncio.create_subprocess_exec(sys.executable, "--version")


def test_random_inputs_are_in_the_tier_of_properties() -> None:
    """Hypothesis takes a second to import, and most of the time of a property."""
    modules = [path for path in Path(__file__).parent.glob("*.py") if path != Path(__file__)]
    assert [path.name for path in modules if "hypothesis" in path.read_text(encoding="utf-8")] == []
